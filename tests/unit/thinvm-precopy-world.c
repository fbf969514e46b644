/*
 * A guest, its disk, a target and the job blockdev-precopy, in memory
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See thinvm-precopy-world.h.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/main-loop.h"
#include "qemu/units.h"
#include "system/block-backend.h"
#include "thinvm-precopy-world.h"

/* ------------------------------------------------------------------ */
/* What is behind hints                                                */

PrecopyHintsUser *precopy_hints_attach(const char *id, const char *serial,
                                       int64_t size, bool trim, Error **errp)
{
    g_assert_not_reached();
}

void precopy_hints_detach(PrecopyHintsUser *user)
{
    g_assert_null(user);
}

bool precopy_hints_trimming(PrecopyHintsUser *user)
{
    g_assert_not_reached();
}

void precopy_hints_get(void *opaque, int64_t offset, int64_t now,
                       PrecopyHint *hint)
{
    g_assert_not_reached();
}

/* As the object thinvm-hints, which has no place for nothing */
void precopy_hints_written(void *opaque, int64_t offset, int64_t bytes,
                           int64_t now)
{
    g_assert_cmpint(bytes, >, 0);
}

/* ------------------------------------------------------------------ */
/* Sleep of a guest's request                                          */

PrecopyNap nap;

void coroutine_fn __real_qemu_co_sleep_ns_wakeable(QemuCoSleep *w,
                                                   QEMUClockType type,
                                                   int64_t ns);
void coroutine_fn __wrap_qemu_co_sleep_ns_wakeable(QemuCoSleep *w,
                                                   QEMUClockType type,
                                                   int64_t ns);

void coroutine_fn __wrap_qemu_co_sleep_ns_wakeable(QemuCoSleep *w,
                                                   QEMUClockType type,
                                                   int64_t ns)
{
    if (!nap.played) {
        __real_qemu_co_sleep_ns_wakeable(w, type, ns);
        return;
    }
    nap.nb++;
    nap.total += ns;
    nap.longest = MAX(nap.longest, ns);
    g_assert_cmpint(nap.nb, <, 1000);
    if (nap.look) {
        nap.look();
    }
    if (nap.hold) {
        nap.sleeper = qemu_coroutine_self();
        qemu_coroutine_yield();
        nap.sleeper = NULL;
    }
}

/* ------------------------------------------------------------------ */
/* A guest, its disk, a target and the job                             */

PrecopyWorld w;

/* What could happen now happens */
void turn(void)
{
    for (int i = 0; i < 50; i++) {
        if (!aio_poll(qemu_get_aio_context(), false) &&
            w.ctx != qemu_get_aio_context()) {
            g_usleep(100);
        }
    }
}

void setup(int64_t length, int64_t target_length, AioContext *ctx)
{
    memset(&nap, 0, sizeof(nap));
    w.ctx = ctx ?: qemu_get_aio_context();
    w.source_bs = gate_disk_new("source", length, &w.source);
    w.target_bs = gate_disk_new("target", target_length, &w.target);
    w.guest = blk_new(qemu_get_aio_context(),
                      BLK_PERM_CONSISTENT_READ | BLK_PERM_WRITE, BLK_PERM_ALL);
    blk_insert_bs(w.guest, w.source_bs, &error_abort);
    blk_set_force_allow_inactivate(w.guest);
    blk_set_allow_aio_context_change(w.guest, true);
    blk_set_aio_context(w.guest, w.ctx, &error_abort);
    bdrv_try_change_aio_context(w.target_bs, w.ctx, NULL, &error_abort);
    w.job = NULL;
}

void start(PrecopyOptions o)
{
    o.job_id = JOB_ID;
    o.filter_node_name = "top";
    o.job_flags = JOB_MANUAL_DISMISS;
    o.downtime_limit = 100;
    precopy_start(w.source_bs, w.target_bs, &o, &error_abort);
    WITH_JOB_LOCK_GUARD() {
        w.job = container_of(job_get_locked(JOB_ID), PrecopyJob, common.job);
    }
}

void start_default(void)
{
    start((PrecopyOptions) {
        .on_source_error = BLOCKDEV_ON_ERROR_REPORT,
        .on_target_error = BLOCKDEV_ON_ERROR_REPORT,
    });
}

JobStatus status(void)
{
    JOB_LOCK_GUARD();
    return w.job->common.job.status;
}

