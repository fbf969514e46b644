/*
 * Unit tests of thinvm's on-disk format: checksum, superblock, snapshots
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * On plain buffers: every structure goes round, every bound is violated one
 * at a time and the message asserted, every flipped bit of a checksummed
 * structure is noticed (invariant 3 of the design).  The checksum is compared
 * with a bit-by-bit implementation that is itself held against published
 * values.
 */

#include "qemu/osdep.h"
#include "thinvm/format-helpers.h"

/* ------------------------------------------------------------------ */
/* Checksum                                                            */

static void test_checksum_reference(void)
{
    uint8_t buf[32];
    int i;

    g_assert_cmphex(slow_crc32c((const uint8_t *)"123456789", 9), ==,
                    0xe3069283);
    memset(buf, 0, 32);
    g_assert_cmphex(slow_crc32c(buf, 32), ==, 0x8a9136aa);
    memset(buf, 0xff, 32);
    g_assert_cmphex(slow_crc32c(buf, 32), ==, 0x62a8ab43);
    for (i = 0; i < 32; i++) {
        buf[i] = i;
    }
    g_assert_cmphex(slow_crc32c(buf, 32), ==, 0x46dd794e);
}

static void test_checksum_sizes(void)
{
    uint8_t buf[5000];
    int size, shift, i;

    for (i = 0; i < sizeof(buf); i++) {
        buf[i] = i * 7 + (i >> 8);
    }
    for (size = 0; size < 80; size++) {
        for (shift = 0; shift < 9; shift++) {
            g_assert_cmphex(thinvm_checksum(&test_uuid, 5, 77, buf + shift,
                                            size), ==,
                            slow_checksum(&test_uuid, 5, 77, buf + shift,
                                          size));
        }
    }
    g_assert_cmphex(thinvm_checksum(&test_uuid, 2, UINT64_MAX, buf, 4096), ==,
                    slow_checksum(&test_uuid, 2, UINT64_MAX, buf, 4096));
    g_assert_cmphex(thinvm_checksum(&test_uuid, 2, 1ULL << 40, buf, 4999), ==,
                    slow_checksum(&test_uuid, 2, 1ULL << 40, buf, 4999));
}

/* Image, kind and place are part of what is summed */
static void test_checksum_seed(void)
{
    uint8_t buf[64] = { 1, 2, 3 };
    QemuUUID other = test_uuid;
    uint32_t crc = thinvm_checksum(&test_uuid, THINVM_SUM_PAGE, 9, buf, 64);

    other.data[15] ^= 1;
    g_assert_cmphex(crc, !=, thinvm_checksum(&other, THINVM_SUM_PAGE, 9, buf,
                                             64));
    g_assert_cmphex(crc, !=, thinvm_checksum(&test_uuid, THINVM_SUM_RECORD, 9,
                                             buf, 64));
    g_assert_cmphex(crc, !=, thinvm_checksum(&test_uuid, THINVM_SUM_PAGE, 8,
                                             buf, 64));
}

/* ------------------------------------------------------------------ */
/* Entries and pointers                                                */

static void test_entry(void)
{
    uint64_t entry = thinvm_entry((1ULL << 40) - 1, 0x8001,
                                  THINVM_SOURCE_ZERO);

    g_assert_cmphex(entry, ==, 0x018001ffffffffffULL);
    g_assert_cmpuint(thinvm_entry_physical(entry), ==, (1ULL << 40) - 1);
    g_assert_cmphex(thinvm_entry_valid(entry), ==, 0x8001);
    g_assert_cmpint(thinvm_entry_source(entry), ==, THINVM_SOURCE_ZERO);

    entry |= THINVM_ENTRY_SHARED;
    g_assert_cmphex(entry, ==, 0x098001ffffffffffULL);
    g_assert_cmpuint(thinvm_entry_physical(entry), ==, (1ULL << 40) - 1);
    g_assert_cmphex(thinvm_entry_valid(entry), ==, 0x8001);
    g_assert_cmpint(thinvm_entry_source(entry), ==, THINVM_SOURCE_ZERO);
    g_assert_cmphex(thinvm_entry(1, 0, THINVM_SOURCE_BACKING), ==, 1);
}

