/*
 * thinvm durability: journal, checkpoints, opening, and what the driver calls
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Durability layer; relies on the engine (state.h) and the format.  Knows a
 * device only as ThinvmDevice, so that it runs in unit tests on a simulated
 * one.  Knows nothing of guests, QMP, modes or migration.
 *
 * Invariants kept here (design section 4): 1 (data flush before record), 2
 * (quarantine of freed clusters), 4, 5 (with the modes above), 7.
 *
 * Context: coroutine_fn throughout unless said; several threads at once.
 * The caller holds the graph lock for reading where the device needs it.
 */
#ifndef BLOCK_THINVM_STORE_H
#define BLOCK_THINVM_STORE_H

#include "qemu/coroutine.h"
#include "state.h"

/*
 * The device under an image.  Offsets and sizes in bytes, multiples of 512
 * for data and of 4 KiB for metadata.  All return 0 or a negative errno.
 * Buffers are of any alignment (the block layer bounces).
 */
typedef struct ThinvmDevice ThinvmDevice;
struct ThinvmDevice {
    int coroutine_fn (*co_pread)(ThinvmDevice *dev, uint64_t offset,
                                 uint64_t bytes, void *buf);
    int coroutine_fn (*co_pwrite)(ThinvmDevice *dev, uint64_t offset,
                                  uint64_t bytes, const void *buf);
    int coroutine_fn (*co_flush)(ThinvmDevice *dev);
    /* A hint; -ENOTSUP is fine */
    int coroutine_fn (*co_pdiscard)(ThinvmDevice *dev, uint64_t offset,
                                    uint64_t bytes);
    /* Current length, in bytes, or negative errno */
    int64_t coroutine_fn (*co_length)(ThinvmDevice *dev);
    /* Make it at least this long, which may be 0; -ENOSPC when it cannot be.
       If somebody else has enlarged it, co_length() knows of that then */
    int coroutine_fn (*co_grow)(ThinvmDevice *dev, uint64_t bytes);
    /*
     * The longest step in which it should be made longer ahead of need, in
     * bytes, since what is added takes space below at once.  0, or no such
     * function: no bound.
     */
    uint64_t coroutine_fn (*co_grow_bound)(ThinvmDevice *dev);
    /*
     * Bytes, aligned to as many, that a discard must have to give space back.
     * 0, or no such function: any will do.
     */
    uint64_t coroutine_fn (*co_discard_unit)(ThinvmDevice *dev);
    /*
     * From now on read what the device has, not what a cache has kept of it.
     * No such function: there is no cache.
     */
    int coroutine_fn (*co_forget_cache)(ThinvmDevice *dev, Error **errp);
    /* Comes before each I/O: a point to inject faults at and to trace
       (BLKDBG_*); may be NULL */
    void coroutine_fn (*co_event)(ThinvmDevice *dev, int event);
};

static inline void coroutine_fn thinvm_device_event(ThinvmDevice *dev,
                                                    int event)
{
    if (dev->co_event) {
        dev->co_event(dev, event);
    }
}

static inline int coroutine_fn thinvm_device_refresh(ThinvmDevice *dev,
                                                     Error **errp)
{
    return dev->co_forget_cache ? dev->co_forget_cache(dev, errp) : 0;
}

typedef struct ThinvmStore ThinvmStore;

typedef struct ThinvmStoreStats {
    uint64_t commits;           /* calls that had something to make durable */
    uint64_t records, operations;
    uint64_t checkpoints;
    uint64_t metadata_bytes_read, metadata_bytes_written;
    uint64_t journal_used;      /* bytes, since the older base */
    uint64_t longest_commit_ns;
    uint64_t pending_operations;
    uint64_t catch_ups, followed_records, fresh_starts, adopted_pages;
} ThinvmStoreStats;

/* ------------------------------------------------------------------ */
/* Create, open, close                                                 */

typedef struct ThinvmCreateParams {
    uint64_t virtual_size;      /* bytes, multiple of 512 */
    uint64_t cluster_size;      /* bytes, power of two */
    uint64_t journal_size;      /* bytes, multiple of 4 KiB */
    ThinvmBacking backing;      /* empty name: none */
    ThinvmTemplateId template;  /* length 0: none */
} ThinvmCreateParams;

/* Are these possible?  Messages name option, value, and what would be right */
bool thinvm_create_params_check(const ThinvmCreateParams *params, Error **errp);
/*
 * Write a new image: grows the device to the minimum if it can, invalidates
 * both superblock slots and the claims of whatever was there, flushes, writes
 * its own.  O(1): no data area is touched.  (Whether a former image may be
 * overwritten is the caller's business: owner.h.)
 */
