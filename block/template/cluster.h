/*
 * thinvm template store: the description of a cluster
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The same file on every node (docs/thinvm/user-guide.rst, Template store).
 */

#ifndef BLOCK_TEMPLATE_CLUSTER_H
#define BLOCK_TEMPLATE_CLUSTER_H

#include "qapi/qapi-types-sockets.h"

#define CLUSTER_FILE_MAX        (1 * MiB)
#define CLUSTER_NAME_MAX        63
#define CLUSTER_NODES_MAX       256
#define CLUSTER_DISKS_MAX       1024
#define CLUSTER_REPLICAS_MAX    16
#define CLUSTER_WEIGHT_MAX      100
#define CLUSTER_WEIGHTS_MAX     4096    /* of all disks together */

typedef struct ClusterNode {
    char *name;
    unsigned index;
    char *site;                 /* NULL: none */
    char *nbd_text;
    SocketAddress *nbd;         /* NULL: other nodes cannot read from it */
} ClusterNode;

typedef struct ClusterDisk {
    char *name;
    char *node_name;
    ClusterNode *node;
    char *path;
    bool ssd;
    uint32_t weight;
} ClusterDisk;

typedef struct Cluster {
    GPtrArray *nodes;           /* of ClusterNode, in the file's order */
    GPtrArray *disks;           /* of ClusterDisk, likewise */
    uint32_t replicas;          /* where there are SSDs */
    bool has_ssds;
} Cluster;

/* @name is what errors call it */
Cluster *cluster_parse(const char *text, size_t size, const char *name,
                       Error **errp);
Cluster *cluster_load(const char *path, Error **errp);
void cluster_free(Cluster *c);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Cluster, cluster_free)

ClusterNode *cluster_find_node(const Cluster *c, const char *name);
ClusterDisk *cluster_find_disk(const Cluster *c, const char *name);

#endif
