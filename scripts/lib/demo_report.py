# SPDX-License-Identifier: GPL-2.0-or-later
#
# What the demonstration (demo.py) prints at its end: the report with its
# figures, or what failed and what to do about it.

import traceback

from lib.context import Failure, Skip


def _table(rows):
    width = max(len(name) for name, _ in rows)
    return ['  %-*s  %s' % (width, name, value) for name, value in rows]


def make(demo):
    lines = ['', '== Report', '', 'Figures:']
    lines += _table(list(demo.figures.items()))
    lines += ['', 'Mapping-cache mode over time:']
    lines += _table([('%6.1f s  host %s  %s' % (seconds, host, mode), why)
                     for seconds, host, mode, why in demo.modes])
    lines += ['', 'Lost of 1000 acknowledged writes, never flushed '
                  '(cache.direct=on):']
    lines += _table([(label, str(lost)) for label, _, lost in demo.lost])
    lines += ['', 'No flushed write was lost, in writethrough no '
                  'acknowledged one, and every check was clean.', '']
    return '\n'.join(lines)


def _advice(err):
    if isinstance(err, Skip):
        return 'Something that the demo needs is missing: run scripts/setup.'
    if isinstance(err, Failure):
        return ('Look at the logs of the processes there.  To see whether '
                'it happens again: scripts/demo --no-setup.')
    return ('This is a fault of the demo itself or of its surroundings, not '
            'a finding about thinvm.')


def print_failure(demo, err, logs):
    demo.ctx.log(''.join(traceback.format_exception(err)))
    print('\ndemo: FAILED in act "%s":\n  %s' % (demo.act_name, err))
    print('Logs: %s' % logs)
    print(_advice(err))
