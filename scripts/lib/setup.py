#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
#
# scripts/setup: gets everything that building and testing thinvm needs, on
# Debian 12 and 13, unattended:
#
#   - packages, by the machine's apt (as root, or with sudo);
#   - meson 1.5 or later, where the release has an older one;
#   - QEMU's source, Debian's package of the 10.0 series, into deps/qemu;
#   - a kernel for the guests of the tests, into deps/guest-kernel.
#
# The last three come from Debian's trixie suite through an apt
# configuration of our own (privateapt.py).  What is there already is
# left alone, so running this again is quick.

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.dont_write_bytecode = True

import guestkernel                      # noqa: E402
from privateapt import AptError, PrivateApt, run    # noqa: E402

CHECKOUT = Path(__file__).resolve().parent.parent.parent
DEPS = CHECKOUT / 'deps'
SERIES = '10.0.'
MESON_NEEDED = (1, 5, 0)

TOOLS = '''
    build-essential bison bzip2 ca-certificates ccache dpkg-dev flex git
    ninja-build patch pkg-config python3 python3-setuptools python3-venv
    xz-utils
'''.split()

LIBRARIES = '''
    libaio-dev libattr1-dev libbz2-dev libcap-ng-dev libfdt-dev
    libfuse3-dev libglib2.0-dev libgnutls28-dev libiscsi-dev libnuma-dev
    libpixman-1-dev libpng-dev libseccomp-dev libslirp-dev liburing-dev
    libzstd-dev zlib1g-dev
'''.split()

# Firmware, and what tests call.
RUN_TIME = '''
    busybox-static dmsetup e2fsprogs fuse3 ipxe-qemu kmod libiscsi-bin
    qemu-system-data seabios tgt xfsprogs
'''.split()


class SetupError(Exception):
    """Setup cannot go on; the message says why and what to do."""


START = time.monotonic()


def say(text):
    print(f'[{time.monotonic() - START:5.0f} s] {text}', flush=True)


def release():
    """The codename of the Debian release that this machine runs."""
    fields = {}
    with open('/etc/os-release', encoding='utf-8') as f:
        for line in f:
            if '=' in line:
                key, value = line.rstrip('\n').split('=', 1)
                fields[key] = value.strip('"')
    if fields.get('ID') != 'debian' or \
            fields.get('VERSION_ID') not in ('12', '13'):
        raise SetupError('this is '
                         f"{fields.get('PRETTY_NAME', 'an unknown system')}: "
                         'setup knows Debian 12 and 13 only')
    return fields['VERSION_CODENAME']


def as_root(command):
    """The command, with sudo in front unless this is root."""
    if os.geteuid() == 0:
        return command
    if not shutil.which('sudo'):
        raise SetupError('packages have to be installed: run this as root, '
                         'or install sudo')
    return ['sudo', *([] if sys.stdin.isatty() else ['-n']), *command]


def missing(packages):
    """Those of the packages that are not installed."""
    p = subprocess.run(['dpkg-query', '-W', '-f',
                        '${Package} ${db:Status-Status}\n', *packages],
                       capture_output=True, text=True, check=False)
    have = {line.split()[0] for line in p.stdout.splitlines()
            if line.endswith(' installed')}
    return [p for p in packages if p not in have]


def apt_install(packages, what):
    """Install packages with the machine's own apt."""
    env = ['env', 'DEBIAN_FRONTEND=noninteractive', 'LC_ALL=C.UTF-8']
    apt = [*env, 'apt-get', '-qq', '-y', '--no-install-recommends',
           '-o', 'DPkg::Lock::Timeout=600', '-o', 'Dpkg::Use-Pty=0',
           '-o', 'Acquire::Retries=3']
    run(as_root([*apt, 'install', *map(str, packages)]), what)


def install_packages(codename):
    wanted = TOOLS + LIBRARIES + RUN_TIME
    if codename != 'bookworm':
        wanted = wanted + ['meson']
    todo = missing(wanted)
    if not todo:
        say('packages: all installed')
        return
    say(f'packages: installing {len(todo)} of {len(wanted)}')
    problem = ''
    try:
        run(as_root(['apt-get', '-qq', 'update']), 'apt-get update')
    except AptError as e:
        # Some other source of this machine may be out of order, which
        # need not matter here.
        problem = str(e)
        say('packages: apt-get update reported a problem, trying anyway')
    try:
        apt_install(todo, 'installing packages')
    except AptError as e:
        raise SetupError(f'{e}\n{problem}\nCheck that "apt-get update" works '
                         'and that the release\'s main component is in '
                         'apt\'s sources, then run this again.') from e


