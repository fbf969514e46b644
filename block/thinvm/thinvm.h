/*
 * thinvm driver layer: what thinvm.c, io.c, mode.c, owner.c, worker.c and
 * thinvm-qmp.c share
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The driver layer knows QEMU: nodes, options, modes, migration.  The layers
 * below (store.h, state.h, format.h) do not.
 */
#ifndef BLOCK_THINVM_THINVM_H
#define BLOCK_THINVM_THINVM_H

#include "block/block_int.h"
#include "qapi/qapi-types-thinvm.h"
#include "store.h"

typedef struct BDRVThinvmState BDRVThinvmState;

/*
 * A change of allocation in flight on a range of guest clusters (io.c).
 * Overlapping ones wait for each other (invariant 2); plain overwrites of
 * valid parts take none.
 */
typedef struct ThinvmInflight ThinvmInflight;

struct BDRVThinvmState {
    BlockDriverState *bs;
    ThinvmDevice device;            /* over bs->file; thinvm.c */
    /*
     * NULL only while an open or an activation has not succeeded.  Replaced
     * only while the node is drained.
     */
    ThinvmStore *store;
    unsigned cluster_bits;
    uint64_t cluster_size;          /* bytes */

    /* io.c */
    CoMutex inflight_lock;
    QLIST_HEAD(, ThinvmInflight) inflight;

    /* mode.c: written in the main loop or under mode_lock */
    CoMutex mode_lock;
    ThinvmCacheMode mode;           /* in force; read with qatomic_read() */
    ThinvmCacheMode configured_mode;/* goes back to it after a hand-over */
    bool in_migration;              /* outgoing: mode is forced */
    bool lost;                      /* ownership lost: every write fails */

    /* options */
    uint64_t cache_size;            /* bytes, 0: default of the image */
    uint32_t flush_interval;        /* milliseconds */
    bool force_takeover;
    ThinvmReservation reservation;

    /* owner.c */
    bool owner;                     /* we hold the claim of claim.epoch */
    ThinvmClaim claim;

    /* worker.c */
    struct ThinvmWorker *worker;

    QTAILQ_ENTRY(BDRVThinvmState) link;     /* all nodes; thinvm-qmp.c */
};

/* io.c: the data path.  The BlockDriver callbacks of the same meaning. */
void thinvm_io_init(BDRVThinvmState *s);
void thinvm_io_destroy(BDRVThinvmState *s);
int coroutine_fn GRAPH_RDLOCK
thinvm_co_preadv_part(BlockDriverState *bs, int64_t offset, int64_t bytes,
                      QEMUIOVector *qiov, size_t qiov_offset,
                      BdrvRequestFlags flags);
int coroutine_fn GRAPH_RDLOCK
thinvm_co_pwritev_part(BlockDriverState *bs, int64_t offset, int64_t bytes,
                       QEMUIOVector *qiov, size_t qiov_offset,
                       BdrvRequestFlags flags);
int coroutine_fn GRAPH_RDLOCK
thinvm_co_pwrite_zeroes(BlockDriverState *bs, int64_t offset, int64_t bytes,
                        BdrvRequestFlags flags);
int coroutine_fn GRAPH_RDLOCK
thinvm_co_pdiscard(BlockDriverState *bs, int64_t offset, int64_t bytes);
int coroutine_fn GRAPH_RDLOCK
thinvm_co_block_status(BlockDriverState *bs, bool want_zero, int64_t offset,
                       int64_t bytes, int64_t *pnum, int64_t *map,
                       BlockDriverState **file);
int coroutine_fn GRAPH_RDLOCK
thinvm_co_copy_range_from(BlockDriverState *bs, BdrvChild *src,
                          int64_t src_offset, BdrvChild *dst,
                          int64_t dst_offset, int64_t bytes,
                          BdrvRequestFlags read_flags,
                          BdrvRequestFlags write_flags);
