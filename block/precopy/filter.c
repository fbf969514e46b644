/*
 * blockdev-precopy: the guest's requests
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The filter node above the source.  It hands each request down, and tells
 * the track what has been written, after that: a copy of older data that is
 * under way has then taken the block off the list before it read it.
 *
 * While writes go through (converge.c), a write waits for copies of its
 * range, goes to the source, and then to the target as far as the track says
 * that it is clean there; dirty blocks stay dirty and are copied later, as what
 * is written again and again is sent once that way.  If they are so busy that
 * no copy gets hold of them, the write takes those along that it covers.  Its
 * data is copied first: a guest may change it meanwhile, and both sides must
 * hold the same.  A discard goes through as the zeroes that it leaves behind.
 *
 * A failed target never fails the guest's request.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/cutils.h"
#include "qemu/iov.h"
#include "qemu/memalign.h"
#include "system/block-backend.h"
#include "precopy.h"

/*
 * The longest that "throttle" holds back a request: guests give up on one after
 * 30 s by default (Linux's SCSI and NVMe disks), and a slow link is no error
 */
#define PRECOPY_MAX_DELAY_NS (20 * NANOSECONDS_PER_SECOND)
/* How long who drains the node waits for a request that is held back */
#define PRECOPY_DELAY_NS     (100 * SCALE_MS)
/* Of a discard that goes through, while others may wait for it */
#define PRECOPY_DISCARD_BYTES (16 * 1024 * 1024)

typedef enum PrecopyWriteKind {
    PRECOPY_DATA,
    PRECOPY_ZEROES,
} PrecopyWriteKind;

static int coroutine_fn GRAPH_RDLOCK
precopy_filter_preadv(BlockDriverState *bs, int64_t offset, int64_t bytes,
                      QEMUIOVector *qiov, BdrvRequestFlags flags)
{
    return bdrv_co_preadv(bs->backing, offset, bytes, qiov, flags);
}

static int coroutine_fn GRAPH_RDLOCK
precopy_filter_below(BlockDriverState *bs, PrecopyWriteKind kind,
                     int64_t offset, int64_t bytes, QEMUIOVector *qiov,
                     BdrvRequestFlags flags)
{
    if (kind == PRECOPY_DATA) {
        return bdrv_co_pwritev(bs->backing, offset, bytes, qiov, flags);
    }
    return bdrv_co_pwrite_zeroes(bs->backing, offset, bytes, flags);
}

/* The write goes to both sides; an operation has been entered for it */
static int coroutine_fn GRAPH_RDLOCK
precopy_filter_both(BlockDriverState *bs, PrecopyWriteKind kind,
                    int64_t offset, int64_t bytes, QEMUIOVector *qiov,
                    BdrvRequestFlags flags)
{
    PrecopyFilter *f = bs->opaque;
    int64_t part = offset, part_bytes = bytes;
    QEMUIOVector bounce;
    void *buf = NULL;
    int ret;

    if (kind == PRECOPY_DATA) {
        buf = qemu_try_blockalign(bs, bytes);
        if (!buf) {
            ret = precopy_filter_below(bs, kind, offset, bytes, qiov, flags);
            precopy_track_wrote(f->track, offset, bytes, precopy_clock_ms());
            return ret;
        }
        qemu_iovec_to_buf(qiov, 0, buf, bytes);
        qemu_iovec_init_buf(&bounce, buf, bytes);
        flags &= ~BDRV_REQ_REGISTERED_BUF;
    }
    if (precopy_track_is_starved(f->track)) {
        precopy_track_take(f->track, offset, bytes);
    }
    ret = precopy_filter_below(bs, kind, offset, bytes, buf ? &bounce : NULL,
                               flags);
    if (ret < 0) {
        precopy_track_mark(f->track, offset, bytes);
    } else {
        precopy_track_wrote_both(f->track, offset, bytes, precopy_clock_ms());
        if (precopy_track_clean_part(f->track, &part, &part_bytes)) {
            precopy_write_through(f->job, part, part_bytes,
                                  buf ? &bounce : NULL, part - offset);
        }
    }
    qemu_vfree(buf);
    return ret;
}

/*
 * Requests are held one behind the other, each until its turn at the pace that
 * the guest is left: however many there are at once, it writes no faster, unless
 * some would wait for longer than a guest is sure to.  They have been written
 * and are known to be dirty; a drain, which lets all of them go, adds nothing to
 * what is sent at the end.
 */
