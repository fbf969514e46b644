/*
 * Unit tests of thinvm's on-disk format: operations, records, ownership
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * On plain buffers: all that is written outside of checkpoints goes round,
 * every bound is violated one at a time and the message asserted, every
 * flipped bit is noticed (invariant 3 of the design).
 */

#include "qemu/osdep.h"
#include "thinvm/format-helpers.h"

/* ------------------------------------------------------------------ */
/* Operations                                                          */

#define BIG_GUEST ((1ULL << 33) - 512)

static const ThinvmOp good_ops[] = {
    { .type = THINVM_OP_MAP, .guest = BIG_GUEST, .count = 512,
      .physical = (1ULL << 35) - 512, .valid = 0xffff,
      .source = THINVM_SOURCE_ZERO, .tree = THINVM_TREE_VMSTATE },
    { .type = THINVM_OP_MAP, .guest = 511, .count = 1, .physical = 1 },
    { .type = THINVM_OP_VALIDATE, .guest = (1ULL << 33) - 1,
      .physical = (1ULL << 35) - 1, .valid = 1 },
    { .type = THINVM_OP_UNMAP, .guest = 0, .count = 1ULL << 33,
      .source = THINVM_SOURCE_ZERO },
    { .type = THINVM_OP_UNMAP, .guest = 3, .count = 509 },
    { .type = THINVM_OP_UNMAP, .guest = 512, .count = 1024 },
    { .type = THINVM_OP_INVALIDATE, .guest = 7, .physical = 300,
      .valid = 0x8000, .tree = 1 },
    { .type = THINVM_OP_MAP_RUN, .guest = BIG_GUEST,
      .physical = (1ULL << 35) - 512, .valid = 0xffff },
    { .type = THINVM_OP_MAP_RUN, .guest = 0, .physical = 1, .valid = 0 },
    { .type = THINVM_OP_RESIZE, .value = 16 * PiB },
    { .type = THINVM_OP_RESIZE, .value = 0 },
    { .type = THINVM_OP_GROW, .value = 1ULL << 35 },
    { .type = THINVM_OP_META_EXTEND, .physical = 300, .count = 508 },
    { .type = THINVM_OP_EPOCH, .value = 1ULL << 62 },
    { .type = THINVM_OP_SNAPSHOT_DELETE_STEP, .guest = 524287, .value = 1 },
    { .type = THINVM_OP_SNAPSHOT_GOTO, .value = (1ULL << 62) - 1,
      .physical = 1ULL << 62, .count = 524288 },
    { .type = THINVM_OP_VMSTATE_SIZE, .value = 16 * PiB },
    { .type = THINVM_OP_SNAPSHOT_PROTECT, .guest = 7, .value = 9, .count = 1 },
    { .type = THINVM_OP_RELOCATE, .guest = BIG_GUEST + 508, .count = 4,
      .physical = 300, .value = 524288ULL << 40 | 304, .tree = 1,
      .source = 1 },
    { .type = THINVM_OP_SHARE, .guest = 7, .count = 3, .physical = 524288 },
    { .type = THINVM_OP_SHRINK, .value = 1ULL << 35 },
    { .type = THINVM_OP_RELOCATE, .guest = 7, .value = 2ULL << 40 },
    { .type = THINVM_OP_MAP, .guest = 1024, .count = 512, .physical = 300,
      .valid = 0xffff, .source = THINVM_SOURCE_TEMPLATE },
};

static void assert_same_op(const ThinvmOp *a, const ThinvmOp *b)
{
    g_assert_cmpint(a->type, ==, b->type);
    g_assert_cmpint(a->tree, ==, b->tree);
    g_assert_cmpint(a->source, ==, b->source);
    g_assert_cmpint(a->valid, ==, b->valid);
    g_assert_cmpuint(a->guest, ==, b->guest);
    g_assert_cmpuint(a->count, ==, b->count);
    g_assert_cmpuint(a->physical, ==, b->physical);
    g_assert_cmpuint(a->value, ==, b->value);
}

static ssize_t decode(const uint8_t *buf, size_t size, Error **errp)
{
    ThinvmBacking backing;
    ThinvmSnapshot snapshot;
    ThinvmOp op;

    return thinvm_op_decode(&op, &backing, &snapshot, buf, size, errp);
}

