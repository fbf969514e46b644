/*
 * Unit tests of what writes in flight know of each other (inflight.h)
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A write into a cluster that is private registers nothing.  It must notice a
 * copy of that cluster which began while the cluster was shared, also when
 * that has ended between its look-up and its question: with several threads
 * anything may happen in between.  Here it does, in the one order that counts.
 *
 * Compaction moves private clusters.  A write in place that is on its way to
 * the device must have arrived before its cluster is copied.  It moves those of
 * snapshots, too, which readers elsewhere must notice, and which are deleted by
 * others at any time.
 */
#include "qemu/osdep.h"
#include "thinvm-store-test.h"
#include "thinvm-node.h"

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

/* ------------------------------------------------------------------ */
/* Moves                                                               */

/* Of these, the disk keeps the last, which lies highest */
#define NB_WRITTEN  40

static ThinvmSim *the_sim;
static bool hold;               /* the next write of data */
static bool held;

static void coroutine_fn hold_write(BlkdebugEvent event)
{
    if (event == BLKDBG_WRITE_AIO && hold) {
        held = true;
        while (hold) {
            sim_yield(the_sim);
        }
        held = false;
    }
}

typedef struct Guest {
    BlockDriverState *bs;
    uint64_t offset, bytes, tag;
    bool done;
} Guest;

static void coroutine_fn guest_write(void *opaque)
{
    Guest *g = opaque;
    g_autofree uint8_t *buf = g_malloc(g->bytes);
    QEMUIOVector qiov = QEMU_IOVEC_INIT_BUF(qiov, buf, g->bytes);

    image_fill(buf, g->offset / SIM_SECTOR, g->bytes / SIM_SECTOR, g->tag);
    assume_graph_lock();
    g_assert_cmpint(thinvm_io_write(g->bs, THINVM_TREE_DISK, g->offset,
                                    g->bytes, &qiov, 0, 0), ==, 0);
    g->done = true;
    sim_finish(the_sim);
}

typedef struct Mover {
    BDRVThinvmState *s;
    ThinvmInflight inflight;
    bool asked, granted, done;
} Mover;

static void coroutine_fn mover_lock(void *opaque, int tree, uint64_t guest,
                                    uint64_t count)
{
    Mover *m = opaque;

    m->asked = true;
    thinvm_inflight_begin_exclusive(m->s, &m->inflight, tree, guest, count);
    m->granted = true;
}

static void coroutine_fn mover_unlock(void *opaque)
{
    Mover *m = opaque;

    m->asked = m->granted = false;
    thinvm_inflight_end_request(m->s, &m->inflight);
}

/* As the job does it, which counted itself before */
static void coroutine_fn mover_run(void *opaque)
{
    Mover *m = opaque;
    ThinvmCompactLocks locks = { mover_lock, mover_unlock, m };
    ThinvmCompact *c = thinvm_compact_new(m->s->store, &locks);

    while (!m->done) {
        g_assert_cmpint(thinvm_compact_step(c, &m->done, &error_abort), ==, 0);
    }
    thinvm_compact_free(c);
    sim_finish(the_sim);
}

static ThinvmStore *coroutine_fn open_with_holes(ThinvmSim *sim)
{
    ThinvmStore *st;

    the_sim = sim;
    image_create(sim, VIRTUAL_SIZE);
    st = image_open(sim);
    for (uint64_t i = 0; i < NB_WRITTEN; i++) {
        g_assert_cmpint(write_one(sim, st, i, i + 1), ==, 0);
    }
    g_assert_cmpint(thinvm_store_unmap(st, THINVM_TREE_DISK, 0, NB_WRITTEN - 1,
                                       THINVM_SOURCE_ZERO, NULL,
                                       &error_abort), ==, 0);
    return st;
}

static uint64_t coroutine_fn sector_tag(ThinvmSim *sim, ThinvmStore *st,
                                        uint64_t sector)
{
    uint8_t buf[IMAGE_CLUSTER];

    g_assert_cmpint(image_read(sim, st, sector / IMAGE_SECTORS, buf), ==, 0);
    return image_tag(buf + sector % IMAGE_SECTORS * SIM_SECTOR, sector);
}

