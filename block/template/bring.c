/*
 * thinvm template store: brings the template to a disk of this node
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See reader.h.  A thread that fetches run after run as requests do, and
 * puts them into a part of the store (part.c): what a process that died has
 * left is gone on with, and of those that bring the same one does it and the
 * others wait.  The digest of the whole decides in the end (T1).  If the chunks
 * were what their hashes say, and the whole is not what its name says, those
 * hashes were a lie, and so was what was read.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/cutils.h"
#include "qemu/host-utils.h"
#include "qemu/memalign.h"
#include "qemu/timer.h"
#include "reader.h"

/* How much of it may have to be read again after a crash */
#define NOTE_BYTES          (64 * MiB)
#define RETRY_MS            2000

typedef struct Bringer {
    TemplateReader *r;
    ReaderLink link;
    TemplatePart *part;
    TemplateHasher *hasher;
    uint8_t *buf;
    /* For the speed: so many bytes since then */
    uint64_t speed, fetched;
    int64_t since;
} Bringer;

static int64_t now_ms(void)
{
    return qemu_clock_get_ms(QEMU_CLOCK_REALTIME);
}

/* ------------------------------------------------------------------ */
/* State                                                               */

/* With the lock */
static void set_state(BringOver *b, ThinvmTemplateBringOverState state,
                      const char *problem)
{
    b->state = state;
    g_free(b->problem);
    b->problem = g_strdup(problem);
}

static void tell_state(TemplateReader *r, ThinvmTemplateBringOverState state,
                       const char *problem)
{
    QEMU_LOCK_GUARD(&r->lock);

    set_state(&r->bring, state, problem);
}

static bool is_over(TemplateReader *r)
{
    QEMU_LOCK_GUARD(&r->lock);

    return r->stopping || r->bring.stop;
}

/* False if it is over; may return early */
static bool pause_for(TemplateReader *r, int64_t ms)
{
    QEMU_LOCK_GUARD(&r->lock);

    if (!r->stopping && !r->bring.stop && ms > 0) {
        qemu_cond_timedwait(&r->bring.cond, &r->lock, ms);
    }
    return !r->stopping && !r->bring.stop;
}

/* ------------------------------------------------------------------ */
/* Chunks                                                              */

/* Not faster than was asked for */
static bool keep_speed(Bringer *b, uint32_t bytes)
{
    uint64_t speed;

    WITH_QEMU_LOCK_GUARD(&b->r->lock) {
        speed = b->r->bring.speed;
    }
    if (speed != b->speed) {
        b->speed = speed;
        b->fetched = 0;
        b->since = now_ms();
    }
    b->fetched += bytes;
    while (speed) {
        int64_t left = b->since + b->fetched * 1000.0 / speed - now_ms();

        if (left <= 0) {
            return true;
        }
        if (!pause_for(b->r, MIN(left, 1000))) {
            return false;
        }
        WITH_QEMU_LOCK_GUARD(&b->r->lock) {
            speed = b->r->bring.speed == b->speed ? speed : 0;
        }
    }
    return !is_over(b->r);
}

/* There will never be a copy that is right, then */
static bool check_trust(TemplateReader *r, Error **errp)
{
    if (reader_is_refuted(r)) {
        error_setg(errp, "The hashes of the chunks are not the template's");
        return false;
    }
    return true;
}

/*
 * From wherever, as long as it takes: how many of @count chunks, from the first
 * one on, that are; 0 if it is over, or with an error.
 */
static unsigned fetch(Bringer *b, uint64_t n, unsigned count, uint8_t *buf,
                      Error **errp)
{
    ReaderMask right;

    do {
        ReaderWait wait = reader_wait(b->r);

        right = reader_fetch(b->r, &b->link, n, count, &wait, buf);
        count = 1;                      /* perhaps it is too much at once */
        if (!(right & 1)) {
            if (!check_trust(b->r, errp)) {
                return 0;
            }
            tell_state(b->r, THINVM_TEMPLATE_BRING_OVER_STATE_WAITING,
                       "no copy can be read");
            if (!pause_for(b->r, RETRY_MS)) {
                return 0;
            }
        }
    } while (!(right & 1));
    tell_state(b->r, THINVM_TEMPLATE_BRING_OVER_STATE_RUNNING, NULL);
    return cto32(right);
}

/* Is it there already, as it must be? */
static bool have_chunk(Bringer *b, uint64_t n, uint8_t *buf)
{
    uint64_t offset = n * b->r->chunks->chunk_size;
    uint32_t bytes = template_chunk_bytes(b->r->chunks, n);

    return offset + bytes <= b->part->done &&
           template_part_read(b->part, buf, bytes, offset, NULL) &&
           reader_is_right(b->r, n, buf);
}

static bool put_chunk(Bringer *b, uint64_t n, const uint8_t *buf, Error **errp)
{
    uint64_t offset = n * b->r->chunks->chunk_size;
    uint32_t bytes = template_chunk_bytes(b->r->chunks, n);

    /* What is wrong in the part may be where zeroes belong */
    return (offset >= b->part->done && buffer_is_zero(buf, bytes)) ||
           template_part_write(b->part, buf, bytes, offset, errp);
}

