# SPDX-License-Identifier: GPL-2.0-or-later
"""What a migration came to: where the guest is, what to do, the figures.

Where the guest runs is asked from both sides at the end, whatever was
expected.  A side that does not answer is "gone": it may have ended, or its
host may be cut off or frozen, which no tool can tell from here.
"""

from .sides import Problem

# Figures of query-migrate that are worth keeping
RAM = ('total', 'transferred', 'dirty-sync-count', 'duplicate', 'normal',
       'postcopy-requests')


def _where(source, target):
    if source == 'running' and target == 'running':
        return 'both'
    if target == 'running':
        return 'target'
    if source == 'running':
        return 'source'
    return 'unknown' if 'gone' in (source, target) else 'nowhere'


def _owned(migration, label):
    return sum(bool(migration.latest(label, disk.uuid).get('owner'))
               for disk in migration.disks)


def _advise(migration, result, source, target):
    """(what is, what to do) for people."""
    count = len(migration.disks)
    where = _where(source, target)
    if not migration.source or not migration.target:
        return 'Nothing was begun.', 'Correct that, and start again.'
    lost = [entry for entry in migration.lost if entry['side'] == 'source']
    if where == 'both':
        return ('Both sides say that their guest runs. The source owns '
                f'{_owned(migration, "source")} of {count} disks, the target '
                f'{_owned(migration, "target")}; on the other side every '
                'write fails.', 'Stop the guest of the side that does not '
                'own the disks.')
    if where == 'target':
        todo = {'ended': 'Nothing.', 'gone': 'See to it that the source\'s '
                'QEMU, which does not answer, has ended.'}
        return ('The guest runs on the target.', todo.get(
            source, 'End the source\'s QEMU (quit). Do not let its guest go '
            'on: its disks belong to the target.'))
    if where == 'source' and lost:
        return ('The guest runs on the source, but has lost its disks: '
                + lost[0]['reason'] + '.', 'Stop it. Start the guest anew '
                'from its disks; all that it had flushed is there.')
    if where == 'source':
        owned = _owned(migration, 'source')
        first = 'The guest runs on the source' + (
            f', which owns all of its {count} disks.' if owned == count else
            '.' if not count else f', which owns {owned} of {count} disks.')
        if not migration.begun:
            return (first + ' Nothing was begun.',
                    'Correct that, start the target\'s QEMU anew if it has '
                    'ended, and try again.')
        return (first, 'End the target\'s QEMU if it has not ended. To try '
                'again, start it anew with -incoming defer.')
    if source == 'paused' and result != 'completed':
        return ('The guest stands on the source, paused as it was.',
                'To try again, start the target\'s QEMU anew.')
    if result == 'completed':
        return ('The guest is on the target, paused as it was.',
                'cont on the target lets it run. End the source\'s QEMU.')
    if source == 'gone' and target == 'gone':
        return ('Neither side answers: where the guest runs, if it does, is '
                'not known here.', 'Look at both hosts. If no QEMU runs '
                'there, start the guest from its disks, on the host that ran '
                'it last if possible; on another one after fencing that, '
                'with force-takeover=on.')
    if source == 'gone':
        return (f'The source is gone; the guest on the target is {target} '
                'and does not run.', 'Make sure that the source\'s QEMU has '
                'ended (fence its host). Then start the guest from its '
                'disks, on another host with force-takeover=on; all that it '
                'had flushed is there.')
    if target == 'gone':
        return (f'The target is gone; the guest on the source is {source} '
                'and does not run.', 'Make sure that the target\'s QEMU has '
                'ended. Then start the guest from its disks, on another '
                'host than the last owner\'s with force-takeover=on after '
                'fencing that; all that it had flushed is there.')
    if 'postcopy' in migration.last.get('status', ''):
        return ('The guest stands on the target, without the rest of its '
                'memory, which is on the source.', 'End neither. When the '
                'network is back: migrate-recover on the target with a new '
                'URI, then migrate with that URI and resume=true on the '
                'source.')
    return (f'The guest does not run: the source is {source} and owns '
            f'{_owned(migration, "source")} of {count} disks, the target is '
            f'{target} and owns {_owned(migration, "target")}.',
            'cont on the target makes it take its disks and run; why it did '
            'not is in the log of its QEMU. cont on the source takes the '
            'disks back, if the target owns none. Never both.')


def _rate(first, last):
    """Look-ups in the cache between two states of a node.  Counters begin
    anew when a follower starts over."""
    a = first.get('statistics', {})
    b = last.get('statistics', {})
    if not b:
        return None
    names = ('cache-hits', 'cache-misses', 'metadata-bytes-read')
    if any(b[name] < a.get(name, 0) for name in names):
        a = {}
    hits, misses, read = (b[name] - a.get(name, 0) for name in names)
    return {'hits': hits, 'misses': misses, 'metadata-bytes-read': read,
            'hit-percent': round(100 * hits / (hits + misses), 2)
            if hits + misses else None}


