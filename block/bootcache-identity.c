/*
 * thinvm boot cache: which template is it?
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Readers, the publisher and the file of a recording must mean the same
 * contents.  The identity is a SHA-256 over the length, the first bytes, and
 * one of
 *  - option template-id, what the operator says (the digest of a template
 *    store, say): the only way for a template that comes over a network;
 *  - what the nodes below tell: for a thinvm image what block/thinvm/info.c
 *    knows its contents by; for a template of the store its digest; for a file
 *    inode, size, times of change, and samples; for other drivers the options
 *    that decide on what they show.
 *
 * It is computed of what is open, never of a path, where by now another file
 * may be.  All that goes in must be the same in several programs, after a
 * restart of the host, and where possible on several hosts: hence not st_dev,
 * which NFS, btrfs and LVM give out anew at each mount.  (Two files with the
 * same inode number and the same nanoseconds of ctime are not met; images of
 * read-only file systems may have all their times alike, for these there are
 * the samples.)
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qobject/qdict.h"
#include "qobject/qjson.h"
#include "qobject/qstring.h"
#include "qemu/bswap.h"
#include "qemu/cutils.h"
#include "block/block_int.h"
#include "bootcache.h"
#include "thinvm/thinvm.h"

#define BOOTCACHE_SAMPLE        4096    /* at the beginning */

/* Of each file; as small as may be, since every reader reads them */
#define BOOTCACHE_FILE_SAMPLES  16
#define BOOTCACHE_FILE_SAMPLE   512
#define BOOTCACHE_FILE_ALIGN    4096

static void bootcache_hash_u64(GChecksum *hash, uint64_t value)
{
    uint8_t buf[8];

    stq_le_p(buf, value);
    g_checksum_update(hash, buf, sizeof(buf));
}

static void bootcache_hash_str(GChecksum *hash, const char *s)
{
    bootcache_hash_u64(hash, strlen(s));
    g_checksum_update(hash, (const uint8_t *)s, strlen(s));
}

/* Its name is all that matters, wherever it is read from */
static bool bootcache_hash_template(GChecksum *hash, BlockDriverState *bs)
{
    const char *digest = qdict_get_try_str(bs->options, "digest") ?: "";

    strstart(digest, "sha256:", &digest);
    bootcache_hash_str(hash, "thinvm-template");
    bootcache_hash_str(hash, digest);
    return true;
}

/* Evenly spread; the first one is the beginning */
static bool GRAPH_RDLOCK
bootcache_hash_samples(GChecksum *hash, BdrvChild *child, Error **errp)
{
    uint8_t buf[BOOTCACHE_FILE_SAMPLE];
    int64_t length = bdrv_getlength(child->bs);

    for (int i = 0; i < BOOTCACHE_FILE_SAMPLES; i++) {
        int64_t offset = QEMU_ALIGN_DOWN(length / BOOTCACHE_FILE_SAMPLES * i,
                                         BOOTCACHE_FILE_ALIGN);
        int64_t bytes = MIN(length - offset, BOOTCACHE_FILE_SAMPLE);
        int ret = length < 0 ? length : bdrv_pread(child, offset, bytes, buf,
                                                   0);

        if (ret < 0) {
            error_setg_errno(errp, -ret, "Cannot read node '%s' at offset %"
                             PRId64, bdrv_get_node_name(child->bs), offset);
            return false;
        }
        g_checksum_update(hash, buf, bytes);
    }
    return true;
}

static bool GRAPH_RDLOCK
bootcache_hash_file(GChecksum *hash, BdrvChild *child, Error **errp)
{
    BlockDriverState *bs = child->bs;
    struct stat st;

    if (strcmp(bs->drv->format_name, "file") ||
        bootcache_fstat(bs, &st) < 0 || !S_ISREG(st.st_mode)) {
        error_setg(errp, "Option 'template-id' is required: nothing tells "
                   "whether the contents of node '%s' (driver '%s') are still "
                   "the same; give a name that changes with them",
                   bdrv_get_node_name(bs), bs->drv->format_name);
        return false;
    }
    bootcache_hash_str(hash, "file");
    bootcache_hash_u64(hash, st.st_ino);
    bootcache_hash_u64(hash, st.st_size);
    bootcache_hash_u64(hash, st.st_mtim.tv_sec);
    bootcache_hash_u64(hash, st.st_mtim.tv_nsec);
    bootcache_hash_u64(hash, st.st_ctim.tv_sec);
    bootcache_hash_u64(hash, st.st_ctim.tv_nsec);
    return bootcache_hash_samples(hash, child, errp);
}

static bool GRAPH_RDLOCK
bootcache_hash_thinvm(GChecksum *hash, BlockDriverState *bs, Error **errp)
{
    ERRP_GUARD();
    ThinvmContents c;

    if (thinvm_contents(bs, &c, errp) < 0) {
        error_prepend(errp, "Option 'template-id' is required: ");
        return false;
    }
    bootcache_hash_str(hash, "thinvm");
    g_checksum_update(hash, c.uuid.data, sizeof(c.uuid.data));
    bootcache_hash_u64(hash, c.snapshot_id);
    bootcache_hash_u64(hash, c.snapshot_sec);
    bootcache_hash_u64(hash, c.snapshot_nsec);
    bootcache_hash_u64(hash, c.epoch);
    bootcache_hash_u64(hash, c.sequence);
    bootcache_hash_u64(hash, c.claim_epoch);
    g_checksum_update(hash, c.claim_nonce.data, sizeof(c.claim_nonce.data));
    return true;
}

