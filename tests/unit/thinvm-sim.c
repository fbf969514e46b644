/*
 * A simulated device with a volatile write cache, for thinvm's unit tests
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Two views of the device are arrays of 4 KiB blocks, which are shared and
 * copied when written: "durable", and "visible", which has everything that
 * completed.  A block that was never written is NULL: an earlier tenant's.
 * What makes the difference between the views is also listed, write by write
 * (sim->cache), since at a power cut any subset of it may have arrived.
 */
#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qemu/queue.h"
#include "qemu/main-loop.h"
#include "block/aio.h"
#include "thinvm-sim.h"

typedef struct Block {
    unsigned refs;
    uint8_t data[SIM_BLOCK];
} Block;

typedef struct View {
    Block **blocks;             /* of the whole possible length */
    uint64_t length;            /* bytes */
} View;

/* A write that is not durable */
typedef struct Cached {
    QSIMPLEQ_ENTRY(Cached) next;
    uint64_t sequence;          /* of its completion */
    uint64_t offset, bytes;
    uint8_t data[];
} Cached;

/* A host's access to the device */
typedef struct Access {
    ThinvmDevice device;
    ThinvmSim *sim;
    bool fenced;
} Access;

/* An I/O, or a turn, that waits for the scheduler */
typedef struct Waiting {
    Coroutine *co;
    Access *access;             /* NULL: just a turn */
    SimKind kind;               /* 0: just a turn */
    uint64_t offset, bytes;
    void *buf;
    uint64_t sequence;          /* of the device when it was issued */
    int ret;
} Waiting;

/* A discard that was completed, and lands later (SIM_FAULT_DISCARD) */
typedef struct Late {
    QSIMPLEQ_ENTRY(Late) next;
    uint64_t offset, bytes, when;
} Late;

struct ThinvmSim {
    GPtrArray *accesses;        /* the first is sim_device()'s */
    SimRandom random;
    uint64_t seed;              /* of the earlier tenant's bytes */
    uint64_t max_length;
    View durable, visible;
    QSIMPLEQ_HEAD(, Cached) cache;
    uint64_t sequence;          /* counts completed writes */
    GPtrArray *waiting;         /* Waiting, on the coroutines' stacks */
    unsigned running;           /* coroutines that have not finished */
    uint64_t count[32];         /* by kind */
    uint64_t discarded, discard_unit;
    void (*hook)(void *opaque);
    void *hook_opaque;

    unsigned fail_kinds, fail_nth;
    uint64_t fail_start, fail_end;
    int fail_error;
    bool fail_once, failed;
    uint64_t lossy_start, lossy_end;

    SimFault fault;
    QSIMPLEQ_HEAD(, Late) late;
};

/* ------------------------------------------------------------------ */
/* Random numbers (splitmix64)                                         */

uint64_t sim_random(SimRandom *r)
{
    uint64_t z = r->state += 0x9e3779b97f4a7c15ULL;

    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ z >> 27) * 0x94d049bb133111ebULL;
    return z ^ z >> 31;
}

uint64_t sim_random_below(SimRandom *r, uint64_t below)
{
    return sim_random(r) % below;
}

bool sim_random_chance(SimRandom *r, unsigned percent)
{
    return sim_random_below(r, 100) < percent;
}

SimRandom *sim_rng(ThinvmSim *sim)
{
    return &sim->random;
}

/* ------------------------------------------------------------------ */
/* Views                                                               */

static void tenant_fill(ThinvmSim *sim, uint64_t block, uint8_t *data)
{
    SimRandom r = { sim->seed ^ block * 0x2545f4914f6cdd1dULL };
    uint64_t word = sim_random(&r) | 1;

    for (unsigned i = 0; i < SIM_BLOCK; i += 8) {
        stq_le_p(data + i, word);
        word = word * 6364136223846793005ULL + 1442695040888963407ULL;
    }
}

static void block_unref(Block *b)
{
    if (b && --b->refs == 0) {
        g_free(b);
    }
}

static Block *block_writable(ThinvmSim *sim, View *v, uint64_t nr)
{
    Block *b = v->blocks[nr];

    if (!b || b->refs > 1) {
        Block *copy = g_new(Block, 1);

        copy->refs = 1;
        if (b) {
            memcpy(copy->data, b->data, SIM_BLOCK);
            b->refs--;
        } else {
            tenant_fill(sim, nr, copy->data);
        }
        v->blocks[nr] = b = copy;
    }
    return b;
}

