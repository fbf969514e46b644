/*
 * thinvm template store: which disks a template belongs on
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef BLOCK_TEMPLATE_PLACEMENT_H
#define BLOCK_TEMPLATE_PLACEMENT_H

#include "template.h"
#include "cluster.h"

typedef struct Placement Placement;

Placement *placement_new(const Cluster *cluster, Error **errp);
void placement_free(Placement *p);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Placement, placement_free)

/*
 * Disks of different nodes, in order of preference: with SSDs, as many as
 * there are replicas; without, one of each node that has a disk.
 */
GPtrArray *placement_disks(const Placement *p, const TemplateDigest *digest);

/* The one of them that is of @node, or NULL */
ClusterDisk *placement_on_node(const Placement *p,
                               const TemplateDigest *digest,
                               const ClusterNode *node);

/*
 * The other nodes, nearest first: those of the same site; among them those
 * that it belongs on, beginning at another one for each asker, so that they
 * share the load.
 */
GPtrArray *placement_nodes_by_distance(const Placement *p,
                                       const Cluster *cluster,
                                       const TemplateDigest *digest,
                                       const ClusterNode *self);

#endif
