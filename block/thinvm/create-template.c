/*
 * thinvm driver layer: copying a template to a new image
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * What makes a full clone that remembers its template (template.c).  The copy
 * is written to new clusters, and these are mapped by operations that mark
 * them as the template's; what is zeroes in the template stays unmapped.
 * Only whole clusters are marked: the end of the last one may not be the
 * template's.
 *
 * Invariants of the design (section 4): 1, since clusters are mapped when the
 * data are written, as always.  And: the image's superblocks say what its
 * template is only after everything was copied, and the digest of just what
 * was copied; until then nobody else opens it, whatever happens meanwhile.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/cutils.h"
#include "qobject/qdict.h"
#include "crypto/hash.h"
#include "system/block-backend.h"
#include "io.h"

/* Bytes that are read at a time: the largest cluster */
#define COPY_STEP   (2 * MiB)

typedef struct TemplateCopy {
    BlockDriverState *bs;           /* of the image; thinvm */
    BlockBackend *template;
    uint64_t length;                /* bytes of the template */
    uint8_t *buf;                   /* COPY_STEP */
    QCryptoHash *hash;
    uint64_t goal;                  /* cluster on the device to go on at */
    QLIST_ENTRY(TemplateCopy) link;
    BlockDriverState *file;
} TemplateCopy;

/* Copies that are under way; main loop */
static QLIST_HEAD(, TemplateCopy) copies = QLIST_HEAD_INITIALIZER(copies);

bool thinvm_create_is_copying(BlockDriverState *file)
{
    TemplateCopy *c;

    QLIST_FOREACH(c, &copies, link) {
        if (c->file == file) {
            return true;
        }
    }
    return false;
}

/* ------------------------------------------------------------------ */

/* New clusters for up to *@count from @first on, in which c->buf + @at goes */
static int coroutine_fn GRAPH_RDLOCK
write_clusters(TemplateCopy *c, uint64_t first, uint64_t *count, uint64_t at,
               bool marked, Error **errp)
{
    BDRVThinvmState *s = c->bs->opaque;
    uint64_t physical;
    ThinvmOp op;
    int ret;

    *count = MIN(*count, THINVM_ENTRIES_PER_LEAF -
                         first % THINVM_ENTRIES_PER_LEAF);
    ret = thinvm_volume_reserve(s, s->store, c->goal, *count, &physical,
                                count);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "No space for the copy of the template");
        return ret;
    }
    ret = !thinvm_still_owner(s) ? -EIO :
          bdrv_co_pwrite(c->bs->file, physical << s->cluster_bits,
                         *count << s->cluster_bits, c->buf + at, 0);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Cannot write the copy of the template");
    } else {
        op = (ThinvmOp) {
            .type = THINVM_OP_MAP,
            .tree = THINVM_TREE_DISK,
            .guest = first,
            .count = *count,
            .physical = physical,
            .valid = THINVM_ALL_VALID,
            .source = marked ? THINVM_SOURCE_TEMPLATE : 0,
        };
        ret = thinvm_store_execute(s->store, &op, NULL, errp);
    }
    if (ret < 0) {
        thinvm_store_unreserve(s->store, physical, *count);
        return ret;
    }
    c->goal = physical + *count;
    return 0;
}

/* How many clusters of c->buf from @at on are zeroes, or are not, in a row */
static uint64_t alike(TemplateCopy *c, uint64_t at, uint64_t end, bool *zero)
{
    BDRVThinvmState *s = c->bs->opaque;
    uint64_t size = s->cluster_size;
    uint64_t n = 1;

    *zero = buffer_is_zero(c->buf + at, size);
    while (at + n * size < end &&
           buffer_is_zero(c->buf + at + n * size, size) == *zero) {
        n++;
    }
    return n;
}

/* @bytes of the template, which are in c->buf */
static int coroutine_fn GRAPH_RDLOCK
write_copy(TemplateCopy *c, uint64_t offset, uint64_t bytes, Error **errp)
{
    BDRVThinvmState *s = c->bs->opaque;
    uint64_t end = ROUND_UP(bytes, s->cluster_size);
    uint64_t whole = QEMU_ALIGN_DOWN(bytes, s->cluster_size);
    uint64_t at, count;
    bool zero, marked;
    int ret = 0;

    memset(c->buf + bytes, 0, end - bytes);
    for (at = 0; at < end && ret == 0; at += count << s->cluster_bits) {
        marked = at < whole;
        count = alike(c, at, marked ? whole : end, &zero);
        if (!zero) {
            ret = write_clusters(c, (offset + at) >> s->cluster_bits, &count,
                                 at, marked, errp);
        }
    }
    return ret;
}

static int coroutine_fn add_to_hash(TemplateCopy *c, uint64_t bytes,
                                    Error **errp)
{
    return qcrypto_hash_update(c->hash, (char *)c->buf, bytes, errp) < 0
           ? -EIO : 0;
}

