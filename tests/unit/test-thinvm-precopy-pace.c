/*
 * Unit tests of blockdev-precopy's pace, in simulated time
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * converge.c alone: what the link carries, how much is put into it, when the
 * job may be ready, when a guest is too fast and what is done about it, and
 * what the next sweep waits for.  The job and the clock are stand-ins.
 */

#include "qemu/osdep.h"
#include "qemu/job.h"
#include "qemu/units.h"
#include "../../block/precopy/precopy.h"

#define DISK (64 * MiB)
#define GRAN 4096

static int64_t now_ms;
static bool trimming;

/* It guards the speed that a user has set */
QemuMutex job_mutex;

/* ------------------------------------------------------------------ */
/* What converge.c asks of the job                                     */

int64_t precopy_clock_ms(void)
{
    return now_ms;
}

uint64_t precopy_left(PrecopyJob *s)
{
    return precopy_track_left(s->track) + s->bytes_in_flight;
}

int64_t precopy_busy_ns(PrecopyJob *s)
{
    return s->busy_ns;
}

bool precopy_hints_trimming(PrecopyHintsUser *user)
{
    return trimming;
}

bool precopy_should_end(PrecopyJob *s)
{
    return s->should_complete;
}

/* ------------------------------------------------------------------ */
/* A job                                                               */

static PrecopyJob *job_new(PrecopyOutpaced when_outpaced)
{
    PrecopyJob *s = g_new0(PrecopyJob, 1);

    now_ms = 1000;
    trimming = false;
    s->track = precopy_track_new(DISK, GRAN);
    s->when_outpaced = when_outpaced;
    s->downtime_limit = 100;
    s->ready_after = -1;
    ratelimit_init(&s->throttle);
    precopy_converge_start(s);
    return s;
}

static void job_free(PrecopyJob *s)
{
    ratelimit_destroy(&s->throttle);
    precopy_track_free(s->track);
    g_free(s);
}

/* Time passes; the link is busy for a part of it and carries something */
static void pass(PrecopyJob *s, int64_t ms, int64_t busy_ms, uint64_t sent,
                 uint64_t zeroed)
{
    now_ms += ms;
    s->busy_ns += busy_ms * SCALE_MS;
    s->track->counters.sent += sent;
    s->track->counters.zeroed += zeroed;
    precopy_converge_measure(s);
}

/* The guest writes the first bytes of the disk, a quarter of a second long */
static void guest_writes(PrecopyJob *s, uint64_t bytes)
{
    precopy_track_wrote(s->track, 0, bytes, now_ms);
    pass(s, 250, 0, 0, 0);
}

/* All is sent, however long that has taken */
static void send_all(PrecopyJob *s)
{
    PrecopySweep all = { .free_too = true };
    PrecopyOp op;

    while (precopy_track_pick(s->track, &all, DISK, now_ms, &op) ==
           PRECOPY_PICK_RUN) {
        precopy_track_end_op(s->track, &op);
    }
}

/* ------------------------------------------------------------------ */
/* The link                                                            */

static void test_rate(void)
{
    PrecopyJob *s = job_new(PRECOPY_OUTPACED_CONTINUE);

    pass(s, 250, 250, 5 * MiB, 0);
    g_assert_cmpint(s->converge.rate, ==, 20 * MiB);
    /* Too early, then with what was busy before */
    pass(s, 100, 100, 1 * MiB, 0);
    g_assert_cmpint(s->converge.rate, ==, 20 * MiB);
    pass(s, 150, 150, 9 * MiB, 0);
    g_assert_cmpint(s->converge.rate, ==, 25 * MiB);
    /* Little to do is no slow link: it counts when it is enough to tell */
    pass(s, 1000, 50, 5 * MiB / 4, 0);
    g_assert_cmpint(s->converge.rate, ==, 25 * MiB);
    pass(s, 1000, 200, 5 * MiB, 0);
    g_assert_cmpint(s->converge.rate, ==, 25 * MiB);
    /* Nothing arrived yet: that is slow when it does */
    pass(s, 250, 250, 0, 0);
    g_assert_cmpint(s->converge.rate, ==, 25 * MiB);
    pass(s, 250, 250, 5 * MiB / 2, 0);
    g_assert_cmpint(s->converge.rate, ==, 20 * MiB);
    job_free(s);
}

