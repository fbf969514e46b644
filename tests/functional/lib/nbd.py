# SPDX-License-Identifier: GPL-2.0-or-later
"""A minimal NBD client with requests in parallel.

qemu-io would do for single requests; this one exists because the tests of
acknowledged writes must know exactly which replies had arrived when the
server was killed.  Fixed newstyle negotiation, NBD_OPT_GO, simple replies.
"""

import errno
import os
import socket
import struct
import time

from .context import Failure

OPT_MAGIC = 0x49484156454F5054
REPLY_MAGIC = 0x3e889045565a9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
OPT_GO = 7
REP_ACK, REP_INFO = 1, 3
READ, WRITE, DISC, FLUSH, TRIM, WRITE_ZEROES = 0, 1, 2, 3, 4, 6
FLAG_FUA = 1


class NBDClient:
    def __init__(self, ctx, path, export):
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(60)
        self._sock.connect(path)
        ctx.cleanup(self.close)
        self._handle = 0
        self._pending = {}              # handle -> (tag, bytes of the reply)
        self.size = self._negotiate(export.encode())

    def _recv(self, length):
        data = b''
        while len(data) < length:
            part = self._sock.recv(length - len(data))
            if not part:
                raise ConnectionError('the NBD server closed the connection')
            data += part
        return data

    def _negotiate(self, export):
        magic, option_magic, _ = struct.unpack('>QQH', self._recv(18))
        if magic != 0x4e42444d41474943 or option_magic != OPT_MAGIC:
            raise Failure('not an NBD server')
        payload = struct.pack('>I', len(export)) + export + struct.pack('>H', 0)
        # client flags: fixed newstyle, no zeroes
        self._sock.sendall(struct.pack('>I', 3) + struct.pack(
            '>QII', OPT_MAGIC, OPT_GO, len(payload)) + payload)
        size = None
        while True:
            _, _, kind, length = struct.unpack('>QIII', self._recv(20))
            data = self._recv(length)
            if kind == REP_ACK:
                return size
            if kind == REP_INFO:
                if struct.unpack('>H', data[:2])[0] == 0:
                    size = struct.unpack('>Q', data[2:10])[0]
            else:
                raise Failure('NBD server refuses export %s: %s'
                              % (export, data.decode(errors='replace')))

    def send(self, command, offset=0, length=0, data=b'', tag=None, flags=0):
        """Send a request without waiting for its reply."""
        self._handle += 1
        self._pending[self._handle] = (tag, length if command == READ else 0)
        self._sock.sendall(struct.pack(
            '>IHHQQI', REQUEST_MAGIC, flags, command, self._handle, offset,
            len(data) or length) + data)

    def pending(self):
        return len(self._pending)

    def reply(self):
        """(tag, errno, data) of the next reply, in the server's order."""
        magic, error, handle = struct.unpack('>IIQ', self._recv(16))
        if magic != SIMPLE_REPLY_MAGIC:
            raise Failure('NBD: reply magic %#x' % magic)
        tag, length = self._pending.pop(handle)
        return tag, error, self._recv(length) if length and not error else b''

    def _one(self, command, **request):
        if self._pending:
            raise Failure('NBD: a single request amid others')
        self.send(command, **request)
        _, error, data = self.reply()
        if error:
            raise OSError(error, 'NBD command %d at %s: %s' % (
                command, request.get('offset', 0), os.strerror(error)))
        return data

    def read(self, offset, length):
        return self._one(READ, offset=offset, length=length)

    def write(self, offset, data, fua=False):
        self._one(WRITE, offset=offset, data=data,
                  flags=FLAG_FUA if fua else 0)

    def flush(self):
        self._one(FLUSH)

    def trim(self, offset, length):
        self._one(TRIM, offset=offset, length=length)

    def zero(self, offset, length):
        self._one(WRITE_ZEROES, offset=offset, length=length)

    def write_all(self, requests, depth=16):
        """Write (offset, data) pairs; [(offset, time acknowledged)].

        Stops early, without an error, when the server dies.
        """
        acked = []

        def take():
            offset, error, _ = self.reply()
            if error:
                raise OSError(error, 'NBD write at %d: %s' % (
                    offset, os.strerror(error)))
            acked.append((offset, time.monotonic()))

        try:
            for offset, data in requests:
                while self.pending() >= depth:
                    take()
                self.send(WRITE, offset=offset, data=data, tag=offset)
            while self.pending():
                take()
        except (ConnectionError, socket.timeout):
            pass
        except OSError as err:
            if err.errno not in (errno.EPIPE, errno.ECONNRESET):
                raise
        return acked

    def close(self):
        try:
            self._sock.sendall(struct.pack('>IHHQQI', REQUEST_MAGIC, 0, DISC,
                                           0, 0, 0))
        except OSError:
            pass
        self._sock.close()
