/*
 * thinvm metadata engine: the state machine behind an image
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Engine layer; may rely on the format layer only.  It does no I/O: where it
 * lacks a metadata page it says which one, and somebody else (store.c in the
 * driver, an array in the unit tests) reads it and hands it in.
 *
 * What the state consists of: a mapping tree for the disk and one for VM
 * state, a tree of reference counts of physical clusters, counts of metadata
 * pages, snapshots, the backing file's name and a few scalars.  It changes
 * only through operations (ThinvmOp): thinvm_state_prepare() loads and decides
 * all that can fail, thinvm_state_apply() is deterministic and cannot fail.
 *
 * Invariants kept here (numbers of the design, section 4):
 *  2. A cluster freed by an operation stays busy until thinvm_space_unbusy().
 *  3. No page is used before its checksum and its contents were judged.
 *  4. Mapping entries and counts change in the same apply, so base plus any
 *     prefix of operations is consistent.
 *  And: a page that a durable base may name is never changed and its place
 *  never reused while one of the two newest bases names it.
 *
 * Locking: everything needs state->lock held, except thinvm_state_lookup()
 * and the readers of statistics.  The lock is never held across I/O.
 */
#ifndef BLOCK_THINVM_STATE_H
#define BLOCK_THINVM_STATE_H

#include "qemu/thread.h"
#include "qemu/queue.h"
#include "format.h"

typedef struct ThinvmState ThinvmState;
typedef struct ThinvmPage ThinvmPage;       /* a page in memory; page.c */

/* A metadata page that somebody should read and hand to _insert_page() */
typedef struct ThinvmPageRef {
    uint64_t page;
    uint32_t crc;
    ThinvmPageKind kind;
    uint8_t level;
} ThinvmPageRef;

/* Pages that lie in one aligned block of the device, read at once or not */
#define THINVM_BLOCK_PAGES      16

/*
 * Pages that an operation (or a look-up) lacks, and those that it holds in
 * memory meanwhile.  One for each attempt: init, then { call; while -EAGAIN:
 * read all of want[], insert; call again }, then destroy.  Inserted pages
 * stay pinned until the destroy, so that the loop ends.  near[] are others of
 * the block of want[0], which nobody lacks: one read may bring them along.
 */
typedef struct ThinvmNeeds {
    ThinvmPageRef *want;
    unsigned nb_want, max_want;
    ThinvmPageRef *near;        /* NULL, or THINVM_BLOCK_PAGES of them */
    unsigned nb_near;
    uint64_t waited;            /* page for which another's read was awaited */
    ThinvmPage **pinned;
    unsigned nb_pinned, max_pinned;
    uint64_t generation;        /* being built when want[] was begun */
} ThinvmNeeds;

void thinvm_needs_init(ThinvmNeeds *needs);
void thinvm_needs_destroy(ThinvmState *s, ThinvmNeeds *needs);

/* ------------------------------------------------------------------ */
/* Life                                                                */

/*
 * A state on the base that @sb names.  Nothing is loaded yet: call
 * thinvm_state_load() until it returns 0.  @cache_size: bytes of clean pages
 * that may stay in memory.  @older: the other valid superblock, or NULL: the
 * pages of its base are kept from reuse.
 */
ThinvmState *thinvm_state_new(const ThinvmSuperblock *sb,
                              const ThinvmSuperblock *older,
                              uint64_t cache_size);
/* Loads the space map.  0, -EAGAIN (see ThinvmNeeds), or -EBADMSG */
int thinvm_state_load(ThinvmState *s, ThinvmNeeds *needs, Error **errp);
/*
 * The state of a new, empty image: @sb gives uuid, cluster_bits, journal
 * and virtual size, device_clusters; the rest is filled in.  Nothing was
 * written; the first checkpoint does that.  Fails if the device is too small.
 */
ThinvmState *thinvm_state_new_empty(const ThinvmSuperblock *sb,
                                    uint64_t cache_size, Error **errp);