void job_is_to(void (*verb)(Job *, Error **))
{
    JOB_LOCK_GUARD();
    verb(&w.job->common.job, &error_abort);
}

void cancel_by_force(Job *job, Error **errp)
{
    job_user_cancel_locked(job, true, errp);
}

/* The job has ended, well or not; the guest is where it ought to be */
void assert_ends(int ret, BlockDriverState *where)
{
    WAIT_UNTIL(status() == JOB_STATUS_CONCLUDED);
    WITH_JOB_LOCK_GUARD() {
        g_assert_cmpint(w.job->common.job.ret, ==, ret);
    }
    g_assert(blk_bs(w.guest) == where);
    g_assert_cmpint(w.source_bs->quiesce_counter, ==, 0);
    g_assert_cmpint(w.target_bs->quiesce_counter, ==, 0);
}

void complete(void)
{
    job_is_to(job_complete_locked);
    assert_ends(0, w.target_bs);
    gate_disk_assert_same(w.source, w.target);
}

void teardown(void)
{
    if (w.job) {
        Job *job = &w.job->common.job;

        WITH_JOB_LOCK_GUARD() {
            job_dismiss_locked(&job, &error_abort);
        }
    }
    blk_unref(w.guest);
    bdrv_try_change_aio_context(w.source_bs, qemu_get_aio_context(), NULL,
                                &error_abort);
    bdrv_try_change_aio_context(w.target_bs, qemu_get_aio_context(), NULL,
                                &error_abort);
    bdrv_unref(w.source_bs);
    bdrv_unref(w.target_bs);
    aio_poll(qemu_get_aio_context(), false);
}

static void request_end(void *opaque, int ret)
{
    Request *r = opaque;

    qatomic_set(&r->ret, ret);
    aio_wait_kick();
}

Request *write_begin(int64_t offset, int64_t bytes, uint8_t byte)
{
    Request *r = g_new0(Request, 1);

    r->buf = g_malloc(bytes + 1);       /* of nothing, too */
    r->ret = -EINPROGRESS;
    memset(r->buf, byte, bytes);
    qemu_iovec_init_buf(&r->qiov, r->buf, bytes);
    blk_aio_pwritev(w.guest, offset, &r->qiov, 0, request_end, r);
    return r;
}

bool request_is_over(Request *r)
{
    return qatomic_read(&r->ret) != -EINPROGRESS;
}

void write_end(Request *r)
{
    WAIT_UNTIL(request_is_over(r));
    g_assert_cmpint(r->ret, ==, 0);
    g_free(r->buf);
    g_free(r);
}

void guest_writes(int64_t offset, int64_t bytes, uint8_t byte)
{
    write_end(write_begin(offset, bytes, byte));
}

/* The job is ready, and nothing is left */
void wait_ready(void)
{
    WAIT_UNTIL(status() == JOB_STATUS_READY &&
               !precopy_track_left(w.job->track) &&
               !qatomic_read(&w.job->in_flight));
}

/* Something is left that waits for the end: the guest has just written it */
void ready_with_rest(void)
{
    WAIT_UNTIL(status() == JOB_STATUS_READY);
    guest_writes(MiB, 64 * KiB, 0x77);
    guest_writes(2 * MiB + 512, 512, 0x78);
}

/* No sweep is to make what is left less: that is for the last phase */
void time_for_less_is_spent(void)
{
    w.job->converge.closing_since = INT64_MIN / 2;
}

/* In its last phase, which is held at the gate */
void reach_last_phase(void)
{
    ready_with_rest();
    time_for_less_is_spent();
    gate_close(w.target, &w.target->writes);
    job_is_to(job_complete_locked);
    WAIT_UNTIL(gate_held(w.target, &w.target->writes) > 1);
    g_assert_true(w.job->in_drain);
}

void open_writes(void *opaque)
{
    gate_open(w.target, &w.target->writes);
}

void open_flushes(void *opaque)
{
    gate_open(w.target, &w.target->flushes);
}

/* While somebody waits in the main loop */
void later(QEMUBHFunc *what)
{
    aio_bh_schedule_oneshot(qemu_get_aio_context(), what, NULL);
}

/* As converge.c does, for good */
void outpace(void)
{
    w.job->converge.outpaced = true;
    w.job->converge.hold = INT64_MAX / 2;
    precopy_converge_stand(w.job, false);
}
