/*
 * thinvm metadata engine against a simple model
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Random operations run on the engine and on a model (an array of entries
 * for some areas of the guest's disk).  The device is a hash of pages that
 * checkpoints wrote; pages are loaded from it through the needs loop with the
 * smallest cache there is.  Now and then the state is thrown away and opened
 * again from the newest base, or from the one before, and the operations
 * since are replayed (design invariant 4).  After each such step every entry
 * of the model is looked up, and all counts are recounted from the trees.
 */
#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "block/thinvm/state.h"

#define CLUSTER_BITS    16
#define NB_AREAS        4
#define AREA            4096        /* clusters; multiple of 512 */
#define DEVICE          20000       /* clusters, at first */

static const uint64_t area_start[NB_AREAS] = {
    0,
    (1ULL << 17) - 1536,            /* across two pages of level 1 */
    (1ULL << 25) - 1536,            /* across two pages of level 2 */
    THINVM_MAX_GUEST_CLUSTERS - AREA,
};

typedef struct ModelTree {
    uint64_t entry[NB_AREAS][AREA];
} ModelTree;

typedef struct ModelSnapshot {
    uint64_t id;
    uint32_t slot;
    ModelTree tree;
} ModelSnapshot;

typedef struct Loose {
    ThinvmOp op;
    ThinvmSnapshot snapshot;
    ThinvmBacking backing;
} Loose;

typedef struct Fixture {
    ThinvmState *s;
    GHashTable *device;             /* page number -> 4 KiB */
    ThinvmSuperblock base[2];       /* newest, the one before */
    unsigned log_start[2];          /* their places in the log */
    bool has_older;
    GPtrArray *log;                 /* Loose, since ever */
    ModelTree *model;
    GPtrArray *snapshots;           /* ModelSnapshot */
    GRand *rand;
} Fixture;

/* ------------------------------------------------------------------ */
/* The device and the needs loop                                       */

static void load_wanted(Fixture *f, ThinvmNeeds *needs)
{
    g_assert_cmpuint(needs->nb_want, >, 0);
    for (unsigned i = 0; i < needs->nb_want; i++) {
        int64_t key = needs->want[i].page;
        void *buf = g_hash_table_lookup(f->device, &key);

        g_assert_nonnull(buf);
        thinvm_state_insert_page(f->s, &needs->want[i], buf, needs,
                                 &error_abort);
    }
}

static int execute_raw(Fixture *f, ThinvmOp *op, bool replay)
{
    ThinvmNeeds needs;
    int ret;

    thinvm_needs_init(&needs);
    thinvm_state_lock(f->s);
    while ((!replay && thinvm_snapshot_choose_slot(f->s, op, &needs) < 0) ||
           (ret = thinvm_state_prepare(f->s, op, replay, &needs, NULL)) ==
           -EAGAIN) {
        load_wanted(f, &needs);
    }
    if (ret == 0) {
        thinvm_state_apply(f->s, op);
    }
    thinvm_needs_destroy(f->s, &needs);
    thinvm_state_unlock(f->s);
    return ret;
}

static int reserve(Fixture *f, uint64_t goal, uint64_t max, uint64_t *first,
                   uint64_t *nb)
{
    ThinvmNeeds needs;
    int ret;

    thinvm_needs_init(&needs);
    thinvm_state_lock(f->s);
    while ((ret = thinvm_space_reserve(f->s, goal, max, first, nb, &needs)) ==
           -EAGAIN) {
        load_wanted(f, &needs);
    }
    thinvm_needs_destroy(f->s, &needs);
    thinvm_state_unlock(f->s);
    return ret;
}

/* What the durability layer does with freed clusters, at once */
static void reclaim(Fixture *f)
{
    GArray *freed;

    thinvm_state_lock(f->s);
    freed = thinvm_space_take_freed(f->s);
    for (unsigned i = 0; freed && i < freed->len; i++) {
        ThinvmFreedRange *r = &g_array_index(freed, ThinvmFreedRange, i);

        thinvm_space_unbusy(f->s, r->first, r->nb_clusters);
    }
    g_clear_pointer(&freed, g_array_unref);
    thinvm_state_unlock(f->s);
}

static void extend_metadata(Fixture *f)
{
    bool urgent;
    uint64_t wanted, first, nb;

    while ((wanted = thinvm_space_metadata_wanted(f->s, &urgent)) > 0) {
        ThinvmOp op = { .type = THINVM_OP_META_EXTEND };

        if (reserve(f, 0, wanted, &first, &nb) < 0) {
            break;      /* a full device; operations are refused by turn */
        }
        op.physical = first;
        op.count = nb;
        g_assert_cmpint(execute_raw(f, &op, false), ==, 0);
        g_ptr_array_add(f->log, g_memdup2(&(Loose){ .op = op },
                                          sizeof(Loose)));
    }
}

