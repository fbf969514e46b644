/*
 * thinvm data path: what its files share
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Data path layer: guest requests become look-ups, I/O on the file child, and
 * operations.  io-read.c and io-write.c work on any of the trees
 * (THINVM_TREE_*), so that VM state takes the same way as the disk.
 */
#ifndef BLOCK_THINVM_IO_H
#define BLOCK_THINVM_IO_H

#include "qemu/memalign.h"
#include "block/block-io.h"
#include "thinvm.h"
#include "inflight.h"

/* Chunks of one request that are worked on at the same time */
#define THINVM_IO_WORKERS   8

static inline unsigned thinvm_part_bits(const BDRVThinvmState *s)
{
    return s->cluster_bits - THINVM_PART_BITS;
}

static inline uint64_t thinvm_into_cluster(const BDRVThinvmState *s,
                                           uint64_t offset)
{
    return offset & (s->cluster_size - 1);
}

/* Clusters that [offset, offset + bytes) touches; bytes is not 0 */
static inline uint64_t thinvm_clusters_touched(const BDRVThinvmState *s,
                                               uint64_t offset, uint64_t bytes)
{
    return ((offset + bytes - 1) >> s->cluster_bits) -
           (offset >> s->cluster_bits) + 1;
}

/* Bytes of [offset, offset + bytes) that lie in the first @count clusters */
static inline uint64_t thinvm_clamp(const BDRVThinvmState *s, uint64_t offset,
                                    uint64_t bytes, uint64_t count)
{
    uint64_t first = offset >> s->cluster_bits;

    /* without overflow where @count is as large as can be */
    if (thinvm_clusters_touched(s, offset, bytes) <= count) {
        return bytes;
    }
    return ((first + count) << s->cluster_bits) - offset;
}

/*
 * Valid bits of the parts that [offset, offset + bytes) touches in the
 * cluster of @offset; it may reach beyond that cluster.
 */
static inline uint16_t thinvm_parts_touched(const BDRVThinvmState *s,
                                            uint64_t offset, uint64_t bytes)
{
    uint64_t into = thinvm_into_cluster(s, offset);
    uint64_t end = MIN(into + bytes, s->cluster_size);
    unsigned first = into >> thinvm_part_bits(s);
    unsigned last = (end - 1) >> thinvm_part_bits(s);

    return (2u << last) - (1u << first);
}

/* A cluster that may be written where it is */
static inline bool thinvm_mapping_private(const ThinvmMapping *m)
{
    return m->type == THINVM_MAPPING_DATA && !m->shared;
}

/* Some parts are valid, and some are not */
static inline bool thinvm_mapping_mixed(const ThinvmMapping *m)
{
    return m->type == THINVM_MAPPING_DATA && m->valid &&
           m->valid != THINVM_ALL_VALID;
}

/* Where the invalid parts of any mapping read from */
static inline ThinvmSource thinvm_mapping_source(const ThinvmMapping *m)
{
    switch (m->type) {
    case THINVM_MAPPING_NONE:
        return THINVM_SOURCE_BACKING;
    case THINVM_MAPPING_ZERO:
        return THINVM_SOURCE_ZERO;
    case THINVM_MAPPING_DATA:
        return m->source;
    }
    g_assert_not_reached();
}

/*
 * To be asked when all that had to be waited for has been, right before data
 * are written.  A request passed thinvm_mode_begin_write(), but ownership can
 * be lost at any time after (thinvm_mode_lose()), and the place that was found
 * or reserved is the new owner's to give away.  May wait for a look at the
 * claim.
 */
static inline bool coroutine_fn GRAPH_RDLOCK
thinvm_still_owner(BDRVThinvmState *s)
{
    return likely(qatomic_read(&s->owner)) && thinvm_claim_counts(s);
}

/*
 * Is there a backing file, be it that it is not opened?  If not, what is
 * invalid in a new cluster may as well be known as zeroes.
 */
