/*
 * thinvm driver layer: internal snapshots
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The callbacks behind qemu-img snapshot, savevm, loadvm and the transaction
 * commands, but for deletion (snapshot-delete.c).  A snapshot is one operation
 * of the engine (snapshot.c there), whatever the size of the disk.  The disk
 * that is left by going back to a snapshot is freed as a deleted snapshot is.
 *
 * A node may show a snapshot instead of the disk: opened so (option
 * "snapshot"), or told so later (bdrv_snapshot_load_tmp).  It is read-only,
 * and while another node or process writes the image it follows the journal;
 * a read counts if the snapshot is still there afterwards (invariant 2).
 *
 * Callbacks run in the main loop, so there is one of them at a time.  The
 * worker's steps may come between theirs; a step names slot and id of its
 * record and fails if somebody else has finished with it.  Each callback's
 * work is durable before it is reported as done.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "block/snapshot.h"
#include "system/block-backend.h"
#include "driver-snapshot.h"
#include "trace.h"

/* ------------------------------------------------------------------ */
/* Finding                                                             */

uint32_t thinvm_nb_slots(BDRVThinvmState *s)
{
    ThinvmState *state = thinvm_store_state(s->store);
    uint32_t nb;

    thinvm_state_lock(state);
    nb = thinvm_snapshot_nb_slots(state);
    thinvm_state_unlock(state);
    return nb;
}

static uint64_t thinvm_next_id(BDRVThinvmState *s)
{
    ThinvmState *state = thinvm_store_state(s->store);
    uint64_t id;

    thinvm_state_lock(state);
    id = thinvm_snapshot_next_id(state);
    thinvm_state_unlock(state);
    return id;
}

void thinvm_id_str(const ThinvmSnapshot *snap, char *buf, size_t size)
{
    snprintf(buf, size, "%" PRIu64, snap->id);
}

/* Among those that are listed, or among those that are not */
static int coroutine_fn GRAPH_RDLOCK
thinvm_find(BDRVThinvmState *s, const char *id, const char *name, bool hidden,
            ThinvmSnapshot *snap, uint32_t *slot, Error **errp)
{
    uint32_t nb = thinvm_nb_slots(s);
    char id_str[32];
    int ret;

    for (*slot = 0; *slot < nb; (*slot)++) {
        ret = thinvm_store_read_snapshot(s->store, *slot, snap, errp);
        if (ret == -ENOENT) {
            continue;
        }
        if (ret < 0) {
            return ret;
        }
        thinvm_id_str(snap, id_str, sizeof(id_str));
        if (!(snap->flags & THINVM_SNAPSHOT_HIDDEN) == !hidden &&
            (!id || !strcmp(id, id_str)) &&
            (!name || !strcmp(name, snap->name))) {
            return 0;
        }
    }
    return -ENOENT;
}

int coroutine_fn GRAPH_RDLOCK
thinvm_find_snapshot(BDRVThinvmState *s, const char *id, const char *name,
                     ThinvmSnapshot *snap, uint32_t *slot, Error **errp)
{
    return thinvm_find(s, id, name, false, snap, slot, errp);
}

int coroutine_fn GRAPH_RDLOCK
thinvm_require_snapshot(BDRVThinvmState *s, const char *id, const char *name,
                        ThinvmSnapshot *snap, uint32_t *slot, Error **errp)
{
    int ret = thinvm_find_snapshot(s, id, name, snap, slot, errp);

    if (ret == -ENOENT) {
        bool hidden = thinvm_find(s, id, name, true, snap, slot, NULL) == 0;

        error_setg(errp, "There is no snapshot with %s '%s'%s",
                   id ? "id" : "name", id ?: name,
                   hidden ? " any more: it is being deleted" : "");
    }
    return ret;
}

static int coroutine_fn GRAPH_RDLOCK
thinvm_find_by_either(BDRVThinvmState *s, const char *id_or_name,
                      ThinvmSnapshot *snap, uint32_t *slot, Error **errp)
{
    int ret = thinvm_find_snapshot(s, id_or_name, NULL, snap, slot, errp);

    if (ret == -ENOENT) {
        ret = thinvm_find_snapshot(s, NULL, id_or_name, snap, slot, errp);
    }
    return ret;
}

