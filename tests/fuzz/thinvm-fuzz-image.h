/*
 * Sparse images as the input of thinvm's fuzzer
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * An input is a small container: the length of a device, those of its 4 KiB
 * blocks that are not zero, and a program that says what is done with the
 * image.  Layout, little endian:
 *
 *   0   magic "TVFZ"
 *   4   number of blocks (u16)
 *   6   length of the program (u16)
 *   8   length of the device (u64, bytes)
 *   16  for each block: number (u64), number of runs (u16), and for each run:
 *       offset in the block (u16), length (u16), bytes
 *   ..  the program
 *
 * A container that ends early, or says what cannot be, is read as far as it
 * goes: every input is some image.
 *
 * FuzzImage is also the device (ThinvmDevice) that the engine runs on.  Its
 * I/O completes at once, so nothing here depends on a clock or a scheduler.
 */
#ifndef TESTS_FUZZ_THINVM_FUZZ_IMAGE_H
#define TESTS_FUZZ_THINVM_FUZZ_IMAGE_H

#include "block/thinvm/store.h"

#define FUZZ_BLOCK          THINVM_PAGE_SIZE
/* More blocks than these are -ENOSPC: memory stays bounded */
#define FUZZ_MAX_BLOCKS     16384
#define FUZZ_MAX_LENGTH     (1ULL << 53)

typedef struct FuzzImage {
    ThinvmDevice device;
    uint64_t length, max_length;    /* bytes; may be grown to the latter */
    GHashTable *blocks;             /* number -> FUZZ_BLOCK bytes */
    uint8_t *program;
    size_t program_size;

    /* As the device of a running engine */
    uint64_t nb_writes;
    unsigned fail_in;               /* 1: the next I/O fails; 0: none does */
    /* Called before each write and discard, if set */
    void (*write_hook)(void *opaque, uint64_t offset, uint64_t bytes,
                       bool discard);
    void *hook_opaque;
} FuzzImage;

FuzzImage *fuzz_image_new(uint64_t length);
void fuzz_image_free(FuzzImage *image);
FuzzImage *fuzz_image_decode(const uint8_t *data, size_t size);
/* 0 if it does not fit into @max */
size_t fuzz_image_encode(const FuzzImage *image, uint8_t *data, size_t max);

/* A block, or NULL if it is all zeroes and not to be made */
uint8_t *fuzz_image_block(FuzzImage *image, uint64_t number, bool make);
void fuzz_image_read(FuzzImage *image, uint64_t offset, uint64_t bytes,
                     void *buf);
/* false: it has too many blocks */
bool fuzz_image_write(FuzzImage *image, uint64_t offset, uint64_t bytes,
                      const void *buf);
/* Numbers of all blocks, sorted; GArray of uint64_t */
GArray *fuzz_image_numbers(const FuzzImage *image);

#endif
