/*
 * What thinvm's fuzzer does with an image
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See thinvm-fuzz-run.h.  The data path is the smallest one that keeps the
 * driver's rules; what the guest's data is does not matter here, so none of
 * it is stored.
 */
#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qemu/cutils.h"
#include "thinvm-fuzz-run.h"
#include "block/thinvm/store-int.h"
#include "block/thinvm/state-int.h"

/* Bounds of one input; enough to reach everything */
#define MAX_STEPS           96
#define MAX_LOOKUPS         64
#define MAX_DELETE_STEPS    300
/* Clusters in one range */
#define MAX_RANGE           (1ULL << 20)

typedef struct Run {
    FuzzImage *image;
    ThinvmStore *st, *follower;
    const uint8_t *data;        /* rest of the program */
    size_t size;
    bool clean;                 /* the check found nothing at the beginning */
    uint64_t device_clusters;   /* at the beginning */
    bool repairing;             /* which may copy clusters of data */
    bool holding;               /* a request that stays */
    unsigned token;
    bool by_sums, without;      /* see fuzz_sums() */
    bool done;
} Run;

static FuzzSums sums;

const FuzzSums *fuzz_sums(void)
{
    return &sums;
}

/* ------------------------------------------------------------------ */
/* The program                                                         */

static uint8_t take8(Run *r)
{
    if (!r->size) {
        return 0;
    }
    r->size--;
    return *r->data++;
}

static uint16_t take16(Run *r)
{
    uint16_t low = take8(r);

    return low | take8(r) << 8;
}

static ThinvmInfoState info_of(ThinvmStore *st)
{
    ThinvmInfoState info;

    thinvm_state_lock(thinvm_store_state(st));
    thinvm_state_info(thinvm_store_state(st), &info);
    thinvm_state_unlock(thinvm_store_state(st));
    return info;
}

static uint64_t guest_clusters(ThinvmStore *st)
{
    ThinvmInfoState info = info_of(st);

    return DIV_ROUND_UP(info.virtual_size, 1ULL << info.cluster_bits);
}

/* A guest cluster below @end: near the start, the end, or anywhere */
static uint64_t take_guest(Run *r, uint64_t end)
{
    uint8_t how = take8(r);
    uint64_t value = take16(r);

    if (!end) {
        return 0;
    }
    switch (how & 7) {
    case 0:
    case 1:
    case 2:
        break;
    case 3:
        value = end - 1 - value % end;
        break;
    case 4:
        value *= 512;
        break;
    case 5:
        value = value * 512 * 256 + (how >> 3);
        break;
    case 6:
        value = value << (how >> 3);
        break;
    default:
        value = muldiv64(end, value, 65536);
    }
    return value % end;
}

/* ------------------------------------------------------------------ */
/* What has to hold                                                    */

static void check_write(void *opaque, uint64_t offset, uint64_t bytes,
                        bool discard)
{
    Run *r = opaque;
    ThinvmState *s;
    uint64_t page;

    g_assert(r->st);            /* nobody has begun to write */
    s = thinvm_store_state(r->st);
    if (discard) {
        uint64_t first = offset >> s->cluster_bits;

        g_assert(first >= s->first_cluster);
        g_assert(!thinvm_extents_have_clusters(s, first,
                                               bytes >> s->cluster_bits));
        return;
    }
    if (offset == THINVM_SUPERBLOCK0_OFFSET ||
        offset == THINVM_SUPERBLOCK1_OFFSET) {
        g_assert(bytes <= THINVM_PAGE_SIZE);
        return;
    }
    if (offset >= s->journal_offset &&
        offset + bytes <= s->journal_offset + s->journal_size) {
        return;
    }
    if (r->repairing && bytes == 1ULL << s->cluster_bits &&
        offset % bytes == 0) {
        uint64_t cluster = offset >> s->cluster_bits;

        g_assert(cluster >= s->first_cluster && cluster < s->device_clusters);
        if (!thinvm_extents_have_clusters(s, cluster, 1)) {
            return;
        }
    }
    for (page = offset / THINVM_PAGE_SIZE;
         page < DIV_ROUND_UP(offset + bytes, THINVM_PAGE_SIZE); page++) {
        g_assert(thinvm_extents_have_page(s, page));
    }
}

