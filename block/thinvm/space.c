/*
 * thinvm metadata engine: which clusters may be handed out
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Engine layer.  A cluster may be handed out when its count is 0 and it is
 * not busy.  Busy are: clusters reserved for a write whose data is on its way,
 * and clusters that an operation freed and that somebody may still read or
 * write, or whose freeing is not durable yet (invariant 2).  Being busy is a
 * matter of this process alone: after a crash nobody is left who could touch
 * them, and what was not durable has not happened.
 *
 * Policy: low places first, in windows of contiguous clusters, so that a
 * volume which grows on demand stays small; a caller that continues a
 * sequence names the place where it would like to go on.  It goes on there
 * unless so much is free below that the volume would grow without need.
 */
#include "qemu/osdep.h"
#include "state-int.h"

/*
 * Busy clusters are kept as intervals that neither touch nor overlap, so that
 * a mapped TiB that was discarded is one of them, not 16 million bits.
 */
void thinvm_space_init(ThinvmState *s)
{
    s->freed = g_array_new(false, false, sizeof(ThinvmFreedRange));
}

void thinvm_space_destroy(ThinvmState *s)
{
    thinvm_space_clear_busy(s, 0, UINT64_MAX);
    g_array_unref(s->freed);
}

bool thinvm_space_is_busy(ThinvmState *s, uint64_t cluster)
{
    return interval_tree_iter_first(&s->busy, cluster, cluster);
}

uint64_t thinvm_space_next_idle(ThinvmState *s, uint64_t from, uint64_t end)
{
    IntervalTreeNode *node = interval_tree_iter_first(&s->busy, from, from);

    return MIN(node ? node->last + 1 : from, end);
}

uint64_t thinvm_space_next_busy(ThinvmState *s, uint64_t from, uint64_t end)
{
    IntervalTreeNode *node = from < end ?
        interval_tree_iter_first(&s->busy, from, end - 1) : NULL;

    return node ? MAX(node->start, from) : end;
}

static void busy_insert(ThinvmState *s, uint64_t first, uint64_t last)
{
    IntervalTreeNode *node = g_new0(IntervalTreeNode, 1);

    node->start = first;
    node->last = last;
    interval_tree_insert(node, &s->busy);
}

static void busy_remove(ThinvmState *s, IntervalTreeNode *node)
{
    interval_tree_remove(node, &s->busy);
    g_free(node);
}

/* None of them may be busy */
void thinvm_space_set_busy(ThinvmState *s, uint64_t first, uint64_t nb)
{
    uint64_t last = first + nb - 1;
    IntervalTreeNode *node;

    thinvm_space_clear_busy(s, first, nb);  /* an image that lies */
    s->nb_busy += nb;
    node = first ? interval_tree_iter_first(&s->busy, first - 1, first - 1)
                 : NULL;
    if (node) {
        first = node->start;
        busy_remove(s, node);
    }
    node = interval_tree_iter_first(&s->busy, last + 1, last + 1);
    if (node) {
        last = node->last;
        busy_remove(s, node);
    }
    busy_insert(s, first, last);
}

/* Some of them need not be busy */
void thinvm_space_clear_busy(ThinvmState *s, uint64_t first, uint64_t nb)
{
    uint64_t last = first + nb - 1;
    IntervalTreeNode *node;

    if (!nb) {
        return;
    }
    while ((node = interval_tree_iter_first(&s->busy, first, last))) {
        uint64_t node_first = node->start, node_last = node->last;

        s->nb_busy -= MIN(node_last, last) - MAX(node_first, first) + 1;
        if (node_first >= first && node_last > last) {
            /* The most frequent case; the node stays where it is */
            node->start = last + 1;
            return;
        }
        busy_remove(s, node);
        if (node_first < first) {
            busy_insert(s, node_first, first - 1);
        }
        if (node_last > last) {
            busy_insert(s, last + 1, node_last);
        }
    }
}

void thinvm_space_unbusy(ThinvmState *s, uint64_t first, uint64_t nb_clusters)
{
    thinvm_space_clear_busy(s, first, nb_clusters);
    s->search_hint = MIN(s->search_hint, first);
}

void thinvm_space_freed(ThinvmState *s, uint64_t first, uint64_t nb)
{
    ThinvmFreedRange range = { first, nb };

    thinvm_space_set_busy(s, first, nb);
    if (s->freed->len) {
        ThinvmFreedRange *last = &g_array_index(s->freed, ThinvmFreedRange,
                                                s->freed->len - 1);

        if (last->first + last->nb_clusters == first) {
            last->nb_clusters += nb;
            return;
        }
    }
    g_array_append_val(s->freed, range);
}

