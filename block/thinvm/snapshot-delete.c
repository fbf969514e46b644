/*
 * thinvm driver layer: deleting and protecting snapshots
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A deletion begins with one operation, durable before it is reported, that
 * takes the snapshot out of the lists and gives its child, if it has one, the
 * snapshot's parent.  What only the snapshot holds is then freed in bounded
 * steps, each an operation of the engine (snapshot.c there).  Who does them:
 *
 *   a tool              at once, before the callback returns
 *   standard commands   the worker, beside the guest's requests
 *   a job               the job (snapshot-job.c); the worker keeps away
 *   after a crash       the worker of the next owner
 *
 * The record of a snapshot with several children stays, hidden, until they
 * come down to one; each record that goes may be what another one waited for.
 *
 * Pace: a deletion takes no more than half of the time of the thread that it
 * runs in, in pieces that a guest does not feel.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/coroutine.h"
#include "qemu/timer.h"
#include "driver-snapshot.h"
#include "trace.h"

bool thinvm_in_background;

/* How long steps are done in a row, and for how long then none */
#define THINVM_PACE_NS      (250 * SCALE_US)
/* Records that one step of looking for work passes over at most */
#define THINVM_SCAN_SLOTS   512

/* ------------------------------------------------------------------ */
/* One deletion                                                        */

static bool thinvm_snapshot_has_tree(const ThinvmSnapshot *snap)
{
    return snap->root.type == THINVM_PTR_PAGE ||
           snap->vmstate_root.type == THINVM_PTR_PAGE;
}

typedef struct ThinvmPrepare {
    const char *id, *name;
    bool force;
    ThinvmDeletion *del;
} ThinvmPrepare;

static int coroutine_fn GRAPH_RDLOCK
thinvm_co_deletion_prepare(BlockDriverState *bs, void *opaque, Error **errp)
{
    ERRP_GUARD();
    ThinvmPrepare *p = opaque;
    ThinvmSnapshot snap;
    uint32_t slot;
    int ret;

    ret = thinvm_mode_begin_change(bs, errp);
    if (ret < 0) {
        return ret;
    }
    ret = thinvm_require_snapshot(bs->opaque, p->id, p->name, &snap, &slot,
                                  errp);
    if (ret < 0) {
        return ret;
    }
    if ((snap.flags & THINVM_SNAPSHOT_PROTECTED) && !p->force) {
        error_setg(errp, "Snapshot %" PRIu64 " '%s' is protected: other "
                   "images may have it as their backing file",
                   snap.id, snap.name);
        error_append_hint(errp, "thinvm-snapshot-protect ends that; "
                          "thinvm-snapshot-delete has an option \"force\".\n");
        return -EPERM;
    }
    *p->del = (ThinvmDeletion) {
        .name = { .slot = slot, .id = snap.id },
        .end = DIV_ROUND_UP(snap.virtual_size,
                            ((BDRVThinvmState *)bs->opaque)->cluster_size),
    };
    return 0;
}

/* A node of this process that shows the snapshot, or NULL */
static BDRVThinvmState *thinvm_find_viewer(BDRVThinvmState *s, uint64_t id)
{
    BDRVThinvmState *other;

    QTAILQ_FOREACH(other, &thinvm_nodes, link) {
        if (other->view && other->view->id == id &&
            qemu_uuid_is_equal(&other->uuid, &s->uuid)) {
            return other;
        }
    }
    return NULL;
}

/* Main loop: that is where nodes come and go */
static int thinvm_deletion_unseen(BDRVThinvmState *s, uint64_t id,
                                  Error **errp)
{
    BDRVThinvmState *viewer = thinvm_find_viewer(s, id);

    if (viewer) {
        error_setg(errp, "Snapshot %" PRIu64 " is being read: node '%s' "
                   "shows it", id, bdrv_get_device_or_node_name(viewer->bs));
        return -EBUSY;
    }
    return 0;
}

int thinvm_deletion_prepare(BlockDriverState *bs, const char *id,
                            const char *name, bool force, ThinvmDeletion *del,
                            Error **errp)
{
    ThinvmPrepare p = { .id = id, .name = name, .force = force, .del = del };
    int ret = thinvm_run(bs, thinvm_co_deletion_prepare, &p, errp);

    return ret < 0 ? ret : thinvm_deletion_unseen(bs->opaque, del->name.id,
                                                  errp);
}

