# SPDX-License-Identifier: GPL-2.0-or-later
"""scripts/thinvm-migrate: what an operator migrates with, and what it says
when something is wrong.

Each QEMU has a monitor of its own for the tool, beside the test's.
"""

import json
import os
import pty
import shutil
import signal
import subprocess
import threading

from lib.channel import Channel
from lib.context import TOP, check, wait_for
from lib.guest import Guest
from lib.image import GiB, File, create, require_clean
from lib.load import expect_mode, finish, setup_pair
from lib.node import query_thinvm
from lib.testing import test
from lib.tgt import Target
from lib.vm import VM

TOOL = os.path.join(TOP, 'scripts', 'thinvm-migrate')
SLOW = '256K'               # bytes a second: such a migration does not end
STATUS = {'completed': 0, 'failed': 1, 'refused': 2, 'cancelled': 3}


def monitor(ctx, host):
    """Arguments for a monitor of the tool's own."""
    return ('-chardev', 'socket,id=qmp2,server=on,wait=off,path='
            + ctx.path(host + '.tool'), '-mon', 'chardev=qmp2,mode=control')


def source_pair(ctx, place=None, second=None, **guest):
    """(place, guest, source) with a monitor for the tool."""
    return setup_pair(ctx, place=place, vm_options={
        'extra': monitor(ctx, 'a'), 'second': second}, **guest)


def target_vm(ctx, guest, place, **options):
    return VM(ctx, guest, place, host='b', incoming=True,
              extra=monitor(ctx, 'b'), **options)


class Tool:
    """One run of thinvm-migrate; its progress is in the log directory."""

    def __init__(self, ctx, *args, uri='tcp:127.0.0.1:0'):
        self.ctx = ctx
        self.out = ctx.path(ctx.unique('report'))
        name = ctx.unique('migrate')
        argv = [TOOL, '--source', ctx.path('a.tool'), '--target',
                'unix:' + ctx.path('b.tool'), '--uri', uri, '--json',
                '--observe', '1', *args]
        with open(self.out, 'wb') as out, \
                open(ctx.log_file(name), 'wb') as err:
            self.popen = subprocess.Popen(argv, stdin=subprocess.DEVNULL,
                                          stdout=out, stderr=err)
        self.log_path = os.path.join(ctx.log_dir, name + '.log')
        ctx.cleanup(self.kill)

    def kill(self):
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()

    def said(self, text):
        with open(self.log_path, encoding='utf-8') as log:
            return text in log.read()

    def end(self, result, seconds=180):
        """The report; the tool must end with @result."""
        self.popen.wait(seconds)
        with open(self.out, encoding='utf-8') as file:
            text = file.read()
        self.ctx.log(text)
        check(text, 'thinvm-migrate ended with %s and no report: see %s',
              self.popen.returncode, self.log_path)
        report = json.loads(text)
        check(report['result'] == result, 'the result is %s (%s %s)',
              report['result'], report['message'], report['problems'])
        check(self.popen.returncode == STATUS[result],
              'thinvm-migrate ended with %s', self.popen.returncode)
        check(report['situation'] and report['advice'],
              'the report does not say where the guest is and what to do')
        return report


def expect(report, **wanted):
    for key, value in wanted.items():
        key = key.replace('_', '-')
        check(report[key] == value, '%s is %s instead of %s (%s)', key,
              report[key], value, report.get('situation'))


def source_is_whole(source, guest, nodes=('disk',)):
    """The guest runs on the source as if nothing had been."""
    check(source.status() == 'running', 'the source is %s', source.status())
    for node in nodes:
        expect_mode(source, 'writeback', node=node)
        check(query_thinvm(source.qmp, node)['owner'],
              'the source does not own %s', node)
    guest.wait_writes(200)


def wait_active(vm):
    """Until memory is being sent; it may know of an earlier migration."""
    wait_for(lambda: vm.migration_status() == 'active', 60,
             'the migration is active')


def modes(disk, side):
    return [mode['mode'] for mode in disk['modes'] if mode['side'] == side]