GArray *thinvm_space_take_freed(ThinvmState *s)
{
    GArray *freed = s->freed;

    if (!freed->len) {
        return NULL;
    }
    s->freed = g_array_new(false, false, sizeof(ThinvmFreedRange));
    return freed;
}

/* ------------------------------------------------------------------ */
/* Reserving                                                           */

static void window_drop(ThinvmState *s)
{
    if (s->window_nb) {
        thinvm_space_unbusy(s, s->window_first, s->window_nb);
        s->window_nb = 0;
    }
}

void thinvm_space_stop_reserving(ThinvmState *s)
{
    window_drop(s);
}

/* Take [first, first + nb) out of the window; what lies behind is let go */
static void window_take(ThinvmState *s, uint64_t first, uint64_t nb)
{
    uint64_t end = s->window_first + s->window_nb;

    if (first == s->window_first) {
        s->window_first += nb;
        s->window_nb -= nb;
        return;
    }
    s->window_nb = first - s->window_first;
    if (first + nb < end) {
        thinvm_space_unbusy(s, first + nb, end - first - nb);
    }
}

/*
 * Is there more room below @goal than a 32nd of what is in use?  All that is
 * not free may lie there, so this is what is free there at least.
 */
static bool is_too_high(ThinvmState *s, uint64_t goal)
{
    uint64_t used = s->device_clusters - s->nb_count_free + s->nb_busy;

    return goal > used + used / 32;
}

static int reserve_goal(ThinvmState *s, uint64_t goal, uint64_t max,
                        uint64_t *first, uint64_t *nb, ThinvmNeeds *needs)
{
    int ret;

    if (goal >= s->window_first && goal < s->window_first + s->window_nb) {
        *first = goal;
        *nb = MIN(max, s->window_first + s->window_nb - goal);
        window_take(s, *first, *nb);
        return 0;
    }
    if (goal >= s->device_clusters || is_too_high(s, goal) ||
        thinvm_space_is_busy(s, goal)) {
        return -ENOENT;
    }
    ret = thinvm_count_find_free(s, goal, max, first, nb, needs);
    if (ret < 0) {
        return ret == -ENOSPC ? -ENOENT : ret;
    }
    if (*first != goal) {
        return -ENOENT;
    }
    thinvm_space_set_busy(s, *first, *nb);
    return 0;
}

static int window_fill(ThinvmState *s, uint64_t max, ThinvmNeeds *needs)
{
    uint64_t first, nb;
    int ret;

    if (s->nb_count_free <= s->nb_busy) {
        return -ENOSPC;
    }
    ret = thinvm_count_find_free(s, s->search_hint, MAX(max, THINVM_WINDOW),
                                 &first, &nb, needs);
    if (ret == -ENOSPC) {
        /* There are some: the tree lies.  To grow the device would not help,
           and be repeated without end */
        s->damaged = true;
        ret = -EBADMSG;
    }
    if (ret < 0) {
        return ret;
    }
    thinvm_space_set_busy(s, first, nb);
    s->search_hint = first + nb;
    s->window_first = first;
    s->window_nb = nb;
    return 0;
}

int thinvm_space_reserve(ThinvmState *s, uint64_t goal, uint64_t max,
                         uint64_t *first, uint64_t *nb_clusters,
                         ThinvmNeeds *needs)
{
    int ret;

    assert(max > 0);
    needs->nb_want = 0;
    if (goal) {
        ret = reserve_goal(s, goal, max, first, nb_clusters, needs);
        if (ret != -ENOENT) {
            return ret;
        }
    }
    if (s->window_nb < max && max > 1) {
        /* A longer piece may lie elsewhere; small rests are used later */
        window_drop(s);
    }
    if (!s->window_nb) {
        ret = window_fill(s, max, needs);
        if (ret < 0) {
            return ret;
        }
    }
    *first = s->window_first;
    *nb_clusters = MIN(max, s->window_nb);
    window_take(s, *first, *nb_clusters);
    return 0;
}

int thinvm_space_take(ThinvmState *s, uint64_t first, uint64_t nb_clusters,
                      ThinvmNeeds *needs)
{
    int ret = thinvm_count_all_free(s, first, nb_clusters, needs);

    if (ret == 0) {
        thinvm_space_set_busy(s, first, nb_clusters);
    }
    return ret;
}

/* ------------------------------------------------------------------ */
/* Metadata space                                                      */

