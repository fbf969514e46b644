/*
 * thinvm boot cache: codec of the file and of the messages
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See bootcache-format.h.  Pure functions.
 */

#include "qemu/osdep.h"
#include "qemu/bitmap.h"
#include "qemu/bswap.h"
#include "qemu/cutils.h"
#include "bootcache-format.h"
#include "thinvm/format.h"

uint32_t bootcache_checksum(const BootcacheIdentity *identity,
                            BootcacheChecksumKind kind, uint64_t place,
                            const void *buf, size_t size)
{
    uint8_t where[12];
    uint32_t crc = 0xffffffff;

    stl_le_p(where, kind);
    stq_le_p(where + 4, place);
    crc = thinvm_crc_update(crc, identity->hash, sizeof(identity->hash));
    crc = thinvm_crc_update(crc, where, sizeof(where));
    crc = thinvm_crc_update(crc, buf, size);
    return ~crc;
}

char *bootcache_identity_str(const BootcacheIdentity *identity)
{
    GString *s = g_string_new(NULL);

    for (size_t i = 0; i < sizeof(identity->hash); i++) {
        g_string_append_printf(s, "%02x", identity->hash[i]);
    }
    return g_string_free(s, FALSE);
}

uint64_t bootcache_nb_blocks(uint64_t length, uint32_t block_size)
{
    return DIV_ROUND_UP(length, block_size);
}

uint32_t bootcache_block_bytes(uint64_t length, uint32_t block_size,
                               uint64_t block)
{
    return MIN(block_size, length - block * block_size);
}

bool bootcache_check_geometry(uint64_t length, uint64_t block_size,
                              Error **errp)
{
    if (!is_power_of_2(block_size) || block_size < BOOTCACHE_MIN_BLOCK_SIZE ||
        block_size > BOOTCACHE_MAX_BLOCK_SIZE) {
        error_setg(errp, "The block size is %" PRIu64 "; it must be a power "
                   "of two from %" PRIu64 " to %" PRIu64, block_size,
                   (uint64_t)BOOTCACHE_MIN_BLOCK_SIZE,
                   (uint64_t)BOOTCACHE_MAX_BLOCK_SIZE);
        return false;
    }
    if (!length || length > INT64_MAX - block_size ||
        bootcache_nb_blocks(length, block_size) > BOOTCACHE_MAX_BLOCKS) {
        error_setg(errp, "The template has %" PRIu64 " bytes; with blocks of "
                   "%" PRIu64 " it must have 1 to %" PRIu64, length,
                   block_size, BOOTCACHE_MAX_BLOCKS * block_size);
        return false;
    }
    return true;
}

/* ------------------------------------------------------------------ */
/* The file                                                            */

uint64_t bootcache_file_data_offset(const BootcacheFileHeader *h)
{
    uint64_t end = BOOTCACHE_HEADER_SIZE +
                   (uint64_t)h->nb_records * BOOTCACHE_RECORD_SIZE;

    return ROUND_UP(end, BOOTCACHE_HEADER_SIZE);
}

uint64_t bootcache_file_size(const BootcacheFileHeader *h)
{
    return bootcache_file_data_offset(h) +
           (uint64_t)h->nb_slots * h->block_size;
}

static uint32_t bootcache_header_crc(const BootcacheIdentity *identity,
                                     const uint8_t *buf)
{
    return bootcache_checksum(identity, BOOTCACHE_CHECKSUM_HEADER, 0, buf,
                              BOOTCACHE_HEADER_SIZE - 4);
}

void bootcache_file_encode_header(const BootcacheFileHeader *h, uint8_t *buf)
{
    memset(buf, 0, BOOTCACHE_HEADER_SIZE);
    stq_le_p(buf, BOOTCACHE_FILE_MAGIC);
    stl_le_p(buf + 8, BOOTCACHE_VERSION);
    stl_le_p(buf + 12, h->block_size);
    stq_le_p(buf + 16, h->length);
    stl_le_p(buf + 24, h->nb_records);
    stl_le_p(buf + 28, h->nb_slots);
    memcpy(buf + 32, h->identity.hash, BOOTCACHE_IDENTITY_SIZE);
    stl_le_p(buf + 64, h->records_crc);
    stl_le_p(buf + BOOTCACHE_HEADER_SIZE - 4,
             bootcache_header_crc(&h->identity, buf));
}

