/*
 * thinvm durability: compaction, so that the device may become smaller
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Durability layer.  Moves what lies highest to free clusters further down:
 * data clusters of all trees, and metadata pages.  It goes in passes:
 *
 *   1. Plan.  If all that is in use lay at the start of the device, it would
 *      end at the limit.  Metadata extents behind it are retired, after others
 *      were taken below it where there is need, and a checkpoint makes clean
 *      what lies in them.
 *   2. Scan all trees.  A stretch of a leaf that names clusters behind the
 *      limit, or to which pages in retired extents lead, is moved in one go in
 *      all trees (move_stretch()), so that what was shared is so again.
 *   3. Pages that no operation leads to get other places.
 *   4. After two checkpoints no base names a page in a retired extent: it is
 *      given back.  After two more no base knows it as an extent, and its
 *      clusters may be used for anything else.
 *
 * and again until that brings no more.  Nothing is planned on the device, so
 * a crash anywhere leaves an image of which some has been moved.
 *
 * Data are copied first, then an operation makes a tree name the copy, as a
 * write into a shared cluster does (invariants 1 and 4).  What may be written
 * in place must not be meanwhile: that is what the caller's locks are for.
 * What a snapshot names cannot change, and neither a copy nor what it was made
 * of is given to others during a request (invariant 2), so within one
 * the same pair serves all trees.
 *
 * Shrinking is an operation.  Before the device may be cut there must be no
 * base left that would not open on it.
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qapi/qapi-types-block-core.h"
#include "qemu/lockable.h"
#include "store-int.h"
#include "trace.h"

/* Bytes of data that move in one go: writers of these wait so long */
#define THINVM_COMPACT_STRETCH  (4 * MiB)
/* Passes at most; the second one is for what the first one freed */
#define THINVM_COMPACT_PASSES   16
/* Others hold what is free below the limit, say while it is discarded */
#define THINVM_COMPACT_WAITS    50
#define THINVM_COMPACT_WAIT_NS  (20 * SCALE_MS)
/* A snapshot that changes while it is looked at: give it up for this pass */
#define THINVM_COMPACT_RETRIES  (4 * THINVM_ENTRIES_PER_LEAF)

typedef enum CompactPhase {
    COMPACT_PLAN,
    COMPACT_SCAN,
    COMPACT_REWRITE,
    COMPACT_RELEASE,
    COMPACT_DONE,
} CompactPhase;

/* @nb clusters of data at @from are at @to, too */
typedef struct Move {
    uint64_t from, to, nb;
} Move;

struct ThinvmCompact {
    ThinvmStore *st;
    ThinvmCompactLocks locks;
    CompactPhase phase;
    unsigned pass, waits;
    uint64_t limit;                 /* clusters */
    bool progress;                  /* something was moved in this pass */
    bool full;                      /* no free cluster below the limit */
    /* where the scan is */
    int tree;
    uint64_t holder, guest;
    GHashTable *seen;               /* pages of level 1 that are done with */
    /* the stretch that is being moved */
    GArray *moves;                  /* Move */
    GHashTable *former;             /* page number -> holder that had it */
    uint8_t *buf;
    uint64_t rewrite_cluster;
    uint32_t rewrite_slot;
    ThinvmCompactStatus status;
};

/* ------------------------------------------------------------------ */
/* Questions to the engine, with the pages read                        */

static int step_high_water(ThinvmState *s, void *opaque, ThinvmNeeds *needs)
{
    return thinvm_state_high_water(s, opaque, needs);
}

int coroutine_fn thinvm_store_high_water(ThinvmStore *st, uint64_t *bytes)
{
    unsigned token = thinvm_store_request_begin(st);
    uint64_t end = 0;
    int ret = thinvm_store_ask(st, step_high_water, &end, NULL);

    thinvm_store_request_end(st, token);
    *bytes = end << st->cluster_bits;
    return ret;
}

