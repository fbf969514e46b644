/*
 * blockdev-precopy: what still has to be copied, and in which order
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See track.h for what it promises.  The order: a sweep walks over the disk
 * once and picks dirty blocks that are not expected to be written within its
 * horizon, the time that the rest of the copy takes.  A block that will be
 * written before the copy ends is sent twice if it is sent now, and once if
 * it is sent last.  What is expected comes from the write history (heat.c),
 * and from the guest, whose word can only make a block wait for a later
 * sweep.
 *
 * How many writes that has saved is counted, not guessed: a block that was
 * passed over and is written before it is sent would have been sent twice.
 */

#include "qemu/osdep.h"
#include "qemu/bitmap.h"
#include "qemu/host-utils.h"
#include "track.h"

/* Bits of the bitmaps: 64 MiB each at most */
#define PRECOPY_MAX_BLOCKS      (1LL << 29)
#define PRECOPY_MIN_GRANULARITY 4096
#define PRECOPY_HEAT_BYTES      (64 * 1024 * 1024)
/* Blocks that are looked at under the lock in one go */
#define PRECOPY_PICK_LOOKS      4096
/* Writes come early as well as late: wait for those of so many horizons */
#define PRECOPY_CAUTION         4

int64_t precopy_default_granularity(int64_t length)
{
    int64_t granularity = PRECOPY_MIN_GRANULARITY;

    while (length / granularity >= PRECOPY_MAX_BLOCKS) {
        granularity *= 2;
    }
    return granularity;
}

PrecopyTrack *precopy_track_new(int64_t length, int64_t granularity)
{
    PrecopyTrack *t = g_new0(PrecopyTrack, 1);

    assert(is_power_of_2(granularity) && length >= 0);
    qemu_mutex_init(&t->lock);
    QTAILQ_INIT(&t->ops);
    t->length = length;
    t->granularity = granularity;
    t->nb_blocks = DIV_ROUND_UP(length, granularity);
    t->dirty = hbitmap_alloc(t->nb_blocks, 0);
    t->heat = precopy_heat_new(t->nb_blocks, PRECOPY_HEAT_BYTES);
    t->sent = bitmap_try_new(t->nb_blocks + 1);
    t->passed_history = bitmap_try_new(t->nb_blocks + 1);
    t->passed_hints = bitmap_try_new(t->nb_blocks + 1);
    if (!t->sent || !t->passed_history || !t->passed_hints) {
        precopy_track_free(t);
        return NULL;
    }
    return t;
}

void precopy_track_free(PrecopyTrack *t)
{
    if (t) {
        assert(QTAILQ_EMPTY(&t->ops));
        hbitmap_free(t->dirty);
        precopy_heat_free(t->heat);
        g_free(t->sent);
        g_free(t->passed_history);
        g_free(t->passed_hints);
        qemu_mutex_destroy(&t->lock);
        g_free(t);
    }
}

/* ------------------------------------------------------------------ */
/* Marking                                                             */

static void track_blocks(const PrecopyTrack *t, int64_t offset, int64_t bytes,
                         int64_t *first, int64_t *nb)
{
    int64_t end = MIN(offset + bytes, t->length);

    *first = offset / t->granularity;
    /* A guest may well write nothing, amid a block */
    *nb = bytes ? MAX(DIV_ROUND_UP(end, t->granularity) - *first, 0) : 0;
}

static void track_count_spared(PrecopyTrack *t, int64_t first, int64_t nb)
{
    for (int64_t b = first; b < first + nb; b++) {
        if (test_bit(b, t->passed_hints)) {
            t->counters.spared_hints += t->granularity;
        } else if (test_bit(b, t->passed_history)) {
            t->counters.spared_history += t->granularity;
        }
    }
    bitmap_clear(t->passed_hints, first, nb);
    bitmap_clear(t->passed_history, first, nb);
}

static void track_set_dirty(PrecopyTrack *t, int64_t first, int64_t nb)
{
    uint64_t before = hbitmap_count(t->dirty);

    hbitmap_set(t->dirty, first, nb);
    t->counters.newly_dirty +=
        (hbitmap_count(t->dirty) - before) * t->granularity;
}

