/*
 * thinvm on-disk format: journal operations and records, claims, heartbeats
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Everything that is written outside of checkpoints.  Operations are a
 * protocol between hosts and versions: one that is not known stops a reader.
 * Relies on nothing but QEMU's utilities; no I/O, no state.
 *
 * Invariant 3 of the design: nothing is returned whose type, length, bounds
 * and unused fields were not looked at.  (Whether an operation fits the state
 * of the image is the engine's to judge.)
 */

#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qemu/cutils.h"
#include "format.h"

/* ------------------------------------------------------------------ */
/* Operations                                                          */

/* Which fields a type uses; the others are 0 on the device */
enum {
    USES_TREE = 1,
    USES_SOURCE = 2,
    USES_VALID = 4,
    USES_GUEST = 8,
    USES_COUNT = 16,
    USES_PHYSICAL = 32,
    USES_VALUE = 64,
};

typedef struct OpShape {
    const char *name;
    unsigned uses;
    size_t payload;             /* bytes */
} OpShape;

static const OpShape op_shapes[THINVM_OP__MAX] = {
    [THINVM_OP_MAP] = {
        "MAP", USES_TREE | USES_SOURCE | USES_VALID | USES_GUEST |
               USES_COUNT | USES_PHYSICAL,
    },
    [THINVM_OP_VALIDATE] = {
        "VALIDATE", USES_TREE | USES_VALID | USES_GUEST | USES_PHYSICAL,
    },
    [THINVM_OP_UNMAP] = {
        "UNMAP", USES_TREE | USES_SOURCE | USES_GUEST | USES_COUNT,
    },
    [THINVM_OP_INVALIDATE] = {
        "INVALIDATE", USES_TREE | USES_VALID | USES_GUEST | USES_PHYSICAL,
    },
    [THINVM_OP_MAP_RUN] = {
        "MAP_RUN", USES_TREE | USES_VALID | USES_GUEST | USES_PHYSICAL,
    },
    [THINVM_OP_RESIZE] = { "RESIZE", USES_VALUE },
    [THINVM_OP_GROW] = { "GROW", USES_VALUE },
    [THINVM_OP_META_EXTEND] = { "META_EXTEND", USES_COUNT | USES_PHYSICAL },
    [THINVM_OP_SET_BACKING] = { "SET_BACKING", 0, THINVM_OP_BACKING_PAYLOAD },
    [THINVM_OP_EPOCH] = { "EPOCH", USES_VALUE },
    [THINVM_OP_SNAPSHOT_CREATE] = {
        "SNAPSHOT_CREATE", USES_COUNT, sizeof(ThinvmSnapshotLe),
    },
    [THINVM_OP_SNAPSHOT_DELETE_STEP] = {
        "SNAPSHOT_DELETE_STEP", USES_GUEST | USES_VALUE,
    },
    [THINVM_OP_SNAPSHOT_GOTO] = {
        "SNAPSHOT_GOTO",
        USES_GUEST | USES_COUNT | USES_PHYSICAL | USES_VALUE,
    },
    [THINVM_OP_VMSTATE_SIZE] = { "VMSTATE_SIZE", USES_VALUE },
    [THINVM_OP_SNAPSHOT_PROTECT] = {
        "SNAPSHOT_PROTECT", USES_GUEST | USES_COUNT | USES_VALUE,
    },
    [THINVM_OP_RELOCATE] = {
        "RELOCATE", USES_TREE | USES_SOURCE | USES_GUEST | USES_COUNT |
                    USES_PHYSICAL | USES_VALUE,
    },
    [THINVM_OP_SHARE] = {
        "SHARE", USES_TREE | USES_GUEST | USES_COUNT | USES_PHYSICAL |
                 USES_VALUE,
    },
    [THINVM_OP_SHRINK] = { "SHRINK", USES_VALUE },
};
QEMU_BUILD_BUG_ON(offsetof(ThinvmBackingLe, unused) !=
                  THINVM_OP_BACKING_PAYLOAD);
