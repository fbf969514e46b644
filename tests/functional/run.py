#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs thinvm's functional tests: real guests, a real target, real crashes.

Each test runs in a process of its own, in a session of its own, so that a
time limit can end it together with all that it started.  Two run at a time.
Prints one line for each test, as it ends:

    ok NAME
    not ok NAME: reason
    skip NAME: reason

and exits 0 only if none failed.  Logs lie below build/functional/NAME.
"""

import argparse
import fnmatch
import glob
import importlib.util
import os
import signal
import subprocess
import sys
import time
import traceback

HERE = os.path.dirname(os.path.abspath(__file__))
sys.dont_write_bytecode = True
sys.path.insert(0, HERE)

from lib.context import TOP, Context, Failure, Skip  # noqa: E402

EXIT_OK, EXIT_FAILED, EXIT_SKIPPED = 0, 1, 77


def discover():
    """Name -> function, in the order of files and of the lines in them."""
    tests = {}
    for path in sorted(glob.glob(os.path.join(HERE, 'test_*.py'))):
        stem = os.path.basename(path)[len('test_'):-len('.py')]
        spec = importlib.util.spec_from_file_location('test_' + stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for func in vars(module).values():
            if hasattr(func, 'functional_test'):
                tests['%s.%s' % (stem, func.__name__)] = func
    return tests


def select(tests, args):
    chosen = []
    for name, func in tests.items():
        marks = func.functional_test
        if args.only:
            if not any(fnmatch.fnmatch(name, pattern)
                       or name.split('.')[0] == pattern
                       for pattern in args.only):
                continue
        elif marks['slow'] and not args.all:
            continue
        if args.format in marks['formats']:
            chosen.append(name)
    return chosen


def run_child(func, name, args):
    """The test itself; the reason goes to stdout, details to its log."""
    with Context(name, fmt=args.format, build=args.build,
                 verbose=args.verbose) as ctx:
        # End by exception on SIGTERM, so that clean-up takes place.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_FAILED))
        try:
            func(ctx)
        except Skip as skip:
            print(skip)
            return EXIT_SKIPPED
        except Failure as failure:
            ctx.log(traceback.format_exc())
            print(failure)
            return EXIT_FAILED
        except Exception as err:
            ctx.log(traceback.format_exc())
            print('%s: %s' % (type(err).__name__, err))
            return EXIT_FAILED
    return EXIT_OK


class Job:
    """One running test, seen from the runner."""

    def __init__(self, name, seconds, args):
        self.name = name
        self.begin = time.monotonic()
        self.seconds = seconds
        argv = [sys.executable, os.path.abspath(__file__), '--child', name,
                '--format', args.format, '--build', args.build]
        if args.verbose:
            argv.append('--verbose')
        self.popen = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            start_new_session=True)

    def end_all(self):
        """SIGTERM lets the test clean up; its whole session then ends."""
        self.popen.terminate()
        try:
            self.popen.wait(20)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(self.popen.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def poll(self):
        """None while it runs, then (status, reason)."""
        if self.popen.poll() is None:
            if time.monotonic() - self.begin < self.seconds:
                return None
            self.end_all()
            self.popen.communicate()
            return EXIT_FAILED, 'not done in %d s' % self.seconds
        text = self.popen.communicate()[0].decode(errors='replace')
        return self.popen.returncode, ' '.join(text.split())[:600]


def report(name, status, reason, seconds):
    if status == EXIT_OK:
        print('ok %s' % name, flush=True)
    elif status == EXIT_SKIPPED:
        print('skip %s: %s' % (name, reason), flush=True)
    else:
        print('not ok %s: %s' % (name, reason or 'exit %d' % status),
              flush=True)
    print('   %s took %d s' % (name, seconds), file=sys.stderr, flush=True)


def run_all(names, tests, args):
    waiting = list(names)
    running = []
    failed = 0
    try:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                name = waiting.pop(0)
                limit = tests[name].functional_test['seconds']
                running.append(Job(name, limit * args.patience, args))
            time.sleep(0.1)
            for job in list(running):
                result = job.poll()
                if result:
                    running.remove(job)
                    report(job.name, *result, time.monotonic() - job.begin)
                    failed += result[0] not in (EXIT_OK, EXIT_SKIPPED)
    finally:
        for job in running:
            job.end_all()
    return failed


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--list', action='store_true',
                        help='print the names of the tests and exit')
    parser.add_argument('--only', action='append', metavar='PATTERN',
                        help='a test, a file, or a pattern; may be repeated')
    parser.add_argument('--format', default='thinvm',
                        choices=('thinvm', 'qcow2', 'raw'))
    parser.add_argument('--all', action='store_true',
                        help='also the tests that take minutes')
    parser.add_argument('--jobs', type=int, default=2)
    parser.add_argument('--patience', type=float, default=1.0,
                        help='factor on all time limits, for busy machines')
    parser.add_argument('--build', default=os.path.join(TOP, 'build'))
    parser.add_argument('--verbose', action='store_true')
    parser.add_argument('--child', help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = parse_args()
    args.build = os.path.abspath(args.build)
    tests = discover()
    if args.child:
        return run_child(tests[args.child], args.child, args)
    names = select(tests, args)
    if args.list:
        print('\n'.join(names))
        return 0
    if not names:
        print('no test matches; --list shows them', file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    return 1 if run_all(names, tests, args) else 0


if __name__ == '__main__':
    sys.exit(main())
