/*
 * thinvm data path: writes of zeroes, and discards
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Data path layer; uses store.h for operations and inflight.h for the order
 * among requests.  Changes mappings only, and writes no data but for a part
 * of a cluster that shows its backing file elsewhere.
 *
 * Invariant 2 of the design (section 4): whoever changes the mapping of a
 * range registers its clusters alone, so that an allocating write that
 * overlaps comes before it or after it, whole.
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "io.h"
#include "trace.h"

typedef struct ZeroRequest {
    BlockDriverState *bs;
    bool may_unmap, no_fallback;
    uint64_t ticket;            /* of the last operation; 0: none */
    bool found;                 /* some of it was as it is to be */
} ZeroRequest;

bool GRAPH_RDLOCK thinvm_has_backing(BlockDriverState *bs)
{
    return bs->backing || bs->auto_backing_file[0];
}

/* Does all of [offset, offset + bytes), in one cluster, read as zeroes? */
static bool GRAPH_RDLOCK reads_as_zero(BlockDriverState *bs, uint64_t offset,
                                       uint64_t bytes, const ThinvmMapping *m)
{
    BDRVThinvmState *s = bs->opaque;

    if (!thinvm_source_is_zero(bs, THINVM_TREE_DISK,
                               thinvm_mapping_source(m))) {
        return false;
    }
    return m->type != THINVM_MAPPING_DATA ||
           !(m->valid & thinvm_parts_touched(s, offset, bytes));
}

/* Zero valid parts of a cluster of our own, whose mapping is @m, by name */
static int coroutine_fn GRAPH_RDLOCK
invalidate(ZeroRequest *r, const ThinvmMapping *m, uint16_t parts)
{
    BDRVThinvmState *s = r->bs->opaque;
    ThinvmOp op = {
        .type = THINVM_OP_INVALIDATE,
        .tree = THINVM_TREE_DISK,
        .guest = m->guest,
        .physical = m->physical,
        .valid = m->valid & parts,
    };
    uint64_t ticket = 0;
    Error *err = NULL;
    int ret;

    if (!op.valid) {
        r->found = true;
        return 0;
    }
    ret = thinvm_store_execute(s->store, &op, &ticket, &err);
    r->ticket = MAX(r->ticket, ticket);
    return ret < 0 ? thinvm_io_report(r->bs, ret, err) : 0;
}

static int coroutine_fn GRAPH_RDLOCK
unmap(ZeroRequest *r, uint64_t first, uint64_t count, ThinvmSource source)
{
    BDRVThinvmState *s = r->bs->opaque;
    uint64_t ticket = 0;
    Error *err = NULL;
    int ret;

    ret = thinvm_store_unmap(s->store, THINVM_TREE_DISK, first, count, source,
                             &ticket, &err);
    r->ticket = MAX(r->ticket, ticket);
    return ret < 0 ? thinvm_io_report(r->bs, ret, err) : 0;
}

/* May valid bits be taken away, that is, do zeroes show then? */
static bool can_invalidate(const ThinvmMapping *m)
{
    return thinvm_mapping_private(m) &&
           (m->source == THINVM_SOURCE_ZERO || m->valid == THINVM_ALL_VALID);
}

/*
 * Registered alone on one cluster: zero some of its parts.  -ENOTSUP: only
 * written zeroes can do that.
 */
static int coroutine_fn GRAPH_RDLOCK
zero_parts_registered(ZeroRequest *r, uint64_t offset, uint64_t bytes)
{
    BDRVThinvmState *s = r->bs->opaque;
    uint16_t parts = thinvm_parts_touched(s, offset, bytes);
    ThinvmMapping m;
    int ret;

    ret = thinvm_lookup(s, s->store, THINVM_TREE_DISK, offset, bytes, true, &m);
    if (ret < 0) {
        return ret;
    }
    if (reads_as_zero(r->bs, offset, bytes, &m)) {
        r->found = true;
        return 0;
    }
    if (!can_invalidate(&m)) {
        return -ENOTSUP;
    }
    if (r->may_unmap && !(m.valid & ~parts)) {
        return unmap(r, m.guest, 1, THINVM_SOURCE_ZERO);
    }
    return invalidate(r, &m, parts);
}

static int coroutine_fn GRAPH_RDLOCK
write_zero_data(BlockDriverState *bs, uint64_t offset, uint64_t bytes)
{
    QEMUIOVector qiov;
    void *buf = qemu_try_blockalign0(bs, bytes);
    int ret;

    if (!buf) {
        return -ENOMEM;
    }
    qemu_iovec_init_buf(&qiov, buf, bytes);
    ret = thinvm_io_write(bs, THINVM_TREE_DISK, offset, bytes, &qiov, 0, 0);
    qemu_vfree(buf);
    return ret;
}

