/*
 * Unit test of inactivating a thinvm node that is in use
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Requests that come while a node is drained are queued by the backend, and go
 * on when that ends; so does each part of a long DMA, which the end of the part
 * before begins.  A node that has been inactivated must not be the owner, and
 * nothing may be written then: QEMU would abort.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/main-loop.h"
#include "qemu/units.h"
#include "qobject/qdict.h"
#include "system/block-backend.h"
#include "block/thinvm/thinvm.h"

#define SIZE    (64 * MiB)
#define PART    (64 * KiB)

/* A DMA: each part begins when the one before has ended */
typedef struct Chain {
    BlockBackend *blk;
    QEMUIOVector qiov;
    int parts, done;
} Chain;

static void chain_part_ended(void *opaque, int ret);

static void chain_next(Chain *c)
{
    blk_aio_pwritev(c->blk, (int64_t)c->done * PART, &c->qiov, 0,
                    chain_part_ended, c);
}

static void chain_part_ended(void *opaque, int ret)
{
    Chain *c = opaque;

    g_assert_cmpint(ret, ==, 0);
    c->done++;
    if (c->done < c->parts) {
        chain_next(c);
    }
}

static BlockBackend *open_image(const char *path)
{
    QDict *options = qdict_new();
    BlockBackend *blk;

    qdict_put_str(options, "driver", "thinvm");
    qdict_put_str(options, "file.driver", "file");
    qdict_put_str(options, "file.filename", path);
    blk = blk_new_open(NULL, NULL, options, BDRV_O_RDWR, &error_abort);
    blk_set_force_allow_inactivate(blk);
    return blk;
}

static void inactivate_during(const char *path, int parts)
{
    BlockBackend *blk = open_image(path);
    BDRVThinvmState *s = blk_bs(blk)->opaque;
    g_autofree uint8_t *buf = g_malloc(PART), *read = g_malloc(PART);
    Chain c = { .blk = blk, .parts = parts };

    memset(buf, 0x10 + parts, PART);
    qemu_iovec_init_buf(&c.qiov, buf, PART);
    chain_next(&c);
    g_assert_cmpint(bdrv_inactivate(blk_bs(blk), &error_abort), ==, 0);
    g_assert_cmpint(c.done, ==, parts);
    g_assert(bdrv_is_inactive(blk_bs(blk)));
    g_assert(!s->owner);

    g_assert_cmpint(bdrv_activate(blk_bs(blk), &error_abort), ==, 0);
    g_assert(s->owner);
    for (int i = 0; i < parts; i++) {
        g_assert_cmpint(blk_pread(blk, (int64_t)i * PART, PART, read, 0), ==,
                        0);
        g_assert_cmpmem(read, PART, buf, PART);
    }
    blk_unref(blk);
}

static void test_dma(void)
{
    g_autofree char *path = NULL;
    int fd = g_file_open_tmp("thinvm-inactivate-XXXXXX", &path, NULL);

    g_assert_cmpint(fd, >=, 0);
    close(fd);
    bdrv_img_create(path, "thinvm", NULL, NULL, NULL, SIZE, BDRV_O_RDWR, true,
                    &error_abort);
    for (int parts = 1; parts <= 4; parts++) {
        inactivate_during(path, parts);
    }
    unlink(path);
}

int main(int argc, char **argv)
{
    bdrv_init();
    qemu_init_main_loop(&error_abort);
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/thinvm/inactivate/dma", test_dma);
    return g_test_run();
}
