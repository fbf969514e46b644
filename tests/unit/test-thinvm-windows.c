/*
 * Unit test of thinvm's check on a device of several windows
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The check (check.c) looks at a large device window by window, and walks all
 * trees for each.  Here a few clusters are in use on 20 TiB, in the first
 * window, the second, the third and the last, and where two meet.  What is
 * damaged there must be found, once, and repaired.
 *
 * The device holds in memory what was written, and never waits; so a
 * coroutine runs to its end when it is entered.
 */
#include "qemu/osdep.h"
#include "qemu/cutils.h"
#include "qemu/main-loop.h"
#include "qemu/module.h"
#include "block/thinvm/check.h"

#define BLOCK           4096
#define CLUSTER_BITS    16
#define DEVICE          (20 * TiB)
#define DISK            (1 * TiB)
#define WINDOW          THINVM_CHECK_WINDOW
#define LAST            ((uint64_t)(DEVICE >> CLUSTER_BITS) - 1)
#define RUN             THINVM_ENTRIES_PER_LEAF

/* ------------------------------------------------------------------ */
/* The device                                                          */

static GHashTable *blocks;      /* number -> BLOCK bytes; else zeroes */

static int coroutine_fn memory_pread(ThinvmDevice *dev, uint64_t offset,
                                     uint64_t bytes, void *buf)
{
    g_assert(offset % BLOCK == 0);
    for (uint64_t done = 0; done < bytes; done += BLOCK) {
        int64_t key = (offset + done) / BLOCK;
        void *block = g_hash_table_lookup(blocks, &key);
        size_t nb = MIN(BLOCK, bytes - done);

        if (block) {
            memcpy((uint8_t *)buf + done, block, nb);
        } else {
            memset((uint8_t *)buf + done, 0, nb);
        }
    }
    return 0;
}

static int coroutine_fn memory_pwrite(ThinvmDevice *dev, uint64_t offset,
                                      uint64_t bytes, const void *buf)
{
    g_assert(offset % BLOCK == 0 && bytes % BLOCK == 0);
    for (uint64_t done = 0; done < bytes; done += BLOCK) {
        int64_t key = (offset + done) / BLOCK;

        g_hash_table_insert(blocks, g_memdup2(&key, sizeof(key)),
                            g_memdup2((const uint8_t *)buf + done, BLOCK));
    }
    return 0;
}

static int coroutine_fn memory_flush(ThinvmDevice *dev)
{
    return 0;
}

static int coroutine_fn memory_pdiscard(ThinvmDevice *dev, uint64_t offset,
                                        uint64_t bytes)
{
    return 0;
}

static int64_t coroutine_fn memory_length(ThinvmDevice *dev)
{
    return DEVICE;
}

static int coroutine_fn memory_grow(ThinvmDevice *dev, uint64_t bytes)
{
    return bytes <= DEVICE ? 0 : -ENOSPC;
}

static ThinvmDevice device = {
    .co_pread = memory_pread,
    .co_pwrite = memory_pwrite,
    .co_flush = memory_flush,
    .co_pdiscard = memory_pdiscard,
    .co_length = memory_length,
    .co_grow = memory_grow,
};

/* ------------------------------------------------------------------ */
/* The image                                                           */

/* Guest cluster i * RUN is mapped to clusters[i], and guest clusters
 * RUN_GUEST to RUN_GUEST + RUN - 1 to RUN_START and the next ones */
static const uint64_t clusters[] = {
    WINDOW / 2, WINDOW - 300, WINDOW + 300, 2 * WINDOW - 1, 2 * WINDOW,
    2 * WINDOW + 1, 3 * WINDOW - 1, 5 * WINDOW + 12345, LAST,
};
#define RUN_GUEST       (100 * RUN)
#define RUN_START       (WINDOW - RUN / 2)

static ThinvmStore *coroutine_fn open_image(uint64_t epoch)
{
    ThinvmStore *st = thinvm_store_open(&device, 1 * MiB, &error_abort);

    g_assert_nonnull(st);
    thinvm_store_begin_writing(st, epoch, &error_abort);
    return st;
}

static void coroutine_fn close_image(ThinvmStore *st)
{
    thinvm_store_end_writing(st, true, &error_abort);
    thinvm_store_free(st);
}