QEMU_BUILD_BUG_ON(sizeof(ThinvmSnapshotLe) > THINVM_OP_BACKING_PAYLOAD);

/* NULL for a type that this version does not know */
static const OpShape *op_shape(unsigned type)
{
    return type < THINVM_OP__MAX && op_shapes[type].name ? &op_shapes[type]
                                                         : NULL;
}

size_t thinvm_op_length(const ThinvmOp *op)
{
    const OpShape *shape = op_shape(op->type);

    assert(shape);
    return sizeof(ThinvmOpLe) + shape->payload;
}

static void encode_payload(uint8_t *dst, const ThinvmOp *op)
{
    if (op->type == THINVM_OP_SET_BACKING) {
        ThinvmBackingLe backing;

        thinvm_backing_encode(&backing, op->backing);
        memcpy(dst, &backing, THINVM_OP_BACKING_PAYLOAD);
    } else if (op->type == THINVM_OP_SNAPSHOT_CREATE) {
        ThinvmSnapshot snapshot = *op->snapshot;
        ThinvmSnapshotLe le;

        /* Pages have no address before a checkpoint gave them one */
        snapshot.root = snapshot.vmstate_root = (ThinvmPointer) { 0 };
        thinvm_snapshot_encode(&le, &snapshot);
        memcpy(dst, &le, sizeof(le));
    }
}

void thinvm_op_encode(uint8_t *dst, const ThinvmOp *op)
{
    const OpShape *shape = op_shape(op->type);
    size_t length = thinvm_op_length(op);
    unsigned uses = shape->uses;
    ThinvmOpLe le = {
        .type_le = cpu_to_le16(op->type),
        .length_le = cpu_to_le16(length),
        .tree = uses & USES_TREE ? op->tree : 0,
        .source = uses & USES_SOURCE ? op->source : 0,
        .valid_le = cpu_to_le16(uses & USES_VALID ? op->valid : 0),
        .guest_le = cpu_to_le64(uses & USES_GUEST ? op->guest : 0),
        .count_le = cpu_to_le64(uses & USES_COUNT ? op->count : 0),
        .physical_le = cpu_to_le64(uses & USES_PHYSICAL ? op->physical : 0),
        .value_le = cpu_to_le64(uses & USES_VALUE ? op->value : 0),
    };

    memcpy(dst, &le, sizeof(le));
    encode_payload(dst + sizeof(le), op);
}

/* What is set although the type does not use it, or NULL */
static const char *unused_field_set(const ThinvmOp *op, unsigned uses)
{
    const struct {
        unsigned use;
        const char *name;
        uint64_t value;
    } fields[] = {
        { USES_TREE, "tree", op->tree },
        { USES_SOURCE, "source", op->source },
        { USES_VALID, "valid bits", op->valid },
        { USES_GUEST, "guest cluster", op->guest },
        { USES_COUNT, "count", op->count },
        { USES_PHYSICAL, "physical cluster", op->physical },
        { USES_VALUE, "value", op->value },
    };
    int i;

    for (i = 0; i < ARRAY_SIZE(fields); i++) {
        if (!(uses & fields[i].use) && fields[i].value) {
            return fields[i].name;
        }
    }
    return NULL;
}

static bool range_ok(uint64_t first, uint64_t count, uint64_t end)
{
    return count >= 1 && first < end && count <= end - first;
}

static bool physical_ok(const ThinvmOp *op, uint64_t count)
{
    return op->physical &&
           range_ok(op->physical, count, THINVM_MAX_CLUSTERS);
}

static bool within_one_leaf(uint64_t guest, uint64_t count)
{
    return guest / THINVM_ENTRIES_PER_LEAF ==
           (guest + count - 1) / THINVM_ENTRIES_PER_LEAF;
}

