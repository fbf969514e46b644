/*
 * thinvm metadata engine: the state and its operations
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Engine layer.  Life of a state, and the two entries through which all
 * changes go: thinvm_state_prepare() and thinvm_state_apply().  What is not a
 * matter of a tree or of snapshots is done here.
 *
 * Metadata space.  prepare counts the places that an operation may need (an
 * upper bound) and refuses it when they would come out of the reserve, which
 * belongs to checkpoints, and to operations that free space or must not fail.
 */
#include "qemu/osdep.h"
#include "state-int.h"

/* ------------------------------------------------------------------ */
/* Life                                                                */

static ThinvmState *state_alloc(const ThinvmSuperblock *sb,
                                uint64_t cache_size)
{
    ThinvmState *s = g_new0(ThinvmState, 1);

    qemu_mutex_init(&s->lock);
    seqlock_init(&s->sequence);
    s->sb = *sb;
    s->uuid = sb->uuid;
    s->cluster_bits = sb->cluster_bits;
    s->first_cluster = thinvm_first_cluster(sb);
    s->journal_offset = sb->journal_offset;
    s->journal_size = sb->journal_size;
    s->compatible = sb->compatible;
    s->readonly_compatible = sb->readonly_compatible;
    s->incompatible = sb->incompatible;
    s->virtual_size = sb->virtual_size;
    s->device_clusters = sb->device_clusters;
    s->search_hint = s->first_cluster;
    s->applying = UINT64_MAX;
    s->bounds = (ThinvmBounds) {
        .first_cluster = s->first_cluster,
        .device_clusters = s->device_clusters,
        .cluster_bits = s->cluster_bits,
        .template_marks = s->incompatible & THINVM_INCOMPATIBLE_TEMPLATE,
        .page_is_metadata = thinvm_extents_have_page,
        .clusters_are_metadata = thinvm_taking_have_clusters,
        .opaque = s,
    };
    s->checksums = g_hash_table_new_full(g_int64_hash, g_int64_equal, NULL,
                                         g_free);
    thinvm_pages_init(s);
    thinvm_extents_init(s);
    thinvm_space_init(s);
    thinvm_state_set_cache_size(s, cache_size);
    return s;
}

/*
 * An unwritten run has its clusters for itself but for snapshots, so more than
 * this many cannot be.  A base that claims more is taken for one that does not
 * know.
 */
static bool promises_are_possible(const ThinvmSuperblock *sb)
{
    return sb->promised_pages <= sb->device_clusters / THINVM_ENTRIES_PER_LEAF *
                                 (sb->nb_snapshot_slots + 1ULL);
}

ThinvmState *thinvm_state_new(const ThinvmSuperblock *sb,
                              const ThinvmSuperblock *older,
                              uint64_t cache_size)
{
    ThinvmState *s = state_alloc(sb, cache_size);

    if (older) {
        s->older = *older;
        s->has_older = true;
    }
    s->generation = sb->generation + 1;
    s->epoch = sb->epoch;
    s->next_snapshot_id = sb->next_snapshot_id;
    s->current_snapshot_id = sb->current_snapshot_id;
    s->nb_snapshots = sb->nb_snapshots;
    s->nb_snapshot_slots = sb->nb_snapshot_slots;
    s->vmstate_size = sb->vmstate_size;
    s->promises_exact = (sb->autoclear & THINVM_AUTOCLEAR_PROMISES) &&
                        promises_are_possible(sb);
    s->promised_pages = s->promises_exact ? sb->promised_pages : 0;
    thinvm_pointer_encode(&s->root[THINVM_TREE_DISK], &sb->map_root);
    thinvm_pointer_encode(&s->root[THINVM_TREE_VMSTATE], &sb->vmstate_root);
    thinvm_pointer_encode(&s->count_root, &sb->count_root);
    thinvm_pointer_encode(&s->space_root, &sb->space_root);
    thinvm_pointer_encode(&s->snapshot_root, &sb->snapshot_root);
    thinvm_pointer_encode(&s->backing_root, &sb->backing);
    return s;
}

