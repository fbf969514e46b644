# SPDX-License-Identifier: GPL-2.0-or-later
"""What a disk may hold, given what the guest said it had written.

The writer in the guest (../guest/writer.c) chooses block and content of each
operation from seed, lane and sequence number alone.  This model repeats the
choice.  From the numbers that were reported as acknowledged and as flushed it
tells for each block which contents are right after an event, and which mean
that a write was lost.

A content is 0 for zeroes or the sequence number of the write that made it.
"""

import struct
import zlib

from .context import Failure

MASK = (1 << 64) - 1
OUR_BLOCK = 4096
SECTOR = 512
HEAD = struct.Struct('<QQQQQQQI')
MAGIC = 0x6b6c622d6d766e74
BAD = -1
# More operations than a lane can have made since its last report.
UNREPORTED = 20000


def op_hash(seed, lane, seq):
    """The same numbers as op_hash() in writer.c."""
    x = (seed + lane * 0x9E3779B97F4A7C15 + seq * 0xD1342543DE82EF95) & MASK
    x ^= x >> 30
    x = (x * 0xBF58476D1CE4E5B9) & MASK
    x ^= x >> 27
    x = (x * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def make_block(seed, lane, index, seq):
    """The content of one block, byte for byte as writer.c makes it."""
    head = HEAD.pack(MAGIC, seed, index, seq, lane, 0, 0, 0)
    head += struct.pack('<I', zlib.crc32(head))
    return head * (OUR_BLOCK // len(head))


def read_block(data, seed, lane, index):
    """The sequence number in a block, 0 for zeroes, BAD for anything else."""
    if data.count(0) == len(data):
        return 0
    head = data[:HEAD.size + 4]
    magic, its_seed, its_index, seq, its_lane = HEAD.unpack(
        head[:HEAD.size])[:5]
    crc, = struct.unpack('<I', head[HEAD.size:])
    if (magic != MAGIC or its_seed != seed or its_index != index
            or its_lane != lane or crc != zlib.crc32(head[:HEAD.size])
            or data != head * (len(data) // len(head))):
        return BAD
    return seq


def read_sectors(data, seed, lane, index):
    """The contents that the sectors of a torn block stem from, or BAD."""
    parts = {read_block(data[at:at + SECTOR], seed, lane, index)
             for at in range(0, len(data), SECTOR)}
    return BAD if BAD in parts else tuple(sorted(parts))


class Lane:
    """How far one lane has come since the last time the disk was read."""

    def __init__(self):
        self.base = {}          # block index -> contents; absent: zeroes
        self.first = 1
        self.acked = 0
        self.flushed = 0
        self.unreported = 0     # operations there may be beyond acked


class Model:
    def __init__(self, seed, lanes, blocks, stride=OUR_BLOCK, base=0,
                 zero=0, discard=0):
        self.seed = seed
        self.blocks = blocks                # per lane
        self.stride = stride                # bytes
        self.base = base                    # bytes
        self.zero = zero                    # percent of the operations
        self.discard = discard              # percent of the operations
        self.torn = False                   # a write may be half done
        self.lanes = [Lane() for _ in range(lanes)]

    def offset(self, lane, index):
        """Byte address of a block on the guest's disk."""
        return self.base + (index * len(self.lanes) + lane) * self.stride

    def op(self, lane, seq):
        """(block index, 'write', 'zero' or 'discard') of an operation."""
        x = op_hash(self.seed, lane, seq)
        kind = (x >> 40) % 100
        if kind < self.zero:
            return x % self.blocks, 'zero'
        if kind < self.zero + self.discard:
            return x % self.blocks, 'discard'
        return x % self.blocks, 'write'

    def start(self, first):
        """A new run of the guest begins with sequence number @first.

        After a crash rebase() must come first.
        """
        for number, lane in enumerate(self.lanes):
            assert not lane.unreported
            lane.base = self.allowed(number, lane.acked, lane.acked)
            lane.first = first
            lane.acked = lane.flushed = first - 1
            lane.unreported = UNREPORTED

    def progress(self, acked, flushed):
        for lane, acked_to, flushed_to in zip(self.lanes, acked, flushed):
            lane.acked = max(lane.acked, acked_to, flushed_to)
            lane.flushed = max(lane.flushed, flushed_to)

    def stopped(self):
        """The run has ended; what was reported is exact."""
        for lane in self.lanes:
            lane.unreported = 0

    def next_first(self):
        """A sequence number that no lane can have used."""
        top = max(lane.acked for lane in self.lanes)
        return (top // 1000000 + 1) * 1000000

    def allowed(self, number, durable, upto):
        """Block index -> set of right contents, for one lane.

        Operations up to @durable must be there; those up to @upto may be.
        """
        lane = self.lanes[number]
        result = dict(lane.base)
        for seq in range(lane.first, upto + 1):
            index, kind = self.op(number, seq)
            before = result.get(index, {0})
            new = {seq} if kind == 'write' else {0}
            if kind == 'discard':           # a hint: the old may stay
                new |= before
            if seq > durable:
                new |= before
            result[index] = new
        return result

    def right(self, durable):
        """For each lane, block index -> set of right contents.

        @durable is 'acked', 'flushed', or a list with a sequence number for
        each lane: so far nothing may be lost.
        """
        result = []
        for number, lane in enumerate(self.lanes):
            if durable == 'acked':
                sure = lane.acked
            elif durable == 'flushed':
                sure = lane.flushed
            else:
                sure = durable[number]
            result.append(self.allowed(number, sure,
                                       lane.acked + lane.unreported))
        return result

    def compare(self, found, right):
        """Compare what was @found with what is @right, see right().

        @found maps (lane, index) to a content (absent: zeroes).  Returns a
        list of texts, one for each block that is wrong.
        """
        wrong = []
        for number, allowed in enumerate(right):
            for index in range(self.blocks):
                seq = found.get((number, index), 0)
                may_be = allowed.get(index, {0})
                parts = seq if isinstance(seq, tuple) else (seq,)
                if not may_be.issuperset(parts):
                    wrong.append(
                        'lane %d block %d (guest offset %d): %s, allowed %s'
                        % (number, index, self.offset(number, index),
                           'not a block of ours' if seq == BAD
                           else 'content %s' % (seq,), sorted(may_be)[:8]))
        return wrong

    def judge(self, found, durable):
        """What is wrong, given what may not be lost: see right()."""
        return self.compare(found, self.right(durable))

    def require(self, found, durable, what):
        """Fail unless everything that must be there is."""
        wrong = self.judge(found, durable)
        if wrong:
            raise Failure('%s: %d blocks are wrong: %s' % (
                what, len(wrong), '; '.join(wrong[:5])))

    def rebase(self, found):
        """The disk was read: till the next start it holds what was @found."""
        for lane in self.lanes:
            lane.base = {}
            lane.first = lane.acked + 1
            lane.unreported = 0
        for (number, index), seq in found.items():
            self.lanes[number].base[index] = set(
                seq if isinstance(seq, tuple) else (seq,))

    def scan(self, *disks):
        """Read every block with read(offset, length) of the disks that they
        are on in turn; contents found."""
        found = {}
        for number in range(len(self.lanes)):
            for index in range(self.blocks):
                read = disks[index % len(disks)]
                data = read(self.offset(number, index), OUR_BLOCK)
                seq = read_block(data, self.seed, number, index)
                if seq == BAD and self.torn:
                    seq = read_sectors(data, self.seed, number, index)
                if seq:
                    found[number, index] = seq
        return found
