/*
 * thinvm driver layer: the devices that a store works on
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Two kinds of ThinvmDevice: over the file child of a thinvm node, for all
 * work on an open image, and over a block backend, for creating one.  The
 * calls of the first kind run under the graph lock that their caller holds;
 * a backend takes it by itself.
 *
 * Invariant 6 is watched here: when a write of metadata fails, the mode
 * machine looks whether the image is still ours before anybody repeats it.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qapi/qapi-types-block-core.h"
#include "block/block_int.h"
#include "system/block-backend.h"
#include "thinvm.h"
#include "trace.h"

/* ------------------------------------------------------------------ */
/* Over bs->file                                                       */

static BlockDriverState *thinvm_device_bs(ThinvmDevice *dev)
{
    return container_of(dev, BDRVThinvmState, device)->bs;
}

static void coroutine_fn GRAPH_RDLOCK
thinvm_node_event(ThinvmDevice *dev, int event)
{
    BlockDriverState *bs = thinvm_device_bs(dev);

    trace_thinvm_io_point(bs, BlkdebugEvent_str(event));
    BLKDBG_CO_EVENT(bs->file, event);
}

static int coroutine_fn GRAPH_RDLOCK
thinvm_node_pread(ThinvmDevice *dev, uint64_t offset, uint64_t bytes,
                  void *buf)
{
    BlockDriverState *bs = thinvm_device_bs(dev);

    return bdrv_co_pread(bs->file, offset, bytes, buf, 0);
}

static int coroutine_fn GRAPH_RDLOCK
thinvm_node_pwrite(ThinvmDevice *dev, uint64_t offset, uint64_t bytes,
                   const void *buf)
{
    BlockDriverState *bs = thinvm_device_bs(dev);
    int ret = bdrv_co_pwrite(bs->file, offset, bytes, buf, 0);

    if (ret < 0) {
        trace_thinvm_metadata_write_failed(bs, offset, bytes, ret);
        thinvm_mode_write_failed(bs);
    }
    return ret;
}

static int coroutine_fn GRAPH_RDLOCK thinvm_node_flush(ThinvmDevice *dev)
{
    return bdrv_co_flush(thinvm_device_bs(dev)->file->bs);
}

static int coroutine_fn GRAPH_RDLOCK
thinvm_node_pdiscard(ThinvmDevice *dev, uint64_t offset, uint64_t bytes)
{
    return bdrv_co_pdiscard(thinvm_device_bs(dev)->file, offset, bytes);
}

/*
 * The block layer remembers lengths, but another owner may have made the file
 * longer since.  A stale length would be worse than wrong: "growing" to less
 * than the real one cuts the end off.
 */
static int coroutine_fn GRAPH_RDLOCK
thinvm_refresh_length(BlockDriverState *bs)
{
    BlockDriverState *child = bdrv_primary_bs(bs);
    int ret = 0;

    if (child) {
        ret = thinvm_refresh_length(child);
    }
    return ret < 0 ? ret : bdrv_co_refresh_total_sectors(bs,
                                                         bs->total_sectors);
}

static int64_t coroutine_fn GRAPH_RDLOCK
thinvm_node_length(ThinvmDevice *dev)
{
    BlockDriverState *bs = thinvm_device_bs(dev)->file->bs;
    int ret = thinvm_refresh_length(bs);

    return ret < 0 ? ret : bdrv_co_getlength(bs);
}

/*
 * For a device of fixed size this is also what makes it be asked for its
 * capacity again, after somebody has enlarged it.
 */
static int coroutine_fn GRAPH_RDLOCK
thinvm_node_grow(ThinvmDevice *dev, uint64_t bytes)
{
    BlockDriverState *bs = thinvm_device_bs(dev);
    int64_t length = thinvm_node_length(dev);
    int ret;

    if (length < 0) {
        return length;
    }
    if (length >= bytes) {
        return 0;
    }
    if (bytes > INT64_MAX) {
        return -EFBIG;
    }
    thinvm_node_event(dev, BLKDBG_THINVM_GROW);
    ret = bdrv_co_truncate(bs->file, bytes, false, PREALLOC_MODE_OFF, 0, NULL);
    trace_thinvm_device_grow(bs, length, bytes, ret);
    /* A real I/O error is told as such; "cannot be resized" means full */
    if (ret == -EINVAL || ret == -ENOTSUP || ret == -EFBIG) {
        ret = -ENOSPC;
    }
    return ret < 0 ? ret : 0;
}

