/*
 * thinvm durability layer: life of a store, and look-ups
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Joins the engine (state.h), which lacks pages but never waits, with a
 * device, which makes wait: loops that read what the engine wants and ask
 * again.  Operations are in execute.c.
 *
 * A power cut during any function here leaves what journal.c and checkpoint.c
 * say, since only these write, apart from thinvm_store_create(): both
 * superblock slots are erased first, so that the device holds no image until
 * the one superblock that completes it is written.
 */
#include "qemu/osdep.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qemu/lockable.h"
#include "qemu/rcu.h"
#include "qapi/qapi-types-block-core.h"
#include "store-int.h"
#include "trace.h"

/*
 * Default cache, within these bounds (bytes): all metadata of a fully
 * fragmented disk, which for 2 TiB with clusters of 64 KiB is just within
 * them.  One page less, and a scan of the disk would find none in the cache.
 */
#define THINVM_MIN_CACHE        (8 * MiB)
#define THINVM_MAX_CACHE        (328 * MiB)

/* ------------------------------------------------------------------ */
/* Device                                                              */

static void add_stat(uint64_t *counter, uint64_t bytes)
{
    /* several threads; a torn sum would be seen in query-thinvm only */
    qatomic_set(counter, qatomic_read(counter) + bytes);
}

int coroutine_fn thinvm_store_pread(ThinvmStore *st, uint64_t offset,
                                    uint64_t bytes, void *buf, int event)
{
    thinvm_device_event(st->dev, event);
    add_stat(&st->bytes_read, bytes);
    return st->dev->co_pread(st->dev, offset, bytes, buf);
}

int coroutine_fn thinvm_store_pwrite(ThinvmStore *st, uint64_t offset,
                                     uint64_t bytes, const void *buf,
                                     int event)
{
    if (qatomic_read(&st->poisoned)) {
        return -EIO;
    }
    thinvm_device_event(st->dev, event);
    add_stat(&st->bytes_written, bytes);
    return st->dev->co_pwrite(st->dev, offset, bytes, buf);
}

int coroutine_fn thinvm_store_ask(ThinvmStore *st, ThinvmQuestion question,
                                  void *opaque, Error **errp)
{
    ThinvmState *s = thinvm_store_state(st);
    unsigned attempts = 0;
    ThinvmNeeds needs;
    int ret;

    thinvm_needs_init(&needs);
    for (;;) {
        Error *local_err = NULL;

        thinvm_state_lock(s);
        ret = question(s, opaque, &needs);
        thinvm_state_unlock(s);
        if (ret != -EAGAIN) {
            break;
        }
        ret = thinvm_store_read_wanted(st, s, &needs, &local_err);
        if (ret == -EBADMSG && attempts++ < THINVM_PAGE_ATTEMPTS) {
            /* it may be gone by now: ask again */
            error_free(local_err);
            thinvm_state_lock(s);
            thinvm_needs_destroy(s, &needs);
            thinvm_state_unlock(s);
            thinvm_needs_init(&needs);
        } else if (ret < 0) {
            error_propagate(errp, local_err);
            break;
        }
    }
    thinvm_state_lock(s);
    thinvm_needs_destroy(s, &needs);
    thinvm_state_unlock(s);
    return ret;
}

/* ------------------------------------------------------------------ */
/* Life                                                                */

uint64_t thinvm_store_default_cache_size(uint64_t virtual_size,
                                         unsigned cluster_bits)
{
    uint64_t clusters = DIV_ROUND_UP(virtual_size, 1ULL << cluster_bits);
    uint64_t pages = DIV_ROUND_UP(clusters, THINVM_ENTRIES_PER_LEAF) +
                     DIV_ROUND_UP(clusters, THINVM_COUNTS_PER_LEAF);
    uint64_t size;

    pages += pages / 128;       /* inner pages: more than there are */
    size = ROUND_UP(pages * THINVM_PAGE_SIZE, MiB) + MiB;
    return MIN(MAX(size, THINVM_MIN_CACHE), THINVM_MAX_CACHE);
}