/* Does it mark clusters as the template's?  (Is it a template's image?) */
static bool marks(const ThinvmOp *op)
{
    return op->type == THINVM_OP_MAP &&
           op->source == THINVM_SOURCE_TEMPLATE &&
           op->tree == THINVM_TREE_DISK && op->valid == THINVM_ALL_VALID;
}

/* Name of the field that is out of its bounds, or NULL */
static const char *judge_mapping_op(const ThinvmOp *op)
{
    bool ranged = op->type == THINVM_OP_MAP || op->type == THINVM_OP_UNMAP;
    uint64_t count = ranged ? op->count
                            : op->type == THINVM_OP_MAP_RUN
                              ? THINVM_ENTRIES_PER_LEAF : 1;

    if (op->tree >= THINVM_NB_TREES) {
        return "tree";
    }
    if (op->source > THINVM_SOURCE_ZERO && !marks(op)) {
        return "source";
    }
    if (!range_ok(op->guest, count, THINVM_MAX_GUEST_CLUSTERS)) {
        return "guest range";
    }
    if (op->type == THINVM_OP_UNMAP) {
        return NULL;
    }
    if (!physical_ok(op, count)) {
        return "physical cluster";
    }
    if (!within_one_leaf(op->guest, count)) {
        return "guest range";
    }
    switch (op->type) {
    case THINVM_OP_VALIDATE:
    case THINVM_OP_INVALIDATE:
        return op->valid ? NULL : "valid bits";
    case THINVM_OP_MAP_RUN:
        return !op->valid || op->valid == THINVM_ALL_VALID
               ? NULL : "valid bits";
    default:
        return NULL;
    }
}

/*
 * Here the guest field is a slot, and the physical one an id; where a record
 * is added, count is its slot plus one, or 0
 */
static const char *judge_snapshot_op(const ThinvmOp *op)
{
    bool adds = op->type == THINVM_OP_SNAPSHOT_CREATE ||
                op->type == THINVM_OP_SNAPSHOT_GOTO;

    if (adds && op->count > THINVM_MAX_SNAPSHOT_SLOTS) {
        return "slot of the new record";
    }
    if (op->type == THINVM_OP_SNAPSHOT_CREATE) {
        return NULL;
    }
    if (op->guest >= THINVM_MAX_SNAPSHOT_SLOTS) {
        return "snapshot slot";
    }
    if (!op->value || op->value > THINVM_COUNTER_MAX) {
        return "snapshot id";
    }
    if (op->type == THINVM_OP_SNAPSHOT_GOTO &&
        (op->physical <= op->value || op->physical > THINVM_COUNTER_MAX)) {
        return "id of the former tree's record";
    }
    if (op->type == THINVM_OP_SNAPSHOT_PROTECT && op->count > 1) {
        return "count";
    }
    return NULL;
}

static const char *judge_relocate(const ThinvmOp *op)
{
    uint64_t former = op->value & THINVM_CLUSTER_MASK;

    if (op->tree >= THINVM_NB_TREES) {
        return "tree";
    }
    if (op->value >> THINVM_HOLDER_SHIFT > THINVM_MAX_SNAPSHOT_SLOTS) {
        return "slot of the snapshot";
    }
    if (op->source > 1) {
        return "source";
    }
    if (!range_ok(op->guest, MAX(op->count, 1), THINVM_MAX_GUEST_CLUSTERS)) {
        return "guest range";
    }
    if (!op->count) {
        return op->physical || former || op->source ? "physical range" : NULL;
    }
    if (op->count > THINVM_ENTRIES_PER_LEAF ||
        !within_one_leaf(op->guest, op->count)) {
        return "guest range";
    }
    return physical_ok(op, op->count) && former &&
           range_ok(former, op->count, THINVM_MAX_CLUSTERS) &&
           (op->physical + op->count <= former ||
            former + op->count <= op->physical) ? NULL : "physical range";
}