static void coroutine_fn map_to(ThinvmStore *st, uint64_t guest,
                                uint64_t physical)
{
    ThinvmOp op = {
        .type = THINVM_OP_MAP, .guest = guest, .count = 1,
        .physical = physical, .valid = THINVM_ALL_VALID,
    };

    thinvm_store_execute(st, &op, NULL, &error_abort);
}

static ThinvmStore *coroutine_fn make_image(void)
{
    ThinvmCreateParams params = {
        .virtual_size = DISK,
        .cluster_size = 1 << CLUSTER_BITS,
        .journal_size = 1 * MiB,
    };
    ThinvmOp run = {
        .type = THINVM_OP_MAP_RUN, .guest = RUN_GUEST, .physical = RUN_START,
        .valid = THINVM_ALL_VALID,
    };
    ThinvmSnapshot snap = {
        .icount = UINT64_MAX, .date_sec = 1, .name = "one", .id = 1,
        .virtual_size = DISK,
    };
    ThinvmOp create = { .type = THINVM_OP_SNAPSHOT_CREATE, .snapshot = &snap };
    ThinvmStore *st;

    thinvm_store_create(&device, &params, &error_abort);
    st = open_image(1);
    for (int i = 0; i < ARRAY_SIZE(clusters); i++) {
        map_to(st, i * RUN, clusters[i]);
    }
    thinvm_store_execute(st, &run, NULL, &error_abort);
    /* All of it is shared; a new leaf for each half of them */
    thinvm_store_execute(st, &create, NULL, &error_abort);
    for (int i = 0; i < ARRAY_SIZE(clusters); i += 2) {
        map_to(st, i * RUN + 1, clusters[i] - 1000);
    }
    return st;
}

/* ------------------------------------------------------------------ */
/* Damage                                                              */

static uint16_t coroutine_fn get_count(ThinvmStore *st, uint64_t cluster)
{
    ThinvmState *s = thinvm_store_state(st);
    ThinvmNeeds needs;
    uint16_t count = 0;
    int ret;

    thinvm_needs_init(&needs);
    do {
        thinvm_state_lock(s);
        ret = thinvm_state_cluster_count(s, cluster, &count, &needs);
        thinvm_state_unlock(s);
        if (ret == -EAGAIN) {
            thinvm_store_read_wanted(st, s, &needs, &error_abort);
        }
    } while (ret == -EAGAIN);
    thinvm_state_lock(s);
    thinvm_needs_destroy(s, &needs);
    thinvm_state_unlock(s);
    g_assert_cmpint(ret, ==, 0);
    return count;
}

static void coroutine_fn set_count(ThinvmStore *st, uint64_t cluster,
                                   uint16_t count)
{
    ThinvmState *s = thinvm_store_state(st);
    ThinvmNeeds needs;
    int ret;

    thinvm_needs_init(&needs);
    do {
        thinvm_state_lock(s);
        ret = thinvm_repair_cluster_count(s, cluster, count, &needs);
        thinvm_state_unlock(s);
        if (ret == -EAGAIN) {
            thinvm_store_read_wanted(st, s, &needs, &error_abort);
        }
    } while (ret == -EAGAIN);
    thinvm_state_lock(s);
    thinvm_needs_destroy(s, &needs);
    thinvm_state_unlock(s);
    g_assert_cmpint(ret, ==, 0);
}

static void collect(void *opaque, const char *message)
{
    g_string_append_printf(opaque, "%s\n", message);
}

static ThinvmCheckResult coroutine_fn check(ThinvmStore *st, int fix,
                                            GString *messages)
{
    g_autoptr(GString) own = g_string_new("");
    ThinvmCheckResult result = { };

    thinvm_store_check(st, fix, collect, messages ?: own, &result,
                       &error_abort);
    g_assert_cmpuint(result.check_errors, ==, 0);
    return result;
}

static void coroutine_fn check_clean(ThinvmStore *st)
{
    g_autoptr(GString) messages = g_string_new("");
    ThinvmCheckResult result = check(st, 0, messages);

    g_assert_cmpstr(messages->str, ==, "");
    g_assert_cmpuint(result.corruptions, ==, 0);
    g_assert_cmpuint(result.leaks, ==, 0);
    /* once, not in each window */
    g_assert_cmpuint(result.allocated_clusters, ==, ARRAY_SIZE(clusters) + RUN +
                     DIV_ROUND_UP(ARRAY_SIZE(clusters), 2));
}

