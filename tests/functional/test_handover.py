# SPDX-License-Identifier: GPL-2.0-or-later
"""Hand-over between two qemu-storage-daemons by blockdev-set-active.

They see neither a migration nor a guest: the management tool deactivates the
disk on one side and activates it on the other.  A node that is opened
inactive is in migration mode and follows what the owner does.
"""

import random
import threading
import time

from lib.context import Failure, check, wait_for
from lib.image import GiB, File, create, require_clean
from lib.model import BAD, make_block, read_sectors
from lib.nbd import NBDClient
from lib.node import mode_of
from lib.qmp import QMPError
from lib.qsd import StorageDaemon
from lib.testing import test
from lib.tgt import Target


def pattern(number):
    return bytes([number % 255 + 1]) * 4096


def set_active(daemon, active, node='disk'):
    daemon.qmp.cmd('blockdev-set-active', node_name=node, active=active)


def write_some(ctx, daemon, first, count):
    client = NBDClient(ctx, daemon.export_nbd(), 'disk')
    acked = client.write_all((number * 69632, pattern(number))
                             for number in range(first, first + count))
    check(len(acked) == count, 'only %d of %d writes were acknowledged',
          len(acked), count)
    client.close()
    daemon.remove_export('nbd-disk')


def read_all(ctx, daemon, count, who):
    client = NBDClient(ctx, daemon.export_nbd(writable=False), 'disk')
    for number in range(count):
        check(client.read(number * 69632, 4096) == pattern(number),
              '%s does not see write %d', who, number)
    client.close()
    daemon.remove_export('nbd-disk')


def two_daemons(ctx, lun=None):
    lun = lun or Target(ctx).add_lun(2 * GiB)
    create(ctx, lun, 2 * GiB)
    first = StorageDaemon(ctx, host='a')
    first.add_disk(lun, active=True)
    second = StorageDaemon(ctx, host='b')
    second.add_disk(lun, active=False)
    return lun, first, second


@test()
def to_and_fro(ctx):
    """Data written on one side is there on the other, six times."""
    hand_to_and_fro(ctx, None)


@test()
def to_and_fro_on_a_file(ctx):
    """The same on a plain file, which grows while the other side has it
    open."""
    hand_to_and_fro(ctx, File(ctx, 'image'))


def hand_to_and_fro(ctx, place):
    lun, owner, other = two_daemons(ctx, place)
    check(mode_of(other.qmp, 'disk') == 'migration',
          'an inactive node is in mode %s', mode_of(other.qmp, 'disk'))
    written = 0
    for _ in range(6):
        write_some(ctx, owner, written, 200)
        written += 200
        set_active(owner, False)
        set_active(other, True)
        wait_for(lambda node=other: mode_of(node.qmp, 'disk') == 'writeback',
                 10, 'the new owner is in writeback mode')
        read_all(ctx, other, written, other.name)
        owner, other = other, owner
    owner.quit()
    other.quit()
    require_clean(ctx, lun)


@test()
def owner_dies_after_handover(ctx):
    """What was handed over does not depend on either process."""
    lun, first, second = two_daemons(ctx)
    write_some(ctx, first, 0, 300)
    set_active(first, False)
    set_active(second, True)
    write_some(ctx, second, 300, 100)
    second.qmp.cmd('blockdev-set-active', node_name='disk', active=False)
    first.kill()
    second.kill()
    require_clean(ctx, lun)
    third = StorageDaemon(ctx, host='c')
    third.add_disk(lun)
    read_all(ctx, third, 400, 'the third host')
    third.quit()
    require_clean(ctx, lun)


