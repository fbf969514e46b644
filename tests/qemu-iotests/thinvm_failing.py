# SPDX-License-Identifier: GPL-2.0-or-later
#
# One run of a fixed workload on a thinvm image whose device fails at a
# chosen I/O: the engine of tests/thinvm-failing.  QEMU's storage daemon has
# the image on top of blkdebug, this program speaks QMP and NBD to it.
#
# The model.  Each write puts a byte of its own into its blocks.  `now` is
# what a block may read as; a request that fails may have had its effect or
# not, or in part.  `durable` is what it may read as after the process is
# gone: all that was written since the last flush that succeeded, or what
# `now` was then.  Every request that reports success counts as done, so an
# error that is swallowed shows as a block that holds something else.  At
# points whose failure is always told to somebody (a request, a command, or
# whoever reads the message at closing), told() has to say so.
#
# A run ends by closing the image, or by SIGKILL before that, which shows what
# of the promises was on the device already.

import collections
import json
import os
import select
import socket
import struct
import subprocess
import time

BLOCK = 4096
KiB, MiB = 1024, 1024 * 1024
DISK = 16 * MiB
PREPARED = (8 * MiB, 64 * KiB, 200)     # offset, length, byte
TIMEOUT = 60
INTERVAL = 600 * 1000           # no commit but those that are asked for
SUPERBLOCKS = 0, 512 * KiB       # where they lie
READ, WRITE, FLUSH, TRIM, ZEROES = 0, 1, 3, 4, 6


class Failure(Exception):
    """A program crashed, hung, or an image holds what it may not hold."""


