/*
 * thinvm-template: list, locate
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qobject/qdict.h"
#include "qobject/qjson.h"
#include "qobject/qlist.h"
#include "qobject/qstring.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "tool.h"

/* ------------------------------------------------------------------ */
/* list                                                                */

static const char *state_of(Tool *t, const TemplateStore *s,
                            const TemplateEntry *e)
{
    if (e->removed) {
        return e->data ? "going" : "removed";
    }
    if (e->leaving && e->data) {
        return "leaving";
    }
    if (!e->data || !e->chunks) {
        return "incomplete";
    }
    return placement_on_node(t->placement, &e->digest, t->node) == s->disk
           ? "here" : "misplaced";
}

/*
 * What option "hashes" of the driver is to be, and, unless NULL, of how large
 * chunks; NULL if it cannot be told.
 */
static char *root_of(TemplateStore *s, const TemplateDigest *digest,
                     uint32_t *chunk_size)
{
    g_autoptr(TemplateChunks) c = template_store_read_chunks(s, digest, NULL);
    TemplateDigest root;
    char text[TEMPLATE_DIGEST_TEXT];

    if (!c || !template_chunks_root(c, &root, NULL)) {
        return NULL;
    }
    if (chunk_size) {
        *chunk_size = c->chunk_size;
    }
    template_digest_format(&root, text);
    return g_strdup(text);
}

static void list_entry(Tool *t, TemplateStore *s,
                       const TemplateEntry *e, QList *json)
{
    const char *state = state_of(t, s, e);
    g_autofree char *root = NULL;
    char text[TEMPLATE_DIGEST_TEXT];
    uint32_t chunk_size;
    QDict *row;

    template_digest_format(&e->digest, text);
    if (!t->json) {
        g_autofree char *size = size_to_str(e->size);
        g_autofree char *allocated = size_to_str(e->allocated);

        printf("%s  %10s %10s  %-10s %s\n", text, size, allocated, state,
               s->disk->name);
        return;
    }
    row = qdict_new();
    qdict_put_str(row, "digest", text);
    qdict_put_str(row, "disk", s->disk->name);
    qdict_put_str(row, "state", state);
    qdict_put_int(row, "size", e->size);
    qdict_put_int(row, "allocated", e->allocated);
    root = root_of(s, &e->digest, &chunk_size);
    if (root) {
        qdict_put_str(row, "hashes", root);
        qdict_put_int(row, "chunk-size", chunk_size);
    }
    qlist_append(json, row);
}

static int list_node(Tool *t, QList *json)
{
    int status = TOOL_OK;

    if (!t->json) {
        printf("%-71s  %10s %10s  %-10s %s\n", "TEMPLATE", "SIZE", "ALLOCATED",
               "STATE", "DISK");
    }
    for (unsigned i = 0; i < t->stores->len; i++) {
        TemplateStore *s = g_ptr_array_index(t->stores, i);
        Error *err = NULL;
        g_autoptr(GArray) entries = template_store_scan(s, &err);

        if (!entries) {
            error_report_err(err);
            status = TOOL_FAILED;
            continue;
        }
        for (unsigned j = 0; j < entries->len; j++) {
            list_entry(t, s, &g_array_index(entries, TemplateEntry, j), json);
        }
    }
    return status;
}

/* Names of the nodes that have it, and of those that should but do not */
static void holders(Tool *t, const TemplateDigest *digest, GPtrArray *lists,
                    QList *have, QList *lack)
{
    g_autoptr(GPtrArray) disks = placement_disks(t->placement, digest);
    g_autoptr(GHashTable) names = g_hash_table_new(NULL, NULL);

    if (tool_local_copy(t, digest)) {
        g_hash_table_add(names, t->node);
        qlist_append_str(have, t->node->name);
    }
    for (unsigned i = 0; i < lists->len; i++) {
        RemoteList *list = g_ptr_array_index(lists, i);

        if (remote_has(list, digest, NULL)) {
            g_hash_table_add(names, (void *)list->node);
            qlist_append_str(have, list->node->name);
        }
    }
    for (unsigned i = 0; i < disks->len; i++) {
        ClusterDisk *disk = g_ptr_array_index(disks, i);

        if (!g_hash_table_contains(names, disk->node)) {
            qlist_append_str(lack, disk->node->name);
        }
    }
}

