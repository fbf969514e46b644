/*
 * What a disk may read as after a power cut: a model for unit tests
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * For each sector the values that it may have.  A write adds one when it
 * begins.  Writes may overlap in time: then either may be found.  A value is
 * superseded by another that began after it had completed; what that means
 * depends on how much is lost:
 *
 *   nothing       (a read)  what is superseded by any completed write
 *   the process   what is superseded by a write whose record was committed
 *   the power     what is superseded by a write that completed before a
 *                 flush began which has succeeded
 *
 * Time is a counter of beginnings and completions.
 */
#ifndef TESTS_UNIT_THINVM_CRASH_MODEL_H
#define TESTS_UNIT_THINVM_CRASH_MODEL_H

#include "thinvm-sim-image.h"

#define NB_SLOTS        96
#define NB_SECTORS      (NB_SLOTS * IMAGE_SECTORS)
#define MAX_SNAPSHOTS   4

/* Guest clusters of the slots: a few leaves, with neighbours in each */
static inline uint64_t slot_guest(unsigned slot)
{
    return slot / 24 * 1531 + slot % 24;
}

/* One value that a sector was given */
typedef struct Value {
    uint64_t tag;
    uint64_t begun, completed;  /* when; completed 0: in flight */
    bool failed;                /* so it supersedes nothing */
} Value;

typedef struct History {
    Value *values;
    unsigned nb, allocated;
    uint64_t committed;         /* begin of the last committed write */
} History;

typedef struct SnapshotModel {
    uint64_t id;
    bool deleting;
    uint64_t tags[NB_SECTORS];
} SnapshotModel;

/* What a read of one slot may return: made when it begins */
typedef struct ModelLook ModelLook;

typedef struct Model {
    History sectors[NB_SECTORS];
    SnapshotModel *snapshots[MAX_SNAPSHOTS];    /* NULL: none */
    GPtrArray *looks;           /* ModelLook: reads that have not ended */
    uint64_t clock;
    uint64_t next_tag;
} Model;

/* A disk that reads as @tags (NULL: zeroes everywhere), without snapshots */
Model *model_new(const uint64_t *tags, uint64_t next_tag);
void model_free(Model *m);
/* What is allowed now, without its snapshots and reads */
Model *model_copy(const Model *m);

/* A write of sectors [@first, @first + @nb) begins; returns when */
uint64_t model_begin(Model *m, unsigned first, unsigned nb, uint64_t tag);
void model_end(Model *m, unsigned first, unsigned nb, uint64_t begun);
/* It failed, and will have no effect any more; some it may have had */
void model_fail(Model *m, unsigned first, unsigned nb, uint64_t begun);
/* The record of the write that began at @begun is written */
void model_committed(Model *m, unsigned first, unsigned nb, uint64_t begun);
/* A flush that began at @clock has succeeded */
void model_flushed(Model *m, uint64_t clock);

/* After a cut: may this sector read as @tag? */
bool model_allows(const Model *m, unsigned sector, bool process_only,
                  uint64_t tag);
/*
 * What the disk reads as while nobody writes; false: any of several values,
 * only reading it tells.
 */
bool model_current(const Model *m, unsigned sector, uint64_t *tag);

/* @committed: of somebody who sees no more than the journal's records tell */
ModelLook *model_look(Model *m, unsigned slot, bool committed);
bool model_look_allows(const ModelLook *look, unsigned i, uint64_t tag);
void model_look_free(ModelLook *look);

#endif
