/*
 * thinvm driver layer: the mapping-cache modes, the hand-over
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A node is in one of these states; "owner" and "lost" are fields of
 * BDRVThinvmState, the mode is what users see.
 *
 *   reader      not the owner.  The mode is migration if another process may
 *               be writing the image, else the configured one.  What is
 *               cached was true when it was read; where "follow" is set, the
 *               device is asked again before and after each read.
 *   owner/WB    owner, mode writeback.  The cache is the truth; operations
 *               are on the device at most flush_interval later.
 *   owner/WT    owner, mode writethrough.  The cache is the truth; operations
 *               of acknowledged requests are on the device.
 *   lost        was the owner, and somebody else is now (or may be).  Every
 *               change fails.  Only closing the node ends this.  Reads fail too
 *               if what was lost is the end of the device ("cut").
 *
 *   open           --> reader               thinvm_mode_open_reader
 *   reader         --> owner/WB, owner/WT   thinvm_mode_take: opening for
 *                                           writing, activation, the first
 *                                           write in migration mode
 *   owner/WB       <-> owner/WT             thinvm_mode_configure (user),
 *                                           thinvm_mode_set_migrating
 *   owner          --> reader               thinvm_mode_give_up: inactivation,
 *                                           reopening read-only, closing
 *   owner          --> lost                 thinvm_mode_write_failed,
 *                                           thinvm_mode_device_cut
 *   reader         --> lost                 thinvm_mode_activate, where it may
 *                                           not fail
 *
 * Invariants (design section 4):
 *  5. thinvm_co_flush_to_os() and the commits of owner/WT.
 *  6. The store is writable only between thinvm_mode_take() and
 *     thinvm_mode_give_up() or thinvm_mode_lose().
 *  7. After a failed commit the node stays what it was, unless it turns out
 *     that the image was taken away.
 *
 * Locking: mode_lock covers every arrow but the one to "lost", which may come
 * out of any request at any time and therefore is one atomic exchange.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qapi/qapi-events-thinvm.h"
#include "qemu/error-report.h"
#include "handover.h"
#include "trace.h"

bool (*thinvm_activation_must_succeed)(void);
void (*thinvm_activation_failed)(void);
bool (*thinvm_guest_was_sent_away)(void);

/* The mode that an owner works in */
static ThinvmCacheMode thinvm_owner_mode(BDRVThinvmState *s)
{
    if (s->in_migration) {
        return THINVM_CACHE_MODE_WRITETHROUGH;
    }
    return s->options.mode == THINVM_CACHE_MODE_MIGRATION
           ? THINVM_CACHE_MODE_WRITEBACK : s->options.mode;
}

static void thinvm_mode_change(BDRVThinvmState *s, ThinvmCacheMode mode,
                               const char *reason)
{
    ThinvmCacheMode old = qatomic_xchg(&s->mode, mode);

    if (old != mode) {
        trace_thinvm_mode_change(s->bs, ThinvmCacheMode_str(old),
                                 ThinvmCacheMode_str(mode), reason);
        qapi_event_send_thinvm_cache_mode_changed(
            bdrv_get_node_name(s->bs), old, mode, reason);
    }
}

/* Can a node that stops owning, or never did, see what the owner writes? */
static void GRAPH_RDLOCK thinvm_mode_become_follower(BDRVThinvmState *s,
                                                     const char *reason)
{
    qatomic_set(&s->follow, thinvm_device_coherent(s->bs));
    thinvm_mode_change(s, THINVM_CACHE_MODE_MIGRATION, reason);
}

/* ------------------------------------------------------------------ */
/* reader -> owner                                                     */

void thinvm_mode_free_retired(BDRVThinvmState *s)
{
    g_slist_free_full(g_steal_pointer(&s->retired),
                      (GDestroyNotify)thinvm_store_free);
}

