# SPDX-License-Identifier: GPL-2.0-or-later
#
# The template of bench-boot: Debian's minimal root file system with systemd,
# made by debootstrap (root, and a Debian archive), and the initramfs that
# brings a guest from the kernel to it.
#
# A guest prints STORM-BOOTED when its services are up, and if its command
# line says storm.verify=1, STORM-DIGEST and one digest of all of its files.
# The host computes the same from the files that the template was made of.

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from lib.guest import MODULES, cpio_entry, find_kernel, kernel_module

HERE = Path(__file__).resolve().parent
PACKAGES = 'systemd-sysv,dbus,udev,python3-minimal,openssh-server'
SUITE = 'bookworm'
# By guests that boot with storm=quick: as in boot-init.c
QUICKLY_VERIFIED = ('/usr/bin', '/usr/sbin')
VERIFIED = ('/usr/bin', '/usr/sbin', '/usr/lib', '/usr/share')

UNIT = '''[Unit]
Description=Tells the host that the boot is over
After=multi-user.target
[Service]
Type=idle
ExecStart=/usr/local/sbin/storm
StandardOutput=tty
TTYPath=/dev/ttyS0
[Install]
WantedBy=multi-user.target
'''

SCRIPT = '''#!/bin/sh
python3 -c 'import json, socket, hashlib, subprocess'
echo STORM-BOOTED
grep -q storm.verify=1 /proc/cmdline || exit 0
sleep 5 # in which the host takes note of what was read until here
find %s -xdev -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum |
    sha256sum | sed 's/^/STORM-DIGEST /; s/ *-$//'
''' % ' '.join(VERIFIED)


class TemplateError(Exception):
    """There is no template; the message says why."""


def run(*argv, **options):
    done = subprocess.run([str(a) for a in argv], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          check=False, **options)
    if done.returncode:
        tail = done.stdout.decode(errors='replace').strip().splitlines()[-3:]
        raise TemplateError(f'{argv[0]} ended with {done.returncode}: '
                            + ' | '.join(tail))


def make_root(directory):
    """The files of the template below directory/root, unless they are."""
    root = directory / 'root'
    if (directory / 'complete').exists():
        return root
    if os.getuid() or not shutil.which('debootstrap'):
        raise TemplateError('a root file system can only be made by root, '
                            'with debootstrap (apt install debootstrap)')
    shutil.rmtree(root, ignore_errors=True)
    run('debootstrap', '--variant=minbase', '--include=' + PACKAGES, SUITE,
        root)
    customise(root)
    (directory / 'complete').touch()
    return root


def customise(root):
    """The service that tells the host."""
    (root / 'etc/systemd/system/storm.service').write_text(UNIT)
    wants = root / 'etc/systemd/system/multi-user.target.wants'
    wants.mkdir(exist_ok=True)
    (wants / 'storm.service').symlink_to('/etc/systemd/system/storm.service')
    # A getty that begins would hang up on what the service says
    (root / 'etc/systemd/system/serial-getty@ttyS0.service').symlink_to(
        '/dev/null')
    script = root / 'usr/local/sbin/storm'
    script.write_text(SCRIPT)
    script.chmod(0o755)


def make_image(directory, size):
    """An ext4 image of it, raw."""
    image = directory / 'template.raw'
    root = make_root(directory)
    if not image.exists() or image.stat().st_size != size:
        with open(image, 'wb') as file:
            file.truncate(size)
        run('mke2fs', '-q', '-F', '-t', 'ext4', '-d', root, image)
    return image


def digest(root, tops=VERIFIED):
    """What a guest must print behind STORM-DIGEST."""
    names = []
    for top in tops:
        for where, _, files in os.walk(str(root) + top):
            names += [os.path.join(where, name) for name in files]
    total = hashlib.sha256()
    for name in sorted(os.fsencode(n[len(str(root)):]) for n in names):
        path = os.fsencode(str(root)) + name
        if os.path.islink(path):
            continue
        with open(path, 'rb') as file:
            one = hashlib.file_digest(file, 'sha256').hexdigest()
        # As sha256sum writes names with a backslash (systemd has some)
        escape = b'\\' if b'\\' in name else b''
        total.update(escape + one.encode() + b'  ' +
                     name.replace(b'\\', b'\\\\') + b'\n')
    return total.hexdigest()


def boot_files(directory):
    """(kernel, initramfs) of the guests."""
    vmlinuz, modules = find_kernel()
    program = directory / 'init'
    run('gcc', '-O2', '-Wall', '-static', '-s', '-o', program,
        HERE / 'boot-init.c')
    members = [cpio_entry('init', 0o100755, program.read_bytes())]
    members += [cpio_entry(name, 0o40755)
                for name in ('dev', 'disk', 'modules')]
    members.append(cpio_entry('dev/console', 0o20600, rdev=(5, 1)))
    for number, name in enumerate(MODULES):
        data = kernel_module(modules, name)
        if data:
            members.append(cpio_entry(f'modules/{number:02}-{name}',
                                      0o100644, data))
    members.append(cpio_entry('TRAILER!!!', 0))
    (directory / 'initrd').write_bytes(b''.join(members))
    return vmlinuz, str(directory / 'initrd')
