# SPDX-License-Identifier: GPL-2.0-or-later
#
# A thinvm image as a whole: base and journal, and what its disk, its VM state
# and its snapshots read as, backing files included.

import os

from .journal import Journal
from .replay import State
from .structures import (
    ALL_VALID, NONE, PAGEPTR, SUPERBLOCK_OFFSETS, ZERO, ZEROES, MAP, Device,
    FormatError, NotThinvm, Superblock, entry_fields, make_entry, require,
    run_entry)


def read_superblocks(device):
    """[Superblock or FormatError] of both slots."""
    result = []
    for slot, offset in enumerate(SUPERBLOCK_OFFSETS):
        try:
            result.append(Superblock(device.read(offset, 512,
                                                 f'superblock {slot}'), slot))
        except FormatError as e:
            result.append(e)
    return result


def usable_superblocks(slots):
    """Those that may be used, newest first."""
    good = [s for s in slots if isinstance(s, Superblock)]
    for s in good:
        require(not s.unknown, s.unknown)
    if not good:
        worst = [e for e in slots if not isinstance(e, NotThinvm)]
        raise (worst or slots)[0]
    return sorted(good, key=lambda s: -s.generation)


class Image(State):
    """An image: the newest base with its journal applied."""

    def __init__(self, path, superblock=None, replay=True):
        self.device = Device(path)
        self.path = path
        slots = read_superblocks(self.device)
        usable = usable_superblocks(slots)
        if superblock is not None:
            require(isinstance(slots[superblock], Superblock),
                    str(slots[superblock]))
            usable = [slots[superblock]]
        self.slots = slots
        self.sb = usable[0]
        self._load(self.sb)
        self.journal = Journal(self.device, self.sb)
        if replay:
            require(not self.journal.damage, self.journal.damage)
            for record in self.journal.records:
                self.apply(record)

    def close(self):
        self.device.close()

    def entries(self, root, nb_clusters):
        """
        (guest, count, entry) in order, for all guest clusters below
        nb_clusters: entry stands for count clusters that are alike, where a
        physical cluster counts up.
        """
        return self._walk(root, 3, 0, nb_clusters, set())

    def _walk(self, pointer, level, base, end, seen):
        count = min(512 << 8 * level, end - base)
        if count <= 0:
            return
        if pointer.type in (NONE, ZERO):
            yield base, count, make_entry(0, 0, int(pointer.type == ZERO))
        elif pointer.type != PAGEPTR:
            yield base, count, run_entry(pointer, 0)
        else:
            require(pointer.address not in seen, f'page {pointer.address} is '
                    'in two places of one mapping tree')
            seen.add(pointer.address)
            items = self.page(pointer, MAP, level).items
            for i, item in enumerate(items):
                if level:
                    yield from self._walk(item, level - 1,
                                          base + (i << 9 + 8 * (level - 1)),
                                          end, seen)
                elif base + i < end:
                    yield base + i, 1, item

    def parts(self, root, size):
        """
        (offset, length, what, device offset): what is 'data', 'zero' or
        'backing'; neighbours that continue each other are joined.
        """
        last = None
        for piece in self._pieces(root, size):
            if last and last[2] == piece[2] and (
                    last[2] != 'data' or last[3] + last[1] == piece[3]):
                last = (last[0], last[1] + piece[1], *last[2:])
                continue
            if last:
                yield last
            last = piece
        if last:
            yield last

    def _pieces(self, root, size):
        bits, part = self.cluster_bits, self.cluster_size // 16
        for guest, count, entry in self.entries(root,
                                                -(-size >> bits)):
            physical, valid, source = entry_fields(entry)
            rest = 'zero' if source == ZEROES else 'backing'
            offset = guest << bits
            if valid in (0, ALL_VALID):
                length = min(count << bits, size - offset)
                yield (offset, length, 'data' if valid else rest,
                       physical << bits if valid else 0)
                continue
            for i in range(count * 16):
                start = offset + i * part
                length = min(part, size - start)
                if length <= 0:
                    return
                if valid >> i % 16 & 1:
                    yield start, length, 'data', (physical << bits) + i * part
                else:
                    yield start, length, rest, 0

    def open_backing(self, depth=0):
        """Image, RawImage or None."""
        if not self.backing_name:
            return None
        require(depth < 64, 'the chain of backing files is longer than 64')
        path = os.path.join(os.path.dirname(self.path), self.backing_name)
        require(os.path.exists(path), f'backing file {path!r} does not exist '
                'or is no file name (a protocol this tool does not speak)')
        kind = self.backing_format
        if not kind:
            device = Device(path)
            kind = 'thinvm' if any(isinstance(s, Superblock) for s in
                                   read_superblocks(device)) else 'raw'
            device.close()
        require(kind in ('raw', 'thinvm'), f'backing file {path!r} has format '
                f'{kind}, which this tool cannot read')
        return Image(path) if kind == 'thinvm' else RawImage(path)

    def layers(self):
        """This image and its backing files, top first."""
        chain = [self]
        while isinstance(chain[-1], Image):
            below = chain[-1].open_backing(len(chain))
            if below is None:
                break
            chain.append(below)
        return chain

    def find_snapshot(self, name):
        for s in self.snapshots.values():
            if not s.flags and name in (s.name, str(s.id)):
                return s
        raise FormatError(f'there is no snapshot {name!r}')


class RawImage:
    """A raw backing file, with the part of Image's face that export needs."""

    def __init__(self, path):
        self.path = path
        self.device = Device(path)
        self.virtual_size = self.device.size

    def parts(self, root, size):
        if size:
            yield 0, size, 'data', 0

    roots = (None,)

    def close(self):
        self.device.close()
