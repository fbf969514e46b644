# SPDX-License-Identifier: GPL-2.0-or-later
#
# Things that are done to a disk once, by the size of the disk: create it, open
# it, close it, the first write after opening, discard all of it.  The disk is
# fully mapped (preallocation=metadata; a raw one is sparse), in a file, served
# by qemu-storage-daemon.  Times of programs contain the start of the program,
# which the line `program` tells.

import statistics
import subprocess
import time

from bench_machine import Monitor, NbdClient
from bench_workloads import GIB, TIB, VARIANTS, run, settle

SIZES = {'1 GiB': GIB, '100 GiB': 100 * GIB, '1 TiB': TIB}
MOMENTS = ('program', 'create', 'create mapped', 'open', 'first write',
           'close', 'discard')


class Daemon:
    """A qemu-storage-daemon without a disk."""

    def __init__(self, build, directory):
        qmp, self.nbd = directory / 'qmp', directory / 'nbd'
        for path in (qmp, self.nbd):
            path.unlink(missing_ok=True)
        self.process = subprocess.Popen(
            [build / 'bin' / 'qemu-storage-daemon',
             '--chardev', f'socket,id=q,path={qmp},server=on,wait=off',
             '--monitor', 'chardev=q',
             '--nbd-server', f'addr.type=unix,addr.path={self.nbd}'],
            stdin=subprocess.DEVNULL)
        try:
            self.qmp = Monitor(qmp)
        except BaseException:
            self.process.kill()
            raise

    def open(self, path, variant, **options):
        node = {'driver': variant.fmt, 'node_name': 'disk',
                'discard': 'unmap', **options,
                'file': {'driver': 'file', 'filename': str(path),
                         'cache': {'direct': True}}}
        self.qmp('blockdev-add', **node)

    def export(self):
        self.qmp('block-export-add', id='e', type='nbd', node_name='disk',
                 name='d', writable=True)
        return NbdClient(self.nbd, 'd')

    def close(self):
        self.qmp('blockdev-del', node_name='disk')

    def unexport(self):
        self.qmp('block-export-del', id='e')
        while self.qmp('query-block-exports'):
            time.sleep(0.001)

    def quit(self):
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()


def seconds(function, *args):
    begin = time.perf_counter()
    function(*args)
    return time.perf_counter() - begin


def opened(build, directory, path, variant):
    """Times of opening, of the first write, and of closing."""
    daemon = Daemon(build, directory)
    result = {}
    try:
        result['open'] = seconds(daemon.open, path, variant)
        client = daemon.export()
        result['first write'] = seconds(client.write, client.size // 3 & -4096,
                                        b'x' * 4096)
        client.close()
        daemon.unexport()
        result['close'] = seconds(daemon.close)
    finally:
        daemon.quit()
    return result


def once(build, directory, name, size):
    variant = VARIANTS[name]
    path = directory / 'moments'
    img, io = build / 'bin' / 'qemu-img', build / 'bin' / 'qemu-io'

    def create(*more):
        path.unlink(missing_ok=True)
        run(img, 'create', '-q', '-f', variant.fmt, *variant.create, *more,
            path, size)

    mapped = () if variant.fmt == 'raw' else ('-o', 'preallocation=metadata')
    result = {'program': seconds(run, img, '--version'),
              'create': seconds(create),
              'create mapped': seconds(create, *mapped)}
    settle(path)
    result |= opened(build, directory, path, variant)
    words = [w for start in range(0, size, GIB)
             for w in ('-c', f'discard -q {start} {min(GIB, size - start)}')]
    result['discard'] = seconds(run, io, '-f', variant.fmt, '-n', '-d',
                                'unmap', *words, path)
    path.unlink()
    return result


def measure(args, directory):
    """All sizes; prints a table, returns what --json is to keep."""
    names = [n for n in args.formats if not VARIANTS[n].options]
    results = []
    print(f'{"milliseconds, median of " + str(args.runs):30}' +
          ''.join(f'{n:>12}' for n in names))
    for label, size in SIZES.items():
        if args.quick and size > GIB:
            break
        runs = {n: [] for n in names}
        for number in range(args.runs):
            for name in names if number % 2 else reversed(names):
                runs[name].append(once(args.build, directory, name, size))
        for moment in MOMENTS:
            times = {n: [r[moment] for r in runs[n]] for n in names}
            results.append({'disk': label, 'what': moment, 'seconds': times})
            print(f'{label + ", " + moment:30}' +
                  ''.join(f'{statistics.median(times[n]) * 1000:12.1f}'
                          for n in names), flush=True)
    return results
