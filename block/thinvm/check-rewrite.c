/*
 * thinvm check: trees without what is damaged
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Durability layer.  Builds trees anew, from the leaves up, where a page on
 * the way cannot be read or something in it is wrong:
 *
 *   mapping trees     the range becomes unmapped: it reads from the backing
 *                     file, or as zeroes; its guest offsets are told
 *   VM states         one that lacks something would do harm: it goes whole
 *   reference counts  the range counts as free until the counts are compared
 *   snapshots         a record that is wrong goes, with the snapshot
 *
 * A page that several trees share is built once, and shared again.  With
 * @spare clusters, those users of a cluster that share it with another place
 * of the disk get a copy of their own instead; nothing is lost by that.
 *
 * Everything happens in memory, to pages of the base that is being built, and
 * to clusters that are free: a power cut leaves the image as it was.  Counts
 * are not kept up; the caller counts again.
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qapi/qapi-types-block-core.h"
#include "check.h"

enum {
    REWRITE_CHANGED = 1,
    REWRITE_LOST = 2,
};

/* What became of a page */
typedef struct Done {
    uint64_t place;
    uint64_t size_clusters;
    int flags;
    ThinvmPointer ptr;
} Done;

typedef struct Rewrite {
    ThinvmCheck *c;
    GArray *spare;              /* uint64_t, clusters; NULL: do not copy */
    unsigned nb_used;           /* of them */
    GHashTable *done;           /* page number -> Done */
    GHashTable *ids;            /* of snapshots */
    uint32_t nb_snapshots;
    int ret;                    /* first error that ends it all */
    Error **errp;
} Rewrite;

void thinvm_check_lost(ThinvmCheck *c, const char *what, bool mapping)
{
    g_autofree char *message =
        g_strdup_printf("%s: lost%s", what, !mapping ? "" : c->has_backing ?
                        "; reads from the backing file from now on" :
                        "; reads as zeroes from now on");

    c->report(c->opaque, message);
    c->result->corruptions_fixed++;
}

static void rewrite_fail(Rewrite *r, int ret, const char *what)
{
    if (r->ret == 0) {
        r->ret = ret;
        error_setg_errno(r->errp, -ret, "Could not repair %s", what);
    }
}

static void new_page(Rewrite *r, ThinvmPageKind kind, int level,
                     const void *buf, ThinvmPointer *ptr)
{
    ThinvmCheck *c = r->c;
    bool shared_below = ptr->shared_below;
    uint32_t extra = ptr->extra;
    int ret;

    thinvm_state_lock(c->s);
    ret = thinvm_repair_new_page(c->s, kind, level, buf, ptr);
    thinvm_state_unlock(c->s);
    if (ret < 0) {
        rewrite_fail(r, ret, "metadata: no place for a page is left");
    }
    ptr->shared_below = shared_below;
    ptr->extra = extra;
}

static Done *find_done(Rewrite *r, uint64_t page)
{
    int64_t key = page;

    return g_hash_table_lookup(r->done, &key);
}

static void set_done(Rewrite *r, uint64_t page, uint64_t place, int flags,
                     const ThinvmPointer *ptr)
{
    int64_t key = page;
    Done done = {
        .place = place,
        .size_clusters = r->c->size_clusters,
        .flags = flags,
        .ptr = *ptr,
    };

    g_hash_table_replace(r->done, g_memdup2(&key, sizeof(key)),
                         g_memdup2(&done, sizeof(done)));
}

/* A page in @buf: 0, REWRITE_LOST if some of it is, or -EBADMSG if all */
static int coroutine_fn get_page(Rewrite *r, const ThinvmPointer *ptr,
                                 ThinvmPageKind kind, int level, void *buf,
                                 const char *what)
{
    ThinvmPageRef ref = {
        .page = ptr->address,
        .crc = ptr->crc,
        .kind = kind,
        .level = level,
    };
    int ret = thinvm_check_read_page(r->c, &ref, buf, what);

    if (ret < 0 && ret != -EBADMSG) {
        rewrite_fail(r, ret, what);
    }
    return ret > 0 ? REWRITE_LOST | REWRITE_CHANGED : ret;
}

/* ------------------------------------------------------------------ */
/* Mapping trees                                                       */

