/*
 * thinvm on-disk format: structures, limits, and their codec
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Format layer.  Encodes, decodes and validates; does no I/O and keeps no
 * state, so that every function here may be called from any context and is
 * tested on plain buffers.  docs/interop/thinvm.rst tells the same story for
 * somebody who writes a reader without this code.
 *
 * Rules that this layer keeps (design section 4, invariant 3):
 *  - Nothing read from a device is believed before its checksum, its bounds,
 *    its type and its reserved bits were looked at.
 *  - Bytes from a device produce an Error, never an assertion.
 *  - All integers on the device are little endian.
 *
 * Units: "cluster" is a number of clusters from the start of the device
 * (physical) or of the virtual disk (guest); "page" is a number of 4 KiB
 * pages from the start of the device; names that end in _offset or _size
 * are bytes.
 */
#ifndef BLOCK_THINVM_FORMAT_H
#define BLOCK_THINVM_FORMAT_H

#include "qemu/units.h"
#include "qemu/uuid.h"
#include "qapi/error.h"

/*
 * Layout of the device
 *
 *   0            superblock slot 0 (one page, 512 bytes of it used)
 *   64 KiB       claims of ownership, 16 blocks of 4 KiB, slot by epoch
 *   128 KiB      heartbeats, 16 blocks of 4 KiB, slot by epoch
 *   512 KiB      superblock slot 1
 *   1 MiB        journal ring, journal_size bytes
 *   then, from the next cluster boundary: clusters of data and extents of
 *   metadata pages, in any order.  The first of them is an extent of
 *   metadata pages.
 */
#define THINVM_PAGE_BITS            12
#define THINVM_PAGE_SIZE            (1 << THINVM_PAGE_BITS)
#define THINVM_SECTOR_SIZE          512
#define THINVM_NB_SUPERBLOCKS       2
#define THINVM_SUPERBLOCK0_OFFSET   0
#define THINVM_SUPERBLOCK1_OFFSET   (512 * KiB)
#define THINVM_CLAIM_OFFSET         (64 * KiB)
#define THINVM_HEARTBEAT_OFFSET     (128 * KiB)
#define THINVM_NB_CLAIMS            16
#define THINVM_HOT_OFFSET           (192 * KiB)
#define THINVM_HOT_SIZE             (64 * KiB)
#define THINVM_JOURNAL_OFFSET       (1 * MiB)

#define THINVM_MIN_CLUSTER_BITS     14
#define THINVM_MAX_CLUSTER_BITS     21
#define THINVM_DEFAULT_CLUSTER_SIZE (64 * KiB)
#define THINVM_PARTS                16          /* valid bits of a cluster */
#define THINVM_ALL_VALID            0xffff

#define THINVM_MIN_JOURNAL_SIZE     (1 * MiB)
#define THINVM_MAX_JOURNAL_SIZE     (1 * GiB)
#define THINVM_DEFAULT_JOURNAL_SIZE (16 * MiB)

/* Largest virtual disk; the mapping tree (2^33 clusters) may bound it lower */
#define THINVM_MAX_VIRTUAL_SIZE     (16 * PiB)
#define THINVM_MAX_BACKING_NAME     1023        /* bytes, no NUL counted */
#define THINVM_MAX_BACKING_FORMAT   63
#define THINVM_MAX_SNAPSHOT_NAME    255
/* Most page numbers that a pointer can hold: 4 PiB of device */
#define THINVM_MAX_PAGES            (1ULL << 40)
/* Roots (active trees and snapshots); one more is refused */
#define THINVM_MAX_ROOTS            65000
/*
 * Largest generation, sequence, epoch and snapshot id that is believed: no
 * history is that long, and adding to a counter never wraps.
 */
#define THINVM_COUNTER_MAX          (1ULL << 62)

#define THINVM_SUPERBLOCK_MAGIC     0x0a1a4d566e696854ULL   /* "ThinVM\x1a\n" */
#define THINVM_RECORD_MAGIC         0x524a5654u             /* "TVJR" */
#define THINVM_CLAIM_MAGIC          0x4c435654u             /* "TVCL" */
#define THINVM_HEARTBEAT_MAGIC      0x42485654u             /* "TVHB" */
#define THINVM_RELEASE_MAGIC        0x4c525654u             /* "TVRL" */
#define THINVM_HOT_MAGIC            0x544f5654u             /* "TVOT" */
#define THINVM_VERSION_MAJOR        1
#define THINVM_VERSION_MINOR        1

/*
 * What a checksum covers besides the bytes: the image (by UUID), the kind of
 * structure, and its place (page number, or 0 where it has no fixed one).  A
 * right block in a wrong place, of a wrong kind or of a former image on the
 * same LUN thus has a wrong checksum.
 */
typedef enum ThinvmChecksumKind {
    THINVM_SUM_SUPERBLOCK = 1,
    THINVM_SUM_RECORD = 2,
    THINVM_SUM_CLAIM = 3,
    THINVM_SUM_HEARTBEAT = 4,
    THINVM_SUM_PAGE = 5,        /* any metadata page */
    THINVM_SUM_HOT = 6,
    THINVM_SUM_RELEASE = 7,
    THINVM_SUM_DATA = 8,        /* guest data, by its offset on the device */
} ThinvmChecksumKind;

