/*
 * blockdev-precopy: the job and its filter node
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * What the files of the job share.  Who calls whom:
 *
 *   qmp.c, start.c     the command: checks, filter node and job are made
 *   job.c              life cycle: ready, the last phase, the change of graph
 *   converge.c         what is swept next, when it is enough, what is done
 *                      about a guest that is faster than the link
 *   scan.c             what there is to copy at all
 *   copy.c             requests from source to target
 *   filter.c           the guest's requests
 *   track.c, heat.c    what is left, and the order
 *   hints.c, hint-*.c  what the guest says
 *
 * The job's coroutine and its requests run in the job's AioContext; the
 * filter is called from any thread.
 */

#ifndef BLOCK_PRECOPY_PRECOPY_H
#define BLOCK_PRECOPY_PRECOPY_H

#include "block/block_int.h"
#include "block/blockjob_int.h"
#include "qapi/qapi-types-precopy.h"
#include "qemu/ratelimit.h"
#include "hints.h"
#include "track.h"

/* Requests at once, and bytes in each; less on a slow link, see converge.c */
#define PRECOPY_MAX_IN_FLIGHT 16
#define PRECOPY_MAX_BYTES     (1024 * 1024)
#define PRECOPY_MIN_BYTES     (64 * 1024)
/* With a speed limit, which counts a request when it begins */
#define PRECOPY_MAX_LIMITED   2

/* Filter, source and target */
#define PRECOPY_GUARDS        3

typedef struct PrecopyJob PrecopyJob;

typedef struct PrecopyFilter {
    PrecopyTrack *track;
    PrecopyJob *job;            /* NULL when it no longer cares */
    bool stop;                  /* no permissions below any more */
} PrecopyFilter;

/* See converge.c */
typedef struct PrecopyConverge {
    PrecopySweep sweep;
    int64_t horizon_cap;        /* ms */
    bool partly;                /* the first sweep, from amid the disk */
    uint64_t rounds;            /* whole sweeps that picked something */
    uint64_t rate;              /* of the link, bytes per second; 0: unknown */
    uint64_t dirty_rate;        /* by the guest, of blocks that were clean */
    uint64_t guest_rate;        /* all that it writes, bytes per second */
    uint64_t rate_sent, rate_zeroed;    /* counters at the last measurement */
    uint64_t rate_dirtied, rate_guest;
    uint64_t rate_through;
    int64_t rate_since;         /* ms */
    int64_t link_since;         /* ms: when the link was measured last */
    uint64_t least_left;        /* the best so far */
    int64_t least_since;        /* ms: when that was */
    bool outpaced;
    bool standing;              /* the job is paused */
    int64_t closing_since;      /* ms: of the way to the end; 0: not yet */
    int64_t pace_since;         /* ms: when that was said */
    int64_t hold;               /* ms: for how long at least */
    int64_t within_at;          /* ms: the rest was last seen in its bound */
} PrecopyConverge;

struct PrecopyJob {
    BlockJob common;
    BlockBackend *target;
    BlockDriverState *filter;
    PrecopyFilter *top;         /* its state */
    PrecopyTrack *track;        /* owned by the filter node */
    PrecopyHintsUser *hints;    /* NULL for none */
    BdrvDirtyBitmap *guards[PRECOPY_GUARDS];    /* see start.c */
    BlockdevOnError on_source_error, on_target_error;
    PrecopyOutpaced when_outpaced;
    int64_t downtime_limit;     /* ms */
    bool target_is_zero;

    /* Requests; in the job's context, but for atomic reads of in_flight */
    int in_flight;
    int64_t bytes_in_flight;
    CoQueue slots;              /* wait for one to end */
    int64_t busy_since;         /* ns, while any is in flight */
    int64_t busy_ns;

    PrecopyConverge converge;
    RateLimit throttle;         /* of the guest */
    int64_t started;            /* ms */
    int64_t ready_after;        /* ms; -1: not yet */

