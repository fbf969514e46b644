# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that stands for a host: busybox, our programs, and a shell.

What the machine under the tests lacks its kernel has: SCSI, device mapper.  A
QEMU with Debian's cloud kernel gets an initramfs that Archive packs: programs
and the libraries that they need, kernel modules, files.  Its init opens a
virtio port named "shell", through which the test sends commands, and links
the others to /dev/port-NAME, through which it speaks QMP with storage daemons
there.
"""

import os
import socket
import subprocess

from .context import Failure, Process, check, wait_for
from .guest import cpio_entry, find_kernel, kernel_module
from .qmp import QMP


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


class Archive:
    """What the initramfs is to hold; names are paths without the first /."""

    def __init__(self):
        self.dirs = {'bin', 'dev', 'proc', 'sys', 'tmp', 'etc', 'run',
                     'modules', 'var', 'lib', 'lib64', 'usr'}
        self.members = {}

    def add(self, name, data, mode=0o100755):
        name = name.lstrip('/')
        for n in range(1, name.count('/') + 1):
            self.dirs.add('/'.join(name.split('/')[:n]))
        self.members[name] = (mode, data)

    def add_text(self, name, text):
        self.add(name, text.encode(), 0o100644)

    def add_file(self, name, source):
        with open(source, 'rb') as file:
            self.add(name, file.read())

    def add_link(self, name, target):
        self.add(name, target.encode(), 0o120777)

    def add_libraries(self, programs, path=''):
        """The shared libraries of @programs, and the loader; they are looked
        for in @path first, and put where the guest's loader finds them."""
        env = dict(os.environ, LD_LIBRARY_PATH=path)
        for program in programs:
            # Of a static program ldd only complains.
            text = subprocess.run(['ldd', program], stdout=subprocess.PIPE,
                                  stderr=subprocess.DEVNULL, env=env,
                                  check=False).stdout.decode()
            for line in text.splitlines():
                for word in line.split():
                    own = any(word.startswith(directory + '/')
                              for directory in path.split(':') if directory)
                    if word[0] == '/':
                        name = '/lib/' + os.path.basename(word) if own \
                            else word
                        self.add_file(name, os.path.realpath(word))

    def add_modules(self, names):
        _, tree = find_kernel()
        for number, name in enumerate(modules_in_order(tree, names)):
            data = kernel_module(tree, name)
            if data:
                self.add('modules/%02d-%s' % (number, name), data, 0o100644)

    def write(self, path):
        with open(path, 'wb') as file:
            for name in sorted(self.dirs):
                file.write(cpio_entry(name, 0o41777 if name == 'tmp'
                                      else 0o40755))
            file.write(cpio_entry('dev/console', 0o20600, rdev=(5, 1)))
            for name, (mode, data) in self.members.items():
                file.write(cpio_entry(name, mode, data))
            file.write(cpio_entry('TRAILER!!!', 0))


class ShellGuest:
    PORTS = ('shell', 'a', 'b')

    def __init__(self, ctx, name, initrd, devices, memory, append='',
                 cpu='max'):
        """Boot it, with @devices among QEMU's arguments."""
        self.ctx = ctx
        self.name = name
        vmlinuz, _ = find_kernel()
        argv = [
            ctx.bin('qemu-system-x86_64'), '-name', name,
            '-no-user-config', '-nodefaults', '-display', 'none',
            '-machine', 'pc,accel=tcg', '-cpu', cpu, '-m', str(memory),
            '-kernel', vmlinuz, '-initrd', initrd,
            '-append', 'console=ttyS0 quiet nowatchdog no_timer_check '
                       'mitigations=off panic=-1 rdinit=/init ' + append,
            '-serial', 'file:' + ctx.log_file(name + '-console'),
            '-device', 'virtio-serial-pci', *devices]
        for port in self.PORTS:
            argv += ['-chardev', 'socket,id=%s,server=on,wait=off,path=%s' % (
                port, self.port_path(port)), '-device',
                'virtserialport,chardev=%s,name=%s' % (port, port)]
        self.process = Process(ctx, name, argv)
        self._buffer = b''
        self._sock = socket.socket(socket.AF_UNIX)
        wait_for(self._connect, 60, 'the port of ' + name)
        ctx.cleanup(self._sock.close)

    def wait_ready(self, seconds=600):
        self._expect('ready', seconds)

    def port_path(self, port):
        return self.ctx.path('%s-%s' % (self.name, port))

    def _connect(self):
        self.process.check_alive()
        try:
            self._sock.connect(self.port_path('shell'))
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
                raise Failure('%s says nothing for %d s (%s)' % (
                    self.name, seconds, self._buffer.decode()))
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

    def sh(self, command, ok=True, seconds=300):
        """Run a shell command there; (exit status, what it printed)."""
        self.ctx.log('%s # %s' % (self.name, command))
        self._sock.sendall(command.encode() + b'\n')
        lines, end = self._expect('END', seconds)
        text, status = '\n'.join(lines).strip(), int(end.split()[1])
        self.ctx.log('%s = %d\n%s' % (self.name, status, text))
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
        self.qmp = QMP(host.ctx, host.port_path(port), host.process)

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
