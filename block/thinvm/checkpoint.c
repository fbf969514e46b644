/*
 * thinvm durability layer: checkpoints
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A checkpoint writes a new base, so that the journal before it is not needed
 * any more:
 *
 *   1. Under the state lock: seal the pending record and freeze the state.
 *      The base is thus exactly what that record's sequence number says.
 *   2. Commit durably.  Data that the base's mappings point to, and the
 *      records up to it, are on the device now.
 *   3. Complete the frozen pages, children first, and write them; they go to
 *      places that neither of the two newest bases names.
 *   4. Flush.
 *   5. Write the superblock to the slot that does not hold the newest base;
 *      flush.
 *   6. The former newest base is now the older one: the ring before it is
 *      free.  Thaw: the engine does the same with the pages.
 *
 * A power cut leaves before 5: the two bases as they were, with all the
 * records since the older one; the pages written are unused places to them.
 * During 5: the slot old, new or torn (a sector is whole, and the superblock
 * is one); if torn, the newest base is alone and whole.  After 5: the new one.
 *
 * When anything fails the frozen base stays, and the next attempt goes
 * on with it, writing again all that was written: a page whose flush failed
 * may be lost, also if that was a flush of somebody else, between its write
 * and ours.  Until it has succeeded no other base is made, and the ring's
 * tail stays.  So whatever became of the slot's contents, what it may name is
 * as it was.
 *
 * In the background it stops between two steps when its caller is told to (a
 * drain holds up the guest): that is as if the next step had failed.  Not
 * between the superblock and its flush, which is the last one anyway.
 *
 * A slot that was found damaged (st->bases.suspect) is erased before pages of
 * the new base are written: were it readable again some day, the base in it
 * would name pages that are overwritten by then.
 *
 * Holds st->checkpoint_lock throughout; other requests go on.
 */
#include "qemu/osdep.h"
#include "qemu/lockable.h"
#include "qemu/memalign.h"
#include "block/aio_task.h"
#include "qapi/qapi-types-block-core.h"
#include "store-int.h"
#include "trace.h"

/* Pages completed and sorted together */
#define THINVM_CHECKPOINT_STEP      64
/* Pages in one write, writes at the same time */
#define THINVM_CHECKPOINT_RUN       64
#define THINVM_CHECKPOINT_PARALLEL  4

/* ------------------------------------------------------------------ */
/* When                                                                */

bool thinvm_checkpoint_due(ThinvmStore *st, unsigned quarters)
{
    return thinvm_state_dirty_reaches(thinvm_store_state(st), quarters) ||
           thinvm_journal_used(st) * 4 >= st->journal.size * quarters;
}

bool thinvm_store_wants_checkpoint(ThinvmStore *st)
{
    return thinvm_store_may_write(st) == 0 &&
           (qatomic_read(&st->interrupted) || thinvm_checkpoint_due(st, 2));
}

/* What a step returns instead of being done; then the next attempt does it */
static int may_go_on(ThinvmStore *st)
{
    return !st->go_on || st->go_on(st->go_on_opaque) ? 0 : -ECANCELED;
}

/*
 * Past three quarters of a bound, while a checkpoint is being written, an
 * operation waits for one step of it.  Writers are thus slowed to the speed
 * of the checkpoint before they would have to wait for all of it; what goes
 * on in the background, before writers are.
 */
void coroutine_fn thinvm_checkpoint_pace(ThinvmStore *st, unsigned quarters)
{
    if (!qatomic_read(&st->checkpointing) ||
        !thinvm_checkpoint_due(st, quarters)) {
        return;
    }
    QEMU_LOCK_GUARD(&st->lock);
    if (st->checkpointing) {
        qemu_co_queue_wait(&st->checkpoint_progress, &st->lock);
    }
}

static void coroutine_fn signal_progress(ThinvmStore *st)
{
    QEMU_LOCK_GUARD(&st->lock);
    qemu_co_queue_restart_all(&st->checkpoint_progress);
}

/* ------------------------------------------------------------------ */
/* 1: freeze                                                           */

void thinvm_checkpoint_mark(ThinvmStore *st, uint64_t sequence)
{
    ThinvmJournal *j = &st->journal;

    if (st->frozen && !st->frozen_marked && sequence == st->frozen_sequence) {
        st->frozen_position = j->head;
        st->frozen_crc = j->composed_crc;
        st->frozen_epoch = j->composed_epoch;
        st->frozen_marked = true;
    }
}

