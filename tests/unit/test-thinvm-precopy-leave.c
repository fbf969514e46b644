/*
 * Unit tests of blockdev-precopy and what others do with its disks
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Somebody goes back to a snapshot, inactivates the target, or has the guest
 * migrate while much is left, or go on with the target.  In the world of thinvm-precopy-world.h, with
 * the job's clock in the test's hands, so nothing here depends on how fast the
 * machine is.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/main-loop.h"
#include "qemu/units.h"
#include "block/snapshot.h"
#include "system/block-backend.h"
#include "iothread.h"
#include "thinvm-precopy-world.h"

/* ------------------------------------------------------------------ */
/* The job's clock                                                     */

static int64_t ahead;           /* ms */
static int64_t stopped;         /* it stands still; 0: it does not */

int64_t __real_precopy_clock_ms(void);
int64_t __wrap_precopy_clock_ms(void);

int64_t __wrap_precopy_clock_ms(void)
{
    return qatomic_read(&stopped) ?:
           __real_precopy_clock_ms() + qatomic_read(&ahead);
}

static void an_hour_passes(void)
{
    qatomic_add(&ahead, 3600 * 1000);
}

/* In the main loop, and with the disks in a thread */
static void in_both(void (*check)(AioContext *ctx))
{
    IOThread *thread = iothread_new();

    check(NULL);
    check(iothread_get_aio_context(thread));
    iothread_join(thread);
}

static void begin(AioContext *ctx)
{
    setup(SIZE, SIZE, ctx);
    gate_disk_fill(w.source, 0, SIZE, 0x11);
    start_default();
    wait_ready();
}

/* ------------------------------------------------------------------ */
/* Snapshots                                                           */

static void assert_goto(BlockDriverState *bs, int ret)
{
    Error *err = NULL;

    g_assert_cmpint(bdrv_snapshot_goto(bs, "snapshot", &err), ==, ret);
    error_free_or_abort(&err);
}

/* What would change a disk unseen is refused, as long as there is a job */
static void test_snapshot_goto(void)
{
    begin(NULL);
    assert_goto(w.source_bs, -EBUSY);
    assert_goto(w.job->filter, -EBUSY);
    assert_goto(w.target_bs, -EBUSY);
    complete();
    g_assert_cmpint(w.job->last.phase, ==, PRECOPY_PHASE_LAST);
    /* these disks have no snapshots */
    assert_goto(w.source_bs, -ENOTSUP);
    assert_goto(w.target_bs, -ENOTSUP);
    teardown();
}

/* ------------------------------------------------------------------ */
/* The target is inactivated                                           */

/* It is a target that fails; the guest does not notice */
static void check_inactive(AioContext *ctx)
{
    begin(ctx);
    bdrv_inactivate(w.target_bs, &error_abort);
    guest_writes(0, 3 * MiB, 0x21);
    assert_ends(-EPERM, w.source_bs);
    g_assert_cmpint(w.job->last.phase, ==, PRECOPY_PHASE_READY);
    guest_writes(0, 512, 0x22);
    teardown();
}

static void test_inactive(void)
{
    in_both(check_inactive);
}

/* Also if the guest's writes go there */
static void check_inactive_through(AioContext *ctx)
{
    begin(ctx);
    precopy_track_set_write_through(w.job->track, true);
    bdrv_inactivate(w.target_bs, &error_abort);
    precopy_track_set_write_through(w.job->track, true);
    guest_writes(0, 64 * KiB, 0x23);
    assert_ends(-EPERM, w.source_bs);
    guest_writes(0, 512, 0x24);
    teardown();
}

static void test_inactive_through(void)
{
    in_both(check_inactive_through);
}

/* ------------------------------------------------------------------ */
/* Hand-over with much left                                            */

static int hand_over(void)
{
    return bdrv_inactivate(w.job->filter, NULL);
}

static bool is_paused(void)
{
    JOB_LOCK_GUARD();
    return w.job->common.job.paused;
}

static void check_late(AioContext *ctx)
{
    uint64_t left;
    int begun;

    begin(ctx);
    job_is_to(job_user_pause_locked);
    WAIT_UNTIL(is_paused());
    guest_writes(0, 3 * MiB, 0x31);
    left = precopy_track_left(w.job->track);
    g_assert_cmpint(left, ==, 3 * MiB);
    /* It would take a month: nothing is begun */
    begun = gate_begun(w.target, &w.target->writes);
    w.job->converge.rate = 1;
    g_assert_cmpint(hand_over(), ==, -EBUSY);
    g_assert_cmpint(gate_begun(w.target, &w.target->writes), ==, begun);
    /* It turns out to be too slow: what has been sent has been sent */
    w.job->converge.rate = 0;
    w.target->look = an_hour_passes;
    g_assert_cmpint(hand_over(), ==, -EBUSY);
    w.target->look = NULL;
    g_assert_cmpint(precopy_track_left(w.job->track), >, 0);
    g_assert_cmpint(precopy_track_left(w.job->track), <, left);
    g_assert_cmpint(w.job->filter->quiesce_counter, ==, 0);
    /* The guest goes on, and so does the hand-over when it has the time */
    guest_writes(0, 512, 0x32);
    g_assert_cmpint(hand_over(), ==, 0);
    gate_disk_assert_same(w.source, w.target);
    job_is_to(cancel_by_force);
    assert_ends(-ECANCELED, w.source_bs);
    teardown();
}

