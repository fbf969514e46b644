/*
 * thinvm driver layer: creating images
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Works on any node that can be written, of fixed size or not.  Before the
 * first byte is overwritten the claims of an image that is there already are
 * looked at: one that somebody else owns is not destroyed (invariant 6).
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qapi/qapi-visit-block-core.h"
#include "qapi/qobject-input-visitor.h"
#include "qemu/cutils.h"
#include "qemu/option.h"
#include "qobject/qdict.h"
#include "block/qdict.h"
#include "system/block-backend.h"
#include "driver-snapshot.h"
#include "handover.h"

#define THINVM_OPT_JOURNAL_SIZE "journal_size"
#define THINVM_OPT_TEMPLATE_FILE "template_file"
#define THINVM_OPT_TEMPLATE_FMT "template_fmt"
#define THINVM_OPT_TEMPLATE_DIGEST "template_digest"

QemuOptsList thinvm_create_opts = {
    .name = "thinvm-create-opts",
    .head = QTAILQ_HEAD_INITIALIZER(thinvm_create_opts.head),
    .desc = {
        {
            .name = BLOCK_OPT_SIZE,
            .type = QEMU_OPT_SIZE,
            .help = "Size of the virtual disk",
        }, {
            .name = BLOCK_OPT_BACKING_FILE,
            .type = QEMU_OPT_STRING,
            .help = "Image that unallocated parts of the disk read from",
        }, {
            .name = BLOCK_OPT_BACKING_FMT,
            .type = QEMU_OPT_STRING,
            .help = "Format of the backing file",
        }, {
            .name = BLOCK_OPT_CLUSTER_SIZE,
            .type = QEMU_OPT_SIZE,
            .help = "Bytes allocated at a time, a power of two from 16K to 2M "
                    "(default: 64K)",
        }, {
            .name = THINVM_OPT_JOURNAL_SIZE,
            .type = QEMU_OPT_SIZE,
            .help = "Size of the metadata journal (default: 16M)",
        }, {
            .name = BLOCK_OPT_PREALLOC,
            .type = QEMU_OPT_STRING,
            .help = "Space taken in advance (allowed values: off, metadata, "
                    "falloc, full)",
        }, {
            .name = THINVM_OPT_TEMPLATE_FILE,
            .type = QEMU_OPT_STRING,
            .help = "Image whose contents are copied: a full clone, which "
                    "remembers what it still has in common with it",
        }, {
            .name = THINVM_OPT_TEMPLATE_FMT,
            .type = QEMU_OPT_STRING,
            .help = "Format of the template",
        }, {
            .name = THINVM_OPT_TEMPLATE_DIGEST,
            .type = QEMU_OPT_STRING,
            .help = "What the template's contents must be, sha256:...",
        },
        { /* end of list */ }
    },
};

/* ------------------------------------------------------------------ */
/* The image that was there before                                     */

/*
 * Who uses what is there, as far as it is an image of ours?  Blank devices and
 * other formats are nobody's.  What cannot be read, or is a later version's,
 * may be somebody's.  Of an image whose superblocks are both damaged, whoever
 * has had it open writes good ones with the next checkpoint: there, the claims
 * decide as always.
 */
static int coroutine_fn thinvm_create_look(ThinvmDevice *dev,
                                           ThinvmOwnerView *view,
                                           Error **errp)
{
    Error *local_err = NULL;
    ThinvmSuperblock sb;
    int ret;

    *view = (ThinvmOwnerView) { .kind = THINVM_OWNER_NONE };
    /* In this host's page cache may be what was there before the image */
    ret = thinvm_device_refresh(dev, errp);
    if (ret < 0) {
        return ret;
    }
    ret = thinvm_store_probe(dev, &sb, NULL, NULL, &local_err);
    if (ret < 0 && ret != -EINVAL && ret != -EBADMSG) {
        error_propagate(errp, local_err);
        return ret;
    }
    error_free(local_err);
    if (ret == -EINVAL) {
        return 0;
    }
    if (ret == -EBADMSG) {
        ret = thinvm_owner_image(dev, &sb.uuid, errp);
    }
    if (ret == 0) {
        ret = thinvm_owner_look(dev, &sb.uuid, NULL, view, errp);
    }
    if (ret == 0) {
        thinvm_owner_settle(dev, &sb.uuid, view);
    }
    return ret;
}