static void view_init(View *v, uint64_t length, uint64_t max_length)
{
    v->blocks = g_new0(Block *, max_length / SIM_BLOCK);
    v->length = length;
}

static void view_copy(View *dst, const View *src, uint64_t max_length)
{
    view_init(dst, src->length, max_length);
    for (uint64_t i = 0; i < max_length / SIM_BLOCK; i++) {
        dst->blocks[i] = src->blocks[i];
        if (dst->blocks[i]) {
            dst->blocks[i]->refs++;
        }
    }
}

static void view_destroy(View *v, uint64_t max_length)
{
    for (uint64_t i = 0; i < max_length / SIM_BLOCK; i++) {
        block_unref(v->blocks[i]);
    }
    g_free(v->blocks);
}

static void view_write(ThinvmSim *sim, View *v, uint64_t offset,
                       uint64_t bytes, const uint8_t *buf)
{
    while (bytes) {
        uint64_t in = offset % SIM_BLOCK;
        uint64_t n = MIN(bytes, SIM_BLOCK - in);

        memcpy(block_writable(sim, v, offset / SIM_BLOCK)->data + in, buf, n);
        offset += n;
        buf += n;
        bytes -= n;
    }
}

static void view_read(ThinvmSim *sim, const View *v, uint64_t offset,
                      uint64_t bytes, uint8_t *buf)
{
    uint8_t tenant[SIM_BLOCK];

    while (bytes) {
        uint64_t in = offset % SIM_BLOCK;
        uint64_t n = MIN(bytes, SIM_BLOCK - in);
        Block *b = v->blocks[offset / SIM_BLOCK];

        if (!b) {
            tenant_fill(sim, offset / SIM_BLOCK, tenant);
        }
        memcpy(buf, (b ? b->data : tenant) + in, n);
        offset += n;
        buf += n;
        bytes -= n;
    }
}

void sim_peek(ThinvmSim *sim, uint64_t offset, uint64_t bytes, void *buf)
{
    view_read(sim, &sim->visible, offset, bytes, buf);
}

void sim_poke(ThinvmSim *sim, uint64_t offset, uint64_t bytes,
              const void *buf)
{
    view_write(sim, &sim->visible, offset, bytes, buf);
    view_write(sim, &sim->durable, offset, bytes, buf);
}

void sim_truncate(ThinvmSim *sim, uint64_t length)
{
    g_assert(length <= sim->max_length);
    sim->visible.length = sim->durable.length = length;
}

uint64_t sim_length(ThinvmSim *sim)
{
    return sim->visible.length;
}

/* ------------------------------------------------------------------ */
/* Effects                                                             */

static void do_write(ThinvmSim *sim, uint64_t offset, uint64_t bytes,
                     const void *buf)
{
    Cached *c = g_malloc(sizeof(*c) + bytes);

    c->sequence = ++sim->sequence;
    c->offset = offset;
    c->bytes = bytes;
    memcpy(c->data, buf, bytes);
    QSIMPLEQ_INSERT_TAIL(&sim->cache, c, next);
    view_write(sim, &sim->visible, offset, bytes, buf);
}

/* What a discarded sector reads as; false: as before */
static bool discarded_sector(SimRandom *r, uint8_t *buf)
{
    switch (sim_random_below(r, 3)) {
    case 0:
        memset(buf, 0, SIM_SECTOR);
        return true;
    case 1:
        memset(buf, 0xd5, SIM_SECTOR);
        return true;
    default:
        return false;
    }
}

static void do_discard(ThinvmSim *sim, uint64_t offset, uint64_t bytes)
{
    uint8_t buf[SIM_SECTOR];

    sim->discarded += bytes;
    for (uint64_t end = offset + bytes; offset < end; offset += SIM_SECTOR) {
        if (discarded_sector(&sim->random, buf)) {
            do_write(sim, offset, SIM_SECTOR, buf);
        }
    }
}

static void land_late_discards(ThinvmSim *sim, bool all)
{
    Late *d;

    while ((d = QSIMPLEQ_FIRST(&sim->late)) &&
           (all || d->when <= sim->sequence)) {
        QSIMPLEQ_REMOVE_HEAD(&sim->late, next);
        do_discard(sim, d->offset, d->bytes);
        g_free(d);
    }
}

static void put_off_discard(ThinvmSim *sim, uint64_t offset, uint64_t bytes)
{
    Late *d = g_new(Late, 1);

    *d = (Late) {
        .offset = offset,
        .bytes = bytes,
        .when = sim->sequence + 20,
    };
    QSIMPLEQ_INSERT_TAIL(&sim->late, d, next);
}

