/*
 * thinvm metadata engine: what its own files share
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Only the engine's own files include this.  See state.h for what the engine promises to others.
 *
 * Copy-on-write.  state->generation is the base that is being built.  A page
 * whose own generation is that one and that one pointer names may be changed
 * in place; any other is first replaced by a copy at a new place
 * (thinvm_page_shadow()).  Freezing is thus no more than adding one to
 * state->generation.  A page that several pointers name is copied with one
 * more reference to each of its children.
 *
 * Readers without the lock walk pages under RCU and check state->sequence
 * afterwards, since a place that was freed may be another page's by then.
 */
#ifndef BLOCK_THINVM_STATE_INT_H
#define BLOCK_THINVM_STATE_INT_H

#include "qemu/rcu.h"
#include "qemu/qht.h"
#include "qemu/seqlock.h"
#include "qemu/bitmap.h"
#include "qemu/interval-tree.h"
#include "state.h"

/* Clusters reserved at a time for allocations that have no goal */
#define THINVM_WINDOW           64
/* Pages of level 1 that look-ups find at once; 128 are 1 TiB at 64 KiB */
#define THINVM_SHORT_CUTS       256
/* Clean pages that may stay however small the cache: a path of each tree */
#define THINVM_MIN_CACHE_PAGES  64

/* Who looks whether a page was used: the clock of the cache, and heat.c */
#define THINVM_TOUCHED_CLOCK    1
#define THINVM_TOUCHED_HEAT     2
#define THINVM_TOUCHED_ALL      3

struct ThinvmPage {
    struct rcu_head rcu;
    uint64_t number;            /* place on the device */
    uint64_t generation;        /* that made it; 0: read from the device */
    uint64_t changed;           /* by operations of this record at the latest;
                                   see thinvm_state_set_applying() */
    uint16_t *count;            /* of pointers that name it */
    uint32_t crc;               /* valid once complete */
    uint32_t pins;
    uint32_t mark;              /* last prepare that touched it */
    ThinvmPageKind kind;
    uint8_t level;
    uint8_t tree;               /* leaf of an active tree: which, and its */
    uint64_t guest;             /* first guest cluster; to form runs */
    bool dirty;                 /* not on the device yet: never evicted */
    bool complete;              /* its bytes are what the device gets */
    uint8_t touched;            /* THINVM_TOUCHED_*: nobody cleared it since */
    uint8_t heat;               /* heat.c: how often it was touched lately */
    QTAILQ_ENTRY(ThinvmPage) link;      /* state->clean or state->dirty[] */
    QTAILQ_ENTRY(ThinvmPage) in_memory; /* state->all_pages */
    uint64_t data[THINVM_PAGE_SIZE / 8];
};

/* A metadata extent.  A page is free when its count is 0 and not held. */
typedef struct ThinvmMetaExtent {
    struct rcu_head rcu;
    uint64_t first_page;
    uint32_t nb_pages;
    bool retired;               /* gives out no more places */
    uint32_t nb_free;           /* neither counted nor held */
    uint32_t hint;              /* no free page below */
    bool dirty;                 /* counts changed since the last freeze */
    ThinvmPointer block;        /* its space block in the last base */
    uint16_t *count;
    unsigned long *busy;        /* counted or held */
} ThinvmMetaExtent;

typedef QTAILQ_HEAD(, ThinvmPage) ThinvmPageList;

/* Clusters that are to become metadata; taking.c */
typedef struct ThinvmTaking {
    uint64_t first, nb_clusters;        /* 0 clusters: none */
    ThinvmPage *next;                   /* page to look at */
    bool found;                         /* one that maps them */
} ThinvmTaking;

/* Ranks in which pages are completed: children before parents */
enum {
    THINVM_RANK_LEAF,           /* leaves of mapping and count trees */
    THINVM_RANK_INNER1,
    THINVM_RANK_INNER2,
    THINVM_RANK_INNER3,
    THINVM_RANK_SNAPSHOT_LEAF,
    THINVM_RANK_SNAPSHOT_INNER1,
    THINVM_RANK_SNAPSHOT_INNER2,
    THINVM_RANK_BACKING,
    THINVM_NB_RANKS
};

struct ThinvmState {
    QemuMutex lock;
    QemuSeqLock sequence;       /* odd while an operation is applied */

