/*
 * Power cuts at every point of an image's life, on a simulated device
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Concurrent coroutines write, unmap, resize, take, delete and go back to
 * snapshots, read, flush, change modes, checkpoint and reclaim, the device
 * grows, other hosts follow and take over, in an order that a seed decides
 * (thinvm-crash-steps.c).  At I/Os in between the device is copied as a power
 * cut, or the death of the process, might leave it.  The copy must open, must
 * pass the check without corruption and leak, and must read as a model allows
 * (thinvm-crash-model.h): never as anything else, least of all what was on
 * the device before the image.  A snapshot that exists has exactly what the
 * disk had when it was taken.  Some copies are cut again while they recover,
 * some live on with the same load to further cuts.
 *
 *   test-thinvm-crash [--cuts N] [--seed N] [--variant N] [--tries N]
 *                     [--steps LIST] [--every] [--fault NAME] [--no-shrink]
 *                     [--verbose]
 *
 * THINVM_CUTS and THINVM_SEED in the environment say the same.  A failure
 * prints the seed of the life in which it happened, and that life is then
 * shrunk: run again with ever fewer of its steps, as long as it still fails
 * (in some of --tries orders of their I/Os).  --steps replays what is left,
 * --verbose tells it.  --fault breaks a promise on purpose.
 */
#include "qemu/osdep.h"
#include "qemu/cutils.h"
#include "qemu/main-loop.h"
#include "qemu/module.h"
#include "thinvm-crash.h"
#include "thinvm-shrink.h"
#include "block/thinvm/store-int.h"

#define DEVICE_SIZE     (4 * MiB)
#define DEVICE_MAX      (24 * MiB)
/* With so few steps every I/O is cut, in every way */
#define FEW_STEPS       40
/* What the shrinker may spend */
#define SHRINK_TESTS    400
#define SHRINK_SECONDS  300
#define SHRINK_CUTS     "4000"
#define SHRINK_TRIES    "6"

typedef struct Options {
    uint64_t cuts, seed, variant, tries;
    const char *steps, *fault;
    bool every, no_shrink, verbose, shrink;
} Options;

/* Of the devices */
static const uint64_t discard_units[] = {
    0, 4 * IMAGE_CLUSTER, 3 * IMAGE_CLUSTER,
};

/* As in SimFault, then as in ImageFault */
static const char *const fault_names[] = {
    "flush", "tear", "discard", "fence", "epoch", "order", "follow", "copy",
    "move", "touch", "unmark",
};

/* One life, and what is done to it */
typedef struct Trial {
    Life life;
    SimRandom random;           /* of the cuts */
    unsigned cut_percent;       /* of the I/Os */
    bool every;                 /* all I/Os, in all ways */
    uint64_t ios, fence_at;     /* I/Os in this reign */
    bool power_cycled;          /* the device lost its cache in this reign */
    ThinvmStore *successor;     /* who has taken over, or NULL */
    Model *succeeded;           /* what it has found */
} Trial;

static Options options;
static SimFault device_fault;
static uint64_t cuts_left;
static struct {
    bool alive;
    uint64_t seed, variant;     /* of the life */
    uint64_t cuts, again, recovering, snapshots;
    uint64_t takeovers, handovers, grown, followed, summed, touched;
    const char *cut;            /* the one that is being verified */
} now;

static const char *cut_name(SimCut kind)
{
    static const char *const names[] = {
        [SIM_CUT_POWER] = "power, some of the cache lost",
        [SIM_CUT_NOTHING] = "power, all of the cache lost",
        [SIM_CUT_ALL] = "power, all of the cache kept",
        [SIM_CUT_PROCESS] = "process",
    };

    return names[kind];
}

static void G_GNUC_PRINTF(1, 2) fail(const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    vfprintf(stderr, fmt, ap);
    va_end(ap);
    fputc('\n', stderr);
    abort();
}

static uint64_t below(Trial *t, uint64_t n)
{
    return sim_random_below(&t->random, n);
}

/* ------------------------------------------------------------------ */
/* Judging what is there                                               */

typedef struct Verify {
    ThinvmSim *sim;
    ThinvmStore *st;
    const Model *model;         /* what is allowed */
    bool process_only;
    Model *found;
    uint64_t seed;              /* of cuts during recovery; 0: none */
} Verify;

