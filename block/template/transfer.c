/*
 * thinvm template store: contents in, verified, repaired
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See transfer.h.  Contents pass by once, some chunks at a time, and are hashed
 * as they do (T1).  Chunks of zeroes become holes.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qobject/qdict.h"
#include "block/block.h"
#include "qemu/cutils.h"
#include "qemu/option.h"
#include "qemu/qemu-progress.h"
#include "transfer.h"

/* How much of it may have to be read again after a crash */
#define NOTE_BYTES          (64 * MiB)

/* ------------------------------------------------------------------ */
/* Sources                                                             */

static QemuOptsList image_opts_list = {
    .name = "source",
    .implied_opt_name = "file.filename",
    .head = QTAILQ_HEAD_INITIALIZER(image_opts_list.head),
    .desc = { { /* all are accepted */ } },
};

BlockBackend *template_open_image(const char *image, const char *fmt,
                                  bool image_opts, Error **errp)
{
    QDict *options = qdict_new();

    if (image_opts) {
        QemuOpts *opts = qemu_opts_parse(&image_opts_list, image, true, errp);

        if (!opts) {
            qobject_unref(options);
            return NULL;
        }
        qemu_opts_to_qdict(opts, options);
        qemu_opts_del(opts);
        image = NULL;
    }
    if (fmt) {
        qdict_put_str(options, "driver", fmt);
    }
    return blk_new_open(image, NULL, options, 0, errp);
}

BlockBackend *template_open_copy(TemplateStore *s,
                                 const TemplateDigest *digest, Error **errp)
{
    g_autofree char *path = template_store_path(s, digest);
    QDict *options = qdict_new();

    qdict_put_str(options, "driver", "raw");
    qdict_put_str(options, "file.driver", "file");
    qdict_put_str(options, "file.filename", path);
    return blk_new_open(NULL, NULL, options, 0, errp);
}

/* It says itself that all of it is zeroes, so that it need not be read */
static bool known_zeroes(BlockBackend *blk, uint64_t offset, uint32_t bytes)
{
    int64_t n = 0;
    int ret;

    GRAPH_RDLOCK_GUARD_MAINLOOP();

    ret = bdrv_block_status_above(blk_bs(blk), NULL, offset, bytes, &n, NULL,
                                  NULL);
    return ret >= 0 && (ret & BDRV_BLOCK_ZERO) && n >= bytes;
}

static bool read_source(BlockBackend *blk, uint64_t offset, uint32_t bytes,
                       uint8_t *buf, Error **errp)
{
    int ret;

    if (known_zeroes(blk, offset, bytes)) {
        memset(buf, 0, bytes);
        return true;
    }
    ret = blk_pread(blk, offset, bytes, buf, 0);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Cannot read %" PRIu32 " bytes at %"
                         PRIu64 " of the source", bytes, offset);
        return false;
    }
    return true;
}

/* ------------------------------------------------------------------ */
/* Bringing in                                                         */

static uint32_t chunk_size_for(uint64_t length, uint32_t wanted)
{
    return template_chunk_size_fits(wanted, length)
           ? wanted : template_chunk_size_default(length);
}

typedef struct Transfer {
    BlockBackend *blk;
    TemplatePart *part;
    uint64_t length;
    uint32_t chunk_size, io_bytes;
    uint8_t *buf;
} Transfer;

static uint32_t chunk_after(const Transfer *t, uint32_t at, uint32_t bytes)
{
    return MIN(t->chunk_size, bytes - at);
}

/* But for chunks of zeroes; neighbours together */
static bool write_chunks(Transfer *t, uint64_t offset, uint32_t bytes,
                         Error **errp)
{
    uint32_t end;

    for (uint32_t at = 0; at < bytes; at = end) {
        uint32_t n = chunk_after(t, at, bytes);

        end = at + n;
        if (buffer_is_zero(t->buf + at, n)) {
            continue;
        }
        while (end < bytes && (n = chunk_after(t, end, bytes)) &&
               !buffer_is_zero(t->buf + end, n)) {
            end += n;
        }
        if (!template_part_write(t->part, t->buf + at, end - at, offset + at,
                                 errp)) {
            return false;
        }
    }
    return true;
}

