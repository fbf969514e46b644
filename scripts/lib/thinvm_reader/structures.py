# SPDX-License-Identifier: GPL-2.0-or-later
#
# Structures of the thinvm format, each judged as it is decoded: checksum,
# device, pointers, entries, superblock, snapshots, name of the backing file.
# Whatever is wrong raises FormatError with the place and the value.

import collections
import os
import struct

PAGE = 4096
KIB, MIB, GIB, TIB, PIB = (1 << n for n in (10, 20, 30, 40, 50))

SUPERBLOCK_OFFSETS = (0, 512 * KIB)
CLAIM_OFFSET, HEARTBEAT_OFFSET, NB_CLAIMS = 64 * KIB, 128 * KIB, 16
HOT_OFFSET, MAX_HOT = 192 * KIB, (64 * KIB - 64) // 4
JOURNAL_OFFSET = MIB
MAX_GUEST_CLUSTERS, MAX_CLUSTERS = 1 << 33, 1 << 35
COUNTER_MAX = 1 << 62
MAX_SIZE = 16 * PIB
COUNT_METADATA, COUNT_MAX = 0xffff, 0xfff0
ALL_VALID = 0xffff
EXTENT_MAX_PAGES = 2032
RECORD_MAX = 256 * KIB
MAX_SLOTS = 256 * 256 * 8

SUM_SUPERBLOCK, SUM_RECORD, SUM_CLAIM, SUM_HEARTBEAT, SUM_PAGE = range(1, 6)
SUM_HOT, SUM_RELEASE, SUM_DATA = 6, 7, 8
NONE, PAGEPTR, RUN, UNWRITTEN_RUN, ZERO, UNIFORM = range(6)
POINTER_NAMES = ('none', 'page', 'run', 'unwritten run', 'zero', 'uniform')
BACKING, ZEROES, TEMPLATE = 0, 1, 3     # the last one is a mark
DISK, VMSTATE = 0, 1
DELETED, TRASH, PROTECTED = 1, 2, 4

# Kinds of page: a tree's name, and inner pages and leaves differ by level
MAP, COUNT, SPACE, SNAPSHOTS, NAME = ('mapping', 'count', 'space map',
                                      'snapshot', 'backing file name')
LEVELS = {MAP: 3, COUNT: 3, SPACE: 2, SNAPSHOTS: 2, NAME: 0}
LEAF_BITS = {MAP: 9, COUNT: 11, SPACE: 0, SNAPSHOTS: 3}


class FormatError(Exception):
    """The image is not what the format says; the message names the place."""


def require(condition, message):
    if not condition:
        raise FormatError(message)


# --- Checksum ---------------------------------------------------------------

def _crc_table():
    table = []
    for i in range(256):
        for _ in range(8):
            i = i >> 1 ^ (0x82f63b78 if i & 1 else 0)
        table.append(i)
    # for two bytes at once
    wide = [table[(table[i & 255] ^ i >> 8) & 255] ^ table[i & 255] >> 8
            for i in range(65536)]
    return table, wide


_TABLE, _TABLE16 = _crc_table()


def crc32c(data):
    """CRC32C of bytes."""
    crc = 0xffffffff
    table = _TABLE16
    even = len(data) & ~1
    for (word,) in struct.iter_unpack('<H', data[:even]):
        crc = table[(crc ^ word) & 0xffff] ^ crc >> 16
    for byte in data[even:]:
        crc = _TABLE[(crc ^ byte) & 255] ^ crc >> 8
    return crc ^ 0xffffffff


def checksum(image_uuid, kind, place, data):
    return crc32c(image_uuid + struct.pack('<IQ', kind, place) + bytes(data))


def checksum_without(image_uuid, kind, place, data, field):
    """With the four bytes at position field taken as 0."""
    return checksum(image_uuid, kind, place,
                    data[:field] + bytes(4) + data[field + 4:])


# --- Device -----------------------------------------------------------------

class Device:
    """A file or block device, read only."""

    def __init__(self, path):
        self.path = path
        self.fd = os.open(path, os.O_RDONLY)
        self.size = os.lseek(self.fd, 0, os.SEEK_END)

    def read(self, offset, size, what):
        """Exactly size bytes, or an error."""
        data = b''
        while len(data) < size:
            more = os.pread(self.fd, size - len(data), offset + len(data))
            if not more:
                raise FormatError(f'{what}: the device ends at {self.size}, '
                                  f'before {offset + size}')
            data += more
        return data

    def read_data(self, offset, size):
        """What is behind the end of the device reads as zeroes."""
        have = max(0, min(size, self.size - offset))
        data = self.read(offset, have, 'data') if have else b''
        return data + bytes(size - have)

    def close(self):
        if self.fd is not None:
            os.close(self.fd)
        self.fd = None

    def __del__(self):
        if hasattr(self, 'fd'):
            self.close()


