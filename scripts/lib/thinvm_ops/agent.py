# SPDX-License-Identifier: GPL-2.0-or-later
"""The actions of the resource agent scripts/ocf/thinvm-vm.

Each run of the agent is one action.  What it may rely on is what Pacemaker
promises: actions of one resource on one node come one after the other, and a
start comes only when the resource is stopped everywhere, or its node fenced.
What it must keep: a VM that is stopped leaves no owner and no process; a start
never takes disks from somebody who may still write (claims.py).

A migration is pulled by the target.  migrate_to, on the source, leaves a
process behind that tries to reach the target and then sends the guest there;
migrate_from, on the target, starts a QEMU that preloads first and listens
then, and waits for the guest.  So nothing but the migration itself goes from
node to node, and no QMP socket is open to the network.
"""

import os
import shutil
import subprocess
import sys
import time
import zlib

from . import agent_meta, claims
from .claims import NotOurs
from .qmp import Gone, Qmp, QmpError
from .vmconfig import ConfigError, VMConfig
from .vmprocess import StartError, VMProcess, wait_until

SUCCESS, GENERIC, ARGS, UNIMPLEMENTED = 0, 1, 2, 3
INSTALLED, CONFIGURED, NOT_RUNNING = 5, 6, 7

# The guest of such a QEMU is here, whether it stands still or runs.
HERE = ('running', 'paused', 'io-error', 'watchdog', 'debug', 'suspended',
        'prelaunch', 'save-vm', 'restore-vm', 'finish-migrate', 'colo')
PORT_BASE, PORTS = 49152, 4096


class Result(Exception):
    """Ends the action with an exit status; the reason is shown by the
    cluster's tools."""

    def __init__(self, status, reason=''):
        super().__init__(reason)
        self.status = status


def log(text):
    print(f'thinvm-vm: {text}', file=sys.stderr, flush=True)


