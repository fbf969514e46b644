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

static int thinvm_migration_event(NotifierWithReturn *notifier,
                                  MigrationEvent *e, Error **errp)
{
    ThinvmMigrating m = {
        .migrating = e->type == MIG_EVENT_PRECOPY_SETUP,
        .reason = e->type == MIG_EVENT_PRECOPY_SETUP ? "migration started" :
                  e->type == MIG_EVENT_PRECOPY_DONE ? "migration completed" :
                                                      "migration failed",
    };
    BDRVThinvmState *s;

    QTAILQ_FOREACH(s, &thinvm_nodes, link) {
        Error *local_err = NULL;

        if (thinvm_run(s->bs, thinvm_co_set_migrating, &m, &local_err) >= 0) {
            continue;
        }
        if (m.migrating) {
            /* Refuses the migration; the nodes done so far hear FAILED */
            error_propagate(errp, local_err);
            return -EIO;
        }
        error_report_err(local_err);
    }
    return 0;
}

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

static int coroutine_fn GRAPH_RDLOCK
thinvm_co_commit(BlockDriverState *bs, void *opaque, Error **errp)
{
    return thinvm_co_flush_to_os(bs);
}

static void thinvm_reset(void *opaque)
{
    BDRVThinvmState *s;

    QTAILQ_FOREACH(s, &thinvm_nodes, link) {
        if (qatomic_read(&s->owner) &&
            thinvm_run(s->bs, thinvm_co_commit, NULL, NULL) < 0) {
            warn_report("thinvm node '%s': the mapping could not be "
                        "committed at the guest's reset",
                        bdrv_get_node_name(s->bs));
        }
    }
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
    qemu_register_reset(thinvm_reset, NULL);
}

migration_init(thinvm_migration_register);
