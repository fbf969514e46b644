/*
 * Power cuts at every point of an image's life, on a simulated device
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Concurrent coroutines write, unmap, resize, take and delete snapshots, read,
 * flush, checkpoint and reclaim, in an order that a seed decides.  At random
 * I/Os the device is copied as a power cut (or the death of the process) might
 * leave it.  The copy must open, must pass the check, and must read as a model
 * allows:
 *
 *   - A sector reads as the last value that was written before a completed
 *     flush, or as any value that was written since; never as anything else,
 *     least of all what was on the device before the image.
 *   - After the death of the process alone, a write whose record was committed
 *     counts as if it had been flushed.
 *   - A snapshot that exists has exactly what the disk had when it was taken.
 *
 * Some of the copies then live on, with the same load, to a second cut.
 *
 *   test-thinvm-crash [--cuts N] [--seed N]
 *
 * THINVM_CUTS and THINVM_SEED in the environment say the same.  A failure
 * prints the seed of the life in which it happened; --cuts 1 with that seed
 * replays just that life.
 */
#include "qemu/osdep.h"
#include "qemu/cutils.h"
#include "qemu/main-loop.h"
#include "qemu/module.h"
#include "thinvm-sim-image.h"
#include "block/thinvm/store-int.h"

#define DEVICE_SIZE     (8 * MiB)
#define DEVICE_MAX      (24 * MiB)
#define NB_SLOTS        96
#define NB_SECTORS      (NB_SLOTS * IMAGE_SECTORS)
#define MAX_SNAPSHOTS   4
#define NB_WRITERS      5
#define NB_READERS      2

/* Guest clusters of the slots: a few leaves, with neighbours in each */
static uint64_t slot_guest(unsigned slot)
{
    return slot / 24 * 1531 + slot % 24;
}

#define VIRTUAL_SIZE    ((3 * 1531 + 64ULL) * IMAGE_CLUSTER)

/* One value that a sector was given */
typedef struct Value {
    uint64_t tag;
    uint64_t completed;         /* when; 0: in flight */
} Value;

/* All values that may be found, oldest first; a few at most */
typedef struct History {
    Value *values;
    unsigned nb, allocated;
    uint64_t dropped;           /* values before these, ever */
    uint64_t committed;         /* survives the process from this one on */
} History;

typedef struct SnapshotModel {
    uint64_t id;                /* 0: none */
    bool deleting;
    uint64_t tags[NB_SECTORS];
} SnapshotModel;

typedef struct Model {
    History sectors[NB_SECTORS];
    SnapshotModel *snapshots[MAX_SNAPSHOTS];
    uint64_t clock;             /* counts events */
    uint64_t next_tag;
} Model;

/* One image between opening and a cut */
typedef struct Life {
    ThinvmSim *sim;
    ThinvmStore *st;
    Model *model;
    SimRandom random;
    unsigned generation;        /* cuts before this life */
    unsigned steps;             /* of each worker */
    unsigned cut_percent;       /* of the I/Os */
    /* who is at work on a slot, and on all of them */
    uint16_t parts[NB_SLOTS];
    bool exclusive[NB_SLOTS];
    unsigned writers[NB_SLOTS], nb_writing;
    bool frozen;                /* a snapshot is being taken */
    bool no_cuts;
} Life;

static uint64_t current_seed;
static uint64_t cuts_left, cuts_done, second_cuts, snapshots_seen;

/* ------------------------------------------------------------------ */
/* Model                                                               */

static Model *model_new(void)
{
    Model *m = g_new0(Model, 1);

    m->next_tag = 1;
    m->clock = 1;
    for (unsigned i = 0; i < NB_SECTORS; i++) {
        History *h = &m->sectors[i];

        h->allocated = 4;
        h->values = g_new0(Value, h->allocated);
        h->values[0] = (Value) { TAG_ZERO, 1 };
        h->nb = 1;
    }
    return m;
}

static void model_free(Model *m)
{
    for (unsigned i = 0; i < NB_SECTORS; i++) {
        g_free(m->sectors[i].values);
    }
    for (unsigned i = 0; i < MAX_SNAPSHOTS; i++) {
        g_free(m->snapshots[i]);
    }
    g_free(m);
}

