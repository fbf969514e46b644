/*
 * thinvm driver layer: deleting a snapshot as a job
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The job behind thinvm-snapshot-delete.  Its first step takes the snapshot
 * out of the lists; the rest are steps of snapshot-delete.c, first for this
 * snapshot, then for those that had to wait for it.
 *
 * It is no block job: a node with a block job on it is no root node for QMP,
 * and takes no snapshots.  A backend without permissions keeps the node and
 * tells when it is drained; then the job stands still, as it does when it is
 * paused.  It runs in the main loop, wherever the node is.
 *
 * A cancelled job leaves a hidden record whose space is freed by whoever
 * deletes or opens next, as after a crash.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/job.h"
#include "qemu/ratelimit.h"
#include "qemu/timer.h"
#include "system/block-backend.h"
#include "driver-snapshot.h"

/* How long steps are done in a row, and how long the thread is others' */
#define THINVM_JOB_PACE_NS  (250 * SCALE_US)
#define THINVM_JOB_SLICE_NS (100 * SCALE_MS)

typedef struct ThinvmDeleteJob {
    Job common;
    BlockDriverState *bs;
    BlockBackend *blk;      /* keeps it */
    ThinvmDeletion del;
    ThinvmCollect collect;
    bool force;
    int64_t speed;          /* bytes of the disk in a second; 0: no limit */
    RateLimit limit;
    int64_t since;          /* when the present row of steps began */
    uint64_t reported;      /* bytes of the disk */
} ThinvmDeleteJob;

/* ------------------------------------------------------------------ */
/* Drain                                                               */

static void thinvm_job_drained_begin(void *opaque)
{
    ThinvmDeleteJob *job = opaque;

    job_pause(&job->common);
}

static bool thinvm_job_drained_poll(void *opaque)
{
    ThinvmDeleteJob *job = opaque;

    JOB_LOCK_GUARD();
    return job->common.busy && !job_is_completed_locked(&job->common);
}

static void thinvm_job_drained_end(void *opaque)
{
    ThinvmDeleteJob *job = opaque;

    job_resume(&job->common);
}

static const BlockDevOps thinvm_job_dev_ops = {
    .drained_begin = thinvm_job_drained_begin,
    .drained_poll = thinvm_job_drained_poll,
    .drained_end = thinvm_job_drained_end,
};

/* ------------------------------------------------------------------ */
/* Work                                                                */

/*
 * A block job that ends may put another node in the place of ours, also for
 * the job's backend: then nobody tells us of drains any more.
 */
static bool GRAPH_RDLOCK thinvm_job_has_node(ThinvmDeleteJob *job)
{
    BlockDriverState *top = blk_bs(job->blk);

    return top && bdrv_chain_contains(top, job->bs);
}

/* The worker of the node, or of whoever took the image over, does the rest */
static int GRAPH_RDLOCK thinvm_job_may_go_on(ThinvmDeleteJob *job,
                                             Error **errp)
{
    BDRVThinvmState *s = job->bs->opaque;

    if (!thinvm_job_has_node(job)) {
        if (qatomic_read(&s->owner)) {
            thinvm_worker_collect_soon(s);
        }
        error_setg(errp, "Node '%s' is not the disk any more; the deletion "
                   "goes on when there is a node that writes its image",
                   bdrv_get_node_name(job->bs));
        return -EPERM;
    }
    if (!qatomic_read(&s->owner)) {
        error_setg(errp, "Node '%s' has given up its image; the next owner "
                   "goes on with the deletion",
                   bdrv_get_node_name(job->bs));
        return -EPERM;
    }
    return 0;
}

