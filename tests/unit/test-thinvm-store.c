/*
 * Unit tests of thinvm's durability layer on a simulated device
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Each test is a coroutine on a device of its own.  Power cuts at every
 * point under random load are test-thinvm-crash.c's subject; here is what
 * can be said of single steps.
 */
#include "qemu/osdep.h"
#include "thinvm-store-test.h"

/* ------------------------------------------------------------------ */

static void coroutine_fn test_create(ThinvmSim *sim)
{
    ThinvmStore *st;
    ThinvmInfoState info;

    must_fail_to_open(sim, "");
    image_create(sim, VIRTUAL_SIZE);
    st = thinvm_store_open(sim_device(sim), 0, &error_abort);
    info = info_of(st);
    g_assert_cmpuint(info.virtual_size, ==, VIRTUAL_SIZE);
    g_assert_cmpuint(info.device_clusters, ==, DEVICE_SIZE / IMAGE_CLUSTER);
    g_assert_cmpuint(info.allocated_clusters, ==, 0);
    g_assert_false(thinvm_store_writable(st));
    g_assert_cmpuint(image_read_tag(sim, st, 0), ==, TAG_ZERO);
    g_assert_cmpuint(sim_count(sim, SIM_DISCARD), ==, 0);
    thinvm_store_free(st);
}

/* Claims and superblocks of whatever was there are gone; data is not touched */
static void coroutine_fn test_create_erases(ThinvmSim *sim)
{
    uint8_t before[SIM_BLOCK], after[SIM_BLOCK];

    image_create(sim, VIRTUAL_SIZE);
    sim_peek(sim, DEVICE_SIZE - SIM_BLOCK, SIM_BLOCK, before);
    image_create(sim, VIRTUAL_SIZE);
    for (int i = 0; i < THINVM_NB_CLAIMS; i++) {
        sim_peek(sim, THINVM_CLAIM_OFFSET + i * SIM_BLOCK, SIM_BLOCK, after);
        g_assert_true(buffer_is_zero(after, SIM_BLOCK));
        sim_peek(sim, THINVM_HEARTBEAT_OFFSET + i * SIM_BLOCK, SIM_BLOCK,
                 after);
        g_assert_true(buffer_is_zero(after, SIM_BLOCK));
    }
    sim_peek(sim, THINVM_SUPERBLOCK1_OFFSET, SIM_BLOCK, after);
    g_assert_true(buffer_is_zero(after, SIM_BLOCK));
    sim_peek(sim, DEVICE_SIZE - SIM_BLOCK, SIM_BLOCK, after);
    g_assert_cmpmem(before, SIM_BLOCK, after, SIM_BLOCK);
}

static void expect_bad_params(ThinvmCreateParams params, const char *why)
{
    Error *err = NULL;

    g_assert_false(thinvm_create_params_check(&params, &err));
    g_assert_nonnull(strstr(error_get_pretty(err), why));
    error_free(err);
}

static void test_create_params(void)
{
    const ThinvmCreateParams good = {
        .virtual_size = 64ULL << 40,
        .cluster_size = 64 * KiB,
        .journal_size = 16 * MiB,
    };
    ThinvmCreateParams p;

    g_assert_true(thinvm_create_params_check(&good, &error_abort));
    p = good;
    p.cluster_size = 8 * KiB;
    expect_bad_params(p, "cluster_size 8192");
    p.cluster_size = 4 * MiB;
    expect_bad_params(p, "cluster_size 4194304");
    p.cluster_size = 96 * KiB;
    expect_bad_params(p, "power of two");
    p = good;
    p.journal_size = 512 * KiB;
    expect_bad_params(p, "journal_size 524288");
    p.journal_size = 2 * GiB;
    expect_bad_params(p, "journal_size");
    p.journal_size = MiB + 512;
    expect_bad_params(p, "4 KiB");
    p = good;
    p.virtual_size = 1000;
    expect_bad_params(p, "512");
    p.virtual_size = THINVM_MAX_VIRTUAL_SIZE + 512;
    expect_bad_params(p, "too large");
}

/* A device that cannot grow to the minimum is left as it is */
static void coroutine_fn test_too_small(ThinvmSim *sim)
{
    ThinvmCreateParams params = {
        .virtual_size = VIRTUAL_SIZE,
        .cluster_size = IMAGE_CLUSTER,
        .journal_size = 1 * MiB,
    };
    Error *err = NULL;

    sim_truncate(sim, 1 * MiB);
    sim_fail(sim, SIM_GROW, 0, 0, 0, ENOSPC, false);
    g_assert_cmpint(thinvm_store_create(sim_device(sim), &params, &err), ==,
                    -ENOSPC);
    g_assert_nonnull(strstr(error_get_pretty(err), "1048576 bytes"));
    error_free(err);
    g_assert_cmpuint(sim_count(sim, SIM_WRITE), ==, 0);
    sim_fail(sim, 0, 0, 0, 0, 0, false);
    g_assert_cmpint(thinvm_store_create(sim_device(sim), &params,
                                        &error_abort), ==, 0);
}

/* ------------------------------------------------------------------ */

