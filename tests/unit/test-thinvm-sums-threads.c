/*
 * Unit tests: data that records vouch for, several threads, and power cuts
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The driver's own data path (thinvm-node.h) on a device in memory that
 * has a volatile cache.  Coroutines of several threads write, zero, discard
 * and flush a few clusters, where each gets in the other's way; beside them
 * snapshots come and go, and checkpoints are written.  Writes take effect some
 * turns after they were issued, a few very late.  At any point of this the
 * device is copied as a power cut may leave it, with what is allowed then
 * (thinvm-crash-model.h); the copy is opened, checked and compared in the main
 * thread while the others go on.  Nothing here can be repeated exactly; what a
 * seed decides is in test-thinvm-crash.  Here it is the threads that matter, and
 * late writes in place.
 *
 *   test-thinvm-sums-threads -m slow [--tap]    THINVM_CUTS: power cuts
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/cutils.h"
#include "qemu/lockable.h"
#include "qemu/main-loop.h"
#include "qemu/module.h"
#include "qemu/rcu.h"
#include "block/aio.h"
#include "iothread.h"
#include "thinvm-crash-model.h"
#include "thinvm-node.h"
#include "block/thinvm/store-int.h"

#define NB_THREADS      3
#define PER_THREAD      3
#define CUTS            2000
#define DISK_CLUSTERS   8           /* slots 0 to 7, which are side by side */
#define DISK_SECTORS    (DISK_CLUSTERS * IMAGE_SECTORS)
#define PART_SECTORS    (IMAGE_PART / SIM_SECTOR)
#define DEVICE_LENGTH   (6 * MiB)
/* I/Os between two cuts, at most */
#define CUT_DISTANCE    200

/* A write that is in flight, or in the device's cache */
typedef struct Write {
    QTAILQ_ENTRY(Write) next;
    uint64_t sequence;              /* of its completion */
    uint64_t offset, bytes;
    uint8_t data[];
} Write;

typedef QTAILQ_HEAD(, Write) WriteQueue;

struct ThinvmSim {
    ThinvmDevice device;
    bool live;                      /* not a copy */
    QemuMutex lock;                 /* all of it, and the model */
    uint8_t *visible, *durable;     /* DEVICE_LENGTH bytes each */
    WriteQueue in_flight, cached;   /* in the order of their effects */
    uint64_t sequence;              /* counts completed writes */
    uint64_t flushed_sequence;      /* when the last good flush began */
    GRand *rand;
    bool hold_next, held;           /* a write does not take effect yet */
};

/* A copy, and what it may hold */
typedef struct Cut {
    ThinvmSim sim;
    Model *model;
} Cut;

typedef struct Worker {
    unsigned number;
    GRand *rand;
    uint8_t *buf;
} Worker;

static ThinvmSim sim;
static Model *model;
static ThinvmStore *store;
static BlockDriverState *node;
static AioContext *main_context;
static unsigned running;            /* coroutines; qatomic */

/* sim.lock */
static bool cutting, stop, frozen;
static unsigned nb_active, nb_cuts, cuts_wanted, until_cut;
static uint64_t snapshot_id;        /* 0: there is none */
/* of the cuts; main thread */
static unsigned nb_by_sums, nb_without;

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

/* Other coroutines of this thread have their turn */
void coroutine_fn sim_yield(ThinvmSim *s)
{
    aio_co_schedule(qemu_get_current_aio_context(), qemu_coroutine_self());
    qemu_coroutine_yield();
}

static void coroutine_fn turns(ThinvmSim *s, unsigned n)
{
    while (s->live && n--) {
        sim_yield(s);
    }
}

/* ------------------------------------------------------------------ */
/* Device                                                              */

static void maybe_cut(ThinvmSim *s);

ThinvmDevice *sim_device(ThinvmSim *s)
{
    return &s->device;
}

static ThinvmSim *sim_of(ThinvmDevice *dev)
{
    return container_of(dev, ThinvmSim, device);
}

/* How long an I/O takes: a few take very long */
static unsigned latency(ThinvmSim *s)
{
    unsigned chance = g_rand_int_range(s->rand, 0, 100);

    return g_rand_int_range(s->rand, 0, chance < 70 ? 3 : chance < 94 ? 15 :
                                        300);
}