static uint64_t virtual_size(ThinvmStore *st)
{
    ThinvmInfoState info;

    thinvm_state_lock(thinvm_store_state(st));
    thinvm_state_info(thinvm_store_state(st), &info);
    thinvm_state_unlock(thinvm_store_state(st));
    return info.virtual_size;
}

static void coroutine_fn verify_disk(Verify *v, uint64_t *tags)
{
    g_autofree uint8_t *buf = g_malloc(IMAGE_CLUSTER);
    uint64_t size = virtual_size(v->st);

    for (unsigned slot = 0; slot < NB_SLOTS; slot++) {
        uint64_t guest = slot_guest(slot);

        if ((guest + 1) * IMAGE_CLUSTER > size) {
            memset(buf, 0, IMAGE_CLUSTER);
        } else {
            g_assert_cmpint(image_read_both(v->sim, v->st, NULL, guest, buf),
                            ==, 0);
        }
        for (unsigned i = 0; i < IMAGE_SECTORS; i++) {
            unsigned sector = slot * IMAGE_SECTORS + i;

            tags[sector] = image_tag(buf + i * SIM_SECTOR,
                                     guest * IMAGE_SECTORS + i);
            if (!model_allows(v->model, sector, v->process_only,
                              tags[sector])) {
                const History *h = &v->model->sectors[sector];

                fail("Slot %u, sector %u has value %" PRId64 ", which it must "
                     "not have (of %u values from %" PRIu64 " to %" PRIu64
                     ")", slot, i, tags[sector], h->nb, h->values[0].tag,
                     h->values[h->nb - 1].tag);
            }
        }
    }
}

static void coroutine_fn verify_snapshot(Verify *v, const SnapshotModel *m,
                                         SnapshotModel **found)
{
    g_autofree uint8_t *buf = g_malloc(IMAGE_CLUSTER);
    ThinvmSnapshot snap;

    if (life_find_snapshot(v->st, m->id, &snap) < 0) {
        return;
    }
    *found = g_memdup2(m, sizeof(*m));
    if (snap.flags) {
        g_assert_true(m->deleting);
        (*found)->deleting = true;
        return;
    }
    (*found)->deleting = false;
    now.snapshots++;
    for (unsigned slot = 0; slot < NB_SLOTS; slot++) {
        uint64_t guest = slot_guest(slot);

        g_assert_cmpint(image_read_both(v->sim, v->st, &snap.root, guest, buf),
                        ==, 0);
        for (unsigned i = 0; i < IMAGE_SECTORS; i++) {
            uint64_t is = image_tag(buf + i * SIM_SECTOR,
                                    guest * IMAGE_SECTORS + i);
            uint64_t was = m->tags[slot * IMAGE_SECTORS + i];

            if (is != was) {
                fail("Snapshot %" PRIu64 ", slot %u, sector %u has value %"
                     PRId64 ", but had %" PRIu64, m->id, slot, i, is, was);
            }
        }
    }
}

/* All that can be read through @v->st; fills v->found */
static void coroutine_fn verify_all(Verify *v)
{
    g_autofree uint64_t *tags = g_new(uint64_t, NB_SECTORS);

    verify_disk(v, tags);
    v->found = model_new(tags, v->model->next_tag);
    for (unsigned i = 0; i < MAX_SNAPSHOTS; i++) {
        if (v->model->snapshots[i]) {
            verify_snapshot(v, v->model->snapshots[i],
                            &v->found->snapshots[i]);
        }
    }
}

static void coroutine_fn verify_entry(void *opaque)
{
    Verify *v = opaque;

    v->st = image_open(v->sim);
    thinvm_store_set_discard(v->st, true);
    image_check(v->st);
    /* only reads follow: cuts there would show nothing new */
    sim_set_hook(v->sim, NULL, NULL);
    verify_all(v);
    sim_finish(v->sim);
}

static void cut_recovery(void *opaque);

static void verify_run(Verify *v)
{
    if (v->seed) {
        sim_set_hook(v->sim, cut_recovery, v);
    }
    sim_start(v->sim, verify_entry, v);
    sim_run(v->sim);
}

