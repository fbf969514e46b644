/*
 * Unit tests of thinvm's discards of a device that has a unit for them
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The device takes space back in units of several clusters, as arrays do.
 * Whatever the order in which their clusters come free: each unit of which all
 * are free is discarded, as a whole and aligned (the simulated device insists
 * on that), one of which any is in use never is.
 */
#include "qemu/osdep.h"
#include "thinvm-store-test.h"
#include "block/thinvm/state-int.h"

#define UNIT            8                       /* clusters */
#define UNITS           16
#define CLUSTERS        (UNIT * UNITS)

/* Guest cluster i lies in physical cluster physical_of(i), at a unit's start */
static uint64_t base;

static uint64_t coroutine_fn physical_of(ThinvmStore *st, uint64_t guest)
{
    ThinvmMapping m;

    g_assert_cmpint(thinvm_store_lookup(st, THINVM_TREE_DISK, NULL, guest, 1,
                                        false, &m), ==, 0);
    g_assert_cmpint(m.type, ==, THINVM_MAPPING_DATA);
    return m.physical;
}

/* UNITS whole units of data, what is before them in use, too */
static ThinvmStore *coroutine_fn filled(ThinvmSim *sim)
{
    ThinvmStore *st;
    uint64_t other = 10 * CLUSTERS;

    image_create(sim, VIRTUAL_SIZE);
    sim_set_discard_unit(sim, UNIT * IMAGE_CLUSTER);
    st = image_open(sim);
    thinvm_store_set_discard(st, true);
    do {
        g_assert_cmpint(write_one(sim, st, ++other, 1), ==, 0);
    } while ((physical_of(st, other) + 1) % UNIT);
    for (uint64_t guest = 0; guest < CLUSTERS; guest++) {
        g_assert_cmpint(write_one(sim, st, guest, 2), ==, 0);
    }
    base = physical_of(st, 0);
    g_assert_cmpuint(base % UNIT, ==, 0);
    g_assert_cmpuint(physical_of(st, CLUSTERS - 1), ==, base + CLUSTERS - 1);
    /* The last window's rest is busy; behind it there is more in use */
    g_assert_cmpint(write_one(sim, st, ++other, 1), ==, 0);
    g_assert_cmpint(flush(st), ==, 0);
    return st;
}

static void coroutine_fn discard(ThinvmStore *st, uint64_t first, uint64_t nb)
{
    g_assert_cmpint(thinvm_store_unmap(st, THINVM_TREE_DISK, first, nb,
                                       THINVM_SOURCE_ZERO, NULL, NULL), ==, 0);
}

/* What was discarded goes down: bytes of it, and commands */
static uint64_t coroutine_fn passed(ThinvmSim *sim, ThinvmStore *st,
                                    uint64_t *commands)
{
    uint64_t bytes = sim_discarded(sim), nb = sim_count(sim, SIM_DISCARD);

    g_assert_cmpint(flush(st), ==, 0);
    thinvm_store_reclaim(st, true);
    *commands = sim_count(sim, SIM_DISCARD) - nb;
    return sim_discarded(sim) - bytes;
}

/* Cluster by cluster, each in a batch of its own: with the last one all goes */
static void coroutine_fn test_piece_by_piece(ThinvmSim *sim)
{
    ThinvmStore *st = filled(sim);
    uint64_t commands;

    for (unsigned i = 0; i < UNIT; i++) {
        uint64_t bytes;

        /* from the middle outwards */
        discard(st, UNIT + (i % 2 ? UNIT / 2 - 1 - i / 2 : UNIT / 2 + i / 2), 1);
        bytes = passed(sim, st, &commands);
        g_assert_cmpuint(bytes, ==, i == UNIT - 1 ? UNIT * IMAGE_CLUSTER : 0);
        g_assert_cmpuint(commands, ==, i == UNIT - 1 ? 1 : 0);
    }
    g_assert_cmpuint(info_of(st).busy_clusters, <, THINVM_WINDOW);
    image_check(st);
    store_close(st, true);
}

