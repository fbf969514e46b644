# SPDX-License-Identifier: GPL-2.0-or-later
"""The boot cache: shared by processes, and what happens to the others when
one of them dies, stops, or means harm.

Contents are compared with what the template must hold at every read.  The
template's server is behind a meter, so that "once for the host" is counted
where it matters, and not by those who are tested.
"""

import array
import fcntl
import mmap
import os
import random
import signal
import socket
import struct

from lib.bootcache import (Publisher, Reader, Template, Wire, cache_node,
                           in_parallel, template_nodes)
from lib.context import Failure, check, wait_for
from lib.guest import Guest
from lib.image import GiB, MiB, File, create, require_clean
from lib.qmp import QMPError
from lib.testing import THIN, test
from lib.vm import NODE, VM

FD_SEALS = 0x1 | 0x2 | 0x4 | 0x10   # seal, shrink, grow, future writes
F_ADD_SEALS = 1033
F_GET_SEALS = 1034


def surroundings(ctx, **options):
    """A template on a metered server, its publisher, a socket's path."""
    template = Template(ctx)
    meter = template.serve()
    path = ctx.path('cache.sock')
    publisher = Publisher(ctx, template, meter, path, **options)
    return template, meter, path, publisher


def make_readers(ctx, count, template, meter, path, **options):
    # A busy machine is no dead publisher
    options.setdefault('timeout', 60000)
    readers = [Reader(ctx, template, meter, path, **options)
               for _ in range(count)]
    for reader in readers:
        reader.wait_connected()
    return readers


def about_once(template, meter, before=0):
    """The server has sent the template once, give or take the first bytes
    that each process looks at and what the protocol adds."""
    sent = meter.bytes - before
    check(sent < template.size * 1.05, 'the server sent %d bytes of a '
          'template of %d', sent, template.size)