/* Bytes of device that a new image with these parameters needs at least */
uint64_t thinvm_state_minimum_device(const ThinvmSuperblock *sb);
void thinvm_state_free(ThinvmState *s);

void thinvm_state_lock(ThinvmState *s);
void thinvm_state_unlock(ThinvmState *s);

/*
 * Hand in a page that was read.  Judges checksum and contents; -EBADMSG with
 * @errp if they are wrong.  Copies @buf (4 KiB).  Pins it in @needs if given.
 * A page that is there already is just pinned.
 */
int thinvm_state_insert_page(ThinvmState *s, const ThinvmPageRef *ref,
                             const void *buf, ThinvmNeeds *needs,
                             Error **errp);
/* The same of near[]: if it is wrong, or there, nothing happens */
void thinvm_state_insert_neighbour(ThinvmState *s, const ThinvmPageRef *ref,
                                   const void *buf, const ThinvmNeeds *needs);

/* Dirty pages at which a checkpoint must have been written; clamp */
#define THINVM_MIN_DIRTY_BOUND  64
#define THINVM_MAX_DIRTY_BOUND  4096
/* What it is, at most, for a disk of so many clusters */
uint32_t thinvm_space_dirty_bound(uint64_t virtual_clusters);

/* Scalars; stable while the lock is held */
typedef struct ThinvmInfoState {
    QemuUUID uuid;
    uint64_t virtual_size, vmstate_size;    /* bytes */
    uint64_t device_clusters, first_cluster;
    unsigned cluster_bits;
    uint64_t epoch;
    uint64_t generation;            /* that the next checkpoint will have */
    uint64_t allocated_clusters;    /* of data, snapshots included */
    uint64_t free_clusters;         /* count 0, busy ones included */
    uint64_t busy_clusters;         /* reserved, or freed but not reusable */
    uint64_t available_clusters;    /* that a reservation can have at once */
    uint64_t metadata_pages, free_metadata_pages, dirty_pages, dirty_bound;
    /* kept for the leaves of unwritten runs; exact, or at most that many */
    uint64_t promised_pages;
    bool promises_exact;
    uint64_t cached_pages, cache_limit;     /* pages */
    uint64_t cache_hits, cache_misses;
    uint32_t nb_snapshots;
    uint64_t current_snapshot_id;
} ThinvmInfoState;
void thinvm_state_info(ThinvmState *s, ThinvmInfoState *info);
/* Are so many quarters of the bound on dirty pages in use?  Needs no lock:
   without it, the answer may be old by an operation */
bool thinvm_state_dirty_reaches(const ThinvmState *s, unsigned quarters);
void thinvm_state_set_cache_size(ThinvmState *s, uint64_t bytes);
/* For the next base; lock */
void thinvm_state_set_template(ThinvmState *s, const ThinvmTemplateId *id);
/* Points into the state; empty name: no backing file */
const ThinvmBacking *thinvm_state_backing(ThinvmState *s);

/* ------------------------------------------------------------------ */
/* Look-up                                                             */

typedef enum ThinvmMappingType {
    THINVM_MAPPING_NONE,        /* reads from the backing file, else zeroes */
    THINVM_MAPPING_ZERO,
    THINVM_MAPPING_DATA,        /* physical, valid, source, shared */
} ThinvmMappingType;

/*
 * @count guest clusters from @guest have this mapping: physical clusters are
 * contiguous; valid bits, source and shared are alike (a longer range is
 * joined only when all are; a data mapping that is not fully valid may be of
 * one cluster only).
 */
typedef struct ThinvmMapping {
    ThinvmMappingType type;
    uint64_t guest, count;      /* clusters */
    uint64_t physical;
    uint16_t valid;
    ThinvmSource source;
    /* a write must go to a new cluster, because something else references
       it, or because it is marked (source TEMPLATE); decided exactly by the
       look-up for the active trees when asked for (for_write) */
    bool shared;
} ThinvmMapping;

