/*
 * blockdev-precopy in simulated time
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See thinvm-precopy-sim.h.  This stands in for the job (block/precopy/job.c,
 * copy.c): it asks for the next run, and time passes as long as that takes on
 * the link, with what the guest does meanwhile.
 */
#include "qemu/osdep.h"
#include "qemu/job.h"
#include "qapi/error.h"
#include "../../block/precopy/hint-map.h"
#include "../../block/precopy/precopy.h"
#include "thinvm-precopy-sim.h"

#define MIRROR_GRANULARITY  65536
#define MAX_HINTS           65536
#define IDLE_US             100000
#define REQUEST_US          20      /* beside its bytes */

const char *const sim_policy_names[SIM_POLICIES] = {
    [SIM_MIRROR] = "mirror", [SIM_BLOCKING] = "blocking",
    [SIM_EAGER] = "eager",
    [SIM_HISTORY] = "history", [SIM_HINTS] = "precopy",
};

typedef struct Sim {
    SimTrace *trace;
    SimPolicy policy;
    const SimOptions *o;
    SimResult r;
    PrecopyJob *job;
    PrecopyTrack *t;
    PrecopyHintMap *hints;
    SimEvent next;
    int64_t late_us;                    /* the guest, because it had to wait */
} Sim;

static int64_t sim_now_us;

/* It guards the speed that a user has set */
QemuMutex job_mutex;

/* ------------------------------------------------------------------ */
/* What converge.c asks of the job                                     */

int64_t precopy_clock_ms(void)
{
    return sim_now_us / 1000;
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
    return false;
}

bool precopy_should_end(PrecopyJob *s)
{
    return false;
}

static void sim_hint(void *opaque, int64_t offset, int64_t now,
                     PrecopyHint *hint)
{
    precopy_hint_map_get(opaque, offset, now, hint);
}

static void sim_hint_written(void *opaque, int64_t offset, int64_t bytes,
                             int64_t now)
{
    precopy_hint_map_set(opaque, offset, bytes, PRECOPY_HINT_NONE, 0, now);
}

/* ------------------------------------------------------------------ */
/* The guest                                                           */

static int64_t sim_link_us(const Sim *s, int64_t bytes)
{
    return bytes * 1000000.0 / s->o->rate + REQUEST_US;
}

/*
 * Returns how long the link is busy with it.  A guest that waits for the link
 * has half of it, and is late by as much from then on.
 */
static int64_t sim_write(Sim *s, const SimEvent *e)
{
    int64_t offset = e->offset, bytes = e->bytes, us;

    if (!s->t->write_through) {
        precopy_track_wrote(s->t, offset, bytes, precopy_clock_ms());
        return 0;
    }
    precopy_track_wrote_both(s->t, offset, bytes, precopy_clock_ms());
    if (!precopy_track_clean_part(s->t, &offset, &bytes)) {
        return 0;
    }
    precopy_track_sent(s->t, offset, bytes, true);
    us = sim_link_us(s, bytes);
    s->late_us += 2 * us;
    return us;
}

static int64_t sim_event(Sim *s)
{
    SimEvent e = s->next;
    int64_t us = 0;

    switch (e.kind) {
    case SIM_USED:
        precopy_track_mark(s->t, e.offset, e.bytes);
        break;
    case SIM_WRITE:
        us = sim_write(s, &e);
        break;
    case SIM_DISCARD:
        /* Sent as zeroes: no payload */
        precopy_track_discarded(s->t, e.offset, e.bytes);
        break;
    case SIM_DIRTY:
        if (s->policy == SIM_HINTS) {
            precopy_hint_map_set(s->hints, e.offset, e.bytes,
                                 PRECOPY_HINT_DIRTY, (e.due_us + s->late_us) / 1000,
                                 precopy_clock_ms());
        }
        break;
    default:
        g_assert_not_reached();
    }
    s->trace->next(s->trace, &s->next);
    return us;
}

/* Time passes; what the guest sends makes it longer if @busy */
static void sim_pass(Sim *s, int64_t us, bool busy)
{
    int64_t end = sim_now_us + us;

    while (s->next.kind != SIM_END && s->next.us + s->late_us <= end) {
        int64_t more;

        sim_now_us = MAX(sim_now_us, s->next.us + s->late_us);
        more = sim_event(s);
        end += busy ? more : 0;
    }
    sim_now_us = end;
}

/* ------------------------------------------------------------------ */
/* The job                                                             */

