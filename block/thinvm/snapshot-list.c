/*
 * thinvm driver layer: the tree of snapshots in words
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * For `qemu-img snapshot -l`, whose table is the same for all formats and has
 * no column for a parent.  Relies on what the image tells of itself
 * (ImageInfoSpecificThinvm), as `qemu-img info` does.  Parents may be anything
 * in a hostile image: each snapshot is printed once at most, and those that no
 * root leads to are not.
 */

#include "qemu/osdep.h"
#include "qemu/cutils.h"
#include "qapi/error.h"
#include "qapi/qapi-types-block-core.h"
#include "block/block-io.h"
#include "block/graph-lock.h"
#include "snapshot-list.h"

#define MOST_INDENT     20      /* levels */

typedef struct Level {
    ThinvmSnapshotInfo *info;
    unsigned depth;
} Level;

static void print_line(const ThinvmSnapshotInfo *info, unsigned depth)
{
    g_autofree char *bytes = info->has_exclusive_bytes ?
                             size_to_str(info->exclusive_bytes) : NULL;

    printf("%*s%s  %s%s%s", 2 * (int)MIN(depth, MOST_INDENT), "", info->id,
           info->name, info->current ? "  (the disk goes on from here)" : "",
           info->state == THINVM_SNAPSHOT_STATE_PRESENT ? "" :
           info->state == THINVM_SNAPSHOT_STATE_DELETED ?
           "  (deleted, has children)" : "  (being deleted)");
    if (bytes) {
        /* as wide as in the table above it */
        printf("  frees %9s", bytes);
    }
    printf("\n");
}

/* @left: id -> ThinvmSnapshotInfo of those that were not printed yet */
static void print_below(GHashTable *left, ThinvmSnapshotInfo *root)
{
    g_autoptr(GArray) stack = g_array_new(false, false, sizeof(Level));
    Level at = { .info = root };

    g_array_append_val(stack, at);
    while (stack->len) {
        guint place = stack->len - 1;

        at = g_array_index(stack, Level, place);
        g_array_set_size(stack, place);
        if (!g_hash_table_remove(left, at.info->id)) {
            continue;
        }
        print_line(at.info, at.depth);
        for (strList *c = at.info->children; c; c = c->next) {
            Level child = {
                .info = g_hash_table_lookup(left, c->value),
                .depth = at.depth + 1,
            };

            if (child.info) {
                /* before its elder ones: the last is printed first */
                g_array_insert_val(stack, place, child);
            }
        }
    }
}

void thinvm_print_snapshot_tree(BlockDriverState *bs)
{
    g_autoptr(ImageInfoSpecific) spec = NULL;
    g_autoptr(GHashTable) left = g_hash_table_new(g_str_hash, g_str_equal);
    ThinvmSnapshotInfoList *list, *l;

    GRAPH_RDLOCK_GUARD_MAINLOOP();

    spec = bdrv_get_specific_info(bs, NULL);
    if (!spec || spec->type != IMAGE_INFO_SPECIFIC_KIND_THINVM ||
        !spec->u.thinvm.data->has_snapshot_tree) {
        return;
    }
    list = spec->u.thinvm.data->snapshot_tree;
    if (!list || !list->next) {
        return;
    }
    for (l = list; l; l = l->next) {
        g_hash_table_insert(left, l->value->id, l->value);
    }
    printf("Snapshot tree:\n");
    for (l = list; l; l = l->next) {
        if (!l->value->parent) {
            print_below(left, l->value);
        }
    }
}
