/*
 * thinvm durability layer: several threads on one store
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Each thread has an event loop with several coroutines.  Each coroutine owns
 * guest clusters, every so many-th one, so that all share leaves; it writes
 * them, in place, in parts and as copies of what a snapshot shares, unmaps
 * them, reads them and anybody's, and commits.  Others write checkpoints,
 * reclaim with discards, and delete snapshots in steps meanwhile.  What each
 * cluster holds is known to its owner, and compared after each round, with
 * requests at rest, as are the snapshot and the counts; at the end also in the
 * image opened again, with and without an orderly close.
 *
 * The device here is not the simulated one (thinvm-sim.h, of which this file
 * defines what thinvm-sim-image.c needs): it is memory with a lock, whose I/Os
 * may take turns.  Power cuts are test-thinvm-crash's.
 *
 * (With requests that do not join an epoch it fails at once: do_peer() finds
 * another cluster's data.  With ThreadSanitizer: see docs/thinvm/testing.rst.)
 */
#include "qemu/osdep.h"
#include "qemu/main-loop.h"
#include "qemu/module.h"
#include "block/aio.h"
#include "iothread.h"
#include "thinvm-sim-image.h"

#define NB_THREADS      3
#define PER_THREAD      3
#define NB_OWNERS       (NB_THREADS * PER_THREAD)
#define PER_OWNER       24      /* clusters */
#define NB_CLUSTERS     (NB_OWNERS * PER_OWNER)
#define ROUNDS          12
#define STEPS           1500    /* of each owner, in a round */
#define DEVICE_START    (4 * MiB)
#define DEVICE_MAX      (14 * MiB)

/* A device in memory, all of which is somebody else's at first */
struct ThinvmSim {
    ThinvmDevice device;
    QemuMutex lock;
    uint8_t *data;
    uint64_t length;
};

typedef struct Owner {
    unsigned number;
    GRand *rand;
    uint64_t next_tag;
    uint64_t tag[PER_OWNER][THINVM_PARTS];
} Owner;

static ThinvmSim sim;
static ThinvmStore *store;
static Owner owners[NB_OWNERS];
static unsigned running;                /* coroutines, qatomic */
static AioContext *main_context;

/* What the snapshot that exists holds; id 0: there is none */
static ThinvmSnapshotName snapshot;
static uint64_t snapshot_tag[NB_CLUSTERS][THINVM_PARTS];

/* How often each kind of thing was met, qatomic */
static unsigned nb_full, nb_unmapped, nb_written, nb_checkpoints, nb_deleted;

/* ------------------------------------------------------------------ */
/* Device                                                              */

ThinvmDevice *sim_device(ThinvmSim *s)
{
    return &s->device;
}

/* Other coroutines of this thread have their turn */
void coroutine_fn sim_yield(ThinvmSim *s)
{
    aio_co_schedule(qemu_get_current_aio_context(), qemu_coroutine_self());
    qemu_coroutine_yield();
}

/* Two of three I/Os give way, before or after they have taken effect */
static void coroutine_fn maybe_yield(uint64_t offset, unsigned salt)
{
    if ((offset / SIM_SECTOR + salt) % 3) {
        sim_yield(&sim);
    }
}

static int coroutine_fn device_pread(ThinvmDevice *dev, uint64_t offset,
                                     uint64_t bytes, void *buf)
{
    maybe_yield(offset, 0);
    WITH_QEMU_LOCK_GUARD(&sim.lock) {
        g_assert(offset + bytes <= sim.length);
        memcpy(buf, sim.data + offset, bytes);
    }
    maybe_yield(offset, 1);
    return 0;
}

static int coroutine_fn device_pwrite(ThinvmDevice *dev, uint64_t offset,
                                      uint64_t bytes, const void *buf)
{
    maybe_yield(offset, 1);
    WITH_QEMU_LOCK_GUARD(&sim.lock) {
        g_assert(offset + bytes <= sim.length);
        memcpy(sim.data + offset, buf, bytes);
    }
    maybe_yield(offset, 2);
    return 0;
}

static int coroutine_fn device_flush(ThinvmDevice *dev)
{
    sim_yield(&sim);
    return 0;
}

