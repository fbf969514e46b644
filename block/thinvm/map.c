/*
 * thinvm metadata engine: mapping trees, look-up
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Engine layer.  A mapping tree has three inner levels over leaves of 512
 * entries.  A pointer of any level may stand for a range that is unmapped or
 * reads as zeroes, and one of the last level for a run: 512 contiguous
 * clusters without a leaf.  map-ops.c changes trees; here they are read.
 *
 * Look-up without the lock: the walk reads each word atomically and each page
 * under RCU; whether it saw one state is told by state->sequence afterwards.
 * What a walk meets while an operation is applied is bounded by the page
 * kinds, so it can be wrong, but not run away.
 */
#include "qemu/osdep.h"
#include "map.h"

/* Join following slots of the same page that stand for the same, for so many
   clusters at least if there are so many */
static uint64_t join_slots(const ThinvmPointerLe *slots, unsigned index,
                           ThinvmPointerType type, int level, uint64_t enough)
{
    uint64_t span = thinvm_map_span(level);
    unsigned n = 1;

    while (slots && index + n < THINVM_POINTERS_PER_PAGE &&
           n * span < enough &&
           thinvm_slot_type(&slots[index + n]) == type) {
        n++;
    }
    return n * span;
}

static void entry_mapping(uint64_t entry, ThinvmMapping *m)
{
    m->physical = thinvm_entry_physical(entry);
    m->valid = thinvm_entry_valid(entry);
    m->source = thinvm_entry_source(entry);
    m->type = m->physical ? THINVM_MAPPING_DATA :
              m->source == THINVM_SOURCE_ZERO ? THINVM_MAPPING_ZERO :
              THINVM_MAPPING_NONE;
}

static void leaf_mapping(ThinvmPage *leaf, uint64_t guest, uint64_t count,
                         ThinvmMapping *m, bool *flagged)
{
    unsigned index = guest & (THINVM_ENTRIES_PER_LEAF - 1);
    uint64_t max = MIN(count, THINVM_ENTRIES_PER_LEAF - index);
    uint64_t first = le64_to_cpu(qatomic_read(&leaf->data[index]));
    uint64_t n = 1;

    entry_mapping(first, m);
    /* What a mark vouches for is never written in place */
    m->shared |= m->source == THINVM_SOURCE_TEMPLATE;
    *flagged |= !!(first & THINVM_ENTRY_SHARED);
    while (n < max) {
        uint64_t entry = le64_to_cpu(qatomic_read(&leaf->data[index + n]));

        if (entry != first + (m->physical ? n : 0)) {
            break;
        }
        n++;
    }
    m->count = n;
}

/* A walk: where it is, and what it has met on the way */
typedef struct Walk {
    const ThinvmPointerLe *slot;    /* in @slots at @index, or a root */
    const ThinvmPointerLe *slots;
    unsigned index;
    int level;                      /* of what @slot points to */
    bool flagged;                   /* something may be shared below */
    ThinvmPage *level1;             /* the page of level 1 on the path */
} Walk;

static void walk_enter(Walk *w, ThinvmPage *page, uint64_t guest)
{
    w->slots = thinvm_page_slots(page);
    w->index = thinvm_map_index(guest, page->level);
    w->slot = &w->slots[w->index];
    w->level = page->level - 1;
    if (page->level == 1) {
        w->level1 = page;
    }
}

/*
 * One walk.  0; -EAGAIN: a page is not in memory (wanted if @needs), or the
 * walk lost its way among changes.
 */
