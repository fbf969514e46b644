/*
 * blockdev-precopy: requests from source to target
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Each request is a coroutine of its own in the job's AioContext, with a
 * buffer of its own; there are at most PRECOPY_MAX_IN_FLIGHT.  It has entered
 * its range in the track, so nothing else writes there at the target
 * (invariant 2 there).  A part that fails is dirty again before it leaves,
 * so invariant 1 holds whatever happens.
 *
 * What reads as zeroes is told to the target, not sent: ranges that the
 * source says are zero, and 64 KiB or more of data that turn out to be.
 */

#include "qemu/osdep.h"
#include "qemu/cutils.h"
#include "qemu/memalign.h"
#include "system/block-backend.h"
#include "precopy.h"
#include "trace.h"

/* Shorter runs of zeroes inside of data are sent */
#define PRECOPY_ZERO_RUN 65536

typedef struct PrecopyCopy {
    PrecopyOp op;
    PrecopyJob *job;
} PrecopyCopy;

void precopy_failed(PrecopyJob *s, bool read, int ret)
{
    BlockErrorAction action;

    action = block_job_error_action(&s->common,
                                    read ? s->on_source_error
                                         : s->on_target_error, read, -ret);
    if (action == BLOCK_ERROR_ACTION_REPORT) {
        qatomic_cmpxchg(&s->ret, 0, ret);
    }
    qatomic_set(&s->failed, true);
}

/*
 * Somebody may inactivate the target (blockdev-set-active), which the block
 * layer then has nobody write.  That drains it, so the job is paused while it
 * happens and nothing is between this and the write.
 */
int precopy_check_target(PrecopyJob *s)
{
    return blk_bs(s->target)->open_flags & BDRV_O_INACTIVE ? -EPERM : 0;
}

/* Dirty, or being copied */
uint64_t precopy_left(PrecopyJob *s)
{
    return precopy_track_left(s->track) + s->bytes_in_flight;
}

/* ------------------------------------------------------------------ */
/* One request                                                         */

static int coroutine_fn precopy_zero(PrecopyJob *s, int64_t offset,
                                     int64_t bytes, bool was_data)
{
    int ret = precopy_check_target(s) ?:
              blk_co_pwrite_zeroes(s->target, offset, bytes,
                                   BDRV_REQ_MAY_UNMAP);

    if (ret < 0) {
        precopy_failed(s, false, ret);
        return ret;
    }
    precopy_track_zeroed(s->track, bytes, was_data);
    return 0;
}

static int coroutine_fn precopy_send(PrecopyJob *s, int64_t offset,
                                     int64_t bytes, void *buf)
{
    QEMUIOVector qiov = QEMU_IOVEC_INIT_BUF(qiov, buf, bytes);
    int ret = precopy_check_target(s) ?:
              blk_co_pwritev(s->target, offset, bytes, &qiov, 0);

    if (ret < 0) {
        precopy_failed(s, false, ret);
        return ret;
    }
    precopy_track_sent(s->track, offset, bytes, false);
    return 0;
}

/* How many bytes at @buf go in one request: all zeroes, or none worth it */
static int64_t precopy_alike(const uint8_t *buf, int64_t bytes, bool *zero)
{
    int64_t n = MIN(bytes, PRECOPY_ZERO_RUN);

    *zero = buffer_is_zero(buf, n);
    while (n < bytes) {
        int64_t more = MIN(bytes - n, PRECOPY_ZERO_RUN);

        if (buffer_is_zero(buf + n, more) != *zero) {
            break;
        }
        n += more;
    }
    return n;
}