static void assert_same_pointer(const ThinvmPointer *a, const ThinvmPointer *b)
{
    g_assert_cmpuint(a->address, ==, b->address);
    g_assert_cmpint(a->type, ==, b->type);
    g_assert_cmpint(a->shared_below, ==, b->shared_below);
    g_assert_cmpint(a->generation, ==, b->generation);
    g_assert_cmphex(a->crc, ==, b->crc);
    g_assert_cmpuint(a->extra, ==, b->extra);
}

static void test_pointer(void)
{
    const ThinvmPointer cases[] = {
        { 0 },
        { .address = (1ULL << 40) - 1, .type = THINVM_PTR_PAGE,
          .shared_below = true, .generation = 0xffff, .crc = 0xffffffff,
          .extra = 0xffffffff },
        { .address = 1, .type = THINVM_PTR_UNIFORM },
        { .address = 1ULL << 39, .type = THINVM_PTR_UNWRITTEN_RUN,
          .shared_below = true },
        { .type = THINVM_PTR_ZERO },
        { .type = THINVM_PTR_NONE, .extra = 5 },
    };
    ThinvmPointerLe le;
    ThinvmPointer back;
    int i, bit;

    for (i = 0; i < ARRAY_SIZE(cases); i++) {
        thinvm_pointer_encode(&le, &cases[i]);
        thinvm_pointer_decode(&back, &le);
        assert_same_pointer(&back, &cases[i]);
    }

    /* The bytes themselves */
    thinvm_pointer_encode(&le, &(ThinvmPointer) {
        .address = 0x1122334455, .type = THINVM_PTR_PAGE,
        .shared_below = true, .generation = 0xabcd, .crc = 0x01020304,
        .extra = 0x0a0b0c0d });
    g_assert_cmpmem(&le, 16, "\x55\x44\x33\x22\x11\x11\xcd\xab"
                    "\x04\x03\x02\x01\x0d\x0c\x0b\x0a", 16);

    /* A reserved bit makes a type that is not known */
    for (bit = 45; bit < 48; bit++) {
        le = (ThinvmPointerLe) {
            .word_le = cpu_to_le64(1ULL << 40 | 1ULL << bit | 7) };
        thinvm_pointer_decode(&back, &le);
        g_assert_cmpint(back.type, >=, 16);
    }
}

/* ------------------------------------------------------------------ */
/* Superblock                                                          */

static ThinvmSuperblock good_superblock(void)
{
    ThinvmPointer page = { .address = 320, .type = THINVM_PTR_PAGE,
                           .generation = 3, .crc = 0x1234 };

    return (ThinvmSuperblock) {
        .version_major = 1,
        .version_minor = 0,
        .uuid = test_uuid,
        .compatible = 1ULL << 63,
        .readonly_compatible = 1ULL << 62,
        .autoclear = 1ULL << 61,
        .cluster_bits = 16,
        .journal_offset = 1 * MiB,
        .journal_size = 16 * MiB,
        .virtual_size = 64 * TiB,
        .device_clusters = 1ULL << 30,
        .generation = 3,
        .sequence = 1ULL << 40,
        .epoch = 1ULL << 33,
        .journal_position = 16 * MiB - 4096,
        .record_crc = 0xdeadbeef,
        .nb_extents = 2,
        .next_snapshot_id = 8,
        .current_snapshot_id = 7,
        .nb_snapshots = 3,
        .nb_snapshot_slots = 9,
        .vmstate_size = 12345,
        .map_root = page,
        .vmstate_root = { .type = THINVM_PTR_ZERO },
        .count_root = page,
        .space_root = page,
        .snapshot_root = page,
        .backing = { .type = THINVM_PTR_NONE },
    };
}

