# SPDX-License-Identifier: GPL-2.0-or-later
#
# Forges thinvm images, for tests: any field of any structure gets any value,
# and then all checksums are made right again, from the leaves up to the
# superblocks and along the journal (docs/interop/thinvm.rst), so that what
# was changed is believed as far as checksums go.  It shares no code with the
# driver; the checksum is that of scripts/lib/thinvm_reader.

import os
import struct
import sys

from thinvm_damage import (
    FIELDS, JOURNAL, KIND_PAGE, KIND_RECORD, KIND_SUPERBLOCK, PAGE, SLOTS)

sys.path.append(os.path.join(os.path.dirname(os.path.realpath(__file__)),
                             '..', '..', 'scripts', 'lib'))
from thinvm_reader.structures import checksum      # noqa: E402

MAGIC = b'ThinVM\x1a\n'
RECORD_MAGIC = 0x524a5654
TYPE_PAGE = 1
RECORD_MAX = 256 * 1024
FAR = 1 << 28                   # no block of a file lies from here on

# Trees: root in the superblock, levels of inner pages
MAP, COUNT, SPACE, SNAPSHOTS, NAME = 'map', 'count', 'space', 'snap', 'name'
ROOTS = (('space_root', SPACE, 2), ('count_root', COUNT, 3),
         ('map_root', MAP, 3), ('vmstate_root', MAP, 3),
         ('snapshot_root', SNAPSHOTS, 2), ('backing', NAME, 0))
SLOT_SIZE = 512                 # of a snapshot, in a leaf of that tree

# An operation's fields: (offset, struct format)
OP_FIELDS = {
    'type': (0, '<H'), 'length': (2, '<H'), 'tree': (4, '<B'),
    'source': (5, '<B'), 'valid': (6, '<H'), 'guest': (8, '<Q'),
    'count': (16, '<Q'), 'physical': (24, '<Q'), 'value': (32, '<Q'),
}
RECORD_FIELDS = {
    'magic': (0, '<I'), 'epoch': (8, '<Q'), 'sequence': (16, '<Q'),
    'flushed': (24, '<Q'), 'length': (36, '<I'), 'operations': (40, '<I'),
    'flags': (44, '<I'), 'reserved': (48, '<Q'),
}


def operation(payload=b'', **fields):
    """An operation, encoded."""
    op = bytearray(40) + payload
    fields.setdefault('length', len(op))
    for name, value in fields.items():
        offset, fmt = OP_FIELDS[name]
        struct.pack_into(fmt, op, offset, value)
    return bytes(op)


def solve(columns, wanted):
    """x with the sum (exclusive or) of columns[i] over its bits = wanted."""
    rows = []                   # (value, which columns make it)
    for i, value in enumerate(columns):
        made = 1 << i
        for v, m in rows:
            if value ^ v < value:
                value, made = value ^ v, made ^ m
        if value:
            rows.append((value, made))
            rows.sort(reverse=True)
    x = 0
    for v, m in rows:
        if wanted ^ v < wanted:
            wanted, x = wanted ^ v, x ^ m
    return None if wanted else x


