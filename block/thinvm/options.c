/*
 * thinvm driver layer: run-time options
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Turns the QDict of an open or a reopen into ThinvmOptions.  Every message
 * names the option, the value given, and what would be right.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qapi/util.h"
#include "qemu/cutils.h"
#include "qemu/option.h"
#include "qobject/qdict.h"
#include "thinvm.h"

/*
 * Smaller caches would thrash over the inner pages of a single request; the
 * upper bound is only there to catch slips.
 */
#define THINVM_MIN_CACHE_SIZE       (256 * KiB)
#define THINVM_MAX_CACHE_SIZE       (1 * TiB)
#define THINVM_MIN_FLUSH_INTERVAL   10              /* milliseconds */
#define THINVM_MAX_FLUSH_INTERVAL   (10 * 60 * 1000)
#define THINVM_DEFAULT_FLUSH_INTERVAL 1000

const char *const thinvm_mutable_options[] = {
    THINVM_OPT_MODE,
    THINVM_OPT_CACHE_SIZE,
    THINVM_OPT_FLUSH_INTERVAL,
    THINVM_OPT_FORCE_TAKEOVER,
    THINVM_OPT_RESERVATION,
    THINVM_OPT_WATERMARK,
    THINVM_OPT_WATERMARK_PERCENT,
    NULL
};

static QemuOptsList thinvm_runtime_opts = {
    .name = "thinvm",
    .head = QTAILQ_HEAD_INITIALIZER(thinvm_runtime_opts.head),
    .desc = {
        {
            .name = THINVM_OPT_MODE,
            .type = QEMU_OPT_STRING,
            .help = "Use of the mapping cache: writeback, writethrough or "
                    "migration (default: writeback)",
        }, {
            .name = THINVM_OPT_CACHE_SIZE,
            .type = QEMU_OPT_SIZE,
            .help = "Memory for cached metadata (default: by disk size)",
        }, {
            .name = THINVM_OPT_FLUSH_INTERVAL,
            .type = QEMU_OPT_NUMBER,
            .help = "Milliseconds that a change of the mapping may wait for "
                    "its commit (default: 1000)",
        }, {
            .name = THINVM_OPT_FORCE_TAKEOVER,
            .type = QEMU_OPT_BOOL,
            .help = "Take the image over although another host, which was "
                    "fenced, owns it (default: off)",
        }, {
            .name = THINVM_OPT_RESERVATION,
            .type = QEMU_OPT_STRING,
            .help = "SCSI persistent reservation: auto, on or off "
                    "(default: auto)",
        }, {
            .name = THINVM_OPT_SNAPSHOT_ID,
            .type = QEMU_OPT_STRING,
            .help = "Id of an internal snapshot to show, read-only",
        }, {
            .name = THINVM_OPT_SNAPSHOT_NAME,
            .type = QEMU_OPT_STRING,
            .help = "Name of an internal snapshot to show, read-only",
        }, {
            .name = THINVM_OPT_WATERMARK,
            .type = QEMU_OPT_SIZE,
            .help = "Free bytes of the device below which THINVM_SPACE_LOW "
                    "is emitted (default: 0, never)",
        }, {
            .name = THINVM_OPT_WATERMARK_PERCENT,
            .type = QEMU_OPT_NUMBER,
            .help = "The same as a share of the device, 0 to 100 "
                    "(default: 0)",
        },
        { /* end of list */ }
    },
};

/* -1 with @errp if @value is none of the enumeration's */
static int thinvm_parse_enum(const char *name, const char *value,
                             const QEnumLookup *lookup, int dflt,
                             const char *choices, Error **errp)
{
    int i;

    if (!value) {
        return dflt;
    }
    i = qapi_enum_parse(lookup, value, -1, NULL);
    if (i < 0) {
        error_setg(errp, "Option '%s' is '%s'; it must be %s",
                   name, value, choices);
    }
    return i;
}

