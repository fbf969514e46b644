/*
 * Unit tests of thinvm on a device that is full and does not grow
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Lives on devices of random sizes, which are filled again and again, with
 * data that needs few pages or many, with snapshots or without.  Whatever the
 * moment: a commit, a checkpoint, a discard, each step of the deletion of a
 * snapshot, an overwrite of what is the disk's own, closing and opening
 * succeed.  Only what needs new space may fail, by -ENOSPC, and leaves what
 * was there as it was.
 *
 * Each life is cut at I/Os that chance chooses; the copy must open on its full
 * device, pass the check, do all of that, and have room when everything is
 * discarded.
 */
#include "qemu/osdep.h"
#include "thinvm-store-test.h"
#include "block/thinvm/state-int.h"

#define PLACES          600     /* guest clusters that are used */
#define SNAPSHOTS       6
#define LIVES           60
#define CHUNKS          12      /* of a life; each is cut once */
#define CHUNK_STEPS     40

typedef struct Full {
    ThinvmSim *sim;
    ThinvmStore *st;
    uint64_t stride;            /* between two places */
    uint64_t tag[PLACES];
    bool own[PLACES];           /* mapped, and no snapshot has it */
    uint64_t next_tag;
    unsigned nb_snapshots;
    /* the cut */
    uint64_t cut_in;            /* I/Os until it; 0: has been made */
    ThinvmSim *cut;
} Full;

/* sim_run() takes no argument for bodies */
static Full *life;
static struct {
    uint64_t refused, discards, deleted, created, overwrites, cuts, room;
} seen;

static uint64_t below(uint64_t n)
{
    return sim_random_below(sim_rng(life->sim), n);
}

/* ------------------------------------------------------------------ */
/* What must always succeed                                            */

static void coroutine_fn discard(ThinvmStore *st, uint64_t guest, uint64_t nb)
{
    g_assert_cmpint(thinvm_store_unmap(st, THINVM_TREE_DISK, guest, nb,
                                       THINVM_SOURCE_ZERO, NULL, &error_abort),
                    ==, 0);
    seen.discards++;
}

typedef struct FindSnapshot {
    uint32_t slot;
    ThinvmSnapshot snap;
} FindSnapshot;

static int question_snapshot(ThinvmState *s, void *opaque, ThinvmNeeds *needs)
{
    FindSnapshot *f = opaque;
    int ret = -ENOENT;

    for (; f->slot < thinvm_snapshot_nb_slots(s); f->slot++) {
        ret = thinvm_snapshot_read(s, f->slot, &f->snap, needs, NULL);
        if (ret != -ENOENT) {
            break;
        }
    }
    return ret;
}

/* A step for each snapshot, in turn; false: there are none */
static bool coroutine_fn delete_step_each(ThinvmStore *st)
{
    FindSnapshot f = { 0 };
    bool any = false;
    int ret;

    while ((ret = thinvm_store_ask(st, question_snapshot, &f,
                                   &error_abort)) == 0) {
        ThinvmOp op = {
            .type = THINVM_OP_SNAPSHOT_DELETE_STEP,
            .guest = f.slot, .value = f.snap.id,
        };

        g_assert_cmpint(thinvm_store_execute(st, &op, NULL, &error_abort),
                        ==, 0);
        any = true;
        f.slot++;
    }
    g_assert_cmpint(ret, ==, -ENOENT);
    return any;
}

static void coroutine_fn delete_all(ThinvmStore *st)
{
    unsigned steps = 0;

    while (delete_step_each(st)) {
        g_assert_cmpuint(++steps, <, 100000);
        seen.deleted++;
    }
}

static void coroutine_fn settle(ThinvmStore *st)
{
    g_assert_cmpint(flush(st), ==, 0);
    g_assert_cmpint(thinvm_store_checkpoint(st), ==, 0);
    thinvm_store_reclaim(st, false);
}

/* ------------------------------------------------------------------ */
/* A life                                                              */

static void coroutine_fn write_place(unsigned i)
{
    uint64_t tag = ++life->next_tag;
    int ret = write_one(life->sim, life->st, i * life->stride, tag);

    if (ret == 0) {
        seen.overwrites += life->own[i];
        life->tag[i] = tag;
        life->own[i] = true;
        return;
    }
    g_assert_cmpint(ret, ==, -ENOSPC);
    g_assert_false(life->own[i]);
    seen.refused++;
}

/* Until it is full: nothing of what has no place finds one */
static void coroutine_fn fill(void)
{
    for (unsigned i = 0; i < PLACES; i++) {
        if (!life->own[i]) {
            write_place(i);
        }
    }
}

static void coroutine_fn discard_some(void)
{
    unsigned first = below(PLACES), nb = 1 + below(20);

    for (unsigned i = first; i < MIN(PLACES, first + nb); i++) {
        discard(life->st, i * life->stride, 1);
        life->tag[i] = TAG_ZERO;
        life->own[i] = false;
    }
}

static void coroutine_fn create_snapshot(void)
{
    ThinvmState *s = thinvm_store_state(life->st);
    ThinvmSnapshot snap = {
        .icount = UINT64_MAX, .date_sec = 1, .name = "one",
        .id = thinvm_snapshot_next_id(s), .virtual_size = s->virtual_size,
    };
    ThinvmOp op = { .type = THINVM_OP_SNAPSHOT_CREATE, .snapshot = &snap };
    int ret;

    if (life->nb_snapshots == SNAPSHOTS) {
        return;
    }
    ret = thinvm_store_execute(life->st, &op, NULL, NULL);
    if (ret == 0) {
        seen.created++;
        life->nb_snapshots++;
        memset(life->own, 0, sizeof(life->own));
    } else {
        g_assert_cmpint(ret, ==, -ENOSPC);
    }
}