/*
 * Sectors [@first, @first + @nb) are overwritten; before that arrives on the
 * device their cluster is to be moved.
 */
static void coroutine_fn move_beside_write(ThinvmSim *sim, uint64_t first,
                                           unsigned nb)
{
    uint64_t cluster = NB_WRITTEN - 1, before;
    ThinvmStore *st;
    Mover m = {};
    Guest g = { .offset = (cluster * IMAGE_SECTORS + first) * SIM_SECTOR,
                .bytes = nb * SIM_SECTOR, .tag = 1000 };

    st = open_with_holes(sim);
    before = look_up(st, cluster).physical;
    g.bs = test_node_new(st, VIRTUAL_SIZE);
    m.s = g.bs->opaque;
    test_node_event = hold_write;

    thinvm_inflight_begin_moving(m.s);
    hold = true;
    sim_start(sim, guest_write, &g);
    while (!held) {
        sim_yield(sim);
    }
    sim_start(sim, mover_run, &m);
    /* until it waits for the write; if it does not, to its end */
    while (!m.done && !(m.asked && !m.granted)) {
        sim_yield(sim);
    }
    hold = false;
    while (!g.done || !m.done) {
        sim_yield(sim);
    }
    thinvm_inflight_end_moving(m.s);
    test_node_event = NULL;

    g_assert_cmpuint(look_up(st, cluster).physical, <, before);
    for (uint64_t i = 0; i < IMAGE_SECTORS; i++) {
        g_assert_cmpuint(sector_tag(sim, st, cluster * IMAGE_SECTORS + i), ==,
                         i >= first && i < first + nb ? g.tag : cluster + 1);
    }
    test_node_free(g.bs);
    image_recount(sim, st);
    store_close(st, true);
}

static void coroutine_fn test_move_cluster(ThinvmSim *sim)
{
    move_beside_write(sim, 0, IMAGE_SECTORS);
}

static void coroutine_fn test_move_sector(ThinvmSim *sim)
{
    move_beside_write(sim, 5, 1);
}

static bool coroutine_fn sees_moves(ThinvmStore *follower)
{
    uint64_t before = thinvm_store_moves(follower);

    g_assert_cmpint(thinvm_store_catch_up(follower, NULL, &error_abort), ==,
                    0);
    return thinvm_store_moves(follower) != before;
}

/* From records, and where the follower was left behind and starts afresh */
static void coroutine_fn test_move_seen(ThinvmSim *sim)
{
    ThinvmStore *st = open_with_holes(sim), *follower;
    BlockDriverState *bs = test_node_new(st, VIRTUAL_SIZE);
    Mover m = { .s = bs->opaque };

    snapshot_create(st);
    flush(st);
    follower = thinvm_store_open(sim_device(sim), 0, &error_abort);
    g_assert_cmpint(write_one(sim, st, OTHER, 1), ==, 0);
    flush(st);
    g_assert_false(sees_moves(follower));
    g_assert_cmpuint(image_read_tag(sim, follower, OTHER), ==, 1);

    sim_start(sim, mover_run, &m);
    while (!m.done) {
        sim_yield(sim);
    }
    flush(st);
    g_assert_true(sees_moves(follower));
    g_assert_cmpuint(stats_of(follower).fresh_starts, ==, 0);
    g_assert_false(sees_moves(follower));

    for (uint64_t i = 0; i < 700; i++) {
        g_assert_cmpint(write_one(sim, st, i * 20, i + 100), ==, 0);
        flush(st);
        if (i % 100 == 99) {
            thinvm_store_checkpoint(st);
        }
    }
    g_assert_true(sees_moves(follower));
    g_assert_cmpuint(stats_of(follower).fresh_starts, ==, 1);

    test_node_free(bs);
    thinvm_store_free(follower);
    image_check(st);
    store_close(st, true);
}

/*
 * The snapshot that has just got its copies goes before the mover can look at
 * them: another thread may have done that, here it is who is kicked.
 */