typedef struct Look {
    ThinvmCompact *c;
    uint64_t holder;
    ThinvmRelocation *r;
} Look;

static int step_look(ThinvmState *s, void *opaque, ThinvmNeeds *needs)
{
    Look *l = opaque;
    ThinvmRelocation r = { .guest = l->r->guest };
    int ret = thinvm_compact_look(s, l->c->tree, l->holder, l->c->limit, &r,
                                  needs);

    if (ret == 0) {
        *l->r = r;
    }
    return ret;
}

static int coroutine_fn look(ThinvmCompact *c, uint64_t holder, uint64_t guest,
                             ThinvmRelocation *r, Error **errp)
{
    Look l = { .c = c, .holder = holder, .r = r };

    *r = (ThinvmRelocation) { .guest = guest };
    return thinvm_store_ask(c->st, step_look, &l, errp);
}

typedef struct Count {
    uint64_t cluster;
    uint16_t count;
} Count;

static int step_count(ThinvmState *s, void *opaque, ThinvmNeeds *needs)
{
    Count *count = opaque;

    return thinvm_state_cluster_count(s, count->cluster, &count->count, needs);
}

static int coroutine_fn get_count(ThinvmCompact *c, uint64_t cluster,
                                  uint16_t *count, Error **errp)
{
    Count q = { .cluster = cluster };
    int ret = thinvm_store_ask(c->st, step_count, &q, errp);

    *count = q.count;
    return ret;
}

static void get_info(ThinvmStore *st, ThinvmInfoState *info)
{
    ThinvmState *s = thinvm_store_state(st);

    thinvm_state_lock(s);
    thinvm_state_info(s, info);
    thinvm_state_unlock(s);
}

/* ------------------------------------------------------------------ */
/* Moving a stretch                                                    */

/* Not by thinvm_store_pread(), which counts what metadata cost */
static int coroutine_fn copy_data(ThinvmCompact *c, uint64_t from, uint64_t to,
                                  uint64_t bytes)
{
    ThinvmStore *st = c->st;
    int ret;

    thinvm_device_event(st->dev, BLKDBG_COW_READ);
    ret = st->dev->co_pread(st->dev, from, bytes, c->buf);
    if (ret == 0 && qatomic_read(&st->poisoned)) {
        ret = -EIO;             /* the clusters may be somebody else's */
    }
    if (ret == 0) {
        thinvm_device_event(st->dev, BLKDBG_COW_WRITE);
        ret = st->dev->co_pwrite(st->dev, to, bytes, c->buf);
        c->status.copied += bytes;
    }
    return ret;
}

/* Parts that are valid side by side go in one I/O */
static int coroutine_fn copy_parts(ThinvmCompact *c, uint64_t from,
                                   uint64_t to, uint16_t valid)
{
    ThinvmStore *st = c->st;
    unsigned part_bits = st->cluster_bits - ctz32(THINVM_PARTS);
    int ret = 0;

    for (unsigned i = 0; i < THINVM_PARTS && ret == 0;) {
        unsigned n = ctz32(~((uint32_t)valid >> i));
        uint64_t at = (uint64_t)i << part_bits, bytes = (uint64_t)n << part_bits;

        if (n) {
            ret = copy_data(c, (from << st->cluster_bits) + at,
                            (to << st->cluster_bits) + at, bytes);
        }
        i += n ?: 1;
    }
    return ret;
}

static int coroutine_fn copy_clusters(ThinvmCompact *c, uint64_t from,
                                      uint64_t to, uint64_t nb, uint16_t valid,
                                      Error **errp)
{
    ThinvmStore *st = c->st;
    int ret = 0;

    /* Of a shared cluster others may know more parts to be valid */
    for (uint64_t i = 0; i < nb && valid != THINVM_ALL_VALID; i++) {
        uint16_t count;

        ret = get_count(c, from + i, &count, errp);
        if (ret < 0) {
            return ret;
        }
        if (count > 1) {
            valid = THINVM_ALL_VALID;
        }
    }
    if (valid == THINVM_ALL_VALID) {
        ret = copy_data(c, from << st->cluster_bits, to << st->cluster_bits,
                        nb << st->cluster_bits);
    }
    for (uint64_t i = 0; i < nb && ret == 0 && valid != THINVM_ALL_VALID;
         i++) {
        ret = copy_parts(c, from + i, to + i, valid);
    }
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not copy clusters %" PRIu64 " to %"
                         PRIu64, from, from + nb - 1);
    }
    return ret;
}

