# SPDX-License-Identifier: GPL-2.0-or-later
"""What an image holds, read from outside without writing to it."""

from .nbd import NBDClient
from .qsd import StorageDaemon


class Contents:
    """The guest's contents of an image; .read(offset, length).

    A storage daemon opens the image read-only, as a host of its own.  That
    is also what a look after a crash must be: the journal is replayed in
    memory, the device stays as it is.
    """

    def __init__(self, ctx, place, fmt=None, host='reader', **more):
        self._daemon = StorageDaemon(ctx, host=host)
        self._daemon.add_disk(place, fmt=fmt, read_only=True, **more)
        self._client = NBDClient(
            ctx, self._daemon.export_nbd(writable=False), 'disk')
        self.read = self._client.read

    def close(self):
        self._client.close()
        self._daemon.quit()


def scan(ctx, model, place, fmt=None):
    """Which of the model's blocks are in the image: see Model.scan()."""
    return scan_disks(ctx, model, [place], fmt=fmt)


def scan_disks(ctx, model, places, **more):
    """The same of several disks; @more goes to blockdev-add."""
    disks = [Contents(ctx, place, **more) for place in places]
    found = model.scan(*[disk.read for disk in disks])
    for disk in disks:
        disk.close()
    return found
