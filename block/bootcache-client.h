/*
 * thinvm boot cache: a reader's connection to the publisher
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A thread of its own for each reader keeps the connection.  So answers are
 * taken whatever the node's AioContext is, while it is drained, and while the
 * main loop is busy; and nothing in QEMU ever waits for a publisher that is
 * stopped or stuck longer than the timeout.
 *
 * The publisher is trusted with contents (he fills the cache), and with
 * nothing else: what he sends is checked, and when he is silent, gone, or
 * another template's, the reader goes on without him.
 */
#ifndef BLOCK_BOOTCACHE_CLIENT_H
#define BLOCK_BOOTCACHE_CLIENT_H

#include "qapi/qapi-types-thinvm.h"
#include "bootcache-map.h"

typedef struct BootcacheClient BootcacheClient;

/* Starts to connect; fails only without a file descriptor for itself */
BootcacheClient *bootcache_client_new(const char *node_name, const char *path,
                                      const BootcacheIdentity *identity,
                                      uint64_t length, uint32_t timeout_ms,
                                      Error **errp);

/* No request may be under way */
void bootcache_client_free(BootcacheClient *c);

/*
 * Until the first attempt to connect has come to an end, which it does
 * within the timeout.  From any thread.
 */
void coroutine_fn bootcache_client_wait_ready(BootcacheClient *c);

/*
 * Have the publisher fetch @count blocks from @block on.  0: they are in the
 * cache.  Else a negative errno, and the caller reads the template itself.
 */
int coroutine_fn bootcache_client_fetch(BootcacheClient *c, uint64_t block,
                                        uint32_t count);

/*
 * Tell the publisher that the guest has booted.  Sent at once or not at all
 * (then with an error): by the time that there is another publisher, it is no
 * longer true of what that one records.  His answer is not waited for.
 */
bool bootcache_client_boot_ended(BootcacheClient *c, Error **errp);

/* What has become of the last one; false if there was none */
bool bootcache_client_boot_end(BootcacheClient *c, ThinvmBootcacheBootEnd *end);

/*
 * The cache; NULL before there was one.  Inside an RCU read section.  It stays
 * when the publisher goes: what is in it remains right.
 */
BootcacheMap *bootcache_client_map(BootcacheClient *c);

bool bootcache_client_connected(BootcacheClient *c);

/* Why there is no connection; NULL if there is one.  To be freed. */
char *bootcache_client_problem(BootcacheClient *c);

#endif /* BLOCK_BOOTCACHE_CLIENT_H */
