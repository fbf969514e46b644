/*
 * blockdev-precopy: what guests say, as objects
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See hints.h.  The guest's side is not trusted: lines are checked one by one
 * (hint-parse.c), ranges are kept in maps of bounded size (hint-map.c), and
 * what comes in is read at a bounded rate; the rest stays in the channel.
 * Nothing of what it says does more than to let blocks wait; and, where the
 * administrator has said so twice, here and of the boot cache's publisher, to
 * end the recording of a boot.
 *
 * Reading, and all that is sent, happens in the main loop.  The lock covers
 * disks, maps and users, which jobs look at from their own threads, some with
 * the track's lock held; it is never held while something is sent.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qapi/qapi-commands-precopy.h"
#include "qapi/qapi-events-precopy.h"
#include "block/bootcache.h"
#include "chardev/char-fe.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "qemu/timer.h"
#include "qom/object_interfaces.h"
#include "hint-map.h"
#include "hint-parse.h"
#include "hints.h"

/* What is read in a second, and at once */
#define HINTS_LINES_PER_SECOND  2000
#define HINTS_BURST             200
/* Ranges that were looked at count as a line */
#define HINTS_LOOKS             64
#define HINTS_DEFAULT_RANGES    65536
#define HINTS_MAX_RANGES        (1024 * 1024)
/* What the agent is asked for */
#define HINTS_INTERVAL_MS       1000
#define HINTS_RANGES_PER_SECOND 8000
#define HINTS_TRIM_MIN_BYTES    65536
#define HINTS_TRIM_PATIENCE_MS  30000
/* "At some time": half of what Linux lets pages be dirty for */
#define HINTS_UNKNOWN_MS        15000
#define HINTS_ASK_MS            1000
/* A guest does not boot more often; QMP clients are not to be flooded */
#define HINTS_BOOTED_MS         1000

OBJECT_DECLARE_SIMPLE_TYPE(ThinvmHints, THINVM_HINTS)

typedef struct HintsDisk {
    bool known;
    int64_t size;
    char serial[PRECOPY_HINT_MAX_WORD + 1];
    char name[PRECOPY_HINT_MAX_WORD + 1];
    uint64_t dirty_known, dirty_unknown;
    char reason[PRECOPY_HINT_MAX_WORD + 1];
    PrecopyHintMap *map;
} HintsDisk;

struct PrecopyHintsUser {
    ThinvmHints *hints;
    char *serial;
    int64_t size;
    bool trim;                      /* wanted */
    int64_t trim_request;           /* 0: not asked yet */
    int64_t trim_deadline;          /* ms */
    bool trim_over;
    QLIST_ENTRY(PrecopyHintsUser) next;
};

struct ThinvmHints {
    Object parent;

    char *chardev;
    uint32_t max_ranges;
    char *boot_cache;               /* node name, or NULL */

    /* Main loop only */
    CharBackend chr;
    bool complete, open;
    char line[PRECOPY_HINT_MAX_LINE];
    size_t nb_line;
    bool overlong;                  /* skip to the line feed */
    double tokens;                  /* lines that may be read */
    int64_t tokens_at, asked_at;    /* ms */
    QEMUTimer *timer;
    int64_t request;
    bool started;
    int version;                    /* 0: no agent */
    char agent[PRECOPY_HINT_MAX_WORD + 1];
    int64_t booted, booted_at;      /* how often; ms */
    char *boot_cache_problem;
    int64_t lines, ignored, trimmed;
    int64_t cost[3];

    QemuMutex lock;
    HintsDisk disk[PRECOPY_HINT_MAX_DISKS];
    QLIST_HEAD(, PrecopyHintsUser) users;
};

/* ------------------------------------------------------------------ */
/* Sending                                                             */

/* A line that the channel does not take is lost; the next hello mends it */
static void G_GNUC_PRINTF(2, 3) hints_send(ThinvmHints *h, const char *fmt, ...)
{
    g_autofree char *text = NULL;
    va_list ap;

    va_start(ap, fmt);
    text = g_strdup_vprintf(fmt, ap);
    va_end(ap);
    qemu_chr_fe_write(&h->chr, (uint8_t *)text, strlen(text));
}

static void hints_ask(ThinvmHints *h)
{
    int64_t now = precopy_clock_ms();

    if (now - h->asked_at >= HINTS_ASK_MS) {
        h->asked_at = now;
        hints_send(h, "hello thinvm-hints %d\n", PRECOPY_HINT_VERSION);
    }
}

