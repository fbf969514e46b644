/*
 * thinvm boot cache: the memory that all readers of a host share
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * One publisher writes, any number of processes read; between them there is
 * no lock.  The memory is a memfd whose seals hold for everybody who has the
 * descriptor, whatever his user and his rights: it can neither shrink (so
 * that a mapping of it never faults) nor grow, and nobody can get a new way
 * to write it; the publisher has its mapping from before.
 *
 * Rules that this file keeps:
 *  - A block is published in this order: its data, its record, then, with
 *    release semantics, its entry in the table.  What a reader finds through
 *    an entry that it loaded with acquire semantics is therefore complete,
 *    and never changes again.  A publisher that dies anywhere in between
 *    leaves no entry.
 *  - The geometry is read once, checked, and kept in private memory.  Every
 *    index that is read from shared memory is bounded before it is used.
 *  - A reader believes a block after it has computed its checksum, once.
 *
 * Layout, in the host's byte order; all offsets are multiples of 4 KiB:
 *
 *   0         header: geometry, checksum; state and counters
 *   4 KiB     table: 8 bytes for each block of the template: 0, or the
 *             number of its record plus 1, with flags in the upper half
 *   then      records, in the order in which blocks were first read
 *   then      slots
 */
#ifndef BLOCK_BOOTCACHE_MAP_H
#define BLOCK_BOOTCACHE_MAP_H

#include "qemu/rcu.h"
#include "bootcache-format.h"

typedef enum BootcacheMapState {
    BOOTCACHE_MAP_RECORDING = 1,    /* any block may be asked for */
    BOOTCACHE_MAP_SEALED    = 2,    /* only blocks with a record */
    BOOTCACHE_MAP_REVOKED   = 3,    /* nothing here is to be used */
} BootcacheMapState;

typedef struct BootcacheGeometry {
    BootcacheIdentity identity;
    uint64_t length;            /* of the template */
    uint64_t nb_blocks;
    uint32_t block_size;
    uint32_t nb_records;        /* that there is room for */
    uint32_t nb_slots;
    uint32_t pad;
    uint64_t records_offset;
    uint64_t data_offset;
    uint64_t size;              /* of all of it */
} BootcacheGeometry;

typedef struct BootcacheMapHeader {
    uint64_t magic;
    uint32_t version;
    uint32_t crc;               /* of the geometry */
    BootcacheGeometry geometry;

    /* What changes; each is read and written atomically */
    uint32_t state;
    uint32_t used_records;
    uint32_t used_slots;
    uint32_t prefetched;        /* blocks with BOOTCACHE_ENTRY_PREFETCHED */
} BootcacheMapHeader;

#define BOOTCACHE_ENTRY_PRESENT     (1ULL << 32)
#define BOOTCACHE_ENTRY_PREFETCHED  (1ULL << 33)
#define BOOTCACHE_ENTRY_RECORD(e)   ((uint32_t)(e) - 1)

typedef struct BootcacheMap {
    struct rcu_head rcu;
    BootcacheGeometry geometry;
    BootcacheMapHeader *header; /* shared, as are these: */
    uint64_t *table;
    BootcacheRecord *records;
    uint8_t *data;
    int fd;                     /* the publisher's; -1 in readers */

    /* Readers: a bit for each block */
    unsigned long *seen;        /* used here, its checksum was right */
    unsigned long *wrong;       /* its record or checksum was wrong */
} BootcacheMap;

/* Publisher */
BootcacheMap *bootcache_map_create(const BootcacheIdentity *identity,
                                   uint64_t length, uint32_t block_size,
                                   uint64_t memory_limit, Error **errp);

/*
 * A record for a block that has none; @zeroes: it needs no slot.  False if
 * there is no room.  The block has an entry then that says how to find it,
 * and no data yet.
 */
bool bootcache_map_add_record(BootcacheMap *map, const BootcacheRecord *r);

/* Data for a block with a record; NULL if that says ZEROES */
void bootcache_map_publish(BootcacheMap *map, uint64_t block,
                           const void *data, bool prefetched);

/* The record of a block; false if it has none.  Also for the publisher. */
bool bootcache_map_get_record(BootcacheMap *map, uint64_t block,
                              BootcacheRecord *r);
bool bootcache_map_present(BootcacheMap *map, uint64_t block);

uint64_t bootcache_map_used_bytes(BootcacheMap *map);

static inline BootcacheMapState bootcache_map_state(BootcacheMap *map)
{
    return qatomic_load_acquire(&map->header->state);
}

static inline void bootcache_map_seal(BootcacheMap *map)
{
    qatomic_store_release(&map->header->state, BOOTCACHE_MAP_SEALED);
}

static inline void bootcache_map_revoke(BootcacheMap *map)
{
    qatomic_store_release(&map->header->state, BOOTCACHE_MAP_REVOKED);
}

/* Readers: @fd stays the caller's */
BootcacheMap *bootcache_map_open(int fd, const BootcacheIdentity *identity,
                                 uint64_t length, Error **errp);

typedef enum BootcacheLookup {
    BOOTCACHE_HIT,          /* data, or zeroes if there is none */
    BOOTCACHE_ASK,          /* the publisher would get it */
    BOOTCACHE_MISS,         /* it would not */
    BOOTCACHE_WRONG,        /* record or checksum are wrong: first time seen */
} BootcacheLookup;

typedef struct BootcacheHit {
    const uint8_t *data;    /* NULL: all zeroes */
    bool first;             /* this process has not used it before */
    bool prefetched;
} BootcacheHit;

/* Inside an RCU read section, which protects @map and what @hit points to */
BootcacheLookup bootcache_map_lookup(BootcacheMap *map, uint64_t block,
                                     BootcacheHit *hit);

void bootcache_map_free(BootcacheMap *map);

#endif /* BLOCK_BOOTCACHE_MAP_H */
