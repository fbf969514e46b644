# SPDX-License-Identifier: GPL-2.0-or-later
"""The template store: thinvm-template on the nodes of a cluster.

Contents are compared with what they were made from, never only by what the
tool says about them.
"""

import fcntl
import os
import shutil

from lib.bootcache import in_parallel
from lib.context import Failure, Process, check, wait_for
from lib.image import MiB, File
from lib.nbd import NBDClient
from lib.qsd import StorageDaemon
from lib.templates import (Contents, Gate, SilentServer, StoreCluster,
                           damage, truncate)
from lib.testing import test


def gated_source(ctx, contents):
    """The image behind an NBD server behind a gate, and options for it, for
    --image-opts."""
    daemon = StorageDaemon(ctx, 'source')
    daemon.qmp.cmd_raw('blockdev-add', {
        'driver': 'file', 'node-name': 'source', 'filename': contents.raw,
        'read-only': True})
    gate = Gate(ctx, daemon.export_nbd('source', writable=False), 0)
    return gate, ('driver=nbd,server.type=unix,server.path=%s,export=source'
                  % gate.path)


def part_size(cluster, node):
    """Bytes of what is being brought in."""
    return sum(os.path.getsize('%s/tmp/%s' % (cluster.path(node), name))
               for name in cluster.parts(node))


@test()
def formats(ctx):
    """The name is the hash of the contents, whatever they come in, and the
    copy holds them."""
    cluster = StoreCluster(ctx, {'a': 1})
    contents = Contents(ctx)
    for fmt in ('qcow2', 'raw', 'thinvm', 'vmdk'):
        cluster.add('a', contents, fmt)
        check(cluster.states('a') == [(contents.digest, 'a0', 'here')],
              'after %s: %s', fmt, cluster.states('a'))
        cluster.compare(contents, cluster.blockdev('a', contents))
        check('no damage' in cluster.run('a', 'verify'), 'not verified')
        cluster.run('a', 'remove', contents.digest)
        check(cluster.states('a') == [(contents.digest, 'a0', 'removed')],
              'removed: %s', cluster.states('a'))
    other = Contents(ctx, seed=2)
    cluster.fails('a', 'add', '--digest', other.digest, contents.raw,
                  words=['is %s, and not %s' % (contents.digest,
                                                other.digest)])
    check(not cluster.parts('a'), 'left behind: %s', cluster.parts('a'))
    # Zeroes take no space
    cluster.add('a', contents)
    used = cluster.list('a')[0]['allocated']
    check(used < 11 * MiB, '%d bytes are allocated', used)


@test()
def killed(ctx):
    """kill -9 in the middle of an add: nothing of it is seen, and the next
    one works, and cleans up."""
    cluster = StoreCluster(ctx, {'a': 1})
    contents = Contents(ctx)
    gate, source = gated_source(ctx, contents)
    for options in ([], ['--digest', contents.digest]):
        gate.shut(6 * MiB)
        before = cluster.files('a')
        process = cluster.start('a', 'add', '--image-opts', *options, source)
        wait_for(lambda: part_size(cluster, 'a') > 2 * MiB, 60,
                 'something is written')
        process.kill()
        gate.open()
        check(cluster.parts('a'), 'nothing was left behind: not in the middle')
        check(cluster.files('a') == before, 'to be seen: %s',
              cluster.files('a'))
        # As if it had died between the two names that a commit gives
        for digits in (contents.digest[7:], 'ab' * 32):
            with open('%s/sha256-%s.chunks' % (cluster.path('a'), digits),
                      'w', encoding='utf-8') as file:
                file.write('half')
        cluster.fails('a', 'locate', contents.digest)
        cluster.add('a', contents, 'raw', *options)
        check(not cluster.parts('a') and 'abab' not in str(cluster.files('a')),
              'left behind: %s %s', cluster.parts('a'), cluster.files('a'))
        cluster.compare(contents, cluster.blockdev('a', contents))
        cluster.run('a', 'verify')
        cluster.run('a', 'remove', contents.digest)