/* Tell the agent to begin or to stop, as there are users or not */
static void hints_update(ThinvmHints *h)
{
    bool wanted = !QLIST_EMPTY(&h->users);

    if (!h->version || wanted == h->started) {
        return;
    }
    h->started = wanted;
    if (wanted) {
        hints_send(h, "start %" PRId64 " %d %d\n", ++h->request,
                   HINTS_INTERVAL_MS, HINTS_RANGES_PER_SECOND);
    } else {
        hints_send(h, "stop %" PRId64 "\n", ++h->request);
    }
}

/* ------------------------------------------------------------------ */
/* Disks                                                               */

static void hints_forget_disk(HintsDisk *d)
{
    precopy_hint_map_free(d->map);
    memset(d, 0, sizeof(*d));
}

/* The agent is gone, or begins afresh */
static void hints_forget(ThinvmHints *h)
{
    PrecopyHintsUser *user;

    QEMU_LOCK_GUARD(&h->lock);
    for (int i = 0; i < PRECOPY_HINT_MAX_DISKS; i++) {
        hints_forget_disk(&h->disk[i]);
    }
    QLIST_FOREACH(user, &h->users, next) {
        if (user->trim_request) {
            user->trim_over = true;     /* there will be no answer */
        }
    }
    h->version = 0;
    h->started = false;
}

/* The disk that a user means, or -1.  Called with the lock held. */
static int hints_disk_of(const PrecopyHintsUser *user)
{
    ThinvmHints *h = user->hints;
    int found = -1;

    for (int i = 0; i < PRECOPY_HINT_MAX_DISKS; i++) {
        HintsDisk *d = &h->disk[i];

        if (!d->known || d->size != user->size ||
            (user->serial && strcmp(d->serial, user->serial))) {
            continue;
        }
        if (found >= 0) {
            return -1;                  /* which of them? */
        }
        found = i;
    }
    return found;
}

static void hints_trim(ThinvmHints *h)
{
    PrecopyHintsUser *user;

    QLIST_FOREACH(user, &h->users, next) {
        int disk = -1;

        if (user->trim && !user->trim_request && !user->trim_over) {
            WITH_QEMU_LOCK_GUARD(&h->lock) {
                disk = hints_disk_of(user);
                if (disk >= 0) {
                    user->trim_request = ++h->request;
                }
            }
        }
        if (disk >= 0) {
            hints_send(h, "trim %" PRId64 " %d %d\n", user->trim_request,
                       disk, HINTS_TRIM_MIN_BYTES);
        }
    }
}

/* ------------------------------------------------------------------ */
/* Lines                                                               */

static void hints_hello(ThinvmHints *h, const PrecopyHintLine *line)
{
    hints_forget(h);
    h->version = MIN(line->number[0], PRECOPY_HINT_VERSION);
    pstrcpy(h->agent, sizeof(h->agent), line->word[0]);
    memset(h->cost, 0, sizeof(h->cost));
    hints_send(h, "version %d\n", h->version);
    hints_update(h);
}

static void hints_new_disk(ThinvmHints *h, const PrecopyHintLine *line)
{
    HintsDisk *d = &h->disk[line->disk];

    WITH_QEMU_LOCK_GUARD(&h->lock) {
        hints_forget_disk(d);
        d->known = true;
        d->size = line->number[0];
        pstrcpy(d->serial, sizeof(d->serial), line->word[0]);
        pstrcpy(d->name, sizeof(d->name), line->word[1]);
        pstrcpy(d->reason, sizeof(d->reason), "other");
        d->map = precopy_hint_map_new(h->max_ranges);
    }
    hints_trim(h);
}

static void hints_range(HintsDisk *d, const PrecopyHintLine *line,
                        const PrecopyHintRange *r, int64_t now)
{
    int64_t ms = line->number[0] == PRECOPY_HINT_NO_MS ? HINTS_UNKNOWN_MS
                                                       : line->number[0];

    switch (line->verb) {
    case PRECOPY_VERB_DIRTY:
        precopy_hint_map_set(d->map, r->offset, r->bytes, PRECOPY_HINT_DIRTY,
                             now + ms, now);
        break;
    case PRECOPY_VERB_FREE:
        precopy_hint_map_set(d->map, r->offset, r->bytes, PRECOPY_HINT_FREE,
                             0, now);
        break;
    case PRECOPY_VERB_CLEAN:
        precopy_hint_map_clear(d->map, r->offset, r->bytes,
                               PRECOPY_HINT_DIRTY);
        break;
    default:
        precopy_hint_map_clear(d->map, r->offset, r->bytes,
                               PRECOPY_HINT_FREE);
        break;
    }
}

