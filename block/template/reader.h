/*
 * thinvm template store: reading a template wherever it is
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * What the driver thinvm-template (driver.c) is made of:
 *
 *   reader.c    requests, and the chunks in memory that they are served from
 *   hashes.c    what the chunks must be
 *   replica.c   which copy a chunk is read from
 *   keeper.c    finds copies that come back, or come nearer
 *   bring.c     brings the template to a disk of this node
 *   local.c     a copy on a disk of this node
 *   link.c      a connection to another node
 *
 * A reader has no children in the block graph and needs no event loop: chunks
 * are read by threads of its own, whatever context a request comes from and
 * however long a node is silent.  All of a reader is under its lock, which no
 * I/O is done under.
 *
 * Chunks may be small, so neighbours that are wanted are read together: a run,
 * of at most TEMPLATE_IO_BYTES or one chunk.
 *
 * Invariants, with T1 to T3 of template.h:
 *  R1. Nothing that was read is passed on before its hash was compared, but
 *      for chunks of a local copy that were compared earlier (verify=once).
 *  R2. No thread waits for another node without a limit, nor longer than a
 *      moment once the reader is being closed.
 *  R3. While a copy is read by its path or connection it is in use for those
 *      who would remove it.
 */

#ifndef BLOCK_TEMPLATE_READER_H
#define BLOCK_TEMPLATE_READER_H

#include "qapi/qapi-types-thinvm.h"
#include "qemu/coroutine.h"
#include "qemu/event_notifier.h"
#include "qemu/iov.h"
#include "qemu/stats64.h"
#include "qemu/lockable.h"
#include "qemu/thread.h"
#include "link.h"
#include "store.h"
#include "placement.h"

#define READER_THREADS_MAX      8
/* Chunks of a run */
#define READER_RUN_MAX          (TEMPLATE_IO_BYTES / TEMPLATE_CHUNK_SIZE_MIN)
/* One for each power of two that the size of chunks may be, but ours */
#define READER_OTHERS_MAX       8
QEMU_BUILD_BUG_ON(READER_RUN_MAX > 32);
#define READER_STREAMS          8

typedef struct ReaderOptions {
    TemplateDigest digest;
    bool has_hashes, strict;
    TemplateDigest hashes;
    char *cluster, *node;           /* NULL: the defaults */
    ThinvmTemplateVerify verify;
    uint64_t cache_size;
    uint32_t timeout_ms, retry_s;
    bool bring_over;
    uint64_t speed;
} ReaderOptions;

/* ------------------------------------------------------------------ */
/* A copy on a disk of this node                                       */

typedef struct LocalCopy {
    TemplateStore *store;
    char *path;
    int fd;                         /* with the locks that say "in use" */
    TemplateChunks *own;            /* its hashes, unless the reader has them */
    unsigned long *verified, *wrong;    /* by the reader's chunks; atomic */
} LocalCopy;

/*
 * The first one that is whole and may be used, for a reader whose chunks are
 * @chunks; if these are NULL they become this copy's.  NULL without an error
 * if there is none, with one if there is one that is not right.
 */
LocalCopy *local_copy_open(GPtrArray *stores, const TemplateDigest *digest,
                           TemplateChunks **chunks, Error **errp);
/* Has another file come in its place? */
bool local_copy_replaced(const LocalCopy *copy);
LocalCopy *local_copy_ref(LocalCopy *copy);
void local_copy_unref(LocalCopy *copy);

/* ------------------------------------------------------------------ */
/* Other copies, and what is known of them                             */

typedef struct Replica {
    ClusterNode *node;
    bool local;
    char *place;
    bool usable;                    /* as far as is known */
    bool known;                     /* it has answered */
    char *problem;
    int64_t usable_since;
    int64_t tried_at, retry_at;     /* while it is not usable */
    uint32_t backoff_ms;
    uint64_t probe_chunk;           /* by which it is tried then */
    LinkTask *probe;                /* the keeper's: is being tried, by: */
    uint64_t probing_chunk;
    int64_t probe_end;
    unsigned long *wrong;           /* by chunk; NULL: none */
    uint64_t nb_wrong;
    uint64_t bytes, wrong_chunks, failures;
} Replica;

/* A thread's connection to one of them */
typedef struct ReaderLink {
    Replica *replica;
    Link *link;
} ReaderLink;

typedef struct ReaderChunk ReaderChunk;

/* Requests that follow each other */
typedef struct ReaderStream {
    uint64_t next;                  /* where the next one would begin */
    uint64_t bytes;                 /* so much has been read */
    uint64_t ahead;                 /* it is being fetched up to there */
    uint64_t used;                  /* when; 0: it is free */
} ReaderStream;

typedef struct BringOver {
    QemuThread thread;
    bool started, ended;            /* the thread; to be joined */
    bool stop;
    QemuCond cond;
    ThinvmTemplateBringOverState state;
    TemplateStore *store;
    uint64_t done, speed;
    char *problem;
} BringOver;

