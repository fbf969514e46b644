/*
 * Unit tests of the job blockdev-precopy, with disks that wait
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * All of the job but its QMP command and hints, in QEMU's block layer.  Source
 * and target are in memory; what is written to the target waits at a gate
 * until the test lets it through, so that each state can be held and looked at:
 * drains, pauses, the last phase, hand-over; and sizes, and the delay of a
 * guest's writes, whose time is the test's.  Nothing here depends on how fast
 * the machine is.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/main-loop.h"
#include "qemu/units.h"
#include "system/block-backend.h"
#include "iothread.h"
#include "thinvm-gate-disk.h"
#include "../../block/precopy/precopy.h"

#define SIZE    (4 * MiB + 5 * KiB + 512)
#define JOB_ID  "job"

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

static struct {
    bool played;            /* else it is sleep as usual */
    bool hold;              /* until it is woken */
    int nb;
    int64_t total, longest;
    Coroutine *sleeper;
    void (*look)(void);     /* when it begins */
} nap;

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

static struct {
    AioContext *ctx;
    BlockDriverState *source_bs, *target_bs;
    GateDisk *source, *target;
    BlockBackend *guest;
    PrecopyJob *job;
} w;

/* Turn the loop until something has come about */
#define WAIT_UNTIL(condition) \
    do { \
        int64_t _limit = g_get_monotonic_time() + 60 * G_USEC_PER_SEC; \
        while (!(condition)) { \
            g_assert_cmpint(g_get_monotonic_time(), <, _limit); \
            if (!aio_poll(qemu_get_aio_context(), false)) { \
                g_usleep(100); \
            } \
        } \
    } while (0)

/* What could happen now happens */
static void turn(void)
{
    for (int i = 0; i < 50; i++) {
        if (!aio_poll(qemu_get_aio_context(), false) &&
            w.ctx != qemu_get_aio_context()) {
            g_usleep(100);
        }
    }
}

static void setup(int64_t length, int64_t target_length, AioContext *ctx)
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

static void start(PrecopyOptions o)
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

static void start_default(void)
{
    start((PrecopyOptions) {
        .on_source_error = BLOCKDEV_ON_ERROR_REPORT,
        .on_target_error = BLOCKDEV_ON_ERROR_REPORT,
    });
}

static JobStatus status(void)
{
    JOB_LOCK_GUARD();
    return w.job->common.job.status;
}

static void job_is_to(void (*verb)(Job *, Error **))
{
    JOB_LOCK_GUARD();
    verb(&w.job->common.job, &error_abort);
}

static void cancel_by_force(Job *job, Error **errp)
{
    job_user_cancel_locked(job, true, errp);
}

/* The job has ended, well or not; the guest is where it ought to be */
static void assert_ends(int ret, BlockDriverState *where)
{
    WAIT_UNTIL(status() == JOB_STATUS_CONCLUDED);
    WITH_JOB_LOCK_GUARD() {
        g_assert_cmpint(w.job->common.job.ret, ==, ret);
    }
    g_assert(blk_bs(w.guest) == where);
    g_assert_cmpint(w.source_bs->quiesce_counter, ==, 0);
    g_assert_cmpint(w.target_bs->quiesce_counter, ==, 0);
}

static void complete(void)
{
    job_is_to(job_complete_locked);
    assert_ends(0, w.target_bs);
    gate_disk_assert_same(w.source, w.target);
}

static void teardown(void)
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

/* A request of the guest that may take a while */
typedef struct Request {
    QEMUIOVector qiov;
    uint8_t *buf;
    int ret;
} Request;

static void request_end(void *opaque, int ret)
{
    Request *r = opaque;

    qatomic_set(&r->ret, ret);
    aio_wait_kick();
}

static Request *write_begin(int64_t offset, int64_t bytes, uint8_t byte)
{
    Request *r = g_new0(Request, 1);

    r->buf = g_malloc(bytes + 1);       /* of nothing, too */
    r->ret = -EINPROGRESS;
    memset(r->buf, byte, bytes);
    qemu_iovec_init_buf(&r->qiov, r->buf, bytes);
    blk_aio_pwritev(w.guest, offset, &r->qiov, 0, request_end, r);
    return r;
}

static bool request_is_over(Request *r)
{
    return qatomic_read(&r->ret) != -EINPROGRESS;
}

