/*
 * The tree of thinvm's snapshots against a simple model
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A disk of a few clusters, each write of which takes a new cluster, so that
 * what a snapshot holds is told by the numbers of its clusters.  The model
 * keeps those numbers, those of the VM state, the disk's size and the links of
 * the tree.  Trees of several shapes are deleted in every order; after each
 * deletion every snapshot that is left reads as before, parents are who they
 * should be, the clusters in use are exactly those that somebody names (design
 * invariant 4), and those may be written in place that the disk alone has.
 */
#include "qemu/osdep.h"
#include "block/thinvm/state.h"

#define CLUSTER_BITS    16
#define DISK            24          /* guest clusters, far apart */
#define STRIDE          300         /* so that several leaves are touched */
#define VMSTATE         3           /* its clusters */
#define MAX_SNAPSHOTS   128

typedef struct Node {
    uint64_t id;
    uint64_t parent;                /* id; 0: none */
    bool present;                   /* listed */
    bool exists;                    /* has a record that is in the tree */
    uint64_t cluster[DISK], vmstate[VMSTATE];
    uint64_t size, vmstate_size;
} Node;

typedef struct Fixture {
    ThinvmState *s;
    uint64_t disk[DISK], vmstate[VMSTATE];
    uint64_t size, vmstate_size;
    uint64_t current;
    Node node[MAX_SNAPSHOTS];
    unsigned nb;
    GRand *rand;
} Fixture;

/* ------------------------------------------------------------------ */
/* The engine.  Nothing is ever written, so no page is ever wanted      */

static int execute_once(Fixture *f, const ThinvmOp *op, Error **errp)
{
    ThinvmNeeds needs;
    int ret;

    thinvm_needs_init(&needs);
    thinvm_state_lock(f->s);
    ret = thinvm_state_prepare(f->s, op, false, &needs, errp);
    g_assert_cmpint(ret, !=, -EAGAIN);
    if (ret == 0) {
        thinvm_state_apply(f->s, op);
    }
    thinvm_needs_destroy(f->s, &needs);
    thinvm_state_unlock(f->s);
    return ret;
}

static void reclaim(Fixture *f)
{
    GArray *freed;

    thinvm_state_lock(f->s);
    freed = thinvm_space_take_freed(f->s);
    for (unsigned i = 0; freed && i < freed->len; i++) {
        ThinvmFreedRange *r = &g_array_index(freed, ThinvmFreedRange, i);

        thinvm_space_unbusy(f->s, r->first, r->nb_clusters);
    }
    if (freed) {
        g_array_unref(freed);
    }
    thinvm_state_unlock(f->s);
}

static uint64_t reserve(Fixture *f, uint64_t max, uint64_t *nb)
{
    ThinvmNeeds needs;
    uint64_t first;

    thinvm_needs_init(&needs);
    thinvm_state_lock(f->s);
    g_assert_cmpint(thinvm_space_reserve(f->s, 0, max, &first, nb, &needs),
                    ==, 0);
    thinvm_needs_destroy(f->s, &needs);
    thinvm_state_unlock(f->s);
    return first;
}

/* What the durability layer does before prepare */
static void choose_slot(Fixture *f, ThinvmOp *op)
{
    ThinvmNeeds needs;

    thinvm_needs_init(&needs);
    thinvm_state_lock(f->s);
    g_assert_cmpint(thinvm_snapshot_choose_slot(f->s, op, &needs), ==, 0);
    thinvm_needs_destroy(f->s, &needs);
    thinvm_state_unlock(f->s);
}

static int execute(Fixture *f, ThinvmOp *op, Error **errp)
{
    bool urgent;
    uint64_t wanted;
    int ret;

    while ((wanted = thinvm_space_metadata_wanted(f->s, &urgent)) > 0) {
        ThinvmOp extend = { .type = THINVM_OP_META_EXTEND };

        extend.physical = reserve(f, wanted, &extend.count);
        g_assert_cmpint(execute_once(f, &extend, &error_abort), ==, 0);
    }
    choose_slot(f, op);
    ret = execute_once(f, op, errp);
    reclaim(f);
    return ret;
}

static int read_record(Fixture *f, uint32_t slot, ThinvmSnapshot *snap)
{
    ThinvmNeeds needs;
    int ret;

    thinvm_needs_init(&needs);
    thinvm_state_lock(f->s);
    ret = thinvm_snapshot_read(f->s, slot, snap, &needs, &error_abort);
    thinvm_needs_destroy(f->s, &needs);
    thinvm_state_unlock(f->s);
    return ret;
}