static void coroutine_fn test_replay(ThinvmSim *sim)
{
    ThinvmStore *st;

    image_create(sim, VIRTUAL_SIZE);
    st = image_open(sim);
    for (uint64_t i = 0; i < 50; i++) {
        g_assert_cmpint(write_one(sim, st, i * 700, i + 1), ==, 0);
        if (i % 7 == 0) {
            g_assert_cmpint(flush(st), ==, 0);
        }
    }
    g_assert_cmpint(flush(st), ==, 0);
    g_assert_cmpuint(stats_of(st).records, ==, 9);
    store_die(st);

    st = image_open(sim);
    for (uint64_t i = 0; i < 50; i++) {
        g_assert_cmpuint(image_read_tag(sim, st, i * 700), ==, i + 1);
    }
    image_recount(sim, st);
    image_check(st);
    store_close(st, false);
}

/* What was not committed is gone; its clusters are free */
static void coroutine_fn test_uncommitted(ThinvmSim *sim)
{
    ThinvmStore *st;

    image_create(sim, VIRTUAL_SIZE);
    st = image_open(sim);
    write_one(sim, st, 1, 11);
    flush(st);
    write_one(sim, st, 2, 22);
    store_die(st);
    st = image_open(sim);
    g_assert_cmpuint(image_read_tag(sim, st, 1), ==, 11);
    g_assert_cmpuint(image_read_tag(sim, st, 2), ==, TAG_ZERO);
    image_recount(sim, st);
    image_check(st);
    store_close(st, true);
}

static void coroutine_fn test_refused(ThinvmSim *sim)
{
    ThinvmOp op = { .type = THINVM_OP_RESIZE, .value = 4096 };
    ThinvmStore *st;
    Error *err = NULL;
    uint64_t first, nb;

    image_create(sim, VIRTUAL_SIZE);
    st = thinvm_store_open(sim_device(sim), 0, &error_abort);
    g_assert_cmpint(thinvm_store_execute(st, &op, NULL, &err), ==, -EROFS);
    error_free_or_abort(&err);
    g_assert_cmpint(thinvm_store_reserve(st, 0, 1, &first, &nb), ==, -EROFS);
    g_assert_cmpint(thinvm_store_checkpoint(st), ==, -EROFS);
    g_assert_cmpint(thinvm_store_begin_writing(st, 5, &error_abort), ==, 0);
    g_assert_cmpint(thinvm_store_begin_writing(st, 6, &err), ==, -EBUSY);
    error_free_or_abort(&err);
    store_close(st, false);

    /* epochs only go up */
    st = thinvm_store_open(sim_device(sim), 0, &error_abort);
    g_assert_cmpint(thinvm_store_begin_writing(st, 5, &err), ==, -EINVAL);
    g_assert_nonnull(strstr(error_get_pretty(err), "poch"));
    error_free(err);
    g_assert_cmpint(thinvm_store_begin_writing(st, 6, &error_abort), ==, 0);
    write_one(sim, st, 1, 11);
    thinvm_store_poison(st);
    g_assert_cmpint(write_one(sim, st, 2, 22), ==, -EIO);
    g_assert_cmpint(flush(st), ==, -EIO);
    store_die(st);
    st = image_open(sim);
    g_assert_cmpuint(image_read_tag(sim, st, 1), ==, TAG_ZERO);
    store_close(st, false);
}

static void coroutine_fn test_truncated(ThinvmSim *sim)
{
    ThinvmStore *st;
    Error *err = NULL;
    uint64_t writes;

    image_create(sim, VIRTUAL_SIZE);
    st = thinvm_store_open(sim_device(sim), 0, &error_abort);
    sim_truncate(sim, DEVICE_SIZE - SIM_BLOCK);
    writes = sim_count(sim, SIM_WRITE);
    g_assert_cmpint(thinvm_store_begin_writing(st, 1, &err), ==, -EINVAL);
    error_free_or_abort(&err);
    thinvm_store_free(st);
    must_fail_to_open(sim, "truncated");
    g_assert_cmpuint(sim_count(sim, SIM_WRITE), ==, writes);
    sim_truncate(sim, DEVICE_SIZE);
    st = image_open(sim);
    store_close(st, true);
}

/* ------------------------------------------------------------------ */

static void coroutine_fn test_checkpoint(ThinvmSim *sim)
{
    ThinvmStore *st;
    uint64_t used;

    image_create(sim, VIRTUAL_SIZE);
    st = image_open(sim);
    for (uint64_t i = 0; i < 40; i++) {
        write_one(sim, st, i * 513, i + 1);
        if (i % 10 == 9) {
            g_assert_cmpint(thinvm_store_checkpoint(st), ==, 0);
            g_assert_cmpuint(info_of(st).dirty_pages, ==, 0);
        }
    }
    g_assert_cmpuint(stats_of(st).checkpoints, ==, 4);
    /* The ring is kept since the older base; another one, and it is empty */
    used = stats_of(st).journal_used;
    g_assert_cmpuint(used, >, 0);
    g_assert_cmpint(thinvm_store_checkpoint(st), ==, 0);
    g_assert_cmpuint(stats_of(st).journal_used, ==, 0);
    g_assert_cmpint(thinvm_store_checkpoint(st), ==, 0);
    g_assert_cmpuint(stats_of(st).checkpoints, ==, 5);
    store_die(st);

    st = image_open(sim);
    for (uint64_t i = 0; i < 40; i++) {
        g_assert_cmpuint(image_read_tag(sim, st, i * 513), ==, i + 1);
    }
    image_recount(sim, st);
    image_check(st);
    store_close(st, true);
}

