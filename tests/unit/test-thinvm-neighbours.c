/*
 * Unit test of thinvm's reading of metadata pages with their neighbours
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * page-read.c: a look-up that lacks a page has those beside it read as well.
 * That must save reads, and nothing else may be told from it: a neighbour
 * that cannot be read, or is damaged, is nobody's business until it is wanted,
 * and none drives a page that is used out of the cache.
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "thinvm-store-test.h"
#include "block/thinvm/state-int.h"

#define NB_LEAVES   100
#define STRIDE      11          /* so that inner pages have 23 of them each */
#define NB_INNER    5
#define DISK        (10 * GiB)
#define CACHE       (4 * MiB)   /* has room for all */
/* A block may be begun and ended by others' pages; and there are inner pages */
#define READS_MAX   (NB_INNER * (NB_LEAVES / NB_INNER / THINVM_BLOCK_PAGES + 3) \
                     + 4)

static uint64_t guest_of(unsigned leaf)
{
    return (uint64_t)leaf * STRIDE * THINVM_ENTRIES_PER_LEAF + leaf % 7;
}

/* A disk with a cluster in each leaf, closed, and opened with cold caches */
static ThinvmStore *coroutine_fn cold(ThinvmSim *sim, uint64_t cache)
{
    ThinvmStore *st;

    image_create(sim, DISK);
    st = image_open(sim);
    for (unsigned i = 0; i < NB_LEAVES; i++) {
        g_assert_cmpint(write_one(sim, st, guest_of(i), i + 1), ==, 0);
    }
    store_close(st, true);
    st = thinvm_store_open(sim_device(sim), cache, &error_abort);
    thinvm_store_begin_writing(st, info_of(st).epoch + 1, &error_abort);
    return st;
}

static int coroutine_fn look_up(ThinvmStore *st, unsigned leaf)
{
    ThinvmMapping m;
    int ret = thinvm_store_lookup(st, THINVM_TREE_DISK, NULL, guest_of(leaf),
                                  1, false, &m);

    if (ret == 0) {
        g_assert_cmpint(m.type, ==, THINVM_MAPPING_DATA);
    }
    return ret;
}

/* How many of the leaves cannot be looked up? */
static unsigned coroutine_fn failures(ThinvmStore *st, int error)
{
    unsigned nb = 0;

    for (unsigned i = 0; i < NB_LEAVES; i++) {
        int ret = look_up(st, i);

        if (ret) {
            g_assert_cmpint(ret, ==, error);
            nb++;
        }
    }
    return nb;
}

/* Places of all leaves of the mapping that are in memory */
static GArray *leaves(ThinvmStore *st)
{
    GArray *places = g_array_new(false, false, sizeof(uint64_t));
    ThinvmPage *page;

    QTAILQ_FOREACH(page, &st->state->all_pages, in_memory) {
        if (page->kind == THINVM_PAGE_MAP_LEAF) {
            g_array_append_val(places, page->number);
        }
    }
    return places;
}

static void coroutine_fn test_reads(ThinvmSim *sim)
{
    ThinvmStore *st = cold(sim, CACHE);
    uint64_t before = sim_count(sim, SIM_READ);
    uint64_t misses = info_of(st).cache_misses;
    g_autoptr(GArray) places = NULL;

    g_assert_cmpuint(failures(st, 0), ==, 0);
    g_assert_cmpuint(sim_count(sim, SIM_READ) - before, <=, READS_MAX);
    /* what came along was not missed */
    g_assert_cmpuint(info_of(st).cache_misses - misses, ==,
                     sim_count(sim, SIM_READ) - before);
    places = leaves(st);
    g_assert_cmpuint(places->len, ==, NB_LEAVES);
    for (unsigned i = 0; i < NB_LEAVES; i++) {
        g_assert_cmpuint(image_read_tag(sim, st, guest_of(i)), ==, i + 1);
    }
    store_close(st, true);
}

