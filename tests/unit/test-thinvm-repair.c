/*
 * Repairs that a power cut interrupts, on a simulated device
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * For each class of damage an image is made that has it, and repaired.  Before
 * each I/O of that which may change anything the device is copied as a power cut might leave it.  The
 * copy must open, be no worse than the image was before, and a repair of it
 * must end well: nothing wrong any more, nothing lost that was not damaged.
 * Nor may an older base lead back: if what the repair wrote is damaged as soon
 * as it is there, the image is either as if it had not been repaired at all,
 * or refused with a message that says what to do.
 */
#include "qemu/osdep.h"
#include "thinvm-store-test.h"
#include "block/thinvm/state-int.h"

#define FIX_ALL     (THINVM_FIX_LEAKS | THINVM_FIX_ERRORS)
#define LEAF        THINVM_ENTRIES_PER_LEAF
/* Guest clusters that are written: some in each of four leaves */
#define NB_LEAVES   4
#define NB_EACH     6
/* An unwritten run, the guest cluster that uses another's, and their leaves */
#define RUN_GUEST   (8 * LEAF)
#define THIEF       (9 * LEAF)
/* While nothing but reads take effect every so many of them are cut */
#define CUT_READS   16
/* What is lost is so in one leaf at most */
#define LOST_NONE   UINT64_MAX
#define TAG_ERROR   (UINT64_MAX - 1)

typedef struct Damage {
    const char *name;
    void coroutine_fn (*make)(ThinvmSim *sim, ThinvmStore *st);
    uint64_t lost;              /* number of the leaf, or LOST_NONE */
    bool all_lost;              /* of every leaf */
    bool snapshots_lost;
    bool one_base;              /* the older base is whole */
} Damage;

static const Damage *damage;
static ThinvmCheckResult found;     /* before any repair */
static uint64_t nb_cuts, nb_between, nb_reads, last_changes;

static uint64_t guest_at(unsigned leaf, unsigned i)
{
    return leaf * LEAF + i * 3;
}

static uint64_t tag_of(uint64_t guest, bool in_snapshot)
{
    return (in_snapshot ? 1000 : 5000) + guest;
}

/* The disk goes on differently after the snapshot, but for the last leaf */
static bool was_overwritten(unsigned leaf)
{
    return leaf < NB_LEAVES - 1;
}

/* ------------------------------------------------------------------ */
/* Making an image, and finding its pages                              */

static void coroutine_fn execute(ThinvmStore *st, const ThinvmOp *op)
{
    g_assert_cmpint(thinvm_store_execute(st, op, NULL, &error_abort), ==, 0);
}

static void coroutine_fn write_leaves(ThinvmSim *sim, ThinvmStore *st,
                                      bool snapshot)
{
    for (unsigned leaf = 0; leaf < NB_LEAVES; leaf++) {
        if (!snapshot && !was_overwritten(leaf)) {
            continue;
        }
        for (unsigned i = 0; i < NB_EACH; i++) {
            uint64_t guest = guest_at(leaf, i);

            g_assert_cmpint(write_one(sim, st, guest, tag_of(guest, snapshot)),
                            ==, 0);
        }
    }
}

static void coroutine_fn make_image(ThinvmSim *sim)
{
    ThinvmSnapshot snap = { .id = 1, .name = "one" };
    ThinvmOp create = { .type = THINVM_OP_SNAPSHOT_CREATE, .snapshot = &snap };
    ThinvmOp run = { .type = THINVM_OP_MAP_RUN, .guest = RUN_GUEST };
    uint64_t nb;
    ThinvmStore *st;

    image_create(sim, VIRTUAL_SIZE);
    st = image_open(sim);
    write_leaves(sim, st, true);
    execute(st, &create);
    write_leaves(sim, st, false);
    g_assert_cmpint(thinvm_store_grow(st, 32 * MiB, &error_abort), ==, 0);
    g_assert_cmpint(thinvm_store_reserve(st, 0, LEAF, &run.physical, &nb), ==,
                    0);
    g_assert_cmpuint(nb, ==, LEAF);
    execute(st, &run);
    store_close(st, true);
}

