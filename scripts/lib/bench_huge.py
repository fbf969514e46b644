# SPDX-License-Identifier: GPL-2.0-or-later
#
# A disk of 1 TiB that is fully mapped (preallocation=metadata) and has a block
# written in each 32 MiB: requests go to these, one after the other, and the
# next lies in another page of the mapping with either format.  `first` is
# one round over all of them with caches that are empty, `again` are later
# rounds; caches are of default size.

import statistics

from bench_memory import APART, touch_all
from bench_moments import Daemon
from bench_workloads import TIB, VARIANTS, run, settle

BLOCKS = TIB // APART
ROUNDS = 2
QUICK = 1 << 32                 # bytes of the disk


def make(args, directory, name, size):
    variant = VARIANTS[name]
    path = directory / f'huge.{name}'
    more = () if variant.fmt == 'raw' else ('-o', 'preallocation=metadata')
    run(args.build / 'bin' / 'qemu-img', 'create', '-q', '-f', variant.fmt,
        *variant.create, *more, path, size)
    daemon = Daemon(args.build, directory)
    try:
        daemon.open(path, variant)
        touch_all(daemon, 'write', size)
        daemon.close()
    finally:
        daemon.quit()
    settle(path)
    return path


def seconds(args, name, path, write, depth, rounds, blocks):
    text = run(args.build / 'bin' / 'qemu-img', 'bench',
               '-f', VARIANTS[name].fmt, '-t', args.cache, '-i', args.aio,
               '-s', 4096, '-S', APART, '-d', depth, '-c', rounds * blocks,
               *(['-w'] if write else []), path)
    settle(path)
    return float(text.split('completed in ')[1].split()[0])


def once(args, name, path, write, depth, blocks):
    """Requests per second of the first round, and of the others."""
    first = max(seconds(args, name, path, write, depth, 1, blocks), 1e-3)
    more = seconds(args, name, path, write, depth, ROUNDS, blocks) - first
    return {'first': blocks / first,
            'again': (ROUNDS - 1) * blocks / max(more, 1e-3)}


def report(names, what, runs):
    """Prints the lines of one kind of request, and returns its results."""
    results = []
    for moment in ('first', 'again'):
        rates = {n: [r[moment] for r in runs[n]] for n in names}
        against = {n: statistics.median(t / o for t, o in
                                        zip(rates['thinvm'], rates[n]))
                   for n in names if n != 'thinvm'}
        base = rates[names[0]]
        spread = (max(base) - min(base)) / statistics.median(base)
        print(f'{what + ", " + moment:34}' +
              ''.join(f'{statistics.median(rates[n]):12.0f}' for n in names) +
              ''.join(f'{r:11.2f}' for r in against.values()) +
              f'{spread:8.0%}', flush=True)
        results.append({'what': what, 'moment': moment, 'rates': rates,
                        'thinvm_against': against})
    return results


def measure(args, directory):
    """Prints a table, returns what --json is to keep."""
    names = [n for n in args.formats if not VARIANTS[n].options]
    size = QUICK if args.quick else TIB
    paths = {n: make(args, directory, n, size) for n in names}
    results = []
    print(f'{"requests per second, 1 TiB":34}' +
          ''.join(f'{n:>12}' for n in names) +
          ''.join(f'{"/" + n:>11}' for n in names if n != 'thinvm') +
          f'{"spread":>8}')
    for write in (False, True):
        for depth in (1, 32):
            runs = {n: [] for n in names}
            for number in range(args.runs):
                for name in names if number % 2 else reversed(names):
                    runs[name].append(once(args, name, paths[name], write,
                                           depth, size // APART))
            what = f'{"overwrite" if write else "read"} 4 KiB, depth {depth}'
            results += report(names, what, runs)
    for path in paths.values():
        path.unlink()
    return results
