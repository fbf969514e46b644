/*
 * thinvm on-disk format: judges of metadata pages and root pointers
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A page that passes here may be walked without further thought: every
 * address in it lies on the device and in the right kind of space, every
 * type fits its place, every reserved bit is 0 (invariant 3 of the design).
 * What needs several pages (counts, cycles by sharing) is the checker's.
 *
 * Runs at each page load, so the loops over entries do nothing but compare;
 * words are spent only once something is wrong.  No I/O, no state.
 */

#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qemu/cutils.h"
#include "format.h"

static const char *const kind_names[] = {
    [THINVM_PAGE_MAP_LEAF] = "mapping leaf",
    [THINVM_PAGE_MAP_INNER] = "mapping page",
    [THINVM_PAGE_COUNT_LEAF] = "count leaf",
    [THINVM_PAGE_COUNT_INNER] = "count page",
    [THINVM_PAGE_SPACE_INNER] = "space map page",
    [THINVM_PAGE_SPACE_BLOCK] = "space block",
    [THINVM_PAGE_SNAPSHOT_INNER] = "snapshot page",
    [THINVM_PAGE_SNAPSHOT_LEAF] = "snapshot leaf",
    [THINVM_PAGE_BACKING] = "backing file page",
};

/* ------------------------------------------------------------------ */
/* Addresses                                                           */

static bool clusters_in_bounds(const ThinvmBounds *b, uint64_t first,
                               uint64_t nb_clusters)
{
    return first >= b->first_cluster && first < b->device_clusters &&
           nb_clusters <= b->device_clusters - first;
}

/* NULL if these clusters may hold data, else what is wrong with them */
static const char *judge_data_clusters(const ThinvmBounds *b, uint64_t first,
                                       uint64_t nb_clusters)
{
    if (!clusters_in_bounds(b, first, nb_clusters)) {
        return "physical cluster outside of the device";
    }
    if (b->clusters_are_metadata &&
        b->clusters_are_metadata(b->opaque, first, nb_clusters)) {
        return "physical cluster belongs to metadata";
    }
    return NULL;
}

static const char *judge_page_address(const ThinvmBounds *b, uint64_t page)
{
    if (!clusters_in_bounds(b, page >> (b->cluster_bits - THINVM_PAGE_BITS),
                            1)) {
        return "page outside of the device";
    }
    if (b->page_is_metadata && !b->page_is_metadata(b->opaque, page)) {
        return "page outside of the metadata extents";
    }
    return NULL;
}

/* ------------------------------------------------------------------ */
/* Pointers                                                            */

static bool is_map(ThinvmPageKind kind)
{
    return kind == THINVM_PAGE_MAP_INNER;
}

/* May a pointer of this type be in an inner page of this kind and level? */
static bool type_allowed(ThinvmPageKind kind, int level,
                         ThinvmPointerType type)
{
    switch (type) {
    case THINVM_PTR_NONE:
    case THINVM_PTR_PAGE:
        return true;
    case THINVM_PTR_RUN:
    case THINVM_PTR_UNWRITTEN_RUN:
        return is_map(kind) && level == 1;
    case THINVM_PTR_ZERO:
        return is_map(kind);
    case THINVM_PTR_UNIFORM:
        return kind == THINVM_PAGE_COUNT_INNER;
    default:
        return false;
    }
}

/* Clusters below one pointer of a count page of this level */
static uint64_t count_span(int level)
{
    return (uint64_t)THINVM_COUNTS_PER_LEAF << (8 * (level - 1));
}

static bool count_ok(uint64_t count)
{
    return count <= THINVM_COUNT_MAX || count == THINVM_COUNT_METADATA;
}

/*
 * Fields that must be 0 with this type, and bounds that need no device.
 * @max_extra: what the extra field may be at most where it has a meaning.
 */
