# SPDX-License-Identifier: GPL-2.0-or-later
#
# What was built: the programs, and that they can do what thinvm promises
# of them.

import json
import os
import subprocess
import tempfile
import threading

import helpers
from helpers import TempTest

PROGRAMS = ('qemu-system-x86_64', 'qemu-img', 'qemu-io', 'qemu-nbd',
            'qemu-storage-daemon', 'thinvm-template')
MACHINE = ['-machine', 'pc', '-accel', 'tcg', '-nodefaults',
           '-display', 'none']


def program(name):
    return str(helpers.BUILD / 'bin' / name)


def output(*command):
    p = subprocess.run(command, stdin=subprocess.DEVNULL, text=True,
                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                       timeout=60, check=False)
    return p.stdout


def qmp(command, *requests):
    """
    Start a program with QMP on its standard streams; its answers.  The next
    command waits for the answer: a program that quits does not finish one
    that is longer than the pipe.
    """
    answers = []
    with tempfile.TemporaryFile('w+') as errors, subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=errors, text=True) as p:
        timer = threading.Timer(60, p.kill)
        timer.start()
        for name, rest in (('qmp_capabilities', {}), *requests, ('quit', {})):
            p.stdin.write(json.dumps({'execute': name, **rest}) + '\n')
            p.stdin.flush()
            for line in p.stdout:
                answer = json.loads(line)
                if 'return' in answer or 'error' in answer:
                    answers.append(answer)
                    break
        p.stdin.close()
        p.stdout.read()
        status = p.wait()
        timer.cancel()
        if status:
            errors.seek(0)
            raise AssertionError(errors.read())
    return answers[1:-1]


class Programs(TempTest):
    def test_all_there(self):
        for name in PROGRAMS:
            self.assertIn('10.', output(program(name), '--version'), name)

    def test_thinvm_is_a_format(self):
        formats = output(program('qemu-img'), '--help').split(
            'formats:')[1].split()
        self.assertIn('thinvm', formats)

    def test_firmware_is_found(self):
        command = [program('qemu-system-x86_64'), *MACHINE, '-S',
                   '-device', 'VGA', '-device', 'e1000',
                   '-qmp', 'stdio']
        status = qmp(command, ('query-status', {}))[0]['return']
        self.assertEqual(status['status'], 'prelaunch')

    def test_accelerators(self):
        have = output(program('qemu-system-x86_64'), '-accel', 'help')
        self.assertIn('tcg', have)
        self.assertIn('kvm', have)

    def test_sandbox_vnc_and_user_network(self):
        command = [program('qemu-system-x86_64'), *MACHINE, '-S',
                   '-sandbox', 'on,spawn=deny,elevateprivileges=deny',
                   '-vnc', f'unix:{self.tmp}/vnc',
                   '-netdev', 'user,id=n0', '-qmp', 'stdio']
        vnc = qmp(command, ('query-vnc', {}))[0]['return']
        self.assertTrue(vnc['enabled'])

    def test_aio_back_ends(self):
        image = self.put('disk', '\0' * 4096)
        for aio in ('threads', 'native', 'io_uring'):
            text = output(program('qemu-io'), '-c', 'read 0 512',
                          '--image-opts', f'driver=file,filename={image},'
                          f'aio={aio},cache.direct=on')
            # A kernel may forbid io_uring; QEMU lacking it reads otherwise.
            self.assertNotIn('is not supported', text, aio)
            self.assertNotIn('Invalid parameter', text, aio)

    def test_protocols_and_exports(self):
        daemon = program('qemu-storage-daemon')
        schema = qmp([daemon, '--chardev', 'stdio,id=c',
                      '--monitor', 'chardev=c'],
                     ('query-qmp-schema', {}))[0]['return']
        values = {m['name'] for t in schema if t['meta-type'] == 'enum'
                  for m in t['members']}
        self.assertLessEqual({'fuse', 'vhost-user-blk', 'nbd', 'thinvm',
                              'iscsi'}, values)
        text = output(program('qemu-io'), '-c', 'quit',
                      'iscsi://127.0.0.1:1/iqn.x/1')
        self.assertNotIn('Unknown protocol', text)
        self.assertNotIn('Unknown driver', text)

    def test_commands_are_in_both_programs(self):
        system = [program('qemu-system-x86_64'), *MACHINE, '-S',
                  '-qmp', 'stdio']
        daemon = [program('qemu-storage-daemon'), '--chardev',
                  'stdio,id=c', '--monitor', 'chardev=c']
        for command in (system, daemon):
            names = {c['name'] for c in
                     qmp(command, ('query-commands', {}))[0]['return']}
            self.assertLessEqual({'query-thinvm', 'thinvm-set-cache-mode'},
                                 names, os.path.basename(command[0]))