static void thinvm_replace_store(BDRVThinvmState *s, ThinvmStore *st)
{
    ThinvmStore *old = qatomic_xchg(&s->store, st);

    thinvm_store_set_discard(st, s->bs->open_flags & BDRV_O_UNMAP);
    thinvm_store_set_kick(st, thinvm_worker_kick, s);
    if (old && old != st) {
        s->retired = g_slist_prepend(s->retired, old);
    }
}

static uint64_t thinvm_bytes_read(ThinvmStore *st)
{
    ThinvmStoreStats stats;

    thinvm_store_stats(st, &stats);
    return stats.metadata_bytes_read;
}

static void thinvm_store_info(ThinvmStore *st, ThinvmInfoState *info)
{
    /* Joining keeps the state alive if a catch-up replaces it meanwhile */
    unsigned token = thinvm_store_request_begin(st);
    ThinvmState *state = thinvm_store_state(st);

    thinvm_state_lock(state);
    thinvm_state_info(state, info);
    thinvm_state_unlock(state);
    thinvm_store_request_end(st, token);
}

/*
 * A store that shows what is on the device now.  Nobody else changes it any
 * more: our claim is durable.
 */
static ThinvmStore *coroutine_fn GRAPH_RDLOCK
thinvm_take_store(BDRVThinvmState *s, bool unchanged, bool fresh,
                  const ThinvmRelease *end, ThinvmInfoState *info,
                  Error **errp)
{
    ThinvmStore *st = s->store;
    bool changed;

    if (st && unchanged) {
        trace_thinvm_take_store(s->bs, "kept");
    } else if (st && !fresh) {
        trace_thinvm_take_store(s->bs, "caught up");
        if (end) {
            thinvm_store_expect_end(st, end->sequence, end->record_crc);
        }
        if (!thinvm_store_at_end(st) &&
            thinvm_store_catch_up(st, &changed, errp) < 0) {
            return NULL;
        }
    } else {
        trace_thinvm_take_store(s->bs, "opened");
        st = thinvm_store_open(&s->device, s->options.cache_size, errp);
        if (!st) {
            return NULL;
        }
    }
    thinvm_store_info(st, info);
    if (!qemu_uuid_is_equal(&info->uuid, &s->uuid)) {
        error_setg(errp, "The image on the device was replaced by another");
        if (st != s->store) {
            thinvm_store_free(st);
        }
        return NULL;
    }
    return st;
}

/* What was read and written since this began counts as one look */
static int coroutine_fn GRAPH_RDLOCK
thinvm_take_claim(BDRVThinvmState *s, uint64_t epoch,
                  const ThinvmClaim *newest, Error **errp)
{
    int64_t begun = thinvm_boot_ms();
    int ret;

    qatomic_set(&s->claim_seen_ms, 0);
    ret = thinvm_owner_claim(s, epoch, newest, errp);
    if (ret >= 0) {
        qatomic_set(&s->claim_seen_ms, begun);
    }
    return ret;
}

/*
 * Epochs in claims and in the journal rise together; only if claims were
 * wiped can the journal be ahead.  Then claim once more, above it.
 */
static int coroutine_fn GRAPH_RDLOCK
thinvm_take_claimed(BDRVThinvmState *s, bool unchanged, bool fresh,
                    const ThinvmRelease *end, Error **errp)
{
    ERRP_GUARD();
    ThinvmInfoState info;
    ThinvmStore *st;
    int ret = 0;

    st = thinvm_take_store(s, unchanged, fresh, end, &info, errp);
    if (!st) {
        thinvm_store_expect_any_end(s->store);
        return -EIO;
    }
    if (info.epoch >= s->claim.epoch) {
        if (info.epoch >= THINVM_COUNTER_MAX / 2) {
            error_setg(errp, "The journal's epoch of ownership cannot be "
                       "raised any more");
            ret = -EOVERFLOW;
        } else {
            ret = thinvm_take_claim(s, info.epoch + 1, &s->claim, errp);
        }
    }
    if (ret >= 0) {
        if (end) {
            thinvm_store_expect_end(st, end->sequence, end->record_crc);
        }
        ret = thinvm_store_begin_writing(st, s->claim.epoch, errp);
        if (ret == -EBADMSG && end) {
            error_append_hint(errp, "Is there a cache in between that the "
                              "other host does not write to?  With "
                              "force-takeover=on the image is taken as it "
                              "is.\n");
        }
    }
    if (ret < 0) {
        thinvm_store_expect_any_end(st);
        if (st != s->store) {
            thinvm_store_free(st);
        }
        return ret;
    }
    thinvm_replace_store(s, st);
    return 0;
}