int coroutine_fn thinvm_store_create(ThinvmDevice *dev,
                                     const ThinvmCreateParams *params,
                                     Error **errp);

/* From now on the device holds no image */
int coroutine_fn thinvm_store_erase(ThinvmDevice *dev, Error **errp);

/*
 * From now on, in both superblocks, this is the image's template, which is
 * complete then.  Nobody else may use the image.
 */
int coroutine_fn thinvm_store_set_template(ThinvmStore *st,
                                           const ThinvmTemplateId *id);

/*
 * Read the superblocks: the newest valid one to @sb, the other valid one to
 * @older (*has_older).  Warns in *damaged if a slot that held a newer
 * or equal generation seems damaged (for messages).  -EINVAL: no image here;
 * -EBADMSG: both are damaged; -ENOTSUP: a later version's.  Others: it cannot
 * be read, whatever it is.
 */
int coroutine_fn thinvm_store_probe(ThinvmDevice *dev, ThinvmSuperblock *sb,
                                    ThinvmSuperblock *older, bool *has_older,
                                    Error **errp);
/*
 * Open: superblock, space map, journal replayed in memory.  Writes nothing.
 * @cache_size: bytes, 0 for the default of this image.
 */
ThinvmStore *coroutine_fn thinvm_store_open(ThinvmDevice *dev,
                                            uint64_t cache_size,
                                            Error **errp);
/* Bytes; @virtual_size in bytes, too */
uint64_t thinvm_store_default_cache_size(uint64_t virtual_size,
                                         unsigned cluster_bits);
/*
 * Begin to write, as the owner of @epoch (greater than any in the journal):
 * catches up, starts afresh if the newest base is not ours, checks the
 * device's length, flushes what others have written, then journals EPOCH (not
 * yet durably).  Before this every change is refused (-EROFS).  When it has
 * started afresh, clusters that are free in the new state may still be read by
 * requests from before: such reads count only if catching up, or this, has not
 * happened meanwhile.
 */
int coroutine_fn thinvm_store_begin_writing(ThinvmStore *st, uint64_t epoch,
                                            Error **errp);
/*
 * End writing: commit durably, checkpoint if @checkpoint, then refuse
 * changes.  On error the store goes on as a writer.
 */
int coroutine_fn thinvm_store_end_writing(ThinvmStore *st, bool checkpoint,
                                          Error **errp);
/*
 * The same for one who takes over at once and flushes what we have written
 * (thinvm_store_begin_writing() does): spares a flush if all records are
 * durable.  Only where others see each write that has completed.
 */
int coroutine_fn thinvm_store_hand_over(ThinvmStore *st, Error **errp);
/* The journal's last record: sequence and checksum field (0: none yet) */
void thinvm_store_journal_end(ThinvmStore *st, uint64_t *sequence,
                              uint32_t *crc);
/*
 * thinvm_store_begin_writing() fails, with -EBADMSG, if that is not where it
 * finds the journal's end.
 */
void thinvm_store_expect_end(ThinvmStore *st, uint64_t sequence, uint32_t crc);
void thinvm_store_expect_any_end(ThinvmStore *st);
/* Have we read up to where the journal is expected to end? */
bool thinvm_store_at_end(ThinvmStore *st);
/* Refuse every further change at once, without I/O (lost ownership) */
void thinvm_store_poison(ThinvmStore *st);
bool thinvm_store_writable(ThinvmStore *st);
/* No I/O; any context; no request may be running */
void thinvm_store_free(ThinvmStore *st);

/*
 * The engine below; for information and look-ups of snapshots.  Of a store
 * that follows another owner it is replaced now and then: use it within a
 * request (thinvm_store_request_begin()), which keeps it.
 */
ThinvmState *thinvm_store_state(ThinvmStore *st);
void thinvm_store_stats(ThinvmStore *st, ThinvmStoreStats *stats);

/* ------------------------------------------------------------------ */
/* Requests, look-up, operations                                       */

/*
 * A request joins before its first look-up and leaves after its last I/O.
 * What it looked up stays unreused meanwhile (invariant 2).  No I/O, any
 * thread, does not wait.  Returns the token for the end.
 */
unsigned thinvm_store_request_begin(ThinvmStore *st);
void thinvm_store_request_end(ThinvmStore *st, unsigned token);

/*
 * thinvm_state_lookup() with the pages read as needed; 0 or negative errno.
 * Within a request.
 */
