#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Runs thinvm's unit tests, the programs test-thinvm-* that QEMU's build
# makes from tests/unit/thinvm/meson.build.  Each of them speaks TAP, one
# line for each case; this passes the cases on under the name
# "PROGRAM/path/of/case", and adds one for a program that died, hung or
# printed no case at all.
#
#   run-thinvm.py [--build DIR] [--only TEXT] [--all] [--tap] [--jobs N]
#
# prints "ok NAME", "not ok NAME" or "skip NAME reason" (see
# scripts/lib/testrun.py), with --tap the same as TAP for meson.  With --all
# test-thinvm-crash makes a million cuts more, split over the processors (their
# progress is told on stderr), and all programs run once more under sanitizers
# (thinvm_sanitize.py): "--all --only asan" and "--all --only tsan" run these.

import argparse
import concurrent.futures
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import thinvm_sanitize

CHECKOUT = Path(__file__).resolve().parent.parent.parent
LIMIT = 600             # seconds that one program may take
LIMIT_ALL = 10000       # the same for a part of a million cuts
LIMIT_SANITIZED = 3600  # and for one that sanitizers slow down
CUTS_ALL = 1000000
SEED_ALL = 1000000      # of the first part's first life, and so on
CASE = re.compile(r'^(not )?ok \d+ (?:- )?(\S+)(?:\s+#\s*SKIP\s*(.*))?',
                  re.MULTILINE)


def call(argv, log, env, limit):
    """Run to the end; returns (status, output)."""
    lines = []
    with open(log, 'w', encoding='utf-8') as f, \
            subprocess.Popen(argv, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True,
                             errors='replace', stdin=subprocess.DEVNULL,
                             env=env) as process:
        timer = threading.Timer(limit, process.kill)
        timer.start()
        for line in process.stdout:
            f.write(line)
            f.flush()
            lines.append(line)
            if ' cuts, at seed ' in line:
                print(f'{log.stem}: {line.strip("# ")}', end='',
                      file=sys.stderr, flush=True)
        rc = process.wait()
        overdue = not timer.is_alive()
        timer.cancel()
    return f'killed after {limit} s' if overdue else rc, ''.join(lines)


def run(program, log_dir, options, part='', limit=LIMIT):
    """Run one program, or a part of it; returns [(verdict, name, detail)]."""
    if not program.exists():
        return [('not ok', program.name, 'was not built: is it in the table '
                 'of tests/unit/thinvm/meson.build?')]
    log = log_dir / (program.name + part.replace('/', '-') + '.log')
    env = dict(os.environ, G_TEST_SRCDIR=str(CHECKOUT / 'tests' / 'unit'),
               G_TEST_BUILDDIR=str(program.parent))
    rc, output = call([str(program), '--tap', '-k', *options], log, env,
                      limit)
    results = []
    for line in output.splitlines():
        m = CASE.match(line)
        if not m:
            continue
        name = program.name + m.group(2) + part
        if m.group(1):
            results.append(('not ok', name, str(log)))
        elif m.group(3) is not None:
            results.append(('skip', name, m.group(3) or 'no reason given'))
        else:
            results.append(('ok', name, ''))
    failed = any(r[0] == 'not ok' for r in results)
    if (rc and not failed) or not results:
        results.append(('not ok', program.name + part,
                        f'exit {rc}, see {log}'))
    return results


BUILDING = threading.Lock()     # the programs share objects


def run_sanitized(case, make, name, log_dir):
    """One program under a sanitizer; [(verdict, name, detail)]."""
    log = log_dir / f'{case.replace("/", "-")}.log'
    try:
        with BUILDING:
            program, env = make(name)
    except thinvm_sanitize.FUZZ.BuildError as e:
        log.write_text(str(e), encoding='utf-8')
        return [('not ok', case, f'does not build, see {log}')]
    rc, output = call([str(program), '--tap', '-k'], log,
                      dict(os.environ, **env), LIMIT_SANITIZED)
    if rc or not CASE.search(output):
        return [('not ok', case, f'exit {rc}, see {log}')]
    return [('ok', case, '')]


def million_cuts(parts):
    """(options, part, limit) of each run of test-thinvm-crash."""
    for n in range(parts):
        yield (['-p', '/thinvm/crash/cuts', '--cuts', str(CUTS_ALL // parts),
                '--seed', str(SEED_ALL * (n + 1))],
               f'/all-{n + 1}-of-{parts}', LIMIT_ALL)


def main():
    p = argparse.ArgumentParser(description="Run thinvm's unit tests.")
    p.add_argument('--build', type=Path, default=CHECKOUT / 'build')
    p.add_argument('--only', default='', metavar='TEXT',
                   help='only programs whose name contains TEXT (of a '
                   'case: what precedes its first slash)')
    p.add_argument('--all', action='store_true',
                   help='also cases that take long (gtest\'s "-m slow")')
    p.add_argument('--tap', action='store_true')
    p.add_argument('--jobs', type=int, default=os.cpu_count())
    args = p.parse_args()

    log_dir = args.build / 'test-logs' / 'unit'
    log_dir.mkdir(parents=True, exist_ok=True)
    sources = list((CHECKOUT / 'tests' / 'unit').glob('test-thinvm-*.c'))
    programs = [args.build / 'qemu' / 'tests' / 'unit' / s.stem
                for s in sorted(sources)
                if args.only.split('/')[0] in s.stem]
    sanitized = [c for c in thinvm_sanitize.Sanitized(args.build).cases(
                     s.stem for s in sorted(sources))
                 if args.only in c[0]] if args.all else []
    if not programs and not sanitized and args.only:
        return 2
    options = ['-m', 'slow'] if args.all else []
    count = 0
    bad = 0
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(run, p, log_dir, options) for p in programs]
        for p in programs:
            if args.all and p.name == 'test-thinvm-crash':
                jobs += [pool.submit(run, p, log_dir, *more)
                         for more in million_cuts(args.jobs)]
        jobs += [pool.submit(run_sanitized, *c, log_dir) for c in sanitized]
        for job in concurrent.futures.as_completed(jobs):
            for verdict, name, detail in job.result():
                count += 1
                bad += verdict == 'not ok'
                report(args.tap, count, verdict, name, detail)
    if args.tap:
        print(f'1..{count}')
    return 1 if bad else 0


def report(tap, number, verdict, name, detail):
    if not tap:
        print(f'{verdict} {name} {detail}'.rstrip(), flush=True)
    elif verdict == 'skip':
        print(f'ok {number} {name} # SKIP {detail}', flush=True)
    else:
        if detail:
            print(f'# {detail}')
        print(f'{verdict} {number} {name}', flush=True)


if __name__ == '__main__':
    sys.exit(main())
