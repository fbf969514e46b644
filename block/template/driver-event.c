/*
 * thinvm template store: events of the driver thinvm-template
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Threads of a reader have no event loop; the main loop emits what they tell.
 */

#include "qemu/osdep.h"
#include "qapi/qapi-events-thinvm.h"
#include "block/aio.h"
#include "qemu/main-loop.h"
#include "reader.h"

typedef struct Told {
    char *node_name, *place, *reason;
    uint64_t offset, bytes;
} Told;

static void told_free(Told *t)
{
    g_free(t->node_name);
    g_free(t->place);
    g_free(t->reason);
    g_free(t);
}

static void emit_source(void *opaque)
{
    Told *t = opaque;

    qapi_event_send_thinvm_template_source(t->node_name, t->place, t->reason);
    told_free(t);
}

void reader_event_source(TemplateReader *r, const char *source,
                         const char *reason)
{
    Told *t = g_new0(Told, 1);

    t->node_name = g_strdup(r->node_name);
    t->place = g_strdup(source);
    t->reason = g_strdup(reason);
    aio_bh_schedule_oneshot(qemu_get_aio_context(), emit_source, t);
}

static void emit_damaged(void *opaque)
{
    Told *t = opaque;

    qapi_event_send_thinvm_template_damaged(t->node_name, t->place, t->offset,
                                            t->bytes);
    told_free(t);
}

void reader_event_damaged(TemplateReader *r, const char *place,
                          uint64_t offset, uint64_t bytes)
{
    Told *t = g_new0(Told, 1);

    t->node_name = g_strdup(r->node_name);
    t->place = g_strdup(place);
    t->offset = offset;
    t->bytes = bytes;
    aio_bh_schedule_oneshot(qemu_get_aio_context(), emit_damaged, t);
}