/* Either superblock may be damaged: the other base and the journal do */
static void coroutine_fn test_fallback(ThinvmSim *sim)
{
    ThinvmStore *st;
    uint64_t tag = 1;

    image_create(sim, VIRTUAL_SIZE);
    for (int round = 0; round < 6; round++) {
        ThinvmSuperblock newest, older;
        bool has_older;

        st = image_open(sim);
        for (uint64_t i = 0; i < 10; i++) {
            write_one(sim, st, i * 600 + round, tag++);
        }
        thinvm_store_checkpoint(st);
        write_one(sim, st, 9999, tag++);
        flush(st);
        thinvm_store_checkpoint(st);
        write_one(sim, st, 8888, tag++);
        flush(st);
        store_die(st);
        g_assert_cmpint(thinvm_store_probe(sim_device(sim), &newest, &older,
                                           &has_older, &error_abort), ==, 0);
        g_assert_true(has_older);
        g_assert_cmpuint(newest.generation, ==, older.generation + 1);
        flip(sim, round & 1 ? THINVM_SUPERBLOCK0_OFFSET + 100 :
                              THINVM_SUPERBLOCK1_OFFSET + 100);

        st = image_open(sim);
        g_assert_cmpuint(image_read_tag(sim, st, 8888), ==, tag - 1);
        g_assert_cmpuint(image_read_tag(sim, st, 9999), ==, tag - 2);
        g_assert_cmpuint(image_read_tag(sim, st, 5400 + round), ==, tag - 3);
        image_recount(sim, st);
        image_check(st);
        /* the damaged one is erased before its base's pages are reused */
        thinvm_store_checkpoint(st);
        thinvm_store_checkpoint(st);
        image_recount(sim, st);
        image_check(st);
        store_close(st, true);
    }
}

/* Features that we do not know and must not let stand once we write */
static void coroutine_fn test_autoclear(ThinvmSim *sim)
{
    uint8_t page[SIM_BLOCK];
    ThinvmSuperblock sb, older;
    bool has_older;
    ThinvmStore *st;

    image_create(sim, VIRTUAL_SIZE);
    st = image_open(sim);
    thinvm_store_checkpoint(st);
    store_close(st, true);
    for (int slot = 0; slot < THINVM_NB_SUPERBLOCKS; slot++) {
        uint64_t at = thinvm_superblock_offset(slot);

        sim_peek(sim, at, SIM_BLOCK, page);
        g_assert_cmpint(thinvm_superblock_decode(&sb,
                                                 (ThinvmSuperblockLe *)page,
                                                 &error_abort), ==, 0);
        sb.autoclear = 6;
        thinvm_superblock_encode((ThinvmSuperblockLe *)page, &sb);
        sim_poke(sim, at, SIM_BLOCK, page);
    }
    st = image_open(sim);
    store_die(st);
    g_assert_cmpint(thinvm_store_probe(sim_device(sim), &sb, &older,
                                       &has_older, &error_abort), ==, 0);
    g_assert_true(has_older);
    g_assert_cmpuint(sb.autoclear, ==, 0);
    g_assert_cmpuint(older.autoclear, ==, 0);
}

static void read_base(ThinvmSim *sim, int slot, ThinvmSuperblock *sb)
{
    uint8_t page[SIM_BLOCK];

    sim_peek(sim, thinvm_superblock_offset(slot), SIM_BLOCK, page);
    g_assert_cmpint(thinvm_superblock_decode(sb, (ThinvmSuperblockLe *)page,
                                             &error_abort), ==, 0);
}

static bool coroutine_fn base_agrees(ThinvmSim *sim, int slot,
                                     const ThinvmSuperblock *sb)
{
    uint8_t page[SIM_BLOCK] = {};
    ThinvmSuperblock newest, older;
    bool has_older;

    thinvm_superblock_encode((ThinvmSuperblockLe *)page, sb);
    sim_poke(sim, thinvm_superblock_offset(slot), SIM_BLOCK, page);
    g_assert_cmpint(thinvm_store_probe(sim_device(sim), &newest, &older,
                                       &has_older, &error_abort), ==, 0);
    return has_older;
}