static const char *judge_fields(ThinvmPageKind kind, const ThinvmPointer *ptr,
                                uint64_t max_extra)
{
    bool has_below = is_map(kind) &&
                     (ptr->type == THINVM_PTR_PAGE ||
                      ptr->type == THINVM_PTR_RUN ||
                      ptr->type == THINVM_PTR_UNWRITTEN_RUN);

    if (ptr->shared_below && !has_below) {
        return "shared below, where nothing is";
    }
    if (ptr->extra > (ptr->type == THINVM_PTR_PAGE ? max_extra : 0)) {
        return "extra field too large";
    }
    if (ptr->type != THINVM_PTR_PAGE && (ptr->crc || ptr->generation)) {
        return "checksum or generation without a page";
    }
    switch (ptr->type) {
    case THINVM_PTR_NONE:
    case THINVM_PTR_ZERO:
        return ptr->address ? "address where none belongs" : NULL;
    case THINVM_PTR_UNIFORM:
        return ptr->address && count_ok(ptr->address) ? NULL
                                                      : "impossible count";
    default:
        return ptr->address ? NULL : "address 0";
    }
}

static const char *judge_target(const ThinvmBounds *b,
                                const ThinvmPointer *ptr)
{
    switch (ptr->type) {
    case THINVM_PTR_PAGE:
        return judge_page_address(b, ptr->address);
    case THINVM_PTR_RUN:
    case THINVM_PTR_UNWRITTEN_RUN:
        return judge_data_clusters(b, ptr->address, THINVM_ENTRIES_PER_LEAF);
    default:
        return NULL;
    }
}

static bool root_type_allowed(ThinvmPageKind kind, ThinvmPointerType type)
{
    switch (kind) {
    case THINVM_PAGE_MAP_INNER:
        return type == THINVM_PTR_NONE || type == THINVM_PTR_PAGE ||
               type == THINVM_PTR_ZERO;
    case THINVM_PAGE_COUNT_INNER:
    case THINVM_PAGE_SPACE_INNER:
        /* The header's clusters are counted, and pages lie in extents */
        return type == THINVM_PTR_PAGE;
    case THINVM_PAGE_SNAPSHOT_INNER:
    case THINVM_PAGE_BACKING:
        return type == THINVM_PTR_NONE || type == THINVM_PTR_PAGE;
    default:
        g_assert_not_reached();
    }
}

bool thinvm_root_validate(const ThinvmBounds *bounds, ThinvmPageKind kind,
                          const ThinvmPointer *ptr, const char *what,
                          Error **errp)
{
    const char *wrong = NULL;

    if (!root_type_allowed(kind, ptr->type)) {
        wrong = "type not allowed here";
    }
    if (!wrong) {
        wrong = judge_fields(kind, ptr, 0);
    }
    if (!wrong && bounds) {
        wrong = judge_target(bounds, ptr);
    }
    if (wrong) {
        error_setg(errp, "%s: %s (type %d, address %" PRIu64 ")",
                   what, wrong, ptr->type, ptr->address);
        return false;
    }
    return true;
}

/* ------------------------------------------------------------------ */
/* Pages                                                               */

/* The one form of all messages about entries of a page */
static void report(Error **errp, uint64_t page, ThinvmPageKind kind,
                   int index, const char *wrong, uint64_t value)
{
    error_setg(errp, "metadata page %" PRIu64 " (%s), entry %d: %s "
               "(0x%" PRIx64 ")", page, kind_names[kind], index, wrong, value);
}

static bool validate_inner(const ThinvmBounds *b, ThinvmPageKind kind,
                           int level, uint64_t page, const void *buf,
                           Error **errp)
{
    const ThinvmPointerLe *pointers = buf;
    uint64_t max_extra = kind == THINVM_PAGE_COUNT_INNER ? count_span(level)
                                                         : 0;
    int i;

    for (i = 0; i < THINVM_POINTERS_PER_PAGE; i++) {
        ThinvmPointer ptr;
        const char *wrong = NULL;

        thinvm_pointer_decode(&ptr, &pointers[i]);
        if (!type_allowed(kind, level, ptr.type)) {
            wrong = "pointer type not allowed here";
        }
        if (!wrong) {
            wrong = judge_fields(kind, &ptr, max_extra);
        }
        if (!wrong) {
            wrong = judge_target(b, &ptr);
        }
        if (!wrong && ptr.type == THINVM_PTR_PAGE && ptr.address == page) {
            wrong = "page points to itself";
        }
        if (wrong) {
            report(errp, page, kind, i, wrong,
                   le64_to_cpu(pointers[i].word_le));
            return false;
        }
    }
    return true;
}

