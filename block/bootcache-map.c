/*
 * thinvm boot cache: the memory that all readers of a host share
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See bootcache-map.h, also for what this file promises.  The publisher calls
 * from one thread; readers call from any.
 */

#include "qemu/osdep.h"
#include <sys/mman.h>
#include "qemu/atomic.h"
#include "qemu/bitmap.h"
#include "qemu/memfd.h"
#include "bootcache-map.h"

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

#define BOOTCACHE_MAP_MAGIC     0x70616d68636f6f62ULL       /* boochmap */
#define BOOTCACHE_MAP_ALIGN     4096
#define BOOTCACHE_MAP_SEALS     (F_SEAL_SHRINK | F_SEAL_GROW | \
                                 F_SEAL_FUTURE_WRITE | F_SEAL_SEAL)

/* Blocks of zeroes take records and no slots: room for as many, and more */
#define BOOTCACHE_EXTRA_RECORDS 4096

QEMU_BUILD_BUG_ON(sizeof(BootcacheMapHeader) > BOOTCACHE_MAP_ALIGN);

static uint64_t bootcache_table_size(uint64_t nb_blocks)
{
    return ROUND_UP(nb_blocks * sizeof(uint64_t), BOOTCACHE_MAP_ALIGN);
}

static void bootcache_geometry_place(BootcacheGeometry *g)
{
    g->records_offset = BOOTCACHE_MAP_ALIGN +
                        bootcache_table_size(g->nb_blocks);
    g->data_offset = g->records_offset +
        ROUND_UP((uint64_t)g->nb_records * BOOTCACHE_RECORD_SIZE,
                 BOOTCACHE_MAP_ALIGN);
    g->size = g->data_offset + (uint64_t)g->nb_slots * g->block_size;
}

static uint32_t bootcache_geometry_crc(const BootcacheGeometry *g)
{
    return bootcache_checksum(&g->identity, BOOTCACHE_CHECKSUM_MAP, 0,
                              g, sizeof(*g));
}

static void bootcache_map_set_pointers(BootcacheMap *map, uint8_t *base)
{
    map->header = (BootcacheMapHeader *)base;
    map->table = (uint64_t *)(base + BOOTCACHE_MAP_ALIGN);
    map->records = (BootcacheRecord *)(base + map->geometry.records_offset);
    map->data = base + map->geometry.data_offset;
}

void bootcache_map_free(BootcacheMap *map)
{
    if (map->header) {
        munmap(map->header, map->geometry.size);
    }
    if (map->fd >= 0) {
        close(map->fd);
    }
    g_free(map->seen);
    g_free(map->wrong);
    g_free(map);
}

/* ------------------------------------------------------------------ */
/* Publisher                                                           */

static bool bootcache_map_memory(BootcacheMap *map, Error **errp)
{
    uint64_t size = map->geometry.size;
    void *base;

    map->fd = memfd_create("thinvm-bootcache",
                           MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (map->fd < 0 || ftruncate(map->fd, size) < 0) {
        error_setg_errno(errp, errno, "Cannot get %" PRIu64 " bytes of shared "
                         "memory", size);
        return false;
    }
    base = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE,
                map->fd, 0);
    if (base == MAP_FAILED) {
        error_setg_errno(errp, errno, "Cannot map %" PRIu64 " bytes of shared "
                         "memory", size);
        return false;
    }
    bootcache_map_set_pointers(map, base);
    if (fcntl(map->fd, F_ADD_SEALS, BOOTCACHE_MAP_SEALS) < 0) {
        error_setg_errno(errp, errno, "Cannot seal shared memory against "
                         "writing by others (needs Linux 5.1)");
        return false;
    }
    return true;
}

BootcacheMap *bootcache_map_create(const BootcacheIdentity *identity,
                                   uint64_t length, uint32_t block_size,
                                   uint64_t memory_limit, Error **errp)
{
    BootcacheMap *map = g_new0(BootcacheMap, 1);
    BootcacheGeometry *g = &map->geometry;

    *g = (BootcacheGeometry) {
        .identity = *identity,
        .length = length,
        .block_size = block_size,
        .nb_blocks = bootcache_nb_blocks(length, block_size),
    };
    g->nb_slots = MIN(g->nb_blocks, memory_limit / block_size);
    g->nb_records = MIN(g->nb_blocks,
                        2 * g->nb_slots + BOOTCACHE_EXTRA_RECORDS);
    bootcache_geometry_place(g);
    map->fd = -1;
    if (!bootcache_map_memory(map, errp)) {
        bootcache_map_free(map);
        return NULL;
    }
    map->header->geometry = *g;
    map->header->version = BOOTCACHE_VERSION;
    map->header->crc = bootcache_geometry_crc(g);
    map->header->state = BOOTCACHE_MAP_RECORDING;
    map->header->magic = BOOTCACHE_MAP_MAGIC;
    return map;
}

