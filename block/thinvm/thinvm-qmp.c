/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * QMP commands of thinvm.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qapi/qapi-commands-thinvm.h"

ThinvmInfoList *qmp_query_thinvm(const char *node_name, Error **errp)
{
    if (node_name) {
        error_setg(errp, "Node '%s' is not a thinvm node", node_name);
    }
    return NULL;
}

void qmp_thinvm_set_cache_mode(const char *node_name, ThinvmCacheMode mode,
                               Error **errp)
{
    error_setg(errp, "Node '%s' is not a thinvm node", node_name);
}
