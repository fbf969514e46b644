#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Builds QEMU with thinvm in it, below the build directory of the top
# meson.build, which calls this:
#
#   BUILD/qemu-src   the source tree that overlay.py makes
#   BUILD/qemu       QEMU's own build directory
#   BUILD/bin        links to the programs that users run
#
#   qemubuild.py configure BUILD [options]    overlay, then QEMU's configure
#   qemubuild.py compile BUILD [options]      overlay, then ninja
#
# Builds of one directory wait for each other.

import argparse
import contextlib
import fcntl
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import insertions
import overlay

CHECKOUT = insertions.CHECKOUT
DEFAULT_SOURCE = CHECKOUT / 'deps' / 'qemu'

PROGRAMS = {
    'qemu-system-x86_64': 'qemu-system-x86_64',
    'qemu-img': 'qemu-img',
    'qemu-io': 'qemu-io',
    'qemu-nbd': 'qemu-nbd',
    'qemu-pr-helper': 'qemu-pr-helper',
    'qemu-storage-daemon': 'storage-daemon/qemu-storage-daemon',
    'thinvm-template': 'block/template/thinvm-template',
}

# Where Debian's packages put firmware; QEMU looks in these in order.
FIRMWARE = ('/usr/share/qemu', '/usr/share/seabios', '/usr/lib/ipxe/qemu')

# What is built is stated here, never found out from what happens to be
# installed: the same checkout gives the same programs everywhere.
FEATURES = '''
    system tools kvm tcg coroutine-pool malloc-trim
    linux-aio linux-io-uring libiscsi
    fuse fuse-lseek vhost-user vhost-user-blk-server vhost-kernel vhost-net
    seccomp cap-ng attr gnutls zstd bzip2 membarrier
    pixman vnc png slirp numa
    bochs cloop dmg parallels qcow1 qed vdi vhdx vmdk vpc vvfat replication
    avx2
'''.split()


class BuildError(Exception):
    """The build cannot go on; the message says why."""


def environment(build):
    """
    /usr/bin first, so that QEMU's scripts find the system's python3 and
    meson; and ccache results that do not depend on the directory.
    """
    env = dict(os.environ)
    env['PATH'] = '/usr/bin:/bin:' + env.get('PATH', '')
    env.setdefault('CCACHE_BASEDIR', str(build))
    env.setdefault('CCACHE_NOHASHDIR', '1')
    return env


def configure_args(opts):
    cc = 'ccache gcc' if shutil.which('ccache') else 'gcc'
    args = [
        '--target-list=x86_64-softmmu', '--python=/usr/bin/python3',
        f'--cc={cc}', '--disable-download', '--without-default-features',
        '--disable-docs', '--disable-user', '--disable-install-blobs',
        '--enable-fdt=system', '--audio-drv-list=',
        '--firmwarepath=' + ':'.join(FIRMWARE),
        '--with-pkgversion=thinvm 1.0',
    ]
    args += [f'--enable-{f}' for f in FEATURES]
    args.append('--enable-werror' if opts.werror else '--disable-werror')
    args.append('--enable-debug-info' if opts.debug_info
                else '--disable-debug-info')
    if opts.sanitizers:
        args += ['--enable-asan', '--enable-ubsan']
    return args


@contextlib.contextmanager
def build_lock(build):
    """Builds of one directory wait for each other."""
    with open(build / '.thinvm-build.lock', 'w', encoding='utf-8') as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print('waiting for another build of this directory', flush=True)
            fcntl.flock(f, fcntl.LOCK_EX)
        yield


