/*
 * thinvm metadata engine: other clusters for what is mapped
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Engine layer.  What compaction needs: store-compact.c decides what moves.
 *
 * A cluster may be named by leaves of several trees, and a page by several
 * parents.  There is no way back from a cluster to these, and to change all
 * of them at once would not be bounded.  So each tree is changed by itself:
 *
 *  - RELOCATE makes entries of one tree name the new clusters.  The pages on
 *    the way become this tree's own, as with any change.
 *  - SHARE then finds that two trees have pages that say the same, and makes
 *    one of them do.  It changes nothing that anybody can read.
 *
 * Each of these leaves a state that is right (invariant 4); at most, when a
 * crash or an error ends it half-way, less is shared than could be.
 *
 * An entry without "possibly shared" in a page that only the active disk has
 * is believed to be private.  A copy of a shared page gets the flags, what
 * remains does not; so when a snapshot's tree is changed, no page that gets
 * copied may be the active tree's too.  Whoever relocates begins with the
 * active tree; the other order is refused.  And an active tree that shares a
 * snapshot's page looks at the counts, as after going back to a snapshot.
 *
 * Extents of metadata pages are given back in checkpoints alone, without an
 * operation: see thinvm_compact_release().
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "map.h"

#define LEAF_MASK   (THINVM_ENTRIES_PER_LEAF - 1)

/* ------------------------------------------------------------------ */
/* Trees by holder                                                     */

static int holder_root(ThinvmState *s, int tree, uint64_t holder, bool touch,
                       ThinvmNeeds *needs, const ThinvmPointerLe **root)
{
    if (holder == THINVM_HOLDER_ACTIVE) {
        *root = &s->root[tree];
        return 0;
    }
    return thinvm_snapshot_root(s, holder - 1, tree, touch, needs, root);
}

static ThinvmPointerLe *writable_root(ThinvmState *s, int tree,
                                      uint64_t holder)
{
    return holder == THINVM_HOLDER_ACTIVE ? &s->root[tree] :
           thinvm_snapshot_writable_root(s, holder - 1, tree);
}

/* Is it the number of a page on the active tree's way to @guest? */
static int active_has_page(ThinvmState *s, int tree, uint64_t guest,
                           int level, uint64_t number, ThinvmNeeds *needs)
{
    const ThinvmPointerLe *slot = &s->root[tree];

    for (int l = THINVM_INNER_LEVELS;
         thinvm_slot_type(slot) == THINVM_PTR_PAGE; l--) {
        ThinvmPage *page;

        if (l == level) {
            return thinvm_slot_address(slot) == number;
        }
        page = thinvm_page_get(s, slot, thinvm_map_kind(l), l, needs);
        if (!page) {
            return -EAGAIN;
        }
        slot = &thinvm_page_slots(page)[thinvm_map_index(guest, l)];
    }
    return 0;
}

/*
 * The pages from @root down to that of @bottom, or as far as there are any,
 * will be this holder's own.  0, -EAGAIN, -EBUSY: one is the active tree's.
 */
static int need_own_path(ThinvmState *s, const ThinvmPointerLe *root, int tree,
                         uint64_t holder, uint64_t guest, int bottom,
                         ThinvmNeeds *needs, const ThinvmPointerLe **end)
{
    const ThinvmPointerLe *slot = root;
    bool shared = false;
    int ret = 0, has;

    for (int level = THINVM_INNER_LEVELS;
         level >= bottom && thinvm_slot_type(slot) == THINVM_PTR_PAGE;
         level--) {
        ThinvmPage *page = thinvm_page_get(s, slot, thinvm_map_kind(level),
                                           level, needs);

        if (!page) {
            return -EAGAIN;
        }
        shared |= *page->count > 1;
        if (*page->count > 1 && holder != THINVM_HOLDER_ACTIVE) {
            has = active_has_page(s, tree, guest, level, page->number, needs);
            if (has) {
                return has < 0 ? has : -EBUSY;
            }
        }
        thinvm_page_touch(s, page, shared);
        if (shared && thinvm_map_need_copy(s, page, needs) < 0) {
            ret = -EAGAIN;
        }
        if (level == 0) {
            break;
        }
        slot = &thinvm_page_slots(page)[thinvm_map_index(guest, level)];
    }
    if (end) {
        *end = slot;
    }
    return ret;
}

/* ------------------------------------------------------------------ */
/* RELOCATE                                                            */

