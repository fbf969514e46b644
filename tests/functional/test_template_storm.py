# SPDX-License-Identifier: GPL-2.0-or-later
"""A boot storm on a cluster of four nodes, with a network between them.

Real guests, with the boot cache above the driver thinvm-template, boot from a
Debian root file system; the node that they read from loses its power amid the
storm.  Each guest reads all programs, and the digest that it prints is compared
with that of the files that the template was made of; afterwards every byte of
what each node reads is compared.
"""

import fcntl
import hashlib
import json
import os
import sys
from pathlib import Path

from lib.bootcache import cache_node
from lib.context import TOP, Failure, check, wait_for
from lib.image import MiB
from lib.netcluster import NetCluster
from lib.qmp import QMP
from lib.templates import damage
from lib.testing import test

sys.path.append(os.path.join(TOP, 'scripts', 'lib'))

import boot_template                                        # noqa: E402

SIZE = 768 * MiB
CHUNK = 64 * 1024               # of a template of that size, by default
RATE = 24                       # MiB/s of each node
CUT_AFTER = 16 * MiB            # read from other nodes


class Debian:
    """The template, made once in the build directory."""

    def __init__(self, ctx):
        ctx.need('debootstrap', 'debootstrap')
        where = Path(ctx.build) / 'boot'
        where.mkdir(exist_ok=True)
        with open(Path(ctx.build) / '.bench-boot.lock', 'w',
                  encoding='utf-8') as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                self.image = str(boot_template.make_image(where, SIZE))
                self.kernel, self.initrd = boot_template.boot_files(where)
            except boot_template.TemplateError as err:
                raise Failure(str(err)) from None
        self.files = boot_template.digest(where / 'root',
                                          boot_template.QUICKLY_VERIFIED)
        with open(self.image, 'rb') as file:
            self.digest = 'sha256:' + hashlib.file_digest(
                file, 'sha256').hexdigest()

    def damaged_chunk(self):
        """Of its files: one that no chunk of zeroes is like."""
        with open(self.image, 'rb') as file:
            for number in range(64, SIZE // MiB):
                file.seek(number * MiB)
                if file.read(MiB).count(0) < MiB // 2:
                    return number * MiB
        raise Failure('the template is empty')


class Host:
    """A node that guests run on: its publisher, then its guests."""

    def __init__(self, cluster, node, debian, hashes, **options):
        ctx = cluster.ctx
        self.cluster, self.node, self.debian = cluster, node, debian
        self.socket = ctx.path(node + '.cache')
        self.template = {
            'driver': 'thinvm-template', 'node-name': 'template',
            'digest': debian.digest, 'hashes': hashes, 'strict': True,
            'cluster': cluster.config, 'node': node, 'read-only': True,
            'timeout': 2000, 'retry': 600}
        path = ctx.path(node + '.publisher')
        self.process = cluster.process(node, 'publisher-' + node, [
            ctx.bin('qemu-storage-daemon'), '--chardev',
            'socket,id=qmp,server=on,wait=off,path=' + path,
            '--monitor', 'chardev=qmp'])
        self.qmp = QMP(ctx, path, self.process)
        self.qmp.cmd_raw('blockdev-add', {**self.template, **options})
        self.qmp.cmd_raw('blockdev-add', cache_node(
            self.socket, role='publisher', template_id=debian.digest,
            memory_limit=1 << 30))
        self.guests = []

    def boot(self, count):
        self.guests = [Guest(self, number) for number in range(count)]

    def info(self):
        return self.qmp.cmd('query-thinvm-template')[0]

    def source(self):
        info = self.info()
        return next((row['cluster-node'] for row in info['replicas']
                     if row['place'] == info.get('source')), None)

    def compare(self):
        """All of what it reads, with what the template was made of; what the
        driver said meanwhile."""
        ctx = self.cluster.ctx
        return ctx.run(*self.cluster.there(self.node, [
            ctx.bin('qemu-img'), 'compare', 'json:' + json.dumps(
                {'driver': 'raw', 'file': {
                    key: value for key, value in self.template.items()
                    if key not in ('node-name', 'read-only')}}),
            self.debian.image]), seconds=900)

    def remote_bytes(self):
        return self.info()['statistics']['remote-bytes']


class Guest:
    def __init__(self, host, number):
        ctx = host.cluster.ctx
        self.name = 'guest-%s%d' % (host.node, number)
        self.debian = host.debian
        self.console = ctx.path(self.name + '.console')
        overlay = ctx.path(self.name + '.img')
        ctx.run(ctx.bin('qemu-img'), 'create', '-q', '-f', 'thinvm', overlay,
                str(SIZE))
        qmp = ctx.path(self.name + '.qmp')
        argv = [
            ctx.bin('qemu-system-x86_64'), '-nodefaults', '-display', 'none',
            '-no-user-config', '-machine', 'pc,accel=tcg', '-m', '256',
            '-kernel', self.debian.kernel, '-initrd', self.debian.initrd,
            '-append', 'console=ttyS0 quiet no_timer_check mitigations=off '
            'rdinit=/init storm=quick',
            '-serial', 'file:' + self.console, '-chardev',
            'socket,id=qmp,server=on,wait=off,path=' + qmp,
            '-mon', 'chardev=qmp,mode=control',
            '-device', 'virtio-blk-pci,drive=disk']
        for node in (host.template,
                     cache_node(host.socket, template_id=self.debian.digest),
                     {'driver': 'file', 'node-name': 'file',
                      'filename': overlay},
                     {'driver': 'thinvm', 'node-name': 'disk', 'file': 'file',
                      'backing': 'cache'}):
            argv += ['-blockdev', json.dumps(node)]
        self.process = host.cluster.process(host.node, self.name, argv)
        self.qmp = QMP(ctx, qmp, self.process)

    def line(self, word):
        """The rest of the console's line with @word, or None."""
        self.process.check_alive()
        try:
            with open(self.console, errors='replace', encoding='utf-8') as f:
                for text in f:
                    if word in text and text.endswith('\n'):
                        return text.split(word, 1)[1].strip()
        except FileNotFoundError:
            pass
        return None

    def verify(self):
        found = self.line('STORM-DIGEST')
        check(found == self.debian.files, '%s has read %s instead of %s',
              self.name, found, self.debian.files)

    def end(self):
        self.process.kill()
        self.qmp.close()


def storm(hosts, victim, guests=2):
    """Boot, cut @victim() off when the storm is under way, wait until all
    guests have read everything."""
    for host in hosts:
        host.boot(guests)
    cluster = hosts[0].cluster
    wait_for(lambda: sum(host.remote_bytes() for host in hosts) > CUT_AFTER,
             900, 'the storm is under way')
    node = victim()
    check(not any(guest.line('STORM-BOOTED') for host in hosts
                  for guest in host.guests), 'the storm was over already')
    cluster.cut(node)
    everybody = [guest for host in hosts for guest in host.guests]
    wait_for(lambda: all(guest.line('STORM-BOOTED') is not None
                         for guest in everybody), 1200, 'all guests are up', 1)
    wait_for(lambda: all(guest.line('STORM-DIGEST') for guest in everybody),
             1800, 'all guests have read all files', 1)
    for guest in everybody:
        guest.verify()
        guest.end()
    return node, {host.node: host.compare() for host in hosts}


def report(ctx, hosts):
    for host in hosts:
        ctx.log('%s: %s' % (host.node, json.dumps(host.info())))


@test(seconds=3600, slow=True)
def by_ring(ctx):
    """The template is on the SSDs that its digest belongs to, two of three;
    guests run on the nodes without."""
    debian = Debian(ctx)
    cluster = NetCluster(ctx, {'a': 1, 'b': 1, 'c': 1, 'd': 0}, RATE,
                         replicas=2)
    cluster.run('a', 'add', '-f', 'raw', debian.image)
    for node in 'abc':
        cluster.serve(node)
    for _ in range(2):
        for node in 'abc':
            cluster.run(node, 'rebalance', ok=(0, 2))
    holders = [node for node in 'abc' if cluster.states(node)]
    check(len(holders) == 2, 'it is on %s', holders)
    free = next(node for node in 'abc' if node not in holders)
    hashes = cluster.list(holders[0])[0]['hashes']
    hosts = [Host(cluster, node, debian, hashes) for node in (free, 'd')]
    node, _ = storm(hosts, hosts[0].source)
    rest = next(one for one in holders if one != node)
    report(ctx, hosts)
    for host in hosts:
        check(host.source() == rest, '%s reads from %s', host.node,
              host.source())
        check(host.info()['statistics']['wrong-chunks'] == 0, 'wrong: %s',
              host.info())


@test(seconds=3600, slow=True)
def everywhere(ctx):
    """A copy on each node; that of one is damaged, and another node is new:
    it reads from the others while it brings the template over."""
    debian = Debian(ctx)
    cluster = NetCluster(ctx, {'a': 1, 'b': 1, 'c': 1, 'd': 1}, RATE,
                         ssd=False)
    for node in 'abc':
        cluster.run(node, 'add', '-f', 'raw', debian.image)
    # c cannot lose its power: guests run there
    for node in 'ab':
        cluster.serve(node)
    hashes = cluster.list('a')[0]['hashes']
    where = debian.damaged_chunk()
    damage('%s/%s.raw' % (cluster.path('c'),
                          debian.digest.replace(':', '-')), where)
    new = Host(cluster, 'd', debian, hashes, **{'bring-over': True,
                                                'bring-over-speed': 8 * MiB})
    own = Host(cluster, 'c', debian, hashes)
    check(own.source() == 'c', 'c reads from %s', own.source())
    _, said = storm([new, own], new.source)
    wait_for(lambda: new.source() == 'd', 600, 'd has a copy', 1)
    report(ctx, [new, own])
    check(own.source() == 'c', 'c reads from %s', own.source())
    check('is damaged: chunk %d ' % (where // CHUNK) in said['c'],
          'the damage is not told of: %s', said['c'])
    text = cluster.run('d', 'verify', debian.digest)
    check('no damage' in text, 'd: %s', text)
