# SPDX-License-Identifier: GPL-2.0-or-later
"""Full clones that remember their template, and a boot cache above it.

The template and the clones are each on a server behind a meter, so that what
is read of either is counted where it matters.
"""

import hashlib
import os

from lib.bootcache import (Meter, Publisher, Template, cache_node, in_parallel,
                           template_nodes)
from lib.context import check, wait_for
from lib.image import MiB, File, require_clean
from lib.nbd import NBDClient
from lib.qsd import StorageDaemon
from lib.testing import THIN, test

CLONES = 4
CLUSTER = 65536


class Clone(StorageDaemon):
    """A full clone on the metered storage, its template behind the cache."""

    def __init__(self, ctx, number, template, meter, storage, path, digest):
        super().__init__(ctx, 'clone')
        self.template = template
        for node in (*template_nodes(template, meter),
                     cache_node(path, template_id=digest, timeout=60000),
                     {'driver': 'nbd', 'node-name': 'file',
                      'export': f'clone-{number}',
                      'server': {'type': 'unix', 'path': storage.path}},
                     {'driver': 'thinvm', 'node-name': 'disk', 'file': 'file',
                      'template': 'cache'}):
            self.qmp.cmd_raw('blockdev-add', node)
        self.client = NBDClient(ctx, self.export_nbd('disk'), 'disk')
        self.written = {}

    def write(self, offset, data):
        self.client.write(offset, data)
        self.written[offset] = data

    def verify(self, offset, length):
        """What the template has, but for what was written in this range"""
        want = bytearray(self.template.data[offset:offset + length])
        for at, data in self.written.items():
            if offset <= at < offset + length:
                want[at - offset:at - offset + len(data)] = data
        check(self.client.read(offset, length) == want,
              '%s: wrong contents from %d on', self.name, offset)

    def verify_all(self, step=MiB):
        for offset in range(0, self.template.size, step):
            self.verify(offset, min(step, self.template.size - offset))

    def connected(self):
        return self.qmp.cmd('query-thinvm-bootcache',
                            node_name='cache')[0]['connected']

    def statistics(self):
        return self.qmp.cmd('query-thinvm', node_name='disk')[0]['statistics']


def make_clones(ctx, template, meter, path, digest):
    """The clones, their storage, and its meter."""
    server = StorageDaemon(ctx, 'storage')
    for number in range(CLONES):
        place = File(ctx, f'clone-{number}')
        ctx.run(ctx.bin('qemu-img'), 'create', '-f', 'thinvm', '-o',
                f'template_file={template.place.path},template_fmt=raw,'
                f'template_digest={digest}', place.path, str(32 * MiB))
        os.truncate(place.path, 64 * MiB)
        server.add_disk(place, f'clone-{number}', fmt='raw')
        socket = server.export_nbd(f'clone-{number}')
    storage = Meter(ctx, socket)
    return [Clone(ctx, number, template, meter, storage, path, digest)
            for number in range(CLONES)], server, storage


@test(formats=THIN)
def storm(ctx):
    """Full clones read at the same moment: their template is read once, and
    they themselves hardly; what each has overwritten is its own, also when
    the publisher dies meanwhile."""
    template = Template(ctx)
    digest = 'sha256:' + hashlib.sha256(template.data).hexdigest()
    meter = template.serve()
    path = ctx.path('cache.sock')
    publisher = Publisher(ctx, template, meter, path, template_id=digest)
    clones, server, storage = make_clones(ctx, template, meter, path, digest)
    for clone in clones:
        wait_for(clone.connected, 60, 'a clone has its publisher')
    opened = storage.bytes
    in_parallel(clones, lambda clone, _: clone.verify_all())
    check(meter.bytes < template.size * 1.05, 'the template was read: %d '
          'bytes of %d', meter.bytes, template.size)
    # The last cluster is not whole, and there is some metadata
    check(storage.bytes - opened < CLONES * MiB, 'the clones were read: %d '
          'bytes', storage.bytes - opened)

    def work(clone, number):
        for turn, offset in enumerate(range(0, template.size, MiB)):
            if number == 0 and turn == 8:
                publisher.kill()
            at = offset + number * 2 * CLUSTER + 4096 * turn
            if at + 4096 <= template.size:
                clone.write(at, bytes([number + 1]) * 4096)
            clone.verify(offset, min(MiB, template.size - offset))

    in_parallel(clones, work)
    in_parallel(clones, lambda clone, _: clone.verify_all())
    for clone in clones:
        check(clone.statistics()['template-failures'] == 0, 'statistics: %s',
              clone.statistics())
        clone.client.flush()
        clone.kill()
    server.quit()
    # Killed as they were; what they hold is right by itself
    for number, clone in enumerate(clones):
        place = File(ctx, f'clone-{number}')
        alone = StorageDaemon(ctx, 'alone')
        alone.add_disk(place, fmt='thinvm')
        clone.client = NBDClient(ctx, alone.export_nbd('disk'), 'disk')
        clone.verify_all()
        alone.quit()
        require_clean(ctx, place)
