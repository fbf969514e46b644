/*
 * Unit tests of following another owner's journal, on a simulated device
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Two stores on one device: one writes, the other applies its records as
 * they appear (design sections 3 and 5).
 */
#include "qemu/osdep.h"
#include "thinvm-store-test.h"

static void coroutine_fn follow(ThinvmStore *st, bool expect)
{
    uint64_t before = thinvm_store_changes(st);
    bool changed;

    g_assert_cmpint(thinvm_store_catch_up(st, &changed, &error_abort), ==, 0);
    g_assert(changed == expect);
    /* What a reader that began before compares with, whoever caught up */
    g_assert((thinvm_store_changes(st) != before) == expect);
}

static void coroutine_fn test_follow(ThinvmSim *sim)
{
    ThinvmStore *owner, *follower;
    uint64_t reads;

    image_create(sim, VIRTUAL_SIZE);
    owner = image_open(sim);
    follower = thinvm_store_open(sim_device(sim), 0, &error_abort);
    follow(follower, false);
    for (uint64_t i = 0; i < 20; i++) {
        write_one(sim, owner, i * 700, i + 1);
        follow(follower, false);
        thinvm_store_commit(owner, THINVM_COMMIT_RECORD, true);
        follow(follower, true);
        g_assert_cmpuint(image_read_tag(sim, follower, i * 700), ==, i + 1);
        follow(follower, false);
    }
    /* quiet: one small read */
    reads = sim_count(sim, SIM_READ);
    follow(follower, false);
    g_assert_cmpuint(sim_count(sim, SIM_READ), ==, reads + 1);

    /* checkpoints in between do not disturb it */
    for (uint64_t i = 0; i < 20; i++) {
        write_one(sim, owner, i * 700 + 1, i + 100);
        thinvm_store_checkpoint(owner);
        follow(follower, true);
        g_assert_cmpuint(image_read_tag(sim, follower, i * 700 + 1), ==,
                         i + 100);
    }
    /*
     * A lap of the ring, seen record by record.  What is at the head are
     * records of the lap before, which are no reason to start afresh.
     */
    for (uint64_t i = 0; i < 400; i++) {
        write_one(sim, owner, i, i + 3000);
        flush(owner);
        if (i % 100 == 99) {
            thinvm_store_checkpoint(owner);
        }
        thinvm_store_catch_up(follower, NULL, &error_abort);
    }
    g_assert_cmpuint(stats_of(follower).fresh_starts, ==, 0);
    /* left behind by laps of the ring: starts afresh */
    for (uint64_t i = 0; i < 700; i++) {
        write_one(sim, owner, i * 20, i + 1000);
        flush(owner);
        if (i % 100 == 99) {
            thinvm_store_checkpoint(owner);
        }
    }
    follow(follower, true);
    for (uint64_t i = 0; i < 700; i++) {
        g_assert_cmpuint(image_read_tag(sim, follower, i * 20), ==, i + 1000);
    }

    /* hand-over, and back */
    store_close(owner, true);
    thinvm_store_begin_writing(follower, info_of(follower).epoch + 1,
                               &error_abort);
    for (uint64_t i = 0; i < 100; i++) {
        write_one(sim, follower, i * 20, i + 5000);
    }
    thinvm_store_checkpoint(follower);
    image_recount(sim, follower);
    thinvm_store_end_writing(follower, false, &error_abort);
    follow(follower, false);
    owner = image_open(sim);
    write_one(sim, owner, 20, 9);
    write_one(sim, owner, 21, 10);
    flush(owner);
    follow(follower, true);
    g_assert_cmpuint(image_read_tag(sim, follower, 20), ==, 9);
    g_assert_cmpuint(image_read_tag(sim, follower, 40), ==, 5002);
    store_close(owner, false);
    thinvm_store_free(follower);
}

/* Records that a power cut took, after we had followed them */
static void coroutine_fn test_follow_cut_off(ThinvmSim *sim)
{
    ThinvmStore *owner, *follower;
    uint64_t at;

    image_create(sim, VIRTUAL_SIZE);
    owner = image_open(sim);
    write_one(sim, owner, 1, 11);
    flush(owner);
    follower = thinvm_store_open(sim_device(sim), 0, &error_abort);
    at = head_of(owner);
    write_one(sim, owner, 1, 12);
    write_one(sim, owner, 2, 22);
    thinvm_store_commit(owner, THINVM_COMMIT_RECORD, true);
    follow(follower, true);
    g_assert_cmpuint(image_read_tag(sim, follower, 2), ==, 22);
    store_die(owner);
    flip(sim, at);
    /* the next owner does not see that record, and writes in its place */
    owner = image_open(sim);
    g_assert_cmpuint(image_read_tag(sim, owner, 2), ==, TAG_ZERO);
    write_one(sim, owner, 3, 33);
    flush(owner);
    follow(follower, true);
    g_assert_cmpuint(image_read_tag(sim, follower, 2), ==, TAG_ZERO);
    g_assert_cmpuint(image_read_tag(sim, follower, 3), ==, 33);
    store_die(owner);

    /* the same with one record only: noticed at the latest when taking over */
    owner = image_open(sim);
    follow(follower, true);
    at = head_of(owner);
    write_one(sim, owner, 4, 44);
    thinvm_store_commit(owner, THINVM_COMMIT_RECORD, true);
    follow(follower, true);
    store_die(owner);
    flip(sim, at);
    owner = image_open(sim);
    store_die(owner);
    thinvm_store_begin_writing(follower, info_of(follower).epoch + 5,
                               &error_abort);
    g_assert_cmpuint(image_read_tag(sim, follower, 4), ==, TAG_ZERO);
    image_recount(sim, follower);
    store_close(follower, true);
}

