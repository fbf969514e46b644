/*
 * blockdev-precopy: what is swept next, and when it is enough
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The disk is swept again and again.  The horizon of a sweep is the time that
 * what is left takes on the link: what will be written within that time is
 * better sent later.  As less is left, the horizon comes nearer and more is
 * sent; a sweep that finds nothing to send halves it, down to zero, at which
 * nothing waits.
 *
 *   left    dirty bytes and bytes in flight
 *   bound   what the link carries within the downtime limit
 *
 * The job is ready, and stays so, when what is left is within the bound: then
 * the guest may be stopped for as long as the rest takes.  If that does not
 * come about, the guest is faster than the link, and what the user asked for
 * in that case happens until it is in time again and writes less.  A guest
 * that is seen to make blocks dirty as fast as the link cleans them is not
 * waited for, unless the job is ready and it may be a burst; else it counts as
 * no progress that the least so far has stood for a while.  While the job is
 * paused, nobody waits for it.
 *
 * The bound is what the guest may have to wait for, not what it ought to.  When
 * the user has asked for the end, all that is dirty is swept without pause while
 * the guest goes on: each sweep takes less time than the one before, so the
 * guest makes less dirty meanwhile.  Its requests are held when what is left is
 * a matter of milliseconds, or when this has taken so long that no more can be
 * expected of it.
 */

#include "qemu/osdep.h"
#include "qemu/host-utils.h"
#include "precopy.h"
#include "trace.h"

#define PRECOPY_MEASURE_MS      250
#define PRECOPY_LEAST_BOUND     (1024 * 1024)
#define PRECOPY_MOST_BOUND      (1LL << 62)
/* Before the rate is known: as long as Linux keeps pages dirty */
#define PRECOPY_FIRST_HORIZON   30000
#define PRECOPY_LEAST_HORIZON   50
#define PRECOPY_MOST_HORIZON    3600000
/* Of what there is to copy, in front of where the first sweep begins */
#define PRECOPY_BEGIN_EIGHTHS   3
/* Once ready: what has been quiet for so long is sent */
#define PRECOPY_READY_HORIZON   5000
#define PRECOPY_PATIENCE_MS     3000
/* How long a guest that was too fast is held at least */
#define PRECOPY_LEAST_HOLD      1000
#define PRECOPY_MOST_HOLD       60000
/*
 * The guest's requests are held for so long (ms), or for a part of the time that
 * has been spent to make it less, if so much was left
 */
#define PRECOPY_LEAST_HALT      5
#define PRECOPY_HALT_PART       8
#define PRECOPY_LEAST_REST      (64 * 1024)
/* In flight before the rate is known */
#define PRECOPY_FIRST_WINDOW    (2 * 1024 * 1024)

void precopy_converge_start(PrecopyJob *s)
{
    PrecopyConverge *c = &s->converge;

    c->horizon_cap = PRECOPY_MOST_HORIZON;
    c->sweep.horizon = PRECOPY_FIRST_HORIZON;
    c->rate_since = c->link_since = c->least_since = precopy_clock_ms();
    c->least_left = UINT64_MAX;
    /*
     * Nothing is known yet of what the guest writes, so begin where it writes
     * least as a rule: not at the beginning of the disk, where file systems
     * have much of what they keep account in, nor in the middle, where most
     * have their journals.
     */
    c->sweep.cursor = precopy_track_place(s->track, PRECOPY_BEGIN_EIGHTHS);
    c->partly = c->sweep.cursor > 0;
}

/* ------------------------------------------------------------------ */
/* Measuring                                                           */

static void precopy_check_faster(PrecopyJob *s);

static uint64_t precopy_smooth(uint64_t mean, uint64_t sample)
{
    return mean ? (3 * mean + sample) / 4 : sample;
}

/*
 * What the link carries, if it has been busy for long enough to tell.  It is
 * known how long copies took, not so what the guest writes through beside and
 * between them.  So there are two rates, neither of which is too high: that of
 * the copies while there are some, and that of all over the whole time; the
 * latter is the better one when both share the link.
 */
