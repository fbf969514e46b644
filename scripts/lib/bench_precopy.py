#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Measures what it takes to move the disk of a running guest over a link of
# fixed rate: blockdev-precopy beside blockdev-mirror in both of its modes.
#
# A real guest (under TCG) has ext4 and programs that write files through its
# page cache; a third of what had been written was deleted beforehand.  The
# agent of contrib/ runs in it.  The target is a file in a storage daemon at the
# other end of the link (bench_link.py), reached by NBD.  A run: boot, write
# alone, start the job, wait until it is ready or give up, stay ready, complete,
# write on with the target.  Modes take turns; what is told is the median over
# the rounds, and all figures go to --json.
#
# The guest, its programs and its agent are those of the functional tests
# (tests/functional/lib/files.py, tests/functional/guest).

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent.parent
sys.dont_write_bytecode = True
sys.path.insert(0, str(CHECKOUT / 'tests' / 'functional'))

import bench_curves                                     # noqa: E402
import bench_machine                                    # noqa: E402
import bench_precopy_table                              # noqa: E402
from bench_link import Link                             # noqa: E402
from lib.context import Context, Failure, Process, wait_for     # noqa: E402
from lib.files import MIB, FilesGuest, initramfs, partitioned_disk  # noqa: E402
from lib.qmp import QMP                                 # noqa: E402

# What blockdev-mirror calls copy-mode, or options of blockdev-precopy.
# "history" knows what was written, "free" also what the file system does not
# use, "pages" what is dirty in its page cache, "precopy" all of that.
MODES = {
    'mirror-background': 'background',
    'mirror-blocking': 'write-blocking',
    'precopy': {'hints': 'hints', 'trim': True},
    'precopy-history': {},
    'precopy-pages': {'hints': 'hints'},
    'precopy-free': {'trimmed': True},
}
USUAL = ('mirror-background', 'mirror-blocking', 'precopy')

# Files, in parts of --used, and who writes them: KiB of a block, blocks a
# second, order, sync or buffered.  Rates are of a disk of 920 MiB on a link of
# 40 MiB/s, and scaled with the link.
FILES = {'hot': 1 / 32, 'log': 1 / 8, 'cold': 1 / 2, 'rest': 1 / 4}
DATABASE = (('hot', 4, 1500, 'random', 'sync'),
            ('log', 4, 200, 'sequential', 'sync'),
            ('cold', 4, 600, 'random', 'buffered'))


def tenth(loads):
    return tuple((n, k, r / 10, o, s) for n, k, r, o, s in loads)


WORKLOADS = {
    'light': tenth(DATABASE),
    'heavy': DATABASE,
    'idle': (),
    'sequential': (('cold', 64, 160, 'sequential', 'sync'),),
    'random': (('cold', 4, 2000, 'random', 'sync'),),
    'rewriter': tuple((n, 256, 120, 'sequential', 'sync')
                      for n in ('hot', 'cold', 'rest')),
    'no-agent': tenth(DATABASE),
}
SCALE = 40 * MIB


