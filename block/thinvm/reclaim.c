/*
 * thinvm durability layer: when a freed cluster may be used again
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Keeps invariant 2.  A cluster that an operation freed is in quarantine, and
 * busy to the engine, until
 *
 *   - the record that frees it is durable: else a power cut would bring back
 *     the mapping to it, with another mapping's data in it;
 *   - every request that joined before the freeing has left: it may have
 *     looked the mapping up and be reading, or writing, the cluster;
 *   - a discard of it, if one is passed down, has completed: else it might
 *     land on the next owner's data.
 *
 * Requests are counted by epoch.  st->request_epoch is the current one; what
 * is freed is stamped with it *after* the apply that freed it, and then the
 * epoch is advanced, so that a request that joins later does not hold it up.
 * Epochs share THINVM_REQUEST_EPOCHS counters: the epoch advances only onto a
 * counter that is zero.  A request that is delayed between reading the epoch
 * and counting itself sees that the epoch has changed, and joins again; so
 * once a counter was found zero after the epoch had left it, nobody is in it.
 *
 * Nothing of this is on the device.  A power cut forgets the quarantine:
 * after it the clusters are free if the record arrived, and in use if not;
 * discards that were not passed down yet are lost, which wastes space in a
 * thin device below but harms nothing.
 */
#include "qemu/osdep.h"
#include "qemu/lockable.h"
#include "store-int.h"
#include "trace.h"

/* Ranges that one call of thinvm_store_reclaim() makes free, at least */
#define THINVM_RECLAIM_STEP         1024
/* Ranges that are made free under one hold of the state lock */
#define THINVM_UNBUSY_STEP          256
/* Bytes by which a device is enlarged at least, when that works */
#define THINVM_GROW_STEP            (64 * MiB)
/* The same where that takes space below at once */
#define THINVM_GROW_STEP_BOUNDED    (1 * MiB)
/* Shorter places that are passed over in the search for it */
#define THINVM_EXTENT_SEARCH        32
/* How long a request waits in reserve() for others to leave */
#define THINVM_RESERVE_WAIT_NS      (10 * SCALE_MS)
#define THINVM_RESERVE_WAITS        50

void thinvm_reclaim_init(ThinvmStore *st)
{
    QSIMPLEQ_INIT(&st->quarantine);
    QSIMPLEQ_INIT(&st->retired);
    qemu_co_mutex_init(&st->grow_lock);
}

/* ------------------------------------------------------------------ */
/* Request epochs                                                      */

static unsigned *request_count(ThinvmStore *st, unsigned epoch)
{
    return &st->requests[epoch & (THINVM_REQUEST_EPOCHS - 1)].nb;
}

unsigned thinvm_store_request_begin(ThinvmStore *st)
{
    for (;;) {
        unsigned epoch = qatomic_read(&st->request_epoch);

        /* A full barrier: the count is seen before what we look up */
        qatomic_inc(request_count(st, epoch));
        smp_mb__after_rmw();
        if (qatomic_read(&st->request_epoch) == epoch) {
            return epoch & (THINVM_REQUEST_EPOCHS - 1);
        }
        qatomic_dec(request_count(st, epoch));
    }
}

void thinvm_store_request_end(ThinvmStore *st, unsigned token)
{
    unsigned before = qatomic_fetch_dec(&st->requests[token].nb);

    assert(before > 0);
}

/* So that requests from now on are of a later epoch.  st->lock */
static void advance_epoch(ThinvmStore *st)
{
    smp_mb();
    if (!qatomic_read(request_count(st, st->request_epoch + 1))) {
        qatomic_set(&st->request_epoch, st->request_epoch + 1);
        smp_mb();
    }
}

/* Have all requests of @epoch and of earlier ones left?  st->lock */
static bool epoch_has_left(ThinvmStore *st, unsigned epoch)
{
    unsigned behind = st->request_epoch - epoch;

    if (behind == 0) {
        advance_epoch(st);
        behind = st->request_epoch - epoch;
    }
    smp_mb();
    /* Counters of epochs further back were zero when they were taken again */
    for (unsigned i = behind; i < THINVM_REQUEST_EPOCHS; i++) {
        if (qatomic_read(request_count(st, st->request_epoch - i))) {
            return false;
        }
    }
    return behind > 0;
}

