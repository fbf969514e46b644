/*
 * libFuzzer's entry to the object thinvm-hints: what a hostile guest may say
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The object is the one of QEMU (block/precopy/hints.c with its parser and its
 * maps); the character device and the clock are played here.  The input is what
 * the guest sends, in which these bytes are something else:
 *
 *   00 X   the byte X itself              01 N   N * 10 ms pass
 *   02 N   a job asks for a part of the disk, and for all hints behind it
 *   03     a job begins or ends           04     the channel is closed, opened
 *   05 N   the guest writes there         06     QMP asks for everything
 *
 * What is looked at beside crashes: memory and rate are within their bounds,
 * that of events included, and what a job is told goes forward and ends.
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qapi/qapi-commands-precopy.h"
#include "qapi/qapi-events-precopy.h"
#include "block/bootcache.h"
#include "chardev/char-fe.h"
#include "crypto/hash.h"
#include "qemu/main-loop.h"
#include "qemu/module.h"
#include "qemu/timer.h"
#include "qom/object.h"
#include "../../block/precopy/hint-parse.h"
#include "../../block/precopy/hints.h"
#include "../../block/precopy/track.h"

#define MAX_RANGES  64
#define DISK_SIZE   (1LL << 20)
#define STEP_MS     10
#define MAX_WALK    1000
/* What the object promises, and what one read may be beyond */
#define BURST       (200 + PRECOPY_HINT_MAX_LINE)
#define PER_SECOND  2000
#define BOOTED_MS   1000

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int64_t __wrap_precopy_clock_ms(void);
Chardev *__wrap_qemu_chr_find(const char *name);
bool __wrap_qemu_chr_fe_init(CharBackend *b, Chardev *s, Error **errp);
void __wrap_qemu_chr_fe_deinit(CharBackend *b, bool del);
void __wrap_qemu_chr_fe_set_handlers(CharBackend *b, IOCanReadHandler *can,
                                     IOReadHandler *read, IOEventHandler *event,
                                     BackendChangeHandler *change, void *opaque,
                                     GMainContext *context, bool set_open);
int __wrap_qemu_chr_fe_write(CharBackend *b, const uint8_t *buf, int len);
void __wrap_qemu_chr_fe_accept_input(CharBackend *b);

static struct {
    IOCanReadHandler *can_read;
    IOReadHandler *read;
    IOEventHandler *event;
    void *opaque;
} channel;

static int64_t clock_ms, clock_begin;
static Object *object;
static PrecopyHintsUser *user;
static bool is_open;
static int64_t events, told;

/* ------------------------------------------------------------------ */
/* What surrounds the object                                           */

int64_t __wrap_precopy_clock_ms(void)
{
    return clock_ms;
}

Chardev *__wrap_qemu_chr_find(const char *name)
{
    static int chr;

    return (Chardev *)&chr;
}

bool __wrap_qemu_chr_fe_init(CharBackend *b, Chardev *s, Error **errp)
{
    return true;
}

void __wrap_qemu_chr_fe_deinit(CharBackend *b, bool del)
{
}

void __wrap_qemu_chr_fe_set_handlers(CharBackend *b, IOCanReadHandler *can,
                                     IOReadHandler *read, IOEventHandler *event,
                                     BackendChangeHandler *change, void *opaque,
                                     GMainContext *context, bool set_open)
{
    channel.can_read = can;
    channel.read = read;
    channel.event = event;
    channel.opaque = opaque;
}

/* What the host says is a line, and no longer than it may be */
int __wrap_qemu_chr_fe_write(CharBackend *b, const uint8_t *buf, int len)
{
    g_assert_cmpint(len, >, 1);
    g_assert_cmpint(len, <=, PRECOPY_HINT_MAX_LINE);
    g_assert(memchr(buf, '\n', len) == buf + len - 1);
    return len;
}

void __wrap_qemu_chr_fe_accept_input(CharBackend *b)
{
}

void qapi_event_send_thinvm_guest_booted(const char *id)
{
    events++;
}

bool bootcache_boot_ended(const char *node_name, Error **errp)
{
    g_assert_cmpstr(node_name, ==, "cache");
    told++;
    if (told % 2) {
        error_setg(errp, "There is no bootcache node '%s'", node_name);
    }
    return told % 2 == 0;
}