/* ------------------------------------------------------------------ */
/* Warm hand-over                                                      */

#define LEAVES      (VIRTUAL_SIZE / IMAGE_CLUSTER / THINVM_ENTRIES_PER_LEAF)

/* A cluster in each leaf of the disk, so that all of them are needed */
static void coroutine_fn write_widely(ThinvmSim *sim, ThinvmStore *st,
                                      uint64_t nth, uint64_t tag)
{
    for (uint64_t leaf = 0; leaf < LEAVES; leaf++) {
        write_one(sim, st, leaf * THINVM_ENTRIES_PER_LEAF + nth, tag + leaf);
    }
}

static void coroutine_fn expect_widely(ThinvmSim *sim, ThinvmStore *st,
                                       uint64_t nth, uint64_t tag)
{
    for (uint64_t leaf = 0; leaf < LEAVES; leaf++) {
        g_assert_cmpuint(image_read_tag(sim, st, leaf *
                                        THINVM_ENTRIES_PER_LEAF + nth), ==,
                         tag + leaf);
    }
}

static void coroutine_fn preload(ThinvmStore *st, ThinvmStorePreload *p)
{
    while (thinvm_store_preload(st, p)) {
        g_assert_cmpuint(p->percent, <=, 100);
    }
}

/* Take over; the bytes of metadata that this, and then @st's work, reads */
static uint64_t coroutine_fn take_over(ThinvmStore *st)
{
    uint64_t before = stats_of(st).metadata_bytes_read;

    thinvm_store_begin_writing(st, info_of(st).epoch + 1, &error_abort);
    return stats_of(st).metadata_bytes_read - before;
}

static void coroutine_fn test_preload(ThinvmSim *sim)
{
    ThinvmStore *owner, *follower;
    ThinvmStorePreload p = {};
    uint64_t reads, bytes;

    image_create(sim, VIRTUAL_SIZE);
    owner = image_open(sim);
    write_widely(sim, owner, 0, 1000);
    store_close(owner, true);
    owner = image_open(sim);

    follower = thinvm_store_open(sim_device(sim), 0, &error_abort);
    preload(follower, &p);
    g_assert_cmpint(p.state, ==, THINVM_STORE_PRELOAD_COMPLETE);
    g_assert_cmpuint(p.pages, >=, LEAVES);
    g_assert_cmpuint(p.percent, ==, 100);
    bytes = stats_of(follower).metadata_bytes_read;
    expect_widely(sim, follower, 0, 1000);
    g_assert_cmpuint(stats_of(follower).metadata_bytes_read, ==, bytes);

    /* only what is new in the journal is read */
    write_widely(sim, owner, 1, 3000);
    flush(owner);
    store_close(owner, false);
    reads = take_over(follower);
    g_assert_cmpuint(reads, <, 2 * MiB);
    bytes = stats_of(follower).metadata_bytes_read;
    expect_widely(sim, follower, 0, 1000);
    expect_widely(sim, follower, 1, 3000);
    write_widely(sim, follower, 2, 5000);
    g_assert_cmpuint(stats_of(follower).metadata_bytes_read, ==, bytes);
    image_recount(sim, follower);
    store_close(follower, true);
}

/* A cache that is too small: what fits is loaded, and it ends */
static void coroutine_fn test_preload_small(ThinvmSim *sim)
{
    ThinvmStore *owner, *follower;
    ThinvmStorePreload p = {};

    image_create(sim, VIRTUAL_SIZE);
    owner = image_open(sim);
    write_widely(sim, owner, 0, 1000);
    store_close(owner, true);
    follower = thinvm_store_open(sim_device(sim), 100 * THINVM_PAGE_SIZE,
                                 &error_abort);
    preload(follower, &p);
    g_assert_cmpint(p.state, ==, THINVM_STORE_PRELOAD_FULL);
    g_assert_cmpuint(p.percent, >, 0);
    g_assert_cmpuint(p.percent, <, 100);
    expect_widely(sim, follower, 0, 1000);
    thinvm_store_free(follower);
}