void thinvm_device_init_node(BDRVThinvmState *s)
{
    s->device = (ThinvmDevice) {
        .co_pread = thinvm_node_pread,
        .co_pwrite = thinvm_node_pwrite,
        .co_flush = thinvm_node_flush,
        .co_pdiscard = thinvm_node_pdiscard,
        .co_length = thinvm_node_length,
        .co_grow = thinvm_node_grow,
        .co_event = thinvm_node_event,
    };
}

bool thinvm_device_coherent(BlockDriverState *bs)
{
    BlockDriverState *protocol = bs->file->bs;

    while (bdrv_primary_bs(protocol)) {
        protocol = bdrv_primary_bs(protocol);
    }
    /*
     * Only file-posix puts the host's page cache in between; the network
     * protocols send every read to the other side.
     */
    if (protocol->drv && (!strcmp(protocol->drv->format_name, "file") ||
                          !strcmp(protocol->drv->format_name,
                                  "host_device"))) {
        return protocol->open_flags & BDRV_O_NOCACHE;
    }
    return true;
}

/* ------------------------------------------------------------------ */
/* Over a block backend                                                */

static BlockBackend *thinvm_device_blk(ThinvmDevice *dev)
{
    return container_of(dev, ThinvmBlkDevice, device)->blk;
}

static int coroutine_fn
thinvm_blk_pread(ThinvmDevice *dev, uint64_t offset, uint64_t bytes, void *buf)
{
    BlockBackend *blk = thinvm_device_blk(dev);
    int64_t length = blk_co_getlength(blk);
    uint64_t within;
    int ret;

    if (length < 0) {
        return length;
    }
    /* A backend refuses to read beyond its end, where a node reads zeroes */
    within = offset < length ? MIN(bytes, length - offset) : 0;
    if (within) {
        ret = blk_co_pread(blk, offset, within, buf, 0);
        if (ret < 0) {
            return ret;
        }
    }
    memset((uint8_t *)buf + within, 0, bytes - within);
    return 0;
}

static int coroutine_fn
thinvm_blk_pwrite(ThinvmDevice *dev, uint64_t offset, uint64_t bytes,
                  const void *buf)
{
    return blk_co_pwrite(thinvm_device_blk(dev), offset, bytes, buf, 0);
}

static int coroutine_fn thinvm_blk_flush(ThinvmDevice *dev)
{
    return blk_co_flush(thinvm_device_blk(dev));
}

static int coroutine_fn
thinvm_blk_pdiscard(ThinvmDevice *dev, uint64_t offset, uint64_t bytes)
{
    return blk_co_pdiscard(thinvm_device_blk(dev), offset, bytes, 0);
}

static int64_t coroutine_fn thinvm_blk_length(ThinvmDevice *dev)
{
    return blk_co_getlength(thinvm_device_blk(dev));
}

static int coroutine_fn thinvm_blk_grow(ThinvmDevice *dev, uint64_t bytes)
{
    BlockBackend *blk = thinvm_device_blk(dev);
    int64_t length = blk_co_getlength(blk);
    int ret;

    if (length < 0) {
        return length;
    }
    if (length >= bytes) {
        return 0;
    }
    if (bytes > INT64_MAX) {
        return -EFBIG;
    }
    ret = blk_co_truncate(blk, bytes, false, PREALLOC_MODE_OFF, 0, NULL);
    if (ret == -EINVAL || ret == -ENOTSUP || ret == -EFBIG) {
        ret = -ENOSPC;
    }
    return ret < 0 ? ret : 0;
}

void thinvm_device_init_blk(ThinvmBlkDevice *d, BlockBackend *blk)
{
    d->blk = blk;
    d->device = (ThinvmDevice) {
        .co_pread = thinvm_blk_pread,
        .co_pwrite = thinvm_blk_pwrite,
        .co_flush = thinvm_blk_flush,
        .co_pdiscard = thinvm_blk_pdiscard,
        .co_length = thinvm_blk_length,
        .co_grow = thinvm_blk_grow,
    };
}
