# SPDX-License-Identifier: GPL-2.0-or-later
"""Space goes back to a thin LUN: UNMAP commands, counted on the wire.

The target is tgt, whose thin LUNs are sparse files.  It is made to say that
it takes space back in units of 1 MiB, as arrays do: sixteen clusters.
"""

import json
import os
import random
import subprocess
import sys

from lib.context import TOP, check, wait_for
from lib.files import FilesGuest, initramfs
from lib.image import GiB, MiB, create, format_node, require_clean
from lib.nbd import TRIM, NBDClient
from lib.qsd import StorageDaemon
from lib.testing import test
from lib.tgt import Target
from lib.unmaps import Unmaps

sys.path.insert(0, os.path.join(TOP, 'scripts', 'lib'))
from thinvm_extender.daemon import path_of      # noqa: E402

CLUSTER = 64 * 1024
AREA = 64 * MiB
UNIT = 1 * MiB


def sizes(unmaps):
    """For the log: how many of which size."""
    lengths = [length for _, length in unmaps]
    return '%d UNMAPs, %d MiB, smallest %d KiB, largest %d KiB' % (
        len(lengths), sum(lengths) // MiB, min(lengths, default=0) // 1024,
        max(lengths, default=0) // 1024)


def node_on_lun(ctx, daemon, lun, node, interval):
    """A disk that passes discards on."""
    protocol = dict(lun.blockdev(node + '-file'), discard='unmap')
    daemon.qmp.cmd_raw('blockdev-add', protocol)
    daemon.qmp.cmd_raw('blockdev-add', format_node(
        ctx, node, node + '-file', interval=interval, discard='unmap'))


@test()
def pieces(ctx):
    """Clusters that are discarded one by one, in any order, go back in whole
    aligned units, each of them once; what is in use does not."""
    lun = Target(ctx).add_lun(512 * MiB)
    create(ctx, lun, 1 * GiB)
    unmaps = Unmaps(ctx, UNIT)
    daemon = StorageDaemon(ctx, env=unmaps.env)
    node_on_lun(ctx, daemon, lun, 'disk', 100)
    client = NBDClient(ctx, daemon.export_nbd(), 'disk')
    client.write_all((n * MiB, bytes([n % 251 + 1]) * MiB)
                     for n in range(AREA // MiB + 4))
    client.flush()
    before = lun.used()
    check(before >= AREA and not unmaps.of(lun), 'the LUN has %d bytes in '
          'use, %s', before, sizes(unmaps.of(lun)))

    def free():
        return daemon.qmp.cmd('query-thinvm')[0]['device-free']

    begin = free()
    order = list(range(AREA // CLUSTER))
    random.Random(8).shuffle(order)
    for batch in range(16):
        for n in order[batch * len(order) // 16:
                       (batch + 1) * len(order) // 16]:
            client.send(TRIM, offset=n * CLUSTER, length=CLUSTER)
        while client.pending():
            check(client.reply()[1] == 0, 'a discard failed')
        client.flush()
        wait_for(lambda: free() >= begin + (batch + 1) * AREA // 16, 60,
                 'what was discarded is free')
    # The units at both ends are shared with what stays
    wait_for(lambda: before - lun.used() >= AREA - 2 * UNIT, 60,
             'all is given back')
    found = unmaps.of(lun)
    unmaps.check_aligned(lun)
    ctx.log('growth: 1024 discards of 64 KiB: %s; the LUN has %d MiB of %d '
            'in use' % (sizes(found), lun.used() // MiB, before // MiB))
    check(unmaps.total(lun) <= AREA, 'more is given back than was '
          'discarded: %s', sizes(found))
    for n in range(AREA // MiB, AREA // MiB + 4):
        check(client.read(n * MiB, MiB) == bytes([n % 251 + 1]) * MiB,
              'MiB %d reads otherwise', n)
    check(not any(client.read(5 * MiB, MiB)), 'what was discarded is not zero')
    client.close()
    daemon.quit()
    require_clean(ctx, lun)


def file_system(ctx, lun, size):
    """ext4 on a thinvm disk on the LUN."""
    raw = ctx.path('fs')
    with open(raw, 'wb') as file:
        file.truncate(size)
    subprocess.run(['/usr/sbin/mkfs.ext4', '-q', '-F', '-b', '4096', raw],
                   check=True)
    create(ctx, lun, size)
    ctx.run(ctx.bin('qemu-img'), 'convert', '-n', '-f', 'raw', '-O', ctx.fmt,
            raw, lun.url)


@test(seconds=900)
def fstrim(ctx):
    """A guest deletes files and trims its file systems, by virtio-blk and by
    virtio-scsi: the space is back on the LUNs, by few commands."""
    target = Target(ctx)
    luns = [target.add_lun(512 * MiB) for _ in range(2)]
    unmaps = Unmaps(ctx, UNIT)
    extra = ['-device', 'virtio-scsi-pci,id=scsi']
    for number, lun in enumerate(luns):
        file_system(ctx, lun, 256 * MiB)
        for node in (dict(lun.blockdev('file%d' % number), discard='unmap'),
                     format_node(ctx, 'disk%d' % number, 'file%d' % number,
                                 interval=100, discard='unmap')):
            extra += ['-blockdev', json.dumps(node)]
        extra += ['-device', '%s,drive=disk%d' % (
            ('virtio-blk-pci', 'scsi-hd,bus=scsi.0')[number], number)]
    guest = FilesGuest(ctx, [], extra, env=unmaps.env,
                       boot=initramfs(ctx, with_agent=False))
    for lun, device in zip(luns, ('/dev/vda', '/dev/sda')):
        guest.ask('mount %s /mnt' % device)
        guest.ask('write /mnt/kept 0 %d' % (8 * MiB))
        guest.ask('write /mnt/gone 0 %d' % (96 * MiB))
        guest.ask('sync')
        before = lun.used()
        guest.ask('delete /mnt/gone')
        guest.ask('sync')
        guest.ask('trim /mnt')
        wait_for(lambda: before - lun.used() >= 92 * MiB, 60,
                 'what was trimmed is given back')
        unmaps.check_aligned(lun)
        found = unmaps.of(lun)
        ctx.log('growth: fstrim of 96 MiB by %s: %s; the LUN had %d MiB in '
                'use, has %d' % (device, sizes(found), before // MiB,
                                 lun.used() // MiB))
        check(len(found) <= 32, 'it took %s', sizes(found))
        guest.ask('umount /mnt')
    guest.poweroff()
    for lun in luns:
        require_clean(ctx, lun)


@test()
def extended(ctx):
    """The array makes the LUN longer, twice: thinvm-grow takes that into use
    at once; without it, it is noticed when space runs low."""
    target = Target(ctx)
    lun = target.add_lun(48 * MiB)
    create(ctx, lun, 1 * GiB, options='journal_size=1M')
    daemon = StorageDaemon(ctx)
    daemon.add_disk(lun, interval=50, space_watermark=8 * MiB)

    def info():
        return daemon.qmp.cmd('query-thinvm')[0]

    # What the extender's command would be given
    node, = [node for node in daemon.qmp.cmd('query-named-block-nodes')
             if node['node-name'] == 'disk']
    check(path_of(node['file']) == lun.url, 'the path is %s, the LUN %s',
          path_of(node['file']), lun.url)
    client = NBDClient(ctx, daemon.export_nbd(), 'disk')
    client.write(0, b'a' * MiB)
    target.extend(lun, 64 * MiB, daemon.process)
    grown = daemon.qmp.cmd('thinvm-grow', node_name='disk')
    check(grown['device-size'] == 64 * MiB, 'it has %s', grown)
    for n in range(1, (grown['device-free'] // MiB) - 4):
        client.write(n * MiB, bytes([n]) * MiB)
    event = daemon.qmp.wait_event('THINVM_SPACE_LOW', 20)['data']
    check(event['size'] == 64 * MiB, 'the event is %s', event)
    target.extend(lun, 96 * MiB, daemon.process)
    wait_for(lambda: info()['device-size'] == 96 * MiB, 20, 'it is noticed')
    check(not info()['space-low'], 'it says %s', info())
    check(client.read(0, MiB) == b'a' * MiB, 'it reads otherwise')
    client.close()
    daemon.quit()
    require_clean(ctx, lun)
