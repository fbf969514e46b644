/*
 * thinvm data path: writes
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Data path layer; uses store.h for look-ups, space and operations, and
 * inflight.h for the order among writers.
 *
 * A request is cut into chunks, each of one kind (WriteKind).  For each chunk:
 *   1. look up; register what has to be registered; look up again;
 *   2. reserve clusters where new ones are needed;
 *   3. write the data, with what fills the rest of its first and last part
 *      before and behind it, in one I/O;
 *   4. execute the operation that makes it visible;
 *   5. end the registration.
 * 1 and 2 are done chunk after chunk, so that consecutive chunks get
 * consecutive clusters; 3 to 5 of several chunks go on side by side.
 *
 * Invariants (design, section 4): 2, by registrations and request epochs; 7:
 * when something fails, what was reserved is given back and nothing that was
 * mapped has changed.  1 is the store's: it flushes the data before it writes
 * the record of an operation that was executed after the data were written.
 */
#include "qemu/osdep.h"
#include "block/aio_task.h"
#include "io.h"
#include "trace.h"

typedef enum WriteKind {
    /* all parts are valid and the cluster is private: registers nothing, or
       all the same, see thinvm_inflight_may_copy() */
    WRITE_IN_PLACE,
    /* private cluster, some parts become valid: registered for its parts */
    WRITE_VALIDATE,
    /* into a cluster that another writer has reserved: likewise */
    WRITE_JOIN,
    /* new clusters where there were none: likewise, once reserved */
    WRITE_NEW,
    /* new clusters in the place of shared ones, be it that no part of them is
       valid: registered alone.  When the last snapshot that shares them goes
       they are the disk's own again, and who finds them so must not go on in
       there while others are on their way to the new ones */
    WRITE_COPY,
} WriteKind;

typedef struct WriteRequest {
    BlockDriverState *bs;
    int tree;
    uint64_t offset, bytes;         /* of the guest */
    QEMUIOVector *qiov;             /* the data, unless @src */
    size_t qiov_offset;
    BdrvChild *src;                 /* copied from there, if not NULL */
    uint64_t src_offset;
    BdrvRequestFlags read_flags;    /* for @src */
    BdrvRequestFlags flags;
    uint64_t ticket;                /* of the last operation; 0: none */
    bool found;                     /* some of it is written in place */
    bool no_space;                  /* no cluster could be reserved */
} WriteRequest;

typedef struct WriteChunk {
    AioTask task;
    WriteRequest *r;
    BlockDriverState *bs;
    int tree;
    WriteKind kind;
    uint64_t offset, bytes;         /* of the guest */
    ThinvmMapping old;              /* from the first cluster on */
    uint64_t first, count;          /* guest clusters */
    uint64_t physical;              /* of the first cluster */
    bool summed;                    /* the data have this checksum */
    ThinvmDataSum sum;
    bool registered;                /* though it is WRITE_IN_PLACE */
    ThinvmInflight inflight;
} WriteChunk;

static size_t qiov_offset(const WriteChunk *c)
{
    return c->r->qiov_offset + (c->offset - c->r->offset);
}

/* ------------------------------------------------------------------ */
/* 1, 2: what kind of write is it, and where to                        */

static uint64_t first_part(const WriteChunk *c)
{
    return c->offset >> thinvm_part_bits(c->bs->opaque);
}

/* The part after the last one */
static uint64_t end_part(const WriteChunk *c)
{
    unsigned part_bits = thinvm_part_bits(c->bs->opaque);

    return ((c->offset + c->bytes - 1) >> part_bits) + 1;
}

/* Parts that the chunk touches in this one of its clusters */
static uint16_t touched_in(const WriteChunk *c, uint64_t cluster)
{
    BDRVThinvmState *s = c->bs->opaque;
    uint64_t start = MAX(c->offset, cluster << s->cluster_bits);

    return thinvm_parts_touched(s, start, c->offset + c->bytes - start);
}

/* The chunk becomes its part in the first @count clusters */
static void shorten(WriteChunk *c, uint64_t count)
{
    BDRVThinvmState *s = c->bs->opaque;

    c->bytes = thinvm_clamp(s, c->offset, c->bytes, count);
    c->count = thinvm_clusters_touched(s, c->offset, c->bytes);
}

/* Parts of each cluster of the chunk that are in the old mapping's clusters */
static uint16_t old_valid(const WriteChunk *c)
{
    return c->old.type == THINVM_MAPPING_DATA ? c->old.valid : 0;
}

