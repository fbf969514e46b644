/*
 * thinvm metadata engine: freezing a base for a checkpoint
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Engine layer.  Freezing takes the dirty pages out of the lists and adds one
 * to state->generation; from then on every change copies them first, so that
 * the checkpoint can write them while operations go on.
 *
 * Checksums.  A parent holds its children's, which are known only when the
 * children are complete.  Until then a slot's checksum is stale, also in
 * copies that were made of the parent meanwhile.  Hence state->checksums:
 * those of all pages completed for this base and for the one before.  A copy
 * of a page that is still dirty takes from it what is known at that time
 * (thinvm_page_refresh()), and the completion of the copy, one base later at
 * most, finds the rest there.
 *
 * The space map's own pages are placed here, by repetition until nothing
 * changes: giving a block a new place changes the counts of the extents that
 * hold its old and its new place.
 */
#include "qemu/osdep.h"
#include "qemu/memalign.h"
#include "state-int.h"

typedef struct ThinvmChecksum {
    int64_t number;             /* of the page; the key */
    uint64_t generation;
    uint32_t crc;
} ThinvmChecksum;

static ThinvmChecksum *checksum_find(ThinvmState *s, uint64_t number)
{
    int64_t key = number;

    return g_hash_table_lookup(s->checksums, &key);
}

uint32_t thinvm_slot_crc(ThinvmState *s, const ThinvmPointerLe *slot)
{
    ThinvmChecksum *sum = checksum_find(s, thinvm_slot_address(slot));

    return sum ? sum->crc : le32_to_cpu(slot->crc_le);
}

static void slot_refresh(ThinvmState *s, ThinvmPointerLe *slot)
{
    if (thinvm_slot_type(slot) == THINVM_PTR_PAGE) {
        slot->crc_le = cpu_to_le32(thinvm_slot_crc(s, slot));
    }
}

void thinvm_page_refresh(ThinvmState *s, ThinvmPage *page)
{
    switch (page->kind) {
    case THINVM_PAGE_MAP_INNER:
    case THINVM_PAGE_COUNT_INNER:
    case THINVM_PAGE_SPACE_INNER:
    case THINVM_PAGE_SNAPSHOT_INNER:
        for (unsigned i = 0; i < THINVM_POINTERS_PER_PAGE; i++) {
            slot_refresh(s, &thinvm_page_slots(page)[i]);
        }
        break;
    case THINVM_PAGE_SNAPSHOT_LEAF:
        for (unsigned i = 0; i < THINVM_SNAPSHOTS_PER_LEAF; i++) {
            ThinvmSnapshotLe *snap = (ThinvmSnapshotLe *)page->data + i;

            slot_refresh(s, &snap->root);
            slot_refresh(s, &snap->vmstate_root);
        }
        break;
    default:
        break;
    }
}

/* ------------------------------------------------------------------ */
/* Places for the space map                                            */

/* Where this base puts the space map; 0: stays where it was */
typedef struct SpacePlan {
    uint64_t *block;            /* one for each extent */
    uint64_t *inner;            /* one for each level-1 page */
    uint64_t root;
    unsigned nb_blocks, nb_inner;
} SpacePlan;

static void place_move(ThinvmState *s, uint64_t *new, uint64_t old)
{
    *new = thinvm_place_alloc(s);
    if (old) {
        thinvm_page_unref(s, old);
    }
}

static uint64_t inner_address(ThinvmState *s, unsigned i)
{
    return i < s->space_inner->len ?
           g_array_index(s->space_inner, ThinvmPointer, i).address : 0;
}

static void plan_space(ThinvmState *s, SpacePlan *plan)
{
    bool moved;

    plan->nb_blocks = s->extents->len;
    plan->nb_inner = DIV_ROUND_UP(plan->nb_blocks, THINVM_POINTERS_PER_PAGE);
    plan->block = g_new0(uint64_t, plan->nb_blocks);
    plan->inner = g_new0(uint64_t, plan->nb_inner);
    place_move(s, &plan->root,
               thinvm_slot_type(&s->space_root) == THINVM_PTR_PAGE ?
               thinvm_slot_address(&s->space_root) : 0);
    for (unsigned j = plan->nb_inner; j < s->space_inner->len; j++) {
        thinvm_page_unref(s, inner_address(s, j));
    }
    do {
        moved = false;
        for (unsigned i = 0; i < plan->nb_blocks; i++) {
            ThinvmMetaExtent *e = g_ptr_array_index(s->extents, i);
            unsigned j = i / THINVM_POINTERS_PER_PAGE;

            if (!e->dirty || plan->block[i]) {
                continue;
            }
            place_move(s, &plan->block[i], e->block.address);
            if (!plan->inner[j]) {
                place_move(s, &plan->inner[j], inner_address(s, j));
            }
            moved = true;
        }
    } while (moved);
}

