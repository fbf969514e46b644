/*
 * thinvm driver layer: the template of a full clone
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A full clone that was made by create-template.c remembers which of its
 * clusters are still its template's, by a mark in their mapping entries.  If
 * it is opened with option "template", mostly a boot cache, these are read
 * from there: io-read.c.  The image holds all of the data by itself, so the
 * template may fail at any time, or not be given at all.
 *
 * Contents never come out wrong: a template that is not known to have the
 * contents that were copied is refused.  What is known without reading all of
 * it:
 *  - the digest that its node vouches for (thinvm-template, or a boot cache
 *    whose template-id it is) is that of what was copied;
 *  - or it is the very file or image that was copied, and was not changed
 *    since, by what a boot cache knows it by (bootcache-identity.c).
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/cutils.h"
#include "qobject/qdict.h"
#include "block/qdict.h"
#include "../bootcache.h"
#include "thinvm.h"

#define THINVM_OPT_TEMPLATE "template"
#define DIGEST_PREFIX       "sha256:"

QEMU_BUILD_BUG_ON(sizeof_field(BootcacheIdentity, hash) !=
                  THINVM_TEMPLATE_HASH_SIZE);

/* ------------------------------------------------------------------ */
/* Digests as text                                                     */

bool thinvm_template_parse(const char *text, uint8_t *digest, Error **errp)
{
    const char *digits;

    if (!strstart(text, DIGEST_PREFIX, &digits) ||
        strlen(digits) != 2 * THINVM_TEMPLATE_HASH_SIZE ||
        strspn(digits, "0123456789abcdefABCDEF") != strlen(digits)) {
        error_setg(errp, "Digest '%s' is not \"" DIGEST_PREFIX "\" and %d "
                   "hexadecimal digits", text, 2 * THINVM_TEMPLATE_HASH_SIZE);
        return false;
    }
    for (int i = 0; i < THINVM_TEMPLATE_HASH_SIZE; i++) {
        digest[i] = g_ascii_xdigit_value(digits[2 * i]) << 4 |
                    g_ascii_xdigit_value(digits[2 * i + 1]);
    }
    return true;
}

static char *hex(const uint8_t *hash, const char *prefix)
{
    GString *text = g_string_new(prefix);

    for (int i = 0; i < THINVM_TEMPLATE_HASH_SIZE; i++) {
        g_string_append_printf(text, "%02x", hash[i]);
    }
    return g_string_free(text, false);
}

char *thinvm_template_name(const uint8_t *digest)
{
    return hex(digest, DIGEST_PREFIX);
}

/* ------------------------------------------------------------------ */
/* Which template is it?                                               */

/* The node below one that shows just what that one does; else NULL */
static BlockDriverState * GRAPH_RDLOCK node_below(BlockDriverState *bs)
{
    if (!strcmp(bs->drv->format_name, "raw") &&
        !qdict_haskey(bs->options, "offset") &&
        !qdict_haskey(bs->options, "size")) {
        return bs->file->bs;
    }
    return bdrv_filter_bs(bs);
}

/* What a node says of itself, and vouches for when it is read */
static const char * GRAPH_RDLOCK node_says(BlockDriverState *bs,
                                           const char *driver,
                                           const char *option)
{
    for (; bs && bs->drv; bs = node_below(bs)) {
        if (!strcmp(bs->drv->format_name, driver) &&
            qdict_haskey(bs->options, option)) {
            return qdict_get_try_str(bs->options, option);
        }
    }
    return NULL;
}

static const char * GRAPH_RDLOCK cache_id(BdrvChild *child)
{
    return node_says(child->bs, "bootcache", "template-id");
}

static void GRAPH_RDLOCK stated_digest(BdrvChild *child, uint8_t *digest)
{
    const char *text = node_says(child->bs, "thinvm-template", "digest") ?:
                       cache_id(child);

    memset(digest, 0, THINVM_TEMPLATE_HASH_SIZE);
    if (text && !thinvm_template_parse(text, digest, NULL)) {
        memset(digest, 0, THINVM_TEMPLATE_HASH_SIZE);
    }
}

/* By what its nodes are, or else by what the boot cache above was told */
static bool GRAPH_RDLOCK node_identity(BdrvChild *child, const char *id,
                                       uint8_t *identity)
{
    BootcacheIdentity found;
    uint64_t length;

    if (bootcache_identify(child, id, &found, &length, NULL) < 0) {
        memset(identity, 0, THINVM_TEMPLATE_HASH_SIZE);
        return false;
    }
    memcpy(identity, found.hash, sizeof(found.hash));
    return true;
}