static unsigned requests_running(ThinvmStore *st)
{
    unsigned nb = 0;

    for (unsigned i = 0; i < THINVM_REQUEST_EPOCHS; i++) {
        nb += qatomic_read(&st->requests[i].nb);
    }
    return nb;
}

/*
 * Parts that an operation has made invalid stay where they are.  They need no
 * quarantine: what arrives there late, nobody sees.  But who makes them valid
 * again, and wants to vouch for them by a checksum, has to know.
 */
void thinvm_requests_invalidated(ThinvmStore *st)
{
    /* The stamp is read after what it is for was visible to everybody */
    smp_mb();
    QEMU_LOCK_GUARD(&st->lock);
    st->invalidated_epoch = st->request_epoch;
    qatomic_set(&st->invalidated, true);
    advance_epoch(st);
}

bool thinvm_store_invalid_left(ThinvmStore *st)
{
    if (!qatomic_read(&st->invalidated)) {
        return true;
    }
    QEMU_LOCK_GUARD(&st->lock);
    if (st->invalidated && epoch_has_left(st, st->invalidated_epoch)) {
        qatomic_set(&st->invalidated, false);
    }
    return !st->invalidated;
}

unsigned thinvm_store_requests_mark(ThinvmStore *st)
{
    smp_mb();
    QEMU_LOCK_GUARD(&st->lock);
    return st->request_epoch;
}

bool thinvm_store_requests_left(ThinvmStore *st, unsigned mark)
{
    QEMU_LOCK_GUARD(&st->lock);
    return epoch_has_left(st, mark);
}

/* ------------------------------------------------------------------ */
/* Quarantine                                                          */

static void quarantine_free(ThinvmQuarantine *q)
{
    g_array_free(q->ranges, true);
    g_free(q);
}

void thinvm_quarantine_add(ThinvmStore *st, ThinvmState *s,
                           uint64_t sequence)
{
    GArray *freed = thinvm_space_take_freed(s);
    ThinvmQuarantine *q;

    if (!freed) {
        return;
    }
    /* The stamp is read after what freed them was visible to everybody */
    smp_mb();
    QEMU_LOCK_GUARD(&st->lock);
    qatomic_set(&st->quarantined_ranges,
                st->quarantined_ranges + freed->len);
    q = QSIMPLEQ_LAST(&st->quarantine, ThinvmQuarantine, next);
    if (q && q->sequence == sequence && q->request_epoch == st->request_epoch) {
        g_array_append_vals(q->ranges, freed->data, freed->len);
        g_array_free(freed, true);
    } else {
        q = g_new0(ThinvmQuarantine, 1);
        q->sequence = sequence;
        q->request_epoch = st->request_epoch;
        q->ranges = freed;
        QSIMPLEQ_INSERT_TAIL(&st->quarantine, q, next);
    }
    advance_epoch(st);
}

void thinvm_quarantine_skip(ThinvmState *s)
{
    GArray *freed;

    thinvm_state_lock(s);
    freed = thinvm_space_take_freed(s);
    for (guint i = 0; freed && i < freed->len; i++) {
        ThinvmFreedRange *r = &g_array_index(freed, ThinvmFreedRange, i);

        thinvm_space_unbusy(s, r->first, r->nb_clusters);
    }
    thinvm_state_unlock(s);
    if (freed) {
        g_array_free(freed, true);
    }
}

void thinvm_quarantine_drop(ThinvmStore *st)
{
    ThinvmQuarantine *q;

    QEMU_LOCK_GUARD(&st->lock);
    while ((q = QSIMPLEQ_FIRST(&st->quarantine))) {
        QSIMPLEQ_REMOVE_HEAD(&st->quarantine, next);
        quarantine_free(q);
    }
    st->quarantined_ranges = 0;
}

/*
 * What a follower has queued is of no use to an owner: a cluster in it may
 * have been mapped again by a later record, and is then no more busy; it must
 * not be discarded.  Clusters that are still free become usable; a reader
 * that began before repeats (thinvm_mode_end_read()).
 */
