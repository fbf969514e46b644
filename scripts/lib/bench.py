#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Measures raw, qcow2 and thinvm beside each other with `qemu-img bench`.
#
# Times on a busy machine mean nothing by themselves, so the formats take
# turns in one run, each workload several times, and what counts are the
# ratios of the medians.  Each run of a workload that writes starts from an
# image of its own.  Says how far the single times were apart.

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

FORMATS = ('raw', 'qcow2', 'thinvm')
KIB, MIB = 1024, 1024 * 1024

# name: (bytes of a request, distance of starts, image is written before,
#        further arguments)
WORKLOADS = {
    'write new 4 KiB, sequential': (4 * KIB, 4 * KIB, False, ['-w']),
    'write new 4 KiB, 1 MiB apart': (4 * KIB, MIB, False, ['-w']),
    'write new 64 KiB, sequential': (64 * KIB, 64 * KIB, False, ['-w']),
    'write new 1 MiB, sequential': (MIB, MIB, False, ['-w']),
    'overwrite 4 KiB, sequential': (4 * KIB, 4 * KIB, True, ['-w']),
    'overwrite 4 KiB, 68 KiB apart': (4 * KIB, 68 * KIB, True, ['-w']),
    'read 4 KiB, sequential': (4 * KIB, 4 * KIB, True, []),
    'read 4 KiB, 68 KiB apart': (4 * KIB, 68 * KIB, True, []),
    'read 1 MiB, sequential': (MIB, MIB, True, []),
}


class Failure(Exception):
    """A program did not do what it was to do."""


def run(*args):
    done = subprocess.run([str(a) for a in args], text=True, check=False,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise Failure(f'{" ".join(str(a) for a in args)}: exit status '
                      f'{done.returncode}: {done.stdout.strip()}')
    return done.stdout


class Bench:
    def __init__(self, args, directory):
        self.img = args.build / 'bin' / 'qemu-img'
        self.args, self.dir = args, Path(directory)
        self.size = args.size * MIB

    def image(self, fmt, written):
        """A new image; a full one is made once and copied."""
        path = self.dir / f'work.{fmt}'
        full = self.dir / f'full.{fmt}'
        path.unlink(missing_ok=True)
        if not written:
            run(self.img, 'create', '-q', '-f', fmt, path, self.size)
            return path
        if not full.exists():
            run(self.img, 'create', '-q', '-f', fmt, full, self.size)
            run(self.img, 'bench', '-q', '-w', '-f', fmt, '-s', MIB,
                '-c', self.size // MIB, '-d', 8, '--pattern', 85, full)
        shutil.copyfile(full, path)
        return path

    def once(self, name, fmt):
        """Seconds that one run of a workload takes."""
        size, step, written, more = WORKLOADS[name]
        path = self.image(fmt, written)
        count = min(self.args.requests, self.size // step)
        # Long enough to be measured: round and round, where nothing is new
        if written:
            count = self.args.requests
        os.sync()
        text = run(self.img, 'bench', '-f', fmt, '-t', self.args.cache,
                   '-s', size, '-S', step, '-c', count,
                   '-d', self.args.depth, *more, path)
        found = re.search(r'Run completed in ([0-9.]+) seconds', text)
        if not found:
            raise Failure(f'qemu-img bench says no time: {text}')
        return float(found.group(1)) / count

    def measure(self, name):
        times = {fmt: [] for fmt in FORMATS}
        for _ in range(self.args.runs):
            for fmt in FORMATS:
                times[fmt].append(self.once(name, fmt))
        median = {f: statistics.median(t) for f, t in times.items()}
        return {
            'name': name,
            'request_bytes': WORKLOADS[name][0],
            'seconds_per_request': times,
            'median_seconds': median,
            'spread': {f: (max(t) - min(t)) / median[f]
                       for f, t in times.items()},
            'speed_against_raw': median['raw'] / median['thinvm'],
            'speed_against_qcow2': median['qcow2'] / median['thinvm'],
        }


def line(result):
    rate = {f: 1 / s for f, s in result['median_seconds'].items()}
    spread = max(result['spread'].values())
    return (f'{result["name"]:32}' +
            ''.join(f'{rate[f]:10.0f}' for f in FORMATS) +
            f'{result["speed_against_qcow2"]:10.2f}'
            f'{result["speed_against_raw"]:8.2f}{spread:8.0%}')


def parse_args():
    checkout = Path(__file__).resolve().parents[2]
    p = argparse.ArgumentParser(
        prog='bench', description='Speed of thinvm beside raw and qcow2.')
    p.add_argument('--build', type=Path, default=checkout / 'build')
    p.add_argument('--dir', help='where the images go (default: $TMPDIR)')
    p.add_argument('--runs', type=int, default=5,
                   help='of each workload and format (default: 5)')
    p.add_argument('--size', type=int, default=1024, metavar='MIB',
                   help='of the disks (default: 1024)')
    p.add_argument('--requests', type=int, default=20000,
                   help='of each run, at most (default: 20000)')
    p.add_argument('--depth', type=int, default=32,
                   help='requests at a time (default: 32)')
    p.add_argument('--cache', default='writeback',
                   help='cache mode, as for qemu-img bench -t '
                   '(default: writeback; none measures the device)')
    p.add_argument('--only', metavar='TEXT',
                   help='workloads with this in their name')
    p.add_argument('--json', type=Path, metavar='FILE',
                   help='write all numbers there')
    p.add_argument('--quick', action='store_true',
                   help='small and short: shows that it works, not more')
    args = p.parse_args()
    if args.quick:
        args.runs, args.size, args.requests = 5, 128, 1000
    if min(args.runs, args.size, args.requests, args.depth) < 1:
        p.error('numbers must be at least 1')
    if not (args.build / 'bin' / 'qemu-img').exists():
        p.error(f'no qemu-img in {args.build}/bin: build first, or give '
                '--build')
    return args


def main():
    args = parse_args()
    names = [n for n in WORKLOADS if not args.only or args.only in n]
    if not names:
        sys.exit(f'bench: no workload has "{args.only}" in its name')
    directory = tempfile.mkdtemp(prefix='thinvm-bench-', dir=args.dir)
    results = []
    try:
        bench = Bench(args, directory)
        print(f'{"requests per second":32}' +
              ''.join(f'{f:>10}' for f in FORMATS) +
              f'{"/qcow2":>10}{"/raw":>8}{"spread":>8}')
        for name in names:
            results.append(bench.measure(name))
            print(line(results[-1]), flush=True)
    except (Failure, OSError) as e:
        sys.exit(f'bench: {e}')
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    if args.json:
        args.json.write_text(json.dumps({
            'runs': args.runs, 'disk_mib': args.size, 'depth': args.depth,
            'requests': args.requests, 'cache': args.cache,
            'workloads': results}, indent=2) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
