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
#include "qemu/module.h"
#include "driver-snapshot.h"
#include "job.h"

/*
 * What is done with a node waits in the event loop, and meanwhile another may
 * close it: the caller gets a reference.
 */
static BlockDriverState *thinvm_find(const char *node_name, Error **errp)
{
    BDRVThinvmState *s;

    QTAILQ_FOREACH(s, &thinvm_nodes, link) {
        if (!strcmp(bdrv_get_node_name(s->bs), node_name)) {
            bdrv_ref(s->bs);
            return s->bs;
        }
    }
    if (bdrv_find_node(node_name)) {
        error_setg(errp, "Node '%s' is not a thinvm node", node_name);
    } else {
        error_setg(errp, "There is no node '%s'", node_name);
    }
    return NULL;
}

/* All nodes, each with a reference */
static GSList *thinvm_find_all(void)
{
    GSList *list = NULL;
    BDRVThinvmState *s;

    QTAILQ_FOREACH(s, &thinvm_nodes, link) {
        bdrv_ref(s->bs);
        list = g_slist_prepend(list, s->bs);
    }
    return g_slist_reverse(list);
}

static ThinvmInfo *thinvm_describe(BlockDriverState *bs, bool snapshot_tree,
                                   Error **errp)
{
    ThinvmInfo *info = thinvm_info(bs->opaque);

    info->node_name = g_strdup(bdrv_get_node_name(bs));
    info->has_high_water_mark =
        thinvm_volume_high_water(bs, &info->high_water_mark);
    if (snapshot_tree &&
        !thinvm_snapshot_tree(bs, THINVM_TREE_BUDGET, &info->snapshot_tree,
                              errp)) {
        qapi_free_ThinvmInfo(info);
        return NULL;
    }
    info->has_snapshot_tree = snapshot_tree;
    return info;
}

ThinvmInfoList *qmp_query_thinvm(const char *node_name, bool has_snapshot_tree,
                                 bool snapshot_tree, Error **errp)
{
    ThinvmInfoList *list = NULL, **tail = &list;
    GSList *nodes;

    if (node_name) {
        BlockDriverState *bs = thinvm_find(node_name, errp);

        if (!bs) {
            return NULL;
        }
        nodes = g_slist_prepend(NULL, bs);
    } else {
        nodes = thinvm_find_all();
    }
    for (GSList *l = nodes; l; l = l->next) {
        ThinvmInfo *info = thinvm_describe(l->data, snapshot_tree, errp);

        if (!info) {
            qapi_free_ThinvmInfoList(list);
            list = NULL;
            break;
        }
        QAPI_LIST_APPEND(tail, info);
    }
    g_slist_free_full(nodes, (GDestroyNotify)bdrv_unref);
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
    BlockDriverState *bs = thinvm_find(node_name, errp);
    BDRVThinvmState *s;

    if (!bs) {
        return;
    }
    s = bs->opaque;
    if (bdrv_is_read_only(bs)) {
        error_setg(errp, "Node '%s' is read-only; the mapping-cache mode is "
                   "for nodes that write", node_name);
    } else if (qatomic_read(&s->lost)) {
        error_setg(errp, "Node '%s' has lost ownership of its image",
                   node_name);
    } else {
        /* Writes must not race with the release that migration mode means */
        bdrv_drained_begin(bs);
        thinvm_run(bs, thinvm_co_set_mode, &mode, errp);
        bdrv_drained_end(bs);
    }
    bdrv_unref(bs);
}

/* ------------------------------------------------------------------ */
/* Snapshots                                                           */

/* The node, with a reference, if it is one that can change its snapshots */
static BlockDriverState *thinvm_find_writer(const char *node_name,
                                            const char *id, const char *name,
                                            Error **errp)
{
    BlockDriverState *bs = thinvm_find(node_name, errp);

    if (!bs) {
        return NULL;
    }
    if (!id && !name) {
        error_setg(errp, "Name or id of the snapshot must be given");
    } else if (bdrv_is_read_only(bs) || (bs->open_flags & BDRV_O_INACTIVE)) {
        error_setg(errp, "Node '%s' is %s", node_name,
                   bdrv_is_read_only(bs) ? "read-only" : "inactive");
    } else {
        return bs;
    }
    bdrv_unref(bs);
    return NULL;
}

