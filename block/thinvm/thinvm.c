/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The thinvm format driver: registers the name.
 */

#include "qemu/osdep.h"
#include "qemu/module.h"
#include "block/block_int.h"
#include "trace.h"

static int coroutine_fn GRAPH_RDLOCK
thinvm_co_preadv(BlockDriverState *bs, int64_t offset, int64_t bytes,
                 QEMUIOVector *qiov, BdrvRequestFlags flags)
{
    return -ENOTSUP;
}

static BlockDriver bdrv_thinvm = {
    .format_name    = "thinvm",
    .is_format      = true,
    .bdrv_child_perm = bdrv_default_perms,
    .bdrv_co_preadv = thinvm_co_preadv,
};

static void bdrv_thinvm_init(void)
{
    bdrv_register(&bdrv_thinvm);
}

block_init(bdrv_thinvm_init);