static int coroutine_fn device_discard(ThinvmDevice *dev, uint64_t offset,
                                       uint64_t bytes)
{
    sim_yield(&sim);
    WITH_QEMU_LOCK_GUARD(&sim.lock) {
        g_assert(offset + bytes <= sim.length);
        memset(sim.data + offset, 0xd5, bytes);
    }
    return 0;
}

static int64_t coroutine_fn device_length(ThinvmDevice *dev)
{
    QEMU_LOCK_GUARD(&sim.lock);
    return sim.length;
}

static int coroutine_fn device_grow(ThinvmDevice *dev, uint64_t bytes)
{
    if (bytes > DEVICE_MAX) {
        return -ENOSPC;
    }
    sim_yield(&sim);
    WITH_QEMU_LOCK_GUARD(&sim.lock) {
        sim.length = MAX(sim.length, ROUND_UP(bytes, SIM_BLOCK));
    }
    return 0;
}

static void device_init(void)
{
    sim.device = (ThinvmDevice) {
        .co_pread = device_pread,
        .co_pwrite = device_pwrite,
        .co_flush = device_flush,
        .co_pdiscard = device_discard,
        .co_length = device_length,
        .co_grow = device_grow,
    };
    qemu_mutex_init(&sim.lock);
    sim.length = DEVICE_START;
    sim.data = g_malloc(DEVICE_MAX);
    memset(sim.data, 0xd5, DEVICE_MAX);
}

/* ------------------------------------------------------------------ */
/* Coroutines                                                          */

static void coroutine_fn done(void)
{
    if (qatomic_fetch_dec(&running) == 1) {
        aio_notify(main_context);
    }
}

static void begin(AioContext *ctx, CoroutineEntry *entry, void *opaque)
{
    qatomic_inc(&running);
    aio_co_schedule(ctx, qemu_coroutine_create(entry, opaque));
}

static void wait_for_all(void)
{
    while (qatomic_read(&running)) {
        aio_poll(main_context, true);
    }
}

static void in_main(CoroutineEntry *entry)
{
    begin(main_context, entry, NULL);
    wait_for_all();
}

/* ------------------------------------------------------------------ */
/* Owners                                                              */

static uint64_t cluster_of(const Owner *o, unsigned i)
{
    return (uint64_t)i * NB_OWNERS + o->number;
}

static void verify(const uint8_t *buf, uint64_t guest, const uint64_t *tags)
{
    for (unsigned i = 0; i < IMAGE_SECTORS; i++) {
        uint64_t tag = image_tag(buf + i * SIM_SECTOR,
                                 guest * IMAGE_SECTORS + i);

        g_assert_cmphex(tag, ==, tags[i / (IMAGE_PART / SIM_SECTOR)]);
    }
}

static void coroutine_fn do_write(Owner *o, unsigned i)
{
    unsigned part = g_rand_int_range(o->rand, 0, THINVM_PARTS);
    unsigned nb = g_rand_int_range(o->rand, 1, THINVM_PARTS - part + 1);
    uint64_t tag = (uint64_t)(o->number + 1) << 32 | ++o->next_tag;
    uint64_t ticket;
    int ret;

    if (g_rand_boolean(o->rand)) {
        part = 0;
        nb = THINVM_PARTS;
    }
    ret = image_write(&sim, store, cluster_of(o, i), part, nb, tag, &ticket);
    if (ret == -ENOSPC) {
        qatomic_inc(&nb_full);
        return;
    }
    g_assert_cmpint(ret, ==, 0);
    qatomic_inc(&nb_written);
    for (unsigned p = part; p < part + nb; p++) {
        o->tag[i][p] = tag;
    }
    if (ticket && g_rand_int_range(o->rand, 0, 8) == 0) {
        g_assert_cmpint(thinvm_store_commit_ticket(store, ticket), ==, 0);
    }
}

static void coroutine_fn do_unmap(Owner *o, unsigned i)
{
    unsigned token = thinvm_store_request_begin(store);
    int ret = thinvm_store_unmap(store, THINVM_TREE_DISK, cluster_of(o, i), 1,
                                 THINVM_SOURCE_ZERO, NULL, &error_abort);

    thinvm_store_request_end(store, token);
    g_assert_cmpint(ret, ==, 0);
    qatomic_inc(&nb_unmapped);
    memset(o->tag[i], 0, sizeof(o->tag[i]));
}