/* A superblock that cannot be of the same image's past is no older base */
static void coroutine_fn test_other_base(ThinvmSim *sim)
{
    ThinvmSuperblock sb[THINVM_NB_SUPERBLOCKS], other;
    ThinvmStore *st;
    int slot;

    image_create(sim, VIRTUAL_SIZE);
    st = image_open(sim);
    write_one(sim, st, 1, 11);
    thinvm_store_checkpoint(st);
    store_close(st, true);
    for (slot = 0; slot < THINVM_NB_SUPERBLOCKS; slot++) {
        read_base(sim, slot, &sb[slot]);
    }
    slot = sb[0].generation > sb[1].generation;
    g_assert_true(base_agrees(sim, slot, &sb[slot]));

    other = sb[slot];
    other.uuid.data[3] ^= 1;
    g_assert_false(base_agrees(sim, slot, &other));
    other = sb[slot];
    other.cluster_bits++;
    g_assert_false(base_agrees(sim, slot, &other));
    other = sb[slot];
    other.journal_size += THINVM_PAGE_SIZE;
    g_assert_false(base_agrees(sim, slot, &other));
    other = sb[slot];
    other.sequence = sb[!slot].sequence + 1;
    g_assert_false(base_agrees(sim, slot, &other));
    other = sb[slot];
    other.epoch = sb[!slot].epoch + 1;
    g_assert_false(base_agrees(sim, slot, &other));

    flip(sim, thinvm_superblock_offset(slot) + 40);
    st = thinvm_store_open(sim_device(sim), 0, &error_abort);
    g_assert_true(st->bases.suspect && st->bases.damage);
    thinvm_store_free(st);
}

static void coroutine_fn test_no_superblock(ThinvmSim *sim)
{
    ThinvmStore *st;

    image_create(sim, VIRTUAL_SIZE);
    st = image_open(sim);
    thinvm_store_checkpoint(st);
    store_die(st);
    flip(sim, THINVM_SUPERBLOCK0_OFFSET + 40);
    flip(sim, THINVM_SUPERBLOCK1_OFFSET + 40);
    must_fail_to_open(sim, "uperblock");
}

/* ------------------------------------------------------------------ */

/* The last record is torn and nothing says that it was durable: dropped */
static void coroutine_fn test_torn_record(ThinvmSim *sim)
{
    ThinvmStore *st;
    uint64_t at;

    image_create(sim, VIRTUAL_SIZE);
    st = image_open(sim);
    write_one(sim, st, 1, 11);
    flush(st);
    at = head_of(st);
    write_one(sim, st, 2, 22);
    flush(st);
    store_die(st);
    flip(sim, at + 70);
    st = image_open(sim);
    g_assert_cmpuint(image_read_tag(sim, st, 1), ==, 11);
    g_assert_cmpuint(image_read_tag(sim, st, 2), ==, TAG_ZERO);
    write_one(sim, st, 3, 33);
    flush(st);
    store_die(st);
    st = image_open(sim);
    g_assert_cmpuint(image_read_tag(sim, st, 2), ==, TAG_ZERO);
    g_assert_cmpuint(image_read_tag(sim, st, 3), ==, 33);
    image_recount(sim, st);
    image_check(st);
    store_close(st, false);
}

/* A later record says that the bad one was durable: that is damage */
static void coroutine_fn test_damage(ThinvmSim *sim)
{
    ThinvmStore *st;
    uint64_t at;

    image_create(sim, VIRTUAL_SIZE);
    st = image_open(sim);
    write_one(sim, st, 1, 11);
    flush(st);
    at = head_of(st);
    write_one(sim, st, 2, 22);
    flush(st);
    write_one(sim, st, 3, 33);
    flush(st);
    store_die(st);
    flip(sim, at + 70);
    must_fail_to_open(sim, "is damaged");
    flip(sim, at + 70);
    /* also if nothing of its header is left */
    flip(sim, at);
    must_fail_to_open(sim, "is damaged");
    flip(sim, at);
    st = image_open(sim);
    g_assert_cmpuint(image_read_tag(sim, st, 3), ==, 33);
    store_close(st, true);
}

/* A former image's journal on the same device is not believed */
static void coroutine_fn test_former_journal(ThinvmSim *sim)
{
    ThinvmStore *st;

    image_create(sim, VIRTUAL_SIZE);
    st = image_open(sim);
    for (uint64_t i = 0; i < 20; i++) {
        write_one(sim, st, i, i + 1);
        flush(st);
    }
    store_die(st);
    image_create(sim, VIRTUAL_SIZE);
    st = thinvm_store_open(sim_device(sim), 0, &error_abort);
    g_assert_cmpuint(info_of(st).allocated_clusters, ==, 0);
    g_assert_cmpuint(image_read_tag(sim, st, 1), ==, TAG_ZERO);
    thinvm_store_free(st);
}

/* Many laps, reopened at odd moments */
static void coroutine_fn test_ring_wraps(ThinvmSim *sim)
{
    uint64_t expected[64] = {};
    uint64_t tag = 1;
    ThinvmStore *st;

    image_create(sim, VIRTUAL_SIZE);
    for (int round = 0; round < 40; round++) {
        st = image_open(sim);
        for (int i = 0; i < 60; i++) {
            uint64_t guest = tag % 64;

            if (tag % 5 == 0) {
                g_assert_cmpint(thinvm_store_unmap(st, 0, guest * 300, 1,
                                                   THINVM_SOURCE_ZERO, NULL,
                                                   &error_abort), ==, 0);
                expected[guest] = TAG_ZERO;
            } else {
                g_assert_cmpint(write_one(sim, st, guest * 300, tag), ==, 0);
                expected[guest] = tag;
            }
            tag++;
            g_assert_cmpint(flush(st), ==, 0);
            g_assert_cmpuint(stats_of(st).journal_used, <=, 768 * KiB);
        }
        thinvm_store_reclaim(st, round & 1);
        store_die(st);
    }
    st = image_open(sim);
    for (int i = 0; i < 64; i++) {
        g_assert_cmpuint(image_read_tag(sim, st, i * 300), ==, expected[i]);
    }
    image_recount(sim, st);
    image_check(st);
    store_close(st, true);
}

