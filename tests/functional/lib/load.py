# SPDX-License-Identifier: GPL-2.0-or-later
"""The beginning and the end that the tests with a guest have in common."""

from .contents import scan
from .context import wait_for
from .guest import Guest
from .image import GiB, create, require_clean
from .node import mode_of
from .tgt import Target
from .vm import NODE, VM


def setup_pair(ctx, place=None, vm_options=None, **guest_options):
    """(place, guest, source VM) with the guest writing."""
    if place is None:
        place = Target(ctx).add_lun(4 * GiB)
        create(ctx, place, 4 * GiB)
    guest = Guest(ctx, **guest_options)
    vm = VM(ctx, guest, place, host='a', **(vm_options or {}))
    guest.wait_ready()
    guest.start_writing()
    guest.wait_writes(300)
    return place, guest, vm


def finish(ctx, place, guest, vm):
    """Stop the load; nothing may be lost, the image must be clean."""
    guest.stop_writing()
    guest.verify('read by the guest after the last migration')
    vm.quit()
    require_clean(ctx, place)
    guest.model.require(scan(ctx, guest.model, place), 'acked',
                        'read from outside after the last migration')


def expect_mode(vm, wanted, seconds=20, node=NODE):
    """The mapping cache is, or soon gets, in mode @wanted."""
    if vm.ctx.fmt != 'thinvm':
        return
    wait_for(lambda: mode_of(vm.qmp, node) == wanted, seconds,
             'mapping-cache-mode of %s is %s (it is %s)' % (
                 vm.name, wanted, mode_of(vm.qmp, node)))


def booted(ctx, guest, place, **options):
    vm = VM(ctx, guest, place, **options)
    guest.wait_ready()
    return vm


def examine(ctx, guest, place, durable, what):
    """After a crash: image clean, nothing lost that is durable."""
    require_clean(ctx, place)
    found = scan(ctx, guest.model, place)
    guest.model.require(found, durable, what)
    guest.model.rebase(found)


def go_on(ctx, guest, place, **options):
    """The guest starts on another host and finds a disk that works."""
    vm = booted(ctx, guest, place, **dict({'host': 'b'}, **options))
    guest.start_writing()
    guest.wait_writes(300)
    guest.stop_writing()
    guest.verify('after the restart on another host')
    vm.quit()
    require_clean(ctx, place)
