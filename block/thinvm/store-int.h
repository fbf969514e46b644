/*
 * thinvm durability layer: what its own files share
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Only the files of this layer (store*.c, execute.c, journal.c, sums.c,
 * bases.c, replay.c, ring.c, preload.c, checkpoint.c, reclaim.c, check*.c)
 * include this.  See
 * store.h for what the layer promises to others.
 *
 * Locks, in the order in which they are taken:
 *
 *   follow        (a flag with a queue) one coroutine reads the journal of
 *                 another owner or replaces the state
 *   checkpoint    CoMutex: one checkpoint at a time; held across I/O
 *   grow          CoMutex: one enlargement of the device or of the metadata
 *                 space at a time; held across I/O
 *   leading       (a flag with a queue) one coroutine writes the journal
 *   state lock    thinvm_state_lock(): operations and the pending record;
 *                 never across I/O
 *   st->lock      the rest of the shared fields; never across I/O, and
 *                 nothing else is taken under it
 *
 * A coroutine that holds "checkpoint" may lead a commit; one that leads
 * never starts a checkpoint: that is why execute() makes sure, before it
 * applies anything, that the ring has room for it (journal_has_room()).
 */
#ifndef BLOCK_THINVM_STORE_INT_H
#define BLOCK_THINVM_STORE_INT_H

#include "qemu/queue.h"
#include "qemu/thread.h"
#include "store.h"

/* ---- Journal ------------------------------------------------------- */

/*
 * A record whose operations are fixed.  It is composed (header, place in
 * the ring, checksum) when its turn to be written comes, and from then on
 * its bytes do not change: a repeated write writes the same.
 */
typedef struct ThinvmJournalRecord {
    QSIMPLEQ_ENTRY(ThinvmJournalRecord) next;
    ThinvmRecord header;
    uint64_t position;          /* running, see ThinvmJournal; if composed */
    bool composed;
    uint32_t size;              /* bytes in the ring: padded to 4 KiB */
    uint8_t *buf;               /* @size bytes */
} ThinvmJournalRecord;

/* Checksums that one record may have, of those that may be held at a time */
#define THINVM_SUMS_LIMIT       32
#define THINVM_MAX_HELD         (4 * THINVM_SUMS_LIMIT)

/* Data that nobody may write to without thinvm_store_touch(); see sums.c */
typedef struct ThinvmHeldSum {
    ThinvmDataSum sum;
    uint64_t sequence;          /* of the record that maps it */
    bool spoiled;               /* it was written to: no checksum */
} ThinvmHeldSum;

typedef QSIMPLEQ_HEAD(, ThinvmJournalRecord) ThinvmJournalQueue;

/*
 * One round of group commit: callers that come while a round is being
 * written gather in the next one, and share its record and its flushes.
 */
typedef struct ThinvmRound {
    unsigned refs;
    bool durable;               /* somebody wants the record flushed */
    bool settle;                /* and no more to depend on its data */
    bool guest_flush;           /* flush even if there is no record */
    bool record_done, done;
    int record_ret, ret;
} ThinvmRound;

/*
 * Positions in the ring are "running": they count bytes from some lap on
 * and never wrap; the place in the ring is the remainder by its size.
 * head - tail never reaches the size of the ring.
 */
