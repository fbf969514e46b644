#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Measures what it costs a guest to move, thinvm beside qcow2, on one iSCSI
# target; formats take turns, what counts is the median of the rounds.
#
#   guest    a live migration under full-speed writes: the downtime that QMP
#            reports, and the longest time in which no write was acknowledged
#   reads    a disk that is fully mapped, with one written block in each 32 MiB,
#            so that each read needs another piece of the mapping.  Two storage
#            daemons stand for two hosts.  1000 reads of such blocks in random
#            order, one at a time, on the owner whose cache is warm; then the
#            disk is handed over, and 1000 others on the new owner
#   bytes    that were read from the LUN from the switch on, by the target's own
#            count, less the data of these reads: metadata.  (thinvm's owner
#            also looks at claims, 8 KiB every two seconds.)
#
# qcow2 gets a cache for all of its tables, and so does thinvm.  The programs
# are those of the functional tests (tests/functional/lib).

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent.parent
sys.dont_write_bytecode = True
sys.path.insert(0, str(CHECKOUT / 'tests' / 'functional'))

from lib.context import Context, Failure, wait_for      # noqa: E402
from lib.guest import Guest                             # noqa: E402
from lib.image import GiB, MiB, create                  # noqa: E402
from lib.nbd import READ, NBDClient                     # noqa: E402
from lib.node import query_thinvm                       # noqa: E402
from lib.qsd import StorageDaemon                       # noqa: E402
from lib.tgt import Target                              # noqa: E402
from lib.vm import VM, migrate                          # noqa: E402

APART = 32 * MiB            # a leaf of thinvm's mapping is for that much
BLOCK = 4096
BEYOND = 512 * MiB          # where the guest's own writes do not come
UNITS = {'M': MiB, 'G': GiB, 'T': 1024 * GiB}


