/*
 * thinvm template store: finds copies that come back, or come nearer
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See reader.h.  A thread beside the requests.  It notices a copy that has
 * come to a disk of this node; has a connection to the node that is read
 * from, by which that one knows that its copy is in use (R3) and which shows,
 * also while nobody reads, that it is alive; and tries copies that failed, by
 * a chunk that it compares, so that requests meet only nodes that work.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/error-report.h"
#include "qemu/memalign.h"
#include "qemu/timer.h"
#include "reader.h"

#define TICK_MS             1000
#define TICK_PROBE_MS       50
/* Between two requests that only show that the node is alive */
#define PING_MS             5000
#define PING_BYTES          512
/* Between two looks for a copy on this node */
#define LOOK_MS             1000
#define PROBES_MAX          16

typedef struct Keeper {
    TemplateReader *r;
    ReaderLink link;
    int64_t pinged, looked;
} Keeper;

static int64_t now_ms(void)
{
    return qemu_clock_get_ms(QEMU_CLOCK_REALTIME);
}

/* ------------------------------------------------------------------ */
/* A copy on this node                                                 */

static void look_for_local(TemplateReader *r)
{
    LocalCopy *old = reader_local(r);

    if (!old || local_copy_replaced(old)) {
        /* One that is not right was told of when the node was opened */
        reader_take_local(r, old ? "it was put in place of another file"
                                 : "it is on this node", NULL);
    }
    local_copy_unref(old);
}

/* ------------------------------------------------------------------ */
/* The node that is read from                                          */

static bool ping(Keeper *k, Error **errp)
{
    g_autofree uint8_t *buf = g_malloc(LINK_ALIGNMENT);
    LinkPatience patience = reader_patience(k->r);

    if (now_ms() < k->pinged + PING_MS) {
        return true;
    }
    k->pinged = now_ms();
    return link_read(k->link.link, 0, MIN(PING_BYTES, k->r->chunks->length),
                     buf, &patience, errp);
}

static void keep_connection(Keeper *k)
{
    TemplateReader *r = k->r;
    Error *err = NULL;
    Replica *p;

    WITH_QEMU_LOCK_GUARD(&r->lock) {
        p = r->current;
    }
    if (!p || p->local) {
        reader_disconnect(&k->link);
        return;
    }
    if (reader_connect(r, &k->link, p, &err) && ping(k, &err)) {
        return;
    }
    reader_disconnect(&k->link);
    WITH_QEMU_LOCK_GUARD(&r->lock) {
        if (!r->stopping && p->usable) {
            replica_set_problem(r, p, error_get_pretty(err), 0);
        }
    }
    error_free(err);
}

/* ------------------------------------------------------------------ */
/* Copies that failed                                                  */

/* With the lock */
static bool is_due(TemplateReader *r, Replica *p)
{
    int64_t at = r->waiting ? MIN(p->retry_at, p->tried_at + TICK_MS)
                            : p->retry_at;

    return !p->usable && !p->probe && now_ms() >= at;
}

static void probe_start(TemplateReader *r, Replica *p)
{
    g_autofree char *name = reader_export_name(r, "");
    uint64_t n = p->probe_chunk;

    p->probing_chunk = n;
    p->probe = link_task_start(p->node, name, n * r->chunks->chunk_size,
                               template_chunk_bytes(r->chunks, n),
                               r->o.timeout_ms);
    p->probe_end = now_ms() + 2 * (int64_t)r->o.timeout_ms;
}

/* It has ended, or ought to have */
static void probe_finish(TemplateReader *r, Replica *p)
{
    uint8_t *buf = NULL;
    Error *err = NULL;
    Link *link = link_task_finish(g_steal_pointer(&p->probe), &buf, &err);

    if (link && reader_link_check(r, link, &err) &&
        !reader_is_right(r, p->probing_chunk, buf)) {
        error_setg(&err, "what it sends is wrong");
    }
    link_free(link);
    qemu_vfree(buf);
    QEMU_LOCK_GUARD(&r->lock);
    if (err) {
        replica_set_problem(r, p, error_get_pretty(err), p->probing_chunk);
        error_free(err);
    } else {
        replica_set_usable(r, p, "it can be read again");
    }
}

/*
 * Those that are nearer than the one that is read from; all if there is none,
 * or none that has a chunk right which somebody waits for.
 */
static void start_probes(TemplateReader *r)
{
    QEMU_LOCK_GUARD(&r->lock);
    for (unsigned i = 1, n = 0; i < r->replicas->len && n < PROBES_MAX; i++) {
        Replica *p = g_ptr_array_index(r->replicas, i);

        if (!r->waiting && r->current &&
            (p == r->current || r->current->local)) {
            return;
        }
        n += p->probe != NULL;
        if (is_due(r, p)) {
            probe_start(r, p);
            n++;
        }
    }
}

/* Is any still under way? */
static bool finish_probes(TemplateReader *r, bool all)
{
    bool any = false;

    for (unsigned i = 1; i < r->replicas->len; i++) {
        Replica *p = g_ptr_array_index(r->replicas, i);

        if (p->probe && (all || link_task_wait(p->probe, 0) ||
                         now_ms() >= p->probe_end)) {
            probe_finish(r, p);
        }
        any = any || p->probe;
    }
    return any;
}

/* ------------------------------------------------------------------ */
/* The thread                                                          */

static void *keeper_thread(void *opaque)
{
    Keeper k = { .r = opaque };
    TemplateReader *r = opaque;
    bool probing;

    qemu_mutex_lock(&r->lock);
    while (!r->stopping) {
        qemu_mutex_unlock(&r->lock);
        if (now_ms() >= k.looked + LOOK_MS) {
            look_for_local(r);
            k.looked = now_ms();
        }
        keep_connection(&k);
        start_probes(r);
        probing = finish_probes(r, false);
        qemu_mutex_lock(&r->lock);
        if (!r->stopping) {
            qemu_cond_timedwait(&r->keep, &r->lock,
                                probing ? TICK_PROBE_MS : TICK_MS);
        }
    }
    qemu_mutex_unlock(&r->lock);
    finish_probes(r, true);
    reader_disconnect(&k.link);
    return NULL;
}

void reader_keeper_start(TemplateReader *r)
{
    r->keeper_started = true;
    qemu_thread_create(&r->keeper, "template-keep", keeper_thread, r,
                       QEMU_THREAD_JOINABLE);
}

void reader_keeper_join(TemplateReader *r)
{
    if (r->keeper_started) {
        qemu_thread_join(&r->keeper);
    }
}