static int coroutine_fn look_up(WriteChunk *c)
{
    BDRVThinvmState *s = c->bs->opaque;

    return thinvm_lookup(s, s->store, c->tree, c->offset, c->bytes, true,
                         &c->old);
}

/* @c->old is private: can all of the chunk be written where it is? */
static bool all_valid(const WriteChunk *c)
{
    return c->old.valid == THINVM_ALL_VALID ||
           !(touched_in(c, c->first) & ~c->old.valid);
}

/*
 * We are registered for parts of clusters that were mapped a moment ago.
 * -EAGAIN: the first one is so no more.
 */
static int coroutine_fn prepare_registered_parts(WriteChunk *c)
{
    BDRVThinvmState *s = c->bs->opaque;
    int ret = look_up(c);

    if (ret == 0 && thinvm_mapping_private(&c->old)) {
        assert(!c->inflight.exclusive);
        shorten(c, c->old.count);
        c->physical = c->old.physical;
        c->kind = all_valid(c) ? WRITE_IN_PLACE : WRITE_VALIDATE;
        /* in place, too: who moves the cluster must wait for our data */
        c->registered = true;
        thinvm_inflight_shorten(s, &c->inflight, end_part(c));
        return 0;
    }
    thinvm_inflight_end_request(s, &c->inflight);
    return ret < 0 ? ret : -EAGAIN;
}

static int coroutine_fn prepare_parts(WriteChunk *c)
{
    shorten(c, MIN(c->old.count, THINVM_ENTRIES_PER_LEAF));
    thinvm_inflight_begin_parts(c->bs->opaque, &c->inflight, c->tree,
                                first_part(c), end_part(c));
    return prepare_registered_parts(c);
}

static int coroutine_fn execute(WriteChunk *c, const ThinvmOp *op)
{
    BDRVThinvmState *s = c->bs->opaque;
    uint64_t ticket = 0;
    Error *err = NULL;
    int ret = thinvm_store_execute_summed(s->store, op,
                                          c->summed ? &c->sum : NULL, &ticket,
                                          &err);

    c->r->ticket = MAX(c->r->ticket, ticket);
    return ret < 0 ? thinvm_io_report(c->bs, ret, err) : 0;
}

/* Where new clusters would continue what lies before them; 0: no wish */
static uint64_t coroutine_fn goal(WriteChunk *c)
{
    BDRVThinvmState *s = c->bs->opaque;
    ThinvmMapping m;
    uint64_t physical;

    if (c->first == 0) {
        return 0;
    }
    physical = thinvm_inflight_goal(s, c->tree, c->first);
    if (physical) {
        return physical;
    }
    if (thinvm_store_lookup(s->store, c->tree, NULL, c->first - 1, 1, false,
                            &m) < 0 || m.type != THINVM_MAPPING_DATA) {
        return 0;
    }
    return m.physical + 1;
}

/* Does this cluster of the chunk keep parts that the chunk does not touch? */
static bool ragged(const WriteChunk *c, uint64_t cluster)
{
    return touched_in(c, cluster) != THINVM_ALL_VALID;
}

/* What the parts that nobody writes shall read from in a new cluster */
static ThinvmSource GRAPH_RDLOCK new_source(const WriteChunk *c)
{
    if (c->tree != THINVM_TREE_DISK || !thinvm_has_backing(c->bs)) {
        return THINVM_SOURCE_ZERO;
    }
    return thinvm_mapping_source(&c->old);
}

/*
 * How many clusters of a copy does one operation map?  Those that are valid, or
 * written, as a whole; or one.
 */
static uint64_t copied_together(const WriteChunk *c)
{
    if (old_valid(c) == THINVM_ALL_VALID) {
        return c->count;
    }
    return ragged(c, c->first) ? 1 :
           c->count - ragged(c, c->first + c->count - 1);
}

