# SPDX-License-Identifier: GPL-2.0-or-later
"""A hand-over does not cost the mapping cache.

The side that will take over follows the owner's journal and preloads the
mapping.  When it takes over it reads what is left of the journal, and from
then on no metadata at all, as long as the cache holds what the disk needs.
"""

import os
import sys

from lib.context import TOP, check, wait_for
from lib.image import GiB, MiB, create, require_clean
from lib.load import finish, setup_pair
from lib.nbd import NBDClient
from lib.node import query_thinvm
from lib.qsd import StorageDaemon
from lib.testing import test
from lib.tgt import Target
from lib.vm import VM, migrate

SIZE = 48 * GiB
LEAF = 32 * MiB             # of the disk that one leaf of the mapping is for
COUNT = SIZE // LEAF


def pattern(number):
    return bytes([number % 251 + 1]) * 4096


def place_of(number, turn):
    """Each write of a turn needs another leaf."""
    return number * LEAF + turn * 128 * 1024


def set_active(daemon, active):
    daemon.qmp.cmd('blockdev-set-active', node_name='disk', active=active)


class Side:
    """One of the two daemons, with an export that stays."""

    def __init__(self, ctx, lun, host, active, **more):
        self.ctx = ctx
        self.daemon = StorageDaemon(ctx, host=host)
        self.daemon.add_disk(lun, active=active, **more)

    def info(self):
        return query_thinvm(self.daemon.qmp, 'disk')

    def run(self, work):
        client = NBDClient(self.ctx, self.daemon.export_nbd(), 'disk')
        work(client)
        client.close()
        self.daemon.remove_export('nbd-disk')


def write_turn(side, turn, step=1):
    def work(client):
        numbers = range(0, COUNT, step)
        acked = client.write_all((place_of(number, turn),
                                  pattern(number + turn))
                                 for number in numbers)
        check(len(acked) == len(numbers), 'only %d of %d writes were '
              'acknowledged', len(acked), len(numbers))
        client.flush()
    side.run(work)


def read_turn(side, turn, step=1):
    def work(client):
        for number in range(0, COUNT, step):
            check(client.read(place_of(number, turn), 4096) ==
                  pattern(number + turn), 'write %d of turn %d is not there',
                  number, turn)
    side.run(work)


def preloaded(side, wanted='complete'):
    follower = side.info().get('follower') or {}
    return follower.get('preload') == wanted


def pair(ctx, **more):
    lun, first = owner_of_new(ctx)
    return lun, first, Side(ctx, lun, 'b', False, **more)


def owner_of_new(ctx, **more):
    lun = Target(ctx).add_lun(SIZE + GiB)
    create(ctx, lun, SIZE)
    first = Side(ctx, lun, 'a', True, **more)
    write_turn(first, 0)
    return lun, first


@test()
def no_metadata_is_read(ctx):
    """Three hand-overs to and fro: each is warm, reads less than a MiB and,
    afterwards, no metadata for reads of all the disk, nor for writes."""
    lun, owner, other = pair(ctx)
    for turn in range(1, 4):
        wait_for(lambda side=other: preloaded(side), 60,
                 'the follower has preloaded all of the mapping')
        # The owner goes on: journal, checkpoints, and a hand-over at once.
        write_turn(owner, turn)
        set_active(owner.daemon, False)
        set_active(other.daemon, True)
        for seen in range(turn + 1):
            read_turn(other, seen, 7)
        info = other.info()
        take = info['take-over']
        ctx.log('take-over %d: %d ms, %d bytes of metadata read, then %d' % (
            turn, take['duration-ns'] // 1000000,
            take['metadata-bytes-read'], take['metadata-bytes-read-since']))
        check(take['warm'], 'the take-over is not warm: %s', take)
        check(take['metadata-bytes-read'] <= 8 * MiB,
              'taking over read %d bytes of metadata',
              take['metadata-bytes-read'])
        check(take['metadata-bytes-read-since'] == 0,
              'after taking over %d bytes of metadata were read',
              take['metadata-bytes-read-since'])
        owner, other = other, owner
    owner.daemon.quit()
    other.daemon.quit()
    require_clean(ctx, lun)


