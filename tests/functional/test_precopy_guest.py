# SPDX-License-Identifier: GPL-2.0-or-later
"""blockdev-precopy and the agent of a guest, together.

A guest with ext4 writes through its page cache, its agent talks to QEMU's
object thinvm-hints, and the disk goes by NBD to another process.
"""

from lib.context import check, wait_for
from lib.files import MIB, START, FilesGuest, blocks_of, partitioned_disk
from lib.image import File, create, require_clean
from lib.nbd import NBDClient
from lib.qsd import StorageDaemon
from lib.testing import ANY, test

SIZE = 256 * MIB
FILES, ONE, GONE = 8, 16 * MIB, 24 * MIB


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
    """Files on the guest's disk; one is deleted.  Returns (path, sorted places
    of the blocks) of the others in the order in which they lie on the disk,
    which is the file system's choice."""
    guest.ask('mount /dev/vda1 /mnt')
    sizes = [('/f%d' % number, ONE) for number in range(FILES)]
    for name, size in sizes + [('/gone', GONE)]:
        guest.ask('write /mnt%s 0 %d' % (name, size))
        guest.ask('fsync /mnt' + name)
    guest.ask('delete /mnt/gone')
    guest.ask('sync')
    return sorted([('/mnt' + name, sorted(blocks_of(image, START, name)))
                   for name, _ in sizes], key=lambda file: file[1])


def pass_over(ctx, guest, daemon, files):
    """The guest says that the second file is dirty; the job, which has not
    come to the first, goes on to the third.  The target tells where it is:
    how much was sent does not, as it need not begin where the disk does."""
    target = NBDClient(ctx, daemon.nbd_path(), 'disk')
    before, (soon, blocks), behind = files

    def was_sent(block):
        return any(target.read(block, 4096))

    guest.qmp.cmd('job-pause', id='move')
    wait_job(guest, 'paused')
    check(before[1][-1] < blocks[0] and blocks[-1] < behind[1][0],
          'the files lie within each other')
    check(not was_sent(before[1][-1]) and not was_sent(blocks[0]),
          'the job is too far already')
    guest.ask('write %s 0 %d' % (soon, ONE))
    wait_for(lambda: heard(guest).get('dirty-known', 0) >= ONE and
             heard(guest)['ranges'], 120, 'the object has heard of the file')
    guest.qmp.cmd('block-job-set-speed', device='move', speed=6 * MIB)
    guest.qmp.cmd('job-resume', id='move')
    wait_for(lambda: was_sent(behind[1][1024]), 120,
             'the job is busy with the file behind')
    guest.qmp.cmd('job-pause', id='move')
    wait_job(guest, 'paused')
    check(was_sent(before[1][-1]), 'the job has begun behind the dirty file')
    target.close()


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
    files = fill(guest, image)
    daemon, place = begin_copy(
        ctx, guest, hints='hints', hints_disk='the%20disk', trim=True,
        speed=65536, auto_finalize=False)
    wait_for(lambda: heard(guest), 120, 'the agent has named its disk')
    # The job begins where 3/8 of what there is lie in front; so much fits into
    # four files, wherever on the disk all that is no file of ours may lie
    files = files[3:6]
    pass_over(ctx, guest, daemon, files)
    check(statistics(guest)['spared-hints'] == 0, 'spared before a write')
    guest.ask('fsync ' + files[1][0])
    spared = statistics(guest)['spared-hints']
    check(spared >= ONE // 2, 'hints have spared %d bytes', spared)

    guest.ask('load %s 4 4 300 random sync' % files[1][0])
    guest.ask('load %s 16 4 100 random buffered' % files[2][0])
    guest.qmp.cmd('block-job-set-speed', device='move', speed=0)
    guest.qmp.cmd('job-resume', id='move')
    wait_job(guest, 'ready')
    guest.qmp.cmd('job-complete', id='move')
    wait_job(guest, 'pending')
    require_equal(ctx, guest, image, daemon)
    job = statistics(guest)
    ctx.log('statistics: %s' % job)
    check(job['sent'] - job['resent'] <= FILES * ONE + GONE // 2,
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
