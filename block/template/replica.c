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
 *
 * Copies are the same whatever size of chunks their nodes have hashes of; the
 * reader has its own hashes.
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
/* Of so much (and so many chunks) that was wrong a node is asked no more */
#define WRONG_BYTES_MAX     (64 * MiB)
#define WRONG_MAX           64
/* ... and so many are told of, so that it does not fill the log */
#define WRONG_TOLD_MAX      32

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
    g_free(p->wrong);
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
        g_clear_pointer(&p->wrong, g_free);
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

/* From now on.  Takes the reference. */
static void set_local(TemplateReader *r, LocalCopy *copy, const char *reason)
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

bool reader_is_refuted(TemplateReader *r)
{
    QEMU_LOCK_GUARD(&r->lock);

    return r->trust == THINVM_TEMPLATE_TRUST_REFUTED;
}

/*
 * This node made @own from the contents.  False: they are not what we were
 * told.  Of chunks of another size that is seen when they are read, which is
 * why all are, then.
 */
static bool check_trust(TemplateReader *r, const TemplateChunks *own)
{
    const TemplateChunks *c = r->chunks;
    bool comparable = own->chunk_size == c->chunk_size;

    if (own->length != c->length ||
        (comparable && memcmp(own->hashes, c->hashes,
                              c->nb_chunks * sizeof(TemplateDigest)))) {
        reader_refute(r, "the copy on this node has other hashes than those "
                      "that were taken from other nodes");
        return false;
    }
    QEMU_LOCK_GUARD(&r->lock);
    if (r->trust == THINVM_TEMPLATE_TRUST_AGREED) {
        if (comparable) {
            r->trust = THINVM_TEMPLATE_TRUST_LOCAL;
        }
        qatomic_set(&r->doubtful_zeroes, !comparable);
    }
    return true;
}

bool reader_take_local(TemplateReader *r, const char *reason, Error **errp)
{
    LocalCopy *copy = local_copy_open(r->stores, &r->o.digest, &r->chunks,
                                      errp);

    if (!copy) {
        return false;
    }
    if (!check_trust(r, copy->own)) {
        error_setg(errp, "The copy on this node has other hashes");
        local_copy_unref(copy);
        return false;
    }
    if (copy->own->chunk_size == r->chunks->chunk_size) {
        g_clear_pointer(&copy->own, template_chunks_free);
    }
    set_local(r, copy, reason);
    return true;
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
           template_digest_equal(&hash, &r->chunks->hashes[n]) &&
           !reader_is_contradicted(r, n, buf);
}

/* With the lock */
static bool replica_is_wrong(const Replica *p, uint64_t n)
{
    return p->wrong && test_bit(n, p->wrong);
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

    if (r->trust == THINVM_TEMPLATE_TRUST_REFUTED) {
        return;                         /* nobody knows what is right */
    }
    stat64_add(&r->stats.wrong_chunks, 1);
    p->wrong_chunks++;
    if (!replica_is_wrong(p, n)) {
        p->wrong = p->wrong ?: bitmap_new(r->chunks->nb_chunks);
        set_bit(n, p->wrong);
        p->nb_wrong++;
        if (p->local || p->nb_wrong <= WRONG_TOLD_MAX) {
            tell_wrong(r, p, n);
        }
    }
    /* There is no point in asking it first for everything */
    if (!p->local && p->usable && p->nb_wrong >= WRONG_MAX &&
        p->nb_wrong * r->chunks->chunk_size >= WRONG_BYTES_MAX) {
        replica_set_problem(r, p, "much of what it sends is wrong", n);
    }
}

/* Is @buf, from chunk @n of @c on, right by the hashes that this node made? */
static bool is_right_by_own(const TemplateChunks *c, uint64_t n,
                            const uint8_t *buf, uint32_t bytes)
{
    TemplateDigest hash;

    for (uint32_t at = 0; at < bytes; at += c->chunk_size, n++) {
        if (!template_sha256(buf + at, template_chunk_bytes(c, n), &hash,
                             NULL) ||
            !template_digest_equal(&hash, &c->hashes[n])) {
            return false;
        }
    }
    return true;
}