void thinvm_checkpoint_forget(ThinvmStore *st)
{
    if (st->frozen) {           /* else others may be looking */
        st->frozen = NULL;      /* the state frees it */
    }
    if (st->frozen_pages) {
        g_array_set_size(st->frozen_pages, 0);
    }
    st->frozen_complete = false;
    qatomic_set(&st->interrupted, false);
}

/*
 * 0: the newest base says it all already; 1: it is frozen.  -ENOSPC: a space
 * map without room for its own next version, which no operation leaves, but
 * who made the image, or repaired it, may have.
 */
static int freeze(ThinvmStore *st)
{
    ThinvmState *s = st->state;
    ThinvmJournal *j = &st->journal;
    ThinvmFrozen *frozen;

    thinvm_state_lock(s);
    thinvm_journal_seal(st);
    if (j->next_sequence - 1 == st->bases.newest.sequence &&
        st->bases.newest.generation && !st->bases.suspect &&
        j->base == j->tail && !st->nb_repair_checkpoints) {
        thinvm_state_unlock(s);
        return 0;
    }
    if (!thinvm_state_may_freeze(s)) {
        thinvm_state_unlock(s);
        return -ENOSPC;
    }
    if (st->nb_repair_checkpoints) {
        st->nb_repair_checkpoints--;
    }
    frozen = thinvm_state_freeze(s);
    WITH_QEMU_LOCK_GUARD(&st->lock) {
        st->frozen = frozen;
        st->frozen_sequence = j->next_sequence - 1;
        st->frozen_marked = false;
        st->frozen_complete = false;
        /* Nothing was sealed or pending: it was composed long ago */
        thinvm_checkpoint_mark(st, j->composed_sequence);
    }
    thinvm_state_unlock(s);
    if (!st->frozen_pages) {
        st->frozen_pages = g_array_new(false, false, sizeof(ThinvmFrozenPage));
    }
    g_array_set_size(st->frozen_pages, 0);
    trace_thinvm_checkpoint_freeze(st, frozen->superblock.generation,
                                   st->frozen_sequence, frozen->nb_pages);
    return 1;
}

/* ------------------------------------------------------------------ */
/* 3: pages                                                            */

typedef struct PageWrite {
    AioTask task;
    ThinvmStore *st;
    uint64_t page;
    unsigned nb_pages;
    uint8_t *buf;
} PageWrite;

static int coroutine_fn page_write_entry(AioTask *task)
{
    PageWrite *w = container_of(task, PageWrite, task);
    int ret = thinvm_store_pwrite(w->st, w->page * THINVM_PAGE_SIZE,
                                  w->nb_pages * THINVM_PAGE_SIZE, w->buf,
                                  BLKDBG_THINVM_PAGE_WRITE);

    qemu_vfree(w->buf);
    signal_progress(w->st);
    return ret;
}

static void coroutine_fn start_write(ThinvmStore *st, AioTaskPool *pool,
                                     const ThinvmFrozenPage *pages,
                                     unsigned nb_pages)
{
    PageWrite *w = g_new(PageWrite, 1);

    *w = (PageWrite) {
        .task.func = page_write_entry,
        .st = st,
        .page = pages[0].page,
        .nb_pages = nb_pages,
        .buf = qemu_memalign(THINVM_PAGE_SIZE, nb_pages * THINVM_PAGE_SIZE),
    };
    for (unsigned i = 0; i < nb_pages; i++) {
        memcpy(w->buf + i * THINVM_PAGE_SIZE, pages[i].data,
               THINVM_PAGE_SIZE);
    }
    aio_task_pool_start_task(pool, &w->task);
}

static int compare_pages(const void *a, const void *b)
{
    const ThinvmFrozenPage *pa = a, *pb = b;

    return pa->page < pb->page ? -1 : pa->page > pb->page;
}

/* Complete more pages, in the engine's order */
static void complete_step(ThinvmStore *st, unsigned end)
{
    while (st->frozen_pages->len < end) {
        ThinvmFrozenPage page;

        page.data = thinvm_frozen_complete_page(st->state, st->frozen,
                                                st->frozen_pages->len,
                                                &page.page);
        g_array_append_val(st->frozen_pages, page);
    }
}

