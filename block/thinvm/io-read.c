/*
 * thinvm data path: reads
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Data path layer; uses store.h for look-ups and mode.c around them.  Takes
 * no lock.  What keeps a cluster from being reused while it is read is the
 * request epoch (invariant 2); what makes a read of an image that another
 * host writes right is the second look of thinvm_mode_end_read().
 */
#include "qemu/osdep.h"
#include "qemu/error-report.h"
#include "block/aio_task.h"
#include "io.h"
#include "trace.h"

/*
 * In a cluster of which only some parts are valid, a hole of at most so many
 * bytes that reads as zeroes is read along with the valid parts around it,
 * and then zeroed in memory: cheaper than one more request.
 */
#define MAX_HOLE    (64 * KiB)

/* Times that a follower looks again when a read has failed */
#define MAX_FAILURES    16

/* A piece of a request that one I/O serves */
typedef struct ReadPiece {
    AioTask task;
    BlockDriverState *bs;
    int tree;
    uint64_t offset, bytes;         /* of the guest */
    bool from_template;             /* if that can be read, else: */
    bool from_file;
    uint64_t device_offset;         /* if from_file */
    ThinvmSource source;            /* else */
    uint16_t holes;                 /* parts to zero after the read */
    QEMUIOVector *qiov;
    size_t qiov_offset;
    BdrvRequestFlags flags;
} ReadPiece;

int thinvm_io_report(BlockDriverState *bs, int ret, Error *err)
{
    trace_thinvm_io_error(bs, ret, err ? error_get_pretty(err) : "");
    if (err && ret == -EBADMSG) {
        /* not an error of a device, which the guest's error policy is for */
        error_reportf_err(err, "thinvm: node '%s': ",
                          bdrv_get_device_or_node_name(bs));
    } else {
        error_free(err);
    }
    return ret;
}

int coroutine_fn GRAPH_RDLOCK
thinvm_io_read_source(BlockDriverState *bs, int tree, ThinvmSource source,
                      uint64_t offset, uint64_t bytes, QEMUIOVector *qiov,
                      size_t qiov_offset, BdrvRequestFlags flags)
{
    uint64_t disk_size = bs->total_sectors << BDRV_SECTOR_BITS;
    uint64_t in_backing;

    if (thinvm_source_is_zero(bs, tree, source)) {
        qemu_iovec_memset(qiov, qiov_offset, 0, bytes);
        return 0;
    }

    /*
     * Beyond the end of the disk there is nothing, though the backing file
     * may be longer: what is filled in there shows when the disk grows.
     */
    in_backing = offset < disk_size ? MIN(bytes, disk_size - offset) : 0;
    if (in_backing < bytes) {
        qemu_iovec_memset(qiov, qiov_offset + in_backing, 0,
                          bytes - in_backing);
    }
    if (!in_backing) {
        return 0;
    }
    BLKDBG_CO_EVENT(bs->file, BLKDBG_READ_BACKING_AIO);
    return bdrv_co_preadv_part(bs->backing, offset, in_backing, qiov,
                               qiov_offset, flags);
}

static void zero_holes(const ReadPiece *p)
{
    BDRVThinvmState *s = p->bs->opaque;
    uint64_t part_size = 1ULL << thinvm_part_bits(s);
    uint64_t end = p->offset + p->bytes;
    uint64_t at, next;

    for (at = p->offset; at < end; at = next) {
        next = MIN(end, QEMU_ALIGN_DOWN(at, part_size) + part_size);
        if (p->holes & thinvm_parts_touched(s, at, next - at)) {
            qemu_iovec_memset(p->qiov, p->qiov_offset + (at - p->offset), 0,
                              next - at);
        }
    }
}