static void coroutine_fn check_contents(void)
{
    for (unsigned i = 0; i < PLACES; i++) {
        g_assert_cmphex(image_read_tag(life->sim, life->st, i * life->stride),
                        ==, life->tag[i]);
    }
}

static void coroutine_fn open_again(void)
{
    if (below(2)) {
        store_close(life->st, below(2));
    } else {
        g_assert_cmpint(flush(life->st), ==, 0);
        store_die(life->st);
    }
    life->st = image_open(life->sim);
    check_contents();
}

static void coroutine_fn step(void)
{
    switch (below(16)) {
    case 0 ... 4:
        write_place(below(PLACES));
        break;
    case 5:
        fill();
        break;
    case 6 ... 7:
        discard_some();
        break;
    case 8:
        g_assert_cmpint(flush(life->st), ==, 0);
        break;
    case 9:
        g_assert_cmpint(thinvm_store_checkpoint(life->st), ==, 0);
        break;
    case 10:
        thinvm_store_reclaim(life->st, below(2));
        break;
    case 11:
        create_snapshot();
        break;
    case 12:
        /* some steps; the disk's clusters are its own again only at the end */
        for (unsigned n = below(30); n > 0; n--) {
            delete_step_each(life->st);
        }
        break;
    case 13:
        if (below(3) == 0) {
            delete_all(life->st);
            life->nb_snapshots = 0;
        }
        break;
    case 14:
        thinvm_store_extend_metadata(life->st);
        break;
    default:
        open_again();
        break;
    }
}

static void coroutine_fn birth(ThinvmSim *sim)
{
    static const uint64_t strides[] = { 1, 3, 29, 109 };

    life->stride = strides[below(ARRAY_SIZE(strides))];
    image_create(sim, VIRTUAL_SIZE);
    life->st = image_open(sim);
    fill();
    g_assert_cmpuint(seen.refused, >, 0);
}

static void coroutine_fn chunk(ThinvmSim *sim)
{
    for (unsigned n = 0; n < CHUNK_STEPS; n++) {
        step();
    }
}

static void coroutine_fn death(ThinvmSim *sim)
{
    check_contents();
    image_check(life->st);
    store_close(life->st, true);
}

/* ------------------------------------------------------------------ */
/* What a cut has left                                                 */

static void coroutine_fn recover(ThinvmSim *sim)
{
    ThinvmStore *st = image_open(sim);
    uint64_t free;

    image_check(st);
    settle(st);
    discard(st, 0, VIRTUAL_SIZE / IMAGE_CLUSTER);
    delete_all(st);
    settle(st);
    settle(st);
    /* All of it may have become metadata, which only compaction gives back */
    free = info_of(st).free_clusters;
    seen.room += free > 0;
    for (uint64_t i = 0; i < MIN(free, 20); i++) {
        g_assert_cmpint(write_one(sim, st, i, 1), ==, 0);
    }
    image_recount(sim, st);
    image_check(st);
    store_close(st, true);
}

static void maybe_cut(void *opaque)
{
    if (life->cut_in && --life->cut_in == 0) {
        SimRandom r = { .state = life->next_tag };

        life->cut = sim_cut(life->sim, sim_random(&r),
                            sim_random_below(&r, SIM_CUT__MAX));
    }
}

static void live(uint64_t seed)
{
    /* With the journal, metadata and little else, to several MiB */
    uint64_t size = 3 * MiB +
                    (seed * 0x9e3779b97f4a7c15ULL >> 40) % (6 * MiB);

    life = g_new0(Full, 1);
    size = ROUND_UP(size, SIM_BLOCK);
    life->sim = sim_new(seed, size, size);
    seen.refused = 0;
    run_on(life->sim, birth);
    sim_set_hook(life->sim, maybe_cut, NULL);
    for (unsigned n = 0; n < CHUNKS; n++) {
        life->cut_in = 1 + below(400);
        run_on(life->sim, chunk);
        if (life->cut) {
            run_on(life->cut, recover);
            sim_free(life->cut);
            life->cut = NULL;
            seen.cuts++;
        }
    }
    sim_set_hook(life->sim, NULL, NULL);
    run_on(life->sim, death);
    sim_free(life->sim);
    g_free(life);
}

static void test_lives(void)
{
    for (uint64_t seed = 1; seed <= LIVES; seed++) {
        live(seed);
    }
    g_test_message("%" PRIu64 " discards, %" PRIu64 " overwrites, %" PRIu64
                   " snapshots, %" PRIu64 " rounds of deletion, %" PRIu64
                   " cuts", seen.discards, seen.overwrites, seen.created,
                   seen.deleted, seen.cuts);
    g_assert_true(seen.discards > 1000 && seen.overwrites > 500);
    g_assert_true(seen.created > 100 && seen.deleted > 100);
    g_assert_cmpuint(seen.cuts, >, LIVES * CHUNKS / 2);
    g_assert_cmpuint(seen.room, >, seen.cuts / 10 * 9);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    module_call_init(MODULE_INIT_QOM);
    qemu_init_main_loop(&error_abort);
    g_test_add_func("/thinvm/full/lives", test_lives);
    return g_test_run();
}
