/*
 * Which policy of blockdev-precopy wins, in simulated time
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * As a test: the policy that ships sends no more than the others and is ready
 * no later, on the workloads that matter.  As a program:
 *
 *   test-thinvm-precopy-sim --simulate WORKLOAD [NAME=NUMBER...]
 *
 * prints what each policy makes of light, heavy, idle, sequential, random,
 * rewriter, buffered, or of a trace (the path of a file, see thinvm-precopy-sim.h).
 * Sizes in MiB: disk, used, rate (of the link, per second); give-up in seconds;
 * blocking=0: a guest that is too fast is let alone.
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/units.h"
#include "thinvm-precopy-sim.h"

typedef struct Setup {
    int64_t disk, used, rate, give_up;
    int64_t blocking;
} Setup;

static const char *const workloads[] = {
    "light", "heavy", "idle", "sequential", "random", "rewriter", "buffered",
};

/* As in scripts/bench-precopy: in proportion to disk and link */
static SimTrace *make_trace(const char *name, const Setup *s, Error **errp)
{
    double scale = s->rate / (40.0 * MiB);
    SimDatabase d = {
        .disk = s->disk, .used = s->used,
        .hot = s->used / 32 / 4096 * 4096, .cold = s->used / 2 / 4096 * 4096,
        .expire_s = 30, .agent = true,
    };

    if (g_str_equal(name, "light")) {
        scale /= 10;
    }
    if (g_str_equal(name, "light") || g_str_equal(name, "heavy")) {
        d.hot_rate = 1500 * scale;
        d.log_rate = 200 * scale;
        d.cold_rate = 600 * scale;
    } else if (g_str_equal(name, "buffered")) {
        d.cold_rate = 600 * scale;
    } else if (g_str_equal(name, "random")) {
        d.cold_rate = 2000 * scale;
        d.expire_s = 0;
    } else if (g_str_equal(name, "sequential")) {
        return sim_trace_sequential(s->disk, s->used, s->rate / 4);
    } else if (g_str_equal(name, "rewriter")) {
        return sim_trace_sequential(s->disk, s->used, s->rate * 2);
    } else if (!g_str_equal(name, "idle")) {
        return sim_trace_file(name, errp);
    }
    return sim_trace_database(&d);
}

static SimResult run(const char *name, SimPolicy policy, const Setup *s,
                     Error **errp)
{
    SimOptions o = {
        .rate = s->rate, .give_up_us = s->give_up * 1000000,
        .hold_us = 5 * 1000000, .downtime_ms = 100,
        .write_blocking = s->blocking,
    };
    SimTrace *trace = make_trace(name, s, errp);

    return trace ? sim_run(trace, policy, &o) : (SimResult) { .used = -1 };
}

/* ------------------------------------------------------------------ */
/* The test                                                            */

static const Setup usual = {
    .disk = 512 * MiB, .used = 115 * MiB, .rate = 5 * MiB, .give_up = 60,
    .blocking = true,
};

static void test_policies(const void *opaque)
{
    const char *name = opaque;
    SimResult r[SIM_POLICIES];

    for (int p = 0; p < SIM_POLICIES; p++) {
        r[p] = run(name, p, &usual, &error_abort);
        g_test_message("%s %s: %.1f MiB, ready after %.1f s", name,
                       sim_policy_names[p], r[p].sent / (double)MiB,
                       r[p].ready_us / 1e6);
    }
    g_assert_cmpint(r[SIM_HINTS].ready_us, >, 0);
    for (int p = 0; p < SIM_HINTS; p++) {
        if (r[p].ready_us > 0) {
            g_assert_cmpint(r[SIM_HINTS].sent, <=, r[p].sent * 1.02);
            g_assert_cmpint(r[SIM_HINTS].ready_us, <=,
                            r[p].ready_us * 1.10 + 1000000);
        }
    }
    /* The downtime limit is 100 ms */
    g_assert_cmpint(r[SIM_HINTS].pause_us, <=, 300000);
}

