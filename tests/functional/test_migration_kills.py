# SPDX-License-Identifier: GPL-2.0-or-later
"""kill -9 of the source or the target at each phase of a migration.

A real guest that writes at full speed, one LUN, two QEMU processes, and the
wire between them in the test's hands (lib/channel.py), so that the phases
that are over in a moment last as long as wanted:

setup           the source has begun, the target has not got a byte
active          memory is being sent
pre-switchover  the guest stands still, the disk is still the source's
device          the source has given the disk up, the target knows nothing yet
switched        the guest runs on the target, the source does not know yet
completed       both know

In each of them the one who is left goes on, or if the guest's memory is gone
with the dead, another host boots the guest from the disk.  Nothing that was
promised is lost, the image is clean, and there are never two that write: a
source that hears of a failure although the target has run the guest has lost
its disk, because its memory is of the past.
"""

import random
import time

from lib.channel import Channel
from lib.context import Failure, check, wait_for
from lib.load import booted, examine, expect_mode, finish, setup_pair
from lib.qmp import QMPClosed, QMPError
from lib.testing import OURS, test
from lib.vm import (VM, begin_migration, finish_migration, migrate,
                    wait_migration)

SLOW = 256 << 10            # bytes a second: such a migration does not end
GUEST = {'zero': 3, 'discard': 3, 'flush': 20}


class Scene:
    """A guest that moves from host to host."""

    def __init__(self, ctx, **options):
        self.ctx = ctx
        self.lun, self.guest, self.source = setup_pair(
            ctx, vm_options=options, **GUEST)
        self.options = options
        self.target = None
        self.channel = None
        self.began = 0
        self.hosts = 0

    def next_host(self):
        self.hosts += 1
        return 'host%d' % self.hosts

    def begin(self, **options):
        self.target = VM(self.ctx, self.guest, self.lun,
                         host=self.next_host(), incoming=True, **self.options)
        expect_mode(self.target, 'migration')
        self.channel = Channel(self.ctx)
        if options.pop('hold', False):
            self.channel.hold('forth')
        begin_migration(self.source, self.target, return_path=True,
                        channel=self.channel, **options)

    def setup(self):
        self.begin(hold=True)

    def active(self):
        self.begin(bandwidth=SLOW)
        wait_migration(self.source, ('active',))
        expect_mode(self.source, 'writethrough')
        self.guest.wait_writes(100)

    def pre_switchover(self):
        self.begin(pause=True)
        wait_migration(self.source, ('pre-switchover',))
        self.channel.wait_quiet('forth')

    def device(self):
        """What is sent from now on, the target gets a part of or nothing.

        QEMU's migration thread sends the rest of the memory with the BQL
        taken, so the source's main loop stands still while the wire is held:
        ask it nothing.  The thread may have the BQL even before the reply to
        migrate-continue is written (its dispatcher goes once round the main
        loop for that), so do not wait for the reply either.
        """
        self.pre_switchover()
        self.channel.hold('forth')
        qmp = self.source.qmp
        qmp.poll()
        qmp.events.clear()              # of the phases before
        qmp.send('migrate-continue', state='pre-switchover')
        qmp.wait_event('THINVM_CACHE_MODE_CHANGED', 30,
                       lambda data: data['new-mode'] == 'migration')

    def switched(self):
        self.pre_switchover()
        self.channel.hold('back')
        self.continue_()
        self.target.qmp.wait_event('RESUME', 60)
        self.guest.attach(self.target)
        self.guest.wait_writes(200)
        check(self.source.migration_status() == 'device',
              'the source is %s although it has heard nothing',
              self.source.migration_status())

    def completed(self):
        self.begin()
        finish_migration(self.source, self.target)
        self.guest.wait_writes(200)

    def continue_(self):
        self.source.qmp.cmd('migrate-continue', state='pre-switchover')

    def target_never_ran(self):
        """The target has given up, or still waits; it has not the disk."""
        try:
            status = self.target.status()
        except (QMPClosed, Failure):
            return                      # it ended
        check(status in ('inmigrate', 'internal-error', 'paused'),
              'the target is %s without a source', status)

    def restart(self, durable, what):
        """All who were there are dead; the guest boots on another host."""
        for vm in (self.source, self.target):
            vm.kill()
        self.channel.cut()
        self.guest.errors.clear()
        examine(self.ctx, self.guest, self.lun, durable, what)
        self.source = booted(self.ctx, self.guest, self.lun,
                             host=self.next_host(), **self.options)
        self.guest.start_writing()
        self.guest.wait_writes(200)

    def source_goes_on(self):
        expect_mode(self.source, 'writeback')
        wait_for(lambda: self.source.status() == 'running', 20,
                 'the source runs again')
        self.guest.attach(self.source)
        self.guest.wait_writes(200)
        self.channel.cut()

    def target_goes_on(self):
        self.source.kill()
        self.channel.cut()
        expect_mode(self.target, 'writeback')
        self.guest.wait_writes(200)
        self.source = self.target

    def finish(self):
        finish(self.ctx, self.lun, self.guest, self.source)