static bool is_hot(uint32_t leaf)
{
    return leaf % 3 == 2;       /* the last ones among them */
}

static void coroutine_fn use_hot(ThinvmSim *sim, ThinvmStore *st)
{
    for (uint64_t leaf = 0; leaf < LEAVES; leaf++) {
        if (is_hot(leaf)) {
            g_assert_cmpuint(image_read_tag(sim, st, leaf *
                                            THINVM_ENTRIES_PER_LEAF), ==,
                             1000 + leaf);
        }
    }
}

/* All leaves in memory, the hottest first; ends their recent use */
static GArray *sample_heat(ThinvmStore *st)
{
    GArray *found = g_array_new(false, false, sizeof(ThinvmHotLeaf));
    ThinvmState *s = thinvm_store_state(st);
    uint64_t leaf = 0;

    thinvm_state_lock(s);
    while (thinvm_state_sample_heat(s, &leaf, found)) {
        /* one step more */
    }
    thinvm_state_unlock(s);
    thinvm_heat_sort(found);
    return found;
}

/*
 * A cache that is too small, and an owner who says what he uses: this is in
 * the follower's memory in the end, also if other things were there first.
 */
static void coroutine_fn test_preload_hot(ThinvmSim *sim)
{
    ThinvmStore *owner, *follower;
    ThinvmStorePreload p = {};
    uint32_t hot[LEAVES + 2] = { UINT32_MAX, LEAVES };  /* not on the disk */
    unsigned nb = 2, wrong = 0;
    uint64_t bytes;

    image_create(sim, VIRTUAL_SIZE);
    owner = image_open(sim);
    write_widely(sim, owner, 0, 1000);
    store_close(owner, true);
    owner = image_open(sim);
    expect_widely(sim, owner, 0, 1000);
    for (int i = 0; i < 3; i++) {
        g_autoptr(GArray) found = sample_heat(owner);

        g_assert_cmpuint(found->len, ==, LEAVES);
        use_hot(sim, owner);
    }
    {
        g_autoptr(GArray) found = sample_heat(owner);

        for (unsigned i = 0; i < DIV_ROUND_UP(LEAVES, 3) - 1; i++) {
            hot[nb] = g_array_index(found, ThinvmHotLeaf, i).leaf;
            wrong += !is_hot(hot[nb++]);
        }
    }
    g_assert_cmpuint(wrong, ==, 0);

    follower = thinvm_store_open(sim_device(sim), 100 * THINVM_PAGE_SIZE,
                                 &error_abort);
    preload(follower, &p);
    g_assert_cmpint(p.state, ==, THINVM_STORE_PRELOAD_FULL);
    thinvm_store_preload_hot(&p, hot, nb);
    preload(follower, &p);
    g_assert_cmpint(p.state, ==, THINVM_STORE_PRELOAD_FULL);
    g_assert_cmpuint(p.percent, <=, 100);
    bytes = stats_of(follower).metadata_bytes_read;
    use_hot(sim, follower);
    g_assert_cmpuint(stats_of(follower).metadata_bytes_read - bytes, <=,
                     2 * THINVM_PAGE_SIZE);
    thinvm_store_free(follower);
    store_close(owner, true);
}

/* A page that cannot be read just now: tried again when told to */
static void coroutine_fn test_preload_error(ThinvmSim *sim)
{
    ThinvmStore *owner, *follower;
    ThinvmStorePreload p = {};

    image_create(sim, VIRTUAL_SIZE);
    owner = image_open(sim);
    write_widely(sim, owner, 0, 1000);
    store_close(owner, true);
    follower = thinvm_store_open(sim_device(sim), 0, &error_abort);
    sim_fail(sim, SIM_READ, 0, UINT64_MAX, 2, EIO, true);
    preload(follower, &p);
    g_assert(sim_has_failed(sim));
    g_assert_cmpint(p.state, ==, THINVM_STORE_PRELOAD_FAILED);
    sim_fail(sim, 0, 0, 0, 0, 0, false);
    thinvm_store_preload_retry(&p);
    preload(follower, &p);
    g_assert_cmpint(p.state, ==, THINVM_STORE_PRELOAD_COMPLETE);
    expect_widely(sim, follower, 0, 1000);
    thinvm_store_free(follower);
}

/*
 * The owner's checkpoints move on all the time, the last one right before the
 * hand-over: what memory has stays, as far as it is the same.
 */
