/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Programs that write files: what files.c calls of load.c.  All return 0, or
 * -1 and errno.
 */
#ifndef GUEST_LOAD_H
#define GUEST_LOAD_H

#include <stdbool.h>
#include <stdint.h>

/* Start one, with the seven words of the command */
int load_start(char **word);
/* Blocks written, and the slowest fsync() in microseconds, since last time */
int load_report(uint64_t *writes, uint64_t *us);
/* End all of them */
int load_end(void);

#endif
