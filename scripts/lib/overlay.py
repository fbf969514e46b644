#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
#
# The source tree that is built: a copy of a pristine QEMU source, with the
# insertions of integration/ applied to it and thinvm's own files linked
# into it.  The pristine source is only ever read.
#
# Three rules keep builds incremental and safe to repeat:
#   - a file is written only if its content changes (ninja goes by mtime);
#   - patched files are always made anew from their pristine text, so the
#     result does not depend on what was there before;
#   - own files are symbolic links, so an edit in the checkout is seen at
#     once; a link whose file went away is removed on the next run.
#
# Called by qemubuild.py at every build; a run that changes nothing takes
# some ten milliseconds.

import json
import os
import shutil
from pathlib import Path

import insertions

# Directories of the checkout that are laid out as in QEMU's tree.
LINKED = ('block', 'include', 'migration', 'qapi', 'docs/interop',
          'tests/unit', 'tests/qemu-iotests')
# Parts of the pristine source that the build never reads (three quarters
# of its size).
UNUSED = ('.git', '.pc', 'debian', 'roms')
STATE = '.thinvm-overlay.json'


class OverlayError(Exception):
    """The tree cannot be made; the message says what to do."""


def describe(source):
    """The version of a QEMU source tree."""
    try:
        version = (source / 'VERSION').read_text().strip()
    except OSError:
        version = None
    if not version or not (source / 'block.c').exists():
        raise OverlayError(f'{source} is not a QEMU source tree: run '
                           'scripts/setup first')
    return version


def _same(a, b):
    return (a.st_size, a.st_mtime_ns) == (b.st_size, b.st_mtime_ns)


def _sync(source, tree, keep):
    """
    Make tree a copy of source: copy what differs in size or time, delete
    what the source does not have.  keep(relative path) tells which paths of
    the tree are ours.
    """
    for here, dirs, files in os.walk(source):
        rel = os.path.relpath(here, source)
        if rel == '.':
            dirs[:] = [d for d in dirs if d not in UNUSED]
            rel = ''
        target = tree / rel
        if target.is_symlink():
            target.unlink()
        target.mkdir(exist_ok=True)
        links = [d for d in dirs if os.path.islink(os.path.join(here, d))]
        wanted = set(dirs) | set(files)
        for name in files + links:
            path = os.path.join(rel, name)
            if not keep(path):
                _copy(Path(here, name), target / name)
        for entry in os.scandir(target):
            path = os.path.join(rel, entry.name)
            if entry.name in wanted or keep(path) or \
                    entry.name == '__pycache__':
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)


def _copy(src, dst):
    try:
        if dst.is_symlink() or not _same(os.lstat(src), os.lstat(dst)):
            dst.unlink()
        else:
            return
    except FileNotFoundError:
        pass
    shutil.copy2(src, dst, follow_symlinks=False)


def _load_state(tree):
    try:
        with open(tree / STATE, encoding='utf-8') as f:
            return json.load(f)
    except (OSError, ValueError):
        return {}


def _ours(name):
    return not (name.startswith('.') or name.endswith(('~', '.pyc', '.rej'))
                or name == '__pycache__')


def _own_files(checkout, source):
    """
    Relative paths to link.  A directory that upstream does not have is
    linked whole; one that it has is entered.
    """
    pending = list(LINKED)
    while pending:
        directory = pending.pop()
        try:
            entries = sorted(os.listdir(checkout / directory))
        except FileNotFoundError:
            continue
        for name in filter(_ours, entries):
            path = os.path.join(directory, name)
            if (checkout / path).is_dir():
                if (source / path).is_dir():
                    pending.append(path)
                else:
                    yield path
            elif os.path.lexists(source / path):
                raise OverlayError(
                    f'{path} is a file of QEMU itself: give it another name, '
                    'or change upstream\'s by an insertion')
            else:
                yield path


def _link(checkout, tree, path):
    link, wanted = tree / path, str(checkout / path)
    try:
        if os.readlink(link) == wanted:
            return
        link.unlink()
    except FileNotFoundError:
        pass
    except OSError:                     # not a link
        if link.is_dir():
            shutil.rmtree(link)
        else:
            link.unlink()
    link.symlink_to(wanted)


def _write_if_changed(path, text, mode):
    try:
        if path.read_text(encoding='utf-8') == text:
            return
        path.unlink()
    except FileNotFoundError:
        pass
    path.write_text(text, encoding='utf-8')
    path.chmod(mode)


def update(checkout, source, tree, full=False):
    """
    Bring the tree up to date.  full: look at every file of the source
    again, not only when it is another one than last time.
    """
    version = describe(source)
    identity = f'{source.resolve()} {version}'
    entries = insertions.load(checkout / insertions.LIST)
    patched = insertions.apply(
        entries, lambda f: (source / f).read_text(encoding='utf-8'))
    links = sorted(_own_files(checkout, source))

    tree.mkdir(parents=True, exist_ok=True)
    state = _load_state(tree)
    if full or state.get('source') != identity:
        ours = {*links, *patched, STATE}
        _sync(source, tree, ours.__contains__)
    else:
        for path in state.get('patched', []):
            if path not in patched:
                _copy(source / path, tree / path)

    for path in state.get('links', []):
        if path not in links and (tree / path).is_symlink():
            (tree / path).unlink()
    for path in links:
        _link(checkout, tree, path)
    for path, text in patched.items():
        _write_if_changed(tree / path, text,
                          (source / path).stat().st_mode & 0o777)

    new_state = {'source': identity, 'links': links,
                 'patched': sorted(patched)}
    if new_state != state:
        (tree / STATE).write_text(json.dumps(new_state, indent=1) + '\n',
                                  encoding='utf-8')
