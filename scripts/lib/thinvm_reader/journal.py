# SPDX-License-Identifier: GPL-2.0-or-later
#
# The journal of a thinvm image: which records count, whether one is missing
# that was once durable, and the operations in them, judged as far as each can
# be alone.  The ring is read as it stands; nothing is applied here.

import struct

from .structures import (
    ALL_VALID, COUNTER_MAX, JOURNAL_OFFSET, KIB, MAX_CLUSTERS,
    MAX_GUEST_CLUSTERS, MAX_SIZE, MAX_SLOTS, MIB, PAGE, SUM_DATA,
    SUM_RECORD, TEMPLATE, checksum, checksum_without, require)

RECORD_MAX = 256 * KIB

OPERATION = struct.Struct('<HHBBHQQQQ')
RECORD = struct.Struct('<4sIQQQIIIII12s')
DATA_SUM = struct.Struct('<QII')
FLAG_SUMS, MAX_SUMS, MAX_SUM_BYTES = 1, 64, 64 * KIB

# name, fields used, bytes of payload
OPERATIONS = {
    1: ('MAP', 'tree source valid guest count physical', 0),
    2: ('VALIDATE', 'tree valid guest physical', 0),
    3: ('UNMAP', 'tree source guest count', 0),
    4: ('INVALIDATE', 'tree valid guest physical', 0),
    5: ('MAP_RUN', 'tree valid guest physical', 0),
    6: ('RESIZE', 'value', 0),
    7: ('GROW', 'value', 0),
    8: ('META_EXTEND', 'count physical', 0),
    9: ('SET_BACKING', '', 1152),
    10: ('EPOCH', 'value', 0),
    11: ('SNAPSHOT_CREATE', 'count', 512),
    12: ('SNAPSHOT_DELETE_STEP', 'guest value', 0),
    13: ('SNAPSHOT_GOTO', 'guest count physical value', 0),
    14: ('VMSTATE_SIZE', 'value', 0),
    15: ('SNAPSHOT_PROTECT', 'guest count value', 0),
    16: ('RELOCATE', 'tree source guest count physical value', 0),
    17: ('SHARE', 'tree guest count physical value', 0),
    18: ('SHRINK', 'value', 0),
}
FIELDS = 'tree source valid guest count physical value'.split()