static void coroutine_fn do_read(Owner *o, unsigned i)
{
    g_autofree uint8_t *buf = g_malloc(IMAGE_CLUSTER);

    g_assert_cmpint(image_read(&sim, store, cluster_of(o, i), buf), ==, 0);
    verify(buf, cluster_of(o, i), o->tag[i]);
}

/* It changes meanwhile, but each sector is one of its owner's, or zero */
static void coroutine_fn do_peer(Owner *o)
{
    g_autofree uint8_t *buf = g_malloc(IMAGE_CLUSTER);
    uint64_t guest = g_rand_int_range(o->rand, 0, NB_CLUSTERS);

    g_assert_cmpint(image_read(&sim, store, guest, buf), ==, 0);
    for (unsigned i = 0; i < IMAGE_SECTORS; i++) {
        uint64_t tag = image_tag(buf + i * SIM_SECTOR,
                                 guest * IMAGE_SECTORS + i);

        g_assert(tag == TAG_ZERO || tag >> 32 == guest % NB_OWNERS + 1);
    }
}

static void coroutine_fn do_commit(Owner *o)
{
    ThinvmCommitLevel level = g_rand_boolean(o->rand) ?
                              THINVM_COMMIT_DURABLE : THINVM_COMMIT_RECORD;

    g_assert_cmpint(thinvm_store_commit(store, level, false), ==, 0);
}

static void coroutine_fn do_reserve(Owner *o)
{
    unsigned token = thinvm_store_request_begin(store);
    uint64_t first, nb;
    int ret = thinvm_store_reserve(store, 0, 4, &first, &nb);

    g_assert(ret == 0 || ret == -ENOSPC);
    if (ret == 0) {
        sim_yield(&sim);
        thinvm_store_unreserve(store, first, nb);
    }
    thinvm_store_request_end(store, token);
}

static void coroutine_fn owner_entry(void *opaque)
{
    Owner *o = opaque;

    for (unsigned step = 0; step < STEPS; step++) {
        unsigned what = g_rand_int_range(o->rand, 0, 100);
        unsigned i = g_rand_int_range(o->rand, 0, PER_OWNER);

        if (what < 45) {
            do_write(o, i);
        } else if (what < 65) {
            do_unmap(o, i);
        } else if (what < 80) {
            do_read(o, i);
        } else if (what < 90) {
            do_peer(o);
        } else if (what < 95) {
            do_commit(o);
        } else if (what < 98) {
            do_reserve(o);
        } else {
            g_assert_cmpint(thinvm_store_reclaim(store, step & 1), ==, 0);
        }
    }
    done();
}

/* Beside the owners */
static void coroutine_fn checkpoint_entry(void *opaque)
{
    for (unsigned i = 0; i < 4; i++) {
        for (unsigned turn = 0; turn < 200; turn++) {
            sim_yield(&sim);
        }
        g_assert_cmpint(thinvm_store_checkpoint(store), ==, 0);
        qatomic_inc(&nb_checkpoints);
    }
    done();
}

static void coroutine_fn delete_entry(void *opaque)
{
    ThinvmOp op = {
        .type = THINVM_OP_SNAPSHOT_DELETE_STEP,
        .guest = snapshot.slot,
        .value = snapshot.id,
    };
    ThinvmSnapshot snap;

    while (thinvm_store_read_snapshot(store, snapshot.slot, &snap,
                                      NULL) == 0) {
        g_assert_cmpint(thinvm_store_execute(store, &op, NULL, &error_abort),
                        ==, 0);
        for (unsigned turn = 0; turn < 20; turn++) {
            sim_yield(&sim);
        }
    }
    qatomic_inc(&nb_deleted);
    snapshot.id = 0;
    done();
}

/* ------------------------------------------------------------------ */
/* At rest                                                             */

static void coroutine_fn take_entry(void *opaque)
{
    ThinvmSnapshot snap = { .icount = UINT64_MAX, .name = "a" };
    ThinvmOp op = { .type = THINVM_OP_SNAPSHOT_CREATE, .snapshot = &snap };
    ThinvmState *state = thinvm_store_state(store);
    ThinvmInfoState info;

    thinvm_state_lock(state);
    snap.id = thinvm_snapshot_next_id(state);
    thinvm_state_info(state, &info);
    thinvm_state_unlock(state);
    snap.virtual_size = info.virtual_size;
    g_assert_cmpint(thinvm_store_execute(store, &op, NULL, &error_abort), ==,
                    0);
    snapshot = (ThinvmSnapshotName) { .slot = 0, .id = snap.id };
    for (unsigned g = 0; g < NB_CLUSTERS; g++) {
        memcpy(snapshot_tag[g], owners[g % NB_OWNERS].tag[g / NB_OWNERS],
               sizeof(snapshot_tag[g]));
    }
    done();
}

