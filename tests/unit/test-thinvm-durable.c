/*
 * Unit tests of thinvm's durability layer: what must be durable, and when
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Steps of which one must be on the device before the next may be taken, or
 * before anybody is told that it was, with several of them on their way at a
 * time (execute.c, journal.c).
 *
 * Runs on the simulated device (thinvm-sim.h).
 */
#include "qemu/osdep.h"
#include "thinvm-store-test.h"

#define PLACE       700         /* guest cluster that snapshots share */
#define OLD         11          /* what it has in them */
#define NEW         22
#define MAX_STEPS   10000

/* ------------------------------------------------------------------ */
/* Snapshots that are deleted side by side                             */

/* There are no others, so the slots are 0, 1, ... and the ids one more */
static void coroutine_fn create_snapshot(ThinvmStore *st)
{
    ThinvmSnapshot snap = {
        .icount = UINT64_MAX, .date_sec = 1, .name = "one",
        .id = thinvm_snapshot_next_id(thinvm_store_state(st)),
        .virtual_size = VIRTUAL_SIZE,
    };
    ThinvmOp op = { .type = THINVM_OP_SNAPSHOT_CREATE, .snapshot = &snap };

    g_assert_cmpint(thinvm_store_execute(st, &op, NULL, &error_abort), ==, 0);
}

static int coroutine_fn delete_step(ThinvmStore *st, uint32_t slot)
{
    ThinvmOp op = {
        .type = THINVM_OP_SNAPSHOT_DELETE_STEP,
        .guest = slot, .value = slot + 1,
    };

    return thinvm_store_execute(st, &op, NULL, NULL);
}

/* Two snapshots of a disk with something in PLACE; all of it durable */
static ThinvmStore *coroutine_fn open_with_two(ThinvmSim *sim)
{
    ThinvmStore *st;

    image_create(sim, VIRTUAL_SIZE);
    st = image_open(sim);
    g_assert_cmpint(write_one(sim, st, PLACE, OLD), ==, 0);
    create_snapshot(st);
    create_snapshot(st);
    g_assert_cmpint(flush(st), ==, 0);
    return st;
}

static int coroutine_fn overwrite(ThinvmSim *sim, ThinvmStore *st)
{
    unsigned copiers = 0;

    return image_overwrite(sim, st, PLACE, 0, THINVM_PARTS, NEW, &copiers);
}

/* Whoever finds the snapshot finds it as it was */
static void coroutine_fn check_snapshot(ThinvmSim *sim, ThinvmStore *st,
                                        uint32_t slot)
{
    g_autofree uint8_t *buf = g_malloc(IMAGE_CLUSTER);
    ThinvmSnapshot snap;
    int ret = thinvm_store_read_snapshot(st, slot, &snap, NULL);

    if (ret == 0 && !(snap.flags & THINVM_SNAPSHOT_HIDDEN)) {
        g_assert_cmpint(image_read_root(sim, st, &snap.root, PLACE, buf), ==,
                        0);
        g_assert_cmpuint(image_tag(buf, PLACE * IMAGE_SECTORS), ==, OLD);
    }
}

/*
 * Slot 1 goes, and its steps are taken in turn with those of slot 0, which is
 * hidden amid them.  As soon as the disk may write in place it does, and the
 * process dies: what it did not write to the journal is lost, those data not.
 */
static void coroutine_fn test_two_deletions(ThinvmSim *sim)
{
    ThinvmStore *st = open_with_two(sim);
    unsigned steps = 0;

    g_assert_cmpint(delete_step(st, 1), ==, 0);
    g_assert_cmpint(flush(st), ==, 0);
    g_assert_cmpint(delete_step(st, 0), ==, 0);
    while (overwrite(sim, st) < 0) {
        delete_step(st, 1);             /* until it is gone */
        g_assert_cmpint(delete_step(st, 0), ==, 0);
        g_assert_cmpuint(++steps, <, MAX_STEPS);
    }
    g_assert_cmpuint(steps, >, 0);
    store_die(st);

    st = image_open(sim);
    check_snapshot(sim, st, 0);
    check_snapshot(sim, st, 1);
    g_assert_cmpuint(image_read_tag(sim, st, PLACE), ==, NEW);
    image_check(st);
    store_close(st, true);
}

