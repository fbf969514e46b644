/*
 * Unit tests of thinvm where something is nearly used up
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The ring of the journal, when owners come and go without doing anything;
 * a device that becomes shorter while it is open; the place on the device,
 * which shall stay as small as what is in use; the metadata pages that are
 * kept for writes into unwritten runs; and those that are kept for
 * checkpoints.  THINVM_SEED in the environment is for the high-water mark.
 */
#include "qemu/osdep.h"
#include "thinvm-store-test.h"
#include "block/thinvm/state-int.h"

#define LEAF    THINVM_ENTRIES_PER_LEAF

/* ------------------------------------------------------------------ */
/* Snapshots                                                           */

static int coroutine_fn snapshot_create(ThinvmStore *st)
{
    ThinvmState *s = thinvm_store_state(st);
    ThinvmSnapshot snap = {
        .icount = UINT64_MAX, .date_sec = 1, .name = "one",
        .id = thinvm_snapshot_next_id(s), .virtual_size = s->virtual_size,
    };
    ThinvmOp op = { .type = THINVM_OP_SNAPSHOT_CREATE, .snapshot = &snap };

    return thinvm_store_execute(st, &op, NULL, NULL);
}

/* How many steps it took; one that still has children stays */
static unsigned coroutine_fn snapshot_delete(ThinvmStore *st, uint32_t slot,
                                             uint64_t id, unsigned steps)
{
    ThinvmOp op = {
        .type = THINVM_OP_SNAPSHOT_DELETE_STEP, .guest = slot, .value = id,
    };
    unsigned done;

    for (done = 0; done < steps; done++) {
        uint64_t before = stats_of(st).operations;

        if (thinvm_store_execute(st, &op, NULL, NULL) < 0 ||
            stats_of(st).operations == before) {
            break;
        }
    }
    return done;
}

/* ------------------------------------------------------------------ */
/* The ring                                                            */

/* One record, of 4 KiB, that changes hardly any page */
static void coroutine_fn one_record(ThinvmSim *sim, ThinvmStore *st,
                                    unsigned nr)
{
    g_assert_cmpint(image_write(sim, st, nr / THINVM_PARTS, nr % THINVM_PARTS,
                                1, 7, NULL), ==, 0);
    g_assert_cmpint(flush(st), ==, 0);
}

/* As full as an owner may leave it.  Returns how many records it took */
static unsigned coroutine_fn fill_ring(ThinvmSim *sim)
{
    ThinvmStore *st;
    unsigned nr = 0;

    image_create(sim, VIRTUAL_SIZE);
    st = image_open(sim);
    while (thinvm_journal_used(st) + THINVM_PAGE_SIZE <=
           st->journal.size / 4 * 3) {
        one_record(sim, st, nr++);
    }
    g_assert_cmpuint(stats_of(st).checkpoints, ==, 0);
    store_die(st);
    return nr;
}

static void coroutine_fn check_ring(ThinvmSim *sim, unsigned nr)
{
    ThinvmStore *st = image_open(sim);

    for (uint64_t i = 0; i < DIV_ROUND_UP(nr, THINVM_PARTS); i++) {
        g_assert_cmpuint(image_read_tag(sim, st, i), ==, 7);
    }
    g_assert_cmpint(write_one(sim, st, 9999, 9), ==, 0);
    g_assert_cmpint(flush(st), ==, 0);
    image_recount(sim, st);
    image_check(st);
    store_close(st, true);
}

/* Each owner's first record takes 4 KiB, and each one dies behind it */
static void coroutine_fn test_owners_die(ThinvmSim *sim)
{
    unsigned nr = fill_ring(sim);

    for (int i = 0; i < 600; i++) {
        ThinvmStore *st = image_open(sim);

        g_assert_cmpuint(thinvm_journal_used(st), <=,
                         st->journal.size / 4 * 3);
        store_die(st);
    }
    check_ring(sim, nr);
}

/*
 * The same when the device does not take the checkpoint that makes room: far
 * more often than records fit into the ring
 */
static void coroutine_fn test_owners_fail(ThinvmSim *sim)
{
    unsigned nr = fill_ring(sim);

    sim_fail(sim, SIM_WRITE, JOURNAL_END, UINT64_MAX, 0, EIO, false);
    for (uint64_t i = 0; i < 300; i++) {
        ThinvmStore *st = thinvm_store_open(sim_device(sim), 0, &error_abort);
        Error *err = NULL;

        g_assert_cmpint(thinvm_store_begin_writing(st, 2 + i, &err), ==, -EIO);
        g_assert_nonnull(strstr(error_get_pretty(err), "checkpoint"));
        error_free(err);
        g_assert_false(thinvm_store_writable(st));
        if (i == 299) {
            /* the same store can try again */
            sim_fail(sim, 0, 0, 0, 0, 0, false);
            g_assert_cmpint(thinvm_store_begin_writing(st, 3 + i,
                                                       &error_abort), ==, 0);
        }
        store_die(st);
    }
    check_ring(sim, nr);
}

