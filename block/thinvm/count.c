/*
 * thinvm metadata engine: reference counts of physical clusters
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Engine layer.  A tree of three inner levels over leaves of 2048 counts.  A
 * pointer stands for a page, or for a range whose counts are all the same
 * (NONE: 0, UNIFORM: its address), so that 64 TiB of free or of fully used
 * space need no pages.  A PAGE pointer inside the tree carries the number of
 * free clusters below, which is how allocation finds space without reading
 * full pages; where there is no page the number follows from the geometry.
 * The pointer to the root page carries none (it could not hold it):
 * state->nb_count_free is the sum, made when the image is opened.
 *
 * A count is the number of leaves and runs that name a cluster, in all trees,
 * each page counted once however many pointers name it; THINVM_COUNT_METADATA
 * marks header, journal and metadata extents.
 */
#include "qemu/osdep.h"
#include "state-int.h"

#define LEAF_BITS   11

static inline uint64_t level_span(int level)
{
    return 1ULL << (LEAF_BITS + 8 * level);
}

static inline unsigned child_index(uint64_t cluster, int level)
{
    return (cluster >> (LEAF_BITS + 8 * (level - 1))) & 255;
}

static inline ThinvmPageKind level_kind(int level)
{
    return level ? THINVM_PAGE_COUNT_INNER : THINVM_PAGE_COUNT_LEAF;
}

/* Clusters of the device in the range of a level that starts at @base */
static uint64_t level_exists(ThinvmState *s, int level, uint64_t base)
{
    return base >= s->device_clusters ? 0 :
           MIN(s->device_clusters - base, level_span(level));
}

static uint64_t slot_free(ThinvmState *s, const ThinvmPointerLe *slot,
                          int level, uint64_t base)
{
    switch (thinvm_slot_type(slot)) {
    case THINVM_PTR_NONE:
        return level_exists(s, level, base);
    case THINVM_PTR_PAGE:
        return le32_to_cpu(slot->extra_le);
    default:
        return 0;
    }
}

int thinvm_count_load(ThinvmState *s, ThinvmNeeds *needs)
{
    const int top = THINVM_INNER_LEVELS;
    ThinvmPage *root;
    uint64_t sum = 0;

    if (thinvm_slot_type(&s->count_root) != THINVM_PTR_PAGE) {
        s->nb_count_free = slot_free(s, &s->count_root, top, 0);
        return 0;
    }
    root = thinvm_page_get(s, &s->count_root, level_kind(top), top, needs);
    if (!root) {
        return -EAGAIN;
    }
    for (unsigned i = 0; i < THINVM_POINTERS_PER_PAGE; i++) {
        sum += slot_free(s, &thinvm_page_slots(root)[i], top - 1,
                         i * level_span(top - 1));
    }
    s->nb_count_free = sum;
    return 0;
}

/* ------------------------------------------------------------------ */
/* prepare                                                             */

/* Clusters [first, end) that lie in the range of @level at @base */
static void clip(int level, uint64_t base, uint64_t *first, uint64_t *end)
{
    *first = MAX(*first, base);
    *end = MIN(*end, base + level_span(level));
}

/*
 * Pages that take the place of a pointer of @level when the counts of a part
 * of its range change: a path to each end of the part.
 */
static uint64_t split_pages(int level, uint64_t base, uint64_t first,
                            uint64_t end)
{
    if (end - first == level_span(level)) {
        return 0;
    }
    if (first >> LEAF_BITS == (end - 1) >> LEAF_BITS || first == base ||
        end == base + level_span(level)) {
        return level + 1;
    }
    return 2 * (level + 1);
}

static int need_below(ThinvmState *s, const ThinvmPointerLe *slot, int level,
                      uint64_t base, uint64_t first, uint64_t end,
                      ThinvmNeeds *needs)
{
    ThinvmPage *page;
    int ret = 0;

    clip(level, base, &first, &end);
    if (thinvm_slot_type(slot) != THINVM_PTR_PAGE) {
        s->new_pages += split_pages(level, base, first, end);
        return 0;
    }
    page = thinvm_page_get(s, slot, level_kind(level), level, needs);
    if (!page) {
        return -EAGAIN;
    }
    thinvm_page_touch(s, page, false);
    if (level == 0) {
        return 0;
    }
    for (unsigned i = child_index(first, level);
         i <= child_index(end - 1, level); i++) {
        if (need_below(s, &thinvm_page_slots(page)[i], level - 1,
                       base + i * level_span(level - 1), first, end,
                       needs) < 0) {
            ret = -EAGAIN;
        }
    }
    return ret;
}

