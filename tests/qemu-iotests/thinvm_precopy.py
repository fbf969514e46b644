# SPDX-License-Identifier: GPL-2.0-or-later
#
# What the tests of blockdev-precopy share: guests that write all the time,
# and know what the disk must hold, and the job's life by QMP.
#
# A disk is exported by NBD from the daemon that copies it.  Each writer is a
# thread with a connection of its own.  The disk is cut into stripes of odd
# sizes, so that blocks of the job have several writers, and each stripe
# belongs to one of them: what it wrote last is what must be read.

import json
import random
import threading
import time

import iotests
import thinvm_iotest
import thinvm_stress
from thinvm_iotest import KiB, MiB

SECTOR = 512
READ, WRITE, FLUSH, TRIM, ZEROES = 0, 1, 3, 4, 6
# A stripe is one of these, in turn
STRIPES = (3 * KiB, 7 * KiB, 64 * KiB, SECTOR, 9 * KiB)


class Client:
    """One request at a time."""

    def __init__(self, path, name):
        self.nbd = thinvm_stress.Nbd(path, name)

    def request(self, kind, offset=0, length=0, data=b''):
        self.nbd.send(thinvm_stress.Request(kind, 0, offset // SECTOR,
                                            length // SECTOR), data)
        _, error, data = self.nbd.receive()
        return error, data

    def close(self):
        self.nbd.sock.close()


class Disk:
    """What a disk must hold: bytes, and where nobody can say."""

    def __init__(self, size):
        self.content = bytearray(size)
        self.unknown = bytearray(size // SECTOR)
        self.unflushed = bytearray(size // SECTOR)
        self.requests = 0
        self.failed = []

    def stripes(self, writer, writers):
        """The (offset, length) that belong to a writer."""
        offset, i, found = 0, 0, []
        while offset < len(self.content):
            length = min(STRIPES[i % len(STRIPES)],
                         len(self.content) - offset)
            if i % writers == writer:
                found.append((offset, length))
            offset += length
            i += 1
        return found

    def set(self, offset, data):
        self.content[offset:offset + len(data)] = data
        self.mark(offset, len(data), 0)

    def mark(self, offset, length, unknown):
        first, nb = offset // SECTOR, length // SECTOR
        self.unknown[first:first + nb] = bytes([unknown]) * nb
        self.unflushed[first:first + nb] = b'\1' * nb

    def flushed(self):
        """A flush has ended that began when nobody was writing."""
        self.unflushed = bytearray(len(self.unknown))

    def crashed(self):
        """What was not flushed may be there or not."""
        for sector, lost in enumerate(self.unflushed):
            self.unknown[sector] |= lost

    def differences(self, data):
        """Sectors in which data is not what it must be."""
        assert len(data) == len(self.content)
        return [s for s in range(len(self.unknown)) if not self.unknown[s] and
                data[s * SECTOR:(s + 1) * SECTOR] !=
                self.content[s * SECTOR:(s + 1) * SECTOR]]


class Writers:
    """Threads that write to an export until they are stopped."""

    def __init__(self, disk, path, name='disk', threads=3, seed=1,
                 kinds=(WRITE,) * 8 + (ZEROES, TRIM, FLUSH), hot=0.3,
                 pause=0.0):
        self.disk, self.kinds, self.hot, self.pause = disk, kinds, hot, pause
        self.stopping = threading.Event()
        self.error = None
        self.threads = []
        for i in range(threads):
            client = Client(path, name)
            self.threads.append(threading.Thread(
                target=self.run, daemon=True,
                args=(client, random.Random(f'{seed} {i}'),
                      disk.stripes(i, threads))))
        for t in self.threads:
            t.start()

    def run(self, client, rng, stripes):
        try:
            while not self.stopping.is_set():
                some = stripes if rng.random() > self.hot else stripes[:8]
                self.one(client, rng, *rng.choice(some))
                if self.pause:
                    time.sleep(self.pause)
        except Exception as e:      # pylint: disable=broad-except
            self.error = e
        finally:
            client.close()

    def one(self, client, rng, offset, length):
        kind = rng.choice(self.kinds)
        a = rng.randrange(length // SECTOR)
        b = rng.randrange(a, length // SECTOR) + 1
        if rng.random() < 0.3:
            a, b = 0, length // SECTOR
        offset, length = offset + a * SECTOR, (b - a) * SECTOR
        data = rng.randbytes(16) * (length // 16) if kind == WRITE else b''
        if kind == FLUSH:
            offset = length = 0
        self.disk.mark(offset, length, 1)
        error, _ = client.request(kind, offset, length, data)
        self.disk.requests += 1
        if error:
            self.disk.failed.append((kind, offset, length, error))
        elif kind == WRITE:
            self.disk.set(offset, data)
        elif kind == ZEROES:
            self.disk.set(offset, bytes(length))

    def stop(self, server_died=False):
        self.stopping.set()
        for t in self.threads:
            t.join(60)
            assert not t.is_alive(), 'a request never ended'
        if self.error and not server_died:
            raise self.error


class TestCase(thinvm_iotest.TestCase):
    """Source 'disk', a file of any format; target 'target'."""

    size = 16 * MiB + 5 * KiB       # no whole number of anything

    def source_file(self, fmt='thinvm', size=None, data=None):
        """An image of which about half is data; (path, Disk)"""
        size = size or self.size
        disk = Disk(size)
        rng = random.Random(f'source {size}')
        raw = self.path('content.raw')
        with open(raw, 'wb') as f:
            f.truncate(size)
            for offset in range(0, size, 256 * KiB):
                if data or (data is None and rng.random() < 0.5):
                    n = min(256 * KiB, size - offset)
                    chunk = rng.randbytes(64) * (n // 64)
                    f.seek(offset)
                    f.write(chunk)
                    disk.set(offset, chunk)
        path = self.path(f'source.{fmt}')
        self.img('convert', '-f', 'raw', '-O', fmt, raw, path)
        return path, disk

    def node(self, name, path, fmt, **file_options):
        return {'driver': fmt, 'node-name': name, 'discard': 'unmap',
                'file': {'driver': 'file', 'filename': path,
                         'discard': 'unmap', **file_options}}

    def target_file(self, fmt='raw', size=None):
        path = self.path(f'target.{fmt}')
        self.img('create', '-q', '-f', fmt, path, str(size or self.size))
        return path

    def options(self, *nodes):
        args = []
        for n in nodes:
            args += ['--blockdev', json.dumps(n)]
        return args

    def export(self, qsd, node='disk'):
        """Export the source; returns the socket."""
        self.nbd(qsd, node)
        return self.socket('nbd')

    def precopy(self, qsd, job='job', **args):
        qsd.cmd('blockdev-precopy',
                {'job-id': job, 'device': 'disk', 'target': 'target',
                 'auto-dismiss': False,
                 **{k.replace('_', '-'): v for k, v in args.items()}})

    def job(self, qsd, job='job'):
        jobs = {j['id']: j for j in qsd.cmd('query-jobs')}
        return jobs.get(job)

    def statistics(self, qsd, job='job'):
        for j in qsd.cmd('query-block-jobs'):
            if j['device'] == job:
                return j
        self.fail(f'no block job {job}')

    def wait_status(self, qsd, *status, job='job', timeout=120):
        deadline = time.monotonic() + timeout
        while True:
            now = self.job(qsd, job)
            if now and now['status'] in status:
                return now
            self.assertLess(time.monotonic(), deadline, now)
            time.sleep(0.01)

    def wait_that(self, condition, timeout=120):
        deadline = time.monotonic() + timeout
        while not condition():
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.01)

    def finished(self, qsd, error=None, job='job'):
        """The job ends; returns the event that says how."""
        now = self.wait_status(qsd, 'concluded', job=job)
        if error is None:
            self.assertNotIn('error', now)
        else:
            self.assertIn(error, now.get('error', ''))
        qsd.cmd('job-dismiss', {'id': job})
        event = self.event(qsd, 'BLOCKDEV_PRECOPY_COMPLETED')
        self.assertEqual(event['data']['success'], error is None)
        return event['data']

    def event(self, qsd, name):
        qmp = qsd.get_qmp()
        while True:
            event = qmp.pull_event(wait=60.0)
            if event['event'] == name:
                return event

    def nodes(self, qsd):
        return {n['node-name']: n for n in
                qsd.cmd('query-named-block-nodes', {'flat': True})}

    def read(self, path, fmt):
        """The whole content of an image that nobody has open."""
        raw = self.path('read.raw')
        self.img('convert', '-f', fmt, '-O', 'raw', path, raw)
        with open(raw, 'rb') as f:
            return f.read()

    def assert_holds(self, path, fmt, disk):
        wrong = disk.differences(self.read(path, fmt))
        self.assertEqual(wrong[:20], [], f'{len(wrong)} sectors')
        self.assertEqual(disk.failed, [])


def main():
    iotests.main(supported_fmts=['thinvm'], supported_protocols=['file'])
