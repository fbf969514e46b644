/*
 * thinvm boot cache: the shared memory and the codec
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * /bootcache/processes: one process publishes blocks while others, which got
 * the descriptor from it, look them up without a lock; what a reader finds
 * is compared byte by byte with what the block must hold, not only by its
 * checksum.  (With bootcache_map_publish() making the entry before it copies
 * the data, and the checksum not compared, it fails at once.)
 *
 * /bootcache/seals: nothing that a reader can do to the descriptor changes
 * the memory or makes a mapping of it fault.
 *
 * /bootcache/map/..., /bootcache/file/...: every field that a reader
 * believes, out of bounds, with the checksums right.
 */
#include "qemu/osdep.h"
#include <sys/mman.h>
#include <sys/wait.h>
#include "qemu/bswap.h"
#include "qemu/memfd.h"
#include "qapi/error.h"
#include "block/bootcache-map.h"

#define BLOCK_SIZE      (4 * KiB)
#define NB_BLOCKS       4096
#define LENGTH          (NB_BLOCKS * BLOCK_SIZE - 512)
#define NB_READERS      2

static const BootcacheIdentity identity = { .hash = { 1, 2, 3 } };

static void fill(uint8_t *buf, uint64_t block)
{
    for (size_t i = 0; i < BLOCK_SIZE; i += 8) {
        stq_he_p(buf + i, (block + 1) * 0x9e3779b97f4a7c15ULL + i);
    }
}

static uint32_t bytes_of(uint64_t block)
{
    return bootcache_block_bytes(LENGTH, BLOCK_SIZE, block);
}

/* Every eighth block is zeroes */
static bool is_zero(uint64_t block)
{
    return block % 8 == 3;
}

static bool publish(BootcacheMap *map, uint64_t block)
{
    g_autofree uint8_t *buf = g_malloc(BLOCK_SIZE);
    BootcacheRecord r = { .block = block };

    fill(buf, block);
    if (is_zero(block)) {
        r.flags = BOOTCACHE_RECORD_ZEROES;
    } else {
        r.crc = bootcache_checksum(&identity, BOOTCACHE_CHECKSUM_BLOCK, block,
                                   buf, bytes_of(block));
    }
    if (!bootcache_map_add_record(map, &r)) {
        return false;
    }
    bootcache_map_publish(map, block, is_zero(block) ? NULL : buf, false);
    return true;
}

static BootcacheMap *create(uint64_t memory)
{
    return bootcache_map_create(&identity, LENGTH, BLOCK_SIZE, memory,
                                &error_abort);
}

static void require_right(uint64_t block, const BootcacheHit *hit)
{
    uint8_t expected[BLOCK_SIZE];

    g_assert(!hit->data == is_zero(block));
    if (hit->data) {
        fill(expected, block);
        g_assert(!memcmp(hit->data, expected, bytes_of(block)));
    }
}

/* ------------------------------------------------------------------ */
/* Several processes                                                   */

/* A block's number in the order of publishing: all of them, scattered */
static uint64_t scattered(uint64_t i)
{
    return i * 1237 % NB_BLOCKS;
}

static int read_all(int fd)
{
    BootcacheMap *map = bootcache_map_open(fd, &identity, LENGTH,
                                           &error_abort);
    uint64_t found = 0;

    /* The newest ones are the interesting ones: follow the publisher */
    for (uint64_t i = 0; i < NB_BLOCKS; ) {
        BootcacheHit hit;
        BootcacheLookup what = bootcache_map_lookup(map, scattered(i), &hit);

        g_assert(what == BOOTCACHE_HIT || what == BOOTCACHE_ASK);
        if (what == BOOTCACHE_HIT) {
            g_assert(hit.first);
            require_right(scattered(i), &hit);
            found++;
            i++;
        }
    }
    bootcache_map_free(map);
    return found == NB_BLOCKS ? 0 : 1;
}

