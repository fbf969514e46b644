# SPDX-License-Identifier: GPL-2.0-or-later
"""Internal snapshots of a guest that writes to two disks in turn.

Each lane of the guest writes one block after the other, now to one disk, now
to the other, and waits for each.  So what both disks hold at one moment is
the result of the lane's first n writes, for some n, and of no other.  That is
what a snapshot that was taken of both at once has to hold, to the block,
whatever the guest, other snapshots and their deletion did meanwhile.
"""

from lib.contents import scan_disks
from lib.context import check, wait_for
from lib.guest import Guest
from lib.image import GiB, create, info, require_clean
from lib.model import BAD
from lib.testing import test
from lib.tgt import Target
from lib.vm import NODE, VM

NODES = (NODE, 'second')


class TwoDisks:
    """The guest, its disks on two LUNs, and what each snapshot may hold."""

    def __init__(self, ctx, **options):
        self.ctx = ctx
        target = Target(ctx)
        self.places = [target.add_lun(2 * GiB) for _ in NODES]
        for place in self.places:
            create(ctx, place, GiB)
        self.guest = Guest(ctx, lanes=3, blocks=400, flush=40, disks=2,
                           **options)
        self.taken = {}         # name -> (acknowledged before, lanes then)

    def boot(self):
        self.vm = VM(self.ctx, self.guest, self.places[0],
                     second=self.places[1])
        self.qmp = self.vm.qmp
        self.guest.wait_ready()

    def start(self):
        self.boot()
        self.guest.start_writing()
        self.guest.wait_writes(200)

    def quit(self):
        self.vm.quit()
        for place in self.places:
            require_clean(self.ctx, place)

    # -- snapshots --

    def acked(self):
        return [lane.acked for lane in self.guest.model.lanes]

    def take(self, name):
        """Of both disks, at one moment, while the guest writes."""
        before = self.acked()
        self.qmp.cmd('transaction', actions=[
            {'type': 'blockdev-snapshot-internal-sync',
             'data': {'device': node, 'name': name}} for node in NODES])
        self.remember(name, before)

    def remember(self, name, before):
        self.taken[name] = before, [
            (dict(lane.base), lane.first) for lane in self.guest.model.lanes]
        self.guest.wait_writes(150)

    def job(self, command, job, **arguments):
        self.qmp.cmd(command, job_id=job, **arguments)

        def concluded():
            found, = [j for j in self.qmp.cmd('query-jobs')
                      if j['id'] == job]
            return found if found['status'] == 'concluded' else None

        found = wait_for(concluded, 120, '%s is done' % command)
        check('error' not in found, '%s: %s', command, found.get('error'))
        self.qmp.cmd('job-dismiss', id=job)

    def delete(self, name):
        for node in NODES:
            self.job('thinvm-snapshot-delete', 'delete-' + node,
                     node_name=node, name=name, auto_dismiss=False)

    def tree(self, node):
        """name -> its entry in query-thinvm"""
        entries = self.qmp.cmd('query-thinvm', node_name=node,
                               snapshot_tree=True)
        return {s['name']: s for s in entries[0]['snapshot-tree']}

    # -- what they hold --

    def require_prefix(self, found, name):
        """@found is what there was after some number of writes of a lane."""
        model = self.guest.model
        before, lanes = self.taken[name]
        check(BAD not in found.values(), '%s: foreign blocks', name)
        for number, (base, first) in enumerate(lanes):
            held = {key: seq for key, seq in found.items()
                    if key[0] == number}
            last = max([seq for seq in held.values() if seq >= first],
                       default=first - 1)
            check(last >= before[number], '%s: lane %d is at %d, but %d was '
                  'acknowledged before', name, number, last, before[number])
            lane = model.lanes[number]
            saved = lane.base, lane.first
            lane.base, lane.first = base, first
            right = [model.allowed(number, last, last) if n == number else {}
                     for n in range(len(lanes))]
            lane.base, lane.first = saved
            wrong = model.compare(held, right)
            check(not wrong, '%s is not one moment of lane %d: %s', name,
                  number, '; '.join(wrong[:4]))

    def snapshot_contents(self, name):
        return scan_disks(self.ctx, self.guest.model, self.places,
                          snapshot={'name': name})

    def require_snapshot(self, name):
        self.require_prefix(self.snapshot_contents(name), name)

    def listed(self):
        """The names on the first disk, which must be those on the second."""
        first, second = ([s['name'] for s in
                          info(self.ctx, place).get('snapshots', [])]
                         for place in self.places)
        check(first == second, 'disks have %s and %s', first, second)
        return first

    def img(self, *args):
        for place in self.places:
            self.ctx.run(self.ctx.bin('qemu-img'), *args, place.url)


