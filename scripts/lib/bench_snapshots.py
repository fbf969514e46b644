#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Measures what an internal snapshot costs a running disk, thinvm beside
# qcow2.  The disk is fully mapped (preallocation=metadata) and served by
# qemu-system over NBD; a client writes 4 KiB at random places, one request
# at a time, before, while and after a snapshot is created and deleted, and
# notes how long each write takes.  Then, with nothing running, a snapshot is
# gone back to with qemu-img.
#
# What counts is the median over the runs; formats take turns, since times
# differ with what else the machine does.  The client's longest write while
# nothing happens says what a stall is to be compared with.

import argparse
import contextlib
import json
import random
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent.parent
BLOCK = 4096
UNITS = {'M': 1 << 20, 'G': 1 << 30, 'T': 1 << 40}


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
    """Writes until it is told to stop; writes[] is (begin, seconds)."""

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

    def __init__(self, args, image, fmt, directory):
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
             '-blockdev', json.dumps(node)], stdin=subprocess.DEVNULL)
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

    def create(self):
        self.qmp('blockdev-snapshot-internal-sync', device='disk', name='s')

    def delete(self):
        """Until its space is free."""
        if self.fmt != 'thinvm':
            self.qmp('blockdev-snapshot-delete-internal-sync', device='disk',
                     name='s')
            return
        self.qmp('thinvm-snapshot-delete', job_id='j', node_name='disk',
                 name='s', auto_dismiss=False)
        while True:
            job, = self.qmp('query-jobs')
            if job['status'] == 'concluded':
                break
            time.sleep(0.005)
        if 'error' in job:
            raise Failure(job['error'])
        self.qmp('job-dismiss', id='j')


def timed(function, *args):
    begin = time.perf_counter()
    function(*args)
    return begin, time.perf_counter()


def stalls(result, writer, spans):
    """What operations took, and the longest write through each."""
    for name, (begin, end) in spans.items():
        result[name] = end - begin
        result[f'{name} stall'] = max(writer.between(begin, end), default=0)


def rate(result, name, writer, machine, seconds):
    """Let the client write; rate, median, and bytes for each byte."""
    bytes_before, count = machine.written(), len(writer.writes)
    begin = time.perf_counter()
    time.sleep(seconds)
    end = time.perf_counter()
    count = len(writer.writes) - count
    times = writer.between(begin, end)
    result[f'{name} writes/s'] = count / (end - begin)
    result[f'{name} median'] = statistics.median(times)
    result[f'{name} longest'] = max(times)
    result[f'{name} bytes'] = ((machine.written() - bytes_before) /
                               (count * BLOCK))


def measure(args, fmt, size, directory):
    img = args.build / 'bin' / 'qemu-img'
    image = directory / f'disk.{fmt}'
    run(img, 'create', '-q', '-f', fmt, '-o', 'preallocation=metadata', image,
        size)
    result = {}
    machine = Machine(args, image, fmt, directory)
    try:
        writer = machine.writer
        writer.start()
        time.sleep(0.5)
        rate(result, 'before', writer, machine, args.seconds)
        spans = {'create': timed(machine.create)}
        rate(result, 'after', writer, machine, args.seconds)
        spans['delete'] = timed(machine.delete)
        rate(result, 'deleted', writer, machine, args.seconds)
        writer.stop()
        stalls(result, writer, spans)
        writer.client.close()
        machine.quit()
    finally:
        machine.kill()
    run(img, 'snapshot', '-c', 't', image)
    begin, end = timed(run, img, 'snapshot', '-a', 't', image)
    result['revert'] = end - begin
    if args.check:
        run(img, 'check', '-f', fmt, image)
    return result


ROWS = (
    ('create', 's'), ('create stall', 'ms'), ('delete', 's'),
    ('delete stall', 'ms'), ('revert', 's'),
    ('before longest', 'ms'), ('before writes/s', ''), ('before median', 'ms'),
    ('after writes/s', ''), ('after median', 'ms'), ('after longest', 'ms'),
    ('before bytes', ''), ('after bytes', ''),
)


def show(value, unit):
    if unit == 's':
        return f'{value:.3f} s'
    return f'{value * 1000:.2f} ms' if unit == 'ms' else f'{value:.1f}'


def report(results, formats):
    """results[size][format]: the runs."""
    for size, by_format in results.items():
        print(f'\n{size}, fully mapped, median of '
              f'{len(by_format[formats[0]])} (least to most)')
        for row, unit in ROWS:
            cells = []
            for fmt in formats:
                values = [r[row] for r in by_format[fmt]]
                cells.append(f'{fmt} {show(statistics.median(values), unit)} '
                             f'({show(min(values), unit)} to '
                             f'{show(max(values), unit)})')
            print(f'  {row:16} ' + '; '.join(cells))


def parse_args():
    p = argparse.ArgumentParser(
        description='Snapshots of a running disk, thinvm beside qcow2.')
    p.add_argument('--build', type=Path, default=CHECKOUT / 'build')
    p.add_argument('--dir', type=Path, default=None,
                   help='where the images are made (default: a temporary one)')
    p.add_argument('--sizes', default='1G,100G,1T')
    p.add_argument('--formats', default='thinvm,qcow2')
    p.add_argument('--runs', type=int, default=5)
    p.add_argument('--seconds', type=float, default=2.0,
                   help='that the client writes between the operations')
    p.add_argument('--seed', type=int, default=1)
    p.add_argument('--check', action='store_true',
                   help='qemu-img check at the end of each run')
    p.add_argument('--json', type=Path, help='all figures to this file')
    args = p.parse_args()
    args.sizes, args.formats = args.sizes.split(','), args.formats.split(',')
    for size in args.sizes:
        if size[-1:] not in UNITS or not size[:-1].isdigit():
            p.error(f'size {size!r}: a number with M, G or T')
    if args.runs < 1 or args.seconds <= 0:
        p.error('--runs and --seconds must be positive')
    args.build = args.build.resolve()
    return args


def main():
    args = parse_args()
    results = {size: {f: [] for f in args.formats} for size in args.sizes}
    for number in range(args.runs):
        for size in args.sizes:
            for fmt in args.formats if number % 2 else args.formats[::-1]:
                directory = Path(tempfile.mkdtemp(prefix='snapshots-',
                                                  dir=args.dir))
                try:
                    results[size][fmt].append(
                        measure(args, fmt, size, directory))
                finally:
                    shutil.rmtree(directory, ignore_errors=True)
    report(results, args.formats)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1), encoding='utf-8')
    return 0


if __name__ == '__main__':
    try:
        sys.exit(main())
    except Failure as e:
        sys.exit(f'bench-snapshots: {e}')
