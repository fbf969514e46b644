# SPDX-License-Identifier: GPL-2.0-or-later
#
# What scripts/bench measures: the ways to store a disk (variants) and what is
# done to it (workloads), and how an image is brought into the state that a
# workload begins with.  Knows nothing of time.

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

KIB, MIB = 1024, 1024 * 1024
GIB, TIB = 1024 * MIB, 1024 * 1024 * MIB


class Failure(Exception):
    """A program did not do what it was to do."""


def run(*args, timeout=600):
    words = [str(a) for a in args]
    try:
        done = subprocess.run(words, text=True, check=False, timeout=timeout,
                              stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT)
    except subprocess.TimeoutExpired as e:
        raise Failure(f'{" ".join(words)}: not done after '
                      f'{timeout} seconds') from e
    if done.returncode:
        raise Failure(f'{" ".join(words)}: exit status '
                      f'{done.returncode}: {done.stdout.strip()}')
    return done.stdout


@dataclass(frozen=True)
class Variant:
    """A way to store a disk."""
    fmt: str
    create: tuple = ()          # arguments of qemu-img create
    options: str = ''           # for opening, as in --image-opts


VARIANTS = {
    'raw': Variant('raw'),
    'qcow2': Variant('qcow2'),
    # as Proxmox VE makes them
    'qcow2-el2': Variant('qcow2', ('-o', 'extended_l2=on,cluster_size=128k')),
    'thinvm': Variant('thinvm'),
    'thinvm-wt': Variant('thinvm', (),
                         'mapping-cache-mode=writethrough'),
    # as thinvm, but hardly ever commits by itself: what the promise costs
    'thinvm-60s': Variant('thinvm', (), 'mapping-flush-interval=60000'),
}
USUAL = ('raw', 'qcow2', 'qcow2-el2', 'thinvm')


@dataclass(frozen=True)
class Workload:
    """Requests of one kind, sent by `qemu-img bench`."""
    size: int                   # bytes of a request
    step: int                   # from start to start; 0: scattered
    write: bool
    image: str                  # empty, full, backing, snapshot
    depth: int = 0              # 0: as the user says
    flush: int = 0              # requests from flush to flush; -1: at the end
    usual: bool = True          # or only with --all


SCATTERED = 0

WORKLOADS = {
    'write new 4 KiB, sequential':
        Workload(4 * KIB, 4 * KIB, True, 'empty'),
    'write new 4 KiB, scattered':
        Workload(4 * KIB, SCATTERED, True, 'empty'),
    'write new 64 KiB, sequential':
        Workload(64 * KIB, 64 * KIB, True, 'empty'),
    'write new 64 KiB, flush at the end':
        Workload(64 * KIB, 64 * KIB, True, 'empty', flush=-1),
    'write new 1 MiB, sequential':
        Workload(MIB, MIB, True, 'empty'),
    'write new 4 KiB, flush each':
        Workload(4 * KIB, SCATTERED, True, 'empty', depth=1, flush=1),
    'write new 4 KiB, flush every 8':
        Workload(4 * KIB, SCATTERED, True, 'empty', depth=8, flush=8,
                 usual=False),
    'write new 4 KiB, flush every 32':
        Workload(4 * KIB, SCATTERED, True, 'empty', depth=32, flush=32),
    'overwrite 4 KiB, sequential':
        Workload(4 * KIB, 4 * KIB, True, 'full'),
    'overwrite 4 KiB, scattered':
        Workload(4 * KIB, SCATTERED, True, 'full'),
    'overwrite 4 KiB, scattered, depth 1':
        Workload(4 * KIB, SCATTERED, True, 'full', depth=1),
    'overwrite 64 KiB, sequential':
        Workload(64 * KIB, 64 * KIB, True, 'full', usual=False),
    'overwrite 1 MiB, sequential':
        Workload(MIB, MIB, True, 'full', usual=False),
    'read 4 KiB, sequential':
        Workload(4 * KIB, 4 * KIB, False, 'full'),
    'read 4 KiB, scattered':
        Workload(4 * KIB, SCATTERED, False, 'full'),
    'read 4 KiB, scattered, depth 1':
        Workload(4 * KIB, SCATTERED, False, 'full', depth=1),
    'read 64 KiB, sequential':
        Workload(64 * KIB, 64 * KIB, False, 'full', usual=False),
    'read 1 MiB, sequential':
        Workload(MIB, MIB, False, 'full'),
    'read 4 KiB out of the backing file':
        Workload(4 * KIB, SCATTERED, False, 'backing'),
    'write 4 KiB over a backing file':
        Workload(4 * KIB, SCATTERED, True, 'backing'),
    'overwrite 4 KiB after a snapshot':
        Workload(4 * KIB, SCATTERED, True, 'snapshot'),
}