/* A source that is neither the backing file nor zeroes */
static const char *judge_mark(const ThinvmBounds *b, uint64_t entry,
                              uint64_t physical)
{
    if (thinvm_entry_source(entry) != THINVM_SOURCE_TEMPLATE ||
        !b->template_marks) {
        return "unknown source of invalid parts";
    }
    if (thinvm_entry_valid(entry) != THINVM_ALL_VALID) {
        return "marked as the template's, but not all of it is valid";
    }
    return clusters_in_bounds(b, physical, 1)
           ? NULL : "physical cluster outside of the device";
}

static const char *judge_entry(const ThinvmBounds *b, uint64_t entry)
{
    uint64_t physical = thinvm_entry_physical(entry);

    if (entry & THINVM_ENTRY_RESERVED) {
        return "reserved bits are set";
    }
    if (thinvm_entry_source(entry) > THINVM_SOURCE_ZERO) {
        return judge_mark(b, entry, physical);
    }
    if (!physical) {
        return entry & (THINVM_ENTRY_SHARED |
                        (uint64_t)THINVM_ALL_VALID << THINVM_ENTRY_VALID_SHIFT)
               ? "valid or shared, but no physical cluster" : NULL;
    }
    return clusters_in_bounds(b, physical, 1)
           ? NULL : "physical cluster outside of the device";
}

static bool validate_map_leaf(const ThinvmBounds *b, uint64_t page,
                              const void *buf, Error **errp)
{
    const uint8_t *entries = buf;
    uint64_t first = 0, nb_clusters = 0;    /* range not asked for yet */
    int i;

    for (i = 0; i <= THINVM_ENTRIES_PER_LEAF; i++) {
        bool end = i == THINVM_ENTRIES_PER_LEAF;
        uint64_t entry = end ? 0 : ldq_le_p(entries + 8 * i);
        uint64_t physical = thinvm_entry_physical(entry);
        const char *wrong = judge_entry(b, entry);

        if (wrong) {
            report(errp, page, THINVM_PAGE_MAP_LEAF, i, wrong, entry);
            return false;
        }
        /* Neighbours mostly lie together: one question for all of them */
        if (nb_clusters && physical == first + nb_clusters) {
            nb_clusters++;
            continue;
        }
        if (nb_clusters && b->clusters_are_metadata &&
            b->clusters_are_metadata(b->opaque, first, nb_clusters)) {
            report(errp, page, THINVM_PAGE_MAP_LEAF, i - nb_clusters,
                   "physical cluster (or one of those behind it) belongs to "
                   "metadata", first);
            return false;
        }
        first = physical;
        nb_clusters = physical ? 1 : 0;
    }
    return true;
}

static bool validate_counts(ThinvmPageKind kind, uint64_t page,
                            const uint8_t *counts, int nb_counts,
                            bool metadata_allowed, Error **errp)
{
    int i;

    for (i = 0; i < nb_counts; i++) {
        uint16_t count = lduw_le_p(counts + 2 * i);

        if (count > THINVM_COUNT_MAX &&
            !(metadata_allowed && count == THINVM_COUNT_METADATA)) {
            report(errp, page, kind, i, "impossible count", count);
            return false;
        }
    }
    return true;
}

static bool validate_space_block(const ThinvmBounds *b, uint64_t page,
                                 const ThinvmSpaceBlockLe *block,
                                 Error **errp)
{
    uint64_t first = le64_to_cpu(block->first_page_le);
    uint32_t nb_pages = le32_to_cpu(block->nb_pages_le);
    unsigned shift = b->cluster_bits - THINVM_PAGE_BITS;
    uint64_t unit = 1ULL << shift;
    const uint8_t *counts = (const uint8_t *)block +
                            offsetof(ThinvmSpaceBlockLe, count_le);

    if (!nb_pages || nb_pages > THINVM_EXTENT_MAX_PAGES || nb_pages % unit) {
        error_setg(errp, "metadata page %" PRIu64 " (space block): %" PRIu32
                   " pages are not whole clusters of %" PRIu64 " pages, at "
                   "most %d pages", page, nb_pages, unit,
                   THINVM_EXTENT_MAX_PAGES);
        return false;
    }
    if (first % unit || first > THINVM_MAX_PAGES - nb_pages ||
        !clusters_in_bounds(b, first >> shift, nb_pages >> shift)) {
        error_setg(errp, "metadata page %" PRIu64 " (space block): extent of "
                   "%" PRIu32 " pages at page %" PRIu64 " is not on a cluster "
                   "boundary or outside of the device", page, nb_pages, first);
        return false;
    }
    if (!buffer_is_zero(block->reserved_le, sizeof(block->reserved_le)) ||
        !buffer_is_zero(counts + 2 * nb_pages,
                        2 * (THINVM_EXTENT_MAX_PAGES - nb_pages))) {
        error_setg(errp, "metadata page %" PRIu64 " (space block): reserved "
                   "bytes are not zero", page);
        return false;
    }
    return validate_counts(THINVM_PAGE_SPACE_BLOCK, page, counts, nb_pages,
                           false, errp);
}