def configure(build, opts):
    """
    Run QEMU's configure, in an empty directory, unless that was done with
    the same arguments for the same source.
    """
    inner = build / 'qemu'
    args = configure_args(opts)
    version = overlay.describe(opts.source)
    record = inner / '.thinvm-configured'
    wanted = '\n'.join([f'{opts.source.resolve()} {version}', *args, ''])
    with contextlib.suppress(OSError):
        if record.read_text(encoding='utf-8') == wanted and \
                (inner / 'build.ninja').exists():
            return
    print(f'configuring QEMU {version}', flush=True)
    shutil.rmtree(inner, ignore_errors=True)
    inner.mkdir(parents=True)
    log = build / 'qemu-configure.log'
    with open(log, 'w', encoding='utf-8') as f:
        command = ['../qemu-src/configure', *args]
        f.write(shlex.join(command) + '\n')
        f.flush()
        rc = subprocess.call(command, cwd=inner, env=environment(build),
                             stdin=subprocess.DEVNULL, stdout=f,
                             stderr=subprocess.STDOUT)
    if rc:
        tail = log.read_text(encoding='utf-8', errors='replace')
        print('\n'.join(tail.splitlines()[-15:]), file=sys.stderr)
        raise BuildError(f"QEMU's configure failed (all of it: {log}). If a "
                         'dependency is missing, run scripts/setup.')
    record.write_text(wanted, encoding='utf-8')


# Programs of scripts/bench
BENCHES = ('bench-thinvm-queues',)


def unit_tests():
    """
    Thinvm's unit tests that are in the table of QEMU's build.  One that is
    not fails when the tests are run.
    """
    directory = CHECKOUT / 'tests' / 'unit'
    table = (directory / 'thinvm' / 'meson.build').read_text(encoding='utf-8')
    return sorted(p.stem for p in directory.glob('test-thinvm-*.c')
                  if f"'{p.stem}'" in table)


def link(target, path):
    """Make path a link to target, leaving a right one alone."""
    with contextlib.suppress(OSError):
        if os.readlink(path) == str(target):
            return
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink() or path.exists():
        path.unlink()
    path.symlink_to(target)


def compile_qemu(build, opts):
    inner = build / 'qemu'
    targets = list(PROGRAMS.values())
    targets += [f'tests/unit/{t}' for t in unit_tests()]
    targets += [f'tests/unit/thinvm/{b}' for b in BENCHES]
    command = ['ninja', '-C', str(inner)]
    if opts.jobs:
        command += ['-j', str(opts.jobs)]
    rc = subprocess.call(command + targets, env=environment(build))
    if rc:
        raise BuildError('compiling QEMU failed, see above')
    for name, path in PROGRAMS.items():
        link(os.path.join('..', 'qemu', path), build / 'bin' / name)
    # A program that runs from the build directory looks for its data
    # below qemu-bundle/ there, at the path where it would be installed.
    for directory in FIRMWARE:
        link(directory, inner / 'qemu-bundle' / directory.lstrip('/'))


def parse_args():
    p = argparse.ArgumentParser(description='Build QEMU with thinvm in it.')
    p.add_argument('action', choices=['configure', 'compile'])
    p.add_argument('build', type=Path, help='the build directory')
    p.add_argument('--source', type=Path, default=DEFAULT_SOURCE,
                   help='pristine QEMU source (default: deps/qemu)')
    p.add_argument('--jobs', type=int, default=0,
                   help='compilers at once (default: what ninja chooses)')
    p.add_argument('--werror', action='store_true')
    p.add_argument('--debug-info', action='store_true')
    p.add_argument('--sanitizers', action='store_true')
    p.add_argument('--stamp', type=Path, help='file to touch at the end')
    return p.parse_args()


def main():
    opts = parse_args()
    build = opts.build.resolve()
    build.mkdir(parents=True, exist_ok=True)
    try:
        with build_lock(build):
            overlay.update(CHECKOUT, opts.source, build / 'qemu-src',
                           full=opts.action == 'configure')
            configure(build, opts)
            if opts.action == 'compile':
                compile_qemu(build, opts)
    except (BuildError, overlay.OverlayError,
            insertions.InsertionError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 1
    if opts.stamp:
        opts.stamp.touch()
    return 0


if __name__ == '__main__':
    sys.exit(main())