int coroutine_fn GRAPH_RDLOCK
thinvm_snapshot_settle(BDRVThinvmState *s, const char *what, Error **errp)
{
    int ret = thinvm_store_commit(s->store, THINVM_COMMIT_DURABLE, true);

    if (ret < 0) {
        error_setg_errno(errp, -ret, "%s, which becomes durable when the "
                         "device works again; if this process ends before, it "
                         "may not have happened", what);
        thinvm_worker_arm(s);   /* it tries */
    }
    return ret;
}

typedef struct ThinvmSnapshotCo {
    QEMUSnapshotInfo *info;
    QEMUSnapshotInfo *list;
    int nb;
    const char *id, *name;
    ThinvmSnapshot snap;
} ThinvmSnapshotCo;

/* ------------------------------------------------------------------ */
/* Creating                                                            */

static bool thinvm_has_vmstate(BDRVThinvmState *s)
{
    ThinvmState *state = thinvm_store_state(s->store);
    ThinvmPointer map, vmstate, count, snapshot, backing;
    ThinvmInfoState info;

    thinvm_state_lock(state);
    thinvm_state_info(state, &info);
    thinvm_state_roots(state, &map, &vmstate, &count, &snapshot, &backing);
    thinvm_state_unlock(state);
    return info.vmstate_size || vmstate.type != THINVM_PTR_NONE;
}

/*
 * The active VM state goes into the snapshot.  It may be more than what was
 * saved for it: after going back to a snapshot that has VM state, that one's,
 * with which the disk has nothing to do any more.
 */
static int coroutine_fn GRAPH_RDLOCK
thinvm_cut_vmstate(BDRVThinvmState *s, uint64_t size, Error **errp)
{
    uint64_t first = DIV_ROUND_UP(size, s->cluster_size);
    ThinvmOp op = {
        .type = THINVM_OP_VMSTATE_SIZE,
        .value = size,
    };
    int ret;

    if (!thinvm_has_vmstate(s)) {
        return 0;
    }
    ret = thinvm_store_unmap(s->store, THINVM_TREE_VMSTATE, first,
                             THINVM_MAX_GUEST_CLUSTERS - first,
                             THINVM_SOURCE_BACKING, NULL, errp);
    return ret < 0 ? ret : thinvm_store_execute(s->store, &op, NULL, errp);
}

/* Who was told that there is no snapshot must not find one */
static void coroutine_fn GRAPH_RDLOCK
thinvm_take_back(BDRVThinvmState *s, const ThinvmSnapshot *snap, Error **errp)
{
    Error *local_err = NULL;
    ThinvmDeletion del = { .name.id = snap->id };
    ThinvmSnapshot found;
    char id[32];

    thinvm_id_str(snap, id, sizeof(id));
    if (thinvm_find_snapshot(s, id, NULL, &found, &del.name.slot,
                             &local_err) < 0 ||
        thinvm_deletion_hide(s, &del, &local_err) < 0) {
        error_prepend(errp, "Snapshot %s is there, but may not be durable: ",
                      id);
        error_free(local_err);
        return;
    }
    thinvm_worker_collect_soon(s);
    thinvm_worker_arm(s);
}

static int coroutine_fn GRAPH_RDLOCK
thinvm_co_snapshot_create(BlockDriverState *bs, void *opaque, Error **errp)
{
    ERRP_GUARD();
    BDRVThinvmState *s = bs->opaque;
    ThinvmSnapshotCo *c = opaque;
    ThinvmSnapshot snap = {
        .vmstate_size = c->info->vm_state_size,
        .date_sec = c->info->date_sec,
        .date_nsec = c->info->date_nsec,
        .vm_clock_nsec = c->info->vm_clock_nsec,
        .icount = c->info->icount,
    };
    ThinvmOp op = {
        .type = THINVM_OP_SNAPSHOT_CREATE,
        .snapshot = &snap,
    };
    int ret;

    ret = thinvm_mode_begin_change(bs, errp);
    if (ret < 0) {
        return ret;
    }
    ret = thinvm_cut_vmstate(s, snap.vmstate_size, errp);
    if (ret < 0) {
        return ret;
    }
    snap.id = thinvm_next_id(s);
    pstrcpy(snap.name, sizeof(snap.name), c->info->name);
    ret = thinvm_store_execute(s->store, &op, NULL, errp);
    if (ret >= 0) {
        ret = thinvm_store_commit(s->store, THINVM_COMMIT_DURABLE, true);
        if (ret < 0) {
            error_setg_errno(errp, -ret, "Cannot make it durable");
            thinvm_take_back(s, &snap, errp);
        }
    }
    trace_thinvm_snapshot_create(bs, snap.id, ret);
    if (ret >= 0) {
        thinvm_id_str(&snap, c->info->id_str, sizeof(c->info->id_str));
    }
    return ret;
}

