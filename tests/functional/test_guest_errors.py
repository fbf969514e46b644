# SPDX-License-Identifier: GPL-2.0-or-later
"""werror and rerror with a real guest: its device fails while it writes.

A filter lies between the image and the LUN; its child is exchanged while the
guest runs, for a blkdebug node that fails what it is told to, and back.  So
the error comes from below the format, at whatever the driver is doing at that
moment: data, journal, checkpoint, flush.

stop     the guest stands still with its request; when the device works, cont
         repeats it.  The guest never hears of an error, nothing is lost
report   the guest is told; what it was told is written is there
enospc   the default: no space stops the guest, other errors are reported
ignore   the guest is told that all is well: only what was written meanwhile
         may be lost, and the image is sound
"""

import os
import random
import time

from lib.contents import scan
from lib.context import Skip, check, wait_for
from lib.guest import Guest
from lib.image import GiB, MiB, File, create, format_node, require_clean
from lib.qmp import QMPError
from lib.testing import OURS, test
from lib.tgt import Target
from lib.vm import NODE, VM

EIO, ENOSPC = 5, 28
FLUSHES = 50                # that fail, one after the other


class Patient:
    """A guest whose device can be made to fail."""

    def __init__(self, ctx, werror=None, rerror=None, mode=None, place=None,
                 **guest):
        self.ctx = ctx
        if place is None:
            place = Target(ctx).add_lun(2 * GiB)
        self.place = place
        create(ctx, self.place, 1 * GiB)
        self.guest = Guest(ctx, **dict({'lanes': 4, 'blocks': 500,
                                        'flush': 10, 'zero': 4,
                                        'discard': 4}, **guest))
        device = {'driver': 'virtio-blk-pci', 'drive': NODE}
        if werror:
            device['werror'] = werror
        if rerror:
            device['rerror'] = rerror
        self.vm = VM(ctx, self.guest, None, device=device, disk=[
            place.blockdev('device'), self._gate('device'),
            format_node(ctx, NODE, 'gate', mode, interval=50)],
            extra=['-object', 'throttle-group,id=free'])
        self.qmp = self.vm.qmp
        self.failures = 0
        self.guest.wait_ready()
        self.guest.start_writing()
        self.guest.wait_writes(200)

    @staticmethod
    def _gate(child):
        return {'driver': 'throttle', 'node-name': 'gate', 'file': child,
                'throttle-group': 'free', 'cache': {'direct': True}}

    def fail(self, errno, *kinds):
        """From now on the device fails all requests of @kinds."""
        self.failures += 1
        bad = 'bad%d' % self.failures
        rules = []
        for kind in sorted(set(kinds)):
            rule = {'event': 'none', 'iotype': kind, 'errno': errno}
            if kind == 'flush':         # see heal()
                rules += [dict(rule, once=True)] * FLUSHES
            else:
                rules.append(rule)
        self.qmp.cmd_raw('blockdev-add', {
            'driver': 'blkdebug', 'node-name': bad, 'image': 'device',
            'cache': {'direct': True}, 'inject-error': rules})
        self.qmp.cmd_raw('blockdev-reopen', {'options': [self._gate(bad)]})

    def heal(self):
        """The child is exchanged only after a flush that succeeds: one of
        those that are to fail is used up by each attempt."""
        for _ in range(FLUSHES + 1):
            try:
                self.qmp.cmd_raw('blockdev-reopen',
                                 {'options': [self._gate('device')]})
                break
            except QMPError as err:
                check('flushing' in err.desc, '%s', err.desc)
        self.qmp.cmd('blockdev-del', node_name='bad%d' % self.failures)

    def paused(self, operation, nospace=False):
        event = self.qmp.wait_event('BLOCK_IO_ERROR', 60)['data']
        check(event['action'] == 'stop' and event['operation'] == operation
              and bool(event.get('nospace')) == nospace,
              'the event is %s', event)
        wait_for(lambda: self.vm.status() == 'io-error', 20,
                 'the guest is paused')
        return event

    def go_on(self):
        """The device works again, the guest is let go on."""
        self.qmp.poll()
        self.qmp.events = [event for event in self.qmp.events
                           if event['event'] != 'BLOCK_IO_ERROR']
        self.qmp.cmd('cont')

    def finish(self):
        guest = self.guest
        guest.stop_writing()
        guest.verify('read by the guest after %d failures' % self.failures)
        self.vm.quit()
        require_clean(self.ctx, self.place)
        guest.model.require(scan(self.ctx, guest.model, self.place), 'acked',
                            'read from outside after %d failures'
                            % self.failures)


