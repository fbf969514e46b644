# SPDX-License-Identifier: GPL-2.0-or-later
#
# A disk behind an NBD export of qemu-storage-daemon, with fio as its client;
# also a disk of 1 TiB that is fully mapped (preallocation=metadata; the raw
# one is sparse, as what lies below the others' clusters is), whose metadata
# of the default cache size must do; and one of 1 TiB that has a block written
# in each 32 MiB as well, the most metadata that so little data can have.

import json
import statistics

from bench_memory import touch_all
from bench_moments import Daemon
from bench_workloads import MIB, TIB, VARIANTS, Workload, run

FULL = Workload(4096, 0, True, 'full')
JOBS = (('randread', 1), ('randread', 32), ('randwrite', 1),
        ('randwrite', 32))


def huge(args, directory, name, split):
    """1 TiB, made once; @split: with a block written in each 32 MiB."""
    variant = VARIANTS[name]
    path = directory / f'{"split" if split else "huge"}.{name}'
    if not path.exists():
        more = () if variant.fmt == 'raw' else ('-o', 'preallocation=metadata')
        run(args.build / 'bin' / 'qemu-img', 'create', '-q', '-f',
            variant.fmt, *variant.create, *more, path, TIB)
        if split:
            daemon = Daemon(args.build, directory)
            try:
                daemon.open(path, variant)
                touch_all(daemon, 'write', TIB)
                daemon.close()
            finally:
                daemon.quit()
    return path


def once(args, directory, name, path, size, kind, depth):
    """Requests per second, and the 99th percentile in seconds."""
    daemon = Daemon(args.build, directory)
    try:
        daemon.open(path, VARIANTS[name])
        daemon.export().close()
        text = run('fio', '--name=bench', '--ioengine=nbd',
                   f'--uri=nbd+unix:///d?socket={daemon.nbd}',
                   f'--rw={kind}', '--bs=4k', f'--iodepth={depth}',
                   f'--size={size}', '--time_based',
                   f'--runtime={max(1, round(args.seconds))}',
                   '--randrepeat=1', '--norandommap', '--random_generator=lfsr'
                   if size <= 1 << 32 else '--random_generator=tausworthe64',
                   '--output-format=json')
    finally:
        daemon.quit()
    job = json.loads(text[text.index('{'):])['jobs'][0]
    figures = job['read' if kind == 'randread' else 'write']
    return (figures['iops'],
            figures['clat_ns']['percentile']['99.000000'] / 1e9)


def measure(args, images, directory):
    """Prints a table, returns what --json is to keep."""
    names = [n for n in args.formats if not VARIANTS[n].options]
    disks = {f'{args.size} MiB': args.size * MIB, '1 TiB': TIB}
    if not args.quick:
        disks['1 TiB, leaves'] = TIB
    results = []
    print(f'{"requests per second over NBD":34}' +
          ''.join(f'{n:>12}' for n in names) +
          ''.join(f'{"/" + n:>11}' for n in names if n != 'thinvm') +
          f'{"spread":>8}')
    for label, size in disks.items():
        for kind, depth in JOBS:
            rates = {n: [] for n in names}
            slow = {n: [] for n in names}
            for number in range(args.runs):
                for name in names if number % 2 else reversed(names):
                    path = (huge(args, directory, name, 'leaves' in label)
                            if size == TIB else images.prepare(name, FULL))
                    rate, last = once(args, directory, name, path, size, kind,
                                      depth)
                    rates[name].append(rate)
                    slow[name].append(last)
            ratios = {n: statistics.median(t / o for t, o in
                                           zip(rates['thinvm'], rates[n]))
                      for n in names if n != 'thinvm'}
            first = rates[names[0]]
            spread = (max(first) - min(first)) / statistics.median(first)
            what = f'{label}, {kind}, depth {depth}'
            results.append({'what': what, 'rates': rates, 'p99': slow})
            print(f'{what:34}' +
                  ''.join(f'{statistics.median(rates[n]):12.0f}'
                          for n in names) +
                  ''.join(f'{r:11.2f}' for r in ratios.values()) +
                  f'{spread:8.0%}', flush=True)
    return results
