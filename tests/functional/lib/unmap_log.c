/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Preloaded into a QEMU that talks to an iSCSI target: writes down each UNMAP
 * that libiscsi sends, "LUN BLOCK BLOCKS" a line, to the file $UNMAP_LOG; and
 * has the target say that it takes space back in units of $UNMAP_UNIT blocks,
 * as arrays do and tgt does not.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#include <iscsi/iscsi.h>
#include <iscsi/scsi-lowlevel.h>

struct scsi_task *iscsi_unmap_task(struct iscsi_context *iscsi, int lun,
                                   int anchor, int group,
                                   struct unmap_list *list, int list_len,
                                   iscsi_command_cb cb, void *private_data)
{
    __typeof__(iscsi_unmap_task) *next = dlsym(RTLD_NEXT, __func__);
    int fd = open(getenv("UNMAP_LOG"),
                  O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);

    for (int i = 0; i < list_len && fd >= 0; i++) {
        dprintf(fd, "%d %llu %llu\n", lun, (unsigned long long)list[i].lba,
                (unsigned long long)list[i].num);
    }
    close(fd);
    return next(iscsi, lun, anchor, group, list, list_len, cb, private_data);
}

void *scsi_datain_unmarshall(struct scsi_task *task)
{
    __typeof__(scsi_datain_unmarshall) *next = dlsym(RTLD_NEXT, __func__);
    void *data = next(task);
    const char *unit = getenv("UNMAP_UNIT");

    /* INQUIRY of the vital product data page "block limits" */
    if (data && unit && task->cdb[0] == 0x12 && task->cdb[1] & 1 &&
        task->cdb[2] == 0xb0) {
        ((struct scsi_inquiry_block_limits *)data)->opt_unmap_gran =
            strtoul(unit, NULL, 10);
    }
    return data;
}
