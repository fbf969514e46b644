/*
 * thinvm-template: serve
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A server of this node's templates for the others: QEMU's NBD server, with
 * two read-only exports for each copy: its contents by its name, and its
 * hashes by that with a suffix.  The disks are looked at
 * every second: what has come is exported, what is marked is let go of when
 * no client is connected to it, and then, if it was removed, deleted.
 *
 * qemu-storage-daemon with such exports does as well; this one needs nobody
 * who tells it.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qapi/qapi-commands-block-export.h"
#include "qapi/qapi-types-block-export.h"
#include "qobject/qdict.h"
#include "block/block.h"
#include "block/export.h"
#include "block/nbd.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "qemu/timer.h"
#include "system/os-posix.h"
#include "system/runstate.h"
#include "tool.h"

#define SCAN_MS     1000

typedef struct Export {
    TemplateStore *store;
    TemplateDigest digest;
    const char *suffix;         /* of its name; one of suffixes[] */
    char *id, *path;
    ino_t ino;                  /* of its file */
} Export;

static const char *const suffixes[] = { "", ".chunks" };

typedef struct Server {
    Tool *t;
    GPtrArray *exports;
    /* Names that could not be exported, each told of once */
    GHashTable *failed;
    QEMUTimer *timer;
} Server;

static volatile bool stopping;

/* What os_setup_signal_handling() makes of SIGINT, SIGTERM, SIGHUP */
void qemu_system_killed(int signal, pid_t pid)
{
    stopping = true;
    qemu_notify_event();
}

static void export_free(gpointer opaque)
{
    Export *e = opaque;

    g_free(e->id);
    g_free(e->path);
    g_free(e);
}

static Export *find_export(Server *s, const TemplateDigest *digest,
                           const char *suffix)
{
    for (unsigned i = 0; i < s->exports->len; i++) {
        Export *e = g_ptr_array_index(s->exports, i);

        if (e->suffix == suffix && template_digest_equal(&e->digest, digest)) {
            return e;
        }
    }
    return NULL;
}

static bool add_export(const char *id, const char *name, const char *path,
                       Error **errp)
{
    QDict *options = qdict_new();
    BlockExportOptions export = {
        .type = BLOCK_EXPORT_TYPE_NBD,
        .id = (char *)id,
        .u.nbd.name = (char *)name,
    };
    BlockDriverState *bs;
    BlockExport *added;

    qdict_put_str(options, "driver", "raw");
    qdict_put_str(options, "file.driver", "file");
    qdict_put_str(options, "file.filename", path);
    bs = bdrv_open(NULL, NULL, options, 0, errp);
    if (!bs) {
        return false;
    }
    export.node_name = (char *)bdrv_get_node_name(bs);
    added = blk_exp_add(&export, errp);
    bdrv_unref(bs);
    return added;
}

static ino_t inode_of(const char *path)
{
    struct stat st;

    return lstat(path, &st) == 0 ? st.st_ino : 0;
}

static void begin(Server *s, TemplateStore *store,
                  const TemplateDigest *digest, const char *suffix)
{
    g_autofree char *path = *suffix ? template_store_chunks_path(store, digest)
                                    : template_store_path(store, digest);
    g_autofree char *id = template_file_name(digest, suffix);
    g_autofree char *name = NULL;
    char text[TEMPLATE_DIGEST_TEXT];
    ino_t ino = inode_of(path);
    Error *err = NULL;
    Export *e;

    template_digest_format(digest, text);
    name = g_strconcat(text, suffix, NULL);
    if (!add_export(id, name, path, &err)) {
        if (g_hash_table_add(s->failed, g_strdup(path))) {
            warn_reportf_err(err, "'%s' is not exported: ", path);
        } else {
            error_free(err);
        }
        return;
    }
    g_hash_table_remove(s->failed, path);
    e = g_new(Export, 1);
    *e = (Export) {
        .store = store,
        .digest = *digest,
        .suffix = suffix,
        .id = g_steal_pointer(&id),
        .path = g_steal_pointer(&path),
        .ino = ino,
    };
    g_ptr_array_add(s->exports, e);
}

/* It is exported only if it is whole, and meant to stay */
static bool wanted(const TemplateEntry *e)
{
    return e->data && e->chunks && !e->removed && !e->leaving;
}

static void add_new(Server *s, TemplateStore *store)
{
    g_autoptr(GArray) entries = template_store_scan(store, NULL);

    for (unsigned i = 0; entries && i < entries->len; i++) {
        TemplateEntry *entry = &g_array_index(entries, TemplateEntry, i);

        for (unsigned j = 0; wanted(entry) && j < ARRAY_SIZE(suffixes); j++) {
            if (!find_export(s, &entry->digest, suffixes[j])) {
                begin(s, store, &entry->digest, suffixes[j]);
            }
        }
    }
}

/* It may have been repaired by putting another file in its place */
static bool outdated(const Export *e)
{
    TemplateEntry entry;

    template_store_find(e->store, &e->digest, &entry);
    return !wanted(&entry) || inode_of(e->path) != e->ino;
}

/* Those that have a client are left, and looked at again the next time */
static void drop_old(Server *s)
{
    for (unsigned i = 0; i < s->exports->len; ) {
        Export *e = g_ptr_array_index(s->exports, i);
        bool old = outdated(e);

        if (old && blk_exp_find(e->id)) {
            qmp_block_export_del(e->id, true, BLOCK_EXPORT_REMOVE_MODE_SAFE,
                                 NULL);
        }
        if (old && !blk_exp_find(e->id)) {
            g_ptr_array_remove_index(s->exports, i);
        } else {
            i++;
        }
    }
}

static void scan(void *opaque)
{
    Server *s = opaque;

    drop_old(s);
    for (unsigned i = 0; i < s->t->stores->len; i++) {
        TemplateStore *store = g_ptr_array_index(s->t->stores, i);

        template_store_sweep(store);
        add_new(s, store);
    }
    timer_mod(s->timer, qemu_clock_get_ms(QEMU_CLOCK_REALTIME) + SCAN_MS);
}

static void serve(Server *s)
{
    os_setup_signal_handling();
    s->timer = timer_new_ms(QEMU_CLOCK_REALTIME, scan, s);
    scan(s);
    info_report("node '%s' serves %u templates on %s", s->t->node->name,
                s->exports->len / (unsigned)ARRAY_SIZE(suffixes),
                s->t->node->nbd_text);
    while (!stopping) {
        main_loop_wait(false);
    }
    timer_free(s->timer);
    blk_exp_close_all();
}

int tool_serve(Tool *t)
{
    Server s = { .t = t };
    Error *err = NULL;

    if (!t->node->nbd) {
        error_report("Node '%s' has no key 'nbd', which says where to listen",
                     t->node->name);
        return TOOL_FAILED;
    }
    if (!tool_first_store(t, &err)) {
        error_report_err(err);
        return TOOL_FAILED;
    }
    /* The listener must be there before the first export, and 0: no limit */
    nbd_server_start(t->node->nbd, NBD_DEFAULT_HANDSHAKE_MAX_SECS, NULL, NULL,
                     0, &err);
    if (err) {
        error_reportf_err(err, "Cannot listen on '%s': ", t->node->nbd_text);
        return TOOL_FAILED;
    }
    s.exports = g_ptr_array_new_with_free_func(export_free);
    s.failed = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, NULL);
    serve(&s);
    g_ptr_array_unref(s.exports);
    g_hash_table_unref(s.failed);
    return TOOL_OK;
}
