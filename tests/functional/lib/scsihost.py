# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that stands for a host with SCSI devices of its own.

What the machine under the tests lacks: block devices with persistent
reservations, device mapper.  A QEMU with Debian's cloud kernel has an initramfs
with busybox, our programs and the libraries that they need; its init is
../guest/scsihost.sh.  What it sees as /dev/sda and /dev/sdb is one logical unit
and two initiators: a LUN of the test's target, or a disk that the guest's own
target (LIO) offers, which can store reservations over a power cut.  The test sends shell commands through one virtio port, and speaks QMP
with the storage daemons in the guest through others.
"""

import json
import os
import socket
import subprocess

from .context import TOP, Failure, Process, check, wait_for
from .guest import cpio_entry, find_kernel, kernel_module
from .qmp import QMP

MODULES = ('virtio_pci', 'virtio_blk', 'virtio_console', 'virtio_scsi',
           'sd_mod', 'sg', 'target_core_mod', 'target_core_file', 'tcm_loop', 'dm-mod')
INIT = os.path.join(TOP, 'tests', 'functional', 'guest', 'scsihost.sh')


def modules_in_order(tree, wanted):
    """The modules and what they need, each behind what it needs."""
    needs = {}
    with open(os.path.join(tree, 'modules.dep')) as file:
        for line in file:
            path, _, rest = line.partition(':')
            name = os.path.basename(path).split('.')[0]
            needs[name] = [os.path.basename(other).split('.')[0]
                           for other in rest.split()]
    order = []

    def add(name):
        for other in needs.get(name, ()):
            add(other)
        if name not in order:
            order.append(name)
    for name in wanted:
        add(name)
    return order


def _libraries(programs):
    """The shared libraries of @programs, and the loader."""
    found = set()
    for program in programs:
        # Of a static program ldd only complains.
        text = subprocess.run(['ldd', program], stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL,
                              check=False).stdout.decode()
        for line in text.splitlines():
            found.update(word for word in line.split() if word[0] == '/')
    return sorted(found)


def _archive(path, programs):
    _, tree = find_kernel()
    members = {'init': (0o100755, open(INIT, 'rb').read())}
    dirs = {'bin', 'dev', 'proc', 'sys', 'tmp', 'etc', 'run', 'modules',
            'var', 'lib', 'lib64', 'usr'}

    def add(source, where):
        where = where.lstrip('/')
        for n in range(1, where.count('/') + 1):
            dirs.add('/'.join(where.split('/')[:n]))
        with open(source, 'rb') as file:
            members[where] = (0o100755, file.read())
    for name, source in programs.items():
        add(source, 'bin/' + name)
    for library in _libraries(programs.values()):
        add(os.path.realpath(library), library)
    for number, name in enumerate(modules_in_order(tree, MODULES)):
        data = kernel_module(tree, name)
        if data:
            members['modules/%02d-%s' % (number, name)] = (0o100644, data)
    members['etc/passwd'] = (0o100644, b'root:x:0:0::/:/bin/sh\n'
                             b'qemu:x:1000:1000::/:/bin/sh\n')
    members['etc/group'] = (0o100644, b'root:x:0:\nqemu:x:1000:\n')
    members['etc/machine-id'] = (0o100644, b'0123456789abcdef' * 2 + b'\n')
    with open(path, 'wb') as file:
        for name in sorted(dirs):
            file.write(cpio_entry(name, 0o41777 if name == 'tmp'
                                   else 0o40755))
        file.write(cpio_entry('dev/console', 0o20600, rdev=(5, 1)))
        for name, (mode, data) in members.items():
            file.write(cpio_entry(name, mode, data))
        file.write(cpio_entry('TRAILER!!!', 0))


class ScsiHost:
    PORTS = ('shell', 'a', 'b')

    def __init__(self, ctx, lun=None, size=None, memory=512):
        """With the @lun of a target; or with a disk of @size bytes."""
        self.ctx = ctx
        vmlinuz, _ = find_kernel()
        programs = {name: ctx.bin(name) for name in (
            'qemu-storage-daemon', 'qemu-img', 'qemu-io', 'qemu-pr-helper')}
        programs['busybox'] = ctx.need('busybox', 'busybox-static')
        programs['dmsetup'] = ctx.need('dmsetup', 'dmsetup')
        initrd = ctx.path('scsihost.initrd')
        _archive(initrd, programs)
        argv = [
            ctx.bin('qemu-system-x86_64'), '-name', 'scsihost',
            '-no-user-config', '-nodefaults', '-display', 'none',
            '-machine', 'pc,accel=tcg', '-cpu', 'max', '-m', str(memory),
            '-kernel', vmlinuz, '-initrd', initrd,
            '-append', 'console=ttyS0 quiet nowatchdog mitigations=off '
                       'panic=-1 rdinit=/init' + ('' if lun else ' lio'),
            '-serial', 'file:' + ctx.log_file('scsihost-console'),
            '-device', 'virtio-serial-pci']
        argv += self._lun(lun) if lun else self._disk(size)
        for name in self.PORTS:
            argv += ['-chardev', 'socket,id=%s,server=on,wait=off,path=%s' % (
                name, self._path(name)), '-device',
                'virtserialport,chardev=%s,name=%s' % (name, name)]
        self.process = Process(ctx, 'scsihost', argv)
        self._buffer = b''
        self._sock = socket.socket(socket.AF_UNIX)
        wait_for(self._connect, 60, 'the port of the SCSI host')
        ctx.cleanup(self._sock.close)
        self._expect('ready', 180)

    @staticmethod
    def _lun(lun):
        argv = ['-device', 'virtio-scsi-pci']
        for name in 'ab':
            argv += ['-blockdev', json.dumps(lun.blockdev(name, name)),
                     '-device', 'scsi-block,share-rw=on,drive=' + name]
        return argv

    def _disk(self, size):
        path = self.ctx.path('scsihost.disk')
        with open(path, 'wb') as file:
            file.truncate(size)
        return ['-drive', 'if=virtio,format=raw,file=' + path]

    def _path(self, name):
        return self.ctx.path('scsihost-' + name)

    def _connect(self):
        self.process.check_alive()
        try:
            self._sock.connect(self._path('shell'))
            return True
        except (FileNotFoundError, ConnectionRefusedError):
            return False

    def _line(self, seconds):
        self._sock.settimeout(seconds)
        while b'\n' not in self._buffer:
            try:
                data = self._sock.recv(65536)
            except socket.timeout:
                data = b''
            if not data:
                raise Failure('the SCSI host says nothing for %d s (%s)'
                              % (seconds, self._buffer.decode()))
            self._buffer += data
        line, self._buffer = self._buffer.split(b'\n', 1)
        return line.decode(errors='replace').rstrip('\r')

    def _expect(self, word, seconds):
        lines = []
        while True:
            line = self._line(seconds)
            if line.split()[:1] == [word]:
                return lines, line
            lines.append(line)

    def sh(self, command, ok=True, seconds=120):
        """Run a shell command there; (exit status, what it printed)."""
        self.ctx.log('scsihost # ' + command)
        self._sock.sendall(command.encode() + b'\n')
        lines, end = self._expect('END', seconds)
        text, status = '\n'.join(lines).strip(), int(end.split()[1])
        self.ctx.log('= %d\n%s' % (status, text))
        check(not ok or status == 0, '%s ended with %d: %s', command, status,
              text)
        return status, text

    def daemon(self, port, *extra, user=None):
        """Start a storage daemon there that speaks QMP on @port."""
        return GuestDaemon(self, port, extra, user)


class GuestDaemon:
    def __init__(self, host, port, extra, user):
        self.host = host
        command = ' '.join((
            'qemu-storage-daemon --chardev pipe,id=qmp,path=/dev/port-%s '
            '--monitor chardev=qmp' % port,) + extra)
        if user:
            command = "su -s /bin/sh %s -c 'exec %s'" % (user, command)
        _, text = host.sh('%s > /tmp/%s.log 2>&1 < /dev/null & echo $!'
                          % (command, port))
        self.pid = int(text.split()[-1])
        self.exported = False
        self.qmp = QMP(host.ctx, host._path(port), host.process)

    def add_disk(self, path, node='disk', **more):
        self.qmp.cmd_raw('blockdev-add', {
            'driver': 'host_device', 'node-name': node + '-file',
            'filename': path, 'cache': {'direct': True},
            **more.pop('file', {})})
        self.qmp.cmd_raw('blockdev-add', {
            'driver': 'thinvm', 'node-name': node, 'file': node + '-file',
            'cache': {'direct': True}, **more})

    def signal(self, name):
        self.host.sh('kill -%s %d' % (name, self.pid))

    def end(self, name='KILL'):
        self.signal(name)
        self.host.sh('wait %d' % self.pid, ok=False)
        self.qmp.close()
