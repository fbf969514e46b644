/*
 * blockdev-precopy: the QMP command
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Checks what the user has said, and fills in what he has not.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qapi/qapi-commands-precopy.h"
#include "block/qapi.h"
#include "system/block-backend.h"
#include "precopy.h"

#define PRECOPY_DEFAULT_DOWNTIME 100        /* ms */
#define PRECOPY_MAX_DOWNTIME     60000

static BlockDriverState *precopy_source(const char *name, Error **errp)
{
    BlockDriverState *bs;

    GRAPH_RDLOCK_GUARD_MAINLOOP();
    bs = bdrv_lookup_bs(name, name, errp);
    if (!bs) {
        return NULL;
    }
    if (!bdrv_is_root_node(bs)) {
        error_setg(errp, "Node '%s' is not the root node of a disk", name);
        return NULL;
    }
    if (!bdrv_is_inserted(bs)) {
        error_setg(errp, "Device '%s' has no medium", name);
        return NULL;
    }
    if (bdrv_op_is_blocked(bs, BLOCK_OP_TYPE_MIRROR_SOURCE, errp)) {
        return NULL;
    }
    return bs;
}

static BlockDriverState *precopy_target(const char *name, Error **errp)
{
    BlockDriverState *target;

    GRAPH_RDLOCK_GUARD_MAINLOOP();
    target = bdrv_lookup_bs(name, name, errp);
    if (!target ||
        bdrv_op_is_blocked(target, BLOCK_OP_TYPE_MIRROR_TARGET, errp)) {
        return NULL;
    }
    return target;
}

static bool precopy_options(const BlockdevPrecopy *arg, PrecopyOptions *o,
                            Error **errp)
{
    *o = (PrecopyOptions) {
        .job_id = arg->job_id,
        .filter_node_name = arg->filter_node_name,
        .speed = arg->has_speed ? arg->speed : 0,
        .on_source_error = arg->has_on_source_error ? arg->on_source_error
                                                : BLOCKDEV_ON_ERROR_REPORT,
        .on_target_error = arg->has_on_target_error ? arg->on_target_error
                                                : BLOCKDEV_ON_ERROR_ENOSPC,
        .when_outpaced = arg->has_when_outpaced ? arg->when_outpaced
                                            : PRECOPY_OUTPACED_WRITE_BLOCKING,
        .downtime_limit = arg->has_downtime_limit ? arg->downtime_limit
                                                  : PRECOPY_DEFAULT_DOWNTIME,
        .target_is_zero = arg->target_is_zero,
        .hints = arg->hints,
        .hints_disk = arg->hints_disk,
        .trim = arg->trim,
        .job_flags = JOB_DEFAULT,
    };
    if (o->downtime_limit < 1 || o->downtime_limit > PRECOPY_MAX_DOWNTIME) {
        error_setg(errp, "Parameter 'downtime-limit' is %" PRId64 ", it must "
                   "be from 1 to %d milliseconds", o->downtime_limit,
                   PRECOPY_MAX_DOWNTIME);
        return false;
    }
    if (!o->hints && (o->hints_disk || o->trim)) {
        error_setg(errp, "Parameter '%s' needs 'hints', the object that the "
                   "guest's agent is behind", o->trim ? "trim" : "hints-disk");
        return false;
    }
    if (arg->has_auto_finalize && !arg->auto_finalize) {
        o->job_flags |= JOB_MANUAL_FINALIZE;
    }
    if (arg->has_auto_dismiss && !arg->auto_dismiss) {
        o->job_flags |= JOB_MANUAL_DISMISS;
    }
    return true;
}

void qmp_blockdev_precopy(BlockdevPrecopy *arg, Error **errp)
{
    BlockDriverState *bs, *target;
    PrecopyOptions options;

    bs = precopy_source(arg->device, errp);
    if (!bs) {
        return;
    }
    target = precopy_target(arg->target, errp);
    if (!target || !precopy_options(arg, &options, errp)) {
        return;
    }
    if (bdrv_try_change_aio_context(target, bdrv_get_aio_context(bs), NULL,
                                    errp) < 0) {
        return;
    }
    precopy_start(bs, target, &options, errp);
}