@test(seconds=300)
def moves_a_guest(ctx):
    """Two disks under load through four channels: the report has the modes
    over time, downtime, take-over, cache hits and metadata read."""
    array = Target(ctx)
    lun, second = array.add_lun(4 * GiB), array.add_lun(1 * GiB)
    create(ctx, lun, 4 * GiB)
    create(ctx, second, 1 * GiB)
    _, guest, source = source_pair(ctx, lun, second)
    target = target_vm(ctx, guest, lun, second=second)
    report = Tool(ctx, '--multifd', '4', '--bandwidth', '1G',
                  '--quit-source').end('completed')
    check(source.process.wait(60) == 0, 'the source did not quit')
    guest.attach(target)
    guest.wait_writes(200)
    expect(report, guest_runs='target', problems=[])
    check(report['downtime-ms']['qemu'] > 0 and
          report['downtime-ms']['seen'] > 0, 'no downtime: %s',
          report['downtime-ms'])
    check(len(report['disks']) == 2, 'disks: %s', report['disks'])
    for disk in report['disks']:
        check(modes(disk, 'source') == ['writeback', 'writethrough',
                                        'migration'],
              'modes on the source: %s', disk['modes'])
        check(modes(disk, 'target') == ['migration', 'writeback'],
              'modes on the target: %s', disk['modes'])
        check(disk['preload']['state'] == 'complete',
              'preloading was %s', disk['preload'])
        take = disk['take-over']
        check(take['warm'] and take['ms'] > 0 and
              take['metadata-bytes-read-since'] == 0,
              'the take-over: %s', take)
        check(disk['fencing-after'] == 'reservation', 'fencing: %s', disk)
    first = [disk for disk in report['disks']
             if disk['source-node'] == 'disk'][0]
    check(first['cache-before']['hits'] > 0 and
          first['cache-after']['hits'] > 0, 'cache hits: %s', first)
    finish(ctx, lun, guest, target)
    require_clean(ctx, second)


class Terminal:
    """Standard error of the tool, as a terminal."""

    def __init__(self):
        self._master, self.slave = pty.openpty()
        self.text = b''
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self):
        while True:
            try:
                data = os.read(self._master, 4096)
            except OSError:
                return
            if not data:
                return
            self.text += data

    def close(self):
        """After the end of the tool: all that it has written."""
        if self.slave is not None:
            os.close(self.slave)
            self.slave = None
            self._thread.join(30)
            os.close(self._master)
        return self.text.decode()


@test(seconds=300)
def post_copy_on_a_terminal(ctx):
    """The guest moves before its memory; progress rewrites one line, and the
    report is for people."""
    lun, guest, source = source_pair(ctx)
    target = target_vm(ctx, guest, lun)
    terminal = Terminal()
    ctx.cleanup(terminal.close)
    argv = [TOOL, '--source', ctx.path('a.tool'), '--target',
            ctx.path('b.tool'), '--uri', 'tcp:127.0.0.1:0', '--observe', '0',
            '--bandwidth', '4M', '--postcopy-after', '1']
    with open(ctx.path('report'), 'w+', encoding='utf-8') as out:
        done = subprocess.run(argv, stdout=out, stderr=terminal.slave,
                              timeout=180, check=False)
        out.seek(0)
        report = out.read()
    shown = terminal.close()
    ctx.log(shown + report)
    check(done.returncode == 0, 'thinvm-migrate ended with %d: %s',
          done.returncode, report)
    check('\r  active' in shown and 'post-copy' in shown,
          'the terminal shows %r', shown)
    for line in ('The guest runs on the target.', 'downtime: by QEMU',
                 'source: writethrough', 'take-over   ', 'cache hits  '):
        check(line in report, 'the report lacks "%s"', line)
    guest.attach(target)
    guest.wait_writes(200)
    source.quit()
    finish(ctx, lun, guest, target)


@test(seconds=300)
def cancelled(ctx):
    """Ctrl-C while memory is being sent, and a migration that takes longer
    than allowed: the guest stays where it is."""
    lun, guest, source = source_pair(ctx)
    for how in 'signal', 'timeout':
        target = target_vm(ctx, guest, lun)
        tool = Tool(ctx, '--bandwidth', SLOW,
                    *(('--timeout', '2') if how == 'timeout' else ()))
        wait_active(source)
        expect_mode(source, 'writethrough')
        if how == 'signal':
            tool.popen.send_signal(signal.SIGINT)
        report = tool.end('cancelled')
        check(('not done in 2 s' in report['message']) == (how == 'timeout'),
              'the message is: %s', report['message'])
        expect(report, guest_runs='source')
        source_is_whole(source, guest)
        target.kill()
        os.unlink(ctx.path('b.tool'))
    # While it preloads: nothing was begun.
    target = target_vm(ctx, guest, lun)
    tool = Tool(ctx)
    wait_for(lambda: tool.said('follows the source'), 60, 'it checks')
    tool.popen.send_signal(signal.SIGTERM)
    expect(tool.end('cancelled'), guest_runs='source')
    source_is_whole(source, guest)
    check(target.status() == 'inmigrate', 'the target is %s',
          target.status())
    target.quit()
    finish(ctx, lun, guest, source)