/* A page of the space map: in no hash, with no list; the thaw frees it */
static ThinvmPage *space_page(ThinvmState *s, ThinvmFrozen *f,
                              ThinvmPageKind kind, int level, uint64_t number)
{
    ThinvmPage *page = qemu_memalign(64, sizeof(ThinvmPage));

    memset(page, 0, sizeof(*page));
    page->number = number;
    page->kind = kind;
    page->level = level;
    page->generation = s->generation;
    page->dirty = true;
    f->pages[f->nb_pages++] = page;
    return page;
}

static void space_point(ThinvmState *s, ThinvmPointerLe *slot,
                        ThinvmPointer *ptr, uint64_t place)
{
    if (place) {
        *ptr = (ThinvmPointer) {
            .address = place,
            .type = THINVM_PTR_PAGE,
            .generation = s->generation,
        };
    }
    thinvm_pointer_encode(slot, ptr);
}

static void encode_block(ThinvmPage *page, ThinvmMetaExtent *e)
{
    ThinvmSpaceBlockLe *le = (ThinvmSpaceBlockLe *)page->data;

    le->first_page_le = cpu_to_le64(e->first_page);
    le->nb_pages_le = cpu_to_le32(e->nb_pages);
    for (unsigned i = 0; i < e->nb_pages; i++) {
        le->count_le[i] = cpu_to_le16(e->count[i]);
    }
}

static void freeze_space(ThinvmState *s, ThinvmFrozen *f, SpacePlan *plan)
{
    ThinvmPointer root = { 0 };
    ThinvmPage *page;

    g_array_set_size(s->space_inner, plan->nb_inner);
    for (unsigned i = 0; i < plan->nb_blocks; i++) {
        ThinvmMetaExtent *e = g_ptr_array_index(s->extents, i);

        if (plan->block[i]) {
            encode_block(space_page(s, f, THINVM_PAGE_SPACE_BLOCK, 0,
                                    plan->block[i]), e);
        }
        e->dirty = false;
    }
    for (unsigned j = 0; j < plan->nb_inner; j++) {
        unsigned first = j * THINVM_POINTERS_PER_PAGE;

        if (!plan->inner[j]) {
            continue;
        }
        page = space_page(s, f, THINVM_PAGE_SPACE_INNER, 1, plan->inner[j]);
        for (unsigned i = first;
             i < MIN(plan->nb_blocks, first + THINVM_POINTERS_PER_PAGE); i++) {
            ThinvmMetaExtent *e = g_ptr_array_index(s->extents, i);

            space_point(s, &thinvm_page_slots(page)[i - first], &e->block,
                        plan->block[i]);
        }
    }
    page = space_page(s, f, THINVM_PAGE_SPACE_INNER, 2, plan->root);
    for (unsigned j = 0; j < plan->nb_inner; j++) {
        space_point(s, &thinvm_page_slots(page)[j],
                    &g_array_index(s->space_inner, ThinvmPointer, j),
                    plan->inner[j]);
    }
    space_point(s, &s->space_root, &root, plan->root);
    g_free(plan->block);
    g_free(plan->inner);
}

/* ------------------------------------------------------------------ */
/* Freeze                                                              */

static void fill_superblock(ThinvmState *s, ThinvmSuperblock *sb)
{
    sb->version_major = THINVM_VERSION_MAJOR;
    /* What a later minor version keeps in the reserved bytes stays there */
    sb->version_minor = MAX(THINVM_VERSION_MINOR, s->sb.version_minor);
    memcpy(sb->reserved, s->sb.reserved, sizeof(sb->reserved));
    sb->uuid = s->uuid;
    sb->compatible = s->compatible;
    sb->readonly_compatible = s->readonly_compatible;
    sb->incompatible = s->incompatible;
    sb->template = s->sb.template;
    sb->autoclear = s->promises_exact ? THINVM_AUTOCLEAR_PROMISES : 0;
    sb->promised_pages = s->promised_pages;
    sb->cluster_bits = s->cluster_bits;
    sb->journal_offset = s->journal_offset;
    sb->journal_size = s->journal_size;
    sb->virtual_size = s->virtual_size;
    sb->device_clusters = s->device_clusters;
    sb->generation = s->generation;
    sb->epoch = s->epoch;
    sb->nb_extents = s->extents->len;
    sb->next_snapshot_id = s->next_snapshot_id;
    sb->current_snapshot_id = s->current_snapshot_id;
    sb->nb_snapshots = s->nb_snapshots;
    sb->nb_snapshot_slots = s->nb_snapshot_slots;
    sb->vmstate_size = s->vmstate_size;
    thinvm_pointer_decode(&sb->map_root, &s->root[THINVM_TREE_DISK]);
    thinvm_pointer_decode(&sb->vmstate_root, &s->root[THINVM_TREE_VMSTATE]);
    thinvm_pointer_decode(&sb->count_root, &s->count_root);
    thinvm_pointer_decode(&sb->space_root, &s->space_root);
    thinvm_pointer_decode(&sb->snapshot_root, &s->snapshot_root);
    thinvm_pointer_decode(&sb->backing, &s->backing_root);
}