static int coroutine_fn GRAPH_RDLOCK
thinvm_execute_on(BDRVThinvmState *s, ThinvmOpType type,
                  const ThinvmSnapshotName *name, uint64_t count,
                  Error **errp)
{
    ThinvmOp op = {
        .type = type,
        .guest = name->slot,
        .value = name->id,
        .count = count,
    };

    return thinvm_store_execute(s->store, &op, NULL, errp);
}

int coroutine_fn thinvm_deletion_hide(BDRVThinvmState *s,
                                      const ThinvmDeletion *del, Error **errp)
{
    return thinvm_execute_on(s, THINVM_OP_SNAPSHOT_DELETE_STEP, &del->name, 0,
                             errp);
}

int coroutine_fn thinvm_deletion_mark(BlockDriverState *bs,
                                      const ThinvmDeletion *del, bool force,
                                      Error **errp)
{
    BDRVThinvmState *s = bs->opaque;
    int ret = thinvm_mode_begin_change(bs, errp);

    /* A job may have waited since it was prepared */
    if (ret >= 0 && qemu_in_main_thread()) {
        ret = thinvm_deletion_unseen(s, del->name.id, errp);
    }
    if (ret < 0) {
        return ret;
    }
    if (force) {
        ret = thinvm_execute_on(s, THINVM_OP_SNAPSHOT_PROTECT, &del->name, 0,
                                errp);
    }
    if (ret >= 0) {
        ret = thinvm_deletion_hide(s, del, errp);
    }
    if (ret >= 0) {
        ret = thinvm_snapshot_settle(s, "The snapshot is deleted", errp);
        if (ret < 0) {
            /* Nobody can delete it once more */
            thinvm_worker_collect_soon(s);
        }
    }
    trace_thinvm_snapshot_delete(bs, del->name.id, ret);
    return ret;
}

/* How far has it come? */
static int coroutine_fn GRAPH_RDLOCK
thinvm_deletion_look(BDRVThinvmState *s, ThinvmDeletion *del,
                     ThinvmSnapshot *snap, Error **errp)
{
    ThinvmState *state = thinvm_store_state(s->store);
    uint64_t position = del->end;
    int ret = thinvm_store_read_snapshot(s->store, del->name.slot, snap, errp);

    if (ret == -ENOENT || (ret == 0 && snap->id != del->name.id)) {
        del->gone = true;
        del->position = del->end;
        return 0;
    }
    if (ret < 0) {
        return ret;
    }
    if (snap->root.type == THINVM_PTR_PAGE) {
        thinvm_state_lock(state);
        position = thinvm_map_first_used(state, &snap->root);
        thinvm_state_unlock(state);
    }
    del->position = MAX(del->position, MIN(position, del->end));
    return 0;
}

int coroutine_fn thinvm_deletion_step(BlockDriverState *bs,
                                      ThinvmDeletion *del, Error **errp)
{
    BDRVThinvmState *s = bs->opaque;
    ThinvmSnapshot snap;
    int ret;

    ret = thinvm_deletion_look(s, del, &snap, errp);
    if (ret < 0 || del->gone) {
        return ret;
    }
    if ((snap.flags & THINVM_SNAPSHOT_HIDDEN) == THINVM_SNAPSHOT_DELETED &&
        !thinvm_snapshot_has_tree(&snap)) {
        if (del->tried) {
            del->waits = true;      /* a step made no difference */
            return 0;
        }
        del->tried = true;
    }
    ret = thinvm_execute_on(s, THINVM_OP_SNAPSHOT_DELETE_STEP, &del->name, 0,
                            errp);
    return ret < 0 ? ret : thinvm_deletion_look(s, del, &snap, errp);
}

/* ------------------------------------------------------------------ */
/* All that is left to do                                              */

/* Find the next hidden record; -ENOENT: none from c->slot on */
static int coroutine_fn GRAPH_RDLOCK
thinvm_collect_find(BDRVThinvmState *s, ThinvmCollect *c, Error **errp)
{
    uint32_t nb = thinvm_nb_slots(s);
    ThinvmSnapshot snap;

    for (unsigned i = 0; i < THINVM_SCAN_SLOTS && c->slot < nb; i++) {
        uint32_t slot = c->slot++;
        int ret = thinvm_store_read_snapshot(s->store, slot, &snap, errp);

        if (ret == 0 && (snap.flags & THINVM_SNAPSHOT_HIDDEN)) {
            c->del = (ThinvmDeletion) {
                .name = { .slot = slot, .id = snap.id },
            };
            c->active = true;
            return 0;
        }
        if (ret < 0 && ret != -ENOENT) {
            return ret;
        }
    }
    return c->slot < nb ? 0 : -ENOENT;
}