/*
 * The guest of this process was sent to another one, and somebody has owned
 * the image since who may have run it: our guest's memory is older than the
 * disk.  However that owner ended, this guest must not go on.
 */
static bool thinvm_guest_is_stale(BDRVThinvmState *s,
                                  const ThinvmOwnerView *view, Error **errp)
{
    ERRP_GUARD();

    if (!s->claim.epoch || !view->used_since || !thinvm_guest_was_sent_away ||
        !thinvm_guest_was_sent_away()) {
        return false;
    }
    error_setg(errp, "The guest was migrated, and process %" PRIu32 " has "
               "owned the image since (epoch %" PRIu64 "): the guest's memory "
               "here is older than its disk",
               view->newest.process, view->newest_epoch);
    error_append_hint(errp, "Start the guest anew, from its disk.\n");
    return true;
}

/*
 * Whose is the image?  Watching an owner takes seconds, in which it may have
 * given the image up and another have taken it: then all begins anew.
 */
static int coroutine_fn GRAPH_RDLOCK
thinvm_take_look(BDRVThinvmState *s, ThinvmOwnerView *view, Error **errp)
{
    ThinvmOwnerView now;
    int ret;

    do {
        ret = thinvm_owner_look(&s->device, &s->uuid, s, view, errp);
        if (ret < 0) {
            return ret;
        }
        thinvm_owner_watch(&s->device, &s->uuid, view,
                           s->options.force_takeover);
        if (!view->watched) {
            return 0;
        }
        ret = thinvm_owner_look(&s->device, &s->uuid, s, &now, errp);
        if (ret < 0) {
            return ret;
        }
    } while (now.kind != view->kind ||
             !qemu_uuid_is_equal(&now.newest.nonce, &view->newest.nonce));
    return 0;
}

static int coroutine_fn GRAPH_RDLOCK
thinvm_take_locked(BDRVThinvmState *s, bool fresh, Error **errp)
{
    const ThinvmRelease *end;
    ThinvmOwnerView view;
    int ret;

    if (s->lost) {
        error_setg(errp, "Ownership of the image was lost; close it and open "
                   "it again");
        return -EIO;
    }
    ret = thinvm_take_look(s, &view, errp);
    if (ret < 0) {
        return ret;
    }
    if (!thinvm_owner_may_take(&view, s->options.force_takeover, errp)) {
        return -EBUSY;
    }
    if (thinvm_guest_is_stale(s, &view, errp)) {
        return -ESTALE;
    }
    ret = thinvm_take_claim(s, view.newest_epoch + 1, &view.newest, errp);
    if (ret < 0) {
        return ret;
    }
    end = view.has_end && !s->options.force_takeover ? &view.end : NULL;
    ret = thinvm_take_claimed(s, view.unchanged, fresh, end, errp);
    if (ret < 0) {
        /*
         * No guest has run here, so the one that was sent away may go on.
         * What the owner before has told of the journal's end is handed on
         * where that was not found; otherwise we may have written ourselves.
         * Best effort: if it fails, others will find the process gone.
         */
        thinvm_owner_release(s, THINVM_CLAIM_RETURNED,
                             ret == -EBADMSG ? end : NULL, NULL);
        qatomic_set(&s->claim_seen_ms, 0);
        thinvm_owner_drop(s);
        return ret;
    }
    qatomic_set(&s->follow, false);
    qatomic_set(&s->owner, true);
    return 0;
}