static void verify_destroy(Verify *v)
{
    thinvm_store_free(v->st);
    if (v->found) {
        model_free(v->found);
    }
    sim_free(v->sim);
}

/* A cut while the image recovers from a cut: nothing more may be lost */
static void cut_recovery(void *opaque)
{
    Verify *before = opaque;
    SimRandom r = { before->seed };
    Verify v = {
        .model = before->model,
        .process_only = before->process_only,
    };

    before->seed = sim_random(&r) | 1;
    if (!cuts_left || !sim_random_chance(&r, 4)) {
        return;
    }
    cuts_left--;
    now.cuts++;
    now.recovering++;
    v.sim = sim_cut(before->sim, sim_random(&r),
                    sim_random_below(&r, SIM_CUT__MAX));
    verify_run(&v);
    verify_destroy(&v);
}

/* ------------------------------------------------------------------ */
/* Owners                                                              */

static ThinvmStore *coroutine_fn open_elsewhere(ThinvmSim *sim)
{
    ThinvmStore *st = thinvm_store_open(sim_attach(sim), 0, &error_abort);

    thinvm_store_set_discard(st, true);
    return st;
}

/* The old owner is fenced off, or dead, and perhaps still dying */
static void coroutine_fn takeover_entry(void *opaque)
{
    Trial *t = opaque;
    Life *l = &t->life;
    Verify v = {
        .sim = l->sim,
        .model = l->model,
        .process_only = !t->power_cycled,
    };

    v.st = l->follower ?: open_elsewhere(l->sim);
    l->follower = NULL;
    thinvm_store_begin_writing(v.st, ++l->epoch, &error_abort);
    verify_all(&v);
    t->successor = v.st;
    t->succeeded = v.found;
    sim_finish(l->sim);
}

static void take_over(Trial *t)
{
    Life *l = &t->life;

    now.takeovers++;
    l->down = true;
    t->power_cycled = below(t, 3) == 0;
    life_say("the owner is fenced off%s", t->power_cycled ?
             ", the device loses what is in its cache" : "");
    sim_fence(l->sim, l->st->dev);
    if (t->power_cycled) {
        sim_power_cycle(l->sim);
    }
    sim_start(l->sim, takeover_entry, t);
}

static void coroutine_fn handover_entry(void *opaque)
{
    Trial *t = opaque;
    Life *l = &t->life;
    ThinvmStore *next = l->follower ?: open_elsewhere(l->sim);
    uint64_t until = l->model->clock, sequence;
    bool flushed = below(t, 2);
    uint32_t crc;

    if (flushed) {
        thinvm_store_end_writing(l->st, below(t, 2), &error_abort);
        model_flushed(l->model, until);
    } else {
        thinvm_store_hand_over(l->st, &error_abort);
    }
    if (below(t, 2)) {
        thinvm_store_journal_end(l->st, &sequence, &crc);
        thinvm_store_expect_end(next, sequence, crc);
    }
    thinvm_store_begin_writing(next, ++l->epoch, &error_abort);
    if (!flushed) {
        model_flushed(l->model, until);
    }
    l->follower = l->st;
    l->st = next;
    sim_finish(l->sim);
}

static void coroutine_fn follower_entry(void *opaque)
{
    Life *l = opaque;

    l->follower = open_elsewhere(l->sim);
    sim_finish(l->sim);
}

static void begin_reign(Trial *t, bool last)
{
    Life *l = &t->life;

    t->ios = 0;
    t->fence_at = 0;
    t->power_cycled = false;
    if (!last && below(t, 3)) {
        t->fence_at = 1 + below(t, below(t, 2) ? 100 : 3000);
    }
    if (!l->follower && below(t, 2)) {
        sim_start(l->sim, follower_entry, l);
        sim_run(l->sim);
    }
    now.followed += l->follower != NULL;
}

/* The owner's reign is over */
static void count_sums(const Life *l)
{
    now.summed += l->st->nb_summed;
    now.touched += l->st->nb_touched;
    l->st->nb_summed = l->st->nb_touched = 0;
}