static const char *judge_share(const ThinvmOp *op)
{
    if (op->tree >= THINVM_NB_TREES) {
        return "tree";
    }
    if (op->guest >= THINVM_MAX_GUEST_CLUSTERS) {
        return "guest cluster";
    }
    if (op->count > THINVM_INNER_LEVELS) {
        return "level";
    }
    return op->value <= THINVM_MAX_SNAPSHOT_SLOTS && op->physical &&
           op->physical <= THINVM_MAX_SNAPSHOT_SLOTS &&
           op->physical != op->value ? NULL : "slot of a snapshot";
}

static const char *judge_op(const ThinvmOp *op)
{
    switch (op->type) {
    case THINVM_OP_MAP:
    case THINVM_OP_VALIDATE:
    case THINVM_OP_UNMAP:
    case THINVM_OP_INVALIDATE:
    case THINVM_OP_MAP_RUN:
        return judge_mapping_op(op);
    case THINVM_OP_RESIZE:
        return op->value <= THINVM_MAX_VIRTUAL_SIZE &&
               op->value % THINVM_SECTOR_SIZE == 0 ? NULL : "virtual size";
    case THINVM_OP_VMSTATE_SIZE:
        return op->value <= THINVM_MAX_VIRTUAL_SIZE ? NULL : "VM state size";
    case THINVM_OP_RELOCATE:
        return judge_relocate(op);
    case THINVM_OP_SHARE:
        return judge_share(op);
    case THINVM_OP_GROW:
    case THINVM_OP_SHRINK:
        return op->value && op->value <= THINVM_MAX_CLUSTERS
               ? NULL : "number of device clusters";
    case THINVM_OP_META_EXTEND:
        return physical_ok(op, op->count) &&
               op->count <= THINVM_EXTENT_MAX_PAGES /
                            (1 << (THINVM_MIN_CLUSTER_BITS - THINVM_PAGE_BITS))
               ? NULL : "physical range";
    case THINVM_OP_EPOCH:
        return op->value && op->value <= THINVM_COUNTER_MAX ? NULL : "epoch";
    case THINVM_OP_SNAPSHOT_CREATE:
    case THINVM_OP_SNAPSHOT_DELETE_STEP:
    case THINVM_OP_SNAPSHOT_GOTO:
    case THINVM_OP_SNAPSHOT_PROTECT:
        return judge_snapshot_op(op);
    default:
        return NULL;
    }
}

static bool snapshot_payload_ok(const ThinvmSnapshot *snapshot, Error **errp)
{
    if (snapshot->root.type != THINVM_PTR_NONE ||
        snapshot->vmstate_root.type != THINVM_PTR_NONE) {
        error_setg(errp, "operation SNAPSHOT_CREATE: roots are not empty");
        return false;
    }
    if (snapshot->flags) {
        error_setg(errp, "operation SNAPSHOT_CREATE: flags 0x%" PRIx32 " of a "
                   "new snapshot are not 0", snapshot->flags);
        return false;
    }
    return true;
}

static bool decode_payload(ThinvmOp *op, ThinvmBacking *backing,
                           ThinvmSnapshot *snapshot, const uint8_t *src,
                           Error **errp)
{
    if (op->type == THINVM_OP_SET_BACKING) {
        ThinvmBackingLe le = { 0 };

        memcpy(&le, src, THINVM_OP_BACKING_PAYLOAD);
        op->backing = backing;
        return thinvm_backing_decode(backing, &le, errp);
    }
    if (op->type == THINVM_OP_SNAPSHOT_CREATE) {
        ThinvmSnapshotLe le;

        memcpy(&le, src, sizeof(le));
        op->snapshot = snapshot;
        return thinvm_snapshot_decode(snapshot, &le, errp) &&
               snapshot_payload_ok(snapshot, errp);
    }
    return true;
}