static inline QEMU_ALWAYS_INLINE int
lookup_once(ThinvmState *s, Walk *w, uint64_t guest, uint64_t count,
            ThinvmMapping *m, ThinvmNeeds *needs)
{
    m->guest = guest;
    m->shared = false;
    m->physical = 0;
    m->valid = 0;
    m->source = THINVM_SOURCE_BACKING;
    for (;;) {
        const ThinvmPointerLe *slot = w->slot;
        int level = w->level;
        uint64_t word = thinvm_slot_word(slot);
        ThinvmPointerType type = (word >> THINVM_PTR_TYPE_SHIFT) & 15;
        uint64_t offset = guest & (thinvm_map_span(level) - 1);
        ThinvmPage *page;

        w->flagged |= !!(word & THINVM_PTR_SHARED_BELOW);
        if (type == THINVM_PTR_NONE || type == THINVM_PTR_ZERO) {
            m->type = type == THINVM_PTR_ZERO ? THINVM_MAPPING_ZERO :
                      THINVM_MAPPING_NONE;
            m->source = type == THINVM_PTR_ZERO ? THINVM_SOURCE_ZERO :
                        THINVM_SOURCE_BACKING;
            m->count = MIN(count, join_slots(w->slots, w->index, type, level,
                                             offset + count) - offset);
            return 0;
        }
        if (type == THINVM_PTR_RUN || type == THINVM_PTR_UNWRITTEN_RUN) {
            entry_mapping(thinvm_run_entry(word, offset), m);
            m->count = MIN(count, thinvm_map_span(0) - offset);
            return 0;
        }
        if (needs) {
            page = thinvm_page_get(s, slot, thinvm_map_kind(level), level,
                                   needs);
            if (!page && w->slots) {
                thinvm_needs_neighbours(s, needs, w->slots);
            }
        } else {
            page = thinvm_page_find(s, word & THINVM_CLUSTER_MASK);
        }
        if (!page || page->kind != thinvm_map_kind(level) ||
            page->level != level) {
            return -EAGAIN;
        }
        if (qatomic_read(page->count) > 1) {
            m->shared = true;
        }
        if (level == 0) {
            leaf_mapping(page, guest, count, m, &w->flagged);
            return 0;
        }
        walk_enter(w, page, guest);
    }
}

/* ------------------------------------------------------------------ */
/* A short cut to pages of level 1 of the active disk                  */

/*
 * state->short_cut[] names pages of level 1 to which a private, unflagged
 * path leads.  It is written under the lock and emptied whenever an inner
 * page of a mapping tree comes, goes, or gets another reference; so a walk
 * that begins there is as good as one from the root, and is checked by the
 * sequence count in the same way.
 */
static ThinvmPage **short_cut(ThinvmState *s, uint64_t guest)
{
    return &s->short_cut[(guest >> 17) & (THINVM_SHORT_CUTS - 1)];
}

void thinvm_map_short_cut_clear(ThinvmState *s)
{
    if (s->short_cut_used) {
        for (unsigned i = 0; i < THINVM_SHORT_CUTS; i++) {
            qatomic_set(&s->short_cut[i], NULL);
        }
        s->short_cut_used = false;
    }
}

static inline void short_cut_enter(ThinvmState *s, uint64_t guest, Walk *w)
{
    ThinvmPage *page = qatomic_rcu_read(short_cut(s, guest));

    if (page &&
        qatomic_read(&page->guest) == (guest & ~(thinvm_map_span(1) - 1))) {
        walk_enter(w, page, guest);
    }
}

/* After a walk of @sequence from the root; gives up rather than wait */
static void short_cut_set(ThinvmState *s, uint64_t guest, ThinvmPage *page,
                          unsigned sequence)
{
    if (qemu_mutex_trylock(&s->lock)) {
        return;
    }
    if (!seqlock_read_retry(&s->sequence, sequence) &&
        thinvm_page_find(s, page->number) == page) {
        qatomic_set(&page->guest, guest & ~(thinvm_map_span(1) - 1));
        s->short_cut_used = true;
        /* who sees the page sees which one it is */
        qatomic_rcu_set(short_cut(s, guest), page);
    }
    thinvm_state_unlock(s);
}

