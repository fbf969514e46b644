# SPDX-License-Identifier: GPL-2.0-or-later
#
# The list of upstream's iotests that run for thinvm, thinvm-tests.txt, as
# data.  The list itself explains its columns.  Both the runner and the
# hooks inside a test read it through here.

import re
from pathlib import Path

LIST = Path(__file__).with_name('thinvm-tests.txt')
WAYS = ('generic', 'list', 'copy')
MODIFIERS = ('names', 'cluster', 'part')
STATUS = re.compile(r'(pass|slow|(waits-for|environment|differs):\S+)$')


class ListError(Exception):
    """The list is wrong; the message names the line."""


class Entry:
    """One line of the list."""

    def __init__(self, name, how, status, note=''):
        self.name = name
        self.way, *self.modifiers = how.split('+')
        self.status = status
        self.note = note
        if self.way not in WAYS + ('own',):
            raise ListError(f'{name}: "{self.way}" is none of {WAYS}')
        for m in self.modifiers:
            if m not in MODIFIERS:
                raise ListError(f'{name}: "{m}" is none of {MODIFIERS}')
        if not STATUS.match(status):
            raise ListError(f'{name}: there is no status "{status}"')

    @property
    def runs(self):
        """Is it expected to pass wherever its needs are met?"""
        return self.status in ('pass', 'slow')

    @property
    def reason(self):
        """Why it is not run, for a person to read."""
        kind, _, what = self.status.partition(':')
        what = what.replace('-', ' ')
        if kind == 'waits-for':
            text = f'waits for {what}'
        elif kind == 'environment':
            text = f'needs {what}'
        elif kind == 'differs':
            text = f'thinvm differs by design: {what}'
        else:
            text = 'takes long: --all runs it'
        return f'{text} ({self.note})' if self.note else text


def load(path=LIST):
    """The list as {name: Entry}, in its order."""
    entries = {}
    lines = path.read_text(encoding='utf-8').splitlines()
    for number, line in enumerate(lines, 1):
        words = line.split('#', 1)[0].split(None, 3)
        if not words:
            continue
        try:
            entry = Entry(*words)
        except (TypeError, ListError) as e:
            raise ListError(f'{path.name} line {number}: {e}') from e
        if entry.name in entries:
            raise ListError(f'{path.name} line {number}: {entry.name} is '
                            'listed twice')
        entries[entry.name] = entry
    return entries
