# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest with file systems (../guest/files.c) and the agent of contrib/.

The host's side of the hints protocol (docs/interop/thinvm-hints.rst) is played
by the test itself, through a Line, or by QEMU's object.
"""

import json
import os
import re
import socket
import stat
import struct
import subprocess
import threading
import time

from .context import TOP, Failure, Process, check
from .guest import (MODULES, connect_port, cpio_entry, find_kernel,
                    kernel_module)
from .qmp import QMP
from .shellguest import modules_in_order

GUEST = os.path.join(TOP, 'tests', 'functional', 'guest')
INIT = [os.path.join(GUEST, name) for name in ('files.c', 'load.c')]
AGENT = os.path.join(TOP, 'contrib', 'thinvm-agent')
MIB = 1 << 20
START = MIB                 # of the first partition


def _run(argv, **more):
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True,
                          stderr=subprocess.STDOUT, check=False, **more)
    check(done.returncode == 0, '%s: %s', ' '.join(argv), done.stdout)
    return done.stdout


def initramfs(ctx, with_agent=True, modules_too=()):
    """(kernel, initramfs) with this guest's /init and the agent."""
    init, agent = ctx.path('files-init'), ctx.path('agent')
    _run(['gcc', '-O2', '-Wall', '-static', '-pthread', '-s', '-o', init] +
         INIT)
    sources = [os.path.join(AGENT, name) for name in sorted(os.listdir(AGENT))
               if name.endswith('.c')]
    _run(['gcc', '-std=gnu11', '-O2', '-Wall', '-Wextra', '-Wno-sign-compare',
          '-static', '-s', '-o', agent] + sources)
    vmlinuz, modules = find_kernel()
    members = [cpio_entry(name, stat.S_IFDIR | 0o755)
               for name in ('dev', 'proc', 'sys', 'modules', 'mnt')]
    members.append(cpio_entry('dev/console', stat.S_IFCHR | 0o600,
                               rdev=(5, 1)))
    programs = [('init', init)] + [('agent', agent)] * with_agent
    for name, path in programs:
        with open(path, 'rb') as file:
            members.append(cpio_entry(name, stat.S_IFREG | 0o755,
                                       file.read()))
    for number, name in enumerate(modules_in_order(
            modules, MODULES + ('dm-mod', 'virtio_scsi', 'sd_mod') +
            tuple(modules_too))):
        data = kernel_module(modules, name)
        if data:
            members.append(cpio_entry('modules/%02d-%s' % (number, name),
                                       stat.S_IFREG | 0o644, data))
    members.append(cpio_entry('TRAILER!!!', 0))
    path = ctx.path(ctx.unique('files-initrd'))
    with open(path, 'wb') as file:
        file.write(b''.join(members))
    return vmlinuz, path


