# SPDX-License-Identifier: GPL-2.0-or-later
"""kill -9 at random moments, in each of the three mapping-cache modes.

A storage daemon with a client that has eight requests in flight and creates
and deletes internal snapshots; the daemon is killed after a random time, its
image looked at, opened by the next daemon, written to and killed again.

writeback     what a completed flush covers is there (what is there because
              of its age: test_crash.py, test_acknowledged.py)
writethrough  what was acknowledged is there
migration     a follower's death costs the owner nothing; whoever is left
              after the owner's death takes over, and finds what was flushed;
              a death amid a hand-over, on either side, loses nothing that
              was acknowledged before it and leaves an image that either side
              can go on with

After each kill: qemu-img check finds neither corruption nor leak.
"""

import os
import threading
import time

from lib.context import check
from lib.image import File, create, info, require_clean
from lib.lanes import SHAPES, Lanes, random_source
from lib.nbd import NBDClient
from lib.powercuts import DEVICE, DISK, full_of_rubbish, read_raw
from lib.qmp import QMPClosed, QMPError
from lib.qsd import StorageDaemon
from lib.testing import OURS, test
from lib.tgt import Target

INTERVAL = 50               # ms
MANY = 100000               # operations: more than there is time for


class Victim:
    """An image that lives through many daemons."""

    def __init__(self, ctx, kind, mode=None, shape=SHAPES[0]):
        self.ctx = ctx
        self.mode = mode
        self.random = random_source()
        if kind == 'file':
            self.place = File(ctx, 'image')
        else:
            self.place = Target(ctx).add_lun(DEVICE)
            full_of_rubbish(self.place.path)
        create(ctx, self.place, DISK, options='journal_size=1M')
        self.shape = shape
        self.model = shape.model(self.random.randrange(1 << 60))
        self.snapshots = []
        self.turn = 0
        self.acked = 0
        ctx.log('seed %d' % self.model.seed)

    def daemon(self, host=None, **options):
        daemon = StorageDaemon(self.ctx, host=host or 'ab'[self.turn % 2])
        daemon.add_disk(self.place, mode=self.mode, interval=INTERVAL,
                        discard='unmap', **options)
        return daemon

    def lanes(self, daemon):
        """The client, connected to the active disk of @daemon."""
        lanes = Lanes(self.ctx, self.shape, self.model, self.random,
                      snapshots=self.snapshots)
        self.snapshots = lanes.snapshots
        lanes.connect(daemon, daemon.export_nbd())
        return lanes

    def kill_later(self, daemon, most):
        """A timer that kills @daemon within @most seconds."""
        delay = self.random.random() * most
        timer = threading.Timer(delay, daemon.process.kill)
        timer.daemon = True
        self.ctx.log('turn %d: %s dies in %.3f s' % (self.turn, daemon.name,
                                                     delay))
        timer.start()
        return timer

    def _look_at_snapshots(self, moment, what):
        ctx = self.ctx
        names = {s['name'] for s in
                 info(ctx, self.place).get('snapshots', [])}
        for snapshot in self.snapshots:
            there = snapshot.name in names
            check(there or not snapshot.must_be_there(moment),
                  '%s: snapshot %s is lost', what, snapshot.name)
            check(not there or not snapshot.must_be_gone(moment),
                  '%s: snapshot %s was deleted', what, snapshot.name)
            if there and snapshot.created is None:
                snapshot.created = moment
                snapshot.create_returned = True
            if not there:
                snapshot.deleting = snapshot.deleting or moment
                snapshot.deleted = snapshot.deleted or moment
                snapshot.delete_returned = True
            else:
                # Its daemon may have died over it, or before it flushed.
                snapshot.deleting = None
                snapshot.delete_returned = False
        if names:
            name = self.random.choice(sorted(names))
            snapshot, = [s for s in self.snapshots if s.name == name]
            self._read(snapshot.right, '%s, snapshot %s' % (what, name),
                       '-l', 'snapshot.name=' + name)

    def _read(self, right, what, *options):
        ctx = self.ctx
        raw = ctx.path('contents')
        ctx.run(ctx.bin('qemu-img'), 'convert', '-f', ctx.fmt, '-O', 'raw',
                *options, self.place.url, raw)
        found, stray = read_raw(self.model, raw)
        os.unlink(raw)
        check(not stray, '%s: foreign data %s', what, stray)
        wrong = self.model.compare(found, right)
        check(not wrong, '%s: %d blocks are wrong: %s', what, len(wrong),
              '; '.join(wrong[:4]))
        return found

    def examine(self, lanes, durable):
        """All daemons are dead: is what must be there?"""
        moment = time.monotonic()
        lanes.end()
        self.acked += lanes.acked_count()
        what = 'seed %d, after kill %d' % (self.model.seed, self.turn)
        require_clean(self.ctx, self.place)
        found = self._read(self.model.right(durable), what)
        self._look_at_snapshots(moment, what)
        self.model.rebase(found)
        self.turn += 1


