/*
 * thinvm check: repair
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Durability layer.  The trees are what counts: recorded numbers are set to
 * what the walk of all trees has counted.  Trees that cannot be read as a whole
 * are rebuilt before that (check-rewrite.c), and walked again.
 *
 * A count that is too high is lowered only after a walk that has seen all:
 * below a page that could not be read there may be users that nobody counted.
 * All corrections become durable at once, with the superblock of a checkpoint
 * (invariant 4 of the design, section 4); a power cut before it leaves the
 * image as it was.
 *
 * They are in no record, so the older base must not become a way back to what
 * was repaired: the journal from there lacks one sequence number, which the
 * repair takes for itself (part_ways()).  Whoever starts from there finds an
 * end before the newest base, in any version of this program; and who follows
 * in memory cannot go on either, and starts afresh.  A second checkpoint then
 * gives the image an older base that is good.
 */
#include "qemu/osdep.h"
#include "qemu/lockable.h"
#include "qapi/error.h"
#include "check.h"

static int coroutine_fn set_cluster_count(ThinvmCheck *c, uint64_t cluster,
                                          uint16_t count)
{
    ThinvmNeeds needs;
    int ret;

    thinvm_needs_init(&needs);
    do {
        thinvm_state_lock(c->s);
        ret = thinvm_repair_cluster_count(c->s, cluster, count, &needs);
        thinvm_state_unlock(c->s);
        if (ret != -EAGAIN) {
            break;
        }
        ret = thinvm_store_read_wanted(c->st, c->s, &needs, NULL);
    } while (ret == 0);

    thinvm_state_lock(c->s);
    thinvm_needs_destroy(c->s, &needs);
    thinvm_state_unlock(c->s);
    return ret;
}

static int coroutine_fn apply_fix(ThinvmCheck *c, const ThinvmCheckFix *fix)
{
    uint16_t count = fix->count;
    int ret = 0;

    if (fix->page) {
        thinvm_state_lock(c->s);
        ret = thinvm_repair_page_count(c->s, fix->number, count);
        thinvm_state_unlock(c->s);
        return ret;
    }
    if (fix->own) {
        ret = thinvm_check_recorded(c, fix->number, &count);
    }
    return ret < 0 ? ret : set_cluster_count(c, fix->number, count);
}

/* A number that is too low is a corruption, one that is too high a leak */
static void fix_promises(ThinvmCheck *c, int fix, bool *changed)
{
    bool leak = c->info.promised_pages > c->unwritten_runs;

    if (c->incomplete || (c->info.promises_exact && !c->promises_wrong) ||
        !(fix & (leak ? THINVM_FIX_LEAKS : THINVM_FIX_ERRORS))) {
        return;
    }
    thinvm_state_lock(c->s);
    c->promises_short = !thinvm_repair_promises(c->s, c->unwritten_runs);
    thinvm_state_unlock(c->s);
    c->result->leaks_fixed += c->promises_wrong && leak;
    c->result->corruptions_fixed += c->promises_wrong && !leak;
    *changed = true;
}

/* Correct what the last walk has found.  @all: nothing may be left out */
static int coroutine_fn apply_fixes(ThinvmCheck *c, int fix, bool all,
                                    bool *changed)
{
    bool distrust = c->nb_unflagged || g_hash_table_size(c->duplicates);

    for (unsigned i = 0; i < c->fixes->len; i++) {
        const ThinvmCheckFix *f = &g_array_index(c->fixes, ThinvmCheckFix, i);
        int ret;

        if (!(fix & (f->leak ? THINVM_FIX_LEAKS : THINVM_FIX_ERRORS)) ||
            (f->leak && c->incomplete)) {
            continue;
        }
        ret = apply_fix(c, f);
        if (ret < 0) {
            c->result->check_errors++;
            if (all) {
                return ret;
            }
            continue;
        }
        *changed = true;
        if (f->leak) {
            c->result->leaks_fixed++;
        } else {
            c->result->corruptions_fixed++;
            distrust = true;
        }
    }
    fix_promises(c, fix, changed);
    if (distrust && (fix & THINVM_FIX_ERRORS)) {
        thinvm_state_lock(c->s);
        thinvm_repair_distrust(c->s);
        thinvm_state_unlock(c->s);
        c->result->corruptions_fixed += c->nb_unflagged;
        *changed = true;
    }
    return 0;
}