/* Clusters of the first extent, at least */
static uint64_t first_extent_minimum(const ThinvmSuperblock *sb)
{
    return DIV_ROUND_UP(4 * THINVM_MIN_DIRTY_BOUND,
                        1u << (sb->cluster_bits - THINVM_PAGE_BITS));
}

uint64_t thinvm_state_minimum_device(const ThinvmSuperblock *sb)
{
    return (thinvm_first_cluster(sb) + first_extent_minimum(sb))
           << sb->cluster_bits;
}

ThinvmState *thinvm_state_new_empty(const ThinvmSuperblock *sb,
                                    uint64_t cache_size, Error **errp)
{
    uint64_t minimum = thinvm_state_minimum_device(sb) >> sb->cluster_bits;
    unsigned bits = sb->cluster_bits - THINVM_PAGE_BITS;
    uint64_t pages, clusters;
    ThinvmState *s;

    if (sb->device_clusters < minimum) {
        error_setg(errp, "device of %" PRIu64 " bytes is too small: an empty "
                   "image with these options takes %" PRIu64 " bytes",
                   sb->device_clusters << sb->cluster_bits,
                   minimum << sb->cluster_bits);
        return NULL;
    }
    s = state_alloc(sb, cache_size);
    s->generation = 1;
    s->next_snapshot_id = 1;
    s->loaded = true;
    s->promises_exact = true;
    s->nb_count_free = s->device_clusters;
    pages = MIN(thinvm_space_reserve_pages(s) + s->dirty_bound,
                THINVM_EXTENT_MAX_PAGES);
    clusters = MAX(first_extent_minimum(sb), pages >> bits);
    clusters = MIN(clusters, s->device_clusters - s->first_cluster);
    thinvm_extent_add(s, s->first_cluster << bits, clusters << bits);
    thinvm_count_change(s, 0, s->first_cluster + clusters,
                        THINVM_COUNT_TO_METADATA);
    return s;
}

void thinvm_state_free(ThinvmState *s)
{
    if (!s) {
        return;
    }
    thinvm_pages_destroy(s);
    thinvm_extents_destroy(s);
    thinvm_space_destroy(s);
    g_hash_table_unref(s->checksums);
    qemu_mutex_destroy(&s->lock);
    g_free(s);
}

void thinvm_state_lock(ThinvmState *s)
{
    qemu_mutex_lock(&s->lock);
}

void thinvm_state_unlock(ThinvmState *s)
{
    qemu_mutex_unlock(&s->lock);
}

void thinvm_state_set_cache_size(ThinvmState *s, uint64_t bytes)
{
    s->cache_limit = MAX(bytes / THINVM_PAGE_SIZE, THINVM_MIN_CACHE_PAGES);
    thinvm_space_update_bounds(s);
    thinvm_pages_evict(s);
}

static uint64_t metadata_clusters(ThinvmState *s)
{
    return s->first_cluster +
           (s->nb_meta_pages >> (s->cluster_bits - THINVM_PAGE_BITS));
}

/* The window is set aside for whoever comes next */
static uint64_t available_clusters(ThinvmState *s)
{
    uint64_t available = s->nb_count_free + s->window_nb;

    return available > s->nb_busy ? available - s->nb_busy : 0;
}

void thinvm_state_info(ThinvmState *s, ThinvmInfoState *info)
{
    *info = (ThinvmInfoState) {
        .uuid = s->uuid,
        .virtual_size = s->virtual_size,
        .vmstate_size = s->vmstate_size,
        .device_clusters = s->device_clusters,
        .first_cluster = s->first_cluster,
        .cluster_bits = s->cluster_bits,
        .epoch = s->epoch,
        .generation = s->generation,
        .allocated_clusters = s->device_clusters - s->nb_count_free -
                              metadata_clusters(s),
        .free_clusters = s->nb_count_free,
        .busy_clusters = s->nb_busy,
        .available_clusters = available_clusters(s),
        .metadata_pages = s->nb_meta_pages,
        .free_metadata_pages = s->nb_meta_free,
        .dirty_pages = s->nb_dirty,
        .dirty_bound = s->dirty_bound,
        .promised_pages = s->promised_pages,
        .promises_exact = s->promises_exact,
        .cached_pages = s->nb_clean + s->nb_dirty +
                        (s->frozen ? s->frozen->nb_pages : 0),
        .cache_limit = s->cache_limit,
        .cache_hits = qatomic_read(&s->hits),
        .cache_misses = qatomic_read(&s->misses),
        .nb_snapshots = s->nb_snapshots,
        .current_snapshot_id = s->current_snapshot_id,
    };
}

