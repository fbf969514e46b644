# SPDX-License-Identifier: GPL-2.0-or-later
"""Fencing by SCSI persistent reservations, on a real iSCSI target.

The owner of an image that has a LUN to itself holds a reservation: the
device, not the good will of the other side, keeps others from writing.
"""

import os
import signal
import threading
import time

from lib import iscsi_proxy
from lib.context import Failure, check, wait_for
from lib.image import GiB, MiB, File, create, format_node, require_clean
from lib.nbd import NBDClient
from lib.node import query_thinvm
from lib.qmp import QMPError
from lib.qsd import StorageDaemon
from lib.testing import test
from lib.tgt import Target


def pattern(number):
    return bytes([number]) * 4096


def opened(ctx, place, host='a', **more):
    daemon = StorageDaemon(ctx, host=host)
    daemon.add_disk(place, **more)
    return daemon


def write(ctx, daemon, offset, data):
    client = NBDClient(ctx, daemon.export_nbd(), 'disk')
    client.write(offset, data)
    client.flush()
    client.close()
    daemon.remove_export('nbd-disk')


def read(ctx, daemon, offset):
    client = NBDClient(ctx, daemon.export_nbd(writable=False), 'disk')
    data = client.read(offset, 4096)
    client.close()
    daemon.remove_export('nbd-disk')
    return data


def raw_write_refused(ctx, lun):
    """Does the LUN refuse what any other initiator writes behind the end
    of the image's metadata?"""
    text = ctx.run(ctx.bin('qemu-io'), '-f', 'raw', '-c',
                   'write -P 0x66 %d 4k' % (lun.size - 65536), lun.url,
                   ok=None)
    return 'wrote' not in text


def new_lun(ctx):
    target = Target(ctx)
    lun = target.add_lun(2 * GiB)
    create(ctx, lun, 1 * GiB)
    return target, lun


@test()
def only_the_owner_writes(ctx):
    """Others may read the LUN, but not write to it, as long as the image
    is open."""
    _, lun = new_lun(ctx)
    check(not raw_write_refused(ctx, lun), 'a LUN that nobody owns refuses '
          'to be written')
    owner = opened(ctx, lun)
    info = query_thinvm(owner.qmp, 'disk')
    check(info.get('fencing') == 'reservation',
          'the fencing in force is %s (%s)', info.get('fencing'),
          info.get('fencing-reason'))
    check(raw_write_refused(ctx, lun), 'another initiator could write')
    text = ctx.run(ctx.bin('qemu-io'), '-f', 'raw', '-c', 'read 0 4k',
                   lun.url)
    check('read 4096' in text, 'another initiator cannot read: %s', text)
    write(ctx, owner, 0, pattern(1))
    check(read(ctx, owner, 0) == pattern(1), 'the owner lost a write')
    owner.quit()
    check(not raw_write_refused(ctx, lun), 'the reservation outlives a clean '
          'close')
    require_clean(ctx, lun)


@test()
def option(ctx):
    """reservation=off leaves the device alone; on fails where it cannot be
    had, and query-thinvm tells what protects the image."""
    _, lun = new_lun(ctx)
    owner = opened(ctx, lun, reservation='off')
    check(query_thinvm(owner.qmp, 'disk')['fencing'] == 'claim',
          'reservation=off is not heeded')
    check(not raw_write_refused(ctx, lun), 'reserved with reservation=off')
    owner.quit()
    owner = opened(ctx, lun, reservation='on')
    check(query_thinvm(owner.qmp, 'disk')['fencing'] == 'reservation',
          'reservation=on is not heeded')
    owner.quit()

    place = File(ctx, 'image')
    create(ctx, place, 1 * GiB)
    owner = opened(ctx, place)
    check(query_thinvm(owner.qmp, 'disk')['fencing'] == 'lock',
          'a local file is protected by %s',
          query_thinvm(owner.qmp, 'disk')['fencing'])
    owner.quit()
    try:
        opened(ctx, place, reservation='on')
    except QMPError as err:
        check("'reservation' is 'on'" in err.desc, 'message: %s', err.desc)
    else:
        raise Failure('reservation=on works on a file')


