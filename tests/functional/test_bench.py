# SPDX-License-Identifier: GPL-2.0-or-later
"""The benchmark runs and says what it is asked for; figures mean nothing."""

import json
import os
import subprocess

from lib.context import TOP, check
from lib.testing import test


def bench(ctx, *more):
    """What scripts/bench --json has written."""
    out = ctx.path('bench.json')
    done = subprocess.run(
        [os.path.join(TOP, 'scripts', 'bench'), '--build', ctx.build,
         '--quick', '--runs', '1', '--formats', 'raw,qcow2,thinvm',
         '--dir', ctx.dir, '--json', out, *more],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, check=False)
    ctx.log(done.stdout)
    check(done.returncode == 0, 'scripts/bench failed: %s',
          done.stdout[-300:])
    with open(out, encoding='utf-8') as f:
        return json.load(f)


@test()
def requests(ctx):
    figures = bench(ctx, '--only', 'overwrite 4 KiB, scattered, depth 1')
    done, = figures['workloads']
    check(set(done['requests_per_second']) == {'raw', 'qcow2', 'thinvm'},
          'measured were %s', done['requests_per_second'])
    check(set(done['thinvm_against']) == {'raw', 'qcow2'},
          'compared were %s', done['thinvm_against'])


@test()
def by_depth(ctx):
    """The table by depth, and the picture of it."""
    figures = bench(ctx, '--what', 'depths', '--svg', ctx.dir)
    for request in ('read', 'overwrite', 'write new'):
        depths = [d['depth'] for d in figures['depths']
                  if d['request'] == request]
        check(depths == [1, 8, 64], '%s was measured at depths %s', request,
              depths)
    with open(ctx.path('speed-depths.svg'), encoding='utf-8') as f:
        check(f.read().count('<polyline') == 9,
              'three kinds of request of three formats have no nine curves')


@test()
def other_kinds(ctx):
    figures = bench(ctx, '--what', 'moments,queues,checkpoint,huge')
    check(not figures['workloads'], 'requests were measured unasked')
    seen = {m['what'] for m in figures['moments']}
    check({'create', 'open', 'first write', 'close', 'discard'} <= seen,
          'moments are %s', sorted(seen))
    for queues in figures['queues']:
        check(queues['scaling']['thinvm']['1'] == 1 and
              queues['scaling']['thinvm']['2'] > 0,
              'queues scale by %s', queues['scaling'])
    check({h['moment'] for h in figures['huge']} == {'first', 'again'} and
          all(h['thinvm_against']['qcow2'] > 0 for h in figures['huge']),
          'of 1 TiB there is %s', figures['huge'])
    run, = figures['checkpoint']
    check(run['checkpoints'] > 0 and run['writes_during'] > 0,
          'no checkpoint was met: %s', run)


@test(seconds=600, slow=True)
def precopy(ctx):
    """scripts/bench-precopy: a guest, a link, all modes, and the same data."""
    ctx.need('tc', 'iproute2')
    out = ctx.path('bench.json')
    ctx.run(os.path.join(TOP, 'scripts', 'bench-precopy'), '--build', ctx.build,
            '--quick', '--verify', '--directory', ctx.dir, '--json', out,
            '--svg', ctx.dir, '--mode', 'precopy', '--mode', 'mirror-blocking',
            seconds=580)
    with open(out, encoding='utf-8') as f:
        light = json.load(f)['workloads']['light']
    for mode, (run,) in light.items():
        check(run['ready'] and run['MiB'] > run['used'] * 0.7,
              '%s sent %d MiB of %d', mode, run['MiB'], run['used'])
    check(light['precopy'][0]['trimmed'] > 0, 'the agent was not there')
    check(os.path.exists(ctx.path('precopy-light.svg')), 'no drawing')
    table = ctx.run(os.path.join(TOP, 'scripts', 'bench-precopy'),
                    '--table', out)
    check('mirror, blocking' in table and '=====' in table, table)
