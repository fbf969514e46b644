/*
 * thinvm durability layer: reading a base and its journal
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * For opening an image, and for following an owner elsewhere while it writes.
 * Nothing here writes to the device.
 *
 * The state is the newest valid base plus the records that follow it, each
 * named by the one before: sequence one higher, checksum of its predecessor,
 * epoch not lower, own checksum right.  The first that is not so ends the
 * journal.  Was it torn by a power cut, or damaged later?  A later record that
 * says "flushed up to here" proves the latter (ring.c); then
 * opening fails rather than silently dropping what was promised to be there.
 *
 * While an owner writes, what we read may change under us in three ways:
 *  - A record is half written: it is not there yet.
 *  - The owner's base has moved on and pages or ring are being reused: a page
 *    has a wrong checksum, a record does not continue ours.  Both superblocks
 *    tell: if they have moved on we start afresh from them; if not, it is
 *    damage, and is reported.
 *  - A new owner has cut off records that we had read from the device's cache
 *    and that a power cut then took: its first record does not continue ours,
 *    and we start afresh.
 * A state that applied only part of a record is never used again (st->stale).
 *
 * A fresh start is not a cold one: the new state takes over what the old one
 * has in memory and the new base names (preload.c).  What following itself
 * changed may be taken only if the base is of the history that we followed:
 * st->history knows the checksums of the records applied lately, and the base
 * states that of its last one.
 *
 * The owner may make the device longer.  A node reads zeroes beyond the length
 * that it remembers, so we ask for the length before anything that lies there
 * can be looked up (see look_at_length()); and nothing is read while the
 * device is too short for the image, as it may be seen from here.
 *
 * Before we write ourselves the state must stem from the newest base
 * (thinvm_follow_finish()): only then do we know which pages the two newest
 * bases name, and must not be overwritten.
 *
 * Bounds: records replayed by the size of the ring, pages changed by
 * THINVM_MAX_REPLAY_PAGES, whatever a hostile journal says.
 */
#include "qemu/osdep.h"
#include "qemu/lockable.h"
#include "qemu/rcu.h"
#include "qemu/cutils.h"
#include "qapi/qapi-types-block-core.h"
#include "ring.h"
#include "trace.h"

/* What is left of the journal when the owner has released the image; bytes */
#define THINVM_RING_REST            (64 * KiB)
/*
 * Where we have followed, each record was seen when it was fresh: the next
 * one at least
 */
#define THINVM_SCAN_FOLLOW          (2 * THINVM_RECORD_MAX_SIZE)
/* No writer leaves so many pages changed since its older base */
#define THINVM_MAX_REPLAY_PAGES     65536
/* Times that we start again because an owner's base has moved on */
#define THINVM_MAX_RESTARTS         16

/* ------------------------------------------------------------------ */
/* Replay                                                              */

/*
 * Has the block layer learn how long the device is now.  Whether that is enough
 * is judged when we have caught up: what grew may have been given up since.
 */
static void coroutine_fn look_at_length(ThinvmStore *st)
{
    st->dev->co_length(st->dev);
    st->length_unchecked = true;
}

static int coroutine_fn replay_op(ThinvmStore *st, ThinvmState *s,
                                  const ThinvmOp *op, Error **errp)
{
    ThinvmNeeds needs;
    ThinvmInfoState info;
    int ret;

    if (op->type == THINVM_OP_GROW) {
        look_at_length(st);
    }
    thinvm_needs_init(&needs);
    for (;;) {
        thinvm_state_lock(s);
        ret = thinvm_state_prepare(s, op, true, &needs, errp);
        if (ret == 0) {
            thinvm_state_apply(s, op);
        }
        thinvm_state_info(s, &info);
        thinvm_state_unlock(s);
        if (ret != -EAGAIN) {
            break;
        }
        ret = thinvm_store_read_wanted(st, s, &needs, errp);
        if (ret < 0) {
            break;
        }
    }
    thinvm_state_lock(s);
    thinvm_needs_destroy(s, &needs);
    thinvm_state_unlock(s);
    if (ret == -EALREADY) {
        return 0;
    }
    if (ret == 0 && op->type == THINVM_OP_RELOCATE &&
        op->value >> THINVM_HOLDER_SHIFT != THINVM_HOLDER_ACTIVE) {
        /* After it was applied: who reads the number before looks up later */
        QEMU_LOCK_GUARD(&st->lock);
        st->follow_moves++;
    }
    if (ret == -ENOSPC || (ret == 0 &&
                           info.dirty_pages > THINVM_MAX_REPLAY_PAGES)) {
        error_setg(errp, "it changes more metadata than there can be");
        ret = -EBADMSG;
    } else if (ret < 0 && errp && !*errp) {
        error_setg_errno(errp, -ret, "operation of type %d", op->type);
    }
    return ret;
}

