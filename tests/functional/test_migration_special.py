# SPDX-License-Identifier: GPL-2.0-or-later
"""Live migrations that differ from the plain one in something that matters
to the driver: queues in other threads, postcopy, devices without SCSI, a
second disk, a block job that holds on to the source, a death right after.
"""

import json
import os
import struct
import time

from lib.contents import Contents, scan
from lib.context import Failure, Skip, check
from lib.guest import Guest
from lib.image import (GiB, MiB, File, NBDExport, create, format_node,
                       require_clean)
from lib.load import expect_mode, finish, setup_pair
from lib.qmp import QMPError
from lib.qsd import StorageDaemon, wait_job
from lib.testing import ANY, OURS, THIN, test
from lib.tgt import Target
from lib.vm import (NODE, VM, begin_migration, finish_migration, migrate,
                    wait_migration)

NEVER = 600 * 1000          # mapping-flush-interval in ms: not by time


@test(seconds=400, formats=ANY)
def with_iothread(ctx):
    """Two virtual CPUs, two queues and an iothread, four migrations; lanes
    meet in the same clusters."""
    options = {'cpus': 2, 'iothread': True}
    lun, guest, vm = setup_pair(ctx, vm_options=options, lanes=8, blocks=500,
                                stride=4096, zero=3, discard=3)
    for turn in range(4):
        target = VM(ctx, guest, lun, host='ba'[turn % 2], incoming=True,
                    **options)
        migrate(vm, target)
        guest.wait_writes(200)
        vm.quit()
        vm = target
    finish(ctx, lun, guest, vm)


@test(seconds=300, formats=ANY)
def postcopy(ctx):
    """The guest runs on the target before its memory is there."""
    lun, guest, source = setup_pair(ctx)
    target = VM(ctx, guest, lun, host='b', incoming=True)
    try:
        begin_migration(source, target, bandwidth=1 << 20, postcopy=True)
    except QMPError as err:
        raise Skip('no postcopy here: ' + err.desc) from None
    wait_migration(source, ('active',))
    expect_mode(source, 'writethrough')
    source.qmp.cmd('migrate-start-postcopy')
    finish_migration(source, target)
    expect_mode(target, 'writeback')
    guest.wait_writes(300)
    source.quit()
    finish(ctx, lun, guest, target)


@test(seconds=300, formats=ANY)
def two_disks(ctx):
    """A guest with two disks; both are handed over, also after a failure."""
    array = Target(ctx)
    lun, second = array.add_lun(2 * GiB), array.add_lun(1 * GiB)
    create(ctx, lun, 2 * GiB)
    create(ctx, second, 1 * GiB)
    _, guest, source = setup_pair(ctx, place=lun,
                                  vm_options={'second': second})
    target = VM(ctx, guest, lun, host='b', second=second, incoming=True)
    begin_migration(source, target, bandwidth=256 << 10)
    wait_migration(source, ('active',))
    expect_mode(source, 'writethrough', node='second')
    target.kill()
    wait_migration(source, ('failed',))
    expect_mode(source, 'writeback', node='second')
    target = VM(ctx, guest, lun, host='b', second=second, incoming=True)
    migrate(source, target)
    expect_mode(target, 'writeback', node='second')
    guest.wait_writes(200)
    source.quit()
    finish(ctx, lun, guest, target)
    require_clean(ctx, second)


class Unclaimable:
    """A place whose image a host cannot make its own."""

    def __init__(self, lun, event='thinvm_claim_write', once=False):
        self._lun = lun
        self._error = {'event': event, 'iotype': 'write', 'errno': 5,
                       'once': once}

    def blockdev(self, node, host='a'):
        return {'driver': 'blkdebug', 'node-name': node,
                'image': self._lun.blockdev(node + '-lun', host),
                'inject-error': [self._error]}


@test(seconds=300, formats=OURS)
def one_disk_cannot_be_activated(ctx):
    """The target gets one of two disks and cannot get the other: it returns
    the one, unused, and the guest goes on where it came from."""
    array = Target(ctx)
    lun, second = array.add_lun(1 * GiB), array.add_lun(1 * GiB)
    create(ctx, lun, 1 * GiB)
    create(ctx, second, 1 * GiB)
    _, guest, source = setup_pair(ctx, place=lun,
                                  vm_options={'second': second})
    target = VM(ctx, guest, lun, host='b', second=Unclaimable(second),
                incoming=True)
    begin_migration(source, target)
    wait_migration(source, ('completed',))
    wait_migration(target, ('completed',))
    expect_mode(target, 'migration')
    check(target.status() != 'running', 'the target runs on one disk')
    source.qmp.cmd('cont')
    guest.attach(source)
    guest.wait_writes(200)
    target.kill()
    finish(ctx, lun, guest, source)
    require_clean(ctx, second)


