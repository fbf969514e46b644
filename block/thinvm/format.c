/*
 * thinvm on-disk format: pointers, superblock, snapshots, backing file name
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Codec of what hangs together with the superblock; format-validate.c judges
 * metadata pages, format-journal.c does records, operations and ownership
 * blocks.  Relies on nothing but QEMU's utilities; no I/O, no state.
 *
 * Invariant 3 of the design: a decoder that succeeds has looked at magic,
 * checksum, bounds, types and reserved bits of everything that it returns,
 * and one that fails says which field holds which value.
 */

#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qemu/cutils.h"
#include "format.h"

/* ------------------------------------------------------------------ */
/* Pointers                                                            */

void thinvm_pointer_encode(ThinvmPointerLe *dst, const ThinvmPointer *src)
{
    uint64_t word = src->address;

    assert(src->address < THINVM_MAX_PAGES);
    assert(src->type < THINVM_PTR__MAX);

    word |= (uint64_t)src->type << THINVM_PTR_TYPE_SHIFT;
    word |= src->shared_below ? THINVM_PTR_SHARED_BELOW : 0;
    word |= (uint64_t)src->generation << THINVM_PTR_GENERATION_SHIFT;
    dst->word_le = cpu_to_le64(word);
    dst->crc_le = cpu_to_le32(src->crc);
    dst->extra_le = cpu_to_le32(src->extra);
}

void thinvm_pointer_decode(ThinvmPointer *dst, const ThinvmPointerLe *src)
{
    uint64_t word = le64_to_cpu(src->word_le);
    unsigned type = (word >> THINVM_PTR_TYPE_SHIFT) & 15;

    /* Reserved bits are put above the type's: such a type is known to none */
    type |= ((word & THINVM_PTR_RESERVED) >> (THINVM_PTR_TYPE_SHIFT + 5)) << 4;

    *dst = (ThinvmPointer) {
        .address = word & THINVM_CLUSTER_MASK,
        .type = (ThinvmPointerType)type,
        .shared_below = word & THINVM_PTR_SHARED_BELOW,
        .generation = word >> THINVM_PTR_GENERATION_SHIFT,
        .crc = le32_to_cpu(src->crc_le),
        .extra = le32_to_cpu(src->extra_le),
    };
}

/* ------------------------------------------------------------------ */
/* Snapshots                                                           */

#define SNAPSHOT_FLAGS_KNOWN (THINVM_SNAPSHOT_DELETED | \
                              THINVM_SNAPSHOT_TRASH | \
                              THINVM_SNAPSHOT_PROTECTED)

/* Is it a string, then zeroes up to the end, with one zero at least? */
static bool is_padded_string(const uint8_t *buf, size_t size)
{
    size_t length = strnlen((const char *)buf, size);

    return length < size && buffer_is_zero(buf + length, size - length);
}

/* A name of at most @size - 1 bytes; what lies behind its end gets zeroes */
static void put_padded_string(uint8_t *dst, size_t size, const char *src)
{
    size_t length = strlen(src);

    assert(length < size);
    memcpy(dst, src, length);
    memset(dst + length, 0, size - length);
}

void thinvm_snapshot_encode(ThinvmSnapshotLe *dst, const ThinvmSnapshot *src)
{
    memset(dst, 0, sizeof(*dst));
    if (!src->id) {
        return;
    }
    dst->id_le = cpu_to_le64(src->id);
    dst->parent_id_le = cpu_to_le64(src->parent_id);
    thinvm_pointer_encode(&dst->root, &src->root);
    thinvm_pointer_encode(&dst->vmstate_root, &src->vmstate_root);
    dst->virtual_size_le = cpu_to_le64(src->virtual_size);
    dst->vmstate_size_le = cpu_to_le64(src->vmstate_size);
    dst->date_sec_le = cpu_to_le64(src->date_sec);
    dst->date_nsec_le = cpu_to_le32(src->date_nsec);
    dst->flags_le = cpu_to_le32(src->flags);
    dst->vm_clock_nsec_le = cpu_to_le64(src->vm_clock_nsec);
    dst->icount_le = cpu_to_le64(src->icount);
    put_padded_string(dst->name, sizeof(dst->name), src->name);
}