/* Telling the target of zeroes takes time, too, and no payload */
static void test_rate_zeroes(void)
{
    PrecopyJob *s = job_new(PRECOPY_OUTPACED_CONTINUE);

    pass(s, 250, 250, 5 * MiB, 0);
    pass(s, 250, 250, 65536, 600 * MiB);
    pass(s, 250, 250, 0, 600 * MiB);
    g_assert_cmpint(s->converge.rate, ==, 20 * MiB);
    pass(s, 250, 250, 5 * MiB, 0);
    g_assert_cmpint(s->converge.rate, ==, 20 * MiB);
    job_free(s);
}

/* What the guest writes through is no payload of the time that copies take */
static void test_rate_through(void)
{
    PrecopyJob *s = job_new(PRECOPY_OUTPACED_WRITE_BLOCKING);

    /* 40 MiB/s: copies in an eighth of a second, the guest's in two seconds */
    s->track->counters.written_through += 75 * MiB;
    pass(s, 2000, 125, 80 * MiB, 0);
    g_assert_cmpint(s->converge.rate, ==, 40 * MiB);
    /* Both share the link all the time: neither is all that it carries */
    s->track->counters.written_through += 6 * MiB;
    pass(s, 250, 250, 10 * MiB, 0);
    g_assert_cmpint(s->converge.rate, ==, 40 * MiB);
    /* Copies that get nowhere are no reason to count the guest's alone */
    s->track->counters.written_through += 20 * MiB;
    pass(s, 500, 500, 20 * MiB, 0);
    g_assert_cmpint(s->converge.rate, ==, 40 * MiB);
    pass(s, 500, 500, 20 * MiB, 0);
    g_assert_cmpint(s->converge.rate, ==, 40 * MiB);
    /* Little of the guest, and copies that were slow */
    s->track->counters.written_through += 1 * MiB;
    pass(s, 10000, 250, 6 * MiB, 0);
    g_assert_cmpint(s->converge.rate, ==, 35 * MiB);
    job_free(s);
}

/* What a user who cancels the job may have to wait for */
static void test_window(void)
{
    PrecopyJob *s = job_new(PRECOPY_OUTPACED_CONTINUE);
    const struct {
        uint64_t rate, bytes, window, outpaced;
    } known[] = {
        { 0, 256 * KiB, 2 * MiB, 2 * MiB },
        { 1000, 64 * KiB, 128 * KiB, 128 * KiB },
        { 1 * MiB, 128 * KiB, 512 * KiB, 256 * KiB },
        { 20 * MiB, 1 * MiB, 10 * MiB, 5 * MiB },
        { 1 * GiB, 1 * MiB, 512 * MiB, 256 * MiB },
    };

    for (int i = 0; i < ARRAY_SIZE(known); i++) {
        s->converge.rate = known[i].rate;
        s->converge.outpaced = false;
        g_assert_cmpint(precopy_converge_bytes(s), ==, known[i].bytes);
        g_assert_cmpint(precopy_converge_window(s), ==, known[i].window);
        s->converge.outpaced = true;
        g_assert_cmpint(precopy_converge_window(s), ==, known[i].outpaced);
    }
    /* A limit makes requests small, so that it is kept evenly */
    s->common.speed = 1 * MiB;
    g_assert_cmpint(precopy_converge_bytes(s), ==, 128 * KiB);
    job_free(s);
}

