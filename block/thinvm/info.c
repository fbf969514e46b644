/*
 * thinvm driver layer: what a node tells about itself; check
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Reads scalars and counters of the layers below under their lock; changes
 * nothing, but for a check that was told to repair.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qapi/qapi-types-block-core.h"
#include "qemu/error-report.h"
#include "driver-snapshot.h"
#include "handover.h"
#include "trace.h"

static void thinvm_get_state(ThinvmStore *st, ThinvmInfoState *info)
{
    unsigned token = thinvm_store_request_begin(st);
    ThinvmState *state = thinvm_store_state(st);

    thinvm_state_lock(state);
    thinvm_state_info(state, info);
    thinvm_state_unlock(state);
    thinvm_store_request_end(st, token);
}

/* The generation of the newest base; the engine counts the next one */
static uint64_t thinvm_generation(const ThinvmInfoState *info)
{
    return info->generation ? info->generation - 1 : 0;
}

int coroutine_fn thinvm_co_get_info(BlockDriverState *bs, BlockDriverInfo *bdi)
{
    BDRVThinvmState *s = bs->opaque;

    bdi->cluster_size = s->cluster_size;
    bdi->subcluster_size = s->cluster_size / THINVM_PARTS;
    /* VM state has a tree of its own; this is where tools expect it */
    bdi->vm_state_offset = ROUND_UP(thinvm_virtual_size(s), s->cluster_size);
    bdi->is_dirty = false;      /* a crash costs a replay, not a check */
    return 0;
}

static ThinvmCacheMode thinvm_shown_mode(BDRVThinvmState *s)
{
    return qatomic_read(&s->mode);
}

ImageInfoSpecific *thinvm_get_specific_info(BlockDriverState *bs, Error **errp)
{
    BDRVThinvmState *s = bs->opaque;
    ImageInfoSpecificThinvm *data = g_new0(ImageInfoSpecificThinvm, 1);
    ImageInfoSpecific *spec = g_new0(ImageInfoSpecific, 1);
    ThinvmInfoState info;

    thinvm_get_state(s->store, &info);
    *data = (ImageInfoSpecificThinvm) {
        .version = THINVM_VERSION_MAJOR,
        .cluster_size = s->cluster_size,
        .journal_size = s->journal_size,
        .uuid = qemu_uuid_unparse_strdup(&s->uuid),
        .generation = thinvm_generation(&info),
        .epoch = info.epoch,
        .mapping_cache_mode = thinvm_shown_mode(s),
        .allocated_clusters = info.allocated_clusters,
        .free_clusters = info.free_clusters,
        .metadata_pages = info.metadata_pages,
        .snapshots = info.nb_snapshots,
        .has_snapshot_tree = info.nb_snapshots && !thinvm_in_background,
        .compatible_features = s->compatible,
        .readonly_compatible_features = s->readonly_compatible,
        .incompatible_features = s->incompatible,
        .q_template = thinvm_template_info(s),
    };
    spec->type = IMAGE_INFO_SPECIFIC_KIND_THINVM;
    spec->u.thinvm.data = data;
    if (data->has_snapshot_tree &&
        !thinvm_snapshot_tree(bs, UINT_MAX, &data->snapshot_tree, errp)) {
        data->has_snapshot_tree = false;
        qapi_free_ImageInfoSpecific(spec);
        return NULL;
    }
    return spec;
}

static void thinvm_statistics(BDRVThinvmState *s, ThinvmStatistics *dst,
                              ThinvmInfoState *info)
{
    ThinvmStoreStats stats;

    thinvm_store_stats(s->store, &stats);
    *dst = (ThinvmStatistics) {
        .commits = stats.commits,
        .journal_records = stats.records,
        .journal_operations = stats.operations,
        .checkpoints = stats.checkpoints,
        .cache_hits = info->cache_hits,
        .cache_misses = info->cache_misses,
        .metadata_bytes_read = stats.metadata_bytes_read,
        .metadata_bytes_written = stats.metadata_bytes_written,
        .longest_commit_ns = stats.longest_commit_ns,
        .pending_operations = stats.pending_operations,
        .allocated_clusters = info->allocated_clusters,
        .free_clusters = info->free_clusters,
        .template_bytes = stat64_get(&s->template_bytes),
        .template_failures = stat64_get(&s->template_failures),
    };
}

BlockStatsSpecific *thinvm_get_specific_stats(BlockDriverState *bs)
{
    BDRVThinvmState *s = bs->opaque;
    BlockStatsSpecific *stats = g_new0(BlockStatsSpecific, 1);
    ThinvmInfoState info;

    thinvm_get_state(s->store, &info);
    stats->driver = BLOCKDEV_DRIVER_THINVM;
    thinvm_statistics(s, &stats->u.thinvm, &info);
    return stats;
}

ThinvmInfo *thinvm_info(BDRVThinvmState *s)
{
    ThinvmInfo *dst = g_new0(ThinvmInfo, 1);
    ThinvmStatistics *statistics = g_new0(ThinvmStatistics, 1);
    ThinvmInfoState info;
    ThinvmStoreStats stats;
    ThinvmSpace space;

    thinvm_get_state(s->store, &info);
    thinvm_store_stats(s->store, &stats);
    thinvm_statistics(s, statistics, &info);
    thinvm_volume_space(s, &space);
    *dst = (ThinvmInfo) {
        .mapping_cache_mode = thinvm_shown_mode(s),
        .configured_mode =
            s->options.mode == THINVM_CACHE_MODE_MIGRATION
            ? THINVM_CACHE_MODE_WRITEBACK : s->options.mode,
        .owner = qatomic_read(&s->owner),
        .ownership_lost = qatomic_read(&s->lost),
        .mapping_cache_size = info.cache_limit * THINVM_PAGE_SIZE,
        .mapping_cache_used = info.cached_pages * THINVM_PAGE_SIZE,
        .mapping_flush_interval = s->options.flush_interval,
        .uuid = qemu_uuid_unparse_strdup(&s->uuid),
        .generation = thinvm_generation(&info),
        .epoch = info.epoch,
        .journal_size = s->journal_size,
        .journal_used = stats.journal_used,
        .device_size = space.size,
        .device_free = space.free,
        .space_watermark = space.watermark,
        .space_low = space.low,
        .allocation_rate = space.rate,
        .statistics = statistics,
        .lost_reason = g_strdup(qatomic_read(&s->lost_reason)),
    };
    thinvm_pulse_info(s, dst);
    return dst;
}

