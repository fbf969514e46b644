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
 *  - what the nodes below tell: for a thinvm image its UUID, the epoch (every
 *    writer begins a new one) and the snapshot shown; for a file its inode,
 *    size and time of change; for a template of the store its digest.
 */

#include "qemu/osdep.h"
#include "qapi/qapi-types-block-core.h"
#include "qapi/qapi-types-thinvm.h"
#include "qobject/qdict.h"
#include "qemu/bswap.h"
#include "qemu/cutils.h"
#include "block/block_int.h"
#include "bootcache.h"

#define BOOTCACHE_SAMPLE    4096

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

static bool GRAPH_RDLOCK
bootcache_hash_file(GChecksum *hash, BlockDriverState *bs, Error **errp)
{
    struct stat st;

    if (strcmp(bs->drv->format_name, "file") || stat(bs->filename, &st) < 0 ||
        !S_ISREG(st.st_mode)) {
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
    return true;
}

static void GRAPH_RDLOCK
bootcache_hash_thinvm(GChecksum *hash, BlockDriverState *bs,
                      ImageInfoSpecificThinvm *info)
{
    static const char *const options[] = { "snapshot.id", "snapshot.name" };

    bootcache_hash_str(hash, "thinvm");
    bootcache_hash_str(hash, info->uuid);
    bootcache_hash_u64(hash, info->epoch);
    for (size_t i = 0; i < ARRAY_SIZE(options); i++) {
        bootcache_hash_str(hash,
                           qdict_get_try_str(bs->options, options[i]) ?: "");
    }
}

static bool GRAPH_RDLOCK
bootcache_hash_node(GChecksum *hash, BlockDriverState *bs, Error **errp);

static bool GRAPH_RDLOCK
bootcache_hash_children(GChecksum *hash, BlockDriverState *bs,
                        BdrvChild *except, Error **errp)
{
    BdrvChild *child;

    QLIST_FOREACH(child, &bs->children, next) {
        if (child != except &&
            !bootcache_hash_node(hash, child->bs, errp)) {
            return false;
        }
    }
    return true;
}

static bool GRAPH_RDLOCK
bootcache_hash_node(GChecksum *hash, BlockDriverState *bs, Error **errp)
{
    ImageInfoSpecific *info;

    if (!strcmp(bs->drv->format_name, "thinvm")) {
        info = bdrv_get_specific_info(bs, errp);
        if (!info) {
            return false;
        }
        bootcache_hash_thinvm(hash, bs, info->u.thinvm.data);
        qapi_free_ImageInfoSpecific(info);
        return bootcache_hash_children(hash, bs, bs->file, errp);
    }
    if (!strcmp(bs->drv->format_name, "thinvm-template")) {
        return bootcache_hash_template(hash, bs);
    }
    if (QLIST_EMPTY(&bs->children)) {
        return bootcache_hash_file(hash, bs, errp);
    }
    /* Filters change nothing: one side may have others than the other */
    if (!bs->drv->is_filter) {
        bootcache_hash_str(hash, bs->drv->format_name);
    }
    return bootcache_hash_children(hash, bs, NULL, errp);
}

static bool GRAPH_RDLOCK
bootcache_hash_name(GChecksum *hash, BlockDriverState *bs,
                    const char *template_id, Error **errp)
{
    if (template_id) {
        bootcache_hash_str(hash, "id");
        bootcache_hash_str(hash, template_id);
        return true;
    }
    return bootcache_hash_node(hash, bs, errp);
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
    bootcache_hash_str(hash, "thinvm-bootcache 1");
    bootcache_hash_u64(hash, len);
    g_checksum_update(hash, sample, bytes);
    if (!bootcache_hash_name(hash, child->bs, template_id, errp)) {
        return -EINVAL;
    }
    g_checksum_get_digest(hash, identity->hash, &size);
    *length = len;
    return 0;
}
