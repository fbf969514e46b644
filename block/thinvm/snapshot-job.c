/*
 * thinvm driver layer: deleting a snapshot as a job
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The job behind thinvm-snapshot-delete.  Its first step takes the snapshot
 * out of the lists; the rest are steps of snapshot-delete.c, first for this
 * snapshot, then for those that had to wait for it.
 *
 * A cancelled job leaves a hidden record whose space is freed by whoever
 * deletes or opens next, as after a crash.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/timer.h"
#include "driver-snapshot.h"
#include "job.h"

typedef struct ThinvmDeleteJob {
    ThinvmJob job;
    ThinvmDeletion del;
    ThinvmCollect collect;
    bool force;
    uint64_t reported;      /* bytes of the disk */
} ThinvmDeleteJob;

/* The worker of the node, or of whoever took the image over, does the rest */
static int GRAPH_RDLOCK thinvm_delete_may_go_on(ThinvmDeleteJob *job,
                                                Error **errp)
{
    BDRVThinvmState *s = job->job.bs->opaque;

    if (!thinvm_job_has_node(&job->job)) {
        if (qatomic_read(&s->owner)) {
            thinvm_worker_collect_soon(s);
        }
        error_setg(errp, "Node '%s' is not the disk any more; the deletion "
                   "goes on when there is a node that writes its image",
                   bdrv_get_node_name(job->job.bs));
        return -EPERM;
    }
    if (!qatomic_read(&s->owner)) {
        error_setg(errp, "Node '%s' has given up its image; the next owner "
                   "goes on with the deletion",
                   bdrv_get_node_name(job->job.bs));
        return -EPERM;
    }
    return 0;
}

static void coroutine_fn thinvm_delete_rest(ThinvmDeleteJob *job)
{
    BDRVThinvmState *s = job->job.bs->opaque;
    uint64_t position = job->del.position * s->cluster_size;
    uint64_t done = position - MIN(position, job->reported);

    job->reported += done;
    job_progress_update(&job->job.common, done);
    thinvm_job_rest(&job->job, done);
}

/* One step of the snapshot's own deletion, then of what waited for it */
static int coroutine_fn GRAPH_RDLOCK
thinvm_delete_step(ThinvmDeleteJob *job, bool *done, Error **errp)
{
    int ret = thinvm_delete_may_go_on(job, errp);

    if (ret < 0) {
        return ret;
    }
    if (!job->del.gone && !job->del.waits) {
        return thinvm_deletion_step(job->job.bs, &job->del, errp);
    }
    return thinvm_collect_step(job->job.bs, &job->collect, done, errp);
}

static int coroutine_fn thinvm_delete_run(Job *opaque, Error **errp)
{
    ThinvmDeleteJob *job = container_of(opaque, ThinvmDeleteJob,
                                        job.common);
    bool done = false;
    int ret;

    job_pause_point(opaque);
    if (job_is_cancelled(opaque)) {
        return 0;
    }
    job->job.since = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
    WITH_GRAPH_RDLOCK_GUARD() {
        ret = thinvm_job_has_node(&job->job)
              ? thinvm_deletion_mark(job->job.bs, &job->del, job->force, errp)
              : thinvm_delete_may_go_on(job, errp);
    }
    while (ret >= 0 && !done) {
        thinvm_delete_rest(job);
        if (job_is_cancelled(opaque)) {
            break;
        }
        WITH_GRAPH_RDLOCK_GUARD() {
            ret = thinvm_delete_step(job, &done, errp);
        }
    }
    WITH_GRAPH_RDLOCK_GUARD() {
        if (ret >= 0 && thinvm_delete_may_go_on(job, NULL) == 0) {
            ret = thinvm_snapshot_settle(job->job.bs->opaque,
                                         "The snapshot is deleted", errp);
        }
    }
    if (ret >= 0 && done) {
        BDRVThinvmState *s = job->job.bs->opaque;

        job_progress_update(opaque, job->del.end * s->cluster_size -
                                    job->reported);
    }
    return ret;
}

static void thinvm_delete_clean(Job *opaque)
{
    ThinvmDeleteJob *job = container_of(opaque, ThinvmDeleteJob,
                                        job.common);
    BDRVThinvmState *s = job->job.bs->opaque;

    /* What the worker was told to do meanwhile */
    if (qatomic_fetch_dec(&s->nb_delete_jobs) == 1) {
        thinvm_worker_drain_end(s);
    }
    thinvm_job_leave(&job->job);
}

static const JobDriver thinvm_delete_job_driver = {
    .instance_size  = sizeof(ThinvmDeleteJob),
    .job_type       = JOB_TYPE_THINVM_SNAPSHOT_DELETE,
    .run            = thinvm_delete_run,
    .clean          = thinvm_delete_clean,
    .free           = thinvm_job_free,
};

void thinvm_snapshot_delete_job(BlockDriverState *bs, const char *job_id,
                                const char *id, const char *name, bool force,
                                int64_t speed, int flags, Error **errp)
{
    BDRVThinvmState *s = bs->opaque;
    ThinvmDeleteJob *job;
    ThinvmDeletion del;
    ThinvmJob *created;

    if (thinvm_deletion_prepare(bs, id, name, force, &del, errp) < 0) {
        return;
    }
    created = thinvm_job_create(&thinvm_delete_job_driver, bs, job_id, speed,
                                flags, errp);
    if (!created) {
        return;
    }
    job = container_of(created, ThinvmDeleteJob, job);
    job->del = del;
    job->force = force;
    qatomic_inc(&s->nb_delete_jobs);
    job_progress_set_remaining(&created->common, del.end * s->cluster_size);
    job_start(&created->common);
}
