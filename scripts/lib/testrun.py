# SPDX-License-Identifier: GPL-2.0-or-later
#
# Runs test suites and counts.  A suite is a program.  It is called with
#
#   --build DIR     where the programs to test are
#   --all           also tests that take long (passed on if given)
#   --only NAME     one test, in the suite's own notation (likewise)
#
# and prints one line for each test as it ends, anything else being for
# its log:
#
#   ok NAME
#   not ok NAME [reason]
#   skip NAME reason
#
# NAME has no blanks; a colon at its end is dropped.  Exit status 0: none
# failed; 1: some did; 2 with --only: no test of that name.  SIGTERM makes
# it end what it started and exit.
#
# A suite that prints nothing, exits otherwise than its lines say, or is
# not done within its limit, counts as one failed test more: nothing that
# goes wrong here may look like success.

import os
import re
import signal
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

LINE = re.compile(r'^(ok|not ok|skip)\s+(\S+?):?(?:\s+(.*))?$')
GRACE = 60              # seconds from SIGTERM to SIGKILL


@dataclass
class Suite:
    name: str
    script: str         # relative to the checkout
    limit: int          # seconds
    limit_all: int      # seconds, with --all
    quick: bool = False     # part of a quick run


@dataclass
class Tally:
    passed: int = 0
    failed: list = field(default_factory=list)
    skipped: list = field(default_factory=list)

    def count(self, verdict, name, reason):
        if verdict == 'ok':
            self.passed += 1
        elif verdict == 'skip':
            self.skipped.append((name, reason))
        else:
            self.failed.append((name, reason))


class SuiteRun:
    """One run of one suite."""

    def __init__(self, suite, checkout, build, tally, say):
        self.suite = suite
        self.checkout = checkout
        self.build = build
        self.tally = tally
        self.say = say
        self.log = build / 'test-logs' / f'{suite.name}.log'
        self.seen = 0
        self.seen_failures = 0
        self.overdue = False

    def _result(self, verdict, name, reason):
        self.seen += 1
        self.seen_failures += verdict == 'not ok'
        self.tally.count(verdict, f'{self.suite.name} {name}', reason)
        self.say(f'{verdict} {self.suite.name} {name}' +
                 (f': {reason}' if reason else ''))

    def _suite_failed(self, reason):
        self._result('not ok', '(suite)', f'{reason}, log: {self.log}')

    def _stop(self, process):
        self.overdue = True
        process.terminate()
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def run(self, args, limit, named):
        script = self.checkout / self.suite.script
        if not script.exists():
            self._suite_failed(f'{self.suite.script} does not exist')
            return
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.say(f'suite {self.suite.name}, at most {limit} s')
        began = time.monotonic()
        with open(self.log, 'w', encoding='utf-8') as log, \
                subprocess.Popen(
                    ['/usr/bin/python3', str(script),
                     '--build', str(self.build), *args],
                    stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                    stderr=log, text=True, errors='replace',
                    cwd=self.checkout, start_new_session=True) as process:
            timer = threading.Timer(limit, self._stop, [process])
            timer.start()
            try:
                for line in process.stdout:
                    log.write(line)
                    log.flush()
                    m = LINE.match(line.rstrip('\n'))
                    if m:
                        self._result(m[1], m[2], m[3] or '')
                rc = process.wait()
            except BaseException:
                self._stop(process)
                raise
            finally:
                timer.cancel()
        self._judge(rc, limit, named)
        self.say(f'suite {self.suite.name} took '
                 f'{time.monotonic() - began:.0f} s')

    def _judge(self, rc, limit, named):
        if self.overdue:
            self._suite_failed(f'not done within {limit} s')
        elif rc == 2 and named and not self.seen:
            pass                        # that test is another suite's
        elif rc not in (0, 1):
            self._suite_failed(f'ended with status {rc}')
        elif bool(rc) != bool(self.seen_failures):
            self._suite_failed(f'ended with status {rc}, but '
                               f'{self.seen_failures} of its tests failed')
        elif not self.seen:
            self._suite_failed('ran no test')


def report(tally, log_dir):
    """What was skipped and what failed; the count is the last line."""
    if tally.skipped:
        print(f'\n{len(tally.skipped)} skipped:')
        for name, reason in tally.skipped:
            print(f'  {name}: {reason}')
    if tally.failed:
        print(f'\n{len(tally.failed)} failed (logs: {log_dir}):')
        for name, reason in tally.failed:
            print(f'  {name}: {reason}')
    print(f'\n{tally.passed} passed, {len(tally.failed)} failed', flush=True)