static void test_op_round(void)
{
    int i;

    for (i = 0; i < ARRAY_SIZE(good_ops); i++) {
        uint8_t buf[THINVM_OP_MAX_LENGTH];
        ThinvmOp back;
        Error *err = NULL;

        g_assert_cmpuint(thinvm_op_length(&good_ops[i]), ==, 40);
        memset(buf, 0xee, sizeof(buf));
        thinvm_op_encode(buf, &good_ops[i]);
        g_assert_cmpint(buf[40], ==, 0xee);
        g_assert_cmpint(thinvm_op_decode(&back, NULL, NULL, buf, sizeof(buf),
                                         &error_abort), ==, 40);
        assert_same_op(&back, &good_ops[i]);
        g_assert_cmpint(decode(buf, 40, &error_abort), ==, 40);
        g_assert_cmpint(decode(buf, 39, &err), ==, -EBADMSG);
        expect_error(err, "only 39 bytes");
    }
}

static void test_op_bytes(void)
{
    uint8_t buf[40];

    thinvm_op_encode(buf, &(ThinvmOp) {
        .type = THINVM_OP_MAP, .tree = 1, .source = THINVM_SOURCE_ZERO,
        .valid = 0x0302, .guest = 0x1122334455, .count = 1,
        .physical = 0x0778899aa, .value = 99 });
    g_assert_cmpmem(buf, 40,
                    "\x01\x00\x28\x00\x01\x01\x02\x03"
                    "\x55\x44\x33\x22\x11\x00\x00\x00"
                    "\x01\x00\x00\x00\x00\x00\x00\x00"
                    "\xaa\x99\x88\x77\x00\x00\x00\x00"
                    "\x00\x00\x00\x00\x00\x00\x00\x00", 40);
}

static void test_op_payloads(void)
{
    ThinvmBacking backing = good_backing(), backing_room;
    ThinvmSnapshot snapshot = good_snapshot(), snapshot_room;
    uint8_t buf[THINVM_OP_MAX_LENGTH];
    ThinvmOp op = { .type = THINVM_OP_SET_BACKING, .backing = &backing }, back;
    Error *err = NULL;

    g_assert_cmpuint(thinvm_op_length(&op), ==, 40 + 1152);
    thinvm_op_encode(buf, &op);
    g_assert_cmpint(thinvm_op_decode(&back, &backing_room, &snapshot_room, buf,
                                     sizeof(buf), &error_abort), ==, 1192);
    g_assert_true(back.backing == &backing_room);
    g_assert_cmpstr(backing_room.name, ==, backing.name);
    g_assert_cmpint(decode(buf, 1191, &err), ==, -EBADMSG);
    expect_error(err, "SET_BACKING: length");

    /* Any byte of the payload that is wrong is noticed */
    err = NULL;
    buf[40 + 64 + 5] = 'x';
    g_assert_cmpint(decode(buf, sizeof(buf), &err), ==, -EBADMSG);
    expect_error(err, "format: length");

    /* Roots of a new snapshot are not written, and must not be there */
    snapshot.flags = 0;
    op = (ThinvmOp) { .type = THINVM_OP_SNAPSHOT_CREATE, .count = 524288,
                      .snapshot = &snapshot };
    g_assert_cmpuint(thinvm_op_length(&op), ==, 40 + 512);
    thinvm_op_encode(buf, &op);
    g_assert_cmpint(thinvm_op_decode(&back, &backing_room, &snapshot_room, buf,
                                     sizeof(buf), &error_abort), ==, 552);
    g_assert_true(back.snapshot == &snapshot_room);
    g_assert_cmpuint(back.count, ==, 524288);
    g_assert_cmpstr(snapshot_room.name, ==, snapshot.name);
    g_assert_cmpint(snapshot_room.root.type, ==, THINVM_PTR_NONE);
    g_assert_cmpint(snapshot.root.type, ==, THINVM_PTR_PAGE);

    put(buf, 40 + 16, 8, PTR(1, 300));
    err = NULL;
    g_assert_cmpint(decode(buf, sizeof(buf), &err), ==, -EBADMSG);
    expect_error(err, "roots are not empty");

    put(buf, 40 + 16, 8, 0);
    put(buf, 40 + 32, 8, PTR(1, 300));
    err = NULL;
    g_assert_cmpint(decode(buf, sizeof(buf), &err), ==, -EBADMSG);
    expect_error(err, "roots are not empty");

    put(buf, 40 + 32, 8, 0);
    put(buf, 40 + 76, 4, 1);
    err = NULL;
    g_assert_cmpint(decode(buf, sizeof(buf), &err), ==, -EBADMSG);
    expect_error(err, "flags 0x1");

    put(buf, 40 + 76, 4, 0);
    put(buf, 16, 8, 524289);
    err = NULL;
    g_assert_cmpint(decode(buf, sizeof(buf), &err), ==, -EBADMSG);
    expect_error(err, "SNAPSHOT_CREATE: slot of the new record");
}

