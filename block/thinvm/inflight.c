/*
 * thinvm data path: changes of allocation in flight
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See inflight.h for the rules.  The list, its entries and all ThinvmAlloc
 * are protected by s->inflight_lock, which is never held across I/O.
 */
#include "qemu/osdep.h"
#include "inflight.h"
#include "trace.h"

void thinvm_io_init(BDRVThinvmState *s)
{
    qemu_co_mutex_init(&s->inflight_lock);
    QLIST_INIT(&s->inflight);
}

void thinvm_io_destroy(BDRVThinvmState *s)
{
    assert(QLIST_EMPTY(&s->inflight) && !s->copiers);
}

static bool clusters_overlap(const ThinvmInflight *a, const ThinvmInflight *b)
{
    return a->tree == b->tree &&
           thinvm_inflight_first(a) < thinvm_inflight_end(b) &&
           thinvm_inflight_first(b) < thinvm_inflight_end(a);
}

static bool parts_overlap(const ThinvmInflight *a, const ThinvmInflight *b)
{
    return a->tree == b->tree && a->start < b->end && b->start < a->end;
}

static bool conflict(const ThinvmInflight *a, const ThinvmInflight *b)
{
    return a->exclusive || b->exclusive ? clusters_overlap(a, b)
                                        : parts_overlap(a, b);
}

static void insert(BDRVThinvmState *s, ThinvmInflight *f, int tree,
                   uint64_t start, uint64_t end, bool exclusive)
{
    *f = (ThinvmInflight) {
        .tree = tree,
        .start = start,
        .end = end,
        .exclusive = exclusive,
    };
    qemu_co_queue_init(&f->waiters);
    QLIST_INSERT_HEAD(&s->inflight, f, link);
}

/* The entries behind @f in the list are those that came before it */
static ThinvmInflight *earlier_conflict(ThinvmInflight *f)
{
    ThinvmInflight *e;

    for (e = QLIST_NEXT(f, link); e; e = QLIST_NEXT(e, link)) {
        if (conflict(e, f)) {
            return e;
        }
    }
    return NULL;
}

static void coroutine_fn wait_for(BDRVThinvmState *s, ThinvmInflight *f,
                                  ThinvmInflight *e)
{
    trace_thinvm_inflight_wait(s->bs, f->tree, f->start, f->end, e->start,
                               e->end, e->exclusive);
    qemu_co_queue_wait(&e->waiters, &s->inflight_lock);
}

static void coroutine_fn begin(BDRVThinvmState *s, ThinvmInflight *f, int tree,
                               uint64_t start, uint64_t end, bool exclusive)
{
    ThinvmInflight *e;

    QEMU_LOCK_GUARD(&s->inflight_lock);
    insert(s, f, tree, start, end, exclusive);
    while ((e = earlier_conflict(f))) {
        wait_for(s, f, e);
    }
}

void coroutine_fn thinvm_inflight_begin_parts(BDRVThinvmState *s,
                                              ThinvmInflight *f, int tree,
                                              uint64_t start, uint64_t end)
{
    begin(s, f, tree, start, end, false);
}

void coroutine_fn thinvm_inflight_begin_exclusive(BDRVThinvmState *s,
                                                  ThinvmInflight *f, int tree,
                                                  uint64_t first,
                                                  uint64_t count)
{
    begin(s, f, tree, first << THINVM_PART_BITS,
          (first + count) << THINVM_PART_BITS, true);
}

static ThinvmAlloc *alloc_of(const ThinvmInflight *e, uint64_t cluster)
{
    if (e->head && e->head->guest == cluster) {
        return e->head;
    }
    if (e->tail && e->tail->guest == cluster) {
        return e->tail;
    }
    return NULL;
}

/*
 * Look at all entries before @f.  Shortens @f to the clusters before the
 * first one that somebody else is at, unless that is its first.  Returns an
 * entry that @f has to wait for, or NULL.  *others: somebody is at the first
 * cluster, and all are at other parts of it; *join: the allocation there, as
 * long as no part of it is valid.  Once it is mapped, parts may be valid whose
 * writers have left: only a look-up tells which.
 */