/* Who knows better must say so, in a way that nobody takes by accident */
static void thinvm_create_refuse(BlockBackend *blk, const ThinvmOwnerView *view,
                                 Error **errp)
{
    ERRP_GUARD();
    const char *name = blk_bs(blk)->filename;

    error_prepend(errp, "Refusing to overwrite '%s', where a thinvm image is "
                  "or may be: ", name);
    /* A process of this host that is there needs no guessing */
    if (!view->this_host && view->kind != THINVM_OWNER_NODE) {
        error_append_hint(errp, "If it is certain that no host uses it and "
                          "nothing of it is needed, erase the header first: "
                          "qemu-io -f raw -c 'write -z 0 1M' '%s'\n", name);
    }
}

static int coroutine_fn thinvm_create_check_owner(BlockBackend *blk,
                                                  Error **errp)
{
    ThinvmBlkDevice d;
    ThinvmOwnerView view;
    int ret;

    thinvm_device_init_blk(&d, blk);
    ret = thinvm_create_look(&d.device, &view, errp);
    if (ret == 0 && !thinvm_owner_may_take(&view, false, errp)) {
        ret = -EBUSY;
    }
    if (ret < 0) {
        thinvm_create_refuse(blk, &view, errp);
        return ret;
    }
    if (view.newest_epoch) {
        bdrv_graph_co_rdlock();
        ret = thinvm_fence_clear(blk_bs(blk), &view.newest, errp);
        bdrv_graph_co_rdunlock();
    }
    return ret;
}

/*
 * The same before the protocol's own creation, which may truncate or clear
 * what is there.  *device: it names a thing that exists of itself, a LUN or an
 * export; the protocol then creates nothing, but would clear the first sector
 * before anybody knows whether the image fits, and whose it is.  A file that
 * cannot be opened is not there.
 */
static int coroutine_fn thinvm_create_check_file(const char *filename,
                                                 bool *device, Error **errp)
{
    BlockDriverState *bs;
    BlockBackend *blk;
    BlockDriver *drv;
    int ret = -EPERM;

    *device = false;
    bs = bdrv_co_open(filename, NULL, NULL, BDRV_O_PROTOCOL, NULL);
    if (!bs) {
        drv = bdrv_find_protocol(filename, true, NULL);
        *device = drv && drv->bdrv_co_create_opts == bdrv_co_create_opts_simple;
        return 0;
    }
    *device = bs->drv->bdrv_co_create_opts == bdrv_co_create_opts_simple;
    blk = blk_co_new_with_bs(bs, BLK_PERM_CONSISTENT_READ, BLK_PERM_ALL, errp);
    if (blk) {
        ret = thinvm_create_check_owner(blk, errp);
        blk_co_unref(blk);
    }
    bdrv_co_unref(bs);
    return ret;
}

/* ------------------------------------------------------------------ */