/* Guest data is about to be read from, or written to, these clusters */
static void check_data(Run *r, ThinvmStore *st, uint64_t first, uint64_t nb)
{
    ThinvmState *s = thinvm_store_state(st);

    g_assert(nb > 0 && first >= s->first_cluster);
    g_assert(first < s->device_clusters && nb <= s->device_clusters - first);
    g_assert(!thinvm_extents_have_clusters(s, first, nb));
    g_assert((first + nb) << s->cluster_bits <= r->image->length);
}

/* For somebody who looks at one input: run.py --replay */
static void say(const char *fmt, ...) G_GNUC_PRINTF(1, 2);

static void say(const char *fmt, ...)
{
    va_list ap;

    if (g_getenv("THINVM_FUZZ_VERBOSE")) {
        va_start(ap, fmt);
        vprintf(fmt, ap);
        va_end(ap);
        putchar('\n');
        fflush(stdout);
    }
}

static void say_error(Error *err)
{
    if (err) {
        g_assert(error_get_pretty(err)[0]);
        say("error: %s", error_get_pretty(err));
        error_free(err);
    }
}

static void report(void *opaque, const char *message)
{
    g_assert(message[0]);
    say("check: %s", message);
}

static bool coroutine_fn check(Run *r, ThinvmStore *st, int fix,
                               ThinvmCheckResult *result)
{
    Error *err = NULL;
    int ret = thinvm_store_check(st, fix, report, r, result, &err);

    g_assert(!err == !(ret < 0));
    say_error(err);
    say("checked, repair %d: %" PRIu64 " corruptions, %" PRIu64 " leaks, %"
        PRIu64 " errors", fix, result->corruptions, result->leaks,
        result->check_errors);
    return ret == 0 && !result->corruptions && !result->leaks &&
           !result->check_errors;
}

/* ------------------------------------------------------------------ */
/* Opening                                                             */

static ThinvmStore *coroutine_fn open_store(Run *r)
{
    Error *err = NULL;
    ThinvmStore *st = thinvm_store_open(&r->image->device, 0, &err);

    g_assert(!err == !!st);
    say_error(err);
    if (st) {
        say("opened%s%s", st->last_summed ? ", by checksums of data" : "",
            st->cut_by_sums ? ", which cut something off" : "");
        r->by_sums |= st->last_summed;
        r->without |= st->cut_by_sums;
    }
    return st;
}

static void coroutine_fn begin_writing(Run *r)
{
    uint64_t epoch = info_of(r->st).epoch + 1;
    Error *err = NULL;
    int ret = thinvm_store_begin_writing(r->st, epoch, &err);

    g_assert(!err == !(ret < 0));
    say_error(err);
}

static void let_go(Run *r)
{
    if (r->holding) {
        thinvm_store_request_end(r->st, r->token);
        r->holding = false;
    }
}

/* Forget the store, as a dying process would, and open it again */
static void coroutine_fn crash(Run *r, bool write)
{
    let_go(r);
    thinvm_store_free(r->st);
    r->st = NULL;
    r->image->fail_in = 0;
    r->st = open_store(r);
    /* Its size may be damaged only where the image was not right before */
    g_assert(r->st || !r->clean);
    if (r->st && write) {
        begin_writing(r);
    }
}

/* ------------------------------------------------------------------ */
/* Steps                                                               */

static void coroutine_fn look(Run *r, ThinvmStore *st,
                              const ThinvmPointer *root, int tree,
                              uint64_t guest, uint64_t end, bool for_write)
{
    unsigned token = thinvm_store_request_begin(st);
    ThinvmMapping m;

    for (int i = 0; i < MAX_LOOKUPS && guest < end; i++) {
        int ret = thinvm_store_lookup(st, tree, root, guest, end - guest,
                                      for_write, &m);

        if (ret < 0) {
            guest++;
            continue;
        }
        g_assert(m.guest == guest && m.count > 0 && m.count <= end - guest);
        if (m.type == THINVM_MAPPING_DATA) {
            check_data(r, st, m.physical, m.count);
        }
        guest += m.count;
    }
    thinvm_store_request_end(st, token);
}