/* What is not there; how many chunks that were, 0 if not */
static unsigned fetch_and_put(Bringer *b, uint64_t n, unsigned count,
                              uint8_t *buf, Error **errp)
{
    const TemplateChunks *c = b->r->chunks;
    bool is_new = n * c->chunk_size >= b->part->done;
    unsigned got = fetch(b, n, is_new ? count : 1, buf, errp);

    for (unsigned i = 0; i < got; i++) {
        if (!keep_speed(b, template_chunk_bytes(c, n + i)) ||
            !put_chunk(b, n + i, buf + (size_t)i * c->chunk_size, errp)) {
            return 0;
        }
    }
    return got;
}

/* False without an error: it is over */
static bool bring_run(Bringer *b, uint64_t n, unsigned count, Error **errp)
{
    TemplateReader *r = b->r;
    uint64_t offset = n * r->chunks->chunk_size, end;
    unsigned got, max = count;

    end = MIN(offset + (uint64_t)count * r->chunks->chunk_size,
              r->chunks->length);
    for (unsigned i = 0; i < count; i += got) {
        uint8_t *buf = b->buf + (size_t)i * r->chunks->chunk_size;

        got = 1;
        if (!have_chunk(b, n + i, buf)) {
            max = MIN(max, count - i);
            got = fetch_and_put(b, n + i, max, buf, errp);
            max = got == 1 ? 1 : max;   /* as reader.c does */
        }
        if (!got) {
            return false;
        }
    }
    if (!template_hasher_add(b->hasher, b->buf, end - offset, errp)) {
        return false;
    }
    WITH_QEMU_LOCK_GUARD(&r->lock) {
        r->bring.done = end;
    }
    return end % NOTE_BYTES || end <= b->part->done ||
           template_part_note(b->part, end, errp);
}

/* ------------------------------------------------------------------ */
/* All of it                                                           */

/* It may have been removed while it was brought */
static bool may_come(TemplateReader *r, Error **errp)
{
    for (unsigned i = 0; i < r->stores->len; i++) {
        TemplateStore *s = g_ptr_array_index(r->stores, i);
        TemplateEntry e;

        if (template_store_look(s, &r->o.digest, &e) &&
            (e.removed || e.leaving)) {
            error_setg(errp, "It %s disk '%s'", e.removed ?
                       "was removed from" : "is about to leave",
                       s->disk->name);
            return false;
        }
    }
    return true;
}

static bool finish(Bringer *b, Error **errp)
{
    TemplateReader *r = b->r;
    g_autoptr(TemplateChunks) c = template_hasher_finish(b->hasher, errp);
    bool existed;

    if (!c) {
        return false;
    }
    if (!template_digest_equal(&c->digest, &r->o.digest)) {
        error_setg(errp, "The hashes of the chunks are not the template's");
        reader_refute(r, error_get_pretty(*errp));
        return false;
    }
    WITH_QEMU_LOCK_GUARD(&r->lock) {
        if (r->trust == THINVM_TEMPLATE_TRUST_AGREED) {
            r->trust = THINVM_TEMPLATE_TRUST_LOCAL;     /* it was true */
            qatomic_set(&r->doubtful_zeroes, false);
        }
    }
    return may_come(r, errp) &&
           template_part_commit(b->part, c, false, &existed, errp);
}

static bool bring_part(Bringer *b, Error **errp)
{
    const TemplateChunks *c = b->r->chunks;
    unsigned run = template_io_bytes(c->chunk_size) / c->chunk_size;

    for (uint64_t n = 0; n < c->nb_chunks; n += run) {
        if (is_over(b->r) ||
            !bring_run(b, n, MIN(run, c->nb_chunks - n), errp)) {
            return false;
        }
    }
    return finish(b, errp);
}

/* What is there need not be fetched the next time */
static void note_stopped(Bringer *b)
{
    uint64_t done;

    WITH_QEMU_LOCK_GUARD(&b->r->lock) {
        done = QEMU_ALIGN_DOWN(b->r->bring.done, TEMPLATE_IO_BYTES);
    }
    if (done > b->part->done) {
        template_part_note(b->part, done, NULL);
    }
}

/* True once the store has it; false without an error: it is over */
static bool bring(Bringer *b, Error **errp)
{
    ERRP_GUARD();
    TemplateReader *r = b->r;
    bool busy = true, ok;

    while (busy) {
        busy = false;
        if (!may_come(r, errp)) {
            return false;
        }
        b->part = template_part_begin(r->bring.store, &r->o.digest, false,
                                      &busy, errp);
        if (busy) {
            tell_state(r, THINVM_TEMPLATE_BRING_OVER_STATE_WAITING,
                       "another process is at it");
            if (!pause_for(r, RETRY_MS)) {
                return false;
            }
        }
    }
    if (!b->part) {
        return !*errp;
    }
    b->hasher = template_hasher_new(r->chunks->length, r->chunks->chunk_size,
                                    errp);
    ok = b->hasher && bring_part(b, errp);
    template_hasher_free(b->hasher);
    if (!ok && !*errp) {
        note_stopped(b);
    }
    /* What was stopped is gone on with; what failed is in the way */
    template_part_end(b->part, !ok && !*errp);
    return ok;
}