static void coroutine_fn test_adopt(ThinvmSim *sim)
{
    ThinvmStore *owner, *follower;
    ThinvmStorePreload p = {};
    uint64_t bytes, before;

    image_create(sim, VIRTUAL_SIZE);
    owner = image_open(sim);
    for (unsigned i = 0; i < 8; i++) {
        write_widely(sim, owner, i, 1000 * (i + 1));
    }
    thinvm_store_checkpoint(owner);
    follower = thinvm_store_open(sim_device(sim), 0, &error_abort);
    preload(follower, &p);
    for (unsigned i = 0; i < 12; i++) {
        /* a few leaves of many are changed, then a base is written */
        for (unsigned j = 0; j < 10; j++) {
            write_one(sim, owner, (i * 10 + j) % LEAVES *
                      THINVM_ENTRIES_PER_LEAF + 9, 50000 + i * 10 + j);
        }
        flush(owner);
        follow(follower, true);
        thinvm_store_checkpoint(owner);
        before = stats_of(follower).metadata_bytes_read;
        thinvm_store_follow_base(follower, &error_abort);
        g_assert_cmpuint(stats_of(follower).fresh_starts, ==, i + 1);
        /* inner pages and the space map, but none of the leaves */
        g_assert_cmpuint(stats_of(follower).metadata_bytes_read - before, <=,
                         1100 * KiB);
        before = p.pages;
        preload(follower, &p);
        g_assert_cmpuint(p.pages - before, <=, 2);
    }
    g_assert_cmpuint(stats_of(follower).adopted_pages, >=, 12 * LEAVES);

    /* and one that the follower has not seen when it takes over */
    write_widely(sim, owner, 10, 90000);
    flush(owner);
    follow(follower, true);
    store_close(owner, true);
    take_over(follower);
    bytes = stats_of(follower).metadata_bytes_read;
    for (unsigned i = 0; i < 8; i++) {
        expect_widely(sim, follower, i, 1000 * (i + 1));
    }
    expect_widely(sim, follower, 10, 90000);
    g_assert_cmpuint(stats_of(follower).metadata_bytes_read - bytes, ==, 0);
    write_widely(sim, follower, 11, 70000);
    image_recount(sim, follower);
    image_check(follower);
    store_close(follower, true);
}

typedef struct Overtaker {
    ThinvmSim *sim;
    ThinvmStore *owner;
    unsigned wait;
    bool done;
} Overtaker;

static void coroutine_fn overtaker_entry(void *opaque)
{
    Overtaker *o = opaque;

    for (unsigned i = 0; i < o->wait; i++) {
        sim_yield(o->sim);
    }
    for (unsigned i = 0; i < 2; i++) {
        write_one(o->sim, o->owner, i * THINVM_ENTRIES_PER_LEAF + 11, 77);
        flush(o->owner);
        thinvm_store_checkpoint(o->owner);
    }
    o->done = true;
    sim_finish(o->sim);
}

/*
 * Checkpoints that come while the follower goes over to the one before them:
 * the base on which it begins again is of a history that it has not seen.
 */
static void coroutine_fn test_adopt_overtaken(ThinvmSim *sim)
{
    for (unsigned wait = 0; wait < 60; wait += 2) {
        Overtaker o = { sim, NULL, wait };
        ThinvmStorePreload p = {};
        ThinvmStore *follower;
        uint64_t before;

        image_create(sim, VIRTUAL_SIZE);
        o.owner = image_open(sim);
        follower = thinvm_store_open(sim_device(sim), 0, &error_abort);
        write_widely(sim, o.owner, 0, 1000);
        flush(o.owner);
        follow(follower, true);
        thinvm_store_checkpoint(o.owner);
        sim_start(sim, overtaker_entry, &o);
        thinvm_store_follow_base(follower, &error_abort);
        while (!o.done) {
            sim_yield(sim);
        }
        thinvm_store_follow_base(follower, &error_abort);
        before = p.pages;
        preload(follower, &p);
        g_assert_cmpuint(p.pages - before, <=, 4);
        expect_widely(sim, follower, 0, 1000);
        thinvm_store_free(follower);
        store_close(o.owner, false);
    }
}

/*
 * Two that take turns, each with what it has in memory: nothing of what one
 * held ready for itself may get in the other's way.
 */
