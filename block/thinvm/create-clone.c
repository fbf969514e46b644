/*
 * thinvm driver layer: linked clones of a snapshot
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A linked clone is an image whose backing file is a snapshot of another
 * thinvm image, named by a "json:" file name with the option "snapshot".  It
 * lives as long as that snapshot does, so the snapshot must be protected.
 * Creating a clone sees to that.  If the image is in use by another program
 * only that program can change it; then it must have been told before.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/cutils.h"
#include "qobject/qdict.h"
#include "qobject/qjson.h"
#include "block/qdict.h"
#include "driver-snapshot.h"

/* The options in a file name that names a snapshot; else NULL */
static QDict *thinvm_clone_options(const char *backing_name)
{
    g_autoptr(QDict) options = NULL;
    const char *json;
    QObject *parsed;

    if (!strstart(backing_name, "json:", &json)) {
        return NULL;
    }
    parsed = qobject_from_json(json, NULL);
    options = qobject_to(QDict, parsed);
    if (!options) {
        qobject_unref(parsed);
        return NULL;            /* opening it will tell */
    }
    qdict_flatten(options);
    if (g_strcmp0(qdict_get_try_str(options, "driver"), "thinvm") ||
        (!qdict_haskey(options, THINVM_OPT_SNAPSHOT_ID) &&
         !qdict_haskey(options, THINVM_OPT_SNAPSHOT_NAME))) {
        return NULL;
    }
    return g_steal_pointer(&options);
}

typedef struct ThinvmParent {
    uint64_t id;
    char *name;
    bool protected;
} ThinvmParent;

/* What the clone will read.  False if it cannot be opened at all */
static bool coroutine_fn thinvm_clone_look(const QDict *options,
                                           ThinvmParent *parent, Error **errp)
{
    BlockDriverState *bs;
    BDRVThinvmState *s;

    bs = bdrv_co_open(NULL, NULL, qdict_clone_shallow(options),
                      BDRV_O_NO_BACKING, errp);
    if (!bs) {
        return false;
    }
    s = bs->opaque;
    parent->id = s->view->id;
    parent->name = g_strdup(s->view->name);
    parent->protected = s->view->flags & THINVM_SNAPSHOT_PROTECTED;
    bdrv_co_unref(bs);
    return true;
}

static int coroutine_fn thinvm_clone_protect(QDict *options,
                                             const ThinvmParent *parent,
                                             Error **errp)
{
    ERRP_GUARD();
    g_autofree char *id = g_strdup_printf("%" PRIu64, parent->id);
    BlockDriverState *bs;
    int ret = -EBUSY;

    qdict_del(options, THINVM_OPT_SNAPSHOT_ID);
    qdict_del(options, THINVM_OPT_SNAPSHOT_NAME);
    qdict_del(options, "read-only");
    qdict_del(options, "auto-read-only");
    qdict_del(options, "node-name");
    bs = bdrv_co_open(NULL, NULL, qobject_ref(options),
                      BDRV_O_RDWR | BDRV_O_NO_BACKING, errp);
    if (bs) {
        bdrv_graph_co_rdlock();
        ret = thinvm_snapshot_protect(bs, id, NULL, true, errp);
        bdrv_graph_co_rdunlock();
        bdrv_co_unref(bs);
    }
    if (ret < 0) {
        error_prepend(errp, "Snapshot %s '%s' of the backing file is not "
                      "protected from being deleted, and cannot be now: ",
                      id, parent->name);
        error_append_hint(errp, "The program that has the image open can do "
                          "it: thinvm-snapshot-protect.\n");
    }
    return ret;
}

int coroutine_fn thinvm_clone_begin(const char *backing_name, Error **errp)
{
    g_autoptr(QDict) options = thinvm_clone_options(backing_name);
    g_autofree char *name = NULL;
    ThinvmParent parent = { };
    int ret = 0;

    if (!options) {
        return 0;
    }
    if (!thinvm_clone_look(options, &parent, errp)) {
        return -EINVAL;
    }
    name = parent.name;
    if (!parent.protected) {
        ret = thinvm_clone_protect(options, &parent, errp);
    }
    return ret;
}
