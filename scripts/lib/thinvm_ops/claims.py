# SPDX-License-Identifier: GPL-2.0-or-later
"""Whose the disks of a VM are, and whether they may be taken by force.

thinvm takes over by itself what a dead process of the same host has left.
The claim of another host stands until somebody who knows that it was fenced
says so, and in a cluster that is the cluster: Pacemaker starts a resource
elsewhere only when the node that ran it has stopped it or was fenced.  That
holds only for nodes of this cluster, with fencing enabled and quorum, so that
is asked first, each time; an owner that the cluster does not know (somebody's
qemu-img on an administration host) is never displaced.

thinvm itself looks on before it takes an image by force: not if the owner's
heartbeat moves, and with a reservation that the device enforces.
"""

import os
import subprocess
import xml.etree.ElementTree

from .vmprocess import BareQemu


class NotOurs(Exception):
    """The disks must not be taken; the text names the owner and says why."""


def owners(config, qemu, directory, seconds):
    """{node: image-owner} as seen by a look that changes nothing."""
    with BareQemu(qemu, config.block_arguments(), directory,
                  seconds) as qmp:
        infos = {info['node-name']: info for info in qmp.cmd('query-thinvm')}
    return {name: infos[name].get('image-owner', {})
            for name in config.disks() if name in infos}


def _short(name):
    return name.split('.')[0].lower()


class Cluster:
    """What crm_mon says."""

    def __init__(self, seconds=20):
        self.trouble = None
        self.nodes = {}                 # short name: attributes
        self.fencing = self.quorum = False
        try:
            done = subprocess.run(['crm_mon', '--one-shot', '--output-as=xml'],
                                  stdin=subprocess.DEVNULL,
                                  stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, timeout=seconds,
                                  check=False)
            tree = xml.etree.ElementTree.fromstring(done.stdout)
        except (OSError, subprocess.TimeoutExpired,
                xml.etree.ElementTree.ParseError) as e:
            self.trouble = f'crm_mon does not tell the state of the ' \
                           f'cluster ({e})'
            return
        for node in tree.iterfind('./nodes/node'):
            self.nodes[_short(node.get('name', ''))] = node.attrib
        options = tree.find('./summary/cluster_options')
        self.fencing = options is not None and \
            options.get('stonith-enabled') == 'true'
        dc = tree.find('./summary/current_dc')
        self.quorum = dc is not None and dc.get('with_quorum') == 'true'

    def why_not(self, host):
        """Why the claim of @host must stand; None if it may be displaced."""
        if self.trouble:
            return self.trouble
        node = self.nodes.get(_short(host))
        if node is None:
            return f"host '{host}' is no node of this cluster"
        if not self.fencing:
            return 'fencing is not enabled in this cluster (stonith-enabled)'
        if not self.quorum:
            return 'this part of the cluster has no quorum'
        if node.get('unclean') != 'false':
            return f"node '{host}' is unclean: it has not been fenced"
        return None


def to_take(found, policy):
    """The nodes of those in @found that need force; NotOurs if one must not
    be taken."""
    here = os.uname().nodename
    foreign = {name: owner for name, owner in found.items()
               if owner.get('state') == 'active' and
               owner.get('host-name') != here}
    if not foreign:
        return []
    name, owner = next(iter(foreign.items()))
    what = f"disk '{name}' is owned by process {owner['process']} on host " \
           f"'{owner['host-name']}' (epoch {owner['epoch']})"
    if policy == 'never':
        raise NotOurs(f'{what}, and takeover=never')
    cluster = Cluster()
    for name, owner in foreign.items():
        why = cluster.why_not(owner['host-name'])
        if why:
            raise NotOurs(
                f"disk '{name}' is owned by process {owner['process']} on "
                f"host '{owner['host-name']}' (epoch {owner['epoch']}), and "
                f'is not taken by force: {why}')
    return sorted(foreign)


def close_leftovers(config, qemu, directory, seconds):
    """Close the claims that a dead process of this host has left open; the
    number of them.  thinvm does it: opening takes such an image over, and
    closing leaves no owner."""
    here = os.uname().nodename
    stale = [owner for owner in owners(config, qemu, directory,
                                       seconds).values()
             if owner.get('state') == 'active' and
             owner.get('host-name') == here]
    if stale:
        with BareQemu(qemu, config.block_arguments(write=True), directory,
                      seconds):
            pass
    return len(stale)