static void coroutine_fn thinvm_job_rest(ThinvmDeleteJob *job)
{
    BDRVThinvmState *s = job->bs->opaque;
    uint64_t position = job->del.position * s->cluster_size;
    uint64_t done = position - MIN(position, job->reported);
    int64_t now = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
    int64_t delay = 0;

    job->reported += done;
    job_progress_update(&job->common, done);
    if (job->speed) {
        delay = ratelimit_calculate_delay(&job->limit, done);
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

/* One step of the snapshot's own deletion, then of what waited for it */
static int coroutine_fn GRAPH_RDLOCK
thinvm_job_step(ThinvmDeleteJob *job, bool *done, Error **errp)
{
    int ret = thinvm_job_may_go_on(job, errp);

    if (ret < 0) {
        return ret;
    }
    if (!job->del.gone && !job->del.waits) {
        return thinvm_deletion_step(job->bs, &job->del, errp);
    }
    return thinvm_collect_step(job->bs, &job->collect, done, errp);
}

static int coroutine_fn thinvm_job_run(Job *opaque, Error **errp)
{
    ThinvmDeleteJob *job = container_of(opaque, ThinvmDeleteJob, common);
    bool done = false;
    int ret;

    job_pause_point(opaque);
    if (job_is_cancelled(opaque)) {
        return 0;
    }
    job->since = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
    WITH_GRAPH_RDLOCK_GUARD() {
        ret = thinvm_job_has_node(job)
              ? thinvm_deletion_mark(job->bs, &job->del, job->force, errp)
              : thinvm_job_may_go_on(job, errp);
    }
    while (ret >= 0 && !done) {
        thinvm_job_rest(job);
        if (job_is_cancelled(opaque)) {
            break;
        }
        WITH_GRAPH_RDLOCK_GUARD() {
            ret = thinvm_job_step(job, &done, errp);
        }
    }
    WITH_GRAPH_RDLOCK_GUARD() {
        if (ret >= 0 && thinvm_job_may_go_on(job, NULL) == 0) {
            ret = thinvm_snapshot_settle(job->bs->opaque,
                                         "The snapshot is deleted", errp);
        }
    }
    if (ret >= 0 && done) {
        BDRVThinvmState *s = job->bs->opaque;

        job_progress_update(opaque, job->del.end * s->cluster_size -
                                    job->reported);
    }
    return ret;
}

static void thinvm_job_clean(Job *opaque)
{
    ThinvmDeleteJob *job = container_of(opaque, ThinvmDeleteJob, common);
    BDRVThinvmState *s = job->bs->opaque;

    /* What the worker was told to do meanwhile */
    if (qatomic_fetch_dec(&s->nb_delete_jobs) == 1) {
        thinvm_worker_drain_end(s);
    }
    blk_set_dev_ops(job->blk, NULL, NULL);
    blk_unref(g_steal_pointer(&job->blk));
    bdrv_unref(job->bs);
}

static void thinvm_job_free(Job *opaque)
{
    ThinvmDeleteJob *job = container_of(opaque, ThinvmDeleteJob, common);

    ratelimit_destroy(&job->limit);
}

static const JobDriver thinvm_delete_job_driver = {
    .instance_size  = sizeof(ThinvmDeleteJob),
    .job_type       = JOB_TYPE_THINVM_SNAPSHOT_DELETE,
    .run            = thinvm_job_run,
    .clean          = thinvm_job_clean,
    .free           = thinvm_job_free,
};

void thinvm_snapshot_delete_job(BlockDriverState *bs, const char *job_id,
                                const char *id, const char *name, bool force,
                                int64_t speed, int flags, Error **errp)
{
    BDRVThinvmState *s = bs->opaque;
    ThinvmDeleteJob *job;
    ThinvmDeletion del;
    BlockBackend *blk;

    if (speed < 0) {
        error_setg(errp, "Speed %" PRId64 " is negative; 0 is no limit",
                   speed);
        return;
    }
    if (thinvm_deletion_prepare(bs, id, name, force, &del, errp) < 0) {
        return;
    }
    blk = blk_new_with_bs(bs, 0, BLK_PERM_ALL, errp);
    if (!blk) {
        return;
    }
    blk_set_allow_aio_context_change(blk, true);
    job = job_create(job_id, &thinvm_delete_job_driver, NULL,
                     qemu_get_aio_context(), flags, NULL, NULL, errp);
    if (!job) {
        blk_unref(blk);
        return;
    }
    bdrv_ref(bs);
    job->bs = bs;
    job->blk = blk;
    job->del = del;
    job->force = force;
    job->speed = speed;
    ratelimit_init(&job->limit);
    if (speed) {
        ratelimit_set_speed(&job->limit, speed, THINVM_JOB_SLICE_NS);
    }
    qatomic_inc(&s->nb_delete_jobs);
    job_progress_set_remaining(&job->common, del.end * s->cluster_size);
    blk_set_dev_ops(blk, &thinvm_job_dev_ops, job);
    job_start(&job->common);
}