static ThinvmStore *store_new(ThinvmDevice *dev, uint64_t cache_size)
{
    ThinvmStore *st = g_new0(ThinvmStore, 1);

    st->dev = dev;
    st->cache_size = cache_size;
    qemu_mutex_init(&st->lock);
    qemu_co_mutex_init(&st->checkpoint_lock);
    qemu_co_queue_init(&st->checkpoint_progress);
    qemu_co_queue_init(&st->follow_queue);
    thinvm_page_read_init(st);
    thinvm_reclaim_init(st);
    return st;
}

/* No state yet: a store that could not be opened */
static void store_destroy(ThinvmStore *st)
{
    thinvm_bases_destroy(&st->bases);
    thinvm_page_read_destroy(st);
    qemu_mutex_destroy(&st->lock);
    g_free(st->head_block);
    g_free(st->history);
    g_free(st);
}

void thinvm_store_free(ThinvmStore *st)
{
    if (!st) {
        return;
    }
    thinvm_reclaim_destroy(st);
    thinvm_journal_destroy(st);
    if (st->frozen_pages) {
        g_array_free(st->frozen_pages, true);
    }
    thinvm_state_free(st->state);
    store_destroy(st);
}

/* Is all that may be mapped within the device? */
static int coroutine_fn check_length(ThinvmDevice *dev, uint64_t clusters,
                                     unsigned cluster_bits, Error **errp)
{
    int64_t length = dev->co_length(dev);
    uint64_t needed = clusters << cluster_bits;

    if (length < 0) {
        error_setg_errno(errp, -length, "Could not get the device's length");
        return length;
    }
    if (length < needed) {
        error_setg(errp, "The device has %" PRId64 " bytes, but the image on "
                   "it uses up to %" PRIu64 "; it was truncated, or copied "
                   "incompletely, or must be rescanned", length, needed);
        return -EINVAL;
    }
    return 0;
}

int coroutine_fn thinvm_store_check_length(ThinvmStore *st, Error **errp)
{
    ThinvmInfoState info;

    thinvm_state_lock(st->state);
    thinvm_state_info(st->state, &info);
    thinvm_state_unlock(st->state);
    return check_length(st->dev, info.device_clusters, info.cluster_bits,
                        errp);
}

ThinvmStore *coroutine_fn thinvm_store_open(ThinvmDevice *dev,
                                            uint64_t cache_size,
                                            Error **errp)
{
    ThinvmStore *st;
    ThinvmSuperblock sb;

    /* The length first: on a truncated device all else looks damaged */
    if (thinvm_store_probe(dev, &sb, NULL, NULL, errp) < 0 ||
        check_length(dev, sb.device_clusters, sb.cluster_bits, errp) < 0) {
        return NULL;
    }
    st = store_new(dev, cache_size ?:
                   thinvm_store_default_cache_size(sb.virtual_size,
                                                   sb.cluster_bits));
    if (thinvm_replay_open(st, errp) < 0) {
        store_destroy(st);
        return NULL;
    }
    if (thinvm_store_check_length(st, errp) < 0) {
        thinvm_store_free(st);
        return NULL;
    }
    if (st->bases.damage) {
        warn_report("thinvm image: %s; using the other superblock, of "
                    "generation %" PRIu64, error_get_pretty(st->bases.damage),
                    st->bases.newest.generation);
    }
    return st;
}

/*
 * What an autoclear feature that we do not know says of the image will be
 * wrong after our first change: its bit goes before, out of both bases.
 */
static int coroutine_fn clear_unknown_autoclear(ThinvmStore *st)
{
    int ret = 0;

    if (st->bases.newest.autoclear & ~THINVM_AUTOCLEAR_KNOWN) {
        ret = thinvm_store_checkpoint(st);
    }
    if (ret == 0 && st->bases.has_older &&
        st->bases.older.autoclear & ~THINVM_AUTOCLEAR_KNOWN) {
        ret = thinvm_store_checkpoint(st);
    }
    return ret;
}

