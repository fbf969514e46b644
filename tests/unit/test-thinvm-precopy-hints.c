/*
 * Unit tests of the object thinvm-hints, in simulated time
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * hints.c with its parser and maps, as QEMU has it; the character device and
 * the clock are played here.  What a guest may cost (lines, bytes, ranges,
 * looks at ranges), how long a job waits for it, and which disk it speaks of;
 * whom its word that it has booted reaches, and how often.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qapi/qapi-commands-precopy.h"
#include "qapi/qapi-events-precopy.h"
#include "block/bootcache.h"
#include "chardev/char-fe.h"
#include "qemu/module.h"
#include "qemu/timer.h"
#include "qemu/units.h"
#include "qom/object.h"
#include "../../block/precopy/hint-map.h"
#include "../../block/precopy/hint-parse.h"
#include "../../block/precopy/hints.h"

#define DISK     (64 * MiB)
#define PATIENCE 30000
#define BURST    200
#define RATE     2000       /* lines a second */

static struct {
    IOCanReadHandler *can_read;
    IOReadHandler *read;
    IOEventHandler *event;
    void *opaque;
    GString *said;          /* by the host, since it was looked at */
} channel;

static int64_t now_ms;
static Object *object;

/* ------------------------------------------------------------------ */
/* What surrounds the object                                           */

int64_t precopy_clock_ms(void)
{
    return now_ms;
}

Chardev *qemu_chr_find(const char *name)
{
    static int chr;

    return (Chardev *)&chr;
}

bool qemu_chr_fe_init(CharBackend *b, Chardev *s, Error **errp)
{
    return true;
}

void qemu_chr_fe_deinit(CharBackend *b, bool del)
{
}

void qemu_chr_fe_set_handlers(CharBackend *b, IOCanReadHandler *fd_can_read,
                              IOReadHandler *fd_read, IOEventHandler *fd_event,
                              BackendChangeHandler *be_change, void *opaque,
                              GMainContext *context, bool set_open)
{
    channel.can_read = fd_can_read;
    channel.read = fd_read;
    channel.event = fd_event;
    channel.opaque = opaque;
}

int qemu_chr_fe_write(CharBackend *be, const uint8_t *buf, int len)
{
    g_string_append_len(channel.said, (const char *)buf, len);
    return len;
}

void qemu_chr_fe_accept_input(CharBackend *be)
{
}

static struct {
    int events, told;       /* of the boot's end */
    char *node;             /* who was told at last */
    const char *problem;    /* of the boot cache, if it has one */
} boot;

void qapi_event_send_thinvm_guest_booted(const char *id)
{
    g_assert_cmpstr(id, ==, "h");
    boot.events++;
}

bool bootcache_boot_ended(const char *node_name, Error **errp)
{
    boot.told++;
    g_free(boot.node);
    boot.node = g_strdup(node_name);
    if (boot.problem) {
        error_setg(errp, "%s", boot.problem);
    }
    return !boot.problem;
}

/* ------------------------------------------------------------------ */
/* A guest                                                             */

/* As a character device does: as much as is wanted; returns how much */
static size_t offer(const char *text, size_t length)
{
    size_t done = 0;

    while (done < length) {
        int n = MIN(length - done, channel.can_read(channel.opaque));

        if (n <= 0) {
            break;
        }
        channel.read(channel.opaque, (const uint8_t *)text + done, n);
        done += n;
    }
    return done;
}

/* A line that the host has time for */
static void G_GNUC_PRINTF(1, 2) say(const char *fmt, ...)
{
    g_autofree char *text = NULL;
    g_autofree char *line = NULL;
    va_list ap;

    va_start(ap, fmt);
    text = g_strdup_vprintf(fmt, ap);
    va_end(ap);
    line = g_strconcat(text, "\n", NULL);
    g_assert_cmpint(offer(line, strlen(line)), ==, strlen(line));
}

/* Does the host say exactly this, one line or several? */
static void hear(const char *expected)
{
    g_assert_cmpstr(channel.said->str, ==, expected);
    g_string_truncate(channel.said, 0);
}