/* Cuts *nb so that all of [from, from + *nb) has been moved, or nothing has */
static Move *find_move(ThinvmCompact *c, uint64_t from, uint64_t *nb)
{
    for (guint i = 0; i < c->moves->len; i++) {
        Move *m = &g_array_index(c->moves, Move, i);

        if (from >= m->from && from < m->from + m->nb) {
            *nb = MIN(*nb, m->from + m->nb - from);
            return m;
        }
        if (m->from > from) {
            *nb = MIN(*nb, m->from - from);
        }
    }
    return NULL;
}

/*
 * Nobody names the copy any more: the snapshot that did was deleted.  It will
 * be given to others, so the next one needs another.
 */
static bool coroutine_fn forget_move(ThinvmCompact *c, Move *known,
                                     uint64_t nb)
{
    uint16_t count = 1;

    for (uint64_t i = 0; i < nb && count; i++) {
        if (get_count(c, known->to + i, &count, NULL) < 0) {
            return false;
        }
    }
    if (count) {
        return false;
    }
    known->nb = 0;
    return true;
}

/*
 * Entries of one tree go over to other clusters.  @r->count is cut to those
 * that did; 0: there is no room.
 */
static int coroutine_fn relocate(ThinvmCompact *c, uint64_t holder,
                                 ThinvmRelocation *r, Error **errp)
{
    ThinvmStore *st = c->st;
    Move *known = find_move(c, r->physical, &r->count);
    Move m = { .from = r->physical };
    Error *local_err = NULL;
    bool applied;
    ThinvmOp op = {
        .type = THINVM_OP_RELOCATE,
        .tree = c->tree,
        .source = known ? 1 : 0,
        .guest = r->guest,
        .value = thinvm_relocate_value(holder, r->physical),
    };
    int ret = 0;

    if (known) {
        m.to = known->to + (r->physical - known->from);
        m.nb = r->count;
    } else {
        ret = thinvm_store_reserve_below(st, c->limit, r->count, &m.to, &m.nb);
        if (ret == -ENOSPC) {
            c->full = true;
            r->count = 0;
            return 0;
        }
        if (ret < 0) {
            error_setg_errno(errp, -ret, "Could not find free clusters");
            return ret;
        }
        ret = copy_clusters(c, m.from, m.to, m.nb, r->valid, &local_err);
    }
    op.physical = m.to;
    op.count = r->count = m.nb;
    if (ret == 0) {
        ret = thinvm_store_execute_telling(st, &op, &local_err);
    }
    if (ret == -EBADMSG && known && forget_move(c, known, known->nb)) {
        error_free(local_err);
        return 0;
    }
    error_propagate(errp, local_err);
    applied = ret == 0;
    ret = ret == -EALREADY ? 0 : ret;
    if (known) {
        return ret;
    }
    if (!applied) {
        /*
         * Say, the snapshot was deleted while we copied.  (If it is deleted
         * now that it names the copy, that is in quarantine, and no more ours
         * to give back.)
         */
        thinvm_store_unreserve(st, m.to, m.nb);
    } else {
        g_array_append_val(c->moves, m);
        c->progress = true;
        c->status.moved += m.nb << st->cluster_bits;
    }
    return ret;
}

