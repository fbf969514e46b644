#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
#
# scripts/test, after set-up: builds and runs the suites in the table below.
# How they are run and what they print: testrun.py.

import argparse
import sys
from pathlib import Path

sys.dont_write_bytecode = True

import build as thinvm_build            # noqa: E402
from testrun import Suite, SuiteRun, Tally, report      # noqa: E402

CHECKOUT = Path(__file__).resolve().parent.parent.parent

SUITES = [
    Suite('build', 'tests/build/run.py', 300, 300, quick=True),
    Suite('unit', 'tests/unit/run-thinvm.py', 900, 10800, quick=True),
    Suite('fuzz', 'tests/fuzz/run.py', 600, 14400),
    Suite('iotests', 'tests/qemu-iotests/run-thinvm.py', 1800, 10800),
    Suite('functional', 'tests/functional/run.py', 1800, 10800),
]


def build(args, tally):
    """Build; False if there is nothing to test."""
    try:
        thinvm_build.build(args.build)
    except (thinvm_build.BuildFailed, OSError) as e:
        print(e, file=sys.stderr)
        tally.count('not ok', 'building', f'log: {args.build}/build.log')
        return False
    return True


def run(args, tally):
    options = []
    if args.all:
        options.append('--all')
    if args.only:
        options += ['--only', args.only]
    for suite in SUITES:
        if args.suite and suite.name not in args.suite:
            continue
        if args.quick and not suite.quick:
            continue
        limit = suite.limit_all if args.all else suite.limit
        SuiteRun(suite, CHECKOUT, args.build, tally,
                 thinvm_build.say).run(options, limit, bool(args.only))
    if args.only and not (tally.passed or tally.failed or tally.skipped):
        tally.count('not ok', args.only, 'no suite has a test of this name')


def main():
    p = argparse.ArgumentParser(
        prog='scripts/test', description='Set up, build, run all tests.')
    names = [s.name for s in SUITES]
    p.add_argument('--quick', action='store_true',
                   help='only the suites that take seconds')
    p.add_argument('--all', action='store_true',
                   help='also the tests that take long')
    p.add_argument('--suite', action='append', choices=names,
                   help='only this suite; may be repeated')
    p.add_argument('--only', metavar='NAME',
                   help='only the test of this name')
    p.add_argument('--no-setup', action='store_true',
                   help='do not run scripts/setup first')
    p.add_argument('--build', type=Path, default=CHECKOUT / 'build',
                   metavar='DIR', help='build directory (default: build)')
    args = p.parse_args()
    args.build = args.build.resolve()
    tally = Tally()
    if build(args, tally):
        run(args, tally)
    report(tally, args.build / 'test-logs')
    return 1 if tally.failed else 0


if __name__ == '__main__':
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