int coroutine_fn thinvm_mode_may_take(BlockDriverState *bs, bool force,
                                      Error **errp)
{
    BDRVThinvmState *s = bs->opaque;
    ThinvmOwnerView view;
    int ret = thinvm_owner_look(&s->device, &s->uuid, s, &view, errp);

    if (ret < 0) {
        return ret;
    }
    thinvm_owner_watch(&s->device, &s->uuid, &view, force);
    return thinvm_owner_may_take(&view, force, errp) ? 0 : -EBUSY;
}

int coroutine_fn thinvm_mode_take(BlockDriverState *bs, bool fresh,
                                  Error **errp)
{
    BDRVThinvmState *s = bs->opaque;
    int ret = 0;

    qemu_co_mutex_lock(&s->mode_lock);
    if (!s->owner) {
        int64_t start = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
        ThinvmStore *before = s->store;
        uint64_t read = thinvm_bytes_read(before);

        ret = thinvm_take_locked(s, fresh, errp);
        if (ret >= 0) {
            s->take_failed = false;
            s->put_down = false;
            thinvm_pulse_took(s, s->store == before, start,
                              thinvm_bytes_read(s->store) -
                              (s->store == before ? read : 0));
            thinvm_mode_change(s, thinvm_owner_mode(s), "image taken over");
            thinvm_worker_owner_changed(s);
            thinvm_worker_arm(s);       /* the record of our epoch */
            thinvm_pulse_kick(s);
        }
    }
    qemu_co_mutex_unlock(&s->mode_lock);
    return ret;
}

/* ------------------------------------------------------------------ */
/* owner -> reader, lost                                               */

/*
 * A checkpoint saves the next opener the replay.  One who wrote nothing but
 * the record of his epoch leaves the image as it was.
 */
static bool thinvm_close_wants_checkpoint(ThinvmStore *st)
{
    ThinvmStoreStats stats;

    thinvm_store_stats(st, &stats);
    return stats.operations + stats.pending_operations > 1 ||
           stats.journal_used > 64 * KiB;
}

int coroutine_fn thinvm_mode_give_up(BlockDriverState *bs,
                                     ThinvmClaimState state,
                                     const char *reason, Error **errp)
{
    BDRVThinvmState *s = bs->opaque;
    ThinvmRelease end = {};
    bool checkpoint;
    int ret = 0;

    qemu_co_mutex_lock(&s->mode_lock);
    if (s->lost) {
        error_setg(errp, "Ownership of the image was lost");
        ret = -EIO;
        goto out;
    }
    if (!s->owner) {
        goto out;
    }
    checkpoint = state == THINVM_CLAIM_CLOSED &&
                 thinvm_close_wants_checkpoint(s->store);
    ret = state == THINVM_CLAIM_RELEASED && thinvm_fence_orders(s)
          ? thinvm_store_hand_over(s->store, errp)
          : thinvm_store_end_writing(s->store, checkpoint, errp);
    if (ret < 0) {
        goto out;
    }
    /*
     * From here on a write must claim the image anew, also if the release
     * fails: the block on the device may say either.
     */
    qatomic_set(&s->owner, false);
    /* Who opens an image that was closed knows nothing of it before */
    thinvm_store_journal_end(s->store, &end.sequence, &end.record_crc);
    ret = thinvm_owner_release(s, state,
                               state != THINVM_CLAIM_CLOSED ? &end : NULL,
                               errp);
    qatomic_set(&s->claim_seen_ms, 0);
    if (ret < 0) {
        thinvm_owner_drop(s);
        goto out;
    }
    thinvm_mode_free_retired(s);
    if (state != THINVM_CLAIM_CLOSED) {
        thinvm_mode_become_follower(s, reason);
        thinvm_pulse_released(s);
    }
out:
    qemu_co_mutex_unlock(&s->mode_lock);
    return ret;
}

