/*
 * blockdev-precopy: the guest migrates while the job is running
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * At the end of a migration the guest is stopped and its nodes are
 * inactivated; it goes on at the other host, as a rule with the target of
 * the job as its disk.  That disk must then hold all that the source holds.  A
 * job that is ready sends its rest here, which it has kept within the
 * downtime limit.  If it is not ready, or the rest cannot be sent, the
 * migration fails, and the guest goes on at the source.  So nothing is lost
 * even if nobody pauses the migration to wait for the job.
 *
 * A guest that has just written or discarded a lot may have left much more
 * than that.  Nothing answers meanwhile, neither guest nor monitor, so there
 * is an end to it: a migration that fails can be tried again, and finds less
 * to send.
 */

#include "qemu/osdep.h"
#include "block/aio-wait.h"
#include "qemu/error-report.h"
#include "system/block-backend.h"
#include "precopy.h"
#include "trace.h"

/* How much longer than the downtime limit it may take, in ms */
#define PRECOPY_HAND_OVER_MS    10000
/* Is not begun if it seems to take so many times as long; much may be zeroes */
#define PRECOPY_HOPELESS        4

typedef struct PrecopyHandOver {
    PrecopyJob *job;
    int64_t limit;              /* ms */
    uint64_t left;
    bool sent, late, done;
} PrecopyHandOver;

/* Will it take far too long?  If the rate is not known, that will turn out. */
static bool precopy_is_hopeless(PrecopyJob *s, int64_t limit)
{
    uint64_t left = precopy_left(s), rate = s->converge.rate;

    return left > precopy_bound(s) && rate &&
           left * 1000.0 / rate > (double)limit * PRECOPY_HOPELESS;
}

static void coroutine_fn precopy_hand_over_entry(void *opaque)
{
    PrecopyHandOver *h = opaque;
    PrecopyJob *s = h->job;
    int64_t until = precopy_clock_ms() + h->limit;

    if (qatomic_read(&s->ret) || job_is_cancelled(&s->common.job)) {
        /* it is about to say so itself */
    } else if (precopy_is_hopeless(s, h->limit)) {
        h->late = true;
    } else {
        /* What failed before and was not to end the job is tried again */
        qatomic_set(&s->failed, false);
        h->sent = precopy_send_rest(s, until);
        h->late = !h->sent && !qatomic_read(&s->failed) &&
                  precopy_clock_ms() >= until;
    }
    if (h->late) {
        h->left = precopy_left(s);
    }
    qatomic_set(&h->done, true);
    aio_wait_kick();
}

/* The job has begun its last phase, and perhaps ended */
static bool precopy_is_ending(PrecopyJob *s)
{
    return s->finished || s->in_drain;
}

/* Nobody writes any more; the job stands still while this is done */
static bool precopy_send_rest_now(PrecopyJob *s, BlockDriverState *filter,
                                  bool *late)
{
    PrecopyHandOver h = {
        .job = s,
        .limit = s->downtime_limit + PRECOPY_HAND_OVER_MS,
    };

    bdrv_drained_begin(filter);
    if (!precopy_is_ending(s)) {
        aio_co_enter(s->common.job.aio_context,
                     qemu_coroutine_create(precopy_hand_over_entry, &h));
        AIO_WAIT_WHILE_UNLOCKED(NULL, !qatomic_read(&h.done));
    }
    if (h.late) {
        error_report("Job '%s' cannot send the rest of the disk within "
                     "%" PRId64 " ms: %" PRIu64 " bytes are left, and the "
                     "link carries %" PRIu64 " bytes per second. Let the "
                     "guest migrate when less is left (query-block-jobs)",
                     s->common.job.id, h.limit, h.left, s->converge.rate);
    }
    bdrv_drained_end(filter);
    *late = h.late;
    return h.sent;
}

/* The target may be inactive already; when the VM stops, all is flushed */
static bool GRAPH_RDLOCK precopy_target_inactive(PrecopyJob *s)
{
    return blk_bs(s->target)->open_flags & BDRV_O_INACTIVE;
}

/* In the main loop, when the filter is being inactivated */
int precopy_hand_over(PrecopyJob *s, BlockDriverState *filter)
{
    Job *job = &s->common.job;
    bool sent, late = false;

    GLOBAL_STATE_CODE();

    if (!job_is_ready(job)) {
        error_report("Job '%s' is not ready: the target does not hold what "
                     "the disk holds. Wait for the job, or cancel it, before "
                     "the guest migrates", job->id);
        return -EBUSY;
    }
    trace_precopy_hand_over(s, precopy_track_left(s->track));
    /* In its last phase it ends while we wait, and takes the filter out */
    WITH_JOB_LOCK_GUARD() {
        job_ref_locked(job);
    }
    bdrv_ref(filter);
    sent = precopy_target_inactive(s)
        ? !precopy_track_left(s->track) && !qatomic_read(&s->in_flight)
        : precopy_send_rest_now(s, filter, &late);
    if (late) {
        /* has been said */
    } else if (!sent && precopy_is_ending(s)) {
        error_report("Job '%s' was about to end: let the guest migrate when "
                     "it has", job->id);
    } else if (!sent) {
        error_report("Job '%s' could not send the rest of the disk", job->id);
    }
    bdrv_unref(filter);
    WITH_JOB_LOCK_GUARD() {
        job_unref_locked(job);
    }
    return sent ? 0 : late ? -EBUSY : -EIO;
}