static void history_add(History *h, uint64_t tag)
{
    if (h->nb == h->allocated) {
        h->allocated *= 2;
        h->values = g_renew(Value, h->values, h->allocated);
    }
    h->values[h->nb++] = (Value) { tag, 0 };
}

/* What must be there and what came later stays; the rest is forgotten */
static void history_drop(History *h, unsigned nb)
{
    memmove(h->values, h->values + nb, (h->nb - nb) * sizeof(Value));
    h->nb -= nb;
    h->dropped += nb;
}

/* From the first value that may be found, is @tag among them? */
static bool history_allows(const History *h, uint64_t from, uint64_t tag)
{
    for (uint64_t i = MAX(from, h->dropped); i < h->dropped + h->nb; i++) {
        if (h->values[i - h->dropped].tag == tag) {
            return true;
        }
    }
    return false;
}

static uint64_t history_last_completed(const History *h)
{
    unsigned i = h->nb - 1;

    while (i > 0 && !h->values[i].completed) {
        i--;
    }
    return h->dropped + i;
}

/* A flush that began at @clock has succeeded */
static void model_flushed(Model *m, uint64_t clock)
{
    for (unsigned s = 0; s < NB_SECTORS; s++) {
        History *h = &m->sectors[s];

        for (unsigned i = h->nb; i-- > 1;) {
            if (h->values[i].completed && h->values[i].completed <= clock) {
                history_drop(h, i);
                break;
            }
        }
    }
}

/* ------------------------------------------------------------------ */
/* Workers                                                             */

static uint64_t below(Life *l, uint64_t n)
{
    return sim_random_below(&l->random, n);
}

static void coroutine_fn lock_exclusive(Life *l, unsigned first, unsigned nb)
{
    for (unsigned i = first; i < first + nb; i++) {
        /* who holds some already is waited for by the snapshot */
        while (l->exclusive[i] || l->writers[i] || (l->frozen && i == first)) {
            sim_yield(l->sim);
        }
        l->exclusive[i] = true;
        l->nb_writing++;
    }
}

static void unlock_exclusive(Life *l, unsigned first, unsigned nb)
{
    memset(&l->exclusive[first], false, nb * sizeof(bool));
    l->nb_writing -= nb;
}

/*
 * As the driver does it: writers to different parts of a mapped cluster of
 * one's own go on together, whoever allocates is alone.  true: exclusive.
 */
static bool coroutine_fn lock_parts(Life *l, unsigned slot, uint16_t mask)
{
    ThinvmMapping m;
    unsigned token;

    for (;;) {
        while (l->exclusive[slot] || (l->parts[slot] & mask) || l->frozen) {
            sim_yield(l->sim);
        }
        l->parts[slot] |= mask;
        l->writers[slot]++;
        l->nb_writing++;
        token = thinvm_store_request_begin(l->st);
        g_assert_cmpint(thinvm_store_lookup(l->st, 0, NULL, slot_guest(slot),
                                            1, true, &m), ==, 0);
        thinvm_store_request_end(l->st, token);
        if (m.type == THINVM_MAPPING_DATA && !m.shared) {
            return false;
        }
        l->parts[slot] &= ~mask;
        l->writers[slot]--;
        l->nb_writing--;
        if (!l->exclusive[slot] && !l->writers[slot] && !l->frozen) {
            l->exclusive[slot] = true;
            l->nb_writing++;
            return true;
        }
        sim_yield(l->sim);
    }
}

static void unlock_parts(Life *l, unsigned slot, uint16_t mask, bool exclusive)
{
    if (exclusive) {
        unlock_exclusive(l, slot, 1);
    } else {
        l->parts[slot] &= ~mask;
        l->writers[slot]--;
        l->nb_writing--;
    }
}

static void begin_values(Life *l, unsigned first, unsigned nb, uint64_t tag)
{
    for (unsigned i = first; i < first + nb; i++) {
        history_add(&l->model->sectors[i], tag);
    }
}

/* Sectors that nobody else writes: the last value is the one */
static void end_values(Life *l, unsigned first, unsigned nb)
{
    l->model->clock++;
    for (unsigned i = first; i < first + nb; i++) {
        History *h = &l->model->sectors[i];

        h->values[h->nb - 1].completed = l->model->clock;
    }
}

