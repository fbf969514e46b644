/*
 * thinvm metadata engine: places of metadata pages and their counts
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Engine layer.  Metadata pages live in extents of whole clusters.  For each
 * extent there is an array of counts (how many pointers name a page) and a
 * bitmap of pages that may not be taken: counted ones, and held ones, which
 * nothing in the state names any more but one of the two newest bases does.
 *
 * The space map is read whole when an image is opened (two bytes for each
 * metadata page) and never again; freeze.c writes the blocks that changed.
 */
#include "qemu/osdep.h"
#include "state-int.h"

/* How many extents start at or before @page */
static unsigned extents_before(ThinvmState *s, uint64_t page)
{
    GPtrArray *sorted = s->extents_sorted;
    unsigned low = 0, high = sorted->len;

    while (low < high) {
        unsigned middle = (low + high) / 2;
        ThinvmMetaExtent *e = g_ptr_array_index(sorted, middle);

        if (e->first_page <= page) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

/* The last of them */
static ThinvmMetaExtent *extent_at_or_before(ThinvmState *s, uint64_t page)
{
    unsigned n = extents_before(s, page);

    return n ? g_ptr_array_index(s->extents_sorted, n - 1) : NULL;
}

uint16_t *thinvm_page_count(ThinvmState *s, uint64_t number,
                            ThinvmMetaExtent **extent)
{
    ThinvmMetaExtent *e = extent_at_or_before(s, number);

    if (!e || number - e->first_page >= e->nb_pages) {
        return NULL;
    }
    if (extent) {
        *extent = e;
    }
    return &e->count[number - e->first_page];
}

/* ThinvmBounds callbacks */

bool thinvm_extents_have_page(void *opaque, uint64_t page)
{
    ThinvmState *s = opaque;

    if (!s->loaded) {
        /* The space map itself: its first block tells where it lies */
        return page >= s->first_cluster << (s->cluster_bits -
                                            THINVM_PAGE_BITS) &&
               page < s->device_clusters << (s->cluster_bits -
                                             THINVM_PAGE_BITS);
    }
    return thinvm_page_count(s, page, NULL) != NULL;
}

bool thinvm_extents_have_clusters(void *opaque, uint64_t cluster,
                                  uint64_t nb_clusters)
{
    ThinvmState *s = opaque;
    unsigned bits = s->cluster_bits - THINVM_PAGE_BITS;
    ThinvmMetaExtent *e =
        extent_at_or_before(s, ((cluster + nb_clusters) << bits) - 1);

    return e && e->first_page + e->nb_pages > cluster << bits;
}

static void meta_extent_free(ThinvmMetaExtent *e)
{
    g_free(e->count);
    g_free(e->busy);
    g_free(e);
}

void thinvm_extents_init(ThinvmState *s)
{
    s->extents = g_ptr_array_new();
    s->extents_sorted = g_ptr_array_new();
    s->space_inner = g_array_new(false, true, sizeof(ThinvmPointer));
    s->held_new = g_array_new(false, false, sizeof(uint64_t));
    s->held_frozen = g_array_new(false, false, sizeof(uint64_t));
    s->held_old = g_array_new(false, false, sizeof(uint64_t));
}

void thinvm_extents_destroy(ThinvmState *s)
{
    for (unsigned i = 0; i < s->extents->len; i++) {
        meta_extent_free(g_ptr_array_index(s->extents, i));
    }
    g_ptr_array_unref(s->extents);
    g_ptr_array_unref(s->extents_sorted);
    g_array_unref(s->space_inner);
    g_array_unref(s->held_new);
    g_array_unref(s->held_frozen);
    g_array_unref(s->held_old);
}

ThinvmMetaExtent *thinvm_extent_add(ThinvmState *s, uint64_t first_page,
                                    uint32_t nb_pages)
{
    ThinvmMetaExtent *e = g_new0(ThinvmMetaExtent, 1);

    e->first_page = first_page;
    e->nb_pages = nb_pages;
    e->nb_free = nb_pages;
    e->count = g_new0(uint16_t, nb_pages);
    e->busy = bitmap_new(nb_pages);
    e->dirty = true;
    g_ptr_array_add(s->extents, e);
    g_ptr_array_insert(s->extents_sorted, extents_before(s, first_page), e);
    s->nb_meta_pages += nb_pages;
    s->nb_meta_free += nb_pages;
    return e;
}

uint64_t thinvm_place_alloc(ThinvmState *s)
{
    /* The lowest extent first, so that the space map's blocks stay few */
    for (unsigned i = 0; i < s->extents->len; i++) {
        ThinvmMetaExtent *e = g_ptr_array_index(s->extents, i);
        uint32_t page;

        if (!e->nb_free || e->retired) {
            continue;
        }
        page = find_next_zero_bit(e->busy, e->nb_pages, e->hint);
        assert(page < e->nb_pages);
        set_bit(page, e->busy);
        e->hint = page + 1;
        e->nb_free--;
        s->nb_meta_free--;
        qatomic_set(&e->count[page], 1);
        e->dirty = true;
        return e->first_page + page;
    }
    /* prepare keeps enough back; see thinvm_state_prepare() */
    g_assert_not_reached();
}

static void place_release(ThinvmState *s, uint64_t number)
{
    ThinvmMetaExtent *e;
    uint16_t *count = thinvm_page_count(s, number, &e);
    uint32_t page = number - e->first_page;

    if (*count || !test_bit(page, e->busy)) {
        return;     /* repair has found that it is in use */
    }
    clear_bit(page, e->busy);
    e->hint = MIN(e->hint, page);
    e->nb_free++;
    s->nb_meta_free += !e->retired;
}

void thinvm_place_free(ThinvmState *s, uint64_t number, bool hold)
{
    if (hold) {
        g_array_append_val(s->held_new, number);
    } else {
        place_release(s, number);
    }
}

/* At a freeze: what was freed so far belongs to the frozen interval */
void thinvm_extents_hold_shift(ThinvmState *s)
{
    GArray *empty = s->held_frozen;

    assert(empty->len == 0);
    s->held_frozen = s->held_new;
    s->held_new = empty;
}

/*
 * At a thaw: the base before the last one has been overwritten, so what was
 * freed while the last one was built is named by nobody now.
 */
void thinvm_extents_hold_release(ThinvmState *s)
{
    GArray *empty = s->held_old;

    for (unsigned i = 0; i < s->held_old->len; i++) {
        place_release(s, g_array_index(s->held_old, uint64_t, i));
    }
    g_array_set_size(empty, 0);
    s->held_old = s->held_frozen;
    s->held_frozen = empty;
}

/* ------------------------------------------------------------------ */
/* Giving extents back                                                 */

bool thinvm_page_is_retired(ThinvmState *s, uint64_t number)
{
    ThinvmMetaExtent *e = s->nb_retired ? extent_at_or_before(s, number) : NULL;

    return e && e->retired && number - e->first_page < e->nb_pages;
}

static uint64_t extent_end(ThinvmState *s, const ThinvmMetaExtent *e)
{
    return (e->first_page + e->nb_pages) >> (s->cluster_bits -
                                             THINVM_PAGE_BITS);
}

/* The space map's own pages move with the blocks that changed */
static void dirty_retired_blocks(ThinvmState *s)
{
    for (unsigned i = 0; i < s->extents->len; i++) {
        ThinvmMetaExtent *e = g_ptr_array_index(s->extents, i);
        unsigned j = i / THINVM_POINTERS_PER_PAGE;

        e->dirty |= thinvm_page_is_retired(s, e->block.address) ||
                    (j < s->space_inner->len &&
                     thinvm_page_is_retired(s, g_array_index(s->space_inner,
                                            ThinvmPointer, j).address));
    }
}

bool thinvm_compact_retire(ThinvmState *s, uint64_t limit, uint64_t *missing)
{
    ThinvmMetaExtent *e = NULL;
    uint64_t kept;

    *missing = 0;
    for (unsigned i = s->extents_sorted->len; i > 0; i--) {
        e = g_ptr_array_index(s->extents_sorted, i - 1);
        if (!e->retired) {
            break;
        }
    }
    if (!e || e->retired || extent_end(s, e) <= limit ||
        s->extents->len - s->nb_retired < 2) {
        return false;
    }
    /* What is in it must find room elsewhere, twice while it moves */
    kept = thinvm_space_reserve_pages(s) + s->promised_pages + s->dirty_bound +
           2 * (e->nb_pages - e->nb_free) + e->nb_free;
    if (s->nb_meta_free < kept) {
        *missing = kept - s->nb_meta_free;
        return false;
    }
    e->retired = true;
    s->nb_retired++;
    s->nb_meta_free -= e->nb_free;
    dirty_retired_blocks(s);
    return true;
}

void thinvm_compact_reinstate(ThinvmState *s)
{
    for (unsigned i = 0; i < s->extents->len; i++) {
        ThinvmMetaExtent *e = g_ptr_array_index(s->extents, i);

        if (e->retired) {
            e->retired = false;
            s->nb_meta_free += e->nb_free;
        }
    }
    s->nb_retired = 0;
}

static void extent_remove(ThinvmState *s, unsigned i)
{
    ThinvmMetaExtent *e = g_ptr_array_index(s->extents, i);

    if (e->block.type == THINVM_PTR_PAGE) {
        thinvm_page_unref(s, e->block.address);
    }
    s->nb_meta_pages -= e->nb_pages;
    s->nb_retired--;
    g_ptr_array_remove(s->extents_sorted, e);
    g_ptr_array_remove_index_fast(s->extents, i);
    /* The last one has its block in another place of the space map now, and
       the page that it was in has one less */
    if (i < s->extents->len) {
        ((ThinvmMetaExtent *)g_ptr_array_index(s->extents, i))->dirty = true;
    }
    ((ThinvmMetaExtent *)g_ptr_array_index(s->extents,
                                           s->extents->len - 1))->dirty = true;
    /* Who walks without the lock may be looking at a page's count */
    call_rcu(e, meta_extent_free, rcu);
}

int thinvm_compact_release(ThinvmState *s, ThinvmFreedRange *range,
                           ThinvmNeeds *needs)
{
    unsigned bits = s->cluster_bits - THINVM_PAGE_BITS;
    GArray *freed;
    int ret;

    needs->nb_want = 0;
    for (unsigned i = 0; i < s->extents->len; i++) {
        ThinvmMetaExtent *e = g_ptr_array_index(s->extents, i);

        if (!e->retired || e->nb_free != e->nb_pages) {
            continue;
        }
        s->mark++;
        s->new_pages = 0;
        s->last_count_leaf = UINT64_MAX;
        range->first = e->first_page >> bits;
        range->nb_clusters = e->nb_pages >> bits;
        ret = thinvm_count_need(s, range->first, range->nb_clusters, needs);
        if (ret < 0) {
            return ret;
        }
        if (s->nb_meta_free < s->new_pages + 2 * thinvm_space_last_pages(s)) {
            return -ENOSPC;
        }
        seqlock_write_begin(&s->sequence);
        thinvm_count_change(s, range->first, range->nb_clusters,
                            THINVM_COUNT_FROM_METADATA);
        extent_remove(s, i);
        seqlock_write_end(&s->sequence);
        /* Not in quarantine, but the caller's until no base names them */
        freed = thinvm_space_take_freed(s);
        assert(freed);
        g_array_free(freed, true);
        return 0;
    }
    return -ENOENT;
}

bool thinvm_state_older_has_more(ThinvmState *s)
{
    return s->older_has_more;
}

int thinvm_repair_page_count(ThinvmState *s, uint64_t number, uint16_t count)
{
    ThinvmMetaExtent *e;
    uint16_t *recorded = thinvm_page_count(s, number, &e);
    uint16_t old;

    if (!recorded) {
        return -ENOENT;
    }
    old = *recorded;
    qatomic_set(recorded, count);
    e->dirty = true;
    if (old && !count) {
        /* Both bases may name it, as they say themselves */
        thinvm_page_forget(s, number);
        thinvm_place_free(s, number, true);
    } else if (!old && count) {
        uint32_t page = number - e->first_page;

        if (!test_and_set_bit(page, e->busy)) {
            e->nb_free--;
            s->nb_meta_free--;
        }
    }
    return 0;
}

/* ------------------------------------------------------------------ */
/* Loading                                                             */

static int want_page(ThinvmState *s, const ThinvmPointer *ptr,
                     ThinvmPageKind kind, int level, ThinvmNeeds *needs,
                     ThinvmPage **page)
{
    ThinvmPageRef ref = {
        .page = ptr->address, .crc = ptr->crc, .kind = kind, .level = level,
    };

    *page = thinvm_page_find(s, ptr->address);
    if (*page && (*page)->kind == kind && (*page)->level == level &&
        (*page)->crc == ptr->crc) {
        return 0;
    }
    if (*page) {
        return -EBADMSG;
    }
    thinvm_needs_want(s, needs, &ref);
    return -EAGAIN;
}

/* The index'th level-1 slot of the space map below @root */
static int space_slot(ThinvmState *s, const ThinvmPointer *root,
                      unsigned index, ThinvmPointer *inner, ThinvmPointer *out,
                      ThinvmNeeds *needs)
{
    ThinvmPage *page;
    int ret = want_page(s, root, THINVM_PAGE_SPACE_INNER, 2, needs, &page);

    if (ret < 0) {
        return ret;
    }
    thinvm_pointer_decode(inner, &thinvm_page_slots(page)[index >> 8]);
    if (inner->type != THINVM_PTR_PAGE) {
        return -EBADMSG;
    }
    ret = want_page(s, inner, THINVM_PAGE_SPACE_INNER, 1, needs, &page);
    if (ret < 0) {
        return ret;
    }
    thinvm_pointer_decode(out, &thinvm_page_slots(page)[index & 255]);
    return out->type == THINVM_PTR_PAGE ? 0 : -EBADMSG;
}

/* Judge a block against its neighbours, and take it in */
static int space_block_take(ThinvmState *s, ThinvmPage *page,
                            const ThinvmPointer *ptr, unsigned index,
                            Error **errp)
{
    const ThinvmSpaceBlockLe *le = (const void *)page->data;
    uint64_t first = le64_to_cpu(le->first_page_le);
    uint32_t nb = le32_to_cpu(le->nb_pages_le);
    unsigned bits = s->cluster_bits - THINVM_PAGE_BITS;
    ThinvmMetaExtent *e;

    if (!nb || nb > THINVM_EXTENT_MAX_PAGES || (first | nb) & ((1 << bits) - 1)
        || first >> bits < s->first_cluster ||
        (first + nb) >> bits > s->device_clusters ||
        thinvm_extents_have_clusters(s, first >> bits, nb >> bits)) {
        error_setg(errp, "metadata extent %u (page %" PRIu64 ", %u pages) is "
                   "out of bounds or overlaps another", index, first, nb);
        return -EBADMSG;
    }
    e = thinvm_extent_add(s, first, nb);
    e->dirty = false;
    e->block = *ptr;
    for (unsigned i = 0; i < nb; i++) {
        e->count[i] = le16_to_cpu(le->count_le[i]);
        if (e->count[i]) {
            set_bit(i, e->busy);
            e->nb_free--;
            s->nb_meta_free--;
        }
    }
    return 0;
}

/* Pages that the older base names, and this one does not, are held */
static void space_block_hold(ThinvmState *s, ThinvmPage *page)
{
    const ThinvmSpaceBlockLe *le = (const void *)page->data;
    uint64_t first = le64_to_cpu(le->first_page_le);
    ThinvmMetaExtent *e = extent_at_or_before(s, first);

    if (!e || e->first_page != first ||
        e->nb_pages != le32_to_cpu(le->nb_pages_le)) {
        /* Given back since then; it was empty in both bases */
        s->older_has_more = true;
        return;
    }
    for (unsigned i = 0; i < e->nb_pages; i++) {
        uint64_t number = e->first_page + i;

        if (le->count_le[i] && !test_bit(i, e->busy)) {
            set_bit(i, e->busy);
            e->nb_free--;
            s->nb_meta_free--;
            g_array_append_val(s->held_old, number);
        }
    }
}

static int load_older(ThinvmState *s, ThinvmNeeds *needs)
{
    /* In one pass at the end, when nothing is wanted any more */
    g_autoptr(GPtrArray) blocks = g_ptr_array_new();
    unsigned nb = s->older.nb_extents;
    bool again = false;

    for (unsigned i = 0; i < nb; i++) {
        ThinvmMetaExtent *e = i < s->extents->len ?
                              g_ptr_array_index(s->extents, i) : NULL;
        ThinvmPointer ptr, inner;
        ThinvmPage *page = NULL;
        int ret = space_slot(s, &s->older.space_root, i, &inner, &ptr, needs);

        if (!ret && (!e || ptr.address != e->block.address ||
                     ptr.crc != e->block.crc)) {
            ret = want_page(s, &ptr, THINVM_PAGE_SPACE_BLOCK, 0, needs, &page);
        }
        again |= ret == -EAGAIN;
        g_ptr_array_add(blocks, ret ? NULL : page);
    }
    if (again) {
        return -EAGAIN;
    }
    for (unsigned i = 0; i < nb; i++) {
        if (g_ptr_array_index(blocks, i)) {
            space_block_hold(s, g_ptr_array_index(blocks, i));
        }
    }
    return 0;
}

static int load_extents(ThinvmState *s, ThinvmNeeds *needs, Error **errp)
{
    ThinvmPointer ptr, inner;
    ThinvmPage *page;
    bool again = false;

    /* Ask for all that can be asked for at once */
    for (unsigned i = s->extents->len; i < s->sb.nb_extents; i++) {
        int ret = space_slot(s, &s->sb.space_root, i, &inner, &ptr, needs);

        if (!ret) {
            ret = want_page(s, &ptr, THINVM_PAGE_SPACE_BLOCK, 0, needs, &page);
        }
        if (ret == -EBADMSG) {
            error_setg(errp, "space map: slot %u of %u names no block", i,
                       s->sb.nb_extents);
            return ret;
        }
        again |= ret == -EAGAIN;
    }
    if (again) {
        return -EAGAIN;
    }
    for (unsigned i = s->extents->len; i < s->sb.nb_extents; i++) {
        int ret;

        space_slot(s, &s->sb.space_root, i, &inner, &ptr, needs);
        want_page(s, &ptr, THINVM_PAGE_SPACE_BLOCK, 0, needs, &page);
        ret = space_block_take(s, page, &ptr, i, errp);
        if (ret < 0) {
            return ret;
        }
        if (!(i & 255)) {
            g_array_append_val(s->space_inner, inner);
        }
    }
    return 0;
}

static int load_roots_check(ThinvmState *s, Error **errp)
{
    const ThinvmSuperblock *sb = &s->sb;
    ThinvmBounds *b = &s->bounds;

    if (!thinvm_root_validate(b, THINVM_PAGE_MAP_INNER, &sb->map_root,
                              "disk", errp) ||
        !thinvm_root_validate(b, THINVM_PAGE_MAP_INNER, &sb->vmstate_root,
                              "VM state", errp) ||
        !thinvm_root_validate(b, THINVM_PAGE_COUNT_INNER, &sb->count_root,
                              "reference counts", errp) ||
        !thinvm_root_validate(b, THINVM_PAGE_SPACE_INNER, &sb->space_root,
                              "space map", errp) ||
        !thinvm_root_validate(b, THINVM_PAGE_SNAPSHOT_INNER,
                              &sb->snapshot_root, "snapshots", errp) ||
        !thinvm_root_validate(b, THINVM_PAGE_BACKING, &sb->backing,
                              "backing file name", errp)) {
        return -EBADMSG;
    }
    return 0;
}

static int load_backing(ThinvmState *s, ThinvmNeeds *needs, Error **errp)
{
    ThinvmPage *page;
    int ret;

    if (s->sb.backing.type != THINVM_PTR_PAGE) {
        return 0;
    }
    ret = want_page(s, &s->sb.backing, THINVM_PAGE_BACKING, 0, needs, &page);
    if (ret < 0) {
        if (ret == -EBADMSG) {
            error_setg(errp, "backing file name: its page is of another kind");
        }
        return ret;
    }
    return thinvm_backing_decode(&s->backing, (const void *)page->data,
                                 errp) ? 0 : -EBADMSG;
}

int thinvm_state_load(ThinvmState *s, ThinvmNeeds *needs, Error **errp)
{
    int ret;

    needs->nb_want = 0;
    if (!s->loaded) {
        ret = load_extents(s, needs, errp);
        if (ret == 0 && s->has_older) {
            ret = load_older(s, needs);
        }
        if (ret < 0) {
            return ret;
        }
        s->loaded = true;
        /* They only carried the space map here */
        thinvm_pages_forget_clean(s);
        ret = load_roots_check(s, errp);
        if (ret < 0) {
            return ret;
        }
    }
    ret = load_backing(s, needs, errp);
    return ret ?: thinvm_count_load(s, needs);
}
