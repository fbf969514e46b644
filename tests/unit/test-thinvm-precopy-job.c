/*
 * Unit tests of the job blockdev-precopy, with disks that wait
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The world that they are in is in thinvm-precopy-world.h: each state can be
 * held and looked at: drains, pauses, the last phase, hand-over; and sizes.
 * Nothing here depends on how fast the machine is.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/main-loop.h"
#include "qemu/units.h"
#include "system/block-backend.h"
#include "iothread.h"
#include "thinvm-precopy-world.h"

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
    time_for_less_is_spent();
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
    g_test_add_func("/precopy-job/empty-write", test_empty_write);
    g_test_add_func("/precopy-job/other-writer", test_other_writer);
    return g_test_run();
}