/* Offsets of an operation's fields */
enum { TYPE = 0, LENGTH = 2, TREE = 4, SOURCE = 5, VALID_BITS = 6, GUEST = 8,
       COUNT_FIELD = 16, PHYSICAL = 24, VALUE = 32 };

static const struct {
    int op;                 /* index in good_ops */
    size_t offset;
    int size;
    uint64_t value;
    const char *message;
} op_cases[] = {
    { 0, TYPE, 2, 0, "type 0 is not known" },
    { 0, TYPE, 2, 19, "type 19 is not known" },
    { 0, TYPE, 2, 65535, "type 65535 is not known" },
    { 0, LENGTH, 2, 0, "MAP: length 0" },
    { 0, LENGTH, 2, 48, "MAP: length 48" },
    { 0, TREE, 1, 2, "MAP: tree" },
    { 0, TREE, 1, 255, "MAP: tree" },
    { 0, SOURCE, 1, 2, "MAP: source" },
    /* marks: only with all valid bits (1), and of the disk (0) */
    { 0, SOURCE, 1, 3, "MAP: source" },
    { 1, SOURCE, 1, 3, "MAP: source" },
    { 3, SOURCE, 1, 3, "UNMAP: source" },
    { 0, SOURCE, 1, 255, "MAP: source" },
    { 0, GUEST, 8, BIG_GUEST + 1, "MAP: guest range" },
    { 0, GUEST, 8, 1ULL << 33, "MAP: guest range" },
    { 0, GUEST, 8, UINT64_MAX, "MAP: guest range" },
    { 0, GUEST, 8, 1, "MAP: guest range" },         /* crosses a leaf */
    { 0, COUNT_FIELD, 8, 0, "MAP: guest range" },
    { 0, COUNT_FIELD, 8, 513, "MAP: guest range" },
    { 0, COUNT_FIELD, 8, UINT64_MAX, "MAP: guest range" },
    { 1, COUNT_FIELD, 8, 2, "MAP: guest range" },   /* crosses a leaf */
    { 0, PHYSICAL, 8, 0, "MAP: physical" },
    { 0, PHYSICAL, 8, (1ULL << 35) - 511, "MAP: physical" },
    { 0, PHYSICAL, 8, UINT64_MAX - 511, "MAP: physical" },
    { 0, VALUE, 8, 1, "MAP: value is set" },
    { 2, VALID_BITS, 2, 0, "VALIDATE: valid bits" },
    { 2, SOURCE, 1, 1, "VALIDATE: source is set" },
    { 2, COUNT_FIELD, 8, 1, "VALIDATE: count is set" },
    { 2, GUEST, 8, 1ULL << 33, "VALIDATE: guest" },
    { 2, PHYSICAL, 8, 1ULL << 35, "VALIDATE: physical" },
    { 2, PHYSICAL, 8, 0, "VALIDATE: physical" },
    { 3, COUNT_FIELD, 8, (1ULL << 33) + 512, "UNMAP: guest range" },
    { 3, COUNT_FIELD, 8, 0, "UNMAP: guest range" },
    { 3, PHYSICAL, 8, 1, "UNMAP: physical cluster is set" },
    { 3, VALID_BITS, 2, 1, "UNMAP: valid bits is set" },
    { 4, GUEST, 8, (1ULL << 33) - 508, "UNMAP: guest range" },
    { 6, VALID_BITS, 2, 0, "INVALIDATE: valid bits" },
    { 6, VALUE, 8, 1ULL << 63, "INVALIDATE: value is set" },
    { 7, GUEST, 8, 511, "MAP_RUN: guest" },
    { 7, GUEST, 8, 1ULL << 33, "MAP_RUN: guest" },
    { 7, PHYSICAL, 8, (1ULL << 35) - 511, "MAP_RUN: physical" },
    { 7, PHYSICAL, 8, 0, "MAP_RUN: physical" },
    { 7, VALID_BITS, 2, 1, "MAP_RUN: valid bits" },
    { 7, SOURCE, 1, 1, "MAP_RUN: source is set" },
    { 9, VALUE, 8, 16 * PiB + 512, "RESIZE: virtual size" },
    { 9, VALUE, 8, 1, "RESIZE: virtual size" },
    { 9, GUEST, 8, 1, "RESIZE: guest cluster is set" },
    { 9, TREE, 1, 1, "RESIZE: tree is set" },
    { 11, VALUE, 8, 0, "GROW: number" },
    { 11, VALUE, 8, (1ULL << 35) + 1, "GROW: number" },
    { 12, COUNT_FIELD, 8, 0, "META_EXTEND: physical" },
    { 12, COUNT_FIELD, 8, 509, "META_EXTEND: physical" },
    { 12, PHYSICAL, 8, 0, "META_EXTEND: physical" },
    { 12, PHYSICAL, 8, (1ULL << 35) - 507, "META_EXTEND: physical" },
    { 13, VALUE, 8, 0, "EPOCH: epoch" },
    { 13, VALUE, 8, (1ULL << 62) + 1, "EPOCH: epoch" },
    { 14, VALUE, 8, 0, "SNAPSHOT_DELETE_STEP: snapshot id" },
    { 14, GUEST, 8, 524288, "SNAPSHOT_DELETE_STEP: snapshot slot" },
    { 14, PHYSICAL, 8, 2, "SNAPSHOT_DELETE_STEP: physical cluster is set" },
    { 15, GUEST, 8, 524288, "SNAPSHOT_GOTO: snapshot slot" },
    { 15, VALUE, 8, UINT64_MAX, "SNAPSHOT_GOTO: snapshot id" },
    { 15, VALUE, 8, 1ULL << 62, "SNAPSHOT_GOTO: id of the former" },
    { 15, PHYSICAL, 8, (1ULL << 62) + 1, "SNAPSHOT_GOTO: id of the former" },
    { 15, COUNT_FIELD, 8, 524289, "SNAPSHOT_GOTO: slot of the new record" },
    { 16, VALUE, 8, 16 * PiB + 1, "VMSTATE_SIZE: VM state size" },
    { 17, GUEST, 8, 524288, "SNAPSHOT_PROTECT: snapshot slot" },
    { 17, VALUE, 8, 0, "SNAPSHOT_PROTECT: snapshot id" },
    { 17, COUNT_FIELD, 8, 2, "SNAPSHOT_PROTECT: count" },
    { 17, PHYSICAL, 8, 1, "SNAPSHOT_PROTECT: physical cluster is set" },
    { 18, TREE, 1, 2, "RELOCATE: tree" },
    { 18, SOURCE, 1, 2, "RELOCATE: source" },
    { 18, COUNT_FIELD, 8, 5, "RELOCATE: guest range" },
    { 18, COUNT_FIELD, 8, 0, "RELOCATE: physical range" },
    { 18, PHYSICAL, 8, 301, "RELOCATE: physical range" },
    { 18, PHYSICAL, 8, 0, "RELOCATE: physical range" },
    { 18, VALUE, 8, 524289ULL << 40 | 304, "RELOCATE: slot of the snapshot" },
    { 18, VALUE, 8, 0, "RELOCATE: physical range" },
    { 19, TREE, 1, 2, "SHARE: tree" },
    { 19, GUEST, 8, 1ULL << 33, "SHARE: guest cluster" },
    { 19, COUNT_FIELD, 8, 4, "SHARE: level" },
    { 19, PHYSICAL, 8, 0, "SHARE: slot of a snapshot" },
    { 19, VALUE, 8, 524288, "SHARE: slot of a snapshot" },
    { 20, VALUE, 8, 0, "SHRINK: number" },
    { 21, PHYSICAL, 8, 7, "RELOCATE: physical range" },
    { 21, GUEST, 8, 1ULL << 33, "RELOCATE: guest range" },
};

