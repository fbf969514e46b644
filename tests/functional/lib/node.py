# SPDX-License-Identifier: GPL-2.0-or-later
"""What QMP tells about a thinvm node, in a form that tests can use."""

from .context import Failure


def query_thinvm(qmp, node=None):
    """The entry of query-thinvm for @node (or the only one)."""
    entries = qmp.cmd('query-thinvm')
    for entry in entries:
        if node is None or entry.get('node-name') == node:
            return entry
    raise Failure('query-thinvm knows no node %s: %s' % (node, entries))


def mode_of(qmp, node=None):
    """The mapping-cache mode in force: writeback, writethrough, migration."""
    return query_thinvm(qmp, node)['mapping-cache-mode']


def mode_events(qmp):
    """(time, new mode) for each THINVM_CACHE_MODE_CHANGED seen so far."""
    qmp.poll()
    return [(event['received'], event['data']['new-mode'])
            for event in qmp.events
            if event['event'] == 'THINVM_CACHE_MODE_CHANGED']


def set_mode(qmp, node, mode):
    qmp.cmd('thinvm-set-cache-mode', node_name=node, mode=mode)