static bool transfer_some(Transfer *t, TemplateHasher *hasher,
                          uint64_t offset, Error **errp)
{
    uint32_t bytes = MIN(t->io_bytes, t->length - offset);

    if (offset < t->part->done) {
        if (!template_part_read(t->part, t->buf, bytes, offset, errp)) {
            return false;
        }
    } else if (!read_source(t->blk, offset, bytes, t->buf, errp) ||
               !write_chunks(t, offset, bytes, errp)) {
        return false;
    }
    if (!template_hasher_add(hasher, t->buf, bytes, errp)) {
        return false;
    }
    offset += bytes;
    qemu_progress_print(100.0 * offset / t->length, 0);
    return offset % NOTE_BYTES || offset <= t->part->done ||
           template_part_note(t->part, offset, errp);
}

static TemplateChunks *transfer_all(Transfer *t, Error **errp)
{
    g_autoptr(TemplateHasher) hasher =
        template_hasher_new(t->length, t->chunk_size, errp);
    uint64_t done = QEMU_ALIGN_DOWN(MIN(t->part->done, t->length),
                                    t->io_bytes);

    if (!hasher || !template_part_cut(t->part, done, errp)) {
        return NULL;
    }
    for (uint64_t offset = 0; offset < t->length; offset += t->io_bytes) {
        if (!transfer_some(t, hasher, offset, errp)) {
            return NULL;
        }
    }
    return template_hasher_finish(hasher, errp);
}

static bool is_expected(const TemplateChunks *c,
                        const TemplateDigest *expected, Error **errp)
{
    char found[TEMPLATE_DIGEST_TEXT], wanted[TEMPLATE_DIGEST_TEXT];

    if (!expected || template_digest_equal(&c->digest, expected)) {
        return true;
    }
    template_digest_format(&c->digest, found);
    template_digest_format(expected, wanted);
    error_setg(errp, "The source is %s, and not %s", found, wanted);
    return false;
}

/* @keep: what there is may be gone on with */
static bool receive_part(Transfer *t, const TemplateDigest *expected,
                         bool replace, TemplateDigest *digest, bool *existed,
                         bool *keep, Error **errp)
{
    g_autoptr(TemplateChunks) c = NULL;
    bool resumed = t->part->done > 0;

    *keep = true;
    c = transfer_all(t, errp);
    if (c && resumed && !is_expected(c, expected, NULL)) {
        /* What an earlier run left was not what it seemed to be */
        g_clear_pointer(&c, template_chunks_free);
        if (template_part_restart(t->part, errp)) {
            c = transfer_all(t, errp);
        }
    }
    if (!c) {
        return false;
    }
    *keep = false;
    if (!is_expected(c, expected, errp)) {
        return false;
    }
    *digest = c->digest;
    return template_part_commit(t->part, c, replace, existed, errp);
}

bool template_receive(TemplateStore *s, BlockBackend *blk,
                      const TemplateDigest *expected, bool replace,
                      uint32_t chunk_size, TemplateDigest *digest,
                      bool *existed, Error **errp)
{
    ERRP_GUARD();
    g_autofree uint8_t *buf = NULL;
    Transfer t = { .blk = blk };
    int64_t length = blk_getlength(blk);
    bool ok, keep = false;

    if (length < 0) {
        error_setg_errno(errp, -length, "Cannot tell the length of the source");
        return false;
    }
    if (!template_length_check(length, "The source", errp)) {
        return false;
    }
    t.length = length;
    t.chunk_size = chunk_size_for(length, chunk_size);
    t.io_bytes = template_io_bytes(t.chunk_size);
    t.buf = buf = g_malloc(t.io_bytes);
    t.part = template_part_begin(s, expected, replace, NULL, errp);
    if (!t.part) {
        *existed = true;
        *digest = expected ? *expected : (TemplateDigest) { };
        return !*errp;
    }
    ok = receive_part(&t, expected, replace, digest, existed, &keep, errp);
    template_part_end(t.part, keep && !ok);
    return ok;
}

