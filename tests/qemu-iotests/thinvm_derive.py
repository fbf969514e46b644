# SPDX-License-Identifier: GPL-2.0-or-later
#
# Makes the directory out of which upstream's iotests run for thinvm.
#
# It looks like tests/qemu-iotests of the overlaid source: a symbolic link
# for each file there, and besides, for tests that thinvm-tests.txt lists:
#
#   way "copy"     a copy of the script that says thinvm where upstream's
#                  says qcow2 (links become files)
#   NAME.out.thinvm  upstream's reference output, changed by the rules of
#                  thinvm-rules.toml and by thinvm-out/NAME.ed; `check`
#                  prefers this name
#
# Nothing of this is ever committed: upstream's text stays upstream's, the
# tree holds only what differs.  thinvm-out/NAME.ed is what `diff -e` gives:
# line numbers and thinvm's own lines; its first line, "# " and a SHA-256,
# tells for which text it was made.  A rule that no longer fits, because
# upstream changed its test, is an error of that test and names itself.

import difflib
import hashlib
import os
import re
import shutil
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
RULES = HERE / 'thinvm-rules.toml'
FORMAT = 'qcow2'                # the name that upstream's tests carry
# These are programs or variables, not the name of the format.
KEEP = re.compile(r'\bqcow2(?=\.py\b)|\b_qcow2_|\bqcow2_dump')
EDITS = HERE / 'thinvm-out'
SKIPPED = ('tests', 'scratch', '__pycache__')


class RuleError(Exception):
    """A rule does not fit; the message names the test."""


def load_rules(path=RULES):
    """The rules as {test name: [rule]}, in their order."""
    with open(path, 'rb') as f:
        rules = tomllib.load(f).get('rule', [])
    by_test = {}
    for rule in rules:
        unknown = set(rule) - {'test', 'in', 'find', 'put', 'times', 'why'}
        if unknown or rule.get('in') not in ('out', 'script'):
            raise RuleError(f'{path.name}: a rule of {rule.get("test")} has '
                            f'wrong keys: {sorted(rule)}')
        by_test.setdefault(rule['test'], []).append(rule)
    return by_test


def rename(text):
    """text with the format's name replaced by ours."""
    kept = []

    def keep(match):
        kept.append(match.group())
        return f'\0{len(kept) - 1}\0'

    text = KEEP.sub(keep, text).replace(FORMAT, 'thinvm')
    return re.sub('\0(\\d+)\0', lambda m: kept[int(m.group(1))], text)


def apply_rules(name, text, rules):
    """text changed by the rules, each of which must fit as it says."""
    for rule in rules:
        text, count = re.subn(rule['find'], rule['put'], text,
                              flags=re.MULTILINE)
        wanted = rule.get('times', 1)
        if count != wanted:
            raise RuleError(f'thinvm-rules.toml: {name}: "{rule["find"]}" '
                            f'fits {count} times, not {wanted}')
    return text


def apply_edits(name, text):
    """text changed by the test's ed script, where there is one."""
    path = EDITS / f'{name}.ed'
    if not path.exists():
        return text
    seal, *script = path.read_text(encoding='utf-8').splitlines()
    if seal != f'# {sha256(text)}':
        raise RuleError(f'thinvm-out/{name}.ed was made for another '
                        "reference output than this QEMU's")
    lines = text.splitlines()
    while script:
        m = re.fullmatch(r'(\d+)(?:,(\d+))?([acd])', script.pop(0))
        first, last = int(m[1]), int(m[2] or m[1])
        new = []
        if m[3] != 'd':
            end = script.index('.')
            new, script = script[:end], script[end + 1:]
        if m[3] == 'a':
            lines[first:first] = new
        else:
            lines[first - 1:last] = new
    return '\n'.join(lines) + '\n'


