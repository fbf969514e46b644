# SPDX-License-Identifier: GPL-2.0-or-later
"""Live migration over one shared LUN while the guest writes at full speed.

Two QEMU processes with initiator names of their own stand for two hosts.
The mapping cache has to switch modes by itself: writethrough on the source
from the start of the migration (and back if it fails), migration mode on the
target until it takes over, then its configured mode.
"""

from lib.context import Failure, check, wait_for
from lib.guest import Guest
from lib.image import GiB, create
from lib.load import expect_mode, finish, setup_pair
from lib.node import mode_events
from lib.qmp import QMPError
from lib.testing import ANY, OURS, test
from lib.tgt import Target
from lib.vm import (VM, begin_migration, finish_migration, migrate,
                    wait_migration)

SLOW = 256 << 10            # bytes a second: such a migration does not end


def cancelled(ctx, lun, guest, vm):
    """A migration that the operator cancels; the guest stays on @vm."""
    target = VM(ctx, guest, lun, host='x', incoming=True)
    begin_migration(vm, target, bandwidth=SLOW)
    wait_migration(vm, ('active',))
    expect_mode(vm, 'writethrough')
    guest.wait_writes(100)
    vm.qmp.cmd('migrate_cancel')
    wait_migration(vm, ('cancelled',))
    expect_mode(vm, 'writeback')
    target.kill()
    guest.wait_writes(100)


def target_dies(ctx, lun, guest, vm):
    """The target host is lost amid the migration."""
    target = VM(ctx, guest, lun, host='x', incoming=True)
    begin_migration(vm, target, bandwidth=SLOW)
    wait_migration(vm, ('active',))
    guest.wait_writes(100)
    target.kill()
    wait_migration(vm, ('failed',))
    expect_mode(vm, 'writeback')
    guest.wait_writes(100)


def bad_channel(vm, guest):
    """A migration whose channel leads nowhere."""
    try:
        vm.qmp.cmd('migrate', uri='unix:' + vm.ctx.path('nobody-listens'))
    except QMPError:
        pass
    else:
        wait_migration(vm, ('failed',))
    expect_mode(vm, 'writeback')
    guest.wait_writes(100)


@test(seconds=300, formats=ANY)
def once_under_load(ctx):
    """The modes before, during and after; one migration, nothing lost."""
    lun, guest, source = setup_pair(ctx)
    expect_mode(source, 'writeback')
    target = VM(ctx, guest, lun, host='b', incoming=True)
    expect_mode(target, 'migration')
    begin_migration(source, target, bandwidth=4 << 20)
    wait_migration(source, ('active',))
    expect_mode(source, 'writethrough')
    expect_mode(target, 'migration')
    guest.wait_writes(200)
    finish_migration(source, target)
    expect_mode(target, 'writeback')
    guest.wait_writes(300)
    if ctx.fmt == 'thinvm':
        seen = [mode for _, mode in mode_events(source.qmp)]
        check('writethrough' in seen,
              'the source sent no event for writethrough: %s', seen)
        seen = [mode for _, mode in mode_events(target.qmp)]
        check(seen and seen[-1] == 'writeback',
              'the target sent no event for writeback: %s', seen)
    source.quit()
    finish(ctx, lun, guest, target)


@test(seconds=600, formats=ANY)
def ten_times_to_and_fro(ctx):
    """Ten migrations, with cancelled and failed ones in between."""
    lun, guest, vm = setup_pair(ctx, zero=3, discard=3)
    for turn in range(10):
        if turn % 3 == 1:
            cancelled(ctx, lun, guest, vm)
        if turn % 3 == 2:
            target_dies(ctx, lun, guest, vm)
        if turn == 5:
            bad_channel(vm, guest)
        target = VM(ctx, guest, lun, host='ba'[turn % 2], incoming=True)
        figures = migrate(vm, target)
        ctx.log('migration %d: downtime %s ms' % (turn,
                                                  figures.get('downtime')))
        guest.wait_writes(200)
        vm.quit()
        vm = target
    finish(ctx, lun, guest, vm)