/* What completed before the flush was issued becomes durable */
static void do_flush(ThinvmSim *sim, uint64_t sequence)
{
    Cached *c;

    if (sim->fault == SIM_FAULT_FLUSH) {
        return;
    }
    while ((c = QSIMPLEQ_FIRST(&sim->cache)) && c->sequence <= sequence) {
        view_write(sim, &sim->durable, c->offset, c->bytes, c->data);
        QSIMPLEQ_REMOVE_HEAD(&sim->cache, next);
        g_free(c);
    }
    sim->durable.length = sim->visible.length;
}

/* A flush failed: the lossy range loses some of what was in the cache */
static void lose_some(ThinvmSim *sim)
{
    Cached *c, *next;

    QSIMPLEQ_FOREACH_SAFE(c, &sim->cache, next, next) {
        if (c->offset >= sim->lossy_start && c->offset < sim->lossy_end &&
            sim_random_chance(&sim->random, 50)) {
            g_autofree uint8_t *old = g_malloc(c->bytes);

            view_read(sim, &sim->durable, c->offset, c->bytes, old);
            view_write(sim, &sim->visible, c->offset, c->bytes, old);
            QSIMPLEQ_REMOVE(&sim->cache, c, Cached, next);
            g_free(c);
        }
    }
}

static bool must_fail(ThinvmSim *sim, const Waiting *w)
{
    bool everywhere = w->kind == SIM_FLUSH || w->kind == SIM_GROW;

    if (!(w->kind & sim->fail_kinds) ||
        (!everywhere && (w->offset + w->bytes <= sim->fail_start ||
                         w->offset >= sim->fail_end))) {
        return false;
    }
    if (sim->fail_nth) {
        sim->fail_nth--;
        return false;
    }
    sim->failed = true;
    if (sim->fail_once) {
        sim->fail_kinds = 0;
    }
    return true;
}

static void take_effect(ThinvmSim *sim, Waiting *w)
{
    if (must_fail(sim, w)) {
        w->ret = -sim->fail_error;
        if (w->kind == SIM_FLUSH) {
            lose_some(sim);
        } else if (w->kind == SIM_WRITE &&
                   sim_random_chance(&sim->random, 50)) {
            /* part of a failed write may have arrived */
            do_write(sim, w->offset, SIM_SECTOR, w->buf);
        }
        return;
    }
    switch (w->kind) {
    case SIM_READ:
        view_read(sim, &sim->visible, w->offset, w->bytes, w->buf);
        break;
    case SIM_WRITE:
        do_write(sim, w->offset, w->bytes, w->buf);
        break;
    case SIM_FLUSH:
        do_flush(sim, w->sequence);
        break;
    case SIM_DISCARD:
        if (sim->fault == SIM_FAULT_DISCARD) {
            put_off_discard(sim, w->offset, w->bytes);
        } else {
            do_discard(sim, w->offset, w->bytes);
        }
        break;
    case SIM_GROW:
        if (w->bytes > sim->max_length) {
            w->ret = -ENOSPC;
        } else {
            sim->visible.length = MAX(sim->visible.length, w->bytes);
        }
        break;
    }
}

/* ------------------------------------------------------------------ */
/* Scheduler                                                           */

static int coroutine_fn wait_turn(ThinvmSim *sim, Access *access,
                                  SimKind kind, uint64_t offset,
                                  uint64_t bytes, void *buf)
{
    Waiting w = {
        .co = qemu_coroutine_self(),
        .access = access,
        .kind = kind,
        .offset = offset,
        .bytes = bytes,
        .buf = buf,
        .sequence = sim->sequence,
    };

    if (access && access->fenced) {
        return -EIO;
    }
    if (kind & (SIM_READ | SIM_WRITE | SIM_DISCARD)) {
        g_assert(offset % SIM_SECTOR == 0 && bytes % SIM_SECTOR == 0);
        g_assert(bytes > 0);
        if (offset + bytes > sim->visible.length) {
            return -EIO;
        }
    }
    g_ptr_array_add(sim->waiting, &w);
    qemu_coroutine_yield();
    return w.ret;
}

void coroutine_fn sim_yield(ThinvmSim *sim)
{
    wait_turn(sim, NULL, 0, 0, 0, NULL);
}

/* Turns that a sleep takes here: long, beside an I/O */
#define SLEEP_TURNS     50

