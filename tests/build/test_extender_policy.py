# SPDX-License-Identifier: GPL-2.0-or-later
#
# thinvm-extender's decisions: when, and to what size; LVM's names; metrics.

import asyncio
import types
import unittest
from unittest import mock

from thinvm_extender import backends, metrics, policy, simulate
from thinvm_extender.daemon import Daemon, path_of

GIB, MIB = policy.GIB, policy.MIB


class Policy(unittest.TestCase):
    limits = policy.Limits(chunk=GIB, margin=2.0)

    def size(self, size, free, delay=1.0, **more):
        return policy.next_size(policy.Need(size, free, **more), delay,
                                more.pop('limits', self.limits))

    def test_enough(self):
        self.assertEqual(self.size(10 * GIB, 3 * GIB, watermark=2 * GIB),
                         10 * GIB)

    def test_watermark(self):
        """Afterwards there is twice the watermark, in whole chunks."""
        self.assertEqual(self.size(10 * GIB, GIB, watermark=2 * GIB),
                         13 * GIB)
        self.assertEqual(self.size(10 * GIB, GIB - 1, watermark=2 * GIB),
                         14 * GIB)

    def test_rate_counts_more_than_a_low_watermark(self):
        """1 GiB/s and 3 s: due below 6 GiB, then 12 GiB are free."""
        need = {'watermark': MIB, 'rate': GIB, 'delay': 3.0}
        self.assertEqual(self.size(20 * GIB, 6 * GIB, **need), 20 * GIB)
        self.assertEqual(self.size(20 * GIB, 6 * GIB - MIB, **need),
                         27 * GIB)

    def test_wanted(self):
        """What THINVM_SPACE_LOW asks for is heard, when there is room too."""
        self.assertEqual(self.size(10 * GIB, 5 * GIB, watermark=GIB,
                                   wanted=12 * GIB), 12 * GIB)

    def test_limit(self):
        limits = policy.Limits(chunk=GIB, max_size=11 * GIB)
        need = policy.Need(10 * GIB, 0, 4 * GIB)
        self.assertEqual(policy.next_size(need, 1, limits), 11 * GIB)
        need.size = 12 * GIB    # never smaller than it is
        self.assertEqual(policy.next_size(need, 1, limits), 12 * GIB)

    def test_delay_is_the_worst_of_late(self):
        delay = policy.Delay(4.0)
        self.assertEqual(delay.seconds, 4.0)
        for seconds in (0.5, 2.0, 1.0):
            delay.add(seconds)
        self.assertEqual(delay.seconds, 2.0)
        for _ in range(policy.Delay.KEPT):
            delay.add(0.25)
        self.assertEqual(delay.seconds, 0.25)

    def test_simulation(self):
        """A slow guest never waits; one without headroom does."""
        limits = policy.Limits()
        total = 8 * GIB
        pauses, paused, extensions = simulate.run(50e6, 4, total, 2 * GIB,
                                                  limits)
        self.assertEqual((pauses, paused), (0, 0.0))
        self.assertGreater(extensions, 1)
        none = policy.Limits(margin=1.0, first_delay=0.001, chunk=MIB)
        self.assertGreater(simulate.run(1e9, 4, total, 0, none)[0], 0)


