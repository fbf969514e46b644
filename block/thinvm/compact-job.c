/*
 * thinvm driver layer: compaction as a job
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The job behind thinvm-compact.  It steps store-compact.c, which says what
 * is moved and how, and keeps the guest's writes off what is being moved:
 *
 * While the job runs it counts as one who copies (s->copiers), so that a write
 * into a private cluster registers too.  Writes that began before it counted
 * have not seen that; before anything is moved all of these have left.  What
 * is moved is then registered alone, as an allocation is (inflight.h).
 *
 * As with the deletion of a snapshot the job is no block job, and a backend
 * without permissions keeps the node and makes the job stand still while the
 * node is drained: snapshots are taken, and gone back to, between two steps.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/job.h"
#include "qemu/ratelimit.h"
#include "qemu/timer.h"
#include "system/block-backend.h"
#include "driver-snapshot.h"
#include "inflight.h"

/* How long steps are done in a row, and how long the thread is others' */
#define THINVM_JOB_PACE_NS  (250 * SCALE_US)
#define THINVM_JOB_SLICE_NS (100 * SCALE_MS)
/* Between two looks whether requests from before have left */
#define THINVM_JOB_WAIT_NS  (1 * SCALE_MS)

typedef struct ThinvmCompactJob {
    Job common;
    BlockDriverState *bs;
    BlockBackend *blk;          /* keeps it */
    ThinvmStore *st;            /* the node's, when the job began */
    ThinvmCompact *compact;
    ThinvmInflight inflight;
    bool moving;                /* counted in s->copiers */
    int64_t speed;              /* bytes that are copied in a second; 0: any */
    RateLimit limit;
    int64_t since;              /* when the present row of steps began */
    uint64_t copied, moved;     /* bytes, as told to the limit and the user */
} ThinvmCompactJob;

static void thinvm_compact_drained_begin(void *opaque)
{
    ThinvmCompactJob *job = opaque;

    job_pause(&job->common);
}

static bool thinvm_compact_drained_poll(void *opaque)
{
    ThinvmCompactJob *job = opaque;

    JOB_LOCK_GUARD();
    return job->common.busy && !job_is_completed_locked(&job->common);
}

static void thinvm_compact_drained_end(void *opaque)
{
    ThinvmCompactJob *job = opaque;

    job_resume(&job->common);
}

static const BlockDevOps thinvm_compact_dev_ops = {
    .drained_begin = thinvm_compact_drained_begin,
    .drained_poll = thinvm_compact_drained_poll,
    .drained_end = thinvm_compact_drained_end,
};

static void coroutine_fn thinvm_compact_lock(void *opaque, int tree,
                                             uint64_t guest, uint64_t count)
{
    ThinvmCompactJob *job = opaque;

    thinvm_inflight_begin_exclusive(job->bs->opaque, &job->inflight, tree,
                                    guest, count);
}

static void coroutine_fn thinvm_compact_unlock(void *opaque)
{
    ThinvmCompactJob *job = opaque;

    thinvm_inflight_end_request(job->bs->opaque, &job->inflight);
}

/* A block job that ends may put another node in the place of ours */
static int GRAPH_RDLOCK thinvm_compact_may_go_on(ThinvmCompactJob *job,
                                                 Error **errp)
{
    BDRVThinvmState *s = job->bs->opaque;
    BlockDriverState *top = blk_bs(job->blk);

    if (!top || !bdrv_chain_contains(top, job->bs)) {
        error_setg(errp, "Node '%s' is not the disk any more",
                   bdrv_get_node_name(job->bs));
        return -EPERM;
    }
    if (!qatomic_read(&s->owner) || qatomic_read(&s->store) != job->st) {
        error_setg(errp, "Node '%s' has given up its image",
                   bdrv_get_node_name(job->bs));
        return -EPERM;
    }
    return 0;
}

static void coroutine_fn thinvm_compact_rest(ThinvmCompactJob *job)
{
    ThinvmCompactStatus status;
    int64_t now = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
    int64_t delay = 0;
    uint64_t copied;

    thinvm_compact_status(job->compact, &status);
    copied = status.copied - job->copied;
    job->copied = status.copied;
    job_progress_set_remaining(&job->common, MAX(status.total, status.moved) -
                                             status.moved);
    job_progress_update(&job->common, status.moved - job->moved);
    job->moved = status.moved;
    if (job->speed) {
        delay = ratelimit_calculate_delay(&job->limit, copied);
    }
    if (now - job->since > THINVM_JOB_PACE_NS) {
        delay = MAX(delay, THINVM_JOB_PACE_NS);
    }
    if (delay) {
        job_sleep_ns(&job->common, delay);
        job->since = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
    } else {
        job_pause_point(&job->common);
    }
}

