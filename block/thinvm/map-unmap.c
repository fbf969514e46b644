/*
 * thinvm metadata engine: mapping trees, what goes away
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Engine layer.  UNMAP, and freeing trees of snapshots in bounded steps; each
 * in two halves, as in map-ops.c.  An UNMAP of a range that pointers stand for
 * changes pointers only, in the mapping tree and in the count tree: a mapped
 * TiB is a hundred and some operations.
 *
 * Invariants 2 and 4: an entry and the counts of the clusters that it named
 * change in the same apply.
 */
#include "qemu/osdep.h"
#include "map.h"

/* ------------------------------------------------------------------ */
/* UNMAP                                                               */

static uint64_t range_word(ThinvmSource source)
{
    return source == THINVM_SOURCE_ZERO ?
           thinvm_slot_make(THINVM_PTR_ZERO, 0) : 0;
}

/* Everything below @slot goes; apply half.  Clusters go to @g */
static void drop_below(ThinvmState *s, ThinvmPointerLe *slot, int level,
                       uint64_t word, ThinvmGather *g)
{
    uint64_t address = thinvm_slot_address(slot);
    ThinvmPage *page;

    switch (thinvm_slot_type(slot)) {
    case THINVM_PTR_UNWRITTEN_RUN:
        thinvm_space_promise(s, -1);
        /* fall through */
    case THINVM_PTR_RUN:
        thinvm_gather(g, address, THINVM_ENTRIES_PER_LEAF);
        break;
    case THINVM_PTR_PAGE:
        if (*thinvm_page_count(s, address, NULL) > 1) {
            thinvm_page_unref(s, address);
            break;
        }
        if (!thinvm_page_resident(s, slot, thinvm_map_kind(level), level)) {
            break;
        }
        page = thinvm_page_find(s, address);
        if (level == 0) {
            thinvm_gather_leaf(g, page, 0, THINVM_ENTRIES_PER_LEAF);
        }
        for (unsigned i = 0; level && i < THINVM_POINTERS_PER_PAGE; i++) {
            /* A copy of the slot: the page itself may be frozen */
            ThinvmPointerLe child = thinvm_page_slots(page)[i];

            if (thinvm_slot_names_something(thinvm_slot_type(&child))) {
                drop_below(s, &child, level - 1, word, g);
            }
        }
        thinvm_page_unref(s, address);
        break;
    default:
        break;
    }
    thinvm_slot_set(slot, word, 0, 0);
}

void thinvm_map_drop(ThinvmState *s, ThinvmPointerLe *slot, int level)
{
    ThinvmGather g = { .s = s, .fn = thinvm_range_dec };

    drop_below(s, slot, level, 0, &g);
    thinvm_gather_end(&g);
}

static int need_drop_below(ThinvmState *s, const ThinvmPointerLe *slot,
                           int level, bool shared, ThinvmGather *g)
{
    ThinvmPointerType type = thinvm_slot_type(slot);
    ThinvmPage *page;
    uint16_t *count;
    int ret = 0;

    if (thinvm_slot_is_run(type)) {
        s->new_promises -= type == THINVM_PTR_UNWRITTEN_RUN;
        thinvm_gather(g, thinvm_slot_address(slot), THINVM_ENTRIES_PER_LEAF);
        return 0;
    }
    if (type != THINVM_PTR_PAGE) {
        return 0;
    }
    count = thinvm_page_count(s, thinvm_slot_address(slot), NULL);
    if (shared || (count && *count > 1)) {
        return 0;
    }
    page = thinvm_page_get(s, slot, thinvm_map_kind(level), level, g->needs);
    if (!page) {
        return -EAGAIN;
    }
    if (level == 0) {
        thinvm_gather_leaf(g, page, 0, THINVM_ENTRIES_PER_LEAF);
        return 0;
    }
    for (unsigned i = 0; i < THINVM_POINTERS_PER_PAGE; i++) {
        if (need_drop_below(s, &thinvm_page_slots(page)[i], level - 1, false,
                            g) < 0) {
            ret = -EAGAIN;
        }
    }
    return ret;
}

