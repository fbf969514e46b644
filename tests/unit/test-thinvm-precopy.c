/*
 * Unit tests of blockdev-precopy's parts that do no I/O
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Write history (heat.c), what is left and in which order (track.c), what a
 * guest has said of ranges (hint-map.c, against a plain array), and its lines
 * (hint-parse.c: what is right, each rule broken once, and noise).
 */

#include "qemu/osdep.h"
#include "../../block/precopy/hint-map.h"
#include "../../block/precopy/hint-parse.h"
#include "../../block/precopy/track.h"

#define GRAN 4096

/* ------------------------------------------------------------------ */
/* Write history                                                       */

static void test_heat(void)
{
    g_autoptr(PrecopyHeat) h = precopy_heat_new(10000, 1 << 20);

    g_assert_cmpint(precopy_heat_expect(h, 5, 0), ==, PRECOPY_NEVER);
    precopy_heat_write(h, 5, 1, 1000);
    /* Written once: stays quiet for as long as it has been quiet */
    g_assert_cmpint(precopy_heat_expect(h, 5, 1000), ==, 0);
    g_assert_cmpint(precopy_heat_expect(h, 5, 3000), ==, 2000);
    g_assert_cmpint(precopy_heat_expect(h, 4, 3000), ==, PRECOPY_NEVER);
    g_assert_cmpint(precopy_heat_expect(h, 6, 3000), ==, PRECOPY_NEVER);
    /* In its rhythm */
    for (int64_t now = 3000; now <= 43000; now += 2000) {
        precopy_heat_write(h, 5, 1, now);
    }
    g_assert_cmpint(precopy_heat_expect(h, 5, 43000), ==, 2000);
    g_assert_cmpint(precopy_heat_expect(h, 5, 50000), ==, 7000);
    /* A clock that steps back by a little is no disaster */
    precopy_heat_write(h, 5, 1, 42000);
    precopy_heat_write(h, 9999, 1, 500);
    g_assert_cmpint(precopy_heat_expect(h, 9999, 1000), ==, 0);
}

/* A writer that goes from block to block */
static void test_heat_stream(void)
{
    g_autoptr(PrecopyHeat) h = precopy_heat_new(100000, 1 << 20);
    g_autoptr(GRand) rand = g_rand_new_with_seed(3);
    int64_t now = 0, at = 5000;

    precopy_heat_write(h, at, 16, now);
    g_assert_cmpint(precopy_heat_expect(h, at + 100, now), ==, PRECOPY_NEVER);
    /* 16 blocks in 100 ms, one after the other but for a swap; amid others */
    for (int i = 1; i < 40; i++) {
        now += 100;
        precopy_heat_write(h, at + (i ^ 1) * 16, 16, now);
        for (int n = 0; n < 5; n++) {
            precopy_heat_write(h, g_rand_int_range(rand, 50000, 90000), 1,
                               now);
        }
    }
    g_assert_cmpint(precopy_heat_expect(h, at + 40 * 16, now), <, 100);
    /* 160 blocks further is a second */
    g_assert_cmpint(precopy_heat_expect(h, at + 40 * 16 + 160, now), >, 800);
    g_assert_cmpint(precopy_heat_expect(h, at + 40 * 16 + 160, now), <, 1200);
    g_assert_cmpint(precopy_heat_expect(h, at - 2000, now), ==,
                    PRECOPY_NEVER);
    /* It has stopped */
    g_assert_cmpint(precopy_heat_expect(h, at + 40 * 16 + 160, now + 6000),
                    >, 5000);
    /* As much at once is no pace */
    precopy_heat_write(h, 20000, 500, now);
    g_assert_cmpint(precopy_heat_expect(h, 22000, now + 6000), ==,
                    PRECOPY_NEVER);
}

