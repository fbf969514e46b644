/*
 * Mutations of images that know the format
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * One mutation picks a structure that can be reached, one of its fields, and
 * a value at a boundary or out of another field.  Offsets and widths of
 * fields are all that is known about them here: what they mean is for the
 * code under test to find out.
 */
#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qemu/cutils.h"
#include "thinvm-fuzz-mutate.h"
#include "thinvm-fuzz-run.h"

/* libFuzzer's own, or a stand-in where that is not linked */
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size);

typedef struct Mutator {
    FuzzImage *image;
    uint64_t state;
    GArray *places, *records;
} Mutator;

typedef struct Field {
    uint16_t offset;
    uint8_t size;
} Field;

#define FIELD(type, name) { offsetof(type, name), sizeof_field(type, name) }

static const Field superblock_fields[] = {
    FIELD(ThinvmSuperblockLe, magic_le),
    FIELD(ThinvmSuperblockLe, version_major_le),
    FIELD(ThinvmSuperblockLe, version_minor_le),
    FIELD(ThinvmSuperblockLe, compatible_le),
    FIELD(ThinvmSuperblockLe, readonly_compatible_le),
    FIELD(ThinvmSuperblockLe, incompatible_le),
    FIELD(ThinvmSuperblockLe, autoclear_le),
    FIELD(ThinvmSuperblockLe, cluster_bits_le),
    FIELD(ThinvmSuperblockLe, flags_le),
    FIELD(ThinvmSuperblockLe, journal_offset_le),
    FIELD(ThinvmSuperblockLe, journal_size_le),
    FIELD(ThinvmSuperblockLe, virtual_size_le),
    FIELD(ThinvmSuperblockLe, device_clusters_le),
    FIELD(ThinvmSuperblockLe, generation_le),
    FIELD(ThinvmSuperblockLe, sequence_le),
    FIELD(ThinvmSuperblockLe, epoch_le),
    FIELD(ThinvmSuperblockLe, journal_position_le),
    FIELD(ThinvmSuperblockLe, record_crc_le),
    FIELD(ThinvmSuperblockLe, nb_extents_le),
    FIELD(ThinvmSuperblockLe, next_snapshot_id_le),
    FIELD(ThinvmSuperblockLe, current_snapshot_id_le),
    FIELD(ThinvmSuperblockLe, nb_snapshots_le),
    FIELD(ThinvmSuperblockLe, nb_snapshot_slots_le),
    FIELD(ThinvmSuperblockLe, vmstate_size_le),
};
#define FIRST_ROOT      offsetof(ThinvmSuperblockLe, map_root)
#define NB_ROOTS        14

static const Field snapshot_fields[] = {
    FIELD(ThinvmSnapshotLe, id_le),
    FIELD(ThinvmSnapshotLe, parent_id_le),
    FIELD(ThinvmSnapshotLe, virtual_size_le),
    FIELD(ThinvmSnapshotLe, vmstate_size_le),
    FIELD(ThinvmSnapshotLe, date_nsec_le),
    FIELD(ThinvmSnapshotLe, flags_le),
    { offsetof(ThinvmSnapshotLe, reserved), 8 },
    { offsetof(ThinvmSnapshotLe, name), 2 },
    { offsetof(ThinvmSnapshotLe, name) + 255, 1 },
};

static const Field space_fields[] = {
    FIELD(ThinvmSpaceBlockLe, first_page_le),
    FIELD(ThinvmSpaceBlockLe, nb_pages_le),
    { offsetof(ThinvmSpaceBlockLe, reserved_le), 4 },
};

static const Field backing_fields[] = {
    FIELD(ThinvmBackingLe, name_length_le),
    FIELD(ThinvmBackingLe, format_length_le),
    { offsetof(ThinvmBackingLe, reserved), 8 },
    { offsetof(ThinvmBackingLe, name), 4 },
    { offsetof(ThinvmBackingLe, unused), 8 },
};

static const Field record_fields[] = {
    FIELD(ThinvmRecordLe, magic_le),
    FIELD(ThinvmRecordLe, epoch_le),
    FIELD(ThinvmRecordLe, sequence_le),
    FIELD(ThinvmRecordLe, flushed_sequence_le),
    FIELD(ThinvmRecordLe, length_le),
    FIELD(ThinvmRecordLe, nb_operations_le),
    FIELD(ThinvmRecordLe, flags_le),
    FIELD(ThinvmRecordLe, nb_sums_le),
    { offsetof(ThinvmRecordLe, reserved), 8 },
};

