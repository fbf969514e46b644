# SPDX-License-Identifier: GPL-2.0-or-later
"""One live migration, from the checks to the report.

Whatever happens, at the end stands where the guest runs.  What decides that
is thinvm and QEMU; nothing here starts or stops a guest, but for cancelling
a migration that was told to be cancelled, or that takes longer than allowed.

The report is a dictionary, see report.py for how it is shown to people.
"""

import time

from . import sides
from .qmp import Gone, QmpError
from .sides import Following, Side

TICK = 0.2                      # seconds between two looks
SAMPLE = 1.0                    # seconds between two looks at the disks
ENDINGS = ('completed', 'failed', 'cancelled')
CANCEL_SECONDS = 120
SETTLE_SECONDS = 120
RESUME_SECONDS = 10             # after the target has done all its part


class Ended(Exception):
    """The migration will not take place; result is one of 'refused' (nothing
    was begun), 'cancelled', 'failed'."""

    def __init__(self, result, message):
        super().__init__(message)
        self.result = result


class Migration:
    def __init__(self, options, view):
        """@options: see the arguments of scripts/thinvm-migrate.  @view shows
        the progress: view.phase(text), view.progress(text), view.note(text).
        """
        self.options = options
        self.view = view
        self.begin = time.monotonic()
        self.source = self.target = None
        self.disks = []
        self.was_running = True
        self.begun = False              # migrate was sent
        self.stop_asked = False         # by a signal
        self.moved = None               # moments of STOP, RESUME
        self.stopped_at = self.resumed_at = None
        self.last = {}                  # the source's last query-migrate
        self.samples = {}               # (side, uuid): [(moment, info)]
        self.modes = []
        self.lost = []                  # THINVM_OWNERSHIP_LOST
        self.notes = []
        self.problems = []
        self.seconds = {}

    # -- Helpers ------------------------------------------------------

    def now(self):
        return time.monotonic() - self.begin

    def note(self, text):
        self.notes.append(text)
        self.view.note(text)

    def _node_disk(self, side, node):
        for disk in self.disks:
            if node == (disk.source_node if side is self.source else
                        disk.target_node):
                return disk
        return None

    def listen(self, seconds=0.0):
        """Take in the events of both sides; waits so long for the
        source's."""
        for side in self.target, self.source:
            if side.qmp.closed:
                continue
            try:
                side.qmp.poll(seconds if side is self.source else 0)
            except Gone:
                pass                    # whoever needs it will notice
            for event in side.qmp.take_events():
                self._heed(side, event)
        if self.source.qmp.closed and seconds:
            time.sleep(seconds)

    def _heed(self, side, event):
        at = round(event.moment - self.begin, 3)
        disk = self._node_disk(side, event.data.get('node-name'))
        if event.name == 'THINVM_CACHE_MODE_CHANGED' and disk:
            self.modes.append({'at': at, 'side': side.label,
                               'uuid': disk.uuid,
                               'mode': event.data['new-mode'],
                               'reason': event.data['reason']})
        elif event.name == 'THINVM_OWNERSHIP_LOST':
            self.lost.append({'at': at, 'side': side.label,
                              'node': event.data['node-name'],
                              'reason': event.data['reason']})
        elif event.name == 'STOP' and side is self.source:
            self.stopped_at = event.moment
        elif event.name == 'RESUME' and side is self.target:
            self.resumed_at = event.moment

    def sample(self):
        """What both sides say of the disks."""
        for side in self.source, self.target:
            if side.qmp.closed:
                continue
            try:
                infos = side.thinvm()
            except (Gone, QmpError):
                continue
            for disk in self.disks:
                node = (disk.source_node if side is self.source else
                        disk.target_node)
                if node in infos:
                    self.samples.setdefault((side.label, disk.uuid), []) \
                        .append((self.now(), infos[node]))

    def latest(self, label, uuid):
        samples = self.samples.get((label, uuid))
        return samples[-1][1] if samples else {}

    def heed_stop(self, doing):
        if self.stop_asked:
            raise Ended('cancelled', f'stopped by a signal while {doing}')

    # -- Before -------------------------------------------------------

    def connect(self):
        opt = self.options
        try:
            self.source = Side('source', opt.source, opt.qmp_timeout)
        except Gone as e:
            raise Ended('refused', f'cannot talk to the source: {e}') from None
        try:
            self.target = Side('target', opt.target, opt.qmp_timeout)
        except Gone as e:
            raise Ended('refused', f'cannot talk to the target: {e}') from None

    def check(self):
        self.view.phase('checking both sides')
        problems = self.problems
        if self.source.qmp.greeting == self.target.qmp.greeting and \
                self.options.source == self.options.target:
            raise Ended('refused', 'source and target are the same monitor')
        problems += sides.check_states(self.source, self.target)
        problems += sides.check_versions(self.source, self.target)
        problems += sides.check_machines(self.source, self.target)
        try:
            self.disks, more = sides.find_disks(self.source, self.target)
            problems += more
        except QmpError as e:
            raise Ended('refused', f'not a QEMU with thinvm: {e}') from None
        for disk in sides.other_disks(self.source):
            self.note(f"the source's disk {disk} is not thinvm: nothing is "
                      'known about it here')
        if problems:
            raise Ended('refused', 'the two do not fit together')
        self.was_running = self.source.status() == 'running'
        if not self.was_running:
            self.note('the guest is paused, and will be on the target')
        self.sample()
        for disk in self.disks:
            for label in 'source', 'target':
                info = self.latest(label, disk.uuid)
                self.modes.append({
                    'at': round(self.now(), 3), 'side': label,
                    'uuid': disk.uuid, 'mode': info['mapping-cache-mode'],
                    'reason': 'at the beginning'})

    def follow(self):
        self.view.phase('the target follows the source')
        following = Following(self.source, self.target, self.disks)
        while not following.look():
            self.heed_stop('checking')
            if following.late():
                self.problems += following.problems()
                raise Ended('refused', 'the target does not follow')
            self.listen(TICK)

    def preload(self):
        """Until the target has the mapping in its cache, or as much of it as
        fits."""
        start = self.now()
        if not self.options.preload:
            return
        self.view.phase('the target preloads the mapping')
        while True:
            self.sample()
            states = [self.latest('target', disk.uuid)['follower']
                      for disk in self.disks]
            left = [s for s in states
                    if s['preload'] not in ('complete', 'cache-full')]
            self.view.progress('preloaded: %d of %d disks, the slowest %d %%'
                               % (len(states) - len(left), len(states),
                                  min(s['preload-progress'] for s in states)))
            if not left:
                break
            self.heed_stop('preloading')
            if self.now() - start > self.options.preload_timeout:
                self.note('preloading is not complete after %d s; the target '
                          'reads the rest when it needs it'
                          % self.options.preload_timeout)
                break
            self.listen(SAMPLE)
        self.seconds['preload'] = round(self.now() - start, 3)

    # -- The migration ------------------------------------------------

    def configure(self):
        opt = self.options
        capabilities = {'events': True, 'return-path': True,
                        'multifd': bool(opt.multifd),
                        'postcopy-ram': opt.postcopy_after is not None,
                        'auto-converge': opt.auto_converge}
        # All that matters is said: an attempt before this one may have left
        # something else.
        parameters = {'downtime-limit': opt.downtime_limit,
                      'max-bandwidth': opt.bandwidth}
        if opt.multifd:
            parameters['multifd-channels'] = opt.multifd
        parameters.update(opt.parameter)
        for side in self.source, self.target:
            try:
                side.cmd('migrate-set-capabilities', {'capabilities': [
                    {'capability': name, 'state': state}
                    for name, state in capabilities.items()]})
                side.cmd('migrate-set-parameters', parameters)
            except QmpError as e:
                raise Ended('refused', f'the {side.label} does not accept the '
                            f'options of the migration: {e}') from None

    def open_channel(self):
        """The target listens; the URI for the source."""
        uri, listen = self.options.uri, self.options.listen
        if not listen:
            listen = uri
            if uri.startswith('tcp:'):
                listen = 'tcp:[::]:' + uri.rpartition(':')[2]
        try:
            self.target.cmd('migrate-incoming', {'uri': listen})
        except QmpError as e:
            raise Ended('refused', f'the target cannot listen at {listen}: '
                        f'{e}') from None
        if uri.startswith('tcp:') and uri.endswith(':0'):
            sockets = self.target.cmd('query-migrate').get('socket-address')
            if not sockets or 'port' not in sockets[0]:
                raise Ended('refused', 'the target does not say at which port '
                            'it listens; give one in --uri')
            uri = uri[:-1] + sockets[0]['port']
        return uri

    def start(self):
        self.view.phase('migrating')
        self.configure()
        uri = self.open_channel()
        self.heed_stop('preparing')
        self.sample()
        try:
            self.begun = True
            self.source.cmd('migrate', {'uri': uri})
        except QmpError as e:
            raise Ended('failed', f'the migration to {uri} does not begin: '
                        f'{e}') from None

    def watch(self):
        """Until the source knows how it ended."""
        start = sampled = self.now()
        asked_postcopy = cancel_until = False
        while True:
            self.last = self.source.cmd('query-migrate')
            status = self.last.get('status', 'none')
            if status in ENDINGS:
                break
            self._show(status, start)
            if status == 'postcopy-paused':
                raise Ended('failed', 'the network broke amid post-copy')
            if cancel_until:
                if self.now() > cancel_until:
                    raise Ended('failed', 'the migration is still '
                                f'{status} {CANCEL_SECONDS} s after it was '
                                'told to cancel')
            elif self._wants_cancel(start, status):
                self.view.phase('cancelling')
                self.source.cmd('migrate_cancel')
                cancel_until = self.now() + CANCEL_SECONDS
            if not asked_postcopy and status == 'active' and \
                    self.options.postcopy_after is not None and \
                    self.now() - start >= self.options.postcopy_after:
                self.view.phase('post-copy: the guest moves now')
                self.source.cmd('migrate-start-postcopy')
                asked_postcopy = True
            if self.now() - sampled >= SAMPLE:
                self.sample()
                sampled = self.now()
            self.listen(TICK)
        self.seconds['migration'] = round(self.now() - start, 3)
        if status == 'cancelled':
            raise Ended('cancelled', 'the migration was cancelled' + (
                '' if self.stop_asked or not cancel_until else
                f': not done in {self.options.timeout:g} s'))
        if status == 'failed':
            raise Ended('failed', 'the migration failed: ' +
                        self.last.get('error-desc', 'no reason given') +
                        (f" (the target: {self.target.qmp.closed})"
                         if self.target.qmp.closed else ''))
        if cancel_until:
            self.note('it was too late to cancel: the guest had moved')

    def _wants_cancel(self, start, status):
        limit = self.options.timeout
        if not self.stop_asked and not (limit and
                                        self.now() - start > limit):
            return False
        if status.startswith('postcopy'):
            if 'post-copy cannot be cancelled: the guest runs on the target ' \
                    'already' not in self.notes:
                self.note('post-copy cannot be cancelled: the guest runs on '
                          'the target already')
            return False
        return True

    def _show(self, status, start):
        ram = self.last.get('ram', {})
        total = ram.get('total', 0)
        left = ram.get('remaining', 0)
        self.view.progress('%s, %.0f s: %d of %d MiB sent, %d left, round %d, '
                           '%.1f MiB/s' % (
                               status, self.now() - start,
                               ram.get('transferred', 0) >> 20, total >> 20,
                               left >> 20, ram.get('dirty-sync-count', 0),
                               ram.get('mbps', 0) / 8.388608))

    # -- After --------------------------------------------------------

    def settle(self):
        """Until the guest runs on the target, which owns all disks."""
        self.view.phase('the target takes over')
        until = self.now() + SETTLE_SECONDS
        while True:
            self.listen(TICK)
            status = self.target.status()
            self.sample()
            owned = sum(self.latest('target', disk.uuid).get('owner', False)
                        for disk in self.disks)
            if status == 'running' and owned == len(self.disks):
                return
            if not self.was_running and status == 'paused':
                return
            if self.now() > until or (
                    self.now() > until - SETTLE_SECONDS + RESUME_SECONDS and
                    self.target.cmd('query-migrate').get('status') ==
                    'completed'):
                raise Ended('failed', 'the guest was sent to the target, '
                            f'where it is {status}, with {owned} of '
                            f'{len(self.disks)} disks')

    def observe(self):
        """How the target does in its first seconds."""
        until = self.now() + self.options.observe
        if self.options.observe:
            self.view.phase('watching the target for %g s'
                            % self.options.observe)
        while self.now() < until and not self.stop_asked:
            self.listen(min(TICK, max(until - self.now(), 0.01)))
        self.sample()

    def quit_source(self):
        if not self.options.quit_source or self.source.qmp.closed:
            return
        try:
            self.source.cmd('quit')
            self.note("the source's QEMU was told to quit")
        except (Gone, QmpError) as e:
            self.note(f"the source's QEMU did not quit: {e}")

    def give_up(self):
        """After a failure: let nothing stay half done.  Only a migration
        that cannot have moved the guest is cancelled here."""
        if not self.begun or self.source.qmp.closed:
            return
        try:
            status = self.source.cmd('query-migrate').get('status')
            if status in ('setup', 'active', 'pre-switchover', 'device'):
                self.source.cmd('migrate_cancel')
            until = self.now() + CANCEL_SECONDS
            while self.now() < until and self.source.cmd(
                    'query-migrate').get('status') in (
                        'setup', 'active', 'cancelling', 'device',
                        'pre-switchover'):
                self.listen(TICK)
            # The guest goes on, and its modes go back, just behind that.
            while self.now() < until and self.source.status() == \
                    'finish-migrate':
                self.listen(TICK)
            self.listen(TICK)
        except (Gone, QmpError):
            pass

    def _steps(self):
        self.connect()
        self.check()
        self.follow()
        self.preload()
        self.start()
        self.watch()
        self.settle()
        self.observe()

    def run(self):
        """Do it all: (result, message), see Ended; 'completed' otherwise."""
        result, message = 'completed', ''
        try:
            self._steps()
        except Ended as e:
            result, message = e.result, str(e)
        except (Gone, QmpError) as e:
            result = 'failed' if self.begun else 'refused'
            message = str(e)
        if result != 'completed':
            self.give_up()
        if self.source and self.target:
            self.listen()
            self.sample()
        if result == 'completed':
            self.quit_source()
        return result, message