void thinvm_quarantine_settle(ThinvmStore *st)
{
    ThinvmQuarantine *q;

    for (;;) {
        WITH_QEMU_LOCK_GUARD(&st->lock) {
            q = QSIMPLEQ_FIRST(&st->quarantine);
            if (q) {
                QSIMPLEQ_REMOVE_HEAD(&st->quarantine, next);
                qatomic_set(&st->quarantined_ranges,
                            st->quarantined_ranges - q->ranges->len);
            }
        }
        if (!q) {
            return;
        }
        thinvm_state_lock(st->state);
        for (guint i = 0; i < q->ranges->len; i++) {
            ThinvmFreedRange *r = &g_array_index(q->ranges, ThinvmFreedRange,
                                                 i);

            thinvm_space_unbusy(st->state, r->first, r->nb_clusters);
        }
        thinvm_state_unlock(st->state);
        quarantine_free(q);
    }
}

bool thinvm_quarantine_is_full(ThinvmStore *st)
{
    return qatomic_read(&st->quarantined_ranges) >= THINVM_QUARANTINE_FULL;
}

/* Stamps and sequences grow along the queue: only the first is looked at */
static ThinvmQuarantine *quarantine_pop(ThinvmStore *st)
{
    bool owner = qatomic_read(&st->mode) != THINVM_STORE_READING;
    ThinvmQuarantine *q;

    QEMU_LOCK_GUARD(&st->lock);
    q = QSIMPLEQ_FIRST(&st->quarantine);
    /* A follower reuses nothing: for it the record need not be durable, and
       when it becomes the owner its first commit makes it so */
    if (!q || (owner && q->sequence > st->journal.flushed_sequence) ||
        !epoch_has_left(st, q->request_epoch)) {
        return NULL;
    }
    QSIMPLEQ_REMOVE_HEAD(&st->quarantine, next);
    qatomic_set(&st->quarantined_ranges,
                st->quarantined_ranges - q->ranges->len);
    return q;
}

void thinvm_retire_state(ThinvmStore *st, ThinvmState *s)
{
    ThinvmRetiredState *r = g_new0(ThinvmRetiredState, 1);

    r->state = s;
    smp_mb();
    QEMU_LOCK_GUARD(&st->lock);
    r->request_epoch = st->request_epoch;
    QSIMPLEQ_INSERT_TAIL(&st->retired, r, next);
    advance_epoch(st);
}

static void free_retired(ThinvmStore *st, bool all)
{
    ThinvmRetiredState *r;

    for (;;) {
        WITH_QEMU_LOCK_GUARD(&st->lock) {
            r = QSIMPLEQ_FIRST(&st->retired);
            if (!r || (!all && !epoch_has_left(st, r->request_epoch))) {
                return;
            }
            QSIMPLEQ_REMOVE_HEAD(&st->retired, next);
        }
        thinvm_state_free(r->state);
        g_free(r);
    }
}

void thinvm_reclaim_destroy(ThinvmStore *st)
{
    assert(requests_running(st) == 0);
    free_retired(st, true);
    thinvm_quarantine_drop(st);
}

/* ------------------------------------------------------------------ */
/* Reclaiming                                                          */

static void unbusy_ranges(ThinvmState *s, GArray *ranges, guint from, guint to)
{
    for (guint i = from; i < to; i++) {
        ThinvmFreedRange *r = &g_array_index(ranges, ThinvmFreedRange, i);

        thinvm_space_unbusy(s, r->first, r->nb_clusters);
    }
}

/* There may be many, and writers wait for the lock meanwhile */
static void unbusy_by_pieces(ThinvmState *s, GArray *ranges)
{
    for (guint i = 0; i < ranges->len; i += THINVM_UNBUSY_STEP) {
        thinvm_state_lock(s);
        unbusy_ranges(s, ranges, i, MIN(ranges->len, i + THINVM_UNBUSY_STEP));
        thinvm_state_unlock(s);
    }
}

/*
 * In a follower it is one step under the state lock: were it two, this node
 * could become the owner in between, and map and free a cluster again, which
 * would then be made usable before the new freeing is durable.
 */
static ThinvmQuarantine *release_following(ThinvmStore *st, ThinvmState *s)
{
    ThinvmQuarantine *q = NULL;

    thinvm_state_lock(s);
    if (qatomic_read(&st->mode) == THINVM_STORE_READING) {
        q = quarantine_pop(st);
        if (q) {
            unbusy_ranges(s, q->ranges, 0, q->ranges->len);
        }
    }
    thinvm_state_unlock(s);
    return q;
}

/*
 * Several entries, so that what a guest discards piece by piece is joined to
 * few discards of the device; these take their time.  Only the owner has them.
 */
