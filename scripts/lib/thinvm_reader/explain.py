# SPDX-License-Identifier: GPL-2.0-or-later
#
# What is in a thinvm image, structure by structure, as plain lists and
# dictionaries (for JSON, and for thinvm-image.py dump to print).  Goes on
# where something is damaged: what is wrong stands under "problem" in its
# place, and all of it in the list "problems" of the whole.

import collections
import struct
import uuid

from .image import read_superblocks
from .journal import Journal
from .pages import Pages
from .structures import (
    BACKING, CLAIM_OFFSET, COUNT, EMPTY, HEARTBEAT_OFFSET, LEVELS, MAP,
    NAME, NB_CLAIMS, NONE, PAGE, PAGEPTR, ROOTS, SNAPSHOTS, SPACE,
    SUM_CLAIM, SUM_HEARTBEAT, SUPERBLOCK_FIELDS, TEMPLATE, ZEROES, Device,
    FormatError, Superblock, checksum_without, entry_fields)

STATES = {1: 'active', 2: 'released', 3: 'closed', 4: 'returned'}


class Loose(Pages):
    """A base of which nothing is loaded ahead, and whose bounds may lie."""

    def __init__(self, device, sb):
        self.device, self.uuid = device, sb.uuid
        self.cluster_bits = sb.cluster_bits
        self.cluster_size = 1 << sb.cluster_bits
        self.first_cluster = sb.first_cluster
        self.device_clusters = sb.device_clusters
        self.changed, self.cache = {}, collections.OrderedDict()

    def _judge_page_number(self, number, where):
        pass                    # the space map may be what is damaged

    def _judge_clusters(self, first, n, where):
        if first < self.first_cluster or first + n > self.device_clusters:
            raise FormatError(f'{where}: physical clusters {first} to '
                              f'{first + n - 1} are not on the device')


