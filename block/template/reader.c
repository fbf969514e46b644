/*
 * thinvm template store: requests, and the chunks that serve them
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See reader.h.  A chunk is read once for all requests that wait for it, kept
 * while anybody copies from it, and then as long as there is room.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "block/aio.h"
#include "block/thread-pool.h"
#include "qemu/bitops.h"
#include "qemu/coroutine.h"
#include "qemu/cutils.h"
#include "qemu/iov.h"
#include "qemu/memalign.h"
#include "reader.h"

#define DEFAULT_CLUSTER         "/etc/thinvm/templates.conf"
/* A thread without work for so long lets go of its connection */
#define THREAD_IDLE_MS          10000

typedef struct Waiter {
    Coroutine *co;
    QSIMPLEQ_ENTRY(Waiter) next;
} Waiter;

struct ReaderChunk {
    uint64_t n;
    bool ahead;                     /* no request has asked for it */
    unsigned place;                 /* in its run, which is queued */
    uint8_t *data;                  /* once it has been read */
    int ret;
    bool done;
    unsigned users;
    QSIMPLEQ_HEAD(, Waiter) waiters;
    QTAILQ_ENTRY(ReaderChunk) link; /* queue or unused */
};

/* How far to read ahead of a stream: a part of what it has read already */
#define AHEAD_MAX               TEMPLATE_IO_BYTES
#define AHEAD_PART              4
/* ... and of the memory that there is */
#define AHEAD_PART_OF_CACHE     16
/* Requests that follow each other may skip so much */
#define STREAM_GAP              (256 * KiB)

/* ------------------------------------------------------------------ */
/* Chunks in memory                                                    */

/* All with the lock */

static void chunk_free(gpointer opaque)
{
    ReaderChunk *c = opaque;

    qemu_vfree(c->data);
    g_free(c);
}

static void chunk_forget(TemplateReader *r, ReaderChunk *c)
{
    if (c->data) {
        r->memory -= r->chunks->chunk_size;
    }
    g_hash_table_remove(r->in_memory, &c->n);
}

static void chunk_unuse(TemplateReader *r, ReaderChunk *c)
{
    if (--c->users) {
        return;
    }
    if (c->ret < 0) {
        chunk_free(c);
        return;
    }
    QTAILQ_INSERT_TAIL(&r->unused, c, link);
    while (r->memory > r->o.cache_size && !QTAILQ_EMPTY(&r->unused)) {
        c = QTAILQ_FIRST(&r->unused);
        QTAILQ_REMOVE(&r->unused, c, link);
        chunk_forget(r, c);
    }
}

static void *reader_thread(void *opaque);

/* For one more run that is queued */
static void start_thread(TemplateReader *r)
{
    if (r->nb_queued > r->idle_threads && r->nb_threads < READER_THREADS_MAX) {
        qemu_thread_create(&r->threads[r->nb_threads++], "template-read",
                           reader_thread, r, QEMU_THREAD_JOINABLE);
    }
}

static unsigned run_max(const TemplateReader *r)
{
    return template_io_bytes(r->chunks->chunk_size) / r->chunks->chunk_size;
}

/*
 * It continues the run at the end of the queue, or begins another one.  None
 * waits for what nobody has asked for.
 */
static void chunk_queue(TemplateReader *r, ReaderChunk *c)
{
    const ReaderChunk *last = QTAILQ_LAST(&r->queue);

    if (last && last->n + 1 == c->n && last->ahead == c->ahead &&
        last->place + 1 < run_max(r)) {
        c->place = last->place + 1;
    } else {
        r->nb_queued++;
        start_thread(r);
        qemu_cond_signal(&r->work);
    }
    QTAILQ_INSERT_TAIL(&r->queue, c, link);
}

static ReaderChunk *chunk_new(TemplateReader *r, uint64_t n, bool ahead)
{
    ReaderChunk *c = g_new0(ReaderChunk, 1);

    c->n = n;
    c->ahead = ahead;
    QSIMPLEQ_INIT(&c->waiters);
    g_hash_table_insert(r->in_memory, &c->n, c);
    chunk_queue(r, c);
    return c;
}

static ReaderChunk *chunk_use(TemplateReader *r, uint64_t n)
{
    ReaderChunk *c = g_hash_table_lookup(r->in_memory, &n);

    if (!c) {
        c = chunk_new(r, n, false);
    } else if (!c->users) {
        QTAILQ_REMOVE(&r->unused, c, link);
    }
    c->users++;
    return c;
}