static bool thinvm_parse_numbers(ThinvmOptions *dst, QemuOpts *opts,
                                 Error **errp)
{
    uint64_t interval;

    dst->cache_size = qemu_opt_get_size(opts, THINVM_OPT_CACHE_SIZE, 0);
    if (qemu_opt_get(opts, THINVM_OPT_CACHE_SIZE) &&
        (dst->cache_size < THINVM_MIN_CACHE_SIZE ||
         dst->cache_size > THINVM_MAX_CACHE_SIZE)) {
        error_setg(errp, "Option '%s' is %" PRIu64 " bytes; it must be from "
                   "256 KiB to 1 TiB, or left out for the default",
                   THINVM_OPT_CACHE_SIZE, dst->cache_size);
        return false;
    }

    interval = qemu_opt_get_number(opts, THINVM_OPT_FLUSH_INTERVAL,
                                   THINVM_DEFAULT_FLUSH_INTERVAL);
    if (interval < THINVM_MIN_FLUSH_INTERVAL ||
        interval > THINVM_MAX_FLUSH_INTERVAL) {
        error_setg(errp, "Option '%s' is %" PRIu64 "; it must be from %d to "
                   "%d milliseconds", THINVM_OPT_FLUSH_INTERVAL, interval,
                   THINVM_MIN_FLUSH_INTERVAL, THINVM_MAX_FLUSH_INTERVAL);
        return false;
    }
    dst->flush_interval = interval;
    return true;
}

static bool thinvm_parse_watermarks(ThinvmOptions *dst, QemuOpts *opts,
                                    Error **errp)
{
    uint64_t percent = qemu_opt_get_number(opts, THINVM_OPT_WATERMARK_PERCENT,
                                           0);

    dst->space_watermark = qemu_opt_get_size(opts, THINVM_OPT_WATERMARK, 0);
    if (dst->space_watermark > INT64_MAX) {
        error_setg(errp, "Option '%s' is %" PRIu64 "; it must be less than "
                   "8 EiB", THINVM_OPT_WATERMARK, dst->space_watermark);
        return false;
    }
    if (percent > 100) {
        error_setg(errp, "Option '%s' is %" PRIu64 "; it must be from 0 to "
                   "100", THINVM_OPT_WATERMARK_PERCENT, percent);
        return false;
    }
    dst->space_watermark_percent = percent;
    return true;
}

static bool thinvm_parse_string(const char *name, const char *value,
                                char *dst, size_t size, Error **errp)
{
    if (value && (!*value || strlen(value) >= size)) {
        error_setg(errp, "Option '%s' has %zu bytes; it must have from 1 to "
                   "%zu", name, strlen(value), size - 1);
        return false;
    }
    pstrcpy(dst, size, value ?: "");
    return true;
}

static bool thinvm_parse_snapshot(ThinvmOptions *dst, QemuOpts *opts,
                                  Error **errp)
{
    return thinvm_parse_string(THINVM_OPT_SNAPSHOT_ID,
                               qemu_opt_get(opts, THINVM_OPT_SNAPSHOT_ID),
                               dst->snapshot_id, sizeof(dst->snapshot_id),
                               errp) &&
           thinvm_parse_string(THINVM_OPT_SNAPSHOT_NAME,
                               qemu_opt_get(opts, THINVM_OPT_SNAPSHOT_NAME),
                               dst->snapshot_name, sizeof(dst->snapshot_name),
                               errp);
}

bool thinvm_options_parse(ThinvmOptions *dst, QDict *options, Error **errp)
{
    QemuOpts *opts = qemu_opts_create(&thinvm_runtime_opts, NULL, 0,
                                      &error_abort);
    bool ok = false;
    int mode, reservation;

    if (!qemu_opts_absorb_qdict(opts, options, errp)) {
        goto out;
    }
    mode = thinvm_parse_enum(THINVM_OPT_MODE,
                             qemu_opt_get(opts, THINVM_OPT_MODE),
                             &ThinvmCacheMode_lookup,
                             THINVM_CACHE_MODE_WRITEBACK,
                             "writeback, writethrough or migration", errp);
    if (mode < 0) {
        goto out;
    }
    reservation = thinvm_parse_enum(THINVM_OPT_RESERVATION,
                                    qemu_opt_get(opts, THINVM_OPT_RESERVATION),
                                    &ThinvmReservation_lookup,
                                    THINVM_RESERVATION_AUTO,
                                    "auto, on or off", errp);
    if (reservation < 0) {
        goto out;
    }
    if (!thinvm_parse_numbers(dst, opts, errp) ||
        !thinvm_parse_watermarks(dst, opts, errp) ||
        !thinvm_parse_snapshot(dst, opts, errp)) {
        goto out;
    }
    dst->mode = mode;
    dst->reservation = reservation;
    dst->force_takeover = qemu_opt_get_bool(opts, THINVM_OPT_FORCE_TAKEOVER,
                                            false);
    ok = true;
out:
    qemu_opts_del(opts);
    return ok;
}