/* Apply a record whose checksum is right.  On error @s is of no use */
static int coroutine_fn replay_record(ThinvmStore *st, ThinvmState *s,
                                      const ThinvmRecord *rec,
                                      const uint8_t *data, Error **errp)
{
    ERRP_GUARD();
    g_autofree ThinvmBacking *backing = g_new(ThinvmBacking, 1);
    g_autofree ThinvmSnapshot *snapshot = g_new(ThinvmSnapshot, 1);
    /* the window that @data is in may go while pages are read */
    g_autofree uint8_t *copy = g_memdup2(data, rec->length);
    uint32_t offset = sizeof(ThinvmRecordLe);
    uint32_t end = thinvm_record_operations_end(rec);
    ssize_t ret = 0;

    thinvm_state_lock(s);
    thinvm_state_set_applying(s, rec->sequence);
    thinvm_state_unlock(s);
    trace_thinvm_replay(st, rec->sequence, rec->length, rec->nb_operations);
    for (uint32_t i = 0; i < rec->nb_operations; i++) {
        ThinvmOp op;

        ret = thinvm_op_decode(&op, backing, snapshot, copy + offset,
                               end - offset, errp);
        if (ret >= 0) {
            offset += ret;
            ret = replay_op(st, s, &op, errp);
        }
        if (ret < 0) {
            error_prepend(errp, "Journal record %" PRIu64 ", operation %u: ",
                          rec->sequence, i);
            return ret;
        }
    }
    if (offset != end) {
        error_setg(errp, "Journal record %" PRIu64 " has %" PRIu32
                   " bytes behind its last operation", rec->sequence,
                   end - offset);
        return -EBADMSG;
    }
    return 0;
}

static int coroutine_fn follow_ring(ThinvmStore *st, ThinvmRing *ring,
                                    bool *afresh, Error **errp);

static int coroutine_fn load_base(ThinvmStore *st, ThinvmState *s,
                                  Error **errp)
{
    ThinvmNeeds needs;
    int ret;

    thinvm_needs_init(&needs);
    for (;;) {
        thinvm_state_lock(s);
        ret = thinvm_state_load(s, &needs, errp);
        thinvm_state_unlock(s);
        if (ret != -EAGAIN) {
            break;
        }
        ret = thinvm_store_read_wanted(st, s, &needs, errp);
        if (ret < 0) {
            break;
        }
    }
    thinvm_state_lock(s);
    thinvm_needs_destroy(s, &needs);
    thinvm_state_unlock(s);
    return ret;
}

static void history_add(ThinvmHistory *h, const ThinvmRecord *rec)
{
    h->record[rec->sequence % THINVM_HISTORY].sequence = rec->sequence;
    h->record[rec->sequence % THINVM_HISTORY].crc = rec->crc;
}

/* Is the base @sb one that our state has come by? */
static bool history_has(const ThinvmStore *st, const ThinvmSuperblock *sb)
{
    unsigned i = sb->sequence % THINVM_HISTORY;

    return st->history && !st->stale &&
           st->history->record[i].sequence == sb->sequence &&
           st->history->record[i].crc == sb->record_crc;
}