/* -1: there is no record with this id */
static int64_t find(Fixture *f, uint64_t id, ThinvmSnapshot *snap)
{
    for (uint32_t i = 0; i < thinvm_snapshot_nb_slots(f->s); i++) {
        if (read_record(f, i, snap) == 0 && snap->id == id) {
            return i;
        }
    }
    return -1;
}

static void init(Fixture *f)
{
    ThinvmSuperblock sb = {
        .version_major = THINVM_VERSION_MAJOR,
        .cluster_bits = CLUSTER_BITS,
        .journal_offset = THINVM_JOURNAL_OFFSET,
        .journal_size = THINVM_MIN_JOURNAL_SIZE,
        .virtual_size = (uint64_t)DISK * STRIDE << CLUSTER_BITS,
        .device_clusters = 200000,
    };

    memset(f, 0, sizeof(*f));
    memset(&sb.uuid, 0xa5, sizeof(sb.uuid));
    f->s = thinvm_state_new_empty(&sb, 256 * MiB, &error_abort);
    f->size = sb.virtual_size;
    f->rand = g_rand_new_with_seed(1);
}

static void destroy(Fixture *f)
{
    thinvm_state_free(f->s);
    g_rand_free(f->rand);
}

/* ------------------------------------------------------------------ */
/* What is done to both                                                */

static void write_tree(Fixture *f, int tree, unsigned i, uint64_t *cluster)
{
    uint64_t nb;
    ThinvmOp op = {
        .type = THINVM_OP_MAP, .tree = tree, .guest = i * STRIDE, .count = 1,
        .physical = reserve(f, 1, &nb), .valid = THINVM_ALL_VALID,
    };

    g_assert_cmpint(execute(f, &op, &error_abort), ==, 0);
    cluster[i] = op.physical;
}

static void write_cluster(Fixture *f, unsigned i)
{
    write_tree(f, THINVM_TREE_DISK, i, f->disk);
}

static void write_vmstate(Fixture *f)
{
    ThinvmOp op = {
        .type = THINVM_OP_VMSTATE_SIZE,
        .value = g_rand_int_range(f->rand, 1, 1 << 20),
    };

    for (unsigned i = 0; i < VMSTATE; i++) {
        write_tree(f, THINVM_TREE_VMSTATE, i, f->vmstate);
    }
    g_assert_cmpint(execute(f, &op, &error_abort), ==, 0);
    f->vmstate_size = op.value;
}

static void resize(Fixture *f)
{
    ThinvmOp op = { .type = THINVM_OP_RESIZE, .value = f->size + MiB };

    g_assert_cmpint(execute(f, &op, &error_abort), ==, 0);
    f->size = op.value;
}

static int create(Fixture *f, Error **errp)
{
    ThinvmSnapshot snap = {
        .icount = UINT64_MAX, .name = "s",
        .id = thinvm_snapshot_next_id(f->s),
    };
    ThinvmOp op = { .type = THINVM_OP_SNAPSHOT_CREATE, .snapshot = &snap };
    int ret = execute(f, &op, errp);

    if (ret == 0 && f->nb < MAX_SNAPSHOTS) {
        Node *n = &f->node[f->nb++];

        *n = (Node) {
            .id = snap.id, .parent = f->current,
            .present = true, .exists = true,
            .size = f->size, .vmstate_size = f->vmstate_size,
        };
        memcpy(n->cluster, f->disk, sizeof(f->disk));
        memcpy(n->vmstate, f->vmstate, sizeof(f->vmstate));
    }
    if (ret == 0) {
        memset(f->vmstate, 0, sizeof(f->vmstate));
        f->vmstate_size = 0;
    }
    f->current = ret == 0 ? snap.id : f->current;
    return ret;
}

/* All steps that one record can take */
static void delete_record(Fixture *f, uint64_t id)
{
    ThinvmSnapshot snap;
    ThinvmOp op = { .type = THINVM_OP_SNAPSHOT_DELETE_STEP, .value = id };
    int64_t slot = find(f, id, &snap);

    g_assert_cmpint(slot, >=, 0);
    op.guest = slot;
    while (execute(f, &op, NULL) == 0) {
        /* until it is gone, or waits */
    }
}

