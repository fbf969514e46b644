/*
 * thinvm check: counting what is referenced
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Durability layer; only check*.c include this.  A check recounts all
 * references by walking every tree from its root (check-walk.c), and compares
 * with the counts that are recorded (check.c).  Repairing first makes the
 * trees readable again (check-rewrite.c), and then the counts what they have
 * to be (check-repair.c).
 */
#ifndef BLOCK_THINVM_CHECK_H
#define BLOCK_THINVM_CHECK_H

#include "repair.h"
#include "store-int.h"

/*
 * Clusters that are counted in one walk: bounds the memory to about ten times
 * as many bytes.  A larger device (2 TiB at 64 KiB) takes several walks.
 */
#define THINVM_CHECK_WINDOW     (1ULL << 25)

/* Findings after these are counted, but not reported one by one */
#define THINVM_CHECK_MAX_REPORTS 1000

/*
 * Users of a cluster that belongs to another place that get one of their own
 * in one repair.  A run has 512 in a pointer, and each that is remembered
 * takes some fifty bytes.
 */
#define THINVM_CHECK_MAX_DUPLICATES (1 << 18)

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

/* Trees that pages and clusters belong to; 0: none yet */
typedef enum ThinvmCheckTree {
    THINVM_CHECK_DISK = 1,
    THINVM_CHECK_VMSTATE,
    THINVM_CHECK_SNAPSHOTS,
    THINVM_CHECK_SPACE,
    THINVM_CHECK_BACKING,
    THINVM_CHECK_COUNTS,
} ThinvmCheckTree;

/* Where a page or a cluster belongs; @index in its tree.  Never 0 */
static inline uint64_t thinvm_check_place(ThinvmCheckTree tree, int level,
                                          uint64_t index)
{
    return (uint64_t)tree << 48 | (uint64_t)level << 44 | index;
}

/*
 * Names a user of a cluster, for ThinvmCheck.duplicates: entry @index of the
 * leaf @page, or cluster @index of the run in slot @slot of the inner page.
 */
static inline int64_t thinvm_check_user(uint64_t page, bool run, unsigned slot,
                                        unsigned index)
{
    return page << 18 | (uint64_t)run << 17 | slot << 9 | index;
}

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
    GHashTable *owners, *places;    /* number / CHUNK -> uint64_t[CHUNK]:
                                       the first place that was met */
    bool multiple;                  /* a cluster has more than one user */
    GArray *extents;                /* ThinvmFreedRange, in clusters: also
                                       those taken since the last base */

    bool incomplete;                /* something could not be read: what hangs
                                       on it was not counted */
    GArray *fixes;                  /* ThinvmCheckFix; NULL: none wanted */
    bool quiet;                     /* found before: not told again */
    bool rewriting;                 /* what is wrong is lost now */
    bool has_backing;

    /* What check-rewrite.c is for */
    bool damaged;                   /* a page lacks something, or is wrong */
    GHashTable *duplicates;         /* thinvm_check_user(): those that share a
                                       cluster with another place, as many as
                                       a repair separates */
    bool more_duplicates;           /* there are more */
    bool counts_lost;               /* what had counts was left out: all users
                                       must be seen */
    uint64_t unwritten_runs;        /* in all pages, each taken once */
    bool promises_wrong;            /* the image says another number */
    bool promises_short;        /* corrected, but not that many are free */
    uint64_t nb_unflagged;          /* clusters that look private, but are
                                       not */
    uint32_t nb_snapshots;          /* that were met */
    GHashTable *ids;                /* theirs */

    /* The tree that is walked */
    const char *tree;               /* for messages */
    ThinvmCheckTree kind;
    uint64_t guest;                 /* where the page being read begins */
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
 * is lost then.  1: items of it were wrong and are cleared in @buf; each was
 * reported (those of mapping trees by their place behind c->guest).
 */
int coroutine_fn thinvm_check_read_page(ThinvmCheck *c,
                                        const ThinvmPageRef *ref, void *buf,
                                        const char *what);
/*
 * A pointer in this place names this page: count that.  Returns true if it
 * was the first one and the page can be looked into.
 */
bool thinvm_check_enter_page(ThinvmCheck *c, const ThinvmPointer *ptr,
                             uint64_t place, const char *what);
/* Remember where a cluster or page is used; returns the first such place */
uint64_t thinvm_check_own(GHashTable *owners, uint64_t number, uint64_t place);

/* The reference count of a cluster as it is recorded; reports nothing */
int coroutine_fn thinvm_check_recorded(ThinvmCheck *c, uint64_t cluster,
                                       uint16_t *count);

/*
 * check-repair.c: repair what a walk has found, as far as @fix
 * (THINVM_FIX_*) allows.  The checkpoint mutex is held, and released.
 */
int coroutine_fn thinvm_check_repair(ThinvmCheck *c, int fix, Error **errp);

/*
 * check-rewrite.c: build the trees anew without what is damaged, in memory;
 * says what is lost.  @spare: users in c->duplicates get clusters of their own,
 * out of these (uint64_t); or NULL.  Counts are wrong afterwards.
 */
int coroutine_fn thinvm_check_rewrite(ThinvmCheck *c, GArray *spare,
                                      Error **errp);
/* Tell of a loss; @mapping: and what reads there now */
void thinvm_check_lost(ThinvmCheck *c, const char *what, bool mapping);

/* Guest offsets below a pointer to a page of @level of a mapping tree */
char *thinvm_check_guest_range(ThinvmCheck *c, uint64_t guest, int level);
/* Count what is in the trees all over again, and what has to be corrected */
void coroutine_fn thinvm_check_all(ThinvmCheck *c);

/* Walk all trees but that of the reference counts */
void coroutine_fn thinvm_check_walk(ThinvmCheck *c);

#endif