static void position_init(ThinvmPosition *pos, const ThinvmBases *bases)
{
    uint64_t size = bases->newest.journal_size;

    pos->base = pos->tail = bases->newest.journal_position;
    if (bases->has_older) {
        pos->tail = bases->older.journal_position;
        pos->base = pos->tail + (pos->base + size - pos->tail) % size;
    }
    pos->head = pos->last = pos->base;
    pos->sequence = bases->newest.sequence;
    pos->epoch = bases->newest.epoch;
    pos->crc = bases->newest.record_crc;
    pos->summed = false;        /* it is in the base, so it counts */
}

/* From the base to the end of the journal; an end that is one */
static int coroutine_fn replay_all(ThinvmStore *st, ThinvmState *s,
                                   const ThinvmBases *bases,
                                   ThinvmPosition *pos,
                                   ThinvmHistory *history, Error **errp)
{
    ThinvmRing ring;
    ThinvmRecord rec;
    const uint8_t *data;
    bool followed = st->state, again = false;
    int ret;

    position_init(pos, bases);
    thinvm_ring_init(&ring, st, &bases->newest,
                     followed ? THINVM_RECORD_MAX_SIZE : THINVM_RING_WINDOW);
    for (;;) {
        Error *local_err = NULL;

        ret = thinvm_ring_next(&ring, pos, &rec, &data);
        if (ret < 0) {
            error_setg_errno(errp, -ret, "Could not read the journal at byte "
                             "%" PRIu64, pos->head % ring.size);
            break;
        }
        if (ret == THINVM_NEXT_RECORD &&
            pos->head + ROUND_UP(rec.length, THINVM_PAGE_SIZE) - pos->base <
            ring.size) {
            ret = replay_record(st, s, &rec, data, errp);
            if (ret < 0) {
                break;
            }
            thinvm_ring_advance(pos, &rec);
            history_add(history, &rec);
            again = false;
            continue;
        }
        st->cut_by_sums = ret == THINVM_NEXT_DATA;
        ret = thinvm_ring_check_end(&ring, pos,
                                    followed ? THINVM_SCAN_FOLLOW
                                             : THINVM_SCAN_DENSE,
                                    !followed, &local_err);
        if (ret != -EBADMSG || again) {
            error_propagate(errp, local_err);
            break;
        }
        /* An owner may have written both records since we looked */
        error_free(local_err);
        ring.length = 0;
        again = true;
    }
    thinvm_ring_destroy(&ring);
    return ret;
}

/* Put @s and @pos in force; the former state waits for its readers */
static void publish(ThinvmStore *st, ThinvmState *s, const ThinvmPosition *pos)
{
    ThinvmJournal *j = &st->journal;
    ThinvmState *old = NULL;

    WITH_QEMU_LOCK_GUARD(&st->lock) {
        if (s != st->state) {
            old = st->state;
            smp_wmb();
            qatomic_set(&st->state, s);
            st->follow_moves++;     /* its base may have some */
        }
        j->tail = pos->tail;
        j->base = pos->base;
        j->head = pos->head;
        j->last = pos->last;
        st->last_summed = pos->summed;
        j->composed_sequence = pos->sequence;
        j->composed_crc = pos->crc;
        j->composed_epoch = pos->epoch;
        j->written_sequence = pos->sequence;
        j->next_sequence = pos->sequence + 1;
        st->follow_changes++;
        st->head_block_valid = false;
    }
    if (old) {
        thinvm_retire_state(st, old);
    }
}

/*
 * The newest base is damaged, though its superblock is not: do as if that
 * were.  The journal leads from the older base to the same state.
 */
static void bases_fall_back(ThinvmBases *bases, const Error *why)
{
    bases->newest = bases->older;
    bases->newest_slot = !bases->newest_slot;
    bases->has_older = false;
    bases->suspect = true;
    error_free(bases->damage);
    bases->damage = error_copy(why);
}

/*
 * The newest base may be whole, but not what tells which pages the older one
 * has: these cannot be kept from reuse, so it is no way back any more.
 */
static void bases_drop_older(ThinvmBases *bases, const Error *why)
{
    bases->has_older = false;
    bases->suspect = true;
    error_free(bases->damage);
    bases->damage = error_copy(why);
    error_prepend(&bases->damage, "The older base is damaged: ");
}