static void test_processes(void)
{
    BootcacheMap *map = create(NB_BLOCKS * BLOCK_SIZE);
    pid_t pids[NB_READERS];

    for (int i = 0; i < NB_READERS; i++) {
        pids[i] = fork();
        g_assert(pids[i] >= 0);
        if (pids[i] == 0) {
            _exit(read_all(map->fd));
        }
    }
    for (uint64_t i = 0; i < NB_BLOCKS; i++) {
        g_assert(publish(map, scattered(i)));
        if (i % 64 == 0) {
            sched_yield();
        }
    }
    for (int i = 0; i < NB_READERS; i++) {
        int status;

        g_assert_cmpint(waitpid(pids[i], &status, 0), ==, pids[i]);
        g_assert(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    }
    bootcache_map_free(map);
}

/* ------------------------------------------------------------------ */
/* What a reader cannot do                                             */

static void test_seals(void)
{
    BootcacheMap *map = create(1 * MiB);
    g_autofree char *again = g_strdup_printf("/proc/self/fd/%d", map->fd);
    size_t size = map->geometry.size;
    int fd = open(again, O_RDWR);
    int fds[] = { map->fd, fd };
    char byte = 1;

    g_assert(fd >= 0);
    for (size_t i = 0; i < ARRAY_SIZE(fds); i++) {
        void *mapped = mmap(NULL, size, PROT_READ, MAP_SHARED, fds[i], 0);

        g_assert(mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fds[i],
                      0) == MAP_FAILED);
        g_assert(mapped != MAP_FAILED);
        g_assert(mprotect(mapped, size, PROT_READ | PROT_WRITE) < 0);
        munmap(mapped, size);
        g_assert(pwrite(fds[i], &byte, 1, 0) < 0);
        g_assert(ftruncate(fds[i], 4096) < 0);
        g_assert(ftruncate(fds[i], size + 4096) < 0);
        g_assert(fallocate(fds[i], FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                           0, 4096) < 0);
    }
    close(fd);
    bootcache_map_free(map);
}

static void refused(int fd, const char *why)
{
    Error *local_err = NULL;

    g_assert(!bootcache_map_open(fd, &identity, LENGTH, &local_err));
    g_assert(strstr(error_get_pretty(local_err), why));
    error_free(local_err);
}

static void test_unsealed(void)
{
    static const char wrong[8192];
    int fd = memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    int pipe_fds[2];

    g_assert(write(fd, wrong, sizeof(wrong)) == sizeof(wrong));
    refused(fd, "not sealed");
    g_assert(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) == 0);
    refused(fd, "not sealed");
    g_assert(fcntl(fd, F_ADD_SEALS, 0x10 | F_SEAL_SEAL) == 0);
    refused(fd, "damaged");
    close(fd);

    fd = memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    g_assert(ftruncate(fd, 100) == 0);
    g_assert(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | 0x10 |
                                    F_SEAL_SEAL) == 0);
    refused(fd, "100 bytes");
    close(fd);

    g_assert(pipe(pipe_fds) == 0);
    refused(pipe_fds[0], "not sealed");
    close(pipe_fds[0]);
    close(pipe_fds[1]);
}

/* ------------------------------------------------------------------ */
/* What a reader does not believe                                      */

static void seal_geometry(BootcacheMapHeader *h)
{
    h->crc = bootcache_checksum(&h->geometry.identity,
                                BOOTCACHE_CHECKSUM_MAP, 0, &h->geometry,
                                sizeof(h->geometry));
}

static void test_geometry(void)
{
    static const struct {
        size_t offset, size;
        uint64_t value;
    } fields[] = {
#define FIELD(f, v) { offsetof(BootcacheGeometry, f), \
                      sizeof(((BootcacheGeometry *)0)->f), v }
        FIELD(length, 0), FIELD(length, UINT64_MAX), FIELD(length, LENGTH + 1),
        FIELD(block_size, 0), FIELD(block_size, 4097),
        FIELD(block_size, 1u << 31), FIELD(block_size, 512),
        FIELD(nb_blocks, 0), FIELD(nb_blocks, NB_BLOCKS + 1),
        FIELD(nb_blocks, UINT64_MAX),
        FIELD(nb_records, UINT32_MAX), FIELD(nb_records, NB_BLOCKS + 1),
        FIELD(nb_slots, UINT32_MAX), FIELD(nb_slots, NB_BLOCKS + 1),
        FIELD(nb_slots, 0),
        FIELD(records_offset, 0), FIELD(records_offset, UINT64_MAX - 31),
        FIELD(data_offset, 0), FIELD(data_offset, UINT64_MAX - 4095),
        FIELD(size, 4096), FIELD(size, UINT64_MAX),
        FIELD(identity, 0x55), FIELD(pad, 1),
#undef FIELD
    };

    for (size_t i = 0; i < ARRAY_SIZE(fields); i++) {
        BootcacheMap *map = create(1 * MiB);
        uint8_t *field = (uint8_t *)&map->header->geometry + fields[i].offset;
        Error *local_err = NULL;
        memcpy(field, &fields[i].value, MIN(fields[i].size, 8));
        g_assert(!bootcache_map_open(map->fd, &identity, LENGTH, &local_err));
        error_free(local_err);
        local_err = NULL;

        seal_geometry(map->header);
        g_assert(!bootcache_map_open(map->fd, &identity, LENGTH, &local_err));
        error_free(local_err);
        bootcache_map_free(map);
    }
}