static void test_bound(void)
{
    PrecopyJob *s = job_new(PRECOPY_OUTPACED_CONTINUE);

    g_assert_cmpint(precopy_bound(s), ==, 1 * MiB);
    s->converge.rate = 100 * MiB;
    g_assert_cmpint(precopy_bound(s), ==, 10 * MiB);
    s->downtime_limit = 1;
    g_assert_cmpint(precopy_bound(s), ==, 1 * MiB);
    s->downtime_limit = 500;
    s->common.speed = 20 * MiB;
    g_assert_cmpint(precopy_bound(s), ==, 10 * MiB);
    s->common.speed = 1000 * MiB;
    g_assert_cmpint(precopy_bound(s), ==, 50 * MiB);
    s->converge.rate = 0;
    g_assert_cmpint(precopy_bound(s), ==, 500 * MiB);
    /* Whatever the user wants */
    s->downtime_limit = 60000;
    s->common.speed = INT64_MAX;
    g_assert_cmpint(precopy_bound(s), >, DISK);
    s->converge.rate = UINT64_MAX;
    g_assert_cmpint(precopy_bound(s), >, DISK);
    job_free(s);
}

/* ------------------------------------------------------------------ */
/* The guest                                                           */

static void test_faster(void)
{
    PrecopyJob *s = job_new(PRECOPY_OUTPACED_WRITE_BLOCKING);

    /* Nothing is known of the link; then it is faster, then slower */
    guest_writes(s, 5 * MiB);
    g_assert_false(s->converge.outpaced);
    s->converge.rate = 30 * MiB;
    send_all(s);
    guest_writes(s, 5 * MiB);
    g_assert_false(s->converge.outpaced);
    s->converge.rate = 20 * MiB;
    send_all(s);
    guest_writes(s, 5 * MiB);
    g_assert_true(s->converge.outpaced);
    g_assert_true(s->track->write_through);
    job_free(s);

    /* The same, by a limit of the user */
    s = job_new(PRECOPY_OUTPACED_WRITE_BLOCKING);
    s->converge.rate = 1000 * MiB;
    s->common.speed = 20 * MiB;
    guest_writes(s, 5 * MiB);
    g_assert_true(s->track->write_through);
    job_free(s);

    /* Fast, but over the same blocks again and again */
    s = job_new(PRECOPY_OUTPACED_WRITE_BLOCKING);
    s->converge.rate = 20 * MiB;
    for (int i = 0; i < 8; i++) {
        guest_writes(s, 4 * MiB);
    }
    g_assert_false(s->converge.outpaced);
    /* Within what may be left, any pace is good */
    send_all(s);
    s->converge.rate = 2 * MiB;
    guest_writes(s, 1 * MiB);
    g_assert_false(s->converge.outpaced);
    job_free(s);
}

/* Faster than the link, for so long, and sent all the same */
static void burst(PrecopyJob *s, int64_t ms)
{
    int64_t end = now_ms + ms;

    while (now_ms < end) {
        g_assert_false(s->converge.outpaced);
        send_all(s);
        guest_writes(s, 6 * MiB);
    }
}

/* Once the job is ready, that has to go on for a while */
static void test_burst(void)
{
    PrecopyJob *s = job_new(PRECOPY_OUTPACED_WRITE_BLOCKING);

    s->converge.rate = 20 * MiB;
    s->started = now_ms;
    pass(s, 250, 0, 0, 0);
    s->ready_after = 1000;
    now_ms += 1000;
    burst(s, 2500);
    g_assert_false(s->converge.outpaced);
    /* In its bound for a moment */
    send_all(s);
    pass(s, 250, 0, 0, 0);
    burst(s, 2750);
    g_assert_false(s->converge.outpaced);
    burst(s, 250);
    g_assert_true(s->converge.outpaced);
    job_free(s);

    /* Unless the user wants the end */
    s = job_new(PRECOPY_OUTPACED_WRITE_BLOCKING);
    s->converge.rate = 20 * MiB;
    s->started = now_ms;
    s->ready_after = 0;
    burst(s, 500);
    g_assert_false(s->converge.outpaced);
    s->should_complete = true;
    burst(s, 250);
    g_assert_true(s->converge.outpaced);
    job_free(s);
}