int coroutine_fn thinvm_store_lookup(ThinvmStore *st, int tree,
                                     const ThinvmPointer *root,
                                     uint64_t guest, uint64_t count,
                                     bool for_write, ThinvmMapping *mapping);

/*
 * thinvm_space_reserve() with everything tried before -ENOSPC is returned:
 * pages read, freed clusters reclaimed (a durable commit), device grown, other
 * requests waited for (half a second at most: they may be waiting for us).
 * What was freed after the caller's own request began is not available to it:
 * at -ENOSPC a caller may leave, join again, look up again and try once more.
 */
int coroutine_fn thinvm_store_reserve(ThinvmStore *st, uint64_t goal,
                                      uint64_t max, uint64_t *first,
                                      uint64_t *nb_clusters);
void thinvm_store_unreserve(ThinvmStore *st, uint64_t first,
                            uint64_t nb_clusters);
/*
 * Take into use all that the device has become longer by; @size (bytes): make
 * it at least this long before.  -ENOSPC if it stays shorter.
 */
int coroutine_fn thinvm_store_grow(ThinvmStore *st, uint64_t size,
                                   Error **errp);

/*
 * Apply one operation and put it into the pending record.  Data that it
 * refers to must have been written (completed) before.  May wait: for pages,
 * for a commit when the record is full, for a checkpoint when bounds are
 * near.  -EALREADY is turned into 0.  @ticket (may be NULL): for
 * thinvm_store_commit_ticket().  Extends metadata space as needed.
 */
int coroutine_fn thinvm_store_execute(ThinvmStore *st, const ThinvmOp *op,
                                      uint64_t *ticket, Error **errp);
/*
 * UNMAP a range of any length in bounded steps; clusters that are so already
 * are skipped.  For a very long range without a request of one's own, which
 * would keep in quarantine (and memory) what the steps free.
 */
int coroutine_fn thinvm_store_unmap(ThinvmStore *st, int tree, uint64_t guest,
                                    uint64_t count, ThinvmSource source,
                                    uint64_t *ticket, Error **errp);

typedef enum ThinvmCommitLevel {
    /* data flushed, record written; survives the process */
    THINVM_COMMIT_RECORD,
    /* and the record flushed; survives a power cut */
    THINVM_COMMIT_DURABLE,
    /*
     * The same, for a guest's flush: may be had with one flush of the device
     * instead of two, but then thinvm_store_touch() has something to do until
     * the next commit.
     */
    THINVM_COMMIT_FLUSHED,
} ThinvmCommitLevel;

/*
 * Commit everything applied before the call.  Callers at the same time share
 * a record and a flush.  A DURABLE commit with nothing pending still flushes
 * the device (it is the guest's flush) unless @only_metadata.
 */
int coroutine_fn thinvm_store_commit(ThinvmStore *st, ThinvmCommitLevel level,
                                     bool only_metadata);

/*
 * Are checksums of the data of small writes worth their time now?  A hint;
 * any context.
 */
bool thinvm_store_wants_sums(ThinvmStore *st);
/*
 * Have all requests left that may have found parts valid which no longer are?
 * Else somebody may still be writing there in place.  Any context.
 */
bool thinvm_store_invalid_left(ThinvmStore *st);
/*
 * Execute with the checksum of all data that it makes visible, as they were
 * passed to the device in one write to a place where nobody else was writing,
 * nor will before he can find them.
 */
int coroutine_fn thinvm_store_execute_summed(ThinvmStore *st,
                                             const ThinvmOp *op,
                                             const ThinvmDataSum *sum,
                                             uint64_t *ticket, Error **errp);
void thinvm_store_sum(ThinvmStore *st, uint64_t offset, const void *buf,
                      uint32_t bytes, ThinvmDataSum *sum);
/*
 * Before each write of data to a place that was not reserved for it just now.
 * May wait for a commit.  After the look-up that led there.
 */
bool thinvm_store_touches(ThinvmStore *st);
int coroutine_fn thinvm_store_touch_slow(ThinvmStore *st, uint64_t offset,
                                         uint64_t bytes);
static inline int coroutine_fn thinvm_store_touch(ThinvmStore *st,
                                                  uint64_t offset,
                                                  uint64_t bytes)
{
    return likely(!thinvm_store_touches(st)) ? 0 :
           thinvm_store_touch_slow(st, offset, bytes);
}
/*
 * The ticket of everything applied by now.  A write that found its mapping in
 * memory is as durable as that mapping is: it may have to wait for somebody
 * else's record.  Any context.
 */