/*
 * Is the copy right by the hashes that this node made, where chunk @n is wrong
 * by those of other nodes?  That is said of the same bytes: what was read at
 * another time may have been an error that has passed, or mended since.
 */
static bool is_refuted_by(TemplateReader *r, const LocalCopy *copy, uint64_t n)
{
    const TemplateChunks *own = copy->own;
    uint64_t offset = n * r->chunks->chunk_size;
    uint64_t from = QEMU_ALIGN_DOWN(offset, own->chunk_size);
    uint64_t end = MIN(own->length,
                       ROUND_UP(offset + template_chunk_bytes(r->chunks, n),
                                own->chunk_size));
    g_autofree uint8_t *buf = g_malloc(end - from);

    return template_pread(copy->fd, buf, end - from, from) &&
           is_right_by_own(own, from / own->chunk_size, buf, end - from) &&
           !reader_is_right(r, n, buf + (offset - from));
}

/* It is wrong by the hashes that were taken from other nodes: were they? */
static void check_agreed(TemplateReader *r, const LocalCopy *copy, uint64_t n)
{
    bool agreed;

    WITH_QEMU_LOCK_GUARD(&r->lock) {
        agreed = r->trust == THINVM_TEMPLATE_TRUST_AGREED;
    }
    if (agreed && copy->own && is_refuted_by(r, copy, n)) {
        reader_refute(r, "the copy on this node does not have the hashes that "
                      "were taken from other nodes");
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
        check_agreed(r, copy, n);
    }
    return right;
}

static uint8_t *chunk_in(const TemplateReader *r, uint8_t *buf, unsigned i)
{
    return buf + (size_t)i * r->chunks->chunk_size;
}

/* Those that it has right; @again as below */
static ReaderMask fetch_run_local(TemplateReader *r, LocalCopy *copy,
                                  uint64_t n, unsigned count, uint8_t *buf,
                                  bool again)
{
    ReaderMask right = 0;

    for (unsigned i = 0; i < count; i++) {
        if ((again || !test_bit(n + i, copy->wrong)) &&
            fetch_local(r, copy, n + i, chunk_in(r, buf, i))) {
            right |= BIT(i);
        }
    }
    return right;
}

/* False: the connection is left only if it is the disk that cannot read it */
static bool read_run(TemplateReader *r, ReaderLink *l, Replica *p, uint64_t n,
                     unsigned count, uint8_t *buf, Error **errp)
{
    uint64_t offset = n * r->chunks->chunk_size;
    uint64_t end = MIN(offset + (uint64_t)count * r->chunks->chunk_size,
                       r->chunks->length);
    LinkPatience patience;

    if (!reader_connect(r, l, p, errp)) {
        return false;
    }
    patience = reader_patience(r);
    if (!link_read(l->link, offset, end - offset, buf, &patience, errp)) {
        if (!link_unreadable(l->link)) {
            reader_disconnect(l);
        }
        return false;
    }
    stat64_add(&r->stats.remote_bytes, end - offset);
    WITH_QEMU_LOCK_GUARD(&r->lock) {
        p->bytes += end - offset;
        if (!p->known || !p->usable) {
            replica_set_usable(r, p, "it has answered");
        }
    }
    return true;
}

static bool is_usable(TemplateReader *r, const Replica *p)
{
    QEMU_LOCK_GUARD(&r->lock);

    return !r->stopping && p->usable;
}

/*
 * How many of @count chunks were read; 0: @p is of no use any more, or chunk @n
 * is not readable there.  One that its disk cannot read makes all that is read
 * with it fail, and a slow link may be good for a single one, so that is tried
 * then; but not with a node that was silent, lest it take twice as long until
 * another one is asked.
 */
static unsigned read_remote(TemplateReader *r, ReaderLink *l, Replica *p,
                            uint64_t n, unsigned count, uint8_t *buf)
{
    int64_t begun = now_ms();
    Error *err = NULL;

    if (read_run(r, l, p, n, count, buf, &err)) {
        return count;
    }
    if (count > 1 && is_usable(r, p) &&
        (l->link || now_ms() - begun < r->o.timeout_ms)) {
        error_free(err);
        err = NULL;
        count = 1;
        if (read_run(r, l, p, n, count, buf, &err)) {
            return count;
        }
    }
    if (l->link && count == 1) {
        error_free(err);
        note_wrong(r, p, n);
        return 0;
    }
    WITH_QEMU_LOCK_GUARD(&r->lock) {
        /* Told once, not by each thread that was at it */
        if (!r->stopping && p->usable) {
            replica_set_problem(r, p, error_get_pretty(err), n);
        }
    }
    error_free(err);
    return 0;
}