/*
 * CRC32C (Castagnoli, as in iSCSI, RFC 3720) of @uuid (16 bytes), @kind
 * (le32), @place (le64) and then @size bytes at @buf, as one string.
 */
uint32_t thinvm_checksum(const QemuUUID *uuid, ThinvmChecksumKind kind,
                         uint64_t place, const void *buf, size_t size);

/* A piece of a CRC32C: starts with 0xffffffff, and is inverted at the end */
uint32_t thinvm_crc_update(uint32_t crc, const void *buf, size_t size);

/* ------------------------------------------------------------------ */
/* Mapping entries: one guest cluster, 8 bytes                         */

/*
 * bits  0-39  physical cluster; 0 means none (cluster 0 is the header)
 * bits 40-55  valid bits: one for each sixteenth of the cluster, bit 40 the
 *             first; all 0 where there is no physical cluster
 * bits 56-58  source of the invalid parts (ThinvmSource); where all parts
 *             are valid, 0, or the mark THINVM_SOURCE_TEMPLATE
 * bit  59     possibly shared: the counts must be looked at before the
 *             physical cluster is written to
 * bits 60-63  reserved, 0
 *
 * The entry 0 is thus "unmapped": reads from the backing file, or as zeroes
 * where there is none.
 */
typedef enum ThinvmSource {
    THINVM_SOURCE_BACKING = 0,
    THINVM_SOURCE_ZERO = 1,
    /* 2: parent snapshot's mapping; reserved */
    /*
     * A mark: all parts are valid, and hold what the image's template has at
     * this place of the disk.  Only with THINVM_INCOMPATIBLE_TEMPLATE.
     */
    THINVM_SOURCE_TEMPLATE = 3,
} ThinvmSource;

#define THINVM_CLUSTER_MASK         ((1ULL << 40) - 1)
#define THINVM_ENTRY_VALID_SHIFT    40
#define THINVM_ENTRY_SOURCE_SHIFT   56
#define THINVM_ENTRY_SHARED         (1ULL << 59)
#define THINVM_ENTRY_RESERVED       (15ULL << 60)

static inline uint64_t thinvm_entry(uint64_t physical, uint16_t valid,
                                    ThinvmSource source)
{
    return physical | (uint64_t)valid << THINVM_ENTRY_VALID_SHIFT |
           (uint64_t)source << THINVM_ENTRY_SOURCE_SHIFT;
}

static inline uint64_t thinvm_entry_physical(uint64_t entry)
{
    return entry & THINVM_CLUSTER_MASK;
}

static inline uint16_t thinvm_entry_valid(uint64_t entry)
{
    return entry >> THINVM_ENTRY_VALID_SHIFT;
}

static inline ThinvmSource thinvm_entry_source(uint64_t entry)
{
    return (ThinvmSource)((entry >> THINVM_ENTRY_SOURCE_SHIFT) & 7);
}

/* ------------------------------------------------------------------ */
/* Pointers: 16 bytes, in inner pages and in the superblock            */

/*
 * word   bits  0-39  page number of the child; for a run the first physical
 *                    cluster; for a uniform count page the count
 *        bits 40-43  type (ThinvmPointerType)
 *        bit  44     shared below: entries and pointers below may lack the
 *                    "possibly shared" that they ought to have
 *        bits 45-47  reserved, 0
 *        bits 48-63  low 16 bits of the generation (checkpoint) that wrote
 *                    the child; 0 where there is no child page
 * crc    checksum of the child page (THINVM_SUM_PAGE, its page number); 0
 *        where there is no child page
 * extra  in pointers to a page out of an inner page of the count tree: number
 *        of free clusters (count 0) below, of those that exist on the device;
 *        elsewhere 0, also in the superblock's pointer to the count tree,
 *        whose sum would not fit
 *
 * Only PAGE, RUN and UNWRITTEN_RUN in mapping trees have something below, so
 * only they may say "shared below".
 */
typedef enum ThinvmPointerType {
    /* mapping trees: unmapped range; count tree: all counts 0 */
    THINVM_PTR_NONE = 0,
    THINVM_PTR_PAGE = 1,
    /* last inner level of mapping trees only: 512 contiguous clusters */
    THINVM_PTR_RUN = 2,             /* fully valid */
    THINVM_PTR_UNWRITTEN_RUN = 3,   /* mapped, reads as zeroes */
    /* mapping trees, any level: reads as zeroes */
    THINVM_PTR_ZERO = 4,
    /* count tree, any level: every count below is the address field */
    THINVM_PTR_UNIFORM = 5,
    /* 6: leaf with 16-byte entries; reserved */
    THINVM_PTR__MAX
} ThinvmPointerType;

typedef struct QEMU_PACKED ThinvmPointerLe {
    uint64_t word_le;
    uint32_t crc_le;
    uint32_t extra_le;
} ThinvmPointerLe;
QEMU_BUILD_BUG_ON(sizeof(ThinvmPointerLe) != 16);

typedef struct ThinvmPointer {
    uint64_t address;               /* page, cluster or count, by type */
    ThinvmPointerType type;
    bool shared_below;
    uint16_t generation;
    uint32_t crc;
    uint32_t extra;
} ThinvmPointer;

