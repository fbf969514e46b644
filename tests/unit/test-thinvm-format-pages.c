/*
 * Unit tests of thinvm's on-disk format: judging metadata pages
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Every bound of every kind of page is violated one at a time, next to the
 * value that is just allowed (invariant 3 of the design).
 */

#include "qemu/osdep.h"
#include "thinvm/format-helpers.h"

/* ------------------------------------------------------------------ */
/* Pages                                                               */

/* 64 KiB clusters: 272 below the first, metadata in 272-299 and 2^34 */
#define FIRST_CLUSTER 272
#define DEVICE_CLUSTERS ((1ULL << 34) + 1)

static int nb_questions;

static bool fake_clusters_are_metadata(void *opaque, uint64_t cluster,
                                       uint64_t nb_clusters)
{
    g_assert_true(opaque == &nb_questions);
    nb_questions++;
    return cluster < 300 || cluster + nb_clusters > 1ULL << 34;
}

static bool fake_page_is_metadata(void *opaque, uint64_t page)
{
    return fake_clusters_are_metadata(opaque, page >> 4, 1);
}

static const ThinvmBounds bounds = {
    .first_cluster = FIRST_CLUSTER,
    .device_clusters = DEVICE_CLUSTERS,
    .cluster_bits = 16,
    .page_is_metadata = fake_page_is_metadata,
    .clusters_are_metadata = fake_clusters_are_metadata,
    .opaque = &nb_questions,
};

#define THIS_PAGE 4400

typedef struct PageCase {
    ThinvmPageKind kind;
    int level;
    size_t offset;
    int size;
    uint64_t value;
    const char *message;
} PageCase;

#define LEAF THINVM_PAGE_MAP_LEAF, 0
#define MAP(level) THINVM_PAGE_MAP_INNER, level
#define COUNT(level) THINVM_PAGE_COUNT_INNER, level
#define SPACE(level) THINVM_PAGE_SPACE_INNER, level
#define SNAP(level) THINVM_PAGE_SNAPSHOT_INNER, level
#define VALID(bits) ((uint64_t)(bits) << 40)

