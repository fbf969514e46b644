/*
 * thinvm metadata engine: mapping trees, changes
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Engine layer.  Each change has two halves that walk alike: need_*() finds
 * whether all pages are in memory, touches them, and asks for the count pages
 * concerned; the other half then does it and cannot fail.
 *
 * "Shared" on the way down: some page on the path is named by more than one
 * pointer.  Everything below will be copied then, and a copy adds references
 * to what it names.
 *
 * Invariants 2 and 4: an entry and the counts of the clusters that it named
 * and names change in the same apply.
 */
#include "qemu/osdep.h"
#include "map.h"

#define LEAF_MASK   (THINVM_ENTRIES_PER_LEAF - 1)

/* ------------------------------------------------------------------ */
/* Ranges of clusters that entries name                                */

int thinvm_range_dec(ThinvmState *s, uint64_t first, uint64_t nb,
                     ThinvmNeeds *needs)
{
    thinvm_count_change(s, first, nb, THINVM_COUNT_DEC);
    return 0;
}

static int range_inc(ThinvmState *s, uint64_t first, uint64_t nb,
                     ThinvmNeeds *needs)
{
    thinvm_count_change(s, first, nb, THINVM_COUNT_INC);
    return 0;
}

int thinvm_gather_end(ThinvmGather *g)
{
    if (g->nb && g->fn(g->s, g->first, g->nb, g->needs) < 0) {
        g->ret = -EAGAIN;
    }
    g->nb = 0;
    return g->ret;
}

void thinvm_gather(ThinvmGather *g, uint64_t first, uint64_t nb)
{
    if (g->nb && first == g->first + g->nb) {
        g->nb += nb;
        return;
    }
    thinvm_gather_end(g);
    g->first = first;
    g->nb = nb;
}

void thinvm_gather_leaf(ThinvmGather *g, ThinvmPage *leaf, unsigned from,
                        unsigned to)
{
    for (unsigned i = from; i < to; i++) {
        uint64_t c = thinvm_entry_physical(le64_to_cpu(leaf->data[i]));

        if (c) {
            thinvm_gather(g, c, 1);
        }
    }
}

/* Call @fn for each contiguous range that entries [from, to) name */
static int leaf_ranges(ThinvmState *s, ThinvmPage *leaf, unsigned from,
                       unsigned to, ThinvmRangeFn fn, ThinvmNeeds *needs)
{
    ThinvmGather g = { .s = s, .fn = fn, .needs = needs };

    thinvm_gather_leaf(&g, leaf, from, to);
    return thinvm_gather_end(&g);
}

/* ------------------------------------------------------------------ */
/* Copies of shared pages                                              */

static int page_ranges(ThinvmState *s, ThinvmPage *page, ThinvmRangeFn fn,
                       ThinvmNeeds *needs)
{
    ThinvmGather g = { .s = s, .fn = fn, .needs = needs };

    if (page->level == 0) {
        thinvm_gather_leaf(&g, page, 0, THINVM_ENTRIES_PER_LEAF);
    }
    for (unsigned i = 0; page->level && i < THINVM_POINTERS_PER_PAGE; i++) {
        const ThinvmPointerLe *slot = &thinvm_page_slots(page)[i];

        if (thinvm_slot_is_run(thinvm_slot_type(slot))) {
            thinvm_gather(&g, thinvm_slot_address(slot),
                          THINVM_ENTRIES_PER_LEAF);
        }
    }
    return thinvm_gather_end(&g);
}

static unsigned unwritten_runs(ThinvmPage *page)
{
    unsigned n = 0;

    for (unsigned i = 0; page->level == 1 && i < THINVM_POINTERS_PER_PAGE;
         i++) {
        n += thinvm_slot_type(&thinvm_page_slots(page)[i]) ==
             THINVM_PTR_UNWRITTEN_RUN;
    }
    return n;
}

int thinvm_map_need_copy(ThinvmState *s, ThinvmPage *page, ThinvmNeeds *needs)
{
    s->new_promises += unwritten_runs(page);
    return page_ranges(s, page, thinvm_count_need, needs);
}