/* ------------------------------------------------------------------ */
/* Metadata ahead of need                                              */

static void coroutine_fn free_one(ThinvmStore *st, uint64_t guest)
{
    g_assert_cmpint(thinvm_store_unmap(st, 0, guest, 1, THINVM_SOURCE_ZERO,
                                       NULL, &error_abort), ==, 0);
    g_assert_cmpint(flush(st), ==, 0);
    thinvm_store_reclaim(st, false);
}

/*
 * On a full device, with less metadata space than is wanted ahead of need,
 * single clusters come free.  Extents of one cluster would take them all and
 * not bring the reserve nearer to what it should be.
 */
static void coroutine_fn test_single_clusters(ThinvmSim *sim)
{
    bool urgent;
    ThinvmStore *st;
    uint64_t n = 0, pages, leaf = 50;

    image_create(sim, 64 * VIRTUAL_SIZE);
    st = image_open(sim);
    while (write_one(sim, st, n, 1) == 0) {
        n++;
    }
    g_assert_cmpuint(n, >, 200);
    pages = info_of(st).metadata_pages;
    while (!thinvm_space_metadata_wanted(st->state, &urgent)) {
        free_one(st, --n);
        g_assert_cmpint(write_one(sim, st, leaf++ * LEAF, 2), ==, 0);
    }
    for (uint64_t i = 0; i < 100; i++) {
        free_one(st, i);
        free_one(st, i + 20);
        g_assert_cmpint(write_one(sim, st, i, 3), ==, 0);
        g_assert_cmpint(write_one(sim, st, i + 20, 3), ==, 0);
    }
    g_assert_cmpuint(info_of(st).metadata_pages, ==, pages);
    /* but where there is room for a useful one it is taken */
    for (uint64_t i = 100; i < 160; i++) {
        free_one(st, i);
    }
    g_assert_cmpuint(info_of(st).metadata_pages, >=, pages + 16);
    image_recount(sim, st);
    image_check(st);
    store_close(st, true);
}

static void run_small(gconstpointer data)
{
    ThinvmSim *sim = sim_new(1, DEVICE_SIZE, DEVICE_SIZE);

    run_on(sim, (TestBody *)data);
    sim_free(sim);
}

/* ------------------------------------------------------------------ */
/* A device that becomes shorter while it is open                      */

#define NB_SHORT    300         /* guest clusters that are written */

/* What each of them may have: as it was when it was last durable, or since */
typedef struct Values {
    uint64_t old, new;
} Values;

static void coroutine_fn check_values(ThinvmSim *sim, ThinvmStore *st,
                                      const Values *values)
{
    for (uint64_t i = 0; i < NB_SHORT; i++) {
        uint64_t tag = image_read_tag(sim, st, i * 40);

        if (tag != values[i].old && tag != values[i].new) {
            g_error("guest cluster %" PRIu64 " has %" PRIx64, i * 40, tag);
        }
    }
}

/* Whatever lies behind the end fails; the rest works on */
static void coroutine_fn use_shortened(ThinvmSim *sim, ThinvmStore *st,
                                       Values *values, bool restored)
{
    g_autofree uint8_t *buf = g_malloc(IMAGE_CLUSTER);
    unsigned failed = 0;

    for (uint64_t i = 0; i < NB_SHORT; i++) {
        uint64_t guest = i * 40;
        int ret = image_read(sim, st, guest, buf);

        if (ret == 0) {
            g_assert_cmpuint(image_tag(buf, guest * IMAGE_SECTORS), ==,
                             values[i].old);
        } else {
            g_assert_cmpint(ret, ==, -EIO);
            failed++;
        }
        if (i % 3 == 0) {
            ret = write_one(sim, st, guest, i + 5000);
            values[i].new = i + 5000;
        } else if (i % 7 == 0) {
            ret = thinvm_store_unmap(st, 0, guest, 1, THINVM_SOURCE_ZERO, NULL,
                                     NULL);
            values[i].new = TAG_ZERO;
        } else {
            continue;
        }
        if (ret == 0 && restored) {
            values[i].old = values[i].new;
        }
        if (i % 60 == 0) {
            thinvm_store_checkpoint(st);
            flush(st);
            thinvm_store_reclaim(st, true);
        }
    }
    g_assert_cmpuint(failed, >, 0);
}