static bool snapshot_scalars_ok(const ThinvmSnapshot *s, Error **errp)
{
    if (!s->id || s->id > THINVM_COUNTER_MAX) {
        error_setg(errp, "snapshot id %" PRIu64 " is not between 1 and 2^62",
                   s->id);
        return false;
    }
    if (s->parent_id >= s->id) {
        error_setg(errp, "snapshot %" PRIu64 ": parent %" PRIu64 " is not "
                   "older than it", s->id, s->parent_id);
        return false;
    }
    if (s->virtual_size > THINVM_MAX_VIRTUAL_SIZE ||
        s->virtual_size % THINVM_SECTOR_SIZE) {
        error_setg(errp, "snapshot %" PRIu64 ": virtual size %" PRIu64 " is "
                   "not a multiple of 512 up to 16 PiB",
                   s->id, s->virtual_size);
        return false;
    }
    if (s->vmstate_size > THINVM_MAX_VIRTUAL_SIZE) {
        error_setg(errp, "snapshot %" PRIu64 ": VM state size %" PRIu64
                   " exceeds 16 PiB", s->id, s->vmstate_size);
        return false;
    }
    if (s->date_nsec >= 1000000000) {
        error_setg(errp, "snapshot %" PRIu64 ": %" PRIu32 " nanoseconds are "
                   "a second or more", s->id, s->date_nsec);
        return false;
    }
    if (s->flags & ~SNAPSHOT_FLAGS_KNOWN) {
        error_setg(errp, "snapshot %" PRIu64 ": unknown flags 0x%" PRIx32,
                   s->id, s->flags & ~SNAPSHOT_FLAGS_KNOWN);
        return false;
    }
    return true;
}

bool thinvm_snapshot_decode(ThinvmSnapshot *dst, const ThinvmSnapshotLe *src,
                            Error **errp)
{
    *dst = (ThinvmSnapshot) {
        .id = le64_to_cpu(src->id_le),
        .parent_id = le64_to_cpu(src->parent_id_le),
        .virtual_size = le64_to_cpu(src->virtual_size_le),
        .vmstate_size = le64_to_cpu(src->vmstate_size_le),
        .date_sec = le64_to_cpu(src->date_sec_le),
        .date_nsec = le32_to_cpu(src->date_nsec_le),
        .flags = le32_to_cpu(src->flags_le),
        .vm_clock_nsec = le64_to_cpu(src->vm_clock_nsec_le),
        .icount = le64_to_cpu(src->icount_le),
    };
    thinvm_pointer_decode(&dst->root, &src->root);
    thinvm_pointer_decode(&dst->vmstate_root, &src->vmstate_root);

    if (!snapshot_scalars_ok(dst, errp) ||
        !thinvm_root_validate(NULL, THINVM_PAGE_MAP_INNER, &dst->root,
                              "root of snapshot", errp) ||
        !thinvm_root_validate(NULL, THINVM_PAGE_MAP_INNER, &dst->vmstate_root,
                              "VM state root of snapshot", errp)) {
        return false;
    }
    if (!buffer_is_zero(src->reserved, sizeof(src->reserved))) {
        error_setg(errp, "snapshot %" PRIu64 ": reserved bytes are not zero",
                   dst->id);
        return false;
    }
    if (!is_padded_string(src->name, sizeof(src->name))) {
        error_setg(errp, "snapshot %" PRIu64 ": name is not followed by "
                   "zeroes up to byte 255", dst->id);
        return false;
    }
    memcpy(dst->name, src->name, sizeof(dst->name));
    return true;
}
QEMU_BUILD_BUG_ON(sizeof_field(ThinvmSnapshot, name) !=
                  sizeof_field(ThinvmSnapshotLe, name));

/* ------------------------------------------------------------------ */
/* Backing file name                                                   */

void thinvm_backing_encode(ThinvmBackingLe *dst, const ThinvmBacking *src)
{
    memset(dst, 0, sizeof(*dst));
    dst->name_length_le = cpu_to_le32(strlen(src->name));
    dst->format_length_le = cpu_to_le32(strlen(src->format));
    put_padded_string(dst->name, sizeof(dst->name), src->name);
    put_padded_string(dst->format, sizeof(dst->format), src->format);
}

/* @length bytes without a zero among them, then zeroes up to @size */
static bool is_counted_string(const uint8_t *buf, size_t length, size_t size)
{
    return length < size && strnlen((const char *)buf, size) == length &&
           buffer_is_zero(buf + length, size - length);
}

