/*
 * thinvm data path: block status
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Data path layer; looks up, changes nothing and does no I/O on data.
 */
#include "qemu/osdep.h"
#include "io.h"

/*
 * Ranges of one kind are joined over at most so many look-ups, so that one
 * call has a bound whatever the disk's size.
 */
#define MAX_LOOKUPS     256

/* What is to be said of a range, as bdrv_co_block_status() says it */
typedef struct Status {
    int flags;
    uint64_t device_offset;         /* if BDRV_BLOCK_OFFSET_VALID */
    uint64_t bytes;
} Status;

static int GRAPH_RDLOCK status_of_source(BlockDriverState *bs,
                                         const ThinvmMapping *m)
{
    /* 0: not allocated here; the block layer asks the backing file */
    return thinvm_mapping_source(m) == THINVM_SOURCE_ZERO ?
           BDRV_BLOCK_ZERO : 0;
}

/* The longest range from @offset that @m says one thing of */
static void GRAPH_RDLOCK
status_of_mapping(BlockDriverState *bs, uint64_t offset, uint64_t bytes,
                  const ThinvmMapping *m, Status *status)
{
    BDRVThinvmState *s = bs->opaque;
    unsigned part_bits = thinvm_part_bits(s);
    unsigned first, end;
    bool valid;

    status->bytes = thinvm_clamp(s, offset, bytes, m->count);
    if (m->type != THINVM_MAPPING_DATA) {
        status->flags = status_of_source(bs, m);
        return;
    }

    valid = m->valid == THINVM_ALL_VALID;
    if (m->valid && !valid) {
        first = thinvm_into_cluster(s, offset) >> part_bits;
        valid = m->valid >> first & 1;
        for (end = first + 1; end < THINVM_PARTS; end++) {
            if ((m->valid >> end & 1) != valid) {
                break;
            }
        }
        status->bytes = MIN(status->bytes, ((uint64_t)end << part_bits) -
                                           thinvm_into_cluster(s, offset));
    }

    status->flags = valid ? BDRV_BLOCK_DATA : status_of_source(bs, m);
    if (status->flags) {
        /* allocated, be it for data or for zeroes */
        status->flags |= BDRV_BLOCK_OFFSET_VALID;
        status->device_offset = thinvm_device_offset(s, m, offset);
    }
}

/* Does @next, which begins where @status ends, continue it? */
static bool continues(const Status *status, const Status *next)
{
    if (status->flags != next->flags) {
        return false;
    }
    return !(status->flags & BDRV_BLOCK_OFFSET_VALID) ||
           status->device_offset + status->bytes == next->device_offset;
}

static int coroutine_fn GRAPH_RDLOCK
find_status(BlockDriverState *bs, ThinvmStore *st, uint64_t offset,
            uint64_t bytes, Status *status)
{
    BDRVThinvmState *s = bs->opaque;
    ThinvmMapping m;
    Status next;
    unsigned i;
    int ret;

    *status = (Status) { };
    for (i = 0; i < MAX_LOOKUPS && status->bytes < bytes; i++) {
        uint64_t at = offset + status->bytes;

        ret = thinvm_lookup(s, st, THINVM_TREE_DISK, at, bytes - status->bytes,
                            false, &m);
        if (ret < 0) {
            return ret;
        }
        next = (Status) { };
        status_of_mapping(bs, at, bytes - status->bytes, &m, &next);
        if (i == 0) {
            *status = next;
        } else if (continues(status, &next)) {
            status->bytes += next.bytes;
        } else {
            break;
        }
    }
    return 0;
}

int coroutine_fn GRAPH_RDLOCK
thinvm_co_block_status(BlockDriverState *bs, bool want_zero, int64_t offset,
                       int64_t bytes, int64_t *pnum, int64_t *map,
                       BlockDriverState **file)
{
    BDRVThinvmState *s = bs->opaque;
    Status status = { };
    ThinvmStore *st;
    ThinvmLook look;
    unsigned token;
    int ret;

    do {
        st = qatomic_read(&s->store);
        token = thinvm_store_request_begin(st);
        ret = thinvm_mode_begin_read(bs, st, &look);
        if (ret == 0) {
            ret = find_status(bs, st, offset, bytes, &status);
        }
        thinvm_store_request_end(st, token);
    } while (qatomic_read(&s->store) != st);
    if (ret < 0) {
        return ret;
    }

    *pnum = status.bytes;
    if (status.flags & BDRV_BLOCK_OFFSET_VALID) {
        *map = status.device_offset;
        *file = bs->file->bs;
    }
    return status.flags;
}