/* ------------------------------------------------------------------ */
/* Verifying                                                           */

void template_findings_clear(TemplateFindings *f)
{
    g_free(f->chunks_problem);
    g_free(f->data_problem);
    if (f->bad) {
        g_array_unref(f->bad);
    }
    template_chunks_free(f->chunks);
    template_chunks_free(f->computed);
    memset(f, 0, sizeof(*f));
}

bool template_findings_ok(const TemplateFindings *f)
{
    return !f->chunks_problem && !f->data_problem && !f->bad->len &&
           !f->whole_bad;
}

static char *take_message(Error *err)
{
    char *text = g_strdup(error_get_pretty(err));

    error_free(err);
    return text;
}

/* The part of @st's file that is to be there, 0 bytes if it is too short */
static void check_size(TemplateFindings *f, const struct stat *st)
{
    if (f->chunks && st->st_size != f->chunks->length) {
        f->data_problem = g_strdup_printf("it has %" PRId64 " bytes instead "
                                          "of %" PRIu64, (int64_t)st->st_size,
                                          f->chunks->length);
    }
}

/*
 * Chunk @n of @fd, which is in @buf, or else gets there; what cannot be read is
 * as bad as what is wrong.
 */
static bool verify_chunk(int fd, const TemplateChunks *c, uint64_t n,
                         uint8_t *buf, bool is_there, TemplateFindings *f,
                         Error **errp)
{
    uint32_t bytes = template_chunk_bytes(c, n);
    TemplateDigest hash;

    f->chunks_read++;
    if (!is_there && !template_pread(fd, buf, bytes, n * c->chunk_size)) {
        memset(buf, 0, bytes);
        g_array_append_val(f->bad, n);
        return true;
    }
    if (!template_sha256(buf, bytes, &hash, errp)) {
        return false;
    }
    if (f->chunks && !template_digest_equal(&hash, &c->hashes[n])) {
        g_array_append_val(f->bad, n);
    }
    return true;
}

/* Read at once, and each by itself if that fails; @n becomes the next one */
static bool verify_some(int fd, const TemplateChunks *c, uint64_t *n,
                        uint64_t end, uint8_t *buf, TemplateHasher *hasher,
                        TemplateFindings *f, Error **errp)
{
    uint64_t offset = *n * c->chunk_size;
    uint32_t bytes = MIN(MIN(end * c->chunk_size, c->length) - offset,
                         template_io_bytes(c->chunk_size));
    bool is_there = template_pread(fd, buf, bytes, offset);

    for (uint32_t at = 0; at < bytes; at += c->chunk_size) {
        if (!verify_chunk(fd, c, (*n)++, buf + at, is_there, f, errp)) {
            return false;
        }
    }
    return !hasher || template_hasher_add(hasher, buf, bytes, errp);
}

/* All of it: the hash of the whole, too */
static bool verify_range(int fd, const TemplateChunks *c, uint64_t first,
                         uint64_t end, TemplateFindings *f, Error **errp)
{
    g_autofree uint8_t *buf = g_malloc(template_io_bytes(c->chunk_size));
    bool all = first == 0 && end == c->nb_chunks;
    g_autoptr(TemplateHasher) hasher =
        all ? template_hasher_new(c->length, c->chunk_size, errp) : NULL;

    if (all && !hasher) {
        return false;
    }
    for (uint64_t n = first; n < end; ) {
        if (!verify_some(fd, c, &n, end, buf, hasher, f, errp)) {
            return false;
        }
        qemu_progress_print(100.0 * (n - first) / (end - first), 0);
    }
    if (all) {
        f->computed = template_hasher_finish(hasher, errp);
        return f->computed;
    }
    return true;
}

