/*
 * thinvm driver layer: fencing by SCSI persistent reservations
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Where an image has a SCSI device to itself, its owner holds a reservation of
 * type "write exclusive" on it: everybody may read and follow, and the device
 * refuses the writes of all others, those of an owner included that was
 * displaced while it was frozen.
 *
 *   take      register a key of our own, reserve.  RESERVE has one winner.  If
 *             somebody holds it whom the claims (owner.c) say is no owner, or
 *             whom the operator has ordered to be displaced: PREEMPT AND
 *             ABORT, after which none of his writes is under way any more.
 *   check     with each heartbeat and after each write that failed: a target
 *             that lost its memory, or a session that was established anew,
 *             needs the key and the reservation again.  With it, so that
 *             nobody can claim the image any more, we look whether somebody
 *             has, and has let go of it already.
 *   release   with the claim.
 *
 * A multipath device takes the type "write exclusive, registrants only" and a
 * qemu-pr-helper, see fence-choice.c.
 *
 * The key tells whose it is: host and boot (a hash), process, and a part of
 * the claim's nonce.  So a holder that died before it wrote its claim is
 * recognised as well.
 *
 * The reservation is taken before the claim is written, and released after
 * that was, so it is there whenever an owner writes (invariant 6).  It is not
 * ours to decide who may own: that are the claims, which readers need anyway.
 *
 * "auto" takes no chances: anything that cannot be asked, or answers in an
 * unexpected way, or carries somebody else's kind of reservation (that of a
 * cluster manager), is left alone, and the claim alone protects the image.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/bswap.h"
#include "qobject/qdict.h"
#include "scsi/constants.h"
#include "handover.h"
#include "fence-choice.h"
#include "trace.h"
#ifdef CONFIG_LINUX
#include <scsi/sg.h>
#include <sys/sysmacros.h>
#endif

#define FENCE_APTPL             0x40    /* REGISTER: through power loss */
#define FENCE_TIMEOUT_MS        30000
/* Who reserves writes his claim next; how long we wait to see it */
#define FENCE_RACE_WAIT_NS      (100 * SCALE_MS)
#define FENCE_RACE_WAITS        20
#define FENCE_SETTLE_NS         (500 * SCALE_MS)
#define FENCE_OF_ANOTHER_KIND \
    "the device carries a reservation of another kind"
#define FENCE_RETRIES           8       /* unit attentions, busy */
/* For so long a write may fail because of what has been put right since */
#define FENCE_RENEWED_MS        5000

enum {
    PR_IN_READ_KEYS = 0,
    PR_IN_READ_RESERVATION = 1,
    PR_IN_REPORT_CAPABILITIES = 2,
};

enum {
    PR_OUT_REGISTER = 0,
    PR_OUT_RESERVE = 1,
    PR_OUT_RELEASE = 2,
    PR_OUT_PREEMPT = 4,
    PR_OUT_PREEMPT_AND_ABORT = 5,
    PR_OUT_REGISTER_AND_IGNORE = 6,
};

/* ------------------------------------------------------------------ */
/* Commands                                                            */

#ifdef CONFIG_LINUX
/* 0, -EBUSY (reservation conflict), -ENOTSUP, -EIO */
static int fence_status(const struct sg_io_hdr *hdr, const uint8_t *sense,
                        bool *again)
{
    unsigned key = 0;

    *again = false;
    if (hdr->status == GOOD && !hdr->host_status) {
        return 0;
    }
    if (hdr->status == RESERVATION_CONFLICT) {
        return -EBUSY;
    }
    if (hdr->status == CHECK_CONDITION) {
        key = (sense[0] & 0x7f) >= 0x72 ? sense[1] & 15 : sense[2] & 15;
    }
    /* An attention tells of something that others did; it says so once */
    *again = key == UNIT_ATTENTION || hdr->status == BUSY;
    return key == ILLEGAL_REQUEST ? -ENOTSUP : -EIO;
}