/* Its end is in the header, the ring, metadata, data; @restored: while open */
static void coroutine_fn shorten_to(ThinvmSim *sim, uint64_t length,
                                    bool restored)
{
    g_autofree Values *values = g_new(Values, NB_SHORT);
    uint64_t before;
    ThinvmStore *st;

    image_create(sim, VIRTUAL_SIZE);
    st = image_open(sim);
    for (uint64_t i = 0; i < NB_SHORT; i++) {
        g_assert_cmpint(write_one(sim, st, i * 40, i + 1), ==, 0);
        values[i] = (Values) { i + 1, i + 1 };
    }
    g_assert_cmpint(thinvm_store_checkpoint(st), ==, 0);
    before = info_of(st).device_clusters << IMAGE_CLUSTER_BITS;
    g_assert_cmpuint(length, <, before);

    sim_truncate(sim, length);
    use_shortened(sim, st, values, restored);
    if (restored) {
        sim_truncate(sim, MAX(before, sim_length(sim)));
        g_assert_cmpint(flush(st), ==, 0);
        g_assert_cmpint(thinvm_store_checkpoint(st), ==, 0);
        check_values(sim, st, values);
    }
    store_die(st);
    if (sim_length(sim) < before) {
        must_fail_to_open(sim, length < THINVM_SUPERBLOCK1_OFFSET ? "" :
                               "truncated");
        sim_truncate(sim, before);
    }
    st = image_open(sim);
    check_values(sim, st, values);
    image_recount(sim, st);
    image_check(st);
    store_close(st, true);
}

static void coroutine_fn test_shortened(ThinvmSim *sim)
{
    static const uint64_t lengths[] = {
        4 * KiB, 256 * KiB, 1 * MiB, JOURNAL_END - 512 * KiB, JOURNAL_END,
        JOURNAL_END + 64 * KiB, 3 * MiB, 4 * MiB, 5 * MiB,
    };

    for (unsigned i = 0; i < ARRAY_SIZE(lengths) * 2; i++) {
        shorten_to(sim, lengths[i / 2], i % 2);
    }
}

/* ------------------------------------------------------------------ */
/* The high-water mark                                                 */

#define AREA        49152       /* guest clusters that are written to */
#define STEPS       10000
#define MAX_SNAPSHOTS 8

typedef struct Volume {
    ThinvmSim *sim;
    ThinvmStore *st;
    uint64_t high;              /* no data cluster was ever at or above */
    uint64_t peak;              /* clusters that were ever in use at once */
    uint64_t snapshot[MAX_SNAPSHOTS];   /* ids, by slot; 0: none */
} Volume;

static uint64_t below(Volume *v, uint64_t n)
{
    return sim_random_below(sim_rng(v->sim), n);
}

/* Device clusters that are no more free: header, metadata and data */
static void volume_count(Volume *v)
{
    ThinvmInfoState info = info_of(v->st);

    v->peak = MAX(v->peak, info.device_clusters - info.free_clusters);
}

static void coroutine_fn volume_do(Volume *v, const ThinvmOp *op)
{
    g_assert_cmpint(thinvm_store_execute(v->st, op, NULL, NULL), ==, 0);
    volume_count(v);
}

/* Where the driver would like to go on (io-write.c) */
static uint64_t coroutine_fn goal(Volume *v, uint64_t guest)
{
    ThinvmMapping m;

    if (guest == 0) {
        return 0;
    }
    g_assert_cmpint(thinvm_store_lookup(v->st, 0, NULL, guest - 1, 1, false,
                                        &m), ==, 0);
    return m.type == THINVM_MAPPING_DATA ? m.physical + 1 : 0;
}

/* As the driver does it, without the data */
static void coroutine_fn volume_write(Volume *v, uint64_t guest, uint64_t end)
{
    while (guest < end) {
        uint64_t max = MIN(end - guest, THINVM_ENTRIES_PER_LEAF -
                           guest % THINVM_ENTRIES_PER_LEAF);
        ThinvmOp op = {
            .type = THINVM_OP_MAP, .guest = guest, .valid = THINVM_ALL_VALID,
        };
        ThinvmMapping m;

        g_assert_cmpint(thinvm_store_lookup(v->st, 0, NULL, guest, max, true,
                                            &m), ==, 0);
        op.count = MIN(max, m.count);
        if (m.type != THINVM_MAPPING_DATA || m.shared) {
            g_assert_cmpint(thinvm_store_reserve(v->st, goal(v, guest),
                                                 op.count, &op.physical,
                                                 &op.count), ==, 0);
            v->high = MAX(v->high, op.physical + op.count);
            volume_do(v, &op);
        }
        guest += op.count;
    }
}