static ThinvmQuarantine *coroutine_fn release_owned(ThinvmStore *st,
                                                    ThinvmState *s,
                                                    bool discard)
{
    ThinvmQuarantine *q = quarantine_pop(st), *more;

    while (q && q->ranges->len < THINVM_RECLAIM_STEP &&
           (more = quarantine_pop(st))) {
        g_array_append_vals(q->ranges, more->ranges->data, more->ranges->len);
        quarantine_free(more);
    }
    if (q) {
        thinvm_discard_join(q->ranges);
        if (discard) {
            qatomic_inc(&st->nb_discarding);
            thinvm_discard_ranges(st, q->ranges);
        }
        unbusy_by_pieces(s, q->ranges);
        if (discard) {
            qatomic_dec(&st->nb_discarding);
        }
    }
    return q;
}

/* Number of ranges that were made free */
static unsigned coroutine_fn reclaim_some(ThinvmStore *st, bool discard)
{
    ThinvmState *s = thinvm_store_state(st);
    ThinvmQuarantine *q;
    unsigned nb = 0;

    while (nb < THINVM_RECLAIM_STEP) {
        int mode = qatomic_read(&st->mode);

        q = mode == THINVM_STORE_READING ? release_following(st, s) :
            release_owned(st, s, discard && mode == THINVM_STORE_WRITING);
        if (!q) {
            break;
        }
        nb += q->ranges->len;
        trace_thinvm_reclaim(st, q->sequence, q->ranges->len);
        quarantine_free(q);
    }
    return nb;
}

int coroutine_fn thinvm_store_reclaim(ThinvmStore *st, bool discard)
{
    unsigned nb = reclaim_some(st, discard);

    free_retired(st, false);
    if (nb >= THINVM_RECLAIM_STEP) {
        thinvm_store_kick(st);  /* more may be ready */
    }
    return 0;
}

void thinvm_store_set_discard(ThinvmStore *st, bool discard)
{
    qatomic_set(&st->discard, discard);
}

/* ------------------------------------------------------------------ */
/* Space                                                               */

/* thinvm_space_reserve() with its pages read */
static int coroutine_fn reserve_once(ThinvmStore *st, uint64_t goal,
                                     uint64_t max, uint64_t *first,
                                     uint64_t *nb_clusters)
{
    ThinvmState *s = thinvm_store_state(st);
    unsigned attempts = 0;
    ThinvmNeeds needs;
    int ret;

    thinvm_needs_init(&needs);
    for (;;) {
        thinvm_state_lock(s);
        ret = thinvm_space_reserve(s, goal, max, first, nb_clusters, &needs);
        if (ret != -EAGAIN) {
            break;
        }
        thinvm_state_unlock(s);
        ret = thinvm_store_read_wanted(st, s, &needs, NULL);
        thinvm_state_lock(s);
        if (ret == -EBADMSG && attempts++ < THINVM_PAGE_ATTEMPTS) {
            thinvm_needs_destroy(s, &needs);    /* see may_retry() */
            thinvm_needs_init(&needs);
        } else if (ret < 0) {
            break;
        }
        thinvm_state_unlock(s);
    }
    thinvm_needs_destroy(s, &needs);
    thinvm_state_unlock(s);
    return ret;
}

static uint64_t device_clusters(ThinvmStore *st)
{
    ThinvmState *s = thinvm_store_state(st);
    ThinvmInfoState info;

    thinvm_state_lock(s);
    thinvm_state_info(s, &info);
    thinvm_state_unlock(s);
    return info.device_clusters;
}

/* grow_lock is held; the device has so many */
static int coroutine_fn use_clusters(ThinvmStore *st, uint64_t clusters,
                                     Error **errp)
{
    ThinvmOp op = { .type = THINVM_OP_GROW, .value = clusters };

    trace_thinvm_grow(st, device_clusters(st), clusters);
    return thinvm_store_execute_internal(st, &op, false, true, NULL, errp);
}

/* Enlarge by @clusters, or less if the device is longer by less anyway */
static int coroutine_fn grow_by(ThinvmStore *st, uint64_t clusters)
{
    uint64_t before = device_clusters(st);
    uint64_t after = MIN(before + clusters, THINVM_MAX_CLUSTERS);
    int64_t length;
    int ret;

    ret = st->dev->co_grow(st->dev, after << st->cluster_bits);
    length = st->dev->co_length(st->dev);
    if (length >= 0) {
        after = MIN(after, length >> st->cluster_bits);
    }
    if (length < 0 || after <= before) {
        return ret < 0 ? ret : -ENOSPC;
    }
    return use_clusters(st, after, NULL);
}