static void coroutine_fn precopy_filter_delay(BlockDriverState *bs,
                                              int64_t offset, int64_t bytes)
{
    PrecopyFilter *f = bs->opaque;
    int64_t delay = precopy_throttle_ns(f->job, offset, bytes);

    delay = MIN(delay, PRECOPY_MAX_DELAY_NS);
    while (delay > 0 && !qatomic_read(&bs->quiesce_counter) &&
           precopy_throttles(f->job)) {
        qemu_co_sleep_ns(QEMU_CLOCK_REALTIME, MIN(delay, PRECOPY_DELAY_NS));
        delay -= PRECOPY_DELAY_NS;
    }
}

static int coroutine_fn GRAPH_RDLOCK
precopy_filter_write(BlockDriverState *bs, PrecopyWriteKind kind,
                     int64_t offset, int64_t bytes, QEMUIOVector *qiov,
                     BdrvRequestFlags flags)
{
    PrecopyFilter *f = bs->opaque;
    PrecopyOp op;
    int ret;

    if (f->job && precopy_track_begin_write(f->track, offset, bytes, &op)) {
        ret = precopy_filter_both(bs, kind, offset, bytes, qiov, flags);
        precopy_track_end_op(f->track, &op);
        return ret;
    }
    ret = precopy_filter_below(bs, kind, offset, bytes, qiov, flags);
    /* Also when it failed: nobody knows what is there now */
    precopy_track_wrote(f->track, offset, bytes, precopy_clock_ms());
    if (f->job) {
        precopy_filter_delay(bs, offset, bytes);
    }
    return ret;
}

static int coroutine_fn GRAPH_RDLOCK
precopy_filter_pwritev(BlockDriverState *bs, int64_t offset, int64_t bytes,
                       QEMUIOVector *qiov, BdrvRequestFlags flags)
{
    return precopy_filter_write(bs, PRECOPY_DATA, offset, bytes, qiov, flags);
}

static int coroutine_fn GRAPH_RDLOCK
precopy_filter_pwrite_zeroes(BlockDriverState *bs, int64_t offset,
                             int64_t bytes, BdrvRequestFlags flags)
{
    return precopy_filter_write(bs, PRECOPY_ZEROES, offset, bytes, NULL,
                                flags);
}

/* It goes to both sides; an operation has been entered for it */
static int coroutine_fn GRAPH_RDLOCK
precopy_filter_discard_both(BlockDriverState *bs, int64_t offset,
                            int64_t bytes)
{
    PrecopyFilter *f = bs->opaque;
    int ret;

    precopy_track_take(f->track, offset, bytes);
    ret = bdrv_co_pdiscard(bs->backing, offset, bytes);
    if (ret < 0) {
        precopy_track_discarded(f->track, offset, bytes);
    } else {
        precopy_discard_through(f->job, offset, bytes);
    }
    return ret;
}

static int coroutine_fn GRAPH_RDLOCK
precopy_filter_discard_part(BlockDriverState *bs, int64_t offset,
                            int64_t bytes)
{
    PrecopyFilter *f = bs->opaque;
    PrecopyOp op;
    int ret;

    if (f->job && precopy_track_begin_write(f->track, offset, bytes, &op)) {
        ret = precopy_filter_discard_both(bs, offset, bytes);
        precopy_track_end_op(f->track, &op);
        return ret;
    }
    ret = bdrv_co_pdiscard(bs->backing, offset, bytes);
    precopy_track_discarded(f->track, offset, bytes);
    return ret;
}

/*
 * What a discarded range reads as is the source's affair (it may as well stay
 * as it was), so whoever tells the target looks for himself.
 */
static int coroutine_fn GRAPH_RDLOCK
precopy_filter_pdiscard(BlockDriverState *bs, int64_t offset, int64_t bytes)
{
    PrecopyFilter *f = bs->opaque;
    int64_t done, n;
    int ret = 0;

    if (!(bs->backing->bs->open_flags & BDRV_O_UNMAP)) {
        /* It is not for the source, which stays as it is */
        return bdrv_co_pdiscard(bs->backing, offset, bytes);
    }
    for (done = 0; ret >= 0 && done < bytes; done += n) {
        n = bytes - done;
        if (precopy_track_writes_through(f->track)) {
            int64_t at = (offset + done) % PRECOPY_DISCARD_BYTES;

            n = MIN(n, PRECOPY_DISCARD_BYTES - at);
        }
        ret = precopy_filter_discard_part(bs, offset + done, n);
    }
    return ret;
}

