# SPDX-License-Identifier: GPL-2.0-or-later
#
# The engine of tests/thinvm-races-threads: what thinvm_stress.py does over
# NBD, here as a guest would, on several virtqueues that each have an iothread
# of their own, and with block jobs that move the disk about meanwhile.  Runs
# alone too:
#
#   thinvm_virtio.py --build DIR [--seed N] [--rounds N] [--requests N]
#
# No guest runs: this program is the driver of the virtio-blk device.  The
# guest's memory is a file that both map, so only registers go through
# qtest; requests are gathered and all queues then notified at once, so that
# the threads meet.

import argparse
import ctypes
import itertools
import json
import mmap
import os
import select
import shutil
import struct
import sys
import tempfile
import time

import thinvm_stress
from thinvm_stress import (FLUSH, NO_HOLE, READ, SECTOR, TRIM, WRITE, ZEROES,
                           Failure)

QUEUES = 4
QUEUE_SIZE = 128
RINGS, RING_ROOM = 2 << 20, 64 << 10        # guest addresses
AVAIL, USED = 0x2000, 0x4000                # behind the descriptors
SLOTS, SLOT_ROOM = 4 << 20, 512 << 10
HEADER, STATUS, DATA = 0, 16, 4096          # in a slot
BAR = 0xfe000000
NEXT, DEVICE_WRITES = 1, 2                  # flags of descriptors
TYPES = {READ: 0, WRITE: 1, FLUSH: 4, TRIM: 11, ZEROES: 13}
FEATURES = 1 << 9 | 1 << 12 | 1 << 13 | 1 << 14 | 1 << 32
TIMEOUT = 120


class Machine:
    """QEMU without a guest; its memory, its registers, its monitor."""

    def __init__(self, tools, directory, sockets, node, slots):
        self.dir, self.sockets = directory, sockets
        self.memory_size = SLOTS + slots * SLOT_ROOM
        self.memory_size = -(-self.memory_size >> 20) << 20
        memory = os.path.join(directory, 'memory')
        with open(memory, 'w+b') as f:
            f.truncate(self.memory_size)
            self.memory = mmap.mmap(f.fileno(), self.memory_size)
        device = {'driver': 'virtio-blk-pci', 'drive': 'disk0', 'id': 'v',
                  'addr': '4.0', 'disable-legacy': 'on',
                  'num-queues': QUEUES, 'queue-size': QUEUE_SIZE,
                  'iothread-vq-mapping': [{'iothread': f't{i}'}
                                          for i in range(QUEUES)]}
        args = [tools['qemu-system-x86_64'], '-nodefaults', '-display', 'none',
                '-accel', 'qtest', '-M', 'pc,memory-backend=ram',
                '-m', f'{self.memory_size >> 20}M', '-object',
                f'memory-backend-file,id=ram,size={self.memory_size},'
                f'mem-path={memory},share=on',
                '-qtest', f'unix:{self.socket("qtest")},server=on,wait=off',
                '-qtest-log', 'none',
                '-qmp', f'unix:{self.socket("qmp")},server=on,wait=off',
                '-blockdev', json.dumps(node)]
        for i in range(QUEUES):
            args += ['-object', f'iothread,id=t{i}']
        args += ['-device', json.dumps(device)]
        for name in ('qtest', 'qmp'):
            if os.path.exists(self.socket(name)):
                os.unlink(self.socket(name))
        self.log = open(self.path('log'), 'w+b')
        self.process = thinvm_stress.subprocess.Popen(
            args, stdout=self.log, stderr=self.log)
        try:
            self.orders = self.connect('qtest')
            self.qtest = self.orders.makefile('rwb')
            self.unanswered = 0
            self.monitor = self.connect('qmp')
            self.inbox = b''
            self.line()
            self.command('qmp_capabilities')
        except (Failure, OSError):
            self.kill()
            raise

    def path(self, name):
        return os.path.join(self.dir, name)

    def socket(self, name):
        return os.path.join(self.sockets, name)

    connect_to = thinvm_stress.Daemon.connect
    output = thinvm_stress.Daemon.output

    def connect(self, name):
        return self.connect_to(self.socket(name))

    # -- registers --

    def order(self, text):
        """Without waiting for the answer."""
        self.qtest.write(text.encode() + b'\n')
        self.unanswered += 1

    def answers(self):
        """To all orders; returns the last one's value."""
        self.qtest.flush()
        words = [b'OK']
        while self.unanswered:
            line = self.qtest.readline()
            if not line:
                raise Failure(f'QEMU died: {self.output()}')
            words = line.split()
            if words[0] != b'IRQ':
                self.unanswered -= 1
                if words[0] != b'OK':
                    raise Failure(f'qtest: {line}')
        return int(words[1], 16) if len(words) > 1 else None

    def ask(self, text):
        self.order(text)
        return self.answers()

    # -- monitor --

    def line(self):
        while b'\n' not in self.inbox:
            more = self.monitor.recv(1 << 16)
            if not more:
                raise Failure(f'QEMU died: {self.output()}')
            self.inbox += more
        line, self.inbox = self.inbox.split(b'\n', 1)
        return json.loads(line)

    def send_command(self, command, arguments):
        self.monitor.sendall(json.dumps(
            {'execute': command, 'arguments': arguments}).encode() + b'\n')

    def answer(self, wait=True):
        """To the last command; None: there is none yet."""
        while True:
            if not wait and b'\n' not in self.inbox and \
               not select.select([self.monitor], [], [], 0)[0]:
                return None
            reply = self.line()
            if 'error' in reply:
                raise Failure(f'QMP: {reply["error"]["desc"]}')
            if 'return' in reply:
                return reply

    def command(self, command, **arguments):
        self.send_command(command, arguments)
        return self.answer()['return']

    # -- end --

    def quit(self):
        self.command('quit')
        status = self.process.wait(TIMEOUT)
        text = self.output()
        self.kill()
        if status:
            raise Failure(f'QEMU ended with {status}: {text}')

    def kill(self):
        self.process.kill()
        self.process.wait()
        for name in ('qtest', 'orders', 'monitor', 'log'):
            if hasattr(self, name):
                getattr(self, name).close()


