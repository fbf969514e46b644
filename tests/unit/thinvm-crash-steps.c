/*
 * The life of an image on a simulated device: what happens to it
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See thinvm-crash.h.  The writers here keep the rules of the driver's data
 * path: a write into valid parts of a private cluster excludes nobody, not
 * even a discard; one that makes parts valid excludes writers of these parts;
 * whoever allocates or frees is alone.
 */
#include "qemu/osdep.h"
#include "qemu/cutils.h"
#include "thinvm-crash.h"
#include "block/thinvm/store-int.h"

typedef struct Worker Worker;
struct Worker {
    Life *life;
    void coroutine_fn (*step)(Worker *w);
    unsigned nr;
    unsigned number;            /* of the step that is being made */
    SimRandom random;           /* of that step */
};

static bool steps_chosen[LIFE_NB_STEPS], steps_made[LIFE_NB_STEPS];
static bool all_steps = true;
static bool verbose;

/* ------------------------------------------------------------------ */
/* Which steps                                                         */

bool life_set_steps(const char *list)
{
    all_steps = !list;
    memset(steps_chosen, 0, sizeof(steps_chosen));
    while (list && *list) {
        unsigned long first, last;

        if (qemu_strtoul(list, &list, 10, &first) < 0) {
            return false;
        }
        last = first;
        if (*list == '-' && qemu_strtoul(list + 1, &list, 10, &last) < 0) {
            return false;
        }
        if (last >= LIFE_NB_STEPS || first > last || (*list && *list != ',')) {
            return false;
        }
        list += *list == ',';
        memset(&steps_chosen[first], true, last - first + 1);
    }
    return true;
}

bool life_chosen(unsigned step)
{
    return all_steps || steps_chosen[step];
}

const bool *life_made(void)
{
    return steps_made;
}

void life_set_verbose(bool on)
{
    verbose = on;
}

void life_say(const char *fmt, ...)
{
    va_list ap;

    if (verbose) {
        va_start(ap, fmt);
        vfprintf(stderr, fmt, ap);
        va_end(ap);
        fputc('\n', stderr);
    }
}

static void G_GNUC_PRINTF(2, 3) say(Worker *w, const char *fmt, ...)
{
    va_list ap;

    if (verbose) {
        va_start(ap, fmt);
        fprintf(stderr, "step %u, worker %u: ", w->number, w->nr);
        vfprintf(stderr, fmt, ap);
        fputc('\n', stderr);
        va_end(ap);
    }
}

static uint64_t below(Worker *w, uint64_t n)
{
    return sim_random_below(&w->random, n);
}

static void coroutine_fn turn(Worker *w)
{
    sim_yield(w->life->sim);
}

/*
 * Nothing fails but for want of space, if there may be too little, and when
 * the owner was fenced off.
 */
static bool done(Worker *w, int ret)
{
    if (ret < 0 && !w->life->down && (ret != -ENOSPC || !w->life->tight)) {
        fprintf(stderr, "Step %u failed: %s\n", w->number, strerror(-ret));
        abort();
    }
    return ret == 0;
}

/* ------------------------------------------------------------------ */
/* Who waits for whom                                                  */

static void coroutine_fn enter(Worker *w)
{
    while (w->life->frozen) {
        turn(w);
    }
    w->life->nb_writing++;
}

static void leave(Worker *w)
{
    w->life->nb_writing--;
}

static void coroutine_fn freeze(Worker *w)
{
    while (w->life->frozen) {
        turn(w);
    }
    w->life->frozen = true;
    while (w->life->nb_writing) {
        turn(w);
    }
}

static void thaw(Worker *w)
{
    w->life->frozen = false;
}

static void coroutine_fn lock_exclusive(Worker *w, unsigned first, unsigned nb)
{
    Life *l = w->life;

    for (unsigned i = first; i < first + nb; i++) {
        while (l->exclusive[i] || l->writers[i]) {
            turn(w);
        }
        l->exclusive[i] = true;
    }
}

static void unlock_exclusive(Worker *w, unsigned first, unsigned nb)
{
    memset(&w->life->exclusive[first], false, nb * sizeof(bool));
}

