# SPDX-License-Identifier: GPL-2.0-or-later
"""Reservations on the block devices of a host: root, and not root by way of
qemu-pr-helper; a device that holds more than the image; a target that loses
power.

The host is a guest with a Linux kernel that has SCSI and device mapper
(lib/scsihost.py).  /dev/sda and /dev/sdb are one logical
unit, seen by two initiators: what one has reserved, the other cannot write.
"""

from lib.context import Failure, check
from lib.image import GiB, MiB
from lib.qmp import QMPError
from lib.scsihost import ScsiHost
from lib.testing import test
from lib.tgt import Target

SIZE = 256 * MiB
BEHIND = SIZE - MiB         # where a raw write does no harm


def new_image(ctx):
    host = ScsiHost(ctx, Target(ctx).add_lun(SIZE))
    host.sh('qemu-img create -f thinvm /dev/sda %d' % GiB)
    return host


def fencing(daemon):
    info, = daemon.qmp.cmd('query-thinvm')
    return info['fencing'], info['fencing-reason']


def expect_fencing(daemon, wanted):
    kind, why = fencing(daemon)
    check(kind == wanted, 'the fencing in force is %s (%s), not %s', kind,
          why, wanted)
    return why


def may_write(host, device):
    """Can a program that knows nothing of thinvm write to @device?"""
    status, _ = host.sh('timeout 60 dd if=/dev/zero of=%s bs=4096 seek=%d '
                        'count=1 oflag=direct conv=notrunc'
                        % (device, BEHIND // 4096), ok=False)
    return status == 0


def write(host, daemon, pattern, first='flush', ok=True):
    """Through an NBD export of the daemon's disk; did it work?"""
    if not daemon.exported:
        daemon.qmp.cmd_raw('nbd-server-start', {
            'addr': {'type': 'unix', 'data': {'path': '/tmp/nbd-%d'
                                              % daemon.pid}}})
        daemon.qmp.cmd_raw('block-export-add', {
            'type': 'nbd', 'id': 'e', 'node-name': 'disk', 'writable': True})
        daemon.exported = True
    status, text = host.sh(
        "qemu-io -f raw -c '%s' -c 'write -P %d 0 64k' -c flush "
        "'nbd+unix:///disk?socket=/tmp/nbd-%d'" % (first, pattern,
                                                  daemon.pid), ok=ok)
    return status == 0 and 'fail' not in text


def require_clean(host, device):
    host.sh('qemu-img check -f thinvm ' + device)


@test(seconds=900)
def reservation(ctx):
    """The owner reserves, the other initiator can read only; a dead owner is
    displaced; one that was frozen while another took over writes nothing."""
    host = new_image(ctx)
    check(may_write(host, '/dev/sdb'), 'a device without an owner refuses '
          'to be written')
    first = host.daemon('a')
    first.add_disk('/dev/sda')
    expect_fencing(first, 'reservation')
    write(host, first, 1)
    check(not may_write(host, '/dev/sdb'), 'another initiator could write')
    host.sh('dd if=/dev/sdb of=/dev/null bs=4096 count=1 iflag=direct')

    first.end('KILL')
    second = host.daemon('b')
    second.add_disk('/dev/sdb')
    expect_fencing(second, 'reservation')
    check(not may_write(host, '/dev/sda'), 'the dead owner\'s initiator can '
          'still write')
    write(host, second, 2)

    second.signal('STOP')
    third = host.daemon('a')
    third.add_disk('/dev/sda', **{'force-takeover': True})
    expect_fencing(third, 'reservation')
    second.signal('CONT')
    second.qmp.wait_event('THINVM_OWNERSHIP_LOST', 60)
    check(not write(host, second, 9, ok=False), 'the owner that was '
          'displaced can still write')
    second.end('TERM')
    write(host, third, 3, 'read -P 2 0 64k')
    third.end('TERM')
    check(may_write(host, '/dev/sdb'), 'the reservation outlives its owner\'s '
          'clean end')
    require_clean(host, '/dev/sda')


@test(seconds=900)
def unprivileged(ctx):
    """A process without privileges reserves through qemu-pr-helper; without
    it there is the claim alone, and reservation=on says so."""
    host = new_image(ctx)
    plain = host.daemon('a', user='qemu')
    try:
        plain.add_disk('/dev/sda', reservation='on')
    except QMPError as err:
        check("'reservation' is 'on'" in err.desc, 'message: %s', err.desc)
        plain.qmp.cmd('blockdev-del', node_name='disk-file')
    else:
        raise Failure('an unprivileged process got a reservation by itself')
    plain.add_disk('/dev/sda')
    why = expect_fencing(plain, 'claim')
    ctx.log('without the helper: ' + why)
    plain.end('TERM')

    host.sh('qemu-pr-helper -k /run/pr.sock > /tmp/pr.log 2>&1 < /dev/null &')
    host.sh('wait_for /run/pr.sock; chmod 666 /run/pr.sock')
    helped = host.daemon('b', '--object pr-manager-helper,id=pr,'
                         'path=/run/pr.sock', user='qemu')
    helped.add_disk('/dev/sdb', reservation='on', file={'pr-manager': 'pr'})
    expect_fencing(helped, 'reservation')
    check(not may_write(host, '/dev/sda'), 'another initiator, of root, could '
          'write')
    write(host, helped, 5)
    helped.end('TERM')
    check(may_write(host, '/dev/sda'), 'the reservation outlives its owner\'s '
          'clean end')
    require_clean(host, '/dev/sdb')


@test(seconds=900)
def not_the_whole_device(ctx):
    """A volume of device mapper, or a device on which one lies, is not
    reserved; not by a user who insists, either."""
    host = ScsiHost(ctx, Target(ctx).add_lun(SIZE))
    host.sh("dmsetup create volume -u LVM-0123456789abcdef --table "
            "'0 %d linear /dev/sda 2048'" % (SIZE // 1024))
    host.sh('dmsetup mknodes; ls -l /dev/mapper/')
    for device in ('/dev/mapper/volume', '/dev/sda'):
        host.sh('qemu-img create -f thinvm %s %d' % (device, GiB))
        daemon = host.daemon('a')
        try:
            daemon.add_disk(device, reservation='on')
        except QMPError as err:
            check('not a whole SCSI device' in err.desc, 'message: %s',
                  err.desc)
            daemon.qmp.cmd('blockdev-del', node_name='disk-file')
        else:
            raise Failure('%s was reserved' % device)
        daemon.add_disk(device)
        expect_fencing(daemon, 'claim')
        check(may_write(host, '/dev/sdb'), 'the device below %s is reserved',
              device)
        daemon.end('TERM')


@test(seconds=900)
def multipath(ctx):
    """What device mapper calls multipath (by its UUID) is reserved for those
    who are registered; only through a pr-manager, who knows the paths."""
    host = new_image(ctx)
    host.sh("dmsetup create mpatha -u mpath-0123456789abcdef --table "
            "'0 %d linear /dev/sda 0'" % (SIZE // 512))
    host.sh('dmsetup mknodes')
    daemon = host.daemon('a')
    try:
        daemon.add_disk('/dev/mapper/mpatha', reservation='on')
    except QMPError as err:
        check('pr-manager' in err.desc, 'message: %s', err.desc)
    else:
        raise Failure('a multipath device was reserved by one path')
    daemon.end('TERM')

    host.sh('qemu-pr-helper -k /run/pr.sock > /tmp/pr.log 2>&1 < /dev/null &')
    host.sh('wait_for /run/pr.sock')
    options = {'reservation': 'on', 'file': {'pr-manager': 'pr'}}
    manager = '--object pr-manager-helper,id=pr,path=/run/pr.sock'
    first = host.daemon('b', manager)
    first.add_disk('/dev/mapper/mpatha', **options)
    why = expect_fencing(first, 'reservation')
    check('registrants only' in why, 'the type is %s', why)
    write(host, first, 1)
    check(may_write(host, '/dev/mapper/mpatha'), 'the owner\'s path cannot '
          'write')
    check(not may_write(host, '/dev/sdb'), 'another initiator could write')

    # Another host, with one path, displaces an owner who is frozen.
    first.signal('STOP')
    second = host.daemon('a')
    second.add_disk('/dev/sdb', **{'force-takeover': True})
    expect_fencing(second, 'reservation')
    write(host, second, 2, 'read -P 1 0 64k')
    first.signal('CONT')
    first.qmp.wait_event('THINVM_OWNERSHIP_LOST', 60)
    check(not may_write(host, '/dev/mapper/mpatha'), 'the path of the owner '
          'who was displaced can still write')
    first.end('TERM')
    second.end('TERM')
    check(may_write(host, '/dev/sda'), 'the reservation outlives its owner\'s '
          'clean end')
    require_clean(host, '/dev/sdb')


@test(seconds=900)
def power_cycle(ctx):
    """The reservation outlives a power cut of the target: whoever was not
    the owner before, cannot write after."""
    host = ScsiHost(ctx, size=SIZE)
    host.sh('qemu-img create -f thinvm /dev/sda %d' % GiB)
    owner = host.daemon('a')
    owner.add_disk('/dev/sda')
    expect_fencing(owner, 'reservation')
    write(host, owner, 7)
    host.sh("grep 'res_holder=1' /var/target/pr/aptpl_thinvmtest")
    owner.end('KILL')           # its host has lost power, too
    host.sh('target_off; sleep 1; target_on', seconds=300)
    check(not may_write(host, '/dev/sdb'), 'after the power cut another '
          'initiator could write')
    heir = host.daemon('b')
    heir.add_disk('/dev/sda')
    expect_fencing(heir, 'reservation')
    check(not may_write(host, '/dev/sdb'), 'another initiator could write')
    write(host, heir, 8, 'read -P 7 0 64k')
    heir.end('TERM')
    check(may_write(host, '/dev/sdb'), 'the reservation outlives its owner\'s '
          'clean end')
    require_clean(host, '/dev/sda')
