/*
 * thinvm driver layer: QMP commands
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Linked into the programs that have a monitor (qemu-system and
 * qemu-storage-daemon).  Runs in the main loop.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qapi/qapi-commands-thinvm.h"
#include "thinvm.h"

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

ThinvmInfoList *qmp_query_thinvm(const char *node_name, Error **errp)
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