/* ------------------------------------------------------------------ */
/* What the contents are known by                                      */

/*
 * While an owner is active its writes change contents without a trace in the
 * journal, those to clusters that are mapped; once it has ended, they change
 * no more under its claim.
 */
static bool thinvm_contents_settled(BlockDriverState *bs,
                                    const ThinvmOwnerView *view, Error **errp)
{
    g_autofree char *host = NULL;

    if (view->kind == THINVM_OWNER_NONE || view->kind == THINVM_OWNER_GONE) {
        return true;
    }
    if (view->kind == THINVM_OWNER_UNKNOWN) {
        error_setg(errp, "Node '%s': a claim of ownership after epoch %"
                   PRIu64 " is damaged or by a later version, so the image "
                   "may be in use", bdrv_get_node_name(bs),
                   view->newest_epoch);
        return false;
    }
    host = thinvm_owner_host(&view->newest);
    error_setg(errp, "Node '%s': process %" PRIu32 " on host '%s' owns the "
               "image (epoch %" PRIu64 ") and may be writing it; a template "
               "must not change.  Close the image there, or open it read-only",
               bdrv_get_node_name(bs), view->newest.process, host,
               view->newest_epoch);
    return false;
}

static int coroutine_fn GRAPH_RDLOCK
thinvm_co_contents(BlockDriverState *bs, void *opaque, Error **errp)
{
    BDRVThinvmState *s = bs->opaque;
    ThinvmContents *c = opaque;
    ThinvmInfoState info;
    ThinvmOwnerView view;
    uint32_t crc;
    int ret;

    /* Of a block device, this host's page cache may have an old claim */
    ret = thinvm_device_forget_cache(bs->file->bs, errp);
    if (ret >= 0) {
        ret = thinvm_owner_look(&s->device, &s->uuid, s, &view, errp);
    }
    if (ret < 0) {
        return ret;
    }
    thinvm_owner_settle(&s->device, &s->uuid, &view);
    if (!thinvm_contents_settled(bs, &view, errp)) {
        return -EBUSY;
    }
    /* A node that was opened when the owner was there knows that much */
    if (qatomic_read(&s->follow)) {
        ret = thinvm_store_catch_up(s->store, NULL, errp);
        if (ret < 0) {
            return ret;
        }
    }
    thinvm_get_state(s->store, &info);
    c->epoch = info.epoch;
    thinvm_store_journal_end(s->store, &c->sequence, &crc);
    c->claim_epoch = view.newest_epoch;
    c->claim_nonce = view.newest.nonce;
    return 0;
}

int thinvm_contents(BlockDriverState *bs, ThinvmContents *c, Error **errp)
{
    BDRVThinvmState *s = bs->opaque;

    *c = (ThinvmContents) { .uuid = s->uuid };
    if (s->view) {
        c->snapshot_id = s->view->id;
        c->snapshot_sec = s->view->date_sec;
        c->snapshot_nsec = s->view->date_nsec;
        return 0;           /* never changes, whoever writes the disk */
    }
    return thinvm_run(bs, thinvm_co_contents, c, errp);
}

/* ------------------------------------------------------------------ */
/* Check                                                               */

static void thinvm_check_report(void *opaque, const char *message)
{
    error_printf("%s\n", message);
}

int coroutine_fn thinvm_co_check(BlockDriverState *bs, BdrvCheckResult *result,
                                 BdrvCheckMode fix)
{
    BDRVThinvmState *s = bs->opaque;
    ThinvmCheckResult res = { };
    Error *local_err = NULL;
    int store_fix = 0;
    int ret;

    if (fix & BDRV_FIX_LEAKS) {
        store_fix |= THINVM_FIX_LEAKS;
    }
    if (fix & BDRV_FIX_ERRORS) {
        store_fix |= THINVM_FIX_ERRORS;
    }
    /* Nobody goes on deleting snapshots meanwhile, or takes metadata space */
    thinvm_worker_stop(s);
    ret = store_fix ? thinvm_mode_begin_write(bs) : 0;
    if (ret < 0) {
        thinvm_worker_resume(s);
        return ret;
    }
    ret = thinvm_store_check(s->store, store_fix, thinvm_check_report, NULL,
                             &res, &local_err);
    thinvm_worker_resume(s);
    if (ret < 0) {
        if (local_err) {
            error_report_err(local_err);
        }
        return ret;
    }
    result->corruptions = res.corruptions;
    result->leaks = res.leaks;
    result->check_errors = res.check_errors;
    result->corruptions_fixed = res.corruptions_fixed;
    result->leaks_fixed = res.leaks_fixed;
    result->image_end_offset = res.image_end_offset;
    result->bfi.allocated_clusters = res.allocated_clusters;
    result->bfi.total_clusters = res.total_clusters;
    result->bfi.fragmented_clusters = res.fragmented_clusters;
    /* In an image that is damaged it would not say much */
    return s->template && !s->view && !res.corruptions && !res.check_errors
           ? thinvm_io_compare_template(bs, result) : 0;
}
