# SPDX-License-Identifier: GPL-2.0-or-later
"""scripts/ocf/thinvm-vm, the resource agent, action by action.

Without Pacemaker: the test calls the actions as Pacemaker would, on hosts of
namespaces that have their own names and processes.  What the agent asks the
cluster is answered by a crm_mon of the test's.  With Pacemaker itself:
test_cluster.py.
"""

import os
import xml.etree.ElementTree

from lib.resource_agent import (ARGS, CONFIGURED, GENERIC, NOT_RUNNING, SUCCESS, Agent,
                       AgentVM, write_config)
from lib.contents import scan
from lib.context import check, free_port, wait_for
from lib.guest import Guest
from lib.host import Host
from lib.image import GiB, create, require_clean
from lib.node import query_thinvm
from lib.testing import test
from lib.tgt import Target

CRM_MON = '''#!/bin/sh
cat <<END
<pacemaker-result api-version="2.25" request="crm_mon">
  <summary><current_dc present="true" with_quorum="%(quorum)s"/>
    <cluster_options stonith-enabled="%(fencing)s"/></summary>
  <nodes><node name="hosta" online="false" unclean="%(unclean)s"/>
    <node name="hostb.example.org" online="true" unclean="false"/></nodes>
</pacemaker-result>
END
'''


class Scene:
    """Two hosts, two LUNs, and the guest's configuration."""

    def __init__(self, ctx):
        self.ctx = ctx
        array = Target(ctx)
        self.lun, self.second = array.add_lun(2 * GiB), array.add_lun(GiB)
        create(ctx, self.lun, 2 * GiB)
        create(ctx, self.second, GiB)
        self.config = write_config(ctx, self.lun, self.second)
        self.guest = Guest(ctx)
        self.port = free_port()
        self.bin = ctx.path('bin')
        os.mkdir(self.bin)
        self.agents = [self.agent(name) for name in ('hosta', 'hostb')]

    def agent(self, name):
        os.mkdir(self.ctx.path(name))
        agent = Agent(self.ctx, Host(self.ctx, name), self.config,
                      migration_host='127.0.0.1', migration_port=self.port)
        agent.path = self.bin + ':' + agent.path
        return agent

    def cluster(self, fencing='true', quorum='true', unclean='false'):
        """What crm_mon is to say from here on."""
        path = os.path.join(self.bin, 'crm_mon')
        with open(path, 'w', encoding='utf-8') as file:
            file.write(CRM_MON % locals())
        os.chmod(path, 0o755)

    def vm(self, agent):
        return AgentVM(self.ctx, self.guest, agent.host.name,
                       agent.directory)

    def started(self, agent):
        agent.expect(SUCCESS, 'start')
        vm = self.vm(agent)
        self.guest.attach(vm)
        self.guest.wait_ready()
        return vm

    def pid(self, agent):
        """QEMU's, as the host numbers it."""
        _, out, _ = agent.host.run(
            'sh', '-c', 'for p in /proc/[0-9]*; do read -r c < $p/comm && '
            'test "$c" = qemu-system-x86 && echo ${p#/proc/}; done')
        return [int(word) for word in out.split()]

    def no_owner(self):
        """Anybody may open the image, without force and at once."""
        for lun in self.lun, self.second:
            text = self.ctx.run(self.ctx.bin('qemu-io'), '-f', 'thinvm', '-c',
                                'read 0 4k', lun.url)
            check('read 4096' in text, 'the image has an owner: %s', text)


@test()
def metadata_and_parameters(ctx):
    """meta-data is XML that names all actions; wrong parameters are told."""
    host = Host(ctx, 'hosta')
    config = ctx.path('vm.conf')
    agent = Agent(ctx, host, config)
    status, text = agent.call('meta-data')
    check(status == SUCCESS, 'meta-data: %d', status)
    root = xml.etree.ElementTree.fromstring(text)
    check(root.find('version').text == '1.1', 'not of OCF 1.1')
    names = {action.get('name') for action in root.iter('action')}
    for name in ('start', 'stop', 'monitor', 'migrate_to', 'migrate_from',
                 'meta-data', 'validate-all'):
        check(name in names, 'no action %s in the metadata', name)
    good = '-blockdev thinvm,node-name=d,file.driver=file,file.filename=x\n'
    for text, words in (
            (None, 'No such file'), ('-m 128\n', 'no -blockdev'),
            ('-m\n', 'lacks its value'), ('-m 1 x\n', 'no option'),
            ('-m "1\n', 'No closing quotation'),
            (good + '-incoming defer\n', '-incoming'),
            (good + '-S\n', '-S'),
            (good.replace('node-name=d,', ''), 'no node-name'),
            ('-blockdev {"driver"\n', 'not JSON'),
            (good + '-drive format=thinvm,file=x\n', 'write -blockdev')):
        if text:
            with open(config, 'w', encoding='utf-8') as file:
                file.write(text)
        reason = agent.expect(ARGS, 'validate-all')
        check(words in reason, 'of %r it says: %s', text, reason)
    with open(config, 'w', encoding='utf-8') as file:
        file.write(good)
    agent.expect(SUCCESS, 'validate-all')
    for name, value in (('takeover', 'always'), ('migration_port', 'x'),
                        ('migration_port', '70000'),
                        ('migration_host', '{other}'), ('name', '../x')):
        old = agent.parameters.get(name)
        agent.parameters[name] = value
        reason = agent.expect(CONFIGURED, 'validate-all')
        check(value.strip('{}') in reason or name in reason,
              'of %s=%s it says: %s', name, value, reason)
        if old is None:
            del agent.parameters[name]
        else:
            agent.parameters[name] = old
    agent.expect(3, 'promote')
    agent.expect(NOT_RUNNING, 'monitor')
    agent.expect(SUCCESS, 'stop')


