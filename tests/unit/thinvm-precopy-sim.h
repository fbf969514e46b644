/*
 * blockdev-precopy in simulated time: what goes in and out
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A trace says what a guest writes and when, and what its agent says; a policy
 * decides what is sent when; out come bytes and times.  "precopy" is the code
 * that ships: track.c, heat.c, hint-map.c and converge.c.  Simulated are the
 * link (one thing after another, at a fixed rate) and the clock.
 */
#ifndef THINVM_PRECOPY_SIM_H
#define THINVM_PRECOPY_SIM_H

typedef enum SimKind {
    SIM_USED,           /* 'U': holds data when the job begins */
    SIM_WRITE,          /* 'W' */
    SIM_DISCARD,        /* 'D' */
    SIM_DIRTY,          /* 'H': the agent: will be written at @due */
    SIM_END,            /* there is no more */
} SimKind;

typedef struct SimEvent {
    int64_t us;
    SimKind kind;
    int64_t offset, bytes;
    int64_t due_us;
} SimEvent;

/* A source of events, in order of time; those of kind USED come first */
typedef struct SimTrace SimTrace;

struct SimTrace {
    int64_t disk;       /* bytes */
    void (*next)(SimTrace *t, SimEvent *e);
    void (*free)(SimTrace *t);
};

typedef enum SimPolicy {
    SIM_MIRROR,         /* 64 KiB, in the order of the disk, again and again */
    SIM_BLOCKING,       /* the same, and writes to what was copied wait */
    SIM_EAGER,          /* precopy that lets nothing wait */
    SIM_HISTORY,        /* precopy without an agent */
    SIM_HINTS,          /* and with one */
    SIM_POLICIES,
} SimPolicy;

extern const char *const sim_policy_names[SIM_POLICIES];

typedef struct SimOptions {
    int64_t rate;               /* of the link, bytes per second */
    int64_t give_up_us;
    int64_t hold_us;            /* how long it stays ready */
    int64_t downtime_ms;
    bool write_blocking;        /* when outpaced; else nothing is done */
} SimOptions;

typedef struct SimResult {
    int64_t used;               /* bytes at the beginning */
    int64_t sent, resent, written_through, spared_history, spared_hints;
    int64_t ready_us;           /* -1: never */
    int64_t pause_us;           /* of the guest at the end */
    double guest;               /* what it gets done, of what it would alone */
} SimResult;

/* Takes the trace */
SimResult sim_run(SimTrace *trace, SimPolicy policy, const SimOptions *o);

/* thinvm-precopy-trace.c */
typedef struct SimDatabase {
    int64_t disk, used;         /* bytes */
    int64_t hot, cold;          /* bytes that are overwritten at random */
    int64_t hot_rate, log_rate, cold_rate;      /* blocks of 4 KiB per second */
    int64_t expire_s;           /* cold ones stay in the page cache so long */
    bool agent;
} SimDatabase;

SimTrace *sim_trace_database(const SimDatabase *d);
/* 64 KiB after 64 KiB over what is used, again and again */
SimTrace *sim_trace_sequential(int64_t disk, int64_t used, int64_t rate);
/*
 * A file of lines: the size of the disk first ("S BYTES"), then
 * "U OFFSET BYTES", then "W|D SECONDS OFFSET BYTES" and
 * "H SECONDS OFFSET BYTES DUE_SECONDS"
 */
SimTrace *sim_trace_file(const char *path, Error **errp);

#endif