@test()
def resumed(ctx):
    """An add of a known digest goes on where one was killed, and what the
    killed one left is believed only as far as it is right."""
    cluster = StoreCluster(ctx, {'a': 1})
    contents = Contents(ctx, size=140 * MiB)
    gate, source = gated_source(ctx, contents)
    part = '%s/tmp/%s' % (cluster.path('a'),
                          contents.digest.replace(':', '-'))
    for spoil in (False, True):
        gate.shut(100 * MiB)
        process = cluster.start('a', 'add', '--image-opts', '--digest',
                                contents.digest, source)
        wait_for(lambda: os.path.exists(part + '.progress') and
                 os.path.getsize(part + '.progress') == 8, 120,
                 'progress is noted')
        process.kill()
        gate.open()
        if spoil:
            damage(part + '.part', MiB)
            os.chmod(part + '.part', 0o600)
        before = gate.bytes
        cluster.run('a', 'add', '--image-opts', '--digest', contents.digest,
                    source)
        again = gate.bytes - before
        if spoil:
            check(again > 130 * MiB, 'only %d bytes were read', again)
        else:
            check(again < 80 * MiB, '%d bytes were read again', again)
        cluster.run('a', 'verify')
        cluster.compare(contents, cluster.blockdev('a', contents))
        check(not cluster.parts('a'), 'left behind: %s', cluster.parts('a'))
        cluster.run('a', 'remove', contents.digest)


@test()
def together(ctx):
    """Adds of the same template at the same time, and of another one, with
    somebody who verifies, lists and cleans up beside them."""
    cluster = StoreCluster(ctx, {'a': 2})
    same = Contents(ctx)
    other = Contents(ctx, seed=2)

    def work(what, number):
        del number
        if what in (same, other):
            cluster.add('a', what)
        elif what == 'known':
            cluster.add('a', same, 'raw', '--digest', same.digest)
        else:
            for _ in range(8):
                cluster.run('a', what)

    in_parallel([same, same, 'known', 'known', other, 'verify', 'list',
                 'repair'], work)
    states = cluster.states('a')
    check([row[0] for row in states] == sorted([same.digest, other.digest]) and
          all(row[2] == 'here' for row in states), 'afterwards: %s', states)
    check(not cluster.parts('a') and not cluster.parts('a', 1),
          'left behind: %s %s', cluster.parts('a'), cluster.parts('a', 1))
    for contents in (same, other):
        cluster.compare(contents, cluster.blockdev('a', contents))


@test()
def repaired(ctx):
    """Each kind of damage is noticed, named, and mended from another node,
    without a guest that reads the copy noticing."""
    cluster = StoreCluster(ctx, {'a': 1, 'b': 1}, replicas=2)
    contents = Contents(ctx)
    cluster.add('a', contents)
    cluster.add('b', contents)
    data, chunks = (cluster.copy('a', contents, suffix)
                    for suffix in ('.raw', '.chunks'))
    reader = StorageDaemon(ctx, 'guest')
    reader.qmp.cmd_raw('blockdev-add', {
        **cluster.blockdev('a', contents), 'node-name': 'template'})
    guest = NBDClient(ctx, reader.export_nbd('template', writable=False),
                      'template')

    # How, what must be said, and whether it takes another copy to mend it
    kinds = [
        (lambda: damage(data, 2 * MiB + 3), 'chunk 32 (from byte 2097152)', 1),
        (lambda: damage(data, 5 * MiB), 'chunk 80 ', 1),    # in a hole
        (lambda: truncate(data, 3 * MiB + 7), 'chunk 48 ', 1),
        (lambda: truncate(data, 99 * MiB), 'instead of 1258', 1),
        (lambda: damage(chunks, 4096 + 40), 'of its hashes is not right', 0),
        (lambda: damage(chunks, 0), 'does not begin with', 0),
        (lambda: os.unlink(chunks), "cannot open 'sha256-", 0),
        (lambda: truncate(chunks, 100), 'header cannot be read', 0),
        (lambda: (damage(chunks, 0), damage(data, 0)), 'its hashes', 1),
        (lambda: (os.unlink(data), os.mkfifo(data)), 'its data', 1),
    ]
    for spoil, words, others in kinds:
        spoil()
        cluster.fails('a', 'verify', contents.digest, status=2,
                      words=['damaged', words])
        if others:
            cluster.fails('a', 'repair', contents.digest, status=2,
                          words=['No other copy'])
            daemon = cluster.serve_by_daemon('b', contents)
        text = cluster.run('a', 'repair', contents.digest)
        check('no damage' in text, 'repair: %s', text)
        if others:
            daemon.quit()
        cluster.run('a', 'verify')
        with open(data, 'rb') as file:
            check(file.read() == contents.data, 'wrong after repair: %s',
                  words)
    check(guest.read(0, MiB) == bytes(contents.data[:MiB]),
          'the guest reads something else')


