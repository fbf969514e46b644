# SPDX-License-Identifier: GPL-2.0-or-later
"""What scripts/thinvm-migrate and the resource agent are made of."""
