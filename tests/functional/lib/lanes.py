# SPDX-License-Identifier: GPL-2.0-or-later
"""A client that always has a request of each of its lanes in flight.

It writes numbered blocks, writes zeroes, discards, flushes, and has internal
snapshots created and deleted meanwhile, through the NBD export and the QMP
socket of a storage daemon.  It knows what was acknowledged, what a completed
flush covers, and what each snapshot may hold.  The daemon may die at any
moment: run() then returns, and end() has told the model what is known.
"""

import random
import time

from .context import Failure, check
from .model import OUR_BLOCK, Model, make_block
from .nbd import FLUSH, TRIM, WRITE, WRITE_ZEROES, NBDClient
from .qmp import QMPClosed, QMPError

CLUSTER = 65536
SNAPSHOTS = 4               # at the same time


class Shape:
    """Where on the disk the client writes."""

    def __init__(self, name, lanes, blocks, stride, base=0, reach=OUR_BLOCK):
        self.name = name
        self.lanes, self.blocks = lanes, blocks
        self.stride, self.base = stride, base
        self.reach = reach              # bytes of a discard or write-zeroes

    def model(self, seed):
        return Model(seed, self.lanes, self.blocks, self.stride, self.base,
                     zero=8, discard=14)


# A cluster for each block, freed as a whole by discards; and blocks that lie
# across the parts of clusters that they share.
SHAPES = (Shape('apart', 8, 40, CLUSTER, reach=CLUSTER),
          Shape('dense', 8, 200, OUR_BLOCK, base=1536))


class Snapshot:
    """An internal snapshot.  The moments are what Lanes' clock said; None
    stands for one that has not come."""

    def __init__(self, name, right):
        self.name = name
        self.right = right              # contents, see Model.right()
        self.create_returned = False
        self.created = None             # for sure there from here on
        self.deleting = None            # for sure there up to here
        self.delete_returned = False
        self.deleted = None             # for sure gone from here on

    def must_be_there(self, moment):
        return (self.created is not None and self.created <= moment
                and (self.deleting is None or moment <= self.deleting))

    def must_be_gone(self, moment):
        return self.deleted is not None and self.deleted <= moment


class Promise:
    """What a flush that is sent at this moment makes durable."""

    def __init__(self, acked, snapshots):
        self.acked = list(acked)
        self.created = [s for s in snapshots if s.create_returned]
        self.deleted = [s for s in snapshots if s.delete_returned]


class Lanes:
    def __init__(self, ctx, shape, model, source, clock=time.monotonic,
                 on_flush=None, snapshots=()):
        """@clock tells the moments; on_flush(moment, numbers) is called for
        each completed flush.  @source is a random.Random."""
        self.ctx = ctx
        self.shape = shape
        self.model = model
        self.random = source
        self.snapshots = list(snapshots)
        self._clock = clock
        self._on_flush = on_flush or (lambda moment, acked: None)
        first = model.next_first() if model.lanes[0].acked else 1
        model.start(first)
        self._sent = [first - 1] * shape.lanes
        self._acked = list(self._sent)
        self._flushed = list(self._sent)
        self._daemon = None
        self._client = None

    def connect(self, daemon, path):
        """@path: the socket of the writable export of @daemon's disk."""
        self._daemon = daemon
        self._client = NBDClient(self.ctx, path, 'disk')

    def disconnect(self):
        self._client.close()

    def _send(self, lane):
        self._sent[lane] += 1
        seq = self._sent[lane]
        index, kind = self.model.op(lane, seq)
        offset = self.model.offset(lane, index)
        if kind == 'write':
            self._client.send(WRITE, offset, tag=lane, data=make_block(
                self.model.seed, lane, index, seq))
        else:
            self._client.send(TRIM if kind == 'discard' else WRITE_ZEROES,
                              offset, length=self.shape.reach, tag=lane)

    def _flush(self):
        self._client.send(FLUSH, tag=Promise(self._acked, self.snapshots))

    def _take(self):
        """One answer."""
        tag, error, _ = self._client.reply()
        check(error == 0, 'NBD error %d', error)
        if not isinstance(tag, Promise):
            self._acked[tag] = self._sent[tag]
            return
        now = self._clock()
        self._flushed = [max(pair) for pair in zip(self._flushed, tag.acked)]
        self._on_flush(now, tag.acked)
        for snapshot in tag.created:
            if snapshot.created is None:
                snapshot.created = now
        for snapshot in tag.deleted:
            if snapshot.deleted is None:
                snapshot.deleted = now

    def settle(self):
        """A flush whose answer is known, with the lanes at rest."""
        while self._client.pending():
            self._take()
        self._flush()
        self._take()

    def _create_snapshot(self):
        """With requests in flight, which it may hold or not."""
        snapshot = Snapshot('s%d' % len(self.snapshots), [
            self.model.allowed(lane, self._acked[lane], self._sent[lane])
            for lane in range(self.shape.lanes)])
        try:
            self._daemon.qmp.cmd('blockdev-snapshot-internal-sync',
                                 device='disk', name=snapshot.name)
            snapshot.create_returned = True
        finally:
            # If the daemon dies meanwhile it may be there.
            self.snapshots.append(snapshot)

    def _delete_snapshot(self, snapshot):
        snapshot.deleting = self._clock()
        self._daemon.qmp.cmd('blockdev-snapshot-delete-internal-sync',
                             device='disk', name=snapshot.name)
        snapshot.delete_returned = True

    def _change_snapshots(self):
        there = [s for s in self.snapshots
                 if s.create_returned and s.deleting is None]
        if len(there) < SNAPSHOTS and self.random.randrange(3):
            self._create_snapshot()
        elif there:
            self._delete_snapshot(self.random.choice(there))

    def _step(self, snapshots_seldom):
        for lane in range(self.shape.lanes):
            if self._sent[lane] == self._acked[lane]:
                self._send(lane)
        if self.random.randrange(16) == 0:
            self._flush()
        elif self.random.randrange(24) == 0:
            self.settle()
        if snapshots_seldom and self.random.randrange(snapshots_seldom) == 0:
            self._change_snapshots()
        if self._client.pending():
            self._take()

    def run(self, operations, snapshots_seldom=0):
        """About so many operations, with a change of the snapshots once in
        @snapshots_seldom of them, then a flush.  False: the daemon died."""
        try:
            for _ in range(operations):
                self._step(snapshots_seldom)
            self.settle()
            return True
        except (OSError, QMPClosed, QMPError, Failure) as err:
            # QMP: the reply may be an error that NBD's end explains.
            if not self._daemon.process.gone_soon():
                raise
            self.ctx.log('the daemon died: %r' % err)
            return False

    def acked_count(self):
        return sum(acked - lane.first + 1
                   for acked, lane in zip(self._acked, self.model.lanes))

    def end(self):
        """Tell the model how far the run has come."""
        for lane, sent, acked, flushed in zip(
                self.model.lanes, self._sent, self._acked, self._flushed):
            lane.acked, lane.flushed = acked, flushed
            lane.unreported = sent - acked


def random_source():
    """A generator of its own for each thing that draws."""
    return random.Random(random.randrange(1 << 60))