static int coroutine_fn GRAPH_RDLOCK precopy_filter_flush(BlockDriverState *bs)
{
    return bs->backing ? bdrv_co_flush(bs->backing->bs) : 0;
}

static int64_t coroutine_fn GRAPH_RDLOCK
precopy_filter_getlength(BlockDriverState *bs)
{
    PrecopyFilter *f = bs->opaque;

    /* Before it stands above the source, what was said when it was made */
    if (!bs->backing) {
        return f->track ? f->track->length : 0;
    }
    return bdrv_co_getlength(bs->backing->bs);
}

static void GRAPH_RDLOCK precopy_filter_refresh_filename(BlockDriverState *bs)
{
    if (bs->backing) {
        pstrcpy(bs->exact_filename, sizeof(bs->exact_filename),
                bs->backing->bs->filename);
    }
}

static void precopy_filter_child_perm(BlockDriverState *bs, BdrvChild *c,
                                      BdrvChildRole role,
                                      BlockReopenQueue *reopen_queue,
                                      uint64_t perm, uint64_t shared,
                                      uint64_t *nperm, uint64_t *nshared)
{
    PrecopyFilter *f = bs->opaque;

    if (f->stop) {
        *nperm = 0;
        *nshared = BLK_PERM_ALL;
    } else {
        bdrv_default_perms(bs, c, role, reopen_queue, perm, shared, nperm,
                           nshared);
        /* A write that does not come by here would never be copied */
        if (!(bs->open_flags & BDRV_O_INACTIVE)) {
            *nshared &= ~(BLK_PERM_WRITE | BLK_PERM_RESIZE);
        }
    }
}

static void precopy_filter_close(BlockDriverState *bs)
{
    PrecopyFilter *f = bs->opaque;

    precopy_track_free(f->track);
}

/* The guest goes on elsewhere, with the target as its disk */
static int GRAPH_RDLOCK precopy_filter_inactivate(BlockDriverState *bs)
{
    PrecopyFilter *f = bs->opaque;

    return f->job ? precopy_hand_over(f->job, bs) : 0;
}

static BlockDriver precopy_filter = {
    .format_name                = "precopy_top",
    .instance_size              = sizeof(PrecopyFilter),
    .bdrv_close                 = precopy_filter_close,
    .bdrv_co_preadv             = precopy_filter_preadv,
    .bdrv_co_pwritev            = precopy_filter_pwritev,
    .bdrv_co_pwrite_zeroes      = precopy_filter_pwrite_zeroes,
    .bdrv_co_pdiscard           = precopy_filter_pdiscard,
    .bdrv_co_flush              = precopy_filter_flush,
    .bdrv_co_getlength          = precopy_filter_getlength,
    .bdrv_inactivate            = precopy_filter_inactivate,
    .bdrv_refresh_filename      = precopy_filter_refresh_filename,
    .bdrv_child_perm            = precopy_filter_child_perm,

    .is_filter                  = true,
    .filtered_child_is_backing  = true,
};

/* A filter node for a disk like @bs, not yet above it */
BlockDriverState *precopy_filter_new(BlockDriverState *bs, const char *name,
                                     Error **errp)
{
    BlockDriverState *filter;
    PrecopyFilter *f;
    int64_t length = bdrv_getlength(bs);

    if (length < 0) {
        error_setg_errno(errp, -length, "Cannot get the size of node '%s'",
                         bdrv_get_node_name(bs));
        return NULL;
    }
    /* The source decides about discards, as it does without the filter */
    filter = bdrv_new_open_driver(&precopy_filter, name,
                                  BDRV_O_RDWR | BDRV_O_UNMAP, errp);
    if (!filter) {
        return NULL;
    }
    f = filter->opaque;
    f->track = precopy_track_new(length, precopy_default_granularity(length));
    if (!f->track) {
        error_setg(errp, "Not enough memory to track the writes to a disk of "
                   "%" PRId64 " bytes", length);
        bdrv_unref(filter);
        return NULL;
    }
    filter->total_sectors = bs->total_sectors;
    filter->implicit = !name;
    filter->never_freeze = true;        /* so that it can be removed */
    filter->supported_write_flags = BDRV_REQ_WRITE_UNCHANGED |
        (BDRV_REQ_FUA & bs->supported_write_flags);
    filter->supported_zero_flags = BDRV_REQ_WRITE_UNCHANGED |
        ((BDRV_REQ_FUA | BDRV_REQ_MAY_UNMAP | BDRV_REQ_NO_FALLBACK) &
         bs->supported_zero_flags);
    return filter;
}
