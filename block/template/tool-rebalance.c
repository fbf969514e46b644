/*
 * thinvm-template: rebalance
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Brings this node's disks to what the placement says, after disks or nodes
 * came or went, or templates were added elsewhere: first what belongs here is
 * fetched, then what does not belong here is dropped, if all those that it
 * belongs on have it (T3).  Interrupted, it is simply run again.
 *
 * What was removed here stays removed, until every node has forgotten it.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/error-report.h"
#include "tool.h"

#define SERVER_WAITS        50
#define SERVER_WAIT_US      100000

typedef struct Rebalance {
    Tool *t;
    bool all_answered;
    int status;
    unsigned fetched, dropped, kept;
} Rebalance;

/* ------------------------------------------------------------------ */
/* Fetching                                                            */

static void fetch(Rebalance *r, TemplateStore *s, const TemplateDigest *digest)
{
    g_autoptr(GPtrArray) replicas = tool_replicas(r->t, digest, s);
    char text[TEMPLATE_DIGEST_TEXT];
    TemplateDigest same;
    bool existed;

    template_digest_format(digest, text);
    for (unsigned i = 0; i < replicas->len; i++) {
        ToolReplica *replica = g_ptr_array_index(replicas, i);
        Error *err = NULL;

        /* The same hashes on every node, if they are right */
        if (tool_receive(r->t, s, replica->blk, digest, false,
                         tool_chunk_size_of(replica, digest), &same, &existed,
                         &err)) {
            printf("%s fetched from %s to disk '%s'\n", text, replica->where,
                   s->disk->name);
            r->fetched++;
            return;
        }
        warn_reportf_err(err, "From %s: ", replica->where);
    }
    error_report("'%s' belongs on disk '%s', and could not be fetched", text,
                 s->disk->name);
    r->status = TOOL_INCOMPLETE;
}

static void fetch_if_missing(Rebalance *r, const TemplateDigest *digest)
{
    ClusterDisk *disk = placement_on_node(r->t->placement, digest, r->t->node);
    TemplateStore *s = disk ? tool_store_of(r->t, disk) : NULL;
    TemplateEntry e;

    if (disk && !s) {
        r->status = TOOL_INCOMPLETE;    /* opening it has failed, and said so */
        return;
    }
    if (!s || tool_is_marked(r->t, digest) ||
        (template_store_find(s, digest, &e) && e.data && e.chunks)) {
        return;
    }
    fetch(r, s, digest);
}

/* ------------------------------------------------------------------ */
/* Dropping                                                            */

/* Has that disk (its node says so) a copy of that length? */
static bool has_copy(Rebalance *r, const ClusterDisk *disk,
                     const TemplateDigest *digest, uint64_t length)
{
    GPtrArray *lists = tool_lists(r->t, false);
    uint64_t found;

    if (disk->node == r->t->node) {
        TemplateStore *s = tool_store_of(r->t, disk);
        TemplateEntry e;

        return s && template_store_find(s, digest, &e) && e.data && e.chunks &&
               e.size == length;
    }
    for (unsigned i = 0; i < lists->len; i++) {
        RemoteList *list = g_ptr_array_index(lists, i);

        if (list->node == disk->node) {
            return remote_has(list, digest, &found) && found == length;
        }
    }
    return false;
}

/* The first disk that it belongs on and that does not have it, or NULL */
static ClusterDisk *lacking_disk(Rebalance *r, const TemplateEntry *e)
{
    g_autoptr(GPtrArray) disks = placement_disks(r->t->placement, &e->digest);

    for (unsigned i = 0; i < disks->len; i++) {
        ClusterDisk *disk = g_ptr_array_index(disks, i);

        if (!has_copy(r, disk, &e->digest, e->size)) {
            return disk;
        }
    }
    return NULL;
}

/* This node's own server closes it soon after it was marked */
static bool drop(TemplateStore *s, const TemplateDigest *digest, bool *gone,
                 Error **errp)
{
    if (!template_store_mark(s, digest, TEMPLATE_LEAVING, errp)) {
        return false;
    }
    for (int i = 0; i < SERVER_WAITS && template_store_in_use(s, digest);
         i++) {
        g_usleep(SERVER_WAIT_US);
    }
    return template_store_drop(s, digest, gone, errp);
}