/*
 * A state on the base @sb will take over pages of ours if we have come by that
 * base.  If not, the records that we lack may still be in the ring: the owner
 * has made another checkpoint while we were about to start afresh.  A
 * failure only costs reading these pages.
 */
static void coroutine_fn follow_towards(ThinvmStore *st,
                                        const ThinvmSuperblock *sb)
{
    bool afresh = false;
    ThinvmRing ring;

    if (!st->stale && !history_has(st, sb)) {
        thinvm_ring_init(&ring, st, &st->bases.newest, THINVM_PAGE_SIZE);
        follow_ring(st, &ring, &afresh, NULL);
        thinvm_ring_destroy(&ring);
    }
}

/* Which of an image's bases to open from */
typedef enum UseBases {
    USE_NEWEST,                 /* and keep what the older one names */
    USE_NEWEST_ALONE,
    USE_OLDER,
} UseBases;

/*
 * The bases to open from.  @why: what is wrong with one of them, if both are
 * not to be used.  *sequence: of the newest on the device.
 */
static int coroutine_fn choose_bases(ThinvmStore *st, ThinvmBases *bases,
                                     UseBases use, const Error *why,
                                     uint64_t *sequence, Error **errp)
{
    int ret = thinvm_bases_read(st->dev, bases, errp);

    if (ret < 0) {
        return ret;
    }
    *sequence = bases->newest.sequence;
    if (use != USE_NEWEST && !bases->has_older) {
        error_setg(errp, "There is no older base");
        return -EBADMSG;
    }
    if (use == USE_OLDER && thinvm_bases_repaired(bases)) {
        error_setg(errp, "%s; the older base is from before a repair, so it "
                   "is not used.  To go back to it, and repair again, write "
                   "zeroes to the 512 bytes at offset %" PRIu64 " of the "
                   "device", error_get_pretty(why),
                   thinvm_superblock_offset(bases->newest_slot));
        return -EUCLEAN;
    }
    if (use == USE_OLDER) {
        bases_fall_back(bases, why);
    } else if (use == USE_NEWEST_ALONE) {
        bases_drop_older(bases, why);
    }
    if (st->state && !qemu_uuid_is_equal(&bases->newest.uuid, &st->uuid)) {
        error_setg(errp, "The device holds another image now");
        st->stale = true;
        return -EIO;
    }
    return 0;
}

/*
 * The state of @bases and all that the journal has behind them, which must
 * come to @sequence at least
 */
static int coroutine_fn build_state(ThinvmStore *st, const ThinvmBases *bases,
                                    uint64_t sequence, ThinvmPosition *pos,
                                    ThinvmHistory *history,
                                    ThinvmState **result, Error **errp)
{
    ThinvmState *s = thinvm_state_new(&bases->newest,
                                      bases->has_older ? &bases->older : NULL,
                                      st->cache_size);
    int ret = load_base(st, s, errp);

    if (ret == 0 && st->state) {
        follow_towards(st, &bases->newest);
        thinvm_preload_adopt(st, s, history_has(st, &bases->newest) ?
                                    bases->newest.sequence : 0);
    }
    if (ret == 0) {
        ret = replay_all(st, s, bases, pos, history, errp);
    }
    if (ret == 0 && pos->sequence < sequence) {
        error_setg(errp, "The journal behind the older base ends at record %"
                   PRIu64 ", before record %" PRIu64 " of the newest base",
                   pos->sequence, sequence);
        ret = -EBADMSG;
    }
    if (ret < 0) {
        thinvm_state_free(s);
        return ret;
    }
    *result = s;
    return 0;
}

/*
 * One attempt; *bases is what it was made from, also on failure.  @use, @why:
 * see choose_bases().
 */
