/*
 * thinvm durability layer: the journal, as its owner writes it
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Operations gather in a pending record.  A commit seals it (no operation
 * joins it any more), flushes the device, and writes it at the head of the
 * ring; a durable commit flushes once more.  Reading a journal is in
 * replay.c.
 *
 * A record passes through three queues:
 *
 *   pending     gathers operations in the order of their apply (state lock)
 *   sealed      contents fixed, waits for its turn; then composed: place in
 *               the ring, chain and checksum are fixed too
 *   unflushed   written; its bytes stay in memory until a flush that was
 *               issued after the write has succeeded
 *
 * What the order of steps is for (design section 4):
 *
 * 1. A record is sealed *before* the data flush is issued, and an operation
 *    is applied after its data was written.  So the flush covers the data of
 *    everything in the record.  What is sealed later waits for a flush of its
 *    own (journal_write_sealed() stops at the cut).
 *    A small record that a guest's flush asks for has checksums of its data
 *    instead, if nothing else is on its way, and the flush behind it is the
 *    only one: see sums.c for what that takes.
 * 2. A record is written only behind records that were written, so that a
 *    power cut leaves a prefix, or a prefix and unconnected later ones which
 *    nothing declares flushed.
 *
 * A power cut leaves: while gathering, nothing; during the write, a torn or
 * missing record that ends the journal; after it and before a flush, any
 * subset of what was written since the last flush, of which the longest
 * connected prefix counts.
 *
 * When a write fails the record stays at the head of its queue with its
 * bytes as they are, and is the first thing that the next round writes.  When
 * a flush fails, the device may have lost any write since the last successful
 * one, and may report it just once; so all unflushed records are written
 * again before a later flush counts for them.  Flushes are not only a round's
 * own: where one of a checkpoint fails amid a round, that round has failed,
 * too, lest its records count as written.  For data, which we do not
 * keep, we rely on the device's promise: a flush that succeeds after one that
 * failed covers earlier writes too, or flushes go on failing.  (SCSI and NVMe
 * devices keep what they could not write.  The kernel's page cache does not,
 * and there QEMU's file-posix makes the error stick until the file is opened
 * anew.)  The checkpoint writes its pages again after any error.
 *
 * Contexts: thinvm_journal_commit() and _flush() in coroutines; the rest
 * anywhere, with the locks named in store-int.h.
 */
#include "qemu/osdep.h"
#include "qemu/lockable.h"
#include "qemu/memalign.h"
#include "qemu/timer.h"
#include "qapi/qapi-types-block-core.h"
#include "store-int.h"
#include "trace.h"

#define THINVM_RECORD_HEADER    sizeof(ThinvmRecordLe)

static uint64_t padded(uint64_t length)
{
    return ROUND_UP(length, THINVM_PAGE_SIZE);
}

void thinvm_journal_init(ThinvmStore *st, const ThinvmSuperblock *sb)
{
    ThinvmJournal *j = &st->journal;

    j->offset = sb->journal_offset;
    j->size = sb->journal_size;
    /* A small ring takes smaller records, so that three quarters of it
       still hold several */
    j->record_limit = MIN(THINVM_RECORD_MAX_SIZE,
                          ROUND_DOWN(j->size / 16, THINVM_PAGE_SIZE));
    QSIMPLEQ_INIT(&j->sealed);
    QSIMPLEQ_INIT(&j->unflushed);
    qemu_co_queue_init(&j->rounds);
}

static void record_free(ThinvmJournalRecord *r)
{
    qemu_vfree(r->buf);
    g_free(r);
}

static void queue_drop(ThinvmJournalQueue *queue)
{
    ThinvmJournalRecord *r;

    while ((r = QSIMPLEQ_FIRST(queue))) {
        QSIMPLEQ_REMOVE_HEAD(queue, next);
        record_free(r);
    }
}

void thinvm_journal_drop(ThinvmStore *st)
{
    ThinvmJournal *j = &st->journal;

    queue_drop(&j->sealed);
    queue_drop(&j->unflushed);
    j->sealed_bytes = 0;
    j->pending_length = 0;
    j->pending_operations = 0;
    j->pending_sums = 0;
    j->pending_plain = false;
    thinvm_sums_drop_all(st);
    j->last_op_offset = 0;
    j->rewrite = false;
    j->error = 0;
}

