/*
 * thinvm data path: changes of allocation in flight
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Data path layer.  Who may change what is mapped, while others are at it:
 *
 *  - A plain overwrite of valid parts of a private cluster registers nothing.
 *    The store's request epochs keep the cluster from reuse until it left.
 *    While clusters may be copied or moved (thinvm_inflight_may_copy()) it
 *    registers these parts, until its data are written.
 *  - A write that makes parts of a mapped cluster valid registers these parts.
 *    Two such writes of one cluster go on side by side as long as they touch
 *    different parts: a part that one of them fills must not be written by
 *    the other meanwhile.
 *  - An allocation, a discard, or a write of zeroes registers whole clusters
 *    alone (exclusive).
 *  - An allocating write, once its place is reserved, keeps only its parts and
 *    lets others in: for its first and last cluster, of which it may cover but
 *    some parts, it publishes a ThinvmAlloc that later writers to other parts
 *    of that cluster join.
 *
 * An entry waits for conflicting ones that came before it, and only for these;
 * nobody waits for a registration while another one of his depends on it being
 * granted (each chunk of a request ends by itself).  So there is an order,
 * hence neither deadlock nor starvation.
 *
 * Invariant 2 of the design (section 4), as far as requests are concerned, is
 * kept here: what overlaps ends as one or the other, whole.
 *
 * Units: clusters are guest clusters; a part is a sixteenth of a cluster, and
 * part numbers count from the start of the disk.
 */
#ifndef BLOCK_THINVM_INFLIGHT_H
#define BLOCK_THINVM_INFLIGHT_H

#include "thinvm.h"

#define THINVM_PART_BITS    4       /* log2(THINVM_PARTS) */

typedef enum ThinvmAllocState {
    THINVM_ALLOC_RESERVED,          /* the mapping does not know of it yet */
    THINVM_ALLOC_MAPPING,           /* somebody executes the MAP */
    THINVM_ALLOC_MAPPED,
} ThinvmAllocState;

/*
 * A new cluster that several writers fill, each some parts of it.  Whoever
 * has written his data first maps it; the others validate their parts.  If
 * all fail, the last one gives the reservation back.
 */
typedef struct ThinvmAlloc {
    int tree;
    uint64_t guest, physical;       /* clusters */
    ThinvmSource source;            /* of the parts that nobody writes */
    unsigned refs;
    ThinvmAllocState state;
    CoQueue queue;                  /* waits for the end of MAPPING */
} ThinvmAlloc;

struct ThinvmInflight {
    int tree;
    uint64_t start, end;            /* parts */
    bool exclusive;
    bool may_copy;                  /* counted in s->copiers */
    /* reserved clusters of an allocating write from first_cluster on, or 0 */
    uint64_t physical;
    /* first and last cluster when they are open to others; else NULL */
    ThinvmAlloc *head, *tail;
    CoQueue waiters;
    QLIST_ENTRY(ThinvmInflight) link;   /* newest first */
};

static inline uint64_t thinvm_inflight_first(const ThinvmInflight *f)
{
    return f->start >> THINVM_PART_BITS;
}

/* The cluster after the last one */
static inline uint64_t thinvm_inflight_end(const ThinvmInflight *f)
{
    return (f->end + THINVM_PARTS - 1) >> THINVM_PART_BITS;
}

/*
 * May somebody be copying a cluster to a new place?  A write into a cluster
 * that is private registers nothing; but
 *  - it may have been shared when a copy of it began, and be private since the
 *    last snapshot that shared it was deleted;
 *  - somebody may be moving what is private (thinvm_inflight_begin_moving()):
 * then the copy would take the place of what is written now.  To be asked
 * after the look-up that found it private; if so the write registers, which
 * waits for a copy that has begun, looks up again, and stays registered until
 * its data are written: a move that begins meanwhile waits for them.
 *
 * For copies of what is shared, why the answer is right:
 *
 * A copier counts itself in s->copiers before the look-up that finds the
 * cluster shared, and nothing that is private becomes shared while requests
 * are in flight: a copier of this cluster has counted itself before our
 * look-up.  If it has left s->copiers since, the mapping that we found is that
 * from before its copy, perhaps; it has raised s->copies_ended then, after its
 * operation and before it left.  @ended: thinvm_inflight_copies_ended() from
 * before the look-up; unchanged, it says that no copy has ended behind it.
 */
static inline unsigned thinvm_inflight_copies_ended(BDRVThinvmState *s)
{
    return qatomic_load_acquire(&s->copies_ended);
}