typedef struct ThinvmJournal {
    /* constant */
    uint64_t offset, size;      /* bytes */
    uint32_t record_limit;      /* bytes of the longest record we write */

    /* the state lock: the record that gathers operations */
    uint8_t *pending;           /* room for the header, then operations */
    uint32_t pending_length;    /* bytes, header included; 0: nothing */
    uint32_t pending_allocated;
    uint32_t pending_operations;
    ThinvmOp last_op;           /* the last one in it, for coalescing */
    uint32_t last_op_offset;    /* 0: none to coalesce with */
    uint32_t pending_sums;      /* bytes of its checksums; qatomic */
    bool pending_plain;         /* it cannot have them; qatomic to read */
    uint64_t next_sequence;     /* that the pending record will have */
    uint64_t lately_used;       /* bytes of the ring, at the last operation */

    /* st->lock */
    ThinvmJournalQueue sealed;  /* not written yet, oldest first */
    ThinvmJournalQueue unflushed; /* written, no flush confirmed them yet */
    uint64_t sealed_bytes;
    bool rewrite;               /* a flush failed: write unflushed[] again */
    unsigned flush_failures;    /* to tell flushes that overlapped one */
    int error;                  /* of the last round; 0 if it succeeded */
    uint64_t composed_sequence; /* last one composed (or replayed) */
    uint32_t composed_crc;
    uint64_t composed_epoch;
    uint64_t head;              /* running position after it */
    uint64_t last;              /* where it starts; head: it is in the base */
    uint64_t written_sequence, flushed_sequence;
    uint64_t base;              /* running position of the newest base */
    uint64_t tail;              /* of the older one: kept from there on */
    ThinvmHeldSum held[THINVM_MAX_HELD];
    unsigned nb_held;           /* qatomic to read */
    unsigned sums_pause;        /* commits until they are worth it again */
    bool sums_wanted;           /* qatomic to read */
    ThinvmRound *next_round;
    bool leading;
    CoQueue rounds;             /* waiters for any progress of a round */
} ThinvmJournal;

/* ---- Quarantine ---------------------------------------------------- */

/* Request epochs that may have members at the same time; power of two */
#define THINVM_REQUEST_EPOCHS   16

typedef struct ThinvmRequestCount {
    unsigned nb QEMU_ALIGNED(64);
} ThinvmRequestCount;

/* Clusters freed by the operations of one record in one request epoch */
typedef struct ThinvmQuarantine {
    QSIMPLEQ_ENTRY(ThinvmQuarantine) next;
    uint64_t sequence;          /* record that frees them */
    unsigned request_epoch;     /* requests up to this one may use them */
    GArray *ranges;             /* ThinvmFreedRange */
} ThinvmQuarantine;

/* A state that was replaced; requests may still be looking at it */
typedef struct ThinvmRetiredState {
    QSIMPLEQ_ENTRY(ThinvmRetiredState) next;
    ThinvmState *state;
    unsigned request_epoch;
} ThinvmRetiredState;

/* ---- Store --------------------------------------------------------- */

typedef enum ThinvmStoreMode {
    THINVM_STORE_READING,       /* somebody else may be the owner */
    THINVM_STORE_STARTING,      /* EPOCH is on its way */
    THINVM_STORE_WRITING,
} ThinvmStoreMode;

/*
 * A base and where its journal goes on.  What superblock slot it is in
 * decides where the next one goes.
 */
typedef struct ThinvmBases {
    ThinvmSuperblock newest, older;
    bool has_older;
    int newest_slot;
    bool suspect;               /* the other slot is damaged: erase it
                                   before its pages are reused */
    Error *damage;              /* why it is suspect, or NULL */
} ThinvmBases;

/*
 * The checksums of records applied lately, by which a base proves to be of
 * our own history (replay.c)
 */
#define THINVM_HISTORY  4096

typedef struct ThinvmHistory {
    struct {
        uint64_t sequence;
        uint32_t crc;
    } record[THINVM_HISTORY];
} ThinvmHistory;

/* Buffers for pages that are being read, kept for the next ones */
#define THINVM_PAGE_BUFFERS     64

/* Blocks of pages that are being read at once; more would keep data waiting */
#define THINVM_BLOCK_READS      4

typedef struct ThinvmBlockRead {        /* st->lock */
    uint64_t block;             /* pages from this times THINVM_BLOCK_PAGES */
    bool active;
    CoQueue waiters;
    void *buf;                  /* kept; the reader's while active */
} ThinvmBlockRead;

