# SPDX-License-Identifier: GPL-2.0-or-later
"""Power cuts, made from the log of a blklogwrites node.

The log holds every write, discard and flush in the order in which they were
done.  A disk with a volatile cache that loses power has all that was written
before the last completed flush, and of what came after it any part: whole
writes are missing, others arrive torn at a sector.  PowerCut puts such a
disk together in a copy of the image as it was before the log began.
"""

import struct

from .context import check

SUPER = struct.Struct('<QQQI')
ENTRY = struct.Struct('<QQQQ')
MAGIC = 0x6a736677736872
FLUSH, FUA, DISCARD = 1, 2, 4
SECTOR = 512


def entries_in(path):
    """How many entries the log holds at this moment, as of its last flush."""
    with open(path, 'rb') as log:
        data = log.read(SUPER.size)
    if len(data) < SUPER.size:
        return 0
    magic, _, count, sector = SUPER.unpack(data)
    check(magic == MAGIC and sector == SECTOR, '%s is no write log', path)
    return count


class Entry:
    def __init__(self, offset, length, flags, at):
        self.offset = offset            # bytes on the device
        self.length = length            # bytes
        self.flags = flags
        self.at = at                    # where its data begins in the log


def read_log(path):
    """All entries, in order; their data stays in the file."""
    entries = []
    count = entries_in(path)
    with open(path, 'rb') as log:
        at = SECTOR
        for _ in range(count):
            log.seek(at)
            sector, length, flags, _ = ENTRY.unpack(log.read(ENTRY.size))
            at += SECTOR
            entry = Entry(sector * SECTOR, length * SECTOR, flags, at)
            if not flags & (FLUSH | DISCARD):
                at += entry.length
            entries.append(entry)
    return entries


class PowerCut:
    """Replays a log into an image file, cut by cut, with growing position."""

    def __init__(self, log_path, image_path, source):
        self.entries = read_log(log_path)
        self._log = open(log_path, 'rb')
        self._image = open(image_path, 'r+b')
        self._random = source
        self._sure = 0                  # entries that are in for good
        self._undo = []

    def close(self):
        self._log.close()
        self._image.close()

    def _data(self, entry):
        self._log.seek(entry.at)
        data = self._log.read(entry.length)
        # The tail of a log is sparse if it was zeroes.
        return data + bytes(entry.length - len(data))

    def _write(self, offset, data, undo):
        if undo:
            self._image.seek(offset)
            self._undo.append((offset, self._image.read(len(data))))
        self._image.seek(offset)
        self._image.write(data)

    def _apply(self, entry):
        # Discarded space may read as anything; the old data is the worst.
        if not entry.flags & (FLUSH | DISCARD):
            self._write(entry.offset, self._data(entry), False)

    def _apply_partly(self, entry):
        """Whole, not at all, or torn at a sector."""
        if entry.flags & (FLUSH | DISCARD):
            return
        fate = self._random.randrange(4)
        data = self._data(entry)
        if fate == 0:
            self._write(entry.offset, data, True)
        elif fate == 1:
            cut = SECTOR * self._random.randrange(entry.length // SECTOR + 1)
            self._write(entry.offset, data[:cut], True)
        elif fate == 2:
            cut = SECTOR * self._random.randrange(entry.length // SECTOR + 1)
            self._write(entry.offset + cut, data[cut:], True)

    def cut(self, position):
        """The image becomes that of a cut after @position entries."""
        last = max((i for i in range(position)
                    if self.entries[i].flags & FLUSH), default=0)
        for entry in self.entries[self._sure:last]:
            self._apply(entry)
        self._sure = max(self._sure, last)
        for entry in self.entries[self._sure:position]:
            self._apply_partly(entry)
        self._image.flush()

    def undo(self):
        """Take back what a cut put in beyond the last flush."""
        for offset, data in reversed(self._undo):
            self._image.seek(offset)
            self._image.write(data)
        self._undo = []
        self._image.flush()