static int coroutine_fn precopy_copy_data(PrecopyJob *s, int64_t offset,
                                          int64_t bytes)
{
    uint8_t *buf = blk_try_blockalign(s->target, bytes);
    QEMUIOVector qiov = QEMU_IOVEC_INIT_BUF(qiov, buf, bytes);
    int64_t n, done;
    bool zero;
    int ret = -ENOMEM;

    block_job_ratelimit_processed_bytes(&s->common, bytes);
    if (buf) {
        bdrv_graph_co_rdlock();
        ret = bdrv_co_preadv(s->filter->backing, offset, bytes, &qiov, 0);
        bdrv_graph_co_rdunlock();
    }
    if (ret < 0) {
        precopy_failed(s, true, ret);
    }
    for (done = 0; ret >= 0 && done < bytes; done += n) {
        n = precopy_alike(buf + done, bytes - done, &zero);
        ret = zero ? precopy_zero(s, offset + done, n, true)
                   : precopy_send(s, offset + done, n, buf + done);
    }
    qemu_vfree(buf);
    return ret;
}

/* Copy the first part of a range that is all of one kind */
static int coroutine_fn precopy_copy_part(PrecopyJob *s, int64_t offset,
                                          int64_t bytes, int64_t *n)
{
    int status;

    bdrv_graph_co_rdlock();
    status = bdrv_co_block_status_above(bdrv_filter_bs(s->filter), NULL,
                                        offset, bytes, n, NULL, NULL);
    bdrv_graph_co_rdunlock();
    if (status < 0 || *n <= 0) {
        *n = bytes;         /* unknown: the read tells */
        status = BDRV_BLOCK_DATA;
    }
    if (*n < bytes) {
        int64_t whole = QEMU_ALIGN_DOWN(*n, s->track->granularity);

        /* In whole blocks: the target need not read to write a part */
        *n = whole ?: MIN(s->track->granularity, bytes);
        if (!whole) {
            status |= BDRV_BLOCK_DATA;      /* some of it, perhaps */
        }
    }
    if ((status & BDRV_BLOCK_ZERO) && !(status & BDRV_BLOCK_DATA)) {
        return precopy_zero(s, offset, *n, false);
    }
    return precopy_copy_data(s, offset, *n);
}

static void coroutine_fn precopy_copy_entry(void *opaque)
{
    PrecopyCopy *c = opaque;
    PrecopyJob *s = c->job;
    int64_t offset = precopy_op_offset(s->track, &c->op);
    int64_t bytes = precopy_op_bytes(s->track, &c->op);
    int64_t done, n;
    int ret = 0;

    trace_precopy_copy(s, offset, bytes);
    for (done = 0; done < bytes; done += n) {
        ret = job_is_cancelled(&s->common.job) ? -ECANCELED :
              precopy_copy_part(s, offset + done, bytes - done, &n);
        if (ret < 0) {
            precopy_track_mark(s->track, offset + done, bytes - done);
            break;
        }
    }
    trace_precopy_copied(s, offset, bytes, ret);
    job_progress_update(&s->common.job, done);
    precopy_track_end_op(s->track, &c->op);
    g_free(c);

    s->bytes_in_flight -= bytes;
    if (s->in_flight == 1) {
        s->busy_ns += qemu_clock_get_ns(QEMU_CLOCK_REALTIME) - s->busy_since;
    }
    qatomic_set(&s->in_flight, s->in_flight - 1);
    qemu_co_queue_restart_all(&s->slots);
}

/* ------------------------------------------------------------------ */
/* The job's side                                                      */

/* Start to copy what the sweep picks next.  There must be a free slot. */
PrecopyPick coroutine_fn precopy_copy_next(PrecopyJob *s, PrecopySweep *sweep)
{
    g_autofree PrecopyCopy *c = g_new0(PrecopyCopy, 1);
    PrecopyPick pick;
    Coroutine *co;

    assert(s->in_flight < PRECOPY_MAX_IN_FLIGHT);
    c->job = s;
    pick = precopy_track_pick(s->track, sweep, precopy_converge_bytes(s),
                              precopy_clock_ms(), &c->op);
    if (pick != PRECOPY_PICK_RUN) {
        return pick;
    }
    if (s->in_flight == 0) {
        s->busy_since = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
    }
    qatomic_set(&s->in_flight, s->in_flight + 1);
    s->bytes_in_flight += precopy_op_bytes(s->track, &c->op);
    co = qemu_coroutine_create(precopy_copy_entry, g_steal_pointer(&c));
    qemu_coroutine_enter(co);
    return pick;
}

