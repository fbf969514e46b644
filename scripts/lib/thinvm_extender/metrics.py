# SPDX-License-Identifier: GPL-2.0-or-later
"""Figures for Prometheus, in its text format, over HTTP or into a file.

The file is for node_exporter's textfile collector: it is replaced as a whole.
"""

import asyncio
import os

HELP = {
    'thinvm_volume_size_bytes': ('gauge', 'Bytes of the volume in use'),
    'thinvm_volume_free_bytes': ('gauge', 'Bytes that new data can have'),
    'thinvm_volume_allocation_rate': ('gauge', 'Bytes allocated per second'),
    'thinvm_extensions_total': ('counter', 'Extensions that succeeded'),
    'thinvm_extension_failures_total': ('counter', 'Extensions that failed'),
    'thinvm_extended_bytes_total': ('counter', 'Bytes that were added'),
    'thinvm_extension_seconds': ('gauge', 'Worst recent extension'),
    'thinvm_low_space_events_total': ('counter', 'THINVM_SPACE_LOW events'),
}


def escape(text):
    return text.replace('\\', r'\\').replace('"', r'\"').replace('\n', r'\n')


class Metrics:
    def __init__(self):
        self._values = {}

    def set(self, name, volume, value):
        self._values[name, volume] = value

    def add(self, name, volume, value=1):
        self._values[name, volume] = \
            self._values.get((name, volume), 0) + value

    def forget(self, volume):
        for key in [k for k in self._values if k[1] == volume]:
            del self._values[key]

    def text(self):
        lines = []
        for name, (kind, help_text) in HELP.items():
            lines += [f'# HELP {name} {help_text}', f'# TYPE {name} {kind}']
            lines += [f'{name}{{volume="{escape(volume)}"}} {value}'
                      for (n, volume), value in sorted(self._values.items())
                      if n == name]
        return '\n'.join(lines) + '\n'

    def write(self, path):
        new = f'{path}.new'
        with open(new, 'w', encoding='utf-8') as f:
            f.write(self.text())
        os.replace(new, path)

    async def serve(self, host, port):
        async def answer(reader, writer):
            try:
                await asyncio.wait_for(reader.readline(), 10)
                body = self.text().encode()
                writer.write(b'HTTP/1.0 200 OK\r\nContent-Type: text/plain; '
                             b'version=0.0.4\r\nContent-Length: %d\r\n\r\n'
                             % len(body) + body)
                await writer.drain()
            except (OSError, asyncio.TimeoutError):
                pass
            finally:
                writer.close()
        return await asyncio.start_server(answer, host, port)
