/*
 * Unit tests of the choice of a reservation for a host's block device
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * On directories that look as sysfs does.
 */
#include "qemu/osdep.h"
#include <glib/gstdio.h>
#include "block/thinvm/fence-choice.h"

static void put(const char *dir, const char *name, const char *text)
{
    g_autofree char *path = g_build_filename(dir, name, NULL);
    g_autofree char *parent = g_path_get_dirname(path);

    g_assert_cmpint(g_mkdir_with_parents(parent, 0700), ==, 0);
    g_assert(g_file_set_contents(path, text, -1, NULL));
}

static void scrap(const char *path)
{
    g_autoptr(GDir) dir = g_dir_open(path, 0, NULL);
    const char *name;

    while (dir && (name = g_dir_read_name(dir))) {
        g_autofree char *child = g_build_filename(path, name, NULL);

        scrap(child);
    }
    g_remove(path);
}

typedef struct Case {
    const char *name;
    const char *uuid;           /* device mapper's */
    const char *other;          /* a file that is there as well */
    bool pr_manager;
    unsigned type;
    const char *obstacle;       /* is part of it */
} Case;

static const Case cases[] = {
    { "disk", .type = THINVM_FENCE_WRITE_EXCLUSIVE },
    { "disk-helped", .pr_manager = true,
      .type = THINVM_FENCE_WRITE_EXCLUSIVE },
    { "partition", .other = "partition", .obstacle = "partition" },
    { "disk-below", .other = "holders/dm-0", .obstacle = "others lie on it" },
    { "lvm", "LVM-mpath-x\n", .pr_manager = true, .obstacle = "mapper" },
    { "crypt", "CRYPT-LUKS2-x\n", .pr_manager = true, .obstacle = "mapper" },
    { "nameless", "\n", .pr_manager = true, .obstacle = "mapper" },
    { "unknown", .other = "dm/name", .pr_manager = true,
      .obstacle = "mapper" },
    { "multipath", "mpath-3600\n", .pr_manager = true,
      .type = THINVM_FENCE_REGISTRANTS_ONLY },
    { "multipath-alone", "mpath-3600\n", .obstacle = "pr-manager" },
    { "multipath-partition", "part1-mpath-3600\n", .pr_manager = true,
      .obstacle = "mapper" },
    { "multipath-below", "mpath-3600\n", "holders/dm-1", true,
      .obstacle = "others lie on it" },
};

static void test_case(const void *opaque)
{
    const Case *c = opaque;
    g_autofree char *dir = g_dir_make_tmp("thinvm-fence-XXXXXX", NULL);
    const char *obstacle = NULL;
    unsigned type;

    g_assert(dir);
    if (c->uuid) {
        put(dir, "dm/uuid", c->uuid);
    }
    if (c->other) {
        put(dir, c->other, "1\n");
    }
    type = thinvm_fence_choose(dir, c->pr_manager, &obstacle);
    scrap(dir);
    g_assert_cmpuint(type, ==, c->type);
    g_assert((type == 0) == (obstacle != NULL));
    g_assert(!c->obstacle || strstr(obstacle, c->obstacle));
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    for (unsigned i = 0; i < ARRAY_SIZE(cases); i++) {
        g_autofree char *path =
            g_strdup_printf("/thinvm/fence-choice/%s", cases[i].name);

        g_test_add_data_func(path, &cases[i], test_case);
    }
    return g_test_run();
}