static void track_wrote(PrecopyTrack *t, int64_t offset, int64_t bytes,
                        int64_t now, bool set_dirty)
{
    int64_t first, nb;

    QEMU_LOCK_GUARD(&t->lock);
    track_blocks(t, offset, bytes, &first, &nb);
    if (!nb) {
        return;
    }
    track_count_spared(t, first, nb);
    if (set_dirty) {
        track_set_dirty(t, first, nb);
    }
    precopy_heat_write(t->heat, first, nb, now);
    t->counters.guest_written += bytes;
    t->counters.guest_touched += nb * t->granularity;
    if (t->hint_written) {
        t->hint_written(t->hint_opaque, offset, bytes, now);
    }
}

void precopy_track_wrote(PrecopyTrack *t, int64_t offset, int64_t bytes,
                         int64_t now)
{
    track_wrote(t, offset, bytes, now, true);
}

void precopy_track_wrote_both(PrecopyTrack *t, int64_t offset, int64_t bytes,
                              int64_t now)
{
    track_wrote(t, offset, bytes, now, false);
}

void precopy_track_discarded(PrecopyTrack *t, int64_t offset, int64_t bytes)
{
    int64_t first, nb;

    QEMU_LOCK_GUARD(&t->lock);
    track_blocks(t, offset, bytes, &first, &nb);
    if (!nb) {
        return;
    }
    bitmap_clear(t->passed_hints, first, nb);
    bitmap_clear(t->passed_history, first, nb);
    hbitmap_set(t->dirty, first, nb);
}

void precopy_track_mark(PrecopyTrack *t, int64_t offset, int64_t bytes)
{
    int64_t first, nb;

    QEMU_LOCK_GUARD(&t->lock);
    track_blocks(t, offset, bytes, &first, &nb);
    if (nb) {
        hbitmap_set(t->dirty, first, nb);
    }
}

uint64_t precopy_track_left(PrecopyTrack *t)
{
    QEMU_LOCK_GUARD(&t->lock);
    return MIN(hbitmap_count(t->dirty) * t->granularity, t->length);
}

int64_t precopy_track_place(PrecopyTrack *t, int eighths)
{
    int64_t before = 0, end = 0;
    int64_t start, count;

    QEMU_LOCK_GUARD(&t->lock);
    count = hbitmap_count(t->dirty) / 8 * eighths;
    while (before < count &&
           hbitmap_next_dirty_area(t->dirty, end, t->nb_blocks,
                                   t->nb_blocks, &start, &end)) {
        int64_t nb = MIN(end, count - before);

        before += nb;
        end = start + nb;
    }
    return end;
}

PrecopyCounters precopy_track_counters(PrecopyTrack *t)
{
    QEMU_LOCK_GUARD(&t->lock);
    return t->counters;
}

void precopy_track_sent(PrecopyTrack *t, int64_t offset, int64_t bytes,
                        bool written_through)
{
    int64_t first, nb, again = 0;

    QEMU_LOCK_GUARD(&t->lock);
    track_blocks(t, offset, bytes, &first, &nb);
    for (int64_t b = first; b < first + nb; b++) {
        again += test_bit(b, t->sent);
    }
    bitmap_set(t->sent, first, nb);
    t->counters.sent += bytes;
    t->counters.resent += MIN(again * t->granularity, bytes);
    if (written_through) {
        t->counters.written_through += bytes;
    }
}

void precopy_track_zeroed(PrecopyTrack *t, int64_t bytes, bool was_data)
{
    QEMU_LOCK_GUARD(&t->lock);
    t->counters.zeroed += bytes;
    if (was_data) {
        t->counters.spared_zeroes += bytes;
    } else {
        t->counters.spared_discarded += bytes;
    }
}

/* ------------------------------------------------------------------ */
/* Operations in flight                                                */

/* The first of those that overlap with the blocks */
static PrecopyOp *track_find_op(PrecopyTrack *t, int64_t first, int64_t nb)
{
    PrecopyOp *op, *found = NULL;

    QTAILQ_FOREACH(op, &t->ops, next) {
        if (op->first < first + nb && first < op->first + op->nb &&
            (!found || op->first < found->first)) {
            found = op;
        }
    }
    return found;
}