uint64_t thinvm_store_ticket(ThinvmStore *st);
/* Wait until the record with this ticket is written (RECORD level) */
int coroutine_fn thinvm_store_commit_ticket(ThinvmStore *st, uint64_t ticket);

/* Write a checkpoint now (commits first).  Progress is in the trace */
int coroutine_fn thinvm_store_checkpoint(ThinvmStore *st);
/*
 * The same for as long as @go_on says so, which is asked between its steps.
 * -ECANCELED: it has stopped; the next one, anybody's, is its continuation.
 */
int coroutine_fn thinvm_store_checkpoint_while(ThinvmStore *st,
                                               bool (*go_on)(void *opaque),
                                               void *opaque);
/* Is one due?  For the background worker; any context */
bool thinvm_store_wants_checkpoint(ThinvmStore *st);
/*
 * Make freed clusters reusable whose freeing is durable and whose readers
 * have left; discards them on the device first if @discard.  Bounded work.
 * Called by the worker and, when space is short, by thinvm_store_reserve().
 */
int coroutine_fn thinvm_store_reclaim(ThinvmStore *st, bool discard);
/* Should reserve and reclaim pass discards down?  Default false */
void thinvm_store_set_discard(ThinvmStore *st, bool discard);
/* Take metadata space that operations will want.  The worker's business */
void coroutine_fn thinvm_store_extend_ahead(ThinvmStore *st);
/*
 * Called (any thread, no lock of the store held) when background work is
 * due: a checkpoint, a reclaim, a record that has gathered enough.
 */
void thinvm_store_set_kick(ThinvmStore *st, void (*kick)(void *opaque),
                           void *opaque);

/*
 * Follow the owner (a store that does not write): apply the records that
 * have appeared since.  *changed: something was applied, or the state was
 * opened afresh since the owner's base moved on.  Concurrent callers share
 * one catch-up.  The state object may be replaced: look it up again.
 */
int coroutine_fn thinvm_store_catch_up(ThinvmStore *st, bool *changed,
                                       Error **errp);
/*
 * How often a catch-up, anybody's, has changed what is known of the image.  A
 * reader compares the numbers before its look-up and after its last catch-up:
 * what another reader has applied in between counts too.  Any context.
 */
uint64_t thinvm_store_changes(ThinvmStore *st);
/*
 * The same for one who reads a snapshot.  What that says never changes, but
 * compaction moves where it lies, and then gives the former place to others.
 */
uint64_t thinvm_store_moves(ThinvmStore *st);

/*
 * Go over to the owner's newest base if that has moved on, so that taking
 * ownership will not have to.  For a follower's background work.
 */
int coroutine_fn thinvm_store_follow_base(ThinvmStore *st, Error **errp);

/* ------------------------------------------------------------------ */
/* Preloading: a follower reads the mapping ahead of need (preload.c)   */

typedef enum ThinvmStorePreloadState {
    THINVM_STORE_PRELOAD_RUNNING,
    THINVM_STORE_PRELOAD_COMPLETE,
    THINVM_STORE_PRELOAD_FULL,          /* the cache holds no more */
    THINVM_STORE_PRELOAD_FAILED,
} ThinvmStorePreloadState;

/* Zeroes to begin with.  One coroutine at a time */
typedef struct ThinvmStorePreload {
    ThinvmStorePreloadState state;
    uint64_t pages;                     /* read so far */
    unsigned percent;
    uint64_t fresh_starts;
    ThinvmHotCursor hot;                /* first of all, if the caller knows */
    ThinvmWarmCursor cursor;
} ThinvmStorePreload;

/*
 * One bounded step; whether another one is due.  Begins anew, and then hardly
 * reads anything, after a fresh start.
 */
bool coroutine_fn thinvm_store_preload(ThinvmStore *st, ThinvmStorePreload *p);
/*
 * The hottest leaves of the disk by what the owner says; @leaf must stay until
 * another list, or an empty one, takes its place.  If the cache is full, they
 * drive others out.
 */
void thinvm_store_preload_hot(ThinvmStorePreload *p, const uint32_t *leaf,
                              unsigned nb);
/* After a failure: the next step tries again.  Any context */
void thinvm_store_preload_retry(ThinvmStorePreload *p);

/* ------------------------------------------------------------------ */
/* Compaction; store-compact.c                                         */

/* Behind the last cluster that is in use, in bytes */
int coroutine_fn thinvm_store_high_water(ThinvmStore *st, uint64_t *bytes);

/*
 * Between lock and unlock nobody writes to, or changes, what these guest
 * clusters of a tree map, in place neither; reads may go on.  One range at a
 * time.
 */