@test()
def frozen_owner(ctx):
    """A host that was frozen while another took over: when it thaws, it
    writes nothing, and says that it lost the image."""
    _, lun = new_lun(ctx)
    frozen = opened(ctx, lun)
    write(ctx, frozen, 0, pattern(1))
    client = NBDClient(ctx, frozen.export_nbd(), 'disk')
    frozen.process.popen.send_signal(signal.SIGSTOP)
    try:
        opened(ctx, lun, host='b')
    except QMPError as err:
        ctx.log('refused: ' + err.desc)
        check(str(frozen.process.popen.pid) in err.desc,
              'the message does not name the owner: %s', err.desc)
    else:
        raise Failure('a frozen owner was displaced without an order')
    winner = opened(ctx, lun, host='b', force_takeover=True)
    write(ctx, winner, 0, pattern(2))
    # Under way since before the thaw: an overwrite, and a new cluster.
    for offset in (0, 512 << 20):
        client.send(1, offset=offset, data=pattern(3), tag=offset)
    frozen.process.popen.send_signal(signal.SIGCONT)
    for _ in range(2):
        _, error, _ = client.reply()
        check(error != 0, 'a displaced owner acknowledged a write')
    event = frozen.qmp.wait_event('THINVM_OWNERSHIP_LOST', 30)
    ctx.log('lost: %s' % event)
    info = query_thinvm(frozen.qmp, 'disk')
    check(info['ownership-lost'] and not info['owner'],
          'it does not know that it lost the image: %s', info)
    check(info.get('lost-reason') == event['data']['reason'],
          'the reason is shown as %s', info.get('lost-reason'))
    client.close()
    frozen.kill()
    check(read(ctx, winner, 0) == pattern(2),
          'the displaced owner wrote over the new one')
    check(read(ctx, winner, 512 << 20) == bytes(4096),
          'the displaced owner wrote')
    winner.quit()
    require_clean(ctx, lun)


def thaws_after_a_close(ctx, **more):
    """While the owner is frozen, another takes the image over, writes it and
    closes it.  Then the device lets everybody write."""
    _, lun = new_lun(ctx)
    frozen = opened(ctx, lun, **more)
    write(ctx, frozen, 0, pattern(1))
    client = NBDClient(ctx, frozen.export_nbd(), 'disk')
    frozen.process.popen.send_signal(signal.SIGSTOP)
    successor = opened(ctx, lun, host='b', force_takeover=True, **more)
    write(ctx, successor, 0, pattern(2))
    successor.quit()
    check(not raw_write_refused(ctx, lun), 'the reservation outlives a clean '
          'close')
    # There before it thaws, and more than one: overwrites, and new clusters.
    places = [offset + 4096 * number for number in range(4)
              for offset in (0, 512 << 20)]
    for offset in places:
        client.send(1, offset=offset, data=pattern(3), tag=offset)
    frozen.process.popen.send_signal(signal.SIGCONT)
    for _ in places:
        offset, error, _ = client.reply()
        check(error != 0, 'a displaced owner acknowledged a write at %d',
              offset)
    event = frozen.qmp.wait_event('THINVM_OWNERSHIP_LOST', 30)
    ctx.log('lost: %s' % event)
    client.close()
    frozen.kill()
    heir = opened(ctx, lun, host='b', **more)
    for offset in places:
        check(read(ctx, heir, offset) == (bytes(4096) if offset
                                          else pattern(2)),
              'the displaced owner wrote at %d', offset)
    heir.quit()
    require_clean(ctx, lun)


@test()
def frozen_until_the_close(ctx):
    """A frozen owner that thaws when its successor has closed the image, and
    no reservation is left: it looks at the claims before it writes."""
    thaws_after_a_close(ctx)


@test()
def frozen_until_the_close_by_claim(ctx):
    """The same where there are only the claims."""
    thaws_after_a_close(ctx, reservation='off')


@test()
def idle_owner_notices(ctx):
    """One that writes nothing notices, too, by looking at its claim."""
    _, lun = new_lun(ctx)
    frozen = opened(ctx, lun, reservation='off')
    frozen.process.popen.send_signal(signal.SIGSTOP)
    winner = opened(ctx, lun, host='b', force_takeover=True,
                    reservation='off')
    frozen.process.popen.send_signal(signal.SIGCONT)
    frozen.qmp.wait_event('THINVM_OWNERSHIP_LOST', 30)
    frozen.kill()
    winner.quit()
    require_clean(ctx, lun)


