/*
 * thinvm-template: init, add, remove
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "tool.h"

int tool_init(Tool *t)
{
    int status = TOOL_OK;
    unsigned count = 0;

    for (unsigned i = 0; i < t->cluster->disks->len; i++) {
        ClusterDisk *disk = g_ptr_array_index(t->cluster->disks, i);
        Error *err = NULL;

        if (disk->node != t->node) {
            continue;
        }
        count++;
        if (!template_store_init(disk, &err)) {
            error_report_err(err);
            status = TOOL_FAILED;
        }
    }
    if (!count) {
        error_report("Node '%s' has no disk in the description",
                     t->node->name);
        status = TOOL_FAILED;
    }
    return status;
}

/* ------------------------------------------------------------------ */
/* add                                                                 */

/* From one disk of this node to another */
static bool move_copy(Tool *t, TemplateStore *from, TemplateStore *to,
                      const TemplateDigest *digest, Error **errp)
{
    g_autoptr(TemplateChunks) c = template_store_read_chunks(from, digest,
                                                             NULL);
    BlockBackend *blk = template_open_copy(from, digest, errp);
    TemplateDigest same;
    bool existed, gone, ok;

    if (!blk) {
        return false;
    }
    ok = tool_receive(t, to, blk, digest, false, c ? c->chunk_size : 0, &same,
                      &existed, errp);
    blk_unref(blk);
    return ok && template_store_drop(from, digest, &gone, errp);
}

/* Tell where it is, and on what nodes it should be */
static void tell_places(Tool *t, const TemplateDigest *digest,
                        const TemplateStore *s, bool existed)
{
    g_autoptr(GPtrArray) disks = placement_disks(t->placement, digest);
    g_autoptr(GString) others = g_string_new(NULL);
    bool here = false;

    for (unsigned i = 0; i < disks->len; i++) {
        ClusterDisk *disk = g_ptr_array_index(disks, i);

        if (disk == s->disk) {
            here = true;
        } else {
            g_string_append_printf(others, "%s%s", others->len ? ", " : "",
                                   disk->node->name);
        }
    }
    info_report("it %s on disk '%s'%s", existed ? "was already" : "is",
                s->disk->name, here ? "" : ", and does not belong there");
    if (others->len) {
        info_report("it belongs on %s, too: 'thinvm-template rebalance' there "
                    "fetches it", others->str);
    }
}

/* Option --chunk-size; 0 without it */
static bool parse_chunk_size(const Tool *t, uint32_t *chunk_size, Error **errp)
{
    uint64_t value;

    *chunk_size = 0;
    if (!t->chunk_size) {
        return true;
    }
    if (qemu_strtosz(t->chunk_size, NULL, &value) < 0 ||
        !template_chunk_size_fits(value, 0)) {
        error_setg(errp, "Option '--chunk-size' is '%.80s'; it must be a power "
                   "of two from 64K to 16M", t->chunk_size);
        return false;
    }
    *chunk_size = value;
    return true;
}

static bool check_chunk_size(const Tool *t, BlockBackend *blk,
                             uint32_t chunk_size, Error **errp)
{
    int64_t length = blk_getlength(blk);

    if (chunk_size && length > 0 && length <= TEMPLATE_LENGTH_MAX &&
        !template_chunk_size_fits(chunk_size, length)) {
        error_setg(errp, "Option '--chunk-size' is '%s', of which an image of %"
                   PRId64 " bytes has more than %" PRIu64 ": it must be "
                   "larger", t->chunk_size, length,
                   (uint64_t)TEMPLATE_CHUNKS_MAX);
        return false;
    }
    return true;
}

/* Its hashes stay as they are, also if other ones were asked for */
static void tell_chunk_size(TemplateStore *s, const TemplateDigest *digest,
                            uint32_t wanted)
{
    g_autoptr(TemplateChunks) c = template_store_read_chunks(s, digest, NULL);

    if (c && wanted && c->chunk_size != wanted) {
        info_report("its chunks have %" PRIu32 " bytes; to change that, "
                    "remove it first", c->chunk_size);
    }
}

