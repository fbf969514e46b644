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

typedef int (*ThinvmRangeFn)(ThinvmState *s, uint64_t first, uint64_t nb,
                             ThinvmNeeds *needs);

static int range_dec(ThinvmState *s, uint64_t first, uint64_t nb,
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

/* Call @fn for each contiguous range that entries [from, to) name */
static int leaf_ranges(ThinvmState *s, ThinvmPage *leaf, unsigned from,
                       unsigned to, ThinvmRangeFn fn, ThinvmNeeds *needs)
{
    uint64_t first = 0, nb = 0;
    int ret = 0;

    for (unsigned i = from; i < to; i++) {
        uint64_t c = thinvm_entry_physical(le64_to_cpu(leaf->data[i]));

        if (c && nb && c == first + nb) {
            nb++;
            continue;
        }
        if (nb && fn(s, first, nb, needs) < 0) {
            ret = -EAGAIN;
        }
        first = c;
        nb = c ? 1 : 0;
    }
    if (nb && fn(s, first, nb, needs) < 0) {
        ret = -EAGAIN;
    }
    return ret;
}

/* ------------------------------------------------------------------ */
/* Copies of shared pages                                              */

static int page_ranges(ThinvmState *s, ThinvmPage *page, ThinvmRangeFn fn,
                       ThinvmNeeds *needs)
{
    int ret = 0;

    if (page->level == 0) {
        return leaf_ranges(s, page, 0, THINVM_ENTRIES_PER_LEAF, fn, needs);
    }
    for (unsigned i = 0; i < THINVM_POINTERS_PER_PAGE; i++) {
        const ThinvmPointerLe *slot = &thinvm_page_slots(page)[i];
        ThinvmPointerType type = thinvm_slot_type(slot);

        if ((type == THINVM_PTR_RUN || type == THINVM_PTR_UNWRITTEN_RUN) &&
            fn(s, thinvm_slot_address(slot), THINVM_ENTRIES_PER_LEAF,
               needs) < 0) {
            ret = -EAGAIN;
        }
    }
    return ret;
}

int thinvm_map_need_copy(ThinvmState *s, ThinvmPage *page, ThinvmNeeds *needs)
{
    return page_ranges(s, page, thinvm_count_need, needs);
}

void thinvm_map_copy_refs(ThinvmState *s, ThinvmPage *page)
{
    assert(page->kind == THINVM_PAGE_MAP_LEAF ||
           page->kind == THINVM_PAGE_MAP_INNER);
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

        if (type == THINVM_PTR_RUN || type == THINVM_PTR_UNWRITTEN_RUN ||
            (pages_too && type == THINVM_PTR_PAGE)) {
            qatomic_set(&slot->word_le, slot->word_le |
                        cpu_to_le64(THINVM_PTR_SHARED_BELOW));
        }
    }
}

/* ------------------------------------------------------------------ */
/* Paths                                                               */

/* Where a walk to a leaf ended */
typedef struct PathEnd {
    ThinvmPage *leaf;               /* NULL: @slot stands for the range */
    const ThinvmPointerLe *slot;
    int level;                      /* of what @slot points to */
    bool shared;
} PathEnd;

/*
 * Walk down to the page of @bottom (0: the leaf), touching what will change.
 * Stops early where a pointer stands for the range.
 */