int thinvm_count_need(ThinvmState *s, uint64_t first, uint64_t nb_clusters,
                      ThinvmNeeds *needs)
{
    uint64_t leaf = first >> LEAF_BITS;
    /* Single clusters one after the other, as fragmented leaves have them */
    bool in_leaf = (first + nb_clusters - 1) >> LEAF_BITS == leaf &&
                   nb_clusters < level_span(0);
    int ret;

    if (in_leaf && leaf == s->last_count_leaf) {
        return 0;
    }
    ret = need_below(s, &s->count_root, THINVM_INNER_LEVELS, 0, first,
                     first + nb_clusters, needs);
    if (ret == 0 && in_leaf) {
        s->last_count_leaf = leaf;
    }
    return ret;
}

/*
 * The count of @cluster, and how many from there on are seen at once to have
 * the same; at most @max.
 */
static int count_lookup(ThinvmState *s, uint64_t cluster, uint64_t max,
                        uint16_t *count, uint64_t *same, ThinvmNeeds *needs)
{
    const ThinvmPointerLe *slot = &s->count_root;
    unsigned index = cluster & (THINVM_COUNTS_PER_LEAF - 1);
    const uint16_t *counts;
    ThinvmPage *page;

    for (int level = THINVM_INNER_LEVELS; level >= 0; level--) {
        if (thinvm_slot_type(slot) != THINVM_PTR_PAGE) {
            *count = thinvm_slot_type(slot) == THINVM_PTR_NONE ? 0 :
                     thinvm_slot_address(slot);
            *same = level_span(level) - (cluster & (level_span(level) - 1));
            *same = MIN(*same, max);
            return 0;
        }
        page = thinvm_page_get(s, slot, level_kind(level), level, needs);
        if (!page) {
            return -EAGAIN;
        }
        if (level) {
            slot = &thinvm_page_slots(page)[child_index(cluster, level)];
        }
    }
    counts = (const uint16_t *)page->data;
    *count = le16_to_cpu(counts[index]);
    *same = 1;
    max = MIN(max, THINVM_COUNTS_PER_LEAF - index);
    while (*same < max && counts[index + *same] == counts[index]) {
        (*same)++;
    }
    return 0;
}

int thinvm_count_get(ThinvmState *s, uint64_t cluster, uint16_t *count,
                     ThinvmNeeds *needs)
{
    uint64_t same;

    return count_lookup(s, cluster, 1, count, &same, needs);
}

int thinvm_count_expect(ThinvmState *s, uint64_t first, uint64_t nb_clusters,
                        uint16_t from, uint16_t to, ThinvmNeeds *needs)
{
    uint64_t same;
    uint16_t count;
    int ret;

    if (nb_clusters > s->device_clusters ||
        first > s->device_clusters - nb_clusters ||
        first < s->first_cluster ||
        thinvm_extents_have_clusters(s, first, nb_clusters)) {
        return -EBADMSG;
    }
    ret = thinvm_count_need(s, first, nb_clusters, needs);
    if (ret < 0) {
        return ret;
    }
    for (uint64_t c = first; c < first + nb_clusters; c += same) {
        ret = count_lookup(s, c, first + nb_clusters - c, &count, &same,
                           needs);
        if (ret < 0) {
            return ret;
        }
        if (count < from || count > to) {
            return -EBADMSG;
        }
    }
    return 0;
}

/* ------------------------------------------------------------------ */
/* apply                                                               */

/* Replace a slot that stands for equal counts by a page that says the same */
static ThinvmPage *materialize(ThinvmState *s, ThinvmPointerLe *slot,
                               int level, uint64_t base)
{
    uint64_t word = thinvm_slot_word(slot);
    uint16_t count = thinvm_slot_type(slot) == THINVM_PTR_NONE ? 0 :
                     thinvm_slot_address(slot);
    uint64_t free = slot_free(s, slot, level, base);
    ThinvmPage *page = thinvm_page_new(s, level_kind(level), level);

    if (level) {
        for (unsigned i = 0; i < THINVM_POINTERS_PER_PAGE; i++) {
            thinvm_slot_set(&thinvm_page_slots(page)[i], word, 0, 0);
        }
    } else {
        uint16_t *counts = (uint16_t *)page->data;

        for (unsigned i = 0; i < THINVM_COUNTS_PER_LEAF; i++) {
            counts[i] = cpu_to_le16(count);
        }
    }
    word = thinvm_slot_make(THINVM_PTR_PAGE, page->number) |
           (page->generation & 0xffff) << THINVM_PTR_GENERATION_SHIFT;
    thinvm_slot_set(slot, word, 0, level == THINVM_INNER_LEVELS ? 0 : free);
    return page;
}

