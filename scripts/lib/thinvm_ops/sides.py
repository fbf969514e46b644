# SPDX-License-Identifier: GPL-2.0-or-later
"""The two QEMUs of a migration, and what has to be right before it begins.

A check only asks.  All that is wrong is told at once, each with what to do.
"""

import dataclasses
import time

from .qmp import Gone, Qmp, QmpError

# The target sees the heartbeat of the source's claim move: longer than a few
# of its periods, and it is not the same device (or not the same claim).
FOLLOW_SECONDS = 20


@dataclasses.dataclass
class Problem:
    what: str
    todo: str


@dataclasses.dataclass
class Disk:
    """A disk that is to be handed over, on both sides."""
    uuid: str
    source_node: str
    target_node: str = ''


class Side:
    """Source or target."""

    def __init__(self, label, address, seconds):
        self.label = label
        self.address = address
        self.qmp = Qmp(address, seconds)
        self.cmd = self.qmp.cmd
        v = self.qmp.greeting['version']
        self.version = tuple(v['qemu'][part]
                             for part in ('major', 'minor', 'micro'))
        self.package = v.get('package', '')

    def version_text(self):
        return '.'.join(map(str, self.version)) + (
            f' ({self.package})' if self.package else '')

    def status(self):
        return self.cmd('query-status')['status']

    def thinvm(self):
        """query-thinvm as {node name: state}"""
        return {info['node-name']: info for info in self.cmd('query-thinvm')}

    def status_or_none(self):
        """None: it is gone."""
        try:
            return self.status()
        except (Gone, QmpError):
            return None


def _nodes(side):
    """{name: BlockDeviceInfo} of all nodes."""
    return {node['node-name']: node for node in
            side.cmd('query-named-block-nodes', {'flat': True})}


def _buffered(node, nodes):
    """Does @node lie on a file or device that is read through the page
    cache?"""
    return any(other['drv'] in ('file', 'host_device') and
               other['file'] == node['file'] and
               not other['cache']['direct'] for other in nodes.values())


def check_states(source, target):
    status = source.status()
    if status not in ('running', 'paused'):
        yield Problem(f'the guest on the source is {status}, not running',
                      'Bring it to run (cont, or what the state asks for) '
                      'before it is moved.')
    busy = source.cmd('query-migrate').get('status')
    if busy in ('setup', 'active', 'pre-switchover', 'device', 'cancelling',
                'postcopy-active', 'postcopy-paused', 'wait-unplug'):
        yield Problem(f'a migration of the source is {busy} already',
                      'Let it end, or cancel it (migrate_cancel).')
    status = target.status()
    if status != 'inmigrate':
        yield Problem(f'the target is {status} and does not wait for a '
                      'migration', 'Start it anew with -incoming defer; each '
                      'start serves one attempt.')


def check_versions(source, target):
    if target.version[:2] < source.version[:2]:
        yield Problem(f'the target\'s QEMU, {target.version_text()}, is older '
                      f'than the source\'s, {source.version_text()}',
                      'Migrate to the same version or a later one.')


def _machine(side):
    return {
        'machine type': side.cmd('qom-get', {'path': '/machine',
                                             'property': 'type'}),
        'memory': side.cmd('query-memory-size-summary')['base-memory'],
        'processors': len(side.cmd('query-cpus-fast')),
    }


def check_machines(source, target):
    there = _machine(target)
    for what, value in _machine(source).items():
        if value != there[what]:
            yield Problem(f'{what}: {value} on the source, {there[what]} on '
                          'the target', 'Start the target with the options '
                          'that the source was started with.')


