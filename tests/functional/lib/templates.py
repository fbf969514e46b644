# SPDX-License-Identifier: GPL-2.0-or-later
"""A cluster of template stores: nodes with disks, their description, and
thinvm-template run on each of them.

Nodes are directories here, and their addresses UNIX sockets; each is only ever
touched by a run of the tool as that node.
"""

import hashlib
import json
import os
import random
import socket
import threading

from .bootcache import Meter
from .context import Process, check, wait_for
from .image import MiB, File, json_of
from .qsd import StorageDaemon


class Contents:
    """What a template holds, and images of it in any format."""

    def __init__(self, ctx, size=12 * MiB + 512, seed=1):
        self.ctx = ctx
        self.size = size
        source = random.Random(seed)
        self.data = bytearray(source.randbytes(size))
        self.data[4 * MiB:7 * MiB] = bytes(3 * MiB)
        self.digest = 'sha256:' + hashlib.sha256(self.data).hexdigest()
        self.raw = File(ctx, ctx.unique('contents') + '.raw').path
        with open(self.raw, 'wb') as file:
            file.write(self.data)

    def image(self, fmt):
        if fmt == 'raw':
            return self.raw
        path = self.raw[:-4] + '.' + fmt
        self.ctx.run(self.ctx.bin('qemu-img'), 'convert', '-f', 'raw', '-O',
                     fmt, self.raw, path)
        return path


class StoreCluster:
    """@disks: name of each node -> how many it has."""

    def __init__(self, ctx, disks, ssd=True, replicas=1):
        self.ctx = ctx
        self.disks = dict(disks)
        self.ssd = ssd
        self.replicas = replicas
        self.config = ctx.path('templates.conf')
        self.servers = {}
        self.describe()
        for node, count in self.disks.items():
            if count:
                self.run(node, 'init')

    def path(self, node, number=0):
        return self.ctx.path('%s%d' % (node, number))

    def socket(self, node):
        return self.ctx.path(node + '.nbd')

    def describe(self):
        """Write the description anew, after a change of .disks."""
        lines = ['[cluster]', 'replicas = %d' % self.replicas]
        for node, count in self.disks.items():
            lines += ['[node %s]' % node, 'nbd = unix:' + self.socket(node)]
            for number in range(count):
                os.makedirs(self.path(node, number), exist_ok=True)
                lines += ['[disk %s%d]' % (node, number), 'node = ' + node,
                          'path = ' + self.path(node, number),
                          'ssd = ' + ('on' if self.ssd else 'off')]
        with open(self.config, 'w', encoding='utf-8') as file:
            file.write('\n'.join(lines) + '\n')

    def argv(self, node, *args):
        return [self.ctx.bin('thinvm-template'), '-c', self.config, '-n', node,
                *args]

    def run(self, node, *args, ok=(0,)):
        return self.ctx.run(*self.argv(node, *args), ok=ok)

    def fails(self, node, *args, status=1, words=()):
        """It must end with that status, and say those words."""
        text = self.run(node, *args, ok=(status,))
        for word in words:
            check(word in text, '%s does not say "%s": %s', ' '.join(args),
                  word, text)
        return text

    def start(self, node, *args):
        return Process(self.ctx, self.ctx.unique('%s-%s' % (node, args[0])),
                       self.argv(node, *args))

    def add(self, node, contents, fmt='raw', *options):
        text = self.run(node, 'add', *options, '-f', fmt, contents.image(fmt))
        found = text.strip().splitlines()[-1]
        check(found == contents.digest, '%s was added as %s, and is %s', fmt,
              found, contents.digest)

    def list(self, node):
        """digest -> rows; a warning may stand before them."""
        text = self.run(node, 'list', '--json', ok=(0, 2))
        return json.loads(text[text.index('['):])

    def states(self, node):
        return sorted((row['digest'], row['disk'], row['state'])
                      for row in self.list(node))

    def files(self, node, number=0):
        """What lies on a disk, but for the store's own files."""
        return sorted(set(os.listdir(self.path(node, number))) -
                      {'thinvm-store', 'lock', 'tmp'})

    def parts(self, node, number=0):
        try:
            return sorted(os.listdir(self.path(node, number) + '/tmp'))
        except FileNotFoundError:
            return []

    def copy(self, node, contents, suffix='.raw', number=0):
        return '%s/%s%s' % (self.path(node, number),
                            contents.digest.replace(':', '-'), suffix)

    def serve(self, node):
        """By the tool's own server."""
        process = self.start(node, 'serve')
        self.servers[node] = process
        wait_for(lambda: 'serves' in process.log_tail() or
                 not process.alive(), 60, '%s serves' % node)
        process.check_alive()

    def serve_by_daemon(self, node, contents):
        """By a storage daemon: one export, as anybody may make it."""
        daemon = StorageDaemon(self.ctx, node)
        daemon.qmp.cmd_raw('blockdev-add', {
            'driver': 'raw', 'node-name': 'template', 'read-only': True,
            'file': {'driver': 'file', 'filename': self.copy(node, contents),
                     'read-only': True}})
        daemon.qmp.cmd_raw('nbd-server-start', {
            'addr': {'type': 'unix', 'data': {'path': self.socket(node)}}})
        daemon.qmp.cmd_raw('block-export-add', {
            'type': 'nbd', 'id': 'x', 'node-name': 'template',
            'name': contents.digest})
        return daemon

    def blockdev(self, node, contents, *options):
        return json_of(self.run(node, 'locate', *options, contents.digest),
                       'locate')

    def compare(self, contents, blockdev):
        """Does what was located hold the contents?"""
        size = len(contents.data) // 512 * 512
        out = self.ctx.path(self.ctx.unique('read'))
        self.ctx.run(self.ctx.bin('qemu-img'), 'convert', '-O', 'raw',
                     'json:' + json.dumps(blockdev), out)
        with open(out, 'rb') as file:
            check(file.read()[:size] == contents.data[:size],
                  'the copy that was located has other contents')
        os.unlink(out)


def damage(path, offset, data=b'damaged!'):
    os.chmod(path, 0o644)
    with open(path, 'r+b') as file:
        file.seek(offset)
        file.write(data)
    os.chmod(path, 0o444)


def truncate(path, size):
    os.chmod(path, 0o644)
    os.truncate(path, size)
    os.chmod(path, 0o444)


class Gate(Meter):
    """A Meter that lets @limit bytes pass, and no more until it is opened."""

    def __init__(self, ctx, target, limit):
        super().__init__(ctx, target)
        self._left = limit
        self._open = threading.Event()
        ctx.cleanup(self._open.set)

    def _account(self, count):
        super()._account(count)
        with self._lock:
            self._left -= count
            shut = self._left < 0
        if shut:
            self._open.wait()

    def open(self):
        self._open.set()

    def shut(self, limit):
        with self._lock:
            self._left = limit
        self._open.clear()


class SilentServer:
    """Accepts connections, and never says a word."""

    def __init__(self, ctx, path):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.bind(path)
        self.sock.listen(8)
        ctx.cleanup(self.sock.close)