/*
 * Pages of the newest base are damaged; perhaps those of the older one are
 * not, which with the journal says the same.  True: so it is, and that is
 * what the store has in memory now.
 */
static bool coroutine_fn fall_back(ThinvmCheck *c)
{
    g_autofree char *message = NULL;
    ThinvmJournal *j = &c->st->journal;
    Error *why = NULL;
    uint64_t flushed;
    bool whole;

    if (!c->st->bases.has_older) {
        return false;
    }
    WITH_QEMU_LOCK_GUARD(&c->st->lock) {
        flushed = j->flushed_sequence;
    }
    error_setg(&why, "pages of the newest base are damaged");
    whole = thinvm_replay_fall_back(c->st, why, NULL) == 0;
    error_free(why);
    if (!whole) {
        return false;
    }
    c->quiet = true;
    thinvm_check_all(c);
    if (c->damaged) {
        whole = false;
        /* If that fails what is in memory has to do: the older one */
        if (thinvm_replay_open(c->st, NULL) == 0) {
            thinvm_check_all(c);
        }
    }
    thinvm_state_lock(c->s);
    thinvm_state_set_applying(c->s, UINT64_MAX);
    thinvm_state_unlock(c->s);
    WITH_QEMU_LOCK_GUARD(&c->st->lock) {
        /* Reading them again does not take that from them */
        j->flushed_sequence = MAX(j->flushed_sequence, flushed);
    }
    if (whole) {
        message = g_strdup_printf("the older base, of generation %" PRIu64
                                  ", is whole: with the journal since then "
                                  "nothing is lost",
                                  c->st->bases.newest.generation);
        c->report(c->opaque, message);
        c->result->corruptions_fixed++;
    }
    return whole;
}

/* No operation runs meanwhile, so hardly anything waits to be written */
static int coroutine_fn part_ways(ThinvmStore *st)
{
    bool skipped;
    int ret;

    do {
        ret = thinvm_journal_commit(st, THINVM_COMMIT_DURABLE, true);
        if (ret < 0) {
            return ret;
        }
        thinvm_state_lock(st->state);
        skipped = thinvm_journal_skip(st);
        thinvm_state_unlock(st->state);
    } while (!skipped);
    st->nb_repair_checkpoints = 2;
    return 0;
}

/*
 * Both checkpoints, and before them one that has failed earlier and waits.
 * After a failure nothing may be journalled that builds on what only memory
 * has.
 */
static int coroutine_fn write_repair(ThinvmStore *st, Error **errp)
{
    int ret;

    do {
        ret = thinvm_store_checkpoint(st);
    } while (ret == 0 && st->nb_repair_checkpoints);
    if (ret < 0) {
        thinvm_store_poison(st);
        error_setg_errno(errp, -ret, "Could not write what was repaired");
    }
    return ret;
}

/*
 * After a walk, with the checkpoint mutex held, which is released.  If a tree
 * was rebuilt all of its counts must become right, or nothing durable.
 */