static char *join_names(QList *names)
{
    g_autoptr(GString) s = g_string_new(NULL);
    QListEntry *entry;

    QLIST_FOREACH_ENTRY(names, entry) {
        g_string_append_printf(s, "%s%s", s->len ? "," : "",
                               qstring_get_str(qobject_to(QString,
                                                          entry->value)));
    }
    return g_string_free(g_steal_pointer(&s), false);
}

static bool list_holders(Tool *t, const TemplateDigest *digest,
                         GPtrArray *lists, QList *json)
{
    QList *have = qlist_new(), *lack = qlist_new();
    char text[TEMPLATE_DIGEST_TEXT];
    QDict *row = qdict_new();
    bool complete;

    holders(t, digest, lists, have, lack);
    complete = qlist_empty(lack);
    template_digest_format(digest, text);
    if (!t->json) {
        g_autofree char *h = join_names(have);
        g_autofree char *l = join_names(lack);

        printf("%s  on %s%s%s\n", text, h[0] ? h : "none",
               complete ? "" : ", missing on ", l);
    }
    qdict_put_str(row, "digest", text);
    qdict_put(row, "nodes", have);
    qdict_put(row, "missing", lack);
    qlist_append(json, row);
    return complete;
}

static GArray *digests_of_all(Tool *t, GPtrArray *lists, Error **errp)
{
    GArray *digests = tool_digests(t, errp);
    g_autoptr(GHashTable) seen = g_hash_table_new(g_str_hash, g_str_equal);
    g_autoptr(GStringChunk) names = g_string_chunk_new(4096);
    char text[TEMPLATE_DIGEST_TEXT];
    GHashTableIter iter;
    gpointer key;

    for (unsigned i = 0; digests && i < digests->len; i++) {
        template_digest_format(&g_array_index(digests, TemplateDigest, i),
                               text);
        g_hash_table_add(seen, g_string_chunk_insert(names, text));
    }
    for (unsigned i = 0; digests && i < lists->len; i++) {
        RemoteList *list = g_ptr_array_index(lists, i);

        g_hash_table_iter_init(&iter, list->lengths);
        while (g_hash_table_iter_next(&iter, &key, NULL)) {
            template_digest_format(key, text);
            if (g_hash_table_add(seen, g_string_chunk_insert(names, text))) {
                g_array_append_vals(digests, key, 1);
            }
        }
    }
    return digests;
}

static int list_cluster(Tool *t, QList *json)
{
    GPtrArray *lists = tool_lists(t, false);
    g_autoptr(GArray) digests = digests_of_all(t, lists, &error_abort);
    int status = TOOL_OK;

    for (unsigned i = 0; i < lists->len; i++) {
        RemoteList *list = g_ptr_array_index(lists, i);

        if (list->problem) {
            warn_report("Node '%s': %s", list->node->name, list->problem);
        }
    }
    for (unsigned i = 0; i < digests->len; i++) {
        if (!list_holders(t, &g_array_index(digests, TemplateDigest, i), lists,
                          json)) {
            status = TOOL_INCOMPLETE;
        }
    }
    return status;
}

int tool_list(Tool *t)
{
    QList *json = qlist_new();
    int status = t->cluster_wide ? list_cluster(t, json) : list_node(t, json);

    if (t->json) {
        g_autoptr(GString) text = qobject_to_json_pretty(QOBJECT(json), true);

        printf("%s\n", text->str);
    }
    qobject_unref(json);
    return status;
}

/* ------------------------------------------------------------------ */
/* locate                                                              */

static QDict *local_options(TemplateStore *s, const TemplateDigest *digest)
{
    g_autofree char *path = template_store_path(s, digest);
    QDict *options = qdict_new(), *file = qdict_new();

    qdict_put_str(file, "driver", "file");
    qdict_put_str(file, "filename", path);
    qdict_put_bool(file, "read-only", true);
    qdict_put_str(options, "driver", "raw");
    qdict_put(options, "file", file);
    qdict_put_bool(options, "read-only", true);
    return options;
}

/* What was found, nearest first: both for people and for QEMU */
typedef struct Places {
    GPtrArray *names;           /* paths, URIs */
    QList *options;
} Places;

static void add_local(Places *p, TemplateStore *s,
                      const TemplateDigest *digest)
{
    g_ptr_array_add(p->names, template_store_path(s, digest));
    qlist_append(p->options, local_options(s, digest));
}

static void add_remote(Places *p, const ClusterNode *node,
                       const TemplateDigest *digest)
{
    g_ptr_array_add(p->names, remote_uri(node, digest));
    qlist_append(p->options, remote_options(node, digest));
}

