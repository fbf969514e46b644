# SPDX-License-Identifier: GPL-2.0-or-later
"""The test guest: its kernel and initramfs, and the talk with it.

The initramfs holds nothing but ../guest/writer.c and the virtio modules.
It is built once below the build directory, under a lock, because tests run
side by side.  A Guest is the guest as it lives on across migrations: it may
have a port in several QEMU processes, and takes the reports of all of them.
"""

import fcntl
import glob
import gzip
import lzma
import os
import random
import shutil
import socket
import subprocess
import threading
import time

from .context import TOP, Failure, check, wait_for
from .model import BAD, Model

# In the order in which they must be loaded; what a kernel has built in or
# does not know is left out.
MODULES = ('virtio', 'virtio_ring', 'virtio_pci_legacy_dev',
           'virtio_pci_modern_dev', 'virtio_pci', 'virtio_blk',
           'virtio_console')
WRITER = os.path.join(TOP, 'tests', 'functional', 'guest', 'writer.c')
KERNEL_SCRIPT = os.path.join(TOP, 'scripts', 'lib', 'guest-kernel')


def cpio_entry(name, mode, data=b'', rdev=(0, 0)):
    """One member of a "newc" archive."""
    name = name.encode() + b'\0'
    fields = (random.randrange(1, 1 << 31), mode, 0, 0, 1, 0, len(data),
              0, 0, rdev[0], rdev[1], len(name), 0)
    head = b'070701' + b''.join(b'%08X' % field for field in fields) + name
    head += b'\0' * (-len(head) % 4)
    return head + data + b'\0' * (-len(data) % 4)


def find_kernel():
    """(vmlinuz, directory of modules) that scripts/setup has got."""
    done = subprocess.run([KERNEL_SCRIPT], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, check=False)
    lines = done.stdout.decode().splitlines()
    if done.returncode or len(lines) < 2:
        raise Failure('no kernel for the guest: %s; run scripts/setup'
                      % done.stderr.decode().strip())
    return lines[0], lines[1]


def kernel_module(tree, name):
    """The bytes of a module, or None if the kernel has it built in."""
    for path in glob.glob(os.path.join(tree, '**', name + '.ko*'),
                          recursive=True):
        with open(path, 'rb') as file:
            data = file.read()
        if path.endswith('.xz'):
            return lzma.decompress(data)
        if path.endswith('.gz'):
            return gzip.decompress(data)
        if path.endswith('.ko'):
            return data
        raise Failure('cannot unpack the guest kernel module ' + path)
    return None


def _build(vmlinuz, modules, where):
    writer = os.path.join(where, 'writer')
    subprocess.run(['gcc', '-O2', '-Wall', '-static', '-pthread', '-s',
                    '-o', writer, WRITER], check=True)
    with open(writer, 'rb') as file:
        members = [cpio_entry('init', 0o100755, file.read())]
    members += [cpio_entry(name, 0o40755)
                for name in ('dev', 'proc', 'sys', 'modules')]
    members.append(cpio_entry('dev/console', 0o20600, rdev=(5, 1)))
    for number, name in enumerate(MODULES):
        data = kernel_module(modules, name)
        if data:
            members.append(cpio_entry('modules/%02d-%s' % (number, name),
                                       0o100644, data))
    members.append(cpio_entry('TRAILER!!!', 0))
    with open(os.path.join(where, 'initrd'), 'wb') as file:
        file.write(b''.join(members))
    shutil.copyfile(vmlinuz, os.path.join(where, 'vmlinuz'))


