/*
 * thinvm durability layer: operations
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Everything that an operation has to wait for before it may be applied:
 * pages, room in the ring, room for dirty pages, metadata space.  An attempt
 * (attempt()) either succeeds, fails for good, or names the obstacle that is
 * in its way (find_obstacle(), name_obstacle()); that is overcome
 * (overcome()), and there is another attempt.
 *
 * An operation is applied and put into the pending record under the same hold
 * of the state lock, so that the journal has the order of the applies.  All
 * that can fail comes before.  Hence: what is applied is never rolled back,
 * and whatever could not be journalled later stays in memory until it can
 * (journal.c).
 *
 * Keeps invariants 4 and 7 of the design, section 4.
 */
#include "qemu/osdep.h"
#include "qemu/lockable.h"
#include "qapi/error.h"
#include "store-int.h"

/* Does the operation put more into use?  Refused while commits fail */
static bool op_allocates(const ThinvmOp *op)
{
    return op->type == THINVM_OP_MAP || op->type == THINVM_OP_MAP_RUN ||
           op->type == THINVM_OP_META_EXTEND || op->type == THINVM_OP_GROW ||
           op->type == THINVM_OP_RELOCATE ||
           op->type == THINVM_OP_SNAPSHOT_CREATE;
}

/* What an operation waits for before it takes the lock */
static int coroutine_fn make_way(ThinvmStore *st, const ThinvmOp *op,
                                 Error **errp)
{
    bool failing;
    int ret;

    WITH_QEMU_LOCK_GUARD(&st->lock) {
        failing = st->journal.error != 0;
    }
    if ((failing && op_allocates(op)) || thinvm_journal_is_behind(st)) {
        /* Perhaps the device works again */
        ret = thinvm_store_commit(st, THINVM_COMMIT_RECORD, true);
        if (ret < 0) {
            error_setg_errno(errp, -ret, "Could not write to the journal");
            return ret;
        }
    }
    thinvm_checkpoint_pace(st, op->type == THINVM_OP_SNAPSHOT_DELETE_STEP ?
                               2 : 3);
    return 0;
}

/* An operation on its way */
typedef struct Execution {
    ThinvmStore *st;
    ThinvmState *s;
    ThinvmOp *op;
    const ThinvmDataSum *sum;   /* of its data, or NULL */
    bool unmap, internal;       /* see thinvm_store_execute_internal() */
    bool extended;              /* no (more) extension ahead of need */
    bool kick;                  /* the worker, when the lock is released */
    bool hides;                 /* takes a snapshot out of the lists */
    bool hidden;                /* it was out of them, durably */
    uint64_t remaining;         /* of an unmap: clusters that are asked for */
    unsigned rereads, extensions, releases;     /* tried so far */
    ThinvmNeeds needs;
} Execution;

/* What is in its way */
typedef enum Obstacle {
    OBSTACLE_NONE,
    OBSTACLE_FULL,              /* ring or dirty pages: needs a checkpoint */
    OBSTACLE_METADATA,          /* an extension is due, and cannot wait */
    OBSTACLE_PAGES,             /* pages are not in memory */
    OBSTACLE_NO_METADATA,       /* and no place for a page is left */
    OBSTACLE_HELD,              /* only two bases hold the place it needs */
    OBSTACLE_LISTED,            /* a power cut might list the snapshot again */
} Obstacle;

/* Before anything is tried.  State lock held */
static Obstacle find_obstacle(Execution *x)
{
    ThinvmStore *st = x->st;
    ThinvmInfoState info;
    bool urgent;

    if (x->internal) {
        return OBSTACLE_NONE;
    }
    if (thinvm_state_dirty_reaches(x->s, 4) ||
        !thinvm_journal_has_room(st, x->op)) {
        return OBSTACLE_FULL;
    }
    if (x->extended || !thinvm_space_metadata_wanted(x->s, &urgent)) {
        return OBSTACLE_NONE;
    }
    thinvm_state_info(x->s, &info);
    if (info.free_clusters > qatomic_read(&st->extend_free) ||
        info.device_clusters != qatomic_read(&st->extend_device)) {
        x->extended = true;
        if (urgent || !st->kick) {
            return OBSTACLE_METADATA;
        }
        x->kick = thinvm_store_extend_later(st);
    }
    return OBSTACLE_NONE;
}