static inline bool thinvm_inflight_may_copy(BDRVThinvmState *s, unsigned ended)
{
    smp_rmb();
    return unlikely(qatomic_load_acquire(&s->copiers) ||
                    qatomic_read(&s->copies_ended) != ended);
}

/* Register parts [start, end); waits for those that came before and conflict */
void coroutine_fn thinvm_inflight_begin_parts(BDRVThinvmState *s,
                                              ThinvmInflight *f, int tree,
                                              uint64_t start, uint64_t end);
/*
 * Private clusters are about to be copied, too, not only shared ones.  Writes
 * in place that looked up before know nothing of it: after begin_moving the
 * caller waits until all requests that are running have left.  From then on
 * thinvm_inflight_may_copy() says yes to all that look up, so that each write
 * is registered as long as it writes, in place too: who registers what he
 * moves, alone, has no writer there until he ends that.  Any context.
 */
void thinvm_inflight_begin_moving(BDRVThinvmState *s);
void coroutine_fn thinvm_inflight_end_moving(BDRVThinvmState *s);

/* Register clusters [first, first + count) alone; waits likewise */
void coroutine_fn thinvm_inflight_begin_exclusive(BDRVThinvmState *s,
                                                  ThinvmInflight *f, int tree,
                                                  uint64_t first,
                                                  uint64_t count);

typedef enum ThinvmBegin {
    /* registered alone, on as many clusters as nobody else is at: fewer than
       asked for, perhaps; end tells */
    THINVM_BEGIN_EXCLUSIVE,
    /* registered for the parts in the first cluster; its f->head is the
       allocation of another writer, joined */
    THINVM_BEGIN_JOINED,
    /* registered for the parts in the first cluster, which somebody has
       mapped meanwhile, or just found mapped: look it up again */
    THINVM_BEGIN_PARTS,
} ThinvmBegin;

/*
 * Register a write of parts [start, end) that found its first cluster without
 * a place of its own.
 */
ThinvmBegin coroutine_fn thinvm_inflight_begin_allocate(BDRVThinvmState *s,
                                                        ThinvmInflight *f,
                                                        int tree,
                                                        uint64_t start,
                                                        uint64_t end);
/*
 * The same after THINVM_BEGIN_PARTS, if that cluster still has no place of its
 * own: registered alone on it when all have left that came before.  (Who is
 * there may have found it mapped, waited for a discard, and be about to look
 * again: in this very thread, so asking again at once would be for ever.)
 */
void coroutine_fn thinvm_inflight_begin_alone(BDRVThinvmState *s,
                                              ThinvmInflight *f, int tree,
                                              uint64_t start, uint64_t end);
/*
 * From exclusive to the parts [start, end) only.  @physical: what was
 * reserved for the clusters of these parts, or 0.  @source and not NULL
 * @open_head, @open_tail: publish these clusters (the first, the last) so
 * that others may join.
 */
void coroutine_fn thinvm_inflight_narrow(BDRVThinvmState *s,
                                         ThinvmInflight *f,
                                         uint64_t start, uint64_t end,
                                         uint64_t physical,
                                         ThinvmSource source,
                                         bool open_head, bool open_tail);
/* Keep the parts up to @end only */
void coroutine_fn thinvm_inflight_shorten(BDRVThinvmState *s,
                                          ThinvmInflight *f, uint64_t end);
/* Stay exclusive, but on the first @count clusters only, at @physical */
void coroutine_fn thinvm_inflight_place(BDRVThinvmState *s,
                                        ThinvmInflight *f, uint64_t count,
                                        uint64_t physical);
void coroutine_fn thinvm_inflight_end_request(BDRVThinvmState *s,
                                              ThinvmInflight *f);

/* Physical cluster after the one that an entry in flight has for the guest
 * cluster before @guest; 0: there is none */
uint64_t coroutine_fn thinvm_inflight_goal(BDRVThinvmState *s, int tree,
                                           uint64_t guest);

/*
 * Our data in the parts @valid of @a is written: map the cluster, or validate
 * the parts of it.  @sum: of the data, or NULL.
 */
int coroutine_fn thinvm_alloc_complete(BDRVThinvmState *s, ThinvmAlloc *a,
                                       uint16_t valid,
                                       const ThinvmDataSum *sum,
                                       uint64_t *ticket, Error **errp);
/* Leave @a; the last one to leave gives an unused reservation back */
void coroutine_fn thinvm_alloc_put(BDRVThinvmState *s, ThinvmAlloc *a);

#endif