/* Registered alone on c->count clusters that have no place of their own */
static int coroutine_fn GRAPH_RDLOCK reserve(WriteChunk *c)
{
    BDRVThinvmState *s = c->bs->opaque;
    uint64_t last;
    int ret;

    shorten(c, MIN(c->old.count, THINVM_ENTRIES_PER_LEAF -
                                 c->first % THINVM_ENTRIES_PER_LEAF));
    if (c->old.type == THINVM_MAPPING_DATA) {
        shorten(c, copied_together(c));
    }
    ret = thinvm_volume_reserve(s, s->store, goal(c), c->count,
                                &c->physical, &c->count);
    if (ret < 0) {
        c->r->no_space = ret == -ENOSPC;
        return ret;
    }
    shorten(c, c->count);
    last = c->first + c->count - 1;
    trace_thinvm_write_allocate(c->bs, c->tree, c->offset, c->bytes, c->first,
                                c->count, c->physical, c->old.type);

    if (c->old.type == THINVM_MAPPING_DATA) {
        c->kind = WRITE_COPY;
        thinvm_inflight_place(s, &c->inflight, c->count, c->physical);
        return 0;
    }
    c->kind = WRITE_NEW;
    thinvm_inflight_narrow(s, &c->inflight, first_part(c), end_part(c),
                           c->physical, new_source(c), ragged(c, c->first),
                           last > c->first && ragged(c, last));
    return 0;
}

/*
 * There is no space for a copy of a cluster that is marked as the template's.
 * Then it loses the mark, and may be written in place if it is not shared.
 * The mark must be gone durably before: else it would come back with a crash,
 * and vouch for data that are not the template's.  -EAGAIN: look again.
 */
static int coroutine_fn unmark(WriteChunk *c)
{
    BDRVThinvmState *s = c->bs->opaque;
    ThinvmOp op = {
        .type = THINVM_OP_VALIDATE,
        .tree = c->tree,
        .guest = c->first,
        .physical = c->old.physical,
        .valid = THINVM_ALL_VALID,
    };
    int ret = execute(c, &op);

    if (ret == 0) {
        ret = thinvm_store_commit(s->store, THINVM_COMMIT_DURABLE, true);
    }
    return ret < 0 ? ret : -EAGAIN;
}

static int coroutine_fn GRAPH_RDLOCK prepare_exclusive(WriteChunk *c)
{
    BDRVThinvmState *s = c->bs->opaque;
    int ret = look_up(c);

    if (ret == 0 && thinvm_mapping_private(&c->old)) {
        /* somebody mapped it while we waited */
        shorten(c, 1);
        thinvm_inflight_narrow(s, &c->inflight, first_part(c), end_part(c), 0,
                               0, false, false);
        return prepare_registered_parts(c);
    }
    if (ret == 0) {
        ret = reserve(c);
        if (ret == -ENOSPC && c->old.source == THINVM_SOURCE_TEMPLATE) {
            ret = unmark(c);
        }
    }
    if (ret < 0) {
        thinvm_inflight_end_request(s, &c->inflight);
    }
    return ret;
}

static int coroutine_fn GRAPH_RDLOCK prepare_allocate(WriteChunk *c)
{
    BDRVThinvmState *s = c->bs->opaque;
    ThinvmAlloc *alloc;
    int ret;

    shorten(c, c->old.count);
    switch (thinvm_inflight_begin_allocate(s, &c->inflight, c->tree,
                                           first_part(c), end_part(c))) {
    case THINVM_BEGIN_JOINED:
        alloc = c->inflight.head;
        shorten(c, 1);
        c->kind = WRITE_JOIN;
        c->physical = alloc->physical;
        c->old = (ThinvmMapping) {
            .type = alloc->source == THINVM_SOURCE_ZERO ?
                    THINVM_MAPPING_ZERO : THINVM_MAPPING_NONE,
            .guest = c->first,
            .count = 1,
            .source = alloc->source,
        };
        return 0;
    case THINVM_BEGIN_PARTS:
        shorten(c, 1);
        ret = prepare_registered_parts(c);
        if (ret != -EAGAIN) {
            return ret;
        }
        thinvm_inflight_begin_alone(s, &c->inflight, c->tree, first_part(c),
                                    end_part(c));
        return prepare_exclusive(c);
    case THINVM_BEGIN_EXCLUSIVE:
        shorten(c, thinvm_inflight_end(&c->inflight) - c->first);
        return prepare_exclusive(c);
    }
    g_assert_not_reached();
}

/*
 * Decide on the start of @c, of which as much is kept as is of one kind; the
 * rest, if any, is for the next chunk.
 */