/*
 * Deleting a snapshot begins with a step that hides it; the next ones give up
 * its clusters, which may make them the disk's own, to be overwritten in
 * place.  So the first must be durable before the second: else a power cut
 * could list the snapshot again, with what was overwritten.  Several may be on
 * their way at a time, and the same one by two that delete it; so what counts
 * is what the record says now, and any hiding that is not durable is waited
 * for.  State lock held
 */
static Obstacle look_at_deletion(Execution *x)
{
    ThinvmStore *st = x->st;
    ThinvmSnapshot snap;
    int ret = thinvm_snapshot_read(x->s, x->op->guest, &snap, &x->needs, NULL);

    if (ret == -EAGAIN) {
        return OBSTACLE_PAGES;
    }
    x->hides = ret == 0 && !(snap.flags & THINVM_SNAPSHOT_HIDDEN);
    if (ret < 0 || x->hides || x->hidden) {
        return OBSTACLE_NONE;   /* an error: prepare has the words for it */
    }
    QEMU_LOCK_GUARD(&st->lock);
    return st->hidden_sequence > st->journal.flushed_sequence ?
           OBSTACLE_LISTED : OBSTACLE_NONE;
}

/*
 * Why an attempt has failed, or (@reading) to read what it lacked, if that
 * can be helped.  All bounds on trying again are here.
 */
static Obstacle name_obstacle(Execution *x, int ret, bool reading)
{
    if (ret == -EAGAIN ||
        (ret == -EBADMSG && reading && x->rereads++ < THINVM_PAGE_ATTEMPTS)) {
        return OBSTACLE_PAGES;
    }
    if (ret == -ENOSPC && !x->internal) {
        if (x->extensions++ < THINVM_METADATA_STEPS) {
            return OBSTACLE_NO_METADATA;
        }
        /* It has its page by promise, but two bases hold what it copies */
        if (x->op->type == THINVM_OP_VALIDATE &&
            x->releases++ < THINVM_NB_BASES) {
            return OBSTACLE_HELD;
        }
    }
    return OBSTACLE_NONE;
}

/* State lock held.  -EALREADY: nothing (more) to do */
static int try_execute(Execution *x, uint64_t *ticket, Error **errp)
{
    ThinvmStore *st = x->st;
    ThinvmState *s = x->s;
    ThinvmOp *op = x->op;
    bool nothing = false, summed;
    int ret = 0;

    if (x->unmap) {
        op->count = x->remaining;
        ret = thinvm_state_unmap_step(s, op->tree, op->guest, op->source,
                                      &op->count, &nothing, &x->needs);
        if (ret == 0 && nothing) {
            ret = -EALREADY;
        }
    }
    if (ret == 0) {
        ret = thinvm_snapshot_choose_slot(s, op, &x->needs);
    }
    if (ret == 0) {
        ret = thinvm_state_prepare(s, op, false, &x->needs, errp);
    }
    if (ret == 0) {
        /* At most: the record that gathers now, or the one after it */
        thinvm_state_set_applying(s, st->journal.next_sequence + 1);
        /*
         * Both before anybody can find the data: look-ups take no lock.  Who
         * finds a part valid may write there and flush at once; if nothing
         * were pending then, he would be told that all is safe, and with the
         * record that makes the part valid a power cut would take his data.
         */
        summed = x->sum && thinvm_sums_hold(st, x->sum);
        thinvm_journal_add(st, op, summed);
        thinvm_state_apply(s, op);
        if (x->hides) {
            st->hidden_sequence = thinvm_journal_ticket(st);
        }
        if (op->type == THINVM_OP_INVALIDATE) {
            thinvm_requests_invalidated(st);
        }
        thinvm_quarantine_add(st, s, thinvm_journal_ticket(st));
    }
    if ((ret == 0 || ret == -EALREADY) && ticket) {
        *ticket = thinvm_journal_ticket(st);
    }
    return ret;
}