/*
 * What a disk can have dirty at all are its leaves, about a quarter as many
 * count pages, and what lies above them; the same again while a checkpoint is
 * written.  A checkpoint begins at half of the bound, and writers are slowed
 * at three quarters.  If all of a small disk's pages came to that, one
 * checkpoint would follow the other while a guest writes.
 */
uint32_t thinvm_space_dirty_bound(uint64_t virtual_clusters)
{
    uint64_t leaves = virtual_clusters / THINVM_ENTRIES_PER_LEAF;

    return MIN(MAX(6 * leaves, THINVM_MIN_DIRTY_BOUND),
               THINVM_MAX_DIRTY_BOUND);
}

/*
 * The bound on dirty pages follows what the image can need and what its device
 * can spare: a page for each MiB, with which the reserve takes little more
 * than a hundredth of it.  And a quarter of the cache: dirty pages cannot
 * leave it.
 */
static uint32_t dirty_bound(ThinvmState *s, uint64_t device_clusters)
{
    uint64_t spare = (device_clusters << s->cluster_bits) / MiB;
    uint64_t bound = thinvm_space_dirty_bound(s->virtual_size >>
                                              s->cluster_bits);

    return MAX(MIN(MIN(bound, spare), s->cache_limit / 4),
               THINVM_MIN_DIRTY_BOUND);
}

void thinvm_space_update_bounds(ThinvmState *s)
{
    qatomic_set(&s->dirty_bound, dirty_bound(s, s->device_clusters));
}

/*
 * In an image of version 1.0 there may be unwritten runs that nothing was
 * promised to, so there may be more of them that go than have come.
 */
void thinvm_space_promise(ThinvmState *s, int64_t change)
{
    if (change < 0 && s->promised_pages < -change) {
        s->promised_pages = 0;
        s->promises_exact = false;
    } else {
        s->promised_pages += change;
    }
}

/* Places that the two newest bases hold come back with two checkpoints */
static uint64_t free_soon(ThinvmState *s)
{
    return s->nb_meta_free + s->held_new->len + s->held_frozen->len +
           s->held_old->len;
}

/* A promise that cannot be kept is not given */
bool thinvm_repair_promise(ThinvmState *s)
{
    s->promises_exact = free_soon(s) >= thinvm_space_reserve_pages(s) +
                                        s->promised_pages;
    return s->promises_exact;
}

bool thinvm_repair_promises(ThinvmState *s, uint64_t unwritten_runs)
{
    s->promised_pages = unwritten_runs;
    return thinvm_repair_promise(s);
}

uint64_t thinvm_space_promised_then(ThinvmState *s)
{
    return s->new_promises < 0 && s->promised_pages < -s->new_promises ? 0 :
           s->promised_pages + s->new_promises;
}

/* A freeze gives new places to at most all of the space map */
uint64_t thinvm_space_last_pages(ThinvmState *s)
{
    return s->extents->len + s->extents->len / THINVM_POINTERS_PER_PAGE + 3;
}

uint64_t thinvm_space_reserve_pages(ThinvmState *s)
{
    return 3ULL * (s->dirty_bound + thinvm_space_last_pages(s));
}

/*
 * The device may have to grow for their data, and the reserve with it.
 * Besides the promised pages: inner ones, what bases hold meanwhile, and what
 * is taken ahead of need.
 */
uint64_t thinvm_space_for_unwritten_runs(ThinvmState *s, uint64_t runs)
{
    uint32_t bound = dirty_bound(s, s->device_clusters +
                                 runs * THINVM_ENTRIES_PER_LEAF);
    uint64_t pages = 3 * (bound + thinvm_space_last_pages(s)) + 2 * bound +
                     s->promised_pages + runs + runs / 64;
    unsigned bits = s->cluster_bits - THINVM_PAGE_BITS;
    uint64_t free = free_soon(s);

    return pages <= free ? 0 : DIV_ROUND_UP(pages - free, 1u << bits);
}

uint64_t thinvm_space_metadata_wanted(ThinvmState *s, bool *urgent)
{
    uint64_t reserve = thinvm_space_reserve_pages(s) + s->promised_pages;
    uint64_t target = reserve + s->dirty_bound / 2;
    unsigned bits = s->cluster_bits - THINVM_PAGE_BITS;
    uint64_t pages;

    *urgent = s->nb_meta_free < reserve + thinvm_space_last_pages(s);
    if (s->nb_meta_free >= target ||
        s->extents->len == THINVM_MAX_EXTENTS) {
        return 0;
    }
    pages = MIN(MAX(target - s->nb_meta_free, s->dirty_bound),
                THINVM_EXTENT_MAX_PAGES);
    return MAX(1, pages >> bits);
}