static void track_enter_op(PrecopyTrack *t, PrecopyOp *op, int64_t first,
                           int64_t nb)
{
    assert(!track_find_op(t, first, nb));
    op->first = first;
    op->nb = nb;
    qemu_co_queue_init(&op->waiters);
    QTAILQ_INSERT_TAIL(&t->ops, op, next);
}

void precopy_track_end_op(PrecopyTrack *t, PrecopyOp *op)
{
    QEMU_LOCK_GUARD(&t->lock);
    QTAILQ_REMOVE(&t->ops, op, next);
    while (qemu_co_enter_next(&op->waiters, &t->lock)) {
        /* each of them looks for itself */
    }
}

void coroutine_fn precopy_track_wait_ops(PrecopyTrack *t)
{
    QEMU_LOCK_GUARD(&t->lock);
    while (!QTAILQ_EMPTY(&t->ops)) {
        qemu_co_queue_wait(&QTAILQ_FIRST(&t->ops)->waiters, &t->lock);
    }
}

bool coroutine_fn precopy_track_begin_write(PrecopyTrack *t, int64_t offset,
                                            int64_t bytes, PrecopyOp *op)
{
    int64_t first, nb;

    track_blocks(t, offset, bytes, &first, &nb);
    QEMU_LOCK_GUARD(&t->lock);
    while (t->write_through && nb) {
        PrecopyOp *other = track_find_op(t, first, nb);

        if (!other) {
            track_enter_op(t, op, first, nb);
            return true;
        }
        qemu_co_queue_wait(&other->waiters, &t->lock);
    }
    return false;
}

void precopy_track_take(PrecopyTrack *t, int64_t offset, int64_t bytes)
{
    int64_t first = DIV_ROUND_UP(offset, t->granularity);
    int64_t end = offset + bytes >= t->length
        ? t->nb_blocks : (offset + bytes) / t->granularity;

    QEMU_LOCK_GUARD(&t->lock);
    if (first < end) {
        hbitmap_reset(t->dirty, first, end - first);
        bitmap_clear(t->passed_history, first, end - first);
        bitmap_clear(t->passed_hints, first, end - first);
    }
}

bool precopy_track_clean_part(PrecopyTrack *t, int64_t *offset, int64_t *bytes)
{
    int64_t first, nb, begin, end;

    QEMU_LOCK_GUARD(&t->lock);
    track_blocks(t, *offset, *bytes, &first, &nb);
    begin = hbitmap_next_zero(t->dirty, first, nb);
    if (begin < 0) {
        return false;
    }
    end = first + nb;
    while (hbitmap_get(t->dirty, end - 1)) {
        end--;
    }
    begin = MAX(begin * t->granularity, *offset);
    end = MIN(end * t->granularity, *offset + *bytes);
    *offset = begin;
    *bytes = end - begin;
    return true;
}

/* Called with the lock held, which is let go meanwhile */
static void track_wake_waiters(PrecopyTrack *t)
{
    CoQueue woken;
    PrecopyOp *op;

    qemu_co_queue_init(&woken);
    QTAILQ_FOREACH(op, &t->ops, next) {
        QSIMPLEQ_CONCAT(&woken.entries, &op->waiters.entries);
    }
    /* Operations may end now, and who waits for one still goes back to it */
    while (qemu_co_enter_next(&woken, &t->lock)) {
        /* each of them looks for itself */
    }
}

static void track_set_write_through(PrecopyTrack *t, bool on)
{
    bool was_on = t->write_through;

    t->write_through = on && !t->let_go;
    if (was_on && !t->write_through) {
        track_wake_waiters(t);
    }
}

void precopy_track_set_write_through(PrecopyTrack *t, bool on)
{
    QEMU_LOCK_GUARD(&t->lock);
    track_set_write_through(t, on);
}

bool precopy_track_writes_through(PrecopyTrack *t)
{
    QEMU_LOCK_GUARD(&t->lock);
    return t->write_through;
}

void precopy_track_set_starved(PrecopyTrack *t, bool starved)
{
    QEMU_LOCK_GUARD(&t->lock);
    t->starved = starved;
}