/*
 * The image gave up the end of its device, which somebody is about to cut off:
 * what were taken into use there again would be lost.
 */
static bool may_not_grow(ThinvmStore *st, uint64_t length)
{
    uint64_t shrunk = qatomic_read(&st->shrunk_length);

    if (shrunk && shrunk != length) {
        qatomic_set(&st->shrunk_length, 0);
        shrunk = 0;
    }
    return shrunk;
}

void thinvm_store_forget_shrink(ThinvmStore *st)
{
    qatomic_set(&st->shrunk_length, 0);
}

int coroutine_fn thinvm_store_grow(ThinvmStore *st, uint64_t size,
                                   Error **errp)
{
    uint64_t before;
    int64_t length;
    int ret;

    if (size > THINVM_MAX_CLUSTERS << st->cluster_bits) {
        error_setg(errp, "The device cannot grow to %" PRIu64 " bytes; at "
                   "most %" PRIu64 " can be used", size,
                   (uint64_t)THINVM_MAX_CLUSTERS << st->cluster_bits);
        return -EFBIG;
    }
    qemu_co_mutex_lock(&st->grow_lock);
    ret = st->dev->co_grow(st->dev, size);
    length = st->dev->co_length(st->dev);
    before = device_clusters(st);
    if (ret == 0 && length > 0 && may_not_grow(st, length)) {
        /* what the image has given up is still there */
    } else if (ret < 0) {
        error_setg_errno(errp, -ret, "The device has %" PRIi64 " bytes and "
                         "cannot be enlarged to %" PRIu64 "; extend it first",
                         length, size);
    } else if (length < 0) {
        ret = length;
        error_setg_errno(errp, -ret, "Cannot tell the size of the device");
    } else if (length >> st->cluster_bits > before) {
        ret = use_clusters(st, MIN(length >> st->cluster_bits,
                                   THINVM_MAX_CLUSTERS), errp);
    }
    qemu_co_mutex_unlock(&st->grow_lock);
    /* The reserve follows the size; what cannot be taken now is taken later */
    for (int i = 0; ret == 0 && i < THINVM_METADATA_STEPS &&
                    thinvm_store_extend_metadata(st) > 0; i++) {
    }
    return ret;
}

/* grow_lock is held.  0: there is more space now */
static int coroutine_fn grow(ThinvmStore *st)
{
    ThinvmDevice *dev = st->dev;
    uint64_t before = device_clusters(st);
    uint64_t bound = dev->co_grow_bound ? dev->co_grow_bound(dev) : 0;
    uint64_t least = bound ? THINVM_GROW_STEP_BOUNDED : THINVM_GROW_STEP;
    uint64_t step = MAX(least, before / 16 << st->cluster_bits);
    int ret;

    step = MAX(1, (bound ? MIN(bound, step) : step) >> st->cluster_bits);
    if (qatomic_read(&st->shrunk_length) &&
        may_not_grow(st, MAX(dev->co_length(dev), 0))) {
        return -ENOSPC;
    }
    do {
        ret = grow_by(st, step);
        step /= 16;
    } while (ret < 0 && ret != -EIO && step > 0);
    return ret < 0 ? -ENOSPC : 0;
}

static bool has_unflushed_quarantine(ThinvmStore *st)
{
    ThinvmQuarantine *q;

    QEMU_LOCK_GUARD(&st->lock);
    q = QSIMPLEQ_FIRST(&st->quarantine);
    return q && q->sequence > st->journal.flushed_sequence;
}

/*
 * Others may hold up what would be free then.  They may also be waiting for
 * us, say for an overlapping range, so the time is bounded; and there is no
 * point in it when everybody who is left waits here.  What the device is
 * discarding just now comes free in any case.
 */
static bool coroutine_fn wait_for_others(ThinvmStore *st, unsigned *waits)
{
    bool worth;

    WITH_QEMU_LOCK_GUARD(&st->lock) {
        worth = *waits < THINVM_RESERVE_WAITS &&
                (qatomic_read(&st->nb_discarding) ||
                 (!QSIMPLEQ_EMPTY(&st->quarantine) &&
                  requests_running(st) > st->reserve_waiting + 1));
        st->reserve_waiting += worth;
    }
    if (!worth) {
        return false;
    }
    (*waits)++;
    qemu_co_sleep_ns(QEMU_CLOCK_REALTIME, THINVM_RESERVE_WAIT_NS);
    QEMU_LOCK_GUARD(&st->lock);
    st->reserve_waiting--;
    return true;
}

