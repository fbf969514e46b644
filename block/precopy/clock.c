/*
 * blockdev-precopy: its clock
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * On its own, so that what needs no block layer can be run in another time
 * (tests/unit/test-thinvm-precopy-sim.c, tests/fuzz/thinvm-fuzz-hints.c).
 */

#include "qemu/osdep.h"
#include "qemu/timer.h"
#include "track.h"

int64_t precopy_clock_ms(void)
{
    return qemu_clock_get_ms(QEMU_CLOCK_REALTIME);
}