static ThinvmInflight *scan_for_allocate(ThinvmInflight *f, bool *others,
                                         ThinvmAlloc **join)
{
    uint64_t first = thinvm_inflight_first(f);
    uint64_t first_end = MIN(f->end, (first + 1) << THINVM_PART_BITS);
    ThinvmInflight *e;
    ThinvmAlloc *a;

    *others = false;
    *join = NULL;
    for (e = QLIST_NEXT(f, link); e; e = QLIST_NEXT(e, link)) {
        if (!clusters_overlap(e, f)) {
            continue;
        }
        if (thinvm_inflight_first(e) > first) {
            f->end = thinvm_inflight_first(e) << THINVM_PART_BITS;
            continue;
        }
        if (e->exclusive || (e->start < first_end && f->start < e->end)) {
            return e;
        }
        *others = true;
        a = alloc_of(e, first);
        if (a && a->state != THINVM_ALLOC_MAPPED) {
            *join = a;
        }
    }
    return NULL;
}

static void copier_begin(BDRVThinvmState *s, ThinvmInflight *f)
{
    f->may_copy = true;
    qatomic_inc(&s->copiers);
    smp_mb__after_rmw();        /* before any look-up: see the header */
}

/* With inflight_lock held, so that there is one at a time */
static void copier_end(BDRVThinvmState *s, ThinvmInflight *f)
{
    if (f->may_copy) {
        f->may_copy = false;
        qatomic_store_release(&s->copies_ended, s->copies_ended + 1);
        qatomic_dec(&s->copiers);
    }
}

void thinvm_inflight_begin_moving(BDRVThinvmState *s)
{
    qatomic_inc(&s->copiers);
    smp_mb__after_rmw();
}

void coroutine_fn thinvm_inflight_end_moving(BDRVThinvmState *s)
{
    QEMU_LOCK_GUARD(&s->inflight_lock);
    qatomic_store_release(&s->copies_ended, s->copies_ended + 1);
    qatomic_dec(&s->copiers);
}

ThinvmBegin coroutine_fn thinvm_inflight_begin_allocate(BDRVThinvmState *s,
                                                        ThinvmInflight *f,
                                                        int tree,
                                                        uint64_t start,
                                                        uint64_t end)
{
    uint64_t first = start >> THINVM_PART_BITS;
    ThinvmInflight *e;
    ThinvmAlloc *join;
    bool others;

    QEMU_LOCK_GUARD(&s->inflight_lock);
    insert(s, f, tree, start, end, true);
    copier_begin(s, f);
    while ((e = scan_for_allocate(f, &others, &join))) {
        wait_for(s, f, e);
    }
    if (!others) {
        return THINVM_BEGIN_EXCLUSIVE;
    }

    copier_end(s, f);
    f->exclusive = false;
    f->end = MIN(f->end, (first + 1) << THINVM_PART_BITS);
    qemu_co_queue_restart_all(&f->waiters);
    if (!join) {
        return THINVM_BEGIN_PARTS;
    }
    trace_thinvm_write_join(s->bs, first, join->physical);
    join->refs++;
    f->head = join;
    return THINVM_BEGIN_JOINED;
}

void coroutine_fn thinvm_inflight_begin_alone(BDRVThinvmState *s,
                                              ThinvmInflight *f, int tree,
                                              uint64_t start, uint64_t end)
{
    ThinvmInflight *e;

    QEMU_LOCK_GUARD(&s->inflight_lock);
    insert(s, f, tree, start, end, true);
    copier_begin(s, f);
    while ((e = earlier_conflict(f))) {
        wait_for(s, f, e);
    }
}

static ThinvmAlloc *alloc_new(int tree, uint64_t guest, uint64_t physical,
                              ThinvmSource source)
{
    ThinvmAlloc *a = g_new0(ThinvmAlloc, 1);

    a->tree = tree;
    a->guest = guest;
    a->physical = physical;
    a->source = source;
    a->refs = 1;
    qemu_co_queue_init(&a->queue);
    return a;
}

void coroutine_fn thinvm_inflight_narrow(BDRVThinvmState *s,
                                         ThinvmInflight *f,
                                         uint64_t start, uint64_t end,
                                         uint64_t physical,
                                         ThinvmSource source,
                                         bool open_head, bool open_tail)
{
    uint64_t first = start >> THINVM_PART_BITS;
    uint64_t last = (end - 1) >> THINVM_PART_BITS;

    assert(f->exclusive && !f->head && !f->tail);

    QEMU_LOCK_GUARD(&s->inflight_lock);
    copier_end(s, f);
    f->exclusive = false;
    f->start = start;
    f->end = end;
    f->physical = physical;
    if (open_head) {
        f->head = alloc_new(f->tree, first, physical, source);
    }
    if (open_tail) {
        f->tail = alloc_new(f->tree, last, physical + (last - first), source);
    }
    qemu_co_queue_restart_all(&f->waiters);
}

