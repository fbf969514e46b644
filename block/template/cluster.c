/*
 * thinvm template store: the description of a cluster
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See cluster.h.  Sections and keys as in a -readconfig file, but read here:
 * an error must name the line, and a key that is there twice is a mistake.
 * All limits are checked before anything is built by them.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/cutils.h"
#include "qemu/sockets.h"
#include "template.h"
#include "cluster.h"

typedef enum SectionKind {
    SECTION_NONE,
    SECTION_CLUSTER,
    SECTION_NODE,
    SECTION_DISK,
} SectionKind;

typedef struct Parser {
    Cluster *cluster;
    const char *name;
    unsigned line;
    SectionKind kind;
    bool seen_cluster;
    ClusterNode *node;          /* of the section that is read */
    ClusterDisk *disk;
    GHashTable *keys;           /* seen in it */
} Parser;

/* ------------------------------------------------------------------ */
/* Values                                                              */

static bool name_ok(const char *s)
{
    size_t len = strlen(s);

    if (len == 0 || len > CLUSTER_NAME_MAX || !g_ascii_isalnum(s[0])) {
        return false;
    }
    for (; *s; s++) {
        if (!g_ascii_isalnum(*s) && !strchr("-._", *s)) {
            return false;
        }
    }
    return true;
}

static bool parse_name(const char *value, char **result, Error **errp)
{
    if (!name_ok(value)) {
        error_setg(errp, "'%.80s' is no name: 1 to %d of letters, digits, "
                   "'-', '.', '_', and a letter or digit first", value,
                   CLUSTER_NAME_MAX);
        return false;
    }
    *result = g_strdup(value);
    return true;
}

static bool parse_number(const char *key, const char *value, uint32_t max,
                         uint32_t *result, Error **errp)
{
    unsigned n;

    if (qemu_strtoui(value, NULL, 10, &n) < 0 || n < 1 || n > max) {
        error_setg(errp, "'%s' is '%.80s'; it must be 1 to %" PRIu32, key,
                   value, max);
        return false;
    }
    *result = n;
    return true;
}

static bool parse_bool(const char *key, const char *value, bool *result,
                       Error **errp)
{
    if (strcmp(value, "on") && strcmp(value, "off")) {
        error_setg(errp, "'%s' is '%.80s'; it must be 'on' or 'off'", key,
                   value);
        return false;
    }
    *result = !strcmp(value, "on");
    return true;
}

static bool parse_path(const char *value, char **result, Error **errp)
{
    if (value[0] != '/' || strlen(value) > 1024) {
        error_setg(errp, "'path' is '%.80s'; it must be an absolute path of "
                   "at most 1024 characters", value);
        return false;
    }
    *result = g_strdup(value);
    return true;
}

static bool parse_address(ClusterNode *node, const char *value, Error **errp)
{
    Error *err = NULL;

    node->nbd = socket_parse(value, &err);
    if (node->nbd && node->nbd->type != SOCKET_ADDRESS_TYPE_INET &&
        node->nbd->type != SOCKET_ADDRESS_TYPE_UNIX) {
        error_setg(&err, "neither a host and port nor a UNIX socket");
    }
    if (err) {
        error_setg(errp, "'nbd' is '%.80s'; it must be 'HOST:PORT', "
                   "'[ADDRESS]:PORT' or 'unix:PATH' (%s)", value,
                   error_get_pretty(err));
        error_free(err);
        return false;
    }
    node->nbd_text = g_strdup(value);
    return true;
}

/* ------------------------------------------------------------------ */
/* Sections and keys                                                   */

static bool unknown_key(const char *key, const char *known, Error **errp)
{
    error_setg(errp, "unknown key '%.80s'; here may be: %s", key, known);
    return false;
}

static bool cluster_key(Parser *p, const char *key, const char *value,
                        Error **errp)
{
    if (!strcmp(key, "replicas")) {
        return parse_number(key, value, CLUSTER_REPLICAS_MAX,
                            &p->cluster->replicas, errp);
    }
    return unknown_key(key, "replicas", errp);
}

static bool node_key(Parser *p, const char *key, const char *value,
                     Error **errp)
{
    if (!strcmp(key, "nbd")) {
        return parse_address(p->node, value, errp);
    }
    if (!strcmp(key, "site")) {
        return parse_name(value, &p->node->site, errp);
    }
    return unknown_key(key, "nbd, site", errp);
}

static bool disk_key(Parser *p, const char *key, const char *value,
                     Error **errp)
{
    if (!strcmp(key, "node")) {
        return parse_name(value, &p->disk->node_name, errp);
    }
    if (!strcmp(key, "path")) {
        return parse_path(value, &p->disk->path, errp);
    }
    if (!strcmp(key, "ssd")) {
        return parse_bool(key, value, &p->disk->ssd, errp);
    }
    if (!strcmp(key, "weight")) {
        return parse_number(key, value, CLUSTER_WEIGHT_MAX,
                            &p->disk->weight, errp);
    }
    return unknown_key(key, "node, path, ssd, weight", errp);
}