ssize_t thinvm_op_decode(ThinvmOp *op, ThinvmBacking *backing,
                         ThinvmSnapshot *snapshot,
                         const uint8_t *src, size_t size, Error **errp)
{
    const OpShape *shape;
    ThinvmOpLe le;
    unsigned type, length;
    const char *wrong;

    if (size < sizeof(le)) {
        error_setg(errp, "operation: only %zu bytes are left for it", size);
        return -EBADMSG;
    }
    memcpy(&le, src, sizeof(le));
    type = le16_to_cpu(le.type_le);
    length = le16_to_cpu(le.length_le);

    shape = op_shape(type);
    if (!shape) {
        error_setg(errp, "journal operation of type %u is not known to this "
                   "program", type);
        return -ENOTSUP;
    }
    if (length != sizeof(le) + shape->payload || length > size) {
        error_setg(errp, "operation %s: length %u is not %zu, or exceeds the "
                   "%zu bytes that are left", shape->name, length,
                   sizeof(le) + shape->payload, size);
        return -EBADMSG;
    }
    *op = (ThinvmOp) {
        .type = (ThinvmOpType)type,
        .tree = le.tree,
        .source = (ThinvmSource)le.source,
        .valid = le16_to_cpu(le.valid_le),
        .guest = le64_to_cpu(le.guest_le),
        .count = le64_to_cpu(le.count_le),
        .physical = le64_to_cpu(le.physical_le),
        .value = le64_to_cpu(le.value_le),
    };
    wrong = unused_field_set(op, shape->uses);
    if (wrong) {
        error_setg(errp, "operation %s: %s is set, but not used",
                   shape->name, wrong);
        return -EBADMSG;
    }
    wrong = judge_op(op);
    if (wrong) {
        error_setg(errp, "operation %s: %s out of bounds (guest %" PRIu64
                   ", count %" PRIu64 ", physical %" PRIu64 ", valid 0x%x, "
                   "value %" PRIu64 ")", shape->name, wrong, op->guest,
                   op->count, op->physical, op->valid, op->value);
        return -EBADMSG;
    }
    if (!decode_payload(op, backing, snapshot, src + sizeof(le), errp)) {
        return -EBADMSG;
    }
    return length;
}

/* ------------------------------------------------------------------ */
/* Records                                                             */

static uint32_t record_checksum(const QemuUUID *uuid, uint8_t *buf,
                                size_t length, uint64_t sequence)
{
    return thinvm_checksum(uuid, THINVM_SUM_RECORD, sequence, buf, length);
}

static bool record_plausible(const ThinvmRecord *rec)
{
    return rec->length >= sizeof(ThinvmRecordLe) &&
           rec->length <= THINVM_RECORD_MAX_SIZE && rec->length % 8 == 0 &&
           rec->nb_sums <= THINVM_RECORD_MAX_SUMS &&
           rec->length - sizeof(ThinvmRecordLe) >=
           rec->nb_sums * sizeof(ThinvmDataSumLe) &&
           rec->nb_operations <= (thinvm_record_operations_end(rec) -
                                  sizeof(ThinvmRecordLe)) /
                                 sizeof(ThinvmOpLe) &&
           rec->sequence && rec->sequence <= THINVM_COUNTER_MAX &&
           rec->flushed_sequence < rec->sequence &&
           rec->epoch <= THINVM_COUNTER_MAX;
}

void thinvm_record_encode(const QemuUUID *uuid, uint8_t *buf,
                          ThinvmRecord *rec)
{
    ThinvmRecordLe le = {
        .magic_le = cpu_to_le32(THINVM_RECORD_MAGIC),
        .epoch_le = cpu_to_le64(rec->epoch),
        .sequence_le = cpu_to_le64(rec->sequence),
        .flushed_sequence_le = cpu_to_le64(rec->flushed_sequence),
        .previous_crc_le = cpu_to_le32(rec->previous_crc),
        .length_le = cpu_to_le32(rec->length),
        .nb_operations_le = cpu_to_le32(rec->nb_operations),
        .flags_le = cpu_to_le32(rec->nb_sums ? THINVM_RECORD_SUMS : 0),
        .nb_sums_le = cpu_to_le32(rec->nb_sums),
    };
    size_t padded = ROUND_UP(rec->length, THINVM_PAGE_SIZE);

    assert(record_plausible(rec));
    memcpy(buf, &le, sizeof(le));
    memset(buf + rec->length, 0, padded - rec->length);

    rec->crc = record_checksum(uuid, buf, rec->length, rec->sequence);
    stl_le_p(buf + offsetof(ThinvmRecordLe, crc_le), rec->crc);
}