/* ------------------------------------------------------------------ */

typedef struct Committer {
    ThinvmSim *sim;
    ThinvmStore *st;
    uint64_t nr;
    unsigned *running;
} Committer;

static void coroutine_fn committer_entry(void *opaque)
{
    Committer *c = opaque;
    uint64_t ticket;

    for (int i = 0; i < 10; i++) {
        g_assert_cmpint(image_write(c->sim, c->st, c->nr * 20 + i, 0, 1,
                                    c->nr + 1, &ticket), ==, 0);
        g_assert_cmpint(thinvm_store_commit_ticket(c->st, ticket), ==, 0);
        g_assert_cmpuint(c->st->journal.written_sequence, >=, ticket);
    }
    --*c->running;
    sim_finish(c->sim);
}

/* Concurrent commits share records and flushes */
static void coroutine_fn test_group_commit(ThinvmSim *sim)
{
    unsigned running = 16;
    Committer c[16];
    ThinvmStoreStats stats;
    ThinvmStore *st;
    uint64_t flushes;

    image_create(sim, VIRTUAL_SIZE);
    st = image_open(sim);
    flushes = sim_count(sim, SIM_FLUSH);
    for (uint64_t i = 0; i < 16; i++) {
        c[i] = (Committer) { sim, st, i, &running };
        sim_start(sim, committer_entry, &c[i]);
    }
    while (running) {
        sim_yield(sim);
    }
    stats = stats_of(st);
    g_assert_cmpuint(stats.operations, ==, 161);
    g_assert_cmpuint(stats.records, <, 100);
    g_assert_cmpuint(sim_count(sim, SIM_FLUSH) - flushes, <, 100);
    store_die(st);
    st = image_open(sim);
    for (uint64_t i = 0; i < 160; i++) {
        g_assert_cmpuint(image_read_tag(sim, st, i / 10 * 20 + i % 10), ==,
                         i / 10 + 1);
    }
    store_close(st, false);
}

/* Neighbouring operations become one */
static void coroutine_fn test_coalesce(ThinvmSim *sim)
{
    ThinvmStore *st;
    uint32_t before;

    image_create(sim, VIRTUAL_SIZE);
    st = image_open(sim);
    for (uint64_t i = 0; i < 30; i++) {
        write_one(sim, st, 500 + i, i + 1);
    }
    /* a leaf ends at 512 */
    g_assert_cmpuint(st->journal.pending_operations, ==, 2);
    flush(st);
    before = st->journal.pending_operations;
    for (int i = 0; i < THINVM_PARTS; i++) {
        image_write(sim, st, 100, i, 1, 77, NULL);
    }
    g_assert_cmpuint(st->journal.pending_operations, ==, before + 1);
    flush(st);
    store_die(st);
    st = image_open(sim);
    for (uint64_t i = 0; i < 30; i++) {
        g_assert_cmpuint(image_read_tag(sim, st, 500 + i), ==, i + 1);
    }
    g_assert_cmpuint(image_read_tag(sim, st, 100), ==, 77);
    image_recount(sim, st);
    image_check(st);
    store_close(st, false);
}

/* A guest flush with nothing to commit is one flush; metadata alone none */
static void coroutine_fn test_flushes(ThinvmSim *sim)
{
    ThinvmStore *st;
    uint64_t flushes;

    image_create(sim, VIRTUAL_SIZE);
    st = image_open(sim);
    flushes = sim_count(sim, SIM_FLUSH);
    /* the record of the owner's epoch owes one */
    thinvm_store_commit(st, THINVM_COMMIT_DURABLE, true);
    flushes++;
    g_assert_cmpuint(sim_count(sim, SIM_FLUSH), ==, flushes);
    thinvm_store_commit(st, THINVM_COMMIT_DURABLE, true);
    thinvm_store_commit(st, THINVM_COMMIT_RECORD, true);
    g_assert_cmpuint(sim_count(sim, SIM_FLUSH), ==, flushes);
    flush(st);
    g_assert_cmpuint(sim_count(sim, SIM_FLUSH), ==, flushes + 1);
    write_one(sim, st, 1, 11);
    thinvm_store_commit(st, THINVM_COMMIT_RECORD, true);
    g_assert_cmpuint(sim_count(sim, SIM_FLUSH), ==, flushes + 2);
    /* the record's own flush was still owed */
    thinvm_store_commit(st, THINVM_COMMIT_DURABLE, true);
    g_assert_cmpuint(sim_count(sim, SIM_FLUSH), ==, flushes + 3);
    thinvm_store_commit(st, THINVM_COMMIT_DURABLE, true);
    g_assert_cmpuint(sim_count(sim, SIM_FLUSH), ==, flushes + 3);
    store_close(st, false);
}