static void write_end(Request *r)
{
    WAIT_UNTIL(request_is_over(r));
    g_assert_cmpint(r->ret, ==, 0);
    g_free(r->buf);
    g_free(r);
}

static void guest_writes(int64_t offset, int64_t bytes, uint8_t byte)
{
    write_end(write_begin(offset, bytes, byte));
}

/* The job is ready, and nothing is left */
static void wait_ready(void)
{
    WAIT_UNTIL(status() == JOB_STATUS_READY &&
               !precopy_track_left(w.job->track) &&
               !qatomic_read(&w.job->in_flight));
}

/* Something is left that waits for the end: the guest has just written it */
static void ready_with_rest(void)
{
    WAIT_UNTIL(status() == JOB_STATUS_READY);
    guest_writes(MiB, 64 * KiB, 0x77);
    guest_writes(2 * MiB + 512, 512, 0x78);
}

/* In its last phase, which is held at the gate */
static void reach_last_phase(void)
{
    ready_with_rest();
    gate_close(w.target, &w.target->writes);
    job_is_to(job_complete_locked);
    WAIT_UNTIL(gate_held(w.target, &w.target->writes) > 1);
    g_assert_true(w.job->in_drain);
}

static void open_writes(void *opaque)
{
    gate_open(w.target, &w.target->writes);
}

static void open_flushes(void *opaque)
{
    gate_open(w.target, &w.target->flushes);
}

/* While somebody waits in the main loop */
static void later(QEMUBHFunc *what)
{
    aio_bh_schedule_oneshot(qemu_get_aio_context(), what, NULL);
}

/* ------------------------------------------------------------------ */
/* Sizes                                                               */

static void test_sizes(void)
{
    static const int64_t sizes[] = {
        512, 4096, 4096 + 512, MiB - 512, SIZE,
    };

    for (int i = 0; i < ARRAY_SIZE(sizes); i++) {
        int64_t size = sizes[i];

        setup(size, size, NULL);
        gate_disk_fill(w.source, 0, size, 0x11);
        gate_disk_fill(w.source, size - 512, 512, 0x12);
        start_default();
        wait_ready();
        gate_disk_assert_same(w.source, w.target);
        g_assert_cmpint(w.job->track->counters.sent, ==, size);
        guest_writes(size - 512, 512, 0x13);
        guest_writes(0, MIN(size, 1024), 0x14);
        complete();
        teardown();
    }
}

static void test_other_sizes(void)
{
    static const int64_t sizes[] = { 0, 512, SIZE - 512, SIZE + 512, 2 * SIZE };

    for (int i = 0; i < ARRAY_SIZE(sizes); i++) {
        setup(SIZE, sizes[i], NULL);
        gate_disk_fill(w.source, 0, SIZE, 0x11);
        start_default();
        assert_ends(-EINVAL, w.source_bs);
        g_assert_nonnull(strstr(error_get_pretty(w.job->common.job.err),
                                "same size"));
        g_assert_cmpint(g_hash_table_size(w.target->pages), ==, 0);
        guest_writes(0, 512, 0x12);
        teardown();
    }
}

/* So large that blocks are of 8 KiB; little is in it */
static void test_large(void)
{
    /* In the last block, which is not whole, only the last sector is data */
    const int64_t size = 2 * TiB + GATE_PAGE + 512;

    setup(size, size, NULL);
    gate_disk_fill(w.source, 3 * GATE_PAGE, GATE_PAGE, 0x11);
    gate_disk_fill(w.source, TiB - 512, 1024, 0x12);
    gate_disk_fill(w.source, size - 512, 512, 0x13);
    gate_disk_fill(w.target, 17 * GiB + GATE_PAGE, GATE_PAGE, 0x14);
    start_default();
    wait_ready();
    g_assert_cmpint(w.job->track->granularity, ==, 8192);
    gate_disk_assert_same(w.source, w.target);
    guest_writes(size - 512, 512, 0x15);
    guest_writes(5 * GATE_PAGE, GATE_PAGE, 0x16);
    complete();
    teardown();
}

/* ------------------------------------------------------------------ */
/* Pause                                                               */

static bool is_paused(void)
{
    JOB_LOCK_GUARD();
    return w.job->common.job.paused;
}