/*
 * The checksum of these parts as they are: nothing is written here.  false:
 * there is none of so much
 */
static bool sum_parts(Run *r, uint64_t cluster, uint16_t valid,
                      ThinvmDataSum *sum)
{
    unsigned part_bits = thinvm_store_state(r->st)->cluster_bits -
                         ctz32(THINVM_PARTS);
    unsigned first = ctz32(valid), nb = 32 - clz32(valid) - first;
    uint64_t bytes = (uint64_t)nb << part_bits;
    uint64_t offset = (cluster * THINVM_PARTS + first) << part_bits;
    g_autofree uint8_t *data = NULL;

    if (bytes > THINVM_SUM_MAX_BYTES) {
        return false;
    }
    data = g_malloc(bytes);
    fuzz_image_read(r->image, offset, bytes, data);
    thinvm_store_sum(r->st, offset, data, bytes, sum);
    return true;
}

static void coroutine_fn map_new(Run *r, int tree, uint64_t guest,
                                 uint64_t max, uint16_t valid)
{
    ThinvmOp op = {
        .type = THINVM_OP_MAP,
        .tree = tree,
        .guest = guest,
        .valid = valid,
        .source = valid == THINVM_ALL_VALID ? THINVM_SOURCE_BACKING :
                  THINVM_SOURCE_ZERO,
    };
    ThinvmDataSum sum;
    bool summed;

    max = MIN(max, THINVM_ENTRIES_PER_LEAF - guest % THINVM_ENTRIES_PER_LEAF);
    if (thinvm_store_reserve(r->st, 0, max, &op.physical, &op.count) < 0) {
        return;
    }
    g_assert(op.count > 0 && op.count <= max);
    check_data(r, r->st, op.physical, op.count);
    summed = op.count == 1 && valid && sum_parts(r, op.physical, valid, &sum);
    if (thinvm_store_execute_summed(r->st, &op, summed ? &sum : NULL, NULL,
                                    NULL) < 0) {
        thinvm_store_unreserve(r->st, op.physical, op.count);
    }
}

static void coroutine_fn write_parts(Run *r, int tree, uint64_t guest,
                                     uint16_t valid)
{
    unsigned token = thinvm_store_request_begin(r->st);
    unsigned bits = info_of(r->st).cluster_bits;
    ThinvmDataSum sum;
    ThinvmMapping m;
    bool summed;

    if (thinvm_store_lookup(r->st, tree, NULL, guest, 1, true, &m) < 0) {
        /* an error to the guest */
    } else if (m.type == THINVM_MAPPING_DATA && !m.shared) {
        ThinvmOp op = {
            .type = THINVM_OP_VALIDATE,
            .tree = tree,
            .guest = guest,
            .physical = m.physical,
            .valid = valid,
        };

        check_data(r, r->st, m.physical, 1);
        if (thinvm_store_touch(r->st, m.physical << bits, 1ULL << bits) == 0 &&
            (m.valid & valid) != valid) {
            summed = !(m.valid & valid) && thinvm_store_invalid_left(r->st) &&
                     sum_parts(r, m.physical, valid, &sum);
            thinvm_store_execute_summed(r->st, &op, summed ? &sum : NULL,
                                        NULL, NULL);
        }
    } else {
        map_new(r, tree, guest, 1,
                valid | (m.type == THINVM_MAPPING_DATA ? m.valid : 0));
    }
    thinvm_store_request_end(r->st, token);
}

static void coroutine_fn write_range(Run *r, uint64_t guest, uint64_t count)
{
    unsigned token = thinvm_store_request_begin(r->st);

    map_new(r, THINVM_TREE_DISK, guest, count, THINVM_ALL_VALID);
    thinvm_store_request_end(r->st, token);
}

static void coroutine_fn invalidate(Run *r, uint64_t guest, uint16_t valid)
{
    ThinvmOp op = {
        .type = THINVM_OP_INVALIDATE,
        .guest = guest,
        .valid = valid ?: 1,
    };
    unsigned token = thinvm_store_request_begin(r->st);
    ThinvmMapping m;

    if (thinvm_store_lookup(r->st, THINVM_TREE_DISK, NULL, guest, 1, false,
                            &m) == 0 && m.type == THINVM_MAPPING_DATA) {
        op.physical = m.physical;
        thinvm_store_execute(r->st, &op, NULL, NULL);
    }
    thinvm_store_request_end(r->st, token);
}

