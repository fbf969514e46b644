# SPDX-License-Identifier: GPL-2.0-or-later
#
# Overlapping requests of every kind, many at a time, on few clusters, with
# a model that knows what each sector may hold: the engine of
# tests/thinvm-races.  Runs alone too, for as long as wanted:
#
#   thinvm_stress.py --build DIR [--seed N] [--rounds N] [--requests N] ...
#
# A round starts qemu-storage-daemon with an NBD export, sends requests with
# a queue depth of 32, reads while others write, ends by a clean exit or by
# kill -9, has the image checked, and compares every sector.
#
# The model.  Each write has a number, which it puts into every sector that it
# writes; zeroing has a number too, but leaves zeroes.  A request takes effect
# at some time between its start and its end.  So a sector may hold what the
# writes say that nobody has certainly overwritten: a write goes from the
# candidates when one that began after its end has ended.  After a crash it may
# also hold anything that was a candidate when the last completed flush began.

import argparse
import json
import os
import random
import selectors
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time

SECTOR = 512
BASE = -1           # "number" of what the backing file holds
TRIM, ZEROES, FLUSH, READ, WRITE = 4, 6, 3, 0, 1
NO_HOLE = 1 << 1
NAMES = {TRIM: 'discard', ZEROES: 'zeroes', FLUSH: 'flush', READ: 'read',
         WRITE: 'write'}


class Failure(Exception):
    """The image does not hold what it may hold, or a program failed."""