static int execute(Fixture *f, ThinvmOp *op)
{
    Loose *loose;
    int ret;

    extend_metadata(f);
    ret = execute_raw(f, op, false);
    reclaim(f);
    if (ret == 0) {
        loose = g_memdup2(&(Loose) { .op = *op }, sizeof(Loose));
        if (op->snapshot) {
            loose->snapshot = *op->snapshot;
            loose->op.snapshot = &loose->snapshot;
        }
        if (op->backing) {
            loose->backing = *op->backing;
            loose->op.backing = &loose->backing;
        }
        g_ptr_array_add(f->log, loose);
    }
    return ret;
}

static void checkpoint(Fixture *f)
{
    ThinvmFrozen *frozen;

    thinvm_state_lock(f->s);
    frozen = thinvm_state_freeze(f->s);
    thinvm_state_unlock(f->s);
    f->log_start[1] = f->log_start[0];
    f->log_start[0] = f->log->len;
    f->base[1] = f->base[0];
    f->has_older = f->base[1].generation > 0;
    for (unsigned i = 0; i < frozen->nb_pages; i++) {
        int64_t *key = g_new(int64_t, 1);
        uint64_t number;
        const void *buf = thinvm_frozen_complete_page(f->s, frozen, i,
                                                      &number);

        *key = number;
        g_hash_table_replace(f->device, key,
                             g_memdup2(buf, THINVM_PAGE_SIZE));
    }
    thinvm_frozen_complete(f->s, frozen);
    f->base[0] = frozen->superblock;
    thinvm_state_lock(f->s);
    thinvm_state_thaw(f->s, frozen);
    thinvm_state_unlock(f->s);
}

/* Open again from base @which and replay what came after */
static void reopen(Fixture *f, int which)
{
    ThinvmNeeds needs;
    int ret;

    thinvm_state_free(f->s);
    f->s = thinvm_state_new(&f->base[which],
                            which == 0 && f->has_older ? &f->base[1] : NULL,
                            0);
    thinvm_needs_init(&needs);
    thinvm_state_lock(f->s);
    while ((ret = thinvm_state_load(f->s, &needs, &error_abort)) == -EAGAIN) {
        load_wanted(f, &needs);
    }
    g_assert_cmpint(ret, ==, 0);
    thinvm_needs_destroy(f->s, &needs);
    thinvm_state_unlock(f->s);
    for (unsigned i = f->log_start[which]; i < f->log->len; i++) {
        Loose *loose = g_ptr_array_index(f->log, i);

        g_assert_cmpint(execute_raw(f, &loose->op, true), ==, 0);
        reclaim(f);
    }
    if (which == 1) {
        /* The newer one was damaged: the older becomes the newest */
        f->base[0] = f->base[1];
        f->log_start[0] = f->log_start[1];
        f->base[1].generation = 0;
        f->has_older = false;
    }
}

/* ------------------------------------------------------------------ */
/* Comparing with the model                                            */

static void lookup(Fixture *f, const ThinvmPointer *root, uint64_t guest,
                   uint64_t count, bool for_write, ThinvmMapping *m)
{
    ThinvmNeeds needs;
    int ret;

    thinvm_needs_init(&needs);
    while ((ret = thinvm_state_lookup(f->s, THINVM_TREE_DISK, root, guest,
                                      count, for_write, m, &needs)) ==
           -EAGAIN) {
        thinvm_state_lock(f->s);
        load_wanted(f, &needs);
        thinvm_state_unlock(f->s);
    }
    g_assert_cmpint(ret, ==, 0);
    thinvm_state_lock(f->s);
    thinvm_needs_destroy(f->s, &needs);
    thinvm_state_unlock(f->s);
}

/* The source of a fully valid entry is a mark, or says nothing */
static uint64_t comparable(uint64_t entry)
{
    return thinvm_entry_valid(entry) != THINVM_ALL_VALID ||
           thinvm_entry_source(entry) == THINVM_SOURCE_TEMPLATE ? entry :
           thinvm_entry(thinvm_entry_physical(entry), THINVM_ALL_VALID, 0);
}

static uint64_t mapping_entry(const ThinvmMapping *m, uint64_t i)
{
    return m->type == THINVM_MAPPING_NONE ? 0 :
           m->type == THINVM_MAPPING_ZERO ?
           thinvm_entry(0, 0, THINVM_SOURCE_ZERO) :
           comparable(thinvm_entry(m->physical + i, m->valid, m->source));
}

