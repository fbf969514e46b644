# SPDX-License-Identifier: GPL-2.0-or-later
"""A hundred migrations to and fro of a guest that writes at full speed.

Plain ones, with several channels (multifd) and with the memory behind
(post-copy) take turns.  Some are sabotaged at any moment: a side dies, the
wire breaks, the operator cancels, the array is away for a moment, the device
fails under the side that takes over.  Whatever happens, at most one side has
the disk; the guest goes on where the disk is, or, if its memory is gone,
boots from the disk on another host; nothing that was promised is lost, and
the image is clean.
"""

import random
import time

from lib.channel import Channel
from lib.context import Failure, check
from lib.image import GiB, create
from lib.load import expect_mode, setup_pair
from lib.node import query_thinvm
from lib.qmp import QMPClosed, QMPError
from lib.testing import test
from lib.tgt import Target
from lib.vm import NODE, VM, begin_migration, finish_migration
from test_migration_kills import GUEST, Scene
from test_migration_special import Unclaimable

KINDS = ({}, {'multifd': True}, {'postcopy': True})
# Bytes a second of one that is sabotaged, and at the latest when, in seconds:
# a slow one is caught with its memory under way, a fast one about the switch.
PACES = ((4 << 20, 3), (32 << 20, 2), (1 << 30, 0.7))
QUIET = 8                   # seconds without a change: nobody will decide it


class Journey(Scene):
    def __init__(self, ctx):
        self.array = Target(ctx)
        lun = self.array.add_lun(4 * GiB)
        create(ctx, lun, 4 * GiB)
        self.ctx, self.options = ctx, {}
        self.lun, self.guest, self.source = setup_pair(ctx, place=lun,
                                                       **GUEST)
        self.target = self.channel = None
        self.hosts = 0

    def begin(self, kind, place=None, **pace):
        self.target = VM(self.ctx, self.guest, place or self.lun,
                         host=self.next_host(), incoming=True)
        # One wire carries one connection; multifd makes several.
        self.channel = None if 'multifd' in kind else Channel(self.ctx)
        begin_migration(self.source, self.target, return_path=True,
                        channel=self.channel, **kind, **pace)
        if 'postcopy' in kind:
            self.start_postcopy()

    def start_postcopy(self):
        try:
            self.source.qmp.cmd('migrate-start-postcopy')
        except QMPError:
            pass                        # it has not begun, or is done already

    def cut(self):
        if self.channel:
            self.channel.cut()

    def undisturbed(self, kind):
        self.begin(kind)
        finish_migration(self.source, self.target)
        expect_mode(self.target, 'writeback')
        self.guest.wait_writes(100)
        self.source.quit()
        self.source = self.target

    def sabotaged(self, kind, how):
        place = None
        if how == 'device':
            # What else is written may be the guest's, which would be told
            place = Unclaimable(self.lun, 'thinvm_claim_write', True)
        # None is for post-copy, whose source has memory that the guest needs
        if how in ('cut', 'cancel', 'source'):
            kind = {}
        bandwidth, latest = random.choice(PACES)
        self.begin(kind, place, bandwidth=bandwidth)
        time.sleep(random.random() * latest)
        self.ctx.log('%s: source %s, target %s before' % (
            how, self.look(self.source), self.look(self.target)))
        getattr(self, 'do_' + how)()
        if self.source.process.alive():
            self.source.qmp.cmd('migrate-set-parameters',
                                max_bandwidth=1 << 32)
        self.settle(how)

    def do_source(self):
        self.source.kill()

    def do_target(self):
        self.target.kill()

    def do_cut(self):
        self.channel.cut()

    def do_cancel(self):
        self.source.qmp.cmd('migrate_cancel')

    def do_array(self):
        self.array.stop()
        time.sleep(0.5)
        self.array.restart()

    def do_device(self):
        pass                            # it comes by itself

    @staticmethod
    def look(vm):
        """(status, migration's status, has the disk); None of the dead."""
        if not vm.process.alive():
            return None
        try:
            return (vm.status(), vm.migration_status(),
                    query_thinvm(vm.qmp, NODE)['owner'])
        except (QMPClosed, BrokenPipeError):
            return None

    def settle(self, how):
        """Until it is clear who goes on."""
        both = 0
        quiet = time.monotonic() + QUIET
        end = time.monotonic() + 180
        seen = None
        while time.monotonic() < end:
            target, source = self.look(self.target), self.look(self.source)
            if (source, target) != seen:
                self.ctx.log('%s: source %s, target %s' % (how, source,
                                                           target))
                seen = source, target
                quiet = time.monotonic() + QUIET
            # One after the other was asked; between, it may have moved.
            both = both + 1 if source and target and source[2] and \
                target[2] else 0
            check(both < 5, '%s: both sides have the disk', how)
            if self.decided(how, source, target):
                return
            if time.monotonic() > quiet and self.stuck(how, source, target):
                return
            time.sleep(0.1)
        raise Failure('%s: nobody goes on: source %s, target %s' % (
            how, source, target))

    def decided(self, how, source, target):
        if target and target[0] == 'running' and target[2]:
            if source and source[1] not in ('completed', 'failed',
                                            'cancelled'):
                return False            # post-copy, or about to be told
            self.leave(self.source)
            self.goes_on(self.target)
            return True
        if source and source[0] == 'running' and source[2] and \
                source[1] in ('failed', 'cancelled'):
            self.leave(self.target)
            self.goes_on(self.source)
            return True
        if not source and not target:
            self.anew(how)
            return True
        return False

    def stuck(self, how, source, target):
        """Nothing moves any more."""
        if source and source[1] == 'completed' and \
                not (target and target[2]):
            # The target could not take the disk, or is dead.
            self.leave(self.target)
            try:
                self.source.qmp.cmd('cont')
            except QMPError as err:
                self.ctx.log('cont is refused: ' + err.desc)
                self.anew(how)
            else:
                self.goes_on(self.source)
            return True
        if not (source and target) or not (source[2] or target[2]) or \
                'postcopy' in str(source[1]):
            self.anew(how)              # the guest's memory is gone
            return True
        return False

    def leave(self, vm):
        vm.kill()
        self.cut()
        self.guest.errors.clear()

    def goes_on(self, vm):
        self.guest.attach(vm)
        self.source = vm
        expect_mode(vm, 'writeback')
        self.guest.wait_writes(100)

    def anew(self, how):
        for vm in (self.source, self.target):
            vm.kill()
        self.cut()
        self.channel = Channel(self.ctx)
        self.restart('flushed', how)


def journey(ctx, turns, sabotages):
    scene = Journey(ctx)
    ways = ('target', 'source', 'cut', 'cancel', 'array', 'device')
    when = dict(zip(sorted(random.sample(range(turns), sabotages)),
                    [ways[n % len(ways)] for n in range(sabotages)]))
    begin = time.monotonic()
    for turn in range(turns):
        kind = KINDS[turn % len(KINDS)]
        ctx.log('migration %d, %s: %s' % (turn, kind,
                                          when.get(turn, 'undisturbed')))
        if turn in when:
            scene.sabotaged(kind, when[turn])
        else:
            scene.undisturbed(kind)
    ctx.log('%d migrations, %d of them sabotaged, in %.0f s' % (
        turns, sabotages, time.monotonic() - begin))
    scene.finish()


@test(seconds=600, slow=True)
def nine(ctx):
    """Each kind of migration and each kind of sabotage, once or more."""
    journey(ctx, 9, 6)


@test(seconds=7200, slow=True)
def hundred(ctx):
    """A hundred, of which twenty are sabotaged."""
    journey(ctx, 100, 20)