void coroutine_fn thinvm_inflight_shorten(BDRVThinvmState *s,
                                          ThinvmInflight *f, uint64_t end)
{
    if (end == f->end) {
        return;
    }
    assert(end > f->start && end < f->end);

    QEMU_LOCK_GUARD(&s->inflight_lock);
    f->end = end;
    qemu_co_queue_restart_all(&f->waiters);
}

void coroutine_fn thinvm_inflight_place(BDRVThinvmState *s,
                                        ThinvmInflight *f, uint64_t count,
                                        uint64_t physical)
{
    assert(f->exclusive);

    QEMU_LOCK_GUARD(&s->inflight_lock);
    f->end = (thinvm_inflight_first(f) + count) << THINVM_PART_BITS;
    f->physical = physical;
    qemu_co_queue_restart_all(&f->waiters);
}

void coroutine_fn thinvm_inflight_end_request(BDRVThinvmState *s,
                                              ThinvmInflight *f)
{
    QEMU_LOCK_GUARD(&s->inflight_lock);
    copier_end(s, f);
    QLIST_REMOVE(f, link);
    qemu_co_queue_restart_all(&f->waiters);
}

uint64_t coroutine_fn thinvm_inflight_goal(BDRVThinvmState *s, int tree,
                                           uint64_t guest)
{
    ThinvmInflight *e;

    QEMU_LOCK_GUARD(&s->inflight_lock);
    QLIST_FOREACH(e, &s->inflight, link) {
        if (e->tree == tree && e->physical && thinvm_inflight_end(e) == guest) {
            return e->physical + (guest - thinvm_inflight_first(e));
        }
    }
    return 0;
}

/* Returns true if the caller is to execute the MAP */
static bool coroutine_fn alloc_start_mapping(BDRVThinvmState *s,
                                             ThinvmAlloc *a)
{
    QEMU_LOCK_GUARD(&s->inflight_lock);
    while (a->state == THINVM_ALLOC_MAPPING) {
        qemu_co_queue_wait(&a->queue, &s->inflight_lock);
    }
    if (a->state == THINVM_ALLOC_MAPPED) {
        return false;
    }
    a->state = THINVM_ALLOC_MAPPING;
    return true;
}

static void coroutine_fn alloc_end_mapping(BDRVThinvmState *s, ThinvmAlloc *a,
                                           bool mapped)
{
    QEMU_LOCK_GUARD(&s->inflight_lock);
    a->state = mapped ? THINVM_ALLOC_MAPPED : THINVM_ALLOC_RESERVED;
    qemu_co_queue_restart_all(&a->queue);
}

int coroutine_fn thinvm_alloc_complete(BDRVThinvmState *s, ThinvmAlloc *a,
                                       uint16_t valid,
                                       const ThinvmDataSum *sum,
                                       uint64_t *ticket, Error **errp)
{
    bool map = alloc_start_mapping(s, a);
    ThinvmOp op = {
        .type = map ? THINVM_OP_MAP : THINVM_OP_VALIDATE,
        .tree = a->tree,
        .guest = a->guest,
        .count = map ? 1 : 0,
        .physical = a->physical,
        .valid = valid,
        .source = map ? a->source : 0,
    };
    int ret = thinvm_store_execute_summed(s->store, &op, sum, ticket, errp);

    if (map) {
        alloc_end_mapping(s, a, ret == 0);
    }
    return ret;
}

void coroutine_fn thinvm_alloc_put(BDRVThinvmState *s, ThinvmAlloc *a)
{
    bool unused;

    WITH_QEMU_LOCK_GUARD(&s->inflight_lock) {
        if (--a->refs) {
            return;
        }
        unused = a->state == THINVM_ALLOC_RESERVED;
    }
    if (unused) {
        thinvm_store_unreserve(s->store, a->physical, 1);
    }
    g_free(a);
}
