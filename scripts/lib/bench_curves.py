# SPDX-License-Identifier: GPL-2.0-or-later
#
# Curves over time, as SVG: what scripts/bench-precopy draws of a workload.
# Above, what has been sent; below, what the guest gets done.  Of each mode the
# run whose job was ready after the median time is shown.

from xml.sax.saxutils import escape

from bench_report import COLOURS

WIDTH, HEIGHT, LEFT, GAP = 640, 220, 70, 60


def typical(runs):
    """The run in the middle; those that were never ready come last."""
    order = sorted(runs, key=lambda r: r['ready'] or 1e9)
    return order[len(order) // 2]


def rates(curve):
    """Writes a second, between samples that are a second apart."""
    points, last, count = [], curve[0][0], 0
    for t, _, writes in curve[1:]:
        count += writes
        if t - last >= 1:
            points.append(((t + last) / 2, count / (t - last)))
            last, count = t, 0
    return points


def axis(top, end, most, name):
    y = top + HEIGHT
    out = [f'<rect x="{LEFT}" y="{top}" width="{WIDTH}" height="{HEIGHT}" '
           'fill="none" stroke="black"/>',
           f'<text x="{LEFT}" y="{top - 6}">{escape(name)}</text>']
    for i in range(5):
        value, at = most * i / 4, y - HEIGHT * i / 4
        out.append(f'<text x="{LEFT - 6}" y="{at + 4:.0f}" '
                   f'text-anchor="end">{value:.0f}</text>')
    for i in range(9):
        at = LEFT + WIDTH * i / 8
        out.append(f'<text x="{at:.0f}" y="{y + 16}" text-anchor="middle">'
                   f'{end * i / 8:.0f} s</text>')
    return out


def line(points, top, end, most, colour):
    path = ' '.join(
        f'{LEFT + WIDTH * t / end:.1f},{top + HEIGHT * (1 - v / most):.1f}'
        for t, v in points if 0 <= t <= end)
    return (f'<polyline points="{path}" fill="none" stroke="{colour}" '
            'stroke-width="2"/>')


def svg(workload, results):
    shown = {mode: typical(runs) for mode, runs in results.items()}
    sent = {m: [(t, n) for t, n, _ in r['curve']] for m, r in shown.items()}
    done = {m: rates(r['curve']) for m, r in shown.items()}
    end = max(p[-1][0] for p in sent.values())
    tops = (60, 60 + HEIGHT + GAP)
    out = ['<!-- SPDX-License-Identifier: GPL-2.0-or-later -->',
           f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 30}"'
           f' height="{tops[1] + HEIGHT + 30}" font-family="sans-serif" '
           'font-size="12">',
           '<rect width="100%" height="100%" fill="white"/>',
           f'<text x="{LEFT}" y="18" font-size="14">{escape(workload)}</text>']
    for curves, top, name in ((sent, tops[0], 'MiB sent'),
                              (done, tops[1], "the guest's writes a second")):
        most = max([v for p in curves.values() for _, v in p] + [1]) * 1.05
        out += axis(top, end, most, name)
        for i, points in enumerate(curves.values()):
            out.append(line(points, top, end, most, COLOURS[i + 1]))
    for i, (mode, run) in enumerate(shown.items()):
        x = LEFT + 110 + 180 * i
        out.append(f'<rect x="{x}" y="8" width="12" height="12" '
                   f'fill="{COLOURS[i + 1]}"/><text x="{x + 16}" y="18">'
                   f'{escape(mode)}{"" if run["ready"] else " (never ready)"}'
                   '</text>')
    out.append('</svg>')
    return '\n'.join(out) + '\n'