/* The store has it: read it from now on */
static bool use_copy(TemplateReader *r, Error **errp)
{
    ERRP_GUARD();

    if (reader_take_local(r, "it was brought over", errp)) {
        return true;
    }
    if (!*errp) {
        error_setg(errp, "It was brought over, and removed at once");
    }
    return false;
}

/* Is it over?  Not if it was to go on in the moment in which it stopped. */
static bool end(TemplateReader *r, bool ok, const char *problem)
{
    QEMU_LOCK_GUARD(&r->lock);

    if (!ok && !problem && !r->stopping && !r->bring.stop) {
        return false;
    }
    set_state(&r->bring, ok ? THINVM_TEMPLATE_BRING_OVER_STATE_DONE :
              problem ? THINVM_TEMPLATE_BRING_OVER_STATE_FAILED :
                        THINVM_TEMPLATE_BRING_OVER_STATE_STOPPED, problem);
    r->bring.ended = true;
    return true;
}

static void *bring_thread(void *opaque)
{
    TemplateReader *r = opaque;
    Bringer b = { .r = r, .since = now_ms() };
    Error *err = NULL;
    bool ok;

    b.buf = qemu_memalign(qemu_real_host_page_size(),
                          template_io_bytes(r->chunks->chunk_size));
    do {
        WITH_QEMU_LOCK_GUARD(&r->lock) {
            r->bring.done = 0;
        }
        ok = bring(&b, &err) && use_copy(r, &err);
    } while (!end(r, ok, err ? error_get_pretty(err) : NULL));
    error_free(err);
    reader_disconnect(&b.link);
    qemu_vfree(b.buf);
    return NULL;
}

/* ------------------------------------------------------------------ */
/* Commands                                                            */

static TemplateStore *find_store(TemplateReader *r)
{
    ClusterDisk *disk = placement_on_node(r->placement, &r->o.digest, r->self);

    for (unsigned i = 0; disk && i < r->stores->len; i++) {
        TemplateStore *s = g_ptr_array_index(r->stores, i);

        if (s->disk == disk) {
            return s;
        }
    }
    return r->stores->len ? g_ptr_array_index(r->stores, 0) : NULL;
}

/* With the lock; true if it was still at it */
static bool go_on(BringOver *b)
{
    b->stop = false;
    return b->started && !b->ended;
}

static bool check_start(TemplateReader *r, Error **errp)
{
    if (r->local) {
        error_setg(errp, "Node '%s' reads a copy on this node already",
                   r->node_name);
        return false;
    }
    if (r->trust == THINVM_TEMPLATE_TRUST_REFUTED) {
        error_setg(errp, "Node '%s' was told hashes that are not the "
                   "template's", r->node_name);
        return false;
    }
    if (!find_store(r)) {
        error_setg(errp, "Node '%s' of the cluster has no disk that could be "
                   "opened", r->self->name);
        return false;
    }
    return true;
}

/* Main loop, as who frees the reader is */
bool template_reader_bring_over(TemplateReader *r, bool has_speed,
                                uint64_t speed, bool stop, Error **errp)
{
    BringOver *b = &r->bring;

    WITH_QEMU_LOCK_GUARD(&r->lock) {
        if (has_speed) {
            b->speed = speed;
        }
        qemu_cond_broadcast(&b->cond);
        if (stop) {
            b->stop = true;
            return true;
        }
        if (!check_start(r, errp)) {
            return false;
        }
        if (go_on(b)) {
            return true;
        }
    }
    reader_bring_over_join(r);
    b->store = find_store(r);
    b->started = true;
    b->ended = false;
    set_state(b, THINVM_TEMPLATE_BRING_OVER_STATE_RUNNING, NULL);
    qemu_thread_create(&b->thread, "template-bring", bring_thread, r,
                       QEMU_THREAD_JOINABLE);
    return true;
}

ThinvmTemplateBringOver *reader_bring_over_describe(TemplateReader *r)
{
    BringOver *b = &r->bring;
    ThinvmTemplateBringOver *d = NULL;

    if (b->started) {
        d = g_new(ThinvmTemplateBringOver, 1);
        *d = (ThinvmTemplateBringOver) {
            .state = b->state,
            .disk = g_strdup(b->store->disk->name),
            .bytes = b->done,
            .speed = b->speed,
            .problem = g_strdup(b->problem),
        };
    }
    return d;
}

void reader_bring_over_join(TemplateReader *r)
{
    if (r->bring.started) {
        qemu_thread_join(&r->bring.thread);
    }
}
