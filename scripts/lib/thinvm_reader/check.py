# SPDX-License-Identifier: GPL-2.0-or-later
#
# Verifies a thinvm image: walks all that can be reached, counts again, and
# compares with what the image says, for each base that a superblock names and
# again after its journal was applied.  docs/interop/thinvm.rst, "What is
# always true", has the list.
#
# A cluster or page whose count is too great is leaked; everything else is
# corruption.

import array

from .image import Image
from .structures import (
    COUNT, COUNT_METADATA, MAP, NAME, NONE, PAGEPTR, RUN, SNAPSHOTS, SPACE,
    TRASH, UNIFORM, UNWRITTEN_RUN, ZERO, FormatError, Superblock,
    entry_fields, require)

BLOCK = 2048            # clusters, as in a leaf of the count tree


class Findings:
    def __init__(self, report):
        self.report, self.corruptions, self.leaks = report, 0, 0
        self.allocated = 0
        self.prefix = ''

    def corruption(self, message):
        self.corruptions += 1
        self.report(f'CORRUPTION: {self.prefix}{message}')

    def leak(self, message, n=1):
        self.leaks += n
        self.report(f'leak: {self.prefix}{message}')

    def compare(self, what, recorded, counted):
        if recorded > counted:
            self.leak(f'{what}: count {recorded}, but {counted} references')
        elif recorded < counted:
            self.corruption(f'{what}: count {recorded}, but {counted} '
                            'references')


