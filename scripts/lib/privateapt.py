# SPDX-License-Identifier: GPL-2.0-or-later
#
# An apt configuration private to the build: package lists of Debian's
# trixie suite, kept below deps/apt/, so that QEMU's source, meson and the
# guest kernel are the same on Debian 12 and 13 and the machine's own apt
# configuration stays as it is.
#
# Mirror and keyring are the machine's own: they are read from its sources,
# deb822 (.sources) or one line each (.list, sources.list).  apt itself
# checks the signatures; nothing here weakens that.  Proxies and the like
# apply as for any apt on this machine.

import re
import subprocess
from pathlib import Path

SUITE = 'trixie'
DEFAULT_KEYRING = '/usr/share/keyrings/debian-archive-keyring.gpg'


class AptError(Exception):
    """apt could not do it; the message says what and what would help."""


def run(command, what, **kwargs):
    """Run a command; raise AptError with the end of its output."""
    p = subprocess.run(command, stdin=subprocess.DEVNULL,
                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                       text=True, errors='replace', check=False, **kwargs)
    if p.returncode:
        tail = '\n'.join('    ' + s for s in p.stdout.splitlines()[-8:])
        raise AptError(f'{what} failed: {" ".join(map(str, command))}\n'
                       f'{tail}')
    return p.stdout


def _deb822(text):
    """Entries of a .sources file as (types, uris, suites, components, key)."""
    for stanza in re.split(r'\n\s*\n', text):
        fields = {}
        name = None
        for line in stanza.splitlines():
            if line.startswith('#'):
                continue
            if line[:1].isspace() and name:
                fields[name] += '\n' + line
            elif ':' in line:
                name, value = line.split(':', 1)
                name = name.strip().lower()
                fields[name] = value.strip()
        if fields.get('enabled', 'yes').lower() in ('no', 'false', '0'):
            continue
        yield (fields.get('types', '').split(),
               fields.get('uris', '').split(),
               fields.get('suites', '').split(),
               fields.get('components', '').split(),
               fields.get('signed-by', ''))


def _one_line(text):
    """Entries of a .list file, in the same form."""
    for line in text.splitlines():
        m = re.match(r'\s*(deb|deb-src)\s+(?:\[([^]]*)\]\s+)?(\S+)\s+(\S+)'
                     r'\s*([^#]*)', line)
        if m:
            options = dict(o.split('=', 1) for o in (m[2] or '').split()
                           if '=' in o)
            yield ([m[1]], [m[3]], [m[4]], m[5].split(),
                   options.get('signed-by', ''))


def machine_sources(etc=Path('/etc/apt')):
    """All entries of the machine's own configuration."""
    entries = []
    for path in [etc / 'sources.list',
                 *sorted((etc / 'sources.list.d').glob('*.list')),
                 *sorted((etc / 'sources.list.d').glob('*.sources'))]:
        try:
            text = path.read_text(encoding='utf-8', errors='replace')
        except OSError:
            continue
        parse = _deb822 if path.suffix == '.sources' else _one_line
        entries += parse(text)
    return entries


def mirrors(codename, entries):
    """
    (URI, Signed-By) of the mirrors that serve Debian itself: those that
    have the main component of the release that this machine runs.
    """
    names = {codename, 'stable', 'oldstable'}
    found = []
    for types, uris, suites, components, key in entries:
        if 'deb' in types and 'main' in components and names & set(suites):
            found += [(uri, key) for uri in uris
                      if re.match(r'(https?|file|copy|mirror)', uri) and
                      (uri, key) not in found]
    return found


class PrivateApt:
    """apt with lists and cache of its own below a directory."""

    def __init__(self, directory, codename, mirror=None):
        self.dir = directory
        self.codename = codename
        self.mirror = mirror
        self.updated = False

    def _options(self):
        d = self.dir
        settings = {
            'Dir::Etc::sourcelist': '/dev/null',
            'Dir::Etc::sourceparts': d / 'sources.d',
            'Dir::Etc::preferences': '/dev/null',
            'Dir::Etc::preferencesparts': '/dev/null',
            'Dir::State::lists': d / 'lists',
            'Dir::Cache': d / 'cache',
            'APT::Sandbox::User': '',
            'Acquire::Languages': 'none',
            'Acquire::Retries': '3',
        }
        args = []
        for key, value in settings.items():
            args += ['-o', f'{key}={value}']
        return args

    def _write_sources(self, uri, key):
        # An inline key is a block of indented lines, which deb822 takes
        # as it is.
        (self.dir / 'sources.d' / f'{SUITE}.sources').write_text(
            f'Types: deb deb-src\nURIs: {uri}\nSuites: {SUITE}\n'
            f'Components: main\nSigned-By: {key or DEFAULT_KEYRING}\n',
            encoding='utf-8')

    def update(self):
        """Get the package lists, from the first mirror that has them."""
        if self.updated:
            return
        for sub in ('sources.d', 'lists/partial', 'cache/archives/partial'):
            (self.dir / sub).mkdir(parents=True, exist_ok=True)
        if self.mirror:
            candidates = [(self.mirror, '')]
        else:
            candidates = mirrors(self.codename, machine_sources())
        # A keyring of one release alone may not know trixie's keys.
        candidates += [(uri, '') for uri, key in candidates if key]
        problem = AptError(
            'no Debian mirror found in the machine\'s apt configuration '
            '(/etc/apt/sources.list, sources.list.d): give one with '
            '--mirror URI')
        for uri, key in candidates:
            self._write_sources(uri, key)
            try:
                run(['apt-get', *self._options(), '-qq',
                     '--error-on=any', 'update'],
                    f'reading the package lists of {SUITE} from {uri}')
                self.updated = True
                return
            except AptError as e:
                problem = e
        raise problem

    def candidate(self, package, source=False):
        """The version that trixie has of a package."""
        self.update()
        verb = 'showsrc' if source else 'show'
        text = run(['apt-cache', *self._options(), verb,
                    *(['--only-source'] if source else []), package],
                   f'looking for {package} in {SUITE}')
        versions = re.findall(r'^Version: (\S+)$', text, re.M)
        if not versions:
            raise AptError(f'{SUITE} has no {package}')
        return versions[0]

    def depends(self, package):
        """What a binary package depends on, first alternatives only."""
        self.update()
        text = run(['apt-cache', *self._options(), 'show',
                    '--no-all-versions', package],
                   f'looking for {package} in {SUITE}')
        m = re.search(r'^Depends: (.*)$', text, re.M)
        return [d.split()[0] for d in m[1].split(',')] if m else []

    def source(self, package, into):
        """Download, verify and unpack a source package into a directory."""
        self.update()
        run(['apt-get', *self._options(), '-qq', 'source', package],
            f'getting the source of {package}', cwd=into)

    def download(self, package, into):
        """Download and verify a binary package; returns the file."""
        self.update()
        into.mkdir(parents=True, exist_ok=True)
        for old in into.glob(f'{package}_*.deb'):
            old.unlink()
        run(['apt-get', *self._options(), '-qq', 'download', package],
            f'downloading {package}', cwd=into)
        return next(into.glob(f'{package}_*.deb'))
