/*
 * thinvm template store: the other nodes
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Each node exports its templates by NBD, read-only, under their names.
 */

#ifndef BLOCK_TEMPLATE_REMOTE_H
#define BLOCK_TEMPLATE_REMOTE_H

#include "system/block-backend.h"
#include "chunks.h"
#include "cluster.h"

/* What a node says it has */
typedef struct RemoteList {
    const ClusterNode *node;
    char *problem;                  /* NULL: it has answered */
    GHashTable *lengths;            /* TemplateDigest -> uint64_t */
} RemoteList;

void remote_list_free(RemoteList *list);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(RemoteList, remote_list_free)

/* Ask one; waits a few seconds at most */
RemoteList *remote_list(const ClusterNode *node);
/* Ask all but @self at the same time */
GPtrArray *remote_list_all(const Cluster *cluster, const ClusterNode *self);
bool remote_has(const RemoteList *list, const TemplateDigest *digest,
                uint64_t *length);

/* Options to open a template of @node with, and a name for messages */
QDict *remote_options(const ClusterNode *node, const TemplateDigest *digest);
char *remote_uri(const ClusterNode *node, const TemplateDigest *digest);
BlockBackend *remote_open(const ClusterNode *node,
                          const TemplateDigest *digest, Error **errp);
/* Without the hashes, and only what that node says; or NULL */
TemplateChunks *remote_chunks_header(const ClusterNode *node,
                                     const TemplateDigest *digest);

#endif
