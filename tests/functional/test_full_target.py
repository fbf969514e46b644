# SPDX-License-Identifier: GPL-2.0-or-later
"""A volume that is full is the target of a job, while a guest writes to the
source: the job waits, the guest does not, and nothing is lost."""

import time

from lib.context import check, wait_for
from lib.guest import Guest
from lib.image import GiB, MiB, File, create, require_clean
from lib.testing import test
from lib.vm import VM
from test_full_volume import Volume

STEP = 8 * MiB
WAITING = ('paused', 'standby')


class Move:
    """A guest, its disk, and a job that copies that to a small volume."""

    def __init__(self, ctx, command, **options):
        self.ctx = ctx
        self.source = File(ctx, 'source')
        create(ctx, self.source, GiB)
        self.volume = Volume(ctx, 'target', 'there')
        self.guest = Guest(ctx, lanes=8, blocks=400, zero=2, discard=2)
        self.vm = VM(ctx, self.guest, self.source)
        self.volume.qmp = self.vm.qmp
        self.guest.wait_ready()
        self.guest.start_writing()
        self.guest.wait_writes(1500)
        for node in self.volume.nodes():
            self.vm.qmp.cmd_raw('blockdev-add', node)
        self.vm.qmp.cmd(command, job_id='move', device='disk', target='there',
                        **options)

    def status(self):
        jobs = self.vm.qmp.cmd('query-jobs')
        for job in jobs:
            check('error' not in job, 'the job failed: %s', job)
        return jobs[0]['status'] if jobs else None

    def waiting(self):
        status = self.status()
        check(status, 'the job is gone')
        return status in WAITING

    def wait_full(self):
        wait_for(self.waiting, 180, 'the job waits')
        error = self.vm.qmp.wait_event('BLOCK_JOB_ERROR', 20)['data']
        check(error['action'] == 'stop' and error['operation'] == 'write',
              'the event is %s', error)
        check(self.volume.info()['device-free'] < MiB, 'there is space')
        self.guest.wait_writes(100)
        self.guest.no_errors()

    def extend(self, size=STEP):
        self.volume.extend(size)
        self.vm.qmp.events.clear()
        self.vm.qmp.cmd('block-job-resume', device='move')

    def finish(self):
        """The job ends well, and the guest goes on with the copy."""
        self.extend(GiB)
        end = time.monotonic() + 180
        while self.status() != 'ready':
            check(time.monotonic() < end, 'the job is %s', self.status())
            time.sleep(0.05)
        self.vm.qmp.cmd('block-job-complete', device='move')
        wait_for(lambda: self.status() is None, 120, 'the end of the job')
        done = self.vm.qmp.wait_event('BLOCK_JOB_COMPLETED', 20)['data']
        check('error' not in done, 'the job ends with %s', done)
        self.guest.wait_writes(300)
        self.guest.stop_writing()
        self.guest.verify('on the volume')
        self.vm.quit()
        self.volume.check_clean()


def waits(ctx, command, **options):
    move = Move(ctx, command, **options)
    for _ in range(4):
        move.wait_full()
        move.extend()
    move.wait_full()
    move.finish()


@test(seconds=600)
def mirror(ctx):
    waits(ctx, 'blockdev-mirror', sync='full', on_target_error='enospc')


@test(seconds=600)
def mirror_through(ctx):
    """The guest's writes go to both, and are no errors for it."""
    waits(ctx, 'blockdev-mirror', sync='full', on_target_error='enospc',
          copy_mode='write-blocking')


@test(seconds=600)
def precopy(ctx):
    """It waits for space without being told to."""
    waits(ctx, 'blockdev-precopy')


@test(seconds=600)
def precopy_cancelled(ctx):
    """It is given up while it waits: the guest keeps its disk, the volume is
    sound and can be closed."""
    move = Move(ctx, 'blockdev-precopy')
    move.wait_full()
    move.vm.qmp.cmd('block-job-cancel', device='move', force=True)
    wait_for(lambda: move.status() is None, 60, 'the end of the job')
    move.guest.wait_writes(300)
    for node in reversed(move.volume.nodes()):
        move.vm.qmp.cmd('blockdev-del', node_name=node['node-name'])
    move.volume.check_clean()
    move.guest.stop_writing()
    move.guest.verify('on the source')
    move.vm.quit()
    require_clean(ctx, move.source)
