#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Made the golden images that lie beside it: images of formats 1.0 and 1.1 that
# every later version must read.  They are a promise, so this is run again only to
# add one (under a new name): existing files are left alone.
#
#   make.py BUILD           writes NAME.xz, and what is in it to golden.json
#
# Each image shows what an image can hold: see the functions.

import hashlib
import json
import lzma
import os
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.realpath(__file__))
READER = os.path.join(HERE, '..', '..', '..', 'scripts', 'thinvm-image.py')
MIB = 1 << 20
BLOCK = 64 << 10


class Maker:
    def __init__(self, build, directory):
        self.bin, self.dir = os.path.join(build, 'bin'), directory

    def run(self, tool, *args, **kwargs):
        subprocess.run([os.path.join(self.bin, tool), *args], check=True,
                       cwd=self.dir, stdout=subprocess.DEVNULL, **kwargs)

    def create(self, name, size, *args, **options):
        for key, value in options.items():
            args += ('-o', f'{key}={value}')
        self.run('qemu-img', 'create', '-f', 'thinvm', *args, name, size)

    def io(self, name, *commands):
        args = [a for c in commands for a in ('-c', c)]
        self.run('qemu-io', '-f', 'thinvm', '-d', 'unmap', *args, name)

    def snapshot(self, *args):
        self.run('qemu-img', 'snapshot', *args)

    def disown(self, name):
        """Who did not close the image seems to be there, to other hosts."""
        with open(os.path.join(self.dir, name), 'r+b') as f:
            f.seek(64 << 10)
            f.write(bytes(128 << 10))


def plain(m):
    """Default options; a journal that no checkpoint has taken in."""
    m.create('plain', '256M')
    m.io('plain', 'write -P 1 0 1M', 'write -P 2 40M 4k',
         'write -P 3 41472k 512', 'write -z 2M 1M', 'discard 0 128k',
         'write -P 7 100M 40M', 'flush', 'write -P 8 255M 1M')


def checkpointed(m):
    """Many small commits through a small ring: checkpoints, then journal."""
    m.create('checkpointed', '1G', cluster_size='16k', journal_size='1M')
    writes = []
    for i in range(300):
        writes += [f'write -P {i % 255 + 1} {i * 1737}k 4k', 'flush']
    m.io('checkpointed', *writes)
    m.io('checkpointed', 'discard 10M 100M', 'write -z -u 200M 50M', 'flush')


def snapshots(m):
    """Shared pages and clusters; a snapshot gone, one gone back to."""
    m.create('snapshots', '64M', cluster_size='64k', journal_size='1M')
    m.io('snapshots', 'write -P 1 0 8M', 'write -P 2 60M 1M')
    m.snapshot('-c', 'first', 'snapshots')
    m.io('snapshots', 'write -P 3 1M 4k', 'write -P 4 20M 1M')
    m.snapshot('-c', 'second', 'snapshots')
    m.io('snapshots', 'write -P 5 1M 2M', 'discard 4M 2M')
    m.snapshot('-c', 'third \u2713', 'snapshots')
    m.snapshot('-d', 'second', 'snapshots')
    m.snapshot('-a', 'first', 'snapshots')
    m.io('snapshots', 'write -P 6 2M 64k', 'write -P 7 60M 512')


def vmstate(m):
    """A virtual machine saved inside."""
    m.create('vmstate', '16M')
    m.io('vmstate', 'write -P 1 0 1M')
    m.run('qemu-system-x86_64', '-machine', 'none', '-nodefaults', '-nographic',
          '-monitor', 'stdio', '-drive',
          'if=none,id=disk,file=vmstate,format=thinvm,discard=unmap',
          input=b'savevm saved\nqemu-io disk "write -P 2 0 64k"\nquit\n')


def runs(m):
    """Runs, written and not; split in places; large clusters."""
    m.create('runs', '96M', cluster_size='16k', preallocation='metadata',
             journal_size='1M')
    writes = ['write -P 1 16M 16M', 'write -P 2 40M 4k', 'discard 18M 1M']
    for i in range(300):
        writes += [f'write -P {i % 255 + 1} {50 * 1024 + i * 20}k 4k',
                   'flush']
    m.io('runs', *writes)
    m.create('large', '64T', cluster_size='2M', journal_size='1M')
    writes = []
    for i in range(100):
        writes += [f'write -P {i + 1} {i * 650}G 4k', 'flush']
    m.io('large', *writes, 'discard 1950G 1G', 'flush')


def overlay(m):
    """A backing file, by a relative name."""
    m.create('base', '8M', journal_size='1M')
    m.io('base', 'write -P 1 0 4M')
    m.create('overlay', '12M', '-b', 'base', '-F', 'thinvm',
             journal_size='1M')
    m.io('overlay', 'write -P 2 1M 4k', 'write -P 3 3M 2M',
         'write -z 2M 100k')