/* Give @le the checksum that its contents ought to have */
static void seal_superblock(ThinvmSuperblockLe *le)
{
    QemuUUID uuid;

    memcpy(uuid.data, (uint8_t *)le + 16, 16);
    put(le, 12, 4, 0);
    put(le, 12, 4, slow_checksum(&uuid, 1, 0, le, 512));
}

static void test_superblock_round(void)
{
    ThinvmSuperblock sb = good_superblock(), back;
    ThinvmSuperblockLe le, again;

    thinvm_superblock_encode(&le, &sb);
    again = le;
    seal_superblock(&again);
    g_assert_cmpmem(&le, 512, &again, 512);

    g_assert_cmpint(thinvm_superblock_decode(&back, &le, &error_abort), ==, 0);
    g_assert_true(qemu_uuid_is_equal(&back.uuid, &sb.uuid));
    g_assert_cmpuint(back.sequence, ==, 1ULL << 40);
    g_assert_cmpuint(back.epoch, ==, 1ULL << 33);
    g_assert_cmpuint(back.record_crc, ==, 0xdeadbeef);
    g_assert_cmpuint(back.vmstate_size, ==, 12345);
    g_assert_cmphex(back.autoclear, ==, 1ULL << 61);
    g_assert_cmpint(back.vmstate_root.type, ==, THINVM_PTR_ZERO);
    assert_same_pointer(&back.snapshot_root, &sb.snapshot_root);

    thinvm_superblock_encode(&again, &back);
    g_assert_cmpmem(&le, 512, &again, 512);
}

static void test_superblock_bytes(void)
{
    ThinvmSuperblock sb = good_superblock();
    ThinvmSuperblockLe le;
    const uint8_t *b = (uint8_t *)&le;

    thinvm_superblock_encode(&le, &sb);
    g_assert_cmpmem(b, 8, "ThinVM\x1a\n", 8);
    g_assert_cmpuint(lduw_le_p(b + 8), ==, 1);
    g_assert_cmpmem(b + 16, 16, test_uuid.data, 16);
    g_assert_cmphex(ldq_le_p(b + 32), ==, sb.compatible);
    g_assert_cmphex(ldq_le_p(b + 40), ==, sb.readonly_compatible);
    g_assert_cmphex(ldq_le_p(b + 48), ==, 0);
    g_assert_cmphex(ldq_le_p(b + 56), ==, sb.autoclear);
    g_assert_cmpuint(ldl_le_p(b + 64), ==, 16);
    g_assert_cmpuint(ldq_le_p(b + 72), ==, 1 * MiB);
    g_assert_cmpuint(ldq_le_p(b + 80), ==, 16 * MiB);
    g_assert_cmpuint(ldq_le_p(b + 88), ==, 64 * TiB);
    g_assert_cmpuint(ldq_le_p(b + 96), ==, 1ULL << 30);
    g_assert_cmpuint(ldq_le_p(b + 104), ==, 3);
    g_assert_cmpuint(ldq_le_p(b + 112), ==, 1ULL << 40);
    g_assert_cmpuint(ldq_le_p(b + 120), ==, 1ULL << 33);
    g_assert_cmpuint(ldq_le_p(b + 128), ==, 16 * MiB - 4096);
    g_assert_cmphex((uint32_t)ldl_le_p(b + 136), ==, 0xdeadbeef);
    g_assert_cmpuint(ldl_le_p(b + 140), ==, 2);
    g_assert_cmpuint(ldq_le_p(b + 144), ==, 8);
    g_assert_cmpuint(ldq_le_p(b + 152), ==, 7);
    g_assert_cmpuint(ldl_le_p(b + 160), ==, 3);
    g_assert_cmpuint(ldl_le_p(b + 164), ==, 9);
    g_assert_cmpuint(ldq_le_p(b + 168), ==, 12345);
    g_assert_cmphex(ldq_le_p(b + 176), ==, 0x0003010000000140ULL);
    g_assert_cmphex(ldq_le_p(b + 192), ==, 4ULL << 40);
    g_assert_cmphex(ldq_le_p(b + 208), ==, 0x0003010000000140ULL);
    g_assert_cmphex(ldq_le_p(b + 224), ==, 0x0003010000000140ULL);
    g_assert_cmphex(ldq_le_p(b + 240), ==, 0x0003010000000140ULL);
    g_assert_cmphex(ldq_le_p(b + 256), ==, 0);
    g_assert_true(buffer_is_zero(b + 272, 240));
}