void thinvm_mode_lose(BDRVThinvmState *s, const char *reason)
{
    if (qatomic_xchg(&s->lost, true)) {
        return;
    }
    qatomic_set(&s->lost_reason, g_strdup(reason));
    qatomic_set(&s->owner, false);
    qatomic_set(&s->fence.held, false);
    thinvm_store_poison(s->store);
    thinvm_owner_drop(s);
    trace_thinvm_mode_lose(s->bs, reason);
    error_report("thinvm node '%s': ownership lost: %s",
                 bdrv_get_node_name(s->bs), reason);
    qapi_event_send_thinvm_ownership_lost(bdrv_get_node_name(s->bs), reason);
}

void thinvm_mode_device_cut(BDRVThinvmState *s, int64_t length,
                            uint64_t needed)
{
    g_autofree char *reason = g_strdup_printf(
        "the device was truncated to %" PRId64 " bytes, but the image on it "
        "uses up to %" PRIu64, length, needed);

    qatomic_set(&s->cut, true);
    qatomic_set(&s->follow, true);      /* so that reads come by here */
    thinvm_mode_lose(s, reason);
}

/*
 * Where the claim cannot be read, nothing is taken anew, and the write fails;
 * the next one, or the next heartbeat, may find the device well again.
 */
bool coroutine_fn thinvm_mode_write_failed(BlockDriverState *bs)
{
    BDRVThinvmState *s = bs->opaque;
    g_autoptr(Error) local_err = NULL;
    int ret;

    if (!qatomic_read(&s->owner)) {
        return false;
    }
    ret = thinvm_owner_verify(s, &local_err);
    if (ret == -EPERM) {
        thinvm_mode_lose(s, error_get_pretty(local_err));
    }
    if (ret < 0) {
        return false;
    }
    ret = thinvm_fence_check(s);
    if (ret == -EPERM) {
        thinvm_mode_lose(s, "another has reserved the device");
    }
    /* Another request may have found out meanwhile */
    return ret > 0 && qatomic_read(&s->owner);
}

/* ------------------------------------------------------------------ */
/* Opening and activation                                              */

int coroutine_fn thinvm_mode_open_reader(BlockDriverState *bs, Error **errp)
{
    ERRP_GUARD();
    BDRVThinvmState *s = bs->opaque;
    bool active = !(bs->open_flags & BDRV_O_INACTIVE);
    bool wished = s->options.mode == THINVM_CACHE_MODE_MIGRATION;
    bool coherent = thinvm_device_coherent(bs), follows;
    ThinvmOwnerView view;
    int ret;

    /* Whoever reads meanwhile goes on following, if he did */
    s->mode = s->options.mode;
    if (!active) {
        s->mode = THINVM_CACHE_MODE_MIGRATION;
        qatomic_set(&s->follow, coherent);
        return 0;
    }
    ret = thinvm_owner_look(&s->device, &s->uuid, s, &view, errp);
    if (ret < 0) {
        return ret;
    }
    follows = coherent || bs->force_share || (bs->open_flags & BDRV_O_NO_IO);
    if (!follows) {
        thinvm_owner_settle(&s->device, &s->uuid, &view);
    }
    if (!wished && !s->view && view.kind != THINVM_OWNER_OTHER &&
        view.kind != THINVM_OWNER_REBOOTED && view.kind != THINVM_OWNER_NODE) {
        qatomic_set(&s->follow, false);
        return 0;
    }
    s->mode = THINVM_CACHE_MODE_MIGRATION;
    if (follows) {
        qatomic_set(&s->follow, coherent);
        return 0;
    }
    if (s->view && !wished && view.kind != THINVM_OWNER_OTHER) {
        /* This host's page cache is no obstacle: nobody else writes */
        qatomic_set(&s->follow, true);
        return 0;
    }
    qatomic_set(&s->follow, false);
    if (wished) {
        error_setg(errp, "Option '%s' is 'migration', which needs reads past "
                   "the host's page cache", THINVM_OPT_MODE);
    } else {
        thinvm_owner_may_take(&view, false, errp);
        error_prepend(errp, "Reading while another may write needs reads "
                      "past the host's page cache: ");
    }
    error_append_hint(errp, "Open the file or device with "
                      "cache.direct=on.\n");
    return -EBUSY;
}