/*
 * Numbers that only go up end at THINVM_COUNTER_MAX.  No honest image comes
 * near it; one that is there would have to write what nobody can read.
 */
static int check_counters(ThinvmStore *st, uint64_t epoch, Error **errp)
{
    uint64_t sequence, id;
    ThinvmInfoState info;

    thinvm_state_lock(st->state);
    thinvm_state_info(st->state, &info);
    id = thinvm_snapshot_next_id(st->state);
    thinvm_state_unlock(st->state);
    WITH_QEMU_LOCK_GUARD(&st->lock) {
        sequence = st->journal.next_sequence;
    }
    if (MAX(MAX(info.generation, sequence), MAX(epoch, id)) >
        THINVM_COUNTER_MAX / 2) {
        error_setg(errp, "Generation %" PRIu64 ", journal sequence %" PRIu64
                   ", epoch %" PRIu64 " and snapshot id %" PRIu64 " must be "
                   "at most %llu for the image to be written", info.generation,
                   sequence, epoch, id,
                   (unsigned long long)THINVM_COUNTER_MAX / 2);
        return -EINVAL;
    }
    return 0;
}

/*
 * A repair may have been interrupted between its two checkpoints.  The older
 * base is no way back then; so that there is one the second is written now.
 * And compaction may have given metadata extents back in one of them.
 */
static int coroutine_fn settle_repair(ThinvmStore *st)
{
    bool more;

    thinvm_state_lock(st->state);
    more = thinvm_state_older_has_more(st->state);
    thinvm_state_unlock(st->state);
    return more || thinvm_bases_repaired(&st->bases) ?
           thinvm_store_checkpoint(st) : 0;
}

/*
 * Operations leave the last quarter of the ring free, but EPOCH takes from it
 * each time that somebody becomes the owner.  If all of these died at once
 * there would be no room left for the next one, and nobody could write to the
 * image any more.  So whoever finds the ring fuller than operations make it
 * writes the checkpoint now that they would have to wait for.
 *
 * And if owners die, or fail, in that checkpoint again and again, the ring
 * comes to seven eighths.  Then the checkpoint is written even before EPOCH:
 * the claim is there already, so nobody else writes; what it contains is what
 * the journal says; and it takes nothing from the ring, however often it is
 * begun.
 */
static int coroutine_fn make_room(ThinvmStore *st, unsigned eighths,
                                  Error **errp)
{
    int ret = 0;

    /* The first may free nothing: the older base's records are kept too */
    for (int i = 0; i < THINVM_NB_BASES && ret == 0 &&
                    thinvm_journal_used(st) > st->journal.size / 8 * eighths;
         i++) {
        /* What was replayed need not be durable yet */
        ret = thinvm_journal_flush(st, BLKDBG_THINVM_JOURNAL_FLUSH);
        if (ret == 0) {
            ret = thinvm_store_checkpoint(st);
        }
    }
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not write a checkpoint to make "
                         "room in the journal");
    }
    return ret;
}

/* Caught up: is there a place, and a number, for the record of @epoch? */
static int coroutine_fn prepare_epoch(ThinvmStore *st, uint64_t epoch,
                                      Error **errp)
{
    ThinvmInfoState info;
    int ret = thinvm_store_check_length(st, errp);

    if (ret == 0) {
        ret = check_counters(st, epoch, errp);
    }
    if (ret < 0) {
        return ret;
    }
    thinvm_state_lock(st->state);
    thinvm_state_info(st->state, &info);
    thinvm_state_unlock(st->state);
    if (epoch <= info.epoch) {
        error_setg(errp, "Epoch %" PRIu64 " of the new owner is not above %"
                   PRIu64 " in the image's journal", epoch, info.epoch);
        return -EINVAL;
    }
    return make_room(st, 7, errp);
}