/* Does option @key decide on the contents?  The name of a secret does not */
static bool bootcache_option_counts(BlockDriverState *bs, const char *key)
{
    const char *const *name = bs->drv->strong_runtime_opts;

    if (g_str_has_suffix(key, "key-secret")) {
        return false;
    }
    for (; name && *name; name++) {
        if (g_str_has_suffix(*name, ".") ? strstart(key, *name, NULL)
                                         : !strcmp(key, *name)) {
            return true;
        }
    }
    return false;
}

/* Numbers look the same whether they were given as such or as strings */
static void bootcache_hash_value(GChecksum *hash, const QObject *value)
{
    const QString *string = qobject_to(QString, value);
    g_autoptr(GString) json = string ? NULL : qobject_to_json(value);

    bootcache_hash_str(hash, string ? qstring_get_str(string) : json->str);
}

static gint bootcache_compare_keys(gconstpointer a, gconstpointer b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

static void GRAPH_RDLOCK
bootcache_hash_options(GChecksum *hash, BlockDriverState *bs)
{
    g_autoptr(GPtrArray) keys = g_ptr_array_new();
    const QDictEntry *e;

    for (e = qdict_first(bs->options); e; e = qdict_next(bs->options, e)) {
        if (bootcache_option_counts(bs, qdict_entry_key(e))) {
            g_ptr_array_add(keys, (char *)qdict_entry_key(e));
        }
    }
    g_ptr_array_sort(keys, bootcache_compare_keys);
    for (unsigned i = 0; i < keys->len; i++) {
        bootcache_hash_str(hash, keys->pdata[i]);
        bootcache_hash_value(hash, qdict_get(bs->options, keys->pdata[i]));
    }
}

static bool GRAPH_RDLOCK
bootcache_hash_node(GChecksum *hash, BdrvChild *child, Error **errp);

/* With their names, and an end: another tree is never the same string */
static bool GRAPH_RDLOCK
bootcache_hash_children(GChecksum *hash, BlockDriverState *bs,
                        BdrvChild *except, Error **errp)
{
    BdrvChild *child;

    QLIST_FOREACH(child, &bs->children, next) {
        if (child == except) {
            continue;
        }
        bootcache_hash_str(hash, child->name);
        if (!bootcache_hash_node(hash, child, errp)) {
            return false;
        }
    }
    bootcache_hash_str(hash, "");
    return true;
}

static bool GRAPH_RDLOCK
bootcache_hash_node(GChecksum *hash, BdrvChild *child, Error **errp)
{
    BlockDriverState *bs = child->bs;
    BdrvChild *filtered = bdrv_filter_child(bs);

    if (filtered) {
        /* Filters change nothing: one side may have others than the other */
        return bootcache_hash_node(hash, filtered, errp);
    }
    if (!strcmp(bs->drv->format_name, "thinvm")) {
        return bootcache_hash_thinvm(hash, bs, errp) &&
               bootcache_hash_children(hash, bs, bs->file, errp);
    }
    if (!strcmp(bs->drv->format_name, "thinvm-template")) {
        return bootcache_hash_template(hash, bs);
    }
    if (QLIST_EMPTY(&bs->children)) {
        return bootcache_hash_file(hash, child, errp);
    }
    bootcache_hash_str(hash, bs->drv->format_name);
    bootcache_hash_options(hash, bs);
    bootcache_hash_str(hash, "");
    return bootcache_hash_children(hash, bs, NULL, errp);
}

static bool GRAPH_RDLOCK
bootcache_hash_name(GChecksum *hash, BdrvChild *child,
                    const char *template_id, Error **errp)
{
    if (template_id) {
        bootcache_hash_str(hash, "id");
        bootcache_hash_str(hash, template_id);
        return true;
    }
    return bootcache_hash_node(hash, child, errp);
}

int bootcache_identify(BdrvChild *child, const char *template_id,
                       BootcacheIdentity *identity, uint64_t *length,
                       Error **errp)
{
    g_autoptr(GChecksum) hash = g_checksum_new(G_CHECKSUM_SHA256);
    g_autofree uint8_t *sample = g_malloc(BOOTCACHE_SAMPLE);
    gsize size = sizeof(identity->hash);
    int64_t len = bdrv_getlength(child->bs);
    int64_t bytes = MIN(len, BOOTCACHE_SAMPLE);
    int ret = len < 0 ? len : bdrv_pread(child, 0, bytes, sample, 0);

    if (ret < 0) {
        error_setg_errno(errp, -ret, "Cannot read the template");
        return ret;
    }
    bootcache_hash_str(hash, "thinvm-bootcache 2");
    bootcache_hash_u64(hash, len);
    g_checksum_update(hash, sample, bytes);
    if (!bootcache_hash_name(hash, child, template_id, errp)) {
        return -EINVAL;
    }
    g_checksum_get_digest(hash, identity->hash, &size);
    *length = len;
    return 0;
}
