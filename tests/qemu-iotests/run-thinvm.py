#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Runs iotests for thinvm: upstream's that are generic, upstream's that name
# only qcow2 but test general behaviour (thinvm-tests.txt lists them), and
# thinvm's own (tests/thinvm-*).  Each by upstream's `check -thinvm`, several
# at once, each with a time limit.
#
#   run-thinvm.py [--build DIR] [--only NAME] [--list] [--jobs N] [--all]
#
# prints "ok NAME", "not ok NAME reason" or "skip NAME reason" for each test;
# exit status as scripts/lib/testrun.py wants it.  What a test printed lies
# in BUILD/test-logs/iotests/NAME.log.
#
# Images and sockets lie in directories of this run alone, which are removed
# at its end, together with every process that a test left behind: those
# whose environment names that test's directory.

import argparse
import concurrent.futures
import contextlib
import fnmatch
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import thinvm_derive
import thinvm_tests

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent.parent
LIMIT = 600             # seconds that one test may take


def own_tests():
    """thinvm's own iotests, named as `check` finds them."""
    return {p.stem: thinvm_tests.Entry(p.stem, 'own', 'pass')
            for p in sorted((HERE / 'tests').glob('thinvm-*.out'))}


def processes_of(directory):
    """Ids of the processes whose environment names the directory."""
    marker = os.fsencode(f'TEST_DIR={directory}/')
    for pid in filter(str.isdigit, os.listdir('/proc')):
        with contextlib.suppress(OSError):
            with open(f'/proc/{pid}/environ', 'rb') as f:
                if any(v.startswith(marker) for v in f.read().split(b'\0')):
                    yield int(pid)


def end_leftovers(directory):
    """End what the test left running; returns how many there were."""
    # Some tests kill their QEMU and do not wait for it.
    deadline = time.monotonic() + 5
    while list(processes_of(directory)) and time.monotonic() < deadline:
        time.sleep(0.05)
    pids = list(processes_of(directory))
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while list(processes_of(directory)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return len(pids)


def unmount_below(directory):
    """Unmount what the test left mounted (FUSE exports)."""
    with open('/proc/self/mounts', encoding='utf-8') as f:
        points = [line.split()[1] for line in f]
    for point in points:
        if point.startswith(f'{directory}/'):
            subprocess.call(['umount', '-l', point])


class Runner:
    """Where everything of one run lies, and how a test is run there."""

    def __init__(self, args, scratch):
        self.build = args.build.resolve()
        self.source = self.build / 'qemu-src' / 'tests' / 'qemu-iotests'
        self.format = args.format
        self.limit = args.time_limit * (6 if args.all else 1)
        self.all = args.all
        self.logs = self.build / 'test-logs' / 'iotests'
        self.scratch = Path(scratch)
        self.tree = self.build / 'iotests'
        if self.format != 'thinvm':
            self.tree = self.source
        self.children = set()
        self.stopping = threading.Event()

    def prepare(self, entries):
        """Make the tree; returns {test name: why it cannot run}."""
        if not (self.source / 'check').exists():
            sys.exit(f'no QEMU in {self.build}: build it first')
        self.logs.mkdir(parents=True, exist_ok=True)
        if self.tree == self.source:
            return {}
        return thinvm_derive.make_tree(self.source, self.tree, entries)

    def command(self, name):
        return ['/usr/bin/python3', str(self.source / 'check'),
                f'-{self.format}', '--source-dir', str(self.tree),
                '--build-dir', str(self.build / 'qemu/tests/qemu-iotests'),
                name]

    def run(self, entry):
        """Run one test; returns (verdict, reason)."""
        name = entry.name
        path = thinvm_derive.find(name)
        if not (self.tree / path).exists():
            return 'skip', 'this QEMU has no such test'
        # Sockets need short paths, images a file system with O_DIRECT.
        directory = self.scratch / name
        images = self.logs.parent / f'{self.scratch.name}-{name}'
        for d in (directory, images):
            d.mkdir()
        env = dict(os.environ, PATH='/usr/bin:/bin:/usr/sbin:/sbin',
                   TEST_DIR=f'{images}/', SOCK_DIR=f'{directory}/',
                   TMPDIR=str(directory), PYTHONDONTWRITEBYTECODE='1')
        if self.all:
            env['THINVM_TEST_ALL'] = '1'
        log = self.logs / f'{name}.log'
        try:
            with open(log, 'w', encoding='utf-8') as f:
                try:
                    self._check(name, env, directory, f)
                    timeout = ''
                except subprocess.TimeoutExpired:
                    timeout = f'took longer than {self.limit} s'
            left = end_leftovers(images)
            verdict, reason = self._judge(name, log, timeout)
            if verdict == 'ok' and left:
                return 'not ok', f'left {left} processes behind, see {log}'
            return verdict, reason
        finally:
            end_leftovers(images)
            self._keep_output(name, images)
            for d in (directory, images):
                unmount_below(d)
                shutil.rmtree(d, ignore_errors=True)

    def _keep_output(self, name, images):
        """What a test printed that does not match, for --update."""
        bad = images / f'{self.format}-file-{name}' / f'{name}.out.bad'
        kept = self.logs / f'{name}.out.bad'
        if bad.exists():
            shutil.copyfile(bad, kept)
        else:
            kept.unlink(missing_ok=True)

    def update(self, entry):
        """Take what the test printed last as its reference output."""
        name = entry.name
        wanted = (self.logs / f'{name}.out.bad').read_text(encoding='utf-8')
        thinvm_derive.make_edits(name, thinvm_derive.find(name), self.source,
                                 entry, wanted)

    def _check(self, name, env, cwd, log):
        with subprocess.Popen(self.command(name), env=env, cwd=cwd,
                              stdin=subprocess.DEVNULL, stdout=log,
                              stderr=subprocess.STDOUT,
                              start_new_session=True) as child:
            self.children.add(child)
            try:
                if not self.stopping.is_set():
                    child.wait(self.limit)
            finally:
                self._kill(child)
                self.children.discard(child)

    @staticmethod
    def _kill(child):
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)

    def stop(self):
        """End all tests soon, from a signal handler or any thread."""
        self.stopping.set()
        for child in list(self.children):
            self._kill(child)

    @staticmethod
    def _judge(name, log, timeout):
        """What `check` said, out of its log."""
        if timeout:
            return 'not ok', f'{timeout}, see {log}'
        text = log.read_text(encoding='utf-8', errors='replace')
        lines = re.findall(rf'^{re.escape(name)} +(pass|fail|not run) +'
                           r'\[[^]]*\] \[[^]]*\] +(.*)$', text, re.MULTILINE)
        if not lines:
            return 'not ok', f'`check` did not run it, see {log}'
        status, rest = lines[-1]
        if status == 'pass':
            return 'ok', ''
        rest = re.sub(r'^(\d+\.\d+s|\.\.\.)\s*', '', rest)
        if status == 'not run':
            return 'skip', rest
        return 'not ok', f'{rest.split(" (see ")[0]}, see {log}'


