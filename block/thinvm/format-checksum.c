/*
 * thinvm on-disk format: the checksum of every metadata structure
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * CRC32C of image, kind, place and contents.  It is computed for each page
 * and record that is read or written, so the processor's instruction is used
 * where there is one; the result is the same everywhere.  No state, no I/O.
 */

#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qemu/crc32c.h"
#include "format.h"

/* The functions below carry the register's raw value: no inversion. */

static uint32_t crc_update_table(uint32_t crc, const uint8_t *buf, size_t size)
{
    while (size) {
        unsigned step = MIN(size, 1u << 30);

        crc = ~crc32c(crc, buf, step);
        buf += step;
        size -= step;
    }
    return crc;
}

#ifdef __x86_64__
#include <nmmintrin.h>

static uint32_t __attribute__((target("sse4.2")))
crc_update_sse42(uint32_t crc, const uint8_t *buf, size_t size)
{
    uint64_t wide = crc;

    for (; size >= 8; buf += 8, size -= 8) {
        wide = _mm_crc32_u64(wide, ldq_he_p(buf));
    }
    crc = wide;
    for (; size; buf++, size--) {
        crc = _mm_crc32_u8(crc, *buf);
    }
    return crc;
}

uint32_t thinvm_crc_update(uint32_t crc, const void *buf, size_t size)
{
    if (__builtin_cpu_supports("sse4.2")) {
        return crc_update_sse42(crc, buf, size);
    }
    return crc_update_table(crc, buf, size);
}
#else
uint32_t thinvm_crc_update(uint32_t crc, const void *buf, size_t size)
{
    return crc_update_table(crc, buf, size);
}
#endif

uint32_t thinvm_checksum(const QemuUUID *uuid, ThinvmChecksumKind kind,
                         uint64_t place, const void *buf, size_t size)
{
    uint8_t prefix[28];
    uint32_t crc = 0xffffffff;

    memcpy(prefix, uuid->data, 16);
    stl_le_p(prefix + 16, kind);
    stq_le_p(prefix + 20, place);

    crc = thinvm_crc_update(crc, prefix, sizeof(prefix));
    crc = thinvm_crc_update(crc, buf, size);
    return ~crc;
}