@test(seconds=400)
def life_on_one_host(ctx):
    """Started twice, watched, killed, found dead, stopped, started anew from
    what was flushed, and stopped when it does not answer; each end leaves no
    process and no owner."""
    scene = Scene(ctx)
    agent, guest = scene.agents[0], scene.guest
    agent.expect(NOT_RUNNING, 'monitor')
    scene.started(agent)
    agent.expect(SUCCESS, 'start')
    agent.expect(SUCCESS, 'monitor', interval=10)
    guest.start_writing()
    guest.wait_writes(300)
    pids = scene.pid(agent)
    check(len(pids) == 1, 'QEMU runs %d times', len(pids))
    agent.host.run('kill', '-9', str(pids[0]))
    reason = agent.expect(NOT_RUNNING, 'monitor', interval=10)
    check('has ended' in reason, 'the reason: %s', reason)
    agent.expect(SUCCESS, 'stop')
    scene.no_owner()
    require_clean(ctx, scene.lun)
    found = scan(ctx, guest.model, scene.lun)
    guest.model.require(found, 'flushed', 'after kill -9')
    guest.model.rebase(found)
    guest.errors.clear()

    vm = scene.started(agent)
    guest.start_writing()
    guest.wait_writes(200)
    guest.stop_writing()
    guest.ask('sync', 'synced')
    # Killed between two actions: the start itself takes over.
    agent.host.run('kill', '-9', str(scene.pid(agent)[0]))
    scene.started(agent)
    found = scan(ctx, guest.model, scene.lun)
    guest.model.require(found, 'acked', 'after a kill behind a flush')

    # This guest knows nothing of a power button: QEMU is told to quit.
    agent.parameters['shutdown_timeout'] = 1
    agent.expect(SUCCESS, 'stop')
    check(not scene.pid(agent), 'QEMU still runs')
    scene.no_owner()
    agent.expect(NOT_RUNNING, 'monitor')
    agent.expect(SUCCESS, 'stop')

    agent.expect(SUCCESS, 'start')
    agent.host.run('kill', '-STOP', str(scene.pid(agent)[0]))
    reason = agent.expect(GENERIC, 'monitor', interval=10, timeout=10)
    check('does not answer' in reason, 'the reason: %s', reason)
    agent.expect(SUCCESS, 'stop', timeout=30)
    check(not scene.pid(agent), 'QEMU still runs')
    scene.no_owner()
    require_clean(ctx, scene.lun)
    del vm


@test(seconds=400)
def takes_over_from_a_fenced_host(ctx):
    """A host is frozen with the guest on it.  The other one takes its disk
    only when the cluster has fenced it; thawed, it finds that it has lost,
    has written nothing, and what is left of the VM there goes."""
    scene = Scene(ctx)
    first, second = scene.agents
    guest = scene.guest
    old = scene.started(first)
    guest.start_writing()
    guest.wait_writes(300)
    first.host.freeze()
    # What the old guest says from here on is of the past.
    old.port.close()
    for state, words in (({'unclean': 'true'}, 'has not been fenced'),
                         ({'fencing': 'false'}, 'fencing is not enabled'),
                         ({'quorum': 'false'}, 'no quorum')):
        scene.cluster(**state)
        reason = second.expect(GENERIC, 'start')
        check(words in reason and 'hosta' in reason, 'it says: %s', reason)
        second.expect(NOT_RUNNING, 'monitor')
    scene.cluster()
    second.parameters['takeover'] = 'never'
    check('never' in second.expect(GENERIC, 'start'), 'never is not heeded')
    second.parameters['takeover'] = 'cluster'
    guest.errors.clear()
    second.expect(SUCCESS, 'start')
    info_of = scene.vm(second)
    info = query_thinvm(info_of.qmp, 'disk')
    check(info['owner'] and info['fencing'] == 'reservation',
          'the second host owns it so: %s', info)
    guest.attach(info_of)
    guest.wait_ready()
    found = scan(ctx, guest.model, scene.lun)
    guest.model.require(found, 'flushed', 'after a host was fenced')
    guest.model.rebase(found)

    first.host.thaw()
    wait_for(lambda: 'ownership lost' in first.call(
        'monitor', interval=10)[1], 60, 'the thawed host knows that it lost')
    reason = first.expect(GENERIC, 'monitor', interval=10)
    check('hostb' in reason, 'it does not say who has the disk: %s', reason)
    check(scan(ctx, guest.model, scene.lun) == found,
          'the thawed host has written')
    first.expect(NOT_RUNNING, 'monitor')
    check(not scene.pid(first), 'the lost QEMU still runs')
    first.expect(SUCCESS, 'stop')
    check(query_thinvm(info_of.qmp, 'disk')['owner'],
          'a stop on the first host took the disk')
    guest.errors.clear()
    guest.start_writing()
    guest.wait_writes(200)
    guest.stop_writing()
    guest.verify('after the take-over')
    second.parameters['shutdown_timeout'] = 1
    second.expect(SUCCESS, 'stop')
    scene.no_owner()
    require_clean(ctx, scene.lun)


