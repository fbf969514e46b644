/*
 * thinvm metadata engine: what the files on mapping trees share
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * For map.c (look-up), map-ops.c and map-unmap.c (changes) only.
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

static inline bool thinvm_slot_is_run(ThinvmPointerType type)
{
    return type == THINVM_PTR_RUN || type == THINVM_PTR_UNWRITTEN_RUN;
}

static inline bool thinvm_slot_names_something(ThinvmPointerType type)
{
    return type != THINVM_PTR_NONE && type != THINVM_PTR_ZERO;
}

/* ---- map-ops.c ---- */

typedef int (*ThinvmRangeFn)(ThinvmState *s, uint64_t first, uint64_t nb,
                             ThinvmNeeds *needs);

/* A reference less to each of these clusters */
int thinvm_range_dec(ThinvmState *s, uint64_t first, uint64_t nb,
                     ThinvmNeeds *needs);

/*
 * A walk that meets clusters, and calls @fn for each contiguous range of
 * them.  Both halves of a change gather alike: what a prepare found to be one
 * range, for which pointers of the count tree may do, is one in its apply.
 */
typedef struct ThinvmGather {
    ThinvmState *s;
    ThinvmRangeFn fn;
    ThinvmNeeds *needs;
    uint64_t first, nb;
    int ret;
} ThinvmGather;

void thinvm_gather(ThinvmGather *g, uint64_t first, uint64_t nb);
void thinvm_gather_leaf(ThinvmGather *g, ThinvmPage *leaf, unsigned from,
                        unsigned to);
/* 0, or -EAGAIN if @fn said so for any */
int thinvm_gather_end(ThinvmGather *g);

/* Where a walk to a leaf ended */
typedef struct ThinvmPathEnd {
    ThinvmPage *leaf;               /* NULL: @slot stands for the range */
    const ThinvmPointerLe *slot;
    int level;                      /* of what @slot points to */
    bool shared;
} ThinvmPathEnd;

/*
 * Walk down from the root @slot to the page of @bottom (0: the leaf), touching
 * what will change.  Stops early where a pointer stands for the range.
 */
int thinvm_map_need_path(ThinvmState *s, const ThinvmPointerLe *slot,
                         uint64_t guest, int bottom, ThinvmNeeds *needs,
                         ThinvmPathEnd *end);
uint64_t thinvm_map_end_entry(const ThinvmPathEnd *end, unsigned index);
/* The counts of what entries [from, to) name will change */
int thinvm_map_need_end_counts(ThinvmState *s, const ThinvmPathEnd *end,
                               unsigned from, unsigned to, ThinvmNeeds *needs);
/* The page of @bottom for @guest, writable, with all above it; @slot is the
 * root of @tree, or of a snapshot's tree of that kind, and may be changed */
ThinvmPage *thinvm_map_writable_path(ThinvmState *s, ThinvmPointerLe *slot,
                                     int tree, uint64_t guest, int bottom);

/* The page that @slot leads to, writable; made if @slot stands for a range */
ThinvmPage *thinvm_map_writable_child(ThinvmState *s, ThinvmPointerLe *slot,
                                      int level);

/* ---- map-unmap.c ---- */

/* Everything below @slot goes, which becomes NONE: prepare and apply */
int thinvm_map_need_drop(ThinvmState *s, const ThinvmPointerLe *slot,
                         int level, bool shared, ThinvmNeeds *needs);
void thinvm_map_drop(ThinvmState *s, ThinvmPointerLe *slot, int level);

int thinvm_map_prepare_unmap(ThinvmState *s, const ThinvmOp *op,
                             ThinvmNeeds *needs);
void thinvm_map_apply_unmap(ThinvmState *s, const ThinvmOp *op);

#endif