static ThinvmPointer pointer_at(ThinvmSim *sim, uint64_t page, unsigned index)
{
    uint8_t buf[THINVM_PAGE_SIZE];
    ThinvmPointer ptr;

    sim_peek(sim, page * THINVM_PAGE_SIZE, THINVM_PAGE_SIZE, buf);
    thinvm_pointer_decode(&ptr, (ThinvmPointerLe *)buf + index);
    g_assert_cmpint(ptr.type, ==, THINVM_PTR_PAGE);
    return ptr;
}

/* The page of @level, as the device has it */
static uint64_t page_of(ThinvmSim *sim, const ThinvmPointer *root,
                        unsigned bits, uint64_t n, int level)
{
    uint64_t page = root->address;

    for (int l = THINVM_INNER_LEVELS; l > level; l--) {
        page = pointer_at(sim, page, n >> (bits + 8 * (l - 1)) & 255).address;
    }
    return page;
}

static void flip_map(ThinvmSim *sim, ThinvmStore *st, unsigned leaf, int level)
{
    flip(sim, page_of(sim, &st->bases.newest.map_root, 9, leaf * LEAF, level) *
              THINVM_PAGE_SIZE + 5);
}

/* In memory; its path was changed and is not in a base yet */
static ThinvmPage *leaf_in_memory(ThinvmState *s, uint64_t guest)
{
    const ThinvmPointerLe *slot = &s->root[THINVM_TREE_DISK];
    ThinvmPage *page = NULL;

    for (int level = THINVM_INNER_LEVELS; level >= 0; level--) {
        page = thinvm_page_find(s, thinvm_slot_address(slot));
        g_assert_nonnull(page);
        g_assert_true(page->dirty && !page->complete);
        if (level) {
            slot = &thinvm_page_slots(page)[guest >> (9 + 8 * (level - 1)) &
                                            255];
        }
    }
    return page;
}

/* Both bases have it then, and no journal tells otherwise */
static void coroutine_fn into_both_bases(ThinvmStore *st)
{
    flush(st);
    st->nb_repair_checkpoints = 2;
    while (st->nb_repair_checkpoints) {
        g_assert_cmpint(thinvm_store_checkpoint(st), ==, 0);
    }
}

/* ------------------------------------------------------------------ */
/* Classes of damage                                                   */

static void coroutine_fn set_count(ThinvmStore *st, uint64_t cluster,
                                   uint16_t count)
{
    ThinvmState *s = thinvm_store_state(st);
    ThinvmNeeds needs;
    int ret;

    thinvm_needs_init(&needs);
    do {
        thinvm_state_lock(s);
        ret = thinvm_repair_cluster_count(s, cluster, count, &needs);
        thinvm_state_unlock(s);
        if (ret == -EAGAIN) {
            thinvm_store_read_wanted(st, s, &needs, &error_abort);
        }
    } while (ret == -EAGAIN);
    thinvm_state_lock(s);
    thinvm_needs_destroy(s, &needs);
    thinvm_state_unlock(s);
    g_assert_cmpint(ret, ==, 0);
}

static uint64_t coroutine_fn cluster_of(ThinvmStore *st, uint64_t guest)
{
    ThinvmMapping m;

    g_assert_cmpint(thinvm_store_lookup(st, THINVM_TREE_DISK, NULL, guest, 1,
                                        false, &m), ==, 0);
    g_assert_cmpint(m.type, ==, THINVM_MAPPING_DATA);
    return m.physical;
}

static uint64_t coroutine_fn free_cluster(ThinvmStore *st)
{
    uint64_t first, nb;

    thinvm_store_reserve(st, 0, 1, &first, &nb);
    thinvm_store_unreserve(st, first, nb);
    return first;
}

static void coroutine_fn make_leak(ThinvmSim *sim, ThinvmStore *st)
{
    set_count(st, free_cluster(st), 1);
    into_both_bases(st);
}

