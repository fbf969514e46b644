/*
 * thinvm metadata engine: pages in memory
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Engine layer.  Finds, takes in, copies, counts and evicts metadata pages;
 * knows nothing of what they mean beyond asking map.c for the references of
 * a copy.
 *
 * A page in memory is in one of these lists:
 *   clean      as on the device; may be evicted (clock) when nobody pins it
 *   dirty[]    made in the interval being built; one list for each rank
 *   (frozen)   in state->frozen->pages, immutable, until the thaw
 * and in the hash by its place, unless no pointer names it any more.
 *
 * Invariant 3: bytes from a device come in by thinvm_state_insert_page(), or by
 * its sister for neighbours, and no page before check_page() has judged it.
 *
 * Own invariant: a page whose generation is not the one that is being built, or
 * that several pointers name, is never changed.
 */
#include "qemu/osdep.h"
#include "qemu/memalign.h"
#include "qemu/xxhash.h"
#include "state-int.h"

static uint32_t page_hash(uint64_t number)
{
    return qemu_xxhash2(number);
}

static bool page_equal(const void *a, const void *b)
{
    const ThinvmPage *p = a, *q = b;

    return p->number == q->number;
}

static bool page_has_number(const void *obj, const void *userp)
{
    const ThinvmPage *page = obj;
    const uint64_t *number = userp;

    return page->number == *number;
}

static void page_free(ThinvmPage *page)
{
    qemu_vfree(page);
}

/*
 * The hash costs a hundred instructions, and an operation finds a page some
 * thirty times.  So the page that came last for a number modulo this is in
 * state->known, too.  Pages lie side by side on the device, so 128 MiB of
 * them hardly ever meet; of these 256 KiB only what is used takes memory.
 * Written under the lock; read without it, as the hash is (RCU).
 */
#define KNOWN_PAGES     32768

static ThinvmPage **known_page(ThinvmState *s, uint64_t number)
{
    return &s->known[number % KNOWN_PAGES];
}

void thinvm_pages_init(ThinvmState *s)
{
    s->known = g_new0(ThinvmPage *, KNOWN_PAGES);
    qht_init(&s->pages, page_equal, 1024, QHT_MODE_AUTO_RESIZE);
    QTAILQ_INIT(&s->all_pages);
    QTAILQ_INIT(&s->clean);
    for (int i = 0; i < THINVM_NB_RANKS; i++) {
        QTAILQ_INIT(&s->dirty[i]);
    }
}

static ThinvmPage *page_alloc(void)
{
    ThinvmPage *page = qemu_memalign(64, sizeof(ThinvmPage));

    memset(page, 0, offsetof(ThinvmPage, data));
    return page;
}

static int page_rank(const ThinvmPage *page)
{
    switch (page->kind) {
    case THINVM_PAGE_SNAPSHOT_LEAF:
        return THINVM_RANK_SNAPSHOT_LEAF;
    case THINVM_PAGE_SNAPSHOT_INNER:
        return THINVM_RANK_SNAPSHOT_LEAF + page->level;
    case THINVM_PAGE_BACKING:
        return THINVM_RANK_BACKING;
    default:
        return THINVM_RANK_LEAF + page->level;
    }
}

void thinvm_pages_destroy(ThinvmState *s)
{
    ThinvmPage *page, *next;

    QTAILQ_FOREACH_SAFE(page, &s->clean, link, next) {
        page_free(page);
    }
    for (int i = 0; i < THINVM_NB_RANKS; i++) {
        QTAILQ_FOREACH_SAFE(page, &s->dirty[i], link, next) {
            page_free(page);
        }
    }
    if (s->frozen) {
        for (unsigned i = 0; i < s->frozen->nb_pages; i++) {
            page_free(s->frozen->pages[i]);
        }
        g_free(s->frozen->pages);
        g_free(s->frozen);
    }
    qht_destroy(&s->pages);
    g_free(s->known);
}

ThinvmPage *thinvm_page_peek(ThinvmState *s, uint64_t number)
{
    ThinvmPage *page = qatomic_rcu_read(known_page(s, number));

    if (likely(page && page->number == number)) {
        return page;
    }
    return qht_lookup_custom(&s->pages, &number, page_hash(number),
                             page_has_number);
}

