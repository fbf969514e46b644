# SPDX-License-Identifier: GPL-2.0-or-later
#
# What thinvm's own iotests (tests/thinvm-*) share: images in a directory of
# the test's own, the tools run with their results checked, and small
# measures of what an image takes on its file.
#
# Everything here relies on upstream's iotests.py and is quiet unless
# something is wrong, so that the reference outputs hold only the verdict.

import contextlib
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import tempfile
import time

import iotests

KiB = 1024
MiB = 1024 * KiB
GiB = 1024 * MiB
TiB = 1024 * GiB

# What qemu-io prints when a command went wrong, whatever its exit status.
IO_TROUBLE = re.compile(r'failed|error|invalid|unknown|not found', re.I)


def digest(path):
    """
    SHA-256 of a file, to show that nothing was written, apart from what owners
    write about themselves (64 KiB to 256 KiB): claims, which say who tried,
    heartbeats, and what is hot.
    """
    content = hashlib.sha256(str(os.path.getsize(path)).encode())
    with open(path, 'rb') as f:
        at = 0
        while True:
            try:
                at = os.lseek(f.fileno(), at, os.SEEK_DATA)
            except OSError:             # no data behind it
                return content.hexdigest()
            at -= at % (4 * KiB)
            data = os.pread(f.fileno(), 4 * KiB, at)
            if any(data) and not 64 * KiB <= at < 256 * KiB:
                content.update(b'%d' % at + data)
            at += 4 * KiB


def allocated(path):
    """Bytes that the file takes on its file system."""
    return os.stat(path).st_blocks * 512


def opts(path, **options):
    """The image at path as text for --image-opts."""
    parts = ['driver=thinvm', 'file.driver=file', f'file.filename={path}']
    parts += [f'{k.replace("_", "-")}={v}' for k, v in options.items()]
    return ','.join(parts)


@contextlib.contextmanager
def stderr_to(file):
    """What is started meanwhile complains there."""
    saved = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