def find_disks(source, target):
    """(disks, problems): pairs of nodes with images of the same UUID."""
    disks, problems = [], []
    nodes = _nodes(source)
    there = _nodes(target)
    offered = {}
    for name, info in target.thinvm().items():
        if name in there and not there[name]['ro']:
            offered.setdefault(info['uuid'], []).append(name)
    for name, info in sorted(source.thinvm().items()):
        if name not in nodes or nodes[name]['ro']:
            continue
        disk = Disk(info['uuid'], name)
        disks.append(disk)
        problems += _check_source_disk(info, nodes[name], nodes)
        names = offered.pop(info['uuid'], [])
        if len(names) == 1:
            disk.target_node = names[0]
            problems += _check_target_disk(there[names[0]], there)
        elif names:
            problems.append(Problem(
                f"image {info['uuid']} is open twice on the target: "
                + ', '.join(names), 'Open each image once.'))
        else:
            problems.append(Problem(
                f"the target does not have image {info['uuid']}, which is "
                f"the source's disk '{name}'", 'Open the same device on the '
                'target as on the source.'))
    for uuid, names in offered.items():
        problems.append(Problem(
            f"the target's disk '{names[0]}' is image {uuid}, which the "
            'source does not have', 'A wrong image, or a copy that was '
            'created anew: open the device that the source has open.'))
    if not disks:
        problems.append(Problem('the source has no thinvm disk that it '
                                'writes', 'Is it the right QEMU?'))
    return disks, problems


def _check_source_disk(info, node, nodes):
    name = info['node-name']
    if info['ownership-lost']:
        yield Problem(f"the source has lost its disk '{name}': "
                      f"{info.get('lost-reason', 'another owner took it')}",
                      'Stop that guest; the other owner has the disk.')
    elif not info['owner'] and info['mapping-cache-mode'] != 'migration':
        yield Problem(f"the source does not own its disk '{name}'",
                      'Find out who does (query-thinvm: image-owner).')
    if _buffered(node, nodes):
        yield Problem(f"the source's disk '{name}' goes through its host's "
                      'page cache, so the target cannot follow it',
                      'Run guests that are to be moved with cache.direct=on '
                      'for the file or device below.')


def _check_target_disk(node, nodes):
    if _buffered(node, nodes):
        yield Problem(f"the target's disk '{node['node-name']}' is read "
                      "through its host's page cache, so it cannot follow "
                      'the source', 'Start the target with cache.direct=on '
                      'for the file or device below.')


def other_disks(source):
    """Node names of writable disks of the guest that are not thinvm's."""
    for block in source.cmd('query-block'):
        inserted = block.get('inserted')
        if inserted and not inserted['ro'] and inserted['drv'] != 'thinvm':
            yield f"{inserted.get('node-name') or block['device']} " \
                  f"({inserted['drv']})"


class Following:
    """Does the target follow the source's claim, on the same device?

    An image with the right UUID may be a copy: a snapshot of the array, say.
    The target must see the claim that the source holds, and a heartbeat that
    the source wrote after this began.
    """

    def __init__(self, source, target, disks):
        self._source, self._target = source, target
        self._waiting = {}
        infos = source.thinvm()
        for disk in disks:
            claim = infos[disk.source_node].get('image-owner')
            if claim and infos[disk.source_node]['owner']:
                self._waiting[disk.uuid] = (disk, claim)
        self._until = time.monotonic() + FOLLOW_SECONDS

    def _sees(self, disk, claim, infos):
        seen = infos[disk.target_node].get('image-owner', {})
        return ('follower' in infos[disk.target_node] and
                seen.get('epoch') == claim['epoch'] and
                seen.get('process') == claim['process'] and
                seen.get('counter', 0) > claim.get('counter', 0))

    def look(self):
        """True when the target follows all of the disks."""
        infos = self._target.thinvm()
        for uuid, (disk, claim) in list(self._waiting.items()):
            if self._sees(disk, claim, infos):
                del self._waiting[uuid]
        return not self._waiting

    def late(self):
        return time.monotonic() > self._until

    def problems(self):
        infos = self._target.thinvm()
        for disk, claim in self._waiting.values():
            info = infos[disk.target_node]
            if 'follower' not in info:
                yield Problem(f"the target does not follow its disk "
                              f"'{disk.target_node}'", 'It needs reads that '
                              'no page cache answers: cache.direct=on.')
                continue
            seen = info.get('image-owner', {})
            yield Problem(
                f"the target's disk '{disk.target_node}' has the UUID of the "
                f"source's '{disk.source_node}', but is not the same device: "
                f"the source's claim is epoch {claim['epoch']} of process "
                f"{claim['process']}, counter {claim.get('counter', 0)} and "
                f"rising; the target sees epoch {seen.get('epoch')} of "
                f"process {seen.get('process')}, counter "
                f"{seen.get('counter', 0)}",
                'It may be a copy of the device: open the one that the '
                'source has open.')