static void test_throttle(void)
{
    PrecopyJob *s = job_new(PRECOPY_OUTPACED_THROTTLE);

    g_assert_cmpint(precopy_throttle_ns(s, 0, DISK), ==, 0);
    s->converge.rate = 1 * MiB;
    guest_writes(s, 4 * MiB);
    g_assert_true(s->converge.outpaced);
    g_assert_false(s->track->write_through);
    /* 256 blocks of which a byte is written are 2 s at half of the link */
    for (int i = 0; i < 256; i++) {
        precopy_throttle_ns(s, i * 2 * GRAN + 7, 1);
    }
    g_assert_cmpint(precopy_throttle_ns(s, 0, 1), >, NANOSECONDS_PER_SECOND);
    send_all(s);
    now_ms += 60000;
    s->converge.guest_rate = 0;
    precopy_converge_next(s);
    g_assert_false(s->converge.outpaced);
    g_assert_cmpint(precopy_throttle_ns(s, 0, DISK), ==, 0);
    job_free(s);
}

/* Nothing is known of the link: that is no reason for hours of delay */
static void test_throttle_unknown(void)
{
    PrecopyJob *s = job_new(PRECOPY_OUTPACED_THROTTLE);

    s->should_complete = true;
    guest_writes(s, 4 * MiB);
    g_assert_true(s->converge.outpaced);
    g_assert_cmpint(precopy_throttle_ns(s, 0, DISK), >, 0);
    g_assert_cmpint(precopy_throttle_ns(s, 0, DISK), <,
                    1000 * NANOSECONDS_PER_SECOND);
    /* What is owed is not, at another pace */
    s->converge.rate = 1000;
    precopy_converge_stand(s, false);
    g_assert_cmpint(precopy_throttle_ns(s, 0, 0), ==, 0);
    g_assert_cmpint(precopy_throttle_ns(s, 0, 1), <=,
                    10 * NANOSECONDS_PER_SECOND);
    job_free(s);
}

/* While the job is paused nobody waits for it; then what was right is again */
static void test_standing(void)
{
    PrecopyJob *s = job_new(PRECOPY_OUTPACED_WRITE_BLOCKING);

    s->converge.rate = 20 * MiB;
    precopy_converge_stand(s, true);
    precopy_converge_stand(s, false);
    g_assert_false(s->track->write_through);
    guest_writes(s, 6 * MiB);
    g_assert_true(s->track->write_through);
    precopy_converge_stand(s, true);
    g_assert_false(s->track->write_through);
    g_assert_true(s->converge.outpaced);
    precopy_converge_stand(s, false);
    g_assert_true(s->track->write_through);
    job_free(s);

    s = job_new(PRECOPY_OUTPACED_THROTTLE);
    s->converge.rate = 1 * MiB;
    guest_writes(s, 4 * MiB);
    g_assert_cmpint(precopy_throttle_ns(s, 0, DISK), >, 0);
    precopy_converge_stand(s, true);
    g_assert_cmpint(precopy_throttle_ns(s, 0, DISK), ==, 0);
    precopy_converge_stand(s, false);
    g_assert_cmpint(precopy_throttle_ns(s, 0, DISK), >, 0);
    job_free(s);
}

static void test_continue(void)
{
    PrecopyJob *s = job_new(PRECOPY_OUTPACED_CONTINUE);

    s->converge.rate = 1 * MiB;
    guest_writes(s, 4 * MiB);
    g_assert_true(s->converge.outpaced);
    g_assert_false(s->track->write_through);
    g_assert_cmpint(precopy_throttle_ns(s, 0, DISK), ==, 0);
    job_free(s);
}

/* Slower than the link, and yet no less is left */
static void test_stalled(void)
{
    PrecopyJob *s = job_new(PRECOPY_OUTPACED_WRITE_BLOCKING);

    s->converge.rate = 20 * MiB;
    precopy_track_mark(s->track, 0, 20 * MiB);
    /* It becomes less, slowly */
    for (int i = 0; i < 10; i++) {
        PrecopySweep some = { };
        PrecopyOp op;

        precopy_converge_next(s);
        now_ms += 4000;
        precopy_track_pick(s->track, &some, 2 * MiB, now_ms, &op);
        precopy_track_end_op(s->track, &op);
        g_assert_false(s->converge.outpaced);
        if (precopy_track_left(s->track) <= 10 * MiB) {
            break;
        }
    }
    /* Patience: 3 s, and twice what is left takes */
    precopy_converge_next(s);
    now_ms += 3900;
    precopy_converge_next(s);
    g_assert_false(s->converge.outpaced);
    now_ms += 200;
    precopy_converge_next(s);
    g_assert_true(s->converge.outpaced);
    job_free(s);
}