/* Less than a cluster.  @whole_parts: nothing but whole parts are touched */
static int coroutine_fn GRAPH_RDLOCK
zero_in_cluster(ZeroRequest *r, uint64_t offset, uint64_t bytes,
                bool whole_parts)
{
    BDRVThinvmState *s = r->bs->opaque;
    ThinvmInflight inflight;
    ThinvmMapping m;
    int ret;

    ret = thinvm_lookup(s, s->store, THINVM_TREE_DISK, offset, bytes, false,
                        &m);
    if (ret < 0) {
        return ret;
    }
    if (reads_as_zero(r->bs, offset, bytes, &m)) {
        r->found = true;
        return 0;
    }
    ret = -ENOTSUP;
    if (whole_parts) {
        thinvm_inflight_begin_exclusive(s, &inflight, THINVM_TREE_DISK,
                                        offset >> s->cluster_bits, 1);
        ret = zero_parts_registered(r, offset, bytes);
        thinvm_inflight_end_request(s, &inflight);
    }
    if (ret == -ENOTSUP && !r->no_fallback) {
        ret = write_zero_data(r->bs, offset, bytes);
    }
    trace_thinvm_zero_parts(r->bs, offset, bytes, whole_parts, ret);
    return ret;
}

/* Registered alone on clusters: zero them, but keep those that are ours */
static int coroutine_fn GRAPH_RDLOCK
zero_clusters_registered(ZeroRequest *r, uint64_t first, uint64_t count)
{
    BDRVThinvmState *s = r->bs->opaque;
    uint64_t end = first + count;
    ThinvmMapping m;
    int ret = 0;

    while (first < end && ret == 0) {
        ret = thinvm_store_lookup(s->store, THINVM_TREE_DISK, NULL, first,
                                  end - first, true, &m);
        if (ret < 0) {
            break;
        }
        if (can_invalidate(&m)) {
            m.count = m.valid ? 1 : m.count;
            ret = invalidate(r, &m, THINVM_ALL_VALID);
        } else if (m.type != THINVM_MAPPING_ZERO) {
            ret = unmap(r, first, m.count, THINVM_SOURCE_ZERO);
        } else {
            r->found = true;
        }
        first += m.count;
    }
    return ret;
}

static int coroutine_fn GRAPH_RDLOCK
zero_clusters(ZeroRequest *r, uint64_t first, uint64_t count)
{
    BDRVThinvmState *s = r->bs->opaque;
    ThinvmInflight inflight;
    uint64_t step;
    int ret = 0;

    trace_thinvm_zero_clusters(r->bs, first, count, r->may_unmap);
    while (count && ret == 0) {
        /* keeping clusters takes an operation for each: let others in */
        step = r->may_unmap ? count :
               MIN(count, THINVM_ENTRIES_PER_LEAF -
                          first % THINVM_ENTRIES_PER_LEAF);
        thinvm_inflight_begin_exclusive(s, &inflight, THINVM_TREE_DISK, first,
                                        step);
        if (r->may_unmap) {
            ret = unmap(r, first, step, THINVM_SOURCE_ZERO);
        } else {
            ret = zero_clusters_registered(r, first, step);
        }
        thinvm_inflight_end_request(s, &inflight);
        first += step;
        count -= step;
    }
    return ret;
}

/* The disk's end counts as the end of its cluster, and of its part */
static uint64_t round_end(BlockDriverState *bs, uint64_t end)
{
    BDRVThinvmState *s = bs->opaque;
    uint64_t disk_size = bs->total_sectors << BDRV_SECTOR_BITS;

    return end == disk_size ? ROUND_UP(end, s->cluster_size) : end;
}

static int coroutine_fn GRAPH_RDLOCK
zero_range(ZeroRequest *r, uint64_t offset, uint64_t bytes)
{
    BDRVThinvmState *s = r->bs->opaque;
    uint64_t part_size = 1ULL << thinvm_part_bits(s);
    uint64_t end = offset + bytes;
    uint64_t rounded = round_end(r->bs, end);
    int ret = 0;

    while (offset < end && ret == 0) {
        uint64_t next = QEMU_ALIGN_DOWN(offset, s->cluster_size) +
                        s->cluster_size;

        if (QEMU_IS_ALIGNED(offset, s->cluster_size) && next <= rounded) {
            next = QEMU_ALIGN_DOWN(rounded, s->cluster_size);
            ret = zero_clusters(r, offset >> s->cluster_bits,
                                (next - offset) >> s->cluster_bits);
        } else {
            next = MIN(next, rounded);
            ret = zero_in_cluster(r, offset, MIN(next, end) - offset,
                                  QEMU_IS_ALIGNED(offset | next, part_size));
        }
        offset = next;
    }
    return ret;
}

int coroutine_fn GRAPH_RDLOCK
thinvm_co_pwrite_zeroes(BlockDriverState *bs, int64_t offset, int64_t bytes,
                        BdrvRequestFlags flags)
{
    BDRVThinvmState *s = bs->opaque;
    ZeroRequest r = {
        .bs = bs,
        .may_unmap = flags & BDRV_REQ_MAY_UNMAP,
        .no_fallback = flags & BDRV_REQ_NO_FALLBACK,
    };
    unsigned token;
    int ret;

    if (!bytes) {
        return 0;
    }
    ret = thinvm_mode_begin_write(bs);
    if (ret < 0) {
        return ret;
    }
    token = thinvm_store_request_begin(s->store);
    ret = zero_range(&r, offset, bytes);
    thinvm_store_request_end(s->store, token);
    if (ret == 0) {
        ret = thinvm_mode_commit_found(bs, r.ticket, r.found);
    }
    return ret;
}

