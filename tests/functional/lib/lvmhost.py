# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests that stand for the hosts of a cluster with LVM on shared disks.

Each has Debian's lvm2, lvmlockd, sanlock and wdmd, device mapper, a watchdog
that resets it, a Python for scripts/thinvm-extender, and our storage daemon.
The packages are downloaded by the machine's apt and unpacked below the build
directory; nothing is installed.  The hosts share disks, which are files that
several QEMU processes have open as virtio-scsi disks; no network is needed,
since sanlock keeps its leases in the volume group.
"""

import fcntl
import importlib.util
import json
import os
import py_compile
import shutil
import subprocess
import sys
import sysconfig

from .context import TOP, Skip
from .shellguest import Archive, ShellGuest

PACKAGES = ('lvm2', 'lvm2-lockd', 'sanlock')
MODULES = ('virtio_pci', 'virtio_console', 'virtio_scsi', 'sd_mod', 'dm-mod',
           'i6300esb')
INIT = os.path.join(TOP, 'tests', 'functional', 'guest', 'lvmhost.sh')
SCRIPTS = os.path.join(TOP, 'scripts')
# TCG emulates wide vectors slowly, and qemu-io compares what it has read
CPU = 'Nehalem'
# Of Python's library; the rest is small
NOT_NEEDED = {'test', 'tests', 'idlelib', 'lib2to3', 'tkinter', 'ensurepip',
              'turtledemo', 'distutils', 'pydoc_data', 'site-packages',
              'dist-packages', '__pycache__', 'unittest', 'xml', 'dbm',
              'sqlite3', 'curses', 'wsgiref', 'xmlrpc', 'venv', 'msilib',
              'config-%d.%d' % sys.version_info[:2]}

# There is no udev here.  The rest is what the user guide says.
LVMLOCAL = '''local {
    host_id = HOST_ID
}
global {
    use_lvmlockd = %d
}
activation {
    udev_sync = 0
    udev_rules = 0
    verify_udev_operations = 0
    monitoring = 0
}
devices {
    obtain_device_list_from_udev = 0
    external_device_info_source = "none"
}
'''


def _download(where):
    """The packages and what they need that this machine has not."""
    os.makedirs(os.path.join(where, 'partial'))
    done = subprocess.run(
        ['apt-get', '-qq', '-y', '--no-install-recommends', '--download-only',
         '-o', 'Dir::Cache::archives=' + where, '-o', 'Debug::NoLocking=1',
         '-o', 'Acquire::Retries=2', '-o', 'Acquire::http::Timeout=20',
         '-o', 'APT::Sandbox::User=',
         'install', '--reinstall', *PACKAGES],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, check=False)
    found = [os.path.join(where, name) for name in os.listdir(where)
             if name.endswith('.deb')]
    if done.returncode or not found:
        raise Skip('apt cannot download %s: %s' % (
            ', '.join(PACKAGES), done.stdout.decode()[-300:].strip()))
    return found


def packages(ctx):
    """The directory with the packages unpacked, made if it is not there."""
    where = os.path.join(ctx.build, 'functional', 'lvm-packages')
    os.makedirs(os.path.dirname(where), exist_ok=True)
    with open(where + '.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.isdir(where):
            return where
        ctx.need('apt-get', 'apt')
        new = where + '.new'
        shutil.rmtree(new, ignore_errors=True)
        for package in _download(new):
            ctx.run('dpkg-deb', '-x', package, new)
            os.unlink(package)
        os.rename(new, where)
    return where


def _add_packages(archive, tree):
    """All files of the packages but documentation; and their libraries."""
    programs = []
    libraries = [os.path.join(tree, name) for name in (
        'usr/lib/x86_64-linux-gnu', 'lib/x86_64-linux-gnu')]
    for directory, dirs, files in os.walk(tree):
        dirs[:] = [name for name in dirs if name not in (
            'doc', 'man', 'locale', 'systemd', 'udev', 'partial')]
        if directory in libraries:
            continue
        for file in files:
            source = os.path.join(directory, file)
            name = os.path.relpath(source, tree)
            if os.path.islink(source):
                archive.add_link(name, os.readlink(source))
            else:
                archive.add_file(name, source)
                if 'bin/' in name:
                    programs.append(source)
    archive.add_libraries(programs, ':'.join(libraries))


def _compiled(ctx, source):
    """The code of a module of the library, as its cache has it."""
    cached = importlib.util.cache_from_source(source)
    if not os.path.exists(cached):
        cached = ctx.path('module.pyc')
        py_compile.compile(source, cached, doraise=True)
    with open(cached, 'rb') as file:
        return file.read()


def _add_python(ctx, archive):
    """This interpreter, and its library without the sources."""
    library = sysconfig.get_path('stdlib')
    where = 'usr/lib/python%d.%d' % sys.version_info[:2]
    binary = os.path.realpath(sys.executable)
    archive.add_file('usr/bin/python3', binary)
    objects = [binary]
    for directory, dirs, files in os.walk(library):
        dirs[:] = [name for name in dirs if name not in NOT_NEEDED]
        for file in files:
            source = os.path.join(directory, file)
            name = os.path.join(where, os.path.relpath(source, library))
            if file.endswith('.py'):
                archive.add(name + 'c', _compiled(ctx, source))
            elif file.endswith('.so') and '_test' not in file:
                archive.add_file(name, source)
                objects.append(source)
    archive.add_libraries(objects)


def _add_extender(archive):
    directory = os.path.join(SCRIPTS, 'lib', 'thinvm_extender')
    archive.add_file('opt/thinvm-extender',
                     os.path.join(SCRIPTS, 'thinvm-extender'))
    for name in os.listdir(directory):
        if name.endswith('.py'):
            archive.add_file('opt/lib/thinvm_extender/' + name,
                             os.path.join(directory, name))


def make_initrd(ctx, shared=True):
    """One for all hosts of a test; @shared: they use lvmlockd."""
    archive = Archive()
    archive.add_file('init', INIT)
    programs = {name: ctx.bin(name) for name in (
        'qemu-storage-daemon', 'qemu-img', 'qemu-io')}
    programs['busybox'] = ctx.need('busybox', 'busybox-static')
    programs['dmsetup'] = ctx.need('dmsetup', 'dmsetup')
    for name, source in programs.items():
        archive.add_file('bin/' + name, source)
    archive.add_libraries(programs.values())
    _add_packages(archive, packages(ctx))
    _add_python(ctx, archive)
    _add_extender(archive)
    archive.add_modules(MODULES)
    archive.add_text('etc/lvm/lvmlocal.conf', LVMLOCAL % shared)
    archive.add_text('etc/passwd', 'root:x:0:0::/:/bin/sh\n')
    archive.add_text('etc/group', 'root:x:0:\n')
    path = ctx.path('lvmhost.initrd')
    archive.write(path)
    return path


class SharedDisk:
    """A file that several hosts have as their disk."""

    def __init__(self, ctx, name, size):
        self.name = name
        self.path = ctx.path(name)
        with open(self.path, 'wb') as file:
            file.truncate(size)

    def arguments(self):
        return ['-blockdev', json.dumps({
            'driver': 'file', 'node-name': self.name, 'filename': self.path,
            'locking': 'off', 'discard': 'unmap',
            'cache': {'direct': True}}),
            '-device', 'scsi-hd,share-rw=on,drive=%s,serial=%s' % (
                self.name, self.name)]


class LvmHost(ShellGuest):
    """Number @number of the cluster, with the @disks."""

    def __init__(self, ctx, number, initrd, disks, memory=768):
        devices = ['-no-reboot', '-device', 'i6300esb', '-action',
                   'watchdog=reset', '-device', 'virtio-scsi-pci']
        for disk in disks:
            devices += disk.arguments()
        super().__init__(ctx, ctx.unique('host%d' % number), initrd, devices,
                         memory, 'host_id=%d' % number, CPU)
        self.number = number

    def power_off(self):
        """At once, as by pulling the plug."""
        self.process.kill()

    def device(self, disk):
        """The name that a disk has here; Linux numbers them as they come."""
        return '/dev/' + self.sh('disk_of ' + disk.name)[1]

    def open_disk(self, volume, port='a', offer=True, **options):
        """A storage daemon with the thinvm image on a logical volume, and a
        monitor for the extender."""
        daemon = self.daemon(
            port, '--chardev', 'socket,id=more,server=on,wait=off,path='
            '/run/vm/%s.extender.qmp' % port, '--monitor', 'chardev=more')
        daemon.add_disk('/dev/' + volume, **options)
        if offer:
            self.offer(daemon, port)
        return daemon

    def offer(self, daemon, port='a'):
        """To disk_do() of ../guest/lvmhost.sh"""
        daemon.qmp.cmd_raw('nbd-server-start', {
            'addr': {'type': 'unix', 'data': {
                'path': '/run/vm/%s.nbd' % port}}})
        self.export(daemon)

    @staticmethod
    def export(daemon):
        daemon.qmp.cmd_raw('block-export-add', {
            'type': 'nbd', 'id': 'e', 'node-name': 'disk', 'writable': True})

    def start_extender(self, chunk):
        self.sh("python3 /opt/thinvm-extender run --qmp "
                "'/run/vm/*.extender.qmp' --backend lvm --chunk %s "
                "--metrics-file /run/metrics >> /run/extender.log 2>&1 & "
                "echo $! > /run/extender.pid" % chunk)

    def extender_log(self):
        return self.sh('cat /run/extender.log')[1]

    def disk_do(self, command, first, end, seed=0, port='a', ok=True,
                seconds=900):
        """Write or read MiB @first to @end with their patterns."""
        status, text = self.sh('disk_do %s %d %d %d %s' % (
            command, first, end, seed, port), ok=ok, seconds=seconds)
        return status == 0, text

    def write(self, *where, **more):
        return self.disk_do('aio_write', *where, **more)

    def read(self, *where, **more):
        return self.disk_do('aio_read', *where, **more)

    def volume_size(self, volume):
        """How long this host's device mapper has it."""
        return int(self.sh('blockdev --getsize64 /dev/' + volume)[1])
