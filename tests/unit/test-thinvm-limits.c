/*
 * Unit tests of thinvm where something is nearly used up
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The ring of the journal, when owners come and go without doing anything;
 * and the place on the device, which shall stay as small as what is in use.
 * Nothing of a guest's data is written here.
 */
#include "qemu/osdep.h"
#include "thinvm-store-test.h"
#include "block/thinvm/state-int.h"

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

/* The same when the device does not take the checkpoint that makes room */
static void coroutine_fn test_owners_fail(ThinvmSim *sim)
{
    unsigned nr = fill_ring(sim);

    sim_fail(sim, SIM_WRITE, JOURNAL_END, UINT64_MAX, 0, EIO, false);
    for (uint64_t i = 0; i < 40; i++) {
        ThinvmStore *st = thinvm_store_open(sim_device(sim), 0, &error_abort);
        Error *err = NULL;

        g_assert_cmpint(thinvm_store_begin_writing(st, 2 + i, &err), ==, -EIO);
        g_assert_nonnull(strstr(error_get_pretty(err), "checkpoint"));
        error_free(err);
        g_assert_false(thinvm_store_writable(st));
        if (i == 39) {
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
        ThinvmOp op = {
            .type = THINVM_OP_SNAPSHOT_DELETE_STEP,
            .guest = slot, .value = v->snapshot[slot],
        };
        uint32_t nb = s->nb_snapshots;

        while (s->nb_snapshots == nb) {
            volume_do(v, &op);
        }
        v->snapshot[slot] = 0;
        return;
    }
    for (slot = 0; v->snapshot[slot]; slot++) {
        /* the lowest free one is taken */
    }
    {
        ThinvmSnapshot snap = {
            .icount = UINT64_MAX, .date_sec = 1, .name = "one",
            .id = s->next_snapshot_id, .virtual_size = s->virtual_size,
        };
        ThinvmOp op = { .type = THINVM_OP_SNAPSHOT_CREATE, .snapshot = &snap };

        volume_do(v, &op);
        v->snapshot[slot] = snap.id;
    }
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

/* A LUN that is much larger than what is in use */
static void run_large(gconstpointer data)
{
    ThinvmSim *sim = sim_new(1, 4 * GiB, 4 * GiB);

    run_on(sim, (TestBody *)data);
    sim_free(sim);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    qemu_init_main_loop(&error_abort);
    module_call_init(MODULE_INIT_TRACE);

    add("/thinvm/limits/ring/owners-die", test_owners_die);
    add("/thinvm/limits/ring/owners-fail", test_owners_fail);
    g_test_add_data_func("/thinvm/limits/high-water/random", test_high_water,
                         run_large);
    g_test_add_data_func("/thinvm/limits/high-water/reuse", test_reuse,
                         run_large);
    return g_test_run();
}
