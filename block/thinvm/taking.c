/*
 * thinvm metadata engine: clusters that are to become metadata
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Engine layer.  META_EXTEND takes clusters whose counts are 0.  In an image
 * that lies, a page may map them all the same, and the guest's data would be
 * written over metadata (invariant 3).  A page that is read later is judged
 * against the extents that there are (format-validate.c); those in memory
 * have to be looked at when an extent is taken.  They may be tens of
 * thousands.  So whoever can wait has it done before the operation:
 *
 *   begin   from now on a page that is read may not map these clusters
 *   step    looks at some of the pages that are in memory since before
 *   end     the operation was applied, or given up
 *
 * Between steps the pages change.  Own invariant: what a page says that was
 * not looked at yet, no other page takes over unseen.  So a page that leaves
 * memory is looked at, since a copy may have taken its place, and so is a
 * leaf that takes the place of a run.  Operations map reserved clusters only,
 * which are not these.
 *
 * Replaying, nothing is known before the operation: it looks at all pages.
 */
#include "qemu/osdep.h"
#include "map.h"

/* Pages that one step looks at: a few dozen microseconds */
#define THINVM_TAKING_STEP  64

static bool page_names_clusters(ThinvmPage *page, uint64_t first,
                                uint64_t nb_clusters)
{
    bool found = false;

    if (page->kind == THINVM_PAGE_MAP_LEAF) {
        /* Without a way out, so that it is a vector's work */
        for (unsigned i = 0; i < THINVM_ENTRIES_PER_LEAF; i++) {
            found |= thinvm_entry_physical(le64_to_cpu(page->data[i])) -
                     first < nb_clusters;
        }
    } else if (page->kind == THINVM_PAGE_MAP_INNER && page->level == 1) {
        for (unsigned i = 0; i < THINVM_POINTERS_PER_PAGE; i++) {
            const ThinvmPointerLe *slot = &thinvm_page_slots(page)[i];
            uint64_t at = thinvm_slot_address(slot);

            found |= thinvm_slot_is_run(thinvm_slot_type(slot)) &&
                     at < first + nb_clusters &&
                     at + THINVM_ENTRIES_PER_LEAF > first;
        }
    }
    return found;
}

void thinvm_taking_begin(ThinvmState *s, uint64_t first, uint64_t nb_clusters)
{
    s->taking = (ThinvmTaking) {
        .first = first,
        .nb_clusters = nb_clusters,
        .next = QTAILQ_FIRST(&s->all_pages),
    };
}

void thinvm_taking_look(ThinvmState *s, ThinvmPage *page)
{
    ThinvmTaking *t = &s->taking;

    if (t->nb_clusters && !t->found) {
        t->found = page_names_clusters(page, t->first, t->nb_clusters);
    }
}

/* New pages come in front of all others, so the rest was there before */
int thinvm_taking_step(ThinvmState *s)
{
    ThinvmTaking *t = &s->taking;

    for (int i = 0; i < THINVM_TAKING_STEP && t->next; i++) {
        thinvm_taking_look(s, t->next);
        t->next = QTAILQ_NEXT(t->next, in_memory);
    }
    return t->next && !t->found ? -EAGAIN : 0;
}

void thinvm_taking_end(ThinvmState *s)
{
    s->taking = (ThinvmTaking) { };
}

void thinvm_taking_page_leaves(ThinvmState *s, ThinvmPage *page)
{
    thinvm_taking_look(s, page);
    if (s->taking.next == page) {
        s->taking.next = QTAILQ_NEXT(page, in_memory);
    }
}

bool thinvm_taking_finds(ThinvmState *s, uint64_t first, uint64_t nb_clusters)
{
    ThinvmTaking *t = &s->taking;
    ThinvmPage *page;

    if (t->nb_clusters == nb_clusters && t->first == first &&
        (t->found || !t->next)) {
        return t->found;
    }
    QTAILQ_FOREACH(page, &s->all_pages, in_memory) {
        if (page_names_clusters(page, first, nb_clusters)) {
            return true;
        }
    }
    return false;
}

bool thinvm_taking_have_clusters(void *opaque, uint64_t cluster,
                                 uint64_t nb_clusters)
{
    ThinvmState *s = opaque;
    ThinvmTaking *t = &s->taking;

    return (cluster < t->first + t->nb_clusters &&
            cluster + nb_clusters > t->first) ||
           thinvm_extents_have_clusters(s, cluster, nb_clusters);
}
