/*
 * thinvm driver layer: the block driver
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Opening, closing, reopening, permissions, limits, and the table of
 * callbacks.  What the callbacks do lies in the files that thinvm.h names.
 *
 * An image is opened by reading alone; whoever may write it then becomes its
 * owner (thinvm_mode_take), which is the first thing ever written
 * (invariant 6).  Nodes that are read-only or inactive, and tools that only
 * ask for information, write nothing at all.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qemu/module.h"
#include "block/aio-wait.h"
#include "handover.h"
#include "trace.h"

/* Steps of deleting snapshots that closing a node may take */
#define THINVM_CLOSE_STEPS  256
/* How often inactivating may release the image; each may take a second */
#define THINVM_RELEASES     8

ThinvmNodeList thinvm_nodes = QTAILQ_HEAD_INITIALIZER(thinvm_nodes);

/* ------------------------------------------------------------------ */
/* Coroutines out of callbacks that are none                           */

typedef struct ThinvmRun {
    BlockDriverState *bs;
    ThinvmCoFn fn;
    void *opaque;
    Error **errp;
    int ret;
    bool done;
} ThinvmRun;

static void coroutine_fn thinvm_run_entry(void *opaque)
{
    ThinvmRun *run = opaque;

    bdrv_graph_co_rdlock();
    run->ret = run->fn(run->bs, run->opaque, run->errp);
    bdrv_graph_co_rdunlock();
    qatomic_set(&run->done, true);
    aio_wait_kick();
}

int coroutine_mixed_fn thinvm_run(BlockDriverState *bs, ThinvmCoFn fn,
                                  void *opaque, Error **errp)
{
    ThinvmRun run = {
        .bs = bs, .fn = fn, .opaque = opaque, .errp = errp,
    };

    if (qemu_in_coroutine()) {
        return fn(bs, opaque, errp);
    }
    aio_co_enter(bdrv_get_aio_context(bs),
                 qemu_coroutine_create(thinvm_run_entry, &run));
    BDRV_POLL_WHILE(bs, !qatomic_read(&run.done));
    return run.ret;
}

/* ------------------------------------------------------------------ */
/* Open                                                                */

static int thinvm_probe(const uint8_t *buf, int buf_size, const char *filename)
{
    return buf_size >= 8 && ldq_le_p(buf) == THINVM_SUPERBLOCK_MAGIC ? 100 : 0;
}

static bool thinvm_may_write(BlockDriverState *bs, int flags)
{
    return (flags & BDRV_O_RDWR) && !(flags & (BDRV_O_INACTIVE |
                                               BDRV_O_NO_IO));
}

/* What the superblock fixes for the life of the image */
static int coroutine_fn GRAPH_RDLOCK
thinvm_open_superblock(BlockDriverState *bs, Error **errp)
{
    BDRVThinvmState *s = bs->opaque;
    ThinvmSuperblock sb, older;
    bool has_older;
    uint64_t unknown;
    int64_t length;
    int ret;

    ret = thinvm_store_probe(&s->device, &sb, &older, &has_older, errp);
    if (ret < 0) {
        return ret;
    }
    /* Before any page is read: a missing one would look damaged */
    length = s->device.co_length(&s->device);
    if (length >= 0 && length < sb.device_clusters << sb.cluster_bits) {
        error_setg(errp, "The device has %" PRId64 " bytes, but the image on "
                   "it uses up to %" PRIu64 "; it was truncated, or copied "
                   "incompletely, or must be rescanned",
                   length, sb.device_clusters << sb.cluster_bits);
        return -EINVAL;
    }
    s->uuid = sb.uuid;
    s->cluster_bits = sb.cluster_bits;
    s->cluster_size = 1ULL << sb.cluster_bits;
    s->journal_size = sb.journal_size;
    s->compatible = sb.compatible;
    s->readonly_compatible = sb.readonly_compatible;
    s->incompatible = sb.incompatible;
    s->template_id = sb.template;
    if (sb.template.length && !thinvm_template_hash_known(sb.template.digest) &&
        !thinvm_create_is_copying(bs->file->bs)) {
        error_setg(errp, "Creating the image was interrupted before its "
                   "template was copied; create it again");
        return -EINVAL;
    }

    unknown = sb.readonly_compatible & ~THINVM_READONLY_COMPATIBLE_KNOWN;
    if (unknown) {
        g_autofree char *msg = g_strdup_printf(
            "The image has features (bits 0x%" PRIx64 " of the read-only "
            "compatible ones) that this version cannot write; open it "
            "read-only", unknown);

        ret = bdrv_apply_auto_read_only(bs, msg, errp);
        if (ret < 0) {
            return ret;
        }
    }
    return 0;
}

