# SPDX-License-Identifier: GPL-2.0-or-later
"""The resource agent in a real Pacemaker cluster: two nodes, fencing, a guest
that writes.

The nodes are made of namespaces (lib/cluster.py), the programs are the
distribution's: corosync, pacemaker, ocf-tester.  Needs root.
"""

import os
import shutil

from lib.resource_agent import AGENT, AgentVM, write_config
from lib.cluster import SAN, Cluster, own_network
from lib.contents import scan
from lib.context import check, wait_for
from lib.guest import Guest
from lib.host import Host
from lib.image import GiB, create, require_clean
from lib.node import query_thinvm
from lib.qmp import QMPClosed
from lib.testing import test
from lib.tgt import Target

NAMES = ('node1', 'node2')


@test(seconds=600, slow=True)
def ocf_tester(ctx):
    """The agent is what OCF wants of one."""
    tester = ctx.need('ocf-tester', 'resource-agents')
    ctx.need('xmllint', 'libxml2-utils')
    lun = Target(ctx).add_lun(2 * GiB)
    create(ctx, lun, 2 * GiB)
    directory = ctx.path('hosta')
    os.mkdir(directory)
    config = write_config(ctx, lun)
    schema = '/usr/share/resource-agents'
    shutil.copy(os.path.join(schema, 'ra-api-1.dtd'), directory)
    host = Host(ctx, 'hosta')
    options = []
    for name, value in (
            ('config', config), ('name', 'vm'), ('shutdown_timeout', 1),
            ('qemu', ctx.bin('qemu-system-x86_64')),
            ('state_dir', os.path.join(directory, 'state')),
            ('log', ctx.log_file('vm'))):
        options += ['-o', '%s=%s' % (name, value)]
    status, out, err = host.run(
        'env', '-C', directory, 'OCF_ROOT=/usr/lib/ocf', tester, '-v', '-n',
        'vm', *options, AGENT, seconds=400)
    check(status == 0 and 'passed all tests' in out, 'ocf-tester: %s %s',
          out[-500:], err[-500:])
    check('failed' not in out, 'ocf-tester: %s', out[-500:])
    require_clean(ctx, lun)


class Scene:
    """The cluster, with the guest started by it on the first node."""

    def __init__(self, ctx):
        self.ctx = ctx
        own_network(ctx)
        self.lun = Target(ctx, SAN + '.1').add_lun(2 * GiB)
        create(ctx, self.lun, 2 * GiB)
        self.guest = Guest(ctx)
        config = write_config(ctx, self.lun)
        for name in NAMES:
            os.mkdir(ctx.path(name))
        self.cluster = Cluster(ctx, NAMES)
        self.cluster.configure(
            config=config, qemu=ctx.bin('qemu-system-x86_64'),
            shutdown_timeout=1, log=ctx.log_file('vm'))
        self.cluster.wait_where('node1', 'node1')

    def booted(self, name):
        """The guest that the cluster has started there."""
        vm = self.moved(name)
        self.guest.wait_ready()
        return vm

    def moved(self, name):
        vm = AgentVM(self.ctx, self.guest, name, self.ctx.path(name))
        self.guest.attach(vm)
        return vm

    def write(self):
        self.guest.errors.clear()
        self.guest.start_writing()
        self.guest.wait_writes(300)

    def pid(self, name):
        """QEMU's on that node, as the node numbers it; None if none runs."""
        _, out, _ = self.cluster.hosts[name].run(
            'sh', '-c', 'for p in /proc/[0-9]*; do read -r c < $p/comm && '
            'test "$c" = qemu-system-x86 && echo ${p#/proc/}; done')
        return out.split()[0] if out.split() else None

    def survived(self, what):
        """All that was flushed is there, and the guest can go on."""
        found = scan(self.ctx, self.guest.model, self.lun)
        self.guest.model.require(found, 'flushed', what)
        self.guest.model.rebase(found)
        return found

    def finish(self, name):
        self.guest.stop_writing()
        self.guest.verify('at the end')
        host = self.cluster.hosts[name]
        host.run('crm_resource', '--resource', 'vm', '--meta',
                 '--set-parameter', 'target-role', '--parameter-value',
                 'Stopped')
        wait_for(lambda: self.pid(name) is None, 120, 'the VM is stopped',
                 interval=1)
        require_clean(self.ctx, self.lun)
        self.guest.model.require(scan(self.ctx, self.guest.model, self.lun),
                                 'acked', 'read from outside')