class Queue:
    """One virtqueue.  Each request takes three descriptors and a slot."""

    def __init__(self, machine, number):
        self.memory = machine.memory
        self.base = RINGS + number * RING_ROOM
        self.notify = None              # address of its register
        self.memory[self.base:self.base + RING_ROOM] = bytes(RING_ROOM)
        struct.pack_into('<H', self.memory, self.base + AVAIL, 1)
        # Stored and loaded whole: the device looks at them meanwhile
        self.avail = ctypes.c_uint16.from_buffer(self.memory,
                                                 self.base + AVAIL + 2)
        self.used = ctypes.c_uint16.from_buffer(self.memory,
                                                self.base + USED + 2)
        self.added = self.seen = 0
        self.free = list(range(QUEUE_SIZE // 3))
        self.on_way = {}                # by first descriptor: (request, slot)

    def descriptor(self, n, address, length, flags):
        struct.pack_into('<QIHH', self.memory, self.base + 16 * n, address,
                         length, flags, n + 1 if flags & NEXT else 0)

    def add(self, request, slot, length):
        head = 3 * self.free.pop()
        at, last = SLOTS + slot * SLOT_ROOM, head + 1
        self.descriptor(head, at + HEADER, 16, NEXT)
        if length:
            flags = DEVICE_WRITES if request.kind == READ else 0
            self.descriptor(last, at + DATA, length, flags | NEXT)
            last += 1
        self.descriptor(last, at + STATUS, 1, DEVICE_WRITES)
        struct.pack_into('<H', self.memory, self.base + AVAIL + 4 +
                         2 * (self.added % QUEUE_SIZE), head)
        if length == 0:
            struct.pack_into('<H', self.memory, self.base + 16 * head + 14,
                             last)
        self.on_way[head] = request, slot
        self.added = (self.added + 1) % (1 << 16)
        self.avail.value = self.added

    def take(self):
        """(request, slot) of one that ended, or None."""
        if self.used.value == self.seen:
            return None
        head, = struct.unpack_from('<I', self.memory, self.base + USED + 4 +
                                   8 * (self.seen % QUEUE_SIZE))
        self.seen = (self.seen + 1) % (1 << 16)
        self.free.append(head // 3)
        return self.on_way.pop(head)


class VirtioBlk:
    """The driver: what thinvm_stress.Nbd is there."""

    def __init__(self, machine, depth):
        self.machine, self.memory = machine, machine.memory
        self.queues = [Queue(machine, i) for i in range(QUEUES)]
        self.slots = list(range(depth))
        self.dirty = set()              # queues to be notified
        self.pending = 0
        self.initialise()

    def pci(self, register, value=None):
        self.machine.ask(f'outl 0xcf8 {0x80000000 | 4 << 11 | register:#x}')
        if value is None:
            return self.machine.ask('inl 0xcfc')
        return self.machine.ask(f'outl 0xcfc {value:#x}')

    def capabilities(self):
        """{type: (bar, offset, word behind)} of virtio's own ones"""
        found = {}
        at = self.pci(0x34) & 0xff
        while at:
            head = self.pci(at)
            if head & 0xff == 9:
                found[head >> 24] = (self.pci(at + 4) & 0xff,
                                     self.pci(at + 8), self.pci(at + 16))
            at = head >> 8 & 0xff
        return found

    def initialise(self):
        caps = self.capabilities()
        bar, common, _ = caps[1]
        assert caps[2][0] == bar, caps
        self.pci(0x10 + 4 * bar, BAR)
        self.pci(0x14 + 4 * bar, 0)
        self.pci(4, 6)                  # memory, bus master
        common += BAR

        def put(width, register, value):
            self.machine.ask(f'write{width} {common + register:#x} '
                             f'{value:#x}')

        def get(width, register):
            return self.machine.ask(f'read{width} {common + register:#x}')

        for status in (0, 1, 3):
            put('b', 0x14, status)
        for word in (0, 1):
            put('l', 8, word)
            put('l', 12, FEATURES >> 32 * word & 0xffffffff)
        put('b', 0x14, 11)
        if get('b', 0x14) & 8 == 0 or get('w', 0x12) < QUEUES:
            raise Failure('the device lacks what is needed')
        for i, queue in enumerate(self.queues):
            put('w', 0x16, i)
            put('w', 0x18, QUEUE_SIZE)
            for register, place in ((0x20, 0), (0x28, AVAIL), (0x30, USED)):
                put('l', register, queue.base + place)
                put('l', register + 4, 0)
            queue.notify = (BAR + caps[2][1] +
                            get('w', 0x1e) * caps[2][2])
            put('w', 0x1c, 1)
        put('b', 0x14, 15)

    def send(self, request, payload, number):
        """Into queue @number; seen by the device at once or at kick()."""
        slot = self.slots.pop()
        at = SLOTS + slot * SLOT_ROOM
        first = 0 if request.kind in (FLUSH, TRIM, ZEROES) else request.first
        struct.pack_into('<IIQ', self.memory, at, TYPES[request.kind], 0,
                         first)
        self.memory[at + STATUS] = 0xff
        length = len(payload)
        if request.kind == READ:
            length = request.count * SECTOR
        elif request.kind in (TRIM, ZEROES):
            may_unmap = request.kind == ZEROES and \
                not request.flags & NO_HOLE
            payload = struct.pack('<QII', request.first, request.count,
                                  int(may_unmap))
            length = len(payload)
        self.memory[at + DATA:at + DATA + len(payload)] = payload
        self.queues[number].add(request, slot, length)
        self.dirty.add(number)
        self.pending += 1

    def kick(self):
        for number in self.dirty:
            self.machine.order(f'writew {self.queues[number].notify:#x} '
                               f'{number}')
        self.dirty.clear()
        self.machine.answers()

    def ended(self):
        """[(request, status, data)] of what has ended."""
        found = []
        for queue in self.queues:
            while one := queue.take():
                request, slot = one
                at = SLOTS + slot * SLOT_ROOM
                data = b''
                if request.kind == READ:
                    data = self.memory[at + DATA:
                                       at + DATA + request.count * SECTOR]
                found.append((request, self.memory[at + STATUS], data))
                self.slots.append(slot)
                self.pending -= 1
        return found


class Model(thinvm_stress.Model):
    """
    With hint, a discard leaves zeroes or does nothing: the filter of a mirror
    does not pass any on.
    """

    def __init__(self, sectors, initial, hint):
        super().__init__(sectors, initial)
        self.hint = hint

    def finish(self, request):
        if request.kind == TRIM and self.hint:
            request.end = self.tick()
        else:
            super().finish(request)


class ThreadStress(thinvm_stress.Stress):
    """Rounds of requests on one disk, whose node and image jobs replace."""

    def __init__(self, tools, directory, *args, sockets=None, jobs=(),
                 depth=48, **options):
        super().__init__(tools, directory, *args, depth=depth, **options)
        self.sockets = sockets or directory
        self.size = self.sectors * SECTOR
        self.model = Model(self.sectors, self.model.possible[0][0].number,
                           {'mirror', 'commit'} & set(jobs))
        self.jobs = itertools.cycle(jobs) if jobs else None
        self.names = itertools.count(1)
        self.node = 'disk0'

    # -- what goes on beside the requests: generators of QMP commands --

    def blockdev(self, node, image, **more):
        return {'driver': 'thinvm', 'node-name': node, 'discard': 'unmap',
                'file': {'driver': 'file', 'filename': image,
                         'discard': 'unmap'},
                **self.options['node'], **more}

    def new_image(self, *args):
        name = f'disk{next(self.names)}'
        path = os.path.join(self.dir, f'{name}.thinvm')
        self.img('create', '-q', '-f', 'thinvm', '-o', 'cluster_size='
                 f'{self.cluster * SECTOR}', *args, path, str(self.size))
        return name, path

    def until(self, status):
        """The job has come there."""
        while True:
            job, = (yield 'query-jobs', {})
            if 'error' in job:
                raise Failure(f'job: {job}')
            if job['status'] == status:
                return
            yield None, 5

    def dismiss(self):
        yield from self.until('concluded')
        yield 'job-dismiss', {'id': 'job'}

    def go_over(self, node, image):
        """The disk is there from now on."""
        yield 'blockdev-del', {'node-name': self.node}
        os.unlink(self.image)
        self.node, self.image = node, image

    def mirror(self):
        # (QEMU 10.0's copy mode write-blocking is for one thread only: on
        # several, its list of operations gets into disorder and it hangs.)
        node, image = self.new_image()
        yield 'blockdev-add', self.blockdev(node, image)
        yield 'blockdev-mirror', {
            'job-id': 'job', 'device': self.node, 'target': node,
            'sync': 'full', 'auto-dismiss': False}
        yield from self.until('ready')
        yield None, 50
        yield 'job-complete', {'id': 'job'}
        yield from self.dismiss()
        yield from self.go_over(node, image)

    def overlay(self):
        node, image = self.new_image('-b', self.image, '-F', 'thinvm', '-u')
        yield 'blockdev-add', self.blockdev(node, image, backing=None)
        yield 'blockdev-snapshot', {'node': self.node, 'overlay': node}
        yield None, 100
        return node, image

    def commit(self):
        node, image = yield from self.overlay()
        yield 'block-commit', {'job-id': 'job', 'device': node,
                               'auto-dismiss': False}
        yield from self.until('ready')
        yield None, 50
        yield 'job-complete', {'id': 'job'}
        yield from self.dismiss()
        yield 'blockdev-del', {'node-name': node}
        os.unlink(image)

    def stream(self):
        node, image = yield from self.overlay()
        yield 'block-stream', {'job-id': 'job', 'device': node,
                               'auto-dismiss': False}
        yield from self.dismiss()
        yield from self.go_over(node, image)

    def snapshot(self):
        for _ in range(2):
            yield 'blockdev-snapshot-internal-sync', {'device': self.node,
                                                      'name': 'a'}
            yield None, 50
            yield 'thinvm-snapshot-delete', {
                'job-id': 'job', 'node-name': self.node, 'name': 'a',
                'auto-dismiss': False}
            yield from self.dismiss()

    def script(self, machine):
        """
        A generator; to be advanced once in each turn.  Ends when a job has
        been through.
        """
        job = getattr(self, next(self.jobs))()
        reply = None
        while True:
            try:
                command, arguments = job.send(reply)
            except StopIteration:
                return
            reply = None
            if command is None:
                for _ in range(arguments):
                    yield
                continue
            machine.send_command(command, arguments)
            while not reply:
                yield
                reply = machine.answer(wait=False)
            reply = reply['return']

    # -- requests --

    def send(self, disk):
        request = self.request()
        self.model.begin(request)
        payload = b''
        if request.kind == WRITE:
            payload = b''.join(thinvm_stress.sector_of(request.number, s)
                               for s in request.sectors())
        disk.send(request, payload, self.rng.randrange(QUEUES))

    def finish(self, disk):
        """All that has ended."""
        found = disk.ended()
        for request, status, data in found:
            if status:
                raise Failure(f'{request}: status {status}')
            self.model.finish(request)
            if request.kind == READ:
                self.model.check_read(request, data)
        return bool(found)

    def wait(self, machine, disk, room):
        """Until so many requests may be sent."""
        deadline = time.monotonic() + TIMEOUT
        while self.depth - disk.pending < room:
            if not self.finish(disk):
                if machine.process.poll() is not None:
                    raise Failure('QEMU died')
                if time.monotonic() > deadline:
                    raise Failure(f'no answers: {disk.pending} requests')
                time.sleep(0.0005)

    def requests(self, machine, disk, number):
        script = self.script(machine) if self.jobs else iter(())
        running = True
        while running or number > 0:
            burst = self.rng.randint(1, self.depth // 2)
            self.wait(machine, disk, burst)
            for _ in range(burst):
                self.send(disk)
            disk.kick()
            number -= burst
            running = next(script, self) is not self

    def round(self, requests, crash):
        machine = Machine(self.tools, self.dir, self.sockets, self.blockdev(
            'disk0', self.image), self.depth)
        self.node = 'disk0'
        try:
            disk = VirtioBlk(machine, self.depth)
            self.requests(machine, disk, requests)
            if crash:
                machine.kill()
            else:
                self.wait(machine, disk, self.depth)
                machine.quit()
        except (Failure, OSError, AssertionError) as e:
            text = machine.output() if not machine.log.closed else ''
            machine.kill()
            raise Failure(f'{e!r}; QEMU says: {text[-3000:]}') from e
        self.check()
        self.compare(crash)


def main():
    parser = argparse.ArgumentParser(
        description='Overlapping requests on several iothreads, verified')
    parser.add_argument('--build', required=True,
                        help='directory of qemu-img and qemu-system-x86_64')
    parser.add_argument('--seed', type=int, default=1)
    parser.add_argument('--rounds', type=int, default=10)
    parser.add_argument('--requests', type=int, default=2000)
    parser.add_argument('--cluster', type=int, default=65536)
    parser.add_argument('--size', type=int, default=4 << 20)
    parser.add_argument('--base', action='store_true')
    parser.add_argument('--mode', default='writeback')
    parser.add_argument('--jobs', nargs='*', default=(),
                        choices=('mirror', 'commit', 'stream', 'snapshot'))
    args = parser.parse_args()
    tools = {name: os.path.join(args.build, name)
             for name in ('qemu-img', 'qemu-system-x86_64')}
    directory = tempfile.mkdtemp(prefix='thinvm-stress-')
    try:
        ThreadStress(tools, directory, args.seed, args.size, args.cluster,
                     args.base, node={'mapping-cache-mode': args.mode},
                     jobs=args.jobs).run(args.rounds, args.requests)
    except Failure as e:
        print(f'FAILED (seed {args.seed}): {e}')
        print(f'kept: {directory}')
        return 1
    shutil.rmtree(directory)
    print(f'ok, seed {args.seed}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