static void test_op_fields(void)
{
    int i;

    for (i = 0; i < ARRAY_SIZE(op_cases); i++) {
        uint8_t buf[64];
        Error *err = NULL;

        thinvm_op_encode(buf, &good_ops[op_cases[i].op]);
        put(buf, op_cases[i].offset, op_cases[i].size, op_cases[i].value);
        g_assert_cmpint(decode(buf, sizeof(buf), &err), ==,
                        op_cases[i].offset == TYPE ? -ENOTSUP : -EBADMSG);
        expect_error(err, op_cases[i].message);
    }
}

/* No bytes whatever make the decoder read or return more than it was given */
static void test_op_random(void)
{
    g_autoptr(GRand) rand = g_rand_new_with_seed(20);
    int i, j;

    for (i = 0; i < 200000; i++) {
        size_t size = g_rand_int_range(rand, 0, 1300);
        g_autofree uint8_t *buf = g_malloc(size + 1);
        Error *err = NULL;
        ssize_t ret;

        for (j = 0; j < MIN(size, 48); j++) {
            buf[j] = g_rand_int(rand) & g_rand_int(rand) & g_rand_int(rand);
        }
        memset(buf + j, 0, size - j);
        if (size >= 4) {
            put(buf, 0, 2, g_rand_int_range(rand, 0, 16));
            put(buf, 2, 2, (int[]) { 40, 552, 1192, 44 }[i % 4]);
        }
        ret = decode(buf, size, &err);
        g_assert_true((ret < 0) == !!err);
        g_assert_true(ret < 0 || ret <= size);
        error_free(err);
    }
}