bool thinvm_backing_decode(ThinvmBacking *dst, const ThinvmBackingLe *src,
                           Error **errp)
{
    uint32_t name_length = le32_to_cpu(src->name_length_le);
    uint32_t format_length = le32_to_cpu(src->format_length_le);

    if (!is_counted_string(src->name, name_length, sizeof(src->name))) {
        error_setg(errp, "backing file name: length field says %" PRIu32
                   ", which is not what follows (at most %d bytes, no zero "
                   "among them)", name_length, THINVM_MAX_BACKING_NAME);
        return false;
    }
    if (!is_counted_string(src->format, format_length, sizeof(src->format))) {
        error_setg(errp, "backing file format: length field says %" PRIu32
                   ", which is not what follows (at most %d bytes, no zero "
                   "among them)", format_length, THINVM_MAX_BACKING_FORMAT);
        return false;
    }
    if (format_length && !name_length) {
        error_setg(errp, "backing file format without a backing file name");
        return false;
    }
    if (!buffer_is_zero(src->reserved, sizeof(src->reserved)) ||
        !buffer_is_zero(src->unused, sizeof(src->unused))) {
        error_setg(errp, "backing file name: reserved bytes are not zero");
        return false;
    }
    memcpy(dst->name, src->name, sizeof(dst->name));
    memcpy(dst->format, src->format, sizeof(dst->format));
    return true;
}
QEMU_BUILD_BUG_ON(sizeof_field(ThinvmBacking, name) !=
                  sizeof_field(ThinvmBackingLe, name));
QEMU_BUILD_BUG_ON(sizeof_field(ThinvmBacking, format) !=
                  sizeof_field(ThinvmBackingLe, format));

/* ------------------------------------------------------------------ */
/* Superblock                                                          */

uint64_t thinvm_first_cluster(const ThinvmSuperblock *sb)
{
    return DIV_ROUND_UP(sb->journal_offset + sb->journal_size,
                        1ULL << sb->cluster_bits);
}

uint64_t thinvm_superblock_offset(int slot)
{
    assert(slot >= 0 && slot < THINVM_NB_SUPERBLOCKS);
    return slot ? THINVM_SUPERBLOCK1_OFFSET : THINVM_SUPERBLOCK0_OFFSET;
}

/* The checksum as it ought to be, whatever crc_le holds */
static uint32_t superblock_checksum(const ThinvmSuperblockLe *sb)
{
    ThinvmSuperblockLe copy = *sb;
    QemuUUID uuid;

    copy.crc_le = 0;
    memcpy(uuid.data, sb->uuid, sizeof(uuid.data));
    return thinvm_checksum(&uuid, THINVM_SUM_SUPERBLOCK, 0,
                           &copy, sizeof(copy));
}

/* What reserved keeps: from reserved_roots to the end */
#define SUPERBLOCK_TAIL offsetof(ThinvmSuperblockLe, reserved_roots)
QEMU_BUILD_BUG_ON(sizeof(ThinvmSuperblockLe) - SUPERBLOCK_TAIL !=
                  sizeof_field(ThinvmSuperblock, reserved));

static void template_encode(ThinvmSuperblockLe *dst,
                            const ThinvmTemplateId *src)
{
    dst->template_length_le = cpu_to_le64(src->length);
    memcpy(dst->template_digest, src->digest, sizeof(src->digest));
    memcpy(dst->template_identity, src->identity, sizeof(src->identity));
}