static uint16_t count_changed(ThinvmState *s, uint16_t count,
                              ThinvmCountChange change)
{
    /* Counts come from the device and may be wrong: stop, do not wrap */
    switch (change) {
    case THINVM_COUNT_INC:
        if (count < THINVM_COUNT_MAX) {
            return count + 1;
        }
        break;
    case THINVM_COUNT_DEC:
        if (count > 0 && count <= THINVM_COUNT_MAX) {
            return count - 1;
        }
        break;
    case THINVM_COUNT_TO_METADATA:
        if (count == 0) {
            return THINVM_COUNT_METADATA;
        }
        break;
    case THINVM_COUNT_FROM_METADATA:
        if (count == THINVM_COUNT_METADATA) {
            return 0;
        }
        break;
    }
    s->damaged = true;
    return count;
}

/* Change counts in a leaf; returns by how much the free ones grew */
static int64_t change_leaf(ThinvmState *s, ThinvmPage *leaf, uint64_t first,
                           uint64_t nb, ThinvmCountChange change)
{
    uint16_t *counts = (uint16_t *)leaf->data;
    unsigned index = first & (THINVM_COUNTS_PER_LEAF - 1);
    int64_t delta = 0;
    uint64_t freed = 0;

    for (uint64_t i = 0; i < nb; i++) {
        uint16_t old = le16_to_cpu(counts[index + i]);
        uint16_t new = count_changed(s, old, change);

        qatomic_set(&counts[index + i], cpu_to_le16(new));
        delta += (new == 0) - (old == 0);
        if (new == 0 && old != 0) {
            freed++;
        } else if (freed) {
            thinvm_space_freed(s, first + i - freed, freed);
            freed = 0;
        }
    }
    if (freed) {
        thinvm_space_freed(s, first + nb - freed, freed);
    }
    return delta;
}

static bool leaf_is_uniform(ThinvmPage *leaf)
{
    const uint16_t *counts = (uint16_t *)leaf->data;

    return counts[0] == counts[THINVM_COUNTS_PER_LEAF - 1] &&
           !memcmp(counts, counts + 1,
                   (THINVM_COUNTS_PER_LEAF - 1) * sizeof(*counts));
}

static bool inner_is_uniform(ThinvmPage *page)
{
    const ThinvmPointerLe *slots = thinvm_page_slots(page);

    for (unsigned i = 1; i < THINVM_POINTERS_PER_PAGE; i++) {
        if (slots[i].word_le != slots[0].word_le) {
            return false;
        }
    }
    return thinvm_slot_type(&slots[0]) != THINVM_PTR_PAGE;
}

/* A page that says no more than a pointer can: back to the pointer */
static void collapse(ThinvmState *s, ThinvmPointerLe *slot, ThinvmPage *page)
{
    uint64_t word;

    if (page->level) {
        if (!inner_is_uniform(page)) {
            return;
        }
        word = thinvm_slot_word(&thinvm_page_slots(page)[0]);
    } else {
        uint16_t count = le16_to_cpu(*(uint16_t *)page->data);

        if (!leaf_is_uniform(page)) {
            return;
        }
        word = count ? thinvm_slot_make(THINVM_PTR_UNIFORM, count) : 0;
    }
    thinvm_slot_set(slot, word, 0, 0);
    thinvm_page_unref(s, page->number);
}

/* All counts below a pointer that stands for them change */
static int64_t change_uniform(ThinvmState *s, ThinvmPointerLe *slot, int level,
                              uint64_t base, ThinvmCountChange change)
{
    uint16_t old = thinvm_slot_type(slot) == THINVM_PTR_NONE ? 0 :
                   thinvm_slot_address(slot);
    uint16_t new = count_changed(s, old, change);

    thinvm_slot_set(slot, new ? thinvm_slot_make(THINVM_PTR_UNIFORM, new) : 0,
                    0, 0);
    if (old && !new) {
        thinvm_space_freed(s, base, level_span(level));
    }
    return ((new == 0) - (old == 0)) * (int64_t)level_span(level);
}