/*
 * Look @guest up in an active tree (or, when @root is not NULL, in the tree
 * below that pointer), for at most @count clusters.  Takes no lock when the
 * pages are in memory; any thread that is registered with RCU.
 * 0; -EAGAIN: read want[], insert, call again (it may shorten the result
 * rather than ask for more pages); -EBADMSG.
 * @for_write: also settle whether the cluster is shared (may ask for count
 * pages if it is possibly so).
 */
int thinvm_state_lookup(ThinvmState *s, int tree, const ThinvmPointer *root,
                        uint64_t guest, uint64_t count, bool for_write,
                        ThinvmMapping *mapping, ThinvmNeeds *needs);
/*
 * The same for an active tree as far as it goes without lock and without
 * needs: 0, or -EAGAIN where only the general look-up can tell.
 */
int thinvm_state_lookup_cached(ThinvmState *s, int tree, uint64_t guest,
                               uint64_t count, bool for_write,
                               ThinvmMapping *mapping);

/* ------------------------------------------------------------------ */
/* Operations                                                          */

/*
 * 0: may be applied now, as long as the lock is not released in between.
 * -EAGAIN: pages are wanted.  -ENOSPC: needs metadata space: extend (see
 * thinvm_space_metadata_wanted()) and try again; if that is impossible the
 * operation must be refused.  -EALREADY: would change nothing; do not
 * journal it.  -EINVAL, -EOVERFLOW (limit of roots), -ENOENT (snapshot): with
 * @errp.  -EBADMSG when @replay and the operation cannot be right in this
 * state (a damaged or foreign journal).
 * @replay: out of a journal: everything is judged, and nothing is believed;
 * reserves are not kept back.
 */
int thinvm_state_prepare(ThinvmState *s, const ThinvmOp *op, bool replay,
                         ThinvmNeeds *needs, Error **errp);
void thinvm_state_apply(ThinvmState *s, const ThinvmOp *op);

/*
 * The longest UNMAP that one operation may do from @guest: *count is reduced
 * to it.  0, -EAGAIN, -EBADMSG.  *nothing: set if these clusters read from
 * @source already and have no cluster (skip them).
 */
int thinvm_state_unmap_step(ThinvmState *s, int tree, uint64_t guest,
                            ThinvmSource source, uint64_t *count,
                            bool *nothing, ThinvmNeeds *needs);

/*
 * The operations applied from now on are those of this record, or of an
 * earlier one; UINT64_MAX: of any.  For thinvm_state_adopt().
 */
void thinvm_state_set_applying(ThinvmState *s, uint64_t sequence);

/* ------------------------------------------------------------------ */
/* Filling memory ahead of need (adopt.c)                              */

#define THINVM_WARM_TREES   2   /* the disk's mapping, counts of clusters */

/* How far a preload has come; zeroes: not begun */
typedef struct ThinvmWarmCursor {
    int tree;
    uint64_t cluster;
} ThinvmWarmCursor;

/*
 * One bounded step: 0 when everything is in memory, or -EAGAIN with at most
 * @max pages in want[].  Those that are then inserted need no second look.
 */
int thinvm_state_preload(ThinvmState *s, ThinvmWarmCursor *c, unsigned max,
                         ThinvmNeeds *needs);
unsigned thinvm_state_preload_percent(ThinvmState *s,
                                      const ThinvmWarmCursor *c);
/* A leaf of the disk's mapping (number: guest cluster / 512), and its heat */
typedef struct ThinvmHotLeaf {
    uint32_t leaf;
    uint8_t heat;
} ThinvmHotLeaf;

/*
 * One bounded step over the leaves in memory from *@leaf on, each of which is
 * added to @found (of ThinvmHotLeaf).  Ends what counts as their recent use.
 * False: there are no more.
 */
bool thinvm_state_sample_heat(ThinvmState *s, uint64_t *leaf, GArray *found);
void thinvm_heat_sort(GArray *found);           /* the hottest first */

