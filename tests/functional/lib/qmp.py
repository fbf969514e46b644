# SPDX-License-Identifier: GPL-2.0-or-later
"""A small QMP client over a UNIX socket.

One thread uses it.  Events that arrive while a reply is awaited are kept in
order in `events`; wait_event() looks there first.
"""

import json
import socket
import time

from .context import Failure, wait_for


class QMPError(Exception):
    """QEMU refused a command; .desc is its message."""

    def __init__(self, command, error):
        super().__init__('%s: %s' % (command, error.get('desc')))
        self.command = command
        self.desc = error.get('desc')
        self.error_class = error.get('class')


class QMPClosed(Exception):
    """The other side went away."""


class QMP:
    def __init__(self, ctx, path, owner):
        """Connect to @path; @owner is the Process that listens there."""
        self.ctx = ctx
        self.owner = owner
        self.events = []
        self._next_id = 0
        self._unawaited = {}        # id -> command, of send()
        self._buffer = b''
        self._sock = socket.socket(socket.AF_UNIX)

        def connect():
            owner.check_alive()
            try:
                self._sock.connect(path)
                return True
            except (FileNotFoundError, ConnectionRefusedError):
                return False

        wait_for(connect, 60, 'QMP socket of %s' % owner.name)
        ctx.cleanup(self._sock.close)
        self._read(60)                                  # the greeting
        self.cmd('qmp_capabilities')

    def _read(self, seconds):
        """The next message, or None if there is none within @seconds."""
        end = time.monotonic() + seconds
        while b'\n' not in self._buffer:
            left = end - time.monotonic()
            if left <= 0:
                return None
            self._sock.settimeout(left)
            try:
                data = self._sock.recv(65536)
            except socket.timeout:
                return None
            except ConnectionError:
                data = b''
            if not data:
                raise QMPClosed('%s closed its QMP socket: %s' % (
                    self.owner.name, self.owner.log_tail()))
            self._buffer += data
        line, self._buffer = self._buffer.split(b'\n', 1)
        return json.loads(line)

    def _note_event(self, message):
        if 'event' in message:
            message['received'] = time.monotonic()
            self.events.append(message)
            self.ctx.log('%s event %s %s' % (
                self.owner.name, message['event'], message.get('data')))
        command = self._unawaited.pop(message.get('id'), None)
        if command and 'error' in message:
            raise QMPError(command, message['error'])

    def cmd(self, command, timeout=60, **arguments):
        """Execute a command; underscores in argument names become dashes."""
        arguments = {key.replace('_', '-'): value
                     for key, value in arguments.items() if value is not None}
        return self.cmd_raw(command, arguments, timeout)

    def send(self, command, **arguments):
        """Start a command whose reply may come at any time, or never; an
        error is raised by whoever reads it."""
        self._send(command, {key.replace('_', '-'): value
                             for key, value in arguments.items()})
        self._unawaited[self._next_id] = command

    def _send(self, command, arguments):
        self._next_id += 1
        request = {'execute': command, 'id': self._next_id}
        if arguments:
            request['arguments'] = arguments
        try:
            self._sock.sendall(json.dumps(request).encode() + b'\n')
        except OSError as err:
            raise QMPClosed('%s: %s' % (self.owner.name, err)) from None

    def cmd_raw(self, command, arguments=None, timeout=60):
        self._send(command, arguments)
        end = time.monotonic() + timeout
        while True:
            message = self._read(max(0.01, end - time.monotonic()))
            if message is None:
                raise Failure('%s: no reply to %s in %d s'
                              % (self.owner.name, command, timeout))
            self._note_event(message)
            if message.get('id') == self._next_id:
                break
        if 'error' in message:
            self.ctx.log('%s %s error %s' % (self.owner.name, command,
                                             message['error'].get('desc')))
            raise QMPError(command, message['error'])
        return message['return']

    def poll(self):
        """Take in the events that have arrived."""
        message = self._read(0.001)
        while message is not None:
            self._note_event(message)
            message = self._read(0.001)

    def wait_event(self, name, seconds=60, match=None):
        """The first event @name (for which match(data) holds), removed."""
        end = time.monotonic() + seconds
        while True:
            for event in self.events:
                if event['event'] == name and (
                        match is None or match(event.get('data', {}))):
                    self.events.remove(event)
                    return event
            left = end - time.monotonic()
            if left <= 0:
                raise Failure('%s: no event %s in %d s'
                              % (self.owner.name, name, seconds))
            message = self._read(left)
            if message is not None:
                self._note_event(message)

    def close(self):
        self._sock.close()