static void precopy_measure_link(PrecopyJob *s, const PrecopyCounters *n,
                                 int64_t now)
{
    PrecopyConverge *c = &s->converge;
    int64_t busy = precopy_busy_ns(s);
    uint64_t through = n->written_through - c->rate_through;
    uint64_t copied = n->sent - c->rate_sent - through;
    uint64_t zeroed = n->zeroed - c->rate_zeroed;

    if (busy < PRECOPY_MEASURE_MS * SCALE_MS / 2 || !(copied || zeroed)) {
        return;
    }
    /* Time that went into zeroes says nothing of payload */
    if (zeroed <= copied) {
        uint64_t rate = copied * (double)NANOSECONDS_PER_SECOND / busy;

        c->rate = precopy_smooth(c->rate, MAX(rate, (copied + through) * 1000 /
                                                    (now - c->link_since)));
    }
    c->rate_sent = n->sent;
    c->rate_through = n->written_through;
    c->rate_zeroed = n->zeroed;
    c->link_since = now;
    s->busy_ns -= busy;             /* what is in flight begins anew */
}

void precopy_converge_measure(PrecopyJob *s)
{
    PrecopyConverge *c = &s->converge;
    int64_t now = precopy_clock_ms();
    PrecopyCounters n;

    if (now - c->rate_since < PRECOPY_MEASURE_MS) {
        return;
    }
    n = precopy_track_counters(s->track);
    c->dirty_rate = precopy_smooth(c->dirty_rate,
                                   (n.newly_dirty - c->rate_dirtied) * 1000 /
                                   (now - c->rate_since));
    c->guest_rate = precopy_smooth(c->guest_rate,
                                   (n.guest_touched - c->rate_guest) * 1000 /
                                   (now - c->rate_since));
    c->rate_dirtied = n.newly_dirty;
    c->rate_guest = n.guest_touched;
    c->rate_since = now;
    precopy_measure_link(s, &n, now);
    precopy_check_faster(s);
}

/* What may be counted on */
static uint64_t precopy_rate(PrecopyJob *s)
{
    uint64_t rate = s->converge.rate;
    int64_t speed;

    WITH_JOB_LOCK_GUARD() {
        speed = s->common.speed;
    }
    return speed && (!rate || rate > speed) ? speed : rate;
}

uint64_t precopy_bound(PrecopyJob *s)
{
    /* The limit is a minute at most, the rate whatever a user wants */
    return MAX(MIN(precopy_rate(s) / 1000.0 * s->downtime_limit,
                   PRECOPY_MOST_BOUND), PRECOPY_LEAST_BOUND);
}

bool precopy_is_closing(PrecopyJob *s)
{
    return precopy_should_end(s) && precopy_left(s) <= precopy_bound(s);
}

/* For how long the guest's requests may be held, in ms */
static int64_t precopy_halt(PrecopyJob *s)
{
    int64_t since = s->converge.closing_since;
    int64_t spent = since ? precopy_clock_ms() - since : 0;

    return MIN(MAX(spent / PRECOPY_HALT_PART, PRECOPY_LEAST_HALT),
               s->downtime_limit);
}

bool precopy_is_late(PrecopyJob *s)
{
    return precopy_halt(s) == s->downtime_limit;
}

bool precopy_is_close(PrecopyJob *s)
{
    uint64_t bound = precopy_bound(s);
    double rest = precopy_rate(s) / 1000.0 * precopy_halt(s);

    return precopy_left(s) <= (precopy_is_late(s) ? bound :
                               MIN(MAX(rest, PRECOPY_LEAST_REST), bound));
}

/*
 * What has been put into the link cannot be taken back: who cancels the job
 * waits for it, and so does a write that goes through.  As much as the link
 * carries in half a second (a quarter while writes go through) keeps a long
 * one full, too.
 */
int64_t precopy_converge_window(PrecopyJob *s)
{
    uint64_t rate = s->converge.rate;

    return rate ? MAX(rate / (s->converge.outpaced ? 4 : 2),
                      2 * precopy_converge_bytes(s))
                : PRECOPY_FIRST_WINDOW;
}

/* Several of them make a window */
int64_t precopy_converge_bytes(PrecopyJob *s)
{
    uint64_t rate = precopy_rate(s);
    uint64_t bytes = rate ? pow2floor(rate / 8) : PRECOPY_FIRST_WINDOW / 8;

    return MIN(MAX(bytes, PRECOPY_MIN_BYTES), PRECOPY_MAX_BYTES);
}

