/*
 * thinvm metadata engine: looking over a mapping tree piece by piece
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Engine layer.  Reads pages and counts, changes nothing.  A tree may be
 * large, so each call looks at one piece (a leaf, a run, or a range without
 * any) and says where the next one begins; what happens to the tree between
 * two calls is the caller's business.
 */
#include "qemu/osdep.h"
#include "map.h"

/* How many of these clusters have no other user?  0, -EAGAIN, -EBADMSG */
static int count_exclusive(ThinvmState *s, uint64_t first, uint64_t nb,
                           uint64_t *exclusive, ThinvmNeeds *needs)
{
    int ret = thinvm_count_expect(s, first, nb, 1, 1, needs);

    if (ret == 0) {
        *exclusive += nb;
        return 0;
    }
    if (ret != -EBADMSG || nb == 1) {
        return ret == -EBADMSG ? 0 : ret;
    }
    for (uint64_t c = first; c < first + nb; c++) {
        uint16_t count;

        ret = thinvm_count_get(s, c, &count, needs);
        if (ret < 0) {
            return ret;
        }
        *exclusive += count == 1;
    }
    return 0;
}

static int leaf_exclusive(ThinvmState *s, ThinvmPage *leaf,
                          uint64_t *exclusive, ThinvmNeeds *needs)
{
    uint64_t first = 0, nb = 0;

    for (unsigned i = 0; i <= THINVM_ENTRIES_PER_LEAF; i++) {
        uint64_t c = i < THINVM_ENTRIES_PER_LEAF ?
                     thinvm_entry_physical(le64_to_cpu(leaf->data[i])) : 0;
        int ret;

        if (c && nb && c == first + nb) {
            nb++;
            continue;
        }
        ret = nb ? count_exclusive(s, first, nb, exclusive, needs) : 0;
        if (ret < 0) {
            return ret;
        }
        first = c;
        nb = c ? 1 : 0;
    }
    return 0;
}

int thinvm_map_exclusive_step(ThinvmState *s, const ThinvmPointer *root,
                              uint64_t *guest, ThinvmExclusive *sum,
                              ThinvmNeeds *needs)
{
    ThinvmPointerLe encoded;
    const ThinvmPointerLe *slot = &encoded;
    ThinvmExclusive add = { };
    uint64_t span;
    int ret;

    needs->nb_want = 0;
    thinvm_pointer_encode(&encoded, root);
    for (int level = THINVM_INNER_LEVELS; ; level--) {
        ThinvmPointerType type = thinvm_slot_type(slot);
        ThinvmPage *page;
        uint16_t *count;

        span = thinvm_map_span(level);
        if (type == THINVM_PTR_RUN || type == THINVM_PTR_UNWRITTEN_RUN) {
            ret = count_exclusive(s, thinvm_slot_address(slot),
                                  THINVM_ENTRIES_PER_LEAF, &add.clusters,
                                  needs);
            break;
        }
        ret = 0;
        if (type != THINVM_PTR_PAGE) {
            break;
        }
        count = thinvm_page_count(s, thinvm_slot_address(slot), NULL);
        if (!count || *count > 1) {
            break;
        }
        page = thinvm_page_get(s, slot, thinvm_map_kind(level), level, needs);
        if (!page) {
            return -EAGAIN;
        }
        if (!(*guest & (span - 1))) {
            add.pages++;        /* met for the first time */
        }
        if (level == 0) {
            ret = leaf_exclusive(s, page, &add.clusters, needs);
            break;
        }
        slot = &thinvm_page_slots(page)[thinvm_map_index(*guest, level)];
    }
    if (needs->nb_want) {
        return -EAGAIN;
    }
    if (ret < 0) {
        return ret;
    }
    sum->clusters += add.clusters;
    sum->pages += add.pages;
    *guest = (*guest & ~(span - 1)) + span;
    return 0;
}

uint64_t thinvm_map_first_used(ThinvmState *s, const ThinvmPointer *root)
{
    ThinvmPointerLe encoded;
    const ThinvmPointerLe *slot = &encoded;
    uint64_t guest = 0;

    thinvm_pointer_encode(&encoded, root);
    for (int level = THINVM_INNER_LEVELS; level > 0; level--) {
        ThinvmPage *page = NULL;
        unsigned i = 0;

        if (thinvm_slot_type(slot) == THINVM_PTR_PAGE) {
            page = thinvm_page_find(s, thinvm_slot_address(slot));
        }
        if (!page || page->kind != THINVM_PAGE_MAP_INNER) {
            break;
        }
        while (i < THINVM_POINTERS_PER_PAGE - 1 &&
               (thinvm_slot_type(&thinvm_page_slots(page)[i]) ==
                THINVM_PTR_NONE ||
                thinvm_slot_type(&thinvm_page_slots(page)[i]) ==
                THINVM_PTR_ZERO)) {
            i++;
        }
        guest += i * thinvm_map_span(level - 1);
        slot = &thinvm_page_slots(page)[i];
    }
    return guest;
}
