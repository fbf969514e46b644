/*
 * blockdev-precopy: the job is made
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The filter node comes above the source, then the job takes hold of filter,
 * source and target, with permissions that let the guest write the source and
 * nobody the target, and nobody resize either.  What fails on the way takes
 * back what was done.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/units.h"
#include "block/dirty-bitmap.h"
#include "system/block-backend.h"
#include "precopy.h"

static bool precopy_check_nodes(BlockDriverState *bs, BlockDriverState *target,
                                Error **errp)
{
    GRAPH_RDLOCK_GUARD_MAINLOOP();

    if (bdrv_skip_filters(bs) == bdrv_skip_filters(target)) {
        error_setg(errp, "Node '%s' cannot be copied onto itself",
                   bdrv_get_node_name(bs));
        return false;
    }
    if (bdrv_chain_contains(bs, bdrv_skip_filters(target))) {
        error_setg(errp, "Target '%s' is in the backing chain of '%s'",
                   bdrv_get_node_name(target), bdrv_get_node_name(bs));
        return false;
    }
    if (bdrv_chain_contains(target, bdrv_skip_filters(bs))) {
        error_setg(errp, "Source '%s' is in the backing chain of '%s'",
                   bdrv_get_node_name(bs), bdrv_get_node_name(target));
        return false;
    }
    return true;
}

static BlockDriverState *precopy_insert_filter(BlockDriverState *bs,
                                               const char *name, Error **errp)
{
    BlockDriverState *filter = precopy_filter_new(bs, name, errp);
    int ret;

    if (!filter) {
        return NULL;
    }
    bdrv_drained_begin(bs);
    ret = bdrv_append(filter, bs, errp);
    bdrv_drained_end(bs);
    if (ret < 0) {
        bdrv_unref(filter);
        return NULL;
    }
    return filter;
}

static void precopy_remove_filter(BlockDriverState *filter,
                                  BlockDriverState *bs)
{
    PrecopyFilter *f = filter->opaque;

    bdrv_drained_begin(bs);
    f->stop = true;
    f->job = NULL;
    bdrv_graph_wrlock();
    bdrv_child_refresh_perms(filter, filter->backing, &error_abort);
    bdrv_replace_node(filter, bs, &error_abort);
    bdrv_graph_wrunlock();
    bdrv_drained_end(bs);
}

/* The job's hold on source and target */
static int precopy_take_nodes(PrecopyJob *s, BlockDriverState *bs,
                              BlockDriverState *target, Error **errp)
{
    int ret;

    s->target = blk_new(s->common.job.aio_context, BLK_PERM_WRITE,
                        BLK_PERM_WRITE_UNCHANGED);
    ret = blk_insert_bs(s->target, target, errp);
    if (ret < 0) {
        return ret;
    }
    /* An NBD target may be of the host that the guest migrates to */
    blk_set_force_allow_inactivate(s->target);
    blk_set_allow_aio_context_change(s->target, true);
    blk_set_disable_request_queuing(s->target, true);

    bdrv_graph_wrlock();
    ret = block_job_add_bdrv(&s->common, "source", bs, 0,
                             BLK_PERM_WRITE_UNCHANGED | BLK_PERM_WRITE |
                             BLK_PERM_CONSISTENT_READ, errp);
    if (ret >= 0) {
        block_job_add_bdrv(&s->common, "target", target, 0, BLK_PERM_ALL,
                           &error_abort);
    }
    bdrv_graph_wrunlock();
    return ret;
}

/*
 * Going back to a snapshot changes a disk behind the job's back, and no filter
 * node survives it.  The block layer refuses it for a node that has a dirty
 * bitmap, as jobs have as a rule; ours is not one that it knows of, so each
 * node gets one that records nothing.
 */
static bool precopy_take_guards(PrecopyJob *s, BlockDriverState *bs,
                                BlockDriverState *target, Error **errp)
{
    BlockDriverState *nodes[PRECOPY_GUARDS] = { s->filter, bs, target };

    for (int i = 0; i < PRECOPY_GUARDS; i++) {
        s->guards[i] = bdrv_create_dirty_bitmap(nodes[i], GiB, NULL, errp);
        if (!s->guards[i]) {
            return false;
        }
        bdrv_disable_dirty_bitmap(s->guards[i]);
    }
    return true;
}

void precopy_release_guards(PrecopyJob *s)
{
    for (int i = 0; i < PRECOPY_GUARDS; i++) {
        if (s->guards[i]) {
            bdrv_release_dirty_bitmap(s->guards[i]);
            s->guards[i] = NULL;
        }
    }
}

/* In the main loop, while the filter is in use */
static bool precopy_use_hints(PrecopyJob *s, const PrecopyOptions *o,
                              Error **errp)
{
    if (!o->hints) {
        return true;
    }
    s->hints = precopy_hints_attach(o->hints, o->hints_disk, s->track->length,
                                    o->trim, errp);
    if (!s->hints) {
        return false;
    }
    QEMU_LOCK_GUARD(&s->track->lock);
    s->track->hint = precopy_hints_get;
    s->track->hint_written = precopy_hints_written;
    s->track->hint_opaque = s->hints;
    return true;
}

void precopy_forget_hints(PrecopyJob *s)
{
    WITH_QEMU_LOCK_GUARD(&s->track->lock) {
        s->track->hint = NULL;
        s->track->hint_written = NULL;
    }
    precopy_hints_detach(s->hints);
    s->hints = NULL;
}

static void precopy_init(PrecopyJob *s, BlockDriverState *filter,
                         const PrecopyOptions *o)
{
    s->filter = filter;
    s->top = filter->opaque;
    s->track = s->top->track;
    s->on_source_error = o->on_source_error;
    s->on_target_error = o->on_target_error;
    s->when_outpaced = o->when_outpaced;
    s->downtime_limit = o->downtime_limit;
    s->target_is_zero = o->target_is_zero;
    s->ready_after = -1;
    qemu_co_queue_init(&s->slots);
    ratelimit_init(&s->throttle);
}

void precopy_start(BlockDriverState *bs, BlockDriverState *target,
                   const PrecopyOptions *o, Error **errp)
{
    BlockDriverState *filter;
    PrecopyJob *s;

    GLOBAL_STATE_CODE();
    if (!precopy_check_nodes(bs, target, errp)) {
        return;
    }
    filter = precopy_insert_filter(bs, o->filter_node_name, errp);
    if (!filter) {
        return;
    }
    s = block_job_create(o->job_id, &precopy_job_driver, NULL, filter,
                         BLK_PERM_CONSISTENT_READ,
                         BLK_PERM_CONSISTENT_READ | BLK_PERM_WRITE_UNCHANGED |
                         BLK_PERM_WRITE, o->speed, o->job_flags, NULL, NULL,
                         errp);
    if (!s) {
        precopy_remove_filter(filter, bs);
        bdrv_unref(filter);
        return;
    }
    precopy_init(s, filter, o);
    if (!precopy_use_hints(s, o, errp) ||
        precopy_take_nodes(s, bs, target, errp) < 0 ||
        !precopy_take_guards(s, bs, target, errp)) {
        precopy_release_guards(s);
        precopy_forget_hints(s);
        blk_unref(s->target);
        ratelimit_destroy(&s->throttle);
        job_early_fail(&s->common.job);
        precopy_remove_filter(filter, bs);
        bdrv_unref(filter);
        return;
    }
    /* The job holds it now */
    bdrv_unref(filter);
    bdrv_drained_begin(bs);
    s->top->job = s;
    bdrv_drained_end(bs);
    job_start(&s->common.job);
}
