#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
#
# The insertions into QEMU's files: reads integration/insertions.toml and
# applies it to the text of pristine files.  Pure: reads the list, but
# writes nothing (overlay.py does that).
#
# A key that names a place (the "anchor") must fit exactly once.  Anything
# else raises InsertionError with the insertion's name, the file and the
# anchor: guessing a place in somebody else's source would be worse than
# not building.
#
# Used alone it checks the list:
#
#   insertions.py --check [--source DIR]
#
# prints "N insertions, L lines, F files" and with --source also tries every
# anchor on that tree.

import argparse
import sys
import tomllib
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent.parent
LIST = Path('integration') / 'insertions.toml'

LINE_KEYS = ('after', 'before')
INLINE_KEYS = ('inline-after', 'inline-before')
ALL_KEYS = {'name', 'file', 'text', 'within', 'at', *LINE_KEYS, *INLINE_KEYS}


class InsertionError(Exception):
    """An insertion that cannot be applied, or a list that makes no sense."""


def load(path=CHECKOUT / LIST):
    """Read and validate the list; returns it in the order of the file."""
    try:
        with open(path, 'rb') as f:
            entries = tomllib.load(f).get('insertion', [])
    except (OSError, tomllib.TOMLDecodeError) as e:
        raise InsertionError(f'{path}: {e}') from e
    names = set()
    for entry in entries:
        name = entry.get('name', '?')
        unknown = set(entry) - ALL_KEYS
        if unknown:
            raise InsertionError(f"insertion '{name}': unknown key "
                                 f"{', '.join(sorted(unknown))}")
        for key in ('name', 'file', 'text'):
            if not entry.get(key):
                raise InsertionError(f"insertion '{name}': no {key}")
        places = [k for k in ('at', *LINE_KEYS, *INLINE_KEYS) if k in entry]
        if len(places) != 1:
            raise InsertionError(f"insertion '{name}': needs one of at, "
                                 'after, before, inline-after, inline-before')
        if entry.get('at', 'end') != 'end':
            raise InsertionError(f"insertion '{name}': at = "
                                 f"\"{entry['at']}\": only \"end\" is known")
        if name in names:
            raise InsertionError(f"insertion '{name}' is in the list twice")
        names.add(name)
    return entries


def _find(haystack, needle, start, end, whole_lines):
    """All offsets of needle in haystack[start:end]."""
    found = []
    pos = haystack.find(needle, start, end)
    while pos >= 0:
        if not whole_lines or pos == 0 or haystack[pos - 1] == '\n':
            found.append(pos)
        pos = haystack.find(needle, pos + 1, end)
    return found


def _only(entry, what, anchor, found):
    if len(found) == 1:
        return found[0]
    how = 'is missing' if not found else f'occurs {len(found)} times'
    where = f", below '{entry['within']}'" if what != 'within' and \
        'within' in entry else ''
    anchor = anchor.rstrip('\n')
    raise InsertionError(
        f"insertion '{entry['name']}' does not fit {entry['file']}{where}: "
        f"its anchor ({what}) {how}:\n{anchor}\n"
        f"Adapt it in {LIST} to this QEMU version.")


def _scope(entry, text):
    """Where to look: the paragraph that 'within' opens, or all of it."""
    if 'within' not in entry:
        return 0, len(text)
    line = entry['within'] + '\n'
    start = _only(entry, 'within', line,
                  _find(text, line, 0, len(text), True))
    end = text.find('\n\n', start)
    return start, len(text) if end < 0 else end + 1


def apply_one(entry, pristine, text):
    """
    Insert one entry into text.  Anchors are looked for in the pristine
    file too, so that no insertion can serve as another one's anchor.
    """
    if 'at' in entry:
        return text + entry['text']
    key = next(k for k in (*LINE_KEYS, *INLINE_KEYS) if k in entry)
    anchor = entry[key]
    whole_lines = key in LINE_KEYS
    for candidate in (pristine, text):
        start, end = _scope(entry, candidate)
        pos = _only(entry, key, anchor,
                    _find(candidate, anchor, start, end, whole_lines))
    if key.endswith('after'):
        pos += len(anchor)
    return text[:pos] + entry['text'] + text[pos:]


def apply(entries, read):
    """
    Apply all entries.  read(path) gives the pristine text of an upstream
    file.  Returns {path: new text}.
    """
    result = {}
    for entry in entries:
        path = entry['file']
        try:
            pristine = read(path)
        except OSError as e:
            raise InsertionError(f"insertion '{entry['name']}': cannot read "
                                 f'{path}: {e.strerror}') from e
        result[path] = apply_one(entry, pristine, result.get(path, pristine))
    return result


def summary(entries):
    lines = sum(max(1, e['text'].count('\n')) for e in entries)
    files = len({e['file'] for e in entries})
    return f'{len(entries)} insertions, {lines} lines, {files} files'


def main():
    p = argparse.ArgumentParser(description='Check the insertions.')
    p.add_argument('--check', action='store_true', required=True)
    p.add_argument('--source', type=Path,
                   help='QEMU source tree to try the anchors on')
    args = p.parse_args()
    try:
        entries = load()
        if args.source:
            apply(entries, lambda f: (args.source / f).read_text())
    except InsertionError as e:
        print(f'error: {e}', file=sys.stderr)
        return 1
    print(summary(entries))
    return 0


if __name__ == '__main__':
    sys.exit(main())