static void compare_tree(Fixture *f, const ThinvmPointer *root,
                         const ModelTree *tree)
{
    for (int a = 0; a < NB_AREAS; a++) {
        uint64_t i = 0;

        while (i < AREA) {
            ThinvmMapping m;

            lookup(f, root, area_start[a] + i, AREA - i, false, &m);
            g_assert_cmpuint(m.count, >, 0);
            g_assert_cmpuint(m.count, <=, AREA - i);
            /* What is marked is not written in place */
            g_assert(m.shared || m.source != THINVM_SOURCE_TEMPLATE);
            for (uint64_t j = 0; j < m.count; j++) {
                g_assert_cmphex(mapping_entry(&m, j), ==,
                                comparable(tree->entry[a][i + j]));
            }
            i += m.count;
        }
    }
}

/* Recounted references: cluster or page number -> count */
typedef struct Recount {
    GHashTable *clusters, *pages;
    uint64_t nb_unwritten;
} Recount;

static unsigned recount_add(GHashTable *table, uint64_t number)
{
    int64_t key = number;
    unsigned *count = g_hash_table_lookup(table, &key);

    if (!count) {
        count = g_new0(unsigned, 1);
        g_hash_table_insert(table, g_memdup2(&key, sizeof(key)), count);
    }
    return ++*count;
}

static void read_page(Fixture *f, const ThinvmPageRef *ref, void *buf)
{
    ThinvmNeeds needs;
    int ret;

    thinvm_needs_init(&needs);
    thinvm_state_lock(f->s);
    while ((ret = thinvm_state_read_page(f->s, ref, buf, &needs)) ==
           -EAGAIN) {
        load_wanted(f, &needs);
    }
    g_assert_cmpint(ret, ==, 0);
    thinvm_needs_destroy(f->s, &needs);
    thinvm_state_unlock(f->s);
}

static void recount_map(Fixture *f, Recount *r, const ThinvmPointer *ptr,
                        int level)
{
    ThinvmPageRef ref = {
        .page = ptr->address, .crc = ptr->crc, .level = level,
        .kind = level ? THINVM_PAGE_MAP_INNER : THINVM_PAGE_MAP_LEAF,
    };
    uint64_t buf[THINVM_PAGE_SIZE / 8];

    if (ptr->type == THINVM_PTR_RUN || ptr->type == THINVM_PTR_UNWRITTEN_RUN) {
        r->nb_unwritten += ptr->type == THINVM_PTR_UNWRITTEN_RUN;
        for (int i = 0; i < 512; i++) {
            recount_add(r->clusters, ptr->address + i);
        }
        return;
    }
    if (ptr->type != THINVM_PTR_PAGE ||
        recount_add(r->pages, ptr->address) > 1) {
        return;
    }
    read_page(f, &ref, buf);
    for (int i = 0; i < (level ? 256 : 512); i++) {
        if (level) {
            ThinvmPointer child;

            thinvm_pointer_decode(&child, (ThinvmPointerLe *)buf + i);
            recount_map(f, r, &child, level - 1);
        } else if (thinvm_entry_physical(le64_to_cpu(buf[i]))) {
            recount_add(r->clusters,
                        thinvm_entry_physical(le64_to_cpu(buf[i])));
        }
    }
}

static void recount_tables(Fixture *f, Recount *r, const ThinvmPointer *ptr,
                           ThinvmPageKind inner, ThinvmPageKind leaf,
                           int level)
{
    ThinvmPageRef ref = {
        .page = ptr->address, .crc = ptr->crc, .level = level,
        .kind = level ? inner : leaf,
    };
    uint64_t buf[THINVM_PAGE_SIZE / 8];

    if (ptr->type != THINVM_PTR_PAGE) {
        return;
    }
    g_assert_cmpuint(recount_add(r->pages, ptr->address), ==, 1);
    read_page(f, &ref, buf);
    for (int i = 0; level && i < 256; i++) {
        ThinvmPointer child;

        thinvm_pointer_decode(&child, (ThinvmPointerLe *)buf + i);
        recount_tables(f, r, &child, inner, leaf, level - 1);
    }
}

static int read_snapshot(Fixture *f, uint32_t slot, ThinvmSnapshot *snap)
{
    ThinvmNeeds needs;
    int ret;

    thinvm_needs_init(&needs);
    thinvm_state_lock(f->s);
    while ((ret = thinvm_snapshot_read(f->s, slot, snap, &needs,
                                       &error_abort)) == -EAGAIN) {
        load_wanted(f, &needs);
    }
    thinvm_needs_destroy(f->s, &needs);
    thinvm_state_unlock(f->s);
    return ret;
}