static gboolean checksum_is_old(gpointer key, gpointer value, gpointer opaque)
{
    const ThinvmChecksum *sum = value;
    const uint64_t *generation = opaque;

    return sum->generation + 1 < *generation;
}

bool thinvm_state_may_freeze(ThinvmState *s)
{
    return s->nb_meta_free >= thinvm_space_last_pages(s);
}

ThinvmFrozen *thinvm_state_freeze(ThinvmState *s)
{
    ThinvmFrozen *f = g_new0(ThinvmFrozen, 1);
    ThinvmPage *page, *next;
    SpacePlan plan;

    assert(!s->frozen);
    seqlock_write_begin(&s->sequence);
    thinvm_map_form_runs(s);
    plan_space(s, &plan);
    f->pages = g_new(ThinvmPage *,
                     s->nb_dirty + plan.nb_blocks + plan.nb_inner + 1);
    for (int rank = 0; rank < THINVM_NB_RANKS; rank++) {
        QTAILQ_FOREACH_SAFE(page, &s->dirty[rank], link, next) {
            QTAILQ_REMOVE(&s->dirty[rank], page, link);
            f->pages[f->nb_pages++] = page;
        }
    }
    assert(f->nb_pages == s->nb_dirty);
    qatomic_set(&s->nb_dirty, 0);
    freeze_space(s, f, &plan);
    fill_superblock(s, &f->superblock);
    g_hash_table_foreach_remove(s->checksums, checksum_is_old,
                                &s->generation);
    s->generation++;
    thinvm_extents_hold_shift(s);
    s->frozen = f;
    seqlock_write_end(&s->sequence);
    return f;
}

const void *thinvm_frozen_complete_page(ThinvmState *s, ThinvmFrozen *f,
                                        unsigned i, uint64_t *number)
{
    ThinvmPage *page = f->pages[i];
    ThinvmChecksum *sum;

    *number = page->number;
    if (page->complete) {
        return page->data;      /* a checkpoint that is repeated */
    }
    thinvm_state_lock(s);
    thinvm_page_refresh(s, page);
    thinvm_state_unlock(s);
    page->crc = thinvm_checksum(&s->uuid, THINVM_SUM_PAGE, page->number,
                                page->data, THINVM_PAGE_SIZE);
    sum = g_new(ThinvmChecksum, 1);
    sum->number = page->number;
    sum->generation = page->generation;
    sum->crc = page->crc;
    thinvm_state_lock(s);
    page->complete = true;
    g_hash_table_replace(s->checksums, &sum->number, sum);
    thinvm_state_unlock(s);
    return page->data;
}

static void pointer_complete(ThinvmState *s, ThinvmPointer *ptr)
{
    ThinvmChecksum *sum;

    if (ptr->type == THINVM_PTR_PAGE) {
        sum = checksum_find(s, ptr->address);
        if (sum) {
            ptr->crc = sum->crc;
        }
    }
}

void thinvm_frozen_complete(ThinvmState *s, ThinvmFrozen *f)
{
    ThinvmSuperblock *sb = &f->superblock;

    thinvm_state_lock(s);
    pointer_complete(s, &sb->map_root);
    pointer_complete(s, &sb->vmstate_root);
    pointer_complete(s, &sb->count_root);
    pointer_complete(s, &sb->space_root);
    pointer_complete(s, &sb->snapshot_root);
    pointer_complete(s, &sb->backing);
    thinvm_state_unlock(s);
}

void thinvm_state_thaw(ThinvmState *s, ThinvmFrozen *f)
{
    assert(s->frozen == f);
    for (unsigned i = 0; i < f->nb_pages; i++) {
        thinvm_page_thaw(s, f->pages[i]);
    }
    for (unsigned i = 0; i < s->extents->len; i++) {
        ThinvmMetaExtent *e = g_ptr_array_index(s->extents, i);

        pointer_complete(s, &e->block);
    }
    for (unsigned j = 0; j < s->space_inner->len; j++) {
        pointer_complete(s, &g_array_index(s->space_inner, ThinvmPointer, j));
    }
    for (int tree = 0; tree < THINVM_NB_TREES; tree++) {
        slot_refresh(s, &s->root[tree]);
    }
    slot_refresh(s, &s->count_root);
    slot_refresh(s, &s->snapshot_root);
    slot_refresh(s, &s->backing_root);
    slot_refresh(s, &s->space_root);
    thinvm_extents_hold_release(s);
    s->frozen = NULL;
    g_free(f->pages);
    g_free(f);
    thinvm_pages_evict(s);
}