static int coroutine_fn GRAPH_RDLOCK
fence_command(BlockDriverState *file, uint8_t *cdb, unsigned cdb_length,
              int direction, void *data, unsigned length)
{
    uint8_t sense[64];
    bool again = true;
    int ret = -EIO;

    for (int i = 0; i < FENCE_RETRIES && again; i++) {
        struct sg_io_hdr hdr = {
            .interface_id = 'S',
            .dxfer_direction = direction,
            .cmd_len = cdb_length,
            .cmdp = cdb,
            .dxferp = data,
            .dxfer_len = length,
            .sbp = sense,
            .mx_sb_len = sizeof(sense),
            .timeout = FENCE_TIMEOUT_MS,
        };

        memset(sense, 0, sizeof(sense));
        ret = bdrv_co_ioctl(file, SG_IO, &hdr);
        if (ret < 0) {
            return ret;
        }
        ret = fence_status(&hdr, sense, &again);
        trace_thinvm_fence_command(file, cdb[0], cdb[1], hdr.status, ret);
    }
    return ret;
}

static int coroutine_fn GRAPH_RDLOCK
fence_in(BlockDriverState *file, int action, uint8_t *data, unsigned length)
{
    uint8_t cdb[10] = { PERSISTENT_RESERVE_IN, action };

    stw_be_p(cdb + 7, length);
    memset(data, 0, length);
    return fence_command(file, cdb, sizeof(cdb), SG_DXFER_FROM_DEV, data,
                         length);
}

int coroutine_fn thinvm_scsi_capacity(BlockDriverState *device,
                                      uint64_t *bytes)
{
    uint8_t cdb[16] = { SERVICE_ACTION_IN_16, SAI_READ_CAPACITY_16 };
    uint8_t data[32] = { 0 };
    int ret;

    stl_be_p(cdb + 10, sizeof(data));
    ret = fence_command(device, cdb, sizeof(cdb), SG_DXFER_FROM_DEV, data,
                        sizeof(data));
    if (ret == 0) {
        *bytes = (ldq_be_p(data) + 1) * ldl_be_p(data + 8);
    }
    return ret;
}

static int coroutine_fn GRAPH_RDLOCK
fence_out(BlockDriverState *file, int action, unsigned type, uint64_t key,
          uint64_t other)
{
    uint8_t cdb[10] = { PERSISTENT_RESERVE_OUT, action, type };
    uint8_t data[24] = { 0 };

    if (action & FENCE_APTPL) {
        data[20] = 1;
        cdb[1] &= ~FENCE_APTPL;
    }
    stl_be_p(cdb + 5, sizeof(data));
    stq_be_p(data, key);
    stq_be_p(data + 8, other);
    return fence_command(file, cdb, sizeof(cdb), SG_DXFER_TO_DEV, data,
                         sizeof(data));
}
#else
int coroutine_fn thinvm_scsi_capacity(BlockDriverState *device,
                                      uint64_t *bytes)
{
    return -ENOTSUP;
}

static int coroutine_fn GRAPH_RDLOCK
fence_in(BlockDriverState *file, int action, uint8_t *data, unsigned length)
{
    return -ENOTSUP;
}

static int coroutine_fn GRAPH_RDLOCK
fence_out(BlockDriverState *file, int action, unsigned type, uint64_t key,
          uint64_t other)
{
    return -ENOTSUP;
}
#endif

static int coroutine_fn GRAPH_RDLOCK
fence_register(BDRVThinvmState *s, uint64_t key)
{
    return fence_out(s->bs->file->bs, PR_OUT_REGISTER_AND_IGNORE |
                     (s->fence.aptpl ? FENCE_APTPL : 0), 0, 0, key);
}

static int coroutine_fn GRAPH_RDLOCK
fence_reserve(BDRVThinvmState *s, uint64_t key)
{
    return fence_out(s->bs->file->bs, PR_OUT_RESERVE, s->fence.type, key, 0);
}

/*
 * Who withdraws the registration under which he holds a reservation releases
 * that.  A target that does not know this leaves what the next owner displaces.
 */
