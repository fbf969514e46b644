/*
 * A node with the driver's own data path, for thinvm's unit tests
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See thinvm-node.h.
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "thinvm-node.h"
#include "thinvm-sim-image.h"
#include "block/thinvm/store-int.h"

void coroutine_fn (*test_node_event)(BlkdebugEvent event);

typedef struct TestNode {
    BlockDriverState bs, file_bs;
    BdrvChild file;
    BDRVThinvmState s;
} TestNode;

BlockDriverState *test_node_new(ThinvmStore *st, uint64_t size)
{
    TestNode *n = g_new0(TestNode, 1);

    n->file_bs.opaque = st;
    n->file.bs = &n->file_bs;
    n->bs.opaque = &n->s;
    n->bs.file = &n->file;
    n->bs.total_sectors = size >> BDRV_SECTOR_BITS;
    n->s.bs = &n->bs;
    n->s.store = st;
    n->s.cluster_bits = IMAGE_CLUSTER_BITS;
    n->s.cluster_size = IMAGE_CLUSTER;
    n->s.mode = THINVM_CACHE_MODE_WRITEBACK;
    n->s.owner = true;
    thinvm_io_init(&n->s);
    return &n->bs;
}

void test_node_free(BlockDriverState *bs)
{
    TestNode *n = container_of(bs, TestNode, bs);

    thinvm_io_destroy(&n->s);
    g_free(n);
}

/* ------------------------------------------------------------------ */
/* The block layer                                                     */

static ThinvmDevice *device_of(BdrvChild *child)
{
    ThinvmStore *st = child->bs->opaque;

    return st->dev;
}

int coroutine_fn bdrv_co_preadv_part(BdrvChild *child, int64_t offset,
                                     int64_t bytes, QEMUIOVector *qiov,
                                     size_t qiov_offset,
                                     BdrvRequestFlags flags)
{
    g_autofree uint8_t *buf = g_malloc(bytes);
    ThinvmDevice *dev = device_of(child);
    int ret = dev->co_pread(dev, offset, bytes, buf);

    qemu_iovec_from_buf(qiov, qiov_offset, buf, bytes);
    return ret;
}

int coroutine_fn bdrv_co_preadv(BdrvChild *child, int64_t offset,
                                int64_t bytes, QEMUIOVector *qiov,
                                BdrvRequestFlags flags)
{
    return bdrv_co_preadv_part(child, offset, bytes, qiov, 0, flags);
}

int coroutine_fn bdrv_co_pwritev_part(BdrvChild *child, int64_t offset,
                                      int64_t bytes, QEMUIOVector *qiov,
                                      size_t qiov_offset,
                                      BdrvRequestFlags flags)
{
    g_autofree uint8_t *buf = g_malloc(bytes);
    ThinvmDevice *dev = device_of(child);

    qemu_iovec_to_buf(qiov, qiov_offset, buf, bytes);
    return dev->co_pwrite(dev, offset, bytes, buf);
}

int coroutine_fn bdrv_co_copy_range_to(BdrvChild *src, int64_t src_offset,
                                       BdrvChild *dst, int64_t dst_offset,
                                       int64_t bytes,
                                       BdrvRequestFlags read_flags,
                                       BdrvRequestFlags write_flags)
{
    return -ENOTSUP;
}

int coroutine_fn bdrv_co_copy_range_from(BdrvChild *src, int64_t src_offset,
                                         BdrvChild *dst, int64_t dst_offset,
                                         int64_t bytes,
                                         BdrvRequestFlags read_flags,
                                         BdrvRequestFlags write_flags)
{
    return 0;                   /* nobody looks at what was copied */
}

int64_t coroutine_fn bdrv_co_getlength(BlockDriverState *bs)
{
    return -ENOTSUP;            /* there is no backing file */
}

void coroutine_fn bdrv_co_debug_event(BlockDriverState *bs,
                                      BlkdebugEvent event)
{
    if (test_node_event) {
        test_node_event(event);
    }
}

void *qemu_try_blockalign(BlockDriverState *bs, size_t size)
{
    return qemu_try_memalign(SIM_SECTOR, size);
}

void *qemu_try_blockalign0(BlockDriverState *bs, size_t size)
{
    return memset(qemu_try_blockalign(bs, size), 0, size);
}

void assert_bdrv_graph_readable(void)
{
}

const char *bdrv_get_device_or_node_name(const BlockDriverState *bs)
{
    return "test";
}

/* ------------------------------------------------------------------ */
/* The driver                                                          */

bool thinvm_io_in_template(BlockDriverState *bs, const ThinvmMapping *m,
                           uint64_t offset, uint64_t bytes)
{
    return false;
}

int coroutine_fn thinvm_io_read_template(BlockDriverState *bs, uint64_t offset,
                                         uint64_t bytes, QEMUIOVector *qiov,
                                         size_t qiov_offset,
                                         BdrvRequestFlags flags)
{
    return -ENOTSUP;
}

int coroutine_fn thinvm_mode_begin_read(BlockDriverState *bs, ThinvmStore *st,
                                        ThinvmLook *look)
{
    BDRVThinvmState *s = bs->opaque;

    look->store = st;
    look->followed = s->follow;
    return look->followed ? thinvm_store_catch_up(st, NULL, NULL) : 0;
}

int coroutine_fn thinvm_mode_end_read(BlockDriverState *bs,
                                      const ThinvmLook *look, bool *repeat)
{
    BDRVThinvmState *s = bs->opaque;

    *repeat = s->store != look->store;
    return 0;
}

int coroutine_fn thinvm_mode_begin_write(BlockDriverState *bs)
{
    return 0;
}

int coroutine_fn thinvm_mode_commit_found(BlockDriverState *bs,
                                          uint64_t ticket, bool found)
{
    return 0;
}

bool coroutine_fn thinvm_claim_confirm(BDRVThinvmState *s)
{
    return true;
}

bool coroutine_fn thinvm_mode_write_failed(BlockDriverState *bs)
{
    return false;
}

int coroutine_fn thinvm_snapshot_still_there(BlockDriverState *bs,
                                             ThinvmStore *st)
{
    return 0;
}

int coroutine_fn thinvm_volume_reserve(BDRVThinvmState *s, ThinvmStore *st,
                                       uint64_t goal, uint64_t max,
                                       uint64_t *first, uint64_t *nb_clusters)
{
    return thinvm_store_reserve(st, goal, max, first, nb_clusters);
}