static void test_records(void)
{
    BootcacheMap *map = create(1 * MiB), *reader;
    BootcacheRecord *records = map->records;
    BootcacheHit hit;

    for (uint64_t block = 0; block < 8; block++) {
        g_assert(publish(map, block));
    }
    reader = bootcache_map_open(map->fd, &identity, LENGTH, &error_abort);
    records[0].block = 1;
    records[1].slot = map->geometry.nb_slots;
    records[2].crc ^= 1;
    map->table[4] = BOOTCACHE_ENTRY_PRESENT | (map->geometry.nb_records + 1);
    map->table[5] = BOOTCACHE_ENTRY_PRESENT;
    records[6].slot = records[7].slot;
    for (uint64_t block = 0; block < 8; block++) {
        BootcacheLookup what = bootcache_map_lookup(reader, block, &hit);

        if (block == 3 || block == 7) {
            g_assert(what == BOOTCACHE_HIT);
            require_right(block, &hit);
        } else {
            g_assert(what == BOOTCACHE_WRONG);
            what = bootcache_map_lookup(reader, block, &hit);
            g_assert(what == BOOTCACHE_MISS);
        }
    }
    g_assert(bootcache_map_lookup(reader, 9, &hit) == BOOTCACHE_ASK);
    bootcache_map_seal(map);
    g_assert(bootcache_map_lookup(reader, 9, &hit) == BOOTCACHE_MISS);
    g_assert(bootcache_map_lookup(reader, 7, &hit) == BOOTCACHE_HIT);
    g_assert(!hit.first);
    bootcache_map_revoke(map);
    g_assert(bootcache_map_lookup(reader, 7, &hit) == BOOTCACHE_MISS);
    bootcache_map_free(reader);
    bootcache_map_free(map);
}

static void test_full(void)
{
    BootcacheMap *map = create(16 * BLOCK_SIZE);
    unsigned published = 0;

    for (uint64_t block = 0; block < NB_BLOCKS; block++) {
        published += publish(map, block);
    }
    /* 16 with data, and all that are zeroes */
    g_assert_cmpint(published, ==, 16 + NB_BLOCKS / 8);
    g_assert_cmpint(bootcache_map_used_bytes(map), ==, 16 * BLOCK_SIZE);
    bootcache_map_free(map);
}

/* ------------------------------------------------------------------ */
/* The file                                                            */

static void make_file(BootcacheFileHeader *h, BootcacheRecord *records,
                      unsigned nb, uint8_t *buf)
{
    *h = (BootcacheFileHeader) {
        .identity = identity, .length = LENGTH, .block_size = BLOCK_SIZE,
        .nb_records = nb,
    };
    for (unsigned i = 0; i < nb; i++) {
        bool zero = is_zero(i);

        records[i] = (BootcacheRecord) {
            .block = i * 7, .crc = 5, .ms = i,
            .slot = zero ? BOOTCACHE_NO_SLOT : h->nb_slots++,
            .flags = zero ? BOOTCACHE_RECORD_ZEROES : 0,
        };
    }
}

static void encode_records(BootcacheFileHeader *h, BootcacheRecord *records,
                           uint8_t *buf)
{
    for (unsigned i = 0; i < h->nb_records; i++) {
        bootcache_file_encode_record(&records[i], buf +
                                     i * BOOTCACHE_RECORD_SIZE);
    }
    h->records_crc = bootcache_checksum(&identity, BOOTCACHE_CHECKSUM_RECORDS,
                                        0, buf, h->nb_records *
                                        BOOTCACHE_RECORD_SIZE);
}

#define NB_RECORDS 32

static void test_file_records(void)
{
    uint8_t buf[NB_RECORDS * BOOTCACHE_RECORD_SIZE];
    BootcacheRecord records[NB_RECORDS], decoded[NB_RECORDS];
    BootcacheFileHeader h;

    for (int wrong = 0; wrong < 9; wrong++) {
        Error *local_err = NULL;
        bool ok;

        make_file(&h, records, NB_RECORDS, buf);
        switch (wrong) {
        case 1:
            records[4].block = NB_BLOCKS;
            break;
        case 2:
            records[4].block = records[5].block;
            break;
        case 3:
            records[4].slot++;
            break;
        case 4:
            records[4].flags = 2;
            break;
        case 5:
            records[4].flags = BOOTCACHE_RECORD_ZEROES;
            break;
        case 6:
            records[3].slot = 2;
            break;
        case 7:
            h.nb_slots--;
            break;
        }
        encode_records(&h, records, buf);
        if (wrong == 8) {
            buf[100] ^= 1;
        }
        ok = bootcache_file_decode_records(&h, buf, decoded, &local_err);
        g_assert(ok == !wrong);
        error_free(local_err);
        if (ok) {
            g_assert(!memcmp(records, decoded, sizeof(records)));
        }
    }
}