static void coroutine_fn map_run(Run *r, uint64_t guest, bool valid)
{
    ThinvmOp op = {
        .type = THINVM_OP_MAP_RUN,
        .guest = QEMU_ALIGN_DOWN(guest, THINVM_ENTRIES_PER_LEAF),
        .valid = valid ? THINVM_ALL_VALID : 0,
    };
    unsigned token = thinvm_store_request_begin(r->st);
    uint64_t got = 0;
    int ret = thinvm_store_reserve(r->st, 0, THINVM_ENTRIES_PER_LEAF,
                                   &op.physical, &got);

    if (ret == 0) {
        ret = -ENOSPC;
        if (got == THINVM_ENTRIES_PER_LEAF &&
            op.guest + got <= guest_clusters(r->st)) {
            ret = thinvm_store_execute(r->st, &op, NULL, NULL);
        }
        if (ret < 0) {
            thinvm_store_unreserve(r->st, op.physical, got);
        }
    }
    thinvm_store_request_end(r->st, token);
}

static void coroutine_fn resize(Run *r, uint64_t clusters, unsigned sectors)
{
    ThinvmInfoState info = info_of(r->st);
    ThinvmOp op = {
        .type = THINVM_OP_RESIZE,
        .value = (clusters << info.cluster_bits) +
                 sectors * THINVM_SECTOR_SIZE,
    };
    uint64_t old = guest_clusters(r->st);
    uint64_t new = DIV_ROUND_UP(op.value, 1ULL << info.cluster_bits);
    int ret = 0;

    if (new < old) {
        ret = thinvm_store_unmap(r->st, THINVM_TREE_DISK, new, old - new,
                                 THINVM_SOURCE_BACKING, NULL, NULL);
    }
    if (ret == 0) {
        thinvm_store_execute(r->st, &op, NULL, NULL);
    }
}

static int coroutine_fn read_snapshot(ThinvmStore *st, uint32_t slot,
                                      ThinvmSnapshot *snap)
{
    ThinvmState *s = thinvm_store_state(st);
    ThinvmNeeds needs;
    Error *err = NULL;
    int ret;

    thinvm_needs_init(&needs);
    do {
        thinvm_state_lock(s);
        ret = thinvm_snapshot_read(s, slot, snap, &needs, &err);
        thinvm_state_unlock(s);
        if (ret != -EAGAIN) {
            break;
        }
        ret = thinvm_store_read_wanted(st, s, &needs, &err);
    } while (ret == 0);

    thinvm_state_lock(s);
    thinvm_needs_destroy(s, &needs);
    thinvm_state_unlock(s);
    g_assert(!err == !(ret < 0 && ret != -ENOENT));
    say_error(err);
    return ret;
}

static uint32_t nb_slots(ThinvmStore *st)
{
    uint32_t nb;

    thinvm_state_lock(thinvm_store_state(st));
    nb = thinvm_snapshot_nb_slots(thinvm_store_state(st));
    thinvm_state_unlock(thinvm_store_state(st));
    return nb;
}

static uint64_t next_id(ThinvmStore *st)
{
    uint64_t id;

    thinvm_state_lock(thinvm_store_state(st));
    id = thinvm_snapshot_next_id(thinvm_store_state(st));
    thinvm_state_unlock(thinvm_store_state(st));
    return id;
}

static void coroutine_fn snapshot_create(Run *r)
{
    ThinvmSnapshot snap = { .icount = UINT64_MAX };
    ThinvmOp op = {
        .type = THINVM_OP_SNAPSHOT_CREATE,
        .snapshot = &snap,
    };

    snap.id = next_id(r->st);
    snprintf(snap.name, sizeof(snap.name), "s%u", take8(r));
    thinvm_store_execute(r->st, &op, NULL, NULL);
}