def sector_of(number, sector):
    """What write number puts into sector."""
    if number == 0:
        return bytes(SECTOR)
    return struct.pack('<qQ', number, sector) * (SECTOR // 16)


def number_in(data, sector):
    """Which write a sector's bytes come from; None: from none, or mixed."""
    number = struct.unpack_from('<q', data)[0]
    return number if data == sector_of(number, sector) else None


def numbers_in(data, sector):
    """
    The same for a sector that may be written while it is read: the page
    cache may answer with some of the old bytes and some of the new ones.
    """
    pairs = struct.iter_unpack('<qQ', data)
    return {n if place == sector else 0 if n == place == 0 else None
            for n, place in pairs}


class Request:
    """One NBD request and the time that it took effect in."""

    def __init__(self, kind, number, first, count, flags=0):
        self.kind, self.number = kind, number
        self.first, self.count, self.flags = first, count, flags
        self.start = self.end = None
        self.allowed = None         # of a read: what each sector may hold

    def __str__(self):
        return (f'{NAMES[self.kind]} #{self.number} of sectors {self.first} '
                f'to {self.first + self.count - 1} flags {self.flags} '
                f'({self.start}-{self.end})')

    def sectors(self):
        return range(self.first, self.first + self.count)

    def value(self):
        """The number that a sector shows afterwards."""
        return self.number if self.kind == WRITE else 0


class Model:
    """What each sector may hold."""

    def __init__(self, sectors, initial):
        self.now = 0
        self.possible = []
        self.recent = [[] for _ in range(sectors)]
        for _ in range(sectors):
            first = Request(WRITE, initial, 0, 0)
            first.start = first.end = 0
            self.possible.append([first])
        self.flushed = [list(p) for p in self.possible]
        self.flush_start = 0
        self.reads = set()

    def tick(self):
        self.now += 1
        return self.now

    def begin(self, request):
        request.start = self.tick()
        if request.kind == READ:
            request.allowed = [{r.value() for r in self.possible[s]}
                               for s in request.sectors()]
            self.reads.add(request)
        elif request.kind == FLUSH:
            request.allowed = [list(p) for p in self.possible]
        elif request.count:
            for s in request.sectors():
                self.possible[s].append(request)
                self.recent[s].append(request)
            for r in self.reads:
                low = max(r.first, request.first)
                high = min(r.first + r.count, request.first + request.count)
                for s in range(low, high):
                    r.allowed[s - r.first].add(request.value())

    def finish(self, request):
        request.end = self.tick()
        if request.kind == READ:
            self.reads.discard(request)
        elif request.kind == FLUSH:
            if request.start > self.flush_start:
                self.flush_start = request.start
                self.flushed = request.allowed
                for s, recent in enumerate(self.recent):
                    self.recent[s] = [r for r in recent
                                      if r.start > request.start]
        elif request.count:
            for s in request.sectors():
                self.possible[s] = [
                    r for r in self.possible[s]
                    if r.end is None or r.end >= request.start]

    def check_read(self, request, data):
        for i, s in enumerate(request.sectors()):
            piece = data[i * SECTOR:(i + 1) * SECTOR]
            if not numbers_in(piece, s) <= request.allowed[i]:
                raise Failure(f'{request}: sector {s} reads as '
                              f'{describe(piece, s)}, may be one of '
                              f'{sorted(request.allowed[i])}')

    def settle(self, read_sector, crashed):
        """Compare all, and go on with what is there."""
        for s, possible in enumerate(self.possible):
            allowed = {r.value() for r in possible}
            if crashed:
                allowed |= {r.value() for r in self.flushed[s]}
                allowed |= {r.value() for r in self.recent[s]}
            piece = read_sector(s)
            number = number_in(piece, s)
            if number not in allowed:
                raise Failure(f'sector {s} holds {describe(piece, s)} after '
                              f'{"a crash" if crashed else "closing"}, may '
                              f'be one of {sorted(allowed)}; requests: ' +
                              '; '.join(str(r) for r in possible))
            last = Request(WRITE, number, 0, 0)
            last.start = last.end = self.now
            self.possible[s] = [last]
            self.recent[s] = []
        self.flushed = [list(p) for p in self.possible]
        self.flush_start = self.now
        self.reads = set()


def describe(piece, sector):
    number = number_in(piece, sector)
    if number is not None:
        return f'#{number}'
    numbers = struct.unpack('<64q', piece)
    return (f'a mixture: {numbers[:4]} ... {numbers[-4:]}')


class Nbd:
    """A client that has many requests on their way."""

    def __init__(self, path, export):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(path)
        self.pending, self.handle = {}, 0
        self.inbox = b''
        magic, opt, _ = struct.unpack('>QQH', self.exactly(18))
        assert magic == 0x4e42444d41474943 and opt == 0x49484156454F5054
        name = export.encode()
        self.sock.sendall(struct.pack('>IQII', 3, opt, 1, len(name)) + name)
        self.size, self.flags = struct.unpack('>QH', self.exactly(10))

    def exactly(self, n):
        while len(self.inbox) < n:
            more = self.sock.recv(1 << 18)
            if not more:
                raise Failure('the NBD server closed the connection')
            self.inbox += more
        data, self.inbox = self.inbox[:n], self.inbox[n:]
        return data

    def send(self, request, payload=b''):
        self.handle += 1
        self.pending[self.handle] = request
        data = memoryview(struct.pack(
            '>IHHQQI', 0x25609513, request.flags, request.kind, self.handle,
            request.first * SECTOR, request.count * SECTOR) + payload)
        # The server takes no more requests while its answers are not read
        both = selectors.EVENT_READ | selectors.EVENT_WRITE
        with selectors.DefaultSelector() as selector:
            selector.register(self.sock, both)
            while data:
                ready = selector.select(60)
                if not ready:
                    raise Failure('the NBD server takes no more requests')
                if ready[0][1] & selectors.EVENT_READ:
                    more = self.sock.recv(1 << 18)
                    if not more:
                        raise Failure('the NBD server closed the connection')
                    self.inbox += more
                if ready[0][1] & selectors.EVENT_WRITE:
                    data = data[self.sock.send(data[:1 << 16]):]

    def receive(self):
        """The next request that ended, its errno, and what it read."""
        magic, error, handle = struct.unpack('>IIQ', self.exactly(16))
        assert magic == 0x67446698, hex(magic)
        request = self.pending.pop(handle)
        data = b''
        if request.kind == READ and not error:
            data = self.exactly(request.count * SECTOR)
        return request, error, data

    def readable(self):
        if len(self.inbox) >= 16:
            return True
        with selectors.DefaultSelector() as s:
            s.register(self.sock, selectors.EVENT_READ)
            return bool(s.select(0))


class Daemon:
    """qemu-storage-daemon with one thinvm node, exported by NBD."""

    def __init__(self, tools, directory, image, options):
        self.socket = os.path.join(directory, 'nbd')
        self.qmp_path = os.path.join(directory, 'qmp')
        for path in (self.socket, self.qmp_path):
            if os.path.exists(path):
                os.unlink(path)
        file = {'driver': 'file', 'filename': image, 'discard': 'unmap'}
        if options.get('late'):
            file = {'driver': 'throttle', 'throttle-group': 'late',
                    'discard': 'unmap', 'file': file}
        node = {'driver': 'thinvm', 'node-name': 'disk', 'discard': 'unmap',
                'file': file, **options.get('node', {})}
        args = [tools['qemu-storage-daemon'],
                '--object', json.dumps(
                    {'qom-type': 'throttle-group', 'id': 'late',
                     'limits': {'iops-write': options.get('late') or 0}}),
                '--blockdev', json.dumps(node),
                '--nbd-server', f'addr.type=unix,addr.path={self.socket}',
                '--chardev', f'socket,id=c,path={self.qmp_path},server=on,'
                             'wait=off',
                '--monitor', 'chardev=c']
        export = 'nbd,id=e,node-name=disk,writable=on,name=disk'
        if options.get('iothread'):
            args += ['--object', 'iothread,id=t']
            export += ',iothread=t'
        args += ['--export', export]
        self.log = open(os.path.join(directory, 'log'), 'w+b')
        self.process = subprocess.Popen(args, stdout=self.log,
                                        stderr=self.log)
        try:
            self.connect(self.socket).close()
            self.qmp = self.connect(self.qmp_path)
        except Failure:
            self.process.kill()
            self.process.wait()
            self.log.close()
            raise
        self.unread = b''
        while b'\n' not in self.unread:       # the greeting
            self.receive()
        self.unread = b''
        self.command('qmp_capabilities')

    def connect(self, path):
        """Once the daemon listens there; the file comes before that."""
        deadline = time.monotonic() + 60
        while True:
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(60)
            try:
                sock.connect(path)
                return sock
            except (FileNotFoundError, ConnectionRefusedError):
                sock.close()
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise Failure(f'the daemon does not start: {self.output()}')
            time.sleep(0.02)

    def output(self):
        self.log.flush()
        with open(self.log.name, 'rb') as f:
            return f.read().decode(errors='replace')

    def send_command(self, command, **arguments):
        self.qmp.sendall(json.dumps({'execute': command,
                                     'arguments': arguments}).encode() + b'\n')

    def receive(self):
        data = self.qmp.recv(65536)
        if not data:
            raise Failure(f'the daemon died: {self.output()}')
        self.unread += data

    def answer_there(self):
        """The answer to the last command, None if it has not come yet."""
        *lines, self.unread = self.unread.split(b'\n')
        for reply in map(json.loads, lines):
            if 'return' in reply or 'error' in reply:
                return reply
        return None

    def answer(self):
        while True:
            reply = self.answer_there()
            if reply:
                return reply
            self.receive()

    def command(self, command, **arguments):
        self.send_command(command, **arguments)
        reply = self.answer()
        if 'error' in reply:
            raise Failure(f'{command}: {reply["error"]["desc"]}')
        return reply['return']

    def close(self):
        self.qmp.close()
        self.log.close()

    def quit(self):
        self.command('quit')
        status = self.process.wait(60)
        text = self.output()
        self.close()
        if status:
            raise Failure(f'the daemon ended with {status}: {text}')

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.close()


class Stress:
    """Rounds of requests on one image."""

    def __init__(self, tools, directory, seed, size=4 << 20,
                 cluster=64 << 10, base=False, depth=32, snapshots=False,
                 compact=False, node=None, iothread=False, create=(),
                 late=0, keep=False):
        self.tools, self.dir, self.keep = tools, directory, keep
        self.rng = random.Random(seed)
        self.sectors = size // SECTOR
        self.cluster = cluster // SECTOR
        self.depth, self.snapshots, self.compact = depth, snapshots, compact
        self.options = {'node': node or {}, 'iothread': iothread,
                        'late': late}
        self.image = os.path.join(directory, 'disk.thinvm')
        self.number = 0
        self.snapshot_names = []
        self.asked = False          # by QMP, without an answer yet
        args = ['-o', f'cluster_size={cluster}', *create]
        if base:
            path = os.path.join(directory, 'base.raw')
            with open(path, 'wb') as f:
                for s in range(self.sectors):
                    f.write(sector_of(BASE, s))
            args += ['-b', path, '-F', 'raw']
        self.img('create', '-q', '-f', 'thinvm', *args, self.image, str(size))
        self.model = Model(self.sectors, BASE if base else 0)

    def img(self, *args, ok=(0,)):
        done = subprocess.run([self.tools['qemu-img'], *args], text=True,
                              stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, check=False)
        if done.returncode not in ok:
            raise Failure(f'qemu-img {args}: status {done.returncode}: '
                          f'{done.stdout}')
        return done.stdout

    def request(self):
        rng = self.rng
        # what goes leaves places for compaction to move to
        kind = rng.choices((WRITE, READ, ZEROES, TRIM, FLUSH),
                           (10, 10, 1, 3, 0.3) if self.compact else
                           (10, 5, 2, 2, 0.3))[0]
        if kind == FLUSH:
            return Request(FLUSH, 0, 0, 0)
        align = rng.choice((1, 1, 8, 8, self.cluster))
        longest = rng.choice((8, 8, 32, self.cluster, 4 * self.cluster))
        count = max(1, rng.randint(1, longest) // align) * align
        # few places, so that requests meet
        centre = rng.choice((0, self.sectors // 3, self.sectors // 2))
        first = centre + rng.randrange(0, 6 * self.cluster)
        if rng.random() < 0.2:
            first = rng.randrange(0, self.sectors)
        first = first // align * align
        count = min(count, self.sectors - first)
        flags = NO_HOLE if kind == ZEROES and rng.random() < 0.5 else 0
        if kind == TRIM:
            # what is not a whole cluster stays as it is
            end = (first + count) // self.cluster * self.cluster
            first = -(-first // self.cluster) * self.cluster
            count = end - first
            if count <= 0:
                return self.request()
        self.number += 1
        return Request(kind, self.number, first, count, flags)

    def finish_one(self, nbd):
        request, error, data = nbd.receive()
        if error:
            raise Failure(f'{request}: error {error}')
        self.model.finish(request)
        if request.kind == READ:
            self.model.check_read(request, data)

    def start_one(self, nbd):
        request = self.request()
        self.model.begin(request)
        payload = b''
        if request.kind == WRITE:
            payload = b''.join(sector_of(request.number, s)
                               for s in request.sectors())
        nbd.send(request, payload)

    def take_snapshot(self, daemon):
        """In the midst of requests; the daemon drains the node for it."""
        if len(self.snapshot_names) < 3:
            self.number += 1
            name = f's{self.number}'
            daemon.send_command('blockdev-snapshot-internal-sync',
                                device='disk', name=name)
            self.snapshot_names.append(name)
        else:
            name = self.snapshot_names.pop(0)
            daemon.send_command('blockdev-snapshot-delete-internal-sync',
                                device='disk', name=name)

    def start_compaction(self, daemon):
        """The last one may still run: then there are several at it."""
        self.number += 1
        daemon.send_command('thinvm-compact', **{
            'job-id': f'c{self.number}', 'node-name': 'disk'})

    def ask(self, daemon, nbd, i):
        """After request @i: for what is to go on beside requests."""
        if self.snapshots and i % 100 == 99:
            self.await_answer(daemon, nbd)
            self.take_snapshot(daemon)
            self.asked = True
        elif self.compact and i % 40 == 39:
            self.await_answer(daemon, nbd)
            self.start_compaction(daemon)
            self.asked = True

    def await_answer(self, daemon, nbd):
        """
        To the last QMP command.  It waits until the node is drained, so the
        answers to NBD requests must be read meanwhile.
        """
        while self.asked:
            with selectors.DefaultSelector() as s:
                s.register(nbd.sock, selectors.EVENT_READ)
                s.register(daemon.qmp, selectors.EVENT_READ)
                ready = [key.fileobj for key, _ in s.select(60)]
            if not ready:
                raise Failure('no answer to a QMP command')
            if daemon.qmp in ready:
                daemon.receive()
                reply = daemon.answer_there()
                if reply and 'error' in reply:
                    raise Failure(str(reply['error']))
                self.asked = not reply
            else:
                self.finish_one(nbd)

    def check(self):
        result = json.loads(self.img('check', '-f', 'thinvm',
                                     '--output=json', self.image))
        bad = {k: v for k, v in result.items() if v and k in
               ('corruptions', 'leaks', 'check-errors')}
        if bad:
            raise Failure(f'check: {bad}: ' + self.img(
                'check', '-f', 'thinvm', self.image, ok=(0, 2, 3)))

    def compare(self, crashed):
        raw = os.path.join(self.dir, 'out.raw')
        self.img('convert', '-f', 'thinvm', '-O', 'raw', self.image, raw)
        with open(raw, 'rb') as f:
            data = f.read()
        self.model.settle(lambda s: data[s * SECTOR:(s + 1) * SECTOR],
                          crashed)

    def round(self, requests, crash):
        daemon = Daemon(self.tools, self.dir, self.image, self.options)
        self.asked = False
        try:
            nbd = Nbd(daemon.socket, 'disk')
            for i in range(requests):
                self.start_one(nbd)
                while len(nbd.pending) >= self.depth or nbd.readable():
                    self.finish_one(nbd)
                self.ask(daemon, nbd, i)
            self.await_answer(daemon, nbd)
            if crash:
                daemon.kill()
            else:
                while nbd.pending:
                    self.finish_one(nbd)
                daemon.quit()
            nbd.sock.close()
        except (Failure, OSError, AssertionError) as e:
            text = '' if daemon.log.closed else daemon.output()
            if self.keep:
                raise Failure(f'{e!r}; the daemon, process '
                              f'{daemon.process.pid}, is left alone') from e
            daemon.process.kill()
            status = daemon.process.wait()
            raise Failure(f'{e!r}; the daemon ({status}) says: '
                          f'{text[-3000:]}') from e
        self.check()
        self.compare(crash)

    def run(self, rounds, requests):
        for i in range(rounds):
            self.round(requests, crash=i % 2 == 1)


def find_tools(build):
    return {name: os.path.join(build, name) for name in
            ('qemu-img', 'qemu-storage-daemon')}


def main():
    parser = argparse.ArgumentParser(
        description='Overlapping requests on a thinvm image, verified')
    parser.add_argument('--build', required=True,
                        help='directory of qemu-img and qemu-storage-daemon')
    parser.add_argument('--seed', type=int, default=1)
    parser.add_argument('--rounds', type=int, default=10)
    parser.add_argument('--requests', type=int, default=2000)
    parser.add_argument('--cluster', type=int, default=65536)
    parser.add_argument('--size', type=int, default=4 << 20)
    parser.add_argument('--depth', type=int, default=32)
    parser.add_argument('--base', action='store_true')
    parser.add_argument('--snapshots', action='store_true')
    parser.add_argument('--compact', action='store_true')
    parser.add_argument('--late', type=int, default=0, metavar='N',
                        help='let at most N writes a second reach the file: '
                        'they wait there, and reads overtake them')
    parser.add_argument('--iothread', action='store_true')
    parser.add_argument('--mode', default='writeback')
    parser.add_argument('--cache', type=int)
    parser.add_argument('--keep', action='store_true',
                        help='leave the daemon running when something fails')
    args = parser.parse_args()
    node = {'mapping-cache-mode': args.mode}
    if args.cache:
        node['mapping-cache-size'] = args.cache
    directory = tempfile.mkdtemp(prefix='thinvm-stress-')
    try:
        Stress(find_tools(args.build), directory, args.seed, args.size,
               args.cluster, args.base, args.depth, args.snapshots,
               args.compact, node, args.iothread, late=args.late,
               keep=args.keep).run(args.rounds, args.requests)
    except Failure as e:
        print(f'FAILED (seed {args.seed}): {e}')
        print(f'kept: {directory}')
        return 1
    shutil.rmtree(directory)
    print(f'ok, seed {args.seed}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
