/*
 * thinvm durability layer: reading the journal's ring
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * For replay.c: record after record, each judged before it is believed, and
 * the difference between a journal that ends and one that is damaged.  A
 * record that continues the journal has the sequence behind the one before,
 * names that one's checksum, has no lower epoch, and its own checksum is
 * right (design section 3).  No state; writes nothing; whatever a hostile
 * journal says, reads no more than the ring and takes no more memory than a
 * window of it (invariant 3).
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qapi/qapi-types-block-core.h"
#include "ring.h"
#include "trace.h"

/*
 * Behind what is read in full the scan samples the rest, lest a longer hole
 * hides all of that; bytes
 */
#define THINVM_SCAN_SAMPLE          (64 * KiB)
#define THINVM_SCAN_STRIDE          (1 * MiB)
#define THINVM_SCAN_MAX_SAMPLES     64

void thinvm_ring_init(ThinvmRing *ring, ThinvmStore *st,
                      const ThinvmSuperblock *sb, uint32_t window)
{
    *ring = (ThinvmRing) {
        .st = st,
        .offset = sb->journal_offset,
        .size = sb->journal_size,
        .window = window,
    };
}

void thinvm_ring_destroy(ThinvmRing *ring)
{
    g_free(ring->buf);
}

int coroutine_fn thinvm_ring_get(ThinvmRing *ring, uint64_t position,
                                 uint32_t bytes, const uint8_t **data)
{
    uint32_t window = MAX(ring->window, bytes);
    uint64_t start = position % ring->size;
    uint64_t first;
    int ret;

    if (ring->length && position >= ring->start &&
        position + bytes <= ring->start + ring->length) {
        *data = ring->buf + (position - ring->start);
        return 0;
    }
    window = MIN(window, ring->size);
    ring->buf = g_realloc(ring->buf, window);
    ring->length = 0;
    first = MIN(window, ring->size - start);
    ret = thinvm_store_pread(ring->st, ring->offset + start, first, ring->buf,
                             BLKDBG_THINVM_JOURNAL_READ);
    if (ret == 0 && first < window) {
        ret = thinvm_store_pread(ring->st, ring->offset, window - first,
                                 ring->buf + first, BLKDBG_THINVM_JOURNAL_READ);
    }
    if (ret == 0) {
        ring->start = position;
        ring->length = window;
        *data = ring->buf;
    }
    return ret;
}

/* A record by its own right */
static int coroutine_fn next_record(ThinvmRing *ring,
                                    const ThinvmPosition *pos,
                                    ThinvmRecord *rec, const uint8_t **data)
{
    uint32_t size;
    int ret, known;

    ret = thinvm_ring_get(ring, pos->head, THINVM_PAGE_SIZE, data);
    if (ret < 0) {
        return ret;
    }
    /* -ENOTSUP: fields that a later version may have given a meaning */
    known = thinvm_record_decode_header(rec, *data);
    if ((known < 0 && known != -ENOTSUP) ||
        rec->sequence != pos->sequence + 1 || rec->epoch < pos->epoch) {
        return THINVM_NEXT_NONE;
    }
    size = ROUND_UP(rec->length, THINVM_PAGE_SIZE);
    if (rec->length > THINVM_RECORD_MAX_SIZE || size > ring->size) {
        return THINVM_NEXT_NONE;
    }
    ret = thinvm_ring_get(ring, pos->head, size, data);
    if (ret < 0) {
        return ret;
    }
    if (thinvm_record_decode_header(rec, *data) != known ||
        rec->length > size ||
        !thinvm_record_checksum_ok(&ring->st->uuid, *data, rec)) {
        return THINVM_NEXT_TORN;
    }
    if (known < 0) {
        return known;       /* whole, ours, and not to be passed over */
    }
    if (rec->previous_crc != pos->crc) {
        return THINVM_NEXT_FOREIGN;
    }
    /* No writer goes on before it has flushed one with checksums */
    return pos->summed && rec->flushed_sequence < pos->sequence
           ? THINVM_NEXT_NONE : THINVM_NEXT_RECORD;
}

/* 1: the data have these checksums; 0: they have not */
static int coroutine_fn check_data(ThinvmStore *st, const uint8_t *sums,
                                   uint32_t nb_sums)
{
    g_autofree uint8_t *buf = g_malloc(THINVM_SUM_MAX_BYTES);
    ThinvmDataSum sum;
    int ret;

    /* Lest it be beyond the end that the block layer remembers */
    st->dev->co_length(st->dev);
    for (uint32_t i = 0; i < nb_sums; i++) {
        if (thinvm_data_sum_decode(&sum, sums + i * sizeof(ThinvmDataSumLe))) {
            return 0;
        }
        ret = thinvm_store_pread(st, sum.offset, sum.bytes, buf,
                                 BLKDBG_THINVM_JOURNAL_READ);
        if (ret < 0) {
            return ret;
        }
        if (thinvm_checksum(&st->uuid, THINVM_SUM_DATA, sum.offset, buf,
                            sum.bytes) != sum.crc) {
            return 0;
        }
    }
    return 1;
}

/* 1: there is a record behind @pos; 0: there is not */
static int coroutine_fn has_next(ThinvmRing *ring, const ThinvmPosition *pos)
{
    ThinvmRecord rec;
    const uint8_t *data;
    int ret = next_record(ring, pos, &rec, &data);

    return ret == -ENOTSUP || ret == THINVM_NEXT_RECORD ? 1 : MIN(ret, 0);
}

/*
 * A record with checksums of data counts if there is one behind it, or if the
 * data are right.  If an owner lives they may have been right: then the record
 * behind was there before they were overwritten, so it is looked for again.
 * @next: the position behind the record.
 */
