/*
 * thinvm template store: contents in, verified, repaired
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef BLOCK_TEMPLATE_TRANSFER_H
#define BLOCK_TEMPLATE_TRANSFER_H

#include "system/block-backend.h"
#include "store.h"

/* Any image that QEMU reads; @fmt may be NULL */
BlockBackend *template_open_image(const char *image, const char *fmt,
                                  bool image_opts, Error **errp);
/* A copy on a disk of this node */
BlockBackend *template_open_copy(TemplateStore *s,
                                 const TemplateDigest *digest, Error **errp);

/*
 * Bring the contents of @blk in, with hashes of chunks of @chunk_size (0, or if
 * it does not fit: the default).  They must be @expected, unless that is NULL.
 * @existed: they were there already, and are left as they are unless @replace.
 */
bool template_receive(TemplateStore *s, BlockBackend *blk,
                      const TemplateDigest *expected, bool replace,
                      uint32_t chunk_size, TemplateDigest *digest,
                      bool *existed, Error **errp);

/* What is wrong with a copy */
typedef struct TemplateFindings {
    char *chunks_problem;       /* .chunks cannot be believed: why not */
    char *data_problem;         /* .raw cannot be opened, or its size: why */
    GArray *bad;                /* numbers of chunks, uint64_t */
    uint32_t chunk_size;        /* of these */
    bool whole_bad;             /* the hash of all of it is another */
    uint64_t chunks_read;
    TemplateChunks *chunks;     /* as on the disk; NULL if chunks_problem */
    TemplateChunks *computed;   /* from the data, if all of it was read */
} TemplateFindings;

void template_findings_clear(TemplateFindings *f);
bool template_findings_ok(const TemplateFindings *f);

/*
 * Read @bytes from @offset on of a copy (all of it: 0 and UINT64_MAX) from the
 * disk, and compare.  False if that was not possible.  If its hashes are of no
 * use, those that are computed are of chunks of @chunk_size (as above).
 */
bool template_verify(TemplateStore *s, const TemplateDigest *digest,
                     uint64_t offset, uint64_t bytes, uint32_t chunk_size,
                     TemplateFindings *f, Error **errp);

/*
 * Write the chunks @f->bad anew from @blk.  Those that @blk does not have
 * right stay in the list.
 */
bool template_mend(TemplateStore *s, BlockBackend *blk, TemplateFindings *f,
                   Error **errp);

#endif