class Disk:
    """A LUN with a fully mapped image of a format."""

    def __init__(self, ctx, target, fmt, size):
        self.ctx, self.target, self.fmt = ctx, target, fmt
        self.lun = target.add_lun(size + size // 64 + GiB)
        self.places = list(range(BEYOND, size, APART))
        # 8 bytes of table for each cluster of 64 KiB
        table = max(MiB, size // 8192)
        self.options = {'thinvm': {'mapping_cache_size': table + table // 4},
                        'qcow2': {'l2_cache_size': table}}[fmt]
        create(ctx, self.lun, size, fmt=fmt, options='preallocation=metadata')
        daemon, client = self.open('a')
        acked = client.write_all((at, b'x' * BLOCK) for at in self.places)
        if len(acked) != len(self.places):
            raise Failure('%s: the disk could not be written' % fmt)
        client.flush()
        client.close()
        daemon.quit()

    def open(self, host, active=True):
        daemon = StorageDaemon(self.ctx, host=host)
        daemon.add_disk(self.lun, fmt=self.fmt, active=active, **self.options)
        return daemon, self.client(daemon) if active else None

    def client(self, daemon):
        return NBDClient(self.ctx, daemon.export_nbd(), 'disk')

    def bytes_read(self):
        """From the LUN, by all who are logged in."""
        text = self.target.statistics()
        return sum(int(words[3].split(',')[0]) for words in
                   map(str.split, text.splitlines()[1:])
                   if len(words) > 3 and words[1] == str(self.lun.number))


def read_one_by_one(client, places):
    times = []
    for at in places:
        begin = time.perf_counter()
        client.read(at, BLOCK)
        times.append(time.perf_counter() - begin)
    return times


def read_all(client, places, depth=16):
    for at in places:
        while client.pending() >= depth:
            client.reply()
        client.send(READ, offset=at, length=BLOCK)
    while client.pending():
        client.reply()


def wait_preload(daemon):
    def done():
        follower = query_thinvm(daemon.qmp, 'disk').get('follower') or {}
        return follower.get('preload') == 'complete'
    wait_for(done, 600, 'the follower has preloaded the mapping')


def p99(times):
    return sorted(times)[len(times) * 99 // 100]


def measure_reads(disk, reads, seed):
    places = random.Random(seed).sample(disk.places,
                                        min(2 * reads, len(disk.places)))
    half = len(places) // 2
    first, client = disk.open('a')
    read_all(client, disk.places)               # the cache is warm
    second, _ = disk.open('b', active=False)
    if disk.fmt == 'thinvm':
        wait_preload(second)
    before = read_one_by_one(client, places[:half])
    client.close()
    first.remove_export('nbd-disk')

    read = disk.bytes_read()
    begin = time.perf_counter()
    first.qmp.cmd('blockdev-set-active', node_name='disk', active=False)
    second.qmp.cmd('blockdev-set-active', node_name='disk', active=True)
    switch = time.perf_counter() - begin
    client = disk.client(second)
    after = read_one_by_one(client, places[half:])
    read = disk.bytes_read() - read - len(after) * BLOCK
    client.close()
    result = {
        'switch': switch, 'mean before': statistics.mean(before),
        'mean after': statistics.mean(after), 'p99 before': p99(before),
        'p99 after': p99(after), 'metadata read': read,
        'mean ratio': statistics.mean(after) / statistics.mean(before),
        'p99 ratio': p99(after) / p99(before),
    }
    if disk.fmt == 'thinvm':
        result['metadata read since'] = query_thinvm(
            second.qmp, 'disk')['take-over']['metadata-bytes-read-since']
    first.quit()
    second.quit()
    return result


def measure_guest(ctx, disk):
    ctx.fmt = disk.fmt
    guest = Guest(ctx, blocks=1000)
    source = VM(ctx, guest, disk.lun, host='a')
    guest.wait_ready()
    guest.start_writing()
    guest.wait_writes(500)
    target = VM(ctx, guest, disk.lun, host='b', incoming=True)
    begin = time.monotonic()
    figures = migrate(source, target)
    guest.wait_writes(500)
    gap = guest.longest_gap(begin, time.monotonic())
    guest.stop_writing()
    source.quit()
    target.quit()
    return {'downtime': figures['downtime'] / 1000, 'longest gap': gap}


ROWS = (
    ('downtime', 'ms'), ('longest gap', 'ms'), ('switch', 'ms'),
    ('mean before', 'ms'), ('mean after', 'ms'), ('mean ratio', ''),
    ('p99 before', 'ms'), ('p99 after', 'ms'), ('p99 ratio', ''),
    ('metadata read', 'KiB'), ('metadata read since', 'KiB'),
)


def show(value, unit):
    if unit == 'ms':
        return f'{value * 1000:.2f} ms'
    return f'{value / 1024:.0f} KiB' if unit == 'KiB' else f'{value:.2f}'


def report(args, results):
    print(f'{args.size}, fully mapped, {args.reads} reads, median of '
          f'{args.rounds} (least to most)')
    for row, unit in ROWS:
        cells = []
        for fmt, runs in results.items():
            values = [run[row] for run in runs if row in run]
            if values:
                cells.append(f'{fmt} {show(statistics.median(values), unit)} '
                             f'({show(min(values), unit)} to '
                             f'{show(max(values), unit)})')
        if cells:
            print(f'  {row:20} ' + '; '.join(cells))


def parse_args():
    p = argparse.ArgumentParser(
        description='What a hand-over costs, thinvm beside qcow2.')
    p.add_argument('--build', type=Path, default=CHECKOUT / 'build')
    p.add_argument('--size', default='1T', help='of the disk (default 1T)')
    p.add_argument('--formats', default='thinvm,qcow2')
    p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--reads', type=int, default=1000)
    p.add_argument('--no-guest', action='store_true',
                   help='leave the live migrations out')
    p.add_argument('--seed', type=int, default=1)
    p.add_argument('--json', type=Path, help='all figures to this file')
    args = p.parse_args()
    args.formats = args.formats.split(',')
    if args.size[-1:] not in UNITS or not args.size[:-1].isdigit():
        p.error(f'size {args.size!r}: a number with M, G or T')
    args.bytes = int(args.size[:-1]) * UNITS[args.size[-1]]
    if args.rounds < 1 or args.reads < 1 or args.bytes < 2 * GiB:
        p.error('--rounds and --reads must be positive, --size 2G or more')
    return args


def main():
    args = parse_args()
    results = {fmt: [] for fmt in args.formats}
    with Context('bench-handover', build=str(args.build)) as ctx:
        target = Target(ctx)
        disks = {fmt: Disk(ctx, target, fmt, args.bytes)
                 for fmt in args.formats}
        for number in range(args.rounds):
            turn = args.formats[::-1] if number % 2 else args.formats
            for fmt in turn:
                result = measure_reads(disks[fmt], args.reads,
                                       args.seed + number)
                if not args.no_guest:
                    result.update(measure_guest(ctx, disks[fmt]))
                results[fmt].append(result)
                print(f'round {number + 1}, {fmt}: ' + ', '.join(
                    f'{row} {show(result[row], unit)}' for row, unit in ROWS
                    if row in result), file=sys.stderr, flush=True)
    report(args, results)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1), encoding='utf-8')
    return 0


if __name__ == '__main__':
    try:
        sys.exit(main())
    except Failure as e:
        sys.exit(f'bench-handover: {e}')
