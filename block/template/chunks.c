/*
 * thinvm template store: a template's chunks and their hashes
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See chunks.h.  No I/O.  Whatever a file holds gives an error that says what
 * is wrong with it, before anything is allocated by a number that it gives.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/bswap.h"
#include "qemu/cutils.h"
#include "qemu/host-utils.h"
#include "crypto/hash.h"
#include "chunks.h"

#define MAGIC               "tvtchnk1"
#define VERSION             1

#define OFFSET_VERSION      8
#define OFFSET_CHUNK_SIZE   12
#define OFFSET_LENGTH       16
#define OFFSET_NB_CHUNKS    24
#define OFFSET_DIGEST       32
#define OFFSET_HASHES_HASH  64
#define OFFSET_RESERVED     96
#define OFFSET_HEADER_HASH  (TEMPLATE_CHUNKS_HEADER - TEMPLATE_DIGEST_SIZE)

QEMU_BUILD_BUG_ON(sizeof(TemplateDigest) != TEMPLATE_DIGEST_SIZE);

/* ------------------------------------------------------------------ */
/* Digests                                                             */

#define DIGEST_PREFIX       "sha256:"

void template_digest_format(const TemplateDigest *digest,
                            char text[TEMPLATE_DIGEST_TEXT])
{
    char *p = text + strlen(DIGEST_PREFIX);

    memcpy(text, DIGEST_PREFIX, strlen(DIGEST_PREFIX));
    for (int i = 0; i < TEMPLATE_DIGEST_SIZE; i++) {
        snprintf(p + 2 * i, 3, "%02x", digest->hash[i]);
    }
}

bool template_digest_parse(const char *text, TemplateDigest *digest,
                           Error **errp)
{
    const char *p = text;

    strstart(text, DIGEST_PREFIX, &p);
    if (strlen(p) != 2 * TEMPLATE_DIGEST_SIZE ||
        strspn(p, "0123456789abcdef") != 2 * TEMPLATE_DIGEST_SIZE) {
        error_setg(errp, "'%.100s' is no name of a template: it must be "
                   "'" DIGEST_PREFIX "' and 64 digits of 0-9, a-f", text);
        return false;
    }
    for (int i = 0; i < TEMPLATE_DIGEST_SIZE; i++) {
        digest->hash[i] = g_ascii_xdigit_value(p[2 * i]) << 4 |
                          g_ascii_xdigit_value(p[2 * i + 1]);
    }
    return true;
}

bool template_sha256(const void *buf, size_t size, TemplateDigest *digest,
                     Error **errp)
{
    uint8_t *result = digest->hash;
    size_t len = TEMPLATE_DIGEST_SIZE;

    return qcrypto_hash_bytes(QCRYPTO_HASH_ALGO_SHA256, buf, size, &result,
                              &len, errp) == 0;
}

/* ------------------------------------------------------------------ */
/* The file                                                            */

void template_chunks_free(TemplateChunks *c)
{
    if (c) {
        g_free(c->hashes);
        g_free(c);
    }
}

bool template_length_check(uint64_t length, const char *what, Error **errp)
{
    if (length == 0) {
        error_setg(errp, "%s is empty", what);
        return false;
    }
    if (length > TEMPLATE_LENGTH_MAX) {
        error_setg(errp, "%s has %" PRIu64 " bytes; a template has at most %"
                   PRIu64, what, length, (uint64_t)TEMPLATE_LENGTH_MAX);
        return false;
    }
    return true;
}

uint32_t template_chunk_size_default(uint64_t length)
{
    uint32_t size = TEMPLATE_CHUNK_SIZE_MIN;

    while (DIV_ROUND_UP(length, size) * TEMPLATE_DIGEST_SIZE >
           TEMPLATE_HASHES_DEFAULT) {
        size *= 2;
    }
    return size;
}

