/*
 * thinvm driver layer: background work of an open image
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * One coroutine for each node, in the node's AioContext, that exists only
 * while there is something to do.  It is woken
 *  - by a timer that the first operation after a commit starts, so that no
 *    operation waits longer than the flush interval (invariant 5) and an
 *    idle node costs nothing;
 *  - by the store, when a checkpoint, a reclaim or metadata space is due, or
 *    a record is full;
 *  - after a take-over, to finish deletions of snapshots.
 *
 * Drain: the coroutine counts as a request in flight, works in bounded steps,
 * looks between them whether the node is to be quiet, and then ends.  What was
 * left undone is remembered and taken up when the drained section ends.
 *
 * A check, which must see one state, stops it in the same way.
 *
 * Threads: "timer", "bh", "running" and "stops" belong to the node's
 * AioContext; the flags are atomic.
 */

#include "qemu/osdep.h"
#include "block/aio.h"
#include "qemu/timer.h"
#include "thinvm.h"
#include "trace.h"

struct ThinvmWorker {
    BDRVThinvmState *s;
    QEMUTimer *timer;
    QEMUBH *bh;
    bool running;
    unsigned stops;     /* of those for whom it is to be quiet */
    /* atomic */
    bool confirm;   /* records may have been written that no flush covers */
    bool armed;     /* the timer runs */
    bool tick;      /* the timer has fired */
    bool kicked;    /* the store wants something */
    bool collect;   /* snapshots may be waiting for their deletion */
    bool collect_again;     /* that failed: with the next tick */
};

/* Steps of a deletion between two looks whether the node is to be quiet */
#define THINVM_COLLECT_STEPS 64

/*
 * The store may go on asking for what cannot be done yet (a reclaim, say,
 * while an old request is still reading).  Then wait for the timer.
 */
#define THINVM_WORKER_ROUNDS 16

/* Asked between the steps of a checkpoint */
static bool thinvm_worker_goes_on(void *opaque)
{
    ThinvmWorker *w = opaque;

    return qatomic_read(&w->s->bs->quiesce_counter) == 0 &&
           qatomic_read(&w->s->owner);
}

static bool thinvm_worker_may_run(ThinvmWorker *w)
{
    return thinvm_worker_goes_on(w) && !w->stops;
}

void thinvm_worker_arm(BDRVThinvmState *s)
{
    ThinvmWorker *w = s->worker;

    if (!qatomic_read(&w->armed) && !qatomic_xchg(&w->armed, true)) {
        qatomic_set(&w->confirm, true);
        timer_mod(w->timer, qemu_clock_get_ms(QEMU_CLOCK_REALTIME) +
                            qatomic_read(&s->options.flush_interval));
    }
}

/*
 * The first tick after an operation writes its record, a later and idle one
 * makes the record durable, so that what it freed can be used again.
 */
static void coroutine_fn GRAPH_RDLOCK thinvm_worker_commit(ThinvmWorker *w)
{
    ThinvmStore *st = w->s->store;
    bool confirm = qatomic_xchg(&w->confirm, false);
    ThinvmStoreStats stats;
    int ret = 0;

    thinvm_store_stats(st, &stats);
    if (stats.pending_operations) {
        ret = thinvm_store_commit(st, THINVM_COMMIT_RECORD, true);
    } else if (confirm) {
        ret = thinvm_store_commit(st, THINVM_COMMIT_DURABLE, true);
    }
    trace_thinvm_worker_commit(w->s->bs, stats.pending_operations, ret);
    if (stats.pending_operations || ret < 0) {
        thinvm_worker_arm(w->s);
    }
}

/*
 * A kick says that much has gathered: operations, freed clusters or dirty
 * pages.  A durable commit is the way out of all three.
 */
static void coroutine_fn GRAPH_RDLOCK thinvm_worker_store(ThinvmWorker *w,
                                                          bool kicked)
{
    ThinvmStore *st = w->s->store;
    int ret = 0;

    if (kicked) {
        ret = thinvm_store_commit(st, THINVM_COMMIT_DURABLE, true);
    }
    if (ret >= 0 && thinvm_store_wants_checkpoint(st)) {
        ret = thinvm_store_checkpoint_while(st, thinvm_worker_goes_on, w);
        if (ret == -ECANCELED) {
            qatomic_set(&w->kicked, true);  /* when the drain is over */
            return;
        }
    }
    if (ret >= 0) {
        thinvm_store_extend_ahead(st);
        ret = thinvm_store_reclaim(st, w->s->bs->open_flags & BDRV_O_UNMAP);
    }
    if (ret < 0) {
        /* Try again with the next tick rather than at once */
        trace_thinvm_worker_error(w->s->bs, ret);
        thinvm_worker_arm(w->s);
    }
}

/* A job that deletes a snapshot does all of it, at the pace it was told */
static bool thinvm_worker_may_collect(ThinvmWorker *w)
{
    return qatomic_read(&w->collect) && !qatomic_read(&w->s->nb_delete_jobs);
}

static void coroutine_fn GRAPH_RDLOCK thinvm_worker_collect(ThinvmWorker *w)
{
    unsigned budget = THINVM_COLLECT_STEPS;
    int ret;

    if (!thinvm_worker_may_collect(w)) {
        return;
    }
    qatomic_set(&w->collect, false);
    ret = thinvm_snapshot_collect(w->s->bs, &budget, NULL);
    if (ret >= 0 && !budget) {
        qatomic_set(&w->collect, true);
    }
    if (ret < 0 && ret != -EBADMSG) {
        qatomic_set(&w->collect_again, true);   /* the device may recover */
    }
    if (ret < 0 || budget < THINVM_COLLECT_STEPS) {
        thinvm_worker_arm(w->s);        /* to commit the steps */
    }
}