static int coroutine_fn GRAPH_RDLOCK prepare_chunk(WriteChunk *c)
{
    BDRVThinvmState *s = c->bs->opaque;
    uint64_t bytes = c->bytes;
    unsigned ended;
    int ret;

    c->first = c->offset >> s->cluster_bits;
    do {
        c->bytes = bytes;
        ended = thinvm_inflight_copies_ended(s);
        ret = look_up(c);
        if (ret < 0) {
            return ret;
        }
        shorten(c, c->old.count);
        if (!thinvm_mapping_private(&c->old)) {
            ret = prepare_allocate(c);
        } else if (all_valid(c) && !thinvm_inflight_may_copy(s, ended)) {
            c->kind = WRITE_IN_PLACE;
            c->physical = c->old.physical;
        } else {
            ret = prepare_parts(c);
        }
    } while (ret == -EAGAIN);

    return ret;
}

/* ------------------------------------------------------------------ */
/* 3: data and what fills the parts around it                          */

/* Bytes to be written before c->offset, in the first cluster */
static uint64_t bytes_before(const WriteChunk *c)
{
    BDRVThinvmState *s = c->bs->opaque;
    unsigned part_bits = thinvm_part_bits(s);
    uint64_t into = thinvm_into_cluster(s, c->offset);
    unsigned part = into >> part_bits;
    uint16_t valid = old_valid(c);

    if (c->kind == WRITE_IN_PLACE) {
        return 0;
    }
    if (c->kind == WRITE_COPY) {
        /* from the first part that is worth copying */
        part = valid ? MIN(part, ctz32(valid)) : part;
    } else if (valid >> part & 1) {
        return 0;
    }
    return into - ((uint64_t)part << part_bits);
}

/* Bytes to be written behind the data, in the last cluster */
static uint64_t bytes_behind(const WriteChunk *c)
{
    BDRVThinvmState *s = c->bs->opaque;
    unsigned part_bits = thinvm_part_bits(s);
    uint64_t end = thinvm_into_cluster(s, c->offset + c->bytes - 1) + 1;
    unsigned part = (end - 1) >> part_bits;
    uint16_t valid = old_valid(c);

    if (c->kind == WRITE_IN_PLACE) {
        return 0;
    }
    if (c->kind == WRITE_COPY) {
        part = valid ? MAX(part, 31 - clz32(valid)) : part;
    } else if (valid >> part & 1) {
        return 0;
    }
    return ((uint64_t)(part + 1) << part_bits) - end;
}

/* One part (or less) of what goes around the data */
static int coroutine_fn GRAPH_RDLOCK
fill_part(WriteChunk *c, uint64_t offset, uint64_t bytes, uint8_t *buf)
{
    BlockDriverState *bs = c->bs;
    BDRVThinvmState *s = bs->opaque;
    uint16_t bit = thinvm_parts_touched(s, offset, bytes);
    QEMUIOVector qiov;

    if (c->kind == WRITE_COPY && (c->old.valid & bit)) {
        qemu_iovec_init_buf(&qiov, buf, bytes);
        if (thinvm_io_in_template(bs, &c->old, offset, bytes) &&
            thinvm_io_read_template(bs, offset, bytes, &qiov, 0, 0) == 0) {
            return 0;
        }
        BLKDBG_CO_EVENT(bs->file, BLKDBG_COW_READ);
        return bdrv_co_pread(bs->file,
                             thinvm_device_offset(s, &c->old, offset), bytes,
                             buf, 0);
    }
    if (!(touched_in(c, offset >> s->cluster_bits) & bit)) {
        /* between parts that are copied; stays invalid */
        memset(buf, 0, bytes);
        return 0;
    }
    qemu_iovec_init_buf(&qiov, buf, bytes);
    return thinvm_io_read_source(bs, c->tree, thinvm_mapping_source(&c->old),
                                 offset, bytes, &qiov, 0, 0);
}

/* Guest bytes [offset, offset + bytes), as they are before the write */
static int coroutine_fn GRAPH_RDLOCK
fill(WriteChunk *c, uint64_t offset, uint64_t bytes, uint8_t *buf)
{
    BDRVThinvmState *s = c->bs->opaque;
    uint64_t part_size = 1ULL << thinvm_part_bits(s);
    uint64_t end = offset + bytes;
    uint64_t next;
    int ret = 0;

    if (c->kind == WRITE_COPY && c->old.valid == THINVM_ALL_VALID) {
        part_size = s->cluster_size;
    }
    for (; offset < end && ret == 0; offset = next) {
        next = MIN(end, QEMU_ALIGN_DOWN(offset, part_size) + part_size);
        ret = fill_part(c, offset, next - offset, buf);
        buf += next - offset;
    }
    return ret;
}