/* The template of a full clone: its place, its bounds, and none without it */
static void test_superblock_template(void)
{
    static const struct {
        uint64_t length;
        bool ok;
    } lengths[] = {
        { 0 }, { 511 }, { 513 }, { 512, true }, { 16 * PiB, true },
        { 16 * PiB + 512 },
    };
    ThinvmSuperblock sb = good_superblock(), back;
    ThinvmSuperblockLe le;
    uint8_t *b = (uint8_t *)&le;

    sb.incompatible = THINVM_INCOMPATIBLE_TEMPLATE;
    sb.template.length = 12 * MiB + 512;
    memset(sb.template.digest, 0xd1, sizeof(sb.template.digest));
    memset(sb.template.identity, 0x1d, sizeof(sb.template.identity));
    thinvm_superblock_encode(&le, &sb);
    g_assert_cmphex(ldq_le_p(b + 48), ==, 1);
    g_assert_cmpuint(ldq_le_p(b + 408), ==, 12 * MiB + 512);
    g_assert_cmpmem(b + 416, 32, sb.template.digest, 32);
    g_assert_cmpmem(b + 448, 32, sb.template.identity, 32);
    g_assert_true(buffer_is_zero(b + 480, 32));
    g_assert_cmpint(thinvm_superblock_decode(&back, &le, &error_abort), ==, 0);
    g_assert_cmpmem(&back, sizeof(back), &sb, sizeof(sb));

    for (int i = 0; i < ARRAY_SIZE(lengths); i++) {
        Error *err = NULL;

        put(&le, 408, 8, lengths[i].length);
        seal_superblock(&le);
        g_assert_cmpint(thinvm_superblock_decode(&back, &le, &err), ==,
                        lengths[i].ok ? 0 : -EBADMSG);
        if (!lengths[i].ok) {
            expect_error(err, "length of the template");
        }
    }
    /* Without the bit these bytes are reserved, and nothing is written there */
    sb.incompatible = 0;
    thinvm_superblock_encode(&le, &sb);
    g_assert_true(buffer_is_zero(b + 408, 104));
}

/* A later minor version's roots survive; in ours nothing may be there */
static void test_superblock_reserved(void)
{
    ThinvmSuperblock sb = good_superblock(), back;
    ThinvmSuperblockLe le;
    Error *err = NULL;

    sb.version_minor = 1;
    sb.promised_pages = 0x123456789;
    thinvm_superblock_encode(&le, &sb);
    g_assert_cmphex(ldq_le_p((uint8_t *)&le + 400), ==, 0x123456789);
    g_assert_cmpint(thinvm_superblock_decode(&back, &le, &error_abort), ==, 0);
    g_assert_cmphex(back.promised_pages, ==, 0x123456789);
    g_assert_true(buffer_is_zero(back.reserved, 240));

    sb.promised_pages = (1ULL << 35) + 1;
    thinvm_superblock_encode(&le, &sb);
    g_assert_cmpint(thinvm_superblock_decode(&back, &le, &err), ==, -EBADMSG);
    expect_error(err, "number of promised pages");
    err = NULL;
    sb.promised_pages = 1;

    sb.reserved[0] = 1;
    sb.reserved[239] = 2;
    thinvm_superblock_encode(&le, &sb);
    g_assert_cmpint(thinvm_superblock_decode(&back, &le, &err), ==, -EBADMSG);
    expect_error(err, "reserved bytes");

    sb.version_minor = 2;
    thinvm_superblock_encode(&le, &sb);
    g_assert_cmpint(((uint8_t *)&le)[272], ==, 1);
    g_assert_cmpint(((uint8_t *)&le)[511], ==, 2);
    g_assert_cmpint(thinvm_superblock_decode(&back, &le, &error_abort), ==, 0);
    g_assert_cmpmem(back.reserved, 240, sb.reserved, 240);
}