/* Writes here and there: the others of the page may be next */
static void test_heat_neighbours(void)
{
    g_autoptr(PrecopyHeat) h = precopy_heat_new(100000, 1 << 20);
    g_autoptr(GRand) rand = g_rand_new_with_seed(5);
    int64_t now, untouched = 4096;

    for (now = 0; now < 10000; now += 100) {
        precopy_heat_write(h, g_rand_int_range(rand, 4100, 5120), 1, now);
    }
    /* 10 of 1024 a second */
    g_assert_cmpint(precopy_heat_expect(h, untouched, now), >, 90000);
    g_assert_cmpint(precopy_heat_expect(h, untouched, now), <, 120000);
    g_assert_cmpint(precopy_heat_expect(h, 5120, now), ==, PRECOPY_NEVER);
    /* That is long ago */
    g_assert_cmpint(precopy_heat_expect(h, untouched, 10 * now), >, 900000);
}

static void test_heat_bounded(void)
{
    const size_t max = 256 * 1024;
    g_autoptr(PrecopyHeat) h = precopy_heat_new(1 << 24, max);

    /* One block stays hot; others are written once, all over the disk */
    for (int64_t i = 0; i < (1 << 24); i += 1024) {
        precopy_heat_write(h, 77, 1, i);
        precopy_heat_write(h, i, 1, i);
        g_assert_cmpint(precopy_heat_memory(h), <=, max);
    }
    g_assert_cmpint(precopy_heat_expect(h, 77, 1 << 24), <, PRECOPY_NEVER);
    g_assert_cmpint(precopy_heat_expect(h, 1 << 20, 1 << 24), ==,
                    PRECOPY_NEVER);
}

/* ------------------------------------------------------------------ */
/* What is left                                                        */

/* Sweep once; what was picked, as text of runs */
static char *sweep(PrecopyTrack *t, PrecopySweep *s, int64_t now)
{
    GString *text = g_string_new("");
    PrecopyPick pick;
    PrecopyOp op;

    s->cursor = 0;
    do {
        pick = precopy_track_pick(t, s, 16 * GRAN, now, &op);
        if (pick == PRECOPY_PICK_RUN) {
            g_string_append_printf(text, "%" PRId64 "+%" PRId64 " ",
                                   op.first, op.nb);
            precopy_track_end_op(t, &op);
        }
    } while (pick != PRECOPY_PICK_END);
    return g_string_free(text, false);
}

#define ASSERT_SWEEP(t, s, now, expected) \
    do { \
        g_autofree char *_found = sweep(t, s, now); \
        g_assert_cmpstr(_found, ==, expected); \
    } while (0)

static void test_track_runs(void)
{
    PrecopyTrack *t = precopy_track_new(100 * GRAN + 512, GRAN);
    PrecopySweep s = { .free_too = true };

    /* Parts count as whole blocks, runs end where requests are cut */
    precopy_track_mark(t, 3 * GRAN + 100, 10);
    precopy_track_mark(t, 10 * GRAN - 1, 2);
    precopy_track_mark(t, 20 * GRAN, 30 * GRAN);
    precopy_track_mark(t, 100 * GRAN, 512);
    g_assert_cmpint(precopy_track_left(t), ==, 34 * GRAN);
    ASSERT_SWEEP(t, &s, 0, "3+1 9+2 20+12 32+16 48+2 100+1 ");
    g_assert_cmpint(s.nb_picked, ==, 34);
    g_assert_cmpint(precopy_track_left(t), ==, 0);
    ASSERT_SWEEP(t, &s, 0, "");
    precopy_track_free(t);
}

static void wrote_something(void *opaque, int64_t offset, int64_t bytes,
                            int64_t now)
{
    g_assert_cmpint(bytes, >, 0);
}

/* A write of nothing, amid a block and at the ends */
static void test_track_empty(void)
{
    PrecopyTrack *t = precopy_track_new(100 * GRAN + 512, GRAN);

    t->hint_written = wrote_something;
    precopy_track_wrote(t, 512, 0, 0);
    precopy_track_wrote(t, 0, 0, 0);
    precopy_track_wrote(t, 100 * GRAN + 512, 0, 0);
    precopy_track_wrote_both(t, 512, 0, 0);
    precopy_track_mark(t, 512, 0);
    precopy_track_discarded(t, 512, 0);
    g_assert_cmpint(precopy_track_left(t), ==, 0);
    precopy_track_free(t);
}