/* ------------------------------------------------------------------ */
/* Records                                                             */

/* A record with two operations; 144 bytes; returns its padded size */
static size_t make_record(uint8_t *buf, ThinvmRecord *rec)
{
    thinvm_op_encode(buf + 64, &good_ops[0]);
    thinvm_op_encode(buf + 104, &good_ops[2]);
    *rec = (ThinvmRecord) {
        .epoch = 1ULL << 40, .sequence = 1ULL << 50,
        .flushed_sequence = (1ULL << 50) - 1, .previous_crc = 0xcafe,
        .length = 144, .nb_operations = 2,
    };
    thinvm_record_encode(&test_uuid, buf, rec);
    return 4096;
}

static void test_record_round(void)
{
    uint8_t buf[8192];
    ThinvmRecord rec, back;

    memset(buf, 0xee, sizeof(buf));
    make_record(buf, &rec);
    g_assert_true(buffer_is_zero(buf + 144, 4096 - 144));
    g_assert_cmpint(buf[4096], ==, 0xee);

    g_assert_cmpint(thinvm_record_decode_header(&back, buf), ==, 0);
    g_assert_cmpuint(back.epoch, ==, rec.epoch);
    g_assert_cmpuint(back.sequence, ==, rec.sequence);
    g_assert_cmpuint(back.flushed_sequence, ==, rec.flushed_sequence);
    g_assert_cmphex(back.previous_crc, ==, 0xcafe);
    g_assert_cmphex(back.crc, ==, rec.crc);
    g_assert_cmpuint(back.length, ==, 144);
    g_assert_cmpuint(back.nb_operations, ==, 2);
    g_assert_true(thinvm_record_checksum_ok(&test_uuid, buf, &back));

    /* The bytes, and the checksum as the document defines it */
    g_assert_cmpmem(buf, 4, "TVJR", 4);
    g_assert_cmpuint(ldq_le_p(buf + 8), ==, 1ULL << 40);
    g_assert_cmpuint(ldq_le_p(buf + 16), ==, 1ULL << 50);
    g_assert_cmpuint(ldq_le_p(buf + 24), ==, (1ULL << 50) - 1);
    g_assert_cmphex(ldl_le_p(buf + 32), ==, 0xcafe);
    g_assert_cmpuint(ldl_le_p(buf + 36), ==, 144);
    g_assert_cmpuint(ldl_le_p(buf + 40), ==, 2);
    g_assert_true(buffer_is_zero(buf + 44, 20));
    put(buf, 4, 4, 0);
    g_assert_cmphex(slow_checksum(&test_uuid, 2, 1ULL << 50, buf, 144), ==,
                    rec.crc);
}

/* The longest record, of a whole number of pages: no padding */
static void test_record_longest(void)
{
    g_autofree uint8_t *buf = g_malloc0(THINVM_RECORD_MAX_SIZE);
    ThinvmRecord rec = { .sequence = 1, .length = THINVM_RECORD_MAX_SIZE };
    ThinvmRecord back;

    thinvm_record_encode(&test_uuid, buf, &rec);
    g_assert_cmpint(thinvm_record_decode_header(&back, buf), ==, 0);
    g_assert_cmpuint(back.length, ==, 256 * KiB);
    g_assert_true(thinvm_record_checksum_ok(&test_uuid, buf, &back));
    buf[THINVM_RECORD_MAX_SIZE - 1] ^= 0x80;
    g_assert_false(thinvm_record_checksum_ok(&test_uuid, buf, &back));
}

