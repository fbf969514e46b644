# SPDX-License-Identifier: GPL-2.0-or-later
#
# Does a test notice when a check of what the device says is taken out?
#
# A guard is a condition in the code that reads images: one alternative of an
# "if (A || B)" whose branch refuses, or one part of a "return A && B", or of
# "return A && B ? NULL : message".  They are found in the sources as they
# are; nothing has to be kept up to date here.  All sources are compiled once
# more with each guard made switchable, linked into the unit tests, qemu-img
# and qemu-io.  One run of all tests tells which guards each of them comes by;
# then each guard is switched off in turn, and those tests run until one fails.
#
# Relies on the build of QEMU that is there (its commands are repeated with
# other sources); everything made lies in BUILD/fuzz/guards.

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent.parent
PURE = ('format', 'format-journal', 'format-validate', 'bases')
# and these do more than look
SOURCES = (*PURE, 'replay', 'ring', 'page', 'extents')
UNITS = ('test-thinvm-format', 'test-thinvm-format-journal',
         'test-thinvm-format-pages', 'test-thinvm-store',
         'test-thinvm-snapshots', 'test-thinvm-follow')
IOTESTS = ('thinvm-hostile', 'thinvm-damage')
TOOLS = {'qemu-img': 'QEMU_IMG_PROG', 'qemu-io': 'QEMU_IO_PROG'}
# Their condition says what another one says, too: nobody can miss them
SAID_TWICE = {
    ('format-journal', 'rec->sequence'),    # flushed_sequence is below it
    ('bases', 'a->journal_offset == b->journal_offset'),    # is a constant
    ('ring', 'rec->length > THINVM_RECORD_MAX_SIZE'),   # decoding says so
    ('ring', 'size > ring->size'),          # the smallest ring is larger
    # thinvm_page_validate() has judged the block by itself
    ('extents', '!nb'),
    ('extents', 'nb > THINVM_EXTENT_MAX_PAGES'),
    ('extents', '(first | nb) & ((1 << bits) - 1)'),
    ('extents', 'first >> bits < s->first_cluster'),
    ('extents', '(first + nb) >> bits > s->device_clusters'),
}
LIMIT = 300                     # seconds that one test may take
# What a branch that refuses an image does
REFUSES = re.compile(r'error_setg|return -EBADMSG|return -E(INVAL|NOENT|NOTSUP)|'
                     r'return "|return false|return THINVM_NEXT_|suspect = true')
REFUSES_LOUDLY = re.compile(r'error_setg|return -EBADMSG|return THINVM_NEXT_')
# An error that was found elsewhere is no guard
PASSES_ON = re.compile(r'\(*!?\(?(ret|slot->ret)\b|errp|why\b|moved\b|again\b')
SWITCH = r'''
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
bool thinvm_guard_fires(int id, bool refuses);
bool thinvm_guard_fires(int id, bool refuses)
{
    static bool seen[4096];
    const char *off = getenv("THINVM_GUARD_OFF");
    const char *log = getenv("THINVM_GUARD_LOG");

    if (refuses && log && !seen[id]) {
        char line[16];
        int n = snprintf(line, sizeof(line), "%d\n", id);
        int fd = open(log, O_WRONLY | O_CREAT | O_APPEND, 0666);

        seen[id] = write(fd, line, n) == n;
        close(fd);
    }
    return refuses && !(off && atoi(off) == id);
}
'''
HEADER = '''#include <stdbool.h>
bool thinvm_guard_fires(int id, bool refuses);
'''


class GuardError(Exception):
    pass


# --- Finding them -----------------------------------------------------------

def blank(text):
    """Comments and strings as spaces, so that places stay."""
    pattern = re.compile(r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"|'
                         r"'(?:\\.|[^'\\\n])*'", re.DOTALL)

    def spaces(m):
        # a string stays one: what a branch returns is told by it
        keep = '"' if m.group()[0] == '"' else ' '
        return keep + re.sub(r'[^\n]', ' ', m.group()[1:-1]) + keep

    return pattern.sub(spaces, text)


def closing(code, at):
    """Index behind the bracket that closes the one at code[at]."""
    depth = 0
    for i in range(at, len(code)):
        depth += code[i] in '([{'
        depth -= code[i] in ')]}'
        if depth == 0:
            return i + 1
    raise GuardError('brackets do not match')


