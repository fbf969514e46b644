/*
 * Unit tests of following another owner's journal, on a simulated device
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Two stores on one device: one writes, the other applies its records as
 * they appear (design sections 3 and 5).
 */
#include "qemu/osdep.h"
#include "thinvm-store-test.h"

static void coroutine_fn follow(ThinvmStore *st, bool expect)
{
    uint64_t before = thinvm_store_changes(st);
    bool changed;

    g_assert_cmpint(thinvm_store_catch_up(st, &changed, &error_abort), ==, 0);
    g_assert(changed == expect);
    /* What a reader that began before compares with, whoever caught up */
    g_assert((thinvm_store_changes(st) != before) == expect);
}

static void coroutine_fn test_follow(ThinvmSim *sim)
{
    ThinvmStore *owner, *follower;
    uint64_t reads;

    image_create(sim, VIRTUAL_SIZE);
    owner = image_open(sim);
    follower = thinvm_store_open(sim_device(sim), 0, &error_abort);
    follow(follower, false);
    for (uint64_t i = 0; i < 20; i++) {
        write_one(sim, owner, i * 700, i + 1);
        follow(follower, false);
        thinvm_store_commit(owner, THINVM_COMMIT_RECORD, true);
        follow(follower, true);
        g_assert_cmpuint(image_read_tag(sim, follower, i * 700), ==, i + 1);
        follow(follower, false);
    }
    /* quiet: one small read */
    reads = sim_count(sim, SIM_READ);
    follow(follower, false);
    g_assert_cmpuint(sim_count(sim, SIM_READ), ==, reads + 1);

    /* checkpoints in between do not disturb it */
    for (uint64_t i = 0; i < 20; i++) {
        write_one(sim, owner, i * 700 + 1, i + 100);
        thinvm_store_checkpoint(owner);
        follow(follower, true);
        g_assert_cmpuint(image_read_tag(sim, follower, i * 700 + 1), ==,
                         i + 100);
    }
    /* left behind by laps of the ring: starts afresh */
    for (uint64_t i = 0; i < 700; i++) {
        write_one(sim, owner, i * 20, i + 1000);
        flush(owner);
        if (i % 100 == 99) {
            thinvm_store_checkpoint(owner);
        }
    }
    follow(follower, true);
    for (uint64_t i = 0; i < 700; i++) {
        g_assert_cmpuint(image_read_tag(sim, follower, i * 20), ==, i + 1000);
    }

    /* hand-over, and back */
    store_close(owner, true);
    thinvm_store_begin_writing(follower, info_of(follower).epoch + 1,
                               &error_abort);
    for (uint64_t i = 0; i < 100; i++) {
        write_one(sim, follower, i * 20, i + 5000);
    }
    thinvm_store_checkpoint(follower);
    image_recount(sim, follower);
    thinvm_store_end_writing(follower, false, &error_abort);
    follow(follower, false);
    owner = image_open(sim);
    write_one(sim, owner, 20, 9);
    write_one(sim, owner, 21, 10);
    flush(owner);
    follow(follower, true);
    g_assert_cmpuint(image_read_tag(sim, follower, 20), ==, 9);
    g_assert_cmpuint(image_read_tag(sim, follower, 40), ==, 5002);
    store_close(owner, false);
    thinvm_store_free(follower);
}

/* Records that a power cut took, after we had followed them */
static void coroutine_fn test_follow_cut_off(ThinvmSim *sim)
{
    ThinvmStore *owner, *follower;
    uint64_t at;

    image_create(sim, VIRTUAL_SIZE);
    owner = image_open(sim);
    write_one(sim, owner, 1, 11);
    flush(owner);
    follower = thinvm_store_open(sim_device(sim), 0, &error_abort);
    at = head_of(owner);
    write_one(sim, owner, 1, 12);
    write_one(sim, owner, 2, 22);
    thinvm_store_commit(owner, THINVM_COMMIT_RECORD, true);
    follow(follower, true);
    g_assert_cmpuint(image_read_tag(sim, follower, 2), ==, 22);
    store_die(owner);
    flip(sim, at);
    /* the next owner does not see that record, and writes in its place */
    owner = image_open(sim);
    g_assert_cmpuint(image_read_tag(sim, owner, 2), ==, TAG_ZERO);
    write_one(sim, owner, 3, 33);
    flush(owner);
    follow(follower, true);
    g_assert_cmpuint(image_read_tag(sim, follower, 2), ==, TAG_ZERO);
    g_assert_cmpuint(image_read_tag(sim, follower, 3), ==, 33);
    store_die(owner);

    /* the same with one record only: noticed at the latest when taking over */
    owner = image_open(sim);
    follow(follower, true);
    at = head_of(owner);
    write_one(sim, owner, 4, 44);
    thinvm_store_commit(owner, THINVM_COMMIT_RECORD, true);
    follow(follower, true);
    store_die(owner);
    flip(sim, at);
    owner = image_open(sim);
    store_die(owner);
    thinvm_store_begin_writing(follower, info_of(follower).epoch + 5,
                               &error_abort);
    g_assert_cmpuint(image_read_tag(sim, follower, 4), ==, TAG_ZERO);
    image_recount(sim, follower);
    store_close(follower, true);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    qemu_init_main_loop(&error_abort);
    module_call_init(MODULE_INIT_TRACE);

    add("/thinvm/follow/owner", test_follow);
    add("/thinvm/follow/cut-off", test_follow_cut_off);
    return g_test_run();
}
