/*
 * thinvm check: walking the trees
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Durability layer.  Visits each page once, however many pointers name it,
 * and counts each pointer.  Whatever is found is reported, and the walk goes
 * on with what is beside it.  Pages are judged by the engine when they are
 * read (invariant 3 of the design, section 4); here only what a page alone
 * cannot tell is looked at.
 */
#include "qemu/osdep.h"
#include "check.h"

static uint64_t guest_span(int level)
{
    return (uint64_t)THINVM_ENTRIES_PER_LEAF << (8 * level);
}

static uint64_t guest_of_place(uint64_t place)
{
    return place & ((1ULL << 44) - 1);
}

/* "disk, guest offsets 0 to 0x1ffffff": what hangs on a pointer */
char *thinvm_check_guest_range(ThinvmCheck *c, uint64_t guest, int level)
{
    unsigned bits = c->info.cluster_bits;
    uint64_t count = guest_span(level);

    return g_strdup_printf("%s, guest offsets 0x%" PRIx64 " to 0x%" PRIx64,
                           c->tree, guest << bits,
                           ((guest + count) << bits) - 1);
}

static void add_duplicate(ThinvmCheck *c, int64_t user)
{
    if (c->fixes && g_hash_table_size(c->duplicates) <
                    THINVM_CHECK_MAX_DUPLICATES) {
        g_hash_table_add(c->duplicates, g_memdup2(&user, sizeof(user)));
    } else {
        c->more_duplicates = true;
    }
}

/* Guest cluster @guest is at @physical; each leaf or run comes here once */
static void coroutine_fn count_cluster(ThinvmCheck *c, uint64_t guest,
                                       uint64_t physical, int64_t user)
{
    uint64_t offset = guest << c->info.cluster_bits;
    uint64_t place = thinvm_check_place(c->kind, 0, guest), first;
    uint16_t recorded = 0;
    unsigned references;

    if (c->first_walk && guest >= c->size_clusters) {
        c->damaged = true;
        thinvm_check_corruption(c, "%s: guest offset 0x%" PRIx64 " lies beyond "
                                "the end, but has cluster %" PRIu64, c->tree,
                                offset, physical);
    }
    if (physical < c->window_start || physical >= c->window_end) {
        return;
    }
    references = thinvm_check_count(c->clusters, physical) + 1;
    c->multiple |= references > 1;
    first = thinvm_check_own(c->owners, physical, place);
    if (first != place) {
        /* Snapshots share clusters, but each is in one place of the disk */
        add_duplicate(c, user);
        thinvm_check_corruption(c, "%s: guest offset 0x%" PRIx64 " uses "
                                "cluster %" PRIu64 ", which is at guest offset "
                                "0x%" PRIx64 "%s, too", c->tree, offset,
                                physical, guest_of_place(first) <<
                                c->info.cluster_bits,
                                first >> 48 == THINVM_CHECK_VMSTATE ?
                                " of a VM state" : "");
    }

    /* What cannot be read is reported when the counts are compared */
    if (thinvm_check_recorded(c, physical, &recorded) == 0 &&
        recorded != THINVM_COUNT_METADATA && references > recorded) {
        thinvm_check_corruption(c, "%s: guest offset 0x%" PRIx64 " uses "
                                "cluster %" PRIu64 " as its %u. user, but its "
                                "reference count is %u", c->tree, offset,
                                physical, references, recorded);
    }
}

static void count_fragment(ThinvmCheck *c, uint64_t physical, uint64_t n)
{
    if (!c->active_disk || !c->first_walk) {
        return;
    }
    c->result->allocated_clusters += n;
    if (c->previous && physical != c->previous + 1) {
        c->result->fragmented_clusters++;
    }
    c->previous = physical + n - 1;
}

static void coroutine_fn walk_leaf(ThinvmCheck *c, uint64_t guest,
                                   uint64_t page, const uint64_t *entries)
{
    for (unsigned i = 0; i < THINVM_ENTRIES_PER_LEAF; i++) {
        uint64_t physical = thinvm_entry_physical(le64_to_cpu(entries[i]));

        if (physical) {
            count_cluster(c, guest + i, physical,
                          thinvm_check_user(page, false, 0, i));
            count_fragment(c, physical, 1);
        }
    }
}