static void connect_agent(void)
{
    channel.event(channel.opaque, CHR_EVENT_OPENED);
    hear("hello thinvm-hints 1\n");
    say("hello thinvm-hints 1 test/1");
}

static void setup(const char *max_ranges)
{
    now_ms = 1000000;
    channel.said = g_string_new("");
    object = object_new_with_props("thinvm-hints", object_get_objects_root(),
                                   "h", &error_abort, "chardev", "c",
                                   "max-ranges", max_ranges, NULL);
}

static void teardown(void)
{
    object_unparent(object);
    g_string_free(channel.said, true);
}

static ThinvmHintsInfoList *info(void)
{
    ThinvmHintsInfoList *list = qmp_query_thinvm_hints(&error_abort);

    g_assert(list && !list->next);
    return list;
}

static int64_t lines(void)
{
    g_autoptr(ThinvmHintsInfoList) list = info();

    return list->value->lines;
}

static int64_t ignored(void)
{
    g_autoptr(ThinvmHintsInfoList) list = info();

    return list->value->ignored;
}

static bool connected(void)
{
    g_autoptr(ThinvmHintsInfoList) list = info();

    return list->value->connected;
}

/* Of the only disk */
static int64_t ranges(void)
{
    g_autoptr(ThinvmHintsInfoList) list = info();

    g_assert(list->value->disks && !list->value->disks->next);
    return list->value->disks->value->ranges;
}

static PrecopyHintKind hint_at(PrecopyHintsUser *user, int64_t offset)
{
    PrecopyHint hint;

    precopy_hints_get(user, offset, now_ms, &hint);
    g_assert_cmpint(hint.end, >, offset);
    return hint.kind;
}

/* ------------------------------------------------------------------ */
/* Patience                                                            */

static PrecopyHintsUser *attach(const char *serial, bool trim)
{
    return precopy_hints_attach("h", serial, DISK, trim, &error_abort);
}

/* It is over after its time, and not before */
static void check_patience(PrecopyHintsUser *user, int64_t since)
{
    now_ms = since + PATIENCE - 1;
    g_assert_true(precopy_hints_trimming(user));
    now_ms++;
    g_assert_false(precopy_hints_trimming(user));
    now_ms += 1000 * PATIENCE;
    g_assert_false(precopy_hints_trimming(user));
}

static void test_trim_nobody(void)
{
    PrecopyHintsUser *user;

    setup("100");
    user = attach(NULL, true);
    check_patience(user, now_ms);
    precopy_hints_detach(user);
    /* Nor is anybody asked who was not to be */
    user = attach(NULL, false);
    g_assert_false(precopy_hints_trimming(user));
    connect_agent();
    say("disk 0 %" PRId64 " - vda", (int64_t)DISK);
    hear("version 1\nstart 1 1000 8000\n");
    precopy_hints_detach(user);
    hear("stop 2\n");
    teardown();
}

/* The agent hears it and never answers */
static void test_trim_silent(void)
{
    PrecopyHintsUser *user;
    int64_t since;

    setup("100");
    connect_agent();
    hear("version 1\n");
    since = now_ms;
    user = attach(NULL, true);
    hear("start 1 1000 8000\n");
    /* That was no answer */
    say("done 0 ok 0");
    g_assert_true(precopy_hints_trimming(user));
    now_ms += PATIENCE / 2;
    say("disk 0 %" PRId64 " - vda", (int64_t)DISK);
    hear("trim 2 0 65536\n");
    /* Once is enough; and answers to something else are none */
    say("disk 0 %" PRId64 " - vda", (int64_t)DISK);
    say("done 1 ok 0");
    say("done 3 ok 0");
    say("done 0 ok 0");
    hear("");
    check_patience(user, since);
    precopy_hints_detach(user);
    teardown();
}