typedef struct ThinvmCompactLocks {
    void coroutine_fn (*lock)(void *opaque, int tree, uint64_t guest,
                              uint64_t count);
    void coroutine_fn (*unlock)(void *opaque);
    void *opaque;
} ThinvmCompactLocks;

typedef struct ThinvmCompactStatus {
    uint64_t total;         /* bytes that were behind the limit at first */
    uint64_t moved;         /* bytes of clusters that were moved */
    uint64_t copied;        /* bytes of data read and written */
    uint64_t high_water;    /* bytes, when last looked */
} ThinvmCompactStatus;

typedef struct ThinvmCompact ThinvmCompact;

ThinvmCompact *thinvm_compact_new(ThinvmStore *st,
                                  const ThinvmCompactLocks *locks);
/* Any context; may be called at any time between steps */
void thinvm_compact_free(ThinvmCompact *c);
/*
 * One bounded step.  Not within a request of the caller's own, and no snapshot
 * is taken, and none gone back to, meanwhile.
 */
int coroutine_fn thinvm_compact_step(ThinvmCompact *c, bool *done,
                                     Error **errp);
void thinvm_compact_status(const ThinvmCompact *c,
                           ThinvmCompactStatus *status);

/*
 * Use no more than the first @size bytes of the device (0: as few as
 * possible); *result: how many these are.  Then @cut is to make the device that
 * small, or returns -ENOTSUP if somebody else will: until its length has
 * changed the image does not grow again by itself.
 */
typedef int coroutine_fn ThinvmStoreCut(void *opaque, uint64_t size);
int coroutine_fn thinvm_store_shrink(ThinvmStore *st, uint64_t size,
                                     ThinvmStoreCut *cut, void *opaque,
                                     uint64_t *result, Error **errp);
/* It may, after all.  Any context */
void thinvm_store_forget_shrink(ThinvmStore *st);
/*
 * All requests that joined before thinvm_store_requests_mark() have left.  Any
 * context; false: ask again later.
 */
unsigned thinvm_store_requests_mark(ThinvmStore *st);
bool thinvm_store_requests_left(ThinvmStore *st, unsigned mark);

/* ------------------------------------------------------------------ */
/* Snapshots; store-snapshot.c                                         */

/* A snapshot, for as long as it exists */
typedef struct ThinvmSnapshotName {
    uint32_t slot;
    uint64_t id;
} ThinvmSnapshotName;

/* The record in @slot.  -ENOENT, without @errp: the slot is free */
int coroutine_fn thinvm_store_read_snapshot(ThinvmStore *st, uint32_t slot,
                                            ThinvmSnapshot *snap,
                                            Error **errp);
/*
 * As thinvm_store_lookup(), in the disk that a snapshot holds.  -ENOENT: it is
 * not there any more, or being deleted.  Within a request.
 */
int coroutine_fn thinvm_store_lookup_snapshot(ThinvmStore *st,
                                              const ThinvmSnapshotName *name,
                                              uint64_t guest, uint64_t count,
                                              ThinvmMapping *mapping);
/* Is it there still?  0, -ENOENT, or an error of reading.  In a request */
int coroutine_fn thinvm_store_have_snapshot(ThinvmStore *st,
                                            const ThinvmSnapshotName *name);
/*
 * What the snapshot alone holds.  Takes one off *budget for each piece of
 * its tree; -ETIME when that was not enough.
 */
int coroutine_fn thinvm_store_exclusive(ThinvmStore *st,
                                        const ThinvmSnapshotName *name,
                                        unsigned *budget,
                                        ThinvmExclusive *sum, Error **errp);

/* ------------------------------------------------------------------ */
/* Check                                                               */

typedef struct ThinvmCheckResult {
    uint64_t corruptions, leaks;            /* found */
    uint64_t corruptions_fixed, leaks_fixed;
    uint64_t check_errors;
    uint64_t allocated_clusters, total_clusters, fragmented_clusters;
    uint64_t image_end_offset;              /* bytes */
} ThinvmCheckResult;

enum { THINVM_FIX_LEAKS = 1, THINVM_FIX_ERRORS = 2 };

/*
 * Walk all trees, recount, compare; report each finding through @report (a
 * message with structure, place, and the guest range concerned).
 */
int coroutine_fn thinvm_store_check(ThinvmStore *st, int fix,
                                    void (*report)(void *opaque,
                                                   const char *message),
                                    void *opaque, ThinvmCheckResult *result,
                                    Error **errp);

#endif