/* What the issue names: in relation to what is used */
static void test_goals(void)
{
    SimResult light = run("light", SIM_HINTS, &usual, &error_abort);
    SimResult heavy = run("heavy", SIM_HINTS, &usual, &error_abort);

    g_assert_cmpint(light.sent, <=, light.used * 1.05);
    g_assert_cmpint(heavy.sent, <=, heavy.used * 1.5);
    g_assert_cmpint(heavy.written_through, ==, 0);
}

/* What stays in the page cache until the copy goes on: history cannot know */
static void test_hints_spare(void)
{
    const Setup slow = {
        .disk = 4 * GiB, .used = 512 * MiB, .rate = 5 * MiB, .give_up = 600,
    };
    SimResult with = run("buffered", SIM_HINTS, &slow, &error_abort);
    SimResult without = run("buffered", SIM_HISTORY, &slow, &error_abort);

    g_test_message("with %.1f, without %.1f MiB again", with.resent /
                   (double)MiB, without.resent / (double)MiB);
    g_assert_cmpint(with.spared_hints, >, 0);
    g_assert_cmpint(with.resent, <, without.resent);
}

/* ------------------------------------------------------------------ */
/* The program                                                         */

static void print_row(const char *name, const SimResult *r)
{
    g_autofree char *ready = r->ready_us < 0 ? g_strdup("never")
        : g_strdup_printf("%.1f", r->ready_us / 1e6);

    printf("%-9s %9.1f %9.2f %9.1f %9.1f %9.1f %9.1f %9s %9.3f %9.2f\n", name,
           r->sent / (double)MiB, r->sent / (double)MAX(r->used, 1),
           r->resent / (double)MiB, r->written_through / (double)MiB,
           r->spared_history / (double)MiB, r->spared_hints / (double)MiB,
           ready, r->pause_us / 1e6,
           r->guest);
}

static bool set_number(Setup *s, const char *word)
{
    struct { const char *name; int64_t *number; int64_t unit; } known[] = {
        { "disk", &s->disk, MiB }, { "used", &s->used, MiB },
        { "rate", &s->rate, MiB }, { "give-up", &s->give_up, 1 },
        { "blocking", &s->blocking, 1 },
    };
    const char *equal = strchr(word, '=');

    for (int i = 0; equal && i < ARRAY_SIZE(known); i++) {
        if (strlen(known[i].name) == equal - word &&
            !strncmp(known[i].name, word, equal - word)) {
            double value = g_ascii_strtod(equal + 1, NULL);

            *known[i].number = value * known[i].unit;
            return value >= 0 && value < 1e12;
        }
    }
    return false;
}

static int simulate(int argc, char **argv)
{
    Setup s = usual;
    Error *err = NULL;

    for (int i = 1; i < argc; i++) {
        if (!set_number(&s, argv[i])) {
            fprintf(stderr, "%s: not disk, used, rate (MiB), give-up (s) or "
                    "blocking (0 or 1) = NUMBER\n", argv[i]);
            return 1;
        }
    }
    if (argc < 1 || s.disk < s.used || s.used < MiB || s.rate < 1) {
        fprintf(stderr, "--simulate WORKLOAD [NAME=NUMBER...]; used is at "
                "least 1 MiB and at most disk\n");
        return 1;
    }
    printf("%-9s %9s %9s %9s %9s %9s %9s %9s %9s %9s\n", "policy", "MiB",
           "of used", "again", "through", "history", "hints", "ready s",
           "pause s", "guest");
    for (int p = 0; p < SIM_POLICIES; p++) {
        SimResult r = run(argv[0], p, &s, &err);

        if (err) {
            fprintf(stderr, "%s\n", error_get_pretty(err));
            return 1;
        }
        print_row(sim_policy_names[p], &r);
    }
    return 0;
}

int main(int argc, char **argv)
{
    if (argc > 1 && !strcmp(argv[1], "--simulate")) {
        return simulate(argc - 2, argv + 2);
    }
    g_test_init(&argc, &argv, NULL);
    for (int i = 0; i < ARRAY_SIZE(workloads); i++) {
        g_autofree char *path = g_strdup_printf("/precopy-sim/%s",
                                                workloads[i]);

        g_test_add_data_func(path, workloads[i], test_policies);
    }
    g_test_add_func("/precopy-sim/goals", test_goals);
    g_test_add_func("/precopy-sim/hints-spare", test_hints_spare);
    return g_test_run();
}