/*
 * Change those of the counts [first, end) that are below @slot, whose range
 * begins at @base.  Returns by how much the free clusters grew.
 */
static int64_t change_below(ThinvmState *s, ThinvmPointerLe *slot, int level,
                            uint64_t base, uint64_t first, uint64_t end,
                            ThinvmCountChange change)
{
    ThinvmPage *page;
    int64_t delta = 0;

    clip(level, base, &first, &end);
    if (thinvm_slot_type(slot) == THINVM_PTR_PAGE &&
        thinvm_page_resident(s, slot, level_kind(level), level)) {
        page = thinvm_page_shadow(s, slot);
    } else if (end - first == level_span(level)) {
        return change_uniform(s, slot, level, base, change);
    } else {
        page = materialize(s, slot, level, base);
    }
    if (level == 0) {
        delta = change_leaf(s, page, first, end - first, change);
    } else {
        for (unsigned i = child_index(first, level);
             i <= child_index(end - 1, level); i++) {
            delta += change_below(s, &thinvm_page_slots(page)[i], level - 1,
                                  base + i * level_span(level - 1), first, end,
                                  change);
        }
    }
    if (level < THINVM_INNER_LEVELS) {
        thinvm_slot_set(slot, thinvm_slot_word(slot), 0,
                        le32_to_cpu(slot->extra_le) + delta);
    }
    collapse(s, slot, page);
    return delta;
}

void thinvm_count_change(ThinvmState *s, uint64_t first, uint64_t nb_clusters,
                         ThinvmCountChange change)
{
    s->nb_count_free += change_below(s, &s->count_root, THINVM_INNER_LEVELS, 0,
                                     first, first + nb_clusters, change);
}

/* ------------------------------------------------------------------ */
/* Repair                                                              */

/* The free clusters below a page, by its own contents */
static uint64_t page_free_clusters(ThinvmState *s, ThinvmPage *page,
                                   uint64_t base)
{
    const uint16_t *counts = (uint16_t *)page->data;
    uint64_t sum = 0;

    if (page->level == 0) {
        for (uint64_t i = 0; i < level_exists(s, 0, base); i++) {
            sum += counts[i] == 0;
        }
        return sum;
    }
    for (unsigned i = 0; i < THINVM_POINTERS_PER_PAGE; i++) {
        sum += slot_free(s, &thinvm_page_slots(page)[i], page->level - 1,
                         base + i * level_span(page->level - 1));
    }
    return sum;
}

static void set_below(ThinvmState *s, ThinvmPointerLe *slot, int level,
                      uint64_t cluster, uint16_t count)
{
    uint64_t base = QEMU_ALIGN_DOWN(cluster, level_span(level));
    ThinvmPage *page = thinvm_slot_type(slot) == THINVM_PTR_PAGE &&
                       thinvm_page_resident(s, slot, level_kind(level),
                                            level) ?
                       thinvm_page_shadow(s, slot) :
                       materialize(s, slot, level, base);

    if (level == 0) {
        qatomic_set((uint16_t *)page->data + (cluster - base),
                    cpu_to_le16(count));
    } else {
        set_below(s, &thinvm_page_slots(page)[child_index(cluster, level)],
                  level - 1, cluster, count);
    }
    if (level < THINVM_INNER_LEVELS) {
        thinvm_slot_set(slot, thinvm_slot_word(slot), 0,
                        page_free_clusters(s, page, base));
        collapse(s, slot, page);
    } else {
        s->nb_count_free = page_free_clusters(s, page, base);
    }
}

int thinvm_repair_cluster_count(ThinvmState *s, uint64_t cluster,
                                uint16_t count, ThinvmNeeds *needs)
{
    int ret;

    needs->nb_want = 0;
    s->mark++;
    s->new_pages = 0;
    s->last_count_leaf = UINT64_MAX;
    ret = thinvm_count_need(s, cluster, 1, needs);
    if (ret < 0) {
        return ret;
    }
    if (s->nb_meta_free < s->new_pages + thinvm_space_last_pages(s)) {
        return -ENOSPC;
    }
    seqlock_write_begin(&s->sequence);
    set_below(s, &s->count_root, THINVM_INNER_LEVELS, cluster, count);
    seqlock_write_end(&s->sequence);
    return 0;
}

