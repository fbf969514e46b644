/*
 * Unit tests of blockdev-precopy and a guest that is faster than the link
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * What its requests wait for, for how long, and what lets them go; and what
 * goes through to the target, discards too.  In the world of
 * thinvm-precopy-world.h, so nothing here depends on how fast the machine is.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/main-loop.h"
#include "qemu/units.h"
#include "system/block-backend.h"
#include "thinvm-precopy-world.h"

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
    WAIT_UNTIL(status() == JOB_STATUS_READY);
    complete();
    teardown();
}

/* To so many bytes in a second */
static void throttle(int64_t speed)
{
    ratelimit_set_speed(&w.job->throttle, speed, BLOCK_JOB_SLICE_TIME);
    nap.played = true;
}

static void assert_written(void)
{
    g_assert_cmpint(gate_disk_byte(w.source, MiB), ==, 0xa2);
    g_assert_true(hbitmap_get(w.job->track->dirty, MiB / GATE_PAGE));
}

/* It is held after it has been written, in small parts, until its turn */
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
    /* 10 s for each block, if no time passes meanwhile */
    throttle(GATE_PAGE / 10);
    nap.look = assert_written;
    guest_writes(MiB, 512, 0xa2);
    g_assert_cmpint(nap.total, >=, 10 * NANOSECONDS_PER_SECOND);
    g_assert_cmpint(nap.total, <, 11 * NANOSECONDS_PER_SECOND);
    g_assert_cmpint(nap.longest, ==, 100 * SCALE_MS);
    nap.nb = 0;
    guest_writes(MiB, 512, 0xa2);
    g_assert_cmpint(nap.nb, >, 150);
    nap.nb = 0;
    guest_writes(MiB, 512, 0xa2);
    /* It would be its turn after 30 s, but the guest might not wait for it */
    g_assert_cmpint(nap.nb, ==, 200);
    /* Reads are free */
    nap.nb = 0;
    blk_pread(w.guest, 0, sizeof(buf), buf, 0);
    g_assert_cmpint(nap.nb, ==, 0);
    throttle(0);
    guest_writes(MiB, 512, 0xa2);
    g_assert_cmpint(nap.nb, ==, 0);
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
    throttle(1);
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

static Request *wait_for_hours(void)
{
    Request *r;

    setup(SIZE, SIZE, NULL);
    gate_disk_fill(w.source, 0, SIZE, 0xb1);
    start((PrecopyOptions) {
        .on_target_error = BLOCKDEV_ON_ERROR_REPORT,
        .when_outpaced = PRECOPY_OUTPACED_THROTTLE,
    });
    wait_ready();
    throttle(1);
    nap.hold = true;
    r = write_begin(MiB, 512, 0xb2);
    WAIT_UNTIL(nap.sleeper);
    aio_co_wake(nap.sleeper);
    g_assert_cmpint(nap.nb, ==, 2);
    return r;
}

/* Nor does it wait when there is nothing left to wait for */
static void wait_is_over(Request *r)
{
    aio_co_wake(nap.sleeper);
    g_assert_cmpint(nap.nb, ==, 2);
    g_assert_null(nap.sleeper);
    write_end(r);
    nap.played = false;
}