/* What hides it cannot be written: nothing of it is given up until it can */
static void coroutine_fn test_failing_deletion(ThinvmSim *sim)
{
    ThinvmStore *st = open_with_two(sim);
    unsigned steps = 0;

    g_assert_cmpint(delete_step(st, 1), ==, 0);
    g_assert_cmpint(flush(st), ==, 0);
    sim_fail(sim, SIM_WRITE, THINVM_JOURNAL_OFFSET, JOURNAL_END, 0, EIO,
             false);
    g_assert_cmpint(delete_step(st, 0), ==, 0);
    g_assert_cmpint(flush(st), ==, -EIO);
    for (int i = 0; i < 100; i++) {
        delete_step(st, 1);
        g_assert_cmpint(delete_step(st, 0), ==, -EIO);
        g_assert_cmpint(overwrite(sim, st), ==, -EAGAIN);
    }
    sim_fail(sim, 0, 0, 0, 0, 0, false);
    while (overwrite(sim, st) < 0) {
        delete_step(st, 1);
        g_assert_cmpint(delete_step(st, 0), ==, 0);
        g_assert_cmpuint(++steps, <, MAX_STEPS);
    }
    store_die(st);

    st = image_open(sim);
    check_snapshot(sim, st, 0);
    image_check(st);
    store_close(st, true);
}

/* ------------------------------------------------------------------ */
/* Write-through                                                       */

/*
 * A flush fails and the device loses what it had not flushed: the record that
 * maps a cluster.  Who overwrites that cluster and waits for what he found
 * must not be told that it is written.
 */
static void coroutine_fn test_found_in_doubt(ThinvmSim *sim)
{
    uint64_t ticket = 0, flushed;
    ThinvmStore *st;
    unsigned run;

    /* Chance decides what is lost: often enough for it to happen */
    sim_set_lossy(sim, THINVM_JOURNAL_OFFSET, JOURNAL_END);
    for (run = 0; run < 20; run++) {
        image_create(sim, VIRTUAL_SIZE);
        st = image_open(sim);
        g_assert_cmpint(flush(st), ==, 0);
        flushed = thinvm_store_ticket(st);
        g_assert_cmpint(write_one(sim, st, PLACE, OLD), ==, 0);
        g_assert_cmpint(thinvm_store_commit(st, THINVM_COMMIT_RECORD, true),
                        ==, 0);
        sim_fail(sim, SIM_FLUSH, 0, UINT64_MAX, 0, EIO, true);
        g_assert_cmpint(flush(st), ==, -EIO);

        /* What was flushed is in no doubt */
        sim_fail(sim, SIM_FLUSH | SIM_WRITE, 0, JOURNAL_END, 0, EIO, false);
        g_assert_cmpint(thinvm_store_commit_ticket(st, flushed), ==, 0);
        sim_fail(sim, 0, 0, 0, 0, 0, false);

        g_assert_cmpint(image_write(sim, st, PLACE, 0, THINVM_PARTS, NEW,
                                    &ticket), ==, 0);
        g_assert_cmpuint(ticket, ==, 0);        /* in place */
        g_assert_cmpint(thinvm_store_commit_ticket(st,
                                                   thinvm_store_ticket(st)),
                        ==, 0);
        store_die(st);

        st = image_open(sim);
        g_assert_cmpuint(image_read_tag(sim, st, PLACE), ==, NEW);
        image_check(st);
        store_close(st, false);
    }
}

/* ------------------------------------------------------------------ */
/* Flushes of others                                                   */

/* Chance decides what comes first, and what is lost: so many times */
#define RUNS    40

typedef bool OtherIsDue(ThinvmStore *st);

/* Somebody whose flush fails while others are writing */
typedef struct Other {
    ThinvmSim *sim;
    ThinvmStore *st;
    OtherIsDue *is_due;
    bool failed, over, done;
} Other;

static void coroutine_fn other_run(void *opaque)
{
    Other *o = opaque;

    while (!o->over && !o->is_due(o->st)) {
        sim_yield(o->sim);
    }
    if (!o->over) {
        sim_fail(o->sim, SIM_FLUSH, 0, UINT64_MAX, 0, EIO, true);
        thinvm_journal_flush(o->st, 0);
        o->failed = true;
    }
    o->done = true;
    sim_finish(o->sim);
}

static void other_begin(Other *o, ThinvmSim *sim, ThinvmStore *st,
                        OtherIsDue *is_due)
{
    *o = (Other) { .sim = sim, .st = st, .is_due = is_due };
    sim_start(sim, other_run, o);
}

static void coroutine_fn other_end(Other *o)
{
    o->over = true;
    while (!o->done) {
        sim_yield(o->sim);
    }
}

static bool amid_records(ThinvmStore *st)
{
    return !QSIMPLEQ_EMPTY(&st->journal.unflushed) &&
           !QSIMPLEQ_EMPTY(&st->journal.sealed);
}

/*
 * Of two records that one commit writes the first is lost by a flush that was
 * a checkpoint's, say, before the second is written.  That there is nothing
 * wrong with the commit's own flush says nothing.
 */