static void coroutine_fn do_write(Life *l)
{
    const unsigned per_part = IMAGE_PART / SIM_SECTOR;
    unsigned slot = below(l, NB_SLOTS);
    unsigned part = below(l, THINVM_PARTS);
    unsigned nb = below(l, 3) ? 1 + below(l, THINVM_PARTS - part) :
                  THINVM_PARTS - part;
    unsigned first = slot * IMAGE_SECTORS + part * per_part;
    uint16_t mask = MAKE_64BIT_MASK(part, nb);
    uint64_t tag = l->model->next_tag++;
    uint64_t ticket, value;
    bool exclusive = lock_parts(l, slot, mask);

    begin_values(l, first, nb * per_part, tag);
    g_assert_cmpint(image_write(l->sim, l->st, slot_guest(slot), part, nb, tag,
                                &ticket), ==, 0);
    end_values(l, first, nb * per_part);
    value = l->model->sectors[first].dropped + l->model->sectors[first].nb - 1;
    unlock_parts(l, slot, mask, exclusive);
    /* write-through now and then */
    if (ticket && below(l, 4) == 0) {
        g_assert_cmpint(thinvm_store_commit_ticket(l->st, ticket), ==, 0);
        l->model->sectors[first].committed =
            MAX(l->model->sectors[first].committed, value);
    }
}

/* A write that is given up: its clusters were reserved for nothing */
static void coroutine_fn do_give_up(Life *l)
{
    unsigned token = thinvm_store_request_begin(l->st);
    uint64_t first, nb;

    if (thinvm_store_reserve(l->st, 0, 1 + below(l, 20), &first, &nb) == 0) {
        sim_yield(l->sim);
        thinvm_store_unreserve(l->st, first, nb);
    }
    thinvm_store_request_end(l->st, token);
}

static void coroutine_fn do_write_clusters(Life *l)
{
    unsigned slot = below(l, NB_SLOTS);
    unsigned nb = 1 + below(l, MIN(8, 24 - slot % 24));
    uint64_t tag = l->model->next_tag++;

    lock_exclusive(l, slot, nb);
    begin_values(l, slot * IMAGE_SECTORS, nb * IMAGE_SECTORS, tag);
    g_assert_cmpint(image_write_clusters(l->sim, l->st, slot_guest(slot), nb,
                                         tag, NULL), ==, 0);
    end_values(l, slot * IMAGE_SECTORS, nb * IMAGE_SECTORS);
    unlock_exclusive(l, slot, nb);
}

static void coroutine_fn do_unmap(Life *l)
{
    unsigned slot = below(l, NB_SLOTS);
    unsigned nb = 1 + below(l, MIN(5, 24 - slot % 24));
    unsigned token;

    lock_exclusive(l, slot, nb);
    begin_values(l, slot * IMAGE_SECTORS, nb * IMAGE_SECTORS, TAG_ZERO);
    token = thinvm_store_request_begin(l->st);
    g_assert_cmpint(thinvm_store_unmap(l->st, 0, slot_guest(slot), nb,
                                       below(l, 2), NULL, &error_abort),
                    ==, 0);
    thinvm_store_request_end(l->st, token);
    end_values(l, slot * IMAGE_SECTORS, nb * IMAGE_SECTORS);
    unlock_exclusive(l, slot, nb);
}

static void coroutine_fn set_size(Life *l, uint64_t size)
{
    ThinvmOp op = { .type = THINVM_OP_RESIZE, .value = size };

    g_assert_cmpint(thinvm_store_execute(l->st, &op, NULL, &error_abort),
                    ==, 0);
}

/* Shrink so that the last slots go, and grow again */
static void coroutine_fn do_resize(Life *l)
{
    unsigned slot = NB_SLOTS - 1 - below(l, 30);
    unsigned nb = NB_SLOTS - slot;
    uint64_t guest = slot_guest(slot);

    lock_exclusive(l, slot, nb);
    begin_values(l, slot * IMAGE_SECTORS, nb * IMAGE_SECTORS, TAG_ZERO);
    g_assert_cmpint(thinvm_store_unmap(l->st, 0, guest,
                                       VIRTUAL_SIZE / IMAGE_CLUSTER - guest,
                                       THINVM_SOURCE_ZERO, NULL, &error_abort),
                    ==, 0);
    set_size(l, guest * IMAGE_CLUSTER);
    end_values(l, slot * IMAGE_SECTORS, nb * IMAGE_SECTORS);
    sim_yield(l->sim);
    set_size(l, VIRTUAL_SIZE);
    unlock_exclusive(l, slot, nb);
}