/* One page after the other cannot be read: one look-up fails, no other */
static void coroutine_fn test_unreadable(ThinvmSim *sim)
{
    ThinvmStore *st = cold(sim, CACHE);
    g_autoptr(GArray) places = NULL;

    g_assert_cmpuint(failures(st, 0), ==, 0);
    places = leaves(st);
    store_close(st, true);
    for (unsigned i = 0; i < places->len; i += 3) {
        uint64_t at = g_array_index(places, uint64_t, i) * THINVM_PAGE_SIZE;

        st = thinvm_store_open(sim_device(sim), CACHE, &error_abort);
        sim_fail(sim, SIM_READ, at, at + THINVM_PAGE_SIZE, 0, EIO, false);
        g_assert_cmpuint(failures(st, -EIO), ==, 1);
        sim_fail(sim, 0, 0, 0, 0, 0, false);
        g_assert_cmpuint(failures(st, 0), ==, 0);
        thinvm_store_free(st);
    }
}

/* The same for what is read and is wrong */
static void coroutine_fn test_damaged(ThinvmSim *sim)
{
    ThinvmStore *st = cold(sim, CACHE);
    g_autoptr(GArray) places = NULL;

    g_assert_cmpuint(failures(st, 0), ==, 0);
    places = leaves(st);
    store_close(st, true);
    for (unsigned i = 1; i < places->len; i += 3) {
        uint64_t at = g_array_index(places, uint64_t, i) * THINVM_PAGE_SIZE;

        st = thinvm_store_open(sim_device(sim), CACHE, &error_abort);
        flip(sim, at + 77);
        g_assert_cmpuint(failures(st, -EBADMSG), ==, 1);
        flip(sim, at + 77);
        g_assert_cmpuint(failures(st, 0), ==, 0);
        thinvm_store_free(st);
    }
}

/* A cache that is full takes what is wanted, page by page */
static void coroutine_fn test_full_cache(ThinvmSim *sim)
{
    ThinvmStore *st = cold(sim, THINVM_MIN_CACHE_PAGES * THINVM_PAGE_SIZE);
    uint64_t reads, bytes;

    QEMU_BUILD_BUG_ON(NB_LEAVES <= THINVM_MIN_CACHE_PAGES);
    g_assert_cmpuint(failures(st, 0), ==, 0);
    reads = sim_count(sim, SIM_READ);
    bytes = stats_of(st).metadata_bytes_read;
    for (unsigned round = 0; round < 3; round++) {
        g_assert_cmpuint(failures(st, 0), ==, 0);
        g_assert_cmpuint(info_of(st).cached_pages, <=,
                         THINVM_MIN_CACHE_PAGES);
    }
    reads = sim_count(sim, SIM_READ) - reads;
    g_assert_cmpuint(reads, >, NB_LEAVES);
    g_assert_cmpuint(stats_of(st).metadata_bytes_read - bytes, ==,
                     reads * THINVM_PAGE_SIZE);
    store_close(st, true);
}

/* Pages that are in memory and were changed there are not read again */
static void coroutine_fn test_changed(ThinvmSim *sim)
{
    ThinvmStore *st = cold(sim, CACHE);

    for (unsigned i = 0; i < NB_LEAVES; i += 2) {
        g_assert_cmpint(write_one(sim, st, guest_of(i) + 1, 1000 + i), ==, 0);
    }
    for (unsigned i = 0; i < NB_LEAVES; i++) {
        g_assert_cmpuint(image_read_tag(sim, st, guest_of(i)), ==, i + 1);
        g_assert_cmpuint(image_read_tag(sim, st, guest_of(i) + 1), ==,
                         i % 2 ? TAG_ZERO : 1000 + i);
    }
    image_check(st);
    store_close(st, true);
}

typedef struct Reader {
    ThinvmSim *sim;
    ThinvmStore *st;
    unsigned step;
    unsigned *running;
} Reader;