static void test_trim_answered(void)
{
    PrecopyHintsUser *user;

    setup("100");
    connect_agent();
    say("disk 0 %" PRId64 " - vda", (int64_t)DISK);
    user = attach(NULL, true);
    hear("version 1\nstart 1 1000 8000\ntrim 2 0 65536\n");
    g_assert_true(precopy_hints_trimming(user));
    say("done 2 failed 4096");
    g_assert_false(precopy_hints_trimming(user));
    g_assert_cmpint(ignored(), ==, 0);
    precopy_hints_detach(user);
    teardown();
}

/* Whoever has gone will not answer; the next one is not asked again */
static void test_trim_gone(void)
{
    PrecopyHintsUser *user;

    setup("100");
    connect_agent();
    say("disk 0 %" PRId64 " - vda", (int64_t)DISK);
    user = attach(NULL, true);
    g_assert_true(precopy_hints_trimming(user));
    channel.event(channel.opaque, CHR_EVENT_CLOSED);
    g_assert_false(precopy_hints_trimming(user));
    g_string_truncate(channel.said, 0);
    now_ms += 1000;
    connect_agent();
    say("disk 0 %" PRId64 " - vda", (int64_t)DISK);
    hear("version 1\nstart 3 1000 8000\n");
    g_assert_false(precopy_hints_trimming(user));
    precopy_hints_detach(user);
    teardown();
}

/* ------------------------------------------------------------------ */
/* Bounds                                                              */

/* Whatever comes in, a line at a time; returns how many were taken */
static int64_t flood(const char *line)
{
    int64_t before = lines();

    for (int i = 0; i < 100000; i++) {
        if (offer(line, strlen(line)) < strlen(line)) {
            break;
        }
    }
    return lines() - before;
}

static void test_rate(void)
{
    setup("100");
    connect_agent();
    now_ms += 3600000;
    g_assert_cmpint(flood("gone 5\n"), <=, BURST);
    g_assert_cmpint(flood("gone 5\n"), <=, 1);
    /* No more for having waited for long, but what was promised */
    now_ms += 3600000;
    g_assert_cmpint(flood("gone 5\n"), >=, BURST * 9 / 10);
    for (int i = 0; i < 10; i++) {
        int64_t taken;

        now_ms += 50;
        taken = flood("gone 5\n");
        g_assert_cmpint(taken, <=, RATE / 20 + 1);
        g_assert_cmpint(taken, >=, RATE / 20 * 9 / 10);
    }
    teardown();
}

/* Many lines in one read: they are paid for afterwards */
static void test_rate_at_once(void)
{
    g_autoptr(GString) text = g_string_new("");
    int64_t before;

    for (int i = 0; i < 50000; i++) {
        g_string_append(text, "bye\n");
    }
    setup("100");
    connect_agent();
    now_ms += 3600000;
    before = lines();
    offer(text->str, text->len);
    g_assert_cmpint(lines() - before, <=,
                    BURST + PRECOPY_HINT_MAX_LINE / strlen("bye\n"));
    for (int i = 0; i < 10; i++) {
        now_ms += 1000;
        offer(text->str, text->len);
    }
    g_assert_cmpint(lines() - before, <=, BURST + 10 * RATE +
                    PRECOPY_HINT_MAX_LINE / strlen("bye\n"));
    g_assert_cmpint(lines() - before, >=, 10 * RATE * 9 / 100);
    teardown();
}

/* Nor are bytes without a line feed for nothing */
static void test_bytes(void)
{
    g_autofree char *text = g_strnfill(4 * MiB, 'x');

    setup("100");
    connect_agent();
    now_ms += 3600000;
    g_assert_cmpint(offer(text, 4 * MiB), <=,
                    (BURST + 1) * PRECOPY_HINT_MAX_LINE);
    now_ms += 50;
    g_assert_cmpint(offer(text, 4 * MiB), <=,
                    (RATE / 20 + 1) * PRECOPY_HINT_MAX_LINE);
    teardown();
}

