/*
 * thinvm durability: looking at snapshots
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Durability layer.  Reads the records of snapshots and the mappings in them,
 * with the pages read as needed.  A snapshot is named by slot and id, not by
 * the pointer to its tree: of a store that follows another owner the state
 * is replaced now and then, and where pages lie differs between the two.
 *
 * While a snapshot is there, and not being deleted, its clusters are in use
 * and what they hold does not change: a reader that finds it there after the
 * data arrived has read what the snapshot holds (invariant 2).
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "store-int.h"

/* One step of something that may want pages; takes the state's lock itself */
typedef int (*SnapshotStep)(ThinvmState *s, void *opaque, ThinvmNeeds *needs,
                            Error **errp);

static void needs_end(ThinvmState *s, ThinvmNeeds *needs)
{
    thinvm_state_lock(s);
    thinvm_needs_destroy(s, needs);
    thinvm_state_unlock(s);
}

/* A page that proves wrong may be explained by what another owner does */
static bool coroutine_fn may_retry(ThinvmStore *st, ThinvmState *s,
                                   unsigned *attempts)
{
    return (*attempts)++ < THINVM_PAGE_ATTEMPTS &&
           (thinvm_store_may_write(st) == 0 || thinvm_follow_restart(st, s));
}

/* Repeat @step until it has all its pages; within a request */
static int coroutine_fn run_step(ThinvmStore *st, SnapshotStep step,
                                 void *opaque, Error **errp)
{
    ThinvmState *s = thinvm_store_state(st);
    unsigned attempts = 0;
    Error *local_err = NULL;
    ThinvmNeeds needs;
    int ret;

    thinvm_needs_init(&needs);
    for (;;) {
        ret = step(s, opaque, &needs, &local_err);
        if (ret == -EAGAIN) {
            ret = thinvm_store_read_wanted(st, s, &needs, &local_err);
            if (ret == 0) {
                continue;
            }
        }
        if (ret != -EBADMSG || !may_retry(st, s, &attempts)) {
            break;
        }
        error_free(g_steal_pointer(&local_err));
        needs_end(s, &needs);
        thinvm_needs_init(&needs);
        s = thinvm_store_state(st);
    }
    needs_end(s, &needs);
    if (ret < 0) {
        error_propagate(errp, local_err);
    } else {
        error_free(local_err);
    }
    return ret;
}

/* ------------------------------------------------------------------ */

typedef struct ReadRecord {
    uint32_t slot;
    ThinvmSnapshot *snap;
} ReadRecord;

static int step_read(ThinvmState *s, void *opaque, ThinvmNeeds *needs,
                     Error **errp)
{
    ReadRecord *r = opaque;
    int ret;

    thinvm_state_lock(s);
    ret = thinvm_snapshot_read(s, r->slot, r->snap, needs, errp);
    thinvm_state_unlock(s);
    return ret;
}

int coroutine_fn thinvm_store_read_snapshot(ThinvmStore *st, uint32_t slot,
                                            ThinvmSnapshot *snap, Error **errp)
{
    ReadRecord r = { .slot = slot, .snap = snap };
    unsigned token = thinvm_store_request_begin(st);
    int ret = run_step(st, step_read, &r, errp);

    thinvm_store_request_end(st, token);
    return ret;
}

/* ------------------------------------------------------------------ */

typedef struct LookUp {
    const ThinvmSnapshotName *name;
    uint64_t guest, count;
    ThinvmMapping *mapping;             /* NULL: only whether it is there */
} LookUp;

static int step_look_up(ThinvmState *s, void *opaque, ThinvmNeeds *needs,
                        Error **errp)
{
    LookUp *l = opaque;
    ThinvmSnapshot snap;
    ReadRecord r = { .slot = l->name->slot, .snap = &snap };
    int ret = step_read(s, &r, needs, errp);

    if (ret == 0 && (snap.id != l->name->id ||
                     (snap.flags & THINVM_SNAPSHOT_HIDDEN))) {
        ret = -ENOENT;
    }
    if (ret < 0 || !l->mapping) {
        return ret;
    }
    return thinvm_state_lookup(s, THINVM_TREE_DISK, &snap.root, l->guest,
                               l->count, false, l->mapping, needs);
}

int coroutine_fn thinvm_store_lookup_snapshot(ThinvmStore *st,
                                              const ThinvmSnapshotName *name,
                                              uint64_t guest, uint64_t count,
                                              ThinvmMapping *mapping)
{
    LookUp l = {
        .name = name, .guest = guest, .count = count, .mapping = mapping,
    };

    return run_step(st, step_look_up, &l, NULL);
}

int coroutine_fn thinvm_store_have_snapshot(ThinvmStore *st,
                                            const ThinvmSnapshotName *name)
{
    LookUp l = { .name = name };

    return run_step(st, step_look_up, &l, NULL);
}

/* ------------------------------------------------------------------ */

typedef struct Sum {
    const ThinvmSnapshotName *name;
    bool vmstate;
    uint64_t guest;
    ThinvmExclusive *sum;
} Sum;

static int step_sum(ThinvmState *s, void *opaque, ThinvmNeeds *needs,
                    Error **errp)
{
    Sum *m = opaque;
    ThinvmSnapshot snap;
    int ret;

    thinvm_state_lock(s);
    ret = thinvm_snapshot_read(s, m->name->slot, &snap, needs, errp);
    if (ret == 0 && snap.id != m->name->id) {
        ret = -ENOENT;
    }
    if (ret == 0) {
        ret = thinvm_map_exclusive_step(s, m->vmstate ? &snap.vmstate_root :
                                                        &snap.root,
                                        &m->guest, m->sum, needs);
    }
    thinvm_state_unlock(s);
    return ret;
}

int coroutine_fn thinvm_store_exclusive(ThinvmStore *st,
                                        const ThinvmSnapshotName *name,
                                        unsigned *budget,
                                        ThinvmExclusive *sum, Error **errp)
{
    int ret = 0;

    *sum = (ThinvmExclusive) { };
    for (int tree = 0; tree < THINVM_NB_TREES; tree++) {
        Sum m = {
            .name = name, .vmstate = tree == THINVM_TREE_VMSTATE, .sum = sum,
        };

        while (ret == 0 && m.guest < THINVM_MAX_GUEST_CLUSTERS) {
            unsigned token;

            if (!*budget) {
                return -ETIME;
            }
            (*budget)--;
            token = thinvm_store_request_begin(st);
            ret = run_step(st, step_sum, &m, errp);
            thinvm_store_request_end(st, token);
        }
    }
    return ret;
}
