/*
 * thinvm template store: connections to other nodes that never hang
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * An NBD client for threads: it reads, one request at a time, and gives up
 * when the node is silent for too long, or when it is told to.
 */

#ifndef BLOCK_TEMPLATE_LINK_H
#define BLOCK_TEMPLATE_LINK_H

#include "cluster.h"

/* Buffers to read into have room for a multiple of this */
#define LINK_ALIGNMENT      4096

typedef struct Link Link;

uint64_t link_size(const Link *link);
void link_free(Link *link);

/*
 * How long to wait from now on: for a node that is silent, and some times that
 * for one that trickles.  @stop_fd, unless it is -1, becomes readable to end
 * it.
 */
typedef struct LinkPatience {
    uint32_t silence_ms;
    int64_t deadline;
    int stop_fd;
} LinkPatience;

LinkPatience link_patience(uint32_t silence_ms, int stop_fd);

bool link_read(Link *link, uint64_t offset, uint64_t bytes, uint8_t *buf,
               const LinkPatience *patience, Error **errp);
/* That failed since the node's disk cannot read it; else @link is fine */
bool link_unreadable(const Link *link);
/* As far as can be told without asking */
bool link_alive(const Link *link);

/*
 * Connecting, and reading @bytes at once, in a thread of its own: connect()
 * and name servers may take minutes, and cannot be interrupted.
 */
typedef struct LinkTask LinkTask;

LinkTask *link_task_start(const ClusterNode *node, const char *export,
                          uint64_t offset, uint32_t bytes,
                          uint32_t silence_ms);
/* Has it ended?  Waits until @wait_ms have passed. */
bool link_task_wait(LinkTask *task, int64_t wait_ms);
/* Did the node answer at all? */
bool link_task_connected(LinkTask *task);
/*
 * The task is gone then.  NULL if it failed, or has not ended, which is an
 * error, too.  @buf, unless NULL, gets what was read, to be freed with
 * qemu_vfree().
 */
Link *link_task_finish(LinkTask *task, uint8_t **buf, Error **errp);

#endif
