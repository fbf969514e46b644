/*
 * thinvm durability layer: a follower's memory is filled ahead of need
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * What makes a hand-over warm.  While a store follows another owner, its
 * mapping is read in bounded steps (thinvm_store_preload()); and when the
 * owner's checkpoints have moved on, so that a state on the new base is built,
 * that one takes over the pages which the base has in common with the state
 * before (thinvm_preload_adopt(), called by replay.c).  Hence taking
 * ownership reads what is new in the journal and no more.
 *
 * Nothing here writes to the device, and nothing depends on success: a page
 * that is not in memory is read when it is needed.
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/lockable.h"
#include "qapi/qapi-types-block-core.h"
#include "store-int.h"
#include "trace.h"

/* Pages of one step, and how far one read may reach over what is not wanted */
#define THINVM_PRELOAD_STEP     64
#define THINVM_PRELOAD_GAP      8
#define THINVM_PRELOAD_READ     128     /* pages of one read, at most */

/* ------------------------------------------------------------------ */
/* Reading many pages                                                  */

static int compare_refs(const void *a, const void *b)
{
    const ThinvmPageRef *ra = a, *rb = b;

    return ra->page < rb->page ? -1 : ra->page > rb->page;
}

/* How many of @ref[] one read serves, and how many pages that reads */
static unsigned batch_length(const ThinvmPageRef *ref, unsigned nb,
                             unsigned *pages)
{
    unsigned n = 1;

    *pages = 1;
    while (n < nb && ref[n].page - ref[n - 1].page <= THINVM_PRELOAD_GAP &&
           ref[n].page - ref[0].page < THINVM_PRELOAD_READ) {
        *pages = ref[n].page - ref[0].page + 1;
        n++;
    }
    return n;
}

/* thinvm_store_read_wanted() for many pages, which may lie side by side */
static int coroutine_fn read_many(ThinvmStore *st, ThinvmState *s,
                                  ThinvmNeeds *needs, Error **errp)
{
    unsigned nb = needs->nb_want, n, pages;
    g_autofree ThinvmPageRef *refs =
        g_memdup2(needs->want, nb * sizeof(ThinvmPageRef));
    g_autofree uint8_t *buf = g_malloc(THINVM_PRELOAD_READ * THINVM_PAGE_SIZE);
    int ret = 0;

    qsort(refs, nb, sizeof(*refs), compare_refs);
    for (unsigned i = 0; i < nb && ret == 0; i += n) {
        n = batch_length(refs + i, nb - i, &pages);
        ret = thinvm_store_pread(st, refs[i].page * THINVM_PAGE_SIZE,
                                 pages * THINVM_PAGE_SIZE, buf,
                                 BLKDBG_THINVM_MAP_READ);
        if (ret < 0) {
            error_setg_errno(errp, -ret, "Could not read %u metadata pages "
                             "from %" PRIu64, pages, refs[i].page);
            break;
        }
        thinvm_state_lock(s);
        for (unsigned j = i; j < i + n && ret == 0; j++) {
            uint64_t at = refs[j].page - refs[i].page;

            ret = thinvm_state_insert_page(s, &refs[j],
                                           buf + at * THINVM_PAGE_SIZE,
                                           needs, errp);
        }
        thinvm_state_unlock(s);
    }
    return ret;
}

static void needs_drop(ThinvmState *s, ThinvmNeeds *needs)
{
    thinvm_state_lock(s);
    thinvm_needs_destroy(s, needs);
    thinvm_state_unlock(s);
}

/* ------------------------------------------------------------------ */
/* Adopting                                                            */

void coroutine_fn thinvm_preload_adopt(ThinvmStore *st, ThinvmState *s,
                                       uint64_t sequence)
{
    uint64_t adopted = 0;
    ThinvmNeeds needs;
    int ret;

    thinvm_needs_init(&needs);
    do {
        Error *local_err = NULL;

        thinvm_state_lock(s);
        thinvm_state_lock(st->state);
        ret = thinvm_state_adopt(s, st->state, sequence, &needs, &adopted);
        thinvm_state_unlock(st->state);
        thinvm_state_unlock(s);
        if (ret == -EAGAIN && read_many(st, s, &needs, &local_err) < 0) {
            /* Whoever needs the page will meet the error, if it lasts */
            error_free(local_err);
            ret = 0;
        }
    } while (ret == -EAGAIN);
    needs_drop(s, &needs);
    thinvm_state_adopt_counters(s, st->state);
    qatomic_set(&st->nb_adopted, st->nb_adopted + adopted);
    trace_thinvm_adopt(st, sequence, adopted);
}

