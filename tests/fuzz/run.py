#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Builds and runs thinvm's fuzzer.  What it does is in thinvm-fuzz-run.h.
#
#   run.py [--build DIR] [--all] [--only NAME]      as a suite of scripts/test:
#       corpus      every input of corpus/, under ASan and UBSan
#       fuzz        libFuzzer from that corpus: 30 s, with --all an hour
#       hints       the same two for what guests say to the object
#                   thinvm-hints (thinvm-fuzz-hints.c, corpus-hints/): 10 s,
#                   with --all ten minutes
#       coverage    lines of format, journal and replay code that the corpus
#                   and the unit tests reach (with --all)
#       tools       the iotest thinvm-fuzz for an hour (with --all)
#   run.py --fuzz SECONDS [--seed N]     libFuzzer; says executions and
#       coverage; new inputs are kept in BUILD/fuzz/found
#   run.py --coverage             the figures, file by file
#   run.py --guards [SOURCE...]   each check of what an image says is taken out
#       in turn: which test notices (thinvm_guards.py); of all sources, or of
#       these (replay, say)
#   run.py --seeds                write the first inputs to corpus/ anew
#   run.py --replay FILE...       run these inputs (a crash that was found),
#       and tell what happens
#
# The programs are those of QEMU's build, compiled again with sanitizers: the
# engine and durability layers as the unit tests list them
# (tests/unit/thinvm/meson.build), linked with the libqemuutil.a that is
# there.  Objects lie in BUILD/fuzz.  libFuzzer and coverage need clang and
# llvm; the corpus runs with any compiler.

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import thinvm_guards

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent.parent
CORPUS = HERE / 'corpus'
SHORT, LONG = 30, 3600          # seconds of fuzzing in scripts/test
HINTS = HERE / 'corpus-hints'
HINTS_SHORT, HINTS_LONG = 10, 600
HINTS_SIZE = 8192
INPUT_LIMIT = 25                # seconds of CPU that one input may take
WALL_LIMIT = 20 * INPUT_LIMIT   # and by the clock, if it waits without end
MEMORY_LIMIT = 1024             # MiB that one input may take
MAX_SIZE = 65536                # bytes of an input
WANTED = 90.0                   # per cent of lines
COVERED = ('format.c', 'format-checksum.c', 'format-journal.c',
           'format-validate.c', 'journal.c', 'bases.c', 'replay.c',
           'ring.c')
WRAPPED = ('qemu_co_sleep_ns_wakeable', 'warn_report')
FUZZER = ('thinvm-fuzz', 'thinvm-fuzz-image', 'thinvm-fuzz-run',
          'thinvm-fuzz-fix', 'thinvm-fuzz-mutate')
# The object's character device and clock are the fuzzer's
HINTS_WRAPPED = ('precopy_clock_ms', 'qemu_chr_find', 'qemu_chr_fe_init',
                 'qemu_chr_fe_deinit', 'qemu_chr_fe_set_handlers',
                 'qemu_chr_fe_write', 'qemu_chr_fe_accept_input')
HINTS_SOURCES = ('heat', 'hint-map', 'hint-parse', 'hints', 'track')
UNIT_TESTS = ('test-thinvm-format', 'test-thinvm-format-journal',
              'test-thinvm-format-pages', 'test-thinvm-store',
              'test-thinvm-follow', 'test-thinvm-crash')
SANITIZE = 'address,undefined'
# QEMU does arithmetic on pointers and shifts that are no errors for it
NO_SANITIZE = ('alignment', 'function', 'shift')
CLANG_FLAGS = ('-Wno-unknown-warning-option', '-Wno-typedef-redefinition',
               '-Wno-initializer-overrides')


class BuildError(Exception):
    pass


def listed(name, where):
    """Files of directory @where in list @name of the unit tests' table, and
    in the list that it begins with."""
    text = (CHECKOUT / 'tests/unit/thinvm/meson.build').read_text(
        encoding='utf-8')
    base, files = re.search(rf'^{name} = (?:(\w+) \+ )?\[(.*?)^\]', text,
                            re.MULTILINE | re.DOTALL).groups()
    return ((listed(base, where) if base else []) +
            re.findall(rf"{where} / '(\S+\.c)'", files))


def engine_sources():
    """Engine and durability layers, as the unit tests list them."""
    return [CHECKOUT / 'block/thinvm' / name
            for name in listed('thinvm_durability', 'thinvm_dir')]


