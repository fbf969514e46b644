/*
 * thinvm durability layer: data that a record vouches for by checksums
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A guest's flush writes a record, which must not be believed after a power
 * cut if the data that it maps did not arrive.  The ordinary way is to flush
 * the data before the record is written.  A small record may carry checksums
 * of its data instead, and then one flush serves both (journal.c decides).
 * Such a record counts, as long as it is the last one, only if the checksums
 * are right (replay.c); the one behind it is not written before it was flushed
 * and therefore proves that data and record had arrived.
 *
 * So from the moment that a checksum is taken until a later record is durable
 * nobody may write to that data: else the checksum would be wrong when it is
 * asked for, and the record, which the guest was told is safe, be lost.  Who is
 * about to write calls thinvm_store_touch():
 *
 *   - the record still gathers operations: it will be written the ordinary way,
 *     without checksums (@spoiled);
 *   - it is sealed or written: a durable commit, which ends with a record
 *     behind it, comes first.
 *
 * A range is entered before its operation is applied, thus before a look-up can
 * find the mapping: whoever could write there in place finds the range, too.
 * Data of freed clusters need no such care: reuse waits until the record that
 * frees them is durable, and that is a later one, and until everybody has left
 * who may have found them.  Parts that were zeroed in their place are reused
 * without waiting: who found them valid before may still be about to write
 * there, and has asked already.  So their data get no checksum until he left
 * (thinvm_store_invalid_left()).
 *
 * All under st->lock, but for the count, by which a write that has nothing to
 * do with all this finds out with one look.
 */
#include "qemu/osdep.h"
#include "qemu/lockable.h"
#include "store-int.h"
#include "trace.h"

/* Not yet in the pending record */
#define THINVM_HELD_NEW     UINT64_MAX

/*
 * Who writes his data again at once gains nothing: the record behind it costs
 * the flush that was spared.  So after such a write the next so many commits
 * go the ordinary way.
 */
#define THINVM_SUMS_PAUSE   16

static ThinvmHeldSum *held_at(ThinvmStore *st, unsigned i)
{
    return &st->journal.held[i];
}

bool thinvm_store_wants_sums(ThinvmStore *st)
{
    ThinvmJournal *j = &st->journal;

    return qatomic_read(&j->sums_wanted) && !qatomic_read(&j->pending_plain);
}

bool thinvm_sums_hold(ThinvmStore *st, const ThinvmDataSum *sum)
{
    ThinvmJournal *j = &st->journal;

    QEMU_LOCK_GUARD(&st->lock);
    if (j->nb_held == THINVM_MAX_HELD) {
        return false;
    }
    *held_at(st, j->nb_held) = (ThinvmHeldSum) {
        .sum = *sum,
        .sequence = THINVM_HELD_NEW,
    };
    qatomic_set(&j->nb_held, j->nb_held + 1);
    /* Before the mapping; see thinvm_store_touch() */
    smp_wmb();
    return true;
}

void thinvm_sums_join(ThinvmStore *st, uint64_t sequence)
{
    ThinvmJournal *j = &st->journal;

    QEMU_LOCK_GUARD(&st->lock);
    assert(held_at(st, j->nb_held - 1)->sequence == THINVM_HELD_NEW);
    held_at(st, j->nb_held - 1)->sequence = sequence;
}

static void drop(ThinvmStore *st, uint64_t first, uint64_t last)
{
    ThinvmJournal *j = &st->journal;
    unsigned kept = 0;

    for (unsigned i = 0; i < j->nb_held; i++) {
        uint64_t sequence = held_at(st, i)->sequence;

        if (sequence < first || sequence > last) {
            *held_at(st, kept++) = *held_at(st, i);
        }
    }
    qatomic_set(&j->nb_held, kept);
}

void thinvm_sums_drop(ThinvmStore *st, uint64_t sequence)
{
    drop(st, sequence, sequence);
}

void thinvm_sums_drop_all(ThinvmStore *st)
{
    drop(st, 0, UINT64_MAX);
}

