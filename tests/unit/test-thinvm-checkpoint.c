/*
 * Unit test of thinvm's durability layer: a checkpoint that is stopped
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A drain stops the checkpoint of the background between two of its steps
 * (checkpoint.c).  Here that happens at each of them, and then it is gone on
 * with, or the image is released, or the process dies.
 *
 * Runs on the simulated device (thinvm-sim.h).
 */
#include "qemu/osdep.h"
#include "thinvm-store-test.h"

#define PLACES  12

static bool count_down(void *opaque)
{
    unsigned *steps = opaque;

    return *steps && (*steps)--;
}

typedef enum StoppedEnd {
    STOPPED_CONTINUES,
    STOPPED_IS_RELEASED,
    STOPPED_DIES,
    STOPPED_NB,
} StoppedEnd;

static void coroutine_fn stopped_end(ThinvmStore *st, StoppedEnd end)
{
    uint64_t generation = st->bases.newest.generation;

    switch (end) {
    case STOPPED_CONTINUES:
        g_assert_cmpint(thinvm_store_checkpoint(st), ==, 0);
        g_assert_false(thinvm_store_wants_checkpoint(st));
        g_assert_cmpuint(st->bases.newest.generation, ==, generation + 1);
        break;
    case STOPPED_IS_RELEASED:
        /* What is in memory must be of use to a follower */
        thinvm_store_end_writing(st, false, &error_abort);
        g_assert_false(st->stale);
        break;
    default:
        break;
    }
    store_die(st);
}

/* False: it came to its end before it was to stop */
static bool coroutine_fn stopped_run(ThinvmSim *sim, unsigned steps,
                                     StoppedEnd end)
{
    ThinvmStore *st;
    int ret;

    image_create(sim, VIRTUAL_SIZE);
    st = image_open(sim);
    for (int n = 0; n < PLACES; n++) {
        write_one(sim, st, n * 700, n + 1);
    }
    ret = thinvm_store_checkpoint_while(st, count_down, &steps);
    g_assert_cmpint(ret, ==, ret ? -ECANCELED : 0);
    g_assert_cmpint(thinvm_store_wants_checkpoint(st), ==, ret != 0);
    for (int n = 0; n < PLACES; n += 2) {
        write_one(sim, st, n * 700, n + 101);
    }
    g_assert_cmpint(flush(st), ==, 0);
    stopped_end(st, end);

    st = image_open(sim);
    for (int n = 0; n < PLACES; n++) {
        g_assert_cmpuint(image_read_tag(sim, st, n * 700), ==,
                         n % 2 ? n + 1 : n + 101);
    }
    image_recount(sim, st);
    image_check(st);
    store_close(st, true);
    return ret != 0;
}

/* Wherever it stops: as if it had failed there, and the next one goes on */
static void coroutine_fn test_stopped(ThinvmSim *sim)
{
    for (StoppedEnd end = 0; end < STOPPED_NB; end++) {
        unsigned steps = 0;

        while (stopped_run(sim, steps, end)) {
            steps++;
        }
        g_assert_cmpuint(steps, >=, 4);
    }
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    qemu_init_main_loop(&error_abort);
    module_call_init(MODULE_INIT_TRACE);

    add("/thinvm/checkpoint/stopped", test_stopped);
    return g_test_run();
}
