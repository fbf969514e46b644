/*
 * thinvm template store: which copy a chunk is read from
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See reader.h.  The copy of this node, then those of other nodes in order of
 * distance, each unless it is known to be of no use: one that failed is left
 * to the keeper, which tries it beside the requests.  Nothing that was read is
 * passed on before its hash is right (R1).
 *
 * The source that is shown is the nearest copy that has answered; a chunk
 * that is wrong there is read from the next one, and changes nothing else.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "block/block-common.h"
#include "qapi/util.h"
#include "qemu/bitmap.h"
#include "qemu/error-report.h"
#include "qemu/timer.h"
#include "reader.h"
#include "remote.h"

#define BACKOFF_MIN_MS      500
#define BACKOFF_MAX_MS      (60 * 1000)
#define STEADY_MS           (60 * 1000)
/* Between two looks at all copies, while there is none */
#define WAIT_MS             1000

static int64_t now_ms(void)
{
    return qemu_clock_get_ms(QEMU_CLOCK_REALTIME);
}

/* ------------------------------------------------------------------ */
/* The list                                                            */

char *reader_export_name(const TemplateReader *r, const char *suffix)
{
    char text[TEMPLATE_DIGEST_TEXT];

    template_digest_format(&r->o.digest, text);
    return g_strconcat(text, suffix, NULL);
}

static void replica_free(gpointer opaque)
{
    Replica *p = opaque;

    g_free(p->place);
    g_free(p->problem);
    g_free(p);
}

static void add_replica(GPtrArray *replicas, ClusterNode *node, char *place,
                        bool local, bool usable)
{
    Replica *p = g_new0(Replica, 1);

    p->node = node;
    p->place = place;
    p->local = local;
    p->usable = usable;
    p->known = local && usable;
    g_ptr_array_add(replicas, p);
}

GPtrArray *replicas_new(const TemplateReader *r)
{
    GPtrArray *replicas = g_ptr_array_new_with_free_func(replica_free);
    g_autoptr(GPtrArray) nodes =
        placement_nodes_by_distance(r->placement, r->cluster, &r->o.digest,
                                    r->self);

    add_replica(replicas, r->self,
                g_strdup(r->local ? r->local->path : r->self->name), true,
                r->local);
    for (unsigned i = 0; i < nodes->len; i++) {
        ClusterNode *node = g_ptr_array_index(nodes, i);

        if (node->nbd) {
            add_replica(replicas, node, remote_uri(node, &r->o.digest), false,
                        true);
        }
    }
    return replicas;
}

ThinvmTemplateReplicaList *replicas_describe(TemplateReader *r)
{
    ThinvmTemplateReplicaList *list = NULL, **tail = &list;

    for (unsigned i = 0; i < r->replicas->len; i++) {
        Replica *p = g_ptr_array_index(r->replicas, i);
        ThinvmTemplateReplica *d = g_new(ThinvmTemplateReplica, 1);

        *d = (ThinvmTemplateReplica) {
            .place = g_strdup(p->place),
            .cluster_node = g_strdup(p->node->name),
            .local = p->local,
            .usable = p->usable,
            .problem = g_strdup(p->problem),
            .bytes = p->bytes,
            .wrong_chunks = p->wrong_chunks,
            .failures = p->failures,
        };
        QAPI_LIST_APPEND(tail, d);
    }
    return list;
}

/* ------------------------------------------------------------------ */
/* What is known                                                       */

/* With the lock, as all here */
static void update_current(TemplateReader *r, const char *reason)
{
    Replica *found = NULL;

    if (!r->keeper_started) {
        return;                         /* it is still being opened */
    }
    for (unsigned i = 0; !found && i < r->replicas->len; i++) {
        Replica *p = g_ptr_array_index(r->replicas, i);

        found = p->usable && p->known ? p : NULL;
    }
    if (found != r->current) {
        if (found && r->current) {
            stat64_add(&r->stats.moves, 1);
        }
        r->current = found;
        reader_event_source(r, found ? found->place : NULL, reason);
    }
    qemu_cond_signal(&r->keep);
}

void replica_set_usable(TemplateReader *r, Replica *p, const char *reason)
{
    bool was = p->usable;

    p->usable = true;
    p->known = true;
    g_clear_pointer(&p->problem, g_free);
    if (!was) {
        p->nb_wrong = 0;
        p->usable_since = now_ms();
    }
    update_current(r, reason);
    qemu_cond_broadcast(&r->changed);
}