static ThinvmSim *current;      /* whose coroutine runs */

static void enter(ThinvmSim *sim, Coroutine *co)
{
    ThinvmSim *before = current;

    current = sim;
    qemu_coroutine_enter(co);
    current = before;
}

/*
 * In the place of the clock's, so that who sleeps keeps to the order that the
 * seed decides.
 */
void coroutine_fn qemu_co_sleep_ns_wakeable(QemuCoSleep *w,
                                            QEMUClockType type, int64_t ns)
{
    for (int i = 0; i < SLEEP_TURNS; i++) {
        sim_yield(current);
    }
}

static void run_one(ThinvmSim *sim)
{
    guint i = sim_random_below(&sim->random, sim->waiting->len);
    Waiting *w = g_ptr_array_index(sim->waiting, i);

    if (w->kind && sim->hook) {
        sim->hook(sim->hook_opaque);
    }
    land_late_discards(sim, false);
    g_ptr_array_remove_index_fast(sim->waiting, i);
    if (w->kind && w->access->fenced) {
        w->ret = -EIO;          /* the hook has fenced it off */
    } else if (w->kind) {
        sim->count[ctz32(w->kind)]++;
        take_effect(sim, w);
    }
    enter(sim, w->co);
}

bool sim_run_some(ThinvmSim *sim, uint64_t ios)
{
    uint64_t end = sim_count(sim, ~0) + ios;

    while (sim->running) {
        if (sim_count(sim, ~0) >= end) {
            return false;
        }
        if (sim->waiting->len) {
            run_one(sim);
        } else {
            ThinvmSim *before = current;

            current = sim;
            aio_poll(qemu_get_current_aio_context(), true);
            current = before;
        }
    }
    return true;
}

void sim_run(ThinvmSim *sim)
{
    sim_run_some(sim, INT64_MAX);
}

void sim_start(ThinvmSim *sim, CoroutineEntry *entry, void *opaque)
{
    sim->running++;
    enter(sim, qemu_coroutine_create(entry, opaque));
}

void sim_finish(ThinvmSim *sim)
{
    g_assert(sim->running);
    sim->running--;
}

/* ------------------------------------------------------------------ */
/* The device as the store sees it                                     */

static Access *access_of(ThinvmDevice *dev)
{
    return container_of(dev, Access, device);
}

static int coroutine_fn device_io(ThinvmDevice *dev, SimKind kind,
                                  uint64_t offset, uint64_t bytes, void *buf)
{
    Access *a = access_of(dev);

    return wait_turn(a->sim, a, kind, offset, bytes, buf);
}

static int coroutine_fn sim_co_pread(ThinvmDevice *dev, uint64_t offset,
                                     uint64_t bytes, void *buf)
{
    return device_io(dev, SIM_READ, offset, bytes, buf);
}

static int coroutine_fn sim_co_pwrite(ThinvmDevice *dev, uint64_t offset,
                                      uint64_t bytes, const void *buf)
{
    return device_io(dev, SIM_WRITE, offset, bytes, (void *)buf);
}

static int coroutine_fn sim_co_flush(ThinvmDevice *dev)
{
    return device_io(dev, SIM_FLUSH, 0, 0, NULL);
}

static int coroutine_fn sim_co_pdiscard(ThinvmDevice *dev, uint64_t offset,
                                        uint64_t bytes)
{
    uint64_t unit = MAX(1, access_of(dev)->sim->discard_unit);

    g_assert(offset % unit == 0 && bytes % unit == 0);
    return device_io(dev, SIM_DISCARD, offset, bytes, NULL);
}

static uint64_t coroutine_fn sim_co_discard_unit(ThinvmDevice *dev)
{
    return access_of(dev)->sim->discard_unit;
}

static int64_t coroutine_fn sim_co_length(ThinvmDevice *dev)
{
    return access_of(dev)->sim->visible.length;
}

static int coroutine_fn sim_co_grow(ThinvmDevice *dev, uint64_t bytes)
{
    return device_io(dev, SIM_GROW, 0, ROUND_UP(bytes, SIM_BLOCK), NULL);
}

ThinvmDevice *sim_attach(ThinvmSim *sim)
{
    Access *a = g_new0(Access, 1);

    a->sim = sim;
    a->device = (ThinvmDevice) {
        .co_pread = sim_co_pread,
        .co_pwrite = sim_co_pwrite,
        .co_flush = sim_co_flush,
        .co_pdiscard = sim_co_pdiscard,
        .co_length = sim_co_length,
        .co_grow = sim_co_grow,
        .co_discard_unit = sim_co_discard_unit,
    };
    g_ptr_array_add(sim->accesses, a);
    return &a->device;
}

