/*
 * thinvm metadata engine: look-ups without the lock, against changes
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * One thread maps and unmaps, so that leaves and inner pages come and go and
 * their places are used again by other pages; others look up meanwhile.  Guest
 * cluster g is ever only mapped to physical cluster BASE + g, so a look-up
 * that believed a page which had become another one shows itself (design
 * section 7).  Everything is in memory: checkpoints run, but nothing is read.
 * (Chance decides: with the check of the sequence count taken out of
 * thinvm_state_lookup(), one run of three fails on two busy cores.)
 */
#include "qemu/osdep.h"
#include "qemu/rcu.h"
#include "block/thinvm/state.h"

#define BASE        3000
#define NB_GUEST    2048
#define ROUNDS      60000
#define NB_READERS  2

static ThinvmState *state;
static bool stop;

static void execute(const ThinvmOp *op)
{
    ThinvmNeeds needs;
    GArray *freed;
    int ret;

    thinvm_needs_init(&needs);
    thinvm_state_lock(state);
    ret = thinvm_state_prepare(state, op, false, &needs, &error_abort);
    g_assert_cmpint(ret, ==, 0);
    thinvm_state_apply(state, op);
    freed = thinvm_space_take_freed(state);
    for (unsigned i = 0; freed && i < freed->len; i++) {
        ThinvmFreedRange *r = &g_array_index(freed, ThinvmFreedRange, i);

        thinvm_space_unbusy(state, r->first, r->nb_clusters);
    }
    if (freed) {
        g_array_unref(freed);
    }
    thinvm_needs_destroy(state, &needs);
    thinvm_state_unlock(state);
}

static void checkpoint(void)
{
    ThinvmFrozen *f;
    uint64_t number;

    thinvm_state_lock(state);
    f = thinvm_state_freeze(state);
    thinvm_state_unlock(state);
    for (unsigned i = 0; i < f->nb_pages; i++) {
        thinvm_frozen_complete_page(state, f, i, &number);
    }
    thinvm_frozen_complete(state, f);
    thinvm_state_lock(state);
    thinvm_state_thaw(state, f);
    thinvm_state_unlock(state);
}

static void *reader(void *opaque)
{
    GRand *rand = g_rand_new_with_seed(GPOINTER_TO_UINT(opaque));
    uint64_t *seen = g_new0(uint64_t, 2);

    rcu_register_thread();
    while (!qatomic_read(&stop)) {
        uint64_t guest = g_rand_int_range(rand, 0, NB_GUEST);
        ThinvmMapping m;
        ThinvmNeeds needs;

        thinvm_needs_init(&needs);
        g_assert_cmpint(thinvm_state_lookup(state, THINVM_TREE_DISK, NULL,
                                            guest, NB_GUEST, false, &m,
                                            &needs), ==, 0);
        g_assert_cmpuint(needs.nb_want, ==, 0);
        g_assert_cmpuint(m.guest, ==, guest);
        g_assert_cmpuint(m.count, >, 0);
        if (m.type == THINVM_MAPPING_DATA) {
            g_assert_cmpuint(m.physical, ==, BASE + guest);
        }
        seen[m.type == THINVM_MAPPING_DATA]++;
    }
    rcu_unregister_thread();
    g_rand_free(rand);
    return seen;
}

static void writer(void)
{
    GRand *rand = g_rand_new_with_seed(1);

    for (int round = 0; round < ROUNDS; round++) {
        uint64_t leaf = g_rand_int_range(rand, 0, NB_GUEST / 512) * 512;
        ThinvmOp op = {
            .type = THINVM_OP_UNMAP,
            .guest = leaf,
            .count = round % 7 ? 512 : 100,
        };

        execute(&op);
        op = (ThinvmOp) {
            .type = THINVM_OP_MAP,
            .guest = leaf,
            .count = 100,
            .physical = BASE + leaf,
            .valid = round & 1 ? THINVM_ALL_VALID : 0x00ff,
        };
        execute(&op);
        if (round % 50 == 49) {
            checkpoint();
        }
    }
    g_rand_free(rand);
}

static void test_threads(void)
{
    ThinvmSuperblock sb = {
        .version_major = THINVM_VERSION_MAJOR,
        .cluster_bits = 16,
        .journal_offset = THINVM_JOURNAL_OFFSET,
        .journal_size = THINVM_MIN_JOURNAL_SIZE,
        .virtual_size = 64 * GiB,
        .device_clusters = 6000,
    };
    QemuThread threads[NB_READERS];
    uint64_t data = 0, none = 0;

    state = thinvm_state_new_empty(&sb, 16 * MiB, &error_abort);
    for (unsigned i = 0; i < NB_READERS; i++) {
        qemu_thread_create(&threads[i], "reader", reader,
                           GUINT_TO_POINTER(i + 1), QEMU_THREAD_JOINABLE);
    }
    writer();
    qatomic_set(&stop, true);
    for (unsigned i = 0; i < NB_READERS; i++) {
        uint64_t *seen = qemu_thread_join(&threads[i]);

        none += seen[0];
        data += seen[1];
        g_free(seen);
    }
    /* Both kinds were met, or the test has shown nothing */
    g_assert_cmpuint(none, >, 0);
    g_assert_cmpuint(data, >, 0);
    thinvm_state_free(state);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/thinvm/lookup/threads", test_threads);
    return g_test_run();
}