/* Freed clusters first, so that a device that grows on demand stays small */
static int coroutine_fn make_space(ThinvmStore *st, bool grow_locked)
{
    uint64_t before = device_clusters(st);
    int ret;

    if (reclaim_some(st, qatomic_read(&st->discard))) {
        return 0;
    }
    if (has_unflushed_quarantine(st)) {
        ret = thinvm_journal_commit(st, THINVM_COMMIT_DURABLE, true);
        if (ret < 0) {
            return ret;
        }
        if (reclaim_some(st, qatomic_read(&st->discard))) {
            return 0;
        }
    }
    if (grow_locked) {
        return grow(st);
    }
    qemu_co_mutex_lock(&st->grow_lock);
    ret = device_clusters(st) > before ? 0 : grow(st);
    qemu_co_mutex_unlock(&st->grow_lock);
    return ret;
}

static int coroutine_fn reserve(ThinvmStore *st, uint64_t goal, uint64_t max,
                                bool grow_locked, uint64_t *first,
                                uint64_t *nb_clusters)
{
    unsigned waits = 0;
    int ret;

    for (;;) {
        ret = thinvm_store_may_write(st);
        if (ret == 0) {
            ret = reserve_once(st, goal, max, first, nb_clusters);
        }
        if (ret != -ENOSPC) {
            return ret;
        }
        ret = make_space(st, grow_locked);
        if (ret == -ENOSPC && (grow_locked || !wait_for_others(st, &waits))) {
            /* What was freed by others just now counts too */
            return reserve_once(st, goal, max, first, nb_clusters);
        } else if (ret < 0 && ret != -ENOSPC) {
            return ret;
        }
    }
}

int coroutine_fn thinvm_store_reserve_below(ThinvmStore *st, uint64_t limit,
                                            uint64_t max, uint64_t *first,
                                            uint64_t *nb_clusters)
{
    ThinvmState *s = thinvm_store_state(st);
    int ret = thinvm_store_may_write(st);

    if (ret == 0) {
        ret = reserve_once(st, 0, max, first, nb_clusters);
    }
    if (ret == 0 && *first >= limit) {
        /* Perhaps what was held ready before lower ones came free */
        thinvm_store_unreserve(st, *first, *nb_clusters);
        thinvm_state_lock(s);
        thinvm_space_stop_reserving(s);
        thinvm_state_unlock(s);
        ret = reserve_once(st, 0, max, first, nb_clusters);
    }
    if (ret == 0 && *first >= limit) {
        thinvm_store_unreserve(st, *first, *nb_clusters);
        return -ENOSPC;
    }
    if (ret == 0 && *first + *nb_clusters > limit) {
        uint64_t nb = limit - *first;

        thinvm_store_unreserve(st, limit, *nb_clusters - nb);
        *nb_clusters = nb;
    }
    return ret;
}

int coroutine_fn thinvm_store_reserve(ThinvmStore *st, uint64_t goal,
                                      uint64_t max, uint64_t *first,
                                      uint64_t *nb_clusters)
{
    return reserve(st, goal, max, false, first, nb_clusters);
}

void thinvm_store_unreserve(ThinvmStore *st, uint64_t first,
                            uint64_t nb_clusters)
{
    ThinvmState *s = thinvm_store_state(st);

    thinvm_state_lock(s);
    thinvm_space_unbusy(s, first, nb_clusters);
    thinvm_state_unlock(s);
}

static uint64_t metadata_wanted(ThinvmStore *st)
{
    ThinvmState *s = thinvm_store_state(st);
    uint64_t wanted;
    bool urgent;

    thinvm_state_lock(s);
    wanted = thinvm_space_metadata_wanted(s, &urgent);
    thinvm_state_unlock(s);
    return wanted;
}