/* All at once; those that are right */
static ReaderMask fetch_run_remote(TemplateReader *r, ReaderLink *l,
                                   Replica *p, uint64_t n, unsigned count,
                                   uint8_t *buf)
{
    ReaderMask right = 0;

    count = read_remote(r, l, p, n, count, buf);
    for (unsigned i = 0; i < count; i++) {
        if (reader_is_right(r, n + i, chunk_in(r, buf, i))) {
            right |= BIT(i);
            stat64_add(&r->stats.verified_chunks, 1);
        } else {
            note_wrong(r, p, n + i);
        }
    }
    return right;
}

/*
 * With the lock: how many of @count chunks to ask @p for, since it has the
 * others wrong; @again as below
 */
static unsigned worth_asking(const TemplateReader *r, const Replica *p,
                             uint64_t n, unsigned count, bool again)
{
    if (r->stopping || !p->usable ||
        r->trust == THINVM_TEMPLATE_TRUST_REFUTED) {
        return 0;
    }
    for (unsigned i = 0; !again && i < count; i++) {
        if (replica_is_wrong(p, n + i)) {
            return i;
        }
    }
    return count;
}

/*
 * @again: also what was wrong before, since copies are repaired.  What only one
 * copy has wrong is all that is read from the next one.
 */
static ReaderMask fetch_once(TemplateReader *r, ReaderLink *l, uint64_t n,
                             unsigned count, uint8_t *buf, bool again)
{
    LocalCopy *copy = reader_local(r);
    ReaderMask right = 0;

    if (copy) {
        right = fetch_run_local(r, copy, n, count, buf, again);
        local_copy_unref(copy);
        count = 1;
    }
    for (unsigned i = 1; !(right & 1) && i < r->replicas->len; i++) {
        Replica *p = g_ptr_array_index(r->replicas, i);
        unsigned worth;

        WITH_QEMU_LOCK_GUARD(&r->lock) {
            worth = worth_asking(r, p, n, count, again);
        }
        if (worth) {
            right |= fetch_run_remote(r, l, p, n, worth, buf);
        }
        WITH_QEMU_LOCK_GUARD(&r->lock) {
            count = p->usable || right ? 1 : count;
        }
    }
    return reader_is_refuted(r) ? 0 : right;
}

/* For a copy; false: there will be none in time */
static bool wait_for_copy(TemplateReader *r, const ReaderWait *wait)
{
    int64_t left = MIN(wait->deadline - now_ms(), WAIT_MS);

    QEMU_LOCK_GUARD(&r->lock);
    if (r->stopping || r->cancelled != wait->cancelled || left <= 0 ||
        r->trust == THINVM_TEMPLATE_TRUST_REFUTED) {
        return false;
    }
    r->waiting++;
    qemu_cond_signal(&r->keep);
    qemu_cond_timedwait(&r->changed, &r->lock, left);
    r->waiting--;
    return true;
}

ReaderWait reader_wait(TemplateReader *r)
{
    QEMU_LOCK_GUARD(&r->lock);

    return (ReaderWait) {
        .deadline = now_ms() + r->o.retry_s * INT64_C(1000),
        .cancelled = r->cancelled,
    };
}

ReaderMask reader_fetch(TemplateReader *r, ReaderLink *l, uint64_t n,
                        unsigned count, const ReaderWait *wait, uint8_t *buf)
{
    ReaderMask right = fetch_once(r, l, n, count, buf, wait && wait->again);

    if (wait && !(right & 1)) {
        stat64_add(&r->stats.waits, 1);
    }
    while (wait && !(right & 1) && wait_for_copy(r, wait)) {
        right |= fetch_once(r, l, n, 1, buf, true);
    }
    return right;
}