static void coroutine_fn make_count_low(ThinvmSim *sim, ThinvmStore *st)
{
    set_count(st, cluster_of(st, guest_at(1, 2)), 0);
    into_both_bases(st);
}

/* In memory alone, and without all that the store does before */
static void coroutine_fn apply(ThinvmStore *st, const ThinvmOp *op)
{
    ThinvmState *s = thinvm_store_state(st);
    ThinvmNeeds needs;
    int ret;

    thinvm_needs_init(&needs);
    do {
        thinvm_state_lock(s);
        ret = thinvm_state_prepare(s, op, true, &needs, &error_abort);
        if (ret == 0) {
            thinvm_state_apply(s, op);
        }
        thinvm_state_unlock(s);
        if (ret == -EAGAIN) {
            thinvm_store_read_wanted(st, s, &needs, &error_abort);
        }
    } while (ret == -EAGAIN);
    thinvm_state_lock(s);
    thinvm_needs_destroy(s, &needs);
    thinvm_state_unlock(s);
    g_assert_cmpint(ret, ==, 0);
}

static void coroutine_fn make_two_owners(ThinvmSim *sim, ThinvmStore *st)
{
    ThinvmOp map = {
        .type = THINVM_OP_MAP, .guest = THIEF, .count = 1,
        .physical = cluster_of(st, guest_at(0, 1)), .valid = THINVM_ALL_VALID,
    };

    set_count(st, map.physical, 0);
    apply(st, &map);
    set_count(st, map.physical, 2);
    into_both_bases(st);
}

static void coroutine_fn make_page_leak(ThinvmSim *sim, ThinvmStore *st)
{
    ThinvmState *s = thinvm_store_state(st);
    ThinvmMetaExtent *e = g_ptr_array_index(s->extents, 0);
    uint64_t last = e->nb_pages - 1;

    g_assert_false(test_bit(last, e->busy));
    thinvm_state_lock(s);
    thinvm_repair_page_count(s, e->first_page + last, 2);
    thinvm_state_unlock(s);
    into_both_bases(st);
}

/* Of a leaf that the snapshot has too */
static void coroutine_fn make_page_count_low(ThinvmSim *sim, ThinvmStore *st)
{
    ThinvmState *s = thinvm_store_state(st);
    uint64_t page = page_of(sim, &st->bases.newest.map_root, 9,
                            guest_at(NB_LEAVES - 1, 0), 0);

    thinvm_state_lock(s);
    g_assert_cmpint(*thinvm_page_count(s, page, NULL), ==, 2);
    thinvm_repair_page_count(s, page, 1);
    thinvm_state_unlock(s);
    into_both_bases(st);
}

static void coroutine_fn make_promises(ThinvmSim *sim, ThinvmStore *st)
{
    ThinvmState *s = thinvm_store_state(st);

    thinvm_state_lock(s);
    g_assert_cmpuint(s->promised_pages, ==, 1);
    s->promised_pages = 4;
    thinvm_state_unlock(s);
    into_both_bases(st);
}

/* An entry that names the journal; all checksums are right */
static void coroutine_fn make_bad_entry(ThinvmSim *sim, ThinvmStore *st)
{
    ThinvmState *s = thinvm_store_state(st);
    uint64_t guest = guest_at(2, 1);

    write_one(sim, st, guest_at(2, 1) + 1, 77);
    thinvm_state_lock(s);
    leaf_in_memory(s, guest)->data[guest % LEAF] =
        cpu_to_le64(thinvm_entry(80, THINVM_ALL_VALID, THINVM_SOURCE_BACKING));
    thinvm_state_unlock(s);
    into_both_bases(st);
}

/* An entry that looks private, but a snapshot has its cluster too */
static void coroutine_fn make_unflagged(ThinvmSim *sim, ThinvmStore *st)
{
    ThinvmState *s = thinvm_store_state(st);
    uint64_t guest = guest_at(NB_LEAVES - 1, 1);
    ThinvmPage *leaf;
    uint64_t entry;

    write_one(sim, st, guest + 1, 77);
    thinvm_state_lock(s);
    leaf = leaf_in_memory(s, guest);
    entry = le64_to_cpu(leaf->data[guest % LEAF]);
    g_assert_true(entry & THINVM_ENTRY_SHARED);
    leaf->data[guest % LEAF] = cpu_to_le64(entry & ~THINVM_ENTRY_SHARED);
    thinvm_state_unlock(s);
    into_both_bases(st);
}

