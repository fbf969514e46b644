# SPDX-License-Identifier: GPL-2.0-or-later
"""A disk on a block device of the host: fixed size, host_device below it.

The device is a loop device, which needs root; where none is to be had, the
test is skipped.
"""

import os

from lib.context import Failure, Skip, check, wait_for
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


def keep_cached(ctx, place):
    """Have this host's page cache know what is there now, and nothing later.

    As long as somebody has the device open, its cache stays."""
    kept = open(place.url, 'rb')
    ctx.cleanup(kept.close)
    kept.read(64 * MiB)


def refused(ctx, says, func, *args, **kwargs):
    try:
        func(*args, **kwargs)
    except QMPError as err:
        ctx.log('refused: ' + err.desc)
        check(says in err.desc, 'message: %s', err.desc)
    else:
        raise Failure('was not refused: %s' % says)


@test()
def create_past_page_cache(ctx):
    """An image that another host has in use is not overwritten by one whose
    page cache is from before it, when the device was blank."""
    there = LoopDevice(ctx, 512 * MiB)
    here = LoopDevice(ctx, 512 * MiB, direct=False)
    keep_cached(ctx, here)
    create(ctx, there, 1 * GiB)
    io, img = ctx.bin('qemu-io'), ctx.bin('qemu-img')
    ctx.run(io, '-n', '-f', ctx.fmt, '-c', 'write -P 7 0 1M', there.url)
    owner = StorageDaemon(ctx)
    owner.add_disk(there)
    text = ctx.run(img, 'create', '-f', ctx.fmt, here.url, '1G',
                   ok=range(1, 120))
    check("Refusing to overwrite '%s'" % here.url in text and
          'owned by process %d' % owner.process.popen.pid in text,
          'message: %s', text.strip())
    other = StorageDaemon(ctx, host='b')
    other.qmp.cmd_raw('blockdev-add', here.blockdev('device'))
    other.qmp.cmd_raw('blockdev-create', {'job-id': 'create', 'options': {
        'driver': ctx.fmt, 'file': 'device', 'size': GiB}})
    job = wait_for(lambda: [j for j in other.qmp.cmd('query-jobs')
                            if j['status'] == 'concluded'], 60,
                   'the job has ended')[0]
    check('owned by process' in job.get('error', 'none'), 'message: %s', job)
    other.quit()
    owner.quit()
    ctx.run(io, '-n', '-r', '-f', ctx.fmt, '-c', 'read -P 7 0 1M', there.url)
    require_clean(ctx, there)


@test()
def reopen_past_page_cache(ctx):
    """A reader that is to write, as the base of a chain that is committed
    does, sees who has owned the image since it was opened, and what he wrote;
    and no owner whose heart beats is displaced."""
    there = LoopDevice(ctx, 512 * MiB)
    create(ctx, there, 1 * GiB)
    io = ctx.bin('qemu-io')
    ctx.run(io, '-n', '-f', ctx.fmt, '-c', 'write -P 1 0 1M', there.url)
    here = LoopDevice(ctx, 512 * MiB, direct=False)
    reader = StorageDaemon(ctx, host='b')
    reader.qmp.cmd_raw('blockdev-add', here.blockdev('disk-file'))
    node = {'driver': ctx.fmt, 'node-name': 'disk', 'file': 'disk-file'}
    reader.qmp.cmd_raw('blockdev-add', {**node, 'read-only': True})
    keep_cached(ctx, here)

    owner = StorageDaemon(ctx)
    owner.add_disk(there)
    for more, says in (({}, 'owned by process'),
                       ({'force-takeover': True}, 'its counter has moved')):
        refused(ctx, says, reader.qmp.cmd_raw, 'blockdev-reopen',
                {'options': [{**node, **more}]})
    url = 'nbd+unix:///disk?socket=' + owner.export_nbd()
    ctx.run(io, '-f', 'raw', '-c', 'write -P 2 0 64k', '-c',
            'write -P 3 8M 1M', url)
    owner.quit()

    reader.qmp.cmd_raw('blockdev-reopen', {'options': [node]})
    url = 'nbd+unix:///disk?socket=' + reader.export_nbd()
    ctx.run(io, '-f', 'raw', '-c', 'read -P 2 0 64k', '-c',
            'read -P 1 64k 64k', '-c', 'read -P 3 8M 1M', '-c',
            'write -P 4 16M 1M', '-c', 'flush', url)
    reader.quit()
    ctx.run(io, '-n', '-r', '-f', ctx.fmt, '-c', 'read -P 2 0 64k', '-c',
            'read -P 3 8M 1M', '-c', 'read -P 4 16M 1M', there.url)
    require_clean(ctx, there)