#define THINVM_PTR_TYPE_SHIFT       40
#define THINVM_PTR_SHARED_BELOW     (1ULL << 44)
#define THINVM_PTR_RESERVED         (7ULL << 45)
#define THINVM_PTR_GENERATION_SHIFT 48

void thinvm_pointer_encode(ThinvmPointerLe *dst, const ThinvmPointer *src);
/*
 * Decodes without judging; the validators below judge.  A pointer with a
 * reserved bit set decodes to a type that nobody knows.
 */
void thinvm_pointer_decode(ThinvmPointer *dst, const ThinvmPointerLe *src);

/* ------------------------------------------------------------------ */
/* Metadata pages, 4 KiB                                               */

#define THINVM_POINTERS_PER_PAGE    256     /* any inner page */
#define THINVM_ENTRIES_PER_LEAF     512     /* leaf of a mapping tree */
#define THINVM_COUNTS_PER_LEAF      2048    /* leaf of the count tree, le16 */
#define THINVM_INNER_LEVELS         3       /* of mapping and count trees */

/* Guest clusters that a whole mapping tree covers: 2^33 */
#define THINVM_MAX_GUEST_CLUSTERS   (1ULL << (9 + 8 * THINVM_INNER_LEVELS))
/* Physical clusters that the count tree covers: 2^35 */
#define THINVM_MAX_CLUSTERS         (1ULL << (11 + 8 * THINVM_INNER_LEVELS))

/* Count of a physical cluster that is no data: header, journal, metadata */
#define THINVM_COUNT_METADATA       0xffff
/* Largest count of a data cluster or metadata page; what lies between is bad */
#define THINVM_COUNT_MAX            0xfff0

/*
 * Page kinds.  Trees have three levels of inner pages: an inner page of
 * level 3 is a root, one of level 1 points to leaves.
 */
typedef enum ThinvmPageKind {
    THINVM_PAGE_MAP_LEAF,       /* 512 mapping entries, le64 */
    THINVM_PAGE_MAP_INNER,      /* 256 pointers */
    THINVM_PAGE_COUNT_LEAF,     /* 2048 counts, le16 */
    THINVM_PAGE_COUNT_INNER,    /* 256 pointers */
    THINVM_PAGE_SPACE_INNER,    /* 256 pointers: space map of metadata pages */
    THINVM_PAGE_SPACE_BLOCK,    /* ThinvmSpaceBlockLe: one metadata extent */
    THINVM_PAGE_SNAPSHOT_INNER, /* 256 pointers; tree of snapshot slots */
    THINVM_PAGE_SNAPSHOT_LEAF,  /* 8 ThinvmSnapshotLe */
    THINVM_PAGE_BACKING,        /* ThinvmBackingLe */
} ThinvmPageKind;

/*
 * Space map of metadata pages: superblock -> inner page (level 2) -> inner
 * page (level 1) -> one space block for each extent, in the order in which
 * the extents were taken.  Slots after nb_extents are NONE.
 */
#define THINVM_SPACE_LEVELS         2
#define THINVM_MAX_EXTENTS          (256 * 256)
#define THINVM_EXTENT_MAX_PAGES     2032

typedef struct QEMU_PACKED ThinvmSpaceBlockLe {
    uint64_t first_page_le;         /* page number, on a cluster boundary */
    uint32_t nb_pages_le;           /* whole clusters, at most 2032 pages */
    uint32_t reserved_le[5];
    /* how many pointers name each page; 0 is free */
    uint16_t count_le[THINVM_EXTENT_MAX_PAGES];
} ThinvmSpaceBlockLe;
QEMU_BUILD_BUG_ON(sizeof(ThinvmSpaceBlockLe) != THINVM_PAGE_SIZE);

/*
 * Snapshot slots: superblock -> inner page (level 2) -> inner page (level 1)
 * -> leaf with 8 slots.  A free slot is 512 zero bytes.
 */
#define THINVM_SNAPSHOT_LEVELS      2
#define THINVM_SNAPSHOTS_PER_LEAF   8
#define THINVM_MAX_SNAPSHOT_SLOTS   (256 * 256 * THINVM_SNAPSHOTS_PER_LEAF)
#define THINVM_SNAPSHOT_DELETED     (1u << 0)   /* hidden; children remain */
#define THINVM_SNAPSHOT_TRASH       (1u << 1)   /* hidden; tree being freed */
#define THINVM_SNAPSHOT_PROTECTED   (1u << 2)   /* must not be deleted */
#define THINVM_SNAPSHOT_HIDDEN      (THINVM_SNAPSHOT_DELETED | \
                                     THINVM_SNAPSHOT_TRASH)

typedef struct QEMU_PACKED ThinvmSnapshotLe {
    uint64_t id_le;                 /* never 0 in use, never reused */
    uint64_t parent_id_le;          /* smaller than id; 0: none */
    ThinvmPointerLe root;           /* mapping tree of the disk */
    ThinvmPointerLe vmstate_root;   /* mapping tree of the VM state */
    uint64_t virtual_size_le;       /* bytes */
    uint64_t vmstate_size_le;       /* bytes */
    uint64_t date_sec_le;           /* since 1970, UTC */
    uint32_t date_nsec_le;
    uint32_t flags_le;
    uint64_t vm_clock_nsec_le;
    uint64_t icount_le;             /* all ones: none */
    uint8_t reserved[160];
    uint8_t name[256];              /* UTF-8, then NUL up to the end */
} ThinvmSnapshotLe;
QEMU_BUILD_BUG_ON(sizeof(ThinvmSnapshotLe) != 512);