typedef struct Deleted {
    Mover mover;
    ThinvmStore *st;
    uint64_t physical;          /* what the snapshot named before */
    uint64_t busy;              /* when it was gone */
    bool ready;
} Deleted;

static void coroutine_fn deleted_lock(void *opaque, int tree, uint64_t guest,
                                      uint64_t count)
{
    Deleted *d = opaque;
    ThinvmOp op = { .type = THINVM_OP_SNAPSHOT_PROTECT, .value = 1 };

    mover_lock(&d->mover, tree, guest, count);
    /* So much is pending that each operation is told to who is kicked */
    while (d->st->journal.pending_length < d->st->journal.record_limit / 2) {
        op.count = !op.count;
        execute(d->st, &op);
    }
    op.count = 0;
    execute(d->st, &op);
    d->ready = true;
}

static void coroutine_fn deleted_unlock(void *opaque)
{
    Deleted *d = opaque;

    if (d->busy) {
        /* Nothing of it may be used before that is durable */
        g_assert_cmpuint(info_of(d->st).busy_clusters, ==, d->busy);
    }
    mover_unlock(&d->mover);
}

/* Who executes an operation is in a coroutine when he kicks */
static void coroutine_fn delete_moved(void *opaque)
{
    const ThinvmSnapshotName name = { .id = 1 };
    Deleted *d = opaque;
    ThinvmMapping m;
    int ret;

    if (!d->ready) {
        return;
    }
    ret = thinvm_store_lookup_snapshot(d->st, &name, NB_WRITTEN - 1, 1, &m);
    g_assert_cmpint(ret, ==, 0);
    if (m.physical != d->physical) {
        d->ready = false;
        snapshot_delete(d->st);
        d->busy = info_of(d->st).busy_clusters;
    }
}

static void coroutine_fn deleted_run(void *opaque)
{
    Deleted *d = opaque;
    ThinvmCompactLocks locks = { deleted_lock, deleted_unlock, d };
    ThinvmCompact *c = thinvm_compact_new(d->st, &locks);

    while (!d->mover.done) {
        g_assert_cmpint(thinvm_compact_step(c, &d->mover.done, &error_abort),
                        ==, 0);
    }
    thinvm_compact_free(c);
    sim_finish(the_sim);
}

static void coroutine_fn test_move_deleted(ThinvmSim *sim)
{
    Deleted d = { .st = open_with_holes(sim) };
    ThinvmStore *st = d.st;
    BlockDriverState *bs;

    d.physical = look_up(st, NB_WRITTEN - 1).physical;
    flush(st);
    thinvm_store_reclaim(st, false);
    snapshot_create(st);
    g_assert_cmpint(thinvm_store_unmap(st, THINVM_TREE_DISK, NB_WRITTEN - 1, 1,
                                       THINVM_SOURCE_ZERO, NULL,
                                       &error_abort), ==, 0);
    bs = test_node_new(st, VIRTUAL_SIZE);
    d.mover.s = bs->opaque;
    thinvm_store_set_kick(st, delete_moved, &d);
    sim_start(sim, deleted_run, &d);
    while (!d.mover.done) {
        sim_yield(sim);
    }
    thinvm_store_set_kick(st, NULL, NULL);
    g_assert_cmpuint(d.busy, >=, 2);    /* the copy, and what it is of */
    g_assert_cmpuint(info_of(st).nb_snapshots, ==, 0);
    test_node_free(bs);
    image_recount(sim, st);
    image_check(st);
    store_close(st, true);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    qemu_init_main_loop(&error_abort);
    module_call_init(MODULE_INIT_TRACE);

    add("/thinvm/inflight/copy/ends", test_copy_ends);
    add("/thinvm/inflight/copy/goes-on", test_copy_goes_on);
    add("/thinvm/inflight/move/cluster", test_move_cluster);
    add("/thinvm/inflight/move/sector", test_move_sector);
    add("/thinvm/inflight/move/seen", test_move_seen);
    add("/thinvm/inflight/move/deleted", test_move_deleted);
    return g_test_run();
}