class Operation:
    """One operation; judged as far as it can be alone."""

    def __init__(self, data, offset, where):
        require(len(data) - offset >= 40, f'{where}: cut off')
        code, self.length, *values = OPERATION.unpack_from(data, offset)
        require(code in OPERATIONS,
                f'{where}: type {code} is not known to this program')
        self.name, uses, payload = OPERATIONS[code]
        where = f'{where} ({self.name})'
        require(self.length == 40 + payload and
                offset + self.length <= len(data),
                f'{where}: length {self.length}')
        for name, value in zip(FIELDS, values):
            setattr(self, name, value)
            require(name in uses.split() or not value,
                    f'{where}: {name} is set but not used')
        self.payload = data[offset + 40:offset + self.length]
        self._judge(where)

    def _judge(self, where):
        def check(ok):
            require(ok, f'{where}: a field is out of bounds: {self}')

        name, value = self.name, self.value
        if name in ('MAP', 'UNMAP', 'VALIDATE', 'INVALIDATE', 'MAP_RUN'):
            n = {'MAP': self.count, 'UNMAP': self.count,
                 'MAP_RUN': 512}.get(name, 1)
            mark = (name == 'MAP' and self.source == TEMPLATE and
                    self.tree == 0 and self.valid == ALL_VALID)
            check(self.tree < 2 and (self.source < 2 or mark) and n >= 1)
            check(self.guest + n <= MAX_GUEST_CLUSTERS)
            if name != 'UNMAP':
                check(self.physical and self.physical + n <= MAX_CLUSTERS)
                check(self.guest // 512 == (self.guest + n - 1) // 512)
            check(name != 'MAP_RUN' or self.valid in (0, ALL_VALID))
            check(self.valid or name not in ('VALIDATE', 'INVALIDATE'))
        elif name == 'RESIZE':
            check(value <= MAX_SIZE and value % 512 == 0)
        elif name == 'VMSTATE_SIZE':
            check(value <= MAX_SIZE)
        elif name == 'RELOCATE':
            former = value & (1 << 40) - 1
            check(self.tree < 2 and self.source < 2 and
                  value >> 40 <= MAX_SLOTS and self.count <= 512)
            check(self.guest + max(self.count, 1) <= MAX_GUEST_CLUSTERS)
            if self.count:
                check(self.guest // 512 ==
                      (self.guest + self.count - 1) // 512)
                check(all(c and c + self.count <= MAX_CLUSTERS
                          for c in (former, self.physical)))
                check(abs(former - self.physical) >= self.count)
            else:
                check(not (former or self.physical or self.source))
        elif name == 'SHARE':
            check(self.tree < 2 and self.guest < MAX_GUEST_CLUSTERS and
                  self.count <= 3)
            check(value <= MAX_SLOTS and 0 < self.physical <= MAX_SLOTS and
                  value != self.physical)
        elif name in ('GROW', 'SHRINK'):
            check(0 < value <= MAX_CLUSTERS)
        elif name == 'META_EXTEND':
            check(0 < self.count <= 508 and self.physical and
                  self.physical + self.count <= MAX_CLUSTERS)
        elif name in ('EPOCH', 'SNAPSHOT_DELETE_STEP', 'SNAPSHOT_GOTO',
                      'SNAPSHOT_PROTECT'):
            check(0 < value <= COUNTER_MAX and self.guest < MAX_SLOTS)
            check(name != 'SNAPSHOT_GOTO' or
                  value < self.physical <= COUNTER_MAX)
            check(name != 'SNAPSHOT_PROTECT' or self.count < 2)
        if name in ('SNAPSHOT_CREATE', 'SNAPSHOT_GOTO'):
            check(self.count <= MAX_SLOTS)

    def __str__(self):
        uses = next(o[1] for o in OPERATIONS.values() if o[0] == self.name)
        text = ' '.join(f'{f}={getattr(self, f):#x}' if f == 'valid' else
                        f'{f}={getattr(self, f)}' for f in uses.split())
        return f'{self.name} {text}'.rstrip()


class Record:
    """A record at a position of the ring, or ValueError if there is none."""

    def __init__(self, journal, position):
        head = journal.bytes_at(position, 64)
        (magic, self.crc, self.epoch, self.sequence, self.flushed,
         self.previous_crc, self.length, self.nb_operations, flags,
         nb_sums, reserved) = RECORD.unpack(head)
        self.nb_sums = nb_sums if flags & FLAG_SUMS else 0
        room = self.length - 64 - self.nb_sums * DATA_SUM.size
        if (magic != b'TVJR' or not 64 <= self.length <= RECORD_MAX or
                self.length % 8 or not 0 < self.sequence <= COUNTER_MAX or
                self.epoch > COUNTER_MAX or self.flushed >= self.sequence or
                self.nb_sums > MAX_SUMS or room < 0 or
                self.nb_operations > room // 40):
            raise ValueError('no record here')
        self.position = position
        self.padded = -(-self.length // PAGE) * PAGE
        self.data = journal.bytes_at(position, self.length)
        if self.crc != checksum_without(journal.uuid, SUM_RECORD,
                                        self.sequence, self.data, 4):
            raise ValueError('checksum is wrong')
        self.strange = bool(flags & ~FLAG_SUMS or any(reserved) or
                            bool(flags) != bool(nb_sums))
        self.operations_end = 64 + room

    def sums(self):
        """(offset on the device, bytes, checksum) of the data it maps."""
        return list(DATA_SUM.iter_unpack(self.data[self.operations_end:]))

    def data_is_there(self, device, uuid):
        """Do the data have the checksums that it gives?"""
        return all(
            size and size <= MAX_SUM_BYTES and offset < 1 << 62 and
            not (offset % 512 or size % 512) and
            crc == checksum(uuid, SUM_DATA, offset,
                            device.read_data(offset, size))
            for offset, size, crc in self.sums())

    def operations(self):
        where = f'journal record {self.sequence}'
        require(not self.strange, f'{where}: reserved fields of its header '
                'are set: a later version wrote it')
        offset = 64
        for i in range(self.nb_operations):
            op = Operation(self.data[:self.operations_end], offset,
                           f'{where}, operation {i}')
            offset += op.length
            yield op
        require(offset == self.operations_end,
                f'{where}: {self.operations_end - offset} bytes behind the '
                'last operation')


class Journal:
    """The records that follow a base, in order."""

    def __init__(self, device, sb):
        self.device, self.uuid, self.size = device, sb.uuid, sb.journal_size
        self.sb = sb
        self.damage = None
        self.end = sb.journal_position      # where the next one would start
        self.records = list(self._follow())
        self._judge_last()
        self.damage = self._find_damage()

    def bytes_at(self, position, size):
        position %= self.size
        first = min(size, self.size - position)
        data = self.device.read(JOURNAL_OFFSET + position, first, 'journal')
        if first < size:
            data += self.device.read(JOURNAL_OFFSET, size - first, 'journal')
        return data

    def _follow(self):
        sb, used, summed = self.sb, 0, False
        self.sequence, self.epoch = sb.sequence, sb.epoch
        crc = sb.record_crc
        while True:
            try:
                r = Record(self, self.end)
            except ValueError:
                return
            used += r.padded
            if (r.sequence != self.sequence + 1 or r.previous_crc != crc or
                    r.epoch < self.epoch or used > self.size):
                return
            if summed and r.flushed < self.sequence:
                return
            summed = r.nb_sums > 0
            self.end = (self.end + r.padded) % self.size
            self.sequence, self.epoch, crc = r.sequence, r.epoch, r.crc
            yield r

    def _judge_last(self):
        """The last one, if it has checksums of its data, counts by them."""
        last = self.records[-1] if self.records else None
        if not last or last.strange or last.data_is_there(self.device,
                                                          self.uuid):
            return
        self.records.pop()
        before = self.records[-1] if self.records else self.sb
        self.sequence, self.epoch = before.sequence, before.epoch
        self.end = last.position

    def _find_damage(self):
        """Does a later record say that the missing one was durable?"""
        missing = self.sequence + 1
        for start in range(0, self.size, MIB):
            chunk = self.bytes_at(start, min(MIB, self.size - start))
            for offset in range(0, len(chunk), PAGE):
                if chunk[offset:offset + 4] != b'TVJR':
                    continue
                try:
                    r = Record(self, start + offset)
                except ValueError:
                    continue
                if (r.sequence > missing and r.flushed >= missing and
                        r.epoch >= self.epoch):
                    return (f'journal record {missing} at byte {self.end} of '
                            f'the ring is missing or damaged: record '
                            f'{r.sequence} at byte {r.position} says that it '
                            'was durable')
        return None
