# SPDX-License-Identifier: GPL-2.0-or-later
#
# The insertions: that the real list fits, and that a list that does not
# fit is refused with everything a person needs to mend it.

import re
import subprocess
import sys
import unittest

import insertions
from helpers import CHECKOUT, TempTest

TEXT = 'one\n  two\none more\n\nlist a:\n  [ 1, 2 ]\n\nlist b:\n  [ 1, 2 ]\n'


def one(**keys):
    entry = {'name': 'probe', 'file': 'f.txt', 'text': 'NEW\n'}
    entry.update({k.replace('_', '-'): v for k, v in keys.items()})
    return insertions.apply([entry], lambda _: TEXT)['f.txt']


class Places(unittest.TestCase):
    def test_after_and_before_take_whole_lines(self):
        self.assertIn('one\nNEW\n  two\n', one(after='one\n'))
        self.assertIn('one\nNEW\n  two\n', one(before='  two\n'))

    def test_end(self):
        self.assertTrue(one(at='end').endswith('  [ 1, 2 ]\nNEW\n'))

    def test_inline_within_a_paragraph(self):
        text = one(within='list b:', inline_after='[ 1, ', text='9, ')
        self.assertTrue(text.endswith('list b:\n  [ 1, 9, 2 ]\n'))
        self.assertIn('list a:\n  [ 1, 2 ]\n', text)

    def test_two_insertions_in_one_file(self):
        entries = [{'name': n, 'file': 'f.txt', 'after': 'one\n',
                    'text': n + '\n'} for n in ('x', 'y')]
        text = insertions.apply(entries, lambda _: TEXT)['f.txt']
        self.assertIn('x\n', text)
        self.assertIn('y\n', text)

    def test_pristine_text_decides_what_an_anchor_is(self):
        entries = [{'name': 'x', 'file': 'f.txt', 'at': 'end',
                    'text': 'mine\n'},
                   {'name': 'y', 'file': 'f.txt', 'after': 'mine\n',
                    'text': 'other\n'}]
        with self.assertRaisesRegex(insertions.InsertionError, 'missing'):
            insertions.apply(entries, lambda _: TEXT)


class Misfits(unittest.TestCase):
    def refused(self, *patterns, **keys):
        with self.assertRaises(insertions.InsertionError) as caught:
            one(**keys)
        for pattern in ("'probe'", 'f.txt', *patterns):
            self.assertIn(pattern, str(caught.exception))

    def test_missing_anchor(self):
        self.refused('is missing', 'three', after='three\n')

    def test_part_of_a_line_is_no_line(self):
        self.refused('is missing', after='two\n')

    def test_doubled_anchor(self):
        self.refused('occurs 2 times', '[ 1, ', inline_after='[ 1, ')

    def test_missing_paragraph(self):
        self.refused('within', 'list c:', within='list c:',
                     inline_after='1')

    def test_missing_file(self):
        def read(_):
            raise FileNotFoundError(2, 'No such file')
        with self.assertRaisesRegex(insertions.InsertionError,
                                    "'probe'.*f.txt"):
            insertions.apply([{'name': 'probe', 'file': 'f.txt',
                               'at': 'end', 'text': 'x'}], read)


class Lists(TempTest):
    def refused(self, text, pattern):
        path = self.put('list.toml', text)
        with self.assertRaisesRegex(insertions.InsertionError, pattern):
            insertions.load(path)

    def test_bad_lists(self):
        head = '[[insertion]]\nname = "n"\nfile = "f"\ntext = "t"\n'
        self.refused('[[insertion', 'list.toml')
        self.refused(head, 'needs one of')
        self.refused(head + 'at = "end"\nafter = "x"\n', 'needs one of')
        self.refused(head + 'at = "start"\n', 'only "end"')
        self.refused(head + 'at = "end"\nplace = 1\n', 'unknown key place')
        self.refused((head + 'at = "end"\n') * 2, 'twice')
        self.refused('[[insertion]]\nname = "n"\nfile = "f"\n', 'no text')


class RealList(unittest.TestCase):
    def test_fits_the_source(self):
        script = CHECKOUT / 'scripts' / 'lib' / 'insertions.py'
        p = subprocess.run([sys.executable, script, '--check', '--source',
                            CHECKOUT / 'deps' / 'qemu'],
                           capture_output=True, text=True, check=False)
        self.assertEqual((p.returncode, p.stderr), (0, ''))
        self.assertEqual(p.stdout.strip(),
                         insertions.summary(insertions.load()))

    def test_readme_states_the_count(self):
        readme = (CHECKOUT / 'README.md').read_text(encoding='utf-8')
        stated = re.findall(r'(\d+) insertions', readme)
        self.assertEqual(set(stated), {str(len(insertions.load()))})
