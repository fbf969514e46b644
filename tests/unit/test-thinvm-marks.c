/*
 * Unit tests of thinvm's marks: clusters that are still a template's
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Single steps, on a simulated device; test-thinvm-state and test-thinvm-crash
 * have marks in their random lives.
 */
#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "thinvm-store-test.h"

static bool coroutine_fn look(ThinvmStore *st, const ThinvmPointer *root,
                              uint64_t guest, ThinvmMapping *m)
{
    g_assert_cmpint(thinvm_store_lookup(st, THINVM_TREE_DISK, root, guest, 600,
                                        !root, m), ==, 0);
    g_assert_cmpint(m->type, ==, THINVM_MAPPING_DATA);
    return m->source == THINVM_SOURCE_TEMPLATE;
}

static ThinvmStore *coroutine_fn new_clone(ThinvmSim *sim, uint64_t guest,
                                           uint64_t count)
{
    ThinvmStore *st;

    image_create_clone(sim, VIRTUAL_SIZE);
    st = image_open(sim);
    g_assert_cmpint(image_copy_template(sim, st, guest, count, NULL), ==, 0);
    return st;
}

/* A leaf full of marks does not become a run, which could not have them */
static void coroutine_fn test_runs(ThinvmSim *sim)
{
    ThinvmStore *st = new_clone(sim, 512, 512);
    ThinvmMapping m;

    for (int i = 0; i < 3; i++) {
        store_close(st, true);
        st = image_open(sim);
        g_assert_true(look(st, NULL, 512, &m));
        g_assert_cmpuint(m.count, ==, 512);
        g_assert_true(m.shared);
    }
    store_close(st, true);
}

/* What is written goes elsewhere, and leaves its neighbours as they are */
static void coroutine_fn test_write(ThinvmSim *sim)
{
    ThinvmStore *st = new_clone(sim, 0, 8);
    ThinvmMapping before, m;

    g_assert_true(look(st, NULL, 3, &before));
    g_assert_cmpint(image_write(sim, st, 3, 2, 1, 7, NULL), ==, 0);
    g_assert_false(look(st, NULL, 3, &m));
    g_assert_cmpuint(m.physical, !=, before.physical);
    g_assert_cmpuint(m.count, ==, 1);
    g_assert_true(look(st, NULL, 0, &m));
    g_assert_cmpuint(m.count, ==, 3);
    g_assert_true(look(st, NULL, 4, &m));
    g_assert_cmpuint(m.count, ==, 4);
    store_close(st, true);
}

/* A mark that is taken away in the record that it came with stays away */
static void coroutine_fn test_unmark(ThinvmSim *sim)
{
    ThinvmStore *st = new_clone(sim, 5, 1);
    ThinvmMapping before, m;

    look(st, NULL, 5, &before);
    g_assert_cmpint(image_unmark(st, 5), ==, 0);
    g_assert_false(look(st, NULL, 5, &m));
    g_assert_false(m.shared);
    g_assert_cmpuint(m.physical, ==, before.physical);
    store_die(st);
    st = image_open(sim);
    g_assert_false(look(st, NULL, 5, &m));
    g_assert_cmpuint(m.physical, ==, before.physical);
    store_close(st, true);
}

/* Each tree has its own: a page that says otherwise is not the same page */
static void coroutine_fn test_share(ThinvmSim *sim)
{
    ThinvmSnapshot snap = { .id = 1, .icount = UINT64_MAX, .name = "s" };
    ThinvmOp create = {
        .type = THINVM_OP_SNAPSHOT_CREATE,
        .snapshot = &snap,
    };
    ThinvmOp share = {
        .type = THINVM_OP_SHARE,
        .guest = 3,
        .count = 0,
        .physical = 1,
    };
    ThinvmStore *st = new_clone(sim, 0, 8);
    ThinvmPointer root, others[4];
    ThinvmMapping m;

    snap.virtual_size = VIRTUAL_SIZE;
    thinvm_store_execute(st, &create, NULL, &error_abort);
    thinvm_state_lock(st->state);
    thinvm_state_roots(st->state, &root, &others[0], &others[1], &others[2],
                       &others[3]);
    thinvm_state_unlock(st->state);
    g_assert_cmpint(image_unmark(st, 3), ==, 0);
    g_assert_false(look(st, NULL, 3, &m));
    g_assert_true(m.shared);
    thinvm_store_execute(st, &share, NULL, &error_abort);
    g_assert_false(look(st, NULL, 3, &m));
    g_assert_true(look(st, NULL, 2, &m));
    /* the root that both had is the snapshot's now */
    g_assert_true(look(st, &root, 3, &m));
    store_close(st, true);
}

/* Only an image with a template has marks */
static void coroutine_fn test_none(ThinvmSim *sim)
{
    ThinvmOp op = {
        .type = THINVM_OP_MAP,
        .count = 1,
        .valid = THINVM_ALL_VALID,
        .source = THINVM_SOURCE_TEMPLATE,
    };
    Error *err = NULL;
    ThinvmStore *st;
    uint64_t nb;

    image_create(sim, VIRTUAL_SIZE);
    st = image_open(sim);
    g_assert_cmpint(thinvm_store_reserve(st, 0, 1, &op.physical, &nb), ==, 0);
    g_assert_cmpint(thinvm_store_execute(st, &op, NULL, &err), ==, -EBADMSG);
    error_free(err);
    thinvm_store_unreserve(st, op.physical, 1);
    store_close(st, true);
}

/* Which template it is: in both superblocks at once, and from then on */
static void coroutine_fn test_complete(ThinvmSim *sim)
{
    ThinvmStore *st = new_clone(sim, 0, 8);
    ThinvmTemplateId id = { .length = 8 * IMAGE_CLUSTER };
    uint8_t block[SIM_BLOCK];

    memset(id.digest, 0xd1, sizeof(id.digest));
    for (int i = 0; i < 3; i++) {
        if (i == 0) {
            g_assert_cmpint(thinvm_store_set_template(st, &id), ==, 0);
        }
        for (int slot = 0; slot < THINVM_NB_SUPERBLOCKS; slot++) {
            sim_peek(sim, thinvm_superblock_offset(slot), SIM_BLOCK, block);
            g_assert_cmpuint(ldq_le_p(block + 408), ==, id.length);
            g_assert_cmpmem(block + 416, 32, id.digest, 32);
        }
        store_close(st, true);
        st = image_open(sim);
        g_assert_cmpint(image_write(sim, st, 3, 2, 1, 7, NULL), ==, 0);
    }
    store_close(st, true);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    qemu_init_main_loop(&error_abort);
    module_call_init(MODULE_INIT_TRACE);
    add("/thinvm/marks/runs", test_runs);
    add("/thinvm/marks/write", test_write);
    add("/thinvm/marks/unmark", test_unmark);
    add("/thinvm/marks/share", test_share);
    add("/thinvm/marks/none", test_none);
    add("/thinvm/marks/complete", test_complete);
    return g_test_run();
}
