# SPDX-License-Identifier: GPL-2.0-or-later
#
# A base of a thinvm image: its pages, metadata extents, snapshots and counts,
# loaded as they are asked for and judged as they are loaded.

import array
import bisect
import collections
import struct

from .structures import (
    ALL_VALID, COUNT, COUNT_MAX, COUNT_METADATA, EMPTY, EXTENT_MAX_PAGES,
    MAP, NAME, NONE, PAGE, PAGEPTR, RUN, SNAPSHOTS, SPACE, SUM_PAGE,
    TEMPLATE, UNIFORM, UNWRITTEN_RUN, ZERO, ZEROES, FormatError, Snapshot,
    checksum, decode_backing, decode_pointer, entry_fields, require)

class Page:
    """A metadata page; items are entries, pointers, counts or snapshots."""
    __slots__ = ('kind', 'level', 'items', 'first_page')

    def __init__(self, kind, level, items, first_page=0):
        self.kind, self.level, self.items = kind, level, items
        self.first_page = first_page

    def copy(self):
        return Page(self.kind, self.level, list(self.items), self.first_page)


INNER_TYPES = {MAP: (NONE, PAGEPTR, ZERO), COUNT: (NONE, PAGEPTR, UNIFORM),
               SPACE: (NONE, PAGEPTR), SNAPSHOTS: (NONE, PAGEPTR)}


class Extent(collections.namedtuple('Extent', 'first nb_pages counts')):
    """Metadata extent: page numbers, and a list of counts."""
    __slots__ = ()