/* ------------------------------------------------------------------ */

/* How a run ends whose device failed: it works again, and then ... */
typedef enum AnomalyEnd {
    ANOMALY_DIES,               /* nobody tried */
    ANOMALY_FLUSHES,            /* all is repeated and flushed */
    ANOMALY_CHECKPOINTS,        /* and the journal needed no more */
    ANOMALY_NB,
} AnomalyEnd;

#define ANOMALY_PLACES 12

typedef struct Anomaly {
    uint64_t tag;                               /* of the next write */
    uint64_t tried[ANOMALY_PLACES];             /* what was written last */
    uint64_t acknowledged[ANOMALY_PLACES];      /* what is there at least */
} Anomaly;

static void coroutine_fn anomaly_work(ThinvmSim *sim, ThinvmStore *st,
                                      Anomaly *a)
{
    uint64_t written[ANOMALY_PLACES] = {};

    for (int i = 0; i < 40; i++) {
        unsigned n = i % ANOMALY_PLACES;

        a->tried[n] = a->tag++;
        if (write_one(sim, st, n * 700, a->tried[n]) == 0) {
            written[n] = a->tried[n];
        }
        if (i % 4 == 3 && (i % 8 == 3 ? flush_guest : flush)(st) == 0) {
            memcpy(a->acknowledged, written, sizeof(written));
        }
        if (i % 11 == 10) {
            thinvm_store_checkpoint(st);
        }
    }
}

static void coroutine_fn anomaly_repeat(ThinvmSim *sim, ThinvmStore *st,
                                        Anomaly *a)
{
    for (int n = 0; n < ANOMALY_PLACES; n++) {
        a->tried[n] = a->acknowledged[n] = a->tag++;
        g_assert_cmpint(write_one(sim, st, n * 700, a->tried[n]), ==, 0);
    }
    g_assert_cmpint(flush(st), ==, 0);
}

/*
 * One run with the @nth I/O of @kinds failing: whatever it hits, what was
 * acknowledged is there after the end of the process, and a device that works
 * again is worked with.  Returns false when the run had no such I/O.
 */
static bool coroutine_fn anomaly(ThinvmSim *sim, unsigned kinds, unsigned nth,
                                 bool once, AnomalyEnd end)
{
    Anomaly a = { .tag = nth * 1000 + 1 };
    ThinvmStore *st;
    bool failed;

    image_create(sim, VIRTUAL_SIZE);
    st = image_open(sim);
    sim_fail(sim, kinds, 0, UINT64_MAX, nth, EIO, once);
    anomaly_work(sim, st, &a);
    failed = sim_has_failed(sim);
    sim_fail(sim, 0, 0, 0, 0, 0, false);
    if (end != ANOMALY_DIES) {
        anomaly_repeat(sim, st, &a);
    }
    if (end == ANOMALY_CHECKPOINTS) {
        g_assert_cmpint(thinvm_store_checkpoint(st), ==, 0);
        image_recount(sim, st);
        image_check(st);
    }
    store_die(st);
    st = image_open(sim);
    for (int n = 0; n < ANOMALY_PLACES; n++) {
        uint64_t tag = image_read_tag(sim, st, n * 700);

        /* tags only grow */
        g_assert_cmpuint(tag, >=, a.acknowledged[n]);
        g_assert_cmpuint(tag, <=, a.tried[n]);
    }
    image_recount(sim, st);
    image_check(st);
    store_close(st, true);
    return failed;
}

static void coroutine_fn anomalies(ThinvmSim *sim, unsigned kinds)
{
    for (AnomalyEnd end = 0; end < ANOMALY_NB; end++) {
        unsigned nth = 0;

        while (anomaly(sim, kinds, nth, true, end)) {
            nth++;
        }
        g_assert_cmpuint(nth, >, 10);
        for (unsigned n = 0; n < nth; n += 3) {
            anomaly(sim, kinds, n, false, end);
        }
    }
}

static void coroutine_fn test_write_errors(ThinvmSim *sim)
{
    anomalies(sim, SIM_WRITE);
}

static void coroutine_fn test_flush_errors(ThinvmSim *sim)
{
    anomalies(sim, SIM_FLUSH);
}

/* A failed flush loses records from the cache: they are written again */
static void coroutine_fn test_lost_records(ThinvmSim *sim)
{
    sim_set_lossy(sim, THINVM_JOURNAL_OFFSET, JOURNAL_END);
    anomalies(sim, SIM_FLUSH);
    /* and superblocks and pages too */
    sim_set_lossy(sim, 0, JOURNAL_END);
    anomalies(sim, SIM_FLUSH);
}