/* @parent, @slot: where the run's pointer is */
static void coroutine_fn walk_run(ThinvmCheck *c, uint64_t guest,
                                  uint64_t physical, uint64_t parent,
                                  unsigned slot)
{
    uint64_t end = physical + THINVM_ENTRIES_PER_LEAF;

    if (physical < c->info.first_cluster || end > c->info.device_clusters) {
        thinvm_check_corruption(c, "%s: guest offset 0x%" PRIx64 " has a run "
                                "at cluster %" PRIu64 ", out of bounds",
                                c->tree, guest << c->info.cluster_bits,
                                physical);
        return;
    }
    for (unsigned i = 0; i < THINVM_ENTRIES_PER_LEAF; i++) {
        count_cluster(c, guest + i, physical + i,
                      thinvm_check_user(parent, true, slot, i));
    }
    count_fragment(c, physical, THINVM_ENTRIES_PER_LEAF);
}

/* What hangs on a pointer to a page (or leaf) of @level of a mapping tree */
static void coroutine_fn walk_map(ThinvmCheck *c, const ThinvmPointer *ptr,
                                  int level, uint64_t guest, uint64_t parent,
                                  unsigned slot)
{
    g_autofree uint64_t *buf = NULL;
    g_autofree char *what = NULL;
    ThinvmPageRef ref = {
        .page = ptr->address,
        .crc = ptr->crc,
        .kind = level ? THINVM_PAGE_MAP_INNER : THINVM_PAGE_MAP_LEAF,
        .level = level,
    };

    if (ptr->type == THINVM_PTR_RUN || ptr->type == THINVM_PTR_UNWRITTEN_RUN) {
        c->unwritten_runs += c->first_walk &&
                             ptr->type == THINVM_PTR_UNWRITTEN_RUN;
        walk_run(c, guest, ptr->address, parent, slot);
        return;
    }
    if (ptr->type != THINVM_PTR_PAGE) {
        return;
    }
    what = thinvm_check_guest_range(c, guest, level);
    if (!thinvm_check_enter_page(c, ptr,
                                 thinvm_check_place(c->kind, level, guest),
                                 what)) {
        return;
    }
    c->guest = guest;
    buf = g_malloc(THINVM_PAGE_SIZE);
    if (thinvm_check_read_page(c, &ref, buf, what) < 0) {
        return;
    }
    if (level == 0) {
        walk_leaf(c, guest, ptr->address, buf);
        return;
    }
    for (unsigned i = 0; i < THINVM_POINTERS_PER_PAGE; i++) {
        ThinvmPointer child;

        thinvm_pointer_decode(&child, (ThinvmPointerLe *)buf + i);
        walk_map(c, &child, level - 1, guest + i * guest_span(level - 1),
                 ptr->address, i);
    }
}

static void coroutine_fn walk_tree(ThinvmCheck *c, const ThinvmPointer *root,
                                  const char *tree, ThinvmCheckTree kind,
                                  uint64_t size)
{
    c->tree = tree;
    c->kind = kind;
    c->size_clusters = size == UINT64_MAX ? UINT64_MAX :
                       DIV_ROUND_UP(size, 1ULL << c->info.cluster_bits);
    walk_map(c, root, THINVM_INNER_LEVELS, 0, 0, 0);
}

/* ------------------------------------------------------------------ */
/* What an active tree takes to be its own                             */

static void coroutine_fn private_cluster(ThinvmCheck *c, uint64_t guest,
                                         uint64_t physical)
{
    uint16_t *chunk;
    uint16_t references;

    if (physical < c->window_start || physical >= c->window_end) {
        return;
    }
    /* None: its leaf could not be read when references were counted */
    chunk = thinvm_check_chunk(c->clusters, physical);
    references = chunk ? chunk[physical % THINVM_CHECK_CHUNK] : 0;
    if (references > 1) {
        c->nb_unflagged++;
        thinvm_check_corruption(c, "%s: guest offset 0x%" PRIx64 " takes "
                                "cluster %" PRIu64 " to be its own, but it has "
                                "%u users", c->tree,
                                guest << c->info.cluster_bits, physical,
                                references);
    }
}

/*
 * A write goes to the cluster that is there if nothing on the way says that
 * it may be shared.  Every damage was told in the first walk.
 */