void thinvm_data_sum_encode(uint8_t *dst, const ThinvmDataSum *sum)
{
    ThinvmDataSumLe le = {
        .offset_le = cpu_to_le64(sum->offset),
        .bytes_le = cpu_to_le32(sum->bytes),
        .crc_le = cpu_to_le32(sum->crc),
    };

    memcpy(dst, &le, sizeof(le));
}

int thinvm_data_sum_decode(ThinvmDataSum *sum, const uint8_t *src)
{
    ThinvmDataSumLe le;

    memcpy(&le, src, sizeof(le));
    *sum = (ThinvmDataSum) {
        .offset = le64_to_cpu(le.offset_le),
        .bytes = le32_to_cpu(le.bytes_le),
        .crc = le32_to_cpu(le.crc_le),
    };
    return sum->offset <= (uint64_t)INT64_MAX / 2 && sum->bytes &&
           sum->bytes <= THINVM_SUM_MAX_BYTES &&
           sum->offset % THINVM_SECTOR_SIZE == 0 &&
           sum->bytes % THINVM_SECTOR_SIZE == 0 ? 0 : -EBADMSG;
}

int thinvm_record_decode_header(ThinvmRecord *rec, const uint8_t *buf)
{
    ThinvmRecordLe le;
    uint32_t flags;

    memcpy(&le, buf, sizeof(le));
    flags = le32_to_cpu(le.flags_le);
    if (le32_to_cpu(le.magic_le) != THINVM_RECORD_MAGIC) {
        return -ENOENT;
    }
    *rec = (ThinvmRecord) {
        .epoch = le64_to_cpu(le.epoch_le),
        .sequence = le64_to_cpu(le.sequence_le),
        .flushed_sequence = le64_to_cpu(le.flushed_sequence_le),
        .previous_crc = le32_to_cpu(le.previous_crc_le),
        .crc = le32_to_cpu(le.crc_le),
        .length = le32_to_cpu(le.length_le),
        .nb_operations = le32_to_cpu(le.nb_operations_le),
    };
    if (flags & THINVM_RECORD_SUMS) {
        rec->nb_sums = le32_to_cpu(le.nb_sums_le);
    }
    if (!record_plausible(rec)) {
        return -ENOENT;
    }
    if ((flags & ~THINVM_RECORD_SUMS) || !flags != !le.nb_sums_le ||
        !buffer_is_zero(le.reserved, sizeof(le.reserved))) {
        return -ENOTSUP;
    }
    return 0;
}

bool thinvm_record_checksum_ok(const QemuUUID *uuid, const uint8_t *buf,
                               const ThinvmRecord *rec)
{
    g_autofree uint8_t *copy = g_memdup2(buf, rec->length);

    stl_le_p(copy + offsetof(ThinvmRecordLe, crc_le), 0);
    return record_checksum(uuid, copy, rec->length, rec->sequence) == rec->crc;
}

/* ------------------------------------------------------------------ */
/* Ownership blocks                                                    */