bool thinvm_state_dirty_reaches(const ThinvmState *s, unsigned quarters)
{
    return qatomic_read(&s->nb_dirty) * 4 >=
           (uint64_t)qatomic_read(&s->dirty_bound) * quarters;
}

void thinvm_state_set_applying(ThinvmState *s, uint64_t sequence)
{
    s->applying = sequence;
}

void thinvm_state_set_template(ThinvmState *s, const ThinvmTemplateId *id)
{
    s->sb.template = *id;
}

const ThinvmBacking *thinvm_state_backing(ThinvmState *s)
{
    return &s->backing;
}

/* ------------------------------------------------------------------ */
/* Scalars and the backing file                                        */

static int prepare_scalar(ThinvmState *s, const ThinvmOp *op,
                          ThinvmNeeds *needs, Error **errp)
{
    uint64_t limit;

    switch (op->type) {
    case THINVM_OP_RESIZE:
        limit = MIN(THINVM_MAX_VIRTUAL_SIZE,
                    THINVM_MAX_GUEST_CLUSTERS << s->cluster_bits);
        if (op->value % THINVM_SECTOR_SIZE || op->value > limit) {
            error_setg(errp, "virtual size %" PRIu64 " is not a multiple of "
                       "512 of at most %" PRIu64, op->value, limit);
            return -EINVAL;
        }
        return op->value == s->virtual_size ? -EALREADY : 0;
    case THINVM_OP_EPOCH:
        if (op->value <= s->epoch) {
            error_setg(errp, "epoch %" PRIu64 " does not follow epoch %"
                       PRIu64, op->value, s->epoch);
            return -EINVAL;
        }
        return 0;
    case THINVM_OP_VMSTATE_SIZE:
        if (op->value > THINVM_MAX_VIRTUAL_SIZE) {
            error_setg(errp, "VM state of %" PRIu64 " bytes is larger than "
                       "the limit of %llu", op->value,
                       (unsigned long long)THINVM_MAX_VIRTUAL_SIZE);
            return -EINVAL;
        }
        return op->value == s->vmstate_size ? -EALREADY : 0;
    case THINVM_OP_SET_BACKING:
        s->new_pages++;
        return 0;
    default:
        g_assert_not_reached();
    }
}

static void apply_backing(ThinvmState *s, const ThinvmBacking *backing)
{
    ThinvmPage *page;
    uint64_t word;

    if (thinvm_slot_type(&s->backing_root) == THINVM_PTR_PAGE) {
        thinvm_page_unref(s, thinvm_slot_address(&s->backing_root));
    }
    s->backing = *backing;
    if (!backing->name[0]) {
        thinvm_slot_set(&s->backing_root, 0, 0, 0);
        return;
    }
    page = thinvm_page_new(s, THINVM_PAGE_BACKING, 0);
    thinvm_backing_encode((ThinvmBackingLe *)page->data, backing);
    word = thinvm_slot_make(THINVM_PTR_PAGE, page->number) |
           (page->generation & 0xffff) << THINVM_PTR_GENERATION_SHIFT;
    thinvm_slot_set(&s->backing_root, word, 0, 0);
}

int thinvm_state_rewrite_backing(ThinvmState *s)
{
    ThinvmBacking backing = s->backing;

    if (thinvm_slot_type(&s->backing_root) != THINVM_PTR_PAGE ||
        !thinvm_page_is_retired(s, thinvm_slot_address(&s->backing_root))) {
        return 0;
    }
    seqlock_write_begin(&s->sequence);
    apply_backing(s, &backing);
    seqlock_write_end(&s->sequence);
    return 1;
}

