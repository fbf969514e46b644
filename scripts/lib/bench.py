#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Measures ways to store a disk beside each other: requests of many kinds with
# `qemu-img bench`; and, if asked for, what bench_moments.py,
# bench_checkpoint.py, bench_queues.py and bench_nbd.py say at their top.
#
# Times on a busy machine mean nothing by themselves.  So
#  - the formats take turns, in an order that is turned around each round, and
#    what counts is the median of the ratios within the rounds;
#  - a run lasts long enough to tell (the number of requests is found out once
#    for each workload and is the same for all formats);
#  - before each run what the last one wrote is on the device, and its own
#    image is new where the workload wants that;
#  - the table says how far raw's times were apart.  A ratio that differs from
#    1 by less than that says nothing.
# The processor's time, which the table compares too (cpu), depends less on
# what else the machine does, and instructions (--instructions) hardly.

import argparse
import json
import re
import resource
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import bench_checkpoint
import bench_depths
import bench_guest
import bench_huge
import bench_instructions
import bench_machine
import bench_memory
import bench_moments
import bench_nbd
import bench_queues
import bench_report
from bench_workloads import (MIB, USUAL, VARIANTS, WORKLOADS, Failure, Images,
                             bench_arguments, can_do, most_requests, run)

# What can be measured: see the modules bench_*.py
KINDS = ('requests', 'depths', 'huge', 'moments', 'checkpoint', 'queues',
         'nbd', 'memory', 'guest')


class Bench:
    """Runs of workloads, and what they said."""

    def __init__(self, args, directory):
        self.img = args.build / 'bin' / 'qemu-img'
        self.args = args
        self.images = Images(self.img, directory, args.size * MIB)

    def once(self, name, workload, count):
        """Seconds that one run takes, and those of processors in it."""
        path = self.images.prepare(name, workload)
        before = cpu_seconds()
        text = run(self.img, *bench_arguments(name, workload, path, self.args,
                                              count))
        cpu = cpu_seconds() - before
        self.images.clean_up(path, workload)
        found = re.search(r'Run completed in ([0-9.]+) seconds', text)
        if not found:
            raise Failure(f'qemu-img bench says no time: {text}')
        return max(float(found.group(1)), 0.001), max(cpu, 0.001)

    def find_count(self, name, workload):
        """Requests that make a run last as long as it is to last."""
        most = most_requests(workload, self.args)
        count = min(most, 200)
        while True:
            seconds, _ = self.once(name, workload, count)
            if count >= most or seconds >= self.args.seconds / 2:
                return count
            factor = min(self.args.seconds / seconds, 20)
            count = min(most, int(count * max(factor, 1.5)))

    def measure(self, label, workload):
        names = [n for n in self.args.formats
                 if can_do(VARIANTS[n], workload)]
        if 'thinvm' not in names:
            return None
        count = self.find_count(names[0], workload)
        seconds = {name: [] for name in names}
        cpu = {name: [] for name in names}
        for number in range(self.args.runs):
            for name in names if number % 2 else reversed(names):
                one, one_cpu = self.once(name, workload, count)
                seconds[name].append(one)
                cpu[name].append(one_cpu)
        return summary(label, workload, count, seconds, cpu)

    def count_instructions(self, label):
        workload = WORKLOADS[label]
        return {name: bench_instructions.per_request(self, name, workload)
                for name in self.args.formats
                if can_do(VARIANTS[name], workload)}


