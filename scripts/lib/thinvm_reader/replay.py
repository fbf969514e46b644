# SPDX-License-Identifier: GPL-2.0-or-later
#
# What the operations of a thinvm journal do, applied to pages in memory with
# all their effects on counts, so that a checker can recount afterwards.  An
# operation that is impossible in the state it meets raises FormatError.

from .structures import (
    ALL_VALID, BACKING, COUNT_MAX, COUNT_METADATA, DELETED, DISK, EMPTY,
    EXTENT_MAX_PAGES, MAP, MAX_GUEST_CLUSTERS, MAX_SLOTS, NONE, PAGEPTR,
    PROTECTED, RUN, TEMPLATE, TRASH, UNWRITTEN_RUN, VMSTATE, ZERO, ZEROES,
    FormatError, Pointer, Snapshot, decode_backing, entry_fields,
    make_entry, require, run_entry)
from .pages import Extent, Page, Pages


class State(Pages):
    """A base to which operations can be applied."""

    # -- mapping trees --

    @staticmethod
    def child_index(guest, level):
        return guest >> 9 + 8 * (level - 1) & 255

    def _references(self, page, by):
        """What a page names gains or loses a reference."""
        for item in page.items:
            if page.level == 0:
                physical = entry_fields(item)[0]
                if physical:
                    self._change_counts(physical, 1, by)
            elif item.type == PAGEPTR:
                if by > 0:
                    self._change_page_count(item.address, by)
                else:
                    self._drop(item, page.level - 1)
            elif item.type in (RUN, UNWRITTEN_RUN):
                self._promise(item, by)
                self._change_counts(item.address, 512, by)

    def _promise(self, pointer, by):
        """Each unwritten run is promised a page for its leaf."""
        if pointer.type == UNWRITTEN_RUN and self.promised_pages is not None:
            self.promised_pages += by
            require(self.promised_pages >= 0, 'fewer pages are promised to '
                    'unwritten runs than there are such runs')

    @staticmethod
    def _mark_shared(page, pages_too):
        for i, item in enumerate(page.items):
            if page.level == 0:
                if entry_fields(item)[0]:
                    page.items[i] = item | 1 << 59
            elif (item.type in (RUN, UNWRITTEN_RUN) or
                  pages_too and item.type == PAGEPTR):
                page.items[i] = item._replace(shared=True)

    def _new_page(self, page):
        number = self.next_page
        self.next_page += 1
        self.changed[number] = page
        self.new_page_counts[number] = 1
        return Pointer(number, PAGEPTR, False, 0, 0, 0), page

    def _writable(self, pointer, level):
        """(pointer, page) that may be changed, in the place of pointer."""
        if pointer.type != PAGEPTR:
            self._promise(pointer, -1)
            return self._new_page(Page(MAP, level, self._expand(pointer,
                                                                level)))
        page = self.page(pointer, MAP, level)
        if self.page_count(pointer.address) > 1:
            old = pointer
            pointer, page = self._new_page(page.copy())
            self._references(page, +1)
            self._mark_shared(page, old.shared)
            self._change_page_count(old.address, -1)
            return pointer, page
        if pointer.address not in self.changed:
            page = self.changed[pointer.address] = page.copy()
        if pointer.shared:
            self._mark_shared(page, True)
            pointer = pointer._replace(shared=False)
        return pointer, page

    def lookup(self, root, guest):
        """The entry of a guest cluster."""
        pointer = root
        for level in (3, 2, 1, 0):
            if pointer.type == ZERO:
                return make_entry(0, 0, ZEROES)
            if pointer.type == NONE:
                return 0
            if pointer.type != PAGEPTR:
                return run_entry(pointer, guest & 511)
            items = self.page(pointer, MAP, level).items
            if level == 0:
                return items[guest & 511]
            pointer = items[self.child_index(guest, level)]
        return 0

    @staticmethod
    def _expand(pointer, level):
        if level:
            return [pointer] * 256
        if pointer.type in (RUN, UNWRITTEN_RUN):
            return [run_entry(pointer, i) for i in range(512)]
        return [make_entry(0, 0, ZEROES if pointer.type == ZERO else BACKING)
                ] * 512

    def _change(self, pointer, level, guest, bottom, change):
        """Walk down to the page of level bottom and call change(page)."""
        pointer, page = self._writable(pointer, level)
        if level == bottom:
            change(page)
        else:
            i = self.child_index(guest, level)
            page.items[i] = self._change(page.items[i], level - 1, guest,
                                         bottom, change)
        return pointer

    def _drop(self, pointer, level):
        """A pointer goes away."""
        if pointer.type in (RUN, UNWRITTEN_RUN):
            self._promise(pointer, -1)
            self._change_counts(pointer.address, 512, -1)
        elif pointer.type == PAGEPTR:
            page = self.page(pointer, MAP, level)
            if self._change_page_count(pointer.address, -1) == 0:
                self._references(page, -1)

    def _unmap(self, pointer, level, base, first, end, new):
        span = 512 << 8 * level
        first, end = max(first, base), min(end, base + span)
        if end - first == span:
            self._drop(pointer, level)
            return new
        if pointer.type == new.type:
            return pointer
        pointer, page = self._writable(pointer, level)
        if level == 0:
            entry = make_entry(0, 0, ZEROES if new.type == ZERO else BACKING)
            for i in range(first - base, end - base):
                physical = entry_fields(page.items[i])[0]
                if physical:
                    self._change_counts(physical, 1, -1)
                page.items[i] = entry
        else:
            small = span >> 8
            for i in range((first - base) // small,
                           (end - 1 - base) // small + 1):
                page.items[i] = self._unmap(page.items[i], level - 1,
                                            base + i * small, first, end, new)
        return self._collapse(pointer, page)

    def _collapse(self, pointer, page):
        """A page all of which reads alike without clusters goes."""
        item = page.items[0]
        if any(other != item for other in page.items):
            return pointer
        if page.level:
            if item.type not in (NONE, ZERO):
                return pointer
        else:
            physical, _, source = entry_fields(item)
            if physical:
                return pointer
            item = EMPTY._replace(type=ZERO if source == ZEROES else NONE)
        self._change_page_count(pointer.address, -1)
        return item

    # -- operations --

    def apply(self, record):
        for i, op in enumerate(record.operations()):
            try:
                getattr(self, '_op_' + op.name.lower())(op)
            except FormatError as e:
                raise FormatError(f'journal record {record.sequence}, '
                                  f'operation {i} ({op}): {e}') from e

    def _entries(self, op, change):
        """change(entry, i) for the guest clusters of op, all in one leaf."""
        def leaf(page):
            first = op.guest & 511
            for i in range(op.count or 1):
                page.items[first + i] = change(page.items[first + i], i)

        self.roots[op.tree] = self._change(self.roots[op.tree], 3, op.guest,
                                           0, leaf)

    def _op_map(self, op):
        def change(entry, i):
            old = entry_fields(entry)[0]
            if old:
                self._change_counts(old, 1, -1)
            return make_entry(op.physical + i, op.valid, op.source)

        require(op.source != TEMPLATE or self.sb.template,
                'MAP marks clusters as those of a template: there is none')
        self._take_clusters(op.physical, op.count, 1, 'MAP')
        self._entries(op, change)

    def _op_validate(self, op):
        entry = self.lookup(self.roots[op.tree], op.guest)
        physical, valid, source = entry_fields(entry)
        source = BACKING if source == TEMPLATE else source      # no mark then
        if physical == op.physical:
            self._entries(op, lambda entry, i: make_entry(
                physical, valid | op.valid, source, entry >> 59 & 1))

    def _op_invalidate(self, op):
        physical, valid, source = entry_fields(
            self.lookup(self.roots[op.tree], op.guest))
        if physical == op.physical and (source == ZEROES or
                                        valid == ALL_VALID):
            self._entries(op, lambda entry, i: make_entry(
                physical, valid & ~op.valid, ZEROES, entry >> 59 & 1))

    def _op_unmap(self, op):
        new = EMPTY._replace(type=ZERO if op.source == ZEROES else NONE)
        self.roots[op.tree] = self._unmap(self.roots[op.tree], 3, 0, op.guest,
                                          op.guest + op.count, new)

    def _op_map_run(self, op):
        def change(page):
            i = self.child_index(op.guest, 1)
            self._drop(page.items[i], 0)
            page.items[i] = Pointer(op.physical,
                                    RUN if op.valid else UNWRITTEN_RUN,
                                    False, 0, 0, 0)
            self._promise(page.items[i], +1)

        require(op.guest % 512 == 0, 'guest cluster is no multiple of 512')
        self._take_clusters(op.physical, 512, 1, 'MAP_RUN')
        self.roots[op.tree] = self._change(self.roots[op.tree], 3, op.guest,
                                           1, change)

    # -- compaction --

    def _root(self, tree, holder):
        """The pointer to a tree: of the active one (0), or of the snapshot in
        slot holder - 1; None if there is none."""
        if not holder:
            return self.roots[tree]
        s = self.snapshots.get(holder - 1)
        return s and (s.vmstate_root if tree == VMSTATE else s.root)

    def _set_root(self, tree, holder, pointer):
        if not holder:
            self.roots[tree] = pointer
        elif tree == VMSTATE:
            self.snapshots[holder - 1].vmstate_root = pointer
        else:
            self.snapshots[holder - 1].root = pointer

    def _path(self, pointer, guest):
        """The pointers to pages on the way to a guest cluster, by level."""
        found = {}
        for level in (3, 2, 1, 0):
            if pointer.type != PAGEPTR:
                break
            found[level] = pointer
            if level:
                items = self.page(pointer, MAP, level).items
                pointer = items[self.child_index(guest, level)]
        return found

    def _judge_owner(self, op, holder, bottom):
        """Pages that a snapshot gets copies of must not be the active
        tree's: its entries would not tell that they are shared."""
        if not holder:
            return
        active = self._path(self.roots[op.tree], op.guest)
        for level, p in self._path(self._root(op.tree, holder),
                                   op.guest).items():
            require(level < bottom or self.page_count(p.address) == 1 or
                    active.get(level, EMPTY).address != p.address,
                    f'page {p.address} is also the active tree\'s')

    def _own(self, pointer, level, guest):
        """A tree gets pages of its own, as far as there are pages."""
        if pointer.type == PAGEPTR:
            pointer, page = self._writable(pointer, level)
            if level:
                i = self.child_index(guest, level)
                page.items[i] = self._own(page.items[i], level - 1, guest)
        return pointer

    def _op_relocate(self, op):
        holder, former = op.value >> 40, op.value & (1 << 40) - 1

        def change(page):
            first = op.guest & 511
            for i in range(first, first + op.count):
                page.items[i] = (page.items[i] + op.physical - former |
                                 op.source << 59)

        root = self._root(op.tree, holder)
        if root is None:
            return
        self._judge_owner(op, holder, 0)
        if not op.count:
            self._set_root(op.tree, holder, self._own(root, 3, op.guest))
            return
        for i in range(op.count):
            count = self.cluster_count(op.physical + i)
            require(0 < count < COUNT_MAX if op.source else not count,
                    f'cluster {op.physical + i} has count {count}')
        self._judge_clusters(op.physical, op.count, 'RELOCATE')
        if any(entry_fields(self.lookup(root, op.guest + i))[0] != former + i
               for i in range(op.count)):
            return
        self._set_root(op.tree, holder,
                       self._change(root, 3, op.guest, 0, change))
        for i in range(op.count):
            self.count_changes[op.physical + i] = 1 + self.cluster_count(
                op.physical + i)
        self._change_counts(former, op.count, -1)

    def _same(self, a, b, level, guest):
        """Do two pointers lead to the same, but for what is said of sharing?
        At most the pages on the way to guest may be others."""
        if (a.type, a.address) == (b.type, b.address):
            return True
        if a.type != PAGEPTR or b.type != PAGEPTR:
            return False
        p, q = (self.page(x, MAP, level).items for x in (a, b))
        if not level:
            return all((x ^ y) & ~(1 << 59) == 0 for x, y in zip(p, q))
        index = self.child_index(guest, level)
        return (all((x.type, x.address) == (y.type, y.address)
                    for i, (x, y) in enumerate(zip(p, q)) if i != index) and
                self._same(p[index], q[index], level - 1, guest))

    def _replace(self, pointer, level, guest, bottom, new):
        if level == bottom:
            self._drop(pointer, level)
            return new
        pointer, page = self._writable(pointer, level)
        i = self.child_index(guest, level)
        page.items[i] = self._replace(page.items[i], level - 1, guest, bottom,
                                      new)
        return pointer

    def _op_share(self, op):
        level = op.count
        to, giver = (self._root(op.tree, x) for x in (op.value, op.physical))
        if to is None or giver is None:
            return
        old = self._path(to, op.guest).get(level)
        new = self._path(giver, op.guest).get(level)
        if (not old or not new or old.address == new.address or
                self.page_count(new.address) >= COUNT_MAX or
                not self._same(new, old, level, op.guest)):
            return
        self._judge_owner(op, op.value, level + 1)
        self._change_page_count(new.address, +1)
        if not op.value:
            new = new._replace(shared=True)
        self._set_root(op.tree, op.value,
                       self._replace(to, 3, op.guest, level, new))

    def _op_shrink(self, op):
        require(self.first_cluster < op.value < self.device_clusters,
                f'the device of {self.device_clusters} clusters cannot shrink '
                f'to {op.value}')
        require(not any(count and cluster >= op.value
                        for cluster, count in self.count_changes.items()) and
                not self._used_behind(self.sb.count_root, 3, 0, op.value),
                f'clusters behind {op.value} are in use')
        self.device_clusters = op.value

    def _largest(self, size):
        require(size <= MAX_GUEST_CLUSTERS << self.cluster_bits,
                f'{size} bytes are more than the mapping tree can hold')
        return size

    def _op_resize(self, op):
        self.virtual_size = self._largest(op.value)

    def _op_vmstate_size(self, op):
        self.vmstate_size = self._largest(op.value)

    def _op_grow(self, op):
        require(op.value > self.device_clusters,
                f'the device has {self.device_clusters} clusters already')
        self.device_clusters = op.value

    def _op_meta_extend(self, op):
        shift = self.cluster_bits - 12
        nb = op.count << shift
        require(nb <= EXTENT_MAX_PAGES, f'{nb} pages in one extent')
        self._take_clusters(op.physical, op.count, COUNT_METADATA,
                            'META_EXTEND')
        self.add_extent(Extent(op.physical << shift, nb, [0] * nb),
                        'META_EXTEND')

    def _op_set_backing(self, op):
        self.backing_name, self.backing_format = decode_backing(op.payload,
                                                                'payload')
        require(self.backing_name or not self.backing_format,
                'a format without a name')

    def _op_epoch(self, op):
        require(op.value > self.epoch, f'epoch {op.value} does not follow '
                f'{self.epoch}')
        self.epoch = op.value

    def _add_snapshot(self, op, snapshot):
        end = self.nb_slots if self.snapshots else 0
        slot = op.count - 1 if op.count else end
        require(not op.count or slot < end and slot not in self.snapshots,
                f'slot {slot} is in use, or not below {end}')
        require(snapshot.id == self.next_snapshot_id and slot < MAX_SLOTS,
                f'id {snapshot.id} is not the next, {self.next_snapshot_id}, '
                'or there is no slot')
        self.snapshots[slot] = snapshot
        self.nb_slots = max(end, slot + 1)
        self.next_snapshot_id += 1

    def _op_snapshot_create(self, op):
        s = Snapshot(op.payload, 'payload')
        require(not s.flags and s.root == s.vmstate_root == EMPTY,
                'payload: flags or pointers are set')
        s.parent_id = self.current_snapshot_id
        s.virtual_size, s.vmstate_size = self.virtual_size, self.vmstate_size
        s.root, s.vmstate_root = self.roots
        self._add_snapshot(op, s)
        if s.root.type == PAGEPTR:
            self._change_page_count(s.root.address, +1)
        self.roots[VMSTATE], self.vmstate_size = EMPTY, 0
        self.current_snapshot_id = s.id

    def _snapshot(self, op):
        s = self.snapshots.get(op.guest)
        require(s is not None and s.id == op.value,
                f'no snapshot {op.value} in slot {op.guest}')
        return s

    def _op_snapshot_goto(self, op):
        s = self._snapshot(op)
        trash = s.copy()
        trash.__dict__.update(
            id=op.physical, parent_id=0, flags=TRASH, name='',
            virtual_size=self.virtual_size, vmstate_size=self.vmstate_size,
            date=0, date_nsec=0, vm_clock=0,
            icount=(1 << 64) - 1, root=self.roots[DISK],
            vmstate_root=self.roots[VMSTATE])
        self._add_snapshot(op, trash)
        for i, root in enumerate((s.root, s.vmstate_root)):
            if root.type == PAGEPTR:
                self._change_page_count(root.address, +1)
                root = root._replace(shared=True)
            self.roots[i] = root
        self.virtual_size, self.vmstate_size = s.virtual_size, s.vmstate_size
        self.current_snapshot_id = s.id

    def _op_snapshot_protect(self, op):
        s = self._snapshot(op)
        require(not s.flags & (DELETED | TRASH), f'{s.id} is being deleted')
        s.flags = s.flags & ~PROTECTED | (PROTECTED if op.count else 0)

    def _op_snapshot_delete_step(self, op):
        s = self._snapshot(op)
        require(not s.flags & PROTECTED, f'{s.id} is protected')
        if not s.flags & TRASH:
            children = [c for c in self.snapshots.values()
                        if c.parent_id == s.id and not c.flags & TRASH]
            active = self.current_snapshot_id == s.id
            if len(children) + active <= 1:
                for child in children:
                    child.parent_id = s.parent_id
                if active:
                    self.current_snapshot_id = s.parent_id
                s.flags |= TRASH
                s.parent_id = 0
                return
            if not s.flags & DELETED:
                s.flags |= DELETED
                return
        if s.root.type == PAGEPTR:
            s.root = self._drop_step(s.root, 3)
        elif s.vmstate_root.type == PAGEPTR:
            s.vmstate_root = self._drop_step(s.vmstate_root, 3)
        elif s.flags & TRASH:
            del self.snapshots[op.guest]
            if not self.snapshots:
                self.nb_slots = 0

    def _drop_step(self, pointer, level):
        """Free the first unit below: a leaf, a run, a shared or empty page."""
        if pointer.type == PAGEPTR and level and \
                self.page_count(pointer.address) == 1:
            page = self.page(pointer, MAP, level)
            used = [i for i, p in enumerate(page.items)
                    if p.type not in (NONE, ZERO)]
            if used:
                pointer, page = self._writable(pointer, level)
                page.items[used[0]] = self._drop_step(page.items[used[0]],
                                                      level - 1)
                return pointer
        self._drop(pointer, level)
        return EMPTY