/* Nobody needs to remember what nobody asks for; with the lock held */
static bool hints_is_used(ThinvmHints *h, int disk)
{
    PrecopyHintsUser *user;

    QLIST_FOREACH(user, &h->users, next) {
        if (hints_disk_of(user) == disk) {
            return true;
        }
    }
    return false;
}

/* What is said of ranges: all of them are on the disk, or none counts */
static bool hints_ranges(ThinvmHints *h, const PrecopyHintLine *line)
{
    HintsDisk *d = &h->disk[line->disk];
    int64_t now = precopy_clock_ms();
    uint64_t looked;

    QEMU_LOCK_GUARD(&h->lock);
    if (!d->known) {
        return false;
    }
    for (int i = 0; i < line->nb_ranges; i++) {
        const PrecopyHintRange *r = &line->range[i];

        if (r->offset > d->size || r->bytes > d->size - r->offset) {
            return false;
        }
    }
    looked = precopy_hint_map_looked(d->map);
    for (int i = 0; i < line->nb_ranges && hints_is_used(h, line->disk); i++) {
        hints_range(d, line, &line->range[i], now);
    }
    /* A short line can make us look at all ranges, again and again */
    looked = precopy_hint_map_looked(d->map) - looked;
    h->tokens -= looked / (double)HINTS_LOOKS;
    return true;
}

static bool hints_coverage(ThinvmHints *h, const PrecopyHintLine *line)
{
    HintsDisk *d = &h->disk[line->disk];

    QEMU_LOCK_GUARD(&h->lock);
    if (!d->known) {
        return false;
    }
    d->dirty_known = line->number[0];
    d->dirty_unknown = line->number[1];
    pstrcpy(d->reason, sizeof(d->reason), line->word[0]);
    return true;
}

static void hints_done(ThinvmHints *h, const PrecopyHintLine *line)
{
    PrecopyHintsUser *user;

    QEMU_LOCK_GUARD(&h->lock);
    QLIST_FOREACH(user, &h->users, next) {
        if (user->trim_request && user->trim_request == line->number[0]) {
            user->trim_over = true;
            h->trimmed = line->number[1];
        }
    }
}

static void hints_tell_boot_cache(ThinvmHints *h)
{
    Error *local_err = NULL;

    if (bootcache_boot_ended(h->boot_cache, &local_err)) {
        g_free(g_steal_pointer(&h->boot_cache_problem));
        return;
    }
    /* The guest must not fill the log with it */
    if (g_strcmp0(h->boot_cache_problem, error_get_pretty(local_err))) {
        g_free(h->boot_cache_problem);
        h->boot_cache_problem = g_strdup(error_get_pretty(local_err));
        warn_report_err(local_err);
    } else {
        error_free(local_err);
    }
}

/* False if that is too soon after the last time */
static bool hints_booted(ThinvmHints *h)
{
    int64_t now = precopy_clock_ms();

    if (h->booted && now - h->booted_at < HINTS_BOOTED_MS) {
        return false;
    }
    h->booted++;
    h->booted_at = now;
    qapi_event_send_thinvm_guest_booted(
        object_get_canonical_path_component(OBJECT(h)));
    if (h->boot_cache) {
        hints_tell_boot_cache(h);
    }
    return true;
}

/* Returns false if the line is to be counted as ignored */
static bool hints_line(ThinvmHints *h, const char *text, size_t length)
{
    PrecopyHintLine line;

    if (!precopy_hint_parse(text, length, &line)) {
        return false;
    }
    if (!h->version && line.verb != PRECOPY_VERB_HELLO) {
        hints_ask(h);
        return false;
    }
    switch (line.verb) {
    case PRECOPY_VERB_HELLO:
        hints_hello(h, &line);
        return true;
    case PRECOPY_VERB_DISK:
        hints_new_disk(h, &line);
        return true;
    case PRECOPY_VERB_GONE:
        WITH_QEMU_LOCK_GUARD(&h->lock) {
            hints_forget_disk(&h->disk[line.disk]);
        }
        return true;
    case PRECOPY_VERB_COVERAGE:
        return hints_coverage(h, &line);
    case PRECOPY_VERB_COST:
        memcpy(h->cost, line.number, sizeof(h->cost));
        return true;
    case PRECOPY_VERB_DONE:
        hints_done(h, &line);
        return true;
    case PRECOPY_VERB_BOOTED:
        return hints_booted(h);
    case PRECOPY_VERB_BYE:
        hints_forget(h);
        return true;
    default:
        return hints_ranges(h, &line);
    }
}