def test_sources(name):
    """A unit test and what it is made of beside the engine."""
    unit = CHECKOUT / 'tests/unit'
    helpers = listed('thinvm_crash' if 'crash' in name else 'thinvm_store',
                     'thinvm_unit')
    return [unit / f'{name}.c', *(unit / h for h in helpers)]


def find_clang():
    """clang and the llvm tools of the same version, or None."""
    clang = shutil.which('clang')
    if not clang:
        return None
    where = subprocess.run([clang, '-print-prog-name=llvm-cov'], text=True,
                           capture_output=True, check=False).stdout.strip()
    tools = Path(where).parent if os.path.isabs(where) else None
    return clang, tools


class Program:
    """Objects of one kind, and programs of them."""

    def __init__(self, build, kind, compiler, flags):
        self.qemu = build / 'qemu'
        self.dir = build / 'fuzz' / kind
        self.dir.mkdir(parents=True, exist_ok=True)
        self.compiler, self.flags = compiler, flags
        self.qemu_flags, self.link_flags = self._from_qemu()

    def _from_qemu(self):
        """What QEMU's build compiles and links a unit test with."""
        try:
            commands = json.loads((self.qemu / 'compile_commands.json')
                                  .read_text(encoding='utf-8'))
            ninja = (self.qemu / 'build.ninja').read_text(encoding='utf-8')
        except OSError as e:
            raise BuildError(f'QEMU is not built: {e}') from e
        command = next(c for c in commands if c['file'].endswith(
            'tests/unit/test-thinvm-store.c'))
        words = shlex.split(command['command'])
        flags = []
        for i, word in enumerate(words):
            if word.startswith(('-I', '-D', '-iquote', '-isystem', '-std')):
                flags.append(word)
                if word in ('-I', '-D', '-iquote', '-isystem'):
                    flags.append(words[i + 1])
        rule = ninja[ninja.index('build tests/unit/test-thinvm-store: '):]
        link = re.search(r'^ LINK_ARGS = (.*)$', rule, re.MULTILINE).group(1)
        objects = re.findall(r'lib(?:event-loop-base|qom)\.a\.p/\S+\.o',
                             rule.split('\n', 1)[0])
        return flags, objects + shlex.split(link)

    def _object(self, source):
        target = self.dir / (source.stem + '.o')
        deps = target.with_suffix('.d')
        if target.exists() and deps.exists():
            words = deps.read_text(encoding='utf-8').replace('\\\n', ' ')
            newest = max((self._mtime(w) for w in words.split()[1:]),
                         default=float('inf'))
            if newest < target.stat().st_mtime:
                return target
        command = [self.compiler, *self.flags, '-iquote', str(CHECKOUT),
                   *self.qemu_flags, '-g',
                   '-fno-strict-aliasing', '-fwrapv', '-fno-common', '-Wall',
                   '-Wno-unused-function',
                   f'-I{CHECKOUT}/tests/unit', f'-I{HERE}',
                   '-MD', '-MF', str(deps), '-c', str(source), '-o',
                   str(target)]
        self._run(command)
        return target

    def _mtime(self, name):
        try:
            return (self.qemu / name).stat().st_mtime
        except OSError:
            return float('inf')

    def _run(self, command):
        done = subprocess.run(command, cwd=self.qemu, text=True, check=False,
                              stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT)
        if done.returncode:
            raise BuildError(f'{shlex.join(command)}\n{done.stdout}')

    def link(self, name, sources, wrapped=(), flags=(), libraries=()):
        program = self.dir / name
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(self._object, sources))
        wraps = [f'-Wl,--wrap={w}' for w in wrapped]
        # clang calls libatomic for words in packed structures
        self._run([self.compiler, *self.flags, *flags, '-o', str(program),
                   *map(str, objects), *wraps, *libraries, *self.link_flags,
                   '-latomic'])
        return program


def qemu_sources(build):
    """The coroutines too, so that ASan learns of changes of stack."""
    return [build / 'qemu-src/util/coroutine-ucontext.c',
            build / 'qemu-src/block/aio_task.c']


def fuzz_sources(build, *more):
    return [*(HERE / f'{n}.c' for n in (*FUZZER, *more)), *engine_sources(),
            *qemu_sources(build)]