@test(seconds=400)
def moves(ctx):
    """migrate_to and migrate_from are a live migration, also of a guest that
    is paused; then one whose target never comes, and the guest stays."""
    scene = Scene(ctx)
    first, second = scene.agents
    guest = scene.guest
    vm = scene.started(first)
    guest.start_writing()
    guest.wait_writes(300)
    for source, target, paused in ((first, second, False),
                                   (second, first, True)):
        if paused:
            vm.qmp.cmd('stop')
        source.expect(SUCCESS, 'migrate_to',
                      migrate_target=target.host.name)
        target.expect(SUCCESS, 'migrate_from',
                      migrate_source=source.host.name)
        vm = scene.vm(target)
        guest.attach(vm)
        target.expect(SUCCESS, 'monitor', interval=10)
        if paused:
            check(vm.status() == 'paused', 'the paused guest is %s',
                  vm.status())
            vm.qmp.cmd('cont')
        take = query_thinvm(vm.qmp, 'disk')['take-over']
        check(take['warm'], 'the take-over was cold: %s', take)
        source.expect(NOT_RUNNING, 'monitor')
        source.expect(SUCCESS, 'stop')
        check(not scene.pid(source), 'the old QEMU still runs')
        guest.wait_writes(300)
    first.expect(SUCCESS, 'migrate_to', migrate_target='hostb')
    guest.wait_writes(200)
    # Nobody listens.  A start on the other host, which no cluster would order
    # now, gets nothing; and the guest is stopped here as ever.
    scene.cluster()
    reason = second.expect(GENERIC, 'start')
    check('alive' in reason, 'it says: %s', reason)
    second.expect(SUCCESS, 'stop')
    guest.stop_writing()
    guest.verify('after two moves')
    vm.qmp.close()
    first.parameters['shutdown_timeout'] = 1
    first.expect(SUCCESS, 'stop')
    scene.no_owner()
    require_clean(ctx, scene.lun)


@test(seconds=500, slow=True)
def does_not_arrive(ctx):
    """A migrate_from that fails: its QEMU cannot start, its guest does not
    come in time, its source dies meanwhile.  Whatever the cluster does then,
    the guest runs once, where its disk is, or nowhere."""
    scene = Scene(ctx)
    first, second = scene.agents
    guest = scene.guest
    vm = scene.started(first)
    guest.start_writing()
    guest.wait_writes(300)

    def fails(words, **options):
        reason = second.expect(GENERIC, 'migrate_from',
                               migrate_source='hosta', **options)
        check(words in reason, 'it says: %s', reason)
        check(not scene.pid(second), 'a QEMU is left on the target')
        second.expect(NOT_RUNNING, 'monitor')

    # The target cannot start; the sender finds nobody, and the guest goes on.
    first.expect(SUCCESS, 'migrate_to', migrate_target='hostb')
    qemu, second.parameters['qemu'] = second.parameters['qemu'], '/bin/false'
    fails('')
    second.parameters['qemu'] = qemu
    first.expect(SUCCESS, 'monitor', interval=10)
    check(vm.status() == 'running', 'the source is %s', vm.status())
    check(query_thinvm(vm.qmp, 'disk')['owner'], 'the source has no disk')
    guest.wait_writes(200)
    second.expect(SUCCESS, 'stop')

    # The source stands still, and its guest does not arrive in time.
    pid, = scene.pid(first)
    first.host.run('kill', '-STOP', str(pid))
    fails('in time', timeout=25)
    first.host.run('kill', '-CONT', str(pid))
    guest.wait_writes(200)
    check(query_thinvm(vm.qmp, 'disk')['owner'], 'the source lost its disk')

    # It dies; the cluster stops both, and starts the guest on the target.
    first.expect(SUCCESS, 'migrate_to', migrate_target='hostb')
    first.host.run('kill', '-9', str(pid))
    fails('in time', timeout=25)
    second.expect(SUCCESS, 'stop')
    first.expect(SUCCESS, 'stop')
    scene.no_owner()
    found = scan(ctx, guest.model, scene.lun)
    guest.model.require(found, 'flushed', 'after the source died')
    second.expect(SUCCESS, 'start')
    second.expect(SUCCESS, 'monitor', interval=10)
    check(len(scene.pid(second)) == 1 and not scene.pid(first),
          'the guest does not run once, on the target')
    second.parameters['shutdown_timeout'] = 1
    second.expect(SUCCESS, 'stop')
    scene.no_owner()
    require_clean(ctx, scene.lun)
