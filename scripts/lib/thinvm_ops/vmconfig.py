# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM as the operator wrote it down: the arguments of its QEMU, in a file.

The file is written as for a shell, over as many lines as one likes, with
comments.  {node} in it stands for the name of the host, nothing else is
expanded, and nothing executed.  Block nodes must be
given by -blockdev, each thinvm node that is written with its node-name, so
that it can be told to take its image over, and recognised in query-thinvm.
"""

import json
import os
import shlex

# What only the agent may say, because it says it itself
RESERVED = ('-incoming', '-S', '-daemonize', '-pidfile', '-preconfig')
# Options without a value; of all others the next word is the value
FLAGS = ('-h', '-help', '-version', '-mem-prealloc', '-snapshot', '-usb',
         '-nographic', '-full-screen', '-win2k-hack', '-no-fd-bootchk',
         '-preconfig', '-S', '-s', '-enable-kvm', '-xen-attach',
         '-xen-domid-restrict', '-no-reboot', '-no-shutdown', '-daemonize',
         '-only-migratable', '-nodefaults', '-semihosting', '-old-param',
         '-no-user-config', '-enable-sync-profile', '-perfmap', '-jitdump')
# Objects that block nodes may refer to; others are not made to look at disks
BLOCK_OBJECTS = ('secret', 'secret_keyring', 'tls-creds-', 'iothread',
                 'pr-manager-helper', 'throttle-group', 'authz-')


class ConfigError(Exception):
    """The file is not what can be used; the text says where and why."""


def _split_keyval(text):
    """QEMU's key=value,... with doubled commas for one, as a list."""
    parts = ['']
    i = 0
    while i < len(text):
        if text[i] == ',' and text[i + 1:i + 2] == ',':
            parts[-1] += ','
            i += 1
        elif text[i] == ',':
            parts.append('')
        else:
            parts[-1] += text[i]
        i += 1
    return [part for part in parts if part]


def parse_keyval(text, implied='driver'):
    """key=value,a.b=c as nested dictionaries, values as strings."""
    result = {}
    for number, part in enumerate(_split_keyval(text)):
        key, equals, value = part.partition('=')
        if not equals:
            key, value = (implied, part) if number == 0 else (part, 'on')
        where = result
        *way, last = key.split('.')
        for step in way:
            where = where.setdefault(step, {})
            if not isinstance(where, dict):
                raise ConfigError(f"'{text}': '{step}' is a value and has "
                                  'members, too')
        where[last] = value
    return result


def parse_options(text, implied='driver'):
    """The value of -blockdev or -object: JSON, or key=value."""
    if not text.lstrip().startswith('{'):
        return parse_keyval(text, implied)
    try:
        return json.loads(text)
    except ValueError as e:
        raise ConfigError(f"'{text[:60]}': not JSON: {e}") from None


def _on(value):
    return value in (True, 'on', 'true', 'yes', 'y')


def _thinvm_nodes(options, way=()):
    """(way to the node, its options) for each thinvm node that writes."""
    if options.get('driver') == 'thinvm' and not options.get('snapshot') and \
            not _on(options.get('read-only', False)):
        yield way, options
    for key, value in options.items():
        # What is below as a backing file is opened read-only by QEMU.
        if isinstance(value, dict) and key != 'backing':
            yield from _thinvm_nodes(value, (*way, key))


def _with_options(text, ways, **more):
    """The -blockdev value @text with @more options for the nodes at @ways."""
    if text.lstrip().startswith('{'):
        options = json.loads(text)
        for way in ways:
            where = options
            for step in way:
                where = where[step]
            where.update({key.replace('_', '-'): value
                          for key, value in more.items()})
        return json.dumps(options)
    for way in ways:
        for key, value in more.items():
            text += ',%s=%s' % ('.'.join((*way, key.replace('_', '-'))),
                                'on' if value else 'off')
    return text


def _flatten(options, way=''):
    for key, value in options.items():
        if isinstance(value, dict):
            yield from _flatten(value, f'{way}{key}.')
        else:
            yield '%s%s=%s' % (way, key, value.replace(',', ',,'))


def _node_text(text, node):
    """@node, a part of the -blockdev value @text, as a value of its own:
    what lies above it is of no use to who only looks."""
    if text.lstrip().startswith('{'):
        return json.dumps(node)
    return ','.join(_flatten(node))


class VMConfig:
    """.words are QEMU's arguments."""

    def __init__(self, path):
        try:
            with open(path, encoding='utf-8') as file:
                text = file.read().replace('\\\n', '')
            self.words = [word.replace('{node}', os.uname().nodename)
                          for word in shlex.split(text, comments=True)]
        except (OSError, ValueError) as e:
            raise ConfigError(f'{path}: {e}') from None
        self.path = path
        self._check()

    def _check(self):
        for option, value in self._options():
            if option in RESERVED:
                raise ConfigError(f'{self.path}: {option} is said by the '
                                  'agent; leave it out')
            if option in ('-drive', '-hda', '-hdb', '-hdc', '-hdd') and \
                    'thinvm' in (value or ''):
                raise ConfigError(f'{self.path}: {option} with thinvm: '
                                  'write -blockdev and -device')
        for _, _, node in self._writable():
            if not node.get('node-name'):
                raise ConfigError(f'{self.path}: a thinvm node that is '
                                  'written has no node-name')
        if not self.disks():
            raise ConfigError(f'{self.path}: there is no -blockdev with a '
                              'thinvm node that is written')

    def _options(self):
        """(option, value or None) in order; --x is -x."""
        i = 0
        while i < len(self.words):
            word = self.words[i]
            if not word.startswith('-'):
                raise ConfigError(f"{self.path}: '{word}' is no option")
            option = '-' + word.lstrip('-')
            i += 1
            if option in FLAGS:
                yield option, None
                continue
            if i == len(self.words):
                raise ConfigError(f'{self.path}: {word} lacks its value')
            yield option, self.words[i]
            i += 1

    def _writable(self):
        for option, value in self._options():
            if option == '-blockdev':
                for way, node in _thinvm_nodes(parse_options(value)):
                    yield value, way, node

    def disks(self):
        """Names of the thinvm nodes that are written."""
        return [node['node-name'] for _, _, node in self._writable()]

    def has(self, option):
        return any(option == other for other, _ in self._options())

    def arguments(self, take_over=()):
        """For the VM; the nodes in @take_over take their images by force."""
        words = []
        for option, value in self._options():
            words.append(option)
            if value is None:
                continue
            if option == '-blockdev':
                ways = [way for text, way, node in self._writable()
                        if text == value and node['node-name'] in take_over]
                value = _with_options(value, ways, force_takeover=True)
            words.append(value)
        return words

    def block_arguments(self, write=False):
        """For a QEMU without a guest that only opens the disks: to look who
        owns them, or with @write to close what a dead process left open."""
        words = []
        for option, value in self._options():
            values = [value]
            if option == '-object':
                kind = parse_options(value, 'qom-type').get('qom-type', '')
                if not kind.startswith(BLOCK_OBJECTS):
                    continue
            elif option == '-blockdev':
                nodes = [node for text, _, node in self._writable()
                         if text == value]
                if nodes:
                    values = [_node_text(value, node) for node in nodes]
                    if not write:
                        values = [_with_options(text, [()], read_only=True,
                                                force_share=True)
                                  for text in values]
            elif option != '-iscsi':
                continue
            for value in values:
                words += [option, value]
        return words