/* true: the cluster has to be allocated, we are alone; false: parts only */
static bool coroutine_fn lock_parts(Worker *w, unsigned slot, uint16_t mask,
                                    int *ret)
{
    Life *l = w->life;
    ThinvmMapping m;
    unsigned token;

    for (;;) {
        while (l->exclusive[slot] || (l->parts[slot] & mask)) {
            turn(w);
        }
        l->parts[slot] |= mask;
        l->writers[slot]++;
        l->copiers++;
        token = thinvm_store_request_begin(l->st);
        *ret = thinvm_store_lookup(l->st, 0, NULL, slot_guest(slot), 1, true,
                                   &m);
        thinvm_store_request_end(l->st, token);
        if (*ret < 0 || (m.type == THINVM_MAPPING_DATA && !m.shared)) {
            l->copiers--;
            return false;
        }
        l->parts[slot] &= ~mask;
        l->writers[slot]--;
        if (!l->exclusive[slot] && !l->writers[slot]) {
            l->exclusive[slot] = true;
            return true;
        }
        l->copiers--;
        turn(w);
    }
}

static void unlock_parts(Worker *w, unsigned slot, uint16_t mask)
{
    w->life->parts[slot] &= ~mask;
    w->life->writers[slot]--;
}

/* ------------------------------------------------------------------ */
/* Steps of writers                                                    */

static void coroutine_fn flush(Worker *w)
{
    Life *l = w->life;
    uint64_t clock = l->model->clock;

    if (done(w, thinvm_store_commit(l->st, below(w, 8) ? THINVM_COMMIT_FLUSHED :
                                    THINVM_COMMIT_DURABLE, false))) {
        model_flushed(l->model, clock);
        say(w, "flushed");
    }
}

/* A request has ended: tell the model, and commit as the mode says */
static void coroutine_fn finish(Worker *w, unsigned first, unsigned nb,
                                uint64_t begun, uint64_t ticket, int ret)
{
    Life *l = w->life;

    if (!done(w, ret)) {
        if (!l->down) {
            model_fail(l->model, first, nb, begun);
        }
        return;
    }
    model_end(l->model, first, nb, begun);
    say(w, "done");
    if (l->writethrough) {
        /* also what it only found may be in no record yet */
        ticket = ticket ?: thinvm_store_ticket(l->st);
        if (done(w, thinvm_store_commit_ticket(l->st, ticket))) {
            model_committed(l->model, first, nb, begun);
        }
    }
}

static int coroutine_fn write_slot(Worker *w, unsigned slot, unsigned part,
                                   unsigned nb, uint64_t tag, uint64_t *ticket)
{
    Life *l = w->life;
    uint16_t mask = MAKE_64BIT_MASK(part, nb);
    bool alone;
    int ret;

    image_dawdle = below(w, 6) ? 0 : below(w, 200);
    ret = image_overwrite(l->sim, l->st, slot_guest(slot), part, nb, tag,
                          &l->copiers);
    if (ret != -EAGAIN) {
        return ret;
    }
    alone = lock_parts(w, slot, mask, &ret);
    if (ret == 0 && alone && l->template && below(w, 2)) {
        /* as where there is no space for a copy */
        ret = image_unmark(l->st, slot_guest(slot));
    }
    if (ret == 0) {
        image_dawdle = below(w, 3) ? 0 : below(w, 300);
        ret = image_write(l->sim, l->st, slot_guest(slot), part, nb, tag,
                          ticket);
    }
    if (alone) {
        l->copiers--;
        unlock_exclusive(w, slot, 1);
    } else {
        unlock_parts(w, slot, mask);
    }
    return ret;
}

static void coroutine_fn do_write(Worker *w, bool fua)
{
    Life *l = w->life;
    const unsigned per_part = IMAGE_PART / SIM_SECTOR;
    /* most of it on few slots: that is where requests meet */
    unsigned slot = below(w, below(w, 3) ? 12 : NB_SLOTS);
    unsigned part = below(w, THINVM_PARTS);
    unsigned nb = below(w, 3) ? 1 + below(w, THINVM_PARTS - part) :
                  THINVM_PARTS - part;
    unsigned first = slot * IMAGE_SECTORS + part * per_part;
    uint64_t tag = l->model->next_tag++;
    uint64_t begun, ticket = 0;
    int ret;

    say(w, "write slot %u parts %u to %u, value %" PRIu64 "%s", slot, part,
        part + nb - 1, tag, fua ? ", FUA" : "");
    enter(w);
    begun = model_begin(l->model, first, nb * per_part, tag);
    ret = write_slot(w, slot, part, nb, tag, &ticket);
    finish(w, first, nb * per_part, begun, ticket, ret);
    leave(w);
    if (fua) {
        flush(w);
    }
}