static uint16_t cluster_count(Fixture *f, uint64_t cluster)
{
    ThinvmNeeds needs;
    uint16_t count;

    thinvm_needs_init(&needs);
    thinvm_state_lock(f->s);
    while (thinvm_state_cluster_count(f->s, cluster, &count, &needs) ==
           -EAGAIN) {
        load_wanted(f, &needs);
    }
    thinvm_needs_destroy(f->s, &needs);
    thinvm_state_unlock(f->s);
    return count;
}

static void compare_counts(Fixture *f, Recount *r, ThinvmInfoState *info)
{
    uint64_t nb_free = 0, nb_meta = 0;
    uint64_t pages_per_cluster = 1 << (CLUSTER_BITS - THINVM_PAGE_BITS);

    for (uint64_t c = 0; c < info->device_clusters; c++) {
        int64_t key = c;
        unsigned *want = g_hash_table_lookup(r->clusters, &key);
        uint16_t count = cluster_count(f, c);

        if (count == THINVM_COUNT_METADATA) {
            g_assert_null(want);
            nb_meta++;
        } else {
            g_assert_cmpuint(count, ==, want ? *want : 0);
            nb_free += count == 0;
        }
    }
    g_assert_cmpuint(nb_free, ==, info->free_clusters);
    g_assert_cmpuint(nb_meta, ==, info->first_cluster +
                     info->metadata_pages / pages_per_cluster);
}

static void compare_pages(Fixture *f, Recount *r, ThinvmInfoState *info)
{
    uint64_t space_pages = 0;

    for (uint64_t p = 0;
         p < info->device_clusters << (CLUSTER_BITS - THINVM_PAGE_BITS); p++) {
        int64_t key = p;
        unsigned *want = g_hash_table_lookup(r->pages, &key);
        uint16_t count;

        if (thinvm_state_page_count(f->s, p, &count) < 0) {
            g_assert_null(want);
        } else if (want) {
            g_assert_cmpuint(count, ==, *want);
        } else {
            /* The space map's own pages: at most a block an extent, and two */
            g_assert_cmpuint(count, <=, 1);
            space_pages += count;
        }
    }
    g_assert_cmpuint(space_pages, <=, 2 + 64);
}

static void compare(Fixture *f)
{
    ThinvmPointer map, vmstate, count, snapshot, backing;
    Recount r = {
        .clusters = g_hash_table_new_full(g_int64_hash, g_int64_equal,
                                          g_free, g_free),
        .pages = g_hash_table_new_full(g_int64_hash, g_int64_equal, g_free,
                                       g_free),
    };
    ThinvmInfoState info;
    ThinvmSnapshot snap;

    compare_tree(f, NULL, f->model);
    for (unsigned i = 0; i < f->snapshots->len; i++) {
        ModelSnapshot *m = g_ptr_array_index(f->snapshots, i);

        g_assert_cmpint(read_snapshot(f, m->slot, &snap), ==, 0);
        g_assert_cmpuint(snap.id, ==, m->id);
        compare_tree(f, &snap.root, &m->tree);
    }
    thinvm_state_roots(f->s, &map, &vmstate, &count, &snapshot, &backing);
    recount_map(f, &r, &map, THINVM_INNER_LEVELS);
    recount_map(f, &r, &vmstate, THINVM_INNER_LEVELS);
    recount_tables(f, &r, &count, THINVM_PAGE_COUNT_INNER,
                   THINVM_PAGE_COUNT_LEAF, THINVM_INNER_LEVELS);
    recount_tables(f, &r, &snapshot, THINVM_PAGE_SNAPSHOT_INNER,
                   THINVM_PAGE_SNAPSHOT_LEAF, THINVM_SNAPSHOT_LEVELS);
    recount_tables(f, &r, &backing, THINVM_PAGE_BACKING, THINVM_PAGE_BACKING,
                   0);
    for (uint32_t i = 0; i < thinvm_snapshot_nb_slots(f->s); i++) {
        if (read_snapshot(f, i, &snap) == 0) {
            recount_map(f, &r, &snap.root, THINVM_INNER_LEVELS);
            recount_map(f, &r, &snap.vmstate_root, THINVM_INNER_LEVELS);
        }
    }
    thinvm_state_info(f->s, &info);
    g_assert_true(info.promises_exact);
    g_assert_cmpuint(info.promised_pages, ==, r.nb_unwritten);
    compare_counts(f, &r, &info);
    compare_pages(f, &r, &info);
    g_hash_table_unref(r.clusters);
    g_hash_table_unref(r.pages);
}

/* ------------------------------------------------------------------ */
/* Random operations                                                   */