struct ThinvmStore {
    ThinvmDevice *dev;
    QemuMutex lock;
    void *page_buffers[THINVM_PAGE_BUFFERS];    /* st->lock */
    unsigned nb_page_buffers;
    ThinvmBlockRead block_reads[THINVM_BLOCK_READS];
    uint64_t bad_block;         /* the last that could not be read; st->lock */
    uint64_t cache_size;        /* bytes */
    QemuUUID uuid;
    unsigned cluster_bits;

    ThinvmState *state;         /* replaced only by a follower */
    ThinvmStoreMode mode;       /* qatomic */
    bool poisoned;              /* qatomic */
    uint64_t epoch;             /* ours, if writing */
    ThinvmJournal journal;
    ThinvmBases bases;          /* under the checkpoint mutex, or follow */

    /* checkpoint.c */
    CoMutex checkpoint_lock;
    ThinvmFrozen *frozen;       /* not on the device yet */
    GArray *frozen_pages;       /* ThinvmFrozenPage, completed */
    bool frozen_complete;
    bool (*go_on)(void *opaque);    /* may be NULL; asked between steps */
    void *go_on_opaque;
    bool interrupted;           /* by that; qatomic */
    uint64_t frozen_sequence;   /* st->lock from here */
    bool frozen_marked;         /* position and crc are known */
    uint64_t frozen_position;   /* running */
    uint32_t frozen_crc;
    uint64_t frozen_epoch;
    unsigned checkpointing;     /* somebody writes one now */
    unsigned nb_repair_checkpoints; /* to be written though no operation has
                                   changed anything; checkpoint_lock */
    CoQueue checkpoint_progress;/* woken at each step */

    /* reclaim.c */
    ThinvmRequestCount requests[THINVM_REQUEST_EPOCHS];
    unsigned request_epoch;     /* qatomic; written under st->lock */
    bool invalidated;           /* qatomic to read: parts came to be invalid, */
    unsigned invalidated_epoch; /* lately in this one */
    QSIMPLEQ_HEAD(, ThinvmQuarantine) quarantine;   /* st->lock, by age */
    uint64_t quarantined_ranges;                    /* qatomic to read */
    QSIMPLEQ_HEAD(, ThinvmRetiredState) retired;    /* st->lock */
    unsigned reserve_waiting;   /* requests that wait for others to leave */
    unsigned nb_discarding;     /* qatomic: batches on their way to be free */
    bool discard;
    CoMutex grow_lock;
    bool extension_due;         /* the worker's to do; qatomic */
    /* qatomic: with so many free clusters there was no metadata extent in a
       device of this size */
    uint64_t extend_free, extend_device;
    uint64_t shrunk_length;     /* of the device when the image gave up its
                                   end; qatomic */
    uint64_t hidden_sequence;   /* record that hides the snapshot which was
                                   hidden last; state lock */

    /* replay.c: following */
    bool following;             /* somebody catches up; st->lock */
    uint64_t follow_started, follow_finished;
    int follow_ret;
    uint64_t follow_changes;    /* times that anything changed */
    uint64_t follow_moves;      /* times that data of snapshots may have moved;
                                   st->lock */
    CoQueue follow_queue;
    uint64_t scanned_sequence;  /* end of journal that a scan confirmed */
    bool stale;                 /* memory may not agree with the device */
    bool last_summed;           /* the last record counts by its checksums */
    bool cut_by_sums;           /* the next one does not, for the same */
    bool length_unchecked;      /* the device may be too short for it */
    uint8_t *head_block;        /* 4 KiB at the head when last looked at */
    bool head_block_valid;
    ThinvmHistory *history;     /* of the records that state consists of */
    bool expects_end;           /* to find the journal's end here: */
    uint64_t end_sequence;
    uint32_t end_crc;

    void (*kick)(void *opaque);
    void *kick_opaque;

    /* qatomic */
    uint64_t nb_commits, nb_records, nb_operations, nb_checkpoints;
    uint64_t bytes_read, bytes_written;
    uint64_t nb_summed, nb_touched;     /* st->lock; for tests */
    uint64_t longest_commit_ns;
    uint64_t nb_catch_ups, nb_followed, nb_fresh_starts, nb_adopted;
};