/* What has been begun ends before it is paused, and nothing else begins */
static void test_pause(void)
{
    int begun;

    setup(SIZE, SIZE, NULL);
    gate_disk_fill(w.source, 0, SIZE, 0x21);
    gate_close(w.target, &w.target->writes);
    start_default();
    WAIT_UNTIL(w.job->in_flight &&
               precopy_is_full(w.job, PRECOPY_MAX_IN_FLIGHT));
    begun = gate_begun(w.target, &w.target->writes);
    g_assert_cmpint(begun, >, 2);
    g_assert_cmpint(begun, ==, w.job->in_flight);
    job_is_to(job_user_pause_locked);
    for (int left = begun; left > 0; left--) {
        turn();
        g_assert_cmpint(w.job->in_flight, ==, left);
        g_assert_false(is_paused());
        gate_let_one(w.target, &w.target->writes);
    }
    WAIT_UNTIL(status() == JOB_STATUS_PAUSED);
    gate_open(w.target, &w.target->writes);
    /* The guest goes on; where it writes is not forgotten */
    guest_writes(0, KiB, 0x22);
    guest_writes(3 * MiB + 512, MiB, 0x23);
    guest_writes(SIZE - 512, 512, 0x24);
    turn();
    g_assert_cmpint(gate_begun(w.target, &w.target->writes), ==, begun);
    job_is_to(job_user_resume_locked);
    WAIT_UNTIL(status() == JOB_STATUS_READY);
    job_is_to(job_user_pause_locked);
    WAIT_UNTIL(status() == JOB_STATUS_STANDBY);
    guest_writes(2 * MiB, 64 * KiB, 0x25);
    job_is_to(job_user_resume_locked);
    WAIT_UNTIL(status() == JOB_STATUS_READY);
    complete();
    teardown();
}

/* A target with much to be zeroed, at the gate */
static void start_scan(void)
{
    setup(SIZE, SIZE, NULL);
    for (int64_t i = 0; i < SIZE / (64 * KiB); i++) {
        gate_disk_fill(w.target, i * 64 * KiB, 32 * KiB, 0x31);
    }
    gate_close(w.target, &w.target->writes);
    start_default();
    WAIT_UNTIL(gate_held(w.target, &w.target->writes) == 1);
    g_assert_cmpint(gate_begun(w.target, &w.target->writes), ==, 1);
}

static void test_pause_scan(void)
{
    start_scan();
    job_is_to(job_user_pause_locked);
    gate_let_one(w.target, &w.target->writes);
    turn();
    g_assert_cmpint(status(), ==, JOB_STATUS_PAUSED);
    g_assert_cmpint(gate_begun(w.target, &w.target->writes), ==, 1);
    job_is_to(job_user_resume_locked);
    gate_open(w.target, &w.target->writes);
    wait_ready();
    complete();
    teardown();
}

static void test_cancel_scan(void)
{
    start_scan();
    job_is_to(cancel_by_force);
    gate_let_one(w.target, &w.target->writes);
    assert_ends(-ECANCELED, w.source_bs);
    g_assert_cmpint(gate_begun(w.target, &w.target->writes), ==, 1);
    teardown();
}

/* As converge.c does, for good */
static void outpace(void)
{
    w.job->converge.outpaced = true;
    w.job->converge.hold = INT64_MAX / 2;
    precopy_converge_stand(w.job, false);
}

