# SPDX-License-Identifier: GPL-2.0-or-later
"""Which acknowledged writes a death costs: 1000 writes, no flush, kill -9.

The client of an NBD export knows which replies it has got.  The cells of the
table "mode by what fails" for the death of the process (image in a local
file) and of the host (image on a LUN, opened by another initiator) are
tested here; for the loss of the array's volatile cache see
test_array_cache.py.  qcow2, which never writes its tables back by time,
stands beside it in the demo's report.
"""

import time

from lib.acked import count_lost, write_thousand
from lib.context import check
from lib.image import GiB, File, create, require_clean
from lib.nbd import NBDClient
from lib.testing import OURS, THIN, test
from lib.tgt import Target
from lib.qsd import StorageDaemon

INTERVAL = 500              # ms
COMMIT_SECONDS = 4          # more than the longest commit on a busy machine


def places(ctx, kind):
    if kind == 'process':
        return File(ctx, 'image')
    return Target(ctx).add_lun(4 * GiB)


def thousand_then_kill(ctx, kind, wait=0, **options):
    """(acknowledged, lost) of the thousand writes."""
    place = places(ctx, kind)
    create(ctx, place, 2 * GiB)
    daemon = StorageDaemon(ctx)
    daemon.add_disk(place, **options)
    acked = write_thousand(ctx, daemon)
    time.sleep(wait)
    daemon.kill()
    require_clean(ctx, place)
    return len(acked), count_lost(ctx, place, acked)


def writethrough(ctx, kind):
    acked, lost = thousand_then_kill(ctx, kind, mode='writethrough')
    check(acked == 1000, 'only %d writes were acknowledged', acked)
    check(lost == 0, 'writethrough lost %d of %d', lost, acked)


def writeback_old(ctx, kind):
    acked, lost = thousand_then_kill(ctx, kind, mode='writeback',
                                     interval=INTERVAL,
                                     wait=INTERVAL / 1000 + COMMIT_SECONDS)
    check(acked == 1000, 'only %d writes were acknowledged', acked)
    check(lost == 0, 'writeback lost %d of %d old writes', lost, acked)


@test(formats=OURS)
def writethrough_process(ctx):
    """Writethrough, the process dies: nothing acknowledged is lost."""
    writethrough(ctx, 'process')


@test(formats=OURS)
def writethrough_host(ctx):
    """Writethrough, the host dies: nothing acknowledged is lost."""
    writethrough(ctx, 'host')


@test(formats=OURS)
def writeback_process(ctx):
    """Writeback, the process dies: nothing old is lost."""
    writeback_old(ctx, 'process')


@test(formats=OURS)
def writeback_host(ctx):
    """Writeback, the host dies: nothing old is lost."""
    writeback_old(ctx, 'host')


@test(formats=OURS)
def writeback_without_time(ctx):
    """Writeback whose interval has not passed loses what it may: the
    image is clean, and lost blocks read as they were, not as rubbish."""
    acked, lost = thousand_then_kill(ctx, 'process', mode='writeback',
                                     interval=600 * 1000)
    ctx.log('writeback, interval not passed: lost %d of %d' % (lost, acked))
    check(acked == 1000, 'only %d writes were acknowledged', acked)


@test(formats=THIN)
def flush_keeps_all(ctx):
    """In every mode a flush that returned loses nothing."""
    for mode in ('writeback', 'writethrough'):
        place = File(ctx, 'image-' + mode)
        create(ctx, place, 2 * GiB)
        daemon = StorageDaemon(ctx)
        daemon.add_disk(place, mode=mode, interval=600 * 1000)
        acked = write_thousand(ctx, daemon, flush=True)
        daemon.kill()
        require_clean(ctx, place)
        lost = count_lost(ctx, place, acked)
        check(lost == 0, '%s lost %d flushed writes', mode, lost)


@test(formats=OURS)
def killed_amid_the_writes(ctx):
    """Killed with requests under way: of those acknowledged none is lost
    in writethrough; overwrites in the same clusters included."""
    place = File(ctx, 'image')
    create(ctx, place, 2 * GiB)
    daemon = StorageDaemon(ctx)
    daemon.add_disk(place, mode='writethrough')
    path = daemon.export_nbd()
    client = NBDClient(ctx, path, 'disk')
    requests = ((number * 8192, bytes([number % 255 + 1]) * 4096)
                for number in range(100000))

    def kill_at(count):
        for number, request in enumerate(requests):
            if number == count:
                daemon.kill()
            yield request

    acked = client.write_all(kill_at(1200))
    check(len(acked) >= 1000, 'only %d acknowledged', len(acked))
    require_clean(ctx, place)
    daemon = StorageDaemon(ctx)
    daemon.add_disk(place)
    client = NBDClient(ctx, daemon.export_nbd(), 'disk')
    lost = sum(client.read(offset, 4096)
               != bytes([offset // 8192 % 255 + 1]) * 4096
               for offset, _ in acked)
    check(lost == 0, 'lost %d of %d', lost, len(acked))
    daemon.quit()