    int ret;                    /* atomic: the error to end with */
    bool failed;                /* a request failed since this was cleared */
    bool should_complete;
    bool in_drain;              /* our own */
    bool last_phase;            /* and not left again */
    bool sending_rest;          /* atomic: in the last phase */
    bool finished;              /* the graph has been put right */
    bool pivoted;
    int64_t last_pause_ns;
    int max_in_flight;
    PrecopyStatistics last;     /* when the track is gone */
};

/* filter.c */
BlockDriverState *precopy_filter_new(BlockDriverState *bs, const char *name,
                                     Error **errp);

/* scan.c */
int coroutine_fn GRAPH_UNLOCKED precopy_scan(PrecopyJob *s);

/* copy.c */
void precopy_failed(PrecopyJob *s, bool read, int ret);
/* Before each write: 0, or the error if the target must not be written */
int precopy_check_target(PrecopyJob *s);
PrecopyPick coroutine_fn precopy_copy_next(PrecopyJob *s,
                                           PrecopySweep *sweep);
/* Must the next request wait for one that is in flight? */
bool precopy_is_full(PrecopyJob *s, int max_in_flight);
void coroutine_fn precopy_wait_slot(PrecopyJob *s);
void coroutine_fn precopy_wait_all(PrecopyJob *s);
int coroutine_fn precopy_flush_target(PrecopyJob *s);
uint64_t precopy_left(PrecopyJob *s);
int64_t precopy_busy_ns(PrecopyJob *s);
int coroutine_fn GRAPH_RDLOCK
precopy_write_through(PrecopyJob *s, int64_t offset, int64_t bytes,
                      QEMUIOVector *qiov, size_t qiov_offset);
void coroutine_fn GRAPH_RDLOCK
precopy_discard_through(PrecopyJob *s, int64_t offset, int64_t bytes);

/* converge.c */
void precopy_converge_start(PrecopyJob *s);
void precopy_converge_measure(PrecopyJob *s);
/* Bytes that can be sent within the downtime limit */
uint64_t precopy_bound(PrecopyJob *s);
/* The user wants the end, and the rest of it is within the bound */
bool precopy_is_closing(PrecopyJob *s);
/* May the guest's requests be held while what is left is sent? */
bool precopy_is_close(PrecopyJob *s);
/* All the time has been spent in which it might have become less */
bool precopy_is_late(PrecopyJob *s);
/* A sweep is over: begin another, or say that there is nothing to do */
bool precopy_converge_next(PrecopyJob *s);
/* The job pauses, or goes on */
void precopy_converge_stand(PrecopyJob *s, bool standing);
int64_t precopy_throttle_ns(PrecopyJob *s, int64_t offset, int64_t bytes);
/* Are requests still held back that were to wait when they came? */
bool precopy_throttles(PrecopyJob *s);
/* Bytes that a request should have at most, and all in flight together */
int64_t precopy_converge_bytes(PrecopyJob *s);
int64_t precopy_converge_window(PrecopyJob *s);

/* job.c */
extern const BlockJobDriver precopy_job_driver;
void precopy_statistics(PrecopyJob *s, PrecopyStatistics *info);
/* Until then (INT64_MAX: as long as it takes); ms, as precopy_clock_ms() */
bool coroutine_fn precopy_send_rest(PrecopyJob *s, int64_t until);
/* The user does not want it to be ready any longer, but to end */
bool precopy_should_end(PrecopyJob *s);

/* handover.c */
int GRAPH_RDLOCK precopy_hand_over(PrecopyJob *s, BlockDriverState *filter);

/* start.c */
void precopy_forget_hints(PrecopyJob *s);
void precopy_release_guards(PrecopyJob *s);

typedef struct PrecopyOptions {
    const char *job_id;
    const char *filter_node_name;
    int64_t speed;
    BlockdevOnError on_source_error, on_target_error;
    PrecopyOutpaced when_outpaced;
    int64_t downtime_limit;
    bool target_is_zero;
    const char *hints, *hints_disk;
    bool trim;
    int job_flags;
} PrecopyOptions;

void GRAPH_UNLOCKED precopy_start(BlockDriverState *bs,
                                  BlockDriverState *target,
                                  const PrecopyOptions *options,
                                  Error **errp);

#endif
