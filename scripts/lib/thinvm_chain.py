# SPDX-License-Identifier: GPL-2.0-or-later
#
# What scripts/thinvm-chain does to disks of a running QEMU, by QMP.

import json
import os
import re
import socket
import stat
import time

ISCSI = re.compile(r'^iscsi://(?P<portal>[^/]+)/(?P<target>[^/]+)/(?P<lun>\d+)$')


class Trouble(Exception):
    """Something that the operator has to know."""


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


class Qemu:
    """The nodes of a running QEMU."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        self.file = self.socket.makefile('rwb')
        self.file.readline()
        self.command('qmp_capabilities')

    def close(self):
        self.file.close()
        self.socket.close()

    def command(self, name, **arguments):
        message = {'execute': name,
                   'arguments': {k.replace('_', '-'): v
                                 for k, v in arguments.items()}}
        self.file.write(json.dumps(message).encode() + b'\n')
        self.file.flush()
        while True:
            line = self.file.readline()
            if not line:
                raise Trouble('QEMU closed its monitor')
            reply = json.loads(line)
            if 'error' in reply:
                raise Trouble(f'{name}: {reply["error"]["desc"]}')
            if 'return' in reply:
                return reply['return']

    def finish(self, job):
        """Wait for a job and dismiss it."""
        while True:
            state = next(j for j in self.command('query-jobs')
                         if j['id'] == job)
            if state['status'] == 'concluded':
                break
            time.sleep(0.05)
        self.command('job-dismiss', id=job)
        if 'error' in state:
            raise Trouble(f'{job}: {state["error"]}')

    def nodes(self):
        return [n for n in self.command('query-named-block-nodes', flat=True)
                if n['drv'] == 'thinvm']

    def node(self, volume):
        """The node of the image on a volume, or None."""
        wanted = self.same(volume)
        for n in self.nodes():
            if self.same(n['file']) == wanted:
                return n['node-name']
        return None

    @staticmethod
    def same(volume):
        iscsi = ISCSI.match(volume)
        if iscsi or volume.startswith('json:'):
            return volume
        return os.path.realpath(volume)

    def require(self, volume):
        node = self.node(volume)
        if not node:
            raise Trouble(f'this QEMU does not have {volume} open')
        return node

    def size(self, node):
        return next(n['image']['virtual-size'] for n in self.nodes()
                    if n['node-name'] == node)

    def in_use_as_top(self, volume):
        """Is it open, and no other image's backing file?"""
        node = self.node(volume)
        return node is not None and node not in self.parents()

    def parents(self):
        """Nodes that are a backing file."""
        graph = self.command('x-debug-query-block-graph')
        names = {n['id']: n['name'] for n in graph['nodes']}
        return {names[e['child']] for e in graph['edges']
                if e['name'] == 'backing'}

    def create(self, volume, parent, name):
        """The guest goes on on a new image; what was there is a snapshot."""
        base = self.require(parent)
        if base in self.parents():
            raise Trouble(f'{parent} is not the top of its chain')
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
            self.command('blockdev-del', node_name=file_node)
            raise
        try:
            self.command('blockdev-snapshot', node=base, overlay=name)
        except Trouble:
            self.command('blockdev-del', node_name=name)
            self.command('blockdev-del', node_name=file_node)
            raise

    def merge(self, volume, child, parent):
        """The child gets what only the image on volume has."""
        arguments = {}
        node = self.node(volume)
        if not node:
            return              # done by a command that was interrupted
        if parent:
            arguments = {'base-node': self.require(parent),
                         'backing-file': parent}
        job = f'{node}-stream'
        self.command('block-stream', **{'job-id': job, 'auto-dismiss': False,
                                        'device': self.require(child)},
                     **arguments)
        self.finish(job)
        for name in node, f'{node}-file':
            try:
                self.command('blockdev-del', node_name=name)
            except Trouble:
                pass            # QEMU has done it, or opened it itself