class Run:
    """One disk, one guest, one job."""

    def __init__(self, opts, ctx, mode, workload):
        self.opts, self.ctx, self.mode = opts, ctx, mode
        self.workload = workload
        self.samples = []           # (s, bytes sent, writes, slowest us)
        self.link = self.guest = None

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        if self.link:
            self.link.close()

    def boot(self, boot):
        ctx = self.ctx
        self.link = Link(self.opts.rate)
        source, target = ctx.path('source'), ctx.path('target')
        subprocess.run(['cp', '--sparse=always', self.opts.image, source],
                       check=True)
        with open(target, 'wb') as f:
            f.truncate(self.opts.size)
        path = ctx.path('far.qmp')
        self.far = Process(ctx, 'far', self.link.there([
            ctx.bin('qemu-storage-daemon'), '--chardev',
            f'socket,id=m,path={path},server=on,wait=off', '--monitor', 'm',
            '--blockdev', json.dumps({
                'driver': 'raw', 'node-name': 'far', 'discard': 'unmap',
                'file': {'driver': 'file', 'filename': target,
                         'discard': 'unmap'}})]))
        qmp = QMP(ctx, path, self.far)
        qmp.cmd('nbd-server-start', addr={
            'type': 'inet', 'data': {'host': self.link.address,
                                     'port': self.link.server()['port']}})
        qmp.cmd('block-export-add', id='e', type='nbd', node_name='far',
                name='disk', writable=True)
        self.guest = FilesGuest(ctx, [(source, 'disk')], memory=512,
                                hints_object='hints', boot=boot)
        self.guest.ask('vm dirty_expire_centisecs %d' %
                       (self.opts.expire * 100))
        self.guest.ask('vm dirty_ratio 60')
        self.guest.ask('vm dirty_background_ratio 40')
        self.guest.ask('mount /dev/vda1 /mnt')

    def load(self):
        for name, kib, rate, order, sync in WORKLOADS[self.workload]:
            self.guest.ask('load /mnt/%s %d %d %d %s %s' % (
                name, max(self.opts.used * FILES[name] // MIB, 1), kib,
                max(rate * self.opts.rate / SCALE, 1), order, sync))

    def start_job(self):
        cmd = self.guest.qmp.cmd
        cmd('blockdev-add', driver='nbd', node_name='target', export='disk',
            server=self.link.server(), discard='unmap')
        job = {'job_id': 'job', 'device': 'disk0', 'target': 'target',
               'auto_dismiss': False,
               'auto_finalize': not self.opts.verify}
        options = MODES[self.mode]
        if isinstance(options, str):
            cmd('blockdev-mirror', sync='full', copy_mode=options, **job)
            return
        options = dict(options)
        if options.pop('trimmed', False):
            self.guest.ask('trim /mnt')
        cmd('blockdev-precopy', **options, **job)

    def sample(self):
        writes, slowest = map(int, self.guest.ask('report').split())
        self.samples.append((time.monotonic(), self.link.carried(), writes,
                             slowest))

    def watch(self, seconds, status=None):
        """For some time, or until the job is there; whether it is."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if status:
                job, = self.guest.qmp.cmd('query-jobs')
                if 'error' in job:
                    raise Failure('the job: ' + job['error'])
                if job['status'] == status:
                    return True
            if time.monotonic() - self.samples[-1][0] >= 0.5:
                self.sample()
            time.sleep(0.02)
        return False

    def cpu(self):
        """Seconds that QEMU's threads beside the guest's CPU have used."""
        guest = {str(c['thread-id'])
                 for c in self.guest.qmp.cmd('query-cpus-fast')}
        ticks = 0
        for task in Path(
                f'/proc/{self.guest.process.popen.pid}/task').iterdir():
            if task.name not in guest:
                words = (task / 'stat').read_text().rpartition(')')[2].split()
                ticks += int(words[11]) + int(words[12])
        return ticks / os.sysconf('SC_CLK_TCK')

    def over(self, begin, end):
        """(writes a second, slowest fsync in s) of a time."""
        part = [s for s in self.samples if begin < s[0] <= end]
        return (sum(s[2] for s in part) / (end - begin) if end > begin else 0,
                max((s[3] for s in part), default=0) / 1e6)

    def complete(self, figures):
        cmd = self.guest.qmp.cmd
        begin = time.monotonic()
        cmd('job-complete', id='job')
        last = 'pending' if self.opts.verify else 'concluded'
        if not self.watch(self.opts.give_up, last):
            raise Failure(f'{self.mode}: the job does not end')
        figures['hand-over'] = time.monotonic() - begin
        self.statistics(figures)
        self.agent(figures)
        if self.opts.verify:
            done = subprocess.run(['cmp', self.ctx.path('source'),
                                   self.ctx.path('target')], check=False)
            if done.returncode:
                raise Failure(f'{self.mode}: source and target differ')
            cmd('job-finalize', id='job')
            self.watch(self.opts.give_up, 'concluded')
        figures['MiB'] = (self.link.carried() - self.before) / MIB

    def statistics(self, figures):
        """What precopy says of itself, in MiB."""
        events = [e['data']['statistics'] for e in self.guest.qmp.events
                  if e['event'] == 'BLOCKDEV_PRECOPY_COMPLETED']
        for name, value in (events or [{}])[-1].items():
            if name.startswith(('sent', 'resent', 'spared', 'written')):
                figures[name] = value / MIB

    def used(self, disk):
        """MiB that a file system needs: what is there when it has let go of
        all the rest."""
        for command in ('unload', 'sync', 'trim /mnt', 'sync'):
            self.guest.ask(command)
        return os.stat(self.ctx.path(disk)).st_blocks * 512 / MIB

    def agent(self, figures):
        """What the object has heard of the guest's agent."""
        info, = self.guest.qmp.cmd('query-thinvm-hints')
        self.ctx.log('hints: %s' % info)
        figures['trimmed'] = info['trimmed'] / MIB
        if info['written']:
            figures['agent CPU s/GiB'] = (info['cpu-us'] / 1e6 /
                                          (info['written'] / 1024 / MIB))

    def end(self, figures):
        """Ready, hand-over, and the disk at the other end of the link."""
        for name, do in (
                ('ready', lambda: self.watch(self.opts.alone / 2)),
                # What waited for the hand-over has ended soon after it
                ('hand-over', lambda: (self.complete(figures),
                                       self.watch(0.2))),
                ('after', lambda: self.watch(1))):
            begin = time.monotonic()
            do()
            self.sample()
            figures['fsync ' + name] = self.over(begin, time.monotonic())[1]

    def measure(self):
        opts, figures = self.opts, {}
        self.samples = [(time.monotonic(), self.link.carried(), 0, 0)]
        self.load()
        self.watch(opts.warm_up)
        self.sample()
        begin = time.monotonic()
        self.watch(opts.alone)
        self.sample()
        alone, calm = self.over(begin, time.monotonic())
        self.before, start = self.link.carried(), time.monotonic()
        host = self.cpu()
        self.start_job()
        ready = self.watch(opts.give_up, 'ready')
        self.sample()
        now = time.monotonic()
        rate, slowest = self.over(start, now)
        figures.update({
            'ready': now - start if ready else None,
            'MiB at ready': (self.link.carried() - self.before) / MIB,
            'guest': rate / alone if alone else 1,
            'host CPU': self.cpu() - host,
            'fsync alone': calm, 'fsync': slowest})
        if ready:
            self.end(figures)
        self.sample()
        figures['slowest'] = self.over(start, time.monotonic())[1]
        figures['used'] = self.used('target' if ready else 'source')
        if ready:
            figures['of used'] = figures['MiB'] / figures['used']
        figures['curve'] = [
            (round(t - start, 2), (n - self.before) / MIB, w)
            for t, n, w, _ in self.samples]
        return figures


def make_image(opts, ctx, boot):
    """A disk whose guest has written files and deleted a third of it."""
    image = partitioned_disk(ctx, 'image', opts.size)
    guest = FilesGuest(ctx, [(image, 'disk')], boot=boot)
    guest.ask('mount /dev/vda1 /mnt')
    for name, part in FILES.items():
        for piece in ('gone-' + name, name):
            length = opts.used * part
            length = int(length / 2 if piece != name else length)
            guest.ask('write /mnt/%s 0 %d' % (piece, length))
    guest.ask('sync')
    for name in FILES:
        guest.ask('delete /mnt/gone-' + name)
    guest.ask('umount /mnt')
    guest.poweroff()
    opts.image = image


def context(opts, name):
    return Context('bench-precopy-' + name, build=opts.build,
                   log_dir=os.path.join(opts.logs, name))


def one(opts, mode, workload, boot):
    with context(opts, f'{workload}-{mode}') as ctx:
        with Run(opts, ctx, mode, workload) as run:
            run.boot(boot)
            return run.measure()


def median(values):
    known = [v for v in values if v is not None]
    # Not ready more often than not is not ready
    return statistics.median(known) if 2 * len(known) > len(values) else None


COLUMNS = (('ready', 's', 2), ('hand-over', 's', 2), ('MiB at ready', '', 0),
           ('MiB', '', 0), ('of used', '', 2), ('guest', '', 2),
           ('host CPU', 's', 2), ('fsync alone', 's', 3), ('slowest', 's', 3))
MORE = ('resent', 'written-through', 'spared-discarded', 'spared-history',
        'spared-hints', 'trimmed')


def report(workload, results):
    print(f'\n{workload:18}' + ''.join(f'{name:>13}' for name, _, _ in COLUMNS))
    for mode, runs in results.items():
        line = f'{mode:18}'
        for name, unit, digits in COLUMNS:
            value = median([r.get(name) for r in runs])
            text = 'never' if value is None else f'{value:.{digits}f}{unit}'
            line += f'{text:>13}'
        print(line)
        more = {name: median([r.get(name) for r in runs]) for name in MORE}
        if any(more.values()):
            print(' ' * 18 + '  MiB ' + ', '.join(
                f'{name} {value:.1f}' for name, value in more.items()
                if value is not None))
    sys.stdout.flush()


def parse():
    p = argparse.ArgumentParser(
        description='Moves the disk of a guest that writes over a link of '
        'fixed rate, with blockdev-precopy and with blockdev-mirror.')
    p.add_argument('--build', type=Path, default=CHECKOUT / 'build')
    p.add_argument('--directory', default='/dev/shm',
                   help='where the disks are made (default: %(default)s)')
    p.add_argument('--size', type=int, default=1024, metavar='MIB',
                   help='of the disk (default: %(default)s)')
    p.add_argument('--used', type=int, default=400, metavar='MIB',
                   help='of it at the beginning (default: %(default)s)')
    p.add_argument('--rate', type=float, default=20, metavar='MIB',
                   help='of the link, a second (default: %(default)s)')
    p.add_argument('--runs', type=int, default=5)
    p.add_argument('--warm-up', type=float, default=3, metavar='SECONDS',
                   help='of writing before anything is measured')
    p.add_argument('--alone', type=float, default=6, metavar='SECONDS',
                   help='of writing without a job, and half of that while it '
                   'is ready (default: %(default)s)')
    p.add_argument('--expire', type=float, default=30, metavar='SECONDS',
                   help='after which the guest writes what is dirty in its '
                   'page cache (default: %(default)s)')
    p.add_argument('--give-up', type=float, default=90, metavar='SECONDS',
                   help='how long a job may take to be ready '
                   '(default: %(default)s)')
    p.add_argument('--workload', choices=WORKLOADS, action='append')
    p.add_argument('--mode', choices=MODES, action='append',
                   help=f'(default: {", ".join(USUAL)})')
    p.add_argument('--limit', type=float, default=3600, metavar='SECONDS',
                   help='begin no round after this time '
                   '(default: %(default)s)')
    p.add_argument('--verify', action='store_true',
                   help='compare both sides at the end of each job, which '
                   'keeps the guest waiting')
    p.add_argument('--quick', action='store_true',
                   help='small and short, two minutes at most: shows that it '
                   'works, not more')
    p.add_argument('--keep', action='store_true',
                   help='keep the logs, below /var/tmp')
    p.add_argument('--json', type=Path, help='all figures, to this file')
    p.add_argument('--table', type=Path, metavar='JSON',
                   help='measure nothing; print what was measured as a table '
                   'for the documentation')
    p.add_argument('--svg', type=Path, metavar='DIRECTORY',
                   help='draw bytes and guest over time, a file for each '
                   'workload')
    opts = p.parse_args()
    if opts.quick:
        opts.size, opts.used, opts.runs = 512, 100, 1
        opts.warm_up, opts.alone, opts.give_up = 1, 2, 15
        opts.workload = opts.workload or ['light']
        opts.limit = min(opts.limit, 60)
    if min(opts.size, opts.used, opts.rate, opts.runs) <= 0 or \
            opts.used * 2 > opts.size:
        p.error('numbers must be positive, and --used half of --size at most')
    opts.size *= MIB
    opts.used *= MIB
    opts.rate *= MIB
    return opts


def work(opts, everything):
    """Rounds go over all workloads, so that a limit costs rounds."""
    end = time.monotonic() + opts.limit
    with context(opts, 'image') as ctx:
        boots = {agent: initramfs(ctx, agent) for agent in (True, False)}
        make_image(opts, ctx, boots[True])
        for number in range(opts.runs):
            for workload, results in everything.items():
                for mode, runs in results.items():
                    if number and time.monotonic() > end:
                        print(f'no time left after {number} rounds')
                        return
                    print(f'{workload} {mode}', file=sys.stderr, flush=True)
                    runs.append(one(opts, mode, workload,
                                    boots[workload != 'no-agent']))


def main():
    opts = parse()
    if opts.table:
        measured = json.loads(opts.table.read_text(encoding='utf-8'))
        print('\n'.join(bench_precopy_table.table(measured)))
        return
    os.environ['TMPDIR'] = opts.directory
    opts.logs = tempfile.mkdtemp(prefix='bench-precopy-', dir='/var/tmp')
    everything = {w: {m: [] for m in opts.mode or USUAL}
                  for w in opts.workload or WORKLOADS}
    try:
        work(opts, everything)
    except (Failure, bench_machine.Failure, OSError) as e:
        sys.exit(f'bench-precopy: {e}; logs are in {opts.logs}')
    if not opts.keep:
        shutil.rmtree(opts.logs, ignore_errors=True)
    for workload, results in everything.items():
        if all(results.values()):
            report(workload, results)
    if opts.json:
        opts.json.write_text(json.dumps({
            'size': opts.size, 'used': opts.used, 'rate': opts.rate,
            'expire': opts.expire,
            'workloads': everything}, indent=1) + '\n', encoding='utf-8')
    if opts.svg:
        for workload, results in everything.items():
            if all(results.values()):
                (opts.svg / f'precopy-{workload}.svg').write_text(
                    bench_curves.svg(workload, results), encoding='utf-8')


if __name__ == '__main__':
    main()