/* The tree of @holder had these pages, others may have had them too */
static void remember_pages(ThinvmCompact *c, uint64_t holder,
                           const ThinvmRelocation *before)
{
    for (int level = 0; level <= THINVM_INNER_LEVELS; level++) {
        gpointer key = (gpointer)(uintptr_t)before->page[level];

        if (key && !g_hash_table_contains(c->former, key)) {
            g_hash_table_insert(c->former, key,
                                (gpointer)(uintptr_t)holder);
        }
    }
}

/* Where it had a page in common with a snapshot that was moved before */
static int coroutine_fn share_again(ThinvmCompact *c, uint64_t holder,
                                    const ThinvmRelocation *before,
                                    Error **errp)
{
    for (int level = THINVM_INNER_LEVELS; level >= 0; level--) {
        gpointer key = (gpointer)(uintptr_t)before->page[level];
        uint64_t other = (uintptr_t)g_hash_table_lookup(c->former, key);
        ThinvmOp op = {
            .type = THINVM_OP_SHARE,
            .tree = c->tree,
            .guest = before->guest,
            .count = level,
            .value = holder,
            .physical = other,
        };

        if (key && other && other != holder) {
            return thinvm_store_execute(c->st, &op, NULL, errp);
        }
    }
    return 0;
}

/* All in [guest, end) that one tree has behind the limit.  1: it changed */
static int coroutine_fn move_in_tree(ThinvmCompact *c, uint64_t holder,
                                     uint64_t guest, uint64_t end,
                                     ThinvmRelocation *before, Error **errp)
{
    bool changed = false;
    uint64_t at = guest;
    int ret = look(c, holder, guest, before, errp);

    for (int i = 0; ret == 0 && at < end && i < THINVM_COMPACT_RETRIES; i++) {
        ThinvmRelocation r;

        ret = look(c, holder, at, &r, errp);
        if (ret < 0 || !r.count || r.guest >= end) {
            break;
        }
        r.count = MIN(r.count, end - r.guest);
        ret = relocate(c, holder, &r, errp);
        if (ret == 0 && !r.count) {
            break;
        }
        changed |= ret == 0;
        at = r.guest;       /* if it was not moved after all: once more */
    }
    if (ret == 0 && !changed && before->retired) {
        ThinvmOp op = {
            .type = THINVM_OP_RELOCATE,
            .tree = c->tree,
            .guest = guest,
            .value = thinvm_relocate_value(holder, 0),
        };

        ret = thinvm_store_execute(c->st, &op, NULL, errp);
        changed = ret == 0;
    }
    before->guest = guest;
    return ret < 0 ? ret : changed;
}

/* An error that concerns one tree only, and the next pass may not meet */
static bool may_skip(int ret, Error **err)
{
    if (ret != -ENOENT && ret != -EBUSY) {
        return false;
    }
    error_free(*err);
    *err = NULL;
    return true;
}

/*
 * [guest, end), within one leaf, in all trees of the kind.  The active one
 * comes first, see relocate.c, and shares with the snapshots last: it may
 * be written meanwhile where we have not locked.
 */
static int coroutine_fn move_stretch(ThinvmCompact *c, uint64_t guest,
                                     uint64_t end, Error **errp)
{
    ThinvmRelocation active, before;
    Error *local_err = NULL;
    bool active_changed = false;
    uint32_t slots;
    int ret;

    thinvm_state_lock(thinvm_store_state(c->st));
    slots = thinvm_snapshot_nb_slots(thinvm_store_state(c->st));
    thinvm_state_unlock(thinvm_store_state(c->st));
    g_array_set_size(c->moves, 0);
    g_hash_table_remove_all(c->former);

    ret = move_in_tree(c, THINVM_HOLDER_ACTIVE, guest, end, &active,
                       &local_err);
    active_changed = ret == 1;
    for (uint64_t holder = 1; ret >= 0 && holder <= slots; holder++) {
        ret = move_in_tree(c, holder, guest, end, &before, &local_err);
        if (ret == 1) {
            ret = share_again(c, holder, &before, &local_err);
            remember_pages(c, holder, &before);
        }
        if (ret < 0 && may_skip(ret, &local_err)) {
            ret = 0;
        }
    }
    if (ret >= 0 && active_changed) {
        ret = share_again(c, THINVM_HOLDER_ACTIVE, &active, &local_err);
    }
    trace_thinvm_compact_stretch(c->st, c->tree, guest, end, c->moves->len,
                                 slots, ret);
    if (ret == -ENOSPC) {
        /* for metadata: what was moved so far is right, and stays */
        error_free(local_err);
        c->full = true;
        return 0;
    }
    error_propagate(errp, local_err);
    return MIN(ret, 0);
}

