/*
 * What the unit tests of thinvm's on-disk format share
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A second, slow implementation of the checksum, a way to put a number at a
 * byte position, and sound structures to begin from.  Byte positions in the
 * tests are written out as numbers on purpose: they are the promise of
 * docs/interop/thinvm.rst, not what a struct says today.
 */
#ifndef TESTS_UNIT_THINVM_FORMAT_HELPERS_H
#define TESTS_UNIT_THINVM_FORMAT_HELPERS_H

#include "qemu/bswap.h"
#include "qemu/cutils.h"
#include "../../../block/thinvm/format.h"

static const QemuUUID test_uuid = {
    .data = { 0x10, 0x32, 0x54, 0x76, 0x98, 0xba, 0x4c, 0xfe,
              0x81, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef },
};

/* CRC32C bit by bit */
static inline uint32_t slow_crc32c(const uint8_t *buf, size_t size)
{
    uint32_t crc = 0xffffffff;
    size_t i;
    int bit;

    for (i = 0; i < size; i++) {
        crc ^= buf[i];
        for (bit = 0; bit < 8; bit++) {
            crc = crc & 1 ? crc >> 1 ^ 0x82f63b78 : crc >> 1;
        }
    }
    return ~crc;
}

static inline uint32_t slow_checksum(const QemuUUID *uuid, uint32_t kind,
                              uint64_t place, const void *buf, size_t size)
{
    g_autofree uint8_t *all = g_malloc(28 + size);

    memcpy(all, uuid->data, 16);
    stl_le_p(all + 16, kind);
    stq_le_p(all + 20, place);
    memcpy(all + 28, buf, size);
    return slow_crc32c(all, 28 + size);
}

static inline void expect_error(Error *err, const char *text)
{
    g_assert_nonnull(err);
    if (!strstr(error_get_pretty(err), text)) {
        g_error("message \"%s\" lacks \"%s\"", error_get_pretty(err), text);
    }
    error_free(err);
}

/* A little-endian number of 1, 2, 4 or 8 bytes */
static inline void put(void *buf, size_t offset, int size, uint64_t value)
{
    uint64_t le = cpu_to_le64(value);

    memcpy((uint8_t *)buf + offset, &le, size);
}

typedef struct FieldCase {
    size_t offset;
    int size;               /* bytes */
    uint64_t value;
    const char *message;    /* NULL: this value is fine */
} FieldCase;

#define PTR(type, address) ((uint64_t)(type) << 40 | (address))

static inline ThinvmSnapshot good_snapshot(void)
{
    ThinvmSnapshot snap = {
        .id = 1ULL << 40,
        .parent_id = (1ULL << 40) - 1,
        .root = { .address = 500, .type = THINVM_PTR_PAGE,
                  .shared_below = true, .generation = 9, .crc = 77 },
        .virtual_size = 10 * GiB,
        .vmstate_size = 1 * GiB + 1,
        .date_sec = 1ULL << 35,
        .date_nsec = 999999999,
        .flags = THINVM_SNAPSHOT_DELETED,
        .vm_clock_nsec = 1ULL << 60,
        .icount = UINT64_MAX,
    };

    memset(snap.name, 'n', 255);
    return snap;
}

static inline ThinvmBacking good_backing(void)
{
    ThinvmBacking backing = { .format = "qcow2" };

    memset(backing.name, 'b', 1023);
    return backing;
}

#endif