/* One count is wrong: it is found, by name, and corrected */
static void coroutine_fn damage_one(ThinvmStore *st, uint64_t cluster,
                                    int change)
{
    g_autofree char *name = g_strdup_printf("cluster %" PRIu64 " ", cluster);
    g_autofree char *comma = g_strdup_printf("cluster %" PRIu64 ",", cluster);
    g_autoptr(GString) messages = g_string_new("");
    uint16_t right = get_count(st, cluster);
    ThinvmCheckResult result;

    set_count(st, cluster, right + change);
    result = check(st, 0, messages);
    g_assert_true(strstr(messages->str, name) || strstr(messages->str, comma));
    g_assert_cmpuint(result.corruptions, ==, change < 0);
    g_assert_cmpuint(result.leaks, ==, change > 0);
    result = check(st, THINVM_FIX_LEAKS | THINVM_FIX_ERRORS, NULL);
    g_assert_cmpuint(result.corruptions_fixed, ==, change < 0);
    g_assert_cmpuint(result.leaks_fixed, ==, change > 0);
    g_assert_cmpuint(get_count(st, cluster), ==, right);
    check_clean(st);
}

/* Two places of the disk on one cluster; and each count wrong at once */
static void coroutine_fn damage_many(ThinvmStore *st)
{
    ThinvmCheckResult result;
    ThinvmMapping m;

    for (int i = 0; i < ARRAY_SIZE(clusters); i++) {
        set_count(st, clusters[i], 0);
    }
    map_to(st, 200 * RUN, clusters[4]);
    map_to(st, 201 * RUN, clusters[7]);
    result = check(st, 0, NULL);
    g_assert_cmpuint(result.corruptions, >=, ARRAY_SIZE(clusters) + 2);
    g_assert_cmpuint(result.leaks, ==, 0);
    result = check(st, THINVM_FIX_LEAKS | THINVM_FIX_ERRORS, NULL);
    g_assert_cmpuint(result.corruptions_fixed, >=, ARRAY_SIZE(clusters));
    result = check(st, 0, NULL);
    g_assert_cmpuint(result.corruptions + result.leaks, ==, 0);
    for (int guest = 200; guest < 202; guest++) {
        /* each has a cluster of its own now */
        g_assert_cmpint(thinvm_store_lookup(st, 0, NULL, guest * RUN, 1, true,
                                            &m), ==, 0);
        g_assert_cmpint(m.type, ==, THINVM_MAPPING_DATA);
        for (int i = 0; i < ARRAY_SIZE(clusters); i++) {
            g_assert_cmpuint(m.physical, !=, clusters[i]);
        }
    }
}

static void coroutine_fn windows_entry(void *opaque)
{
    ThinvmStore *st = make_image();

    check_clean(st);
    for (int i = 0; i < ARRAY_SIZE(clusters); i++) {
        damage_one(st, clusters[i], -1);
        damage_one(st, clusters[i], 1);
    }
    for (int i = 0; i < RUN; i += 51) {
        damage_one(st, RUN_START + i, i & 1 ? -1 : 1);
    }
    /* free ones */
    damage_one(st, WINDOW + 5000, 1);
    damage_one(st, 2 * WINDOW + 5000, 3);
    damage_one(st, LAST - 5000, 1);
    close_image(st);

    st = open_image(2);
    check_clean(st);
    damage_many(st);
    close_image(st);
    st = open_image(3);
    g_assert_cmpuint(check(st, 0, NULL).corruptions, ==, 0);
    close_image(st);
    *(bool *)opaque = true;
}

static void test_windows(void)
{
    bool done = false;

    g_assert_cmpuint(LAST, >, 9 * WINDOW);
    blocks = g_hash_table_new_full(g_int64_hash, g_int64_equal, g_free,
                                   g_free);
    qemu_coroutine_enter(qemu_coroutine_create(windows_entry, &done));
    g_assert_true(done);
    g_hash_table_unref(blocks);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    qemu_init_main_loop(&error_abort);
    module_call_init(MODULE_INIT_TRACE);

    g_test_add_func("/thinvm/windows", test_windows);
    return g_test_run();
}