static void test_record_flips(void)
{
    uint8_t buf[4096];
    ThinvmRecord rec, back;
    QemuUUID other = test_uuid;
    int i;

    make_record(buf, &rec);
    for (i = 0; i < 144 * 8; i++) {
        int ret;

        buf[i / 8] ^= 1 << i % 8;
        ret = thinvm_record_decode_header(&back, buf);
        g_assert_true(ret == -ENOENT ||
                      (back.length <= sizeof(buf) &&
                       !thinvm_record_checksum_ok(&test_uuid, buf, &back)) ||
                      /* a length that reads on into other bytes */
                      back.length > sizeof(buf));
        buf[i / 8] ^= 1 << i % 8;
    }

    /* The journal of a former image on the same device */
    other.data[0] ^= 1;
    g_assert_cmpint(thinvm_record_decode_header(&back, buf), ==, 0);
    g_assert_true(thinvm_record_checksum_ok(&test_uuid, buf, &back));
    g_assert_false(thinvm_record_checksum_ok(&other, buf, &back));
}

static void test_record_header(void)
{
    const struct {
        size_t offset;
        int size;
        uint64_t value;
        int ret;
    } cases[] = {
        { 0, 4, 0, -ENOENT },
        { 8, 8, 1ULL << 62, 0 },
        { 8, 8, (1ULL << 62) + 1, -ENOENT },
        { 16, 8, 0, -ENOENT },
        { 16, 8, UINT64_MAX, -ENOENT },
        { 24, 8, 0, 0 },
        { 24, 8, 1ULL << 50, -ENOENT },     /* claims that it is flushed */
        { 36, 4, 56, -ENOENT },
        { 36, 4, 145, -ENOENT },
        { 36, 4, 256 * KiB, 0 },
        { 36, 4, 256 * KiB + 8, -ENOENT },
        { 36, 4, UINT32_MAX & ~7, -ENOENT },
        { 40, 4, 0, 0 },
        { 40, 4, 3, -ENOENT },
        { 40, 4, UINT32_MAX, -ENOENT },
        { 44, 4, 1, -ENOTSUP },
        { 48, 1, 1, -ENOTSUP },
        { 63, 1, 0x80, -ENOTSUP },
    };
    uint8_t buf[4096];
    ThinvmRecord rec, back;
    int i;

    for (i = 0; i < ARRAY_SIZE(cases); i++) {
        make_record(buf, &rec);
        put(buf, cases[i].offset, cases[i].size, cases[i].value);
        g_assert_cmpint(thinvm_record_decode_header(&back, buf), ==,
                        cases[i].ret);
        if (cases[i].ret == -ENOTSUP) {
            g_assert_cmpuint(back.length, ==, 144);
        }
    }
}

/* ------------------------------------------------------------------ */
/* Ownership blocks                                                    */

static ThinvmClaim good_claim(void)
{
    ThinvmClaim claim = {
        .epoch = 1ULL << 45, .state = THINVM_CLAIM_RELEASED,
        .process = UINT32_MAX, .process_start = 1ULL << 61,
        .host_id = { .data = "host id 1234567" },
        .boot_id = { .data = "boot id 1234567" },
        .nonce = { .data = "nonce   1234567" },
    };

    memset(claim.host_name, 'h', 63);
    return claim;
}

static void test_claim_round(void)
{
    ThinvmClaim claim = good_claim(), back;
    ThinvmClaimLe le;
    uint8_t *b = (uint8_t *)&le;
    QemuUUID other = test_uuid;
    uint32_t crc;
    int i;

    thinvm_claim_encode(&test_uuid, &le, &claim);
    g_assert_cmpint(thinvm_claim_decode(&test_uuid, &back, &le), ==, 0);
    g_assert_cmpuint(back.epoch, ==, claim.epoch);
    g_assert_cmpint(back.state, ==, claim.state);
    g_assert_cmpuint(back.process, ==, claim.process);
    g_assert_cmpuint(back.process_start, ==, claim.process_start);
    g_assert_cmpmem(back.host_id.data, 16, claim.host_id.data, 16);
    g_assert_cmpmem(back.boot_id.data, 16, claim.boot_id.data, 16);
    g_assert_cmpmem(back.nonce.data, 16, claim.nonce.data, 16);
    g_assert_cmpstr(back.host_name, ==, claim.host_name);

    crc = ldl_le_p(b + 4);
    put(&le, 4, 4, 0);
    g_assert_cmphex(slow_checksum(&test_uuid, 3, 1ULL << 45, &le, 512), ==,
                    crc);
    put(&le, 4, 4, crc);

    for (i = 0; i < 512 * 8; i++) {
        /* Magic number and UUID say whose it is */
        bool foreign = i / 8 < 4 || (i / 8 >= 144 && i / 8 < 160);

        b[i / 8] ^= 1 << i % 8;
        g_assert_cmpint(thinvm_claim_decode(&test_uuid, &back, &le), ==,
                        foreign ? -ENOENT : -EBADMSG);
        b[i / 8] ^= 1 << i % 8;
    }
    other.data[5] ^= 4;
    g_assert_cmpint(thinvm_claim_decode(&other, &back, &le), ==, -ENOENT);
}

