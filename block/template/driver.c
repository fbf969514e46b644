/*
 * thinvm template store: the protocol driver, thinvm-template
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A template by its name, read wherever it is: reader.h.  Requests may come
 * from several threads.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qapi/util.h"
#include "qobject/qdict.h"
#include "qemu/cutils.h"
#include "qemu/module.h"
#include "qemu/option.h"
#include "driver.h"

#define FILENAME_PREFIX         "thinvm-template:"

/* What a boot reads mostly fits */
#define DEFAULT_CACHE           (64 * MiB)
#define MAX_CACHE               (16 * GiB)
#define DEFAULT_TIMEOUT_MS      5000
#define MIN_TIMEOUT_MS          100
#define MAX_TIMEOUT_MS          (600 * 1000)
#define DEFAULT_RETRY_S         60
#define MAX_RETRY_S             (24 * 3600)

TemplateNodeList template_nodes = QTAILQ_HEAD_INITIALIZER(template_nodes);

/* ------------------------------------------------------------------ */
/* Options                                                             */

static QemuOptsList template_runtime_opts = {
    .name = "thinvm-template",
    .head = QTAILQ_HEAD_INITIALIZER(template_runtime_opts.head),
    .desc = {
        { .name = "digest", .type = QEMU_OPT_STRING,
          .help = "the template's name: sha256: and 64 digits" },
        { .name = "hashes", .type = QEMU_OPT_STRING,
          .help = "the hash of its chunks' hashes" },
        { .name = "strict", .type = QEMU_OPT_BOOL,
          .help = "do not take hashes from other nodes without 'hashes'" },
        { .name = "cluster", .type = QEMU_OPT_STRING,
          .help = "path of the description of the cluster" },
        { .name = "node", .type = QEMU_OPT_STRING,
          .help = "this node's name in it" },
        { .name = "verify", .type = QEMU_OPT_STRING,
          .help = "when a local copy is verified: once or always" },
        { .name = "cache-size", .type = QEMU_OPT_SIZE,
          .help = "memory for chunks that were read" },
        { .name = "timeout", .type = QEMU_OPT_NUMBER,
          .help = "milliseconds that another node may be silent" },
        { .name = "retry", .type = QEMU_OPT_NUMBER,
          .help = "seconds that a request waits while there is no copy" },
        { .name = "bring-over", .type = QEMU_OPT_BOOL,
          .help = "bring the template to a disk of this node" },
        { .name = "bring-over-speed", .type = QEMU_OPT_SIZE,
          .help = "bytes in a second that this reads at most" },
        { /* end of list */ }
    },
};

static bool in_range(const char *name, uint64_t value, uint64_t min,
                     uint64_t max, Error **errp)
{
    if (value < min || value > max) {
        error_setg(errp, "Option '%s' is %" PRIu64 "; it must be from %"
                   PRIu64 " to %" PRIu64, name, value, min, max);
        return false;
    }
    return true;
}

static bool options_names(ReaderOptions *o, QemuOpts *opts, Error **errp)
{
    const char *digest = qemu_opt_get(opts, "digest");
    const char *hashes = qemu_opt_get(opts, "hashes");

    if (!digest) {
        error_setg(errp, "Option 'digest' is needed: the template's name");
        return false;
    }
    o->has_hashes = hashes;
    o->cluster = (char *)qemu_opt_get(opts, "cluster");
    o->node = (char *)qemu_opt_get(opts, "node");
    return template_digest_parse(digest, &o->digest, errp) &&
           (!hashes || template_digest_parse(hashes, &o->hashes, errp));
}

/* Strings in @o are those of @opts */
static bool options_parse(ReaderOptions *o, QemuOpts *opts, Error **errp)
{
    ERRP_GUARD();
    uint64_t timeout = qemu_opt_get_number(opts, "timeout",
                                           DEFAULT_TIMEOUT_MS);
    uint64_t retry = qemu_opt_get_number(opts, "retry", DEFAULT_RETRY_S);

    *o = (ReaderOptions) {
        .strict = qemu_opt_get_bool(opts, "strict", false),
        .verify = qapi_enum_parse(&ThinvmTemplateVerify_lookup,
                                  qemu_opt_get(opts, "verify"),
                                  THINVM_TEMPLATE_VERIFY_ONCE, errp),
        .cache_size = qemu_opt_get_size(opts, "cache-size", DEFAULT_CACHE),
        .bring_over = qemu_opt_get_bool(opts, "bring-over", false),
        .speed = qemu_opt_get_size(opts, "bring-over-speed", 0),
    };
    if (*errp || !options_names(o, opts, errp) ||
        !in_range("cache-size", o->cache_size, 0, MAX_CACHE, errp) ||
        !in_range("timeout", timeout, MIN_TIMEOUT_MS, MAX_TIMEOUT_MS, errp) ||
        !in_range("retry", retry, 0, MAX_RETRY_S, errp)) {
        return false;
    }
    o->timeout_ms = timeout;
    o->retry_s = retry;
    return true;
}

/* thinvm-template:sha256:0123... */
static void template_parse_filename(const char *filename, QDict *options,
                                    Error **errp)
{
    if (!strstart(filename, FILENAME_PREFIX, &filename)) {
        error_setg(errp, "'%s' does not begin with '" FILENAME_PREFIX "'",
                   filename);
        return;
    }
    if (qdict_haskey(options, "digest")) {
        error_setg(errp, "The file name and option 'digest' both say which "
                   "template it is; one of them must go");
        return;
    }
    qdict_put_str(options, "digest", filename);
}

/* ------------------------------------------------------------------ */
/* Open, close, reopen                                                 */

