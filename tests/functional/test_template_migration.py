# SPDX-License-Identifier: GPL-2.0-or-later
"""Live migration of a guest whose disk is a linked clone of a template.

The clone is on a LUN that all hosts reach; the template is read by the driver
thinvm-template, on one host from its own disk and on the other from another
node.  The template holds blocks of the guest's model, so what the guest reads
there is judged like what it has written; and they lie across the units that
the clone has of its own, so that the first write of each reads the template.
"""

import json
import os

from lib.context import check, wait_for
from lib.guest import Guest
from lib.image import MiB, create, format_node
from lib.load import finish
from lib.model import OUR_BLOCK, make_block
from lib.templates import Contents, Reader, StoreCluster
from lib.testing import test
from lib.tgt import Target
from lib.vm import (NODE, VM, begin_migration, finish_migration, migrate,
                    wait_migration)

SLOW = 256 << 10            # bytes a second: such a migration does not end
WRITTEN = 10 ** 15          # a number that the guest does not come to


def make_template(ctx, guest):
    """All blocks of the guest's, as if it had written them before."""
    model = guest.model
    end = model.offset(len(model.lanes) - 1, model.blocks - 1) + OUR_BLOCK
    data = bytearray(-(-end // MiB) * MiB)
    found = {}
    for lane in range(len(model.lanes)):
        for index in range(model.blocks):
            at = model.offset(lane, index)
            data[at:at + OUR_BLOCK] = make_block(model.seed, lane, index,
                                                 WRITTEN)
            found[lane, index] = WRITTEN
    model.rebase(found)
    return Contents(ctx, data=data)


class Hosts:
    """Nodes a and c have the template, b does not; all reach the clone."""

    def __init__(self, ctx, guest):
        self.ctx, self.guest = ctx, guest
        self.contents = make_template(ctx, guest)
        self.cluster = StoreCluster(ctx, {'a': 1, 'b': 1, 'c': 1}, ssd=False)
        for node, size in (('a', '64K'), ('c', '1M')):
            self.cluster.add(node, self.contents, 'raw', '--chunk-size', size)
            self.cluster.serve(node)
        probe = Reader(ctx, self.cluster, 'b', self.contents)
        self.near = probe.source()
        self.rest = 'c' if self.near == 'a' else 'a'
        probe.quit()
        self.lun = Target(ctx).add_lun(self.contents.size + 64 * MiB)
        options = self.template(self.rest)
        del options['node-name'], options['read-only']
        create(ctx, self.lun, self.contents.size, backing='json:' + json.dumps(
            {'driver': 'raw', 'file': options}), backing_fmt='raw')

    def template(self, node, retry=60):
        return Reader.options(self.cluster, node, self.contents, timeout=2000,
                              retry=retry)

    def start(self, node, incoming=False, retry=60, device=None):
        """The guest's QEMU on @node."""
        return VM(self.ctx, self.guest, self.lun, host=node, incoming=incoming,
                  device=device, disk=[
                      self.template(node, retry),
                      self.lun.blockdev(NODE + '-file', node),
                      format_node(self.ctx, NODE, NODE + '-file',
                                  backing='template')])

    def restart_server(self, node):
        os.unlink(self.cluster.socket(node))
        self.cluster.serve(node)


def info(vm):
    return vm.qmp.cmd('query-thinvm-template', node_name='template')[0]


def source(vm):
    """The node that it reads the template from."""
    found = info(vm)
    return next((row['cluster-node'] for row in found['replicas']
                 if row['place'] == found.get('source')), None)


def read_from(vm, node):
    return next(row['bytes'] for row in info(vm)['replicas']
                if row['cluster-node'] == node)


def expect_source(vm, node):
    """It soon reads from @node, and the guest with it."""
    wait_for(lambda: source(vm) == node, 60, '%s reads from %s' % (vm.name,
                                                                   node))
    before = read_from(vm, node)
    vm.guest.wait_writes(50)
    wait_for(lambda: read_from(vm, node) > before, 60, '%s reads the template '
             'from %s' % (vm.name, node))


@test(seconds=300)
def there_and_back(ctx):
    """From a host with a copy to one without, and back to another one with a
    copy; the servers that are read from die after, and amid, a migration."""
    guest = Guest(ctx, lanes=4, blocks=1000, base=512, usec=50000)
    hosts = Hosts(ctx, guest)
    first = hosts.start(hosts.near)
    guest.wait_ready()
    guest.start_writing()
    expect_source(first, hosts.near)
    check(info(first)['statistics']['remote-bytes'] == 0, 'not from its own '
          'disk: %s', info(first))

    second = hosts.start('b', incoming=True)
    migrate(first, second)
    expect_source(second, hosts.near)
    first.kill()
    hosts.cluster.servers[hosts.near].kill()
    expect_source(second, hosts.rest)

    hosts.restart_server(hosts.near)
    expect_source(second, hosts.near)
    third = hosts.start(hosts.rest, incoming=True)
    begin_migration(second, third, bandwidth=SLOW)
    wait_migration(second, ('active',))
    hosts.cluster.servers[hosts.near].kill()
    expect_source(second, hosts.rest)
    finish_migration(second, third)
    second.quit()
    hosts.cluster.servers[hosts.rest].kill()
    expect_source(third, hosts.rest)
    check(info(third)['statistics']['remote-bytes'] == 0, 'not from its own '
          'disk: %s', info(third))
    finish(ctx, hosts.lun, guest, third)


@test(seconds=300)
def rescued(ctx):
    """No copy is left for the host of a guest that stops on errors: it stops,
    goes to a host with a copy of its own, and there on as if nothing had
    been."""
    guest = Guest(ctx, lanes=4, blocks=1000, base=512, usec=50000)
    hosts = Hosts(ctx, guest)
    device = {'driver': 'virtio-blk-pci', 'drive': NODE, 'id': 'vda',
              'write-cache': 'on', 'rerror': 'stop', 'werror': 'stop'}
    first = hosts.start('b', retry=1, device=device)
    guest.wait_ready()
    guest.start_writing()
    guest.wait_writes(100)
    for node in (hosts.near, hosts.rest):
        hosts.cluster.servers[node].kill()
    wait_for(lambda: first.status() == 'io-error', 120, 'the guest stops')
    second = hosts.start(hosts.rest, incoming=True, device=device)
    begin_migration(first, second)
    wait_migration(first, ('completed',))
    first.quit()
    guest.attach(second)
    wait_for(lambda: second.status() != 'inmigrate', 60, 'it is there')
    check(second.status() != 'running', 'it runs: nobody has looked')
    second.qmp.cmd('cont')
    expect_source(second, hosts.rest)
    finish(ctx, hosts.lun, guest, second)
