# SPDX-License-Identifier: GPL-2.0-or-later
#
# The unit tests under sanitizers, for run-thinvm.py --all: all of them with
# ASan and UBSan ("asan/NAME"), and those that have threads of their own with
# TSan ("tsan/NAME"), where QEMU's threads, bottom halves, locks and coroutines
# are compiled for it as well, since it must see how they order things.
#
# Programs are compiled and linked as the fuzzer's are (tests/fuzz/run.py), by
# the compiler of QEMU's build; objects lie in BUILD/fuzz.

import importlib.util
import json
import os
import re
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent.parent
THREADS = ('test-thinvm-store-threads', 'test-thinvm-sums-threads')
# These take minutes under ASan, and what they run others run as well
SLOW = ('test-thinvm-shrink',)
# What orders things in QEMU, but the coroutine backend, which is our own
UTIL = re.compile(r'^libqemuutil\.a\.p/util_(aio|async|coroutine|qemu-co|'
                  r'lockcnt|rcu|qemu-thread|main-loop|thread-pool|'
                  r'event_notif|fdmon|qemu-timer|qht|iohandler|memalign|'
                  r'oslib-posix)[\w-]*\.c\.o$')
BACKENDS = ('coroutine-ucontext', 'coroutine-sigaltstack')
TSAN_FLAGS = ['-O1', '-fsanitize=thread', '-DCONFIG_TSAN=1', '-Wno-tsan']


sys.path.append(str(CHECKOUT / 'tests/fuzz'))


def fuzz_module():
    spec = importlib.util.spec_from_file_location(
        'thinvm_fuzz_run', CHECKOUT / 'tests/fuzz/run.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FUZZ = fuzz_module()


class Meson:
    """As much of meson as the table of the unit tests uses."""

    @staticmethod
    def project_source_root():
        return CHECKOUT


# What is not a source in the table
LIBRARIES = ('crypto', 'qom', 'testblock')


def table():
    """{test: what it links beside its own file}, as meson.build has it."""
    text = (HERE / 'thinvm/meson.build').read_text(encoding='utf-8')
    before, _, rest = text.partition('if have_block\n  tests += ')
    names = {'meson': Meson, 'declare_dependency': dict,
             **{n: n for n in LIBRARIES}}
    # The language of such a file is Python's, as far as it is used there, but
    # for named arguments
    before, rest = (re.sub(r'\(\s*(\w+): ', r'(\1=', t)
                    for t in (before, rest.partition('\nendif')[0]))
    exec(before, names)                         # pylint: disable=exec-used
    return eval(rest, names)                    # pylint: disable=eval-used


class Sanitized:
    def __init__(self, build):
        self.build = build.resolve()
        self.fuzz = FUZZ
        self.cc = shutil.which('gcc') or shutil.which('cc')

    def _sources(self, name):
        """Its own, and what the table names; some of that is QEMU's."""
        beside = [b for b in table()[name] if not isinstance(b, dict)]
        return [f if f.exists() else
                self.build / 'qemu-src' / f.relative_to(CHECKOUT)
                for f in (HERE / f'{name}.c', *(HERE / b for b in beside))]

    @staticmethod
    def _link_args(name):
        return [b['link_args'] for b in table()[name] if isinstance(b, dict)]

    def _without_engine(self, name):
        """Sources and libraries of a test of something else, or None."""
        beside = table()[name]
        if CHECKOUT / 'block/thinvm/state.c' in beside or \
                CHECKOUT / 'block/thinvm/format.c' in beside:
            return None
        ninja = (self.build / 'qemu/build.ninja').read_text(encoding='utf-8')
        rule = ninja[ninja.index(f'build tests/unit/{name}: '):]
        link = re.search(r'^ LINK_ARGS = (.*)$', rule, re.MULTILINE).group(1)
        return ([HERE / f'{name}.c',
                 *(b for b in beside if b not in LIBRARIES)],
                [*re.findall(r'lib(?:crypto|authz|io)\.a\.p/\S+\.o',
                             rule.split('\n', 1)[0]),
                 *re.findall(r'/\S+\.so\b', link)])

    def _util(self):
        qemu = self.build / 'qemu'
        commands = json.loads((qemu / 'compile_commands.json').read_text())
        found = {Path(os.path.normpath(qemu / c['file'])) for c in commands
                 if UTIL.match(c.get('output', ''))}
        return sorted(f for f in found if f.stem not in BACKENDS)

    def asan(self, name):
        """The program, and the environment that it wants."""
        other = self._without_engine(name)
        # Objects go by the names of their sources, of which some have two
        program = self.fuzz.Program(
            self.build, f'asan-{name}' if other else 'asan', self.cc,
            self.fuzz.sanitized(self.cc, self.fuzz.SANITIZE))
        flags = []
        if other:
            sources, flags = other
        else:
            # the coroutines too, so that ASan learns of changes of stack
            sources = [*self._sources(name),
                       self.build / 'qemu-src/util/coroutine-ucontext.c']
            flags = self._link_args(name)
        return program.link(name, sources, libraries=flags), {
            k: v for k, v in self.fuzz.environment().items()
            if k.endswith('SAN_OPTIONS')}

    def tsan(self, name):
        program = self.fuzz.Program(self.build, 'tsan', self.cc, TSAN_FLAGS)
        path = program.link(name, [*self._sources(name), *self._util(),
                                   HERE / 'thinvm-coroutine-tsan.c'])
        return path, {'TSAN_OPTIONS': 'halt_on_error=0:exitcode=66:suppressions='
                      f'{HERE / "thinvm-tsan.supp"}'}

    def cases(self, names):
        """(what it is called, how the program is made)."""
        for name in names:
            # All of the block layer would have to be compiled again
            if name not in SLOW and 'testblock' not in table()[name]:
                yield f'asan/{name}', self.asan, name
            if name in THREADS:
                yield f'tsan/{name}', self.tsan, name