static void test_superblock_flips(void)
{
    ThinvmSuperblock sb = good_superblock(), back;
    ThinvmSuperblockLe le;
    int i;

    thinvm_superblock_encode(&le, &sb);
    for (i = 0; i < 512 * 8; i++) {
        uint8_t *byte = (uint8_t *)&le + i / 8;
        Error *err = NULL;
        int ret;

        *byte ^= 1 << i % 8;
        ret = thinvm_superblock_decode(&back, &le, &err);
        g_assert_cmpint(ret, ==, i / 8 < 8 ? -EINVAL : -EBADMSG);
        expect_error(err, i / 8 < 8 ? "magic" : "checksum");
        *byte ^= 1 << i % 8;
    }
}

static const FieldCase superblock_cases[] = {
    { 8, 2, 0, "format version 0.0" },
    { 8, 2, 2, "format version 2.0" },
    { 10, 2, 65535, NULL },
    { 48, 8, 2, "incompatible features" },
    { 48, 8, 1ULL << 63, "0x8000000000000000" },
    { 32, 8, UINT64_MAX, NULL },
    { 40, 8, UINT64_MAX, NULL },
    { 56, 8, UINT64_MAX, NULL },
    { 64, 4, 13, "cluster_bits 13" },
    { 64, 4, 22, "cluster_bits 22" },
    { 64, 4, 0, "cluster_bits" },
    { 64, 4, UINT32_MAX, "cluster_bits" },
    { 68, 4, 1, "reserved flags" },
    { 72, 8, 0, "journal offset" },
    { 72, 8, 2 * MiB, "journal offset" },
    { 80, 8, 1 * MiB - 4096, "journal size" },
    { 80, 8, 1 * GiB + 4096, "journal size" },
    { 80, 8, 16 * MiB + 512, "journal size" },
    { 80, 8, UINT64_MAX, "journal size" },
    { 88, 8, 0, NULL },
    { 88, 8, 513, "virtual size 513" },
    { 88, 8, 512 * TiB, NULL },
    { 88, 8, 512 * TiB + 512, "virtual size" },
    { 88, 8, UINT64_MAX - 511, "virtual size" },
    { 96, 8, 272, "device clusters 272" },
    { 96, 8, 273, NULL },
    { 96, 8, 0, "device clusters" },
    { 96, 8, 1ULL << 35, NULL },
    { 96, 8, (1ULL << 35) + 1, "device clusters" },
    { 96, 8, UINT64_MAX, "device clusters" },
    { 104, 8, 0, "generation 0" },
    { 104, 8, 1ULL << 62, NULL },
    { 104, 8, (1ULL << 62) + 1, "generation" },
    { 112, 8, 0, NULL },
    { 112, 8, (1ULL << 62) + 1, "sequence" },
    { 120, 8, 0, NULL },
    { 120, 8, UINT64_MAX, "epoch" },
    { 128, 8, 16 * MiB, "journal position" },
    { 128, 8, 512, "journal position" },
    { 128, 8, UINT64_MAX, "journal position" },
    { 140, 4, 0, "metadata extents 0" },
    { 140, 4, 65536, NULL },
    { 140, 4, 65537, "metadata extents 65537" },
    { 144, 8, 0, "next snapshot id 0" },
    { 144, 8, 7, "current snapshot id 7" },
    { 144, 8, UINT64_MAX, "next snapshot id" },
    { 152, 8, 8, "current snapshot id 8" },
    { 160, 4, 10, "number of snapshots 10" },
    { 164, 4, 524288, NULL },
    { 164, 4, 524289, "snapshot slots" },
    { 168, 8, 512 * TiB, NULL },
    { 168, 8, 512 * TiB + 1, "VM state size" },
    { 176, 8, PTR(2, 300), "mapping root: type not allowed" },
    { 176, 8, PTR(5, 300), "mapping root: type not allowed" },
    { 176, 8, PTR(15, 300), "mapping root: type not allowed" },
    { 176, 8, PTR(1, 300) | 1ULL << 45, "mapping root: type not allowed" },
    { 176, 8, PTR(1, 300) | 1ULL << 47, "mapping root: type not allowed" },
    { 176, 8, PTR(1, 0), "mapping root: address 0" },
    { 176, 8, PTR(1, 300) | 1ULL << 44, NULL },
    { 188, 4, 1, "mapping root: extra" },
    { 192, 8, PTR(4, 1), "VM state root: address where none" },
    { 192, 8, PTR(4, 0) | 1ULL << 44, "VM state root: shared below" },
    { 192, 8, PTR(0, 1), "VM state root: address where none" },
    { 192, 8, 1ULL << 48, "VM state root: checksum or generation" },
    { 200, 4, 1, "VM state root: checksum or generation" },
    { 208, 8, 0, "count root: type not allowed" },
    { 208, 8, PTR(5, 1), "count root: type not allowed" },
    { 208, 8, PTR(1, 300) | 1ULL << 44, "count root: shared below" },
    { 220, 4, 1, "count root: extra" },
    { 224, 8, 0, "space map root: type not allowed" },
    { 224, 8, PTR(4, 0), "space map root: type not allowed" },
    { 240, 8, 0, "3 snapshots but no page" },
    { 240, 8, PTR(4, 0), "3 snapshots but no page" },
    { 240, 8, PTR(1, 300) | 1ULL << 44, "snapshot root: shared below" },
    { 256, 8, PTR(4, 0), "backing file pointer: type not allowed" },
    { 256, 8, PTR(1, 300), NULL },
    { 272, 1, 1, "reserved bytes" },
    { 400, 1, 1, "reserved bytes" },
    { 511, 1, 1, "reserved bytes" },
};