/* Pieces of several units in one batch; what lies between comes free later */
static void coroutine_fn test_in_one_batch(ThinvmSim *sim)
{
    ThinvmStore *st = filled(sim);
    uint64_t commands;

    for (unsigned u = 0; u < 4; u++) {
        discard(st, u * UNIT, 2);
        discard(st, u * UNIT + 4, UNIT - 4);
    }
    g_assert_cmpuint(passed(sim, st, &commands), ==, 0);
    discard(st, 2, 2);
    discard(st, UNIT + 2, 2);
    discard(st, 3 * UNIT + 2, 2);
    /* units 0 and 1 side by side, unit 2 is in use, unit 3 */
    g_assert_cmpuint(passed(sim, st, &commands), ==, 3 * UNIT * IMAGE_CLUSTER);
    g_assert_cmpuint(commands, ==, 2);
    image_check(st);
    store_close(st, true);
}

/* A long range whose ends are in the middle of units, then the rest of these */
static void coroutine_fn test_ends(ThinvmSim *sim)
{
    ThinvmStore *st = filled(sim);
    uint64_t commands;

    discard(st, UNIT + 3, 6 * UNIT);
    g_assert_cmpuint(passed(sim, st, &commands), ==, 5 * UNIT * IMAGE_CLUSTER);
    g_assert_cmpuint(commands, ==, 1);
    discard(st, UNIT, 3);
    g_assert_cmpuint(passed(sim, st, &commands), ==, UNIT * IMAGE_CLUSTER);
    g_assert_cmpuint(commands, ==, 1);
    image_check(st);
    store_close(st, true);
}

/* A cluster that somebody is writing to right now is nobody's to discard */
static void coroutine_fn test_reserved(ThinvmSim *sim)
{
    ThinvmStore *st = filled(sim);
    uint64_t first, nb, commands;

    discard(st, 0, 1);
    g_assert_cmpuint(passed(sim, st, &commands), ==, 0);
    thinvm_state_lock(st->state);
    thinvm_space_stop_reserving(st->state);
    thinvm_state_unlock(st->state);
    g_assert_cmpint(thinvm_store_reserve(st, 0, 1, &first, &nb), ==, 0);
    g_assert_cmpuint(first, ==, base);
    discard(st, 1, UNIT - 1);
    g_assert_cmpuint(passed(sim, st, &commands), ==, 0);
    thinvm_store_unreserve(st, first, 1);
    image_check(st);
    store_close(st, true);
}

/* Random pieces and batches; at the end everything was discarded just once */
static void coroutine_fn test_random(ThinvmSim *sim)
{
    for (unsigned round = 0; round < 30; round++) {
        ThinvmStore *st = filled(sim);
        SimRandom *r = sim_rng(sim);
        bool gone[CLUSTERS] = { false };
        uint64_t bytes = 0, commands;
        unsigned left = CLUSTERS;

        while (left) {
            unsigned first = sim_random_below(r, CLUSTERS);
            unsigned nb = MIN(1 + sim_random_below(r, 2 * UNIT),
                              CLUSTERS - first);
            unsigned whole = 0;

            discard(st, first, nb);
            for (unsigned i = first; i < first + nb; i++) {
                left -= !gone[i];
                gone[i] = true;
            }
            if (left && sim_random_chance(r, 50)) {
                continue;
            }
            bytes += passed(sim, st, &commands);
            for (unsigned u = 0; u < UNITS; u++) {
                unsigned i = 0;

                while (i < UNIT && gone[u * UNIT + i]) {
                    i++;
                }
                whole += i == UNIT;
            }
            g_assert_cmpuint(bytes, ==, whole * UNIT * IMAGE_CLUSTER);
        }
        image_check(st);
        store_close(st, true);
    }
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    module_call_init(MODULE_INIT_QOM);
    qemu_init_main_loop(&error_abort);
    add("/thinvm/discard/piece-by-piece", test_piece_by_piece);
    add("/thinvm/discard/in-one-batch", test_in_one_batch);
    add("/thinvm/discard/ends", test_ends);
    add("/thinvm/discard/reserved", test_reserved);
    add("/thinvm/discard/random", test_random);
    return g_test_run();
}
