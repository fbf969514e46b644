/*
 * thinvm boot cache: the filter driver's parts and what they share
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 *   bootcache.c            the driver: options, reads, permissions
 *   bootcache-identity.c   which template is it?
 *   bootcache-client.c     reader: the connection to the publisher
 *   bootcache-publisher.c  publisher: fetches, publishes, records, seals
 *   bootcache-server.c     publisher: the readers' connections
 *   bootcache-map.c        the shared memory
 *   bootcache-file.c       the file of a recording
 *   bootcache-format.c     codec of file and messages
 *   bootcache-qmp.c        QMP commands
 *
 * Contents never come out wrong (a reader takes nothing from the cache that
 * its identity and checksum do not vouch for) and no reader ever depends on
 * the publisher or on another reader: what he does not get from the cache he
 * reads from the template.
 */
#ifndef BLOCK_BOOTCACHE_H
#define BLOCK_BOOTCACHE_H

#include "block/block-io.h"
#include "block/block_int.h"
#include "qapi/qapi-types-thinvm.h"
#include "qemu/stats64.h"
#include "bootcache-client.h"
#include "bootcache-map.h"

typedef struct BootcachePublisher BootcachePublisher;
typedef struct BootcacheServer BootcacheServer;

typedef struct BootcacheOptions {
    ThinvmBootcacheRole role;
    char *socket;
    char *template_id;          /* NULL: from the nodes below */
    uint32_t timeout_ms;        /* reader; from here on the publisher's: */
    uint32_t block_size;        /* 0: the file's, else the default */
    uint64_t memory_limit;
    uint64_t record_bytes;      /* 0: up to the memory limit */
    uint32_t record_seconds;    /* 0: no limit */
    uint32_t max_readers;
    bool seal_by_guest;
    char *cache_file;           /* NULL: none */
} BootcacheOptions;

typedef struct BDRVBootcacheState {
    BlockDriverState *bs;
    BootcacheOptions options;
    BootcacheIdentity identity;
    uint64_t length;
    BootcacheClient *client;        /* a reader's; NULL if only asked about */
    BootcachePublisher *publisher;
    QTAILQ_ENTRY(BDRVBootcacheState) link;

    /* A reader's counts, from any thread */
    Stat64 hits, hit_bytes;         /* there at once */
    Stat64 fetches, fetch_bytes;    /* there when the publisher had fetched */
    Stat64 misses, miss_bytes;      /* read from the template */
    Stat64 blocks;                  /* different ones used */
    Stat64 prefetched_blocks;       /* ... that no reader had asked for */
    Stat64 wrong_blocks;            /* checksum or record were wrong */
} BDRVBootcacheState;

typedef QTAILQ_HEAD(, BDRVBootcacheState) BootcacheNodeList;
extern BootcacheNodeList bootcache_nodes;       /* main loop */

/* bootcache-identity.c; main loop */
int GRAPH_RDLOCK
bootcache_identify(BdrvChild *child, const char *template_id,
                   BootcacheIdentity *identity, uint64_t *length,
                   Error **errp);

/*
 * fstat() of a node of the driver "file": what is open, whatever is at its
 * path by now.  In file-posix.c, see integration/insertions.toml.
 */
int bootcache_fstat(BlockDriverState *bs, struct stat *st);

/* bootcache.c */
ThinvmBootcacheStatistics *bootcache_statistics(BDRVBootcacheState *s);

/*
 * The guest that reads through the reader @node_name says that it has booted:
 * its publisher is told, who decides what that is worth.  Main loop; waits for
 * nobody.
 */
bool bootcache_boot_ended(const char *node_name, Error **errp);

/*
 * bootcache-publisher.c.  All of it is the main loop's: requests, recording,
 * and the file, so that it needs no lock.
 */
BootcachePublisher *bootcache_publisher_new(BDRVBootcacheState *s,
                                            Error **errp);
void bootcache_publisher_free(BootcachePublisher *p);   /* drained */
void bootcache_publisher_drain_begin(BootcachePublisher *p);
void bootcache_publisher_drain_end(BootcachePublisher *p);
void bootcache_publisher_seal(BootcachePublisher *p, const char *why);
BootcacheStatus bootcache_publisher_boot_ended(BootcachePublisher *p);
BootcacheMap *bootcache_publisher_map(BootcachePublisher *p);
ThinvmBootcachePublisherInfo *
bootcache_publisher_info(BootcachePublisher *p);

/* What one reader has had recorded; to begin with, zeroes */
typedef struct BootcacheQuota {
    uint32_t records;
    uint32_t slots;             /* those that are not zeroes */
} BootcacheQuota;

/* Bring blocks into the cache: what a reader asks for */
BootcacheStatus coroutine_fn
bootcache_publisher_get(BootcachePublisher *p, uint64_t block, uint32_t count,
                        BootcacheQuota *quota);

/* Coroutines that bootcache_publisher_free() has to wait for */
void bootcache_publisher_enter(BootcachePublisher *p);
void bootcache_publisher_leave(BootcachePublisher *p);

/* bootcache-server.c; main loop */
BootcacheServer *bootcache_server_new(BootcachePublisher *p,
                                      const BootcacheOptions *options,
                                      Error **errp);
void bootcache_server_stop(BootcacheServer *server);
void bootcache_server_free(BootcacheServer *server);    /* all have left */
void bootcache_server_info(BootcacheServer *server,
                           ThinvmBootcachePublisherInfo *info);

#endif /* BLOCK_BOOTCACHE_H */