static const PageCase page_cases[] = {
    /* Mapping leaf: physical cluster, valid bits, source, shared, reserved */
    { LEAF, 0, 8, 300, NULL },
    { LEAF, 4088, 8, 300 | VALID(0xffff) | 1ULL << 56 | 1ULL << 59, NULL },
    { LEAF, 8, 8, (1ULL << 34) - 1, NULL },
    { LEAF, 8, 8, 1ULL << 56, NULL },
    { LEAF, 0, 8, 271, "entry 0: physical cluster outside" },
    { LEAF, 0, 8, 1, "entry 0: physical cluster outside" },
    { LEAF, 8, 8, DEVICE_CLUSTERS, "entry 1: physical cluster outside" },
    { LEAF, 8, 8, (1ULL << 40) - 1, "entry 1: physical cluster outside" },
    { LEAF, 8, 8, 299, "entry 1: physical cluster (or" },
    { LEAF, 8, 8, 272, "belongs to metadata" },
    { LEAF, 4088, 8, 1ULL << 34, "entry 511: physical cluster (or" },
    { LEAF, 8, 8, VALID(1), "entry 1: valid or shared" },
    { LEAF, 8, 8, VALID(0x8000), "entry 1: valid or shared" },
    { LEAF, 8, 8, 1ULL << 59, "entry 1: valid or shared" },
    { LEAF, 8, 8, 300 | 2ULL << 56, "unknown source" },
    { LEAF, 8, 8, 300 | 4ULL << 56, "unknown source" },
    { LEAF, 8, 8, 7ULL << 56, "unknown source" },
    { LEAF, 8, 8, 300 | 1ULL << 60, "reserved bits" },
    { LEAF, 8, 8, 1ULL << 63, "reserved bits" },
    /* Inner mapping page */
    { MAP(1), 0, 8, PTR(1, 4799), NULL },
    { MAP(1), 0, 8, PTR(1, 4799) | 1ULL << 44 | 0xffffULL << 48, NULL },
    { MAP(3), 4080, 8, PTR(4, 0), NULL },
    { MAP(1), 16, 8, PTR(2, 300), NULL },
    { MAP(1), 16, 8, PTR(3, (1ULL << 34) - 512) | 1ULL << 44, NULL },
    { MAP(1), 16, 8, PTR(2, (1ULL << 34) - 511), "belongs to metadata" },
    { MAP(1), 16, 8, PTR(2, (1ULL << 34) - 510), "outside of the device" },
    { MAP(1), 16, 8, PTR(3, 299), "entry 1: physical cluster belongs" },
    { MAP(1), 16, 8, PTR(3, 271), "entry 1: physical cluster outside" },
    { MAP(1), 16, 8, PTR(2, 0), "entry 1: address 0" },
    { MAP(2), 16, 8, PTR(2, 300), "type not allowed" },
    { MAP(3), 16, 8, PTR(3, 300), "type not allowed" },
    { MAP(1), 16, 8, PTR(5, 1), "type not allowed" },
    { MAP(1), 16, 8, PTR(6, 4799), "type not allowed" },
    { MAP(1), 16, 8, PTR(15, 4799), "type not allowed" },
    { MAP(1), 16, 8, PTR(1, 4799) | 1ULL << 45, "type not allowed" },
    { MAP(1), 16, 8, 1ULL << 46, "type not allowed" },
    { MAP(1), 16, 8, 1ULL << 47, "type not allowed" },
    { MAP(2), 16, 8, PTR(1, 0), "address 0" },
    { MAP(2), 16, 8, PTR(1, 4351), "page outside of the device" },
    { MAP(2), 16, 8, PTR(1, 4800), "outside of the metadata extents" },
    { MAP(2), 16, 8, PTR(1, (1ULL << 40) - 1), "page outside of the device" },
    { MAP(2), 16, 8, PTR(1, THIS_PAGE), "page points to itself" },
    { MAP(2), 16, 8, PTR(0, 1), "address where none" },
    { MAP(2), 16, 8, PTR(4, 1), "address where none" },
    { MAP(2), 16, 8, PTR(0, 0) | 1ULL << 44, "shared below" },
    { MAP(2), 16, 8, PTR(4, 0) | 1ULL << 44, "shared below" },
    { MAP(2), 16, 8, 1ULL << 48, "checksum or generation" },
    { MAP(2), 24, 4, 1, "entry 1: checksum or generation" },
    { MAP(2), 28, 4, 1, "entry 1: extra" },
    { MAP(2), 4092, 4, 1, "entry 255: extra" },
    /* Count tree */
    { COUNT(1), 0, 8, PTR(1, 4799), NULL },
    { COUNT(1), 0, 8, PTR(5, 1), NULL },
    { COUNT(3), 0, 8, PTR(5, 0xfff0), NULL },
    { COUNT(3), 0, 8, PTR(5, 0xffff), NULL },
    { COUNT(3), 0, 8, PTR(5, 0), "impossible count" },
    { COUNT(3), 0, 8, PTR(5, 0xfff1), "impossible count" },
    { COUNT(3), 0, 8, PTR(5, 0xfffe), "impossible count" },
    { COUNT(3), 0, 8, PTR(5, 0x10000), "impossible count" },
    { COUNT(1), 0, 8, PTR(4, 0), "type not allowed" },
    { COUNT(1), 0, 8, PTR(2, 300), "type not allowed" },
    { COUNT(1), 0, 8, PTR(1, 4799) | 1ULL << 44, "shared below" },
    { COUNT(1), 12, 4, 1, "extra" },                /* without a page */
    { THINVM_PAGE_COUNT_LEAF, 0, 0, 2, 0xfff0, NULL },
    { THINVM_PAGE_COUNT_LEAF, 0, 0, 2, 0xffff, NULL },
    { THINVM_PAGE_COUNT_LEAF, 0, 0, 2, 0xfff1, "entry 0: impossible" },
    { THINVM_PAGE_COUNT_LEAF, 0, 4094, 2, 0xfffe, "entry 2047: impossible" },
    /* Space map and snapshot tree */
    { SPACE(1), 0, 8, PTR(1, 4799), NULL },
    { SPACE(2), 0, 8, PTR(4, 0), "type not allowed" },
    { SPACE(1), 0, 8, PTR(2, 300), "type not allowed" },
    { SPACE(1), 0, 8, PTR(5, 1), "type not allowed" },
    { SPACE(1), 0, 8, PTR(1, 4799) | 1ULL << 44, "shared below" },
    { SPACE(1), 12, 4, 1, "extra" },
    { SPACE(2), 0, 8, PTR(1, 4800), "metadata extents" },
    { SNAP(1), 0, 8, PTR(1, 4799), NULL },
    { SNAP(1), 0, 8, PTR(4, 0), "type not allowed" },
    { SNAP(2), 0, 8, PTR(1, 4800), "metadata extents" },
};

