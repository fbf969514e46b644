#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
#
# "meson setup" where it is needed and "meson compile", for scripts that
# want programs and not compiler output: the output goes to a log, and a
# line now and then tells how far it is.
#
#   build.py [DIR]        (default: build)

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent.parent
EVERY = 20              # seconds between two lines of progress
START = time.monotonic()


class BuildFailed(Exception):
    """The build failed; the message has the end of its log."""


def say(text):
    print(f'[{time.monotonic() - START:5.0f} s] {text}', flush=True)


def _logged(command, log, what):
    with open(log, 'ab') as out:
        p = subprocess.Popen(command, cwd=CHECKOUT, stdout=out,
                             stderr=subprocess.STDOUT,
                             stdin=subprocess.DEVNULL)
        shown = time.monotonic()
        while True:
            try:
                rc = p.wait(1)
                break
            except subprocess.TimeoutExpired:
                pass
            if time.monotonic() - shown >= EVERY:
                shown = time.monotonic()
                say(f'{what} {_progress(log)}')
    if rc:
        tail = log.read_text(encoding='utf-8', errors='replace')
        raise BuildFailed('\n'.join(tail.splitlines()[-30:]) +
                          f'\nerror: {what} failed, all of it: {log}')


def _progress(log):
    """Ninja's newest [done/all] in the log, if there is one."""
    with open(log, 'rb') as f:
        f.seek(0, 2)
        f.seek(max(0, f.tell() - 20000))
        steps = re.findall(rb'^\[(\d+/\d+)\]', f.read(), re.M)
    return steps[-1].decode() if steps else '…'


def build(directory):
    """Make directory hold an up-to-date build."""
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / 'build.log'
    log.write_bytes(b'')
    meson = '/usr/bin/meson'
    if not (directory / 'build.ninja').exists():
        say(f'configuring {directory}')
        _logged([meson, 'setup', str(directory), str(CHECKOUT)], log,
                'configuring')
    say(f'building {directory}')
    _logged([meson, 'compile', '-C', str(directory)], log, 'building')
    say('built')


def main():
    p = argparse.ArgumentParser(description='Configure and build thinvm.')
    p.add_argument('directory', nargs='?', type=Path,
                   default=CHECKOUT / 'build')
    args = p.parse_args()
    try:
        build(args.directory.resolve())
    except (BuildFailed, OSError) as e:
        print(e, file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