void replica_set_problem(TemplateReader *r, Replica *p, const char *problem,
                         uint64_t chunk)
{
    g_autofree char *reason = g_strdup_printf("'%s': %s", p->place, problem);

    g_free(p->problem);
    p->problem = g_strdup(problem);
    if (p->usable) {
        p->probe_chunk = chunk;
    }
    /* One that works only now and then is asked less and less */
    if (p->usable && now_ms() - p->usable_since > STEADY_MS) {
        p->backoff_ms = 0;
    }
    p->usable = false;
    p->known = false;
    p->failures++;
    p->backoff_ms = MIN(BACKOFF_MAX_MS, MAX(BACKOFF_MIN_MS,
                                            2 * p->backoff_ms));
    p->tried_at = now_ms();
    p->retry_at = p->tried_at + p->backoff_ms;
    stat64_add(&r->stats.failures, 1);
    update_current(r, reason);
}

LocalCopy *reader_local(TemplateReader *r)
{
    QEMU_LOCK_GUARD(&r->lock);

    return r->local ? local_copy_ref(r->local) : NULL;
}

void reader_set_local(TemplateReader *r, LocalCopy *copy, const char *reason)
{
    Replica *p = g_ptr_array_index(r->replicas, 0);

    QEMU_LOCK_GUARD(&r->lock);
    local_copy_unref(r->local);
    r->local = copy;
    g_free(p->place);
    p->place = g_strdup(copy->path);
    if (r->current == p) {
        r->current = NULL;              /* another file is told of, too */
    }
    replica_set_usable(r, p, reason);
}

void reader_refute(TemplateReader *r, const char *why)
{
    QEMU_LOCK_GUARD(&r->lock);

    if (r->trust != THINVM_TEMPLATE_TRUST_REFUTED) {
        error_report("Template node '%s': %s: nothing is read any more",
                     r->node_name, why);
        r->trust = THINVM_TEMPLATE_TRUST_REFUTED;
        reader_event_source(r, NULL, why);
    }
}

/* ------------------------------------------------------------------ */
/* Connections                                                         */

LinkPatience reader_patience(const TemplateReader *r)
{
    return link_patience(r->o.timeout_ms, event_notifier_get_fd(&r->stop));
}

void reader_disconnect(ReaderLink *l)
{
    link_free(l->link);
    *l = (ReaderLink) { };
}

/* Servers round lengths up to 512 bytes */
bool reader_link_check(const TemplateReader *r, const Link *link, Error **errp)
{
    uint64_t length = r->chunks->length;

    if (link_size(link) != length &&
        link_size(link) != ROUND_UP(length, BDRV_SECTOR_SIZE)) {
        error_setg(errp, "it has %" PRIu64 " bytes instead of %" PRIu64,
                   link_size(link), length);
        return false;
    }
    return true;
}

static bool is_stopping(TemplateReader *r)
{
    QEMU_LOCK_GUARD(&r->lock);

    return r->stopping;
}

bool reader_connect(TemplateReader *r, ReaderLink *l, Replica *p, Error **errp)
{
    g_autofree char *name = reader_export_name(r, "");
    int64_t deadline = now_ms() + r->o.timeout_ms;
    LinkTask *task;

    if (l->replica == p && link_alive(l->link)) {
        return true;
    }
    reader_disconnect(l);
    task = link_task_start(p->node, name, 0, 0, r->o.timeout_ms);
    while (!link_task_wait(task, 100) && now_ms() < deadline &&
           !is_stopping(r)) {
        /* R2 */
    }
    l->link = link_task_finish(task, NULL, errp);
    if (!l->link) {
        return false;
    }
    l->replica = p;
    if (!reader_link_check(r, l->link, errp)) {
        reader_disconnect(l);
        return false;
    }
    return true;
}

/* ------------------------------------------------------------------ */
/* Fetching                                                            */

bool reader_is_right(TemplateReader *r, uint64_t n, const uint8_t *buf)
{
    TemplateDigest hash;

    return template_sha256(buf, template_chunk_bytes(r->chunks, n), &hash,
                           NULL) &&
           template_digest_equal(&hash, &r->chunks->hashes[n]);
}

/* With the lock */
static bool replica_is_wrong(const Replica *p, uint64_t n)
{
    for (unsigned i = 0; i < MIN(p->nb_wrong, REPLICA_WRONG_MAX); i++) {
        if (p->wrong[i] == n) {
            return true;
        }
    }
    return false;
}

/* The first time that it is seen */
static void tell_wrong(TemplateReader *r, Replica *p, uint64_t n)
{
    uint64_t offset = n * r->chunks->chunk_size;

    warn_report("Template node '%s': '%s' is damaged: chunk %" PRIu64
                " (from byte %" PRIu64 ")", r->node_name, p->place, n, offset);
    reader_event_damaged(r, p->place, offset,
                         template_chunk_bytes(r->chunks, n));
}