void thinvm_journal_destroy(ThinvmStore *st)
{
    thinvm_journal_drop(st);
    assert(!st->journal.leading && !st->journal.next_round);
    g_free(st->journal.pending);
}

/* ------------------------------------------------------------------ */
/* The pending record                                                  */

/* Does @op continue @last, so that one operation can say both? */
static bool map_continues(const ThinvmOp *last, const ThinvmOp *op)
{
    return last->type == THINVM_OP_MAP && op->type == THINVM_OP_MAP &&
           op->tree == last->tree && op->source == last->source &&
           op->valid == last->valid &&
           op->guest == last->guest + last->count &&
           op->physical == last->physical + last->count &&
           last->guest / THINVM_ENTRIES_PER_LEAF ==
           (op->guest + op->count - 1) / THINVM_ENTRIES_PER_LEAF;
}

/* Does @op validate more parts of the one cluster that @last names? */
static bool validate_continues(const ThinvmOp *last, const ThinvmOp *op)
{
    return op->type == THINVM_OP_VALIDATE &&
           (last->type == THINVM_OP_VALIDATE ||
            (last->type == THINVM_OP_MAP && last->count == 1 &&
             last->source != THINVM_SOURCE_TEMPLATE)) &&
           op->tree == last->tree && op->guest == last->guest &&
           op->physical == last->physical;
}

/*
 * Only with the very last operation: nothing can have come in between, and
 * replaying the sum is the same as replaying one after the other.
 */
static bool coalesce(ThinvmJournal *j, const ThinvmOp *op)
{
    if (!j->last_op_offset) {
        return false;
    }
    if (map_continues(&j->last_op, op)) {
        j->last_op.count += op->count;
    } else if (validate_continues(&j->last_op, op)) {
        j->last_op.valid |= op->valid;
    } else {
        return false;
    }
    thinvm_op_encode(j->pending + j->last_op_offset, &j->last_op);
    return true;
}

/*
 * The record that an operation has just joined has checksums of all of its
 * data, or of none.
 */
static void note_sum(ThinvmStore *st, bool summed)
{
    ThinvmJournal *j = &st->journal;

    if (summed) {
        thinvm_sums_join(st, j->next_sequence);
        qatomic_set(&j->pending_sums,
                    j->pending_sums + sizeof(ThinvmDataSumLe));
    }
    if (!j->pending_plain &&
        (!summed || j->pending_sums >
                    THINVM_SUMS_LIMIT * sizeof(ThinvmDataSumLe))) {
        qatomic_set(&j->pending_plain, true);
    }
    if (j->pending_plain && (summed || j->pending_sums)) {
        qatomic_set(&j->pending_sums, 0);
        QEMU_LOCK_GUARD(&st->lock);
        thinvm_sums_drop(st, j->next_sequence);
    }
}

void thinvm_journal_add(ThinvmStore *st, const ThinvmOp *op, bool summed)
{
    ThinvmJournal *j = &st->journal;
    size_t length = thinvm_op_length(op);

    qatomic_set(&st->nb_operations, st->nb_operations + 1);
    if (coalesce(j, op)) {
        note_sum(st, summed);
        return;
    }
    if (j->pending_length + length > j->record_limit) {
        thinvm_journal_seal(st);
    }
    note_sum(st, summed);
    if (!j->pending_length) {
        qatomic_set(&j->pending_length, THINVM_RECORD_HEADER);
    }
    if (j->pending_length + length > j->pending_allocated) {
        j->pending_allocated = MAX(THINVM_PAGE_SIZE,
                                   pow2ceil(j->pending_length + length));
        j->pending = g_realloc(j->pending, j->pending_allocated);
    }
    thinvm_op_encode(j->pending + j->pending_length, op);
    if (op->type == THINVM_OP_MAP || op->type == THINVM_OP_VALIDATE) {
        j->last_op = *op;
        j->last_op_offset = j->pending_length;
    } else {
        j->last_op_offset = 0;
    }
    j->pending_operations++;
    qatomic_set(&j->pending_length, j->pending_length + length);
}