def sanitized(compiler, sanitize):
    flags = ['-O1', f'-fsanitize={sanitize}', '-fno-omit-frame-pointer',
             '-fno-sanitize-recover=all', '-DQEMU_SANITIZE_ADDRESS=1']
    no = NO_SANITIZE
    if 'clang' in os.path.basename(compiler):
        flags += CLANG_FLAGS
    else:
        no = [n for n in no if n != 'function']
    return flags + [f'-fno-sanitize={n}' for n in no]


def build_main(build):
    """The program that runs inputs, by the compiler of QEMU's build."""
    cc = shutil.which('gcc') or shutil.which('cc')
    return Program(build, 'main', cc, sanitized(cc, SANITIZE)).link(
        'thinvm-fuzz-main', fuzz_sources(build, 'thinvm-fuzz-main'),
        (*WRAPPED, 'qemu_uuid_generate'))


def build_fuzzer(build, clang):
    return Program(build, 'libfuzzer', clang,
                   sanitized(clang, f'fuzzer-no-link,{SANITIZE}')).link(
        'thinvm-fuzz', fuzz_sources(build), WRAPPED, ['-fsanitize=fuzzer'])


def hints_sources(*more):
    return [*(HERE / f'{n}.c' for n in ('thinvm-fuzz-hints', *more)),
            *(CHECKOUT / f'block/precopy/{n}.c' for n in HINTS_SOURCES)]


def build_hints_main(build):
    cc = shutil.which('gcc') or shutil.which('cc')
    return Program(build, 'hints-main', cc, sanitized(cc, SANITIZE)).link(
        'thinvm-fuzz-hints', hints_sources('thinvm-fuzz-files'),
        HINTS_WRAPPED)


def build_hints_fuzzer(build, clang):
    return Program(build, 'hints-libfuzzer', clang,
                   sanitized(clang, f'fuzzer-no-link,{SANITIZE}')).link(
        'thinvm-fuzz-hints', hints_sources(), HINTS_WRAPPED,
        ['-fsanitize=fuzzer'])


def environment():
    return dict(os.environ,
                ASAN_OPTIONS='detect_stack_use_after_return=0:abort_on_error=0'
                ':malloc_context_size=8:quarantine_size_mb=32'
                f':hard_rss_limit_mb={2 * MEMORY_LIMIT}',
                UBSAN_OPTIONS='print_stacktrace=1',
                THINVM_FUZZ_CPU_SECONDS=str(INPUT_LIMIT))


def inputs():
    return sorted(CORPUS.glob('*.bin'))


# --- The parts --------------------------------------------------------------

def run_corpus(program, log, files):
    """Every input, one process; returns what went wrong, or ''."""
    with open(log, 'w', encoding='utf-8') as f:
        try:
            status = subprocess.run(
                [program, *files], stdin=subprocess.DEVNULL, stdout=f,
                stderr=subprocess.STDOUT, env=environment(), check=False,
                timeout=60 + WALL_LIMIT * len(files)).returncode
        except subprocess.TimeoutExpired:
            status = 'none: it hangs'
    return '' if status == 0 else f'exit status {status}, see {log}'


def run_fuzzer(build, program, seconds, seed, log, corpus=CORPUS,
               size=MAX_SIZE):
    """libFuzzer; returns (what went wrong or '', figures)."""
    found = build / 'fuzz' / corpus.name.replace('corpus', 'found')
    crashes = build / 'fuzz' / 'crashes'
    for d in (found, crashes):
        d.mkdir(exist_ok=True)
    command = [program, f'-max_total_time={seconds}', f'-seed={seed}',
               f'-max_len={size}', f'-timeout={WALL_LIMIT}',
               f'-report_slow_units={WALL_LIMIT}',
               f'-rss_limit_mb={MEMORY_LIMIT}', '-print_final_stats=1',
               '-len_control=0', f'-artifact_prefix={crashes}/', found,
               corpus]
    with open(log, 'w', encoding='utf-8') as f:
        with subprocess.Popen([str(w) for w in command], stdout=f,
                              stdin=subprocess.DEVNULL, cwd=build / 'fuzz',
                              stderr=subprocess.STDOUT,
                              env=environment()) as child:
            signal.signal(signal.SIGTERM, lambda *_: child.terminate())
            status = child.wait()
    text = log.read_text(encoding='utf-8', errors='replace')
    executions = re.findall(r'stat::number_of_executed_units: (\d+)', text)
    edges = re.findall(r' cov: (\d+) ', text)
    sums = re.findall(r'checksums of data: (.*)', text)
    figures = (f'{executions[-1] if executions else "?"} executions in '
               f'{seconds} s, {edges[-1] if edges else "?"} edges, seed '
               f'{seed}')
    if sums:
        figures += f', checksums of data {sums[-1]}'
    if status == 0 and executions:
        return '', figures
    return f'exit status {status}, see {log} and {crashes}', figures