static const Field op_fields[] = {
    FIELD(ThinvmOpLe, type_le),
    FIELD(ThinvmOpLe, length_le),
    FIELD(ThinvmOpLe, tree),
    FIELD(ThinvmOpLe, source),
    FIELD(ThinvmOpLe, valid_le),
    FIELD(ThinvmOpLe, guest_le),
    FIELD(ThinvmOpLe, count_le),
    FIELD(ThinvmOpLe, physical_le),
    FIELD(ThinvmOpLe, value_le),
};

static const Field sum_fields[] = {
    FIELD(ThinvmDataSumLe, offset_le),
    FIELD(ThinvmDataSumLe, bytes_le),
    FIELD(ThinvmDataSumLe, crc_le),
};

static const Field claim_fields[] = {
    FIELD(ThinvmClaimLe, magic_le),
    FIELD(ThinvmClaimLe, epoch_le),
    FIELD(ThinvmClaimLe, state_le),
    { offsetof(ThinvmClaimLe, host_name), 4 },
    { offsetof(ThinvmClaimLe, host_name) + 63, 1 },
    { offsetof(ThinvmClaimLe, image_uuid), 8 },
    { offsetof(ThinvmClaimLe, reserved), 8 },
};

/* ------------------------------------------------------------------ */
/* Choices                                                             */

/* splitmix64 */
static uint64_t draw(Mutator *m)
{
    uint64_t z = m->state += 0x9e3779b97f4a7c15ULL;

    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ z >> 27) * 0x94d049bb133111ebULL;
    return z ^ z >> 31;
}

static uint64_t below(Mutator *m, uint64_t n)
{
    return draw(m) % n;
}

static FuzzPlace *any_place(Mutator *m)
{
    return m->places->len ? &g_array_index(m->places, FuzzPlace,
                                           below(m, m->places->len)) : NULL;
}

/* Numbers that some part of this image may take for a limit */
static uint64_t image_number(Mutator *m)
{
    FuzzBase base[THINVM_NB_SUPERBLOCKS];
    FuzzPlace *place = any_place(m);
    ThinvmSuperblockLe *le;
    ThinvmSuperblock sb = { };

    fuzz_bases(m->image, base);
    le = base[below(m, 2)].le ?: base[0].le;
    if (!le) {
        return draw(m);
    }
    sb.journal_offset = le64_to_cpu(le->journal_offset_le);
    sb.journal_size = le64_to_cpu(le->journal_size_le);
    sb.cluster_bits = le32_to_cpu(le->cluster_bits_le) & 31;
    switch (below(m, 10)) {
    case 0:
        return thinvm_first_cluster(&sb);
    case 1:
        return le64_to_cpu(le->device_clusters_le);
    case 2:
        return le64_to_cpu(le->virtual_size_le) >> sb.cluster_bits;
    case 3:
        return le64_to_cpu(le->sequence_le);
    case 4:
        return le64_to_cpu(le->epoch_le);
    case 5:
        return le64_to_cpu(le->next_snapshot_id_le);
    case 6:
        return place ? place->page : 0;
    case 7:
        return place ? place->page >> ((sb.cluster_bits - 12) & 31) : 0;
    case 8:
        return m->image->length >> sb.cluster_bits;
    default:
        return thinvm_first_cluster(&sb) +
               below(m, MAX(1, MIN(le64_to_cpu(le->device_clusters_le),
                                   1ULL << 34)));
    }
}

static uint64_t any_value(Mutator *m, uint64_t old)
{
    switch (below(m, 9)) {
    case 0:
        return 0;
    case 1:
        return UINT64_MAX;
    case 2:
        return (1ULL << below(m, 64)) + below(m, 3) - 1;
    case 3:
        return old + 1;
    case 4:
        return old - 1;
    case 5:
        return old ^ 1ULL << below(m, 64);
    case 6:
        return below(m, 17);
    default:
        return image_number(m) + below(m, 3) - 1;
    }
}