def promises(m):
    """1.1: unwritten runs, shared and not, and what is promised to them."""
    m.create('promises', '64M', cluster_size='16k', preallocation='metadata',
             journal_size='1M')
    m.io('promises', 'write -P 1 9M 4k', 'flush')
    m.snapshot('-c', 'whole', 'promises')
    m.io('promises', 'write -P 2 20M 64k', 'discard 40M 8M',
         'write -P 3 0 16k', 'flush')


def slots(m):
    """1.1: operations, in the journal, say where a new snapshot goes."""
    m.create('slots', '32M', journal_size='1M')
    for number, name in enumerate('abc'):
        m.io('slots', f'write -P {number + 1} {number * 3}M 5M')
        m.snapshot('-c', name, 'slots')
    m.snapshot('-d', 'b', 'slots')
    m.snapshot('-d', 'a', 'slots')
    # None of these writes its last checkpoint
    options = ('driver=thinvm,discard=unmap,file.driver=blkdebug,'
               'file.inject-error.0.event=thinvm_superblock_write,'
               'file.inject-error.0.once=off,file.image.driver=file,'
               'file.image.filename=slots')
    m.snapshot('--image-opts', '-c', 'd', options)
    m.run('qemu-io', '--image-opts', '-c', 'write -P 5 2M 1M', options)
    m.snapshot('--image-opts', '-a', 'c', options)
    m.run('qemu-io', '--image-opts', '-c', 'write -P 6 3M 1M', options)
    m.disown('slots')


def sha256(path):
    """
    Of the blocks of 64 KiB that are not all zero, each with its offset, and
    of the size: holes cost nothing.
    """
    digest = hashlib.sha256()
    with open(path, 'rb', buffering=0) as f:
        size = f.seek(0, os.SEEK_END)
        offset = 0
        while offset < size:
            try:
                offset = f.seek(offset, os.SEEK_DATA) // BLOCK * BLOCK
            except OSError:         # none up to the end
                break
            f.seek(offset)
            block = f.read(BLOCK)
            if block.count(0) < len(block):
                digest.update(b'%d:' % offset + block)
            offset += BLOCK
    digest.update(b'%d' % size)
    return digest.hexdigest()


def reader(*args):
    return subprocess.run([sys.executable, READER, *args], check=True,
                          stdout=subprocess.PIPE).stdout


def describe(path, export):
    """What every later reader must find."""
    info = json.loads(reader('info', '--json', path))
    parts = json.loads(reader('map', '--json', path))
    data = []
    for p in parts:
        if p['type'] != 'data':
            continue
        if data and sum(data[-1]) == p['start']:
            data[-1] = (data[-1][0], data[-1][1] + p['length'])
        else:
            data.append((p['start'], p['length']))
    result = {key: info[key] for key in (
        'version', 'uuid', 'virtual-size', 'cluster-size', 'backing-file',
        'backing-format', 'generation', 'sequence', 'epoch',
        'journal-records')}
    result['data'] = data
    result['snapshots'] = [s for s in info['snapshots'] if not s['hidden']]
    if info['virtual-size'] <= 1024 * MIB:
        reader('export', path, export)
        result['sha256'] = sha256(export)
        for s in result['snapshots']:
            reader('export', '--snapshot', str(s['id']), path, export)
            s['sha256'] = sha256(export)
    return result


def main(build):
    listing = os.path.join(HERE, 'golden.json')
    golden = {}
    if os.path.exists(listing):
        with open(listing, encoding='utf-8') as f:
            golden = json.load(f)
    with tempfile.TemporaryDirectory() as directory:
        maker = Maker(os.path.abspath(build), directory)
        for make in (plain, checkpointed, snapshots, vmstate, runs, overlay,
                     promises, slots):
            make(maker)
        for name in sorted(set(os.listdir(directory)) - set(golden)):
            path = os.path.join(directory, name)
            reader('check', path)
            golden[name] = describe(path, os.path.join(directory, 'export'))
            with open(path, 'rb') as f, \
                    lzma.open(os.path.join(HERE, name + '.xz'), 'wb') as out:
                while block := f.read(MIB):
                    out.write(block)
            print(name, golden[name]['generation'],
                  golden[name]['journal-records'])
    with open(listing, 'w', encoding='utf-8') as f:
        lines = [f' {json.dumps(name)}: {json.dumps(what, sort_keys=True)}'
                 for name, what in sorted(golden.items())]
        f.write('{\n' + ',\n'.join(lines) + '\n}\n')


if __name__ == '__main__':
    sys.exit(main(*sys.argv[1:]))