/* One attempt; *obstacle: what has to be overcome before the next one */
static int coroutine_fn attempt(Execution *x, Obstacle *obstacle,
                                uint64_t *ticket, Error **errp)
{
    int ret = x->internal ? 0 : make_way(x->st, x->op, errp);

    *obstacle = OBSTACLE_NONE;
    if (ret < 0) {
        return ret;
    }
    thinvm_state_lock(x->s);
    ret = x->internal ? 0 : thinvm_store_may_write(x->st);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "The image is not open for writing");
    } else {
        *obstacle = find_obstacle(x);
        if (*obstacle == OBSTACLE_NONE &&
            x->op->type == THINVM_OP_SNAPSHOT_DELETE_STEP) {
            *obstacle = look_at_deletion(x);
        }
        if (*obstacle == OBSTACLE_NONE) {
            ret = try_execute(x, ticket, errp);
            *obstacle = ret < 0 ? name_obstacle(x, ret, false) : OBSTACLE_NONE;
        }
    }
    thinvm_state_unlock(x->s);
    if (x->kick) {
        x->kick = false;
        thinvm_store_kick(x->st);
    }
    return ret;
}

static void forget_needs(Execution *x)
{
    if (x->needs.nb_pinned || x->needs.max_want) {
        thinvm_state_lock(x->s);
        thinvm_needs_destroy(x->s, &x->needs);
        thinvm_state_unlock(x->s);
    }
}

/*
 * A page that proves damaged may just be gone: freed and reused since we were
 * told to read it.  Then the next attempt asks for another one.
 */
static int coroutine_fn read_pages(Execution *x, Error **errp)
{
    Error *local_err = NULL;
    int ret = thinvm_store_read_wanted(x->st, x->s, &x->needs, &local_err);

    if (ret < 0 && name_obstacle(x, ret, true) == OBSTACLE_PAGES) {
        error_free(local_err);
        forget_needs(x);
        return 0;
    }
    error_propagate(errp, local_err);
    return ret;
}

/* 0: try again */
static int coroutine_fn overcome(Execution *x, Obstacle obstacle, Error **errp)
{
    int ret;

    switch (obstacle) {
    case OBSTACLE_FULL:
        ret = thinvm_store_checkpoint(x->st);
        if (ret < 0) {
            error_setg_errno(errp, -ret, "Could not write a checkpoint");
        }
        return ret;
    case OBSTACLE_METADATA:
        thinvm_store_extend_metadata(x->st);
        return 0;
    case OBSTACLE_PAGES:
        return read_pages(x, errp);
    case OBSTACLE_NO_METADATA:
        /* 0: perhaps somebody else has done it just now */
        if (thinvm_store_extend_metadata(x->st) < 0) {
            x->extensions = THINVM_METADATA_STEPS;
        }
        return 0;
    case OBSTACLE_HELD:
        return thinvm_store_checkpoint(x->st) < 0 ? -ENOSPC : 0;
    case OBSTACLE_LISTED:
        ret = thinvm_store_commit(x->st, THINVM_COMMIT_DURABLE, true);
        if (ret < 0) {
            error_setg_errno(errp, -ret, "Could not write to the journal");
        }
        x->hidden = ret == 0;
        return ret;
    default:
        g_assert_not_reached();
    }
}