static int coroutine_fn open_once(ThinvmStore *st, ThinvmBases *bases,
                                  UseBases use, const Error *why, Error **errp)
{
    g_autofree ThinvmHistory *history = g_new0(ThinvmHistory, 1);
    uint64_t sequence;
    ThinvmState *s;
    ThinvmPosition pos;
    int ret = choose_bases(st, bases, use, why, &sequence, errp);

    if (ret < 0) {
        return ret;
    }
    look_at_length(st);
    st->uuid = bases->newest.uuid;
    st->cluster_bits = bases->newest.cluster_bits;
    ret = build_state(st, bases, sequence, &pos, history, &s, errp);
    if (ret < 0) {
        return ret;
    }
    thinvm_quarantine_skip(s);
    thinvm_bases_destroy(&st->bases);
    st->bases = *bases;
    if (!st->state) {
        thinvm_journal_init(st, &bases->newest);
    } else {
        qatomic_set(&st->nb_fresh_starts, st->nb_fresh_starts + 1);
    }
    g_free(st->history);
    st->history = g_steal_pointer(&history);
    thinvm_journal_drop(st);
    thinvm_checkpoint_forget(st);
    thinvm_quarantine_drop(st); /* the new state has nothing busy */
    WITH_QEMU_LOCK_GUARD(&st->lock) {
        st->journal.flushed_sequence = bases->newest.sequence;
    }
    publish(st, s, &pos);
    st->scanned_sequence = pos.sequence;
    st->stale = false;
    trace_thinvm_open(st, bases->newest.generation, bases->newest.sequence,
                      pos.sequence);
    return 0;
}

static int coroutine_fn open_from(ThinvmStore *st, UseBases use,
                                  const Error *why, Error **errp)
{
    ThinvmBases bases = {};
    int ret = open_once(st, &bases, use, why, errp);

    if (ret < 0) {
        thinvm_bases_destroy(&bases);
    }
    return ret;
}

int coroutine_fn thinvm_replay_fall_back(ThinvmStore *st, const Error *why,
                                         Error **errp)
{
    return open_from(st, USE_OLDER, why, errp);
}

/*
 * One of the bases is damaged, which *@err says, or what else is wrong then.
 * The newest needs no journal to be what it is, so it comes first.
 */
static int coroutine_fn try_one(ThinvmStore *st, Error **err)
{
    Error *local_err = NULL;
    int ret;

    if (open_from(st, USE_NEWEST_ALONE, *err, NULL) == 0) {
        return 0;
    }
    ret = thinvm_replay_fall_back(st, *err, &local_err);
    if (ret == -EUCLEAN) {
        error_free(*err);
        *err = local_err;
        return -EBADMSG;
    }
    error_free(local_err);
    return ret;
}

/*
 * Opening while an owner writes may fail because of what the owner does.  If
 * its base has moved on meanwhile that explains everything: try again.
 */
int coroutine_fn thinvm_replay_open(ThinvmStore *st, Error **errp)
{
    for (int i = 0;; i++) {
        Error *local_err = NULL;
        ThinvmBases bases = {}, now = {};
        bool moved;
        int ret = open_once(st, &bases, USE_NEWEST, NULL, &local_err);

        if (ret == 0) {
            return 0;
        }
        moved = thinvm_bases_read(st->dev, &now, NULL) == 0 &&
                now.newest.generation != bases.newest.generation;
        thinvm_bases_destroy(&now);
        thinvm_bases_destroy(&bases);
        if (!moved && ret == -EBADMSG && try_one(st, &local_err) == 0) {
            error_free(local_err);
            return 0;
        }
        if (!moved || i == THINVM_MAX_RESTARTS) {
            error_propagate(errp, local_err);
            return ret;
        }
        error_free(local_err);
    }
}

/* ------------------------------------------------------------------ */
/* Following                                                           */

static void follow_enter_locked(ThinvmStore *st)
{
    assert(!st->following);
    st->following = true;
}

static void coroutine_fn follow_enter(ThinvmStore *st)
{
    QEMU_LOCK_GUARD(&st->lock);
    while (st->following) {
        qemu_co_queue_wait(&st->follow_queue, &st->lock);
    }
    follow_enter_locked(st);
}