uint64_t thinvm_journal_ticket(ThinvmStore *st)
{
    ThinvmJournal *j = &st->journal;

    return j->pending_length ? j->next_sequence : j->next_sequence - 1;
}

/* Its checksums too, if it has any; room for them is behind its operations */
static void seal_sums(ThinvmStore *st, ThinvmJournalRecord *r)
{
    unsigned nb = thinvm_sums_collect(st, r->header.sequence,
                                      r->buf + r->header.length);

    if (nb) {
        r->header.nb_sums = nb;
        r->header.length += nb * sizeof(ThinvmDataSumLe);
    } else {
        thinvm_sums_drop(st, r->header.sequence);
    }
    r->size = padded(r->header.length);
}

void thinvm_journal_seal(ThinvmStore *st)
{
    ThinvmJournal *j = &st->journal;
    ThinvmJournalRecord *r;

    if (!j->pending_length) {
        return;
    }
    r = g_new0(ThinvmJournalRecord, 1);
    r->size = padded(j->pending_length + j->pending_sums);
    /* aligned, or the device below would copy it in another thread */
    r->buf = qemu_memalign(THINVM_PAGE_SIZE, r->size);
    memcpy(r->buf, j->pending, j->pending_length);
    r->header.length = j->pending_length;
    r->header.nb_operations = j->pending_operations;
    r->header.sequence = j->next_sequence;
    j->pending_operations = 0;
    j->last_op_offset = 0;

    QEMU_LOCK_GUARD(&st->lock);
    seal_sums(st, r);
    qatomic_set(&j->pending_length, 0);
    qatomic_set(&j->pending_sums, 0);
    qatomic_set(&j->pending_plain, false);
    j->next_sequence++;
    j->sealed_bytes += r->size;
    QSIMPLEQ_INSERT_TAIL(&j->sealed, r, next);
}

/*
 * A record without operations, for the one before to be no more the last one,
 * which depends on checksums.  State lock held
 */
static void seal_empty(ThinvmStore *st)
{
    ThinvmJournal *j = &st->journal;

    WITH_QEMU_LOCK_GUARD(&st->lock) {
        if (!thinvm_sums_last(st) ||
            j->composed_sequence != j->next_sequence - 1) {
            return;
        }
    }
    /* Nothing is pending; what was, was sealed with the same buffer */
    qatomic_set(&j->pending_length, THINVM_RECORD_HEADER);
    thinvm_journal_seal(st);
}

bool thinvm_journal_skip(ThinvmStore *st)
{
    ThinvmJournal *j = &st->journal;

    QEMU_LOCK_GUARD(&st->lock);
    if (j->pending_length || !QSIMPLEQ_EMPTY(&j->sealed) ||
        !QSIMPLEQ_EMPTY(&j->unflushed) || j->nb_held) {
        return false;
    }
    j->composed_sequence = j->next_sequence++;
    j->composed_crc = 0;
    j->last = j->head;
    j->written_sequence = j->flushed_sequence = j->composed_sequence;
    return true;
}

/* Bytes from the tail on, up to where all that is applied will end */
static uint64_t used_by(ThinvmJournal *j, uint64_t pending)
{
    return j->head - j->tail + j->sealed_bytes + padded(pending);
}

uint64_t thinvm_journal_used(ThinvmStore *st)
{
    ThinvmJournal *j = &st->journal;

    QEMU_LOCK_GUARD(&st->lock);
    return used_by(j, qatomic_read(&j->pending_length) +
                      qatomic_read(&j->pending_sums));
}

bool thinvm_journal_has_room(ThinvmStore *st, const ThinvmOp *op)
{
    ThinvmJournal *j = &st->journal;
    size_t length = thinvm_op_length(op), sum = sizeof(ThinvmDataSumLe);
    uint64_t more = 0, used;

    if (!j->pending_length || j->pending_length + length > j->record_limit) {
        more = padded(THINVM_RECORD_HEADER + length + sum);
    }
    WITH_QEMU_LOCK_GUARD(&st->lock) {
        used = more + used_by(j, j->pending_length + j->pending_sums +
                                 (more ? 0 : length + sum));
    }
    qatomic_set(&j->lately_used, used);
    return used <= j->size / 4 * 3;
}