/* One that goes may set its parent free; the oldest first is as good as any */
static void collect(Fixture *f)
{
    ThinvmSnapshot snap;
    bool again;

    do {
        again = false;
        for (uint32_t i = 0; i < thinvm_snapshot_nb_slots(f->s); i++) {
            if (read_record(f, i, &snap) == 0 &&
                (snap.flags & THINVM_SNAPSHOT_HIDDEN)) {
                delete_record(f, snap.id);
                again |= find(f, snap.id, &snap) < 0;
            }
        }
    } while (again);
}

static Node *model_find(Fixture *f, uint64_t id)
{
    for (unsigned i = 0; i < f->nb; i++) {
        if (f->node[i].id == id) {
            return &f->node[i];
        }
    }
    return NULL;
}

/* Those that are not present and have one child at most leave the tree */
static void model_collect(Fixture *f)
{
    bool again;

    do {
        again = false;
        for (unsigned i = 0; i < f->nb; i++) {
            Node *n = &f->node[i], *child = NULL;
            unsigned nb = f->current == n->id;

            for (unsigned j = 0; j < f->nb; j++) {
                if (f->node[j].exists && f->node[j].parent == n->id) {
                    child = &f->node[j];
                    nb++;
                }
            }
            if (!n->exists || n->present || nb > 1) {
                continue;
            }
            if (child) {
                child->parent = n->parent;
            } else if (nb) {
                f->current = n->parent;
            }
            n->exists = false;
            again = true;
        }
    } while (again);
}

static void delete(Fixture *f, unsigned i)
{
    delete_record(f, f->node[i].id);
    collect(f);
    f->node[i].present = false;
    model_collect(f);
}

static void go_back(Fixture *f, unsigned i)
{
    ThinvmSnapshot snap;
    ThinvmOp op = {
        .type = THINVM_OP_SNAPSHOT_GOTO, .value = f->node[i].id,
        .physical = thinvm_snapshot_next_id(f->s),
    };
    int64_t slot = find(f, op.value, &snap);

    g_assert_cmpint(slot, >=, 0);
    op.guest = slot;
    g_assert_cmpint(execute(f, &op, &error_abort), ==, 0);
    collect(f);
    memcpy(f->disk, f->node[i].cluster, sizeof(f->disk));
    memcpy(f->vmstate, f->node[i].vmstate, sizeof(f->vmstate));
    f->size = f->node[i].size;
    f->vmstate_size = f->node[i].vmstate_size;
    f->current = op.value;
    model_collect(f);
}

/* ------------------------------------------------------------------ */
/* Comparing                                                           */

static void lookup(Fixture *f, int tree, const ThinvmPointer *root, unsigned i,
                   ThinvmMapping *m)
{
    ThinvmNeeds needs;

    thinvm_needs_init(&needs);
    g_assert_cmpint(thinvm_state_lookup(f->s, tree, root, i * STRIDE, 1, !root,
                                        m, &needs), ==, 0);
    thinvm_state_lock(f->s);
    thinvm_needs_destroy(f->s, &needs);
    thinvm_state_unlock(f->s);
}

static void compare_tree(Fixture *f, int tree, const ThinvmPointer *root,
                         const uint64_t *cluster, GHashTable *used)
{
    unsigned nb = tree == THINVM_TREE_DISK ? DISK : VMSTATE;

    for (unsigned i = 0; i < nb; i++) {
        ThinvmMapping m;

        lookup(f, tree, root, i, &m);
        g_assert_cmpuint(m.type == THINVM_MAPPING_DATA ? m.physical : 0, ==,
                         cluster[i]);
        if (cluster[i]) {
            g_hash_table_add(used, GUINT_TO_POINTER(cluster[i]));
        }
    }
}

/* A write goes in place if no snapshot has the cluster, and only then */
static void compare_private(Fixture *f)
{
    for (unsigned i = 0; i < DISK; i++) {
        bool shared = false;
        ThinvmMapping m;

        for (unsigned j = 0; j < f->nb; j++) {
            shared |= f->node[j].present &&
                      f->node[j].cluster[i] == f->disk[i];
        }
        lookup(f, THINVM_TREE_DISK, NULL, i, &m);
        if (f->disk[i]) {
            g_assert_cmpint(m.shared, ==, shared);
        }
    }
}