def cpu_seconds():
    """Of all programs that we have run, in user and kernel mode."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def compare(figures):
    """How many times as much each of the others needs as thinvm does."""
    result = {}
    for name in figures:
        if name != 'thinvm':
            ratios = [theirs / ours for theirs, ours in
                      zip(figures[name], figures['thinvm'])]
            result[name] = {'median': statistics.median(ratios),
                            'least': min(ratios), 'most': max(ratios)}
    return result


def summary(label, workload, count, seconds, cpu):
    median = {name: statistics.median(s) for name, s in seconds.items()}
    return {
        'name': label,
        'request_bytes': workload.size,
        'requests': count,
        'seconds': seconds,
        'requests_per_second': {n: count / m for n, m in median.items()},
        'spread': {n: (max(s) - min(s)) / median[n]
                   for n, s in seconds.items()},
        'cpu_us_per_request': {n: statistics.median(c) / count * 1e6
                               for n, c in cpu.items()},
        # how many times as fast as each of the others thinvm is
        'thinvm_against': compare(seconds),
        'thinvm_against_in_cpu': compare(cpu),
    }


def parse_args():
    checkout = Path(__file__).resolve().parents[2]
    p = argparse.ArgumentParser(
        prog='bench', description='Speed of thinvm beside raw and qcow2.')
    p.add_argument('--build', type=Path, default=checkout / 'build')
    p.add_argument('--dir', help='where the images go (default: $TMPDIR); '
                   '/dev/shm shows the cost of the driver without a device')
    p.add_argument('--formats', default=','.join(USUAL),
                   help=f'of {", ".join(VARIANTS)} (default: %(default)s)')
    p.add_argument('--runs', type=int, default=5,
                   help='of each workload and format (default: %(default)s)')
    p.add_argument('--seconds', type=float, default=1.0,
                   help='that a run is to last, about (default: 1)')
    p.add_argument('--size', type=int, default=1024, metavar='MIB',
                   help='of the disks, a power of two (default: 1024)')
    p.add_argument('--depth', type=int, default=32,
                   help='requests at a time, where the workload does not say '
                   'how many (default: 32)')
    p.add_argument('--cache', default='none',
                   help='as for qemu-img bench -t (default: none; writeback '
                   "goes through the host's page cache)")
    p.add_argument('--aio', default='native',
                   help='as for qemu-img bench -i: threads, native or '
                   'io_uring (default: native; threads without --cache none)')
    p.add_argument('--only', metavar='TEXT', action='append',
                   help='workloads with this in their name')
    p.add_argument('--what', default='requests', metavar='KINDS',
                   help=f'of {", ".join(KINDS)} (default: %(default)s)')
    p.add_argument('--seed', type=int, default=1,
                   help='of random places (default: 1)')
    p.add_argument('--all', action='store_true',
                   help='also the workloads that are left out by default')
    p.add_argument('--instructions', action='store_true',
                   help='count instructions with valgrind instead of time')
    p.add_argument('--limit', type=float, default=3600, metavar='SECONDS',
                   help='begin no workload after this time '
                   '(default: %(default)s)')
    p.add_argument('--json', type=Path, metavar='FILE',
                   help='write all numbers there')
    p.add_argument('--svg', type=Path, metavar='DIRECTORY',
                   help='draw requests and depths there')
    p.add_argument('--list', action='store_true', help='list the workloads')
    p.add_argument('--quick', action='store_true',
                   help='small and short, two minutes at most: shows that it '
                   'works, not more')
    return p, p.parse_args()


def check_args(p, args):
    if args.quick:
        args.runs, args.size = min(args.runs, 3), 64
        args.seconds = 0.05
        args.limit = min(args.limit, 100)
    args.what = args.what.split(',')
    if set(args.what) - set(KINDS):
        p.error(f'--what {",".join(args.what)}: there are {", ".join(KINDS)}')
    if ({'nbd', 'memory', 'huge'} & set(args.what) and
            not shutil.which('fio')):
        p.error('--what nbd, memory and huge need fio, which is missing')
    args.formats = args.formats.split(',')
    unknown = set(args.formats) - set(VARIANTS)
    if unknown:
        p.error(f'no such format: {", ".join(sorted(unknown))}; there are '
                f'{", ".join(VARIANTS)}')
    if 'thinvm' not in args.formats:
        p.error("--formats must name thinvm, which all others are compared "
                "with")
    if min(args.runs, args.size, args.depth) < 1 or args.seconds <= 0:
        p.error('numbers must be at least 1')
    if args.size & (args.size - 1):
        p.error(f'--size {args.size}: must be a power of two')
    if not (args.build / 'bin' / 'qemu-img').exists():
        p.error(f'no qemu-img in {args.build}/bin: build first, or give '
                '--build')
    if args.aio == 'native' and args.cache not in ('none', 'directsync'):
        args.aio = 'threads'
    if args.svg and not args.svg.is_dir():
        p.error(f'--svg {args.svg}: there is no such directory')
    if args.instructions and not shutil.which('valgrind'):
        p.error('--instructions needs valgrind, which is not installed')
    args.names = [n for n, w in WORKLOADS.items()
                  if (any(text in n for text in args.only) if args.only
                      else w.usual or args.all)]
    if not args.names:
        p.error('no workload has that in its name; --list lists them')


def others(args, directory):
    """What --what asks for beside requests."""
    directory = Path(directory)
    images = Images(args.build / 'bin' / 'qemu-img', directory,
                    args.size * MIB)
    ways = {
        'depths': lambda: bench_depths.measure(args, Bench(args, directory)),
        'huge': lambda: bench_huge.measure(args, directory),
        'moments': lambda: bench_moments.measure(args, directory),
        'checkpoint': lambda: bench_checkpoint.measure(args, directory),
        'queues': lambda: bench_queues.measure(args, images),
        'nbd': lambda: bench_nbd.measure(args, images, directory),
        'memory': lambda: bench_memory.measure(args, directory),
        'guest': lambda: bench_guest.measure(args),
    }
    return {what: ways[what]() for what in args.what if what in ways}


def work(args, directory):
    """All workloads; returns results and what there was no time for."""
    if 'requests' not in args.what:
        return [], []
    bench = Bench(args, directory)
    end = time.monotonic() + args.limit
    results, left = [], []
    print(bench_report.heading(args))
    for label in args.names:
        if time.monotonic() > end:
            left.append(label)
            continue
        if args.instructions:
            result = {'name': label,
                      'instructions': bench.count_instructions(label)}
            print(bench_report.instructions_line(args, result), flush=True)
        else:
            result = bench.measure(label, WORKLOADS[label])
            if not result:
                continue
            print(bench_report.line(args, result), flush=True)
        results.append(result)
    return results, left


def main():
    p, args = parse_args()
    if args.list:
        print('\n'.join(WORKLOADS))
        return
    check_args(p, args)
    directory = tempfile.mkdtemp(prefix='thinvm-bench-', dir=args.dir)
    try:
        results, left = work(args, directory)
        more = others(args, directory)
    except (Failure, bench_machine.Failure, bench_guest.Failure,
            OSError) as e:
        sys.exit(f'bench: {e}')
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    for label in left:
        print(f'no time left for: {label}')
    if args.json:
        args.json.write_text(json.dumps({
            'runs': args.runs, 'disk_mib': args.size, 'depth': args.depth,
            'seconds': args.seconds, 'cache': args.cache, 'aio': args.aio,
            'workloads': results, 'no_time_for': left, **more}, indent=2) + '\n',
            encoding='utf-8')
    if args.svg and results:
        (args.svg / 'speed-requests.svg').write_text(
            bench_report.svg(args, results), encoding='utf-8')
    if args.svg and more.get('depths'):
        (args.svg / 'speed-depths.svg').write_text(
            bench_depths.svg(args, more['depths']), encoding='utf-8')


if __name__ == '__main__':
    main()