/*
 * A node that never writes just reads the image again.  One that shows a
 * snapshot does so too: others may have deleted it meanwhile.
 */
static int coroutine_fn GRAPH_RDLOCK
thinvm_reader_refresh(BlockDriverState *bs, Error **errp)
{
    BDRVThinvmState *s = bs->opaque;
    ThinvmStore *st;
    int ret;

    st = thinvm_store_open(&s->device, s->options.cache_size, errp);
    if (!st) {
        return -EIO;
    }
    qemu_co_mutex_lock(&s->mode_lock);
    thinvm_replace_store(s, st);
    ret = thinvm_mode_open_reader(bs, errp);
    qemu_co_mutex_unlock(&s->mode_lock);
    return ret;
}

int coroutine_fn thinvm_mode_activate(BlockDriverState *bs, Error **errp)
{
    BDRVThinvmState *s = bs->opaque;
    Error *local_err = NULL;
    int ret;

    if (s->view || bdrv_is_read_only(bs)) {
        return thinvm_reader_refresh(bs, errp);
    }
    /*
     * A follower has all in memory, and goes on with it.  Where the page cache
     * of this host was in between, the block layer has just dropped that, and
     * only what is read from now on is true.
     */
    ret = thinvm_mode_take(bs, !qatomic_read(&s->follow), &local_err);
    if (ret < 0 && thinvm_activation_must_succeed &&
        thinvm_activation_must_succeed()) {
        thinvm_mode_lose(s, error_get_pretty(local_err));
        error_free(local_err);
        return 0;
    }
    s->activated = ret >= 0;
    if (ret < 0 && thinvm_activation_failed) {
        thinvm_activation_failed();
    }
    error_propagate(errp, local_err);
    return ret;
}

/* ------------------------------------------------------------------ */
/* What requests call                                                  */

/* How often something has changed where the node's data are */
static uint64_t thinvm_changes_seen(BDRVThinvmState *s, ThinvmStore *st)
{
    return s->view ? thinvm_store_moves(st) : thinvm_store_changes(st);
}

int coroutine_fn thinvm_mode_begin_read(BlockDriverState *bs, ThinvmStore *st,
                                        ThinvmLook *look)
{
    BDRVThinvmState *s = bs->opaque;
    int ret;

    look->store = st;
    look->followed = qatomic_read(&s->follow);
    if (likely(!look->followed)) {
        return 0;
    }
    if (qatomic_read(&s->cut)) {
        return -EIO;
    }
    ret = thinvm_store_catch_up(st, NULL, NULL);
    look->changes = thinvm_changes_seen(s, st);
    return ret;
}

/*
 * What was looked up may be somebody else's by now if any catch-up since, our
 * own or another reader's, has changed anything; and if we have become the
 * owner, or the store was replaced, meanwhile, since nobody has compared then.
 */
int coroutine_fn thinvm_mode_end_read(BlockDriverState *bs,
                                      const ThinvmLook *look, bool *repeat)
{
    BDRVThinvmState *s = bs->opaque;
    int ret;

    *repeat = qatomic_read(&s->store) != look->store ||
              (look->followed && !qatomic_read(&s->follow));
    if (*repeat || likely(!look->followed)) {
        return 0;
    }
    ret = thinvm_store_catch_up(look->store, NULL, NULL);
    if (s->view && ret == 0) {
        ret = thinvm_snapshot_still_there(bs, look->store);
    }
    *repeat = thinvm_changes_seen(s, look->store) != look->changes;
    return ret;
}