/* ------------------------------------------------------------------ */
/* The device grows                                                    */

int thinvm_count_need_grow(ThinvmState *s, ThinvmNeeds *needs)
{
    return thinvm_count_need(s, s->device_clusters, 1, needs);
}

/*
 * PAGE pointers whose range holds the old end have more free clusters now;
 * pages below them exist only on the path to that end.
 */
void thinvm_count_grow(ThinvmState *s, uint64_t device_clusters)
{
    uint64_t old = s->device_clusters;
    ThinvmPointerLe *slot = &s->count_root;
    uint64_t base = 0;

    for (int level = THINVM_INNER_LEVELS;
         thinvm_slot_type(slot) == THINVM_PTR_PAGE; level--) {
        ThinvmPage *page = thinvm_page_shadow(s, slot);
        unsigned index;

        if (level < THINVM_INNER_LEVELS) {
            uint64_t end = MIN(device_clusters, base + level_span(level));

            thinvm_slot_set(slot, thinvm_slot_word(slot), 0,
                            le32_to_cpu(slot->extra_le) + (end - old));
        }
        if (level == 0) {
            break;
        }
        index = child_index(old, level);
        base += index * level_span(level - 1);
        slot = &thinvm_page_slots(page)[index];
    }
    s->nb_count_free += device_clusters - old;
    s->device_clusters = device_clusters;
    s->bounds.device_clusters = device_clusters;
}

/* ------------------------------------------------------------------ */
/* The device shrinks                                                  */

/* Does a page of the tree say what is behind @end? */
static bool names_behind(ThinvmPage *page, uint64_t base, uint64_t end)
{
    int level = page->level;

    for (unsigned i = 0; level && i < THINVM_POINTERS_PER_PAGE; i++) {
        if (base + i * level_span(level - 1) >= end &&
            thinvm_slot_type(&thinvm_page_slots(page)[i]) !=
            THINVM_PTR_NONE) {
            return true;
        }
    }
    return false;
}

int thinvm_count_need_shrink(ThinvmState *s, uint64_t device_clusters,
                             ThinvmNeeds *needs)
{
    const ThinvmPointerLe *slot = &s->count_root;
    uint64_t base = 0;
    int ret = thinvm_count_expect(s, device_clusters,
                                  s->device_clusters - device_clusters, 0, 0,
                                  needs);

    if (ret < 0) {
        return ret;
    }
    for (int level = THINVM_INNER_LEVELS;
         thinvm_slot_type(slot) == THINVM_PTR_PAGE; level--) {
        ThinvmPage *page = thinvm_page_get(s, slot, level_kind(level), level,
                                           needs);
        unsigned index;

        if (!page) {
            return -EAGAIN;
        }
        thinvm_page_touch(s, page, false);
        if (names_behind(page, base, device_clusters)) {
            return -EBADMSG;
        }
        if (level == 0) {
            break;
        }
        index = child_index(device_clusters - 1, level);
        base += index * level_span(level - 1);
        slot = &thinvm_page_slots(page)[index];
    }
    return 0;
}

/* As thinvm_count_grow(), on the path to the last cluster that stays */
void thinvm_count_shrink(ThinvmState *s, uint64_t device_clusters)
{
    uint64_t old = s->device_clusters;
    ThinvmPointerLe *slot = &s->count_root;
    uint64_t base = 0;

    for (int level = THINVM_INNER_LEVELS;
         thinvm_slot_type(slot) == THINVM_PTR_PAGE; level--) {
        uint64_t end = MIN(old, base + level_span(level));
        ThinvmPage *page = thinvm_page_shadow(s, slot);
        unsigned index;

        if (level < THINVM_INNER_LEVELS && end > device_clusters) {
            thinvm_slot_set(slot, thinvm_slot_word(slot), 0,
                            le32_to_cpu(slot->extra_le) -
                            (end - device_clusters));
        }
        if (level == 0) {
            break;
        }
        index = child_index(device_clusters - 1, level);
        base += index * level_span(level - 1);
        slot = &thinvm_page_slots(page)[index];
    }
    s->nb_count_free -= old - device_clusters;
    s->device_clusters = device_clusters;
    s->bounds.device_clusters = device_clusters;
    s->search_hint = MIN(s->search_hint, device_clusters);
}

