# SPDX-License-Identifier: GPL-2.0-or-later
"""Real LVM: volumes that scripts/thinvm-extender extends on real volume
groups, plain ones and ones that two hosts share by lvmlockd and sanlock.

The hosts are guests (lib/lvmhost.py), since the machine under the tests has no
device mapper.  Each runs Debian's LVM, our storage daemon, and the extender.
"""

import re
import threading

from lib.context import Failure, check, wait_for
from lib.image import GiB, MiB
from lib.lvmhost import LvmHost, SharedDisk, make_initrd
from lib.qmp import QMPError
from lib.testing import test

WATERMARK = 96 * MiB
COPIED = 320                    # MiB of a mirror's source
START = 160                     # MiB of a volume at first


def extensions(host):
    """Seconds that each extension took, by the extender's log."""
    return [float(s) for s in re.findall(r'bytes after ([\d.]+) s',
                                         host.extender_log())]


def size_of(daemon):
    return daemon.qmp.cmd('query-thinvm')[0]['device-size']


def free_of(daemon):
    return daemon.qmp.cmd('query-thinvm')[0]['device-free']


def wait_connected(host, count):
    """The extender has found the disks that the test has opened so far."""
    wait_for(lambda: host.extender_log().count('connected') == count, 300,
             'the extender has found %d disks' % count, interval=0.5)


def check_disk(host, volume):
    host.sh('qemu-img check -f thinvm /dev/' + volume, seconds=900)


def close(daemon):
    """End a storage daemon, as its own clean end."""
    daemon.end('TERM')


@test(seconds=900)
def plain_group(ctx):
    """One host, a group without locks: the volume grows while it is written,
    takes what is left when that is less than a chunk, and says what to do
    when there is nothing."""
    disk = SharedDisk(ctx, 'only', 160 * MiB)
    more = SharedDisk(ctx, 'more', 96 * MiB)
    host = LvmHost(ctx, 1, make_initrd(ctx, shared=False), [disk, more])
    host.wait_ready()
    host.sh('vgcreate vg %s && lvcreate -L 64M -n disk vg && '
            'qemu-img create -f thinvm /dev/vg/disk 1T' % host.device(disk))
    daemon = host.open_disk('vg/disk', **{'space-watermark': 24 * MiB})
    host.start_extender('64M')
    wait_connected(host, 1)
    host.write(0, 120)
    wait_for(lambda: 'vgextend' in host.extender_log(), 300,
             'the extender says what to do', interval=0.5)
    check(size_of(daemon) == 156 * MiB, 'the volume has %d bytes, which is '
          'not all of its group', size_of(daemon))
    host.sh('vgextend vg ' + host.device(more))
    wait_for(lambda: free_of(daemon) >= 24 * MiB, 300,
             'the volume has grown into the new space', interval=0.5)
    host.write(120, 140)
    host.read(0, 140)
    ctx.log('extensions: %s' % extensions(host))
    close(daemon)
    check_disk(host, 'vg/disk')


class Cluster:
    """Two hosts that share a volume group."""

    def __init__(self, ctx, size, *more):
        self.ctx = ctx
        self.disk = SharedDisk(ctx, 'san', size)
        self.disks = [self.disk, *more]
        self.initrd = make_initrd(ctx)
        self.hosts = [LvmHost(ctx, n, self.initrd, self.disks)
                      for n in (1, 2)]
        one, two = self.hosts
        for host in self.hosts:
            host.wait_ready()
            host.sh('locks_on')
        one.sh('vgcreate --shared vg ' + one.device(self.disk), seconds=900)
        two.sh('lock_start vg', seconds=900)

    def volume(self, host, name, port='a', size='1T'):
        """A new image on a new volume that is active on @host alone."""
        host.sh('lvcreate -an -L %dM -n %s vg && lvchange -aey vg/%s && '
                'qemu-img create -f thinvm /dev/vg/%s %s'
                % (START, name, name, name, size))
        return host.open_disk('vg/' + name, port,
                              **{'space-watermark': WATERMARK})


def at_once(*works):
    """Run functions side by side; the first failure counts."""
    failures = []

    def run(work):
        try:
            work()
        except Exception as err:
            failures.append(err)
    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@test(seconds=3600, slow=True)
def two_hosts_extend(ctx):
    """Two hosts write to volumes of one group as fast as they can, and both
    extenders extend; one waits while the group's lock is held elsewhere; when
    the group is full a mirror waits for space, and goes on."""
    source = SharedDisk(ctx, 'source', COPIED * MiB)
    with open(source.path, 'r+b') as file:
        for n in range(COPIED):
            file.write(bytes([(n + 7) % 255 + 1]) * MiB)
    more = SharedDisk(ctx, 'more', 1 * GiB)
    cluster = Cluster(ctx, 6 * GiB, source, more)
    one, two = cluster.hosts
    daemons = [cluster.volume(host, name) for host, name in
               ((one, 'first'), (two, 'second'))]
    for host in cluster.hosts:
        host.start_extender('128M')
        wait_connected(host, 1)
    at_once(lambda: one.write(0, 400), lambda: two.write(0, 400, 100))
    at_once(lambda: one.read(0, 400), lambda: two.read(0, 400, 100))
    for host, daemon, name in zip(cluster.hosts, daemons,
                                  ('first', 'second')):
        check(size_of(daemon) >= 400 * MiB, 'the volume of host %d has %d '
              'bytes', host.number, size_of(daemon))
        ctx.log('host %d: seconds of extensions: %s'
                % (host.number, extensions(host)))
        close(daemon)
        check_disk(host, 'vg/' + name)

    daemon = cluster.volume(one, 'third')
    wait_connected(one, 2)
    held_lock(one, two, daemon)
    close(daemon)
    daemon = cluster.volume(one, 'fourth', 'b', '%dM' % COPIED)
    wait_connected(one, 3)
    full_group(ctx, one, daemon, source, more)
    one.read(0, COPIED, 7, port='b')
    close(daemon)
    check_disk(one, 'vg/fourth')