def run_coverage(build, clang, tools):
    """[(file, lines, covered)] of the code that has to be covered."""
    program = Program(build, 'coverage', clang,
                      ['-O0', '-fprofile-instr-generate',
                       '-fcoverage-mapping', *CLANG_FLAGS])
    work = program.dir / 'profiles'
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    engine = [*engine_sources(), *qemu_sources(build)]
    programs = [(program.link('thinvm-fuzz-main', [
        *(HERE / f'{n}.c' for n in (*FUZZER, 'thinvm-fuzz-main')), *engine],
        (*WRAPPED, 'qemu_uuid_generate')), [str(p) for p in inputs()])]
    for name in UNIT_TESTS:
        options = ['-p', '/thinvm/crash/cuts', '--cuts', '200'] \
            if 'crash' in name else []
        programs.append((program.link(name, [*test_sources(name), *engine]),
                         options))
    for path, options in programs:
        subprocess.run([path, *options], check=True, cwd=work,
                       stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL,
                       env=dict(os.environ, LLVM_PROFILE_FILE=str(
                           work / f'{path.name}.profraw')))
    merged = work / 'all.profdata'
    subprocess.run([tools / 'llvm-profdata', 'merge', '-sparse', '-o', merged,
                    *work.glob('*.profraw')], check=True)
    objects = [a for path, _ in programs for a in ('-object', path)][1:]
    done = subprocess.run([tools / 'llvm-cov', 'export', '-summary-only',
                           f'-instr-profile={merged}', *objects],
                          check=True, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL)
    files = {}
    for f in json.loads(done.stdout)['data'][0]['files']:
        path = Path(f['filename'])
        if path.parent == CHECKOUT / 'block/thinvm' and path.suffix == '.c':
            lines = f['summary']['lines']
            files[path.name] = (lines['count'], lines['covered'])
    return files


def print_coverage(files):
    """Table of all files; returns the per cent of those that count."""
    for name, (lines, covered) in sorted(files.items()):
        mark = '*' if name in COVERED else ' '
        print(f'# {mark} {name:20} {lines:6} lines, {covered:6} reached '
              f'{100 * covered / lines:6.1f} %')
    names = [n for n in COVERED if n in files]
    lines = sum(files[n][0] for n in names)
    covered = sum(files[n][1] for n in names)
    print(f'# * together: {covered} of {lines} lines, '
          f'{100 * covered / lines:.1f} %', flush=True)
    return 100 * covered / lines


def run_guards(build, sources):
    """Exit status: 1 if tests come by a guard and none fails without it."""
    try:
        survived, idle, number = thinvm_guards.run(
            build, sources, lambda text: print(text, flush=True))
    except thinvm_guards.GuardError as e:
        sys.exit(f'{e}')
    print(f'# {number} guards; without {len(survived)} all tests pass, and '
          f'no test comes by {len(idle)}')
    return 1 if survived else 0


# --- The suite --------------------------------------------------------------

