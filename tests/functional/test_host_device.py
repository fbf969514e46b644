# SPDX-License-Identifier: GPL-2.0-or-later
"""A disk on a block device of the host: fixed size, host_device below it.

The device is a loop device, which needs root; where none is to be had, the
test is skipped.
"""

import os

from lib.context import Failure, Skip, check
from lib.guest import Guest
from lib.image import GiB, MiB, create, info, require_clean
from lib.qmp import QMPError
from lib.qsd import StorageDaemon
from lib.testing import test
from lib.vm import VM


class LoopDevice:
    """A place on a loop device over a file of the test's directory.

    Two of them over one file have a page cache each, as two hosts have that
    share a device."""

    def __init__(self, ctx, size, direct=True):
        self.direct = direct
        backing = ctx.path('device')
        with open(backing, 'ab') as file:
            file.truncate(size)
        if os.geteuid() != 0 or not os.path.exists('/dev/loop-control'):
            raise Skip('needs root and loop devices')
        self.url = ctx.run('losetup', '--find', '--show', backing,
                           ok=None).strip()
        if not self.url.startswith('/dev/loop'):
            raise Skip('losetup gives no device: ' + self.url)
        ctx.cleanup(ctx.run, 'losetup', '--detach', self.url, ok=None)

    def blockdev(self, node, host='a'):
        del host                    # all processes see the same device
        return {'driver': 'host_device', 'node-name': node,
                'filename': self.url, 'cache': {'direct': self.direct}}


@test()
def guest_on_it(ctx):
    """A guest writes, and reads what it wrote; the image is clean after."""
    device = LoopDevice(ctx, 512 * MiB)
    create(ctx, device, 4 * GiB)
    guest = Guest(ctx)
    vm = VM(ctx, guest, device)
    guest.wait_ready()
    guest.start_writing()
    guest.wait_writes(800)
    guest.stop_writing()
    guest.verify('on the host device')
    vm.quit()
    require_clean(ctx, device)
    check(info(ctx, device)['virtual-size'] == 4 * GiB,
          'the virtual size has changed')


@test()
def full(ctx):
    """What does not fit is refused; the image stays clean and readable."""
    device = LoopDevice(ctx, 64 * MiB)
    create(ctx, device, 1 * GiB)
    io = ctx.bin('qemu-io')
    ctx.run(io, '-n', '-f', ctx.fmt, '-c', 'write -P 7 900M 8M', device.url)
    text = ctx.run(io, '-n', '-f', ctx.fmt, '-c', 'write 0 128M', device.url,
                   ok=range(1, 120))
    check('No space left' in text, 'a full device says: %s', text.strip())
    ctx.run(io, '-n', '-f', ctx.fmt, '-c', 'read -P 7 900M 8M', device.url)
    require_clean(ctx, device)


@test()
def old_page_cache(ctx):
    """What a host's page cache holds of a shared device may be old, also the
    claims in it: reading through it while another owns the image is refused,
    for the disk and for a snapshot, and works past it."""
    there = LoopDevice(ctx, 512 * MiB)
    create(ctx, there, 1 * GiB)
    here = LoopDevice(ctx, 512 * MiB, direct=False)
    io, img = ctx.bin('qemu-io'), ctx.bin('qemu-img')
    ctx.run(io, '-n', '-f', ctx.fmt, '-c', 'write -P 7 0 1M', there.url)
    ctx.run(img, 'snapshot', '-c', 'snap', there.url)
    with open(here.url, 'rb') as kept:
        # As long as somebody has the device open, its cache stays.
        kept.read(4 * MiB)
        owner = StorageDaemon(ctx)
        owner.add_disk(there)
        reader = StorageDaemon(ctx, host='b')
        for more in ({}, {'snapshot': {'name': 'snap'}}):
            try:
                reader.add_disk(here, node='n%d' % len(more), read_only=True,
                                **more)
            except QMPError as err:
                ctx.log('refused: ' + err.desc)
                check('cache.direct=on' in err.desc or
                      'page cache' in err.desc, 'message: %s', err.desc)
            else:
                raise Failure('an image that another host owns was opened '
                              'through the page cache (%s)' % more)
        here.direct = True
        reader.add_disk(here, node='direct', read_only=True,
                        **{'snapshot': {'name': 'snap'}})
        reader.quit()
        owner.quit()
    require_clean(ctx, there)