/* Right checksum, but nothing that this version knows */
static void test_claim_fields(void)
{
    const FieldCase cases[] = {
        { 16, 4, 1, NULL },
        { 16, 4, 3, NULL },
        { 16, 4, 0, "state" },
        { 16, 4, 4, NULL },
        { 16, 4, 5, "state" },
        { 8, 8, 0, "epoch" },
        { 8, 8, (1ULL << 62) + 1, "epoch" },
        { 143, 1, 'x', "host name without end" },
        { 100, 1, 0, "host name with bytes behind its end" },
        { 160, 1, 1, "reserved" },
        { 511, 1, 1, "reserved" },
    };
    ThinvmClaim claim = good_claim(), back;
    ThinvmClaimLe le;
    int i;

    for (i = 0; i < ARRAY_SIZE(cases); i++) {
        thinvm_claim_encode(&test_uuid, &le, &claim);
        put(&le, cases[i].offset, cases[i].size, cases[i].value);
        put(&le, 4, 4, 0);
        put(&le, 4, 4, slow_checksum(&test_uuid, 3,
                                     ldq_le_p((uint8_t *)&le + 8), &le, 512));
        g_assert_cmpint(thinvm_claim_decode(&test_uuid, &back, &le), ==,
                        cases[i].message ? -ENOTSUP : 0);
    }

    /* A longer name is cut, not refused: it is only for messages */
    claim.host_name[63] = 'x';
    thinvm_claim_encode(&test_uuid, &le, &claim);
    g_assert_cmpint(thinvm_claim_decode(&test_uuid, &back, &le), ==, 0);
    g_assert_cmpuint(strlen(back.host_name), ==, 63);
}

static void test_heartbeat(void)
{
    ThinvmHeartbeat beat = { .epoch = 1ULL << 45, .counter = UINT64_MAX,
                             .nonce = { .data = "nonce   1234567" } };
    ThinvmHeartbeat back;
    ThinvmHeartbeatLe le;
    uint8_t *b = (uint8_t *)&le;
    uint32_t crc;
    int i;

    thinvm_heartbeat_encode(&test_uuid, &le, &beat);
    g_assert_cmpint(thinvm_heartbeat_decode(&test_uuid, &back, &le), ==, 0);
    g_assert_cmpuint(back.epoch, ==, beat.epoch);
    g_assert_cmpuint(back.counter, ==, beat.counter);
    g_assert_cmpmem(back.nonce.data, 16, beat.nonce.data, 16);

    crc = ldl_le_p(b + 4);
    put(&le, 4, 4, 0);
    g_assert_cmphex(slow_checksum(&test_uuid, 4, 1ULL << 45, &le, 512), ==,
                    crc);
    put(&le, 4, 4, crc);

    for (i = 0; i < 512 * 8; i++) {
        bool foreign = i / 8 < 4 || (i / 8 >= 40 && i / 8 < 56);

        b[i / 8] ^= 1 << i % 8;
        g_assert_cmpint(thinvm_heartbeat_decode(&test_uuid, &back, &le), ==,
                        foreign ? -ENOENT : -EBADMSG);
        b[i / 8] ^= 1 << i % 8;
    }

    put(&le, 511, 1, 1);
    put(&le, 4, 4, 0);
    put(&le, 4, 4, slow_checksum(&test_uuid, 4, 1ULL << 45, &le, 512));
    g_assert_cmpint(thinvm_heartbeat_decode(&test_uuid, &back, &le), ==,
                    -ENOTSUP);
}

static void test_release(void)
{
    ThinvmRelease src = { .epoch = 1ULL << 40, .sequence = 1ULL << 50,
                          .record_crc = 0xdeadbeef,
                          .nonce = { .data = "nonce   1234567" } };
    ThinvmRelease back;
    ThinvmReleaseLe le;
    uint8_t *b = (uint8_t *)&le;
    uint32_t crc;

    thinvm_release_encode(&test_uuid, &le, &src);
    g_assert_cmpint(thinvm_release_decode(&test_uuid, &back, &le), ==, 0);
    g_assert_cmpuint(back.epoch, ==, src.epoch);
    g_assert_cmpuint(back.sequence, ==, src.sequence);
    g_assert_cmphex(back.record_crc, ==, src.record_crc);
    g_assert_cmpmem(back.nonce.data, 16, src.nonce.data, 16);
    g_assert_cmphex((uint32_t)ldl_le_p(b + 56), ==, src.record_crc);

    crc = ldl_le_p(b + 4);
    put(&le, 4, 4, 0);
    g_assert_cmphex(slow_checksum(&test_uuid, 7, 1ULL << 40, &le, 512), ==,
                    crc);
    put(&le, 4, 4, crc);
    for (int i = 0; i < 512 * 8; i++) {
        bool foreign = i / 8 < 4 || (i / 8 >= 40 && i / 8 < 56);

        b[i / 8] ^= 1 << i % 8;
        g_assert_cmpint(thinvm_release_decode(&test_uuid, &back, &le), ==,
                        foreign ? -ENOENT : -EBADMSG);
        b[i / 8] ^= 1 << i % 8;
    }
}

