# SPDX-License-Identifier: GPL-2.0-or-later
#
# How requests of several threads on one disk scale.  Each thread is what an
# iothread with a queue of its own is (tests/unit/bench-thinvm-queues.c); the
# image is best on a memory-backed file system (--dir /dev/shm), where it is
# the driver that limits.  A format can scale no better than raw does on this
# machine, so that is what it is compared with.

import json
import os
import statistics

from bench_machine import Failure
from bench_workloads import VARIANTS, Workload, run

PROGRAM = 'qemu/tests/unit/thinvm/bench-thinvm-queues'
FULL = Workload(4096, 0, True, 'full')


def rate(args, images, name, threads, kind):
    variant = VARIANTS[name]
    node = {'driver': variant.fmt,
            'file': {'driver': 'file', 'aio': args.aio,
                     'filename': str(images.prepare(name, FULL)),
                     'cache': {'direct': args.cache == 'none'}}}
    if variant.options:
        node |= dict(o.split('=', 1) for o in variant.options.split(','))
    text = run(args.build / PROGRAM, 'json:' + json.dumps(node), threads,
               args.depth, max(1, round(args.seconds)), kind)
    return float(text)


def scaling(rates):
    """How many times as fast as one thread, run by run."""
    return {n: {t: statistics.median(many / one for many, one in
                                     zip(by_threads[t], by_threads[1]))
                for t in by_threads}
            for n, by_threads in rates.items()}


def measure(args, images):
    """Prints a table, returns what --json is to keep."""
    if not (args.build / PROGRAM).exists():
        raise Failure(f'no {PROGRAM} in {args.build}: build first')
    counts = [1, 2]
    while counts[-1] * 2 <= (os.cpu_count() or 1):
        counts.append(counts[-1] * 2)
    results = []
    for kind in ('read', 'write'):
        rates = {n: {t: [] for t in counts} for n in args.formats}
        for number in range(args.runs):
            for name in args.formats if number % 2 else args.formats[::-1]:
                for threads in counts:
                    rates[name][threads].append(
                        rate(args, images, name, threads, kind))
        times = scaling(rates)
        results.append({'what': kind, 'rates': rates, 'scaling': times})
        print(f'{kind + " 4 KiB, scattered":30}' +
              ''.join(f'{n:>12}' for n in args.formats))
        for t in counts:
            print(f'  {t} threads, requests/s'.ljust(30) +
                  ''.join(f'{statistics.median(rates[n][t]):12.0f}'
                          for n in args.formats))
        for t in counts[1:]:
            print(f'  {t} threads against 1'.ljust(30) +
                  ''.join(f'{times[n][t]:12.2f}' for n in args.formats),
                  flush=True)
    return results