ThinvmPage *thinvm_page_find(ThinvmState *s, uint64_t number)
{
    ThinvmPage *page = thinvm_page_peek(s, number);

    /* Losing a bit to somebody who clears another at this time does no harm */
    if (page && qatomic_read(&page->touched) != THINVM_TOUCHED_ALL) {
        qatomic_set(&page->touched, THINVM_TOUCHED_ALL);
    }
    return page;
}

bool thinvm_page_untouch(ThinvmPage *page, unsigned who)
{
    unsigned touched = qatomic_read(&page->touched);

    qatomic_set(&page->touched, touched & ~who);
    return touched & who;
}

void thinvm_needs_init(ThinvmNeeds *needs)
{
    memset(needs, 0, sizeof(*needs));
}

static void needs_pin(ThinvmNeeds *needs, ThinvmPage *page)
{
    if (needs->nb_pinned == needs->max_pinned) {
        needs->max_pinned = MAX(16, needs->max_pinned * 2);
        needs->pinned = g_renew(ThinvmPage *, needs->pinned,
                                needs->max_pinned);
    }
    page->pins++;
    needs->pinned[needs->nb_pinned++] = page;
}

void thinvm_needs_want(ThinvmState *s, ThinvmNeeds *needs,
                       const ThinvmPageRef *ref)
{
    if (!needs->nb_want) {
        needs->generation = s->generation;
        needs->nb_near = 0;
    }
    for (unsigned i = 0; i < needs->nb_want; i++) {
        if (needs->want[i].page == ref->page) {
            return;
        }
    }
    if (needs->nb_want == needs->max_want) {
        needs->max_want = MAX(8, needs->max_want * 2);
        needs->want = g_renew(ThinvmPageRef, needs->want, needs->max_want);
    }
    needs->want[needs->nb_want++] = *ref;
}

void thinvm_needs_neighbours(ThinvmState *s, ThinvmNeeds *needs,
                             const ThinvmPointerLe *slots)
{
    const ThinvmPageRef *want = &needs->want[0];
    unsigned frozen = s->frozen ? s->frozen->nb_pages : 0;

    assert(needs->nb_want == 1);
    if (thinvm_state_cache_full(s, frozen + THINVM_BLOCK_PAGES)) {
        return;
    }
    for (unsigned i = 0; i < THINVM_POINTERS_PER_PAGE; i++) {
        uint64_t number = thinvm_slot_address(&slots[i]);

        if (thinvm_slot_type(&slots[i]) != THINVM_PTR_PAGE ||
            number / THINVM_BLOCK_PAGES != want->page / THINVM_BLOCK_PAGES ||
            number == want->page || thinvm_page_peek(s, number) ||
            needs->nb_near == THINVM_BLOCK_PAGES) {
            continue;
        }
        if (!needs->near) {
            needs->near = g_new(ThinvmPageRef, THINVM_BLOCK_PAGES);
        }
        needs->near[needs->nb_near++] = (ThinvmPageRef) {
            .page = number,
            .crc = thinvm_slot_crc(s, &slots[i]),
            .kind = want->kind,
            .level = want->level,
        };
    }
}

/* A page that nobody can find any more goes when its last pin does */
static bool page_is_hashed(ThinvmState *s, ThinvmPage *page)
{
    return thinvm_page_peek(s, page->number) == page;
}

void thinvm_needs_destroy(ThinvmState *s, ThinvmNeeds *needs)
{
    for (unsigned i = 0; i < needs->nb_pinned; i++) {
        ThinvmPage *page = needs->pinned[i];

        assert(page->pins > 0);
        if (--page->pins == 0 && !page->dirty && !page_is_hashed(s, page)) {
            call_rcu(page, page_free, rcu);
        }
    }
    g_free(needs->want);
    g_free(needs->near);
    g_free(needs->pinned);
    memset(needs, 0, sizeof(*needs));
    thinvm_pages_evict(s);
}

static void page_enter(ThinvmState *s, ThinvmPage *page)
{
    qht_insert(&s->pages, page, page_hash(page->number), NULL);
    qatomic_rcu_set(known_page(s, page->number), page);
    QTAILQ_INSERT_HEAD(&s->all_pages, page, in_memory);
}