/* Zeroes in the template, in whole clusters: nothing is mapped */
static int coroutine_fn skip(TemplateCopy *c, uint64_t bytes, Error **errp)
{
    uint64_t step;
    int ret = 0;

    memset(c->buf, 0, MIN(bytes, COPY_STEP));
    for (; bytes && ret == 0; bytes -= step) {
        step = MIN(bytes, COPY_STEP);
        ret = add_to_hash(c, step, errp);
        qemu_co_sleep_ns(QEMU_CLOCK_REALTIME, 0);   /* let others run */
    }
    return ret;
}

static int coroutine_fn copy(TemplateCopy *c, uint64_t offset, uint64_t bytes,
                             Error **errp)
{
    int ret = blk_co_pread(c->template, offset, bytes, c->buf, 0);

    if (ret < 0) {
        error_setg_errno(errp, -ret, "Cannot read the template at offset %"
                         PRIu64, offset);
        return ret;
    }
    ret = add_to_hash(c, bytes, errp);
    if (ret == 0) {
        bdrv_graph_co_rdlock();
        ret = write_copy(c, offset, bytes, errp);
        bdrv_graph_co_rdunlock();
    }
    return ret;
}

static int coroutine_fn copy_all(TemplateCopy *c, Error **errp)
{
    BDRVThinvmState *s = c->bs->opaque;
    uint64_t offset, step;
    int64_t known;
    int ret = 0;

    for (offset = 0; offset < c->length && ret == 0; offset += step) {
        ret = blk_co_block_status_above(c->template, NULL, offset,
                                        c->length - offset, &known, NULL,
                                        NULL);
        if (ret < 0) {
            error_setg_errno(errp, -ret, "Cannot tell what the template has "
                             "at offset %" PRIu64, offset);
            return ret;
        }
        step = offset + known == c->length
               ? known : QEMU_ALIGN_DOWN(known, s->cluster_size);
        if ((ret & BDRV_BLOCK_ZERO) && step) {
            ret = skip(c, step, errp);
        } else {
            step = MIN(MAX(step, s->cluster_size), c->length - offset);
            step = MIN(step, COPY_STEP);
            ret = copy(c, offset, step, errp);
        }
    }
    return ret;
}

/* ------------------------------------------------------------------ */

/* The image's template is known from now on; NULL @digest: any will do */
static int coroutine_fn GRAPH_RDLOCK
complete(TemplateCopy *c, const ThinvmTemplateId *id, const uint8_t *digest,
         Error **errp)
{
    BDRVThinvmState *s = c->bs->opaque;
    g_autofree uint8_t *hash = NULL;
    size_t size = 0;
    ThinvmTemplateId known = *id;
    int ret;

    if (qcrypto_hash_finalize_bytes(c->hash, &hash, &size, errp) < 0) {
        return -EIO;
    }
    assert(size == sizeof(known.digest));
    memcpy(known.digest, hash, size);
    if (digest && memcmp(digest, known.digest, size)) {
        g_autofree char *is = thinvm_template_name(known.digest);
        g_autofree char *wanted = thinvm_template_name(digest);

        error_setg(errp, "The template's contents are %s, not %s", is, wanted);
        return -EINVAL;
    }
    ret = thinvm_store_set_template(s->store, &known);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Cannot complete the image");
    }
    return ret;
}

static int coroutine_fn copy_and_complete(TemplateCopy *c,
                                          const ThinvmTemplateId *id,
                                          const uint8_t *digest, Error **errp)
{
    int ret;

    bdrv_graph_co_rdlock();
    ret = thinvm_mode_begin_write(c->bs);
    bdrv_graph_co_rdunlock();
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Cannot write the image");
        return ret;
    }
    ret = copy_all(c, errp);
    if (ret == 0) {
        bdrv_graph_co_rdlock();
        ret = complete(c, id, digest, errp);
        bdrv_graph_co_rdunlock();
    }
    return ret;
}

int coroutine_fn thinvm_create_copy(BlockDriverState *file,
                                    BlockBackend *template,
                                    const ThinvmTemplateId *id,
                                    const uint8_t *digest, Error **errp)
{
    QDict *options = qdict_new();
    TemplateCopy c = {
        .file = file,
        .template = template,
        .length = id->length,
    };
    BlockBackend *blk;
    int ret = -ENOMEM;

    QLIST_INSERT_HEAD(&copies, &c, link);
    qdict_put_str(options, "driver", "thinvm");
    qdict_put_str(options, "file", bdrv_get_node_name(file));
    blk = blk_co_new_open(NULL, NULL, options,
                          BDRV_O_RDWR | BDRV_O_RESIZE | BDRV_O_NO_BACKING,
                          errp);
    if (!blk) {
        QLIST_REMOVE(&c, link);
        return -EIO;
    }
    c.bs = blk_bs(blk);
    c.hash = qcrypto_hash_new(QCRYPTO_HASH_ALGO_SHA256, errp);
    if (c.hash) {
        c.buf = blk_try_blockalign(blk, COPY_STEP);
        if (c.buf) {
            ret = copy_and_complete(&c, id, digest, errp);
            qemu_vfree(c.buf);
        } else {
            error_setg(errp, "No memory for the copy of the template");
        }
        qcrypto_hash_free(c.hash);
    }
    blk_co_unref(blk);
    QLIST_REMOVE(&c, link);
    return ret;
}
