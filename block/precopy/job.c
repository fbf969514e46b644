/*
 * blockdev-precopy: life cycle of the job
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 *   scanning   what is there to copy                      precopy_scan
 *   copying    sweeps, until what is left is in bounds    precopy_loop
 *   ready      it is kept in bounds                       precopy_become_ready
 *   closing    the user wants the end: it is made less
 *   last phase the guest's requests are held, and the     precopy_last_phase
 *              rest is sent and flushed
 *   finished   the target takes the source's place (job-complete), or just
 *              holds what the source held (job-cancel)    precopy_finish
 *
 * Whatever fails before the end leaves the source in use, as it was, and
 * nothing can be said of the target.  From the last phase on the source
 * stays drained until the graph has been changed, so the two cannot differ.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qapi/qapi-events-precopy.h"
#include "qemu/error-report.h"
#include "system/block-backend.h"
#include "precopy.h"
#include "trace.h"

/* How long the job works before it lets others, and looks whether it may */
#define PRECOPY_SLICE_NS (10 * SCALE_MS)
/* How long it waits when there is nothing to do, or something failed */
#define PRECOPY_IDLE_NS  (100 * SCALE_MS)
/* How long it leaves to the guest what is busy */
#define PRECOPY_BUSY_NS  (10 * SCALE_MS)

/* ------------------------------------------------------------------ */
/* What is told                                                        */

static void precopy_phase(PrecopyJob *s, PrecopyStatistics *info)
{
    if (s->last_phase) {
        info->phase = PRECOPY_PHASE_LAST;
    } else if (s->ready_after >= 0) {
        info->phase = PRECOPY_PHASE_READY;
    } else if (s->converge.rounds) {
        info->phase = PRECOPY_PHASE_CONVERGING;
    } else if (s->started) {
        info->phase = PRECOPY_PHASE_COPYING;
    } else {
        info->phase = PRECOPY_PHASE_SCANNING;
    }
}

void precopy_statistics(PrecopyJob *s, PrecopyStatistics *info)
{
    PrecopyCounters n;

    if (!s->track) {
        *info = s->last;
        return;
    }
    n = precopy_track_counters(s->track);
    *info = (PrecopyStatistics) {
        .sent = n.sent,
        .resent = n.resent,
        .written_through = n.written_through,
        .zeroed = n.zeroed,
        .guest_written = n.guest_written,
        .spared_unallocated = n.spared_unallocated,
        .spared_discarded = n.spared_discarded,
        .spared_zeroes = n.spared_zeroes,
        .spared_history = n.spared_history,
        .spared_hints = n.spared_hints,
        .left = precopy_track_left(s->track),
        .rounds = s->converge.rounds,
        .link_rate = s->converge.rate,
        .dirty_rate = s->converge.dirty_rate,
        .outpaced = s->converge.outpaced,
        .has_ready_after = s->ready_after >= 0,
        .ready_after = MAX(s->ready_after, 0),
    };
    precopy_phase(s, info);
}

static void precopy_query(BlockJob *job, BlockJobInfo *info)
{
    PrecopyJob *s = container_of(job, PrecopyJob, common);

    precopy_statistics(s, &info->u.precopy);
}

/* ------------------------------------------------------------------ */
/* Copying                                                             */

/* Let others work; may pause */
static void coroutine_fn precopy_breathe(PrecopyJob *s)
{
    int64_t now = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
    bool limited;

    WITH_JOB_LOCK_GUARD() {
        limited = s->common.speed;
    }
    /* As in the last phase: the guest would wait the longer for more of it */
    limited = limited && !precopy_is_closing(s);
    s->max_in_flight = limited ? PRECOPY_MAX_LIMITED : PRECOPY_MAX_IN_FLIGHT;
    if (qatomic_xchg(&s->failed, false)) {
        /* Ignored, or the user has resumed the job: not again at once */
        precopy_wait_all(s);
        job_sleep_ns(&s->common.job, PRECOPY_IDLE_NS);
    } else if (limited) {
        block_job_ratelimit_sleep(&s->common);
    } else if (now - s->last_pause_ns > PRECOPY_SLICE_NS) {
        job_sleep_ns(&s->common.job, 0);
    } else {
        job_pause_point(&s->common.job);
        return;
    }
    s->last_pause_ns = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
}