/* Mostly small changes: bits within the field's width */
static void change_field(Mutator *m, void *p, unsigned size)
{
    uint64_t old = size == 1 ? ldub_p(p) : size == 2 ? lduw_le_p(p) :
                   size == 4 ? ldl_le_p(p) : ldq_le_p(p);
    uint64_t new = below(m, 8) ? any_value(m, old) :
                   old ^ 1ULL << below(m, 8 * size);

    switch (size) {
    case 1:
        stb_p(p, new);
        break;
    case 2:
        stw_le_p(p, new);
        break;
    case 4:
        stl_le_p(p, new);
        break;
    default:
        stq_le_p(p, new);
    }
}

static void change_fields(Mutator *m, void *p, const Field *fields, size_t nb)
{
    const Field *f = &fields[below(m, nb)];

    change_field(m, p + f->offset, f->size);
}

/* ------------------------------------------------------------------ */
/* Pages                                                               */

/* A pointer with another address, type, flag, or all of another pointer */
static void change_pointer(Mutator *m, uint8_t *p)
{
    uint64_t word = ldq_le_p(p);
    uint64_t address = word & THINVM_CLUSTER_MASK;
    FuzzPlace *place = any_place(m);

    switch (below(m, 8)) {
    case 0:
        address = any_value(m, address) & THINVM_CLUSTER_MASK;
        word = (word & ~THINVM_CLUSTER_MASK) | address;
        break;
    case 1:
        word ^= 1ULL << (40 + below(m, 8));
        break;
    case 2:
        word = below(m, 8) << THINVM_PTR_TYPE_SHIFT;
        if (below(m, 2)) {
            word |= image_number(m) & THINVM_CLUSTER_MASK;
        }
        break;
    case 3:
    case 4:
        word = (uint64_t)THINVM_PTR_PAGE << THINVM_PTR_TYPE_SHIFT;
        word |= (place ? place->page : 0) & THINVM_CLUSTER_MASK;
        break;
    case 5:
        word = 0;
        break;
    case 6:
        change_field(m, p + 12, 4);     /* extra */
        break;
    default:
        word ^= draw(m) << 48;
    }
    stq_le_p(p, word);
    if ((word >> THINVM_PTR_TYPE_SHIFT & 15) != THINVM_PTR_PAGE &&
        below(m, 8)) {
        /* what a page alone has */
        stq_le_p(p, word & MAKE_64BIT_MASK(0, 48));
        stq_le_p(p + 8, 0);
    }
}

/* An index that is in use, if a few tries find one, or any */
static unsigned used_index(Mutator *m, const uint8_t *block, unsigned size)
{
    unsigned nb = FUZZ_BLOCK / size;
    unsigned i = below(m, nb);

    for (unsigned n = 0; n < nb && below(m, 16); n++) {
        if (!buffer_is_zero(block + i * size, size)) {
            break;
        }
        i = (i + 1) % nb;
    }
    return i;
}

static void change_entry(Mutator *m, uint8_t *p)
{
    uint64_t entry = ldq_le_p(p);

    switch (below(m, 5)) {
    case 0:
        entry = (entry & ~THINVM_CLUSTER_MASK) |
                (any_value(m, entry) & THINVM_CLUSTER_MASK);
        break;
    case 1:
        entry ^= 1ULL << (40 + below(m, 24));
        break;
    case 2:
        entry = thinvm_entry(image_number(m) & THINVM_CLUSTER_MASK,
                             draw(m), below(m, 2));
        break;
    case 3:
        entry = below(m, 3) << THINVM_ENTRY_SOURCE_SHIFT;
        break;
    default:
        entry ^= (draw(m) & 0xffff) << THINVM_ENTRY_VALID_SHIFT;
    }
    stq_le_p(p, entry);
}

static void change_snapshot(Mutator *m, uint8_t *slot)
{
    if (below(m, 3)) {
        change_fields(m, slot, snapshot_fields, ARRAY_SIZE(snapshot_fields));
    } else {
        change_pointer(m, slot + (below(m, 2) ? 16 : 32));
    }
}