def boot_files(ctx):
    """(kernel, initramfs), made again if writer.c or the kernel changed."""
    where = os.path.join(ctx.build, 'functional', 'guest')
    os.makedirs(where, exist_ok=True)
    vmlinuz, modules = find_kernel()
    made_from = '%s %d' % (vmlinuz, os.stat(WRITER).st_mtime_ns)
    stamp = os.path.join(where, 'stamp')
    with open(os.path.join(where, 'lock'), 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists(stamp) or open(stamp).read() != made_from:
            _build(vmlinuz, modules, where)
            with open(stamp, 'w') as file:
                file.write(made_from)
    return os.path.join(where, 'vmlinuz'), os.path.join(where, 'initrd')


def connect_port(path, process):
    """A socket to the host's end of a virtio-serial port of @process."""
    sock = socket.socket(socket.AF_UNIX)

    def connect():
        process.check_alive()
        try:
            sock.connect(path)
            return True
        except (FileNotFoundError, ConnectionRefusedError):
            return False

    wait_for(connect, 60, 'guest port %s of %s' % (path, process.name))
    return sock


class Port:
    """The host's end of the virtio-serial port of one QEMU process."""

    def __init__(self, ctx, path, process, guest):
        self._guest = guest
        self._sock = connect_port(path, process)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        ctx.cleanup(self.close)

    def _read(self):
        buffer = b''
        while True:
            try:
                data = self._sock.recv(65536)
            except OSError:
                data = b''
            if not data:
                return
            *lines, buffer = (buffer + data).split(b'\n')
            for line in lines:
                self._guest.hear(line.decode(errors='replace'))

    def send(self, line):
        self._sock.sendall(line.encode() + b'\n')

    def drain(self):
        """After the end of the process: take in all that it still sent."""
        self._thread.join(30)

    def close(self):
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._sock.close()


class Guest:
    """What the guest did and said, whichever process it runs in."""

    def __init__(self, ctx, lanes=4, blocks=1500, stride=65536 + 4096,
                 base=0, flush=50, zero=0, discard=0, usec=0, seed=None,
                 disks=1):
        self.ctx = ctx
        self.model = Model(seed or random.randrange(1, 1 << 60), lanes,
                           blocks, stride, base, zero, discard)
        self.flush = flush              # a lane flushes after so many writes
        self.usec = usec                # pause between two writes of a lane
        self.disks = disks              # block i is on disk i % disks
        self.vm = None                  # where commands go
        self.errors = []
        self.history = []               # (time, acknowledged per lane)
        self._lines = []
        self._found = {}
        self._news = threading.Condition()
        ctx.log('guest seed %d' % self.model.seed)

    # Called by the readers of the ports.
    def hear(self, line):
        words = line.split()
        with self._news:
            if words[:1] == ['P']:
                acked, flushed = ([int(n) for n in word.split(',')]
                                  for word in words[1:3])
                self.model.progress(acked, flushed)
                self.history.append((time.monotonic(), [
                    lane.acked for lane in self.model.lanes]))
            elif words[:1] == ['V']:
                lane, index, seq, seed = map(int, words[1:5])
                self._found[lane, index] = (
                    seq if seed == self.model.seed else BAD)
            elif words[:1] == ['B']:
                self._found[int(words[1]), int(words[2])] = BAD
            else:
                if words[:1] == ['X']:
                    self.errors.append(line[2:])
                self.ctx.log('guest: ' + line)
                self._lines.append(line)
            self._news.notify_all()

    def attach(self, vm):
        """From now on @vm is where the guest runs."""
        self.vm = vm

    def expect(self, word, seconds=120):
        """Wait for a line that begins with @word; the line."""
        end = time.monotonic() + seconds
        with self._news:
            while True:
                for line in self._lines:
                    if line.split()[:1] == [word]:
                        self._lines.remove(line)
                        return line
                left = end - time.monotonic()
                if left <= 0:
                    raise Failure('the guest did not say "%s" in %d s%s' % (
                        word, seconds, ''.join(
                            '; it said: ' + text
                            for text in self.errors[-1:])))
                self.vm.process.check_alive()
                self._news.wait(min(left, 1))

    def ask(self, command, answer, seconds=120):
        self.vm.port.send(command)
        return self.expect(answer, seconds)

    def wait_ready(self, seconds=60, tries=3):
        """Wait until the guest has booted.

        An emulated processor now and then loses its way in the kernel's
        boot; that says nothing about the disk, so it is reset and tried
        again.
        """
        for last in range(tries - 1, -1, -1):
            try:
                self.expect('ready', seconds)
                return
            except Failure:
                if not last or not self.vm.process.alive():
                    raise
                self.ctx.log('the guest does not boot; reset')
                self.vm.qmp.cmd('system_reset')

    def start_writing(self, flush=None):
        model = self.model
        first = model.next_first() if model.lanes[0].acked else 1
        with self._news:
            model.start(first)
        self.ask('write seed=%d lanes=%d blocks=%d stride=%d base=%d '
                 'first=%d flush=%d zero=%d discard=%d usec=%d disks=%d' % (
                     model.seed, len(model.lanes), model.blocks,
                     model.stride, model.base, first,
                     self.flush if flush is None else flush,
                     model.zero, model.discard, self.usec, self.disks),
                 'writing')

    def stop_writing(self):
        """All lanes at rest; the acknowledged numbers are then exact."""
        self.ask('stop', 'stopped')
        self.model.stopped()
        self.no_errors()

    def acked_count(self):
        """Operations acknowledged in the present run."""
        with self._news:
            return sum(lane.acked - lane.first + 1
                       for lane in self.model.lanes)

    def wait_writes(self, count, seconds=120):
        """Wait until @count more operations are acknowledged."""
        goal = self.acked_count() + count
        end = time.monotonic() + seconds
        while self.acked_count() < goal:
            self.vm.process.check_alive()
            self.no_errors()
            check(time.monotonic() < end,
                  'the guest did not make %d writes in %d s', count, seconds)
            time.sleep(0.02)

    def no_errors(self):
        check(not self.errors, 'the guest reports: %s',
              '; '.join(self.errors[:3]))

    def read_back(self, seconds=300):
        """What the guest finds on its disk: see Model.judge()."""
        with self._news:
            self._found = {}
        model = self.model
        self.ask('verify lanes=%d blocks=%d stride=%d base=%d disks=%d' % (
            len(model.lanes), model.blocks, model.stride, model.base,
            self.disks), 'verified', seconds)
        self.no_errors()
        with self._news:
            return dict(self._found)

    def verify(self, what, seconds=300):
        """The guest reads its disk; every acknowledged write must be there."""
        found = self.read_back(seconds)
        self.model.require(found, 'acked', what)
        return found

    def longest_gap(self, begin, end):
        """Longest time, in seconds, in which no write was acknowledged."""
        with self._news:
            times = [t for t, _ in self.history if begin <= t <= end]
        points = [begin] + times + [end]
        return max(b - a for a, b in zip(points, points[1:]))

    def acked_before(self, moment):
        """Acknowledged numbers per lane as reported before @moment."""
        with self._news:
            past = [acked for t, acked in self.history if t <= moment]
        return past[-1] if past else [lane.first - 1
                                      for lane in self.model.lanes]
