# SPDX-License-Identifier: GPL-2.0-or-later
#
# QEMU that serves a disk over NBD, and a client that notes how long each of
# its writes takes: for benchmarks that look at single requests, and at what a
# running disk is told to do meanwhile.  A benchmark says Failure when what it
# relies on does not work.

import contextlib
import json
import random
import socket
import struct
import subprocess
import threading
import time

BLOCK = 4096


class Failure(Exception):
    """Something that the measurement relies on did not work."""


def run(*args):
    done = subprocess.run([str(a) for a in args], text=True, check=False,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise Failure(f'{" ".join(map(str, args))}: {done.stdout}')
    return done.stdout


def connect(path, seconds=20):
    deadline = time.monotonic() + seconds
    while True:
        s = socket.socket(socket.AF_UNIX)
        try:
            s.connect(str(path))
            return s
        except OSError:
            s.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


class Monitor:
    """QMP, a command at a time; events are dropped."""

    def __init__(self, path):
        self.socket = connect(path)
        self.file = self.socket.makefile('rwb')
        self.file.readline()
        self('qmp_capabilities')

    def __call__(self, command, **arguments):
        message = {'execute': command,
                   'arguments': {k.replace('_', '-'): v
                                 for k, v in arguments.items()}}
        self.file.write(json.dumps(message).encode() + b'\n')
        self.file.flush()
        while True:
            line = self.file.readline()
            if not line:
                raise Failure('QEMU closed its monitor')
            reply = json.loads(line)
            if 'error' in reply:
                raise Failure(f'{command}: {reply["error"]["desc"]}')
            if 'return' in reply:
                return reply['return']

    def close(self):
        self.file.close()
        self.socket.close()


class NbdClient:
    """Just enough NBD to write; newstyle, simple replies."""

    def __init__(self, path, export):
        self.socket = connect(path)
        self.read(18)
        self.socket.sendall(struct.pack('>I', 3))       # fixed, no zeroes
        name = export.encode()
        self.socket.sendall(struct.pack('>QII', 0x49484156454f5054, 1,
                                        len(name)) + name)
        self.size, self.flags = struct.unpack('>QH', self.read(10))

    def read(self, count):
        data = b''
        while len(data) < count:
            part = self.socket.recv(count - len(data))
            if not part:
                raise Failure('the NBD server hung up')
            data += part
        return data

    def write(self, offset, data):
        self.socket.sendall(struct.pack('>IHHQQI', 0x25609513, 0, 1, 7,
                                        offset, len(data)) + data)
        magic, error, handle = struct.unpack('>IIQ', self.read(16))
        if magic != 0x67446698 or error or handle != 7:
            raise Failure(f'a write at {offset} failed: error {error}')

    def close(self):
        with contextlib.suppress(OSError):
            self.socket.sendall(struct.pack('>IHHQQI', 0x25609513, 0, 2, 8, 0,
                                            0))
        self.socket.close()


class Writer(threading.Thread):
    """
    Writes until it is told to stop; writes[] is (begin, seconds), by
    time.perf_counter().
    """

    def __init__(self, client, seed):
        super().__init__(daemon=True)
        self.client = client
        self.random = random.Random(seed)
        self.writes = []
        self.failure = None
        self.stopping = False

    def run(self):
        blocks = self.client.size // BLOCK
        try:
            while not self.stopping:
                data = self.random.randbytes(BLOCK)
                offset = self.random.randrange(blocks) * BLOCK
                begin = time.perf_counter()
                self.client.write(offset, data)
                self.writes.append((begin, time.perf_counter() - begin))
        except (Failure, OSError) as e:
            self.failure = e

    def stop(self):
        self.stopping = True
        self.join(120)
        if self.is_alive() or self.failure:
            raise Failure(f'the client: {self.failure or "hangs"}')

    def between(self, begin, end):
        """Seconds of the writes that were under way in this time."""
        return [s for b, s in self.writes if b < end and b + s > begin]


class Machine:
    """qemu-system without a guest, and a client that writes to its disk."""

    def __init__(self, args, image, fmt, directory, extra=(), log=None):
        self.args = args
        self.fmt = fmt
        node = {'driver': fmt, 'node-name': 'disk',
                'file': {'driver': 'file', 'filename': str(image),
                         'node-name': 'file', 'cache': {'direct': True}}}
        qmp, nbd = directory / 'qmp', directory / 'nbd'
        self.process = subprocess.Popen(
            [args.build / 'bin' / 'qemu-system-x86_64', '-machine', 'none',
             '-nodefaults', '-display', 'none', '-S',
             '-qmp', f'unix:{qmp},server=on,wait=off',
             '-blockdev', json.dumps(node), *extra],
            stdin=subprocess.DEVNULL, stderr=log)
        try:
            self.qmp = Monitor(qmp)
            self.qmp('nbd-server-start',
                     addr={'type': 'unix', 'data': {'path': str(nbd)}})
            self.qmp('block-export-add', id='e', type='nbd',
                     node_name='disk', name='d', writable=True)
            self.writer = Writer(NbdClient(nbd, 'd'), args.seed)
        except BaseException:
            self.process.kill()
            raise

    def quit(self):
        self.qmp('quit')
        self.qmp.close()
        if self.process.wait(120):
            raise Failure(f'QEMU ended with {self.process.returncode}')

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def written(self):
        """Bytes written to the device; there is no page cache between."""
        with open(f'/proc/{self.process.pid}/io', encoding='ascii') as f:
            for line in f:
                if line.startswith('write_bytes:'):
                    return int(line.split()[1])
        raise Failure('the kernel counts no written bytes')