/* The operation that follows needs to know, and would hold the lock for it */
static void coroutine_fn look_at_pages(ThinvmStore *st, uint64_t first,
                                       uint64_t nb_clusters)
{
    ThinvmState *s = thinvm_store_state(st);
    int ret;

    thinvm_state_lock(s);
    thinvm_taking_begin(s, first, nb_clusters);
    thinvm_state_unlock(s);
    for (;;) {
        thinvm_state_lock(s);
        ret = thinvm_taking_step(s);
        thinvm_state_unlock(s);
        if (ret != -EAGAIN) {
            return;
        }
        qemu_co_sleep_ns(QEMU_CLOCK_REALTIME, 0);
    }
}

int coroutine_fn thinvm_store_take_metadata(ThinvmStore *st, ThinvmOp *op)
{
    ThinvmState *s = thinvm_store_state(st);
    int ret;

    trace_thinvm_meta_extend(st, op->physical, op->count);
    look_at_pages(st, op->physical, op->count);
    ret = thinvm_store_may_write(st);
    if (ret == 0) {
        ret = thinvm_store_execute_internal(st, op, false, true, NULL, NULL);
    }
    thinvm_state_lock(s);
    thinvm_taking_end(s);
    thinvm_state_unlock(s);
    return ret;
}

/*
 * A place for an extent that is worth it: its own block takes a page in each
 * base, and the reserves grow by some more.  On a device that is nearly full
 * shorter ones would take each cluster that comes free, and never be enough.
 */
int coroutine_fn thinvm_store_reserve_extent(ThinvmStore *st, uint64_t limit,
                                             uint64_t wanted, uint64_t *first,
                                             uint64_t *nb)
{
    uint64_t least = DIV_ROUND_UP(THINVM_EXTENT_LEAST << THINVM_PAGE_BITS,
                                  1ULL << st->cluster_bits);
    ThinvmFreedRange small[THINVM_EXTENT_SEARCH];
    unsigned n;
    int ret = -ENOSPC;

    for (n = 0; n < ARRAY_SIZE(small); n++) {
        ret = limit ? thinvm_store_reserve_below(st, limit,
                                                 MAX(wanted, least), first, nb)
                    : reserve(st, 0, MAX(wanted, least), true, first, nb);
        if (ret < 0 || *nb >= least) {
            break;
        }
        small[n] = (ThinvmFreedRange) { *first, *nb };
        ret = -ENOSPC;
    }
    while (n > 0) {
        n--;
        thinvm_store_unreserve(st, small[n].first, small[n].nb_clusters);
    }
    return ret;
}

/* Until more is free, or the device is larger, there is no point in trying */
static void note_no_extent(ThinvmStore *st)
{
    ThinvmState *s = thinvm_store_state(st);
    ThinvmInfoState info;

    thinvm_state_lock(s);
    thinvm_state_info(s, &info);
    thinvm_state_unlock(s);
    qatomic_set(&st->extend_free, info.free_clusters);
    qatomic_set(&st->extend_device, info.device_clusters);
}

int coroutine_fn thinvm_store_extend_metadata(ThinvmStore *st)
{
    ThinvmOp op = { .type = THINVM_OP_META_EXTEND };
    uint64_t wanted;
    int ret = 0;

    qemu_co_mutex_lock(&st->grow_lock);
    wanted = metadata_wanted(st);
    if (wanted) {
        ret = thinvm_store_reserve_extent(st, 0, wanted, &op.physical,
                                          &op.count);
        if (ret == -ENOSPC) {
            note_no_extent(st);
        } else if (ret == 0) {
            ret = thinvm_store_take_metadata(st, &op);
            if (ret < 0) {
                thinvm_store_unreserve(st, op.physical, op.count);
            }
        }
    }
    qemu_co_mutex_unlock(&st->grow_lock);
    return ret < 0 ? ret : wanted > 0;
}

/*
 * Ahead of need it is the worker's business: a request that came by would
 * have to wait for all of it.  What fails is tried again with the next tick,
 * or by whoever cannot do without.
 */
bool thinvm_store_extend_later(ThinvmStore *st)
{
    return st->kick && !qatomic_xchg(&st->extension_due, true);
}

void coroutine_fn thinvm_store_extend_ahead(ThinvmStore *st)
{
    int ret = 1;

    if (!qatomic_read(&st->extension_due)) {
        return;
    }
    for (int i = 0; ret > 0 && i < THINVM_METADATA_STEPS; i++) {
        ret = thinvm_store_extend_metadata(st);
    }
    if (ret >= 0) {
        qatomic_set(&st->extension_due, false);
    }
}