static void coroutine_fn follow_leave(ThinvmStore *st)
{
    QEMU_LOCK_GUARD(&st->lock);
    st->following = false;
    qemu_co_queue_restart_all(&st->follow_queue);
}

static void position_get(ThinvmStore *st, ThinvmPosition *pos)
{
    ThinvmJournal *j = &st->journal;

    QEMU_LOCK_GUARD(&st->lock);
    *pos = (ThinvmPosition) {
        .tail = j->tail,
        .base = j->base,
        .head = j->head,
        .last = j->last,
        .sequence = j->composed_sequence,
        .epoch = j->composed_epoch,
        .crc = j->composed_crc,
        .summed = st->last_summed,
    };
}

/* Apply the records that continue ours; what ended them to *end */
static int coroutine_fn follow_records(ThinvmStore *st, ThinvmRing *ring,
                                       ThinvmPosition *pos, int *end,
                                       Error **errp)
{
    ThinvmState *s = st->state;
    const uint8_t *data;
    ThinvmRecord rec;
    int ret;

    for (;;) {
        *end = thinvm_ring_next(ring, pos, &rec, &data);
        if (*end != THINVM_NEXT_RECORD) {
            return MIN(*end, 0);
        }
        ret = replay_record(st, s, &rec, data, errp);
        if (ret < 0) {
            st->stale = true;   /* part of it may be applied */
            return ret;
        }
        thinvm_ring_advance(pos, &rec);
        history_add(st->history, &rec);
        qatomic_set(&st->nb_followed, st->nb_followed + 1);
        thinvm_state_lock(s);
        thinvm_quarantine_add(st, s, rec.sequence);
        thinvm_state_unlock(s);
        publish(st, s, pos);
        ring->window = MAX(ring->window, THINVM_RECORD_MAX_SIZE);
    }
}

/* Have the owner's bases left us behind (or is that the only explanation)? */
static bool coroutine_fn base_moved(ThinvmStore *st, uint64_t sequence)
{
    bool moved;

    return thinvm_bases_moved(st, sequence, &moved, NULL) == 0 && moved;
}

static bool too_many_dirty(ThinvmStore *st)
{
    ThinvmInfoState info;

    thinvm_state_lock(st->state);
    thinvm_state_info(st->state, &info);
    thinvm_state_unlock(st->state);
    return info.dirty_pages > info.dirty_bound;
}

/*
 * The block at the head is as it was when we found the end there: nothing
 * new.  Not remembered while a record may be on its way: its first block may
 * be final before the rest is.
 */
static bool head_unchanged(ThinvmStore *st, const uint8_t *data)
{
    return st->head_block_valid &&
           !memcmp(st->head_block, data, THINVM_PAGE_SIZE);
}

static void remember_head(ThinvmStore *st, ThinvmRing *ring,
                          const ThinvmPosition *pos)
{
    const uint8_t *data;

    if (thinvm_ring_get(ring, pos->head, THINVM_PAGE_SIZE, &data) == 0) {
        if (!st->head_block) {
            st->head_block = g_malloc(THINVM_PAGE_SIZE);
        }
        memcpy(st->head_block, data, THINVM_PAGE_SIZE);
        st->head_block_valid = true;
    }
}

/*
 * What we applied by its checksums may have been lost by the device since.
 * Through a window of its own: a record that came meanwhile is for the next
 * look, and not to be remembered as seen.
 */
static int coroutine_fn recheck_last(ThinvmStore *st,
                                     const ThinvmPosition *pos, bool *afresh,
                                     Error **errp)
{
    ThinvmRing ring;
    int ret;

    if (!pos->summed) {
        return 0;
    }
    thinvm_ring_init(&ring, st, &st->bases.newest, THINVM_PAGE_SIZE);
    ret = thinvm_ring_last_counts(&ring, pos);
    thinvm_ring_destroy(&ring);
    if (ret < 0) {
        *afresh = base_moved(st, 0);
        error_setg_errno(errp, -ret, "Could not read the journal, or data of "
                         "its last record");
        return ret;
    }
    if (ret == 0) {
        *afresh = true;
    }
    return 0;
}