static int coroutine_fn journal_epoch(ThinvmStore *st, uint64_t epoch,
                                      Error **errp)
{
    ThinvmOp op = { .type = THINVM_OP_EPOCH, .value = epoch };
    int ret;

    st->epoch = epoch;
    ret = thinvm_store_execute_internal(st, &op, false, true, NULL, errp);
    if (ret < 0) {
        return ret;
    }
    /*
     * Its data flush also settles the claim, and what the former owner left
     * in caches.  If a power cut takes the record itself, it takes whatever
     * we journalled behind it, too; a flush of the guest's makes all durable.
     * Only if the journal ended where checksums of data decided must it be
     * durable first: nobody may ask again after that data has changed.
     */
    ret = thinvm_journal_commit(st, st->last_summed || st->cut_by_sums ?
                                    THINVM_COMMIT_DURABLE :
                                    THINVM_COMMIT_RECORD, true);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not write to the image's journal");
    }
    return ret;
}

/* What former owners have left to their successor */
static int coroutine_fn settle_inheritance(ThinvmStore *st, Error **errp)
{
    int ret = settle_repair(st);

    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not write a checkpoint");
        return ret;
    }
    ret = make_room(st, 6, errp);
    if (ret < 0) {
        return ret;
    }
    ret = clear_unknown_autoclear(st);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not clear the image's autoclear "
                         "feature bits");
    }
    return ret;
}

int coroutine_fn thinvm_store_begin_writing(ThinvmStore *st, uint64_t epoch,
                                            Error **errp)
{
    int ret;

    if (qatomic_read(&st->mode) != THINVM_STORE_READING) {
        error_setg(errp, "The image is open for writing already");
        return -EBUSY;
    }
    if (qatomic_read(&st->poisoned)) {
        error_setg(errp, "The image was lost to another owner");
        return -EIO;
    }
    ret = thinvm_follow_finish(st, errp);
    if (ret < 0) {
        return ret;
    }
    ret = prepare_epoch(st, epoch, errp);
    if (ret == 0) {
        ret = journal_epoch(st, epoch, errp);
    }
    if (ret == 0) {
        qatomic_set(&st->mode, THINVM_STORE_WRITING);
        ret = settle_inheritance(st, errp);
    }
    if (ret < 0) {
        /* The state may have an epoch that the device has not: build it
           anew */
        st->stale = true;
        qatomic_set(&st->mode, THINVM_STORE_READING);
        return ret;
    }
    trace_thinvm_begin_writing(st, epoch, st->journal.flushed_sequence);
    return 0;
}

static int coroutine_fn end_writing(ThinvmStore *st, bool flush_data,
                                    bool checkpoint, Error **errp)
{
    int ret;

    if (qatomic_read(&st->mode) == THINVM_STORE_READING) {
        return 0;
    }
    ret = thinvm_store_commit(st, THINVM_COMMIT_DURABLE, !flush_data);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not commit to the image");
        return ret;
    }
    if (checkpoint) {
        ret = thinvm_store_checkpoint(st);
        if (ret < 0) {
            error_setg_errno(errp, -ret, "Could not write a checkpoint");
            return ret;
        }
    } else if (qatomic_read(&st->interrupted)) {
        /* A drain comes before a release, so this is what it did not wait for;
           if it fails, memory is stale */
        thinvm_store_checkpoint(st);
    }
    thinvm_store_reclaim(st, st->discard);
    /* A checkpoint that failed earlier and is not repeated: memory then holds
       a base that the device lacks */
    st->stale = st->frozen != NULL;
    st->head_block_valid = false;
    qatomic_set(&st->mode, THINVM_STORE_READING);
    thinvm_state_lock(st->state);
    thinvm_space_stop_reserving(st->state);
    thinvm_state_unlock(st->state);
    return 0;
}

int coroutine_fn thinvm_store_end_writing(ThinvmStore *st, bool checkpoint,
                                          Error **errp)
{
    return end_writing(st, true, checkpoint, errp);
}

