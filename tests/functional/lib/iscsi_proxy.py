# SPDX-License-Identifier: GPL-2.0-or-later
"""Between an initiator and a Target: SCSI commands can be held, or spoiled.

A place as a Lun is (image.py): who opens it logs in through the proxy.  It
looks at the headers of what the initiator sends (RFC 7143: 48 bytes, then as
many as they say); digests are not in use here.
"""

import socket
import threading

from .context import Failure

# (operation code, service action)
READ_RESERVATION = (0x5e, 1)
REGISTER = (0x5f, 0)
RESERVE = (0x5f, 1)
HEADER = 48
SCSI_COMMAND = 1
CDB = 32                        # its offset in the header
NO_ACTION = 0x1f


class Proxy:
    def __init__(self, ctx, lun):
        self._lun = lun
        self.url = lun.url
        self._spoiled = ()
        self._spoil_after = None
        self._held = None
        self._reached = threading.Event()
        self._go = threading.Event()
        self._sockets = []
        self._server = socket.create_server(('127.0.0.1', 0))
        ctx.cleanup(self._close)
        threading.Thread(target=self._accept, daemon=True).start()

    def blockdev(self, node, host='a'):
        return dict(self._lun.blockdev(node, host),
                    portal='127.0.0.1:%d' % self._server.getsockname()[1])

    def hold(self, command):
        """The next one, and all that is sent after it, waits for go()."""
        self._reached.clear()
        self._go.clear()
        self._held = command

    def wait_held(self, seconds=60):
        if not self._reached.wait(seconds):
            raise Failure('no command %s in %d s' % (self._held, seconds))

    def go(self):
        self._held = None
        self._go.set()

    def spoil(self, commands, after=None):
        """The device does not know these commands; from the first @after on,
        if that is given."""
        self._spoil_after = after
        self._spoiled = commands

    def _close(self):
        self.go()
        for sock in [self._server] + self._sockets:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            sock.close()

    def _accept(self):
        target = self._lun.target
        while True:
            try:
                here, _ = self._server.accept()
            except OSError:
                return
            there = socket.create_connection((target.address, target.port))
            for sock in (here, there):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._sockets.append(sock)
            for run, one, other in ((self._requests, here, there),
                                    (self._answers, there, here)):
                threading.Thread(target=self._run, args=(run, one, other),
                                 daemon=True).start()

    @staticmethod
    def _run(run, one, other):
        try:
            run(one, other)
        except OSError:
            pass
        for sock in (one, other):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    @staticmethod
    def _answers(there, here):
        while data := there.recv(1 << 18):
            here.sendall(data)

    def _requests(self, here, there):
        stream = here.makefile('rb')
        while len(header := stream.read(HEADER)) == HEADER:
            rest = 4 * header[4] + int.from_bytes(header[5:8], 'big')
            data = stream.read(rest + -rest % 4)
            if header[0] & 0x3f == SCSI_COMMAND:
                header = self._command(bytearray(header))
            there.sendall(header + data)

    def _command(self, header):
        command = (header[CDB], header[CDB + 1] & 0x1f)
        if command == self._held:
            self._reached.set()
            self._go.wait()
        if command == self._spoil_after:
            self._spoil_after = None
        elif command in self._spoiled and not self._spoil_after:
            header[CDB + 1] |= NO_ACTION
        return header