def split(code, start, end, operator):
    """[(start, end)] of what the operator joins outside of brackets."""
    parts, depth, begin, i = [], 0, start, start
    while i < end:
        depth += code[i] in '([{'
        depth -= code[i] in ')]}'
        if depth == 0 and code.startswith(operator, i):
            parts.append((begin, i))
            i += len(operator)
            begin = i
            continue
        i += 1
    return [*parts, (begin, end)]


def has(code, start, end, operator):
    return len(split(code, start, end, operator)) > 1


def branches(code, refuses):
    """Of each "if" whose branch refuses, the alternatives."""
    for m in re.finditer(r'\bif \(', code):
        end = closing(code, m.end() - 1)
        body = code[end:].lstrip()
        at = len(code) - len(body)
        stop = closing(code, at) if body[0] == '{' else code.index(';', at)
        if refuses.search(code[at:stop]):
            for a, b in split(code, m.end(), end - 1, '||'):
                yield a, b, False


def results(code):
    """Of each "return A && B" or "return A ? NULL : ..." the parts."""
    for m in re.finditer(r'\breturn ([^;]*);', code):
        start, end = m.span(1)
        question = split(code, start, end, '?')
        if len(question) == 2:
            if not code[question[1][0]:end].strip().startswith('NULL'):
                continue
            end = question[0][1]
        elif has(code, start, end, '||') or not has(code, start, end, '&&'):
            continue
        if has(code, start, end, '||'):
            continue
        for a, b in split(code, start, end, '&&'):
            yield a, b, True


class Guard:
    def __init__(self, number, source, text, span, wanted):
        self.number, self.source, self.span = number, source, span
        self.wanted = wanted    # it refuses when it is false
        self.line = text.count('\n', 0, span[0]) + 1
        self.line += len(text[span[0]:]) - len(text[span[0]:].lstrip()) > 1
        self.text = ' '.join(text[span[0]:span[1]].split())

    def __str__(self):
        return f'{self.source}.c:{self.line}: {self.text}'

    def switchable(self, text):
        inner = text[slice(*self.span)]
        if self.wanted:
            return f'(!thinvm_guard_fires({self.number}, !({inner})))'
        return f'(thinvm_guard_fires({self.number}, !!({inner})))'


def find_guards():
    """{source: (text, [guards in it])}"""
    found, number = {}, 0
    for source in SOURCES:
        text = (CHECKOUT / 'block/thinvm' / f'{source}.c').read_text('utf-8')
        code, guards = blank(text), []
        places = [*branches(code, REFUSES), *results(code)] \
            if source in PURE else branches(code, REFUSES_LOUDLY)
        for a, b, wanted in sorted(places):
            inside = guards and a < guards[-1].span[1]
            if (source, ' '.join(text[a:b].split())) in SAID_TWICE:
                continue
            if inside or PASSES_ON.match(text[a:b].strip()):
                continue
            guards.append(Guard(number, source, text, (a, b), wanted))
            number += 1
        found[source] = text, guards
    return found


# --- Building ---------------------------------------------------------------

class Programs:
    def __init__(self, build):
        self.qemu = build / 'qemu'
        self.dir = build / 'fuzz' / 'guards'
        self.dir.mkdir(parents=True, exist_ok=True)
        self.guards = []

    def _run(self, command):
        done = subprocess.run(command, cwd=self.qemu, text=True, check=False,
                              stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT)
        if done.returncode:
            raise GuardError(f'{shlex.join(map(str, command))}\n{done.stdout}')
        return done.stdout

    def compile(self):
        header, switch = self.dir / 'switch.h', self.dir / 'switch.c'
        header.write_text(HEADER)
        switch.write_text(SWITCH)
        self._run(['cc', '-O1', '-fPIE', '-c', switch, '-o',
                   self.dir / 'switch.o'])
        commands = json.loads((self.qemu / 'compile_commands.json')
                              .read_text('utf-8'))
        for source, (text, guards) in find_guards().items():
            self.guards += guards
            for g in reversed(guards):
                a, b = g.span
                text = text[:a] + g.switchable(text) + text[b:]
            copy = self.dir / f'{source}.c'
            copy.write_text(text, 'utf-8')
            wanted = f'libblock.a.p/block_thinvm_{source}.c.o'
            words = next(shlex.split(c['command']) for c in commands
                         if c['output'] == wanted)
            words = words[:words.index('-MD')] if '-MD' in words else words
            i = next(n for n, w in enumerate(words) if w.startswith('-'))
            self._run([*words[:i], '-iquote', CHECKOUT / 'block/thinvm',
                       *words[i:], '-include', header, '-w', '-c', copy,
                       '-o', self.dir / f'{source}.o'])

    def link(self, target):
        command = self._run(['ninja', '-t', 'commands', target])
        words = shlex.split(command.strip().split('\n')[-1])
        program = self.dir / Path(target).name
        out = []
        for w in words:
            m = re.search(r'block_thinvm_([\w-]+)\.c\.o$', w)
            out.append(str(self.dir / f'{m.group(1)}.o')
                       if m and m.group(1) in SOURCES else w)
        out[out.index('-o') + 1] = str(program)
        self._run([*out, str(self.dir / 'switch.o')])

    def make(self):
        self.compile()
        for target in (*TOOLS, *(f'tests/unit/{u}' for u in UNITS)):
            self.link(target)