/* Claims and heartbeats are alike in magic, checksum field and size */
#define BLOCK_SIZE 512
#define BLOCK_CRC_OFFSET 4
QEMU_BUILD_BUG_ON(sizeof(ThinvmClaimLe) != BLOCK_SIZE);
QEMU_BUILD_BUG_ON(sizeof(ThinvmHeartbeatLe) != BLOCK_SIZE);
QEMU_BUILD_BUG_ON(offsetof(ThinvmClaimLe, crc_le) != BLOCK_CRC_OFFSET);
QEMU_BUILD_BUG_ON(offsetof(ThinvmHeartbeatLe, crc_le) != BLOCK_CRC_OFFSET);
QEMU_BUILD_BUG_ON(sizeof(ThinvmReleaseLe) != BLOCK_SIZE);
QEMU_BUILD_BUG_ON(offsetof(ThinvmReleaseLe, crc_le) != BLOCK_CRC_OFFSET);

/* The checksum as it ought to be, whatever the field holds */
static uint32_t block_checksum(const QemuUUID *uuid, ThinvmChecksumKind kind,
                               uint64_t epoch, const void *block)
{
    uint8_t copy[BLOCK_SIZE];

    memcpy(copy, block, sizeof(copy));
    stl_le_p(copy + BLOCK_CRC_OFFSET, 0);
    return thinvm_checksum(uuid, kind, epoch, copy, sizeof(copy));
}

void thinvm_claim_encode(const QemuUUID *uuid, ThinvmClaimLe *dst,
                         const ThinvmClaim *src)
{
    size_t name_length = strnlen(src->host_name, sizeof(src->host_name) - 1);

    *dst = (ThinvmClaimLe) {
        .magic_le = cpu_to_le32(THINVM_CLAIM_MAGIC),
        .epoch_le = cpu_to_le64(src->epoch),
        .state_le = cpu_to_le32(src->state),
        .process_le = cpu_to_le32(src->process),
        .process_start_le = cpu_to_le64(src->process_start),
    };
    memcpy(dst->host_id, src->host_id.data, sizeof(dst->host_id));
    memcpy(dst->boot_id, src->boot_id.data, sizeof(dst->boot_id));
    memcpy(dst->nonce, src->nonce.data, sizeof(dst->nonce));
    memcpy(dst->host_name, src->host_name, name_length);
    memcpy(dst->image_uuid, uuid->data, sizeof(dst->image_uuid));
    dst->crc_le = cpu_to_le32(block_checksum(uuid, THINVM_SUM_CLAIM,
                                             src->epoch, dst));
}

static bool claim_known(const ThinvmClaim *claim, const ThinvmClaimLe *le)
{
    size_t length = strnlen(claim->host_name, sizeof(claim->host_name));

    return claim->state >= THINVM_CLAIM_ACTIVE &&
           claim->state <= THINVM_CLAIM_RETURNED &&
           claim->epoch && claim->epoch <= THINVM_COUNTER_MAX &&
           length < sizeof(claim->host_name) &&
           buffer_is_zero(claim->host_name + length,
                          sizeof(claim->host_name) - length) &&
           buffer_is_zero(le->reserved, sizeof(le->reserved));
}

int thinvm_claim_decode(const QemuUUID *uuid, ThinvmClaim *dst,
                        const ThinvmClaimLe *src)
{
    uint64_t epoch = le64_to_cpu(src->epoch_le);

    if (le32_to_cpu(src->magic_le) != THINVM_CLAIM_MAGIC ||
        memcmp(src->image_uuid, uuid->data, sizeof(src->image_uuid))) {
        return -ENOENT;
    }
    if (le32_to_cpu(src->crc_le) !=
        block_checksum(uuid, THINVM_SUM_CLAIM, epoch, src)) {
        return -EBADMSG;
    }
    *dst = (ThinvmClaim) {
        .epoch = epoch,
        .state = (ThinvmClaimState)le32_to_cpu(src->state_le),
        .process = le32_to_cpu(src->process_le),
        .process_start = le64_to_cpu(src->process_start_le),
    };
    memcpy(dst->host_id.data, src->host_id, sizeof(src->host_id));
    memcpy(dst->boot_id.data, src->boot_id, sizeof(src->boot_id));
    memcpy(dst->nonce.data, src->nonce, sizeof(src->nonce));
    memcpy(dst->host_name, src->host_name, sizeof(dst->host_name));
    return claim_known(dst, src) ? 0 : -ENOTSUP;
}

