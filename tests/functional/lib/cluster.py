# SPDX-License-Identifier: GPL-2.0-or-later
"""A Pacemaker cluster of hosts made of namespaces (lib/host.py).

The test's process gets a network of its own, with two bridges in it: the LAN,
for corosync, migrations and the power controller, and the SAN, for the iSCSI
target.  Each host has a port in both, its own /run, /dev/shm and /var/lib of
the cluster's programs, and finds the two agents where Pacemaker looks for
them.  Nothing of it is seen outside of the test.

The power controller does what its order says to all processes of a host:
it powers them off, or (a controller of a kind that suspends) freezes them and
takes the host off the LAN, though not off the SAN.
"""

import ctypes
import json
import os
import socket
import subprocess
import threading
import xml.etree.ElementTree

from .resource_agent import AGENT
from .context import Skip, check, wait_for
from .host import Host

CLONE_NEWNET = 0x40000000
LAN, SAN = '10.77.0', '10.78.0'
FENCE_AGENT = os.path.join(os.path.dirname(os.path.abspath(__file__)),
                           'fence_agent.py')
OWN = {'/var/lib/corosync': '755', '/var/lib/pacemaker': '755'}
VIEWS = {'/usr/sbin': {'fence_thinvm_test': FENCE_AGENT},
         '/usr/lib/ocf/resource.d': {'thinvm/thinvm-vm': AGENT}}
PROGRAMS = (('corosync', 'corosync'), ('pacemakerd', 'pacemaker'),
            ('crm_mon', 'pacemaker-cli-utils'),
            ('cibadmin', 'pacemaker-cli-utils'),
            ('crm_resource', 'pacemaker-cli-utils'), ('ip', 'iproute2'))

COROSYNC = '''totem {
  version: 2
  cluster_name: thinvm
  transport: udpu
  crypto_cipher: none
  crypto_hash: none
  token: 5000
}
quorum {
  provider: corosync_votequorum
  two_node: 1
  wait_for_all: 0
}
nodelist {
%(nodes)s
}
logging {
  to_syslog: no
  to_logfile: yes
  logfile: %(log)s
  timestamp: on
}
'''

NODE = '''  node {
    ring0_addr: %s
    name: %s
    nodeid: %d
  }
'''

SECTIONS = {
    'crm_config': '''<crm_config><cluster_property_set id="options">
  <nvpair id="o1" name="stonith-enabled" value="true"/>
  <nvpair id="o2" name="stonith-action" value="off"/>
  <nvpair id="o3" name="stonith-timeout" value="120s"/>
  <nvpair id="o4" name="cluster-recheck-interval" value="30s"/>
 </cluster_property_set></crm_config>''',
    'constraints': '''<constraints>
  <rsc_location id="first" rsc="vm" node="%(first)s" score="10"/>
 </constraints>''',
    'resources': '''<resources>
  <primitive id="power" class="stonith" type="fence_thinvm_test">
   <instance_attributes id="power-a">
    <nvpair id="p1" name="ip" value="%(address)s"/>
    <nvpair id="p2" name="ipport" value="%(port)d"/>
    <nvpair id="p3" name="pcmk_host_list" value="%(hosts)s"/>
   </instance_attributes>
  </primitive>
  <primitive id="vm" class="ocf" provider="thinvm" type="thinvm-vm">
   <instance_attributes id="vm-a">%(parameters)s</instance_attributes>
   <meta_attributes id="vm-m">
    <nvpair id="m1" name="allow-migrate" value="true"/>
    <nvpair id="m2" name="resource-stickiness" value="1000"/>
   </meta_attributes>
   <operations>
    <op id="vm-start" name="start" interval="0" timeout="180s"/>
    <op id="vm-stop" name="stop" interval="0" timeout="60s"/>
    <op id="vm-monitor" name="monitor" interval="5s" timeout="60s"/>
    <op id="vm-to" name="migrate_to" interval="0" timeout="60s"/>
    <op id="vm-from" name="migrate_from" interval="0" timeout="300s"/>
   </operations>
  </primitive>
 </resources>'''}


def own_network(ctx):
    """From here on this process and its children have a network of their
    own."""
    if os.geteuid():
        raise Skip('needs root, for a network of its own')
    for program, package in PROGRAMS:
        ctx.need(program, package)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET):
        raise Skip('no network namespaces here: '
                   + os.strerror(ctypes.get_errno()))
    ctx.run('ip', 'link', 'set', 'lo', 'up')
    for bridge, net in (('lan', LAN), ('san', SAN)):
        ctx.run('ip', 'link', 'add', bridge, 'type', 'bridge')
        ctx.run('ip', 'addr', 'add', net + '.1/24', 'dev', bridge)
        ctx.run('ip', 'link', 'set', bridge, 'up')