/* How far loading a list of hot leaves has come; the list is the caller's */
typedef struct ThinvmHotCursor {
    const uint32_t *leaf;
    unsigned nb, at;
    uint64_t pages;             /* clean ones that are to stay for them */
} ThinvmHotCursor;

/*
 * One bounded step: 0 when those of them that may fill the cache are in
 * memory, or -EAGAIN as above.
 */
int thinvm_state_preload_hot(ThinvmState *s, ThinvmHotCursor *c, unsigned max,
                             ThinvmNeeds *needs);
/* Would @pages more drive others out? */
bool thinvm_state_cache_full(ThinvmState *s, unsigned pages);

/*
 * Take over what @old, an earlier state of the same image, has in memory, as
 * far as the base of @s names the same pages.  Nothing was applied to @s yet.
 * @sequence: what the base of @s includes, if @old has the same history up to
 * there; else 0.  Both locks are held, that of @s was taken first.  0, or
 * -EAGAIN: pages of inner levels are wanted (insert, call again; or leave it
 * at that).  Adds to *@adopted.
 */
int thinvm_state_adopt(ThinvmState *s, ThinvmState *old, uint64_t sequence,
                       ThinvmNeeds *needs, uint64_t *adopted);
/* Statistics go on where those of @old are */
void thinvm_state_adopt_counters(ThinvmState *s, ThinvmState *old);

/* ------------------------------------------------------------------ */
/* Space                                                               */

/*
 * Reserve up to @max contiguous free clusters (at least one): from @goal on
 * when that is free (0: no wish), else by the policy (low, contiguous).  They
 * are busy until a MAP or META_EXTEND uses them or thinvm_space_unbusy().
 * 0, -EAGAIN, -ENOSPC.
 */
int thinvm_space_reserve(ThinvmState *s, uint64_t goal, uint64_t max,
                         uint64_t *first, uint64_t *nb_clusters,
                         ThinvmNeeds *needs);
/* Make just these busy, all of which must be free.  0, -EAGAIN, -ENOENT */
int thinvm_space_take(ThinvmState *s, uint64_t first, uint64_t nb_clusters,
                      ThinvmNeeds *needs);
void thinvm_space_unbusy(ThinvmState *s, uint64_t first, uint64_t nb_clusters);
/* What is held ready for reservations to come is given back: others write now */
void thinvm_space_stop_reserving(ThinvmState *s);

typedef struct ThinvmFreedRange {
    uint64_t first, nb_clusters;
} ThinvmFreedRange;
/*
 * Clusters that applied operations freed since the last call: an array of
 * ThinvmFreedRange, owned by the caller, or NULL.  All are busy.
 */
GArray *thinvm_space_take_freed(ThinvmState *s);

/*
 * Clusters that a META_EXTEND should take now to keep the reserves: 0 if
 * there is enough.  *urgent: operations are about to be refused.
 */
uint64_t thinvm_space_metadata_wanted(ThinvmState *s, bool *urgent);
/*
 * Before a META_EXTEND: looks at the pages in memory a step at a time, so that
 * the operation need not look at all of them.  step: -EAGAIN until it is done.
 * Whatever becomes of it, end it.  Lock; one at a time.
 */
void thinvm_taking_begin(ThinvmState *s, uint64_t first, uint64_t nb_clusters);
int thinvm_taking_step(ThinvmState *s);
void thinvm_taking_end(ThinvmState *s);
/*
 * Clusters of metadata that must be had beyond the present ones before this
 * many unwritten runs more can be mapped.
 */
uint64_t thinvm_space_for_unwritten_runs(ThinvmState *s, uint64_t runs);

/* ------------------------------------------------------------------ */
/* Checkpoint                                                          */

/*
 * A frozen base: everything that was dirty, immutable from now on.  At most
 * one exists.  pages[] is in the order in which they must be completed:
 * children before parents.  Only the code of checkpoint.c uses this.
 */
