# SPDX-License-Identifier: GPL-2.0-or-later
"""What can make a volume larger.

Each backend has extend(path, size): makes the volume at path at least size
bytes long, or raises Failure.  All of them may be asked for what is there
already, so that a request which was interrupted can be repeated.

lvm      lvextend; in a shared volume group lvmlockd and sanlock see to it
         that no two hosts change the group at a time.
file     nothing: QEMU enlarges the file itself, when thinvm-grow says so.
command  the operator's own, for arrays: {path} and {size} are replaced.
"""

import asyncio
import os
import re
import shlex

LVM_NAME = re.compile(r'^[A-Za-z0-9+_.][A-Za-z0-9+_.-]*$')
TIMEOUT = 300                   # seconds; an array may take its time


class Failure(Exception):
    """The volume could not be extended; the text is for the operator."""


async def run(*args):
    """Run a program; returns its output."""
    try:
        process = await asyncio.create_subprocess_exec(
            *args, stdin=asyncio.subprocess.DEVNULL,
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
        lines = err.decode(errors='replace').strip().splitlines()
        raise Failure(f'{" ".join(args)}: exit status {process.returncode}: '
                      f'{lines[-1] if lines else "no message"}')
    return out.decode(errors='replace')


def volume_of(path):
    """'group/volume' of a path as LVM gives it, or Failure."""
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


class Lvm:
    async def size(self, name):
        text = await run('lvs', '--noheadings', '--nosuffix', '--units', 'b',
                         '-o', 'lv_size', name)
        return int(text.strip())

    async def extend(self, path, size):
        name = volume_of(path)
        if await self.size(name) < size:
            await run('lvextend', '--size', f'{size}b', name)


class File:
    async def extend(self, path, size):
        if os.path.isfile(path):
            free = os.statvfs(path)
            missing = size - os.stat(path).st_blocks * 512
            if missing > free.f_bavail * free.f_frsize:
                raise Failure(f'the file system of {path} has only '
                              f'{free.f_bavail * free.f_frsize} bytes left')


class Command:
    def __init__(self, template):
        self._args = shlex.split(template)
        if not any('{path}' in a for a in self._args) or \
                not any('{size}' in a for a in self._args):
            raise Failure(f"the command '{template}' must contain {{path}} "
                          "and {size}")

    async def extend(self, path, size):
        await run(*[a.replace('{path}', path).replace('{size}', str(size))
                    for a in self._args])


def make(name, command):
    if name == 'lvm':
        return Lvm()
    if name == 'file':
        return File()
    if not command:
        raise Failure("backend 'command' needs --command")
    return Command(command)
