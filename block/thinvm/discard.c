/*
 * thinvm durability layer: discards that are passed down to the device
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Durability layer; called by reclaim.c with clusters that nobody can reach
 * any more, and that stay busy until the discard is over (invariant 2).
 *
 * A thin device takes space back in units of its own, and ignores what is less
 * than a whole one: arrays have 64 KiB to some MiB.  What guests discard piece
 * by piece would never come back there.  So a discard is rounded to whole
 * units: outwards where the rest of a unit is free, too, which then becomes
 * busy as well, and inwards where it is not.  The unit is discarded with the
 * last of its clusters that comes free.
 */
#include "qemu/osdep.h"
#include "qapi/qapi-types-block-core.h"
#include "store-int.h"
#include "trace.h"

/* Larger units would have to be free as a whole for too long */
#define THINVM_DISCARD_UNIT_MAX     (64 * MiB)

static ThinvmFreedRange *range_at(GArray *ranges, guint i)
{
    return &g_array_index(ranges, ThinvmFreedRange, i);
}

static uint64_t range_end(const ThinvmFreedRange *r)
{
    return r->first + r->nb_clusters;
}

static int compare_ranges(const void *a, const void *b)
{
    const ThinvmFreedRange *ra = a, *rb = b;

    return ra->first < rb->first ? -1 : ra->first > rb->first;
}

void thinvm_discard_join(GArray *ranges)
{
    guint n = 0;

    g_array_sort(ranges, compare_ranges);
    for (guint i = 1; i < ranges->len; i++) {
        ThinvmFreedRange *last = range_at(ranges, n);
        ThinvmFreedRange *r = range_at(ranges, i);

        if (range_end(last) == r->first) {
            last->nb_clusters += r->nb_clusters;
        } else {
            n++;
            *range_at(ranges, n) = *r;
        }
    }
    g_array_set_size(ranges, MIN(ranges->len, n + 1));
}

/* In clusters; 1 also where no whole number of them makes a unit */
static uint64_t coroutine_fn unit_of(ThinvmStore *st)
{
    ThinvmDevice *dev = st->dev;
    uint64_t bytes = dev->co_discard_unit ? dev->co_discard_unit(dev) : 0;

    if (bytes > THINVM_DISCARD_UNIT_MAX ||
        bytes & ((1ULL << st->cluster_bits) - 1)) {
        return 1;
    }
    return MAX(1, bytes >> st->cluster_bits);
}

static int question_take(ThinvmState *s, void *opaque, ThinvmNeeds *needs)
{
    ThinvmFreedRange *r = opaque;

    return thinvm_space_take(s, r->first, r->nb_clusters, needs);
}

static void give_back(ThinvmStore *st, GArray *taken, guint from)
{
    for (guint i = from; i < taken->len; i++) {
        ThinvmFreedRange *r = range_at(taken, i);

        thinvm_store_unreserve(st, r->first, r->nb_clusters);
    }
    g_array_set_size(taken, from);
}

/*
 * Make busy what lies between @ranges in [@first, @end), if all of it is free.
 * @ranges[@i] is the first one that lies there.
 */
static void coroutine_fn complete_unit(ThinvmStore *st, GArray *ranges,
                                       guint i, uint64_t first, uint64_t end,
                                       GArray *taken)
{
    guint before = taken->len;
    uint64_t c = first;

    while (c < end) {
        ThinvmFreedRange *r = i < ranges->len ? range_at(ranges, i) : NULL;
        ThinvmFreedRange gap = { c, MIN(end, r ? r->first : end) - c };

        if (r && r->first <= c) {
            c = range_end(r);
            i++;
        } else if (thinvm_store_ask(st, question_take, &gap, NULL) == 0) {
            g_array_append_val(taken, gap);
            c += gap.nb_clusters;
        } else {
            give_back(st, taken, before);
            return;
        }
    }
}

static void coroutine_fn complete_units(ThinvmStore *st, GArray *ranges,
                                        uint64_t unit)
{
    g_autoptr(GArray) taken = g_array_new(false, false,
                                          sizeof(ThinvmFreedRange));
    uint64_t seen = 0;          /* end of the last unit that was looked at */

    for (guint i = 0; i < ranges->len && unit > 1; i++) {
        ThinvmFreedRange *r = range_at(ranges, i);
        uint64_t edges[] = { r->first, range_end(r) };

        for (unsigned e = 0; e < ARRAY_SIZE(edges); e++) {
            uint64_t start = edges[e] - edges[e] % unit;

            if (edges[e] > start && start >= seen) {
                seen = start + unit;
                complete_unit(st, ranges, i, start, seen, taken);
            }
        }
    }
    g_array_append_vals(ranges, taken->data, taken->len);
    thinvm_discard_join(ranges);
}

static void coroutine_fn pass_down(ThinvmStore *st, uint64_t first,
                                   uint64_t nb_clusters)
{
    trace_thinvm_discard_down(st, first, nb_clusters);
    /* It is a hint; when it fails nothing is lost but space below */
    thinvm_device_event(st->dev, BLKDBG_THINVM_DISCARD);
    st->dev->co_pdiscard(st->dev, first << st->cluster_bits,
                         nb_clusters << st->cluster_bits);
}

void coroutine_fn thinvm_discard_ranges(ThinvmStore *st, GArray *ranges)
{
    uint64_t unit = unit_of(st);

    complete_units(st, ranges, unit);
    for (guint i = 0; i < ranges->len; i++) {
        ThinvmFreedRange *r = range_at(ranges, i);
        uint64_t first = DIV_ROUND_UP(r->first, unit) * unit;
        uint64_t end = range_end(r) - range_end(r) % unit;

        if (qatomic_read(&st->poisoned)) {
            return;             /* the clusters may be somebody else's */
        }
        if (first < end) {
            pass_down(st, first, end - first);
        }
    }
}
