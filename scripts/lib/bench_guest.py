# SPDX-License-Identifier: GPL-2.0-or-later
#
# A real guest (of the functional tests, emulated: most of the time is the
# guest's own) that writes 4 KiB at random places as fast as it can, eight
# requests at a time: over virtio-blk with one iothread and with two, over
# vhost-user-blk, and to a LUN of an iSCSI target.  `new` writes meet
# unallocated clusters, `again` those that were written before.

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / 'tests' /
                       'functional'))

from bench_workloads import GIB, VARIANTS                   # noqa: E402
from lib.context import Context, Failure                    # noqa: E402,F401
from lib.guest import Guest                                 # noqa: E402
from lib.image import File, create                          # noqa: E402
from lib.qsd import StorageDaemon                           # noqa: E402
from lib.tgt import Target                                  # noqa: E402
from lib.vm import VM                                       # noqa: E402

SIZE = 32 * GIB
LANES = 8
PHASES = {'new': 40000, 'again': 100}       # blocks of each lane
WAYS = ('virtio-blk', 'virtio-blk, 2 iothreads', 'vhost-user-blk', 'iSCSI')


def vhost_user(ctx, guest, place, fmt):
    """The guest, and the daemon that has its disk."""
    daemon = StorageDaemon(ctx)
    daemon.add_disk(place, fmt=fmt)
    path = ctx.path(ctx.unique('vub'))
    daemon.qmp.cmd('block-export-add', id='v', type='vhost-user-blk',
                   node_name='disk', writable=True,
                   addr={'type': 'unix', 'path': path})
    vm = VM(ctx, guest, place, disk=[], device={
        'driver': 'vhost-user-blk-pci', 'chardev': 'vub', 'num-queues': 1},
        extra=('-object', 'memory-backend-memfd,id=m,size=128M,share=on',
               '-machine', 'memory-backend=m',
               '-chardev', f'socket,id=vub,path={path}'))
    return vm, daemon


def start(ctx, guest, way, place, fmt):
    if way == 'vhost-user-blk':
        return vhost_user(ctx, guest, place, fmt)
    threads = 2 if way.endswith('2 iothreads') else 1
    return VM(ctx, guest, place, fmt=fmt, cpus=2, iothread=threads), None


def writes_per_second(guest, seconds):
    guest.start_writing()
    begin, before = time.monotonic(), guest.acked_count()
    time.sleep(seconds)
    rate = (guest.acked_count() - before) / (time.monotonic() - begin)
    guest.stop_writing()
    return rate


def once(ctx, args, way, fmt, place, phase, seed):
    """Writes per second."""
    create(ctx, place, SIZE, fmt=fmt)
    guest = Guest(ctx, lanes=LANES, blocks=PHASES[phase], flush=1000,
                  seed=seed)
    vm, daemon = start(ctx, guest, way, place, fmt)
    guest.wait_ready()
    if phase == 'again':
        guest.start_writing()
        guest.wait_writes(5 * LANES * PHASES[phase])
        guest.stop_writing()
    rate = writes_per_second(guest, max(args.seconds, 0.5))
    vm.quit()
    if daemon:
        daemon.quit()
    return rate


def measure(args):
    """Prints a table, returns what --json is to keep."""
    names = [n for n in args.formats
             if not VARIANTS[n].options and not VARIANTS[n].create]
    results = []
    print(f'{"writes per second of a guest":34}' +
          ''.join(f'{n:>12}' for n in names) +
          ''.join(f'{"/" + n:>11}' for n in names if n != 'thinvm') +
          f'{"spread":>8}')
    with Context('bench-guest', build=str(args.build)) as ctx:
        lun = Target(ctx).add_lun(SIZE + GIB)
        for way in WAYS:
            for phase in PHASES:
                results.append(compare(ctx, args, way, phase, names, lun))
    return results


def compare(ctx, args, way, phase, names, lun):
    rates = {n: [] for n in names}
    for number in range(args.runs):
        for name in names if number % 2 else reversed(names):
            place = lun if way == 'iSCSI' else File(ctx, 'guest-disk')
            rates[name].append(once(ctx, args, way, VARIANTS[name].fmt, place,
                                    phase, args.seed + number))
            if place is not lun:
                Path(place.path).unlink()
    ratios = [statistics.median(t / o for t, o in
                                zip(rates['thinvm'], rates[n]))
              for n in names if n != 'thinvm']
    first = rates[names[0]]
    spread = (max(first) - min(first)) / statistics.median(first)
    print(f'{way + ", " + phase:34}' +
          ''.join(f'{statistics.median(rates[n]):12.0f}' for n in names) +
          ''.join(f'{r:11.2f}' for r in ratios) + f'{spread:8.0%}',
          flush=True)
    return {'way': way, 'phase': phase, 'rates': rates}
