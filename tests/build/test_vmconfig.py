# SPDX-License-Identifier: GPL-2.0-or-later
#
# How the resource agent reads a VM's file of arguments, and what it makes of
# it (scripts/lib/thinvm_ops/vmconfig.py); addresses of QMP sockets.

import json
import os
import tempfile
import unittest
import unittest.mock

from thinvm_ops import claims, vmconfig
from thinvm_ops.qmp import parse_address
from thinvm_ops.vmprocess import BareQemu

TEXT = '''
-machine q35 -nodefaults    # flags take no value
-blockdev iscsi,node-name=lun,target=I,lun=1,\\
initiator-name=iqn:{node}
-blockdev thinvm,node-name=a,file=lun
-blockdev throttle,node-name=t,file.driver=thinvm,file.node-name=b,\\
file.file.driver=file,file.file.filename=/x,,y
-blockdev '{"driver": "thinvm", "node-name": "c", "file": "lun",
            "backing": {"driver": "thinvm", "file": "base"}}'
-blockdev thinvm,node-name=base,file=other,read-only=on
-object secret,id=s,data=x -object memory-backend-ram,id=m,size=1G
'''


class Arguments(unittest.TestCase):
    def setUp(self):
        with tempfile.NamedTemporaryFile('w', delete=False) as file:
            file.write(TEXT)
        self.addCleanup(os.unlink, file.name)
        self.config = vmconfig.VMConfig(file.name)

    def test_disks_that_are_written(self):
        self.assertEqual(self.config.disks(), ['a', 'b', 'c'])

    def test_as_the_operator_wrote_them(self):
        words = self.config.arguments()
        self.assertIn('iscsi,node-name=lun,target=I,lun=1,initiator-name=iqn:'
                      + os.uname().nodename, words)
        self.assertFalse([word for word in words if 'force' in word])
        self.assertEqual(words[:3], ['-machine', 'q35', '-nodefaults'])

    def test_taken_by_force(self):
        words = self.config.arguments(['b', 'c'])
        self.assertIn('thinvm,node-name=a,file=lun', words)
        self.assertTrue([word for word in words if
                         word.startswith('throttle') and
                         word.endswith('filename=/x,,y,'
                                       'file.force-takeover=on')])
        node = json.loads([w for w in words if w.startswith('{')][0])
        self.assertIs(node['force-takeover'], True)
        self.assertNotIn('force-takeover', node['backing'])

    def test_only_looked_at(self):
        words = self.config.block_arguments()
        self.assertIn('driver=thinvm,node-name=a,file=lun,read-only=on,'
                      'force-share=on', words)
        self.assertIn('driver=thinvm,node-name=b,file.driver=file,'
                      'file.filename=/x,,y,read-only=on,force-share=on',
                      words)
        self.assertIn('secret,id=s,data=x', words)
        self.assertFalse([word for word in words if 'memory' in word or
                          'throttle' in word or 'machine' in word])


class Claims(unittest.TestCase):
    def setUp(self):
        self.cluster = claims.Cluster.__new__(claims.Cluster)
        self.cluster.trouble = None
        self.cluster.fencing = self.cluster.quorum = True
        self.cluster.nodes = {'n1': {'unclean': 'false'},
                              'n2': {'unclean': 'true'}}
        patch = unittest.mock.patch.object(claims, 'Cluster',
                                           lambda: self.cluster)
        patch.start()
        self.addCleanup(patch.stop)

    def owner(self, host, state='active'):
        return {'host-name': host, 'state': state, 'process': 7, 'epoch': 3}

    def test_nothing_to_take(self):
        found = {'a': {}, 'b': self.owner('n1', 'closed'),
                 'c': self.owner('n2', 'released'),
                 'd': self.owner(os.uname().nodename)}
        self.assertEqual(claims.to_take(found, 'never'), [])

    def test_fenced(self):
        found = {'a': self.owner('n1.example'), 'b': self.owner('n9', 'closed')}
        self.assertEqual(claims.to_take(found, 'cluster'), ['a'])

    def refused(self, found, words, policy='cluster'):
        with self.assertRaisesRegex(claims.NotOurs, words):
            claims.to_take(found, policy)

    def test_refused(self):
        fenced = self.owner('n1')
        self.refused({'a': fenced}, 'takeover=never', 'never')
        self.refused({'a': fenced, 'b': self.owner('n2')},
                     "disk 'b'.*has not been fenced")
        self.refused({'a': self.owner('admin')}, 'no node of this cluster')
        self.cluster.quorum = False
        self.refused({'a': fenced}, 'no quorum')
        self.cluster.fencing = False
        self.refused({'a': fenced}, 'not enabled')
        self.cluster.trouble = 'crm_mon is gone'
        self.refused({'a': fenced}, 'crm_mon is gone')


class Programs(unittest.TestCase):
    def test_a_program_that_is_not_there(self):
        with self.assertRaisesRegex(vmconfig.ConfigError, 'No such file'):
            vmconfig.VMConfig('/no/such/file')
        with tempfile.TemporaryDirectory() as directory:
            bare = BareQemu('/no/such/program', [], directory, 5)
            with self.assertRaisesRegex(Exception, 'No such file'):
                bare.__enter__()

    def test_addresses(self):
        self.assertEqual(parse_address('/run/x'), ('unix', '/run/x'))
        self.assertEqual(parse_address('unix:a:1'), ('unix', 'a:1'))
        self.assertEqual(parse_address('tcp:h:99'), ('tcp', ('h', 99)))
        self.assertEqual(parse_address('[::1]:4444'), ('tcp', ('::1', 4444)))
        for bad in 'tcp:h', 'h:0', 'h:70000', '', 'unix:':
            with self.assertRaises(ValueError, msg=bad):
                parse_address(bad)


if __name__ == '__main__':
    unittest.main()
