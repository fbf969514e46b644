/*
 * Right checksums for images that the fuzzer has changed
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Walks what the superblocks name as a reader would, but believes nothing
 * and minds nothing: a page that leads to itself keeps the checksum that its
 * pointer has, one that is in two places is taken for what it is met as
 * first.
 */
#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qemu/cutils.h"
#include "thinvm-fuzz-mutate.h"

#define MAX_RECORDS     64

static const struct {
    unsigned offset;
    ThinvmPageKind kind;
    int level;
} roots[] = {
    { offsetof(ThinvmSuperblockLe, space_root), THINVM_PAGE_SPACE_INNER, 2 },
    { offsetof(ThinvmSuperblockLe, count_root), THINVM_PAGE_COUNT_INNER, 3 },
    { offsetof(ThinvmSuperblockLe, map_root), THINVM_PAGE_MAP_INNER, 3 },
    { offsetof(ThinvmSuperblockLe, vmstate_root), THINVM_PAGE_MAP_INNER, 3 },
    { offsetof(ThinvmSuperblockLe, snapshot_root),
      THINVM_PAGE_SNAPSHOT_INNER, 2 },
    { offsetof(ThinvmSuperblockLe, backing), THINVM_PAGE_BACKING, 0 },
};

void fuzz_bases(FuzzImage *image, FuzzBase base[THINVM_NB_SUPERBLOCKS])
{
    for (int i = 0; i < THINVM_NB_SUPERBLOCKS; i++) {
        uint64_t size;
        uint8_t *block = fuzz_image_block(image,
                                          thinvm_superblock_offset(i) /
                                          FUZZ_BLOCK, false);

        base[i] = (FuzzBase) { };
        if (!block || ldq_le_p(block) != THINVM_SUPERBLOCK_MAGIC) {
            continue;
        }
        base[i].le = (ThinvmSuperblockLe *)block;
        size = le64_to_cpu(base[i].le->journal_size_le);
        if (size >= FUZZ_BLOCK && size % FUZZ_BLOCK == 0 &&
            size <= THINVM_MAX_JOURNAL_SIZE) {
            base[i].journal_size = size;
        }
    }
}

/* ------------------------------------------------------------------ */
/* Pages                                                               */

typedef struct Walk {
    FuzzImage *image;
    QemuUUID uuid;
    bool fix;
    GHashTable *seen;           /* page -> FuzzPlace index + 1, in places */
    GHashTable *crc;            /* page -> crc, when it is complete */
    GArray *places;
} Walk;

static ThinvmPageKind child_kind(ThinvmPageKind kind, int level)
{
    if (level > 1) {
        return kind;
    }
    switch (kind) {
    case THINVM_PAGE_MAP_INNER:
        return THINVM_PAGE_MAP_LEAF;
    case THINVM_PAGE_COUNT_INNER:
        return THINVM_PAGE_COUNT_LEAF;
    case THINVM_PAGE_SPACE_INNER:
        return THINVM_PAGE_SPACE_BLOCK;
    default:
        return THINVM_PAGE_SNAPSHOT_LEAF;
    }
}

static void walk_pointer(Walk *w, void *pointer, ThinvmPageKind kind,
                         int level);

static void walk_page(Walk *w, uint8_t *block, ThinvmPageKind kind, int level)
{
    if (level > 0) {
        for (int i = 0; i < THINVM_POINTERS_PER_PAGE; i++) {
            walk_pointer(w, block + 16 * i, child_kind(kind, level),
                         level - 1);
        }
    } else if (kind == THINVM_PAGE_SNAPSHOT_LEAF) {
        for (int i = 0; i < THINVM_SNAPSHOTS_PER_LEAF; i++) {
            uint8_t *slot = block + i * sizeof(ThinvmSnapshotLe);

            walk_pointer(w, slot + offsetof(ThinvmSnapshotLe, root),
                         THINVM_PAGE_MAP_INNER, THINVM_INNER_LEVELS);
            walk_pointer(w, slot + offsetof(ThinvmSnapshotLe, vmstate_root),
                         THINVM_PAGE_MAP_INNER, THINVM_INNER_LEVELS);
        }
    }
}