static bool parse_key(Parser *p, char *line, Error **errp)
{
    char *equals = strchr(line, '=');
    const char *key, *value;

    if (!equals) {
        error_setg(errp, "'%.80s' is neither '[SECTION]' nor 'KEY = VALUE'",
                   line);
        return false;
    }
    *equals = '\0';
    key = g_strstrip(line);
    value = g_strstrip(equals + 1);
    if (!g_hash_table_add(p->keys, g_strdup(key))) {
        error_setg(errp, "key '%.80s' is here for the second time", key);
        return false;
    }
    switch (p->kind) {
    case SECTION_CLUSTER:
        return cluster_key(p, key, value, errp);
    case SECTION_NODE:
        return node_key(p, key, value, errp);
    case SECTION_DISK:
        return disk_key(p, key, value, errp);
    default:
        error_setg(errp, "key '%.80s' stands before the first section", key);
        return false;
    }
}

static bool begin_node(Parser *p, const char *name, Error **errp)
{
    g_autofree char *copy = NULL;

    if (!parse_name(name, &copy, errp)) {
        return false;
    }
    if (cluster_find_node(p->cluster, name)) {
        error_setg(errp, "node '%s' is here for the second time", name);
        return false;
    }
    if (p->cluster->nodes->len == CLUSTER_NODES_MAX) {
        error_setg(errp, "there are more than %d nodes", CLUSTER_NODES_MAX);
        return false;
    }
    p->node = g_new0(ClusterNode, 1);
    p->node->name = g_steal_pointer(&copy);
    p->node->index = p->cluster->nodes->len;
    g_ptr_array_add(p->cluster->nodes, p->node);
    p->kind = SECTION_NODE;
    return true;
}

static bool begin_disk(Parser *p, const char *name, Error **errp)
{
    g_autofree char *copy = NULL;

    if (!parse_name(name, &copy, errp)) {
        return false;
    }
    if (cluster_find_disk(p->cluster, name)) {
        error_setg(errp, "disk '%s' is here for the second time", name);
        return false;
    }
    if (p->cluster->disks->len == CLUSTER_DISKS_MAX) {
        error_setg(errp, "there are more than %d disks", CLUSTER_DISKS_MAX);
        return false;
    }
    p->disk = g_new0(ClusterDisk, 1);
    p->disk->name = g_steal_pointer(&copy);
    p->disk->weight = 1;
    g_ptr_array_add(p->cluster->disks, p->disk);
    p->kind = SECTION_DISK;
    return true;
}

static bool parse_section(Parser *p, char *line, Error **errp)
{
    size_t len = strlen(line);
    const char *name;
    char *inner;

    if (line[len - 1] != ']') {
        error_setg(errp, "'%.80s' has no ']' at its end", line);
        return false;
    }
    line[len - 1] = '\0';
    inner = g_strstrip(line + 1);
    g_hash_table_remove_all(p->keys);
    if (!strcmp(inner, "cluster")) {
        if (p->seen_cluster) {
            error_setg(errp, "section [cluster] is here for the second time");
            return false;
        }
        p->seen_cluster = true;
        p->kind = SECTION_CLUSTER;
        return true;
    }
    if (strstart(inner, "node ", &name)) {
        return begin_node(p, g_strchug((char *)name), errp);
    }
    if (strstart(inner, "disk ", &name)) {
        return begin_disk(p, g_strchug((char *)name), errp);
    }
    error_setg(errp, "'[%.80s]' is none of '[cluster]', '[node NAME]', "
               "'[disk NAME]'", inner);
    return false;
}

static bool parse_line(Parser *p, char *line, Error **errp)
{
    line = g_strstrip(line);
    if (!line[0] || line[0] == '#') {
        return true;
    }
    return line[0] == '[' ? parse_section(p, line, errp)
                          : parse_key(p, line, errp);
}

/* ------------------------------------------------------------------ */
/* The whole                                                           */

static bool check_disk(Cluster *c, ClusterDisk *disk, Error **errp)
{
    if (!disk->node_name || !disk->path) {
        error_setg(errp, "disk '%s' has no '%s'", disk->name,
                   disk->node_name ? "path" : "node");
        return false;
    }
    disk->node = cluster_find_node(c, disk->node_name);
    if (!disk->node) {
        error_setg(errp, "disk '%s' is of node '%s', and there is no "
                   "'[node %s]'", disk->name, disk->node_name,
                   disk->node_name);
        return false;
    }
    for (unsigned i = 0; i < c->disks->len; i++) {
        ClusterDisk *other = g_ptr_array_index(c->disks, i);

        if (other == disk) {
            break;
        }
        if (other->node == disk->node && !strcmp(other->path, disk->path)) {
            error_setg(errp, "disks '%s' and '%s' of node '%s' have the same "
                       "path '%s'", other->name, disk->name, disk->node->name,
                       disk->path);
            return false;
        }
    }
    return true;
}