@test()
def once(ctx):
    """Ten readers want the same at the same moment: the server is read
    once, and what comes later is not read from it at all."""
    template, meter, path, publisher = surroundings(ctx)
    readers = make_readers(ctx, 10, template, meter, path)
    in_parallel(readers, lambda reader, _: reader.verify_all())
    about_once(template, meter)
    before = meter.bytes
    source = random.Random(ctx.name)

    def again(reader, _):
        for _ in range(100):
            length = 512 * source.randrange(1, 600)
            offset = 512 * source.randrange((template.size - length) // 512)
            reader.verify(offset, length)

    in_parallel(readers, again)
    check(meter.bytes == before, 'the server was read again')
    for reader in readers:
        statistics = reader.statistics()
        check(statistics['misses'] == 0, 'misses: %s', statistics)
        check(statistics['hit-bytes'] + statistics['fetched-bytes'] >
              template.size, 'bytes: %s', statistics)
        check(statistics['used-blocks'] == -(-template.size // 65536),
              'blocks: %s', statistics)
    state = publisher.state()
    check(state['readers'] == 10 and state['state'] == 'recording',
          'publisher: %s', state)
    for reader in readers:
        reader.quit()
    publisher.quit()


@test()
def publisher_dies(ctx):
    """kill -9 of the publisher while all read: every reader goes on, what
    was in the memory stays there, and the next publisher is found."""
    template, meter, path, publisher = surroundings(ctx)
    readers = make_readers(ctx, 4, template, meter, path)
    middle = template.size // 2 // MiB * MiB

    def read(reader, number):
        for offset in range(0, template.size, MiB // 4):
            if number == 0 and offset == middle:
                publisher.kill()
            reader.verify(offset, min(MiB // 4, template.size - offset))

    in_parallel(readers, read)
    for reader in readers:
        reader.wait_connected(False)
        before = reader.statistics()
        reader.verify(0, MiB)
        after = reader.statistics()
        check(after['misses'] == before['misses'],
              'what is in memory was read from the template')
        check('publisher' in reader.info()['problem'], 'problem: %s',
              reader.info()['problem'])
    second = Publisher(ctx, template, meter, path)
    for reader in readers:
        reader.wait_connected()
    before = meter.bytes
    in_parallel(readers, lambda reader, _: reader.verify_all())
    about_once(template, meter, before)
    check(second.state()['readers'] == 4, 'publisher: %s', second.state())


@test()
def readers_die(ctx):
    """kill -9 of readers in the middle of their requests harms nobody, and
    leaves nothing behind in the publisher."""
    template, meter, path, publisher = surroundings(ctx)
    readers = make_readers(ctx, 4, template, meter, path)
    victims = make_readers(ctx, 4, template, meter, path)

    def read(reader, number):
        for turn, offset in enumerate(range(0, template.size, MiB // 4)):
            if number < 4 and turn == 5 * (number + 1):
                victims[number].kill()
            reader.verify(offset, min(MiB // 4, template.size - offset))

    def read_until_dead(reader, number):
        try:
            read(reader, 4)
        except (ConnectionError, OSError):
            check(reader.process.gone_soon(), '%s fails', reader.name)

    in_parallel(readers + victims, lambda reader, number:
                read(reader, number) if number < 4
                else read_until_dead(reader, number))
    about_once(template, meter)
    wait_for(lambda: publisher.state()['readers'] == 4, 60,
             'the publisher has 4 readers')
    for reader in readers:
        check(reader.statistics()['misses'] == 0, 'misses: %s',
              reader.statistics())
        reader.quit()
    publisher.quit()


@test()
def publisher_stops(ctx):
    """A publisher that does not answer is waited for once, for the timeout,
    and found again when he goes on."""
    template, meter, path, publisher = surroundings(ctx)
    reader, = make_readers(ctx, 1, template, meter, path, timeout=3000)
    reader.verify(0, MiB)
    publisher.process.popen.send_signal(signal.SIGSTOP)
    reader.verify_all()
    check(reader.statistics()['misses'], 'misses: %s', reader.statistics())
    reader.wait_connected(False)
    # One that starts now greets him in vain, and reads all the same
    other = Reader(ctx, template, meter, path, timeout=3000)
    other.verify(0, MiB)
    check(other.statistics()['miss-bytes'] == MiB, 'misses: %s',
          other.statistics())
    publisher.process.popen.send_signal(signal.SIGCONT)
    for each in (reader, other):
        each.wait_connected()
        before = each.statistics()['misses']
        each.verify_all()
        check(each.statistics()['misses'] == before, 'misses: %s',
              each.statistics())
    publisher.quit()


@test()
def killed_while_saving(ctx):
    """kill -9 while the file is written: there is no file, or a whole one."""
    template = Template(ctx)
    path, cache = ctx.path('cache.sock'), ctx.path('cache')
    saved = 0
    for turn in range(8):
        publisher = Publisher(ctx, template, None, path, cache_file=cache)
        check(publisher.state()['state'] == 'recording', 'turn %d: %s', turn,
              publisher.state())
        reader, = make_readers(ctx, 1, template, None, path)
        reader.verify_all()
        publisher.seal()
        # Each time a little later
        wait_for(lambda: turn == 0 or
                 (os.path.exists(cache + '.new') and
                  os.path.getsize(cache + '.new') >= turn * MiB) or
                 os.path.exists(cache), 60, 'the file begins', 0.0005)
        publisher.kill()
        reader.verify_all()
        reader.quit()
        check(not os.path.exists(cache + '.aside'), 'a file was put aside')
        if os.path.exists(cache):
            saved += 1
            publisher = Publisher(ctx, template, None, path, cache_file=cache)
            check(publisher.state()['sealed-by'] == 'cache-file',
                  'turn %d: %s', turn, publisher.state())
            publisher.wait_prefetched()
            reader, = make_readers(ctx, 1, template, None, path)
            reader.verify_all()
            check(not reader.statistics()['misses'] and
                  not publisher.state()['damaged-blocks'],
                  'turn %d: %s %s', turn, reader.statistics(),
                  publisher.state())
            reader.quit()
            publisher.quit()
            os.unlink(cache)
    ctx.log('%d of 8 files were complete' % saved)


def resident(process):
    with open('/proc/%d/statm' % process.popen.pid) as file:
        return int(file.read().split()[1]) * 4096


@test()
def hostile_readers(ctx):
    """What a guest that has taken over its QEMU can send to the publisher:
    nothing of it harms him, or the others."""
    template, meter, path, publisher = surroundings(ctx, max_readers=20)
    identity = publisher.info()['identity']
    good, = make_readers(ctx, 1, template, meter, path)
    good.verify(0, MiB)
    blocks = -(-template.size // 65536)

    def greeted():
        wire = Wire(path)
        check(wire.greet(identity, template.size) == 0, 'not greeted')
        return wire

    for bad in (Wire.hello(identity, template.size, magic=1),
                Wire.hello(identity, template.size, version=99),
                os.urandom(4096)):
        wire = Wire(path)
        wire.sock.sendall(bad)
        check(wire.closed(), 'not closed')
    other = '00' * 32
    for hello in ((other, template.size), (identity, template.size + 1)):
        wire = Wire(path)
        check(wire.greet(*hello) == 1 and wire.fd is None,
              'memory of a foreign template')
        check(wire.closed(), 'not closed')
    for bad in (Wire.request(1, blocks, 1), Wire.request(1, blocks - 1, 2),
                Wire.request(1, 0, 0), Wire.request(1, 0, 65),
                Wire.request(1, -1, 1), Wire.request(1, -1, -1),
                Wire.request(1, 0, 1, magic=7), os.urandom(32)):
        wire = greeted()
        wire.sock.sendall(bad)
        check(wire.closed(), 'not closed')
        os.close(wire.fd)
        good.verify(MiB, MiB)
    check(publisher.state()['misbehaved'] >= 11, 'misbehaved: %s',
          publisher.state())

    # Somebody who asks and never takes an answer
    before = resident(publisher.process)
    silent = [greeted() for _ in range(4)]
    for wire in silent:
        wire.sock.setblocking(False)
        try:
            for cookie in range(100000):
                wire.sock.send(Wire.request(cookie, 0, 1))
        except BlockingIOError:
            pass
        else:
            raise Failure('100,000 requests were taken')
    good.verify_all()
    check(not good.statistics()['misses'], 'misses: %s', good.statistics())
    grown = resident(publisher.process) - before - template.size
    check(grown < 16 * MiB, 'the publisher has grown by %d', grown)
    for wire in silent:
        wire.close()

    # Too many of them: one process does not keep the others out
    wait_for(lambda: publisher.state()['readers'] == 1, 60,
             'the silent ones have left')
    refused = publisher.state()['refused']
    crowd = [Wire(path) for _ in range(30)]
    for wire in crowd:
        try:
            wire.sock.sendall(Wire.hello(identity, template.size))
        except ConnectionError:
            pass
    wait_for(lambda: publisher.state()['refused'] - refused == 25, 60,
             'readers are refused')
    check(publisher.state()['readers'] == 6, 'readers: %s',
          publisher.state())
    late, = make_readers(ctx, 1, template, meter, path)
    late.verify(0, MiB)
    check(not late.statistics()['misses'], 'misses: %s', late.statistics())
    late.quit()
    good.verify_all()
    for wire in crowd:
        wire.close()
    wait_for(lambda: publisher.state()['readers'] == 1, 60,
             'the crowd has left')

    # And too many processes
    crowd = make_readers(ctx, 2, template, meter, path)
    publisher.quit()
    publisher = Publisher(ctx, template, meter, path, max_readers=2)
    wait_for(lambda: publisher.state()['refused'], 60, 'one is refused')
    check(publisher.state()['readers'] == 2, 'readers: %s',
          publisher.state())
    for reader in [good] + crowd:
        reader.verify(0, MiB)
    publisher.quit()
    good.verify_all()


def send_all_that_goes(sock, message):
    """How often it went."""
    sock.setblocking(False)
    try:
        for count in range(100000):
            sock.send(message)
    except BlockingIOError:
        return count
    raise Failure('100,000 messages were taken')


def flood(path, identity, length, message):
    """A connection whose publisher waits for an answer to be taken: he has
    read more messages than there is room for answers."""
    most = 0
    for size in (16, 32):
        pair = socket.socketpair(socket.AF_UNIX)
        most += send_all_that_goes(pair[0], bytes(size))
        for sock in pair:
            sock.close()
    wire = Wire(path)
    check(wire.greet(identity, length) == 0, 'not greeted')
    sent = [0]

    def is_full():
        try:
            sent[0] += send_all_that_goes(wire.sock, message)
        except ConnectionError:
            return True         # he has hung up already
        return sent[0] > most

    wait_for(is_full, 60, 'the publisher waits')
    return wire


@test()
def answers_not_taken(ctx):
    """Who asks and never takes an answer is hung up on after a while, also
    if he closes his side meanwhile, and does not keep the publisher from
    ending."""
    template, meter, path, publisher = surroundings(ctx)
    identity = publisher.info()['identity']
    wires = [flood(path, identity, template.size, Wire.request(7, 0, 1))
             for _ in range(2)]
    wires[1].sock.shutdown(socket.SHUT_RDWR)
    wait_for(lambda: publisher.state()['readers'] == 0, 60,
             'the publisher has hung up')
    wires.append(flood(path, identity, template.size,
                       Wire.request(7, 0, 1)))
    publisher.quit()


@test()
def shared_memory(ctx):
    """The descriptor that a reader gets cannot be used to change the memory
    or to make it smaller."""
    template, meter, path, publisher = surroundings(ctx)
    wire = Wire(path)
    check(wire.greet(publisher.info()['identity'], template.size) == 0,
          'not greeted')
    seals = fcntl.fcntl(wire.fd, F_GET_SEALS)
    check(seals == FD_SEALS, 'seals 0x%x', seals)
    size = os.fstat(wire.fd).st_size
    again = os.open('/proc/self/fd/%d' % wire.fd, os.O_RDWR)
    for fd in (wire.fd, again):
        for what in (lambda: os.pwrite(fd, b'x', 8192),
                     lambda: mmap.mmap(fd, size),
                     lambda: os.ftruncate(fd, size // 2),
                     lambda: os.ftruncate(fd, 2 * size),
                     lambda: os.posix_fallocate(fd, size, 4096)):
            try:
                what()
            except PermissionError:
                continue
            raise Failure('the shared memory can be changed')
    check(mmap.mmap(fd, size, prot=mmap.PROT_READ)[:8] == b'boochmap',
          'it cannot be read')
    os.close(again)
    os.close(wire.fd)


def ask(wire, message):
    """The status of the answer."""
    wire.sock.sendall(message)
    cookie, status = wire.reply()
    check(cookie == 7, 'an answer to %d', cookie)
    return status


@test()
def boot_end_message(ctx):
    """That a guest has booted is refused without the option, and before any
    block was read; ends the recording once, and does no harm when it comes
    again, is not well-formed, or never stops."""
    template, meter, path, publisher = surroundings(ctx)
    identity = publisher.info()['identity']

    def greeted():
        wire = Wire(path)
        check(wire.greet(identity, template.size) == 0, 'not greeted')
        return wire

    wire = greeted()
    check(ask(wire, Wire.request(7, 0, 1)) == 0, 'block 0')
    check(ask(wire, Wire.boot_end(7)) == 4, 'not refused')
    check(ask(wire, Wire.request(7, 1, 1)) == 0, 'block 1')
    state = publisher.state()
    check(state['state'] == 'recording' and state['boot-ends'] == 1 and
          state['boot-ends-refused'] == 1, 'publisher: %s', state)
    publisher.quit()

    publisher = Publisher(ctx, template, meter, path, seal_by_guest=True,
                          cache_file=ctx.path('cache'))
    wire = greeted()
    check(ask(wire, Wire.boot_end(7)) == 5, 'before any block')
    check(publisher.state()['state'] == 'recording', 'publisher: %s',
          publisher.state())
    check(ask(wire, Wire.request(7, 0, 3)) == 0, 'blocks')
    for bad in (Wire.boot_end(7, first=1), Wire.boot_end(7, last=1)):
        other = greeted()
        other.sock.sendall(bad)
        check(other.closed(), 'not closed')
    state = publisher.state()
    check(state['state'] == 'recording' and state['misbehaved'] == 2,
          'publisher: %s', state)
    check(ask(wire, Wire.boot_end(7)) == 0, 'not sealed')
    publisher.wait_saved()
    state = publisher.state()
    check(state['sealed-by'] == 'guest-agent' and state['blocks'] == 3,
          'publisher: %s', state)
    for _ in range(3):
        check(ask(wire, Wire.boot_end(7)) == 0, 'again')
    check(ask(wire, Wire.request(7, 3, 1)) == 2, 'it still records')
    state = publisher.state()
    check((state['saved'], state['boot-ends'], state['boot-ends-refused']) ==
          (1, 5, 1), 'publisher: %s', state)

    # Who says it for ever and never takes an answer is not listened to
    silent = flood(path, identity, template.size, Wire.boot_end(7))
    reader, = make_readers(ctx, 1, template, meter, path)
    reader.verify_all()
    check(reader.statistics()['hit-bytes'] == 3 * 65536, 'reader: %s',
          reader.statistics())
    publisher.quit()
    silent.close()


class Agent:
    """A guest's agent, as the object thinvm-hints of a reader hears it."""

    def __init__(self, ctx, reader, object_id, **options):
        path = ctx.path(ctx.unique('hints'))
        reader.qmp.cmd_raw('chardev-add', {
            'id': object_id, 'backend': {'type': 'socket', 'data': {
                'server': True, 'wait': False,
                'addr': {'type': 'unix', 'data': {'path': path}}}}})
        reader.qmp.cmd('object-add', qom_type='thinvm-hints', id=object_id,
                       chardev=object_id, **options)
        self.reader, self.id = reader, object_id
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(path)
        ctx.cleanup(self.sock.close)
        self.sock.sendall(b'hello thinvm-hints 1 test/1\n')
        heard = b''
        while b'version 1\n' not in heard:
            data = self.sock.recv(4096)
            check(data, 'the object has closed its channel')
            heard += data

    def booted(self):
        """Say so; QMP tells whose guest it was."""
        self.sock.sendall(b'booted\n')
        event = self.reader.qmp.wait_event('THINVM_GUEST_BOOTED')
        check(event['data'] == {'id': self.id}, 'event: %s', event)

    def info(self):
        return [info for info in self.reader.qmp.cmd('query-thinvm-hints')
                if info['id'] == self.id][0]


def told(reader, what):
    wait_for(lambda: reader.info().get('boot-end') == what, 60,
             'the boot\'s end is "%s": %s' % (what, reader.info()))


@test()
def guest_says_booted(ctx):
    """The word of a guest's agent, from its channel to the publisher: the
    recording ends if he lets guests decide, and is there for the next
    boot.  Where it does not get there, that is told."""
    template, meter, path, publisher = surroundings(ctx)
    reader, = make_readers(ctx, 1, template, meter, path)
    check('boot-end' not in reader.info(), 'reader: %s', reader.info())
    alone = Agent(ctx, reader, 'alone')
    alone.booted()
    check('boot-end' not in reader.info(), 'nobody was to be told')
    lost = Agent(ctx, reader, 'lost', boot_cache='elsewhere')
    lost.booted()
    check("'elsewhere'" in lost.info()['boot-cache-problem'], 'object: %s',
          lost.info())
    wrong = Agent(ctx, reader, 'wrong', boot_cache='template')
    wrong.booted()
    check("'template'" in wrong.info()['boot-cache-problem'], 'object: %s',
          wrong.info())
    reader.verify(0, MiB)
    Agent(ctx, reader, 'refused', boot_cache='cache').booted()
    told(reader, 'refused')
    check(publisher.state()['state'] == 'recording', 'publisher: %s',
          publisher.state())
    publisher.quit()
    reader.wait_connected(False)
    early = Agent(ctx, reader, 'unsent', boot_cache='cache')
    early.booted()
    told(reader, 'unsent')
    check('could not be told' in early.info()['boot-cache-problem'],
          'object: %s', early.info())

    options = {'seal_by_guest': True, 'cache_file': ctx.path('cache')}
    publisher = Publisher(ctx, template, meter, path, **options)
    reader.wait_connected()
    # What was said before was not said to this one
    check(publisher.state()['boot-ends'] == 0, 'publisher: %s',
          publisher.state())
    Agent(ctx, reader, 'empty', boot_cache='cache').booted()
    told(reader, 'empty')
    reader.verify(0, MiB)
    agent = Agent(ctx, reader, 'hints', boot_cache='cache')
    agent.booted()
    told(reader, 'sealed')
    check(agent.info()['booted'] == 1 and
          'boot-cache-problem' not in agent.info(), 'object: %s',
          agent.info())
    publisher.wait_saved()
    state = publisher.state()
    check(state['sealed-by'] == 'guest-agent' and state['blocks'] == 16,
          'publisher: %s', state)
    reader.verify_all()
    check(publisher.state()['blocks'] == 16, 'publisher: %s',
          publisher.state())
    publisher.quit()
    publisher = Publisher(ctx, template, meter, path, **options)
    check(publisher.state()['blocks'] == 16, 'publisher: %s',
          publisher.state())


class FalsePublisher:
    """Listens like a publisher, and answers as it is told."""

    def __init__(self, ctx, path):
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(8)
        self.listener.settimeout(60)
        ctx.cleanup(self.listener.close)

    def answer(self, make_reply, fds=()):
        """Take one connection, and answer its hello."""
        sock, _ = self.listener.accept()
        hello = sock.recv(64)
        check(len(hello) == 64, 'a hello of %d bytes', len(hello))
        reply = make_reply(hello)
        if reply:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS,
                       array.array('i', fds))] if fds else []
            sock.sendmsg([reply], rights)
        return sock


def memory(size, seals=FD_SEALS, content=b''):
    fd = os.memfd_create('test', os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    os.pwrite(fd, content, 0)
    if seals:
        fcntl.fcntl(fd, F_ADD_SEALS, seals)
    return fd


@test()
def false_publisher(ctx):
    """A publisher that is none: whatever he sends, the reader notices, and
    reads the template."""
    template = Template(ctx)
    path = ctx.path('cache.sock')
    false = FalsePublisher(ctx, path)
    reader = Reader(ctx, template, None, path, timeout=300)
    ok = memory(1 * MiB)
    cases = (
        ('not sealed', lambda hello: hello, [memory(MiB, 0)]),
        ('not sealed', lambda hello: hello, [memory(MiB, FD_SEALS & ~0x2)]),
        ('not sealed', lambda hello: hello, [os.open('/dev/null', os.O_RDWR)]),
        ('only', lambda hello: hello, [memory(100)]),
        ('damaged', lambda hello: hello, [ok]),
        ('damaged', lambda hello: hello, [memory(
            MiB, FD_SEALS, b'boochmap' + os.urandom(4096))]),
        ('another template', lambda hello: hello, []),
        ('another template', lambda hello: hello[:12] + struct.pack('<I', 1)
         + hello[16:], [ok]),
        ('no publisher', lambda hello: os.urandom(64), [ok]),
        ('does not answer', lambda hello: None, []),
        ('does not answer', lambda hello: hello[:20], []),
    )
    for problem, reply, fds in cases:
        sock = false.answer(reply, fds)
        wait_for(lambda: problem in reader.info().get('problem', ''), 60,
                 'the reader says "%s": %s' % (problem, reader.info()))
        reader.verify(0, MiB)
        sock.close()
    with false.listener:
        pass
    os.unlink(path)
    publisher = Publisher(ctx, template, None, path)
    reader.wait_connected()
    reader.verify_all()
    check(not publisher.state()['misbehaved'], 'publisher: %s',
          publisher.state())


@test()
def two_publishers(ctx):
    """The second one on a socket is refused while the first one lives, and
    takes over from one that died."""
    template, meter, path, publisher = surroundings(ctx)
    try:
        Publisher(ctx, template, meter, path)
    except QMPError as err:
        check('Another publisher' in err.desc, 'message: %s', err.desc)
    else:
        raise Failure('there are two publishers')
    reader, = make_readers(ctx, 1, template, meter, path)
    reader.verify(0, MiB)
    publisher.kill()
    Publisher(ctx, template, meter, path)
    reader.wait_connected()
    reader.verify_all()


@test()
def later_boot(ctx):
    """A recording that was sealed serves the next start of the publisher:
    the template is not read but for a few samples; what was not recorded
    is read by each reader himself."""
    template, meter, path, publisher = surroundings(
        ctx, cache_file=ctx.path('cache'), record_bytes=8 * MiB)
    reader, = make_readers(ctx, 1, template, meter, path)
    reader.verify_all()
    check(publisher.state()['sealed-by'] == 'record-bytes', 'publisher: %s',
          publisher.state())
    check(publisher.state()['used-bytes'] <= 8 * MiB, 'publisher: %s',
          publisher.state())
    publisher.wait_saved()
    reader.quit()
    publisher.quit()
    before = meter.bytes
    publisher = Publisher(ctx, template, meter, path,
                          cache_file=ctx.path('cache'))
    publisher.wait_prefetched()
    reader, = make_readers(ctx, 1, template, meter, path)
    for offset in range(0, 7 * MiB, MiB):
        reader.verify(offset, MiB)
    check(meter.bytes - before < 2 * MiB, 'the server sent %d bytes',
          meter.bytes - before)
    statistics = reader.statistics()
    check(statistics['hit-bytes'] == 7 * MiB and
          statistics['prefetched-used-blocks'] == 7 * 16 and
          statistics['prefetched-blocks'] == publisher.state()['blocks'],
          'reader: %s', statistics)
    reader.verify(template.size - MiB, MiB)
    check(reader.statistics()['miss-bytes'] == MiB, 'reader: %s',
          reader.statistics())


@test(formats=THIN, slow=True)
def guests(ctx):
    """Guests on linked clones, with two queues and threads each, of a
    template whose publisher dies meanwhile."""
    template = Template(ctx)
    os.truncate(template.place.path, GiB)
    path = ctx.path('cache.sock')
    publisher = Publisher(ctx, template, None, path)
    vms = []
    for number in range(2):
        clone = File(ctx, 'clone-%d' % number)
        create(ctx, clone, GiB)
        guest = Guest(ctx, lanes=2, blocks=400, base=32 * MiB)
        file = clone.blockdev(NODE + '-file')
        vms.append(VM(ctx, guest, clone, iothread=2, disk=[
            *template_nodes(template), cache_node(path), file,
            {'driver': ctx.fmt, 'node-name': NODE, 'file': NODE + '-file',
             'backing': 'cache'}]))
    for vm in vms:
        vm.guest.wait_ready()
        vm.guest.start_writing()
        vm.guest.wait_writes(300)
    publisher.kill()
    for vm in vms:
        vm.guest.wait_writes(300 + vm.guest.acked_count())
        vm.guest.stop_writing()
        vm.guest.verify('read by the guest')
        vm.quit()
    for number in range(2):
        require_clean(ctx, File(ctx, 'clone-%d' % number))