/* ------------------------------------------------------------------ */
/* Space of the device                                                 */

static int prepare_grow(ThinvmState *s, const ThinvmOp *op,
                        ThinvmNeeds *needs, Error **errp)
{
    if (op->value == s->device_clusters) {
        return -EALREADY;
    }
    if (op->value < s->device_clusters || op->value > THINVM_MAX_CLUSTERS) {
        error_setg(errp, "device of %" PRIu64 " clusters cannot grow to %"
                   PRIu64, s->device_clusters, op->value);
        return -EINVAL;
    }
    return thinvm_count_need_grow(s, needs);
}

static int prepare_shrink(ThinvmState *s, const ThinvmOp *op, bool replay,
                          ThinvmNeeds *needs, Error **errp)
{
    int ret;

    if (op->value == s->device_clusters) {
        return -EALREADY;
    }
    if (op->value > s->device_clusters || op->value <= s->first_cluster) {
        error_setg(errp, "device of %" PRIu64 " clusters cannot shrink to %"
                   PRIu64, s->device_clusters, op->value);
        return -EINVAL;
    }
    ret = thinvm_count_need_shrink(s, op->value, needs);
    if (ret == 0 && !replay &&
        thinvm_space_next_busy(s, op->value, s->device_clusters) <
        s->device_clusters) {
        ret = -EBUSY;
    }
    if (ret == -EBADMSG || ret == -EBUSY) {
        error_setg(errp, "of the device's %" PRIu64 " clusters some behind the "
                   "first %" PRIu64 " are in use", s->device_clusters,
                   op->value);
    }
    return ret;
}

static int prepare_meta_extend(ThinvmState *s, const ThinvmOp *op,
                               ThinvmNeeds *needs, Error **errp)
{
    unsigned bits = s->cluster_bits - THINVM_PAGE_BITS;
    int ret;

    if (!op->count || op->count > THINVM_EXTENT_MAX_PAGES >> bits ||
        s->extents->len >= THINVM_MAX_EXTENTS) {
        error_setg(errp, "metadata extent of %" PRIu64 " clusters as the %u. "
                   "is out of bounds", op->count, s->extents->len + 1);
        return -EINVAL;
    }
    ret = thinvm_count_expect(s, op->physical, op->count, 0, 0, needs);
    if (ret == -EBADMSG) {
        error_setg(errp, "metadata extent at cluster %" PRIu64 ": its %"
                   PRIu64 " clusters are not all free", op->physical,
                   op->count);
    } else if (ret == 0 &&
               thinvm_taking_finds(s, op->physical, op->count)) {
        s->damaged = true;
        error_setg(errp, "metadata extent at cluster %" PRIu64 ": its %"
                   PRIu64 " clusters have count 0, but are in use",
                   op->physical, op->count);
        ret = -EBADMSG;
    }
    return ret;
}

static void apply_meta_extend(ThinvmState *s, const ThinvmOp *op)
{
    unsigned bits = s->cluster_bits - THINVM_PAGE_BITS;

    thinvm_count_change(s, op->physical, op->count, THINVM_COUNT_TO_METADATA);
    thinvm_space_clear_busy(s, op->physical, op->count);
    thinvm_extent_add(s, op->physical << bits, op->count << bits);
}

/* ------------------------------------------------------------------ */
/* Prepare and apply                                                   */

