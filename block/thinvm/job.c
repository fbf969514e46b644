/*
 * thinvm driver layer: what its jobs have in common
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * None is a block job: a node with a block job on it is no root node for QMP,
 * and takes no snapshots.  A backend without permissions keeps the node and
 * tells when it is drained; then the job stands still, as it does when it is
 * paused.  It runs in the main loop, wherever the node is.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/timer.h"
#include "system/block-backend.h"
#include "job.h"

/* How long steps are done in a row, and how long the thread is others' */
#define THINVM_JOB_PACE_NS  (250 * SCALE_US)
#define THINVM_JOB_SLICE_NS (100 * SCALE_MS)

static void thinvm_job_drained_begin(void *opaque)
{
    ThinvmJob *job = opaque;

    job_pause(&job->common);
}

static bool thinvm_job_drained_poll(void *opaque)
{
    ThinvmJob *job = opaque;

    JOB_LOCK_GUARD();
    return job->common.busy && !job_is_completed_locked(&job->common);
}

static void thinvm_job_drained_end(void *opaque)
{
    ThinvmJob *job = opaque;

    job_resume(&job->common);
}

static const BlockDevOps thinvm_job_dev_ops = {
    .drained_begin = thinvm_job_drained_begin,
    .drained_poll = thinvm_job_drained_poll,
    .drained_end = thinvm_job_drained_end,
};

int thinvm_job_flags(bool has_auto_finalize, bool auto_finalize,
                     bool has_auto_dismiss, bool auto_dismiss)
{
    int flags = JOB_DEFAULT;

    if (has_auto_finalize && !auto_finalize) {
        flags |= JOB_MANUAL_FINALIZE;
    }
    if (has_auto_dismiss && !auto_dismiss) {
        flags |= JOB_MANUAL_DISMISS;
    }
    return flags;
}

ThinvmJob *thinvm_job_create(const JobDriver *driver, BlockDriverState *bs,
                             const char *job_id, int64_t speed, int flags,
                             Error **errp)
{
    BlockBackend *blk;
    ThinvmJob *job;

    if (speed < 0) {
        error_setg(errp, "Speed %" PRId64 " is negative; 0 is no limit",
                   speed);
        return NULL;
    }
    blk = blk_new_with_bs(bs, 0, BLK_PERM_ALL, errp);
    if (!blk) {
        return NULL;
    }
    blk_set_allow_aio_context_change(blk, true);
    job = job_create(job_id, driver, NULL, qemu_get_aio_context(), flags, NULL,
                     NULL, errp);
    if (!job) {
        blk_unref(blk);
        return NULL;
    }
    bdrv_ref(bs);
    job->bs = bs;
    job->blk = blk;
    job->speed = speed;
    ratelimit_init(&job->limit);
    if (speed) {
        ratelimit_set_speed(&job->limit, speed, THINVM_JOB_SLICE_NS);
    }
    blk_set_dev_ops(blk, &thinvm_job_dev_ops, job);
    return job;
}

void thinvm_job_leave(ThinvmJob *job)
{
    blk_set_dev_ops(job->blk, NULL, NULL);
    blk_unref(g_steal_pointer(&job->blk));
    bdrv_unref(job->bs);
}

void thinvm_job_free(Job *opaque)
{
    ThinvmJob *job = container_of(opaque, ThinvmJob, common);

    ratelimit_destroy(&job->limit);
}

bool GRAPH_RDLOCK thinvm_job_has_node(ThinvmJob *job)
{
    BlockDriverState *top = blk_bs(job->blk);

    return top && bdrv_chain_contains(top, job->bs);
}

void coroutine_fn thinvm_job_rest(ThinvmJob *job, uint64_t bytes)
{
    int64_t now = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
    int64_t delay = 0;

    if (job->speed) {
        delay = ratelimit_calculate_delay(&job->limit, bytes);
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