static int coroutine_fn counts(ThinvmRing *ring, const ThinvmPosition *next,
                               const uint8_t *sums, uint32_t nb_sums)
{
    int ret = has_next(ring, next);

    if (ret == 0) {
        ret = check_data(ring->st, sums, nb_sums);
        trace_thinvm_sums_checked(ring->st, next->sequence, nb_sums, ret);
    }
    if (ret == 0) {
        ring->length = 0;
        ret = has_next(ring, next);
    }
    return ret;
}

static const uint8_t *sums_of(const ThinvmRecord *rec, const uint8_t *data)
{
    return data + thinvm_record_operations_end(rec);
}

int coroutine_fn thinvm_ring_next(ThinvmRing *ring, const ThinvmPosition *pos,
                                  ThinvmRecord *rec, const uint8_t **data)
{
    g_autofree uint8_t *copy = NULL;
    ThinvmPosition next = *pos;
    int ret = next_record(ring, pos, rec, data);

    if (ret != THINVM_NEXT_RECORD || !rec->nb_sums) {
        return ret;
    }
    copy = g_memdup2(*data, rec->length);
    thinvm_ring_advance(&next, rec);
    ret = counts(ring, &next, sums_of(rec, copy), rec->nb_sums);
    if (ret <= 0) {
        return ret < 0 ? ret : THINVM_NEXT_DATA;
    }
    /* What was looked at may have taken its place in the window */
    ret = thinvm_ring_get(ring, pos->head, rec->length, data);
    if (ret == 0 && memcmp(*data, copy, rec->length)) {
        return THINVM_NEXT_TORN;
    }
    return ret < 0 ? ret : THINVM_NEXT_RECORD;
}

int coroutine_fn thinvm_ring_last_counts(ThinvmRing *ring,
                                         const ThinvmPosition *pos)
{
    g_autofree uint8_t *copy = NULL;
    uint32_t size = MIN(pos->head - pos->last, THINVM_RECORD_MAX_SIZE);
    const uint8_t *data;
    ThinvmRecord rec;
    int ret;

    if (!pos->summed) {
        return 1;
    }
    ret = thinvm_ring_get(ring, pos->last, size, &data);
    if (ret < 0) {
        return ret;
    }
    /* Another record in its place is for others to find */
    if (thinvm_record_decode_header(&rec, data) < 0 || rec.length > size ||
        rec.crc != pos->crc || rec.sequence != pos->sequence) {
        return has_next(ring, pos);
    }
    copy = g_memdup2(data, rec.length);
    return counts(ring, pos, sums_of(&rec, copy), rec.nb_sums);
}

void thinvm_ring_advance(ThinvmPosition *pos, const ThinvmRecord *rec)
{
    pos->last = pos->head;
    pos->head += ROUND_UP(rec->length, THINVM_PAGE_SIZE);
    pos->sequence = rec->sequence;
    pos->epoch = rec->epoch;
    pos->crc = rec->crc;
    pos->summed = rec->nb_sums > 0;
}

/*
 * Is there a record at @p that says that the one which is missing at the head
 * was durable?  0, -EBADMSG with @errp naming both, or another errno.
 */
static int coroutine_fn check_witness(ThinvmRing *ring,
                                      const ThinvmPosition *pos, uint64_t p,
                                      Error **errp)
{
    uint64_t bad = pos->sequence + 1;
    ThinvmRecord rec;
    const uint8_t *data;
    uint32_t size;
    int ret = thinvm_ring_get(ring, p, THINVM_PAGE_SIZE, &data);

    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not read the journal at byte %"
                         PRIu64, p % ring->size);
        return ret;
    }
    if (thinvm_record_decode_header(&rec, data) < 0 || rec.sequence < bad ||
        rec.epoch < pos->epoch || rec.flushed_sequence < bad ||
        rec.length > THINVM_RECORD_MAX_SIZE) {
        return 0;
    }
    size = MIN(ROUND_UP(rec.length, THINVM_PAGE_SIZE), ring->size);
    ret = thinvm_ring_get(ring, p, size, &data);
    if (ret < 0 || rec.length > size ||
        !thinvm_record_checksum_ok(&ring->st->uuid, data, &rec)) {
        return 0;
    }
    error_setg(errp, "Journal record %" PRIu64 " at byte %" PRIu64 " of the "
               "journal is damaged: record %" PRIu64 " at byte %" PRIu64
               " says that it was durable", bad, pos->head % ring->size,
               rec.sequence, p % ring->size);
    return -EBADMSG;
}

static int coroutine_fn check_range(ThinvmRing *ring, const ThinvmPosition *pos,
                                    uint64_t start, uint64_t end, Error **errp)
{
    int ret = 0;

    for (; start < end && ret == 0; start += THINVM_PAGE_SIZE) {
        ret = check_witness(ring, pos, start, errp);
    }
    return ret;
}

int coroutine_fn thinvm_ring_check_end(ThinvmRing *ring,
                                       const ThinvmPosition *pos,
                                       uint64_t dense, bool samples,
                                       Error **errp)
{
    uint64_t end = pos->head + ring->size;
    uint64_t p = MIN(end, pos->head + dense);
    uint64_t stride;
    int ret = check_range(ring, pos, pos->head, p, errp);

    if (!samples) {
        return ret;
    }
    stride = MAX(THINVM_SCAN_STRIDE,
                 ROUND_UP((end - p) / THINVM_SCAN_MAX_SAMPLES,
                          THINVM_PAGE_SIZE));
    ring->window = THINVM_SCAN_SAMPLE;
    for (; p < end && ret == 0; p += stride) {
        ret = check_range(ring, pos, p, MIN(end, p + THINVM_SCAN_SAMPLE),
                          errp);
    }
    ring->window = THINVM_RING_WINDOW;
    return ret;
}