static void drop_if_elsewhere(Rebalance *r, TemplateStore *s,
                              const TemplateEntry *e)
{
    ClusterDisk *lacking;
    char text[TEMPLATE_DIGEST_TEXT];
    Error *err = NULL;
    bool gone;

    if (!e->data || e->removed) {
        return;
    }
    if (r->t->keep || placement_on_node(r->t->placement, &e->digest,
                                        r->t->node) == s->disk) {
        template_store_unmark(s, &e->digest, TEMPLATE_LEAVING, NULL);
        return;
    }
    template_digest_format(&e->digest, text);
    lacking = lacking_disk(r, e);
    if (lacking) {
        template_store_unmark(s, &e->digest, TEMPLATE_LEAVING, NULL);
        printf("%s stays on disk '%s': node '%s' does not have it yet\n", text,
               s->disk->name, lacking->node->name);
        r->kept++;
        r->status = TOOL_INCOMPLETE;
    } else if (!drop(s, &e->digest, &gone, &err)) {
        error_report_err(err);
        r->status = TOOL_FAILED;
    } else if (!gone) {
        printf("%s stays on disk '%s': it is in use\n", text, s->disk->name);
        r->kept++;
    } else {
        printf("%s dropped from disk '%s'\n", text, s->disk->name);
        r->dropped++;
    }
}

/* A mark that nothing in the cluster could undo any more */
static void forget_mark(Rebalance *r, TemplateStore *s, const TemplateEntry *e)
{
    GPtrArray *lists = tool_lists(r->t, false);

    if (!e->removed || e->data || !r->all_answered) {
        return;
    }
    for (unsigned i = 0; i < lists->len; i++) {
        if (remote_has(g_ptr_array_index(lists, i), &e->digest, NULL)) {
            return;
        }
    }
    template_store_unmark(s, &e->digest, TEMPLATE_REMOVED, NULL);
}

/* ------------------------------------------------------------------ */

static void each_digest(Rebalance *r)
{
    g_autoptr(GArray) own = tool_digests(r->t, &error_abort);
    GPtrArray *lists = tool_lists(r->t, false);
    GHashTableIter iter;
    gpointer key;

    for (unsigned i = 0; i < own->len; i++) {
        fetch_if_missing(r, &g_array_index(own, TemplateDigest, i));
    }
    for (unsigned i = 0; i < lists->len; i++) {
        RemoteList *list = g_ptr_array_index(lists, i);

        g_hash_table_iter_init(&iter, list->lengths);
        while (g_hash_table_iter_next(&iter, &key, NULL)) {
            fetch_if_missing(r, key);
        }
    }
}

static void each_entry(Rebalance *r, TemplateStore *s)
{
    Error *err = NULL;
    g_autoptr(GArray) entries = template_store_scan(s, &err);

    if (!entries) {
        error_report_err(err);
        r->status = TOOL_FAILED;
        return;
    }
    for (unsigned i = 0; i < entries->len; i++) {
        TemplateEntry *e = &g_array_index(entries, TemplateEntry, i);

        drop_if_elsewhere(r, s, e);
        forget_mark(r, s, e);
    }
}

static void ask_others(Rebalance *r)
{
    GPtrArray *lists = tool_lists(r->t, true);

    r->all_answered = true;
    for (unsigned i = 0; i < lists->len; i++) {
        RemoteList *list = g_ptr_array_index(lists, i);

        if (list->problem) {
            warn_report("Node '%s': %s", list->node->name, list->problem);
            r->all_answered = false;
        }
    }
}

int tool_rebalance(Tool *t)
{
    Rebalance r = { .t = t, .status = TOOL_OK };

    for (unsigned i = 0; i < t->stores->len; i++) {
        template_store_sweep(g_ptr_array_index(t->stores, i));
    }
    ask_others(&r);
    each_digest(&r);
    if (r.fetched) {
        /* That may have taken hours */
        ask_others(&r);
    }
    for (unsigned i = 0; i < t->stores->len; i++) {
        each_entry(&r, g_ptr_array_index(t->stores, i));
    }
    printf("%u fetched, %u dropped, %u kept\n", r.fetched, r.dropped, r.kept);
    return r.status;
}