/* The number of free clusters that a pointer tells is wrong */
static void coroutine_fn make_bad_sum(ThinvmSim *sim, ThinvmStore *st)
{
    ThinvmState *s = thinvm_store_state(st);
    ThinvmPage *page;

    write_one(sim, st, THIEF, 77);
    thinvm_state_lock(s);
    page = thinvm_page_find(s, thinvm_slot_address(&s->count_root));
    g_assert_true(page->dirty && !page->complete);
    thinvm_page_slots(page)[0].extra_le =
        cpu_to_le32(le32_to_cpu(thinvm_page_slots(page)[0].extra_le) - 3);
    thinvm_state_unlock(s);
    into_both_bases(st);
}

static void coroutine_fn make_leaf(ThinvmSim *sim, ThinvmStore *st)
{
    into_both_bases(st);
    flip_map(sim, st, 1, 0);
}

static void coroutine_fn make_shared_leaf(ThinvmSim *sim, ThinvmStore *st)
{
    into_both_bases(st);
    flip_map(sim, st, NB_LEAVES - 1, 0);
}

static void coroutine_fn make_inner(ThinvmSim *sim, ThinvmStore *st)
{
    into_both_bases(st);
    flip_map(sim, st, 0, 1);
}

static void coroutine_fn make_root(ThinvmSim *sim, ThinvmStore *st)
{
    into_both_bases(st);
    flip_map(sim, st, 0, 3);
}

static void coroutine_fn make_count_leaf(ThinvmSim *sim, ThinvmStore *st)
{
    into_both_bases(st);
    flip(sim, page_of(sim, &st->bases.newest.count_root, 11, 200, 0) *
              THINVM_PAGE_SIZE + 600);
}

static void coroutine_fn make_count_inner(ThinvmSim *sim, ThinvmStore *st)
{
    into_both_bases(st);
    flip(sim, page_of(sim, &st->bases.newest.count_root, 11, 200, 2) *
              THINVM_PAGE_SIZE + 5);
}

static void coroutine_fn make_snapshots(ThinvmSim *sim, ThinvmStore *st)
{
    uint64_t page = st->bases.newest.snapshot_root.address;

    into_both_bases(st);
    page = pointer_at(sim, page, 0).address;
    page = pointer_at(sim, page, 0).address;
    flip(sim, page * THINVM_PAGE_SIZE + 5);
}

/* The older base has another leaf, and with the journal that says the same */
static void coroutine_fn make_newest(ThinvmSim *sim, ThinvmStore *st)
{
    into_both_bases(st);
    write_one(sim, st, guest_at(1, 0) + 1, 77);
    g_assert_cmpint(thinvm_store_checkpoint(st), ==, 0);
    flip_map(sim, st, 1, 0);
}

static const Damage damages[] = {
    { "leak", make_leak, LOST_NONE },
    { "count-low", make_count_low, LOST_NONE },
    { "two-owners", make_two_owners, LOST_NONE },
    { "page-leak", make_page_leak, LOST_NONE },
    { "page-count-low", make_page_count_low, LOST_NONE },
    { "promises", make_promises, LOST_NONE },
    { "unflagged", make_unflagged, LOST_NONE },
    { "bad-sum", make_bad_sum, LOST_NONE },
    { "bad-entry", make_bad_entry, 2 },
    { "leaf", make_leaf, 1 },
    { "shared-leaf", make_shared_leaf, NB_LEAVES - 1 },
    { "inner", make_inner, LOST_NONE, .all_lost = true },
    { "root", make_root, LOST_NONE, .all_lost = true },
    { "count-leaf", make_count_leaf, LOST_NONE },
    { "count-inner", make_count_inner, LOST_NONE },
    { "snapshots", make_snapshots, LOST_NONE, .snapshots_lost = true },
    { "newest", make_newest, LOST_NONE, .one_base = true },
};