static void test_superblock_fields(void)
{
    ThinvmSuperblock sb = good_superblock(), back;
    int i;

    for (i = 0; i < ARRAY_SIZE(superblock_cases); i++) {
        const FieldCase *c = &superblock_cases[i];
        ThinvmSuperblockLe le;
        Error *err = NULL;
        int ret;

        thinvm_superblock_encode(&le, &sb);
        put(&le, c->offset, c->size, c->value);
        seal_superblock(&le);
        ret = thinvm_superblock_decode(&back, &le, &err);
        if (!c->message) {
            g_assert_null(err);
            g_assert_cmpint(ret, ==, 0);
            continue;
        }
        g_assert_cmpint(ret, ==, strstr(c->message, "version") ||
                                 c->offset == 48 ? -ENOTSUP : -EBADMSG);
        expect_error(err, c->message);
    }
}

/* What the mapping tree can hold depends on the cluster size */
static void test_superblock_cluster_sizes(void)
{
    int bits;

    for (bits = 14; bits <= 21; bits++) {
        ThinvmSuperblock sb = good_superblock(), back;
        ThinvmSuperblockLe le;
        Error *err = NULL;

        sb.cluster_bits = bits;
        sb.virtual_size = 1ULL << (33 + bits);
        sb.vmstate_size = 0;
        g_assert_cmpuint(thinvm_first_cluster(&sb), ==,
                         (17 * MiB + (1ULL << bits) - 1) >> bits);
        thinvm_superblock_encode(&le, &sb);
        g_assert_cmpint(thinvm_superblock_decode(&back, &le, &error_abort),
                        ==, 0);
        sb.virtual_size += 512;
        thinvm_superblock_encode(&le, &sb);
        g_assert_cmpint(thinvm_superblock_decode(&back, &le, &err), ==,
                        -EBADMSG);
        expect_error(err, "virtual size");
    }
    g_assert_cmpuint(thinvm_superblock_offset(0), ==, 0);
    g_assert_cmpuint(thinvm_superblock_offset(1), ==, 524288);
}

