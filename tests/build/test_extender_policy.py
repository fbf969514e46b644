# SPDX-License-Identifier: GPL-2.0-or-later
#
# thinvm-extender's decisions: when, and to what size; LVM's names; metrics.

import unittest

from thinvm_extender import backends, metrics, policy, simulate
from thinvm_extender.daemon import path_of

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