/*
 * Nothing that is private becomes shared while requests are in flight: who
 * overwrites in place relies on it (inflight.h).  Most callers have drained
 * some node above this one, but not all, and others may use this one.
 */
int thinvm_snapshot_create(BlockDriverState *bs, QEMUSnapshotInfo *sn_info)
{
    ThinvmSnapshotCo c = {
        .info = sn_info,
    };
    Error *local_err = NULL;
    int ret;

    bdrv_drained_begin(bs);
    ret = thinvm_run(bs, thinvm_co_snapshot_create, &c, &local_err);
    bdrv_drained_end(bs);
    if (ret < 0) {
        /* The callback only has room for a number */
        error_reportf_err(local_err, "Snapshot '%s': ", sn_info->name);
    }
    return ret;
}

/* ------------------------------------------------------------------ */
/* Going back                                                          */

static int coroutine_fn GRAPH_RDLOCK
thinvm_co_snapshot_find(BlockDriverState *bs, void *opaque, Error **errp)
{
    ThinvmSnapshotCo *c = opaque;
    uint32_t slot;

    return thinvm_find_by_either(bs->opaque, c->id, &c->snap, &slot, errp);
}

static int coroutine_fn GRAPH_RDLOCK
thinvm_co_snapshot_goto(BlockDriverState *bs, void *opaque, Error **errp)
{
    BDRVThinvmState *s = bs->opaque;
    ThinvmSnapshotCo *c = opaque;
    ThinvmOp op = {
        .type = THINVM_OP_SNAPSHOT_GOTO,
    };
    uint32_t slot;
    int ret;

    ret = thinvm_mode_begin_change(bs, errp);
    if (ret < 0) {
        return ret;
    }
    ret = thinvm_find_by_either(s, c->id, &c->snap, &slot, errp);
    if (ret < 0) {
        return ret;
    }
    op.guest = slot;
    op.value = c->snap.id;
    op.physical = thinvm_next_id(s);
    ret = thinvm_store_execute(s->store, &op, NULL, errp);
    if (ret >= 0) {
        ret = thinvm_snapshot_settle(s, "The disk is back at it", errp);
    }
    trace_thinvm_snapshot_goto(bs, c->snap.id, ret);
    if (ret < 0) {
        return ret;
    }
    /* The disk that was left; if this fails, the next owner repeats it */
    thinvm_snapshot_clean_up(bs, NULL);
    return 0;
}

/*
 * The disk may get another size.  The block layer and the node's users learn
 * that by a truncation, which finds nothing left to do.  The permission is
 * asked for first: later would be too late to refuse.
 */
int GRAPH_UNLOCKED thinvm_snapshot_goto(BlockDriverState *bs,
                                        const char *snapshot_id)
{
    ThinvmSnapshotCo c = {
        .id = snapshot_id,
    };
    BlockBackend *blk = NULL;
    Error *local_err = NULL;
    int ret;

    bdrv_drained_begin(bs);
    ret = thinvm_run(bs, thinvm_co_snapshot_find, &c, &local_err);
    if (ret < 0) {
        goto out;
    }
    if (c.snap.virtual_size != bs->total_sectors * BDRV_SECTOR_SIZE) {
        blk = blk_new_with_bs(bs, BLK_PERM_RESIZE, BLK_PERM_ALL, &local_err);
        if (!blk) {
            ret = -EPERM;
            goto out;
        }
    }
    ret = thinvm_run(bs, thinvm_co_snapshot_goto, &c, &local_err);
    if (ret >= 0 && blk) {
        ret = blk_truncate(blk, c.snap.virtual_size, true, PREALLOC_MODE_OFF,
                           0, &local_err);
    }
out:
    blk_unref(blk);
    bdrv_drained_end(bs);
    if (local_err) {
        error_reportf_err(local_err, "Snapshot '%s': ", snapshot_id);
    }
    return ret;
}

/* ------------------------------------------------------------------ */
/* Listing, looking                                                    */

static void thinvm_snapshot_fill(QEMUSnapshotInfo *info,
                                 const ThinvmSnapshot *snap)
{
    *info = (QEMUSnapshotInfo) {
        .vm_state_size = snap->vmstate_size,
        .date_sec = snap->date_sec,
        .date_nsec = snap->date_nsec,
        .vm_clock_nsec = snap->vm_clock_nsec,
        .icount = snap->icount,
    };
    thinvm_id_str(snap, info->id_str, sizeof(info->id_str));
    pstrcpy(info->name, sizeof(info->name), snap->name);
}