static int coroutine_fn GRAPH_RDLOCK read_piece(const ReadPiece *p)
{
    BlockDriverState *bs = p->bs;
    int ret;

    if (p->from_template &&
        thinvm_io_read_template(bs, p->offset, p->bytes, p->qiov,
                                p->qiov_offset, p->flags) == 0) {
        return 0;
    }
    if (!p->from_file) {
        return thinvm_io_read_source(bs, p->tree, p->source, p->offset,
                                     p->bytes, p->qiov, p->qiov_offset,
                                     p->flags);
    }
    BLKDBG_CO_EVENT(bs->file, BLKDBG_READ_AIO);
    ret = bdrv_co_preadv_part(bs->file, p->device_offset, p->bytes, p->qiov,
                              p->qiov_offset, p->flags);
    if (ret == 0 && p->holes) {
        zero_holes(p);
    }
    return ret;
}

static int coroutine_fn read_piece_entry(AioTask *task)
{
    ReadPiece *p = container_of(task, ReadPiece, task);

    /* the request that waits for us holds it */
    assume_graph_lock();
    return read_piece(p);
}

/*
 * How far, from part @first of a cluster with these valid bits, one I/O may
 * go, and which parts are holes in it.  @hole_parts: the longest hole that
 * may be read over.  Returns the part after the last.
 */
static unsigned span_of_parts(uint16_t valid, unsigned first,
                              unsigned hole_parts, uint16_t *holes)
{
    bool is_valid = valid >> first & 1;
    unsigned end = first + 1;
    unsigned i;

    *holes = 0;
    if (!is_valid) {
        while (end < THINVM_PARTS && !(valid >> end & 1)) {
            end++;
        }
        return end;
    }
    for (i = end; i < THINVM_PARTS; i++) {
        if (valid >> i & 1) {
            *holes |= (1u << i) - (1u << end);
            end = i + 1;
        } else if (i - end >= hole_parts) {
            break;
        }
    }
    return end;
}

/*
 * Fill in what serves the start of @p; p->bytes is shortened to it.
 * @over_holes: invalid parts may be read along and zeroed afterwards.
 */
static void GRAPH_RDLOCK choose_piece(ReadPiece *p, const ThinvmMapping *m,
                                      bool over_holes)
{
    BDRVThinvmState *s = p->bs->opaque;
    unsigned part_bits = thinvm_part_bits(s);
    unsigned first, end, hole_parts = 0;

    p->holes = 0;
    p->source = thinvm_mapping_source(m);
    p->bytes = thinvm_clamp(s, p->offset, p->bytes, m->count);
    p->from_file = m->type == THINVM_MAPPING_DATA && m->valid;
    if (!p->from_file) {
        return;
    }
    p->device_offset = thinvm_device_offset(s, m, p->offset);
    if (!thinvm_mapping_mixed(m)) {
        p->from_template = thinvm_io_in_template(p->bs, m, p->offset,
                                                 p->bytes);
        return;
    }

    if (over_holes && thinvm_source_is_zero(p->bs, p->tree, m->source)) {
        hole_parts = MAX_HOLE >> part_bits;
    }
    first = thinvm_into_cluster(s, p->offset) >> part_bits;
    end = span_of_parts(m->valid, first, hole_parts, &p->holes);
    p->from_file = m->valid >> first & 1;
    p->bytes = MIN(p->bytes, ((uint64_t)end << part_bits) -
                             thinvm_into_cluster(s, p->offset));
}

/* Read pieces side by side; the first one is not all of the request */
static int coroutine_fn GRAPH_RDLOCK
read_pieces(BlockDriverState *bs, ThinvmStore *st, int tree, uint64_t offset,
            uint64_t bytes, QEMUIOVector *qiov, size_t qiov_offset,
            BdrvRequestFlags flags)
{
    BDRVThinvmState *s = bs->opaque;
    AioTaskPool *pool = aio_task_pool_new(THINVM_IO_WORKERS);
    ThinvmMapping m;
    int ret = 0;

    while (bytes && aio_task_pool_status(pool) == 0) {
        ReadPiece *p = g_new(ReadPiece, 1);

        *p = (ReadPiece) {
            .task.func = read_piece_entry,
            .bs = bs,
            .tree = tree,
            .offset = offset,
            .bytes = bytes,
            .qiov = qiov,
            .qiov_offset = qiov_offset,
            .flags = flags,
        };
        ret = thinvm_lookup(s, st, tree, offset, bytes, false, &m);
        if (ret < 0) {
            g_free(p);
            break;
        }
        choose_piece(p, &m, true);
        offset += p->bytes;
        qiov_offset += p->bytes;
        bytes -= p->bytes;
        aio_task_pool_start_task(pool, &p->task);
    }

    aio_task_pool_wait_all(pool);
    if (ret == 0) {
        ret = aio_task_pool_status(pool);
    }
    aio_task_pool_free(pool);
    return ret;
}

