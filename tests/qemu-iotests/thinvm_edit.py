# SPDX-License-Identifier: GPL-2.0-or-later
#
# Changes what is in the trees of a thinvm image, and seals all that lies
# above it, so that a check meets right checksums and wrong contents.  Knows
# the newest base only; the image must have been closed (nothing in its
# journal that matters).
#
# A "location" is where an item lies: [(None, root field of the superblock),
# (page, byte in it), ..., (page, byte of the item)].

import struct

import thinvm_damage
from thinvm_damage import FIELDS, KIND_PAGE, PAGE, TYPE_PAGE

MASK = (1 << 40) - 1
SHARED_ENTRY = 1 << 59
SHARED_BELOW = 1 << 44
RUN = 2


def entry(physical, valid=0xffff, source=0, shared=False):
    return physical | valid << 40 | source << 56 | int(shared) << 59


class Editor(thinvm_damage.Image):
    # --- locations ---

    def _descend(self, location, offsets):
        """Follow pointers; offsets: bytes in each page on the way."""
        for offset in offsets:
            word = self.word(location)
            assert word >> 40 & 15 == TYPE_PAGE, (location, hex(word))
            location = location + [(word & MASK, offset)]
        return location

    @staticmethod
    def root(name):
        return [(None, FIELDS[name][0])]

    def map_location(self, guest, level=0, root=None):
        """
        Of the entry of a guest cluster (level 0), or of the pointer to the
        page of that level - 1 on its way: level 1 is the leaf's pointer.
        """
        root = root or self.root('map_root')
        offsets = [16 * (guest >> shift & 255) for shift in (25, 17, 9)]
        offsets.append(8 * (guest & 511))
        return self._descend(root, offsets[:4 - level])

    def count_location(self, cluster, level=0):
        offsets = [16 * (cluster >> shift & 255) for shift in (27, 19, 11)]
        offsets.append(2 * (cluster & 2047))
        return self._descend(self.root('count_root'), offsets[:4 - level])

    def block_location(self, extent=0):
        """Of the pointer to an extent's space block."""
        return self._descend(self.root('space_root'),
                             [16 * (extent >> 8), 16 * (extent & 255)])

    def page_count_location(self, page):
        for extent in range(self.field('nb_extents')):
            block = self.word(self.block_location(extent)) & MASK
            first, nb = struct.unpack('<QI', self.read(block * PAGE, 12))
            if first <= page < first + nb:
                return self._descend(self.block_location(extent),
                                     [32 + 2 * (page - first)])
        raise AssertionError(f'page {page} is in no extent')

    def snapshot_location(self, slot, field=0):
        return self._descend(self.root('snapshot_root'),
                             [16 * (slot >> 11 & 255), 16 * (slot >> 3 & 255),
                              512 * (slot & 7) + field])

    # --- reading and writing at locations ---

    def offset(self, location):
        page, offset = location[-1]
        if page is None:
            return thinvm_damage.SLOTS[self.newest_slot()] + offset
        return page * PAGE + offset

    def get(self, location, fmt='<Q'):
        return struct.unpack(fmt, self.read(self.offset(location),
                                            struct.calcsize(fmt)))[0]

    def word(self, location):
        return self.get(location)

    def page_at(self, location):
        """The page that the pointer there names."""
        word = self.word(location)
        assert word >> 40 & 15 == TYPE_PAGE
        return word & MASK

    def put(self, location, data):
        """Write data at a location, and seal what is above it."""
        self.write(self.offset(location), data)
        for i in range(len(location) - 1, 0, -1):
            page = location[i][0]
            crc = self.checksum(KIND_PAGE, page, self.read(page * PAGE, PAGE))
            self.write(self.offset(location[:i]) + 8, struct.pack('<I', crc))
        self.set_fields((self.newest_slot(),))

    def damage_page(self, location):
        """Change a byte of the page that the pointer there names."""
        self.flip(self.page_at(location) * PAGE + 1234)

    # --- what they hold ---

    def entry(self, guest, root=None):
        return self.word(self.map_location(guest, 0, root))

    def physical(self, guest, root=None):
        return self.entry(guest, root) & MASK

    def set_entry(self, guest, value, root=None):
        self.put(self.map_location(guest, 0, root), struct.pack('<Q', value))

    def count(self, cluster):
        return self.get(self.count_location(cluster), '<H')

    def set_count(self, cluster, count):
        """Sums of free clusters above it included."""
        location = self.count_location(cluster)
        more = (count == 0) - (self.count(cluster) == 0)
        for i in range(2, len(location)):
            at = self.offset(location[:i]) + 12
            free = struct.unpack('<I', self.read(at, 4))[0]
            self.write(at, struct.pack('<I', free + more))
        self.put(location, struct.pack('<H', count))

    def page_count(self, page):
        return self.get(self.page_count_location(page), '<H')

    def set_page_count(self, page, count):
        self.put(self.page_count_location(page), struct.pack('<H', count))