static int prepare_entries(ThinvmState *s, const ThinvmOp *op,
                           const ThinvmPointerLe *root, ThinvmNeeds *needs)
{
    uint64_t former = op->value & THINVM_CLUSTER_MASK;
    unsigned index = op->guest & LEAF_MASK;
    ThinvmPathEnd end;
    int ret, ret2;

    ret = thinvm_count_expect(s, op->physical, op->count, op->source ? 1 : 0,
                              op->source ? THINVM_COUNT_MAX - 1 : 0, needs);
    if (ret == -EBADMSG) {
        return ret;
    }
    ret2 = thinvm_map_need_path(s, root, op->guest, 0, needs, &end);
    if (ret < 0 || ret2 < 0) {
        return -EAGAIN;
    }
    for (uint64_t i = 0; i < op->count; i++) {
        if (thinvm_entry_physical(thinvm_map_end_entry(&end, index + i)) !=
            former + i) {
            return -EALREADY;
        }
    }
    return thinvm_map_need_end_counts(s, &end, index, index + op->count,
                                      needs);
}

static int prepare_relocate(ThinvmState *s, const ThinvmOp *op,
                            ThinvmNeeds *needs)
{
    uint64_t holder = op->value >> THINVM_HOLDER_SHIFT;
    const ThinvmPointerLe *root;
    int ret = holder_root(s, op->tree, holder, true, needs, &root);

    if (ret == -ENOENT) {
        return -EALREADY;
    }
    if (ret == 0) {
        ret = need_own_path(s, root, op->tree, holder, op->guest, 0, needs,
                            NULL);
    }
    if (ret < 0 || !op->count) {
        return ret;
    }
    /* The same way once more: what was touched is not counted again */
    return prepare_entries(s, op, root, needs);
}

/* All pages on the way get places of this tree's own */
static void own_path(ThinvmState *s, ThinvmPointerLe *slot, uint64_t guest)
{
    for (int level = THINVM_INNER_LEVELS;
         thinvm_slot_type(slot) == THINVM_PTR_PAGE; level--) {
        ThinvmPage *page = thinvm_map_writable_child(s, slot, level);

        if (level == 0) {
            break;
        }
        slot = &thinvm_page_slots(page)[thinvm_map_index(guest, level)];
    }
}

static void apply_relocate(ThinvmState *s, const ThinvmOp *op)
{
    uint64_t former = op->value & THINVM_CLUSTER_MASK;
    ThinvmPointerLe *root = writable_root(s, op->tree,
                                          op->value >> THINVM_HOLDER_SHIFT);
    ThinvmPage *leaf;

    if (!op->count) {
        own_path(s, root, op->guest);
        return;
    }
    leaf = thinvm_map_writable_path(s, root, op->tree, op->guest, 0);
    for (uint64_t i = 0; i < op->count; i++) {
        uint64_t *at = &leaf->data[(op->guest & LEAF_MASK) + i];
        uint64_t entry = (le64_to_cpu(*at) & ~THINVM_CLUSTER_MASK) |
                         (op->physical + i);

        if (op->source) {
            entry |= THINVM_ENTRY_SHARED;
        }
        qatomic_set(at, cpu_to_le64(entry));
    }
    thinvm_count_change(s, op->physical, op->count, THINVM_COUNT_INC);
    if (!op->source) {
        thinvm_space_clear_busy(s, op->physical, op->count);
    }
    thinvm_count_change(s, former, op->count, THINVM_COUNT_DEC);
}

/* ------------------------------------------------------------------ */
/* SHARE                                                               */

static bool slots_equal(const ThinvmPointerLe *a, const ThinvmPointerLe *b)
{
    const uint64_t mask = THINVM_CLUSTER_MASK |
                          15ULL << THINVM_PTR_TYPE_SHIFT;

    return !((thinvm_slot_word(a) ^ thinvm_slot_word(b)) & mask);
}

/* 1: they say the same but for "shared"; 0: not so; -EAGAIN */
static int say_the_same(ThinvmState *s, const ThinvmPointerLe *a,
                        const ThinvmPointerLe *b, int level, uint64_t guest,
                        ThinvmNeeds *needs)
{
    ThinvmPage *p, *q;
    unsigned index;

    if (slots_equal(a, b)) {
        return 1;
    }
    if (thinvm_slot_type(a) != THINVM_PTR_PAGE ||
        thinvm_slot_type(b) != THINVM_PTR_PAGE) {
        return 0;
    }
    p = thinvm_page_get(s, a, thinvm_map_kind(level), level, needs);
    q = thinvm_page_get(s, b, thinvm_map_kind(level), level, needs);
    if (!p || !q) {
        return -EAGAIN;
    }
    if (level == 0) {
        for (unsigned i = 0; i < THINVM_ENTRIES_PER_LEAF; i++) {
            if ((p->data[i] ^ q->data[i]) & ~cpu_to_le64(THINVM_ENTRY_SHARED)) {
                return 0;
            }
        }
        return 1;
    }
    index = thinvm_map_index(guest, level);
    for (unsigned i = 0; i < THINVM_POINTERS_PER_PAGE; i++) {
        if (i != index && !slots_equal(&thinvm_page_slots(p)[i],
                                       &thinvm_page_slots(q)[i])) {
            return 0;
        }
    }
    return say_the_same(s, &thinvm_page_slots(p)[index],
                        &thinvm_page_slots(q)[index], level - 1, guest, needs);
}