static bool check_replicas(Cluster *c, Error **errp)
{
    g_autofree bool *has_ssd = g_new0(bool, CLUSTER_NODES_MAX);
    unsigned nodes = 0, weights = 0;

    for (unsigned i = 0; i < c->disks->len; i++) {
        ClusterDisk *disk = g_ptr_array_index(c->disks, i);

        weights += disk->weight;
        if (disk->ssd && !has_ssd[disk->node->index]) {
            has_ssd[disk->node->index] = true;
            nodes++;
        }
    }
    c->has_ssds = nodes > 0;
    if (weights > CLUSTER_WEIGHTS_MAX) {
        error_setg(errp, "the weights of all disks add up to %u; at most %d",
                   weights, CLUSTER_WEIGHTS_MAX);
        return false;
    }
    if (c->has_ssds && c->replicas > nodes) {
        error_setg(errp, "'replicas' is %" PRIu32 ", and %u nodes have an "
                   "SSD: each copy must be on another node", c->replicas,
                   nodes);
        return false;
    }
    return true;
}

static bool check_whole(Cluster *c, Error **errp)
{
    if (!c->disks->len) {
        error_setg(errp, "there is no '[disk NAME]'");
        return false;
    }
    for (unsigned i = 0; i < c->disks->len; i++) {
        if (!check_disk(c, g_ptr_array_index(c->disks, i), errp)) {
            return false;
        }
    }
    return check_replicas(c, errp);
}

static void node_free(gpointer opaque)
{
    ClusterNode *node = opaque;

    g_free(node->name);
    g_free(node->site);
    g_free(node->nbd_text);
    qapi_free_SocketAddress(node->nbd);
    g_free(node);
}

static void disk_free(gpointer opaque)
{
    ClusterDisk *disk = opaque;

    g_free(disk->name);
    g_free(disk->node_name);
    g_free(disk->path);
    g_free(disk);
}

void cluster_free(Cluster *c)
{
    if (c) {
        g_ptr_array_unref(c->nodes);
        g_ptr_array_unref(c->disks);
        g_free(c);
    }
}

static bool parse_lines(Parser *p, const char *text, size_t size, Error **errp)
{
    ERRP_GUARD();
    g_autofree char *copy = NULL;
    char *rest, *line;

    if (memchr(text, '\0', size)) {
        error_setg(errp, "Cluster description '%s': it is no text file",
                   p->name);
        return false;
    }
    copy = rest = g_strndup(text, size);
    while ((line = strsep(&rest, "\n"))) {
        p->line++;
        if (!parse_line(p, line, errp)) {
            error_prepend(errp, "Cluster description '%s', line %u: ", p->name,
                          p->line);
            return false;
        }
    }
    return true;
}

Cluster *cluster_parse(const char *text, size_t size, const char *name,
                       Error **errp)
{
    ERRP_GUARD();
    g_autoptr(Cluster) c = g_new0(Cluster, 1);
    Parser p = { .cluster = c, .name = name };
    bool ok;

    c->replicas = 1;
    c->nodes = g_ptr_array_new_with_free_func(node_free);
    c->disks = g_ptr_array_new_with_free_func(disk_free);
    p.keys = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, NULL);
    ok = parse_lines(&p, text, size, errp);
    g_hash_table_destroy(p.keys);
    if (!ok) {
        return NULL;
    }
    if (!check_whole(c, errp)) {
        error_prepend(errp, "Cluster description '%s': ", name);
        return NULL;
    }
    return g_steal_pointer(&c);
}

Cluster *cluster_load(const char *path, Error **errp)
{
    g_autofree char *text = g_malloc(CLUSTER_FILE_MAX + 1);
    size_t size = 0;
    ssize_t n = 1;
    int fd = qemu_open(path, O_RDONLY | O_NONBLOCK, errp);

    if (fd < 0) {
        return NULL;
    }
    while (n > 0 && size <= CLUSTER_FILE_MAX) {
        n = RETRY_ON_EINTR(read(fd, text + size, CLUSTER_FILE_MAX + 1 - size));
        size += MAX(n, 0);
    }
    if (n < 0) {
        error_setg_errno(errp, errno, "Cannot read cluster description '%s'",
                         path);
    } else if (n > 0) {
        error_setg(errp, "Cluster description '%s' has more than %" PRIu64
                   " bytes", path, (uint64_t)CLUSTER_FILE_MAX);
    }
    close(fd);
    return n == 0 ? cluster_parse(text, size, path, errp) : NULL;
}

ClusterNode *cluster_find_node(const Cluster *c, const char *name)
{
    for (unsigned i = 0; i < c->nodes->len; i++) {
        ClusterNode *node = g_ptr_array_index(c->nodes, i);

        if (!strcmp(node->name, name)) {
            return node;
        }
    }
    return NULL;
}

ClusterDisk *cluster_find_disk(const Cluster *c, const char *name)
{
    for (unsigned i = 0; i < c->disks->len; i++) {
        ClusterDisk *disk = g_ptr_array_index(c->disks, i);

        if (!strcmp(disk->name, name)) {
            return disk;
        }
    }
    return NULL;
}
