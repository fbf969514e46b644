#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
#
# The demonstration, after set-up: builds, then tells a story in acts.  Each
# act does something that operators do, on real parts, and checks what it
# claims; the first claim that does not hold ends the demonstration.  It is
# made of the parts of the functional tests (tests/functional/lib), so it can
# be repeated, runs beside other things, and cleans up after itself.

import argparse
import sys
import time
from pathlib import Path

sys.dont_write_bytecode = True
CHECKOUT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(CHECKOUT / 'tests' / 'functional'))

import build as thinvm_build                            # noqa: E402
import demo_report                                      # noqa: E402
from lib.acked import count_lost, write_thousand        # noqa: E402
from lib.contents import scan                       # noqa: E402
from lib.context import Context, check               # noqa: E402
from lib.guest import Guest                             # noqa: E402
from lib.image import (GiB, File, create, info,         # noqa: E402
                       require_clean)
from lib.node import mode_of, query_thinvm, set_mode    # noqa: E402
from lib.qsd import StorageDaemon                       # noqa: E402
from lib.tgt import Target                              # noqa: E402
from lib.vm import (NODE, VM, begin_migration,          # noqa: E402
                    finish_migration, wait_migration)

INTERVAL = 1000             # mapping-flush-interval of the demo, ms
SLOW = 2 << 20              # bytes a second: leaves time to look