/* A write that failed may be the first sign that the image is not ours */
static int coroutine_fn GRAPH_RDLOCK
write_file(BlockDriverState *bs, BlkdebugEvent event, uint64_t device_offset,
           uint64_t bytes, QEMUIOVector *qiov, size_t qiov_offset,
           BdrvRequestFlags flags)
{
    BDRVThinvmState *s = bs->opaque;
    bool again = false;
    int ret;

    ret = thinvm_store_touch(s->store, device_offset, bytes);
    if (ret < 0) {
        return ret;
    }
    BLKDBG_CO_EVENT(bs->file, event);
    do {
        if (!thinvm_still_owner(s)) {
            return -EIO;
        }
        ret = bdrv_co_pwritev_part(bs->file, device_offset, bytes, qiov,
                                   qiov_offset, flags);
        again = ret < 0 && !again && thinvm_mode_write_failed(bs);
    } while (again);
    return ret;
}

static int coroutine_fn GRAPH_RDLOCK
write_buffer(BlockDriverState *bs, uint64_t device_offset, uint64_t bytes,
             uint8_t *buf)
{
    QEMUIOVector qiov = QEMU_IOVEC_INIT_BUF(qiov, buf, bytes);

    return bytes ? write_file(bs, BLKDBG_COW_WRITE, device_offset, bytes,
                              &qiov, 0, 0) : 0;
}

/* Three I/Os where one would have too many elements */
static int coroutine_fn GRAPH_RDLOCK
write_separately(WriteChunk *c, uint64_t device_offset, uint8_t *before,
                 uint64_t nb_before, uint8_t *behind, uint64_t nb_behind)
{
    int ret;

    ret = write_buffer(c->bs, device_offset - nb_before, nb_before, before);
    if (ret == 0) {
        ret = write_buffer(c->bs, device_offset + c->bytes, nb_behind, behind);
    }
    if (ret == 0) {
        ret = write_file(c->bs, BLKDBG_WRITE_AIO, device_offset, c->bytes,
                         c->r->qiov, qiov_offset(c), c->r->flags);
    }
    return ret;
}

static int coroutine_fn GRAPH_RDLOCK
write_filled(WriteChunk *c, uint64_t device_offset, uint64_t nb_before,
             uint64_t nb_behind)
{
    BlockDriverState *bs = c->bs;
    WriteRequest *r = c->r;
    int niov = qemu_iovec_subvec_niov(r->qiov, qiov_offset(c), c->bytes);
    QEMUIOVector qiov;
    uint8_t *buf;
    int ret;

    buf = qemu_try_blockalign(bs->file->bs, nb_before + nb_behind);
    if (!buf) {
        return -ENOMEM;
    }
    ret = fill(c, c->offset - nb_before, nb_before, buf);
    if (ret == 0) {
        ret = fill(c, c->offset + c->bytes, nb_behind, buf + nb_before);
    }
    if (ret < 0) {
        goto out;
    }
    if (niov > IOV_MAX - 2) {
        ret = write_separately(c, device_offset, buf, nb_before,
                               buf + nb_before, nb_behind);
        goto out;
    }

    qemu_iovec_init(&qiov, niov + 2);
    if (nb_before) {
        qemu_iovec_add(&qiov, buf, nb_before);
    }
    qemu_iovec_concat(&qiov, r->qiov, qiov_offset(c), c->bytes);
    if (nb_behind) {
        qemu_iovec_add(&qiov, buf + nb_before, nb_behind);
    }
    ret = write_file(bs, BLKDBG_WRITE_AIO, device_offset - nb_before,
                     qiov.size, &qiov, 0,
                     r->flags & ~BDRV_REQ_REGISTERED_BUF);
    qemu_iovec_destroy(&qiov);
out:
    qemu_vfree(buf);
    return ret;
}

/*
 * Is a checksum of the data worth its time, and certain to stay right until
 * they are visible?  They must go into parts that nobody can find, or has found
 * before they were zeroed: what is valid may be written in place at any time.
 * One cluster, thus one operation.
 */