static int coroutine_fn device_pread(ThinvmDevice *dev, uint64_t offset,
                                     uint64_t bytes, void *buf)
{
    ThinvmSim *s = sim_of(dev);

    if (s->live && offset % 3) {
        sim_yield(s);
    }
    QEMU_LOCK_GUARD(&s->lock);
    g_assert(offset + bytes <= DEVICE_LENGTH);
    memcpy(buf, s->visible + offset, bytes);
    return 0;
}

static bool is_held(ThinvmSim *s)
{
    QEMU_LOCK_GUARD(&s->lock);
    return s->held;
}

static int coroutine_fn device_pwrite(ThinvmDevice *dev, uint64_t offset,
                                      uint64_t bytes, const void *buf)
{
    ThinvmSim *s = sim_of(dev);
    Write *w = g_malloc(sizeof(*w) + bytes);
    unsigned delay;
    bool hold;

    g_assert(bytes % SIM_SECTOR == 0 && offset + bytes <= DEVICE_LENGTH);
    w->offset = offset;
    w->bytes = bytes;
    memcpy(w->data, buf, bytes);
    WITH_QEMU_LOCK_GUARD(&s->lock) {
        QTAILQ_INSERT_TAIL(&s->in_flight, w, next);
        delay = latency(s);
        hold = s->hold_next;
        s->held |= hold;
        s->hold_next = false;
    }
    turns(s, delay);
    while (hold && is_held(s)) {
        sim_yield(s);
    }
    WITH_QEMU_LOCK_GUARD(&s->lock) {
        maybe_cut(s);
        memcpy(s->visible + offset, w->data, bytes);
        QTAILQ_REMOVE(&s->in_flight, w, next);
        w->sequence = ++s->sequence;
        QTAILQ_INSERT_TAIL(&s->cached, w, next);
        maybe_cut(s);
        delay = g_rand_int_range(s->rand, 0, 3);
    }
    turns(s, delay);
    return 0;
}

/* Of two flushes between which nothing was written QEMU makes one */
static int coroutine_fn device_flush(ThinvmDevice *dev)
{
    ThinvmSim *s = sim_of(dev);
    uint64_t sequence;
    unsigned delay;
    Write *w;

    WITH_QEMU_LOCK_GUARD(&s->lock) {
        sequence = s->sequence;
        if (sequence == s->flushed_sequence) {
            return 0;
        }
        delay = latency(s);
    }
    turns(s, delay);
    WITH_QEMU_LOCK_GUARD(&s->lock) {
        maybe_cut(s);
        while ((w = QTAILQ_FIRST(&s->cached)) && w->sequence <= sequence) {
            memcpy(s->durable + w->offset, w->data, w->bytes);
            QTAILQ_REMOVE(&s->cached, w, next);
            g_free(w);
        }
        s->flushed_sequence = MAX(s->flushed_sequence, sequence);
        maybe_cut(s);
        delay = g_rand_int_range(s->rand, 0, 3);
    }
    turns(s, delay);
    return 0;
}

static int coroutine_fn device_discard(ThinvmDevice *dev, uint64_t offset,
                                       uint64_t bytes)
{
    g_autofree uint8_t *garbage = g_malloc(bytes);

    memset(garbage, 0xd5, bytes);
    return device_pwrite(dev, offset, bytes, garbage);
}

static int64_t coroutine_fn device_length(ThinvmDevice *dev)
{
    return DEVICE_LENGTH;
}

static int coroutine_fn device_grow(ThinvmDevice *dev, uint64_t bytes)
{
    return bytes > DEVICE_LENGTH ? -ENOSPC : 0;
}