void thinvm_heartbeat_encode(const QemuUUID *uuid, ThinvmHeartbeatLe *dst,
                             const ThinvmHeartbeat *src)
{
    *dst = (ThinvmHeartbeatLe) {
        .magic_le = cpu_to_le32(THINVM_HEARTBEAT_MAGIC),
        .epoch_le = cpu_to_le64(src->epoch),
        .counter_le = cpu_to_le64(src->counter),
    };
    memcpy(dst->nonce, src->nonce.data, sizeof(dst->nonce));
    memcpy(dst->image_uuid, uuid->data, sizeof(dst->image_uuid));
    dst->crc_le = cpu_to_le32(block_checksum(uuid, THINVM_SUM_HEARTBEAT,
                                             src->epoch, dst));
}

int thinvm_heartbeat_decode(const QemuUUID *uuid, ThinvmHeartbeat *dst,
                            const ThinvmHeartbeatLe *src)
{
    uint64_t epoch = le64_to_cpu(src->epoch_le);

    if (le32_to_cpu(src->magic_le) != THINVM_HEARTBEAT_MAGIC ||
        memcmp(src->image_uuid, uuid->data, sizeof(src->image_uuid))) {
        return -ENOENT;
    }
    if (le32_to_cpu(src->crc_le) !=
        block_checksum(uuid, THINVM_SUM_HEARTBEAT, epoch, src)) {
        return -EBADMSG;
    }
    *dst = (ThinvmHeartbeat) {
        .epoch = epoch,
        .counter = le64_to_cpu(src->counter_le),
    };
    memcpy(dst->nonce.data, src->nonce, sizeof(src->nonce));
    return epoch && epoch <= THINVM_COUNTER_MAX &&
           buffer_is_zero(src->reserved, sizeof(src->reserved))
           ? 0 : -ENOTSUP;
}

void thinvm_release_encode(const QemuUUID *uuid, ThinvmReleaseLe *dst,
                           const ThinvmRelease *src)
{
    *dst = (ThinvmReleaseLe) {
        .magic_le = cpu_to_le32(THINVM_RELEASE_MAGIC),
        .epoch_le = cpu_to_le64(src->epoch),
        .sequence_le = cpu_to_le64(src->sequence),
        .record_crc_le = cpu_to_le32(src->record_crc),
    };
    memcpy(dst->nonce, src->nonce.data, sizeof(dst->nonce));
    memcpy(dst->image_uuid, uuid->data, sizeof(dst->image_uuid));
    dst->crc_le = cpu_to_le32(block_checksum(uuid, THINVM_SUM_RELEASE,
                                             src->epoch, dst));
}

int thinvm_release_decode(const QemuUUID *uuid, ThinvmRelease *dst,
                          const ThinvmReleaseLe *src)
{
    uint64_t epoch = le64_to_cpu(src->epoch_le);

    if (le32_to_cpu(src->magic_le) != THINVM_RELEASE_MAGIC ||
        memcmp(src->image_uuid, uuid->data, sizeof(src->image_uuid))) {
        return -ENOENT;
    }
    if (le32_to_cpu(src->crc_le) !=
        block_checksum(uuid, THINVM_SUM_RELEASE, epoch, src)) {
        return -EBADMSG;
    }
    *dst = (ThinvmRelease) {
        .epoch = epoch,
        .sequence = le64_to_cpu(src->sequence_le),
        .record_crc = le32_to_cpu(src->record_crc_le),
    };
    memcpy(dst->nonce.data, src->nonce, sizeof(src->nonce));
    return epoch && epoch <= THINVM_COUNTER_MAX &&
           dst->sequence <= THINVM_COUNTER_MAX &&
           buffer_is_zero(src->reserved, sizeof(src->reserved))
           ? 0 : -ENOTSUP;
}