static void compare_snapshot(Fixture *f, const ThinvmSnapshot *snap,
                             const Node *n, GHashTable *used)
{
    compare_tree(f, THINVM_TREE_DISK, &snap->root, n->cluster, used);
    compare_tree(f, THINVM_TREE_VMSTATE, &snap->vmstate_root, n->vmstate,
                 used);
    g_assert_cmpuint(snap->virtual_size, ==, n->size);
    g_assert_cmpuint(snap->vmstate_size, ==, n->vmstate_size);
}

static void compare(Fixture *f)
{
    g_autoptr(GHashTable) used = g_hash_table_new(NULL, NULL);
    ThinvmSnapshot snap;
    ThinvmInfoState info;
    unsigned records = 0;

    compare_tree(f, THINVM_TREE_DISK, NULL, f->disk, used);
    compare_tree(f, THINVM_TREE_VMSTATE, NULL, f->vmstate, used);
    compare_private(f);
    for (uint32_t i = 0; i < thinvm_snapshot_nb_slots(f->s); i++) {
        Node *n;

        if (read_record(f, i, &snap) < 0) {
            continue;
        }
        n = model_find(f, snap.id);
        g_assert_nonnull(n);
        g_assert_true(n->exists);
        g_assert_cmpuint(snap.parent_id, ==, n->parent);
        g_assert_cmpint(!(snap.flags & THINVM_SNAPSHOT_HIDDEN), ==,
                        n->present);
        if (n->present) {
            compare_snapshot(f, &snap, n, used);
        } else {
            g_assert_cmpint(snap.root.type, !=, THINVM_PTR_PAGE);
            g_assert_cmpint(snap.vmstate_root.type, !=, THINVM_PTR_PAGE);
        }
        records++;
    }
    for (unsigned i = 0; i < f->nb; i++) {
        records -= f->node[i].exists;
    }
    g_assert_cmpuint(records, ==, 0);
    thinvm_state_info(f->s, &info);
    g_assert_cmpuint(info.allocated_clusters, ==, g_hash_table_size(used));
    g_assert_cmpuint(info.current_snapshot_id, ==, f->current);
    g_assert_cmpuint(info.virtual_size, ==, f->size);
    g_assert_cmpuint(info.vmstate_size, ==, f->vmstate_size);
}

/* ------------------------------------------------------------------ */
/* Every order                                                         */

/*
 * A tree as a list of steps: a letter goes back to that snapshot, 's' takes
 * one; every other one has VM state.  Before each a few clusters are written.
 */
static const char *const shapes[] = {
    "sssss",                /* a chain */
    "sAsAsAsAs",            /* all children of the first */
    "sssBssA",              /* two branches, the disk a third */
    "ssAssC",               /* the disk on a leaf */
    "sssAsBs",              /* branches of branches */
    "ssBABs",               /* disks with VM state that are left */
};

static unsigned build(Fixture *f, const char *shape)
{
    unsigned n = 0;

    for (; *shape; shape++) {
        for (int i = 0; i < 4; i++) {
            write_cluster(f, g_rand_int_range(f->rand, 0, DISK));
        }
        if (*shape == 's') {
            if (n % 2) {
                write_vmstate(f);
            } else {
                resize(f);
            }
            g_assert_cmpint(create(f, &error_abort), ==, 0);
            n++;
        } else {
            go_back(f, *shape - 'A');
        }
    }
    write_cluster(f, 0);
    return n;
}

/* The @number'th permutation of n things */
static void permutation(unsigned number, unsigned n, unsigned *order)
{
    for (unsigned i = 0; i < n; i++) {
        order[i] = i;
    }
    for (unsigned i = n; i > 1; number /= i, i--) {
        unsigned j = number % i, swap = order[i - 1];

        order[i - 1] = order[j];
        order[j] = swap;
    }
}

static void test_every_order(const void *opaque)
{
    const char *shape = opaque;
    unsigned order[MAX_SNAPSHOTS], n, orders = 1;

    for (unsigned number = 0; number < orders; number++) {
        Fixture f;

        init(&f);
        n = build(&f, shape);
        compare(&f);
        for (unsigned i = 2, all = 1; i <= n; i++) {
            orders = all *= i;
        }
        permutation(number, n, order);
        for (unsigned i = 0; i < n; i++) {
            delete(&f, order[i]);
            compare(&f);
            write_cluster(&f, i);
        }
        g_assert_cmpuint(thinvm_snapshot_nb_slots(f.s), ==, 0);
        destroy(&f);
    }
}

