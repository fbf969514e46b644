/*
 * Unit tests of what writes in flight know of each other (inflight.h)
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A write into a cluster that is private registers nothing.  It must notice a
 * copy of that cluster which began while the cluster was shared, also when
 * that has ended between its look-up and its question: with several threads
 * anything may happen in between.  Here it does, in the one order that counts.
 */
#include "qemu/osdep.h"
#include "thinvm-store-test.h"
#include "block/thinvm/inflight.h"

#define GUEST   77
#define OTHER   5000

/* As much of a node as inflight.c looks at */
static BDRVThinvmState *node_new(ThinvmStore *st)
{
    BDRVThinvmState *s = g_new0(BDRVThinvmState, 1);

    qemu_co_mutex_init(&s->inflight_lock);
    QLIST_INIT(&s->inflight);
    s->cluster_bits = IMAGE_CLUSTER_BITS;
    s->store = st;
    return s;
}

static void coroutine_fn execute(ThinvmStore *st, const ThinvmOp *op)
{
    g_assert_cmpint(thinvm_store_execute(st, op, NULL, &error_abort), ==, 0);
}

static void coroutine_fn snapshot_create(ThinvmStore *st)
{
    ThinvmSnapshot snap = { .id = 1, .name = "one" };
    ThinvmOp op = { .type = THINVM_OP_SNAPSHOT_CREATE, .snapshot = &snap };

    execute(st, &op);
}

static void coroutine_fn snapshot_delete(ThinvmStore *st)
{
    ThinvmOp op = { .type = THINVM_OP_SNAPSHOT_DELETE_STEP, .value = 1 };

    while (info_of(st).nb_snapshots) {
        execute(st, &op);
    }
}

static ThinvmMapping coroutine_fn look_up(ThinvmStore *st, uint64_t guest)
{
    ThinvmMapping m;

    g_assert_cmpint(thinvm_store_lookup(st, THINVM_TREE_DISK, NULL, guest, 1,
                                        true, &m), ==, 0);
    g_assert_cmpint(m.type, ==, THINVM_MAPPING_DATA);
    return m;
}

typedef struct Copy {
    ThinvmInflight inflight;
    ThinvmOp map;
} Copy;

/* A copier has found @guest shared, and has written the copy */
static void coroutine_fn copy_begin(BDRVThinvmState *s, Copy *c,
                                    uint64_t guest)
{
    uint64_t part = guest << THINVM_PART_BITS, nb;

    g_assert_cmpint(thinvm_inflight_begin_allocate(s, &c->inflight,
                                                   THINVM_TREE_DISK, part,
                                                   part + 1), ==,
                    THINVM_BEGIN_EXCLUSIVE);
    g_assert_true(look_up(s->store, guest).shared);
    c->map = (ThinvmOp) {
        .type = THINVM_OP_MAP, .guest = guest, .count = 1,
        .valid = THINVM_ALL_VALID,
    };
    g_assert_cmpint(thinvm_store_reserve(s->store, 0, 1, &c->map.physical,
                                         &nb), ==, 0);
}

static void coroutine_fn copy_end(BDRVThinvmState *s, Copy *c)
{
    execute(s->store, &c->map);
    thinvm_inflight_end_request(s, &c->inflight);
}

static BDRVThinvmState *coroutine_fn open_shared(ThinvmSim *sim)
{
    ThinvmStore *st;

    image_create(sim, VIRTUAL_SIZE);
    st = image_open(sim);
    g_assert_cmpint(write_one(sim, st, GUEST, 1), ==, 0);
    g_assert_cmpint(write_one(sim, st, OTHER, 1), ==, 0);
    snapshot_create(st);
    return node_new(st);
}

static void coroutine_fn close_node(BDRVThinvmState *s)
{
    g_assert_true(QLIST_EMPTY(&s->inflight));
    g_assert_cmpuint(s->copiers, ==, 0);
    image_check(s->store);
    store_close(s->store, true);
    g_free(s);
}

/* The copy ends behind the look-up that finds the old cluster private */
static void coroutine_fn test_copy_ends(ThinvmSim *sim)
{
    BDRVThinvmState *s = open_shared(sim);
    ThinvmMapping found;
    unsigned ended;
    Copy c;

    copy_begin(s, &c, GUEST);
    snapshot_delete(s->store);

    ended = thinvm_inflight_copies_ended(s);
    found = look_up(s->store, GUEST);
    g_assert_false(found.shared);
    copy_end(s, &c);

    /* It is the case that is meant: what was found is not the disk's any more,
       and nobody copies */
    g_assert_cmpuint(look_up(s->store, GUEST).physical, !=, found.physical);
    g_assert_cmpuint(s->copiers, ==, 0);
    g_assert_true(thinvm_inflight_may_copy(s, ended));
    /* The second look sees the new place, and may be relied on */
    ended = thinvm_inflight_copies_ended(s);
    found = look_up(s->store, GUEST);
    g_assert_cmpuint(found.physical, ==, c.map.physical);
    g_assert_false(thinvm_inflight_may_copy(s, ended));
    close_node(s);
}

/* While it goes on it is seen, and so is one of two that has ended */
static void coroutine_fn test_copy_goes_on(ThinvmSim *sim)
{
    BDRVThinvmState *s = open_shared(sim);
    unsigned before = thinvm_inflight_copies_ended(s);
    Copy c, other;

    g_assert_false(thinvm_inflight_may_copy(s, before));
    copy_begin(s, &c, GUEST);
    copy_begin(s, &other, OTHER);
    g_assert_true(thinvm_inflight_may_copy(s, before));
    snapshot_delete(s->store);
    copy_end(s, &c);
    g_assert_true(thinvm_inflight_may_copy(s, before));
    copy_end(s, &other);
    g_assert_true(thinvm_inflight_may_copy(s, before));
    g_assert_false(thinvm_inflight_may_copy(s,
                                            thinvm_inflight_copies_ended(s)));
    close_node(s);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    qemu_init_main_loop(&error_abort);
    module_call_init(MODULE_INIT_TRACE);

    add("/thinvm/inflight/copy/ends", test_copy_ends);
    add("/thinvm/inflight/copy/goes-on", test_copy_goes_on);
    return g_test_run();
}