int thinvm_template_identify(BdrvChild *child, ThinvmTemplateId *id,
                             Error **errp)
{
    int64_t length = bdrv_getlength(child->bs);

    *id = (ThinvmTemplateId) { };
    if (length < 0) {
        error_setg_errno(errp, -length, "Cannot get the template's length");
        return length;
    }
    id->length = length;
    stated_digest(child, id->digest);
    if (!node_identity(child, NULL, id->identity) && cache_id(child)) {
        node_identity(child, cache_id(child), id->identity);
    }
    return 0;
}

static bool same_hash(const uint8_t *a, const uint8_t *b)
{
    return thinvm_template_hash_known(a) &&
           !memcmp(a, b, THINVM_TEMPLATE_HASH_SIZE);
}

/* Is it the one that was copied, unchanged, by any of the ways to tell? */
static bool GRAPH_RDLOCK same_template(BdrvChild *child,
                                       const ThinvmTemplateId *want)
{
    const char *id = cache_id(child);
    uint8_t hash[THINVM_TEMPLATE_HASH_SIZE];

    stated_digest(child, hash);
    if (thinvm_template_hash_known(hash)) {
        /* whoever says what it is does not mean another one */
        return same_hash(want->digest, hash);
    }
    return (node_identity(child, NULL, hash) &&
            same_hash(want->identity, hash)) ||
           (id && node_identity(child, id, hash) &&
            same_hash(want->identity, hash));
}

/* ------------------------------------------------------------------ */
/* Open                                                                */

static bool has_template(QDict *options)
{
    const QDictEntry *e;

    if (qdict_haskey(options, THINVM_OPT_TEMPLATE)) {
        return true;
    }
    for (e = qdict_first(options); e; e = qdict_next(options, e)) {
        if (strstart(qdict_entry_key(e), THINVM_OPT_TEMPLATE ".", NULL)) {
            return true;
        }
    }
    return false;
}

int thinvm_template_open(BlockDriverState *bs, QDict *options, Error **errp)
{
    BDRVThinvmState *s = bs->opaque;

    if (!has_template(options)) {
        return 0;
    }
    if (!qdict_haskey(options, THINVM_OPT_TEMPLATE)) {
        qdict_set_default_str(options, THINVM_OPT_TEMPLATE "."
                              BDRV_OPT_READ_ONLY, "on");
    }
    /* No role: the image's data are not there, they are only the same */
    s->template = bdrv_open_child(NULL, options, THINVM_OPT_TEMPLATE, bs,
                                  &child_of_bds, 0, false, errp);
    return s->template ? 0 : -EINVAL;
}

int thinvm_template_check(BlockDriverState *bs, Error **errp)
{
    BDRVThinvmState *s = bs->opaque;
    const ThinvmTemplateId *want = &s->template_id;
    g_autofree char *digest = thinvm_template_name(want->digest);
    int64_t length = bdrv_getlength(s->template->bs);

    if (!want->length) {
        error_setg(errp, "The image remembers no template; it is a full clone "
                   "of one only if it was created with option 'template'.  "
                   "Leave option 'template' out");
        return -EINVAL;
    }
    if (length < 0) {
        error_setg_errno(errp, -length, "Cannot get the template's length");
        return length;
    }
    if (length != want->length) {
        error_setg(errp, "Node '%s' has %" PRId64 " bytes, but the template "
                   "that the disk was copied from has %" PRIu64,
                   bdrv_get_node_name(s->template->bs), length, want->length);
        return -EINVAL;
    }
    if (!same_template(s->template, want)) {
        error_setg(errp, "Node '%s' is not known to be the template that the "
                   "disk was copied from, or was changed since; give that one, "
                   "or a boot cache with template-id=%s, or none",
                   bdrv_get_node_name(s->template->bs), digest);
        return -EINVAL;
    }
    return 0;
}

/* Nobody may change it as long as it is read in the place of our own data */
void thinvm_template_perm(uint64_t *nperm, uint64_t *nshared)
{
    *nperm = BLK_PERM_CONSISTENT_READ;
    *nshared = BLK_PERM_CONSISTENT_READ | BLK_PERM_WRITE_UNCHANGED;
}

/* ------------------------------------------------------------------ */

ThinvmCloneTemplate *thinvm_template_info(BDRVThinvmState *s)
{
    const ThinvmTemplateId *id = &s->template_id;
    ThinvmCloneTemplate *info;

    if (!id->length) {
        return NULL;
    }
    info = g_new0(ThinvmCloneTemplate, 1);
    info->length = id->length;
    info->digest = thinvm_template_name(id->digest);
    if (thinvm_template_hash_known(id->identity)) {
        info->identity = hex(id->identity, "");
    }
    return info;
}