static void coroutine_fn do_flush(Life *l)
{
    uint64_t clock = l->model->clock;

    g_assert_cmpint(thinvm_store_commit(l->st, THINVM_COMMIT_DURABLE, false),
                    ==, 0);
    model_flushed(l->model, clock);
}

static void coroutine_fn do_maintenance(Life *l)
{
    switch (below(l, 4)) {
    case 0:
        g_assert_cmpint(thinvm_store_checkpoint(l->st), ==, 0);
        break;
    case 1:
        g_assert_cmpint(thinvm_store_commit(l->st, THINVM_COMMIT_RECORD, true),
                        ==, 0);
        break;
    default:
        thinvm_store_reclaim(l->st, below(l, 2));
        break;
    }
}

static void coroutine_fn writer(Life *l)
{
    switch (below(l, 20)) {
    case 0 ... 1:
        do_unmap(l);
        break;
    case 2 ... 3:
        do_write_clusters(l);
        break;
    case 4 ... 6:
        do_flush(l);
        break;
    case 7 ... 8:
        do_maintenance(l);
        break;
    case 9:
        do_give_up(l);
        break;
    case 10:
        if (below(l, 4) == 0) {
            do_resize(l);
        }
        break;
    default:
        do_write(l);
        break;
    }
}

/* A read sees what was there at its begin, or came while it lasted */
static void coroutine_fn reader(Life *l)
{
    unsigned slot = below(l, NB_SLOTS);
    g_autofree uint8_t *buf = g_malloc(IMAGE_CLUSTER);
    uint64_t from[IMAGE_SECTORS];
    uint64_t dropped[IMAGE_SECTORS];

    for (unsigned i = 0; i < IMAGE_SECTORS; i++) {
        History *h = &l->model->sectors[slot * IMAGE_SECTORS + i];

        from[i] = history_last_completed(h);
        dropped[i] = h->values[from[i] - h->dropped].tag;
    }
    g_assert_cmpint(image_read(l->sim, l->st, slot_guest(slot), buf), ==, 0);
    for (unsigned i = 0; i < IMAGE_SECTORS; i++) {
        History *h = &l->model->sectors[slot * IMAGE_SECTORS + i];
        uint64_t tag = image_tag(buf + i * SIM_SECTOR,
                                 slot_guest(slot) * IMAGE_SECTORS + i);

        /* a flush may have dropped values from the model meanwhile */
        g_assert_true(history_allows(h, from[i], tag) || tag == dropped[i] ||
                      h->dropped > from[i]);
        g_assert_cmpuint(tag, !=, TAG_FOREIGN);
    }
}

/* ------------------------------------------------------------------ */
/* Snapshots                                                           */

static int coroutine_fn read_snapshot(ThinvmStore *st, uint32_t slot,
                                      ThinvmSnapshot *snap)
{
    ThinvmState *s = thinvm_store_state(st);
    ThinvmNeeds needs;
    int ret;

    thinvm_needs_init(&needs);
    for (;;) {
        thinvm_state_lock(s);
        ret = thinvm_snapshot_read(s, slot, snap, &needs, &error_abort);
        thinvm_state_unlock(s);
        if (ret != -EAGAIN) {
            break;
        }
        thinvm_store_read_wanted(st, s, &needs, &error_abort);
    }
    thinvm_state_lock(s);
    thinvm_needs_destroy(s, &needs);
    thinvm_state_unlock(s);
    return ret;
}

/* -ENOENT if there is none with this id */
static int coroutine_fn find_snapshot(ThinvmStore *st, uint64_t id,
                                      ThinvmSnapshot *snap)
{
    uint32_t nb;

    thinvm_state_lock(thinvm_store_state(st));
    nb = thinvm_snapshot_nb_slots(thinvm_store_state(st));
    thinvm_state_unlock(thinvm_store_state(st));
    for (uint32_t slot = 0; slot < nb; slot++) {
        if (read_snapshot(st, slot, snap) == 0 && snap->id == id) {
            return slot;
        }
    }
    return -ENOENT;
}