void thinvm_map_copy_refs(ThinvmState *s, ThinvmPage *page)
{
    assert(page->kind == THINVM_PAGE_MAP_LEAF ||
           page->kind == THINVM_PAGE_MAP_INNER);
    thinvm_space_promise(s, unwritten_runs(page));
    page_ranges(s, page, range_inc, NULL);
    for (unsigned i = 0; page->level && i < THINVM_POINTERS_PER_PAGE; i++) {
        const ThinvmPointerLe *slot = &thinvm_page_slots(page)[i];

        if (thinvm_slot_type(slot) == THINVM_PTR_PAGE) {
            thinvm_page_ref(s, thinvm_slot_address(slot));
        }
    }
}

void thinvm_map_mark_shared(ThinvmPage *page, bool pages_too)
{
    if (page->kind == THINVM_PAGE_MAP_LEAF) {
        for (unsigned i = 0; i < THINVM_ENTRIES_PER_LEAF; i++) {
            uint64_t entry = le64_to_cpu(page->data[i]);

            if (thinvm_entry_physical(entry)) {
                qatomic_set(&page->data[i],
                            cpu_to_le64(entry | THINVM_ENTRY_SHARED));
            }
        }
        return;
    }
    for (unsigned i = 0; i < THINVM_POINTERS_PER_PAGE; i++) {
        ThinvmPointerLe *slot = &thinvm_page_slots(page)[i];
        ThinvmPointerType type = thinvm_slot_type(slot);

        if (thinvm_slot_is_run(type) ||
            (pages_too && type == THINVM_PTR_PAGE)) {
            qatomic_set(&slot->word_le, slot->word_le |
                        cpu_to_le64(THINVM_PTR_SHARED_BELOW));
        }
    }
}

/* ------------------------------------------------------------------ */
/* Paths                                                               */

int thinvm_map_need_path(ThinvmState *s, const ThinvmPointerLe *slot,
                         uint64_t guest, int bottom, ThinvmNeeds *needs,
                         ThinvmPathEnd *end)
{
    int ret = 0;

    memset(end, 0, sizeof(*end));
    for (int level = THINVM_INNER_LEVELS; ; level--) {
        ThinvmPage *page;

        end->slot = slot;
        end->level = level;
        if (thinvm_slot_type(slot) != THINVM_PTR_PAGE) {
            s->new_pages += level + 1 - bottom;
            s->new_promises -= thinvm_slot_type(slot) ==
                               THINVM_PTR_UNWRITTEN_RUN;
            return ret;
        }
        page = thinvm_page_get(s, slot, thinvm_map_kind(level), level, needs);
        if (!page) {
            return -EAGAIN;
        }
        end->shared |= *page->count > 1;
        thinvm_page_touch(s, page, end->shared);
        if (end->shared && thinvm_map_need_copy(s, page, needs) < 0) {
            ret = -EAGAIN;
        }
        if (level == bottom) {
            end->leaf = page;
            return ret;
        }
        slot = &thinvm_page_slots(page)[thinvm_map_index(guest, level)];
    }
}

uint64_t thinvm_map_end_entry(const ThinvmPathEnd *end, unsigned index)
{
    uint64_t word;

    if (end->leaf) {
        return le64_to_cpu(end->leaf->data[index]);
    }
    word = thinvm_slot_word(end->slot);
    switch ((word >> THINVM_PTR_TYPE_SHIFT) & 15) {
    case THINVM_PTR_RUN:
    case THINVM_PTR_UNWRITTEN_RUN:
        return thinvm_run_entry(word, index);
    case THINVM_PTR_ZERO:
        return thinvm_entry(0, 0, THINVM_SOURCE_ZERO);
    default:
        return 0;
    }
}

/* The counts of what entries [from, to) name will change */
int thinvm_map_need_end_counts(ThinvmState *s, const ThinvmPathEnd *end,
                               unsigned from, unsigned to, ThinvmNeeds *needs)
{
    ThinvmPointerType type;

    if (end->leaf) {
        return leaf_ranges(s, end->leaf, from, to, thinvm_count_need, needs);
    }
    type = thinvm_slot_type(end->slot);
    if (thinvm_slot_is_run(type)) {
        return thinvm_count_need(s, thinvm_slot_address(end->slot) + from,
                                 to - from, needs);
    }
    return 0;
}

