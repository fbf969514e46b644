# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that stands for a host with SCSI devices of its own.

What the machine under the tests lacks: block devices with persistent
reservations, device mapper.  What it sees as /dev/sda and /dev/sdb is one
logical unit and two initiators: a LUN of the test's target, or a disk that the
guest's own target (LIO) offers, which can store reservations over a power cut.
Its init is ../guest/scsihost.sh.
"""

import json
import os

from .context import TOP
from .shellguest import Archive, ShellGuest

MODULES = ('virtio_pci', 'virtio_blk', 'virtio_console', 'virtio_scsi',
           'sd_mod', 'sg', 'target_core_mod', 'target_core_file', 'tcm_loop',
           'dm-mod')
INIT = os.path.join(TOP, 'tests', 'functional', 'guest', 'scsihost.sh')


class ScsiHost(ShellGuest):
    def __init__(self, ctx, lun=None, size=None, memory=512):
        """With the @lun of a target; or with a disk of @size bytes."""
        programs = {name: ctx.bin(name) for name in (
            'qemu-storage-daemon', 'qemu-img', 'qemu-io', 'qemu-pr-helper')}
        programs['busybox'] = ctx.need('busybox', 'busybox-static')
        programs['dmsetup'] = ctx.need('dmsetup', 'dmsetup')
        archive = Archive()
        archive.add_file('init', INIT)
        for name, source in programs.items():
            archive.add_file('bin/' + name, source)
        archive.add_libraries(programs.values())
        archive.add_modules(MODULES)
        archive.add_text('etc/passwd', 'root:x:0:0::/:/bin/sh\n'
                         'qemu:x:1000:1000::/:/bin/sh\n')
        archive.add_text('etc/group', 'root:x:0:\nqemu:x:1000:\n')
        archive.add_text('etc/machine-id', '0123456789abcdef' * 2 + '\n')
        initrd = ctx.path('scsihost.initrd')
        archive.write(initrd)
        super().__init__(ctx, 'scsihost', initrd, self._lun(lun) if lun
                         else self._disk(ctx, size), memory,
                         '' if lun else 'lio')
        self.wait_ready()

    @staticmethod
    def _lun(lun):
        argv = ['-device', 'virtio-scsi-pci']
        for name in 'ab':
            argv += ['-blockdev', json.dumps(lun.blockdev(name, name)),
                     '-device', 'scsi-block,share-rw=on,drive=' + name]
        return argv

    @staticmethod
    def _disk(ctx, size):
        path = ctx.path('scsihost.disk')
        with open(path, 'wb') as file:
            file.truncate(size)
        return ['-drive', 'if=virtio,format=raw,file=' + path]
