#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Looks into thinvm images without QEMU and without the driver: what is in
# them, whether they are sound, and their disk as a raw image.  A way out, and
# an oracle for tests.  Opens images read-only and takes no lock; of an image
# that somebody writes to meanwhile it may say that it is damaged.
#
# Exit status: 0 fine; 1 cannot be done, with one message; check also 2 for
# corruption and 3 for leaks alone, as qemu-img check.

import argparse
import json
import os
import struct
import sys
import uuid

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)),
                                'lib'))

from thinvm_reader import FormatError, Image, check          # noqa: E402
from thinvm_reader import structures as fmt                  # noqa: E402
from thinvm_reader.image import read_superblocks             # noqa: E402

COPY = 1 << 20                  # bytes at once


def clean(text):
    """Names come from the image: nothing for terminals to interpret."""
    return ''.join(c if c.isprintable() else f'\\x{ord(c):02x}' for c in text)


def snapshot_info(s):
    return {'id': s.id, 'name': s.name, 'parent': s.parent_id,
            'virtual-size': s.virtual_size, 'vmstate-size': s.vmstate_size,
            'date': s.date + s.date_nsec / 1e9,
            'hidden': bool(s.flags)}


def cmd_info(args):
    image = open_image(args)
    sb = image.sb
    info = {
        'version': f'{sb.major}.{sb.minor}',
        'uuid': str(uuid.UUID(bytes=sb.uuid)),
        'virtual-size': image.virtual_size,
        'cluster-size': image.cluster_size,
        'journal-size': sb.journal_size,
        'device-size': image.device_clusters << image.cluster_bits,
        'backing-file': image.backing_name or None,
        'backing-format': image.backing_format or None,
        'superblock': sb.slot,
        'generation': sb.generation,
        'base-sequence': sb.sequence,
        'sequence': image.journal.sequence,
        'epoch': image.epoch,
        'journal-records': len(image.journal.records),
        'metadata-pages': sum(e.nb_pages for e in image.extents),
        'vmstate-size': image.vmstate_size,
        'features': {'compatible': sb.compatible,
                     'read-only-compatible': sb.readonly_compatible,
                     'autoclear': sb.autoclear},
        'current-snapshot': image.current_snapshot_id or None,
        'snapshots': [snapshot_info(s) for _, s in
                      sorted(image.snapshots.items())],
    }
    if args.json:
        print(json.dumps(info, indent=4))
        return 0
    for key, value in info.items():
        if key != 'snapshots' and value is not None:
            print(f'{key}: {clean(str(value))}')
    for s in info['snapshots']:
        print(f"snapshot {s['id']}: {clean(s['name'])!r}, parent "
              f"{s['parent']}, {s['virtual-size']} bytes, VM state "
              f"{s['vmstate-size']} bytes"
              + (', hidden' if s['hidden'] else ''))
    return 0


def cmd_check(args):
    shown = [0]

    def report(message):
        shown[0] += 1
        if shown[0] <= args.max_messages:
            print(message)

    found = check(args.image, report)
    if shown[0] > args.max_messages:
        print(f'... and {shown[0] - args.max_messages} more')
    print(f'{found.corruptions} corruptions, {found.leaks} leaks, '
          f'{found.allocated} data clusters in use at the checkpoint')
    return 2 if found.corruptions else 3 if found.leaks else 0


def chosen_disk(image, args):
    if args.snapshot:
        s = image.find_snapshot(args.snapshot)
        return s.root, s.virtual_size
    return image.roots[0], image.virtual_size


def cmd_map(args):
    image = open_image(args)
    rows = image.parts(*chosen_disk(image, args))
    if args.json:
        print(json.dumps([dict(zip(('start', 'length', 'type', 'offset'),
                                   row if row[2] == 'data' else row[:3]))
                          for row in rows]))
        return 0
    for start, length, what, offset in rows:
        print(f'{start:#x} {length:#x} {what}' +
              (f' {offset:#x}' if what == 'data' else ''))
    return 0


def export_layer(layers, depth, out, root, size, start, end):
    """
    Write what layers[depth] has in [start, end); zeroes are left out, as the
    file is new.
    """
    layer = layers[depth]
    for offset, length, what, where in layer.parts(root, size):
        first, last = max(offset, start), min(offset + length, end)
        if first >= last or what == 'zero':
            continue
        if what == 'data':
            copy_data(layer.device, out, where + first - offset, first,
                      last - first)
        elif depth + 1 < len(layers):
            below = layers[depth + 1]
            export_layer(layers, depth + 1, out, below.roots[0],
                         below.virtual_size, first, last)