/* ------------------------------------------------------------------ */
/* The character device                                                */

static void hints_refill(ThinvmHints *h)
{
    int64_t now = precopy_clock_ms();

    h->tokens = MIN(h->tokens + (now - h->tokens_at) *
                    (HINTS_LINES_PER_SECOND / 1000.0), HINTS_BURST);
    h->tokens_at = now;
}

/* Lines are counted when they have been read, so this may go below zero */
static int hints_can_read(void *opaque)
{
    ThinvmHints *h = opaque;

    hints_refill(h);
    if (h->tokens >= 1) {
        return PRECOPY_HINT_MAX_LINE;
    }
    timer_mod(h->timer, precopy_clock_ms() + 1 +
              (1 - h->tokens) * 1000 / HINTS_LINES_PER_SECOND);
    return 0;
}

static void hints_may_read(void *opaque)
{
    ThinvmHints *h = opaque;

    qemu_chr_fe_accept_input(&h->chr);
}

static void hints_end_line(ThinvmHints *h)
{
    h->lines++;
    if (h->overlong || !hints_line(h, h->line, h->nb_line)) {
        h->ignored++;
    }
    h->nb_line = 0;
    h->overlong = false;
}

static void hints_read(void *opaque, const uint8_t *buf, int size)
{
    ThinvmHints *h = opaque;

    for (int i = 0; i < size; i++) {
        if (buf[i] == '\n') {
            h->tokens--;
            hints_end_line(h);
        } else if (h->nb_line == sizeof(h->line) - 1) {
            h->overlong = true;
        } else {
            h->line[h->nb_line++] = buf[i];
        }
    }
    /* Bytes without a line feed are not for nothing either */
    h->tokens -= size / (double)PRECOPY_HINT_MAX_LINE;
}

static void hints_event(void *opaque, QEMUChrEvent event)
{
    ThinvmHints *h = opaque;

    switch (event) {
    case CHR_EVENT_OPENED:
        h->open = true;
        h->nb_line = 0;
        h->overlong = false;
        h->asked_at = INT64_MIN / 2;
        hints_forget(h);
        hints_ask(h);
        break;
    case CHR_EVENT_CLOSED:
        h->open = false;
        hints_forget(h);
        break;
    default:
        break;
    }
}

/* ------------------------------------------------------------------ */
/* Users                                                               */

PrecopyHintsUser *precopy_hints_attach(const char *id, const char *serial,
                                       int64_t size, bool trim, Error **errp)
{
    Object *obj = object_resolve_path_component(object_get_objects_root(), id);
    PrecopyHintsUser *user;
    ThinvmHints *h;

    h = obj ? (ThinvmHints *)object_dynamic_cast(obj, TYPE_THINVM_HINTS)
            : NULL;
    if (!h) {
        error_setg(errp, "There is no object '%s' of type '%s'", id,
                   TYPE_THINVM_HINTS);
        return NULL;
    }
    user = g_new0(PrecopyHintsUser, 1);
    user->hints = h;
    user->serial = g_strdup(serial);
    user->size = size;
    user->trim = trim;
    user->trim_deadline = precopy_clock_ms() + HINTS_TRIM_PATIENCE_MS;
    object_ref(obj);
    WITH_QEMU_LOCK_GUARD(&h->lock) {
        QLIST_INSERT_HEAD(&h->users, user, next);
    }
    hints_update(h);
    hints_trim(h);
    return user;
}

void precopy_hints_detach(PrecopyHintsUser *user)
{
    ThinvmHints *h;

    if (!user) {
        return;
    }
    h = user->hints;
    WITH_QEMU_LOCK_GUARD(&h->lock) {
        QLIST_REMOVE(user, next);
    }
    hints_update(h);
    g_free(user->serial);
    g_free(user);
    object_unref(OBJECT(h));
}