/* Marks: only where there is a template, and of whole clusters */
static void test_marks(void)
{
    static const struct {
        uint64_t entry;
        const char *with, *without;
    } cases[] = {
        { 300 | VALID(0xffff) | 3ULL << 56, NULL, "unknown source" },
        { 300 | VALID(0xffff) | 3ULL << 56 | 1ULL << 59, NULL,
          "unknown source" },
        { 300 | VALID(0x7fff) | 3ULL << 56, "not all of it", "unknown" },
        { 3ULL << 56, "not all of it", "unknown source" },
        { VALID(0xffff) | 3ULL << 56, "outside", "unknown source" },
        { DEVICE_CLUSTERS | VALID(0xffff) | 3ULL << 56, "outside", "unknown" },
        { 299 | VALID(0xffff) | 3ULL << 56, "belongs to metadata", "unknown" },
        { 300 | VALID(0xffff) | 2ULL << 56, "unknown", "unknown source" },
        { 300 | VALID(0xffff) | 7ULL << 56, "unknown", "unknown source" },
        { 300 | VALID(0xffff) | 3ULL << 56 | 1ULL << 60, "reserved",
          "reserved" },
    };

    for (int i = 0; i < 2 * ARRAY_SIZE(cases); i++) {
        const char *message = i % 2 ? cases[i / 2].with : cases[i / 2].without;
        ThinvmBounds b = bounds;
        uint64_t buf[512] = { 0 };
        Error *err = NULL;

        b.template_marks = i % 2;
        put(buf, 8 * 7, 8, cases[i / 2].entry);
        g_assert(thinvm_page_validate(&b, LEAF, THIS_PAGE, buf, &err) ==
                 !message);
        if (message) {
            expect_error(err, message);
        }
    }
}

/* Free clusters below: at most as many as there can be */
static void test_count_extra(void)
{
    int level;

    for (level = 1; level <= 3; level++) {
        uint64_t span = 2048ULL << (8 * (level - 1));
        uint64_t buf[512] = { 0 };
        Error *err = NULL;

        put(buf, 0, 8, PTR(1, 4799));
        put(buf, 12, 4, span);
        g_assert_true(thinvm_page_validate(&bounds, COUNT(level), THIS_PAGE,
                                           buf, &error_abort));
        put(buf, 12, 4, span + 1);
        g_assert_false(thinvm_page_validate(&bounds, COUNT(level), THIS_PAGE,
                                            buf, &err));
        expect_error(err, "entry 0: extra");

        err = NULL;
        put(buf, 0, 8, PTR(5, 1));
        put(buf, 12, 4, 1);
        g_assert_false(thinvm_page_validate(&bounds, COUNT(level), THIS_PAGE,
                                            buf, &err));
        expect_error(err, "entry 0: extra");
    }
}

static void test_pages(void)
{
    int i;

    for (i = 0; i < ARRAY_SIZE(page_cases); i++) {
        const PageCase *c = &page_cases[i];
        uint64_t buf[512] = { 0 };
        Error *err = NULL;

        g_assert_true(thinvm_page_validate(&bounds, c->kind, c->level,
                                           THIS_PAGE, buf, &error_abort));
        put(buf, c->offset, c->size, c->value);
        g_assert_cmpint(thinvm_page_validate(&bounds, c->kind, c->level,
                                             THIS_PAGE, buf, &err), ==,
                        !c->message);
        if (c->message) {
            g_assert_nonnull(strstr(error_get_pretty(err), "page 4400"));
            expect_error(err, c->message);
        }
    }
}