static void test_file_header(void)
{
    g_autofree uint8_t *buf = g_malloc(BOOTCACHE_HEADER_SIZE);
    BootcacheRecord records[NB_RECORDS];
    BootcacheFileHeader h, decoded;

    make_file(&h, records, NB_RECORDS, NULL);
    bootcache_file_encode_header(&h, buf);
    g_assert(bootcache_file_decode_header(&decoded, buf, &error_abort));
    g_assert(!memcmp(&h, &decoded, sizeof(h)));

    /* Each bit counts */
    for (unsigned bit = 0; bit < BOOTCACHE_HEADER_SIZE * 8; bit += 5) {
        Error *local_err = NULL;

        buf[bit / 8] ^= 1 << bit % 8;
        g_assert(!bootcache_file_decode_header(&decoded, buf, &local_err));
        error_free(local_err);
        buf[bit / 8] ^= 1 << bit % 8;
    }
    /* Right checksums do not make it right */
    for (int wrong = 0; wrong < 6; wrong++) {
        Error *local_err = NULL;
        BootcacheFileHeader bad = h;

        switch (wrong) {
        case 0:
            bad.length = 0;
            break;
        case 1:
            bad.length = UINT64_MAX;
            break;
        case 2:
            bad.block_size = 0;
            break;
        case 3:
            bad.block_size = 3 * 4096;
            break;
        case 4:
            bad.nb_records = NB_BLOCKS + 1;
            break;
        case 5:
            bad.nb_slots = NB_RECORDS + 1;
            break;
        }
        bootcache_file_encode_header(&bad, buf);
        g_assert(!bootcache_file_decode_header(&decoded, buf, &local_err));
        error_free(local_err);
    }
}

/* ------------------------------------------------------------------ */
/* Messages                                                            */

static void test_messages(void)
{
    static const struct {
        uint64_t block;
        uint32_t count;
        bool right;
    } cases[] = {
        { 0, 1, true }, { NB_BLOCKS - 1, 1, true }, { NB_BLOCKS - 64, 64, true },
        { 0, 0, false }, { 0, 65, false }, { NB_BLOCKS, 1, false },
        { NB_BLOCKS - 1, 2, false }, { UINT64_MAX, 1, false },
        { UINT64_MAX, 64, false }, { 0, UINT32_MAX, false },
    };
    uint8_t buf[BOOTCACHE_HELLO_SIZE];
    BootcacheHello hello = {
        .version = BOOTCACHE_VERSION, .length = 5, .identity = identity,
    };

    for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
        BootcacheRequest m = {
            .cookie = 77, .block = cases[i].block, .count = cases[i].count,
        }, got;

        bootcache_encode_request(&m, buf);
        g_assert(bootcache_decode_request(&got, buf, NB_BLOCKS) ==
                 cases[i].right);
        g_assert(got.cookie == 77);
        buf[0] ^= 1;
        g_assert(!bootcache_decode_request(&got, buf, NB_BLOCKS));
    }
    bootcache_encode_hello(&hello, buf);
    g_assert(bootcache_decode_hello(&hello, buf));
    hello.version++;
    bootcache_encode_hello(&hello, buf);
    g_assert(!bootcache_decode_hello(&hello, buf));
    memset(buf, 0xff, sizeof(buf));
    g_assert(!bootcache_decode_hello(&hello, buf));
}

/* "The boot has ended" is no request, and each byte but the cookie counts */
static void test_boot_end(void)
{
    uint8_t buf[BOOTCACHE_REQUEST_SIZE];
    BootcacheRequest request = { .block = 1, .count = 1 };
    uint64_t cookie = 0;

    bootcache_encode_boot_end(UINT64_MAX - 5, buf);
    g_assert_true(bootcache_decode_boot_end(&cookie, buf));
    g_assert_cmpuint(cookie, ==, UINT64_MAX - 5);
    g_assert_false(bootcache_decode_request(&request, buf, NB_BLOCKS));
    for (size_t i = 0; i < sizeof(buf); i++) {
        bool is_cookie = i >= 8 && i < 16;

        buf[i] ^= 0x80;
        g_assert(bootcache_decode_boot_end(&cookie, buf) == is_cookie);
        buf[i] ^= 0x80;
    }
    bootcache_encode_request(&request, buf);
    g_assert_false(bootcache_decode_boot_end(&cookie, buf));
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/bootcache/processes", test_processes);
    g_test_add_func("/bootcache/seals", test_seals);
    g_test_add_func("/bootcache/unsealed", test_unsealed);
    g_test_add_func("/bootcache/map/geometry", test_geometry);
    g_test_add_func("/bootcache/map/records", test_records);
    g_test_add_func("/bootcache/map/full", test_full);
    g_test_add_func("/bootcache/file/header", test_file_header);
    g_test_add_func("/bootcache/file/records", test_file_records);
    g_test_add_func("/bootcache/messages", test_messages);
    g_test_add_func("/bootcache/boot-end", test_boot_end);
    return g_test_run();
}
