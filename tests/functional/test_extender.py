# SPDX-License-Identifier: GPL-2.0-or-later
"""scripts/thinvm-extender: volumes that grow while guests write.

The volume is a loop device over a file, enlarged by a program of the test as
an array would be by the operator's; root is needed for that.  A second test
needs none: a storage daemon whose disk lies in a file.
"""

import os
import random
import re

from lib.context import Process, TOP, check, wait_for
from lib.guest import Guest
from lib.image import File, GiB, MiB, create, format_node, require_clean
from lib.qsd import StorageDaemon
from lib.testing import test
from lib.vm import NODE, VM
from test_host_device import LoopDevice

EXTEND = '''#!/bin/sh
set -e
test ! -e %(blocked)s || { echo "the array is busy" >&2; exit 5; }
test "$1" = %(device)s
truncate -s "$2" %(backing)s
losetup -c "$1"
'''


class Extender:
    def __init__(self, ctx, sockets, *args):
        self.ctx = ctx
        self.metrics_file = ctx.path('metrics')
        self.args = [os.path.join(TOP, 'scripts', 'thinvm-extender'), 'run',
                     '--qmp', sockets, '--metrics-file', self.metrics_file,
                     *args]
        self.start()

    def start(self):
        self.process = Process(self.ctx, self.ctx.unique('extender'),
                               self.args)

    def metric(self, name):
        """The sum over all volumes; 0 while there is none."""
        self.process.check_alive()
        try:
            with open(self.metrics_file, encoding='utf-8') as file:
                text = file.read()
        except FileNotFoundError:
            return 0
        return sum(float(value) for value in re.findall(
            r'^%s\{[^}]*\} (\S+)$' % name, text, re.M))


def monitor(path):
    """Arguments for a monitor of the extender's own."""
    return ('-chardev', 'socket,id=qmp2,server=on,wait=off,path=' + path,
            '-mon', 'chardev=qmp2,mode=control')


@test()
def guest_on_a_small_volume(ctx):
    """A guest fills a volume that can not be extended at first.

    It stands still without an error, goes on by itself when extending works
    again, and never notices that the extender is killed and started anew.
    """
    device = LoopDevice(ctx, 48 * MiB)
    create(ctx, device, 8 * GiB)
    blocked, program = ctx.path('blocked'), ctx.path('extend')
    with open(blocked, 'w', encoding='utf-8'):
        pass
    with open(program, 'w', encoding='utf-8') as file:
        file.write(EXTEND % {'blocked': blocked, 'device': device.url,
                             'backing': ctx.path('device')})
    os.chmod(program, 0o755)

    guest = Guest(ctx)
    node = format_node(ctx, NODE, NODE + '-file')
    node['space-watermark'] = 16 * MiB
    vm = VM(ctx, guest, device,
            disk=[device.blockdev(NODE + '-file'), node],
            device={'driver': 'virtio-blk-pci', 'drive': NODE, 'id': 'vda',
                    'write-cache': 'on', 'werror': 'enospc'},
            extra=monitor(ctx.path('extender.qmp')))
    extender = Extender(ctx, ctx.path('extender.qm*'), '--backend', 'command',
                        '--command', program + ' {path} {size}',
                        '--chunk', '32M')
    guest.wait_ready()
    guest.start_writing()
    event = vm.qmp.wait_event('THINVM_SPACE_LOW', 120)['data']
    check(event['node-name'] == NODE and event['free'] < 16 * MiB,
          'THINVM_SPACE_LOW says %s', event)
    wait_for(lambda: vm.status() == 'io-error', 120, 'the guest is stopped')
    wait_for(lambda: extender.metric('thinvm_extension_failures_total') > 0,
             60, 'the extender has failed')
    stopped_at = guest.acked_count()

    os.unlink(blocked)
    wait_for(lambda: vm.status() == 'running', 60, 'the guest goes on')
    guest.wait_writes(stopped_at + 300)
    extender.process.kill()
    extender.start()
    guest.wait_writes(stopped_at + 1500)
    guest.stop_writing()
    guest.no_errors()
    wait_for(lambda: extender.metric('thinvm_volume_size_bytes') > 48 * MiB,
             60, 'the metrics tell of the larger volume')
    guest.verify('on the extended volume')
    extender.process.terminate()
    vm.quit()
    require_clean(ctx, device)
    check(os.path.getsize(ctx.path('device')) > 48 * MiB,
          'the volume was never extended')


FULL_SIZE = 10 * 1024       # MiB that are written
DELAYED = '''#!/bin/sh
set -e
test ! -e %(blocked)s || { echo "the array is busy" >&2; exit 5; }
sleep %(delay)s
truncate -s "$2" %(backing)s
losetup -c "$1"
'''


def extending_program(ctx, delay, blocked):
    program = ctx.path('extend')
    with open(program, 'w', encoding='utf-8') as file:
        file.write(DELAYED % {'delay': delay, 'blocked': blocked,
                              'backing': ctx.path('device')})
    os.chmod(program, 0o755)
    return program


def read_some(ctx, device, megabytes):
    """What the guest wrote is on the disk, where we look."""
    some = sorted(random.Random(1).sample(range(megabytes),
                                          min(megabytes, 200)))
    out = ctx.run(ctx.bin('qemu-io'), '-f', ctx.fmt, '-r', *sum(
        [['-c', 'read -P %d %dM 1M' % (n % 251 + 1, n)] for n in some], []),
        device.url)
    check('verification failed' not in out, 'the disk reads otherwise:\n%s',
          out)