@test(seconds=300, formats=ANY)
def fails_at_the_switchover(ctx):
    """The target refuses the device state when the source has already
    stopped and given up the disk: the source must take it back."""
    # The target has no such device.  It learns so after the RAM, when the
    # source has already handed over; a return path tells the source.
    lun, guest, source = setup_pair(ctx, vm_options={
        'extra': ['-device', 'virtio-rng-pci']})
    target = VM(ctx, guest, lun, host='b', incoming=True)
    begin_migration(source, target, return_path=True)
    wait_for(lambda: source.migration_status() in ('failed', 'completed'),
             60, 'an end of the migration')
    check(source.migration_status() == 'failed',
          'a target that lacks a device did not fail the migration')
    target.kill()
    check(source.status() == 'running', 'the source is %s', source.status())
    expect_mode(source, 'writeback')
    guest.wait_writes(300)
    finish(ctx, lun, guest, source)


@test(seconds=300, formats=ANY)
def cancelled_before_the_switchover(ctx):
    """Cancelled while the source is stopped and waits for the word to
    switch over."""
    lun, guest, source = setup_pair(ctx)
    target = VM(ctx, guest, lun, host='b', incoming=True)
    begin_migration(source, target, pause=True)
    wait_migration(source, ('pre-switchover',))
    source.qmp.cmd('migrate_cancel')
    wait_migration(source, ('cancelled',))
    target.kill()
    check(source.status() == 'running', 'the source is %s', source.status())
    expect_mode(source, 'writeback')
    guest.wait_writes(300)
    finish(ctx, lun, guest, source)


@test(seconds=300, formats=OURS)
def target_waits_for_cont(ctx):
    """A guest that was stopped when it was migrated is handed over by the
    operator's cont on the target; till then the target is in migration
    mode or has the disk, but has written nothing of the guest's."""
    lun, guest, source = setup_pair(ctx)
    guest.stop_writing()
    source.qmp.cmd('stop')
    target = VM(ctx, guest, lun, host='b', incoming=True)
    begin_migration(source, target)
    wait_migration(source, ('completed',))
    source.quit()
    guest.attach(target)
    target.qmp.cmd('cont')
    expect_mode(target, 'writeback')
    guest.start_writing()
    guest.wait_writes(300)
    finish(ctx, lun, guest, target)


@test(seconds=300, formats=OURS)
def source_stays_stopped(ctx):
    """cont on the source after a completed migration must not give the
    guest a disk that is the target's."""
    lun, guest, source = setup_pair(ctx)
    target = VM(ctx, guest, lun, host='b', incoming=True)
    migrate(source, target)
    guest.wait_writes(200)
    try:
        source.qmp.cmd('cont')
    except QMPError as err:
        ctx.log('cont is refused: %s' % err.desc)
    else:
        raise Failure('cont on the source of a completed migration worked')
    guest.wait_writes(200)
    source.kill()
    finish(ctx, lun, guest, target)


@test(seconds=300, formats=OURS)
def configured_writethrough_stays(ctx):
    """A disk configured as writethrough is so after the migration too, and
    after a cancelled one."""
    lun = Target(ctx).add_lun(4 * GiB)
    create(ctx, lun, 4 * GiB)
    guest = Guest(ctx)
    source = VM(ctx, guest, lun, host='a', mode='writethrough')
    guest.wait_ready()
    guest.start_writing()
    guest.wait_writes(200)
    target = VM(ctx, guest, lun, host='b', incoming=True,
                mode='writethrough')
    begin_migration(source, target, bandwidth=SLOW)
    wait_migration(source, ('active',))
    source.qmp.cmd('migrate_cancel')
    wait_migration(source, ('cancelled',))
    expect_mode(source, 'writethrough')
    target.kill()
    target = VM(ctx, guest, lun, host='b', incoming=True,
                mode='writethrough')
    migrate(source, target)
    expect_mode(target, 'writethrough')
    guest.wait_writes(200)
    source.quit()
    finish(ctx, lun, guest, target)
