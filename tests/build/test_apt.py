# SPDX-License-Identifier: GPL-2.0-or-later
#
# Reading the machine's apt configuration, in both of its forms.

import privateapt
from helpers import TempTest

DEB822 = '''\
# a comment
Types: deb
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/some.gpg

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main

Enabled: no
Types: deb
URIs: http://off.example/debian
Suites: bookworm
Components: main

Types: deb
URIs: http://inline.example/debian
Suites: bookworm
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abc
'''

ONE_LINE = '''\
# deb http://comment.example/debian bookworm main
deb [arch=amd64 signed-by=/k.gpg] http://a.example/debian bookworm main # x
deb-src http://src.example/debian bookworm main
deb http://third.example/apt stable-thing main
deb cdrom:[Debian]/ bookworm main
deb http://b.example/debian bookworm main contrib
'''


class Mirrors(TempTest):
    def mirrors(self):
        return privateapt.mirrors(
            'bookworm', privateapt.machine_sources(self.tmp))

    def test_deb822(self):
        self.put('sources.list.d/debian.sources', DEB822)
        first, second = self.mirrors()
        self.assertEqual(first, ('http://mirror.example/debian',
                                 '/usr/share/keyrings/some.gpg'))
        self.assertEqual(second[0], 'http://inline.example/debian')
        self.assertIn('\n .\n abc', second[1])

    def test_one_line(self):
        self.put('sources.list', ONE_LINE)
        self.assertEqual(self.mirrors(),
                         [('http://a.example/debian', '/k.gpg'),
                          ('http://b.example/debian', '')])

    def test_files_that_apt_ignores(self):
        self.put('sources.list.d/x.sources.disabled', DEB822)
        self.assertEqual(self.mirrors(), [])

    def test_no_mirror_is_an_error_that_says_so(self):
        apt = privateapt.PrivateApt(self.tmp / 'apt', 'no-such-release')
        with self.assertRaisesRegex(privateapt.AptError, '--mirror'):
            apt.update()