int thinvm_map_need_drop(ThinvmState *s, const ThinvmPointerLe *slot, int level,
                     bool shared, ThinvmNeeds *needs)
{
    ThinvmGather g = { .s = s, .fn = thinvm_count_need, .needs = needs };
    int ret = need_drop_below(s, slot, level, shared, &g);

    thinvm_gather_end(&g);
    return ret < 0 ? ret : g.ret;
}

/* Back to a pointer where all of a page reads alike and names nothing */
static void collapse(ThinvmState *s, ThinvmPointerLe *slot, ThinvmPage *page)
{
    uint64_t word = 0;

    if (page->level) {
        const ThinvmPointerLe *slots = thinvm_page_slots(page);

        for (unsigned i = 0; i < THINVM_POINTERS_PER_PAGE; i++) {
            if (slots[i].word_le != slots[0].word_le ||
                thinvm_slot_names_something(thinvm_slot_type(&slots[i]))) {
                return;
            }
        }
        word = thinvm_slot_word(&slots[0]);
    } else {
        uint64_t first = le64_to_cpu(page->data[0]);

        for (unsigned i = 0; i < THINVM_ENTRIES_PER_LEAF; i++) {
            if (page->data[i] != page->data[0] ||
                thinvm_entry_physical(first)) {
                return;
            }
        }
        word = range_word(thinvm_entry_source(first));
    }
    thinvm_slot_set(slot, word, 0, 0);
    thinvm_page_unref(s, page->number);
}

/* [from, to) below @slot, whose range begins at @base, become @word */
static void unmap_below(ThinvmState *s, ThinvmPointerLe *slot, int level,
                        uint64_t base, uint64_t from, uint64_t to,
                        ThinvmSource source, int tree, ThinvmGather *g)
{
    uint64_t span = thinvm_map_span(level), word = range_word(source);
    ThinvmPage *page;

    from = MAX(from, base);
    to = MIN(to, base + span);
    if (from == base && to == base + span) {
        drop_below(s, slot, level, word, g);
        return;
    }
    if (thinvm_slot_word(slot) == word) {
        return;
    }
    page = thinvm_map_writable_child(s, slot, level);
    qatomic_set(&page->guest, base);
    page->tree = tree;
    if (level == 0) {
        thinvm_gather_leaf(g, page, from - base, to - base);
        for (uint64_t i = from - base; i < to - base; i++) {
            qatomic_set(&page->data[i],
                        cpu_to_le64(thinvm_entry(0, 0, source)));
        }
    } else {
        for (unsigned i = thinvm_map_index(from, level);
             i <= thinvm_map_index(to - 1, level); i++) {
            unmap_below(s, &thinvm_page_slots(page)[i], level - 1,
                        base + i * thinvm_map_span(level - 1), from, to,
                        source, tree, g);
        }
    }
    collapse(s, slot, page);
}

static int need_unmap_below(ThinvmState *s, const ThinvmPointerLe *slot,
                            int level, uint64_t base, uint64_t from,
                            uint64_t to, ThinvmSource source, bool shared,
                            ThinvmGather *g)
{
    uint64_t span = thinvm_map_span(level);
    ThinvmPage *page;
    int ret = 0;

    from = MAX(from, base);
    to = MIN(to, base + span);
    if (from == base && to == base + span) {
        return need_drop_below(s, slot, level, shared, g);
    }
    if (thinvm_slot_word(slot) == range_word(source)) {
        return 0;
    }
    if (thinvm_slot_type(slot) != THINVM_PTR_PAGE) {
        s->new_pages += 2 * (level + 1);
        s->new_promises -= thinvm_slot_type(slot) == THINVM_PTR_UNWRITTEN_RUN;
        if (thinvm_slot_is_run(thinvm_slot_type(slot))) {
            thinvm_gather(g, thinvm_slot_address(slot) + from - base,
                          to - from);
        }
        return 0;
    }
    page = thinvm_page_get(s, slot, thinvm_map_kind(level), level, g->needs);
    if (!page) {
        return -EAGAIN;
    }
    shared |= *page->count > 1;
    thinvm_page_touch(s, page, shared);
    if (shared) {
        ret = thinvm_map_need_copy(s, page, g->needs);
    }
    if (level == 0) {
        thinvm_gather_leaf(g, page, from - base, to - base);
        return ret;
    }
    for (unsigned i = thinvm_map_index(from, level);
         i <= thinvm_map_index(to - 1, level); i++) {
        if (need_unmap_below(s, &thinvm_page_slots(page)[i], level - 1,
                             base + i * thinvm_map_span(level - 1), from, to,
                             source, shared, g) < 0) {
            ret = -EAGAIN;
        }
    }
    return ret;
}

