# SPDX-License-Identifier: GPL-2.0-or-later
#
# What thinvm changes for iotests written in Python: iotests.py calls
# install() at its end.


def install(iotests):
    """Replace functions of the module iotests by thinvm's own."""
    assert iotests.imgfmt