def kill_again_and_again(ctx, mode, kills):
    """Half of the kills on a file, half on a LUN."""
    for number, kind in enumerate(('file', 'lun')):
        victim = Victim(ctx, kind, mode, SHAPES[number])
        for _ in range(kills // 2):
            daemon = victim.daemon()
            lanes = victim.lanes(daemon)
            timer = victim.kill_later(daemon, 0.5)
            check(not lanes.run(MANY, 60), 'the daemon was not killed')
            timer.join()
            victim.examine(lanes, 'acked' if mode == 'writethrough'
                           else 'flushed')
        check(victim.acked > 50 * victim.turn,
              'only %d operations were acknowledged', victim.acked)
        ctx.log('figures: %s on a %s: %d kills, %d operations acknowledged, '
                '%d snapshots' % (mode, kind, victim.turn, victim.acked,
                                  len(victim.snapshots)))


@test(formats=OURS)
def writeback(ctx):
    """Eight kills in writeback mode."""
    kill_again_and_again(ctx, 'writeback', 8)


@test(formats=OURS)
def writethrough(ctx):
    """Eight kills in writethrough mode."""
    kill_again_and_again(ctx, 'writethrough', 8)


@test(seconds=1200, formats=OURS, slow=True)
def writeback_often(ctx):
    """200 kills in writeback mode."""
    kill_again_and_again(ctx, 'writeback', 200)


@test(seconds=1200, formats=OURS, slow=True)
def writethrough_often(ctx):
    """200 kills in writethrough mode."""
    kill_again_and_again(ctx, 'writethrough', 200)


# Migration mode: two daemons, one of which follows the other.

def set_active(daemon, active):
    daemon.qmp.cmd('blockdev-set-active', node_name='disk', active=active)


def try_set_active(daemon, active):
    """False if the daemon died over it."""
    try:
        set_active(daemon, active)
    except (QMPClosed, QMPError):
        if not daemon.process.gone_soon():
            raise
        return False
    return True


class Reader(threading.Thread):
    """Reads through the follower until that dies or is to become active."""

    def __init__(self, ctx, daemon, victim):
        super().__init__(daemon=True)
        self.client = NBDClient(ctx, daemon.export_nbd(
            writable=False, inactive=True), 'disk')
        self.model = victim.model
        self.random = random_source()
        self.daemon_ = daemon
        self.reads = 0
        self.error = None
        self.ending = False

    def run(self):
        while not self.ending:
            lane = self.random.randrange(len(self.model.lanes))
            index = self.random.randrange(self.model.blocks)
            try:
                self.client.read(self.model.offset(lane, index), 4096)
                self.reads += 1
            except OSError as err:
                if not self.daemon_.process.gone_soon():
                    self.error = err
                return

    def end(self):
        self.ending = True
        self.join(30)
        check(self.error is None, 'a read through the follower fails: %s',
              self.error)
        if self.daemon_.process.alive():
            self.client.close()
            self.daemon_.remove_export('nbd-disk')


def pair(victim):
    """(owner, its client, follower, its reader)."""
    owner = victim.daemon(host='a', active=True)
    lanes = victim.lanes(owner)
    follower = victim.daemon(host='b', active=False)
    reader = Reader(victim.ctx, follower, victim)
    reader.start()
    return owner, lanes, follower, reader


def hand_over(victim, lanes, owner):
    """The owner, its client at rest, lets go; False if it died."""
    lanes.disconnect()
    try:
        owner.remove_export('nbd-disk')
    except (QMPClosed, QMPError):
        return False
    return try_set_active(owner, False)


def scan_through(victim, daemon, durable):
    """What @daemon's disk holds, as it sees it itself."""
    client = NBDClient(victim.ctx, daemon.export_nbd(), 'disk')
    found = victim.model.scan(client.read)
    client.close()
    daemon.remove_export('nbd-disk')
    wrong = victim.model.compare(found, victim.model.right(durable))
    check(not wrong, 'seed %d, turn %d: %s reads: %s', victim.model.seed,
          victim.turn, daemon.name, '; '.join(wrong[:4]))
    return found


def goes_on(victim, daemon):
    """@daemon, active, takes writes; a client's whole life."""
    lanes = victim.lanes(daemon)
    check(lanes.run(200, 60), '%s died', daemon.name)
    lanes.disconnect()
    daemon.kill()
    victim.examine(lanes, 'flushed')


def follower_dies(victim):
    """The owner does not notice."""
    owner, lanes, follower, reader = pair(victim)
    timer = victim.kill_later(follower, 0.4)
    while timer.is_alive():
        check(lanes.run(100, 60), 'the owner died of its follower')
    reader.end()
    check(lanes.run(100, 60), 'the owner died after its follower')
    owner.kill()
    victim.examine(lanes, 'flushed')


def owner_dies(victim):
    """The follower takes over and has all that was flushed."""
    owner, lanes, follower, reader = pair(victim)
    timer = victim.kill_later(owner, 0.4)
    check(not lanes.run(MANY, 60), 'the owner was not killed')
    timer.join()
    reader.end()
    set_active(follower, True)
    lanes.end()
    victim.model.rebase(scan_through(victim, follower, 'flushed'))
    goes_on(victim, follower)


def owner_dies_letting_go(victim):
    """Amid the hand-over; the other side takes what there is."""
    owner, lanes, follower, reader = pair(victim)
    check(lanes.run(200, 60), 'the owner died')
    timer = victim.kill_later(owner, 0.02)
    hand_over(victim, lanes, owner)
    reader.end()
    timer.join()
    set_active(follower, True)
    follower.kill()
    victim.examine(lanes, 'acked')


def follower_dies_taking(victim):
    """Amid the hand-over; the old owner takes the disk back."""
    owner, lanes, follower, reader = pair(victim)
    check(lanes.run(200, 60), 'the owner died')
    reader.end()
    check(hand_over(victim, lanes, owner), 'the owner died')
    timer = victim.kill_later(follower, 0.02)
    try_set_active(follower, True)
    timer.join()
    set_active(owner, True)
    lanes.end()
    victim.model.rebase(scan_through(victim, owner, 'acked'))
    goes_on(victim, owner)


def serves(victim, lanes, owner):
    """@owner, active, has its client for a while; False: it died."""
    try:
        lanes.connect(owner, owner.export_nbd())
    except (QMPClosed, QMPError, OSError):
        if not owner.process.gone_soon():
            raise
        return False
    return lanes.run(60, 30)


def one_dies_amid_to_and_fro(victim):
    """The disk goes from one to the other and back, each writing to it,
    till one of the two is gone; the other one has it then."""
    owner, lanes, follower, reader = pair(victim)
    reader.end()
    timer = victim.kill_later(victim.random.choice((owner, follower)), 1.5)
    turns = 0
    alive = lanes.run(60, 30)
    while alive and hand_over(victim, lanes, owner):
        turns += 1
        if not try_set_active(follower, True):
            break
        owner, follower = follower, owner
        alive = serves(victim, lanes, owner)
    timer.join()
    left = follower if owner.process.gone_soon(1) else owner
    victim.ctx.log('%d hand-overs, %s is left' % (turns, left.name))
    set_active(left, True)
    lanes.end()
    victim.model.rebase(scan_through(victim, left, 'flushed'))
    goes_on(victim, left)


def kill_around_the_follower(ctx, rounds):
    for kind in ('lun', 'file'):
        victim = Victim(ctx, kind)
        for _ in range(rounds):
            for turn in (follower_dies, owner_dies, owner_dies_letting_go,
                         follower_dies_taking, one_dies_amid_to_and_fro):
                ctx.log('turn %d on a %s: %s' % (victim.turn, kind,
                                                 turn.__name__))
                turn(victim)
        ctx.log('figures: migration mode on a %s: %d kills, %d operations '
                'acknowledged' % (kind, victim.turn, victim.acked))


@test(formats=OURS)
def migration_mode(ctx):
    """Ten kills around a follower and its owner."""
    kill_around_the_follower(ctx, 1)


@test(seconds=1200, formats=OURS, slow=True)
def migration_mode_often(ctx):
    """150 kills around a follower and its owner."""
    kill_around_the_follower(ctx, 15)