typedef struct TemplateReader {
    char *node_name;
    ReaderOptions o;
    /* Constant from here on once it is open */
    Cluster *cluster;
    ClusterNode *self;
    Placement *placement;
    GPtrArray *stores;
    TemplateChunks *chunks;
    TemplateChunks *others[READER_OTHERS_MAX];  /* what else nodes say */
    unsigned nb_others;
    TemplateDigest root;            /* the hash of their hashes */
    TemplateDigest zeroes;          /* the hash of a whole chunk of them */
    EventNotifier stop;             /* ends what threads wait for */

    QemuMutex lock;
    QemuCond work;                  /* for threads without any */
    QemuCond keep;                  /* for the keeper */
    QemuCond changed;               /* a copy has become usable */
    bool stopping;
    unsigned cancelled;             /* times that requests were */
    unsigned waiting;               /* fetches that find no copy */
    ThinvmTemplateTrust trust;
    bool doubtful_zeroes;           /* atomic: to be read like the rest */
    LocalCopy *local;
    GPtrArray *replicas;            /* nearest first; [0]: of this node */
    Replica *current;

    GHashTable *in_memory;          /* ReaderChunk, by number */
    QTAILQ_HEAD(, ReaderChunk) queue;       /* to be read */
    QTAILQ_HEAD(, ReaderChunk) unused;      /* oldest first */
    uint64_t memory;                /* of all that have been read */
    QemuThread threads[READER_THREADS_MAX], keeper;
    unsigned nb_threads, idle_threads, nb_queued;   /* runs */
    ReaderStream streams[READER_STREAMS];
    uint64_t clock;                 /* of streams */
    bool keeper_started;
    BringOver bring;

    struct {
        Stat64 local_bytes, remote_bytes, zero_bytes, cached_bytes;
        Stat64 verified_chunks, wrong_chunks, failures, moves, waits;
    } stats;
} TemplateReader;

TemplateReader *template_reader_new(const char *node_name,
                                    const ReaderOptions *o, Error **errp);
void template_reader_free(TemplateReader *r);

int coroutine_fn template_reader_co_read(TemplateReader *r, uint64_t offset,
                                         uint64_t bytes, QEMUIOVector *qiov,
                                         size_t qiov_offset);
/* Is it known to be zeroes, for how many of @bytes is it the same? */
bool template_reader_is_zero(TemplateReader *r, uint64_t offset,
                             uint64_t bytes, uint64_t *same);
ThinvmTemplateStatistics *template_reader_statistics(TemplateReader *r);
ThinvmTemplateInfo *template_reader_info(TemplateReader *r);

/* Let requests that wait for a copy fail */
void template_reader_cancel(TemplateReader *r);

/* ------------------------------------------------------------------ */
/* hashes.c                                                            */

/* Find the template, and what its chunks must be */
bool reader_find(TemplateReader *r, Error **errp);
/*
 * Chunk @n has its hash.  Is that contradicted by what other nodes say about
 * chunks of other sizes?  If they have to be believed, nothing is read then:
 * all chunks are.
 */
bool reader_is_contradicted(TemplateReader *r, uint64_t n,
                            const uint8_t *buf);

/* ------------------------------------------------------------------ */
/* replica.c                                                           */

/* "sha256:..." of @r's template, and @suffix */
char *reader_export_name(const TemplateReader *r, const char *suffix);
GPtrArray *replicas_new(const TemplateReader *r);
ThinvmTemplateReplicaList *replicas_describe(TemplateReader *r);

LocalCopy *reader_local(TemplateReader *r);
/* Read a copy that has come to this node from now on, if there is one */
bool reader_take_local(TemplateReader *r, const char *reason, Error **errp);

/* With the lock: what is known of @p has changed */
void replica_set_usable(TemplateReader *r, Replica *p, const char *reason);
void replica_set_problem(TemplateReader *r, Replica *p, const char *problem,
                         uint64_t chunk);
/* The contents are not what other nodes said: nothing is read any more */
void reader_refute(TemplateReader *r, const char *why);
bool reader_is_refuted(TemplateReader *r);

bool reader_is_right(TemplateReader *r, uint64_t n, const uint8_t *buf);
/* From now on */
LinkPatience reader_patience(const TemplateReader *r);
bool reader_connect(TemplateReader *r, ReaderLink *l, Replica *p,
                    Error **errp);
bool reader_link_check(const TemplateReader *r, const Link *link,
                       Error **errp);
void reader_disconnect(ReaderLink *l);

/* How long those that want a chunk wait for a copy, from now on */
typedef struct ReaderWait {
    int64_t deadline;
    unsigned cancelled;
    bool again;                     /* at once ask those that had it wrong */
} ReaderWait;

ReaderWait reader_wait(TemplateReader *r);

/* Chunks of a run: bit i is the one after i others */
typedef uint32_t ReaderMask;

/*
 * Read chunk @n, in a thread, from whichever copy has it right, and with it of
 * the @count - 1 after it what it costs nothing to read: those that are right
 * in @buf now.  Bit 0 is not among them if no copy had @n right in time; @wait
 * NULL: at once.  What is waited for is only @n.  @buf has room for @count
 * whole chunks, READER_RUN_MAX at most.
 */
ReaderMask reader_fetch(TemplateReader *r, ReaderLink *l, uint64_t n,
                        unsigned count, const ReaderWait *wait, uint8_t *buf);

/* ------------------------------------------------------------------ */
/* keeper.c                                                            */

void reader_keeper_start(TemplateReader *r);
void reader_keeper_join(TemplateReader *r);

/* ------------------------------------------------------------------ */
/* bring.c                                                             */

bool template_reader_bring_over(TemplateReader *r, bool has_speed,
                                uint64_t speed, bool stop, Error **errp);
/* With the lock; NULL if it was never started */
ThinvmTemplateBringOver *reader_bring_over_describe(TemplateReader *r);
/* After stopping has been set */
void reader_bring_over_join(TemplateReader *r);

/* ------------------------------------------------------------------ */
/* driver-event.c: from any thread                                     */

void reader_event_source(TemplateReader *r, const char *source,
                         const char *reason);
void reader_event_damaged(TemplateReader *r, const char *place,
                          uint64_t offset, uint64_t bytes);

#endif