static uint64_t below(Fixture *f, uint64_t n)
{
    return g_rand_int(f->rand) % n;
}

static void random_map(Fixture *f)
{
    int a = below(f, NB_AREAS);
    uint64_t i = below(f, AREA), first, nb, goal = 0;
    uint64_t max = below(f, 4) ? 1 + below(f, 8) : 512;
    uint16_t valid = below(f, 2) ? THINVM_ALL_VALID : 1 + below(f, 0xffff);
    ThinvmSource source = below(f, 2);
    ThinvmOp op;

    if (f->base[0].incompatible && valid == THINVM_ALL_VALID && below(f, 2)) {
        source = THINVM_SOURCE_TEMPLATE;
        i = max == 512 ? i & ~511 : i;      /* now and then a whole leaf */
    }
    max = MIN(max, 512 - ((area_start[a] + i) & 511));
    if (i) {
        goal = thinvm_entry_physical(f->model->entry[a][i - 1]) + 1;
    }
    if (reserve(f, goal > 1 ? goal : 0, max, &first, &nb) < 0) {
        return;
    }
    op = (ThinvmOp) {
        .type = THINVM_OP_MAP, .guest = area_start[a] + i, .count = nb,
        .physical = first, .valid = valid, .source = source,
    };
    if (execute(f, &op) < 0) {
        thinvm_state_lock(f->s);
        thinvm_space_unbusy(f->s, first, nb);
        thinvm_state_unlock(f->s);
        return;
    }
    for (uint64_t j = 0; j < nb; j++) {
        f->model->entry[a][i + j] = thinvm_entry(first + j, valid, source);
    }
}

static void random_valid_bits(Fixture *f)
{
    int a = below(f, NB_AREAS);
    uint64_t i = below(f, AREA);
    uint64_t *entry = &f->model->entry[a][i];
    uint16_t bits = 1 + below(f, 0xffff), valid = thinvm_entry_valid(*entry);
    ThinvmSource source = thinvm_entry_source(*entry);
    ThinvmOp op = {
        .type = below(f, 2) ? THINVM_OP_VALIDATE : THINVM_OP_INVALIDATE,
        .guest = area_start[a] + i, .valid = bits,
        .physical = thinvm_entry_physical(*entry),
    };
    bool validate = op.type == THINVM_OP_VALIDATE;
    int ret;

    if (!op.physical) {
        return;
    }
    if (below(f, 8) == 0) {
        /* Of another cluster: nothing may happen */
        op.physical++;
        g_assert_cmpint(execute(f, &op), ==, -EALREADY);
        return;
    }
    ret = execute(f, &op);
    /* either takes a mark away */
    g_assert(ret != -EALREADY || source != THINVM_SOURCE_TEMPLATE);
    if (ret == 0 && validate) {
        *entry = thinvm_entry(op.physical, valid | bits, source & 1);
    } else if (ret == 0 && (source == THINVM_SOURCE_ZERO ||
                            valid == THINVM_ALL_VALID)) {
        *entry = thinvm_entry(op.physical, valid & ~bits, THINVM_SOURCE_ZERO);
    }
}

/* Returns how many operations it took */
static unsigned unmap(Fixture *f, uint64_t guest, uint64_t nb,
                      ThinvmSource source)
{
    uint64_t end = guest + nb;
    unsigned operations = 0;

    while (guest < end) {
        uint64_t count = end - guest;
        ThinvmNeeds needs;
        bool nothing;

        thinvm_needs_init(&needs);
        thinvm_state_lock(f->s);
        while (thinvm_state_unmap_step(f->s, THINVM_TREE_DISK, guest, source,
                                       &count, &nothing, &needs) == -EAGAIN) {
            load_wanted(f, &needs);
            count = end - guest;
        }
        thinvm_needs_destroy(f->s, &needs);
        thinvm_state_unlock(f->s);
        g_assert_cmpuint(count, >, 0);
        if (!nothing) {
            ThinvmOp op = {
                .type = THINVM_OP_UNMAP, .guest = guest, .count = count,
                .source = source,
            };

            g_assert_cmpint(execute(f, &op), ==, 0);
            operations++;
        }
        guest += count;
    }
    return operations;
}

static void random_unmap(Fixture *f)
{
    int a = below(f, NB_AREAS);
    uint64_t i = below(f, AREA);
    uint64_t nb = 1 + below(f, below(f, 3) ? AREA - i : MIN(AREA - i, 600));
    ThinvmSource source = below(f, 2);

    unmap(f, area_start[a] + i, nb, source);
    for (uint64_t j = i; j < i + nb; j++) {
        f->model->entry[a][j] = thinvm_entry(0, 0, source);
    }
}