typedef struct ThinvmSnapshot {
    uint64_t id, parent_id;
    ThinvmPointer root, vmstate_root;
    uint64_t virtual_size, vmstate_size;
    uint64_t date_sec, vm_clock_nsec, icount;
    uint32_t date_nsec, flags;
    char name[THINVM_MAX_SNAPSHOT_NAME + 1];
} ThinvmSnapshot;

/* A source with id 0 gives a free slot */
void thinvm_snapshot_encode(ThinvmSnapshotLe *dst, const ThinvmSnapshot *src);
/* Returns false with @errp set when the slot is not a valid snapshot */
bool thinvm_snapshot_decode(ThinvmSnapshot *dst, const ThinvmSnapshotLe *src,
                            Error **errp);

typedef struct QEMU_PACKED ThinvmBackingLe {
    uint32_t name_length_le;        /* bytes, 1 to 1023; 0 in an operation
                                       that removes the backing file */
    uint32_t format_length_le;      /* bytes, 0 to 63 */
    uint8_t reserved[56];
    uint8_t format[64];
    uint8_t name[1024];
    uint8_t unused[THINVM_PAGE_SIZE - 64 - 64 - 1024];
} ThinvmBackingLe;
QEMU_BUILD_BUG_ON(sizeof(ThinvmBackingLe) != THINVM_PAGE_SIZE);

typedef struct ThinvmBacking {
    char name[THINVM_MAX_BACKING_NAME + 1];     /* empty: no backing file */
    char format[THINVM_MAX_BACKING_FORMAT + 1];
} ThinvmBacking;

void thinvm_backing_encode(ThinvmBackingLe *dst, const ThinvmBacking *src);
bool thinvm_backing_decode(ThinvmBacking *dst, const ThinvmBackingLe *src,
                           Error **errp);

/* ------------------------------------------------------------------ */
/* Superblock                                                          */

typedef struct QEMU_PACKED ThinvmSuperblockLe {
    uint64_t magic_le;
    uint16_t version_major_le;
    uint16_t version_minor_le;
    uint32_t crc_le;                /* over 512 bytes with this field 0,
                                       THINVM_SUM_SUPERBLOCK, place 0 */
    uint8_t uuid[16];
    uint64_t compatible_le;         /* unknown bits: ignore */
    uint64_t readonly_compatible_le;/* unknown bits: open read-only only */
    uint64_t incompatible_le;       /* unknown bits: refuse */
    uint64_t autoclear_le;          /* unknown bits: clear when writing */
    uint32_t cluster_bits_le;
    uint32_t flags_le;              /* reserved, 0 */
    uint64_t journal_offset_le;     /* bytes; 1 MiB in version 1 */
    uint64_t journal_size_le;       /* bytes */
    uint64_t virtual_size_le;       /* bytes */
    uint64_t device_clusters_le;    /* clusters that may be allocated from */
    /* checkpoint */
    uint64_t generation_le;         /* counts checkpoints, from 1 */
    uint64_t sequence_le;           /* last journal record in this base */
    uint64_t epoch_le;              /* owner's epoch at that record */
    uint64_t journal_position_le;   /* bytes from journal_offset: where the
                                       record after this base starts */
    uint32_t record_crc_le;         /* checksum of that last record */
    uint32_t nb_extents_le;         /* of metadata pages */
    uint64_t next_snapshot_id_le;
    uint64_t current_snapshot_id_le;/* parent of the active disk; 0: none */
    uint32_t nb_snapshots_le;       /* slots in use */
    uint32_t nb_snapshot_slots_le;  /* slots ever used */
    uint64_t vmstate_size_le;       /* bytes, of the active VM state tree */
    ThinvmPointerLe map_root;       /* active disk */
    ThinvmPointerLe vmstate_root;   /* active VM state */
    ThinvmPointerLe count_root;
    ThinvmPointerLe space_root;
    ThinvmPointerLe snapshot_root;
    ThinvmPointerLe backing;        /* backing file's name; NONE: none */
    /* bitmaps, encryption, compression, data checksums, redirect; NONE */
    ThinvmPointerLe reserved_roots[8];
    uint64_t promised_pages_le;     /* since minor version 1 */
    /* with THINVM_INCOMPATIBLE_TEMPLATE, else reserved */
    uint64_t template_length_le;    /* bytes */
    uint8_t template_digest[32];    /* SHA-256; zeroes: not complete */
    uint8_t template_identity[32];  /* as a boot cache has it; zeroes: none */
    uint8_t reserved[32];
} ThinvmSuperblockLe;
QEMU_BUILD_BUG_ON(sizeof(ThinvmSuperblockLe) != 512);

/*
 * The template of a full clone that remembers it.  All that is ever marked as
 * the template's was copied from contents that have this digest, so it does not
 * change in the life of an image.
 */