static void pages_unhash(ThinvmState *s, ThinvmPage *page)
{
    bool removed = qht_remove(&s->pages, page, page_hash(page->number));

    assert(removed);
    if (*known_page(s, page->number) == page) {
        qatomic_set(known_page(s, page->number), NULL);
    }
    thinvm_taking_page_leaves(s, page);
    QTAILQ_REMOVE(&s->all_pages, page, in_memory);
    if (page->kind == THINVM_PAGE_MAP_INNER) {
        thinvm_map_short_cut_clear(s);
    }
}

/*
 * The clock: a clean page that was touched since the hand passed gets another
 * round; at most two rounds, so that a cache full of pinned pages is let be.
 * Dirty and frozen pages count against the bound, but some clean ones may
 * always stay.
 */
void thinvm_pages_evict(ThinvmState *s)
{
    uint64_t steps = s->nb_clean * 2;
    uint64_t others = s->nb_dirty + (s->frozen ? s->frozen->nb_pages : 0);
    uint64_t limit = s->cache_limit > others ? s->cache_limit - others : 0;

    limit = MAX(limit, THINVM_MIN_CACHE_PAGES);
    while (s->nb_clean > limit && steps-- > 0) {
        ThinvmPage *page = QTAILQ_LAST(&s->clean);

        QTAILQ_REMOVE(&s->clean, page, link);
        if (thinvm_page_untouch(page, THINVM_TOUCHED_CLOCK) || page->pins) {
            QTAILQ_INSERT_HEAD(&s->clean, page, link);
            continue;
        }
        s->nb_clean--;
        pages_unhash(s, page);
        call_rcu(page, page_free, rcu);
    }
}

void thinvm_pages_forget_clean(ThinvmState *s)
{
    ThinvmPage *page, *next;

    QTAILQ_FOREACH_SAFE(page, &s->clean, link, next) {
        QTAILQ_REMOVE(&s->clean, page, link);
        s->nb_clean--;
        pages_unhash(s, page);
        if (page->pins == 0) {
            call_rcu(page, page_free, rcu);
        }
    }
}

ThinvmPage *thinvm_page_get(ThinvmState *s, const ThinvmPointerLe *slot,
                            ThinvmPageKind kind, int level,
                            ThinvmNeeds *needs)
{
    ThinvmPageRef ref = {
        .page = thinvm_slot_address(slot),
        .kind = kind,
        .level = level,
    };
    ThinvmPage *page = thinvm_page_find(s, ref.page);

    if (!page) {
        ref.crc = thinvm_slot_crc(s, slot);
        thinvm_needs_want(s, needs, &ref);
    }
    return page;
}

/* Is this the page that @ref names?  Asked before it is believed */
static int check_page(ThinvmState *s, const ThinvmPageRef *ref,
                      const void *buf, const ThinvmNeeds *needs, Error **errp)
{
    uint16_t *count = thinvm_page_count(s, ref->page, NULL);
    uint32_t crc;

    if (s->loaded && count && !*count) {
        /*
         * Freed while it was being read (the caller asks again and gets
         * another answer), or the space map is damaged.  In memory it
         * would be found under its number once its place is reused.
         */
        error_setg(errp, "metadata page %" PRIu64 " at offset %" PRIu64
                   " is named, but free", ref->page,
                   ref->page * THINVM_PAGE_SIZE);
        return -EBADMSG;
    }
    if (needs && s->generation - needs->generation > 1) {
        /* Two checkpoints since: its place may have been used again */
        error_setg(errp, "metadata page %" PRIu64 " took longer to read "
                   "than two checkpoints took to write", ref->page);
        return -EBADMSG;
    }
    crc = thinvm_checksum(&s->uuid, THINVM_SUM_PAGE, ref->page, buf,
                          THINVM_PAGE_SIZE);
    if (crc != ref->crc) {
        error_setg(errp, "metadata page %" PRIu64 " at offset %" PRIu64
                   " has checksum 0x%08x; its parent says 0x%08x",
                   ref->page, ref->page * THINVM_PAGE_SIZE, crc,
                   ref->crc);
        return -EBADMSG;
    }
    if (!thinvm_page_validate(&s->bounds, ref->kind, ref->level,
                              ref->page, buf, errp)) {
        return -EBADMSG;
    }
    return 0;
}