bool template_chunk_size_fits(uint64_t chunk_size, uint64_t length)
{
    return is_power_of_2(chunk_size) &&
           chunk_size >= TEMPLATE_CHUNK_SIZE_MIN &&
           chunk_size <= TEMPLATE_CHUNK_SIZE_MAX &&
           DIV_ROUND_UP(length, chunk_size) <= TEMPLATE_CHUNKS_MAX;
}

uint32_t template_io_bytes(uint32_t chunk_size)
{
    return MAX(chunk_size, TEMPLATE_IO_BYTES);
}

uint32_t template_chunk_bytes(const TemplateChunks *c, uint64_t chunk)
{
    return MIN(c->chunk_size, c->length - chunk * c->chunk_size);
}

uint64_t template_chunks_file_size(const TemplateChunks *c)
{
    return TEMPLATE_CHUNKS_HEADER + c->nb_chunks * TEMPLATE_DIGEST_SIZE;
}

uint8_t *template_chunks_encode(const TemplateChunks *c, Error **errp)
{
    size_t size = c->nb_chunks * TEMPLATE_DIGEST_SIZE;
    g_autofree uint8_t *buf = g_malloc0(TEMPLATE_CHUNKS_HEADER + size);
    TemplateDigest hash;

    memcpy(buf + TEMPLATE_CHUNKS_HEADER, c->hashes, size);
    memcpy(buf, MAGIC, 8);
    stl_le_p(buf + OFFSET_VERSION, VERSION);
    stl_le_p(buf + OFFSET_CHUNK_SIZE, c->chunk_size);
    stq_le_p(buf + OFFSET_LENGTH, c->length);
    stq_le_p(buf + OFFSET_NB_CHUNKS, c->nb_chunks);
    memcpy(buf + OFFSET_DIGEST, &c->digest, sizeof(hash));
    if (!template_sha256(c->hashes, size, &hash, errp)) {
        return NULL;
    }
    memcpy(buf + OFFSET_HASHES_HASH, &hash, sizeof(hash));
    if (!template_sha256(buf, OFFSET_HEADER_HASH, &hash, errp)) {
        return NULL;
    }
    memcpy(buf + OFFSET_HEADER_HASH, &hash, sizeof(hash));
    return g_steal_pointer(&buf);
}

void template_chunks_header_root(const uint8_t *header, TemplateDigest *root)
{
    memcpy(root, header + OFFSET_HEADER_HASH, sizeof(*root));
}

bool template_chunks_root(const TemplateChunks *c, TemplateDigest *root,
                          Error **errp)
{
    g_autofree uint8_t *buf = template_chunks_encode(c, errp);

    if (buf) {
        template_chunks_header_root(buf, root);
    }
    return buf;
}

static bool chunks_check(const TemplateChunks *c, Error **errp)
{
    if (!template_chunk_size_fits(c->chunk_size, 0)) {
        error_setg(errp, "its chunk size is %" PRIu32, c->chunk_size);
        return false;
    }
    if (!template_length_check(c->length, "its template", errp)) {
        return false;
    }
    if (c->nb_chunks != DIV_ROUND_UP(c->length, c->chunk_size) ||
        c->nb_chunks > TEMPLATE_CHUNKS_MAX) {
        error_setg(errp, "it has %" PRIu64 " chunks of %" PRIu32 " bytes for a "
                   "template of %" PRIu64, c->nb_chunks, c->chunk_size,
                   c->length);
        return false;
    }
    return true;
}

