/*
 * thinvm check: counting what is referenced
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Durability layer; only check.c and check-walk.c include this.  A check
 * recounts all references by walking every tree from its root
 * (check-walk.c), and compares with the counts that are recorded (check.c).
 */
#ifndef BLOCK_THINVM_CHECK_H
#define BLOCK_THINVM_CHECK_H

#include "store-int.h"

/*
 * Clusters that are counted in one walk: bounds the memory to about twice as
 * many bytes.  A larger device (8 TiB at 64 KiB) takes several walks.
 */
#define THINVM_CHECK_WINDOW     (1ULL << 27)

/* Findings after these are counted, but not reported one by one */
#define THINVM_CHECK_MAX_REPORTS 1000

/* Counts by number, in chunks that exist where something was counted */
#define THINVM_CHECK_CHUNK      THINVM_COUNTS_PER_LEAF

/* A count that has to become another one */
typedef struct ThinvmCheckFix {
    uint64_t number;                /* of a cluster, or of a page */
    bool page;
    bool leak;                      /* it is too high */
    bool own;                       /* set it to what it is: makes the sums of
                                       free clusters above it right */
    uint16_t count;
} ThinvmCheckFix;

typedef struct ThinvmCheck {
    ThinvmStore *st;
    ThinvmState *s;
    void (*report)(void *opaque, const char *message);
    void *opaque;
    unsigned nb_reports;
    ThinvmCheckResult *result;
    ThinvmInfoState info;

    bool first_walk;                /* what is not by window counts here */
    uint64_t window_start, window_end;  /* clusters */
    GHashTable *clusters, *pages;   /* number / CHUNK -> uint16_t[CHUNK] */
    GArray *extents;                /* ThinvmFreedRange, in clusters: those
                                       that the device's space map has */

    bool incomplete;                /* something could not be read: what hangs
                                       on it was not counted */
    GArray *fixes;                  /* ThinvmCheckFix; NULL: none wanted */

    /* The tree that is walked */
    const char *tree;               /* for messages */
    bool active_disk;
    uint64_t size_clusters;         /* nothing may be mapped from there on */
    uint64_t previous;              /* physical cluster, for fragmentation */
} ThinvmCheck;

void G_GNUC_PRINTF(2, 3) thinvm_check_corruption(ThinvmCheck *c,
                                                 const char *fmt, ...);
void G_GNUC_PRINTF(2, 3) thinvm_check_leak(ThinvmCheck *c, const char *fmt,
                                           ...);

/* NULL: nothing in that chunk was counted */
uint16_t *thinvm_check_chunk(GHashTable *counts, uint64_t number);
/* Returns what was counted before */
uint16_t thinvm_check_count(GHashTable *counts, uint64_t number);

/*
 * Copy a metadata page.  0, or a negative errno after it was reported; @what
 * is lost then.
 */
int coroutine_fn thinvm_check_read_page(ThinvmCheck *c,
                                        const ThinvmPageRef *ref, void *buf,
                                        const char *what);
/*
 * A pointer names this page: count that.  Returns true if it was the first
 * one and the page can be looked into.
 */
bool thinvm_check_enter_page(ThinvmCheck *c, const ThinvmPointer *ptr,
                             const char *what);

/* The reference count of a cluster as it is recorded; reports nothing */
int coroutine_fn thinvm_check_recorded(ThinvmCheck *c, uint64_t cluster,
                                       uint16_t *count);

/* check-repair.c: apply c->fixes, as far as @fix (THINVM_FIX_*) allows */
int coroutine_fn thinvm_check_repair(ThinvmCheck *c, int fix, Error **errp);

/* Walk all trees but that of the reference counts */
void coroutine_fn thinvm_check_walk(ThinvmCheck *c);

#endif