class Agent:
    def __init__(self, environment):
        self._env = environment
        self.begin = time.monotonic()

    # -- Parameters ---------------------------------------------------

    def parameter(self, name):
        kind, default, required, _, _ = agent_meta.PARAMETERS[name]
        value = self._env.get('OCF_RESKEY_' + name) or default or ''
        if required and not value:
            raise Result(CONFIGURED, f'parameter {name} is not set')
        if kind == 'integer':
            if not value.isdigit() or int(value) > 10 ** 6:
                raise Result(CONFIGURED, f'parameter {name} is "{value}", '
                             'not a number from 0 to 1000000')
            return int(value)
        return value

    def name(self):
        name = self.parameter('name') or self._env.get(
            'OCF_RESOURCE_INSTANCE', 'vm').split(':')[0]
        if not name or '/' in name or name.startswith('.') or len(name) > 60:
            raise Result(CONFIGURED, f'"{name}" is no name for a VM')
        return name

    def process(self):
        name = self.name()
        return VMProcess(name, self.parameter('state_dir'),
                         self.parameter('log') or
                         f'/var/log/thinvm-vm/{name}.log')

    def config(self):
        try:
            return VMConfig(self.parameter('config'))
        except ConfigError as e:
            raise Result(ARGS, str(e)) from None

    def qemu(self):
        program = shutil.which(self.parameter('qemu'))
        if not program:
            raise Result(INSTALLED,
                         f'{self.parameter("qemu")} is not installed here')
        return program

    def port(self):
        return self.parameter('migration_port') or \
            PORT_BASE + zlib.crc32(self.name().encode()) % PORTS

    def timeout(self, action):
        """Seconds that the cluster gives to the action that runs."""
        text = self._env.get('OCF_RESKEY_CRM_meta_timeout', '')
        if text.isdigit() and int(text) >= 1000:
            return int(text) / 1000
        return agent_meta.ACTIONS[action][0]

    def left(self, action, share=0.9):
        """Seconds until that share of the time is over, 1 at least."""
        return max(self.begin + share * self.timeout(action) -
                   time.monotonic(), 1.0)

    def is_probe(self):
        return self._env.get('OCF_RESKEY_CRM_meta_interval', '0') == '0'

    # -- What is -----------------------------------------------------

    def look(self, process, seconds):
        """(QMP connection, run state, names of disks that were lost and why)
        of a QEMU that runs; Gone if it does not answer."""
        qmp = process.connect(seconds)
        status = qmp.cmd('query-status')['status']
        lost = {info['node-name']: info.get('lost-reason', 'no reason known')
                for info in qmp.cmd('query-thinvm') if info['ownership-lost']}
        return qmp, status, lost

    def state(self, process, action='monitor'):
        """(exit status as of monitor, reason)"""
        if process.pid() is None:
            if process.started_here() and not self.is_probe():
                return NOT_RUNNING, 'QEMU has ended'
            return NOT_RUNNING, ''
        try:
            qmp, status, lost = self.look(process, self.left(action, 0.8))
            qmp.close()
        except (Gone, QmpError) as e:
            return GENERIC, f'QEMU does not answer: {e}'
        if lost:
            return GENERIC, 'ownership lost: ' + '; '.join(
                f'{name}: {why}' for name, why in sorted(lost.items()))
        if status in ('inmigrate', 'postmigrate'):
            # On its way; whose it is, the action of the migration decides
            return NOT_RUNNING, f'the guest is not here ({status})'
        if status not in HERE:
            return GENERIC, f'the guest is {status}'
        if status == 'io-error':
            log('the guest stands still after an I/O error (no space?)')
        return SUCCESS, ''

    # -- Actions ------------------------------------------------------

    def validate_all(self):
        self.qemu()
        config = self.config()
        for name in agent_meta.PARAMETERS:
            self.parameter(name)
        self.name()
        if self.parameter('takeover') not in ('cluster', 'never'):
            raise Result(CONFIGURED, 'parameter takeover is '
                         f'"{self.parameter("takeover")}", not "cluster" or '
                         '"never"')
        if self.port() > 65535:
            raise Result(CONFIGURED, f'{self.port()} is no TCP port')
        try:
            self.parameter('migration_host').format(node='x')
        except (KeyError, IndexError, ValueError):
            raise Result(CONFIGURED, 'migration_host may have {node} in '
                         'braces and nothing else') from None
        return config

    def monitor(self):
        process = self.process()
        status, reason = self.state(process)
        if status == GENERIC and self.is_probe() and \
                reason.startswith('ownership lost'):
            # The VM was taken over by another node while this one was out of
            # it.  What is left here is no VM; not to be found running twice,
            # it goes now.
            log(f'{reason}; what is left of the VM is killed')
            if process.kill():
                process.forget()
                raise Result(NOT_RUNNING)
        raise Result(status, reason)

    def spawn(self, process, config, extra, take_over, action):
        """A QMP connection to the new QEMU, whose disks are open."""
        argv = [self.qemu(), *config.arguments(take_over)]
        if not config.has('-name'):
            argv += ['-name', f'guest={process.name}']
        child = process.spawn([*argv, *extra])
        try:
            return process.wait_qmp(child, time.monotonic() +
                                    self.left(action))
        except StartError as e:
            process.kill()
            process.forget()
            raise Result(GENERIC, f'QEMU does not start: {e}') from None

    def clear(self, process):
        """Before a start: what runs here and is no VM goes."""
        if process.pid() is None:
            return
        log(f'process {process.pid()} is left of an earlier run; it is killed')
        if not process.kill():
            raise Result(GENERIC, f'process {process.pid()} cannot be killed')

    def start(self):
        config = self.validate_all()
        process = self.process()
        if self.state(process, 'start')[0] == SUCCESS:
            log('runs already')
            return
        self.clear(process)
        try:
            found = claims.owners(config, self.qemu(),
                                  self.parameter('state_dir'),
                                  self.left('start', 0.5))
            take_over = claims.to_take(found, self.parameter('takeover'))
        except StartError as e:
            raise Result(GENERIC,
                         f'the disks cannot be looked at: {e}') from None
        except NotOurs as e:
            raise Result(GENERIC, str(e)) from None
        for node in take_over:
            log(f"disk '{node}' is taken over from process "
                f"{found[node]['process']} on host "
                f"'{found[node]['host-name']}', which was fenced")
        qmp = self.spawn(process, config, [], take_over, 'start')
        self.check_owned(qmp, config)
        status = qmp.cmd('query-status')['status']
        qmp.close()
        if status not in HERE:
            raise Result(GENERIC, f'the guest is {status}')

    def check_owned(self, qmp, config):
        owned = {info['node-name'] for info in qmp.cmd('query-thinvm')
                 if info['owner']}
        missing = sorted(set(config.disks()) - owned)
        if missing:
            raise Result(GENERIC, 'QEMU runs, but does not own '
                         + ', '.join(missing))

    def stop(self):
        process = self.process()
        was_here = process.started_here()
        process.end_sender()
        if process.pid() is not None:
            self.end(process)
        if was_here:
            self.close_leftovers()
        process.forget()

    def end(self, process):
        """However it stands, QEMU ends; kindly as long as there is time."""
        try:
            qmp, status, lost = self.look(process, self.left('stop', 0.2))
        except (Gone, QmpError) as e:
            log(f'QEMU does not answer and is killed: {e}')
            qmp, status, lost = None, '', {}
        if qmp and not lost and status in ('running', 'suspended'):
            share = self.parameter('shutdown_timeout') or \
                self.left('stop', 2 / 3)
            try:
                qmp.cmd('system_powerdown')
                if not process.wait_end(min(share, self.left('stop', 0.8))):
                    log('the guest does not shut down; QEMU is told to quit')
            except (Gone, QmpError):
                pass                    # it may have been quick
        if qmp and not lost and process.pid() is not None:
            try:
                qmp.cmd('quit')
            except (Gone, QmpError):
                pass
            process.wait_end(self.left('stop', 0.85))
        if process.pid() is not None:
            log('QEMU is killed')
            if not process.kill(self.left('stop', 0.95)):
                raise Result(GENERIC, f'process {process.pid()} cannot be '
                             'killed')

    def close_leftovers(self):
        """After a death, no owner shall be left; if that cannot be had (the
        storage is away), the next start on this node does it, or one on
        another node takes over by force."""
        try:
            count = claims.close_leftovers(
                self.config(), self.qemu(), self.parameter('state_dir'),
                self.left('stop', 0.95))
            if count:
                log(f'closed {count} disks that QEMU had left open')
        except (StartError, Gone, QmpError, Result) as e:
            log(f'the disks cannot be closed: {e}')

    # -- Migration ----------------------------------------------------

    def migrate_to(self):
        self.validate_all()
        node = self._env.get('OCF_RESKEY_CRM_meta_migrate_target')
        if not node:
            raise Result(ARGS, 'the cluster does not say where to')
        process = self.process()
        status, reason = self.state(process, 'migrate_to')
        if status != SUCCESS:
            raise Result(GENERIC, reason or 'the VM does not run here')
        host = self.parameter('migration_host').format(node=node)
        if ':' in host:
            host = f'[{host}]'
        process.end_sender()
        with open(process.log, 'ab') as output:
            sender = subprocess.Popen(
                [sys.executable, os.path.abspath(sys.argv[0]), 'send',
                 f'tcp:{host}:{self.port()}'], stdin=subprocess.DEVNULL,
                stdout=output, stderr=output, start_new_session=True, cwd='/')
        process.note_sender(sender.pid)
        log(f'the guest is being sent to {host}, port {self.port()}')

    def set_migration(self, qmp):
        multifd = self.parameter('migration_multifd')
        qmp.cmd('migrate-set-capabilities', {'capabilities': [
            {'capability': 'return-path', 'state': True},
            {'capability': 'multifd', 'state': multifd > 0}]})
        parameters = {
            'max-bandwidth': self.parameter('migration_bandwidth') << 20,
            'downtime-limit': self.parameter('migration_downtime_limit')}
        if multifd:
            parameters['multifd-channels'] = multifd
        qmp.cmd('migrate-set-parameters', parameters)

    def send(self, uri):
        """What migrate_to leaves behind: tries until the target listens, then
        watches.  Its output goes to QEMU's log."""
        limit = self.parameter('migration_timeout')
        qmp = Qmp(self.process().sender_path, 60)
        self.set_migration(qmp)
        status = told = ''
        while time.monotonic() - self.begin <= limit:
            status, again = self.try_to_send(qmp, uri, limit)
            if not again:
                break
            if status != told:
                log(f'sending to {uri}: {status}; trying again')
                told = status
            time.sleep(0.5)
        log(f'sending to {uri} ended: {status}')

    def try_to_send(self, qmp, uri, limit):
        """One attempt: how it ended, and whether it may be repeated."""
        try:
            qmp.cmd('migrate', {'uri': uri})
        except QmpError as e:
            return str(e), True         # nobody listens yet, say
        cancelled = False
        while True:
            info = qmp.cmd('query-migrate')
            status = info.get('status', 'none')
            if status in ('completed', 'cancelled'):
                return status, False
            if status == 'failed':
                reason = info.get('error-desc', 'no reason given')
                return f'failed: {reason}', 'connect' in reason.lower()
            if time.monotonic() - self.begin > limit and not cancelled:
                log(f'not done in {limit} s: cancelled')
                qmp.cmd('migrate_cancel')
                cancelled = True
            time.sleep(0.3)

    def migrate_from(self):
        config = self.validate_all()
        process = self.process()
        if self.state(process, 'migrate_from')[0] == SUCCESS:
            log('the guest is here already')
            return
        self.clear(process)
        qmp = self.spawn(process, config, ['-incoming', 'defer'], (),
                         'migrate_from')
        try:
            self.receive(qmp, config)
        except (Gone, QmpError) as e:
            process.kill()
            raise Result(GENERIC, 'the guest did not arrive: '
                         f'{process.said() or e}') from None
        except Result:
            process.kill()
            raise
        qmp.close()

    def receive(self, qmp, config):
        self.wait_preload(qmp)
        self.set_migration(qmp)
        qmp.cmd('migrate-incoming', {'uri': f'tcp:[::]:{self.port()}'})

        def arrived():
            return qmp.cmd('query-status')['status'] not in \
                ('inmigrate', 'finish-migrate')

        if not wait_until(arrived, self.left('migrate_from')):
            raise Result(GENERIC, 'the guest did not arrive in time')
        if qmp.cmd('query-status')['status'] != 'running':
            log('the guest stands still, as it did where it came from; it '
                'takes its disks when it goes on')
            return
        # Taking the disks over comes with, or just before, the first step.
        wait_until(lambda: all(info['owner'] for info in
                               qmp.cmd('query-thinvm')
                               if info['node-name'] in config.disks()), 10)
        self.check_owned(qmp, config)

    def wait_preload(self, qmp):
        def loaded():
            return all(info.get('follower', {}).get('preload') in
                       ('complete', 'cache-full')
                       for info in qmp.cmd('query-thinvm')
                       if info['mapping-cache-mode'] == 'migration')

        if not wait_until(loaded, min(self.parameter('preload_timeout'),
                                      self.left('migrate_from', 0.5))):
            log('preloading is not complete; the guest comes all the same')


USAGE = 'usage: thinvm-vm ' + '|'.join(sorted(agent_meta.ACTIONS))


def run(words, environment):
    """The exit status of one action."""
    agent = Agent(environment)
    action = words[0] if words else ''
    actions = {'start': agent.start, 'stop': agent.stop,
               'monitor': agent.monitor, 'status': agent.monitor,
               'migrate_to': agent.migrate_to,
               'migrate_from': agent.migrate_from,
               'validate-all': agent.validate_all}
    if action == 'meta-data':
        print(agent_meta.metadata())
        return SUCCESS
    if action in ('usage', 'help'):
        print(USAGE)
        return SUCCESS
    try:
        if action == 'send' and len(words) == 2:
            agent.send(words[1])
        elif action in actions:
            actions[action]()
        else:
            print(USAGE, file=sys.stderr)
            return UNIMPLEMENTED
    except Result as e:
        if str(e):
            print(f'ocf-exit-reason:{e}', file=sys.stderr)
        return e.status
    except (Gone, QmpError, OSError) as e:
        print(f'ocf-exit-reason:{action}: {e}', file=sys.stderr)
        return GENERIC
    return SUCCESS