/*
 * In write-through mode an overwrite waits for the mapping that it found,
 * whoever's that is.  (One that found nothing waits for its own record only.)
 * What was written while ownership went is not to be acknowledged: the place
 * may be the new owner's.
 */
int coroutine_fn thinvm_mode_commit_found(BlockDriverState *bs,
                                          uint64_t ticket, bool found)
{
    BDRVThinvmState *s = bs->opaque;

    if (found && qatomic_read(&s->mode) == THINVM_CACHE_MODE_WRITETHROUGH) {
        ticket = thinvm_store_ticket(s->store);
    }
    if (ticket) {
        int ret = thinvm_mode_commit(bs, ticket);

        if (ret < 0) {
            return ret;
        }
    }
    return likely(qatomic_read(&s->owner)) ? 0 : -EIO;
}

/* What the node is that no owner can be, or NULL */
static const char *thinvm_must_not_write(BlockDriverState *bs)
{
    BDRVThinvmState *s = bs->opaque;

    if (s->view) {
        return "shows a snapshot";
    }
    if (bdrv_is_read_only(bs)) {
        return "is read-only";
    }
    return bs->open_flags & BDRV_O_INACTIVE ? "is inactive" : NULL;
}

static int coroutine_fn GRAPH_RDLOCK
thinvm_first_write(BlockDriverState *bs)
{
    BDRVThinvmState *s = bs->opaque;
    Error *local_err = NULL;
    int ret;

    if (qatomic_read(&s->lost)) {
        return -EIO;
    }
    if (thinvm_must_not_write(bs)) {
        return -EACCES;         /* nor has bs->file the permission */
    }
    ret = thinvm_mode_take(bs, false, &local_err);
    if (ret < 0) {
        if (!qatomic_xchg(&s->take_failed, true)) {
            error_reportf_err(local_err, "thinvm node '%s' cannot write: ",
                              bdrv_get_node_name(bs));
        } else {
            error_free(local_err);
        }
    }
    return ret;
}

int coroutine_fn thinvm_mode_begin_write(BlockDriverState *bs)
{
    BDRVThinvmState *s = bs->opaque;

    if (likely(qatomic_read(&s->owner))) {
        return 0;
    }
    return thinvm_first_write(bs);
}

int coroutine_fn thinvm_mode_begin_change(BlockDriverState *bs, Error **errp)
{
    const char *why = thinvm_must_not_write(bs);
    int ret;

    if (why) {
        error_setg(errp, "Node '%s' %s; only a node that writes the image can "
                   "change it", bdrv_get_device_or_node_name(bs), why);
        return -EACCES;
    }
    ret = thinvm_mode_begin_write(bs);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Node '%s' cannot change its image",
                         bdrv_get_device_or_node_name(bs));
    }
    return ret;
}

int coroutine_fn thinvm_mode_commit(BlockDriverState *bs, uint64_t ticket)
{
    BDRVThinvmState *s = bs->opaque;
    int ret;

    if (qatomic_read(&s->mode) == THINVM_CACHE_MODE_WRITEBACK) {
        thinvm_worker_arm(s);
        return 0;
    }
    ret = thinvm_store_commit_ticket(qatomic_read(&s->store), ticket);
    /* What stays to be confirmed durable, or repeated after an error */
    thinvm_worker_arm(s);
    return ret;
}

/*
 * The block layer flushes bs->file after this.  If there was something to
 * commit, that flush is spared: nothing has been written since ours.
 */
int coroutine_fn thinvm_co_flush_to_os(BlockDriverState *bs)
{
    BDRVThinvmState *s = bs->opaque;

    if (!qatomic_read(&s->owner)) {
        return qatomic_read(&s->lost) ? -EIO : 0;
    }
    return thinvm_store_commit(s->store, THINVM_COMMIT_FLUSHED, true);
}

/* ------------------------------------------------------------------ */
/* owner/WB <-> owner/WT, and by the user's order into migration mode  */