def meson_version():
    try:
        p = subprocess.run(['/usr/bin/meson', '--version'],
                           capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ()
    return tuple(int(n) for n in re.findall(r'\d+', p.stdout)[:3])


def install_meson(apt):
    have = meson_version()
    if have >= MESON_NEEDED:
        say('meson: ' + '.'.join(map(str, have)))
        return
    say(f'meson: installing {apt.candidate("meson")}')
    apt_install([apt.download('meson', DEPS / 'packages')],
                'installing meson')
    if meson_version() < MESON_NEEDED:
        raise SetupError('/usr/bin/meson is still older than 1.5')


def point_to(target):
    """Make deps/qemu a link to a source tree."""
    link = DEPS / 'qemu'
    if link.is_symlink():
        if os.readlink(link) == str(target):
            return
        link.unlink()
    elif link.exists():
        raise SetupError(f'{link} is in the way: remove it')
    link.symlink_to(target)


def qemu_version(tree):
    try:
        return (tree / 'VERSION').read_text(encoding='utf-8').strip()
    except OSError:
        return None


def use_tree(tree):
    """--qemu-source: build from another tree."""
    tree = tree.resolve()
    version = qemu_version(tree)
    if not version or not (tree / 'block.c').exists():
        raise SetupError(f'--qemu-source {tree}: not a QEMU source tree (it '
                         'has no VERSION or no block.c)')
    point_to(tree)
    say(f'QEMU source: {version}, {tree}')


def get_qemu(apt, refresh):
    link = DEPS / 'qemu'
    version = qemu_version(link)
    if version and not refresh:
        say(f'QEMU source: {version}, {link.resolve()}')
        return
    package = apt.candidate('qemu', source=True)
    version = re.sub(r'^\d+:|-[^-]*$', '', package)
    if not version.startswith(SERIES):
        raise SetupError(f'trixie serves QEMU {package}, not {SERIES}x: '
                         'give a source tree with --qemu-source DIR')
    tree = DEPS / f'qemu-{version}'
    if not tree.exists():
        say(f'QEMU source: getting {package}')
        work = DEPS / 'unpack'
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        apt.source('qemu', work)
        (work / tree.name).rename(tree)
        shutil.rmtree(work)
    point_to(tree.name)
    say(f'QEMU source: {qemu_version(tree)}, {tree}')


def give_back(path):
    """Under sudo: what was made here belongs to who called it."""
    uid, gid = os.environ.get('SUDO_UID'), os.environ.get('SUDO_GID')
    if os.geteuid() == 0 and uid and gid and path.exists():
        run(['chown', '-R', '-h', f'{uid}:{gid}', str(path)],
            'giving deps/ to the calling user')


def main():
    p = argparse.ArgumentParser(
        prog='scripts/setup',
        description='Get everything that building and testing thinvm needs.')
    p.add_argument('--qemu-source', type=Path, metavar='DIR',
                   help="build from this QEMU tree, not from Debian's source")
    p.add_argument('--mirror', metavar='URI',
                   help="Debian mirror (default: from the machine's apt)")
    p.add_argument('--refresh', action='store_true',
                   help='get a newer point release of QEMU if there is one')
    args = p.parse_args()
    try:
        codename = release()
        DEPS.mkdir(exist_ok=True)
        apt = PrivateApt(DEPS / 'apt', codename, args.mirror)
        install_packages(codename)
        install_meson(apt)
        if args.qemu_source:
            use_tree(args.qemu_source)
        else:
            get_qemu(apt, args.refresh)
        say(f'guest kernel: {guestkernel.get(DEPS, apt).release}')
        give_back(DEPS)
    except (AptError, SetupError, OSError) as e:
        print(f'setup: error: {e}', file=sys.stderr)
        return 1
    say('done. Next: meson setup build && meson compile -C build')
    return 0


if __name__ == '__main__':
    sys.exit(main())