@test()
def force_needs_a_dead_owner(ctx):
    """An owner whose counter moves is not displaced by force-takeover."""
    _, lun = new_lun(ctx)
    owner = opened(ctx, lun)
    try:
        opened(ctx, lun, host='b', force_takeover=True)
    except QMPError as err:
        ctx.log('refused: ' + err.desc)
        check('alive' in err.desc, 'the message does not say that the owner '
              'is alive: %s', err.desc)
    else:
        raise Failure('an owner that is alive was displaced')
    write(ctx, owner, 0, pattern(1))
    owner.quit()
    require_clean(ctx, lun)


@test()
def dead_owner_is_displaced(ctx):
    """After kill -9 the next one of the same host takes the reservation
    over unattended."""
    _, lun = new_lun(ctx)
    for number in range(1, 6):
        owner = opened(ctx, lun, host='ab'[number % 2])
        check(query_thinvm(owner.qmp, 'disk')['fencing'] == 'reservation',
              'not reserved')
        write(ctx, owner, 0, pattern(number))
        owner.kill()
        check(raw_write_refused(ctx, lun), 'the reservation of a dead owner '
              'is gone')
    owner = opened(ctx, lun)
    check(read(ctx, owner, 0) == pattern(5), 'a write is lost')
    owner.kill()
    create(ctx, lun, 1 * GiB)
    check(not raw_write_refused(ctx, lun), 'the reservation of a dead owner '
          'outlives his image')
    require_clean(ctx, lun)


@test()
def target_restarts(ctx):
    """A target that forgot the reservation, and sessions established anew:
    the owner goes on, and has it again."""
    target, lun = new_lun(ctx)
    owner = opened(ctx, lun)
    write(ctx, owner, 0, pattern(1))
    target.stop()
    target.restart()
    write(ctx, owner, 4096, pattern(2))
    wait_for(lambda: raw_write_refused(ctx, lun), 30,
             'the owner has reserved the LUN again')
    write(ctx, owner, 8192, pattern(3))
    for number in range(3):
        check(read(ctx, owner, number * 4096) == pattern(number + 1),
              'write %d is lost', number)
    owner.quit()
    require_clean(ctx, lun)


def active(daemon, whether):
    daemon.qmp.cmd('blockdev-set-active', node_name='disk', active=whether)


@test()
def late_reservation(ctx):
    """A host has seen that nobody owns the image, and before it reserves the
    device another one does, writes, and closes the image."""
    _, lun = new_lun(ctx)
    slow = iscsi_proxy.Proxy(ctx, lun)
    late = opened(ctx, slow, active=True)
    write(ctx, late, 0, pattern(1))
    active(late, False)
    slow.hold(iscsi_proxy.RESERVE)
    errors = []

    def activate():
        try:
            active(late, True)
        except QMPError as err:
            errors.append(err.desc)

    thread = threading.Thread(target=activate)
    thread.start()
    slow.wait_held()
    other = opened(ctx, lun, host='b')
    write(ctx, other, 0, pattern(2))
    write(ctx, other, 512 << 20, pattern(3))
    other.quit()
    slow.go()
    thread.join()
    check(errors and 'just now' in errors[0], 'who came too late is told %s',
          errors)
    check(not raw_write_refused(ctx, lun), 'who came too late has reserved it')
    active(late, True)
    check(read(ctx, late, 0) == pattern(2) and
          read(ctx, late, 512 << 20) == pattern(3),
          'what the other one wrote is lost')
    late.quit()
    require_clean(ctx, lun)


@test()
def claimed_twice(ctx):
    """Who finds the epoch of his claim in the journal claims once more, with
    the reservation that he has: there is nothing to go wrong."""
    _, lun = new_lun(ctx)
    opened(ctx, lun).quit()
    with open(lun.path, 'r+b') as device:       # no claim is left
        os.pwrite(device.fileno(), bytes(64 << 10), 64 << 10)
    faulty = iscsi_proxy.Proxy(ctx, lun)
    faulty.spoil((iscsi_proxy.RESERVE, iscsi_proxy.REGISTER),
                 after=iscsi_proxy.RESERVE)
    owner = opened(ctx, faulty)
    info = query_thinvm(owner.qmp, 'disk')
    check(info['image-owner']['epoch'] == 2 and
          info['fencing'] == 'reservation', 'the owner has %s', info)
    check(raw_write_refused(ctx, lun), 'another initiator could write')
    faulty.spoil(())
    owner.quit()
    check(not raw_write_refused(ctx, lun), 'the reservation is still there')
    require_clean(ctx, lun)