# --- Tests ------------------------------------------------------------------

def iotest_cases():
    """Names of the single cases, as the programs themselves take them."""
    for name in IOTESTS:
        path = CHECKOUT / 'tests/qemu-iotests/tests' / name
        group = ''
        for line in path.read_text('utf-8').split('\n'):
            m = re.match(r'class (\w+)|    def (test_\w+)', line)
            if m and m.group(1):
                group = m.group(1)
            elif m:
                yield name, f'{group}.{m.group(2)}'


class Tests:
    def __init__(self, build, programs):
        self.build, self.programs = build, programs
        self.all = [*((u, '') for u in UNITS), *iotest_cases()]

    def _command(self, name, case):
        if not case:
            return [str(self.programs.dir / name), '--tap', '-k']
        tree = self.build / 'iotests'
        return [sys.executable, str(self.build / 'qemu-src/tests/qemu-iotests'
                                    / 'check'), '-thinvm',
                '--source-dir', str(tree), '--build-dir',
                str(self.build / 'qemu/tests/qemu-iotests'), '--',
                sys.executable, str(tree / 'tests' / name), case]

    def passes(self, test, **variables):
        with tempfile.TemporaryDirectory(prefix='tg-') as scratch:
            env = dict(os.environ, **variables, TEST_DIR=f'{scratch}/',
                       SOCK_DIR=f'{scratch}/', TMPDIR=scratch,
                       PYTHONDONTWRITEBYTECODE='1',
                       G_TEST_SRCDIR=str(CHECKOUT / 'tests/unit'),
                       G_TEST_BUILDDIR=str(self.programs.dir))
            for tool, variable in TOOLS.items():
                env[variable] = str(self.programs.dir / tool)
            try:
                return subprocess.run(
                    self._command(*test), cwd=scratch, env=env, check=False,
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL, timeout=LIMIT).returncode == 0
            except subprocess.TimeoutExpired:
                return False

    def reach(self, test):
        """Numbers of the guards that refuse something in it."""
        with tempfile.NamedTemporaryFile(prefix='tg-') as log:
            if not self.passes(test, THINVM_GUARD_LOG=log.name):
                raise GuardError(f'{" ".join(test)} fails by itself')
            return {int(n) for n in log.read().split()}


def who_misses(tests, reached, guard):
    """A test that fails without the guard, and how many come by it."""
    by = [t for t in tests.all if guard.number in reached[t]]
    return next((t for t in by if not tests.passes(
        t, THINVM_GUARD_OFF=str(guard.number))), None), len(by)


def run(build, sources, say):
    """
    (guards that no test misses, those that none comes by, all); of these
    @sources only, if there are any
    """
    if set(sources) - set(SOURCES):
        raise GuardError(f'sources are: {", ".join(SOURCES)}')
    programs = Programs(build)
    programs.make()
    programs.guards = [g for g in programs.guards
                       if not sources or g.source in sources]
    tests = Tests(build, programs)
    survived, idle = [], []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reached = dict(zip(tests.all, pool.map(tests.reach, tests.all)))
        found = pool.map(lambda g: who_misses(tests, reached, g),
                         programs.guards)
        for g, (test, nb) in zip(programs.guards, found):
            if test:
                say(f'{g}: {" ".join(test).strip()}')
            elif nb:
                survived.append(g)
                say(f'{g}: MISSED BY NOBODY of {nb}')
            else:
                idle.append(g)
                say(f'{g}: no test comes by')
    return survived, idle, len(programs.guards)