static void coroutine_fn GRAPH_RDLOCK
fence_unregister(BlockDriverState *file, uint64_t key)
{
    fence_out(file, PR_OUT_REGISTER, 0, key, 0);
}

/* *type 0: nobody holds a reservation */
static int coroutine_fn GRAPH_RDLOCK
fence_holder(BlockDriverState *file, uint64_t *key, unsigned *type)
{
    uint8_t data[24];
    int ret = fence_in(file, PR_IN_READ_RESERVATION, data, sizeof(data));

    *key = 0;
    *type = 0;
    if (ret == 0 && ldl_be_p(data + 4) >= 16) {
        *key = ldq_be_p(data + 8);
        *type = data[21] & 15;
    }
    return ret;
}

/* ------------------------------------------------------------------ */
/* Keys                                                                */

#define FENCE_KEY_NONCE     0x3ff

/* Never 0 */
static uint64_t fence_key(const ThinvmClaim *claim)
{
    uint32_t host = 1;

    for (int i = 0; i < 16; i++) {
        host = host * 31 + claim->host_id.data[i];
        host = host * 31 + claim->boot_id.data[i];
    }
    return (uint64_t)host << 32 | (claim->process & 0x3fffff) << 10 |
           (lduw_le_p(claim->nonce.data) & FENCE_KEY_NONCE) | 1;
}

/* Of this host, by a process that is no more? */
static bool fence_key_is_dead(const ThinvmClaim *me, uint64_t key)
{
    uint64_t mine = fence_key(me);

    return key >> 32 == mine >> 32 &&
           thinvm_owner_process_ended((key >> 10) & 0x3fffff);
}

/* ------------------------------------------------------------------ */
/* May it be used?                                                     */

/* The type that suits a host device; 0 and *why: none */
static unsigned fence_host_device_type(BlockDriverState *file,
                                       const char **why)
{
    struct stat st;

    *why = "not a SCSI device";
    if (stat(file->filename, &st) < 0) {
        return 0;
    }
#ifdef CONFIG_LINUX
    if (S_ISBLK(st.st_mode)) {
        g_autofree char *sysfs =
            g_strdup_printf("/sys/dev/block/%u:%u", major(st.st_rdev),
                            minor(st.st_rdev));

        return thinvm_fence_choose(sysfs, qdict_haskey(file->options,
                                                       "pr-manager"), why);
    }
#endif
    return S_ISCHR(st.st_mode) ? THINVM_FENCE_WRITE_EXCLUSIVE : 0;
}

static bool fence_is_iscsi(BlockDriverState *file)
{
    const char *name = file->drv ? file->drv->format_name : "";

    return !strcmp(name, "iscsi") || !strcmp(name, "iser");
}

/* Of those kinds that we use, and not somebody else's? */
static bool fence_type_is_ours(unsigned type, uint64_t holder,
                               const ThinvmClaim *newest)
{
    return type == THINVM_FENCE_WRITE_EXCLUSIVE ||
           (type == THINVM_FENCE_REGISTRANTS_ONLY &&
            holder == fence_key(newest));
}

/*
 * NULL: it can be used; else why not, for people.  What the device says of
 * itself is asked once, if nobody but this process speaks to it by our session
 * (of which iSCSI's are): then even a cluster manager who reserves it later
 * loses nothing when we register, find that out, and withdraw.
 */