static void change_place(Mutator *m, const FuzzPlace *place)
{
    uint8_t *block = fuzz_image_block(m->image, place->page, true);

    if (!block) {
        return;
    }
    if (place->level > 0) {
        change_pointer(m, block + 16 * used_index(m, block, 16));
        return;
    }
    switch (place->kind) {
    case THINVM_PAGE_MAP_LEAF:
        change_entry(m, block + 8 * used_index(m, block, 8));
        break;
    case THINVM_PAGE_COUNT_LEAF:
        change_field(m, block + 2 * used_index(m, block, 2), 2);
        break;
    case THINVM_PAGE_SPACE_BLOCK:
        if (below(m, 2)) {
            change_fields(m, block, space_fields, ARRAY_SIZE(space_fields));
        } else {
            change_field(m, block + 2 * used_index(m, block, 2), 2);
        }
        break;
    case THINVM_PAGE_SNAPSHOT_LEAF:
        change_snapshot(m, block + 512 * used_index(m, block, 512));
        break;
    default:
        change_fields(m, block, backing_fields, ARRAY_SIZE(backing_fields));
    }
}

static void change_superblock(Mutator *m)
{
    FuzzBase base[THINVM_NB_SUPERBLOCKS];
    int i = below(m, 2);
    uint8_t *le;

    fuzz_bases(m->image, base);
    le = (uint8_t *)(base[i].le ?: base[!i].le);
    if (!le) {
        return;
    }
    if (below(m, 4)) {
        change_fields(m, le, superblock_fields,
                      ARRAY_SIZE(superblock_fields));
    } else {
        change_pointer(m, le + FIRST_ROOT + 16 * below(m, NB_ROOTS));
    }
}

/* The other slot gets this one's contents, of a generation beside it */
static void copy_superblock(Mutator *m)
{
    FuzzBase base[THINVM_NB_SUPERBLOCKS];
    int from = below(m, 2);
    uint8_t *to;

    fuzz_bases(m->image, base);
    if (!base[from].le) {
        return;
    }
    to = fuzz_image_block(m->image, thinvm_superblock_offset(!from) /
                          FUZZ_BLOCK, true);
    if (to) {
        ThinvmSuperblockLe *le = (ThinvmSuperblockLe *)to;

        memcpy(to, base[from].le, 512);
        le->generation_le = cpu_to_le64(le64_to_cpu(le->generation_le) +
                                        below(m, 3) - 1);
    }
}

/* ------------------------------------------------------------------ */
/* The journal                                                         */

/* Where the operations end, and checksums of data begin, if there are any */
static unsigned operations_end(const uint8_t *block, unsigned length)
{
    return length - fuzz_nb_sums(block, length) * sizeof(ThinvmDataSumLe);
}

/* Offset of a record's operation number @nr, or of their end */
static unsigned find_op(const uint8_t *block, unsigned length, unsigned nr)
{
    unsigned at = sizeof(ThinvmRecordLe);
    unsigned end = operations_end(block, length);

    while (nr-- && at + sizeof(ThinvmOpLe) <= end) {
        unsigned n = lduw_le_p(block + at + 2);

        if (n < sizeof(ThinvmOpLe) || at + n > end) {
            break;
        }
        at += n;
    }
    return at;
}

static uint64_t guest_number(Mutator *m)
{
    static const uint64_t spans[] = { 8, 513, 1024, 1 << 17, 1ULL << 33 };

    return below(m, spans[below(m, ARRAY_SIZE(spans))]);
}

/* An operation that may well be right */
static void make_op(Mutator *m, ThinvmOp *op)
{
    *op = (ThinvmOp) {
        .type = 1 + below(m, THINVM_OP__MAX - 1),
        .tree = !below(m, 8),
        .source = below(m, 2),
        .guest = guest_number(m),
        .count = 1 + guest_number(m),
        .physical = image_number(m),
        .value = image_number(m),
        .valid = draw(m),
    };
    switch (op->type) {
    case THINVM_OP_MAP:
        op->count = 1 + below(m, 16);
        op->source = op->valid == THINVM_ALL_VALID ? 0 : op->source;
        break;
    case THINVM_OP_MAP_RUN:
        op->guest &= ~511ULL;
        op->valid = below(m, 2) ? THINVM_ALL_VALID : 0;
        break;
    case THINVM_OP_RESIZE:
        op->value = guest_number(m) * 512;
        break;
    case THINVM_OP_META_EXTEND:
        op->count = 1 + below(m, 8);
        break;
    case THINVM_OP_SNAPSHOT_CREATE:
        op->count = below(m, 6);
        break;
    case THINVM_OP_SNAPSHOT_DELETE_STEP:
    case THINVM_OP_SNAPSHOT_GOTO:
        op->count = below(m, 6);
        op->guest = below(m, 4);
        op->value = 1 + below(m, 4);
        break;
    default:
        break;
    }
}

