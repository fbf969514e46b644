# SPDX-License-Identifier: GPL-2.0-or-later
"""The whole stack loses power: 500 points of a run on a file and on a LUN.

A real storage daemon, the format over blklogwrites over the file or the iSCSI
LUN, a client with eight requests in flight, internal snapshots created and
deleted meanwhile; halfway another daemon opens the image, in another mode, so
that closing and opening are among what is cut.  After each cut: the image opens, qemu-img check finds
neither corruption nor leak, all that a completed flush covered is there, in
the disk and in the snapshots, and nothing is there that the client did not
write; the LUN was full of rubbish before.  One cut in ten is written to
afterwards and checked again, one in fifty is checked by the independent
reader too.

With --format qcow2 the same is counted, and only counted, for qcow2.  The
figures are in figures.txt beside the test's log.
"""

import json
import os
import random
import sys

from lib.context import TOP, check
from lib.image import File
from lib.lanes import SHAPES
from lib.powercuts import DEVICE, Cuts, Recording, full_of_rubbish
from lib.testing import THIN, test
from lib.tgt import Target

OPERATIONS = 3000           # in a recording
MODES = ('writeback', 'writethrough', 'writeback')
READER = os.path.join(TOP, 'scripts', 'thinvm-image.py')


def read_independently(ctx, cuts):
    """The reader that shares no code with the driver says the same."""
    if ctx.fmt != 'thinvm':
        return
    text = ctx.run(sys.executable, READER, 'check', cuts.image.path, ok=None)
    if not text.splitlines()[-1].startswith('0 corruptions, 0 leaks'):
        cuts.problems.append('the independent reader: ' + text.strip())


def place_for(ctx, kind):
    if kind == 'file':
        return File(ctx, ctx.unique('image'))
    lun = Target(ctx).add_lun(DEVICE)
    full_of_rubbish(lun.path)
    return lun


def cut_recording(ctx, run, cuts, figures):
    seed = random.randrange(1 << 60)
    looks = Cuts(run, seed, ctx.unique('cut'))
    ctx.log('seed %d, %d entries, %d flushes, %d snapshots' % (
        seed, len(run.entries), len(run.flushes), len(run.snapshots)))
    total = len(run.entries)
    check(total > OPERATIONS // 2, 'the log has only %d entries', total)
    # The very end is one of the points: there all must be there.
    points = sorted(looks.random.sample(range(1, total), cuts - 1)) + [total]
    for number, position in enumerate(points):
        looks.look(position, thorough=number % 10 == 5,
                   also=(lambda: read_independently(ctx, looks))
                   if number % 50 == 25 else None)
        if looks.problems and ctx.fmt == 'thinvm':
            break
    looks.close()
    for key, count in looks.figures.items():
        figures[key] = figures.get(key, 0) + count
    for problem in looks.problems[:20]:
        ctx.log(problem)
    if ctx.fmt == 'thinvm':
        check(not looks.problems, 'seed %d: %s', seed,
              ' | '.join(looks.problems[:2]))


def power_cuts(ctx, kind, recordings, cuts):
    """@cuts cuts in each of @recordings runs."""
    figures = {}
    for number in range(recordings):
        run = Recording(ctx, place_for(ctx, kind),
                        SHAPES[number % len(SHAPES)], OPERATIONS,
                        MODES[number // 2 % 2:][:2])
        cut_recording(ctx, run, cuts, figures)
        run.forget()
    text = json.dumps(figures, sort_keys=True)
    ctx.log('figures: ' + text)
    with open(os.path.join(ctx.log_dir, 'figures.txt'), 'w') as file:
        file.write('%s over %s: %s\n' % (ctx.fmt, kind, text))


@test(seconds=900, formats=THIN)
def on_a_file(ctx):
    """500 cuts of an image in a file, which grows meanwhile."""
    power_cuts(ctx, 'file', 4, 125)


@test(seconds=900, formats=THIN)
def on_a_lun(ctx):
    """500 cuts of an image on an iSCSI LUN full of rubbish."""
    power_cuts(ctx, 'lun', 4, 125)


@test(seconds=3600, formats=THIN, slow=True)
def on_a_file_often(ctx):
    """5000 cuts, each 250 from a run of their own."""
    power_cuts(ctx, 'file', 20, 250)


@test(seconds=3600, formats=THIN, slow=True)
def on_a_lun_often(ctx):
    """5000 cuts, each 250 from a run of their own."""
    power_cuts(ctx, 'lun', 20, 250)