static void coroutine_fn test_turns(ThinvmSim *sim)
{
    ThinvmStorePreload p[2] = {};
    ThinvmStore *st[2];

    image_create(sim, VIRTUAL_SIZE);
    st[0] = image_open(sim);
    st[1] = thinvm_store_open(sim_device(sim), 0, &error_abort);
    /* so little that no base is written: memory goes on as it is */
    for (uint64_t i = 0; i < 10; i++) {
        ThinvmStore *owner = st[i % 2], *other = st[1 - i % 2];

        write_one(sim, owner, 40000 + i, i + 1);
        thinvm_store_end_writing(owner, false, &error_abort);
        thinvm_store_catch_up(other, NULL, &error_abort);
        take_over(other);
        g_assert_cmpuint(stats_of(other).fresh_starts, ==, 0);
    }
    image_recount(sim, st[0]);
    for (unsigned turn = 0; turn < 12; turn++) {
        ThinvmStore *owner = st[turn % 2], *other = st[1 - turn % 2];

        write_widely(sim, owner, turn, 1000 * (turn + 1));
        if (turn % 3 == 1) {
            thinvm_store_checkpoint(owner);
        }
        if (turn % 4 == 2) {
            /* what is freed may be used by the next one */
            thinvm_store_unmap(owner, THINVM_TREE_DISK, 0, LEAVES / 2 *
                               THINVM_ENTRIES_PER_LEAF, THINVM_SOURCE_ZERO,
                               NULL, &error_abort);
            for (unsigned i = 0; i <= turn; i++) {
                write_widely(sim, owner, i, 1000 * (i + 1));
            }
        }
        preload(other, &p[1 - turn % 2]);
        thinvm_store_end_writing(owner, false, &error_abort);
        thinvm_store_catch_up(other, NULL, &error_abort);
        take_over(other);
        for (unsigned i = 0; i <= turn; i++) {
            expect_widely(sim, other, i, 1000 * (i + 1));
        }
    }
    image_recount(sim, st[0]);
    image_check(st[0]);
    thinvm_store_free(st[1]);
    store_close(st[0], true);
}

static void coroutine_fn expect_end_of(ThinvmStore *next, ThinvmStore *owner)
{
    uint64_t sequence;
    uint32_t crc;

    thinvm_store_journal_end(owner, &sequence, &crc);
    thinvm_store_expect_end(next, sequence, crc);
}

/*
 * An owner has said where his journal ends.  Taking over costs one read of it,
 * two of superblocks, a flush and a write; and who wrote behind that end is
 * found all the same.
 */
static void coroutine_fn test_known_end(ThinvmSim *sim)
{
    ThinvmStore *st[3];
    uint64_t reads, flushes, writes, epoch;
    Error *local_err = NULL;

    image_create(sim, VIRTUAL_SIZE);
    st[0] = image_open(sim);
    write_widely(sim, st[0], 0, 1000);
    flush(st[0]);
    for (unsigned i = 1; i < 3; i++) {
        st[i] = thinvm_store_open(sim_device(sim), 0, &error_abort);
        expect_widely(sim, st[i], 0, 1000);
        follow(st[i], false);
    }
    write_one(sim, st[0], 1, 11);
    write_one(sim, st[0], 2, 12);
    flush(st[0]);
    flushes = sim_count(sim, SIM_FLUSH);
    thinvm_store_hand_over(st[0], &error_abort);
    g_assert_cmpuint(sim_count(sim, SIM_FLUSH), ==, flushes);

    epoch = info_of(st[1]).epoch;
    reads = sim_count(sim, SIM_READ);
    writes = sim_count(sim, SIM_WRITE);
    expect_end_of(st[1], st[0]);
    g_assert(!thinvm_store_at_end(st[1]));
    thinvm_store_begin_writing(st[1], epoch + 1, &error_abort);
    g_assert_cmpuint(sim_count(sim, SIM_READ), ==, reads + 3);
    g_assert_cmpuint(sim_count(sim, SIM_WRITE), ==, writes + 1);
    g_assert_cmpuint(sim_count(sim, SIM_FLUSH), ==, flushes + 1);
    g_assert_cmpuint(stats_of(st[1]).fresh_starts, ==, 0);
    g_assert_cmpuint(image_read_tag(sim, st[1], 2), ==, 12);

    /* one who is late believes the former owner, and finds records of another */
    write_one(sim, st[1], 3, 13);
    thinvm_store_end_writing(st[1], false, &error_abort);
    expect_end_of(st[2], st[0]);
    follow(st[2], true);
    g_assert(!thinvm_store_at_end(st[2]));
    g_assert_cmpint(thinvm_store_begin_writing(st[2], epoch + 2, &local_err),
                    ==, -EBADMSG);
    error_free_or_abort(&local_err);

    /* the same if he had arrived at that end before */
    thinvm_store_begin_writing(st[0], epoch + 3, &error_abort);
    write_one(sim, st[0], 4, 14);
    thinvm_store_end_writing(st[0], false, &error_abort);
    follow(st[2], true);
    expect_end_of(st[2], st[0]);
    g_assert(thinvm_store_at_end(st[2]));
    thinvm_store_begin_writing(st[1], epoch + 4, &error_abort);
    thinvm_store_end_writing(st[1], false, &error_abort);
    g_assert_cmpint(thinvm_store_begin_writing(st[2], epoch + 5, &local_err),
                    ==, -EBADMSG);
    error_free_or_abort(&local_err);
    thinvm_store_begin_writing(st[2], epoch + 5, &error_abort);
    image_recount(sim, st[2]);
    image_check(st[2]);
    thinvm_store_free(st[0]);
    thinvm_store_free(st[1]);
    store_close(st[2], true);
}

/*
 * A base of another history, in which a record that we had followed does not
 * exist: none of what that record changed is taken over.
 */