static void walk_pointer(Walk *w, void *pointer, ThinvmPageKind kind,
                         int level)
{
    static uint8_t zeroes[FUZZ_BLOCK];
    uint64_t word = ldq_le_p(pointer);
    FuzzPlace place = { word & THINVM_CLUSTER_MASK, kind, level };
    uint8_t *block;
    uint32_t crc;

    if ((word >> THINVM_PTR_TYPE_SHIFT & 15) != THINVM_PTR_PAGE ||
        place.page >= FUZZ_MAX_LENGTH / FUZZ_BLOCK) {
        return;
    }
    block = fuzz_image_block(w->image, place.page, false);
    if (!g_hash_table_contains(w->seen, &place.page)) {
        if (w->places->len >= FUZZ_MAX_PLACES) {
            return;
        }
        g_hash_table_add(w->seen, g_memdup2(&place.page, 8));
        g_array_append_val(w->places, place);
        if (block) {
            walk_page(w, block, kind, level);
        }
        if (w->fix) {
            crc = thinvm_checksum(&w->uuid, THINVM_SUM_PAGE, place.page,
                                  block ?: zeroes, FUZZ_BLOCK);
            g_hash_table_insert(w->crc, g_memdup2(&place.page, 8),
                                GUINT_TO_POINTER(crc));
        }
    }
    /* While it is being walked there is none: the pointer closes a cycle */
    if (w->fix && g_hash_table_contains(w->crc, &place.page)) {
        stl_le_p(pointer + 8, GPOINTER_TO_UINT(
                 g_hash_table_lookup(w->crc, &place.page)));
    }
}

static GArray *walk_all(FuzzImage *image, bool fix)
{
    FuzzBase base[THINVM_NB_SUPERBLOCKS];
    Walk w = {
        .image = image,
        .fix = fix,
        .seen = g_hash_table_new_full(g_int64_hash, g_int64_equal, g_free,
                                      NULL),
        .crc = g_hash_table_new_full(g_int64_hash, g_int64_equal, g_free,
                                     NULL),
        .places = g_array_new(false, false, sizeof(FuzzPlace)),
    };

    fuzz_bases(image, base);
    for (int i = 0; i < THINVM_NB_SUPERBLOCKS; i++) {
        if (!base[i].le) {
            continue;
        }
        memcpy(&w.uuid, base[i].le->uuid, sizeof(w.uuid));
        for (int j = 0; j < ARRAY_SIZE(roots); j++) {
            walk_pointer(&w, (uint8_t *)base[i].le + roots[j].offset,
                         roots[j].kind, roots[j].level);
        }
    }
    g_hash_table_unref(w.seen);
    g_hash_table_unref(w.crc);
    return w.places;
}

GArray *fuzz_places(FuzzImage *image)
{
    return walk_all(image, false);
}

/* ------------------------------------------------------------------ */
/* Counts of metadata pages, as "What is always true" has them         */

static void count_pointer(GHashTable *counts, const void *pointer)
{
    uint64_t word = ldq_le_p(pointer);
    uint64_t page = word & THINVM_CLUSTER_MASK;
    unsigned n;

    if ((word >> THINVM_PTR_TYPE_SHIFT & 15) == THINVM_PTR_PAGE) {
        n = GPOINTER_TO_UINT(g_hash_table_lookup(counts, &page));
        g_hash_table_insert(counts, g_memdup2(&page, 8),
                            GUINT_TO_POINTER(n + 1));
    }
}

static void count_place(GHashTable *counts, const uint8_t *block,
                        const FuzzPlace *place)
{
    if (place->level > 0) {
        for (int i = 0; i < THINVM_POINTERS_PER_PAGE; i++) {
            count_pointer(counts, block + 16 * i);
        }
    } else if (place->kind == THINVM_PAGE_SNAPSHOT_LEAF) {
        for (int i = 0; i < THINVM_SNAPSHOTS_PER_LEAF; i++) {
            count_pointer(counts, block + 512 * i + 16);
            count_pointer(counts, block + 512 * i + 32);
        }
    }
}