int coroutine_fn thinvm_collect_step(BlockDriverState *bs, ThinvmCollect *c,
                                     bool *done, Error **errp)
{
    int ret;

    *done = false;
    if (c->active) {
        ret = thinvm_deletion_step(bs, &c->del, errp);
        c->again |= c->del.gone;
        if (ret < 0 || c->del.gone || c->del.waits) {
            trace_thinvm_snapshot_collect(bs, c->del.name.id, c->del.gone,
                                          ret);
            c->active = false;
        }
        if (ret < 0) {
            *c = (ThinvmCollect) { };   /* who tries again looks at it again */
        }
        return ret;
    }
    ret = thinvm_collect_find(bs->opaque, c, errp);
    if (ret == -ENOENT) {
        *done = !c->again;
        *c = (ThinvmCollect) { };
        return 0;
    }
    return ret;
}

/* Who changes the graph must not wait for one that sleeps */
static void coroutine_fn GRAPH_RDLOCK thinvm_pace(int64_t *since)
{
    if (thinvm_in_background &&
        qemu_clock_get_ns(QEMU_CLOCK_REALTIME) - *since > THINVM_PACE_NS) {
        bdrv_graph_co_rdunlock();
        qemu_co_sleep_ns(QEMU_CLOCK_REALTIME, THINVM_PACE_NS);
        bdrv_graph_co_rdlock();
        *since = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
    }
}

int coroutine_fn thinvm_snapshot_collect(BlockDriverState *bs,
                                         unsigned *budget, Error **errp)
{
    BDRVThinvmState *s = bs->opaque;
    int64_t since = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
    bool done = false;

    while (*budget) {
        int ret = thinvm_collect_step(bs, &s->collect, &done, errp);

        if (ret < 0 || done) {
            return ret;
        }
        (*budget)--;
        thinvm_pace(&since);
    }
    return 0;
}

int coroutine_fn thinvm_snapshot_clean_up(BlockDriverState *bs, Error **errp)
{
    BDRVThinvmState *s = bs->opaque;
    unsigned budget = UINT_MAX;
    int ret;

    if (thinvm_in_background) {
        thinvm_worker_collect_soon(s);
        return 0;
    }
    s->collect = (ThinvmCollect) { };
    ret = thinvm_snapshot_collect(bs, &budget, errp);
    return ret < 0 ? ret :
           thinvm_snapshot_settle(s, "Its space is free", errp);
}

/* ------------------------------------------------------------------ */
/* What users call                                                     */

static int coroutine_fn GRAPH_RDLOCK
thinvm_co_snapshot_delete(BlockDriverState *bs, void *opaque, Error **errp)
{
    int ret = thinvm_deletion_mark(bs, opaque, false, errp);

    return ret < 0 ? ret : thinvm_snapshot_clean_up(bs, errp);
}

int thinvm_snapshot_delete(BlockDriverState *bs, const char *snapshot_id,
                           const char *name, Error **errp)
{
    ThinvmDeletion del;
    int ret = thinvm_deletion_prepare(bs, snapshot_id, name, false, &del,
                                      errp);

    return ret < 0 ? ret : thinvm_run(bs, thinvm_co_snapshot_delete, &del,
                                      errp);
}

int coroutine_fn thinvm_snapshot_protect(BlockDriverState *bs, const char *id,
                                         const char *name, bool protect,
                                         Error **errp)
{
    BDRVThinvmState *s = bs->opaque;
    ThinvmSnapshotName at;
    ThinvmSnapshot snap;
    int ret = thinvm_mode_begin_change(bs, errp);

    if (ret < 0) {
        return ret;
    }
    ret = thinvm_require_snapshot(s, id, name, &snap, &at.slot, errp);
    if (ret < 0) {
        return ret;
    }
    at.id = snap.id;
    ret = thinvm_execute_on(s, THINVM_OP_SNAPSHOT_PROTECT, &at, protect, errp);
    if (ret >= 0) {
        ret = thinvm_snapshot_settle(s, protect ? "The snapshot is protected" :
                                     "The snapshot is not protected", errp);
    }
    trace_thinvm_snapshot_protect(bs, snap.id, protect, ret);
    return ret;
}