bool precopy_hints_trimming(PrecopyHintsUser *user)
{
    QEMU_LOCK_GUARD(&user->hints->lock);
    return user->trim && !user->trim_over &&
           precopy_clock_ms() < user->trim_deadline;
}

void precopy_hints_get(void *opaque, int64_t offset, int64_t now,
                       PrecopyHint *hint)
{
    PrecopyHintsUser *user = opaque;
    int disk;

    QEMU_LOCK_GUARD(&user->hints->lock);
    disk = hints_disk_of(user);
    if (disk >= 0) {
        precopy_hint_map_get(user->hints->disk[disk].map, offset, now, hint);
    } else {
        *hint = (PrecopyHint) {
            .end = INT64_MAX,
        };
    }
}

void precopy_hints_written(void *opaque, int64_t offset, int64_t bytes,
                           int64_t now)
{
    PrecopyHintsUser *user = opaque;
    int disk;

    QEMU_LOCK_GUARD(&user->hints->lock);
    disk = hints_disk_of(user);
    if (disk >= 0) {
        precopy_hint_map_set(user->hints->disk[disk].map, offset, bytes,
                             PRECOPY_HINT_NONE, 0, now);
    }
}

/* ------------------------------------------------------------------ */
/* The object                                                          */

static void hints_complete(UserCreatable *uc, Error **errp)
{
    ThinvmHints *h = THINVM_HINTS(uc);
    Chardev *chr;

    if (!h->chardev) {
        error_setg(errp, "Parameter 'chardev' is missing: the character "
                   "device that the guest's agent is behind");
        return;
    }
    chr = qemu_chr_find(h->chardev);
    if (!chr) {
        error_setg(errp, "There is no character device '%s'", h->chardev);
        return;
    }
    if (!qemu_chr_fe_init(&h->chr, chr, errp)) {
        return;
    }
    h->complete = true;
    qemu_chr_fe_set_handlers(&h->chr, hints_can_read, hints_read, hints_event,
                             NULL, h, NULL, true);
}

static bool hints_can_be_deleted(UserCreatable *uc)
{
    return QLIST_EMPTY(&THINVM_HINTS(uc)->users);
}

static char *hints_get_chardev(Object *obj, Error **errp)
{
    return g_strdup(THINVM_HINTS(obj)->chardev);
}

static void hints_set_chardev(Object *obj, const char *value, Error **errp)
{
    ThinvmHints *h = THINVM_HINTS(obj);

    if (h->complete) {
        error_setg(errp, "Property 'chardev' cannot be changed");
        return;
    }
    g_free(h->chardev);
    h->chardev = g_strdup(value);
}

static char *hints_get_boot_cache(Object *obj, Error **errp)
{
    return g_strdup(THINVM_HINTS(obj)->boot_cache ?: "");
}

/* The node may come later, and go; it is looked for when it is needed */
static void hints_set_boot_cache(Object *obj, const char *value, Error **errp)
{
    ThinvmHints *h = THINVM_HINTS(obj);

    if (h->complete) {
        error_setg(errp, "Property 'boot-cache' cannot be changed");
        return;
    }
    if (!*value || strlen(value) >= sizeof_field(BlockDriverState, node_name)) {
        error_setg(errp, "Property 'boot-cache' is '%s', it must be the name "
                   "of a node, of 1 to %zu bytes", value,
                   sizeof_field(BlockDriverState, node_name) - 1);
        return;
    }
    g_free(h->boot_cache);
    h->boot_cache = g_strdup(value);
}

static void hints_get_max_ranges(Object *obj, Visitor *v, const char *name,
                                 void *opaque, Error **errp)
{
    uint32_t value = THINVM_HINTS(obj)->max_ranges;

    visit_type_uint32(v, name, &value, errp);
}

static void hints_set_max_ranges(Object *obj, Visitor *v, const char *name,
                                 void *opaque, Error **errp)
{
    uint32_t value;

    if (!visit_type_uint32(v, name, &value, errp)) {
        return;
    }
    if (value < 1 || value > HINTS_MAX_RANGES) {
        error_setg(errp, "Property 'max-ranges' is %" PRIu32 ", it must be "
                   "from 1 to %d", value, HINTS_MAX_RANGES);
        return;
    }
    THINVM_HINTS(obj)->max_ranges = value;
}

