# SPDX-License-Identifier: GPL-2.0-or-later
"""Power cuts of the whole stack: a run is recorded once and cut many times.

A Recording is a storage daemon with the format under test over blklogwrites
over a file or a LUN, and the client of lanes.py.  Beside the log it remembers
which contents are right from which place in the log on.  Cuts then builds the
disk as it is after a loss of power at a place in the log, with PowerCut, and
looks at it: qemu-img check, the guest's disk and a snapshot read whole, byte
for byte.

What makes a moment of the run a place in the log: an entry is in the log
before its request is answered, so the log's size at the time of an answer is
behind all that the answer promises.
"""

import bisect
import json
import os
import random
import shutil

from .context import Failure, check
from .image import MiB, File, create
from .lanes import Lanes, random_source
from .model import BAD, OUR_BLOCK, read_block, read_sectors
from .qsd import StorageDaemon
from .writelog import PowerCut, log_end, read_log

DEVICE = 160 * MiB
DISK = 64 * MiB
FLUSH_INTERVAL = 20         # ms: commits by time are part of it


def full_of_rubbish(path):
    """What an earlier owner left on a device."""
    with open(path, 'r+b') as file:
        for _ in range(0, os.stat(path).st_size, MiB):
            file.write(b'rubbish.' * (MiB // 8))


class Recording:
    def __init__(self, ctx, place, shape, operations, modes=(None,)):
        """Run the load on @place; .base is the device as it was before.

        For each of @modes a daemon opens the image, serves and closes it.
        """
        self.ctx = ctx
        self.shape = shape
        self.place = place
        self.flushes = []               # (place in the log, numbers sure)
        self.sizes = []                 # (place in the log, device's size)
        name = ctx.unique('run')
        self.base = ctx.path(name + '.base')
        self.log = ctx.path(name + '.log')
        create(ctx, place, DISK, options='journal_size=1M'
               if ctx.fmt == 'thinvm' else None)
        shutil.copyfile(place.path, self.base)
        with open(self.log, 'wb'):
            pass
        source = random_source()
        self.model = shape.model(source.randrange(1 << 60))
        lanes = Lanes(ctx, shape, self.model, source, clock=self._now,
                      on_flush=self._flushed)
        self.snapshots = lanes.snapshots
        for number, mode in enumerate(modes):
            daemon = self._daemon(mode, number > 0)
            lanes.connect(daemon, daemon.export_nbd())
            check(lanes.run(operations // len(modes), operations // 16),
                  'the daemon died')
            lanes.disconnect()
            daemon.quit()
        lanes.end()
        self._end()

    def _daemon(self, mode, append):
        daemon = StorageDaemon(self.ctx)
        qmp = daemon.qmp
        device = self.place.blockdev('device')
        device['discard'] = 'unmap'
        qmp.cmd_raw('blockdev-add', device)
        qmp.cmd_raw('blockdev-add', {'driver': 'file', 'node-name': 'log',
                                     'filename': self.log})
        logged = {'driver': 'blklogwrites', 'node-name': 'logged',
                  'file': 'device', 'log': 'log', 'discard': 'unmap',
                  'cache': {'direct': True}}
        if append:
            logged['log-append'] = True
        else:
            logged['log-sector-size'] = 512
        qmp.cmd_raw('blockdev-add', logged)
        options = {'driver': self.ctx.fmt, 'node-name': 'disk',
                   'file': 'logged', 'discard': 'unmap',
                   'cache': {'direct': True}}
        if self.ctx.fmt == 'thinvm':
            options.update({'mapping-cache-mode': mode or 'writeback',
                            'mapping-flush-interval': FLUSH_INTERVAL})
        qmp.cmd_raw('blockdev-add', options)
        return daemon

    def _now(self):
        return log_end(self.log)

    def _flushed(self, moment, acked):
        self.flushes.append((moment, acked))
        self.sizes.append((moment, os.stat(self.place.path).st_size))

    def _end(self):
        self.sizes.append((self._now(), os.stat(self.place.path).st_size))
        self.entries = read_log(self.log)

    def forget(self):
        """Room for the next one."""
        for path in (self.base, self.log):
            os.unlink(path)

    def place_of(self, position):
        """The place in the log of a cut after @position entries."""
        if position < len(self.entries):
            return self.entries[position].head
        return self._now()

    def durable(self, position):
        """Numbers that are sure after a cut, one for each lane."""
        count = bisect.bisect_right([at for at, _ in self.flushes],
                                    self.place_of(position))
        return (self.flushes[count - 1][1] if count
                else [0] * self.shape.lanes)

    def size(self, position):
        """The device's size by then, from the next look that was taken."""
        place = self.place_of(position)
        return next((size for at, size in self.sizes if at >= place),
                    self.sizes[-1][1])


def read_raw(model, path):
    """(contents found, text) of a raw image; the text names a place that
    holds something although the client never wrote there."""
    found = {}
    places = sorted((model.offset(lane, index), lane, index)
                    for lane in range(len(model.lanes))
                    for index in range(model.blocks))
    with open(path, 'rb') as file:
        end = 0
        for offset, lane, index in places:
            if stray(file, end, offset):
                return found, 'between %d and %d' % (end, offset)
            file.seek(offset)
            data = file.read(OUR_BLOCK)
            seq = read_block(data, model.seed, lane, index)
            if seq == BAD:
                seq = read_sectors(data, model.seed, lane, index)
            if seq:
                found[lane, index] = seq
            end = offset + OUR_BLOCK
        if stray(file, end, os.stat(path).st_size):
            return found, 'behind %d' % end
    return found, None


def stray(file, begin, end):
    """Is there anything but zeroes?"""
    while begin < end:
        try:
            begin = os.lseek(file.fileno(), begin, os.SEEK_DATA)
        except OSError:                 # no more data
            return False
        if begin >= end:
            return False
        length = min(end - begin, MiB)
        file.seek(begin)
        data = file.read(length)
        if data.count(0) != len(data):
            return True
        begin += length
    return False


class Cuts:
    """Looks at the disk after cuts of a recording; counts what is wrong."""

    def __init__(self, recording, seed, image_name):
        self.run = recording
        self.ctx = recording.ctx
        self.random = random.Random(seed)
        self.image = File(self.ctx, image_name)
        self.raw = self.image.path + '.raw'
        shutil.copyfile(recording.base, self.image.path)
        self.power = PowerCut(recording.log, self.image.path, self.random,
                              garbage=self.random.randrange(2),
                              entries=recording.entries)
        self.figures = {}
        self.problems = []

    def close(self):
        self.power.close()
        for path in (self.image.path, self.raw):
            if os.path.exists(path):
                os.unlink(path)

    def _count(self, what, text=None):
        self.figures[what] = self.figures.get(what, 0) + 1
        if text:
            self.problems.append(text)

    def _qemu_img(self, *args):
        return self.ctx.run(self.ctx.bin('qemu-img'), *args, ok=None)

    def _check(self, image, what):
        text = self._qemu_img('check', '--output=json', '-f', self.ctx.fmt,
                              image)
        start = text.find('{')
        if start < 0:
            self._count('does not open', '%s: check: %s' % (what,
                                                            text.strip()))
            return False
        report = json.loads(text[start:text.rfind('}') + 1])
        for key in ('corruptions', 'leaks', 'check-errors'):
            if report.get(key):
                self._count(key, '%s: check finds %d %s' % (
                    what, report[key], key))
        return True

    def _read(self, right, what, *options):
        """The disk or a snapshot must be @right."""
        text = self._qemu_img('convert', '-f', self.ctx.fmt, '-O', 'raw',
                              *options, self.image.path, self.raw)
        if text.strip():
            self._count('unreadable', '%s: convert: %s' % (what,
                                                           text.strip()))
            return
        found, place = read_raw(self.run.model, self.raw)
        if place:
            self._count('foreign data', '%s: foreign data %s' % (what, place))
        wrong = self.run.model.compare(found, right)
        if wrong:
            self._count('wrong contents', '%s: %d blocks are wrong: %s' % (
                what, len(wrong), '; '.join(wrong[:3])))

    def _snapshots(self, position, what):
        """Those that must be there are; one of them is read."""
        text = self._qemu_img('info', '-U', '--output=json', '-f',
                              self.ctx.fmt, self.image.path)
        names = {entry['name'] for entry in
                 json.loads(text).get('snapshots', [])}
        place = self.run.place_of(position)
        for snapshot in self.run.snapshots:
            there = snapshot.name in names
            if there and snapshot.must_be_gone(place):
                self._count('snapshots', '%s: snapshot %s was deleted' % (
                    what, snapshot.name))
            if not there and snapshot.must_be_there(place):
                self._count('snapshots', '%s: snapshot %s is lost' % (
                    what, snapshot.name))
        if names:
            name = self.random.choice(sorted(names))
            snapshot, = [s for s in self.run.snapshots if s.name == name]
            self._read(snapshot.right, '%s, snapshot %s' % (what, name),
                       '-l', 'snapshot.name=' + name)

    def _goes_on(self, what):
        """A copy is opened for writing, written to, and clean."""
        copy = self.image.path + '.copy'
        shutil.copyfile(self.image.path, copy)
        try:
            self.ctx.run(self.ctx.bin('qemu-io'), '-f', self.ctx.fmt, '-c',
                         'write -P 1 0 1M', '-c', 'flush', '-c',
                         'discard 512k 8M', copy)
            self._check(copy, what + ', written to after the cut')
        except Failure as err:
            self._count('does not go on', '%s: %s' % (what, err))
        os.unlink(copy)

    def look(self, position, thorough=False, also=None):
        """One cut; half of them lose all that was not flushed.

        @thorough: with a write to what is left.  @also is called while the
        image lies there.
        """
        drop = bool(self.random.randrange(2))
        at_risk = self.power.cut(position, self.run.size(position), drop)
        what = '%s, cut after %d of %d entries (%d not flushed%s)' % (
            self.run.shape.name, position, len(self.run.entries), at_risk,
            ', all dropped' if drop else '')
        before = len(self.problems)
        self._count('cuts')
        if self._check(self.image.path, what):
            self._read(self.run.model.right(self.run.durable(position)), what)
            self._snapshots(position, what)
            if thorough:
                self._goes_on(what)
            if also:
                also()
        if len(self.problems) > before:
            self._keep()
        self.power.undo()

    def _keep(self):
        """The first bad image goes where the logs are."""
        if self.ctx.fmt == 'thinvm' and not self.figures.get('kept'):
            self.figures['kept'] = 1
            shutil.copyfile(self.image.path, os.path.join(
                self.ctx.log_dir, os.path.basename(self.image.path)))