static bool thinvm_create_params(const BlockdevCreateOptionsThinvm *opts,
                                 ThinvmCreateParams *params, Error **errp)
{
    const char *name = opts->backing_file ?: "";
    const char *format = opts->has_backing_fmt
                         ? BlockdevDriver_str(opts->backing_fmt) : "";

    *params = (ThinvmCreateParams) {
        .virtual_size = opts->size,
        .cluster_size = opts->has_cluster_size
                        ? opts->cluster_size : THINVM_DEFAULT_CLUSTER_SIZE,
        .journal_size = opts->has_journal_size
                        ? opts->journal_size : THINVM_DEFAULT_JOURNAL_SIZE,
    };
    if (*format && !*name) {
        error_setg(errp, "Backing format '%s' was given without a backing "
                   "file", format);
        return false;
    }
    if (strlen(name) >= sizeof(params->backing.name)) {
        error_setg(errp, "The backing file's name has %zu bytes; at most %d "
                   "are possible", strlen(name), THINVM_MAX_BACKING_NAME);
        return false;
    }
    if (opts->template_digest && !opts->q_template) {
        error_setg(errp, "The digest of a template was given without a "
                   "template");
        return false;
    }
    if (opts->q_template && *name) {
        error_setg(errp, "A disk with a template is a full clone; it cannot "
                   "have backing file '%s' too", name);
        return false;
    }
    pstrcpy(params->backing.name, sizeof(params->backing.name), name);
    pstrcpy(params->backing.format, sizeof(params->backing.format), format);
    if (*name && opts->has_preallocation &&
        opts->preallocation != PREALLOC_MODE_OFF) {
        error_setg(errp, "Preallocation '%s' would hide the backing file; "
                   "use preallocation=off with a backing file",
                   PreallocMode_str(opts->preallocation));
        return false;
    }
    return thinvm_create_params_check(params, errp);
}

static int coroutine_fn thinvm_create_preallocate(BlockDriverState *file,
                                                  uint64_t size,
                                                  PreallocMode prealloc,
                                                  Error **errp)
{
    QDict *options = qdict_new();
    BlockBackend *blk;
    int ret;

    qdict_put_str(options, "driver", "thinvm");
    qdict_put_str(options, "file", bdrv_get_node_name(file));
    blk = blk_co_new_open(NULL, NULL, options,
                          BDRV_O_RDWR | BDRV_O_RESIZE | BDRV_O_NO_BACKING,
                          errp);
    if (!blk) {
        return -EIO;
    }
    bdrv_graph_co_rdlock();
    ret = thinvm_mode_begin_write(blk_bs(blk));
    if (ret >= 0) {
        ret = thinvm_io_preallocate(blk_bs(blk), 0, size, prealloc, errp);
    }
    bdrv_graph_co_rdunlock();
    blk_co_unref(blk);
    return ret;
}

/* The template that was given, and what is known of it; NULL: an error */
static BlockBackend * coroutine_fn
thinvm_create_template(const BlockdevCreateOptionsThinvm *opts,
                       ThinvmTemplateId *id, uint8_t *digest, Error **errp)
{
    BlockDriverState *bs;
    BlockBackend *blk;
    int ret;

    if (opts->template_digest &&
        !thinvm_template_parse(opts->template_digest, digest, errp)) {
        return NULL;
    }
    bs = bdrv_co_open_blockdev_ref(opts->q_template, errp);
    if (!bs) {
        return NULL;
    }
    /* Nobody may change it meanwhile */
    blk = blk_co_new_with_bs(bs, BLK_PERM_CONSISTENT_READ,
                             BLK_PERM_CONSISTENT_READ |
                             BLK_PERM_WRITE_UNCHANGED, errp);
    bdrv_co_unref(bs);
    if (!blk) {
        return NULL;
    }
    bdrv_graph_co_rdlock();
    ret = thinvm_template_identify((BdrvChild *)blk_root(blk), id, errp);
    bdrv_graph_co_rdunlock();
    if (ret >= 0 && (!id->length || id->length > opts->size)) {
        error_setg(errp, "The template has %" PRIu64 " bytes; it must have "
                   "some, and a disk of %" PRIu64 " bytes must hold them",
                   id->length, opts->size);
        ret = -EINVAL;
    }
    if (ret < 0) {
        blk_co_unref(blk);
        return NULL;
    }
    if (!opts->template_digest) {
        memcpy(digest, id->digest, sizeof(id->digest));
    }
    /* It is known when all of it was read; until then the copy is not whole */
    memset(id->digest, 0, sizeof(id->digest));
    return blk;
}

