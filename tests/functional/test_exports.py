# SPDX-License-Identifier: GPL-2.0-or-later
"""The exports of qemu-storage-daemon over a thin image on a LUN."""

import os
import random

from lib.contents import Contents, scan
from lib.context import Skip, check
from lib.guest import Guest
from lib.image import GiB, MiB, create, require_clean
from lib.nbd import NBDClient
from lib.qmp import QMPError
from lib.qsd import StorageDaemon
from lib.testing import ANY, test
from lib.tgt import Target
from lib.vm import VM

SIZE = 1 * GiB


def daemon_with_disk(ctx):
    lun = Target(ctx).add_lun(2 * GiB)
    create(ctx, lun, SIZE)
    daemon = StorageDaemon(ctx)
    daemon.add_disk(lun)
    return lun, daemon


def random_writes(seed, count=300, unit=512):
    """[(offset, data)] with unaligned places and lengths; later ones win."""
    source = random.Random(seed)
    writes = []
    for number in range(count):
        length = unit * source.randrange(1, 300 * 512 // unit)
        offset = unit * source.randrange((64 * MiB - length) // unit)
        writes.append((offset, bytes([number % 255 + 1]) * length))
    return writes


def expected(writes):
    content = bytearray(64 * MiB)
    for offset, data in writes:
        content[offset:offset + len(data)] = data
    return content


def compare(read, content, how):
    for at in range(0, len(content), MiB):
        check(read(at, MiB) == content[at:at + MiB],
              'read back %s, MiB %d differs', how, at // MiB)


@test(formats=ANY)
def nbd(ctx):
    """NBD: writes of odd sizes, zeroes and a trim, read back live and
    after the end."""
    lun, daemon = daemon_with_disk(ctx)
    client = NBDClient(ctx, daemon.export_nbd(), 'disk')
    check(client.size == SIZE, 'the export has %d bytes', client.size)
    writes = random_writes(ctx.name)
    for offset, data in writes:
        client.write(offset, data)
    content = expected(writes)
    client.zero(1 * MiB + 4096, 3 * MiB)
    content[1 * MiB + 4096:4 * MiB + 4096] = bytes(3 * MiB)
    compare(client.read, content, 'by NBD')
    client.trim(200 * MiB, 10 * MiB)
    client.flush()
    client.close()
    daemon.quit()
    require_clean(ctx, lun)
    compare(Contents(ctx, lun).read, content, 'after the end')


@test(formats=ANY)
def vhost_user_blk(ctx):
    """vhost-user-blk: a guest on a disk that the daemon serves from shared
    memory; the daemon's death and the guest's writes are told apart by the
    LUN's contents afterwards."""
    lun, daemon = daemon_with_disk(ctx)
    path = ctx.path('vhost')
    daemon.qmp.cmd_raw('block-export-add', {
        'type': 'vhost-user-blk', 'id': 'vhost', 'node-name': 'disk',
        'writable': True, 'num-queues': 1,
        'addr': {'type': 'unix', 'path': path}})
    guest = Guest(ctx, lanes=4, blocks=800, stride=8192)
    vm = VM(ctx, guest, None, disk=[], device={
        'driver': 'vhost-user-blk-pci', 'chardev': 'vhost',
        'num-queues': 1}, extra=[
            '-chardev', 'socket,id=vhost,path=' + path,
            '-object', 'memory-backend-memfd,id=ram,size=128M,share=on',
            '-machine', 'memory-backend=ram'])
    guest.wait_ready()
    guest.start_writing()
    guest.wait_writes(1500)
    guest.stop_writing()
    guest.verify('read by the guest')
    vm.quit()
    daemon.quit()
    require_clean(ctx, lun)
    guest.model.require(scan(ctx, guest.model, lun), 'acked',
                        'read by qemu-img')


@test(formats=ANY)
def fuse(ctx):
    """FUSE: the image as a file in the file system."""
    if not os.path.exists('/dev/fuse'):
        raise Skip('needs /dev/fuse')
    lun, daemon = daemon_with_disk(ctx)
    path = ctx.path('exported')
    with open(path, 'wb'):
        pass
    try:
        daemon.qmp.cmd_raw('block-export-add', {
            'type': 'fuse', 'id': 'fuse', 'node-name': 'disk',
            'writable': True, 'mountpoint': path})
    except QMPError as err:
        if 'mount' in err.desc.lower() and os.getuid():
            raise Skip('FUSE mounts are not allowed: ' + err.desc) from None
        raise
    writes = random_writes(ctx.name, count=150)
    fd = os.open(path, os.O_RDWR)
    try:
        check(os.fstat(fd).st_size == SIZE, 'the file has %d bytes',
              os.fstat(fd).st_size)
        for offset, data in writes:
            check(os.pwrite(fd, data, offset) == len(data), 'short write')
        os.fsync(fd)
        content = expected(writes)
        compare(lambda offset, length: os.pread(fd, length, offset),
                content, 'through FUSE')
    finally:
        os.close(fd)
    daemon.remove_export('fuse')
    daemon.quit()
    require_clean(ctx, lun)
    compare(Contents(ctx, lun).read, content, 'after the end')