/* ------------------------------------------------------------------ */
/* Snapshots and backing file                                          */

static void test_snapshot_round(void)
{
    ThinvmSnapshot snap = good_snapshot(), back;
    ThinvmSnapshotLe le;

    thinvm_snapshot_encode(&le, &snap);
    g_assert_true(thinvm_snapshot_decode(&back, &le, &error_abort));
    g_assert_cmpuint(back.id, ==, snap.id);
    g_assert_cmpuint(back.parent_id, ==, snap.parent_id);
    assert_same_pointer(&back.root, &snap.root);
    assert_same_pointer(&back.vmstate_root, &snap.vmstate_root);
    g_assert_cmpuint(back.virtual_size, ==, snap.virtual_size);
    g_assert_cmpuint(back.vmstate_size, ==, snap.vmstate_size);
    g_assert_cmpuint(back.date_sec, ==, snap.date_sec);
    g_assert_cmpuint(back.date_nsec, ==, snap.date_nsec);
    g_assert_cmpuint(back.flags, ==, snap.flags);
    g_assert_cmpuint(back.vm_clock_nsec, ==, snap.vm_clock_nsec);
    g_assert_cmpuint(back.icount, ==, snap.icount);
    g_assert_cmpstr(back.name, ==, snap.name);

    /* An id of 0 is a free slot, whatever else is set */
    snap.id = 0;
    thinvm_snapshot_encode(&le, &snap);
    g_assert_true(buffer_is_zero(&le, sizeof(le)));
}

static const FieldCase snapshot_cases[] = {
    { 0, 8, 0, "snapshot id 0" },
    { 0, 8, 1ULL << 62, NULL },
    { 0, 8, (1ULL << 62) + 1, "snapshot id" },
    { 8, 8, 1ULL << 40, "parent" },
    { 8, 8, 0, NULL },
    { 16, 8, PTR(3, 300), "root of snapshot: type" },
    { 16, 8, PTR(1, 0), "root of snapshot: address 0" },
    { 32, 8, PTR(2, 300), "VM state root of snapshot: type" },
    { 48, 8, 511, "virtual size 511" },
    { 48, 8, 16 * PiB, NULL },
    { 48, 8, 16 * PiB + 512, "virtual size" },
    { 56, 8, 16 * PiB + 1, "VM state size" },
    { 72, 4, 1000000000, "nanoseconds" },
    { 76, 4, 3, NULL },
    { 76, 4, 7, NULL },
    { 76, 4, 8, "unknown flags 0x8" },
    { 96, 1, 1, "reserved" },
    { 255, 1, 1, "reserved" },
    { 256, 1, 0, "name" },          /* bytes after the NUL */
    { 511, 1, 'x', "name" },        /* no NUL */
    { 510, 1, 0, NULL },
};

static void test_snapshot_fields(void)
{
    ThinvmSnapshot snap = good_snapshot(), back;
    int i;

    for (i = 0; i < ARRAY_SIZE(snapshot_cases); i++) {
        const FieldCase *c = &snapshot_cases[i];
        ThinvmSnapshotLe le;
        Error *err = NULL;

        thinvm_snapshot_encode(&le, &snap);
        put(&le, c->offset, c->size, c->value);
        g_assert_cmpint(thinvm_snapshot_decode(&back, &le, &err), ==,
                        !c->message);
        if (c->message) {
            expect_error(err, c->message);
        }
    }
}