#define THINVM_TEMPLATE_HASH_SIZE   32

typedef struct ThinvmTemplateId {
    uint64_t length;                /* bytes; 0: the image has no template */
    /* SHA-256 of the contents; zeroes: copying them was never completed, and
     * nobody but who does it may use the image */
    uint8_t digest[THINVM_TEMPLATE_HASH_SIZE];
    uint8_t identity[THINVM_TEMPLATE_HASH_SIZE];    /* zeroes: none */
} ThinvmTemplateId;

typedef struct ThinvmSuperblock {
    uint16_t version_major, version_minor;
    QemuUUID uuid;
    uint64_t compatible, readonly_compatible, incompatible, autoclear;
    uint32_t cluster_bits;
    uint64_t journal_offset, journal_size;
    uint64_t virtual_size, device_clusters;
    uint64_t generation, sequence, epoch, journal_position;
    uint32_t record_crc, nb_extents;
    uint64_t next_snapshot_id, current_snapshot_id;
    uint32_t nb_snapshots, nb_snapshot_slots;
    uint64_t vmstate_size;
    ThinvmPointer map_root, vmstate_root, count_root, space_root;
    ThinvmPointer snapshot_root, backing;
    /*
     * From reserved_roots on, as it is on the device, but for
     * promised_pages, and the template if there is one, which are 0 here.  A
     * later minor version may keep something there that this one needs not
     * understand; a checkpoint by this version hands it on.
     */
    uint8_t reserved[8 * sizeof(ThinvmPointerLe) + 112];
    /* Places that unwritten runs were promised for the leaves they may split
     * into, one for each; believed only with THINVM_AUTOCLEAR_PROMISES */
    uint64_t promised_pages;
    ThinvmTemplateId template;
} ThinvmSuperblock;

/* Feature bits that this version knows */
#define THINVM_INCOMPATIBLE_TEMPLATE    (1ULL << 0)
#define THINVM_INCOMPATIBLE_KNOWN       THINVM_INCOMPATIBLE_TEMPLATE
#define THINVM_READONLY_COMPATIBLE_KNOWN 0ULL
#define THINVM_AUTOCLEAR_PROMISES       (1ULL << 0)
#define THINVM_AUTOCLEAR_KNOWN          THINVM_AUTOCLEAR_PROMISES

/* Fills 512 bytes, checksum included */
void thinvm_superblock_encode(ThinvmSuperblockLe *dst,
                              const ThinvmSuperblock *src);
/*
 * Checks magic, checksum, version, features, and every field's bounds that
 * can be judged without the device.  Messages name the field and the value.
 * Magic, UUID and checksum keep their places in every later version, so the
 * checksum comes first: a damaged version number is damage.
 * -EINVAL: not a thinvm superblock (no magic); -EBADMSG: damaged or out of
 * bounds; -ENOTSUP: a version or incompatible feature that is unknown.
 */
int thinvm_superblock_decode(ThinvmSuperblock *dst,
                             const ThinvmSuperblockLe *src, Error **errp);
/* First physical cluster after the journal */
uint64_t thinvm_first_cluster(const ThinvmSuperblock *sb);
uint64_t thinvm_superblock_offset(int slot);

/* ------------------------------------------------------------------ */
/* Page validators                                                     */

/*
 * What the validators need to know of the image.  A callback that is NULL is
 * not asked: while the space map itself is loaded nobody could answer.
 */
typedef struct ThinvmBounds {
    uint64_t first_cluster;         /* lower ones hold header and journal */
    uint64_t device_clusters;
    unsigned cluster_bits;
    bool template_marks;            /* entries may say "the template's" */
    /* is this page part of a metadata extent? (opaque: the engine) */
    bool (*page_is_metadata)(void *opaque, uint64_t page);
    /* does any of these clusters belong to a metadata extent? */
    bool (*clusters_are_metadata)(void *opaque, uint64_t cluster,
                                  uint64_t nb_clusters);
    void *opaque;
} ThinvmBounds;

/*
 * Judge a whole page (after its checksum was found right).  @level: 1 to 3
 * for inner pages, 0 for leaves.  Reports the first violation with page,
 * index and value.
 */
bool thinvm_page_validate(const ThinvmBounds *bounds, ThinvmPageKind kind,
                          int level, uint64_t page, const void *buf,
                          Error **errp);
/*
 * Judge a root pointer out of the superblock or a snapshot; @kind is the kind
 * of page that it leads to.  Without @bounds only its type and fields.
 */
bool thinvm_root_validate(const ThinvmBounds *bounds, ThinvmPageKind kind,
                          const ThinvmPointer *ptr, const char *what,
                          Error **errp);

/* ------------------------------------------------------------------ */
/* Journal records and operations                                      */

#define THINVM_RECORD_MAX_SIZE      (256 * KiB)