ThinvmDevice *sim_device(ThinvmSim *sim)
{
    return &((Access *)g_ptr_array_index(sim->accesses, 0))->device;
}

/* ------------------------------------------------------------------ */
/* Life                                                                */

static void cache_drop(ThinvmSim *sim)
{
    Cached *c;

    while ((c = QSIMPLEQ_FIRST(&sim->cache))) {
        QSIMPLEQ_REMOVE_HEAD(&sim->cache, next);
        g_free(c);
    }
}

void sim_set_discard_unit(ThinvmSim *sim, uint64_t bytes)
{
    sim->discard_unit = bytes;
}

static ThinvmSim *sim_alloc(uint64_t seed, uint64_t max_length)
{
    ThinvmSim *sim = g_new0(ThinvmSim, 1);

    sim->accesses = g_ptr_array_new_with_free_func(g_free);
    sim_attach(sim);
    sim->random.state = seed;
    sim->max_length = max_length;
    sim->waiting = g_ptr_array_new();
    QSIMPLEQ_INIT(&sim->cache);
    QSIMPLEQ_INIT(&sim->late);
    return sim;
}

ThinvmSim *sim_new(uint64_t seed, uint64_t length, uint64_t max_length)
{
    ThinvmSim *sim = sim_alloc(seed, max_length);

    g_assert(length % SIM_BLOCK == 0 && max_length % SIM_BLOCK == 0);
    sim->seed = sim_random(&sim->random);
    view_init(&sim->durable, length, max_length);
    view_init(&sim->visible, length, max_length);
    return sim;
}

void sim_free(ThinvmSim *sim)
{
    if (!sim) {
        return;
    }
    g_assert(!sim->running && !sim->waiting->len);
    land_late_discards(sim, true);
    cache_drop(sim);
    view_destroy(&sim->durable, sim->max_length);
    view_destroy(&sim->visible, sim->max_length);
    g_ptr_array_free(sim->waiting, true);
    g_ptr_array_free(sim->accesses, true);
    g_free(sim);
}

/* ------------------------------------------------------------------ */
/* Cuts                                                                */

/* SIM_FAULT_TEAR: a part of the sector arrives that no device has to write */
static void tear_sector(ThinvmSim *cut, uint64_t offset, const uint8_t *data)
{
    unsigned bytes = 8 * sim_random_below(&cut->random, SIM_SECTOR / 8);

    view_write(cut, &cut->durable, offset, bytes, data);
}

/* Let a write arrive whole, not at all, or in some of its sectors */
static void arrive(ThinvmSim *cut, unsigned percent, uint64_t offset,
                   uint64_t bytes, const uint8_t *data)
{
    bool torn = percent > 0 && percent < 100 &&
                sim_random_chance(&cut->random, 40);
    bool whole = sim_random_chance(&cut->random, percent);

    for (uint64_t i = 0; i < bytes; i += SIM_SECTOR) {
        if (torn ? sim_random_chance(&cut->random, 50) : whole) {
            view_write(cut, &cut->durable, offset + i, SIM_SECTOR, data + i);
        } else if (cut->fault == SIM_FAULT_TEAR) {
            tear_sector(cut, offset + i, data + i);
        }
    }
}

static void arrive_discard(ThinvmSim *cut, unsigned percent, uint64_t offset,
                           uint64_t bytes)
{
    uint8_t buf[SIM_SECTOR];

    for (uint64_t i = 0; i < bytes; i += SIM_SECTOR) {
        if (sim_random_chance(&cut->random, percent) &&
            discarded_sector(&cut->random, buf)) {
            view_write(cut, &cut->durable, offset + i, SIM_SECTOR, buf);
        }
    }
}

/* Of 100 writes, how many arrive: those in the cache, those in flight */
static void cut_chances(ThinvmSim *cut, SimCut kind, unsigned *cached,
                        unsigned *in_flight)
{
    static const unsigned chances[] = { 0, 20, 50, 80, 99, 50 };
    unsigned percent = chances[sim_random_below(&cut->random,
                                                ARRAY_SIZE(chances))];

    *cached = kind == SIM_CUT_POWER ? percent :
              kind == SIM_CUT_NOTHING ? 0 : 100;
    *in_flight = kind == SIM_CUT_NOTHING ? 0 :
                 kind == SIM_CUT_ALL ? 100 : percent;
}