/* Write pages [@start, @end), neighbours in one go */
static int coroutine_fn write_step(ThinvmStore *st, AioTaskPool *pool,
                                   unsigned start, unsigned end)
{
    g_autofree ThinvmFrozenPage *pages =
        g_memdup2(&g_array_index(st->frozen_pages, ThinvmFrozenPage, start),
                  (end - start) * sizeof(ThinvmFrozenPage));
    unsigned nb = end - start, run;

    qsort(pages, nb, sizeof(*pages), compare_pages);
    for (unsigned i = 0; i < nb && aio_task_pool_status(pool) == 0; i += run) {
        for (run = 1; i + run < nb && run < THINVM_CHECKPOINT_RUN; run++) {
            if (pages[i + run].page != pages[i].page + run) {
                break;
            }
        }
        start_write(st, pool, &pages[i], run);
    }
    return aio_task_pool_status(pool);
}

static int coroutine_fn write_pages(ThinvmStore *st)
{
    AioTaskPool *pool = aio_task_pool_new(THINVM_CHECKPOINT_PARALLEL);
    unsigned nb = st->frozen->nb_pages, start, end;
    int ret = 0;

    for (start = 0; start < nb && ret == 0; start = end) {
        end = MIN(nb, start + THINVM_CHECKPOINT_STEP);
        ret = may_go_on(st);
        if (ret == 0) {
            complete_step(st, end);
            ret = write_step(st, pool, start, end);
        }
    }
    aio_task_pool_wait_all(pool);
    if (ret == 0) {
        ret = aio_task_pool_status(pool);
    }
    aio_task_pool_free(pool);
    return ret < 0 ? ret : may_go_on(st);
}

/* What was written since there were @failures of flushes */
static int coroutine_fn flush_written(ThinvmStore *st, unsigned failures,
                                      int event)
{
    int ret = thinvm_journal_flush(st, event);

    return ret == 0 && thinvm_journal_failures(st) != failures ? -EIO : ret;
}

/* ------------------------------------------------------------------ */
/* 5: superblock                                                       */

static int coroutine_fn erase_suspect(ThinvmStore *st)
{
    g_autofree uint8_t *zeroes = NULL;
    unsigned failures = thinvm_journal_failures(st);
    int ret;

    if (!st->bases.suspect) {
        return 0;
    }
    zeroes = g_malloc0(THINVM_PAGE_SIZE);
    ret = thinvm_store_pwrite(st,
                              thinvm_superblock_offset(!st->bases.newest_slot),
                              THINVM_PAGE_SIZE, zeroes,
                              BLKDBG_THINVM_SUPERBLOCK_WRITE);
    if (ret == 0) {
        ret = flush_written(st, failures, BLKDBG_THINVM_SUPERBLOCK_FLUSH);
    }
    if (ret == 0) {
        st->bases.suspect = false;
    }
    return ret;
}

static void fill_superblock(ThinvmStore *st)
{
    ThinvmSuperblock *sb = &st->frozen->superblock;

    QEMU_LOCK_GUARD(&st->lock);
    assert(st->frozen_marked);
    sb->sequence = st->frozen_sequence;
    sb->epoch = st->frozen_epoch;
    sb->journal_position = st->frozen_position % st->journal.size;
    sb->record_crc = st->frozen_crc;
}

static int coroutine_fn write_superblock(ThinvmStore *st)
{
    g_autofree uint8_t *buf = g_malloc0(THINVM_PAGE_SIZE);
    unsigned failures = thinvm_journal_failures(st);
    int ret;

    thinvm_superblock_encode((ThinvmSuperblockLe *)buf,
                             &st->frozen->superblock);
    ret = thinvm_store_pwrite(st,
                              thinvm_superblock_offset(!st->bases.newest_slot),
                              THINVM_PAGE_SIZE, buf,
                              BLKDBG_THINVM_SUPERBLOCK_WRITE);
    return ret < 0 ? ret :
           flush_written(st, failures, BLKDBG_THINVM_SUPERBLOCK_FLUSH);
}

/* ------------------------------------------------------------------ */
/* All of it                                                           */