/*
 * Whatever the first child cannot read is read from the next one: QEMU's
 * quorum driver in a mode where nobody votes.
 */
static QDict *failover_options(QList *children)
{
    QDict *options = qdict_new();

    qdict_put_str(options, "driver", "quorum");
    qdict_put_str(options, "read-pattern", "fifo");
    qdict_put_int(options, "vote-threshold", 1);
    qdict_put(options, "children", qobject_ref(children));
    qdict_put_bool(options, "read-only", true);
    return options;
}

static void print_places(Tool *t, const Places *p)
{
    g_autoptr(GString) text = NULL;
    QDict *options;

    if (t->all || t->uri) {
        for (unsigned i = 0; i < (t->all ? p->names->len : 1); i++) {
            printf("%s\n", (char *)g_ptr_array_index(p->names, i));
        }
        return;
    }
    options = t->failover && p->names->len > 1 ? failover_options(p->options)
              : qobject_to(QDict, qlist_pop(p->options));
    if (t->node_name) {
        qdict_put_str(options, "node-name", t->node_name);
    }
    text = qobject_to_json(QOBJECT(options));
    printf("%s\n", text->str);
    qobject_unref(options);
}

static void find_places(Tool *t, const TemplateDigest *digest, Places *p)
{
    g_autoptr(GPtrArray) nodes =
        placement_nodes_by_distance(t->placement, t->cluster, digest, t->node);
    TemplateStore *local = tool_local_copy(t, digest);

    if (local) {
        add_local(p, local, digest);
    }
    for (unsigned i = 0; i < nodes->len; i++) {
        ClusterNode *node = g_ptr_array_index(nodes, i);
        g_autoptr(RemoteList) list = NULL;

        if (p->names->len && !t->all && !t->failover) {
            break;
        }
        if (!node->nbd) {
            continue;
        }
        list = remote_list(node);
        if (list->problem) {
            warn_report("Node '%s': %s", node->name, list->problem);
        } else if (remote_has(list, digest, NULL)) {
            add_remote(p, node, digest);
        }
    }
}

/* Whether there is any */
static bool locate(Tool *t, const TemplateDigest *digest)
{
    Places p = {
        .names = g_ptr_array_new_with_free_func(g_free),
        .options = qlist_new(),
    };
    bool found;

    find_places(t, digest, &p);
    found = p.names->len > 0;
    if (found) {
        print_places(t, &p);
    }
    g_ptr_array_unref(p.names);
    qobject_unref(p.options);
    return found;
}

/* For the driver that finds it by itself, where it is opened */
static void print_driver(Tool *t, const TemplateDigest *digest)
{
    TemplateStore *local = tool_local_copy(t, digest);
    g_autofree char *root = local ? root_of(local, digest, NULL) : NULL;
    g_autoptr(GString) json = NULL;
    QDict *options = qdict_new();
    char text[TEMPLATE_DIGEST_TEXT];

    template_digest_format(digest, text);
    qdict_put_str(options, "driver", "thinvm-template");
    qdict_put_str(options, "digest", text);
    if (root) {
        qdict_put_str(options, "hashes", root);
    }
    if (t->given_config) {
        g_autofree char *path = g_canonicalize_filename(t->given_config, NULL);

        qdict_put_str(options, "cluster", path);
    }
    if (t->given_node) {
        qdict_put_str(options, "node", t->given_node);
    }
    if (t->node_name) {
        qdict_put_str(options, "node-name", t->node_name);
    }
    qdict_put_bool(options, "read-only", true);
    json = qobject_to_json(QOBJECT(options));
    printf("%s\n", json->str);
    qobject_unref(options);
}

int tool_locate(Tool *t)
{
    TemplateDigest digest;
    Error *err = NULL;

    if (!template_digest_parse(t->argv[0], &digest, &err)) {
        error_report_err(err);
        return TOOL_FAILED;
    }
    if (tool_is_marked(t, &digest)) {
        error_report("Template '%s' was removed from node '%s'", t->argv[0],
                     t->node->name);
        return TOOL_FAILED;
    }
    if (t->driver) {
        print_driver(t, &digest);
        return TOOL_OK;
    }
    if (!locate(t, &digest)) {
        error_report("No node that could be asked has template '%s'",
                     t->argv[0]);
        return TOOL_FAILED;
    }
    return TOOL_OK;
}