typedef struct QEMU_PACKED ThinvmRecordLe {
    uint32_t magic_le;
    uint32_t crc_le;                /* over length bytes with this field 0,
                                       THINVM_SUM_RECORD, place: sequence */
    uint64_t epoch_le;              /* owner that wrote it */
    uint64_t sequence_le;           /* one more than the record before */
    uint64_t flushed_sequence_le;   /* records up to this one were flushed
                                       when this one was composed */
    uint32_t previous_crc_le;       /* crc_le of the record before */
    uint32_t length_le;             /* bytes, this header included */
    uint32_t nb_operations_le;
    uint32_t flags_le;              /* THINVM_RECORD_* */
    uint32_t nb_sums_le;            /* 0 without THINVM_RECORD_SUMS */
    uint8_t reserved[12];
} ThinvmRecordLe;
QEMU_BUILD_BUG_ON(sizeof(ThinvmRecordLe) != 64);
/*
 * A record starts on a 4 KiB boundary of the ring, is padded with zeroes to
 * the next one, and continues at the ring's start when it meets its end.
 *
 * Behind the operations, up to length, there may be checksums of all data
 * that they map.  Such a record was written without a flush between the data
 * and itself, so as long as it is the journal's last one it counts only if
 * they are right.  The next one is not written before it was flushed.
 */
#define THINVM_RECORD_SUMS          1u
#define THINVM_RECORD_MAX_SUMS      64
/* Bytes of data that one of them covers, at most */
#define THINVM_SUM_MAX_BYTES        (64 * KiB)

typedef struct QEMU_PACKED ThinvmDataSumLe {
    uint64_t offset_le;             /* on the device; multiple of 512 */
    uint32_t bytes_le;              /* multiple of 512 */
    uint32_t crc_le;                /* THINVM_SUM_DATA, place: offset */
} ThinvmDataSumLe;
QEMU_BUILD_BUG_ON(sizeof(ThinvmDataSumLe) != 16);

typedef struct ThinvmDataSum {
    uint64_t offset;
    uint32_t bytes, crc;
} ThinvmDataSum;

typedef struct ThinvmRecord {
    uint64_t epoch, sequence, flushed_sequence;
    uint32_t previous_crc, crc;
    uint32_t length;                /* bytes, header included, no padding */
    uint32_t nb_operations;
    uint32_t nb_sums;               /* at the end of length */
} ThinvmRecord;

typedef enum ThinvmOpType {
    /*
     * guest, count (1 to 512, within one leaf), physical, valid, source,
     * tree: entries become physical+i; their former clusters lose a
     * reference; the new ones get their first.  Source TEMPLATE, with all
     * valid bits, marks them; nothing else does.
     */
    THINVM_OP_MAP = 1,
    /* guest, physical, valid, tree: add valid bits if the entry still names
       this physical cluster, which is then not marked; else nothing */
    THINVM_OP_VALIDATE = 2,
    /* guest, count, source, tree: no cluster; reads from the source.  Writers
       keep it so short that one apply frees a bounded number of clusters */
    THINVM_OP_UNMAP = 3,
    /* guest, physical, valid, tree: take these valid bits away, if the entry
       still names this cluster and its source is zeroes (or it is fully
       valid, when its source becomes zeroes) */
    THINVM_OP_INVALIDATE = 4,
    /* guest (multiple of 512), physical, tree, valid: 0 makes an unwritten
       run, 0xffff a run, of 512 clusters */
    THINVM_OP_MAP_RUN = 5,
    /* value: virtual size in bytes; nothing is mapped beyond the smaller */
    THINVM_OP_RESIZE = 6,
    /* value: device clusters, more than before */
    THINVM_OP_GROW = 7,
    /* physical, count: free clusters become an extent of metadata pages */
    THINVM_OP_META_EXTEND = 8,
    /* backing (payload ThinvmBackingLe without its unused tail) */
    THINVM_OP_SET_BACKING = 9,
    /* value: epoch; the first record of every owner */
    THINVM_OP_EPOCH = 10,
    /* snapshot (payload ThinvmSnapshotLe; its roots are ignored).  count:
       the slot plus one, or 0: behind all others */
    THINVM_OP_SNAPSHOT_CREATE = 11,
    /* guest: slot, value: id; one bounded step: see snapshot.c */
    THINVM_OP_SNAPSHOT_DELETE_STEP = 12,
    /* guest: slot, value: id; the active disk becomes this snapshot's.
       physical: id of the record that takes the former active tree;
       count: its slot, as above */
    THINVM_OP_SNAPSHOT_GOTO = 13,
    /* value: bytes of the active VM state */
    THINVM_OP_VMSTATE_SIZE = 14,
    /* guest: slot, value: id; count: 1 protects from deletion, 0 ends that */
    THINVM_OP_SNAPSHOT_PROTECT = 15,
    /* guest, count (0 to 512, within one leaf), physical, tree, value (former
       cluster and tree's holder, see below), source: 0 if the new clusters
       are free, 1 if they have been the target of this before.  Entries of
       one tree name other clusters that hold the same.  count 0: none do,
       but the pages on the way to guest become its own */
    THINVM_OP_RELOCATE = 16,
    /* tree, guest, count (level), value (holder that gets), physical (slot
       plus one of the snapshot that gives): a pointer to a page that says the
       same becomes one to the very same page */
    THINVM_OP_SHARE = 17,
    /* value: device clusters, fewer than before; those behind are free */
    THINVM_OP_SHRINK = 18,
    THINVM_OP__MAX
} ThinvmOpType;