class Backends(unittest.TestCase):
    def test_names_of_volumes(self):
        for path, name in (('/dev/vg/lv', 'vg/lv'),
                           ('/dev/mapper/vg-lv', 'vg/lv'),
                           ('/dev/mapper/v--g-l--v', 'v-g/l-v')):
            self.assertEqual(backends.volume_of(path), name)

    def test_other_paths(self):
        for path in ('/dev/sda', '/var/lib/x', '/dev/mapper/whole', '',
                     '/dev/vg/lv/x', '/dev/v g/lv', '/dev/-vg/lv'):
            with self.assertRaises(backends.Failure):
                backends.volume_of(path)

    def test_command_must_say_what(self):
        backends.make('command', 'extend {path} {size}')
        for command in (None, 'extend {path}', 'extend {size}'):
            with self.assertRaises(backends.Failure):
                backends.make('command', command)

    def test_path_of_a_node(self):
        self.assertEqual(path_of('/dev/vg/lv'), '/dev/vg/lv')
        self.assertEqual(path_of(
            'json:{"driver": "thinvm", "space-watermark": 1, "file": '
            '{"driver": "host_device", "filename": "/dev/vg/lv"}}'),
            '/dev/vg/lv')
        self.assertEqual(path_of(
            'json:{"driver": "thinvm", "file": {"driver": "iscsi", "lun": "3",'
            '"portal": "10.0.0.1:3260", "target": "iqn.x:y"}}'),
            'iscsi://10.0.0.1:3260/iqn.x:y/3')
        self.assertEqual(path_of('json:{"driver": "thinvm", "file": '
                                 '{"driver": "nbd"}}'), '')

    def test_command_needs_a_path(self):
        with self.assertRaises(backends.Failure):
            asyncio.run(backends.make('command', 'true {path} {size}')
                        .extend('', 1))

    def test_rescan_must_say_what(self):
        self.assertFalse(backends.make('command', 'x {path} {size}')
                         .refreshes)
        self.assertTrue(backends.make('command', 'x {path} {size}',
                                      'rescan {path}').refreshes)
        with self.assertRaises(backends.Failure):
            backends.make('command', 'x {path} {size}', 'rescan')

    def test_message(self):
        self.assertEqual(backends.message(''), 'no message')
        text = ('  Retrying ex lock on VG vg\n  Retrying ex lock on VG vg\n'
                '  VG vg lock failed: held by other host.\n')
        self.assertEqual(backends.message(text), 'VG vg lock failed: held by '
                         'other host. (another host is changing the volume '
                         'group)')


class FakeGroup:
    """A volume group of extents of 4 MiB, as the programs of LVM show it."""

    def __init__(self, size, free):
        self.size, self.free, self.seen = size, free, size
        self.commands = []

    async def run(self, *args):
        self.commands.append(' '.join(args))
        if args[0] == 'lvs':
            return f'  {self.size} {self.free}\n'
        if args[0] == 'lvchange':
            self.seen = self.size
            return ''
        if '+100%FREE' in args:
            wanted = self.size + self.free
        else:
            wanted = int(args[args.index('--size') + 1].rstrip('b'))
            assert wanted % 512 == 0
            wanted += -wanted % (4 * MIB)
        if not self.size < wanted <= self.size + self.free:
            raise backends.Failure(backends.message(
                'matches existing size' if wanted <= self.size else
                'Insufficient free space: 9 extents needed, but only 1 '
                'available'))
        self.free -= wanted - self.size
        self.size = self.seen = wanted
        return ''


class Lvm(unittest.TestCase):
    def extend(self, group, size):
        with mock.patch.object(backends, 'run', group.run), \
                mock.patch.object(backends, 'device_size',
                                  lambda path: group.seen):
            return asyncio.run(backends.Lvm().extend('/dev/vg/lv', size))

    def test_extended(self):
        """To whole extents; what was asked for is what is told."""
        group = FakeGroup(8 * MIB, 100 * MIB)
        self.assertEqual(self.extend(group, 13 * MIB + 1), 13 * MIB + 512)
        self.assertEqual(group.size, 16 * MIB)
        self.assertEqual(len(group.commands), 1)

    def test_the_rest_of_the_group(self):
        group = FakeGroup(8 * MIB, 12 * MIB)
        self.assertEqual(self.extend(group, 64 * MIB), 20 * MIB)
        with self.assertRaisesRegex(backends.Failure, 'vgextend'):
            self.extend(group, 64 * MIB)

    def test_done_before(self):
        """By another host, and not seen here; or by an earlier request."""
        group = FakeGroup(64 * MIB, 12 * MIB)
        group.seen = 8 * MIB
        self.assertEqual(self.extend(group, 32 * MIB), 32 * MIB)
        self.assertEqual(group.commands[-1], 'lvchange --refresh vg/lv')
        self.assertEqual(self.extend(group, 32 * MIB), 32 * MIB)
        self.assertEqual(sum('lvchange' in c for c in group.commands), 1)

    def test_other_failure(self):
        """Is not mistaken for a full group."""
        group = FakeGroup(8 * MIB, 100 * MIB)

        async def held(*args):
            if args[0] == 'lvextend':
                group.commands.append(' '.join(args))
                raise backends.Failure('the lock is held')
            return await FakeGroup.run(group, *args)
        group.run = held
        with self.assertRaisesRegex(backends.Failure, 'held'):
            self.extend(group, 32 * MIB)
        self.assertNotIn('FREE', ' '.join(group.commands))