    /* What never changes */
    QemuUUID uuid;
    unsigned cluster_bits;
    uint64_t first_cluster;
    uint64_t journal_offset, journal_size;
    uint64_t compatible, readonly_compatible, incompatible;
    ThinvmBounds bounds;

    /* Scalars of the state */
    uint64_t virtual_size, vmstate_size, device_clusters;
    uint64_t epoch, generation;
    uint64_t next_snapshot_id, current_snapshot_id;
    uint32_t nb_snapshots, nb_snapshot_slots;
    uint32_t free_slot_hint;    /* no lower slot of a snapshot is free */
    uint32_t dirty_bound;
    /* Unwritten runs in all mapping pages, each of which may need a leaf;
     * exact, or (images of version 1.0) a lower bound */
    uint64_t promised_pages;
    bool promises_exact;

    /* Roots, encoded as in a page so that one walk serves all */
    ThinvmPointerLe root[THINVM_NB_TREES];
    ThinvmPointerLe count_root, snapshot_root, backing_root;
    ThinvmPointerLe space_root;
    ThinvmBacking backing;

    /* Pages in memory */
    struct qht pages;
    ThinvmPage **known;         /* some of them by number; page.c */
    ThinvmPageList all_pages;   /* that are in it, the newest first */
    ThinvmPageList clean;       /* clock, hand at the tail */
    ThinvmPageList dirty[THINVM_NB_RANKS];
    uint64_t nb_clean, nb_dirty, cache_limit;   /* pages */
    uint64_t hits, misses;
    uint32_t mark;
    ThinvmPage *short_cut[THINVM_SHORT_CUTS];   /* map.c */
    bool short_cut_used;
    GHashTable *checksums;      /* page number -> ThinvmChecksum; freeze.c */

    /* Metadata extents, in order of taking, and sorted by place */
    GPtrArray *extents;         /* ThinvmMetaExtent, owned */
    GPtrArray *extents_sorted;
    unsigned nb_retired;        /* of them */
    GArray *space_inner;        /* ThinvmPointer of level-1 inner pages */
    uint64_t nb_meta_pages, nb_meta_free;
    /* Freed pages (numbers) that a base still names: in the interval being
     * built, in the frozen one, in the one before */
    GArray *held_new, *held_frozen, *held_old;

    /* Space of data clusters */
    IntervalTreeRoot busy;      /* of clusters; space.c */
    uint64_t nb_busy;
    uint64_t search_hint;       /* no free cluster below that is not busy */
    uint64_t window_first, window_nb;
    GArray *freed;              /* ThinvmFreedRange */
    ThinvmTaking taking;

    ThinvmFrozen *frozen;
    /* Opening: the superblocks and which is being loaded; page.c */
    ThinvmSuperblock sb, older;
    bool has_older, loaded;
    bool older_has_more;        /* metadata extents that this base has not */
    /* Counts were met that cannot be: every further change is refused */
    bool damaged;
    uint64_t applying;          /* sequence of the record being replayed */
    uint64_t new_pages;         /* current prepare: places it may need */
    int64_t new_promises;       /* current prepare: change of promised_pages */
    bool grows;                 /* current prepare: and frees nothing */
    uint64_t last_count_leaf;   /* current prepare: asked for last */
    uint64_t nb_count_free;     /* clusters with count 0 */
};

/* ---- page.c: pages in memory, their places and reference counts ---- */

static inline ThinvmPointerLe *thinvm_page_slots(ThinvmPage *page)
{
    return (ThinvmPointerLe *)page->data;
}

static inline uint64_t thinvm_slot_word(const ThinvmPointerLe *slot)
{
    return le64_to_cpu(qatomic_read(&slot->word_le));
}

static inline ThinvmPointerType thinvm_slot_type(const ThinvmPointerLe *slot)
{
    return (thinvm_slot_word(slot) >> THINVM_PTR_TYPE_SHIFT) & 15;
}

static inline uint64_t thinvm_slot_address(const ThinvmPointerLe *slot)
{
    return thinvm_slot_word(slot) & THINVM_CLUSTER_MASK;
}

static inline bool thinvm_slot_shared_below(const ThinvmPointerLe *slot)
{
    return thinvm_slot_word(slot) & THINVM_PTR_SHARED_BELOW;
}