void thinvm_superblock_encode(ThinvmSuperblockLe *dst,
                              const ThinvmSuperblock *src)
{
    *dst = (ThinvmSuperblockLe) {
        .magic_le = cpu_to_le64(THINVM_SUPERBLOCK_MAGIC),
        .version_major_le = cpu_to_le16(src->version_major),
        .version_minor_le = cpu_to_le16(src->version_minor),
        .compatible_le = cpu_to_le64(src->compatible),
        .readonly_compatible_le = cpu_to_le64(src->readonly_compatible),
        .incompatible_le = cpu_to_le64(src->incompatible),
        .autoclear_le = cpu_to_le64(src->autoclear),
        .cluster_bits_le = cpu_to_le32(src->cluster_bits),
        .journal_offset_le = cpu_to_le64(src->journal_offset),
        .journal_size_le = cpu_to_le64(src->journal_size),
        .virtual_size_le = cpu_to_le64(src->virtual_size),
        .device_clusters_le = cpu_to_le64(src->device_clusters),
        .generation_le = cpu_to_le64(src->generation),
        .sequence_le = cpu_to_le64(src->sequence),
        .epoch_le = cpu_to_le64(src->epoch),
        .journal_position_le = cpu_to_le64(src->journal_position),
        .record_crc_le = cpu_to_le32(src->record_crc),
        .nb_extents_le = cpu_to_le32(src->nb_extents),
        .next_snapshot_id_le = cpu_to_le64(src->next_snapshot_id),
        .current_snapshot_id_le = cpu_to_le64(src->current_snapshot_id),
        .nb_snapshots_le = cpu_to_le32(src->nb_snapshots),
        .nb_snapshot_slots_le = cpu_to_le32(src->nb_snapshot_slots),
        .vmstate_size_le = cpu_to_le64(src->vmstate_size),
    };
    memcpy(dst->uuid, src->uuid.data, sizeof(dst->uuid));
    thinvm_pointer_encode(&dst->map_root, &src->map_root);
    thinvm_pointer_encode(&dst->vmstate_root, &src->vmstate_root);
    thinvm_pointer_encode(&dst->count_root, &src->count_root);
    thinvm_pointer_encode(&dst->space_root, &src->space_root);
    thinvm_pointer_encode(&dst->snapshot_root, &src->snapshot_root);
    thinvm_pointer_encode(&dst->backing, &src->backing);
    memcpy((uint8_t *)dst + SUPERBLOCK_TAIL, src->reserved,
           sizeof(src->reserved));
    dst->promised_pages_le = cpu_to_le64(src->promised_pages);
    if (src->incompatible & THINVM_INCOMPATIBLE_TEMPLATE) {
        template_encode(dst, &src->template);
    }

    dst->crc_le = cpu_to_le32(superblock_checksum(dst));
}

/* What has a meaning of its own is no more among the reserved bytes */
static void superblock_take(ThinvmSuperblock *dst, size_t from, size_t end)
{
    memset(&dst->reserved[from - SUPERBLOCK_TAIL], 0, end - from);
}

static void template_decode(ThinvmSuperblock *dst,
                            const ThinvmSuperblockLe *src)
{
    ThinvmTemplateId *t = &dst->template;

    t->length = le64_to_cpu(src->template_length_le);
    memcpy(t->digest, src->template_digest, sizeof(t->digest));
    memcpy(t->identity, src->template_identity, sizeof(t->identity));
    superblock_take(dst, offsetof(ThinvmSuperblockLe, template_length_le),
                    offsetof(ThinvmSuperblockLe, reserved));
}

static void superblock_read_fields(ThinvmSuperblock *dst,
                                   const ThinvmSuperblockLe *src)
{
    *dst = (ThinvmSuperblock) {
        .version_major = le16_to_cpu(src->version_major_le),
        .version_minor = le16_to_cpu(src->version_minor_le),
        .compatible = le64_to_cpu(src->compatible_le),
        .readonly_compatible = le64_to_cpu(src->readonly_compatible_le),
        .incompatible = le64_to_cpu(src->incompatible_le),
        .autoclear = le64_to_cpu(src->autoclear_le),
        .cluster_bits = le32_to_cpu(src->cluster_bits_le),
        .journal_offset = le64_to_cpu(src->journal_offset_le),
        .journal_size = le64_to_cpu(src->journal_size_le),
        .virtual_size = le64_to_cpu(src->virtual_size_le),
        .device_clusters = le64_to_cpu(src->device_clusters_le),
        .generation = le64_to_cpu(src->generation_le),
        .sequence = le64_to_cpu(src->sequence_le),
        .epoch = le64_to_cpu(src->epoch_le),
        .journal_position = le64_to_cpu(src->journal_position_le),
        .record_crc = le32_to_cpu(src->record_crc_le),
        .nb_extents = le32_to_cpu(src->nb_extents_le),
        .next_snapshot_id = le64_to_cpu(src->next_snapshot_id_le),
        .current_snapshot_id = le64_to_cpu(src->current_snapshot_id_le),
        .nb_snapshots = le32_to_cpu(src->nb_snapshots_le),
        .nb_snapshot_slots = le32_to_cpu(src->nb_snapshot_slots_le),
        .vmstate_size = le64_to_cpu(src->vmstate_size_le),
    };
    memcpy(dst->uuid.data, src->uuid, sizeof(src->uuid));
    thinvm_pointer_decode(&dst->map_root, &src->map_root);
    thinvm_pointer_decode(&dst->vmstate_root, &src->vmstate_root);
    thinvm_pointer_decode(&dst->count_root, &src->count_root);
    thinvm_pointer_decode(&dst->space_root, &src->space_root);
    thinvm_pointer_decode(&dst->snapshot_root, &src->snapshot_root);
    thinvm_pointer_decode(&dst->backing, &src->backing);
    memcpy(dst->reserved, (const uint8_t *)src + SUPERBLOCK_TAIL,
           sizeof(dst->reserved));
    superblock_take(dst, offsetof(ThinvmSuperblockLe, promised_pages_le),
                    offsetof(ThinvmSuperblockLe, template_length_le));
    dst->promised_pages = le64_to_cpu(src->promised_pages_le);
    if (dst->incompatible & THINVM_INCOMPATIBLE_TEMPLATE) {
        template_decode(dst, src);
    }
}

