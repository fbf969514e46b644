# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's block jobs onto, over and from thin images while a guest writes."""

from lib.contents import scan
from lib.guest import Guest
from lib.image import GiB, File, create, format_node, require_clean
from lib.qsd import wait_job
from lib.testing import ANY, THIN, test
from lib.tgt import Target
from lib.vm import NODE, VM

SIZE = 1 * GiB


def add_node(ctx, vm, place, node, fmt=None, **more):
    vm.qmp.cmd_raw('blockdev-add', place.blockdev(node + '-file', 'a'))
    vm.qmp.cmd_raw('blockdev-add', format_node(ctx, node, node + '-file',
                                               fmt=fmt, **more))


def drop_node(vm, node):
    vm.qmp.cmd('blockdev-del', node_name=node)
    vm.qmp.cmd('blockdev-del', node_name=node + '-file')


def writing_guest(ctx, place, fmt=None, **options):
    options = dict({'lanes': 4, 'blocks': 800, 'stride': 69632, 'zero': 3,
                    'discard': 3}, **options)
    guest = Guest(ctx, **options)
    vm = VM(ctx, guest, place, fmt=fmt)
    guest.wait_ready()
    guest.start_writing()
    guest.wait_writes(1000)
    return guest, vm


@test(formats=ANY)
def mirror_raw_to_thin_to_qcow2(ctx):
    """A disk moves live from raw onto the format on a LUN and on to qcow2;
    the guest notices nothing."""
    target = Target(ctx)
    raw, qcow2 = File(ctx, 'raw'), File(ctx, 'qcow2')
    lun = target.add_lun(2 * GiB)
    create(ctx, raw, SIZE, 'raw')
    create(ctx, lun, SIZE)
    create(ctx, qcow2, SIZE, 'qcow2')
    guest, vm = writing_guest(ctx, raw, fmt='raw')
    steps = [('thin', lun, None, NODE), ('out', qcow2, 'qcow2', 'thin')]
    for node, place, fmt, source in steps:
        add_node(ctx, vm, place, node, fmt, discard='unmap')
        vm.qmp.cmd('blockdev-mirror', job_id='mirror', device=source,
                   target=node, sync='full')
        wait_job(vm.qmp, 'mirror')
        guest.wait_writes(300)
        if source != NODE:
            drop_node(vm, source)
            require_clean(ctx, lun)
    guest.stop_writing()
    guest.verify('read by the guest on the last disk')
    vm.quit()
    require_clean(ctx, qcow2, 'qcow2')
    guest.model.require(scan(ctx, guest.model, qcow2, 'qcow2'), 'acked',
                        'read by qemu-img')


@test(formats=ANY)
def backup_of_a_moment(ctx):
    """A backup holds the disk as it was when the job began, although the
    guest went on."""
    lun = Target(ctx).add_lun(2 * GiB)
    copy = File(ctx, 'copy')
    create(ctx, lun, SIZE)
    create(ctx, copy, SIZE)
    guest, vm = writing_guest(ctx, lun)
    guest.stop_writing()
    found = guest.verify('before the backup')
    guest.model.rebase(found)
    add_node(ctx, vm, copy, 'copy')
    vm.qmp.cmd('blockdev-backup', job_id='backup', device=NODE,
               target='copy', sync='full')
    guest.start_writing()
    wait_job(vm.qmp, 'backup')
    guest.wait_writes(300)
    guest.stop_writing()
    guest.verify('after the backup')
    drop_node(vm, 'copy')
    vm.quit()
    require_clean(ctx, lun)
    require_clean(ctx, copy)
    in_copy = scan(ctx, guest.model, copy)
    if in_copy != found:
        wrong = {key for key in set(found) | set(in_copy)
                 if found.get(key) != in_copy.get(key)}
        raise AssertionError('%d blocks of the backup are not those of its '
                             'moment: %s' % (len(wrong), sorted(wrong)[:5]))


def with_overlay(ctx):
    """(base, overlay, guest, vm): the guest began on base and now writes to
    an overlay over it."""
    target = Target(ctx)
    base, overlay = (target.add_lun(2 * GiB) for _ in range(2))
    create(ctx, base, SIZE)
    guest, vm = writing_guest(ctx, base)
    create(ctx, overlay, SIZE)
    vm.qmp.cmd_raw('blockdev-add', overlay.blockdev('top-file'))
    options = format_node(ctx, 'top', 'top-file')
    options['backing'] = None
    vm.qmp.cmd_raw('blockdev-add', options)
    vm.qmp.cmd('blockdev-snapshot', node=NODE, overlay='top')
    guest.wait_writes(800)
    return base, overlay, guest, vm


@test(formats=THIN)
def commit_active_layer(ctx):
    """The overlay is merged into its base under the guest's writes."""
    base, _, guest, vm = with_overlay(ctx)
    vm.qmp.cmd('block-commit', job_id='commit', device='top')
    wait_job(vm.qmp, 'commit')
    guest.wait_writes(300)
    guest.stop_writing()
    guest.verify('read by the guest after the commit')
    drop_node(vm, 'top')
    vm.quit()
    require_clean(ctx, base)
    guest.model.require(scan(ctx, guest.model, base), 'acked', 'read by qemu-img')


@test(formats=THIN)
def stream_into_the_overlay(ctx):
    """The overlay takes over all of its base and then stands alone."""
    _, overlay, guest, vm = with_overlay(ctx)
    vm.qmp.cmd('block-stream', job_id='stream', device='top')
    wait_job(vm.qmp, 'stream')
    guest.wait_writes(300)
    guest.stop_writing()
    guest.verify('read by the guest after the stream')
    drop_node(vm, NODE)
    vm.quit()
    require_clean(ctx, overlay)
    guest.model.require(scan(ctx, guest.model, overlay), 'acked',
                        'read by qemu-img')