static void coroutine_fn verify_snapshot(void)
{
    g_autofree uint8_t *buf = g_malloc(IMAGE_CLUSTER);
    ThinvmSnapshot snap;

    g_assert_cmpint(thinvm_store_read_snapshot(store, snapshot.slot, &snap,
                                               &error_abort), ==, 0);
    g_assert_cmpuint(snap.id, ==, snapshot.id);
    for (unsigned g = 0; g < NB_CLUSTERS; g++) {
        g_assert_cmpint(image_read_root(&sim, store, &snap.root, g, buf), ==,
                        0);
        verify(buf, g, snapshot_tag[g]);
    }
}

static void coroutine_fn verify_entry(void *opaque)
{
    for (unsigned n = 0; n < NB_OWNERS; n++) {
        for (unsigned i = 0; i < PER_OWNER; i++) {
            do_read(&owners[n], i);
        }
    }
    if (snapshot.id) {
        verify_snapshot();
    }
    g_assert_cmpint(thinvm_store_commit(store, THINVM_COMMIT_DURABLE, false),
                    ==, 0);
    image_check(store);
    done();
}

static void coroutine_fn create_entry(void *opaque)
{
    image_create(&sim, NB_CLUSTERS * IMAGE_CLUSTER);
    store = image_open(&sim);
    thinvm_store_set_discard(store, true);
    done();
}

/* What was committed is in the journal, or in a checkpoint */
static void coroutine_fn reopen_entry(void *opaque)
{
    thinvm_store_free(store);
    store = image_open(&sim);
    done();
}

static void coroutine_fn close_entry(void *opaque)
{
    thinvm_store_end_writing(store, true, &error_abort);
    thinvm_store_free(store);
    store = image_open(&sim);
    done();
}

/* ------------------------------------------------------------------ */

static void round_of_all(IOThread **threads, unsigned round)
{
    if (!snapshot.id) {
        in_main(take_entry);
    } else {
        begin(iothread_get_aio_context(threads[round % NB_THREADS]),
              delete_entry, NULL);
    }
    begin(iothread_get_aio_context(threads[(round + 1) % NB_THREADS]),
          checkpoint_entry, NULL);
    for (unsigned i = 0; i < NB_OWNERS; i++) {
        begin(iothread_get_aio_context(threads[i % NB_THREADS]), owner_entry,
              &owners[i]);
    }
    wait_for_all();
    in_main(verify_entry);
}

static void test_threads(void)
{
    IOThread *threads[NB_THREADS];

    device_init();
    for (unsigned i = 0; i < NB_OWNERS; i++) {
        owners[i].number = i;
        owners[i].rand = g_rand_new_with_seed(i + 1);
    }
    for (unsigned i = 0; i < NB_THREADS; i++) {
        threads[i] = iothread_new();
    }
    in_main(create_entry);
    for (unsigned round = 0; round < ROUNDS; round++) {
        round_of_all(threads, round);
    }
    in_main(reopen_entry);
    in_main(verify_entry);
    in_main(close_entry);
    in_main(verify_entry);
    g_test_message("written %u, unmapped %u, full %u, checkpoints %u, "
                   "snapshots deleted %u", nb_written, nb_unmapped, nb_full,
                   nb_checkpoints, nb_deleted);
    g_assert_cmpuint(nb_deleted, ==, ROUNDS / 2);
    for (unsigned i = 0; i < NB_THREADS; i++) {
        iothread_join(threads[i]);
    }
    for (unsigned i = 0; i < NB_OWNERS; i++) {
        g_rand_free(owners[i].rand);
    }
    thinvm_store_free(store);
    qemu_mutex_destroy(&sim.lock);
    g_free(sim.data);
}

int main(int argc, char **argv)
{
    module_call_init(MODULE_INIT_TRACE);
    qemu_init_main_loop(&error_abort);
    main_context = qemu_get_aio_context();
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/thinvm/store/threads", test_threads);
    return g_test_run();
}
