# SPDX-License-Identifier: GPL-2.0-or-later
"""Hosts die while their guest writes; another host starts it again.

A host's death is kill -9 of QEMU: what was only in its memory is gone, the
array goes on.  What must be there afterwards is invariant 5 of the design:
all that was flushed, in writethrough mode all that was acknowledged, and in
writeback mode all that is older than the flush interval plus a commit.
"""

import time

from lib.context import check
from lib.guest import Guest
from lib.image import GiB, create, require_clean
from lib.load import booted, examine, go_on
from lib.testing import ANY, OURS, THIN, test
from lib.tgt import Target
from lib.vm import VM, begin_migration, finish_migration, wait_migration

NEVER = 600 * 1000         # mapping-flush-interval in ms: not by time
COMMIT_SECONDS = 4          # more than the longest commit on a busy machine


def write_and_crash(ctx, count=1500, **options):
    lun = Target(ctx).add_lun(4 * GiB)
    create(ctx, lun, 4 * GiB)
    guest = Guest(ctx, zero=3, discard=3, flush=20)
    vm = booted(ctx, guest, lun, **options)
    guest.start_writing()
    guest.wait_writes(count)
    vm.kill()
    return lun, guest


@test(formats=ANY)
def flushed_survives(ctx):
    """Writeback: what the guest had flushed is there, and the image is
    clean as it lies."""
    lun, guest = write_and_crash(ctx)
    examine(ctx, guest, lun, 'flushed', 'flushed writes after a crash')
    go_on(ctx, guest, lun)


@test(formats=OURS)
def acknowledged_survives_in_writethrough(ctx):
    """Writethrough: what the guest was told is written is there."""
    lun, guest = write_and_crash(ctx, mode='writethrough')
    examine(ctx, guest, lun, 'acked', 'acknowledged writes after a crash')
    go_on(ctx, guest, lun, mode='writethrough')


@test(formats=OURS)
def old_writes_survive_in_writeback(ctx):
    """Writeback without any guest flush: what is older than the interval
    and a commit is there."""
    interval = 500
    lun = Target(ctx).add_lun(4 * GiB)
    create(ctx, lun, 4 * GiB)
    guest = Guest(ctx, flush=0)
    vm = booted(ctx, guest, lun, interval=interval)
    guest.start_writing()
    guest.wait_writes(1000)
    time.sleep(COMMIT_SECONDS + 1)
    guest.wait_writes(100)
    old = guest.acked_before(time.monotonic() - interval / 1000
                             - COMMIT_SECONDS)
    vm.kill()
    check(sum(old) > 500, 'only %d writes are old enough', sum(old))
    examine(ctx, guest, lun, old, 'old writes after a crash')
    go_on(ctx, guest, lun)


@test(seconds=400, formats=THIN, slow=True)
def again_and_again(ctx):
    """Six crashes, each on the host that took over from the last."""
    lun = Target(ctx).add_lun(4 * GiB)
    create(ctx, lun, 4 * GiB)
    guest = Guest(ctx, zero=2, discard=2, flush=30, blocks=600)
    for turn in range(6):
        vm = booted(ctx, guest, lun, host='ab'[turn % 2])
        guest.start_writing()
        guest.wait_writes(400 + 300 * turn)
        vm.kill()
        examine(ctx, guest, lun, 'flushed', 'after crash %d' % (turn + 1))
    go_on(ctx, guest, lun)


@test(formats=OURS)
def restart_without_a_look(ctx):
    """The next host opens the LUN at once: no check, no repair between."""
    lun, guest = write_and_crash(ctx, mode='writethrough')
    vm = booted(ctx, guest, lun, host='b')
    found = guest.verify('read by the guest on the next host')
    guest.model.rebase(found)
    guest.start_writing()
    guest.wait_writes(300)
    guest.stop_writing()
    guest.verify('written on the next host')
    vm.quit()
    require_clean(ctx, lun)


@test(formats=OURS)
def reset_commits(ctx):
    """A reset of the guest commits: without it, with no flush and no
    commit by time, acknowledged writes would be lost."""
    lun = Target(ctx).add_lun(4 * GiB)
    create(ctx, lun, 4 * GiB)
    guest = Guest(ctx, flush=0, blocks=800)
    vm = booted(ctx, guest, lun, interval=NEVER)
    guest.start_writing()
    guest.wait_writes(600)
    guest.stop_writing()
    vm.qmp.cmd('system_reset')
    guest.wait_ready()
    vm.kill()
    examine(ctx, guest, lun, 'acked', 'acknowledged before the reset')


@test(formats=OURS)
def stop_commits(ctx):
    """Stopping the guest commits, and it goes on after cont."""
    lun = Target(ctx).add_lun(4 * GiB)
    create(ctx, lun, 4 * GiB)
    guest = Guest(ctx, flush=0, blocks=800)
    vm = booted(ctx, guest, lun, interval=NEVER)
    guest.start_writing()
    guest.wait_writes(600)
    vm.qmp.cmd('stop')
    vm.qmp.cmd('cont')
    guest.wait_writes(200)
    guest.stop_writing()
    vm.qmp.cmd('stop')
    vm.kill()
    examine(ctx, guest, lun, 'acked', 'acknowledged before the stop')


@test(formats=OURS, slow=True)
def quit_commits(ctx):
    """An orderly end keeps everything that was acknowledged."""
    lun = Target(ctx).add_lun(4 * GiB)
    create(ctx, lun, 4 * GiB)
    guest = Guest(ctx, flush=0, blocks=800)
    vm = booted(ctx, guest, lun, interval=NEVER)
    guest.start_writing()
    guest.wait_writes(600)
    guest.stop_writing()
    vm.quit()
    examine(ctx, guest, lun, 'acked', 'acknowledged before the end')


@test(seconds=300, formats=OURS)
def source_dies_amid_migration(ctx):
    """The source host is lost while it migrates: the target never starts,
    the guest is started anew, and everything acknowledged since the
    migration began is there, because the source was in writethrough."""
    lun = Target(ctx).add_lun(4 * GiB)
    create(ctx, lun, 4 * GiB)
    guest = Guest(ctx, flush=0)
    source = booted(ctx, guest, lun, interval=NEVER)
    target = VM(ctx, guest, lun, host='b', incoming=True)
    guest.start_writing()
    guest.wait_writes(300)
    begin_migration(source, target, bandwidth=256 << 10)
    wait_migration(source, ('active',))
    guest.wait_writes(300)
    source.kill()
    target.kill()
    examine(ctx, guest, lun, 'acked', 'acknowledged before the crash')
    go_on(ctx, guest, lun)


@test(seconds=300, formats=OURS)
def target_dies_after_migration(ctx):
    """The host that took over dies soon after; a third one goes on."""
    lun = Target(ctx).add_lun(4 * GiB)
    create(ctx, lun, 4 * GiB)
    guest = Guest(ctx, flush=20)
    source = booted(ctx, guest, lun)
    target = VM(ctx, guest, lun, host='c', incoming=True)
    guest.start_writing()
    guest.wait_writes(300)
    begin_migration(source, target)
    finish_migration(source, target)
    source.quit()
    guest.wait_writes(100)
    target.kill()
    examine(ctx, guest, lun, 'flushed', 'flushed before the crash')
    go_on(ctx, guest, lun)
