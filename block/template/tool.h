/*
 * thinvm-template: what its commands share
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef BLOCK_TEMPLATE_TOOL_H
#define BLOCK_TEMPLATE_TOOL_H

#include "placement.h"
#include "remote.h"
#include "transfer.h"

/* Exit statuses */
enum {
    TOOL_OK = 0,
    TOOL_FAILED = 1,
    TOOL_INCOMPLETE = 2,        /* damage is left, or a copy is missing */
};

typedef struct Tool {
    Cluster *cluster;
    Placement *placement;
    ClusterNode *node;          /* this one */
    GPtrArray *stores;          /* of TemplateStore: this node's disks */
    GPtrArray *lists;           /* tool_lists() */
    int argc;                   /* after the options */
    char **argv;

    /* Options, of which each command has some */
    bool all, cluster_wide, driver, failover, image_opts, json, keep, progress;
    bool uri;
    const char *chunk_size, *digest, *format, *node_name, *range;
    const char *given_config, *given_node;      /* NULL: the defaults */
} Tool;

int tool_init(Tool *t);
int tool_add(Tool *t);
int tool_list(Tool *t);
int tool_locate(Tool *t);
int tool_rebalance(Tool *t);
int tool_remove(Tool *t);
int tool_repair(Tool *t);
int tool_serve(Tool *t);
int tool_verify(Tool *t);

/* template_receive() and template_verify(), showing progress if wanted */
bool tool_receive(Tool *t, TemplateStore *s, BlockBackend *blk,
                  const TemplateDigest *expected, bool replace,
                  uint32_t chunk_size, TemplateDigest *digest, bool *existed,
                  Error **errp);
bool tool_verify_copy(Tool *t, TemplateStore *s, const TemplateDigest *digest,
                      uint64_t offset, uint64_t bytes, uint32_t chunk_size,
                      TemplateFindings *f, Error **errp);

/* The store on @disk, or NULL */
TemplateStore *tool_store_of(Tool *t, const ClusterDisk *disk);
/* Where a template of unknown digest is brought in */
TemplateStore *tool_first_store(Tool *t, Error **errp);
/* A whole copy that may be used, on a disk of this node; NULL if none */
TemplateStore *tool_local_copy(Tool *t, const TemplateDigest *digest);
/* Was it removed from a disk of this node, where somebody still has it open? */
bool tool_is_marked(Tool *t, const TemplateDigest *digest);

/*
 * Templates that a command is about: of the command line, or else all that
 * this node has.  NULL if a name is not right.
 */
GArray *tool_digests(Tool *t, Error **errp);

/*
 * What the other nodes say that they have, of RemoteList; asked for once, and
 * again if @anew.
 */
GPtrArray *tool_lists(Tool *t, bool anew);

/* Another copy of a template to read from */
typedef struct ToolReplica {
    char *where;
    BlockBackend *blk;
    TemplateStore *store;       /* where it is: one of the two is NULL */
    const ClusterNode *node;
} ToolReplica;

/*
 * Open all other copies that can be reached, but the one on @except; those of
 * this node come first.
 */
GPtrArray *tool_replicas(Tool *t, const TemplateDigest *digest,
                         const TemplateStore *except);

/*
 * Of that copy, so that another one can have the same hashes; 0 if it does not
 * tell, or something impossible.
 */
uint32_t tool_chunk_size_of(const ToolReplica *r,
                            const TemplateDigest *digest);

#endif
