/*
 * thinvm driver layer: the tree of snapshots as users see it
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Reads all records, links parents and children, and sums up what each
 * snapshot holds alone: the trees are walked for that, but not below pages
 * that another tree names too, so what is looked at is about what would come
 * free.  Changes nothing.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "driver-snapshot.h"

typedef struct Tree {
    ThinvmSnapshotInfoList *list;   /* the oldest first */
    unsigned budget;
} Tree;

static ThinvmSnapshotState snapshot_state(const ThinvmSnapshot *snap)
{
    if (snap->flags & THINVM_SNAPSHOT_TRASH) {
        return THINVM_SNAPSHOT_STATE_FREEING;
    }
    return snap->flags & THINVM_SNAPSHOT_DELETED ?
           THINVM_SNAPSHOT_STATE_DELETED : THINVM_SNAPSHOT_STATE_PRESENT;
}

static char *id_string(uint64_t id)
{
    return g_strdup_printf("%" PRIu64, id);
}

static ThinvmSnapshotInfo *snapshot_info(const ThinvmSnapshot *snap)
{
    ThinvmSnapshotInfo *info = g_new0(ThinvmSnapshotInfo, 1);

    *info = (ThinvmSnapshotInfo) {
        .id = id_string(snap->id),
        .name = g_strdup(snap->name),
        .state = snapshot_state(snap),
        .parent = snap->parent_id ? id_string(snap->parent_id) : NULL,
        .q_protected = snap->flags & THINVM_SNAPSHOT_PROTECTED,
        .date_sec = snap->date_sec,
        .date_nsec = snap->date_nsec,
        .vm_clock_sec = snap->vm_clock_nsec / NANOSECONDS_PER_SECOND,
        .vm_clock_nsec = snap->vm_clock_nsec % NANOSECONDS_PER_SECOND,
        .virtual_size = snap->virtual_size,
        .vm_state_size = snap->vmstate_size,
    };
    return info;
}

static uint64_t current_snapshot(BDRVThinvmState *s)
{
    ThinvmStore *st = qatomic_read(&s->store);
    unsigned token = thinvm_store_request_begin(st);
    ThinvmState *state = thinvm_store_state(st);
    ThinvmInfoState info;

    thinvm_state_lock(state);
    thinvm_state_info(state, &info);
    thinvm_state_unlock(state);
    thinvm_store_request_end(st, token);
    return info.current_snapshot_id;
}

static int coroutine_fn GRAPH_RDLOCK
add_exclusive(BDRVThinvmState *s, uint32_t slot, uint64_t id,
              unsigned *budget, ThinvmSnapshotInfo *info, Error **errp)
{
    ThinvmSnapshotName name = { .slot = slot, .id = id };
    ThinvmExclusive sum;
    int ret = thinvm_store_exclusive(s->store, &name, budget, &sum, errp);

    if (ret == -ETIME || ret == -ENOENT) {
        return 0;               /* too much to look at, or gone meanwhile */
    }
    info->has_exclusive_bytes = true;
    info->exclusive_bytes = sum.clusters * s->cluster_size +
                            sum.pages * THINVM_PAGE_SIZE;
    return ret;
}

/* Each info joins the children of its parent, in order of @list */
static void link_children(GHashTable *by_id, ThinvmSnapshotInfoList *list,
                          uint64_t current)
{
    g_autoptr(GHashTable) tails =
        g_hash_table_new(g_direct_hash, g_direct_equal);
    g_autofree char *current_id = id_string(current);

    for (; list; list = list->next) {
        ThinvmSnapshotInfo *info = list->value, *parent;
        strList **tail;

        info->current = !strcmp(info->id, current_id);
        parent = info->parent ? g_hash_table_lookup(by_id, info->parent)
                              : NULL;
        if (!parent) {
            continue;
        }
        tail = g_hash_table_lookup(tails, parent) ?: &parent->children;
        QAPI_LIST_APPEND(tail, g_strdup(info->id));
        g_hash_table_insert(tails, parent, tail);
    }
}

static int compare_age(const void *a, const void *b)
{
    const ThinvmSnapshotInfoList *const *la = a, *const *lb = b;
    uint64_t id_a = g_ascii_strtoull((*la)->value->id, NULL, 10);
    uint64_t id_b = g_ascii_strtoull((*lb)->value->id, NULL, 10);

    return id_a < id_b ? -1 : id_a > id_b;
}

/* The slots that they are in are used again */
static ThinvmSnapshotInfoList *sort_by_age(ThinvmSnapshotInfoList *list)
{
    g_autoptr(GPtrArray) items = g_ptr_array_new();
    ThinvmSnapshotInfoList **tail = &list;

    for (; list; list = list->next) {
        g_ptr_array_add(items, list);
    }
    g_ptr_array_sort(items, compare_age);
    for (guint i = 0; i < items->len; i++) {
        *tail = g_ptr_array_index(items, i);
        tail = &(*tail)->next;
    }
    *tail = NULL;
    return list;
}

static int coroutine_fn GRAPH_RDLOCK
thinvm_co_snapshot_tree(BlockDriverState *bs, void *opaque, Error **errp)
{
    BDRVThinvmState *s = bs->opaque;
    g_autoptr(GHashTable) by_id = g_hash_table_new(g_str_hash, g_str_equal);
    Tree *t = opaque;
    ThinvmSnapshot snap;

    for (uint32_t slot = 0; slot < thinvm_nb_slots(s); slot++) {
        ThinvmSnapshotInfo *info;
        int ret = thinvm_store_read_snapshot(s->store, slot, &snap, errp);

        if (ret == -ENOENT) {
            continue;
        }
        if (ret < 0) {
            return ret;
        }
        info = snapshot_info(&snap);
        QAPI_LIST_PREPEND(t->list, info);
        g_hash_table_insert(by_id, info->id, info);
        ret = add_exclusive(s, slot, snap.id, &t->budget, info, errp);
        if (ret < 0) {
            return ret;
        }
    }
    t->list = sort_by_age(t->list);
    link_children(by_id, t->list, current_snapshot(s));
    return 0;
}

bool thinvm_snapshot_tree(BlockDriverState *bs, unsigned budget,
                          ThinvmSnapshotInfoList **list, Error **errp)
{
    Tree t = { .budget = budget };

    if (thinvm_run(bs, thinvm_co_snapshot_tree, &t, errp) < 0) {
        qapi_free_ThinvmSnapshotInfoList(t.list);
        return false;
    }
    *list = t.list;
    return true;
}