/* Full of somebody else's data */
static void device_init(ThinvmSim *s, bool live)
{
    *s = (ThinvmSim) {
        .device.co_pread = device_pread,
        .device.co_pwrite = device_pwrite,
        .device.co_flush = device_flush,
        .device.co_pdiscard = device_discard,
        .device.co_length = device_length,
        .device.co_grow = device_grow,
        .live = live,
        .visible = g_malloc(DEVICE_LENGTH),
        .durable = g_malloc(DEVICE_LENGTH),
        .rand = g_rand_new_with_seed(live ? 1 : nb_cuts),
    };
    qemu_mutex_init(&s->lock);
    QTAILQ_INIT(&s->in_flight);
    QTAILQ_INIT(&s->cached);
    memset(s->visible, 0xd5, DEVICE_LENGTH);
    memset(s->durable, 0xd5, DEVICE_LENGTH);
}

static void device_destroy(ThinvmSim *s)
{
    Write *w;

    g_assert(QTAILQ_EMPTY(&s->in_flight));
    while ((w = QTAILQ_FIRST(&s->cached))) {
        QTAILQ_REMOVE(&s->cached, w, next);
        g_free(w);
    }
    qemu_mutex_destroy(&s->lock);
    g_rand_free(s->rand);
    g_free(s->visible);
    g_free(s->durable);
}

/* ------------------------------------------------------------------ */
/* Power cuts                                                          */

static uint64_t epoch_of(ThinvmStore *st)
{
    ThinvmInfoState info;

    thinvm_state_lock(thinvm_store_state(st));
    thinvm_state_info(thinvm_store_state(st), &info);
    thinvm_state_unlock(thinvm_store_state(st));
    return info.epoch;
}

static void compare(const Cut *c, unsigned slot, const uint8_t *buf)
{
    for (unsigned i = 0; i < IMAGE_SECTORS; i++) {
        unsigned sector = slot * IMAGE_SECTORS + i;
        uint64_t tag = image_tag(buf + i * SIM_SECTOR, sector);
        const History *h = &c->model->sectors[sector];

        if (!model_allows(c->model, sector, false, tag)) {
            g_error("cut %u: sector %u has value %" PRId64 ", which it must "
                    "not have (of %u values from %" PRIu64 " to %" PRIu64 ")",
                    nb_cuts, sector, tag, h->nb, h->values[0].tag,
                    h->values[h->nb - 1].tag);
        }
    }
}

static void coroutine_fn verify(Cut *c)
{
    g_autofree uint8_t *buf = g_malloc(IMAGE_CLUSTER);
    ThinvmStore *st = thinvm_store_open(&c->sim.device, 0, &error_abort);

    nb_by_sums += st->last_summed;
    nb_without += st->cut_by_sums;
    thinvm_store_begin_writing(st, epoch_of(st) + 1, &error_abort);
    image_check(st);
    for (unsigned slot = 0; slot < DISK_CLUSTERS; slot++) {
        g_assert_cmpint(image_read(&c->sim, st, slot, buf), ==, 0);
        compare(c, slot, buf);
    }
    thinvm_store_free(st);
}

static void coroutine_fn verify_entry(void *opaque)
{
    Cut *c = opaque;

    verify(c);
    model_free(c->model);
    device_destroy(&c->sim);
    g_free(c);
    WITH_QEMU_LOCK_GUARD(&sim.lock) {
        cutting = false;
        stop = nb_cuts >= cuts_wanted;
    }
    done();
}

/* All of a write, nothing, or some of its sectors arrive */
static void arrive(Cut *c, unsigned percent, const Write *w)
{
    bool torn = percent > 0 && percent < 100 &&
                g_rand_int_range(c->sim.rand, 0, 10) < 3;
    bool whole = g_rand_int_range(c->sim.rand, 0, 100) < percent;

    for (uint64_t i = 0; i < w->bytes; i += SIM_SECTOR) {
        if (torn ? g_rand_boolean(c->sim.rand) : whole) {
            memcpy(c->sim.visible + w->offset + i, w->data + i, SIM_SECTOR);
        }
    }
}

/* sim.lock */
static Cut *cut_new(unsigned cached, unsigned in_flight)
{
    Cut *c = g_new(Cut, 1);
    Write *w;

    nb_cuts++;
    device_init(&c->sim, false);
    memcpy(c->sim.visible, sim.durable, DEVICE_LENGTH);
    QTAILQ_FOREACH(w, &sim.cached, next) {
        arrive(c, cached, w);
    }
    QTAILQ_FOREACH(w, &sim.in_flight, next) {
        arrive(c, in_flight, w);
    }
    memcpy(c->sim.durable, c->sim.visible, DEVICE_LENGTH);
    c->model = model_copy(model);
    return c;
}