static const char *coroutine_fn GRAPH_RDLOCK
fence_obstacle(BDRVThinvmState *s, const ThinvmClaim *newest)
{
    BlockDriverState *file = s->bs->file->bs;
    const char *why = "not a SCSI device";
    uint8_t data[8];
    uint64_t holder;
    unsigned type;

    if (s->options.reservation == THINVM_RESERVATION_OFF) {
        return "switched off by reservation=off";
    }
    s->fence.type = fence_is_iscsi(file) ? THINVM_FENCE_WRITE_EXCLUSIVE : 0;
    if (file->drv && !strcmp(file->drv->format_name, "host_device")) {
        s->fence.type = fence_host_device_type(file, &why);
    }
    if (!s->fence.type) {
        return why;
    }
    if (s->fence.asked == file) {
        return NULL;
    }
    if (fence_in(file, PR_IN_REPORT_CAPABILITIES, data, sizeof(data)) == 0 &&
        lduw_be_p(data) >= 8) {
        s->fence.aptpl = data[2] & 1;
    }
    if (fence_holder(file, &holder, &type) < 0) {
        return "the device does not support persistent reservations";
    }
    if (type && !fence_type_is_ours(type, holder, newest)) {
        return FENCE_OF_ANOTHER_KIND;
    }
    s->fence.asked = fence_is_iscsi(file) ? file : NULL;
    return NULL;
}

void coroutine_fn thinvm_fence_prepare(BDRVThinvmState *s,
                                       const ThinvmClaim *newest)
{
    qemu_co_mutex_lock(&s->fence.lock);
    if (s->fence.asked != s->bs->file->bs &&
        fence_is_iscsi(s->bs->file->bs)) {
        fence_obstacle(s, newest);
    }
    qemu_co_mutex_unlock(&s->fence.lock);
}

/* ------------------------------------------------------------------ */
/* Take, check, release                                                */

/*
 * A target without PREEMPT AND ABORT may still have writes in its queues that
 * it accepted from the holder: give it time to finish them.
 */
static int coroutine_fn GRAPH_RDLOCK
fence_preempt(BlockDriverState *file, unsigned type, uint64_t key,
              uint64_t holder)
{
    int ret = fence_out(file, PR_OUT_PREEMPT_AND_ABORT, type, key, holder);

    if (ret == -ENOTSUP) {
        ret = fence_out(file, PR_OUT_PREEMPT, type, key, holder);
        if (ret == 0 && key != holder) {
            qemu_co_sleep_ns(QEMU_CLOCK_REALTIME, FENCE_SETTLE_NS);
        }
    }
    trace_thinvm_fence_preempt(file, key, holder, ret);
    return ret;
}

/*
 * Somebody holds it.  The claims, which were judged before, allow us to own
 * the image; so if the key is that of the newest claim, it is left over.  If
 * not, its holder may be about to write his claim: wait for that.  -ENOTSUP:
 * it is of a kind that is not ours.
 */
static int coroutine_fn GRAPH_RDLOCK
fence_contend(BDRVThinvmState *s, const ThinvmClaim *claim,
              const ThinvmClaim *newest, Error **errp)
{
    uint64_t key = fence_key(claim), holder;
    unsigned type;
    int ret;

    for (int i = 0;; i++) {
        ThinvmOwnerView view;

        ret = fence_holder(s->bs->file->bs, &holder, &type);
        if (ret < 0) {
            break;
        }
        if (!type) {
            ret = fence_reserve(s, key);
            if (ret != -EBUSY) {
                break;
            }
            continue;
        }
        if (type != s->fence.type &&
            !fence_type_is_ours(type, holder, newest)) {
            return -ENOTSUP;
        }
        if (holder == key) {
            return 0;
        }
        if (fence_key(newest) == holder || fence_key_is_dead(claim, holder) ||
            (i >= FENCE_RACE_WAITS && s->options.force_takeover)) {
            ret = fence_preempt(s->bs->file->bs, s->fence.type, key, holder);
            break;
        }
        if (i >= FENCE_RACE_WAITS) {
            error_setg(errp, "The device is reserved under key 0x%016" PRIx64
                       ", which is no owner's of this image", holder);
            error_append_hint(errp, "If its host was fenced, open the image "
                              "with force-takeover=on.\n");
            return -EBUSY;
        }
        qemu_co_sleep_ns(QEMU_CLOCK_REALTIME, FENCE_RACE_WAIT_NS);
        ret = thinvm_owner_look(&s->device, &s->uuid, NULL, &view, errp);
        if (ret < 0) {
            return ret;
        }
        if (view.newest_epoch > newest->epoch &&
            !thinvm_owner_may_take(&view, false, errp)) {
            return -EBUSY;
        }
    }
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not reserve the device");
        ret = -EIO;
    }
    return ret;
}

