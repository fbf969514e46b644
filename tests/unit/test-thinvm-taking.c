/*
 * Clusters that become metadata although a page in memory maps them
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * An image lies: the count of a mapped cluster is 0.  Whoever takes that
 * cluster for metadata must find out (design invariant 3), though he looks at
 * the pages step by step, and though these are copied, split, made runs of
 * and dropped between the steps.  And he must not find what is not there.
 */
#include "qemu/osdep.h"
#include "block/thinvm/state-int.h"

#define CLUSTER_BITS    16
#define LEAVES          200
#define SPAN            THINVM_ENTRIES_PER_LEAF

typedef enum Event {
    EVENT_NONE,
    EVENT_COPY,             /* all leaves, and the old ones go */
    EVENT_SPLIT,            /* all runs */
    EVENT_JOIN,             /* leaves to runs */
    NB_EVENTS
} Event;

typedef struct Fixture {
    ThinvmState *s;
    uint64_t physical[LEAVES];      /* of the first cluster of each leaf */
} Fixture;

/* Nothing is ever written, so no page is ever wanted */
static int execute(Fixture *f, const ThinvmOp *op)
{
    ThinvmNeeds needs;
    int ret;

    thinvm_needs_init(&needs);
    thinvm_state_lock(f->s);
    ret = thinvm_state_prepare(f->s, op, false, &needs, NULL);
    g_assert_cmpint(ret, !=, -EAGAIN);
    if (ret == 0) {
        thinvm_state_apply(f->s, op);
    }
    thinvm_needs_destroy(f->s, &needs);
    thinvm_state_unlock(f->s);
    return ret;
}

static uint64_t reserve(Fixture *f, uint64_t goal, uint64_t nb)
{
    ThinvmNeeds needs;
    uint64_t first, found;

    thinvm_needs_init(&needs);
    thinvm_state_lock(f->s);
    g_assert_cmpint(thinvm_space_reserve(f->s, goal, nb, &first, &found,
                                         &needs), ==, 0);
    thinvm_needs_destroy(f->s, &needs);
    thinvm_state_unlock(f->s);
    g_assert_cmpuint(found, ==, nb);
    return first;
}

static void provide_metadata(Fixture *f)
{
    bool urgent;
    uint64_t wanted;

    while ((wanted = thinvm_space_metadata_wanted(f->s, &urgent)) > 0) {
        ThinvmOp op = { .type = THINVM_OP_META_EXTEND, .count = wanted };

        op.physical = reserve(f, 0, wanted);
        g_assert_cmpint(execute(f, &op), ==, 0);
    }
}

/* One entry of the leaf at @guest, or all of them */
static uint64_t map(Fixture *f, uint64_t guest, uint64_t count)
{
    ThinvmOp op = {
        .type = THINVM_OP_MAP, .guest = guest, .count = count,
        .valid = THINVM_ALL_VALID, .physical = reserve(f, 0, count),
    };

    provide_metadata(f);
    g_assert_cmpint(execute(f, &op), ==, 0);
    return op.physical;
}

static void map_run(Fixture *f, unsigned leaf)
{
    ThinvmOp op = {
        .type = THINVM_OP_MAP_RUN, .guest = leaf * SPAN,
        .valid = THINVM_ALL_VALID, .physical = reserve(f, 0, SPAN),
    };

    provide_metadata(f);
    g_assert_cmpint(execute(f, &op), ==, 0);
    f->physical[leaf] = op.physical;
}

static void init(Fixture *f, Event event)
{
    ThinvmSuperblock sb = {
        .version_major = THINVM_VERSION_MAJOR,
        .cluster_bits = CLUSTER_BITS,
        .journal_offset = THINVM_JOURNAL_OFFSET,
        .journal_size = THINVM_MIN_JOURNAL_SIZE,
        .virtual_size = (uint64_t)LEAVES * SPAN << CLUSTER_BITS,
        .device_clusters = 1 << 20,
    };

    memset(f, 0, sizeof(*f));
    memset(&sb.uuid, 0xa5, sizeof(sb.uuid));
    f->s = thinvm_state_new_empty(&sb, 256 * MiB, &error_abort);
    provide_metadata(f);
    for (unsigned i = 0; i < LEAVES; i++) {
        if (event == EVENT_SPLIT) {
            map_run(f, i);
        } else {
            f->physical[i] = map(f, i * SPAN, event == EVENT_JOIN ? SPAN : 1);
        }
    }
}

static void lie(Fixture *f, uint64_t cluster)
{
    ThinvmNeeds needs;

    thinvm_needs_init(&needs);
    thinvm_state_lock(f->s);
    g_assert_cmpint(thinvm_repair_cluster_count(f->s, cluster, 0, &needs), ==,
                    0);
    thinvm_needs_destroy(f->s, &needs);
    thinvm_state_unlock(f->s);
}