static unsigned encode_op(Mutator *m, uint8_t *buf)
{
    g_autofree ThinvmBacking *backing = g_new0(ThinvmBacking, 1);
    g_autofree ThinvmSnapshot *snapshot = g_new0(ThinvmSnapshot, 1);
    ThinvmOp op;

    make_op(m, &op);
    op.backing = backing;
    op.snapshot = snapshot;
    snapshot->id = image_number(m);
    snprintf(snapshot->name, sizeof(snapshot->name), "f%" PRIu64, below(m, 9));
    memset(backing->name, 'f', below(m, 20));
    thinvm_op_encode(buf, &op);
    return thinvm_op_length(&op);
}

/* Put a new operation before number @nr; records stay in one block */
static void insert_op(Mutator *m, uint8_t *block, unsigned length, unsigned nr)
{
    uint8_t op[THINVM_OP_MAX_LENGTH];
    unsigned n = encode_op(m, op);
    unsigned at = MIN(find_op(block, length, nr), length);

    if (length + n <= FUZZ_BLOCK) {
        memmove(block + at + n, block + at, length - at);
        memcpy(block + at, op, n);
        stl_le_p(block + offsetof(ThinvmRecordLe, length_le), length + n);
    }
}

static void remove_op(uint8_t *block, unsigned length, unsigned nr)
{
    unsigned at = MIN(find_op(block, length, nr), length);
    unsigned end = MIN(find_op(block, length, nr + 1), length);

    memmove(block + at, block + end, length - end);
    memset(block + length - (end - at), 0, end - at);
    stl_le_p(block + offsetof(ThinvmRecordLe, length_le),
             length - (end - at));
}

/* Where data may be: of an operation of the record, or of any cluster */
static uint64_t data_offset(Mutator *m, const uint8_t *block, unsigned length)
{
    unsigned at = find_op(block, length, below(m, 8));
    FuzzBase base[THINVM_NB_SUPERBLOCKS];
    ThinvmSuperblockLe *le;
    uint64_t cluster = image_number(m);

    fuzz_bases(m->image, base);
    le = base[0].le ?: base[1].le;
    if (below(m, 4) && at + sizeof(ThinvmOpLe) <= operations_end(block,
                                                                 length)) {
        cluster = ldq_le_p(block + at + offsetof(ThinvmOpLe, physical_le));
    }
    return (cluster << (le ? le32_to_cpu(le->cluster_bits_le) & 31 : 16)) +
           below(m, 16) * THINVM_SECTOR_SIZE;
}

/* One more checksum of data; what it is of is for fuzz_fix() to find out */
static void add_sum(Mutator *m, uint8_t *block, unsigned length)
{
    ThinvmRecordLe *rec = (ThinvmRecordLe *)block;
    unsigned nb = fuzz_nb_sums(block, length);
    ThinvmDataSum sum = {
        .offset = data_offset(m, block, length),
        .bytes = THINVM_SECTOR_SIZE << below(m, 8),
    };

    if (length + sizeof(ThinvmDataSumLe) <= FUZZ_BLOCK) {
        thinvm_data_sum_encode(block + length, &sum);
        rec->length_le = cpu_to_le32(length + sizeof(ThinvmDataSumLe));
        rec->nb_sums_le = cpu_to_le32(nb + 1);
        rec->flags_le |= cpu_to_le32(THINVM_RECORD_SUMS);
    }
}

static void change_sum(Mutator *m, uint8_t *block, unsigned length)
{
    unsigned nb = fuzz_nb_sums(block, length);
    unsigned at = operations_end(block, length);

    if (nb) {
        change_fields(m, block + at + below(m, nb) * sizeof(ThinvmDataSumLe),
                      sum_fields, ARRAY_SIZE(sum_fields));
    }
}

