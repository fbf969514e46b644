# SPDX-License-Identifier: GPL-2.0-or-later
"""A volume that is full while many requests are under way.

The volume is a raw node that shows a part of a file, so that it has a fixed
size as a LUN has, until the test gives it another.  It grows in small steps,
so that one pause follows the other, each amid a deep queue.
"""

import errno
import os
import random
import threading

from lib.context import Failure, check, wait_for
from lib.guest import Guest
from lib.image import GiB, MiB, File, create, format_node, require_clean
from lib.nbd import WRITE, NBDClient
from lib.qsd import StorageDaemon
from lib.testing import test
from lib.vm import NODE, VM

BEGIN = 40 * MiB


class Volume(File):
    """@node is the disk on it, in the process of @qmp once that runs."""

    def __init__(self, ctx, name, node=NODE, disk=GiB):
        super().__init__(ctx, name)
        self.ctx, self.node, self.size = ctx, node, BEGIN
        create(ctx, self, disk, options='journal_size=1M')
        os.truncate(self.path, 2 * GiB)
        self.qmp = None

    def nodes(self):
        return [self.blockdev(self.node + '-file'), self._raw(),
                format_node(self.ctx, self.node, self.node + '-raw',
                            interval=50, discard='unmap')]

    def _raw(self):
        return {'driver': 'raw', 'node-name': self.node + '-raw',
                'size': self.size, 'file': self.node + '-file',
                'cache': {'direct': True}}

    def extend(self, more):
        self.size += more
        self.qmp.cmd_raw('blockdev-reopen', {'options': [self._raw()]})
        self.qmp.cmd('thinvm-grow', node_name=self.node)

    def info(self):
        found, = [info for info in self.qmp.cmd('query-thinvm')
                  if info['node-name'] == self.node]
        return found

    def check_clean(self):
        os.truncate(self.path, self.size)
        require_clean(self.ctx, self)


class LostGuest(Exception):
    """All requests have been answered, and the guest does not go on."""


TRIES = 5


def fill_and_pause(ctx, *args):
    """As fill_once().  QEMU 10.0 loses an interrupt of a disk with iothreads
    now and then when the machine stops: a completion's is deferred
    (defer_call()) until after the drain, and by then nobody listens.  The
    disk has done all that it was asked for, and the guest sleeps."""
    for left in range(TRIES - 1, -1, -1):
        try:
            return fill_once(ctx, *args)
        except LostGuest as err:
            check(left, '%s, %d times', err, TRIES)
            ctx.log('%s; once more' % err)
    return None


def all_answered(vm, queues):
    """Of the requests in the disk's queues."""
    status = [vm.qmp.cmd('x-query-virtio-queue-status', queue=n,
                         path='/machine/peripheral/full/virtio-backend')
              for n in range(queues)]
    vm.ctx.log('queues: %s' % status)
    return not any(queue['inuse'] or
                   queue['last-avail-idx'] != queue['shadow-avail-idx']
                   for queue in status)


def wait_for_pause(vm, guest, queues):
    """Until the guest stands still for want of space, or is done."""
    for left in range(7, -1, -1):
        try:
            wait_for(lambda: vm.status() != 'running' or done(guest), 30,
                     'the guest stands still, or is done')
            return
        except Failure:
            if all_answered(vm, queues):
                raise LostGuest('the guest waits for what was done') from None
            if not left:
                raise