/* Is it time for one, and was the last one looked at?  s->lock */
static void maybe_cut(ThinvmSim *s)
{
    static const unsigned chances[] = { 0, 20, 50, 80, 95, 100 };
    unsigned percent;

    if (!s->live || !cuts_wanted || cutting || stop ||
        (until_cut && until_cut--)) {
        return;
    }
    cutting = true;
    until_cut = g_rand_int_range(sim.rand, 1, CUT_DISTANCE);
    percent = chances[g_rand_int_range(sim.rand, 0, ARRAY_SIZE(chances))];
    begin(main_context, verify_entry,
          cut_new(percent, g_rand_boolean(sim.rand) ? percent : 0));
}

/* ------------------------------------------------------------------ */
/* What a guest does                                                   */

static void coroutine_fn guest_write(uint64_t sector, unsigned nb,
                                     uint8_t *buf)
{
    uint64_t begun, tag;
    QEMUIOVector qiov;
    int ret;

    WITH_QEMU_LOCK_GUARD(&sim.lock) {
        tag = model->next_tag++;
        begun = model_begin(model, sector, nb, tag);
    }
    image_fill(buf, sector, nb, tag);
    qemu_iovec_init_buf(&qiov, buf, nb * SIM_SECTOR);
    ret = thinvm_co_pwritev_part(node, sector * SIM_SECTOR, nb * SIM_SECTOR,
                                 &qiov, 0, 0);
    /* All may be waiting to be free, behind somebody who is very late */
    g_assert(ret == 0 || ret == -ENOSPC);
    QEMU_LOCK_GUARD(&sim.lock);
    (ret < 0 ? model_fail : model_end)(model, sector, nb, begun);
}

static void coroutine_fn guest_zero(uint64_t sector, unsigned nb, bool discard,
                                    bool may_unmap)
{
    uint64_t begun;
    int ret;

    WITH_QEMU_LOCK_GUARD(&sim.lock) {
        begun = model_begin(model, sector, nb, TAG_ZERO);
    }
    ret = discard ? thinvm_co_pdiscard(node, sector * SIM_SECTOR,
                                       nb * SIM_SECTOR) :
          thinvm_co_pwrite_zeroes(node, sector * SIM_SECTOR, nb * SIM_SECTOR,
                                  may_unmap ? BDRV_REQ_MAY_UNMAP : 0);
    g_assert_cmpint(ret, ==, 0);
    QEMU_LOCK_GUARD(&sim.lock);
    model_end(model, sector, nb, begun);
}

/* As thinvm_co_flush_to_os(), and then the block layer */
static void coroutine_fn guest_flush(void)
{
    uint64_t clock;

    WITH_QEMU_LOCK_GUARD(&sim.lock) {
        clock = model->clock;
    }
    WITH_QEMU_LOCK_GUARD(&store->lock) {
        store->journal.sums_pause = 0;      /* they are worth it at once */
    }
    g_assert_cmpint(thinvm_store_commit(store, THINVM_COMMIT_FLUSHED, true),
                    ==, 0);
    g_assert_cmpint(store->dev->co_flush(store->dev), ==, 0);
    QEMU_LOCK_GUARD(&sim.lock);
    model_flushed(model, clock);
    maybe_cut(&sim);
}

/* ------------------------------------------------------------------ */
/* Workers                                                             */

static unsigned below(Worker *w, unsigned n)
{
    return g_rand_int_range(w->rand, 0, n);
}

/* False: the test is over */
static bool coroutine_fn enter(void)
{
    for (;;) {
        WITH_QEMU_LOCK_GUARD(&sim.lock) {
            if (stop) {
                return false;
            }
            if (!frozen) {
                nb_active++;
                return true;
            }
        }
        sim_yield(&sim);
    }
}

static void leave(void)
{
    QEMU_LOCK_GUARD(&sim.lock);
    nb_active--;
}