/* ------------------------------------------------------------------ */
/* Judging                                                             */

static void collect(void *opaque, const char *message)
{
    g_string_append_printf(opaque, "%s\n", message);
}

static ThinvmCheckResult coroutine_fn check(ThinvmStore *st, int fix,
                                            GString *messages)
{
    g_autoptr(GString) own = g_string_new("");
    ThinvmCheckResult result = { };

    thinvm_store_check(st, fix, collect, messages ?: own, &result,
                       &error_abort);
    return result;
}

static void coroutine_fn must_be_clean(ThinvmStore *st)
{
    g_autoptr(GString) messages = g_string_new("");
    ThinvmCheckResult result = check(st, 0, messages);

    g_assert_cmpstr(messages->str, ==, "");
    g_assert_cmpuint(result.corruptions + result.leaks + result.check_errors,
                     ==, 0);
}

static bool may_be_lost(unsigned leaf, bool in_snapshot)
{
    return damage->all_lost ? !in_snapshot : damage->lost == leaf;
}

/* @repaired: all can be read again */
static void coroutine_fn judge_tree(ThinvmSim *sim, ThinvmStore *st,
                                    const ThinvmPointer *root, bool repaired)
{
    g_autofree uint8_t *buf = g_malloc(IMAGE_CLUSTER);

    for (unsigned leaf = 0; leaf < NB_LEAVES; leaf++) {
        for (unsigned i = 0; i < NB_EACH; i++) {
            uint64_t guest = guest_at(leaf, i);
            uint64_t expected = tag_of(guest, root || !was_overwritten(leaf));
            int ret = image_read_root(sim, st, root, guest, buf);
            uint64_t tag = ret < 0 ? TAG_ERROR :
                           image_tag(buf, guest * IMAGE_SECTORS);

            if (tag != expected &&
                !(tag == TAG_ZERO && may_be_lost(leaf, root)) &&
                !(tag == TAG_ERROR && !repaired)) {
                g_error("%s: guest cluster %" PRIu64 "%s has %" PRIx64
                        ", not %" PRIx64, damage->name, guest,
                        root ? " of the snapshot" : "", tag, expected);
            }
        }
    }
}

static void coroutine_fn judge_data(ThinvmSim *sim, ThinvmStore *st,
                                    bool repaired)
{
    ThinvmSnapshot snap;
    int ret = thinvm_store_read_snapshot(st, 0, &snap, NULL);

    judge_tree(sim, st, NULL, repaired);
    if (ret == 0) {
        judge_tree(sim, st, &snap.root, repaired);
    } else {
        g_assert_true(damage->snapshots_lost);
    }
}

/* What the base that is newest now is made of is gone */
static void coroutine_fn lose_newest(ThinvmSim *sim)
{
    ThinvmBases bases;

    g_assert_cmpint(thinvm_bases_read(sim_device(sim), &bases, &error_abort),
                    ==, 0);
    flip(sim, bases.newest.space_root.address * THINVM_PAGE_SIZE + 5);
    thinvm_bases_destroy(&bases);
}

/* A repair of what a cut has left, from beginning to end */
static void coroutine_fn judge(ThinvmSim *sim)
{
    ThinvmStore *st = image_open(sim);
    ThinvmCheckResult now = check(st, 0, NULL);

    g_assert_cmpuint(now.corruptions, <=, found.corruptions);
    g_assert_cmpuint(now.leaks, <=, found.leaks);
    judge_data(sim, st, !now.corruptions && !now.check_errors);
    check(st, FIX_ALL, NULL);
    g_assert_false(thinvm_bases_repaired(&st->bases));
    must_be_clean(st);
    judge_data(sim, st, true);
    /* It can be used, and there is a second base again */
    g_assert_cmpint(write_one(sim, st, THIEF + 1, 99), ==, 0);
    store_close(st, true);
    lose_newest(sim);
    st = image_open(sim);
    must_be_clean(st);
    judge_data(sim, st, true);
    g_assert_cmpuint(image_read_tag(sim, st, THIEF + 1), ==, 99);
    store_close(st, true);
}