typedef struct ThinvmFrozen {
    ThinvmPage **pages;
    unsigned nb_pages;
    ThinvmSuperblock superblock;    /* pointers complete after the last page */
} ThinvmFrozen;

/*
 * Freeze.  The caller holds the lock and has cut the journal record whose
 * sequence the base will carry; it fills in sequence, epoch,
 * journal_position and record_crc of frozen->superblock itself, later.  Only
 * where thinvm_state_may_freeze(): the space map has places to move to.
 */
bool thinvm_state_may_freeze(ThinvmState *s);
ThinvmFrozen *thinvm_state_freeze(ThinvmState *s);
/*
 * Complete pages[i] (in order): children's checksums go in, its own is
 * computed.  Returns its 4 KiB; *page is its place.  No lock needed.
 */
const void *thinvm_frozen_complete_page(ThinvmState *s, ThinvmFrozen *f,
                                        unsigned i, uint64_t *page);
/* After the last page: the superblock's pointers get their checksums */
void thinvm_frozen_complete(ThinvmState *s, ThinvmFrozen *f);
/* The superblock is durable: pages become clean; frees @f */
void thinvm_state_thaw(ThinvmState *s, ThinvmFrozen *f);

/* ------------------------------------------------------------------ */
/* Compaction (relocate.c)                                             */

/* Behind the last cluster with a count: 0, -EAGAIN */
int thinvm_state_high_water(ThinvmState *s, uint64_t *end,
                            ThinvmNeeds *needs);

/* What a tree has at a place that is to be moved */
typedef struct ThinvmRelocation {
    uint64_t guest;             /* in: where to look; out: of the first one */
    uint64_t next;              /* the tree goes on there */
    uint64_t count;             /* clusters at or behind the limit; 0: none */
    uint64_t physical;
    uint16_t valid;             /* alike */
    bool retired;               /* a page on the way is in such an extent */
    uint64_t page[THINVM_INNER_LEVELS + 1]; /* their numbers, by level; or 0 */
} ThinvmRelocation;

/*
 * Look at one leaf of a tree, from @r->guest to its end.  @holder: 0 or the
 * slot of a snapshot plus one.  0, -EAGAIN, -ENOENT (no such snapshot),
 * -EBADMSG.
 */
int thinvm_compact_look(ThinvmState *s, int tree, uint64_t holder,
                        uint64_t limit, ThinvmRelocation *r,
                        ThinvmNeeds *needs);
/*
 * Retire the last metadata extent that reaches behind @limit: no more pages
 * are put there.  Whether one was; if not for want of pages elsewhere,
 * *missing is how many.
 */
bool thinvm_compact_retire(ThinvmState *s, uint64_t limit, uint64_t *missing);
/* They may be used again */
void thinvm_compact_reinstate(ThinvmState *s);
/*
 * Another place for one page in them that no RELOCATE leads to, without an
 * operation.  1; 0: there is none; -EAGAIN, -ENOSPC.  *cluster and *slot are
 * 0 to begin with.
 */
int thinvm_compact_rewrite(ThinvmState *s, uint64_t *cluster, uint32_t *slot,
                           ThinvmNeeds *needs);
/*
 * Give one back that neither the state nor one of the two newest bases has a
 * page in.  No operation says so, only the next base: its clusters stay busy,
 * and must until two more checkpoints were written; then thinvm_space_unbusy().
 * 0, -EAGAIN, -ENOENT (there is none), -ENOSPC.
 */
int thinvm_compact_release(ThinvmState *s, ThinvmFreedRange *range,
                           ThinvmNeeds *needs);
/*
 * The older base has extents that were given back: it knows nothing of what
 * operations may do with their clusters, so that a checkpoint comes first.
 */
bool thinvm_state_older_has_more(ThinvmState *s);

/* ------------------------------------------------------------------ */
/* Snapshots                                                           */

/*
 * Read the slot'th snapshot (0 to nb_snapshot_slots - 1).  0, -EAGAIN,
 * -ENOENT (the slot is free), -EBADMSG.
 */