static void coroutine_fn precopy_become_ready(PrecopyJob *s)
{
    uint64_t left;

    precopy_wait_all(s);
    left = precopy_left(s);
    if (left > precopy_bound(s) || qatomic_read(&s->failed) ||
        precopy_flush_target(s) < 0) {
        return;
    }
    trace_precopy_ready(s, left);
    s->ready_after = precopy_clock_ms() - s->started;
    job_progress_set_remaining(&s->common.job, left);
    job_transition_to_ready(&s->common.job);
}

bool precopy_should_end(PrecopyJob *s)
{
    return qatomic_read(&s->should_complete) ||
           job_cancel_requested(&s->common.job);
}

bool precopy_throttles(PrecopyJob *s)
{
    return !job_is_cancelled(&s->common.job) && !qatomic_read(&s->ret) &&
           precopy_throttle_ns(s, 0, 0) > 0;
}

/* Send all that is dirty; nothing becomes dirty meanwhile */
bool coroutine_fn precopy_send_rest(PrecopyJob *s, int64_t until)
{
    PrecopySweep rest = {
        .free_too = true,
    };

    while (!qatomic_read(&s->failed) && !job_is_cancelled(&s->common.job) &&
           precopy_clock_ms() < until) {
        PrecopyPick pick;

        if (precopy_is_full(s, PRECOPY_MAX_IN_FLIGHT)) {
            precopy_wait_slot(s);
            continue;
        }
        pick = precopy_copy_next(s, &rest);
        if (pick == PRECOPY_PICK_END) {
            break;
        }
    }
    precopy_wait_all(s);
    return !qatomic_read(&s->failed) && !precopy_left(s) &&
           precopy_flush_target(s) >= 0;
}

/*
 * Is next to nothing left, and flushed?  What can be flushed before should not
 * keep the guest waiting, nor what it writes while that takes.
 */
static bool coroutine_fn precopy_come_close(PrecopyJob *s)
{
    precopy_wait_all(s);
    return !qatomic_read(&s->failed) && precopy_is_close(s) &&
           precopy_flush_target(s) >= 0 && precopy_is_close(s);
}

/* Returns true if both sides are the same, and the source is drained */
static bool coroutine_fn precopy_last_phase(PrecopyJob *s, BlockDriverState *bs)
{
    bool same;

    if (!precopy_come_close(s)) {
        return false;
    }
    trace_precopy_last_phase(s, precopy_left(s));
    s->in_drain = true;
    s->last_phase = true;
    bdrv_drained_begin(bs);
    qatomic_set(&s->sending_rest, true);
    trace_precopy_held(s, precopy_left(s));
    /* The guest may have been amid a burst of writes */
    same = (precopy_is_close(s) || precopy_is_late(s)) &&
           precopy_send_rest(s, INT64_MAX) &&
           !job_is_cancelled(&s->common.job);
    qatomic_set(&s->sending_rest, false);
    trace_precopy_last_phase_end(s, same);
    if (same) {
        return true;
    }
    bdrv_drained_end(bs);
    s->in_drain = false;
    s->last_phase = false;
    return false;
}

/* A sweep is over.  Returns true if the job is. */
static bool coroutine_fn precopy_sweep_end(PrecopyJob *s, BlockDriverState *bs)
{
    bool again = precopy_converge_next(s);

    if (precopy_left(s) <= precopy_bound(s)) {
        if (!job_is_ready(&s->common.job)) {
            precopy_become_ready(s);
            return false;
        }
        if (precopy_is_closing(s) && precopy_last_phase(s, bs)) {
            return true;
        }
    }
    if (s->in_flight) {
        precopy_wait_slot(s);
    } else if (!again) {
        job_sleep_ns(&s->common.job, precopy_track_is_starved(s->track)
                                     ? PRECOPY_BUSY_NS : PRECOPY_IDLE_NS);
    }
    return false;
}

