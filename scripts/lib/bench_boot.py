#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
#
# A boot storm: N guests (real ones) that boot
# together from one Debian template on an NBD server whose bytes are counted
# and may be limited.  Five ways:
#
#   plain   overlays on the template, as without a boot cache
#   cache   the same above the boot cache, which records its first boot
#   again   above the boot cache of a publisher that has started anew with
#           the recording of the last "cache" run
#   local   overlays on a copy of the template in the host's memory
#   store   above the boot cache, with the template in the stores of two nodes
#           (driver thinvm-template), of which the one that is read from is
#           killed amid the boot
#
# Bytes are what the server sent; for "store" what publisher and guests say
# that they have read from nodes, in chunks of 64 KiB.  Times are of the slowest
# guest, from its start until it says that it has booted; on a busy machine they
# tell nothing.

import argparse
import fcntl
import itertools
import json
import signal
import statistics
import sys
import time
from pathlib import Path

sys.dont_write_bytecode = True
CHECKOUT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(CHECKOUT / 'tests' / 'functional'))

import boot_template                                        # noqa: E402
from lib.bootcache import Meter, cache_node                 # noqa: E402
from lib.context import (Context, Failure, Process, check,  # noqa: E402
                         wait_for)
from lib.qmp import QMP                                     # noqa: E402
from lib.qsd import StorageDaemon                           # noqa: E402
from lib.templates import StoreCluster                      # noqa: E402

MIB = 1 << 20
WAYS = ('plain', 'cache', 'again', 'local', 'store')
CACHED = ('cache', 'again', 'store')
KILLED_AFTER = 10 * MIB         # read from the store


class Machine:
    """One guest: an overlay of its own over the template."""

    def __init__(self, storm, number, nodes, top):
        ctx = storm.ctx
        self.name = ctx.unique('guest-%d' % number)
        self.console = ctx.path(self.name + '.console')
        overlay = ctx.path(self.name + '.' + storm.args.format)
        ctx.run(ctx.bin('qemu-img'), 'create', '-q', '-f', storm.args.format,
                overlay, str(storm.size))
        nodes = nodes + [
            {'driver': 'file', 'node-name': 'disk-file', 'filename': overlay},
            {'driver': storm.args.format, 'node-name': 'disk',
             'file': 'disk-file', 'backing': top}]
        qmp = ctx.path(self.name + '.qmp')
        argv = [
            ctx.bin('qemu-system-x86_64'), '-nodefaults', '-display', 'none',
            '-no-user-config', '-machine', 'pc,accel=' + storm.args.accel, '-m',
            str(storm.args.memory), '-kernel', storm.kernel, '-initrd',
            storm.initrd, '-append', 'console=ttyS0 quiet no_timer_check '
            'mitigations=off rdinit=/init' + (' storm.verify=1' if storm.args.verify else ''),
            '-serial', 'file:' + self.console,
            '-chardev', 'socket,id=qmp,server=on,wait=off,path=' + qmp,
            '-mon', 'chardev=qmp,mode=control',
            '-device', 'virtio-blk-pci,drive=disk']
        for node in nodes:
            argv += ['-blockdev', json.dumps(node)]
        self.begin = time.monotonic()
        self.process = Process(ctx, self.name, argv)
        self.qmp = QMP(ctx, qmp, self.process)
        self.seconds = None
        self.verify = storm.args.verify

    def line(self, word):
        """The rest of the console's line with @word, or None."""
        self.process.check_alive()
        try:
            with open(self.console, errors='replace') as file:
                for text in file:
                    if word in text and text.endswith('\n'):
                        return text.split(word, 1)[1].strip()
        except FileNotFoundError:
            pass
        return None

    def booted(self):
        if self.seconds is None and self.line('STORM-BOOTED') is not None:
            self.seconds = time.monotonic() - self.begin
            if self.verify:
                # What it reads to verify is not what it reads to boot
                self.qmp.cmd('stop')
        return self.seconds is not None

    def statistics(self):
        infos = self.qmp.cmd('query-thinvm-bootcache')
        return infos[0]['statistics'] if infos else None

    def end(self):
        self.process.kill()
        self.qmp.close()