static void snapshot(Fixture *f)
{
    ThinvmSnapshot snap = { .icount = UINT64_MAX, .name = "s", .id = 1 };
    ThinvmOp op = { .type = THINVM_OP_SNAPSHOT_CREATE, .snapshot = &snap };

    g_assert_cmpint(execute(f, &op), ==, 0);
}

/* Every leaf gets a copy with an entry more */
static void copy_all(Fixture *f)
{
    for (unsigned i = 0; i < LEAVES; i++) {
        map(f, i * SPAN + 7, 1);
    }
}

static void checkpoint(Fixture *f)
{
    ThinvmFrozen *frozen;

    thinvm_state_lock(f->s);
    frozen = thinvm_state_freeze(f->s);
    thinvm_state_unlock(f->s);
    for (unsigned i = 0; i < frozen->nb_pages; i++) {
        uint64_t number;

        thinvm_frozen_complete_page(f->s, frozen, i, &number);
    }
    thinvm_frozen_complete(f->s, frozen);
    thinvm_state_lock(f->s);
    thinvm_state_thaw(f->s, frozen);
    thinvm_state_unlock(f->s);
}

static void happen(Fixture *f, Event event)
{
    switch (event) {
    case EVENT_COPY:
    case EVENT_SPLIT:
        copy_all(f);
        break;
    case EVENT_JOIN:
        checkpoint(f);
        break;
    default:
        break;
    }
}

/* What META_EXTEND says of the cluster, in the end */
static int take(Fixture *f, uint64_t cluster, unsigned steps, Event event)
{
    ThinvmOp op = {
        .type = THINVM_OP_META_EXTEND, .physical = cluster, .count = 1,
    };
    int ret = -EAGAIN;

    thinvm_state_lock(f->s);
    thinvm_taking_begin(f->s, cluster, 1);
    for (unsigned i = 0; i < steps && ret == -EAGAIN; i++) {
        ret = thinvm_taking_step(f->s);
    }
    thinvm_state_unlock(f->s);
    happen(f, event);
    thinvm_state_lock(f->s);
    /* What is read now may not map it either */
    g_assert_true(f->s->bounds.clusters_are_metadata(f->s, cluster, 1));
    g_assert_false(f->s->bounds.clusters_are_metadata(f->s, cluster + 1, 1));
    do {
        ret = thinvm_taking_step(f->s);
    } while (ret == -EAGAIN);
    g_assert_cmpint(ret, ==, 0);
    thinvm_state_unlock(f->s);
    ret = execute(f, &op);
    thinvm_state_lock(f->s);
    thinvm_taking_end(f->s);
    thinvm_state_unlock(f->s);
    return ret;
}

/* @steps: how many are made before it happens */
static void test_lies(const void *opaque)
{
    static const unsigned where[] = { 0, 1, 63, 64, 100, 198, 199 };
    Event event = GPOINTER_TO_INT(opaque);

    for (unsigned i = 0; i < G_N_ELEMENTS(where); i++) {
        for (unsigned steps = 0; steps < 8; steps++) {
            Fixture f;

            init(&f, event);
            if (event == EVENT_COPY) {
                checkpoint(&f);     /* else they are changed where they are */
            }
            lie(&f, f.physical[where[i]]);
            g_assert_cmpint(take(&f, f.physical[where[i]], steps, event), ==,
                            -EBADMSG);
            thinvm_state_free(f.s);
        }
    }
}

static void test_honest(const void *opaque)
{
    Event event = GPOINTER_TO_INT(opaque);

    for (unsigned steps = 0; steps < 8; steps++) {
        uint64_t free;
        Fixture f;

        init(&f, event);
        snapshot(&f);
        free = reserve(&f, 0, 2);
        g_assert_cmpint(take(&f, free, steps, event), ==, 0);
        g_assert_true(f.s->bounds.clusters_are_metadata(f.s, free, 1));
        thinvm_state_free(f.s);
    }
}

/* As in replay: the operation comes out of the blue */
static void test_unprepared(void)
{
    ThinvmOp op = { .type = THINVM_OP_META_EXTEND, .count = 1 };
    Fixture f;

    init(&f, EVENT_NONE);
    op.physical = f.physical[LEAVES / 2];
    lie(&f, op.physical);
    g_assert_cmpint(execute(&f, &op), ==, -EBADMSG);
    thinvm_state_free(f.s);
}

int main(int argc, char **argv)
{
    static const char *const names[] = { "none", "copy", "split", "join" };

    g_test_init(&argc, &argv, NULL);
    for (int i = 0; i < NB_EVENTS; i++) {
        g_autofree char *lies = g_strdup_printf("/thinvm/taking/lies/%s",
                                                names[i]);
        g_autofree char *honest = g_strdup_printf("/thinvm/taking/honest/%s",
                                                  names[i]);

        g_test_add_data_func(lies, GINT_TO_POINTER(i), test_lies);
        g_test_add_data_func(honest, GINT_TO_POINTER(i), test_honest);
    }
    g_test_add_func("/thinvm/taking/unprepared", test_unprepared);
    return g_test_run();
}