/* -EALREADY, without @errp: there was nothing to do */
static int coroutine_fn execute(ThinvmStore *st, ThinvmOp *op,
                                const ThinvmDataSum *sum, bool unmap,
                                bool internal, uint64_t *ticket, Error **errp)
{
    Execution x = {
        .st = st,
        .s = thinvm_store_state(st),
        .op = op,
        .sum = sum,
        .unmap = unmap,
        .internal = internal,
        .remaining = op->count,
    };
    Error *err = NULL;
    Obstacle obstacle;
    int ret;

    do {
        error_free(err);
        err = NULL;
        ret = attempt(&x, &obstacle, ticket, &err);
        if (obstacle != OBSTACLE_NONE) {
            error_free(err);
            err = NULL;
            ret = overcome(&x, obstacle, &err);
        }
    } while (ret == 0 && obstacle != OBSTACLE_NONE);

    forget_needs(&x);
    if (ret == -EALREADY) {
        error_free(err);
        return ret;
    }
    if (ret < 0 && !err) {
        error_setg_errno(&err, -ret, "Could not change the image's metadata");
    }
    error_propagate(errp, err);
    return ret;
}

int coroutine_fn thinvm_store_execute_internal(ThinvmStore *st, ThinvmOp *op,
                                               bool unmap, bool internal,
                                               uint64_t *ticket, Error **errp)
{
    int ret = execute(st, op, NULL, unmap, internal, ticket, errp);

    return ret == -EALREADY ? 0 : ret;
}

/* Takes no lock: the worker looks again */
static void kick_if_due(ThinvmStore *st)
{
    ThinvmJournal *j = &st->journal;

    if (qatomic_read(&j->pending_length) >= j->record_limit / 2 ||
        thinvm_quarantine_is_full(st) ||
        (thinvm_store_may_write(st) == 0 &&
         (thinvm_state_dirty_reaches(thinvm_store_state(st), 2) ||
          qatomic_read(&j->lately_used) >= j->size / 2))) {
        thinvm_store_kick(st);
    }
}

int coroutine_fn thinvm_store_execute(ThinvmStore *st, const ThinvmOp *op,
                                      uint64_t *ticket, Error **errp)
{
    return thinvm_store_execute_summed(st, op, NULL, ticket, errp);
}

int coroutine_fn thinvm_store_execute_summed(ThinvmStore *st,
                                             const ThinvmOp *op,
                                             const ThinvmDataSum *sum,
                                             uint64_t *ticket, Error **errp)
{
    ThinvmOp copy = *op;
    int ret = execute(st, &copy, sum, false, false, ticket, errp);

    if (ret < 0 && ret != -EALREADY) {
        return ret;
    }
    kick_if_due(st);
    return 0;
}

int coroutine_fn thinvm_store_execute_telling(ThinvmStore *st,
                                              const ThinvmOp *op, Error **errp)
{
    ThinvmOp copy = *op;
    int ret = execute(st, &copy, NULL, false, false, NULL, errp);

    kick_if_due(st);
    return ret;
}

int coroutine_fn thinvm_store_unmap(ThinvmStore *st, int tree, uint64_t guest,
                                    uint64_t count, ThinvmSource source,
                                    uint64_t *ticket, Error **errp)
{
    ThinvmOp op = {
        .type = THINVM_OP_UNMAP,
        .tree = tree,
        .source = source,
    };
    uint64_t full = THINVM_QUARANTINE_FULL;
    int ret = thinvm_store_may_write(st);

    if (ret < 0) {
        error_setg_errno(errp, -ret, "The image is not open for writing");
        return ret;
    }
    for (; count; guest += op.count, count -= op.count) {
        op.guest = guest;
        op.count = count;
        ret = thinvm_store_execute_internal(st, &op, true, false, ticket,
                                            errp);
        if (ret < 0) {
            return ret;
        }
        assert(op.count > 0 && op.count <= count);
        if (qatomic_read(&st->quarantined_ranges) >= full) {
            /* What a long range frees would else pile up in memory; the
               caller's own request may be what keeps it there */
            thinvm_store_commit(st, THINVM_COMMIT_DURABLE, true);
            thinvm_store_reclaim(st, st->discard);
            full = qatomic_read(&st->quarantined_ranges) +
                   THINVM_QUARANTINE_FULL;
        }
    }
    kick_if_due(st);
    return 0;
}