static void coroutine_fn do_snapshot_create(Life *l, SnapshotModel **place)
{
    SnapshotModel *m = g_new0(SnapshotModel, 1);
    ThinvmSnapshot snap = { .icount = UINT64_MAX, .date_sec = 1 };
    ThinvmOp op = { .type = THINVM_OP_SNAPSHOT_CREATE, .snapshot = &snap };

    while (l->frozen) {
        sim_yield(l->sim);
    }
    l->frozen = true;
    while (l->nb_writing) {
        sim_yield(l->sim);
    }
    thinvm_state_lock(thinvm_store_state(l->st));
    snap.id = thinvm_snapshot_next_id(thinvm_store_state(l->st));
    thinvm_state_unlock(thinvm_store_state(l->st));
    snap.virtual_size = VIRTUAL_SIZE;
    snprintf(snap.name, sizeof(snap.name), "snapshot %" PRIu64, snap.id);
    m->id = snap.id;
    for (unsigned i = 0; i < NB_SECTORS; i++) {
        History *h = &l->model->sectors[i];

        m->tags[i] = h->values[h->nb - 1].tag;
    }
    *place = m;
    g_assert_cmpint(thinvm_store_execute(l->st, &op, NULL, &error_abort),
                    ==, 0);
    l->frozen = false;
}

static bool has_tree(const ThinvmSnapshot *snap)
{
    return snap->root.type != THINVM_PTR_NONE ||
           snap->vmstate_root.type != THINVM_PTR_NONE;
}

static void coroutine_fn do_snapshot_delete(Life *l, SnapshotModel **place)
{
    SnapshotModel *m = *place;
    ThinvmSnapshot snap;
    int slot, waits = 0;

    m->deleting = true;
    while ((slot = find_snapshot(l->st, m->id, &snap)) >= 0 && waits < 2) {
        ThinvmOp op = {
            .type = THINVM_OP_SNAPSHOT_DELETE_STEP,
            .guest = slot,
            .value = m->id,
        };

        waits += (snap.flags & THINVM_SNAPSHOT_DELETED) && !has_tree(&snap);
        g_assert_cmpint(thinvm_store_execute(l->st, &op, NULL, &error_abort),
                        ==, 0);
        sim_yield(l->sim);
    }
    /* A cut may still bring it back, in any state of being deleted */
    do_flush(l);
    g_free(m);
    *place = NULL;
}

static void coroutine_fn snapshotter(Life *l)
{
    SnapshotModel **place = &l->model->snapshots[below(l, MAX_SNAPSHOTS)];

    for (int i = below(l, 40); i; i--) {
        sim_yield(l->sim);
    }
    if (*place) {
        do_snapshot_delete(l, place);
    } else {
        do_snapshot_create(l, place);
    }
}

/* ------------------------------------------------------------------ */
/* Lives                                                               */

typedef struct Worker {
    Life *life;
    void coroutine_fn (*step)(Life *l);
    unsigned steps;
} Worker;

static void coroutine_fn worker_entry(void *opaque)
{
    Worker *w = opaque;

    for (unsigned i = 0; i < w->steps; i++) {
        w->step(w->life);
        sim_yield(w->life->sim);
    }
    sim_finish(w->life->sim);
}

static void take_cut(void *opaque);

/* Run all workers to their end; cuts are taken meanwhile */
static void run_workers(Life *l)
{
    Worker workers[NB_WRITERS + NB_READERS + 1];
    unsigned n = 0;

    for (; n < NB_WRITERS; n++) {
        workers[n] = (Worker) { l, writer, l->steps };
    }
    for (; n < NB_WRITERS + NB_READERS; n++) {
        workers[n] = (Worker) { l, reader, l->steps };
    }
    workers[n++] = (Worker) { l, snapshotter, l->steps / 8 };
    sim_set_hook(l->sim, take_cut, l);
    for (unsigned i = 0; i < n; i++) {
        sim_start(l->sim, worker_entry, &workers[i]);
    }
    sim_run(l->sim);
    sim_set_hook(l->sim, NULL, NULL);
}