int coroutine_fn thinvm_store_hand_over(ThinvmStore *st, Error **errp)
{
    return end_writing(st, false, false, errp);
}

void thinvm_store_poison(ThinvmStore *st)
{
    qatomic_set(&st->poisoned, true);
}

bool thinvm_store_writable(ThinvmStore *st)
{
    return thinvm_store_may_write(st) == 0;
}

int thinvm_store_may_write(ThinvmStore *st)
{
    if (qatomic_read(&st->poisoned)) {
        return -EIO;
    }
    return qatomic_read(&st->mode) == THINVM_STORE_WRITING ? 0 : -EROFS;
}

ThinvmState *thinvm_store_state(ThinvmStore *st)
{
    /* What is behind it was complete before; readers depend on the pointer */
    return qatomic_read__nocheck(&st->state);
}

void thinvm_store_stats(ThinvmStore *st, ThinvmStoreStats *stats)
{
    ThinvmJournal *j = &st->journal;

    QEMU_LOCK_GUARD(&st->lock);
    *stats = (ThinvmStoreStats) {
        .commits = st->nb_commits,
        .records = qatomic_read(&st->nb_records),
        .operations = qatomic_read(&st->nb_operations),
        .checkpoints = qatomic_read(&st->nb_checkpoints),
        .metadata_bytes_read = qatomic_read(&st->bytes_read),
        .metadata_bytes_written = qatomic_read(&st->bytes_written),
        .journal_used = MIN(j->head - j->tail, j->size),
        .longest_commit_ns = st->longest_commit_ns,
        .pending_operations = qatomic_read(&j->pending_operations),
        .catch_ups = qatomic_read(&st->nb_catch_ups),
        .followed_records = qatomic_read(&st->nb_followed),
        .fresh_starts = qatomic_read(&st->nb_fresh_starts),
        .adopted_pages = qatomic_read(&st->nb_adopted),
    };
}

void thinvm_store_set_kick(ThinvmStore *st, void (*kick)(void *opaque),
                           void *opaque)
{
    st->kick = kick;
    st->kick_opaque = opaque;
}

void thinvm_store_kick(ThinvmStore *st)
{
    if (st->kick) {
        st->kick(st->kick_opaque);
    }
}

/* ------------------------------------------------------------------ */
/* Look-up                                                             */

/*
 * A page that proves damaged may just be gone: freed and reused since we were
 * told to read it.  So ask again a few times, in a follower from a fresh
 * start; if the answer stays the same it is damage.  To a follower a page that
 * cannot be read may be gone as well: with the end of the device, which the
 * owner has cut off.
 */
static bool coroutine_fn may_retry(ThinvmStore *st, ThinvmState *s, int ret,
                                   unsigned *attempts)
{
    bool owner = thinvm_store_may_write(st) == 0;

    if ((ret != -EBADMSG && (owner || ret == -EINVAL)) ||
        (*attempts)++ >= THINVM_PAGE_ATTEMPTS) {
        return false;
    }
    return owner || thinvm_follow_restart(st, s);
}

static int coroutine_fn lookup_general(ThinvmStore *st, int tree,
                                       const ThinvmPointer *root,
                                       uint64_t guest, uint64_t count,
                                       bool for_write, ThinvmMapping *mapping)
{
    ThinvmState *s = thinvm_store_state(st);
    unsigned attempts = 0;
    ThinvmNeeds needs;
    int ret;

    thinvm_needs_init(&needs);
    for (;;) {
        ret = thinvm_state_lookup(s, tree, root, guest, count, for_write,
                                  mapping, &needs);
        if (ret == -EAGAIN) {
            Error *local_err = NULL;

            ret = thinvm_store_read_wanted(st, s, &needs, &local_err);
            if (ret == 0) {
                continue;
            }
            trace_thinvm_lookup_failed(st, guest, ret,
                                       error_get_pretty(local_err));
            error_free(local_err);
        }
        if (ret < 0 && may_retry(st, s, ret, &attempts)) {
            thinvm_state_lock(s);
            thinvm_needs_destroy(s, &needs);
            thinvm_state_unlock(s);
            thinvm_needs_init(&needs);
            s = thinvm_store_state(st);
            continue;
        }
        break;
    }
    if (needs.nb_pinned || needs.max_want) {
        thinvm_state_lock(s);
        thinvm_needs_destroy(s, &needs);
        thinvm_state_unlock(s);
    }
    return ret;
}