static void coroutine_fn volume_snapshot(Volume *v)
{
    unsigned slot = below(v, MAX_SNAPSHOTS);
    ThinvmState *s = thinvm_store_state(v->st);

    if (v->snapshot[slot]) {
        while (snapshot_delete(v->st, slot, v->snapshot[slot], 1)) {
            volume_count(v);
        }
        v->snapshot[slot] = 0;
        return;
    }
    for (slot = 0; v->snapshot[slot]; slot++) {
        /* the lowest free one is taken */
    }
    v->snapshot[slot] = thinvm_snapshot_next_id(s);
    g_assert_cmpint(snapshot_create(v->st), ==, 0);
    volume_count(v);
}

static void coroutine_fn volume_step(Volume *v, unsigned nr)
{
    uint64_t guest = below(v, AREA);
    unsigned chance = below(v, 100);
    /* there are times of growth and times in which much is deleted */
    unsigned writes = nr / 1000 & 1 ? 40 : 70;

    if (chance < 1) {
        volume_snapshot(v);
    } else if (chance < writes) {
        volume_write(v, guest, MIN(AREA, guest + 1 + below(v, 64)));
    } else {
        g_assert_cmpint(thinvm_store_unmap(v->st, 0, guest,
                                           MIN(AREA - guest,
                                               1 + below(v, 128)),
                                           THINVM_SOURCE_ZERO, NULL, NULL),
                        ==, 0);
    }
    if (nr % 16 == 0) {
        g_assert_cmpint(flush(v->st), ==, 0);
        thinvm_store_reclaim(v->st, false);
    }
}

static void coroutine_fn compact_lock(void *opaque, int tree, uint64_t guest,
                                      uint64_t count)
{
    /* nobody else is there */
}

static void coroutine_fn compact_unlock(void *opaque)
{
}

/* Two of three clusters go, and what is left moves together */
static void coroutine_fn thin_out_and_compact(Volume *v)
{
    ThinvmCompactLocks locks = { compact_lock, compact_unlock };
    ThinvmInfoState info;
    ThinvmCompact *c;
    uint64_t bytes, in_use;
    bool done = false;
    double ratio;

    for (uint64_t guest = 0; guest < AREA; guest += 3) {
        g_assert_cmpint(thinvm_store_unmap(v->st, 0, guest, 2,
                                           THINVM_SOURCE_ZERO, NULL, NULL),
                        ==, 0);
    }
    c = thinvm_compact_new(v->st, &locks);
    while (!done) {
        g_assert_cmpint(thinvm_compact_step(c, &done, &error_abort), ==, 0);
    }
    thinvm_compact_free(c);
    g_assert_cmpint(thinvm_store_high_water(v->st, &bytes), ==, 0);
    info = info_of(v->st);
    in_use = info.device_clusters - info.free_clusters;
    ratio = (double)(bytes >> IMAGE_CLUSTER_BITS) / in_use;
    g_test_message("compacted: high-water mark %" PRIu64 " clusters, in use %"
                   PRIu64 ": ratio %.3f", bytes >> IMAGE_CLUSTER_BITS, in_use,
                   ratio);
    g_assert_cmpfloat(ratio, <=, 1.05);
}

/*
 * What was freed is used before what was never used: the device that a
 * volume ever needed is what was ever in use at once.
 */
static void coroutine_fn test_high_water(ThinvmSim *sim)
{
    Volume v = { .sim = sim };
    ThinvmFreedRange extent;
    double ratio;

    image_create(sim, VIRTUAL_SIZE);
    v.st = image_open(sim);
    for (unsigned nr = 0; nr < STEPS; nr++) {
        volume_step(&v, nr);
    }
    for (unsigned i = 0; thinvm_state_extent(thinvm_store_state(v.st), i,
                                             &extent); i++) {
        v.high = MAX(v.high, extent.first + extent.nb_clusters);
    }
    ratio = (double)v.high / v.peak;
    g_test_message("high-water mark %" PRIu64 " of %" PRIu64 " clusters, peak "
                   "in use %" PRIu64 ": ratio %.3f", v.high,
                   info_of(v.st).device_clusters, v.peak, ratio);
    g_assert_cmpuint(v.peak, >, AREA / 2);
    g_assert_cmpfloat(ratio, <=, 1.05);
    thin_out_and_compact(&v);
    image_check(v.st);
    store_close(v.st, true);
}