def source_dies(scene, phase):
    scene.ctx.log('the source dies: ' + phase)
    getattr(scene, phase)()
    time.sleep(random.random() * 0.2)
    if phase in ('switched', 'completed'):
        scene.target_goes_on()
        return
    scene.source.kill()
    time.sleep(0.5)
    scene.target_never_ran()
    # Writethrough from the start of the migration; how much of what came
    # before had been committed by the death of a source in setup is open.
    scene.restart('flushed' if phase == 'setup' else 'acked',
                  'the source died: ' + phase)


def target_dies(scene, phase):
    scene.ctx.log('the target dies: ' + phase)
    getattr(scene, phase)()
    time.sleep(random.random() * 0.2)
    scene.target.kill()
    if phase == 'pre_switchover':
        scene.continue_()
    if phase in ('setup', 'device'):
        # A wire that is held does not tell of the death by itself.
        scene.channel.cut()
    if phase in ('setup', 'active', 'pre_switchover', 'device'):
        wait_migration(scene.source, ('failed',))
        scene.source_goes_on()
    elif phase == 'switched':
        scene.channel.cut()
        lost(scene)
        scene.restart('flushed', 'the target died: switched')
    else:
        refused(scene)
        scene.restart('flushed', 'the target died: completed')


def lost(scene):
    """The source resumes, as QEMU does, but its disk takes nothing."""
    wait_migration(scene.source, ('failed',))
    scene.source.qmp.wait_event('THINVM_OWNERSHIP_LOST', 30)
    time.sleep(1)                       # its guest, of the past, tries


def refused(scene):
    """The source of a completed migration is not to be started again."""
    try:
        scene.source.qmp.cmd('cont')
    except QMPError as err:
        scene.ctx.log('cont is refused: ' + err.desc)
    else:
        raise Failure('cont on the source of a completed migration worked, '
                      'the target had run the guest and died')


@test(seconds=600, formats=OURS)
def source_at_each_phase(ctx):
    """The source dies six times; the guest goes on somewhere each time."""
    scene = Scene(ctx)
    for phase in ('setup', 'active', 'pre_switchover', 'device', 'switched',
                  'completed'):
        source_dies(scene, phase)
    scene.finish()


@test(seconds=600, formats=OURS)
def target_at_each_phase(ctx):
    """The target dies six times; the guest goes on somewhere each time."""
    scene = Scene(ctx)
    for phase in ('setup', 'active', 'pre_switchover', 'device', 'switched',
                  'completed'):
        target_dies(scene, phase)
    scene.finish()


@test(seconds=2400, formats=OURS, slow=True)
def at_random(ctx):
    """Forty deaths, either side, any phase, in any order."""
    scene = Scene(ctx)
    for _ in range(40):
        random.choice((source_dies, target_dies))(scene, random.choice((
            'setup', 'active', 'pre_switchover', 'device', 'switched',
            'completed')))
    scene.finish()


@test(seconds=300, formats=OURS)
def wire_breaks_after_the_switch(ctx):
    """Nobody dies, but the source never hears that the target runs: it must
    not write, and the target must not notice."""
    scene = Scene(ctx)
    scene.switched()
    scene.channel.cut()
    lost(scene)
    scene.guest.errors.clear()
    scene.guest.wait_writes(200)
    scene.source.kill()
    scene.guest.errors.clear()
    finish(ctx, scene.lun, scene.guest, scene.target)


def into_postcopy(scene):
    scene.begin(bandwidth=1 << 20, postcopy=True)
    wait_migration(scene.source, ('active',))
    scene.source.qmp.cmd('migrate-start-postcopy')
    scene.target.qmp.wait_event('RESUME', 60)
    scene.guest.attach(scene.target)
    time.sleep(random.random() * 0.5)


@test(seconds=300, formats=OURS)
def amid_postcopy(ctx):
    """One of the two dies while each has a part of the memory: the guest is
    lost, that is inherent, but not what it had flushed."""
    scene = Scene(ctx)
    for dying in ('target', 'source'):
        into_postcopy(scene)
        getattr(scene, dying).kill()
        time.sleep(0.5)
        scene.restart('flushed', 'the %s died amid postcopy' % dying)
    scene.finish()


@test(seconds=300, formats=OURS, slow=True)
def writethrough_at_each_phase(ctx):
    """The same for a disk whose configured mode is writethrough."""
    scene = Scene(ctx, mode='writethrough')
    for phase in ('active', 'device'):
        getattr(scene, phase)()
        scene.source.kill()
        scene.restart('acked', 'the source died: ' + phase)
    scene.finish()


@test(seconds=300, formats=OURS, slow=True)
def nobody_dies(ctx):
    """The channel of these tests is not what makes migrations fail."""
    scene = Scene(ctx)
    target = VM(ctx, scene.guest, scene.lun, host='b', incoming=True)
    migrate(scene.source, target, return_path=True, channel=Channel(ctx))
    scene.guest.wait_writes(200)
    scene.source.quit()
    finish(ctx, scene.lun, scene.guest, target)