static int thinvm_open_backing_name(BlockDriverState *bs, Error **errp)
{
    BDRVThinvmState *s = bs->opaque;
    ThinvmState *state = thinvm_store_state(s->store);
    const ThinvmBacking *backing = thinvm_state_backing(state);

    if (!backing->name[0]) {
        return 0;
    }
    if (strlen(backing->format) >= sizeof(bs->backing_format)) {
        error_setg(errp, "The image names '%s' as the format of its backing "
                   "file; no format's name is longer than %zu characters",
                   backing->format, sizeof(bs->backing_format) - 1);
        return -EINVAL;
    }
    pstrcpy(bs->auto_backing_file, sizeof(bs->auto_backing_file),
            backing->name);
    pstrcpy(bs->backing_file, sizeof(bs->backing_file), backing->name);
    pstrcpy(bs->backing_format, sizeof(bs->backing_format), backing->format);
    return 0;
}

static const char *thinvm_given(const char *option)
{
    return *option ? option : NULL;
}

static int coroutine_fn GRAPH_RDLOCK
thinvm_co_look(BlockDriverState *bs, void *opaque, Error **errp)
{
    int ret = thinvm_device_forget_cache(bs->file->bs, errp);

    return ret < 0 ? ret : thinvm_open_superblock(bs, errp);
}

static int coroutine_fn GRAPH_RDLOCK
thinvm_co_open(BlockDriverState *bs, void *opaque, Error **errp)
{
    BDRVThinvmState *s = bs->opaque;
    bool take;
    int ret;

    ret = thinvm_co_look(bs, NULL, errp);
    if (ret < 0) {
        return ret;
    }
    s->mode = s->options.mode;
    take = thinvm_may_write(bs, bs->open_flags) &&
           s->options.mode != THINVM_CACHE_MODE_MIGRATION;
    if (take) {
        /* If another writes, that is the message, not what reading meets */
        ret = thinvm_mode_may_take(bs, s->options.force_takeover, errp);
        if (ret < 0) {
            return ret;
        }
    }
    /* A damaged image is refused before the first write, the claim */
    s->store = thinvm_store_open(&s->device, s->options.cache_size, errp);
    if (!s->store) {
        return -EINVAL;
    }
    ret = thinvm_open_backing_name(bs, errp);
    if (ret >= 0 && thinvm_options_snapshot(&s->options)) {
        ret = thinvm_snapshot_load_tmp(bs, thinvm_given(s->options.snapshot_id),
                                       thinvm_given(s->options.snapshot_name),
                                       errp);
    }
    if (ret < 0) {
        return ret;
    }
    return take ? thinvm_mode_take(bs, false, errp)
                : thinvm_mode_open_reader(bs, errp);
}

/* Also takes back a half-done open; with the node drained, or not yet used */
static void thinvm_free(BlockDriverState *bs)
{
    BDRVThinvmState *s = bs->opaque;

    if (QTAILQ_IN_USE(s, link)) {
        QTAILQ_REMOVE(&thinvm_nodes, s, link);
    }
    thinvm_owner_drop(s);
    thinvm_pulse_destroy(s);
    thinvm_worker_destroy(s);
    thinvm_volume_destroy(s);
    thinvm_mode_free_retired(s);
    if (s->store) {
        thinvm_store_free(g_steal_pointer(&s->store));
    }
    g_free(g_steal_pointer(&s->view));
    g_free(g_steal_pointer(&s->lost_reason));
    thinvm_io_destroy(s);
}

static int coroutine_fn GRAPH_RDLOCK
thinvm_co_give_up(BlockDriverState *bs, void *opaque, Error **errp)
{
    ThinvmClaimState *state = opaque;

    return thinvm_mode_give_up(bs, *state, "image released", errp);
}