class Forger:
    """
    An image in a file that nobody has open, held in memory block by block;
    save() seals it and writes what was changed.
    """

    def __init__(self, path):
        self.path = path
        self.blocks, self.original = {}, {}
        self.file = os.open(path, os.O_RDWR)

    def close(self):
        os.close(self.file)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def block(self, number):
        """4 KiB of the device, to be changed in place."""
        if number not in self.blocks:
            data = b''
            if number < FAR:
                data = os.pread(self.file, PAGE, number * PAGE)
            data += bytes(PAGE - len(data))
            self.original[number] = data
            self.blocks[number] = bytearray(data)
        return self.blocks[number]

    # Superblocks

    @property
    def superblocks(self):
        """Those that there are, newest first."""
        found = [self.block(s // PAGE) for s in SLOTS]
        found = [b for b in found if b[:8] == MAGIC]
        return sorted(found, key=lambda b: -struct.unpack_from(
            '<Q', b, FIELDS['generation'][0])[0])

    @property
    def uuid(self):
        return bytes(self.superblocks[0][16:32])

    def get(self, name):
        offset, fmt = FIELDS[name]
        return struct.unpack_from(fmt, self.superblocks[0], offset)[0]

    def set(self, **values):
        """Fields of all superblocks."""
        for block in self.superblocks:
            for name, value in values.items():
                offset, fmt = FIELDS[name]
                struct.pack_into(fmt, block, offset, value)

    def only_newest(self):
        """There is no older base to fall back to."""
        for block in self.superblocks[1:]:
            block[:] = bytes(PAGE)

    @property
    def first_cluster(self):
        size = 1 << self.get('cluster_bits')
        return -(-(JOURNAL + self.get('journal_size')) // size)

    # Pages

    @staticmethod
    def pointer(block, offset):
        """Number of the page that a pointer names, or None."""
        word = struct.unpack_from('<Q', block, offset)[0]
        return word & (1 << 40) - 1 if word >> 40 & 15 == TYPE_PAGE else None

    @staticmethod
    def point(block, offset, page, kind=TYPE_PAGE, flags=0):
        struct.pack_into('<QII', block, offset, page | kind << 40 | flags,
                         0, 0)

    def _pointers(self, block, tree, level):
        """[(offset, tree, level)] of the pointers in a page."""
        if level:
            return [(16 * i, tree, level - 1) for i in range(256)]
        if tree == SNAPSHOTS:
            return [(SLOT_SIZE * i + at, MAP, 3) for i in range(8)
                    for at in (16, 32) if block[SLOT_SIZE * i:][:1]]
        return []

    def places(self):
        """Every page that can be reached: [(number, tree, level)]."""
        found = {}
        queue = [(block, FIELDS[name][0], tree, level)
                 for block in self.superblocks for name, tree, level in ROOTS]
        while queue:
            block, offset, tree, level = queue.pop(0)
            number = self.pointer(block, offset)
            if number is None or number in found or \
                    number * PAGE >= os.fstat(self.file).st_size:
                continue
            found[number] = (number, tree, level)
            child = self.block(number)
            queue += [(child, *p) for p in self._pointers(child, tree, level)]
        return list(found.values())

    def path_to(self, root, *indices):
        """Numbers of the pages on a path from a root of the newest base."""
        block, offset = self.superblocks[0], FIELDS[root][0]
        numbers = []
        for index in (*indices, None):
            number = self.pointer(block, offset)
            if number is None:
                break
            numbers.append(number)
            if index is not None:
                block, offset = self.block(number), 16 * index
        return numbers

    def leaf(self, root='map_root'):
        """The first leaf (its number) below a root."""
        found = []

        def walk(block, offset, level):
            number = self.pointer(block, offset)
            if number is not None and level == 0:
                found.append(number)
            elif number is not None:
                for i in range(256):
                    if not found:
                        walk(self.block(number), 16 * i, level - 1)

        levels = {name: level for name, _, level in ROOTS}
        walk(self.superblocks[0], FIELDS[root][0], levels[root])
        return found[0]

    def _seal_pages(self):
        sums = {}

        def seal(block, offset, tree, level):
            number = self.pointer(block, offset)
            if number is None:
                return
            if number not in sums:
                sums[number] = None     # a cycle keeps what it has
                if number * PAGE >= os.fstat(self.file).st_size:
                    return
                page = self.block(number)
                for p in self._pointers(page, tree, level):
                    seal(page, *p)
                sums[number] = checksum(self.uuid, KIND_PAGE, number, page)
            if sums[number] is not None:
                struct.pack_into('<I', block, offset + 8, sums[number])

        for sb in self.superblocks:
            for name, tree, level in ROOTS:
                seal(sb, FIELDS[name][0], tree, level)
        return sums

    def close_cycle(self, number, block, offset):
        """
        The pointer at @offset of @block leads back to @number, from which
        the block is reached.  A checksum that is right all round exists: it
        is a fixed point of a linear map.
        """
        self.point(block, offset, number)
        generation = 0

        def around(x):
            struct.pack_into('<I', block, offset + 8, x)
            return self._seal_pages()[number]

        while True:
            zero = around(0)
            columns = [around(1 << i) ^ zero ^ 1 << i for i in range(32)]
            x = solve(columns, zero)
            if x is not None:
                break
            generation += 1             # another map
            struct.pack_into('<H', block, offset + 6, generation)
        around(x)
        assert self._seal_pages()[number] == x

    # Journal

    def _ring(self, position, length):
        """[(block, bytes)] of the ring from a position on."""
        size = self.get('journal_size')
        for at in range(0, length, PAGE):
            where = JOURNAL + (position + at) % size
            yield self.block(where // PAGE), min(PAGE, length - at)

    def records(self, base=None):
        """[(position, length)] of the records after the oldest base."""
        base = base or self.superblocks[-1]
        size = self.get('journal_size')
        position = struct.unpack_from('<Q', base,
                                      FIELDS['journal_position'][0])[0]
        found = []
        while len(found) < 10000 and size and size % PAGE == 0:
            block = self.block((JOURNAL + position % size) // PAGE)
            magic, = struct.unpack_from('<I', block)
            length, = struct.unpack_from('<I', block, 36)
            if magic != RECORD_MAGIC or not 64 <= length <= RECORD_MAX or \
                    length % 8:
                break
            found.append((position, length))
            position = (position + -(-length // PAGE) * PAGE) % size
        return found

    def record(self, position):
        """The first block of a record, to be changed in place."""
        return self.block((JOURNAL + position) // PAGE)

    def set_record(self, position, **values):
        for name, value in values.items():
            offset, fmt = RECORD_FIELDS[name]
            struct.pack_into(fmt, self.record(position), offset, value)

    def append(self, *operations, **header):
        """A record with these operations after the last one."""
        records = self.records(self.superblocks[0])
        size = self.get('journal_size')
        if records:
            position, length = records[-1]
            position = (position + -(-length // PAGE) * PAGE) % size
        else:
            position = self.get('journal_position')
        block = self.record(position)
        body = b''.join(operations)
        block[:] = bytes(PAGE)
        block[64:64 + len(body)] = body
        assert len(block) == PAGE
        struct.pack_into('<I', block, 0, RECORD_MAGIC)
        struct.pack_into('<I', block, 36, 64 + len(body))
        struct.pack_into('<I', block, 40, len(operations))
        self.set_record(position, **header)
        return position

    def seal_journal(self, numbers=True):
        """Sequence, epoch and checksum of each record follow the last."""
        older, newer = self.superblocks[-1], self.superblocks[0]
        sequence, epoch = struct.unpack_from('<QQ', older, 112)
        crc, = struct.unpack_from('<I', older, 136)
        for position, length in self.records():
            if newer is not older and position == self.get(
                    'journal_position') and numbers:
                self._seal_base(newer, sequence, epoch, crc)
            data = bytearray().join(bytes(b[:n]) for b, n in
                                    self._ring(position, length))
            if numbers:
                epoch = max(epoch, struct.unpack_from('<Q', data, 8)[0])
                struct.pack_into('<QQ', data, 8, epoch, sequence + 1)
            struct.pack_into('<I', data, 32, crc)
            struct.pack_into('<I', data, 4, 0)
            sequence, = struct.unpack_from('<Q', data, 16)
            crc = checksum(self.uuid, KIND_RECORD, sequence, data)
            struct.pack_into('<I', data, 4, crc)
            at = 0
            for b, n in self._ring(position, length):
                b[:n] = data[at:at + n]
                at += n

    @staticmethod
    def _seal_base(block, sequence, epoch, crc):
        struct.pack_into('<QQ', block, 112, sequence, epoch)
        struct.pack_into('<I', block, 136, crc)

    # All

    def _seal_superblocks(self):
        for block in self.superblocks:
            struct.pack_into('<I', block, 12, 0)
            struct.pack_into('<I', block, 12, checksum(
                bytes(block[16:32]), KIND_SUPERBLOCK, 0, block[:512]))

    def seal(self, journal=True):
        if self.superblocks:
            self._seal_pages()
            if journal:
                self.seal_journal()
            self._seal_superblocks()

    def save(self, journal=True):
        self.seal(journal)
        self.write()

    def write(self):
        """Without a right checksum."""
        for number, block in self.blocks.items():
            if number < FAR and block != self.original[number]:
                os.pwrite(self.file, block, number * PAGE)
                self.original[number] = bytes(block)
