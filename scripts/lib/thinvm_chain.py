# SPDX-License-Identifier: GPL-2.0-or-later
#
# What scripts/thinvm-chain does to disks of a running QEMU, by QMP, and what
# it can find out about a volume: which one a name means, what its header
# says, and whether a program has it open.
#
# Nothing here takes silence for consent: that a QEMU does not know a volume
# means that it is another QEMU, until what is left shows otherwise.

import contextlib
import fcntl
import json
import os
import re
import socket
import stat
import struct
import subprocess
import time
from urllib.parse import parse_qs, unquote, urlsplit

ISCSI = re.compile(r'^iscsi://(?:[^@/]*@)?(?P<portal>[^/]+)/'
                   r'(?P<target>[^/]+)/(?P<lun>\d+)(?:\?.*)?$')

# The bytes of a file that QEMU locks: permissions that a program uses (the
# second one: to write), and from 200 on those that it leaves to nobody else.
LOCKS = 100, 200
LOCK_WRITE = 101, 1


class Trouble(Exception):
    """Something that the operator has to know."""


def has_protocol(name):
    """Whether QEMU takes the name for something else than a path."""
    return ':' in name.split('/')[0]


def absolute(name):
    return name if has_protocol(name) else os.path.abspath(name)


def protocol(volume):
    """Options of the node that reads and writes a volume."""
    iscsi = ISCSI.match(volume)
    if iscsi:
        return {'driver': 'iscsi', 'transport': 'tcp',
                'portal': iscsi['portal'], 'target': iscsi['target'],
                'lun': int(iscsi['lun'])}
    block = stat.S_ISBLK(os.stat(volume).st_mode)
    return {'driver': 'host_device' if block else 'file',
            'filename': volume, 'cache': {'direct': True}}


def file_key(path):
    """A block device has as many names as somebody made nodes for it."""
    try:
        status = os.stat(path)
    except OSError:
        return 'file', os.path.realpath(path)
    if stat.S_ISBLK(status.st_mode):
        return 'device', status.st_rdev
    return 'inode', status.st_dev, status.st_ino


def portal_key(portal):
    has_port = re.search(r':\d+$', portal)
    return portal if has_port else f'{portal}:3260'


def nbd_key(name):
    """nbd://HOST:PORT/EXPORT and nbd+unix:///EXPORT?socket=PATH"""
    url = urlsplit(name)
    export = unquote(url.path.lstrip('/'))
    path = parse_qs(url.query).get('socket')
    if path:
        return 'nbd', os.path.realpath(path[0]), export
    return 'nbd', f'{url.hostname}:{url.port or 10809}', export


def nested(options):
    """{'file.driver': 'raw'} as {'file': {'driver': 'raw'}}"""
    result = {}
    for name, value in options.items():
        *way, last = name.split('.')
        where = result
        for step in way:
            where = where.setdefault(step, {})
        if isinstance(value, dict):
            where.setdefault(last, {}).update(nested(value))
        else:
            where[last] = value
    return result


def options_key(options):
    """The volume that a node of these options reads."""
    driver = options.get('driver')
    for child in 'file', 'image':           # of a format, or of a filter
        below = options.get(child)
        if below:
            key = (options_key(below) if isinstance(below, dict) else
                   volume_key(below))
            part = [(o, str(options[o])) for o in ('offset', 'size')
                    if str(options.get(o, 0)) != '0']
            if options.get('snapshot'):
                part.append(('snapshot', json.dumps(options['snapshot'],
                                                    sort_keys=True)))
            return (key, *part) if part else key
    if driver == 'iscsi' and 'portal' in options:
        return ('iscsi', portal_key(options['portal']),
                options.get('target'), int(options.get('lun', 0)))
    if driver == 'nbd':
        server = options.get('server', options)
        export = options.get('export', '')
        if 'path' in server:
            return 'nbd', os.path.realpath(server['path']), export
        if 'host' in server:
            return 'nbd', f'{server["host"]}:{server.get("port")}', export
    if 'filename' in options:
        return volume_key(options['filename'])
    return 'options', json.dumps(options, sort_keys=True)


def volume_key(name):
    """Equal for two names of the same volume, however they are spelled."""
    if name.startswith('json:'):
        try:
            return options_key(nested(json.loads(name[len('json:'):])))
        except (ValueError, TypeError, AttributeError):
            return 'name', name
    iscsi = ISCSI.match(name)
    if iscsi:
        return ('iscsi', portal_key(iscsi['portal']), iscsi['target'],
                int(iscsi['lun']))
    if re.match(r'nbd(\+\w+)?://', name):
        return nbd_key(name)
    prefix = re.match('(file|host_device):', name)
    if prefix:
        return file_key(name[prefix.end():])
    return ('name', name) if has_protocol(name) else file_key(name)