static uint64_t guest_span(int level)
{
    return (uint64_t)THINVM_ENTRIES_PER_LEAF << (8 * level);
}

/* Give an entry a cluster of its own, with the same data */
static void coroutine_fn copy_cluster(Rewrite *r, uint64_t guest,
                                      uint64_t *entry)
{
    ThinvmCheck *c = r->c;
    unsigned bits = c->info.cluster_bits;
    uint64_t old = thinvm_entry_physical(*entry), new;
    g_autofree uint8_t *buf = NULL;
    g_autofree char *message = NULL;
    int ret = 0;

    if (r->nb_used == r->spare->len) {
        return;
    }
    new = g_array_index(r->spare, uint64_t, r->nb_used++);
    if (thinvm_entry_valid(*entry)) {
        buf = g_try_malloc(1ULL << bits);
        ret = !buf ? -ENOMEM :
              thinvm_store_pread(c->st, old << bits, 1ULL << bits, buf,
                                 BLKDBG_COW_READ);
        if (ret == 0) {
            ret = thinvm_store_pwrite(c->st, new << bits, 1ULL << bits, buf,
                                      BLKDBG_COW_WRITE);
        }
    }
    if (ret < 0) {
        rewrite_fail(r, ret, "a cluster with two users: cannot copy it");
        return;
    }
    *entry = (*entry & ~THINVM_CLUSTER_MASK) | new;
    message = g_strdup_printf("%s: guest offset 0x%" PRIx64 " has its own copy "
                              "of cluster %" PRIu64 " from now on, but its "
                              "data may be those of the other place", c->tree,
                              guest << bits, old);
    c->report(c->opaque, message);
    c->result->corruptions_fixed++;
}

static bool is_duplicate(Rewrite *r, int64_t user)
{
    return r->spare && g_hash_table_contains(r->c->duplicates, &user);
}

static bool beyond_end(Rewrite *r, uint64_t guest)
{
    return guest >= r->c->size_clusters;
}

/* A run that has to become a leaf */
static int coroutine_fn rewrite_run(Rewrite *r, ThinvmPointer *ptr,
                                    uint64_t guest, uint64_t parent,
                                    unsigned slot)
{
    g_autofree uint64_t *entries = NULL;
    bool written = ptr->type == THINVM_PTR_RUN;
    bool needed = beyond_end(r, guest + THINVM_ENTRIES_PER_LEAF - 1);

    for (unsigned i = 0; i < THINVM_ENTRIES_PER_LEAF && !needed; i++) {
        needed = is_duplicate(r, thinvm_check_user(parent, true, slot, i));
    }
    if (!needed) {
        return 0;
    }
    entries = g_new0(uint64_t, THINVM_ENTRIES_PER_LEAF);
    for (unsigned i = 0; i < THINVM_ENTRIES_PER_LEAF; i++) {
        uint64_t entry = thinvm_entry(ptr->address + i,
                                      written ? THINVM_ALL_VALID : 0,
                                      written ? THINVM_SOURCE_BACKING :
                                                THINVM_SOURCE_ZERO);

        if (beyond_end(r, guest + i)) {
            r->c->result->corruptions_fixed++;
            continue;
        }
        if (is_duplicate(r, thinvm_check_user(parent, true, slot, i))) {
            copy_cluster(r, guest + i, &entry);
        }
        entries[i] = cpu_to_le64(entry);
    }
    new_page(r, THINVM_PAGE_MAP_LEAF, 0, entries, ptr);
    return REWRITE_CHANGED;
}

static int coroutine_fn rewrite_leaf(Rewrite *r, uint64_t page, uint64_t guest,
                                     uint64_t *entries)
{
    int flags = 0;

    for (unsigned i = 0; i < THINVM_ENTRIES_PER_LEAF; i++) {
        uint64_t entry = le64_to_cpu(entries[i]);

        if (!thinvm_entry_physical(entry)) {
            continue;
        }
        if (beyond_end(r, guest + i)) {
            entry = 0;
            r->c->result->corruptions_fixed++;
        } else if (is_duplicate(r, thinvm_check_user(page, false, 0, i))) {
            copy_cluster(r, guest + i, &entry);
        } else {
            continue;
        }
        entries[i] = cpu_to_le64(entry);
        flags = REWRITE_CHANGED;
    }
    return flags;
}