class Model:
    def __init__(self):
        self.durable = None
        self.now = [{0} for _ in range(DISK // BLOCK)]
        self.write(*PREPARED, ok=True)
        self.flushed()

    def write(self, offset, length, byte, ok, maybe=False):
        for b in range(offset // BLOCK, (offset + length) // BLOCK):
            self.now[b] = {byte} if ok and not maybe else \
                self.now[b] | {byte}
            if self.durable:
                self.durable[b] = self.durable[b] | self.now[b]

    def flushed(self):
        self.durable = [set(s) for s in self.now]

    @staticmethod
    def compare(data, allowed, what):
        for b, values in enumerate(allowed):
            piece = data[b * BLOCK:(b + 1) * BLOCK]
            got = set(piece)
            if not got <= values:
                raise Failure(f'{what}: block at {b * BLOCK:#x} holds '
                              f'{sorted(got)}, may hold {sorted(values)}')


class Nbd:
    """As little of an NBD client as the workload needs."""

    def __init__(self, path, export):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT)
        self.sock.connect(path)
        assert self.get(16) == b'NBDMAGICIHAVEOPT'
        self.get(2)
        # fixed newstyle, no zeroes; NBD_OPT_EXPORT_NAME
        self.sock.sendall(struct.pack('>I', 3) + b'IHAVEOPT' +
                          struct.pack('>II', 1, len(export)) +
                          export.encode())
        self.size, _ = struct.unpack('>QH', self.get(10))

    def get(self, n):
        data = b''
        while len(data) < n:
            more = self.sock.recv(n - len(data))
            if not more:
                raise Failure('the NBD server has gone')
            data += more
        return data

    def request(self, kind, offset=0, length=0, data=b''):
        """(ok, data)"""
        self.sock.sendall(struct.pack('>IHHQQI', 0x25609513, 0, kind, 1,
                                      offset, length) + data)
        magic, error, _ = struct.unpack('>IIQ', self.get(16))
        assert magic == 0x67446698
        if error:
            return False, b''
        return True, self.get(length) if kind == READ else b''

    def close(self):
        self.sock.close()


class Daemon:
    """A storage daemon with QMP on its standard streams."""

    def __init__(self, program, directory, path, trace):
        self.socket = path      # sockets need short ones
        args = [program, '--chardev', 'stdio,id=m', '--monitor', 'chardev=m',
                '--nbd-server', f'addr.type=unix,addr.path={self.socket}',
                '--trace', f'enable=thinvm_io_point,file={trace}']
        self.log = open(os.path.join(directory, 'stderr'), 'w+',
                        encoding='utf-8')
        self.process = subprocess.Popen(args, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE,
                                        stderr=self.log)
        self.buffer = b''
        self._reply()
        self.qmp('qmp_capabilities')

    def _line(self):
        deadline = time.monotonic() + TIMEOUT
        while b'\n' not in self.buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [],
                                              left)[0]:
                raise Failure('the storage daemon hangs')
            more = os.read(self.process.stdout.fileno(), 65536)
            if not more:
                raise Failure(f'the storage daemon ended: {self.ended()}')
            self.buffer += more
        line, self.buffer = self.buffer.split(b'\n', 1)
        return json.loads(line)

    def _reply(self):
        while True:
            reply = self._line()
            if 'event' not in reply:
                return reply

    def qmp(self, command, **args):
        """None, or the message of the error."""
        args = {k.replace('_', '-'): v for k, v in args.items()}
        line = json.dumps({'execute': command, 'arguments': args})
        self.process.stdin.write(line.encode() + b'\n')
        self.process.stdin.flush()
        reply = self._reply()
        return reply['error']['desc'] if 'error' in reply else None

    def ended(self):
        self.process.wait(TIMEOUT)
        self.log.seek(0)
        return self.log.read()

    def quit(self):
        self.process.stdin.write(b'{"execute": "quit"}\n')
        self.process.stdin.flush()
        try:
            self.process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            raise Failure('the storage daemon does not end')
        if self.process.returncode not in (0, 1):
            raise Failure('the storage daemon crashed, status '
                          f'{self.process.returncode}: {self.ended()}')

    def destroy(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.log.close()


def rules(event, nth, once, errno, iotype=None):
    """Rules for blkdebug: the I/O at the nth time of event fails."""
    inject = {'event': event, 'state': nth, 'once': once, 'errno': errno}
    if iotype:
        inject['iotype'] = iotype
    return {'inject-error': [inject],
            'set-state': [{'event': event, 'state': n, 'new_state': n + 1}
                          for n in range(1, nth + 1)]}


def broken_superblocks():
    """Rules for blkdebug: no superblock can be written, all else can."""
    return {'inject-error': [{'event': 'none', 'iotype': 'write',
                              'sector': at // 512} for at in SUPERBLOCKS]}


class Run:
    """The workload once, with these rules for blkdebug."""

    def __init__(self, program, directory, image, config, persistent, path,
                 workload='work', kill=False):
        self.directory, self.image = directory, image
        self.trace = os.path.join(directory, 'trace')
        self.model, self.errors, self.byte = Model(), [], 0
        self.persistent = persistent
        self.closed = False
        self.stderr = ''
        self.nbd = None
        self.qsd = Daemon(program, directory, path, self.trace)
        try:
            error = self.qsd.qmp(
                'blockdev-add', driver='blkdebug', node_name='device',
                discard='unmap', image={
                    'driver': 'file', 'filename': image, 'discard': 'unmap',
                    'cache': {'no-flush': True}}, **config)
            if error:
                raise Failure(error)
            opened = self.open()
            if opened:
                getattr(self, workload)()
            if kill:
                self.qsd.destroy()
            else:
                if opened:
                    self.close()
                self.qsd.quit()
                self.stderr = self.qsd.ended()
            self.reached = self._count()
        finally:
            if self.nbd:
                self.nbd.close()
            self.qsd.destroy()

    # --- requests, repeated while the device may still work ---

    def attempt(self, what, function):
        """Until it succeeds; a device that failed once works again."""
        for _ in range(3):
            error = function()
            if error is None:
                return True
            self.errors.append(f'{what}: {error}')
            if self.persistent:
                return False
        raise Failure(f'goes on failing on a device that works: '
                      f'{self.errors}')

    def qmp(self, command, **args):
        return self.attempt(command, lambda: self.qsd.qmp(command, **args))

    def delete_snapshot(self, name):
        """
        An error says that it may not be durable; what memory has is not
        rolled back, so it need not be there any more.
        """
        def once():
            error = self.qsd.qmp('blockdev-snapshot-delete-internal-sync',
                                 device='disk', name=name)
            gone = self.errors and 'does not exist' in str(error)
            return None if gone else error
        return self.attempt('delete', once)

    def change(self, kind, offset, length, byte, data=b''):
        def once():
            ok, _ = self.nbd.request(kind, offset, length, data)
            self.model.write(offset, length, byte, ok, maybe=kind == TRIM)
            return None if ok else 'failed'

        return self.attempt(f'request {kind} at {offset:#x}', once)

    def write(self, offset, length):
        self.byte = self.byte % 250 + 1
        return self.change(WRITE, offset, length, self.byte,
                           bytes([self.byte]) * length)

    def flush(self):
        def once():
            ok, _ = self.nbd.request(FLUSH)
            if ok:
                self.model.flushed()
            return None if ok else 'failed'

        return self.attempt('flush', once)

    def read_all(self):
        def once():
            for offset in range(0, DISK, MiB):
                ok, data = self.nbd.request(READ, offset, MiB)
                if not ok:
                    return 'failed'
                first = offset // BLOCK
                self.model.compare(
                    data, self.model.now[first:first + MiB // BLOCK],
                    f'read at {offset:#x}')
            return None

        return self.attempt('read', once)

    # --- the workload ---

    def open(self):
        if not self.qmp('blockdev-add', driver='thinvm', node_name='disk',
                        file='device', discard='unmap',
                        mapping_cache_size=1 << 20,
                        mapping_flush_interval=INTERVAL):
            return False
        if not self.qmp('block-export-add', type='nbd', id='e', name='disk',
                        node_name='disk', writable=True):
            return False
        self.nbd = Nbd(self.qsd.socket, 'disk')
        return True

    def work(self):
        self.write(8 * MiB + 4 * KiB, 8 * KiB)
        self.write(0, 68 * KiB)
        self.write(MiB, 64 * KiB)
        self.flush()
        self.write(16 * KiB, 8 * KiB)
        self.snapshot('one')
        self.write(32 * KiB, 4 * KiB)           # a shared cluster
        self.write(MiB + 20 * KiB, 40 * KiB)
        self.flush()
        self.change(ZEROES, 2 * MiB, MiB, 0)
        self.change(TRIM, 3 * MiB, MiB, 0)
        self.write(3 * MiB, 4 * KiB)
        self.flush()
        self.read_all()
        self.snapshot('two')
        self.write(5 * MiB, 128 * KiB)
        for n in range(4):
            self.write(6 * MiB + n * 96 * KiB, 4 * KiB)
            self.flush()
        self.delete_snapshot('one')
        self.write(7 * MiB, 64 * KiB)
        self.change(TRIM, 5 * MiB, 128 * KiB, 0)
        self.flush()
        self.write(5 * MiB, 64 * KiB)
        self.read_all()

    def checkpoints(self):
        """Fills the ring, so that checkpoints are made meanwhile."""
        self.work()
        for n in range(400):
            self.write(8 * MiB + n * 20 * KiB, 4 * KiB)
            self.flush()

    def snapshot(self, name):
        """A name that a failed attempt has taken is as good."""
        def once():
            error = self.qsd.qmp('blockdev-snapshot-internal-sync',
                                 device='disk', name=name)
            return None if error and 'exists' in error else error

        return self.attempt('snapshot', once)

    def resize(self, size):
        """The export unshares it, and is gone a moment after its deletion."""
        deadline = time.monotonic() + TIMEOUT

        def once():
            while True:
                error = self.qsd.qmp('block_resize', node_name='disk',
                                     size=size)
                if not error or 'Permission conflict' not in error or \
                        time.monotonic() > deadline:
                    return error
                time.sleep(0.005)

        return self.attempt('block_resize', once)

    def close(self):
        self.nbd.close()
        self.nbd = None
        self.qmp('block-export-del', id='e', mode='hard')
        self.resize(DISK + 64 * MiB)
        deadline = time.monotonic() + TIMEOUT
        while self.qsd.qmp('blockdev-del', node_name='disk'):
            if time.monotonic() > deadline:
                raise Failure('the node is never released')
            time.sleep(0.005)
        with open(os.path.join(self.directory, 'stderr'),
                  encoding='utf-8') as f:
            self.closed = 'not closed properly' not in f.read()

    # --- afterwards ---

    def told(self):
        """Has anybody heard of an error?"""
        return bool(self.errors) or 'not closed properly' in self.stderr

    def _count(self):
        """How often the run came by each of thinvm's events."""
        counts = collections.Counter()
        if os.path.exists(self.trace):
            with open(self.trace, encoding='utf-8') as f:
                for line in f:
                    if 'thinvm_io_point' in line:
                        counts[line.split()[-1]] += 1
        return counts

    def judge(self, qemu_img):
        """The image, on a device that works."""
        done = subprocess.run([qemu_img, 'check', '-f', 'thinvm', self.image],
                              text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=TIMEOUT)
        if done.returncode or 'using the other superblock' in done.stdout:
            raise Failure(f'check: {done.stdout}')
        raw = os.path.join(self.directory, 'raw')
        done = subprocess.run([qemu_img, 'convert', '-f', 'thinvm', '-O',
                               'raw', self.image, raw],
                              text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=TIMEOUT)
        if done.returncode:
            raise Failure(f'convert: {done.stdout}')
        with open(raw, 'rb') as f:
            data = f.read(DISK)
        os.unlink(raw)
        self.model.compare(data, self.model.now if self.closed else
                           self.model.durable, 'afterwards')