static void set_counts(GHashTable *counts, ThinvmSpaceBlockLe *block)
{
    uint64_t first = le64_to_cpu(block->first_page_le);
    unsigned nb = MIN(le32_to_cpu(block->nb_pages_le),
                      THINVM_EXTENT_MAX_PAGES);

    for (unsigned i = 0; i < nb; i++) {
        uint64_t page = first + i;
        unsigned n = GPOINTER_TO_UINT(g_hash_table_lookup(counts, &page));

        block->count_le[i] = cpu_to_le16(MIN(n, THINVM_COUNT_MAX));
    }
}

/* Where there is one base only: two may share space blocks */
static void fix_page_counts(FuzzImage *image)
{
    GHashTable *counts = g_hash_table_new_full(g_int64_hash, g_int64_equal,
                                               g_free, NULL);
    GArray *places = fuzz_places(image);
    FuzzBase base[THINVM_NB_SUPERBLOCKS];

    fuzz_bases(image, base);
    for (int i = 0; i < THINVM_NB_SUPERBLOCKS; i++) {
        for (int j = 0; base[i].le && j < ARRAY_SIZE(roots); j++) {
            count_pointer(counts, (uint8_t *)base[i].le + roots[j].offset);
        }
    }
    for (int pass = 0; pass < 2; pass++) {
        for (guint i = 0; i < places->len; i++) {
            FuzzPlace *p = &g_array_index(places, FuzzPlace, i);
            uint8_t *block = fuzz_image_block(image, p->page, false);

            if (block && !pass) {
                count_place(counts, block, p);
            } else if (block && p->kind == THINVM_PAGE_SPACE_BLOCK) {
                set_counts(counts, (ThinvmSpaceBlockLe *)block);
            }
        }
    }
    g_array_unref(places);
    g_hash_table_unref(counts);
}

/* ------------------------------------------------------------------ */
/* The journal                                                         */

typedef struct Chain {
    FuzzImage *image;
    QemuUUID uuid;
    uint64_t size, position;
    uint64_t sequence, epoch;
    uint32_t crc;
    bool summed;                /* the record before has sums of data */
    GArray *records;            /* collect only */
} Chain;

static uint8_t *ring_block(Chain *c, uint64_t position)
{
    uint64_t offset = THINVM_JOURNAL_OFFSET + position % c->size;

    return fuzz_image_block(c->image, offset / FUZZ_BLOCK, false);
}

static void ring_copy(Chain *c, uint32_t length, uint8_t *buf, bool write)
{
    for (uint32_t at = 0; at < length; at += FUZZ_BLOCK) {
        uint64_t offset = THINVM_JOURNAL_OFFSET +
                          (c->position + at) % c->size;
        uint32_t n = MIN(length - at, FUZZ_BLOCK);

        if (write) {
            fuzz_image_write(c->image, offset, n, buf + at);
        } else {
            fuzz_image_read(c->image, offset, n, buf + at);
        }
    }
}

/* Length of the operations from @buf on; counts them */
static uint32_t count_operations(const uint8_t *buf, uint32_t size,
                                 uint32_t *nb)
{
    uint32_t at = 0;

    *nb = 0;
    while (size - at >= sizeof(ThinvmOpLe)) {
        uint16_t length = lduw_le_p(buf + at + 2);

        if (length < sizeof(ThinvmOpLe) || length > size - at) {
            break;
        }
        at += length;
        (*nb)++;
    }
    return at;
}

unsigned fuzz_nb_sums(const uint8_t *record, uint32_t length)
{
    const ThinvmRecordLe *rec = (const ThinvmRecordLe *)record;
    uint32_t nb = le32_to_cpu(rec->nb_sums_le);

    return le32_to_cpu(rec->flags_le) & THINVM_RECORD_SUMS &&
           nb <= THINVM_RECORD_MAX_SUMS &&
           length - sizeof(*rec) >= nb * sizeof(ThinvmDataSumLe) ? nb : 0;
}