/* A write that is given up: its clusters were reserved for nothing */
static void coroutine_fn do_give_up(Worker *w)
{
    Life *l = w->life;
    unsigned token = thinvm_store_request_begin(l->st);
    uint64_t first, nb;

    say(w, "reserve and give up");
    if (thinvm_store_reserve(l->st, 0, 1 + below(w, 20), &first, &nb) == 0) {
        turn(w);
        thinvm_store_unreserve(l->st, first, nb);
    }
    thinvm_store_request_end(l->st, token);
}

static void coroutine_fn do_write_clusters(Worker *w)
{
    Life *l = w->life;
    unsigned slot = below(w, NB_SLOTS);
    unsigned nb = 1 + below(w, MIN(8, 24 - slot % 24));
    unsigned first = slot * IMAGE_SECTORS, sectors = nb * IMAGE_SECTORS;
    bool copy = l->template && below(w, 4);
    uint64_t tag = copy ? TAG_TEMPLATE : l->model->next_tag++;
    uint64_t begun, ticket = 0;
    int ret;

    say(w, "write slots %u to %u, value %" PRIu64, slot, slot + nb - 1, tag);
    enter(w);
    lock_exclusive(w, slot, nb);
    begun = model_begin(l->model, first, sectors, tag);
    ret = copy ? image_copy_template(l->sim, l->st, slot_guest(slot), nb,
                                     &ticket) :
          image_write_clusters(l->sim, l->st, slot_guest(slot), nb, tag,
                               &ticket);
    finish(w, first, sectors, begun, ticket, ret);
    unlock_exclusive(w, slot, nb);
    leave(w);
}

static int coroutine_fn unmap(Worker *w, uint64_t guest, uint64_t count,
                              ThinvmSource source, uint64_t *ticket)
{
    unsigned token = thinvm_store_request_begin(w->life->st);
    int ret = thinvm_store_unmap(w->life->st, 0, guest, count, source, ticket,
                                 NULL);

    thinvm_store_request_end(w->life->st, token);
    return ret;
}

/* A discard, or a write of zeroes: without a backing file they differ only in
 * the entry that they leave */
static void coroutine_fn do_unmap(Worker *w)
{
    Life *l = w->life;
    unsigned slot = below(w, below(w, 2) ? 12 : NB_SLOTS);
    unsigned nb = 1 + below(w, MIN(5, 24 - slot % 24));
    unsigned first = slot * IMAGE_SECTORS, sectors = nb * IMAGE_SECTORS;
    ThinvmSource source = below(w, 2);
    uint64_t begun, ticket = 0;
    int ret;

    say(w, "%s slots %u to %u", source == THINVM_SOURCE_ZERO ? "zero" :
        "discard", slot, slot + nb - 1);
    enter(w);
    lock_exclusive(w, slot, nb);
    begun = model_begin(l->model, first, sectors, TAG_ZERO);
    ret = unmap(w, slot_guest(slot), nb, source, &ticket);
    finish(w, first, sectors, begun, ticket, ret);
    unlock_exclusive(w, slot, nb);
    leave(w);
}

int coroutine_fn life_resize(Life *l, uint64_t size)
{
    ThinvmOp op = { .type = THINVM_OP_RESIZE, .value = size };

    return thinvm_store_execute(l->st, &op, NULL, NULL);
}

/* Shrink so that the last slots go, and grow again, perhaps further */
static void coroutine_fn do_resize(Worker *w)
{
    Life *l = w->life;
    unsigned slot = NB_SLOTS - 1 - below(w, 30);
    unsigned nb = NB_SLOTS - slot;
    unsigned first = slot * IMAGE_SECTORS, sectors = nb * IMAGE_SECTORS;
    uint64_t guest = slot_guest(slot);
    uint64_t larger = VIRTUAL_SIZE + below(w, 3) * 2000 * IMAGE_CLUSTER;
    uint64_t begun, ticket = 0;
    int ret;

    if (l->tight) {
        return;
    }
    say(w, "shrink to before slot %u, enlarge to %" PRIu64, slot, larger);
    enter(w);
    lock_exclusive(w, slot, nb);
    begun = model_begin(l->model, first, sectors, TAG_ZERO);
    /* nobody else makes it smaller, and mappings end at VIRTUAL_SIZE */
    ret = unmap(w, guest, VIRTUAL_SIZE / IMAGE_CLUSTER - guest,
                THINVM_SOURCE_ZERO, &ticket);
    if (ret == 0) {
        ret = life_resize(l, guest * IMAGE_CLUSTER);
    }
    finish(w, first, sectors, begun, 0, ret);
    turn(w);
    done(w, life_resize(l, larger));
    unlock_exclusive(w, slot, nb);
    leave(w);
}