static bool verify_data(int fd, const TemplateDigest *digest, uint64_t offset,
                        uint64_t bytes, uint32_t chunk_size,
                        TemplateFindings *f, Error **errp)
{
    TemplateChunks guess = { };
    const TemplateChunks *c = f->chunks;
    uint64_t end;
    struct stat st;

    if (fstat(fd, &st) < 0) {
        error_setg_errno(errp, errno, "Cannot tell the size of a template");
        return false;
    }
    check_size(f, &st);
    if (!c) {
        if (!template_length_check(st.st_size, "it", NULL)) {
            f->data_problem = g_strdup("its size is no template's");
            return true;
        }
        guess.length = st.st_size;
        guess.chunk_size = chunk_size_for(guess.length, chunk_size);
        guess.nb_chunks = DIV_ROUND_UP(guess.length, guess.chunk_size);
        c = &guess;
    }
    f->chunk_size = c->chunk_size;
    if (offset >= c->length) {
        error_setg(errp, "The range begins at %" PRIu64 ", and the template "
                   "has %" PRIu64 " bytes", offset, c->length);
        return false;
    }
    end = offset + MIN(bytes, c->length - offset);
    /* From the disk, not from memory; it is all on the disk */
    posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    if (!verify_range(fd, c, offset / c->chunk_size,
                      DIV_ROUND_UP(end, c->chunk_size), f, errp)) {
        return false;
    }
    f->whole_bad = f->computed &&
                   !template_digest_equal(&f->computed->digest, digest);
    return true;
}

bool template_verify(TemplateStore *s, const TemplateDigest *digest,
                     uint64_t offset, uint64_t bytes, uint32_t chunk_size,
                     TemplateFindings *f, Error **errp)
{
    Error *err = NULL;
    bool ok;
    int fd;

    memset(f, 0, sizeof(*f));
    f->bad = g_array_new(false, false, sizeof(uint64_t));
    f->chunks = template_store_read_chunks(s, digest, &err);
    if (!f->chunks) {
        f->chunks_problem = take_message(err);
        err = NULL;
    }
    fd = template_store_open_data(s, digest, false, &err);
    if (fd < 0) {
        f->data_problem = take_message(err);
        return true;
    }
    ok = verify_data(fd, digest, offset, bytes, chunk_size, f, errp);
    close(fd);
    return ok;
}

/* ------------------------------------------------------------------ */
/* Mending                                                             */

/* @right: the source has this chunk as it must be, and it is written */
static bool mend_chunk(int fd, BlockBackend *blk, const TemplateChunks *c,
                       uint64_t n, uint8_t *buf, bool *right, Error **errp)
{
    uint32_t bytes = template_chunk_bytes(c, n);
    TemplateDigest hash;

    *right = false;
    if (blk_pread(blk, n * c->chunk_size, bytes, buf, 0) < 0) {
        return true;
    }
    if (!template_sha256(buf, bytes, &hash, errp)) {
        return false;
    }
    if (!template_digest_equal(&hash, &c->hashes[n])) {
        return true;
    }
    if (!template_pwrite(fd, buf, bytes, n * c->chunk_size)) {
        error_setg_errno(errp, errno, "Cannot write a chunk");
        return false;
    }
    *right = true;
    return true;
}

static bool mend_chunks(int fd, BlockBackend *blk, TemplateFindings *f,
                        Error **errp)
{
    g_autofree uint8_t *buf = g_malloc(f->chunks->chunk_size);

    for (unsigned i = 0; i < f->bad->len; ) {
        uint64_t n = g_array_index(f->bad, uint64_t, i);
        bool right;

        if (!mend_chunk(fd, blk, f->chunks, n, buf, &right, errp)) {
            return false;
        }
        if (right) {
            g_array_remove_index(f->bad, i);
        } else {
            i++;
        }
    }
    if (fsync(fd) < 0) {
        error_setg_errno(errp, errno, "Cannot flush a template");
        return false;
    }
    return true;
}

bool template_mend(TemplateStore *s, BlockBackend *blk, TemplateFindings *f,
                   Error **errp)
{
    int fd = template_store_open_data(s, &f->chunks->digest, true, errp);
    bool ok;

    if (fd < 0) {
        return false;
    }
    ok = ftruncate(fd, f->chunks->length) == 0;
    if (!ok) {
        error_setg_errno(errp, errno, "Cannot resize a template");
    } else {
        ok = mend_chunks(fd, blk, f, errp);
    }
    close(fd);
    return ok;
}