static void coroutine_fn walk_private(ThinvmCheck *c, const ThinvmPointer *ptr,
                                      int level, uint64_t guest)
{
    g_autofree uint64_t *buf = NULL;
    bool quiet = c->quiet;
    uint16_t recorded;
    int ret;
    ThinvmPageRef ref = {
        .page = ptr->address,
        .crc = ptr->crc,
        .kind = level ? THINVM_PAGE_MAP_INNER : THINVM_PAGE_MAP_LEAF,
        .level = level,
    };

    if (ptr->shared_below) {
        return;
    }
    if (ptr->type == THINVM_PTR_RUN || ptr->type == THINVM_PTR_UNWRITTEN_RUN) {
        for (unsigned i = 0; i < THINVM_ENTRIES_PER_LEAF; i++) {
            private_cluster(c, guest + i, ptr->address + i);
        }
        return;
    }
    if (ptr->type != THINVM_PTR_PAGE) {
        return;
    }
    thinvm_state_lock(c->s);
    ret = thinvm_state_page_count(c->s, ptr->address, &recorded);
    thinvm_state_unlock(c->s);
    if (ret < 0 || recorded > 1 ||
        thinvm_check_own(c->places, ptr->address, 0) !=
        thinvm_check_place(c->kind, level, guest)) {
        return;
    }
    buf = g_malloc(THINVM_PAGE_SIZE);
    c->quiet = true;
    ret = thinvm_check_read_page(c, &ref, buf, c->tree);
    c->quiet = quiet;
    if (ret < 0) {
        return;
    }
    for (unsigned i = 0; level && i < THINVM_POINTERS_PER_PAGE; i++) {
        ThinvmPointer child;

        thinvm_pointer_decode(&child, (ThinvmPointerLe *)buf + i);
        walk_private(c, &child, level - 1, guest + i * guest_span(level - 1));
    }
    for (unsigned i = 0; !level && i < THINVM_ENTRIES_PER_LEAF; i++) {
        uint64_t entry = le64_to_cpu(buf[i]);

        if (thinvm_entry_physical(entry) && !(entry & THINVM_ENTRY_SHARED)) {
            private_cluster(c, guest + i, thinvm_entry_physical(entry));
        }
    }
}

/* ------------------------------------------------------------------ */
/* Snapshots                                                           */

static void coroutine_fn walk_snapshot(ThinvmCheck *c, uint32_t slot,
                                      const ThinvmSnapshotLe *le)
{
    g_autofree char *disk = NULL;
    g_autofree char *vmstate = NULL;
    ThinvmSnapshot snap;
    Error *err = NULL;

    if (!le->id_le) {
        return;
    }
    if (c->first_walk) {
        int64_t id = le64_to_cpu(le->id_le);

        c->nb_snapshots++;
        if (id >= thinvm_snapshot_next_id(c->s) ||
            slot >= thinvm_snapshot_nb_slots(c->s) ||
            !g_hash_table_add(c->ids, g_memdup2(&id, sizeof(id)))) {
            c->damaged = true;
            thinvm_check_corruption(c, "snapshot in slot %u: its id %" PRId64
                                    " is used twice, or id or slot are behind "
                                    "the last ones", slot, id);
        }
    }
    if (!thinvm_snapshot_decode(&snap, le, &err)) {
        thinvm_check_corruption(c, "snapshot in slot %u: %s", slot,
                                error_get_pretty(err));
        error_free(err);
        return;
    }
    disk = g_strdup_printf("snapshot %" PRIu64 " '%s'", snap.id, snap.name);
    vmstate = g_strdup_printf("VM state of %s", disk);
    walk_tree(c, &snap.root, disk, THINVM_CHECK_DISK,
              snap.flags & THINVM_SNAPSHOT_TRASH ? UINT64_MAX :
              snap.virtual_size);
    walk_tree(c, &snap.vmstate_root, vmstate, THINVM_CHECK_VMSTATE,
              UINT64_MAX);
}

static void coroutine_fn walk_snapshots(ThinvmCheck *c,
                                       const ThinvmPointer *ptr, int level,
                                       uint32_t slot)
{
    g_autofree uint8_t *buf = NULL;
    const uint32_t span = THINVM_SNAPSHOTS_PER_LEAF << (8 * MAX(level - 1, 0));
    ThinvmPageRef ref = {
        .page = ptr->address,
        .crc = ptr->crc,
        .kind = level ? THINVM_PAGE_SNAPSHOT_INNER : THINVM_PAGE_SNAPSHOT_LEAF,
        .level = level,
    };

    if (ptr->type != THINVM_PTR_PAGE) {
        return;
    }
    if (!thinvm_check_enter_page(c, ptr,
                                 thinvm_check_place(THINVM_CHECK_SNAPSHOTS,
                                                    level, slot),
                                 "list of snapshots")) {
        return;
    }
    buf = g_malloc(THINVM_PAGE_SIZE);
    if (thinvm_check_read_page(c, &ref, buf, "list of snapshots") < 0) {
        return;
    }
    if (level == 0) {
        for (unsigned i = 0; i < THINVM_SNAPSHOTS_PER_LEAF; i++) {
            walk_snapshot(c, slot + i, (ThinvmSnapshotLe *)buf + i);
        }
        return;
    }
    for (unsigned i = 0; i < THINVM_POINTERS_PER_PAGE; i++) {
        ThinvmPointer child;

        thinvm_pointer_decode(&child, (ThinvmPointerLe *)buf + i);
        walk_snapshots(c, &child, level - 1, slot + i * span);
    }
}

