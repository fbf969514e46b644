/*
 * blockdev-precopy: what still has to be copied, and in which order
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * One PrecopyTrack for a job.  It knows for each block of the disk whether the
 * target may hold something else than the source (dirty), and which blocks
 * somebody is working on; it chooses what is copied next.  It does no I/O.
 *
 * All functions may be called from any thread; each takes the lock for a
 * bounded time.  Those that wait are coroutine_fn.
 *
 * Invariants:
 * 1. A block that is not dirty and in no operation in flight holds at the
 *    target what it holds at the source, but for writes in flight at the
 *    source, which mark it when they end.
 * 2. Operations in flight do not overlap.
 * What order blocks are copied in has no part in either.
 */

#ifndef BLOCK_PRECOPY_TRACK_H
#define BLOCK_PRECOPY_TRACK_H

#include "qemu/coroutine.h"
#include "qemu/hbitmap.h"
#include "qemu/queue.h"
#include "qemu/thread.h"
#include "heat.h"

typedef struct PrecopyTrack PrecopyTrack;

/* What a hint says of a byte of the disk */
typedef enum PrecopyHintKind {
    PRECOPY_HINT_NONE,
    PRECOPY_HINT_DIRTY,         /* will be written */
    PRECOPY_HINT_FREE,          /* not used by the file system */
} PrecopyHintKind;

typedef struct PrecopyHint {
    PrecopyHintKind kind;
    int64_t due;                /* DIRTY: clock in ms of the write */
    int64_t end;                /* the byte behind the last it is said of */
} PrecopyHint;

/* Ask for the hint at @offset; may be called with the track's lock held */
typedef void PrecopyHintFunc(void *opaque, int64_t offset, int64_t now,
                             PrecopyHint *hint);
/* Something was written: what was said of it is over */
typedef void PrecopyHintWrittenFunc(void *opaque, int64_t offset,
                                    int64_t bytes, int64_t now);

/* A range of blocks that somebody works on */
typedef struct PrecopyOp {
    int64_t first, nb;
    CoQueue waiters;
    QTAILQ_ENTRY(PrecopyOp) next;
} PrecopyOp;

/* One walk over the disk */
typedef struct PrecopySweep {
    int64_t cursor;             /* block */
    int64_t horizon;            /* ms: what is written sooner, waits */
    bool free_too;              /* send what is said to be free */
    uint64_t nb_picked;         /* blocks */
    uint64_t nb_deferred;
} PrecopySweep;

typedef enum PrecopyPick {
    PRECOPY_PICK_END,           /* the walk is over */
    PRECOPY_PICK_MORE,          /* nothing yet, call again */
    PRECOPY_PICK_RUN,           /* the operation has been set */
} PrecopyPick;

/* All in bytes */
typedef struct PrecopyCounters {
    uint64_t sent;              /* payload, resent and written through too */
    uint64_t resent;
    uint64_t written_through;
    uint64_t zeroed;            /* told to the target without payload */
    uint64_t guest_written;
    uint64_t guest_touched;     /* the same in whole blocks */
    uint64_t newly_dirty;       /* by the guest */
    uint64_t spared_unallocated;
    uint64_t spared_discarded;
    uint64_t spared_zeroes;
    uint64_t spared_history;
    uint64_t spared_hints;
} PrecopyCounters;

struct PrecopyTrack {
    /* Constant */
    int64_t length;
    int64_t granularity;
    int64_t nb_blocks;

    QemuMutex lock;
    /* Protected by the lock */
    HBitmap *dirty;
    unsigned long *sent;        /* payload was sent once */
    unsigned long *passed_history, *passed_hints;
    PrecopyHeat *heat;
    QTAILQ_HEAD(, PrecopyOp) ops;
    PrecopyCounters counters;
    bool write_through;         /* writes to clean blocks go to both */
    bool let_go;                /* never again */
    bool starved;               /* all that is dirty is busy all the time */
    PrecopyHintFunc *hint;
    PrecopyHintWrittenFunc *hint_written;
    void *hint_opaque;
};

int64_t precopy_default_granularity(int64_t length);

/* NULL if there is no memory for it */
PrecopyTrack *precopy_track_new(int64_t length, int64_t granularity);
void precopy_track_free(PrecopyTrack *t);

/* clock.c */
int64_t precopy_clock_ms(void);

/* The source's content may have changed, by the guest */
void precopy_track_wrote(PrecopyTrack *t, int64_t offset, int64_t bytes,
                         int64_t now);
/* The same, and the target gets what is clean of it from the caller */
void precopy_track_wrote_both(PrecopyTrack *t, int64_t offset, int64_t bytes,
                              int64_t now);
void precopy_track_discarded(PrecopyTrack *t, int64_t offset, int64_t bytes);

/* The target may not have it */
void precopy_track_mark(PrecopyTrack *t, int64_t offset, int64_t bytes);

/* Bytes that are dirty */
uint64_t precopy_track_left(PrecopyTrack *t);

/* The block that has so many eighths of what is dirty in front of it */
int64_t precopy_track_place(PrecopyTrack *t, int eighths);

PrecopyCounters precopy_track_counters(PrecopyTrack *t);

/* The next run of at most @max bytes; it is clean and in flight from then on */
PrecopyPick precopy_track_pick(PrecopyTrack *t, PrecopySweep *sweep,
                               int64_t max, int64_t now, PrecopyOp *op);

/* The target has got the payload of these bytes */
void precopy_track_sent(PrecopyTrack *t, int64_t offset, int64_t bytes,
                        bool written_through);
void precopy_track_zeroed(PrecopyTrack *t, int64_t bytes, bool was_data);

/*
 * Whoever has entered an operation for these bytes is about to change all of
 * them at the source, and then tells the target, or marks what he does not tell
 * it: blocks that lie in them as a whole are clean until somebody marks them.
 * The source must not have been changed yet.
 */
void precopy_track_take(PrecopyTrack *t, int64_t offset, int64_t bytes);

void precopy_track_end_op(PrecopyTrack *t, PrecopyOp *op);

/* Until nobody works on any block */
void coroutine_fn precopy_track_wait_ops(PrecopyTrack *t);

/*
 * If writes go through: wait until nobody works on the range, enter @op for
 * it and return true.  False if they do not, or no longer.
 */
bool coroutine_fn precopy_track_begin_write(PrecopyTrack *t, int64_t offset,
                                            int64_t bytes, PrecopyOp *op);
/*
 * The part of a range that the target must be told of at once: from its first
 * to its last clean byte.  False if there is none.
 */
bool precopy_track_clean_part(PrecopyTrack *t, int64_t *offset,
                              int64_t *bytes);

void precopy_track_set_write_through(PrecopyTrack *t, bool on);
bool precopy_track_writes_through(PrecopyTrack *t);

/*
 * No sweep gets hold of what is dirty, as the guest writes it all the time:
 * writes that go through take what is dirty along
 */
void precopy_track_set_starved(PrecopyTrack *t, bool starved);
bool precopy_track_is_starved(PrecopyTrack *t);

/* The target does not matter any more: no write waits for it from now on */
void precopy_track_let_go(PrecopyTrack *t);

/* Where the operation is in bytes */
static inline int64_t precopy_op_offset(const PrecopyTrack *t,
                                        const PrecopyOp *op)
{
    return op->first * t->granularity;
}

static inline int64_t precopy_op_bytes(const PrecopyTrack *t,
                                       const PrecopyOp *op)
{
    return MIN(op->nb * t->granularity, t->length - precopy_op_offset(t, op));
}

#endif
