# SPDX-License-Identifier: GPL-2.0-or-later
"""A boot cache: a template on a server whose bytes are counted, a publisher,
and readers, each in a process of its own.

The contents of a template are computed, so that whatever a reader returns
can be compared without a copy.
"""

import random
import socket
import struct
import threading
import time

from .context import check, wait_for
from .image import MiB, File
from .nbd import NBDClient
from .qsd import StorageDaemon

HELLO_MAGIC = 0x6f6c6c6568627674
REQUEST_MAGIC = 0x71657262
BOOT_END_MAGIC = 0x646e6562
REPLY_MAGIC = 0x79706572


class Meter:
    """A UNIX socket in front of another one; counts what comes back, and
    lets it pass at a rate (bytes a second, together) if there is one."""

    def __init__(self, ctx, target, rate=None):
        self.path = ctx.path(ctx.unique('meter'))
        self.bytes = 0
        self._target = target
        self._rate = rate
        self._lock = threading.Lock()
        self._free_at = time.monotonic()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(64)
        ctx.cleanup(self._listener.close)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                server.connect(self._target)
            except OSError:
                return
            for here, there, back in ((client, server, False),
                                      (server, client, True)):
                threading.Thread(target=self._pass, daemon=True,
                                 args=(here, there, back)).start()

    def _pass(self, here, there, back):
        try:
            while True:
                data = here.recv(256 * 1024)
                if not data:
                    break
                if back:
                    self._account(len(data))
                there.sendall(data)
        except OSError:
            pass
        for sock in (here, there):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def _account(self, count):
        with self._lock:
            self.bytes += count
            if not self._rate:
                return
            self._free_at = max(self._free_at, time.monotonic()) + \
                count / self._rate
            wait = self._free_at - time.monotonic()
        if wait > 0:
            time.sleep(wait)


class Template:
    """A template of @size bytes: data, zeroes, data that no zeroes are in."""

    def __init__(self, ctx, size=24 * MiB + 512, fmt='raw', seed=1):
        self.ctx = ctx
        self.size = size
        self.fmt = fmt
        source = random.Random(seed)
        self.data = bytearray(source.randbytes(size))
        third = size // 3 // 65536 * 65536
        self.data[third:2 * third] = bytes(third)
        raw = File(ctx, ctx.unique('template') + '.raw')
        with open(raw.path, 'wb') as file:
            file.write(self.data)
        self.place = raw
        if fmt != 'raw':
            self.place = File(ctx, ctx.unique('template') + '.' + fmt)
            ctx.run(ctx.bin('qemu-img'), 'convert', '-f', 'raw', '-O', fmt,
                    raw.path, self.place.path)

    def serve(self, rate=None):
        """Export it by NBD, behind a Meter."""
        server = StorageDaemon(self.ctx, 'server')
        server.add_disk(self.place, 'template', fmt=self.fmt, read_only=True)
        return Meter(self.ctx, server.export_nbd('template', writable=False),
                     rate)

    def differs(self, offset, data):
        return self.data[offset:offset + len(data)] != data


def template_nodes(template, meter=None):
    """Nodes that end in 'template': from @meter's server, or local."""
    if meter:
        return [{'driver': 'nbd', 'node-name': 'template', 'read-only': True,
                 'export': 'template',
                 'server': {'type': 'unix', 'path': meter.path}}]
    return [{'driver': 'file', 'node-name': 'template-file',
             'filename': template.place.path, 'read-only': True},
            {'driver': template.fmt, 'node-name': 'template',
             'file': 'template-file', 'read-only': True}]


def cache_node(path, **options):
    node = {'driver': 'bootcache', 'node-name': 'cache',
            'file': 'template', 'socket': path, 'read-only': True}
    node.update({k.replace('_', '-'): v for k, v in options.items()
                 if v is not None})
    return node


