/*
 * What the unit tests of thinvm's durability layer share
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Each test is a coroutine on a simulated device of its own.
 */
#ifndef TESTS_UNIT_THINVM_STORE_TEST_H
#define TESTS_UNIT_THINVM_STORE_TEST_H

#include "qemu/cutils.h"
#include "qemu/main-loop.h"
#include "qemu/module.h"
#include "thinvm-sim-image.h"
#include "block/thinvm/store-int.h"

#define VIRTUAL_SIZE    (1 * GiB)
#define DEVICE_SIZE     (16 * MiB)
#define DEVICE_MAX      (128 * MiB)
#define JOURNAL_END     (THINVM_JOURNAL_OFFSET + 1 * MiB)

typedef void coroutine_fn TestBody(ThinvmSim *sim);

typedef struct TestRun {
    ThinvmSim *sim;
    TestBody *body;
} TestRun;

static G_GNUC_UNUSED void coroutine_fn test_entry(void *opaque)
{
    TestRun *run = opaque;

    run->body(run->sim);
    sim_finish(run->sim);
}

static G_GNUC_UNUSED void run_on(ThinvmSim *sim, TestBody *body)
{
    TestRun run = { sim, body };

    sim_start(sim, test_entry, &run);
    sim_run(sim);
}

static G_GNUC_UNUSED void run_test(gconstpointer data)
{
    ThinvmSim *sim = sim_new(1, DEVICE_SIZE, DEVICE_MAX);

    run_on(sim, (TestBody *)data);
    sim_free(sim);
}

/* Forget the store as a dying process would */
static G_GNUC_UNUSED void store_die(ThinvmStore *st)
{
    thinvm_store_free(st);
}

static G_GNUC_UNUSED void coroutine_fn store_close(ThinvmStore *st, bool checkpoint)
{
    thinvm_store_end_writing(st, checkpoint, &error_abort);
    thinvm_store_free(st);
}

static G_GNUC_UNUSED ThinvmStoreStats stats_of(ThinvmStore *st)
{
    ThinvmStoreStats stats;

    thinvm_store_stats(st, &stats);
    return stats;
}

static G_GNUC_UNUSED ThinvmInfoState info_of(ThinvmStore *st)
{
    ThinvmInfoState info;

    thinvm_state_lock(thinvm_store_state(st));
    thinvm_state_info(thinvm_store_state(st), &info);
    thinvm_state_unlock(thinvm_store_state(st));
    return info;
}

static G_GNUC_UNUSED void coroutine_fn must_fail_to_open(ThinvmSim *sim, const char *why)
{
    Error *err = NULL;
    ThinvmStore *st = thinvm_store_open(sim_device(sim), 0, &err);

    g_assert_null(st);
    g_assert_nonnull(err);
    if (!strstr(error_get_pretty(err), why)) {
        g_error("expected \"%s\" in: %s", why, error_get_pretty(err));
    }
    error_free(err);
}

static G_GNUC_UNUSED void flip(ThinvmSim *sim, uint64_t offset)
{
    uint8_t sector[SIM_SECTOR];

    sim_peek(sim, ROUND_DOWN(offset, SIM_SECTOR), SIM_SECTOR, sector);
    sector[offset % SIM_SECTOR] ^= 0x10;
    sim_poke(sim, ROUND_DOWN(offset, SIM_SECTOR), SIM_SECTOR, sector);
}

static G_GNUC_UNUSED int coroutine_fn write_one(ThinvmSim *sim, ThinvmStore *st,
                                  uint64_t guest, uint64_t tag)
{
    return image_write(sim, st, guest, 0, THINVM_PARTS, tag, NULL);
}

static G_GNUC_UNUSED int coroutine_fn flush(ThinvmStore *st)
{
    return thinvm_store_commit(st, THINVM_COMMIT_DURABLE, false);
}

/* The same as guests do it: records with checksums of their data */
static G_GNUC_UNUSED int coroutine_fn flush_guest(ThinvmStore *st)
{
    return thinvm_store_commit(st, THINVM_COMMIT_FLUSHED, false);
}

/* Running positions are places in the ring as long as it has not wrapped */
static G_GNUC_UNUSED uint64_t head_of(ThinvmStore *st)
{
    return THINVM_JOURNAL_OFFSET + st->journal.head % st->journal.size;
}

static G_GNUC_UNUSED void add(const char *path, TestBody *body)
{
    g_test_add_data_func(path, body, run_test);
}

#endif