bool thinvm_journal_is_behind(ThinvmStore *st)
{
    QEMU_LOCK_GUARD(&st->lock);
    return st->journal.sealed_bytes > 4 * st->journal.record_limit;
}

/* ------------------------------------------------------------------ */
/* Flushing                                                            */

static void confirm_flushed(ThinvmStore *st, uint64_t sequence)
{
    ThinvmJournal *j = &st->journal;
    ThinvmJournalRecord *r;

    j->flushed_sequence = MAX(j->flushed_sequence, sequence);
    thinvm_sums_settle(st);
    while ((r = QSIMPLEQ_FIRST(&j->unflushed)) &&
           r->header.sequence <= sequence) {
        QSIMPLEQ_REMOVE_HEAD(&j->unflushed, next);
        record_free(r);
    }
}

/*
 * Flush the device, and note which records this makes durable: those whose
 * write had completed when it was issued.  While records wait to be written
 * again, and when any other flush has failed meanwhile, it confirms nothing,
 * and fails.
 */
int coroutine_fn thinvm_journal_flush(ThinvmStore *st, int event)
{
    ThinvmJournal *j = &st->journal;
    unsigned failures;
    uint64_t sequence;
    bool in_doubt;
    int ret;

    if (qatomic_read(&st->poisoned)) {
        return -EIO;
    }
    WITH_QEMU_LOCK_GUARD(&st->lock) {
        in_doubt = j->rewrite;
        sequence = j->written_sequence;
        failures = j->flush_failures;
    }
    thinvm_device_event(st->dev, event);
    ret = st->dev->co_flush(st->dev);
    QEMU_LOCK_GUARD(&st->lock);
    if (ret < 0) {
        trace_thinvm_flush_failed(st, j->flushed_sequence, ret);
        j->flush_failures++;
        j->rewrite = !QSIMPLEQ_EMPTY(&j->unflushed);
    } else if (!in_doubt && failures == j->flush_failures) {
        confirm_flushed(st, sequence);
    } else {
        /* Another flush failed meanwhile: this one vouches for nothing */
        ret = -EIO;
    }
    return ret;
}

unsigned thinvm_journal_failures(ThinvmStore *st)
{
    QEMU_LOCK_GUARD(&st->lock);
    return st->journal.flush_failures;
}

/* ------------------------------------------------------------------ */
/* Writing                                                             */

/* Write a composed record; in two parts where it meets the ring's end */
static int coroutine_fn record_write(ThinvmStore *st, ThinvmJournalRecord *r)
{
    ThinvmJournal *j = &st->journal;
    uint64_t start = r->position % j->size;
    uint64_t first = MIN(r->size, j->size - start);
    int ret;

    trace_thinvm_record_write(st, r->header.sequence, r->header.length,
                              r->header.nb_operations, start);
    ret = thinvm_store_pwrite(st, j->offset + start, first, r->buf,
                              BLKDBG_THINVM_JOURNAL_WRITE);
    if (ret == 0 && first < r->size) {
        ret = thinvm_store_pwrite(st, j->offset, r->size - first,
                                  r->buf + first, BLKDBG_THINVM_JOURNAL_WRITE);
    }
    if (ret < 0) {
        trace_thinvm_record_failed(st, r->header.sequence, ret);
    }
    return ret;
}

/*
 * Give a record its place, its chain and its checksum.  Room was made sure of
 * before its operations were applied; what may lack it is the record with
 * which an owner begins on a ring that others have left full.
 */
