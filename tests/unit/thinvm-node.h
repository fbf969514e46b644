/*
 * A node with the driver's own data path, for thinvm's unit tests
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Links io-read.c, io-write.c, io-zero.c and inflight.c; what these need of
 * the block layer and of the rest of the driver is replaced by the least that
 * does: a node that owns its image, in write-back mode, without backing file or
 * template, over the ThinvmDevice that its store is on.
 */
#ifndef TESTS_UNIT_THINVM_NODE_H
#define TESTS_UNIT_THINVM_NODE_H

#include "block/thinvm/io.h"

/* A node whose disk has @size bytes, over @st; any context */
BlockDriverState *test_node_new(ThinvmStore *st, uint64_t size);
void test_node_free(BlockDriverState *bs);

/* Called, unless NULL, where blkdebug would see an event; may wait */
extern void coroutine_fn (*test_node_event)(BlkdebugEvent event);

#endif
