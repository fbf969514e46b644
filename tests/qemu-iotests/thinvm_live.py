# SPDX-License-Identifier: GPL-2.0-or-later
#
# Iotests of disks in use: qemu-system without a guest that has thinvm nodes,
# each exported by NBD, which is what writes to it and reads from it.  (What
# the monitor's own qemu-io says goes to QEMU's output, where no test sees a
# pattern that does not match.)

import time

import iotests
import thinvm_iotest


class TestCase(thinvm_iotest.TestCase):
    """self.vm: the machine, while there is one; self.uri[disk]: its disks."""

    def setUp(self):
        super().setUp()
        self.vm = None
        self.uri = {}
        self.addCleanup(lambda: self.vm and self.vm.shutdown(hard=True))

    def start(self, *blockdevs, disks=('disk',)):
        self.vm = iotests.VM()
        self.vm.add_args(*blockdevs)
        self.vm.launch()
        sock = self.socket('vm')
        self.vm.cmd('nbd-server-start',
                    {'addr': {'type': 'unix', 'data': {'path': sock}}})
        for disk in disks:
            self.vm.cmd('block-export-add',
                        {'id': f'export-{disk}', 'type': 'nbd',
                         'node-name': disk, 'name': disk, 'writable': True})
            self.uri[disk] = f'nbd+unix:///{disk}?socket={sock}'

    def stop(self, *images):
        """Ends the machine; the images are sound after that."""
        self.vm.shutdown()
        self.vm = None
        for image in images:
            self.check_clean(image)

    def hd(self, *commands, disk='disk'):
        """qemu-io commands on a disk, all of which must succeed."""
        self.io(self.uri[disk], *commands, fmt='raw')

    def take(self, name, disk='disk'):
        self.vm.cmd('blockdev-snapshot-internal-sync',
                    {'device': disk, 'name': name})

    def wait_for(self, condition):
        deadline = time.monotonic() + 60
        while not condition():
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.02)