/* Steps 3 to 6: the records up to the base are durable */
static int coroutine_fn write_base(ThinvmStore *st)
{
    ThinvmJournal *j = &st->journal;
    ThinvmSuperblock sb;
    unsigned failures;
    int ret;

    ret = erase_suspect(st);
    if (ret < 0) {
        return ret;
    }
    failures = thinvm_journal_failures(st);
    ret = write_pages(st);
    if (ret < 0) {
        return ret;
    }
    if (!st->frozen_complete) {
        fill_superblock(st);
        thinvm_frozen_complete(st->state, st->frozen);
        st->frozen_complete = true;
    }
    ret = flush_written(st, failures, BLKDBG_THINVM_PAGE_FLUSH);
    if (ret == 0) {
        ret = may_go_on(st);
    }
    if (ret < 0) {
        return ret;
    }
    ret = write_superblock(st);
    if (ret < 0) {
        return ret;
    }

    sb = st->frozen->superblock;
    trace_thinvm_checkpoint_done(st, sb.generation, sb.sequence,
                                 sb.journal_position);
    thinvm_state_lock(st->state);
    thinvm_state_thaw(st->state, st->frozen);
    WITH_QEMU_LOCK_GUARD(&st->lock) {
        j->tail = st->bases.newest.generation ? j->base : st->frozen_position;
        j->base = st->frozen_position;
        st->bases.older = st->bases.newest;
        st->bases.has_older = st->bases.newest.generation != 0;
        st->bases.newest = sb;
        st->bases.newest_slot = !st->bases.newest_slot;
        st->frozen = NULL;
    }
    thinvm_state_unlock(st->state);
    thinvm_checkpoint_forget(st);
    qatomic_set(&st->nb_checkpoints, st->nb_checkpoints + 1);
    return 0;
}

static int coroutine_fn checkpoint_locked(ThinvmStore *st)
{
    int ret = may_go_on(st);

    if (ret == 0 && !st->frozen) {
        ret = freeze(st);
        if (ret == 0) {
            return 0;
        }
    }
    if (ret < 0) {
        return ret;
    }
    ret = thinvm_journal_commit(st, THINVM_COMMIT_DURABLE, true);
    if (ret == 0) {
        WITH_QEMU_LOCK_GUARD(&st->lock) {
            assert(st->journal.flushed_sequence >= st->frozen_sequence);
        }
        ret = write_base(st);
    }
    if (ret < 0) {
        trace_thinvm_checkpoint_failed(st, st->frozen_sequence, ret);
    }
    return ret;
}

static void coroutine_fn set_checkpointing(ThinvmStore *st, bool on)
{
    QEMU_LOCK_GUARD(&st->lock);
    qatomic_set(&st->checkpointing, on);
    qemu_co_queue_restart_all(&st->checkpoint_progress);
}

/* Who is about to begin writing may, too, to make room in the ring */
static int may_checkpoint(ThinvmStore *st)
{
    return !qatomic_read(&st->poisoned) &&
           qatomic_read(&st->mode) == THINVM_STORE_STARTING ? 0 :
           thinvm_store_may_write(st);
}

static int coroutine_fn checkpoint(ThinvmStore *st, bool anew,
                                   bool (*go_on)(void *opaque), void *opaque)
{
    int ret = may_checkpoint(st);
    bool again;

    if (ret < 0) {
        return ret;
    }
    qemu_co_mutex_lock(&st->checkpoint_lock);
    st->go_on = go_on;
    st->go_on_opaque = opaque;
    set_checkpointing(st, true);
    /* It may have ended while we waited, and another owner begun */
    ret = may_checkpoint(st);
    do {
        /* what an attempt that failed has left would not be new */
        again = anew && st->frozen;
        if (anew && !again && !st->nb_repair_checkpoints) {
            st->nb_repair_checkpoints = 1;
        }
        if (ret == 0) {
            ret = checkpoint_locked(st);
        }
    } while (ret == 0 && again);
    qatomic_set(&st->interrupted, ret == -ECANCELED);
    set_checkpointing(st, false);
    qemu_co_mutex_unlock(&st->checkpoint_lock);
    return ret;
}

int coroutine_fn thinvm_store_checkpoint_while(ThinvmStore *st,
                                               bool (*go_on)(void *opaque),
                                               void *opaque)
{
    return checkpoint(st, false, go_on, opaque);
}

int coroutine_fn thinvm_store_checkpoint(ThinvmStore *st)
{
    return checkpoint(st, false, NULL, NULL);
}

int coroutine_fn thinvm_store_checkpoint_anew(ThinvmStore *st)
{
    return checkpoint(st, true, NULL, NULL);
}

/* A new image: its first base, which no journal leads to */
int coroutine_fn thinvm_checkpoint_first(ThinvmStore *st)
{
    int ret = freeze(st);

    return ret < 0 ? ret : write_base(st);
}