class Recount:
    """References to clusters and to pages, counted by walking."""

    def __init__(self, image, with_base_pages):
        self.image = image
        self.pages = {}             # number -> pointers to it
        self.places = {}            # number -> (kind, level, first index)
        self.clusters = {}          # cluster // BLOCK -> counts
        self.unwritten_runs = 0
        self._metadata()
        for root in image.roots:
            self._walk(root, MAP, 3)
        for s in image.snapshots.values():
            self._walk(s.root, MAP, 3)
            self._walk(s.vmstate_root, MAP, 3)
        if with_base_pages:
            sb = image.sb
            self._walk(sb.count_root, COUNT, 3)
            self._walk(sb.space_root, SPACE, 2)
            self._walk(sb.snapshot_root, SNAPSHOTS, 2)
            self._walk(sb.backing, NAME, 0)

    def _metadata(self):
        image = self.image
        shift = image.cluster_bits - 12
        self.add(0, image.first_cluster, COUNT_METADATA)
        for e in image.extents:
            self.add(e.first >> shift, e.nb_pages >> shift, COUNT_METADATA)

    def add(self, first, n, by=1):
        while n:
            block = self.clusters.get(first // BLOCK)
            if block is None:
                block = array.array('Q', bytes(8 * BLOCK))
                self.clusters[first // BLOCK] = block
            index = first % BLOCK
            count = min(n, BLOCK - index)
            for i in range(index, index + count):
                block[i] += by
            first += count
            n -= count

    def cluster(self, number):
        block = self.clusters.get(number // BLOCK)
        return block[number % BLOCK] if block is not None else 0

    def _walk(self, root, kind, level):
        """Each page once, whatever leads to it."""
        stack = [(root, level, 0)]
        while stack:
            pointer, level, first = stack.pop()
            if pointer.type in (RUN, UNWRITTEN_RUN):
                self.add(pointer.address, 512)
                self.unwritten_runs += pointer.type == UNWRITTEN_RUN
            if pointer.type != PAGEPTR:
                continue
            number, place = pointer.address, (kind, level, first)
            self.pages[number] = self.pages.get(number, 0) + 1
            if number in self.places:
                require(self.places[number] == place, f'page {number} is in '
                        f'two places: {self.places[number]} and {place}')
                continue
            self.places[number] = place
            page = self.image.page(pointer, kind, level)
            if level:
                stack += ((p, level - 1, first << 8 | i)
                          for i, p in enumerate(page.items) if p.type != NONE)
            elif kind == MAP:
                self._leaf(page.items)

    def _leaf(self, entries):
        first = n = 0
        for entry in entries + [0]:
            physical = entry & (1 << 40) - 1
            if n and physical == first + n:
                n += 1
                continue
            if n:
                self.add(first, n)
            first, n = physical, int(physical > 0)


# --- What the count tree says -----------------------------------------------

def check_count_tree(image, recount, findings):
    blocks = sorted(recount.clusters)
    end = image.device_clusters

    def compare_block(number, counts):
        """counts: of the block, or one number for all; returns the free."""
        mine = recount.clusters.get(number)
        base = number * BLOCK
        if mine is None and not counts:
            return max(0, min(end - base, BLOCK))
        mine = mine or array.array('Q', bytes(8 * BLOCK))
        theirs = counts if isinstance(counts, array.array) else \
            array.array('Q', [counts]) * BLOCK
        free = 0
        for i, (a, b) in enumerate(zip(theirs, mine)):
            free += a == 0 and base + i < end
            if base + i < end and 0 < a < COUNT_METADATA:
                findings.allocated += 1
            if a != b:
                findings.compare(f'cluster {base + i}', a, b)
        return free

    def compare_range(first, nb, count):
        """nb blocks that all have the same count, of which few are known."""
        if nb <= 4096:
            return sum(compare_block(b, count)
                       for b in range(first, first + nb))
        require(not count, f'count tree: {nb} blocks of clusters from block '
                f'{first} on all have count {count}, which cannot be')
        free = max(0, min(end - first * BLOCK, nb * BLOCK))
        for b in blocks:
            if first <= b < first + nb:
                free += compare_block(b, 0) - max(0, min(end - b * BLOCK,
                                                         BLOCK))
        return free

    def walk(pointer, level, first):
        if pointer.type in (NONE, UNIFORM):
            return compare_range(first, 1 << 8 * level, pointer.address)
        page = image.page(pointer, COUNT, level)
        if level == 0:
            free = compare_block(first, page.items)
        else:
            free = sum(walk(p, level - 1, first + (i << 8 * (level - 1)))
                       for i, p in enumerate(page.items))
        if level < 3 and free != pointer.extra:
            findings.corruption(f'count tree, page {pointer.address}: '
                                f'{free} clusters are free below, the pointer '
                                f'says {pointer.extra}')
        return free

    walk(image.sb.count_root, 3, 0)


def check_page_counts(image, recount, findings, base):
    foreign = base and any(image.sb.reserved)
    for extent in image.extents:
        for i, recorded in enumerate(extent.counts):
            number = extent.first + i
            counted = recount.pages.get(number, 0)
            if not base and number not in recount.pages and recorded and \
                    number not in image.mapping_pages:
                continue            # not a page of a mapping tree
            if recorded > counted and foreign:
                continue            # perhaps of a later version's structures
            if recorded != counted:
                findings.compare(f'page {number}', recorded, counted)
    for number, recorded in image.new_page_counts.items():
        if recorded != recount.pages.get(number, 0):
            findings.compare(f'new page {number - (1 << 40)}', recorded,
                             recount.pages.get(number, 0))


def check_promises(image, recount, findings):
    if image.promised_pages is not None:
        findings.compare('pages promised to unwritten runs',
                         image.promised_pages, recount.unwritten_runs)


# --- What writers rely on ---------------------------------------------------

def check_private(image, recount, findings):
    """Where nothing says "shared", the cluster must have one reference."""
    def judge(first, n, guest):
        for i in range(n):
            counted = recount.cluster(first + i)
            if counted != 1:
                findings.corruption(
                    f'guest cluster {guest + i}: physical cluster {first + i} '
                    f'has {counted} references, but nothing says that it is '
                    'shared')

    for root in image.roots:
        stack = [(root, 3, 0)]
        while stack:
            pointer, level, guest = stack.pop()
            if pointer.shared:
                continue
            if pointer.type in (RUN, UNWRITTEN_RUN):
                judge(pointer.address, 512, guest)
            if pointer.type != PAGEPTR or \
                    image.page_count(pointer.address) > 1:
                continue
            items = image.page(pointer, MAP, level).items
            for i, item in enumerate(items):
                if level:
                    if item.type not in (NONE, ZERO):
                        stack.append((item, level - 1,
                                      guest + (i << 9 + 8 * (level - 1))))
                elif entry_fields(item)[0] and not item >> 59 & 1:
                    judge(entry_fields(item)[0], 1, guest + i)


def last_mapped(image, pointer, level, guest):
    """The last guest cluster below that has a cluster, or -1."""
    if pointer.type in (NONE, ZERO):
        return -1
    if pointer.type != PAGEPTR:
        return guest + 511
    items = image.page(pointer, MAP, level).items
    for i in range(len(items) - 1, -1, -1):
        if level:
            last = last_mapped(image, items[i], level - 1,
                               guest + (i << 9 + 8 * (level - 1)))
            if last >= 0:
                return last
        elif entry_fields(items[i])[0]:
            return guest + i
    return -1


def check_ends(image, findings):
    trees = [('the disk', image.roots[0], image.virtual_size)]
    trees += [(f'snapshot {s.id}', s.root, s.virtual_size)
              for s in image.snapshots.values() if not s.flags & TRASH]
    for what, root, size in trees:
        last = last_mapped(image, root, 3, 0)
        if last >= -(-size >> image.cluster_bits):
            findings.corruption(f'{what}: guest cluster {last} is mapped, '
                                f'behind its end at {size} bytes')


# --- All together -----------------------------------------------------------

def check_base(path, slot, findings):
    """One superblock's base and journal; returns the state at the end."""
    image = Image(path, superblock=slot, replay=False)
    findings.prefix = f'superblock {slot}: '
    recount = Recount(image, True)
    check_count_tree(image, recount, findings)
    check_page_counts(image, recount, findings, True)
    check_promises(image, recount, findings)
    check_private(image, recount, findings)
    check_ends(image, findings)
    sound = not findings.corruptions

    findings.prefix = f'superblock {slot}, with journal: '
    require(not image.journal.damage, image.journal.damage)
    image.mapping_pages = {n for n, place in recount.places.items()
                           if place[0] == MAP}
    for record in image.journal.records:
        image.apply(record)
    again = Recount(image, False)
    if sound:
        for number in sorted(set(recount.clusters) | set(again.clusters) |
                             {c // BLOCK for c in image.count_changes}):
            for c in range(number * BLOCK, (number + 1) * BLOCK):
                recorded = image.count_changes.get(c, recount.cluster(c))
                if recorded != again.cluster(c):
                    findings.compare(f'cluster {c}', recorded,
                                     again.cluster(c))
        check_page_counts(image, again, findings, False)
    check_promises(image, again, findings)
    check_private(image, again, findings)
    check_ends(image, findings)
    return image


def same_state(a, b):
    """Do two bases with their journals lead to the same?"""
    def scalars(i):
        return (i.journal.sequence, i.journal.end, i.virtual_size,
                i.vmstate_size, i.device_clusters, i.epoch, i.backing_name,
                i.current_snapshot_id, sorted(s.id for s in
                                              i.snapshots.values()))

    def disks(i):
        yield i.roots[0], i.virtual_size
        yield i.roots[1], i.vmstate_size
        for s in sorted(i.snapshots.values(), key=lambda s: s.id):
            yield s.root, s.virtual_size

    return scalars(a) == scalars(b) and all(
        list(a.parts(r, n)) == list(b.parts(q, m))
        for (r, n), (q, m) in zip(disks(a), disks(b)))


def repaired_since(newest, older):
    """Does no journal lead from this base to the newest one?"""
    return newest.record_crc == 0 and newest.sequence > older.sequence


def check(path, report):
    """Findings about the image at path; report(message) for each."""
    findings = Findings(report)
    first = Image(path, replay=False)
    slots = first.slots
    first.close()
    newest = None
    for sb in sorted((s for s in slots if isinstance(s, Superblock)),
                     key=lambda s: -s.generation):
        if newest and repaired_since(newest.sb, sb):
            continue
        try:
            image = check_base(path, sb.slot, findings)
            findings.prefix = ''
            if newest is None:
                newest = image
                allocated, findings.allocated = findings.allocated, 0
            elif not same_state(newest, image):
                findings.corruption('the two superblocks, each with the '
                                    'journal that follows, lead to different '
                                    'states')
        except FormatError as e:
            findings.corruption(str(e))
            allocated = 0
    findings.prefix = ''
    findings.allocated = allocated
    findings.image = newest
    return findings