/* ------------------------------------------------------------------ */
/* The space map of metadata pages, and the backing file's name        */

static void coroutine_fn walk_space(ThinvmCheck *c, const ThinvmPointer *ptr,
                                    int level, unsigned index)
{
    g_autofree uint8_t *buf = NULL;
    ThinvmPageRef ref = {
        .page = ptr->address,
        .crc = ptr->crc,
        .kind = level ? THINVM_PAGE_SPACE_INNER : THINVM_PAGE_SPACE_BLOCK,
        .level = level,
    };

    if (ptr->type != THINVM_PTR_PAGE) {
        return;
    }
    if (!thinvm_check_enter_page(c, ptr,
                                 thinvm_check_place(THINVM_CHECK_SPACE, level,
                                                    index),
                                 "space map of metadata")) {
        return;
    }
    buf = g_malloc(THINVM_PAGE_SIZE);
    if (thinvm_check_read_page(c, &ref, buf, "space map of metadata") < 0) {
        return;
    }
    for (unsigned i = 0; level && i < THINVM_POINTERS_PER_PAGE; i++) {
        ThinvmPointer child;

        thinvm_pointer_decode(&child, (ThinvmPointerLe *)buf + i);
        walk_space(c, &child, level - 1,
                   index * THINVM_POINTERS_PER_PAGE + i);
    }
}

static void coroutine_fn walk_backing(ThinvmCheck *c, const ThinvmPointer *ptr)
{
    g_autofree uint8_t *buf = NULL;
    ThinvmPageRef ref = {
        .page = ptr->address,
        .crc = ptr->crc,
        .kind = THINVM_PAGE_BACKING,
    };

    if (ptr->type == THINVM_PTR_PAGE &&
        thinvm_check_enter_page(c, ptr,
                                thinvm_check_place(THINVM_CHECK_BACKING, 0, 0),
                                "backing file's name")) {
        buf = g_malloc(THINVM_PAGE_SIZE);
        thinvm_check_read_page(c, &ref, buf, "backing file's name");
    }
}

void coroutine_fn thinvm_check_walk(ThinvmCheck *c)
{
    ThinvmPointer map, vmstate, count, snapshot, backing;

    thinvm_state_lock(c->s);
    thinvm_state_roots(c->s, &map, &vmstate, &count, &snapshot, &backing);
    thinvm_state_unlock(c->s);

    c->multiple = false;
    c->nb_snapshots = c->first_walk ? 0 : c->nb_snapshots;
    c->ids = g_hash_table_new_full(g_int64_hash, g_int64_equal, g_free, NULL);
    c->active_disk = true;
    c->previous = 0;
    walk_tree(c, &map, "disk", THINVM_CHECK_DISK, c->info.virtual_size);
    c->active_disk = false;
    walk_tree(c, &vmstate, "VM state", THINVM_CHECK_VMSTATE, UINT64_MAX);
    walk_snapshots(c, &snapshot, THINVM_SNAPSHOT_LEVELS, 0);
    g_hash_table_unref(c->ids);
    if (c->first_walk && !c->incomplete &&
        c->nb_snapshots != c->info.nb_snapshots) {
        c->damaged = true;
        thinvm_check_corruption(c, "the superblock tells of %u snapshots, but "
                                "there are %u", c->info.nb_snapshots,
                                c->nb_snapshots);
    }
    walk_space(c, &c->st->bases.newest.space_root, THINVM_SPACE_LEVELS, 0);
    walk_backing(c, &backing);
    if (c->multiple) {
        c->tree = "disk";
        c->kind = THINVM_CHECK_DISK;
        walk_private(c, &map, THINVM_INNER_LEVELS, 0);
        c->tree = "VM state";
        c->kind = THINVM_CHECK_VMSTATE;
        walk_private(c, &vmstate, THINVM_INNER_LEVELS, 0);
    }
}