/* Replace a slot; the word last, for readers without the lock */
static inline void thinvm_slot_set(ThinvmPointerLe *slot, uint64_t word,
                                   uint32_t crc, uint32_t extra)
{
    slot->crc_le = cpu_to_le32(crc);
    slot->extra_le = cpu_to_le32(extra);
    qatomic_set(&slot->word_le, cpu_to_le64(word));
}

static inline uint64_t thinvm_slot_make(ThinvmPointerType type,
                                        uint64_t address)
{
    return address | (uint64_t)type << THINVM_PTR_TYPE_SHIFT;
}

static inline bool thinvm_page_writable(ThinvmState *s, ThinvmPage *page)
{
    return page->generation == s->generation && *page->count == 1;
}

/* Under RCU or the lock; NULL if not in memory */
ThinvmPage *thinvm_page_find(ThinvmState *s, uint64_t number);
/* The same by somebody who does not use it: it is as hot as before */
ThinvmPage *thinvm_page_peek(ThinvmState *s, uint64_t number);
/* Was it used since @who (THINVM_TOUCHED_*) asked before? */
bool thinvm_page_untouch(ThinvmPage *page, unsigned who);
/* The child of a PAGE slot, or NULL with the page added to want[] */
ThinvmPage *thinvm_page_get(ThinvmState *s, const ThinvmPointerLe *slot,
                            ThinvmPageKind kind, int level,
                            ThinvmNeeds *needs);
void thinvm_needs_want(ThinvmState *s, ThinvmNeeds *needs,
                       const ThinvmPageRef *ref);
/*
 * want[] has one page, a child of the page with @slots: put those other
 * children that lie in its block and are not in memory into near[], unless
 * they would drive pages out of the cache
 */
void thinvm_needs_neighbours(ThinvmState *s, ThinvmNeeds *needs,
                             const ThinvmPointerLe *slots);
/* The count of a page by place, or NULL if it is no metadata page */
uint16_t *thinvm_page_count(ThinvmState *s, uint64_t number,
                            ThinvmMetaExtent **extent);
/* A clean copy of another state's page as the one that @slot names; or NULL */
ThinvmPage *thinvm_page_adopt(ThinvmState *s, const ThinvmPointerLe *slot,
                              const ThinvmPage *from);
/* A new page with count 1, zero-filled, dirty.  Places were prepared. */
ThinvmPage *thinvm_page_new(ThinvmState *s, ThinvmPageKind kind, int level);
/* One reference more to, or less of, the page at @number */
void thinvm_page_ref(ThinvmState *s, uint64_t number);
/* true: it was the last one; the page is gone from memory and its place held */
bool thinvm_page_unref(ThinvmState *s, uint64_t number);
/*
 * Is the child of a PAGE slot in memory, and what it has to be?  If not the
 * image names it twice.
 */
bool thinvm_page_resident(ThinvmState *s, ThinvmPointerLe *slot,
                          ThinvmPageKind kind, int level);
/*
 * The child of @slot (a PAGE), made writable, with @slot pointing to it.
 * Children get references and the shared flag when it was shared.
 */
ThinvmPage *thinvm_page_shadow(ThinvmState *s, ThinvmPointerLe *slot);
void thinvm_pages_evict(ThinvmState *s);
/* A page that nothing names (repair) leaves memory */
void thinvm_page_forget(ThinvmState *s, uint64_t number);
void thinvm_pages_forget_clean(ThinvmState *s);
/* A frozen page is on the device now */
void thinvm_page_thaw(ThinvmState *s, ThinvmPage *page);
void thinvm_pages_init(ThinvmState *s);
void thinvm_pages_destroy(ThinvmState *s);
/* prepare: @page will be changed (@shared: or copied, being shared) */
void thinvm_page_touch(ThinvmState *s, ThinvmPage *page, bool shared);

/* ---- extents.c: places of pages ---- */
void thinvm_extents_init(ThinvmState *s);
void thinvm_extents_destroy(ThinvmState *s);
/* ThinvmBounds callbacks; opaque is the state */
bool thinvm_extents_have_page(void *opaque, uint64_t page);
bool thinvm_extents_have_clusters(void *opaque, uint64_t cluster,
                                  uint64_t nb_clusters);
