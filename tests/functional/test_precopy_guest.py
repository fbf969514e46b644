# SPDX-License-Identifier: GPL-2.0-or-later
"""blockdev-precopy and the agent of a guest, together.

A guest with ext4 writes through its page cache, its agent talks to QEMU's
object thinvm-hints, and the disk goes by NBD to another process.
"""

import os

from lib.context import check, wait_for
from lib.files import MIB, START, FilesGuest, blocks_of, partitioned_disk
from lib.image import File, create, require_clean
from lib.qsd import StorageDaemon
from lib.testing import ANY, test

SIZE = 256 * MIB
SOON, COLD, GONE = 16 * MIB, 64 * MIB, 48 * MIB


def begin_copy(ctx, guest, **options):
    """A job to a new disk of another process; (that process, the disk)."""
    place = File(ctx, 'target')
    create(ctx, place, SIZE)
    daemon = StorageDaemon(ctx, host='b')
    daemon.add_disk(place)
    guest.qmp.cmd('blockdev-add', driver='nbd', node_name='far',
                  export='disk', server={'type': 'unix',
                                         'path': daemon.export_nbd()})
    guest.qmp.cmd('blockdev-precopy', job_id='move', device='disk0',
                  target='far', **options)
    return daemon, place


def statistics(guest):
    job, = guest.qmp.cmd('query-block-jobs')
    return job


def wait_job(guest, status, seconds=120):
    wait_for(lambda: {job['id']: job['status'] for job in
                      guest.qmp.cmd('query-jobs')}.get('move') == status,
             seconds, 'the job to be %s' % status)


def heard(guest):
    """What the object knows of the guest's only disk, if it knows any."""
    hints, = guest.qmp.cmd('query-thinvm-hints')
    return hints['disks'][0] if hints['disks'] else {}


def fill(guest, image):
    """Files on the guest's disk: one is in front of the other, one is gone.
    Returns how much the image then has beside the two."""
    guest.ask('mount /dev/vda1 /mnt')
    for name, size in (('soon', SOON), ('cold', COLD), ('gone', GONE)):
        guest.ask('write /mnt/%s 0 %d' % (name, size))
        guest.ask('fsync /mnt/' + name)
    guest.ask('delete /mnt/gone')
    guest.ask('sync')
    check(max(blocks_of(image, START, '/soon')) <
          min(blocks_of(image, START, '/cold')), 'ext4 has another order')
    return os.stat(image).st_blocks * 512 - SOON - COLD


def pass_over(guest, others):
    """The guest says that a file is dirty; the job goes on behind it."""
    guest.qmp.cmd('job-pause', id='move')
    guest.ask('write /mnt/soon 0 %d' % SOON)
    wait_for(lambda: heard(guest).get('dirty-known', 0) >= SOON and
             heard(guest)['ranges'], 120, 'the object has heard of the file')
    guest.qmp.cmd('block-job-set-speed', device='move', speed=4 * MIB)
    guest.qmp.cmd('job-resume', id='move')
    wait_for(lambda: statistics(guest)['sent'] >= others + 8 * MIB, 120,
             'the job is busy with the other file')
    guest.qmp.cmd('job-pause', id='move')
    wait_job(guest, 'paused')


def require_equal(ctx, guest, image, daemon):
    """The job is pending, which holds the guest's writes back."""
    info = ctx.run(ctx.bin('qemu-img'), 'compare', '-U', '-f', 'raw', '-F',
                   'raw', image, daemon.nbd_url(), ok=None)
    check('identical' in info, 'source and target: %s', info.strip())
    guest.process.check_alive()


@test(seconds=300, formats=ANY)
def hints_spare(ctx):
    """What the page cache holds is sent once, when it has been written; what
    was deleted is not sent; and both sides are the same at the end, under
    writes."""
    image = partitioned_disk(ctx, 'disk', SIZE)
    guest = FilesGuest(ctx, [(image, 'the disk')], hints_object='hints')
    # What is written stays in the page cache for 25 s, unless it is synced
    guest.ask('vm dirty_expire_centisecs 2500')
    guest.ask('vm dirty_ratio 80')
    guest.ask('vm dirty_background_ratio 60')
    others = fill(guest, image)
    daemon, place = begin_copy(
        ctx, guest, hints='hints', hints_disk='the%20disk', trim=True,
        speed=65536, auto_finalize=False)
    wait_for(lambda: heard(guest), 120, 'the agent has named its disk')
    pass_over(guest, others - GONE)
    check(statistics(guest)['spared-hints'] == 0, 'spared before a write')
    guest.ask('fsync /mnt/soon')
    spared = statistics(guest)['spared-hints']
    check(spared >= SOON // 2, 'hints have spared %d bytes', spared)

    guest.ask('load /mnt/soon 4 4 300 random sync')
    guest.ask('load /mnt/cold 32 4 100 random buffered')
    guest.qmp.cmd('block-job-set-speed', device='move', speed=0)
    guest.qmp.cmd('job-resume', id='move')
    wait_job(guest, 'ready')
    guest.qmp.cmd('job-complete', id='move')
    wait_job(guest, 'pending')
    require_equal(ctx, guest, image, daemon)
    job = statistics(guest)
    ctx.log('statistics: %s' % job)
    check(job['sent'] - job['resent'] <= SOON + COLD + others - GONE + 8 * MIB,
          'a file that was deleted was sent: %s', job)
    check(job['resent'] <= 12 * MIB, 'sent again: %s', job)
    guest.qmp.cmd('job-finalize', id='move')
    wait_for(lambda: not guest.qmp.cmd('query-jobs'), 60, 'the job ends')

    guest.ask('report')
    wait_for(lambda: int(guest.ask('report').split()[0]), 60,
             'the guest goes on to write')
    guest.ask('unload')
    guest.ask('umount /mnt')
    guest.poweroff()
    daemon.qmp.cmd('quit')
    check(daemon.process.wait(60) == 0, 'the daemon ended badly')
    require_clean(ctx, place)
    ctx.run(ctx.bin('qemu-img'), 'convert', '-O', 'raw', '-f', ctx.fmt,
            place.url, ctx.path('result'))
    ctx.run(ctx.need('e2fsck', 'e2fsprogs'), '-fn',
            '%s?offset=%d' % (ctx.path('result'), START))