@test()
def partial(ctx):
    """Part of a template is verified without reading the rest."""
    cluster = StoreCluster(ctx, {'a': 1})
    contents = Contents(ctx)
    cluster.add('a', contents)
    damage(cluster.copy('a', contents), 9 * MiB)
    text = cluster.run('a', 'verify', '--range', '0:%d' % (9 * MiB))
    check(': 144 chunks read' in text, 'verify: %s', text)
    text = cluster.fails('a', 'verify', '--range', '%d:1' % (9 * MiB + 65535),
                         status=2)
    check('chunk 144 ' in text, 'verify: %s', text)
    text = cluster.run('a', 'verify', '--range', '%d:1' % (9 * MiB + 65536))
    check(': 1 chunks read' in text, 'verify: %s', text)
    for wrong in ('x', '1', '1:0', '-1:3', '99999999:1'):
        cluster.fails('a', 'verify', '--range', wrong,
                      words=[wrong.split(':')[0]])


def chunk_sizes(cluster, node):
    return [row['chunk-size'] for row in cluster.list(node)]


@test()
def chunk_size(ctx):
    """The size of chunks: the default, and other ones; what is no size; how
    it comes to other nodes, and back to one that has lost its hashes."""
    cluster = StoreCluster(ctx, {'a': 1, 'b': 1, 'c': 1}, replicas=3)
    contents = Contents(ctx)
    for wrong in ('0', '1', '-65536', '32K', '65537', '96K', '32M', '16E', 'x',
                  '64Kx', ''):
        cluster.fails('a', 'add', '--chunk-size', wrong, contents.raw,
                      words=["'--chunk-size' is '%s'" % wrong,
                             'a power of two from 64K to 16M'])
    large = File(ctx, 'large.qcow2').path
    ctx.run(ctx.bin('qemu-img'), 'create', '-f', 'qcow2', large, '300G')
    cluster.fails('a', 'add', '-f', 'qcow2', '--chunk-size', '64K', large,
                  words=["'--chunk-size' is '64K'", 'more than 4194304'])
    check(not cluster.files('a') and not cluster.parts('a'), 'left behind')
    cluster.add('c', contents)
    check(chunk_sizes(cluster, 'c') == [65536], 'the default: %s',
          cluster.list('c'))
    cluster.add('a', contents, 'raw', '--chunk-size', '4M')
    check(chunk_sizes(cluster, 'a') == [4 * MiB], 'added: %s',
          cluster.list('a'))
    text = cluster.run('a', 'add', '--chunk-size', '64k', '-f', 'raw',
                       contents.raw)
    check('its chunks have 4194304 bytes' in text, 'again: %s', text)
    check(cluster.list('a')[0]['hashes'] != cluster.list('c')[0]['hashes'],
          'they have the same hashes')
    # It comes along with a copy, and with what mends one
    cluster.serve('a')
    cluster.run('b', 'rebalance')
    check(cluster.list('b')[0]['hashes'] == cluster.list('a')[0]['hashes'],
          'b has %s', cluster.list('b'))
    data, chunks = (cluster.copy('b', contents, suffix)
                    for suffix in ('.raw', '.chunks'))
    for spoil in (lambda: os.unlink(chunks), lambda: damage(chunks, 5000),
                  lambda: os.unlink(data), lambda: damage(data, 9 * MiB)):
        spoil()
        cluster.run('b', 'repair', contents.digest)
        check(chunk_sizes(cluster, 'b') == [4 * MiB], 'repaired: %s',
              cluster.list('b'))
        cluster.run('b', 'verify')
        cluster.compare(contents, {'driver': 'raw', 'file': {
            'driver': 'file', 'filename': data}})
    # Hashes of other chunks mend as well
    damage(cluster.copy('c', contents), 3 * MiB)
    text = cluster.run('c', 'repair')
    check("1 chunks mended from node 'a'" in text, 'repair: %s', text)
    check(chunk_sizes(cluster, 'c') == [65536], 'c has %s', cluster.list('c'))
    # Nobody tells: the default
    cluster.servers['a'].kill()
    os.unlink(chunks)
    cluster.run('b', 'repair')
    check(chunk_sizes(cluster, 'b') == [65536], 'alone: %s', cluster.list('b'))


