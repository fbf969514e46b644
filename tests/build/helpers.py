# SPDX-License-Identifier: GPL-2.0-or-later
#
# What the tests of the build share.

import tempfile
import unittest
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent.parent
BUILD = CHECKOUT / 'build'      # run.py sets what it was told


class TempTest(unittest.TestCase):
    """A test with a directory of its own, self.tmp."""

    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.tmp = Path(directory.name)

    def put(self, path, text):
        """Write a file below self.tmp, making its directories."""
        file = self.tmp / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding='utf-8')
        return file