/* An image may have 65,000 of them */
static int thinvm_snapshot_append(ThinvmSnapshotCo *c,
                                  const ThinvmSnapshot *snap, Error **errp)
{
    QEMUSnapshotInfo *list = g_try_renew(QEMUSnapshotInfo, c->list, c->nb + 1);

    if (!list) {
        error_setg(errp, "Not enough memory for a list of more than %d "
                   "snapshots", c->nb);
        return -ENOMEM;
    }
    c->list = list;
    thinvm_snapshot_fill(&list[c->nb++], snap);
    return 0;
}

static int coroutine_fn GRAPH_RDLOCK
thinvm_co_snapshot_list(BlockDriverState *bs, void *opaque, Error **errp)
{
    BDRVThinvmState *s = bs->opaque;
    ThinvmSnapshotCo *c = opaque;
    ThinvmSnapshot snap;
    uint32_t slot;
    int ret;

    for (slot = 0; slot < thinvm_nb_slots(s); slot++) {
        ret = thinvm_store_read_snapshot(s->store, slot, &snap, errp);
        if (ret == -ENOENT) {
            continue;
        }
        if (ret == 0 && !(snap.flags & THINVM_SNAPSHOT_HIDDEN)) {
            ret = thinvm_snapshot_append(c, &snap, errp);
        }
        if (ret < 0) {
            return ret;
        }
    }
    return 0;
}

/* Slots are used again, so their order says nothing; ids are not */
static int thinvm_compare_age(const void *a, const void *b)
{
    const QEMUSnapshotInfo *ia = a, *ib = b;
    uint64_t id_a = g_ascii_strtoull(ia->id_str, NULL, 10);
    uint64_t id_b = g_ascii_strtoull(ib->id_str, NULL, 10);

    return id_a < id_b ? -1 : id_a > id_b;
}

int thinvm_snapshot_list(BlockDriverState *bs, QEMUSnapshotInfo **psn_tab)
{
    ThinvmSnapshotCo c = { };
    Error *local_err = NULL;
    int ret = thinvm_run(bs, thinvm_co_snapshot_list, &c, &local_err);

    if (ret < 0) {
        error_report_err(local_err);
        g_free(c.list);
        return ret;
    }
    if (c.nb) {
        qsort(c.list, c.nb, sizeof(*c.list), thinvm_compare_age);
    }
    *psn_tab = c.list;
    return c.nb;
}

static int coroutine_fn GRAPH_RDLOCK
thinvm_co_snapshot_load(BlockDriverState *bs, void *opaque, Error **errp)
{
    BDRVThinvmState *s = bs->opaque;
    ThinvmSnapshotCo *c = opaque;
    uint32_t slot;
    int ret;

    ret = thinvm_require_snapshot(s, c->id, c->name, &c->snap, &slot, errp);
    if (ret < 0) {
        return ret;
    }
    g_free(s->view);
    s->view = g_memdup2(&c->snap, sizeof(c->snap));
    s->view_name = (ThinvmSnapshotName) { .slot = slot, .id = c->snap.id };
    bs->total_sectors = s->view->virtual_size / BDRV_SECTOR_SIZE;
    return 0;
}

int coroutine_mixed_fn
thinvm_snapshot_load_tmp(BlockDriverState *bs, const char *snapshot_id,
                         const char *name, Error **errp)
{
    ThinvmSnapshotCo c = {
        .id = snapshot_id,
        .name = name,
    };

    return thinvm_run(bs, thinvm_co_snapshot_load, &c, errp);
}

/* What was read of it is right if it is still there now */
int coroutine_fn thinvm_snapshot_still_there(BlockDriverState *bs,
                                             ThinvmStore *st)
{
    BDRVThinvmState *s = bs->opaque;
    int ret = thinvm_store_have_snapshot(st, &s->view_name);

    if (ret == -ENOENT) {
        if (!qatomic_xchg(&s->view_gone, true)) {
            error_report("thinvm node '%s': snapshot %" PRIu64 " '%s' was "
                         "deleted while it was being read",
                         bdrv_get_device_or_node_name(bs), s->view->id,
                         s->view->name);
        }
        ret = -EIO;
    }
    return ret;
}