def copy_data(device, out, source, target, length):
    while length:
        n = min(length, COPY)
        data = device.read_data(source, n)
        if data.count(0) < n:           # much faster than any()
            os.pwrite(out, data, target)
        source, target, length = source + n, target + n, length - n


def cmd_export(args):
    image = open_image(args)
    layers = image.layers()
    root, size = chosen_disk(image, args)
    out = os.open(args.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        os.ftruncate(out, size)
        export_layer(layers, 0, out, root, size, 0, size)
        os.fsync(out)
    finally:
        os.close(out)
    return 0


# --- dump -------------------------------------------------------------------

def dump_superblocks(slots):
    for slot, sb in enumerate(slots):
        if isinstance(sb, FormatError):
            print(f'superblock {slot}: {sb}')
            continue
        print(f'superblock {slot}:')
        if sb.unknown:
            print(f'  {sb.unknown}')
            continue
        for name in fmt.SUPERBLOCK_FIELDS[1:]:
            value = getattr(sb, name)
            if name == 'uuid':
                value = uuid.UUID(bytes=value)
            elif name in ('crc', 'record_crc', 'autoclear') or \
                    'compatible' in name:
                value = f'{value:#x}'
            print(f'  {name}: {value}')
        for name, _ in fmt.ROOTS:
            print(f'  {name}: {getattr(sb, name)}')
        print(f'  promised_pages: {sb.promised_pages}')


def dump_journal(journal):
    print(f'journal from byte {journal.sb.journal_position}: '
          f'{len(journal.records)} records')
    for r in journal.records:
        print(f'  record {r.sequence} at {r.position}: epoch {r.epoch}, '
              f'flushed {r.flushed}, {r.length} bytes, crc {r.crc:#010x}, '
              f'{r.nb_operations} operations')
        for op in r.operations():
            print(f'    {op}')
    print(f'  ends at {journal.end}'
          + (f': {journal.damage}' if journal.damage else ''))


def entry_text(entry):
    physical, valid, source = fmt.entry_fields(entry)
    text = 'zeroes' if source else 'backing'
    if physical:
        text = f'{physical} valid {valid:#06x}, else {text}'
    return text + (', shared' if entry >> 59 & 1 else '')


def dump_items(page, indent):
    """Equal neighbours on one line."""
    last, first = None, 0
    step = 1 if page.kind == fmt.MAP and page.level == 0 else 0
    for i, item in enumerate(list(page.items) + [None]):
        if i and last is not None and item is not None and (
                item == last or step and last & (1 << 40) - 1 and
                item == last + (i - first)):
            continue
        if last is not None and last not in (0, fmt.EMPTY):
            text = entry_text(last) if step else str(last)
            print(f'{indent}{first}' + (f'-{i - 1}' if i - 1 > first else '')
                  + f': {text}')
        last, first = item, i


def dump_tree(image, name, pointer, kind, level, indent='', seen=None):
    seen = set() if seen is None else seen
    print(f'{indent}{name}: {pointer}')
    if pointer.type != fmt.PAGEPTR or kind == fmt.NAME:
        return
    if pointer.address in seen:
        print(f'{indent}  (shown above)')
        return
    seen.add(pointer.address)
    page = image.page(pointer, kind, level)
    if level:
        for i, p in enumerate(page.items):
            if p.type == fmt.PAGEPTR:
                dump_tree(image, str(i), p, kind, level - 1, indent + '  ',
                          seen)
            elif p.type != fmt.NONE:
                print(f'{indent}  {i}: {p}')
    elif kind == fmt.SPACE:
        print(f'{indent}  {len(page.items)} pages from {page.first_page}, '
              f'{sum(map(bool, page.items))} in use')
    elif kind == fmt.SNAPSHOTS:
        for s in filter(None, page.items):
            print(f'{indent}  {clean(str(snapshot_info(s)))}')
    else:
        dump_items(page, indent + '  ')


def cmd_dump(args):
    image = Image(args.image, superblock=args.superblock, replay=False)
    dump_superblocks(image.slots)
    dump_journal(image.journal)
    sb, seen = image.sb, set()
    for name, pointer, kind in (
            ('disk', sb.map_root, fmt.MAP),
            ('VM state', sb.vmstate_root, fmt.MAP),
            ('counts', sb.count_root, fmt.COUNT),
            ('space map', sb.space_root, fmt.SPACE),
            ('snapshots', sb.snapshot_root, fmt.SNAPSHOTS),
            ('backing file', sb.backing, fmt.NAME)):
        dump_tree(image, name, pointer, kind, fmt.LEVELS[kind], '', seen)
    for s in image.snapshots.values():
        dump_tree(image, f'disk of snapshot {s.id}', s.root, fmt.MAP, 3, '',
                  seen)
        dump_tree(image, f'VM state of snapshot {s.id}', s.vmstate_root,
                  fmt.MAP, 3, '', seen)
    if image.backing_name:
        print(f'backing file: {clean(image.backing_name)!r}, format '
              f'{clean(image.backing_format)!r}')
    return 0


# --- claims -----------------------------------------------------------------

STATES = {1: 'active', 2: 'released', 3: 'closed'}


def ownership_block(image, kind, offset, magic):
    data = image.device.read(offset, 512, 'ownership block')
    # the UUID of the image is at another place in each kind
    at = 144 if kind == fmt.SUM_CLAIM else 40
    if data[:4] != magic or data[at:at + 16] != image.uuid:
        return None
    crc, epoch = struct.unpack_from('<IQ', data, 4)
    if crc != fmt.checksum_without(image.uuid, kind, epoch, data, 4):
        raise FormatError(f'block at {offset}: checksum is wrong')
    return data, epoch


def cmd_claims(args):
    image = Image(args.image, superblock=args.superblock, replay=False)
    for slot in range(fmt.NB_CLAIMS):
        claim = ownership_block(image, fmt.SUM_CLAIM,
                                fmt.CLAIM_OFFSET + slot * fmt.PAGE, b'TVCL')
        if claim:
            data, epoch = claim
            state, pid, start = struct.unpack_from('<IIQ', data, 16)
            host = data[80:144].split(b'\0')[0].decode('utf-8', 'replace')
            print(f'claim of epoch {epoch}: {STATES.get(state, state)}, host '
                  f'{clean(host)!r} {data[32:48].hex()}, boot '
                  f'{data[48:64].hex()}, process {pid} started {start}, nonce '
                  f'{data[64:80].hex()}')
        beat = ownership_block(image, fmt.SUM_HEARTBEAT,
                               fmt.HEARTBEAT_OFFSET + slot * fmt.PAGE,
                               b'TVHB')
        if beat:
            data, epoch = beat
            print(f'heartbeat of epoch {epoch}: counter '
                  f'{struct.unpack_from("<Q", data, 16)[0]}, nonce '
                  f'{data[24:40].hex()}')
    return 0


# --- main -------------------------------------------------------------------

def open_image(args):
    return Image(args.image, superblock=args.superblock)


def parse(argv):
    parser = argparse.ArgumentParser(
        description='Look into thinvm images without QEMU.')
    commands = parser.add_subparsers(dest='command', required=True)

    def command(name, function, text, json_too=False, disk=False):
        p = commands.add_parser(name, help=text, description=text)
        p.add_argument('image')
        if name != 'check':
            p.add_argument('--superblock', type=int, choices=(0, 1),
                           help='use this one (default: the newest)')
        if json_too:
            p.add_argument('--json', action='store_true')
        if disk:
            p.add_argument('--snapshot', metavar='NAME',
                           help='name or id (default: the active disk)')
        p.set_defaults(function=function)
        return p

    command('info', cmd_info, 'sizes, versions, snapshots', json_too=True)
    p = command('check', cmd_check, 'verify everything; writes nothing')
    p.add_argument('--max-messages', type=int, default=100, metavar='N')
    command('map', cmd_map, 'where each part of the disk is', json_too=True,
            disk=True)
    p = command('export', cmd_export, 'write the disk as a raw image',
                disk=True)
    p.add_argument('output')
    command('dump', cmd_dump, 'superblocks, journal and trees for people')
    command('claims', cmd_claims, 'who owns or owned the image')
    return parser.parse_args(argv)


def main(argv):
    args = parse(argv)
    try:
        return args.function(args)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except (FormatError, OSError, RecursionError) as e:
        sys.stdout.flush()
        print(f'thinvm-image: {clean(args.image)}: {clean(str(e))}',
              file=sys.stderr)
        return 1


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
