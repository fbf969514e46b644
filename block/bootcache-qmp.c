/*
 * thinvm boot cache: QMP commands
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Linked into the programs that have a monitor.  Main loop.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qapi/qapi-commands-thinvm.h"
#include "bootcache.h"

static BDRVBootcacheState *bootcache_find(const char *node_name, Error **errp)
{
    BDRVBootcacheState *s;

    QTAILQ_FOREACH(s, &bootcache_nodes, link) {
        if (!strcmp(bdrv_get_node_name(s->bs), node_name)) {
            return s;
        }
    }
    error_setg(errp, "There is no bootcache node '%s'", node_name);
    return NULL;
}

static ThinvmBootcacheInfo *bootcache_describe(BDRVBootcacheState *s)
{
    ThinvmBootcacheInfo *info = g_new0(ThinvmBootcacheInfo, 1);

    *info = (ThinvmBootcacheInfo) {
        .node_name = g_strdup(bdrv_get_node_name(s->bs)),
        .role = s->options.role,
        .socket = g_strdup(s->options.socket),
        .identity = bootcache_identity_str(&s->identity),
    };
    if (s->publisher) {
        info->publisher = bootcache_publisher_info(s->publisher);
    }
    if (s->client) {
        info->has_connected = true;
        info->connected = bootcache_client_connected(s->client);
        info->problem = bootcache_client_problem(s->client);
        info->statistics = bootcache_statistics(s);
        info->has_boot_end = bootcache_client_boot_end(s->client,
                                                       &info->boot_end);
    }
    return info;
}

ThinvmBootcacheInfoList *qmp_query_thinvm_bootcache(const char *node_name,
                                                    Error **errp)
{
    ThinvmBootcacheInfoList *list = NULL, **tail = &list;
    BDRVBootcacheState *s;

    if (node_name) {
        s = bootcache_find(node_name, errp);
        if (s) {
            QAPI_LIST_APPEND(tail, bootcache_describe(s));
        }
        return list;
    }
    QTAILQ_FOREACH(s, &bootcache_nodes, link) {
        QAPI_LIST_APPEND(tail, bootcache_describe(s));
    }
    return list;
}

void qmp_thinvm_bootcache_seal(const char *node_name, Error **errp)
{
    BDRVBootcacheState *s = bootcache_find(node_name, errp);

    if (!s) {
        return;
    }
    if (!s->publisher) {
        error_setg(errp, "Node '%s' is a reader; its publisher seals the "
                   "recording", node_name);
        return;
    }
    bootcache_publisher_seal(s->publisher, "command");
}