/* Returns 0 with the source drained if both sides are the same */
static int coroutine_fn precopy_loop(PrecopyJob *s, BlockDriverState *bs)
{
    precopy_converge_start(s);
    for (;;) {
        int ret = qatomic_read(&s->ret);

        if (ret < 0) {
            return ret;
        }
        precopy_breathe(s);
        if (job_is_cancelled(&s->common.job)) {
            return -ECANCELED;
        }
        precopy_converge_measure(s);
        job_progress_set_remaining(&s->common.job, precopy_left(s));
        if (precopy_is_full(s, s->max_in_flight)) {
            precopy_wait_slot(s);
        } else if (precopy_copy_next(s, &s->converge.sweep) ==
                   PRECOPY_PICK_END && precopy_sweep_end(s, bs)) {
            return 0;
        }
    }
}

static int coroutine_fn precopy_check_sizes(PrecopyJob *s, Error **errp)
{
    int64_t length = blk_co_getlength(s->target);

    if (length < 0) {
        error_setg_errno(errp, -length, "Cannot get the size of the target");
        return length;
    }
    if (length != s->track->length) {
        error_setg(errp, "The target has %" PRId64 " bytes, the source %"
                   PRId64 "; they must have the same size", length,
                   s->track->length);
        return -EINVAL;
    }
    return 0;
}

static int coroutine_fn precopy_run(Job *job, Error **errp)
{
    PrecopyJob *s = container_of(job, PrecopyJob, common.job);
    BlockDriverState *bs;
    int ret;

    bdrv_graph_co_rdlock();
    bs = bdrv_filter_bs(s->filter);
    bdrv_graph_co_rdunlock();

    ret = precopy_check_sizes(s, errp);
    if (ret >= 0) {
        ret = precopy_scan(s);
    }
    if (ret >= 0) {
        s->started = precopy_clock_ms();
        ret = precopy_loop(s, bs);
    }
    if (ret < 0) {
        precopy_track_let_go(s->track);
    }
    precopy_wait_all(s);
    if (!s->in_drain) {
        /* precopy_finish() counts on it */
        s->in_drain = true;
        bdrv_drained_begin(bs);
    }
    return job_is_cancelled(job) ? 0 : ret;
}

/* ------------------------------------------------------------------ */
/* The end                                                             */

/* In the main loop, the source is drained; the target takes its place */
static int precopy_pivot(PrecopyJob *s, BlockDriverState *src,
                         BlockDriverState *target)
{
    bool ro = bdrv_is_read_only(src);
    Error *local_err = NULL;

    if (ro != bdrv_is_read_only(target)) {
        bdrv_reopen_set_read_only(target, ro, NULL);
    }
    bdrv_graph_wrlock();
    bdrv_replace_node(src, target, &local_err);
    bdrv_graph_wrunlock();
    if (local_err) {
        error_reportf_err(local_err, "Job '%s': node '%s' cannot take the "
                          "place of '%s': ", s->common.job.id,
                          bdrv_get_node_name(target), bdrv_get_node_name(src));
        return -EPERM;
    }
    s->pivoted = true;
    return 0;
}

/* Take the filter out; called once, whether the job succeeds or not */
static int precopy_finish(Job *job)
{
    PrecopyJob *s = container_of(job, PrecopyJob, common.job);
    BlockDriverState *filter = s->filter;
    BlockDriverState *src, *target = blk_bs(s->target);
    int ret = 0;

    GLOBAL_STATE_CODE();
    if (s->finished) {
        return 0;
    }
    s->finished = true;

    bdrv_graph_rdlock_main_loop();
    src = filter->backing->bs;
    bdrv_ref(src);
    bdrv_ref(filter);
    bdrv_ref(target);
    bdrv_graph_rdunlock_main_loop();

    precopy_release_guards(s);
    /* Its write permission is in the way of the guest's */
    blk_unref(s->target);
    s->target = NULL;

    bdrv_drained_begin(filter);
    bdrv_drained_begin(target);
    s->top->stop = true;
    bdrv_graph_rdlock_main_loop();
    bdrv_child_refresh_perms(filter, filter->backing, &error_abort);
    bdrv_graph_rdunlock_main_loop();

    if (job->ret >= 0 && qatomic_read(&s->should_complete)) {
        ret = precopy_pivot(s, src, target);
    }
    block_job_remove_all_bdrv(&s->common);
    bdrv_graph_wrlock();
    bdrv_replace_node(filter, filter->backing->bs, &error_abort);
    bdrv_graph_wrunlock();

    precopy_statistics(s, &s->last);
    precopy_forget_hints(s);
    s->top->job = NULL;
    s->track = NULL;
    bdrv_drained_end(target);
    bdrv_unref(target);
    bdrv_drained_end(src);
    bdrv_drained_end(filter);
    s->in_drain = false;
    trace_precopy_finish(s, s->pivoted);
    bdrv_unref(filter);
    bdrv_unref(src);
    return ret;
}

