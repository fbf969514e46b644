# SPDX-License-Identifier: GPL-2.0-or-later
#
# A link of a fixed rate between two programs of this machine, for benchmarks:
# a network namespace stands for the other host, a pair of virtual interfaces
# for the cable, and a token bucket at this end of it sends so many bytes a
# second.  What has gone that way is counted by the kernel.  Needs root.

import os
import shutil
import subprocess

from bench_machine import Failure

PORT = 10809
BURST = 256 * 1024
QUEUE = 1024 * 1024


class Link:
    """To the other host, at so many bytes a second; back, without limit."""

    def __init__(self, rate):
        number = os.getpid() % 60000
        self.space = f'bench-link-{os.getpid()}'
        self.near, self.far = f'bl{number}n', f'bl{number}f'
        # of the block for benchmarks, RFC 2544
        net = f'198.18.{number // 64 % 256}.{number % 64 * 4 + 1}'.split('.')
        self.address = '.'.join(net[:3] + [str(int(net[3]) + 1)])
        for tool in ('ip', 'tc'):
            if not shutil.which(tool):
                raise Failure(f'needs the program {tool} (package iproute2)')
        try:
            self._make('.'.join(net), rate)
        except BaseException:
            self.close()
            raise

    def _make(self, near_address, rate):
        ip = ('ip', 'netns', 'exec', self.space, 'ip')
        self._run('ip', 'netns', 'add', self.space)
        self._run('ip', 'link', 'add', self.near, 'type', 'veth', 'peer',
                  'name', self.far, 'netns', self.space)
        self._run('ip', 'address', 'add', near_address + '/30', 'dev',
                  self.near)
        self._run('ip', 'link', 'set', self.near, 'up')
        self._run(*ip, 'address', 'add', self.address + '/30', 'dev', self.far)
        self._run(*ip, 'link', 'set', self.far, 'up')
        self._run('tc', 'qdisc', 'add', 'dev', self.near, 'root', 'tbf',
                  'rate', f'{int(rate * 8)}bit', 'burst', str(BURST), 'limit',
                  str(QUEUE))

    @staticmethod
    def _run(*argv):
        done = subprocess.run(argv, stdout=subprocess.PIPE, text=True,
                              stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            raise Failure(f'{" ".join(argv)}: {done.stdout.strip()}; a link '
                          'needs root and a kernel with network namespaces, '
                          'veth and sch_tbf')

    def there(self, argv):
        """What starts a program at the other end."""
        return ['ip', 'netns', 'exec', self.space] + [str(a) for a in argv]

    def server(self):
        """Where a program there listens, as QMP has it."""
        return {'type': 'inet', 'host': self.address, 'port': str(PORT)}

    def carried(self):
        """Bytes that have gone to the other end."""
        with open(f'/sys/class/net/{self.near}/statistics/tx_bytes',
                  encoding='ascii') as f:
            return int(f.read())

    def close(self):
        for argv in (('ip', 'link', 'del', self.near),
                     ('ip', 'netns', 'del', self.space)):
            subprocess.run(argv, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL, check=False)