bool GRAPH_RDLOCK thinvm_has_backing(BlockDriverState *bs);
/* There is one, and it is not opened */
bool GRAPH_RDLOCK thinvm_backing_is_closed(BlockDriverState *bs);

static inline bool GRAPH_RDLOCK
thinvm_source_is_zero(BlockDriverState *bs, int tree, ThinvmSource source)
{
    return source == THINVM_SOURCE_ZERO || tree != THINVM_TREE_DISK ||
           !bs->backing;
}

/*
 * Clusters from @offset on that are mapped alike: all valid, none valid, or
 * one that is mixed.
 * @st: what s->store was when the request began.  For writing it stays what
 * it was; a reader may be running while an activation replaces it.
 */
static inline int coroutine_fn
thinvm_lookup(BDRVThinvmState *s, ThinvmStore *st, int tree, uint64_t offset,
              uint64_t bytes, bool for_write, ThinvmMapping *m)
{
    uint64_t guest = offset >> s->cluster_bits;
    uint64_t count = thinvm_clusters_touched(s, offset, bytes);
    int ret;

    if (unlikely(s->view && tree == THINVM_TREE_DISK)) {
        ret = thinvm_store_lookup_snapshot(st, &s->view_name, guest, count, m);
        if (ret == -ENOENT) {
            /* It may be there again, after a power cut: then @m says nothing */
            ret = thinvm_snapshot_still_there(s->bs, st) ?: -EIO;
        }
    } else {
        ret = thinvm_store_lookup(st, tree, NULL, guest, count, for_write, m);
    }
    if (ret == 0 && thinvm_mapping_mixed(m)) {
        /* there may be more that look the same; they are taken one by one */
        m->count = 1;
    }
    return ret;
}

/* Byte on the device of guest byte @offset, which @m covers */
static inline uint64_t thinvm_device_offset(const BDRVThinvmState *s,
                                            const ThinvmMapping *m,
                                            uint64_t offset)
{
    return (m->physical << s->cluster_bits) +
           (offset - (m->guest << s->cluster_bits));
}

/* An operation failed: trace, or if metadata are damaged tell, what; frees
 * @err and passes @ret on */
int thinvm_io_report(BlockDriverState *bs, int ret, Error *err);

/*
 * Read what is behind an invalid part: from the backing file, or zeroes.
 */
int coroutine_fn GRAPH_RDLOCK
thinvm_io_read_source(BlockDriverState *bs, int tree, ThinvmSource source,
                      uint64_t offset, uint64_t bytes, QEMUIOVector *qiov,
                      size_t qiov_offset, BdrvRequestFlags flags);
/*
 * May [offset, offset + bytes), which @m covers, be read from the template?
 * By the same look-up that says where the image has it: while it is marked
 * nothing else has been written there.
 */
bool GRAPH_RDLOCK thinvm_io_in_template(BlockDriverState *bs,
                                        const ThinvmMapping *m,
                                        uint64_t offset, uint64_t bytes);
/* If this fails the image has it too */
int coroutine_fn GRAPH_RDLOCK
thinvm_io_read_template(BlockDriverState *bs, uint64_t offset, uint64_t bytes,
                        QEMUIOVector *qiov, size_t qiov_offset,
                        BdrvRequestFlags flags);
/* A whole request: epoch, mode, and all; any offset and length in bytes */
int coroutine_fn GRAPH_RDLOCK
thinvm_io_read(BlockDriverState *bs, int tree, uint64_t offset, uint64_t bytes,
               QEMUIOVector *qiov, size_t qiov_offset, BdrvRequestFlags flags);
int coroutine_fn GRAPH_RDLOCK
thinvm_io_write(BlockDriverState *bs, int tree, uint64_t offset,
                uint64_t bytes, QEMUIOVector *qiov, size_t qiov_offset,
                BdrvRequestFlags flags);

#endif