@test(seconds=300)
def of_two_disks_at_once(ctx):
    """Taken and deleted while the guest writes; then one is gone back to,
    and a branch begins there."""
    disks = TwoDisks(ctx)
    guest, model = disks.guest, disks.guest.model
    disks.start()
    for name in 'one', 'two', 'three':
        disks.take(name)
    disks.delete('two')
    disks.take('four')
    check(disks.tree(NODE)['three']['parent'] == disks.tree(NODE)['one']['id'],
          'three is not merged with one: %s', disks.tree(NODE))
    guest.stop_writing()
    guest.verify('after three snapshots and a deletion')
    disks.quit()
    check(disks.listed() == ['one', 'three', 'four'], 'there are %s',
          disks.listed())
    for name in 'one', 'three', 'four':
        disks.require_snapshot(name)

    # Back, and on from there
    disks.img('snapshot', '-a', 'one')
    disks.boot()
    found = guest.read_back()
    disks.require_prefix(found, 'one')
    model.rebase(found)
    guest.start_writing()
    disks.take('branch')
    disks.delete('one')
    guest.wait_writes(150)
    for node in NODES:
        one = disks.tree(node)['one']
        check((one['state'], len(one['children'])) == ('deleted', 2),
              'one, with two children, is %s', one)
    disks.delete('three')           # its child, four, is one's child now
    disks.delete('four')            # and with it one may go
    guest.stop_writing()
    guest.verify('on the branch')
    for node in NODES:
        check(list(disks.tree(node)) == ['branch'], 'left: %s',
              disks.tree(node))
    disks.quit()
    disks.require_snapshot('branch')


def clocks(disks):
    """The guest's clock in each snapshot, in seconds."""
    return {name: s['vm-clock-sec'] + s['vm-clock-nsec'] / 1e9
            for name, s in disks.tree(NODE).items()}


@test(seconds=300)
def with_the_machine(ctx):
    """snapshot-save and snapshot-load of memory and both disks: the guest
    goes on with the write that it was at; twice, so that a branch begins."""
    disks = TwoDisks(ctx, usec=500)
    guest, model = disks.guest, disks.guest.model
    disks.start()

    def save(name):
        before = disks.acked()
        disks.job('snapshot-save', 'save', tag=name, vmstate=NODE,
                  devices=list(NODES))
        disks.remember(name, before)

    def load(name):
        """The lanes are at rest, so that no report is on its way."""
        guest.stop_writing()
        guest.verify('before going back')
        for lane, acked in zip(model.lanes, disks.taken[name][0]):
            lane.acked = lane.flushed = acked
        disks.job('snapshot-load', 'load', tag=name, vmstate=NODE,
                  devices=list(NODES))
        guest.wait_writes(150)

    def vmstate(name):
        """Sizes on both disks."""
        return [disks.tree(node)[name]['vm-state-size'] for node in NODES]

    save('a')
    save('b')
    check(clocks(disks)['b'] > clocks(disks)['a'] > 0, "guest's clocks: %s",
          clocks(disks))
    load('a')
    disks.take('disks')                     # without the memory of a
    check(vmstate('a')[0] > 0 and vmstate('disks') == [0, 0],
          'sizes of VM state: %s, %s', vmstate('a'), vmstate('disks'))
    save('c')
    load('a')
    for node in NODES:
        tree = disks.tree(node)
        children = sorted([tree['b']['id'], tree['disks']['id']])
        check(sorted(tree['a']['children']) == children and
              tree['a']['current'], 'the tree is %s', tree)
    check(vmstate('c')[0] > 0 == vmstate('c')[1],
          'VM state is not on the first disk alone: %s', vmstate('c'))
    disks.delete('b')
    load('c')
    disks.delete('a')
    disks.delete('disks')
    guest.wait_writes(100)
    guest.stop_writing()
    guest.verify('after going to a, to a and to c')
    check(list(disks.tree(NODE)) == ['c'], 'left: %s', disks.tree(NODE))
    disks.quit()
    disks.require_snapshot('c')
