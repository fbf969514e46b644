#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""The first process of a host that lib/host.py makes out of namespaces.

Takes its instructions as JSON: the host's name, directories of its own
(tmpfs), files and directories that it sees under another name, addresses of
its network.  Says "ready" in a file, then buries orphans until it is killed,
and with it all of the host.
"""

import json
import os
import signal
import socket
import subprocess
import sys


def run(*argv):
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)


def mount_all(orders):
    run('mount', '--make-rprivate', '/')
    for path, mode in orders['own']:
        run('mount', '-t', 'tmpfs', '-o', 'mode=' + mode, 'host', path)
    if os.path.exists('/proc/sysrq-trigger'):
        run('mount', '--bind', '/dev/null', '/proc/sysrq-trigger')
    for path, names in orders['views'].items():
        view(path, names)


def view(path, names):
    """The directory @path gets the entries @names besides its own."""
    copy = '/run/view-' + path.strip('/').replace('/', '-')
    os.mkdir(copy)
    run('mount', '--bind', path, copy)
    run('mount', '-t', 'tmpfs', '-o', 'mode=755', 'host', path)
    for entry in os.listdir(copy):
        os.symlink(os.path.join(copy, entry), os.path.join(path, entry))
    for name, target in names.items():
        where = os.path.join(path, name)
        os.makedirs(os.path.dirname(where), exist_ok=True)
        os.symlink(target, where)


def bury(*_):
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def main():
    with open(sys.argv[1], encoding='utf-8') as file:
        orders = json.load(file)
    socket.sethostname(orders['name'])
    mount_all(orders)
    if orders['network']:
        run('ip', 'link', 'set', 'lo', 'up')
    with open(orders['ready'], 'w', encoding='utf-8') as file:
        file.write('ready')
    signal.signal(signal.SIGCHLD, bury)
    while True:
        signal.pause()


if __name__ == '__main__':
    main()