/* ------------------------------------------------------------------ */
/* Plan                                                                */

static int coroutine_fn checkpoints(ThinvmStore *st, int nb, Error **errp)
{
    int ret = 0;

    for (int i = 0; i < nb && ret == 0; i++) {
        ret = thinvm_store_checkpoint_anew(st);
    }
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not write a checkpoint");
    }
    return ret;
}

/* Metadata space below the limit: 1; 0: there is no room for it */
static int coroutine_fn extend_below(ThinvmCompact *c, uint64_t pages)
{
    ThinvmStore *st = c->st;
    unsigned bits = st->cluster_bits - THINVM_PAGE_BITS;
    ThinvmOp op = { .type = THINVM_OP_META_EXTEND };
    uint64_t wanted = MIN(DIV_ROUND_UP(pages, 1u << bits),
                          THINVM_EXTENT_MAX_PAGES >> bits);
    int ret;

    qemu_co_mutex_lock(&st->grow_lock);
    ret = thinvm_store_reserve_extent(st, c->limit, wanted, &op.physical,
                                      &op.count);
    if (ret == 0) {
        ret = thinvm_store_take_metadata(st, &op);
        if (ret < 0) {
            thinvm_store_unreserve(st, op.physical, op.count);
        }
    }
    qemu_co_mutex_unlock(&st->grow_lock);
    return ret == 0;
}

static void coroutine_fn retire_extents(ThinvmCompact *c)
{
    ThinvmState *s = thinvm_store_state(c->st);
    uint64_t missing;
    bool retired;

    do {
        thinvm_state_lock(s);
        retired = thinvm_compact_retire(s, c->limit, &missing);
        thinvm_state_unlock(s);
    } while (retired || (missing && extend_below(c, missing)));
}

static void reinstate(ThinvmStore *st)
{
    unsigned token = thinvm_store_request_begin(st);
    ThinvmState *s = thinvm_store_state(st);

    thinvm_state_lock(s);
    thinvm_compact_reinstate(s);
    thinvm_state_unlock(s);
    thinvm_store_request_end(st, token);
}

/* What was freed is no more in the way once that is durable */
static int coroutine_fn settle(ThinvmStore *st, Error **errp)
{
    int ret = thinvm_store_commit(st, THINVM_COMMIT_DURABLE, false);

    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not commit to the image");
        return ret;
    }
    return thinvm_store_reclaim(st, st->discard);
}

static int coroutine_fn plan(ThinvmCompact *c, Error **errp)
{
    ThinvmInfoState info;
    uint64_t high = 0;
    bool stuck = c->pass && !c->progress;
    int ret;

    if (stuck && c->full && c->waits < THINVM_COMPACT_WAITS) {
        /* There is as much room as there is to move, so somebody holds it */
        qemu_co_sleep_ns(QEMU_CLOCK_REALTIME, THINVM_COMPACT_WAIT_NS);
        c->waits++;
        c->pass--;
        stuck = false;
    }
    ret = settle(c->st, errp);
    if (ret == 0) {
        ret = thinvm_store_ask(c->st, step_high_water, &high, errp);
    }
    if (ret < 0) {
        return ret;
    }
    get_info(c->st, &info);
    c->limit = info.device_clusters - info.free_clusters;
    c->status.high_water = high << c->st->cluster_bits;
    if (high <= c->limit || c->pass == THINVM_COMPACT_PASSES || stuck) {
        c->phase = COMPACT_DONE;
        return 0;
    }
    if (!c->status.total) {
        c->status.total = (high - c->limit) << c->st->cluster_bits;
    }
    c->pass++;
    c->progress = false;
    c->full = false;
    c->tree = 0;
    c->holder = c->guest = 0;
    c->rewrite_cluster = c->rewrite_slot = 0;
    g_hash_table_remove_all(c->seen);
    retire_extents(c);
    trace_thinvm_compact_pass(c->st, c->pass, high, c->limit);
    c->phase = COMPACT_SCAN;
    return checkpoints(c->st, 1, errp);
}

