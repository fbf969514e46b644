/*
 * thinvm driver layer: heartbeats of owners
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * An owner writes a counter into the heartbeat block of its epoch, and none
 * else (format.h): a late write of a former owner cannot look like one of the
 * present owner.  Whether an owner is alive is never judged by comparing
 * clocks of two hosts, but by seeing the counter move on one's own monotonic
 * clock.
 *
 * A counter that stands proves nothing: its host may be cut off from the
 * network, paused, or just slow, and go on to write.  So it is told to people,
 * and one that moves stops a forced take-over; but no image is ever taken
 * because a counter stands (invariant 6).  It may be taken because its owner
 * was this host before it was booted; then one that moves shows that there are
 * two hosts of one name.
 *
 * With each heartbeat the owner looks whether its own claim still stands: the
 * one that displaces it lies in the next slot (a take-over) or in its own (a
 * race of two claims).
 *
 * An owner that is frozen beats no heart, and thaws amid its writes.  Where a
 * successor has no reservation, or has closed the image again, no device keeps
 * it from writing.  So each write asks how old the last look is, and looks
 * itself if that is too old (thinvm_claim_counts()).  On a machine that is just
 * slow this is one look, for all writes that wait.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qapi/qapi-types-block-core.h"
#include "qemu/lockable.h"
#include "handover.h"
#include "trace.h"

/* Looks that a write waits for before it fails, and the rest between two */
#define THINVM_CLAIM_LOOKS      3
#define THINVM_CLAIM_REST_NS    (100 * SCALE_MS)

QEMU_BUILD_BUG_ON(THINVM_CLAIM_COUNTS_MS < THINVM_HEARTBEAT_MS * 2);
QEMU_BUILD_BUG_ON(THINVM_CLAIM_COUNTS_MS >= THINVM_HEARTBEAT_DEAD_MS);

static uint64_t thinvm_heartbeat_offset(uint64_t epoch)
{
    return THINVM_HEARTBEAT_OFFSET +
           epoch % THINVM_NB_CLAIMS * THINVM_PAGE_SIZE;
}

/* ------------------------------------------------------------------ */
/* Of the owner                                                        */

int coroutine_fn thinvm_heartbeat_write(BDRVThinvmState *s, uint64_t counter)
{
    g_autofree uint8_t *block = g_malloc0(THINVM_PAGE_SIZE);
    ThinvmHeartbeat beat = {
        .epoch = s->claim.epoch,
        .counter = counter,
        .nonce = s->claim.nonce,
    };
    ThinvmDevice *dev = &s->device;

    thinvm_heartbeat_encode(&s->uuid, (ThinvmHeartbeatLe *)block, &beat);
    thinvm_device_event(dev, BLKDBG_THINVM_HEARTBEAT_WRITE);
    return dev->co_pwrite(dev, thinvm_heartbeat_offset(beat.epoch),
                          THINVM_PAGE_SIZE, block);
}

/* -EIO: whatever is wrong with the device; others say what the block holds */
static int coroutine_fn thinvm_claim_read(BDRVThinvmState *s, uint64_t epoch,
                                          ThinvmClaim *claim)
{
    g_autofree uint8_t *block = g_malloc(THINVM_PAGE_SIZE);
    ThinvmDevice *dev = &s->device;
    int ret;

    thinvm_device_event(dev, BLKDBG_THINVM_CLAIM_READ);
    ret = dev->co_pread(dev, THINVM_CLAIM_OFFSET +
                        epoch % THINVM_NB_CLAIMS * THINVM_PAGE_SIZE,
                        THINVM_PAGE_SIZE, block);
    return ret < 0 ? -EIO :
           thinvm_claim_decode(&s->uuid, claim, (ThinvmClaimLe *)block);
}

int coroutine_fn thinvm_heartbeat_check_claim(BDRVThinvmState *s,
                                              Error **errp)
{
    ThinvmClaim own, next;
    int ret;

    ret = thinvm_claim_read(s, s->claim.epoch + 1, &next);
    if (ret == 0 && next.epoch > s->claim.epoch) {
        thinvm_owner_describe_displaced(s, &next, errp);
        return -EPERM;
    }
    if (ret == -EIO) {
        error_setg_errno(errp, -ret, "Cannot read the claims of ownership");
        return ret;
    }
    ret = thinvm_claim_read(s, s->claim.epoch, &own);
    if (ret == 0 && !qemu_uuid_is_equal(&own.nonce, &s->claim.nonce)) {
        thinvm_owner_describe_displaced(s, &own, errp);
        return -EPERM;
    }
    if (ret == -ENOENT) {
        error_setg(errp, "The claim of epoch %" PRIu64 " is not on the "
                   "device any more: the image was overwritten",
                   s->claim.epoch);
        return -EPERM;
    }
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Cannot read the claim of ownership");
    }
    return ret;
}

int coroutine_fn thinvm_claim_look(BDRVThinvmState *s, Error **errp)
{
    int64_t begun = thinvm_boot_ms();
    int ret = thinvm_heartbeat_check_claim(s, errp);

    if (ret == 0) {
        qatomic_set(&s->claim_seen_ms, begun);
    }
    return ret;
}

/*
 * The process may be stopped again amid a look, which is old then.  A device
 * that is as slow as that looks the same, but not for ever.
 */