static void change_record(Mutator *m)
{
    uint64_t offset;
    uint8_t *block;
    unsigned length, nb, nr;

    if (!m->records->len) {
        return;
    }
    offset = g_array_index(m->records, uint64_t, below(m, m->records->len));
    block = fuzz_image_block(m->image, offset / FUZZ_BLOCK, true);
    if (!block) {
        return;
    }
    length = ldl_le_p(block + offsetof(ThinvmRecordLe, length_le));
    /* an earlier change may have made it anything */
    length = MAX(MIN(length, FUZZ_BLOCK), sizeof(ThinvmRecordLe));
    nb = ldl_le_p(block + offsetof(ThinvmRecordLe, nb_operations_le));
    nr = below(m, MIN(nb, 100) + 1);
    switch (below(m, 8)) {
    case 0:
        change_fields(m, block, record_fields, ARRAY_SIZE(record_fields));
        break;
    case 6:
        add_sum(m, block, length);
        break;
    case 7:
        change_sum(m, block, length);
        break;
    case 1:
    case 2:
        insert_op(m, block, length, nr);
        break;
    case 3:
        remove_op(block, length, nr);
        break;
    default:
        nr = find_op(block, length, nr);
        if (nr + sizeof(ThinvmOpLe) <= FUZZ_BLOCK) {
            change_fields(m, block + nr, op_fields, ARRAY_SIZE(op_fields));
        }
    }
}

/* A record behind the last one, or at the base if there is none */
static void append_record(Mutator *m)
{
    FuzzBase base[THINVM_NB_SUPERBLOCKS];
    uint64_t position, size;
    uint8_t *block;
    int i;

    fuzz_bases(m->image, base);
    i = base[0].journal_size ? 0 : 1;
    size = base[i].journal_size;
    if (!size) {
        return;
    }
    if (m->records->len) {
        position = g_array_index(m->records, uint64_t, m->records->len - 1);
        block = fuzz_image_block(m->image, position / FUZZ_BLOCK, false);
        position += ROUND_UP(ldl_le_p(block + offsetof(ThinvmRecordLe,
                                                       length_le)),
                             FUZZ_BLOCK) - THINVM_JOURNAL_OFFSET;
    } else {
        position = le64_to_cpu(base[i].le->journal_position_le);
    }
    block = fuzz_image_block(m->image, (position % size +
                                        THINVM_JOURNAL_OFFSET) / FUZZ_BLOCK,
                             true);
    if (block) {
        memset(block, 0, FUZZ_BLOCK);
        stl_le_p(block, THINVM_RECORD_MAGIC);
        stl_le_p(block + offsetof(ThinvmRecordLe, length_le),
                 sizeof(ThinvmRecordLe));
        for (int n = 1 + below(m, 3); n; n--) {
            unsigned length = ldl_le_p(block + offsetof(ThinvmRecordLe,
                                                        length_le));

            insert_op(m, block, length, 100);
        }
        if (below(m, 3) == 0) {
            add_sum(m, block, ldl_le_p(block + offsetof(ThinvmRecordLe,
                                                        length_le)));
        }
    }
}

/* Only of the last record do they decide anything */
static void sum_last(Mutator *m)
{
    GArray *records = fuzz_records(m->image);
    uint8_t *block = NULL;
    uint64_t offset;
    uint32_t length;

    if (records->len) {
        offset = g_array_index(records, uint64_t, records->len - 1);
        block = fuzz_image_block(m->image, offset / FUZZ_BLOCK, false);
    }
    for (int n = 1 + below(m, 3); block && n; n--) {
        length = ldl_le_p(block + offsetof(ThinvmRecordLe, length_le));
        if (length <= FUZZ_BLOCK) {
            add_sum(m, block, length);
        }
    }
    g_array_unref(records);
}

/* ------------------------------------------------------------------ */
/* The rest                                                            */

static void change_owners(Mutator *m)
{
    uint64_t number = THINVM_CLAIM_OFFSET / FUZZ_BLOCK +
                      below(m, 2 * THINVM_NB_CLAIMS);
    uint8_t *block = fuzz_image_block(m->image, number, true);
    FuzzBase base[THINVM_NB_SUPERBLOCKS];
    bool claim = number < THINVM_HEARTBEAT_OFFSET / FUZZ_BLOCK;

    fuzz_bases(m->image, base);
    if (!block || !base[0].le) {
        return;
    }
    if (ldl_le_p(block) == 0) {
        stl_le_p(block, claim ? THINVM_CLAIM_MAGIC : THINVM_HEARTBEAT_MAGIC);
        stq_le_p(block + 8, number % THINVM_NB_CLAIMS + 1);
        stl_le_p(block + 16, 1);
        memcpy(block + (claim ? offsetof(ThinvmClaimLe, image_uuid) :
                        offsetof(ThinvmHeartbeatLe, image_uuid)),
               base[0].le->uuid, 16);
    } else {
        change_fields(m, block, claim_fields, ARRAY_SIZE(claim_fields));
    }
}