/* ------------------------------------------------------------------ */
/* Preloading                                                          */

/* Take up what a fresh start has begun anew */
static void preload_sync(ThinvmStore *st, ThinvmStorePreload *p)
{
    uint64_t fresh = qatomic_read(&st->nb_fresh_starts);

    if (p->fresh_starts != fresh) {
        p->fresh_starts = fresh;
        p->state = THINVM_STORE_PRELOAD_RUNNING;
        memset(&p->cursor, 0, sizeof(p->cursor));
        p->hot.at = p->hot.pages = 0;
    }
}

/* Read what a step wants */
static void coroutine_fn preload_read(ThinvmStore *st, ThinvmState *s,
                                      ThinvmStorePreload *p,
                                      ThinvmNeeds *needs)
{
    unsigned nb = needs->nb_want;
    Error *local_err = NULL;
    int ret = read_many(st, s, needs, &local_err);

    if (ret < 0) {
        trace_thinvm_preload_failed(st, ret, error_get_pretty(local_err));
        error_free(local_err);
        p->state = THINVM_STORE_PRELOAD_FAILED;
    } else {
        p->pages += nb;
    }
}

/* The hot leaves first.  Whether there was anything left to do for them */
static bool coroutine_fn preload_hot_step(ThinvmStore *st, ThinvmState *s,
                                          ThinvmStorePreload *p)
{
    ThinvmNeeds needs;
    int ret;

    if (p->hot.at == p->hot.nb) {
        return false;
    }
    thinvm_needs_init(&needs);
    thinvm_state_lock(s);
    ret = thinvm_state_preload_hot(s, &p->hot, THINVM_PRELOAD_STEP, &needs);
    p->percent = thinvm_state_preload_percent(s, &p->cursor);
    thinvm_state_unlock(s);
    if (ret < 0) {
        preload_read(st, s, p, &needs);
    }
    needs_drop(s, &needs);
    return true;
}

static void coroutine_fn preload_step(ThinvmStore *st, ThinvmState *s,
                                      ThinvmStorePreload *p)
{
    ThinvmWarmCursor cursor = p->cursor;
    ThinvmNeeds needs;
    bool full;
    int ret;

    thinvm_needs_init(&needs);
    thinvm_state_lock(s);
    ret = thinvm_state_preload(s, &cursor, THINVM_PRELOAD_STEP, &needs);
    full = ret < 0 && thinvm_state_cache_full(s, needs.nb_want);
    p->percent = thinvm_state_preload_percent(s, full ? &p->cursor : &cursor);
    thinvm_state_unlock(s);
    if (ret == 0) {
        p->state = THINVM_STORE_PRELOAD_COMPLETE;
    } else if (full) {
        p->state = THINVM_STORE_PRELOAD_FULL;
    } else {
        preload_read(st, s, p, &needs);
        if (p->state == THINVM_STORE_PRELOAD_RUNNING) {
            p->cursor = cursor;
        }
    }
    needs_drop(s, &needs);
}

bool coroutine_fn thinvm_store_preload(ThinvmStore *st, ThinvmStorePreload *p)
{
    unsigned token;

    preload_sync(st, p);
    if (p->state != THINVM_STORE_PRELOAD_RUNNING) {
        return false;
    }
    /* A state that is replaced meanwhile is kept until we have left */
    token = thinvm_store_request_begin(st);
    if (!preload_hot_step(st, thinvm_store_state(st), p)) {
        preload_step(st, thinvm_store_state(st), p);
    }
    trace_thinvm_preload(st, p->state, p->pages, p->percent, p->hot.at);
    thinvm_store_request_end(st, token);
    return p->state == THINVM_STORE_PRELOAD_RUNNING;
}

void thinvm_store_preload_hot(ThinvmStorePreload *p, const uint32_t *leaf,
                              unsigned nb)
{
    p->hot = (ThinvmHotCursor) { .leaf = leaf, .nb = nb };
    if (nb && p->state == THINVM_STORE_PRELOAD_FULL) {
        p->state = THINVM_STORE_PRELOAD_RUNNING;
    }
}

void thinvm_store_preload_retry(ThinvmStorePreload *p)
{
    if (p->state == THINVM_STORE_PRELOAD_FAILED) {
        p->state = THINVM_STORE_PRELOAD_RUNNING;
    }
}
