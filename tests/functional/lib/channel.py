# SPDX-License-Identifier: GPL-2.0-or-later
"""The wire between source and target of a migration, in the test's hands.

It can be held in either direction, so that a migration stays at a point that
otherwise is over in a moment, and cut.  What was sent before a hold may still
lie in the sockets' buffers: hold() stops what has not been read yet.
"""

import socket
import threading
import time

from .context import wait_for


class Channel:
    def __init__(self, ctx):
        """.path is where the source migrates to, .target_path where the
        target listens."""
        name = ctx.unique('channel')
        self.ctx = ctx
        self.path = ctx.path(name)
        self.target_path = ctx.path(name + '-target')
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(1)
        self._go = {'forth': threading.Event(), 'back': threading.Event()}
        self.passed = {'forth': 0, 'back': 0}       # bytes
        for event in self._go.values():
            event.set()
        self._ends = []
        threading.Thread(target=self._accept, daemon=True).start()
        ctx.cleanup(self.cut)

    def _accept(self):
        try:
            source, _ = self._listener.accept()
            target = socket.socket(socket.AF_UNIX)
            target.connect(self.target_path)
        except OSError:
            return                      # the test is over
        self._ends = [source, target]
        for direction, here, there in (('forth', source, target),
                                       ('back', target, source)):
            threading.Thread(target=self._pass, daemon=True,
                             args=(direction, here, there)).start()

    def _pass(self, direction, here, there):
        go = self._go[direction]
        while True:
            # An end that is gone is noticed also while the wire is held.
            try:
                data = here.recv(65536)
                if not data:
                    break
                go.wait()
                there.sendall(data)
                self.passed[direction] += len(data)
            except OSError:
                break
        for end in (here, there):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def hold(self, direction):
        """Nothing more goes 'forth' to the target, or 'back'."""
        self._go[direction].clear()

    def release(self, direction):
        self._go[direction].set()

    def wait_quiet(self, direction):
        """Until nothing has passed for a while."""
        seen = [-1]

        def quiet():
            before, seen[0] = seen[0], self.passed[direction]
            return before == seen[0]

        wait_for(quiet, 60, 'silence on the channel', interval=0.3)

    def connected(self):
        return bool(self._ends)

    def cut(self):
        """Both ends see that the other is gone."""
        for end in self._ends:
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        for event in self._go.values():
            event.set()
        time.sleep(0)
        for end in self._ends:
            end.close()
        self._listener.close()