/* ------------------------------------------------------------------ */
/* Threads                                                             */

/* NULL: it cannot be read; who asks for it from now on lets it be tried again */
static void chunk_done(TemplateReader *r, ReaderChunk *c, uint8_t *data)
{
    Waiter *w;

    c->ret = data ? 0 : -EIO;
    c->done = true;
    c->data = data;
    if (data) {
        r->memory += r->chunks->chunk_size;
    } else {
        g_hash_table_steal(r->in_memory, &c->n);
    }
    while ((w = QSIMPLEQ_FIRST(&c->waiters))) {
        QSIMPLEQ_REMOVE_HEAD(&c->waiters, next);
        aio_co_wake(w->co);
    }
    if (c->ahead) {
        chunk_unuse(r, c);
    }
}

/* The first in the queue; how many chunks it has */
static unsigned take_run(TemplateReader *r, ReaderChunk **run)
{
    unsigned count = 0;

    do {
        run[count] = QTAILQ_FIRST(&r->queue);
        QTAILQ_REMOVE(&r->queue, run[count], link);
        count++;
    } while (!QTAILQ_EMPTY(&r->queue) && QTAILQ_FIRST(&r->queue)->place);
    r->nb_queued--;
    return count;
}

/* Those of a run that are in @right are in @buf */
static void run_done(TemplateReader *r, ReaderChunk **run, ReaderMask right,
                     const uint8_t *buf)
{
    uint32_t size = r->chunks->chunk_size;
    uint8_t *data[READER_RUN_MAX] = { };

    for (unsigned i = 0; i < READER_RUN_MAX; i++) {
        if (right & BIT(i)) {
            data[i] = qemu_memalign(qemu_real_host_page_size(), size);
            memcpy(data[i], buf + (size_t)i * size,
                   template_chunk_bytes(r->chunks, run[i]->n));
        }
    }
    QEMU_LOCK_GUARD(&r->lock);
    for (unsigned i = 0; i < READER_RUN_MAX; i++) {
        if (right & BIT(i)) {
            chunk_done(r, run[i], data[i]);
        }
    }
}

/* Who has come to ask for what was read ahead has not waited for it yet */
static void run_failed(TemplateReader *r, ReaderChunk *c)
{
    QEMU_LOCK_GUARD(&r->lock);

    if (c->ahead && c->users > 1) {
        c->ahead = false;
        c->place = 0;
        c->users--;
        chunk_queue(r, c);
    } else {
        chunk_done(r, c, NULL);
    }
}

/* How many chunks from @first on are not in @done? */
static unsigned not_done(ReaderMask done, unsigned first, unsigned count)
{
    unsigned n = 0;

    while (first + n < count && !(done & BIT(first + n))) {
        n++;
    }
    return n;
}

/*
 * What can be read at once.  A copy may have only a part of a run right.  Once
 * one gave no more than its first chunk, the rest is read chunk by chunk.
 */
static ReaderMask run_try(TemplateReader *r, ReaderLink *link,
                          ReaderChunk **run, unsigned count, uint8_t *buf)
{
    ReaderMask done = 0;
    unsigned max = count;

    for (unsigned i = 0; i < count; i++) {
        uint8_t *at = buf + (size_t)i * r->chunks->chunk_size;
        unsigned n = MIN(not_done(done, i, count), max);

        if (n) {
            ReaderMask right = reader_fetch(r, link, run[i]->n, n, NULL, at);

            run_done(r, run + i, right, at);
            done |= right << i;
            max = n > 1 && right <= 1 ? 1 : max;
        }
    }
    return done;
}

/* First what need not be waited for, as nothing is that is read ahead */
static void run_read(TemplateReader *r, ReaderLink *link, ReaderChunk **run,
                     unsigned count)
{
    ReaderWait wait = reader_wait(r);
    uint8_t *buf = qemu_memalign(qemu_real_host_page_size(),
                                 (size_t)count * r->chunks->chunk_size);
    ReaderMask done = run_try(r, link, run, count, buf);

    wait.again = true;
    for (unsigned i = 0; i < count; i++) {
        if (done & BIT(i)) {
            continue;
        }
        if (!run[i]->ahead &&
            reader_fetch(r, link, run[i]->n, 1, &wait, buf)) {
            run_done(r, run + i, 1, buf);
        } else {
            run_failed(r, run[i]);
        }
    }
    qemu_vfree(buf);
}

