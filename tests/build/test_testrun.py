# SPDX-License-Identifier: GPL-2.0-or-later
#
# The test runner: that no kind of misbehaviour of a suite counts as
# success.

import contextlib
import io

import testrun
from helpers import TempTest


class Runner(TempTest):
    def run_suite(self, code, limit=60, named=False):
        self.put('suite.py', 'import os, sys, time, signal\n' + code)
        tally = testrun.Tally()
        suite = testrun.Suite('s', 'suite.py', limit, limit)
        testrun.SuiteRun(suite, self.tmp, self.tmp / 'build', tally,
                         lambda text: None).run([], limit, named)
        return tally

    def numbers(self, *args, **kwargs):
        tally = self.run_suite(*args, **kwargs)
        return tally.passed, len(tally.failed), len(tally.skipped)

    def test_lines(self):
        tally = self.run_suite(
            'print("ok a\\nnoise\\nskip b: no target\\nnot ok c: bad\\n")\n'
            'sys.exit(1)')
        self.assertEqual(tally.passed, 1)
        self.assertEqual(tally.failed, [('s c', 'bad')])
        self.assertEqual(tally.skipped, [('s b', 'no target')])

    def test_only_passes(self):
        self.assertEqual(self.numbers('print("ok a")'), (1, 0, 0))

    def test_silence_is_failure(self):
        self.assertEqual(self.numbers('pass'), (0, 1, 0))

    def test_crash_is_failure(self):
        self.assertEqual(
            self.numbers('print("ok a", flush=True)\n'
                         'os.kill(os.getpid(), signal.SIGKILL)'), (1, 1, 0))

    def test_status_against_lines_is_failure(self):
        self.assertEqual(self.numbers('print("ok a")\nsys.exit(1)'),
                         (1, 1, 0))
        self.assertEqual(self.numbers('print("not ok a")'), (0, 2, 0))

    def test_time_limit(self):
        tally = self.run_suite('print("ok a", flush=True)\ntime.sleep(600)',
                               limit=8)
        self.assertEqual((tally.passed, len(tally.failed)), (1, 1))
        self.assertIn('not done within 8 s', tally.failed[0][1])

    def test_missing_suite(self):
        tally = testrun.Tally()
        suite = testrun.Suite('s', 'none.py', 1, 1)
        testrun.SuiteRun(suite, self.tmp, self.tmp / 'build', tally,
                         lambda text: None).run([], 1, False)
        self.assertEqual(len(tally.failed), 1)

    def test_name_of_another_suite(self):
        self.assertEqual(self.numbers('sys.exit(2)', named=True), (0, 0, 0))
        self.assertEqual(self.numbers('sys.exit(2)'), (0, 1, 0))

    def test_last_line(self):
        out = io.StringIO()
        tally = testrun.Tally(passed=3, failed=[('x', 'y')])
        with contextlib.redirect_stdout(out):
            testrun.report(tally, 'logs')
        self.assertEqual(out.getvalue().splitlines()[-1],
                         '3 passed, 1 failed')