@test(seconds=900, slow=True)
def killed_moved_and_without_power(ctx):
    """kill -9 of QEMU: restarted.  A planned move: a live migration.  A node
    without power: fenced, and the VM restarted on the other one."""
    scene = Scene(ctx)
    cluster, guest = scene.cluster, scene.guest
    scene.booted('node1')
    scene.write()
    pid = scene.pid('node1')
    cluster.hosts['node1'].run('kill', '-9', pid)
    wait_for(lambda: scene.pid('node1') not in (None, pid), 180,
             'the VM is restarted after kill -9', interval=1)
    scene.booted('node1')
    scene.survived('after kill -9')

    scene.write()
    cluster.hosts['node1'].run('crm_resource', '--move', '--resource', 'vm',
                               '--node', 'node2')
    cluster.wait_where('node1', 'node2')
    vm = scene.moved('node2')
    guest.wait_writes(300)
    guest.no_errors()
    take = query_thinvm(vm.qmp, 'disk')['take-over']
    check(take['warm'], 'the take-over was cold: %s', take)
    wait_for(lambda: scene.pid('node1') is None, 60,
             "the source's QEMU has ended", interval=1)
    cluster.hosts['node1'].run('crm_resource', '--clear', '--resource', 'vm')
    check(not cluster.power.off, 'somebody was fenced: %s', cluster.power.off)

    cluster.hosts['node2'].power_off()
    cluster.wait_where('node1', 'node1', seconds=300)
    check(cluster.power.off == ['node2'], 'fenced: %s', cluster.power.off)
    scene.booted('node1')
    scene.survived('after the loss of a node')
    scene.write()
    scene.finish('node1')


@test(seconds=900, slow=True)
def frozen_fenced_and_thawed(ctx):
    """A node is frozen as a whole; a fence device that suspends says so; the
    VM is restarted on the other one.  When the node is thawed its guest, which
    goes on writing, reaches nothing, and finds out; the other's does not
    notice."""
    scene = Scene(ctx)
    cluster, guest = scene.cluster, scene.guest
    old = scene.booted('node1')
    scene.write()
    cluster.power.suspends = True
    cluster.hosts['node1'].freeze()
    cluster.wait_where('node2', 'node2', seconds=300)
    check(cluster.power.off == ['node1'], 'fenced: %s', cluster.power.off)
    vm = scene.booted('node2')
    info = query_thinvm(vm.qmp, 'disk')
    check(info['owner'] and info['fencing'] == 'reservation',
          'the new owner: %s', info)
    found = scene.survived('after a node was frozen and fenced')

    # What the old guest says from here on is of the past.
    old.port.close()
    cluster.hosts['node1'].thaw()
    try:
        event = old.qmp.wait_event('THINVM_OWNERSHIP_LOST', 60)
        ctx.log('the thawed node: %s' % event['data'])
    except QMPClosed:
        ctx.log('the agent was faster: the lost QEMU has ended')
    wait_for(lambda: scene.pid('node1') is None, 180,
             'the agent of the thawed node ends what is left', interval=1)
    check(scan(ctx, guest.model, scene.lun) == found,
          'the thawed node has written')
    scene.write()
    check(cluster.where('node2') == ['node2'], 'the VM is on %s',
          cluster.where('node2'))
    check(query_thinvm(vm.qmp, 'disk')['owner'], 'the VM lost its disk')
    cluster.hosts['node1'].power_off()
    scene.finish('node2')