/* Until there is work; the keeper has a connection for times without any */
static void thread_rest(TemplateReader *r, ReaderLink *link)
{
    bool woken;

    r->idle_threads++;
    woken = qemu_cond_timedwait(&r->work, &r->lock, THREAD_IDLE_MS);
    r->idle_threads--;
    if (!woken && link->link) {
        qemu_mutex_unlock(&r->lock);
        reader_disconnect(link);
        qemu_mutex_lock(&r->lock);
    }
}

static void *reader_thread(void *opaque)
{
    TemplateReader *r = opaque;
    ReaderLink link = { };
    ReaderChunk *run[READER_RUN_MAX];

    qemu_mutex_lock(&r->lock);
    while (!r->stopping) {
        unsigned count;

        if (QTAILQ_EMPTY(&r->queue)) {
            thread_rest(r, &link);
            continue;
        }
        count = take_run(r, run);
        qemu_mutex_unlock(&r->lock);
        run_read(r, &link, run, count);
        qemu_mutex_lock(&r->lock);
    }
    qemu_mutex_unlock(&r->lock);
    reader_disconnect(&link);
    return NULL;
}

/* ------------------------------------------------------------------ */
/* Requests                                                            */

typedef struct Piece {
    uint64_t n;                     /* chunk */
    uint32_t at, bytes;             /* in it */
} Piece;

static Piece piece_at(const TemplateReader *r, uint64_t offset, uint64_t bytes)
{
    uint32_t size = r->chunks->chunk_size;
    Piece p = { .n = offset / size, .at = offset % size };

    p.bytes = MIN(bytes, template_chunk_bytes(r->chunks, p.n) - p.at);
    return p;
}

static bool chunk_is_zero(const TemplateReader *r, uint64_t n)
{
    return !qatomic_read(&r->doubtful_zeroes) &&
           template_chunk_bytes(r->chunks, n) == r->chunks->chunk_size &&
           template_digest_equal(&r->chunks->hashes[n], &r->zeroes);
}

bool template_reader_is_zero(TemplateReader *r, uint64_t offset,
                             uint64_t bytes, uint64_t *same)
{
    uint32_t size = r->chunks->chunk_size;
    uint64_t n = offset / size;
    uint64_t last = MIN((offset + bytes - 1) / size, r->chunks->nb_chunks - 1);
    bool zero = chunk_is_zero(r, n);

    do {
        n++;
    } while (n <= last && chunk_is_zero(r, n) == zero);
    *same = MIN(bytes, n * size - offset);
    return zero;
}

typedef struct DirectRead {
    LocalCopy *copy;
    uint8_t *buf;
    uint64_t offset;
    uint32_t bytes;
} DirectRead;

static int direct_read(void *opaque)
{
    DirectRead *d = opaque;

    return template_pread(d->copy->fd, d->buf, d->bytes, d->offset) ? 0 : -EIO;
}

/* How much, from the beginning of @bytes on, is verified and no zeroes? */
static uint32_t direct_bytes(const TemplateReader *r, const LocalCopy *copy,
                             uint64_t offset, uint64_t bytes)
{
    uint32_t found = 0;

    bytes = MIN(bytes, r->chunks->length - offset);
    while (found < MIN(bytes, TEMPLATE_IO_BYTES)) {
        Piece p = piece_at(r, offset + found, bytes - found);

        if (chunk_is_zero(r, p.n) || !test_bit(p.n, copy->verified) ||
            test_bit(p.n, copy->wrong)) {
            break;
        }
        found += p.bytes;
    }
    return found;
}

/*
 * From chunks of the local copy that have been verified: how much that was, 0
 * if the first one has not, or if the disk cannot read them.
 */
