/*
 * thinvm metadata engine: what repairing needs beyond operations
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Engine layer.  Trees that lost a piece are rebuilt from the pages that are
 * left (check-rewrite.c decides how); the new pages come in here, and are
 * dirty like any other, so that a freeze puts them in its base.
 *
 * Invariant 3 of the design, section 4: bytes of a damaged page come into the
 * state only item by item, each judged.
 */
#include "qemu/osdep.h"
#include "state-int.h"
#include "repair.h"

int thinvm_repair_new_page(ThinvmState *s, ThinvmPageKind kind, int level,
                           const void *data, ThinvmPointer *ptr)
{
    ThinvmPage *page;

    if (s->nb_meta_free <= thinvm_space_last_pages(s)) {
        return -ENOSPC;
    }
    seqlock_write_begin(&s->sequence);
    page = thinvm_page_new(s, kind, level);
    memcpy(page->data, data, THINVM_PAGE_SIZE);
    seqlock_write_end(&s->sequence);
    *ptr = (ThinvmPointer) {
        .address = page->number,
        .type = THINVM_PTR_PAGE,
        .generation = page->generation,
    };
    return 0;
}

void thinvm_repair_set_root(ThinvmState *s, ThinvmRoot root,
                            const ThinvmPointer *ptr)
{
    ThinvmPointerLe *slot = root == THINVM_ROOT_COUNT ? &s->count_root :
                            root == THINVM_ROOT_SNAPSHOT ? &s->snapshot_root :
                            root == THINVM_ROOT_VMSTATE ?
                            &s->root[THINVM_TREE_VMSTATE] :
                            &s->root[THINVM_TREE_DISK];

    seqlock_write_begin(&s->sequence);
    thinvm_pointer_encode(slot, ptr);
    thinvm_map_short_cut_clear(s);
    seqlock_write_end(&s->sequence);
}

void thinvm_repair_set_vmstate_size(ThinvmState *s, uint64_t size)
{
    s->vmstate_size = size;
}

void thinvm_repair_set_snapshots(ThinvmState *s, uint32_t nb_snapshots)
{
    s->nb_snapshots = nb_snapshots;
    s->free_slot_hint = 0;
    if (!nb_snapshots) {
        s->nb_snapshot_slots = 0;
    }
}

static size_t item_size(ThinvmPageKind kind)
{
    switch (kind) {
    case THINVM_PAGE_MAP_LEAF:
        return sizeof(uint64_t);
    case THINVM_PAGE_MAP_INNER:
    case THINVM_PAGE_SNAPSHOT_INNER:
        return sizeof(ThinvmPointerLe);
    case THINVM_PAGE_SNAPSHOT_LEAF:
        return sizeof(ThinvmSnapshotLe);
    default:
        return 0;
    }
}

int thinvm_repair_salvage(ThinvmState *s, const ThinvmPageRef *ref, void *buf,
                          void (*bad)(void *opaque, unsigned index,
                                      const char *why),
                          void *opaque)
{
    g_autofree uint8_t *alone = g_malloc0(THINVM_PAGE_SIZE);
    size_t size = item_size(ref->kind);

    if (!size || thinvm_checksum(&s->uuid, THINVM_SUM_PAGE, ref->page, buf,
                                 THINVM_PAGE_SIZE) != ref->crc) {
        return -EBADMSG;
    }
    for (unsigned i = 0; i < THINVM_PAGE_SIZE / size; i++) {
        uint8_t *item = (uint8_t *)buf + i * size;
        Error *err = NULL;

        memcpy(alone + i * size, item, size);
        if (!thinvm_page_validate(&s->bounds, ref->kind, ref->level, ref->page,
                                  alone, &err)) {
            bad(opaque, i, error_get_pretty(err));
            error_free(err);
            memset(item, 0, size);
        }
        memset(alone + i * size, 0, size);
    }
    return 0;
}