/* ------------------------------------------------------------------ */
/* The last cluster in use                                             */

/* A page all of which is free, which others may write, is passed over */
static int high_water_below(ThinvmState *s, const ThinvmPointerLe *slot,
                            int level, uint64_t base, uint64_t *end,
                            ThinvmNeeds *needs)
{
    const uint16_t *counts;
    ThinvmPage *page;
    int ret = 0;

    if (thinvm_slot_type(slot) != THINVM_PTR_PAGE) {
        *end = thinvm_slot_type(slot) == THINVM_PTR_NONE ? 0 :
               MIN(base + level_span(level), s->device_clusters);
        return 0;
    }
    page = thinvm_page_get(s, slot, level_kind(level), level, needs);
    if (!page) {
        return -EAGAIN;
    }
    counts = (const uint16_t *)page->data;
    for (int i = THINVM_COUNTS_PER_LEAF - 1; level == 0 && i >= 0; i--) {
        if (counts[i]) {
            *end = base + i + 1;
            return 0;
        }
    }
    for (int i = THINVM_POINTERS_PER_PAGE - 1;
         level > 0 && i >= 0 && ret == 0 && !*end; i--) {
        ret = high_water_below(s, &thinvm_page_slots(page)[i], level - 1,
                               base + i * level_span(level - 1), end, needs);
    }
    return ret;
}

int thinvm_state_high_water(ThinvmState *s, uint64_t *end, ThinvmNeeds *needs)
{
    needs->nb_want = 0;
    *end = 0;
    return high_water_below(s, &s->count_root, THINVM_INNER_LEVELS, 0, end,
                            needs);
}

/* ------------------------------------------------------------------ */
/* Other places for the tree's pages                                   */

static int retired_below(ThinvmState *s, const ThinvmPointerLe *slot,
                         int level, uint64_t base, uint64_t *cluster,
                         ThinvmNeeds *needs)
{
    ThinvmPage *page;
    int ret = 0;

    if (thinvm_slot_type(slot) != THINVM_PTR_PAGE ||
        *cluster >= base + level_span(level)) {
        return 0;
    }
    page = thinvm_page_find(s, thinvm_slot_address(slot));
    if (thinvm_page_is_retired(s, thinvm_slot_address(slot)) &&
        !(page && thinvm_page_writable(s, page))) {
        *cluster = MAX(*cluster, base);
        return thinvm_page_get(s, slot, level_kind(level), level, needs) ?
               1 : -EAGAIN;
    }
    if (level == 0) {
        return 0;
    }
    page = thinvm_page_get(s, slot, level_kind(level), level, needs);
    if (!page) {
        return -EAGAIN;
    }
    for (unsigned i = 0; i < THINVM_POINTERS_PER_PAGE && ret == 0; i++) {
        ret = retired_below(s, &thinvm_page_slots(page)[i], level - 1,
                            base + i * level_span(level - 1), cluster, needs);
    }
    return ret;
}

int thinvm_count_find_retired(ThinvmState *s, uint64_t *cluster,
                              ThinvmNeeds *needs)
{
    return retired_below(s, &s->count_root, THINVM_INNER_LEVELS, 0, cluster,
                         needs);
}

void thinvm_count_rewrite(ThinvmState *s, uint64_t cluster)
{
    ThinvmPointerLe *slot = &s->count_root;

    for (int level = THINVM_INNER_LEVELS;
         thinvm_slot_type(slot) == THINVM_PTR_PAGE; level--) {
        bool retired = thinvm_page_is_retired(s, thinvm_slot_address(slot));
        ThinvmPage *page = thinvm_page_shadow(s, slot);

        if (retired || level == 0) {
            break;
        }
        slot = &thinvm_page_slots(page)[child_index(cluster, level)];
    }
}

/* ------------------------------------------------------------------ */
/* Finding space                                                       */

/* Free ones from @c to @end, at most @max, that have no page or this leaf */
static uint64_t run_length(ThinvmPage *leaf, uint64_t c, uint64_t end,
                           uint64_t max)
{
    const uint16_t *counts = leaf ? (uint16_t *)leaf->data : NULL;
    uint64_t n = 0;

    max = MIN(max, end - c);
    while (counts && n < max &&
           !counts[(c + n) & (THINVM_COUNTS_PER_LEAF - 1)]) {
        n++;
    }
    return counts ? n : max;
}

