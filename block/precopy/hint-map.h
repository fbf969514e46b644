/*
 * blockdev-precopy: ranges of one disk that a guest has said something of
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Ranges that do not overlap, each with what was said of it last.  At most as
 * many as the map was made for: what is said beyond that is dropped and
 * counted.  Knows no locks and no clock: the caller has both (hints.c).
 */

#ifndef BLOCK_PRECOPY_HINT_MAP_H
#define BLOCK_PRECOPY_HINT_MAP_H

#include "track.h"

/* How long after the expected write a range is kept, in ms */
#define PRECOPY_HINT_GRACE 10000

typedef struct PrecopyHintMap PrecopyHintMap;

PrecopyHintMap *precopy_hint_map_new(size_t max_ranges);
void precopy_hint_map_free(PrecopyHintMap *m);

/* Say something of a range; PRECOPY_HINT_NONE forgets it.  @due for DIRTY. */
void precopy_hint_map_set(PrecopyHintMap *m, int64_t offset, int64_t bytes,
                          PrecopyHintKind kind, int64_t due, int64_t now);
/* Forget what is of that kind in a range */
void precopy_hint_map_clear(PrecopyHintMap *m, int64_t offset, int64_t bytes,
                            PrecopyHintKind kind);
void precopy_hint_map_reset(PrecopyHintMap *m);

void precopy_hint_map_get(const PrecopyHintMap *m, int64_t offset,
                          int64_t now, PrecopyHint *hint);

size_t precopy_hint_map_count(const PrecopyHintMap *m);
uint64_t precopy_hint_map_dropped(const PrecopyHintMap *m);
/* Ranges that were changed, or in the way, so far: what it has cost */
uint64_t precopy_hint_map_looked(const PrecopyHintMap *m);

G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrecopyHintMap, precopy_hint_map_free)

#endif
