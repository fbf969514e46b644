# SPDX-License-Identifier: GPL-2.0-or-later
"""The resource agent scripts/ocf/thinvm-vm on a host of the test, with the
test guest as its VM."""

import json
import os
import shlex
import sys

from .context import TOP, check
from .guest import Port, boot_files
from .image import format_node
from .qmp import QMP
from .vm import NODE

AGENT = os.path.join(TOP, 'scripts', 'ocf', 'thinvm-vm')
SUCCESS, GENERIC, ARGS, CONFIGURED, NOT_RUNNING = 0, 1, 2, 6, 7


def write_config(ctx, place, second=None):
    """The file of QEMU's arguments, for all hosts; its path.  The guest's port
    and a monitor for the test are in a directory that the host's name has."""
    path, directory = ctx.path('vm.conf'), ctx.path('{node}')
    kernel, initrd = boot_files(ctx)
    lines = ['# The guest of the test',
             '-no-user-config -nodefaults -display none',
             '-machine pc,accel=tcg -cpu qemu64 -m 128',
             '-kernel %s -initrd %s' % (kernel, initrd),
             '-append "console=ttyS0 quiet nowatchdog mitigations=off '
             'cryptomgr.notests oops=panic panic=-1 rdinit=/init"',
             '-serial file:%s/console' % directory,
             '-device virtio-serial-pci',
             '-chardev socket,id=port,server=on,wait=off,path=%s/port'
             % directory,
             '-device virtserialport,chardev=port,name=org.thinvm.test',
             '-chardev socket,id=test,server=on,wait=off,path=%s/qmp'
             % directory, '-mon chardev=test,mode=control']
    for node, where in ((NODE, place), ('second', second)):
        if where is None:
            continue
        for options in (where.blockdev(node + '-file', '{node}'),
                        format_node(ctx, node, node + '-file')):
            lines.append('-blockdev ' + shlex.quote(json.dumps(options)))
        lines.append('-device virtio-blk-pci,drive=%s,write-cache=on' % node)
    with open(path, 'w', encoding='utf-8') as file:
        file.write('\n'.join(lines) + '\n')
    return path


class Owner:
    """What lib/qmp.py and lib/guest.py want to know of a process; here one
    that the test did not start."""

    def __init__(self, name):
        self.name = name

    def check_alive(self):
        pass

    @staticmethod
    def alive():
        return True

    @staticmethod
    def log_tail():
        return 'see its log'


class AgentVM:
    """The guest's VM on one host, seen from the test."""

    def __init__(self, ctx, guest, name, directory):
        self.ctx = ctx
        self.name = name
        self.process = Owner(name)
        self.qmp = QMP(ctx, os.path.join(directory, 'qmp'), self.process)
        self.port = Port(ctx, os.path.join(directory, 'port'), self.process,
                         guest)

    def status(self):
        return self.qmp.cmd('query-status')['status']


class Agent:
    """The agent on one host."""

    def __init__(self, ctx, host, config, **parameters):
        self.ctx = ctx
        self.host = host
        self.directory = ctx.path(host.name)
        self.path = os.environ.get('PATH', '') + ':/usr/sbin:/sbin'
        self.parameters = {
            'config': config, 'name': 'vm',
            'qemu': ctx.bin('qemu-system-x86_64'),
            'state_dir': os.path.join(self.directory, 'state'),
            'log': ctx.log_file(host.name + '-vm'), **parameters}

    def call(self, action, interval=0, timeout=120, **meta):
        """(exit status, reason) of one action."""
        env = {'PATH': self.path, 'LC_ALL': 'C',
               'OCF_RESOURCE_INSTANCE': 'vm',
               'OCF_RESKEY_CRM_meta_interval': str(1000 * interval),
               'OCF_RESKEY_CRM_meta_timeout': str(1000 * timeout)}
        for key, value in self.parameters.items():
            env['OCF_RESKEY_' + key] = str(value)
        for key, value in meta.items():
            env['OCF_RESKEY_CRM_meta_' + key] = value
        status, out, err = self.host.run(sys.executable, AGENT, action,
                                         env=env, seconds=timeout + 60)
        reasons = [line.partition(':')[2] for line in err.splitlines()
                   if line.startswith('ocf-exit-reason:')]
        return status, out if action == 'meta-data' else ' '.join(reasons)

    def expect(self, wanted, action, **options):
        status, reason = self.call(action, **options)
        check(status == wanted, '%s on %s: %d instead of %d: %s', action,
              self.host.name, status, wanted, reason)
        return reason
