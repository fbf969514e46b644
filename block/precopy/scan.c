/*
 * blockdev-precopy: what there is to copy
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The first phase: what the source holds becomes dirty; what it does not hold
 * must read as zeroes at the target, and is left alone where it already does.
 * Writes of the guest are tracked since before, so that it does not matter
 * when a range is looked at.
 */

#include "qemu/osdep.h"
#include "system/block-backend.h"
#include "precopy.h"
#include "trace.h"

/* Looked at in one go, so that the job can be paused in between */
#define PRECOPY_SCAN_BYTES (1LL << 30)

/* Does the target read as zeroes there?  Sets *n to how far that is said. */
static bool coroutine_fn precopy_target_zero(PrecopyJob *s, int64_t offset,
                                             int64_t bytes, int64_t *n)
{
    int status;

    if (s->target_is_zero) {
        *n = bytes;
        return true;
    }
    bdrv_graph_co_rdlock();
    status = bdrv_co_block_status_above(blk_bs(s->target), NULL, offset,
                                        bytes, n, NULL, NULL);
    bdrv_graph_co_rdunlock();
    if (status < 0 || *n <= 0) {
        *n = bytes;
        return false;
    }
    return status & BDRV_BLOCK_ZERO;
}

/* The source is zero there: so must the target be */
static int coroutine_fn precopy_scan_zero(PrecopyJob *s, int64_t offset,
                                          int64_t bytes)
{
    int64_t done, n;

    for (done = 0; done < bytes; done += n) {
        int ret;

        job_pause_point(&s->common.job);
        if (job_is_cancelled(&s->common.job)) {
            return 0;
        }
        if (precopy_target_zero(s, offset + done, bytes - done, &n)) {
            continue;
        }
        ret = precopy_check_target(s) ?:
              blk_co_pwrite_zeroes(s->target, offset + done, n,
                                   BDRV_REQ_MAY_UNMAP);
        if (ret < 0) {
            /* Left to the copy, which has a policy for errors */
            precopy_track_mark(s->track, offset + done, n);
        }
    }
    return 0;
}

static int coroutine_fn precopy_scan_range(PrecopyJob *s, int64_t offset,
                                           int64_t bytes, int64_t *n)
{
    int status;

    bdrv_graph_co_rdlock();
    status = bdrv_co_block_status_above(bdrv_filter_bs(s->filter), NULL,
                                        offset, bytes, n, NULL, NULL);
    bdrv_graph_co_rdunlock();
    if (status < 0 || *n <= 0) {
        *n = bytes;                 /* the copy will meet the error again */
        status = BDRV_BLOCK_DATA;
    }
    if (!(status & BDRV_BLOCK_ZERO)) {
        precopy_track_mark(s->track, offset, *n);
        return 0;
    }
    WITH_QEMU_LOCK_GUARD(&s->track->lock) {
        s->track->counters.spared_unallocated += *n;
    }
    return precopy_scan_zero(s, offset, *n);
}

int coroutine_fn GRAPH_UNLOCKED precopy_scan(PrecopyJob *s)
{
    int64_t length = s->track->length;
    int64_t offset, n;

    for (offset = 0; offset < length; offset += n) {
        int ret;

        job_sleep_ns(&s->common.job, 0);
        if (job_is_cancelled(&s->common.job)) {
            return 0;
        }
        ret = precopy_scan_range(s, offset,
                                 MIN(length - offset, PRECOPY_SCAN_BYTES), &n);
        if (ret < 0) {
            return ret;
        }
    }
    trace_precopy_scan(s, precopy_left(s),
                       precopy_track_counters(s->track).spared_unallocated);
    return 0;
}
