/*
 * blockdev-precopy: write history of blocks
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * When each block was written lately, and so when it can be expected to be
 * written next.  Needs memory for what is written while the job runs, up to a
 * bound; beyond that what was written longest ago is forgotten.  Knows no
 * locks and no clock: the caller has both (track.c).
 */

#ifndef BLOCK_PRECOPY_HEAT_H
#define BLOCK_PRECOPY_HEAT_H

typedef struct PrecopyHeat PrecopyHeat;

/* What is expected of a block that was not written while we looked */
#define PRECOPY_NEVER INT64_MAX

PrecopyHeat *precopy_heat_new(int64_t nb_blocks, size_t max_bytes);
void precopy_heat_free(PrecopyHeat *h);

/* Blocks were written; @now in ms never goes back by much */
void precopy_heat_write(PrecopyHeat *h, int64_t first, int64_t nb,
                        int64_t now);

/* In how many ms the block is expected to be written; PRECOPY_NEVER */
int64_t precopy_heat_expect(const PrecopyHeat *h, int64_t block, int64_t now);

size_t precopy_heat_memory(const PrecopyHeat *h);

G_DEFINE_AUTOPTR_CLEANUP_FUNC(PrecopyHeat, precopy_heat_free)

#endif
