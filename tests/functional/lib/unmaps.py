# SPDX-License-Identifier: GPL-2.0-or-later
"""The UNMAP commands that a QEMU sends to an iSCSI target (unmap_log.c)."""

import os
import subprocess

from .context import check

SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)),
                      'unmap_log.c')
BLOCK = 512


class Unmaps:
    """Have a process log them: start it with .env."""

    def __init__(self, ctx, unit=0):
        """@unit: bytes that the target says it takes back at a time."""
        library = ctx.path('unmap_log.so')
        done = subprocess.run(
            ['gcc', '-O2', '-Wall', '-shared', '-fPIC', '-o', library, SOURCE,
             '-ldl'], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, check=False)
        check(done.returncode == 0, 'gcc: %s', done.stdout)
        self._path = ctx.path(ctx.unique('unmaps'))
        self.unit = unit
        self.env = dict(os.environ, LD_PRELOAD=library, UNMAP_LOG=self._path)
        if unit:
            self.env['UNMAP_UNIT'] = str(unit // BLOCK)

    def of(self, lun):
        """(offset, bytes) of each so far, in their order."""
        if not os.path.exists(self._path):
            return []
        with open(self._path, encoding='ascii') as file:
            lines = [[int(word) for word in line.split()] for line in file]
        return [(block * BLOCK, blocks * BLOCK)
                for number, block, blocks in lines if number == lun.number]

    def total(self, lun):
        return sum(length for _, length in self.of(lun))

    def check_aligned(self, lun):
        for offset, length in self.of(lun):
            check(offset % self.unit == 0 and length % self.unit == 0,
                  'UNMAP of %d bytes at %d, unit %d', length, offset,
                  self.unit)