class TestCase(iotests.QMPTestCase):
    """A test with its own directory self.dir."""

    def setUp(self):
        self.dir = tempfile.mkdtemp(prefix='thinvm-', dir=iotests.test_dir)
        self.sockets = tempfile.mkdtemp(prefix='t', dir=iotests.sock_dir)
        self.addCleanup(shutil.rmtree, self.dir, True)
        self.addCleanup(shutil.rmtree, self.sockets, True)

    def path(self, name):
        return os.path.join(self.dir, name)

    def socket(self, name):
        return os.path.join(self.sockets, name)

    def create(self, name, size, *args, fmt='thinvm', **options):
        """Create an image; returns its path.  options: for -o"""
        path = self.path(name)
        for k, v in options.items():
            args += ('-o', f'{k}={v}')
        iotests.qemu_img('create', '-q', '-f', fmt, *args, path, str(size))
        return path

    def raw_file(self, name, size, content=b''):
        """A raw file that starts with content."""
        path = self.path(name)
        with open(path, 'wb') as f:
            f.write(content)
            f.truncate(size)
        return path

    def img(self, *args):
        """qemu-img must succeed and say nothing of errors."""
        return iotests.qemu_img(*args).stdout

    def io(self, image, *commands, fmt='thinvm', options=(), **image_opts):
        """
        Run qemu-io commands, all of which must succeed.  With image_opts
        the image is opened by --image-opts.
        """
        args = ['-f', fmt]
        if image_opts:
            args, image = ['--image-opts'], opts(image, **image_opts)
        for c in commands:
            args += ['-c', c]
        done = iotests.qemu_io(*args, *options, image)
        text = '\n'.join(line for line in done.stdout.splitlines()
                         if image not in line)
        self.assertNotRegex(text, IO_TROUBLE)
        return done.stdout

    def fails(self, *args, says=(), tool=None, image=None):
        """
        The tool (qemu-img by default) must refuse: exit status 1, one clear
        message that contains each of says, and not a byte of the image
        written.
        """
        before = digest(image) if image else None
        done = (tool or iotests.qemu_img)(*args, check=False)
        text = done.stdout
        what = f'{args}: {text}'
        self.assertEqual(done.returncode, 1, what)
        lines = [line for line in text.splitlines() if line.strip() and
                 not line.startswith('Formatting ')]
        # Further lines are hints on what would be right
        self.assertRegex(lines[0], r'^qemu-\w+: ', what)
        self.assertLessEqual(len(lines), 3, what)
        for line in lines[1:]:
            self.assertNotRegex(line, r'^qemu-\w+: ', what)
        text = '\n'.join(lines)
        for s in says:
            self.assertIn(str(s).lower(), text.lower(), what)
        if image:
            self.assertEqual(digest(image), before, f'{image} was written')
        return text

    def check_clean(self, image, **image_opts):
        """qemu-img check finds neither corruptions nor leaks."""
        if image_opts:
            result = iotests.qemu_img_check('--image-opts',
                                            opts(image, **image_opts))
        else:
            result = iotests.qemu_img_check('-f', 'thinvm', image)
        self.assertEqual(result.get('check-errors', 0), 0, result)
        self.assertEqual(result.get('corruptions', 0), 0, result)
        self.assertEqual(result.get('leaks', 0), 0, result)
        return result

    def info(self, image, *args):
        return iotests.qemu_img_info('-f', 'thinvm', *args, image)

    def specific(self, image, *args):
        """What info says that is thinvm's own."""
        info = self.info(image, *args)['format-specific']
        self.assertEqual(info['type'], 'thinvm')
        return info['data']

    def data_map(self, image, *args):
        """[(start, length)] of what is data in this very image."""
        ranges = []
        for e in iotests.qemu_img_map('-f', 'thinvm', *args, image):
            if e['data'] and e['depth'] == 0:
                if ranges and sum(ranges[-1]) == e['start']:
                    ranges[-1] = (ranges[-1][0], ranges[-1][1] + e['length'])
                else:
                    ranges.append((e['start'], e['length']))
        return ranges

    def assert_identical(self, a, b, fmt_a='thinvm', fmt_b='raw'):
        """Two images read the same."""
        done = iotests.qemu_img('compare', '-f', fmt_a, '-F', fmt_b, a, b,
                                check=False)
        self.assertEqual(done.returncode, 0, done.stdout)

    @contextlib.contextmanager
    def daemon(self, *args, instance='a'):
        """A qemu-storage-daemon with QMP; stopped in the end."""
        qsd = iotests.QemuStorageDaemon(*args, instance_id=instance,
                                        qmp=True)
        try:
            yield qsd
        finally:
            if qsd._p is not None:
                qsd.stop()

    def blockdev(self, path, node='disk', driver='thinvm', **options):
        """Arguments that give a daemon the image at path."""
        file = {'driver': 'file', 'filename': path}
        return ('--blockdev',
                json.dumps({'driver': driver, 'node-name': node,
                            'file': file, 'discard': 'unmap', **options}))

    def nbd(self, qsd, node='disk', name='nbd', **options):
        """Export a node of the daemon by NBD; returns the URI."""
        sock = self.socket(name)
        qsd.cmd('nbd-server-start',
                {'addr': {'type': 'unix', 'data': {'path': sock}}})
        qsd.cmd('block-export-add',
                {'id': 'export', 'type': 'nbd', 'node-name': node,
                 'name': node, 'writable': True, **options})
        return f'nbd+unix:///{node}?socket={sock}'

    def query(self, qsd, node='disk'):
        """query-thinvm for one node."""
        infos = qsd.cmd('query-thinvm', {'node-name': node})
        self.assertEqual([i['node-name'] for i in infos], [node])
        return infos[0]

    def refused(self, qsd, command, args, says=()):
        """A QMP command must fail with a message that contains says."""
        reply = qsd.qmp(command, args)
        self.assertIn('error', reply, reply)
        for s in says:
            self.assertIn(str(s).lower(), reply['error']['desc'].lower())
        return reply['error']['desc']

    def wait_job(self, qsd, job, timeout=60):
        """Wait until a job has concluded; it must not have failed."""
        deadline = time.monotonic() + timeout
        while True:
            jobs = {j['id']: j for j in qsd.cmd('query-jobs')}
            if job not in jobs:
                return
            if jobs[job]['status'] == 'concluded':
                self.assertNotIn('error', jobs[job], jobs[job])
                qsd.cmd('job-dismiss', {'id': job})
                return
            self.assertLess(time.monotonic(), deadline, jobs)
            time.sleep(0.02)

    def wait_ready(self, qsd, job, timeout=60):
        """Wait until a mirror is in sync."""
        deadline = time.monotonic() + timeout
        while True:
            jobs = {j['id']: j for j in qsd.cmd('query-jobs')}
            self.assertIn(job, jobs)
            if jobs[job]['status'] == 'ready':
                return
            self.assertNotIn('error', jobs[job], jobs[job])
            self.assertLess(time.monotonic(), deadline, jobs)
            time.sleep(0.02)


def logged_writes(log, data=False):
    """
    What blklogwrites logged: [(offset, bytes, flags)] in bytes; flag 1 is a
    flush, 2 FUA, 4 a discard.  With @data: what was written is a fourth field.
    """
    entries = []
    with open(log, 'rb') as f:
        _, version, count, sector = struct.unpack('<QQQI', f.read(28))
        assert version == 1
        f.seek(sector)
        for _ in range(count):
            start = f.tell()
            where, length, flags = struct.unpack('<QQQ', f.read(24))
            entry = (where * sector, length * sector, flags)
            f.seek(start + sector)
            if data:
                entry += (b'' if flags & 4 else f.read(length * sector),)
            entries.append(entry)
            f.seek(start + sector +
                   (0 if flags & 4 else length) * sector)
    return entries


def run(*args):
    """Run a program that must succeed; returns what it printed."""
    return subprocess.run(args, check=True, text=True,
                          stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT).stdout


def main():
    iotests.main(supported_fmts=['thinvm'], supported_protocols=['file'])
