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
 * Invariant 6 is watched here: a write of metadata begins only if the claim
 * counts, and when it fails, the mode machine looks whether the image is still
 * ours before anybody repeats it.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qapi/qapi-types-block-core.h"
#include "block/block_int.h"
#include "system/block-backend.h"
#include "thinvm.h"
#include "handover.h"
#include "trace.h"

/*
 * Bytes of a regular file that may be allocated ahead of what is written,
 * unless a sixteenth of it is less.
 */
#define THINVM_ALLOCATE_AHEAD   (16 * MiB)

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

/* Claims are made, and images taken over, by who is no owner yet */
static bool coroutine_fn GRAPH_RDLOCK
thinvm_node_may_write(BlockDriverState *bs)
{
    BDRVThinvmState *s = bs->opaque;

    return !qatomic_read(&s->lost) && thinvm_claim_counts(s);
}

static int coroutine_fn GRAPH_RDLOCK
thinvm_node_pwrite(ThinvmDevice *dev, uint64_t offset, uint64_t bytes,
                   const void *buf)
{
    BlockDriverState *bs = thinvm_device_bs(dev);
    int ret;

    if (!thinvm_node_may_write(bs)) {
        return -EIO;
    }
    ret = bdrv_co_pwrite(bs->file, offset, bytes, buf, 0);
    if (ret < 0) {
        trace_thinvm_metadata_write_failed(bs, offset, bytes, ret);
        if (thinvm_mode_write_failed(bs)) {
            ret = bdrv_co_pwrite(bs->file, offset, bytes, buf, 0);
        }
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
    BlockDriverState *bs = thinvm_device_bs(dev);

    return thinvm_node_may_write(bs) ? bdrv_co_pdiscard(bs->file, offset, bytes)
                                     : -EIO;
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

/* What is at the bottom of the chain that begins with @bs */
static BlockDriverState * GRAPH_RDLOCK thinvm_bottom(BlockDriverState *bs)
{
    while (bdrv_primary_bs(bs)) {
        bs = bdrv_primary_bs(bs);
    }
    return bs;
}

/* What is at the bottom of the chain under the image */
static BlockDriverState * GRAPH_RDLOCK thinvm_protocol(BlockDriverState *bs)
{
    return thinvm_bottom(bs->file->bs);
}

static bool thinvm_is_driver(BlockDriverState *bs, const char *name)
{
    return bs->drv && !strcmp(bs->drv->format_name, name);
}

/*
 * Has somebody cut off the end of the file or device under an image in use?
 * Asks the protocol itself, and has the block layer remember nothing: requests
 * are running.  Others than file-posix fail I/O beyond the end; that one
 * reads zeroes and makes a file longer, so nobody else would notice.
 */
bool coroutine_fn thinvm_device_was_cut(BDRVThinvmState *s, int64_t *length,
                                        uint64_t *needed)
{
    BlockDriverState *file = s->bs->file->bs;

    while (file->drv && file->drv->is_filter && bdrv_primary_bs(file)) {
        file = bdrv_primary_bs(file);
    }
    if (!thinvm_is_driver(file, "file") &&
        !thinvm_is_driver(file, "host_device")) {
        return false;
    }
    *needed = thinvm_device_end(s);
    *length = file->drv->bdrv_co_getlength(file);
    /* The image itself may be about to give the end up */
    return *length >= 0 && *length < *needed &&
           *needed == thinvm_device_end(s);
}

/*
 * A regular file grows in steps that are small enough to be allocated by its
 * file system in one piece, see thinvm_allocate_tail(); unless the clusters
 * are for preallocation, which has its own idea of what is to be written.
 */
static uint64_t coroutine_fn GRAPH_RDLOCK
thinvm_node_grow_bound(ThinvmDevice *dev)
{
    BlockDriverState *bs = thinvm_device_bs(dev);
    BDRVThinvmState *s = bs->opaque;

    return !qatomic_read(&s->preallocating) &&
           thinvm_is_driver(thinvm_protocol(bs), "file")
           ? THINVM_ALLOCATE_AHEAD : 0;
}

/*
 * The file was just made longer: have its file system allocate the new part
 * before anybody writes there.  Else each guest write allocates a few KiB,
 * and file systems let such writes to a file by only one at a time.  Nobody
 * else knows of this part yet, so there is no write that zeroing might hit.
 * When it does not work nothing is lost but speed.
 */
static void coroutine_fn GRAPH_RDLOCK
thinvm_allocate_tail(BlockDriverState *bs, uint64_t from, uint64_t to)
{
    BDRVThinvmState *s = bs->opaque;
    int ret;

    from = ROUND_UP(from, s->cluster_size);
    if (from >= to || to - from > thinvm_node_grow_bound(&s->device)) {
        return;
    }
    ret = bdrv_co_pwrite_zeroes(bs->file, from, to - from,
                                BDRV_REQ_NO_FALLBACK);
    trace_thinvm_device_allocate(bs, from, to, ret);
}

/*
 * QEMU learns of an iSCSI LUN's new capacity by an attempt to resize it only,
 * during which the thread waits for the target, for ever if that is gone.  So
 * the target is asked first, and this is done when it says something else.
 */
static void coroutine_fn GRAPH_RDLOCK thinvm_refresh_lun(BlockDriverState *lun)
{
    uint64_t bytes;

    if (thinvm_scsi_capacity(lun, &bytes) == 0 &&
        bytes != lun->drv->bdrv_co_getlength(lun)) {
        trace_thinvm_device_lun(lun, bytes);
        lun->drv->bdrv_co_truncate(lun, 0, false, PREALLOC_MODE_OFF, 0, NULL);
    }
}

/*
 * For a device of fixed size this is also what makes it be asked for its
 * capacity again, after somebody has enlarged it.
 */
static int coroutine_fn GRAPH_RDLOCK
thinvm_node_grow(ThinvmDevice *dev, uint64_t bytes)
{
    BlockDriverState *bs = thinvm_device_bs(dev);
    BlockDriverState *protocol = thinvm_protocol(bs);
    bool lun = thinvm_is_driver(protocol, "iscsi");
    int64_t length;
    int ret;

    if (lun) {
        thinvm_refresh_lun(protocol);
    }
    /* First: by what another has made of the length it could be cut */
    if (!thinvm_node_may_write(bs)) {
        return -EIO;
    }
    length = thinvm_node_length(dev);
    if (length < 0) {
        return length;
    }
    if (length >= bytes) {
        return 0;
    }
    if (lun) {
        return -ENOSPC;
    }
    if (bytes > INT64_MAX) {
        return -EFBIG;
    }
    thinvm_node_event(dev, BLKDBG_THINVM_GROW);
    ret = bdrv_co_truncate(bs->file, bytes, false, PREALLOC_MODE_OFF, 0, NULL);
    trace_thinvm_device_grow(bs, length, bytes, ret);
    if (ret >= 0) {
        thinvm_allocate_tail(bs, length, bytes);
    }
    /* A real I/O error is told as such; "cannot be resized" means full */
    if (ret == -EINVAL || ret == -ENOTSUP || ret == -EFBIG) {
        ret = -ENOSPC;
    }
    return ret < 0 ? ret : 0;
}

/* What QEMU knows of it: iSCSI targets tell, and so do other drivers */
static uint64_t coroutine_fn GRAPH_RDLOCK
thinvm_node_discard_unit(ThinvmDevice *dev)
{
    return thinvm_device_bs(dev)->file->bs->bl.pdiscard_alignment;
}

static int coroutine_fn GRAPH_RDLOCK
thinvm_node_forget_cache(ThinvmDevice *dev, Error **errp)
{
    return thinvm_device_forget_cache(thinvm_device_bs(dev)->file->bs, errp);
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
        .co_grow_bound = thinvm_node_grow_bound,
        .co_discard_unit = thinvm_node_discard_unit,
        .co_forget_cache = thinvm_node_forget_cache,
        .co_event = thinvm_node_event,
    };
}

/*
 * Only file-posix puts the host's page cache in between; the network protocols
 * send every read to the other side.
 */
static bool thinvm_protocol_coherent(BlockDriverState *protocol)
{
    if (thinvm_is_driver(protocol, "file") ||
        thinvm_is_driver(protocol, "host_device")) {
        return protocol->open_flags & BDRV_O_NOCACHE;
    }
    return true;
}

bool thinvm_device_coherent(BlockDriverState *bs)
{
    return thinvm_protocol_coherent(thinvm_protocol(bs));
}

/*
 * Of a block device that several hosts share, this host's page cache may hold
 * what was there long ago, claims of ownership included.  (A file system sees
 * to that itself, if it is shared at all.)
 */
int coroutine_fn thinvm_device_forget_cache(BlockDriverState *file,
                                            Error **errp)
{
    BlockDriverState *protocol = thinvm_bottom(file);
    Error *local_err = NULL;

    if (!thinvm_is_driver(protocol, "host_device") ||
        thinvm_protocol_coherent(protocol)) {
        return 0;
    }
    protocol->drv->bdrv_co_invalidate_cache(protocol, &local_err);
    trace_thinvm_device_forget_cache(file, local_err ? -EIO : 0);
    error_propagate(errp, local_err);
    return local_err ? -EIO : 0;
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

static int coroutine_fn thinvm_blk_forget_cache(ThinvmDevice *dev, Error **errp)
{
    int ret;

    bdrv_graph_co_rdlock();
    ret = thinvm_device_forget_cache(blk_bs(thinvm_device_blk(dev)), errp);
    bdrv_graph_co_rdunlock();
    return ret;
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
        .co_forget_cache = thinvm_blk_forget_cache,
    };
}