static void coroutine_fn lose_amid_commit(ThinvmSim *sim,
                                          ThinvmCommitLevel level)
{
    unsigned failed = 0;

    sim_set_lossy(sim, THINVM_JOURNAL_OFFSET, JOURNAL_END);
    for (int i = 0; i < RUNS; i++) {
        ThinvmStore *st;
        bool promised;
        Other o;

        image_create(sim, VIRTUAL_SIZE);
        st = image_open(sim);
        g_assert_cmpint(flush(st), ==, 0);
        g_assert_cmpint(write_one(sim, st, PLACE, OLD), ==, 0);
        thinvm_state_lock(thinvm_store_state(st));
        thinvm_journal_seal(st);
        thinvm_state_unlock(thinvm_store_state(st));
        g_assert_cmpint(write_one(sim, st, PLACE + 1, NEW), ==, 0);

        other_begin(&o, sim, st, amid_records);
        promised = thinvm_store_commit(st, level, true) == 0;
        failed += !promised;
        /* What is lost after it was written is another matter */
        promised &= o.failed || level != THINVM_COMMIT_RECORD;
        other_end(&o);
        store_die(st);

        st = image_open(sim);
        if (promised) {
            g_assert_cmpuint(image_read_tag(sim, st, PLACE), ==, OLD);
            g_assert_cmpuint(image_read_tag(sim, st, PLACE + 1), ==, NEW);
        }
        image_check(st);
        store_close(st, false);
    }
    g_assert_cmpuint(failed, >, 0);
}

static void coroutine_fn test_commit_amid_failure(ThinvmSim *sim)
{
    lose_amid_commit(sim, THINVM_COMMIT_RECORD);
    lose_amid_commit(sim, THINVM_COMMIT_DURABLE);
    lose_amid_commit(sim, THINVM_COMMIT_FLUSHED);
}

static bool amid_pages(ThinvmStore *st)
{
    return st->frozen && st->frozen_pages->len && !st->frozen_complete;
}

#define NB_LEAVES   30

static uint64_t in_leaf(unsigned leaf, unsigned n)
{
    return (uint64_t)leaf * THINVM_ENTRIES_PER_LEAF + n;
}

/* Those that the next checkpoint writes take it several writes */
static void coroutine_fn scatter_pages(ThinvmSim *sim, ThinvmStore *st)
{
    for (unsigned round = 0; round < 6; round++) {
        for (unsigned leaf = 0; leaf < NB_LEAVES; leaf++) {
            if (round == 0 || round == 5 || (leaf + round) % 2) {
                g_assert_cmpint(write_one(sim, st, in_leaf(leaf, round), OLD),
                                ==, 0);
            }
        }
        g_assert_cmpint(flush(st), ==, 0);
        if (round < 5) {
            g_assert_cmpint(thinvm_store_checkpoint(st), ==, 0);
        }
    }
}

/* The same with the pages that a checkpoint writes, before it flushes them */
static void coroutine_fn test_checkpoint_amid_failure(ThinvmSim *sim)
{
    unsigned failed = 0;

    for (int i = 0; i < RUNS; i++) {
        uint64_t generation;
        ThinvmStore *st;
        Other o;
        int ret;

        image_create(sim, VIRTUAL_SIZE);
        st = image_open(sim);
        scatter_pages(sim, st);

        sim_set_lossy(sim, 0, UINT64_MAX);
        other_begin(&o, sim, st, amid_pages);
        ret = thinvm_store_checkpoint(st);
        other_end(&o);
        sim_set_lossy(sim, 0, 0);
        if (ret < 0) {
            failed++;
            g_assert_cmpint(thinvm_store_checkpoint(st), ==, 0);
        }
        generation = st->bases.newest.generation;
        store_die(st);

        st = image_open(sim);
        g_assert_cmpuint(st->bases.newest.generation, ==, generation);
        for (unsigned leaf = 0; leaf < NB_LEAVES; leaf++) {
            g_assert_cmpuint(image_read_tag(sim, st, in_leaf(leaf, 0)), ==,
                             OLD);
        }
        image_check(st);
        store_close(st, false);
    }
    g_assert_cmpuint(failed, >, 0);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    qemu_init_main_loop(&error_abort);
    module_call_init(MODULE_INIT_TRACE);

    add("/thinvm/durable/two-deletions", test_two_deletions);
    add("/thinvm/durable/failing-deletion", test_failing_deletion);
    add("/thinvm/durable/found-in-doubt", test_found_in_doubt);
    add("/thinvm/durable/commit-amid-failure", test_commit_amid_failure);
    add("/thinvm/durable/checkpoint-amid-failure",
        test_checkpoint_amid_failure);
    return g_test_run();
}