def stops_and_resumes(ctx, mode):
    patient = Patient(ctx, werror='stop', rerror='stop', mode=mode)
    guest = patient.guest
    for kinds, errno in ((('write',), EIO), (('flush',), EIO),
                         (('write', 'flush'), EIO), (('write',), ENOSPC),
                         (('write', 'write-zeroes', 'discard', 'flush'),
                          EIO)):
        patient.fail(errno, *kinds)
        patient.paused('write', errno == ENOSPC)
        patient.qmp.cmd('cont')         # too early: it stops again
        patient.paused('write', errno == ENOSPC)
        patient.heal()
        patient.go_on()
        guest.wait_writes(200)
    check(not guest.errors, 'the guest has heard of an error: %s',
          guest.errors)
    patient.finish()


@test(formats=OURS)
def stop_in_writeback(ctx):
    """Five failures of writes and flushes; the guest hears of none."""
    stops_and_resumes(ctx, 'writeback')


@test(formats=OURS)
def stop_in_writethrough(ctx):
    """Five failures of writes and flushes; the guest hears of none."""
    stops_and_resumes(ctx, 'writethrough')


@test(formats=OURS)
def stop_on_reads(ctx):
    """Reads fail while the guest verifies its disk: it goes on verifying."""
    patient = Patient(ctx, rerror='stop', werror='stop')
    guest = patient.guest
    guest.stop_writing()
    model = guest.model
    for _ in range(3):
        patient.fail(EIO, 'read')
        patient.vm.port.send('verify lanes=%d blocks=%d stride=%d base=%d' % (
            len(model.lanes), model.blocks, model.stride, model.base))
        patient.paused('read')
        patient.heal()
        patient.go_on()
        guest.expect('verified')
        check(not guest.errors, 'the guest has heard of an error: %s',
              guest.errors)
    guest.start_writing()
    guest.wait_writes(100)
    patient.finish()


@test(formats=OURS)
def killed_after_resuming(ctx):
    """A flush that failed, was repeated and then succeeded has kept its
    promise, also for what the failed one was to make durable."""
    patient = Patient(ctx, werror='stop', zero=0, discard=0)
    guest = patient.guest
    for kind in ('flush', 'write'):
        patient.fail(EIO, kind)
        patient.paused('write')
        patient.heal()
        patient.go_on()
        guest.wait_writes(150)
    guest.ask('sync', 'synced')
    patient.vm.kill()
    require_clean(ctx, patient.place)
    guest.model.require(scan(ctx, guest.model, patient.place), 'flushed',
                        'flushed after the failures')


def after_errors(patient):
    """The lanes that met an error have ended; what they wrote last may be
    there or not."""
    guest = patient.guest
    guest.ask('stop', 'stopped')
    errors, guest.errors = guest.errors, []
    for lane in guest.model.lanes:
        lane.unreported = 1
    return errors


def rebased(patient, durable, what):
    """Read by the guest: the new base of what must be there."""
    model = patient.guest.model
    found = patient.guest.read_back()
    model.require(found, durable, what)
    model.rebase(found)


@test(formats=OURS)
def report(ctx):
    """The guest is told of each error, and keeps what it was told is
    written; when the device works again, so does the disk."""
    patient = Patient(ctx, werror='report', rerror='report')
    guest = patient.guest
    for kinds in (('write',), ('flush',), ('write', 'flush')):
        patient.fail(EIO, *kinds)
        wait_for(lambda: len(guest.errors) >= len(guest.model.lanes), 60,
                 'all lanes met the error')
        check(patient.vm.status() == 'running', 'the guest is %s',
              patient.vm.status())
        patient.heal()
        errors = after_errors(patient)
        check(all('error' in text for text in errors), 'the guest says %s',
              errors)
        rebased(patient, 'acked', 'after %s failed' % ' and '.join(kinds))
        guest.start_writing()
        guest.wait_writes(200)
    patient.finish()