static int thinvm_give_up(BlockDriverState *bs, ThinvmClaimState state,
                          Error **errp)
{
    return thinvm_run(bs, thinvm_co_give_up, &state, errp);
}

/* A wrong one is refused before anything is written */
static int thinvm_look_at_template(BlockDriverState *bs, Error **errp)
{
    int ret = thinvm_run(bs, thinvm_co_look, NULL, errp);

    if (ret >= 0) {
        GRAPH_RDLOCK_GUARD_MAINLOOP();
        ret = thinvm_template_check(bs, errp);
    }
    return ret;
}

static int GRAPH_UNLOCKED thinvm_open(BlockDriverState *bs, QDict *options,
                                      int flags, Error **errp)
{
    BDRVThinvmState *s = bs->opaque;
    int ret;

    s->bs = bs;
    /* First: whether we follow an owner decides on permissions */
    if (!thinvm_options_parse(&s->options, options, errp)) {
        return -EINVAL;
    }
    if (thinvm_options_snapshot(&s->options)) {
        bdrv_graph_rdlock_main_loop();
        ret = bdrv_apply_auto_read_only(bs, "A snapshot can only be read; "
                                        "open the node with read-only=on",
                                        errp);
        bdrv_graph_rdunlock_main_loop();
        if (ret < 0) {
            return ret;
        }
    }
    ret = bdrv_open_file_child(NULL, options, "file", bs, errp);
    if (ret >= 0) {
        ret = thinvm_template_open(bs, options, errp);
    }
    if (ret < 0) {
        return ret;
    }
    thinvm_device_init_node(s);
    qemu_co_mutex_init(&s->mode_lock);
    qemu_co_mutex_init(&s->fence.lock);
    qemu_co_mutex_init(&s->claim_lock);
    thinvm_io_init(s);
    thinvm_volume_init(s);
    thinvm_worker_init(s);
    thinvm_pulse_init(s);

    /* who asks for information alone cannot read it, and need not */
    ret = s->template && !(flags & BDRV_O_NO_IO)
          ? thinvm_look_at_template(bs, errp) : 0;
    if (ret >= 0) {
        ret = thinvm_run(bs, thinvm_co_open, NULL, errp);
    }
    if (ret < 0) {
        if (s->owner) {
            thinvm_give_up(bs, THINVM_CLAIM_CLOSED, NULL);
        }
        thinvm_free(bs);
        return ret;
    }
    QTAILQ_INSERT_TAIL(&thinvm_nodes, s, link);
    thinvm_pulse_kick(s);

    bs->supported_zero_flags = BDRV_REQ_MAY_UNMAP | BDRV_REQ_NO_FALLBACK;
    bs->supported_truncate_flags = BDRV_REQ_ZERO_WRITE;
    return 0;
}

/* What the worker had no time for, if it is not much; else the next owner */
static int coroutine_fn GRAPH_RDLOCK
thinvm_co_finish_deletions(BlockDriverState *bs, void *opaque, Error **errp)
{
    unsigned budget = THINVM_CLOSE_STEPS;

    if (!thinvm_worker_has_to_collect(bs->opaque)) {
        return 0;
    }
    return thinvm_snapshot_collect(bs, &budget, errp);
}

static void GRAPH_UNLOCKED thinvm_close(BlockDriverState *bs)
{
    BDRVThinvmState *s = bs->opaque;
    Error *local_err = NULL;

    if (s->owner) {
        thinvm_run(bs, thinvm_co_finish_deletions, NULL, NULL);
    }
    if (s->owner &&
        thinvm_give_up(bs, THINVM_CLAIM_CLOSED, &local_err) < 0) {
        error_reportf_err(local_err, "thinvm node '%s' was not closed "
                          "properly: ", bdrv_get_node_name(bs));
    }
    thinvm_free(bs);
}

/* ------------------------------------------------------------------ */
/* Reopen                                                              */

typedef struct ThinvmReopen {
    ThinvmOptions options;
    bool released;      /* prepare gave up ownership */
} ThinvmReopen;

static int coroutine_fn GRAPH_RDLOCK
thinvm_co_may_take(BlockDriverState *bs, void *opaque, Error **errp)
{
    ThinvmReopen *r = opaque;

    return thinvm_mode_may_take(bs, r->options.force_takeover, errp);
}