/* Contiguous clusters are asked about at once, and each is asked about */
static void test_leaf_questions(void)
{
    uint64_t buf[512];
    Error *err = NULL;
    int i;

    for (i = 0; i < 512; i++) {
        buf[i] = cpu_to_le64(thinvm_entry(1000 + i, 1, 0));
    }
    nb_questions = 0;
    g_assert_true(thinvm_page_validate(&bounds, LEAF, THIS_PAGE, buf,
                                       &error_abort));
    g_assert_cmpint(nb_questions, ==, 1);

    for (i = 0; i < 512; i++) {
        buf[i] = cpu_to_le64(i % 2 ? 0 : thinvm_entry(5000 - i, 1, 0));
    }
    nb_questions = 0;
    g_assert_true(thinvm_page_validate(&bounds, LEAF, THIS_PAGE, buf,
                                       &error_abort));
    g_assert_cmpint(nb_questions, ==, 256);

    /* The last of a contiguous range is in metadata */
    for (i = 0; i < 512; i++) {
        buf[i] = cpu_to_le64((1ULL << 34) - 511 + i);
    }
    g_assert_false(thinvm_page_validate(&bounds, LEAF, THIS_PAGE, buf, &err));
    expect_error(err, "entry 0: physical cluster (or");

    /* Without callbacks only the device's bounds are judged */
    g_assert_true(thinvm_page_validate(&(ThinvmBounds) {
        .first_cluster = FIRST_CLUSTER, .device_clusters = DEVICE_CLUSTERS,
        .cluster_bits = 16 }, LEAF, THIS_PAGE, buf, &error_abort));
}

static const FieldCase space_block_cases[] = {
    { 0, 8, 300 * 16, NULL },
    { 0, 8, 300 * 16 + 1, "not on a cluster boundary" },
    { 0, 8, 271 * 16, "outside of the device" },
    { 0, 8, 0, "outside of the device" },
    { 0, 8, DEVICE_CLUSTERS * 16, "outside of the device" },
    { 0, 8, (DEVICE_CLUSTERS - 2) * 16, NULL },
    { 0, 8, (DEVICE_CLUSTERS - 1) * 16, "outside of the device" },
    { 0, 8, 1ULL << 40, "outside of the device" },
    { 0, 8, UINT64_MAX & ~15ULL, "outside of the device" },
    { 8, 4, 0, "0 pages are not whole" },
    { 8, 4, 33, "33 pages are not whole" },
    { 8, 4, 2032, NULL },
    { 8, 4, 2048, "2048 pages are not whole" },
    { 8, 4, UINT32_MAX - 15, "are not whole" },
    { 12, 4, 1, "reserved" },
    { 28, 4, 1, "reserved" },
    { 32, 2, 0xfff0, NULL },
    { 32, 2, 0xfff1, "entry 0: impossible count" },
    { 32, 2, 0xffff, "entry 0: impossible count" },
    { 32 + 2 * 31, 2, 0xffff, "entry 31: impossible count" },
    { 32 + 2 * 32, 2, 1, "reserved" },
    { 4094, 2, 1, "reserved" },
};

static void test_space_block(void)
{
    int i;

    for (i = 0; i < ARRAY_SIZE(space_block_cases); i++) {
        const FieldCase *c = &space_block_cases[i];
        uint64_t buf[512] = { 0 };
        Error *err = NULL;

        put(buf, 0, 8, 272 * 16);
        put(buf, 8, 4, 32);
        g_assert_true(thinvm_page_validate(&bounds, THINVM_PAGE_SPACE_BLOCK, 0,
                                           THIS_PAGE, buf, &error_abort));
        put(buf, c->offset, c->size, c->value);
        g_assert_cmpint(thinvm_page_validate(&bounds, THINVM_PAGE_SPACE_BLOCK,
                                             0, THIS_PAGE, buf, &err), ==,
                        !c->message);
        if (c->message) {
            expect_error(err, c->message);
        }
    }
}

/* 2 MiB clusters: a page number ends before 4 PiB, clusters do not */
static void test_space_block_page_limit(void)
{
    ThinvmBounds big = { .first_cluster = 9, .device_clusters = 1ULL << 35,
                         .cluster_bits = 21 };
    uint64_t buf[512] = { 0 };
    Error *err = NULL;

    put(buf, 8, 4, 1024);
    put(buf, 0, 8, (1ULL << 40) - 1024);
    g_assert_true(thinvm_page_validate(&big, THINVM_PAGE_SPACE_BLOCK, 0, 5000,
                                       buf, &error_abort));
    put(buf, 0, 8, (1ULL << 40) - 512);
    g_assert_false(thinvm_page_validate(&big, THINVM_PAGE_SPACE_BLOCK, 0, 5000,
                                        buf, &err));
    expect_error(err, "outside of the device");
}

