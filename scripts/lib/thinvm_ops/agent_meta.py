# SPDX-License-Identifier: GPL-2.0-or-later
"""What the resource agent tells of itself: parameters, actions, timeouts."""

from xml.sax.saxutils import escape, quoteattr

VERSION = '1.0'

# name: (type, default, required, short, long)
PARAMETERS = {
    'config': (
        'string', None, True, 'File with the arguments of QEMU',
        'File with the arguments of the VM\'s QEMU, written as for a shell, '
        'over several lines and with comments (#). {node} in it stands for '
        'the name of the node. Disks are given by -blockdev, thinvm nodes '
        'with node-name. The same on all nodes of the cluster. -incoming, -S, -daemonize and -pidfile are not to be '
        'in it.'),
    'qemu': (
        'string', 'qemu-system-x86_64', False, 'The program',
        'QEMU with thinvm: a path, or a name that is looked for in PATH.'),
    'name': (
        'string', '', False, 'Name of the VM',
        'Name of the VM, for files and messages. The default is the name of '
        'the resource.'),
    'state_dir': (
        'string', '/run/thinvm-vm', False, 'Directory for sockets',
        'Directory for the state file and the QMP sockets of the agent. It '
        'must not outlive a boot.'),
    'log': (
        'string', '', False, 'Log of QEMU',
        'File to which what QEMU prints is appended. The default is '
        '/var/log/thinvm-vm/NAME.log.'),
    'takeover': (
        'string', 'cluster', False, 'May disks be taken from other nodes?',
        'cluster: when the VM starts while its disks are claimed by another '
        'node of this cluster, they are taken over by force '
        '(force-takeover=on), if fencing is enabled, the cluster has quorum '
        'and that node is not unclean. never: the start fails instead.'),
    'shutdown_timeout': (
        'integer', '0', False, 'Seconds for the guest to shut down',
        'Seconds that the guest has to power down when it is stopped, before '
        'its QEMU is told to quit. 0 stands for two thirds of the timeout of '
        'the stop action.'),
    'migration_host': (
        'string', '{node}', False, 'Where a node is reached by migrations',
        'Name or address at which another node is reached by a migration; '
        '{node} in it stands for the node\'s name, so that {node}-mig names '
        'another network.'),
    'migration_port': (
        'integer', '0', False, 'TCP port of incoming migrations',
        'TCP port at which the VM\'s new QEMU listens; of each VM its own. 0 '
        'stands for one from 49152 to 53247 that depends on the name of the '
        'VM.'),
    'migration_bandwidth': (
        'integer', '0', False, 'MiB a second',
        'A migration sends no more than so many MiB a second. 0 stands for '
        'no limit.'),
    'migration_downtime_limit': (
        'integer', '300', False, 'Milliseconds',
        'A migration switches over when what is left can be sent in so many '
        'milliseconds.'),
    'migration_multifd': (
        'integer', '0', False, 'Channels',
        'A migration sends memory through so many channels. 0 stands for the '
        'plain way.'),
    'migration_timeout': (
        'integer', '1000', False, 'Seconds for a migration',
        'A migration that has not moved the guest after so many seconds is '
        'cancelled by the source.'),
    'preload_timeout': (
        'integer', '60', False, 'Seconds for preloading',
        'A migration begins when the new QEMU has preloaded the mapping of '
        'the disks, or after so many seconds.'),
}

# name: (timeout, interval or None)
ACTIONS = {
    'start': (180, None),
    'stop': (240, None),
    'status': (60, None),
    'monitor': (60, 10),
    'migrate_to': (60, None),
    'migrate_from': (1200, None),
    'meta-data': (10, None),
    'validate-all': (30, None),
}

LONG = '''
Runs a virtual machine whose disks are thinvm images on shared storage, and
moves it live. It starts QEMU from a file of arguments, and watches that the
guest runs and still owns its disks.

A start opens the disks as they are after a clean stop or the death of a
process of the same node. Where another node of the cluster has left them
claimed, that node was fenced, or the cluster would not start the VM here: then
they are taken by force, with the reservation of the device (SCSI-3) where
there is one. thinvm refuses that as long as the other's heartbeat moves.

Timeouts: opening a disk whose owner is another node takes 5 seconds, one
after the other; a start needs 60 seconds and 15 for each disk. When storage is
slow to fail over, requests wait as long; a monitor that does not get an answer
from QEMU counts as a failure, so its timeout should be longer than a failover
of the storage. A stop writes what the cache holds. migrate_from does the
whole of a migration, preloading included.
'''


def _parameter(name, kind, default, required, short, long):
    content = f'<content type="{kind}"' + (
        '' if default is None else f' default={quoteattr(default)}') + ' />'
    return f'''<parameter name="{name}" unique="0" required="{int(required)}">
<longdesc lang="en">
{escape(long)}
</longdesc>
<shortdesc lang="en">{escape(short)}</shortdesc>
{content}
</parameter>
'''


def _action(name, timeout, interval):
    more = '' if interval is None else f' interval="{interval}s" depth="0"'
    return f'<action name="{name}" timeout="{timeout}s"{more} />\n'


def metadata():
    return f'''<?xml version="1.0"?>
<!DOCTYPE resource-agent SYSTEM "ra-api-1.dtd">
<resource-agent name="thinvm-vm" version="{VERSION}">
<version>1.1</version>
<longdesc lang="en">{escape(LONG)}</longdesc>
<shortdesc lang="en">Virtual machine with thinvm disks</shortdesc>
<parameters>
''' + ''.join(_parameter(name, *rest) for name, rest in PARAMETERS.items()) + \
        '</parameters>\n<actions>\n' + \
        ''.join(_action(name, *rest) for name, rest in ACTIONS.items()) + \
        '</actions>\n</resource-agent>'