static int need_path(ThinvmState *s, int tree, uint64_t guest, int bottom,
                     ThinvmNeeds *needs, PathEnd *end)
{
    const ThinvmPointerLe *slot = &s->root[tree];
    int ret = 0;

    memset(end, 0, sizeof(*end));
    for (int level = THINVM_INNER_LEVELS; ; level--) {
        ThinvmPage *page;

        end->slot = slot;
        end->level = level;
        if (thinvm_slot_type(slot) != THINVM_PTR_PAGE) {
            s->new_pages += level + 1 - bottom;
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

static uint64_t end_entry(const PathEnd *end, unsigned index)
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
static int need_end_counts(ThinvmState *s, const PathEnd *end, unsigned from,
                           unsigned to, ThinvmNeeds *needs)
{
    ThinvmPointerType type;

    if (end->leaf) {
        return leaf_ranges(s, end->leaf, from, to, thinvm_count_need, needs);
    }
    type = thinvm_slot_type(end->slot);
    if (type == THINVM_PTR_RUN || type == THINVM_PTR_UNWRITTEN_RUN) {
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
    PathEnd end = { .slot = slot, .level = level };
    ThinvmPage *page = thinvm_page_new(s, thinvm_map_kind(level), level);

    if (level) {
        for (unsigned i = 0; i < THINVM_POINTERS_PER_PAGE; i++) {
            thinvm_slot_set(&thinvm_page_slots(page)[i], word, 0, 0);
        }
    } else {
        for (unsigned i = 0; i < THINVM_ENTRIES_PER_LEAF; i++) {
            page->data[i] = cpu_to_le64(end_entry(&end, i));
        }
    }
    word = thinvm_slot_make(THINVM_PTR_PAGE, page->number) |
           (page->generation & 0xffff) << THINVM_PTR_GENERATION_SHIFT;
    thinvm_slot_set(slot, word, 0, 0);
    return page;
}

static ThinvmPage *writable_child(ThinvmState *s, ThinvmPointerLe *slot,
                                  int level)
{
    return thinvm_slot_type(slot) == THINVM_PTR_PAGE &&
           thinvm_page_resident(s, slot, thinvm_map_kind(level), level) ?
           thinvm_page_shadow(s, slot) : materialize(s, slot, level);
}

/* The page of @bottom for @guest, writable, with all above it */
static ThinvmPage *writable_path(ThinvmState *s, int tree, uint64_t guest,
                                 int bottom)
{
    ThinvmPointerLe *slot = &s->root[tree];
    ThinvmPage *page;

    for (int level = THINVM_INNER_LEVELS; ; level--) {
        page = writable_child(s, slot, level);
        if (level == bottom) {
            break;
        }
        slot = &thinvm_page_slots(page)[thinvm_map_index(guest, level)];
    }
    page->guest = guest & ~(thinvm_map_span(bottom) - 1);
    page->tree = tree;
    return page;
}

/* ------------------------------------------------------------------ */
/* UNMAP                                                               */

static uint64_t range_word(ThinvmSource source)
{
    return source == THINVM_SOURCE_ZERO ?
           thinvm_slot_make(THINVM_PTR_ZERO, 0) : 0;
}

static bool slot_has_pages(ThinvmPointerType type)
{
    return type != THINVM_PTR_NONE && type != THINVM_PTR_ZERO;
}

/* Everything below @slot goes; apply half */
static void drop_below(ThinvmState *s, ThinvmPointerLe *slot, int level,
                       uint64_t word)
{
    uint64_t address = thinvm_slot_address(slot);
    ThinvmPage *page;

    switch (thinvm_slot_type(slot)) {
    case THINVM_PTR_RUN:
    case THINVM_PTR_UNWRITTEN_RUN:
        range_dec(s, address, THINVM_ENTRIES_PER_LEAF, NULL);
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
            leaf_ranges(s, page, 0, THINVM_ENTRIES_PER_LEAF, range_dec, NULL);
        }
        for (unsigned i = 0; level && i < THINVM_POINTERS_PER_PAGE; i++) {
            /* A copy of the slot: the page itself may be frozen */
            ThinvmPointerLe child = thinvm_page_slots(page)[i];

            if (slot_has_pages(thinvm_slot_type(&child))) {
                drop_below(s, &child, level - 1, word);
            }
        }
        thinvm_page_unref(s, address);
        break;
    default:
        break;
    }
    thinvm_slot_set(slot, word, 0, 0);
}

static int need_drop(ThinvmState *s, const ThinvmPointerLe *slot, int level,
                     bool shared, ThinvmNeeds *needs)
{
    ThinvmPointerType type = thinvm_slot_type(slot);
    ThinvmPage *page;
    uint16_t *count;
    int ret = 0;

    if (type == THINVM_PTR_RUN || type == THINVM_PTR_UNWRITTEN_RUN) {
        return thinvm_count_need(s, thinvm_slot_address(slot),
                                 THINVM_ENTRIES_PER_LEAF, needs);
    }
    if (type != THINVM_PTR_PAGE) {
        return 0;
    }
    count = thinvm_page_count(s, thinvm_slot_address(slot), NULL);
    if (shared || (count && *count > 1)) {
        return 0;
    }
    page = thinvm_page_get(s, slot, thinvm_map_kind(level), level, needs);
    if (!page) {
        return -EAGAIN;
    }
    if (level == 0) {
        return thinvm_map_need_copy(s, page, needs);
    }
    for (unsigned i = 0; i < THINVM_POINTERS_PER_PAGE; i++) {
        if (need_drop(s, &thinvm_page_slots(page)[i], level - 1, false,
                      needs) < 0) {
            ret = -EAGAIN;
        }
    }
    return ret;
}

/* Back to a pointer where all of a page reads alike and names nothing */
static void collapse(ThinvmState *s, ThinvmPointerLe *slot, ThinvmPage *page)
{
    uint64_t word = 0;

    if (page->level) {
        const ThinvmPointerLe *slots = thinvm_page_slots(page);

        for (unsigned i = 0; i < THINVM_POINTERS_PER_PAGE; i++) {
            if (slots[i].word_le != slots[0].word_le ||
                slot_has_pages(thinvm_slot_type(&slots[i]))) {
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
                        ThinvmSource source, int tree)
{
    uint64_t span = thinvm_map_span(level), word = range_word(source);
    ThinvmPage *page;

    from = MAX(from, base);
    to = MIN(to, base + span);
    if (from == base && to == base + span) {
        drop_below(s, slot, level, word);
        return;
    }
    if (thinvm_slot_word(slot) == word) {
        return;
    }
    page = writable_child(s, slot, level);
    page->guest = base;
    page->tree = tree;
    if (level == 0) {
        leaf_ranges(s, page, from - base, to - base, range_dec, NULL);
        for (uint64_t i = from - base; i < to - base; i++) {
            qatomic_set(&page->data[i],
                        cpu_to_le64(thinvm_entry(0, 0, source)));
        }
    } else {
        for (unsigned i = thinvm_map_index(from, level);
             i <= thinvm_map_index(to - 1, level); i++) {
            unmap_below(s, &thinvm_page_slots(page)[i], level - 1,
                        base + i * thinvm_map_span(level - 1), from, to,
                        source, tree);
        }
    }
    collapse(s, slot, page);
}

static int need_unmap(ThinvmState *s, const ThinvmPointerLe *slot, int level,
                      uint64_t base, uint64_t from, uint64_t to,
                      ThinvmSource source, bool shared, ThinvmNeeds *needs)
{
    uint64_t span = thinvm_map_span(level);
    PathEnd end = { .slot = slot, .level = level };
    int ret = 0;

    from = MAX(from, base);
    to = MIN(to, base + span);
    if (from == base && to == base + span) {
        return need_drop(s, slot, level, shared, needs);
    }
    if (thinvm_slot_word(slot) == range_word(source)) {
        return 0;
    }
    if (thinvm_slot_type(slot) != THINVM_PTR_PAGE) {
        s->new_pages += 2 * (level + 1);
        return level ? 0 : need_end_counts(s, &end, from - base, to - base,
                                           needs);
    }
    end.leaf = thinvm_page_get(s, slot, thinvm_map_kind(level), level, needs);
    if (!end.leaf) {
        return -EAGAIN;
    }
    shared |= *end.leaf->count > 1;
    thinvm_page_touch(s, end.leaf, shared);
    if (shared) {
        ret = thinvm_map_need_copy(s, end.leaf, needs);
    }
    if (level == 0) {
        return need_end_counts(s, &end, from - base, to - base, needs) < 0 ?
               -EAGAIN : ret;
    }
    for (unsigned i = thinvm_map_index(from, level);
         i <= thinvm_map_index(to - 1, level); i++) {
        if (need_unmap(s, &thinvm_page_slots(end.leaf)[i], level - 1,
                       base + i * thinvm_map_span(level - 1), from, to,
                       source, shared, needs) < 0) {
            ret = -EAGAIN;
        }
    }
    return ret;
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

        if (!slot_has_pages(type)) {
            unsigned n = 1;

            while (slots && index + n < THINVM_POINTERS_PER_PAGE &&
                   thinvm_slot_type(&slots[index + n]) == type) {
                n++;
            }
            *nothing = thinvm_slot_word(slot) == range_word(source);
            *count = MIN(*count, n * span - offset);
            return 0;
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

        if (slot_has_pages(thinvm_slot_type(slot))) {
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
            return need_drop(s, slot, level, false, needs);
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
            drop_below(s, slot, level, 0);
            return;
        }
        slot = first_used(thinvm_page_shadow(s, slot));
    }
}

/* ------------------------------------------------------------------ */
/* Operations on entries                                               */

/* Where all parts are valid the source says nothing: one way to write it, so
 * that neighbours join and leaves become runs */
static uint64_t canonical_entry(uint64_t physical, uint16_t valid,
                                ThinvmSource source)
{
    return thinvm_entry(physical, valid, valid == THINVM_ALL_VALID ?
                        THINVM_SOURCE_BACKING : source);
}

static bool op_range_ok(const ThinvmOp *op)
{
    return op->guest < THINVM_MAX_GUEST_CLUSTERS &&
           op->count <= THINVM_MAX_GUEST_CLUSTERS - op->guest;
}

static int prepare_map(ThinvmState *s, const ThinvmOp *op, ThinvmNeeds *needs)
{
    unsigned index = op->guest & LEAF_MASK;
    PathEnd end;
    int ret, ret2;

    if (!op->count || index + op->count > THINVM_ENTRIES_PER_LEAF) {
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
    return need_end_counts(s, &end, index, index + op->count, needs);
}

static void apply_map(ThinvmState *s, const ThinvmOp *op)
{
    ThinvmPage *leaf = writable_path(s, op->tree, op->guest, 0);
    unsigned index = op->guest & LEAF_MASK;

    leaf_ranges(s, leaf, index, index + op->count, range_dec, NULL);
    for (uint64_t i = 0; i < op->count; i++) {
        uint64_t entry = canonical_entry(op->physical + i, op->valid,
                                         op->source);

        qatomic_set(&leaf->data[index + i], cpu_to_le64(entry));
    }
    thinvm_count_change(s, op->physical, op->count, THINVM_COUNT_INC);
    thinvm_space_clear_busy(s, op->physical, op->count);
}

/* The entry that a VALIDATE or INVALIDATE leaves; the same if it changes none */
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
    PathEnd end;
    uint64_t entry;
    int ret = need_path(s, op->tree, op->guest, 0, needs, &end);

    if (ret < 0) {
        return ret;
    }
    entry = end_entry(&end, op->guest & LEAF_MASK);
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
    PathEnd end;
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
    ret = need_path(s, op->tree, op->guest, 1, needs, &end);
    if (ret < 0 || !end.leaf) {
        return ret;
    }
    return need_drop(s, &thinvm_page_slots(end.leaf)
                     [thinvm_map_index(op->guest, 1)], 0, end.shared, needs);
}

static void apply_map_run(ThinvmState *s, const ThinvmOp *op)
{
    ThinvmPage *page = writable_path(s, op->tree, op->guest, 1);
    ThinvmPointerLe *slot =
        &thinvm_page_slots(page)[thinvm_map_index(op->guest, 1)];

    drop_below(s, slot, 0, 0);
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
        ret = need_unmap(s, &s->root[op->tree], THINVM_INNER_LEVELS, 0,
                         op->guest, op->guest + op->count, op->source, false,
                         needs);
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
        unmap_below(s, &s->root[op->tree], THINVM_INNER_LEVELS, 0, op->guest,
                    op->guest + op->count, op->source, op->tree);
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

    if (thinvm_entry_valid(first) != THINVM_ALL_VALID ||
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