/* The mode that QMP or the begin of a migration sets */
static void coroutine_fn do_set_mode(Worker *w)
{
    Life *l = w->life;

    l->writethrough = below(w, 2);
    say(w, "mode %s", l->writethrough ? "write-through" : "write-back");
    done(w, thinvm_store_commit(l->st, THINVM_COMMIT_RECORD, true));
}

static bool count_down(void *opaque)
{
    unsigned *steps = opaque;

    return *steps && (*steps)--;
}

/* As the background does; a drain may stop it */
static void coroutine_fn do_checkpoint(Worker *w)
{
    unsigned steps = w->number % 8;
    int ret;

    say(w, "checkpoint, to be stopped at step %u", steps);
    ret = thinvm_store_checkpoint_while(w->life->st, count_down, &steps);
    if (ret != -ECANCELED) {
        done(w, ret);
    }
}

static void coroutine_fn do_maintenance(Worker *w)
{
    Life *l = w->life;
    uint64_t length = sim_length(l->sim);

    switch (below(w, 5)) {
    case 0:
        do_checkpoint(w);
        break;
    case 1:
        say(w, "commit");
        done(w, thinvm_store_commit(l->st, THINVM_COMMIT_RECORD, true));
        break;
    case 2:
        say(w, "enlarge the device");
        if (!l->tight && length <= 16 * MiB) {
            sim_truncate(l->sim, length + MiB);
        }
        break;
    default:
        say(w, "reclaim");
        thinvm_store_reclaim(l->st, below(w, 2));
        break;
    }
}

/* ------------------------------------------------------------------ */
/* Compaction                                                          */

typedef struct Range {
    Worker *worker;
    unsigned first, nb;         /* slots */
} Range;

static void coroutine_fn compact_lock(void *opaque, int tree, uint64_t guest,
                                      uint64_t count)
{
    Range *r = opaque;

    r->nb = 0;
    for (unsigned slot = 0; slot < NB_SLOTS; slot++) {
        if (slot_guest(slot) >= guest && slot_guest(slot) < guest + count) {
            r->first = r->nb ? r->first : slot;
            r->nb++;
        }
    }
    lock_exclusive(r->worker, r->first, r->nb);
}

static void coroutine_fn compact_unlock(void *opaque)
{
    Range *r = opaque;

    unlock_exclusive(r->worker, r->first, r->nb);
}

/* Writers that do not know yet that clusters may move have left */
static void coroutine_fn announce(Worker *w)
{
    Life *l = w->life;
    unsigned mark;

    if (image_fault == IMAGE_FAULT_MOVE) {
        return;
    }
    l->copiers++;
    mark = thinvm_store_requests_mark(l->st);
    while (!thinvm_store_requests_left(l->st, mark) && !l->down) {
        turn(w);
    }
}

static int coroutine_fn cut_device(void *opaque, uint64_t size)
{
    Worker *w = opaque;

    if (below(w, 2)) {
        return -EIO;
    }
    turn(w);                    /* who waits to grow goes on waiting */
    sim_truncate(w->life->sim, size);
    return 0;
}

static void coroutine_fn do_shrink(Worker *w)
{
    Life *l = w->life;
    uint64_t size;

    enter(w);
    if (done(w, thinvm_store_shrink(l->st, 0, cut_device, w, &size, NULL))) {
        say(w, "uses %" PRIu64 " bytes of the device", size);
    }
    leave(w);
}

/* To the end, or to somewhere */
static void coroutine_fn do_compact(Worker *w)
{
    Life *l = w->life;
    Range range = { .worker = w };
    ThinvmCompactLocks locks = { compact_lock, compact_unlock, &range };
    unsigned steps = below(w, 2) ? UINT_MAX : below(w, 60);
    ThinvmCompact *c;
    bool finished = false;
    int ret = 0;

    if (l->compacting) {
        return;
    }
    say(w, "compact");
    l->compacting = true;
    announce(w);
    c = thinvm_compact_new(l->st, &locks);
    while (steps-- && ret == 0 && !finished && !l->down) {
        enter(w);
        ret = thinvm_compact_step(c, &finished, NULL);
        done(w, ret);
        leave(w);
        turn(w);
    }
    thinvm_compact_free(c);
    if (image_fault != IMAGE_FAULT_MOVE) {
        l->copiers--;
    }
    say(w, "%s", finished ? "compacted" : "not compacted to the end");
    if (finished && !l->down) {
        do_shrink(w);
    }
    l->compacting = false;
}