static void hints_instance_init(Object *obj)
{
    ThinvmHints *h = THINVM_HINTS(obj);

    qemu_mutex_init(&h->lock);
    QLIST_INIT(&h->users);
    h->max_ranges = HINTS_DEFAULT_RANGES;
    h->tokens = HINTS_BURST;
    h->tokens_at = precopy_clock_ms();
    h->timer = timer_new_ms(QEMU_CLOCK_REALTIME, hints_may_read, h);
}

static void hints_finalize(Object *obj)
{
    ThinvmHints *h = THINVM_HINTS(obj);

    if (h->complete) {
        qemu_chr_fe_deinit(&h->chr, false);
    }
    timer_free(h->timer);
    hints_forget(h);
    qemu_mutex_destroy(&h->lock);
    g_free(h->chardev);
    g_free(h->boot_cache);
    g_free(h->boot_cache_problem);
}

static void hints_class_init(ObjectClass *oc, void *data)
{
    UserCreatableClass *ucc = USER_CREATABLE_CLASS(oc);

    ucc->complete = hints_complete;
    ucc->can_be_deleted = hints_can_be_deleted;
    object_class_property_add_str(oc, "chardev", hints_get_chardev,
                                  hints_set_chardev);
    object_class_property_add_str(oc, "boot-cache", hints_get_boot_cache,
                                  hints_set_boot_cache);
    object_class_property_add(oc, "max-ranges", "uint32",
                              hints_get_max_ranges, hints_set_max_ranges,
                              NULL, NULL);
}

static const TypeInfo hints_type = {
    .name = TYPE_THINVM_HINTS,
    .parent = TYPE_OBJECT,
    .instance_size = sizeof(ThinvmHints),
    .instance_init = hints_instance_init,
    .instance_finalize = hints_finalize,
    .class_init = hints_class_init,
    .interfaces = (InterfaceInfo[]) {
        { TYPE_USER_CREATABLE },
        { }
    },
};

static void hints_register_types(void)
{
    type_register_static(&hints_type);
}

type_init(hints_register_types)

/* ------------------------------------------------------------------ */
/* QMP                                                                 */

static ThinvmHintsDiskList *hints_disk_infos(ThinvmHints *h)
{
    ThinvmHintsDiskList *list = NULL;

    QEMU_LOCK_GUARD(&h->lock);
    for (int i = PRECOPY_HINT_MAX_DISKS - 1; i >= 0; i--) {
        HintsDisk *d = &h->disk[i];
        ThinvmHintsDisk *info;

        if (!d->known) {
            continue;
        }
        info = g_new0(ThinvmHintsDisk, 1);
        info->name = g_strdup(d->name);
        info->serial = g_strdup(d->serial);
        info->size = d->size;
        info->dirty_known = d->dirty_known;
        info->dirty_unknown = d->dirty_unknown;
        info->reason = g_strdup(d->reason);
        info->ranges = precopy_hint_map_count(d->map);
        info->dropped = precopy_hint_map_dropped(d->map);
        QAPI_LIST_PREPEND(list, info);
    }
    return list;
}

static int hints_info(Object *obj, void *opaque)
{
    ThinvmHintsInfoList **list = opaque;
    ThinvmHints *h = (ThinvmHints *)object_dynamic_cast(obj,
                                                        TYPE_THINVM_HINTS);
    ThinvmHintsInfo *info;

    if (!h) {
        return 0;
    }
    info = g_new0(ThinvmHintsInfo, 1);
    info->id = g_strdup(object_get_canonical_path_component(obj));
    info->connected = h->version > 0;
    info->version = h->version;
    info->agent = h->version ? g_strdup(h->agent) : NULL;
    info->reporting = h->started;
    info->lines = h->lines;
    info->ignored = h->ignored;
    info->booted = h->booted;
    info->boot_cache_problem = g_strdup(h->boot_cache_problem);
    info->trimmed = h->trimmed;
    info->cpu_us = h->cost[0];
    info->written = h->cost[1];
    info->disks = hints_disk_infos(h);
    QAPI_LIST_PREPEND(*list, info);
    return 0;
}

ThinvmHintsInfoList *qmp_query_thinvm_hints(Error **errp)
{
    ThinvmHintsInfoList *list = NULL;

    object_child_foreach(object_get_objects_root(), hints_info, &list);
    return list;
}
