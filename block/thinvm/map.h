/*
 * thinvm metadata engine: geometry of mapping trees
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * For map.c (look-up) and map-ops.c (changes) only.
 */
#ifndef BLOCK_THINVM_MAP_H
#define BLOCK_THINVM_MAP_H

#include "state-int.h"

/* Guest clusters below a pointer to a page of @level */
static inline uint64_t thinvm_map_span(int level)
{
    return 1ULL << (9 + 8 * level);
}

/* Slot in an inner page of @level (1 to 3) */
static inline unsigned thinvm_map_index(uint64_t guest, int level)
{
    return (guest >> (9 + 8 * (level - 1))) & (THINVM_POINTERS_PER_PAGE - 1);
}

static inline ThinvmPageKind thinvm_map_kind(int level)
{
    return level ? THINVM_PAGE_MAP_INNER : THINVM_PAGE_MAP_LEAF;
}

/* The entry that a run's pointer @word stands for at @index */
static inline uint64_t thinvm_run_entry(uint64_t word, unsigned index)
{
    bool written = ((word >> THINVM_PTR_TYPE_SHIFT) & 15) == THINVM_PTR_RUN;
    uint64_t entry = thinvm_entry((word & THINVM_CLUSTER_MASK) + index,
                                  written ? THINVM_ALL_VALID : 0,
                                  written ? THINVM_SOURCE_BACKING :
                                            THINVM_SOURCE_ZERO);

    return word & THINVM_PTR_SHARED_BELOW ? entry | THINVM_ENTRY_SHARED
                                          : entry;
}

#endif