/* Nor do a guest's writes go through to the target of a job that is paused */
static void test_pause_write_through(void)
{
    Request *r;
    int begun;

    setup(SIZE, SIZE, NULL);
    gate_disk_fill(w.source, 0, SIZE, 0x41);
    start((PrecopyOptions) {
        .on_target_error = BLOCKDEV_ON_ERROR_REPORT,
        .when_outpaced = PRECOPY_OUTPACED_WRITE_BLOCKING,
    });
    wait_ready();
    outpace();
    guest_writes(SIZE - 512, 512, 0x42);
    g_assert_cmpint(gate_disk_byte(w.target, SIZE - 1), ==, 0x42);
    g_assert_cmpint(precopy_left(w.job), ==, 0);

    /* One is under way */
    gate_close(w.target, &w.target->writes);
    r = write_begin(MiB + 512, 64 * KiB, 0x43);
    WAIT_UNTIL(gate_held(w.target, &w.target->writes) == 1);
    job_is_to(job_user_pause_locked);
    turn();
    g_assert_false(is_paused());
    g_assert_false(request_is_over(r));
    begun = gate_begun(w.target, &w.target->writes);
    gate_let_one(w.target, &w.target->writes);
    WAIT_UNTIL(status() == JOB_STATUS_STANDBY);
    write_end(r);

    /* The gate is still closed */
    guest_writes(2 * MiB + 512, 64 * KiB, 0x44);
    g_assert_cmpint(gate_begun(w.target, &w.target->writes), ==, begun);
    g_assert_cmpint(precopy_left(w.job), >, 64 * KiB);
    gate_open(w.target, &w.target->writes);
    job_is_to(job_user_resume_locked);
    WAIT_UNTIL(status() == JOB_STATUS_READY);
    guest_writes(3 * MiB, 512, 0x45);
    g_assert_cmpint(gate_disk_byte(w.target, 3 * MiB), ==, 0x45);
    complete();
    teardown();
}

/* A guest does not wait for a target that hangs while the job is cancelled */
static void test_cancel_write_through(void)
{
    int begun;

    setup(SIZE, SIZE, NULL);
    gate_disk_fill(w.source, 2 * MiB, 2 * MiB, 0x46);
    gate_close(w.target, &w.target->writes);
    start((PrecopyOptions) {
        .when_outpaced = PRECOPY_OUTPACED_WRITE_BLOCKING,
    });
    WAIT_UNTIL(gate_held(w.target, &w.target->writes) > 2);
    outpace();
    job_is_to(cancel_by_force);
    begun = gate_begun(w.target, &w.target->writes);
    guest_writes(0, 512, 0x47);
    g_assert_cmpint(gate_held(w.target, &w.target->writes), ==, begun);
    open_writes(NULL);
    assert_ends(-ECANCELED, w.source_bs);
    g_assert_cmpint(gate_begun(w.target, &w.target->writes), ==, begun);
    teardown();

    /* Nor if it was paused before */
    setup(SIZE, SIZE, NULL);
    gate_disk_fill(w.source, 0, SIZE, 0x46);
    start((PrecopyOptions) {
        .when_outpaced = PRECOPY_OUTPACED_WRITE_BLOCKING,
    });
    wait_ready();
    outpace();
    job_is_to(job_user_pause_locked);
    WAIT_UNTIL(status() == JOB_STATUS_STANDBY);
    job_is_to(cancel_by_force);
    g_assert_false(w.job->track && w.job->track->write_through);
    assert_ends(-ECANCELED, w.source_bs);
    teardown();
}

/* A write of the guest waits for a copy, and the target does not answer */
static Request *wait_behind_copy(int held)
{
    Request *r;

    setup(SIZE, SIZE, NULL);
    gate_disk_fill(w.source, 0, SIZE, 0x48);
    gate_close(w.target, &w.target->writes);
    start((PrecopyOptions) {
        .on_target_error = BLOCKDEV_ON_ERROR_REPORT,
        .when_outpaced = PRECOPY_OUTPACED_WRITE_BLOCKING,
    });
    WAIT_UNTIL(w.job->in_flight &&
               precopy_is_full(w.job, PRECOPY_MAX_IN_FLIGHT));
    g_assert_cmpint(gate_held(w.target, &w.target->writes), >=, held);
    outpace();
    /* Where that is follows from where the first sweep begins */
    r = write_begin(QTAILQ_LAST(&w.job->track->ops)->first * GATE_PAGE, 512,
                    0x49);
    turn();
    g_assert_false(request_is_over(r));
    return r;
}

