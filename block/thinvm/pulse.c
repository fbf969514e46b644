/*
 * thinvm driver layer: the periodic work of a node
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * One timer for each node that owns its image, or follows another owner, and
 * a coroutine that it starts:
 *
 *   owner      writes a heartbeat, and looks whether its claim still stands,
 *              and its device is still as long as it was; if not, the node is
 *              lost (invariant 6);
 *   follower   applies what the owner has journalled, goes over to the
 *              owner's newest base, and preloads the mapping, so that taking
 *              the image over finds everything in memory.  Looks again soon
 *              while the owner is busy, less often while it is not.
 *
 * Nothing depends on it: a follower's look-up catches up by itself, and a
 * displaced owner is fenced, or stopped by its first write after it was frozen
 * (heartbeat.c), or its first that fails.
 *
 * Drain: the coroutine counts as a request in flight, works in bounded steps,
 * and looks between them whether the node is to be quiet.
 *
 * Threads: timer, bh and running belong to the node's AioContext; what other
 * threads read is under the lock, or atomic.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "block/aio.h"
#include "qemu/lockable.h"
#include "qemu/timer.h"
#include "handover.h"
#include "trace.h"

/* How often a follower looks, milliseconds */
#define THINVM_FOLLOW_MIN_MS    100
#define THINVM_FOLLOW_MAX_MS    1000
/* and how often at the owner's claim and heartbeat */
#define THINVM_FOLLOW_CLAIM_US  (1000 * 1000)

struct ThinvmPulse {
    BDRVThinvmState *s;
    QEMUTimer *timer;
    QEMUBH *bh;
    bool running;
    bool missed;                /* atomic: due, but the node was drained */
    bool released;              /* atomic: just now, so begin with a rest */
    unsigned interval;          /* of a follower, milliseconds */
    int64_t claim_read_us;      /* when, by the monotonic clock */
    ThinvmStore *store;         /* what @preload is about */
    ThinvmHotList hot;

    QemuMutex lock;             /* from here on */
    ThinvmStorePreload preload;
    bool followed;              /* ever */
    bool saw_claim;
    ThinvmClaim claim;          /* newest on the device, when last looked */
    ThinvmBeat beat;            /* of its owner */
    uint64_t counter;           /* our own last heartbeat */
    bool took, warm;
    uint64_t took_ns, took_read, base_read;
};

static bool thinvm_pulse_follows(BDRVThinvmState *s)
{
    return qatomic_read(&s->follow) && !qatomic_read(&s->cut) && !s->view &&
           (s->bs->open_flags & BDRV_O_RDWR) &&
           !(s->bs->open_flags & BDRV_O_NO_IO);
}

static bool thinvm_pulse_wanted(BDRVThinvmState *s)
{
    return qatomic_read(&s->owner) || thinvm_pulse_follows(s);
}

static bool thinvm_pulse_may_run(ThinvmPulse *p)
{
    return qatomic_read(&p->s->bs->quiesce_counter) == 0 &&
           thinvm_pulse_wanted(p->s);
}

/* ------------------------------------------------------------------ */
/* The owner                                                           */

static void coroutine_fn GRAPH_RDLOCK thinvm_pulse_own(ThinvmPulse *p)
{
    BDRVThinvmState *s = p->s;
    g_autoptr(Error) local_err = NULL;
    uint64_t counter, needed;
    int64_t length;
    int ret;

    if (thinvm_device_was_cut(s, &length, &needed)) {
        thinvm_mode_device_cut(s, length, needed);
        return;
    }
    ret = thinvm_claim_look(s, &local_err);
    if (ret == -EPERM && qatomic_read(&s->owner)) {
        thinvm_mode_lose(s, error_get_pretty(local_err));
    }
    /* One that cannot be read lets the heart beat on, and renews nothing */
    if (ret == 0 && qatomic_read(&s->owner) &&
        thinvm_fence_check(s) == -EPERM && qatomic_read(&s->owner)) {
        thinvm_mode_lose(s, "another has reserved the device");
    }
    if (!qatomic_read(&s->owner)) {
        return;
    }
    WITH_QEMU_LOCK_GUARD(&p->lock) {
        counter = ++p->counter;
    }
    /* If it fails, device.c has looked who owns the image */
    ret = thinvm_heartbeat_write(s, counter);
    trace_thinvm_heartbeat(s->bs, counter, ret);
    thinvm_hot_beat(s, &p->hot, counter);
}