/*
 * A disk that goes on in sequence where it ended: at the mark there is always
 * place to go on, but below there is as much that was freed.
 */
static void coroutine_fn test_reuse(ThinvmSim *sim)
{
    const uint64_t nb = 16384, hole = 64;
    Volume v = { .sim = sim };

    image_create(sim, VIRTUAL_SIZE);
    v.st = image_open(sim);
    volume_write(&v, 0, nb);
    for (uint64_t guest = 0; guest + hole < nb; guest += 2 * hole) {
        g_assert_cmpint(thinvm_store_unmap(v.st, 0, guest, hole,
                                           THINVM_SOURCE_ZERO, NULL, NULL),
                        ==, 0);
    }
    g_assert_cmpint(flush(v.st), ==, 0);
    thinvm_store_reclaim(v.st, false);
    for (uint64_t guest = nb; guest < nb + nb / 2; guest += 16) {
        volume_write(&v, guest, guest + 16);
    }
    g_test_message("high-water mark %" PRIu64 ", peak in use %" PRIu64
                   ": ratio %.3f", v.high, v.peak, (double)v.high / v.peak);
    g_assert_cmpfloat((double)v.high / v.peak, <=, 1.05);
    image_check(v.st);
    store_close(v.st, true);
}

/* ------------------------------------------------------------------ */
/* Leaves that unwritten runs are promised                             */

#define RUN         THINVM_ENTRIES_PER_LEAF
#define FULL_DEVICE (3 * GiB)
#define FULL_RUNS   400         /* more than the device has room for */
#define FIRST_RUN   4           /* what lies before is for single clusters */

static ThinvmOp run_op(uint64_t run, uint64_t physical)
{
    return (ThinvmOp) {
        .type = THINVM_OP_MAP_RUN, .guest = run * RUN, .physical = physical,
    };
}

/* Reserve a whole run, or nothing */
static int coroutine_fn reserve_run(ThinvmStore *st, uint64_t goal,
                                    uint64_t *physical)
{
    uint64_t nb;
    int ret = thinvm_store_reserve(st, goal, RUN, physical, &nb);

    if (ret == 0 && nb < RUN) {
        thinvm_store_unreserve(st, *physical, nb);
        ret = -ENOSPC;
    }
    return ret;
}

/* Unwritten runs nearly as far as there is room; returns how many */
static unsigned coroutine_fn fill_with_runs(ThinvmStore *st)
{
    uint64_t goal = 0, physical;
    unsigned run = 0;

    while (info_of(st).free_clusters > 2 * RUN &&
           reserve_run(st, goal, &physical) == 0) {
        ThinvmOp op = run_op(FIRST_RUN + run, physical);

        if (thinvm_store_execute(st, &op, NULL, NULL) < 0) {
            thinvm_store_unreserve(st, physical, RUN);
            break;
        }
        goal = physical + RUN;
        run++;
    }
    return run;
}

/* Single clusters, to the last one; returns how many */
static unsigned coroutine_fn fill_with_clusters(ThinvmSim *sim,
                                                ThinvmStore *st)
{
    unsigned nb = 0;

    while (write_one(sim, st, nb, 7) == 0) {
        nb++;
    }
    g_assert_cmpuint(nb, <, FIRST_RUN * RUN);
    return nb;
}

/* There are as many pages as were promised */
static void check_kept(ThinvmStore *st)
{
    ThinvmInfoState info = info_of(st);

    g_assert_true(info.promises_exact);
    g_assert_cmpuint(info.free_metadata_pages, >=, info.promised_pages);
}

static void coroutine_fn check_promises(ThinvmStore *st, uint64_t promised)
{
    check_kept(st);
    g_assert_cmpuint(info_of(st).promised_pages, ==, promised);
    image_check(st);
}

/*
 * Each snapshot makes the next change copy a page with many unwritten runs,
 * and thus promises as many pages more.  That goes on until one is refused.
 * @nb single clusters are beside the runs, in the same page.
 */
static void coroutine_fn promise_too_much(ThinvmStore *st, unsigned nb)
{
    uint32_t slot = 0;
    int ret = 0;

    while (slot < nb && ret == 0) {
        ret = snapshot_create(st);
        if (ret == 0) {
            ret = thinvm_store_unmap(st, 0, slot, 1, THINVM_SOURCE_ZERO,
                                     NULL, NULL);
            slot++;
        }
        check_kept(st);
    }
    g_assert_cmpint(ret, ==, -ENOSPC);
    g_assert_cmpuint(slot, >, 0);
    while (slot--) {
        g_assert_cmpuint(snapshot_delete(st, slot, slot + 1, UINT_MAX), >, 0);
        check_kept(st);
    }
    g_assert_cmpuint(info_of(st).nb_snapshots, ==, 0);
}

