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
import struct
import threading
import time

from .bootcache import Meter
from .context import Process, check, wait_for
from .image import MiB, File, json_of
from .nbd import NBDClient
from .qmp import QMPError
from .qsd import StorageDaemon


class Contents:
    """What a template holds, and images of it in any format."""

    def __init__(self, ctx, size=12 * MiB + 512, seed=1, data=None):
        """Of @data, or random, but for some zeroes."""
        self.ctx = ctx
        if data is None:
            data = bytearray(random.Random(seed).randbytes(size))
            data[4 * MiB:7 * MiB] = bytes(3 * MiB)
        self.data = data
        self.size = len(data)
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

    def address(self, node):
        return 'unix:' + self.socket(node)

    def describe(self):
        """Write the description anew, after a change of .disks."""
        lines = ['[cluster]', 'replicas = %d' % self.replicas]
        for node, count in self.disks.items():
            lines += ['[node %s]' % node, 'nbd = ' + self.address(node)]
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

    def serve_by_daemon(self, node, contents, chunks=False):
        """By a storage daemon, as anybody may; with the hashes if wanted."""
        daemon = StorageDaemon(self.ctx, node)
        daemon.qmp.cmd_raw('nbd-server-start', {
            'addr': {'type': 'unix', 'data': {'path': self.socket(node)}},
            'max-connections': 0})
        for number, suffix in enumerate(['', '.chunks'][:1 + chunks]):
            path = self.copy(node, contents, suffix or '.raw')
            daemon.qmp.cmd_raw('blockdev-add', {
                'driver': 'raw', 'node-name': 'n%d' % number,
                'read-only': True, 'file': {
                    'driver': 'file', 'filename': path, 'read-only': True}})
            daemon.qmp.cmd_raw('block-export-add', {
                'type': 'nbd', 'id': 'x%d' % number,
                'node-name': 'n%d' % number,
                'name': contents.digest + suffix})
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


class Reader(StorageDaemon):
    """A QEMU on @node that has the template open by the driver, and a client
    that reads it."""

    def __init__(self, ctx, cluster, node, contents, **options):
        super().__init__(ctx, 'on-' + node)
        self.contents = contents
        self.qmp.cmd_raw('blockdev-add', self.options(
            cluster, node, contents, **options))
        path = self.export_nbd('template', writable=False)
        self.client = NBDClient(ctx, path, 'template')

    @staticmethod
    def options(cluster, node, contents, **more):
        return {'driver': 'thinvm-template', 'digest': contents.digest,
                'cluster': cluster.config, 'node': node, 'read-only': True,
                'node-name': 'template',
                **{key.replace('_', '-'): value
                   for key, value in more.items()}}

    def info(self):
        return self.qmp.cmd('query-thinvm-template', node_name='template')[0]

    def statistics(self):
        return self.info()['statistics']

    def source(self):
        """The node that it reads from."""
        info = self.info()
        return next((row['cluster-node'] for row in info['replicas']
                     if row['place'] == info.get('source')), None)

    def bytes_from(self, node):
        return next(row['bytes'] for row in self.info()['replicas']
                    if row['cluster-node'] == node)

    def wait_source(self, node, seconds=60):
        wait_for(lambda: self.source() == node, seconds,
                 'it reads from %s, but from %s' % (node, self.source()))

    def verify(self, offset, length):
        data = self.client.read(offset, length)
        check(data == self.contents.data[offset:offset + length],
              'wrong data from %d on', offset)

    def verify_all(self, step=MiB):
        size = len(self.contents.data)
        for offset in range(0, size, step):
            self.verify(offset, min(step, size - offset))

    def bring_over(self, **options):
        self.qmp.cmd('thinvm-template-bring-over', node_name='template',
                     **options)

    def brought(self):
        """How far the background copy is: its state, its bytes."""
        info = self.info().get('bring-over', {})
        check(info.get('state') != 'failed', 'it failed: %s', info)
        return info.get('state'), info.get('bytes')

    def wait_brought(self, seconds=120):
        wait_for(lambda: self.brought()[0] == 'done', seconds,
                 'it has been brought over')


def open_fails(ctx, cluster, node, contents, words, **options):
    """Opening by the driver must fail, and say @words."""
    daemon = StorageDaemon(ctx, 'on-' + node)
    try:
        daemon.qmp.cmd_raw('blockdev-add', Reader.options(
            cluster, node, contents, **options))
    except QMPError as err:
        check(words in str(err), 'it does not say "%s": %s', words, err)
    else:
        check(False, 'it was opened')
    daemon.quit()


class FakeServer:
    """An NBD server that misbehaves as it is told to.

    @exports: name -> contents.  A read of export @name from @offset on gets
    what .answer(name, offset, data) gives: other bytes, fewer, a number for
    an error, or None for silence.  .size(name, size) is what it says about lengths."""

    def __init__(self, ctx, path, exports):
        self.exports = exports
        self.answer = lambda name, offset, data: data
        self.size = lambda name, size: size
        self.greeting = struct.pack('>QQH', 0x4e42444d41474943,
                                    0x49484156454F5054, 3)
        self.reads = 0
        self.trickle = 0        # seconds between bytes
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.bind(path)
        self._sock.listen(64)
        ctx.cleanup(self._sock.close)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                sock, _ = self._sock.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(sock,),
                             daemon=True).start()

    def _serve(self, sock):
        try:
            with sock:
                self._talk(sock)
        except (OSError, EOFError):
            pass

    @staticmethod
    def _recv(sock, length):
        data = b''
        while len(data) < length:
            part = sock.recv(length - len(data))
            if not part:
                raise EOFError
            data += part
        return data

    def _talk(self, sock):
        sock.sendall(self.greeting)
        self._recv(sock, 4)
        name = None
        while name is None:
            _, option, length = struct.unpack('>QII', self._recv(sock, 16))
            payload = self._recv(sock, length)
            name = self._option(sock, option, payload)
        data = self.exports[name]
        while True:
            _, _, command, cookie, offset, length = struct.unpack(
                '>IHHQQI', self._recv(sock, 28))
            if command != 0:
                return
            self.reads += 1
            answer = self.answer(name, offset, data[offset:offset + length])
            if answer is None:
                sock.recv(1)            # until the other end gives up
                return
            error = answer if isinstance(answer, int) else 0
            sock.sendall(struct.pack('>IIQ', 0x67446698, error, cookie))
            if error:
                continue
            if self.trickle and name == next(iter(self.exports)):
                for byte in answer:
                    sock.sendall(bytes([byte]))
                    time.sleep(self.trickle)
            sock.sendall(answer)

    def _option(self, sock, option, payload):
        """The name of the export that was chosen, if one was."""
        def reply(kind, data=b''):
            sock.sendall(struct.pack('>QIII', 0x3e889045565a9, option, kind,
                                     len(data)) + data)
        if option != 7:                 # NBD_OPT_GO
            reply(0x80000001)
            return None
        length, = struct.unpack('>I', payload[:4])
        name = payload[4:4 + length].decode()
        if name not in self.exports:
            reply(0x80000006)
            return None
        reply(3, struct.pack('>HQH', 0, self.size(
            name, len(self.exports[name])), 3))
        reply(1)
        return name