/* The bytes of one page in the place of another, or none */
static void copy_page(Mutator *m)
{
    FuzzPlace *a = any_place(m), *b = any_place(m);
    uint8_t *from, *to;

    if (!a || a == b) {
        return;
    }
    to = fuzz_image_block(m->image, b->page, true);
    from = fuzz_image_block(m->image, a->page, false);
    if (to && from && below(m, 4)) {
        memcpy(to, from, FUZZ_BLOCK);
    } else if (to) {
        memset(to, 0, FUZZ_BLOCK);
    }
}

static void change_length(Mutator *m)
{
    FuzzImage *image = m->image;

    switch (below(m, 4)) {
    case 0:
        image->length = any_value(m, image->length) & ~511ULL;
        break;
    case 1:
        image->length += below(m, 64) * MiB;
        break;
    case 2:
        image->length -= MIN(image->length, below(m, 64) * 64 * KiB);
        break;
    default:
        image->length = 1ULL << (20 + below(m, 33));
    }
    image->length = MIN(image->length, FUZZ_MAX_LENGTH);
}

static void change_program(Mutator *m)
{
    FuzzImage *image = m->image;
    size_t max = MIN(image->program_size + 32, 512);
    size_t at;

    image->program = g_realloc(image->program, max);
    if (below(m, 2) || image->program_size + 8 > max) {
        image->program_size = LLVMFuzzerMutate(image->program,
                                               MIN(image->program_size, max),
                                               max);
        return;
    }
    /* A step in between */
    at = below(m, image->program_size + 1);
    memmove(image->program + at + 8, image->program + at,
            image->program_size - at);
    image->program_size += 8;
    stq_le_p(image->program + at, draw(m));
    image->program[at] = below(m, FUZZ_NB_STEPS);
}

static void change_bytes(Mutator *m)
{
    GArray *numbers = fuzz_image_numbers(m->image);

    if (numbers->len) {
        uint64_t number = g_array_index(numbers, uint64_t,
                                        below(m, numbers->len));
        uint8_t *block = fuzz_image_block(m->image, number, true);
        unsigned n = 1 + below(m, 64);
        unsigned at = below(m, FUZZ_BLOCK - n);

        LLVMFuzzerMutate(block + at, n, n);
    }
    g_array_unref(numbers);
}

void fuzz_mutate(FuzzImage *image, uint64_t random)
{
    Mutator m = { .image = image, .state = random };
    unsigned flags = 0, nb;
    FuzzPlace *place;

    m.places = fuzz_places(image);
    m.records = fuzz_records(image);
    nb = below(&m, 3) ? 1 : 1 + below(&m, 5);
    while (nb--) {
        switch (below(&m, 20)) {
        case 0 ... 5:
            place = any_place(&m);
            if (place) {
                change_place(&m, place);
            }
            break;
        case 6 ... 7:
            change_superblock(&m);
            break;
        case 8 ... 10:
            change_record(&m);
            break;
        case 11:
            append_record(&m);
            break;
        case 12:
            copy_page(&m);
            break;
        case 13:
            change_length(&m);
            break;
        case 14:
            change_bytes(&m);
            break;
        case 15:
            if (below(&m, 3)) {
                copy_superblock(&m);
            } else {
                change_owners(&m);
            }
            break;
        default:
            change_program(&m);
        }
    }
    if (below(&m, 4) == 0) {
        sum_last(&m);
    }
    flags |= below(&m, 16) ? 0 : FUZZ_KEEP_JOURNAL;
    flags |= below(&m, 16) ? 0 : FUZZ_KEEP_NUMBERS;
    flags |= below(&m, 2) ? 0 : FUZZ_FIX_COUNTS;
    flags |= below(&m, 4) ? 0 : FUZZ_KEEP_SUMS;
    if (below(&m, 32)) {
        fuzz_fix(image, flags);
    }
    g_array_unref(m.places);
    g_array_unref(m.records);
}