static int prepare_by_type(ThinvmState *s, const ThinvmOp *op, bool replay,
                           ThinvmNeeds *needs, Error **errp)
{
    switch (op->type) {
    case THINVM_OP_MAP:
    case THINVM_OP_VALIDATE:
    case THINVM_OP_UNMAP:
    case THINVM_OP_INVALIDATE:
    case THINVM_OP_MAP_RUN:
        return thinvm_map_prepare(s, op, needs, errp);
    case THINVM_OP_RESIZE:
    case THINVM_OP_EPOCH:
    case THINVM_OP_VMSTATE_SIZE:
    case THINVM_OP_SET_BACKING:
        return prepare_scalar(s, op, needs, errp);
    case THINVM_OP_GROW:
        return prepare_grow(s, op, needs, errp);
    case THINVM_OP_META_EXTEND:
        return prepare_meta_extend(s, op, needs, errp);
    case THINVM_OP_RELOCATE:
    case THINVM_OP_SHARE:
        return thinvm_relocate_prepare(s, op, replay, needs, errp);
    case THINVM_OP_SHRINK:
        return prepare_shrink(s, op, replay, needs, errp);
    case THINVM_OP_SNAPSHOT_CREATE:
    case THINVM_OP_SNAPSHOT_DELETE_STEP:
    case THINVM_OP_SNAPSHOT_GOTO:
    case THINVM_OP_SNAPSHOT_PROTECT:
        return thinvm_snapshot_prepare(s, op, needs, errp);
    default:
        error_setg(errp, "operation %d is unknown", op->type);
        return -ENOTSUP;
    }
}

/* May it use what is kept back for checkpoints? */
static bool op_may_use_reserve(const ThinvmOp *op)
{
    switch (op->type) {
    case THINVM_OP_UNMAP:
    case THINVM_OP_VALIDATE:
    case THINVM_OP_INVALIDATE:
    case THINVM_OP_GROW:
    case THINVM_OP_META_EXTEND:
    case THINVM_OP_EPOCH:
    case THINVM_OP_SNAPSHOT_DELETE_STEP:
    case THINVM_OP_SHARE:
    case THINVM_OP_SHRINK:
        return true;
    default:
        return false;
    }
}

/* Is it needed to become the owner, or to get more space for metadata? */
static bool op_is_vital(const ThinvmOp *op)
{
    return op->type == THINVM_OP_EPOCH || op->type == THINVM_OP_GROW ||
           op->type == THINVM_OP_META_EXTEND;
}

/*
 * Places that must stay free.  A freeze takes up to thinvm_space_last_pages(),
 * and gives as many back that come free with the second one after it: who
 * leaves twice as many leaves enough for any number of freezes in turn.
 *
 * Those that are promised too, but an image of version 1.0 has set nothing
 * aside when its runs came.  There they may be missing from the start, and
 * only what takes more than it gives waits until there are as many.
 */
static uint64_t places_kept(ThinvmState *s, const ThinvmOp *op, bool replay)
{
    uint64_t keep;

    if (replay || op_is_vital(op)) {
        return thinvm_space_last_pages(s);
    }
    keep = s->grows ? thinvm_space_reserve_pages(s) :
                      2 * thinvm_space_last_pages(s);
    return s->grows || s->promises_exact ?
           keep + thinvm_space_promised_then(s) : keep;
}

int thinvm_state_prepare(ThinvmState *s, const ThinvmOp *op, bool replay,
                         ThinvmNeeds *needs, Error **errp)
{
    int ret;

    if (s->damaged) {
        error_setg(errp, "the image's reference counts are damaged; it can "
                   "only be read");
        return -EBADMSG;
    }
    needs->nb_want = 0;
    s->mark++;
    s->new_pages = 0;
    s->new_promises = 0;
    s->grows = !op_may_use_reserve(op);
    s->last_count_leaf = UINT64_MAX;
    ret = prepare_by_type(s, op, replay, needs, errp);
    if (needs->nb_want && ret == 0) {
        ret = -EAGAIN;
    }
    if (ret < 0) {
        return ret;
    }
    if (s->nb_meta_free < s->new_pages + places_kept(s, op, replay)) {
        error_setg(errp, "no space for metadata is left");
        return -ENOSPC;
    }
    return 0;
}