int coroutine_fn thinvm_store_lookup(ThinvmStore *st, int tree,
                                     const ThinvmPointer *root,
                                     uint64_t guest, uint64_t count,
                                     bool for_write, ThinvmMapping *mapping)
{
    if (likely(!root && !thinvm_state_lookup_cached(thinvm_store_state(st),
                                                    tree, guest, count,
                                                    for_write, mapping))) {
        return 0;
    }
    return lookup_general(st, tree, root, guest, count, for_write, mapping);
}

/* ------------------------------------------------------------------ */
/* Create                                                              */

bool thinvm_create_params_check(const ThinvmCreateParams *p, Error **errp)
{
    uint64_t max;

    if (p->cluster_size < (1ULL << THINVM_MIN_CLUSTER_BITS) ||
        p->cluster_size > (1ULL << THINVM_MAX_CLUSTER_BITS) ||
        !is_power_of_2(p->cluster_size)) {
        error_setg(errp, "cluster_size %" PRIu64 " is not possible: it must "
                   "be a power of two from %d KiB to %d KiB", p->cluster_size,
                   1 << (THINVM_MIN_CLUSTER_BITS - 10),
                   1 << (THINVM_MAX_CLUSTER_BITS - 10));
        return false;
    }
    if (p->journal_size < THINVM_MIN_JOURNAL_SIZE ||
        p->journal_size > THINVM_MAX_JOURNAL_SIZE ||
        p->journal_size % THINVM_PAGE_SIZE) {
        error_setg(errp, "journal_size %" PRIu64 " is not possible: it must "
                   "be a multiple of 4 KiB from 1 MiB to 1 GiB",
                   p->journal_size);
        return false;
    }
    max = MIN(THINVM_MAX_VIRTUAL_SIZE,
              THINVM_MAX_GUEST_CLUSTERS * p->cluster_size);
    if (p->virtual_size > max) {
        error_setg(errp, "Size %" PRIu64 " is too large: with cluster_size %"
                   PRIu64 " a disk may have up to %" PRIu64 " bytes",
                   p->virtual_size, p->cluster_size, max);
        return false;
    }
    if (p->virtual_size % THINVM_SECTOR_SIZE) {
        error_setg(errp, "Size %" PRIu64 " is not a multiple of 512 bytes",
                   p->virtual_size);
        return false;
    }
    return true;
}

/* Erase whatever would let somebody believe in a former image */
int coroutine_fn thinvm_store_erase(ThinvmDevice *dev, Error **errp)
{
    const uint64_t claims = THINVM_NB_CLAIMS * THINVM_PAGE_SIZE;
    const struct {
        uint64_t offset, size;
    } area[] = {
        { THINVM_SUPERBLOCK0_OFFSET, THINVM_PAGE_SIZE },
        { THINVM_SUPERBLOCK1_OFFSET, THINVM_PAGE_SIZE },
        { THINVM_CLAIM_OFFSET, claims },
        { THINVM_HEARTBEAT_OFFSET, claims },
    };
    g_autofree uint8_t *zeroes = g_malloc0(claims);
    int ret = 0;

    for (int i = 0; i < ARRAY_SIZE(area) && ret == 0; i++) {
        ret = dev->co_pwrite(dev, area[i].offset, area[i].size, zeroes);
    }
    if (ret == 0) {
        ret = dev->co_flush(dev);
    }
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not erase the header");
    }
    return ret;
}