/* Disks of other sizes have this page, too: does all of it lie in both? */
static bool ends_alike(Rewrite *r, const Done *done, uint64_t guest, int level)
{
    return done->size_clusters == r->c->size_clusters ||
           MIN(done->size_clusters, r->c->size_clusters) >=
           guest + guest_span(level);
}

static int coroutine_fn rewrite_map(Rewrite *r, ThinvmPointer *ptr, int level,
                                    uint64_t guest, uint64_t parent,
                                    unsigned slot)
{
    ThinvmPageKind kind = level ? THINVM_PAGE_MAP_INNER : THINVM_PAGE_MAP_LEAF;
    uint64_t place = thinvm_check_place(r->c->kind, level, guest);
    uint64_t number = ptr->address;
    g_autofree uint64_t *buf = NULL;
    g_autofree char *what = NULL;
    bool shared_below = ptr->shared_below;
    Done *done;
    int flags;

    if (r->ret < 0) {
        return 0;
    }
    if (ptr->type == THINVM_PTR_RUN || ptr->type == THINVM_PTR_UNWRITTEN_RUN) {
        return rewrite_run(r, ptr, guest, parent, slot);
    }
    if (ptr->type != THINVM_PTR_PAGE) {
        return 0;
    }
    what = thinvm_check_guest_range(r->c, guest, level);
    done = find_done(r, number);
    if (done && done->place == place && ends_alike(r, done, guest, level)) {
        *ptr = done->ptr;
        ptr->shared_below = ptr->type == THINVM_PTR_PAGE && shared_below;
        return done->flags;
    }
    buf = g_malloc(THINVM_PAGE_SIZE);
    r->c->guest = guest;
    flags = done && done->place != place ? -EBADMSG :
            get_page(r, ptr, kind, level, buf, what);
    if (flags < 0) {
        *ptr = (ThinvmPointer) { };
        flags = REWRITE_CHANGED | REWRITE_LOST;
        if (r->ret == 0) {
            thinvm_check_lost(r->c, what, true);
        }
    } else if (level == 0) {
        flags |= rewrite_leaf(r, number, guest, buf);
    }
    for (unsigned i = 0; buf && ptr->type == THINVM_PTR_PAGE && level &&
         i < THINVM_POINTERS_PER_PAGE; i++) {
        ThinvmPointer child;
        int below;

        thinvm_pointer_decode(&child, (ThinvmPointerLe *)buf + i);
        below = rewrite_map(r, &child, level - 1,
                            guest + i * guest_span(level - 1), number, i);
        if (below) {
            thinvm_pointer_encode((ThinvmPointerLe *)buf + i, &child);
            flags |= below;
        }
    }
    if (flags && ptr->type == THINVM_PTR_PAGE) {
        new_page(r, kind, level, buf, ptr);
    }
    if (!done || done->place == place) {
        set_done(r, number, place, flags, ptr);
    }
    return flags;
}

static int coroutine_fn rewrite_tree(Rewrite *r, ThinvmPointer *root,
                                     const char *tree, ThinvmCheckTree kind,
                                     uint64_t size)
{
    ThinvmCheck *c = r->c;

    c->tree = tree;
    c->kind = kind;
    c->size_clusters = size == UINT64_MAX ? UINT64_MAX :
                       DIV_ROUND_UP(size, 1ULL << c->info.cluster_bits);
    return rewrite_map(r, root, THINVM_INNER_LEVELS, 0, 0, 0);
}

/* ------------------------------------------------------------------ */
/* Snapshots                                                           */

