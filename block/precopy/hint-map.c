/*
 * blockdev-precopy: ranges of one disk that a guest has said something of
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A balanced tree (GSequence) of ranges in ascending order that do not
 * overlap.  A new one takes its place from those that were there, so each
 * call adds two ranges at most.  When there is no room, those whose time is
 * over are thrown out, at most once in a while, since that looks at all.
 */

#include "qemu/osdep.h"
#include "hint-map.h"

#define HINT_PURGE_MS 1000

typedef struct HintRange {
    int64_t start, end;
    PrecopyHintKind kind;
    int64_t due;
} HintRange;

struct PrecopyHintMap {
    GSequence *ranges;
    size_t nb, max;
    uint64_t dropped, looked;
    int64_t purged;             /* when */
};

PrecopyHintMap *precopy_hint_map_new(size_t max_ranges)
{
    PrecopyHintMap *m = g_new0(PrecopyHintMap, 1);

    m->max = max_ranges;
    m->ranges = g_sequence_new(g_free);
    m->purged = INT64_MIN / 2;
    return m;
}

void precopy_hint_map_free(PrecopyHintMap *m)
{
    if (m) {
        g_sequence_free(m->ranges);
        g_free(m);
    }
}

size_t precopy_hint_map_count(const PrecopyHintMap *m)
{
    return m->nb;
}

uint64_t precopy_hint_map_dropped(const PrecopyHintMap *m)
{
    return m->dropped;
}

uint64_t precopy_hint_map_looked(const PrecopyHintMap *m)
{
    return m->looked;
}

static int hint_compare(gconstpointer a, gconstpointer b, gpointer opaque)
{
    const HintRange *x = a, *y = b;

    return x->start < y->start ? -1 : x->start > y->start;
}

/* The first range that ends behind @offset */
static GSequenceIter *hint_find(const PrecopyHintMap *m, int64_t offset)
{
    HintRange key = {
        .start = offset,
    };
    GSequenceIter *behind = g_sequence_search(m->ranges, &key, hint_compare,
                                              NULL);
    GSequenceIter *before = g_sequence_iter_prev(behind);

    /* What search returns lies behind the ranges that start at or before */
    if (before != behind) {
        HintRange *r = g_sequence_get(before);

        if (r->end > offset) {
            return before;
        }
    }
    return behind;
}

static void hint_remove(PrecopyHintMap *m, GSequenceIter *i)
{
    g_sequence_remove(i);
    m->nb--;
}

static void hint_insert(PrecopyHintMap *m, GSequenceIter *before,
                        int64_t start, int64_t end, PrecopyHintKind kind,
                        int64_t due)
{
    HintRange *r;

    if (m->nb >= m->max) {
        m->dropped++;
        return;
    }
    r = g_new(HintRange, 1);
    *r = (HintRange) {
        .start = start,
        .end = end,
        .kind = kind,
        .due = due,
    };
    g_sequence_insert_before(before, r);
    m->nb++;
}

/*
 * Cut [start, end) out of the ranges of a kind, NONE for all.  Returns where
 * a range that starts there would come.
 */
static GSequenceIter *hint_cut(PrecopyHintMap *m, int64_t start, int64_t end,
                               PrecopyHintKind kind)
{
    GSequenceIter *i = hint_find(m, start);

    while (!g_sequence_iter_is_end(i)) {
        HintRange *r = g_sequence_get(i);
        GSequenceIter *next = g_sequence_iter_next(i);

        if (r->start >= end) {
            break;
        }
        m->looked++;
        if (kind != PRECOPY_HINT_NONE && r->kind != kind) {
            i = next;
            continue;
        }
        if (r->start < start) {
            if (r->end > end) {
                hint_insert(m, next, end, r->end, r->kind, r->due);
                next = g_sequence_iter_next(i);
            }
            r->end = start;
        } else if (r->end > end) {
            r->start = end;
            return i;
        } else {
            hint_remove(m, i);
        }
        i = next;
    }
    return i;
}

static bool hint_over(const HintRange *r, int64_t now)
{
    return r->kind == PRECOPY_HINT_DIRTY && r->due + PRECOPY_HINT_GRACE < now;
}

static void hint_purge(PrecopyHintMap *m, int64_t now)
{
    GSequenceIter *i = g_sequence_get_begin_iter(m->ranges);

    if (now - m->purged < HINT_PURGE_MS) {
        return;
    }
    m->purged = now;
    while (!g_sequence_iter_is_end(i)) {
        GSequenceIter *next = g_sequence_iter_next(i);

        if (hint_over(g_sequence_get(i), now)) {
            hint_remove(m, i);
        }
        i = next;
    }
}

void precopy_hint_map_set(PrecopyHintMap *m, int64_t offset, int64_t bytes,
                          PrecopyHintKind kind, int64_t due, int64_t now)
{
    GSequenceIter *place;

    assert(offset >= 0 && bytes > 0 && bytes <= INT64_MAX - offset);
    if (m->nb >= m->max) {
        hint_purge(m, now);
    }
    place = hint_cut(m, offset, offset + bytes, PRECOPY_HINT_NONE);
    if (kind != PRECOPY_HINT_NONE) {
        hint_insert(m, place, offset, offset + bytes, kind, due);
    }
}

void precopy_hint_map_clear(PrecopyHintMap *m, int64_t offset, int64_t bytes,
                            PrecopyHintKind kind)
{
    if (m->nb) {
        hint_cut(m, offset, offset + bytes, kind);
    }
}

void precopy_hint_map_reset(PrecopyHintMap *m)
{
    g_sequence_remove_range(g_sequence_get_begin_iter(m->ranges),
                            g_sequence_get_end_iter(m->ranges));
    m->nb = 0;
    m->dropped = 0;
}

void precopy_hint_map_get(const PrecopyHintMap *m, int64_t offset,
                          int64_t now, PrecopyHint *hint)
{
    GSequenceIter *i = hint_find(m, offset);
    const HintRange *r;

    *hint = (PrecopyHint) {
        .end = INT64_MAX,
    };
    if (g_sequence_iter_is_end(i)) {
        return;
    }
    r = g_sequence_get(i);
    if (r->start > offset) {
        hint->end = r->start;
        return;
    }
    hint->end = r->end;
    if (!hint_over(r, now)) {
        hint->kind = r->kind;
        hint->due = r->due;
    }
}
