# SPDX-License-Identifier: GPL-2.0-or-later
#
# The kernel that the guests of tests and demo run: Debian's cloud kernel
# of trixie, unpacked below deps/guest-kernel/ and never installed, so the
# host gets no boot entry and no initramfs from it.

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from privateapt import AptError, run

META = 'linux-image-cloud-amd64'


@dataclass
class Kernel:
    release: str        # as in uname -r
    vmlinuz: Path
    modules: Path       # .../lib/modules/RELEASE


def find(deps):
    """The unpacked kernel, or None."""
    for vmlinuz in sorted((deps / 'guest-kernel').glob('boot/vmlinuz-*')):
        release = vmlinuz.name.removeprefix('vmlinuz-')
        for lib in ('usr/lib', 'lib'):
            modules = deps / 'guest-kernel' / lib / 'modules' / release
            if (modules / 'modules.dep').exists():
                return Kernel(release, vmlinuz, modules)
    return None


def _image_package(apt):
    """The package that holds the image; the meta package names it."""
    for name in apt.depends(META):
        if re.match(r'linux-image-\d', name):
            return name
    raise AptError(f'{META} names no kernel package')


def get(deps, apt):
    """The unpacked kernel, fetched if it is not there yet."""
    kernel = find(deps)
    if kernel:
        return kernel
    package = apt.download(_image_package(apt), deps / 'packages')
    work = deps / 'guest-kernel.new'
    shutil.rmtree(work, ignore_errors=True)
    run(['dpkg-deb', '-x', str(package), str(work)],
        f'unpacking {package.name}')
    for lib in ('usr/lib', 'lib'):
        for modules in work.glob(f'{lib}/modules/*'):
            # The package leaves modules.dep to its installation.
            base = work / 'usr' if lib == 'usr/lib' else work
            subprocess.run(['/sbin/depmod', '-b', str(base), modules.name],
                           check=True)
    shutil.rmtree(deps / 'guest-kernel', ignore_errors=True)
    work.rename(deps / 'guest-kernel')
    package.unlink()
    kernel = find(deps)
    if not kernel:
        raise AptError(f'{package.name} holds no kernel with modules')
    return kernel
