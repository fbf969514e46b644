/*
 * thinvm driver layer: changes of the image as a whole
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Resize, backing file, amend, making empty.  All of them are operations of
 * the engine; each is committed durably before it is reported as done, since
 * users take them for settled (and write-back's interval is for guests).
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qapi/util.h"
#include "qemu/cutils.h"
#include "qemu/option.h"
#include "system/block-backend.h"
#include "io.h"
#include "trace.h"

QemuOptsList thinvm_amend_opts = {
    .name = "thinvm-amend-opts",
    .head = QTAILQ_HEAD_INITIALIZER(thinvm_amend_opts.head),
    .desc = {
        {
            .name = BLOCK_OPT_SIZE,
            .type = QEMU_OPT_SIZE,
            .help = "Size of the virtual disk",
        }, {
            .name = BLOCK_OPT_BACKING_FILE,
            .type = QEMU_OPT_STRING,
            .help = "Image that unallocated parts of the disk read from",
        }, {
            .name = BLOCK_OPT_BACKING_FMT,
            .type = QEMU_OPT_STRING,
            .help = "Format of the backing file",
        },
        { /* end of list */ }
    },
};

static int coroutine_fn GRAPH_RDLOCK thinvm_settle(BlockDriverState *bs,
                                                   Error **errp)
{
    BDRVThinvmState *s = bs->opaque;
    int ret = thinvm_store_commit(s->store, THINVM_COMMIT_DURABLE, true);

    if (ret < 0) {
        error_setg_errno(errp, -ret, "Cannot commit the change");
    }
    return ret;
}

/* ------------------------------------------------------------------ */
/* Resize                                                              */

static uint64_t thinvm_clusters(BDRVThinvmState *s, uint64_t bytes)
{
    return DIV_ROUND_UP(bytes, s->cluster_size);
}

static int coroutine_fn GRAPH_RDLOCK
thinvm_resize(BlockDriverState *bs, uint64_t size, Error **errp)
{
    BDRVThinvmState *s = bs->opaque;
    ThinvmOp op = {
        .type = THINVM_OP_RESIZE,
        .value = size,
    };

    return thinvm_store_execute(s->store, &op, NULL, errp);
}

/*
 * What is mapped from cluster @first up to @end goes.  Registered alone: a
 * write that is on its way there must not map its cluster behind us, which
 * would then show when the disk grows.
 */
static int coroutine_fn GRAPH_RDLOCK
thinvm_unmap_alone(BDRVThinvmState *s, uint64_t first, uint64_t end,
                   Error **errp)
{
    ThinvmInflight inflight;
    int ret;

    if (first == end) {
        return 0;
    }
    thinvm_inflight_begin_exclusive(s, &inflight, THINVM_TREE_DISK, first,
                                    end - first);
    ret = thinvm_store_unmap(s->store, THINVM_TREE_DISK, first, end - first,
                             THINVM_SOURCE_BACKING, NULL, errp);
    thinvm_inflight_end_request(s, &inflight);
    return ret;
}

static int coroutine_fn GRAPH_RDLOCK
thinvm_shrink(BlockDriverState *bs, uint64_t old, uint64_t size, Error **errp)
{
    BDRVThinvmState *s = bs->opaque;
    int ret = thinvm_unmap_alone(s, thinvm_clusters(s, size),
                                 thinvm_clusters(s, old), errp);

    if (ret < 0) {
        return ret;
    }
    return thinvm_resize(bs, size, errp);
}

/*
 * What becomes visible must read as zeroes.  In the last cluster, that is
 * what an earlier and larger disk may have left; after it, the backing file
 * if it is longer than this disk was (@zero), or may be for all we know as it
 * is not open; and it must be hidden before the new size can become durable.
 */
static int coroutine_fn GRAPH_RDLOCK
thinvm_enlarge(BlockDriverState *bs, uint64_t old, uint64_t size, bool zero,
               Error **errp)
{
    BDRVThinvmState *s = bs->opaque;
    uint64_t first = thinvm_clusters(s, old);
    int ret;

    ret = thinvm_io_zero_tail(bs, old, errp);
    if (ret < 0) {
        return ret;
    }
    if (zero || thinvm_backing_is_closed(bs)) {
        ret = thinvm_store_unmap(s->store, THINVM_TREE_DISK, first,
                                 thinvm_clusters(s, size) - first,
                                 THINVM_SOURCE_ZERO, NULL, errp);
        if (ret < 0) {
            return ret;
        }
    }
    return thinvm_resize(bs, size, errp);
}