static void end_reign(Trial *t)
{
    Life *l = &t->life;

    t->fence_at = 0;
    if (t->successor) {
        thinvm_store_free(l->st);
        model_free(l->model);
        l->st = t->successor;
        l->model = t->succeeded;
        t->successor = NULL;
        l->down = false;
    } else {
        now.handovers++;
        life_say("the image is handed over");
        sim_start(l->sim, handover_entry, t);
        sim_run(l->sim);
        if (below(t, 2)) {
            thinvm_store_free(l->follower);
            l->follower = NULL;
        }
    }
}

static void coroutine_fn settle_entry(void *opaque)
{
    Life *l = opaque;

    life_resize(l, VIRTUAL_SIZE);
    sim_finish(l->sim);
}

static void at_io(void *opaque);

static void live_reigns(Trial *t, unsigned reigns)
{
    Life *l = &t->life;

    for (l->reign = 0; l->reign < reigns; l->reign++) {
        bool last = l->reign + 1 == reigns;

        life_say("reign %u of %u", l->reign + 1, reigns);
        begin_reign(t, last);
        sim_set_hook(l->sim, at_io, t);
        life_run(l);
        count_sums(l);
        if (t->successor || !last) {
            end_reign(t);
        }
        /* a cut, or the end of a reign, may have left the disk small */
        sim_start(l->sim, settle_entry, l);
        sim_run(l->sim);
        sim_set_hook(l->sim, NULL, NULL);
    }
    thinvm_store_free(l->follower);
    l->follower = NULL;
}

/* ------------------------------------------------------------------ */
/* Cuts                                                                */

static void live_on(Verify *v, Trial *before)
{
    Trial next = {
        .life = {
            .sim = v->sim,
            .st = v->st,
            .model = g_steal_pointer(&v->found),
            .seed = before->life.seed,
            .generation = before->life.generation + 1,
            .steps = 10,
            .tight = before->life.tight,
            .calm = before->life.calm,
            .small_records = before->life.small_records,
            .template = before->life.template,
            .epoch = before->life.epoch + 1,
        },
        .random.state = sim_random(&before->random),
        .cut_percent = before->every ? 20 : 3,
    };

    now.again++;
    sim_start(v->sim, settle_entry, &next.life);
    sim_run(v->sim);
    live_reigns(&next, 1 + below(&next, 2));
    v->st = next.life.st;
    v->found = next.life.model;
}

static void cut(Trial *t, SimCut kind)
{
    Life *l = &t->life;
    Verify v = {
        .model = l->model,
        .process_only = kind == SIM_CUT_PROCESS && !t->power_cycled,
    };

    if (!cuts_left) {
        return;
    }
    cuts_left--;
    now.cuts++;
    now.cut = cut_name(kind);
    life_say("cut %" PRIu64 ": %s", now.cuts, now.cut);
    v.sim = sim_cut(l->sim, sim_random(&t->random), kind);
    if (below(t, 10) == 0) {
        v.seed = sim_random(&t->random) | 1;
    }
    verify_run(&v);
    if (l->generation == 0 && below(t, 12) == 0) {
        live_on(&v, t);
    }
    verify_destroy(&v);
    if (now.cuts % 25000 == 0) {
        g_test_message("%" PRIu64 " cuts, at seed %" PRIu64, now.cuts,
                       now.seed);
    }
}

/* Before each I/O takes effect */
static void at_io(void *opaque)
{
    static const SimCut kinds[] = {
        SIM_CUT_POWER, SIM_CUT_POWER, SIM_CUT_POWER, SIM_CUT_POWER,
        SIM_CUT_PROCESS, SIM_CUT_PROCESS, SIM_CUT_NOTHING, SIM_CUT_ALL,
    };
    Trial *t = opaque;

    t->ios++;
    if (t->every) {
        for (SimCut kind = 0; kind < SIM_CUT__MAX; kind++) {
            cut(t, kind);
        }
    } else if (sim_random_chance(&t->random, t->cut_percent)) {
        cut(t, kinds[below(t, ARRAY_SIZE(kinds))]);
    }
    if (t->ios == t->fence_at && !t->life.down) {
        take_over(t);
    }
}

/* ------------------------------------------------------------------ */
/* Lives                                                               */

static void coroutine_fn birth_entry(void *opaque)
{
    Life *l = opaque;

    if (l->template) {
        image_create_clone(l->sim, VIRTUAL_SIZE);
    } else {
        image_create(l->sim, VIRTUAL_SIZE);
    }
    l->st = image_open(l->sim);
    l->epoch = 1;
    thinvm_store_set_discard(l->st, true);
    sim_finish(l->sim);
}

