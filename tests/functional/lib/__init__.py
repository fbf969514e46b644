# SPDX-License-Identifier: GPL-2.0-or-later
"""Parts from which thinvm's functional tests and its demo are made."""