/* With a small cache, which bounds dirty pages, and with them the reserve */
static ThinvmStore *coroutine_fn open_small(ThinvmSim *sim)
{
    ThinvmStore *st = thinvm_store_open(sim_device(sim), MiB, &error_abort);

    thinvm_store_begin_writing(st, info_of(st).epoch + 1, &error_abort);
    return st;
}

/*
 * On a device that is full to the last cluster each unwritten run can be
 * written to, though owners die and come again meanwhile.
 */
static void coroutine_fn test_promise_kept(ThinvmSim *sim)
{
    ThinvmInfoState info;
    unsigned nb, single, order[FULL_RUNS];
    ThinvmStore *st;

    image_create(sim, 8 * GiB);
    st = open_small(sim);
    thinvm_store_grow(st, FULL_DEVICE, &error_abort);
    nb = fill_with_runs(st);
    single = fill_with_clusters(sim, st);
    info = info_of(st);
    g_test_message("%u unwritten runs, %" PRIu64 " clusters left, %" PRIu64
                   " of %" PRIu64 " metadata pages free", nb,
                   info.free_clusters, info.free_metadata_pages,
                   info.metadata_pages);
    g_assert_cmpuint(nb, <, FULL_RUNS);
    g_assert_cmpuint(nb, >, 3 * info.dirty_bound);
    check_promises(st, nb);
    promise_too_much(st, single);
    check_promises(st, nb);
    for (unsigned i = 0; i < nb; i++) {
        unsigned j = sim_random_below(sim_rng(sim), i + 1);

        order[i] = order[j];
        order[j] = i;
    }
    for (unsigned i = 0; i < nb; i++) {
        uint64_t guest = (FIRST_RUN + order[i]) * RUN +
                         sim_random_below(sim_rng(sim), RUN);

        g_assert_cmpint(image_write(sim, st, guest, i % THINVM_PARTS, 1, 7,
                                    NULL), ==, 0);
        if (i % 50 == 49) {
            g_assert_cmpint(flush(st), ==, 0);
            store_die(st);
            st = open_small(sim);
            check_promises(st, nb - 1 - i);
        }
    }
    check_promises(st, 0);
    store_close(st, true);
}

/* ------------------------------------------------------------------ */

#define LIVES       90
#define LIFE_STEPS  100
#define LIFE_RUNS   40
#define LIFE_DEVICE (320 * MiB)
#define LIFE_DISK   (LIFE_RUNS * RUN * (uint64_t)IMAGE_CLUSTER)

/* What the lives have come by */
static struct {
    uint64_t most, unmaps, writes, copies, creates, deletes, gotos, shrinks;
} seen;

static void coroutine_fn life_map_run(Volume *v, uint64_t run)
{
    uint64_t physical;
    ThinvmOp op;
    int ret;

    ret = reserve_run(v->st, 0, &physical);
    if (ret == 0) {
        op = run_op(run, physical);
        ret = thinvm_store_execute(v->st, &op, NULL, NULL);
        if (ret < 0) {
            thinvm_store_unreserve(v->st, physical, RUN);
        }
    }
    g_assert_true(ret == 0 || ret == -ENOSPC);
}

/* Most of the time where something is mapped */
static void coroutine_fn life_write(Volume *v)
{
    ThinvmMapping m;
    uint64_t guest;
    bool mapped;
    int ret;

    for (int i = 0; i < 8; i++) {
        guest = below(v, LIFE_RUNS * RUN);
        ret = thinvm_store_lookup(v->st, 0, NULL, guest, 1, true, &m);
        g_assert_cmpint(ret, ==, 0);
        mapped = m.type == THINVM_MAPPING_DATA;
        if (mapped) {
            break;
        }
    }
    ret = image_write(v->sim, v->st, guest, below(v, THINVM_PARTS), 1, 7,
                      NULL);
    if (mapped && !m.shared) {
        g_assert_cmpint(ret, ==, 0);
    }
    g_assert_true(ret == 0 || ret == -ENOSPC);
    seen.writes += mapped && !m.shared;
    seen.copies += mapped && m.shared && ret == 0;
}

static void coroutine_fn life_unmap(Volume *v, uint64_t guest, uint64_t count)
{
    g_assert_cmpint(thinvm_store_unmap(v->st, 0, guest, count, below(v, 2),
                                       NULL, NULL), ==, 0);
    seen.unmaps++;
}