static void test_track_in_flight(void)
{
    PrecopyTrack *t = precopy_track_new(64 * GRAN, GRAN);
    PrecopySweep s = { .free_too = true };
    PrecopyOp op;

    precopy_track_mark(t, 4 * GRAN, 8 * GRAN);
    g_assert_cmpint(precopy_track_pick(t, &s, 4 * GRAN, 0, &op), ==,
                    PRECOPY_PICK_RUN);
    g_assert_cmpint(precopy_op_offset(t, &op), ==, 4 * GRAN);
    g_assert_cmpint(precopy_op_bytes(t, &op), ==, 4 * GRAN);
    /* Written while it is copied: it stays, and nobody else takes it */
    precopy_track_wrote(t, 5 * GRAN, 10, 0);
    g_assert_cmpint(precopy_track_left(t), ==, 5 * GRAN);
    ASSERT_SWEEP(t, &s, 0, "8+4 ");
    precopy_track_end_op(t, &op);
    ASSERT_SWEEP(t, &s, 0, "5+1 ");
    precopy_track_free(t);
}

static void test_track_history(void)
{
    PrecopyTrack *t = precopy_track_new(64 * GRAN, GRAN);
    PrecopySweep s = { .horizon = 5000, .free_too = true };

    precopy_track_mark(t, 0, 8 * GRAN);
    precopy_track_wrote(t, 2 * GRAN, GRAN, 1000);
    ASSERT_SWEEP(t, &s, 2000, "0+2 3+5 ");
    g_assert_cmpint(s.nb_deferred, ==, 1);
    g_assert_cmpint(precopy_track_counters(t).spared_history, ==, 0);
    /* Had it been sent it would be sent again */
    precopy_track_wrote(t, 2 * GRAN, GRAN, 3000);
    g_assert_cmpint(precopy_track_counters(t).spared_history, ==, GRAN);
    precopy_track_wrote(t, 2 * GRAN, GRAN, 3000);
    g_assert_cmpint(precopy_track_counters(t).spared_history, ==, GRAN);
    /* Quiet for long enough, or nothing waits any more */
    ASSERT_SWEEP(t, &s, 7000, "");
    ASSERT_SWEEP(t, &s, 22000, "");
    ASSERT_SWEEP(t, &s, 24000, "2+1 ");
    precopy_track_wrote(t, 2 * GRAN, GRAN, 24000);
    s.horizon = 0;
    ASSERT_SWEEP(t, &s, 24000, "2+1 ");
    precopy_track_free(t);
}

static void said(void *opaque, int64_t offset, int64_t now, PrecopyHint *hint)
{
    precopy_hint_map_get(opaque, offset, now, hint);
}

static void test_track_hints(void)
{
    g_autoptr(PrecopyHintMap) m = precopy_hint_map_new(100);
    PrecopyTrack *t = precopy_track_new(64 * GRAN, GRAN);
    PrecopySweep s = { .horizon = 5000 };

    t->hint = said;
    t->hint_opaque = m;
    precopy_track_mark(t, 0, 16 * GRAN);
    precopy_hint_map_set(m, 4 * GRAN, 2 * GRAN, PRECOPY_HINT_DIRTY, 3000, 0);
    precopy_hint_map_set(m, 8 * GRAN, 2 * GRAN, PRECOPY_HINT_DIRTY, 9000, 0);
    precopy_hint_map_set(m, 12 * GRAN, GRAN, PRECOPY_HINT_FREE, 0, 0);
    ASSERT_SWEEP(t, &s, 0, "0+4 6+6 13+3 ");
    precopy_track_wrote(t, 4 * GRAN, GRAN, 1000);
    g_assert_cmpint(precopy_track_counters(t).spared_hints, ==, GRAN);
    /* Both the hint and the history make it wait; then neither */
    ASSERT_SWEEP(t, &s, 2000, "");
    s.horizon = 0;
    ASSERT_SWEEP(t, &s, 2000, "4+2 ");
    s.free_too = true;
    ASSERT_SWEEP(t, &s, 2000, "12+1 ");
    precopy_track_free(t);
}