/* s->fence.reason says why */
static int fence_do_without(BDRVThinvmState *s, Error **errp)
{
    if (s->options.reservation == THINVM_RESERVATION_ON) {
        error_setg(errp, "Option '%s' is 'on', but a reservation cannot be "
                   "had: %s", THINVM_OPT_RESERVATION, s->fence.reason);
        return -ENOTSUP;
    }
    return 0;
}

/*
 * An owner may claim once more, above the journal's epoch (mode.c).  His
 * reservation stays, and the new claim is made to have its key, by which others
 * will know whose it is: what is not done anew cannot fail half-way.
 */
static bool fence_keep(BDRVThinvmState *s, ThinvmClaim *claim)
{
    uint16_t nonce = lduw_le_p(claim->nonce.data);

    if (!qatomic_read(&s->fence.held)) {
        return false;
    }
    stw_le_p(claim->nonce.data, (nonce & ~FENCE_KEY_NONCE) |
                                (s->fence.key & FENCE_KEY_NONCE));
    return fence_key(claim) == s->fence.key;
}

/*
 * A process that claims an image again must not do so with the key of its
 * former claim: others may be about to displace that.
 */
static void fence_differ(ThinvmClaim *claim, const ThinvmClaim *newest)
{
    if (newest->epoch && fence_key(claim) == fence_key(newest)) {
        stw_le_p(claim->nonce.data, lduw_le_p(claim->nonce.data) ^ 2);
    }
}

int coroutine_fn thinvm_fence_take(BDRVThinvmState *s, ThinvmClaim *claim,
                                   const ThinvmClaim *newest, Error **errp)
{
    ERRP_GUARD();
    uint64_t key;
    int ret;

    if (fence_keep(s, claim)) {
        return 0;
    }
    fence_differ(claim, newest);
    key = fence_key(claim);
    qemu_co_mutex_lock(&s->fence.lock);
    s->fence.reason = fence_obstacle(s, newest);
    qemu_co_mutex_unlock(&s->fence.lock);
    if (s->fence.reason) {
        return fence_do_without(s, errp);
    }
    ret = fence_register(s, key);
    if (ret < 0) {
        s->fence.reason = "the device does not let us register a key";
        if (s->options.reservation == THINVM_RESERVATION_ON) {
            error_setg_errno(errp, -ret, "Option '%s' is 'on', but %s",
                             THINVM_OPT_RESERVATION, s->fence.reason);
            return ret;
        }
        return 0;
    }
    ret = fence_reserve(s, key);
    if (ret == -EBUSY) {
        ret = fence_contend(s, claim, newest, errp);
    } else if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not reserve the device");
        ret = -EIO;
    }
    trace_thinvm_fence_take(s->bs, key, ret);
    if (ret < 0) {
        fence_unregister(s->bs->file->bs, key);
    }
    if (ret == -ENOTSUP) {
        s->fence.asked = NULL;
        s->fence.reason = FENCE_OF_ANOTHER_KIND;
        return fence_do_without(s, errp);
    }
    if (ret < 0) {
        return ret;
    }
    s->fence.key = key;
    s->fence.renewed_ms = 0;
    s->fence.reason = s->fence.type == THINVM_FENCE_REGISTRANTS_ONLY
                      ? "write exclusive, registrants only: multipath"
                      : "write exclusive";
    qatomic_set(&s->fence.held, true);
    return 0;
}

void coroutine_fn thinvm_fence_release(BDRVThinvmState *s)
{
    if (qatomic_xchg(&s->fence.held, false)) {
        fence_unregister(s->bs->file->bs, s->fence.key);
        trace_thinvm_fence_release(s->bs, s->fence.key);
    }
}

