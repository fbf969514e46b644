# SPDX-License-Identifier: GPL-2.0-or-later
"""A second writer is told so, and writes nothing.

Two hosts on one LUN have no file locks between them; the image itself has to
say whose it is (invariant 6: only the owner writes).
"""

from lib.context import check
from lib.guest import Guest
from lib.image import GiB, create, require_clean
from lib.testing import test
from lib.tgt import Target
from lib.vm import VM


def refused(ctx, *argv):
    """The program must fail with one clear message; the message."""
    text = ctx.run(*argv, ok=range(1, 120))
    check('thinvm' in text or 'own' in text or 'lock' in text,
          '%s fails without a clear message: %s', argv[0], text.strip())
    return text


def running_guest(ctx):
    lun = Target(ctx).add_lun(2 * GiB)
    create(ctx, lun, 2 * GiB)
    guest = Guest(ctx)
    vm = VM(ctx, guest, lun)
    guest.wait_ready()
    guest.start_writing()
    guest.wait_writes(500)
    return lun, guest, vm


def goes_on(ctx, lun, guest, vm):
    guest.wait_writes(500)
    guest.stop_writing()
    guest.verify('after the second writer was refused')
    vm.quit()
    require_clean(ctx, lun)


@test()
def qemu_io(ctx):
    """qemu-io on a disk that a guest uses."""
    lun, guest, vm = running_guest(ctx)
    refused(ctx, ctx.bin('qemu-io'), '-f', ctx.fmt, '-c',
            'write -P 0x66 0 1M', lun.url)
    goes_on(ctx, lun, guest, vm)


@test()
def create_over_it(ctx):
    """qemu-img create on a LUN whose image another process owns."""
    lun, guest, vm = running_guest(ctx)
    refused(ctx, ctx.bin('qemu-img'), 'create', '-f', ctx.fmt, lun.url, '1G')
    goes_on(ctx, lun, guest, vm)


@test(slow=True)
def check_repair(ctx):
    """qemu-img check -r all on a disk in use."""
    lun, guest, vm = running_guest(ctx)
    refused(ctx, ctx.bin('qemu-img'), 'check', '-f', ctx.fmt, '-r', 'all',
            lun.url)
    goes_on(ctx, lun, guest, vm)
