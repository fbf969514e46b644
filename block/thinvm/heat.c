/*
 * thinvm metadata engine: which parts of the mapping are used most
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Engine layer; the lock is held.  For a cache that cannot hold all of the
 * mapping: the owner finds out which leaves of the disk's tree are hot, and a
 * follower, who is told so (hotlist.c), loads these before all others.
 *
 *   sample   a leaf that was used since the last sample gets hotter, one that
 *            was not cools down by half.  Only leaves in memory count: the
 *            clock of the cache (page.c) has kept those for a reason.
 *   load     names the pages of a list of leaves that are not in memory.
 *
 * What a list says is never more than a hint: it is checked against the
 * bounds of the disk, and decides nothing but what is read first.
 */
#include "qemu/osdep.h"
#include "state-int.h"

#define HEAT_LEAF_BITS      9       /* a leaf is for 2^9 clusters */
#define HEAT_USED           128

static uint64_t heat_span(int level)
{
    return 1ULL << (8 * level);     /* leaves below a page of this level */
}

static uint64_t heat_leaves(ThinvmState *s)
{
    return DIV_ROUND_UP(s->virtual_size,
                        1ULL << (s->cluster_bits + HEAT_LEAF_BITS));
}

static ThinvmPageKind heat_kind(int level)
{
    return level ? THINVM_PAGE_MAP_INNER : THINVM_PAGE_MAP_LEAF;
}

static bool heat_page_fits(const ThinvmPage *page, int level)
{
    return page && page->kind == heat_kind(level) && page->level == level;
}

/*
 * The slot that names @leaf, as far as memory goes: the first one on the way
 * that names a page which is not there, or none, with its level.  Level 0: the
 * slot is in the array of a page of level 1.
 */
static const ThinvmPointerLe *heat_slot(ThinvmState *s, uint64_t leaf,
                                        int *level)
{
    const ThinvmPointerLe *slot = &s->root[THINVM_TREE_DISK];

    for (*level = THINVM_INNER_LEVELS; *level > 0; (*level)--) {
        ThinvmPage *page;

        if (thinvm_slot_type(slot) != THINVM_PTR_PAGE) {
            break;
        }
        page = thinvm_page_peek(s, thinvm_slot_address(slot));
        if (!heat_page_fits(page, *level)) {
            break;
        }
        slot = &thinvm_page_slots(page)[leaf / heat_span(*level - 1) &
                                        (THINVM_POINTERS_PER_PAGE - 1)];
    }
    return slot;
}

/* ------------------------------------------------------------------ */
/* Sample                                                              */

static void heat_take(ThinvmPage *page, uint32_t leaf, GArray *found)
{
    ThinvmHotLeaf hot = { .leaf = leaf };

    page->heat /= 2;
    if (thinvm_page_untouch(page, THINVM_TOUCHED_HEAT)) {
        page->heat += HEAT_USED;
    }
    hot.heat = page->heat;
    g_array_append_val(found, hot);
}

bool thinvm_state_sample_heat(ThinvmState *s, uint64_t *leaf, GArray *found)
{
    const ThinvmPointerLe *slot;
    int level;

    if (*leaf >= heat_leaves(s)) {
        return false;
    }
    /* What steps are made of: the leaves of one page of level 1 */
    *leaf = QEMU_ALIGN_DOWN(*leaf, heat_span(1));
    slot = heat_slot(s, *leaf, &level);
    if (level) {
        *leaf = QEMU_ALIGN_DOWN(*leaf, heat_span(level)) + heat_span(level);
        return true;
    }
    for (unsigned i = 0; i < THINVM_POINTERS_PER_PAGE; i++, slot++, ++*leaf) {
        ThinvmPage *page;

        if (thinvm_slot_type(slot) != THINVM_PTR_PAGE) {
            continue;
        }
        page = thinvm_page_peek(s, thinvm_slot_address(slot));
        if (heat_page_fits(page, 0)) {
            heat_take(page, *leaf, found);
        }
    }
    return true;
}

/* Hottest first; within one heat by place, which is faster to read */
static int heat_compare(gconstpointer a, gconstpointer b)
{
    const ThinvmHotLeaf *ha = a, *hb = b;

    if (ha->heat != hb->heat) {
        return ha->heat > hb->heat ? -1 : 1;
    }
    return ha->leaf < hb->leaf ? -1 : ha->leaf > hb->leaf;
}

void thinvm_heat_sort(GArray *found)
{
    g_array_sort(found, heat_compare);
}

/* ------------------------------------------------------------------ */
/* Load                                                                */

/*
 * Want @leaf, or the first page on the way to it that is not there: false.
 * Adds to *pages what a clean page more or less in memory makes.
 */
static bool heat_want(ThinvmState *s, uint64_t leaf, ThinvmNeeds *needs,
                      uint64_t *pages)
{
    const ThinvmPointerLe *slot;
    ThinvmPage *page;
    int level;

    slot = heat_slot(s, leaf, &level);
    if (thinvm_slot_type(slot) != THINVM_PTR_PAGE) {
        return true;
    }
    /* One that is there is to stay, so this counts as using it */
    page = thinvm_page_get(s, slot, heat_kind(level), level, needs);
    *pages += !page || !page->dirty;
    return page || level == 0;
}

int thinvm_state_preload_hot(ThinvmState *s, ThinvmHotCursor *c, unsigned max,
                             ThinvmNeeds *needs)
{
    uint64_t limit = s->cache_limit / 8 * 7;
    uint64_t nb_leaves = heat_leaves(s);

    needs->nb_want = 0;
    while (c->at < c->nb && needs->nb_want < max) {
        uint32_t leaf = c->leaf[c->at];

        if (c->pages + s->nb_dirty >= limit) {
            c->at = c->nb;
            break;
        }
        if (leaf < nb_leaves && !heat_want(s, leaf, needs, &c->pages)) {
            return -EAGAIN;     /* once more when it is there */
        }
        c->at++;
    }
    return needs->nb_want ? -EAGAIN : 0;
}