/* Bring into cut->durable what arrives of what @sim's hosts have written */
static void settle(ThinvmSim *cut, ThinvmSim *sim, SimCut kind)
{
    unsigned cached, in_flight;
    Cached *c;

    cut_chances(cut, kind, &cached, &in_flight);
    QSIMPLEQ_FOREACH(c, &sim->cache, next) {
        arrive(cut, cached, c->offset, c->bytes, c->data);
    }
    for (guint i = 0; i < sim->waiting->len; i++) {
        Waiting *w = g_ptr_array_index(sim->waiting, i);

        if (w->kind && w->access->fenced) {
            continue;
        }
        if (w->kind == SIM_WRITE) {
            arrive(cut, in_flight, w->offset, w->bytes, w->buf);
        } else if (w->kind == SIM_DISCARD) {
            arrive_discard(cut, in_flight, w->offset, w->bytes);
        }
    }
    if (cached == 100 || (cached && sim_random_chance(&cut->random, 50))) {
        cut->durable.length = sim->visible.length;
    }
}

ThinvmSim *sim_cut(ThinvmSim *sim, uint64_t seed, SimCut kind)
{
    ThinvmSim *cut = sim_alloc(seed, sim->max_length);

    cut->seed = sim->seed;
    cut->fault = sim->fault;
    cut->discard_unit = sim->discard_unit;
    view_copy(&cut->durable, &sim->durable, sim->max_length);
    settle(cut, sim, kind);
    view_copy(&cut->visible, &cut->durable, cut->max_length);
    return cut;
}

void sim_power_cycle(ThinvmSim *sim)
{
    for (guint i = 0; i < sim->waiting->len; i++) {
        Waiting *w = g_ptr_array_index(sim->waiting, i);

        g_assert(!(w->kind & (SIM_WRITE | SIM_DISCARD)) || w->access->fenced ||
                 sim->fault == SIM_FAULT_FENCE);
    }
    settle(sim, sim, SIM_CUT_POWER);
    cache_drop(sim);
    view_destroy(&sim->visible, sim->max_length);
    view_copy(&sim->visible, &sim->durable, sim->max_length);
}

/* Part of a write that was aborted may have been done */
static void abort_write(ThinvmSim *sim, const Waiting *w)
{
    uint64_t sectors = w->bytes / SIM_SECTOR;
    uint64_t first = sim_random_below(&sim->random, sectors);
    uint64_t nb = sim_random_below(&sim->random, sectors - first + 1);

    if (nb) {
        do_write(sim, w->offset + first * SIM_SECTOR, nb * SIM_SECTOR,
                 (uint8_t *)w->buf + first * SIM_SECTOR);
    }
}

void sim_fence(ThinvmSim *sim, ThinvmDevice *dev)
{
    Access *a = access_of(dev);

    if (sim->fault == SIM_FAULT_FENCE) {
        return;
    }
    a->fenced = true;
    for (guint i = 0; i < sim->waiting->len; i++) {
        Waiting *w = g_ptr_array_index(sim->waiting, i);

        if (w->access == a && w->kind == SIM_WRITE) {
            abort_write(sim, w);
        }
    }
}

void sim_set_fault(ThinvmSim *sim, SimFault fault)
{
    sim->fault = fault;
}

void sim_fail(ThinvmSim *sim, unsigned kinds, uint64_t start, uint64_t end,
              unsigned nth, int error, bool once)
{
    sim->fail_kinds = kinds;
    sim->fail_start = start;
    sim->fail_end = end;
    sim->fail_nth = nth;
    sim->fail_error = error;
    sim->fail_once = once;
    sim->failed = false;
}

bool sim_has_failed(ThinvmSim *sim)
{
    return sim->failed;
}

void sim_set_lossy(ThinvmSim *sim, uint64_t start, uint64_t end)
{
    sim->lossy_start = start;
    sim->lossy_end = end;
}

void sim_set_hook(ThinvmSim *sim, void (*hook)(void *opaque), void *opaque)
{
    sim->hook = hook;
    sim->hook_opaque = opaque;
}

uint64_t sim_count(ThinvmSim *sim, unsigned kinds)
{
    uint64_t sum = 0;

    for (unsigned i = 0; i < 32; i++) {
        sum += kinds & 1u << i ? sim->count[i] : 0;
    }
    return sum;
}

uint64_t sim_discarded(ThinvmSim *sim)
{
    return sim->discarded;
}