ThinvmMetaExtent *thinvm_extent_add(ThinvmState *s, uint64_t first_page,
                                    uint32_t nb_pages);
/* A place for a page with count 1, or its return (@hold: a base names it) */
uint64_t thinvm_place_alloc(ThinvmState *s);
void thinvm_place_free(ThinvmState *s, uint64_t number, bool hold);
/* Does the page lie in an extent that is to be given back? */
bool thinvm_page_is_retired(ThinvmState *s, uint64_t number);
void thinvm_extents_hold_shift(ThinvmState *s);
void thinvm_extents_hold_release(ThinvmState *s);

/* ---- taking.c: clusters that are to become metadata ---- */

/* A page takes over what another one said, or goes */
void thinvm_taking_look(ThinvmState *s, ThinvmPage *page);
void thinvm_taking_page_leaves(ThinvmState *s, ThinvmPage *page);
/* Does a page in memory map any of these clusters? */
bool thinvm_taking_finds(ThinvmState *s, uint64_t first,
                         uint64_t nb_clusters);
/* ThinvmBounds callback, for pages that are read */
bool thinvm_taking_have_clusters(void *opaque, uint64_t cluster,
                                 uint64_t nb_clusters);

/* ---- count.c: the tree of reference counts of clusters ---- */

typedef enum ThinvmCountChange {
    THINVM_COUNT_INC,
    THINVM_COUNT_DEC,               /* 0 reached: freed, busy */
    THINVM_COUNT_TO_METADATA,       /* from 0 */
    THINVM_COUNT_FROM_METADATA,     /* to 0: freed, busy */
} ThinvmCountChange;

/* prepare: the counts of these clusters will change.  0, -EAGAIN */
int thinvm_count_need(ThinvmState *s, uint64_t first, uint64_t nb_clusters,
                      ThinvmNeeds *needs);
/* and they must be @from to @to now (replay): 0, -EAGAIN, -EBADMSG */
int thinvm_count_expect(ThinvmState *s, uint64_t first, uint64_t nb_clusters,
                        uint16_t from, uint16_t to, ThinvmNeeds *needs);
void thinvm_count_change(ThinvmState *s, uint64_t first, uint64_t nb_clusters,
                         ThinvmCountChange change);
int thinvm_count_get(ThinvmState *s, uint64_t cluster, uint16_t *count,
                     ThinvmNeeds *needs);
/* After loading: sums up the free clusters.  0, -EAGAIN */
int thinvm_count_load(ThinvmState *s, ThinvmNeeds *needs);
/* prepare and apply of GROW */
int thinvm_count_need_grow(ThinvmState *s, ThinvmNeeds *needs);
void thinvm_count_grow(ThinvmState *s, uint64_t device_clusters);
/* prepare and apply of SHRINK: 0, -EAGAIN, -EBADMSG (not all are free) */
int thinvm_count_need_shrink(ThinvmState *s, uint64_t device_clusters,
                             ThinvmNeeds *needs);
void thinvm_count_shrink(ThinvmState *s, uint64_t device_clusters);
/*
 * From *cluster on: one whose count's page, or one above it, is in a retired
 * extent.  1, 0 (there is none), -EAGAIN.  And give those other places.
 */
int thinvm_count_find_retired(ThinvmState *s, uint64_t *cluster,
                              ThinvmNeeds *needs);
void thinvm_count_rewrite(ThinvmState *s, uint64_t cluster);
/*
 * From @from on: the first cluster with count 0 that is not busy, and how
 * many follow it at least (at most @max).  0, -EAGAIN, -ENOSPC.
 */
int thinvm_count_find_free(ThinvmState *s, uint64_t from, uint64_t max,
                           uint64_t *first, uint64_t *nb_clusters,
                           ThinvmNeeds *needs);

/* Are all of these free, and not busy?  0, -EAGAIN, -ENOENT */
int thinvm_count_all_free(ThinvmState *s, uint64_t first, uint64_t nb_clusters,
                          ThinvmNeeds *needs);

