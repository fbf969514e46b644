# SPDX-License-Identifier: GPL-2.0-or-later
"""A private iSCSI target: tgtd on the loopback with LUNs in plain files.

Each Target has its own daemon, port and control socket, so tests run beside
each other and beside a tgtd of the system.  Two initiators that log in to it
stand for two hosts on one SAN: nothing locks one against the other.
"""

import os
import random
import signal
import time

from .context import Failure, Process, free_port, wait_for

IQN = 'iqn.2025-01.org.thinvm.test'


class Lun:
    """A logical unit of a Target; number counts from 1."""

    def __init__(self, target, number, path, size):
        self.target = target
        self.number = number
        self.path = path                    # backing file
        self.size = size                    # bytes

    @property
    def url(self):
        """What qemu-img and friends take as a file name."""
        return 'iscsi://%s:%d/%s/%d' % (self.target.address, self.target.port,
                                        self.target.iqn, self.number)

    def blockdev(self, node, host='a'):
        """Options of a protocol node that logs in as the named host."""
        return {
            'driver': 'iscsi', 'node-name': node, 'transport': 'tcp',
            'portal': '%s:%d' % (self.target.address, self.target.port),
            'target': self.target.iqn, 'lun': self.number,
            'initiator-name': '%s:host-%s' % (IQN, host),
            'cache': {'direct': True},
        }

    def used(self):
        """Bytes of the backing file that are allocated."""
        return os.stat(self.path).st_blocks * 512


class Target:
    def __init__(self, ctx, address='127.0.0.1'):
        self.ctx = ctx
        self.address = address
        self.tgtd = ctx.need('tgtd', 'tgt')
        self.tgtadm = ctx.need('tgtadm', 'tgt')
        self.name = ctx.unique('tgtd')
        self.iqn = '%s:%s' % (IQN, self.name)
        self.luns = []
        self._start()

    def _start(self, port=None):
        # Another program may take the port between our look and tgtd's bind.
        for _ in range(5):
            self.port = port or free_port()
            self.control = random.randrange(1000, 32000)
            env = dict(os.environ, TGT_IPC_SOCKET=self.ctx.path(self.name))
            self.env = env
            self.process = Process(
                self.ctx, self.name,
                [self.tgtd, '-f', '-C', str(self.control), '--iscsi',
                 'portal=%s:%d' % (self.address, self.port)], env=env)
            if self._ready():
                self._adm('--mode', 'target', '--op', 'new', '--tid', '1',
                          '-T', self.iqn)
                self._adm('--mode', 'target', '--op', 'bind', '--tid', '1',
                          '-I', 'ALL')
                return
            self.process.kill()
        raise Failure('tgtd does not start: ' + self.process.log_tail())

    def _ready(self):
        path = '%s.%d' % (self.ctx.path(self.name), self.control)
        for _ in range(200):
            if not self.process.alive():
                return False
            if os.path.exists(path):
                time.sleep(0.1)
                try:
                    self._adm('--mode', 'sys', '--op', 'show')
                    return self.process.alive()
                except Failure:
                    pass
            time.sleep(0.05)
        return False

    def _adm(self, *args):
        # tgtadm finds the daemon through the environment.
        old = os.environ.get('TGT_IPC_SOCKET')
        os.environ['TGT_IPC_SOCKET'] = self.env['TGT_IPC_SOCKET']
        try:
            return self.ctx.run(self.tgtadm, '-C', str(self.control), '--lld',
                                'iscsi', *args)
        finally:
            if old is None:
                del os.environ['TGT_IPC_SOCKET']
            else:
                os.environ['TGT_IPC_SOCKET'] = old

    def add_lun(self, size):
        """A new LUN of @size bytes, thin in its backing file."""
        number = len(self.luns) + 1
        path = self.ctx.path('%s-lun%d' % (self.name, number))
        with open(path, 'wb') as backing:
            backing.truncate(size)
        self._offer(number, path)
        lun = Lun(self, number, path, size)
        self.luns.append(lun)
        return lun

    def _offer(self, number, path):
        self._adm('--mode', 'logicalunit', '--op', 'new', '--tid', '1',
                  '--lun', str(number), '-b', path)
        self._adm('--mode', 'logicalunit', '--op', 'update', '--tid', '1',
                  '--lun', str(number), '--params',
                  'thin_provisioning=1')

    def extend(self, lun, size, user):
        """The LUN is longer now, and whoever has it open is told so by the
        next command, as by an array.

        tgt can only take it away and offer it anew, between two commands: so
        @user, the only process that has it open, is stopped meanwhile.
        """
        def gone():
            user.popen.send_signal(signal.SIGSTOP)
            try:
                self._adm('--mode', 'logicalunit', '--op', 'delete', '--tid',
                          '1', '--lun', str(lun.number))
                return True
            except Failure as failure:
                if 'still active' not in str(failure):
                    raise
                user.popen.send_signal(signal.SIGCONT)
                return False

        try:
            wait_for(gone, 60, 'no command is under way')
            os.truncate(lun.path, size)
            lun.size = size
            self._offer(lun.number, lun.path)
        finally:
            user.popen.send_signal(signal.SIGCONT)

    def statistics(self):
        """A line for each LUN and login: what they have read and written."""
        return self._adm('--mode', 'target', '--op', 'stat', '--tid', '1')

    def stop(self):
        """The array goes away (kill -9)."""
        self.process.kill()

    def restart(self):
        """The array is back, at the same address and with the same LUNs."""
        self._start(self.port)
        for lun in self.luns:
            self._offer(lun.number, lun.path)
