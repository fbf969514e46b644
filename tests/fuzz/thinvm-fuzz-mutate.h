/*
 * Mutations of images that know the format, and right checksums
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Random bytes get no further than a checksum.  Here a field of some
 * structure is changed, and then all checksums are made right again, from
 * the leaves up to the superblocks and along the journal, so that what was
 * changed is believed as far as checksums go.
 */
#ifndef TESTS_FUZZ_THINVM_FUZZ_MUTATE_H
#define TESTS_FUZZ_THINVM_FUZZ_MUTATE_H

#include "thinvm-fuzz-image.h"

/* A structure that can be reached from a superblock */
typedef struct FuzzPlace {
    uint64_t page;
    ThinvmPageKind kind;
    int level;
} FuzzPlace;

#define FUZZ_MAX_PLACES     4096

/* What a superblock slot says, found with or without a right checksum */
typedef struct FuzzBase {
    ThinvmSuperblockLe *le;     /* in its block; NULL: no superblock here */
    uint64_t journal_size;      /* 0: not usable */
} FuzzBase;

void fuzz_bases(FuzzImage *image, FuzzBase base[THINVM_NB_SUPERBLOCKS]);
/* Every page once, roots first; GArray of FuzzPlace */
GArray *fuzz_places(FuzzImage *image);
/* Offsets of journal records' blocks after either base; GArray of uint64_t */
GArray *fuzz_records(FuzzImage *image);

/* What fuzz_fix() is to leave alone */
enum {
    FUZZ_KEEP_JOURNAL = 1,      /* no checksum nor chain of records */
    FUZZ_KEEP_NUMBERS = 2,      /* sequence numbers, epochs, operations */
    FUZZ_FIX_COUNTS = 4,        /* also make the counts of pages right */
    FUZZ_KEEP_SUMS = 8,         /* checksums of data in records */
};
void fuzz_fix(FuzzImage *image, unsigned flags);
/* Of a record of @length bytes: its checksums of data, behind its operations */
unsigned fuzz_nb_sums(const uint8_t *record, uint32_t length);

/* Change something; @random: any number */
void fuzz_mutate(FuzzImage *image, uint64_t random);

#endif