void thinvm_state_apply(ThinvmState *s, const ThinvmOp *op)
{
    seqlock_write_begin(&s->sequence);
    switch (op->type) {
    case THINVM_OP_RESIZE:
        s->virtual_size = op->value;
        thinvm_space_update_bounds(s);
        break;
    case THINVM_OP_EPOCH:
        s->epoch = op->value;
        break;
    case THINVM_OP_VMSTATE_SIZE:
        s->vmstate_size = op->value;
        break;
    case THINVM_OP_SET_BACKING:
        apply_backing(s, op->backing);
        break;
    case THINVM_OP_GROW:
        thinvm_count_grow(s, op->value);
        thinvm_space_update_bounds(s);
        break;
    case THINVM_OP_SHRINK:
        thinvm_count_shrink(s, op->value);
        thinvm_space_update_bounds(s);
        break;
    case THINVM_OP_META_EXTEND:
        apply_meta_extend(s, op);
        break;
    case THINVM_OP_RELOCATE:
    case THINVM_OP_SHARE:
        thinvm_relocate_apply(s, op);
        break;
    case THINVM_OP_SNAPSHOT_CREATE:
    case THINVM_OP_SNAPSHOT_DELETE_STEP:
    case THINVM_OP_SNAPSHOT_GOTO:
    case THINVM_OP_SNAPSHOT_PROTECT:
        thinvm_snapshot_apply(s, op);
        break;
    default:
        thinvm_map_apply(s, op);
    }
    seqlock_write_end(&s->sequence);
}

/* ------------------------------------------------------------------ */
/* For the checker                                                     */

int thinvm_state_page_count(ThinvmState *s, uint64_t page, uint16_t *count)
{
    uint16_t *recorded = thinvm_page_count(s, page, NULL);

    if (!recorded) {
        return -ENOENT;
    }
    *count = *recorded;
    return 0;
}

int thinvm_state_cluster_count(ThinvmState *s, uint64_t cluster,
                               uint16_t *count, ThinvmNeeds *needs)
{
    needs->nb_want = 0;
    return thinvm_count_get(s, cluster, count, needs);
}

bool thinvm_state_extent(ThinvmState *s, unsigned nr, ThinvmFreedRange *range)
{
    unsigned bits = s->cluster_bits - THINVM_PAGE_BITS;
    ThinvmMetaExtent *e;

    if (nr >= s->extents->len) {
        return false;
    }
    e = g_ptr_array_index(s->extents, nr);
    range->first = e->first_page >> bits;
    range->nb_clusters = e->nb_pages >> bits;
    return true;
}

void thinvm_state_roots(ThinvmState *s, ThinvmPointer *map,
                        ThinvmPointer *vmstate, ThinvmPointer *count,
                        ThinvmPointer *snapshot, ThinvmPointer *backing)
{
    thinvm_pointer_decode(map, &s->root[THINVM_TREE_DISK]);
    thinvm_pointer_decode(vmstate, &s->root[THINVM_TREE_VMSTATE]);
    thinvm_pointer_decode(count, &s->count_root);
    thinvm_pointer_decode(snapshot, &s->snapshot_root);
    thinvm_pointer_decode(backing, &s->backing_root);
}

int thinvm_state_read_page(ThinvmState *s, const ThinvmPageRef *ref, void *buf,
                           ThinvmNeeds *needs)
{
    ThinvmPage *page = thinvm_page_find(s, ref->page);

    needs->nb_want = 0;
    if (!page) {
        ThinvmPointer ptr = {
            .address = ref->page, .type = THINVM_PTR_PAGE, .crc = ref->crc,
        };
        ThinvmPointerLe slot;

        thinvm_pointer_encode(&slot, &ptr);
        thinvm_page_get(s, &slot, ref->kind, ref->level, needs);
        return -EAGAIN;
    }
    if (page->kind != ref->kind || page->level != ref->level) {
        return -EBADMSG;
    }
    memcpy(buf, page->data, THINVM_PAGE_SIZE);
    return 0;
}

void thinvm_repair_distrust(ThinvmState *s)
{
    seqlock_write_begin(&s->sequence);
    for (int tree = 0; tree < THINVM_NB_TREES; tree++) {
        ThinvmPointerLe *slot = &s->root[tree];

        if (thinvm_slot_type(slot) == THINVM_PTR_PAGE) {
            thinvm_slot_set(slot, thinvm_slot_word(slot) |
                            THINVM_PTR_SHARED_BELOW,
                            le32_to_cpu(slot->crc_le), 0);
        }
    }
    s->damaged = false;
    thinvm_map_short_cut_clear(s);
    seqlock_write_end(&s->sequence);
}