static bool wants_sum(const WriteChunk *c, uint64_t bytes)
{
    BDRVThinvmState *s = c->bs->opaque;

    return c->kind != WRITE_IN_PLACE && c->count == 1 &&
           bytes <= THINVM_SUM_MAX_BYTES &&
           (c->kind != WRITE_VALIDATE ||
            !(touched_in(c, c->first) & c->old.valid)) &&
           /* Once it is mapped, who joins may find the part valid already */
           (c->kind != WRITE_JOIN ||
            qatomic_read(&c->inflight.head->state) != THINVM_ALLOC_MAPPED) &&
           thinvm_store_wants_sums(s->store) &&
           qatomic_read(&s->mode) == THINVM_CACHE_MODE_WRITEBACK &&
           (c->kind != WRITE_VALIDATE || thinvm_store_invalid_left(s->store));
}

/* In memory of our own: the guest may change its own while it is written */
static int coroutine_fn GRAPH_RDLOCK
write_summed(WriteChunk *c, uint64_t device_offset, uint64_t nb_before,
             uint64_t nb_behind)
{
    BlockDriverState *bs = c->bs;
    BDRVThinvmState *s = bs->opaque;
    uint64_t bytes = nb_before + c->bytes + nb_behind;
    uint8_t *buf = qemu_try_blockalign(bs->file->bs, bytes);
    QEMUIOVector qiov;
    int ret;

    if (!buf) {
        return -ENOMEM;
    }
    ret = fill(c, c->offset - nb_before, nb_before, buf);
    if (ret == 0) {
        ret = fill(c, c->offset + c->bytes, nb_behind,
                   buf + nb_before + c->bytes);
    }
    if (ret == 0) {
        qemu_iovec_to_buf(c->r->qiov, qiov_offset(c), buf + nb_before,
                          c->bytes);
        thinvm_store_sum(s->store, device_offset - nb_before, buf, bytes,
                         &c->sum);
        qemu_iovec_init_buf(&qiov, buf, bytes);
        ret = write_file(bs, BLKDBG_WRITE_AIO, device_offset - nb_before,
                         bytes, &qiov, 0,
                         c->r->flags & ~BDRV_REQ_REGISTERED_BUF);
        c->summed = ret == 0;
    }
    qemu_vfree(buf);
    return ret;
}

static int coroutine_fn GRAPH_RDLOCK
copy_data(WriteChunk *c, uint64_t device_offset)
{
    BDRVThinvmState *s = c->bs->opaque;
    WriteRequest *r = c->r;
    int ret;

    ret = thinvm_store_touch(s->store, device_offset, c->bytes);
    if (ret < 0 || !thinvm_still_owner(s)) {
        return -EIO;
    }
    ret = bdrv_co_copy_range_to(r->src, r->src_offset + (c->offset - r->offset),
                                c->bs->file, device_offset, c->bytes,
                                r->read_flags, r->flags);
    if (ret < 0 && ret != -ENOTSUP) {
        thinvm_mode_write_failed(c->bs);
    }
    return ret;
}

static int coroutine_fn GRAPH_RDLOCK write_data(WriteChunk *c)
{
    BDRVThinvmState *s = c->bs->opaque;
    uint64_t nb_before = bytes_before(c);
    uint64_t nb_behind = bytes_behind(c);
    uint64_t device_offset = (c->physical << s->cluster_bits) +
                             thinvm_into_cluster(s, c->offset);

    if (c->kind == WRITE_IN_PLACE) {
        c->r->found = true;
    }
    if (c->r->src) {
        /* parts that must be filled up need the data in memory */
        return nb_before || nb_behind ? -ENOTSUP : copy_data(c, device_offset);
    }
    if (wants_sum(c, nb_before + c->bytes + nb_behind)) {
        return write_summed(c, device_offset, nb_before, nb_behind);
    }
    if (nb_before || nb_behind) {
        return write_filled(c, device_offset, nb_before, nb_behind);
    }
    return write_file(c->bs, BLKDBG_WRITE_AIO, device_offset, c->bytes,
                      c->r->qiov, qiov_offset(c), c->r->flags);
}

/* ------------------------------------------------------------------ */
/* 4: make it visible                                                  */

static int coroutine_fn publish_validate(WriteChunk *c)
{
    int ret = 0;

    for (uint64_t i = 0; i < c->count && ret == 0; i++) {
        ThinvmOp op = {
            .type = THINVM_OP_VALIDATE,
            .tree = c->tree,
            .guest = c->first + i,
            .physical = c->physical + i,
            .valid = touched_in(c, c->first + i) & ~c->old.valid,
        };

        ret = execute(c, &op);
    }
    return ret;
}

