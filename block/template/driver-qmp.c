/*
 * thinvm template store: QMP commands of the driver thinvm-template
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Linked into the programs that have a monitor.  Main loop.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qapi/qapi-commands-thinvm.h"
#include "driver.h"

static BDRVTemplateState *template_find(const char *node_name, Error **errp)
{
    BDRVTemplateState *s;

    QTAILQ_FOREACH(s, &template_nodes, link) {
        if (!strcmp(bdrv_get_node_name(s->bs), node_name)) {
            return s;
        }
    }
    error_setg(errp, "There is no thinvm-template node '%s'", node_name);
    return NULL;
}

ThinvmTemplateInfoList *qmp_query_thinvm_template(const char *node_name,
                                                  Error **errp)
{
    ThinvmTemplateInfoList *list = NULL, **tail = &list;
    BDRVTemplateState *s;

    if (node_name) {
        s = template_find(node_name, errp);
        if (s) {
            QAPI_LIST_APPEND(tail, template_reader_info(s->reader));
        }
        return list;
    }
    QTAILQ_FOREACH(s, &template_nodes, link) {
        QAPI_LIST_APPEND(tail, template_reader_info(s->reader));
    }
    return list;
}

void qmp_thinvm_template_bring_over(const char *node_name, bool has_speed,
                                    uint64_t speed, bool has_stop, bool stop,
                                    Error **errp)
{
    BDRVTemplateState *s = template_find(node_name, errp);

    if (s) {
        template_reader_bring_over(s->reader, has_speed, speed,
                                   has_stop && stop, errp);
    }
}