static void test_track_clean_part(void)
{
    PrecopyTrack *t = precopy_track_new(64 * GRAN, GRAN);
    int64_t offset = 100, bytes = 5 * GRAN;

    precopy_track_mark(t, 0, GRAN);
    precopy_track_mark(t, 2 * GRAN, GRAN);
    precopy_track_mark(t, 5 * GRAN, GRAN);
    g_assert_true(precopy_track_clean_part(t, &offset, &bytes));
    g_assert_cmpint(offset, ==, GRAN);
    g_assert_cmpint(bytes, ==, 4 * GRAN);
    offset = 10;
    bytes = 20;
    g_assert_false(precopy_track_clean_part(t, &offset, &bytes));
    offset = 6 * GRAN + 10;
    bytes = 20;
    g_assert_true(precopy_track_clean_part(t, &offset, &bytes));
    g_assert_cmpint(offset, ==, 6 * GRAN + 10);
    g_assert_cmpint(bytes, ==, 20);
    precopy_track_free(t);
}

/* What lies in the range as a whole is clean, and nothing else */
static void test_track_take(void)
{
    PrecopyTrack *t = precopy_track_new(10 * GRAN + 512, GRAN);
    PrecopySweep s = { .free_too = true };

    precopy_track_mark(t, 0, 10 * GRAN + 512);
    precopy_track_take(t, GRAN + 1, GRAN);
    precopy_track_take(t, 3 * GRAN + 512, 512);
    precopy_track_take(t, 3 * GRAN, 0);
    g_assert_cmpint(precopy_track_left(t), ==, 10 * GRAN + 512);
    precopy_track_take(t, GRAN - 512, 2 * GRAN);
    precopy_track_take(t, 4 * GRAN, GRAN);
    precopy_track_take(t, 7 * GRAN + 512, 3 * GRAN - 512);
    ASSERT_SWEEP(t, &s, 0, "0+1 2+2 5+3 10+1 ");
    /* The last one is shorter */
    precopy_track_mark(t, 0, 10 * GRAN + 512);
    precopy_track_take(t, 9 * GRAN, GRAN + 512);
    ASSERT_SWEEP(t, &s, 0, "0+9 ");
    precopy_track_free(t);
}

static void test_track_counters(void)
{
    PrecopyTrack *t = precopy_track_new(8 * GRAN, GRAN);

    precopy_track_sent(t, 0, 4 * GRAN, false);
    precopy_track_sent(t, 2 * GRAN, 4 * GRAN, true);
    g_assert_cmpint(precopy_track_counters(t).sent, ==, 8 * GRAN);
    g_assert_cmpint(precopy_track_counters(t).resent, ==, 2 * GRAN);
    g_assert_cmpint(precopy_track_counters(t).written_through, ==, 4 * GRAN);
    precopy_track_free(t);
}

static void test_track_place(void)
{
    PrecopyTrack *t = precopy_track_new(1000 * GRAN, GRAN);

    g_assert_cmpint(precopy_track_place(t, 3), ==, 0);
    precopy_track_mark(t, 999 * GRAN, GRAN);
    g_assert_cmpint(precopy_track_place(t, 3), ==, 0);
    precopy_track_mark(t, 100 * GRAN, 10 * GRAN);
    precopy_track_mark(t, 500 * GRAN, 69 * GRAN);
    /* 30 of 80: 10, and 20 of the next */
    g_assert_cmpint(precopy_track_place(t, 3), ==, 520);
    g_assert_cmpint(precopy_track_place(t, 1), ==, 110);
    g_assert_cmpint(precopy_track_place(t, 0), ==, 0);
    precopy_track_free(t);
}

static void test_granularity(void)
{
    g_assert_cmpint(precopy_default_granularity(0), ==, 4096);
    g_assert_cmpint(precopy_default_granularity(1LL << 40), ==, 4096);
    g_assert_cmpint(precopy_default_granularity((1LL << 41) - 1), ==, 4096);
    g_assert_cmpint(precopy_default_granularity(1LL << 41), ==, 8192);
    g_assert_cmpint(precopy_default_granularity(1LL << 42), ==, 16384);
    g_assert_cmpint(precopy_default_granularity(INT64_MAX) , <=, 1LL << 35);
}