/* false: no run could be had */
static bool map_run(Fixture *f, int a, uint64_t i, bool written,
                    uint64_t *goal)
{
    uint64_t first, nb;
    ThinvmOp op;

    if (reserve(f, *goal, 512, &first, &nb) < 0) {
        return false;
    }
    op = (ThinvmOp) {
        .type = THINVM_OP_MAP_RUN, .guest = area_start[a] + i,
        .physical = first, .valid = written ? THINVM_ALL_VALID : 0,
    };
    if (nb < 512 || execute(f, &op) < 0) {
        thinvm_state_lock(f->s);
        thinvm_space_unbusy(f->s, first, nb);
        thinvm_state_unlock(f->s);
        return false;
    }
    for (int j = 0; j < 512; j++) {
        f->model->entry[a][i + j] = thinvm_entry(first + j, op.valid,
                                                 THINVM_SOURCE_ZERO);
    }
    *goal = first + nb;
    return true;
}

/* Several in a row, mostly next to each other on the device too */
static void random_run(Fixture *f)
{
    int a = below(f, NB_AREAS);
    unsigned first = below(f, AREA / 512);
    unsigned end = first + 1 + below(f, AREA / 512 - first);
    bool written = below(f, 2);
    uint64_t goal = 0;

    for (unsigned i = first; i < end; i++) {
        if (!map_run(f, a, i * 512, written, &goal)) {
            return;
        }
        goal = below(f, 6) ? goal : 0;
    }
}

static uint32_t find_slot(Fixture *f, uint64_t id)
{
    ThinvmSnapshot snap;

    for (uint32_t slot = 0; ; slot++) {
        g_assert_cmpuint(slot, <, thinvm_snapshot_nb_slots(f->s));
        if (read_snapshot(f, slot, &snap) == 0 && snap.id == id) {
            return slot;
        }
    }
}

static void random_snapshot_create(Fixture *f)
{
    ThinvmSnapshot snap = { .icount = UINT64_MAX, .name = "s" };
    ThinvmOp op = { .type = THINVM_OP_SNAPSHOT_CREATE, .snapshot = &snap };
    ModelSnapshot *m;

    if (f->snapshots->len >= 6) {
        return;
    }
    snap.id = thinvm_snapshot_next_id(f->s);
    g_assert_cmpint(execute(f, &op), ==, 0);
    m = g_new(ModelSnapshot, 1);
    m->id = snap.id;
    m->slot = find_slot(f, snap.id);
    m->tree = *f->model;
    g_ptr_array_add(f->snapshots, m);
}

static void delete_steps(Fixture *f, uint32_t slot, uint64_t id, int max)
{
    ThinvmOp op = {
        .type = THINVM_OP_SNAPSHOT_DELETE_STEP, .guest = slot, .value = id,
    };

    while (max-- && execute(f, &op) == 0) {
        /* until it is gone, or hidden with nothing left */
    }
}

static void random_snapshot_goto(Fixture *f)
{
    ThinvmOp op = { .type = THINVM_OP_SNAPSHOT_GOTO };
    ModelSnapshot *m;

    if (!f->snapshots->len) {
        return;
    }
    m = g_ptr_array_index(f->snapshots, below(f, f->snapshots->len));
    op.guest = m->slot;
    op.value = m->id;
    op.physical = thinvm_snapshot_next_id(f->s);
    g_assert_cmpint(execute(f, &op), ==, 0);
    *f->model = m->tree;
    delete_steps(f, find_slot(f, op.physical), op.physical,
                 below(f, 2) ? -1 : 2);
}

static void random_snapshot_delete(Fixture *f)
{
    unsigned i;
    ModelSnapshot *m;

    if (!f->snapshots->len) {
        return;
    }
    i = below(f, f->snapshots->len);
    m = g_ptr_array_index(f->snapshots, i);
    delete_steps(f, m->slot, m->id, below(f, 4) ? -1 : 3);
    g_ptr_array_remove_index(f->snapshots, i);
}

static void random_scalar(Fixture *f)
{
    ThinvmInfoState info;
    ThinvmBacking backing = { .format = "raw" };
    ThinvmOp op = { 0 };

    thinvm_state_info(f->s, &info);
    switch (below(f, 3)) {
    case 0:
        op.type = THINVM_OP_EPOCH;
        op.value = info.epoch + 1;
        break;
    case 1:
        op.type = THINVM_OP_SET_BACKING;
        snprintf(backing.name, sizeof(backing.name), "%u",
                 (unsigned)below(f, 1000));
        if (below(f, 2)) {
            backing.name[0] = 0;
        }
        op.backing = &backing;
        break;
    default:
        if (info.device_clusters > DEVICE + 4000) {
            return;
        }
        op.type = THINVM_OP_GROW;
        op.value = info.device_clusters + 1 + below(f, 300);
    }
    g_assert_cmpint(execute(f, &op), ==, 0);
    if (op.type == THINVM_OP_SET_BACKING) {
        g_assert_cmpstr(thinvm_state_backing(f->s)->name, ==, backing.name);
    }
}

