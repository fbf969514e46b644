# SPDX-License-Identifier: GPL-2.0-or-later
#
# What bench_precopy.py has measured, as a table for the documentation: the
# median of each figure, and precopy's bytes and time beside the better of the
# mirror's modes that get ready.

import statistics

COLUMNS = ('load and job', 'ready', 'hand-over', 'MiB sent', 'of used',
           'guest', 'slowest fsync', 'bytes', 'time')


def median(runs, name):
    known = [r[name] for r in runs if r.get(name) is not None]
    # Not ready more often than not is not ready
    return statistics.median(known) if 2 * len(known) > len(runs) else None


def text(value, digits, unit=''):
    return '-' if value is None else f'{value:.{digits}f}{unit}'


def beside(results, mode, name):
    """In relation to the better mode of the mirror."""
    value = median(results[mode], name)
    mirrors = [median(runs, name) for m, runs in results.items()
               if m.startswith('mirror')]
    ready = [v for v in mirrors if v]
    if mode.startswith('mirror') or value is None or not ready:
        return ''
    return f'{value / min(ready):.2f}'


def row(results, mode):
    runs = results[mode]
    ready = median(runs, 'ready')
    name = {'mirror-background': 'mirror, background',
            'mirror-blocking': 'mirror, blocking'}.get(mode, mode)
    sent = 'MiB' if ready is not None else 'MiB at ready'
    calm, slowest = median(runs, 'fsync alone'), median(runs, 'slowest')
    return (name, 'never' if ready is None else text(ready, 1, ' s'),
            text(median(runs, 'hand-over'), 2, ' s'),
            text(median(runs, sent), 0), text(median(runs, 'of used'), 2),
            text(median(runs, 'guest'), 2),
            f'{text(calm, 2)} s, {text(slowest, 2)} s' if slowest else '-',
            beside(results, mode, 'MiB'), beside(results, mode, 'ready'))


def table(measured):
    """Lines of reStructuredText."""
    rows = [COLUMNS]
    for workload, results in measured['workloads'].items():
        rows.append((workload,) + ('',) * (len(COLUMNS) - 1))
        rows += [row(results, mode) for mode in results if results[mode]]
    widths = [max(len(r[i]) for r in rows) for i in range(len(COLUMNS))]
    rule = ' '.join('=' * w for w in widths)
    # An empty first cell would go on with the row above; others may be empty
    lines = [' '.join(c.ljust(w) for c, w in zip(r, widths)).rstrip()
             for r in rows]
    runs = [len(runs) for results in measured['workloads'].values()
            for runs in results.values()]
    mib = 1 << 20
    head = (f'Median of {min(runs)}, disk of {measured["size"] / mib:.0f} MiB, '
            f'{measured["used"] / mib:.0f} MiB in use, link of '
            f'{measured["rate"] / mib:g} MiB/s:')
    return [head, '', rule, lines[0], rule, *lines[1:], rule]