static bool validate_snapshot_leaf(const ThinvmBounds *b, uint64_t page,
                                   const ThinvmSnapshotLe *slots,
                                   Error **errp)
{
    ERRP_GUARD();
    ThinvmSnapshot snap;
    int i;

    for (i = 0; i < THINVM_SNAPSHOTS_PER_LEAF; i++) {
        if (buffer_is_zero(&slots[i], sizeof(slots[i]))) {
            continue;
        }
        if (!thinvm_snapshot_decode(&snap, &slots[i], errp) ||
            !thinvm_root_validate(b, THINVM_PAGE_MAP_INNER, &snap.root,
                                  "root of snapshot", errp) ||
            !thinvm_root_validate(b, THINVM_PAGE_MAP_INNER,
                                  &snap.vmstate_root,
                                  "VM state root of snapshot", errp)) {
            error_prepend(errp, "metadata page %" PRIu64 " (snapshot leaf), "
                          "slot %d: ", page, i);
            return false;
        }
        if (MAX(snap.virtual_size, snap.vmstate_size) >
            THINVM_MAX_GUEST_CLUSTERS << b->cluster_bits) {
            error_setg(errp, "metadata page %" PRIu64 " (snapshot leaf), slot "
                       "%d: size %" PRIu64 " exceeds what the mapping tree "
                       "can hold", page, i,
                       MAX(snap.virtual_size, snap.vmstate_size));
            return false;
        }
    }
    return true;
}

static bool validate_backing(uint64_t page, const ThinvmBackingLe *buf,
                             Error **errp)
{
    ERRP_GUARD();
    ThinvmBacking backing;

    if (!thinvm_backing_decode(&backing, buf, errp)) {
        error_prepend(errp, "metadata page %" PRIu64 ": ", page);
        return false;
    }
    if (!backing.name[0]) {
        error_setg(errp, "metadata page %" PRIu64 ": backing file name is "
                   "empty", page);
        return false;
    }
    return true;
}

bool thinvm_page_validate(const ThinvmBounds *bounds, ThinvmPageKind kind,
                          int level, uint64_t page, const void *buf,
                          Error **errp)
{
    switch (kind) {
    case THINVM_PAGE_MAP_LEAF:
        return validate_map_leaf(bounds, page, buf, errp);
    case THINVM_PAGE_COUNT_LEAF:
        return validate_counts(kind, page, buf, THINVM_COUNTS_PER_LEAF, true,
                               errp);
    case THINVM_PAGE_SPACE_BLOCK:
        return validate_space_block(bounds, page, buf, errp);
    case THINVM_PAGE_SNAPSHOT_LEAF:
        return validate_snapshot_leaf(bounds, page, buf, errp);
    case THINVM_PAGE_BACKING:
        return validate_backing(page, buf, errp);
    case THINVM_PAGE_MAP_INNER:
    case THINVM_PAGE_COUNT_INNER:
        assert(level >= 1 && level <= THINVM_INNER_LEVELS);
        return validate_inner(bounds, kind, level, page, buf, errp);
    case THINVM_PAGE_SPACE_INNER:
    case THINVM_PAGE_SNAPSHOT_INNER:
        assert(level >= 1 && level <= THINVM_SPACE_LEVELS);
        return validate_inner(bounds, kind, level, page, buf, errp);
    }
    g_assert_not_reached();
}