/* A page in place of a pointer that stands for a range */
static ThinvmPage *materialize(ThinvmState *s, ThinvmPointerLe *slot,
                               int level)
{
    uint64_t word = thinvm_slot_word(slot);
    ThinvmPathEnd end = { .slot = slot, .level = level };
    ThinvmPage *page = thinvm_page_new(s, thinvm_map_kind(level), level);

    if (level) {
        for (unsigned i = 0; i < THINVM_POINTERS_PER_PAGE; i++) {
            thinvm_slot_set(&thinvm_page_slots(page)[i], word, 0, 0);
        }
    } else {
        if (thinvm_slot_type(slot) == THINVM_PTR_UNWRITTEN_RUN) {
            thinvm_space_promise(s, -1);    /* this page was meant */
        }
        for (unsigned i = 0; i < THINVM_ENTRIES_PER_LEAF; i++) {
            page->data[i] = cpu_to_le64(thinvm_map_end_entry(&end, i));
        }
        thinvm_taking_look(s, page);
    }
    word = thinvm_slot_make(THINVM_PTR_PAGE, page->number) |
           (page->generation & 0xffff) << THINVM_PTR_GENERATION_SHIFT;
    thinvm_slot_set(slot, word, 0, 0);
    return page;
}

ThinvmPage *thinvm_map_writable_child(ThinvmState *s, ThinvmPointerLe *slot,
                                      int level)
{
    return thinvm_slot_type(slot) == THINVM_PTR_PAGE &&
           thinvm_page_resident(s, slot, thinvm_map_kind(level), level) ?
           thinvm_page_shadow(s, slot) : materialize(s, slot, level);
}

ThinvmPage *thinvm_map_writable_path(ThinvmState *s, ThinvmPointerLe *slot,
                                     int tree, uint64_t guest, int bottom)
{
    ThinvmPage *page;

    for (int level = THINVM_INNER_LEVELS; ; level--) {
        page = thinvm_map_writable_child(s, slot, level);
        if (level == bottom) {
            break;
        }
        slot = &thinvm_page_slots(page)[thinvm_map_index(guest, level)];
    }
    qatomic_set(&page->guest, guest & ~(thinvm_map_span(bottom) - 1));
    page->tree = tree;
    return page;
}

/* ------------------------------------------------------------------ */
/* Operations on entries                                               */

static int need_path(ThinvmState *s, int tree, uint64_t guest, int bottom,
                     ThinvmNeeds *needs, ThinvmPathEnd *end)
{
    return thinvm_map_need_path(s, &s->root[tree], guest, bottom, needs, end);
}

static ThinvmPage *writable_path(ThinvmState *s, int tree, uint64_t guest,
                                 int bottom)
{
    return thinvm_map_writable_path(s, &s->root[tree], tree, guest, bottom);
}

/* Where all parts are valid the source says nothing: one way to write it, so
 * that neighbours join and leaves become runs.  And no mark is left */
static uint64_t canonical_entry(uint64_t physical, uint16_t valid,
                                ThinvmSource source)
{
    return thinvm_entry(physical, valid, valid == THINVM_ALL_VALID ?
                        THINVM_SOURCE_BACKING : source);
}

/* The entry of a cluster that a MAP maps; one of the template's is marked */
static uint64_t new_entry(const ThinvmOp *op, uint64_t physical)
{
    return op->source == THINVM_SOURCE_TEMPLATE
           ? thinvm_entry(physical, THINVM_ALL_VALID, THINVM_SOURCE_TEMPLATE)
           : canonical_entry(physical, op->valid, op->source);
}

static bool op_range_ok(const ThinvmOp *op)
{
    return op->guest < THINVM_MAX_GUEST_CLUSTERS &&
           op->count <= THINVM_MAX_GUEST_CLUSTERS - op->guest;
}

static int prepare_map(ThinvmState *s, const ThinvmOp *op, ThinvmNeeds *needs)
{
    unsigned index = op->guest & LEAF_MASK;
    ThinvmPathEnd end;
    int ret, ret2;

    if (!op->count || index + op->count > THINVM_ENTRIES_PER_LEAF ||
        (op->source == THINVM_SOURCE_TEMPLATE && !s->bounds.template_marks)) {
        return -EBADMSG;
    }
    ret = thinvm_count_expect(s, op->physical, op->count, 0, 0, needs);
    if (ret == -EBADMSG) {
        return ret;
    }
    ret2 = need_path(s, op->tree, op->guest, 0, needs, &end);
    if (ret < 0 || ret2 < 0) {
        return -EAGAIN;
    }
    return thinvm_map_need_end_counts(s, &end, index, index + op->count, needs);
}

