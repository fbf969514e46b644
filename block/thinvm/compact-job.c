/*
 * thinvm driver layer: compaction as a job
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The job behind thinvm-compact.  It steps store-compact.c, which says what
 * is moved and how, and keeps the guest's writes off what is being moved:
 *
 * While the job runs it counts as one who copies (s->copiers), so that a write
 * into a private cluster registers too, until it has ended.  Writes that began
 * before it counted have not seen that; before anything is moved all of these
 * have left.  What is moved is then registered alone, as an allocation is
 * (inflight.h).
 *
 * It stands still while the node is drained (job.c): snapshots are taken, and
 * gone back to, between two steps.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/timer.h"
#include "driver-snapshot.h"
#include "inflight.h"
#include "job.h"

/* Between two looks whether requests from before have left */
#define THINVM_JOB_WAIT_NS  (1 * SCALE_MS)

typedef struct ThinvmCompactJob {
    ThinvmJob job;
    ThinvmStore *st;            /* the node's, when the job began */
    ThinvmCompact *compact;
    ThinvmInflight inflight;
    bool moving;                /* counted in s->copiers */
    uint64_t copied, moved;     /* bytes, as told to the limit and the user */
} ThinvmCompactJob;

static void coroutine_fn thinvm_compact_lock(void *opaque, int tree,
                                             uint64_t guest, uint64_t count)
{
    ThinvmCompactJob *job = opaque;

    thinvm_inflight_begin_exclusive(job->job.bs->opaque, &job->inflight, tree,
                                    guest, count);
}

static void coroutine_fn thinvm_compact_unlock(void *opaque)
{
    ThinvmCompactJob *job = opaque;

    thinvm_inflight_end_request(job->job.bs->opaque, &job->inflight);
}

/* A block job that ends may put another node in the place of ours */
static int GRAPH_RDLOCK thinvm_compact_may_go_on(ThinvmCompactJob *job,
                                                 Error **errp)
{
    BDRVThinvmState *s = job->job.bs->opaque;

    if (!thinvm_job_has_node(&job->job)) {
        error_setg(errp, "Node '%s' is not the disk any more",
                   bdrv_get_node_name(job->job.bs));
        return -EPERM;
    }
    if (!qatomic_read(&s->owner) || qatomic_read(&s->store) != job->st) {
        error_setg(errp, "Node '%s' has given up its image",
                   bdrv_get_node_name(job->job.bs));
        return -EPERM;
    }
    return 0;
}

static void coroutine_fn thinvm_compact_rest(ThinvmCompactJob *job)
{
    Job *common = &job->job.common;
    ThinvmCompactStatus status;
    uint64_t copied;

    thinvm_compact_status(job->compact, &status);
    copied = status.copied - job->copied;
    job->copied = status.copied;
    job_progress_set_remaining(common, MAX(status.total, status.moved) -
                                       status.moved);
    job_progress_update(common, status.moved - job->moved);
    job->moved = status.moved;
    thinvm_job_rest(&job->job, copied);
}

/* Afterwards every write that is in flight knows that clusters may move */
static void coroutine_fn thinvm_compact_announce(ThinvmCompactJob *job)
{
    unsigned mark;

    thinvm_inflight_begin_moving(job->job.bs->opaque);
    job->moving = true;
    mark = thinvm_store_requests_mark(job->st);
    while (!job_is_cancelled(&job->job.common) &&
           !thinvm_store_requests_left(job->st, mark)) {
        job_sleep_ns(&job->job.common, THINVM_JOB_WAIT_NS);
    }
}

static int coroutine_fn thinvm_compact_begin(ThinvmCompactJob *job,
                                             Error **errp)
{
    BDRVThinvmState *s = job->job.bs->opaque;
    ThinvmCompactLocks locks = {
        .lock = thinvm_compact_lock,
        .unlock = thinvm_compact_unlock,
        .opaque = job,
    };
    int ret;

    GRAPH_RDLOCK_GUARD();
    ret = thinvm_mode_begin_change(job->job.bs, errp);
    if (ret == 0) {
        job->st = qatomic_read(&s->store);
        job->compact = thinvm_compact_new(job->st, &locks);
    }
    return ret;
}

static int coroutine_fn thinvm_compact_run(Job *opaque, Error **errp)
{
    ThinvmCompactJob *job = container_of(opaque, ThinvmCompactJob,
                                         job.common);
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
    job->job.since = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
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
    thinvm_inflight_end_moving(job->job.bs->opaque);
    job->moving = false;
    return ret;
}

static void thinvm_compact_clean(Job *opaque)
{
    ThinvmCompactJob *job = container_of(opaque, ThinvmCompactJob,
                                         job.common);

    assert(!job->moving);
    if (job->compact) {
        thinvm_compact_free(g_steal_pointer(&job->compact));
    }
    thinvm_job_leave(&job->job);
}

static const JobDriver thinvm_compact_job_driver = {
    .instance_size  = sizeof(ThinvmCompactJob),
    .job_type       = JOB_TYPE_THINVM_COMPACT,
    .run            = thinvm_compact_run,
    .clean          = thinvm_compact_clean,
    .free           = thinvm_job_free,
};

void thinvm_compact_job(BlockDriverState *bs, const char *job_id,
                        int64_t speed, int flags, Error **errp)
{
    ThinvmJob *job = thinvm_job_create(&thinvm_compact_job_driver, bs, job_id,
                                       speed, flags, errp);

    if (job) {
        job_start(&job->common);
    }
}