/* ------------------------------------------------------------------ */
/* The follower                                                        */

static void coroutine_fn GRAPH_RDLOCK thinvm_pulse_look(ThinvmPulse *p)
{
    BDRVThinvmState *s = p->s;
    int64_t now = g_get_monotonic_time();
    ThinvmOwnerView view;
    ThinvmBeat beat;

    if (p->claim_read_us && now - p->claim_read_us < THINVM_FOLLOW_CLAIM_US) {
        return;
    }
    p->claim_read_us = now;
    if (thinvm_owner_look(&s->device, &s->uuid, s, &view, NULL) < 0 ||
        !view.newest_epoch ||
        thinvm_heartbeat_look(&s->device, &s->uuid, &view.newest,
                              &beat) < 0) {
        return;
    }
    WITH_QEMU_LOCK_GUARD(&p->lock) {
        p->beat = beat;
    }
    thinvm_fence_prepare(s, &view.newest);
    if (p->preload.state != THINVM_STORE_PRELOAD_COMPLETE &&
        thinvm_hot_read(s, &p->hot, &view.newest)) {
        QEMU_LOCK_GUARD(&p->lock);
        thinvm_store_preload_hot(&p->preload, p->hot.leaf, p->hot.nb);
    }
}

static void coroutine_fn GRAPH_RDLOCK thinvm_pulse_catch_up(ThinvmPulse *p)
{
    ThinvmStore *st = qatomic_read(&p->s->store);
    uint64_t before = thinvm_store_changes(st);

    /* Errors are met again, and told, by whoever needs the image */
    if (thinvm_store_catch_up(st, NULL, NULL) == 0) {
        thinvm_store_follow_base(st, NULL);
    }
    thinvm_pulse_look(p);
    if (thinvm_store_changes(st) != before) {
        p->interval = THINVM_FOLLOW_MIN_MS;
    } else {
        p->interval = MIN(p->interval * 2, THINVM_FOLLOW_MAX_MS);
    }
    WITH_QEMU_LOCK_GUARD(&p->lock) {
        if (p->store != st) {
            p->store = st;
            memset(&p->preload, 0, sizeof(p->preload));
            thinvm_store_preload_hot(&p->preload, p->hot.leaf, p->hot.nb);
        }
        p->followed = true;
        thinvm_store_preload_retry(&p->preload);
    }
}

/* One step; whether there are more to do */
static bool coroutine_fn GRAPH_RDLOCK thinvm_pulse_preload(ThinvmPulse *p)
{
    ThinvmStorePreload preload = p->preload;    /* only we change it */
    bool more = thinvm_store_preload(p->store, &preload);

    WITH_QEMU_LOCK_GUARD(&p->lock) {
        p->preload = preload;
    }
    return more;
}

/* ------------------------------------------------------------------ */
/* The coroutine                                                       */

static void thinvm_pulse_arm(ThinvmPulse *p)
{
    if (thinvm_pulse_wanted(p->s)) {
        timer_mod(p->timer, qemu_clock_get_ms(QEMU_CLOCK_REALTIME) +
                  (qatomic_read(&p->s->owner) ? THINVM_HEARTBEAT_MS :
                                                p->interval));
    }
}

static void coroutine_fn thinvm_pulse_entry(void *opaque)
{
    ThinvmPulse *p = opaque;
    BlockDriverState *bs = p->s->bs;
    bool first = true, more = true;

    while (more && thinvm_pulse_may_run(p)) {
        bdrv_graph_co_rdlock();
        more = false;
        if (qatomic_read(&p->s->owner)) {
            if (first) {
                thinvm_pulse_own(p);
            }
            more = qatomic_read(&p->s->owner) &&
                   thinvm_hot_step(p->s, &p->hot);
        } else if (first) {
            thinvm_pulse_catch_up(p);
            more = true;
        } else {
            more = thinvm_pulse_preload(p);
        }
        first = false;
        bdrv_graph_co_rdunlock();
    }
    p->running = false;
    thinvm_pulse_arm(p);
    bdrv_dec_in_flight(bs);
}