static void test_late(void)
{
    in_both(check_late);
}

/* Whatever it takes, as long as it is what the job has called little */
static void test_little(void)
{
    begin(NULL);
    job_is_to(job_user_pause_locked);
    WAIT_UNTIL(is_paused());
    guest_writes(0, MiB, 0x41);
    w.job->converge.rate = 1;
    g_assert_cmpint(hand_over(), ==, 0);
    gate_disk_assert_same(w.source, w.target);
    job_is_to(cancel_by_force);
    assert_ends(-ECANCELED, w.source_bs);
    teardown();
}

/* ------------------------------------------------------------------ */
/* The guest is to go on with the target                               */

static int nb_held;             /* writes that kept the guest waiting */

static void note_held(void)
{
    nb_held += w.job->in_drain;
}

/* Ready; the clock stands still, so nothing is known of the link */
static void begin_closing(AioContext *ctx)
{
    stopped = __real_precopy_clock_ms();
    nb_held = 0;
    begin(ctx);
    w.target->look = note_held;
}

static void end_closing(void)
{
    assert_ends(0, w.target_bs);
    gate_disk_assert_same(w.source, w.target);
    qatomic_set(&stopped, 0);
    teardown();
}

static void wait_held(Gate *gate, int nb)
{
    WAIT_UNTIL(gate_held(w.target, gate) == nb);
    g_assert_false(w.job->in_drain);
}

/* It goes on meanwhile, until next to nothing is left */
static void check_closing(AioContext *ctx)
{
    begin_closing(ctx);
    guest_writes(2 * MiB, 256 * KiB, 0x51);
    gate_close(w.target, &w.target->writes);
    job_is_to(job_complete_locked);
    wait_held(&w.target->writes, 1);
    /* behind where the sweep is */
    guest_writes(MiB, 128 * KiB, 0x52);
    gate_close(w.target, &w.target->flushes);
    open_writes(NULL);
    wait_held(&w.target->flushes, 1);
    g_assert_cmpint(precopy_left(w.job), ==, 0);
    /* The flush took so long that the guest has written a lot */
    guest_writes(3 * MiB, 128 * KiB, 0x53);
    gate_close(w.target, &w.target->writes);
    open_flushes(NULL);
    wait_held(&w.target->writes, 1);
    guest_writes(512 * KiB, 64 * KiB, 0x54);
    gate_close(w.target, &w.target->flushes);
    open_writes(NULL);
    wait_held(&w.target->flushes, 1);
    g_assert_cmpint(precopy_left(w.job), ==, 64 * KiB);
    open_flushes(NULL);
    end_closing();
    g_assert_cmpint(nb_held, ==, 1);
}

static void test_closing(void)
{
    in_both(check_closing);
}

static void open_when_drained(void *opaque)
{
    if (w.source_bs->quiesce_counter) {
        gate_open(w.source, &w.source->writes);
    } else {
        later(open_when_drained);
    }
}

/* The guest is just writing so much when its requests are held */
static void end_amid_burst(int64_t bytes)
{
    Request *r;

    gate_close(w.source, &w.source->writes);
    r = write_begin(MiB, bytes, 0x55);
    WAIT_UNTIL(gate_held(w.source, &w.source->writes) == 1);
    later(open_when_drained);
    job_is_to(job_complete_locked);
    write_end(r);
    end_closing();
}

/* It is too much: it goes on, unless that has been tried for long enough */
static void check_closing_burst(AioContext *ctx)
{
    begin_closing(ctx);
    end_amid_burst(128 * KiB);
    g_assert_cmpint(nb_held, ==, 0);

    begin_closing(ctx);
    time_for_less_is_spent();
    end_amid_burst(2 * MiB);
    g_assert_cmpint(nb_held, >, 0);
}

static void test_closing_burst(void)
{
    in_both(check_closing_burst);
}

/* A limit makes it no longer, and there is an end to it */
static void check_closing_late(AioContext *ctx)
{
    begin_closing(ctx);
    for (int i = 0; i < 8; i++) {
        guest_writes(2 * MiB + i * 64 * KiB, 16 * KiB, 0x61);
    }
    WITH_JOB_LOCK_GUARD() {
        block_job_set_speed_locked(&w.job->common, 8 * MiB, &error_abort);
    }
    gate_close(w.target, &w.target->writes);
    job_is_to(job_complete_locked);
    wait_held(&w.target->writes, 8);
    guest_writes(MiB, 128 * KiB, 0x62);
    qatomic_add(&stopped, 8 * 100);
    open_writes(NULL);
    end_closing();
    g_assert_cmpint(nb_held, >, 0);
}

static void test_closing_late(void)
{
    in_both(check_closing_late);
}

int main(int argc, char **argv)
{
    bdrv_init();
    qemu_init_main_loop(&error_abort);
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/precopy-leave/snapshot-goto", test_snapshot_goto);
    g_test_add_func("/precopy-leave/inactive", test_inactive);
    g_test_add_func("/precopy-leave/inactive-through", test_inactive_through);
    g_test_add_func("/precopy-leave/late", test_late);
    g_test_add_func("/precopy-leave/little", test_little);
    g_test_add_func("/precopy-leave/closing", test_closing);
    g_test_add_func("/precopy-leave/closing-burst", test_closing_burst);
    g_test_add_func("/precopy-leave/closing-late", test_closing_late);
    return g_test_run();
}