@test()
def follows_while_inactive(ctx):
    """A read-only export of the inactive side shows what the owner has
    written and flushed, without any hand-over."""
    lun, first, second = two_daemons(ctx)
    reader = NBDClient(ctx, second.export_nbd(writable=False, inactive=True),
                       'disk')
    client = NBDClient(ctx, first.export_nbd(), 'disk')
    for number in range(100):
        client.write(number * 69632, pattern(number))
        if number % 10 == 9:
            client.flush()
            for seen in range(number - 9, number + 1):
                check(reader.read(seen * 69632, 4096) == pattern(seen),
                      'the follower does not see write %d', seen)
    client.trim(0, 65536)
    client.flush()
    check(reader.read(0, 4096) in (bytes(4096), pattern(0)),
          'the follower reads rubbish where the owner discarded')
    reader.close()
    client.close()
    first.quit()
    second.quit()
    require_clean(ctx, lun)


@test()
def inactive_side_does_not_write(ctx):
    """A writable export of an inactive node is refused."""
    _, _, second = two_daemons(ctx)
    try:
        second.export_nbd()
    except QMPError as err:
        ctx.log('refused: ' + err.desc)
    else:
        raise Failure('an inactive node could be exported for writing')


class Owner(threading.Thread):
    """Writes, discards and flushes through its own export; remembers, for
    each block, the oldest content that a reader may still see."""

    BLOCKS = 120
    CLUSTER = 65536

    def __init__(self, client, seed):
        super().__init__(daemon=True)
        self.client = client
        self.random = random.Random(seed)
        self.seed = seed
        self.issued = 0
        self.sure = {}          # index -> its last flushed write
        self.trimmed = {}       # index -> its last discard
        self.ending = False
        self.error = None

    def run(self):
        try:
            pending = {}
            while not self.ending:
                self.issued += 1
                index = self.random.randrange(self.BLOCKS)
                if self.random.randrange(3) == 0:
                    self.trimmed[index] = self.issued
                    self.client.trim(index * self.CLUSTER, self.CLUSTER)
                else:
                    self.client.write(index * self.CLUSTER, make_block(
                        self.seed, 0, index, self.issued))
                    pending[index] = self.issued
                if self.issued % 25 == 0:
                    self.client.flush()
                    self.sure.update(pending)
                    pending = {}
        except Exception as err:        # the test's thread must see it
            self.error = err


@test()
def follower_sees_only_its_blocks(ctx):
    """While the owner writes, discards and so reuses clusters, each block
    that the inactive side reads is one that was written there, not older
    than the last flush before the read, or zeroes; never another's."""
    lun, first, second = two_daemons(ctx)
    reader = NBDClient(ctx, second.export_nbd(writable=False, inactive=True),
                       'disk')
    owner = Owner(NBDClient(ctx, first.export_nbd(), 'disk'), 4711)
    owner.start()
    source = random.Random(1)
    seen = set()
    end = time.monotonic() + 12
    while time.monotonic() < end and owner.is_alive():
        index = source.randrange(owner.BLOCKS)
        sure = owner.sure.get(index, 0)
        data = reader.read(index * owner.CLUSTER, 4096)
        # A read amid a write may see some sectors of it and not the others.
        seqs = read_sectors(data, owner.seed, 0, index)
        check(seqs != BAD, 'block %d is none that was written there (after '
              '%d writes); it is of block %s', index, owner.issued,
              [other for other in range(owner.BLOCKS) if read_sectors(
                  data, owner.seed, 0, other) != BAD])
        for seq in seqs:
            zero_is_right = not sure or owner.trimmed.get(index, 0) > sure
            check(sure <= seq <= owner.issued or (seq == 0 and zero_is_right),
                  'block %d holds write %d, but %d was flushed before', index,
                  seq, sure)
        seen.update(seqs)
    owner.ending = True
    owner.join(30)
    check(owner.error is None, 'the owner fails: %s', owner.error)
    check(len(seen) > 20, 'the follower saw only %d contents of %d',
          len(seen), owner.issued)
    ctx.log('%d writes, %d contents seen' % (owner.issued, len(seen)))
    owner.client.close()
    reader.close()
    first.quit()
    second.quit()
    require_clean(ctx, lun)