static void thinvm_pulse_run(ThinvmPulse *p)
{
    BlockDriverState *bs = p->s->bs;

    if (p->running) {
        return;
    }
    /* In flight first: a drain that begins now waits, or we see it */
    bdrv_inc_in_flight(bs);
    if (!thinvm_pulse_may_run(p)) {
        qatomic_set(&p->missed, true);
        bdrv_dec_in_flight(bs);
        return;
    }
    qatomic_set(&p->missed, false);
    p->running = true;
    qemu_coroutine_enter(qemu_coroutine_create(thinvm_pulse_entry, p));
}

static void thinvm_pulse_timer_cb(void *opaque)
{
    thinvm_pulse_run(opaque);
}

/*
 * A follower begins at once, unless it has just handed the image over: then
 * the guest stands still until another has taken it, and nothing should be in
 * its way.  An owner's first heartbeat has time, but one that was missed has
 * not: drained sections may come one after the other.
 */
static void thinvm_pulse_bh(void *opaque)
{
    ThinvmPulse *p = opaque;
    bool rest = qatomic_xchg(&p->released, false);

    p->interval = rest ? THINVM_FOLLOW_MAX_MS : THINVM_FOLLOW_MIN_MS;
    if (rest || (qatomic_read(&p->s->owner) && !qatomic_read(&p->missed))) {
        thinvm_pulse_arm(p);
    } else {
        thinvm_pulse_run(p);
    }
}

void thinvm_pulse_kick(BDRVThinvmState *s)
{
    if (s->pulse && s->pulse->bh) {
        qemu_bh_schedule(s->pulse->bh);
    }
}

void thinvm_pulse_released(BDRVThinvmState *s)
{
    if (s->pulse && s->pulse->bh) {
        qatomic_set(&s->pulse->released, true);
        qemu_bh_schedule(s->pulse->bh);
    }
}

void thinvm_pulse_drain_end(BDRVThinvmState *s)
{
    if (s->pulse && qatomic_read(&s->pulse->missed)) {
        thinvm_pulse_kick(s);
    }
}

/* ------------------------------------------------------------------ */

void thinvm_pulse_attach(BDRVThinvmState *s, AioContext *ctx)
{
    ThinvmPulse *p = s->pulse;

    p->timer = aio_timer_new(ctx, QEMU_CLOCK_REALTIME, SCALE_MS,
                             thinvm_pulse_timer_cb, p);
    p->bh = aio_bh_new(ctx, thinvm_pulse_bh, p);
    qemu_bh_schedule(p->bh);
}

void thinvm_pulse_detach(BDRVThinvmState *s)
{
    ThinvmPulse *p = s->pulse;

    assert(!p->running);
    timer_free(g_steal_pointer(&p->timer));
    qemu_bh_delete(g_steal_pointer(&p->bh));
}

void thinvm_pulse_init(BDRVThinvmState *s)
{
    s->pulse = g_new0(ThinvmPulse, 1);
    s->pulse->s = s;
    s->pulse->interval = THINVM_FOLLOW_MIN_MS;
    qemu_mutex_init(&s->pulse->lock);
    thinvm_pulse_attach(s, bdrv_get_aio_context(s->bs));
}

void thinvm_pulse_destroy(BDRVThinvmState *s)
{
    thinvm_pulse_detach(s);
    thinvm_hot_destroy(&s->pulse->hot);
    qemu_mutex_destroy(&s->pulse->lock);
    g_free(g_steal_pointer(&s->pulse));
}

/* ------------------------------------------------------------------ */
/* What it tells                                                       */

void thinvm_pulse_saw_claim(BDRVThinvmState *s, const ThinvmClaim *claim)
{
    ThinvmPulse *p = s->pulse;

    QEMU_LOCK_GUARD(&p->lock);
    if (p->saw_claim &&
        !qemu_uuid_is_equal(&p->claim.nonce, &claim->nonce)) {
        memset(&p->beat, 0, sizeof(p->beat));
    }
    p->claim = *claim;
    p->saw_claim = true;
}