static void coroutine_fn death_entry(void *opaque)
{
    Life *l = opaque;

    thinvm_store_end_writing(l->st, true, &error_abort);
    image_check(l->st);
    sim_finish(l->sim);
}

/* An image from its creation to a clean end, with cuts on the way */
static void live(uint64_t seed, uint64_t variant, unsigned steps, bool every)
{
    Trial t = {
        .life = {
            .model = model_new(NULL, 1),
            .seed = seed,
            .template = seed % 2,
        },
        .random.state = seed ^ 0x5eed ^ variant << 40,
        .every = every,
    };
    Life *l = &t.life;
    unsigned reigns = 1 + below(&t, MAX_REIGNS - 1);

    now.seed = seed;
    now.variant = variant;
    t.cut_percent = 2 + below(&t, 12);
    l->steps = steps ?: 120 / reigns;
    l->tight = below(&t, 8) == 0;
    l->calm = below(&t, 3) == 0;
    l->small_records = below(&t, 3) == 0;
    life_say("seed %" PRIu64 ", variant %" PRIu64 ", up to %u reigns", seed,
             variant, reigns);
    l->sim = sim_new(seed ^ variant << 40, DEVICE_SIZE,
                     l->tight ? DEVICE_SIZE + MiB : DEVICE_MAX);
    sim_set_discard_unit(l->sim,
                         discard_units[seed % ARRAY_SIZE(discard_units)]);
    sim_start(l->sim, birth_entry, l);
    sim_run(l->sim);
    sim_set_fault(l->sim, device_fault);
    now.alive = true;
    live_reigns(&t, reigns);
    now.alive = false;
    now.grown += sim_count(l->sim, SIM_GROW);
    sim_start(l->sim, death_entry, l);
    sim_run(l->sim);
    thinvm_store_free(l->st);
    model_free(l->model);
    sim_free(l->sim);
}

static void tell(const char *what)
{
    g_test_message("%s: %" PRIu64 " cuts, %" PRIu64 " of them in a recovery, "
                   "%" PRIu64 " images lived on, %" PRIu64 " snapshots "
                   "compared, %" PRIu64 " takeovers and %" PRIu64 " handovers, "
                   "%" PRIu64 " reigns followed, %" PRIu64 " enlargements, "
                   "%" PRIu64 " records with checksums of data, %" PRIu64
                   " writes that asked for them; "
                   "seeds %" PRIu64 " to %" PRIu64, what, now.cuts,
                   now.recovering, now.again, now.snapshots, now.takeovers,
                   now.handovers, now.followed, now.grown, now.summed,
                   now.touched, options.seed,
                   now.seed);
}

/* Lives, until there were enough cuts */
static void test_cuts(void)
{
    memset(&now, 0, sizeof(now));
    cuts_left = options.cuts;
    for (uint64_t seed = options.seed; cuts_left; seed++) {
        live(seed, 0, 0, options.every);
    }
    tell("random");
    if (now.cuts > 5000 && !options.every) {
        /* The load must be what it is meant to be */
        g_assert_cmpuint(now.again * 100, >=, now.cuts);
        g_assert_cmpuint(now.recovering * 100, >=, now.cuts);
        g_assert_cmpuint(now.snapshots * 10, >=, now.cuts);
        g_assert_cmpuint(now.takeovers, >, 0);
        g_assert_cmpuint(now.handovers, >, 0);
        g_assert_cmpuint(now.followed, >, 0);
        g_assert_cmpuint(now.grown, >, 0);
        g_assert_cmpuint(now.summed * 10, >=, now.cuts);
        g_assert_cmpuint(now.touched * 100, >=, now.cuts);
    }
}

/* Short lives with a cut at each of their I/Os, in every way */
static void test_every(void)
{
    memset(&now, 0, sizeof(now));
    cuts_left = UINT64_MAX;
    for (uint64_t seed = 1; seed <= 3; seed++) {
        live(seed + options.seed * 1000, 0, 3, true);
    }
    tell("every I/O");
}