int thinvm_snapshot_read(ThinvmState *s, uint32_t slot, ThinvmSnapshot *snap,
                         ThinvmNeeds *needs, Error **errp);
uint32_t thinvm_snapshot_nb_slots(ThinvmState *s);
/* The id that the next SNAPSHOT_CREATE must carry */
uint64_t thinvm_snapshot_next_id(ThinvmState *s);
/*
 * Before prepare: an operation that adds a record gets the lowest free slot,
 * and others stay as they are.  0 or -EAGAIN.
 */
int thinvm_snapshot_choose_slot(ThinvmState *s, ThinvmOp *op,
                                ThinvmNeeds *needs);

/* What would come free if a tree went: what no other tree uses */
typedef struct ThinvmExclusive {
    uint64_t clusters, pages;
} ThinvmExclusive;
/*
 * Adds to @sum what the piece of the tree below @root that begins at *guest
 * holds alone, and advances *guest to the next piece; the tree ends at
 * THINVM_MAX_GUEST_CLUSTERS.  0, -EAGAIN, -EBADMSG.
 */
int thinvm_map_exclusive_step(ThinvmState *s, const ThinvmPointer *root,
                              uint64_t *guest, ThinvmExclusive *sum,
                              ThinvmNeeds *needs);
/*
 * About the first guest cluster below @root that names something, as far as
 * pages in memory tell: how far a deletion has come.
 */
uint64_t thinvm_map_first_used(ThinvmState *s, const ThinvmPointer *root);

/* ------------------------------------------------------------------ */
/* Check (qemu-img check): walks everything, through the needs loop     */

/* Page count and cluster count as recorded; for the checker */
int thinvm_state_page_count(ThinvmState *s, uint64_t page, uint16_t *count);
int thinvm_state_cluster_count(ThinvmState *s, uint64_t cluster,
                               uint16_t *count, ThinvmNeeds *needs);
/* The @nr'th metadata extent, in clusters, from 0; false: there are no more */
bool thinvm_state_extent(ThinvmState *s, unsigned nr, ThinvmFreedRange *range);
/* Root pointers as they are now (active trees, count tree); for the checker */
void thinvm_state_roots(ThinvmState *s, ThinvmPointer *map,
                        ThinvmPointer *vmstate, ThinvmPointer *count,
                        ThinvmPointer *snapshot, ThinvmPointer *backing);
/*
 * The contents of any metadata page in memory or to be loaded: copies 4 KiB
 * to @buf.  0, -EAGAIN (wanted with the given crc), -EBADMSG.
 */
int thinvm_state_read_page(ThinvmState *s, const ThinvmPageRef *ref, void *buf,
                           ThinvmNeeds *needs);

/*
 * Repair.  Counts are set to what a walk of all trees found, in memory and
 * without a journal record; nothing else may run meanwhile.  The caller then
 * writes two checkpoints: the first makes all corrections durable at once,
 * the second brings them into the older base too.
 */
/* 0; -EAGAIN (read want[], insert, call again); -ENOSPC */
int thinvm_repair_cluster_count(ThinvmState *s, uint64_t cluster,
                                uint16_t count, ThinvmNeeds *needs);
int thinvm_repair_page_count(ThinvmState *s, uint64_t page, uint16_t count);
/*
 * The unwritten runs in all mapping pages, each page taken once.  False: that
 * many places are not free, so the number is not for others to rely on.
 */
bool thinvm_repair_promises(ThinvmState *s, uint64_t unwritten_runs);
/* The same later, with the number that was given then and what changed it */
bool thinvm_repair_promise(ThinvmState *s);
/*
 * Entries may lack "possibly shared": from now on the counts decide.  Makes
 * two guest clusters on one physical cluster (counted as 2) safe: the next
 * write to either copies.  Also lets changes be made again.
 */
void thinvm_repair_distrust(ThinvmState *s);

#endif