static void test_delay_ends(void)
{
    Request *r = wait_for_hours();

    precopy_converge_stand(w.job, true);
    wait_is_over(r);
    complete();
    teardown();

    r = wait_for_hours();
    job_is_to(cancel_by_force);
    wait_is_over(r);
    assert_ends(-ECANCELED, w.source_bs);
    teardown();

    r = wait_for_hours();
    qatomic_set(&w.job->ret, -EIO);
    wait_is_over(r);
    assert_ends(-EIO, w.source_bs);
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

static void ready_write_blocking(int64_t size)
{
    setup(size, size, NULL);
    gate_disk_fill(w.source, 0, size, 0xb8);
    start((PrecopyOptions) {
        .on_target_error = BLOCKDEV_ON_ERROR_IGNORE,
        .when_outpaced = PRECOPY_OUTPACED_WRITE_BLOCKING,
    });
    wait_ready();
}

/* One write after the other, over blocks that no copy gets hold of */
static void check_starved(int ret)
{
    Request *r[2];

    ready_write_blocking(SIZE);
    w.job->downtime_limit = 1;
    outpace();
    gate_close(w.target, &w.target->writes);
    for (int i = 0; i < ARRAY_SIZE(r); i++) {
        r[i] = write_begin(MiB - 512, 2 * MiB + 512, 0xba + i);
    }
    /* Another that began before writes went through has ended */
    precopy_track_mark(w.job->track, MiB - 512, 2 * MiB + 512);
    WAIT_UNTIL(precopy_track_is_starved(w.job->track));
    g_assert_cmpint(gate_held(w.target, &w.target->writes), ==, 1);
    g_assert_cmpint(precopy_left(w.job), ==, 2 * MiB + GATE_PAGE);
    gate_let_one(w.target, &w.target->writes);
    g_assert_cmpint(gate_held(w.target, &w.target->writes), ==, 1);
    /* What the second does not cover as a whole is left */
    g_assert_cmpint(precopy_left(w.job), ==, GATE_PAGE);
    w.target->fails = ret;
    open_writes(NULL);
    for (int i = 0; i < ARRAY_SIZE(r); i++) {
        write_end(r[i]);
    }
    wait_ready();
    gate_disk_assert_same(w.source, w.target);
    complete();
    teardown();
}

/* What it takes along is left if the target fails */
static void test_starved(void)
{
    check_starved(0);
    check_starved(-EIO);
}

static void discard(int64_t offset, int64_t bytes, int ret)
{
    g_assert_cmpint(blk_pdiscard(w.guest, offset, bytes, 0), ==, ret);
}

/* What a source does not discard it need not copy again */
static void test_discard_ignored(void)
{
    ready_write_blocking(SIZE);
    w.source_bs->open_flags &= ~BDRV_O_UNMAP;
    discard(0, SIZE, 0);
    g_assert_cmpint(precopy_left(w.job), ==, 0);
    w.source_bs->open_flags |= BDRV_O_UNMAP;
    discard(MiB, MiB, 0);
    g_assert_cmpint(precopy_left(w.job), ==, MiB);
    complete();
    teardown();
}

/* It goes through as writes do, over what is left, too */
static void test_discard_through(void)
{
    const int64_t size = 40 * MiB + 512;
    int begun;

    ready_write_blocking(size);
    begun = gate_begun(w.target, &w.target->writes);
    guest_writes(MiB, MiB, 0xb9);
    outpace();
    discard(512, size - 512, 0);
    /* In three pieces; of pages at the ends the source says they are data */
    g_assert_cmpint(gate_begun(w.target, &w.target->writes), ==, begun + 3);
    g_assert_cmpint(gate_disk_byte(w.source, size - 1), ==, 0);
    g_assert_cmpint(g_hash_table_size(w.target->pages), ==, 2);
    g_assert_cmpint(precopy_left(w.job), ==, 2 * GATE_PAGE);
    wait_ready();
    g_assert_cmpint(gate_disk_byte(w.target, 511), ==, 0xb8);
    gate_disk_assert_same(w.source, w.target);

    /* Amid a block that is left: it stays so */
    gate_disk_fill(w.source, 2 * MiB, GATE_PAGE, 0xba);
    precopy_track_mark(w.job->track, 2 * MiB, 512);
    discard(2 * MiB + 512, 512, 0);
    g_assert_cmpint(precopy_left(w.job), ==, GATE_PAGE);
    wait_ready();
    gate_disk_assert_same(w.source, w.target);
    complete();
    teardown();
}

/* What was discarded is not zero, or nobody knows, or the target fails */
static void test_discard_through_left(void)
{
    ready_write_blocking(SIZE);
    outpace();
    w.source->keeps_discarded = true;
    discard(MiB, MiB, 0);
    g_assert_cmpint(precopy_left(w.job), ==, MiB);
    wait_ready();
    gate_disk_assert_same(w.source, w.target);
    w.source->keeps_discarded = false;
    w.source->fails_discard = -EIO;
    discard(2 * MiB, MiB, -EIO);
    g_assert_cmpint(precopy_left(w.job), ==, MiB);
    w.source->fails_discard = 0;
    wait_ready();
    gate_disk_assert_same(w.source, w.target);
    w.target->fails = -EIO;
    discard(3 * MiB, 64 * KiB, 0);
    g_assert_cmpint(precopy_left(w.job), ==, 64 * KiB);
    wait_ready();
    gate_disk_assert_same(w.source, w.target);
    complete();
    teardown();
}

int main(int argc, char **argv)
{
    bdrv_init();
    qemu_init_main_loop(&error_abort);
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/precopy-outpaced/let-go", test_let_go);
    g_test_add_func("/precopy-outpaced/delay", test_delay);
    g_test_add_func("/precopy-outpaced/delay-drained", test_delay_drained);
    g_test_add_func("/precopy-outpaced/delay-ends", test_delay_ends);
    g_test_add_func("/precopy-outpaced/write-through-queue",
                    test_write_through_queue);
    g_test_add_func("/precopy-outpaced/starved", test_starved);
    g_test_add_func("/precopy-outpaced/discard-ignored", test_discard_ignored);
    g_test_add_func("/precopy-outpaced/discard-through", test_discard_through);
    g_test_add_func("/precopy-outpaced/discard-through-left",
                    test_discard_through_left);
    return g_test_run();
}
