/*
 * thinvm driver layer: QMP commands
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Linked into the programs that have a monitor (qemu-system and
 * qemu-storage-daemon).  Runs in the main loop.  By being there it tells the
 * driver that the program goes on after a command, so that long work is for
 * the background.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qapi/qapi-commands-thinvm.h"
#include "qemu/job.h"
#include "qemu/module.h"
#include "driver-snapshot.h"

static BDRVThinvmState *thinvm_find(const char *node_name, Error **errp)
{
    BDRVThinvmState *s;

    QTAILQ_FOREACH(s, &thinvm_nodes, link) {
        if (!strcmp(bdrv_get_node_name(s->bs), node_name)) {
            return s;
        }
    }
    if (bdrv_find_node(node_name)) {
        error_setg(errp, "Node '%s' is not a thinvm node", node_name);
    } else {
        error_setg(errp, "There is no node '%s'", node_name);
    }
    return NULL;
}

ThinvmInfoList *qmp_query_thinvm(const char *node_name, bool has_snapshot_tree,
                                 bool snapshot_tree, Error **errp)
{
    ThinvmInfoList *list = NULL, **tail = &list;
    BDRVThinvmState *s;

    if (node_name && !thinvm_find(node_name, errp)) {
        return NULL;
    }
    QTAILQ_FOREACH(s, &thinvm_nodes, link) {
        ThinvmInfo *info;

        if (node_name && strcmp(bdrv_get_node_name(s->bs), node_name)) {
            continue;
        }
        info = thinvm_info(s);
        info->node_name = g_strdup(bdrv_get_node_name(s->bs));
        QAPI_LIST_APPEND(tail, info);
        if (snapshot_tree &&
            !thinvm_snapshot_tree(s->bs, THINVM_TREE_BUDGET,
                                  &info->snapshot_tree, errp)) {
            qapi_free_ThinvmInfoList(list);
            return NULL;
        }
        info->has_snapshot_tree = snapshot_tree;
    }
    return list;
}

static int coroutine_fn GRAPH_RDLOCK
thinvm_co_set_mode(BlockDriverState *bs, void *opaque, Error **errp)
{
    ThinvmCacheMode *mode = opaque;

    return thinvm_mode_configure(bs, *mode, "thinvm-set-cache-mode", errp);
}

void qmp_thinvm_set_cache_mode(const char *node_name, ThinvmCacheMode mode,
                               Error **errp)
{
    BDRVThinvmState *s = thinvm_find(node_name, errp);

    if (!s) {
        return;
    }
    if (bdrv_is_read_only(s->bs)) {
        error_setg(errp, "Node '%s' is read-only; the mapping-cache mode is "
                   "for nodes that write", node_name);
        return;
    }
    if (qatomic_read(&s->lost)) {
        error_setg(errp, "Node '%s' has lost ownership of its image",
                   node_name);
        return;
    }
    /* Writes must not race with the release that migration mode means */
    bdrv_drained_begin(s->bs);
    thinvm_run(s->bs, thinvm_co_set_mode, &mode, errp);
    bdrv_drained_end(s->bs);
}

/* ------------------------------------------------------------------ */
/* Snapshots                                                           */

/* The node, if it is one that can change its snapshots */
static BlockDriverState *thinvm_find_writer(const char *node_name,
                                            const char *id, const char *name,
                                            Error **errp)
{
    BDRVThinvmState *s = thinvm_find(node_name, errp);

    if (!s) {
        return NULL;
    }
    if (!id && !name) {
        error_setg(errp, "Name or id of the snapshot must be given");
        return NULL;
    }
    if (bdrv_is_read_only(s->bs) ||
        (s->bs->open_flags & BDRV_O_INACTIVE)) {
        error_setg(errp, "Node '%s' is %s", node_name,
                   bdrv_is_read_only(s->bs) ? "read-only" : "inactive");
        return NULL;
    }
    return s->bs;
}

void qmp_thinvm_snapshot_delete(const char *job_id, const char *node_name,
                                const char *id, const char *name,
                                bool has_force, bool force, bool has_speed,
                                int64_t speed, bool has_auto_finalize,
                                bool auto_finalize, bool has_auto_dismiss,
                                bool auto_dismiss, Error **errp)
{
    BlockDriverState *bs = thinvm_find_writer(node_name, id, name, errp);
    int flags = JOB_DEFAULT;

    if (!bs) {
        return;
    }
    if (has_auto_finalize && !auto_finalize) {
        flags |= JOB_MANUAL_FINALIZE;
    }
    if (has_auto_dismiss && !auto_dismiss) {
        flags |= JOB_MANUAL_DISMISS;
    }
    thinvm_snapshot_delete_job(bs, job_id, id, name, force, speed, flags,
                               errp);
}

typedef struct ThinvmProtect {
    const char *id, *name;
    bool protect;
} ThinvmProtect;

static int coroutine_fn GRAPH_RDLOCK
thinvm_co_protect(BlockDriverState *bs, void *opaque, Error **errp)
{
    ThinvmProtect *p = opaque;

    return thinvm_snapshot_protect(bs, p->id, p->name, p->protect, errp);
}

void qmp_thinvm_snapshot_protect(const char *node_name, const char *id,
                                 const char *name, bool protect, Error **errp)
{
    BlockDriverState *bs = thinvm_find_writer(node_name, id, name, errp);
    ThinvmProtect p = { .id = id, .name = name, .protect = protect };

    if (bs) {
        thinvm_run(bs, thinvm_co_protect, &p, errp);
    }
}

static void thinvm_qmp_init(void)
{
    thinvm_in_background = true;
}

block_init(thinvm_qmp_init);

ThinvmInfo *qmp_thinvm_grow(const char *node_name, bool has_size,
                            uint64_t size, Error **errp)
{
    BDRVThinvmState *s = thinvm_find(node_name, errp);
    ThinvmInfo *info;

    if (!s) {
        return NULL;
    }
    if (!qatomic_read(&s->owner)) {
        error_setg(errp, "Node '%s' does not own its image; thinvm-grow is "
                   "for the node that writes it", node_name);
        return NULL;
    }
    if (thinvm_volume_grow(s->bs, has_size ? size : 0, errp) < 0) {
        return NULL;
    }
    info = thinvm_info(s);
    info->node_name = g_strdup(node_name);
    return info;
}