/* The pointer at @level on the way to @guest; NULL with -EAGAIN or -ENOENT */
static const ThinvmPointerLe *walk_to(ThinvmState *s,
                                      const ThinvmPointerLe *slot, int level,
                                      uint64_t guest, ThinvmNeeds *needs,
                                      int *ret)
{
    *ret = -ENOENT;
    for (int l = THINVM_INNER_LEVELS;
         thinvm_slot_type(slot) == THINVM_PTR_PAGE; l--) {
        ThinvmPage *page;

        if (l == level) {
            *ret = 0;
            return slot;
        }
        page = thinvm_page_get(s, slot, thinvm_map_kind(l), l, needs);
        if (!page) {
            *ret = -EAGAIN;
            return NULL;
        }
        slot = &thinvm_page_slots(page)[thinvm_map_index(guest, l)];
    }
    return NULL;
}

static bool one_more_is_possible(ThinvmState *s, const ThinvmPointerLe *slot)
{
    uint16_t *count = thinvm_page_count(s, thinvm_slot_address(slot), NULL);

    return count && *count && *count < THINVM_COUNT_MAX;
}

static int prepare_share(ThinvmState *s, const ThinvmOp *op,
                         ThinvmNeeds *needs)
{
    const ThinvmPointerLe *to, *from, *to_root, *from_root;
    int level = op->count;
    int ret = holder_root(s, op->tree, op->value, true, needs, &to_root);

    if (ret == 0) {
        ret = holder_root(s, op->tree, op->physical, false, needs, &from_root);
    }
    if (ret < 0) {
        return ret == -ENOENT ? -EALREADY : ret;
    }
    from = walk_to(s, from_root, level, op->guest, needs, &ret);
    if (from) {
        to = walk_to(s, to_root, level, op->guest, needs, &ret);
    }
    if (ret < 0) {
        return ret == -ENOENT ? -EALREADY : ret;
    }
    if (thinvm_slot_address(to) == thinvm_slot_address(from) ||
        !one_more_is_possible(s, from)) {
        return -EALREADY;
    }
    ret = say_the_same(s, from, to, level, op->guest, needs);
    if (ret <= 0) {
        return ret < 0 ? ret : -EALREADY;
    }
    ret = need_own_path(s, to_root, op->tree, op->value, op->guest, level + 1,
                        needs, &to);
    return ret < 0 ? ret : thinvm_map_need_drop(s, to, level, false, needs);
}

static void apply_share(ThinvmState *s, const ThinvmOp *op)
{
    ThinvmPointerLe *to = writable_root(s, op->tree, op->value);
    const ThinvmPointerLe *from;
    ThinvmNeeds needs;
    uint64_t word;
    uint32_t crc;
    int ret;

    for (int level = THINVM_INNER_LEVELS; level > op->count; level--) {
        to = &thinvm_page_slots(thinvm_map_writable_child(s, to, level))
             [thinvm_map_index(op->guest, level)];
    }
    /* All in memory since prepare */
    thinvm_needs_init(&needs);
    holder_root(s, op->tree, op->physical, false, &needs, &from);
    from = walk_to(s, from, op->count, op->guest, &needs, &ret);
    assert(from && !needs.nb_want && !needs.nb_pinned);
    word = thinvm_slot_word(from);
    crc = thinvm_slot_crc(s, from);
    if (op->value == THINVM_HOLDER_ACTIVE) {
        /* Its entries were private when they were the active disk's */
        word |= THINVM_PTR_SHARED_BELOW;
    }
    thinvm_page_ref(s, thinvm_slot_address(from));
    thinvm_map_drop(s, to, op->count);
    thinvm_slot_set(to, word, crc, 0);
    thinvm_map_short_cut_clear(s);
}

/* ------------------------------------------------------------------ */

int thinvm_relocate_prepare(ThinvmState *s, const ThinvmOp *op, bool replay,
                            ThinvmNeeds *needs, Error **errp)
{
    int ret = op->type == THINVM_OP_RELOCATE ? prepare_relocate(s, op, needs)
                                             : prepare_share(s, op, needs);

    if (ret == -EBUSY && replay) {
        ret = -EBADMSG;
    }
    if (ret == -EBADMSG || ret == -EBUSY) {
        error_setg(errp, "operation %d at guest cluster %" PRIu64 " of tree %u "
                   "is not possible in this state", op->type, op->guest,
                   op->tree);
    }
    return ret;
}