/* What was taken anew must not stay if the image is not ours any more */
static int coroutine_fn GRAPH_RDLOCK fence_taken_anew(BDRVThinvmState *s,
                                                      uint64_t key)
{
    int ret = thinvm_owner_verify(s, NULL);

    if (ret < 0) {
        fence_unregister(s->bs->file->bs, key);
    }
    return ret < 0 ? ret : 1;
}

/* With the lock */
static int coroutine_fn GRAPH_RDLOCK fence_check_locked(BDRVThinvmState *s)
{
    uint64_t key = s->fence.key, holder;
    unsigned type;
    int ret;

    ret = fence_holder(s->bs->file->bs, &holder, &type);
    if (ret < 0) {
        return ret;
    }
    if (type && holder != key) {
        return -EPERM;
    }
    /*
     * It is there, but is it ours?  To reserve once more what one holds
     * changes nothing; from a new session it is a conflict.  Of several paths
     * each would be one: there multipathd sees to those that come back.
     */
    if (type && (type == THINVM_FENCE_REGISTRANTS_ONLY ||
                 fence_reserve(s, key) == 0)) {
        return 0;
    }
    ret = fence_register(s, key);
    if (ret == 0) {
        ret = type ? fence_preempt(s->bs->file->bs, s->fence.type, key, key) :
                     fence_reserve(s, key);
    }
    trace_thinvm_fence_again(s->bs, key, ret);
    if (ret == 0) {
        return fence_taken_anew(s, key);
    }
    return ret == -EBUSY ? -EPERM : ret;
}

/* Requests that failed for one reason come here one after the other */
int coroutine_fn thinvm_fence_check(BDRVThinvmState *s)
{
    int64_t now = qemu_clock_get_ms(QEMU_CLOCK_REALTIME);
    int ret = 0;

    qemu_co_mutex_lock(&s->fence.lock);
    if (qatomic_read(&s->fence.held)) {
        ret = fence_check_locked(s);
        if (ret == 1) {
            s->fence.renewed_ms = now;
        } else if (ret == 0 && s->fence.renewed_ms &&
                   now - s->fence.renewed_ms < FENCE_RENEWED_MS) {
            ret = 1;
        }
    }
    qemu_co_mutex_unlock(&s->fence.lock);
    return ret;
}

int coroutine_fn thinvm_fence_clear(BlockDriverState *file,
                                    const ThinvmClaim *newest, Error **errp)
{
    uint64_t key = fence_key(newest), holder;
    unsigned type;
    int ret;

    if (fence_holder(file, &holder, &type) < 0 || holder != key ||
        !fence_type_is_ours(type, holder, newest)) {
        return 0;
    }
    /* With the former owner's key, so that everything of his goes at once */
    ret = fence_out(file, PR_OUT_REGISTER_AND_IGNORE, 0, 0, key);
    if (ret == 0) {
        ret = fence_preempt(file, type, key, key);
    }
    if (ret == 0) {
        ret = fence_out(file, PR_OUT_RELEASE, type, key, 0);
    }
    fence_unregister(file, key);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not end the reservation that the "
                         "former owner of the image left");
    }
    return ret;
}

bool thinvm_fence_orders(BDRVThinvmState *s)
{
    return qatomic_read(&s->fence.held) && thinvm_device_coherent(s->bs);
}

ThinvmFencing thinvm_fence_kind(BDRVThinvmState *s, const char **reason)
{
    BlockDriverState *file = s->bs->file->bs;
    const char *locking = qdict_get_try_str(file->options, "locking");

    if (qatomic_read(&s->fence.held)) {
        *reason = s->fence.reason;
        return THINVM_FENCING_RESERVATION;
    }
    if (file->drv && !strcmp(file->drv->format_name, "file") &&
        strcmp(locking ?: "auto", "off")) {
        *reason = "a local file";
        return THINVM_FENCING_LOCK;
    }
    *reason = s->fence.reason ?: "";
    return THINVM_FENCING_CLAIM;
}