def same(one, other):
    """Do two names, or None for no image at all, mean the same?"""
    if not one or not other:
        return not one and not other
    return volume_key(one) == volume_key(other)


def backing_of(info):
    """The backing file that an image names, or None."""
    return info.get('full-backing-filename') or info.get('backing-filename')


def locked(volume, bytes_=LOCKS):
    """Whether a program of this host has it open (LOCK_WRITE: to write)."""
    if has_protocol(volume):
        return False
    try:
        fd = os.open(volume, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        start, length = bytes_
        ask = struct.pack('hhqqi4x', fcntl.F_WRLCK, os.SEEK_SET, start,
                          length, 0)
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, ask)
        return struct.unpack('hhqqi4x', answer)[0] != fcntl.F_UNLCK
    finally:
        os.close(fd)


class Headers:
    """What images say of themselves, read by qemu-img beside their users."""

    def __init__(self, img):
        self.img = img

    def read(self, volume, *args):
        """[info of the image, of its backing file...]; None: unreadable"""
        done = subprocess.run(
            [self.img, 'info', '-U', '--output=json', *args, volume],
            text=True, check=False, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL)
        if done.returncode:
            return None
        info = json.loads(done.stdout)
        return info if isinstance(info, list) else [info]

    def image(self, volume):
        """Info of the image on a volume, or None."""
        info = self.read(volume, '-f', 'thinvm')
        return info and info[0]

    def format(self, volume):
        info = self.read(volume)
        return info and info[0]['format']

    def chain(self, volume):
        """Names of all that the image on a volume reads from, but itself."""
        for args in ('--backing-chain',), ():
            infos = self.read(volume, '-f', 'thinvm', *args)
            if infos:
                return [n for n in map(backing_of, infos) if n]
        return []