static void apply_map(ThinvmState *s, const ThinvmOp *op)
{
    ThinvmPage *leaf = writable_path(s, op->tree, op->guest, 0);
    unsigned index = op->guest & LEAF_MASK;

    leaf_ranges(s, leaf, index, index + op->count, thinvm_range_dec, NULL);
    for (uint64_t i = 0; i < op->count; i++) {
        uint64_t entry = new_entry(op, op->physical + i);

        qatomic_set(&leaf->data[index + i], cpu_to_le64(entry));
    }
    thinvm_count_change(s, op->physical, op->count, THINVM_COUNT_INC);
    thinvm_space_clear_busy(s, op->physical, op->count);
}

/* The entry that a VALIDATE or INVALIDATE leaves; the same if nothing changes */
static uint64_t entry_after(const ThinvmOp *op, uint64_t entry)
{
    uint16_t valid = thinvm_entry_valid(entry);
    uint64_t physical = thinvm_entry_physical(entry);
    uint64_t rest = entry & THINVM_ENTRY_SHARED;
    ThinvmSource source = thinvm_entry_source(entry);

    if (physical != op->physical || !physical) {
        return entry;
    }
    if (op->type == THINVM_OP_VALIDATE) {
        return rest | canonical_entry(physical, valid | op->valid, source);
    }
    if (source != THINVM_SOURCE_ZERO && valid != THINVM_ALL_VALID) {
        return entry;
    }
    return rest | thinvm_entry(physical, valid & ~op->valid,
                               THINVM_SOURCE_ZERO);
}

static int prepare_valid_bits(ThinvmState *s, const ThinvmOp *op,
                              ThinvmNeeds *needs)
{
    ThinvmPathEnd end;
    uint64_t entry;
    int ret = need_path(s, op->tree, op->guest, 0, needs, &end);

    if (ret < 0) {
        return ret;
    }
    /* A leaf of a run comes for good, and nothing was promised to a run */
    s->grows |= !end.leaf && thinvm_slot_type(end.slot) == THINVM_PTR_RUN;
    entry = thinvm_map_end_entry(&end, op->guest & LEAF_MASK);
    return entry_after(op, entry) == entry ? -EALREADY : 0;
}

static void apply_valid_bits(ThinvmState *s, const ThinvmOp *op)
{
    ThinvmPage *leaf = writable_path(s, op->tree, op->guest, 0);
    uint64_t *entry = &leaf->data[op->guest & LEAF_MASK];

    qatomic_set(entry, cpu_to_le64(entry_after(op, le64_to_cpu(*entry))));
}

static int prepare_map_run(ThinvmState *s, const ThinvmOp *op,
                           ThinvmNeeds *needs)
{
    ThinvmPathEnd end;
    int ret;

    if (op->guest & LEAF_MASK ||
        (op->valid && op->valid != THINVM_ALL_VALID)) {
        return -EBADMSG;
    }
    ret = thinvm_count_expect(s, op->physical, THINVM_ENTRIES_PER_LEAF, 0, 0,
                              needs);
    if (ret < 0) {
        return ret;
    }
    s->new_promises += !op->valid;
    ret = need_path(s, op->tree, op->guest, 1, needs, &end);
    if (ret < 0 || !end.leaf) {
        return ret;
    }
    return thinvm_map_need_drop(s, &thinvm_page_slots(end.leaf)
                     [thinvm_map_index(op->guest, 1)], 0, end.shared, needs);
}

static void apply_map_run(ThinvmState *s, const ThinvmOp *op)
{
    ThinvmPage *page = writable_path(s, op->tree, op->guest, 1);
    ThinvmPointerLe *slot =
        &thinvm_page_slots(page)[thinvm_map_index(op->guest, 1)];

    thinvm_map_drop(s, slot, 0);
    thinvm_space_promise(s, !op->valid);
    thinvm_slot_set(slot, thinvm_slot_make(op->valid ? THINVM_PTR_RUN :
                                           THINVM_PTR_UNWRITTEN_RUN,
                                           op->physical), 0, 0);
    thinvm_count_change(s, op->physical, THINVM_ENTRIES_PER_LEAF,
                        THINVM_COUNT_INC);
    thinvm_space_clear_busy(s, op->physical, THINVM_ENTRIES_PER_LEAF);
}