class Node(StorageDaemon):
    """A storage daemon with the cache node, of either role."""

    def __init__(self, ctx, host, template, meter, path, **options):
        super().__init__(ctx, host)
        if meter:
            options.setdefault('template_id', 'template')
        for node in template_nodes(template, meter):
            self.qmp.cmd_raw('blockdev-add', node)
        self.qmp.cmd_raw('blockdev-add', cache_node(path, **options))

    def info(self):
        return self.qmp.cmd('query-thinvm-bootcache', node_name='cache')[0]


class Publisher(Node):
    def __init__(self, ctx, template, meter, path, **options):
        super().__init__(ctx, 'publisher', template, meter, path,
                         role='publisher', **options)

    def state(self):
        return self.info()['publisher']

    def seal(self):
        self.qmp.cmd('thinvm-bootcache-seal', node_name='cache')

    def wait_saved(self):
        wait_for(lambda: self.state()['saved'], 60, 'the file is written')

    def wait_prefetched(self):
        wait_for(lambda: not self.state()['prefetching'], 60,
                 'the file is in memory')


class Reader(Node):
    """A reader, and a client that reads through it."""

    def __init__(self, ctx, template, meter, path, **options):
        super().__init__(ctx, 'reader', template, meter, path, **options)
        self.template = template
        self.client = NBDClient(ctx, self.export_nbd('cache', writable=False),
                                'cache')

    def statistics(self):
        return self.info()['statistics']

    def wait_connected(self, yes=True):
        wait_for(lambda: self.info()['connected'] == yes, 60,
                 'connected is %s' % yes)

    def verify(self, offset, length):
        data = self.client.read(offset, length)
        check(not self.template.differs(offset, data),
              '%s: wrong contents from %d on', self.name, offset)

    def verify_all(self, step=MiB):
        for offset in range(0, self.template.size, step):
            self.verify(offset, min(step, self.template.size - offset))


def in_parallel(readers, what):
    """what(reader, number) in a thread for each; the first error is raised."""
    errors = []

    def run(number, reader):
        try:
            what(reader, number)
        except Exception as err:
            errors.append(err)

    threads = [threading.Thread(target=run, args=pair, daemon=True)
               for pair in enumerate(readers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        check(not thread.is_alive(), 'a reader does not come to an end')
    if errors:
        raise errors[0]


class Wire:
    """A connection to a publisher, without a QEMU around it."""

    def __init__(self, path, timeout=60):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(timeout)
        self.sock.connect(path)
        self.fd = None

    @staticmethod
    def hello(identity, length, version=1, magic=HELLO_MAGIC):
        return struct.pack('<QIIQ32sQ', magic, version, 0, length,
                           bytes.fromhex(identity), 0)

    @staticmethod
    def request(cookie, block, count, magic=REQUEST_MAGIC):
        return struct.pack('<IIQQQ', magic, count & 0xffffffff, cookie,
                           block & (2 ** 64 - 1), 0)

    @staticmethod
    def boot_end(cookie, first=0, last=0):
        return struct.pack('<IIQQQ', BOOT_END_MAGIC, first, cookie, 0, last)

    def greet(self, identity, length):
        """The publisher's status; .fd is the shared memory."""
        self.sock.sendall(self.hello(identity, length))
        data, fds, _, _ = socket.recv_fds(self.sock, 64, 4)
        check(len(data) == 64, 'a hello of %d bytes', len(data))
        self.fd = fds[0] if fds else None
        return struct.unpack_from('<I', data, 12)[0]

    def reply(self):
        """(cookie, status), or None when the connection is closed."""
        data = b''
        while len(data) < 16:
            try:
                part = self.sock.recv(16 - len(data))
            except ConnectionError:
                return None
            if not part:
                return None
            data += part
        magic, status, cookie = struct.unpack('<IIQ', data)
        check(magic == REPLY_MAGIC, 'a reply with magic %x', magic)
        return cookie, status

    def closed(self):
        """Wait for the other side to close the connection."""
        try:
            while self.sock.recv(4096):
                pass
        except ConnectionError:
            pass
        return True

    def close(self):
        self.sock.close()