int thinvm_map_prepare_unmap(ThinvmState *s, const ThinvmOp *op,
                         ThinvmNeeds *needs)
{
    ThinvmGather g = { .s = s, .fn = thinvm_count_need, .needs = needs };
    int ret = need_unmap_below(s, &s->root[op->tree], THINVM_INNER_LEVELS, 0,
                               op->guest, op->guest + op->count, op->source,
                               false, &g);

    thinvm_gather_end(&g);
    return ret < 0 ? ret : g.ret;
}

void thinvm_map_apply_unmap(ThinvmState *s, const ThinvmOp *op)
{
    ThinvmGather g = { .s = s, .fn = thinvm_range_dec };

    unmap_below(s, &s->root[op->tree], THINVM_INNER_LEVELS, 0, op->guest,
                op->guest + op->count, op->source, op->tree, &g);
    thinvm_gather_end(&g);
}

/* How many of the entries from @index on, at most @max, are @target? */
static uint64_t leaf_same(ThinvmPage *leaf, unsigned index, uint64_t max,
                          uint64_t target)
{
    uint64_t n = 0;

    max = MIN(max, THINVM_ENTRIES_PER_LEAF - index);
    while (n < max && le64_to_cpu(leaf->data[index + n]) == target) {
        n++;
    }
    return n;
}

/*
 * How many clusters from @slots[index] on, whole slots within @max, one
 * UNMAP may take at once?  Runs that follow each other on the device, and
 * what has no clusters of its own, are little work.  Where they do not follow
 * each other each may change two leaves of the count tree: the bound is in
 * quarters of such a leaf (a run changes a quarter of it), at most a
 * sixteenth of the dirty pages that there may be.
 */
static uint64_t neighbours(ThinvmState *s, const ThinvmPointerLe *slots,
                           unsigned index, uint64_t max, bool shared)
{
    uint64_t n = 0, next = 0, work = 0;

    for (; index + n < THINVM_POINTERS_PER_PAGE &&
           (n + 1) * THINVM_ENTRIES_PER_LEAF <= max; n++) {
        const ThinvmPointerLe *slot = &slots[index + n];
        ThinvmPointerType type = thinvm_slot_type(slot);

        if (thinvm_slot_is_run(type)) {
            work += thinvm_slot_address(slot) == next ? 1 : 9;
            next = thinvm_slot_address(slot) + THINVM_ENTRIES_PER_LEAF;
        } else if (type == THINVM_PTR_PAGE && !shared) {
            uint16_t *refs = thinvm_page_count(s, thinvm_slot_address(slot),
                                               NULL);

            if (!refs || *refs <= 1) {
                break;
            }
        }
        if (n && work > s->dirty_bound / 4) {
            break;
        }
    }
    return n * THINVM_ENTRIES_PER_LEAF;
}