static int record_compose(ThinvmStore *st, ThinvmJournalRecord *r)
{
    ThinvmJournal *j = &st->journal;

    WITH_QEMU_LOCK_GUARD(&st->lock) {
        if (j->head + r->size - j->tail >= j->size) {
            return -ENOSPC;
        }
        if (thinvm_sums_unflushed(st)) {
            return -EIO;        /* a flush failed meanwhile; see sums.c */
        }
        r->position = j->head;
        r->header.epoch = st->epoch;
        r->header.previous_crc = j->composed_crc;
        r->header.flushed_sequence = j->flushed_sequence;
    }
    assert(r->header.sequence == j->composed_sequence + 1);
    thinvm_record_encode(&st->uuid, r->buf, &r->header);
    r->composed = true;

    QEMU_LOCK_GUARD(&st->lock);
    j->head += r->size;
    j->sealed_bytes -= r->size;
    j->composed_sequence = r->header.sequence;
    j->composed_crc = r->header.crc;
    j->composed_epoch = r->header.epoch;
    thinvm_checkpoint_mark(st, r->header.sequence);
    return 0;
}

/* After a failed flush: write again what it may have lost */
static int coroutine_fn journal_rewrite(ThinvmStore *st)
{
    ThinvmJournal *j = &st->journal;
    ThinvmJournalRecord *r;
    unsigned failures;
    int ret;

    WITH_QEMU_LOCK_GUARD(&st->lock) {
        if (!j->rewrite) {
            return 0;
        }
        failures = j->flush_failures;
        r = QSIMPLEQ_FIRST(&j->unflushed);
    }
    /* Nobody takes records from unflushed[] while rewrite is set */
    while (r) {
        ret = record_write(st, r);
        if (ret < 0) {
            return ret;
        }
        r = QSIMPLEQ_NEXT(r, next);
    }
    QEMU_LOCK_GUARD(&st->lock);
    if (failures != j->flush_failures) {
        return -EIO;
    }
    j->rewrite = false;
    return 0;
}

static ThinvmJournalRecord *first_sealed(ThinvmStore *st, uint64_t cut)
{
    ThinvmJournalRecord *r;

    QEMU_LOCK_GUARD(&st->lock);
    r = QSIMPLEQ_FIRST(&st->journal.sealed);
    return r && r->header.sequence <= cut ? r : NULL;
}

/* Its data is flushed, so it can do without them */
static void record_strip(ThinvmStore *st, ThinvmJournalRecord *r)
{
    uint32_t size = r->size;

    if (!r->composed && r->header.nb_sums) {
        r->header.length = thinvm_record_operations_end(&r->header);
        r->header.nb_sums = 0;
        r->size = padded(r->header.length);
        QEMU_LOCK_GUARD(&st->lock);
        st->journal.sealed_bytes -= size - r->size;
        thinvm_sums_drop(st, r->header.sequence);
    }
}

static bool sums_unflushed(ThinvmStore *st)
{
    QEMU_LOCK_GUARD(&st->lock);
    return thinvm_sums_unflushed(st);
}

/* Write the sealed records up to @cut; their data is flushed, or @summed */
static int coroutine_fn journal_write_sealed(ThinvmStore *st, uint64_t cut,
                                             bool summed)
{
    ThinvmJournal *j = &st->journal;
    ThinvmJournalRecord *r;
    unsigned failures;
    int ret = 0;

    while ((r = first_sealed(st, cut))) {
        failures = thinvm_journal_failures(st);
        if (!summed) {
            record_strip(st, r);
        }
        /* One with checksums was written just now that failed before */
        if (!r->composed && sums_unflushed(st)) {
            ret = thinvm_journal_flush(st, BLKDBG_THINVM_JOURNAL_FLUSH);
        }
        if (ret == 0 && !r->composed) {
            ret = record_compose(st, r);
        }
        if (ret == 0) {
            ret = record_write(st, r);
        }
        if (ret < 0) {
            return ret;
        }
        qatomic_set(&st->nb_records, st->nb_records + 1);
        QEMU_LOCK_GUARD(&st->lock);
        QSIMPLEQ_REMOVE_HEAD(&j->sealed, next);
        QSIMPLEQ_INSERT_TAIL(&j->unflushed, r, next);
        j->written_sequence = r->header.sequence;
        st->nb_summed += r->header.nb_sums > 0;
        j->rewrite |= failures != j->flush_failures;
        if (j->rewrite) {
            return -EIO;        /* somebody else's flush failed meanwhile */
        }
    }
    return 0;
}

/* ------------------------------------------------------------------ */
/* Group commit                                                        */

/*
 * What has to be flushed before these records are written?  Nothing for a
 * single one that has checksums of its data, or maps none, if all records
 * before it are flushed: it says so of them.
 */
