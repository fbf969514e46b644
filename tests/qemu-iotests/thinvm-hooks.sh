# SPDX-License-Identifier: GPL-2.0-or-later
#
# What thinvm changes for iotests written in shell: common.rc reads this at
# its end, so a function that is defined here replaces upstream's.