/* ------------------------------------------------------------------ */
/* Scan                                                                */

static void next_tree(ThinvmCompact *c)
{
    uint32_t slots;

    thinvm_state_lock(thinvm_store_state(c->st));
    slots = thinvm_snapshot_nb_slots(thinvm_store_state(c->st));
    thinvm_state_unlock(thinvm_store_state(c->st));
    c->guest = 0;
    if (++c->holder > slots) {
        c->holder = 0;
        c->tree++;
    }
    if (c->tree == THINVM_NB_TREES) {
        c->tree = 0;
        c->phase = COMPACT_REWRITE;
    }
}

/* Guest clusters of a page of level 1 */
#define LEVEL1_SPAN     (THINVM_ENTRIES_PER_LEAF * THINVM_POINTERS_PER_PAGE)

/* A page that another tree has as well was looked at there */
static bool was_seen(ThinvmCompact *c, const ThinvmRelocation *r)
{
    gpointer key = (gpointer)(uintptr_t)r->page[1];

    if (!key) {
        return false;
    }
    if (c->guest % LEVEL1_SPAN == 0 && g_hash_table_contains(c->seen, key)) {
        c->guest += LEVEL1_SPAN;
        return true;
    }
    if (r->next % LEVEL1_SPAN == 0) {
        g_hash_table_add(c->seen, key);
    }
    return false;
}

static int coroutine_fn scan(ThinvmCompact *c, Error **errp)
{
    uint64_t most = MAX(1, THINVM_COMPACT_STRETCH >> c->st->cluster_bits);
    unsigned token = thinvm_store_request_begin(c->st);
    ThinvmRelocation r;
    uint64_t guest, end;
    bool skip = false;
    int ret = look(c, c->holder, c->guest, &r, errp);

    if (ret == 0 && !r.count && !r.retired) {
        skip = was_seen(c, &r);
    }
    if (ret == -ENOENT) {
        next_tree(c);
        ret = 0;
    } else if (ret == 0 && (r.count || r.retired) && !c->full) {
        guest = r.count ? r.guest : c->guest;
        end = MIN(r.next, guest + most);
        c->locks.lock(c->locks.opaque, c->tree, guest, end - guest);
        ret = move_stretch(c, guest, end, errp);
        c->locks.unlock(c->locks.opaque);
        /* a path without clusters to move is done with in one go */
        c->guest = r.count ? end : r.next;
    } else if (ret == 0 && !skip) {
        c->guest = r.next;
    }
    if (c->full) {
        c->phase = COMPACT_REWRITE;
    } else if (c->guest >= THINVM_MAX_GUEST_CLUSTERS) {
        next_tree(c);
    }
    thinvm_store_request_end(c->st, token);
    return ret;
}

/* ------------------------------------------------------------------ */
/* The rest                                                            */

static int step_rewrite(ThinvmState *s, void *opaque, ThinvmNeeds *needs)
{
    ThinvmCompact *c = opaque;

    return thinvm_compact_rewrite(s, &c->rewrite_cluster, &c->rewrite_slot,
                                  needs);
}