typedef struct Verify {
    ThinvmSim *sim;
    ThinvmStore *st;
    const Model *model;         /* what is allowed */
    bool process_only;
    Model *found;               /* what was found: a new model */
} Verify;

static void coroutine_fn verify_disk(Verify *v)
{
    g_autofree uint8_t *buf = g_malloc(IMAGE_CLUSTER);
    ThinvmInfoState info;

    thinvm_state_lock(thinvm_store_state(v->st));
    thinvm_state_info(thinvm_store_state(v->st), &info);
    thinvm_state_unlock(thinvm_store_state(v->st));
    for (unsigned slot = 0; slot < NB_SLOTS; slot++) {
        uint64_t guest = slot_guest(slot);

        if ((guest + 1) * IMAGE_CLUSTER > info.virtual_size) {
            memset(buf, 0, IMAGE_CLUSTER);
        } else {
            g_assert_cmpint(image_read(v->sim, v->st, guest, buf), ==, 0);
        }
        for (unsigned i = 0; i < IMAGE_SECTORS; i++) {
            unsigned sector = slot * IMAGE_SECTORS + i;
            const History *h = &v->model->sectors[sector];
            uint64_t tag = image_tag(buf + i * SIM_SECTOR,
                                     guest * IMAGE_SECTORS + i);

            g_assert_cmpuint(tag, !=, TAG_FOREIGN);
            if (!history_allows(h, v->process_only ? h->committed : 0, tag)) {
                g_error("slot %u sector %u has %" PRIu64 ", of %u values from "
                        "%" PRIu64 " to %" PRIu64, slot, i, tag, h->nb,
                        h->values[0].tag, h->values[h->nb - 1].tag);
            }
            v->found->sectors[sector].values[0].tag = tag;
        }
    }
}

static void coroutine_fn verify_snapshot(Verify *v, const SnapshotModel *m,
                                         SnapshotModel **found)
{
    g_autofree uint8_t *buf = g_malloc(IMAGE_CLUSTER);
    ThinvmSnapshot snap;

    if (find_snapshot(v->st, m->id, &snap) < 0) {
        return;
    }
    *found = g_memdup2(m, sizeof(*m));
    if (snap.flags) {
        g_assert_true(m->deleting);
        return;
    }
    snapshots_seen++;
    for (unsigned slot = 0; slot < NB_SLOTS; slot++) {
        uint64_t guest = slot_guest(slot);

        g_assert_cmpint(image_read_root(v->sim, v->st, &snap.root, guest, buf),
                        ==, 0);
        for (unsigned i = 0; i < IMAGE_SECTORS; i++) {
            g_assert_cmpuint(image_tag(buf + i * SIM_SECTOR,
                                       guest * IMAGE_SECTORS + i), ==,
                             m->tags[slot * IMAGE_SECTORS + i]);
        }
    }
}

static void coroutine_fn verify_entry(void *opaque)
{
    Verify *v = opaque;

    v->st = image_open(v->sim);
    thinvm_store_set_discard(v->st, true);
    image_check(v->st);
    v->found = model_new();
    v->found->next_tag = v->model->next_tag;
    verify_disk(v);
    for (unsigned i = 0; i < MAX_SNAPSHOTS; i++) {
        if (v->model->snapshots[i]) {
            verify_snapshot(v, v->model->snapshots[i],
                            &v->found->snapshots[i]);
        }
    }
    sim_finish(v->sim);
}

/* The disk may have been cut while it was small */
static void coroutine_fn grow_entry(void *opaque)
{
    Life *l = opaque;

    set_size(l, VIRTUAL_SIZE);
    sim_finish(l->sim);
}

static void live_on(Verify *v, Life *before)
{
    Life next = {
        .sim = v->sim,
        .st = v->st,
        .model = v->found,
        .random.state = sim_random(&before->random),
        .generation = before->generation + 1,
        .steps = 12,
        .cut_percent = 3,
    };

    second_cuts++;
    sim_start(next.sim, grow_entry, &next);
    sim_run(next.sim);
    run_workers(&next);
}

