/*
 * thinvm check: repair
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Durability layer.  The trees are what counts: recorded numbers are set to
 * what the walk of all trees has counted.  What cannot be read or is out of
 * bounds stays as it is; there is nothing to make it right from.
 *
 * A count that is too high is lowered only after a walk that has seen all:
 * below a page that could not be read there may be users that nobody counted.
 * All corrections become durable at once, with the superblock of a checkpoint
 * (invariant 4 of the design, section 4).
 */
#include "qemu/osdep.h"
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

int coroutine_fn thinvm_check_repair(ThinvmCheck *c, int fix, Error **errp)
{
    bool distrust = false, changed = false;
    int ret;

    for (unsigned i = 0; i < c->fixes->len; i++) {
        const ThinvmCheckFix *f = &g_array_index(c->fixes, ThinvmCheckFix, i);

        if (!(fix & (f->leak ? THINVM_FIX_LEAKS : THINVM_FIX_ERRORS)) ||
            (f->leak && c->incomplete)) {
            continue;
        }
        if (apply_fix(c, f) < 0) {
            c->result->check_errors++;
            continue;
        }
        changed = true;
        if (f->leak) {
            c->result->leaks_fixed++;
        } else {
            c->result->corruptions_fixed++;
            distrust = true;
        }
    }
    if (!changed) {
        return 0;
    }
    if (distrust) {
        thinvm_state_lock(c->s);
        thinvm_repair_distrust(c->s);
        thinvm_state_unlock(c->s);
    }
    /* The second one is for the older base, which may be what is left */
    ret = thinvm_store_checkpoint(c->st);
    if (ret == 0) {
        ret = thinvm_store_checkpoint(c->st);
    }
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not write the repaired counts");
    }
    return ret;
}