static PrecopyJob *outpaced_job(void)
{
    PrecopyJob *s = job_new(PRECOPY_OUTPACED_WRITE_BLOCKING);

    s->converge.rate = 20 * MiB;
    guest_writes(s, 6 * MiB);
    g_assert_true(s->converge.outpaced);
    return s;
}

static void test_release(void)
{
    PrecopyJob *s = outpaced_job();

    now_ms += 60000;
    s->converge.guest_rate = 0;
    /* Not before it is in time, */
    precopy_converge_next(s);
    g_assert_true(s->converge.outpaced);
    /* and not while it still writes a lot, or the job is to end */
    send_all(s);
    s->converge.guest_rate = 10 * MiB;
    precopy_converge_next(s);
    g_assert_true(s->converge.outpaced);
    s->converge.guest_rate = 0;
    s->should_complete = true;
    precopy_converge_next(s);
    g_assert_true(s->converge.outpaced);
    s->should_complete = false;
    precopy_converge_next(s);
    g_assert_false(s->converge.outpaced);
    g_assert_false(s->track->write_through);
    job_free(s);
}

/* Single sectors count as the blocks that they make dirty */
static void test_release_blocks(void)
{
    PrecopyJob *s = outpaced_job();

    now_ms += 60000;
    for (int i = 0; i < 8; i++) {
        for (int b = 0; b < 1000; b++) {
            precopy_track_wrote(s->track, b * GRAN, 512, now_ms);
        }
        send_all(s);
        pass(s, 250, 0, 0, 0);
    }
    precopy_converge_next(s);
    g_assert_true(s->converge.outpaced);
    job_free(s);
}

/* Fast again as soon as it is let go: it is held for ever longer */
static void test_hold(void)
{
    PrecopyJob *s = outpaced_job();

    for (int64_t hold = 1000; hold <= 64000; hold *= 2) {
        send_all(s);
        s->converge.guest_rate = s->converge.dirty_rate = 0;
        now_ms += MIN(hold, 60000) - 10;
        precopy_converge_next(s);
        g_assert_true(s->converge.outpaced);
        now_ms += 10;
        precopy_converge_next(s);
        g_assert_false(s->converge.outpaced);
        pass(s, 250, 0, 0, 0);
        guest_writes(s, 6 * MiB);
        g_assert_true(s->converge.outpaced);
    }
    /* It was good for long enough */
    send_all(s);
    now_ms += 60000;
    s->converge.guest_rate = s->converge.dirty_rate = 0;
    precopy_converge_next(s);
    now_ms += 3600000;
    pass(s, 250, 0, 0, 0);
    guest_writes(s, 6 * MiB);
    g_assert_true(s->converge.outpaced);
    g_assert_cmpint(s->converge.hold, ==, 1000);
    job_free(s);
}

/* The user has asked for the end: it must come about, and soon */
static void test_end(void)
{
    PrecopyJob *s = job_new(PRECOPY_OUTPACED_WRITE_BLOCKING);

    s->converge.rate = 20 * MiB;
    pass(s, 60000, 0, 0, 0);
    guest_writes(s, 3 * MiB);
    g_assert_false(s->converge.outpaced);
    s->should_complete = true;
    pass(s, 250, 0, 0, 0);
    g_assert_true(s->converge.outpaced);
    job_free(s);
}

/* So much is left */
static void leave(PrecopyJob *s, uint64_t bytes)
{
    send_all(s);
    precopy_track_mark(s->track, 0, bytes);
}

static void assert_most_rest(PrecopyJob *s, uint64_t bytes)
{
    leave(s, bytes + GRAN);
    g_assert_false(precopy_is_close(s));
    leave(s, bytes);
    g_assert_true(precopy_is_close(s));
}