def make_edits(name, path, source, entry, wanted):
    """
    Write the test's ed script: what turns the reference output, as the
    rules leave it, into wanted.
    """
    rules = [r for r in load_rules().get(name, []) if r['in'] == 'out']
    text, _ = reference(source, path)
    if entry.way == 'copy' or 'names' in entry.modifiers:
        text = rename(text)
    text = apply_rules(name, text, rules)
    if re.search(r'/\S+/iot-', wanted):
        raise RuleError(f'{name}: its output names directories of this run')
    old, new = text.splitlines(), wanted.splitlines()
    script = [f'# {sha256(text)}']
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    for tag, a, b, c, d in reversed(matcher.get_opcodes()):
        where = str(a + 1) if b - a < 2 else f'{a + 1},{b}'
        if tag == 'insert':
            script += [f'{a}a', *new[c:d], '.']
        elif tag == 'delete':
            script.append(f'{where}d')
        elif tag == 'replace':
            script += [f'{where}c', *new[c:d], '.']
    EDITS.mkdir(exist_ok=True)
    (EDITS / f'{name}.ed').write_text('\n'.join(script) + '\n',
                                      encoding='utf-8')


def sha256(text):
    return hashlib.sha256(text.encode('utf-8')).hexdigest()


def reference(directory, path):
    """
    Upstream's reference output for qcow2 on x86_64, in check's order, and
    how its name ends.
    """
    for suffix in ('.out.qcow2', '.pc.out', '.out'):
        file = directory / (path + suffix)
        if file.exists():
            return file.read_text(encoding='utf-8'), suffix
    raise RuleError(f'{path} has no reference output')


def _write(path, text, mode=0o644):
    """
    Replace the file at once and only if it differs: another runner may be
    reading it.
    """
    try:
        if not path.is_symlink() and \
                path.read_text(encoding='utf-8') == text:
            return
    except FileNotFoundError:
        pass
    temporary = path.with_name(f'.{path.name}.{os.getpid()}')
    temporary.write_text(text, encoding='utf-8')
    temporary.chmod(mode)
    temporary.replace(path)


def _link(target, path):
    if path.is_symlink() and os.readlink(path) == target:
        return
    temporary = path.with_name(f'.{path.name}.{os.getpid()}')
    temporary.symlink_to(target)
    temporary.replace(path)


def _remove(item):
    if item.is_dir(follow_symlinks=False):
        shutil.rmtree(item.path)
    else:
        os.unlink(item.path)


def _derive(source, path, entry, rules):
    """What differs from source for one test: {relative path: (text, mode)}"""
    files = {}
    if not (source / path).exists():
        return files
    script_rules = [r for r in rules if r['in'] == 'script']
    out_rules = [r for r in rules if r['in'] == 'out']
    if entry.way == 'copy' or script_rules:
        text = (source / path).read_text(encoding='utf-8')
        if entry.way == 'copy':
            text = rename(text)
        text = apply_rules(entry.name, text, script_rules)
        files[path] = (text, 0o755)
    base, suffix = reference(source, path)
    text = base
    if entry.way == 'copy' or 'names' in entry.modifiers:
        text = rename(text)
    text = apply_rules(entry.name, text, out_rules)
    text = apply_edits(entry.name, text)
    if text != base or suffix == '.out.qcow2':
        files[f'{path}.out.thinvm'] = (text, 0o644)
    return files


def find(name):
    """The path of a test below its directory."""
    return name if name[:3].isdigit() and len(name) == 3 else f'tests/{name}'


def _files(source, sub):
    """
    {name: file} for one directory: upstream's, as the build overlaid them,
    and our own straight from the checkout, which may have new ones.
    """
    files = {}
    for directory in (source / sub, HERE / sub):
        for item in os.scandir(directory):
            if item.name not in SKIPPED and not item.name.startswith('.') \
                    and os.path.exists(item.path):
                files[item.name] = item.path
    return files


def make_tree(source, tree, entries):
    """
    Bring tree up to date.  Returns {test name: why it could not be made}.
    """
    rules = load_rules()
    errors = {}
    derived = {}
    for name, entry in entries.items():
        try:
            derived.update(_derive(source, find(name), entry,
                                   rules.get(name, [])))
        except RuleError as e:
            errors[name] = str(e)
    for sub in ('', 'tests'):
        directory = tree / sub
        directory.mkdir(parents=True, exist_ok=True)
        wanted = {os.path.basename(p) for p in derived
                  if os.path.dirname(p) == sub}
        for name, file in _files(source, sub).items():
            if name not in wanted:
                _link(file, directory / name)
                wanted.add(name)
        for path, (text, mode) in derived.items():
            if os.path.dirname(path) == sub:
                _write(tree / path, text, mode)
        for item in os.scandir(directory):
            if item.name not in wanted and item.name != 'tests' and \
                    not item.name.startswith('.'):
                _remove(item)
    return errors