static int coroutine_fn follow_ring(ThinvmStore *st, ThinvmRing *ring,
                                    bool *afresh, Error **errp)
{
    const uint8_t *data;
    ThinvmPosition pos;
    int end = THINVM_NEXT_NONE, ret;

    position_get(st, &pos);
    ret = thinvm_ring_get(ring, pos.head, THINVM_PAGE_SIZE, &data);
    if (ret == 0 && head_unchanged(st, data)) {
        return recheck_last(st, &pos, afresh, errp);
    }
    if (ret == 0) {
        ret = follow_records(st, ring, &pos, &end, errp);
    }
    if (ret == 0) {
        st->cut_by_sums = end == THINVM_NEXT_DATA;
        ret = recheck_last(st, &pos, afresh, errp);
        if (*afresh) {
            return 0;
        }
    }
    if (ret < 0) {
        /* A page that is gone; or that lay where the device was cut off */
        *afresh = base_moved(st, 0);
        if (errp && !*errp) {
            error_setg_errno(errp, -ret, "Could not read the journal");
        }
        return ret;
    }
    if (end == THINVM_NEXT_FOREIGN) {
        *afresh = true;
    } else if (end == THINVM_NEXT_NONE) {
        *afresh = !thinvm_store_at_end(st) &&
                  base_moved(st, pos.sequence + 1);
        if (!*afresh) {
            remember_head(st, ring, &pos);
        }
    }
    if (!*afresh && too_many_dirty(st)) {
        *afresh = base_moved(st, 0);
    }
    return 0;
}

/* Is the device as long as all that was followed needs? */
static int coroutine_fn follow_length(ThinvmStore *st, Error **errp)
{
    int ret = 0;

    if (st->length_unchecked) {
        ret = thinvm_store_check_length(st, errp);
        st->length_unchecked = ret < 0;
    }
    return ret;
}

/* Between follow_enter() and follow_leave() */
static int coroutine_fn follow_once(ThinvmStore *st, Error **errp)
{
    Error *local_err = NULL;
    bool afresh = st->stale;
    ThinvmRing ring;
    int ret = 0;

    if (!afresh) {
        thinvm_ring_init(&ring, st, &st->bases.newest,
                         st->expects_end ? THINVM_RING_REST :
                                           THINVM_PAGE_SIZE);
        ret = follow_ring(st, &ring, &afresh, &local_err);
        thinvm_ring_destroy(&ring);
    }
    if (afresh) {
        error_free(local_err);
        trace_thinvm_follow_afresh(st, st->bases.newest.generation,
                                   st->journal.composed_sequence);
        ret = thinvm_replay_open(st, errp);
    } else {
        error_propagate(errp, local_err);
    }
    return ret < 0 ? ret : follow_length(st, errp);
}

int coroutine_fn thinvm_store_follow_base(ThinvmStore *st, Error **errp)
{
    bool moved = false;
    int ret = 0;

    follow_enter(st);
    if (qatomic_read(&st->mode) == THINVM_STORE_READING) {
        ret = thinvm_bases_moved(st, 0, &moved, errp);
        if (ret == 0 && moved) {
            /* What we lack of its history may still be in the ring */
            follow_once(st, NULL);
            ret = thinvm_bases_moved(st, 0, &moved, errp);
        }
        if (ret == 0 && moved) {
            trace_thinvm_follow_afresh(st, st->bases.newest.generation,
                                       st->journal.composed_sequence);
            ret = thinvm_replay_open(st, errp);
        }
    }
    follow_leave(st);
    return ret;
}

uint64_t thinvm_store_changes(ThinvmStore *st)
{
    QEMU_LOCK_GUARD(&st->lock);
    return st->follow_changes;
}

uint64_t thinvm_store_moves(ThinvmStore *st)
{
    QEMU_LOCK_GUARD(&st->lock);
    return st->follow_moves;
}