/* Mostly a sector or two of a part that others are at, too */
static void coroutine_fn step_write(Worker *w)
{
    uint64_t sector = below(w, DISK_SECTORS);
    unsigned nb = 1 + below(w, below(w, 4) ? 4 : 3 * IMAGE_SECTORS);

    if (below(w, 2)) {
        sector = below(w, 2) * IMAGE_SECTORS + below(w, 4 * PART_SECTORS);
    }
    guest_write(sector, MIN(nb, DISK_SECTORS - sector), w->buf);
}

/* Much at a time, and not often: records that zero have no checksums */
static void coroutine_fn step_zero(Worker *w)
{
    unsigned slot = below(w, below(w, 2) ? 2 : DISK_CLUSTERS);
    unsigned part = below(w, 4);

    if (below(w, 2)) {
        guest_zero(slot * IMAGE_SECTORS,
                   IMAGE_SECTORS * (1 + below(w, DISK_CLUSTERS - slot)),
                   below(w, 2), below(w, 2));
    } else {
        guest_zero(slot * IMAGE_SECTORS + part * PART_SECTORS,
                   PART_SECTORS * (1 + below(w, THINVM_PARTS - part)), false,
                   false);
    }
}

static void coroutine_fn worker_entry(void *opaque)
{
    Worker *w = opaque;

    while (enter()) {
        unsigned what = below(w, 100);

        if (what < 60) {
            step_write(w);
        } else if (what < 63) {
            step_zero(w);
        } else {
            guest_flush();
        }
        leave();
        turns(&sim, below(w, 3));
    }
    done();
}

/* ------------------------------------------------------------------ */
/* Beside them                                                         */

static bool coroutine_fn wait_turns(unsigned n)
{
    turns(&sim, n);
    QEMU_LOCK_GUARD(&sim.lock);
    return !stop;
}

static unsigned active(void)
{
    QEMU_LOCK_GUARD(&sim.lock);
    return nb_active;
}

static void set_frozen(bool on)
{
    QEMU_LOCK_GUARD(&sim.lock);
    frozen = on;
}

static void coroutine_fn snapshot_create(void)
{
    ThinvmSnapshot snap = { .icount = UINT64_MAX, .name = "a" };
    ThinvmOp op = { .type = THINVM_OP_SNAPSHOT_CREATE, .snapshot = &snap };
    ThinvmState *s = thinvm_store_state(store);

    set_frozen(true);
    while (active()) {
        sim_yield(&sim);
    }
    thinvm_state_lock(s);
    snap.id = thinvm_snapshot_next_id(s);
    thinvm_state_unlock(s);
    snap.virtual_size = DISK_CLUSTERS * IMAGE_CLUSTER;
    g_assert_cmpint(thinvm_store_execute(store, &op, NULL, &error_abort), ==,
                    0);
    g_assert_cmpint(thinvm_store_commit(store, THINVM_COMMIT_DURABLE, true),
                    ==, 0);
    snapshot_id = snap.id;
    set_frozen(false);
}

static void coroutine_fn snapshot_delete(void)
{
    ThinvmOp op = {
        .type = THINVM_OP_SNAPSHOT_DELETE_STEP,
        .value = snapshot_id,
    };
    ThinvmSnapshot snap;

    while (thinvm_store_read_snapshot(store, 0, &snap, NULL) == 0) {
        g_assert_cmpint(thinvm_store_execute(store, &op, NULL, &error_abort),
                        ==, 0);
        turns(&sim, 5);
    }
    snapshot_id = 0;
}

static void coroutine_fn maintenance_entry(void *opaque)
{
    g_autoptr(GRand) rand = g_rand_new_with_seed(99);

    while (wait_turns(g_rand_int_range(rand, 0, 400))) {
        switch (g_rand_int_range(rand, 0, 6)) {
        case 0:
            g_assert_cmpint(thinvm_store_checkpoint(store), ==, 0);
            break;
        case 1:
            g_assert_cmpint(thinvm_store_commit(store, THINVM_COMMIT_DURABLE,
                                                true), ==, 0);
            break;
        case 2:
            if (snapshot_id) {
                snapshot_delete();
            } else {
                snapshot_create();
            }
            break;
        default:
            g_assert_cmpint(thinvm_store_reclaim(store, true), ==, 0);
            break;
        }
    }
    done();
}