static void random_step(Fixture *f)
{
    static const struct {
        unsigned end;
        void (*fn)(Fixture *f);
    } step[] = {
        { 550, random_map }, { 750, random_valid_bits }, { 850, random_unmap },
        { 880, random_run }, { 900, random_snapshot_create }, { 910,
        random_snapshot_goto }, { 930, random_snapshot_delete }, { 960,
        random_scalar }, { 1000, checkpoint },
    };
    uint64_t dice = below(f, 1000);
    int i = 0;

    while (dice >= step[i].end) {
        i++;
    }
    step[i].fn(f);
}

static void fixture_init(Fixture *f, uint32_t seed)
{
    ThinvmSuperblock sb = {
        .version_major = THINVM_VERSION_MAJOR,
        .cluster_bits = CLUSTER_BITS,
        .journal_offset = THINVM_JOURNAL_OFFSET,
        .journal_size = THINVM_MIN_JOURNAL_SIZE,
        .virtual_size = THINVM_MAX_GUEST_CLUSTERS << CLUSTER_BITS,
        .device_clusters = DEVICE,
        .incompatible = seed % 2 ? THINVM_INCOMPATIBLE_TEMPLATE : 0,
    };

    memset(f, 0, sizeof(*f));
    memset(&sb.uuid, 0x5a, sizeof(sb.uuid));
    f->rand = g_rand_new_with_seed(seed);
    f->device = g_hash_table_new_full(g_int64_hash, g_int64_equal, g_free,
                                      g_free);
    f->log = g_ptr_array_new_with_free_func(g_free);
    f->snapshots = g_ptr_array_new_with_free_func(g_free);
    f->model = g_new0(ModelTree, 1);
    f->s = thinvm_state_new_empty(&sb, 0, &error_abort);
    checkpoint(f);
}

static void fixture_destroy(Fixture *f)
{
    thinvm_state_free(f->s);
    g_hash_table_unref(f->device);
    g_ptr_array_unref(f->log);
    g_ptr_array_unref(f->snapshots);
    g_free(f->model);
    g_rand_free(f->rand);
}

static void test_random(const void *opaque)
{
    uint32_t seed = GPOINTER_TO_UINT(opaque);
    Fixture f;

    fixture_init(&f, seed);
    for (int round = 0; round < 12; round++) {
        for (int i = 0; i < 150; i++) {
            random_step(&f);
        }
        compare(&f);
        if (below(&f, 4) && (f.base[1].generation || below(&f, 2))) {
            reopen(&f, f.has_older && !below(&f, 3));
            compare(&f);
        }
    }
    fixture_destroy(&f);
}

/* From every prefix of the operations: equal to the model at that point */
static void test_every_prefix(void)
{
    Fixture f;

    fixture_init(&f, 4711);
    for (int i = 0; i < 60; i++) {
        random_step(&f);
        reopen(&f, 0);
        compare(&f);
    }
    fixture_destroy(&f);
}

static void test_full_device(void)
{
    Fixture f;
    uint64_t first, nb, total = 0;
    int ret;
    ThinvmInfoState info;

    fixture_init(&f, 1);
    extend_metadata(&f);
    while ((ret = reserve(&f, 0, 512, &first, &nb)) == 0) {
        g_assert_cmpuint(nb, >, 0);
        total += nb;
    }
    g_assert_cmpint(ret, ==, -ENOSPC);
    thinvm_state_info(f.s, &info);
    g_assert_cmpuint(info.busy_clusters, ==, total);
    g_assert_cmpuint(info.free_clusters, ==, total);
    thinvm_state_lock(f.s);
    thinvm_space_unbusy(f.s, first, 1);
    thinvm_state_unlock(f.s);
    g_assert_cmpint(reserve(&f, 0, 8, &first, &nb), ==, 0);
    g_assert_cmpuint(nb, ==, 1);
    fixture_destroy(&f);
}

/*
 * More than what one page of level 1 of the count tree, and several of the
 * mapping tree, stand for: made, shared, and unmapped again by few operations.
 */