static bool add_image(Tool *t, BlockBackend *blk, uint32_t chunk_size,
                      const TemplateDigest *expected, Error **errp)
{
    ClusterDisk *right = expected ?
        placement_on_node(t->placement, expected, t->node) : NULL;
    TemplateStore *s = right ? tool_store_of(t, right) : NULL;
    char text[TEMPLATE_DIGEST_TEXT];
    TemplateStore *better;
    TemplateDigest digest;
    bool existed;

    s = s ?: tool_first_store(t, errp);
    if (!s || !check_chunk_size(t, blk, chunk_size, errp)) {
        return false;
    }
    template_store_sweep(s);
    if (!tool_receive(t, s, blk, expected, false, chunk_size, &digest,
                      &existed, errp)) {
        return false;
    }
    right = placement_on_node(t->placement, &digest, t->node);
    better = right ? tool_store_of(t, right) : NULL;
    if (better && better != s) {
        if (!move_copy(t, s, better, &digest, errp)) {
            return false;
        }
        s = better;
    }
    tell_places(t, &digest, s, existed);
    tell_chunk_size(s, &digest, chunk_size);
    template_digest_format(&digest, text);
    printf("%s\n", text);
    return true;
}

int tool_add(Tool *t)
{
    TemplateDigest expected;
    uint32_t chunk_size;
    Error *err = NULL;
    BlockBackend *blk;
    bool ok;

    if ((t->digest && !template_digest_parse(t->digest, &expected, &err)) ||
        !parse_chunk_size(t, &chunk_size, &err)) {
        error_report_err(err);
        return TOOL_FAILED;
    }
    blk = template_open_image(t->argv[0], t->format, t->image_opts, &err);
    if (!blk) {
        error_report_err(err);
        return TOOL_FAILED;
    }
    ok = add_image(t, blk, chunk_size, t->digest ? &expected : NULL, &err);
    blk_unref(blk);
    if (!ok) {
        error_reportf_err(err, "'%s' was not added: ", t->argv[0]);
        return TOOL_FAILED;
    }
    return TOOL_OK;
}

/* ------------------------------------------------------------------ */
/* remove                                                              */

static bool remove_from(TemplateStore *s, const TemplateDigest *digest,
                        Error **errp)
{
    bool gone;

    /* Marked first, so that nobody is sent there any more */
    if (!template_store_mark(s, digest, TEMPLATE_REMOVED, errp) ||
        !template_store_drop(s, digest, &gone, errp)) {
        return false;
    }
    if (gone) {
        info_report("removed from disk '%s'", s->disk->name);
    } else {
        info_report("the copy on disk '%s' is in use: it is marked, and goes "
                    "when the last user has closed it", s->disk->name);
    }
    return true;
}

static void tell_others(Tool *t, const TemplateDigest *digest)
{
    GPtrArray *lists = tool_lists(t, false);

    for (unsigned i = 0; i < lists->len; i++) {
        RemoteList *list = g_ptr_array_index(lists, i);

        if (remote_has(list, digest, NULL)) {
            info_report("node '%s' has it, too: remove it there as well",
                        list->node->name);
        } else if (list->problem) {
            warn_report("Node '%s' cannot tell whether it has it: %s",
                        list->node->name, list->problem);
        }
    }
}

int tool_remove(Tool *t)
{
    TemplateDigest digest;
    TemplateEntry e;
    Error *err = NULL;
    bool found = false;

    if (!template_digest_parse(t->argv[0], &digest, &err)) {
        error_report_err(err);
        return TOOL_FAILED;
    }
    for (unsigned i = 0; i < t->stores->len; i++) {
        TemplateStore *s = g_ptr_array_index(t->stores, i);

        if (!template_store_find(s, &digest, &e)) {
            continue;
        }
        found = true;
        if (!remove_from(s, &digest, &err)) {
            error_report_err(err);
            return TOOL_FAILED;
        }
    }
    if (!found) {
        error_report("Node '%s' does not have template '%s'", t->node->name,
                     t->argv[0]);
    }
    tell_others(t, &digest);
    return found ? TOOL_OK : TOOL_FAILED;
}
