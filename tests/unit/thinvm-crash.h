/*
 * The life of an image on a simulated device: what happens to it
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A life is a row of reigns of owners.  In a reign several workers, coroutines
 * on one simulated device, each make a number of steps.  Every step has a
 * number of its own, and draws what it does out of that and the seed alone: so
 * steps can be left out (life_set_steps()) and the others do the same as
 * before.  The steps are in thinvm-crash-steps.c.
 */
#ifndef TESTS_UNIT_THINVM_CRASH_H
#define TESTS_UNIT_THINVM_CRASH_H

#include "thinvm-crash-model.h"

#define VIRTUAL_SIZE    ((3 * 1531 + 64ULL) * IMAGE_CLUSTER)
#define NB_WRITERS      6
#define NB_READERS      2
/* and one that takes and deletes snapshots, and one that follows */
#define NB_WORKERS      (NB_WRITERS + NB_READERS + 2)
#define MAX_REIGNS      4
#define MAX_STEPS       128         /* of one worker in one reign */

typedef struct Life {
    ThinvmSim *sim;
    ThinvmStore *st;            /* the owner's */
    ThinvmStore *follower;      /* somebody else's, or NULL */
    Model *model;
    uint64_t seed;              /* of what the steps do */
    unsigned generation;        /* cuts before this life */
    unsigned reign;
    unsigned steps;             /* of each worker */
    uint64_t epoch;
    bool template;              /* clusters may be marked as the template's */
    bool tight;                 /* there may be no space */
    bool small_records;         /* so that there are several in a commit */
    bool calm;                  /* mostly small writes and flushes */
    bool down;                  /* the owner was fenced off */
    bool writethrough;
    /* who is at work on a slot, and on all of them */
    uint16_t parts[NB_SLOTS];
    bool exclusive[NB_SLOTS];
    unsigned writers[NB_SLOTS], nb_writing;
    unsigned copiers;           /* that may copy a shared cluster */
    bool frozen;                /* no writer may begin */
    bool compacting;            /* somebody does */
} Life;

/* Run all workers of a reign until they have made their steps */
void life_run(Life *l);
/* The disk has its whole size again, which a cut may have left smaller */
int coroutine_fn life_resize(Life *l, uint64_t size);
/* -ENOENT if there is no snapshot with this id; else its slot */
int coroutine_fn life_find_snapshot(ThinvmStore *st, uint64_t id,
                                    ThinvmSnapshot *snap);

/* Numbers of the steps of all lives lie below this */
#define LIFE_NB_STEPS   (2u * MAX_REIGNS * NB_WORKERS * MAX_STEPS)
/* Only these: numbers and ranges, "3,17-20"; NULL: all.  false: nonsense */
bool life_set_steps(const char *list);
bool life_chosen(unsigned step);
/* Say what each step does, on stderr */
void life_set_verbose(bool verbose);
void G_GNUC_PRINTF(1, 2) life_say(const char *fmt, ...);
/* Steps made so far, by number: life_made()[i] */
const bool *life_made(void);

#endif
