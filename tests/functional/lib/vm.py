# SPDX-License-Identifier: GPL-2.0-or-later
"""A QEMU process with the test guest, and live migration between two.

Each VM stands for one host: it has its own iSCSI initiator name, so that the
same LUN is opened by what the target takes for two machines.  The disk is
always a chain of named nodes: <name>-file (protocol) and <name> (format).
"""

import json
import time

from .context import Failure, Process, check
from .guest import Port, boot_files
from .image import format_node
from .qmp import QMP

NODE = 'disk'


class VM:
    def __init__(self, ctx, guest, place, host='a', incoming=False, mode=None,
                 interval=None, cpus=1, iothread=False, memory=128,
                 extra=(), sandbox=False, user=None, fmt=None, disk=None,
                 device=None, second=None):
        """Start QEMU; with @incoming it waits for migrate-incoming.

        @place is where the image lies, @second that of a second disk that
        the guest does not touch.  @disk overrides the list of block nodes
        (the last one must be named NODE), @device the device's options.
        """
        self.ctx = ctx
        self.guest = guest
        self.name = ctx.unique('qemu-' + host)
        kernel, initrd = boot_files(ctx)
        qmp_path = ctx.path(self.name + '.qmp')
        port_path = ctx.path(self.name + '.port')
        argv = [
            ctx.bin('qemu-system-x86_64'), '-name', self.name,
            '-no-user-config', '-nodefaults', '-display', 'none',
            '-machine', 'pc,accel=tcg', '-cpu', 'qemu64',
            '-m', str(memory), '-smp', str(cpus),
            '-kernel', kernel, '-initrd', initrd,
            '-append', 'console=ttyS0 quiet nowatchdog mitigations=off '
                       'cryptomgr.notests oops=panic panic=-1 rdinit=/init',
            '-serial', 'file:' + ctx.log_file(self.name + '-console'),
            '-chardev', 'socket,id=qmp,server=on,wait=off,path=' + qmp_path,
            '-mon', 'chardev=qmp,mode=control',
            '-device', 'virtio-serial-pci',
            '-chardev', 'socket,id=port,server=on,wait=off,path=' + port_path,
            '-device', 'virtserialport,chardev=port,name=org.thinvm.test',
        ]
        if disk is None:
            disk = [place.blockdev(NODE + '-file', host),
                    format_node(ctx, NODE, NODE + '-file', mode, interval,
                                fmt)]
        for node in disk:
            argv += ['-blockdev', json.dumps(node)]
        if device is None:
            device = {'driver': 'virtio-blk-pci', 'drive': NODE,
                      'id': 'vda', 'write-cache': 'on'}
            for i in range(int(iothread)):
                argv += ['-object', 'iothread,id=io%d' % i]
            if int(iothread) == 1:
                device['iothread'] = 'io0'
            elif iothread:
                # Each thread serves queues of its own of the one disk.
                device['num-queues'] = int(iothread)
                device['iothread-vq-mapping'] = [
                    {'iothread': 'io%d' % i} for i in range(iothread)]
        if device:
            argv += ['-device', json.dumps(device)]
        if second:
            for node in (second.blockdev('second-file', host), format_node(
                    ctx, 'second', 'second-file', mode, interval, fmt)):
                argv += ['-blockdev', json.dumps(node)]
            # As JSON like the first one: QEMU makes the others before those.
            argv += ['-device', json.dumps({'driver': 'virtio-blk-pci',
                                            'drive': 'second'})]
        if incoming:
            argv += ['-incoming', 'defer']
        if sandbox:
            argv += ['-sandbox', 'on,spawn=deny,elevateprivileges=deny']
        argv += list(extra)
        self.process = Process(ctx, self.name, argv, user=user, group=user)
        self.qmp = QMP(ctx, qmp_path, self.process)
        self.port = Port(ctx, port_path, self.process, guest)
        if not incoming:
            guest.attach(self)

    def status(self):
        return self.qmp.cmd('query-status')['status']

    def kill(self):
        """The host dies.  Reports that it had sent still count."""
        self.process.kill()
        self.port.drain()
        self.qmp.close()

    def quit(self):
        """An orderly end of the process, as by a management tool."""
        self.qmp.cmd('quit')
        check(self.process.wait(60) == 0, '%s ended with %s: %s', self.name,
              self.process.popen.returncode, self.process.log_tail())
        self.port.drain()
        self.qmp.close()

    def migration_status(self):
        return self.qmp.cmd('query-migrate').get('status')


def begin_migration(src, dst, bandwidth=1 << 30, return_path=False,
                    pause=False, postcopy=False, multifd=False, channel=None):
    """Start migrating, through @channel if there is one; bandwidth in bytes
    a second."""
    ctx = src.ctx
    path = ctx.path(ctx.unique('mig'))
    capabilities = [{'capability': 'events', 'state': True},
                    {'capability': 'return-path', 'state': return_path},
                    {'capability': 'pause-before-switchover', 'state': pause},
                    {'capability': 'postcopy-ram', 'state': postcopy},
                    {'capability': 'multifd', 'state': multifd}]
    for vm in (src, dst):
        vm.qmp.cmd('migrate-set-capabilities', capabilities=capabilities)
        vm.qmp.events = [event for event in vm.qmp.events
                         if event['event'] != 'MIGRATION']
    src.qmp.cmd('migrate-set-parameters', max_bandwidth=bandwidth,
                downtime_limit=300)
    dst.qmp.cmd('migrate-incoming', uri='unix:' + (
        channel.target_path if channel else path))
    src.qmp.cmd('migrate', uri='unix:' + (channel.path if channel else path))


def wait_migration(vm, wanted, seconds=180):
    """Wait until the migration of @vm has one of the states @wanted."""
    end = time.monotonic() + seconds
    while True:
        status = vm.migration_status()
        if status in wanted:
            return status
        if status in ('completed', 'failed', 'cancelled'):
            info = vm.qmp.cmd('query-migrate')
            raise Failure('migration of %s is %s (%s) instead of %s' % (
                vm.name, status, info.get('error-desc'), '/'.join(wanted)))
        check(time.monotonic() < end, 'migration of %s is still %s after %d s',
              vm.name, status, seconds)
        time.sleep(0.05)


def finish_migration(src, dst, seconds=180):
    """Wait for the end; the guest then runs on dst.  Its figures."""
    src.qmp.cmd('migrate-set-parameters', max_bandwidth=1 << 32)
    wait_migration(src, ('completed',), seconds)
    dst.qmp.wait_event('RESUME', 60)
    src.guest.attach(dst)
    return src.qmp.cmd('query-migrate')


def migrate(src, dst, **options):
    """A whole live migration from src to dst; QEMU's figures of it."""
    begin_migration(src, dst, **options)
    return finish_migration(src, dst)