/* While commits fail nothing is allocated, but nothing is forgotten either */
static void coroutine_fn test_failing_journal(ThinvmSim *sim)
{
    ThinvmStore *st;
    uint64_t used;

    image_create(sim, VIRTUAL_SIZE);
    st = image_open(sim);
    write_one(sim, st, 1, 11);
    used = info_of(st).allocated_clusters;
    sim_fail(sim, SIM_WRITE, THINVM_JOURNAL_OFFSET, JOURNAL_END, 0, EIO,
             false);
    g_assert_cmpint(flush(st), ==, -EIO);
    g_assert_cmpint(write_one(sim, st, 2, 22), ==, -EIO);
    g_assert_cmpint(thinvm_store_checkpoint(st), ==, -EIO);
    g_assert_cmpuint(info_of(st).allocated_clusters, ==, used);
    g_assert_cmpuint(image_read_tag(sim, st, 1), ==, 11);
    sim_fail(sim, 0, 0, 0, 0, 0, false);
    g_assert_cmpint(write_one(sim, st, 2, 22), ==, 0);
    g_assert_cmpint(flush(st), ==, 0);
    store_die(st);
    st = image_open(sim);
    g_assert_cmpuint(image_read_tag(sim, st, 1), ==, 11);
    g_assert_cmpuint(image_read_tag(sim, st, 2), ==, 22);
    store_close(st, false);
}

/* ------------------------------------------------------------------ */

static uint64_t busy(ThinvmStore *st)
{
    return st->quarantined_ranges;
}

/* Not before the freeing is durable, nor before earlier requests have left */
static void coroutine_fn test_quarantine(ThinvmSim *sim)
{
    unsigned early, late, more[40];
    ThinvmStore *st;

    image_create(sim, VIRTUAL_SIZE);
    st = image_open(sim);
    write_one(sim, st, 1, 11);
    flush(st);
    early = thinvm_store_request_begin(st);
    thinvm_store_unmap(st, 0, 1, 1, THINVM_SOURCE_ZERO, NULL, &error_abort);
    late = thinvm_store_request_begin(st);
    g_assert_cmpuint(busy(st), ==, 1);

    thinvm_store_reclaim(st, true);
    g_assert_cmpuint(busy(st), ==, 1);          /* not durable */
    thinvm_store_commit(st, THINVM_COMMIT_RECORD, true);
    thinvm_store_reclaim(st, true);
    g_assert_cmpuint(busy(st), ==, 1);          /* still not */
    flush(st);
    thinvm_store_reclaim(st, true);
    g_assert_cmpuint(busy(st), ==, 1);          /* early is there */
    g_assert_cmpuint(sim_discarded(sim), ==, 0);
    for (int i = 0; i < 40; i++) {
        more[i] = thinvm_store_request_begin(st);
        thinvm_store_reclaim(st, true);
        g_assert_cmpuint(busy(st), ==, 1);
        if (i & 1) {
            thinvm_store_request_end(st, more[i - 1]);
        }
    }
    thinvm_store_request_end(st, early);
    thinvm_store_reclaim(st, true);
    g_assert_cmpuint(busy(st), ==, 0);          /* late does not matter */
    g_assert_cmpuint(sim_discarded(sim), ==, IMAGE_CLUSTER);
    thinvm_store_request_end(st, late);
    for (int i = 1; i < 40; i += 2) {
        thinvm_store_request_end(st, more[i]);
    }
    store_close(st, false);
}

typedef struct SlowReader {
    ThinvmSim *sim;
    ThinvmStore *st;
    bool done;
} SlowReader;

static void coroutine_fn reader_entry(void *opaque)
{
    SlowReader *r = opaque;
    g_autofree uint8_t *buf = g_malloc(IMAGE_CLUSTER);
    unsigned token = thinvm_store_request_begin(r->st);
    ThinvmMapping m;

    thinvm_store_lookup(r->st, 0, NULL, 0, 1, false, &m);
    g_assert_cmpint(m.type, ==, THINVM_MAPPING_DATA);
    /* much happens between the look-up and the read */
    for (int i = 0; i < 3000; i++) {
        sim_yield(r->sim);
    }
    sim_peek(r->sim, m.physical * IMAGE_CLUSTER, IMAGE_CLUSTER, buf);
    g_assert_cmpuint(image_tag(buf, 0), ==, 11);
    thinvm_store_request_end(r->st, token);
    r->done = true;
    sim_finish(r->sim);
}

/* A reader sees old data or new data, but never another cluster's */
static void coroutine_fn test_slow_reader(ThinvmSim *sim)
{
    SlowReader r = { sim };
    ThinvmStore *st;

    image_create(sim, VIRTUAL_SIZE);
    st = image_open(sim);
    thinvm_store_set_discard(st, true);
    write_one(sim, st, 0, 11);
    flush(st);
    r.st = st;
    sim_start(sim, reader_entry, &r);
    thinvm_store_unmap(st, 0, 0, 1, THINVM_SOURCE_ZERO, NULL, &error_abort);
    for (uint64_t i = 1; !r.done; i++) {
        g_assert_cmpint(write_one(sim, st, i % 50 * 20, i + 100), ==, 0);
        flush(st);
        thinvm_store_reclaim(st, true);
        if (i % 3 == 0) {
            thinvm_store_unmap(st, 0, i % 50 * 20, 1, THINVM_SOURCE_ZERO, NULL,
                               &error_abort);
        }
    }
    image_recount(sim, st);
    image_check(st);
    store_close(st, true);
}

/* ------------------------------------------------------------------ */