/* What others have, too, goes in one step, however much it is */
static void test_steps(void)
{
    ThinvmOp step = { .type = THINVM_OP_SNAPSHOT_DELETE_STEP, .value = 1 };
    ThinvmSnapshot snap;
    unsigned nb = 0;
    Fixture f;

    init(&f);
    for (unsigned i = 0; i < DISK; i++) {
        write_cluster(&f, i);
    }
    g_assert_cmpint(create(&f, &error_abort), ==, 0);
    while (find(&f, 1, &snap) >= 0) {
        g_assert_cmpint(execute(&f, &step, &error_abort), ==, 0);
        nb++;
    }
    /* Hide it, give up the root, take the record away */
    g_assert_cmpuint(nb, ==, 3);
    destroy(&f);
}

/* A hundred generations, each tenth of them with a branch */
static void test_deep(void)
{
    Fixture f;
    unsigned deleted = 0;

    init(&f);
    for (unsigned i = 0; i < 100; i++) {
        write_cluster(&f, g_rand_int_range(f.rand, 0, DISK));
        g_assert_cmpint(create(&f, &error_abort), ==, 0);
        if (i % 10 == 5) {
            unsigned here = f.nb - 1;

            write_cluster(&f, 1);
            g_assert_cmpint(create(&f, &error_abort), ==, 0);
            go_back(&f, here);
        }
    }
    compare(&f);
    while (deleted < f.nb) {
        unsigned i = g_rand_int_range(f.rand, 0, f.nb);

        if (f.node[i].present) {
            delete(&f, i);
            deleted++;
        }
        if (deleted % 8 == 0) {
            compare(&f);
        }
    }
    compare(&f);
    destroy(&f);
}

/* ------------------------------------------------------------------ */
/* Slots and limits                                                    */

static void test_slots_are_used_again(void)
{
    Fixture f;

    init(&f);
    for (unsigned i = 0; i < 5000; i++) {
        f.nb = f.nb == 4 ? 3 : f.nb;
        g_assert_cmpint(create(&f, &error_abort), ==, 0);
        if (f.nb == 4) {
            uint64_t oldest = f.node[0].id;

            delete_record(&f, oldest);
            memmove(f.node, f.node + 1, 3 * sizeof(f.node[0]));
            f.node[0].parent = 0;
        }
        g_assert_cmpuint(thinvm_snapshot_nb_slots(f.s), <=, 4);
    }
    destroy(&f);
}

static void refuse_slot(Fixture *f, ThinvmOp *op, uint64_t count,
                        const char *says)
{
    g_autoptr(Error) err = NULL;

    op->count = count;
    g_assert_cmpint(execute_once(f, op, &err), ==, -EBADMSG);
    g_assert_nonnull(strstr(error_get_pretty(err), says));
}

/* What an operation says is done, as in 1.0 where it says nothing */
static void test_slot_is_said(const void *opaque)
{
    bool is_goto = opaque;
    ThinvmSnapshot snap = { .icount = UINT64_MAX, .name = "s" };
    ThinvmOp op = { .type = THINVM_OP_SNAPSHOT_CREATE, .snapshot = &snap };
    Fixture f;

    init(&f);
    snap.id = 1;
    refuse_slot(&f, &op, 1, "slot 0 of the new snapshot is not one of the 0");
    for (int i = 0; i < 12; i++) {
        write_cluster(&f, i);
        g_assert_cmpint(create(&f, &error_abort), ==, 0);
    }
    delete_record(&f, 3);
    delete_record(&f, 10);
    snap.id = 13;
    if (is_goto) {
        op = (ThinvmOp) {
            .type = THINVM_OP_SNAPSHOT_GOTO, .guest = 4, .value = 5,
            .physical = 13,
        };
    }
    refuse_slot(&f, &op, 2, "slot 1 of the new snapshot is not free, but has "
                "snapshot 2");
    refuse_slot(&f, &op, 12, "not free");
    refuse_slot(&f, &op, 13, "slot 12 of the new snapshot is not one of the "
                "12 ");
    refuse_slot(&f, &op, 524288, "not one of the 12 ");

    /* A journal of version 1.0, whatever holes there are */
    op.count = 0;
    g_assert_cmpint(execute_once(&f, &op, &error_abort), ==, 0);
    g_assert_cmpint(find(&f, 13, &snap), ==, 12);
    g_assert_cmpuint(thinvm_snapshot_nb_slots(f.s), ==, 13);

    /* Not the lowest: another program may choose as it likes */
    snap.id = op.physical = 14;
    op.count = 10;
    g_assert_cmpint(execute_once(&f, &op, &error_abort), ==, 0);
    g_assert_cmpint(find(&f, 14, &snap), ==, 9);

    /* This one takes the lowest, until there is none */
    choose_slot(&f, &op);
    g_assert_cmpuint(op.count, ==, 3);
    snap = (ThinvmSnapshot) { .icount = UINT64_MAX, .id = 15 };
    op.physical = 15;
    g_assert_cmpint(execute_once(&f, &op, &error_abort), ==, 0);
    g_assert_cmpint(find(&f, 15, &snap), ==, 2);
    choose_slot(&f, &op);
    g_assert_cmpuint(op.count, ==, 0);
    g_assert_cmpuint(thinvm_snapshot_nb_slots(f.s), ==, 13);

    op = (ThinvmOp) { .type = THINVM_OP_SNAPSHOT_PROTECT, .count = 1 };
    choose_slot(&f, &op);
    g_assert_cmpuint(op.count, ==, 1);
    destroy(&f);
}