@test(seconds=300)
def the_target_dies(ctx):
    """... while memory is being sent: the guest stays.  And when it has the
    guest: the source has lost the disk, and the report says so."""
    lun, guest, source = source_pair(ctx)
    target = target_vm(ctx, guest, lun)
    tool = Tool(ctx, '--bandwidth', SLOW)
    wait_active(source)
    target.kill()
    report = tool.end('failed')
    expect(report, guest_runs='source')
    expect(report['target'], status='gone')
    check('owns all of its 1 disks' in report['situation'], 'it says: %s',
          report['situation'])
    source_is_whole(source, guest)

    os.unlink(ctx.path('b.tool'))
    target = target_vm(ctx, guest, lun)
    channel = Channel(ctx)
    channel.hold('back')
    tool = Tool(ctx, '--listen', 'unix:' + channel.target_path,
                uri='unix:' + channel.path)
    target.qmp.wait_event('RESUME', 120)
    guest.attach(target)
    guest.wait_writes(200)
    target.kill()
    channel.cut()
    report = tool.end('failed')
    check('lost its disks' in report['situation'] and
          'anew' in report['advice'], 'it says: %s %s', report['situation'],
          report['advice'])
    check([lost['side'] for lost in report['ownership-lost']] == ['source'],
          'lost: %s', report['ownership-lost'])
    source.kill()
    guest.errors.clear()
    require_clean(ctx, lun)


@test(seconds=300)
def the_source_dies(ctx):
    """The guest is nowhere then, and what to do is said."""
    lun, guest, source = source_pair(ctx)
    target = target_vm(ctx, guest, lun)
    tool = Tool(ctx, '--bandwidth', SLOW)
    wait_active(source)
    source.kill()
    report = tool.end('failed')
    expect(report['source'], status='gone')
    check(report['guest-runs'] == 'unknown' and
          'force-takeover=on' in report['advice'], 'it says: %s %s',
          report['situation'], report['advice'])
    target.kill()
    require_clean(ctx, lun)


def refused(ctx, guest, source, place, what, **options):
    """A target with something wrong: nothing is begun, and the reason is
    told."""
    target = target_vm(ctx, guest, place, **options)
    report = Tool(ctx).end('refused')
    target.kill()
    os.unlink(ctx.path('b.tool'))
    said = [problem['what'] for problem in report['problems']]
    check(any(what in text for text in said), 'the problems are: %s', said)
    check(all(problem['todo'] for problem in report['problems']),
          'something lacks advice: %s', report['problems'])
    expect(report, guest_runs='source')
    source_is_whole(source, guest)
    return said


@test(seconds=400)
def the_wrong_target(ctx):
    """Another image; a copy of the right one, as of a snapshot of the array;
    another machine; a disk too few; a page cache in between."""
    array = Target(ctx)
    lun, other, copy = (array.add_lun(1 * GiB) for _ in range(3))
    create(ctx, lun, 1 * GiB)
    create(ctx, other, 1 * GiB)
    _, guest, source = source_pair(ctx, lun, lanes=2, blocks=300)
    said = refused(ctx, guest, source, other, 'the target does not have image')
    check(any('which the source does not have' in text for text in said),
          'the problems are: %s', said)
    shutil.copyfile(lun.path, copy.path)
    refused(ctx, guest, source, copy, 'is not the same device')
    refused(ctx, guest, source, lun, 'memory', memory=160)
    refused(ctx, guest, source, lun, 'which the source does not have',
            second=other)

    class Buffered:
        url = lun.path

        @staticmethod
        def blockdev(node, host='a'):
            del host
            return {'driver': 'file', 'node-name': node,
                    'filename': lun.path}

    refused(ctx, guest, source, Buffered, 'page cache')
    report = Tool(ctx, '--qmp-timeout', '5').end('refused')
    check('cannot talk to the target' in report['message'],
          'the message is: %s', report['message'])
    finish(ctx, lun, guest, source)


@test(seconds=300)
def what_a_page_cache_forbids(ctx):
    """A source whose file goes through the page cache."""
    place = File(ctx, 'image')
    create(ctx, place, 1 * GiB)

    class Buffered(File):
        def blockdev(self, node, host='a'):
            options = super().blockdev(node, host)
            del options['cache']
            return options

    guest = Guest(ctx, lanes=2, blocks=300)
    source = VM(ctx, guest, Buffered(ctx, 'image'), host='a',
                extra=monitor(ctx, 'a'))
    guest.wait_ready()
    guest.start_writing()
    said = refused(ctx, guest, source, place, "the source's disk 'disk'")
    check(any('page cache' in text for text in said), 'the problems: %s',
          said)
    finish(ctx, place, guest, source)


@test(seconds=300)
def a_paused_guest(ctx):
    """It is paused on the target as well, and takes its disks when it goes
    on."""
    lun, guest, source = source_pair(ctx)
    guest.stop_writing()
    source.qmp.cmd('stop')
    target = target_vm(ctx, guest, lun)
    report = Tool(ctx).end('completed')
    expect(report, guest_runs='nowhere')
    check('paused' in report['situation'] and 'cont' in report['advice'],
          'it says: %s %s', report['situation'], report['advice'])
    source.quit()
    guest.attach(target)
    target.qmp.cmd('cont')
    expect_mode(target, 'writeback')
    guest.start_writing()
    guest.wait_writes(200)
    finish(ctx, lun, guest, target)
