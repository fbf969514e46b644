/*
 * thinvm template store: a template's chunks and their hashes
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * In memory and as the .chunks file of docs/interop/thinvm-template.rst; and
 * the hasher that computes them from contents that pass by once, in order.
 */

#ifndef BLOCK_TEMPLATE_CHUNKS_H
#define BLOCK_TEMPLATE_CHUNKS_H

#include "template.h"

#define TEMPLATE_CHUNK_SIZE_MIN     (64 * KiB)
#define TEMPLATE_CHUNK_SIZE_MAX     (16 * MiB)
#define TEMPLATE_LENGTH_MAX         (4 * TiB)
#define TEMPLATE_CHUNKS_MAX         (TEMPLATE_LENGTH_MAX / MiB)
#define TEMPLATE_CHUNKS_HEADER      4096
/* The hashes of chunks of the default size take no more */
#define TEMPLATE_HASHES_DEFAULT     (8 * MiB)

/* How much is read, written and noted at once where all of it passes by */
#define TEMPLATE_IO_BYTES           MiB

typedef struct TemplateChunks {
    TemplateDigest digest;          /* of the whole */
    uint64_t length;
    uint32_t chunk_size;
    uint64_t nb_chunks;
    TemplateDigest *hashes;
} TemplateChunks;

void template_chunks_free(TemplateChunks *c);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(TemplateChunks, template_chunks_free)

/* Can it be stored?  The error names @what. */
bool template_length_check(uint64_t length, const char *what, Error **errp);

/*
 * What new templates of that length get, the same on every node: the smallest
 * chunks whose hashes are few enough.
 */
uint32_t template_chunk_size_default(uint64_t length);
/* May a template of that length (0: any) have them? */
bool template_chunk_size_fits(uint64_t chunk_size, uint64_t length);
/* Of a whole number of chunks */
uint32_t template_io_bytes(uint32_t chunk_size);

uint32_t template_chunk_bytes(const TemplateChunks *c, uint64_t chunk);
uint64_t template_chunks_file_size(const TemplateChunks *c);

/* The file's contents: template_chunks_file_size() bytes */
uint8_t *template_chunks_encode(const TemplateChunks *c, Error **errp);
/* The hash of its header, which holds that of all hashes */
void template_chunks_header_root(const uint8_t *header, TemplateDigest *root);
bool template_chunks_root(const TemplateChunks *c, TemplateDigest *root,
                          Error **errp);

/*
 * From TEMPLATE_CHUNKS_HEADER bytes, without hashes; then from the bytes that
 * follow, nb_chunks * TEMPLATE_DIGEST_SIZE.  NULL if they are not right.
 */
TemplateChunks *template_chunks_decode_header(const uint8_t *buf,
                                              Error **errp);
bool template_chunks_decode_hashes(TemplateChunks *c, const uint8_t *header,
                                   const uint8_t *buf, Error **errp);

typedef struct TemplateHasher TemplateHasher;

TemplateHasher *template_hasher_new(uint64_t length, uint32_t chunk_size,
                                    Error **errp);
void template_hasher_free(TemplateHasher *h);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(TemplateHasher, template_hasher_free)

/* The chunks that come next, each whole */
bool template_hasher_add(TemplateHasher *h, const void *buf, uint32_t bytes,
                         Error **errp);
/* After the last one */
TemplateChunks *template_hasher_finish(TemplateHasher *h, Error **errp);

#endif
