# SPDX-License-Identifier: GPL-2.0-or-later
"""Images of the format under test: made, looked at and checked by qemu-img.

A place is where an image lies: a Lun, or a File in the test's directory.
Both have .url for command lines and .blockdev() for QMP.  Options that only
thinvm knows are left out for other formats, so that every test that makes
sense for qcow2 or raw can be run with them (run.py --format).
"""

import json
import os

from .context import Failure, check

MiB = 1 << 20
GiB = 1 << 30


class File:
    """A place in the test's directory."""

    def __init__(self, ctx, name, size=None):
        self.path = ctx.path(name)
        if size is not None:
            with open(self.path, 'wb') as file:
                file.truncate(size)

    @property
    def url(self):
        return self.path

    def blockdev(self, node, host='a'):
        del host                    # all processes see the same file
        return {'driver': 'file', 'node-name': node, 'filename': self.path,
                'cache': {'direct': True}}

    def used(self):
        return os.stat(self.path).st_blocks * 512


class NBDExport:
    """A place that a storage daemon exports: a device of fixed size that
    several hosts reach, without SCSI."""

    def __init__(self, ctx, daemon, node):
        self._path = daemon.export_nbd(node)
        self.url = daemon.nbd_url(node)
        self._export = node

    def blockdev(self, node, host='a'):
        del host
        return {'driver': 'nbd', 'node-name': node, 'export': self._export,
                'server': {'type': 'unix', 'path': self._path},
                'cache': {'direct': True}}


def create(ctx, place, size, fmt=None, backing=None, backing_fmt=None,
           options=None):
    """qemu-img create; @size in bytes."""
    args = ['create', '-f', fmt or ctx.fmt]
    if backing:
        args += ['-b', backing, '-F', backing_fmt]
    if options:
        args += ['-o', options]
    args += [place.url]
    if (fmt or ctx.fmt) == 'raw' and not os.path.isabs(place.url):
        return ''                   # a raw device is used as it is
    return ctx.run(ctx.bin('qemu-img'), *args, str(size))


def json_of(text, what):
    """The object in a tool's output.

    Messages may stand before it: of a LUN that somebody else has reserved,
    libiscsi's driver says that it cannot tell whether it is write-protected.
    """
    start = text.find('{')
    if start < 0:
        raise Failure('%s: %s' % (what, text.strip()))
    return json.loads(text[start:text.rfind('}') + 1])


def info(ctx, place, fmt=None):
    return json_of(ctx.run(ctx.bin('qemu-img'), 'info', '-U',
                           '--output=json', '-f', fmt or ctx.fmt,
                           place.url), 'qemu-img info of ' + place.url)


def check_report(ctx, place, fmt=None):
    """What qemu-img check says, as a dict; raw has nothing to check."""
    fmt = fmt or ctx.fmt
    if fmt == 'raw':
        return {}
    text = ctx.run(ctx.bin('qemu-img'), 'check', '--output=json', '-f', fmt,
                   place.url, ok=None)
    return json_of(text, 'qemu-img check of ' + place.url)


def require_clean(ctx, place, fmt=None):
    """Fail if there is a corruption, a leak or an unchecked part."""
    report = check_report(ctx, place, fmt)
    bad = {key: report[key] for key in ('corruptions', 'leaks',
                                        'check-errors') if report.get(key)}
    if bad and (fmt or ctx.fmt) == 'qcow2' and set(bad) == {'leaks'}:
        ctx.log('qcow2 leaks %d clusters after a crash; that is its way'
                % bad['leaks'])
        return
    check(not bad, 'qemu-img check of %s finds %s', place.url, bad)


def format_node(ctx, node, file_node, mode=None, interval=None, fmt=None,
                **more):
    """Options of a format node over @file_node."""
    options = {'driver': fmt or ctx.fmt, 'node-name': node,
               'file': file_node, 'cache': {'direct': True}}
    if options['driver'] == 'thinvm':
        if mode:
            options['mapping-cache-mode'] = mode
        if interval is not None:
            options['mapping-flush-interval'] = interval
    options.update({key.replace('_', '-'): value
                    for key, value in more.items() if value is not None})
    return options