/* It goes on when the guest need not wait any longer, whatever the target */
static void test_let_go(void)
{
    Request *r;
    int held;

    /* The job is cancelled, */
    r = wait_behind_copy(2);
    held = gate_held(w.target, &w.target->writes);
    job_is_to(cancel_by_force);
    write_end(r);
    g_assert_cmpint(gate_held(w.target, &w.target->writes), ==, held);
    /* for good, */
    precopy_converge_stand(w.job, false);
    g_assert_false(w.job->track->write_through);
    open_writes(NULL);
    assert_ends(-ECANCELED, w.source_bs);
    teardown();

    /* or has failed, while other copies are under way, */
    r = wait_behind_copy(2);
    held = gate_held(w.target, &w.target->writes);
    w.target->fails = -EIO;
    gate_let_one(w.target, &w.target->writes);
    write_end(r);
    g_assert_cmpint(gate_held(w.target, &w.target->writes), ==, held - 1);
    open_writes(NULL);
    assert_ends(-EIO, w.source_bs);
    teardown();

    /* or it stands still; what was written is not forgotten */
    r = wait_behind_copy(2);
    precopy_converge_stand(w.job, true);
    write_end(r);
    g_assert_cmpint(precopy_track_left(w.job->track), >, 0);
    open_writes(NULL);
    wait_ready();
    gate_disk_assert_same(w.source, w.target);
    complete();
    teardown();
}

/* ------------------------------------------------------------------ */
/* Drain                                                               */

/* One after the other, as long as there are some */
static void let_all(void *opaque)
{
    gate_let_one(w.target, &w.target->writes);
    if (gate_held(w.target, &w.target->writes)) {
        later(let_all);
    }
}

static void check_drain(AioContext *ctx, bool all)
{
    int begun;

    setup(SIZE, SIZE, ctx);
    gate_disk_fill(w.source, 0, SIZE, 0x51);
    gate_close(w.target, &w.target->writes);
    start_default();
    WAIT_UNTIL(gate_held(w.target, &w.target->writes) > 2);
    later(let_all);
    if (all) {
        bdrv_drain_all_begin();
    } else {
        bdrv_drained_begin(w.source_bs);
    }
    g_assert_cmpint(gate_held(w.target, &w.target->writes), ==, 0);
    g_assert_cmpint(qatomic_read(&w.job->in_flight), ==, 0);
    begun = gate_begun(w.target, &w.target->writes);
    gate_open(w.target, &w.target->writes);
    turn();
    g_assert_cmpint(gate_begun(w.target, &w.target->writes), ==, begun);
    if (all) {
        bdrv_drain_all_end();
    } else {
        bdrv_drained_end(w.source_bs);
    }
    wait_ready();
    guest_writes(SIZE - 512, 512, 0x52);
    complete();
    teardown();
}

static void test_drain(void)
{
    check_drain(NULL, false);
    check_drain(NULL, true);
}

static void test_drain_iothread(void)
{
    IOThread *thread = iothread_new();

    check_drain(iothread_get_aio_context(thread), false);
    check_drain(iothread_get_aio_context(thread), true);
    iothread_join(thread);
}

/* Requests are at the gate when the drain begins */
static void drain_and_let_all(void)
{
    int begun = gate_begun(w.target, &w.target->writes);

    later(let_all);
    bdrv_drained_begin(w.source_bs);
    g_assert_cmpint(gate_held(w.target, &w.target->writes), ==, 0);
    turn();
    g_assert_cmpint(gate_begun(w.target, &w.target->writes), ==, begun);
    bdrv_drained_end(w.source_bs);
}

/* It is not only copies that are awaited */
static void test_drain_scan(void)
{
    start_scan();
    drain_and_let_all();
    gate_open(w.target, &w.target->writes);
    wait_ready();
    complete();
    teardown();
}

static void test_drain_cancelled(void)
{
    setup(SIZE, SIZE, NULL);
    gate_disk_fill(w.source, 0, SIZE, 0x53);
    gate_close(w.target, &w.target->writes);
    start_default();
    WAIT_UNTIL(gate_held(w.target, &w.target->writes) > 2);
    job_is_to(cancel_by_force);
    drain_and_let_all();
    assert_ends(-ECANCELED, w.source_bs);
    teardown();
}

/* Who drains during the last phase awaits its end, with its flush */
static void check_drain_last_phase(AioContext *ctx)
{
    setup(SIZE, SIZE, ctx);
    gate_disk_fill(w.source, 0, SIZE, 0x61);
    start_default();
    reach_last_phase();
    gate_close(w.target, &w.target->flushes);
    gate_open(w.target, &w.target->writes);
    WAIT_UNTIL(gate_held(w.target, &w.target->flushes) == 1);
    later(open_flushes);
    bdrv_drained_begin(w.source_bs);
    g_assert_cmpint(gate_held(w.target, &w.target->flushes), ==, 0);
    bdrv_drained_end(w.source_bs);
    assert_ends(0, w.target_bs);
    gate_disk_assert_same(w.source, w.target);
    teardown();
}