/* Afterwards every write that is in flight knows that clusters may move */
static void coroutine_fn thinvm_compact_announce(ThinvmCompactJob *job)
{
    unsigned mark;

    thinvm_inflight_begin_moving(job->bs->opaque);
    job->moving = true;
    mark = thinvm_store_requests_mark(job->st);
    while (!job_is_cancelled(&job->common) &&
           !thinvm_store_requests_left(job->st, mark)) {
        job_sleep_ns(&job->common, THINVM_JOB_WAIT_NS);
    }
}

static int coroutine_fn thinvm_compact_begin(ThinvmCompactJob *job,
                                             Error **errp)
{
    BDRVThinvmState *s = job->bs->opaque;
    ThinvmCompactLocks locks = {
        .lock = thinvm_compact_lock,
        .unlock = thinvm_compact_unlock,
        .opaque = job,
    };
    int ret;

    GRAPH_RDLOCK_GUARD();
    ret = thinvm_mode_begin_change(job->bs, errp);
    if (ret == 0) {
        job->st = qatomic_read(&s->store);
        job->compact = thinvm_compact_new(job->st, &locks);
    }
    return ret;
}

static int coroutine_fn thinvm_compact_run(Job *opaque, Error **errp)
{
    ThinvmCompactJob *job = container_of(opaque, ThinvmCompactJob, common);
    bool done = false;
    int ret;

    job_pause_point(opaque);
    if (job_is_cancelled(opaque)) {
        return 0;
    }
    ret = thinvm_compact_begin(job, errp);
    if (ret < 0) {
        return ret;
    }
    thinvm_compact_announce(job);
    job->since = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
    while (ret >= 0 && !done) {
        thinvm_compact_rest(job);
        if (job_is_cancelled(opaque)) {
            break;
        }
        WITH_GRAPH_RDLOCK_GUARD() {
            ret = thinvm_compact_may_go_on(job, errp);
            if (ret >= 0) {
                ret = thinvm_compact_step(job->compact, &done, errp);
            }
        }
    }
    if (done) {
        thinvm_compact_rest(job);
        job_progress_set_remaining(opaque, 0);
    }
    thinvm_inflight_end_moving(job->bs->opaque);
    job->moving = false;
    return ret;
}

static void thinvm_compact_clean(Job *opaque)
{
    ThinvmCompactJob *job = container_of(opaque, ThinvmCompactJob, common);

    assert(!job->moving);
    if (job->compact) {
        thinvm_compact_free(g_steal_pointer(&job->compact));
    }
    blk_set_dev_ops(job->blk, NULL, NULL);
    blk_unref(g_steal_pointer(&job->blk));
    bdrv_unref(job->bs);
}

static void thinvm_compact_job_free(Job *opaque)
{
    ThinvmCompactJob *job = container_of(opaque, ThinvmCompactJob, common);

    ratelimit_destroy(&job->limit);
}

static const JobDriver thinvm_compact_job_driver = {
    .instance_size  = sizeof(ThinvmCompactJob),
    .job_type       = JOB_TYPE_THINVM_COMPACT,
    .run            = thinvm_compact_run,
    .clean          = thinvm_compact_clean,
    .free           = thinvm_compact_job_free,
};

void thinvm_compact_job(BlockDriverState *bs, const char *job_id,
                        int64_t speed, int flags, Error **errp)
{
    ThinvmCompactJob *job;
    BlockBackend *blk;

    if (speed < 0) {
        error_setg(errp, "Speed %" PRId64 " is negative; 0 is no limit",
                   speed);
        return;
    }
    blk = blk_new_with_bs(bs, 0, BLK_PERM_ALL, errp);
    if (!blk) {
        return;
    }
    blk_set_allow_aio_context_change(blk, true);
    job = job_create(job_id, &thinvm_compact_job_driver, NULL,
                     qemu_get_aio_context(), flags, NULL, NULL, errp);
    if (!job) {
        blk_unref(blk);
        return;
    }
    bdrv_ref(bs);
    job->bs = bs;
    job->blk = blk;
    job->speed = speed;
    ratelimit_init(&job->limit);
    if (speed) {
        ratelimit_set_speed(&job->limit, speed, THINVM_JOB_SLICE_NS);
    }
    blk_set_dev_ops(blk, &thinvm_compact_dev_ops, job);
    job_start(&job->common);
}