static bool thinvm_size_check(BDRVThinvmState *s, int64_t size, Error **errp)
{
    uint64_t max = MIN(THINVM_MAX_VIRTUAL_SIZE,
                       THINVM_MAX_GUEST_CLUSTERS << s->cluster_bits);

    if (!QEMU_IS_ALIGNED(size, BDRV_SECTOR_SIZE)) {
        error_setg(errp, "The new size, %" PRId64 " bytes, is not a multiple "
                   "of %llu", size, BDRV_SECTOR_SIZE);
        return false;
    }
    if (size > max) {
        error_setg(errp, "The new size, %" PRId64 " bytes, exceeds %" PRIu64
                   ", the most that clusters of %" PRIu64 " bytes allow",
                   size, max, s->cluster_size);
        return false;
    }
    return true;
}

/* @exact makes no difference: any multiple of 512 is possible */
int coroutine_fn thinvm_co_truncate(BlockDriverState *bs, int64_t offset,
                                    bool exact, PreallocMode prealloc,
                                    BdrvRequestFlags flags, Error **errp)
{
    BDRVThinvmState *s = bs->opaque;
    uint64_t old;
    int ret;

    if (!thinvm_size_check(s, offset, errp)) {
        return -EINVAL;
    }
    ret = thinvm_mode_begin_write(bs);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Cannot write the image");
        return ret;
    }
    old = thinvm_virtual_size(s);
    if (offset < old && prealloc != PREALLOC_MODE_OFF) {
        error_setg(errp, "Preallocation '%s' is not possible when a disk "
                   "shrinks", PreallocMode_str(prealloc));
        return -EINVAL;
    }
    trace_thinvm_truncate(bs, old, offset, prealloc);
    if (offset < old) {
        ret = thinvm_shrink(bs, old, offset, errp);
    } else if (offset > old) {
        ret = thinvm_enlarge(bs, old, offset, flags & BDRV_REQ_ZERO_WRITE,
                             errp);
        if (ret >= 0 && prealloc != PREALLOC_MODE_OFF) {
            /* The last old cluster may show what lies below it */
            uint64_t from = bs->backing_file[0] ?
                            MIN(ROUND_UP(old, s->cluster_size), offset) : old;

            ret = thinvm_io_preallocate(bs, from, offset - from, prealloc,
                                        errp);
            if (ret < 0) {
                /* All or nothing; what was preallocated goes again */
                thinvm_shrink(bs, offset, old, NULL);
            }
        }
    }
    if (ret < 0) {
        return ret;
    }
    ret = thinvm_settle(bs, errp);
    if (ret >= 0 && offset < old) {
        /* Who shrinks a disk wants the space back, whatever "discard" says */
        thinvm_store_reclaim(s->store, true);
    }
    return ret;
}

/* ------------------------------------------------------------------ */
/* Backing file                                                        */

static bool thinvm_backing_check(BlockDriverState *bs, const char *file,
                                 const char *format, Error **errp)
{
    if (strlen(file) > THINVM_MAX_BACKING_NAME) {
        error_setg(errp, "The backing file's name has %zu bytes; at most %d "
                   "are possible", strlen(file), THINVM_MAX_BACKING_NAME);
        return false;
    }
    if (strlen(format) >= sizeof(bs->backing_format)) {
        error_setg(errp, "'%s' is no format of a backing file", format);
        return false;
    }
    if (*format && !*file) {
        error_setg(errp, "Backing format '%s' was given without a backing "
                   "file", format);
        return false;
    }
    return true;
}

static int coroutine_fn GRAPH_RDLOCK
thinvm_set_backing(BlockDriverState *bs, const char *file, const char *format,
                   Error **errp)
{
    BDRVThinvmState *s = bs->opaque;
    ThinvmBacking backing = { };
    ThinvmOp op = {
        .type = THINVM_OP_SET_BACKING,
        .backing = &backing,
    };
    int ret;

    if (!thinvm_backing_check(bs, file, format, errp)) {
        return -EINVAL;
    }
    ret = thinvm_mode_begin_write(bs);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Cannot write the image");
        return ret;
    }
    pstrcpy(backing.name, sizeof(backing.name), file);
    pstrcpy(backing.format, sizeof(backing.format), format);
    ret = thinvm_store_execute(s->store, &op, NULL, errp);
    if (ret < 0) {
        return ret;
    }
    return thinvm_settle(bs, errp);
}