/* Freed space before new space; then the device grows; then ENOSPC */
static void coroutine_fn test_space(ThinvmSim *sim)
{
    const uint64_t all = DEVICE_MAX / IMAGE_CLUSTER;
    ThinvmStore *st;
    uint64_t i, n, grown;

    image_create(sim, VIRTUAL_SIZE);
    st = image_open(sim);
    for (i = 0; i < 600; i++) {
        g_assert_cmpint(write_one(sim, st, i, i + 1), ==, 0);
    }
    grown = sim_count(sim, SIM_GROW);
    thinvm_store_unmap(st, 0, 0, 500, THINVM_SOURCE_ZERO, NULL, &error_abort);
    for (i = 1000; i < 1500; i++) {
        g_assert_cmpint(write_one(sim, st, i, i + 1), ==, 0);
    }
    g_assert_cmpuint(sim_count(sim, SIM_GROW), ==, grown);
    for (i = 2000; write_one(sim, st, i, i + 1) == 0; i++) {
        g_assert_cmpuint(i, <, 2000 + all);
    }
    g_assert_cmpint(write_one(sim, st, i, 1), ==, -ENOSPC);
    g_assert_cmpuint(sim_count(sim, SIM_GROW), >, grown);
    g_assert_cmpuint(info_of(st).device_clusters, ==, all);
    /* A full image commits, checkpoints, discards, and then writes again */
    g_assert_cmpint(flush(st), ==, 0);
    g_assert_cmpint(thinvm_store_checkpoint(st), ==, 0);
    thinvm_store_unmap(st, 0, 2000, 300, THINVM_SOURCE_ZERO, NULL,
                       &error_abort);
    for (n = 0; n < 250; n++) {
        g_assert_cmpint(write_one(sim, st, 20000 + n, n + 1), ==, 0);
    }
    flush(st);
    image_recount(sim, st);
    image_check(st);
    store_die(st);
    st = image_open(sim);
    g_assert_cmpuint(image_read_tag(sim, st, 20249), ==, 250);
    g_assert_cmpuint(image_read_tag(sim, st, 2100), ==, TAG_ZERO);
    image_recount(sim, st);
    image_check(st);
    store_close(st, true);
}

/* A fragmented image needs more and more metadata */
static void coroutine_fn test_metadata_extends(ThinvmSim *sim)
{
    const uint64_t leaves = VIRTUAL_SIZE / IMAGE_CLUSTER / 512;
    ThinvmStore *st;
    uint64_t before;

    image_create(sim, 64 * VIRTUAL_SIZE);
    st = image_open(sim);
    before = info_of(st).metadata_pages;
    for (uint64_t i = 0; i < leaves * 10; i++) {
        g_assert_cmpint(write_one(sim, st, i * 512, i + 1), ==, 0);
    }
    g_assert_cmpuint(info_of(st).metadata_pages, >, before);
    g_assert_cmpuint(stats_of(st).checkpoints, >, 3);
    image_recount(sim, st);
    image_check(st);
    store_close(st, true);
    st = image_open(sim);
    for (uint64_t i = 0; i < leaves * 10; i++) {
        g_assert_cmpuint(image_read_tag(sim, st, i * 512), ==, i + 1);
    }
    store_close(st, true);
}

/* ------------------------------------------------------------------ */

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    qemu_init_main_loop(&error_abort);
    module_call_init(MODULE_INIT_TRACE);

    g_test_add_func("/thinvm/store/create/params", test_create_params);
    add("/thinvm/store/create/empty", test_create);
    add("/thinvm/store/create/erases", test_create_erases);
    add("/thinvm/store/create/too-small", test_too_small);
    add("/thinvm/store/open/replay", test_replay);
    add("/thinvm/store/open/uncommitted", test_uncommitted);
    add("/thinvm/store/open/refused", test_refused);
    add("/thinvm/store/open/truncated", test_truncated);
    add("/thinvm/store/open/fallback", test_fallback);
    add("/thinvm/store/open/autoclear", test_autoclear);
    add("/thinvm/store/open/no-superblock", test_no_superblock);
    add("/thinvm/store/open/other-base", test_other_base);
    add("/thinvm/store/checkpoint", test_checkpoint);
    add("/thinvm/store/journal/torn-record", test_torn_record);
    add("/thinvm/store/journal/damage", test_damage);
    add("/thinvm/store/journal/former-image", test_former_journal);
    add("/thinvm/store/journal/wraps", test_ring_wraps);
    add("/thinvm/store/journal/group-commit", test_group_commit);
    add("/thinvm/store/journal/coalesce", test_coalesce);
    add("/thinvm/store/journal/flushes", test_flushes);
    add("/thinvm/store/errors/write", test_write_errors);
    add("/thinvm/store/errors/flush", test_flush_errors);
    add("/thinvm/store/errors/lost-records", test_lost_records);
    add("/thinvm/store/errors/failing-journal", test_failing_journal);
    add("/thinvm/store/quarantine/order", test_quarantine);
    add("/thinvm/store/quarantine/slow-reader", test_slow_reader);
    add("/thinvm/store/space/full", test_space);
    add("/thinvm/store/space/metadata", test_metadata_extends);
    return g_test_run();
}
