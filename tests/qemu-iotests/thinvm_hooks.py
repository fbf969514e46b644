# SPDX-License-Identifier: GPL-2.0-or-later
#
# What thinvm changes for iotests written in Python: iotests.py calls
# install() at its end.
#
# Tests that name only qcow2 as their format but test general behaviour run
# for thinvm too if thinvm-tests.txt lists them.  Everything else, and every
# other format, behaves as upstream wrote it.

import os
import sys


def install(iotests):
    """Replace functions of the module iotests by thinvm's own."""
    if iotests.imgfmt != 'thinvm':
        return
    import thinvm_tests
    listed = thinvm_tests.load().get(os.path.basename(sys.argv[0]))
    if listed is None or listed.way == 'generic':
        return
    upstream = iotests._verify_image_format

    def verify_image_format(supported_fmts=(), unsupported_fmts=()):
        if 'qcow2' in supported_fmts:
            supported_fmts = [*supported_fmts, 'thinvm']
        upstream(supported_fmts, unsupported_fmts)

    iotests._verify_image_format = verify_image_format