static bool between(const char *field, uint64_t value, uint64_t min,
                    uint64_t max, Error **errp)
{
    if (value >= min && value <= max) {
        return true;
    }
    error_setg(errp, "superblock: %s %" PRIu64 " is not between %" PRIu64
               " and %" PRIu64, field, value, min, max);
    return false;
}

static bool multiple_of(const char *field, uint64_t value, uint64_t unit,
                        Error **errp)
{
    if (value % unit == 0) {
        return true;
    }
    error_setg(errp, "superblock: %s %" PRIu64 " is not a multiple of %"
               PRIu64, field, value, unit);
    return false;
}

static bool superblock_sizes_ok(const ThinvmSuperblock *sb, Error **errp)
{
    uint64_t max_size;

    /* The bits first: all that follows shifts by them */
    if (!between("cluster_bits", sb->cluster_bits, THINVM_MIN_CLUSTER_BITS,
                 THINVM_MAX_CLUSTER_BITS, errp)) {
        return false;
    }
    max_size = MIN(THINVM_MAX_VIRTUAL_SIZE,
                   THINVM_MAX_GUEST_CLUSTERS << sb->cluster_bits);

    return between("journal offset", sb->journal_offset,
                   THINVM_JOURNAL_OFFSET, THINVM_JOURNAL_OFFSET, errp) &&
           between("journal size", sb->journal_size, THINVM_MIN_JOURNAL_SIZE,
                   THINVM_MAX_JOURNAL_SIZE, errp) &&
           multiple_of("journal size", sb->journal_size, THINVM_PAGE_SIZE,
                       errp) &&
           between("virtual size", sb->virtual_size, 0, max_size, errp) &&
           multiple_of("virtual size", sb->virtual_size, THINVM_SECTOR_SIZE,
                       errp) &&
           between("VM state size", sb->vmstate_size, 0, max_size, errp) &&
           between("number of device clusters", sb->device_clusters,
                   thinvm_first_cluster(sb) + 1, THINVM_MAX_CLUSTERS, errp);
}

static bool superblock_checkpoint_ok(const ThinvmSuperblock *sb, Error **errp)
{
    return between("generation", sb->generation, 1, THINVM_COUNTER_MAX,
                   errp) &&
           between("sequence", sb->sequence, 0, THINVM_COUNTER_MAX, errp) &&
           between("epoch", sb->epoch, 0, THINVM_COUNTER_MAX, errp) &&
           between("journal position", sb->journal_position, 0,
                   sb->journal_size - THINVM_PAGE_SIZE, errp) &&
           multiple_of("journal position", sb->journal_position,
                       THINVM_PAGE_SIZE, errp) &&
           between("number of metadata extents", sb->nb_extents, 1,
                   THINVM_MAX_EXTENTS, errp) &&
           between("next snapshot id", sb->next_snapshot_id, 1,
                   THINVM_COUNTER_MAX, errp) &&
           between("current snapshot id", sb->current_snapshot_id, 0,
                   sb->next_snapshot_id - 1, errp) &&
           between("number of snapshot slots", sb->nb_snapshot_slots, 0,
                   THINVM_MAX_SNAPSHOT_SLOTS, errp) &&
           between("number of snapshots", sb->nb_snapshots, 0,
                   MIN(THINVM_MAX_ROOTS, sb->nb_snapshot_slots), errp) &&
           between("number of promised pages", sb->promised_pages, 0,
                   THINVM_MAX_CLUSTERS, errp);
}