/* What leaves records small, whose data then have checksums */
static void coroutine_fn calm_writer(Worker *w)
{
    switch (below(w, 24)) {
    case 0:
        do_unmap(w);
        break;
    case 1:
        do_maintenance(w);
        break;
    case 2 ... 7:
        say(w, "flush");
        flush(w);
        break;
    case 8 ... 12:
        do_write(w, true);
        break;
    default:
        do_write(w, false);
        break;
    }
}

static void coroutine_fn writer(Worker *w)
{
    if (w->life->calm) {
        calm_writer(w);
        return;
    }
    switch (below(w, 24)) {
    case 0 ... 2:
        do_unmap(w);
        break;
    case 3 ... 4:
        do_write_clusters(w);
        break;
    case 5 ... 7:
        say(w, "flush");
        flush(w);
        break;
    case 8 ... 10:
        do_maintenance(w);
        break;
    case 11:
        if (below(w, 3) == 0) {
            do_compact(w);
        } else {
            do_give_up(w);
        }
        break;
    case 12:
        if (below(w, 4) == 0) {
            do_resize(w);
        } else {
            do_set_mode(w);
        }
        break;
    case 13:
        do_write(w, true);
        break;
    default:
        do_write(w, false);
        break;
    }
}

/* ------------------------------------------------------------------ */
/* Reading                                                             */

static void check_read(Worker *w, unsigned slot, const ModelLook *look,
                       const uint8_t *buf)
{
    uint64_t first = slot_guest(slot) * IMAGE_SECTORS;

    for (unsigned i = 0; i < IMAGE_SECTORS; i++) {
        uint64_t tag = image_tag(buf + i * SIM_SECTOR, first + i);

        if (!model_look_allows(look, i, tag)) {
            fprintf(stderr, "Step %u reads value %" PRId64 " in slot %u, "
                    "sector %u, which nobody has written there\n", w->number,
                    tag, slot, i);
            abort();
        }
    }
}

static void coroutine_fn read_slot(Worker *w, bool follow)
{
    Life *l = w->life;
    unsigned slot = below(w, below(w, 2) ? 12 : NB_SLOTS);
    g_autofree uint8_t *buf = g_malloc(IMAGE_CLUSTER);
    ModelLook *look = model_look(l->model, slot, follow);
    int ret;

    say(w, "%s slot %u", follow ? "follow and read" : "read", slot);
    image_by_template = l->template && below(w, 2);
    image_dawdle = below(w, 6) ? 0 : below(w, 200);
    ret = follow ? image_follow(l->sim, l->follower, slot_guest(slot), buf) :
          image_read(l->sim, l->st, slot_guest(slot), buf);
    /* one who follows may have become the owner: then it does not count */
    if (done(w, ret) && !(follow && l->down)) {
        check_read(w, slot, look, buf);
    }
    model_look_free(look);
}

static void coroutine_fn reader(Worker *w)
{
    read_slot(w, false);
}

/* Another host has the image open, in migration mode */
static void coroutine_fn follower(Worker *w)
{
    Life *l = w->life;

    if (!l->follower) {
        return;
    }
    if (below(w, 3)) {
        read_slot(w, true);
    } else {
        say(w, "catch up");
        done(w, thinvm_store_catch_up(l->follower, NULL, NULL));
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
        ret = thinvm_snapshot_read(s, slot, snap, &needs, NULL);
        thinvm_state_unlock(s);
        if (ret != -EAGAIN) {
            break;
        }
        ret = thinvm_store_read_wanted(st, s, &needs, NULL);
        if (ret < 0) {
            break;
        }
    }
    thinvm_state_lock(s);
    thinvm_needs_destroy(s, &needs);
    thinvm_state_unlock(s);
    return ret;
}

