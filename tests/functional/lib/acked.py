# SPDX-License-Identifier: GPL-2.0-or-later
"""A thousand acknowledged writes, and how many of them are lost.

4 KiB each, 1 MiB apart, so that each needs a mapping of its own; no flush.
"""

from .context import Failure
from .model import OUR_BLOCK, make_block, read_block
from .nbd import NBDClient
from .qsd import StorageDaemon

COUNT = 1000
STRIDE = 1 << 20            # bytes
SEED = 0x7468696e766d


def write_thousand(ctx, daemon, flush=False, node='disk'):
    """Write through an NBD export of @daemon: [(offset, time of reply)]."""
    client = NBDClient(ctx, daemon.export_nbd(node), node)
    acked = client.write_all(
        (number * STRIDE, make_block(SEED, 0, number, number + 1))
        for number in range(COUNT))
    if flush:
        client.flush()
    return acked


def count_lost(ctx, place, acked, fmt=None):
    """How many of the acknowledged writes the image does not hold.

    A block that holds neither the write nor zeroes is a failure: a crash
    must not show what an earlier owner of the device left there.
    """
    daemon = StorageDaemon(ctx, host='b')
    daemon.add_disk(place, fmt=fmt)
    client = NBDClient(ctx, daemon.export_nbd(), 'disk')
    lost = 0
    for offset, _ in acked:
        index = offset // STRIDE
        seq = read_block(client.read(offset, OUR_BLOCK), SEED, 0, index)
        if seq == 0:
            lost += 1
        elif seq != index + 1:
            raise Failure('at guest offset %d is neither what was written '
                          'nor zeroes' % offset)
    client.close()
    daemon.quit()
    return lost
