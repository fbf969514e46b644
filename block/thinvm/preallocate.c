/*
 * thinvm data path: preallocation
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Data path layer.  Gives clusters to a range of the disk that has none, for
 * creating and growing:
 *   metadata  clusters are mapped and read as zeroes; nothing is written
 *   falloc    the device is told to read as zeroes there, if it can do so
 *             without being written to; else like metadata
 *   full      zeroes are written
 * Where the device itself holds zeroes the clusters are mapped as valid, so
 * that a write of the guest later changes no metadata at all.  Invariant 1 of
 * the design (section 4): they are mapped only after the zeroes are there.
 */
#include "qemu/osdep.h"
#include "io.h"
#include "trace.h"

/* Bytes of zeroes that one write of a full preallocation has */
#define ZERO_BUFFER_SIZE    (2 * MiB)
/* Operations between two looks at the event loop */
#define STEPS_AT_A_TIME     64

typedef struct Preallocation {
    BlockDriverState *bs;
    PreallocMode mode;
    void *zeroes;               /* ZERO_BUFFER_SIZE bytes, for full */
    uint64_t goal;              /* cluster on the device to go on at */
    uint64_t ticket;
} Preallocation;

static int coroutine_fn GRAPH_RDLOCK
write_zeroes(Preallocation *p, uint64_t device_offset, uint64_t bytes)
{
    BlockDriverState *bs = p->bs;
    BDRVThinvmState *s = bs->opaque;
    uint64_t step;
    int ret = 0;

    for (; bytes && ret == 0; bytes -= step) {
        step = MIN(bytes, ZERO_BUFFER_SIZE);
        BLKDBG_CO_EVENT(bs->file, BLKDBG_WRITE_AIO);
        if (!thinvm_still_owner(s)) {
            return -EIO;
        }
        ret = bdrv_co_pwrite(bs->file, device_offset, step, p->zeroes, 0);
        device_offset += step;
    }
    return ret;
}

/* Make the device hold zeroes.  *zeroed: it does */
static int coroutine_fn GRAPH_RDLOCK
zero_device(Preallocation *p, uint64_t physical, uint64_t count, bool *zeroed)
{
    BDRVThinvmState *s = p->bs->opaque;
    uint64_t device_offset = physical << s->cluster_bits;
    uint64_t bytes = count << s->cluster_bits;
    int ret;

    *zeroed = false;
    if (!thinvm_still_owner(s)) {
        return -EIO;
    }
    switch (p->mode) {
    case PREALLOC_MODE_FALLOC:
        ret = bdrv_co_pwrite_zeroes(p->bs->file, device_offset, bytes,
                                    BDRV_REQ_NO_FALLBACK);
        if (ret == -ENOTSUP) {
            return 0;
        }
        break;
    case PREALLOC_MODE_FULL:
        ret = write_zeroes(p, device_offset, bytes);
        break;
    default:
        return 0;
    }
    if (ret < 0) {
        thinvm_mode_write_failed(p->bs);
        return ret;
    }
    *zeroed = true;
    return 0;
}

static int coroutine_fn GRAPH_RDLOCK
map_clusters(Preallocation *p, uint64_t first, uint64_t count,
             uint64_t physical, bool zeroed, Error **errp)
{
    BDRVThinvmState *s = p->bs->opaque;
    bool run = count == THINVM_ENTRIES_PER_LEAF &&
               first % THINVM_ENTRIES_PER_LEAF == 0;
    ThinvmOp op = {
        .type = run ? THINVM_OP_MAP_RUN : THINVM_OP_MAP,
        .tree = THINVM_TREE_DISK,
        .guest = first,
        .count = run ? 0 : count,
        .physical = physical,
        .valid = zeroed ? THINVM_ALL_VALID : 0,
        .source = run || zeroed ? 0 : THINVM_SOURCE_ZERO,
    };
    uint64_t ticket = 0;
    int ret = thinvm_store_execute(s->store, &op, &ticket, errp);

    p->ticket = MAX(p->ticket, ticket);
    return ret;
}

/* Registered alone on *count clusters; *count becomes how many were done */
static int coroutine_fn GRAPH_RDLOCK
allocate_registered(Preallocation *p, uint64_t first, uint64_t *count,
                    Error **errp)
{
    BDRVThinvmState *s = p->bs->opaque;
    uint64_t physical, nb_clusters;
    ThinvmMapping m;
    bool zeroed;
    int ret;

    ret = thinvm_store_lookup(s->store, THINVM_TREE_DISK, NULL, first, *count,
                              true, &m);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not look up the mapping");
        return ret;
    }
    *count = MIN(*count, m.count);
    if (m.type == THINVM_MAPPING_DATA) {
        return 0;
    }
    ret = thinvm_volume_reserve(s, s->store, p->goal, *count, &physical,
                                &nb_clusters);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not reserve %" PRIu64
                         " clusters for preallocation", *count);
        return ret;
    }
    *count = nb_clusters;

    ret = zero_device(p, physical, nb_clusters, &zeroed);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not zero preallocated clusters");
    } else {
        ret = map_clusters(p, first, nb_clusters, physical, zeroed, errp);
    }
    if (ret < 0) {
        thinvm_store_unreserve(s->store, physical, nb_clusters);
        return ret;
    }
    p->goal = physical + nb_clusters;
    return 0;
}