static void take_cut(void *opaque)
{
    Life *l = opaque;
    Verify v = { .model = l->model };

    if (l->no_cuts || !cuts_left ||
        !sim_random_chance(&l->random, l->cut_percent)) {
        return;
    }
    cuts_left--;
    cuts_done++;
    v.process_only = below(l, 4) == 0;
    v.sim = sim_cut(l->sim, sim_random(&l->random), v.process_only);
    sim_start(v.sim, verify_entry, &v);
    sim_run(v.sim);
    if (l->generation == 0 && below(l, 12) == 0) {
        live_on(&v, l);
    }
    thinvm_store_free(v.st);
    model_free(v.found);
    sim_free(v.sim);
}

typedef struct Birth {
    ThinvmSim *sim;
    ThinvmStore *st;
} Birth;

static void coroutine_fn birth_entry(void *opaque)
{
    Birth *b = opaque;

    image_create(b->sim, VIRTUAL_SIZE);
    b->st = image_open(b->sim);
    thinvm_store_set_discard(b->st, true);
    sim_finish(b->sim);
}

static void coroutine_fn death_entry(void *opaque)
{
    Birth *b = opaque;

    thinvm_store_end_writing(b->st, true, &error_abort);
    image_check(b->st);
    sim_finish(b->sim);
}

/* An image from its creation to a clean end, with cuts on the way */
static void live(uint64_t seed)
{
    Birth b = { .sim = sim_new(seed, DEVICE_SIZE, DEVICE_MAX) };
    Life l = {
        .sim = b.sim,
        .model = model_new(),
        .random.state = seed ^ 0x5eed,
        .steps = 120,
    };

    l.cut_percent = 2 + below(&l, 12);
    sim_start(b.sim, birth_entry, &b);
    sim_run(b.sim);
    l.st = b.st;
    run_workers(&l);
    sim_start(b.sim, death_entry, &b);
    sim_run(b.sim);
    thinvm_store_free(b.st);
    model_free(l.model);
    sim_free(b.sim);
}

static void test_cuts(gconstpointer data)
{
    const uint64_t *first_seed = data;

    for (uint64_t seed = *first_seed; cuts_left; seed++) {
        current_seed = seed;
        live(seed);
    }
    g_test_message("%" PRIu64 " cuts, %" PRIu64 " of them lived on, %" PRIu64
                   " snapshots compared, seeds %" PRIu64 " to %" PRIu64,
                   cuts_done, second_cuts, snapshots_seen, *first_seed,
                   current_seed);
    g_assert_cmpuint(second_cuts * 100, >=, cuts_done > 1000 ? cuts_done : 0);
}

static void tell_seed(int sig)
{
    static char text[100];
    int n = snprintf(text, sizeof(text),
                     "\nFailed in the life with --seed %" PRIu64
                     ", at its cut number %" PRIu64 " or so\n",
                     current_seed, cuts_done);

    if (write(STDERR_FILENO, text, n) < 0) {
        _exit(1);
    }
    signal(SIGABRT, SIG_DFL);
    raise(SIGABRT);
}

static uint64_t number(const char *text, uint64_t otherwise)
{
    return text ? g_ascii_strtoull(text, NULL, 0) : otherwise;
}

/* Take "--name N" out of the arguments: GLib has a --seed of its own */
static const char *take_option(int *argc, char **argv, const char *name)
{
    for (int i = 1; i + 1 < *argc; i++) {
        if (!strcmp(argv[i], name)) {
            const char *value = argv[i + 1];

            memmove(&argv[i], &argv[i + 2], (*argc - i - 1) * sizeof(char *));
            *argc -= 2;
            return value;
        }
    }
    return NULL;
}

int main(int argc, char **argv)
{
    static uint64_t seed;

    cuts_left = number(getenv("THINVM_CUTS"), 10000);
    seed = number(getenv("THINVM_SEED"), 1);
    cuts_left = number(take_option(&argc, argv, "--cuts"), cuts_left);
    seed = number(take_option(&argc, argv, "--seed"), seed);

    g_test_init(&argc, &argv, NULL);
    qemu_init_main_loop(&error_abort);
    module_call_init(MODULE_INIT_TRACE);
    signal(SIGABRT, tell_seed);
    g_test_add_data_func("/thinvm/crash/cuts", &seed, test_cuts);
    return g_test_run();
}
