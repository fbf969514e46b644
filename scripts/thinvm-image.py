#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Looks into thinvm images without QEMU and without the driver: what is in
# them, whether they are sound, and their disk as a raw image.  A way out, and
# an oracle for tests.  Opens images read-only and takes no lock; of an image
# that somebody writes to meanwhile it may say that it is damaged.
#
# Exit status: 0 fine; 1 cannot be done, with one message; check also 2 for
# corruption and 3 for leaks alone, as qemu-img check; dump 2 where it met
# something damaged (it tells of the rest).

import argparse
import json
import os
import struct
import sys
import uuid

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)),
                                'lib'))

from thinvm_reader import FormatError, Image, check, explain # noqa: E402
from thinvm_reader import structures as fmt                  # noqa: E402

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

def flat(d):
    """A dictionary on one line."""
    return ', '.join(f'{k} {v:#x}' if k in ('valid', 'crc') else f'{k} {v}'
                     for k, v in d.items()
                     if not isinstance(v, (list, dict)))


def print_node(node, indent):
    head = {k: v for k, v in node.items()
            if k not in ('name', 'index', 'problem')}
    name = node.get('name', node.get('index'))
    print(clean(f'{indent}{name}: {flat(head)}'))
    if 'problem' in node:
        print(clean(f"{indent}  DAMAGED: {node['problem']}"))
    for child in node.get('children', ()):
        print_node(child, indent + '  ')
    for item in node.get('items', ()):
        print(clean(f'{indent}  {flat(item)}'))


def print_dump(e):
    for sb in e['superblocks']:
        used = ', used' if sb['slot'] == e['used-superblock'] else ''
        print(f"superblock {sb['slot']}{used}:")
        for key, value in sb.items():
            if key != 'slot':
                print(clean(f'  {key}: {value}'))
    for block in e['ownership']:
        print(clean(flat(block)))
    journal = e['journal'] or {'records': []}
    if 'start' in journal:
        print(f"journal from byte {journal['start']} to {journal['end']}: "
              f"{len(journal['records'])} records")
    for record in journal.get('records', ()):
        print(clean(f'  {flat(record)}'))
        for operation in record['operations']:
            print(clean(f'    {operation}'))
        for data in record.get('data', []):
            print(clean(f'    data: {data}'))
    if 'problem' in journal:
        print(clean(f"  DAMAGED: {journal['problem']}"))
    for tree in e['trees']:
        print_node(tree, '')
    for snapshot in e['snapshots']:
        print(clean(f'snapshot: {flat(snapshot)}'))
    for problem in e['problems']:
        print(clean(f'PROBLEM: {problem}'))


def cmd_dump(args):
    e = explain(args.image, args.superblock)
    if args.json:
        print(json.dumps(e, indent=4))
    else:
        print_dump(e)
    return 2 if e['problems'] else 0


# --- claims -----------------------------------------------------------------

STATES = {1: 'active', 2: 'released', 3: 'closed', 4: 'returned'}


def ownership_block(image, kind, offset, magic):
    data = image.device.read(offset, 512, 'ownership block')
    # the UUID of the image is at another place in each kind
    at = {fmt.SUM_CLAIM: 144, fmt.SUM_HEARTBEAT: 40, fmt.SUM_RELEASE: 40}[kind]
    if data[:4] != magic or data[at:at + 16] != image.uuid:
        return None
    crc, epoch = struct.unpack_from('<IQ', data, 4)
    if crc != fmt.checksum_without(image.uuid, kind, epoch, data, 4):
        raise FormatError(f'block at {offset}: checksum is wrong')
    return data, epoch


def hot_list(image):
    """(epoch, number, leaves) of the owner's list of hot leaves, or None."""
    head = image.device.read(fmt.HOT_OFFSET, 64, 'list of hot leaves')
    number, count = struct.unpack_from('<16xQ32xI', head)
    if head[:4] != b'TVOT' or head[40:56] != image.uuid or \
       count > fmt.MAX_HOT:
        return None
    data = image.device.read(fmt.HOT_OFFSET, 64 + 4 * count,
                             'list of hot leaves')
    crc, epoch = struct.unpack_from('<IQ', data, 4)
    if crc != fmt.checksum_without(image.uuid, fmt.SUM_HOT, epoch, data, 4):
        return None                     # being written, or torn
    return epoch, number, struct.unpack_from(f'<{count}I', data, 64)


def cmd_hot(args):
    image = Image(args.image, superblock=args.superblock, replay=False)
    found = hot_list(image)
    if not found:
        print('no list of hot leaves')
        return 0
    epoch, number, leaves = found
    print(f'list {number} of epoch {epoch}: {len(leaves)} leaves')
    for leaf in leaves:
        print(leaf * 512 << image.cluster_bits)
    return 0


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
        release = ownership_block(image, fmt.SUM_RELEASE, fmt.CLAIM_OFFSET +
                                  slot * fmt.PAGE + 512, b'TVRL')
        if release:
            data, epoch = release
            print(f'release of epoch {epoch}: the journal ends with record '
                  f'{struct.unpack_from("<Q", data, 16)[0]}, checksum '
                  f'{struct.unpack_from("<I", data, 56)[0]:#010x}')
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
    command('dump', cmd_dump, 'superblocks, journal and trees, and what is '
            'wrong with them', json_too=True)
    command('claims', cmd_claims, 'who owns or owned the image')
    command('hot', cmd_hot, 'guest offsets of the leaves that the owner used '
            'most')
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
