/*
 * thinvm durability layer: metadata pages are read from the device
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * What the engine wants (ThinvmNeeds) is read and handed to it; it believes
 * nothing that does not have the checksum which a parent says.
 *
 * Latency is what a page costs, not its size.  So a look-up that lacks one
 * page has those of its siblings read as well that lie in the same aligned
 * 64 KiB, as long as the cache has room that nobody uses: a disk that was
 * just opened finds its mapping with a sixteenth of the reads.  They are a
 * gift.  Should they not be readable, or be gone by now, nobody is told, and
 * the page that is wanted is read by itself, as are the others of that block
 * from then on: a device may try for long before it says so.  Who lacks a page
 * of a block that somebody else is reading waits for that, once; and when
 * several blocks are being read, pages are again read one by one: data shares
 * the device.
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/lockable.h"
#include "qemu/memalign.h"
#include "qapi/qapi-types-block-core.h"
#include "store-int.h"

#define BLOCK_SIZE  (THINVM_BLOCK_PAGES * THINVM_PAGE_SIZE)

static int page_event(ThinvmPageKind kind)
{
    switch (kind) {
    case THINVM_PAGE_MAP_LEAF:
    case THINVM_PAGE_MAP_INNER:
        return BLKDBG_THINVM_MAP_READ;
    case THINVM_PAGE_COUNT_LEAF:
    case THINVM_PAGE_COUNT_INNER:
        return BLKDBG_THINVM_COUNT_READ;
    default:
        return BLKDBG_THINVM_PAGE_READ;
    }
}

/* ------------------------------------------------------------------ */
/* A page                                                              */

/*
 * Aligned, or the device below would take one of its own and another thread.
 * Kept, or the pages that come to stay would lie scattered among them.
 */
static void *page_buffer_get(ThinvmStore *st)
{
    WITH_QEMU_LOCK_GUARD(&st->lock) {
        if (st->nb_page_buffers) {
            return st->page_buffers[--st->nb_page_buffers];
        }
    }
    return qemu_memalign(THINVM_PAGE_SIZE, THINVM_PAGE_SIZE);
}

static void page_buffer_put(ThinvmStore *st, void *buf)
{
    WITH_QEMU_LOCK_GUARD(&st->lock) {
        if (st->nb_page_buffers < THINVM_PAGE_BUFFERS) {
            st->page_buffers[st->nb_page_buffers++] = buf;
            return;
        }
    }
    qemu_vfree(buf);
}

static int coroutine_fn read_page(ThinvmStore *st, ThinvmState *s,
                                  ThinvmNeeds *needs, ThinvmPageRef ref,
                                  Error **errp)
{
    void *buf = page_buffer_get(st);
    int ret = thinvm_store_pread(st, ref.page * THINVM_PAGE_SIZE,
                                 THINVM_PAGE_SIZE, buf, page_event(ref.kind));

    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not read metadata page %" PRIu64,
                         ref.page);
    } else {
        thinvm_state_lock(s);
        ret = thinvm_state_insert_page(s, &ref, buf, needs, errp);
        thinvm_state_unlock(s);
    }
    page_buffer_put(st, buf);
    return ret;
}

/* ------------------------------------------------------------------ */
/* A block                                                             */

void thinvm_page_read_init(ThinvmStore *st)
{
    st->bad_block = UINT64_MAX;     /* none */
    for (unsigned i = 0; i < THINVM_BLOCK_READS; i++) {
        qemu_co_queue_init(&st->block_reads[i].waiters);
    }
}

void thinvm_page_read_destroy(ThinvmStore *st)
{
    while (st->nb_page_buffers) {
        qemu_vfree(st->page_buffers[--st->nb_page_buffers]);
    }
    for (unsigned i = 0; i < THINVM_BLOCK_READS; i++) {
        assert(!st->block_reads[i].active);
        qemu_vfree(st->block_reads[i].buf);
    }
}

/*
 * Begin to read the block, if few are being read.  If this one is, by
 * somebody else: wait for him, and say so.
 */