static bool superblock_roots_ok(const ThinvmSuperblock *sb, Error **errp)
{
    if (sb->nb_snapshots && sb->snapshot_root.type != THINVM_PTR_PAGE) {
        error_setg(errp, "superblock: %" PRIu32 " snapshots but no page that "
                   "leads to them", sb->nb_snapshots);
        return false;
    }
    return thinvm_root_validate(NULL, THINVM_PAGE_MAP_INNER, &sb->map_root,
                                "mapping root", errp) &&
           thinvm_root_validate(NULL, THINVM_PAGE_MAP_INNER,
                                &sb->vmstate_root, "VM state root", errp) &&
           thinvm_root_validate(NULL, THINVM_PAGE_COUNT_INNER,
                                &sb->count_root, "count root", errp) &&
           thinvm_root_validate(NULL, THINVM_PAGE_SPACE_INNER,
                                &sb->space_root, "space map root", errp) &&
           thinvm_root_validate(NULL, THINVM_PAGE_SNAPSHOT_INNER,
                                &sb->snapshot_root, "snapshot root", errp) &&
           thinvm_root_validate(NULL, THINVM_PAGE_BACKING, &sb->backing,
                                "backing file pointer", errp);
}

static bool superblock_template_ok(const ThinvmSuperblock *sb, Error **errp)
{
    const ThinvmTemplateId *t = &sb->template;

    if (!(sb->incompatible & THINVM_INCOMPATIBLE_TEMPLATE)) {
        return true;
    }
    return between("length of the template", t->length, THINVM_SECTOR_SIZE,
                   THINVM_MAX_VIRTUAL_SIZE, errp) &&
           multiple_of("length of the template", t->length,
                       THINVM_SECTOR_SIZE, errp);
}

/* Reserved parts may only hold something by a later minor version */
static bool superblock_reserved_ok(const ThinvmSuperblock *sb, uint32_t flags,
                                   Error **errp)
{
    if (flags) {
        error_setg(errp, "superblock: reserved flags 0x%" PRIx32 " are not 0",
                   flags);
        return false;
    }
    if ((sb->version_minor <= THINVM_VERSION_MINOR &&
         !buffer_is_zero(sb->reserved, sizeof(sb->reserved))) ||
        (sb->version_minor == 0 && sb->promised_pages)) {
        error_setg(errp, "superblock: reserved bytes are not zero in an image "
                   "of version %d.%d", sb->version_major, sb->version_minor);
        return false;
    }
    return true;
}

int thinvm_superblock_decode(ThinvmSuperblock *dst,
                             const ThinvmSuperblockLe *src, Error **errp)
{
    uint32_t crc = le32_to_cpu(src->crc_le);
    uint32_t right_crc;

    if (le64_to_cpu(src->magic_le) != THINVM_SUPERBLOCK_MAGIC) {
        error_setg(errp, "not a thinvm superblock (no magic number)");
        return -EINVAL;
    }
    right_crc = superblock_checksum(src);
    if (crc != right_crc) {
        error_setg(errp, "superblock: checksum is 0x%08" PRIx32 ", contents "
                   "have 0x%08" PRIx32, crc, right_crc);
        return -EBADMSG;
    }

    superblock_read_fields(dst, src);
    if (dst->version_major != THINVM_VERSION_MAJOR) {
        error_setg(errp, "image has format version %d.%d, this program knows "
                   "%d", dst->version_major, dst->version_minor,
                   THINVM_VERSION_MAJOR);
        return -ENOTSUP;
    }
    if (dst->incompatible & ~THINVM_INCOMPATIBLE_KNOWN) {
        error_setg(errp, "image uses incompatible features that this program "
                   "does not know: 0x%" PRIx64,
                   (uint64_t)(dst->incompatible & ~THINVM_INCOMPATIBLE_KNOWN));
        return -ENOTSUP;
    }
    if (!superblock_reserved_ok(dst, le32_to_cpu(src->flags_le), errp) ||
        !superblock_sizes_ok(dst, errp) ||
        !superblock_checkpoint_ok(dst, errp) ||
        !superblock_template_ok(dst, errp) ||
        !superblock_roots_ok(dst, errp)) {
        return -EBADMSG;
    }
    return 0;
}