/*
 * Is there room for all of it?  A device that cannot grow is refused before
 * anything is done, and by name of what it lacks.
 */
static int coroutine_fn GRAPH_RDLOCK
check_room(Preallocation *p, uint64_t clusters, Error **errp)
{
    BlockDriverState *bs = p->bs;
    BDRVThinvmState *s = bs->opaque;
    uint64_t runs = p->mode == PREALLOC_MODE_FULL ? 0 :
                    clusters / THINVM_ENTRIES_PER_LEAF;
    ThinvmState *state = thinvm_store_state(s->store);
    uint64_t metadata, needed;
    ThinvmInfoState info;
    int64_t length;

    thinvm_state_lock(state);
    thinvm_state_info(state, &info);
    metadata = thinvm_space_for_unwritten_runs(state, runs);
    thinvm_state_unlock(state);
    if (clusters + metadata <= info.available_clusters) {
        return 0;
    }
    needed = (info.device_clusters - info.available_clusters + clusters +
              metadata) << s->cluster_bits;
    length = bdrv_co_getlength(bs->file->bs);
    if (length >= 0 && length < needed &&
        bdrv_co_truncate(bs->file, needed, false, PREALLOC_MODE_OFF, 0,
                         NULL) < 0) {
        error_setg(errp, "The device has %" PRId64 " bytes and cannot be "
                   "enlarged; with preallocation it needs at least %" PRIu64
                   ": %" PRIu64 " more for data, and %" PRIu64 " for metadata,"
                   " with which writing there cannot run out of space",
                   length, needed, clusters << s->cluster_bits,
                   metadata << s->cluster_bits);
        return -ENOSPC;
    }
    return 0;
}

static int coroutine_fn GRAPH_RDLOCK
preallocate_clusters(Preallocation *p, uint64_t first, uint64_t end,
                     Error **errp)
{
    BDRVThinvmState *s = p->bs->opaque;
    ThinvmInflight inflight;
    uint64_t count;
    unsigned steps = 0;
    int ret = 0;

    while (first < end && ret == 0) {
        count = MIN(end - first, THINVM_ENTRIES_PER_LEAF -
                                 first % THINVM_ENTRIES_PER_LEAF);
        thinvm_inflight_begin_exclusive(s, &inflight, THINVM_TREE_DISK, first,
                                        count);
        ret = allocate_registered(p, first, &count, errp);
        thinvm_inflight_end_request(s, &inflight);
        first += count;
        if (++steps % STEPS_AT_A_TIME == 0) {
            qemu_co_sleep_ns(QEMU_CLOCK_REALTIME, 0);
        }
    }
    return ret;
}

int coroutine_fn GRAPH_RDLOCK
thinvm_io_preallocate(BlockDriverState *bs, uint64_t offset, uint64_t bytes,
                      PreallocMode prealloc, Error **errp)
{
    BDRVThinvmState *s = bs->opaque;
    Preallocation p = { .bs = bs, .mode = prealloc };
    unsigned token;
    int ret;

    if (prealloc == PREALLOC_MODE_OFF || !bytes) {
        return 0;
    }
    ret = thinvm_mode_begin_write(bs);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "The image cannot be written");
        return ret;
    }
    if (prealloc == PREALLOC_MODE_FULL) {
        p.zeroes = qemu_try_blockalign0(bs->file->bs, ZERO_BUFFER_SIZE);
        if (!p.zeroes) {
            error_setg(errp, "Could not allocate a buffer of zeroes");
            return -ENOMEM;
        }
    }

    trace_thinvm_preallocate(bs, offset, bytes, prealloc);
    ret = check_room(&p, DIV_ROUND_UP(offset + bytes, s->cluster_size) -
                     (offset >> s->cluster_bits), errp);
    if (ret < 0) {
        qemu_vfree(p.zeroes);
        return ret;
    }
    qatomic_inc(&s->preallocating);
    token = thinvm_store_request_begin(s->store);
    ret = preallocate_clusters(&p, offset >> s->cluster_bits,
                               DIV_ROUND_UP(offset + bytes, s->cluster_size),
                               errp);
    thinvm_store_request_end(s->store, token);
    qatomic_dec(&s->preallocating);
    qemu_vfree(p.zeroes);

    if (ret == 0 && p.ticket) {
        ret = thinvm_mode_commit(bs, p.ticket);
        if (ret < 0) {
            error_setg_errno(errp, -ret, "Could not commit the mapping");
        }
    }
    return ret;
}