# --- Pointers and entries ---------------------------------------------------

class Pointer(collections.namedtuple(
        'Pointer', 'address type shared generation crc extra')):
    __slots__ = ()

    def __str__(self):
        text = POINTER_NAMES[self.type]
        if self.type not in (NONE, ZERO):
            text += f' {self.address}'
        return text + (' (shared below)' if self.shared else '')


EMPTY = Pointer(0, NONE, False, 0, 0, 0)


def decode_pointer(word, crc, extra, allowed, where, max_extra=0,
                   in_map=False):
    """A Pointer whose fields fit each other and the place."""
    kind = word >> 40 & 15
    require(not word >> 45 & 7 and kind in allowed,
            f'{where}: pointer type or reserved bits not allowed here '
            f'(word {word:#x})')
    p = Pointer(word & (1 << 40) - 1, kind, bool(word >> 44 & 1), word >> 48,
                crc, extra)
    below = kind in (PAGEPTR, RUN, UNWRITTEN_RUN)
    require(not p.shared or below and in_map,
            f'{where}: "shared below" where nothing is')
    require(extra <= (max_extra if kind == PAGEPTR else 0),
            f'{where}: extra field {extra} too large')
    require(kind == PAGEPTR or not crc and not p.generation,
            f'{where}: checksum or generation without a page')
    if kind == UNIFORM:
        require(0 < p.address <= COUNT_MAX or p.address == COUNT_METADATA,
                f'{where}: impossible count {p.address}')
    else:
        require(bool(p.address) == below,
                f'{where}: address {p.address} does not fit the type')
    return p


def entry_fields(entry):
    """(physical, valid, source)"""
    return entry & (1 << 40) - 1, entry >> 40 & 0xffff, entry >> 56 & 7


def make_entry(physical, valid, source, shared=False):
    if valid == ALL_VALID and source != TEMPLATE:
        source = BACKING
    return physical | valid << 40 | source << 56 | int(shared) << 59


def run_entry(pointer, index):
    """What a run has in the place of an entry."""
    written = pointer.type == RUN
    return make_entry(pointer.address + index, ALL_VALID if written else 0,
                      ZEROES, pointer.shared)


# --- Superblock -------------------------------------------------------------

AUTOCLEAR_PROMISES = 1
INCOMPATIBLE_TEMPLATE = 1
SUPERBLOCK = struct.Struct('<8sHHI16sQQQQIIQQQQQQQQIIQQIIQ' + 'QII' * 6 +
                           '128sQ104s')
SUPERBLOCK_FIELDS = (
    'magic major minor crc uuid compatible readonly_compatible incompatible '
    'autoclear cluster_bits flags journal_offset journal_size virtual_size '
    'device_clusters generation sequence epoch journal_position record_crc '
    'nb_extents next_snapshot_id current_snapshot_id nb_snapshots '
    'nb_snapshot_slots vmstate_size').split()
ROOTS = (
    ('map_root', (NONE, PAGEPTR, ZERO)),
    ('vmstate_root', (NONE, PAGEPTR, ZERO)),
    ('count_root', (PAGEPTR,)),
    ('space_root', (PAGEPTR,)),
    ('snapshot_root', (NONE, PAGEPTR)),
    ('backing', (NONE, PAGEPTR)),
)
assert SUPERBLOCK.size == 512


# length; SHA-256 of the contents, zeroes while they are being copied; what a
# boot cache knows them by
TEMPLATE_ID = struct.Struct('<Q32s32s')
Template = collections.namedtuple('Template', 'length digest identity')


class NotThinvm(FormatError):
    pass