static void coroutine_fn life_shrink(Volume *v)
{
    ThinvmOp op = {
        .type = THINVM_OP_RESIZE, .value = LIFE_DISK - below(v, LIFE_DISK / 8),
    };
    uint64_t guest;

    op.value = ROUND_UP(op.value, SIM_SECTOR);
    guest = DIV_ROUND_UP(op.value, IMAGE_CLUSTER);
    life_unmap(v, guest, LIFE_RUNS * RUN - guest);
    g_assert_cmpint(thinvm_store_execute(v->st, &op, NULL, NULL), ==, 0);
    op.value = LIFE_DISK;
    g_assert_cmpint(thinvm_store_execute(v->st, &op, NULL, NULL), ==, 0);
    seen.shrinks++;
}

static void coroutine_fn life_goto(Volume *v, uint32_t slot, uint64_t id)
{
    ThinvmOp op = {
        .type = THINVM_OP_SNAPSHOT_GOTO, .guest = slot, .value = id,
        .physical = thinvm_snapshot_next_id(thinvm_store_state(v->st)),
    };
    int ret = thinvm_store_execute(v->st, &op, NULL, NULL);

    g_assert_true(ret == 0 || ret == -ENOSPC);
    seen.gotos += ret == 0;
}

static void coroutine_fn life_snapshot(Volume *v)
{
    uint32_t slot = below(v, 6);
    ThinvmSnapshot snap;
    int ret;

    if (slot >= thinvm_snapshot_nb_slots(thinvm_store_state(v->st)) ||
        thinvm_store_read_snapshot(v->st, slot, &snap, NULL) < 0) {
        ret = snapshot_create(v->st);
        g_assert_true(ret == 0 || ret == -ENOSPC);
        seen.creates += ret == 0;
    } else if (!(snap.flags & THINVM_SNAPSHOT_HIDDEN) && below(v, 2)) {
        life_goto(v, slot, snap.id);
    } else {
        /* sometimes not to the end */
        seen.deletes += snapshot_delete(v->st, slot, snap.id,
                                        below(v, 3) ? UINT_MAX : below(v, 8));
    }
}

static void coroutine_fn life_step(Volume *v)
{
    uint64_t run = below(v, LIFE_RUNS);
    uint64_t guest = run * RUN + below(v, RUN);

    switch (below(v, 24)) {
    case 0 ... 6:
        life_map_run(v, run);
        break;
    case 7 ... 15:
        life_write(v);
        break;
    case 16 ... 19:
        life_unmap(v, guest, 1 + below(v, 8));
        break;
    case 20:
        life_unmap(v, guest, MIN(LIFE_RUNS * RUN - guest,
                                 1 + below(v, 4 * RUN)));
        break;
    case 21:
        g_assert_cmpint(below(v, 2) ? thinvm_store_checkpoint(v->st) :
                                      flush(v->st), ==, 0);
        thinvm_store_reclaim(v->st, false);
        break;
    case 22:
        if (below(v, 4) == 0) {
            life_shrink(v);
        }
        break;
    default:
        life_snapshot(v);
        break;
    }
}

static void coroutine_fn life_create_image(ThinvmSim *sim)
{
    image_create(sim, LIFE_DISK);
}

/* What the last life has left; another one, which ends without a word */
static void coroutine_fn promise_life(ThinvmSim *sim)
{
    Volume v = { .sim = sim, .st = image_open(sim) };

    check_promises(v.st, info_of(v.st).promised_pages);
    for (int i = 0; i < LIFE_STEPS; i++) {
        life_step(&v);
        check_kept(v.st);
        seen.most = MAX(seen.most, info_of(v.st).promised_pages);
    }
    check_promises(v.st, info_of(v.st).promised_pages);
    store_die(v.st);
}

/* The check counts the runs themselves */
static void test_promise_counted(void)
{
    ThinvmSim *sim = sim_new(1, LIFE_DEVICE, LIFE_DEVICE);

    run_on(sim, life_create_image);
    for (unsigned nr = 0; nr < LIVES; nr++) {
        ThinvmSim *cut;

        run_on(sim, promise_life);
        cut = sim_cut(sim, nr, nr % SIM_CUT__MAX);
        sim_free(sim);
        sim = cut;
    }
    run_on(sim, promise_life);
    sim_free(sim);
    g_test_message("at most %" PRIu64 " runs promised, %" PRIu64 " unmaps, %"
                   PRIu64 " writes, %" PRIu64 " copies, %" PRIu64
                   " snapshots, %" PRIu64 " steps of deletion, %" PRIu64
                   " reverts, %" PRIu64 " shrinks", seen.most, seen.unmaps,
                   seen.writes, seen.copies, seen.creates, seen.deletes,
                   seen.gotos, seen.shrinks);
    g_assert_cmpuint(seen.most, >, 10);
    g_assert_true(seen.unmaps > 100 && seen.writes > 40 && seen.copies > 100);
    g_assert_true(seen.creates > 30 && seen.deletes > 100);
    g_assert_true(seen.gotos > 20 && seen.shrinks > 20);
}

