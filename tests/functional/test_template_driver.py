# SPDX-License-Identifier: GPL-2.0-or-later
"""The driver thinvm-template: a template by its name, wherever it is.

Every byte is compared with what the template was made from.  Nodes are
servers of their own, which are killed, stopped, damaged, and lie.
"""

import hashlib
import json
import os
import signal
import struct
import threading
import time

from lib.context import check, wait_for
from lib.image import MiB
from lib.nbd import READ, NBDClient
from lib.qsd import StorageDaemon, wait_job
from lib.templates import (Contents, FakeServer, Gate, Reader, StoreCluster,
                           damage, open_fails)
from lib.testing import test


CHUNK = 64 * 1024               # of templates as small as these, by default


def three_nodes(ctx, contents, serve=('a', 'b'), sizes=()):
    """a and b have the template, with chunks of @sizes (or the default); c has
    a disk, and does not."""
    cluster = StoreCluster(ctx, {'a': 1, 'b': 1, 'c': 1}, ssd=False)
    for number, node in enumerate(('a', 'b')):
        cluster.add(node, contents, 'raw', *(
            ['--chunk-size', sizes[number]] if sizes else []))
    for node in serve:
        cluster.serve(node)
    return cluster


def other(node):
    return 'b' if node == 'a' else 'a'


def event_of(reader, name, seconds=30, **data):
    return reader.qmp.wait_event(name, seconds, lambda found: all(
        found.get(key) == value for key, value in data.items()))['data']


def hashes_of(cluster, node):
    return cluster.list(node)[0]['hashes']


@test()
def local(ctx):
    """The copy of this node: in use while it is open; a chunk that is damaged
    is read from another node, told of, and read here again once it has been
    repaired."""
    contents = Contents(ctx)
    cluster = three_nodes(ctx, contents, serve=())
    damage(cluster.copy('a', contents), 2 * MiB + 5)
    reader = Reader(ctx, cluster, 'a', contents, retry=1, verify='always')
    check(reader.info()['trust'] == 'local' and reader.source() == 'a',
          'opened as %s', reader.info())
    check(reader.client.size == len(contents.data), 'it has %d bytes',
          reader.client.size)
    reader.verify(0, 2 * MiB)
    try:
        reader.client.read(2 * MiB, 4096)
        check(False, 'a damaged chunk was read, and no other copy is there')
    except OSError:
        pass
    where = event_of(reader, 'THINVM_TEMPLATE_DAMAGED', offset=2 * MiB)
    check(where['place'] == cluster.copy('a', contents) and
          where['bytes'] == CHUNK, 'told: %s', where)
    cluster.serve('b')
    reader.verify_all()
    check(reader.source() == 'a', 'one chunk moved it to %s', reader.source())
    check(0 < reader.statistics()['remote-bytes'] <= 2 * MiB,
          'from the other node: %s', reader.statistics())
    check('in use' in cluster.run('b', 'remove', contents.digest),
          'a copy that is served was removed')
    check('mended from' in cluster.run('a', 'repair', contents.digest),
          'not repaired')
    cluster.servers['b'].kill()
    reader.verify(3 * MiB, MiB)
    # Read from elsewhere as long as the others live, which they do not
    wait_for(lambda: reader.client.read(2 * MiB + 4096 * 7, 4096) ==
             contents.data[2 * MiB + 4096 * 7:2 * MiB + 4096 * 8], 30,
             'the repaired chunk is read')
    check('in use' in cluster.run('a', 'remove', contents.digest),
          'a copy that is read was removed')
    reader.verify_all()
    reader.quit()
    cluster.run('a', 'list')
    cluster.run('a', 'repair')
    check(cluster.states('a') == [(contents.digest, 'a0', 'removed')] or
          cluster.states('a')[0][2] == 'going', 'after: %s',
          cluster.states('a'))


