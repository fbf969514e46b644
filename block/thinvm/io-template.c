/*
 * thinvm data path: what is read from the template of a full clone
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Data path layer.  A cluster whose entry is marked (source TEMPLATE) holds
 * what the template has at its place, from the moment it is mapped until it
 * is freed: it is never written in place, a write goes to a new cluster as
 * if it were shared with a snapshot (state.h, "shared").  So whoever looks it
 * up may read either, in any order with writers, crashes and other hosts, and
 * whatever makes a look-up right (invariant 2 of the design, section 4) makes
 * this right.
 */
#include "qemu/osdep.h"
#include "qemu/error-report.h"
#include "qemu/timer.h"
#include "io.h"
#include "trace.h"

/* For how long a template that could not be read is left alone */
#define TEMPLATE_PAUSE_NS   (1 * NANOSECONDS_PER_SECOND)

/* Bytes that are compared at a time */
#define COMPARE_STEP        (1 * MiB)

bool GRAPH_RDLOCK thinvm_io_in_template(BlockDriverState *bs,
                                        const ThinvmMapping *m,
                                        uint64_t offset, uint64_t bytes)
{
    BDRVThinvmState *s = bs->opaque;
    int64_t resume;

    if (m->source != THINVM_SOURCE_TEMPLATE || !s->template ||
        offset + bytes > s->template_id.length) {
        return false;
    }
    resume = qatomic_read(&s->template_resume_ns);
    return !resume || qemu_clock_get_ns(QEMU_CLOCK_REALTIME) >= resume;
}

int coroutine_fn GRAPH_RDLOCK
thinvm_io_read_template(BlockDriverState *bs, uint64_t offset, uint64_t bytes,
                        QEMUIOVector *qiov, size_t qiov_offset,
                        BdrvRequestFlags flags)
{
    BDRVThinvmState *s = bs->opaque;
    int ret = bdrv_co_preadv_part(s->template, offset, bytes, qiov,
                                  qiov_offset, flags);

    if (ret < 0) {
        trace_thinvm_template_failed(bs, offset, bytes, ret);
        stat64_add(&s->template_failures, 1);
        qatomic_set(&s->template_resume_ns,
                    qemu_clock_get_ns(QEMU_CLOCK_REALTIME) +
                    TEMPLATE_PAUSE_NS);
        return ret;
    }
    stat64_add(&s->template_bytes, bytes);
    return 0;
}

/* ------------------------------------------------------------------ */
/* check */

typedef struct Compare {
    BlockDriverState *bs;
    BdrvCheckResult *result;
    uint8_t *own, *other;           /* COMPARE_STEP each */
} Compare;

/* What @m covers of [offset, offset + bytes) is marked: is it so? */
static int coroutine_fn GRAPH_RDLOCK
compare_marked(Compare *c, const ThinvmMapping *m, uint64_t offset,
               uint64_t bytes)
{
    BDRVThinvmState *s = c->bs->opaque;
    uint64_t step;
    int ret = 0;

    for (; bytes && ret == 0; offset += step, bytes -= step) {
        step = MIN(bytes, COMPARE_STEP);
        ret = bdrv_co_pread(s->template, offset, step, c->other, 0);
        if (ret == 0) {
            ret = bdrv_co_pread(c->bs->file, thinvm_device_offset(s, m, offset),
                                step, c->own, 0);
        }
        if (ret == 0 && memcmp(c->own, c->other, step)) {
            error_printf("disk: guest offset 0x%" PRIx64 ", %" PRIu64 " bytes: "
                         "marked as the template's, but differs from it\n",
                         offset, step);
            c->result->corruptions++;
        }
    }
    return ret;
}

static int coroutine_fn GRAPH_RDLOCK compare_all(Compare *c)
{
    BDRVThinvmState *s = c->bs->opaque;
    uint64_t length = s->template_id.length;
    uint64_t offset, bytes;
    ThinvmMapping m;
    int ret = 0;

    for (offset = 0; offset < length && ret == 0; offset += bytes) {
        ret = thinvm_lookup(s, s->store, THINVM_TREE_DISK, offset,
                            length - offset, false, &m);
        if (ret < 0) {
            break;
        }
        bytes = thinvm_clamp(s, offset, length - offset, m.count);
        if (m.source == THINVM_SOURCE_TEMPLATE) {
            ret = compare_marked(c, &m, offset, bytes);
        }
    }
    return ret;
}

int coroutine_fn GRAPH_RDLOCK
thinvm_io_compare_template(BlockDriverState *bs, BdrvCheckResult *result)
{
    BDRVThinvmState *s = bs->opaque;
    unsigned token = thinvm_store_request_begin(s->store);
    Compare c = { .bs = bs, .result = result };
    int ret = -ENOMEM;

    c.own = qemu_try_blockalign(bs->file->bs, COMPARE_STEP);
    c.other = qemu_try_blockalign(bs->file->bs, COMPARE_STEP);
    if (c.own && c.other) {
        ret = compare_all(&c);
    }
    if (ret < 0) {
        error_printf("The template could not be compared: %s\n",
                     strerror(-ret));
        result->check_errors++;
    }
    qemu_vfree(c.own);
    qemu_vfree(c.other);
    thinvm_store_request_end(s->store, token);
    return ret;
}