class Pages:
    """
    A base, and what was changed on top of it in memory.

    Changed pages live in self.changed under their old number, or under a new
    one that no page of a device can have.  Counts of clusters that differ
    from the base's count tree are in self.count_changes.
    """

    def _load(self, sb):
        self.uuid, self.cluster_bits = sb.uuid, sb.cluster_bits
        self.cluster_size = 1 << sb.cluster_bits
        self.first_cluster = sb.first_cluster
        self.device_clusters = sb.device_clusters
        self.virtual_size = sb.virtual_size
        self.vmstate_size = sb.vmstate_size
        self.epoch = sb.epoch
        self.roots = [sb.map_root, sb.vmstate_root]
        self.next_snapshot_id = sb.next_snapshot_id
        self.current_snapshot_id = sb.current_snapshot_id
        self.nb_slots = sb.nb_snapshot_slots
        possible = sb.device_clusters // 512 * (sb.nb_snapshot_slots + 1)
        self.promised_pages = sb.promised_pages if (
            sb.promises_exact and sb.promised_pages <= possible) else None
        self.changed = {}
        self.next_page = 1 << 40
        self.new_page_counts = {}
        self.count_changes = {}
        self.cache = collections.OrderedDict()
        self._load_extents(sb)
        self.backing_name, self.backing_format = '', ''
        if sb.backing.type == PAGEPTR:
            self.backing_name, self.backing_format = self.page(
                sb.backing, NAME, 0).items
        self.snapshots = dict(self._load_snapshots(sb))

    # -- pages --

    def _load_extents(self, sb):
        self.extents, self.extent_starts, self.sorted_extents = [], [], []
        pointers = list(self._leaves(sb.space_root, SPACE, sb.nb_extents))
        for i, (_, pointer) in enumerate(pointers):
            block = self.page(pointer, SPACE, 0)
            self.add_extent(Extent(block.first_page, len(block.items),
                                   block.items), f'metadata extent {i}')
        # they could be judged only now
        for p in [sb.space_root] + [p for _, p in pointers]:
            self._judge_page_number(p.address, 'space map')

    def _leaves(self, pointer, kind, limit):
        """(index, pointer) of the leaves of a two-level tree."""
        top = self.page(pointer, kind, 2)
        for i, p in enumerate(top.items):
            if p.type == NONE:
                continue
            for j, q in enumerate(self.page(p, kind, 1).items):
                index = i << 8 | j
                if q.type == NONE:
                    require(kind != SPACE or index >= limit,
                            f'space map: block {index} is missing')
                elif index < limit or kind == SNAPSHOTS:
                    yield index, q
                else:
                    raise FormatError(f'{kind}: block {index} is behind the '
                                      f'last, {limit}')

    def add_extent(self, extent, where):
        shift = self.cluster_bits - 12
        i = bisect.bisect(self.extent_starts, extent.first)
        overlaps = (
            i > 0 and self.sorted_extents[i - 1].first +
            self.sorted_extents[i - 1].nb_pages > extent.first or
            i < len(self.sorted_extents) and
            extent.first + extent.nb_pages > self.sorted_extents[i].first)
        require(not overlaps, f'{where}: overlaps another')
        require(len(self.extents) < 65536, f'{where}: one too many')
        require(self.first_cluster <= extent.first >> shift and
                extent.first + extent.nb_pages <=
                min(self.device_clusters << shift, 1 << 40),
                f'{where}: outside of the device')
        self.extents.append(extent)
        self.extent_starts.insert(i, extent.first)
        self.sorted_extents.insert(i, extent)

    def extent_of(self, page):
        i = bisect.bisect(self.extent_starts, page) - 1
        if i >= 0:
            e = self.sorted_extents[i]
            if page < e.first + e.nb_pages:
                return e
        return None

    def _judge_page_number(self, number, where):
        require(self.extent_of(number) is not None,
                f'{where}: page {number} is in no metadata extent')

    def _judge_clusters(self, first, n, where):
        require(self.first_cluster <= first and
                first + n <= self.device_clusters,
                f'{where}: physical clusters {first} to {first + n - 1} are '
                f'not on the device ({self.first_cluster} to '
                f'{self.device_clusters - 1})')
        shift = self.cluster_bits - 12
        i = bisect.bisect_left(self.extent_starts, first + n << shift) - 1
        if i >= 0:
            e = self.sorted_extents[i]
            require(e.first + e.nb_pages <= first << shift,
                    f'{where}: physical clusters {first} to {first + n - 1} '
                    'hold metadata')

    def page(self, pointer, kind, level):
        """The page that a pointer leads to."""
        number = pointer.address
        page = self.changed.get(number)
        if page is None:
            page = self.cache.get((number, pointer.crc))
        where = f'page {number} ({kind}, level {level})'
        if page is None:
            data = self.device.read(number * PAGE, PAGE, where)
            crc = checksum(self.uuid, SUM_PAGE, number, data)
            require(crc == pointer.crc, f'{where}: checksum {crc:#010x}, but '
                    f'the pointer says {pointer.crc:#010x}')
            if kind not in (SPACE,):
                self._judge_page_number(number, where)
            page = self._decode(data, kind, level, where)
            self.cache[number, pointer.crc] = page
            if len(self.cache) > 8192:
                self.cache.popitem(last=False)
        require(page.kind == kind and page.level == level,
                f'{where}: is also a {page.kind} page of level {page.level}')
        return page

    def _decode(self, data, kind, level, where):
        if kind == NAME:
            name = decode_backing(data, where)
            require(name[0], f'{where}: empty name')
            return Page(kind, level, name)
        if level:
            return Page(kind, level, self._decode_inner(data, kind, level,
                                                        where))
        if kind == MAP:
            return Page(kind, level, self._decode_leaf(data, where))
        if kind == COUNT:
            items = array.array('H', struct.unpack('<2048H', data))
            require(all(c <= COUNT_MAX or c == COUNT_METADATA for c in items),
                    f'{where}: impossible count')
            return Page(kind, level, items)
        if kind == SPACE:
            return self._decode_block(data, where)
        slots = []
        for i in range(8):
            slot = data[512 * i:512 * i + 512]
            slots.append(Snapshot(slot, f'{where}, slot {i}')
                         if any(slot) else None)
        return Page(kind, level, slots)

    def _decode_inner(self, data, kind, level, where):
        allowed = INNER_TYPES[kind]
        if kind == MAP and level == 1:
            allowed += (RUN, UNWRITTEN_RUN)
        most = 2048 << 8 * (level - 1) if kind == COUNT else 0
        items = []
        for i, words in enumerate(struct.iter_unpack('<QII', data)):
            if words == (0, 0, 0):
                items.append(EMPTY)
                continue
            here = f'{where}, pointer {i}'
            p = decode_pointer(*words, allowed, here, most, kind == MAP)
            if p.type == PAGEPTR and kind != SPACE:
                self._judge_page_number(p.address, here)
            elif p.type in (RUN, UNWRITTEN_RUN):
                self._judge_clusters(p.address, 512, here)
            items.append(p)
        return items

    def _decode_leaf(self, data, where):
        items = list(struct.unpack('<512Q', data))
        for i, entry in enumerate(items):
            if not entry:
                continue
            physical, valid, source = entry_fields(entry)
            here = f'{where}, entry {i}'
            marked = (source == TEMPLATE and self.sb.template and
                      valid == ALL_VALID)
            require(not entry >> 60 and (source <= ZEROES or marked),
                    f'{here}: reserved bits or source in {entry:#x}')
            if physical:
                self._judge_clusters(physical, 1, here)
            else:
                require(not valid and not entry >> 59 & 1,
                        f'{here}: valid or shared without a cluster')
        return items

    def _decode_block(self, data, where):
        first, nb = struct.unpack_from('<QI', data)
        unit = self.cluster_size // PAGE
        require(0 < nb <= EXTENT_MAX_PAGES and nb % unit == 0 and
                first % unit == 0,
                f'{where}: extent of {nb} pages at page {first} is not of '
                'whole clusters')
        require(not any(data[12:32]) and not any(data[32 + 2 * nb:]),
                f'{where}: reserved bytes are not zero')
        counts = list(struct.unpack_from(f'<{nb}H', data, 32))
        require(max(counts) <= COUNT_MAX, f'{where}: impossible count')
        return Page(SPACE, 0, counts, first)

    # -- snapshots --

    def _load_snapshots(self, sb):
        ids = set()
        found = 0
        if sb.snapshot_root.type == PAGEPTR:
            for index, pointer in self._leaves(sb.snapshot_root, SNAPSHOTS,
                                               0):
                for i, s in enumerate(self.page(pointer, SNAPSHOTS, 0).items):
                    slot = index << 3 | i
                    if s is None:
                        continue
                    require(slot < sb.nb_snapshot_slots,
                            f'snapshot {s.id}: slot {slot} is not below '
                            f'{sb.nb_snapshot_slots}')
                    require(s.id < sb.next_snapshot_id and s.id not in ids,
                            f'snapshot {s.id}: id is used twice or too great')
                    for p in (s.root, s.vmstate_root):
                        if p.type == PAGEPTR:
                            self._judge_page_number(p.address,
                                                    f'snapshot {s.id}')
                    ids.add(s.id)
                    found += 1
                    yield slot, s.copy()
        require(found == sb.nb_snapshots, f'{found} snapshots, but the '
                f'superblock says {sb.nb_snapshots}')

    # -- counts --

    def page_count(self, number):
        if number in self.new_page_counts:
            return self.new_page_counts[number]
        e = self.extent_of(number)
        return e.counts[number - e.first] if e else 0

    def _change_page_count(self, number, by):
        count = self.page_count(number) + by
        require(0 <= count <= COUNT_MAX and count - by > 0,
                f'page {number}: count would go from {count - by} to {count}')
        if number in self.new_page_counts:
            self.new_page_counts[number] = count
        else:
            e = self.extent_of(number)
            e.counts[number - e.first] = count
        return count

    def base_count(self, cluster):
        """Out of the count tree of the base."""
        p = self.sb.count_root
        for level in (3, 2, 1, 0):
            if p.type == NONE:
                return 0
            if p.type == UNIFORM:
                return p.address
            page = self.page(p, COUNT, level)
            if level == 0:
                return page.items[cluster & 2047]
            p = page.items[cluster >> 8 * level + 3 & 255]
        return 0

    def _used_behind(self, pointer, level, base, first):
        """Has the base counts other than 0, unchanged since, from first on?"""
        span = 2048 << 8 * level
        if pointer.type == NONE or base + span <= first:
            return False
        if pointer.type == UNIFORM:
            start = max(first, base)
            return (base + span - start > len(self.count_changes) or
                    any(c not in self.count_changes
                        for c in range(start, base + span)))
        items = self.page(pointer, COUNT, level).items
        if level:
            return any(self._used_behind(p, level - 1, base + i * (span >> 8),
                                         first) for i, p in enumerate(items))
        return any(count and base + i >= first and
                   base + i not in self.count_changes
                   for i, count in enumerate(items))

    def cluster_count(self, cluster):
        count = self.count_changes.get(cluster)
        return self.base_count(cluster) if count is None else count

    def _change_counts(self, first, n, by):
        for c in range(first, first + n):
            count = self.cluster_count(c)
            require(count <= COUNT_MAX and 0 <= count + by <= COUNT_MAX,
                    f'cluster {c}: count {count} cannot change by {by}')
            self.count_changes[c] = count + by

    def _take_clusters(self, first, n, count, what):
        self._judge_clusters(first, n, what)
        for c in range(first, first + n):
            require(self.cluster_count(c) == 0, f'{what}: cluster {c} is in '
                    f'use (count {self.cluster_count(c)})')
            self.count_changes[c] = count
