/*
 * A disk in memory whose writes wait until a test lets them through
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A driver of QEMU's block layer for unit tests.  Only pages that something
 * was written to take memory, so a disk may be as large as it likes; others
 * are zero, and said to be.  Writes and flushes pass a gate each.  Requests may
 * come from any thread; the gates are opened and closed from the main loop.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/iov.h"
#include "thinvm-gate-disk.h"

/* Of the disk that is made next */
static int64_t next_length;

void gate_open(GateDisk *d, Gate *g)
{
    qemu_mutex_lock(&d->lock);
    g->closed = false;
    g->tickets = 0;
    while (qemu_co_enter_next(&g->waiting, &d->lock)) {
        /* each goes through */
    }
    qemu_mutex_unlock(&d->lock);
}

void gate_close(GateDisk *d, Gate *g)
{
    QEMU_LOCK_GUARD(&d->lock);
    g->closed = true;
}

void gate_let_one(GateDisk *d, Gate *g)
{
    qemu_mutex_lock(&d->lock);
    g->tickets++;
    qemu_co_enter_next(&g->waiting, &d->lock);
    qemu_mutex_unlock(&d->lock);
}

int gate_held(GateDisk *d, const Gate *g)
{
    QEMU_LOCK_GUARD(&d->lock);
    return g->held;
}

int gate_begun(GateDisk *d, const Gate *g)
{
    QEMU_LOCK_GUARD(&d->lock);
    return g->begun;
}

static void coroutine_fn gate_pass(GateDisk *d, Gate *g)
{
    QEMU_LOCK_GUARD(&d->lock);
    g->begun++;
    g->held++;
    while (g->closed && !g->tickets) {
        qemu_co_queue_wait(&g->waiting, &d->lock);
    }
    g->held--;
    if (g->closed) {
        g->tickets--;
    }
}

/* Does something with the pages of a range; @buf NULL for zeroes */
static void disk_put(GateDisk *d, int64_t offset, int64_t bytes,
                     const uint8_t *buf)
{
    QEMU_LOCK_GUARD(&d->lock);
    g_assert_cmpint(offset + bytes, <=, d->length);
    while (bytes) {
        int64_t key = offset / GATE_PAGE, in = offset % GATE_PAGE;
        int64_t n = MIN(bytes, GATE_PAGE - in);
        uint8_t *page = g_hash_table_lookup(d->pages, &key);

        if (!buf && n == GATE_PAGE) {
            g_hash_table_remove(d->pages, &key);
        } else {
            if (!page) {
                page = g_malloc0(GATE_PAGE);
                g_hash_table_insert(d->pages, g_memdup2(&key, sizeof(key)),
                                    page);
            }
            if (buf) {
                memcpy(page + in, buf, n);
                buf += n;
            } else {
                memset(page + in, 0, n);
            }
        }
        offset += n;
        bytes -= n;
    }
}

static void disk_get(GateDisk *d, int64_t offset, int64_t bytes, uint8_t *buf)
{
    QEMU_LOCK_GUARD(&d->lock);
    g_assert_cmpint(offset + bytes, <=, d->length);
    while (bytes) {
        int64_t key = offset / GATE_PAGE, in = offset % GATE_PAGE;
        int64_t n = MIN(bytes, GATE_PAGE - in);
        uint8_t *page = g_hash_table_lookup(d->pages, &key);

        if (page) {
            memcpy(buf, page + in, n);
        } else {
            memset(buf, 0, n);
        }
        buf += n;
        offset += n;
        bytes -= n;
    }
}

void gate_disk_fill(GateDisk *d, int64_t offset, int64_t bytes, uint8_t byte)
{
    g_autofree uint8_t *buf = g_malloc(bytes);

    memset(buf, byte, bytes);
    disk_put(d, offset, bytes, buf);
}

uint8_t gate_disk_byte(GateDisk *d, int64_t offset)
{
    uint8_t byte;

    disk_get(d, offset, 1, &byte);
    return byte;
}

/* What one has the other has */
static void disk_assert_has(GateDisk *d, GateDisk *other)
{
    GHashTableIter i;
    void *key, *page;

    g_hash_table_iter_init(&i, d->pages);
    while (g_hash_table_iter_next(&i, &key, &page)) {
        int64_t offset = *(int64_t *)key * GATE_PAGE;
        int64_t n = MIN(GATE_PAGE, d->length - offset);
        uint8_t buf[GATE_PAGE];

        disk_get(other, offset, n, buf);
        g_assert_cmpmem(buf, n, page, n);
    }
}

void gate_disk_assert_same(GateDisk *a, GateDisk *b)
{
    g_assert_cmpint(a->length, ==, b->length);
    disk_assert_has(a, b);
    disk_assert_has(b, a);
}