/* A copy that failed is no image */
static void coroutine_fn thinvm_create_undo(BlockDriverState *bs)
{
    BlockBackend *blk = blk_co_new_with_bs(bs, BLK_PERM_CONSISTENT_READ |
                                           BLK_PERM_WRITE, BLK_PERM_ALL,
                                           NULL);
    ThinvmBlkDevice d;

    if (blk) {
        thinvm_device_init_blk(&d, blk);
        thinvm_store_erase(&d.device, NULL);
        blk_co_unref(blk);
    }
}

static int coroutine_fn thinvm_create_fill(BlockdevCreateOptionsThinvm *opts,
                                           BlockDriverState *bs,
                                           BlockBackend *template,
                                           const ThinvmTemplateId *id,
                                           const uint8_t *digest, Error **errp)
{
    PreallocMode prealloc = opts->has_preallocation ? opts->preallocation
                                                    : PREALLOC_MODE_OFF;
    int ret = 0;

    if (template) {
        ret = thinvm_create_copy(bs, template, id,
                                 thinvm_template_hash_known(digest) ? digest
                                                                    : NULL,
                                 errp);
        if (ret < 0) {
            thinvm_create_undo(bs);
        }
    }
    if (ret >= 0 && prealloc != PREALLOC_MODE_OFF && opts->size) {
        ret = thinvm_create_preallocate(bs, opts->size, prealloc, errp);
    }
    return ret;
}

int coroutine_fn thinvm_co_create(BlockdevCreateOptions *options, Error **errp)
{
    BlockdevCreateOptionsThinvm *opts = &options->u.thinvm;
    uint8_t digest[THINVM_TEMPLATE_HASH_SIZE] = { };
    BlockBackend *blk, *template = NULL;
    ThinvmCreateParams params;
    ThinvmBlkDevice d;
    BlockDriverState *bs;
    int ret;

    assert(options->driver == BLOCKDEV_DRIVER_THINVM);
    if (!thinvm_create_params(opts, &params, errp)) {
        return -EINVAL;
    }
    if (opts->q_template) {
        template = thinvm_create_template(opts, &params.template, digest,
                                          errp);
        if (!template) {
            return -EINVAL;
        }
    }
    bs = bdrv_co_open_blockdev_ref(opts->file, errp);
    if (!bs) {
        ret = -EIO;
        goto out;
    }
    blk = blk_co_new_with_bs(bs, BLK_PERM_CONSISTENT_READ | BLK_PERM_WRITE |
                             BLK_PERM_RESIZE, BLK_PERM_ALL, errp);
    if (!blk) {
        bdrv_co_unref(bs);
        ret = -EPERM;
        goto out;
    }
    blk_set_allow_write_beyond_eof(blk, true);

    ret = thinvm_create_check_owner(blk, errp);
    if (ret >= 0) {
        ret = thinvm_clone_begin(params.backing.name, errp);
    }
    if (ret >= 0) {
        thinvm_device_init_blk(&d, blk);
        ret = thinvm_store_create(&d.device, &params, errp);
    }
    blk_co_unref(blk);
    if (ret >= 0) {
        ret = thinvm_create_fill(opts, bs, template, &params.template, digest,
                                 errp);
    }
    bdrv_co_unref(bs);
out:
    if (template) {
        blk_co_unref(template);
    }
    return ret < 0 ? ret : 0;
}

/*
 * Options as qemu-img knows them, to the type that QMP uses.  The node is
 * filled in later: first everything else must prove right.
 */