/*
 * Ownership can be given up only now, while bs->file may still be written;
 * it can be taken only after the commit, when it may be written again.  What
 * can be known to fail then is looked at now.
 */
static int GRAPH_UNLOCKED
thinvm_reopen_prepare(BDRVReopenState *state, BlockReopenQueue *queue,
                      Error **errp)
{
    BlockDriverState *bs = state->bs;
    BDRVThinvmState *s = bs->opaque;
    g_autofree ThinvmReopen *r = g_new0(ThinvmReopen, 1);
    bool writes = thinvm_may_write(bs, bs->open_flags);
    bool will_write = thinvm_may_write(bs, state->flags);
    uint64_t unknown = s->readonly_compatible &
                       ~THINVM_READONLY_COMPATIBLE_KNOWN;
    int ret;

    if (!thinvm_options_parse(&r->options, state->options, errp)) {
        return -EINVAL;
    }
    if (strcmp(r->options.snapshot_id, s->options.snapshot_id) ||
        strcmp(r->options.snapshot_name, s->options.snapshot_name)) {
        error_setg(errp, "Option 'snapshot' cannot be changed; open another "
                   "node");
        return -EINVAL;
    }
    if (s->view && will_write) {
        error_setg(errp, "A snapshot can only be read");
        return -EACCES;
    }
    if (!writes && will_write) {
        if (unknown) {
            error_setg(errp, "The image has features (bits 0x%" PRIx64 ") "
                       "that this version cannot write", unknown);
            return -EACCES;
        }
        ret = thinvm_run(bs, thinvm_co_may_take, r, errp);
        if (ret < 0) {
            return ret;
        }
    } else if (writes && !will_write && s->owner) {
        ret = thinvm_give_up(bs, THINVM_CLAIM_CLOSED, errp);
        if (ret < 0) {
            return ret;
        }
        r->released = true;
    }
    state->opaque = g_steal_pointer(&r);
    return 0;
}

static void GRAPH_UNLOCKED thinvm_reopen_commit(BDRVReopenState *state)
{
    BDRVThinvmState *s = state->bs->opaque;
    ThinvmReopen *r = state->opaque;
    ThinvmState *engine = thinvm_store_state(s->store);
    uint64_t cache_size = r->options.cache_size ?:
        thinvm_store_default_cache_size(thinvm_virtual_size(s),
                                        s->cluster_bits);
    ThinvmCacheMode old_mode = s->options.mode;

    s->options = r->options;
    s->options.mode = old_mode;         /* commit_post changes it */

    thinvm_state_lock(engine);
    thinvm_state_set_cache_size(engine, cache_size);
    thinvm_state_unlock(engine);
}

static int coroutine_fn GRAPH_RDLOCK
thinvm_co_reopened(BlockDriverState *bs, void *opaque, Error **errp)
{
    BDRVThinvmState *s = bs->opaque;
    ThinvmReopen *r = opaque;
    int ret = 0;

    if (s->view || (bs->open_flags & BDRV_O_INACTIVE)) {
        s->options.mode = r->options.mode;
        return 0;
    }
    if (s->options.mode != r->options.mode) {
        if (s->owner) {
            ret = thinvm_mode_configure(bs, r->options.mode, "reopened", errp);
            s->options.mode = r->options.mode;
            return ret;
        }
        s->options.mode = r->options.mode;
    }
    if (!thinvm_may_write(bs, bs->open_flags)) {
        return thinvm_mode_open_reader(bs, errp);
    }
    thinvm_store_set_discard(s->store, bs->open_flags & BDRV_O_UNMAP);
    if (!s->owner && s->options.mode != THINVM_CACHE_MODE_MIGRATION) {
        ret = thinvm_mode_take(bs, true, errp);
    }
    return ret;
}

/* Too late to fail; but then a write will, or take ownership itself */
static void GRAPH_UNLOCKED thinvm_reopen_commit_post(BDRVReopenState *state)
{
    Error *local_err = NULL;

    if (thinvm_run(state->bs, thinvm_co_reopened, state->opaque,
                   &local_err) < 0) {
        error_reportf_err(local_err, "thinvm node '%s' after being reopened: ",
                          bdrv_get_node_name(state->bs));
    }
    g_free(g_steal_pointer(&state->opaque));
}