typedef struct ThinvmFrozenPage {
    uint64_t page;
    const void *data;
} ThinvmFrozenPage;

/* Checkpoints until a page that was freed is named by no base any more */
#define THINVM_NB_BASES         2

/* ---- page-read.c ---- */

/*
 * Read all that @needs wants and hand it to @s.  -EBADMSG: a page was not
 * what its pointer says; may be right again after the caller asks again
 * (THINVM_PAGE_ATTEMPTS).
 */
int coroutine_fn thinvm_store_read_wanted(ThinvmStore *st, ThinvmState *s,
                                          ThinvmNeeds *needs, Error **errp);
/* When @st comes and goes */
void thinvm_page_read_init(ThinvmStore *st);
void thinvm_page_read_destroy(ThinvmStore *st);

/* ---- store.c ---- */

/* Metadata I/O of this store; refused once it is poisoned (writes) */
int coroutine_fn thinvm_store_pread(ThinvmStore *st, uint64_t offset,
                                    uint64_t bytes, void *buf, int event);
int coroutine_fn thinvm_store_pwrite(ThinvmStore *st, uint64_t offset,
                                     uint64_t bytes, const void *buf,
                                     int event);
/* Times that a request asks again for a page that proves wrong */
#define THINVM_PAGE_ATTEMPTS    8
/*
 * Ask the engine, under the state lock, until the answer is not -EAGAIN: the
 * pages that it wants are read meanwhile.  By the owner, or within a request.
 */
typedef int (*ThinvmQuestion)(ThinvmState *s, void *opaque,
                              ThinvmNeeds *needs);
int coroutine_fn thinvm_store_ask(ThinvmStore *st, ThinvmQuestion question,
                                  void *opaque, Error **errp);
/* 0, -EROFS, -EIO (poisoned) */
int thinvm_store_may_write(ThinvmStore *st);
void thinvm_store_kick(ThinvmStore *st);

/* ---- execute.c ---- */
/*
 * Execute with what ordinary operations lack: @unmap: @op->count is cut to
 * one step (and is 0 if nothing was to do); @internal: allowed while
 * starting, does not extend metadata space, may use the last of the ring.
 */
int coroutine_fn thinvm_store_execute_internal(ThinvmStore *st, ThinvmOp *op,
                                               bool unmap, bool internal,
                                               uint64_t *ticket, Error **errp);

/*
 * As thinvm_store_execute(), for who must know whether it was applied:
 * -EALREADY, without @errp, if there was nothing to change
 */
int coroutine_fn thinvm_store_execute_telling(ThinvmStore *st,
                                              const ThinvmOp *op,
                                              Error **errp);

/* ---- journal.c ---- */
void thinvm_journal_init(ThinvmStore *st, const ThinvmSuperblock *sb);
void thinvm_journal_destroy(ThinvmStore *st);
/* Forget what was not written; only where nothing is promised any more */
void thinvm_journal_drop(ThinvmStore *st);
/*
 * Append an operation that is about to be applied, under the same hold of the
 * state lock, to the pending record.  @summed: the checksum of
 * its data was passed to thinvm_sums_hold() just now.  State lock held
 */
void thinvm_journal_add(ThinvmStore *st, const ThinvmOp *op, bool summed);
/* Sequence of the record that holds the last operation.  State lock held */
uint64_t thinvm_journal_ticket(ThinvmStore *st);
/* Fix the pending record's contents.  State lock held */
void thinvm_journal_seal(ThinvmStore *st);
/*
 * Let a sequence number pass without a record, so that no journal leads from
 * before it to after it.  State lock held.  False: not everything that was
 * applied is durable yet.
 */