static void sim_send(Sim *s, PrecopyOp *op)
{
    int64_t bytes = precopy_op_bytes(s->t, op);
    int64_t before = sim_now_us;

    s->job->bytes_in_flight = bytes;
    sim_pass(s, sim_link_us(s, bytes), true);
    s->job->busy_ns += (sim_now_us - before) * 1000;
    s->job->bytes_in_flight = 0;
    precopy_track_sent(s->t, precopy_op_offset(s->t, op), bytes, false);
    precopy_track_end_op(s->t, op);
}

/* Returns whether the job is ready now */
static bool sim_sweep_end(Sim *s)
{
    bool again = precopy_converge_next(s->job);
    uint64_t left = precopy_left(s->job);

    if (s->policy <= SIM_EAGER) {
        s->job->converge.sweep.horizon = 0;
        s->job->converge.sweep.free_too = true;
    }
    if (left <= (s->policy <= SIM_BLOCKING ? 0 : precopy_bound(s->job))) {
        return true;
    }
    if (!again) {
        sim_pass(s, IDLE_US, false);
    }
    return false;
}

/* At the end of a sweep: is the job over? */
static bool sim_is_over(Sim *s)
{
    bool good = sim_sweep_end(s);

    if (good && s->r.ready_us < 0) {
        s->r.ready_us = sim_now_us;
    }
    if (good && sim_now_us >= s->r.ready_us + s->o->hold_us) {
        return true;
    }
    if (s->r.ready_us >= 0) {
        sim_pass(s, IDLE_US / 10, false);
    }
    return false;
}

static void sim_work(Sim *s)
{
    while (sim_now_us < s->o->give_up_us) {
        PrecopyOp op;

        precopy_converge_measure(s->job);
        switch (precopy_track_pick(s->t, &s->job->converge.sweep,
                                   precopy_converge_bytes(s->job),
                                   precopy_clock_ms(), &op)) {
        case PRECOPY_PICK_RUN:
            sim_send(s, &op);
            break;
        case PRECOPY_PICK_MORE:
            break;
        case PRECOPY_PICK_END:
            if (sim_is_over(s)) {
                return;
            }
            break;
        default:
            g_assert_not_reached();
        }
    }
}

static void sim_begin(Sim *s)
{
    int64_t gran = precopy_default_granularity(s->trace->disk);

    sim_now_us = 0;
    s->t = precopy_track_new(s->trace->disk, s->policy <= SIM_BLOCKING ?
                             MAX(gran, MIRROR_GRANULARITY) : gran);
    g_assert_nonnull(s->t);
    s->hints = precopy_hint_map_new(MAX_HINTS);
    s->t->hint = sim_hint;
    s->t->hint_written = sim_hint_written;
    s->t->hint_opaque = s->hints;
    s->job = g_new0(PrecopyJob, 1);
    s->job->track = s->t;
    s->job->downtime_limit = s->o->downtime_ms;
    s->job->ready_after = -1;
    s->t->write_through = s->policy == SIM_BLOCKING;
    s->job->when_outpaced = s->o->write_blocking &&
        s->policy > SIM_BLOCKING ?
        PRECOPY_OUTPACED_WRITE_BLOCKING : PRECOPY_OUTPACED_CONTINUE;
    s->trace->next(s->trace, &s->next);
    while (s->next.kind == SIM_USED) {
        sim_event(s);
    }
    s->r.used = precopy_track_left(s->t);
    s->r.ready_us = -1;
    precopy_converge_start(s->job);
    if (s->policy <= SIM_EAGER) {
        s->job->converge.sweep.horizon = 0;
        s->job->converge.sweep.free_too = true;
    }
    if (s->policy <= SIM_BLOCKING) {
        s->job->converge.sweep.cursor = 0;
    }
}

SimResult sim_run(SimTrace *trace, SimPolicy policy, const SimOptions *o)
{
    Sim s = {
        .trace = trace,
        .policy = policy,
        .o = o,
    };
    PrecopyCounters n;
    uint64_t left;

    qemu_mutex_init(&job_mutex);
    sim_begin(&s);
    sim_work(&s);
    left = precopy_left(s.job);
    n = precopy_track_counters(s.t);
    s.r.sent = n.sent + left;
    s.r.resent = n.resent;
    s.r.written_through = n.written_through;
    s.r.spared_history = n.spared_history;
    s.r.spared_hints = n.spared_hints;
    s.r.guest = sim_now_us ? 1 - (double)s.late_us / sim_now_us : 1;
    s.r.pause_us = sim_link_us(&s, left);
    precopy_track_free(s.t);
    precopy_hint_map_free(s.hints);
    g_free(s.job);
    qemu_mutex_destroy(&job_mutex);
    trace->free(trace);
    return s.r;
}