static bool needs_no_flush(ThinvmStore *st, const ThinvmRound *round,
                           uint64_t cut)
{
    ThinvmJournal *j = &st->journal;
    ThinvmJournalRecord *r;

    QEMU_LOCK_GUARD(&st->lock);
    r = QSIMPLEQ_FIRST(&j->sealed);
    if (!round->durable || r->header.sequence != cut || r->composed ||
        j->flushed_sequence != j->written_sequence) {
        return false;
    }
    return round->settle ? !r->header.nb_operations : r->header.nb_sums > 0;
}

/* Bring everything that is applied now into the ring */
static int coroutine_fn write_round(ThinvmStore *st, const ThinvmRound *round)
{
    ThinvmState *s = thinvm_store_state(st);
    uint32_t nb_operations;
    bool summed;
    uint64_t cut;
    int ret;

    thinvm_state_lock(s);
    nb_operations = st->journal.pending_operations;
    if (st->journal.pending_length) {
        thinvm_journal_seal(st);
    } else if (round->settle) {
        seal_empty(st);
    }
    cut = st->journal.next_sequence - 1;
    thinvm_state_unlock(s);

    ret = journal_rewrite(st);
    if (ret == 0 && first_sealed(st, cut)) {
        summed = needs_no_flush(st, round, cut);
        if (!summed) {
            ret = thinvm_journal_flush(st, BLKDBG_THINVM_DATA_FLUSH);
        }
        if (ret == 0) {
            ret = journal_write_sealed(st, cut, summed);
        }
        if (round->durable && !round->settle) {
            QEMU_LOCK_GUARD(&st->lock);
            thinvm_sums_judge(st, nb_operations);
        }
    }
    return ret;
}

static bool has_unflushed(ThinvmStore *st)
{
    QEMU_LOCK_GUARD(&st->lock);
    return !QSIMPLEQ_EMPTY(&st->journal.unflushed);
}

/* Called and returns with st->lock held; releases it meanwhile */
static void coroutine_fn lead_round(ThinvmStore *st, ThinvmRound *round)
{
    ThinvmJournal *j = &st->journal;
    int ret;

    assert(round == j->next_round);
    j->next_round = NULL;
    j->leading = true;
    qemu_mutex_unlock(&st->lock);

    ret = write_round(st, round);

    qemu_mutex_lock(&st->lock);
    round->record_ret = ret;
    round->record_done = true;
    qemu_co_queue_restart_all(&j->rounds);
    qemu_mutex_unlock(&st->lock);

    if (ret == 0 && round->durable &&
        (round->guest_flush || has_unflushed(st))) {
        ret = thinvm_journal_flush(st, BLKDBG_THINVM_JOURNAL_FLUSH);
    }

    qemu_mutex_lock(&st->lock);
    j->error = ret;
    round->ret = ret;
    round->done = true;
    j->leading = false;
    qemu_co_queue_restart_all(&j->rounds);
}

/* Is there anything to do for such a commit? */
static bool is_needed(ThinvmStore *st, ThinvmCommitLevel level,
                      bool guest_flush)
{
    ThinvmJournal *j = &st->journal;

    return guest_flush || qatomic_read(&j->pending_length) || j->rewrite ||
           !QSIMPLEQ_EMPTY(&j->sealed) ||
           (level != THINVM_COMMIT_RECORD && !QSIMPLEQ_EMPTY(&j->unflushed)) ||
           (level == THINVM_COMMIT_DURABLE && thinvm_sums_last(st));
}

static ThinvmRound *round_join(ThinvmJournal *j, ThinvmCommitLevel level,
                               bool guest_flush)
{
    if (!j->next_round) {
        j->next_round = g_new0(ThinvmRound, 1);
    }
    j->next_round->refs++;
    j->next_round->durable |= level != THINVM_COMMIT_RECORD;
    j->next_round->settle |= level == THINVM_COMMIT_DURABLE;
    j->next_round->guest_flush |= guest_flush;
    return j->next_round;
}

/*
 * Everybody joins the round that has not begun yet: the one that is being
 * written was cut before, and its flushes may have been issued before.
 */