static int coroutine_fn GRAPH_RDLOCK
thinvm_co_take_back(BlockDriverState *bs, void *opaque, Error **errp)
{
    return thinvm_mode_take(bs, true, errp);
}

static void GRAPH_UNLOCKED thinvm_reopen_abort(BDRVReopenState *state)
{
    ThinvmReopen *r = state->opaque;
    Error *local_err = NULL;

    if (r && r->released &&
        thinvm_run(state->bs, thinvm_co_take_back, NULL, &local_err) < 0) {
        error_reportf_err(local_err, "thinvm node '%s' after a reopen that "
                          "failed: ", bdrv_get_node_name(state->bs));
    }
    g_free(g_steal_pointer(&state->opaque));
}

/* ------------------------------------------------------------------ */
/* Hand-over, AioContexts, drain                                       */

/*
 * Called before the block layer drains, and before a parent has its say.
 * Draining here lets requests that are under way end before the release; one
 * that comes later, because a parent refused and the node stays active, takes
 * ownership again by itself.  So do those that came while the node was drained
 * (the next part of a long DMA, say), which go on when that ends: they have to
 * end, too, and the image is released once more.
 */
static int GRAPH_RDLOCK thinvm_inactivate(BlockDriverState *bs)
{
    BDRVThinvmState *s = bs->opaque;
    ThinvmClaimState state = s->returning ? THINVM_CLAIM_RETURNED
                                          : THINVM_CLAIM_RELEASED;
    Error *local_err = NULL;
    bool quiet = false;
    int ret = 0;

    for (int i = 0; i < THINVM_RELEASES && ret == 0 && !quiet; i++) {
        bdrv_drained_begin(bs);
        quiet = i > 0 && !qatomic_read(&s->owner);
        if (!quiet) {
            ret = thinvm_give_up(bs, state, &local_err);
            state = THINVM_CLAIM_RELEASED;
        }
        bdrv_drained_end(bs);
    }
    if (ret == 0 && !quiet) {
        error_setg(&local_err, "It is still being written");
        ret = -EBUSY;
    }
    if (ret < 0) {
        error_reportf_err(local_err, "thinvm node '%s' cannot be handed "
                          "over: ", bdrv_get_node_name(bs));
    }
    return ret;
}

static void coroutine_fn GRAPH_RDLOCK
thinvm_co_invalidate_cache(BlockDriverState *bs, Error **errp)
{
    thinvm_mode_activate(bs, errp);
}

static void thinvm_detach_aio_context(BlockDriverState *bs)
{
    thinvm_pulse_detach(bs->opaque);
    thinvm_worker_detach(bs->opaque);
}

static void thinvm_attach_aio_context(BlockDriverState *bs, AioContext *ctx)
{
    thinvm_worker_attach(bs->opaque, ctx);
    thinvm_pulse_attach(bs->opaque, ctx);
}

static void thinvm_drain_end(BlockDriverState *bs)
{
    thinvm_worker_drain_end(bs->opaque);
    thinvm_pulse_drain_end(bs->opaque);
}

/* ------------------------------------------------------------------ */
/* Properties                                                          */

/*
 * A follower must let the owner that it follows write and grow the file.  So
 * must who shows a snapshot, be it that there is no owner yet.
 */
static void GRAPH_RDLOCK
thinvm_child_perm(BlockDriverState *bs, BdrvChild *c, BdrvChildRole role,
                  BlockReopenQueue *queue, uint64_t perm, uint64_t shared,
                  uint64_t *nperm, uint64_t *nshared)
{
    BDRVThinvmState *s = bs->opaque;

    if (!role) {
        thinvm_template_perm(nperm, nshared);
        return;
    }
    bdrv_default_perms(bs, c, role, queue, perm, shared, nperm, nshared);
    if ((role & BDRV_CHILD_IMAGE) && !(role & BDRV_CHILD_COW) &&
        (s->options.mode == THINVM_CACHE_MODE_MIGRATION ||
         thinvm_options_snapshot(&s->options)) &&
        !(*nperm & BLK_PERM_WRITE)) {
        *nshared |= BLK_PERM_WRITE | BLK_PERM_RESIZE;
    }
}