static ThinvmBlockRead *coroutine_fn block_begin(ThinvmStore *st,
                                                 uint64_t block, bool *waited)
{
    ThinvmBlockRead *found = NULL;

    QEMU_LOCK_GUARD(&st->lock);
    if (block == st->bad_block) {
        return NULL;
    }
    for (unsigned i = 0; i < THINVM_BLOCK_READS; i++) {
        ThinvmBlockRead *r = &st->block_reads[i];

        if (r->active && r->block == block) {
            qemu_co_queue_wait(&r->waiters, &st->lock);
            *waited = true;
            return NULL;
        }
        found = r->active ? found : r;
    }
    if (found) {
        found->active = true;
        found->block = block;
        if (!found->buf) {
            found->buf = qemu_memalign(THINVM_PAGE_SIZE, BLOCK_SIZE);
        }
    }
    return found;
}

static void block_end(ThinvmStore *st, ThinvmBlockRead *r, bool bad)
{
    QEMU_LOCK_GUARD(&st->lock);
    r->active = false;
    if (bad) {
        st->bad_block = r->block;
    }
    qemu_co_queue_restart_all(&r->waiters);
}

static int insert_wanted(ThinvmState *s, ThinvmNeeds *needs, const void *buf)
{
    int ret;

    thinvm_state_lock(s);
    ret = thinvm_state_insert_page(s, &needs->want[0], buf, needs, NULL);
    thinvm_state_unlock(s);
    return ret;
}

/* The lock is for others in between: judging a page takes its time */
static void insert_neighbour(ThinvmState *s, ThinvmNeeds *needs, unsigned i,
                             const void *buf)
{
    thinvm_state_lock(s);
    thinvm_state_insert_neighbour(s, &needs->near[i], buf, needs);
    thinvm_state_unlock(s);
}

/*
 * want[0] with its neighbours.  0, or a negative number: nothing came of it;
 * *@bad: since the device could not read it.
 */
static int coroutine_fn read_together(ThinvmStore *st, ThinvmState *s,
                                      ThinvmNeeds *needs, uint8_t *buf,
                                      bool *bad)
{
    const ThinvmPageRef *want = &needs->want[0];
    uint64_t first = want->page, last = want->page;
    int ret;

    for (unsigned i = 0; i < needs->nb_near; i++) {
        first = MIN(first, needs->near[i].page);
        last = MAX(last, needs->near[i].page);
    }
    assert(last - first < THINVM_BLOCK_PAGES);
    ret = thinvm_store_pread(st, first * THINVM_PAGE_SIZE,
                             (last - first + 1) * THINVM_PAGE_SIZE, buf,
                             page_event(want->kind));
    *bad = ret < 0;
    if (ret == 0) {
        ret = insert_wanted(s, needs,
                            buf + (want->page - first) * THINVM_PAGE_SIZE);
    }
    for (unsigned i = 0; i < needs->nb_near && ret == 0; i++) {
        insert_neighbour(s, needs, i, buf + (needs->near[i].page - first) *
                                      THINVM_PAGE_SIZE);
    }
    return ret;
}

/* true: ask again, the page may be there */
static bool coroutine_fn read_block(ThinvmStore *st, ThinvmState *s,
                                    ThinvmNeeds *needs)
{
    uint64_t page = needs->want[0].page;
    bool done = false, bad;
    ThinvmBlockRead *r;

    if (needs->waited == page) {
        return false;           /* it did not come, or has gone: no luck */
    }
    r = block_begin(st, page / THINVM_BLOCK_PAGES, &done);
    if (r) {
        done = read_together(st, s, needs, r->buf, &bad) == 0;
        block_end(st, r, bad);
    } else if (done) {
        needs->waited = page;
    }
    return done;
}

int coroutine_fn thinvm_store_read_wanted(ThinvmStore *st, ThinvmState *s,
                                          ThinvmNeeds *needs, Error **errp)
{
    int ret = 0;

    /* A look-up lacks one page, whose neighbours these are */
    if (needs->nb_want == 1 && needs->nb_near && read_block(st, s, needs)) {
        return 0;
    }
    /* _insert_page() leaves want[] as it is; the next call starts a new one */
    for (unsigned i = 0; i < needs->nb_want && ret == 0; i++) {
        ret = read_page(st, s, needs, needs->want[i], errp);
    }
    return ret;
}