class Store:
    """The template on two nodes of four, found from a third one."""

    def __init__(self, ctx, image):
        self.cluster = StoreCluster(ctx, {'a': 1, 'b': 1, 'c': 0, 'd': 0},
                                    replicas=2)
        for node in 'ab':
            text = self.cluster.run(node, 'add', '-f', 'raw', str(image))
            self.cluster.serve(node)
        self.digest = text.split()[-1]
        self.killed = None

    def node(self):
        """For --blockdev; all servers are there, then."""
        if self.killed:
            self.cluster.serve(self.killed)
        return {'driver': 'thinvm-template', 'node-name': 'template',
                'digest': self.digest, 'strict': True,
                'hashes': self.cluster.list('a')[0]['hashes'],
                'cluster': self.cluster.config, 'node': 'c',
                'read-only': True}

    def kill(self, publisher):
        """The one that the publisher reads from."""
        source = publisher.qmp.cmd('query-thinvm-template')[0]['source']
        self.killed = 'a' if self.cluster.socket('a') in source else 'b'
        self.cluster.servers[self.killed].kill()


class Storm:
    """What all runs share: the template, its server, the meter."""

    def __init__(self, ctx, args):
        self.ctx = ctx
        self.args = args
        args.directory.mkdir(parents=True, exist_ok=True)
        self.size = args.size * MIB
        self.image = boot_template.make_image(args.directory, self.size)
        self.kernel, self.initrd = boot_template.boot_files(args.directory)
        self.digest = boot_template.digest(args.directory / 'root') \
            if args.verify else None
        server = StorageDaemon(ctx, 'server')
        for node in self.local_nodes(self.image):
            server.qmp.cmd_raw('blockdev-add', node)
        self.export = server.export_nbd('template', writable=False)
        self.socket = ctx.path('cache.sock')
        self.cache_file = ctx.path('cache')
        self.store = Store(ctx, self.image) if 'store' in args.ways else None

    @staticmethod
    def local_nodes(image):
        return [{'driver': 'file', 'node-name': 'template-file',
                 'filename': str(image), 'read-only': True},
                {'driver': 'raw', 'node-name': 'template',
                 'file': 'template-file', 'read-only': True}]

    @staticmethod
    def remote_nodes(meter):
        return [{'driver': 'nbd', 'node-name': 'template', 'read-only': True,
                 'export': 'template',
                 'server': {'type': 'unix', 'path': meter.path}}]

    def publisher(self, nodes, way):
        if way != 'again':
            Path(self.cache_file).unlink(missing_ok=True)
        daemon = StorageDaemon(self.ctx, 'publisher')
        for node in nodes:
            daemon.qmp.cmd_raw('blockdev-add', node)
        daemon.qmp.cmd_raw('blockdev-add', cache_node(
            self.socket, role='publisher', template_id='storm',
            cache_file=self.cache_file, memory_limit=1 << 30))
        return daemon

    def nodes(self, way, meter):
        """The template's nodes, as this way has them"""
        if way == 'local':
            return self.local_nodes(self.local)
        return [self.store.node()] if way == 'store' \
            else self.remote_nodes(meter)

    @property
    def local(self):
        """A copy of the template in memory."""
        path = Path('/dev/shm') / ('storm-%d.raw' % id(self))
        if not path.exists():
            self.ctx.cleanup(path.unlink)
            self.ctx.run('cp', '--sparse=always', str(self.image), str(path))
        return path

    def run(self, way, count):
        """Boot @count guests; what it took, as a dict."""
        meter = Meter(self.ctx, self.export,
                      self.args.rate * MIB if self.args.rate else None)
        nodes, top = self.nodes(way, meter), 'template'
        daemon = None
        if way in CACHED:
            daemon = self.publisher(nodes, way)
            nodes = nodes + [cache_node(self.socket, template_id='storm')]
            top = 'cache'
        machines = [Machine(self, i, nodes, top) for i in range(count)]
        if way == 'store':
            wait_for(lambda: self.read_from_store(daemon, machines) >
                     KILLED_AFTER, self.args.patience, 'the boot is amid')
            self.store.kill(daemon)
        wait_for(lambda: all([m.booted() for m in machines]),
                 self.args.patience, '%d guests have booted' % count, 0.1)
        result = {'way': way, 'guests': count, 'bytes': meter.bytes,
                  'seconds': max(m.seconds for m in machines)}
        if daemon:
            state = daemon.qmp.cmd('query-thinvm-bootcache')[0]['publisher']
            result['publisher'] = state
            result['readers'] = [m.statistics() for m in machines]
        if way == 'store':
            result['bytes'] = self.read_from_store(daemon, machines)
        if self.args.verify:
            self.verify(machines)
        for machine in machines:
            machine.end()
        if daemon:
            daemon.quit()
        return result

    @staticmethod
    def read_from_store(daemon, machines):
        return sum(one.qmp.cmd('query-thinvm-template')[0]['statistics'][
            'remote-bytes'] for one in [daemon, *machines])

    def verify(self, machines):
        for machine in machines:
            machine.qmp.cmd('cont')
        wait_for(lambda: all(m.line('STORM-DIGEST') for m in machines),
                 self.args.patience, 'all guests have read all files', 0.5)
        for machine in machines:
            found = machine.line('STORM-DIGEST')
            check(found == self.digest, '%s has read %s instead of %s',
                  machine.name, found, self.digest)


