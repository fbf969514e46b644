/*
 * thinvm template store: reading a template wherever it is
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * What the driver thinvm-template (driver.c) is made of:
 *
 *   reader.c    requests, and the chunks in memory that they are served from
 *   replica.c   which copy a chunk is read from
 *   local.c     a copy on a disk of this node
 *
 * A reader has no children in the block graph and needs no event loop: chunks
 * are read by threads of its own, whatever context a request comes from and
 * however long a node is silent.  All of a reader is under its lock, which no
 * I/O is done under.
 */

#ifndef BLOCK_TEMPLATE_READER_H
#define BLOCK_TEMPLATE_READER_H

#include "qapi/qapi-types-thinvm.h"
#include "qemu/coroutine.h"
#include "qemu/iov.h"
#include "qemu/stats64.h"
#include "qemu/thread.h"
#include "store.h"
#include "placement.h"

#define READER_THREADS_MAX      8

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
    uint64_t nb_chunks;
    unsigned long *verified, *wrong;    /* by chunk; atomic */
} LocalCopy;

/*
 * The first one that is whole and may be used, and its hashes; NULL without
 * an error if there is none.
 */
LocalCopy *local_copy_open(GPtrArray *stores, const TemplateDigest *digest,
                           TemplateChunks **chunks);
LocalCopy *local_copy_ref(LocalCopy *copy);
void local_copy_unref(LocalCopy *copy);

/* ------------------------------------------------------------------ */
/* Other copies, and what is known of them                             */

typedef struct Replica {
    ClusterNode *node;
    bool local;
    char *place;
    bool usable;
    char *problem;
    uint64_t bytes, wrong_chunks, failures;
} Replica;

typedef struct ReaderChunk ReaderChunk;

typedef struct TemplateReader {
    char *node_name;
    ReaderOptions o;
    /* Constant from here on once it is open */
    Cluster *cluster;
    ClusterNode *self;
    Placement *placement;
    GPtrArray *stores;
    TemplateChunks *chunks;
    TemplateDigest root;            /* the hash of their hashes */
    TemplateDigest zeroes;          /* the hash of a whole chunk of them */

    QemuMutex lock;
    QemuCond work;                  /* for threads without any */
    bool stopping;
    ThinvmTemplateTrust trust;
    LocalCopy *local;
    GPtrArray *replicas;            /* nearest first; [0]: of this node */
    Replica *current;

    GHashTable *in_memory;          /* ReaderChunk, by number */
    QTAILQ_HEAD(, ReaderChunk) queue;       /* to be read */
    QTAILQ_HEAD(, ReaderChunk) unused;      /* oldest first */
    uint64_t memory;                /* of those */
    QemuThread threads[READER_THREADS_MAX];
    unsigned nb_threads, idle_threads;

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

/* ------------------------------------------------------------------ */
/* replica.c                                                           */

GPtrArray *replicas_new(const TemplateReader *r);
ThinvmTemplateReplicaList *replicas_describe(TemplateReader *r);
LocalCopy *reader_local(TemplateReader *r);

/* Read chunk @n from whichever copy has it right, in a thread */
int reader_fetch(TemplateReader *r, uint64_t n, uint8_t *buf);

#endif