/* A line that is too long is one line, wherever it is cut */
static void test_long_lines(void)
{
    static const char evil[] = "hello thinvm-hints 1 evil\n";

    for (int n = PRECOPY_HINT_MAX_LINE - 100;
         n < PRECOPY_HINT_MAX_LINE + 100; n++) {
        g_autofree char *text = g_strnfill(n + sizeof(evil), 'x');

        setup("100");
        channel.event(channel.opaque, CHR_EVENT_OPENED);
        memcpy(text + n, evil, sizeof(evil));
        g_assert_cmpint(offer(text, strlen(text)), ==, strlen(text));
        g_assert_false(connected());
        g_assert_cmpint(lines(), ==, 1);
        g_assert_cmpint(ignored(), ==, 1);
        /* and the next is none of its business */
        say("hello thinvm-hints 1 good");
        g_assert_true(connected());
        g_assert_cmpint(ignored(), ==, 1);
        teardown();
    }
}

/* Begun before the channel was closed: not to be continued after that */
static void test_half_lines(void)
{
    setup("100");
    connect_agent();
    offer("bogus ", 6);
    channel.event(channel.opaque, CHR_EVENT_CLOSED);
    g_string_truncate(channel.said, 0);
    now_ms += 1000;
    connect_agent();
    g_assert_true(connected());
    g_assert_cmpint(ignored(), ==, 0);
    teardown();
}

static void test_beyond_disk(void)
{
    PrecopyHintsUser *user;

    setup("100");
    user = attach(NULL, false);
    connect_agent();
    say("disk 0 %" PRId64 " - vda", (int64_t)DISK);
    say("free 0 %" PRId64 " 512", (int64_t)DISK - 512);
    g_assert_cmpint(ranges(), ==, 1);
    /* All of a line, or nothing */
    say("free 0 0 512 %" PRId64 " 512", (int64_t)DISK);
    say("free 0 0 512 %" PRId64 " 1024", (int64_t)DISK - 512);
    say("dirty 0 0 0 512 9223372036854774784 512");
    say("free 1 0 512");
    g_assert_cmpint(ignored(), ==, 4);
    g_assert_cmpint(ranges(), ==, 1);
    g_assert_cmpint(hint_at(user, 0), ==, PRECOPY_HINT_NONE);
    g_assert_cmpint(hint_at(user, DISK - 1), ==, PRECOPY_HINT_FREE);
    precopy_hints_detach(user);
    teardown();
}

/* What nobody asks for is not remembered */
static void test_unused(void)
{
    PrecopyHintsUser *user;

    setup("100");
    connect_agent();
    say("disk 0 %" PRId64 " - vda", (int64_t)DISK);
    say("free 0 0 512");
    g_assert_cmpint(ranges(), ==, 0);
    user = attach("other", false);
    say("free 0 0 512");
    g_assert_cmpint(ranges(), ==, 0);
    precopy_hints_detach(user);
    user = attach("-", false);
    say("free 0 0 512");
    g_assert_cmpint(ranges(), ==, 1);
    precopy_hints_detach(user);
    teardown();
}

/* Whoever greets begins afresh, and is asked to report once more */
static void test_hello(void)
{
    PrecopyHintsUser *user;

    setup("100");
    user = attach(NULL, false);
    connect_agent();
    hear("version 1\nstart 1 1000 8000\n");
    say("disk 0 %" PRId64 " - vda", (int64_t)DISK);
    say("free 0 0 512");
    g_assert_cmpint(hint_at(user, 0), ==, PRECOPY_HINT_FREE);
    say("hello thinvm-hints 9 test/2");
    hear("version 1\nstart 2 1000 8000\n");
    g_assert_cmpint(hint_at(user, 0), ==, PRECOPY_HINT_NONE);
    say("free 0 0 512");
    g_assert_cmpint(ignored(), ==, 1);
    precopy_hints_detach(user);
    teardown();
}