def held_lock(one, two, daemon):
    """LVM gives up after some 20 s; the extender tries again."""
    # This command asks a question while it has the lock.
    two.sh('lvcreate -L 16M -n small vg')
    two.sh('mkfifo /tmp/answer; '
           'lvreduce -L 8M vg/small < /tmp/answer > /tmp/held 2>&1 & '
           'exec 7> /tmp/answer; '
           'until lvmlockctl --info | grep -q "LK VG ex"; do '
           'usleep 100000; done')
    before = size_of(daemon)
    one.write(0, 64)
    wait_for(lambda: 'another host is changing the volume group' in
             one.extender_log(), 300, 'the extender is told that the lock is '
             'held', interval=1)
    check(size_of(daemon) == before, 'the volume was extended in spite of '
          'the lock')
    two.sh('echo n >&7; exec 7>&-')
    wait_for(lambda: size_of(daemon) > before, 300,
             'the volume is extended when the lock is free', interval=1)
    two.sh('cat /tmp/held; lvremove -y vg/small')


def full_group(ctx, one, daemon, source, more):
    """A mirror to a volume that can not grow waits, without an error."""
    free = int(one.sh('vgs --noheadings --nosuffix --units m -o vg_free vg')
               [1].split('.')[0])
    one.sh('lvcreate -an -L %dM -n ballast vg' % (free - 16))
    daemon.qmp.cmd_raw('blockdev-add', {
        'driver': 'host_device', 'node-name': 'source',
        'filename': one.device(source)})
    daemon.qmp.cmd('block-export-del', id='e')
    daemon.qmp.wait_event('BLOCK_EXPORT_DELETED', 60)
    daemon.qmp.cmd_raw('blockdev-mirror', {
        'job-id': 'copy', 'device': 'source', 'target': 'disk',
        'sync': 'full', 'on-target-error': 'enospc'})
    wait_for(lambda: [j for j in daemon.qmp.cmd('query-block-jobs')
                      if j['io-status'] == 'nospace'], 600,
             'the mirror waits for space', interval=0.5)
    wait_for(lambda: 'vgextend' in one.extender_log(), 300,
             'the extender says what to do', interval=0.5)
    one.sh('vgextend vg ' + one.device(more), seconds=900)
    daemon.qmp.wait_event('BLOCK_JOB_READY', 600)
    daemon.qmp.cmd('block-job-complete', device='copy')
    completed = daemon.qmp.wait_event('BLOCK_JOB_COMPLETED', 300)['data']
    check('error' not in completed, 'the mirror failed: %s', completed)
    one.export(daemon)
    log = one.extender_log()
    check('the job copy goes on' in log, 'the extender did not resume it')
    ctx.log('the job was resumed %d times' % log.count('goes on'))


@test(seconds=3600, slow=True)
def hand_over(ctx):
    """A volume that is active on both hosts, as for a live migration, grows
    by what one writes, and the other sees it; it is handed over; its host
    loses power, and the first one gets it back when sanlock says so."""
    cluster = Cluster(ctx, 3 * GiB)
    one, two = cluster.hosts
    daemon = cluster.volume(one, 'disk')
    for host in cluster.hosts:
        host.start_extender('128M')
    wait_connected(one, 1)
    one.write(0, 200)
    status, text = two.sh('lvchange -aey vg/disk', ok=False)
    check(status and 'locked by other host' in text, 'two hosts could have '
          'the volume: %s', text)

    one.sh('lvchange -asy vg/disk')
    two.sh('lvchange -asy vg/disk')
    follower = two.open_disk('vg/disk', offer=False,
                             **{'mapping-cache-mode': 'migration',
                                'space-watermark': WATERMARK})
    before = two.volume_size('vg/disk')
    one.write(200, 400)
    check(one.volume_size('vg/disk') > before, 'the volume was not extended')
    wait_for(lambda: two.volume_size('vg/disk') == one.volume_size('vg/disk'),
             120, 'the other host sees the new size', interval=0.5)
    ctx.log('the follower: ' + two.extender_log())

    close(daemon)
    one.sh('lvchange -an vg/disk')
    two.offer(follower)
    two.read(0, 400)
    two.sh('lvchange -aey vg/disk')
    two.write(400, 600)
    two.read(400, 600)
    ctx.log('extensions: %s, then %s' % (extensions(one), extensions(two)))
    size = two.volume_size('vg/disk')

    two.sh('disk_do aio_write 600 800 0 a > /tmp/last 2>&1 & sleep 3')
    two.power_off()
    status, text = one.sh('lvchange -aey vg/disk', ok=False)
    check(status and 'locked by other host' in text, 'the volume of a host '
          'that may be alive was given away: %s', text)
    wait_for(lambda: one.sh('lvchange -aey vg/disk', ok=False)[0] == 0, 600,
             'the lock of the lost host has expired', interval=5)
    check(one.volume_size('vg/disk') >= size, 'the volume has become smaller')
    # The image knows nothing of sanlock's judgement: one has to say so.
    try:
        one.open_disk('vg/disk', 'b', offer=False)
    except QMPError as err:
        check("on host 'host2'" in err.desc, 'message: %s', err.desc)
    else:
        raise Failure('the claim of another host was not respected')
    daemon = one.open_disk('vg/disk', **{'force-takeover': True,
                                         'space-watermark': WATERMARK})
    one.read(0, 600)
    one.write(800, 1000)
    one.read(800, 1000)
    close(daemon)
    check_disk(one, 'vg/disk')
