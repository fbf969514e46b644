#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Tests of the build itself: the insertions, the overlay, what was built,
# the reading of apt's configuration, and the test runner.  They need a
# build, but no guest and no root.
#
#   run.py [--build DIR] [--only NAME] [--all]
#
# prints "ok NAME" or "not ok NAME reason" for each test (see
# scripts/lib/testrun.py).

import argparse
import sys
import unittest
from pathlib import Path

sys.dont_write_bytecode = True
HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(CHECKOUT / 'scripts' / 'lib')]


class LineResult(unittest.TestResult):
    """Prints a line for each test as it ends."""

    def startTest(self, test):
        super().startTest(test)
        self.clean = True

    def _bad(self, test, err):
        self.clean = False
        print(f'not ok {name_of(test)} {err[0].__name__}: '
              f'{str(err[1]).strip().splitlines()[:1]}', flush=True)
        print(self._exc_info_to_string(err, test), file=sys.stderr)

    def addFailure(self, test, err):
        super().addFailure(test, err)
        self._bad(test, err)

    def addError(self, test, err):
        super().addError(test, err)
        self._bad(test, err)

    def addSuccess(self, test):
        super().addSuccess(test)
        print(f'ok {name_of(test)}', flush=True)

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        print(f'skip {name_of(test)} {reason}', flush=True)


def name_of(test):
    return test.id().removeprefix('test_')


def flatten(suite):
    for item in suite:
        if isinstance(item, unittest.TestSuite):
            yield from flatten(item)
        else:
            yield item


def main():
    p = argparse.ArgumentParser(description='Test the build.')
    p.add_argument('--build', type=Path, default=CHECKOUT / 'build')
    p.add_argument('--only', default='', metavar='TEXT',
                   help='only tests whose name contains TEXT')
    p.add_argument('--all', action='store_true',
                   help='accepted like by every suite; all are always run')
    args = p.parse_args()

    import helpers
    helpers.BUILD = args.build.resolve()
    tests = [t for t in flatten(unittest.defaultTestLoader.discover(HERE))
             if args.only in name_of(t)]
    if not tests:
        return 2
    result = LineResult()
    unittest.TestSuite(tests).run(result)
    return 0 if result.wasSuccessful() else 1


if __name__ == '__main__':
    sys.exit(main())
