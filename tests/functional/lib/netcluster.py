# SPDX-License-Identifier: GPL-2.0-or-later
"""A cluster of template stores whose nodes have a network between them.

Each node is a network namespace with an address of its own; a bridge in one
more is the switch.  What a node sends passes a token bucket.  A node that is
cut off falls silent, as if its host had lost power: nothing refuses its
peers' connections.
"""

import os

from .context import Process, Skip
from .templates import StoreCluster

PORT = 10809


class NetCluster(StoreCluster):
    """@rate: MiB/s that each node sends at most."""

    def __init__(self, ctx, disks, rate, **options):
        if os.getuid():
            raise Skip('needs root, for networks of its own')
        for program in ('ip', 'tc'):
            ctx.need(program, 'iproute2')
        self.ctx = ctx
        self.nodes = list(disks)
        # Whoever else runs this beside us has another process
        self.prefix = 'tn%d' % os.getpid()
        self.net = '198.18.%d' % (os.getpid() % 250)
        self.switch = self.prefix + '-switch'
        self._space(self.switch)
        self._ip(self.switch, 'link', 'add', 'br0', 'type', 'bridge')
        self._ip(self.switch, 'link', 'set', 'br0', 'up')
        for number, node in enumerate(self.nodes):
            self._plug(number, node, rate)
        super().__init__(ctx, disks, **options)

    def space(self, node):
        return '%s-%s' % (self.prefix, node)

    def _space(self, name):
        try:
            self.ctx.run('ip', 'netns', 'add', name)
        except Exception as err:
            raise Skip('no network namespaces here: %s' % err) from None
        self.ctx.cleanup(self.ctx.run, 'ip', 'netns', 'del', name, ok=None)

    def _ip(self, space, *args):
        self.ctx.run('ip', '-n', space, *args)

    def _plug(self, number, node, rate):
        space, port = self.space(node), 'port%d' % number
        self._space(space)
        self._ip(self.switch, 'link', 'add', port, 'type', 'veth', 'peer',
                 'name', 'eth0', 'netns', space)
        self._ip(self.switch, 'link', 'set', port, 'master', 'br0', 'up')
        self._ip(space, 'address', 'add', '%s.%d/24' % (self.net, number + 1),
                 'dev', 'eth0')
        self._ip(space, 'link', 'set', 'lo', 'up')
        self._ip(space, 'link', 'set', 'eth0', 'up')
        self.ctx.run('tc', '-n', space, 'qdisc', 'add', 'dev', 'eth0', 'root',
                     'tbf', 'rate', '%dbit' % (rate * 8 << 20), 'burst',
                     '256k', 'limit', '1m')

    def address(self, node):
        return '%s.%d:%d' % (self.net, self.nodes.index(node) + 1, PORT)

    def there(self, node, argv):
        return ['ip', 'netns', 'exec', self.space(node)] + argv

    def argv(self, node, *args):
        return self.there(node, super().argv(node, *args))

    def process(self, node, name, argv):
        return Process(self.ctx, self.ctx.unique(name), self.there(node, argv))

    def sent(self, node):
        """Bytes that it has sent."""
        text = self.ctx.run(*self.there(node, [
            'cat', '/sys/class/net/eth0/statistics/tx_bytes']))
        return int(text)

    def cut(self, node):
        """No power: its server is dead, and nobody says so."""
        self._ip(self.switch, 'link', 'set',
                 'port%d' % self.nodes.index(node), 'down')
        self.servers[node].kill()
