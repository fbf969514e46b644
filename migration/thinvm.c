/*
 * thinvm: what live migration and resets mean for open images
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Linked into qemu-system only.  When an outgoing migration begins, every
 * thinvm node goes to write-through, so that little is left to commit while
 * the guest stands still; when it fails, is cancelled, or ends without the
 * image being handed over (a background snapshot), the node goes back to its
 * configured mode.  The hand-over itself needs no help from here: the block
 * layer inactivates the node (thinvm_inactivate in block/thinvm/thinvm.c).
 *
 * A guest's disks are activated all or none: where one cannot be, those that
 * were activated since the guest last ran are given up again, so that the
 * other side can take them back.  (The source needs no help for that: what it
 * has released when another disk fails to be, QEMU activates again.)
 *
 * The order of events is not to be relied upon: an end may come without a
 * beginning, twice, or after the guest was resumed.  So each handler sets
 * what must hold from then on, whatever was before.
 *
 * Stopping and pausing the guest, and its shutdown, flush all nodes in the
 * machine's own code, which commits.  A reset does not, so it is done here.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/error-report.h"
#include "qemu/module.h"
#include "migration/migration.h"
#include "migration/misc.h"
#include "system/reset.h"
#include "system/runstate.h"
#include "block/thinvm/thinvm.h"

typedef struct ThinvmMigrating {
    bool migrating;
    const char *reason;
} ThinvmMigrating;

static int coroutine_fn GRAPH_RDLOCK
thinvm_co_set_migrating(BlockDriverState *bs, void *opaque, Error **errp)
{
    ThinvmMigrating *m = opaque;

    return thinvm_mode_set_migrating(bs, m->migrating, m->reason, errp);
}

/*
 * All thinvm nodes.  They are kept: what is done with one of them waits, and
 * meanwhile the monitor may close another.
 */
static GSList *thinvm_nodes_get(void)
{
    GSList *list = NULL;
    BDRVThinvmState *s;

    QTAILQ_FOREACH(s, &thinvm_nodes, link) {
        bdrv_ref(s->bs);
        list = g_slist_prepend(list, s->bs);
    }
    return g_slist_reverse(list);
}

static void thinvm_nodes_put(GSList *list)
{
    for (GSList *l = list; l; l = l->next) {
        bdrv_unref(l->data);
    }
    g_slist_free(list);
}

static int thinvm_migration_event(NotifierWithReturn *notifier,
                                  MigrationEvent *e, Error **errp)
{
    ThinvmMigrating m = {
        .migrating = e->type == MIG_EVENT_PRECOPY_SETUP,
        .reason = e->type == MIG_EVENT_PRECOPY_SETUP ? "migration started" :
                  e->type == MIG_EVENT_PRECOPY_DONE ? "migration completed" :
                                                      "migration failed",
    };
    GSList *nodes = thinvm_nodes_get();
    int ret = 0;

    for (GSList *l = nodes; l && ret == 0; l = l->next) {
        Error *local_err = NULL;

        if (thinvm_run(l->data, thinvm_co_set_migrating, &m,
                       &local_err) >= 0) {
            continue;
        }
        if (m.migrating) {
            /* Refuses the migration; the nodes done so far hear FAILED */
            error_propagate(errp, local_err);
            ret = -EIO;
        } else {
            error_report_err(local_err);
        }
    }
    thinvm_nodes_put(nodes);
    return ret;
}

/* ------------------------------------------------------------------ */
/* Activation                                                          */

/*
 * After a migration that failed, QEMU starts the guest again without asking
 * whether the disks could be activated, and a write to an inactive node is an
 * assertion failure.  The state of the machine tells this from "cont".
 */
static bool thinvm_migration_will_resume(void)
{
    MigrationState *ms = migrate_get_current();

    return runstate_check(RUN_STATE_FINISH_MIGRATE) &&
           (migration_has_failed(ms) ||
            ms->state == MIGRATION_STATUS_CANCELLING);
}

/* Between the stop for the switchover and whatever comes after it */
static bool thinvm_migration_sent_away(void)
{
    return runstate_check(RUN_STATE_FINISH_MIGRATE) ||
           runstate_check(RUN_STATE_POSTMIGRATE);
}

static int coroutine_fn GRAPH_RDLOCK
thinvm_co_release(BlockDriverState *bs, void *opaque, Error **errp)
{
    return thinvm_mode_give_up(bs, THINVM_CLAIM_RETURNED,
                               "another disk could not be activated", errp);
}

/* One of the guest's disks could not be activated: none shall be ours */
static void thinvm_roll_back(void *opaque)
{
    GSList *nodes;

    if (runstate_is_running()) {
        return;
    }
    nodes = thinvm_nodes_get();
    for (GSList *l = nodes; l; l = l->next) {
        BlockDriverState *bs = l->data;
        BDRVThinvmState *s = bs->opaque;
        Error *local_err = NULL;

        if (!s->activated || !qatomic_read(&s->owner)) {
            continue;
        }
        s->activated = false;
        s->returning = true;
        if (bdrv_inactivate(bs, NULL) >= 0) {
            s->returning = false;
            continue;
        }
        s->returning = false;
        /* A filter above it, say.  It stays active, but claims anew to write */
        bdrv_drained_begin(bs);
        if (thinvm_run(bs, thinvm_co_release, NULL, &local_err) < 0) {
            error_report_err(local_err);
        }
        bdrv_drained_end(bs);
    }
    thinvm_nodes_put(nodes);
}

static void thinvm_activation_has_failed(void)
{
    /* The block layer is in the middle of it */
    aio_bh_schedule_oneshot(qemu_get_aio_context(), thinvm_roll_back, NULL);
}

/* From now on the guest writes: the disks are ours for good */
static void thinvm_vm_state_changed(void *opaque, bool running, RunState state)
{
    BDRVThinvmState *s;

    if (running) {
        QTAILQ_FOREACH(s, &thinvm_nodes, link) {
            s->activated = false;
        }
    }
}

/* ------------------------------------------------------------------ */
/* Reset                                                               */

static int coroutine_fn GRAPH_RDLOCK
thinvm_co_commit(BlockDriverState *bs, void *opaque, Error **errp)
{
    return thinvm_co_flush_to_os(bs);
}

static void thinvm_reset(void *opaque)
{
    GSList *nodes = thinvm_nodes_get();

    for (GSList *l = nodes; l; l = l->next) {
        BlockDriverState *bs = l->data;
        BDRVThinvmState *s = bs->opaque;

        if (qatomic_read(&s->owner) &&
            thinvm_run(bs, thinvm_co_commit, NULL, NULL) < 0) {
            warn_report("thinvm node '%s': the mapping could not be "
                        "committed at the guest's reset",
                        bdrv_get_node_name(bs));
        }
    }
    thinvm_nodes_put(nodes);
}

static void thinvm_migration_register(void)
{
    static NotifierWithReturn notifiers[MIG_MODE__MAX];
    int mode;

    for (mode = 0; mode < MIG_MODE__MAX; mode++) {
        migration_add_notifier_mode(&notifiers[mode], thinvm_migration_event,
                                    mode);
    }
    thinvm_activation_must_succeed = thinvm_migration_will_resume;
    thinvm_activation_failed = thinvm_activation_has_failed;
    qemu_add_vm_change_state_handler(thinvm_vm_state_changed, NULL);
    thinvm_guest_was_sent_away = thinvm_migration_sent_away;
    qemu_register_reset(thinvm_reset, NULL);
}

migration_init(thinvm_migration_register);
