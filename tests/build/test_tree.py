# SPDX-License-Identifier: GPL-2.0-or-later
#
# Rules that every file of the repository keeps: a licence line, a size
# that one can read, no path of somebody's machine, no work put off.

import os
import re
import shutil
import subprocess
import sys
import unittest

from helpers import CHECKOUT

# In two parts each, so that this file does not break its own rules.
MACHINE_PATHS = re.compile(r'/(wo' r'rk|ro' r'ot|home|tmp/te' r'am)/')
PUT_OFF = re.compile(r'\b(TO' r'DO|FIX' r'ME|XX' r'X)\b|\bfor no' r'w\b')
NO_LICENCE_LINE = ('LICENSE', '.out', '.ed', 'golden.json', '.gz', '.img',
                   '.xz', '.bin', '.gitignore')
MOST_LINES = 1000
CODE = ('.c', '.h', '.py')


def tracked():
    p = subprocess.run(['git', '-C', CHECKOUT, 'ls-files', '-z'],
                       capture_output=True, check=False)
    if p.returncode:
        raise unittest.SkipTest('not a git checkout')
    for name in p.stdout.decode().split('\0')[:-1]:
        path = CHECKOUT / name
        if path.is_file() and not path.is_symlink():
            try:
                yield name, path.read_text(encoding='utf-8')
            except UnicodeDecodeError:
                continue                # binary: a golden image


@unittest.skipUnless(shutil.which('git'), 'no git here')
class Files(unittest.TestCase):
    def violations(self, breaks_rule):
        found = [f'{name}{detail}' for name, text in tracked()
                 for detail in breaks_rule(name, text)]
        self.assertEqual(found, [])

    def test_licence_line(self):
        self.violations(
            lambda name, text: []
            if name.endswith(NO_LICENCE_LINE) or
            'SPDX-License-Identifier: GPL-2.0-or-later' in text[:400]
            else [''])

    def test_size(self):
        self.violations(
            lambda name, text: [f': {text.count(os.linesep)} lines']
            if name.endswith(CODE) and text.count('\n') > MOST_LINES else [])

    def matches(self, pattern):
        self.violations(
            lambda name, text: [] if name == 'LICENSE' else
            [f':{text.count(os.linesep, 0, m.start()) + 1}: {m[0]}'
             for m in pattern.finditer(text)])

    def test_machine_paths(self):
        self.matches(MACHINE_PATHS)

    def test_nothing_put_off(self):
        self.matches(PUT_OFF)


class UnitTests(unittest.TestCase):
    def test_table(self):
        """The run under sanitizers reads meson's table in its own way."""
        sys.path.append(str(CHECKOUT / 'tests/unit'))
        # pylint: disable=import-outside-toplevel
        from thinvm_sanitize import table
        sources = (CHECKOUT / 'tests/unit').glob('test-thinvm-*.c')
        self.assertEqual(sorted(table()), sorted(s.stem for s in sources))