def median(runs, value):
    return statistics.median(value(r) for r in runs)


def table(results):
    """Medians for each way and number of guests; time as a ratio, too."""
    groups = {}
    for r in results:
        groups.setdefault((r['way'], r['guests']), []).append(r)
    sent = {key: median(runs, lambda r: r['bytes'])
            for key, runs in groups.items()}
    slowest = {key: median(runs, lambda r: r['seconds'])
               for key, runs in groups.items()}
    lines = ['way    guests  MiB sent  of one guest  slowest s   (range)      '
             '  of local  MiB cached']
    for (way, guests), runs in groups.items():
        key, one, local = (way, guests), (way, 1), ('local', guests)
        seconds = [r['seconds'] for r in runs]
        lines.append('%-6s %6d %9.1f %13s %10.1f  %-15s %8s  %10s' % (
            way, guests, sent[key] / MIB,
            '%.3f' % (sent[key] / sent[one]) if sent.get(one) else '-',
            slowest[key], '(%.1f..%.1f)' % (min(seconds), max(seconds)),
            '%.3f' % (slowest[key] / slowest[local])
            if local in slowest else '-',
            '%.1f' % (median(runs, lambda r: r['publisher']['used-bytes']) /
                      MIB) if 'publisher' in runs[0] else '-'))
    return '\n'.join(lines)


def numbers(text):
    return [int(n) for n in text.split(',')]


def parse_args():
    p = argparse.ArgumentParser(
        prog='bench-boot', description='Measure a boot storm.',
        epilog='The template is made once, by debootstrap, as root.')
    p.add_argument('--build', type=Path, default=CHECKOUT / 'build')
    p.add_argument('--directory', type=Path,
                   help='where the template is kept (default: BUILD/boot)')
    p.add_argument('--guests', type=numbers, default=[1, 2, 4, 8],
                   help='how many at a time (default: 1,2,4,8)')
    p.add_argument('--ways', default=','.join(WAYS),
                   help='default: ' + ','.join(WAYS))
    p.add_argument('--runs', type=int, default=1,
                   help='how often; the ways alternate in each (default: 1)')
    p.add_argument('--format', default='thinvm',
                   help='of the overlays (default: thinvm)')
    p.add_argument('--rate', type=int, default=100,
                   help='of the server in MiB/s, 0: any (default: 100)')
    p.add_argument('--size', type=int, default=768,
                   help='of the template in MiB (default: 768)')
    p.add_argument('--memory', type=int, default=256,
                   help='of a guest in MiB (default: 256)')
    p.add_argument('--accel', default='tcg', help='default: tcg')
    p.add_argument('--patience', type=int, default=1800,
                   help='seconds for a boot (default: 1800)')
    p.add_argument('--verify', action='store_true',
                   help='have each guest read all files afterwards')
    p.add_argument('--json', type=Path, help='write all counters there')
    args = p.parse_args()
    args.directory = args.directory or args.build / 'boot'
    args.ways = args.ways.split(',')
    for way in args.ways:
        if way not in WAYS:
            p.error(f'there is no way "{way}", only ' + ', '.join(WAYS))
    if 'again' in args.ways and \
            'cache' not in args.ways[:args.ways.index('again')]:
        p.error('--ways: "again" needs the recording of "cache" before it')
    if args.runs < 1:
        p.error('--runs: at least 1')
    return args


def main():
    args = parse_args()
    results = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    args.directory.mkdir(parents=True, exist_ok=True)
    lock = open(args.build / '.bench-boot.lock', 'w', encoding='utf-8')
    try:
        # Its logs are in one place, and a template is made once
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f'bench-boot: another one runs in {args.build}',
              file=sys.stderr)
        return 1
    with Context('bench-boot', build=str(args.build)) as ctx:
        try:
            storm = Storm(ctx, args)
            for _, count, way in itertools.product(range(args.runs),
                                                   args.guests, args.ways):
                results.append(storm.run(way, count))
                print(table(results[-1:]).splitlines()[-1], flush=True)
        except (Failure, boot_template.TemplateError) as err:
            print(f'bench-boot: {err}', file=sys.stderr)
            return 1
        finally:
            if args.json:
                args.json.write_text(json.dumps(results, indent=1) + '\n')
    print(table(results))
    return 0


if __name__ == '__main__':
    sys.exit(main())