static void test_bulk(void)
{
    const unsigned runs = 2 * 1024 + 100;
    const uint64_t end = runs * 512;
    ThinvmOp grow = { .type = THINVM_OP_GROW, .value = 3ULL << 20 };
    ThinvmOp op = { .type = THINVM_OP_MAP_RUN };
    uint64_t goal = 0, nb;
    ModelSnapshot *m;
    Fixture f;

    fixture_init(&f, 3);
    execute(&f, &grow);
    for (unsigned i = 0; i < runs; i++) {
        g_assert_cmpint(reserve(&f, goal, 512, &op.physical, &nb), ==, 0);
        op.guest = i * 512;
        g_assert_cmpint(execute(&f, &op), ==, 0);
        goal = op.physical + 512;
    }
    for (int i = 0; i < 2 * AREA; i++) {
        ThinvmMapping found;

        lookup(&f, NULL, area_start[i / AREA] + i % AREA, 1, false, &found);
        f.model->entry[i / AREA][i % AREA] =
            thinvm_entry(found.physical, 0, THINVM_SOURCE_ZERO);
    }
    random_snapshot_create(&f);
    checkpoint(&f);

    /* The snapshot keeps what the disk gives up, in a copied page too */
    g_assert_cmpuint(unmap(&f, 1000, end - 2000, THINVM_SOURCE_ZERO), <, 400);
    for (int i = 1000; i < 2 * AREA; i++) {
        f.model->entry[i / AREA][i % AREA] =
            thinvm_entry(0, 0, THINVM_SOURCE_ZERO);
    }
    reopen(&f, 0);
    compare(&f);
    m = g_ptr_array_index(f.snapshots, 0);
    delete_steps(&f, m->slot, m->id, -1);
    g_ptr_array_set_size(f.snapshots, 0);
    compare(&f);
    unmap(&f, 0, end, THINVM_SOURCE_BACKING);
    memset(f.model, 0, sizeof(*f.model));
    reopen(&f, 0);
    compare(&f);
    fixture_destroy(&f);
}

#define MAP_OP(g, c, p) \
    { .type = THINVM_OP_MAP, .guest = g, .count = c, .physical = p, .valid = 1 }

static void test_bad_operations(void)
{
    static ThinvmOp bad[] = {
        MAP_OP(511, 2, 5000),
        MAP_OP(0, 1, 0),
        MAP_OP(0, 1, DEVICE),
        MAP_OP(THINVM_MAX_GUEST_CLUSTERS, 1, 5000),
        MAP_OP(0, UINT64_MAX, 5000),
        { .type = THINVM_OP_UNMAP, .guest = 1, .count = UINT64_MAX },
        { .type = THINVM_OP_MAP_RUN, .guest = 1, .physical = 5000 },
        { .type = THINVM_OP_MAP_RUN, .guest = 0, .physical = DEVICE - 1 },
        { .type = THINVM_OP_GROW, .value = DEVICE - 1 },
        { .type = THINVM_OP_GROW, .value = UINT64_MAX },
        { .type = THINVM_OP_META_EXTEND, .physical = 0, .count = 1 },
        { .type = THINVM_OP_META_EXTEND, .physical = 5000, .count = 128 },
        { .type = THINVM_OP_RESIZE, .value = 511 },
        { .type = THINVM_OP_RESIZE, .value = UINT64_MAX - 511 },
        { .type = THINVM_OP_EPOCH, .value = 0 },
        { .type = THINVM_OP_SNAPSHOT_GOTO, .guest = 0, .value = 1 },
        { .type = THINVM_OP_SNAPSHOT_DELETE_STEP, .guest = UINT32_MAX,
          .value = 1 },
        { .type = 99 },
    };
    Fixture f;

    fixture_init(&f, 2);
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
        int ret = execute_raw(&f, &bad[i], true);

        g_assert_true(ret < 0 && ret != -EAGAIN && ret != -EALREADY);
    }
    compare(&f);
    fixture_destroy(&f);
}

int main(int argc, char **argv)
{
    unsigned seeds = atoi(getenv("THINVM_TEST_SEEDS") ?: "24");

    g_test_init(&argc, &argv, NULL);
    for (unsigned i = 1; i <= seeds; i++) {
        g_autofree char *name = g_strdup_printf("/thinvm/state/random/%u", i);

        g_test_add_data_func(name, GUINT_TO_POINTER(i), test_random);
    }
    g_test_add_func("/thinvm/state/every-prefix", test_every_prefix);
    g_test_add_func("/thinvm/state/full-device", test_full_device);
    g_test_add_func("/thinvm/state/bulk", test_bulk);
    g_test_add_func("/thinvm/state/bad-operations", test_bad_operations);
    return g_test_run();
}