/* ------------------------------------------------------------------ */

/* A LUN that is much larger than what is in use */
static void run_large(gconstpointer data)
{
    const char *seed = g_getenv("THINVM_SEED");
    ThinvmSim *sim = sim_new(seed ? strtoull(seed, NULL, 0) : 1, 4 * GiB,
                             4 * GiB);

    run_on(sim, (TestBody *)data);
    sim_free(sim);
}

static void run_full(gconstpointer data)
{
    ThinvmSim *sim = sim_new(1, DEVICE_SIZE, FULL_DEVICE);

    run_on(sim, (TestBody *)data);
    sim_free(sim);
}

/* ------------------------------------------------------------------ */
/* What is kept for checkpoints                                        */

/* The reserve follows the size of the device; so does room for it */
static void coroutine_fn test_enlarged(ThinvmSim *sim)
{
    ThinvmInfoState before, after;
    ThinvmStore *st;

    image_create(sim, 32 * GiB);
    st = thinvm_store_open(sim_device(sim), 64 * MiB, &error_abort);
    thinvm_store_begin_writing(st, 1, &error_abort);
    before = info_of(st);
    thinvm_store_grow(st, FULL_DEVICE, &error_abort);
    g_assert_cmpint(image_write(sim, st, 1000, 0, 1, 7, NULL), ==, 0);
    after = info_of(st);
    /* More than two extents more */
    g_assert_cmpuint(before.free_metadata_pages, <, 2 * before.dirty_bound +
                     THINVM_EXTENT_MAX_PAGES);
    g_assert_cmpuint(after.free_metadata_pages, >, 3 * after.dirty_bound);
    g_assert_cmpuint(3 * after.dirty_bound, >, before.metadata_pages +
                     2 * THINVM_EXTENT_MAX_PAGES);
    image_check(st);
    store_close(st, true);
}

/*
 * Any number of checkpoints in turn, with nothing between them, are possible
 * while operations leave what they do; where somebody has left less they are
 * refused.
 */
static void coroutine_fn test_checkpoint_places(ThinvmSim *sim)
{
    ThinvmStore *st;
    ThinvmState *s;
    uint64_t last;

    image_create(sim, 8 * GiB);
    st = open_small(sim);
    s = thinvm_store_state(st);
    last = thinvm_space_last_pages(s);
    while (s->nb_meta_free > 2 * last) {
        thinvm_place_alloc(s);
    }
    for (int i = 0; i < 8; i++) {
        st->nb_repair_checkpoints = 1;
        g_assert_cmpint(thinvm_store_checkpoint(st), ==, 0);
    }
    while (s->nb_meta_free >= last) {
        thinvm_place_alloc(s);
    }
    st->nb_repair_checkpoints = 1;
    g_assert_cmpint(thinvm_store_checkpoint(st), ==, -ENOSPC);
    g_assert_cmpuint(st->nb_repair_checkpoints, ==, 1);
    store_die(st);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    qemu_init_main_loop(&error_abort);
    module_call_init(MODULE_INIT_TRACE);

    add("/thinvm/limits/ring/owners-die", test_owners_die);
    add("/thinvm/limits/ring/owners-fail", test_owners_fail);
    add("/thinvm/limits/device/shortened", test_shortened);
    g_test_add_data_func("/thinvm/limits/metadata/single-clusters",
                         test_single_clusters, run_small);
    g_test_add_data_func("/thinvm/limits/high-water/random", test_high_water,
                         run_large);
    g_test_add_data_func("/thinvm/limits/high-water/reuse", test_reuse,
                         run_large);
    g_test_add_data_func("/thinvm/limits/promise/kept", test_promise_kept,
                         run_full);
    g_test_add_func("/thinvm/limits/promise/counted", test_promise_counted);
    g_test_add_data_func("/thinvm/limits/reserve/enlarged", test_enlarged,
                         run_full);
    add("/thinvm/limits/reserve/checkpoints", test_checkpoint_places);
    return g_test_run();
}
