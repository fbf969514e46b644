# SPDX-License-Identifier: GPL-2.0-or-later
"""The resource agent in a real Pacemaker cluster."""

import os
import shutil

from lib.agent import AGENT, write_config
from lib.context import check
from lib.host import Host
from lib.image import GiB, create, require_clean
from lib.testing import test
from lib.tgt import Target


@test(seconds=600, slow=True)
def ocf_tester(ctx):
    """The agent is what OCF wants of one."""
    tester = ctx.need('ocf-tester', 'resource-agents')
    ctx.need('xmllint', 'libxml2-utils')
    lun = Target(ctx).add_lun(2 * GiB)
    create(ctx, lun, 2 * GiB)
    directory = ctx.path('hosta')
    os.mkdir(directory)
    config = os.path.join(directory, 'vm.conf')
    write_config(ctx, config, lun, 'a', directory)
    schema = '/usr/share/resource-agents'
    shutil.copy(os.path.join(schema, 'ra-api-1.dtd'), directory)
    host = Host(ctx, 'hosta')
    options = []
    for name, value in (
            ('config', config), ('name', 'vm'), ('shutdown_timeout', 1),
            ('qemu', ctx.bin('qemu-system-x86_64')),
            ('state_dir', os.path.join(directory, 'state')),
            ('log', ctx.log_file('vm'))):
        options += ['-o', '%s=%s' % (name, value)]
    status, out, err = host.run(
        'env', '-C', directory, 'OCF_ROOT=/usr/lib/ocf', tester, '-v', '-n',
        'vm', *options, AGENT, seconds=400)
    check(status == 0 and 'passed all tests' in out, 'ocf-tester: %s %s',
          out[-500:], err[-500:])
    check('failed' not in out, 'ocf-tester: %s', out[-500:])
    require_clean(ctx, lun)
