# SPDX-License-Identifier: GPL-2.0-or-later
"""QMP for tools that do one thing after the other.

A connection belongs to one thread.  Nothing waits without a limit: a QEMU
that does not answer (its host may be frozen) counts as gone.  Events that
arrive while an answer is awaited are kept in order, each with the moment at
which it was received, by this host's monotonic clock.
"""

import collections
import contextlib
import json
import re
import socket
import time

LONGEST_LINE = 64 << 20         # bytes of one message; then it is no QEMU
Event = collections.namedtuple('Event', 'name data moment')


class QmpError(Exception):
    """QEMU refused a command; the text is its own."""


class Gone(Exception):
    """The QEMU went away, or does not answer."""


def parse_address(text):
    """unix:PATH, PATH, tcp:HOST:PORT or HOST:PORT, as socket family and
    address."""
    tcp = re.fullmatch(r'(?:tcp:)?(\[[^]]+\]|[^/:]+):(\d{1,5})', text)
    if tcp and not text.startswith('unix:'):
        port = int(tcp[2])
        if not 0 < port < 65536:
            raise ValueError(f"'{text}': {port} is no TCP port")
        return 'tcp', (tcp[1].strip('[]'), port)
    path = text.removeprefix('unix:')
    if not path or text.startswith('tcp:'):
        raise ValueError(f"'{text}' is neither the path of a UNIX socket nor "
                         'tcp:HOST:PORT')
    return 'unix', path


def _connect(address, seconds):
    family, where = parse_address(address)
    if family == 'tcp':
        return socket.create_connection(where, seconds)
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(seconds)
        sock.connect(where)
    except OSError:
        sock.close()
        raise
    return sock


class Qmp:
    """A connection.  .closed tells why it ended, None while it has not."""

    def __init__(self, address, seconds=30):
        """@seconds: how long an answer may take."""
        self.address = address
        self.seconds = seconds
        self.closed = None
        self.events = collections.deque()
        self._buffer = bytearray()
        self._last_id = 0
        try:
            self._sock = _connect(address, seconds)
        except OSError as e:
            raise Gone(f'{address}: {e.strerror or e}') from None
        greeting = self._read(time.monotonic() + seconds)
        if greeting is None:
            raise self._end('no greeting; does another program use this '
                            'monitor?')
        if 'QMP' not in greeting:
            raise self._end('does not speak QMP')
        self.greeting = greeting['QMP']
        self.cmd('qmp_capabilities')

    def close(self):
        self._sock.close()
        self.closed = self.closed or 'closed'

    def _end(self, why):
        self.closed = f'{self.address}: {why}'
        self._sock.close()
        return Gone(self.closed)

    def _read(self, until):
        """One message, or None when the time is over."""
        while b'\n' not in self._buffer:
            left = until - time.monotonic()
            self._sock.settimeout(max(left, 0.001))
            try:
                data = self._sock.recv(1 << 16)
            except (TimeoutError, socket.timeout):
                if left <= 0:
                    return None
                continue
            except OSError as e:
                raise self._end(e.strerror or str(e)) from None
            if not data:
                raise self._end('QEMU has ended')
            self._buffer += data
            if len(self._buffer) > LONGEST_LINE:
                raise self._end('sends what is no QMP')
        line, _, self._buffer = self._buffer.partition(b'\n')
        try:
            message = json.loads(line)
        except ValueError:
            raise self._end('sends what is no QMP') from None
        if not isinstance(message, dict):
            raise self._end('sends what is no QMP')
        return message

    def _keep(self, message):
        if 'event' in message:
            self.events.append(Event(message['event'],
                                     message.get('data', {}),
                                     time.monotonic()))

    def cmd(self, command, arguments=None, seconds=None):
        """Execute a command; what it returns."""
        if self.closed:
            raise Gone(self.closed)
        self._last_id += 1
        request = {'execute': command, 'id': self._last_id}
        if arguments:
            request['arguments'] = arguments
        try:
            self._sock.settimeout(seconds or self.seconds)
            self._sock.sendall(json.dumps(request).encode() + b'\n')
        except OSError as e:
            raise self._end(e.strerror or str(e)) from None
        until = time.monotonic() + (seconds or self.seconds)
        while True:
            message = self._read(until)
            if message is None:
                raise self._end(f'no answer to {command} in '
                                f'{seconds or self.seconds} s')
            self._keep(message)
            if message.get('id') == self._last_id:
                break
        if 'error' in message:
            raise QmpError(message['error'].get('desc', 'unknown error'))
        return message['return']

    def poll(self, seconds=0.0):
        """Take in what has arrived; wait so long for a first message."""
        until = time.monotonic() + seconds
        while not self.closed:
            message = self._read(until)
            if message is None:
                return
            self._keep(message)
            until = time.monotonic()

    def take_events(self):
        """The events since the last call."""
        with contextlib.suppress(Gone):
            self.poll()
        events = list(self.events)
        self.events.clear()
        return events