def fill_once(ctx, werror, iothreads, megabytes, step):
    """A guest fills a volume with 64 requests at a time; each time that it
    stands still the volume grows by @step.  Returns how often that was."""
    volume = Volume(ctx, ctx.unique('volume'))
    device = {'driver': 'virtio-blk-pci', 'drive': NODE, 'write-cache': 'on',
              'num-queues': 4, 'werror': werror, 'id': 'full'}
    extra = []
    for number in range(iothreads):
        extra += ['-object', 'iothread,id=io%d' % number]
    if iothreads:
        device['iothread-vq-mapping'] = [{'iothread': 'io%d' % number}
                                         for number in range(iothreads)]
    guest = Guest(ctx)
    vm = VM(ctx, guest, volume, disk=volume.nodes(), device=device, cpus=4,
            extra=extra)
    volume.qmp = vm.qmp
    guest.wait_ready()
    guest.ask('fill lanes=64 blocks=%d' % megabytes, 'filling')
    pauses = 0
    while True:
        wait_for_pause(vm, guest, 4)
        if vm.status() == 'running':
            break
        error = vm.qmp.wait_event('BLOCK_IO_ERROR', 20)['data']
        check(error['nospace'] and error['action'] == 'stop' and
              error['operation'] == 'write', 'the event is %s', error)
        check(vm.status() == 'io-error', 'the guest is %s', vm.status())
        pauses += 1
        volume.extend(step)
        vm.qmp.events.clear()
        vm.qmp.cmd('cont')
    errors = int(guest.expect('filled').split()[2])
    guest.no_errors()
    check(not errors, 'the guest saw %d errors', errors)
    vm.quit()
    volume.check_clean()
    compare(ctx, volume, megabytes)
    ctx.log('growth: werror=%s, %d iothreads, steps of %d MiB: %d pauses' % (
        werror, iothreads, step // MiB, pauses))
    return pauses


def done(guest):
    try:
        line = guest.expect('filled', 0.2)
    except Failure:
        return False
    guest.hear(line)
    return True


def compare(ctx, volume, megabytes):
    out = ctx.run(ctx.bin('qemu-io'), '-f', ctx.fmt, '-r', *sum(
        [['-c', 'read -P %d %dM 1M' % (n % 251 + 1, n)]
         for n in range(megabytes)], []), volume.url)
    check('verification failed' not in out and 'error' not in out,
          'the disk reads otherwise:\n%s', out)


@test(seconds=600)
def guest_four_iothreads(ctx):
    """werror=enospc, four queues in as many threads."""
    pauses = fill_and_pause(ctx, 'enospc', 4, 160, 8 * MiB)
    check(pauses >= 8, 'there were only %d pauses', pauses)


@test(seconds=600)
def guest_main_loop(ctx):
    """werror=stop, all queues in the main thread."""
    pauses = fill_and_pause(ctx, 'stop', 0, 128, 12 * MiB)
    check(pauses >= 4, 'there were only %d pauses', pauses)


@test()
def guest_is_told(ctx):
    """werror=report: it hears of it, goes on with what it has, and writes
    again when there is space."""
    volume = Volume(ctx, 'volume')
    guest = Guest(ctx)
    vm = VM(ctx, guest, volume, disk=volume.nodes(), device={
        'driver': 'virtio-blk-pci', 'drive': NODE, 'werror': 'report'})
    volume.qmp = vm.qmp
    guest.wait_ready()
    said = guest.ask('fill lanes=64 blocks=96', 'filling')
    said = guest.expect('filled')
    check(int(said.split()[2]) > 0 and guest.errors, 'it says %s', said)
    check(vm.status() == 'running', 'the guest is %s', vm.status())
    error = vm.qmp.wait_event('BLOCK_IO_ERROR', 20)['data']
    check(error['action'] == 'report' and 'space' in error['reason'],
          'the event is %s', error)
    guest.errors.clear()
    volume.extend(96 * MiB)
    guest.ask('fill lanes=64 blocks=96', 'filling')
    said = guest.expect('filled')
    check(int(said.split()[2]) == 0, 'it says %s', said)
    guest.no_errors()
    vm.quit()
    volume.check_clean()
    compare(ctx, volume, 96)


class Client(threading.Thread):
    """Writes blocks of its own with @depth requests at a time; what finds no
    space is written again."""

    SIZE = 16 * 1024

    def __init__(self, ctx, path, number, clients, blocks, depth):
        super().__init__(daemon=True)
        self._nbd = NBDClient(ctx, path, 'disk')
        self._depth, self.refused, self.error = depth, 0, None
        self.blocks = [(n * clients + number) for n in range(blocks)]
        self.room = threading.Event()

    @classmethod
    def content(cls, block):
        return random.Random(block).randbytes(16) * (cls.SIZE // 16)

    def _take(self, again):
        block, error, _ = self._nbd.reply()
        if error == errno.ENOSPC:
            self.refused += 1
            again.append(block)
        elif error:
            self.error = 'block %d: %s' % (block, os.strerror(error))

    def run(self):
        left = self.blocks[:]
        random.Random(len(left)).shuffle(left)
        while left and not self.error:
            again = []
            for block in left:
                while self._nbd.pending() >= self._depth:
                    self._take(again)
                if again and not self.room.is_set():
                    again.append(block)
                    continue
                self._nbd.send(WRITE, offset=block * self.SIZE * 4,
                               data=self.content(block), tag=block)
            while self._nbd.pending():
                self._take(again)
            left = again
            if left:
                self.room.wait(60)
        self._nbd.flush()

    def verify(self):
        for block in self.blocks:
            check(self._nbd.read(block * self.SIZE * 4, self.SIZE) ==
                  self.content(block), 'block %d reads otherwise', block)


@test()
def clients_of_a_daemon(ctx):
    """Four NBD clients, 32 requests each, in a thread of the daemon; each
    that was refused succeeds later, each that was not is there."""
    volume = Volume(ctx, 'volume', 'disk')
    daemon = StorageDaemon(ctx, extra=(
        '--object', 'iothread,id=io0'))
    volume.qmp = daemon.qmp
    for node in volume.nodes():
        daemon.qmp.cmd_raw('blockdev-add', node)
    path = ctx.path('nbd')
    daemon.qmp.cmd_raw('nbd-server-start', {
        'addr': {'type': 'unix', 'data': {'path': path}},
        'max-connections': 0})
    daemon.qmp.cmd_raw('block-export-add', {
        'type': 'nbd', 'id': 'export', 'node-name': 'disk', 'name': 'disk',
        'writable': True, 'iothread': 'io0'})
    clients = [Client(ctx, path, number, 4, 500, 32) for number in range(4)]
    for client in clients:
        client.start()
    steps = 0
    while any(client.is_alive() for client in clients):
        stuck = [c for c in clients if c.is_alive() and c.refused]
        if stuck and volume.info()['device-free'] < MiB:
            steps += 1
            volume.extend(6 * MiB)
        for client in clients:
            client.room.set()
        clients[steps % 4].join(0.05)
        for client in clients:
            client.room.clear()
    for client in clients:
        check(not client.error, '%s', client.error)
        client.verify()
    refused = sum(client.refused for client in clients)
    ctx.log('growth: 4 NBD clients: %d requests refused, %d extensions' % (
        refused, steps))
    check(refused > 100 and steps > 5, '%d requests were refused, %d '
          'extensions', refused, steps)
    daemon.quit()
    volume.check_clean()