/* ---- space.c ---- */
void thinvm_space_init(ThinvmState *s);
void thinvm_space_destroy(ThinvmState *s);
bool thinvm_space_is_busy(ThinvmState *s, uint64_t cluster);
/* The first cluster in [from, end) that is not busy, or is; @end: none */
uint64_t thinvm_space_next_idle(ThinvmState *s, uint64_t from, uint64_t end);
uint64_t thinvm_space_next_busy(ThinvmState *s, uint64_t from, uint64_t end);
void thinvm_space_set_busy(ThinvmState *s, uint64_t first, uint64_t nb);
/* Clear without making them searchable again: they are in use now */
void thinvm_space_clear_busy(ThinvmState *s, uint64_t first, uint64_t nb);
void thinvm_space_freed(ThinvmState *s, uint64_t first, uint64_t nb);
void thinvm_space_update_bounds(ThinvmState *s);
uint64_t thinvm_space_reserve_pages(ThinvmState *s);
/* Unwritten runs come (> 0) or go */
void thinvm_space_promise(ThinvmState *s, int64_t change);
/* What they will be after the operation that is being prepared */
uint64_t thinvm_space_promised_then(ThinvmState *s);
/* What no operation may use: the next freeze needs it for the space map */
uint64_t thinvm_space_last_pages(ThinvmState *s);

/* ---- map.c: mapping trees ---- */

/* An inner page came, went, or is shared now; the lock is held */
void thinvm_map_short_cut_clear(ThinvmState *s);

int thinvm_map_prepare(ThinvmState *s, const ThinvmOp *op, ThinvmNeeds *needs,
                       Error **errp);
void thinvm_map_apply(ThinvmState *s, const ThinvmOp *op);
/* The references that a copy of this page adds: prepare and apply */
int thinvm_map_need_copy(ThinvmState *s, ThinvmPage *page, ThinvmNeeds *needs);
void thinvm_map_copy_refs(ThinvmState *s, ThinvmPage *page);
/* Entries and runs of a page (and what its pages hold, if @pages_too) may be
 * shared from now on */
void thinvm_map_mark_shared(ThinvmPage *page, bool pages_too);
/*
 * One bounded step of freeing the tree below @root, whose holder may be
 * changed: prepare and apply.  0, -EAGAIN.
 */
int thinvm_map_need_drop_step(ThinvmState *s, const ThinvmPointerLe *root,
                              ThinvmNeeds *needs);
void thinvm_map_drop_step(ThinvmState *s, ThinvmPointerLe *root);
/* Before a freeze: leaves that are runs become runs */
void thinvm_map_form_runs(ThinvmState *s);

/* ---- snapshot.c ---- */
int thinvm_snapshot_prepare(ThinvmState *s, const ThinvmOp *op,
                            ThinvmNeeds *needs, Error **errp);
void thinvm_snapshot_apply(ThinvmState *s, const ThinvmOp *op);

/* The root in a record: 0, -EAGAIN, -ENOENT (the slot is free), -EBADMSG */
int thinvm_snapshot_root(ThinvmState *s, uint64_t slot, int tree, bool touch,
                         ThinvmNeeds *needs, const ThinvmPointerLe **root);
ThinvmPointerLe *thinvm_snapshot_writable_root(ThinvmState *s, uint64_t slot,
                                               int tree);
/* Is a page on the way to this slot in a retired extent?  Or -EAGAIN */
int thinvm_snapshot_need_rewrite(ThinvmState *s, uint64_t slot,
                                 ThinvmNeeds *needs);
void thinvm_snapshot_rewrite(ThinvmState *s, uint64_t slot);

/* ---- relocate.c ---- */
int thinvm_relocate_prepare(ThinvmState *s, const ThinvmOp *op, bool replay,
                            ThinvmNeeds *needs, Error **errp);
void thinvm_relocate_apply(ThinvmState *s, const ThinvmOp *op);

/* ---- state.c ---- */
/* The backing file's name, if its page is in a retired extent: 1; else 0 */
int thinvm_state_rewrite_backing(ThinvmState *s);

/* ---- freeze.c ---- */
/* The checksum of a child that was completed lately; else the slot's own */
uint32_t thinvm_slot_crc(ThinvmState *s, const ThinvmPointerLe *slot);
/* Put the checksums known by now into a copy of a page */
void thinvm_page_refresh(ThinvmState *s, ThinvmPage *page);

#endif