bool precopy_is_full(PrecopyJob *s, int max_in_flight)
{
    return s->in_flight >= max_in_flight ||
           s->bytes_in_flight >= precopy_converge_window(s);
}

void coroutine_fn precopy_wait_slot(PrecopyJob *s)
{
    if (s->in_flight) {
        qemu_co_queue_wait(&s->slots, NULL);
    }
}

void coroutine_fn precopy_wait_all(PrecopyJob *s)
{
    while (s->in_flight) {
        qemu_co_queue_wait(&s->slots, NULL);
    }
}

/* How long there was something in flight, all in all */
int64_t precopy_busy_ns(PrecopyJob *s)
{
    return s->busy_ns + (s->in_flight ? qemu_clock_get_ns(QEMU_CLOCK_REALTIME)
                                        - s->busy_since : 0);
}

int coroutine_fn precopy_flush_target(PrecopyJob *s)
{
    int ret = blk_co_flush(s->target);

    if (ret < 0) {
        precopy_failed(s, false, ret);
    }
    return ret;
}

/*
 * Send what the guest has just written; @qiov does not change meanwhile, NULL
 * stands for zeroes.  Called from the guest's thread, with an operation
 * entered for the range.
 */
int coroutine_fn GRAPH_RDLOCK
precopy_write_through(PrecopyJob *s, int64_t offset, int64_t bytes,
                      QEMUIOVector *qiov, size_t qiov_offset)
{
    int ret = precopy_check_target(s);

    if (ret < 0) {
        /* as any other failure */
    } else if (qiov) {
        ret = blk_co_pwritev_part(s->target, offset, bytes, qiov, qiov_offset,
                                  0);
    } else {
        ret = blk_co_pwrite_zeroes(s->target, offset, bytes,
                                   BDRV_REQ_MAY_UNMAP);
    }
    trace_precopy_write_through(s, offset, bytes, ret);
    if (ret < 0) {
        precopy_track_mark(s->track, offset, bytes);
        precopy_failed(s, false, ret);
    } else if (qiov) {
        precopy_track_sent(s->track, offset, bytes, true);
    } else {
        precopy_track_zeroed(s->track, bytes, true);
    }
    return ret;
}

/*
 * The guest has discarded it: tell the target what now reads as zeroes.  What
 * does not is copied as if it had been written.  Called as the above is, with
 * the range taken before it was discarded.
 */
void coroutine_fn GRAPH_RDLOCK
precopy_discard_through(PrecopyJob *s, int64_t offset, int64_t bytes)
{
    int64_t done, n;

    for (done = 0; done < bytes; done += n) {
        int status = bdrv_co_block_status_above(bdrv_filter_bs(s->filter),
                                                NULL, offset + done,
                                                bytes - done, &n, NULL, NULL);
        int ret = 0;

        if (status < 0 || n <= 0) {
            n = bytes - done;       /* unknown: the copy looks for itself */
            status = 0;
        }
        if (status & BDRV_BLOCK_ZERO) {
            ret = precopy_check_target(s) ?:
                  blk_co_pwrite_zeroes(s->target, offset + done, n,
                                       BDRV_REQ_MAY_UNMAP);
            trace_precopy_write_through(s, offset + done, n, ret);
        }
        if (ret < 0) {
            precopy_failed(s, false, ret);
        }
        if (ret < 0 || !(status & BDRV_BLOCK_ZERO)) {
            precopy_track_discarded(s->track, offset + done, n);
        } else {
            precopy_track_zeroed(s->track, n, false);
        }
    }
}
