# SPDX-License-Identifier: GPL-2.0-or-later
"""A qemu-storage-daemon, controlled through QMP."""

import time

from .context import Failure, Process, check
from .image import format_node
from .qmp import QMP


class StorageDaemon:
    def __init__(self, ctx, host='a', extra=(), user=None, env=None):
        self.ctx = ctx
        self.host = host
        self.name = ctx.unique('qsd-' + host)
        path = ctx.path(self.name + '.qmp')
        self.process = Process(ctx, self.name, [
            ctx.bin('qemu-storage-daemon'),
            '--chardev', 'socket,id=qmp,server=on,wait=off,path=' + path,
            '--monitor', 'chardev=qmp', *extra], user=user, group=user,
            env=env)
        self.qmp = QMP(ctx, path, self.process)
        self._nbd = None

    def add_disk(self, place, node='disk', mode=None, interval=None, fmt=None,
                 **more):
        """Open the image at @place as node @node (and @node-file)."""
        options = place.blockdev(node + '-file', self.host)
        for key in ('active', 'read_only'):
            if more.get(key) is not None:
                options[key.replace('_', '-')] = more[key]
        self.qmp.cmd_raw('blockdev-add', options)
        self.qmp.cmd_raw('blockdev-add', format_node(
            self.ctx, node, node + '-file', mode, interval, fmt, **more))

    def del_disk(self, node='disk'):
        self.qmp.cmd('blockdev-del', node_name=node)
        self.qmp.cmd('blockdev-del', node_name=node + '-file')

    def export_nbd(self, node='disk', writable=True, inactive=False):
        """Export @node by NBD; the path of the socket."""
        if not self._nbd:
            self._nbd = self.ctx.path(self.name + '.nbd')
            self.qmp.cmd_raw('nbd-server-start', {
                'addr': {'type': 'unix', 'data': {'path': self._nbd}},
                'max-connections': 0})
        options = {'type': 'nbd', 'id': 'nbd-' + node, 'node-name': node,
                   'name': node, 'writable': writable}
        if inactive:
            options['allow-inactive'] = True
        self.qmp.cmd_raw('block-export-add', options)
        return self._nbd

    def nbd_url(self, node='disk'):
        return 'nbd+unix:///%s?socket=%s' % (node, self._nbd)

    def nbd_path(self):
        return self._nbd

    def remove_export(self, name):
        self.qmp.cmd('block-export-del', id=name, mode='hard')
        self.qmp.wait_event('BLOCK_EXPORT_DELETED', 30,
                            lambda data: data['id'] == name)

    def kill(self):
        self.process.kill()
        self.qmp.close()

    def quit(self):
        self.qmp.cmd('quit')
        check(self.process.wait(60) == 0, '%s ended with %s: %s', self.name,
              self.process.popen.returncode, self.process.log_tail())
        self.qmp.close()


def wait_job(qmp, job, seconds=180):
    """Bring a block job to its good end (mirrors are completed)."""
    end = time.monotonic() + seconds
    while True:
        qmp.poll()
        for event in list(qmp.events):
            data = event.get('data', {})
            if data.get('device') == job or data.get('id') == job:
                if event['event'] == 'BLOCK_JOB_READY':
                    qmp.events.remove(event)
                    qmp.cmd('block-job-complete', device=job)
                elif event['event'] == 'BLOCK_JOB_COMPLETED':
                    qmp.events.remove(event)
                    check('error' not in data, 'job %s: %s', job,
                          data.get('error'))
                    return data
                elif event['event'] in ('BLOCK_JOB_ERROR',
                                        'BLOCK_JOB_CANCELLED'):
                    raise Failure('job %s: %s %s' % (job, event['event'],
                                                     data))
        check(time.monotonic() < end, 'job %s is not done in %d s: %s', job,
              seconds, qmp.cmd('query-block-jobs'))
        time.sleep(0.05)
