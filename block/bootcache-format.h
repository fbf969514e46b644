/*
 * thinvm boot cache: the file that keeps a record, the shared memory, and
 * the messages between readers and publisher
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Format layer of the boot cache: structures, limits, codec.  No I/O and no
 * state.  docs/interop/thinvm-bootcache.rst tells the same story.
 *
 * Rules that it keeps:
 *  - Nothing from a file or a socket is believed before checksum, bounds and
 *    reserved bytes were looked at; what is wrong gives an Error.
 *  - Every checksum covers the identity of the template, so that a block of
 *    another template, or of another version of it, is never taken for ours.
 *
 * A "block" is a part of the template of block_size bytes, the unit in which
 * it is fetched and kept; a "slot" is a place for the data of one block; a
 * "record" says that a block was read, and where its data is.
 */
#ifndef BLOCK_BOOTCACHE_FORMAT_H
#define BLOCK_BOOTCACHE_FORMAT_H

#include "qemu/units.h"
#include "qapi/error.h"

#define BOOTCACHE_VERSION            1
#define BOOTCACHE_IDENTITY_SIZE      32
#define BOOTCACHE_MIN_BLOCK_SIZE     (4 * KiB)
#define BOOTCACHE_MAX_BLOCK_SIZE     (1 * MiB)
#define BOOTCACHE_DEFAULT_BLOCK_SIZE (64 * KiB)
#define BOOTCACHE_MAX_BLOCKS         ((uint64_t)1 << 24)
#define BOOTCACHE_NO_SLOT            UINT32_MAX

/* What a checksum is of */
typedef enum BootcacheChecksumKind {
    BOOTCACHE_CHECKSUM_HEADER  = 1,
    BOOTCACHE_CHECKSUM_RECORDS = 2,
    BOOTCACHE_CHECKSUM_BLOCK   = 3,
    BOOTCACHE_CHECKSUM_MAP     = 4,
} BootcacheChecksumKind;

/* A template: its contents, as far as can be known without reading all */
typedef struct BootcacheIdentity {
    uint8_t hash[BOOTCACHE_IDENTITY_SIZE];
} BootcacheIdentity;

/*
 * CRC32C of the identity, @kind (le32), @place (le64) and @size bytes at
 * @buf, as one string.  The place of a block is its number.
 */
uint32_t bootcache_checksum(const BootcacheIdentity *identity,
                            BootcacheChecksumKind kind, uint64_t place,
                            const void *buf, size_t size);

char *bootcache_identity_str(const BootcacheIdentity *identity);

uint64_t bootcache_nb_blocks(uint64_t length, uint32_t block_size);

/* Bytes of block @block; the last one of a template may be short */
uint32_t bootcache_block_bytes(uint64_t length, uint32_t block_size,
                               uint64_t block);

bool bootcache_check_geometry(uint64_t length, uint64_t block_size,
                              Error **errp);

/* ------------------------------------------------------------------ */
/* Records, in the order in which blocks were first read               */

#define BOOTCACHE_RECORD_ZEROES      1u      /* no slot: all bytes are 0 */
#define BOOTCACHE_RECORD_FLAGS       1u
#define BOOTCACHE_RECORD_SIZE        32

typedef struct BootcacheRecord {
    uint64_t block;
    uint32_t slot;          /* BOOTCACHE_NO_SLOT with ZEROES */
    uint32_t crc;           /* of the block's bytes; 0 with ZEROES */
    uint32_t flags;
    uint32_t ms;            /* since the first read of the recording */
    uint64_t reserved;
} BootcacheRecord;

QEMU_BUILD_BUG_ON(sizeof(BootcacheRecord) != BOOTCACHE_RECORD_SIZE);

/* ------------------------------------------------------------------ */
/* The file                                                            */

#define BOOTCACHE_FILE_MAGIC         0x31656863746f6f62ULL   /* bootche1 */
#define BOOTCACHE_HEADER_SIZE        4096