static void coroutine_fn thinvm_worker_entry(void *opaque)
{
    ThinvmWorker *w = opaque;
    BlockDriverState *bs = w->s->bs;
    int rounds = 0;

    while (thinvm_worker_may_run(w)) {
        bool tick = qatomic_xchg(&w->tick, false);
        bool kicked = qatomic_xchg(&w->kicked, false);

        if (tick && qatomic_xchg(&w->collect_again, false)) {
            qatomic_set(&w->collect, true);
        }
        if (!tick && !kicked && !thinvm_worker_may_collect(w)) {
            break;
        }
        if ((tick || kicked) && ++rounds > THINVM_WORKER_ROUNDS) {
            thinvm_worker_arm(w->s);
            break;
        }
        bdrv_graph_co_rdlock();
        if (tick) {
            thinvm_volume_tick(w->s);
            thinvm_worker_commit(w);
        }
        bdrv_graph_co_rdunlock();

        if (!thinvm_worker_may_run(w)) {
            qatomic_set(&w->kicked, true);
            break;
        }
        bdrv_graph_co_rdlock();
        if (tick || kicked) {
            thinvm_worker_store(w, kicked);
            thinvm_volume_rearm(w->s);
        }
        thinvm_worker_collect(w);
        bdrv_graph_co_rdunlock();
    }
    w->running = false;
    bdrv_dec_in_flight(bs);
}

static void thinvm_worker_run(ThinvmWorker *w)
{
    BlockDriverState *bs = w->s->bs;

    if (w->running) {
        return;                 /* it looks at the flags before it ends */
    }
    /* In flight first: a drain that begins now waits, or we see it */
    bdrv_inc_in_flight(bs);
    if (!thinvm_worker_may_run(w)) {
        bdrv_dec_in_flight(bs);
        return;
    }
    w->running = true;
    qemu_coroutine_enter(qemu_coroutine_create(thinvm_worker_entry, w));
}

static void thinvm_worker_timer_cb(void *opaque)
{
    ThinvmWorker *w = opaque;

    qatomic_set(&w->armed, false);
    qatomic_set(&w->tick, true);
    thinvm_worker_run(w);
}

static void thinvm_worker_bh(void *opaque)
{
    thinvm_worker_run(opaque);
}

void thinvm_worker_kick(void *opaque)
{
    BDRVThinvmState *s = opaque;
    ThinvmWorker *w = s->worker;

    if (!w || !w->bh) {
        return;                 /* closing */
    }
    qatomic_set(&w->kicked, true);
    qemu_bh_schedule(w->bh);
}

void thinvm_worker_owner_changed(BDRVThinvmState *s)
{
    ThinvmState *state = thinvm_store_state(s->store);
    ThinvmInfoState info;

    thinvm_state_lock(state);
    thinvm_state_info(state, &info);
    thinvm_state_unlock(state);
    if (info.nb_snapshots) {
        thinvm_worker_collect_soon(s);
    }
}

void thinvm_worker_collect_soon(BDRVThinvmState *s)
{
    ThinvmWorker *w = s->worker;

    qatomic_set(&w->collect, true);
    qemu_bh_schedule(w->bh);
}

bool thinvm_worker_has_to_collect(BDRVThinvmState *s)
{
    return qatomic_read(&s->worker->collect);
}

void thinvm_worker_drain_end(BDRVThinvmState *s)
{
    ThinvmWorker *w = s->worker;

    if (w && w->bh && (qatomic_read(&w->tick) || qatomic_read(&w->kicked) ||
                       qatomic_read(&w->collect))) {
        qemu_bh_schedule(w->bh);
    }
}

/* It ends what it is at, a checkpoint too: who stops it waits for that */
void coroutine_fn thinvm_worker_stop(BDRVThinvmState *s)
{
    s->worker->stops++;
    while (s->worker->running) {
        qemu_co_sleep_ns(QEMU_CLOCK_REALTIME, SCALE_MS);
    }
}

void thinvm_worker_resume(BDRVThinvmState *s)
{
    assert(s->worker->stops);
    s->worker->stops--;
    thinvm_worker_drain_end(s);
}

/* ------------------------------------------------------------------ */

void thinvm_worker_attach(BDRVThinvmState *s, AioContext *ctx)
{
    ThinvmWorker *w = s->worker;

    w->timer = aio_timer_new(ctx, QEMU_CLOCK_REALTIME, SCALE_MS,
                             thinvm_worker_timer_cb, w);
    w->bh = aio_bh_new(ctx, thinvm_worker_bh, w);
    /* Whatever was under way in the old context is due in the new one */
    if (qatomic_xchg(&w->armed, false)) {
        qatomic_set(&w->tick, true);
    }
    if (w->tick || w->kicked || w->collect) {
        qemu_bh_schedule(w->bh);
    }
}

void thinvm_worker_detach(BDRVThinvmState *s)
{
    ThinvmWorker *w = s->worker;

    assert(!w->running);
    timer_free(g_steal_pointer(&w->timer));
    qemu_bh_delete(g_steal_pointer(&w->bh));
}

void thinvm_worker_init(BDRVThinvmState *s)
{
    s->worker = g_new0(ThinvmWorker, 1);
    s->worker->s = s;
    thinvm_worker_attach(s, bdrv_get_aio_context(s->bs));
}

void thinvm_worker_destroy(BDRVThinvmState *s)
{
    thinvm_worker_detach(s);
    g_free(g_steal_pointer(&s->worker));
}