static int coroutine_fn rewrite_record(Rewrite *r, uint32_t slot,
                                       ThinvmSnapshotLe *le)
{
    g_autofree char *disk = NULL;
    g_autofree char *vmstate = NULL;
    ThinvmCheck *c = r->c;
    ThinvmSnapshot snap;
    int64_t id = le64_to_cpu(le->id_le);
    int flags, vm_flags;

    if (!id) {
        return 0;
    }
    disk = g_strdup_printf("snapshot %" PRId64 " in slot %u", id, slot);
    if (!thinvm_snapshot_decode(&snap, le, NULL) ||
        id >= thinvm_snapshot_next_id(c->s) ||
        slot >= thinvm_snapshot_nb_slots(c->s) ||
        g_hash_table_contains(r->ids, &id)) {
        thinvm_check_lost(c, disk, false);
        memset(le, 0, sizeof(*le));
        return REWRITE_CHANGED | REWRITE_LOST;
    }
    g_hash_table_add(r->ids, g_memdup2(&id, sizeof(id)));
    r->nb_snapshots++;
    g_free(disk);
    disk = g_strdup_printf("snapshot %" PRIu64 " '%s'", snap.id, snap.name);
    vmstate = g_strdup_printf("VM state of %s", disk);
    flags = rewrite_tree(r, &snap.root, disk, THINVM_CHECK_DISK,
                         snap.flags & THINVM_SNAPSHOT_TRASH ? UINT64_MAX :
                         snap.virtual_size);
    vm_flags = rewrite_tree(r, &snap.vmstate_root, vmstate,
                            THINVM_CHECK_VMSTATE, UINT64_MAX);
    if (vm_flags & REWRITE_LOST) {
        snap.vmstate_root = (ThinvmPointer) { };
        snap.vmstate_size = 0;
        thinvm_check_lost(c, vmstate, false);
    }
    flags |= vm_flags;
    if (flags) {
        thinvm_snapshot_encode(le, &snap);
    }
    return flags;
}

static int coroutine_fn rewrite_snapshots(Rewrite *r, ThinvmPointer *ptr,
                                          int level, uint32_t slot)
{
    const uint32_t span = THINVM_SNAPSHOTS_PER_LEAF << (8 * MAX(level - 1, 0));
    ThinvmPageKind kind = level ? THINVM_PAGE_SNAPSHOT_INNER :
                                  THINVM_PAGE_SNAPSHOT_LEAF;
    g_autofree uint8_t *buf = NULL;
    g_autofree char *what = NULL;
    uint64_t number = ptr->address;
    int flags;

    if (r->ret < 0 || ptr->type != THINVM_PTR_PAGE) {
        return 0;
    }
    what = g_strdup_printf("snapshots in slots %u to %u", slot, slot +
                           (level ? span * THINVM_POINTERS_PER_PAGE :
                            THINVM_SNAPSHOTS_PER_LEAF) - 1);
    buf = g_malloc(THINVM_PAGE_SIZE);
    flags = find_done(r, number) ? -EBADMSG :
            get_page(r, ptr, kind, level, buf, what);
    set_done(r, number, 0, 0, ptr);
    if (flags < 0) {
        *ptr = (ThinvmPointer) { };
        if (r->ret == 0) {
            thinvm_check_lost(r->c, what, false);
        }
        return REWRITE_CHANGED | REWRITE_LOST;
    }
    for (unsigned i = 0; level && i < THINVM_POINTERS_PER_PAGE; i++) {
        ThinvmPointer child;
        int below;

        thinvm_pointer_decode(&child, (ThinvmPointerLe *)buf + i);
        below = rewrite_snapshots(r, &child, level - 1, slot + i * span);
        if (below) {
            thinvm_pointer_encode((ThinvmPointerLe *)buf + i, &child);
            flags |= below;
        }
    }
    for (unsigned i = 0; !level && i < THINVM_SNAPSHOTS_PER_LEAF; i++) {
        flags |= rewrite_record(r, slot + i, (ThinvmSnapshotLe *)buf + i);
    }
    if (flags) {
        new_page(r, kind, level, buf, ptr);
    }
    return flags;
}

/* ------------------------------------------------------------------ */
/* Reference counts                                                    */