static int GRAPH_UNLOCKED template_open(BlockDriverState *bs, QDict *options,
                                        int flags, Error **errp)
{
    BDRVTemplateState *s = bs->opaque;
    ReaderOptions o;
    QemuOpts *opts;
    int ret;

    s->bs = bs;
    bdrv_graph_rdlock_main_loop();
    ret = bdrv_apply_auto_read_only(bs, "A template can only be read; open "
                                    "the node with read-only=on", errp);
    bdrv_graph_rdunlock_main_loop();
    if (ret < 0) {
        return ret;
    }
    opts = qemu_opts_create(&template_runtime_opts, NULL, 0, &error_abort);
    if (qemu_opts_absorb_qdict(opts, options, errp) &&
        options_parse(&o, opts, errp)) {
        s->reader = template_reader_new(bdrv_get_node_name(bs), &o, errp);
    }
    qemu_opts_del(opts);
    if (!s->reader) {
        return -EINVAL;
    }
    QTAILQ_INSERT_TAIL(&template_nodes, s, link);
    return 0;
}

static void template_close(BlockDriverState *bs)
{
    BDRVTemplateState *s = bs->opaque;

    QTAILQ_REMOVE(&template_nodes, s, link);
    template_reader_free(s->reader);
}

/* Nothing about it changes, and it stays read-only */
static int GRAPH_UNLOCKED template_reopen_prepare(BDRVReopenState *state,
                                                  BlockReopenQueue *queue,
                                                  Error **errp)
{
    if (state->flags & BDRV_O_RDWR) {
        error_setg(errp, "A template can only be read");
        return -EACCES;
    }
    return 0;
}

/* ------------------------------------------------------------------ */
/* Reading                                                             */

static int coroutine_fn GRAPH_RDLOCK
template_co_preadv_part(BlockDriverState *bs, int64_t offset, int64_t bytes,
                        QEMUIOVector *qiov, size_t qiov_offset,
                        BdrvRequestFlags flags)
{
    BDRVTemplateState *s = bs->opaque;

    return template_reader_co_read(s->reader, offset, bytes, qiov,
                                   qiov_offset);
}

static int64_t coroutine_fn GRAPH_RDLOCK
template_co_getlength(BlockDriverState *bs)
{
    BDRVTemplateState *s = bs->opaque;

    return s->reader->chunks->length;
}

static int coroutine_fn GRAPH_RDLOCK
template_co_block_status(BlockDriverState *bs, bool want_zero,
                         int64_t offset, int64_t bytes, int64_t *pnum,
                         int64_t *map, BlockDriverState **file)
{
    BDRVTemplateState *s = bs->opaque;
    uint64_t same;
    bool zero = template_reader_is_zero(s->reader, offset, bytes, &same);

    *pnum = same;
    return zero ? BDRV_BLOCK_ZERO : BDRV_BLOCK_DATA;
}

static void GRAPH_RDLOCK template_cancel_in_flight(BlockDriverState *bs)
{
    BDRVTemplateState *s = bs->opaque;

    template_reader_cancel(s->reader);
}

/* ------------------------------------------------------------------ */
/* Properties                                                          */

static void GRAPH_RDLOCK template_refresh_limits(BlockDriverState *bs,
                                                 Error **errp)
{
    bs->bl.request_alignment = 1;
}

/* The short form, where it says all that matters */
static void GRAPH_RDLOCK template_refresh_filename(BlockDriverState *bs)
{
    static const char *const others[] = {
        "hashes", "strict", "cluster", "node", "verify",
    };
    BDRVTemplateState *s = bs->opaque;
    char text[TEMPLATE_DIGEST_TEXT];

    for (size_t i = 0; i < ARRAY_SIZE(others); i++) {
        if (qdict_haskey(bs->full_open_options, others[i])) {
            return;
        }
    }
    template_digest_format(&s->reader->o.digest, text);
    snprintf(bs->exact_filename, sizeof(bs->exact_filename),
             FILENAME_PREFIX "%s", text);
}

static BlockStatsSpecific *template_get_specific_stats(BlockDriverState *bs)
{
    BDRVTemplateState *s = bs->opaque;
    BlockStatsSpecific *stats = g_new0(BlockStatsSpecific, 1);
    ThinvmTemplateStatistics *own = template_reader_statistics(s->reader);

    stats->driver = BLOCKDEV_DRIVER_THINVM_TEMPLATE;
    stats->u.thinvm_template = *own;
    g_free(own);
    return stats;
}

static const char *const template_strong_options[] = {
    "digest", "hashes", "strict", "cluster", "node", "verify", NULL
};

static BlockDriver bdrv_thinvm_template = {
    .format_name                = "thinvm-template",
    .protocol_name              = "thinvm-template",
    .instance_size              = sizeof(BDRVTemplateState),
    .strong_runtime_opts        = template_strong_options,

    .bdrv_parse_filename        = template_parse_filename,
    .bdrv_open                  = template_open,
    .bdrv_close                 = template_close,
    .bdrv_reopen_prepare        = template_reopen_prepare,
    .bdrv_refresh_limits        = template_refresh_limits,
    .bdrv_refresh_filename      = template_refresh_filename,
    .bdrv_co_getlength          = template_co_getlength,
    .bdrv_co_preadv_part        = template_co_preadv_part,
    .bdrv_co_block_status       = template_co_block_status,
    .bdrv_cancel_in_flight      = template_cancel_in_flight,
    .bdrv_get_specific_stats    = template_get_specific_stats,
};

static void bdrv_thinvm_template_init(void)
{
    bdrv_register(&bdrv_thinvm_template);
}

block_init(bdrv_thinvm_template_init);
