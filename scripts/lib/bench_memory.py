# SPDX-License-Identifier: GPL-2.0-or-later
#
# Memory of qemu-storage-daemon with one disk that is fully mapped, once with
# runs (as preallocated) and once with a block written in each 32 MiB, so that
# thinvm has a leaf for each of them: resident MiB when it is opened and when
# all of its mapping was read, less those of the daemon without a disk.  The
# caches are of default size, which for thinvm holds all of the mapping, and
# for qcow2 32 MiB of it; `qcow2, all` is told to hold all.

import statistics

from bench_moments import Daemon
from bench_workloads import GIB, MIB, TIB, VARIANTS, run

APART = 32 * MIB
SIZES = {'100 GiB': 100 * GIB, '1 TiB': TIB}
WAYS = {'raw': ('raw', {}), 'qcow2': ('qcow2', {}),
        'qcow2, all': ('qcow2', {'l2_cache_size': TIB // 8192}),
        'thinvm': ('thinvm', {})}


def resident(daemon):
    """Bytes of memory of our own; what is mapped from files is not."""
    with open(f'/proc/{daemon.process.pid}/status', encoding='ascii') as f:
        for line in f:
            if line.startswith('RssAnon:'):
                return int(line.split()[1]) * 1024
    raise OSError('the kernel does not tell the resident memory')


def touch_all(daemon, kind, size):
    """A request of 4 KiB in each 32 MiB."""
    daemon.export().close()
    run('fio', '--name=touch', '--ioengine=nbd',
        f'--uri=nbd+unix:///d?socket={daemon.nbd}',
        f'--rw={kind}:{APART - 4096}', '--bs=4k', '--iodepth=16',
        f'--size={size}', f'--io_size={size // APART * 4096}',
        '--output-format=terse')
    daemon.unexport()


def make(args, directory, name, size, split):
    path = directory / 'memory'
    path.unlink(missing_ok=True)
    fmt, _ = WAYS[name]
    more = () if fmt == 'raw' else ('-o', 'preallocation=metadata')
    run(args.build / 'bin' / 'qemu-img', 'create', '-q', '-f', fmt, *more,
        path, size)
    if split:
        daemon = Daemon(args.build, directory)
        try:
            daemon.open(path, VARIANTS[fmt])
            touch_all(daemon, 'write', size)
            daemon.close()
        finally:
            daemon.quit()
    return path


def once(args, directory, name, path, size):
    fmt, options = WAYS[name]
    daemon = Daemon(args.build, directory)
    try:
        before = resident(daemon)
        daemon.open(path, VARIANTS[fmt], **options)
        opened = resident(daemon) - before
        touch_all(daemon, 'read', size)
        return {'opened': opened, 'read': resident(daemon) - before}
    finally:
        daemon.quit()


def measure(args, directory):
    """Prints a table, returns what --json is to keep."""
    results = []
    print(f'{"resident MiB":30}' + ''.join(f'{n:>12}' for n in WAYS))
    for label, size in SIZES.items():
        for split in (False, True):
            if args.quick and (split or size > 100 * GIB):
                continue
            figures = {}
            for name in WAYS:
                path = make(args, directory, name, size, split)
                figures[name] = [once(args, directory, name, path, size)
                                 for _ in range(min(args.runs, 3))]
                path.unlink()
            what = f'{label}, {"leaves" if split else "runs"}'
            results.append({'disk': what, 'bytes': figures})
            for moment in ('opened', 'read'):
                print(f'{what + ", " + moment:30}' + ''.join(
                    f'{statistics.median(r[moment] for r in runs) / MIB:12.1f}'
                    for runs in figures.values()), flush=True)
    return results