/* It becomes less and less likely that less will be left */
static void test_close(void)
{
    PrecopyJob *s = job_new(PRECOPY_OUTPACED_CONTINUE);

    s->converge.rate = 20 * MiB;
    s->should_complete = true;
    leave(s, 2 * MiB + GRAN);
    g_assert_false(precopy_is_closing(s));
    precopy_converge_next(s);
    g_assert_cmpint(s->converge.closing_since, ==, 0);
    now_ms += 1000;
    leave(s, 2 * MiB);
    g_assert_true(precopy_is_closing(s));
    g_assert_true(precopy_converge_next(s));
    /* 5 ms, then an eighth of what was spent, then all of the limit */
    assert_most_rest(s, 100 * KiB);
    now_ms += 80;
    assert_most_rest(s, 204 * KiB);
    now_ms += 719;
    assert_most_rest(s, 506 * GRAN);
    g_assert_false(precopy_is_late(s));
    now_ms += 1;
    assert_most_rest(s, 2 * MiB);
    g_assert_true(precopy_is_late(s));
    now_ms += 3600000;
    assert_most_rest(s, 2 * MiB);
    job_free(s);

    /* On a link that carries next to nothing, or within a short limit */
    s = job_new(PRECOPY_OUTPACED_CONTINUE);
    s->should_complete = true;
    precopy_converge_next(s);
    assert_most_rest(s, 64 * KiB);
    s->converge.rate = 1000;
    assert_most_rest(s, 64 * KiB);
    s->converge.rate = 1000 * MiB;
    s->downtime_limit = 4;
    assert_most_rest(s, 4 * MiB);
    job_free(s);
}

/* ------------------------------------------------------------------ */
/* The next sweep                                                      */

static void test_horizon(void)
{
    PrecopyJob *s = job_new(PRECOPY_OUTPACED_CONTINUE);
    PrecopySweep *sweep = &s->converge.sweep;
    int64_t last;

    g_assert_cmpint(sweep->horizon, ==, 30000);
    precopy_track_mark(s->track, 0, 40 * MiB);
    s->converge.rate = 20 * MiB;
    sweep->nb_picked = sweep->nb_deferred = 1;
    sweep->cursor = 77;
    g_assert_true(precopy_converge_next(s));
    g_assert_cmpint(s->converge.rounds, ==, 1);
    g_assert_cmpint(sweep->cursor, ==, 0);
    g_assert_cmpint(sweep->nb_picked, ==, 0);
    g_assert_cmpint(sweep->nb_deferred, ==, 0);
    /* What is left takes 2 s */
    g_assert_cmpint(sweep->horizon, ==, 2000);
    g_assert_false(sweep->free_too);
    /* Nothing is picked: what is free goes, too, then what waits */
    g_assert_true(precopy_converge_next(s));
    g_assert_true(sweep->free_too);
    g_assert_cmpint(sweep->horizon, ==, 2000);
    do {
        last = sweep->horizon;
        g_assert_true(precopy_converge_next(s));
        g_assert_cmpint(sweep->horizon, <=, last / 2);
    } while (sweep->horizon);
    g_assert_cmpint(s->converge.rounds, ==, 1);
    g_assert_false(precopy_track_is_starved(s->track));
    /* Nothing waits, and yet nothing is picked: all is busy */
    for (int i = 0; i < 3; i++) {
        g_assert_false(precopy_converge_next(s));
        g_assert_true(precopy_track_is_starved(s->track));
    }
    sweep->nb_picked = 1;
    g_assert_true(precopy_converge_next(s));
    g_assert_false(precopy_track_is_starved(s->track));
    job_free(s);
}

/* Not at the beginning, and that is no round */
static void test_begin(void)
{
    PrecopyJob *s = job_new(PRECOPY_OUTPACED_CONTINUE);
    PrecopySweep *sweep = &s->converge.sweep;

    precopy_track_mark(s->track, 16 * MiB, 32 * MiB);
    precopy_converge_start(s);
    g_assert_cmpint(sweep->cursor, ==, 28 * MiB / GRAN);
    sweep->nb_picked = 1;
    g_assert_true(precopy_converge_next(s));
    g_assert_cmpint(s->converge.rounds, ==, 0);
    g_assert_cmpint(sweep->cursor, ==, 0);
    sweep->nb_picked = 1;
    precopy_converge_next(s);
    g_assert_cmpint(s->converge.rounds, ==, 1);
    job_free(s);
}

