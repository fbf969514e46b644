#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Measures what an internal snapshot costs a running disk, thinvm beside
# qcow2.  The disk is fully mapped (preallocation=metadata), or with --fill
# fully written, and served by qemu-system over NBD; a client writes 4 KiB at random places, one request
# at a time, before, while and after a snapshot is created and deleted, and
# notes how long each write takes.  Then, with nothing running, a snapshot is
# gone back to with qemu-img.
#
# What counts is the median over the runs; formats take turns, since times
# differ with what else the machine does.  The client's longest write while
# nothing happens says what a stall is to be compared with.  A format that
# takes minutes at some size may be run there less often (--fewer); how often
# each was run is printed.

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from bench_machine import BLOCK, Failure, Machine, run

CHECKOUT = Path(__file__).resolve().parent.parent.parent
UNITS = {'M': 1 << 20, 'G': 1 << 30, 'T': 1 << 40}
FILL_STEP = 64 << 20


class SnapshotMachine(Machine):
    """What is measured."""

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
        stall = max(writer.between(begin, end), default=0)
        result[f'{name} stall'] = stall
        result[f'{name} above idle'] = stall - result['before longest']


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


def bytes_of(size):
    return int(size[:-1]) * UNITS[size[-1]]


def make(args, fmt, options, image, size):
    """A disk all of whose clusters are mapped, or written."""
    img, io = (args.build / 'bin' / name for name in ('qemu-img', 'qemu-io'))
    if not args.fill:
        options = ['preallocation=metadata', *options]
    run(img, 'create', '-q', '-f', fmt,
        *[word for o in options for word in ('-o', o)], image, size)
    if args.fill:
        run(io, '-f', fmt, '-t', 'none',
            *[word for at in range(0, bytes_of(size), FILL_STEP) for word in
              ('-c', f'write -P {at // FILL_STEP % 255 + 1} {at} '
               f'{min(FILL_STEP, bytes_of(size) - at)}')], image)


def measure(args, spec, size, directory):
    img = args.build / 'bin' / 'qemu-img'
    fmt, *options = spec.split('/')
    image = directory / f'disk.{fmt}'
    make(args, fmt, options, image, size)
    result = {}
    machine = SnapshotMachine(args, image, fmt, directory)
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
    ('create', 's'), ('create stall', 'ms'), ('create above idle', 'ms'),
    ('delete', 's'), ('delete stall', 'ms'), ('delete above idle', 'ms'),
    ('revert', 's'), ('before longest', 'ms'), ('before writes/s', ''), ('before median', 'ms'),
    ('after writes/s', ''), ('after median', 'ms'), ('after longest', 'ms'),
    ('before bytes', ''), ('after bytes', ''),
)


def show(value, unit):
    if unit == 's':
        return f'{value:.3f} s'
    return f'{value * 1000:.2f} ms' if unit == 'ms' else f'{value:.1f}'


def report(results, formats, what):
    """results[size][format]: the runs."""
    for size, by_format in results.items():
        runs = ', '.join(f'{fmt} {len(by_format[fmt])}' for fmt in formats)
        print(f'\n{size}, fully {what}, median (least to most); runs: {runs}')
        for row, unit in ROWS:
            cells = []
            for fmt in formats:
                if not by_format[fmt]:
                    continue
                values = [r[row] for r in by_format[fmt]]
                cells.append(f'{fmt} {show(statistics.median(values), unit)} '
                             f'({show(min(values), unit)} to '
                             f'{show(max(values), unit)})')
            print(f'  {row:17} ' + '; '.join(cells))


def fewer(parser, args, text):
    fmt, size, runs = (['', ''] + text.split(':'))[-3:]
    if fmt not in args.formats or size not in args.sizes or not runs.isdigit():
        parser.error(f'--fewer {text!r}: a format, a size that is measured, '
                     'and a number of runs, say qcow2:1T:1')
    return (fmt, size), int(runs)


def parse_args():
    p = argparse.ArgumentParser(
        description='Snapshots of a running disk, thinvm beside qcow2.')
    p.add_argument('--build', type=Path, default=CHECKOUT / 'build')
    p.add_argument('--dir', type=Path, default=None,
                   help='where the images are made (default: a temporary one)')
    p.add_argument('--sizes', default='1G,100G,1T')
    p.add_argument('--formats', default='thinvm,qcow2',
                   help='options for qemu-img create may follow a slash: '
                   'thinvm,thinvm/cluster_size=16k')
    p.add_argument('--fill', action='store_true',
                   help='write the disks, do not only map them: then what a '
                   'write does not cover has to be copied after a snapshot')
    p.add_argument('--runs', type=int, default=5)
    p.add_argument('--fewer', action='append', default=[],
                   metavar='FORMAT:SIZE:RUNS',
                   help='of this format at this size only so many runs, say '
                   'qcow2:1T:1; may be given several times')
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
    args.limits = dict(fewer(p, args, text) for text in args.fewer)
    args.build = args.build.resolve()
    return args


def save(args, results):
    if args.json:
        args.json.write_text(json.dumps(results, indent=1), encoding='utf-8')


def main():
    args = parse_args()
    results = {size: {f: [] for f in args.formats} for size in args.sizes}
    for number in range(args.runs):
        for size in args.sizes:
            for fmt in args.formats if number % 2 else args.formats[::-1]:
                if number >= args.limits.get((fmt, size), args.runs):
                    continue
                begin = time.monotonic()
                directory = Path(tempfile.mkdtemp(prefix='snapshots-',
                                                  dir=args.dir))
                try:
                    results[size][fmt].append(
                        measure(args, fmt, size, directory))
                finally:
                    shutil.rmtree(directory, ignore_errors=True)
                print(f'run {number + 1} of {args.runs}: {fmt}, {size}: '
                      f'{time.monotonic() - begin:.0f} s', file=sys.stderr)
                save(args, results)
    report(results, args.formats, 'written' if args.fill else 'mapped')
    return 0


if __name__ == '__main__':
    try:
        sys.exit(main())
    except Failure as e:
        sys.exit(f'bench-snapshots: {e}')