@test(seconds=300, formats=OURS)
def device_error_while_taking_over(ctx):
    """The target has claimed the disk and cannot write its first record: it
    returns the disk, and the guest goes on where it came from."""
    lun, guest, source = setup_pair(ctx)
    target = VM(ctx, guest, Unclaimable(lun, 'thinvm_journal_write', True),
                host='b', incoming=True)
    begin_migration(source, target)
    wait_migration(source, ('completed',))
    expect_mode(target, 'migration')
    check(target.status() != 'running', 'the target runs without a disk')
    target.kill()
    source.qmp.cmd('cont')
    guest.attach(source)
    guest.wait_writes(200)
    finish(ctx, lun, guest, source)


class FailingClaim:
    """A LUN to which the claim of ownership that is written after @number of
    them is not, once."""

    def __init__(self, lun, number):
        self._lun = lun
        self._number = number

    def blockdev(self, node, host='a'):
        event = 'thinvm_claim_write'
        last = self._number + 1
        return {'driver': 'blkdebug', 'node-name': node,
                'image': self._lun.blockdev(node + '-lun', host),
                'set-state': [{'event': event, 'state': n, 'new_state': n + 1}
                              for n in range(1, last)],
                'inject-error': [{'event': event, 'state': last, 'errno': 5,
                                  'iotype': 'write', 'once': True}]}


@test(seconds=300, formats=OURS)
def claim_that_fails(ctx):
    """A source that is to go on cannot claim the disk; then somebody else
    writes it.  The guest's memory is older than the disk from then on, whatever
    the source had wanted to claim.  Nobody else: it may go on."""
    array = Target(ctx)
    for other in (False, True):
        lun = array.add_lun(1 * GiB)
        create(ctx, lun, 1 * GiB)
        # it opens the image, gives it up, says that it is not free any more
        _, guest, source = setup_pair(ctx, place=FailingClaim(lun, 3))
        source.qmp.cmd('migrate', uri='exec:cat > /dev/null')
        wait_migration(source, ('completed',))
        expect_mode(source, 'migration')
        refused(source, 'claim')
        if other:
            ctx.run(ctx.bin('qemu-io'), '-f', ctx.fmt, '-c',
                    'write -P 7 0 64k', lun.url)
            refused(source, 'older than its disk')
            source.kill()
        else:
            source.qmp.cmd('cont')
            guest.wait_writes(200)
            finish(ctx, lun, guest, source)


@test(seconds=300, formats=OURS)
def returned_though_used(ctx):
    """Somebody has written the disk of a guest that was sent away, and his
    claim is gone.  The next one claims his epoch, finds it in the journal,
    and cannot claim another: the disk that he returns was used."""
    lun, guest, source = setup_pair(ctx)
    source.qmp.cmd('migrate', uri='exec:cat > /dev/null')
    wait_migration(source, ('completed',))
    expect_mode(source, 'migration')
    qemu_io = [ctx.bin('qemu-io'), '-c', 'write -P 7 0 64k']
    ctx.run(*qemu_io, '-f', ctx.fmt, lun.url)
    forget_newest_claim(lun)
    once = FailingClaim(lun, 1).blockdev('once', 'b')
    text = ctx.run(*qemu_io, 'json:' + json.dumps(
        {'driver': ctx.fmt, 'file': once}), ok=range(1, 120))
    check('Cannot write the claim' in text, 'the second claim: %s', text)
    refused(source, 'older than its disk')
    source.kill()


def forget_newest_claim(lun):
    with open(lun.path, 'r+b') as device:
        blocks = [(64 << 10) + 4096 * slot for slot in range(16)]
        claims = {struct.unpack('<8xQ', os.pread(device.fileno(), 16, at)): at
                  for at in blocks}
        os.pwrite(device.fileno(), bytes(4096), claims[max(claims)])


def refused(vm, why):
    """The guest does not go on, and that is the reason."""
    try:
        vm.qmp.cmd('cont')
    except QMPError as err:
        check(why in err.desc, 'cont fails: %s', err.desc)
    else:
        raise Failure('cont worked, though it must not')


