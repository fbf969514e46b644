/*
 * thinvm metadata engine: filling memory ahead of need
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Engine layer; the lock is held.  Two walks over the trees of the disk and
 * of the counts of clusters, for a follower whose cache is to be warm when it
 * takes over:
 *
 *   preload  names the pages that are not in memory yet, in order, from a
 *            cursor on;
 *   adopt    gives a state that was begun on a new base the pages that the
 *            state before it has in memory, as far as the base names them.
 *
 * When is a page of the old state the one that the base names?
 *   - It is as on the device (clean), and both parents name it alike: place,
 *     generation and checksum.
 *   - It is a leaf that following changed (dirty), so it lies at a place of
 *     our own choice.  What operations do to a leaf is the same everywhere.
 *     So if the last record that touched it is in the base, the base's leaf
 *     at this position of the tree has these contents, and the checksum that
 *     the base states must confirm it.  (One that later records touched too
 *     is not what the base has; it must be read.)
 *
 * Invariant 3 is kept: the first kind was checked when it was read, the
 * second against the checksum in its parent.
 */
#include "qemu/osdep.h"
#include "state-int.h"

/* Two trees of the same form */
typedef struct WarmTree {
    unsigned leaf_bits;         /* a leaf is for 2^leaf_bits clusters */
    ThinvmPageKind leaf, inner;
} WarmTree;

static const WarmTree warm_trees[THINVM_WARM_TREES] = {
    { 9, THINVM_PAGE_MAP_LEAF, THINVM_PAGE_MAP_INNER },
    { 11, THINVM_PAGE_COUNT_LEAF, THINVM_PAGE_COUNT_INNER },
};

static const ThinvmPointerLe *warm_root(ThinvmState *s, int tree)
{
    return tree == 0 ? &s->root[THINVM_TREE_DISK] : &s->count_root;
}

static ThinvmPageKind warm_kind(int tree, int level)
{
    return level ? warm_trees[tree].inner : warm_trees[tree].leaf;
}

static uint64_t warm_span(int tree, int level)
{
    return 1ULL << (warm_trees[tree].leaf_bits + 8 * level);
}

/* Clusters that the tree is about */
static uint64_t warm_clusters(ThinvmState *s, int tree)
{
    return tree == 0 ? DIV_ROUND_UP(s->virtual_size, 1ULL << s->cluster_bits)
                     : s->device_clusters;
}

/* ------------------------------------------------------------------ */
/* Preload                                                             */

/* To be there is not to be used: what is hot stays so, and nothing else */
static void preload_want(ThinvmState *s, const ThinvmPointerLe *slot,
                         ThinvmPageKind kind, ThinvmNeeds *needs)
{
    if (!thinvm_page_peek(s, thinvm_slot_address(slot))) {
        thinvm_page_get(s, slot, kind, 0, needs);
    }
}

/*
 * Look at the slots of one page of level 1, or at the one slot on the way to
 * it that ends the walk.  Moves the cursor behind all that is in memory, or
 * wanted, or needs no page.
 */
static void preload_some(ThinvmState *s, ThinvmWarmCursor *c, unsigned max,
                         ThinvmNeeds *needs)
{
    const ThinvmPointerLe *slot = warm_root(s, c->tree);
    uint64_t at = c->cluster;
    ThinvmPage *page;

    for (int level = THINVM_INNER_LEVELS; level > 0; level--) {
        uint64_t span = warm_span(c->tree, level);

        if (thinvm_slot_type(slot) != THINVM_PTR_PAGE) {
            c->cluster = QEMU_ALIGN_DOWN(at, span) + span;
            return;
        }
        page = thinvm_page_get(s, slot, warm_kind(c->tree, level), level,
                               needs);
        if (!page) {
            return;             /* from here again when it is there */
        }
        slot = &thinvm_page_slots(page)[(at / warm_span(c->tree, level - 1)) &
                                        (THINVM_POINTERS_PER_PAGE - 1)];
    }
    do {
        if (thinvm_slot_type(slot) == THINVM_PTR_PAGE) {
            if (needs->nb_want == max) {
                return;
            }
            preload_want(s, slot, warm_kind(c->tree, 0), needs);
        }
        slot++;
        c->cluster = QEMU_ALIGN_DOWN(c->cluster, warm_span(c->tree, 0)) +
                     warm_span(c->tree, 0);
    } while (c->cluster & (warm_span(c->tree, 1) - 1));
}

int thinvm_state_preload(ThinvmState *s, ThinvmWarmCursor *c, unsigned max,
                         ThinvmNeeds *needs)
{
    needs->nb_want = 0;
    for (; c->tree < THINVM_WARM_TREES; c->tree++, c->cluster = 0) {
        while (c->cluster < warm_clusters(s, c->tree)) {
            preload_some(s, c, max, needs);
            if (needs->nb_want) {
                return -EAGAIN;
            }
        }
    }
    return 0;
}