static void test_idle(void)
{
    PrecopyJob *s = job_new(PRECOPY_OUTPACED_CONTINUE);

    s->converge.rate = 20 * MiB;
    precopy_track_mark(s->track, 0, 512 * KiB);
    /* In time: what has been quiet is sent, when there is something */
    g_assert_false(precopy_converge_next(s));
    g_assert_cmpint(s->converge.sweep.horizon, ==, 5000);
    s->converge.sweep.nb_picked = 1;
    g_assert_true(precopy_converge_next(s));
    job_free(s);
}

/* The end is near: nothing waits, as little as is left */
static void test_closing(void)
{
    PrecopyJob *s = job_new(PRECOPY_OUTPACED_CONTINUE);

    s->converge.rate = 20 * MiB;
    leave(s, 512 * KiB);
    g_assert_false(precopy_converge_next(s));
    g_assert_cmpint(s->converge.sweep.horizon, ==, 5000);
    s->should_complete = true;
    g_assert_true(precopy_converge_next(s));
    g_assert_cmpint(s->converge.sweep.horizon, ==, 0);
    g_assert_true(s->converge.sweep.free_too);
    g_assert_false(precopy_track_is_starved(s->track));
    /* Nothing was picked, yet something is left */
    g_assert_false(precopy_converge_next(s));
    g_assert_true(precopy_track_is_starved(s->track));
    send_all(s);
    g_assert_true(precopy_converge_next(s));
    g_assert_false(precopy_track_is_starved(s->track));
    /* Too much again: what is busy waits, as it did */
    leave(s, 3 * MiB);
    s->converge.sweep.nb_picked = 1;
    precopy_converge_next(s);
    g_assert_cmpint(s->converge.sweep.horizon, ==, 150);
    job_free(s);
}

/* What the guest may just be discarding is not sent, and not spun upon */
static void test_trim(void)
{
    PrecopyJob *s = job_new(PRECOPY_OUTPACED_CONTINUE);

    s->hints = (PrecopyHintsUser *)s;       /* there are some */
    s->converge.rate = 20 * MiB;
    precopy_track_mark(s->track, 0, 40 * MiB);
    trimming = true;
    for (int i = 0; i < 100; i++) {
        now_ms += 100;
        g_assert_false(precopy_converge_next(s));
        g_assert_false(s->converge.sweep.free_too);
    }
    trimming = false;
    g_assert_true(precopy_converge_next(s));
    g_assert_true(s->converge.sweep.free_too);
    job_free(s);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    qemu_mutex_init(&job_mutex);
    g_test_add_func("/precopy-pace/rate", test_rate);
    g_test_add_func("/precopy-pace/rate-zeroes", test_rate_zeroes);
    g_test_add_func("/precopy-pace/rate-through", test_rate_through);
    g_test_add_func("/precopy-pace/window", test_window);
    g_test_add_func("/precopy-pace/bound", test_bound);
    g_test_add_func("/precopy-pace/faster", test_faster);
    g_test_add_func("/precopy-pace/burst", test_burst);
    g_test_add_func("/precopy-pace/throttle", test_throttle);
    g_test_add_func("/precopy-pace/throttle-unknown", test_throttle_unknown);
    g_test_add_func("/precopy-pace/standing", test_standing);
    g_test_add_func("/precopy-pace/continue", test_continue);
    g_test_add_func("/precopy-pace/stalled", test_stalled);
    g_test_add_func("/precopy-pace/release", test_release);
    g_test_add_func("/precopy-pace/release-blocks", test_release_blocks);
    g_test_add_func("/precopy-pace/hold", test_hold);
    g_test_add_func("/precopy-pace/end", test_end);
    g_test_add_func("/precopy-pace/close", test_close);
    g_test_add_func("/precopy-pace/begin", test_begin);
    g_test_add_func("/precopy-pace/horizon", test_horizon);
    g_test_add_func("/precopy-pace/idle", test_idle);
    g_test_add_func("/precopy-pace/closing", test_closing);
    g_test_add_func("/precopy-pace/trim", test_trim);
    return g_test_run();
}