static void test_limit(void)
{
    const uint64_t limit = THINVM_MAX_ROOTS / 2 - 1;
    g_autoptr(Error) err = NULL;
    ThinvmSnapshot snap;
    Fixture f;

    init(&f);
    write_cluster(&f, 0);
    for (uint64_t i = 0; i < limit; i++) {
        g_assert_cmpint(create(&f, &error_abort), ==, 0);
    }
    g_assert_cmpint(create(&f, &err), ==, -EOVERFLOW);
    g_assert_nonnull(strstr(error_get_pretty(err), "32499 is the limit"));

    /* The count of the root page still says how often it is named */
    delete_record(&f, 700);
    g_assert_cmpint(find(&f, 700, &snap), ==, -1);
    g_assert_cmpint(create(&f, &error_abort), ==, 0);
    g_assert_cmpint(find(&f, limit + 1, &snap), ==, 699);
    g_assert_cmpint(create(&f, NULL), ==, -EOVERFLOW);
    destroy(&f);
}

/* What is protected stays, and is deleted like others when it no longer is */
static void test_protected(void)
{
    ThinvmOp protect = { .type = THINVM_OP_SNAPSHOT_PROTECT, .count = 1 };
    ThinvmOp step = { .type = THINVM_OP_SNAPSHOT_DELETE_STEP };
    g_autoptr(Error) err = NULL;
    Fixture f;

    init(&f);
    write_cluster(&f, 0);
    create(&f, &error_abort);
    write_cluster(&f, 0);
    protect.value = step.value = f.node[0].id;
    g_assert_cmpint(execute(&f, &protect, &error_abort), ==, 0);
    g_assert_cmpint(execute(&f, &protect, NULL), ==, -EALREADY);
    g_assert_cmpint(execute(&f, &step, &err), ==, -EPERM);
    g_assert_nonnull(strstr(error_get_pretty(err), "protected"));
    compare(&f);
    protect.count = 0;
    g_assert_cmpint(execute(&f, &protect, &error_abort), ==, 0);
    g_assert_cmpint(execute(&f, &step, &error_abort), ==, 0);
    /* on its way out it can be protected no more */
    protect.count = 1;
    g_assert_cmpint(execute(&f, &protect, NULL), ==, -ENOENT);
    f.node[0].present = false;
    collect(&f);
    model_collect(&f);
    compare(&f);
    destroy(&f);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    for (unsigned i = 0; i < ARRAY_SIZE(shapes); i++) {
        g_autofree char *name =
            g_strdup_printf("/thinvm/snapshots/every-order/%s", shapes[i]);

        g_test_add_data_func(name, shapes[i], test_every_order);
    }
    g_test_add_func("/thinvm/snapshots/steps", test_steps);
    g_test_add_func("/thinvm/snapshots/deep", test_deep);
    g_test_add_func("/thinvm/snapshots/slots-are-used-again",
                    test_slots_are_used_again);
    g_test_add_data_func("/thinvm/snapshots/slot-is-said/create", NULL,
                         test_slot_is_said);
    g_test_add_data_func("/thinvm/snapshots/slot-is-said/goto", "goto",
                         test_slot_is_said);
    g_test_add_func("/thinvm/snapshots/limit", test_limit);
    g_test_add_func("/thinvm/snapshots/protected", test_protected);
    return g_test_run();
}