bool bootcache_file_decode_header(BootcacheFileHeader *h, const uint8_t *buf,
                                  Error **errp)
{
    uint32_t version = ldl_le_p(buf + 8);

    if (ldq_le_p(buf) != BOOTCACHE_FILE_MAGIC) {
        error_setg(errp, "it is no boot cache: the first bytes are wrong");
        return false;
    }
    if (version != BOOTCACHE_VERSION) {
        error_setg(errp, "it has version %" PRIu32 ", and this program knows "
                   "version %d", version, BOOTCACHE_VERSION);
        return false;
    }
    *h = (BootcacheFileHeader) {
        .block_size = ldl_le_p(buf + 12),
        .length = ldq_le_p(buf + 16),
        .nb_records = ldl_le_p(buf + 24),
        .nb_slots = ldl_le_p(buf + 28),
        .records_crc = ldl_le_p(buf + 64),
    };
    memcpy(h->identity.hash, buf + 32, BOOTCACHE_IDENTITY_SIZE);
    if (ldl_le_p(buf + BOOTCACHE_HEADER_SIZE - 4) !=
        bootcache_header_crc(&h->identity, buf)) {
        error_setg(errp, "the checksum of its header is wrong");
        return false;
    }
    if (!bootcache_check_geometry(h->length, h->block_size, errp)) {
        return false;
    }
    if (h->nb_records > bootcache_nb_blocks(h->length, h->block_size) ||
        h->nb_slots > h->nb_records) {
        error_setg(errp, "it has %" PRIu32 " records and %" PRIu32 " slots "
                   "for %" PRIu64 " blocks", h->nb_records, h->nb_slots,
                   bootcache_nb_blocks(h->length, h->block_size));
        return false;
    }
    return true;
}

void bootcache_file_encode_record(const BootcacheRecord *r, uint8_t *buf)
{
    stq_le_p(buf, r->block);
    stl_le_p(buf + 8, r->slot);
    stl_le_p(buf + 12, r->crc);
    stl_le_p(buf + 16, r->flags);
    stl_le_p(buf + 20, r->ms);
    stq_le_p(buf + 24, 0);
}

static bool bootcache_file_decode_record(BootcacheRecord *r,
                                         const uint8_t *buf,
                                         uint32_t next_slot)
{
    *r = (BootcacheRecord) {
        .block = ldq_le_p(buf),
        .slot = ldl_le_p(buf + 8),
        .crc = ldl_le_p(buf + 12),
        .flags = ldl_le_p(buf + 16),
        .ms = ldl_le_p(buf + 20),
        .reserved = ldq_le_p(buf + 24),
    };
    if ((r->flags & ~BOOTCACHE_RECORD_FLAGS) || r->reserved) {
        return false;
    }
    return r->slot == (r->flags & BOOTCACHE_RECORD_ZEROES ? BOOTCACHE_NO_SLOT
                                                          : next_slot);
}

bool bootcache_file_decode_records(const BootcacheFileHeader *h,
                                   const uint8_t *buf,
                                   BootcacheRecord *records, Error **errp)
{
    uint64_t nb_blocks = bootcache_nb_blocks(h->length, h->block_size);
    g_autofree unsigned long *known = bitmap_new(nb_blocks);
    uint32_t next_slot = 0;

    if (h->records_crc !=
        bootcache_checksum(&h->identity, BOOTCACHE_CHECKSUM_RECORDS, 0, buf,
                           (size_t)h->nb_records * BOOTCACHE_RECORD_SIZE)) {
        error_setg(errp, "the checksum of its records is wrong");
        return false;
    }
    for (uint32_t i = 0; i < h->nb_records; i++) {
        BootcacheRecord *r = &records[i];

        if (!bootcache_file_decode_record(r, buf + i * BOOTCACHE_RECORD_SIZE,
                                          next_slot) ||
            r->block >= nb_blocks || test_bit(r->block, known)) {
            error_setg(errp, "its record %" PRIu32 " (block %" PRIu64 ", slot "
                       "%" PRIu32 ") is not possible", i, r->block, r->slot);
            return false;
        }
        set_bit(r->block, known);
        next_slot += r->slot != BOOTCACHE_NO_SLOT;
    }
    if (next_slot != h->nb_slots) {
        error_setg(errp, "its records use %" PRIu32 " slots, and the header "
                   "has %" PRIu32, next_slot, h->nb_slots);
        return false;
    }
    return true;
}