int coroutine_fn GRAPH_RDLOCK
thinvm_co_pdiscard(BlockDriverState *bs, int64_t offset, int64_t bytes)
{
    BDRVThinvmState *s = bs->opaque;
    uint64_t end = round_end(bs, offset + bytes);
    uint64_t first, count;
    ZeroRequest r = { .bs = bs };
    ThinvmInflight inflight;
    unsigned token;
    int ret;

    if (!QEMU_IS_ALIGNED(offset | end, s->cluster_size)) {
        /* a hint about a part of a cluster is not worth following */
        return -ENOTSUP;
    }
    ret = thinvm_mode_begin_write(bs);
    if (ret < 0) {
        return ret;
    }

    first = offset >> s->cluster_bits;
    count = (end - offset) >> s->cluster_bits;
    trace_thinvm_discard(bs, first, count);
    token = thinvm_store_request_begin(s->store);
    thinvm_inflight_begin_exclusive(s, &inflight, THINVM_TREE_DISK, first,
                                    count);
    /* in either case it reads as zeroes afterwards */
    ret = unmap(&r, first, count, thinvm_has_backing(bs) ?
                THINVM_SOURCE_ZERO : THINVM_SOURCE_BACKING);
    thinvm_inflight_end_request(s, &inflight);
    thinvm_store_request_end(s->store, token);
    if (ret == 0) {
        ret = thinvm_mode_commit_found(bs, r.ticket, r.found);
    }
    return ret;
}

bool GRAPH_RDLOCK thinvm_backing_is_closed(BlockDriverState *bs)
{
    return thinvm_has_backing(bs) && !bs->backing;
}

/*
 * A backing file that is not open reads as zeroes now, and shows when it is.
 * Hiding what of it is behind the old end writes whole parts: that with the
 * old end in it cannot be filled up with what is before it.
 */
static int coroutine_fn GRAPH_RDLOCK
zero_tail_closed(BlockDriverState *bs, uint64_t old_size, uint64_t bytes,
                 const ThinvmMapping *m, Error **errp)
{
    BDRVThinvmState *s = bs->opaque;
    uint64_t part_size = 1ULL << thinvm_part_bits(s);
    uint16_t valid = m->type == THINVM_MAPPING_DATA ? m->valid : 0;

    if (!QEMU_IS_ALIGNED(old_size, part_size) &&
        !(valid & thinvm_parts_touched(s, old_size, 1))) {
        error_setg(errp, "The disk ends at offset %" PRIu64 ", which is no "
                   "multiple of %" PRIu64 ", amid what its backing file '%s' "
                   "shows; to be enlarged it must be opened with its backing "
                   "file", old_size, part_size, bs->auto_backing_file);
        return -ENOTSUP;
    }
    return write_zero_data(bs, old_size, bytes);
}

/* Of the last cluster, which @m maps, without words for an error */
static int coroutine_fn GRAPH_RDLOCK
zero_tail_open(BlockDriverState *bs, uint64_t old_size, uint64_t bytes,
               const ThinvmMapping *m)
{
    int64_t backing_size;

    if (reads_as_zero(bs, old_size, bytes, m)) {
        return 0;
    }
    if (m->type == THINVM_MAPPING_NONE) {
        backing_size = bdrv_co_getlength(bs->backing->bs);
        if (backing_size < 0) {
            return backing_size;
        }
        if (backing_size <= old_size) {
            return 0;
        }
    }
    return write_zero_data(bs, old_size, bytes);
}

int coroutine_fn GRAPH_RDLOCK
thinvm_io_zero_tail(BlockDriverState *bs, uint64_t old_size, Error **errp)
{
    BDRVThinvmState *s = bs->opaque;
    uint64_t bytes = ROUND_UP(old_size, s->cluster_size) - old_size;
    Error *local_err = NULL;
    ThinvmMapping m;
    int ret;

    if (!bytes) {
        return 0;
    }
    ret = thinvm_lookup(s, s->store, THINVM_TREE_DISK, old_size, bytes, false,
                        &m);
    if (ret == 0 && thinvm_backing_is_closed(bs) &&
        thinvm_mapping_source(&m) == THINVM_SOURCE_BACKING) {
        ret = zero_tail_closed(bs, old_size, bytes, &m, &local_err);
    } else if (ret == 0) {
        ret = zero_tail_open(bs, old_size, bytes, &m);
    }
    if (ret < 0 && !local_err) {
        error_setg_errno(&local_err, -ret, "Cannot clear the rest of the last "
                         "cluster, from offset %" PRIu64, old_size);
    }
    error_propagate(errp, local_err);
    return ret;
}
