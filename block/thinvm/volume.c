/*
 * thinvm driver layer: the volume under an image, and its growth
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A volume may be much smaller than the disk that it holds, and be enlarged in
 * time: this file tells when (THINVM_SPACE_LOW) and takes new space into use
 * (thinvm-grow).  Relies on the store for the space itself.
 *
 * Free is what the next write can have at once: neither reserved for a write
 * in flight, nor freed in a way that is not durable yet (invariant 2).  The
 * event comes with the allocation that crosses the watermark, so that whoever
 * extends the volume has all of the watermark's bytes as a head start; it is
 * armed again by the background worker or thinvm-grow, when there is more free
 * space than the watermark and a sixteenth, and 1 MiB at least.
 *
 * Threads: the data path and queries run in any; "low" and the count of what was
 * reserved are atomic, the rate has a lock.
 */

#include "qemu/osdep.h"
#include <math.h>
#include "qapi/error.h"
#include "qapi/qapi-events-thinvm.h"
#include "qemu/lockable.h"
#include "qemu/timer.h"
#include "thinvm.h"
#include "trace.h"

/*
 * The rate that is told is a mean whose weight halves in about this time:
 * short enough to see a copy begin, long enough not to follow single bursts.
 */
#define THINVM_RATE_HALF_LIFE_MS    3000
/* Shorter times say nothing */
#define THINVM_RATE_SHORTEST_MS     100

/*
 * What an extension should bring at the present rate: oVirt has seen volumes
 * extended in 0.8 to 3.7 seconds, so this is twice the slow case.
 */
#define THINVM_RATE_HEADROOM_S      8

/* A cluster to and fro is no reason for another event */
#define THINVM_REARM_BYTES          ((uint64_t)(1 * MiB))

static void thinvm_volume_state(BDRVThinvmState *s, ThinvmInfoState *info)
{
    /* Once: a take-over may put another in its place at any time */
    ThinvmStore *st = qatomic_read(&s->store);
    unsigned token = thinvm_store_request_begin(st);
    ThinvmState *state = thinvm_store_state(st);

    thinvm_state_lock(state);
    thinvm_state_info(state, info);
    thinvm_state_unlock(state);
    thinvm_store_request_end(st, token);
}

/* Bytes; 0 for none */
static uint64_t thinvm_watermark(BDRVThinvmState *s, uint64_t device_bytes)
{
    uint64_t percent = qatomic_read(&s->options.space_watermark_percent);
    uint64_t bytes = qatomic_read(&s->options.space_watermark);

    return MAX(bytes, device_bytes / 100 * percent);
}

static uint64_t thinvm_wanted_size(const ThinvmSpace *space)
{
    uint64_t headroom = MAX(2 * space->watermark,
                            space->watermark +
                            space->rate * THINVM_RATE_HEADROOM_S);

    return space->size + (headroom > space->free ? headroom - space->free : 0);
}

/*
 * An exponential mean over uneven intervals, weights as powers of two.  It is
 * brought up to date by whoever asks, so that it falls while nothing happens.
 */
static uint64_t thinvm_volume_rate(BDRVThinvmState *s)
{
    ThinvmVolume *v = &s->volume;
    int64_t now = qemu_clock_get_ms(QEMU_CLOCK_REALTIME);
    uint64_t reserved = stat64_get(&v->reserved);
    int64_t passed;
    double kept, rate;

    QEMU_LOCK_GUARD(&v->lock);
    passed = now - v->sampled_ms;
    if (passed >= THINVM_RATE_SHORTEST_MS) {
        rate = (double)((reserved - v->sampled) << s->cluster_bits) * 1000 /
               passed;
        kept = exp2(-(double)passed / THINVM_RATE_HALF_LIFE_MS);
        v->mean = v->mean * kept + rate * (1 - kept);
        v->sampled_ms = now;
        v->sampled = reserved;
    }
    return v->mean;
}

void thinvm_volume_init(BDRVThinvmState *s)
{
    qemu_mutex_init(&s->volume.lock);
    s->volume.sampled_ms = qemu_clock_get_ms(QEMU_CLOCK_REALTIME);
}

void thinvm_volume_destroy(BDRVThinvmState *s)
{
    qemu_mutex_destroy(&s->volume.lock);
}

void thinvm_volume_space(BDRVThinvmState *s, ThinvmSpace *space)
{
    ThinvmInfoState info;

    thinvm_volume_state(s, &info);
    *space = (ThinvmSpace) {
        .size = info.device_clusters << info.cluster_bits,
        .free = info.available_clusters << info.cluster_bits,
        .rate = thinvm_volume_rate(s),
        .low = qatomic_read(&s->volume.low),
    };
    space->watermark = thinvm_watermark(s, space->size);
    space->wanted = thinvm_wanted_size(space);
}

static bool thinvm_watched(BDRVThinvmState *s)
{
    return qatomic_read(&s->options.space_watermark) ||
           qatomic_read(&s->options.space_watermark_percent);
}

/*
 * Somebody may have enlarged the device without telling, also while no node
 * had it open; only if that is not so is it worth an event.
 */