static void GRAPH_RDLOCK thinvm_refresh_limits(BlockDriverState *bs,
                                               Error **errp)
{
    BDRVThinvmState *s = bs->opaque;

    bs->bl.request_alignment = MAX(bs->bl.request_alignment,
                                   THINVM_SECTOR_SIZE);
    bs->bl.pwrite_zeroes_alignment = s->cluster_size / THINVM_PARTS;
    bs->bl.pdiscard_alignment = s->cluster_size;
}

static int64_t coroutine_fn GRAPH_RDLOCK
thinvm_co_getlength(BlockDriverState *bs)
{
    return thinvm_virtual_size(bs->opaque);
}

/* What a file name must tell beside the file */
static const char *const thinvm_strong_options[] = {
    "snapshot.",
    NULL
};

static BlockDriver bdrv_thinvm = {
    .format_name                = "thinvm",
    .instance_size              = sizeof(BDRVThinvmState),
    .is_format                  = true,
    .supports_backing           = true,
    .create_opts                = &thinvm_create_opts,
    .amend_opts                 = &thinvm_amend_opts,
    .mutable_opts               = thinvm_mutable_options,
    .strong_runtime_opts        = thinvm_strong_options,

    .bdrv_probe                 = thinvm_probe,
    .bdrv_open                  = thinvm_open,
    .bdrv_close                 = thinvm_close,
    .bdrv_reopen_prepare        = thinvm_reopen_prepare,
    .bdrv_reopen_commit         = thinvm_reopen_commit,
    .bdrv_reopen_commit_post    = thinvm_reopen_commit_post,
    .bdrv_reopen_abort          = thinvm_reopen_abort,
    .bdrv_child_perm            = thinvm_child_perm,
    .bdrv_co_create             = thinvm_co_create,
    .bdrv_co_create_opts        = thinvm_co_create_opts,
    .bdrv_has_zero_init         = bdrv_has_zero_init_1,
    .bdrv_refresh_limits        = thinvm_refresh_limits,
    .bdrv_measure               = thinvm_measure,

    .bdrv_co_getlength          = thinvm_co_getlength,
    .bdrv_co_preadv_part        = thinvm_co_preadv_part,
    .bdrv_co_pwritev_part       = thinvm_co_pwritev_part,
    .bdrv_co_pwrite_zeroes      = thinvm_co_pwrite_zeroes,
    .bdrv_co_pdiscard           = thinvm_co_pdiscard,
    .bdrv_co_block_status       = thinvm_co_block_status,
    .bdrv_co_copy_range_from    = thinvm_co_copy_range_from,
    .bdrv_co_copy_range_to      = thinvm_co_copy_range_to,
    .bdrv_co_flush_to_os        = thinvm_co_flush_to_os,
    .bdrv_co_truncate           = thinvm_co_truncate,
    .bdrv_make_empty            = thinvm_make_empty,
    .bdrv_co_change_backing_file = thinvm_co_change_backing_file,
    .bdrv_amend_options         = thinvm_amend_options,

    .bdrv_co_get_info           = thinvm_co_get_info,
    .bdrv_get_specific_info     = thinvm_get_specific_info,
    .bdrv_get_specific_stats    = thinvm_get_specific_stats,
    .bdrv_co_check              = thinvm_co_check,

    .bdrv_snapshot_create       = thinvm_snapshot_create,
    .bdrv_snapshot_goto         = thinvm_snapshot_goto,
    .bdrv_snapshot_delete       = thinvm_snapshot_delete,
    .bdrv_snapshot_list         = thinvm_snapshot_list,
    .bdrv_snapshot_load_tmp     = thinvm_snapshot_load_tmp,
    .bdrv_co_save_vmstate       = thinvm_co_save_vmstate,
    .bdrv_co_load_vmstate       = thinvm_co_load_vmstate,

    .bdrv_inactivate            = thinvm_inactivate,
    .bdrv_co_invalidate_cache   = thinvm_co_invalidate_cache,
    .bdrv_detach_aio_context    = thinvm_detach_aio_context,
    .bdrv_attach_aio_context    = thinvm_attach_aio_context,
    .bdrv_drain_end             = thinvm_drain_end,
};

static void bdrv_thinvm_init(void)
{
    bdrv_register(&bdrv_thinvm);
}

block_init(bdrv_thinvm_init);