/* Was it cut between the two checkpoints of a repair? */
static bool coroutine_fn is_between(ThinvmSim *sim, bool *has_older,
                                    uint64_t *newest)
{
    ThinvmBases bases;
    bool repaired;

    g_assert_cmpint(thinvm_bases_read(sim_device(sim), &bases, &error_abort),
                    ==, 0);
    *has_older = bases.has_older;
    *newest = thinvm_superblock_offset(bases.newest_slot);
    repaired = thinvm_bases_repaired(&bases);
    thinvm_bases_destroy(&bases);
    return repaired;
}

/* Whoever writes next gives the image a second base, before all else */
static void coroutine_fn judge_settled(ThinvmSim *sim)
{
    bool has_older;
    uint64_t newest;

    if (is_between(sim, &has_older, &newest)) {
        nb_between++;
        store_die(image_open(sim));
        g_assert_false(is_between(sim, &has_older, &newest));
        lose_newest(sim);
        judge(sim);
    }
}

/* The newest base is lost too: as if there had been no repair, or refused */
static void coroutine_fn judge_way_back(ThinvmSim *sim)
{
    uint8_t zeroes[SIM_SECTOR] = {};
    uint64_t newest;
    bool has_older, repaired = is_between(sim, &has_older, &newest);

    if (!has_older) {
        return;
    }
    lose_newest(sim);
    if (repaired) {
        must_fail_to_open(sim, "from before a repair");
        /* what the message says to do */
        sim_poke(sim, newest, SIM_SECTOR, zeroes);
    }
    judge(sim);
}

/* ------------------------------------------------------------------ */
/* Cuts                                                                */

static void judge_copy(ThinvmSim *sim, uint64_t seed, SimCut kind,
                       TestBody *body)
{
    ThinvmSim *copy = sim_cut(sim, seed, kind);

    run_on(copy, body);
    sim_free(copy);
}

static void at_io(void *opaque)
{
    ThinvmSim *sim = opaque;
    uint64_t changes = sim_count(sim, ~SIM_READ);

    /* Many of the counts are read one by one, which changes nothing */
    if (changes == last_changes && ++nb_reads % CUT_READS) {
        return;
    }
    last_changes = changes;
    for (SimCut kind = 0; kind < SIM_CUT__MAX; kind++) {
        nb_cuts++;
        judge_copy(sim, nb_cuts, kind, judge);
        judge_copy(sim, nb_cuts, kind, judge_way_back);
        judge_copy(sim, nb_cuts, kind, judge_settled);
    }
}

static void coroutine_fn repair_entry(ThinvmSim *sim)
{
    ThinvmStore *st = image_open(sim);

    check(st, FIX_ALL, NULL);
    store_close(st, true);
}

static void coroutine_fn damage_entry(ThinvmSim *sim)
{
    ThinvmStore *st;

    make_image(sim);
    st = image_open(sim);
    damage->make(sim, st);
    store_die(st);
    /* A look that changes nothing, before anybody writes */
    st = thinvm_store_open(sim_device(sim), 0, &error_abort);
    found = check(st, 0, NULL);
    g_assert_cmpuint(found.corruptions + found.leaks + found.check_errors, >,
                     0);
    judge_data(sim, st, false);
    thinvm_store_free(st);
}

static void test_damage(gconstpointer data)
{
    ThinvmSim *sim = sim_new(1, DEVICE_SIZE, DEVICE_MAX);
    uint64_t before = nb_cuts;

    damage = data;
    nb_between = 0;
    run_on(sim, damage_entry);
    sim_set_hook(sim, at_io, sim);
    run_on(sim, repair_entry);
    sim_set_hook(sim, NULL, NULL);
    judge_copy(sim, 1, SIM_CUT_ALL, judge);
    g_assert_cmpuint(nb_between, >, 0);
    g_test_message("%" PRIu64 " cuts, %" PRIu64 " between the checkpoints",
                   nb_cuts - before, nb_between);
    sim_free(sim);
}