bool thinvm_journal_skip(ThinvmStore *st);
/* Would @op still leave the last quarter of the ring free?  State lock held */
bool thinvm_journal_has_room(ThinvmStore *st, const ThinvmOp *op);
/* Bytes of the ring in use, what is not written yet included */
uint64_t thinvm_journal_used(ThinvmStore *st);
/* Too much sealed and not written: whoever adds more commits first */
bool thinvm_journal_is_behind(ThinvmStore *st);
/* @event: BLKDBG_*, what the flush is for */
int coroutine_fn thinvm_journal_flush(ThinvmStore *st, int event);
/*
 * How many flushes, anybody's, have failed.  What was written before one that
 * failed may be lost, whatever a later one says.
 */
unsigned thinvm_journal_failures(ThinvmStore *st);
int coroutine_fn thinvm_journal_commit(ThinvmStore *st,
                                       ThinvmCommitLevel level,
                                       bool only_metadata);
/* 0, or -EBADMSG: the owner before said that it ends elsewhere */
int thinvm_journal_end_expected(ThinvmStore *st, Error **errp);

/* ---- sums.c ---- */
/* From now on this is data of an operation about to be applied.  State lock
   held.  False: there are too many; the operation has to do without */
bool thinvm_sums_hold(ThinvmStore *st, const ThinvmDataSum *sum);
/* and in this record.  State lock held */
void thinvm_sums_join(ThinvmStore *st, uint64_t sequence);
/* The others: st->lock held */
/* Put the checksums of a record there; their number, 0 if it has none */
unsigned thinvm_sums_collect(ThinvmStore *st, uint64_t sequence, uint8_t *dst);
/* The record is written the ordinary way */
void thinvm_sums_drop(ThinvmStore *st, uint64_t sequence);
void thinvm_sums_drop_all(ThinvmStore *st);
/* flushed_sequence has grown */
void thinvm_sums_settle(ThinvmStore *st);
/* Has the last record that was composed checksums, so that it needs one
   behind it? */
bool thinvm_sums_last(ThinvmStore *st);
/* Is there one of these that no flush has covered yet? */
bool thinvm_sums_unflushed(ThinvmStore *st);
/* After a guest's flush: are they worth it? */
void thinvm_sums_judge(ThinvmStore *st, uint32_t nb_operations);

/* ---- bases.c ---- */
int coroutine_fn thinvm_bases_read(ThinvmDevice *dev, ThinvmBases *bases,
                                   Error **errp);
/* Is there a base of @sequence or later that is not the one in force? */
int coroutine_fn thinvm_bases_moved(ThinvmStore *st, uint64_t sequence,
                                    bool *moved, Error **errp);
void thinvm_bases_destroy(ThinvmBases *bases);
/* A repair made the newest base: no journal leads there from the older one */
bool thinvm_bases_repaired(const ThinvmBases *bases);

/* ---- replay.c ---- */
/* Build a state out of base and journal, and put it in the place of st's */
int coroutine_fn thinvm_replay_open(ThinvmStore *st, Error **errp);
/*
 * The same from the older base and the journal since then, for the reason
 * @why; the newest base is not used any more.  -EBADMSG: that is no better,
 * -EUCLEAN: it is from before a repair; and nothing has changed.
 */
int coroutine_fn thinvm_replay_fall_back(ThinvmStore *st, const Error *why,
                                         Error **errp);
/* Is all that may be mapped within the device? */
int coroutine_fn thinvm_store_check_length(ThinvmStore *st, Error **errp);

/*
 * The last look before writing: apply what is new, or start afresh if this is
 * not the newest base's history.  On success the store is STARTING.
 */
int coroutine_fn thinvm_follow_finish(ThinvmStore *st, Error **errp);
/* A look-up met a damaged page: true if a fresh start was made */
bool coroutine_fn thinvm_follow_restart(ThinvmStore *st, ThinvmState *old);

/* ---- preload.c ---- */
/*
 * Give @s, just loaded from a base, the pages that st->state has in memory.
 * @sequence: of the base, if st->state is known to have the same history up
 * to there; else 0.  Between follow_enter() and follow_leave().
 */