bool bootcache_map_add_record(BootcacheMap *map, const BootcacheRecord *r)
{
    BootcacheMapHeader *h = map->header;
    bool zeroes = r->flags & BOOTCACHE_RECORD_ZEROES;
    BootcacheRecord *dst = &map->records[h->used_records];

    assert(!map->table[r->block]);
    if (h->used_records == map->geometry.nb_records ||
        (!zeroes && h->used_slots == map->geometry.nb_slots)) {
        return false;
    }
    *dst = *r;
    dst->slot = zeroes ? BOOTCACHE_NO_SLOT : h->used_slots;
    qatomic_set(&h->used_slots, h->used_slots + !zeroes);
    qatomic_set(&h->used_records, h->used_records + 1);
    qatomic_store_release(&map->table[r->block], h->used_records);
    return true;
}

void bootcache_map_publish(BootcacheMap *map, uint64_t block,
                           const void *data, bool prefetched)
{
    const BootcacheGeometry *g = &map->geometry;
    uint64_t entry = map->table[block];
    BootcacheRecord *r = &map->records[BOOTCACHE_ENTRY_RECORD(entry)];

    assert(entry && !(entry & BOOTCACHE_ENTRY_PRESENT));
    assert(!data == !!(r->flags & BOOTCACHE_RECORD_ZEROES));
    if (data) {
        memcpy(map->data + (uint64_t)r->slot * g->block_size, data,
               bootcache_block_bytes(g->length, g->block_size, block));
    }
    if (prefetched) {
        entry |= BOOTCACHE_ENTRY_PREFETCHED;
        qatomic_set(&map->header->prefetched, map->header->prefetched + 1);
    }
    qatomic_store_release(&map->table[block], entry | BOOTCACHE_ENTRY_PRESENT);
}

bool bootcache_map_get_record(BootcacheMap *map, uint64_t block,
                              BootcacheRecord *r)
{
    uint64_t entry = qatomic_load_acquire(&map->table[block]);

    if (!entry || BOOTCACHE_ENTRY_RECORD(entry) >= map->geometry.nb_records) {
        return false;
    }
    *r = map->records[BOOTCACHE_ENTRY_RECORD(entry)];
    return true;
}

bool bootcache_map_present(BootcacheMap *map, uint64_t block)
{
    return qatomic_load_acquire(&map->table[block]) & BOOTCACHE_ENTRY_PRESENT;
}

uint64_t bootcache_map_used_bytes(BootcacheMap *map)
{
    return (uint64_t)qatomic_read(&map->header->used_slots) *
           map->geometry.block_size;
}

/* ------------------------------------------------------------------ */
/* Readers                                                             */

/*
 * A descriptor that could still shrink would kill us with SIGBUS; one that
 * others can write would be no better than the worst of them.
 */
static bool bootcache_map_check_fd(int fd, uint64_t *size, Error **errp)
{
    int seals = fcntl(fd, F_GET_SEALS);
    struct stat st;

    if (seals < 0 || (seals & BOOTCACHE_MAP_SEALS) != BOOTCACHE_MAP_SEALS) {
        error_setg(errp, "the shared memory is not sealed (seals 0x%x, wanted "
                   "0x%x)", seals < 0 ? 0 : seals, BOOTCACHE_MAP_SEALS);
        return false;
    }
    if (fstat(fd, &st) < 0) {
        error_setg_errno(errp, errno, "the size of the shared memory is not "
                         "known");
        return false;
    }
    if (st.st_size < BOOTCACHE_MAP_ALIGN) {
        error_setg(errp, "the shared memory has only %" PRId64 " bytes",
                   (int64_t)st.st_size);
        return false;
    }
    *size = st.st_size;
    return true;
}

