/*
 * blockdev-precopy: write history of blocks
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * For each block that was written: when last, and the mean interval between
 * its writes.  Both in ticks of 10 ms, in pages of 1024 blocks that come into
 * being with the first write.  When there is no room for another page, a hand
 * goes around the pages, as in the clock algorithm, and takes the first that
 * was not written since it last came by.
 *
 * What is expected: a block that was written again and again goes on in its
 * rhythm; one that has been quiet for longer than that, or was written once,
 * stays quiet about as long as it has been quiet.
 */

#include "qemu/osdep.h"
#include "heat.h"

#define HEAT_PAGE_BITS   10
#define HEAT_PAGE_BLOCKS (1 << HEAT_PAGE_BITS)
#define HEAT_TICK_MS     10

typedef struct HeatPage {
    int64_t index;
    bool touched;                           /* since the hand came by */
    uint32_t last[HEAT_PAGE_BLOCKS];        /* tick + 1; 0: never */
    uint16_t interval[HEAT_PAGE_BLOCKS];    /* ticks; 0: written once */
} HeatPage;

struct PrecopyHeat {
    int64_t nb_blocks;
    int64_t start;          /* the clock at the first write; -1 before */
    HeatPage **by_index;    /* of the disk */
    HeatPage **pages;       /* the hand's order */
    size_t nb, max, hand;
};

PrecopyHeat *precopy_heat_new(int64_t nb_blocks, size_t max_bytes)
{
    PrecopyHeat *h = g_new0(PrecopyHeat, 1);

    h->nb_blocks = nb_blocks;
    h->start = -1;
    h->max = MAX(max_bytes / sizeof(HeatPage), 1);
    h->by_index = g_new0(HeatPage *,
                         DIV_ROUND_UP(nb_blocks, HEAT_PAGE_BLOCKS));
    return h;
}

void precopy_heat_free(PrecopyHeat *h)
{
    if (h) {
        for (size_t i = 0; i < h->nb; i++) {
            g_free(h->pages[i]);
        }
        g_free(h->pages);
        g_free(h->by_index);
        g_free(h);
    }
}

size_t precopy_heat_memory(const PrecopyHeat *h)
{
    return h->nb * sizeof(HeatPage);
}

static HeatPage *heat_evict(PrecopyHeat *h)
{
    for (;;) {
        HeatPage *page = h->pages[h->hand];

        h->hand = (h->hand + 1) % h->nb;
        if (!page->touched) {
            h->by_index[page->index] = NULL;
            return page;
        }
        page->touched = false;
    }
}

static HeatPage *heat_page(PrecopyHeat *h, int64_t index)
{
    HeatPage *page = h->by_index[index];

    if (!page) {
        if (h->nb < h->max) {
            page = g_new(HeatPage, 1);
            h->pages = g_renew(HeatPage *, h->pages, h->nb + 1);
            h->pages[h->nb++] = page;
        } else {
            page = heat_evict(h);
        }
        memset(page, 0, sizeof(*page));
        page->index = index;
        h->by_index[index] = page;
    }
    page->touched = true;
    return page;
}

static uint32_t heat_tick(const PrecopyHeat *h, int64_t now)
{
    return MIN(MAX(now - h->start, 0) / HEAT_TICK_MS, UINT32_MAX - 1) + 1;
}

static void heat_update(HeatPage *page, int i, uint32_t tick)
{
    if (page->last[i]) {
        uint32_t passed = tick - MIN(page->last[i], tick);
        uint32_t old = page->interval[i];
        uint32_t mean = old ? (3 * old + passed) / 4 : passed;

        page->interval[i] = MIN(MAX(mean, 1), UINT16_MAX);
    }
    page->last[i] = tick;
}

void precopy_heat_write(PrecopyHeat *h, int64_t first, int64_t nb, int64_t now)
{
    uint32_t tick;

    assert(first >= 0 && nb >= 0 && first + nb <= h->nb_blocks);
    if (h->start < 0) {
        h->start = now;
    }
    tick = heat_tick(h, now);
    for (int64_t b = first; b < first + nb; b++) {
        HeatPage *page = heat_page(h, b >> HEAT_PAGE_BITS);

        heat_update(page, b & (HEAT_PAGE_BLOCKS - 1), tick);
    }
}

int64_t precopy_heat_expect(const PrecopyHeat *h, int64_t block, int64_t now)
{
    const HeatPage *page = h->by_index[block >> HEAT_PAGE_BITS];
    int i = block & (HEAT_PAGE_BLOCKS - 1);
    uint32_t quiet;

    if (!page || !page->last[i]) {
        return PRECOPY_NEVER;
    }
    quiet = heat_tick(h, now);
    quiet -= MIN(page->last[i], quiet);
    return (int64_t)MAX(page->interval[i], quiet) * HEAT_TICK_MS;
}