def can_do(variant, workload):
    """A raw image has neither a backing file nor snapshots."""
    return variant.fmt != 'raw' or workload.image in ('empty', 'full')


def scattered_step(size, disk):
    """
    A step after which requests visit all places of the disk once, each far
    away from the one before: about the golden section of the number of
    places, and odd while that number is a power of two.
    """
    places = disk // size
    step = int(places * 0.6180339887) | 1
    return max(step, 1) * size


def settle(path):
    """What one run left in the page cache shall not burden the next."""
    with open(path, 'rb') as f:
        os.fsync(f.fileno())


class Images:
    """The images of a bench, in one directory."""

    def __init__(self, img, directory, size):
        self.img, self.dir, self.size = img, Path(directory), size

    def create(self, path, variant, *more):
        path.unlink(missing_ok=True)
        run(self.img, 'create', '-q', '-f', variant.fmt, *variant.create,
            *more, path, self.size)
        settle(path)
        return path

    def fill(self, path, fmt):
        run(self.img, 'bench', '-q', '-w', '-f', fmt, '-s', MIB, '-c',
            self.size // MIB, '-d', 8, '--pattern', 85, path)
        settle(path)

    def full(self, name):
        """
        Written from start to end; made once, since overwriting it changes
        no mapping.
        """
        variant = VARIANTS[name]
        path = self.dir / f'full.{name}'
        if not path.exists():
            self.create(path, variant)
            self.fill(path, variant.fmt)
        return path

    def prepare(self, name, workload):
        """The image, as a run begins with it."""
        variant = VARIANTS[name]
        if workload.image == 'full':
            return self.full(name)
        path = self.dir / f'work.{name}'
        if workload.image == 'empty':
            return self.create(path, variant)
        if workload.image == 'backing':
            return self.create(path, variant, '-F', 'raw', '-b',
                               self.full('raw'))
        path = self.full(name)
        run(self.img, 'snapshot', '-c', 'bench', path)
        settle(path)
        return path

    def clean_up(self, path, workload):
        if workload.image == 'snapshot':
            run(self.img, 'snapshot', '-d', 'bench', path)
        settle(path)


def bench_arguments(name, workload, path, cfg, count):
    """What `qemu-img bench` is to be told; @cfg: size, depth, cache, aio."""
    variant = VARIANTS[name]
    step = workload.step or scattered_step(workload.size, cfg.size * MIB)
    depth = workload.depth or cfg.depth
    flush = workload.flush
    if flush < 0:
        flush = max(count, depth)
    words = ['bench', '-s', workload.size, '-S', step, '-d', depth,
             '-c', count, '-t', cfg.cache, '-i', cfg.aio]
    if workload.write:
        words.append('-w')
    if flush:
        words += ['--flush-interval', flush]
    if variant.options:
        return words + ['--image-opts',
                        f'driver={variant.fmt},file.driver=file,'
                        f'file.filename={path},{variant.options}']
    return words + ['-f', variant.fmt, path]


def most_requests(workload, cfg):
    """More than this, and what is to be new would be so no more."""
    if workload.image == 'full':
        return 1 << 30
    return cfg.size * MIB // workload.size