/* ------------------------------------------------------------------ */
/* The whole                                                           */

static void coroutine_fn create_entry(void *opaque)
{
    image_create(&sim, DISK_CLUSTERS * IMAGE_CLUSTER);
    store = image_open(&sim);
    thinvm_store_set_discard(store, true);
    node = test_node_new(store, DISK_CLUSTERS * IMAGE_CLUSTER);
    guest_flush();
    done();
}

static void set_up(void)
{
    cutting = stop = frozen = false;
    nb_active = nb_cuts = cuts_wanted = until_cut = 0;
    nb_by_sums = nb_without = 0;
    snapshot_id = 0;
    device_init(&sim, true);
    model = model_new(NULL, 1);
    in_main(create_entry);
}

static void tear_down(void)
{
    test_node_free(node);
    thinvm_store_free(store);
    model_free(model);
    device_destroy(&sim);
}

static void test_threads(void)
{
    const char *wanted = getenv("THINVM_CUTS");
    IOThread *threads[NB_THREADS];
    Worker workers[NB_THREADS * PER_THREAD];

    set_up();
    for (unsigned i = 0; i < NB_THREADS; i++) {
        threads[i] = iothread_new();
    }
    cuts_wanted = wanted ? strtoul(wanted, NULL, 0) : CUTS;
    begin(iothread_get_aio_context(threads[0]), maintenance_entry, NULL);
    for (unsigned i = 0; i < ARRAY_SIZE(workers); i++) {
        workers[i] = (Worker) {
            .number = i,
            .rand = g_rand_new_with_seed(i + 1),
            .buf = g_malloc(DISK_CLUSTERS * IMAGE_CLUSTER),
        };
        begin(iothread_get_aio_context(threads[i % NB_THREADS]), worker_entry,
              &workers[i]);
    }
    wait_for_all();
    for (unsigned i = 0; i < ARRAY_SIZE(workers); i++) {
        g_rand_free(workers[i].rand);
        g_free(workers[i].buf);
    }
    for (unsigned i = 0; i < NB_THREADS; i++) {
        iothread_join(threads[i]);
    }
    g_test_message("%u cuts: in %u the last record was one with checksums "
                   "that counts, in %u one that does not; %" PRIu64 " such "
                   "records, %" PRIu64 " writes asked for them", nb_cuts,
                   nb_by_sums, nb_without, store->nb_summed,
                   store->nb_touched);
    /* The load is what it is meant to be */
    g_assert_cmpuint(store->nb_summed * 4, >=, nb_cuts);
    g_assert_cmpuint(store->nb_touched, >, 0);
    g_assert_cmpuint(nb_by_sums, >, 0);
    tear_down();
}

/* ------------------------------------------------------------------ */
/* A write in place that arrives late                                  */

static uint8_t late_buf[SIM_SECTOR];
static bool late_ended;

static void coroutine_fn late_entry(void *opaque)
{
    guest_write(0, 1, late_buf);
    late_ended = true;
    done();
}

static void coroutine_fn verify_now(void)
{
    Cut *c;

    WITH_QEMU_LOCK_GUARD(&sim.lock) {
        c = cut_new(100, 100);
    }
    verify(c);
    model_free(c->model);
    device_destroy(&c->sim);
    g_free(c);
}

/*
 * It found the part valid.  Then that is zeroed in its place, and written
 * again; the record that says so must not go by what is in there.
 */
