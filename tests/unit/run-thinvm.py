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
# scripts/lib/testrun.py), with --tap the same as TAP for meson.

import argparse
import concurrent.futures
import os
import re
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent.parent
LIMIT = 600             # seconds that one program may take
CASE = re.compile(r'^(not )?ok \d+ (?:- )?(\S+)(?:\s+#\s*SKIP\s*(.*))?')


def run(program, log_dir, options):
    """Run one program; returns [(verdict, name, detail)]."""
    if not program.exists():
        return [('not ok', program.name, 'was not built: is it in the table '
                 'of tests/unit/thinvm/meson.build?')]
    log = log_dir / (program.name + '.log')
    env = dict(os.environ, G_TEST_SRCDIR=str(CHECKOUT / 'tests' / 'unit'),
               G_TEST_BUILDDIR=str(program.parent))
    with open(log, 'w+', encoding='utf-8', errors='replace') as f:
        try:
            rc = subprocess.call([str(program), '--tap', '-k', *options],
                                 stdout=f, stderr=subprocess.STDOUT,
                                 stdin=subprocess.DEVNULL, env=env,
                                 timeout=LIMIT)
        except subprocess.TimeoutExpired:
            rc = f'killed after {LIMIT} s'
        f.seek(0)
        output = f.read()
    results = []
    for line in output.splitlines():
        m = CASE.match(line)
        if not m:
            continue
        name = program.name + m.group(2)
        if m.group(1):
            results.append(('not ok', name, str(log)))
        elif m.group(3) is not None:
            results.append(('skip', name, m.group(3) or 'no reason given'))
        else:
            results.append(('ok', name, ''))
    failed = any(r[0] == 'not ok' for r in results)
    if (rc and not failed) or not results:
        results.append(('not ok', program.name, f'exit {rc}, see {log}'))
    return results


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
    sources = (CHECKOUT / 'tests' / 'unit').glob('test-thinvm-*.c')
    programs = [args.build / 'qemu' / 'tests' / 'unit' / s.stem
                for s in sorted(sources)
                if args.only.split('/')[0] in s.stem]
    if not programs and args.only:
        return 2
    options = ['-m', 'slow'] if args.all else []
    count = 0
    bad = 0
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(run, p, log_dir, options) for p in programs]
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
