/*
 * thinvm durability layer: reading the journal's ring
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Of replay.c alone.  What is right for a record to be believed: ring.c.
 */
#ifndef BLOCK_THINVM_RING_H
#define BLOCK_THINVM_RING_H

#include "store-int.h"

/* Read ahead when replaying and scanning; bytes */
#define THINVM_RING_WINDOW          (512 * KiB)
/*
 * The scan for damage reads this much in full: more than a round of commit
 * writes, so that it holds a record that was composed after a later flush
 */
#define THINVM_SCAN_DENSE           (2 * MiB)

/* Where reading has arrived; see ThinvmJournal for running positions */
typedef struct ThinvmPosition {
    uint64_t tail, base, head;
    uint64_t last;              /* where the record before head starts; is
                                   head if that is in the base already */
    uint64_t sequence, epoch;   /* of the record before head */
    uint32_t crc;
    bool summed;                /* it has checksums of data */
} ThinvmPosition;

/* Reads the ring through a window; what it holds is as old as the read */
typedef struct ThinvmRing {
    ThinvmStore *st;
    uint64_t offset, size;      /* bytes */
    uint64_t start;             /* running position of buf */
    uint32_t length;            /* bytes that buf holds */
    uint32_t window;            /* bytes to read at once */
    uint8_t *buf;
} ThinvmRing;

typedef enum ThinvmNext {
    THINVM_NEXT_RECORD,     /* it continues the journal */
    THINVM_NEXT_NONE,       /* nothing, or of an earlier lap */
    THINVM_NEXT_TORN,       /* its header is right, the rest not (yet) */
    THINVM_NEXT_FOREIGN,    /* a record, but of another history */
    THINVM_NEXT_DATA,       /* it would continue it, but is the last one, and
                               its data are not there */
} ThinvmNext;

void thinvm_ring_init(ThinvmRing *ring, ThinvmStore *st,
                      const ThinvmSuperblock *sb, uint32_t window);
void thinvm_ring_destroy(ThinvmRing *ring);
/* @bytes (at most THINVM_RECORD_MAX_SIZE) from a running position on */
int coroutine_fn thinvm_ring_get(ThinvmRing *ring, uint64_t position,
                                 uint32_t bytes, const uint8_t **data);
/* Judge what is at @pos->head; negative errno if it cannot be read */
int coroutine_fn thinvm_ring_next(ThinvmRing *ring, const ThinvmPosition *pos,
                                  ThinvmRecord *rec, const uint8_t **data);
void thinvm_ring_advance(ThinvmPosition *pos, const ThinvmRecord *rec);
/*
 * Does the record at @pos->last, whose length is up to head, still count?  For
 * one who has applied it, and found nothing behind it.
 */
int coroutine_fn thinvm_ring_last_counts(ThinvmRing *ring,
                                         const ThinvmPosition *pos);
/*
 * Does the journal end at the head, or is the next record damaged (-EBADMSG)?
 * Looks at @dense bytes behind it, and, if @samples, at samples of the rest.
 */
int coroutine_fn thinvm_ring_check_end(ThinvmRing *ring,
                                       const ThinvmPosition *pos,
                                       uint64_t dense, bool samples,
                                       Error **errp);

#endif
