# SPDX-License-Identifier: GPL-2.0-or-later
"""What surrounds one functional test: paths, processes, clean-up, limits.

A Context is made for each test.  It owns one temporary directory, and every
process, socket and file of the test is registered with it at the moment it
is created, so that nothing stays behind however the test ends.  It ends only
processes that it started itself, by their process objects.

The directory lies under /var/tmp (or $TMPDIR) and not below the build: the
paths of sockets must stay short, O_DIRECT must work there, and the test of
an unprivileged QEMU must reach it.  Logs are copied to the log directory.
"""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

TOP = os.path.abspath(os.path.join(os.path.dirname(__file__), '..', '..', '..'))
PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


class Skip(Exception):
    """This test cannot run here; the text says why."""


class Failure(Exception):
    """What was tested does not hold; the text names thing and value."""


def check(condition, text, *args):
    """Fail the test with @text unless @condition holds."""
    if not condition:
        raise Failure(text % args if args else text)


def wait_for(condition, seconds, text, interval=0.05):
    """Poll @condition until it is true; its value is returned."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise Failure('after %d s still not: %s' % (seconds, text))
        time.sleep(interval)


def free_port():
    """A TCP port of the loopback that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        return sock.getsockname()[1]


def _die_with_parent():
    """In the child, after it has become another user if it is to be one."""
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Process:
    """A program that the test started, with its output in a log file."""

    def __init__(self, ctx, name, argv, env=None, user=None, group=None):
        self.ctx = ctx
        self.name = name
        self.argv = argv
        self.log_path = ctx.log_file(name)
        with open(self.log_path, 'ab') as log:
            log.write(('+ %s\n' % ' '.join(argv)).encode())
            log.flush()
            self.popen = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=env, user=user, group=group,
                extra_groups=[] if user is not None else None,
                preexec_fn=_die_with_parent)
        ctx.cleanup(self.kill)

    def log_tail(self, count=6):
        """The last lines the program printed, for messages."""
        with open(self.log_path, errors='replace') as log:
            lines = [line.strip() for line in log if line[:2] != '+ ']
        return ' | '.join(lines[-count:]) or '(no output)'

    def alive(self):
        return self.popen.poll() is None

    def gone_soon(self, seconds=5):
        """Is it dead, or dying?  Another thread may be waiting for it, and
        as long as it does, the process looks alive to this one."""
        end = time.monotonic() + seconds
        while self.alive():
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True

    def check_alive(self):
        check(self.alive(), '%s ended with %s: %s', self.name,
              self.popen.poll(), self.log_tail())

    def kill(self):
        """kill -9, as a host crash would; waits for the end."""
        if self.alive():
            self.popen.send_signal(signal.SIGKILL)
        self.popen.wait()

    def terminate(self, seconds=30):
        if self.alive():
            self.popen.terminate()
        return self.wait(seconds)

    def wait(self, seconds=60):
        """The exit status; a program that goes on too long is a failure."""
        try:
            return self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise Failure('%s did not end in %d s: %s'
                          % (self.name, seconds, self.log_tail())) from None


class Context:
    """One test's surroundings; use as a context manager."""

    def __init__(self, name, fmt='thinvm', build=None, log_dir=None,
                 verbose=False):
        self.name = name
        self.fmt = fmt
        self.build = os.path.abspath(build or os.path.join(TOP, 'build'))
        self.log_dir = log_dir or os.path.join(self.build, 'functional', name)
        self.verbose = verbose
        self._cleanups = []
        self._names = {}
        self.dir = None

    def __enter__(self):
        shutil.rmtree(self.log_dir, ignore_errors=True)
        os.makedirs(self.log_dir, exist_ok=True)
        base = os.environ.get('TMPDIR') or '/var/tmp'
        self.dir = tempfile.mkdtemp(prefix='thinvm-', dir=base)
        self.cleanup(shutil.rmtree, self.dir, ignore_errors=True)
        return self

    def __exit__(self, *exc):
        for func, args, kwargs in reversed(self._cleanups):
            self.log('clean-up: %s' % getattr(func, '__qualname__', func))
            try:
                func(*args, **kwargs)
            except Exception as err:      # the next ones must still run
                self.log('clean-up: %r' % err)
        self._cleanups = []
        return False

    def cleanup(self, func, *args, **kwargs):
        """Call func at the end of the test, whatever happens."""
        self._cleanups.append((func, args, kwargs))

    def log(self, text):
        """A line in the test's own log (and on stderr with --verbose)."""
        line = '%.3f %s' % (time.monotonic(), text)
        with open(os.path.join(self.log_dir, 'test.log'), 'a') as log:
            log.write(line + '\n')
        if self.verbose:
            print(line, file=sys.stderr, flush=True)

    def unique(self, name):
        """@name, or @name-2 … if it was asked for before."""
        self._names[name] = self._names.get(name, 0) + 1
        number = self._names[name]
        return name if number == 1 else '%s-%d' % (name, number)

    def path(self, name):
        return os.path.join(self.dir, name)

    def log_file(self, name):
        """A file in the log directory that any user may write."""
        path = os.path.join(self.log_dir, name + '.log')
        with open(path, 'ab'):
            pass
        os.chmod(path, 0o666)
        return path

    def bin(self, name):
        """A program that we built."""
        override = os.environ.get('THINVM_BIN')
        path = os.path.join(override or os.path.join(self.build, 'bin'), name)
        if not os.path.exists(path):
            raise Failure('%s is not built: run "meson compile -C build"'
                          % path)
        return path

    def need(self, program, package):
        """The path of a program of the system, or skip the test."""
        path = shutil.which(program, path=os.environ.get('PATH', '')
                            + ':/usr/sbin:/sbin')
        if not path:
            raise Skip('needs %s (package %s)' % (program, package))
        return path

    def run(self, *argv, ok=(0,), seconds=120):
        """Run a program to its end; its output, logged."""
        self.log('+ ' + ' '.join(argv))
        try:
            done = subprocess.run(argv, stdin=subprocess.DEVNULL,
                                  stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, timeout=seconds,
                                  check=False)
        except subprocess.TimeoutExpired:
            raise Failure('%s took more than %d s'
                          % (' '.join(argv[:4]), seconds)) from None
        text = done.stdout.decode(errors='replace')
        self.log('= %d\n%s' % (done.returncode, text[-4000:]))
        if ok is not None and done.returncode not in ok:
            raise Failure('%s ended with %d: %s'
                          % (' '.join(argv), done.returncode,
                             ' | '.join(text.strip().splitlines()[-4:])))
        return text
