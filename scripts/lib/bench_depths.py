# SPDX-License-Identifier: GPL-2.0-or-later
#
# Requests of 4 KiB at scattered places, by how many of them are on their way
# at a time: reads and overwrites of what is allocated, and new writes.

from xml.sax.saxutils import escape

import bench_report
from bench_workloads import KIB, SCATTERED, Workload

DEPTHS = (1, 2, 4, 8, 16, 32, 64)
REQUESTS = {'read': (False, 'full'), 'overwrite': (True, 'full'),
            'write new': (True, 'empty')}
WIDTH, HEIGHT, LEFT, GAP = 640, 200, 80, 50


def measure(args, bench):
    """Prints a table, returns what --json is to keep."""
    print(bench_report.heading(args))
    results = []
    for request, (write, image) in REQUESTS.items():
        for depth in DEPTHS if not args.quick else DEPTHS[::3]:
            workload = Workload(4 * KIB, SCATTERED, write, image, depth=depth)
            result = bench.measure(f'{request} 4 KiB, depth {depth}', workload)
            result |= {'request': request, 'depth': depth}
            print(bench_report.line(args, result), flush=True)
            results.append(result)
    return results


def curve(results, name, top, colour, most):
    """Depths are powers of two, and as far apart as their logarithms."""
    depths = [r['depth'] for r in results]
    steps = max(depths[-1].bit_length() - 1, 1)
    points = [(LEFT + WIDTH * (r['depth'].bit_length() - 1) / steps,
               top + HEIGHT * (1 - r['requests_per_second'][name] / most))
              for r in results]
    path = ' '.join(f'{x:.1f},{y:.1f}' for x, y in points)
    return (f'<polyline points="{path}" fill="none" stroke="{colour}" '
            'stroke-width="2"/>')


def axes(results, top, most, title):
    depths = [r['depth'] for r in results]
    steps = max(depths[-1].bit_length() - 1, 1)
    y = top + HEIGHT
    out = [f'<rect x="{LEFT}" y="{top}" width="{WIDTH}" height="{HEIGHT}" '
           'fill="none" stroke="black"/>',
           f'<text x="{LEFT}" y="{top - 6}">{escape(title)}</text>']
    for i in range(5):
        out.append(f'<text x="{LEFT - 6}" y="{y - HEIGHT * i / 4 + 4:.0f}" '
                   f'text-anchor="end">{most * i / 4:.0f}</text>')
    for depth in depths:
        x = LEFT + WIDTH * (depth.bit_length() - 1) / steps
        out.append(f'<text x="{x:.0f}" y="{y + 16}" text-anchor="middle">'
                   f'{depth}</text>')
    return out


def svg(args, results):
    """Requests per second over depth, a picture for each kind."""
    height = 40 + (HEIGHT + GAP) * len(REQUESTS)
    width = LEFT + WIDTH + 30
    out = ['<!-- SPDX-License-Identifier: GPL-2.0-or-later -->',
           f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" '
           f'height="{height}" font-family="sans-serif" font-size="12">',
           '<rect width="100%" height="100%" fill="white"/>']
    for i, name in enumerate(args.formats):
        x, colour = LEFT + 110 * i, bench_report.COLOURS[i]
        out.append(f'<rect x="{x}" y="8" width="12" height="12" '
                   f'fill="{colour}"/><text x="{x + 18}" y="18">'
                   f'{escape(name)}</text>')
    for number, request in enumerate(REQUESTS):
        these = [r for r in results if r['request'] == request]
        top = 50 + (HEIGHT + GAP) * number
        most = 1.05 * max(max(r['requests_per_second'].values())
                          for r in these)
        out += axes(these, top, most,
                    f'{request} 4 KiB: requests per second, by depth')
        out += [curve(these, name, top, bench_report.COLOURS[i], most)
                for i, name in enumerate(args.formats)
                if name in these[0]['requests_per_second']]
    out.append('</svg>')
    return '\n'.join(out) + '\n'
