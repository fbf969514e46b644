/*
 * Unit tests of reads of a thinvm node whose store is replaced
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A node that does not write, and follows another owner, is activated: what
 * it knows of the image gives way to what is on the device now, and it ceases
 * to follow.  A read in another thread may have taken the former store by
 * then, and not asked yet whether to follow.  Here that happens in the one
 * order that counts: right behind the look at the node's store.
 */
#include "qemu/osdep.h"
#include "thinvm-store-test.h"
#include "thinvm-node.h"

#define GUEST   77

static BDRVThinvmState *replace;    /* the store of this one... */
static ThinvmStore *replacement;    /* ... when the next request begins */

unsigned __wrap_thinvm_store_request_begin(ThinvmStore *st);
unsigned __real_thinvm_store_request_begin(ThinvmStore *st);

unsigned __wrap_thinvm_store_request_begin(ThinvmStore *st)
{
    if (replace && replace->store == st) {
        qatomic_set(&replace->store, replacement);
        qatomic_set(&replace->follow, false);
        replace = NULL;
    }
    return __real_thinvm_store_request_begin(st);
}

typedef struct Test {
    ThinvmStore *owner, *before, *after;
    BlockDriverState *bs;
} Test;

/* The former store does not know yet that the cluster lies elsewhere */
static void coroutine_fn set_up(ThinvmSim *sim, Test *t)
{
    BDRVThinvmState *s;

    image_create(sim, VIRTUAL_SIZE);
    t->owner = image_open(sim);
    g_assert_cmpint(write_one(sim, t->owner, GUEST, 1), ==, 0);
    flush(t->owner);
    t->before = thinvm_store_open(sim_device(sim), 0, &error_abort);
    g_assert_cmpuint(image_read_tag(sim, t->before, GUEST), ==, 1);

    g_assert_cmpint(thinvm_store_unmap(t->owner, THINVM_TREE_DISK, GUEST, 1,
                                       THINVM_SOURCE_ZERO, NULL,
                                       &error_abort), ==, 0);
    g_assert_cmpint(write_one(sim, t->owner, GUEST, 2), ==, 0);
    flush(t->owner);
    g_assert_cmpuint(image_read_tag(sim, t->before, GUEST), ==, 1);
    t->after = thinvm_store_open(sim_device(sim), 0, &error_abort);

    t->bs = test_node_new(t->before, VIRTUAL_SIZE);
    s = t->bs->opaque;
    s->owner = false;
    s->follow = true;
    replacement = t->after;
    replace = s;
}

static void coroutine_fn tear_down(Test *t)
{
    g_assert_null(replace);
    test_node_free(t->bs);
    thinvm_store_free(t->before);
    thinvm_store_free(t->after);
    store_close(t->owner, true);
}

static void coroutine_fn test_read(ThinvmSim *sim)
{
    uint8_t buf[IMAGE_CLUSTER];
    QEMUIOVector qiov = QEMU_IOVEC_INIT_BUF(qiov, buf, sizeof(buf));
    Test t;

    set_up(sim, &t);
    assume_graph_lock();
    g_assert_cmpint(thinvm_io_read(t.bs, THINVM_TREE_DISK,
                                   GUEST * IMAGE_CLUSTER, sizeof(buf), &qiov,
                                   0, 0), ==, 0);
    g_assert_cmpuint(image_tag(buf, GUEST * IMAGE_SECTORS), ==, 2);
    tear_down(&t);
}

static void coroutine_fn test_status(ThinvmSim *sim)
{
    BlockDriverState *file;
    int64_t nb, at;
    ThinvmMapping m;
    Test t;

    set_up(sim, &t);
    g_assert_cmpint(thinvm_store_lookup(t.owner, THINVM_TREE_DISK, NULL, GUEST,
                                        1, false, &m), ==, 0);
    assume_graph_lock();
    g_assert_cmpint(thinvm_co_block_status(t.bs, true, GUEST * IMAGE_CLUSTER,
                                           IMAGE_CLUSTER, &nb, &at, &file), ==,
                    BDRV_BLOCK_DATA | BDRV_BLOCK_OFFSET_VALID);
    g_assert_cmpuint(at, ==, m.physical << IMAGE_CLUSTER_BITS);
    tear_down(&t);
}

/* It is not worth doing twice: the caller reads and writes instead */
static void coroutine_fn test_copy_range(ThinvmSim *sim)
{
    Test t;

    set_up(sim, &t);
    assume_graph_lock();
    g_assert_cmpint(thinvm_co_copy_range_from(t.bs, NULL,
                                              GUEST * IMAGE_CLUSTER, NULL, 0,
                                              IMAGE_CLUSTER, 0, 0), ==,
                    -ENOTSUP);
    tear_down(&t);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    qemu_init_main_loop(&error_abort);
    module_call_init(MODULE_INIT_TRACE);

    add("/thinvm/replaced/read", test_read);
    add("/thinvm/replaced/status", test_status);
    add("/thinvm/replaced/copy-range", test_copy_range);
    return g_test_run();
}