static void coroutine_fn snapshot_delete(Run *r, uint32_t slot)
{
    ThinvmSnapshot snap;
    ThinvmOp op = { .type = THINVM_OP_SNAPSHOT_DELETE_STEP, .guest = slot };
    uint64_t id = 0;

    for (int i = 0; i < MAX_DELETE_STEPS; i++) {
        if (read_snapshot(r->st, slot, &snap) < 0 || (id && snap.id != id)) {
            return;
        }
        op.value = id = snap.id;
        if (thinvm_store_execute(r->st, &op, NULL, NULL) < 0) {
            return;
        }
    }
}

static void coroutine_fn snapshot_goto(Run *r, uint32_t slot)
{
    ThinvmSnapshot snap;
    ThinvmOp op = { .type = THINVM_OP_SNAPSHOT_GOTO, .guest = slot };

    if (read_snapshot(r->st, slot, &snap) == 0) {
        op.value = snap.id;
        op.physical = next_id(r->st);
        thinvm_store_execute(r->st, &op, NULL, NULL);
    }
}

static void coroutine_fn snapshot_look(Run *r, ThinvmStore *st, uint32_t slot)
{
    unsigned bits = info_of(st).cluster_bits;
    ThinvmSnapshot snap;

    if (read_snapshot(st, slot, &snap) == 0) {
        look(r, st, &snap.root, THINVM_TREE_DISK, 0,
             DIV_ROUND_UP(snap.virtual_size, 1ULL << bits), false);
        look(r, st, &snap.vmstate_root, THINVM_TREE_VMSTATE, 0,
             DIV_ROUND_UP(snap.vmstate_size, 1ULL << bits), false);
    }
}

static void coroutine_fn set_backing(Run *r, unsigned length)
{
    g_autofree ThinvmBacking *backing = g_new0(ThinvmBacking, 1);
    ThinvmOp op = { .type = THINVM_OP_SET_BACKING, .backing = backing };

    memset(backing->name, 'b', MIN(length, THINVM_MAX_BACKING_NAME));
    if (length) {
        pstrcpy(backing->format, sizeof(backing->format), "raw");
    }
    thinvm_store_execute(r->st, &op, NULL, NULL);
}

static void coroutine_fn vmstate(Run *r, unsigned cluster)
{
    ThinvmOp op = {
        .type = THINVM_OP_VMSTATE_SIZE,
        .value = (uint64_t)(cluster + 1) << info_of(r->st).cluster_bits,
    };

    write_parts(r, THINVM_TREE_VMSTATE, cluster, THINVM_ALL_VALID);
    thinvm_store_execute(r->st, &op, NULL, NULL);
}

static void coroutine_fn end_writing(Run *r, bool checkpoint)
{
    Error *err = NULL;
    int ret;

    let_go(r);
    ret = thinvm_store_end_writing(r->st, checkpoint, &err);
    g_assert(!err == !(ret < 0));
    say_error(err);
}

static void coroutine_fn repair(Run *r, int fix)
{
    ThinvmCheckResult before, first, second;
    bool failing = r->image->fail_in;

    check(r, r->st, 0, &before);
    r->repairing = true;
    check(r, r->st, fix, &first);
    r->repairing = false;
    if (check(r, r->st, 0, &second) || failing || first.check_errors ||
        !thinvm_store_writable(r->st)) {
        return;
    }
    /*
     * Not worse than it was.  What a page is taken for that two trees name may
     * depend on who came first, so a repair can count less than a check.
     */
    g_assert(second.corruptions <= MAX(before.corruptions,
                                       first.corruptions));
}

static void coroutine_fn follow(Run *r)
{
    bool failing = r->image->fail_in;
    Error *err = NULL;
    bool changed;

    if (!r->follower) {
        r->follower = open_store(r);
        g_assert(r->follower || !r->clean || failing ||
                 !thinvm_store_writable(r->st));
        return;
    }
    if (thinvm_store_catch_up(r->follower, &changed, &err) < 0) {
        g_assert(err);
        say_error(err);
    } else {
        g_assert(!err);
        look(r, r->follower, NULL, THINVM_TREE_DISK, 0,
             guest_clusters(r->follower), false);
    }
}