static void test_drain_last_phase(void)
{
    IOThread *thread = iothread_new();

    check_drain_last_phase(NULL);
    check_drain_last_phase(iothread_get_aio_context(thread));
    iothread_join(thread);
}

/* The guest goes on at once if the last phase fails */
static void test_last_phase_fails(void)
{
    int begun;

    setup(SIZE, SIZE, NULL);
    gate_disk_fill(w.source, 0, SIZE, 0x71);
    start_default();
    wait_ready();
    for (int i = 0; i < 2 * PRECOPY_MAX_IN_FLIGHT; i++) {
        guest_writes(2 * i * GATE_PAGE, GATE_PAGE, 0x72);
    }
    reach_last_phase();
    WAIT_UNTIL(gate_held(w.target, &w.target->writes) ==
               PRECOPY_MAX_IN_FLIGHT);
    begun = gate_begun(w.target, &w.target->writes);
    w.target->fails = -EIO;
    open_writes(NULL);
    assert_ends(-EIO, w.source_bs);
    g_assert_cmpint(gate_begun(w.target, &w.target->writes), ==, begun);
    guest_writes(0, 512, 0x72);
    teardown();

    /* and the job tries again if the user does not care */
    setup(SIZE, SIZE, NULL);
    gate_disk_fill(w.source, 0, SIZE, 0x71);
    start((PrecopyOptions) {
        .on_target_error = BLOCKDEV_ON_ERROR_IGNORE,
    });
    reach_last_phase();
    w.target->fails = -EIO;
    open_writes(NULL);
    assert_ends(0, w.target_bs);
    gate_disk_assert_same(w.source, w.target);
    teardown();
}

/* Nor does anything begin after the job is cancelled, not even amid a run */
static void test_cancel_last_phase(void)
{
    int begun;

    setup(SIZE, SIZE, NULL);
    gate_disk_fill(w.source, 0, SIZE, 0x73);
    start_default();
    wait_ready();
    guest_writes(MiB, 64 * KiB, 0x74);
    blk_pwrite_zeroes(w.guest, MiB + 64 * KiB, 64 * KiB, 0);
    guest_writes(MiB + 128 * KiB, 64 * KiB, 0x75);
    gate_close(w.target, &w.target->writes);
    job_is_to(job_complete_locked);
    WAIT_UNTIL(gate_held(w.target, &w.target->writes));
    begun = gate_begun(w.target, &w.target->writes);
    job_is_to(cancel_by_force);
    open_writes(NULL);
    assert_ends(-ECANCELED, w.source_bs);
    g_assert_cmpint(gate_begun(w.target, &w.target->writes), ==, begun);
    guest_writes(0, 512, 0x76);
    teardown();
}

/* ------------------------------------------------------------------ */
/* Hand-over                                                           */

static int inactivate(void)
{
    return bdrv_inactivate(w.job->filter, NULL);
}

static void assert_paused(void)
{
    g_assert_true(is_paused());
}

/* The job stands still while the rest is sent */
static void check_hand_over(AioContext *ctx)
{
    setup(SIZE, SIZE, ctx);
    gate_disk_fill(w.source, 0, SIZE, 0x81);
    start((PrecopyOptions) {
        .on_target_error = BLOCKDEV_ON_ERROR_IGNORE,
    });
    ready_with_rest();
    /* Something went wrong before, and may be right now */
    qatomic_set(&w.job->failed, true);
    w.target->look = assert_paused;
    g_assert_cmpint(inactivate(), ==, 0);
    w.target->look = NULL;
    g_assert_cmpint(w.job->filter->quiesce_counter, ==, 0);
    gate_disk_assert_same(w.source, w.target);
    g_assert_cmpint(precopy_track_left(w.job->track), ==, 0);
    job_is_to(cancel_by_force);
    assert_ends(-ECANCELED, w.source_bs);
    teardown();
}

static void test_hand_over(void)
{
    IOThread *thread = iothread_new();

    check_hand_over(NULL);
    check_hand_over(iothread_get_aio_context(thread));
    iothread_join(thread);
}

