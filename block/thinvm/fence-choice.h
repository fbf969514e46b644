/*
 * thinvm driver layer: which kind of reservation suits a host's block device
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef BLOCK_THINVM_FENCE_CHOICE_H
#define BLOCK_THINVM_FENCE_CHOICE_H

/* Types of persistent reservations, as SCSI numbers them */
enum {
    THINVM_FENCE_WRITE_EXCLUSIVE = 1,
    THINVM_FENCE_REGISTRANTS_ONLY = 5,      /* write exclusive as well */
};

/*
 * For the device whose directory in sysfs is @sysfs.  0: none, and *obstacle
 * says why.
 */
unsigned thinvm_fence_choose(const char *sysfs, bool pr_manager,
                             const char **obstacle);

#endif