void thinvm_pulse_took(BDRVThinvmState *s, bool warm, int64_t start,
                       uint64_t read)
{
    ThinvmPulse *p = s->pulse;
    ThinvmStoreStats stats;

    thinvm_store_stats(s->store, &stats);
    QEMU_LOCK_GUARD(&p->lock);
    p->took = true;
    p->warm = warm;
    p->took_ns = qemu_clock_get_ns(QEMU_CLOCK_REALTIME) - start;
    p->took_read = read;
    p->base_read = stats.metadata_bytes_read;
    p->counter = 0;
    trace_thinvm_take_over(s->bs, warm, p->took_ns, read);
}

static ThinvmOwner *thinvm_pulse_owner_info(BDRVThinvmState *s,
                                            const ThinvmPulse *p)
{
    ThinvmOwner *owner = g_new0(ThinvmOwner, 1);
    bool own = qemu_uuid_is_equal(&p->claim.nonce, &s->claim.nonce);

    *owner = (ThinvmOwner) {
        .state = p->claim.state == THINVM_CLAIM_ACTIVE ?
                 THINVM_OWNER_STATE_ACTIVE :
                 p->claim.state == THINVM_CLAIM_CLOSED ?
                 THINVM_OWNER_STATE_CLOSED : THINVM_OWNER_STATE_RELEASED,
        .epoch = p->claim.epoch,
        .host_name = thinvm_owner_host(&p->claim),
        .process = p->claim.process,
        .this_node = own,
    };
    if (own) {
        owner->has_counter = p->counter > 0;
        owner->counter = p->counter;
    } else if (p->beat.known) {
        owner->has_counter = true;
        owner->counter = p->beat.counter;
        owner->has_counter_unchanged_ms = true;
        owner->counter_unchanged_ms = p->beat.unchanged_ms;
    }
    return owner;
}

static ThinvmFollower *thinvm_pulse_follower_info(BDRVThinvmState *s,
                                                  const ThinvmPulse *p)
{
    static const ThinvmPreloadState state[] = {
        [THINVM_STORE_PRELOAD_RUNNING] = THINVM_PRELOAD_STATE_RUNNING,
        [THINVM_STORE_PRELOAD_COMPLETE] = THINVM_PRELOAD_STATE_COMPLETE,
        [THINVM_STORE_PRELOAD_FULL] = THINVM_PRELOAD_STATE_CACHE_FULL,
        [THINVM_STORE_PRELOAD_FAILED] = THINVM_PRELOAD_STATE_FAILED,
    };
    ThinvmFollower *follower = g_new0(ThinvmFollower, 1);
    ThinvmStoreStats stats;

    thinvm_store_stats(s->store, &stats);
    *follower = (ThinvmFollower) {
        .catch_ups = stats.catch_ups,
        .records = stats.followed_records,
        .fresh_starts = stats.fresh_starts,
        .adopted_pages = stats.adopted_pages,
        .preload = state[p->preload.state],
        .preload_pages = p->preload.pages,
        .preload_progress = p->preload.percent,
    };
    return follower;
}

void thinvm_pulse_info(BDRVThinvmState *s, ThinvmInfo *dst)
{
    ThinvmPulse *p = s->pulse;
    ThinvmStoreStats stats;

    thinvm_store_stats(s->store, &stats);
    QEMU_LOCK_GUARD(&p->lock);
    if (p->saw_claim) {
        dst->image_owner = thinvm_pulse_owner_info(s, p);
    }
    if (qatomic_read(&s->owner)) {
        const char *reason;

        dst->has_fencing = true;
        dst->fencing = thinvm_fence_kind(s, &reason);
        dst->fencing_reason = g_strdup(reason);
    }
    if (p->followed) {
        dst->follower = thinvm_pulse_follower_info(s, p);
    }
    if (p->took) {
        dst->take_over = g_new0(ThinvmTakeOver, 1);
        *dst->take_over = (ThinvmTakeOver) {
            .warm = p->warm,
            .duration_ns = p->took_ns,
            .metadata_bytes_read = p->took_read,
            .metadata_bytes_read_since =
                stats.metadata_bytes_read - p->base_read,
        };
    }
}