/* What one I/O on the file does not serve: mixed, zeroes, backing, several */
static int coroutine_fn GRAPH_RDLOCK G_GNUC_NO_INLINE
read_other(BlockDriverState *bs, ThinvmStore *st, int tree, uint64_t offset,
           uint64_t bytes, QEMUIOVector *qiov, size_t qiov_offset,
           BdrvRequestFlags flags, const ThinvmMapping *m)
{
    ReadPiece p = {
        .bs = bs,
        .tree = tree,
        .offset = offset,
        .bytes = bytes,
        .qiov = qiov,
        .qiov_offset = qiov_offset,
        .flags = flags,
    };

    choose_piece(&p, m, true);
    if (p.bytes == bytes) {
        return read_piece(&p);
    }
    return read_pieces(bs, st, tree, offset, bytes, qiov, qiov_offset, flags);
}

/* Most reads are of what one mapping covers, all valid */
static int coroutine_fn GRAPH_RDLOCK
read_once(BlockDriverState *bs, ThinvmStore *st, int tree, uint64_t offset,
          uint64_t bytes, QEMUIOVector *qiov, size_t qiov_offset,
          BdrvRequestFlags flags)
{
    BDRVThinvmState *s = bs->opaque;
    ThinvmMapping m;
    int ret = thinvm_lookup(s, st, tree, offset, bytes, false, &m);

    if (ret < 0) {
        return ret;
    }
    if (likely(m.type == THINVM_MAPPING_DATA && m.valid == THINVM_ALL_VALID &&
               m.source != THINVM_SOURCE_TEMPLATE &&
               thinvm_clamp(s, offset, bytes, m.count) == bytes)) {
        BLKDBG_CO_EVENT(bs->file, BLKDBG_READ_AIO);
        return bdrv_co_preadv_part(bs->file,
                                   thinvm_device_offset(s, &m, offset), bytes,
                                   qiov, qiov_offset, flags);
    }
    return read_other(bs, st, tree, offset, bytes, qiov, qiov_offset, flags,
                      &m);
}

/* In migration mode: what was looked up counts if it is still so afterwards */
static int coroutine_fn GRAPH_RDLOCK G_GNUC_NO_INLINE
read_following(BlockDriverState *bs, int tree, uint64_t offset, uint64_t bytes,
               QEMUIOVector *qiov, size_t qiov_offset, BdrvRequestFlags flags)
{
    BDRVThinvmState *s = bs->opaque;
    ThinvmStore *st;
    ThinvmLook look;
    unsigned token, failures = 0;
    bool repeat;
    int ret, end;

    do {
        repeat = false;
        st = qatomic_read(&s->store);
        token = thinvm_store_request_begin(st);
        ret = thinvm_mode_begin_read(bs, st, &look);
        if (ret == 0) {
            ret = read_once(bs, st, tree, offset, bytes, qiov, qiov_offset,
                            flags);
            failures += ret < 0;
            /* it fails where the owner has cut off what it moved elsewhere */
            end = thinvm_mode_end_read(bs, &look, &repeat);
            ret = ret < 0 ? ret : end;
            repeat = repeat && end == 0 && failures < MAX_FAILURES;
        }
        thinvm_store_request_end(st, token);
        if (repeat) {
            trace_thinvm_read_repeat(bs, tree, offset, bytes);
        }
    } while (repeat);

    return ret;
}