static int coroutine_fn rewrite(ThinvmCompact *c, Error **errp)
{
    ThinvmInfoState info;
    int ret = 0;

    get_info(c->st, &info);
    if (info.dirty_pages >= info.dirty_bound) {
        ret = checkpoints(c->st, 1, errp);
    }
    if (ret == 0) {
        ret = thinvm_store_ask(c->st, step_rewrite, c, errp);
    }
    if (ret == 0 || ret == -ENOSPC) {
        c->phase = COMPACT_RELEASE;
    }
    return ret == -ENOSPC ? 0 : MIN(ret, 0);
}

static int step_release(ThinvmState *s, void *opaque, ThinvmNeeds *needs)
{
    return thinvm_compact_release(s, opaque, needs);
}

static int coroutine_fn release(ThinvmCompact *c, Error **errp)
{
    g_autoptr(GArray) ranges = g_array_new(false, false,
                                           sizeof(ThinvmFreedRange));
    ThinvmStore *st = c->st;
    ThinvmFreedRange range;
    int ret = checkpoints(st, 2, errp);

    if (ret < 0) {
        return ret;
    }
    while ((ret = thinvm_store_ask(st, step_release, &range, errp)) == 0) {
        g_array_append_val(ranges, range);
        c->progress = true;
    }
    reinstate(st);
    if (ret == -ENOENT || ret == -ENOSPC) {
        ret = ranges->len ? checkpoints(st, 2, errp) : 0;
    }
    if (ret == 0) {
        thinvm_discard_join(ranges);
        if (st->discard) {
            thinvm_discard_ranges(st, ranges);
        }
    }
    for (guint i = 0; i < ranges->len && ret == 0; i++) {
        range = g_array_index(ranges, ThinvmFreedRange, i);
        trace_thinvm_compact_release(st, range.first, range.nb_clusters);
        thinvm_store_unreserve(st, range.first, range.nb_clusters);
    }
    c->phase = COMPACT_PLAN;
    return ret;
}

/* ------------------------------------------------------------------ */

ThinvmCompact *thinvm_compact_new(ThinvmStore *st,
                                  const ThinvmCompactLocks *locks)
{
    ThinvmCompact *c = g_new0(ThinvmCompact, 1);

    c->st = st;
    c->locks = *locks;
    c->seen = g_hash_table_new(NULL, NULL);
    c->former = g_hash_table_new(NULL, NULL);
    c->moves = g_array_new(false, false, sizeof(Move));
    c->buf = g_malloc(MAX(THINVM_COMPACT_STRETCH, 1u << st->cluster_bits));
    return c;
}

void thinvm_compact_free(ThinvmCompact *c)
{
    reinstate(c->st);
    g_hash_table_unref(c->seen);
    g_hash_table_unref(c->former);
    g_array_unref(c->moves);
    g_free(c->buf);
    g_free(c);
}

void thinvm_compact_status(const ThinvmCompact *c, ThinvmCompactStatus *status)
{
    *status = c->status;
}

int coroutine_fn thinvm_compact_step(ThinvmCompact *c, bool *done,
                                     Error **errp)
{
    int ret = thinvm_store_may_write(c->st);

    *done = false;
    if (ret < 0) {
        error_setg_errno(errp, -ret, "The image is not open for writing");
        return ret;
    }
    switch (c->phase) {
    case COMPACT_PLAN:
        ret = plan(c, errp);
        break;
    case COMPACT_SCAN:
        ret = scan(c, errp);
        break;
    case COMPACT_REWRITE:
        ret = rewrite(c, errp);
        break;
    case COMPACT_RELEASE:
        ret = release(c, errp);
        break;
    case COMPACT_DONE:
        break;
    }
    if (ret < 0 && errp && !*errp) {
        error_setg_errno(errp, -ret, "Could not compact the image");
    }
    *done = c->phase == COMPACT_DONE;
    return ret;
}

/* ------------------------------------------------------------------ */
/* Shrink                                                              */

/* What requests hold behind the new end for a moment comes back */
#define THINVM_SHRINK_ATTEMPTS  100
#define THINVM_SHRINK_WAIT_NS   (20 * SCALE_MS)