static int coroutine_fn publish_alloc(WriteChunk *c, ThinvmAlloc *alloc)
{
    BDRVThinvmState *s = c->bs->opaque;
    uint64_t ticket = 0;
    Error *err = NULL;
    int ret;

    ret = thinvm_alloc_complete(s, alloc, touched_in(c, alloc->guest),
                                c->summed ? &c->sum : NULL, &ticket, &err);
    c->r->ticket = MAX(c->r->ticket, ticket);
    return ret < 0 ? thinvm_io_report(c->bs, ret, err) : 0;
}

/*
 * The clusters of a WRITE_NEW that are not open to others: the write touches
 * all of their parts.
 */
static void inner_clusters(const WriteChunk *c, uint64_t *skip,
                           uint64_t *count)
{
    *skip = c->inflight.head ? 1 : 0;
    *count = c->count - *skip - (c->inflight.tail ? 1 : 0);
}

static int coroutine_fn publish_new(WriteChunk *c)
{
    uint64_t skip, count;
    int ret = 0;

    inner_clusters(c, &skip, &count);
    if (count) {
        ThinvmOp op = {
            .type = THINVM_OP_MAP,
            .tree = c->tree,
            .guest = c->first + skip,
            .count = count,
            .physical = c->physical + skip,
            .valid = THINVM_ALL_VALID,
        };
        ret = execute(c, &op);
        if (ret < 0) {
            return ret;
        }
        /* mapped: no more ours to give back */
        c->count -= count;
    }
    if (c->inflight.head) {
        ret = publish_alloc(c, c->inflight.head);
    }
    if (ret == 0 && c->inflight.tail) {
        ret = publish_alloc(c, c->inflight.tail);
    }
    return ret;
}

static int coroutine_fn publish_copy(WriteChunk *c)
{
    uint16_t valid = c->old.valid | touched_in(c, c->first);
    ThinvmOp op;
    int ret;

    assert(c->count == 1 || valid == THINVM_ALL_VALID);
    op = (ThinvmOp) {
        .type = THINVM_OP_MAP,
        .tree = c->tree,
        .guest = c->first,
        .count = c->count,
        .physical = c->physical,
        .valid = valid,
        .source = valid == THINVM_ALL_VALID ? 0 : c->old.source,
    };
    ret = execute(c, &op);
    if (ret == 0) {
        c->count = 0;
    }
    return ret;
}

static int coroutine_fn publish(WriteChunk *c)
{
    switch (c->kind) {
    case WRITE_IN_PLACE:
        return 0;
    case WRITE_VALIDATE:
        return publish_validate(c);
    case WRITE_JOIN:
        return publish_alloc(c, c->inflight.head);
    case WRITE_NEW:
        return publish_new(c);
    case WRITE_COPY:
        return publish_copy(c);
    }
    g_assert_not_reached();
}

/* ------------------------------------------------------------------ */
/* 5, and the whole                                                    */

/* Give back what was reserved and not mapped, and let others in */
static void coroutine_fn finish(WriteChunk *c)
{
    BDRVThinvmState *s = c->bs->opaque;
    uint64_t skip, count;

    if (c->kind == WRITE_IN_PLACE && !c->registered) {
        return;
    }
    inner_clusters(c, &skip, &count);
    if ((c->kind == WRITE_NEW || c->kind == WRITE_COPY) && count) {
        thinvm_store_unreserve(s->store, c->physical + skip, count);
    }
    thinvm_inflight_end_request(s, &c->inflight);
    if (c->inflight.head) {
        thinvm_alloc_put(s, c->inflight.head);
    }
    if (c->inflight.tail) {
        thinvm_alloc_put(s, c->inflight.tail);
    }
}

static int coroutine_fn GRAPH_RDLOCK perform_chunk(WriteChunk *c)
{
    int ret = write_data(c);

    if (ret == 0) {
        ret = publish(c);
    }
    finish(c);
    return ret;
}

static int coroutine_fn perform_chunk_entry(AioTask *task)
{
    WriteChunk *c = container_of(task, WriteChunk, task);

    /* the request that waits for us holds it */
    assume_graph_lock();
    return perform_chunk(c);
}