int coroutine_fn thinvm_co_change_backing_file(BlockDriverState *bs,
                                               const char *backing_file,
                                               const char *backing_fmt)
{
    Error *local_err = NULL;
    int ret;

    ret = thinvm_set_backing(bs, backing_file ?: "", backing_fmt ?: "",
                             &local_err);
    if (ret < 0) {
        error_free(local_err);      /* the callback has no room for it */
        return ret;
    }
    pstrcpy(bs->auto_backing_file, sizeof(bs->auto_backing_file),
            backing_file ?: "");
    pstrcpy(bs->backing_format, sizeof(bs->backing_format),
            backing_fmt ?: "");
    return 0;
}

static int coroutine_fn GRAPH_RDLOCK
thinvm_co_make_empty(BlockDriverState *bs, void *opaque, Error **errp)
{
    BDRVThinvmState *s = bs->opaque;
    int ret;

    ret = thinvm_mode_begin_write(bs);
    if (ret < 0) {
        return ret;
    }
    ret = thinvm_unmap_alone(s, 0, thinvm_clusters(s, thinvm_virtual_size(s)),
                             errp);
    if (ret < 0) {
        return ret;
    }
    return thinvm_settle(bs, errp);
}

int thinvm_make_empty(BlockDriverState *bs)
{
    return thinvm_run(bs, thinvm_co_make_empty, NULL, NULL);
}

/* ------------------------------------------------------------------ */
/* Amend                                                               */

typedef struct ThinvmAmend {
    const char *backing_file, *backing_fmt;
} ThinvmAmend;

static int coroutine_fn GRAPH_RDLOCK
thinvm_co_amend_backing(BlockDriverState *bs, void *opaque, Error **errp)
{
    ThinvmAmend *a = opaque;
    int ret;

    ret = thinvm_set_backing(bs, a->backing_file, a->backing_fmt, errp);
    if (ret >= 0) {
        pstrcpy(bs->auto_backing_file, sizeof(bs->auto_backing_file),
                a->backing_file);
        pstrcpy(bs->backing_file, sizeof(bs->backing_file), a->backing_file);
        pstrcpy(bs->backing_format, sizeof(bs->backing_format),
                a->backing_fmt);
    }
    return ret;
}

static int GRAPH_RDLOCK thinvm_amend_size(BlockDriverState *bs, uint64_t size,
                                          Error **errp)
{
    BlockBackend *blk;
    int ret;

    blk = blk_new_with_bs(bs, BLK_PERM_RESIZE, BLK_PERM_ALL, errp);
    if (!blk) {
        return -EPERM;
    }
    /* Through the block layer, which knows about the backing file's length */
    ret = blk_truncate(blk, size, false, PREALLOC_MODE_OFF, 0, errp);
    blk_unref(blk);
    return ret;
}

int thinvm_amend_options(BlockDriverState *bs, QemuOpts *opts,
                         BlockDriverAmendStatusCB *status_cb, void *cb_opaque,
                         bool force, Error **errp)
{
    ThinvmAmend a = {
        .backing_file = qemu_opt_get(opts, BLOCK_OPT_BACKING_FILE),
        .backing_fmt = qemu_opt_get(opts, BLOCK_OPT_BACKING_FMT),
    };
    uint64_t size = qemu_opt_get_size(opts, BLOCK_OPT_SIZE, 0);
    bool backing = a.backing_file || a.backing_fmt;
    int ret = 0;

    /* Who takes the backing file away does not keep its format */
    if (backing && !a.backing_fmt) {
        a.backing_fmt = *a.backing_file ? bs->backing_format : "";
    }
    a.backing_file = a.backing_file ?: bs->backing_file;
    /* All or nothing: what is known to fail does so before the first step */
    if (backing && !thinvm_backing_check(bs, a.backing_file, a.backing_fmt,
                                         errp)) {
        return -EINVAL;
    }
    if (size) {
        ret = thinvm_amend_size(bs, size, errp);
    }
    if (ret >= 0 && backing) {
        ret = thinvm_run(bs, thinvm_co_amend_backing, &a, errp);
    }
    if (ret >= 0 && status_cb) {
        status_cb(bs, 1, 1, cb_opaque);
    }
    return ret;
}