/* A short line can make us look at all ranges: that counts, too */
static void test_looks(void)
{
    const int nb = DISK / 1024;
    g_autoptr(GString) line = g_string_new("clean 0");
    PrecopyHintsUser *user;
    int64_t taken = 0;

    setup("65536");
    user = attach(NULL, false);
    connect_agent();
    say("disk 0 %" PRId64 " - vda", (int64_t)DISK);
    /* To tell them takes no more than there are lines */
    for (int i = 0; i < nb; i += 16) {
        g_autoptr(GString) text = g_string_new("free 0");

        for (int j = i; j < i + 16; j++) {
            g_string_append_printf(text, " %d 512", j * 1024);
        }
        now_ms++;
        say("%s", text->str);
    }
    g_assert_cmpint(ranges(), ==, nb);
    for (int i = 0; i < 16; i++) {
        g_string_append_printf(line, " 0 %" PRId64, (int64_t)DISK);
    }
    g_string_append_c(line, '\n');
    now_ms += 3600000;
    /* A million looks each: 10 seconds are two of them */
    for (int i = 0; i < 100; i++) {
        taken += flood(line->str);
        g_assert_cmpint(taken, <=, 2);
        now_ms += 100;
    }
    g_assert_cmpint(taken, >=, 1);
    g_assert_cmpint(ranges(), ==, nb);
    precopy_hints_detach(user);
    teardown();
}

/* ------------------------------------------------------------------ */
/* Which disk                                                          */

static void test_disks(void)
{
    PrecopyHintsUser *any, *a, *none;

    setup("100");
    any = attach(NULL, true);
    a = attach("a", true);
    none = attach("none", true);
    connect_agent();
    hear("version 1\nstart 1 1000 8000\n");
    /* Another size is another disk */
    say("disk 3 %" PRId64 " a vdd", (int64_t)DISK + 512);
    hear("");
    say("disk 0 %" PRId64 " a vda", (int64_t)DISK);
    g_assert_true(strstr(channel.said->str, "trim 2 0 "));
    g_assert_true(strstr(channel.said->str, "trim 3 0 "));
    g_assert_false(strstr(channel.said->str, "trim 4"));
    say("free 0 0 4096");
    g_assert_cmpint(hint_at(any, 0), ==, PRECOPY_HINT_FREE);
    g_assert_cmpint(hint_at(a, 0), ==, PRECOPY_HINT_FREE);
    g_assert_cmpint(hint_at(none, 0), ==, PRECOPY_HINT_NONE);
    /* Two of this size: which is meant must be said */
    say("disk 1 %" PRId64 " b vdb", (int64_t)DISK);
    g_assert_cmpint(hint_at(any, 0), ==, PRECOPY_HINT_NONE);
    g_assert_cmpint(hint_at(a, 0), ==, PRECOPY_HINT_FREE);
    precopy_hints_written(any, 0, 4096, now_ms);
    g_assert_cmpint(hint_at(a, 0), ==, PRECOPY_HINT_FREE);
    say("gone 1");
    g_assert_cmpint(hint_at(any, 0), ==, PRECOPY_HINT_FREE);
    precopy_hints_written(any, 0, 512, now_ms);
    g_assert_cmpint(hint_at(a, 0), ==, PRECOPY_HINT_NONE);
    g_assert_cmpint(hint_at(a, 512), ==, PRECOPY_HINT_FREE);
    precopy_hints_detach(none);
    precopy_hints_detach(a);
    precopy_hints_detach(any);
    teardown();
}

/* ------------------------------------------------------------------ */
/* The end of a boot                                                   */

static int64_t booted(const char *problem)
{
    g_autoptr(ThinvmHintsInfoList) list = info();

    g_assert_cmpstr(list->value->boot_cache_problem, ==, problem);
    return list->value->booted;
}

static void forget_boot(void)
{
    g_clear_pointer(&boot.node, g_free);
    memset(&boot, 0, sizeof(boot));
}

/* Nobody is named: an event, and that is all */
static void test_booted(void)
{
    forget_boot();
    setup("100");
    channel.event(channel.opaque, CHR_EVENT_OPENED);
    /* Who has not said hello is not listened to */
    say("booted");
    g_assert_cmpint(boot.events, ==, 0);
    g_assert_cmpint(booted(NULL), ==, 0);
    g_assert_cmpint(ignored(), ==, 1);
    say("hello thinvm-hints 1 test/1");
    say("booted now");
    g_assert_cmpint(boot.events, ==, 0);
    say("booted");
    g_assert_cmpint(boot.events, ==, 1);
    g_assert_cmpint(boot.told, ==, 0);
    g_assert_cmpint(booted(NULL), ==, 1);
    g_assert_cmpint(ignored(), ==, 2);
    teardown();
}