static void coroutine_fn test_adopt_cut_off(ThinvmSim *sim)
{
    ThinvmStore *owner, *follower;
    ThinvmStorePreload p = {};
    uint64_t at;

    image_create(sim, VIRTUAL_SIZE);
    owner = image_open(sim);
    write_widely(sim, owner, 0, 1000);
    thinvm_store_checkpoint(owner);
    follower = thinvm_store_open(sim_device(sim), 0, &error_abort);
    preload(follower, &p);
    at = head_of(owner);
    write_one(sim, owner, 5, 4711);
    write_one(sim, owner, 7, 4712);
    thinvm_store_commit(owner, THINVM_COMMIT_RECORD, true);
    follow(follower, true);
    g_assert_cmpuint(image_read_tag(sim, follower, 5), ==, 4711);
    store_die(owner);
    flip(sim, at);
    owner = image_open(sim);
    write_one(sim, owner, 6, 6000);
    thinvm_store_checkpoint(owner);
    thinvm_store_follow_base(follower, &error_abort);
    g_assert_cmpuint(image_read_tag(sim, follower, 5), ==, TAG_ZERO);
    g_assert_cmpuint(image_read_tag(sim, follower, 7), ==, TAG_ZERO);
    g_assert_cmpuint(image_read_tag(sim, follower, 6), ==, 6000);
    expect_widely(sim, follower, 0, 1000);
    store_close(owner, false);
    take_over(follower);
    expect_widely(sim, follower, 0, 1000);
    image_recount(sim, follower);
    store_close(follower, true);
}

/* ------------------------------------------------------------------ */

typedef struct Reader {
    ThinvmSim *sim;
    ThinvmStore *st;
    uint64_t tag;
    bool done;
} Reader;

static void coroutine_fn reader_entry(void *opaque)
{
    Reader *r = opaque;
    g_autofree uint8_t *buf = g_malloc(IMAGE_CLUSTER);

    image_dawdle = 5000;
    g_assert_cmpint(image_follow(r->sim, r->st, 0, buf), ==, 0);
    r->tag = image_tag(buf, 0);
    r->done = true;
    sim_finish(r->sim);
}

static uint64_t coroutine_fn place_of(ThinvmStore *st, uint64_t guest)
{
    unsigned token = thinvm_store_request_begin(st);
    ThinvmMapping m;

    g_assert_cmpint(thinvm_store_lookup(st, 0, NULL, guest, 1, false, &m), ==,
                    0);
    g_assert_cmpint(m.type, ==, THINVM_MAPPING_DATA);
    thinvm_store_request_end(st, token);
    return m.physical;
}

/* The owner gives guest cluster 0's place to guest cluster 900 */
static void coroutine_fn reuse(ThinvmSim *sim, ThinvmStore *owner)
{
    uint64_t place = place_of(owner, 0);

    thinvm_store_unmap(owner, 0, 0, 1, THINVM_SOURCE_ZERO, NULL, &error_abort);
    flush(owner);
    thinvm_store_reclaim(owner, false);
    for (uint64_t guest = 900; guest == 900 ||
         place_of(owner, guest - 1) != place; guest++) {
        g_assert_cmpuint(guest, <, 1200);
        write_one(sim, owner, guest, 99);
    }
    flush(owner);
}

/* What a read returns whose cluster changes hands while it lasts */
static uint64_t coroutine_fn read_meanwhile(ThinvmSim *sim)
{
    Reader r = { sim };
    ThinvmStore *owner;

    image_create(sim, VIRTUAL_SIZE);
    owner = image_open(sim);
    write_one(sim, owner, 0, 11);
    flush(owner);
    r.st = thinvm_store_open(sim_device(sim), 0, &error_abort);
    sim_start(sim, reader_entry, &r);
    for (int i = 0; i < 30; i++) {
        sim_yield(sim);         /* it has caught up and looked up */
    }
    reuse(sim, owner);
    /* another reader: now nothing is left for the first one's catch-up */
    follow(r.st, true);
    g_assert_false(r.done);
    while (!r.done) {
        sim_yield(sim);
    }
    store_close(owner, false);
    thinvm_store_free(r.st);
    return r.tag;
}

/* Another reader's catch-up does not hide that a cluster was freed */
static void coroutine_fn test_follow_hidden(ThinvmSim *sim)
{
    g_assert_cmpuint(read_meanwhile(sim), ==, TAG_ZERO);
    /* It would, if only one's own catch-up counted: else this shows nothing */
    image_fault = IMAGE_FAULT_HIDDEN;
    g_assert_cmpuint(read_meanwhile(sim), ==, TAG_FOREIGN);
    image_fault = IMAGE_FAULT_NONE;
}