static void note_wrong(TemplateReader *r, Replica *p, uint64_t n)
{
    QEMU_LOCK_GUARD(&r->lock);

    stat64_add(&r->stats.wrong_chunks, 1);
    p->wrong_chunks++;
    if (!replica_is_wrong(p, n)) {
        p->wrong[p->nb_wrong++ % REPLICA_WRONG_MAX] = n;
        tell_wrong(r, p, n);
    }
    /* There is no point in asking it first for everything */
    if (!p->local && p->usable && p->nb_wrong >= REPLICA_WRONG_MAX) {
        replica_set_problem(r, p, "much of what it sends is wrong", n);
    }
}

static bool fetch_local(TemplateReader *r, LocalCopy *copy, uint64_t n,
                        uint8_t *buf)
{
    uint32_t bytes = template_chunk_bytes(r->chunks, n);
    Replica *p = g_ptr_array_index(r->replicas, 0);
    bool right = template_pread(copy->fd, buf, bytes,
                                n * r->chunks->chunk_size) &&
                 reader_is_right(r, n, buf);

    stat64_add(&r->stats.local_bytes, bytes);
    WITH_QEMU_LOCK_GUARD(&r->lock) {
        p->bytes += bytes;
    }
    if (right) {
        stat64_add(&r->stats.verified_chunks, 1);
        clear_bit_atomic(n, copy->wrong);
        set_bit_atomic(n, copy->verified);
    } else {
        set_bit_atomic(n, copy->wrong);
        note_wrong(r, p, n);
    }
    return right;
}

static bool fetch_remote(TemplateReader *r, ReaderLink *l, Replica *p,
                         uint64_t n, uint8_t *buf)
{
    uint32_t bytes = template_chunk_bytes(r->chunks, n);
    LinkPatience patience;
    Error *err = NULL;
    bool ok = reader_connect(r, l, p, &err);

    if (ok) {
        patience = reader_patience(r);
        ok = link_read(l->link, n * r->chunks->chunk_size, bytes, buf,
                       &patience, &err);
    }
    if (!ok) {
        reader_disconnect(l);
        WITH_QEMU_LOCK_GUARD(&r->lock) {
            /* Told once, not by each thread that was at it */
            if (!r->stopping && p->usable) {
                replica_set_problem(r, p, error_get_pretty(err), n);
            }
        }
        error_free(err);
        return false;
    }
    stat64_add(&r->stats.remote_bytes, bytes);
    WITH_QEMU_LOCK_GUARD(&r->lock) {
        p->bytes += bytes;
        if (!p->known || !p->usable) {
            replica_set_usable(r, p, "it has answered");
        }
    }
    if (!reader_is_right(r, n, buf)) {
        note_wrong(r, p, n);
        return false;
    }
    stat64_add(&r->stats.verified_chunks, 1);
    return true;
}

/* @again: also what was wrong before, since copies are repaired */
static bool fetch_once(TemplateReader *r, ReaderLink *l, uint64_t n,
                       uint8_t *buf, bool again)
{
    LocalCopy *copy = reader_local(r);
    bool ok = copy && (again || !test_bit(n, copy->wrong)) &&
              fetch_local(r, copy, n, buf);

    local_copy_unref(copy);
    for (unsigned i = 1; !ok && i < r->replicas->len; i++) {
        Replica *p = g_ptr_array_index(r->replicas, i);
        bool useless;

        WITH_QEMU_LOCK_GUARD(&r->lock) {
            useless = r->stopping || !p->usable ||
                      (!again && replica_is_wrong(p, n));
        }
        ok = !useless && fetch_remote(r, l, p, n, buf);
    }
    return ok;
}

/* For a copy; false: there will be none in time */
static bool wait_for_copy(TemplateReader *r, unsigned cancelled,
                          int64_t deadline)
{
    int64_t left = MIN(deadline - now_ms(), WAIT_MS);

    QEMU_LOCK_GUARD(&r->lock);
    if (r->stopping || r->cancelled != cancelled || left <= 0) {
        return false;
    }
    r->waiting++;
    qemu_cond_signal(&r->keep);
    qemu_cond_timedwait(&r->changed, &r->lock, left);
    r->waiting--;
    return true;
}

int reader_fetch(TemplateReader *r, ReaderLink *l, uint64_t n, uint8_t *buf)
{
    int64_t deadline = now_ms() + r->o.retry_s * INT64_C(1000);
    unsigned cancelled;

    WITH_QEMU_LOCK_GUARD(&r->lock) {
        cancelled = r->cancelled;
    }
    for (int round = 0; !fetch_once(r, l, n, buf, round); round++) {
        if (round == 0) {
            stat64_add(&r->stats.waits, 1);
        }
        if (!wait_for_copy(r, cancelled, deadline)) {
            return -EIO;
        }
    }
    return 0;
}