/* ------------------------------------------------------------------ */
/* Messages                                                            */

void bootcache_encode_hello(const BootcacheHello *m, uint8_t *buf)
{
    memset(buf, 0, BOOTCACHE_HELLO_SIZE);
    stq_le_p(buf, BOOTCACHE_HELLO_MAGIC);
    stl_le_p(buf + 8, m->version);
    stl_le_p(buf + 12, m->status);
    stq_le_p(buf + 16, m->length);
    memcpy(buf + 24, m->identity.hash, BOOTCACHE_IDENTITY_SIZE);
}

bool bootcache_decode_hello(BootcacheHello *m, const uint8_t *buf)
{
    if (ldq_le_p(buf) != BOOTCACHE_HELLO_MAGIC || ldq_le_p(buf + 56)) {
        return false;
    }
    m->version = ldl_le_p(buf + 8);
    m->status = ldl_le_p(buf + 12);
    m->length = ldq_le_p(buf + 16);
    memcpy(m->identity.hash, buf + 24, BOOTCACHE_IDENTITY_SIZE);
    return m->version == BOOTCACHE_VERSION;
}

void bootcache_encode_request(const BootcacheRequest *m, uint8_t *buf)
{
    stl_le_p(buf, BOOTCACHE_REQUEST_MAGIC);
    stl_le_p(buf + 4, m->count);
    stq_le_p(buf + 8, m->cookie);
    stq_le_p(buf + 16, m->block);
    stq_le_p(buf + 24, 0);
}

bool bootcache_decode_request(BootcacheRequest *m, const uint8_t *buf,
                              uint64_t nb_blocks)
{
    m->count = ldl_le_p(buf + 4);
    m->cookie = ldq_le_p(buf + 8);
    m->block = ldq_le_p(buf + 16);
    return ldl_le_p(buf) == BOOTCACHE_REQUEST_MAGIC && !ldq_le_p(buf + 24) &&
           m->count && m->count <= BOOTCACHE_MAX_REQUEST_BLOCKS &&
           m->block < nb_blocks && m->count <= nb_blocks - m->block;
}

void bootcache_encode_boot_end(uint64_t cookie, uint8_t *buf)
{
    memset(buf, 0, BOOTCACHE_REQUEST_SIZE);
    stl_le_p(buf, BOOTCACHE_BOOT_END_MAGIC);
    stq_le_p(buf + 8, cookie);
}

bool bootcache_decode_boot_end(uint64_t *cookie, const uint8_t *buf)
{
    *cookie = ldq_le_p(buf + 8);
    return ldl_le_p(buf) == BOOTCACHE_BOOT_END_MAGIC && !ldl_le_p(buf + 4) &&
           buffer_is_zero(buf + 16, BOOTCACHE_REQUEST_SIZE - 16);
}

void bootcache_encode_reply(const BootcacheReply *m, uint8_t *buf)
{
    stl_le_p(buf, BOOTCACHE_REPLY_MAGIC);
    stl_le_p(buf + 4, m->status);
    stq_le_p(buf + 8, m->cookie);
}

bool bootcache_decode_reply(BootcacheReply *m, const uint8_t *buf)
{
    m->status = ldl_le_p(buf + 4);
    m->cookie = ldq_le_p(buf + 8);
    return ldl_le_p(buf) == BOOTCACHE_REPLY_MAGIC;
}