void qmp_thinvm_snapshot_delete(const char *job_id, const char *node_name,
                                const char *id, const char *name,
                                bool has_force, bool force, bool has_speed,
                                int64_t speed, bool has_auto_finalize,
                                bool auto_finalize, bool has_auto_dismiss,
                                bool auto_dismiss, Error **errp)
{
    BlockDriverState *bs = thinvm_find_writer(node_name, id, name, errp);
    int flags = thinvm_job_flags(has_auto_finalize, auto_finalize,
                                 has_auto_dismiss, auto_dismiss);

    if (!bs) {
        return;
    }
    thinvm_snapshot_delete_job(bs, job_id, id, name, force, speed, flags,
                               errp);
    bdrv_unref(bs);
}

/* The node, with a reference, if it is one that may change its image */
static BlockDriverState *thinvm_find_owner(const char *node_name,
                                           const char *command, Error **errp)
{
    BlockDriverState *bs = thinvm_find(node_name, errp);
    BDRVThinvmState *s;

    if (!bs) {
        return NULL;
    }
    s = bs->opaque;
    if (bdrv_is_read_only(bs) || (bs->open_flags & BDRV_O_INACTIVE)) {
        error_setg(errp, "Node '%s' is %s; %s is for the node that writes the "
                   "image", node_name, bdrv_is_read_only(bs) ? "read-only" :
                   "inactive", command);
    } else if (qatomic_read(&s->lost)) {
        error_setg(errp, "Node '%s' has lost ownership of its image",
                   node_name);
    } else {
        return bs;
    }
    bdrv_unref(bs);
    return NULL;
}

void qmp_thinvm_compact(const char *job_id, const char *node_name,
                        bool has_speed, int64_t speed,
                        bool has_auto_finalize, bool auto_finalize,
                        bool has_auto_dismiss, bool auto_dismiss,
                        Error **errp)
{
    BlockDriverState *bs = thinvm_find_owner(node_name, "thinvm-compact",
                                             errp);
    int flags = thinvm_job_flags(has_auto_finalize, auto_finalize,
                                 has_auto_dismiss, auto_dismiss);

    if (!bs) {
        return;
    }
    thinvm_compact_job(bs, job_id, speed, flags, errp);
    bdrv_unref(bs);
}

ThinvmInfo *qmp_thinvm_shrink(const char *node_name, bool has_size,
                              uint64_t size, Error **errp)
{
    BlockDriverState *bs = thinvm_find_owner(node_name, "thinvm-shrink",
                                             errp);
    ThinvmInfo *info = NULL;

    if (!bs) {
        return NULL;
    }
    if (has_size && !size) {
        error_setg(errp, "A size of 0 is not possible; without a size the "
                   "image shrinks as far as it can");
    } else if (thinvm_volume_shrink(bs, has_size ? size : 0, errp) >= 0) {
        info = thinvm_describe(bs, false, errp);
    }
    bdrv_unref(bs);
    return info;
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
        bdrv_unref(bs);
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
    BlockDriverState *bs = thinvm_find(node_name, errp);
    BDRVThinvmState *s;
    ThinvmInfo *info = NULL;

    if (!bs) {
        return NULL;
    }
    s = bs->opaque;
    if (!qatomic_read(&s->owner)) {
        error_setg(errp, "Node '%s' does not own its image; thinvm-grow is "
                   "for the node that writes it", node_name);
    } else if (thinvm_volume_grow(bs, has_size ? size : 0, errp) >= 0) {
        info = thinvm_describe(bs, false, errp);
    }
    bdrv_unref(bs);
    return info;
}
