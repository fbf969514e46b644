# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU as a user without rights, and in its seccomp sandbox."""

import os
import pwd
import subprocess

from lib.context import Skip
from lib.guest import Guest
from lib.image import GiB, create, require_clean
from lib.testing import ANY, test
from lib.tgt import Target
from lib.vm import VM, migrate


def nobody(ctx):
    """The user to run as; the test's directory becomes writable for it."""
    if os.getuid() != 0:
        return None                 # we are a user without rights ourselves
    user = pwd.getpwnam('nobody')
    os.chmod(ctx.dir, 0o777)
    can_run = subprocess.run(
        [ctx.bin('qemu-system-x86_64'), '--version'], user=user.pw_uid,
        group=user.pw_gid, extra_groups=[], stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, check=False)
    if can_run.returncode:
        raise Skip('user nobody cannot execute %s'
                   % ctx.bin('qemu-system-x86_64'))
    return user.pw_uid


def migrated_guest(ctx, **options):
    """A guest writes and is migrated once; nothing is lost."""
    lun = Target(ctx).add_lun(2 * GiB)
    create(ctx, lun, 2 * GiB)
    guest = Guest(ctx)
    source = VM(ctx, guest, lun, host='a', **options)
    guest.wait_ready()
    guest.start_writing()
    guest.wait_writes(500)
    target = VM(ctx, guest, lun, host='b', incoming=True, **options)
    migrate(source, target)
    guest.wait_writes(300)
    guest.stop_writing()
    guest.verify('read by the guest')
    source.quit()
    target.quit()
    require_clean(ctx, lun)


@test(seconds=300, formats=ANY)
def as_nobody(ctx):
    """No capability, no file access of root's."""
    migrated_guest(ctx, user=nobody(ctx))


@test(seconds=300, formats=ANY)
def in_the_sandbox(ctx):
    """No new processes, no gain of privileges."""
    migrated_guest(ctx, sandbox=True)