/* One life, or parts of it, in several orders */
static void test_replay(void)
{
    memset(&now, 0, sizeof(now));
    cuts_left = options.cuts;
    for (uint64_t i = 0; i < MAX(options.tries, 1); i++) {
        live(options.seed, options.variant + i, 0, options.every);
    }
    tell("replay");
}

/* ------------------------------------------------------------------ */
/* Shrinking                                                           */

static int64_t shrink_deadline;

/* Our own program with other arguments: does it fail? */
static bool run_fails(char **argv, char **output)
{
    g_autofree char *out = NULL, *err = NULL;
    g_autoptr(GError) error = NULL;
    int status = 0;

    if (!g_spawn_sync(NULL, argv, NULL, 0, NULL, NULL, &out, &err, &status,
                      &error)) {
        g_error("%s", error->message);
    }
    if (output) {
        *output = g_strconcat(out, err, NULL);
    }
    return status != 0;
}

static GPtrArray *replay_args(const char *steps, unsigned nb_steps)
{
    GPtrArray *argv = g_ptr_array_new_with_free_func(g_free);

    g_ptr_array_add(argv, g_strdup("/proc/self/exe"));
    g_ptr_array_add(argv, g_strdup_printf("--seed=%" PRIu64, options.seed));
    g_ptr_array_add(argv, g_strdup_printf("--variant=%" PRIu64,
                                          options.variant));
    g_ptr_array_add(argv, g_strdup("--tries=" SHRINK_TRIES));
    g_ptr_array_add(argv, g_strdup("--cuts=" SHRINK_CUTS));
    g_ptr_array_add(argv, g_strdup_printf("--steps=%s", steps));
    if (options.fault) {
        g_ptr_array_add(argv, g_strdup_printf("--fault=%s", options.fault));
    }
    if (options.every || nb_steps <= FEW_STEPS) {
        g_ptr_array_add(argv, g_strdup("--every"));
    }
    g_ptr_array_add(argv, g_strdup("--no-shrink"));
    return argv;
}

static bool life_fails(const bool *keep, unsigned nb, void *opaque)
{
    g_autofree char *list = shrink_list(keep, nb);
    g_autoptr(GPtrArray) argv = NULL;
    unsigned nb_steps = 0;
    bool fails;

    if (g_get_monotonic_time() > shrink_deadline) {
        return false;
    }
    for (unsigned i = 0; i < nb; i++) {
        nb_steps += keep[i];
    }
    argv = replay_args(list, nb_steps);
    g_ptr_array_add(argv, NULL);
    fails = run_fails((char **)argv->pdata, NULL);
    fprintf(stderr, "# %u steps: %s\n", nb_steps, fails ? "fails" : "passes");
    return fails;
}

/* The command that we were called for: make --steps shorter, and tell */
static int shrink_life(void)
{
    bool *keep = g_new0(bool, LIFE_NB_STEPS);
    g_autofree char *list = NULL, *output = NULL, *command = NULL;
    g_autoptr(GPtrArray) argv = NULL;
    unsigned left;

    for (unsigned i = 0; i < LIFE_NB_STEPS; i++) {
        keep[i] = life_chosen(i);
    }
    shrink_deadline = g_get_monotonic_time() + SHRINK_SECONDS * G_USEC_PER_SEC;
    if (!life_fails(keep, LIFE_NB_STEPS, NULL)) {
        fprintf(stderr, "Its steps alone do not fail: not shrunk\n");
        return 1;
    }
    left = shrink(keep, LIFE_NB_STEPS, life_fails, NULL, SHRINK_TESTS);
    list = shrink_list(keep, LIFE_NB_STEPS);
    argv = replay_args(list, left);
    g_ptr_array_add(argv, g_strdup("--verbose"));
    g_ptr_array_add(argv, NULL);
    run_fails((char **)argv->pdata, &output);
    argv->pdata[0] = g_strdup("test-thinvm-crash");
    command = g_strjoinv(" ", (char **)argv->pdata);
    fprintf(stderr, "%s\nSmallest failing history: %u steps (above)\n"
            "Replay: %s\n", output, left, command);
    return 1;
}