static int64_t precopy_time_for(PrecopyJob *s, uint64_t bytes)
{
    uint64_t rate = precopy_rate(s);

    return rate ? MIN(bytes * 1000.0 / rate, PRECOPY_MOST_HORIZON)
                : PRECOPY_FIRST_HORIZON;
}

/* ------------------------------------------------------------------ */
/* A guest that is faster than the link                                */

/* One that is too fast again and again is held for longer each time */
static void precopy_choose_hold(PrecopyConverge *c, bool on)
{
    int64_t now = precopy_clock_ms();

    if (on) {
        c->hold = c->hold && now - c->pace_since < 8 * c->hold
            ? MIN(2 * c->hold, PRECOPY_MOST_HOLD) : PRECOPY_LEAST_HOLD;
    }
    c->pace_since = now;
}

/* What a guest owes at the pace so far is forgotten */
static void precopy_set_throttle(PrecopyJob *s, uint64_t speed)
{
    ratelimit_set_speed(&s->throttle, speed, BLOCK_JOB_SLICE_TIME);
    WITH_QEMU_LOCK_GUARD(&s->throttle.lock) {
        s->throttle.slice_end_time = 0;
    }
}

/* A guest does not wait for a job that stands still */
static void precopy_apply_pace(PrecopyJob *s)
{
    bool on = s->converge.outpaced && !s->converge.standing;
    uint64_t rate = precopy_rate(s) ?: PRECOPY_LEAST_BOUND;

    switch (s->when_outpaced) {
    case PRECOPY_OUTPACED_WRITE_BLOCKING:
        precopy_track_set_write_through(s->track, on);
        break;
    case PRECOPY_OUTPACED_THROTTLE:
        /* Half of the link, then the other half reduces what is left */
        precopy_set_throttle(s, on ? MAX(rate / 2, 1) : 0);
        break;
    case PRECOPY_OUTPACED_CONTINUE:
        break;
    default:
        g_assert_not_reached();
    }
}

static void precopy_set_outpaced(PrecopyJob *s, bool on)
{
    precopy_choose_hold(&s->converge, on);
    s->converge.outpaced = on;
    precopy_apply_pace(s);
}

void precopy_converge_stand(PrecopyJob *s, bool standing)
{
    s->converge.standing = standing;
    precopy_apply_pace(s);
}

/* How long a guest's write is held back: what counts is what it made dirty */
int64_t precopy_throttle_ns(PrecopyJob *s, int64_t offset, int64_t bytes)
{
    int64_t gran = s->track->granularity;
    int64_t begin = QEMU_ALIGN_DOWN(offset, gran);

    return ratelimit_calculate_delay(&s->throttle, ROUND_UP(offset + bytes,
                                                            gran) - begin);
}

static bool precopy_stalled(PrecopyJob *s, uint64_t left)
{
    PrecopyConverge *c = &s->converge;
    int64_t now = precopy_clock_ms();

    if (left < c->least_left - c->least_left / 10) {
        c->least_left = left;
        c->least_since = now;
        return false;
    }
    return now - c->least_since >
           PRECOPY_PATIENCE_MS + 2 * precopy_time_for(s, left);
}

static bool precopy_is_faster(PrecopyJob *s)
{
    uint64_t rate = precopy_rate(s);

    return rate && s->converge.dirty_rate > rate / 10 * 9;
}

/*
 * What a guest's page cache has gathered for half a minute is let out at once,
 * and sent within seconds.  If the job is ready, nobody waits for that; if the
 * guest waited for the link meanwhile, so would whatever it writes beside.
 */
static bool precopy_may_be_burst(PrecopyJob *s)
{
    return s->ready_after >= 0 &&
           precopy_clock_ms() - MAX(s->converge.within_at,
                                    s->started + s->ready_after) <
           PRECOPY_PATIENCE_MS;
}

/* Not to be waited for: a sweep may take hours, and the user may too */
static void precopy_check_faster(PrecopyJob *s)
{
    PrecopyConverge *c = &s->converge;
    uint64_t left = precopy_left(s);

    if (left <= precopy_bound(s)) {
        c->within_at = precopy_clock_ms();
    } else if (!c->outpaced &&
               (precopy_should_end(s) ||
                (precopy_is_faster(s) && !precopy_may_be_burst(s)))) {
        trace_precopy_outpaced(s, left, c->dirty_rate, c->rate);
        precopy_set_outpaced(s, true);
    }
}