/* However often it is said, begun afresh or not: once in a second */
static void test_booted_rate(void)
{
    forget_boot();
    setup("100");
    connect_agent();
    for (int i = 0; i < 10000; i++) {
        now_ms++;
        say(i % 3 ? "booted" : "hello thinvm-hints 1 again");
    }
    g_assert_cmpint(boot.events, >=, 9);
    g_assert_cmpint(boot.events, <=, 10);
    g_assert_cmpint(booted(NULL), ==, boot.events);
    teardown();
}

static void test_booted_cache(void)
{
    forget_boot();
    setup("100");
    object_unparent(object);
    object = object_new_with_props("thinvm-hints", object_get_objects_root(),
                                   "h", &error_abort, "chardev", "c",
                                   "boot-cache", "cache", NULL);
    g_assert_false(object_property_set_str(object, "boot-cache", "x", NULL));
    connect_agent();
    g_assert_cmpint(boot.told, ==, 0);
    say("booted");
    g_assert_cmpint(boot.told, ==, 1);
    g_assert_cmpstr(boot.node, ==, "cache");
    g_assert_cmpint(booted(NULL), ==, 1);
    say("booted");
    g_assert_cmpint(boot.told, ==, 1);
    /* What is wrong with it is told, for as long as it is */
    boot.problem = "a test's problem";
    now_ms += 1000;
    say("booted");
    g_assert_cmpint(booted(boot.problem), ==, 2);
    now_ms += 1000;
    say("booted");
    g_assert_cmpint(booted(boot.problem), ==, 3);
    boot.problem = NULL;
    now_ms += 1000;
    say("booted");
    g_assert_cmpint(booted(NULL), ==, 4);
    g_assert_cmpint(boot.events, ==, 4);
    g_assert_cmpint(boot.told, ==, 4);
    teardown();
}

static void test_boot_cache_name(void)
{
    static const char *const names[] = {
        "", "0123456789012345678901234567890x",
    };

    for (size_t i = 0; i < ARRAY_SIZE(names); i++) {
        Error *local_err = NULL;

        object_new_with_props("thinvm-hints", object_get_objects_root(), "h",
                              &local_err, "chardev", "c", "boot-cache",
                              names[i], NULL);
        g_assert_true(strstr(error_get_pretty(local_err), "'boot-cache'"));
        g_assert_true(strstr(error_get_pretty(local_err), "1 to 31 bytes"));
        error_free(local_err);
    }
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    module_call_init(MODULE_INIT_QOM);
    init_clocks(NULL);
    g_test_add_func("/precopy-hints/trim-nobody", test_trim_nobody);
    g_test_add_func("/precopy-hints/trim-silent", test_trim_silent);
    g_test_add_func("/precopy-hints/trim-answered", test_trim_answered);
    g_test_add_func("/precopy-hints/trim-gone", test_trim_gone);
    g_test_add_func("/precopy-hints/rate", test_rate);
    g_test_add_func("/precopy-hints/rate-at-once", test_rate_at_once);
    g_test_add_func("/precopy-hints/bytes", test_bytes);
    g_test_add_func("/precopy-hints/long-lines", test_long_lines);
    g_test_add_func("/precopy-hints/half-lines", test_half_lines);
    g_test_add_func("/precopy-hints/beyond-disk", test_beyond_disk);
    g_test_add_func("/precopy-hints/unused", test_unused);
    g_test_add_func("/precopy-hints/hello", test_hello);
    g_test_add_func("/precopy-hints/looks", test_looks);
    g_test_add_func("/precopy-hints/disks", test_disks);
    g_test_add_func("/precopy-hints/booted", test_booted);
    g_test_add_func("/precopy-hints/booted-rate", test_booted_rate);
    g_test_add_func("/precopy-hints/booted-cache", test_booted_cache);
    g_test_add_func("/precopy-hints/boot-cache-name", test_boot_cache_name);
    return g_test_run();
}