static BlockdevCreateOptions *thinvm_create_options(QDict *qdict, Error **errp)
{
    static const QDictRenames renames[] = {
        { BLOCK_OPT_BACKING_FILE,   "backing-file" },
        { BLOCK_OPT_BACKING_FMT,    "backing-fmt" },
        { BLOCK_OPT_CLUSTER_SIZE,   "cluster-size" },
        { THINVM_OPT_JOURNAL_SIZE,  "journal-size" },
        { THINVM_OPT_TEMPLATE_DIGEST, "template-digest" },
        { NULL, NULL },
    };
    BlockdevCreateOptions *options = NULL;
    ThinvmCreateParams params;
    Visitor *v;

    if (!qdict_rename_keys(qdict, renames, errp)) {
        return NULL;
    }
    qdict_put_str(qdict, "driver", "thinvm");
    qdict_put_str(qdict, "file", "");
    v = qobject_input_visitor_new_flat_confused(qdict, errp);
    if (!v) {
        return NULL;
    }
    visit_type_BlockdevCreateOptions(v, NULL, &options, errp);
    visit_free(v);
    if (!options) {
        return NULL;
    }
    /* Tools take any size and mean at least that */
    options->u.thinvm.size = ROUND_UP(options->u.thinvm.size,
                                      BDRV_SECTOR_SIZE);
    if (!thinvm_create_params(&options->u.thinvm, &params, errp)) {
        qapi_free_BlockdevCreateOptions(options);
        return NULL;
    }
    return options;
}

static int coroutine_fn thinvm_create_on(const char *filename,
                                         BlockdevCreateOptions *options,
                                         Error **errp)
{
    BlockdevRef *file = options->u.thinvm.file;
    BlockDriverState *bs;
    int ret;

    bs = bdrv_co_open(filename, NULL, NULL,
                      BDRV_O_RDWR | BDRV_O_RESIZE | BDRV_O_PROTOCOL, errp);
    if (!bs) {
        return -EIO;
    }
    assert(file->type == QTYPE_QSTRING);
    g_free(file->u.reference);
    file->u.reference = g_strdup(bdrv_get_node_name(bs));
    ret = thinvm_co_create(options, errp);
    if (ret < 0) {
        bdrv_graph_co_rdlock();
        bdrv_co_delete_file_noerr(bs);
        bdrv_graph_co_rdunlock();
    }
    bdrv_co_unref(bs);
    return ret;
}

/* Are these names, of which only files have more than one, of one thing? */
static bool thinvm_same_thing(const char *a, const char *b)
{
    struct stat sa, sb;

    if (!strcmp(a, b)) {
        return true;
    }
    strstart(a, "file:", &a);
    strstart(b, "file:", &b);
    if (stat(a, &sa) < 0 || stat(b, &sb) < 0) {
        return false;
    }
    if (S_ISBLK(sa.st_mode) && S_ISBLK(sb.st_mode)) {
        return sa.st_rdev == sb.st_rdev;
    }
    return sa.st_dev == sb.st_dev && sa.st_ino == sb.st_ino;
}

/*
 * What the new image is to read from must outlive its creation.  Later, when
 * both are open, is too late: the protocol has truncated the file by then.
 */
static bool thinvm_create_spares_sources(const char *filename, QDict *qdict,
                                         Error **errp)
{
    const char *template = qdict_get_try_str(qdict, THINVM_OPT_TEMPLATE_FILE);
    const char *backing = qdict_get_try_str(qdict, BLOCK_OPT_BACKING_FILE);
    g_autofree char *full = NULL;

    if (template && thinvm_same_thing(filename, template)) {
        error_setg(errp, "The template, '%s', is what would be overwritten; "
                   "create the image elsewhere", template);
        return false;
    }
    if (backing && *backing) {
        full = bdrv_get_full_backing_filename_from_filename(filename, backing,
                                                            NULL);
    }
    if (full && thinvm_same_thing(filename, full)) {
        error_setg(errp, "The backing file, '%s', is what would be "
                   "overwritten; create the image elsewhere", backing);
        return false;
    }
    return true;
}