/* Of bitmaps, for migration; nobody asks for it here */
int qcrypto_hash_digest(QCryptoHashAlgo alg, const char *buf, size_t len,
                        char **digest, Error **errp)
{
    g_assert_not_reached();
}

/* ------------------------------------------------------------------ */
/* What is looked at                                                   */

static void check_info(void)
{
    ThinvmHintsInfoList *list = qmp_query_thinvm_hints(&error_abort);
    int64_t passed = clock_ms - clock_begin;

    g_assert(list && !list->next);
    g_assert_cmpint(list->value->lines, <=,
                    BURST + passed * PER_SECOND / 1000);
    g_assert_cmpint(list->value->ignored, <=, list->value->lines);
    g_assert_cmpint(list->value->booted, ==, events);
    g_assert_cmpint(told, ==, events);
    g_assert_cmpint(events, <=, 1 + passed / BOOTED_MS);
    for (ThinvmHintsDiskList *d = list->value->disks; d; d = d->next) {
        g_assert_cmpint(d->value->ranges, <=, MAX_RANGES);
        g_assert_cmpint(strlen(d->value->name), <=, PRECOPY_HINT_MAX_WORD);
        g_assert_cmpint(strlen(d->value->serial), <=, PRECOPY_HINT_MAX_WORD);
    }
    qapi_free_ThinvmHintsInfoList(list);
}

static void check_hints(int64_t offset)
{
    PrecopyHint hint;

    for (int n = 0; user && offset < DISK_SIZE; n++) {
        g_assert_cmpint(n, <, MAX_WALK);
        precopy_hints_get(user, offset, clock_ms, &hint);
        g_assert_cmpint(hint.end, >, offset);
        if (hint.kind == PRECOPY_HINT_DIRTY) {
            g_assert_cmpint(hint.due, <=, clock_ms + PRECOPY_HINT_MAX_MS);
        }
        offset = hint.end;
    }
    if (user) {
        precopy_hints_trimming(user);
    }
}

/* ------------------------------------------------------------------ */
/* Inputs                                                              */

static void change_user(void)
{
    if (user) {
        precopy_hints_detach(user);
        user = NULL;
    } else {
        user = precopy_hints_attach("h", NULL, DISK_SIZE, true, &error_abort);
    }
}

static void change_channel(void)
{
    is_open = !is_open;
    channel.event(channel.opaque, is_open ? CHR_EVENT_OPENED
                                          : CHR_EVENT_CLOSED);
}

/* As a character device does: as much as is wanted, or later */
static void send_bytes(const uint8_t *data, size_t size)
{
    while (is_open && size) {
        int n = MIN(size, channel.can_read(channel.opaque));

        if (n > 0) {
            channel.read(channel.opaque, data, n);
            data += n;
            size -= n;
        } else {
            clock_ms += STEP_MS;
        }
    }
}

static void play(const uint8_t *data, size_t size)
{
    const uint8_t *end = data + size;

    while (data < end) {
        const uint8_t *plain = data;

        while (plain < end && *plain > 6) {
            plain++;
        }
        send_bytes(data, plain - data);
        data = plain;
        if (data + 1 >= end) {
            break;
        }
        switch (*data++) {
        case 0:
            send_bytes(data++, 1);
            break;
        case 1:
            clock_ms += *data++ * STEP_MS;
            break;
        case 2:
            check_hints(*data++ * 4096);
            break;
        case 3:
            change_user();
            break;
        case 4:
            change_channel();
            break;
        case 5:
            if (user) {
                precopy_hints_written(user, *data * 4096, 4096, clock_ms);
            }
            data++;
            break;
        default:
            check_info();
            break;
        }
    }
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    module_call_init(MODULE_INIT_QOM);
    qemu_init_main_loop(&error_abort);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    g_autofree char *most = g_strdup_printf("%d", MAX_RANGES);

    clock_begin = clock_ms;
    events = told = 0;
    object = object_new_with_props("thinvm-hints", object_get_objects_root(),
                                   "h", &error_abort, "chardev", "c",
                                   "max-ranges", most, "boot-cache", "cache",
                                   NULL);
    is_open = false;
    change_channel();
    change_user();
    play(data, size);
    check_hints(0);
    check_info();
    if (user) {
        change_user();
    }
    object_unparent(object);
    return 0;
}