@test(formats=OURS)
def enospc(ctx):
    """By default no space stops the guest, any other error is reported."""
    patient = Patient(ctx)
    guest = patient.guest
    patient.fail(ENOSPC, 'write')
    patient.paused('write', nospace=True)
    check(not guest.errors, 'the guest has heard: %s', guest.errors)
    patient.heal()
    patient.go_on()
    guest.wait_writes(200)
    patient.fail(EIO, 'write')
    wait_for(lambda: len(guest.errors) >= len(guest.model.lanes), 60,
             'all lanes met the error')
    patient.heal()
    after_errors(patient)
    rebased(patient, 'acked', 'after an error was reported')
    guest.start_writing()
    guest.wait_writes(200)
    patient.finish()


@test(formats=OURS)
def ignore(ctx):
    """The guest is told nothing and goes on: what was there before and what
    comes after is whole, and so is the image."""
    patient = Patient(ctx, werror='ignore', rerror='report', discard=0)
    guest = patient.guest
    before = guest.acked_before(time.monotonic())
    patient.fail(EIO, 'write', 'flush')
    guest.wait_writes(200)
    check(patient.vm.status() == 'running' and not guest.errors,
          'the guest is %s and says %s', patient.vm.status(), guest.errors)
    patient.heal()
    guest.stop_writing()
    rebased(patient, before, 'after errors were ignored')
    guest.start_writing()
    guest.wait_writes(300)
    patient.finish()


class SmallFilesystem:
    """A file system of our own that can be full, and enlarged."""

    def __init__(self, ctx, size):
        self.ctx = ctx
        self.path = ctx.path('small')
        os.mkdir(self.path)
        if os.geteuid() != 0:
            raise Skip('needs root, to mount a file system')
        try:
            ctx.run(ctx.need('mount', 'mount'), '-t', 'tmpfs', '-o',
                    'size=%d' % size, 'tmpfs', self.path)
        except Exception as err:
            raise Skip('cannot mount a tmpfs here: %s' % err) from None
        ctx.cleanup(ctx.run, ctx.need('umount', 'mount'), '-l', self.path)

    def enlarge(self, size):
        self.ctx.run(self.ctx.need('mount', 'mount'), '-o',
                     'remount,size=%d' % size, self.path)


@test(formats=OURS)
def file_system_is_full(ctx):
    """The image is in a file system that runs full: the guest stands still,
    goes on when there is space, three times."""
    size = 24 * MiB
    filesystem = SmallFilesystem(ctx, size)
    place = File(ctx, 'small/image')
    place.blockdev = lambda node, host='a': {
        'driver': 'file', 'node-name': node, 'filename': place.path}
    patient = Patient(ctx, place=place, lanes=2, blocks=2500, zero=0,
                      discard=0, stride=65536)
    guest = patient.guest
    for _ in range(3):
        patient.paused('write', nospace=True)
        size += 16 * MiB
        filesystem.enlarge(size)
        patient.go_on()
        guest.wait_writes(50)
    filesystem.enlarge(1 * GiB)
    wait_for(lambda: patient.vm.status() in ('running', 'io-error'), 5, '')
    patient.go_on()
    guest.wait_writes(100)
    check(not guest.errors, 'the guest has heard: %s', guest.errors)
    patient.finish()


@test(seconds=1200, formats=OURS, slow=True)
def stop_often(ctx):
    """Sixty failures of any kind, in either mode."""
    for mode in ('writeback', 'writethrough'):
        patient = Patient(ctx, werror='stop', rerror='stop', mode=mode)
        for _ in range(30):
            patient.fail(random.choice((EIO, ENOSPC)), *random.sample(
                ('write', 'flush', 'write-zeroes', 'discard'),
                random.randrange(1, 4)), random.choice(('write', 'flush')))
            patient.qmp.wait_event('BLOCK_IO_ERROR', 60)
            patient.heal()
            patient.go_on()
            patient.guest.wait_writes(random.randrange(1, 300))
        patient.finish()
