# SPDX-License-Identifier: GPL-2.0-or-later
"""Power cuts, made from the log of a blklogwrites node.

The log holds every write, discard and flush in the order in which they were
done.  A disk with a volatile cache that loses power has all that was written
before the last completed flush, and of what came after it any part: whole
writes are missing, others arrive torn at a sector, later ones without earlier
ones.  What was discarded may read as anything.  PowerCut puts such a disk
together in a copy of the image as it was before the log began.
"""

import os
import struct

from .context import check

SUPER = struct.Struct('<QQQI')
ENTRY = struct.Struct('<QQQQ')
MAGIC = 0x6a736677736872
FLUSH, FUA, DISCARD = 1, 2, 4
SECTOR = 512
GARBAGE = b'freed space' + b'!' * 21       # 32 bytes


def entries_in(path):
    """How many entries the log holds at this moment, as of its last flush."""
    with open(path, 'rb') as log:
        data = log.read(SUPER.size)
    if len(data) < SUPER.size:
        return 0
    magic, _, count, sector = SUPER.unpack(data)
    check(magic == MAGIC and sector == SECTOR, '%s is no write log', path)
    return count


def log_end(path):
    """Where the log ends at this moment: everything that was done and
    answered before this call has its entry before that place."""
    return os.stat(path).st_size


class Entry:
    def __init__(self, offset, length, flags, at):
        self.offset = offset            # bytes on the device
        self.length = length            # bytes
        self.flags = flags
        self.at = at                    # where its data begins in the log

    @property
    def head(self):
        """Where the entry itself begins in the log."""
        return self.at - SECTOR


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
    """Replays a log into an image file, cut by cut, with growing position.

    With @garbage what is discarded is overwritten with rubbish; else the old
    data, the second worst, stays.
    """

    def __init__(self, log_path, image_path, source, garbage=False,
                 entries=None):
        self.entries = read_log(log_path) if entries is None else entries
        self.garbage = garbage
        self._log = open(log_path, 'rb')
        self._image = open(image_path, 'r+b')
        self._random = source
        self._sure = 0                  # entries that are in for good
        self._undo = []

    def close(self):
        self._log.close()
        self._image.close()

    def _data(self, entry):
        if entry.flags & DISCARD:
            return GARBAGE * (entry.length // len(GARBAGE))
        self._log.seek(entry.at)
        data = self._log.read(entry.length)
        # The tail of a log is sparse if it was zeroes.
        return data + bytes(entry.length - len(data))

    def _write(self, offset, data, undo):
        if undo:
            self._image.seek(offset)
            old = self._image.read(len(data))
            self._undo.append((offset, old + bytes(len(data) - len(old))))
        self._image.seek(offset)
        self._image.write(data)

    def _matters(self, entry):
        return not (entry.flags & FLUSH
                    or entry.flags & DISCARD and not self.garbage)

    def _apply_partly(self, entry):
        """Whole, not at all, or torn at a sector."""
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

    def cut(self, position, size=None, drop=False):
        """The image becomes that of a cut after @position entries, of a
        device that has @size bytes by then.  What was not flushed is gone
        with @drop, else it may be there in part.  Returns how many entries
        that concerns."""
        if size is not None and self._image.seek(0, os.SEEK_END) < size:
            self._image.truncate(size)
        last = max((i for i in range(self._sure, position)
                    if self.entries[i].flags & FLUSH), default=0)
        for entry in self.entries[self._sure:last]:
            if self._matters(entry):
                self._write(entry.offset, self._data(entry), False)
        self._sure = max(self._sure, last)
        at_risk = [entry for entry in self.entries[self._sure:position]
                   if self._matters(entry)]
        if not drop:
            for entry in at_risk:
                self._apply_partly(entry)
        self._image.flush()
        return len(at_risk)

    def undo(self):
        """Take back what a cut put in beyond the last flush."""
        for offset, data in reversed(self._undo):
            self._image.seek(offset)
            self._image.write(data)
        self._undo = []
        self._image.flush()