/* The general way: chunks side by side */
static int coroutine_fn GRAPH_RDLOCK write_chunks(WriteRequest *r)
{
    AioTaskPool *pool = NULL;
    uint64_t offset = r->offset;
    uint64_t bytes = r->bytes;
    int ret = 0;

    while (bytes && aio_task_pool_status(pool) == 0) {
        WriteChunk *c = g_new(WriteChunk, 1);

        *c = (WriteChunk) {
            .task.func = perform_chunk_entry,
            .r = r,
            .bs = r->bs,
            .tree = r->tree,
            .offset = offset,
            .bytes = bytes,
        };
        ret = prepare_chunk(c);
        if (ret < 0) {
            g_free(c);
            break;
        }
        offset += c->bytes;
        bytes -= c->bytes;
        if (!bytes && !pool) {
            ret = perform_chunk(c);
            g_free(c);
            break;
        }
        if (!pool) {
            pool = aio_task_pool_new(THINVM_IO_WORKERS);
        }
        aio_task_pool_start_task(pool, &c->task);
    }

    if (pool) {
        aio_task_pool_wait_all(pool);
        if (ret == 0) {
            ret = aio_task_pool_status(pool);
        }
        aio_task_pool_free(pool);
    }
    return ret;
}

/* Most writes overwrite; these need nothing but one look-up */
static int coroutine_fn GRAPH_RDLOCK write_once(WriteRequest *r)
{
    BDRVThinvmState *s = r->bs->opaque;
    unsigned ended = thinvm_inflight_copies_ended(s);
    ThinvmMapping m;
    int ret;

    ret = thinvm_lookup(s, s->store, r->tree, r->offset, r->bytes, true, &m);
    if (ret < 0) {
        return ret;
    }
    if (!r->src && thinvm_mapping_private(&m) &&
        thinvm_clamp(s, r->offset, r->bytes, m.count) == r->bytes &&
        (m.valid == THINVM_ALL_VALID ||
         !(thinvm_parts_touched(s, r->offset, r->bytes) & ~m.valid)) &&
        !thinvm_inflight_may_copy(s, ended)) {
        r->found = true;
        return write_file(r->bs, BLKDBG_WRITE_AIO,
                          thinvm_device_offset(s, &m, r->offset), r->bytes,
                          r->qiov, r->qiov_offset, r->flags);
    }
    return write_chunks(r);
}

static int coroutine_fn GRAPH_RDLOCK write_request(WriteRequest *r)
{
    BDRVThinvmState *s = r->bs->opaque;
    unsigned attempt, token;
    int ret;

    if (!r->bytes) {
        return 0;
    }
    ret = thinvm_mode_begin_write(r->bs);
    if (ret < 0) {
        return ret;
    }
    for (attempt = 0; attempt < 2; attempt++) {
        r->no_space = false;
        token = thinvm_store_request_begin(s->store);
        ret = write_once(r);
        thinvm_store_request_end(s->store, token);
        if (ret == 0 || !r->no_space) {
            break;
        }
        /* what was freed since we joined could not be given to us: once more */
    }
    if (ret == 0) {
        ret = thinvm_mode_commit_found(r->bs, r->ticket, r->found);
    }
    return ret;
}

int coroutine_fn GRAPH_RDLOCK
thinvm_io_write(BlockDriverState *bs, int tree, uint64_t offset,
                uint64_t bytes, QEMUIOVector *qiov, size_t qiov_offset,
                BdrvRequestFlags flags)
{
    WriteRequest r = {
        .bs = bs,
        .tree = tree,
        .offset = offset,
        .bytes = bytes,
        .qiov = qiov,
        .qiov_offset = qiov_offset,
        .flags = flags,
    };

    return write_request(&r);
}

int coroutine_fn GRAPH_RDLOCK
thinvm_co_pwritev_part(BlockDriverState *bs, int64_t offset, int64_t bytes,
                       QEMUIOVector *qiov, size_t qiov_offset,
                       BdrvRequestFlags flags)
{
    return thinvm_io_write(bs, THINVM_TREE_DISK, offset, bytes, qiov,
                           qiov_offset, flags);
}

/* -ENOTSUP sends the caller back to reading and writing the range */
int coroutine_fn GRAPH_RDLOCK
thinvm_co_copy_range_to(BlockDriverState *bs, BdrvChild *src,
                        int64_t src_offset, BdrvChild *dst,
                        int64_t dst_offset, int64_t bytes,
                        BdrvRequestFlags read_flags,
                        BdrvRequestFlags write_flags)
{
    WriteRequest r = {
        .bs = bs,
        .tree = THINVM_TREE_DISK,
        .offset = dst_offset,
        .bytes = bytes,
        .src = src,
        .src_offset = src_offset,
        .read_flags = read_flags,
        .flags = write_flags,
    };

    return write_request(&r);
}