static int coroutine_fn shrink_once(ThinvmStore *st, uint64_t size,
                                    Error **errp)
{
    ThinvmState *s = thinvm_store_state(st);
    ThinvmOp op = { .type = THINVM_OP_SHRINK };
    uint64_t high = 0;
    int ret = settle(st, errp);

    thinvm_state_lock(s);
    thinvm_space_stop_reserving(s);
    thinvm_state_unlock(s);
    if (ret == 0) {
        ret = thinvm_store_ask(st, step_high_water, &high, errp);
    }
    if (ret < 0) {
        return ret;
    }
    if (size && size < high << st->cluster_bits) {
        error_setg(errp, "The image uses its device up to byte %" PRIu64
                   "; it cannot shrink to %" PRIu64 " (thinvm-compact moves "
                   "what lies highest)", high << st->cluster_bits, size);
        return -EINVAL;
    }
    op.value = size ? size >> st->cluster_bits : high;
    return thinvm_store_execute_internal(st, &op, false, true, NULL, errp);
}

/*
 * The image has given up what lies behind @size; grow_lock is held, lest
 * somebody who waits for it grows before the device is cut off, or is refused
 * although it will be.
 */
static int coroutine_fn give_up_end(ThinvmStore *st, uint64_t size,
                                    ThinvmStoreCut *cut, void *opaque,
                                    Error **errp)
{
    int64_t length = st->dev->co_length(st->dev);
    int ret;

    /* If there is nothing to cut off, the length will never change */
    if (length > 0 && length > size) {
        qatomic_set(&st->shrunk_length, length);
    }
    /* Both bases must open on a device that is no longer than this */
    ret = checkpoints(st, 2, errp);
    if (ret < 0) {
        thinvm_store_forget_shrink(st);
        return ret;
    }
    ret = cut(opaque, size);
    if (ret < 0 && ret != -ENOTSUP) {
        /* It stays as it is, and whoever cuts devices off is not asked */
        thinvm_store_forget_shrink(st);
    }
    return 0;
}

int coroutine_fn thinvm_store_shrink(ThinvmStore *st, uint64_t size,
                                     ThinvmStoreCut *cut, void *opaque,
                                     uint64_t *result, Error **errp)
{
    Error *local_err = NULL;
    ThinvmInfoState info;
    int ret = thinvm_store_may_write(st);

    if (ret < 0) {
        error_setg_errno(errp, -ret, "The image is not open for writing");
        return ret;
    }
    qemu_co_mutex_lock(&st->grow_lock);
    get_info(st, &info);
    if (size >> st->cluster_bits > info.device_clusters) {
        error_setg(&local_err, "The image uses %" PRIu64 " bytes of its "
                   "device; to %" PRIu64 " it would have to grow",
                   info.device_clusters << st->cluster_bits, size);
        ret = -EINVAL;
    }
    for (int i = 0; ret == 0 && i < THINVM_SHRINK_ATTEMPTS; i++) {
        ret = shrink_once(st, size, &local_err);
        if (ret != -EBUSY || i == THINVM_SHRINK_ATTEMPTS - 1) {
            break;
        }
        error_free(g_steal_pointer(&local_err));
        /* Who holds some may want to grow for the rest of what it needs */
        qemu_co_mutex_unlock(&st->grow_lock);
        qemu_co_sleep_ns(QEMU_CLOCK_REALTIME, THINVM_SHRINK_WAIT_NS);
        qemu_co_mutex_lock(&st->grow_lock);
        ret = 0;
    }
    get_info(st, &info);
    *result = info.device_clusters << st->cluster_bits;
    if (ret == 0) {
        ret = give_up_end(st, *result, cut, opaque, &local_err);
    }
    qemu_co_mutex_unlock(&st->grow_lock);
    error_propagate(errp, local_err);
    trace_thinvm_shrink(st, size, *result, ret);
    return ret;
}