/*
 * Whether it may go on as it likes.  One that still writes a lot would be too
 * fast again at once, and so might be one that writes little since it waits.
 */
static bool precopy_may_release(PrecopyJob *s)
{
    PrecopyConverge *c = &s->converge;

    return c->outpaced && c->guest_rate < precopy_rate(s) / 4 &&
           precopy_clock_ms() - c->pace_since >= c->hold &&
           !precopy_should_end(s);
}

/* At the end of a sweep */
static void precopy_check_pace(PrecopyJob *s, uint64_t left, uint64_t bound)
{
    PrecopyConverge *c = &s->converge;
    bool stalled = precopy_stalled(s, left);

    if (left <= bound / 2) {
        c->least_left = UINT64_MAX;
        c->least_since = precopy_clock_ms();
        if (precopy_may_release(s)) {
            trace_precopy_in_time(s, left);
            precopy_set_outpaced(s, false);
        }
    } else if (left > bound && !c->outpaced && stalled) {
        trace_precopy_outpaced(s, left, c->dirty_rate, c->rate);
        precopy_set_outpaced(s, true);
    }
}

/* ------------------------------------------------------------------ */
/* The next sweep                                                      */

/* What the guest may just be discarding is not sent meanwhile */
static bool precopy_awaits_trim(PrecopyJob *s)
{
    return s->hints && precopy_hints_trimming(s->hints);
}

static void precopy_next_horizon(PrecopyJob *s, bool idle, uint64_t left)
{
    PrecopyConverge *c = &s->converge;
    PrecopySweep *sweep = &c->sweep;

    if (sweep->nb_picked) {
        c->horizon_cap = MIN(c->horizon_cap * 2, PRECOPY_MOST_HORIZON);
    } else if (!sweep->free_too) {
        sweep->free_too = !precopy_awaits_trim(s);
    } else {
        c->horizon_cap = sweep->horizon / 2;
    }
    c->horizon_cap = MAX(c->horizon_cap, PRECOPY_LEAST_HORIZON / 2);
    if (idle) {
        sweep->horizon = PRECOPY_READY_HORIZON;
    } else {
        sweep->horizon = MIN(precopy_time_for(s, left), c->horizon_cap);
        if (sweep->horizon < PRECOPY_LEAST_HORIZON) {
            sweep->horizon = 0;
        }
    }
}

/* Nothing waits any longer, as in the last phase */
static void precopy_close(PrecopyJob *s, uint64_t left)
{
    PrecopyConverge *c = &s->converge;

    if (!c->closing_since) {
        trace_precopy_closing(s, left);
        c->closing_since = precopy_clock_ms();
    }
    c->sweep.horizon = 0;
    c->sweep.free_too = true;
}

/*
 * Called at the end of a sweep, which need not have been sent in full.
 * Returns whether there is reason to sweep again at once.
 */
bool precopy_converge_next(PrecopyJob *s)
{
    PrecopyConverge *c = &s->converge;
    uint64_t left = precopy_left(s);
    uint64_t bound = precopy_bound(s);
    bool closing = precopy_is_closing(s);
    bool idle = !closing && left <= bound / 2;
    bool picked = c->sweep.nb_picked;
    /* It would have taken everything: what is left is busy */
    bool starved = !picked && !idle && left &&
                   !c->sweep.horizon && c->sweep.free_too;

    precopy_track_set_starved(s->track, starved);
    c->rounds += picked && !c->partly;
    c->partly = false;
    precopy_check_pace(s, left, bound);
    if (closing) {
        precopy_close(s, left);
    } else {
        precopy_next_horizon(s, idle, left);
    }
    trace_precopy_sweep(s, c->rounds, c->sweep.horizon, left, bound);
    c->sweep.cursor = 0;
    c->sweep.nb_picked = 0;
    c->sweep.nb_deferred = 0;
    return picked || (!idle && !starved &&
                      (c->sweep.free_too || !precopy_awaits_trim(s)));
}
