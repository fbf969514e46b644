# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon: one task for each QMP socket, one request for each volume.

Sockets are looked for again and again, so that VMs may come and go.  A volume
is looked at when THINVM_SPACE_LOW comes and once a second, and extended when
the policy says so.  Where another host may have extended it (this one follows
the image: it is the target of a migration) the host is made to see the new
size as soon as the image tells of it.  Whether an earlier run of the daemon
was interrupted between extending and telling does not matter: thinvm-grow
takes into use whatever the device has, and the backend is asked for a total
size.
"""

import asyncio
import glob
import json
import logging
import time

from . import policy
from .backends import Failure, device_size
from .qmp import Closed, Connection, QmpError

log = logging.getLogger('thinvm-extender')

POLL = 1.0                      # seconds between two looks at a VM
SEARCH = 5.0                    # between two looks for sockets
RETRY = 5.0                     # before a failed extension is tried again


def path_of(filename):
    """The path in a block node's file name, json: names included; of a LUN
    the URL; '' of what has neither."""
    if not filename.startswith('json:'):
        return filename
    node = json.loads(filename[5:])
    while isinstance(node.get('file'), dict):
        node = node['file']
    if node.get('driver') == 'iscsi':
        return f"iscsi://{node['portal']}/{node['target']}/{node.get('lun', 0)}"
    return node.get('filename') or node.get('file.filename') or ''


class Volume:
    def __init__(self, vm, node, path):
        self.vm, self.node, self.path = vm, node, path
        self.name = f'{vm.path}:{node}'
        self.task = None
        self.not_before = 0.0
        self.wanted = 0


class Vm:
    """A QMP socket and the thinvm volumes behind it."""

    def __init__(self, daemon, path):
        self.daemon, self.path = daemon, path
        self.connection = Connection(path, self.on_event)
        self.volumes = {}
        self.woken = asyncio.Event()
        self.stalled = False    # guest or job may wait for space

    def on_event(self, event, data):
        if event == 'THINVM_SPACE_LOW':
            node = data['node-name']
            log.info('%s: %s has %d bytes free of %d, allocates %d a second',
                     self.path, node, data['free'], data['size'],
                     data['allocation-rate'])
            self.daemon.metrics.add('thinvm_low_space_events_total',
                                    f'{self.path}:{node}')
            if node in self.volumes:
                self.volumes[node].wanted = data['wanted-size']
            self.woken.set()
        elif event == 'BLOCK_IO_ERROR' and data.get('nospace'):
            log.warning('%s: %s is full, the guest gets: %s', self.path,
                        data.get('node-name'), data.get('action'))
            self.stalled = True
            self.woken.set()
        elif event == 'STOP' or (event == 'BLOCK_JOB_ERROR' and
                                 data.get('action') == 'stop'):
            self.stalled = True
            self.woken.set()
        elif event == 'RESUME':
            self.stalled = False

    async def run(self):
        listener = None
        try:
            await self.connection.open()
            listener = asyncio.create_task(self.connection.listen())
            await self.connection.cmd('qmp_capabilities')
            log.info('%s: connected', self.path)
            self.stalled = True         # it may have been before we came
            while not listener.done():
                await self.look()
                try:
                    await asyncio.wait_for(self.woken.wait(), POLL)
                except asyncio.TimeoutError:
                    pass
                self.woken.clear()
        except (Closed, QmpError) as e:
            log.warning('%s', e)
        finally:
            if listener:
                listener.cancel()
            self.connection.close()
            for volume in self.volumes.values():
                self.daemon.metrics.forget(volume.name)

    async def find(self, infos):
        """Keep self.volumes equal to the nodes that there are."""
        there = {i['node-name'] for i in infos}
        for gone in set(self.volumes) - there:
            self.daemon.metrics.forget(self.volumes.pop(gone).name)
        if there - set(self.volumes):
            nodes = await self.connection.cmd('query-named-block-nodes',
                                              flat=True)
            for node in nodes:
                name = node['node-name']
                if name in there and name not in self.volumes:
                    self.volumes[name] = Volume(self, name,
                                                path_of(node['file']))

    async def look(self):
        infos = await self.connection.cmd('query-thinvm')
        await self.find(infos)
        for info in infos:
            volume = self.volumes.get(info['node-name'])
            if volume:
                self.daemon.consider(volume, info)
        if self.stalled and not any(
                v.task and not v.task.done() for v in self.volumes.values()):
            await self.resume(infos)

    async def resume(self, infos):
        """Let a guest go on that werror=enospc has stopped, if it can."""
        if any(i['device-free'] < policy.MIB for i in infos if i['owner']):
            return
        self.stalled = False
        await self.resume_jobs()
        try:
            status = await self.connection.cmd('query-status')
            devices = await self.connection.cmd('query-block')
        except QmpError:                # a storage daemon has no guest
            return
        if status['status'] == 'io-error' and \
                any(d.get('io-status') == 'nospace' for d in devices):
            log.info('%s: there is space again, the guest goes on', self.path)
            await self.connection.cmd('cont')

    async def resume_jobs(self):
        """Mirrors and backups to here that on-target-error has paused."""
        for job in await self.connection.cmd('query-block-jobs'):
            if job['io-status'] == 'nospace' and job['paused']:
                log.info('%s: there is space again, the job %s goes on',
                         self.path, job['device'])
                try:
                    await self.connection.cmd('block-job-resume',
                                              device=job['device'])
                except QmpError as e:   # it may just have been cancelled
                    log.warning('%s: %s', self.path, e)


class Daemon:
    def __init__(self, patterns, backend, limits, metrics, metrics_file=None):
        self.patterns, self.backend = patterns, backend
        self.limits, self.metrics = limits, metrics
        self.metrics_file = metrics_file
        self.delay = policy.Delay(limits.first_delay)
        self.vms = {}
        self.under_way = set()
        self.stopping = False

    def consider(self, volume, info):
        if info['owner']:
            for name, key in (('size_bytes', 'device-size'),
                              ('free_bytes', 'device-free'),
                              ('allocation_rate', 'allocation-rate')):
                self.metrics.set(f'thinvm_volume_{name}', volume.name,
                                 info[key])
        if (volume.task and not volume.task.done()) or self.stopping or \
                time.monotonic() < volume.not_before:
            return              # one request at a time
        if self.is_stale(volume, info['device-size']):
            self.begin(volume, self.refresh(volume, info['device-size']))
        elif info['owner']:
            self.consider_space(volume, info)

    def consider_space(self, volume, info):
        need = policy.Need(info['device-size'], info['device-free'],
                           info['space-watermark'], info['allocation-rate'],
                           volume.wanted)
        size = policy.next_size(need, self.delay.seconds, self.limits)
        if size > need.size:
            volume.wanted = 0
            self.begin(volume, self.extend(volume, need.size, size))

    def begin(self, volume, work):
        volume.task = asyncio.create_task(work)
        self.under_way.add(volume.task)
        volume.task.add_done_callback(self.under_way.discard)

    def is_stale(self, volume, size):
        """Does this host see less of the volume than the image has?"""
        try:
            return self.backend.refreshes and device_size(volume.path) < size
        except Failure:
            return False

    async def refresh(self, volume, size):
        log.info('%s: the image on %s has %d bytes, which this host does not '
                 'see yet', volume.name, volume.path, size)
        try:
            await self.backend.refresh(volume.path)
            seen = device_size(volume.path)
            if seen < size:
                raise Failure(f'the image has {size} bytes, but '
                              f'{volume.path} only {seen}')
            log.info('%s: %s is seen with %d bytes', volume.name, volume.path,
                     seen)
        except Failure as e:
            self.failed(volume, e)

    def failed(self, volume, e):
        volume.not_before = time.monotonic() + RETRY
        self.metrics.add('thinvm_extension_failures_total', volume.name)
        log.error('%s: %s; trying again in %d s', volume.name, e, RETRY)

    async def extend(self, volume, before, size):
        started = time.monotonic()
        log.info('%s: extending %s from %d to %d bytes', volume.name,
                 volume.path, before, size)
        try:
            size = await self.backend.extend(volume.path, size)
            after = await volume.vm.connection.cmd(
                'thinvm-grow', node_name=volume.node, size=size)
        except (Failure, QmpError, Closed) as e:
            self.failed(volume, e)
            return
        seconds = time.monotonic() - started
        self.delay.add(seconds)
        self.metrics.add('thinvm_extensions_total', volume.name)
        self.metrics.add('thinvm_extended_bytes_total', volume.name,
                         after['device-size'] - before)
        self.metrics.set('thinvm_extension_seconds', volume.name,
                         round(self.delay.seconds, 3))
        log.info('%s: has %d bytes after %.2f s, %d free', volume.name,
                 after['device-size'], seconds, after['device-free'])

    def search(self):
        found = {p for pattern in self.patterns for p in glob.glob(pattern)}
        for path in found:
            task = self.vms.get(path)
            if task is None or task.done():
                self.vms[path] = asyncio.create_task(Vm(self, path).run())
        for path in [p for p, t in self.vms.items()
                     if p not in found and t.done()]:
            del self.vms[path]

    async def run(self, stop):
        """Until the event @stop is set; requests under way are finished."""
        while not stop.is_set():
            self.search()
            if self.metrics_file:
                self.metrics.write(self.metrics_file)
            try:
                await asyncio.wait_for(stop.wait(), SEARCH)
            except asyncio.TimeoutError:
                pass
        # A program of LVM that is killed may leave a volume suspended
        self.stopping = True
        await asyncio.gather(*self.under_way, return_exceptions=True)
        for task in self.vms.values():
            task.cancel()
        await asyncio.gather(*self.vms.values(), return_exceptions=True)