static void coroutine_fn zeroed_entry(void *opaque)
{
    g_autofree uint8_t *buf = g_malloc(IMAGE_CLUSTER);
    uint64_t summed;

    guest_write(0, IMAGE_SECTORS, buf);
    guest_flush();
    WITH_QEMU_LOCK_GUARD(&sim.lock) {
        sim.hold_next = true;
    }
    begin(main_context, late_entry, NULL);
    while (!is_held(&sim)) {
        sim_yield(&sim);
    }
    guest_zero(0, PART_SECTORS, false, false);
    guest_flush();
    g_assert_true(thinvm_store_wants_sums(store));
    guest_write(0, PART_SECTORS, buf);
    guest_write(5 * IMAGE_SECTORS, 1, buf);
    guest_flush();
    WITH_QEMU_LOCK_GUARD(&sim.lock) {
        sim.held = false;
    }
    while (!late_ended) {
        sim_yield(&sim);
    }
    verify_now();

    /* Once it has left, checksums are as good as ever */
    guest_zero(0, PART_SECTORS, false, false);
    guest_flush();
    summed = store->nb_summed;
    guest_write(0, PART_SECTORS, buf);
    guest_flush();
    g_assert_cmpuint(store->nb_summed, ==, summed + 1);
    verify_now();
    done();
}

static void test_zeroed(void)
{
    set_up();
    in_main(zeroed_entry);
    tear_down();
}

/* ------------------------------------------------------------------ */
/* A write that meets one which has waited for a discard               */

static void coroutine_fn waiting_entry(void *opaque)
{
    g_autofree uint8_t *buf = g_malloc(IMAGE_PART);

    guest_write(2 * PART_SECTORS, 1, buf);
    done();
}

/*
 * The other has found the cluster mapped, and is registered; it has not run
 * since the discard has ended, and will not if we do not let it.
 */
static void coroutine_fn discarded_entry(void *opaque)
{
    g_autofree uint8_t *buf = g_malloc(IMAGE_CLUSTER);
    BDRVThinvmState *s = node->opaque;
    ThinvmInflight discard, *waiting;
    uint64_t begun;

    guest_write(0, IMAGE_SECTORS, buf);
    guest_zero(2 * PART_SECTORS, PART_SECTORS, false, false);

    thinvm_inflight_begin_exclusive(s, &discard, THINVM_TREE_DISK, 0, 1);
    begun = model_begin(model, 0, IMAGE_SECTORS, TAG_ZERO);
    begin(main_context, waiting_entry, NULL);
    do {
        sim_yield(&sim);
        waiting = QLIST_FIRST(&s->inflight);
    } while (waiting == &discard);
    g_assert_cmpint(thinvm_store_unmap(store, THINVM_TREE_DISK, 0, 1,
                                       THINVM_SOURCE_ZERO, NULL,
                                       &error_abort), ==, 0);
    model_end(model, 0, IMAGE_SECTORS, begun);
    thinvm_inflight_end_request(s, &discard);
    g_assert_true(QLIST_FIRST(&s->inflight) == waiting);
    guest_write(3 * PART_SECTORS, 1, buf);
    while (!QLIST_EMPTY(&s->inflight)) {
        sim_yield(&sim);
    }
    guest_flush();
    verify_now();
    done();
}

static void test_discarded(void)
{
    set_up();
    in_main(discarded_entry);
    tear_down();
}

/* ------------------------------------------------------------------ */
/* Who finds a mapping can flush it                                    */

#define FIND_ROUNDS     2000

static unsigned find_round, found_round;    /* qatomic */
static unsigned nb_found_early;

/* Looks up without a lock, as a write does that comes at the right moment */
static void *finder(void *opaque)
{
    ThinvmState *s = thinvm_store_state(store);
    ThinvmMapping m;

    rcu_register_thread();
    for (unsigned round = 1; round <= FIND_ROUNDS; round++) {
        while (qatomic_read(&find_round) != round) {
            sched_yield();
        }
        do {
            m.type = THINVM_MAPPING_NONE;
            thinvm_state_lookup_cached(s, THINVM_TREE_DISK, 0, 1, false, &m);
        } while (m.type != THINVM_MAPPING_DATA);
        nb_found_early += !qatomic_read(&store->journal.pending_length);
        qatomic_store_release(&found_round, round);
    }
    rcu_unregister_thread();
    return NULL;
}