/* Not while the job completes; and that it does nevertheless */
static void check_hand_over_last_phase(AioContext *ctx)
{
    setup(SIZE, SIZE, ctx);
    gate_disk_fill(w.source, 0, SIZE, 0x91);
    start_default();
    reach_last_phase();
    later(open_writes);
    g_assert_cmpint(inactivate(), <, 0);
    assert_ends(0, w.target_bs);
    gate_disk_assert_same(w.source, w.target);
    guest_writes(0, 512, 0x92);
    teardown();
}

static void test_hand_over_last_phase(void)
{
    IOThread *thread = iothread_new();

    check_hand_over_last_phase(NULL);
    check_hand_over_last_phase(iothread_get_aio_context(thread));
    iothread_join(thread);
}

/* ------------------------------------------------------------------ */
/* The guest's requests                                                */

/* As slow as can be */
static void throttle(void)
{
    ratelimit_set_speed(&w.job->throttle, 1, BLOCK_JOB_SLICE_TIME);
    nap.played = true;
}

static void assert_written(void)
{
    g_assert_cmpint(gate_disk_byte(w.source, MiB), ==, 0xa2);
    g_assert_true(hbitmap_get(w.job->track->dirty, MiB / GATE_PAGE));
}

/* It is held after it has been written, in small parts, and not for ever */
static void test_delay(void)
{
    uint8_t buf[512];

    setup(SIZE, SIZE, NULL);
    gate_disk_fill(w.source, 0, SIZE, 0xa1);
    start_default();
    wait_ready();
    nap.played = true;
    guest_writes(0, 512, 0xa2);
    g_assert_cmpint(nap.nb, ==, 0);
    throttle();
    nap.look = assert_written;
    guest_writes(MiB, 512, 0xa2);
    g_assert_cmpint(nap.total, ==, 2 * NANOSECONDS_PER_SECOND);
    g_assert_cmpint(nap.longest, ==, 100 * SCALE_MS);
    g_assert_cmpint(nap.nb, ==, 20);
    /* Reads are free */
    blk_pread(w.guest, 0, sizeof(buf), buf, 0);
    g_assert_cmpint(nap.nb, ==, 20);
    ratelimit_set_speed(&w.job->throttle, 0, BLOCK_JOB_SLICE_TIME);
    guest_writes(MiB, 512, 0xa2);
    g_assert_cmpint(nap.nb, ==, 20);
    complete();
    teardown();
}

static void wake(void *opaque)
{
    if (nap.sleeper) {
        aio_co_wake(nap.sleeper);
        later(wake);
    }
}

/* Who drains the node waits for one part at most */
static void test_delay_drained(void)
{
    BlockDriverState *filter;
    Request *r;

    setup(SIZE, SIZE, NULL);
    gate_disk_fill(w.source, 0, SIZE, 0xb1);
    start_default();
    wait_ready();
    filter = w.job->filter;
    throttle();
    nap.hold = true;
    r = write_begin(MiB, 512, 0xb2);
    WAIT_UNTIL(nap.sleeper);
    for (int i = 0; i < 3; i++) {
        aio_co_wake(nap.sleeper);
    }
    g_assert_cmpint(nap.nb, ==, 4);
    later(wake);
    bdrv_drained_begin(filter);
    g_assert_cmpint(nap.nb, ==, 4);
    g_assert_null(nap.sleeper);
    bdrv_drained_end(filter);
    write_end(r);
    nap.played = false;
    complete();
    teardown();
}

/* Several that go through to one block: each in its turn, and none for ever */
static void test_write_through_queue(void)
{
    Request *r[4];

    setup(SIZE, SIZE, NULL);
    gate_disk_fill(w.source, 0, SIZE, 0xb3);
    start((PrecopyOptions) {
        .when_outpaced = PRECOPY_OUTPACED_WRITE_BLOCKING,
    });
    wait_ready();
    outpace();
    gate_close(w.target, &w.target->writes);
    for (int i = 0; i < ARRAY_SIZE(r); i++) {
        r[i] = write_begin(MiB + i * 512, KiB, 0xb4 + i);
    }
    turn();
    g_assert_cmpint(gate_held(w.target, &w.target->writes), ==, 1);
    for (int i = 0; i < ARRAY_SIZE(r); i++) {
        g_assert_false(request_is_over(r[i]));
    }
    open_writes(NULL);
    for (int i = 0; i < ARRAY_SIZE(r); i++) {
        write_end(r[i]);
    }
    g_assert_cmpint(precopy_left(w.job), ==, 0);
    gate_disk_assert_same(w.source, w.target);
    complete();
    teardown();
}