int coroutine_fn thinvm_store_catch_up(ThinvmStore *st, bool *changed,
                                       Error **errp)
{
    uint64_t target, before;
    bool led = false;
    int ret;

    QEMU_LOCK_GUARD(&st->lock);
    target = st->follow_started + 1;
    before = st->follow_changes;
    while (st->follow_finished < target &&
           qatomic_read(&st->mode) == THINVM_STORE_READING) {
        if (st->following) {
            qemu_co_queue_wait(&st->follow_queue, &st->lock);
            continue;
        }
        follow_enter_locked(st);
        st->follow_started++;
        qatomic_set(&st->nb_catch_ups, st->nb_catch_ups + 1);
        qemu_mutex_unlock(&st->lock);
        ret = follow_once(st, errp);
        thinvm_store_reclaim(st, false);
        qemu_mutex_lock(&st->lock);
        led = true;
        st->follow_ret = ret;
        st->follow_finished = st->follow_started;
        st->following = false;
        qemu_co_queue_restart_all(&st->follow_queue);
    }
    ret = qatomic_read(&st->mode) == THINVM_STORE_READING ? st->follow_ret : 0;
    if (changed) {
        *changed = st->follow_changes != before;
    }
    if (ret < 0 && !led) {
        error_setg_errno(errp, -ret, "Could not follow the image's journal");
    }
    return ret;
}

bool coroutine_fn thinvm_follow_restart(ThinvmStore *st, ThinvmState *old)
{
    bool restarted = true;

    if (qatomic_read(&st->mode) != THINVM_STORE_READING) {
        return false;
    }
    follow_enter(st);
    if (st->state == old) {
        restarted = base_moved(st, 0) && thinvm_replay_open(st, NULL) == 0;
    }
    follow_leave(st);
    return restarted;
}

/*
 * Is the record before the head still the one that we applied?  A power cut
 * may have taken it, and another owner have written a different one.
 */
static bool coroutine_fn last_record_stands(ThinvmStore *st)
{
    ThinvmPosition pos;
    ThinvmRing ring;
    const uint8_t *data;
    ThinvmRecord rec;
    bool stands = true;

    position_get(st, &pos);
    if (pos.last != pos.head) {
        thinvm_ring_init(&ring, st, &st->bases.newest, THINVM_PAGE_SIZE);
        stands = thinvm_ring_get(&ring, pos.last, THINVM_PAGE_SIZE,
                                 &data) == 0 &&
                 thinvm_record_decode_header(&rec, data) == 0 &&
                 rec.sequence == pos.sequence && rec.epoch == pos.epoch &&
                 rec.crc == pos.crc;
        thinvm_ring_destroy(&ring);
    }
    return stands;
}

int coroutine_fn thinvm_follow_finish(ThinvmStore *st, Error **errp)
{
    ThinvmPosition pos;
    ThinvmRing ring;
    bool moved, at_end;
    int ret;

    follow_enter(st);
    /* Before a fresh start: it takes over only what is of the base's history */
    at_end = follow_once(st, NULL) == 0 && thinvm_store_at_end(st);
    ret = thinvm_bases_moved(st, 0, &moved, errp);
    if (ret < 0) {
        /* What the bases name must not be overwritten: no guessing */
        follow_leave(st);
        return ret;
    }
    if (st->stale || moved || (!at_end && !last_record_stands(st))) {
        ret = thinvm_replay_open(st, errp);
    } else if (!at_end) {
        st->head_block_valid = false;
        ret = follow_once(st, errp);
        position_get(st, &pos);
        if (ret == 0 && pos.sequence != st->scanned_sequence) {
            thinvm_ring_init(&ring, st, &st->bases.newest, THINVM_SCAN_FOLLOW);
            ret = thinvm_ring_check_end(&ring, &pos, THINVM_SCAN_FOLLOW, false,
                                        errp);
            thinvm_ring_destroy(&ring);
        }
    }
    if (ret == 0) {
        ret = thinvm_journal_end_expected(st, errp);
    }
    if (ret == 0) {
        /* Some of it the former owner may have used again: no discard */
        thinvm_quarantine_settle(st);
        qatomic_set(&st->mode, THINVM_STORE_STARTING);
    }
    follow_leave(st);
    return ret;
}
