/*
 * thinvm template store: what all of its files share
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A template is named by the SHA-256 of its contents, as a guest reads them,
 * whatever format they came in.  Its contents are also cut into chunks, each
 * with a SHA-256 of its own, so that a part can be verified, and mended from
 * another copy, without reading the rest.  docs/interop/thinvm-template.rst
 * describes everything that lies on a disk.
 *
 * Layers, each using only those below:
 *
 *   commands     tool.c, tool-*.c; the driver: driver*.c above reader.h
 *   transfer     bringing in, verifying, repairing       transfer.c
 *   other nodes  by NBD, only ever read                  remote.c
 *   store        the files of one disk of this node      store.c, part.c
 *   description, placement, chunks: no I/O   cluster.c, placement.c, chunks.c
 *
 * Invariants:
 *  T1. What has its final name is complete, durable, and was hashed on its way
 *      in; a process that dies at any point leaves only files in tmp/, or a
 *      .chunks file without its .raw, which the next run sweeps.
 *  T2. Only a node's own disks are written.  Other nodes are read, and nothing
 *      that they say is believed before its hash is right.
 *  T3. The last copy is never dropped: a node lets go of a copy that belongs
 *      elsewhere only when all the disks that it belongs to have it.
 */

#ifndef BLOCK_TEMPLATE_TEMPLATE_H
#define BLOCK_TEMPLATE_TEMPLATE_H

#include "qemu/units.h"

#define TEMPLATE_DIGEST_SIZE    32
/* "sha256:", 64 digits, NUL */
#define TEMPLATE_DIGEST_TEXT    72

typedef struct TemplateDigest {
    uint8_t hash[TEMPLATE_DIGEST_SIZE];
} TemplateDigest;

/* "sha256:0123..." */
void template_digest_format(const TemplateDigest *digest,
                            char text[TEMPLATE_DIGEST_TEXT]);
/* The same; "sha256:" may be missing */
bool template_digest_parse(const char *text, TemplateDigest *digest,
                           Error **errp);

static inline bool template_digest_equal(const TemplateDigest *a,
                                         const TemplateDigest *b)
{
    return !memcmp(a->hash, b->hash, TEMPLATE_DIGEST_SIZE);
}

bool template_sha256(const void *buf, size_t size, TemplateDigest *digest,
                     Error **errp);

#endif