static int coroutine_fn GRAPH_RDLOCK
thinvm_claim_look_until_sure(BDRVThinvmState *s)
{
    const char *reason;
    int ret = 0;

    for (int i = 0; i < THINVM_CLAIM_LOOKS; i++) {
        g_autoptr(Error) local_err = NULL;

        if (ret < 0) {
            qemu_co_sleep_ns(QEMU_CLOCK_REALTIME, THINVM_CLAIM_REST_NS);
        }
        ret = thinvm_claim_look(s, &local_err);
        if (ret == -EPERM) {
            thinvm_mode_lose(s, error_get_pretty(local_err));
            return ret;
        }
        if (ret == 0 && thinvm_claim_seen_lately(s)) {
            return 0;
        }
    }
    /* Where the host's lock decides, a bad block is no reason to stop */
    if (ret < 0 && thinvm_fence_kind(s, &reason) != THINVM_FENCING_LOCK) {
        return ret;
    }
    qatomic_set(&s->claim_seen_ms, thinvm_boot_ms());
    return 0;
}

bool coroutine_fn thinvm_claim_confirm(BDRVThinvmState *s)
{
    unsigned failed = qatomic_read(&s->claim_looks_failed);
    int ret = 0;

    qemu_co_mutex_lock(&s->claim_lock);
    if (qatomic_read(&s->claim_looks_failed) != failed) {
        ret = -EIO;             /* what we waited for was for us, too */
    } else if (!thinvm_claim_seen_lately(s)) {
        ret = thinvm_claim_look_until_sure(s);
        trace_thinvm_claim_confirm(s->bs, ret);
        if (ret < 0) {
            qatomic_inc(&s->claim_looks_failed);
        }
    }
    qemu_co_mutex_unlock(&s->claim_lock);
    return ret == 0 && !qatomic_read(&s->lost);
}

/* ------------------------------------------------------------------ */
/* Of those who watch                                                  */

/* What this process has seen of an image's owner; keyed by the image's UUID */
typedef struct ThinvmSeen {
    QemuUUID image, nonce;
    uint64_t counter;
    int64_t since_us;           /* g_get_monotonic_time() */
    QLIST_ENTRY(ThinvmSeen) link;
} ThinvmSeen;

static QemuMutex thinvm_seen_lock;
static QLIST_HEAD(, ThinvmSeen) thinvm_seen =
    QLIST_HEAD_INITIALIZER(thinvm_seen);

static void __attribute__((constructor)) thinvm_heartbeat_module_init(void)
{
    qemu_mutex_init(&thinvm_seen_lock);
}

/* Milliseconds since @counter was seen first */
static uint64_t thinvm_seen_since(const QemuUUID *image, const QemuUUID *nonce,
                                  uint64_t counter)
{
    int64_t now = g_get_monotonic_time();
    ThinvmSeen *seen;

    QEMU_LOCK_GUARD(&thinvm_seen_lock);
    QLIST_FOREACH(seen, &thinvm_seen, link) {
        if (qemu_uuid_is_equal(&seen->image, image)) {
            break;
        }
    }
    if (!seen) {
        seen = g_new0(ThinvmSeen, 1);
        seen->image = *image;
        seen->since_us = now;
        seen->counter = counter;
        seen->nonce = *nonce;
        QLIST_INSERT_HEAD(&thinvm_seen, seen, link);
    }
    if (seen->counter != counter ||
        !qemu_uuid_is_equal(&seen->nonce, nonce)) {
        seen->counter = counter;
        seen->nonce = *nonce;
        seen->since_us = now;
    }
    return (now - seen->since_us) / 1000;
}

int coroutine_fn thinvm_heartbeat_look(ThinvmDevice *dev, const QemuUUID *uuid,
                                       const ThinvmClaim *claim,
                                       ThinvmBeat *beat)
{
    g_autofree uint8_t *block = g_malloc(THINVM_PAGE_SIZE);
    ThinvmHeartbeat on_device;
    int ret;

    memset(beat, 0, sizeof(*beat));
    thinvm_device_event(dev, BLKDBG_THINVM_HEARTBEAT_READ);
    ret = dev->co_pread(dev, thinvm_heartbeat_offset(claim->epoch),
                        THINVM_PAGE_SIZE, block);
    if (ret < 0) {
        return ret;
    }
    if (thinvm_heartbeat_decode(uuid, &on_device,
                                (ThinvmHeartbeatLe *)block) == 0 &&
        on_device.epoch == claim->epoch &&
        qemu_uuid_is_equal(&on_device.nonce, &claim->nonce)) {
        beat->known = true;
        beat->counter = on_device.counter;
    }
    /* None yet counts as one that stands at zero */
    beat->unchanged_ms = thinvm_seen_since(uuid, &claim->nonce,
                                           beat->counter);
    return 0;
}

int coroutine_fn thinvm_heartbeat_watch(ThinvmDevice *dev,
                                        const QemuUUID *uuid,
                                        const ThinvmClaim *claim,
                                        ThinvmBeat *beat)
{
    int64_t begin = g_get_monotonic_time();
    uint64_t first;
    int ret = thinvm_heartbeat_look(dev, uuid, claim, beat);

    first = beat->counter;
    /* What is remembered may be of a copy of the image, which others watch */
    while (ret == 0 && beat->counter == first &&
           beat->unchanged_ms < THINVM_HEARTBEAT_DEAD_MS &&
           g_get_monotonic_time() - begin < THINVM_HEARTBEAT_DEAD_MS * 1000) {
        qemu_co_sleep_ns(QEMU_CLOCK_REALTIME, 200 * SCALE_MS);
        /* In this host's page cache, no other host's counter ever moves */
        ret = thinvm_device_refresh(dev, NULL);
        if (ret == 0) {
            ret = thinvm_heartbeat_look(dev, uuid, claim, beat);
        }
    }
    trace_thinvm_heartbeat_watch(claim->epoch, first, beat->counter,
                                 beat->unchanged_ms);
    return ret < 0 ? ret : beat->counter != first;
}