/* What a follower has in quarantine the owner may have used again */
static void coroutine_fn test_follow_quarantine(ThinvmSim *sim)
{
    ThinvmStore *owner, *follower;
    uint64_t discarded;
    unsigned token;

    image_create(sim, VIRTUAL_SIZE);
    owner = image_open(sim);
    write_one(sim, owner, 0, 11);
    flush(owner);
    follower = thinvm_store_open(sim_device(sim), 0, &error_abort);
    thinvm_store_set_discard(follower, true);
    /* a request that lasts keeps it there */
    token = thinvm_store_request_begin(follower);
    reuse(sim, owner);
    follow(follower, true);
    g_assert_cmpuint(follower->quarantined_ranges, >, 0);
    store_close(owner, false);
    discarded = sim_discarded(sim);
    take_over(follower);
    thinvm_store_request_end(follower, token);
    for (int i = 0; i < 3; i++) {
        write_one(sim, follower, 5000 + i, 5);
        flush(follower);
        thinvm_store_reclaim(follower, true);
    }
    g_assert_cmpuint(sim_discarded(sim), ==, discarded);
    g_assert_cmpuint(image_read_tag(sim, follower, 900), ==, 99);
    image_recount(sim, follower);
    image_check(follower);
    store_close(follower, true);
}

/* ------------------------------------------------------------------ */

typedef struct Releaser {
    ThinvmStore *st;
    int thread;                 /* its id, once it runs */
} Releaser;

static void coroutine_fn release_entry(void *opaque)
{
    Releaser *r = opaque;

    qatomic_set(&r->thread, qemu_get_thread_id());
    thinvm_store_reclaim(r->st, false);
}

static void *release_thread(void *opaque)
{
    qemu_coroutine_enter(qemu_coroutine_create(release_entry, opaque));
    return NULL;
}

/* Does that thread of ours wait for something? */
static bool sleeps(int thread)
{
    g_autofree char *path = g_strdup_printf("/proc/self/task/%d/stat", thread);
    g_autofree char *text = NULL;
    const char *state;

    if (!thread || !g_file_get_contents(path, &text, NULL, NULL)) {
        return false;
    }
    state = strrchr(text, ')');
    return state && state[2] == 'S';
}

/*
 * A follower's thread is about to make a freed cluster usable; another one,
 * which has the state lock, makes the node the owner.  Whoever comes first,
 * the cluster is not made usable by what was decided before: the new owner
 * may have mapped and freed it again.
 */
static void coroutine_fn test_release_in_one_step(ThinvmSim *sim)
{
    ThinvmStore *owner, *follower;
    Releaser r = {};
    QemuThread thread;
    unsigned token;

    image_create(sim, VIRTUAL_SIZE);
    owner = image_open(sim);
    write_one(sim, owner, 0, 1);
    flush(owner);
    follower = thinvm_store_open(sim_device(sim), 0, &error_abort);
    token = thinvm_store_request_begin(follower);
    thinvm_store_unmap(owner, 0, 0, 1, THINVM_SOURCE_ZERO, NULL, &error_abort);
    flush(owner);
    follow(follower, true);
    g_assert_cmpuint(qatomic_read(&follower->quarantined_ranges), ==, 1);
    thinvm_store_request_end(follower, token);

    r.st = follower;
    thinvm_state_lock(follower->state);
    qemu_thread_create(&thread, "release", release_thread, &r,
                       QEMU_THREAD_JOINABLE);
    while (!sleeps(qatomic_read(&r.thread))) {
        g_thread_yield();
    }
    g_assert_cmpuint(qatomic_read(&follower->quarantined_ranges), ==, 1);
    qatomic_set(&follower->mode, THINVM_STORE_WRITING);
    thinvm_state_unlock(follower->state);
    qemu_thread_join(&thread);
    g_assert_cmpuint(qatomic_read(&follower->quarantined_ranges), ==, 1);

    qatomic_set(&follower->mode, THINVM_STORE_READING);
    thinvm_store_reclaim(follower, false);
    g_assert_cmpuint(qatomic_read(&follower->quarantined_ranges), ==, 0);
    thinvm_store_free(follower);
    store_close(owner, true);
}

/* Somebody makes another image in the place of the one that we follow */
static void coroutine_fn test_replaced(ThinvmSim *sim)
{
    g_autoptr(Error) err = NULL;
    ThinvmStore *owner, *follower;

    image_create(sim, VIRTUAL_SIZE);
    owner = image_open(sim);
    write_one(sim, owner, 1, 11);
    flush(owner);
    follower = thinvm_store_open(sim_device(sim), 0, &error_abort);
    follow(follower, false);
    store_close(owner, true);
    follow(follower, false);

    image_create(sim, VIRTUAL_SIZE);
    g_assert_cmpint(thinvm_store_follow_base(follower, &err), <, 0);
    g_assert(strstr(error_get_pretty(err), "another image"));
    error_free(g_steal_pointer(&err));
    /* And so does each look-up, although the ring may look as it did */
    for (int i = 0; i < 2; i++) {
        g_assert_cmpint(thinvm_store_catch_up(follower, NULL, &err), <, 0);
        g_assert(strstr(error_get_pretty(err), "another image"));
        error_free(g_steal_pointer(&err));
    }
    thinvm_store_free(follower);
}