static uint32_t coroutine_fn co_read_direct(TemplateReader *r, uint64_t offset,
                                            uint64_t bytes, QEMUIOVector *qiov,
                                            size_t qiov_offset)
{
    DirectRead d = { .copy = reader_local(r), .offset = offset };

    if (d.copy && r->o.verify == THINVM_TEMPLATE_VERIFY_ONCE) {
        d.bytes = direct_bytes(r, d.copy, offset, bytes);
    }
    if (d.bytes) {
        d.buf = qemu_memalign(qemu_real_host_page_size(), d.bytes);
        if (thread_pool_submit_co(direct_read, &d) == 0) {
            qemu_iovec_from_buf(qiov, qiov_offset, d.buf, d.bytes);
            stat64_add(&r->stats.local_bytes, d.bytes);
        } else {
            d.bytes = 0;
        }
        qemu_vfree(d.buf);
    }
    local_copy_unref(d.copy);
    return d.bytes;
}

/* ------------------------------------------------------------------ */
/* Reading ahead                                                       */

/* All with the lock */

/* The stream that a request belongs to, which may be a new one */
static ReaderStream *stream_of(TemplateReader *r, uint64_t offset,
                               uint64_t bytes)
{
    ReaderStream *found = &r->streams[0];

    for (unsigned i = 0; i < READER_STREAMS; i++) {
        ReaderStream *s = &r->streams[i];

        if (s->used && offset - s->next <= STREAM_GAP) {
            found = s;
            break;
        }
        found = s->used < found->used ? s : found;
    }
    if (!found->used || offset - found->next > STREAM_GAP) {
        *found = (ReaderStream) { };
    }
    found->next = offset + bytes;
    found->bytes += bytes;
    found->used = ++r->clock;
    return found;
}

/*
 * What follows a run that a request has asked for, if that is not the first one
 * there: so that small chunks do not mean a round trip for each.
 */
static void read_ahead(TemplateReader *r, uint64_t offset, uint64_t bytes)
{
    ReaderStream *s = stream_of(r, offset, bytes);
    uint32_t size = r->chunks->chunk_size;
    uint64_t window = MIN(MIN(s->bytes / AHEAD_PART, AHEAD_MAX),
                          r->o.cache_size / AHEAD_PART_OF_CACHE);
    uint64_t end = MIN(QEMU_ALIGN_DOWN(s->next + window, size),
                       r->chunks->nb_chunks * size);
    uint64_t from = MAX(s->ahead, ROUND_UP(s->next, size));

    /* On a disk of this node the kernel does that */
    if (r->local || r->waiting || window < size ||
        from > s->next + window / 2) {
        return;
    }
    s->ahead = MAX(from, end);
    for (uint64_t n = from / size; n < end / size; n++) {
        if (!chunk_is_zero(r, n) && !g_hash_table_contains(r->in_memory, &n)) {
            chunk_new(r, n, true)->users++;
        }
    }
}

/* ------------------------------------------------------------------ */
/* Requests that are served from chunks                                */

/* What a request needs of one of them, once that has been read */
static int coroutine_fn co_copy_chunk(TemplateReader *r, ReaderChunk *c,
                                      const Piece *p, QEMUIOVector *qiov,
                                      size_t qiov_offset)
{
    Waiter w = { .co = qemu_coroutine_self() };
    int ret;

    qemu_mutex_lock(&r->lock);
    if (!c->done) {
        QSIMPLEQ_INSERT_TAIL(&c->waiters, &w, next);
        qemu_mutex_unlock(&r->lock);
        qemu_coroutine_yield();
        qemu_mutex_lock(&r->lock);
    }
    ret = c->ret;
    qemu_mutex_unlock(&r->lock);
    if (ret == 0) {
        qemu_iovec_from_buf(qiov, qiov_offset, c->data + p->at, p->bytes);
    }
    WITH_QEMU_LOCK_GUARD(&r->lock) {
        chunk_unuse(r, c);
    }
    return ret;
}

/* The chunks of a request that are no zeroes, as many as make a run */
static unsigned pieces_of(const TemplateReader *r, uint64_t offset,
                          uint64_t bytes, Piece *pieces)
{
    unsigned count = 0;

    bytes = MIN(bytes, r->chunks->length - offset);
    while (bytes && count < run_max(r)) {
        Piece p = piece_at(r, offset, bytes);

        if (chunk_is_zero(r, p.n)) {
            break;
        }
        pieces[count++] = p;
        offset += p.bytes;
        bytes -= p.bytes;
    }
    return count;
}