class Superblock:
    def __init__(self, data, slot):
        where = f'superblock {slot}'
        values = SUPERBLOCK.unpack(data)
        for name, value in zip(SUPERBLOCK_FIELDS, values):
            setattr(self, name, value)
        self.slot = slot
        if self.magic != b'ThinVM\x1a\n':
            raise NotThinvm(f'{where}: no magic number')
        right = checksum_without(self.uuid, SUM_SUPERBLOCK, 0, data, 12)
        require(self.crc == right, f'{where}: checksum {self.crc:#010x}, '
                f'contents have {right:#010x}')
        self.unknown = self._unknown()
        if self.unknown:
            return
        n = len(SUPERBLOCK_FIELDS)
        for i, (name, allowed) in enumerate(ROOTS):
            setattr(self, name, decode_pointer(
                *values[n + 3 * i:n + 3 * i + 3], allowed,
                f'{where}, {name}', in_map=i < 2))
        self.reserved = values[-3] + values[-1]
        self.template = None
        if self.incompatible & INCOMPATIBLE_TEMPLATE:
            self.template = Template(*TEMPLATE_ID.unpack(values[-1][:72]))
            self.reserved = values[-3] + values[-1][72:]
        self.promised_pages = values[-2]
        self.promises_exact = bool(self.autoclear & AUTOCLEAR_PROMISES)
        self._judge(where)

    def _unknown(self):
        if self.major != 1:
            return (f'format version {self.major}.{self.minor} is not known '
                    'to this program (it knows 1)')
        unknown = self.incompatible & ~INCOMPATIBLE_TEMPLATE
        if unknown:
            return f'unknown incompatible features {unknown:#x}'
        return None

    def _judge(self, where):
        def between(name, low, high, multiple=1):
            value = getattr(self, name)
            require(low <= value <= high and value % multiple == 0,
                    f'{where}: {name} {value} is not between {low} and '
                    f'{high}, or no multiple of {multiple}')

        between('flags', 0, 0)
        between('cluster_bits', 14, 21)
        between('journal_offset', JOURNAL_OFFSET, JOURNAL_OFFSET)
        between('journal_size', MIB, GIB, PAGE)
        largest = min(MAX_SIZE, MAX_GUEST_CLUSTERS << self.cluster_bits)
        between('virtual_size', 0, largest, 512)
        between('vmstate_size', 0, largest)
        between('device_clusters', self.first_cluster + 1, MAX_CLUSTERS)
        between('generation', 1, COUNTER_MAX)
        between('sequence', 0, COUNTER_MAX)
        between('epoch', 0, COUNTER_MAX)
        between('journal_position', 0, self.journal_size - PAGE, PAGE)
        between('nb_extents', 1, 65536)
        between('next_snapshot_id', 1, COUNTER_MAX)
        between('current_snapshot_id', 0, self.next_snapshot_id - 1)
        between('nb_snapshot_slots', 0, MAX_SLOTS)
        between('nb_snapshots', 0, min(65000, self.nb_snapshot_slots))
        require(not self.nb_snapshots or self.snapshot_root.type == PAGEPTR,
                f'{where}: {self.nb_snapshots} snapshots but no page')
        require(self.minor > 1 or not any(self.reserved) and
                (self.minor or not self.promised_pages),
                f'{where}: reserved bytes are not zero')
        between('promised_pages', 0, MAX_CLUSTERS)
        if self.template:
            length = self.template.length
            require(512 <= length <= MAX_SIZE and length % 512 == 0,
                    f'{where}: length {length} of the template')

    @property
    def first_cluster(self):
        return -(-(self.journal_offset + self.journal_size)
                 >> self.cluster_bits)


# --- Snapshots, backing file ------------------------------------------------

SNAPSHOT = struct.Struct('<QQ' + 'QII' * 2 + 'QQQIIQQ160s256s')
assert SNAPSHOT.size == 512


class Snapshot:
    def __init__(self, data, where):
        v = SNAPSHOT.unpack(data)
        self.id, self.parent_id = v[:2]
        where = f'{where}, snapshot {self.id}'
        roots = (NONE, PAGEPTR, ZERO)
        self.root = decode_pointer(*v[2:5], roots, where, in_map=True)
        self.vmstate_root = decode_pointer(*v[5:8], roots, where, in_map=True)
        (self.virtual_size, self.vmstate_size, self.date, self.date_nsec,
         self.flags, self.vm_clock, self.icount, reserved, name) = v[8:]
        require(0 < self.id <= COUNTER_MAX and self.parent_id < self.id,
                f'{where}: id, or parent {self.parent_id}, impossible')
        require(self.virtual_size <= MAX_SIZE and
                self.virtual_size % 512 == 0 and self.vmstate_size <= MAX_SIZE,
                f'{where}: size {self.virtual_size} or {self.vmstate_size}')
        require(self.date_nsec < 10 ** 9 and self.flags < 8,
                f'{where}: nanoseconds {self.date_nsec} or flags '
                f'{self.flags:#x}')
        text = name.rstrip(b'\0')
        require(not any(reserved) and len(text) < 256 and b'\0' not in text,
                f'{where}: reserved bytes or name')
        self.name = text.decode('utf-8', 'backslashreplace')

    def copy(self):
        other = object.__new__(Snapshot)
        other.__dict__.update(self.__dict__)
        return other


def decode_backing(data, where):
    """(name, format), both str; the name may be empty."""
    length, format_length = struct.unpack_from('<II', data)

    def text(field, n):
        require(n < len(field) and 0 not in field[:n] and not any(field[n:]),
                f'{where}: length {n} of a name is wrong')
        return os.fsdecode(field[:n])

    require(not any(data[8:64]) and not any(data[1152:]),
            f'{where}: reserved bytes are not zero')
    return text(data[128:1152], length), text(data[64:128], format_length)