int coroutine_fn life_find_snapshot(ThinvmStore *st, uint64_t id,
                                    ThinvmSnapshot *snap)
{
    uint32_t nb;
    int ret;

    thinvm_state_lock(thinvm_store_state(st));
    nb = thinvm_snapshot_nb_slots(thinvm_store_state(st));
    thinvm_state_unlock(thinvm_store_state(st));
    for (uint32_t slot = 0; slot < nb; slot++) {
        ret = read_snapshot(st, slot, snap);
        if (ret == 0 && snap->id == id) {
            return slot;
        }
        if (ret < 0 && ret != -ENOENT) {
            return ret;
        }
    }
    return -ENOENT;
}

/* Frozen: where several values are possible the disk tells which it is */
static int coroutine_fn read_tags(Worker *w, uint64_t *tags)
{
    Life *l = w->life;
    g_autofree uint8_t *buf = g_malloc(IMAGE_CLUSTER);

    for (unsigned slot = 0; slot < NB_SLOTS; slot++) {
        unsigned first = slot * IMAGE_SECTORS;
        ModelLook *look;
        bool known = true;
        int ret;

        for (unsigned i = first; i < first + IMAGE_SECTORS; i++) {
            known &= model_current(l->model, i, &tags[i]);
        }
        if (known) {
            continue;
        }
        look = model_look(l->model, slot, false);
        ret = image_read(l->sim, l->st, slot_guest(slot), buf);
        if (ret == 0) {
            check_read(w, slot, look, buf);
        }
        model_look_free(look);
        if (ret < 0) {
            return ret;
        }
        for (unsigned i = 0; i < IMAGE_SECTORS; i++) {
            tags[first + i] = image_tag(buf + i * SIM_SECTOR,
                                        slot_guest(slot) * IMAGE_SECTORS + i);
        }
    }
    return 0;
}

static void coroutine_fn do_snapshot_create(Worker *w, SnapshotModel **place)
{
    Life *l = w->life;
    SnapshotModel *m = g_new0(SnapshotModel, 1);
    ThinvmSnapshot snap = { .icount = UINT64_MAX, .date_sec = 1 };
    ThinvmOp op = { .type = THINVM_OP_SNAPSHOT_CREATE, .snapshot = &snap };
    ThinvmInfoState info;

    freeze(w);
    if (done(w, read_tags(w, m->tags))) {
        thinvm_state_lock(thinvm_store_state(l->st));
        snap.id = thinvm_snapshot_next_id(thinvm_store_state(l->st));
        thinvm_state_info(thinvm_store_state(l->st), &info);
        thinvm_state_unlock(thinvm_store_state(l->st));
        snap.virtual_size = info.virtual_size;
        snprintf(snap.name, sizeof(snap.name), "snapshot %" PRIu64, snap.id);
        say(w, "create %s", snap.name);
        m->id = snap.id;
        *place = m;
        if (!done(w, thinvm_store_execute(l->st, &op, NULL, NULL)) &&
            !l->down) {
            *place = NULL;
        }
    }
    if (*place != m) {
        g_free(m);
    }
    thaw(w);
}

static bool has_tree(const ThinvmSnapshot *snap)
{
    return snap->root.type != THINVM_PTR_NONE ||
           snap->vmstate_root.type != THINVM_PTR_NONE;
}

/* All that can be done now: while it has children the record stays */
static int coroutine_fn delete_steps(Worker *w, uint64_t id)
{
    Life *l = w->life;
    ThinvmSnapshot snap;
    int slot, waits = 0, ret = 0;

    while (ret == 0 && waits < 2 &&
           (slot = life_find_snapshot(l->st, id, &snap)) >= 0) {
        ThinvmOp op = {
            .type = THINVM_OP_SNAPSHOT_DELETE_STEP,
            .guest = slot,
            .value = id,
        };

        waits += (snap.flags & THINVM_SNAPSHOT_DELETED) && !has_tree(&snap);
        ret = thinvm_store_execute(l->st, &op, NULL, NULL);
        turn(w);
    }
    return ret;
}

static void coroutine_fn do_snapshot_delete(Worker *w, SnapshotModel **place)
{
    Life *l = w->life;
    SnapshotModel *m = *place;
    uint64_t clock;

    say(w, "delete snapshot %" PRIu64, m->id);
    m->deleting = true;
    if (!done(w, delete_steps(w, m->id))) {
        return;
    }
    /* Until this is durable a cut may bring it back, half deleted */
    clock = l->model->clock;
    if (done(w, thinvm_store_commit(l->st, THINVM_COMMIT_DURABLE, false))) {
        model_flushed(l->model, clock);
        g_free(m);
        *place = NULL;
    }
}