/* They are of what the image has now; those that cannot be stay as they are */
static void fix_sums(Chain *c, uint8_t *record, uint32_t length)
{
    g_autofree uint8_t *data = g_malloc(THINVM_SUM_MAX_BYTES);
    unsigned nb = fuzz_nb_sums(record, length);
    uint8_t *le = record + length - nb * sizeof(ThinvmDataSumLe);
    ThinvmDataSum sum;

    for (; nb; nb--, le += sizeof(ThinvmDataSumLe)) {
        if (thinvm_data_sum_decode(&sum, le) == 0) {
            fuzz_image_read(c->image, sum.offset, sum.bytes, data);
            sum.crc = thinvm_checksum(&c->uuid, THINVM_SUM_DATA, sum.offset,
                                      data, sum.bytes);
            thinvm_data_sum_encode(le, &sum);
        }
    }
}

static void fix_numbers(Chain *c, ThinvmRecordLe *rec, uint32_t length)
{
    uint8_t *op = (uint8_t *)(rec + 1);
    uint64_t epoch = le64_to_cpu(rec->epoch_le);
    uint32_t nb;

    length -= fuzz_nb_sums((uint8_t *)rec, length) * sizeof(ThinvmDataSumLe);
    count_operations(op, length - sizeof(*rec), &nb);
    rec->nb_operations_le = cpu_to_le32(nb);
    if (nb && lduw_le_p(op) == THINVM_OP_EPOCH && epoch <= c->epoch) {
        epoch = c->epoch + 1;
        stq_le_p(op + offsetof(ThinvmOpLe, value_le), epoch);
    }
    epoch = MAX(epoch, c->epoch);
    rec->epoch_le = cpu_to_le64(epoch);
    rec->sequence_le = cpu_to_le64(c->sequence + 1);
    if (le64_to_cpu(rec->flushed_sequence_le) > c->sequence || c->summed) {
        rec->flushed_sequence_le = cpu_to_le64(c->sequence);
    }
}

/* The record at c->position: made right, and passed.  false: none there */
static bool chain_next(Chain *c, unsigned flags)
{
    g_autofree uint8_t *buf = NULL;
    uint8_t *block = ring_block(c, c->position);
    ThinvmRecordLe *rec;
    uint32_t length;

    if (!block || ldl_le_p(block) != THINVM_RECORD_MAGIC) {
        return false;
    }
    length = ldl_le_p(block + offsetof(ThinvmRecordLe, length_le));
    if (length < sizeof(ThinvmRecordLe) || length % 8 ||
        length > MIN(THINVM_RECORD_MAX_SIZE, c->size)) {
        return false;
    }
    if (c->records) {
        uint64_t offset = THINVM_JOURNAL_OFFSET + c->position % c->size;

        g_array_append_val(c->records, offset);
    } else {
        buf = g_malloc(length);
        ring_copy(c, length, buf, false);
        rec = (ThinvmRecordLe *)buf;
        if (!(flags & FUZZ_KEEP_NUMBERS)) {
            fix_numbers(c, rec, length);
        }
        if (!(flags & FUZZ_KEEP_SUMS)) {
            fix_sums(c, buf, length);
        }
        c->summed = fuzz_nb_sums(buf, length);
        rec->previous_crc_le = cpu_to_le32(c->crc);
        rec->crc_le = 0;
        c->sequence = le64_to_cpu(rec->sequence_le);
        c->epoch = le64_to_cpu(rec->epoch_le);
        c->crc = thinvm_checksum(&c->uuid, THINVM_SUM_RECORD, c->sequence,
                                 buf, length);
        rec->crc_le = cpu_to_le32(c->crc);
        ring_copy(c, length, buf, true);
    }
    c->position = (c->position + ROUND_UP(length, FUZZ_BLOCK)) % c->size;
    return true;
}

static void chain_init(Chain *c, FuzzImage *image, const FuzzBase *base)
{
    *c = (Chain) {
        .image = image,
        .size = base->journal_size,
        .position = QEMU_ALIGN_DOWN(le64_to_cpu(
                        base->le->journal_position_le), FUZZ_BLOCK) %
                    base->journal_size,
        .sequence = le64_to_cpu(base->le->sequence_le),
        .epoch = le64_to_cpu(base->le->epoch_le),
        .crc = le32_to_cpu(base->le->record_crc_le),
    };
    memcpy(&c->uuid, base->le->uuid, sizeof(c->uuid));
}

