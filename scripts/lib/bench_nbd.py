# SPDX-License-Identifier: GPL-2.0-or-later
#
# A disk behind an NBD export of qemu-storage-daemon, with fio as its client.

import json
import statistics

from bench_moments import Daemon
from bench_workloads import MIB, VARIANTS, Workload, run

FULL = Workload(4096, 0, True, 'full')
JOBS = (('randread', 1), ('randread', 32), ('randwrite', 1),
        ('randwrite', 32))


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
                   '--randrepeat=1', '--norandommap',
                   '--random_generator=lfsr',
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
    results = []
    print(f'{"requests per second over NBD":34}' +
          ''.join(f'{n:>12}' for n in names) +
          ''.join(f'{"/" + n:>11}' for n in names if n != 'thinvm') +
          f'{"spread":>8}')
    for kind, depth in JOBS:
        rates = {n: [] for n in names}
        slow = {n: [] for n in names}
        for number in range(args.runs):
            for name in names if number % 2 else reversed(names):
                rate, last = once(args, directory, name,
                                  images.prepare(name, FULL),
                                  args.size * MIB, kind, depth)
                rates[name].append(rate)
                slow[name].append(last)
        ratios = {n: statistics.median(t / o for t, o in
                                       zip(rates['thinvm'], rates[n]))
                  for n in names if n != 'thinvm'}
        first = rates[names[0]]
        spread = (max(first) - min(first)) / statistics.median(first)
        what = f'{kind}, depth {depth}'
        results.append({'what': what, 'rates': rates, 'p99': slow})
        print(f'{what:34}' +
              ''.join(f'{statistics.median(rates[n]):12.0f}'
                      for n in names) +
              ''.join(f'{r:11.2f}' for r in ratios.values()) +
              f'{spread:8.0%}', flush=True)
    return results