static int coroutine_fn go_to(Worker *w, const SnapshotModel *m,
                              uint64_t *trash)
{
    Life *l = w->life;
    ThinvmOp op = { .type = THINVM_OP_SNAPSHOT_GOTO, .value = m->id };
    ThinvmSnapshot snap;
    int ret = life_find_snapshot(l->st, m->id, &snap);

    if (ret < 0) {
        return ret;
    }
    op.guest = ret;
    thinvm_state_lock(thinvm_store_state(l->st));
    *trash = op.physical = thinvm_snapshot_next_id(thinvm_store_state(l->st));
    thinvm_state_unlock(thinvm_store_state(l->st));
    ret = thinvm_store_execute(l->st, &op, NULL, NULL);
    return ret < 0 ? ret :
           thinvm_store_commit(l->st, THINVM_COMMIT_DURABLE, true);
}

/* Go back to the snapshot; what is left behind is deleted */
static void coroutine_fn do_snapshot_goto(Worker *w, const SnapshotModel *m)
{
    Life *l = w->life;
    g_autofree uint64_t *begun = g_new(uint64_t, NB_SECTORS);
    uint64_t trash;
    int ret;

    say(w, "go back to snapshot %" PRIu64, m->id);
    freeze(w);
    for (unsigned i = 0; i < NB_SECTORS; i++) {
        begun[i] = model_begin(l->model, i, 1, m->tags[i]);
    }
    ret = go_to(w, m, &trash);
    done(w, ret);
    for (unsigned i = 0; i < NB_SECTORS && !l->down; i++) {
        (ret < 0 ? model_fail : model_end)(l->model, i, 1, begun[i]);
    }
    thaw(w);
    if (ret == 0) {
        model_flushed(l->model, l->model->clock);
        done(w, delete_steps(w, trash));
    }
}

static void coroutine_fn snapshotter(Worker *w)
{
    SnapshotModel **place = &w->life->model->snapshots[below(w,
                                                             MAX_SNAPSHOTS)];

    for (int i = below(w, 40); i; i--) {
        turn(w);
    }
    if (w->life->down || (w->life->calm && below(w, 8))) {
        return;
    }
    if (!*place) {
        do_snapshot_create(w, place);
    } else if (!(*place)->deleting && below(w, 3) == 0) {
        do_snapshot_goto(w, *place);
    } else {
        do_snapshot_delete(w, place);
    }
}

/* ------------------------------------------------------------------ */
/* Reigns                                                              */

static void coroutine_fn worker_entry(void *opaque)
{
    Worker *w = opaque;
    Life *l = w->life;
    unsigned steps = w->step == snapshotter ? l->steps / 3 : l->steps;
    unsigned first = ((l->generation * MAX_REIGNS + l->reign) * NB_WORKERS +
                      w->nr) * MAX_STEPS;

    for (unsigned i = 0; i < steps && !l->down; i++) {
        w->number = first + i;
        if (life_chosen(w->number)) {
            steps_made[w->number] = true;
            w->random.state = l->seed ^ w->number * 0x9e3779b97f4a7c15ULL;
            sim_random(&w->random);
            w->step(w);
        }
        turn(w);
    }
    sim_finish(l->sim);
}

void life_run(Life *l)
{
    Worker workers[NB_WORKERS];

    g_assert(l->generation < 2 && l->reign < MAX_REIGNS &&
             l->steps <= MAX_STEPS);
    if (l->small_records) {
        l->st->journal.record_limit = 1 * KiB;
    }
    for (unsigned n = 0; n < NB_WORKERS; n++) {
        workers[n] = (Worker) {
            .life = l,
            .step = n < NB_WRITERS ? writer :
                    n < NB_WRITERS + NB_READERS ? reader :
                    n == NB_WORKERS - 2 ? snapshotter : follower,
            .nr = n,
        };
    }
    for (unsigned n = 0; n < NB_WORKERS; n++) {
        sim_start(l->sim, worker_entry, &workers[n]);
    }
    sim_run(l->sim);
    /* Those who were fenced off may have left in the midst of something */
    memset(l->parts, 0, sizeof(l->parts));
    memset(l->exclusive, 0, sizeof(l->exclusive));
    memset(l->writers, 0, sizeof(l->writers));
    l->nb_writing = l->copiers = 0;
    l->frozen = l->compacting = false;
}
