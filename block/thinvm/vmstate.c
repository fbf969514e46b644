/*
 * thinvm data path: the state of the virtual machine
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Data path layer.  VM state lies in a mapping tree of its own, which takes
 * the same way as the disk's.  savevm writes it from position 0 on and then
 * creates the snapshot, which takes the tree; loadvm goes to the snapshot
 * first, which makes its tree the active one.  Positions and lengths are any
 * numbers of bytes.
 */
#include "qemu/osdep.h"
#include "io.h"
#include "trace.h"

static uint64_t vmstate_size(BDRVThinvmState *s)
{
    ThinvmState *state = thinvm_store_state(s->store);
    ThinvmInfoState info;

    thinvm_state_lock(state);
    thinvm_state_info(state, &info);
    thinvm_state_unlock(state);
    return info.vmstate_size;
}

static int coroutine_fn GRAPH_RDLOCK grow_vmstate(BlockDriverState *bs,
                                                  uint64_t size)
{
    BDRVThinvmState *s = bs->opaque;
    uint64_t ticket = 0;
    Error *err = NULL;
    ThinvmOp op = {
        .type = THINVM_OP_VMSTATE_SIZE,
        .value = size,
    };
    int ret;

    if (size <= vmstate_size(s)) {
        return 0;
    }
    ret = thinvm_store_execute(s->store, &op, &ticket, &err);
    if (ret < 0) {
        return thinvm_io_report(bs, ret, err);
    }
    return thinvm_mode_commit(bs, ticket);
}

static bool position_ok(BDRVThinvmState *s, int64_t pos, size_t size)
{
    uint64_t limit = THINVM_MAX_GUEST_CLUSTERS << s->cluster_bits;

    return pos >= 0 && pos <= limit && size <= limit - pos;
}

int coroutine_fn GRAPH_RDLOCK
thinvm_co_save_vmstate(BlockDriverState *bs, QEMUIOVector *qiov, int64_t pos)
{
    int ret;

    if (!position_ok(bs->opaque, pos, qiov->size)) {
        return -EFBIG;
    }
    ret = thinvm_io_write(bs, THINVM_TREE_VMSTATE, pos, qiov->size, qiov, 0,
                          0);
    if (ret < 0) {
        return ret;
    }
    trace_thinvm_save_vmstate(bs, pos, qiov->size);
    return grow_vmstate(bs, pos + qiov->size);
}

int coroutine_fn GRAPH_RDLOCK
thinvm_co_load_vmstate(BlockDriverState *bs, QEMUIOVector *qiov, int64_t pos)
{
    BDRVThinvmState *s = bs->opaque;
    uint64_t size = vmstate_size(s);
    uint64_t inside;
    int ret = 0;

    if (!position_ok(s, pos, qiov->size)) {
        return -EFBIG;
    }
    inside = pos < size ? MIN(qiov->size, size - pos) : 0;
    if (inside) {
        ret = thinvm_io_read(bs, THINVM_TREE_VMSTATE, pos, inside, qiov, 0, 0);
    }
    /* readers read by blocks, beyond the end of what was saved */
    qemu_iovec_memset(qiov, inside, 0, qiov->size - inside);
    return ret;
}