static void test_backing_round(void)
{
    ThinvmBacking backing = good_backing(), back;
    ThinvmBackingLe le;

    thinvm_backing_encode(&le, &backing);
    g_assert_true(thinvm_backing_decode(&back, &le, &error_abort));
    g_assert_cmpstr(back.name, ==, backing.name);
    g_assert_cmpstr(back.format, ==, "qcow2");

    thinvm_backing_encode(&le, &(ThinvmBacking) { 0 });
    g_assert_true(thinvm_backing_decode(&back, &le, &error_abort));
    g_assert_cmpstr(back.name, ==, "");
}

static const FieldCase backing_cases[] = {
    { 0, 4, 1022, "length field says 1022" },
    { 0, 4, 1024, "length field says 1024" },
    { 0, 4, UINT32_MAX, "length field" },
    { 4, 4, 64, "format: length field says 64" },
    { 4, 4, 4, "format: length field says 4" },
    { 8, 1, 1, "reserved" },
    { 63, 1, 1, "reserved" },
    { 66, 1, 0, "format: length field" },
    { 127, 1, 'x', "format: length field" },
    { 128 + 500, 1, 0, "name: length field" },
    { 1151, 1, 'x', "name: length field" },
    { 1152, 1, 1, "reserved" },
    { 4095, 1, 1, "reserved" },
};

static void test_backing_fields(void)
{
    ThinvmBacking backing = good_backing(), back;
    ThinvmBackingLe le;
    Error *err = NULL;
    int i;

    for (i = 0; i < ARRAY_SIZE(backing_cases); i++) {
        const FieldCase *c = &backing_cases[i];

        err = NULL;
        thinvm_backing_encode(&le, &backing);
        put(&le, c->offset, c->size, c->value);
        g_assert_false(thinvm_backing_decode(&back, &le, &err));
        expect_error(err, c->message);
    }

    err = NULL;
    backing.name[0] = 0;
    thinvm_backing_encode(&le, &backing);
    g_assert_false(thinvm_backing_decode(&back, &le, &err));
    expect_error(err, "without a backing file name");

    /* A name without an end, and a length that says so */
    err = NULL;
    backing = good_backing();
    thinvm_backing_encode(&le, &backing);
    memset(le.name, 'n', sizeof(le.name));
    put(&le, 0, 4, sizeof(le.name));
    g_assert_false(thinvm_backing_decode(&back, &le, &err));
    expect_error(err, "name: length field");
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);

    g_test_add_func("/thinvm/checksum/reference", test_checksum_reference);
    g_test_add_func("/thinvm/checksum/sizes", test_checksum_sizes);
    g_test_add_func("/thinvm/checksum/seed", test_checksum_seed);
    g_test_add_func("/thinvm/entry", test_entry);
    g_test_add_func("/thinvm/pointer", test_pointer);
    g_test_add_func("/thinvm/superblock/round", test_superblock_round);
    g_test_add_func("/thinvm/superblock/bytes", test_superblock_bytes);
    g_test_add_func("/thinvm/superblock/reserved", test_superblock_reserved);
    g_test_add_func("/thinvm/superblock/template", test_superblock_template);
    g_test_add_func("/thinvm/superblock/flips", test_superblock_flips);
    g_test_add_func("/thinvm/superblock/fields", test_superblock_fields);
    g_test_add_func("/thinvm/superblock/cluster-sizes",
                    test_superblock_cluster_sizes);
    g_test_add_func("/thinvm/snapshot/round", test_snapshot_round);
    g_test_add_func("/thinvm/snapshot/fields", test_snapshot_fields);
    g_test_add_func("/thinvm/backing/round", test_backing_round);
    g_test_add_func("/thinvm/backing/fields", test_backing_fields);
    return g_test_run();
}