int coroutine_fn thinvm_journal_commit(ThinvmStore *st,
                                       ThinvmCommitLevel level,
                                       bool only_metadata)
{
    ThinvmJournal *j = &st->journal;
    bool durable = level != THINVM_COMMIT_RECORD;
    bool guest_flush = durable && !only_metadata;
    int64_t start = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
    ThinvmRound *round;
    int ret;

    QEMU_LOCK_GUARD(&st->lock);
    if (!is_needed(st, level, guest_flush)) {
        return 0;
    }
    if (is_needed(st, level, false)) {
        st->nb_commits++;
    }
    round = round_join(j, level, guest_flush);
    while (!(durable ? round->done : round->record_done)) {
        if (j->leading) {
            qemu_co_queue_wait(&j->rounds, &st->lock);
        } else {
            lead_round(st, round);
        }
    }
    ret = durable ? round->ret : round->record_ret;
    if (--round->refs == 0) {
        g_free(round);
    }
    st->longest_commit_ns = MAX(st->longest_commit_ns,
                                qemu_clock_get_ns(QEMU_CLOCK_REALTIME) -
                                start);
    return ret;
}

int coroutine_fn thinvm_store_commit(ThinvmStore *st, ThinvmCommitLevel level,
                                     bool only_metadata)
{
    if (qatomic_read(&st->poisoned)) {
        return -EIO;
    }
    if (qatomic_read(&st->mode) == THINVM_STORE_READING) {
        return 0;               /* nothing can have been applied */
    }
    return thinvm_journal_commit(st, level, only_metadata);
}

uint64_t thinvm_store_ticket(ThinvmStore *st)
{
    ThinvmState *s = thinvm_store_state(st);
    uint64_t ticket;

    thinvm_state_lock(s);
    ticket = thinvm_journal_ticket(st);
    thinvm_state_unlock(s);
    return ticket;
}

int coroutine_fn thinvm_store_commit_ticket(ThinvmStore *st, uint64_t ticket)
{
    ThinvmJournal *j = &st->journal;

    WITH_QEMU_LOCK_GUARD(&st->lock) {
        /* What a failed flush may have lost counts as not written */
        if (ticket <= (j->rewrite ? j->flushed_sequence :
                                    j->written_sequence)) {
            return 0;
        }
    }
    return thinvm_store_commit(st, THINVM_COMMIT_RECORD, true);
}

/* ------------------------------------------------------------------ */
/* Where it ends                                                       */

void thinvm_store_journal_end(ThinvmStore *st, uint64_t *sequence,
                              uint32_t *crc)
{
    QEMU_LOCK_GUARD(&st->lock);
    *sequence = st->journal.composed_sequence;
    *crc = st->journal.composed_crc;
}

void thinvm_store_expect_end(ThinvmStore *st, uint64_t sequence, uint32_t crc)
{
    QEMU_LOCK_GUARD(&st->lock);
    st->expects_end = true;
    st->end_sequence = sequence;
    st->end_crc = crc;
}

void thinvm_store_expect_any_end(ThinvmStore *st)
{
    QEMU_LOCK_GUARD(&st->lock);
    st->expects_end = false;
}

bool thinvm_store_at_end(ThinvmStore *st)
{
    ThinvmJournal *j = &st->journal;

    QEMU_LOCK_GUARD(&st->lock);
    return st->expects_end && !st->stale &&
           j->composed_sequence == st->end_sequence &&
           j->composed_crc == st->end_crc;
}

int thinvm_journal_end_expected(ThinvmStore *st, Error **errp)
{
    bool expects = st->expects_end;
    uint64_t sequence;
    uint32_t crc;

    thinvm_store_expect_any_end(st);
    thinvm_store_journal_end(st, &sequence, &crc);
    if (!expects || (sequence == st->end_sequence && crc == st->end_crc)) {
        return 0;
    }
    error_setg(errp, "The journal ends with record %" PRIu64 ", but its owner "
               "released it with record %" PRIu64 " (checksum 0x%08" PRIx32
               "): the device does not show all that was written",
               sequence, st->end_sequence, st->end_crc);
    return -EBADMSG;
}