@test()
def preload_is_bounded(ctx):
    """With a cache that is too small preloading ends when it is full, and
    the hand-over works."""
    lun, owner, other = pair(ctx, mapping_cache_size=1 * MiB)
    wait_for(lambda: preloaded(other, 'cache-full'), 60,
             'the follower has filled its cache')
    info = other.info()
    check(0 < info['follower']['preload-progress'] < 100,
          'preloading shows a progress of %s %%',
          info['follower']['preload-progress'])
    check(info['mapping-cache-used'] <= 2 * MiB,
          'the cache holds %d bytes', info['mapping-cache-used'])
    set_active(owner.daemon, False)
    set_active(other.daemon, True)
    read_turn(other, 0, 3)
    owner.daemon.quit()
    other.daemon.quit()
    require_clean(ctx, lun)


def hot_leaves(ctx, lun):
    """What the owner has told lately, by the reader that is not QEMU's."""
    text = ctx.run(sys.executable, os.path.join(TOP, 'scripts',
                                                'thinvm-image.py'),
                   'hot', lun.path)
    return [int(line) // LEAF for line in text.splitlines()
            if line.isdigit()]


@test()
def hottest_first(ctx):
    """Where the cache is too small for all, what the owner uses most is in
    memory when the other side takes over."""
    small = {'mapping_cache_size': 1 * MiB}
    lun, owner = owner_of_new(ctx, **small)
    hot = list(range(5, COUNT, 12))         # a twelfth, all over the disk

    def use(client):
        for number in hot:
            client.read(place_of(number, 0), 4096)

    def told():
        owner.run(use)
        return sorted(hot_leaves(ctx, lun)[:len(hot)]) == hot
    wait_for(told, 120, 'the owner says which leaves are hot')
    other = Side(ctx, lun, 'b', False, **small)
    wait_for(lambda: preloaded(other, 'cache-full'), 60,
             'the follower has filled its cache')
    set_active(owner.daemon, False)
    set_active(other.daemon, True)
    other.run(use)
    read = other.info()['take-over']['metadata-bytes-read-since']
    ctx.log('%d leaves were read with %d bytes of metadata' % (len(hot),
                                                               read))
    check(read <= len(hot) // 8 * 4096, '%d bytes of metadata were read for '
          '%d leaves that were said to be hot', read, len(hot))
    owner.daemon.quit()
    other.daemon.quit()
    require_clean(ctx, lun)


@test()
def tells_of_the_owner(ctx):
    """A follower shows whose the image is, and that its counter moves."""
    _, owner, other = pair(ctx)
    ours = owner.info()
    check(ours['image-owner']['this-node'] and ours['owner'],
          'the owner does not know that it is: %s', ours)

    def sees_counter(least):
        seen = other.info().get('image-owner') or {}
        return seen.get('counter', 0) >= least
    wait_for(lambda: sees_counter(1), 20, 'the follower sees a heartbeat')
    seen = other.info()['image-owner']
    check(seen['process'] == owner.daemon.process.popen.pid and
          seen['state'] == 'active' and not seen['this-node'],
          'the follower takes %s for the owner', seen)
    wait_for(lambda: sees_counter(seen['counter'] + 2), 20,
             'the counter moves')
    owner.daemon.kill()
    wait_for(lambda: other.info()['image-owner'].get(
        'counter-unchanged-ms', 0) > 4000, 20,
        'the follower sees that the counter stands')
    other.daemon.quit()


@test()
def counter_moves_through_drains(ctx):
    """An owner whose node is drained all the time (exports come and go) still
    is seen to be alive."""
    _, owner, other = pair(ctx)

    def moves(least):
        owner.run(lambda client: None)
        seen = other.info().get('image-owner') or {}
        return seen.get('counter', 0) >= least
    wait_for(lambda: moves(4), 60, 'the counter moves', interval=0)
    owner.daemon.quit()
    other.daemon.quit()


@test(seconds=300)
def live_migration(ctx):
    """A live migration under load ends in a warm take-over."""
    lun, guest, source = setup_pair(ctx, zero=3, discard=3)
    target = VM(ctx, guest, lun, host='b', incoming=True)
    migrate(source, target)
    guest.wait_writes(300)
    take = query_thinvm(target.qmp, 'disk')['take-over']
    ctx.log('take-over: %s' % take)
    check(take['warm'], 'the take-over is not warm: %s', take)
    check(take['metadata-bytes-read-since'] == 0, 'after the switch %d bytes '
          'of metadata were read', take['metadata-bytes-read-since'])
    source.quit()
    finish(ctx, lun, guest, target)