void thinvm_relocate_apply(ThinvmState *s, const ThinvmOp *op)
{
    if (op->type == THINVM_OP_RELOCATE) {
        apply_relocate(s, op);
    } else {
        apply_share(s, op);
    }
}

/* ------------------------------------------------------------------ */
/* What is to be moved                                                 */

static bool page_is_settled(ThinvmState *s, uint64_t number)
{
    ThinvmPage *page = thinvm_page_find(s, number);

    /* One that the next base will put there has to wait for that */
    return !thinvm_page_is_retired(s, number) ||
           (page && thinvm_page_writable(s, page));
}

static void look_at_leaf(const ThinvmPathEnd *end, uint64_t limit,
                         ThinvmRelocation *r)
{
    for (unsigned i = r->guest & LEAF_MASK; i <= LEAF_MASK; i++) {
        uint64_t entry = thinvm_map_end_entry(end, i);

        if (thinvm_entry_physical(entry) < limit) {
            if (r->count) {
                return;
            }
            continue;
        }
        if (r->count && (thinvm_entry_physical(entry) !=
                         r->physical + r->count || thinvm_entry_valid(entry) !=
                         r->valid)) {
            return;
        }
        if (!r->count) {
            r->guest = (r->guest & ~(uint64_t)LEAF_MASK) | i;
            r->physical = thinvm_entry_physical(entry);
            r->valid = thinvm_entry_valid(entry);
        }
        r->count++;
    }
}

int thinvm_compact_look(ThinvmState *s, int tree, uint64_t holder,
                        uint64_t limit, ThinvmRelocation *r,
                        ThinvmNeeds *needs)
{
    const ThinvmPointerLe *slot;
    uint64_t guest = r->guest;
    int ret;

    needs->nb_want = 0;
    *r = (ThinvmRelocation) { .guest = guest };
    ret = holder_root(s, tree, holder, false, needs, &slot);
    for (int level = THINVM_INNER_LEVELS; ret == 0; level--) {
        ThinvmPathEnd end = { .slot = slot, .level = level };
        ThinvmPointerType type = thinvm_slot_type(slot);

        if (type != THINVM_PTR_PAGE) {
            r->next = (guest | (thinvm_map_span(level) - 1)) + 1;
            if (thinvm_slot_is_run(type)) {
                look_at_leaf(&end, limit, r);
            }
            break;
        }
        r->page[level] = thinvm_slot_address(slot);
        r->retired |= !page_is_settled(s, r->page[level]);
        end.leaf = thinvm_page_get(s, slot, thinvm_map_kind(level), level,
                                   needs);
        if (!end.leaf) {
            return -EAGAIN;
        }
        if (level == 0) {
            r->next = (guest | LEAF_MASK) + 1;
            look_at_leaf(&end, limit, r);
            break;
        }
        slot = &thinvm_page_slots(end.leaf)[thinvm_map_index(guest, level)];
    }
    return ret;
}

/*
 * Pages that no operation leads to: counts, records of snapshots, the name of
 * the backing file.  1: one got another place; 0: none has to; -EAGAIN,
 * -ENOSPC.
 */
int thinvm_compact_rewrite(ThinvmState *s, uint64_t *cluster, uint32_t *slot,
                           ThinvmNeeds *needs)
{
    int ret;

    needs->nb_want = 0;
    if (s->nb_meta_free < 2 * thinvm_space_last_pages(s) +
                          2 * THINVM_INNER_LEVELS) {
        return -ENOSPC;
    }
    ret = thinvm_count_find_retired(s, cluster, needs);
    if (ret == 1) {
        seqlock_write_begin(&s->sequence);
        thinvm_count_rewrite(s, *cluster);
        seqlock_write_end(&s->sequence);
    }
    if (ret) {
        return ret;
    }
    for (; *slot < s->nb_snapshot_slots; *slot += THINVM_SNAPSHOTS_PER_LEAF) {
        ret = thinvm_snapshot_need_rewrite(s, *slot, needs);
        if (ret == 1) {
            seqlock_write_begin(&s->sequence);
            thinvm_snapshot_rewrite(s, *slot);
            seqlock_write_end(&s->sequence);
            *slot += THINVM_SNAPSHOTS_PER_LEAF;
        }
        if (ret) {
            return ret;
        }
    }
    return thinvm_state_rewrite_backing(s);
}