@test()
def chunk_size_resumed(ctx):
    """What was begun with small chunks is gone on with in larger ones, and
    nothing that is not right is kept between the two."""
    cluster = StoreCluster(ctx, {'a': 1})
    contents = Contents(ctx)
    part = '%s/tmp/%s' % (cluster.path('a'),
                          contents.digest.replace(':', '-'))
    for size in ('4M', '16M', '64K'):
        cluster.run('a', 'list')
        os.makedirs(os.path.dirname(part), exist_ok=True)
        with open(part + '.part', 'wb') as file:
            # In the middle of a chunk, and of the zeroes
            file.write(contents.data[:4 * MiB] + (
                bytes(MiB) if size == '64K' else b'nonsense' * (MiB // 8)))
        with open(part + '.progress', 'wb') as file:
            file.write((5 * MiB).to_bytes(8, 'little'))
        cluster.add('a', contents, 'raw', '--digest', contents.digest,
                    '--chunk-size', size)
        cluster.run('a', 'verify')
        with open(cluster.copy('a', contents), 'rb') as file:
            check(file.read() == contents.data, 'wrong with %s', size)
        check(not cluster.parts('a'), 'left behind: %s', cluster.parts('a'))
        cluster.run('a', 'remove', contents.digest)


@test()
def foreign_replica(ctx):
    """A node that serves other contents under the name mends nothing, and
    nothing of it gets in."""
    cluster = StoreCluster(ctx, {'a': 1, 'b': 1, 'c': 1}, replicas=3)
    contents = Contents(ctx)
    cluster.add('a', contents)
    cluster.add('b', contents)
    damage(cluster.copy('b', contents), 8 * MiB)
    cluster.serve_by_daemon('b', contents)
    cluster.fails('c', 'rebalance', status=2,
                  words=['and not ' + contents.digest, 'could not be fetched'])
    check(not cluster.files('c') and not cluster.parts('c'), 'c has %s',
          cluster.files('c'))
    damage(cluster.copy('a', contents), 8 * MiB + 9)
    damage(cluster.copy('a', contents), 0)
    text = cluster.fails('a', 'repair', status=2, words=[
        "  1 chunks mended from node 'b'",
        'no other copy has 1 of the chunks'])
    check('2 chunks mended' not in text, 'repair: %s', text)
    with open(cluster.copy('a', contents), 'rb') as file:
        check(file.read(64) == contents.data[:64], 'chunk 0 is not mended')
        file.seek(8 * MiB + 9)
        check(file.read(8) == b'damaged!', 'wrong contents were written')


@test()
def waiting(ctx):
    """Who brings in what another run is at waits for it, whatever becomes of
    that one's file."""
    cluster = StoreCluster(ctx, {'a': 1})
    contents = Contents(ctx)
    part = '%s/tmp/%s.part' % (cluster.path('a'),
                               contents.digest.replace(':', '-'))
    os.makedirs(os.path.dirname(part), exist_ok=True)
    for swept in (True, False):
        with open(part, 'wb') as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            process = cluster.start('a', 'add', '-f', 'raw', '--digest',
                                    contents.digest, contents.raw)
            wait_for(lambda: 'waiting for' in process.log_tail(), 60,
                     'it waits')
            check(not cluster.files('a'), 'it did not wait')
            if swept:
                os.unlink(part)
            else:
                other.write(b'nonsense' * MiB)
        check(process.wait(60) == 0, 'add: %s', process.log_tail())
        cluster.run('a', 'verify')
        cluster.compare(contents, cluster.blockdev('a', contents))
        check(not cluster.parts('a'), 'left behind: %s', cluster.parts('a'))
        os.unlink(cluster.copy('a', contents))
        cluster.run('a', 'rebalance')


@test()
def overtaken(ctx):
    """Who waited for a run that then gave the file its final name touches
    neither that copy nor what somebody else brings in since."""
    cluster = StoreCluster(ctx, {'a': 1, 'b': 1})
    contents = Contents(ctx)
    cluster.add('b', contents)
    copy = cluster.copy('a', contents)
    part = '%s/tmp/%s.part' % (cluster.path('a'),
                               contents.digest.replace(':', '-'))
    os.makedirs(os.path.dirname(part), exist_ok=True)
    with open(part, 'wb') as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        process = cluster.start('a', 'add', '-f', 'raw', '--digest',
                                contents.digest, contents.raw)
        wait_for(lambda: 'waiting for' in process.log_tail(), 60, 'it waits')
        other.write(contents.data)
        other.flush()
        shutil.copyfile(cluster.copy('b', contents, '.chunks'),
                        cluster.copy('a', contents, '.chunks'))
        os.rename(part, copy)
        with open(part, 'wb') as third:
            fcntl.flock(third, fcntl.LOCK_EX)
            fcntl.flock(other, fcntl.LOCK_UN)
            wait_for(lambda: process.log_tail().count('waiting for') == 2 or
                     not process.alive(), 60, 'it waits again')
            cluster.run('a', 'verify')
            check(process.alive() and os.path.exists(part),
                  'another run was overtaken: %s', process.log_tail())
    check(process.wait(60) == 0, 'add: %s', process.log_tail())
    check('already' in process.log_tail(), 'add: %s', process.log_tail())
    cluster.run('a', 'verify')
    cluster.compare(contents, cluster.blockdev('a', contents))
    check(not cluster.parts('a'), 'left behind: %s', cluster.parts('a'))


@test()
def write_protected(ctx):
    """A part that is being committed cannot be written, except by root: who
    comes then waits, and goes on with it if that run died."""
    cluster = StoreCluster(ctx, {'a': 1})
    contents = Contents(ctx)
    argv = cluster.argv('a', 'add', '-f', 'raw', '--digest', contents.digest,
                        contents.raw)
    if os.geteuid() == 0:
        argv = ['setpriv', '--bounding-set=-all', '--inh-caps=-all', *argv]
    part = '%s/tmp/%s.part' % (cluster.path('a'),
                               contents.digest.replace(':', '-'))
    os.makedirs(os.path.dirname(part), exist_ok=True)
    with open(part, 'wb') as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write(b'nonsense' * MiB)
        other.flush()
        os.chmod(part, 0o444)
        process = Process(ctx, 'add', argv)
        wait_for(lambda: 'waiting for' in process.log_tail() or
                 not process.alive(), 60, 'it waits')
        check(process.alive(), 'it did not wait: %s', process.log_tail())
    check(process.wait(60) == 0, 'add: %s', process.log_tail())
    cluster.run('a', 'verify')
    cluster.compare(contents, cluster.blockdev('a', contents))
    check(not cluster.parts('a'), 'left behind: %s', cluster.parts('a'))


@test()
def placed(ctx):
    """Nodes with SSDs fetch what belongs to them and drop what does not, as
    disks and nodes come and go; the last copy is never dropped, and a node
    that does not answer stops nobody."""
    cluster = StoreCluster(ctx, {'a': 1, 'b': 2, 'c': 1}, replicas=2)
    templates = [Contents(ctx, size=MiB + 512 * n, seed=n)
                 for n in range(1, 7)]
    for contents in templates:
        cluster.add('a', contents)
    for node in cluster.disks:
        cluster.serve(node)

    def settled():
        """Has nobody anything to do any more?  What each has, then."""
        for node in cluster.disks:
            cluster.run(node, 'rebalance', ok=(0, 2))
        holders = {contents.digest: set() for contents in templates}
        for node in cluster.disks:
            for digest, disk, state in cluster.states(node):
                if state != 'here':
                    return None
                holders[digest].add(disk)
        return all(len(disks) == 2 for disks in holders.values()) and holders

    def settle():
        holders = wait_for(settled, 120, 'everything is in its place', 0.5)
        for digest, disks in holders.items():
            check(len({disk[0] for disk in disks}) == 2, '%s is on %s',
                  digest, disks)
        for node in cluster.disks:
            cluster.run(node, 'verify')
        return holders

    before = settle()
    # A node without disks comes, then gets two
    cluster.disks['d'] = 0
    cluster.describe()
    for contents in templates:
        cluster.compare(contents, cluster.blockdev('d', contents))
    cluster.disks['d'] = 2
    cluster.describe()
    cluster.run('d', 'init')
    cluster.serve('d')
    after = settle()
    for digest, disks in after.items():
        new = disks - before[digest]
        check(all(disk[0] == 'd' for disk in new) and len(new) <= 1,
              '%s moved from %s to %s', digest, before[digest], disks)
    # It hangs: the others say so, and the rest can be read
    cluster.servers['d'].kill()
    os.unlink(cluster.socket('d'))
    SilentServer(ctx, cluster.socket('d'))
    cluster.fails('a', 'rebalance', '--keep', status=0,
                  words=["Node 'd': no answer in 5 s"])
    for contents in templates[:2]:
        cluster.compare(contents, cluster.blockdev('a', contents))


@test()
def everywhere(ctx):
    """Without SSDs each node gets a copy, and every node reads its own."""
    cluster = StoreCluster(ctx, {'a': 1, 'b': 1, 'c': 1}, ssd=False)
    contents = Contents(ctx)
    cluster.add('a', contents)
    cluster.fails('b', 'locate', contents.digest, words=['No node'])
    cluster.serve('a')
    check(cluster.blockdev('b', contents)['driver'] == 'nbd', 'not remote')
    cluster.compare(contents, cluster.blockdev('b', contents))
    url = cluster.run('b', 'locate', '--uri', contents.digest).strip()
    ctx.run(ctx.bin('qemu-img'), 'compare', '-f', 'raw', '-F', 'raw', url,
            contents.raw)
    for node in ('b', 'c'):
        cluster.run(node, 'rebalance')
        check(cluster.states(node) == [(contents.digest, node + '0', 'here')],
              '%s has %s', node, cluster.states(node))
        check(cluster.blockdev(node, contents)['driver'] == 'raw',
              'not the local copy')
        cluster.compare(contents, cluster.blockdev(node, contents))


@test()
def in_use(ctx):
    """A template that a guest reads, here or from another node, is not
    deleted: it is marked, offered to nobody, and goes with its last user."""
    cluster = StoreCluster(ctx, {'a': 1, 'b': 1}, replicas=1)
    contents = Contents(ctx)
    cluster.add('a', contents)
    cluster.serve('a')
    local = StorageDaemon(ctx, 'local')
    local.qmp.cmd_raw('blockdev-add', {
        **cluster.blockdev('a', contents), 'node-name': 'template'})
    near = NBDClient(ctx, local.export_nbd('template', writable=False),
                     'template')
    remote = StorageDaemon(ctx, 'remote')
    remote.qmp.cmd_raw('blockdev-add', {
        **cluster.blockdev('b', contents, '--node-name', 'template')})
    far = NBDClient(ctx, remote.export_nbd('template', writable=False),
                    'template')
    copy = cluster.copy('a', contents)
    text = cluster.run('a', 'remove', contents.digest)
    check('in use' in text, 'remove: %s', text)
    cluster.fails('a', 'locate', contents.digest, words=['removed'])
    for daemon, client in ((local, near), (remote, far)):
        check(os.path.exists(copy), 'it is gone')
        for offset in (0, 8 * MiB):
            check(client.read(offset, MiB) ==
                  bytes(contents.data[offset:offset + MiB]), 'wrong data')
        daemon.quit()
    wait_for(lambda: not os.path.exists(copy), 60, 'the copy is gone')


@test()
def removed(ctx):
    """What was removed from a node is not fetched again from another one,
    until it is added again, or no node has it any more."""
    cluster = StoreCluster(ctx, {'a': 1, 'b': 1}, replicas=2)
    contents = Contents(ctx)
    cluster.add('a', contents)
    cluster.serve('a')
    cluster.run('b', 'rebalance')
    cluster.serve('b')
    text = cluster.run('a', 'remove', contents.digest)
    check("node 'b' has it, too" in text, 'remove: %s', text)
    wait_for(lambda: not os.path.exists(cluster.copy('a', contents)), 60,
             'the copy is gone')
    for _ in range(2):
        cluster.run('a', 'rebalance')
        check(cluster.states('a') == [(contents.digest, 'a0', 'removed')],
              'it came back: %s', cluster.states('a'))
    cluster.add('a', contents)
    check(cluster.states('a') == [(contents.digest, 'a0', 'here')],
          'added again: %s', cluster.states('a'))
    for node in ('a', 'b'):
        cluster.run(node, 'remove', contents.digest)
    for node in ('a', 'b'):
        wait_for(lambda: 'going' not in str(cluster.states(node)), 60,
                 '%s lets go' % node)
    for node in ('a', 'b'):
        # The other one's server may still be at it
        wait_for(lambda: cluster.run(node, 'rebalance') and
                 not cluster.list(node), 60, '%s has forgotten it' % node)


@test()
def with_cache(ctx):
    """A guest's overlay over the boot cache over what locate says."""
    cluster = StoreCluster(ctx, {'a': 1, 'b': 1}, replicas=1)
    contents = Contents(ctx)
    cluster.add('a', contents)
    cluster.serve('a')
    path = ctx.path('cache.sock')

    def node(name, role):
        daemon = StorageDaemon(ctx, name)
        daemon.qmp.cmd_raw('blockdev-add', cluster.blockdev(
            'b', contents, '--node-name', 'template'))
        daemon.qmp.cmd_raw('blockdev-add', {
            'driver': 'bootcache', 'node-name': 'cache', 'file': 'template',
            'socket': path, 'role': role, 'template-id': contents.digest,
            'read-only': True})
        return daemon

    publisher = node('publisher', 'publisher')
    reader = node('reader', 'reader')
    client = NBDClient(ctx, reader.export_nbd('cache', writable=False),
                       'cache')
    for offset in range(0, contents.size, MiB):
        length = min(MiB, contents.size - offset)
        check(client.read(offset, length) ==
              bytes(contents.data[offset:offset + length]),
              'wrong contents from %d on', offset)
    info = publisher.qmp.cmd('query-thinvm-bootcache', node_name='cache')[0]
    check(info['publisher']['readers'] == 1, 'publisher: %s', info)


@test()
def failover(ctx):
    """The node that a guest reads from dies, and a second one: it reads on
    from the next, and from the first again when that is back.  Two readers,
    one of them through the boot cache."""
    cluster = StoreCluster(ctx, {'a': 1, 'b': 1, 'c': 1, 'd': 0}, replicas=3)
    contents = Contents(ctx)
    for node in ('a', 'b', 'c'):
        cluster.add(node, contents)
        cluster.serve(node)
    located = cluster.blockdev('d', contents, '--failover', '--node-name',
                               'template')
    order = [os.path.basename(child['server']['path']).split('.')[0]
             for child in located['children']]
    check(sorted(order) == ['a', 'b', 'c'], 'located: %s', located)
    guest = StorageDaemon(ctx, 'guest')
    guest.qmp.cmd_raw('blockdev-add', located)
    cached = StorageDaemon(ctx, 'cached')
    cached.qmp.cmd_raw('blockdev-add', located)
    cached.qmp.cmd_raw('blockdev-add', {
        'driver': 'bootcache', 'node-name': 'cache', 'file': 'template',
        'socket': ctx.path('cache.sock'), 'role': 'publisher',
        'template-id': contents.digest, 'read-only': True})
    readers = [NBDClient(ctx, guest.export_nbd('template', writable=False),
                         'template'),
               NBDClient(ctx, cached.export_nbd('cache', writable=False),
                         'cache')]

    def read(first, end):
        for offset in range(first * MiB, end * MiB, MiB // 4):
            for reader in readers:
                check(reader.read(offset, MiB // 4) ==
                      bytes(contents.data[offset:offset + MiB // 4]),
                      'wrong contents from %d on', offset)

    read(0, 3)
    cluster.servers[order[0]].kill()
    read(3, 6)
    cluster.servers[order[1]].kill()
    read(6, 9)
    for node in order[:2]:
        cluster.serve(node)
    cluster.servers[order[2]].kill()

    def works():
        """The first reads after that may still go wrong."""
        try:
            read(9, 10)
            return True
        except (Failure, OSError):
            return False

    wait_for(works, 60, 'they read from those that came back')
    read(0, 12)


@test()
def hostile(ctx):
    """Descriptions and stores that are not what they should be: a message
    that names them, never a crash, and nothing outside is touched."""
    cluster = StoreCluster(ctx, {'a': 1, 'b': 1})
    contents = Contents(ctx)
    victim = ctx.path('victim')
    with open(victim, 'w', encoding='utf-8') as file:
        file.write('precious')
    for text, words in ((b'', 'there is no'), (b'\0\1\2', 'no text file'),
                        (b'[node a]\n' * 2, 'second time'),
                        (b'#' * (2 << 20), 'more than 1048576 bytes'),
                        (os.urandom(4096), "templates.conf'")):
        with open(cluster.config, 'wb') as file:
            file.write(text)
        cluster.fails('a', 'list', words=[words])
    os.unlink(cluster.config)
    cluster.fails('a', 'list', words=['templates.conf'])
    cluster.describe()
    cluster.fails('x', 'list', words=["no '[node x]'"])
    cluster.fails('a', 'locate', '../../x', words=['no name of a template'])
    cluster.fails('a', 'fly', words=['no command'])
    cluster.fails('a', 'add', '/nowhere', words=['/nowhere'])
    # The disk is not mounted, or another one is
    store = cluster.path('b') + '/thinvm-store'
    os.rename(store, victim + '2')
    cluster.fails('b', 'add', contents.raw, words=['has no disk'])
    text = cluster.fails('b', 'verify', status=2)
    check('is the disk mounted?' in text, 'verify: %s', text)
    for wrong in ('', 'thinvm template store 2\ndisk b0\n', 'x' * 9999,
                  'thinvm template store 1\ndisk a0\n'):
        with open(store, 'w', encoding='utf-8') as file:
            file.write(wrong)
        cluster.fails('b', 'verify', status=2,
                      words=["Disk 'b0'", 'of another'])
    # Links that lead out of the store
    copy, chunks = (cluster.copy('a', contents, suffix)
                    for suffix in ('.raw', '.chunks'))
    os.symlink(victim, copy)
    os.symlink(victim, chunks)
    cluster.fails('a', 'locate', contents.digest)
    cluster.fails('a', 'verify', contents.digest, words=['none of these'])
    cluster.add('a', contents)
    cluster.compare(contents, cluster.blockdev('a', contents))
    # Names that are nearly right, and directories under right ones
    path = cluster.path('a')
    for name in ('sha256-.raw', 'sha256-' + 'g' * 64 + '.raw',
                 'sha256-' + 'a' * 63 + '.raw', 'sha256-' + 'a' * 65,
                 'sha256-' + 'A' * 64 + '.raw', 'x' * 200):
        with open(os.path.join(path, name), 'wb') as file:
            file.write(b'x')
    os.mkdir(os.path.join(path, 'sha256-' + 'b' * 64 + '.raw'))
    os.mkfifo(os.path.join(path, 'tmp', 'add-1-2.part'))
    check(len(cluster.list('a')) == 1, 'list: %s', cluster.list('a'))
    cluster.run('a', 'repair')
    # A file that is right, but not here
    os.rename(chunks, victim + '3')
    os.symlink(victim + '3', chunks)
    cluster.fails('a', 'verify', status=2, words=['its hashes'])
    cluster.run('a', 'repair')
    check(not os.path.islink(chunks), 'still a link')
    # Chunks of another template
    other = Contents(ctx, seed=2)
    cluster.add('a', other)
    os.rename(cluster.copy('a', other, '.chunks'), chunks)
    cluster.fails('a', 'verify', status=2, words=['it is of another template'])
    cluster.run('a', 'repair')
    cluster.run('a', 'verify')
    with open(victim, encoding='utf-8') as file:
        check(file.read() == 'precious', 'a file outside was written')