void thinvm_sums_settle(ThinvmStore *st)
{
    ThinvmJournal *j = &st->journal;

    if (j->nb_held && j->flushed_sequence) {
        drop(st, 0, j->flushed_sequence - 1);
    }
}

unsigned thinvm_sums_collect(ThinvmStore *st, uint64_t sequence, uint8_t *dst)
{
    ThinvmJournal *j = &st->journal;
    unsigned nb = 0;
    bool spoiled = false;

    for (unsigned i = 0; i < j->nb_held; i++) {
        ThinvmHeldSum *h = held_at(st, i);

        if (h->sequence == sequence) {
            spoiled |= h->spoiled;
            if (nb < THINVM_RECORD_MAX_SUMS) {
                thinvm_data_sum_encode(dst + nb * sizeof(ThinvmDataSumLe),
                                       &h->sum);
            }
            nb++;
        }
    }
    return spoiled || nb > THINVM_RECORD_MAX_SUMS ? 0 : nb;
}

bool thinvm_sums_last(ThinvmStore *st)
{
    ThinvmJournal *j = &st->journal;

    for (unsigned i = 0; i < j->nb_held; i++) {
        if (held_at(st, i)->sequence == j->composed_sequence) {
            return true;
        }
    }
    return false;
}

bool thinvm_sums_unflushed(ThinvmStore *st)
{
    ThinvmJournal *j = &st->journal;

    for (unsigned i = 0; i < j->nb_held; i++) {
        uint64_t sequence = held_at(st, i)->sequence;

        if (sequence <= j->composed_sequence &&
            sequence > j->flushed_sequence) {
            return true;
        }
    }
    return false;
}

void thinvm_sums_judge(ThinvmStore *st, uint32_t nb_operations)
{
    ThinvmJournal *j = &st->journal;
    bool wanted = nb_operations <= THINVM_SUMS_LIMIT;

    if (j->sums_pause) {
        j->sums_pause--;
        wanted = false;
    }
    qatomic_set(&j->sums_wanted, wanted);
}

/*
 * Is data of a record in this range?  If the record still gathers operations
 * it has to do without its checksums, and nobody needs to wait.  st->lock
 */
static bool must_wait(ThinvmStore *st, uint64_t offset, uint64_t bytes)
{
    ThinvmJournal *j = &st->journal;
    bool wait = false;

    for (unsigned i = 0; i < j->nb_held; i++) {
        ThinvmHeldSum *h = held_at(st, i);

        if (h->sum.offset >= offset + bytes ||
            offset >= h->sum.offset + h->sum.bytes) {
            continue;
        }
        if (h->sequence >= j->next_sequence) {
            h->spoiled = true;
        } else {
            wait = true;
        }
    }
    return wait;
}

bool thinvm_store_touches(ThinvmStore *st)
{
    smp_rmb();      /* the look-up before; see thinvm_sums_hold() */
    return qatomic_read(&st->journal.nb_held);
}

void thinvm_store_sum(ThinvmStore *st, uint64_t offset, const void *buf,
                      uint32_t bytes, ThinvmDataSum *sum)
{
    *sum = (ThinvmDataSum) {
        .offset = offset,
        .bytes = bytes,
        .crc = thinvm_checksum(&st->uuid, THINVM_SUM_DATA, offset, buf, bytes),
    };
}

int coroutine_fn thinvm_store_touch_slow(ThinvmStore *st, uint64_t offset,
                                         uint64_t bytes)
{
    ThinvmJournal *j = &st->journal;
    int ret;

    for (;;) {
        WITH_QEMU_LOCK_GUARD(&st->lock) {
            if (!must_wait(st, offset, bytes)) {
                return 0;
            }
            st->nb_touched++;
            j->sums_pause = THINVM_SUMS_PAUSE;
            qatomic_set(&j->sums_wanted, false);
        }
        trace_thinvm_sums_touched(st, offset, bytes);
        ret = thinvm_journal_commit(st, THINVM_COMMIT_DURABLE, true);
        if (ret < 0) {
            return ret;
        }
    }
}