static void hold(Run *r)
{
    if (r->holding) {
        let_go(r);
    } else {
        r->token = thinvm_store_request_begin(r->st);
        r->holding = true;
    }
}

/* As guests flush: what the first inputs of the corpus do not say */
static ThinvmCommitLevel take_level(Run *r)
{
    uint8_t level = take8(r);

    return (level & FUZZ_AS_GUEST) == FUZZ_AS_GUEST ? THINVM_COMMIT_FLUSHED :
           level & 1;
}

static void coroutine_fn step(Run *r)
{
    uint64_t end = guest_clusters(r->st);
    ThinvmCheckResult result;
    ThinvmCommitLevel level;
    uint64_t guest, count;

    say("step %d", r->size ? *r->data % FUZZ_NB_STEPS : 0);
    switch (take8(r) % FUZZ_NB_STEPS) {
    case FUZZ_LOOKUP:
        guest = take_guest(r, end);
        look(r, r->st, NULL, THINVM_TREE_DISK, guest, end, take8(r) & 1);
        break;
    case FUZZ_WRITE:
        guest = take_guest(r, end);
        count = take16(r) ?: 1;
        if (guest < end) {
            write_parts(r, THINVM_TREE_DISK, guest, count);
        }
        break;
    case FUZZ_WRITE_RANGE:
        guest = take_guest(r, end);
        count = take16(r) % THINVM_ENTRIES_PER_LEAF + 1;
        if (guest < end) {
            write_range(r, guest, MIN(count, end - guest));
        }
        break;
    case FUZZ_UNMAP:
        guest = take_guest(r, end);
        count = (uint64_t)take16(r) << (take8(r) & 7);
        count = MIN(MIN(count, MAX_RANGE), end - guest);
        thinvm_store_unmap(r->st, THINVM_TREE_DISK, guest, count,
                           take8(r) & 1, NULL, NULL);
        break;
    case FUZZ_INVALIDATE:
        guest = take_guest(r, end);
        invalidate(r, guest, take16(r));
        break;
    case FUZZ_MAP_RUN:
        guest = take_guest(r, end);
        map_run(r, guest, take8(r) & 1);
        break;
    case FUZZ_RESIZE:
        guest = take_guest(r, THINVM_MAX_GUEST_CLUSTERS);
        resize(r, guest, take8(r) & 31);
        break;
    case FUZZ_SNAPSHOT_CREATE:
        snapshot_create(r);
        break;
    case FUZZ_SNAPSHOT_DELETE:
        snapshot_delete(r, take8(r));
        break;
    case FUZZ_SNAPSHOT_GOTO:
        snapshot_goto(r, take8(r));
        break;
    case FUZZ_SNAPSHOT_READ:
        snapshot_look(r, r->st, take8(r));
        break;
    case FUZZ_SET_BACKING:
        set_backing(r, take16(r) & 1023);
        break;
    case FUZZ_VMSTATE:
        vmstate(r, take16(r));
        break;
    case FUZZ_COMMIT:
        level = take_level(r);
        thinvm_store_commit(r->st, level, take8(r) & 1);
        break;
    case FUZZ_CHECKPOINT:
        thinvm_store_checkpoint(r->st);
        break;
    case FUZZ_RECLAIM:
        thinvm_store_reclaim(r->st, take8(r) & 1);
        break;
    case FUZZ_CRASH:
        crash(r, true);
        break;
    case FUZZ_REOPEN:
        end_writing(r, take8(r) & 1);
        crash(r, true);
        break;
    case FUZZ_CHECK:
        check(r, r->st, 0, &result);
        break;
    case FUZZ_REPAIR:
        repair(r, 1 + take8(r) % 3);
        break;
    case FUZZ_FOLLOW:
        follow(r);
        break;
    case FUZZ_FAIL:
        r->image->fail_in = take8(r);
        break;
    case FUZZ_HOLD:
        hold(r);
        break;
    case FUZZ_GROW:
        r->image->length = MIN(r->image->length + take8(r) * 64 * KiB,
                               r->image->max_length);
        break;
    }
}

/* ------------------------------------------------------------------ */