class Explanation:
    def __init__(self, path, slot=None):
        self.problems = []
        self.device = Device(path)
        self.slots = read_superblocks(self.device)
        usable = [s for s in self.slots if isinstance(s, Superblock) and
                  not s.unknown and (slot is None or s.slot == slot)]
        self.result = {
            'superblocks': [self._superblock(i, s)
                            for i, s in enumerate(self.slots)],
            'used-superblock': None,
            'ownership': [],
            'journal': None,
            'trees': [],
            'snapshots': [],
            'problems': self.problems,
        }
        if usable:
            self.sb = max(usable, key=lambda s: s.generation)
            self.result['used-superblock'] = self.sb.slot
            self._ownership()
            self._journal()
            self._trees()

    def _problem(self, text):
        self.problems.append(text)
        return text

    # --- what has a fixed place ---

    def _superblock(self, number, sb):
        if not isinstance(sb, Superblock):
            return {'slot': number, 'problem': self._problem(str(sb))}
        result = {'slot': number}
        for name in SUPERBLOCK_FIELDS[1:]:
            value = getattr(sb, name)
            result[name] = str(uuid.UUID(bytes=value)) if name == 'uuid' \
                else value
        if sb.unknown:
            result['problem'] = self._problem(f'superblock {number}: '
                                              f'{sb.unknown}')
            return result
        for name, _ in ROOTS:
            result[name] = str(getattr(sb, name))
        return result

    def _block(self, kind, offset, magic, at):
        data = self.device.read(offset, 512, 'ownership block')
        if data[:4] != magic or data[at:at + 16] != self.sb.uuid:
            return None
        crc, epoch = struct.unpack_from('<IQ', data, 4)
        if crc != checksum_without(self.sb.uuid, kind, epoch, data, 4):
            raise FormatError(f'ownership block at byte {offset}: checksum '
                              'is wrong')
        return epoch, data

    def _claim(self, slot):
        found = self._block(SUM_CLAIM, CLAIM_OFFSET + slot * PAGE, b'TVCL',
                            144)
        if found:
            epoch, data = found
            state, process, start = struct.unpack_from('<IIQ', data, 16)
            return {'claim': epoch, 'state': STATES.get(state, state),
                    'host': data[80:144].split(b'\0')[0].decode(
                        'utf-8', 'backslashreplace'),
                    'host-id': data[32:48].hex(),
                    'boot-id': data[48:64].hex(), 'process': process,
                    'process-start': start, 'nonce': data[64:80].hex()}
        return None

    def _heartbeat(self, slot):
        found = self._block(SUM_HEARTBEAT, HEARTBEAT_OFFSET + slot * PAGE,
                            b'TVHB', 40)
        if found:
            epoch, data = found
            return {'heartbeat': epoch,
                    'counter': struct.unpack_from('<Q', data, 16)[0],
                    'nonce': data[24:40].hex()}
        return None

    def _ownership(self):
        for slot in range(NB_CLAIMS):
            for look in (self._claim, self._heartbeat):
                try:
                    found = look(slot)
                except FormatError as e:
                    found = {'problem': self._problem(str(e))}
                if found:
                    self.result['ownership'].append(found)

    def _journal(self):
        try:
            journal = Journal(self.device, self.sb)
        except FormatError as e:
            self.result['journal'] = {'problem': self._problem(str(e))}
            return
        records = []
        for r in journal.records:
            record = {'sequence': r.sequence, 'position': r.position,
                      'epoch': r.epoch, 'flushed': r.flushed,
                      'bytes': r.length, 'crc': r.crc, 'operations': []}
            if r.nb_sums:
                record['data'] = [f'{size} bytes at {offset}: {crc:#010x}'
                                  for offset, size, crc in r.sums()]
            try:
                for op in r.operations():
                    record['operations'].append(str(op))
            except FormatError as e:
                record['problem'] = self._problem(str(e))
            records.append(record)
        result = {'start': self.sb.journal_position, 'records': records,
                  'end': journal.end}
        if journal.damage:
            result['problem'] = self._problem(journal.damage)
        self.result['journal'] = result

    # --- trees ---

    def _trees(self):
        sb = self.sb
        self.base = Loose(self.device, sb)
        self.seen = set()
        for name, pointer, kind in (
                ('disk', sb.map_root, MAP),
                ('VM state', sb.vmstate_root, MAP),
                ('counts', sb.count_root, COUNT),
                ('space map', sb.space_root, SPACE),
                ('snapshots', sb.snapshot_root, SNAPSHOTS),
                ('backing file', sb.backing, NAME)):
            self._tree(name, pointer, kind)
        for s in list(self.result['snapshots']):
            for name, key in (('disk', 'root'), ('VM state', 'vmstate')):
                self._tree(f"{name} of snapshot {s['id']}", s.pop(key), MAP)

    def _tree(self, name, pointer, kind):
        self.result['trees'].append(
            {'name': name, **self._node(pointer, kind, LEVELS[kind], 0)})

    def _node(self, pointer, kind, level, first):
        node = {'pointer': str(pointer)}
        if pointer.type != PAGEPTR:
            return node
        if (pointer.address, pointer.crc) in self.seen:
            node['shown-above'] = True
            return node
        self.seen.add((pointer.address, pointer.crc))
        try:
            page = self.base.page(pointer, kind, level)
        except FormatError as e:
            node['problem'] = self._problem(str(e))
            return node
        if kind == NAME:
            node['name'], node['format'] = page.items
        elif level:
            node['children'] = [
                {'index': i, **self._node(p, kind, level - 1,
                                          first << 8 | i)}
                for i, p in enumerate(page.items) if p.type != NONE]
        elif kind == SPACE:
            node.update({'first-page': page.first_page,
                         'pages': len(page.items),
                         'in-use': sum(map(bool, page.items))})
        elif kind == SNAPSHOTS:
            node['slots'] = self._snapshots(page, first << 3)
        else:
            node['items'] = self._items(page, first * len(page.items))
        return node

    def _snapshots(self, page, first):
        slots = []
        for i, s in enumerate(page.items):
            if s is None:
                continue
            info = {'slot': first + i, 'id': s.id, 'name': s.name,
                    'parent': s.parent_id, 'flags': s.flags,
                    'virtual-size': s.virtual_size,
                    'vmstate-size': s.vmstate_size, 'date': s.date}
            slots.append(info['slot'])
            self.result['snapshots'].append(
                {**info, 'root': s.root, 'vmstate': s.vmstate_root})
        return slots

    @staticmethod
    def _items(page, first):
        """Equal neighbours, and clusters that count up, are one item."""
        mapping = page.kind == MAP
        items, start = [], 0
        values = list(page.items)
        for i in range(1, len(values) + 1):
            value = values[start]
            step = i - start if mapping and entry_fields(value)[0] else 0
            if i < len(values) and values[i] == value + step:
                continue
            if value not in (0, EMPTY):
                item = {'from': first + start, 'to': first + i - 1}
                if mapping:
                    physical, valid, source = entry_fields(value)
                    item.update({'physical': physical, 'valid': valid,
                                 'else': {BACKING: 'backing', ZEROES: 'zeroes',
                                          TEMPLATE: 'template'}[source],
                                 'shared': bool(value >> 59 & 1)})
                else:
                    item['count'] = value
                items.append(item)
            start = i
        return items


def explain(path, slot=None):
    explanation = Explanation(path, slot)
    explanation.device.close()
    return explanation.result
