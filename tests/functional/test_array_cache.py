# SPDX-License-Identifier: GPL-2.0-or-later
"""The array loses its volatile cache: power cuts at many points of a run.

The last column of the table "mode by what fails".  In every mode: what the
guest flushed is there; the image is consistent, without a leak; no block
shows what an earlier owner of the device left (the LUN is full of rubbish
before the image is made).  A write that was not flushed may be torn at a
sector, as on any disk, but each sector is the new or the old.
"""

import random
import shutil

from lib.context import check
from lib.contents import scan
from lib.image import MiB, File, create, require_clean
from lib.model import Model, make_block
from lib.nbd import TRIM, WRITE, WRITE_ZEROES, NBDClient
from lib.qsd import StorageDaemon
from lib.testing import OURS, test
from lib.tgt import Target
from lib.writelog import PowerCut, entries_in

CLUSTER = 65536
DEVICE = 160 * MiB
ROUNDS = 150                # each one operation a lane, in parallel
CUTS = 25


def rubbish_lun(ctx):
    lun = Target(ctx).add_lun(DEVICE)
    with open(lun.path, 'r+b') as file:
        for at in range(0, DEVICE, MiB):
            file.seek(at)
            file.write(b'rubbish.' * (MiB // 8))
    return lun


def send(client, model, lane, seq):
    index, kind = model.op(lane, seq)
    offset = model.offset(lane, index)
    if kind == 'write':
        client.send(WRITE, offset, data=make_block(model.seed, lane, index,
                                                   seq))
    else:
        # Each block has a cluster of its own: discard all of it.
        client.send(TRIM if kind == 'discard' else WRITE_ZEROES, offset,
                    length=CLUSTER)


def load(ctx, client, model, log):
    """The operations; [(entries in the log, sequence number)] of flushes."""
    flushes = [(0, 0)]
    for seq in range(1, ROUNDS + 1):
        for lane in range(len(model.lanes)):
            send(client, model, lane, seq)
        while client.pending():
            error = client.reply()[1]
            check(error == 0, 'NBD error %d', error)
        if seq % 12 == 0:
            client.flush()
            flushes.append((entries_in(log), seq))
    return flushes


def record(ctx, mode, image):
    """Run the load over a logging node; (model, log, flushes).

    @image becomes the device as it was before the load.
    """
    lun = rubbish_lun(ctx)
    create(ctx, lun, 96 * MiB, options='journal_size=1M')
    shutil.copyfile(lun.path, image)
    model = Model(random.randrange(1 << 60), 4, 60, stride=CLUSTER, zero=8,
                  discard=12)
    model.torn = True
    model.start(1)
    log = File(ctx, 'log', 0)
    daemon = StorageDaemon(ctx)
    qmp = daemon.qmp
    qmp.cmd_raw('blockdev-add', lun.blockdev('lun'))
    qmp.cmd_raw('blockdev-add', {'driver': 'file', 'node-name': 'log-file',
                                 'filename': log.path})
    qmp.cmd_raw('blockdev-add', {
        'driver': 'blklogwrites', 'node-name': 'logged', 'file': 'lun',
        'log': 'log-file', 'log-sector-size': 512,
        'cache': {'direct': True}})
    qmp.cmd_raw('blockdev-add', {
        'driver': ctx.fmt, 'node-name': 'disk', 'file': 'logged',
        'mapping-cache-mode': mode, 'mapping-flush-interval': 20,
        'discard': 'unmap', 'cache': {'direct': True}})
    client = NBDClient(ctx, daemon.export_nbd(), 'disk')
    flushes = load(ctx, client, model, log.path)
    client.close()
    daemon.quit()
    return model, log.path, flushes


def cut_everywhere(ctx, mode):
    image = File(ctx, 'cut', 0)
    model, log, flushes = record(ctx, mode, image.path)
    source = random.Random(model.seed)
    power = PowerCut(log, image.path, source)
    ctx.cleanup(power.close)
    total = len(power.entries)
    check(total > ROUNDS, 'the log has only %d entries', total)
    for position in sorted(source.sample(range(1, total + 1), CUTS)):
        durable = max(seq for count, seq in flushes if count <= position)
        what = '%s, seed %d, cut after %d of %d entries' % (
            mode, model.seed, position, total)
        ctx.log(what)
        power.cut(position)
        require_clean(ctx, image)
        found = scan(ctx, model, image)
        model.require(found, [durable] * len(model.lanes), what)
        power.undo()


@test(seconds=300, formats=OURS)
def writeback(ctx):
    """Writeback: flushed writes survive, nothing strange appears."""
    cut_everywhere(ctx, 'writeback')


@test(seconds=300, formats=OURS)
def writethrough(ctx):
    """Writethrough: likewise; its records are flushed by guest flushes."""
    cut_everywhere(ctx, 'writethrough')


@test(seconds=300, formats=OURS)
def recovered_image_goes_on(ctx):
    """After a cut in the middle the image takes writes again, and a
    second power cut right after the recovery's first flush is no worse."""
    image = File(ctx, 'cut', 0)
    model, log, flushes = record(ctx, 'writeback', image.path)
    power = PowerCut(log, image.path, random.Random(model.seed))
    position = len(power.entries) * 2 // 3
    durable = max(seq for count, seq in flushes if count <= position)
    power.cut(position)
    power.close()
    daemon = StorageDaemon(ctx)
    daemon.add_disk(image)
    client = NBDClient(ctx, daemon.export_nbd(), 'disk')
    found = model.scan(client.read)
    model.require(found, [durable] * len(model.lanes),
                  'read after the power cut')
    model.rebase(found)
    model.start(1000)
    for seq in range(1000, 1100):
        for lane in range(len(model.lanes)):
            send(client, model, lane, seq)
        while client.pending():
            client.reply()
    client.flush()
    client.close()
    daemon.kill()
    model.progress([1099] * len(model.lanes), [1099] * len(model.lanes))
    require_clean(ctx, image)
    model.require(scan(ctx, model, image), 'flushed',
                  'written after the power cut')