/* In one leaf's range: 0 if found, -ENOENT if not */
static int find_in_leaf(ThinvmState *s, ThinvmPage *leaf, uint64_t from,
                        uint64_t end, uint64_t max, uint64_t *first,
                        uint64_t *nb_clusters)
{
    uint64_t c = from;

    while ((c = thinvm_space_next_idle(s, c, end)) < end) {
        uint64_t idle_end = thinvm_space_next_busy(s, c, end);

        for (; c < idle_end; c++) {
            uint64_t n = run_length(leaf, c, idle_end, max);

            if (n) {
                *first = c;
                *nb_clusters = n;
                return 0;
            }
        }
    }
    return -ENOENT;
}

/*
 * A count of 0 may be a lie: data over metadata would be a wrong write, so
 * nothing more is given away then.
 */
static int judge_free(ThinvmState *s, uint64_t first, uint64_t nb_clusters)
{
    if (first < s->first_cluster ||
        thinvm_extents_have_clusters(s, first, nb_clusters)) {
        s->damaged = true;
        return -EBADMSG;
    }
    return 0;
}

/* @exact: only what begins at @from; else -ENOSPC */
static int find_piece(ThinvmState *s, uint64_t from, bool exact, uint64_t max,
                      uint64_t *first, uint64_t *nb_clusters,
                      ThinvmNeeds *needs)
{
    uint64_t c = from;

    while (c < s->device_clusters && (c == from || !exact)) {
        const ThinvmPointerLe *slot = &s->count_root;
        uint64_t base = 0, end;
        ThinvmPage *page = NULL;
        int level;

        /* Down to the first range that is no page, or full, or a leaf */
        for (level = THINVM_INNER_LEVELS; ; level--) {
            base = QEMU_ALIGN_DOWN(c, level_span(level));
            if (thinvm_slot_type(slot) != THINVM_PTR_PAGE ||
                (level < THINVM_INNER_LEVELS &&
                 slot_free(s, slot, level, base) == 0)) {
                page = NULL;
                break;
            }
            page = thinvm_page_get(s, slot, level_kind(level), level, needs);
            if (!page) {
                return -EAGAIN;
            }
            if (level == 0) {
                break;
            }
            slot = &thinvm_page_slots(page)[child_index(c, level)];
        }
        end = MIN(base + level_span(level), s->device_clusters);
        if (slot_free(s, slot, level, base) &&
            find_in_leaf(s, page, c, end, max, first, nb_clusters) == 0) {
            return exact && *first != from ? -ENOSPC :
                   judge_free(s, *first, *nb_clusters);
        }
        c = base + level_span(level);
    }
    return -ENOSPC;
}

int thinvm_count_find_free(ThinvmState *s, uint64_t from, uint64_t max,
                           uint64_t *first, uint64_t *nb_clusters,
                           ThinvmNeeds *needs)
{
    int ret = find_piece(s, from, false, max, first, nb_clusters, needs);

    /* It may go on behind the range of a leaf: only thus are runs found */
    while (ret == 0 && *nb_clusters < max &&
           !((*first + *nb_clusters) & (level_span(0) - 1))) {
        uint64_t next, nb;

        ret = find_piece(s, *first + *nb_clusters, true, max - *nb_clusters,
                         &next, &nb, needs);
        if (ret == -ENOSPC) {
            return 0;
        }
        if (ret == 0) {
            *nb_clusters += nb;
        }
    }
    return ret;
}

int thinvm_count_all_free(ThinvmState *s, uint64_t first, uint64_t nb_clusters,
                          ThinvmNeeds *needs)
{
    needs->nb_want = 0;
    if (first < s->first_cluster ||
        nb_clusters > s->device_clusters - MIN(first, s->device_clusters)) {
        return -ENOENT;
    }
    while (nb_clusters) {
        uint64_t found, nb;
        int ret = find_piece(s, first, true, nb_clusters, &found, &nb, needs);

        if (ret < 0) {
            return ret == -EAGAIN ? ret : -ENOENT;
        }
        first += nb;
        nb_clusters -= nb;
    }
    return 0;
}