class Demo:
    def __init__(self, ctx):
        self.ctx = ctx
        self.begin = time.monotonic()
        self.modes = []             # (seconds, host, mode, what for)
        self.figures = {}
        self.moves = 0
        self.act_name = 'the beginning'

    def act(self, name):
        self.act_name = name
        print('\n== %s' % name, flush=True)

    def say(self, text):
        print('  [%5.1f s] %s' % (time.monotonic() - self.begin, text),
              flush=True)
        self.ctx.log('SAY ' + text)

    def saw_mode(self, vm, host, wanted, moment):
        """Ask the node for its mode; it must be @wanted."""
        end = time.monotonic() + 20
        mode = mode_of(vm.qmp, NODE)
        while mode != wanted and time.monotonic() < end:
            time.sleep(0.05)
            mode = mode_of(vm.qmp, NODE)
        check(mode == wanted, 'host %s, %s: mapping cache in mode %s instead '
              'of %s', host, moment, mode, wanted)
        self.modes.append((time.monotonic() - self.begin, host, mode, moment))
        self.say('host %s: mapping cache in mode %s (%s)'
                 % (host, mode, moment))

    # The acts, in their order.

    def thin_disk(self):
        self.act('1. A thin disk on an iSCSI LUN')
        self.target = Target(self.ctx)
        self.lun = self.target.add_lun(2 * GiB)
        spare = self.target.add_lun(1 * GiB)
        self.say('a target on the loopback has a LUN of 2 GiB: %s'
                 % self.lun.url)
        for lun, size in ((self.lun, 16 * GiB), (spare, 65536 * GiB)):
            begin = time.monotonic()
            create(self.ctx, lun, size)
            seconds = time.monotonic() - begin
            check(info(self.ctx, lun)['virtual-size'] == size,
                  'the disk does not have the size asked for')
            self.say('a disk of %d GiB: made in %d ms, takes %d KiB' % (
                size // GiB, seconds * 1000, lun.used() // 1024))
            self.figures['create %d GiB' % (size // GiB)] = (
                '%d ms, %d KiB' % (seconds * 1000, lun.used() // 1024))

    def guest_writes(self):
        self.act('2. A guest writes to it on host A')
        self.guest = Guest(self.ctx, flush=40, zero=2, discard=2)
        self.vm = VM(self.ctx, self.guest, self.lun, host='a',
                     interval=INTERVAL)
        self.host = 'A'
        self.guest.wait_ready()
        self.say('the guest is up and writes 4 KiB blocks at full speed')
        self.guest.start_writing()
        self.guest.wait_writes(1500)
        self.saw_mode(self.vm, 'A', 'writeback', 'normal work')
        self.say('%d writes acknowledged' % self.guest.acked_count())

    def _incoming(self, host):
        return VM(self.ctx, self.guest, self.lun, host=host.lower(),
                  incoming=True, interval=INTERVAL)

    def cancelled_migration(self):
        self.act('3. A migration that is cancelled')
        target = self._incoming('B')
        begin_migration(self.vm, target, bandwidth=SLOW // 8)
        wait_migration(self.vm, ('active',))
        self.saw_mode(self.vm, self.host, 'writethrough', 'migrating away')
        self.vm.qmp.cmd('migrate_cancel')
        wait_migration(self.vm, ('cancelled',))
        self.saw_mode(self.vm, self.host, 'writeback', 'after the cancel')
        target.kill()
        self.guest.wait_writes(300)
        self.say('the guest goes on where it was')

    def migration(self, host):
        """The guest moves, under load, with nobody touching the modes."""
        target = self._incoming(host)
        self.saw_mode(target, host, 'migration', 'waits for the guest')
        begin = time.monotonic()
        begin_migration(self.vm, target, bandwidth=SLOW)
        wait_migration(self.vm, ('active',))
        self.saw_mode(self.vm, self.host, 'writethrough', 'migrating away')
        self.guest.wait_writes(300)
        figures = finish_migration(self.vm, target)
        self.guest.wait_writes(300)
        self.saw_mode(target, host, 'writeback', 'the guest runs here')
        end = time.monotonic()
        gap = self.guest.longest_gap(begin, end)
        self.say('host %s -> %s: downtime %d ms, longest time without an '
                 'acknowledged write %d ms' % (
                     self.host, host, figures['downtime'], gap * 1000))
        self.moves += 1
        self.figures['migration %d, %s to %s' % (self.moves, self.host,
                                                 host)] = (
            'downtime %d ms, longest write gap %d ms'
            % (figures['downtime'], gap * 1000))
        self.vm.quit()
        self.vm, self.host = target, host

    def migrations(self):
        self.act('4. Live migrations under load, A -> B -> A -> B')
        for host in ('B', 'A', 'B'):
            self.migration(host)
        self.guest.stop_writing()
        acked = self.guest.acked_count()
        self.guest.model.rebase(self.guest.verify('after three migrations'))
        self.say('the guest has read its disk: of %d acknowledged writes '
                 'none is lost' % acked)

    def _crash(self, mode, durable, host):
        guest = self.guest
        set_mode(self.vm.qmp, NODE, mode)
        self.saw_mode(self.vm, self.host, mode, 'set by the operator')
        guest.start_writing()
        guest.wait_writes(2000)
        self.vm.kill()
        acked = guest.acked_count()
        self.say('kill -9 of host %s after %d acknowledged writes'
                 % (self.host, acked))
        require_clean(self.ctx, self.lun)
        found = scan(self.ctx, guest.model, self.lun)
        guest.model.require(found, durable, 'after the crash in ' + mode)
        young = len(guest.model.judge(found, 'acked'))
        guest.model.rebase(found)
        promised = ('of what was acknowledged nothing is lost'
                    if durable == 'acked' else
                    'of what the guest had flushed nothing is lost')
        self.say('%s; check finds no corruption and no leak' % promised)
        self.figures['crash in %s' % mode] = (
            '%d acknowledged, %d of them lost (allowed: %s)' % (
                acked, young, 'none' if durable == 'acked' else
                'what was not flushed'))
        self.vm = VM(self.ctx, guest, self.lun, host=host.lower(),
                     interval=INTERVAL)
        self.host = host
        guest.wait_ready()
        self.say('the guest is up again on host %s' % host)
        guest.verify('read by the guest on host ' + host)

    def crashes(self):
        self.act('5. Hosts die, the guest is started on another')
        self._crash('writeback', 'flushed', 'C')
        self._crash('writethrough', 'acked', 'D')
        self.guest.start_writing()
        self.guest.wait_writes(500)
        self.guest.stop_writing()
        self.guest.verify('at the end')

    def orderly_end(self):
        self.act('6. The end: a clean image')
        stats = query_thinvm(self.vm.qmp, NODE)['statistics']
        self.figures['journal on host %s' % self.host] = (
            '%d records with %d operations, %d checkpoints' % (
                stats['journal-records'], stats['journal-operations'],
                stats['checkpoints']))
        self.vm.quit()
        require_clean(self.ctx, self.lun)
        guest = self.guest
        guest.model.require(scan(self.ctx, guest.model, self.lun),
                            'acked', 'read by qemu-img')
        used = self.lun.used() >> 20
        self.say('check: clean.  Every block is what the guest wrote last.  '
                 'The disk of 16384 MiB takes %d MiB.' % used)
        self.figures['space of the 16 GiB disk'] = '%d MiB' % used

    def _lost_of_thousand(self, fmt, mode, wait):
        """(acknowledged, lost); @wait seconds from the last reply to death."""
        place = File(self.ctx, self.ctx.unique('thousand'))
        create(self.ctx, place, 2 * GiB, fmt)
        daemon = StorageDaemon(self.ctx)
        daemon.add_disk(place, fmt=fmt, mode=mode, interval=INTERVAL)
        acked = write_thousand(self.ctx, daemon)
        time.sleep(wait)
        daemon.kill()
        lost = count_lost(self.ctx, place, acked, fmt)
        if fmt == 'thinvm':
            require_clean(self.ctx, place, fmt)
        return len(acked), lost

    def lost_writes(self):
        self.act('7. 1000 acknowledged writes without a flush, then kill -9 '
                 'of the storage daemon')
        rows = []
        for fmt, mode, wait in (('thinvm', 'writethrough', 0),
                                ('thinvm', 'writeback', 0),
                                ('thinvm', 'writeback', 5),
                                ('qcow2', None, 5)):
            acked, lost = self._lost_of_thousand(fmt, mode, wait)
            label = '%s%s, killed %s' % (
                fmt, ' ' + mode if mode else '',
                '%d s later' % wait if wait else 'at once')
            self.say('%s: %d of %d lost' % (label, lost, acked))
            rows.append((label, acked, lost))
            check(acked == 1000, 'only %d writes were acknowledged', acked)
            if fmt == 'thinvm' and (mode == 'writethrough' or wait):
                check(lost == 0, '%s lost %d acknowledged writes', label,
                      lost)
        self.lost = rows

    def play(self):
        self.thin_disk()
        self.guest_writes()
        self.cancelled_migration()
        self.migrations()
        self.crashes()
        self.orderly_end()
        self.lost_writes()


def prepare(args):
    """Build; False if that failed."""
    try:
        thinvm_build.build(args.build)
        return True
    except (thinvm_build.BuildFailed, OSError) as err:
        print(err)
        print('\ndemo: the build failed; %s/build.log has all of it.'
              % args.build)
        return False


def main():
    parser = argparse.ArgumentParser(
        prog='scripts/demo', description='Set up, build, and show thinvm: '
        'a thin disk on an iSCSI LUN, a guest, live migration, crashes.')
    parser.add_argument('--no-setup', action='store_true',
                        help='do not run scripts/setup first')
    parser.add_argument('--no-build', action='store_true',
                        help='use what is built')
    parser.add_argument('--build', type=Path, default=CHECKOUT / 'build',
                        metavar='DIR')
    args = parser.parse_args()
    args.build = args.build.resolve()
    if not args.no_build and not prepare(args):
        return 1
    logs = args.build / 'demo'
    with Context('demo', build=str(args.build), log_dir=str(logs)) as ctx:
        demo = Demo(ctx)
        try:
            demo.play()
        except Exception as err:
            demo_report.print_failure(demo, err, logs)
            return 1
        text = demo_report.make(demo)
    (logs / 'report.txt').write_text(text, encoding='utf-8')
    print(text)
    print('This report: %s' % (logs / 'report.txt'))
    return 0


if __name__ == '__main__':
    sys.exit(main())