int coroutine_fn GRAPH_RDLOCK
thinvm_co_copy_range_to(BlockDriverState *bs, BdrvChild *src,
                        int64_t src_offset, BdrvChild *dst,
                        int64_t dst_offset, int64_t bytes,
                        BdrvRequestFlags read_flags,
                        BdrvRequestFlags write_flags);
int coroutine_fn GRAPH_RDLOCK
thinvm_co_save_vmstate(BlockDriverState *bs, QEMUIOVector *qiov, int64_t pos);
int coroutine_fn GRAPH_RDLOCK
thinvm_co_load_vmstate(BlockDriverState *bs, QEMUIOVector *qiov, int64_t pos);
/* Bytes [offset, old end) of the last cluster become zeroes; for growing */
int coroutine_fn GRAPH_RDLOCK
thinvm_io_zero_tail(BlockDriverState *bs, uint64_t old_size);
/* Map [offset, offset + bytes) without data: metadata, falloc, full */
int coroutine_fn GRAPH_RDLOCK
thinvm_io_preallocate(BlockDriverState *bs, uint64_t offset, uint64_t bytes,
                      PreallocMode prealloc, Error **errp);

/* mode.c: the machine of the three mapping-cache modes */
/*
 * Before a look-up for reading: in migration mode catches up with the owner.
 */
int coroutine_fn GRAPH_RDLOCK thinvm_mode_begin_read(BlockDriverState *bs);
/*
 * After the data arrived: in migration mode catches up again; *repeat is set
 * when the mapping may have changed, and the data must be read again.
 */
int coroutine_fn GRAPH_RDLOCK thinvm_mode_end_read(BlockDriverState *bs,
                                                   bool *repeat);
/* Before anything that changes the image: ends migration mode (by taking
 * ownership), refuses when lost or read-only. */
int coroutine_fn GRAPH_RDLOCK thinvm_mode_begin_write(BlockDriverState *bs);
/* After an operation was executed, before the request is acknowledged: in
 * write-through mode waits for its record. */
int coroutine_fn GRAPH_RDLOCK thinvm_mode_commit(BlockDriverState *bs,
                                                 uint64_t ticket);
int coroutine_fn GRAPH_RDLOCK thinvm_co_flush_to_os(BlockDriverState *bs);
/* Emits the event when the mode really changes.  @reason: for the event */
int coroutine_fn GRAPH_RDLOCK
thinvm_mode_set(BlockDriverState *bs, ThinvmCacheMode mode,
                const char *reason, Error **errp);

/* owner.c: claims */
/* Read all claims; refuse (message: host, process, what to do) if somebody
 * else's is active and cannot be shown to be gone. */
int coroutine_fn GRAPH_RDLOCK
thinvm_owner_check(BlockDriverState *bs, const QemuUUID *uuid, bool force,
                   uint64_t *next_epoch, Error **errp);
int coroutine_fn GRAPH_RDLOCK
thinvm_owner_claim(BlockDriverState *bs, const QemuUUID *uuid, uint64_t epoch,
                   Error **errp);
int coroutine_fn GRAPH_RDLOCK
thinvm_owner_release(BlockDriverState *bs, ThinvmClaimState state,
                     Error **errp);
/* Is the claim on the device still ours?  After a write error */
int coroutine_fn GRAPH_RDLOCK thinvm_owner_verify(BlockDriverState *bs,
                                                  Error **errp);

/* worker.c: the background coroutine of a writable image: commits each
 * flush_interval, checkpoints, reclaims; respects drain */
void thinvm_worker_start(BDRVThinvmState *s);
void thinvm_worker_stop(BDRVThinvmState *s);     /* waits; main loop */
void thinvm_worker_kick(void *opaque);           /* any thread */
void thinvm_worker_drain_begin(BDRVThinvmState *s);
void thinvm_worker_drain_end(BDRVThinvmState *s);

#endif