static ThinvmPage *page_take_in(ThinvmState *s, const ThinvmPageRef *ref,
                                const void *buf)
{
    ThinvmPage *page = page_alloc();

    page->number = ref->page;
    page->kind = ref->kind;
    page->level = ref->level;
    page->crc = ref->crc;
    page->complete = true;
    page->count = thinvm_page_count(s, ref->page, NULL);
    memcpy(page->data, buf, THINVM_PAGE_SIZE);
    QTAILQ_INSERT_HEAD(&s->clean, page, link);
    s->nb_clean++;
    page_enter(s, page);
    return page;
}

int thinvm_state_insert_page(ThinvmState *s, const ThinvmPageRef *ref,
                             const void *buf, ThinvmNeeds *needs,
                             Error **errp)
{
    ThinvmPage *page = thinvm_page_find(s, ref->page);

    if (!page) {
        int ret = check_page(s, ref, buf, needs, errp);

        if (ret < 0) {
            return ret;
        }
        page = page_take_in(s, ref, buf);
        qatomic_set(&s->misses, s->misses + 1);
    } else if (page->kind != ref->kind || page->level != ref->level) {
        error_setg(errp, "metadata page %" PRIu64 " is named as two kinds of "
                   "page", ref->page);
        return -EBADMSG;
    }
    if (needs) {
        needs_pin(needs, page);
    }
    thinvm_pages_evict(s);
    return 0;
}

void thinvm_state_insert_neighbour(ThinvmState *s, const ThinvmPageRef *ref,
                                   const void *buf, const ThinvmNeeds *needs)
{
    if (!thinvm_page_peek(s, ref->page) &&
        check_page(s, ref, buf, needs, NULL) == 0) {
        page_take_in(s, ref, buf);
    }
}

ThinvmPage *thinvm_page_adopt(ThinvmState *s, const ThinvmPointerLe *slot,
                              const ThinvmPage *from)
{
    uint64_t number = thinvm_slot_address(slot);
    uint16_t *count = thinvm_page_count(s, number, NULL);
    ThinvmPage *page;

    if (!count || !*count ||
        !thinvm_page_validate(&s->bounds, from->kind, from->level, number,
                              from->data, NULL)) {
        return NULL;
    }
    page = page_alloc();
    page->number = number;
    page->kind = from->kind;
    page->level = from->level;
    page->crc = le32_to_cpu(slot->crc_le);
    page->complete = true;
    page->count = count;
    page->touched = qatomic_read(&from->touched);
    page->heat = from->heat;
    memcpy(page->data, from->data, THINVM_PAGE_SIZE);
    QTAILQ_INSERT_HEAD(&s->clean, page, link);
    s->nb_clean++;
    page_enter(s, page);
    return page;
}

ThinvmPage *thinvm_page_new(ThinvmState *s, ThinvmPageKind kind, int level)
{
    ThinvmPage *page = page_alloc();
    ThinvmMetaExtent *extent;

    page->number = thinvm_place_alloc(s);
    page->count = thinvm_page_count(s, page->number, &extent);
    page->kind = kind;
    page->level = level;
    page->generation = s->generation;
    page->changed = s->applying;
    page->dirty = true;
    memset(page->data, 0, THINVM_PAGE_SIZE);
    QTAILQ_INSERT_TAIL(&s->dirty[page_rank(page)], page, link);
    qatomic_set(&s->nb_dirty, s->nb_dirty + 1);
    if (kind == THINVM_PAGE_MAP_INNER) {
        thinvm_map_short_cut_clear(s);
    }
    page_enter(s, page);
    return page;
}

void thinvm_page_ref(ThinvmState *s, uint64_t number)
{
    ThinvmMetaExtent *extent;
    uint16_t *count = thinvm_page_count(s, number, &extent);

    if (!count || *count == 0 || *count >= THINVM_COUNT_MAX) {
        s->damaged = true;
        return;
    }
    qatomic_set(count, *count + 1);
    extent->dirty = true;
    thinvm_map_short_cut_clear(s);
}