int thinvm_map_prepare(ThinvmState *s, const ThinvmOp *op, ThinvmNeeds *needs,
                       Error **errp)
{
    int ret;

    if (!op_range_ok(op)) {
        ret = -EBADMSG;
    } else if (op->type == THINVM_OP_MAP) {
        ret = prepare_map(s, op, needs);
    } else if (op->type == THINVM_OP_UNMAP) {
        ret = thinvm_map_prepare_unmap(s, op, needs);
    } else if (op->type == THINVM_OP_MAP_RUN) {
        ret = prepare_map_run(s, op, needs);
    } else {
        ret = prepare_valid_bits(s, op, needs);
    }
    if (ret == -EBADMSG) {
        error_setg(errp, "operation %d on guest clusters %" PRIu64 " to %"
                   PRIu64 ", physical cluster %" PRIu64 ", is not possible in "
                   "this state", op->type, op->guest,
                   op->guest + MAX(op->count, 1) - 1, op->physical);
    }
    return ret;
}

void thinvm_map_apply(ThinvmState *s, const ThinvmOp *op)
{
    switch (op->type) {
    case THINVM_OP_MAP:
        apply_map(s, op);
        break;
    case THINVM_OP_VALIDATE:
    case THINVM_OP_INVALIDATE:
        apply_valid_bits(s, op);
        break;
    case THINVM_OP_UNMAP:
        thinvm_map_apply_unmap(s, op);
        break;
    case THINVM_OP_MAP_RUN:
        apply_map_run(s, op);
        break;
    default:
        g_assert_not_reached();
    }
}

/* ------------------------------------------------------------------ */
/* Runs                                                                */

static bool leaf_is_run(ThinvmPage *leaf)
{
    uint64_t first = le64_to_cpu(leaf->data[0]);
    uint64_t last = le64_to_cpu(leaf->data[LEAF_MASK]);

    /* A run cannot say that it is the template's */
    if (thinvm_entry_valid(first) != THINVM_ALL_VALID ||
        thinvm_entry_source(first) == THINVM_SOURCE_TEMPLATE ||
        last != first + LEAF_MASK) {
        return false;
    }
    for (unsigned i = 0; i < THINVM_ENTRIES_PER_LEAF; i++) {
        if (le64_to_cpu(leaf->data[i]) != first + i) {
            return false;
        }
    }
    return true;
}

/* The slot that names this leaf in its active tree, if all above is ours */
static ThinvmPointerLe *run_slot(ThinvmState *s, ThinvmPage *leaf)
{
    ThinvmPointerLe *slot = &s->root[leaf->tree];

    for (int level = THINVM_INNER_LEVELS; level > 0; level--) {
        ThinvmPage *page;

        if (thinvm_slot_type(slot) != THINVM_PTR_PAGE) {
            return NULL;
        }
        page = thinvm_page_find(s, thinvm_slot_address(slot));
        if (!page || !thinvm_page_writable(s, page)) {
            return NULL;
        }
        slot = &thinvm_page_slots(page)[thinvm_map_index(leaf->guest, level)];
    }
    return thinvm_slot_type(slot) == THINVM_PTR_PAGE &&
           thinvm_slot_address(slot) == leaf->number ? slot : NULL;
}

void thinvm_map_form_runs(ThinvmState *s)
{
    ThinvmPage *leaf, *next;

    QTAILQ_FOREACH_SAFE(leaf, &s->dirty[THINVM_RANK_LEAF], link, next) {
        ThinvmPointerLe *slot;
        uint64_t first, word;

        if (leaf->kind != THINVM_PAGE_MAP_LEAF ||
            !thinvm_page_writable(s, leaf) || !leaf_is_run(leaf)) {
            continue;
        }
        slot = run_slot(s, leaf);
        if (!slot) {
            continue;
        }
        first = le64_to_cpu(leaf->data[0]);
        word = thinvm_slot_make(THINVM_PTR_RUN, thinvm_entry_physical(first));
        if (first & THINVM_ENTRY_SHARED) {
            word |= THINVM_PTR_SHARED_BELOW;
        }
        thinvm_slot_set(slot, word, 0, 0);
        thinvm_page_unref(s, leaf->number);
    }
}