@test(seconds=300, formats=ANY)
def over_nbd(ctx):
    """The shared device is an NBD export: of fixed size, without SCSI."""
    store = StorageDaemon(ctx, host='store')
    store.add_disk(File(ctx, 'device', 2 * GiB), node='device', fmt='raw')
    place = NBDExport(ctx, store, 'device')
    create(ctx, place, 1 * GiB)
    _, guest, source = setup_pair(ctx, place=place)
    for host in 'ba':
        target = VM(ctx, guest, place, host=host, incoming=True)
        migrate(source, target)
        guest.wait_writes(200)
        source.quit()
        source = target
    finish(ctx, place, guest, source)


@test(seconds=300, formats=ANY)
def on_a_growing_file(ctx):
    """The image is a plain file that two processes of one host share; it
    grows under the one while the other has it open."""
    place = File(ctx, 'image')
    create(ctx, place, 4 * GiB)
    _, guest, source = setup_pair(ctx, place=place)
    for host in 'ba':
        target = VM(ctx, guest, place, host=host, incoming=True)
        guest.wait_writes(1000)
        migrate(source, target)
        guest.wait_writes(1000)
        source.quit()
        source = target
    finish(ctx, place, guest, source)


@test(seconds=300, formats=OURS)
def handover_is_durable(ctx):
    """What the guest was told is written before it moved is there, even if
    the target dies before it has committed anything itself."""
    options = {'interval': NEVER}
    lun, guest, source = setup_pair(ctx, vm_options=options, flush=0)
    target = VM(ctx, guest, lun, host='b', incoming=True, **options)
    guest.wait_writes(300)
    begun = time.monotonic()
    begin_migration(source, target)
    finish_migration(source, target)
    stopped = source.qmp.wait_event('STOP', 20)['received']
    # a quick move may be over in less than the margin
    sure = guest.acked_before(max(begun, stopped - 0.5))
    target.kill()
    source.kill()
    check(sum(sure) > 100, 'only %d writes before the move', sum(sure))
    require_clean(ctx, lun)
    found = scan(ctx, guest.model, lun)
    guest.model.require(found, sure, 'acknowledged before the move')


def three_layers(ctx, luns, host):
    """Options of a VM whose disk lies over "middle" over "base"."""
    nodes = []
    for node, lun, backing in zip(('base', 'middle', NODE), luns,
                                  (None, 'base', 'middle')):
        nodes.append(lun.blockdev(node + '-file', host))
        nodes.append(format_node(
            ctx, node, node + '-file',
            read_only=True if node != NODE else None))
        nodes[-1]['backing'] = backing
    # The job makes the lower nodes writable; so must be what is below them.
    for node in nodes:
        if node['node-name'].endswith('-file'):
            node['auto-read-only'] = True
    return {'host': host, 'disk': nodes}


@test(seconds=300, formats=THIN)
def job_holds_on_to_the_source(ctx):
    """A commit of the middle layer that is not done forbids to give its
    base up, and says so when the driver has already done its part: the
    migration fails, job and guest go on with disks that work."""
    array = Target(ctx)
    luns = [array.add_lun(1 * GiB) for _ in range(3)]
    for lun in luns:
        create(ctx, lun, 1 * GiB)
    ctx.run(ctx.bin('qemu-io'), '-f', ctx.fmt, '-c', 'write -P 7 512M 64M',
            luns[1].url)
    guest = Guest(ctx, lanes=2, blocks=300)
    source = VM(ctx, guest, None, **three_layers(ctx, luns, 'a'))
    guest.wait_ready()
    guest.start_writing()
    source.qmp.cmd('block-commit', job_id='commit', device=NODE,
                   top_node='middle', base_node='base', speed=256 << 10)
    guest.wait_writes(300)
    target = VM(ctx, guest, None, incoming=True,
                **three_layers(ctx, luns, 'b'))
    begin_migration(source, target)
    wait_migration(source, ('failed',))
    target.kill()
    check(source.status() == 'running', 'the source is %s', source.status())
    expect_mode(source, 'writeback')
    guest.wait_writes(300)
    source.qmp.cmd('block-job-set-speed', device='commit', speed=0)
    wait_job(source.qmp, 'commit')
    guest.wait_writes(200)
    finish(ctx, luns[2], guest, source)
    require_clean(ctx, luns[0])
    contents = Contents(ctx, luns[0])
    check(contents.read(512 * MiB, MiB) == bytes([7]) * MiB,
          'the commit did not bring the data of the middle layer')
    contents.close()