void coroutine_fn thinvm_preload_adopt(ThinvmStore *st, ThinvmState *s,
                                       uint64_t sequence);

/* ---- checkpoint.c ---- */
/* Are dirty pages or the ring above this share of their bounds (of 4)? */
bool thinvm_checkpoint_due(ThinvmStore *st, unsigned quarters);
/* Past this share of the bounds: wait for one step of a checkpoint in progress,
   if there is one */
void coroutine_fn thinvm_checkpoint_pace(ThinvmStore *st, unsigned quarters);
/* A record was composed: is it the last one in the frozen base? st->lock */
void thinvm_checkpoint_mark(ThinvmStore *st, uint64_t sequence);
int coroutine_fn thinvm_checkpoint_first(ThinvmStore *st);
/* One that begins now, also if no operation came since the last */
int coroutine_fn thinvm_store_checkpoint_anew(ThinvmStore *st);
/* The state is being replaced; what is frozen goes with it */
void thinvm_checkpoint_forget(ThinvmStore *st);

/* ---- reclaim.c ---- */
/* Ranges in quarantine that are too many to wait for the worker */
#define THINVM_QUARANTINE_FULL  16384
void thinvm_reclaim_init(ThinvmStore *st);
void thinvm_reclaim_destroy(ThinvmStore *st);
/* Take what was freed just now; the state lock is held */
void thinvm_quarantine_add(ThinvmStore *st, ThinvmState *s,
                           uint64_t sequence);
void thinvm_quarantine_drop(ThinvmStore *st);
/* Of a follower that becomes the owner: free as far as the state says so */
void thinvm_quarantine_settle(ThinvmStore *st);
/* Freed by replay before anybody could look: at once free */
void thinvm_quarantine_skip(ThinvmState *s);
bool thinvm_quarantine_is_full(ThinvmStore *st);
/* An INVALIDATE was applied just now; the state lock is held */
void thinvm_requests_invalidated(ThinvmStore *st);
void thinvm_retire_state(ThinvmStore *st, ThinvmState *s);
/*
 * As thinvm_store_reserve(), but the lowest ones that are free now, and below
 * @limit; the device does not grow for it.
 */
int coroutine_fn thinvm_store_reserve_below(ThinvmStore *st, uint64_t limit,
                                            uint64_t max, uint64_t *first,
                                            uint64_t *nb_clusters);
/* Steps in which all can be taken that the largest reserve may lack */
#define THINVM_METADATA_STEPS   32
/* Take metadata space ahead of need, a step.  1; 0: nothing is wanted; -errno */
int coroutine_fn thinvm_store_extend_metadata(ThinvmStore *st);
/* Pages of the shortest metadata extent that is taken */
#define THINVM_EXTENT_LEAST     16ULL
/*
 * Reserve clusters for one, at most @wanted, all below @limit (0: anywhere):
 * places that are too short are passed over.  As thinvm_store_reserve_below()
 */
int coroutine_fn thinvm_store_reserve_extent(ThinvmStore *st, uint64_t limit,
                                             uint64_t wanted, uint64_t *first,
                                             uint64_t *nb);
/* Execute this META_EXTEND, of reserved clusters.  grow_lock is held */
int coroutine_fn thinvm_store_take_metadata(ThinvmStore *st, ThinvmOp *op);
/*
 * Leave it to the worker; false: there is none, or it has been told.  No I/O,
 * also under the state lock; true: kick it then.
 */
bool thinvm_store_extend_later(ThinvmStore *st);

/* ---- discard.c: arrays of ThinvmFreedRange ---- */
/* In order, and neighbours are one */
void thinvm_discard_join(GArray *ranges);
/*
 * Pass discards of @ranges (joined, busy) down.  Free clusters that complete
 * what the device can discard become busy and are added to @ranges.
 */
void coroutine_fn thinvm_discard_ranges(ThinvmStore *st, GArray *ranges);

#endif