int coroutine_fn GRAPH_RDLOCK
thinvm_io_read(BlockDriverState *bs, int tree, uint64_t offset, uint64_t bytes,
               QEMUIOVector *qiov, size_t qiov_offset, BdrvRequestFlags flags)
{
    BDRVThinvmState *s = bs->opaque;
    ThinvmStore *st;
    unsigned token;
    int ret;

    if (!bytes) {
        return 0;
    }
    st = qatomic_read(&s->store);
    token = thinvm_store_request_begin(st);
    /* A new store is put in place before "follow" ends, so look again */
    if (unlikely(qatomic_load_acquire(&s->follow) ||
                 qatomic_read(&s->store) != st)) {
        thinvm_store_request_end(st, token);
        return read_following(bs, tree, offset, bytes, qiov, qiov_offset,
                              flags);
    }
    ret = read_once(bs, st, tree, offset, bytes, qiov, qiov_offset, flags);
    thinvm_store_request_end(st, token);
    return ret;
}

int coroutine_fn GRAPH_RDLOCK
thinvm_co_preadv_part(BlockDriverState *bs, int64_t offset, int64_t bytes,
                      QEMUIOVector *qiov, size_t qiov_offset,
                      BdrvRequestFlags flags)
{
    return thinvm_io_read(bs, THINVM_TREE_DISK, offset, bytes, qiov,
                          qiov_offset, flags);
}

/* Copy one piece to @dst without it passing through memory */
static int coroutine_fn GRAPH_RDLOCK
copy_piece(ReadPiece *p, BdrvChild *dst, uint64_t dst_offset,
           BdrvRequestFlags write_flags)
{
    BlockDriverState *bs = p->bs;
    int64_t backing_size;

    if (p->from_file) {
        return bdrv_co_copy_range_from(bs->file, p->device_offset, dst,
                                       dst_offset, p->bytes, p->flags,
                                       write_flags);
    }
    if (!thinvm_source_is_zero(bs, p->tree, p->source)) {
        backing_size = bdrv_co_getlength(bs->backing->bs);
        if (backing_size < 0) {
            return backing_size;
        }
        if (p->offset < backing_size) {
            p->bytes = MIN(p->bytes, backing_size - p->offset);
            return bdrv_co_copy_range_from(bs->backing, p->offset, dst,
                                           dst_offset, p->bytes, p->flags,
                                           write_flags);
        }
    }
    return bdrv_co_copy_range_from(bs->file, 0, dst, dst_offset, p->bytes,
                                   p->flags,
                                   write_flags | BDRV_REQ_ZERO_WRITE);
}

int coroutine_fn GRAPH_RDLOCK
thinvm_co_copy_range_from(BlockDriverState *bs, BdrvChild *src,
                          int64_t src_offset, BdrvChild *dst,
                          int64_t dst_offset, int64_t bytes,
                          BdrvRequestFlags read_flags,
                          BdrvRequestFlags write_flags)
{
    BDRVThinvmState *s = bs->opaque;
    ThinvmStore *st = qatomic_read(&s->store);
    uint64_t end = src_offset + bytes;
    ThinvmMapping m;
    unsigned token;
    int ret = 0;
    ReadPiece p = {
        .bs = bs,
        .tree = THINVM_TREE_DISK,
        .offset = src_offset,
        .flags = read_flags,
    };

    token = thinvm_store_request_begin(st);
    if (qatomic_load_acquire(&s->follow) || qatomic_read(&s->store) != st) {
        /* what is copied could not be called back when it proves stale */
        ret = -ENOTSUP;
    }
    while (p.offset < end && ret == 0) {
        p.bytes = end - p.offset;
        ret = thinvm_lookup(s, st, p.tree, p.offset, p.bytes, false, &m);
        if (ret == 0) {
            choose_piece(&p, &m, false);
            ret = copy_piece(&p, dst, dst_offset + (p.offset - src_offset),
                             write_flags);
            p.offset += p.bytes;
        }
    }
    thinvm_store_request_end(st, token);
    return ret;
}
