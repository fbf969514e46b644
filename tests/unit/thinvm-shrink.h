/*
 * Make a failing test smaller
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef TESTS_UNIT_THINVM_SHRINK_H
#define TESTS_UNIT_THINVM_SHRINK_H

#include "qemu/osdep.h"

/* Does a test that keeps only these of its parts still fail? */
typedef bool ShrinkFails(const bool *keep, unsigned nb, void *opaque);

/*
 * Take parts out of keep[0] to keep[@nb - 1] as long as it still fails: halves
 * first, then smaller and smaller pieces, until no single part can go, or
 * @max_tests were made.  Returns the number of parts left.
 */
unsigned shrink(bool *keep, unsigned nb, ShrinkFails *fails, void *opaque,
                unsigned max_tests);
/* What is kept as a list of numbers and ranges: "3,17-20" */
char *shrink_list(const bool *keep, unsigned nb);

#endif
