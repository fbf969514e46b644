# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest on a thin disk on an iSCSI LUN: it writes, all is there."""

from lib.contents import scan
from lib.context import check, wait_for
from lib.guest import Guest
from lib.image import GiB, MiB, create, info, require_clean
from lib.testing import ANY, OURS, THIN, test
from lib.tgt import Target
from lib.vm import NODE, VM


@test(formats=ANY)
def writes_and_verifies(ctx):
    """Mixed writes, zeroes and discards from four lanes, seen from both
    sides: by the guest itself and, after shutdown, by qemu-img."""
    lun = Target(ctx).add_lun(4 * GiB)
    create(ctx, lun, 2 * GiB)
    guest = Guest(ctx, zero=5, discard=5, stride=8192)
    vm = VM(ctx, guest, lun)
    guest.wait_ready()
    guest.start_writing()
    guest.wait_writes(3000)
    guest.stop_writing()
    guest.verify('read by the guest')
    vm.quit()
    require_clean(ctx, lun)
    path = ctx.path('raw')
    ctx.run(ctx.bin('qemu-img'), 'convert', '-f', ctx.fmt, '-O', 'raw',
            lun.url, path)
    file = open(path, 'rb')
    ctx.cleanup(file.close)

    def read(offset, length):
        file.seek(offset)
        return file.read(length)

    guest.model.require(guest.model.scan(read), 'acked', 'read by qemu-img')


@test(formats=THIN)
def disk_is_thin(ctx):
    """A disk larger than its LUN is made at once and takes what is written,
    not what it promises."""
    lun = Target(ctx).add_lun(1 * GiB)
    create(ctx, lun, 16 * GiB)
    empty = lun.used()
    check(empty < 8 * MiB, 'an empty disk takes %d bytes of the LUN', empty)
    guest = Guest(ctx, lanes=2, blocks=400, stride=16 * MiB)
    vm = VM(ctx, guest, lun)
    guest.wait_ready()
    size = int(guest.ask('size', 'size').split()[1])
    check(size == 16 * GiB, 'the guest sees a disk of %d bytes', size)
    guest.start_writing()
    guest.wait_writes(800)
    guest.stop_writing()
    guest.verify('read by the guest')
    vm.quit()
    require_clean(ctx, lun)
    check(info(ctx, lun)['virtual-size'] == 16 * GiB, 'the size has changed')
    used = lun.used()
    check(used < 160 * MiB, '800 blocks of 4 KiB take %d bytes', used)


@test(formats=OURS)
def several_queues(ctx):
    """Two virtual CPUs, two queues and an iothread; small strides, so that
    lanes meet in the same clusters."""
    lanes_meet(ctx, 1)


@test(formats=OURS)
def several_iothreads(ctx):
    """The same with an iothread for each queue: two threads are in the driver
    at a time, on the same clusters."""
    lanes_meet(ctx, 2)


def lanes_meet(ctx, iothreads):
    lun = Target(ctx).add_lun(1 * GiB)
    create(ctx, lun, 1 * GiB)
    guest = Guest(ctx, lanes=8, blocks=700, stride=4096, zero=3, discard=3)
    vm = VM(ctx, guest, lun, cpus=2, iothread=iothreads)
    guest.wait_ready()
    guest.start_writing()
    guest.wait_writes(5000)
    guest.stop_writing()
    found = guest.verify('read by the guest')
    guest.model.rebase(found)
    guest.start_writing()
    guest.wait_writes(2000)
    guest.stop_writing()
    guest.verify('read by the guest after a second run')
    vm.quit()
    require_clean(ctx, lun)


@test(formats=THIN)
def full_device_keeps_data(ctx):
    """A LUN that is full costs the guest the writes that do not fit, and
    nothing else: what was acknowledged stays, the image is clean."""
    lun = Target(ctx).add_lun(96 * MiB)
    create(ctx, lun, 1 * GiB)
    guest = Guest(ctx, lanes=2, blocks=2000, stride=65536)
    vm = VM(ctx, guest, lun, device={
        'driver': 'virtio-blk-pci', 'drive': NODE, 'werror': 'report'})
    guest.wait_ready()
    guest.start_writing()
    wait_for(lambda: len(guest.errors) >= 2, 120, 'both lanes meet the end')
    guest.ask('stop', 'stopped')
    check('error' in guest.errors[0] or 'No space' in guest.errors[0],
          'the guest reports "%s"', guest.errors[0])
    check(guest.acked_count() > 500, 'the device was full after %d writes',
          guest.acked_count())
    guest.errors = []
    guest.verify('read by the guest when the device is full')
    vm.quit()
    require_clean(ctx, lun)
    guest.model.require(scan(ctx, guest.model, lun), 'acked',
                        'read when the device is full')


@test(formats=THIN)
def full_device_pauses_the_guest(ctx):
    """By default a guest whose device is full is paused, so that space can
    be found; what it had been told is written is there."""
    lun = Target(ctx).add_lun(96 * MiB)
    create(ctx, lun, 1 * GiB)
    guest = Guest(ctx, lanes=2, blocks=2000, stride=65536, flush=0)
    vm = VM(ctx, guest, lun)
    guest.wait_ready()
    guest.start_writing()
    event = vm.qmp.wait_event('BLOCK_IO_ERROR', 120)
    check(event['data'].get('nospace') and event['data']['action'] == 'stop',
          'the full device makes the event %s', event['data'])
    wait_for(lambda: vm.status() == 'io-error', 20, 'the guest is paused')
    vm.qmp.cmd('cont')
    vm.qmp.wait_event('BLOCK_IO_ERROR', 60)
    vm.kill()
    require_clean(ctx, lun)
    guest.model.require(scan(ctx, guest.model, lun), 'acked',
                        'after the guest was paused')