@test(seconds=300, formats=THIN, slow=True)
def other_machine_options(ctx):
    """Nothing of thinvm is in the migration stream: a source with the format
    and a target whose disk the management tool has meanwhile converted to
    raw agree about the stream."""
    array = Target(ctx)
    lun, plain = array.add_lun(1 * GiB), array.add_lun(1 * GiB)
    create(ctx, lun, 1 * GiB)
    _, guest, source = setup_pair(ctx, place=lun, lanes=2, blocks=300)
    guest.stop_writing()
    guest.verify('before the migration')
    source.qmp.cmd('stop')
    ctx.run(ctx.bin('qemu-img'), 'convert', '-U', '-n', '-f', ctx.fmt, '-O',
            'raw', lun.url, plain.url)
    target = VM(ctx, guest, plain, host='b', fmt='raw', incoming=True)
    begin_migration(source, target)
    wait_migration(source, ('completed',))
    source.quit()
    guest.attach(target)
    target.qmp.cmd('cont')
    guest.verify('on the raw copy')
    target.quit()
    require_clean(ctx, lun)


@test(seconds=300, formats=ANY)
def array_restarts(ctx):
    """The array is away for some seconds: the guest's requests wait, then
    go on; nothing is lost.  (The array's own cache survives.)"""
    array = Target(ctx)
    lun = array.add_lun(2 * GiB)
    create(ctx, lun, 2 * GiB)
    _, guest, vm = setup_pair(ctx, place=lun)
    array.stop()
    time.sleep(2)
    array.restart()
    guest.wait_writes(300, seconds=120)
    finish(ctx, lun, guest, vm)


def plugged(name, lun, host):
    """Options of a disk at a place of its own on the bus."""
    return [lun.blockdev(name + '-file', host),
            {'driver': 'thinvm', 'node-name': name, 'file': name + '-file',
             'cache': {'direct': True}},
            {'driver': 'virtio-blk-pci', 'drive': name, 'id': 'dev-' + name,
             'addr': '0x10'}]


def owned(ctx, lun):
    """Is another host, without an order, refused to open @lun for writing?"""
    other = StorageDaemon(ctx, host='other')
    try:
        other.add_disk(lun)
    except QMPError as err:
        ctx.log('refused: ' + err.desc)
        return True
    finally:
        other.quit()
    return False


@test(seconds=300, formats=OURS)
def hot_plug(ctx):
    """A disk is plugged in before a migration and out after it; a node that
    is added while one is under way is handed over with the others."""
    array = Target(ctx)
    lun, hot, late = (array.add_lun(1 * GiB) for _ in range(3))
    for place in (lun, hot, late):
        create(ctx, place, 1 * GiB)
    _, guest, source = setup_pair(ctx, place=lun)
    protocol, node, device = plugged('hot', hot, 'a')
    source.qmp.cmd_raw('blockdev-add', protocol)
    source.qmp.cmd_raw('blockdev-add', node)
    source.qmp.cmd_raw('device_add', device)
    guest.wait_writes(100)

    extra = []
    for option, what in zip(('-blockdev', '-blockdev', '-device'),
                            plugged('hot', hot, 'b')):
        extra += [option, json.dumps(what)]
    target = VM(ctx, guest, lun, host='b', incoming=True, extra=extra)
    begin_migration(source, target, bandwidth=256 << 10)
    wait_migration(source, ('active',))
    expect_mode(source, 'writethrough', node='hot')
    protocol, node, _ = plugged('late', late, 'a')
    source.qmp.cmd_raw('blockdev-add', protocol)
    source.qmp.cmd_raw('blockdev-add', node)
    check(owned(ctx, late), 'a node that was added amid a migration does not '
          'own its image')
    finish_migration(source, target)
    check(not owned(ctx, late), 'a node that was added amid a migration was '
          'not handed over with the others')
    expect_mode(target, 'writeback', node='hot')
    source.quit()

    target.qmp.cmd('device_del', id='dev-hot')
    target.qmp.wait_event('DEVICE_DELETED', 60,
                          lambda data: data.get('device') == 'dev-hot')
    for name in ('hot', 'hot-file'):
        target.qmp.cmd('blockdev-del', node_name=name)
    check(not owned(ctx, hot), 'a disk that was plugged out is still owned')
    back = VM(ctx, guest, lun, host='a', incoming=True)
    migrate(target, back)
    guest.wait_writes(200)
    target.quit()
    finish(ctx, lun, guest, back)
    for place in (hot, late):
        require_clean(ctx, place)
