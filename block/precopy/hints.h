/*
 * blockdev-precopy: what guests say, as objects
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * An object "thinvm-hints" talks with the agent of one guest through a
 * character device, in the protocol of docs/interop/thinvm-hints.rst.  A job
 * becomes a user of it for one disk of that guest, and asks from any thread.
 * Attaching and detaching is for the main loop.
 */

#ifndef BLOCK_PRECOPY_HINTS_H
#define BLOCK_PRECOPY_HINTS_H

#include "track.h"

#define TYPE_THINVM_HINTS "thinvm-hints"

typedef struct PrecopyHintsUser PrecopyHintsUser;

/*
 * Use the object @id for the disk with this @serial, or if that is NULL, for
 * the only one of @size bytes.  With @trim, ask the guest to discard what it
 * does not use, once.
 */
PrecopyHintsUser *precopy_hints_attach(const char *id, const char *serial,
                                       int64_t size, bool trim,
                                       Error **errp);
void precopy_hints_detach(PrecopyHintsUser *user);

/* May the guest still be trimming? */
bool precopy_hints_trimming(PrecopyHintsUser *user);

PrecopyHintFunc precopy_hints_get;
PrecopyHintWrittenFunc precopy_hints_written;

#endif