/* From the first of @bytes on, which is not in zeroes; @done: how much */
static int coroutine_fn co_read_run(TemplateReader *r, uint64_t offset,
                                    uint64_t bytes, QEMUIOVector *qiov,
                                    size_t qiov_offset, uint32_t *done)
{
    Piece pieces[READER_RUN_MAX];
    ReaderChunk *run[READER_RUN_MAX];
    unsigned count = pieces_of(r, offset, bytes, pieces);
    int ret = 0;

    *done = 0;
    WITH_QEMU_LOCK_GUARD(&r->lock) {
        for (unsigned i = 0; i < count; i++) {
            run[i] = chunk_use(r, pieces[i].n);
            if (run[i]->done) {
                stat64_add(&r->stats.cached_bytes, pieces[i].bytes);
            }
            *done += pieces[i].bytes;
        }
        read_ahead(r, offset, *done);
    }
    for (unsigned i = 0; i < count; i++) {
        int result = co_copy_chunk(r, run[i], &pieces[i], qiov, qiov_offset);

        ret = ret ?: result;
        qiov_offset += pieces[i].bytes;
    }
    return ret;
}

int coroutine_fn template_reader_co_read(TemplateReader *r, uint64_t offset,
                                         uint64_t bytes, QEMUIOVector *qiov,
                                         size_t qiov_offset)
{
    int ret = reader_is_refuted(r) ? -EIO : 0;

    while (bytes && offset < r->chunks->length && ret == 0) {
        Piece p = piece_at(r, offset, bytes);
        uint32_t done = p.bytes;

        if (chunk_is_zero(r, p.n)) {
            qemu_iovec_memset(qiov, qiov_offset, 0, done);
            stat64_add(&r->stats.zero_bytes, done);
        } else {
            done = co_read_direct(r, offset, bytes, qiov, qiov_offset);
            if (!done) {
                ret = co_read_run(r, offset, bytes, qiov, qiov_offset, &done);
            }
        }
        offset += done;
        qiov_offset += done;
        bytes -= done;
    }
    /* The block layer rounds lengths up */
    qemu_iovec_memset(qiov, qiov_offset, 0, bytes);
    /* What was taken for right may have been refuted meanwhile */
    return ret == 0 && reader_is_refuted(r) ? -EIO : ret;
}

/* ------------------------------------------------------------------ */
/* Open and close                                                      */

static bool open_cluster(TemplateReader *r, Error **errp)
{
    const char *name = r->o.node ?: g_get_host_name();

    r->cluster = cluster_load(r->o.cluster ?: DEFAULT_CLUSTER, errp);
    if (!r->cluster) {
        return false;
    }
    r->self = cluster_find_node(r->cluster, name);
    if (!r->self) {
        error_setg(errp, "Cluster description '%s' has no '[node %s]': name "
                   "this node by option 'node'",
                   r->o.cluster ?: DEFAULT_CLUSTER, name);
        return false;
    }
    r->placement = placement_new(r->cluster, errp);
    return r->placement;
}

/* Without those that cannot be opened: others may have a copy */
static void open_stores(TemplateReader *r)
{
    for (unsigned i = 0; i < r->cluster->disks->len; i++) {
        ClusterDisk *disk = g_ptr_array_index(r->cluster->disks, i);
        TemplateStore *s = disk->node == r->self
                           ? template_store_open(disk, NULL) : NULL;

        if (s) {
            g_ptr_array_add(r->stores, s);
        }
    }
}

static guint hash_number(gconstpointer p)
{
    return *(const uint64_t *)p;
}

static gboolean equal_numbers(gconstpointer a, gconstpointer b)
{
    return *(const uint64_t *)a == *(const uint64_t *)b;
}

static bool start(TemplateReader *r, Error **errp)
{
    WITH_QEMU_LOCK_GUARD(&r->lock) {
        for (unsigned i = r->replicas->len; i-- > 0; ) {
            Replica *p = g_ptr_array_index(r->replicas, i);

            r->current = p->usable && p->known ? p : r->current;
        }
    }
    reader_keeper_start(r);
    return !r->o.bring_over || r->local ||
           template_reader_bring_over(r, true, r->o.speed, false, errp);
}