int coroutine_fn thinvm_store_set_template(ThinvmStore *st,
                                           const ThinvmTemplateId *id)
{
    int ret;

    thinvm_state_lock(st->state);
    thinvm_state_set_template(st->state, id);
    thinvm_state_unlock(st->state);
    ret = thinvm_store_checkpoint_anew(st);
    return ret < 0 ? ret : thinvm_store_checkpoint_anew(st);
}

/* Fill sb->device_clusters; enlarge the device if that is too little */
static int coroutine_fn make_device(ThinvmDevice *dev, ThinvmSuperblock *sb,
                                    Error **errp)
{
    int64_t length = dev->co_length(dev);
    uint64_t needed = thinvm_state_minimum_device(sb);
    int ret;

    if (length >= 0 && length < needed) {
        ret = dev->co_grow(dev, needed);
        if (ret < 0) {
            error_setg_errno(errp, -ret, "The device has %" PRId64 " bytes, "
                             "an image with these options needs at least %"
                             PRIu64, length, needed);
            return ret;
        }
        length = dev->co_length(dev);
    }
    if (length < 0) {
        error_setg_errno(errp, -length, "Could not get the device's length");
        return length;
    }
    sb->device_clusters = MIN(length >> sb->cluster_bits, THINVM_MAX_CLUSTERS);
    return 0;
}

/* Nothing of the state is on the device: no journal is needed for this */
static int coroutine_fn set_first_backing(ThinvmStore *st,
                                          const ThinvmBacking *backing,
                                          Error **errp)
{
    ThinvmBacking copy = *backing;
    ThinvmOp op = { .type = THINVM_OP_SET_BACKING, .backing = &copy };
    ThinvmNeeds needs;
    int ret;

    thinvm_needs_init(&needs);
    thinvm_state_lock(st->state);
    ret = thinvm_state_prepare(st->state, &op, false, &needs, errp);
    if (ret == 0) {
        thinvm_state_apply(st->state, &op);
    }
    thinvm_needs_destroy(st->state, &needs);
    thinvm_state_unlock(st->state);
    assert(ret != -EAGAIN);     /* all pages of a new state are in memory */
    return ret;
}

int coroutine_fn thinvm_store_create(ThinvmDevice *dev,
                                     const ThinvmCreateParams *params,
                                     Error **errp)
{
    ThinvmSuperblock sb = {
        .version_major = THINVM_VERSION_MAJOR,
        .version_minor = THINVM_VERSION_MINOR,
        .cluster_bits = ctz64(params->cluster_size),
        .journal_offset = THINVM_JOURNAL_OFFSET,
        .journal_size = params->journal_size,
        .virtual_size = params->virtual_size,
        .incompatible = params->template.length ? THINVM_INCOMPATIBLE_TEMPLATE
                                                : 0,
        .template = params->template,
    };
    ThinvmStore *st;
    int ret;

    if (!thinvm_create_params_check(params, errp)) {
        return -EINVAL;
    }
    qemu_uuid_generate(&sb.uuid);
    ret = make_device(dev, &sb, errp);
    if (ret < 0) {
        return ret;
    }
    ret = thinvm_store_erase(dev, errp);
    if (ret < 0) {
        return ret;
    }
    st = store_new(dev, THINVM_MIN_CACHE);
    st->uuid = sb.uuid;
    st->cluster_bits = sb.cluster_bits;
    st->bases.newest_slot = 1;          /* so that the first goes to 0 */
    thinvm_journal_init(st, &sb);
    st->journal.next_sequence = 1;
    st->state = thinvm_state_new_empty(&sb, st->cache_size, errp);
    if (!st->state) {
        thinvm_journal_destroy(st);
        store_destroy(st);
        return -EINVAL;
    }
    if (params->backing.name[0]) {
        ret = set_first_backing(st, &params->backing, errp);
    }
    if (ret == 0) {
        ret = thinvm_checkpoint_first(st);
        if (ret < 0) {
            error_setg_errno(errp, -ret, "Could not write the new image");
        }
    }
    thinvm_store_free(st);
    return ret;
}