def read_until(reader, begun, stop, problems):
    """A client of its own that reads all the time, and compares."""
    data = reader.contents.data
    offset = 0
    try:
        client = NBDClient(reader.ctx, reader.export_nbd_path, 'template')
        while not stop.is_set():
            length = min(192 * 1024, len(data) - offset)
            if client.read(offset, length) != data[offset:offset + length]:
                raise ValueError('wrong data at %d' % offset)
            begun.set()
            offset = (offset + 777 * 512) % (len(data) // 512 * 512)
    except (OSError, ValueError, ConnectionError) as err:
        problems.append(err)


class Load:
    """Clients that read until it is left; no read may fail."""

    def __init__(self, reader, count=3):
        self.stop = threading.Event()
        self.begun = [threading.Event() for _ in range(count)]
        self.problems = []
        self.threads = [threading.Thread(target=read_until, args=(
            reader, begun, self.stop, self.problems)) for begun in self.begun]

    def __enter__(self):
        """Until all have read: QEMU's NBD server cannot have clients that
        come while it is drained, whatever it exports."""
        for thread in self.threads:
            thread.start()
        for begun in self.begun:
            begun.wait(60)

    def __exit__(self, *exc):
        self.stop.set()
        for thread in self.threads:
            thread.join()
        check(not self.problems, 'a client saw: %s', self.problems)


@test()
def failover(ctx):
    """Servers are killed, stopped, and come back, while clients read: the
    reading goes on from another one, and returns to the nearer one."""
    contents = Contents(ctx)
    cluster = three_nodes(ctx, contents, serve=())
    daemons = {node: cluster.serve_by_daemon(node, contents, chunks=True)
               for node in ('a', 'b')}
    reader = Reader(ctx, cluster, 'c', contents, timeout=1000, cache_size=0)
    reader.export_nbd_path = reader.nbd_url().partition('socket=')[2]
    near = reader.source()
    check(near in daemons and reader.info()['trust'] == 'agreed',
          'opened as %s', reader.info())
    with Load(reader):
        wait_for(lambda: reader.statistics()['remote-bytes'] > 8 * MiB, 60,
                 'it reads')
        daemons[near].kill()
        event_of(reader, 'THINVM_TEMPLATE_SOURCE')
        reader.wait_source(other(near))
        before = reader.statistics()['remote-bytes']
        wait_for(lambda: reader.statistics()['remote-bytes'] >
                 before + 8 * MiB, 60, 'it goes on')
        os.unlink(cluster.socket(near))
        daemons[near] = cluster.serve_by_daemon(near, contents, chunks=True)
        reader.wait_source(near)
        before = reader.bytes_from(near)
        wait_for(lambda: reader.bytes_from(near) > before + 8 * MiB, 60,
                 'it is read from')
        # It hangs, but its connections stay
        daemons[near].process.popen.send_signal(signal.SIGSTOP)
        reader.wait_source(other(near))
        daemons[near].process.popen.send_signal(signal.SIGCONT)
        reader.wait_source(near)
        # Nobody, for a while
        for daemon in daemons.values():
            daemon.kill()
        wait_for(lambda: 'source' not in reader.info(), 60, 'it has none')
        os.unlink(cluster.socket('a'))
        daemons['a'] = cluster.serve_by_daemon('a', contents, chunks=True)
        reader.wait_source('a')
    reader.verify_all()
    check(reader.statistics()['moves'] >= 4, 'moves: %s', reader.statistics())
    reader.quit()


@test()
def none(ctx):
    """No copy at all: opening says what each node said; a request waits as
    long as it was told, and gets an error."""
    contents = Contents(ctx)
    cluster = three_nodes(ctx, contents, serve=())
    open_fails(ctx, cluster, 'c', contents, 'No node that could be asked')
    for node in ('a', 'b'):
        open_fails(ctx, cluster, 'c', contents, "node '%s': Failed to connect"
                   % node)
    open_fails(ctx, cluster, 'c', contents, 'with \'strict\'', strict=True)
    open_fails(ctx, cluster, 'x', contents, 'has no \'[node x]\'')
    cluster.serve('a')
    reader = Reader(ctx, cluster, 'c', contents, retry=2, timeout=500)
    reader.verify(0, MiB)
    cluster.servers['a'].kill()
    try:
        reader.client.read(8 * MiB, MiB)
        check(False, 'read without any copy')
    except OSError:
        pass
    reader.verify(0, MiB)               # still in memory
    os.unlink(cluster.socket('a'))
    cluster.serve('a')
    wait_for(lambda: reader.source() == 'a', 60, 'it is back')
    reader.verify_all()
    check(reader.statistics()['waits'] >= 1, 'it did not wait')


@test()
def damaged_remote(ctx):
    """A chunk that is wrong on the nearest node is read from the next one,
    and told of; the rest still comes from the nearest."""
    contents = Contents(ctx)
    cluster = three_nodes(ctx, contents)
    reader = Reader(ctx, cluster, 'c', contents,
                    hashes=hashes_of(cluster, 'a'))
    near = reader.source()
    check(reader.info()['trust'] == 'given', 'trust: %s', reader.info())
    damage(cluster.copy(near, contents), 9 * MiB + 11)
    reader.verify_all(64 * 1024)
    told = event_of(reader, 'THINVM_TEMPLATE_DAMAGED', offset=9 * MiB)
    rows = {row['cluster-node']: row for row in reader.info()['replicas']}
    check(told['place'] == rows[near]['place'] and
          rows[near]['wrong-chunks'] == 1, 'told: %s %s', told, rows)
    check(rows[other(near)]['bytes'] == CHUNK and reader.source() == near,
          'the rest: %s', rows)
    # The hashes that a disk has are what is wrong
    open_fails(ctx, cluster, 'a', contents, 'does not fit', hashes='0' * 64)
    open_fails(ctx, cluster, 'c', contents, "option 'hashes' names",
               hashes='0' * 64)


def gated(ctx, cluster, node):
    """A gate before the server of @node."""
    real = ctx.path('real.nbd')
    os.rename(cluster.socket(node), real)
    gate = Gate(ctx, real, 0)
    gate.open()
    os.symlink(gate.path, cluster.socket(node))
    return gate


@test()
def brought_over(ctx):
    """The template is brought to this node while it is read: slowly first,
    with two at it at a time, through a kill -9; then it is read here."""
    contents = Contents(ctx, size=80 * MiB)
    cluster = StoreCluster(ctx, {'a': 1, 'c': 1}, ssd=False)
    cluster.add('a', contents)
    server = cluster.serve_by_daemon('a', contents, chunks=True)
    gate = gated(ctx, cluster, 'a')
    reader = Reader(ctx, cluster, 'c', contents, bring_over=True,
                    bring_over_speed=4 * MiB, timeout=60000)
    wait_for(lambda: (reader.brought()[1] or 0) >= 4 * MiB, 60, 'it is slow')
    second = Reader(ctx, cluster, 'c', contents, bring_over=True,
                    timeout=60000)
    wait_for(lambda: second.brought()[0] == 'waiting', 60, 'it waits')
    check(not cluster.files('c'), 'to be seen: %s', cluster.files('c'))
    gate.shut(65 * MiB)
    reader.bring_over(stop=True)
    wait_for(lambda: second.brought()[1] >= 64 * MiB, 60,
             'the other one is at it')
    progress = '%s/tmp/%s.progress' % (cluster.path('c'),
                                       contents.digest.replace(':', '-'))
    wait_for(lambda: int.from_bytes(open(progress, 'rb').read(), 'little') ==
             64 * MiB, 60, 'progress is noted')
    second.kill()
    check(cluster.parts('c') and not cluster.files('c'), 'left: %s %s',
          cluster.parts('c'), cluster.files('c'))
    before = gate.bytes
    gate.open()
    reader.bring_over(speed=0)
    reader.wait_brought()
    reader.wait_source('c')
    again = gate.bytes - before
    check(again < 30 * MiB, '%d bytes were fetched again', again)
    check(reader.info()['trust'] == 'local', 'trust: %s', reader.info())
    server.kill()
    reader.verify_all()
    reader.verify_all(100 * 1024)
    check('no damage' in cluster.run('c', 'verify'), 'damaged')
    check(not cluster.parts('c'), 'left behind: %s', cluster.parts('c'))
    check('in use' in cluster.run('c', 'remove', contents.digest),
          'removed while it is read')
    reader.quit()


@test()
def comes_by_itself(ctx):
    """A copy that somebody else puts on this node is read from then on."""
    contents = Contents(ctx)
    cluster = three_nodes(ctx, contents)
    reader = Reader(ctx, cluster, 'c', contents)
    reader.verify(0, MiB)
    cluster.add('c', contents)
    reader.wait_source('c')
    event_of(reader, 'THINVM_TEMPLATE_SOURCE',
             source=cluster.copy('c', contents))
    for node in ('a', 'b'):
        cluster.servers[node].kill()
    reader.verify_all()
    check(reader.info()['trust'] == 'local', 'trust: %s', reader.info())


def connections(path):
    """To the server that listens at @path."""
    with open('/proc/net/unix', encoding='utf-8') as file:
        rows = [line.split() for line in file if line.rstrip().endswith(path)]
    return sum(1 for row in rows if row[5] == '03')


@test()
def used_elsewhere(ctx):
    """What was removed from the nodes that serve it stays on the one that a
    reader has chosen, also while it reads nothing, and goes when it does."""
    contents = Contents(ctx)
    cluster = three_nodes(ctx, contents)
    reader = Reader(ctx, cluster, 'c', contents)
    near = reader.source()
    wait_for(lambda: connections(cluster.socket(near)) == 1, 30,
             'it has a connection')
    for node in ('a', 'b'):
        cluster.run(node, 'remove', contents.digest)
    gone = other(near)
    wait_for(lambda: not os.path.exists(cluster.copy(gone, contents)), 60,
             'it is gone where nobody uses it')
    check(os.path.exists(cluster.copy(near, contents)),
          'it is gone where it is used')
    reader.verify_all()
    reader.quit()
    wait_for(lambda: not os.path.exists(cluster.copy(near, contents)), 60,
             'it is gone')


def lie_in(data, offset):
    return data[:offset] + b'lie' + data[offset + 3:]


@test()
def hostile(ctx):
    """A node that says other lengths, other data, nothing, or nonsense, harms
    nobody while there is another one."""
    contents = Contents(ctx)
    cluster = three_nodes(ctx, contents)
    hashes = hashes_of(cluster, 'a')
    probe = Reader(ctx, cluster, 'c', contents)
    near = probe.source()
    probe.quit()
    cluster.servers[near].kill()
    os.unlink(cluster.socket(near))
    with open(cluster.copy(near, contents, '.chunks'), 'rb') as file:
        chunks = file.read()
    chunks += bytes(-len(chunks) % 512)
    fake = FakeServer(ctx, cluster.socket(near), {
        contents.digest: bytes(contents.data),
        contents.digest + '.chunks': chunks})
    good = fake.answer, fake.size, fake.greeting, 0

    def only_data(change):
        return lambda name, offset, data: (
            data if name.endswith('.chunks') else change(data))

    ways = [
        {'answer': only_data(lambda data: lie_in(data, 100))},
        {'answer': only_data(lambda data: None)},
        {'answer': only_data(lambda data: data[:1000])},
        {'answer': only_data(lambda data: bytes(len(data)))},
        {'answer': lambda name, offset, data: None},
        {'answer': lambda name, offset, data: lie_in(data, 4000)},
        {'size': lambda name, size: size - 512},
        {'size': lambda name, size: 1 << 62},
        {'size': lambda name, size: 0},
        {'greeting': b'HTTP/1.1 400 Bad Request\r\n\r\n'},
        {'greeting': b''},
        {'trickle': 0.05},
    ]
    for way in ways:
        fake.answer, fake.size, fake.greeting, fake.trickle = good
        for key, value in way.items():
            setattr(fake, key, value)
        reader = Reader(ctx, cluster, 'c', contents, hashes=hashes,
                        timeout=500, retry=20)
        reader.verify_all()
        reader.quit()
    check(fake.reads > 20, 'it was asked only %d times', fake.reads)


def false_list(contents, cluster, data, size=CHUNK):
    """What a liar says the hashes are: right for other contents, under this
    template's name."""
    with open(cluster.copy('a', contents, '.chunks'), 'rb') as file:
        header = bytearray(file.read()[:4096])
    hashes = b''.join(hashlib.sha256(data[at:at + size]).digest()
                      for at in range(0, len(data), size))
    struct.pack_into('<I', header, 12, size)
    struct.pack_into('<Q', header, 24, len(hashes) // 32)
    header[64:96] = hashlib.sha256(hashes).digest()
    header[4064:] = hashlib.sha256(header[:4064]).digest()
    chunks = bytes(header) + hashes
    return chunks + bytes(-len(chunks) % 512)


@test()
def liar(ctx):
    """Hashes that are not the template's: refused where they are known or
    contradicted; a liar who is alone is found out when all has been brought
    over, and nothing of it gets into the store."""
    contents = Contents(ctx)
    cluster = three_nodes(ctx, contents, serve=('a',))
    false = bytes(lie_in(contents.data, 3 * MiB + 7))
    FakeServer(ctx, cluster.socket('b'), {
        contents.digest: false,
        contents.digest + '.chunks': false_list(contents, cluster, false)})
    open_fails(ctx, cluster, 'c', contents, 'do not agree')
    open_fails(ctx, cluster, 'c', contents, "with 'strict'", strict=True)
    hashes = hashes_of(cluster, 'a')
    reader = Reader(ctx, cluster, 'c', contents, hashes=hashes, strict=True)
    reader.verify_all()
    reader.quit()
    cluster.servers['a'].kill()
    open_fails(ctx, cluster, 'c', contents, "option 'hashes' names",
               hashes=hashes, timeout=500)
    reader = Reader(ctx, cluster, 'c', contents)
    check(reader.info()['trust'] == 'agreed', 'trust: %s', reader.info())
    reader.verify(0, MiB)
    reader.bring_over()
    wait_for(lambda: reader.info()['bring-over']['state'] == 'failed', 60,
             'it was found out')
    check(reader.info()['trust'] == 'refuted', 'trust: %s', reader.info())
    for offset in (0, 8 * MiB):
        try:
            reader.client.read(offset, 4096)
            check(False, 'it still reads what is false')
        except OSError:
            pass
    check(not cluster.files('c') and not cluster.parts('c'),
          'in the store: %s %s', cluster.files('c'), cluster.parts('c'))


def fails_from_now_on(reader, offset):
    """It reads what is not the template's: an error, and nothing else then."""
    for at in (offset, 0):
        try:
            reader.client.read(at, 4096)
            check(False, 'it reads what is false')
        except OSError:
            pass
    check(reader.info()['trust'] == 'refuted', 'trust: %s', reader.info())


@test()
def chunk_sizes(ctx):
    """Nodes with chunks of different sizes: each is as good as the other to
    read from, to fail over to, and as a copy that comes to this node."""
    contents = Contents(ctx)
    cluster = three_nodes(ctx, contents, sizes=('1M', '64K'))
    small = hashes_of(cluster, 'b')
    # Without being told which, by both; else by those that it was told
    for options, size in (({}, MiB), ({'hashes': hashes_of(cluster, 'a')}, MiB),
                          ({'hashes': small}, CHUNK)):
        reader = Reader(ctx, cluster, 'c', contents, **options)
        check(reader.info()['chunk-size'] == size, 'chunks: %s', reader.info())
        near = reader.source()
        reader.verify(0, 3 * MiB)
        cluster.servers[near].kill()
        reader.verify_all(192 * 1024)
        check(reader.source() == other(near), 'source: %s', reader.info())
        check(reader.statistics()['wrong-chunks'] == 0, 'wrong: %s',
              reader.info())
        os.unlink(cluster.socket(near))
        cluster.serve(near)
        reader.wait_source(near)
        reader.quit()
    # One brings it with large chunks, another one that waits for it has small
    first = Reader(ctx, cluster, 'c', contents, bring_over=True,
                   bring_over_speed=MiB // 2)
    wait_for(lambda: first.brought()[1], 60, 'it is being brought')
    second = Reader(ctx, cluster, 'c', contents, bring_over=True, hashes=small,
                    verify='always', cache_size=0, retry=1)
    wait_for(lambda: second.brought()[0] == 'waiting', 60, 'it waits')
    third = Reader(ctx, cluster, 'c', contents, hashes=small)
    first.bring_over(speed=0)
    for reader in (first, second):
        reader.wait_brought()
    for reader in (first, second, third):
        reader.wait_source('c')
    for node in ('a', 'b'):
        cluster.servers[node].kill()
    for reader in (first, second, third):
        reader.verify_all()
        reader.verify_all(100 * 1024)
        check(reader.statistics()['wrong-chunks'] == 0, 'wrong: %s',
              reader.info())
    check(cluster.list('c')[0]['chunk-size'] == MiB, 'c has %s',
          cluster.list('c'))
    # Damage is found by the reader's chunks, whatever the copy's are
    damage(cluster.copy('c', contents), 9 * MiB + CHUNK)
    try:
        second.client.read(9 * MiB + CHUNK, 4096)
        check(False, 'a damaged chunk was read, and no other copy is there')
    except OSError:
        pass
    told = event_of(second, 'THINVM_TEMPLATE_DAMAGED', offset=9 * MiB + CHUNK)
    check(told['bytes'] == CHUNK, 'told: %s', told)
    second.verify(9 * MiB, CHUNK)
    # A copy here is right also if the hashes that are given are of other chunks
    open_fails(ctx, cluster, 'c', contents, 'does not fit', hashes=small)
    os.unlink(cluster.socket('b'))
    cluster.serve('b')
    cluster.run('c', 'repair', contents.digest)
    reader = Reader(ctx, cluster, 'c', contents, hashes=small)
    check(reader.info()['trust'] == 'local' and
          reader.info()['chunk-size'] == MiB, 'opened as %s', reader.info())
    reader.verify_all()


@test()
def sizes_and_lies(ctx):
    """A node that lies in chunks of another size than an honest one's is
    found out: of zeroes at once, else when that is read, before any of it is
    passed on; one that is alone, by a copy that comes to this node."""
    contents = Contents(ctx)
    cluster = three_nodes(ctx, contents, serve=('a',))
    at = 9 * MiB + 7
    false = bytes(lie_in(contents.data, at))
    in_zeroes = bytes(lie_in(contents.data, 5 * MiB))
    fake = FakeServer(ctx, cluster.socket('b'), {})

    def lie(data, size):
        fake.exports.update({
            contents.digest: data, contents.digest + '.chunks': false_list(
                contents, cluster, data, size)})

    for size in (CHUNK * 2, MiB, 16 * MiB):
        lie(in_zeroes, size)
        if size < 16 * MiB:
            open_fails(ctx, cluster, 'c', contents, 'do not agree', retry=1)
        lie(false, size)
        reader = Reader(ctx, cluster, 'c', contents, retry=1)
        check(reader.info()['trust'] == 'agreed', 'trust: %s', reader.info())
        if size < 16 * MiB:
            reader.verify(0, MiB)
        fails_from_now_on(reader, at // 4096 * 4096)
        reader.quit()
        # Who knows better is not impressed
        reader = Reader(ctx, cluster, 'c', contents,
                        hashes=hashes_of(cluster, 'a'))
        reader.verify_all()
        reader.quit()
    # What is not to be read might have contradicted it
    fake.answer = lambda name, offset, data: (
        5 if name.endswith('.chunks') and offset else data)
    open_fails(ctx, cluster, 'c', contents, 'cannot be read from it')
    reader = Reader(ctx, cluster, 'c', contents,
                    hashes=hashes_of(cluster, 'a'))
    reader.verify(0, MiB)
    reader.quit()
    fake.answer = lambda name, offset, data: data
    # Alone; also by saying that there are zeroes
    cluster.servers['a'].kill()
    zeroed = bytes(contents.data[:9 * MiB] + bytes(MiB) +
                   contents.data[10 * MiB:])
    for data in (false, zeroed):
        lie(data, MiB)
        reader = Reader(ctx, cluster, 'c', contents, retry=1)
        reader.verify(0, MiB)
        cluster.add('c', contents)
        reader.wait_source('c')
        reader.verify(MiB, 8 * MiB)
        check(reader.info()['trust'] == 'agreed', 'trust: %s', reader.info())
        fails_from_now_on(reader, at // 4096 * 4096)
        reader.quit()
        cluster.run('c', 'remove', contents.digest)


@test()
def lies_in_a_run(ctx):
    """What a lie is found in is read together with other chunks: these were
    not compared with what the others say, and no request gets them.  What is
    being brought to this node fails, too, and is in nobody's way."""
    contents = Contents(ctx)
    cluster = three_nodes(ctx, contents, serve=('a',))
    size = CHUNK * 2
    at = 8 * MiB
    false = bytes(lie_in(lie_in(contents.data, at + size), at + 2 * size))
    asked, go_on = threading.Event(), threading.Event()
    fake = FakeServer(ctx, cluster.socket('b'), {
        contents.digest: false,
        contents.digest + '.chunks': false_list(contents, cluster, false,
                                                size)})

    def answer(name, offset, data):
        if offset == at and len(data) == MiB:
            asked.set()
            go_on.wait(60)
        return data

    fake.answer = answer
    readers = [Reader(ctx, cluster, 'c', contents, retry=1, timeout=60000)
               for _ in range(2)]
    check(readers[0].info()['chunk-size'] == size and
          readers[0].info()['trust'] == 'agreed', 'opened as %s',
          readers[0].info())
    cluster.servers['a'].kill()
    client = readers[0].client
    client.send(READ, at, MiB)
    check(asked.wait(60), 'a run is not read at once')
    for number in range(8):
        client.send(READ, at + number * size, 4096)
    time.sleep(0.5)             # those wait, too: if not they fail all the same
    go_on.set()
    while client.pending():
        _, error, data = client.reply()
        check(error and not data, 'a request got what is not right')
    check(readers[0].info()['trust'] == 'refuted', 'trust: %s',
          readers[0].info())
    readers[1].bring_over()
    wait_for(lambda: readers[1].info()['bring-over']['state'] == 'failed', 60,
             'it was found out')
    cluster.add('c', contents)


@test()
def requests(ctx):
    """What the other node is asked: single chunks where single blocks are
    read; many at once for large requests, and for small ones that follow each
    other."""
    contents = Contents(ctx, size=48 * MiB)
    cluster = StoreCluster(ctx, {'a': 1, 'c': 1}, ssd=False)
    cluster.add('a', contents)
    with open(cluster.copy('a', contents, '.chunks'), 'rb') as file:
        chunks = file.read()
    fake = FakeServer(ctx, cluster.socket('a'), {
        contents.digest: bytes(contents.data),
        contents.digest + '.chunks': chunks + bytes(-len(chunks) % 512)})
    asked = []

    def answer(name, offset, data):
        if name == contents.digest and len(data) > 512:
            asked.append((offset, len(data)))
        return data

    fake.answer = answer
    source = contents.size - 3 * MiB        # zeroes are not read

    def read_all(step):
        asked.clear()
        reader = Reader(ctx, cluster, 'c', contents, timeout=60000)
        reader.verify_all(step)
        check(sum(length for _, length in asked) == source,
              'in steps of %d it read: %s', step, asked)
        reader.quit()
        return len(asked)

    check(read_all(MiB) <= 100, 'large requests: %d', len(asked))
    check(read_all(4096 * 3) <= 250, 'small ones: %d', len(asked))
    # Here and there, forwards and backwards
    reader = Reader(ctx, cluster, 'c', contents, timeout=60000)
    asked.clear()
    places = list(range(8 * MiB, 40 * MiB, 2 * MiB))
    for offset in places + [place - 512 * 1024 for place in reversed(places)]:
        reader.verify(offset + 3 * 4096, 4096)
    check(sorted(length for _, length in asked) == [CHUNK] * 2 * len(places),
          'single blocks: %s', asked)
    # What is beside a chunk that is wrong is read all the same
    reader.quit()
    fake.answer = lambda name, offset, data: (
        lie_in(data, 9 * MiB - offset) if offset <= 9 * MiB < offset + len(data)
        and name == contents.digest else answer(name, offset, data))
    reader = Reader(ctx, cluster, 'c', contents, timeout=60000,
                    retry=2)
    reader.verify(7 * MiB, MiB)
    try:
        reader.client.read(8 * MiB + 512 * 1024, MiB)
        check(False, 'a chunk that is wrong was read')
    except OSError:
        pass
    reader.verify(8 * MiB + 512 * 1024, MiB // 2)
    reader.verify(9 * MiB + CHUNK, MiB // 2)
    fake.answer = answer
    reader.verify(8 * MiB, 2 * MiB)


@test()
def single_chunks(ctx):
    """A chunk that no node can read, or that is damaged everywhere, fails
    alone, whatever it is read with; so does all that is asked for at once, of
    a node that can read only single chunks."""
    contents = Contents(ctx)
    cluster = StoreCluster(ctx, {'a': 1, 'c': 1}, ssd=False)
    cluster.add('a', contents)
    fake = FakeServer(ctx, cluster.socket('a'), {
        contents.digest: bytes(contents.data), contents.digest + '.chunks':
            false_list(contents, cluster, contents.data)})

    def of_data(change):
        return lambda name, offset, data: (
            change(offset, data) if name == contents.digest else data)

    def without(number):
        """Of 16 chunks that are read at once only that one must fail, and
        nothing waits for it."""
        reader = Reader(ctx, cluster, 'c', contents, retry=3, timeout=60000)
        reader.client.send(READ, 9 * MiB, MiB, tag='all')
        for tag in range(16):
            reader.client.send(READ, 9 * MiB + tag * CHUNK, CHUNK, tag=tag)
        replies = [reader.client.reply() for _ in range(17)]
        check([tag for tag, error, _ in replies if error] ==
              [tag for tag, _, _ in replies[-2:]] and
              {tag for tag, _, _ in replies[-2:]} == {'all', number},
              'replies: %s', [reply[:2] for reply in replies])
        for tag, _, data in replies[:-2]:
            check(data == contents.data[9 * MiB + tag * CHUNK:][:CHUNK],
                  'chunk %s is wrong', tag)
        reader.quit()

    at = 9 * MiB + 5 * CHUNK
    fake.answer = of_data(lambda offset, data: (
        5 if offset <= at < offset + len(data) else data))
    without(5)
    fake.answer = of_data(lambda offset, data: (
        lie_in(data, 9 * MiB - offset)
        if offset <= 9 * MiB < offset + len(data) else data))
    without(0)
    fake.answer = of_data(lambda offset, data: (
        5 if len(data) > CHUNK else data))
    reader = Reader(ctx, cluster, 'c', contents, retry=2, timeout=60000)
    reader.verify_all()
    check(reader.statistics()['failures'] == 0, 'failures: %s',
          reader.info())
    reader.bring_over()
    reader.wait_brought()
    reader.wait_source('c')
    reader.verify_all()


@test()
def ahead_in_vain(ctx):
    """What is read ahead and cannot be is not waited for; a request that has
    joined is none that was read ahead, and one that comes later tries again."""
    contents = Contents(ctx, size=24 * MiB)
    cluster = StoreCluster(ctx, {'a': 1, 'c': 1}, ssd=False)
    cluster.add('a', contents)
    fake = FakeServer(ctx, cluster.socket('a'), {
        contents.digest: bytes(contents.data), contents.digest + '.chunks':
            false_list(contents, cluster, contents.data)})
    end = 20 * MiB
    asked, go_on, good = (threading.Event() for _ in range(3))

    def answer(name, offset, data):
        if offset + len(data) <= end or len(data) <= 512 or good.is_set():
            return data
        if offset >= end:
            asked.set()
            go_on.wait(60)
        return 5

    def read_up_to_end():
        reader = Reader(ctx, cluster, 'c', contents, timeout=60000)
        for offset in range(8 * MiB, end, 2 * CHUNK):
            reader.verify(offset, 2 * CHUNK)
        check(asked.wait(60), 'it was not read ahead')
        return reader

    fake.answer = answer
    reader = read_up_to_end()
    reader.client.send(READ, end, CHUNK)
    time.sleep(0.3)             # it joins; if not it is read all the same
    go_on.set()
    good.set()
    _, error, data = reader.client.reply()
    check(not error and data == contents.data[end:end + CHUNK],
          'a request that joined: error %d', error)
    reader.quit()
    good.clear()
    reader = read_up_to_end()
    wait_for(lambda: reader.statistics()['wrong-chunks'], 60, 'it has failed')
    reader.verify(MiB, MiB)
    check(reader.statistics()['waits'] == 0, 'it waits: %s',
          reader.statistics())
    good.set()
    reader.verify(end, MiB)


@test()
def below_others(ctx):
    """Below the boot cache and linked clones; by its short name; moved
    between I/O threads, drained and reopened while it is read."""
    contents = Contents(ctx)
    cluster = three_nodes(ctx, contents)
    options = Reader.options(cluster, 'c', contents)
    del options['node-name'], options['read-only']
    clone = ctx.path('clone.img')
    ctx.run(ctx.bin('qemu-img'), 'create', '-f', 'thinvm', '-F', 'raw', '-b',
            'json:' + json.dumps({'driver': 'raw', 'file': options}), clone)
    out = ctx.path('out.raw')
    ctx.run(ctx.bin('qemu-img'), 'convert', '-O', 'raw', clone, out)
    with open(out, 'rb') as file:
        check(file.read() == contents.data, 'the clone reads something else')
    # Its description is looked for where it is by default
    text = ctx.run(ctx.bin('qemu-img'), 'info',
                   'thinvm-template:' + contents.digest, ok=(1,))
    check('/etc/thinvm/templates.conf' in text or 'No node' in text,
          'the short name: %s', text)

    reader = Reader(ctx, cluster, 'c', contents)
    reader.export_nbd_path = reader.nbd_url().partition('socket=')[2]
    qmp = reader.qmp
    # The name says which template it is, however it is read
    qmp.cmd_raw('blockdev-add', {**Reader.options(
        cluster, 'a', contents), 'node-name': 'here'})
    cache = {'driver': 'bootcache', 'read-only': True,
             'socket': ctx.path('cache')}
    qmp.cmd_raw('blockdev-add', {**cache, 'node-name': 'publisher',
                                 'file': 'here', 'role': 'publisher'})
    qmp.cmd_raw('blockdev-add', {**cache, 'node-name': 'cache',
                                 'file': 'template'})
    qmp.cmd_raw('blockdev-add', {
        'driver': 'thinvm', 'node-name': 'clone', 'backing': 'cache',
        'file': {'driver': 'file', 'filename': clone}})
    reader.export_nbd('clone')
    client = NBDClient(ctx, reader.export_nbd_path, 'clone')
    client.write(MiB, b'own' * 512)
    for number in range(2):
        qmp.cmd_raw('object-add', {'qom-type': 'iothread',
                                   'id': 'thread%d' % number})
    qmp.cmd_raw('blockdev-add', Reader.options(
        cluster, 'c', contents) | {'node-name': 'moved'})
    qmp.cmd_raw('blockdev-add', {
        'driver': 'null-co', 'read-zeroes': True, 'node-name': 'sink',
        'size': len(contents.data)})
    wait_for(lambda: [row for row in qmp.cmd('query-thinvm-bootcache')
                      if row.get('connected')], 30, 'the cache is used')
    reader.export_nbd('moved', writable=False)
    mover = NBDClient(ctx, reader.export_nbd_path, 'moved')
    mover.read(0, 512)
    with Load(reader):
        for number in range(6):
            for thread in ('thread%d' % (number % 2), None):
                qmp.cmd_raw('x-blockdev-set-iothread', {
                    'node-name': 'moved', 'force': True, 'iothread': thread})
                data = mover.read(number * MiB, MiB + 512)
                check(data == contents.data[number * MiB:(number + 1) * MiB +
                                            512], 'wrong in %s', thread)
            qmp.cmd_raw('blockdev-reopen', {'options': [Reader.options(
                cluster, 'c', contents)]})
            data = client.read(0, 2 * MiB)
            check(data[:MiB] == contents.data[:MiB] and
                  data[MiB:MiB + 3] == b'own', 'the clone reads otherwise')
    qmp.cmd_raw('blockdev-mirror', {
        'job-id': 'mirror', 'device': 'moved', 'target': 'sink',
        'sync': 'full'})
    wait_job(qmp, 'mirror')
    stats = [row for row in qmp.cmd('query-blockstats', query_nodes=True)
             if row.get('node-name') == 'template'][0]
    check(stats['driver-specific']['driver'] == 'thinvm-template' and
          stats['driver-specific']['verified-chunks'] > 0, 'stats: %s', stats)
    reader.quit()