/*
 * Who holds a mapping tree: 0 the active disk or VM state, else the slot of a
 * snapshot plus one.  In the value of RELOCATE above the former cluster.
 */
#define THINVM_HOLDER_ACTIVE        0
#define THINVM_HOLDER_SHIFT         40

static inline uint64_t thinvm_relocate_value(uint64_t holder, uint64_t former)
{
    return holder << THINVM_HOLDER_SHIFT | former;
}

/* Trees that operations name */
enum {
    THINVM_TREE_DISK = 0,
    THINVM_TREE_VMSTATE = 1,
    THINVM_NB_TREES
};

/* On the device: 40 bytes, then the payload, a multiple of 8 */
typedef struct QEMU_PACKED ThinvmOpLe {
    uint16_t type_le;
    uint16_t length_le;             /* bytes, payload included */
    uint8_t tree;
    uint8_t source;
    uint16_t valid_le;
    uint64_t guest_le;
    uint64_t count_le;
    uint64_t physical_le;
    uint64_t value_le;
} ThinvmOpLe;
QEMU_BUILD_BUG_ON(sizeof(ThinvmOpLe) != 40);

#define THINVM_OP_BACKING_PAYLOAD   1152   /* ThinvmBackingLe up to unused */
#define THINVM_OP_MAX_LENGTH        (sizeof(ThinvmOpLe) + \
                                     THINVM_OP_BACKING_PAYLOAD)

typedef struct ThinvmOp {
    ThinvmOpType type;
    uint8_t tree;
    ThinvmSource source;
    uint16_t valid;
    uint64_t guest, count, physical, value;
    /* not owned; only for the two operations that have a payload */
    ThinvmBacking *backing;
    ThinvmSnapshot *snapshot;
} ThinvmOp;

/* Bytes that @op takes in a record; a multiple of 8 */
size_t thinvm_op_length(const ThinvmOp *op);
/*
 * Writes thinvm_op_length() bytes.  Fields that the type does not use are
 * written as 0 whatever @op holds, as are the roots of a new snapshot.
 */
void thinvm_op_encode(uint8_t *dst, const ThinvmOp *op);
/*
 * Decode one operation out of at most @size bytes and check every field that
 * can be judged alone (type known, length right for it, tree, source, counts
 * within their limits, unused fields 0).  Payloads go to @backing and
 * @snapshot (both caller's storage), to which op then points.  Returns the
 * length consumed, or -ENOTSUP for an unknown type, -EBADMSG otherwise.
 */
ssize_t thinvm_op_decode(ThinvmOp *op, ThinvmBacking *backing,
                         ThinvmSnapshot *snapshot,
                         const uint8_t *src, size_t size, Error **errp);

/*
 * Complete a record whose operations lie behind room for the header in @buf
 * (@length bytes in all): fills the header, its checksum, and the padding up
 * to the 4 KiB boundary.  Stores the checksum in rec->crc.
 */
void thinvm_record_encode(const QemuUUID *uuid, uint8_t *buf,
                          ThinvmRecord *rec);
/*
 * Judge only the header in the first 64 bytes: magic, length, counters.  To
 * learn how much to read.  -ENOENT: no record here.  -ENOTSUP, with @rec
 * filled: reserved fields are not 0.  If the checksum turns out right all the
 * same, a later version wrote this and the reader must stop and say so.
 */
int thinvm_record_decode_header(ThinvmRecord *rec, const uint8_t *buf);
/* Where the operations end and checksums of data begin, in bytes */
static inline uint32_t thinvm_record_operations_end(const ThinvmRecord *rec)
{
    return rec->length - rec->nb_sums * sizeof(ThinvmDataSumLe);
}
void thinvm_data_sum_encode(uint8_t *dst, const ThinvmDataSum *sum);
/* -EBADMSG: not what a writer may write */
int thinvm_data_sum_decode(ThinvmDataSum *sum, const uint8_t *src);
/* Is the whole record (rec->length bytes at @buf) what its header says? */
bool thinvm_record_checksum_ok(const QemuUUID *uuid, const uint8_t *buf,
                               const ThinvmRecord *rec);

/* ------------------------------------------------------------------ */
/* Ownership blocks                                                    */

typedef enum ThinvmClaimState {
    THINVM_CLAIM_ACTIVE = 1,
    THINVM_CLAIM_RELEASED = 2,      /* handed over; anyone may claim next */
    THINVM_CLAIM_CLOSED = 3,
    THINVM_CLAIM_RETURNED = 4,      /* released before its guest ever ran */
} ThinvmClaimState;

typedef struct QEMU_PACKED ThinvmClaimLe {
    uint32_t magic_le;
    uint32_t crc_le;                /* over 512 bytes, THINVM_SUM_CLAIM,
                                       place: epoch */
    uint64_t epoch_le;
    uint32_t state_le;
    uint32_t process_le;            /* process id on that host */
    uint64_t process_start_le;      /* start time, clock ticks since boot */
    uint8_t host_id[16];            /* machine id, random where none */
    uint8_t boot_id[16];
    uint8_t nonce[16];              /* of this very claim */
    uint8_t host_name[64];          /* for messages; NUL up to the end */
    uint8_t image_uuid[16];
    uint8_t reserved[352];
} ThinvmClaimLe;
QEMU_BUILD_BUG_ON(sizeof(ThinvmClaimLe) != 512);