/* Settle by the counts whether clusters that may be shared are; lock held */
static int settle_shared(ThinvmState *s, ThinvmMapping *m, ThinvmNeeds *needs)
{
    uint64_t n = 0;
    uint16_t count;
    int ret;

    for (; n < MIN(m->count, THINVM_ENTRIES_PER_LEAF); n++) {
        ret = thinvm_count_get(s, m->physical + n, &count, needs);
        if (ret < 0) {
            if (n) {
                break;
            }
            return ret;
        }
        if (n == 0) {
            m->shared = count > 1;
        } else if (m->shared != (count > 1)) {
            break;
        }
    }
    m->count = n;
    return 0;
}

static int lookup_locked(ThinvmState *s, const ThinvmPointerLe *slot,
                         uint64_t guest, uint64_t count, bool for_write,
                         ThinvmMapping *m, ThinvmNeeds *needs)
{
    Walk w = { .slot = slot, .level = THINVM_INNER_LEVELS };
    int ret;

    needs->nb_want = 0;
    ret = lookup_once(s, &w, guest, count, m, needs);
    if (ret == -EAGAIN && !needs->nb_want) {
        /* A page of another kind than its parent says; not on this walk */
        return -EBADMSG;
    }
    if (ret == 0 && for_write && w.flagged && !m->shared &&
        m->type == THINVM_MAPPING_DATA) {
        ret = settle_shared(s, m, needs);
        if (ret == 0) {
            needs->nb_want = 0;
        }
    }
    return ret;
}

/* Without the lock; 0, or -EAGAIN where that does not do */
static inline QEMU_ALWAYS_INLINE int
lookup_unlocked(ThinvmState *s, const ThinvmPointerLe *slot, bool may_cut,
                uint64_t guest, uint64_t count, bool for_write,
                ThinvmMapping *m)
{
    Walk w = { .slot = slot, .level = THINVM_INNER_LEVELS };
    unsigned sequence;
    bool cut;
    int ret;

    RCU_READ_LOCK_GUARD();
    sequence = seqlock_read_begin(&s->sequence);
    if (may_cut) {
        short_cut_enter(s, guest, &w);
    }
    cut = w.level1;
    ret = lookup_once(s, &w, guest, count, m, NULL);
    if (seqlock_read_retry(&s->sequence, sequence)) {
        return -EAGAIN;
    }
    if (ret == 0 && may_cut && !cut && w.level1 && !m->shared && !w.flagged) {
        short_cut_set(s, guest, w.level1, sequence);
    }
    if (ret == 0 && for_write && w.flagged && !m->shared &&
        m->type == THINVM_MAPPING_DATA) {
        return -EAGAIN;     /* the counts must tell */
    }
    return ret;
}

int thinvm_state_lookup_cached(ThinvmState *s, int tree, uint64_t guest,
                               uint64_t count, bool for_write,
                               ThinvmMapping *m)
{
    int ret;

    if (unlikely(guest >= THINVM_MAX_GUEST_CLUSTERS)) {
        return -EAGAIN;
    }
    ret = lookup_unlocked(s, &s->root[tree], tree == THINVM_TREE_DISK, guest,
                          count, for_write, m);
    if (ret == 0) {
        qatomic_set(&s->hits, qatomic_read(&s->hits) + 1);
    }
    return ret;
}

int thinvm_state_lookup(ThinvmState *s, int tree, const ThinvmPointer *root,
                        uint64_t guest, uint64_t count, bool for_write,
                        ThinvmMapping *m, ThinvmNeeds *needs)
{
    const ThinvmPointerLe *slot = &s->root[tree];
    ThinvmPointerLe own;
    int ret;

    assert(count > 0);
    if (guest >= THINVM_MAX_GUEST_CLUSTERS) {
        return -EINVAL;
    }
    if (root) {
        thinvm_pointer_encode(&own, root);
        slot = &own;
    }
    ret = lookup_unlocked(s, slot, !root && tree == THINVM_TREE_DISK, guest,
                          count, for_write, m);
    if (ret == 0) {
        qatomic_set(&s->hits, qatomic_read(&s->hits) + 1);
        return 0;
    }
    thinvm_state_lock(s);
    ret = lookup_locked(s, slot, guest, count, for_write, m, needs);
    thinvm_state_unlock(s);
    return ret;
}