def partitioned_disk(ctx, name, size):
    """A raw disk with one DOS partition, from START on, with ext4."""
    path = ctx.path(name)
    entry = struct.pack('<B3sB3sII', 0, b'\0\2\0', 0x83, b'\0\2\0',
                        START // 512, (size - START) // 512)
    with open(path, 'wb') as file:
        file.truncate(size)
        file.seek(446)
        file.write(entry)
        file.seek(510)
        file.write(b'\x55\xaa')
    _run(['mkfs.ext4', '-q', '-F', '-b', '4096', '-E', 'offset=%d' % START, path,
          '%dk' % ((size - START) // 1024)],
         env=dict(os.environ, PATH=os.environ['PATH'] + ':/usr/sbin:/sbin'))
    return path


def blocks_of(path, offset, file):
    """Where the blocks of a file of an ext4 lie in the image, in order."""
    text = _run(['debugfs', '-R', 'blocks ' + file, '%s?offset=%d' % (
        path, offset)],
        env=dict(os.environ, PATH=os.environ['PATH'] + ':/usr/sbin:/sbin'))
    size = re.search(r'Block size:\s+(\d+)', _run(
        ['dumpe2fs', '-h', '%s?offset=%d' % (path, offset)],
        env=dict(os.environ, PATH=os.environ['PATH'] + ':/usr/sbin:/sbin')))
    numbers = [int(word) for line in text.splitlines()
               if not line.startswith('debugfs') for word in line.split()]
    return [offset + number * int(size.group(1)) for number in numbers]


class Line:
    """A virtio-serial port, line by line; what came is in .lines."""

    def __init__(self, ctx, path, process):
        self.lines = []
        self._ctx, self._name = ctx, os.path.basename(path)
        self._news = threading.Condition()
        self._process = process
        self._sock = connect_port(path, process)
        threading.Thread(target=self._read, daemon=True).start()
        ctx.cleanup(self.close)

    def _read(self):
        rest = b''
        while True:
            try:
                data = self._sock.recv(65536)
            except OSError:
                data = b''
            if not data:
                return
            *lines, rest = (rest + data).split(b'\n')
            with self._news:
                self.lines += [line.decode(errors='replace')
                               for line in lines]
                self._news.notify_all()

    def send(self, line):
        self._sock.sendall(line.encode() + b'\n')

    def expect(self, pattern, seconds=120, begin=0):
        """Wait for a line that matches, from number @begin on; its match."""
        end = time.monotonic() + seconds
        with self._news:
            while True:
                for number in range(begin, len(self.lines)):
                    match = re.fullmatch(pattern, self.lines[number])
                    if match:
                        return match
                left = end - time.monotonic()
                if left <= 0:
                    raise Failure('no line "%s" in %d s; the last ones: %s' % (
                        pattern, seconds, self.lines[-3:]))
                self._process.check_alive()
                self._news.wait(min(left, 1))

    def close(self):
        for line in self.lines:
            self._ctx.log('%s: %s' % (self._name, line[:300]))
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._sock.close()


class FilesGuest:
    """The machine; .hints is the host's end of the agent's port, unless
    that belongs to an object thinvm-hints of the machine."""

    def __init__(self, ctx, disks, extra=(), hints_object=None, memory=256,
                 boot=None, env=None, booted=False):
        """@disks: (raw image, serial number)...; @hints_object: its id;
        @boot: what initramfs() has made; @booted: the agent tells so"""
        kernel, initrd = boot or initramfs(ctx)
        name = ctx.unique('qemu-files')
        paths = {p: ctx.path('%s.%s' % (name, p))
                 for p in ('qmp', 'test', 'hints')}
        argv = [ctx.bin('qemu-system-x86_64'), '-name', name,
                '-no-user-config', '-nodefaults', '-display', 'none',
                '-machine', 'pc,accel=tcg', '-cpu', 'qemu64',
                '-m', str(memory),
                '-kernel', kernel, '-initrd', initrd,
                '-append', 'console=ttyS0 quiet nowatchdog mitigations=off '
                'cryptomgr.notests oops=panic panic=-1 rdinit=/init' +
                (' -- --booted' if booted else ''),
                '-serial', 'file:' + ctx.log_file(name + '-console'),
                '-chardev', 'socket,id=qmp,server=on,wait=off,path=' +
                paths['qmp'], '-mon', 'chardev=qmp,mode=control',
                '-device', 'virtio-serial-pci']
        for port, full in (('test', 'org.thinvm.test'),
                           ('hints', 'org.thinvm.hints.0')):
            argv += ['-chardev', 'socket,id=%s,server=on,wait=off,path=%s' % (
                port, paths[port]),
                '-device', 'virtserialport,chardev=%s,name=%s' % (port, full)]
        for number, (path, serial) in enumerate(disks):
            argv += ['-blockdev', json.dumps({
                'driver': 'raw', 'node-name': 'disk%d' % number,
                'discard': 'unmap', 'file': {
                    'driver': 'file', 'filename': path, 'discard': 'unmap'}}),
                '-device', json.dumps({
                    'driver': 'virtio-blk-pci', 'drive': 'disk%d' % number,
                    'serial': serial})]
        if hints_object:
            argv += ['-chardev', 'socket,id=agent,path=' + paths['hints'],
                     '-object', 'thinvm-hints,id=%s,chardev=agent' %
                     hints_object]
        self.process = Process(ctx, name, argv + list(extra), env=env)
        self.qmp = QMP(ctx, paths['qmp'], self.process)
        self.hints = None if hints_object else Line(ctx, paths['hints'],
                                                    self.process)
        self.port = Line(ctx, paths['test'], self.process)
        self.port.expect('ready', 120)

    def ask(self, command):
        """Have it done; what is said beside "ok"."""
        begin = len(self.port.lines)
        self.port.send(command)
        answer = self.port.expect('(ok|X).*', 120, begin).group(0)
        check(answer.startswith('ok'), 'the guest: %s', answer)
        return answer[3:]

    def poweroff(self):
        self.port.send('poweroff')
        check(self.process.wait(60) == 0, 'QEMU ended: %s',
              self.process.log_tail())


class Told:
    """What the agent's lines say at last of one disk: sets of ranges."""

    UNIT = 512

    def __init__(self, lines, disk):
        self.dirty, self.free = set(), set()
        kinds = {'dirty': (self.dirty.update, 3),
                 'clean': (self.dirty.difference_update, 2),
                 'free': (self.free.update, 2),
                 'used': (self.free.difference_update, 2)}
        for line in lines:
            words = line.split()
            if words[0] in kinds and int(words[1]) == disk:
                change, first = kinds[words[0]]
                numbers = [int(w) for w in words[first:]]
                for at, length in zip(numbers[::2], numbers[1::2]):
                    check(at % 512 == 0 and length % 512 == 0 and length,
                          'not a range: %s', line)
                    change(range(at // 4096, (at + length) // 4096))