static int older_base(const FuzzBase *base)
{
    if (!base[0].journal_size || !base[1].journal_size) {
        return base[0].journal_size ? 0 : base[1].journal_size ? 1 : -1;
    }
    return le64_to_cpu(base[0].le->generation_le) >
           le64_to_cpu(base[1].le->generation_le);
}

/* From the older base on; the newer one takes its numbers out of the chain */
static void fix_journal(FuzzImage *image, unsigned flags)
{
    FuzzBase base[THINVM_NB_SUPERBLOCKS];
    int older;
    ThinvmSuperblockLe *newer;
    Chain c;

    fuzz_bases(image, base);
    older = older_base(base);
    if (older < 0) {
        return;
    }
    newer = base[!older].journal_size == base[older].journal_size ?
            base[!older].le : NULL;
    chain_init(&c, image, &base[older]);
    for (int i = 0; i < MAX_RECORDS; i++) {
        if (newer && c.position == le64_to_cpu(newer->journal_position_le) &&
            !(flags & FUZZ_KEEP_NUMBERS)) {
            newer->sequence_le = cpu_to_le64(c.sequence);
            newer->record_crc_le = cpu_to_le32(c.crc);
            newer->epoch_le = cpu_to_le64(c.epoch);
            newer = NULL;
        }
        if (!chain_next(&c, flags)) {
            break;
        }
    }
}

GArray *fuzz_records(FuzzImage *image)
{
    GArray *records = g_array_new(false, false, sizeof(uint64_t));
    FuzzBase base[THINVM_NB_SUPERBLOCKS];
    int older;
    Chain c;

    fuzz_bases(image, base);
    older = older_base(base);
    if (older >= 0) {
        chain_init(&c, image, &base[older]);
        c.records = records;
        while (records->len < MAX_RECORDS && chain_next(&c, 0)) {
            /* collected */
        }
    }
    return records;
}

/* ------------------------------------------------------------------ */
/* Superblocks, claims, heartbeats                                     */

static void fix_superblocks(FuzzImage *image)
{
    FuzzBase base[THINVM_NB_SUPERBLOCKS];

    fuzz_bases(image, base);
    for (int i = 0; i < THINVM_NB_SUPERBLOCKS; i++) {
        ThinvmSuperblockLe *le = base[i].le;
        QemuUUID uuid;

        if (le) {
            memcpy(&uuid, le->uuid, sizeof(uuid));
            le->crc_le = 0;
            le->crc_le = cpu_to_le32(thinvm_checksum(&uuid,
                                                     THINVM_SUM_SUPERBLOCK, 0,
                                                     le, sizeof(*le)));
        }
    }
}

/* Checksum at 4, epoch at 8, in both */
static void fix_owners(FuzzImage *image)
{
    FuzzBase base[THINVM_NB_SUPERBLOCKS];
    QemuUUID uuid;

    fuzz_bases(image, base);
    if (!base[0].le && !base[1].le) {
        return;
    }
    memcpy(&uuid, (base[0].le ?: base[1].le)->uuid, sizeof(uuid));
    for (int i = 0; i < 2 * THINVM_NB_CLAIMS; i++) {
        bool claim = i < THINVM_NB_CLAIMS;
        uint64_t number = THINVM_CLAIM_OFFSET / FUZZ_BLOCK + i;
        uint8_t *block = fuzz_image_block(image, number, false);

        if (block) {
            stl_le_p(block + 4, 0);
            stl_le_p(block + 4, thinvm_checksum(&uuid, claim ?
                                                THINVM_SUM_CLAIM :
                                                THINVM_SUM_HEARTBEAT,
                                                ldq_le_p(block + 8), block,
                                                512));
        }
    }
}

void fuzz_fix(FuzzImage *image, unsigned flags)
{
    if (flags & FUZZ_FIX_COUNTS) {
        fix_page_counts(image);
    }
    g_array_unref(walk_all(image, true));
    if (!(flags & FUZZ_KEEP_JOURNAL)) {
        fix_journal(image, flags);
    }
    fix_owners(image);
    fix_superblocks(image);
}