@test()
def no_reservation_for_the_displaced(ctx):
    """A host is frozen while it looks after its reservation; another takes
    over, and closes the image.  There is no reservation then when the first
    one looks, and it must not stay if it is taken anew."""
    _, lun = new_lun(ctx)
    slow = iscsi_proxy.Proxy(ctx, lun)
    frozen = opened(ctx, slow)
    slow.hold(iscsi_proxy.READ_RESERVATION)
    slow.wait_held()
    winner = opened(ctx, lun, host='b', force_takeover=True)
    write(ctx, winner, 0, pattern(2))
    winner.quit()
    slow.go()
    frozen.qmp.wait_event('THINVM_OWNERSHIP_LOST', 30)
    check(not raw_write_refused(ctx, lun), 'a displaced owner has reserved '
          'the device')
    heir = opened(ctx, lun, host='b')
    check(read(ctx, heir, 0) == pattern(2), 'a write is lost')
    heir.quit()
    frozen.kill()
    require_clean(ctx, lun)


class Racer:
    """A daemon that opens the image whenever it is told to."""

    def __init__(self, ctx, lun, host, **more):
        self.daemon = StorageDaemon(ctx, host=host)
        self.more = more
        self.daemon.qmp.cmd_raw('blockdev-add', lun.blockdev('disk-file',
                                                             host))
        self.ctx = ctx
        self.won = False

    def run(self):
        try:
            self.daemon.qmp.cmd_raw('blockdev-add', format_node(
                self.ctx, 'disk', 'disk-file', **self.more))
            self.won = True
        except QMPError as err:
            self.won = False
            self.error = err.desc

    def close(self):
        if self.won:
            self.daemon.qmp.cmd('blockdev-del', node_name='disk')


def race(ctx, lun, rounds, **more):
    """Two that open the image at the same time: one has it."""
    racers = [Racer(ctx, lun, host, **more) for host in 'ab']
    won = [0, 0]
    for number in range(rounds):
        threads = [threading.Thread(target=racer.run) for racer in racers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        winners = [i for i in range(2) if racers[i].won]
        check(len(winners) == 1, 'round %d has %d winners (%s)', number,
              len(winners), [racer.error for racer in racers
                             if not racer.won])
        won[winners[0]] += 1
        for racer in racers:
            racer.close()
    ctx.log('of %d rounds each won %s' % (rounds, won))
    for racer in racers:
        racer.daemon.quit()
    require_clean(ctx, lun)


@test()
def races_by_reservation(ctx):
    """Two opens at the same time, where the device decides."""
    race(ctx, new_lun(ctx)[1], 40)


@test()
def races_by_claim(ctx):
    """The same where there are only the claims."""
    race(ctx, new_lun(ctx)[1], 8, reservation='off')


@test(seconds=3600, slow=True)
def thousand_races(ctx):
    """1,000 of them, and 200 by the claims alone."""
    race(ctx, new_lun(ctx)[1], 1000)
    race(ctx, new_lun(ctx)[1], 200, reservation='off')


def stale_owners(ctx, count):
    """Images whose owner died with all of them open recover unattended: the
    next process just opens them, without an order to do so."""
    target = Target(ctx)
    luns = [target.add_lun(64 * MiB) for _ in range(count)]
    owner = StorageDaemon(ctx, host='a')
    for number, lun in enumerate(luns):
        create(ctx, lun, 1 * GiB)
        owner.add_disk(lun, node='disk%d' % number)
    owner.kill()
    heir = StorageDaemon(ctx, host='b')
    begin = time.monotonic()
    for number, lun in enumerate(luns):
        heir.add_disk(lun, node='disk%d' % number)
    ctx.log('%d images opened in %.1f s' % (count, time.monotonic() - begin))
    for number in range(len(luns)):
        info = query_thinvm(heir.qmp, 'disk%d' % number)
        check(info['owner'] and info['fencing'] == 'reservation',
              'disk %d is not owned: %s', number, info)
    heir.quit()
    for lun in luns:
        require_clean(ctx, lun)


@test(seconds=600)
def many_stale_owners(ctx):
    """24 of them, all on one target."""
    stale_owners(ctx, 24)


@test(seconds=1200, slow=True)
def two_hundred_stale_owners(ctx):
    """200: a host with that many disks was without power."""
    stale_owners(ctx, 200)