/* ------------------------------------------------------------------ */
/* Ranges that a guest has said something of                           */

#define MODEL 512

typedef struct ModelHint {
    PrecopyHintKind kind;
    int64_t due;
} ModelHint;

static void check_model(const PrecopyHintMap *m, const ModelHint *model)
{
    for (int64_t i = 0; i < MODEL; i++) {
        PrecopyHint hint;

        precopy_hint_map_get(m, i, 0, &hint);
        g_assert_cmpint(hint.kind, ==, model[i].kind);
        g_assert_cmpint(hint.end, >, i);
        if (hint.kind == PRECOPY_HINT_DIRTY) {
            g_assert_cmpint(hint.due, ==, model[i].due);
        }
        for (int64_t j = i; j < MIN(hint.end, MODEL); j++) {
            g_assert_cmpint(model[j].kind, ==, hint.kind);
        }
    }
}

static void random_step(GRand *rand, PrecopyHintMap *m, ModelHint *model)
{
    int64_t offset = g_rand_int_range(rand, 0, MODEL);
    int64_t bytes = g_rand_int_range(rand, 1, MIN(64, MODEL - offset) + 1);
    PrecopyHintKind kind = g_rand_int_range(rand, PRECOPY_HINT_NONE,
                                            PRECOPY_HINT_FREE + 1);
    int64_t due = g_rand_int_range(rand, 0, 1000);
    bool clear = kind != PRECOPY_HINT_NONE && g_rand_boolean(rand);

    if (clear) {
        precopy_hint_map_clear(m, offset, bytes, kind);
    } else {
        precopy_hint_map_set(m, offset, bytes, kind, due, 0);
    }
    for (int64_t i = offset; i < offset + bytes; i++) {
        if (!clear) {
            model[i].kind = kind;
            model[i].due = due;
        } else if (model[i].kind == kind) {
            model[i].kind = PRECOPY_HINT_NONE;
        }
    }
}

static void test_map_random(void)
{
    g_autoptr(GRand) rand = g_rand_new_with_seed(42);
    g_autoptr(PrecopyHintMap) m = precopy_hint_map_new(MODEL);
    ModelHint model[MODEL] = { };

    for (int i = 0; i < 3000; i++) {
        random_step(rand, m, model);
        check_model(m, model);
    }
    g_assert_cmpint(precopy_hint_map_dropped(m), ==, 0);
    precopy_hint_map_reset(m);
    g_assert_cmpint(precopy_hint_map_count(m), ==, 0);
}

static void test_map_bounds(void)
{
    g_autoptr(PrecopyHintMap) m = precopy_hint_map_new(10);
    PrecopyHint hint;

    for (int i = 0; i < 20; i++) {
        precopy_hint_map_set(m, i * 10, 5, PRECOPY_HINT_DIRTY, i * 1000, 0);
    }
    g_assert_cmpint(precopy_hint_map_count(m), ==, 10);
    g_assert_cmpint(precopy_hint_map_dropped(m), ==, 10);
    /* Time passes: some are over, and make room when it is needed */
    precopy_hint_map_get(m, 0, PRECOPY_HINT_GRACE + 1, &hint);
    g_assert_cmpint(hint.kind, ==, PRECOPY_HINT_NONE);
    precopy_hint_map_set(m, 500, 5, PRECOPY_HINT_FREE, 0,
                         PRECOPY_HINT_GRACE + 4500);
    g_assert_cmpint(precopy_hint_map_count(m), ==, 6);
    g_assert_cmpint(precopy_hint_map_dropped(m), ==, 10);
    /* The whole range of numbers */
    precopy_hint_map_set(m, 0, INT64_MAX, PRECOPY_HINT_FREE, 0, 100000);
    g_assert_cmpint(precopy_hint_map_count(m), ==, 1);
    precopy_hint_map_set(m, INT64_MAX - 1, 1, PRECOPY_HINT_NONE, 0, 100000);
    precopy_hint_map_get(m, INT64_MAX - 1, 100000, &hint);
    g_assert_cmpint(hint.kind, ==, PRECOPY_HINT_NONE);
    g_assert_cmpint(hint.end, >, INT64_MAX - 1);
}

