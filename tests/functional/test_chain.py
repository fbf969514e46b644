# SPDX-License-Identifier: GPL-2.0-or-later
"""External snapshots: scripts/thinvm-chain over LUNs, while a guest writes.

Each image has a LUN of its own.  The guest's disk is the last of the chain;
what it wrote lies somewhere in the chain, and has to be read whatever became
of the images in between.  A deletion is interrupted where it is longest, amid
copying into the child: by the death of the command, and of the host.
"""

import os
import subprocess
import sys

from lib.context import TOP, Process, check, wait_for
from lib.contents import scan
from lib.guest import Guest
from lib.image import GiB, create, info, require_clean
from lib.load import examine, go_on
from lib.qmp import QMPError
from lib.testing import test
from lib.tgt import Target
from lib.vm import VM

CHAIN = os.path.join(TOP, 'scripts', 'thinvm-chain')
# What makes a merge last, beyond the guest's own blocks
FILLED = '768M', '96M'
CRAWL = 4096                    # bytes a second


class Chain:
    def __init__(self, ctx):
        self.ctx = ctx
        self.target = Target(ctx)
        self.luns = {}
        self.tree = ctx.path('tree')
        self.monitor = ctx.path('monitor')
        base = self._lun('base')
        create(ctx, base, GiB)
        ctx.run(ctx.bin('qemu-io'), '-f', 'thinvm', '-c',
                'write -P 7 %s %s' % FILLED, base.url)
        self.chain('create', 'base', '--volume', base.url, running=False)
        self.guest = Guest(ctx, lanes=4, blocks=500, zero=3, discard=3,
                           flush=20)
        self.vm = VM(ctx, self.guest, base, extra=[
            '-chardev', 'socket,id=chain,server=on,wait=off,path=' +
            self.monitor, '-mon', 'chardev=chain,mode=control'])
        self.guest.wait_ready()
        self.guest.start_writing()
        self.guest.wait_writes(300)

    def _lun(self, name):
        self.luns[name] = self.target.add_lun(2 * GiB)
        return self.luns[name]

    def argv(self, *args, running=True):
        return [sys.executable, CHAIN, '--tree', self.tree,
                '--qemu-img', self.ctx.bin('qemu-img'),
                *(['--qmp', self.monitor] if running else []), *args]

    def chain(self, *args, running=True, ok=(0,)):
        return self.ctx.run(*self.argv(*args, running=running), ok=ok)

    def overlay(self, name, parent):
        self.chain('create', name, '--parent', parent, '--volume',
                   self._lun(name).url)
        self.guest.wait_writes(300)

    def shown(self):
        """[(depth, name, deleted)]"""
        lines = self.chain('show', running=False).splitlines()
        return [((len(s) - len(s.lstrip())) // 2, s.split()[0],
                 '(deleted)' in s) for s in lines]

    def begin_delete(self, name):
        """Its job crawls, and may be at its end only when told so."""
        process = Process(self.ctx, 'delete-' + name,
                          self.argv('delete', name))
        wait_for(lambda: self.set_speed(CRAWL), 60, 'a job that copies',
                 interval=0.001)
        return process

    def jobs(self):
        return [job['device'] for job in
                self.vm.qmp.cmd('query-block-jobs')]

    def set_speed(self, speed):
        jobs = self.jobs()
        for job in jobs:
            try:
                self.vm.qmp.cmd('block-job-set-speed', device=job,
                                speed=speed)
            except QMPError:
                return False                # it is just beginning
        return jobs

    def last(self, name):
        """What is left is one image that needs no other."""
        check(self.shown() == [(0, name, False)], 'left: %s', self.shown())
        lun = self.luns[name]
        require_clean(self.ctx, lun)
        check('backing-filename' not in info(self.ctx, lun),
              '%s has a backing file', name)
        self.ctx.run(self.ctx.bin('qemu-io'), '-f', 'thinvm', '-r', '-c',
                     'read -P 7 %s %s' % FILLED, lun.url)
        return lun


@test(seconds=300)
def under_a_guest(ctx):
    """Created and deleted, from the middle and from the end; a command dies
    amid a merge and is given again."""
    chain = Chain(ctx)
    guest = chain.guest
    for name, parent in ('s1', 'base'), ('s2', 's1'), ('s3', 's2'):
        chain.overlay(name, parent)
    chain.chain('delete', 's3', ok=(1,))    # the guest's disk
    chain.chain('delete', 's2')
    guest.wait_writes(200)

    process = chain.begin_delete('base')
    process.kill()
    check(chain.shown() == [(0, 'base', True), (1, 's1', False),
                            (2, 's3', False)], 'the tree is %s',
          chain.shown())
    guest.wait_writes(200)
    chain.set_speed(0)
    chain.chain('delete', 'base')
    guest.wait_writes(200)
    chain.chain('delete', 's1')
    guest.wait_writes(200)
    guest.stop_writing()
    guest.verify('read by the guest, of all that it wrote to four images')
    chain.vm.quit()
    lun = chain.last('s3')
    guest.model.require(scan(ctx, guest.model, lun), 'acked',
                        'read from outside')


@test(seconds=300)
def host_dies_amid_a_merge(ctx):
    """The deletion is finished without QEMU; the guest starts elsewhere."""
    chain = Chain(ctx)
    guest = chain.guest
    for name, parent in ('s1', 'base'), ('s2', 's1'):
        chain.overlay(name, parent)
    process = chain.begin_delete('base')
    guest.wait_writes(200)
    check(chain.jobs(), 'the merge is over')
    chain.vm.kill()
    check(process.wait() == 1, 'the command did not notice')
    # Now s1 is a part of base and what it had itself
    chain.chain('delete', 'base', running=False)
    chain.chain('delete', 's1', running=False)
    lun = chain.last('s2')
    examine(ctx, guest, lun, 'flushed', 'after the death of the host')
    go_on(ctx, guest, lun)
