# SPDX-License-Identifier: GPL-2.0-or-later
"""scripts/bench-growth: pauses of a guest on a volume that grows.

The guests are those of tests/functional/test_extender.py (a loop device that
is enlarged by a program that takes so long; root is needed), the simulation
is that of scripts/thinvm-extender, with the policy that its daemon has.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

from thinvm_extender import policy, simulate

TOP = Path(__file__).resolve().parent.parent.parent
TESTS = {'table': 'extender.pauses_by_delay', 'full': 'extender.ten_gigabytes',
         'blocked': 'extender.ten_gigabytes_blocked'}
LINE = re.compile(r'growth: (.*)')


def measured(build, name):
    """The lines that a test said, or none if it failed."""
    done = subprocess.run(
        [sys.executable, TOP / 'tests' / 'functional' / 'run.py', '--build',
         build, '--all', '--only', name], stdout=subprocess.PIPE, text=True,
        check=False)
    if not done.stdout.startswith('ok '):
        print(done.stdout, end='', file=sys.stderr)
        return []
    logs = Path(build) / 'functional' / name
    return [found for path in sorted(logs.glob('*.log'))
            for found in LINE.findall(path.read_text(errors='replace'))]


def marks(build, seeds):
    """10,000 random writes, discards and deletions of snapshots each: how far
    up the volume is used, against what it has in use."""
    program = Path(build) / 'qemu' / 'tests' / 'unit' / 'test-thinvm-limits'
    found = {'high-water mark/peak in use': [],
             'after compaction/in use': []}
    for seed in range(1, seeds + 1):
        text = subprocess.run(
            [program, '-p', '/thinvm/limits/high-water/random'],
            env={**os.environ, 'THINVM_SEED': str(seed)}, check=True,
            stdout=subprocess.PIPE, text=True).stdout
        ratios = re.findall(r'^# .*ratio ([\d.]+)$', text, re.M)
        for values, ratio in zip(found.values(), ratios):
            values.append(float(ratio))
    print(f'10,000 random steps, {seeds} seeds: median (least to most)')
    for what, values in found.items():
        print(f'  {what}: {statistics.median(values):.3f} '
              f'({min(values):.3f} to {max(values):.3f})')


def main():
    parser = argparse.ArgumentParser(
        prog='bench-growth', description='Pauses of a guest whose volume is '
        'extended while it writes, by write rate and extension delay.')
    parser.add_argument('--build', default=str(TOP / 'build'))
    parser.add_argument('--simulate-only', action='store_true')
    parser.add_argument('--what', choices=[*TESTS, 'marks', 'all'],
                        default='table',
                        help='with a guest: a table of 512 MiB each (the '
                        'default), 10 GiB in full, or blocked at first; '
                        'marks: high-water marks after random steps')
    parser.add_argument('--seeds', type=int, default=25,
                        help='of the random steps (default: 25)')
    args = parser.parse_args()
    ret = 0
    if args.what in ('marks', 'all') and not args.simulate_only:
        marks(args.build, args.seeds)
    if args.what == 'marks':
        return ret
    if not args.simulate_only:
        names = TESTS.values() if args.what == 'all' else [TESTS[args.what]]
        for name in names:
            lines = measured(args.build, name)
            ret |= not lines
            print(*(f'measured: {line}' for line in lines), sep='\n')
    for watermark, start in (1, 1), (6, 1), (6, 12):
        print(f'\nsimulated: 64 GiB are written, {start} GiB at first, '
              f'watermark {watermark} GiB; pauses (seconds in all)')
        for line in simulate.table(watermark * policy.GIB, policy.Limits(),
                                   64 * policy.GIB, start * policy.GIB):
            print(line)
    return ret


if __name__ == '__main__':
    sys.exit(main())
