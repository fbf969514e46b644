/*
 * thinvm driver layer: which kind of reservation suits a host's block device
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Looks at sysfs alone, so that it can be tested on a directory.
 *
 *   a whole device that nothing else lies on    write exclusive
 *   a multipath device (device mapper's UUID    write exclusive, registrants
 *   begins with "mpath-"), likewise             only
 *   anything else                               none
 *
 * Volumes of a volume manager, partitions, and a device that such are made of
 * have other users, whom a reservation would fence off.  When in doubt: none.
 *
 * A reservation is held by one path (an I_T nexus).  Of a multipath device,
 * whose writes come by all of its paths, each is registered under the same
 * key, and those who are registered may write.  That takes who knows the
 * paths: qemu-pr-helper, through libmpathpersist.  A plain SG_IO would reach
 * one of them, and the kernel's writes by the others would be refused.
 */

#include "qemu/osdep.h"
#include "fence-choice.h"

static bool sysfs_has(const char *dir, const char *name)
{
    g_autofree char *path = g_build_filename(dir, name, NULL);

    return access(path, F_OK) == 0;
}

static bool sysfs_has_holders(const char *dir)
{
    g_autofree char *path = g_build_filename(dir, "holders", NULL);
    g_autoptr(GDir) users = g_dir_open(path, 0, NULL);

    return users && g_dir_read_name(users);
}

unsigned thinvm_fence_choose(const char *sysfs, bool pr_manager,
                             const char **obstacle)
{
    g_autofree char *path = g_build_filename(sysfs, "dm", "uuid", NULL);
    g_autofree char *uuid = NULL;

    if (sysfs_has(sysfs, "partition")) {
        *obstacle = "not a whole SCSI device: a partition";
        return 0;
    }
    if (sysfs_has_holders(sysfs)) {
        *obstacle = "not a whole SCSI device: others lie on it";
        return 0;
    }
    if (!sysfs_has(sysfs, "dm")) {
        return THINVM_FENCE_WRITE_EXCLUSIVE;
    }
    if (!g_file_get_contents(path, &uuid, NULL, NULL) ||
        !g_str_has_prefix(uuid, "mpath-")) {
        *obstacle = "not a whole SCSI device: a device mapper volume";
        return 0;
    }
    if (!pr_manager) {
        *obstacle = "a multipath device is reserved through a pr-manager only";
        return 0;
    }
    return THINVM_FENCE_REGISTRANTS_ONLY;
}