static bool bootcache_map_check_header(BootcacheMapHeader *header,
                                       const BootcacheIdentity *identity,
                                       uint64_t length, uint64_t size,
                                       BootcacheGeometry *g, Error **errp)
{
    BootcacheGeometry expected;

    *g = header->geometry;
    if (header->magic != BOOTCACHE_MAP_MAGIC ||
        header->version != BOOTCACHE_VERSION ||
        header->crc != bootcache_geometry_crc(g)) {
        error_setg(errp, "the header of the shared memory is damaged");
        return false;
    }
    if (memcmp(&g->identity, identity, sizeof(*identity)) ||
        g->length != length) {
        error_setg(errp, "the shared memory is another template's");
        return false;
    }
    if (!bootcache_check_geometry(g->length, g->block_size, errp)) {
        return false;
    }
    expected = *g;
    expected.pad = 0;
    expected.nb_blocks = bootcache_nb_blocks(length, g->block_size);
    if (g->nb_records > expected.nb_blocks ||
        g->nb_slots > expected.nb_blocks) {
        error_setg(errp, "the shared memory has room for more blocks than the "
                   "template has");
        return false;
    }
    bootcache_geometry_place(&expected);
    if (memcmp(&expected, g, sizeof(*g)) || g->size != size) {
        error_setg(errp, "the geometry of the shared memory (%" PRIu64
                   " bytes) is not possible", size);
        return false;
    }
    return true;
}

BootcacheMap *bootcache_map_open(int fd, const BootcacheIdentity *identity,
                                 uint64_t length, Error **errp)
{
    g_autofree BootcacheMap *map = g_new0(BootcacheMap, 1);
    uint64_t size;
    void *base;

    if (!bootcache_map_check_fd(fd, &size, errp)) {
        return NULL;
    }
    base = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0);
    if (base == MAP_FAILED) {
        error_setg_errno(errp, errno, "cannot map %" PRIu64 " bytes of shared "
                         "memory", size);
        return NULL;
    }
    if (!bootcache_map_check_header(base, identity, length, size,
                                    &map->geometry, errp)) {
        munmap(base, size);
        return NULL;
    }
    map->fd = -1;
    map->seen = bitmap_new(map->geometry.nb_blocks);
    map->wrong = bitmap_new(map->geometry.nb_blocks);
    bootcache_map_set_pointers(map, base);
    return g_steal_pointer(&map);
}

/* True if this call was the one that set the bit */
static bool bootcache_mark(unsigned long *bits, uint64_t block)
{
    unsigned long mask = BIT_MASK(block);

    return !(qatomic_fetch_or(&bits[BIT_WORD(block)], mask) & mask);
}

static bool bootcache_marked(unsigned long *bits, uint64_t block)
{
    return qatomic_read(&bits[BIT_WORD(block)]) & BIT_MASK(block);
}

/* Where the data is, if record and, the first time, checksum are right */
static bool bootcache_map_check(BootcacheMap *map, uint64_t block,
                                uint64_t entry, BootcacheHit *hit)
{
    const BootcacheGeometry *g = &map->geometry;
    uint32_t index = BOOTCACHE_ENTRY_RECORD(entry);
    BootcacheRecord r;

    if (index >= g->nb_records) {
        return false;
    }
    r = map->records[index];
    if (r.block != block) {
        return false;
    }
    if (r.flags & BOOTCACHE_RECORD_ZEROES) {
        hit->data = NULL;
        return true;
    }
    if (r.slot >= g->nb_slots) {
        return false;
    }
    hit->data = map->data + (uint64_t)r.slot * g->block_size;
    return bootcache_marked(map->seen, block) ||
           r.crc == bootcache_checksum(&g->identity, BOOTCACHE_CHECKSUM_BLOCK,
                                       block, hit->data,
                                       bootcache_block_bytes(g->length,
                                                             g->block_size,
                                                             block));
}

BootcacheLookup bootcache_map_lookup(BootcacheMap *map, uint64_t block,
                                     BootcacheHit *hit)
{
    uint64_t entry = qatomic_load_acquire(&map->table[block]);
    BootcacheMapState state = bootcache_map_state(map);

    if (state > BOOTCACHE_MAP_SEALED || bootcache_marked(map->wrong, block)) {
        return BOOTCACHE_MISS;
    }
    if (!(entry & BOOTCACHE_ENTRY_PRESENT)) {
        return entry || state == BOOTCACHE_MAP_RECORDING ? BOOTCACHE_ASK
                                                         : BOOTCACHE_MISS;
    }
    if (!bootcache_map_check(map, block, entry, hit)) {
        return bootcache_mark(map->wrong, block) ? BOOTCACHE_WRONG
                                                 : BOOTCACHE_MISS;
    }
    hit->first = bootcache_mark(map->seen, block);
    hit->prefetched = entry & BOOTCACHE_ENTRY_PREFETCHED;
    return BOOTCACHE_HIT;
}