class Qemu:
    """The nodes of a running QEMU."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        self.file = self.socket.makefile('rwb')
        self.file.readline()
        self.command('qmp_capabilities')

    def close(self):
        # What went wrong before has been told, and is not to be hidden
        with contextlib.suppress(OSError):
            self.file.close()
        self.socket.close()

    def command(self, name, **arguments):
        message = {'execute': name,
                   'arguments': {k.replace('_', '-'): v
                                 for k, v in arguments.items()}}
        try:
            self.file.write(json.dumps(message).encode() + b'\n')
            self.file.flush()
        except OSError as e:
            raise Trouble('QEMU closed its monitor') from e
        while True:
            reply = json.loads(self.line())
            if 'error' in reply:
                raise Trouble(f'{name}: {reply["error"]["desc"]}')
            if 'return' in reply:
                return reply['return']

    def line(self):
        try:
            line = self.file.readline()
        except OSError as e:
            raise Trouble('QEMU closed its monitor') from e
        if not line.endswith(b'\n'):
            raise Trouble('QEMU closed its monitor')
        return line

    def job(self, name):
        return next((j for j in self.command('query-jobs')
                     if j['id'] == name), None)

    def finish(self, job):
        """Wait for a job and dismiss it."""
        while True:
            state = self.job(job)
            if state['status'] == 'concluded':
                break
            time.sleep(0.05)
        self.command('job-dismiss', id=job)
        if 'error' in state:
            raise Trouble(f'{job}: {state["error"]}')

    def all_nodes(self):
        return self.command('query-named-block-nodes', flat=True)

    def nodes(self):
        return {n['node-name']: n for n in self.all_nodes()
                if n['drv'] == 'thinvm'}

    def node(self, volume):
        """The node of the image on a volume, or None."""
        return next((name for name, n in self.nodes().items()
                     if same(n['file'], volume)), None)

    def require(self, volume):
        node = self.node(volume)
        if not node:
            raise Trouble(f'this QEMU does not have {volume} open')
        return node

    def size(self, node):
        return self.nodes()[node]['image']['virtual-size']

    def edges(self):
        """[(parent's name, what it is to the parent, name)]"""
        graph = self.command('x-debug-query-block-graph')
        names = {n['id']: n['name'] for n in graph['nodes']}
        return [(names[e['parent']], e['name'], names[e['child']])
                for e in graph['edges']]

    def in_use_as_top(self, volume):
        """Is it open, and no other image's backing file?"""
        node = self.node(volume)
        return node is not None and node not in self.parents()

    def parents(self):
        """Nodes that are a backing file."""
        return {child for _, what, child in self.edges() if what == 'backing'}

    def below(self, node):
        """The image that a node has as its backing file, or None."""
        edges, images = self.edges(), self.nodes()
        names = [c for p, what, c in edges if p == node and what == 'backing']
        while names and names[0] not in images:      # a filter of a job
            names = [c for p, what, c in edges
                     if p == names[0] and what in ('backing', 'file')]
        return names[0] if names else None

    def check_free(self, volume):
        """Nobody here reads or writes the volume."""
        users = [n['node-name'] for n in self.all_nodes()
                 if same(n['file'], volume)]
        if users:
            raise Trouble(f'QEMU still has {volume} open, as node '
                          f'{", ".join(users)}')

    def check_volume(self, volume):
        """A node may be made of the volume."""
        try:
            protocol(volume)
        except OSError as e:
            raise Trouble(f'{volume}: {e.strerror}') from e

    def check_parent(self, volume):
        """An image may be created on top of that on a volume."""
        if self.require(volume) in self.parents():
            raise Trouble(f'{volume} is not the top of its chain')

    def create(self, volume, parent, name):
        """The guest goes on on a new image; what was there is a snapshot."""
        self.check_parent(parent)
        base = self.require(parent)
        file_node = f'{name}-file'
        self.command('blockdev-add', **{'node-name': file_node},
                     **protocol(volume))
        try:
            self.command('blockdev-create', job_id=f'{name}-create', options={
                'driver': 'thinvm', 'file': file_node,
                'size': self.size(base), 'backing-file': parent,
                'backing-fmt': 'thinvm'})
            self.finish(f'{name}-create')
            self.command('blockdev-add', **{
                'driver': 'thinvm', 'node-name': name, 'file': file_node,
                'backing': None})
        except Trouble:
            self.drop(file_node)
            raise
        try:
            self.command('blockdev-snapshot', node=base, overlay=name)
        except Trouble:
            self.drop(name, file_node)
            raise

    def created(self, volume, parent, name):
        """
        Whether create() came to its end; if not, this removes what it left
        here and nobody uses.
        """
        node = self.node(volume)
        if node and self.below(node):
            if self.below(node) != self.node(parent):
                raise Trouble(f'{volume} is open, but not on top of {parent}')
            return True
        self.require(parent)            # is this the right QEMU at all?
        if self.job(f'{name}-create'):
            with contextlib.suppress(Trouble):  # made anew, or given up
                self.finish(f'{name}-create')
        ours = [n['node-name'] for n in self.all_nodes()
                if same(n['file'], volume)]
        self.drop(*[n for n in (name, f'{name}-file') if n in ours])
        self.check_free(volume)
        return False

    def drop(self, *nodes):
        """Remove nodes, but those that QEMU needs or opened by itself."""
        for name in nodes:
            with contextlib.suppress(Trouble):
                self.command('blockdev-del', node_name=name)

    def merge(self, volume, child, parent):
        """The child gets what only the image on volume has."""
        top = self.require(child)       # is this the right QEMU at all?
        job = f'{top}-stream'.lstrip('#')
        if self.job(job):               # of a command that was interrupted
            self.finish(job)
        node = self.below(top)
        if node and same(self.nodes()[node]['file'], volume):
            self.stream(job, top, node, parent)
        else:
            # Perhaps a command that was interrupted has done it
            self.check_merged(top, parent)
            node = self.node(volume)
            if node:
                self.drop(node, *self.files(node))
        self.check_merged(top, parent)

    def files(self, node):
        return [c for p, what, c in self.edges() if p == node and
                what == 'file']

    def stream(self, job, top, node, parent):
        arguments = {}
        if parent:
            base = self.below(node)
            if not base or not same(self.nodes()[base]['file'], parent):
                raise Trouble(f'node {node} is not on top of {parent}')
            arguments = {'base-node': base, 'backing-file': parent}
        files = self.files(node)
        self.command('block-stream', **{'job-id': job, 'auto-dismiss': False,
                                        'device': top}, **arguments)
        self.finish(job)
        self.drop(node, *files)

    def check_merged(self, top, parent):
        """The image reads from the parent and from nothing else."""
        below, nodes = self.below(top), self.nodes()
        name = backing_of(nodes[top]['image'])
        is_open = below and nodes[below]['file']
        if not same(name, parent) or not same(is_open, parent):
            raise Trouble(f'node {top} should be on top of '
                          f'{parent or "nothing"}, but it names '
                          f'{name or "no backing file"} and reads from '
                          f'{is_open or "none"}')
