/*
 * thinvm metadata engine: what repairing needs beyond operations
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Engine layer; for check*.c alone.  All of it works in memory, without a
 * journal record, while nothing else changes the state; the caller then
 * corrects the counts (thinvm_repair_cluster_count() and _page_count() in
 * state.h) and writes two checkpoints.  Needs the state lock.
 */
#ifndef BLOCK_THINVM_REPAIR_H
#define BLOCK_THINVM_REPAIR_H

#include "state.h"

typedef enum ThinvmRoot {
    THINVM_ROOT_DISK,
    THINVM_ROOT_VMSTATE,
    THINVM_ROOT_COUNT,
    THINVM_ROOT_SNAPSHOT,
} ThinvmRoot;

/*
 * A new page with these contents, of which PAGE pointers to other new pages
 * need no checksums.  *ptr names it.  0, or -ENOSPC.
 */
int thinvm_repair_new_page(ThinvmState *s, ThinvmPageKind kind, int level,
                           const void *data, ThinvmPointer *ptr);
void thinvm_repair_set_root(ThinvmState *s, ThinvmRoot root,
                            const ThinvmPointer *ptr);
/* The active VM state has this size; @nb_snapshots slots are in use */
void thinvm_repair_set_vmstate_size(ThinvmState *s, uint64_t size);
void thinvm_repair_set_snapshots(ThinvmState *s, uint32_t nb_snapshots);

/*
 * A page as it was read from the device, with a right checksum but contents
 * that thinvm_page_validate() refuses: clear what is wrong, item by item
 * (entries, pointers, snapshots), and tell of each.  0, or -EBADMSG where that
 * cannot be done: a wrong checksum, or a page of counts or of one item.
 */
int thinvm_repair_salvage(ThinvmState *s, const ThinvmPageRef *ref, void *buf,
                          void (*bad)(void *opaque, unsigned index,
                                      const char *why),
                          void *opaque);

#endif