/*
 * The device as another node sees it: it remembers how long the device was when
 * it last asked, reads zeroes beyond that, and may be told a wrong length.
 */
typedef struct OtherNode {
    ThinvmDevice device;
    ThinvmDevice *real;
    uint64_t known, told, beyond;
} OtherNode;

static int coroutine_fn other_pread(ThinvmDevice *dev, uint64_t offset,
                                    uint64_t bytes, void *buf)
{
    OtherNode *n = container_of(dev, OtherNode, device);
    uint64_t within = offset < n->known ? MIN(bytes, n->known - offset) : 0;
    int ret = n->real->co_pread(n->real, offset, bytes, buf);

    memset((uint8_t *)buf + within, 0, bytes - within);
    n->beyond += offset + bytes > DEVICE_SIZE;
    return ret;
}

static int64_t coroutine_fn other_length(ThinvmDevice *dev)
{
    OtherNode *n = container_of(dev, OtherNode, device);

    n->known = MIN(n->told, n->real->co_length(n->real));
    return n->known;
}

/* One cluster in each of many leaves; the base moves on time and again */
static void coroutine_fn write_many(ThinvmSim *sim, ThinvmStore *st,
                                    uint64_t leaves)
{
    for (uint64_t i = 0; i < leaves; i++) {
        write_one(sim, st, i * THINVM_ENTRIES_PER_LEAF, i + 1);
        if (i % 100 == 99) {
            thinvm_store_checkpoint(st);
            thinvm_store_extend_metadata(st);
        }
    }
    thinvm_store_commit(st, THINVM_COMMIT_DURABLE, true);
}

/* The owner makes the device longer; its metadata lies there, too */
static void coroutine_fn test_longer(ThinvmSim *sim)
{
    const uint64_t leaves = 2000;
    OtherNode n = {
        .real = sim_device(sim),
        .told = UINT64_MAX,
        .device = { .co_pread = other_pread, .co_length = other_length },
    };
    g_autoptr(Error) err = NULL;
    ThinvmStore *owner, *follower;

    image_create(sim, 32 * GiB);
    owner = image_open(sim);
    write_one(sim, owner, 0, 1);
    flush(owner);
    other_length(&n.device);
    follower = thinvm_store_open(&n.device, 0, &error_abort);
    follow(follower, false);
    write_many(sim, owner, leaves);
    g_assert_cmpuint(sim_length(sim), >, 2 * DEVICE_SIZE);
    follow(follower, true);
    for (uint64_t i = 0; i < leaves; i++) {
        g_assert_cmpuint(image_read_tag(sim, follower,
                                        i * THINVM_ENTRIES_PER_LEAF), ==,
                         i + 1);
    }
    g_assert_cmpuint(n.beyond, >, 0);

    /* Our host has not been told that there is more now: says so, each time */
    n.told = sim_length(sim);
    for (uint64_t i = 0; sim_length(sim) == n.told; i++) {
        write_one(sim, owner, i + 1, i + 1);
    }
    flush(owner);
    for (int i = 0; i < 2; i++) {
        g_assert_cmpint(thinvm_store_catch_up(follower, NULL, &err), <, 0);
        g_assert(strstr(error_get_pretty(err), "must be rescanned"));
        error_free(g_steal_pointer(&err));
    }
    n.told = UINT64_MAX;
    thinvm_store_catch_up(follower, NULL, &error_abort);
    g_assert_cmpuint(image_read_tag(sim, follower, 1), ==, 1);
    store_close(owner, true);
    thinvm_store_free(follower);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    qemu_init_main_loop(&error_abort);
    module_call_init(MODULE_INIT_TRACE);

    add("/thinvm/follow/owner", test_follow);
    add("/thinvm/follow/cut-off", test_follow_cut_off);
    add("/thinvm/follow/hidden", test_follow_hidden);
    add("/thinvm/follow/replaced", test_replaced);
    add("/thinvm/follow/longer", test_longer);
    add("/thinvm/follow/quarantine", test_follow_quarantine);
    add("/thinvm/follow/release-in-one-step", test_release_in_one_step);
    add("/thinvm/follow/preload", test_preload);
    add("/thinvm/follow/preload-small", test_preload_small);
    add("/thinvm/follow/preload-hot", test_preload_hot);
    add("/thinvm/follow/preload-error", test_preload_error);
    add("/thinvm/follow/adopt", test_adopt);
    add("/thinvm/follow/adopt-overtaken", test_adopt_overtaken);
    add("/thinvm/follow/turns", test_turns);
    add("/thinvm/follow/known-end", test_known_end);
    add("/thinvm/follow/adopt-cut-off", test_adopt_cut_off);
    return g_test_run();
}