/* Append; the signal handler below must not allocate */
static void G_GNUC_PRINTF(3, 4) put(char *text, size_t size,
                                    const char *fmt, ...)
{
    size_t used = strlen(text);
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(text + used, size - used, fmt, ap);
    va_end(ap);
}

static void list_made(char *text, size_t size)
{
    const bool *made = life_made();

    put(text, size, "--steps=");
    for (unsigned i = 0; i < LIFE_NB_STEPS; i++) {
        unsigned last = i;

        if (!made[i]) {
            continue;
        }
        while (last + 1 < LIFE_NB_STEPS && made[last + 1]) {
            last++;
        }
        put(text, size, text[8] ? ",%u-%u" : "%u-%u", i, last);
        i = last;
    }
}

/* A test has failed: say where, and replace this program by the shrinker */
static void on_failure(int sig)
{
    static char text[300], seed[40], variant[40], fault[40], steps[100000];
    char *const argv[] = {
        (char *)"test-thinvm-crash", (char *)"--shrink", seed, variant, steps,
        (char *)(options.every ? "--every" : fault),
        options.every ? fault : NULL, NULL
    };

    if (!now.alive) {
        signal(sig, SIG_DFL);
        raise(sig);
    }
    put(text, sizeof(text), "Failed in the life with --seed %" PRIu64
        " --variant %" PRIu64 ", at its cut number %" PRIu64 " (%s)\n",
        now.seed, now.variant, now.cuts, now.cut ?: "none");
    if (write(STDERR_FILENO, text, strlen(text)) > 0 && !options.no_shrink) {
        put(seed, sizeof(seed), "--seed=%" PRIu64, now.seed);
        put(variant, sizeof(variant), "--variant=%" PRIu64, now.variant);
        put(fault, sizeof(fault), "--fault=%s", options.fault ?: "");
        list_made(steps, sizeof(steps));
        execv("/proc/self/exe", argv);
    }
    signal(sig, SIG_DFL);
    raise(sig);
}

static void catch_failures(void)
{
    struct sigaction sa = { .sa_handler = on_failure, .sa_flags = SA_NODEFER };
    sigset_t all;

    sigfillset(&all);
    sigprocmask(SIG_UNBLOCK, &all, NULL);
    sigaction(SIGABRT, &sa, NULL);
    sigaction(SIGSEGV, &sa, NULL);
    sigaction(SIGBUS, &sa, NULL);
    sigaction(SIGTRAP, &sa, NULL);      /* g_error() */
}

/* ------------------------------------------------------------------ */
/* Does the test find what it is for?                                  */

/* A device, or a data path, that breaks one of its promises is noticed */
static void test_fault(gconstpointer data)
{
    g_autofree char *fault = g_strdup_printf("--fault=%s", (char *)data);
    g_autofree char *output = NULL;
    char *argv[] = { (char *)"/proc/self/exe", fault,
                     (char *)"--cuts=10000", (char *)"--no-shrink", NULL };

    g_assert_true(run_fails(argv, &output));
    g_assert_nonnull(strstr(output, "Failed in the life with --seed "));
}

/* and the life in which it was noticed is shrunk to a few steps */
static void test_shrink(void)
{
    g_autofree char *output = NULL;
    g_auto(GStrv) again = NULL;
    char *argv[] = { (char *)"/proc/self/exe", (char *)"--fault=order",
                     (char *)"--cuts=10000", NULL };
    const char *smallest, *replay;
    unsigned steps;

    g_assert_true(run_fails(argv, &output));
    smallest = strstr(output, "Smallest failing history: ");
    g_assert_nonnull(smallest);
    g_assert_cmpint(sscanf(smallest, "Smallest failing history: %u", &steps),
                    ==, 1);
    g_assert_cmpuint(steps, >, 0);
    g_assert_cmpuint(steps, <=, 8);
    /* What it prints does replay it */
    replay = strstr(smallest, "Replay: ");
    g_assert_nonnull(replay);
    again = g_strsplit(g_strstrip((char *)replay + strlen("Replay: ")), " ",
                       0);
    g_free(again[0]);
    again[0] = g_strdup("/proc/self/exe");
    g_assert_true(run_fails(again, NULL));
}

/* ------------------------------------------------------------------ */

