# SPDX-License-Identifier: GPL-2.0-or-later
#
# Damages thinvm images at chosen places, for tests: knows where the
# structures lie (docs/interop/thinvm.rst) and how they are sealed, so that
# it can leave a checksum wrong or make a hostile value look right.  It
# shares no code with the driver.

import os
import struct

PAGE = 4096
SLOTS = (0, 512 * 1024)         # superblocks, bytes
CLAIMS = 64 * 1024
HEARTBEATS = 128 * 1024
JOURNAL = 1024 * 1024
KIND_SUPERBLOCK, KIND_RECORD, KIND_CLAIM, KIND_PAGE = 1, 2, 3, 5

# name: (offset in the superblock, struct format)
FIELDS = {
    'magic': (0, '<Q'), 'version_major': (8, '<H'),
    'version_minor': (10, '<H'), 'crc': (12, '<I'),
    'compatible': (32, '<Q'), 'readonly_compatible': (40, '<Q'),
    'incompatible': (48, '<Q'), 'autoclear': (56, '<Q'),
    'cluster_bits': (64, '<I'), 'flags': (68, '<I'),
    'journal_offset': (72, '<Q'), 'journal_size': (80, '<Q'),
    'virtual_size': (88, '<Q'), 'device_clusters': (96, '<Q'),
    'generation': (104, '<Q'), 'sequence': (112, '<Q'),
    'epoch': (120, '<Q'), 'journal_position': (128, '<Q'),
    'record_crc': (136, '<I'), 'nb_extents': (140, '<I'),
    'next_snapshot_id': (144, '<Q'), 'current_snapshot_id': (152, '<Q'),
    'nb_snapshots': (160, '<I'), 'nb_snapshot_slots': (164, '<I'),
    'vmstate_size': (168, '<Q'), 'map_root': (176, '<Q'),
    'vmstate_root': (192, '<Q'), 'count_root': (208, '<Q'),
    'space_root': (224, '<Q'), 'snapshot_root': (240, '<Q'),
    'backing': (256, '<Q'), 'reserved_root_0': (272, '<Q'),
    'reserved': (400, '<Q'), 'template_digest': (416, '<32s'),
}
TYPE_PAGE = 1


def _table():
    table = []
    for n in range(256):
        for _ in range(8):
            n = n >> 1 ^ (0x82f63b78 if n & 1 else 0)
        table.append(n)
    return table


TABLE = _table()


def crc32c(data):
    crc = 0xffffffff
    for byte in data:
        crc = crc >> 8 ^ TABLE[(crc ^ byte) & 0xff]
    return crc ^ 0xffffffff


class Image:
    """An image file that nobody has open."""

    def __init__(self, path):
        self.path = path

    def read(self, offset, size):
        with open(self.path, 'rb') as f:
            return os.pread(f.fileno(), size, offset)

    def write(self, offset, data):
        with open(self.path, 'r+b') as f:
            os.pwrite(f.fileno(), data, offset)

    def flip(self, offset):
        """Damage one byte."""
        self.write(offset, bytes([self.read(offset, 1)[0] ^ 0x5a]))

    def checksum(self, kind, place, data):
        return crc32c(self.uuid + struct.pack('<IQ', kind, place) + data)

    # Superblocks

    def superblock(self, slot):
        return bytearray(self.read(SLOTS[slot], 512))

    @property
    def uuid(self):
        return bytes(self.superblock(self.newest_slot())[16:32])

    def field(self, name, slot=None):
        offset, fmt = FIELDS[name]
        if slot is None:
            slot = self.newest_slot()
        return struct.unpack_from(fmt, self.superblock(slot), offset)[0]

    def newest_slot(self):
        """The valid slot of the higher generation."""
        best = None
        for slot in range(2):
            block = self.superblock(slot)
            if block[0] == 0 or not any(block):
                continue
            generation = struct.unpack_from('<Q', block, 104)[0]
            if best is None or generation > best[0]:
                best = (generation, slot)
        return best[1]

    def set_fields(self, slots=(0, 1), **values):
        """Set fields in these slots, where there is one, and seal them."""
        for slot in slots:
            block = self.superblock(slot)
            if not any(block):
                continue
            for name, value in values.items():
                offset, fmt = FIELDS[name]
                struct.pack_into(fmt, block, offset, value)
            struct.pack_into('<I', block, 12, 0)
            crc = crc32c(bytes(block[16:32]) +
                         struct.pack('<IQ', KIND_SUPERBLOCK, 0) + block)
            struct.pack_into('<I', block, 12, crc)
            self.write(SLOTS[slot], bytes(block))

    # Pages

    def root(self, name):
        """The page that a root pointer names, or None."""
        word = self.field(name)
        if word >> 40 & 15 != TYPE_PAGE:
            return None
        return word & (1 << 40) - 1

    def children(self, page):
        """Pages that an inner page's pointers name."""
        data = self.read(page * PAGE, PAGE)
        words = struct.unpack('<' + 'QQ' * 256, data)[::2]
        return [w & (1 << 40) - 1 for w in words
                if w >> 40 & 15 == TYPE_PAGE]

    # Claims

    def newest_claim(self):
        """(offset, block of 512 bytes) of the claim of the highest epoch."""
        blocks = [(CLAIMS + slot * PAGE, self.read(CLAIMS + slot * PAGE, 512))
                  for slot in range(16)]
        return max((b for b in blocks if b[1][:4] == b'TVCL'),
                   key=lambda b: struct.unpack_from('<Q', b[1], 8))

    def set_boot(self, boot):
        """The newest claim was made in another boot of its host; its owner,
        if he lives, knows the claim for his by the nonce."""
        offset, data = self.newest_claim()
        block = bytearray(data)
        block[4:8], block[48:64] = bytes(4), boot
        crc = self.checksum(KIND_CLAIM, struct.unpack_from('<Q', block, 8)[0],
                            bytes(block))
        struct.pack_into('<I', block, 4, crc)
        self.write(offset, bytes(block))

    # Journal

    def records(self):
        """[(offset, length)] of records after the newest base, in order."""
        size = self.field('journal_size')
        position = self.field('journal_position')
        sequence = self.field('sequence')
        found = []
        while True:
            offset = JOURNAL + position
            head = self.read(offset, 64)
            magic, _, _, number = struct.unpack_from('<IIQQ', head)
            length = struct.unpack_from('<I', head, 36)[0]
            if magic != 0x524a5654 or number != sequence + 1:
                return found
            found.append((offset, length))
            sequence = number
            position = (position + -(-length // PAGE) * PAGE) % size

    def seal_record(self, offset, length):
        """Make the checksum of a changed record right again."""
        data = bytearray(self.read(offset, length))
        struct.pack_into('<I', data, 4, 0)
        sequence = struct.unpack_from('<Q', data, 16)[0]
        crc = self.checksum(KIND_RECORD, sequence, bytes(data))
        struct.pack_into('<I', data, 4, crc)
        self.write(offset, bytes(data))