static int coroutine_fn rewrite_counts(Rewrite *r, ThinvmPointer *ptr,
                                       int level, uint64_t first)
{
    uint64_t span = (uint64_t)THINVM_COUNTS_PER_LEAF << (8 * level);
    ThinvmPageKind kind = level ? THINVM_PAGE_COUNT_INNER :
                                  THINVM_PAGE_COUNT_LEAF;
    g_autofree uint8_t *buf = NULL;
    g_autofree char *what = NULL;
    g_autofree char *message = NULL;
    uint64_t number = ptr->address;
    int flags;

    if (r->ret < 0 || ptr->type != THINVM_PTR_PAGE) {
        return 0;
    }
    what = g_strdup_printf("reference counts of clusters %" PRIu64 " to %"
                           PRIu64, first, first + span - 1);
    buf = g_malloc(THINVM_PAGE_SIZE);
    flags = find_done(r, number) ? -EBADMSG :
            get_page(r, ptr, kind, level, buf, what);
    set_done(r, number, 0, 0, ptr);
    if (flags < 0) {
        *ptr = (ThinvmPointer) { };
        r->c->counts_lost = true;
        message = g_strdup_printf("%s: counted anew", what);
        r->c->report(r->c->opaque, message);
        r->c->result->corruptions_fixed++;
        return REWRITE_CHANGED;
    }
    for (unsigned i = 0; level && i < THINVM_POINTERS_PER_PAGE; i++) {
        ThinvmPointer child;

        thinvm_pointer_decode(&child, (ThinvmPointerLe *)buf + i);
        if (rewrite_counts(r, &child, level - 1,
                           first + i * (span / THINVM_POINTERS_PER_PAGE))) {
            thinvm_pointer_encode((ThinvmPointerLe *)buf + i, &child);
            flags |= REWRITE_CHANGED;
        }
    }
    if (flags) {
        new_page(r, kind, level, buf, ptr);
    }
    return flags;
}

/* ------------------------------------------------------------------ */

static void set_root(Rewrite *r, ThinvmRoot root, const ThinvmPointer *ptr)
{
    thinvm_state_lock(r->c->s);
    thinvm_repair_set_root(r->c->s, root, ptr);
    thinvm_state_unlock(r->c->s);
}

static void coroutine_fn rewrite_active(Rewrite *r, ThinvmPointer *map,
                                        ThinvmPointer *vmstate)
{
    ThinvmCheck *c = r->c;
    int flags;

    if (rewrite_tree(r, map, "disk", THINVM_CHECK_DISK,
                     c->info.virtual_size)) {
        set_root(r, THINVM_ROOT_DISK, map);
    }
    flags = rewrite_tree(r, vmstate, "VM state", THINVM_CHECK_VMSTATE,
                         UINT64_MAX);
    if (flags & REWRITE_LOST) {
        *vmstate = (ThinvmPointer) { };
        thinvm_check_lost(c, "VM state", false);
        thinvm_state_lock(c->s);
        thinvm_repair_set_vmstate_size(c->s, 0);
        thinvm_state_unlock(c->s);
    }
    if (flags) {
        set_root(r, THINVM_ROOT_VMSTATE, vmstate);
    }
}

int coroutine_fn thinvm_check_rewrite(ThinvmCheck *c, GArray *spare,
                                      Error **errp)
{
    ThinvmPointer map, vmstate, count, snapshot, backing;
    Rewrite r = {
        .c = c,
        .spare = spare,
        .done = g_hash_table_new_full(g_int64_hash, g_int64_equal, g_free,
                                      g_free),
        .ids = g_hash_table_new_full(g_int64_hash, g_int64_equal, g_free,
                                     NULL),
        .errp = errp,
    };
    bool quiet = c->quiet;

    thinvm_state_lock(c->s);
    thinvm_state_roots(c->s, &map, &vmstate, &count, &snapshot, &backing);
    thinvm_state_unlock(c->s);

    c->quiet = c->rewriting = true;
    c->counts_lost = false;
    rewrite_active(&r, &map, &vmstate);
    if (rewrite_snapshots(&r, &snapshot, THINVM_SNAPSHOT_LEVELS, 0)) {
        set_root(&r, THINVM_ROOT_SNAPSHOT, &snapshot);
    }
    if (rewrite_counts(&r, &count, THINVM_INNER_LEVELS, 0)) {
        set_root(&r, THINVM_ROOT_COUNT, &count);
    }
    if (r.ret == 0 && r.nb_snapshots != c->info.nb_snapshots) {
        c->result->corruptions_fixed++;
        thinvm_state_lock(c->s);
        thinvm_repair_set_snapshots(c->s, r.nb_snapshots);
        thinvm_state_unlock(c->s);
    }
    c->quiet = quiet;
    c->rewriting = false;
    g_hash_table_unref(r.done);
    g_hash_table_unref(r.ids);
    return r.ret;
}