/* A template's name in @qdict becomes that of a node; NULL: there is none */
static bool coroutine_fn thinvm_create_open_template(QDict *qdict,
                                                     BlockDriverState **bs,
                                                     Error **errp)
{
    const char *file = qdict_get_try_str(qdict, THINVM_OPT_TEMPLATE_FILE);
    const char *format = qdict_get_try_str(qdict, THINVM_OPT_TEMPLATE_FMT);
    QDict *options = NULL;

    *bs = NULL;
    if (!file) {
        if (format) {
            error_setg(errp, "Format '%s' of a template was given without a "
                       "template", format);
        }
        return !format;
    }
    if (format) {
        options = qdict_new();
        qdict_put_str(options, "driver", format);
    }
    *bs = bdrv_co_open(file, NULL, options, 0, errp);
    if (!*bs) {
        return false;
    }
    qdict_del(qdict, THINVM_OPT_TEMPLATE_FILE);
    qdict_del(qdict, THINVM_OPT_TEMPLATE_FMT);
    qdict_put_str(qdict, "template", bdrv_get_node_name(*bs));
    return true;
}

int coroutine_fn thinvm_co_create_opts(BlockDriver *drv, const char *filename,
                                       QemuOpts *opts, Error **errp)
{
    /* What is left in opts is for the protocol */
    g_autoptr(QDict) qdict =
        qemu_opts_to_qdict_filtered(opts, NULL, &thinvm_create_opts, true);
    BlockDriverState *template = NULL;
    BlockdevCreateOptions *options = NULL;
    bool device;
    int ret;

    if (!thinvm_create_spares_sources(filename, qdict, errp)) {
        return -EINVAL;
    }
    if (thinvm_create_open_template(qdict, &template, errp)) {
        options = thinvm_create_options(qdict, errp);
    }
    if (!options) {
        bdrv_co_unref(template);
        return -EINVAL;
    }
    ret = thinvm_create_check_file(filename, &device, errp);
    if (ret >= 0 && !device) {
        ret = bdrv_co_create_file(filename, opts, errp);
    }
    if (ret >= 0) {
        ret = thinvm_create_on(filename, options, errp);
    }
    bdrv_co_unref(template);
    qapi_free_BlockdevCreateOptions(options);
    return ret;
}

/* ------------------------------------------------------------------ */
/* measure                                                             */

/* Clusters of @in_bs that a conversion would write */
static int64_t thinvm_measure_clusters(BlockDriverState *in_bs,
                                       uint64_t cluster_size, int64_t size,
                                       Error **errp)
{
    int64_t offset, pnum, clusters = 0;
    int64_t counted = 0;            /* first cluster not counted yet */
    int ret;

    for (offset = 0; offset < size; offset += pnum) {
        ret = bdrv_block_status_above(in_bs, NULL, offset, size - offset,
                                      &pnum, NULL, NULL);
        if (ret < 0) {
            error_setg_errno(errp, -ret, "Cannot get the allocation status at "
                             "offset %" PRId64, offset);
            return ret;
        }
        if ((ret & BDRV_BLOCK_DATA) && !(ret & BDRV_BLOCK_ZERO)) {
            int64_t first = MAX(offset / cluster_size, counted);
            int64_t end = DIV_ROUND_UP(offset + pnum, cluster_size);

            clusters += MAX(end - first, 0);
            counted = MAX(end, counted);
        }
    }
    return clusters;
}

/*
 * Metadata for @clusters of data in the worst case: every page of the mapping
 * and count trees, twice, since a checkpoint writes new ones before the old
 * are free; the reserve of three times the bound on dirty pages, and two
 * bounds that are taken ahead of need (space.c).
 */
static uint64_t thinvm_measure_metadata(uint64_t clusters,
                                        uint64_t cluster_size)
{
    uint64_t leaves = DIV_ROUND_UP(clusters, THINVM_ENTRIES_PER_LEAF);
    uint64_t bound = thinvm_space_dirty_bound(clusters);
    uint64_t pages = 0, level;

    for (level = leaves; level > 1;
         level = DIV_ROUND_UP(level, THINVM_POINTERS_PER_PAGE)) {
        pages += level;
    }
    level = DIV_ROUND_UP(clusters, THINVM_COUNTS_PER_LEAF);
    for (; level > 1; level = DIV_ROUND_UP(level, THINVM_POINTERS_PER_PAGE)) {
        pages += level;
    }
    return ROUND_UP((2 * pages + 5 * bound) * THINVM_PAGE_SIZE, cluster_size);
}