static void test_snapshot_leaf(void)
{
    ThinvmSnapshot snap = good_snapshot();
    ThinvmSnapshotLe slots[8] = { 0 };
    Error *err = NULL;

    snap.root.address = 4799;
    thinvm_snapshot_encode(&slots[7], &snap);
    g_assert_true(thinvm_page_validate(&bounds, THINVM_PAGE_SNAPSHOT_LEAF, 0,
                                       THIS_PAGE, slots, &error_abort));

    snap.root.address = 4800;
    thinvm_snapshot_encode(&slots[7], &snap);
    g_assert_false(thinvm_page_validate(&bounds, THINVM_PAGE_SNAPSHOT_LEAF, 0,
                                        THIS_PAGE, slots, &err));
    expect_error(err, "slot 7: root of snapshot: page outside");

    err = NULL;
    snap.root.address = 4799;
    snap.vmstate_root = snap.root;
    snap.vmstate_root.address = 4800;
    thinvm_snapshot_encode(&slots[7], &snap);
    g_assert_false(thinvm_page_validate(&bounds, THINVM_PAGE_SNAPSHOT_LEAF, 0,
                                        THIS_PAGE, slots, &err));
    expect_error(err, "slot 7: VM state root of snapshot: page outside");

    err = NULL;
    snap.vmstate_root.address = 4799;
    snap.virtual_size = 512 * TiB + 512;
    thinvm_snapshot_encode(&slots[7], &snap);
    g_assert_false(thinvm_page_validate(&bounds, THINVM_PAGE_SNAPSHOT_LEAF, 0,
                                        THIS_PAGE, slots, &err));
    expect_error(err, "slot 7: size");

    /* A free slot is all zeroes */
    err = NULL;
    memset(slots, 0, sizeof(slots));
    slots[3].name[0] = 'x';
    g_assert_false(thinvm_page_validate(&bounds, THINVM_PAGE_SNAPSHOT_LEAF, 0,
                                        THIS_PAGE, slots, &err));
    expect_error(err, "slot 3: snapshot id 0");
}

static void test_backing_page(void)
{
    ThinvmBacking backing = good_backing();
    ThinvmBackingLe le;
    Error *err = NULL;

    thinvm_backing_encode(&le, &backing);
    g_assert_true(thinvm_page_validate(&bounds, THINVM_PAGE_BACKING, 0,
                                       THIS_PAGE, &le, &error_abort));
    memset(&le, 0, sizeof(le));
    g_assert_false(thinvm_page_validate(&bounds, THINVM_PAGE_BACKING, 0,
                                        THIS_PAGE, &le, &err));
    expect_error(err, "name is empty");
}

static void test_root_bounds(void)
{
    ThinvmPointer ptr = { .address = 4799, .type = THINVM_PTR_PAGE };
    Error *err = NULL;

    g_assert_true(thinvm_root_validate(&bounds, THINVM_PAGE_MAP_INNER, &ptr,
                                       "the root", &error_abort));
    ptr.address = 4800;
    g_assert_true(thinvm_root_validate(NULL, THINVM_PAGE_MAP_INNER, &ptr,
                                       "the root", &error_abort));
    g_assert_false(thinvm_root_validate(&bounds, THINVM_PAGE_MAP_INNER, &ptr,
                                        "the root", &err));
    expect_error(err, "the root: page outside of the metadata extents");
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);

    g_test_add_func("/thinvm/page/fields", test_pages);
    g_test_add_func("/thinvm/page/marks", test_marks);
    g_test_add_func("/thinvm/page/count-extra", test_count_extra);
    g_test_add_func("/thinvm/page/leaf-questions", test_leaf_questions);
    g_test_add_func("/thinvm/page/space-block", test_space_block);
    g_test_add_func("/thinvm/page/space-block-limit",
                    test_space_block_page_limit);
    g_test_add_func("/thinvm/page/snapshot-leaf", test_snapshot_leaf);
    g_test_add_func("/thinvm/page/backing", test_backing_page);
    g_test_add_func("/thinvm/page/root", test_root_bounds);
    return g_test_run();
}
