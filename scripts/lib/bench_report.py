# SPDX-License-Identifier: GPL-2.0-or-later
#
# How scripts/bench shows what it has measured: lines of a table, and a
# drawing of the ratios.

from xml.sax.saxutils import escape

NAME_WIDTH = 38
COLOURS = ('#777777', '#c05020', '#d0a030', '#3060a0', '#308050', '#7040a0',
           '#208090')


def others(args):
    return [n for n in args.formats if n != 'thinvm']


def heading(args):
    if args.instructions:
        return (f'{"instructions per request":{NAME_WIDTH}}' +
                ''.join(f'{n:>11}' for n in args.formats) +
                ''.join(f'{n + "-raw":>14}' for n in args.formats
                        if n != 'raw'))
    return (f'{"requests per second":{NAME_WIDTH}}' +
            ''.join(f'{n:>11}' for n in args.formats) +
            ''.join(f'{"/" + n:>11}' for n in others(args)) +
            f'{"spread":>8}' +
            ''.join(f'{"cpu /" + n:>15}' for n in others(args)))


def line(args, result):
    rate = result['requests_per_second']
    against = result['thinvm_against']
    cpu = result['thinvm_against_in_cpu']
    first = next(iter(result['spread'].values()))
    return (f'{result["name"]:{NAME_WIDTH}}' +
            ''.join(f'{rate[n]:11.0f}' if n in rate else f'{"-":>11}'
                    for n in args.formats) +
            ''.join(f'{against[n]["median"]:11.2f}' if n in against
                    else f'{"-":>11}' for n in others(args)) +
            f'{first:8.0%}' +
            ''.join(f'{cpu[n]["median"]:15.2f}' if n in cpu else f'{"-":>15}'
                    for n in others(args)))


def instructions_line(args, result):
    count = result['instructions']
    raw = count.get('raw')
    return (f'{result["name"]:{NAME_WIDTH}}' +
            ''.join(f'{count[n]:11.0f}' if n in count else f'{"-":>11}'
                    for n in args.formats) +
            ''.join(f'{count[n] - raw:14.0f}' if raw and n in count
                    else f'{"-":>14}' for n in args.formats if n != 'raw'))


def svg(args, results):
    """Bars: the speed of each format, raw (else the first) being 1."""
    results = [r for r in results if 'requests_per_second' in r]
    row, bar, left, unit = 14 * len(args.formats) + 16, 12, 270, 260
    height = row * len(results) + 50
    out = ['<!-- SPDX-License-Identifier: GPL-2.0-or-later -->',
           f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + 780}" '
           f'height="{height}" font-family="sans-serif" font-size="12">',
           '<rect width="100%" height="100%" fill="white"/>']
    for i, name in enumerate(args.formats):
        x = left + 110 * i
        colour = COLOURS[i % len(COLOURS)]
        out.append(f'<rect x="{x}" y="8" width="12" height="12" '
                   f'fill="{colour}"/><text x="{x + 18}" y="18">'
                   f'{escape(name)}</text>')
    for number, result in enumerate(results):
        y = 36 + row * number
        rate = result['requests_per_second']
        base = rate.get('raw', next(iter(rate.values())))
        out.append(f'<text x="{left - 8}" y="{y + row / 2 - 4}" '
                   f'text-anchor="end">{escape(result["name"])}</text>')
        for i, name in enumerate(args.formats):
            if name not in rate:
                continue
            ratio = rate[name] / base
            width = max(1, min(ratio, 2.7) * unit)
            top = y + 14 * i
            out.append(f'<rect x="{left}" y="{top}" width="{width:.0f}" '
                       f'height="{bar}" fill="{COLOURS[i % len(COLOURS)]}"/>'
                       f'<text x="{left + width + 4:.0f}" y="{top + 10}" '
                       f'font-size="10">{ratio:.2f}</text>')
    out.append(f'<line x1="{left + unit}" y1="30" x2="{left + unit}" '
               f'y2="{height - 12}" stroke="black" stroke-dasharray="3"/>')
    out.append('</svg>')
    return '\n'.join(out) + '\n'
