# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest with eight disks is handed over with all of them, or with none."""

import json

from lib.context import Failure, check, wait_for
from lib.guest import Guest
from lib.image import GiB, create, format_node, require_clean
from lib.load import expect_mode, finish
from lib.node import query_thinvm
from lib.qmp import QMPError
from lib.qsd import StorageDaemon
from lib.testing import test
from lib.tgt import Target
from lib.vm import VM, begin_migration, migrate, wait_migration

MORE = 7                    # disks beside the one that the guest writes to


class Disks:
    def __init__(self, ctx):
        self.ctx = ctx
        target = Target(ctx)
        self.first = target.add_lun(4 * GiB)
        self.more = [target.add_lun(1 * GiB) for _ in range(MORE)]
        create(ctx, self.first, 4 * GiB)
        for lun in self.more:
            create(ctx, lun, 1 * GiB)
        self.guest = Guest(ctx)

    def names(self):
        return ['disk'] + ['more%d' % i for i in range(MORE)]

    def vm(self, host, incoming=False, fail_release=None):
        """@fail_release: the disk whose claim cannot be written a second
        time, which is when it is to be released."""
        extra = []
        for i, lun in enumerate(self.more):
            name = 'more%d' % i
            nodes = [lun.blockdev(name + '-file', host)]
            below = name + '-file'
            if i == fail_release:
                below = name + '-debug'
                nodes.append({
                    'driver': 'blkdebug', 'node-name': below,
                    'image': name + '-file',
                    'set-state': [{'event': 'thinvm_claim_write', 'state': 1,
                                   'new_state': 2}],
                    'inject-error': [{'event': 'thinvm_claim_write',
                                      'state': 2, 'errno': 5,
                                      'once': True}]})
            nodes.append(format_node(self.ctx, name, below))
            for node in nodes:
                extra += ['-blockdev', json.dumps(node)]
            extra += ['-device', json.dumps({'driver': 'virtio-blk-pci',
                                             'drive': name})]
        return VM(self.ctx, self.guest, self.first, host=host,
                  incoming=incoming, extra=extra)

    def owned(self, vm):
        """How many of the disks @vm owns."""
        return sum(query_thinvm(vm.qmp, name)['owner']
                   for name in self.names())

    def expect_owned(self, vm, count):
        wait_for(lambda: self.owned(vm) == count, 20,
                 '%s owns %d disks (it owns %d)' % (vm.name, count,
                                                    self.owned(vm)))

    def start(self, **more):
        vm = self.vm('a', **more)
        self.guest.wait_ready()
        self.guest.start_writing()
        self.guest.wait_writes(200)
        self.expect_owned(vm, MORE + 1)
        return vm

    def finish(self, vm):
        finish(self.ctx, self.first, self.guest, vm)
        for lun in self.more:
            require_clean(self.ctx, lun)


@test(seconds=300)
def all_of_them(ctx):
    """Eight disks there and back, under load."""
    disks = Disks(ctx)
    vm = disks.start()
    for host in 'ba':
        target = disks.vm(host, incoming=True)
        migrate(vm, target)
        disks.expect_owned(target, MORE + 1)
        disks.expect_owned(vm, 0)
        disks.guest.wait_writes(200)
        vm.quit()
        vm = target
    disks.finish(vm)


@test(seconds=300)
def one_is_not_released(ctx):
    """The source cannot release one: the migration fails, and the source's
    guest goes on with all of them."""
    disks = Disks(ctx)
    source = disks.start(fail_release=4)
    target = disks.vm('b', incoming=True)
    begin_migration(source, target)
    wait_migration(source, ('failed',))
    target.kill()
    check(source.status() == 'running', 'the source is %s', source.status())
    disks.expect_owned(source, MORE + 1)
    expect_mode(source, 'writeback')
    disks.guest.wait_writes(300)
    disks.finish(source)


@test(seconds=300)
def one_is_not_activated(ctx):
    """Another process has taken one before the target could: the target
    does not run, and holds none of the others; when the way is free it
    takes all of them."""
    disks = Disks(ctx)
    source = disks.start()
    disks.guest.stop_writing()
    source.qmp.cmd('stop')
    target = disks.vm('b', incoming=True)
    begin_migration(source, target)
    wait_migration(source, ('completed',))
    disks.expect_owned(source, 0)

    robber = StorageDaemon(ctx, host='x')
    robber.add_disk(disks.more[4])
    try:
        target.qmp.cmd('cont')
    except QMPError as err:
        ctx.log('cont is refused: %s' % err.desc)
        check(str(robber.process.popen.pid) in err.desc,
              'the message does not name the owning process: %s', err.desc)
    else:
        raise Failure('the target runs without one of its disks')
    check(target.status() != 'running', 'the target runs')
    disks.expect_owned(target, 0)

    robber.quit()
    source.kill()
    disks.guest.attach(target)
    target.qmp.cmd('cont')
    disks.expect_owned(target, MORE + 1)
    disks.guest.start_writing()
    disks.guest.wait_writes(200)
    disks.finish(target)