static void coroutine_fn thinvm_volume_look(BDRVThinvmState *s,
                                            ThinvmStore *st)
{
    ThinvmSpace space;

    thinvm_volume_space(s, &space);
    if (space.free >= space.watermark) {
        return;
    }
    if (thinvm_store_grow(st, 0, NULL) < 0) {
        trace_thinvm_volume_notice_failed(s->bs);
    }
    thinvm_volume_space(s, &space);
    if (space.free >= space.watermark ||
        qatomic_xchg(&s->volume.low, true)) {
        return;
    }
    trace_thinvm_space_low(s->bs, space.free, space.size, space.wanted);
    qapi_event_send_thinvm_space_low(bdrv_get_node_name(s->bs), space.free,
                                     space.size, space.watermark, space.rate,
                                     space.wanted);
}

int coroutine_fn thinvm_volume_reserve(BDRVThinvmState *s, ThinvmStore *st,
                                       uint64_t goal, uint64_t max,
                                       uint64_t *first, uint64_t *nb_clusters)
{
    int ret = thinvm_store_reserve(st, goal, max, first, nb_clusters);

    if (ret >= 0) {
        stat64_add(&s->volume.reserved, *nb_clusters);
    }
    /* Also when there is none left: an operator may have set it just now */
    if ((ret >= 0 || ret == -ENOSPC) && thinvm_watched(s) &&
        !qatomic_read(&s->volume.low)) {
        thinvm_volume_look(s, st);
    }
    return ret;
}

void thinvm_volume_rearm(BDRVThinvmState *s)
{
    ThinvmSpace space;

    if (!qatomic_read(&s->volume.low)) {
        return;
    }
    thinvm_volume_space(s, &space);
    if (space.free >= space.watermark +
                      MAX(space.watermark / 16, THINVM_REARM_BYTES)) {
        qatomic_set(&s->volume.low, false);
    }
}

static int coroutine_fn GRAPH_RDLOCK
thinvm_volume_notice(BDRVThinvmState *s, uint64_t size, Error **errp)
{
    int ret = thinvm_store_grow(s->store, size, errp);

    if (ret >= 0) {
        thinvm_volume_rearm(s);
    }
    return ret;
}

void coroutine_fn thinvm_volume_tick(BDRVThinvmState *s)
{
    thinvm_volume_rate(s);
    if (!qatomic_read(&s->volume.low)) {
        return;
    }
    if (thinvm_volume_notice(s, 0, NULL) < 0) {
        trace_thinvm_volume_notice_failed(s->bs);
    }
}

typedef struct ThinvmGrow {
    uint64_t size;
} ThinvmGrow;

static int coroutine_fn GRAPH_RDLOCK
thinvm_co_grow(BlockDriverState *bs, void *opaque, Error **errp)
{
    BDRVThinvmState *s = bs->opaque;
    ThinvmGrow *grow = opaque;
    int ret;

    ret = thinvm_mode_begin_change(bs, errp);
    if (ret < 0) {
        return ret;
    }
    /* Who asks for it means it, also after a thinvm-shrink */
    thinvm_store_forget_shrink(s->store);
    return thinvm_volume_notice(s, grow->size, errp);
}

int thinvm_volume_grow(BlockDriverState *bs, uint64_t size, Error **errp)
{
    ThinvmGrow grow = { .size = size };

    return thinvm_run(bs, thinvm_co_grow, &grow, errp);
}

/*
 * A file is cut off at once; a device is for whoever manages it, and says that
 * it cannot be.
 */
static int coroutine_fn thinvm_cut(void *opaque, uint64_t size)
{
    BlockDriverState *bs = opaque;
    int ret;

    assume_graph_lock();        /* thinvm_co_shrink() holds it */
    if (!thinvm_claim_counts(bs->opaque)) {
        return -EIO;
    }
    ret = bdrv_co_truncate(bs->file, size, true, PREALLOC_MODE_OFF, 0, NULL);
    trace_thinvm_device_shrink(bs, size, ret);
    return ret;
}

static int coroutine_fn GRAPH_RDLOCK
thinvm_co_shrink(BlockDriverState *bs, void *opaque, Error **errp)
{
    BDRVThinvmState *s = bs->opaque;
    ThinvmGrow *shrink = opaque;
    uint64_t size;
    int ret;

    ret = thinvm_mode_begin_change(bs, errp);
    if (ret < 0) {
        return ret;
    }
    return thinvm_store_shrink(s->store, shrink->size, thinvm_cut, bs, &size,
                               errp);
}

int thinvm_volume_shrink(BlockDriverState *bs, uint64_t size, Error **errp)
{
    ThinvmGrow shrink = { .size = size };

    return thinvm_run(bs, thinvm_co_shrink, &shrink, errp);
}

static int coroutine_fn GRAPH_RDLOCK
thinvm_co_high_water(BlockDriverState *bs, void *opaque, Error **errp)
{
    BDRVThinvmState *s = bs->opaque;

    return thinvm_store_high_water(qatomic_read(&s->store), opaque);
}

bool thinvm_volume_high_water(BlockDriverState *bs, uint64_t *bytes)
{
    return thinvm_run(bs, thinvm_co_high_water, bytes, NULL) >= 0;
}