/* Take "--name VALUE" or "--name=VALUE" out of the arguments, or NULL */
static const char *take_option(int *argc, char **argv, const char *name)
{
    size_t length = strlen(name);

    for (int i = 1; i < *argc; i++) {
        const char *value;
        int nb = 1;

        if (strncmp(argv[i], name, length)) {
            continue;
        }
        if (argv[i][length] == '=') {
            value = argv[i] + length + 1;
        } else if (!argv[i][length] && i + 1 < *argc) {
            value = argv[i + 1];
            nb = 2;
        } else {
            continue;
        }
        memmove(&argv[i], &argv[i + nb], (*argc - i - nb + 1) *
                sizeof(char *));
        *argc -= nb;
        return value;
    }
    return NULL;
}

static bool take_flag(int *argc, char **argv, const char *name)
{
    for (int i = 1; i < *argc; i++) {
        if (!strcmp(argv[i], name)) {
            memmove(&argv[i], &argv[i + 1], (*argc - i) * sizeof(char *));
            (*argc)--;
            return true;
        }
    }
    return false;
}

static uint64_t take_number(int *argc, char **argv, const char *name,
                            const char *variable, uint64_t otherwise)
{
    const char *text = take_option(argc, argv, name);
    uint64_t number;

    text = text ?: variable ? getenv(variable) : NULL;
    if (!text) {
        return otherwise;
    }
    if (qemu_strtou64(text, NULL, 0, &number) < 0) {
        fprintf(stderr, "%s: '%s' is not a number\n", name, text);
        exit(1);
    }
    return number;
}

static bool set_fault(const char *name)
{
    for (unsigned i = 0; i < ARRAY_SIZE(fault_names); i++) {
        if (!strcmp(name, fault_names[i])) {
            if (i + 1 < SIM_FAULT__MAX) {
                device_fault = i + 1;
            } else {
                image_fault = i + 2 - SIM_FAULT__MAX;
            }
            return true;
        }
    }
    return false;
}

static void parse(int *argc, char **argv)
{
    options.cuts = take_number(argc, argv, "--cuts", "THINVM_CUTS", 10000);
    options.seed = take_number(argc, argv, "--seed", "THINVM_SEED", 1);
    options.variant = take_number(argc, argv, "--variant", NULL, 0);
    options.tries = take_number(argc, argv, "--tries", NULL, 0);
    options.steps = take_option(argc, argv, "--steps");
    options.fault = take_option(argc, argv, "--fault");
    options.every = take_flag(argc, argv, "--every");
    options.verbose = take_flag(argc, argv, "--verbose");
    options.no_shrink = take_flag(argc, argv, "--no-shrink");
    options.shrink = take_flag(argc, argv, "--shrink");
    if (options.fault && !*options.fault) {
        options.fault = NULL;
    }
    if (!life_set_steps(options.steps)) {
        fprintf(stderr, "--steps: no list of steps: %s\n", options.steps);
        exit(1);
    }
    if (options.fault && !set_fault(options.fault)) {
        fprintf(stderr, "--fault: there is no fault '%s'\n", options.fault);
        exit(1);
    }
    life_set_verbose(options.verbose);
}

int main(int argc, char **argv)
{
    parse(&argc, argv);
    if (options.shrink) {
        sigset_t all;

        /* we may be in the place of a program that was in a handler */
        sigfillset(&all);
        sigprocmask(SIG_UNBLOCK, &all, NULL);
        return shrink_life();
    }
    g_test_init(&argc, &argv, NULL);
    qemu_init_main_loop(&error_abort);
    module_call_init(MODULE_INIT_TRACE);
    catch_failures();

    if (options.tries || options.steps) {
        g_test_add_func("/thinvm/crash/replay", test_replay);
        return g_test_run();
    }
    g_test_add_func("/thinvm/crash/cuts", test_cuts);
    if (!options.fault && !options.every) {
        g_test_add_func("/thinvm/crash/every-io", test_every);
        for (unsigned i = 0; i < ARRAY_SIZE(fault_names); i++) {
            g_autofree char *path = g_strdup_printf("/thinvm/crash/fault/%s",
                                                    fault_names[i]);

            g_test_add_data_func(path, fault_names[i], test_fault);
        }
        g_test_add_func("/thinvm/crash/shrink", test_shrink);
    }
    return g_test_run();
}