/* ------------------------------------------------------------------ */
/* Without cuts                                                        */

/* A page of counts that says no more than a pointer can has to go */
static void coroutine_fn test_free_range(ThinvmSim *sim)
{
    ThinvmOp shrink = {
        .type = THINVM_OP_SHRINK, .value = 2 * THINVM_COUNTS_PER_LEAF,
    };
    ThinvmStore *st;

    image_create(sim, VIRTUAL_SIZE);
    st = image_open(sim);
    g_assert_cmpint(thinvm_store_grow(st, DEVICE_MAX, &error_abort), ==, 0);
    set_count(st, 3 * THINVM_COUNTS_PER_LEAF + 5, 1);
    into_both_bases(st);
    g_assert_cmpuint(check(st, FIX_ALL, NULL).leaks_fixed, ==, 1);
    execute(st, &shrink);
    must_be_clean(st);
    store_close(st, true);
}

/* Snapshots of a disk that has grown since go on sharing their pages */
static void coroutine_fn test_sizes(ThinvmSim *sim)
{
    ThinvmOp resize = { .type = THINVM_OP_RESIZE, .value = 2 * VIRTUAL_SIZE };
    ThinvmSnapshot snap = { .name = "one" };
    ThinvmOp create = { .type = THINVM_OP_SNAPSHOT_CREATE, .snapshot = &snap };
    uint64_t root = 0;
    ThinvmStore *st;

    image_create(sim, VIRTUAL_SIZE);
    st = image_open(sim);
    write_leaves(sim, st, true);
    for (snap.id = 1; snap.id <= 4; snap.id++) {
        execute(st, &create);
    }
    execute(st, &resize);
    into_both_bases(st);
    flip_map(sim, st, 1, 0);
    store_die(st);

    st = image_open(sim);
    check(st, FIX_ALL, NULL);
    must_be_clean(st);
    for (uint32_t slot = 0; slot < 4; slot++) {
        g_assert_cmpint(thinvm_store_read_snapshot(st, slot, &snap,
                                                   &error_abort), ==, 0);
        g_assert_true(!root || snap.root.address == root);
        root = snap.root.address;
    }
    store_close(st, true);
}

/* The space map has moved in memory, but not on the device */
static void coroutine_fn test_pending(ThinvmSim *sim)
{
    g_autoptr(GString) messages = g_string_new("");
    ThinvmCheckResult result;
    ThinvmStore *st;

    image_create(sim, VIRTUAL_SIZE);
    st = image_open(sim);
    write_leaves(sim, st, true);
    sim_fail(sim, SIM_WRITE, 0, THINVM_JOURNAL_OFFSET, 0, EIO, false);
    g_assert_cmpint(thinvm_store_checkpoint(st), ==, -EIO);
    g_assert_cmpint(thinvm_store_check(st, FIX_ALL, collect, messages, &result,
                                       NULL), ==, -EIO);
    g_assert_cmpstr(messages->str, ==, "");
    sim_fail(sim, 0, 0, 0, 0, 0, false);
    must_be_clean(st);
    store_close(st, true);
}