static void precopy_abort(Job *job)
{
    int ret = precopy_finish(job);

    assert(ret == 0);
}

static void precopy_clean(Job *job)
{
    PrecopyJob *s = container_of(job, PrecopyJob, common.job);

    ratelimit_destroy(&s->throttle);
    if (!job_is_internal(job)) {
        qapi_event_send_blockdev_precopy_completed(
            job->id, job->ret >= 0, s->pivoted, &s->last);
    }
}

/* ------------------------------------------------------------------ */
/* What others ask                                                     */

static void precopy_complete(Job *job, Error **errp)
{
    PrecopyJob *s = container_of(job, PrecopyJob, common.job);

    if (!job_is_ready(job)) {
        error_setg(errp, "Job '%s' is not ready to be completed", job->id);
        return;
    }
    qatomic_set(&s->should_complete, true);
    WITH_JOB_LOCK_GUARD() {
        if (!job->paused) {
            job_enter_cond_locked(job, NULL);
        }
    }
}

static bool precopy_cancel(Job *job, bool force)
{
    PrecopyJob *s = container_of(job, PrecopyJob, common.job);

    /* Nothing can be said of a target before the job is ready */
    force = force || !job_is_ready(job);
    if (force && s->target) {
        /*
         * The guest does not wait for the target any longer, but for what it
         * is writing there itself
         */
        precopy_track_let_go(s->track);
        bdrv_cancel_in_flight(blk_bs(s->target));
    }
    return force;
}

/*
 * The link is free while the job is paused, and the guest does not wait.  The
 * job comes here when what it has in flight leaves it a moment.
 */
static void coroutine_fn precopy_pause(Job *job)
{
    PrecopyJob *s = container_of(job, PrecopyJob, common.job);

    precopy_converge_stand(s, true);
    precopy_track_wait_ops(s->track);
    precopy_wait_all(s);
}

static void coroutine_fn precopy_resume(Job *job)
{
    precopy_converge_stand(container_of(job, PrecopyJob, common.job),
                           job_is_cancelled(job));
}

static bool precopy_drained_poll(BlockJob *job)
{
    PrecopyJob *s = container_of(job, PrecopyJob, common);

    /*
     * Unless it is our own drain, only a pause keeps us from new requests.
     * After ours has begun there are more, which whoever drains now awaits.
     */
    WITH_JOB_LOCK_GUARD() {
        if (!job->job.paused && !job_is_cancelled_locked(&job->job) &&
            !s->in_drain) {
            return true;
        }
    }
    return qatomic_read(&s->sending_rest) || qatomic_read(&s->in_flight);
}

const BlockJobDriver precopy_job_driver = {
    .job_driver = {
        .instance_size  = sizeof(PrecopyJob),
        .job_type       = JOB_TYPE_PRECOPY,
        .free           = block_job_free,
        .user_resume    = block_job_user_resume,
        .run            = precopy_run,
        .prepare        = precopy_finish,
        .abort          = precopy_abort,
        .clean          = precopy_clean,
        .pause          = precopy_pause,
        .resume         = precopy_resume,
        .complete       = precopy_complete,
        .cancel         = precopy_cancel,
    },
    .drained_poll       = precopy_drained_poll,
    .query              = precopy_query,
};