/* Claims and heartbeats: what the driver reads beside the store */
static void read_owners(FuzzImage *image, const QemuUUID *uuid)
{
    for (int i = 0; i < THINVM_NB_CLAIMS; i++) {
        ThinvmHeartbeatLe heartbeat_le;
        ThinvmHeartbeat heartbeat;
        ThinvmClaimLe claim_le;
        ThinvmClaim claim;

        fuzz_image_read(image, THINVM_CLAIM_OFFSET + i * FUZZ_BLOCK,
                        sizeof(claim_le), &claim_le);
        if (thinvm_claim_decode(uuid, &claim, &claim_le) == 0) {
            g_assert(claim.host_name[sizeof(claim.host_name) - 1] == 0);
        }
        fuzz_image_read(image, THINVM_HEARTBEAT_OFFSET + i * FUZZ_BLOCK,
                        sizeof(heartbeat_le), &heartbeat_le);
        thinvm_heartbeat_decode(uuid, &heartbeat, &heartbeat_le);
    }
}

static void coroutine_fn look_around(Run *r, ThinvmStore *st)
{
    uint64_t end = guest_clusters(st);
    uint32_t slots = nb_slots(st);

    look(r, st, NULL, THINVM_TREE_DISK, 0, end, false);
    look(r, st, NULL, THINVM_TREE_DISK, end - MIN(end, 600), end, true);
    look(r, st, NULL, THINVM_TREE_VMSTATE, 0, THINVM_MAX_GUEST_CLUSTERS,
         false);
    for (uint32_t i = 0; i < MIN(slots, 20); i++) {
        snapshot_look(r, st, i);
    }
    snapshot_look(r, st, slots - 1);
}

static void coroutine_fn finish(Run *r)
{
    ThinvmCheckResult result;

    let_go(r);
    if (r->st) {
        r->image->fail_in = 0;
        thinvm_store_commit(r->st, THINVM_COMMIT_DURABLE, false);
        crash(r, false);
    }
    if (r->st) {
        bool clean = check(r, r->st, 0, &result);

        /*
         * The check does not look at counts behind the end of the device; a
         * hostile image has some there, and they count when it has grown.
         */
        g_assert(clean || !r->clean ||
                 info_of(r->st).device_clusters > r->device_clusters);
    }
    thinvm_store_free(r->st);
    r->st = NULL;
    thinvm_store_free(r->follower);
}

static void coroutine_fn run_entry(void *opaque)
{
    Run *r = opaque;
    FuzzImage *image = r->image;
    ThinvmCheckResult result;
    ThinvmStore *st = open_store(r);

    if (st) {
        read_owners(image, &st->uuid);
        r->clean = check(r, st, 0, &result);
        r->device_clusters = info_of(st).device_clusters;
        look_around(r, st);
        g_assert(image->nb_writes == 0);
        r->st = st;
        begin_writing(r);
        for (int i = 0; i < MAX_STEPS && r->size && r->st; i++) {
            step(r);
        }
        finish(r);
    }
    r->done = true;
}

void fuzz_run(FuzzImage *image)
{
    Run r = {
        .image = image,
        .data = image->program,
        .size = image->program_size,
    };

    image->write_hook = check_write;
    image->hook_opaque = &r;
    qemu_coroutine_enter(qemu_coroutine_create(run_entry, &r));
    g_assert(r.done);           /* nothing here waits */
    sums.inputs++;
    sums.right += r.by_sums;
    sums.wrong += r.without;
}

/* ------------------------------------------------------------------ */

typedef struct Creation {
    FuzzImage *image;
    const ThinvmCreateParams *params;
} Creation;

static void coroutine_fn create_entry(void *opaque)
{
    Creation *c = opaque;
    Run r = {
        .image = c->image,
        .data = c->image->program,
        .size = c->image->program_size,
    };

    thinvm_store_create(&c->image->device, c->params, &error_abort);
    r.st = open_store(&r);
    begin_writing(&r);
    while (r.size) {
        step(&r);
    }
    let_go(&r);
    thinvm_store_free(r.st);
    thinvm_store_free(r.follower);
}

void fuzz_create(FuzzImage *image, const ThinvmCreateParams *params)
{
    Creation c = { image, params };

    qemu_coroutine_enter(qemu_coroutine_create(create_entry, &c));
}