typedef struct ThinvmClaim {
    uint64_t epoch;
    ThinvmClaimState state;
    uint32_t process;
    uint64_t process_start;
    QemuUUID host_id, boot_id, nonce;
    char host_name[64];
} ThinvmClaim;

void thinvm_claim_encode(const QemuUUID *uuid, ThinvmClaimLe *dst,
                         const ThinvmClaim *src);
/*
 * -ENOENT: none here, or another image's; -EBADMSG: damaged; -ENOTSUP: right,
 * but by a version that has states or fields that this one does not know.
 */
int thinvm_claim_decode(const QemuUUID *uuid, ThinvmClaim *dst,
                        const ThinvmClaimLe *src);

/*
 * Behind a claim that was released to another host, in the same block: where
 * the journal ended then.  Who takes the image over knows by this that the
 * device has shown all of it.
 */
#define THINVM_RELEASE_OFFSET   512     /* in the claim's block */

typedef struct QEMU_PACKED ThinvmReleaseLe {
    uint32_t magic_le;
    uint32_t crc_le;                /* over 512 bytes, THINVM_SUM_RELEASE,
                                       place: epoch */
    uint64_t epoch_le;
    uint64_t sequence_le;           /* of the last record */
    uint8_t nonce[16];              /* of the claim */
    uint8_t image_uuid[16];
    uint32_t record_crc_le;         /* of the last record */
    uint8_t reserved[452];
} ThinvmReleaseLe;
QEMU_BUILD_BUG_ON(sizeof(ThinvmReleaseLe) != 512);

typedef struct ThinvmRelease {
    uint64_t epoch, sequence;
    uint32_t record_crc;
    QemuUUID nonce;
} ThinvmRelease;

void thinvm_release_encode(const QemuUUID *uuid, ThinvmReleaseLe *dst,
                           const ThinvmRelease *src);
/* Errors as for claims */
int thinvm_release_decode(const QemuUUID *uuid, ThinvmRelease *dst,
                          const ThinvmReleaseLe *src);

typedef struct QEMU_PACKED ThinvmHeartbeatLe {
    uint32_t magic_le;
    uint32_t crc_le;                /* over 512 bytes, place: epoch */
    uint64_t epoch_le;
    uint64_t counter_le;
    uint8_t nonce[16];              /* of the claim */
    uint8_t image_uuid[16];
    uint8_t reserved[456];
} ThinvmHeartbeatLe;
QEMU_BUILD_BUG_ON(sizeof(ThinvmHeartbeatLe) != 512);

typedef struct ThinvmHeartbeat {
    uint64_t epoch, counter;
    QemuUUID nonce;
} ThinvmHeartbeat;

void thinvm_heartbeat_encode(const QemuUUID *uuid, ThinvmHeartbeatLe *dst,
                             const ThinvmHeartbeat *src);
/* Errors as for claims */
int thinvm_heartbeat_decode(const QemuUUID *uuid, ThinvmHeartbeat *dst,
                            const ThinvmHeartbeatLe *src);

/* ------------------------------------------------------------------ */
/* Hot leaves: a hint, see docs/interop/thinvm.rst.  format-hot.c       */

typedef struct QEMU_PACKED ThinvmHotLe {
    uint32_t magic_le;
    uint32_t crc_le;                /* over header and leaves, place: epoch */
    uint64_t epoch_le;
    uint64_t number_le;             /* of this list, by this owner, from 1 */
    uint8_t nonce[16];              /* of the owner's claim */
    uint8_t image_uuid[16];
    uint32_t nb_leaves_le;
    uint32_t reserved_le;
    uint32_t leaf_le[];             /* guest cluster / 512, hottest first */
} ThinvmHotLe;
QEMU_BUILD_BUG_ON(sizeof(ThinvmHotLe) != 64);

#define THINVM_MAX_HOT ((THINVM_HOT_SIZE - sizeof(ThinvmHotLe)) / 4)

typedef struct ThinvmHotHeader {
    uint64_t epoch, number;
    QemuUUID nonce;
    uint32_t nb_leaves;             /* at most THINVM_MAX_HOT */
} ThinvmHotHeader;

/* Bytes of a list on the device, filled up to 4 KiB */
static inline uint32_t thinvm_hot_bytes(uint32_t nb_leaves)
{
    return ROUND_UP(sizeof(ThinvmHotLe) + nb_leaves * 4, THINVM_PAGE_SIZE);
}

/* @dst: thinvm_hot_bytes() of it */
void thinvm_hot_encode(const QemuUUID *uuid, ThinvmHotLe *dst,
                       const ThinvmHotHeader *src, const uint32_t *leaf);
/* Judge the header alone, to learn how much to read.  -ENOENT: none here */
int thinvm_hot_decode_header(const QemuUUID *uuid, ThinvmHotHeader *dst,
                             const ThinvmHotLe *src);
/* And all of it, with room for nb_leaves at @leaf.  -EBADMSG: not whole */
int thinvm_hot_decode(const QemuUUID *uuid, ThinvmHotHeader *dst,
                      uint32_t *leaf, const ThinvmHotLe *src);

#endif
