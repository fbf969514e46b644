# SPDX-License-Identifier: GPL-2.0-or-later
#
# The overlay, on a source tree and a checkout of a few lines: what a build
# sees after every kind of change, and that nothing else moves.

import os

import overlay
from helpers import TempTest

LIST = '''
[[insertion]]
name = "n"
file = "block/meson.build"
at = "end"
text = "ours\\n"
'''


class Overlay(TempTest):
    def setUp(self):
        super().setUp()
        self.put('src/VERSION', '10.0.0\n')
        self.put('src/block.c', 'core\n')
        self.put('src/block/meson.build', 'theirs\n')
        self.put('src/block/raw.c', 'raw\n')
        self.put('src/roms/big', 'big\n')
        self.put('co/integration/insertions.toml', LIST)
        self.put('co/block/thinvm/a.c', 'a\n')
        self.put('co/block/filter.c', 'f\n')
        self.tree = self.tmp / 'tree'

    def update(self, full=False):
        overlay.update(self.tmp / 'co', self.tmp / 'src', self.tree, full)

    def read(self, path):
        return (self.tree / path).read_text(encoding='utf-8')

    def times(self):
        return {os.path.join(d, f): os.stat(os.path.join(d, f)).st_mtime_ns
                for d, _, files in os.walk(self.tree) for f in files}

    def test_tree(self):
        self.update()
        self.assertEqual(self.read('block/meson.build'), 'theirs\nours\n')
        self.assertEqual(self.read('block/thinvm/a.c'), 'a\n')
        self.assertEqual(self.read('block/filter.c'), 'f\n')
        self.assertEqual(self.read('block/raw.c'), 'raw\n')
        self.assertFalse((self.tree / 'roms').exists())
        source = self.tmp / 'src' / 'block' / 'meson.build'
        self.assertEqual(source.read_text(encoding='utf-8'), 'theirs\n')

    def test_repeating_touches_nothing(self):
        self.update()
        before = self.times()
        self.update()
        self.update(full=True)
        self.assertEqual(self.times(), before)

    def test_edits_in_the_checkout_are_seen_without_a_run(self):
        self.update()
        self.put('co/block/thinvm/a.c', 'b\n')
        self.put('co/block/thinvm/new.c', 'n\n')
        self.assertEqual(self.read('block/thinvm/a.c'), 'b\n')
        self.assertEqual(self.read('block/thinvm/new.c'), 'n\n')

    def test_changed_insertion_starts_from_pristine_text(self):
        self.update()
        self.put('co/integration/insertions.toml',
                 LIST.replace('ours', 'other'))
        self.update()
        self.assertEqual(self.read('block/meson.build'), 'theirs\nother\n')

    def test_dropped_insertion(self):
        self.update()
        self.put('co/integration/insertions.toml', '')
        self.update()
        self.assertEqual(self.read('block/meson.build'), 'theirs\n')

    def test_file_that_went_away(self):
        self.update()
        (self.tmp / 'co/block/filter.c').unlink()
        self.update()
        self.assertFalse(os.path.lexists(self.tree / 'block/filter.c'))

    def test_change_of_the_source(self):
        self.update()
        self.put('src/block/raw.c', 'raw 2\n')
        self.put('src/block/more.c', 'more\n')
        self.update(full=True)
        self.assertEqual(self.read('block/raw.c'), 'raw 2\n')
        self.assertEqual(self.read('block/more.c'), 'more\n')
        (self.tmp / 'src/block/more.c').unlink()
        self.update(full=True)
        self.assertFalse((self.tree / 'block/more.c').exists())

    def test_other_source_version(self):
        self.update()
        self.put('src/VERSION', '10.1.0\n')
        self.put('src/block/raw.c', 'raw 3\n')
        self.update()
        self.assertEqual(self.read('block/raw.c'), 'raw 3\n')

    def test_name_of_an_upstream_file_is_refused(self):
        self.put('co/block/raw.c', 'mine\n')
        with self.assertRaisesRegex(overlay.OverlayError, 'block/raw.c'):
            self.update()

    def test_no_source(self):
        with self.assertRaisesRegex(overlay.OverlayError, 'scripts/setup'):
            overlay.update(self.tmp / 'co', self.tmp / 'none', self.tree)
