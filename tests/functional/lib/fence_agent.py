#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""The fence agent of the test's cluster: asks the power controller of
lib/cluster.py, by network, as agents of real ones do.

Pacemaker gives "name=value" lines on standard input.  Exit status 0 if done,
2 if the plug is off (of status), 1 otherwise.
"""

import json
import socket
import sys

METADATA = '''<?xml version="1.0"?>
<resource-agent name="fence_thinvm_test" shortdesc="Power of a test's hosts">
<longdesc>Switches the hosts of thinvm's functional tests.</longdesc>
<parameters>
<parameter name="action" unique="0" required="1">
<content type="string" default="off"/><shortdesc lang="en">action</shortdesc>
</parameter>
<parameter name="plug" unique="0" required="1">
<content type="string"/><shortdesc lang="en">host</shortdesc></parameter>
<parameter name="ip" unique="0" required="1">
<content type="string"/><shortdesc lang="en">address</shortdesc></parameter>
<parameter name="ipport" unique="0" required="1">
<content type="integer"/><shortdesc lang="en">TCP port</shortdesc></parameter>
</parameters>
<actions>
<action name="on" automatic="0"/><action name="off"/>
<action name="reboot"/><action name="status"/><action name="monitor"/>
<action name="list"/><action name="metadata"/>
</actions>
</resource-agent>
'''


def main():
    options = dict(line.rstrip('\n').split('=', 1) for line in sys.stdin
                   if '=' in line)
    action = options.get('action', 'off')
    if action == 'metadata' or 'metadata' in sys.argv:
        print(METADATA)
        return 0
    with socket.create_connection((options['ip'], int(options['ipport'])),
                                  10) as sock:
        sock.settimeout(60)
        sock.sendall(json.dumps({'action': action, 'plug': options.get(
            'plug')}).encode() + b'\n')
        answer = json.loads(sock.makefile().readline())
    print(answer['text'])
    return answer['status']


if __name__ == '__main__':
    try:
        sys.exit(main())
    except (OSError, ValueError, KeyError) as e:
        print('fence_thinvm_test: %r' % e, file=sys.stderr)
        sys.exit(1)