TemplateChunks *template_chunks_decode_header(const uint8_t *buf,
                                              Error **errp)
{
    g_autoptr(TemplateChunks) c = g_new0(TemplateChunks, 1);
    TemplateDigest hash;

    if (memcmp(buf, MAGIC, 8)) {
        error_setg(errp, "it does not begin with '" MAGIC "'");
        return NULL;
    }
    if (!template_sha256(buf, OFFSET_HEADER_HASH, &hash, errp)) {
        return NULL;
    }
    if (memcmp(&hash, buf + OFFSET_HEADER_HASH, sizeof(hash))) {
        error_setg(errp, "the hash of its header is not right");
        return NULL;
    }
    if (ldl_le_p(buf + OFFSET_VERSION) != VERSION) {
        error_setg(errp, "it has version %" PRIu32 ", and this program knows "
                   "version %d", (uint32_t)ldl_le_p(buf + OFFSET_VERSION),
                   VERSION);
        return NULL;
    }
    if (!buffer_is_zero(buf + OFFSET_RESERVED,
                        OFFSET_HEADER_HASH - OFFSET_RESERVED)) {
        error_setg(errp, "its reserved bytes are not zero");
        return NULL;
    }
    c->chunk_size = ldl_le_p(buf + OFFSET_CHUNK_SIZE);
    c->length = ldq_le_p(buf + OFFSET_LENGTH);
    c->nb_chunks = ldq_le_p(buf + OFFSET_NB_CHUNKS);
    memcpy(&c->digest, buf + OFFSET_DIGEST, sizeof(c->digest));
    if (!chunks_check(c, errp)) {
        return NULL;
    }
    return g_steal_pointer(&c);
}

bool template_chunks_decode_hashes(TemplateChunks *c, const uint8_t *header,
                                   const uint8_t *buf, Error **errp)
{
    size_t size = c->nb_chunks * TEMPLATE_DIGEST_SIZE;
    TemplateDigest hash;

    if (!template_sha256(buf, size, &hash, errp)) {
        return false;
    }
    if (memcmp(&hash, header + OFFSET_HASHES_HASH, sizeof(hash))) {
        error_setg(errp, "the hash of its hashes is not right");
        return false;
    }
    c->hashes = g_memdup2(buf, size);
    return true;
}

/* ------------------------------------------------------------------ */
/* The hasher                                                          */

struct TemplateHasher {
    QCryptoHash *whole;
    TemplateChunks *chunks;
    uint64_t next;                  /* chunk */
};

TemplateHasher *template_hasher_new(uint64_t length, uint32_t chunk_size,
                                    Error **errp)
{
    g_autoptr(TemplateHasher) h = g_new0(TemplateHasher, 1);

    h->chunks = g_new0(TemplateChunks, 1);
    h->chunks->length = length;
    h->chunks->chunk_size = chunk_size;
    h->chunks->nb_chunks = DIV_ROUND_UP(length, chunk_size);
    h->chunks->hashes = g_new0(TemplateDigest, h->chunks->nb_chunks);
    h->whole = qcrypto_hash_new(QCRYPTO_HASH_ALGO_SHA256, errp);
    return h->whole ? g_steal_pointer(&h) : NULL;
}

void template_hasher_free(TemplateHasher *h)
{
    if (h) {
        if (h->whole) {
            qcrypto_hash_free(h->whole);
        }
        template_chunks_free(h->chunks);
        g_free(h);
    }
}

bool template_hasher_add(TemplateHasher *h, const void *buf, uint32_t bytes,
                         Error **errp)
{
    if (qcrypto_hash_update(h->whole, buf, bytes, errp) < 0) {
        return false;
    }
    while (bytes) {
        uint32_t n;

        assert(h->next < h->chunks->nb_chunks);
        n = template_chunk_bytes(h->chunks, h->next);
        assert(n <= bytes);
        if (!template_sha256(buf, n, &h->chunks->hashes[h->next++], errp)) {
            return false;
        }
        buf += n;
        bytes -= n;
    }
    return true;
}

TemplateChunks *template_hasher_finish(TemplateHasher *h, Error **errp)
{
    uint8_t *result = h->chunks->digest.hash;
    size_t len = TEMPLATE_DIGEST_SIZE;

    assert(h->next == h->chunks->nb_chunks);
    if (qcrypto_hash_finalize_bytes(h->whole, &result, &len, errp) < 0) {
        return NULL;
    }
    return g_steal_pointer(&h->chunks);
}
