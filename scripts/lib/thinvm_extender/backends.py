# SPDX-License-Identifier: GPL-2.0-or-later
"""What can make a volume larger.

Each backend has extend(path, size): makes the volume at path at least size
bytes long if it can, and returns how long it is now: less than size when
there was not as much, or raises Failure when nothing was possible.  All of
them may be asked for what is there already, so that a request which was
interrupted can be repeated.  refresh(path) makes this host see how long a
volume has become that another host has extended; where refreshes is false
there is nothing to be done for it.

lvm      lvextend; in a shared volume group lvmlockd and sanlock see to it
         that no two hosts change the group at a time.  The LV's own lock is
         not asked for again: whoever writes the image has it, and while
         several hosts have the volume active (a live migration) it is a
         shared one, which lvextend takes with "shupdate" only.
file     nothing: QEMU enlarges the file itself, when thinvm-grow says so.
command  the operator's own, for arrays: {path} and {size} are replaced.
"""

import asyncio
import os
import re
import shlex

LVM_NAME = re.compile(r'^[A-Za-z0-9+_.][A-Za-z0-9+_.-]*$')
TIMEOUT = 300                   # seconds; an array may take its time
SECTOR = 512                    # LVM takes sizes in multiples of it
# What LVM says, and what helps: its messages name the cause only
HINTS = (
    ('lock failed: held by other host',
     'another host is changing the volume group'),
    ('due to failed lock',
     'is lvmlockd running, and the group started (vgchange --lock-start)?'),
    ('lock start in progress', 'the group is being started on this host'),
    ('LV locked by other host',
     'another host has it active exclusively: it has to be active here'),
    ('nsufficient free space', 'add to the volume group (vgextend)'),
    ('nsufficient suitable', 'add to the volume group (vgextend)'),
)


class Failure(Exception):
    """The volume could not be extended; the text is for the operator."""


def message(text):
    """What a program has printed, on one line, with what would help."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # lvmlockd's retries say nothing new
    lines = [line for line in lines if not line.startswith('Retrying')][-3:]
    hints = [hint for cause, hint in HINTS if cause in text]
    return ('; '.join(lines) or 'no message') + \
        ''.join(f' ({hint})' for hint in hints[:1])


async def run(*args):
    """Run a program; returns its output."""
    try:
        process = await asyncio.create_subprocess_exec(
            *args, stdin=asyncio.subprocess.DEVNULL,
            env=dict(os.environ, LC_ALL='C'),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
    except OSError as e:
        raise Failure(f'{args[0]}: {e.strerror}') from None
    try:
        out, err = await asyncio.wait_for(process.communicate(), TIMEOUT)
    except asyncio.TimeoutError:
        process.kill()
        await process.wait()
        raise Failure(f'{args[0]} took more than {TIMEOUT} s') from None
    if process.returncode:
        raise Failure(f'{" ".join(args)}: exit status {process.returncode}: '
                      f'{message(err.decode(errors="replace"))}')
    return out.decode(errors='replace')


def mapped_path(path):
    """/dev/mapper/NAME for any other name of a device of device mapper."""
    device = os.path.basename(os.path.realpath(path))
    try:
        with open(f'/sys/block/{device}/dm/name', encoding='utf-8') as file:
            return '/dev/mapper/' + file.read().strip()
    except OSError:
        return path


def volume_of(path):
    """'group/volume' of a path as LVM gives it, or Failure."""
    if not path.startswith('/dev/mapper/') and path.count('/') != 3:
        path = mapped_path(path)
    parts = path.split('/')
    if path.startswith('/dev/mapper/'):
        # A hyphen in a name is doubled there, a single one parts the names
        names = re.split(r'(?<!-)-(?!-)', parts[-1], maxsplit=1)
        names = [n.replace('--', '-') for n in names]
    else:
        names = parts[2:] if path.startswith('/dev/') else []
    if len(names) != 2 or not all(LVM_NAME.match(n) for n in names):
        raise Failure(f'{path} is not the path of a logical volume: '
                      '/dev/GROUP/VOLUME or /dev/mapper/GROUP-VOLUME')
    return '/'.join(names)


def device_size(path):
    """How long this host sees the device or file at @path."""
    try:
        fd = os.open(path, os.O_RDONLY)
        try:
            return os.lseek(fd, 0, os.SEEK_END)
        finally:
            os.close(fd)
    except OSError as e:
        raise Failure(f'{path}: {e.strerror}') from None


class Backend:
    refreshes = False

    async def refresh(self, path):
        pass


class Lvm(Backend):
    refreshes = True

    @staticmethod
    async def look(name):
        """(size of the volume, what is free in its group), without a lock,
        which somebody may be holding."""
        text = await run('lvs', '--readonly', '--noheadings', '--nosuffix',
                         '--units', 'b', '-o', 'lv_size,vg_free', name)
        size, free = text.split()
        return int(size), int(free)

    @staticmethod
    async def lvextend(name, *size):
        await run('lvextend', '--lockopt', 'shupdate,norefresh', *size, name)

    async def extend(self, path, size):
        name = volume_of(path)
        size = -(-size // SECTOR) * SECTOR
        try:
            await self.lvextend(name, '--size', f'{size}b')
        except Failure:
            # It may have been done before, or there is less than that left
            there, free = await self.look(name)
            if there < size:
                if not free or there + free >= size:
                    raise
                await self.lvextend(name, '--extents', '+100%FREE')
                size, _ = await self.look(name)
        if device_size(path) < size:
            await self.refresh(path)
        return min(size, device_size(path))

    async def refresh(self, path):
        await run('lvchange', '--refresh', volume_of(path))


class File(Backend):
    async def extend(self, path, size):
        if os.path.isfile(path):
            free = os.statvfs(path)
            missing = size - os.stat(path).st_blocks * 512
            if missing > free.f_bavail * free.f_frsize:
                raise Failure(f'the file system of {path} has only '
                              f'{free.f_bavail * free.f_frsize} bytes left')
        return size


def template_of(command, *names):
    """The arguments of an operator's command, which must have the @names."""
    args = shlex.split(command)
    for name in names:
        if not any(f'{{{name}}}' in a for a in args):
            raise Failure(f"the command '{command}' must contain {{{name}}}")
    return args


class Command(Backend):
    def __init__(self, command, refresh_command):
        self._extend = template_of(command, 'path', 'size')
        self._refresh = template_of(refresh_command, 'path') \
            if refresh_command else None
        self.refreshes = bool(refresh_command)

    async def extend(self, path, size):
        if not path:
            raise Failure('the volume has neither a path nor a LUN')
        await run(*[a.replace('{path}', path).replace('{size}', str(size))
                    for a in self._extend])
        return size

    async def refresh(self, path):
        await run(*[a.replace('{path}', path) for a in self._refresh])


def make(name, command=None, refresh_command=None):
    if name == 'lvm':
        return Lvm()
    if name == 'file':
        return File()
    if not command:
        raise Failure("backend 'command' needs --command")
    return Command(command, refresh_command)