def _disk(migration, disk):
    """The figures of one disk."""
    there = migration.samples.get(('target', disk.uuid), [])
    owning = [info for _, info in migration.samples.get(
        ('source', disk.uuid), []) if info['owner']]
    follower = [info for _, info in there if not info['owner']]
    owner = [info for _, info in there if info['owner']]
    entry = {'uuid': disk.uuid, 'source-node': disk.source_node,
             'target-node': disk.target_node,
             'modes': [{key: value for key, value in mode.items()
                        if key != 'uuid'} for mode in migration.modes
                       if mode['uuid'] == disk.uuid]}
    if owning:
        entry['cache-before'] = _rate(owning[0], owning[-1])
        entry['fencing-before'] = owning[-1].get('fencing')
    if follower and 'follower' in follower[-1]:
        state = follower[-1]['follower']
        entry['preload'] = {
            'state': state['preload'], 'pages': state['preload-pages'],
            'percent': state['preload-progress']}
    if owner:
        entry['cache-after'] = _rate(follower[-1] if follower else {},
                                     owner[-1])
        entry['fencing-after'] = owner[-1].get('fencing')
        take = owner[-1].get('take-over')
        if take:
            entry['take-over'] = {
                'warm': take['warm'],
                'ms': round(take['duration-ns'] / 1e6, 3),
                'metadata-bytes-read': take['metadata-bytes-read'],
                'metadata-bytes-read-since':
                    take['metadata-bytes-read-since']}
    return entry


def _downtime(migration):
    """Milliseconds: as QEMU tells it, and as seen here between the events
    of both sides."""
    seen = None
    if migration.stopped_at and migration.resumed_at and \
            migration.resumed_at > migration.stopped_at:
        seen = round(1000 * (migration.resumed_at - migration.stopped_at), 1)
    return {'qemu': migration.last.get('downtime'), 'seen': seen}


def make(migration, result, message):
    source, target = (
        'gone' if side is None else side.status_or_none() or 'gone'
        for side in (migration.source, migration.target))
    if source == 'gone' and migration.source and result == 'completed' and \
            migration.options.quit_source:
        source = 'ended'
    situation, advice = _advise(migration, result, source, target)
    report = {
        'result': result, 'message': message, 'situation': situation,
        'advice': advice, 'guest-runs': _where(source, target),
        'problems': [{'what': problem.what, 'todo': problem.todo}
                     for problem in migration.problems
                     if isinstance(problem, Problem)],
        'notes': migration.notes,
        'seconds': dict(migration.seconds, total=round(migration.now(), 3)),
        'ownership-lost': migration.lost,
    }
    for label, side, status in (('source', migration.source, source),
                                ('target', migration.target, target)):
        report[label] = {'status': status}
        if side:
            report[label].update(address=side.address,
                                 version=side.version_text())
    if migration.begun:
        report['downtime-ms'] = _downtime(migration)
        report['ram'] = {name: migration.last.get('ram', {}).get(name)
                         for name in RAM}
    report['disks'] = [_disk(migration, disk) for disk in migration.disks]
    return report


def _cache_text(cache):
    if not cache or cache['hit-percent'] is None:
        return 'no look-ups'
    return '%.2f %% (%d of %d look-ups)' % (
        cache['hit-percent'], cache['hits'], cache['hits'] + cache['misses'])


def _disk_text(disk):
    yield f"disk {disk['source-node']}  {disk['uuid']}"
    for mode in disk['modes']:
        yield '  %8.3f s  %s: %s (%s)' % (mode['at'], mode['side'],
                                          mode['mode'], mode['reason'])
    if 'preload' in disk:
        yield '  preload     %s, %d %%, %d pages read' % (
            disk['preload']['state'], disk['preload']['percent'],
            disk['preload']['pages'])
    take = disk.get('take-over')
    if take:
        yield '  take-over   %s, %.1f ms, %d bytes of metadata read; since ' \
            'then %d' % ('warm' if take['warm'] else 'cold', take['ms'],
                         take['metadata-bytes-read'],
                         take['metadata-bytes-read-since'])
    if 'cache-before' in disk:
        yield '  cache hits  before: ' + _cache_text(disk['cache-before'])
    if 'cache-after' in disk:
        yield '              after:  ' + _cache_text(disk['cache-after'])


def text(report):
    """Lines for people."""
    if report['result'] != 'completed':
        yield f"{report['result']}: {report['message']}"
        for problem in report['problems']:
            yield '  - ' + problem['what']
            yield '    ' + problem['todo']
    yield report['situation']
    yield 'What to do: ' + report['advice']
    for note in report['notes']:
        yield 'note: ' + note
    for lost in report['ownership-lost']:
        yield f"the {lost['side']} lost disk {lost['node']} at " \
              f"{lost['at']:.3f} s: {lost['reason']}"
    if 'downtime-ms' in report:
        down = report['downtime-ms']
        figures = ['%s %.0f ms' % (name, value) for name, value in (
            ('by QEMU', down['qemu']), ('between the events', down['seen']))
            if value is not None]
        yield 'downtime: ' + (', '.join(figures) or 'none')
        yield 'time: ' + ', '.join(
            '%s %.1f s' % item for item in report['seconds'].items())
        if report['ram'].get('transferred') is not None:
            yield 'memory: %d MiB sent, %d rounds' % (
                report['ram']['transferred'] >> 20,
                report['ram']['dirty-sync-count'] or 0)
    for disk in report['disks']:
        yield from _disk_text(disk)
