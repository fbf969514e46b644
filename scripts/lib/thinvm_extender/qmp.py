# SPDX-License-Identifier: GPL-2.0-or-later
"""QMP over a unix socket for asyncio: commands, and events as they come."""

import asyncio
import json

# query-named-block-nodes of a large VM is longer than asyncio's own limit
LONGEST_LINE = 16 << 20
REPLY_SECONDS = 60


class QmpError(Exception):
    """QEMU refused a command."""


class Closed(Exception):
    """The VM went away, or does not answer."""


class Connection:
    def __init__(self, path, on_event):
        self.path = path
        self._on_event = on_event
        self._replies = {}
        self._last_id = 0
        self._reader = self._writer = None

    async def open(self):
        try:
            self._reader, self._writer = await asyncio.wait_for(
                asyncio.open_unix_connection(self.path, limit=LONGEST_LINE),
                REPLY_SECONDS)
            greeting = await asyncio.wait_for(self._reader.readline(),
                                              REPLY_SECONDS)
        except (OSError, asyncio.TimeoutError) as e:
            raise Closed(f'{self.path}: {e or "no answer"}') from None
        if b'"QMP"' not in greeting:
            raise Closed(f'{self.path} does not speak QMP')

    def close(self):
        if self._writer:
            self._writer.close()
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(Closed(f'{self.path} was closed'))

    async def listen(self):
        """Take in messages until the other side goes away."""
        try:
            while True:
                line = await self._reader.readline()
                if not line:
                    return
                message = json.loads(line)
                if 'event' in message:
                    self._on_event(message['event'], message.get('data', {}))
                    continue
                reply = self._replies.get(message.get('id'))
                if reply and not reply.done():
                    reply.set_result(message)
        except (OSError, ValueError):
            return

    async def cmd(self, command, **arguments):
        self._last_id += 1
        number = self._last_id
        request = {'execute': command, 'id': number}
        if arguments:
            request['arguments'] = {k.replace('_', '-'): v
                                    for k, v in arguments.items()}
        reply = asyncio.get_running_loop().create_future()
        self._replies[number] = reply
        try:
            self._writer.write(json.dumps(request).encode() + b'\n')
            await self._writer.drain()
            message = await asyncio.wait_for(reply, REPLY_SECONDS)
        except (OSError, asyncio.TimeoutError) as e:
            raise Closed(f'{self.path}: {command}: '
                         f'{e or "no answer"}') from None
        finally:
            del self._replies[number]
        if 'error' in message:
            raise QmpError(message['error'].get('desc', 'unknown error'))
        return message['return']
