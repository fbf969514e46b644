# SPDX-License-Identifier: GPL-2.0-or-later
"""The parts of thinvm-extender: QMP, policy, backends, the daemon, metrics.

A volume under a thinvm disk starts small and is extended while the guest
writes.  policy.py decides by how much and has no I/O, so that a simulation
and the daemon run the same decisions; backends.py extends; daemon.py brings
the two together over QMP.  Nothing is stored: what a volume has and needs is
asked from QEMU and from its backend, so that the daemon can be restarted at
any time.
"""
