/*
 * thinvm driver layer: what its jobs have in common
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef THINVM_JOB_H
#define THINVM_JOB_H

#include "qemu/job.h"
#include "qemu/ratelimit.h"
#include "thinvm.h"

/* The first member of each job's own */
typedef struct ThinvmJob {
    Job common;
    BlockDriverState *bs;       /* a reference */
    BlockBackend *blk;          /* keeps it */
    int64_t speed;              /* bytes in a second; 0: any */
    RateLimit limit;
    int64_t since;              /* when the present row of steps began */
} ThinvmJob;

/* Of JobCreateFlags, from what a QMP command was told */
int thinvm_job_flags(bool has_auto_finalize, bool auto_finalize,
                     bool has_auto_dismiss, bool auto_dismiss);

/*
 * A job of @driver on @bs, not started; NULL with @errp set.  Its clean() has
 * to call thinvm_job_leave(), its free() is thinvm_job_free().  Main loop.
 */
ThinvmJob *thinvm_job_create(const JobDriver *driver, BlockDriverState *bs,
                             const char *job_id, int64_t speed, int flags,
                             Error **errp);
void thinvm_job_leave(ThinvmJob *job);
void thinvm_job_free(Job *job);

/*
 * A block job that ends may put another node in the place of ours, also for
 * the job's backend: then nobody tells us of drains any more.
 */
bool GRAPH_RDLOCK thinvm_job_has_node(ThinvmJob *job);

/* Between two steps, the last of which took care of @bytes */
void coroutine_fn thinvm_job_rest(ThinvmJob *job, uint64_t bytes);

#endif
