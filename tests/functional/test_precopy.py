# SPDX-License-Identifier: GPL-2.0-or-later
"""Hosts that share nothing: the disk by blockdev-precopy over NBD, then the
RAM, while the guest writes."""

from lib.context import check, wait_for
from lib.guest import Guest
from lib.image import GiB, File, create, require_clean
from lib.qmp import QMPError
from lib.testing import ANY, test
from lib.vm import (NODE, VM, begin_migration, finish_migration,
                    wait_migration)

SIZE = GiB // 4


def job_status(vm):
    return {job['id']: job['status']
            for job in vm.qmp.cmd('query-jobs')}.get('move')


def begin_copy(ctx, **options):
    """A writing guest and a job that copies its disk to the other host."""
    here, there = File(ctx, 'here'), File(ctx, 'there')
    create(ctx, here, SIZE)
    create(ctx, there, SIZE)
    guest = Guest(ctx, lanes=4, blocks=400, stride=69632, zero=3, discard=3)
    source = VM(ctx, guest, here)
    guest.wait_ready()
    guest.start_writing()
    guest.wait_writes(500)
    target = VM(ctx, guest, there, host='b', incoming=True)
    path = ctx.path('move')
    target.qmp.cmd('nbd-server-start',
                   addr={'type': 'unix', 'data': {'path': path}})
    target.qmp.cmd('block-export-add', id='move', type='nbd',
                   node_name=NODE, name='disk', writable=True)
    source.qmp.cmd('blockdev-add', driver='nbd', node_name='far',
                   export='disk', server={'type': 'unix', 'path': path})
    source.qmp.cmd('blockdev-precopy', job_id='move', device=NODE,
                   target='far', **options)
    return guest, source, target, there


@test(seconds=300, formats=ANY)
def without_a_pause(ctx):
    """Nobody waits for the job between the storage and the switchover: the
    target's disk has all that the guest had written all the same."""
    guest, source, target, there = begin_copy(ctx)
    wait_for(lambda: job_status(source) == 'ready', 120, 'the job to be ready')
    guest.wait_writes(300)
    begin_migration(source, target)
    finish_migration(source, target)
    guest.wait_writes(300)
    source.qmp.cmd('block-job-cancel', device='move')
    wait_for(lambda: job_status(source) is None, 60, 'the end of the job')
    source.quit()
    target.qmp.cmd('nbd-server-stop')
    guest.stop_writing()
    guest.verify('read by the guest at the other host')
    target.quit()
    require_clean(ctx, there)


@test(seconds=300, formats=ANY)
def not_ready(ctx):
    """A guest does not leave a disk behind that has not been copied."""
    guest, source, target, _ = begin_copy(ctx, speed=65536)
    begin_migration(source, target, return_path=True)
    wait_for(lambda: source.migration_status() in ('failed', 'completed'),
             120, 'an end of the migration')
    check(source.migration_status() == 'failed',
          'the migration went on without the disk')
    target.kill()
    check(source.status() == 'running', 'the source is %s', source.status())
    guest.wait_writes(300)
    try:
        source.qmp.cmd('block-job-cancel', device='move', force=True)
    except QMPError:
        pass                            # it has failed with its target
    wait_for(lambda: job_status(source) is None, 60, 'the end of the job')
    guest.stop_writing()
    guest.verify('read by the guest that stayed')
    source.quit()