/* A list of hot leaves: bytes, flips of bits, lengths that are none */
static void test_hot(void)
{
    ThinvmHotHeader src = { .epoch = 77, .number = 3, .nb_leaves = 1000,
                            .nonce = { .data = "nonce   1234567" } };
    g_autofree uint32_t *leaf = g_new(uint32_t, THINVM_MAX_HOT);
    g_autofree uint32_t *read = g_new(uint32_t, THINVM_MAX_HOT);
    g_autofree uint8_t *b = g_malloc(THINVM_HOT_SIZE);
    ThinvmHotLe *le = (ThinvmHotLe *)b;
    ThinvmHotHeader back;
    uint32_t crc, i;

    g_assert_cmpuint(thinvm_hot_bytes(THINVM_MAX_HOT), ==, THINVM_HOT_SIZE);
    for (i = 0; i < THINVM_MAX_HOT; i++) {
        leaf[i] = i * 2654435761u;
    }
    thinvm_hot_encode(&test_uuid, le, &src, leaf);
    g_assert_cmpint(thinvm_hot_decode(&test_uuid, &back, read, le), ==, 0);
    g_assert_cmpuint(back.epoch, ==, 77);
    g_assert_cmpuint(back.number, ==, 3);
    g_assert_cmpmem(back.nonce.data, 16, src.nonce.data, 16);
    g_assert_cmpmem(read, back.nb_leaves * 4, leaf, 1000 * 4);

    crc = ldl_le_p(b + 4);
    stl_le_p(b + 4, 0);
    g_assert_cmphex(slow_checksum(&test_uuid, 6, 77, le, 64 + 4000), ==, crc);
    stl_le_p(b + 4, crc);
    g_assert_cmpuint(ldl_le_p(b + 56), ==, 1000);
    g_assert_cmpuint((uint32_t)ldl_le_p(b + 64 + 4), ==, leaf[1]);

    for (i = 0; i < (64 + 4000) * 8; i += i < 64 * 8 ? 1 : 41) {
        b[i / 8] ^= 1 << i % 8;
        g_assert_cmpint(thinvm_hot_decode(&test_uuid, &back, read, le), <, 0);
        b[i / 8] ^= 1 << i % 8;
    }
    stl_le_p(b + 56, THINVM_MAX_HOT + 1);
    g_assert_cmpint(thinvm_hot_decode(&test_uuid, &back, read, le), ==,
                    -ENOENT);

    src.nb_leaves = THINVM_MAX_HOT;
    thinvm_hot_encode(&test_uuid, le, &src, leaf);
    g_assert_cmpint(thinvm_hot_decode(&test_uuid, &back, read, le), ==, 0);
    g_assert_cmpmem(read, back.nb_leaves * 4, leaf, THINVM_MAX_HOT * 4);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);

    g_test_add_func("/thinvm/operation/round", test_op_round);
    g_test_add_func("/thinvm/operation/bytes", test_op_bytes);
    g_test_add_func("/thinvm/operation/payloads", test_op_payloads);
    g_test_add_func("/thinvm/operation/fields", test_op_fields);
    g_test_add_func("/thinvm/operation/random", test_op_random);
    g_test_add_func("/thinvm/record/round", test_record_round);
    g_test_add_func("/thinvm/record/longest", test_record_longest);
    g_test_add_func("/thinvm/record/flips", test_record_flips);
    g_test_add_func("/thinvm/record/header", test_record_header);
    g_test_add_func("/thinvm/claim/round", test_claim_round);
    g_test_add_func("/thinvm/claim/fields", test_claim_fields);
    g_test_add_func("/thinvm/heartbeat", test_heartbeat);
    g_test_add_func("/thinvm/release", test_release);
    g_test_add_func("/thinvm/hot", test_hot);
    return g_test_run();
}