class Following(unittest.TestCase):
    """What is done for a volume, by what the image says of it."""

    def considered(self, seen, **info):
        """The commands of LVM where the host sees @seen bytes."""
        group = FakeGroup(64 * MIB, 64 * MIB)
        group.seen = seen
        info = {'owner': False, 'device-size': 64 * MIB, 'device-free': 0,
                'space-watermark': MIB, 'allocation-rate': 0, **info}

        async def work():
            daemon = Daemon([], backends.Lvm(), policy.Limits(chunk=MIB),
                            metrics.Metrics())
            volume = types.SimpleNamespace(
                name='v', path='/dev/vg/lv', node='v', task=None, wanted=0,
                not_before=0, vm=mock.Mock())
            daemon.consider(volume, info)
            stop = asyncio.Event()
            stop.set()
            await daemon.run(stop)      # finishes what is under way
        with mock.patch.object(backends, 'run', group.run), \
                mock.patch('thinvm_extender.daemon.device_size',
                           lambda path: group.seen), \
                mock.patch.object(backends, 'device_size',
                                  lambda path: group.seen), \
                mock.patch('thinvm_extender.daemon.log'):
            asyncio.run(work())
        return group.commands

    def test_follower(self):
        """Is never extended; refreshed when the image has become larger."""
        self.assertEqual(self.considered(64 * MIB), [])
        self.assertEqual(self.considered(32 * MIB),
                         ['lvchange --refresh vg/lv'])

    def test_owner(self):
        self.assertEqual(self.considered(32 * MIB, owner=True),
                         ['lvchange --refresh vg/lv'])
        self.assertIn('lvextend', self.considered(64 * MIB, owner=True)[0])
        self.assertEqual(self.considered(64 * MIB, owner=True,
                                         **{'device-free': 8 * MIB}), [])

    def test_an_extension_is_finished(self):
        """The end of the daemon waits for it."""
        done = []

        async def slow():
            await asyncio.sleep(0.05)
            done.append(True)

        async def work():
            daemon = Daemon([], backends.File(), policy.Limits(),
                            metrics.Metrics())
            daemon.begin(types.SimpleNamespace(task=None), slow())
            stop = asyncio.Event()
            stop.set()
            await daemon.run(stop)
        asyncio.run(work())
        self.assertTrue(done)


class Metrics(unittest.TestCase):
    def test_text(self):
        values = metrics.Metrics()
        values.add('thinvm_extensions_total', 'a"b\\')
        values.add('thinvm_extensions_total', 'a"b\\')
        values.set('thinvm_volume_free_bytes', 'c', 5)
        text = values.text()
        self.assertIn('thinvm_extensions_total{volume="a\\"b\\\\"} 2\n', text)
        self.assertIn('# TYPE thinvm_volume_free_bytes gauge\n'
                      'thinvm_volume_free_bytes{volume="c"} 5\n', text)
        values.forget('c')
        self.assertNotIn('volume="c"', values.text())