static void coroutine_fn finding_entry(void *opaque)
{
    g_autofree uint8_t *buf = g_malloc(IMAGE_CLUSTER);

    for (unsigned round = 1; round <= FIND_ROUNDS; round++) {
        qatomic_set(&find_round, round);
        guest_write(0, IMAGE_SECTORS, buf);
        while (qatomic_load_acquire(&found_round) != round) {
            sched_yield();
        }
        guest_zero(0, IMAGE_SECTORS, true, true);
        guest_flush();
        if (round % 16 == 0) {
            g_assert_cmpint(thinvm_store_reclaim(store, true), ==, 0);
        }
    }
    done();
}

/*
 * A flush that follows finds something to do: the operation is pending before
 * its mapping can be found.  (With the two exchanged, up to nine rounds of ten
 * find it too early; none, if both threads share a processor.)
 */
static void test_found(void)
{
    QemuThread thread;

    set_up();
    find_round = found_round = nb_found_early = 0;
    qemu_thread_create(&thread, "finder", finder, NULL, QEMU_THREAD_JOINABLE);
    in_main(finding_entry);
    qemu_thread_join(&thread);
    g_assert_cmpuint(nb_found_early, ==, 0);
    tear_down();
}

/* ------------------------------------------------------------------ */
/* Writes to a cluster that is shared no more                          */

/* A write of a coroutine's own */
typedef struct Guest {
    uint64_t sector;
    unsigned nb;
    bool ended;
} Guest;

static void coroutine_fn guest_entry(void *opaque)
{
    g_autofree uint8_t *buf = g_malloc(DISK_CLUSTERS * IMAGE_CLUSTER);
    Guest *g = opaque;

    guest_write(g->sector, g->nb, buf);
    g->ended = true;
    done();
}

/*
 * @first finds a cluster that a snapshot shares, none of whose parts are valid,
 * and writes to a new one; it is late.  The snapshot goes, so @second finds
 * that the old one is the disk's own.
 */
static void coroutine_fn lose_snapshot(Guest first, Guest second)
{
    g_autofree uint8_t *buf = g_malloc(DISK_CLUSTERS * IMAGE_CLUSTER);

    guest_write(0, DISK_SECTORS, buf);
    guest_zero(0, DISK_SECTORS, false, false);
    snapshot_create();
    WITH_QEMU_LOCK_GUARD(&sim.lock) {
        sim.hold_next = true;
    }
    begin(main_context, guest_entry, &first);
    while (!is_held(&sim)) {
        sim_yield(&sim);
    }
    snapshot_delete();
    begin(main_context, guest_entry, &second);
    turns(&sim, 400);
    WITH_QEMU_LOCK_GUARD(&sim.lock) {
        sim.held = false;
    }
    while (!first.ended || !second.ended) {
        sim_yield(&sim);
    }
    guest_flush();
    verify_now();
}

/* A part each; then several clusters, of which one end is ragged */
static void coroutine_fn unshared_entry(void *opaque)
{
    lose_snapshot((Guest) { 2 * PART_SECTORS, 1 },
                  (Guest) { 3 * PART_SECTORS, 1 });
    lose_snapshot((Guest) { 5 * PART_SECTORS + 1, 3 * IMAGE_SECTORS },
                  (Guest) { 2 * PART_SECTORS, 1 });
    lose_snapshot((Guest) { 0, 2 * IMAGE_SECTORS + PART_SECTORS },
                  (Guest) { 2 * IMAGE_SECTORS + 7 * PART_SECTORS, 1 });
    done();
}

static void test_unshared(void)
{
    set_up();
    in_main(unshared_entry);
    tear_down();
}

int main(int argc, char **argv)
{
    module_call_init(MODULE_INIT_TRACE);
    qemu_init_main_loop(&error_abort);
    main_context = qemu_get_aio_context();
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/thinvm/sums-threads/zeroed", test_zeroed);
    g_test_add_func("/thinvm/sums-threads/discarded", test_discarded);
    g_test_add_func("/thinvm/sums-threads/found", test_found);
    g_test_add_func("/thinvm/sums-threads/unshared", test_unshared);
    /* Which interleavings it meets is chance: not for each run of all tests */
    if (g_test_slow()) {
        g_test_add_func("/thinvm/sums-threads/cuts", test_threads);
    }
    return g_test_run();
}