/* ------------------------------------------------------------------ */
/* Lines                                                               */

static bool parse(const char *text, PrecopyHintLine *line)
{
    return precopy_hint_parse(text, strlen(text), line);
}

static const char *const good_lines[] = {
    "hello thinvm-hints 1 thinvm-agent/1.0",
    "hello thinvm-hints 9223372036854775807 x",
    "disk 0 4294967296 system-disk vda",
    "disk 63 0 - sda",
    "gone 5",
    "coverage 0 1310720 4096 delayed",
    "dirty 0 25000 1073741824 1048576 2147483648 262144",
    "dirty 0 - 0 512",
    "dirty 0 3600000 0 512",
    "clean 1 0 9223372036854775296",
    "free 2 512 512 1024 512 2048 512",
    "used 3 0 512",
    "cost 31250 268435456 7",
    "done 2 ok 536870912",
    "booted",
    "bye",
};

static const char *const bad_lines[] = {
    "", " ", "bye ", " bye", "bye bye", "BYE", "byes", "by", "\tbye",
    "hello", "hello thinvm-hints", "hello thinvm-hints 1",
    "hello thinvm-hint 1 x", "hello thinvm-hints -1 x",
    "hello thinvm-hints 1 x y", "hello thinvm-hints  1 x",
    "hello thinvm-hints 9223372036854775808 x",
    "hello thinvm-hints 18446744073709551617 x",
    "hello thinvm-hints 00000000000000000001 x",
    "hello thinvm-hints 1 \xc3\xa4", "hello thinvm-hints 1 a\x01",
    "hello thinvm-hints 1 a\x7f",
    "hello thinvm-hints 1 "
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "disk 64 512 a b", "disk -1 512 a b", "disk 0x1 512 a b", "disk 0 a a b",
    "disk 0 512 a", "disk 0 512 a b c", "gone", "gone 64", "gone a",
    "coverage 0 1 2", "coverage 0 1 b other",
    "dirty 0 100", "dirty 0 100 0", "dirty 0 100 0 0", "dirty 0 100 1 512",
    "dirty 0 100 0 513", "dirty 0 100 0 512 512", "dirty 0 3600001 0 512",
    "dirty 0 -- 0 512", "dirty 0 -1 0 512", "dirty 0 0 512",
    "dirty 0 1 9223372036854775296 1024",
    "dirty 0 1 0 512 0 512 0 512 0 512 0 512 0 512 0 512 0 512 0 512 0 512 "
    "0 512 0 512 0 512 0 512 0 512 0 512 0 512",
    "clean 0", "free 0 100 0 512", "used 64 0 512",
    "cost 1 2", "cost 1 2 3 4", "done 1 ok", "done 1", "done x ok 1",
    "booted ", "booted 1", "booted booted", "boote", "bootedd", "Booted",
};

static void test_parse_good(void)
{
    PrecopyHintLine line;

    for (int i = 0; i < ARRAY_SIZE(good_lines); i++) {
        g_test_message("%s", good_lines[i]);
        g_assert_true(parse(good_lines[i], &line));
    }
    g_assert_true(parse(good_lines[6], &line));
    g_assert_cmpint(line.verb, ==, PRECOPY_VERB_DIRTY);
    g_assert_cmpint(line.disk, ==, 0);
    g_assert_cmpint(line.number[0], ==, 25000);
    g_assert_cmpint(line.nb_ranges, ==, 2);
    g_assert_cmpint(line.range[1].offset, ==, 2147483648);
    g_assert_cmpint(line.range[1].bytes, ==, 262144);
    g_assert_true(parse(good_lines[7], &line));
    g_assert_cmpint(line.number[0], ==, PRECOPY_HINT_NO_MS);
    g_assert_true(parse(good_lines[2], &line));
    g_assert_cmpstr(line.word[0], ==, "system-disk");
    g_assert_cmpstr(line.word[1], ==, "vda");
}