int thinvm_state_unmap_step(ThinvmState *s, int tree, uint64_t guest,
                            ThinvmSource source, uint64_t *count,
                            bool *nothing, ThinvmNeeds *needs)
{
    const ThinvmPointerLe *slot = &s->root[tree], *slots = NULL;
    unsigned index = 0;
    bool shared = false;

    needs->nb_want = 0;
    *nothing = false;
    for (int level = THINVM_INNER_LEVELS; ; level--) {
        uint64_t span = thinvm_map_span(level);
        uint64_t offset = guest & (span - 1);
        ThinvmPointerType type = thinvm_slot_type(slot);
        uint64_t same;
        ThinvmPage *page;
        uint16_t *refs;

        if (!thinvm_slot_names_something(type)) {
            unsigned n = 1;

            while (slots && index + n < THINVM_POINTERS_PER_PAGE &&
                   thinvm_slot_type(&slots[index + n]) == type) {
                n++;
            }
            *nothing = thinvm_slot_word(slot) == range_word(source);
            *count = MIN(*count, n * span - offset);
            return 0;
        }
        if (level == 0 && offset == 0) {
            same = neighbours(s, slots, index, *count, shared);
            if (same) {
                *count = same;
                return 0;
            }
        }
        refs = thinvm_page_count(s, thinvm_slot_address(slot), NULL);
        if (type != THINVM_PTR_PAGE ||
            (offset == 0 && *count >= span &&
             (shared || (refs && *refs > 1)))) {
            *count = MIN(*count, span - offset);
            return 0;
        }
        page = thinvm_page_get(s, slot, thinvm_map_kind(level), level, needs);
        if (!page) {
            return -EAGAIN;
        }
        shared |= *page->count > 1;
        if (level == 0) {
            same = leaf_same(page, offset, *count,
                             thinvm_entry(0, 0, source));
            *nothing = same > 0;
            *count = MIN(*count, same ? same : span - offset);
            return 0;
        }
        slots = thinvm_page_slots(page);
        index = thinvm_map_index(guest, level);
        slot = &slots[index];
    }
}

/* ------------------------------------------------------------------ */
/* Freeing a tree in bounded steps                                     */

/* The first slot that names something, or NULL */
static ThinvmPointerLe *first_used(ThinvmPage *page)
{
    for (unsigned i = 0; i < THINVM_POINTERS_PER_PAGE; i++) {
        ThinvmPointerLe *slot = &thinvm_page_slots(page)[i];

        if (thinvm_slot_names_something(thinvm_slot_type(slot))) {
            return slot;
        }
    }
    return NULL;
}

/* Is the page that @slot names one unit: shared, a leaf, or empty? */
static int drop_unit(ThinvmState *s, const ThinvmPointerLe *slot, int level,
                     ThinvmPage **page, ThinvmNeeds *needs)
{
    uint16_t *count;

    *page = NULL;
    if (thinvm_slot_type(slot) != THINVM_PTR_PAGE) {
        return 1;
    }
    count = thinvm_page_count(s, thinvm_slot_address(slot), NULL);
    if (count && *count > 1) {
        return 1;
    }
    *page = needs ? thinvm_page_get(s, slot, thinvm_map_kind(level), level,
                                    needs)
                  : thinvm_page_find(s, thinvm_slot_address(slot));
    if (!*page) {
        return -EAGAIN;
    }
    return level == 0 || !first_used(*page);
}

int thinvm_map_need_drop_step(ThinvmState *s, const ThinvmPointerLe *root,
                              ThinvmNeeds *needs)
{
    const ThinvmPointerLe *slot = root;

    for (int level = THINVM_INNER_LEVELS; ; level--) {
        ThinvmPage *page;
        int ret = drop_unit(s, slot, level, &page, needs);

        if (ret < 0) {
            return ret;
        }
        if (ret) {
            return thinvm_map_need_drop(s, slot, level, false, needs);
        }
        thinvm_page_touch(s, page, false);
        slot = first_used(page);
    }
}

void thinvm_map_drop_step(ThinvmState *s, ThinvmPointerLe *root)
{
    ThinvmPointerLe *slot = root;

    for (int level = THINVM_INNER_LEVELS; ; level--) {
        ThinvmPage *page;

        if (drop_unit(s, slot, level, &page, NULL)) {
            thinvm_map_drop(s, slot, level);
            return;
        }
        slot = first_used(thinvm_page_shadow(s, slot));
    }
}