/* With mode_lock held */
static int coroutine_fn GRAPH_RDLOCK
thinvm_owner_change_mode(BDRVThinvmState *s, const char *reason, Error **errp)
{
    int ret;

    if (!s->owner) {
        return 0;               /* takes effect with ownership */
    }
    thinvm_mode_change(s, thinvm_owner_mode(s), reason);
    /* The mode first: what is written from now on keeps the promise itself */
    ret = thinvm_store_commit(s->store, THINVM_COMMIT_RECORD, true);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Cannot commit the mapping of node '%s'",
                         bdrv_get_node_name(s->bs));
    }
    return ret;
}

int coroutine_fn thinvm_mode_configure(BlockDriverState *bs,
                                       ThinvmCacheMode mode,
                                       const char *reason, Error **errp)
{
    BDRVThinvmState *s = bs->opaque;
    ThinvmCacheMode old = s->options.mode;
    int ret;

    if (mode == THINVM_CACHE_MODE_MIGRATION) {
        if (s->in_migration) {
            error_setg(errp, "Node '%s' is part of an outgoing migration",
                       bdrv_get_node_name(bs));
            return -EBUSY;
        }
        if (!thinvm_device_coherent(bs)) {
            error_setg(errp, "Node '%s' reads through the host's page cache; "
                       "migration mode needs cache.direct=on",
                       bdrv_get_node_name(bs));
            return -EINVAL;
        }
        ret = thinvm_mode_give_up(bs, THINVM_CLAIM_RELEASED, reason, errp);
        if (ret >= 0) {
            WITH_QEMU_LOCK_GUARD(&s->mode_lock) {
                s->put_down = !s->owner;
            }
        }
        return ret;
    }
    qemu_co_mutex_lock(&s->mode_lock);
    s->options.mode = mode;
    s->put_down = false;
    ret = thinvm_owner_change_mode(s, reason, errp);
    if (ret < 0) {
        s->options.mode = old;
        thinvm_mode_change(s, thinvm_owner_mode(s), "commit failed");
    }
    qemu_co_mutex_unlock(&s->mode_lock);
    return ret;
}

/*
 * Given up for a hand-over that then did not come about, while the node stayed
 * active: its first write would claim the image, but that may be long to come.
 * What the user told it to give up waits for that write.
 */
static bool thinvm_has_let_go(BDRVThinvmState *s)
{
    return !qatomic_read(&s->owner) && !qatomic_read(&s->lost) &&
           s->claim.epoch && !(s->bs->open_flags & BDRV_O_INACTIVE) &&
           !bdrv_is_read_only(s->bs) && !s->put_down &&
           s->options.mode != THINVM_CACHE_MODE_MIGRATION;
}

int coroutine_fn thinvm_mode_set_migrating(BlockDriverState *bs,
                                           bool migrating,
                                           const char *reason, Error **errp)
{
    BDRVThinvmState *s = bs->opaque;
    int ret;

    qemu_co_mutex_lock(&s->mode_lock);
    s->in_migration = migrating;
    ret = thinvm_owner_change_mode(s, reason, errp);
    if (ret < 0 && migrating) {
        s->in_migration = false;
        thinvm_mode_change(s, thinvm_owner_mode(s), "commit failed");
    }
    qemu_co_mutex_unlock(&s->mode_lock);
    if (!migrating && thinvm_has_let_go(s)) {
        return thinvm_mode_take(bs, false, errp);
    }
    return ret;
}

uint64_t thinvm_virtual_size(BDRVThinvmState *s)
{
    ThinvmInfoState info;

    if (s->view) {
        return s->view->virtual_size;
    }
    thinvm_store_info(qatomic_read(&s->store), &info);
    return info.virtual_size;
}

uint64_t thinvm_device_end(BDRVThinvmState *s)
{
    ThinvmInfoState info;

    thinvm_store_info(qatomic_read(&s->store), &info);
    return info.device_clusters << s->cluster_bits;
}