static void coroutine_fn reader_entry(void *opaque)
{
    Reader *r = opaque;

    for (unsigned i = 0; i < NB_LEAVES; i++) {
        g_assert_cmpint(look_up(r->st, i * r->step % NB_LEAVES), ==, 0);
    }
    --*r->running;
    sim_finish(r->sim);
}

static void coroutine_fn read_at_once(ThinvmSim *sim, ThinvmStore *st,
                                      const unsigned *steps, unsigned nb)
{
    g_autofree Reader *readers = g_new(Reader, nb);
    g_autoptr(GArray) places = NULL;
    unsigned running = nb;

    for (unsigned i = 0; i < nb; i++) {
        readers[i] = (Reader) { sim, st, steps[i], &running };
        sim_start(sim, reader_entry, &readers[i]);
    }
    while (running) {
        sim_yield(sim);
    }
    places = leaves(st);
    g_assert_cmpuint(places->len, ==, NB_LEAVES);
}

/* Each wants what comes along with another's: a page is in memory once */
static void coroutine_fn test_at_once(ThinvmSim *sim)
{
    static const unsigned steps[] = { 1, 99, 3, 7, 97, 9, 91, 51 };
    ThinvmStore *st = cold(sim, CACHE);

    read_at_once(sim, st, steps, ARRAY_SIZE(steps));
    store_close(st, true);
}

/* They want the same: one reads it, the others wait; each reads inner pages */
static void coroutine_fn test_together(ThinvmSim *sim)
{
    static const unsigned steps[] = { 1, 1, 1, 1, 1, 1, 1, 1 };
    ThinvmStore *st = cold(sim, CACHE);
    uint64_t before = stats_of(st).metadata_bytes_read;
    uint64_t pages = NB_LEAVES * 5 / 4 + ARRAY_SIZE(steps) * (NB_INNER + 3);

    read_at_once(sim, st, steps, ARRAY_SIZE(steps));
    g_assert_cmpuint(stats_of(st).metadata_bytes_read - before, <=,
                     pages * THINVM_PAGE_SIZE);
    store_close(st, true);
}

/* A block with a page that cannot be read is tried once, not for each page */
static void coroutine_fn test_bad_block(ThinvmSim *sim)
{
    ThinvmStore *st = cold(sim, CACHE);
    g_autoptr(GArray) places = NULL;
    uint64_t at, before, good;

    before = stats_of(st).metadata_bytes_read;
    g_assert_cmpuint(failures(st, 0), ==, 0);
    good = stats_of(st).metadata_bytes_read - before;
    places = leaves(st);
    store_close(st, true);
    st = image_open(sim);
    at = g_array_index(places, uint64_t, NB_LEAVES / 2) * THINVM_PAGE_SIZE;
    sim_fail(sim, SIM_READ, at, at + THINVM_PAGE_SIZE, 0, EIO, false);
    before = stats_of(st).metadata_bytes_read;
    for (unsigned i = 0; i < NB_LEAVES; i++) {
        look_up(st, i);
    }
    g_assert_cmpuint(stats_of(st).metadata_bytes_read - before, <=,
                     good + 2 * THINVM_BLOCK_PAGES * THINVM_PAGE_SIZE);
    sim_fail(sim, 0, 0, 0, 0, 0, false);
    g_assert_cmpuint(failures(st, 0), ==, 0);
    store_close(st, true);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    module_call_init(MODULE_INIT_QOM);
    qemu_init_main_loop(&error_abort);
    add("/thinvm/neighbours/reads", test_reads);
    add("/thinvm/neighbours/unreadable", test_unreadable);
    add("/thinvm/neighbours/damaged", test_damaged);
    add("/thinvm/neighbours/bad-block", test_bad_block);
    add("/thinvm/neighbours/full-cache", test_full_cache);
    add("/thinvm/neighbours/changed", test_changed);
    add("/thinvm/neighbours/at-once", test_at_once);
    add("/thinvm/neighbours/together", test_together);
    return g_test_run();
}
