# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's agent tells what will be written, where, and what is free.

A real guest with ext4 on a partition, and on a device of linear pieces as LVM
makes them; what it says is compared with where the file system has the
blocks.
"""

import os

from lib.context import check, wait_for
from lib.files import (MIB, START, FilesGuest, Told, blocks_of, initramfs,
                       partitioned_disk)
from lib.testing import test

SIZE = 256 * MIB


def number_of(hints, serial):
    """The agent's number for the disk of this serial number."""
    return int(hints.expect(r'disk (\d+) \d+ %s \S+' % serial).group(1))


def begin(guest, request=1):
    hints = guest.hints
    hints.expect(r'hello thinvm-hints 1 thinvm-agent/\S+')
    hints.send('version 1')
    hints.send('start %d 200 20000' % request)
    hints.expect('done %d ok 0' % request)
    check('booted' not in hints.lines, 'it was not to say that')


def dirty_pages(path, offset, file, first, count):
    """The 4 KiB pages of the image that hold these pages of the file."""
    blocks = blocks_of(path, offset, file)
    check(len(blocks) >= first + count, '%s has %d blocks', file, len(blocks))
    return {at // 4096 for at in blocks[first:first + count]}


@test()
def partition(ctx):
    """Dirty pages of a file on a partition, until they are written; free
    space, and its trimming."""
    image = partitioned_disk(ctx, 'disk', SIZE)
    guest = FilesGuest(ctx, [(image, 'first disk')])
    guest.ask('mount /dev/vda1 /mnt')
    guest.ask('write /mnt/a 0 %d' % (8 * MIB))
    guest.ask('write /mnt/b 0 %d' % (64 * MIB))
    guest.ask('sync')
    begin(guest)
    disk = number_of(guest.hints, 'first%20disk')
    guest.hints.expect(r'disk %d %d .*' % (disk, SIZE))
    wanted = dirty_pages(image, START, '/a', 256, 512)

    guest.ask('write /mnt/a %d %d' % (MIB, 2 * MIB))
    wait_for(lambda: wanted <= Told(guest.hints.lines, disk).dirty, 120,
             'all dirty pages of the file are told')
    told = Told(guest.hints.lines, disk).dirty
    check(len(told) <= len(wanted) + 64, '%d pages are told to be dirty, '
          '%d are', len(told), len(wanted))
    guest.hints.expect(r'coverage %d [1-9]\d* \d+ \w+' % disk)

    guest.ask('fsync /mnt/a')
    wait_for(lambda: not wanted & Told(guest.hints.lines, disk).dirty, 120,
             'what was written is told to be clean')

    lines = guest.hints.lines
    used = dirty_pages(image, START, '/b', 0, 64 * 256)
    check(not used & Told(lines, disk).free, 'pages in use are told as free')
    check(len(Told(lines, disk).free) > SIZE // 4096 // 3,
          'only %d pages are told as free', len(Told(lines, disk).free))
    before = os.stat(image).st_blocks * 512
    guest.ask('delete /mnt/b')
    guest.ask('sync')
    guest.hints.send('trim 7 %d 65536' % disk)
    trimmed = int(guest.hints.expect(r'done 7 ok (\d+)').group(1))
    check(trimmed >= 64 * MIB, '%d bytes were trimmed', trimmed)
    after = os.stat(image).st_blocks * 512
    check(before - after >= 60 * MIB, 'the image has gone from %d bytes to '
          '%d', before, after)
    check_written(guest.hints)
    guest.poweroff()


def check_written(hints):
    """What it says of the guest's writes has not begun before it looked, and
    goes on when it is told to stop and to start again."""
    first = int(hints.expect(r'cost \d+ (\d+) \d+').group(1))
    check(first <= 32 * MIB, '%d bytes are told at once, the 72 MiB before '
          'the start among them', first)
    hints.send('stop 8')
    hints.expect('done 8 ok 0')
    begin = len(hints.lines)
    hints.send('start 9 200 20000')
    written = int(hints.expect(r'cost \d+ (\d+) \d+',
                               begin=begin).group(1))
    check(2 * MIB <= written <= 32 * MIB, 'after 2 MiB, %d bytes are told',
          written)


@test()
def mounted_upon_another(ctx):
    """The path of a file system may lead to another one, on another disk:
    nothing is told or discarded of the one by what the other says."""
    images = [partitioned_disk(ctx, name, SIZE) for name in ('below', 'upon')]
    guest = FilesGuest(ctx, [(images[0], 'below'), (images[1], 'upon')])
    guest.ask('mount /dev/vda1 /mnt')
    guest.ask('mount /dev/vdb1 /mnt')
    guest.ask('write /mnt/a 0 %d' % (8 * MIB))
    guest.ask('sync')
    begin(guest)
    disk = number_of(guest.hints, 'upon')
    wanted = dirty_pages(images[1], START, '/a', 0, 512)
    guest.ask('write /mnt/a 0 %d' % (2 * MIB))
    wait_for(lambda: wanted <= Told(guest.hints.lines, disk).dirty, 120,
             'all dirty pages of the file are told')
    guest.hints.send('trim 7 %d 65536' % disk)
    guest.hints.expect(r'done 7 ok [1-9]\d*')
    check(not any(line.startswith('disk') and 'below' in line
                  for line in guest.hints.lines),
          'the disk that no path leads to is told of')
    guest.poweroff()


@test()
def linear_map(ctx):
    """The same on two pieces of two disks, in another order."""
    images = [ctx.path('one'), ctx.path('two')]
    for image in images:
        with open(image, 'wb') as file:
            file.truncate(SIZE)
    scratch = partitioned_disk(ctx, 'fs', 128 * MIB + START)
    # The file system of 128 MiB: its second half on the first disk from
    # 10 MiB on, its first half on the second disk from 20 MiB on.
    half = 64 * MIB
    with open(scratch, 'rb') as source:
        source.seek(START)
        for image, at in ((images[1], 20 * MIB), (images[0], 10 * MIB)):
            with open(image, 'r+b') as file:
                file.seek(at)
                file.write(source.read(half))
    guest = FilesGuest(ctx, [(images[0], 'one'), (images[1], 'two')])
    guest.ask('linear lv 0,%d,%s,%d %d,%d,%s,%d' % (
        half // 512, device_of(guest, 'vdb'), 20 * MIB // 512, half // 512,
        half // 512, device_of(guest, 'vda'), 10 * MIB // 512))
    guest.ask('mount /dev/lv /mnt')
    guest.ask('write /mnt/a 0 %d' % (100 * MIB))
    guest.ask('sync')
    begin(guest)
    disks = [number_of(guest.hints, name) for name in ('one', 'two')]
    for at in (0, 98):      # MiB; one in each half of the file system
        guest.ask('write /mnt/a %d %d' % (at * MIB, 2 * MIB))

    def both():
        found = [Told(guest.hints.lines, d).dirty for d in disks]
        return min(map(len, found)) >= 2 * MIB // 4096 and found
    found = wait_for(both, 120, 'dirty pages on both disks')
    check(min(found[0]) >= 10 * MIB // 4096 and
          max(found[0]) < (10 * MIB + half) // 4096,
          'pages %d to %d of the first disk', min(found[0]), max(found[0]))
    check(min(found[1]) >= 20 * MIB // 4096 and
          max(found[1]) < (20 * MIB + half) // 4096,
          'pages %d to %d of the second disk', min(found[1]), max(found[1]))
    guest.poweroff()


def scatter(path, pieces):
    """Parts of a file into images: (offset, length, image, offset there)..."""
    with open(path, 'rb') as source:
        for start, length, image, at in pieces:
            with open(image, 'r+b') as file:
                for step in range(0, length, MIB):
                    source.seek(start + step)
                    data = source.read(MIB)
                    if any(data):
                        file.seek(at + step)
                        file.write(data)


def pages_full_of(path, byte):
    """The 4 KiB pages of an image with nothing but this byte."""
    wanted, found = bytes([byte]) * 4096, set()
    with open(path, 'rb') as file:
        for number in range(os.stat(path).st_size // 4096):
            if file.read(4096) == wanted:
                found.add(number)
    return found


@test()
def xfs(ctx):
    """xfs, on linear pieces of two disks: dirty pages, and free space."""
    half = 160 * MIB
    file_system = ctx.path('xfs')
    with open(file_system, 'wb') as file:
        file.truncate(2 * half)
    ctx.run(ctx.need('mkfs.xfs', 'xfsprogs'), '-q', file_system)
    images = [ctx.path('one'), ctx.path('two')]
    for image in images:
        with open(image, 'wb') as file:
            file.truncate(SIZE)
    scatter(file_system, ((0, half, images[1], 20 * MIB),
                          (half, half, images[0], 10 * MIB)))
    guest = FilesGuest(ctx, [(images[0], 'one'), (images[1], 'two')],
                       boot=initramfs(ctx, modules_too=('xfs',)))
    guest.ask('linear lv 0,%d,%s,%d %d,%d,%s,%d' % (
        half // 512, device_of(guest, 'vdb'), 20 * MIB // 512, half // 512,
        half // 512, device_of(guest, 'vda'), 10 * MIB // 512))
    guest.ask('mount /dev/lv /mnt xfs')
    guest.ask('write /mnt/a 0 %d' % (170 * MIB))
    guest.ask('sync')
    begin(guest)
    disks = [number_of(guest.hints, name) for name in ('one', 'two')]
    for at in (0, 165):     # MiB
        guest.ask('write /mnt/a %d %d' % (at * MIB, 2 * MIB))

    def told():
        found = [Told(guest.hints.lines, d).dirty for d in disks]
        return sum(map(len, found)) >= 4 * MIB // 4096 and found
    found = wait_for(told, 120, 'the dirty pages of the file')
    free = [Told(guest.hints.lines, d).free for d in disks]
    guest.ask('fsync /mnt/a')
    for i in range(2):
        # the first write was of ones, the others of twos and threes
        new = pages_full_of(images[i], 2) | pages_full_of(images[i], 3)
        check(new, 'the file has no such page on disk %d', i)
        check(new <= found[i], '%d pages were not told', len(new - found[i]))
        check(len(found[i]) <= len(new) + 64, '%d pages are told to be dirty, '
              '%d are', len(found[i]), len(new))
        check(not free[i] & (new | pages_full_of(images[i], 1)),
              'pages in use are told as free')
    check(sum(map(len, free)) >= 60 * MIB // 4096, 'hardly anything is free')
    guest.poweroff()


def device_of(guest, name):
    """MAJOR:MINOR of a virtio disk: 16 minors each, one major."""
    del guest
    return '254:%d' % (16 * (ord(name[2]) - ord('a')))


@test()
def stripes(ctx):
    """What lies on a device that the agent cannot see through is unknown, and
    told so; a disk beside it is told as ever."""
    images = [partitioned_disk(ctx, name, SIZE) for name in ('a', 'b')]
    guest = FilesGuest(ctx, [(images[0], 'plain'), (images[1], 'striped')])
    guest.ask('mount /dev/vda1 /mnt')
    guest.ask('striped st 0,%d,%s,%d' % (
        (SIZE - START) // 512 // 128 * 128, device_of(guest, 'vdb'),
        START // 512))
    guest.ask('mount /dev/st /st')
    guest.ask('write /mnt/a 0 %d' % (4 * MIB))
    guest.ask('write /st/b 0 %d' % (4 * MIB))
    guest.ask('sync')
    begin(guest)
    plain = number_of(guest.hints, 'plain')
    guest.ask('write /st/b 0 %d' % (2 * MIB))
    guest.hints.expect(r'coverage %d 0 %d mapping' % (plain, 2 * MIB))
    guest.ask('write /mnt/a 0 %d' % MIB)
    guest.hints.expect(r'coverage %d %d %d mapping' % (plain, MIB, 2 * MIB))
    check(not any(line.startswith('disk') and 'striped' in line
                  for line in guest.hints.lines),
          'the disk below the stripes is told of')
    guest.poweroff()


@test()
def silent_and_robust(ctx):
    """Silent until it is asked, after "stop", and after nonsense; starts
    afresh when it is asked who it is."""
    image = partitioned_disk(ctx, 'disk', 64 * MIB)
    guest = FilesGuest(ctx, [(image, 'x')])
    guest.ask('mount /dev/vda1 /mnt')
    hints = guest.hints
    hints.expect(r'hello thinvm-hints 1 .*')
    guest.ask('write /mnt/a 0 1048576')
    check(len(hints.lines) == 1, 'unasked it said %s', hints.lines[1:])
    hints.send('start 1 1 1')
    hints.expect('done 1 failed 0')
    hints.send('x' * 3000)
    hints.send('start 2 200')
    hints.send('start 99999999999999999999 200 100')
    hints.send('trim 3 0 0')
    hints.expect('done 3 failed 0')
    hints.send('start 4 200 1000')
    hints.expect('done 4 ok 0')
    number_of(hints, 'x')
    hints.send('stop 5')
    hints.expect('done 5 ok 0')
    count = len(hints.lines)
    guest.ask('write /mnt/a 0 1048576')
    hints.send('hello thinvm-hints 1')
    hints.expect(r'hello thinvm-hints 1 .*', begin=count)
    check(len(hints.lines) == count + 1, 'after "stop" it said %s',
          hints.lines[count:])
    guest.ask('umount /mnt')
    guest.poweroff()


@test()
def booted(ctx):
    """An agent that was started with --booted says so once, when the host
    has answered its hello, however often it is asked who it is."""
    guest = FilesGuest(ctx, [], booted=True)
    hints = guest.hints
    hints.expect(r'hello thinvm-hints 1 .*')
    guest.ask('sync')
    check('booted' not in hints.lines, 'it did not wait for the host')
    hints.send('version 1')
    hints.expect('booted')
    count = len(hints.lines)
    hints.send('hello thinvm-hints 1')
    hints.expect(r'hello thinvm-hints 1 .*', begin=count)
    hints.send('version 1')
    hints.send('start 1 200 1000')
    hints.expect('done 1 ok 0', begin=count)
    check(hints.lines.count('booted') == 1, 'it said %s', hints.lines)
    guest.poweroff()
