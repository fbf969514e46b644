/*
 * What thinvm's fuzzer does with an image
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Opens, looks, checks, and then runs the program that the input holds:
 * reads, writes, discards, resizes, snapshots, checkpoints, crashes,
 * repairs.  What has to hold whatever the image says:
 *
 *  - nothing is written before somebody begins to write;
 *  - the engine writes to superblocks, ring and metadata extents only, guest
 *    data goes to none of these, and all within the device;
 *  - an image that the check finds clean stays openable and clean, whatever
 *    is done with it (also through crashes and failing I/Os);
 *  - a repair leaves no more corruptions than it met.
 *
 * All else is the business of the sanitizers, and of the limits of time and
 * memory that libFuzzer sets.
 */
#ifndef TESTS_FUZZ_THINVM_FUZZ_RUN_H
#define TESTS_FUZZ_THINVM_FUZZ_RUN_H

#include "thinvm-fuzz-image.h"

/* One byte each in a program; see thinvm-fuzz-run.c for what follows it */
typedef enum FuzzStep {
    FUZZ_LOOKUP,
    FUZZ_WRITE,
    FUZZ_WRITE_RANGE,
    FUZZ_UNMAP,
    FUZZ_INVALIDATE,
    FUZZ_MAP_RUN,
    FUZZ_RESIZE,
    FUZZ_SNAPSHOT_CREATE,
    FUZZ_SNAPSHOT_DELETE,
    FUZZ_SNAPSHOT_GOTO,
    FUZZ_SNAPSHOT_READ,
    FUZZ_SET_BACKING,
    FUZZ_VMSTATE,
    FUZZ_COMMIT,
    FUZZ_CHECKPOINT,
    FUZZ_RECLAIM,
    FUZZ_CRASH,
    FUZZ_REOPEN,
    FUZZ_CHECK,
    FUZZ_REPAIR,
    FUZZ_FOLLOW,
    FUZZ_FAIL,
    FUZZ_HOLD,
    FUZZ_GROW,
    FUZZ_NB_STEPS
} FuzzStep;
/* Bits of the byte behind FUZZ_COMMIT */
#define FUZZ_AS_GUEST   0x82

/* Inputs in all, and those in which a journal's end was decided by checksums
   of data that were right, or wrong */
typedef struct FuzzSums {
    unsigned inputs, right, wrong;
} FuzzSums;
const FuzzSums *fuzz_sums(void);

/* Run image->program on @image, from outside coroutines */
void fuzz_run(FuzzImage *image);
/* Create an image on the empty @image, and run the program on it */
void fuzz_create(FuzzImage *image, const ThinvmCreateParams *params);

#endif