bool thinvm_state_cache_full(ThinvmState *s, unsigned pages)
{
    return s->nb_clean + s->nb_dirty + pages > s->cache_limit;
}

unsigned thinvm_state_preload_percent(ThinvmState *s,
                                      const ThinvmWarmCursor *c)
{
    uint64_t all = 0, done = 0;

    for (int tree = 0; tree < THINVM_WARM_TREES; tree++) {
        /* in leaves, so that both trees count by what they may cost */
        uint64_t leaves = DIV_ROUND_UP(warm_clusters(s, tree),
                                       warm_span(tree, 0));

        all += leaves;
        done += tree < c->tree ? leaves :
                tree == c->tree ? MIN(leaves, c->cluster / warm_span(tree, 0))
                : 0;
    }
    /* Not all that is there was come by in turn */
    if (done < all) {
        done = MAX(done, MIN(s->nb_clean + s->nb_dirty, all - 1));
    }
    return all ? done * 100 / all : 100;
}

/* ------------------------------------------------------------------ */
/* Adopt                                                               */

typedef struct Adopt {
    ThinvmState *s, *old;
    int tree;
    uint64_t sequence;          /* of the base; 0: clean pages only */
    uint64_t adopted;
    ThinvmNeeds *needs;
} Adopt;

/* The page of the old state that @slot of the old state names, if any */
static ThinvmPage *old_page(Adopt *a, const ThinvmPointerLe *slot, int level)
{
    ThinvmPage *page;

    if (!slot || thinvm_slot_type(slot) != THINVM_PTR_PAGE) {
        return NULL;
    }
    page = thinvm_page_peek(a->old, thinvm_slot_address(slot));
    return page && page->kind == warm_kind(a->tree, level) &&
           page->level == level ? page : NULL;
}

/* Do both name the same page of the device, place and generation? */
static bool same_place(const ThinvmPointerLe *a, const ThinvmPointerLe *b)
{
    const uint64_t mask = THINVM_CLUSTER_MASK |
                          0xffffULL << THINVM_PTR_GENERATION_SHIFT;

    return ((thinvm_slot_word(a) ^ thinvm_slot_word(b)) & mask) == 0;
}

static bool may_adopt(Adopt *a, const ThinvmPointerLe *slot,
                      const ThinvmPointerLe *old_slot,
                      const ThinvmPage *page, int level)
{
    uint32_t crc = le32_to_cpu(slot->crc_le);

    if (!page->dirty) {
        return page->complete && page->crc == crc &&
               same_place(slot, old_slot);
    }
    return level == 0 && page->changed <= a->sequence &&
           thinvm_checksum(&a->s->uuid, THINVM_SUM_PAGE,
                           thinvm_slot_address(slot), page->data,
                           THINVM_PAGE_SIZE) == crc;
}

static void adopt_below(Adopt *a, const ThinvmPointerLe *slot,
                        const ThinvmPointerLe *old_slot, int level)
{
    ThinvmPage *page, *old;

    if (thinvm_slot_type(slot) != THINVM_PTR_PAGE) {
        return;
    }
    old = old_page(a, old_slot, level);
    page = thinvm_page_find(a->s, thinvm_slot_address(slot));
    if (!page && old && may_adopt(a, slot, old_slot, old, level)) {
        page = thinvm_page_adopt(a->s, slot, old);
        a->adopted += page != NULL;
    }
    if (level == 0 || !old) {
        return;                 /* nothing below is in memory */
    }
    if (!page) {
        /* The base has changed it; its children may be as they were */
        thinvm_page_get(a->s, slot, warm_kind(a->tree, level), level,
                        a->needs);
        return;
    }
    for (unsigned i = 0; i < THINVM_POINTERS_PER_PAGE; i++) {
        adopt_below(a, &thinvm_page_slots(page)[i],
                    &thinvm_page_slots(old)[i], level - 1);
    }
}

int thinvm_state_adopt(ThinvmState *s, ThinvmState *old, uint64_t sequence,
                       ThinvmNeeds *needs, uint64_t *adopted)
{
    Adopt a = {
        .s = s,
        .old = old,
        .sequence = sequence,
        .needs = needs,
    };

    assert(qemu_uuid_is_equal(&s->uuid, &old->uuid));
    needs->nb_want = 0;
    for (a.tree = 0; a.tree < THINVM_WARM_TREES; a.tree++) {
        adopt_below(&a, warm_root(s, a.tree), warm_root(old, a.tree),
                    THINVM_INNER_LEVELS);
    }
    *adopted += a.adopted;
    return needs->nb_want ? -EAGAIN : 0;
}

void thinvm_state_adopt_counters(ThinvmState *s, ThinvmState *old)
{
    qatomic_set(&s->hits, qatomic_read(&old->hits));
    qatomic_set(&s->misses, s->misses + qatomic_read(&old->misses));
}