static void test_parse_bad(void)
{
    PrecopyHintLine line;

    for (int i = 0; i < ARRAY_SIZE(bad_lines); i++) {
        g_test_message("%s", bad_lines[i]);
        g_assert_false(parse(bad_lines[i], &line));
    }
}

/* Whatever the line: what is accepted keeps the rules */
static void check_line(const PrecopyHintLine *line)
{
    g_assert_cmpint(line->disk, >=, 0);
    g_assert_cmpint(line->disk, <, PRECOPY_HINT_MAX_DISKS);
    g_assert_cmpint(line->nb_ranges, <=, PRECOPY_HINT_MAX_RANGES);
    for (int i = 0; i < 2; i++) {
        g_assert_nonnull(memchr(line->word[i], 0, sizeof(line->word[i])));
    }
    for (int i = 0; i < 3; i++) {
        g_assert_cmpint(line->number[i], >=, PRECOPY_HINT_NO_MS);
    }
    for (int i = 0; i < line->nb_ranges; i++) {
        const PrecopyHintRange *r = &line->range[i];

        g_assert_cmpint(r->offset, >=, 0);
        g_assert_cmpint(r->bytes, >, 0);
        g_assert_cmpint(r->bytes, <=, INT64_MAX - r->offset);
        g_assert_cmpint((r->offset | r->bytes) % 512, ==, 0);
    }
}

static void mutate(GRand *rand, GString *text)
{
    for (int n = g_rand_int_range(rand, 1, 6); n; n--) {
        int at = g_rand_int_range(rand, 0, text->len + 1);

        switch (g_rand_int_range(rand, 0, 4)) {
        case 0:
            g_string_insert_c(text, at, g_rand_int_range(rand, 0, 256));
            break;
        case 1:
            g_string_erase(text, at, MIN(1, text->len - at));
            break;
        case 2:
            g_string_insert(text, at, " 9223372036854775807");
            break;
        default:
            g_string_insert_len(text, at, text->str,
                                g_rand_int_range(rand, 0, text->len + 1));
            break;
        }
    }
}

static void test_parse_noise(void)
{
    g_autoptr(GRand) rand = g_rand_new_with_seed(7);
    int accepted = 0;

    for (int i = 0; i < 200000; i++) {
        g_autoptr(GString) text = g_string_new(
            good_lines[g_rand_int_range(rand, 0, ARRAY_SIZE(good_lines))]);
        PrecopyHintLine line;
        g_autofree char *exact = NULL;

        mutate(rand, text);
        /* So that a sanitizer sees each byte that is read beyond the end */
        exact = g_memdup2(text->str, text->len);
        if (precopy_hint_parse(exact, text->len, &line)) {
            check_line(&line);
            accepted++;
        }
    }
    g_assert_cmpint(accepted, >, 100);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/precopy/heat", test_heat);
    g_test_add_func("/precopy/heat-stream", test_heat_stream);
    g_test_add_func("/precopy/heat-neighbours", test_heat_neighbours);
    g_test_add_func("/precopy/heat-bounded", test_heat_bounded);
    g_test_add_func("/precopy/track-runs", test_track_runs);
    g_test_add_func("/precopy/track-empty", test_track_empty);
    g_test_add_func("/precopy/track-in-flight", test_track_in_flight);
    g_test_add_func("/precopy/track-history", test_track_history);
    g_test_add_func("/precopy/track-hints", test_track_hints);
    g_test_add_func("/precopy/track-clean-part", test_track_clean_part);
    g_test_add_func("/precopy/track-take", test_track_take);
    g_test_add_func("/precopy/track-counters", test_track_counters);
    g_test_add_func("/precopy/track-place", test_track_place);
    g_test_add_func("/precopy/granularity", test_granularity);
    g_test_add_func("/precopy/map-random", test_map_random);
    g_test_add_func("/precopy/map-bounds", test_map_bounds);
    g_test_add_func("/precopy/parse-good", test_parse_good);
    g_test_add_func("/precopy/parse-bad", test_parse_bad);
    g_test_add_func("/precopy/parse-noise", test_parse_noise);
    return g_test_run();
}
