# SPDX-License-Identifier: GPL-2.0-or-later
"""When to extend a volume, and to what size.

All sizes are bytes, times seconds, rates bytes per second.  A volume must
have as much free space as the guest can write until an extension is there:
the rate times the time that extensions take, with a margin, since neither is
constant (oVirt has seen 0.8 to 3.7 seconds for the same operation).  Both are
measured, not configured.
"""

from dataclasses import dataclass

MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True)
class Limits:
    """What the operator allows."""
    chunk: int = 1 * GIB        # extensions are multiples of this
    max_size: int = 0           # of a volume; 0: as much as there is
    margin: float = 2.0         # times the measured need
    first_delay: float = 4.0    # assumed before anything was measured


@dataclass
class Need:
    """What QEMU tells about a volume (query-thinvm, THINVM_SPACE_LOW)."""
    size: int
    free: int
    watermark: int = 0
    rate: int = 0
    wanted: int = 0             # THINVM_SPACE_LOW's wanted-size


class Delay:
    """How long an extension takes: the worst of the lately measured ones."""

    KEPT = 8

    def __init__(self, assumed):
        self._assumed = assumed
        self._measured = []

    def add(self, seconds):
        self._measured = (self._measured + [seconds])[-self.KEPT:]

    @property
    def seconds(self):
        return max(self._measured, default=self._assumed)


def low_mark(need, delay, limits):
    """Free bytes below which an extension has to be under way."""
    return max(need.watermark, int(need.rate * delay * limits.margin))


def is_due(need, delay, limits):
    return need.free < low_mark(need, delay, limits)


def next_size(need, delay, limits):
    """The size that the volume should get; its own if there is no need.

    Afterwards the free space is twice the low mark, so that the next
    extension is not due at once, and the size is a multiple of the chunk.
    """
    mark = low_mark(need, delay, limits)
    if need.free >= mark and need.wanted <= need.size:
        return need.size
    target = max(need.size - need.free + 2 * mark, need.wanted,
                 need.size + 1)
    target = -(-target // limits.chunk) * limits.chunk
    if limits.max_size:
        target = min(target, limits.max_size)
    return max(target, need.size)
