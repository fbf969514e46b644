# SPDX-License-Identifier: GPL-2.0-or-later
"""A host made out of namespaces: name, processes, mounts, and maybe network.

What runs on it takes itself for alone: other hosts' processes cannot be seen
or signalled from there, and thinvm sees another host's claims in theirs.  The
file system is shared but for a few directories.  It can be powered off (all
of its processes die at one moment), and frozen and thawed.

Needs root, or namespaces for users.
"""

import json
import os
import signal
import subprocess
import sys

from .context import Failure, Process, Skip, wait_for

INIT = os.path.join(os.path.dirname(os.path.abspath(__file__)),
                    'host_init.py')
OWN = {'/run': '755', '/dev/shm': '1777'}


class Host:
    def __init__(self, ctx, name, network=False, own=None, views=None):
        """@own: {directory: mode}, more that are empty and its own; @views:
        {directory: {name: target}}, symbolic links that it sees there beside
        what is there."""
        self.ctx = ctx
        self.name = name
        self.network = network
        ctx.need('unshare', 'util-linux')
        ctx.need('nsenter', 'util-linux')
        if subprocess.run([*self._unshare(), 'true'], check=False,
                          stdin=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL).returncode:
            raise Skip('no namespaces here')
        self._orders = {'name': name, 'network': network,
                        'own': list({**OWN, **(own or {})}.items()),
                        'views': views or {}}
        self.process = None
        self._services = []
        self.power_on()
        ctx.cleanup(self.power_off)

    def _unshare(self):
        argv = ['unshare', '--mount', '--uts', '--ipc', '--pid', '--fork',
                '--kill-child', '--mount-proc']
        if self.network:
            argv.append('--net')
        if os.geteuid():
            argv += ['--user', '--map-root-user']
        return argv

    def power_on(self):
        unique = self.ctx.unique('host-' + self.name)
        ready, orders = self.ctx.path(unique), self.ctx.path(unique + '.json')
        with open(orders, 'w', encoding='utf-8') as file:
            json.dump(dict(self._orders, ready=ready), file)
        self.process = Process(self.ctx, unique, [
            *self._unshare(), sys.executable, INIT, orders])

        def booted():
            self.process.check_alive()
            return os.path.exists(ready)

        wait_for(booted, 60, 'host %s is up' % self.name)
        pid = self.process.popen.pid
        with open('/proc/%d/task/%d/children' % (pid, pid),
                  encoding='ascii') as file:
            self.init = int(file.read().split()[0])
        self._pid_namespace = os.readlink('/proc/%d/ns/pid' % self.init)

    def inside(self, *argv):
        """The command line that runs @argv on this host."""
        enter = ['nsenter', '--target', str(self.init), '--mount', '--uts',
                 '--ipc', '--pid']
        if self.network:
            enter.append('--net')
        if os.geteuid():
            enter += ['--user', '--preserve-credentials']
        return [*enter, '--', *argv]

    def run(self, *argv, env=None, seconds=120):
        """(exit status, output, errors), logged."""
        self.ctx.log('%s + %s' % (self.name, ' '.join(argv)))
        try:
            done = subprocess.run(
                self.inside(*argv), stdin=subprocess.DEVNULL, env=env,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            raise Failure('%s on %s took more than %d s' % (
                argv[0], self.name, seconds)) from None
        out, err = (text.decode(errors='replace')
                    for text in (done.stdout, done.stderr))
        self.ctx.log('%s = %d %s%s' % (self.name, done.returncode,
                                       out[-3000:], err[-3000:]))
        return done.returncode, out, err

    def start(self, name, *argv, env=None):
        """A service: a Process whose output is a log of the test."""
        service = Process(self.ctx,
                          self.ctx.unique('%s-%s' % (self.name, name)),
                          self.inside(*argv), env=env)
        self._services.append(service)
        return service

    def _wake_services(self):
        """nsenter stops itself with its child, but nobody continues it, and
        a child that it does not bury keeps the host from ending."""
        for service in self._services:
            if service.alive():
                service.popen.send_signal(signal.SIGCONT)

    def _processes(self):
        for entry in os.listdir('/proc'):
            if not entry.isdigit():
                continue
            try:
                if os.readlink('/proc/%s/ns/pid' % entry) == \
                        self._pid_namespace:
                    yield int(entry)
            except OSError:
                pass

    def _signal_all(self, number, done):
        """Until all processes are in one of the states @done."""
        def all_are():
            count = 0
            for pid in self._processes():
                try:
                    with open('/proc/%d/stat' % pid, encoding='utf-8',
                              errors='replace') as file:
                        state = file.read().rpartition(')')[2].split()[0]
                    if state not in done:
                        os.kill(pid, number)
                        count += 1
                except OSError:
                    pass
            return count == 0
        return all_are

    def freeze(self):
        """No process of the host gets any further."""
        wait_for(self._signal_all(signal.SIGSTOP, 'TtZX'), 60,
                 'host %s is frozen' % self.name)

    def thaw(self):
        for pid in self._processes():
            try:
                os.kill(pid, signal.SIGCONT)
            except OSError:
                pass
        self._wake_services()

    def is_on(self):
        return self.process.alive()

    def power_off(self):
        """Its first process dies, and all others with it."""
        if self.process and self.process.alive():
            try:
                os.kill(self.init, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self._wake_services()
            self.process.wait(60)