typedef struct BootcacheFileHeader {
    BootcacheIdentity identity;
    uint64_t length;            /* of the template, in bytes */
    uint32_t block_size;
    uint32_t nb_records;
    uint32_t nb_slots;
    uint32_t records_crc;
} BootcacheFileHeader;

/* Where the data of slot 0 is, and where the file ends */
uint64_t bootcache_file_data_offset(const BootcacheFileHeader *h);
uint64_t bootcache_file_size(const BootcacheFileHeader *h);

void bootcache_file_encode_header(const BootcacheFileHeader *h, uint8_t *buf);
bool bootcache_file_decode_header(BootcacheFileHeader *h, const uint8_t *buf,
                                  Error **errp);
void bootcache_file_encode_record(const BootcacheRecord *r, uint8_t *buf);

/*
 * All records of a file, from @buf to @records: checksum, each block inside
 * the template and only once, slots in order without a gap.
 */
bool bootcache_file_decode_records(const BootcacheFileHeader *h,
                                   const uint8_t *buf,
                                   BootcacheRecord *records, Error **errp);

/* ------------------------------------------------------------------ */
/* Messages, little endian, over a stream socket                       */

#define BOOTCACHE_HELLO_MAGIC        0x6f6c6c6568627674ULL   /* tvbhello */
#define BOOTCACHE_REQUEST_MAGIC      0x71657262U             /* breq */
#define BOOTCACHE_BOOT_END_MAGIC     0x646e6562U             /* bend */
#define BOOTCACHE_REPLY_MAGIC        0x79706572U             /* repy */
#define BOOTCACHE_HELLO_SIZE         64
#define BOOTCACHE_REQUEST_SIZE       32
#define BOOTCACHE_REPLY_SIZE         16
#define BOOTCACHE_MAX_REQUEST_BLOCKS 64

/* The reader's first message; the publisher answers with the same layout */
typedef struct BootcacheHello {
    uint32_t version;
    uint32_t status;            /* BootcacheStatus; 0 from the reader */
    uint64_t length;
    BootcacheIdentity identity;
} BootcacheHello;

typedef enum BootcacheStatus {
    BOOTCACHE_STATUS_OK       = 0,  /* with a hello: a descriptor comes too */
    BOOTCACHE_STATUS_FOREIGN  = 1,  /* another template, or version of it */
    BOOTCACHE_STATUS_CLOSED   = 2,  /* nothing more is recorded */
    BOOTCACHE_STATUS_IO_ERROR = 3,  /* the template cannot be read */
    BOOTCACHE_STATUS_REFUSED  = 4,  /* a guest's word does not seal here */
    BOOTCACHE_STATUS_EMPTY    = 5,  /* nothing has been recorded yet */
} BootcacheStatus;

typedef struct BootcacheRequest {
    uint64_t cookie;
    uint64_t block;
    uint32_t count;
} BootcacheRequest;

typedef struct BootcacheReply {
    uint64_t cookie;
    uint32_t status;
} BootcacheReply;

void bootcache_encode_hello(const BootcacheHello *m, uint8_t *buf);
bool bootcache_decode_hello(BootcacheHello *m, const uint8_t *buf);
void bootcache_encode_request(const BootcacheRequest *m, uint8_t *buf);
bool bootcache_decode_request(BootcacheRequest *m, const uint8_t *buf,
                              uint64_t nb_blocks);

/* "The boot has ended": as large as a request, and answered like one */
void bootcache_encode_boot_end(uint64_t cookie, uint8_t *buf);
bool bootcache_decode_boot_end(uint64_t *cookie, const uint8_t *buf);

void bootcache_encode_reply(const BootcacheReply *m, uint8_t *buf);
bool bootcache_decode_reply(BootcacheReply *m, const uint8_t *buf);

#endif /* BLOCK_BOOTCACHE_FORMAT_H */