static int disk_open(BlockDriverState *bs, QDict *options, int flags,
                     Error **errp)
{
    GateDisk *d = bs->opaque;

    d->length = next_length;
    qemu_mutex_init(&d->lock);
    qemu_co_queue_init(&d->writes.waiting);
    qemu_co_queue_init(&d->flushes.waiting);
    d->pages = g_hash_table_new_full(g_int64_hash, g_int64_equal, g_free,
                                     g_free);
    return 0;
}

static void disk_close(BlockDriverState *bs)
{
    GateDisk *d = bs->opaque;

    g_hash_table_unref(d->pages);
    qemu_mutex_destroy(&d->lock);
}

static int64_t coroutine_fn disk_getlength(BlockDriverState *bs)
{
    GateDisk *d = bs->opaque;

    return d->length;
}

static int coroutine_fn disk_preadv(BlockDriverState *bs, int64_t offset,
                                    int64_t bytes, QEMUIOVector *qiov,
                                    BdrvRequestFlags flags)
{
    g_autofree uint8_t *buf = g_malloc(bytes);

    disk_get(bs->opaque, offset, bytes, buf);
    qemu_iovec_from_buf(qiov, 0, buf, bytes);
    return 0;
}

/* A write begins: waits, and may fail */
static int coroutine_fn disk_begin(GateDisk *d)
{
    int ret;

    if (d->look) {
        d->look();
    }
    gate_pass(d, &d->writes);
    ret = d->fails;
    d->fails = 0;
    return ret;
}

static int coroutine_fn disk_pwritev(BlockDriverState *bs, int64_t offset,
                                     int64_t bytes, QEMUIOVector *qiov,
                                     BdrvRequestFlags flags)
{
    g_autofree uint8_t *buf = g_malloc(bytes);
    int ret = disk_begin(bs->opaque);

    if (ret >= 0) {
        qemu_iovec_to_buf(qiov, 0, buf, bytes);
        disk_put(bs->opaque, offset, bytes, buf);
    }
    return ret;
}

static int coroutine_fn disk_pwrite_zeroes(BlockDriverState *bs,
                                           int64_t offset, int64_t bytes,
                                           BdrvRequestFlags flags)
{
    int ret = disk_begin(bs->opaque);

    if (ret >= 0) {
        disk_put(bs->opaque, offset, bytes, NULL);
    }
    return ret;
}

static int coroutine_fn disk_pdiscard(BlockDriverState *bs, int64_t offset,
                                      int64_t bytes)
{
    GateDisk *d = bs->opaque;

    if (!d->keeps_discarded) {
        disk_put(d, offset, bytes, NULL);
    }
    return d->fails_discard;
}

static int coroutine_fn disk_flush(BlockDriverState *bs)
{
    GateDisk *d = bs->opaque;

    gate_pass(d, &d->flushes);
    return 0;
}

/* The first page at or behind the number that there is; INT64_MAX for none */
static int64_t disk_next_page(GateDisk *d, int64_t number)
{
    int64_t found = INT64_MAX;
    GHashTableIter i;
    void *key;

    g_hash_table_iter_init(&i, d->pages);
    while (g_hash_table_iter_next(&i, &key, NULL)) {
        if (*(int64_t *)key >= number) {
            found = MIN(found, *(int64_t *)key);
        }
    }
    return found;
}

static int coroutine_fn disk_block_status(BlockDriverState *bs, bool want_zero,
                                          int64_t offset, int64_t bytes,
                                          int64_t *pnum, int64_t *map,
                                          BlockDriverState **file)
{
    GateDisk *d = bs->opaque;
    int64_t first = offset / GATE_PAGE, end = first;

    QEMU_LOCK_GUARD(&d->lock);
    while (end * GATE_PAGE < offset + bytes &&
           g_hash_table_lookup(d->pages, &end)) {
        end++;
    }
    if (end > first) {
        *pnum = MIN(end * GATE_PAGE - offset, bytes);
        return BDRV_BLOCK_DATA;
    }
    end = MIN(disk_next_page(d, first), d->length / GATE_PAGE + 1);
    *pnum = MIN(end * GATE_PAGE - offset, bytes);
    return BDRV_BLOCK_ZERO;
}

static BlockDriver disk_driver = {
    .format_name            = "gate-disk",
    .instance_size          = sizeof(GateDisk),
    .bdrv_open              = disk_open,
    .bdrv_close             = disk_close,
    .bdrv_co_getlength      = disk_getlength,
    .bdrv_co_preadv         = disk_preadv,
    .bdrv_co_pwritev        = disk_pwritev,
    .bdrv_co_pwrite_zeroes  = disk_pwrite_zeroes,
    .bdrv_co_pdiscard       = disk_pdiscard,
    .bdrv_co_flush          = disk_flush,
    .bdrv_co_block_status   = disk_block_status,
};

BlockDriverState *gate_disk_new(const char *name, int64_t length, GateDisk **d)
{
    BlockDriverState *bs;

    next_length = length;
    bs = bdrv_new_open_driver(&disk_driver, name, BDRV_O_RDWR | BDRV_O_UNMAP,
                              &error_abort);
    *d = bs->opaque;
    return bs;
}