TemplateReader *template_reader_new(const char *node_name,
                                    const ReaderOptions *o, Error **errp)
{
    TemplateReader *r = g_new0(TemplateReader, 1);

    r->node_name = g_strdup(node_name);
    r->o = *o;
    r->o.cluster = g_strdup(o->cluster);
    r->o.node = g_strdup(o->node);
    qemu_mutex_init(&r->lock);
    qemu_cond_init(&r->work);
    qemu_cond_init(&r->keep);
    qemu_cond_init(&r->changed);
    qemu_cond_init(&r->bring.cond);
    QTAILQ_INIT(&r->queue);
    QTAILQ_INIT(&r->unused);
    r->in_memory = g_hash_table_new_full(hash_number, equal_numbers, NULL,
                                         chunk_free);
    r->stores = g_ptr_array_new_with_free_func(
                    (GDestroyNotify)template_store_close);
    if (event_notifier_init(&r->stop, false) < 0) {
        error_setg(errp, "No descriptor is left");
        template_reader_free(r);
        return NULL;
    }
    if (!open_cluster(r, errp)) {
        template_reader_free(r);
        return NULL;
    }
    open_stores(r);
    if (!reader_find(r, errp) || !start(r, errp)) {
        template_reader_free(r);
        return NULL;
    }
    return r;
}

void template_reader_free(TemplateReader *r)
{
    WITH_QEMU_LOCK_GUARD(&r->lock) {
        r->stopping = true;
        qemu_cond_broadcast(&r->work);
        qemu_cond_broadcast(&r->keep);
        qemu_cond_broadcast(&r->changed);
        qemu_cond_broadcast(&r->bring.cond);
    }
    event_notifier_set(&r->stop);
    reader_bring_over_join(r);
    reader_keeper_join(r);
    for (unsigned i = 0; i < r->nb_threads; i++) {
        qemu_thread_join(&r->threads[i]);
    }
    g_hash_table_unref(r->in_memory);
    if (r->replicas) {
        g_ptr_array_unref(r->replicas);
    }
    local_copy_unref(r->local);
    template_chunks_free(r->chunks);
    for (unsigned i = 0; i < r->nb_others; i++) {
        template_chunks_free(r->others[i]);
    }
    g_ptr_array_unref(r->stores);
    placement_free(r->placement);
    cluster_free(r->cluster);
    event_notifier_cleanup(&r->stop);
    qemu_cond_destroy(&r->bring.cond);
    qemu_cond_destroy(&r->changed);
    qemu_cond_destroy(&r->keep);
    qemu_cond_destroy(&r->work);
    qemu_mutex_destroy(&r->lock);
    g_free(r->o.cluster);
    g_free(r->o.node);
    g_free(r->node_name);
    g_free(r);
}

/* ------------------------------------------------------------------ */
/* What it does                                                        */

ThinvmTemplateStatistics *template_reader_statistics(TemplateReader *r)
{
    ThinvmTemplateStatistics *s = g_new(ThinvmTemplateStatistics, 1);

    *s = (ThinvmTemplateStatistics) {
        .local_bytes = stat64_get(&r->stats.local_bytes),
        .remote_bytes = stat64_get(&r->stats.remote_bytes),
        .zero_bytes = stat64_get(&r->stats.zero_bytes),
        .cached_bytes = stat64_get(&r->stats.cached_bytes),
        .verified_chunks = stat64_get(&r->stats.verified_chunks),
        .wrong_chunks = stat64_get(&r->stats.wrong_chunks),
        .failures = stat64_get(&r->stats.failures),
        .moves = stat64_get(&r->stats.moves),
        .waits = stat64_get(&r->stats.waits),
    };
    return s;
}

ThinvmTemplateInfo *template_reader_info(TemplateReader *r)
{
    ThinvmTemplateInfo *info = g_new0(ThinvmTemplateInfo, 1);
    char text[TEMPLATE_DIGEST_TEXT];

    info->node_name = g_strdup(r->node_name);
    template_digest_format(&r->o.digest, text);
    info->digest = g_strdup(text);
    template_digest_format(&r->root, text);
    info->hashes = g_strdup(text);
    info->length = r->chunks->length;
    info->chunk_size = r->chunks->chunk_size;
    info->statistics = template_reader_statistics(r);
    QEMU_LOCK_GUARD(&r->lock);
    info->trust = r->trust;
    info->source = r->current ? g_strdup(r->current->place) : NULL;
    info->replicas = replicas_describe(r);
    info->bring_over = reader_bring_over_describe(r);
    return info;
}

void template_reader_cancel(TemplateReader *r)
{
    QEMU_LOCK_GUARD(&r->lock);

    r->cancelled++;
    qemu_cond_broadcast(&r->changed);
}