/* Nothing, amid a block: that is a request, too */
static void test_empty_write(void)
{
    setup(SIZE, SIZE, NULL);
    start_default();
    wait_ready();
    w.job->track->hint_written = precopy_hints_written;
    guest_writes(512, 0, 0);
    g_assert_cmpint(precopy_left(w.job), ==, 0);
    guest_writes(512, 512, 0xc1);
    g_assert_cmpint(precopy_left(w.job), ==, GATE_PAGE);
    complete();
    teardown();
}

/* Whoever writes to the source past the filter would not be seen */
static void test_other_writer(void)
{
    BlockBackend *blk = blk_new(qemu_get_aio_context(), BLK_PERM_WRITE,
                                BLK_PERM_ALL);
    BlockBackend *other = blk_new(qemu_get_aio_context(), BLK_PERM_WRITE,
                                  BLK_PERM_ALL);
    Error *err = NULL;

    setup(SIZE, SIZE, NULL);
    gate_disk_fill(w.source, 0, SIZE, 0xd1);
    start_default();
    wait_ready();
    g_assert_cmpint(blk_insert_bs(blk, w.source_bs, &err), <, 0);
    error_free_or_abort(&err);
    /* A reader may; and a writer where the guest is */
    blk_set_perm(blk, BLK_PERM_CONSISTENT_READ, BLK_PERM_ALL, &error_abort);
    blk_insert_bs(blk, w.source_bs, &error_abort);
    blk_insert_bs(other, w.job->filter, &error_abort);
    blk_pwrite(other, 0, 7, "written", 0);
    g_assert_cmpint(precopy_left(w.job), ==, GATE_PAGE);
    /* All of them go on with the target, and the source is anybody's */
    complete();
    g_assert(blk_bs(blk) == w.target_bs);
    g_assert(blk_bs(other) == w.target_bs);
    blk_remove_bs(other);
    blk_insert_bs(other, w.source_bs, &error_abort);
    blk_unref(other);
    blk_unref(blk);
    teardown();
}

int main(int argc, char **argv)
{
    bdrv_init();
    qemu_init_main_loop(&error_abort);
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/precopy-job/sizes", test_sizes);
    g_test_add_func("/precopy-job/other-sizes", test_other_sizes);
    g_test_add_func("/precopy-job/large", test_large);
    g_test_add_func("/precopy-job/pause", test_pause);
    g_test_add_func("/precopy-job/pause-scan", test_pause_scan);
    g_test_add_func("/precopy-job/cancel-scan", test_cancel_scan);
    g_test_add_func("/precopy-job/pause-write-through",
                    test_pause_write_through);
    g_test_add_func("/precopy-job/cancel-write-through",
                    test_cancel_write_through);
    g_test_add_func("/precopy-job/let-go", test_let_go);
    g_test_add_func("/precopy-job/drain", test_drain);
    g_test_add_func("/precopy-job/drain-iothread", test_drain_iothread);
    g_test_add_func("/precopy-job/drain-scan", test_drain_scan);
    g_test_add_func("/precopy-job/drain-cancelled", test_drain_cancelled);
    g_test_add_func("/precopy-job/drain-last-phase", test_drain_last_phase);
    g_test_add_func("/precopy-job/last-phase-fails", test_last_phase_fails);
    g_test_add_func("/precopy-job/cancel-last-phase", test_cancel_last_phase);
    g_test_add_func("/precopy-job/hand-over", test_hand_over);
    g_test_add_func("/precopy-job/hand-over-last-phase",
                    test_hand_over_last_phase);
    g_test_add_func("/precopy-job/delay", test_delay);
    g_test_add_func("/precopy-job/delay-drained", test_delay_drained);
    g_test_add_func("/precopy-job/write-through-queue",
                    test_write_through_queue);
    g_test_add_func("/precopy-job/empty-write", test_empty_write);
    g_test_add_func("/precopy-job/other-writer", test_other_writer);
    return g_test_run();
}