def paused_seconds(events):
    """By the times of QEMU's events: (pauses, seconds in all)."""
    pauses, seconds, since = 0, 0.0, None
    for event in events:
        now = (event['timestamp']['seconds'] +
               event['timestamp']['microseconds'] / 1e6)
        if event['event'] == 'STOP':
            pauses, since = pauses + 1, now
        elif event['event'] == 'RESUME' and since is not None:
            seconds, since = seconds + now - since, None
    return pauses, seconds


def fill(ctx, megabytes, delay, watermark, *, start=1 * GiB, chunk='1G',
         limit=0, block=False):
    """A guest writes in sequence what it can, or @limit MiB/s.

    An extension takes @delay seconds; with @block there is none until the
    guest stands still.  Returns its pauses, the seconds in all of these, and
    MiB/s that it wrote.
    """
    device = LoopDevice(ctx, start)
    create(ctx, device, 1024 * GiB)
    blocked = ctx.path('blocked')
    if block:
        with open(blocked, 'w', encoding='utf-8'):
            pass
    program = extending_program(ctx, delay, blocked)
    guest = Guest(ctx)
    node = format_node(ctx, NODE, NODE + '-file')
    node['space-watermark'] = watermark
    monitored = ctx.path(ctx.unique('extender.qmp'))
    vm = VM(ctx, guest, device,
            disk=[device.blockdev(NODE + '-file'), node],
            device={'driver': 'virtio-blk-pci', 'drive': NODE, 'id': 'vda',
                    'write-cache': 'on', 'werror': 'enospc'},
            extra=monitor(monitored))
    extender = Extender(ctx, monitored, '--backend', 'command', '--command',
                        program + ' {path} {size}', '--chunk', chunk)
    guest.wait_ready(300)
    began = len(vm.qmp.events)
    guest.ask('fill lanes=8 blocks=%d limit=%d' % (megabytes, limit),
              'filling')
    if block:
        wait_for(lambda: vm.status() == 'io-error', 900, 'the guest pauses')
        wait_for(lambda: extender.metric('thinvm_extension_failures_total'),
                 60, 'the extender has failed')
        os.unlink(blocked)
    msec, errors = map(int, guest.expect('filled', 3600).split()[1:])
    guest.no_errors()
    check(not errors, 'the guest saw %d errors', errors)
    check(vm.status() == 'running', 'the guest stands still after all')
    pauses, seconds = paused_seconds(vm.qmp.events[began:])
    extender.process.terminate()
    vm.quit()
    require_clean(ctx, device)
    read_some(ctx, device, megabytes)
    length = os.path.getsize(ctx.path('device'))
    ctx.run('losetup', '--detach', device.url, ok=None)
    os.unlink(ctx.path('device'))
    rate = megabytes * 1000 // max(msec, 1)
    ctx.log('growth: %d MiB from %d MiB, watermark %d MiB, delay %s s, %d '
            'MiB/s: %d pauses, %.1f s; volume %d MiB' % (
                megabytes, start // MiB, watermark // MiB, delay, rate,
                pauses, seconds, length // MiB))
    return pauses, seconds, rate


@test(seconds=3600, slow=True)
def ten_gigabytes(ctx):
    """10 GiB as fast as the guest can, on 1 TiB that has 1 GiB at first."""
    pauses, _, _ = fill(ctx, FULL_SIZE, 0.5, 640 * MiB)
    check(not pauses, 'the guest was paused %d times', pauses)


@test(seconds=3600, slow=True)
def ten_gigabytes_blocked(ctx):
    """The same where extending fails at first: it pauses, and goes on."""
    pauses, _, _ = fill(ctx, FULL_SIZE, 0.5, 256 * MiB, block=True)
    check(pauses > 0, 'the guest was never paused')


@test(seconds=7200, slow=True)
def pauses_by_delay(ctx):
    """By rate and delay (scripts/bench-growth); none sees an error."""
    for limit in (20, 50, 0):
        for delay in (0.5, 1, 2, 4):
            fill(ctx, 512, delay, 96 * MiB, start=160 * MiB, chunk='128M',
                 limit=limit)


@test()
def file_grows_ahead(ctx):
    """Backend "file": QEMU enlarges the file; the disk need not be full."""
    place = File(ctx, 'disk')
    create(ctx, place, 4 * GiB)
    daemon = StorageDaemon(ctx, extra=(
        '--chardev', 'socket,id=qmp2,server=on,wait=off,path=' +
        ctx.path('extender.qmp'), '--monitor', 'chardev=qmp2'))
    daemon.add_disk(place, space_watermark=64 * MiB)
    before = daemon.qmp.cmd('query-thinvm')[0]
    extender = Extender(ctx, ctx.path('extender.qmp'), '--backend', 'file',
                        '--chunk', '128M')
    wait_for(lambda: daemon.qmp.cmd('query-thinvm')[0]['device-size'] >=
             128 * MiB, 60, 'the file has grown')
    after = daemon.qmp.cmd('query-thinvm')[0]
    check(not after['space-low'] and after['device-free'] >= 64 * MiB,
          'after %s: %s', before, after)
    wait_for(lambda: extender.metric('thinvm_extensions_total') == 1, 60,
             'one extension is counted')
    extender.process.terminate()
    daemon.quit()
    require_clean(ctx, place)