def select(entries, args):
    """Split the list in those that run and those that do not."""
    patterns = args.only.split(',') if args.only else ['*']
    chosen = {n: e for n, e in entries.items()
              if any(fnmatch.fnmatchcase(n, p) for p in patterns)}
    run = {n: e for n, e in chosen.items() if args.all or
           e.status == 'pass' or e.status == 'slow' and n in patterns}
    return run, {n: e for n, e in chosen.items() if n not in run}


def parse_args():
    p = argparse.ArgumentParser(description='Run iotests for thinvm.')
    p.add_argument('--build', type=Path, default=CHECKOUT / 'build')
    p.add_argument('--only', default='', metavar='NAME',
                   help='only these tests: names or patterns, with commas '
                   'between')
    p.add_argument('--list', action='store_true',
                   help='show the tests and their status, run none')
    p.add_argument('--jobs', type=int, default=2)
    p.add_argument('--all', action='store_true',
                   help='also the slow ones, all of thinvm-failing (six times '
                   'the time limit), and try those that wait for a '
                   'feature or need what may be missing here')
    p.add_argument('--time-limit', type=int, default=LIMIT, metavar='SEC')
    p.add_argument('--update', action='store_true',
                   help='with --only: make what these tests printed last '
                   'their reference output (thinvm-out/), run none; read '
                   'the result before you commit it')
    p.add_argument('--format', default='thinvm',
                   help='run the listed tests, as upstream wrote them, for '
                   'another format: to tell what fails in this environment '
                   'from what fails for thinvm')
    return p.parse_args()


def report(verdict, name, detail, seconds):
    if verdict != 'skip':
        detail = f'{detail} [{seconds:.1f} s]'.strip()
    print(f'{verdict} {name} {detail}'.rstrip(), flush=True)


def judge(entry, error, runner):
    """Run a test unless its files could not be made."""
    start = time.monotonic()
    if error:
        verdict, reason = 'not ok', error
    else:
        verdict, reason = runner.run(entry)
    if verdict == 'not ok' and not entry.runs:
        verdict, reason = 'skip', f'{entry.reason}; tried: {reason}'
    elif verdict == 'ok' and not entry.runs:
        reason = f'although listed: {entry.reason}'
    return verdict, entry.name, reason, time.monotonic() - start


def main():
    args = parse_args()
    entries = thinvm_tests.load()
    if args.format == 'thinvm':
        entries = {**own_tests(), **entries}
    run, rest = select(entries, args)
    if args.list:
        for e in [*run.values(), *rest.values()]:
            print(f'{e.name:35} {e.way:8} {e.status}')
        return 0
    if not run and not rest:
        print(f'no test is named "{args.only}"', file=sys.stderr)
        return 2
    if args.update and args.only:
        for e in [*run.values(), *rest.values()]:
            Runner(args, '').update(e)
        return 0
    for e in rest.values():
        report('skip', e.name, e.reason, 0)
    counts = {'ok': 0, 'not ok': 0, 'skip': len(rest)}
    with tempfile.TemporaryDirectory(prefix='iot-') as scratch:
        runner = Runner(args, scratch)
        errors = runner.prepare(entries)
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            jobs = [pool.submit(judge, e, errors.get(e.name), runner)
                    for e in run.values()]

            def stop(signum, _frame):
                for job in jobs:
                    job.cancel()
                runner.stop()
                sys.exit(128 + signum)

            signal.signal(signal.SIGTERM, stop)
            signal.signal(signal.SIGINT, stop)
            for job in concurrent.futures.as_completed(jobs):
                counts[job.result()[0]] += 1
                report(*job.result())
    print('# {ok} passed, {not ok} failed, {skip} skipped'.format(**counts))
    return 1 if counts['not ok'] else 0


if __name__ == '__main__':
    sys.exit(main())