static int coroutine_fn repair_round(ThinvmCheck *c, int fix, GArray *spare,
                                     Error **errp)
{
    ERRP_GUARD();
    bool rebuild = (fix & THINVM_FIX_ERRORS) && (c->damaged || spare);
    bool changed = rebuild;
    int ret = 0;

    if (rebuild && !spare && fall_back(c)) {
        rebuild = false;
    }
    if (rebuild) {
        uint64_t nb_unflagged = c->nb_unflagged;

        ret = thinvm_check_rewrite(c, spare, errp);
        if (ret == 0) {
            c->quiet = true;
            thinvm_check_all(c);
            c->nb_unflagged = MAX(c->nb_unflagged, nb_unflagged);
        }
        if (ret == 0 && c->incomplete && c->counts_lost) {
            /* What nobody counted would be given away */
            ret = -EIO;
            error_setg(errp, "Metadata that could be read before cannot be "
                       "read now, so clusters cannot be counted");
        }
    }
    if (ret == 0) {
        ret = apply_fixes(c, fix, rebuild, &changed);
        if (ret < 0) {
            error_setg_errno(errp, -ret, "Could not correct all reference "
                             "counts");
        }
    }
    if (ret == 0 && changed) {
        ret = part_ways(c->st);
        if (ret < 0) {
            error_setg_errno(errp, -ret, "Could not write to the journal");
        }
    }
    if (ret < 0) {
        error_append_hint(errp, "Nothing was changed.\n");
        thinvm_store_poison(c->st);
    }
    qemu_co_mutex_unlock(&c->st->checkpoint_lock);
    return ret < 0 || !changed ? ret : write_repair(c->st, errp);
}

/* Free clusters, for those that share one with another place of the disk */
static GArray *coroutine_fn reserve_spare(ThinvmCheck *c)
{
    GArray *spare = g_array_new(false, false, sizeof(uint64_t));
    uint64_t wanted = g_hash_table_size(c->duplicates);

    while (spare->len < wanted) {
        uint64_t first, nb;

        if (thinvm_store_reserve(c->st, 0, wanted - spare->len, &first,
                                 &nb) < 0) {
            g_autofree char *message = g_strdup_printf("%" PRIu64 " clusters "
                "with two users cannot be copied: no space is left; they stay "
                "shared", wanted - spare->len);

            c->report(c->opaque, message);
            break;
        }
        for (uint64_t n = first; n < first + nb; n++) {
            g_array_append_val(spare, n);
        }
    }
    return spare;
}

/*
 * Only now that the counts are right: the device may have to grow, and free
 * clusters must be free.
 */
static int coroutine_fn separate(ThinvmCheck *c, int fix, Error **errp)
{
    GArray *spare = reserve_spare(c);
    int ret = 0;

    if (c->more_duplicates) {
        g_autofree char *message = g_strdup_printf("more than %u clusters "
            "have two users: repair once more to separate the rest",
            THINVM_CHECK_MAX_DUPLICATES);

        c->report(c->opaque, message);
    }
    if (spare->len) {
        qemu_co_mutex_lock(&c->st->checkpoint_lock);
        c->quiet = true;
        thinvm_check_all(c);
        ret = repair_round(c, fix, spare, errp);
    }
    for (unsigned i = 0; i < spare->len; i++) {
        thinvm_store_unreserve(c->st, g_array_index(spare, uint64_t, i), 1);
    }
    g_array_unref(spare);
    return ret;
}

/*
 * There were not enough places for all unwritten runs.  Now that the counts
 * are right more may be taken; if there still are not, the base goes on saying
 * that nothing is promised.
 */
static int coroutine_fn give_promises(ThinvmCheck *c, Error **errp)
{
    bool kept;
    int ret = 0;

    for (int i = 0; i < THINVM_METADATA_STEPS &&
                    thinvm_store_extend_metadata(c->st) > 0; i++) {
    }
    qemu_co_mutex_lock(&c->st->checkpoint_lock);
    thinvm_state_lock(c->s);
    kept = thinvm_repair_promise(c->s);
    thinvm_state_unlock(c->s);
    if (kept) {
        ret = part_ways(c->st);
    }
    qemu_co_mutex_unlock(&c->st->checkpoint_lock);
    if (ret < 0) {
        thinvm_store_poison(c->st);
        error_setg_errno(errp, -ret, "Could not write to the journal");
        return ret;
    }
    return kept ? write_repair(c->st, errp) : 0;
}

int coroutine_fn thinvm_check_repair(ThinvmCheck *c, int fix, Error **errp)
{
    int ret = repair_round(c, fix, NULL, errp);

    if (ret == 0 && (fix & THINVM_FIX_ERRORS) &&
        g_hash_table_size(c->duplicates)) {
        ret = separate(c, fix, errp);
    }
    if (ret == 0 && c->promises_short) {
        ret = give_promises(c, errp);
    }
    return ret;
}