class Suite:
    def __init__(self, args):
        self.args, self.failed = args, False
        self.logs = args.build / 'test-logs' / 'fuzz'
        self.logs.mkdir(parents=True, exist_ok=True)
        self.clang = find_clang()

    def report(self, name, wrong, figures=''):
        self.failed |= bool(wrong)
        detail = wrong.split('\n')[0] or figures
        print(f'{"not ok" if wrong else "ok"} {name} {detail}'.rstrip(),
              flush=True)

    def corpus(self):
        log = self.logs / 'corpus.log'
        self.report('corpus', run_corpus(build_main(self.args.build), log,
                                          inputs()),
                    f'{len(inputs())} inputs')

    def fuzz(self):
        seconds = LONG if self.args.all else SHORT
        self.report('fuzz', *run_fuzzer(
            self.args.build, build_fuzzer(self.args.build, self.clang[0]),
            seconds, self.args.seed, self.logs / 'fuzz.log'))

    def hints(self):
        files = sorted(HINTS.glob('*.bin'))
        wrong = run_corpus(build_hints_main(self.args.build),
                           self.logs / 'hints-corpus.log', files)
        figures = f'{len(files)} inputs'
        if not wrong and self.clang and self.clang[1]:
            wrong, more = run_fuzzer(
                self.args.build,
                build_hints_fuzzer(self.args.build, self.clang[0]),
                HINTS_LONG if self.args.all else HINTS_SHORT, self.args.seed,
                self.logs / 'hints.log', HINTS, HINTS_SIZE)
            figures = f'{figures}, {more}'
        self.report('hints', wrong, figures)

    def coverage(self):
        per_cent = print_coverage(run_coverage(self.args.build, *self.clang))
        wrong = '' if per_cent >= WANTED else \
            f'{per_cent:.1f} % of lines, {WANTED} % are wanted'
        self.report('coverage', wrong, f'{per_cent:.1f} % of lines')

    def tools(self):
        rounds = self.logs / 'tools.rounds'
        log = self.logs / 'tools.log'
        rounds.unlink(missing_ok=True)
        with open(log, 'w', encoding='utf-8') as f:
            status = subprocess.call(
                [sys.executable, CHECKOUT /
                 'tests/qemu-iotests/run-thinvm.py', '--build',
                 self.args.build, '--only', 'thinvm-fuzz', '--time-limit',
                 str(2 * LONG)], stdin=subprocess.DEVNULL, stdout=f,
                stderr=subprocess.STDOUT,
                env=dict(os.environ, THINVM_SECONDS=str(LONG),
                         THINVM_SEED=str(1000 * self.args.seed),
                         THINVM_FUZZ_ROUNDS=str(rounds)))
        figures = f'{rounds.read_text().strip()} images in {LONG} s' \
            if rounds.exists() else ''
        self.report('tools', f'see {log}' if status else '', figures)

    def run(self):
        tests = {'corpus': True, 'fuzz': True, 'hints': True,
                 'coverage': self.args.all, 'tools': self.args.all}
        if self.args.only:
            if self.args.only not in tests:
                return 2
            tests = {self.args.only: True}
        for name, wanted in tests.items():
            if not wanted:
                print(f'skip {name} takes long: --all')
            elif name in ('fuzz', 'coverage') and \
                    not (self.clang and self.clang[1]):
                print(f'skip {name} needs clang and llvm: '
                      'apt install clang llvm')
            else:
                try:
                    getattr(self, name)()
                except (BuildError, subprocess.CalledProcessError) as e:
                    (self.logs / f'{name}.build.log').write_text(str(e))
                    self.report(name, 'does not build or run, see '
                                f'{self.logs}/{name}.build.log')
        return 1 if self.failed else 0


def main():
    p = argparse.ArgumentParser(description="thinvm's fuzzer")
    p.add_argument('--build', type=Path, default=CHECKOUT / 'build')
    p.add_argument('--all', action='store_true')
    p.add_argument('--only', default='', metavar='NAME')
    p.add_argument('--seed', type=int, default=1)
    p.add_argument('--fuzz', type=int, metavar='SECONDS')
    p.add_argument('--coverage', action='store_true')
    p.add_argument('--guards', nargs='*', metavar='SOURCE')
    p.add_argument('--seeds', action='store_true')
    p.add_argument('--replay', nargs='+', metavar='FILE')
    args = p.parse_args()
    args.build = args.build.resolve()
    suite = Suite(args)
    if args.seeds:
        CORPUS.mkdir(exist_ok=True)
        return subprocess.call([build_main(args.build), '--seeds', CORPUS],
                               env=environment())
    if args.guards is not None:
        return run_guards(args.build, args.guards)
    if args.replay:
        return subprocess.call([build_main(args.build), *args.replay],
                               env=dict(environment(),
                                        THINVM_FUZZ_VERBOSE='1'))
    if (args.fuzz or args.coverage) and not (suite.clang and suite.clang[1]):
        sys.exit('clang and llvm are needed: apt install clang llvm')
    if args.fuzz:
        wrong, figures = run_fuzzer(
            args.build, build_fuzzer(args.build, suite.clang[0]), args.fuzz,
            args.seed, suite.logs / 'fuzz.log')
        print(wrong or figures)
        return 1 if wrong else 0
    if args.coverage:
        return 0 if print_coverage(run_coverage(args.build, *suite.clang)) \
            >= WANTED else 1
    return suite.run()


if __name__ == '__main__':
    try:
        sys.exit(main())
    except BuildError as e:
        sys.exit(f'{e}')
