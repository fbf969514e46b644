# SPDX-License-Identifier: GPL-2.0-or-later
"""How often a guest would have to wait, by write rate and extension delay.

Runs the daemon's own policy against a guest that writes at a constant rate
and a backend that takes a constant time: for rates that no test machine
reaches.  The rate that the policy sees is the mean that QEMU would tell
(its weight halves in 3 s), and the daemon sees it when the watermark is
crossed and once a second.
"""

from . import policy

STEP = 0.01                     # seconds of a step of the simulation
HALF_LIFE = 3.0                 # of QEMU's allocation-rate
POLL = 1.0


def run(rate, delay, total, watermark, limits, start=policy.GIB):
    """Returns (pauses, seconds paused, extensions) of writing @total bytes."""
    size, used, seen = start, 0, 0.0
    known = policy.Delay(limits.first_delay)
    finish = target = None
    pauses = extensions = 0
    paused = now = next_poll = 0.0
    waiting = told = False
    while used < total:
        if finish is not None and now >= finish:
            size, finish, told = target, None, False
            known.add(delay)
        room = size - used
        written = min(rate * STEP, room, total - used)
        used += written
        seen += (written / STEP - seen) * (1 - 0.5 ** (STEP / HALF_LIFE))
        if written < min(rate * STEP, total - used + written):
            pauses += not waiting
            paused += STEP
            waiting = True
        else:
            waiting = False
        need = policy.Need(int(size), int(size - used), watermark, int(seen))
        crossed = need.free < watermark and not told
        if finish is None and (crossed or now >= next_poll):
            told = told or crossed
            target = policy.next_size(need, known.seconds, limits)
            if target > size:
                finish = now + delay
                extensions += 1
        if now >= next_poll:
            next_poll = now + POLL
        now += STEP
    return pauses, paused, extensions


def table(watermark, limits, total, start=policy.GIB):
    """Lines of a table, rates against delays; pauses/seconds paused."""
    rates = (10, 50, 100, 200, 400, 800, 1300)
    delays = (0.5, 1, 2, 4)
    yield ('MB/s of the guest' +
           ''.join(f'{f"delay {d} s":>16}' for d in delays))
    for megabytes in rates:
        cells = ''
        for delay in delays:
            pauses, paused, _ = run(megabytes * 10 ** 6, delay, total,
                                    watermark, limits, start)
            cells += f'{f"{pauses} ({paused:.1f} s)":>16}'
        yield f'{megabytes:>17}' + cells