static bool thinvm_measure_options(QemuOpts *opts, ThinvmSuperblock *sb,
                                   uint64_t *size, PreallocMode *prealloc,
                                   bool *backing, Error **errp)
{
    g_autofree char *mode = qemu_opt_get_del(opts, BLOCK_OPT_PREALLOC);
    g_autofree char *file = qemu_opt_get_del(opts, BLOCK_OPT_BACKING_FILE);
    ThinvmCreateParams params = {
        .virtual_size = qemu_opt_get_size_del(opts, BLOCK_OPT_SIZE, 0),
        .cluster_size = qemu_opt_get_size_del(opts, BLOCK_OPT_CLUSTER_SIZE,
                                              THINVM_DEFAULT_CLUSTER_SIZE),
        .journal_size = qemu_opt_get_size_del(opts, THINVM_OPT_JOURNAL_SIZE,
                                              THINVM_DEFAULT_JOURNAL_SIZE),
    };
    int m = qapi_enum_parse(&PreallocMode_lookup, mode, PREALLOC_MODE_OFF,
                            NULL);

    if (mode && qapi_enum_parse(&PreallocMode_lookup, mode, -1, NULL) < 0) {
        error_setg(errp, "Option '" BLOCK_OPT_PREALLOC "' is '%s'; it must be "
                   "off, metadata, falloc or full", mode);
        return false;
    }
    params.virtual_size = ROUND_UP(params.virtual_size, BDRV_SECTOR_SIZE);
    if (!thinvm_create_params_check(&params, errp)) {
        return false;
    }
    *sb = (ThinvmSuperblock) {
        .cluster_bits = ctz64(params.cluster_size),
        .journal_offset = THINVM_JOURNAL_OFFSET,
        .journal_size = params.journal_size,
        .virtual_size = params.virtual_size,
    };
    *size = params.virtual_size;
    *prealloc = m;
    *backing = file && *file;
    return true;
}

BlockMeasureInfo *thinvm_measure(QemuOpts *opts, BlockDriverState *in_bs,
                                 Error **errp)
{
    ThinvmSuperblock sb;
    BlockMeasureInfo *info;
    PreallocMode prealloc;
    uint64_t cluster_size, clusters, fixed;
    int64_t needed = 0;
    uint64_t size;
    bool backing;

    if (!thinvm_measure_options(opts, &sb, &size, &prealloc, &backing,
                                errp)) {
        return NULL;
    }
    cluster_size = 1ULL << sb.cluster_bits;
    if (in_bs) {
        int64_t in_size = bdrv_getlength(in_bs);

        if (in_size < 0) {
            error_setg_errno(errp, -in_size, "Cannot get the size of the "
                             "source");
            return NULL;
        }
        size = sb.virtual_size = in_size;
    }
    clusters = DIV_ROUND_UP(size, cluster_size);
    if (clusters > THINVM_MAX_GUEST_CLUSTERS ||
        size > THINVM_MAX_VIRTUAL_SIZE) {
        error_setg(errp, "A disk of %" PRIu64 " bytes is too large for "
                   "clusters of %" PRIu64 " bytes", size, cluster_size);
        return NULL;
    }
    if (prealloc == PREALLOC_MODE_FALLOC || prealloc == PREALLOC_MODE_FULL ||
        prealloc == PREALLOC_MODE_METADATA || (in_bs && backing)) {
        /* What the backing file has in common with the source is unknown */
        needed = clusters;
    } else if (in_bs) {
        needed = thinvm_measure_clusters(in_bs, cluster_size, size, errp);
        if (needed < 0) {
            return NULL;
        }
    }
    fixed = thinvm_state_minimum_device(&sb);
    info = g_new0(BlockMeasureInfo, 1);
    info->required = fixed + needed * cluster_size +
                     thinvm_measure_metadata(needed, cluster_size);
    info->fully_allocated = fixed + clusters * cluster_size +
                            thinvm_measure_metadata(clusters, cluster_size);
    return info;
}