/* A leaf that cannot be read when it is counted, but can be later */
static void coroutine_fn test_read_error(ThinvmSim *sim)
{
    ThinvmOp map = {
        .type = THINVM_OP_MAP, .guest = THIEF, .count = 1,
        .physical = 3 * THINVM_COUNTS_PER_LEAF + 5, .valid = THINVM_ALL_VALID,
    };
    ThinvmCheckResult result;
    ThinvmStore *st;
    uint64_t page;

    make_image(sim);
    st = image_open(sim);
    g_assert_cmpint(thinvm_store_grow(st, DEVICE_MAX, &error_abort), ==, 0);
    /* A leaf, some of whose clusters the snapshot's has too */
    write_one(sim, st, guest_at(NB_LEAVES - 1, 0) + 1, 77);
    execute(st, &map);
    into_both_bases(st);
    page = page_of(sim, &st->bases.newest.map_root, 9, THIEF, 0);
    store_die(st);

    st = thinvm_store_open(sim_device(sim), 0, &error_abort);
    sim_fail(sim, SIM_READ, page * THINVM_PAGE_SIZE,
             (page + 1) * THINVM_PAGE_SIZE, 0, EIO, true);
    result = check(st, 0, NULL);
    g_assert_true(sim_has_failed(sim));
    g_assert_cmpuint(result.check_errors, ==, 1);
    g_assert_cmpuint(result.corruptions, ==, 0);
    must_be_clean(st);
    thinvm_store_free(st);
}

/* Leaves, more than fit into the smallest cache */
#define NB_MANY     100
/* Times that each is read at least, in a repair */
#define NB_READS    5

static unsigned failing_read;

static ThinvmStore *coroutine_fn open_small(ThinvmSim *sim)
{
    ThinvmStore *st = thinvm_store_open(sim_device(sim), THINVM_PAGE_SIZE,
                                        &error_abort);

    thinvm_store_begin_writing(st, info_of(st).epoch + 1, &error_abort);
    return st;
}

/* What is said to be repaired is so */
static void coroutine_fn recount_entry(ThinvmSim *sim)
{
    g_autoptr(GString) messages = g_string_new("");
    ThinvmCheckResult result = { };
    ThinvmStore *st = open_small(sim);
    uint64_t page = page_of(sim, &st->bases.newest.map_root, 9,
                            NB_MANY / 2 * LEAF, 0);
    int ret;

    sim_fail(sim, SIM_READ, page * THINVM_PAGE_SIZE,
             (page + 1) * THINVM_PAGE_SIZE, failing_read, EIO, true);
    ret = thinvm_store_check(st, FIX_ALL, collect, messages, &result, NULL);
    g_assert_true(sim_has_failed(sim));
    store_die(st);
    st = image_open(sim);
    if (ret == 0 && !result.check_errors) {
        must_be_clean(st);
    }
    check(st, FIX_ALL, NULL);
    must_be_clean(st);
    for (unsigned i = 0; i < NB_MANY; i++) {
        g_assert_cmpuint(image_read_tag(sim, st, i * LEAF), ==, 100 + i);
    }
    store_close(st, true);
}

static void coroutine_fn many_entry(ThinvmSim *sim)
{
    ThinvmStore *st;

    image_create(sim, VIRTUAL_SIZE);
    st = image_open(sim);
    for (unsigned i = 0; i < NB_MANY; i++) {
        g_assert_cmpint(write_one(sim, st, i * LEAF, 100 + i), ==, 0);
    }
    make_count_leaf(sim, st);
    store_die(st);
}

/* Counts are lost, and then a leaf cannot be read: its clusters are in use */
static void test_recount(void)
{
    ThinvmSim *sim = sim_new(1, DEVICE_SIZE, DEVICE_MAX);

    run_on(sim, many_entry);
    for (failing_read = 0; failing_read < NB_READS; failing_read++) {
        judge_copy(sim, 1, SIM_CUT_ALL, recount_entry);
    }
    sim_free(sim);
}

int main(int argc, char **argv)
{
    module_call_init(MODULE_INIT_TRACE);
    qemu_init_main_loop(&error_abort);
    g_test_init(&argc, &argv, NULL);
    for (unsigned i = 0; i < ARRAY_SIZE(damages); i++) {
        g_autofree char *path = g_strdup_printf("/thinvm/repair/%s",
                                                damages[i].name);

        g_test_add_data_func(path, &damages[i], test_damage);
    }
    add("/thinvm/repair/free-range", test_free_range);
    add("/thinvm/repair/sizes", test_sizes);
    add("/thinvm/repair/pending", test_pending);
    add("/thinvm/repair/read-error", test_read_error);
    g_test_add_func("/thinvm/repair/recount", test_recount);
    return g_test_run();
}