bool precopy_track_is_starved(PrecopyTrack *t)
{
    QEMU_LOCK_GUARD(&t->lock);
    return t->starved;
}

void precopy_track_let_go(PrecopyTrack *t)
{
    QEMU_LOCK_GUARD(&t->lock);
    t->let_go = true;
    track_set_write_through(t, false);
}

/* ------------------------------------------------------------------ */
/* Choosing                                                            */

typedef struct TrackLook {
    PrecopyTrack *t;
    const PrecopySweep *sweep;
    int64_t now;
    PrecopyHint hint;           /* at the block looked at last */
} TrackLook;

static PrecopyHintKind track_hint(TrackLook *look, int64_t block)
{
    PrecopyTrack *t = look->t;
    int64_t offset = block * t->granularity;

    if (!t->hint) {
        return PRECOPY_HINT_NONE;
    }
    if (offset >= look->hint.end) {
        t->hint(t->hint_opaque, offset, look->now, &look->hint);
        assert(look->hint.end > offset);
    }
    return look->hint.kind;
}

/* Does the block wait for a later sweep? */
static bool track_defer(TrackLook *look, int64_t block)
{
    PrecopyTrack *t = look->t;
    int64_t horizon = look->sweep->horizon;

    if (horizon > 0 &&
        precopy_heat_expect(t->heat, block, look->now) / PRECOPY_CAUTION <
        horizon) {
        set_bit(block, t->passed_history);
        return true;
    }
    switch (track_hint(look, block)) {
    case PRECOPY_HINT_DIRTY:
        if (horizon > 0 && look->hint.due - look->now < horizon) {
            set_bit(block, t->passed_hints);
            return true;
        }
        break;
    case PRECOPY_HINT_FREE:
        return !look->sweep->free_too;
    case PRECOPY_HINT_NONE:
        break;
    }
    return false;
}

/* How far the run that begins with @first goes on, up to @limit */
static int64_t track_run_end(TrackLook *look, int64_t first, int64_t limit)
{
    PrecopyTrack *t = look->t;
    PrecopyOp *op = track_find_op(t, first, limit - first);
    int64_t end = first + 1;

    if (op) {
        limit = op->first;
    }
    while (end < limit && hbitmap_get(t->dirty, end) &&
           !track_defer(look, end)) {
        end++;
    }
    return end;
}

PrecopyPick precopy_track_pick(PrecopyTrack *t, PrecopySweep *sweep,
                               int64_t max, int64_t now, PrecopyOp *op)
{
    TrackLook look = {
        .t = t,
        .sweep = sweep,
        .now = now,
    };
    int64_t max_blocks = MAX(max / t->granularity, 1);

    QEMU_LOCK_GUARD(&t->lock);
    for (int i = 0; i < PRECOPY_PICK_LOOKS; i++) {
        int64_t block, end;
        PrecopyOp *busy;

        if (sweep->cursor >= t->nb_blocks) {
            return PRECOPY_PICK_END;
        }
        block = hbitmap_next_dirty(t->dirty, sweep->cursor,
                                   t->nb_blocks - sweep->cursor);
        if (block < 0) {
            sweep->cursor = t->nb_blocks;
            return PRECOPY_PICK_END;
        }
        busy = track_find_op(t, block, 1);
        if (busy) {
            /* Written while it is being copied: not quiet at all */
            sweep->cursor = busy->first + busy->nb;
            sweep->nb_deferred++;
            continue;
        }
        if (track_defer(&look, block)) {
            sweep->cursor = block + 1;
            sweep->nb_deferred++;
            continue;
        }
        end = MIN(QEMU_ALIGN_DOWN(block, max_blocks) + max_blocks,
                  t->nb_blocks);
        end = track_run_end(&look, block, end);
        hbitmap_reset(t->dirty, block, end - block);
        bitmap_clear(t->passed_history, block, end - block);
        bitmap_clear(t->passed_hints, block, end - block);
        track_enter_op(t, op, block, end - block);
        sweep->cursor = end;
        sweep->nb_picked += end - block;
        return PRECOPY_PICK_RUN;
    }
    return PRECOPY_PICK_MORE;
}