class PowerController:
    """Listens in the LAN; .off lists the hosts that it has switched off."""

    def __init__(self, ctx, cluster):
        self.ctx = ctx
        self.cluster = cluster
        self.suspends = False
        self.off = []
        self._listener = socket.create_server((LAN + '.1', 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()
        ctx.cleanup(self._listener.close)

    def _serve(self):
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with sock:
                try:
                    order = json.loads(sock.makefile().readline())
                    status, text = self._obey(**order)
                    sock.sendall(json.dumps({'status': status, 'text': text})
                                 .encode() + b'\n')
                except Exception as e:          # the agent gets no answer
                    self.ctx.log('power controller: %r' % e)

    def _obey(self, action, plug):
        self.ctx.log('power controller: %s %s' % (action, plug))
        if action in ('monitor', 'list'):
            return 0, '\n'.join(sorted(self.cluster.hosts))
        host = self.cluster.hosts[plug]
        if action == 'status':
            on = host.is_on() and plug not in self.off
            return (0, 'ON') if on else (2, 'OFF')
        if action != 'off':
            return 1, 'not this kind'
        if self.suspends:
            host.freeze()
            self.cluster.unplug(host)
        else:
            host.power_off()
        self.off.append(plug)
        return 0, 'OFF'


class Cluster:
    def __init__(self, ctx, names):
        self.ctx = ctx
        self.names = names
        self.hosts = {}
        self.services = {}
        self.power = PowerController(ctx, self)
        for number, name in enumerate(names):
            self._boot(number, name)
        for name in names:
            self._start_cluster(name)

    def _boot(self, number, name):
        host = Host(self.ctx, name, network=True, own=OWN, views=VIEWS)
        self.hosts[name] = host
        for net, bridge in ((LAN, 'lan'), (SAN, 'san')):
            port = '%s%d' % (bridge, number)
            self.ctx.run('ip', 'link', 'add', port, 'type', 'veth', 'peer',
                         'name', bridge, 'netns', str(host.init))
            self.ctx.run('ip', 'link', 'set', port, 'master', bridge, 'up')
            self._on(host, 'ip', 'addr', 'add', '%s.%d/24' % (
                net, 11 + number), 'dev', bridge)
            self._on(host, 'ip', 'link', 'set', bridge, 'up')
        # Migrations go to a host's name.
        with open(self.ctx.path('hosts'), 'w', encoding='utf-8') as file:
            file.write('127.0.0.1 localhost\n' + ''.join(
                '%s.%d %s\n' % (LAN, 11 + n, other)
                for n, other in enumerate(self.names)))
        self._on(host, 'mount', '--bind', self.ctx.path('hosts'),
                 '/etc/hosts')

    def _on(self, host, *argv):
        status, out, err = host.run(*argv)
        check(status == 0, '%s on %s: %s %s', ' '.join(argv), host.name, out,
              err)
        return out

    def _start_cluster(self, name):
        host = self.hosts[name]
        self._on(host, 'install', '-d', '-o', 'hacluster', '-g', 'haclient',
                 '-m', '750', *('/var/lib/pacemaker/' + part for part in (
                     'cib', 'pengine', 'cores', 'blackbox')))
        conf = self.ctx.path(name + '-corosync.conf')
        with open(conf, 'w', encoding='utf-8') as file:
            file.write(COROSYNC % {
                'log': self.ctx.log_file(name + '-corosync'),
                'nodes': ''.join(NODE % ('%s.%d' % (LAN, 11 + n), other,
                                         n + 1)
                                 for n, other in enumerate(self.names))})
        self.services[name] = [host.start('corosync-out', 'corosync', '-f',
                                          '-c', conf)]
        wait_for(lambda: host.run('corosync-quorumtool', '-s')[0] == 0, 60,
                 'corosync on %s' % name, interval=0.5)
        env = dict(os.environ, PCMK_logfile=self.ctx.log_file(
            name + '-pacemaker'), PCMK_node_start_state='default')
        env['PATH'] += ':/usr/sbin:/sbin'
        self.services[name].append(host.start('pacemakerd-out', 'pacemakerd',
                                              '-f', env=env))

    def unplug(self, host):
        """The host leaves the LAN."""
        number = self.names.index(host.name)
        subprocess.run(['ip', 'link', 'set', 'lan%d' % number, 'down'],
                       check=True)

    def state(self, name):
        """crm_mon on that host, parsed; None if it does not answer."""
        status, out, _ = self.hosts[name].run(
            'crm_mon', '--one-shot', '--output-as=xml')
        try:
            return xml.etree.ElementTree.fromstring(out) if status == 0 \
                else None
        except xml.etree.ElementTree.ParseError:
            return None

    def online(self, name):
        """Who is online, as seen from that host."""
        state = self.state(name)
        if state is None:
            return []
        return [node.get('name') for node in state.iterfind('./nodes/node')
                if node.get('online') == 'true' and
                node.get('pending') == 'false']

    def where(self, name, resource='vm'):
        """The nodes on which the resource runs, as seen from that host."""
        state = self.state(name)
        if state is None:
            return []
        return [node.get('name')
                for found in state.iterfind('.//resources//resource')
                if found.get('id') == resource and
                found.get('role') == 'Started' and
                found.get('failed') == 'false' for node in found]

    def wait_where(self, name, wanted, seconds=180):
        wait_for(lambda: self.where(name) == [wanted], seconds,
                 'the VM runs on %s (seen from %s: %s)' % (
                     wanted, name, self.where(name)), interval=1)

    def configure(self, **parameters):
        """With all nodes there: fencing, and the VM."""
        first = self.names[0]
        wait_for(lambda: sorted(self.online(first)) == sorted(self.names),
                 120, 'all nodes are online', interval=1)
        values = {
            'address': LAN + '.1', 'port': self.power.port,
            'hosts': ' '.join(self.names), 'first': first,
            'parameters': ''.join(
                '<nvpair id="vm-%s" name="%s" value="%s"/>' % (key, key,
                                                               value)
                for key, value in parameters.items())}
        for scope in ('crm_config', 'resources', 'constraints'):
            path = self.ctx.path(scope + '.xml')
            with open(path, 'w', encoding='utf-8') as file:
                file.write(SECTIONS[scope] % values)
            self._on(self.hosts[first], 'cibadmin', '--replace', '--scope',
                     scope, '--xml-file', path)
        self._on(self.hosts[first], 'crm_verify', '--live-check')
