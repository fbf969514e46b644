# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU processes of this host, as the resource agent keeps them.

A VM's directory has its state file (process, and when that started, so that
a process id that was given to somebody else is not taken for it), its QMP
sockets, and its log is elsewhere.  A process is only ever signalled after it
was recognised.
"""

import contextlib
import json
import os
import signal
import subprocess
import time

from .qmp import Gone, Qmp


class StartError(Exception):
    """QEMU did not start; the text is what it said."""


def _started(pid):
    """When the process started, in clock ticks since boot; None: there is
    none, or only what its parent has yet to bury."""
    try:
        with open(f'/proc/{pid}/stat', encoding='utf-8',
                  errors='replace') as file:
            fields = file.read().rpartition(')')[2].split()
    except OSError:
        return None
    return None if fields[0] in 'ZX' else int(fields[19])


def _boot():
    with open('/proc/sys/kernel/random/boot_id', encoding='ascii') as file:
        return file.read().strip()


def _write_process(path, pid):
    with open(path + '.new', 'w', encoding='utf-8') as file:
        json.dump({'pid': pid, 'started': _started(pid), 'boot': _boot()},
                  file)
    os.rename(path + '.new', path)


def _read_process(path):
    try:
        with open(path, encoding='utf-8') as file:
            return json.load(file)
    except (OSError, ValueError):
        return {}


def _alive(process):
    """The id of a process that was written down, if it is still that one."""
    if process.get('boot') != _boot():
        return None
    pid = process.get('pid')
    started = _started(pid)
    return pid if started is not None and started == process['started'] \
        else None


def wait_until(condition, seconds, interval=0.2):
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(interval)
    return True


def last_lines(path, since, count=4):
    """What was written to the log from offset @since on, at its end."""
    try:
        with open(path, 'rb') as log:
            log.seek(since)
            text = log.read().decode(errors='replace')
    except OSError:
        return ''
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return ' | '.join(lines[-count:])


class VMProcess:
    """The QEMU of a VM, whether it runs or not."""

    def __init__(self, name, directory, log):
        self.name = name
        self.log = log
        self._directory = directory
        self._state_file = os.path.join(directory, name + '.state')
        self._sender_file = os.path.join(directory, name + '.sender')
        self.qmp_path = os.path.join(directory, name + '.qmp')
        self.sender_path = os.path.join(directory, name + '.migrate.qmp')
        self._log_start = 0

    def started_here(self):
        """Was it started on this host, and not stopped since then?"""
        return _read_process(self._state_file).get('boot') == _boot()

    def pid(self):
        """Its process id; None if it does not run."""
        return _alive(_read_process(self._state_file))

    def note_sender(self, pid):
        """The process that brings the guest to another host."""
        _write_process(self._sender_file, pid)

    def end_sender(self):
        pid = _alive(_read_process(self._sender_file))
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._sender_file)

    def connect(self, seconds):
        """A QMP connection, or Gone."""
        return Qmp(self.qmp_path, seconds)

    def spawn(self, argv):
        """Start QEMU; it outlives us and has a session of its own."""
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        for path in (self.qmp_path, self.sender_path):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        argv = [*argv, '-qmp', f'unix:{self.qmp_path},server=on,wait=off',
                '-qmp', f'unix:{self.sender_path},server=on,wait=off']
        os.makedirs(os.path.dirname(self.log), exist_ok=True)
        with open(self.log, 'ab') as log:
            self._log_start = log.tell()
            log.write(('%s starting: %s\n' % (
                time.strftime('%F %T'), ' '.join(argv))).encode())
            log.flush()
            self._log_start = log.tell()
            try:
                process = subprocess.Popen(
                    argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    start_new_session=True, cwd='/')
            except OSError as e:
                raise StartError(f'{argv[0]}: {e.strerror}') from None
        _write_process(self._state_file, process.pid)
        return process

    def wait_qmp(self, process, until):
        """A connection to the QEMU that was just spawned, which answers as
        soon as its disks are open."""
        while time.monotonic() < until:
            if process.poll() is not None:
                raise StartError(self.said() or
                                 f'it ended with {process.returncode}')
            try:
                return self.connect(max(until - time.monotonic(), 1))
            except Gone:
                time.sleep(0.2)
        raise StartError('it does not answer in time')

    def said(self):
        return last_lines(self.log, self._log_start)

    def kill(self, seconds=60):
        """kill -9; whether it has ended."""
        pid = self.pid()
        if pid is None:
            return True
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return self.wait_end(seconds)

    def wait_end(self, seconds):
        return wait_until(lambda: self.pid() is None, seconds)

    def forget(self):
        """It has ended, and that is as it should be."""
        for path in (self._state_file, self.qmp_path, self.sender_path):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


class BareQemu:
    """A QEMU without a guest that opens disks; use as a context manager.

    It is stopped at the end, cleanly if it still answers.
    """

    def __init__(self, qemu, arguments, directory, seconds):
        os.makedirs(directory, mode=0o700, exist_ok=True)
        self._path = os.path.join(directory, 'look-%d.qmp' % os.getpid())
        self._until = time.monotonic() + seconds
        self._seconds = seconds
        self._argv = [qemu, '-machine', 'none', '-nodefaults',
                      '-no-user-config', '-display', 'none', '-S', '-qmp',
                      f'unix:{self._path},server=on,wait=off', *arguments]
        self._process = self.qmp = None

    def __enter__(self):
        try:
            self._process = subprocess.Popen(
                self._argv, stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        except OSError as e:
            raise StartError(f'{self._argv[0]}: {e.strerror}') from None
        try:
            self._connect()
        except BaseException:
            self._end()
            raise
        return self.qmp

    def _connect(self):
        while self.qmp is None:
            if self._process.poll() is not None:
                text = self._process.stderr.read().decode(errors='replace')
                raise StartError(' | '.join(text.strip().splitlines()[-4:]))
            if time.monotonic() > self._until:
                raise StartError('the disks cannot be opened in '
                                 f'{self._seconds:.0f} s')
            try:
                self.qmp = Qmp(self._path, self._seconds)
            except Gone:
                time.sleep(0.1)

    def _end(self):
        if self.qmp:
            with contextlib.suppress(Exception):
                self.qmp.cmd('quit', seconds=10)
            self.qmp.close()
        try:
            self._process.wait(20 if self.qmp else 0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stderr.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)

    def __exit__(self, *exc):
        self._end()
        return False