/* Take a page that no pointer names out of memory */
static void page_drop(ThinvmState *s, ThinvmPage *page)
{
    pages_unhash(s, page);
    if (page->dirty && page->generation < s->generation) {
        return;     /* frozen: the thaw frees it */
    }
    if (page->dirty) {
        QTAILQ_REMOVE(&s->dirty[page_rank(page)], page, link);
        qatomic_set(&s->nb_dirty, s->nb_dirty - 1);
        page->dirty = false;
    } else {
        QTAILQ_REMOVE(&s->clean, page, link);
        s->nb_clean--;
    }
    if (page->pins == 0) {
        call_rcu(page, page_free, rcu);
    }
}

void thinvm_page_forget(ThinvmState *s, uint64_t number)
{
    ThinvmPage *page = thinvm_page_find(s, number);

    if (page) {
        page_drop(s, page);
    }
}

bool thinvm_page_unref(ThinvmState *s, uint64_t number)
{
    ThinvmMetaExtent *extent;
    uint16_t *count = thinvm_page_count(s, number, &extent);
    ThinvmPage *page;
    bool fresh;

    if (!count || *count == 0) {
        s->damaged = true;
        return false;
    }
    qatomic_set(count, *count - 1);
    extent->dirty = true;
    if (*count > 0) {
        return false;
    }
    page = thinvm_page_find(s, number);
    fresh = page && page->dirty && page->generation == s->generation;
    if (page) {
        page_drop(s, page);
    }
    thinvm_place_free(s, number, !fresh);
    return true;
}

void thinvm_page_thaw(ThinvmState *s, ThinvmPage *page)
{
    page->dirty = false;
    if (page_is_hashed(s, page)) {
        QTAILQ_INSERT_HEAD(&s->clean, page, link);
        s->nb_clean++;
    } else if (page->pins == 0) {
        call_rcu(page, page_free, rcu);
    }
}

void thinvm_page_touch(ThinvmState *s, ThinvmPage *page, bool shared)
{
    if (page->mark == s->mark) {
        return;
    }
    page->mark = s->mark;
    if (shared || !thinvm_page_writable(s, page)) {
        s->new_pages++;
    }
}

bool thinvm_page_resident(ThinvmState *s, ThinvmPointerLe *slot,
                          ThinvmPageKind kind, int level)
{
    ThinvmPage *page = thinvm_page_find(s, thinvm_slot_address(slot));

    if (page && page->kind == kind && page->level == level) {
        return true;
    }
    /* Freed (and its place perhaps used again) through another pointer of
       this very operation: a hostile image */
    s->damaged = true;
    thinvm_slot_set(slot, 0, 0, 0);
    return false;
}

static void slot_name_page(ThinvmPointerLe *slot, ThinvmPage *page)
{
    uint64_t word = thinvm_slot_make(THINVM_PTR_PAGE, page->number) |
                    (page->generation & 0xffff) << THINVM_PTR_GENERATION_SHIFT;

    thinvm_slot_set(slot, word, 0, le32_to_cpu(slot->extra_le));
}

ThinvmPage *thinvm_page_shadow(ThinvmState *s, ThinvmPointerLe *slot)
{
    uint64_t number = thinvm_slot_address(slot);
    bool shared_below = thinvm_slot_shared_below(slot);
    ThinvmPage *page = thinvm_page_find(s, number);
    ThinvmPage *copy = page;

    assert(page);
    page->changed = s->applying;
    if (!thinvm_page_writable(s, page)) {
        bool shared = *page->count > 1;

        if (shared && page->kind != THINVM_PAGE_MAP_LEAF &&
            page->kind != THINVM_PAGE_MAP_INNER) {
            /* Nothing of ours shares others: the space map is hostile */
            s->damaged = true;
            shared = false;
        }
        copy = thinvm_page_new(s, page->kind, page->level);
        copy->touched = page->touched;
        copy->heat = page->heat;
        memcpy(copy->data, page->data, THINVM_PAGE_SIZE);
        if (page->dirty) {
            thinvm_page_refresh(s, copy);
        }
        if (shared) {
            thinvm_map_copy_refs(s, copy);
            thinvm_map_mark_shared(copy, false);
        }
    }
    if (shared_below && (copy->kind == THINVM_PAGE_MAP_LEAF ||
                         copy->kind == THINVM_PAGE_MAP_INNER)) {
        thinvm_map_mark_shared(copy, true);
    }
    if (copy != page || shared_below) {
        slot_name_page(slot, copy);
    }
    if (copy != page) {
        thinvm_page_unref(s, number);
    }
    return copy;
}
