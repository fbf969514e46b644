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
 * stays quiet about as long as it has been quiet; one that was not written is
 * as likely as any of its page to be written next.  And a writer that goes from
 * block to block goes on at its pace, so what lies ahead of it will be written.
 */

#include "qemu/osdep.h"
#include "heat.h"

#define HEAT_PAGE_BITS   10
#define HEAT_PAGE_BLOCKS (1 << HEAT_PAGE_BITS)
#define HEAT_TICK_MS     10
#define HEAT_WINDOW      6000   /* ticks that a page's pace goes by */
#define HEAT_LEAST       16     /* blocks that make a pace, ... */
#define HEAT_LEAST_TICKS 100    /* in so long */

typedef struct HeatPage {
    int64_t index;
    bool touched;                           /* since the hand came by */
    uint32_t begin, nb_writes;              /* tick, blocks since then */
    uint32_t last[HEAT_PAGE_BLOCKS];        /* tick + 1; 0: never */
    uint16_t interval[HEAT_PAGE_BLOCKS];    /* ticks; 0: written once */
} HeatPage;

/* A writer that goes from block to block, or may be one */
typedef struct HeatStream {
    int64_t next;           /* block */
    int64_t nb;             /* blocks that it has gone on; 0: no stream */
    int64_t written;        /* how many of them it has written */
    int64_t begin, last;    /* in this time, ms */
} HeatStream;

#define STREAMS          16
#define STREAM_LEAST     64     /* blocks in order, ... */
#define STREAM_LEAST_MS  500    /* for so long: before it counts as one */
#define STREAM_GAP       32     /* blocks that it may leave out or repeat */
#define STREAM_WINDOW_MS 10000  /* that its pace goes by */
#define STREAM_QUIET_MS  5000   /* after which it is over */

struct PrecopyHeat {
    int64_t nb_blocks;
    HeatStream streams[STREAMS];
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
    if (!page->nb_writes++) {
        page->begin = tick;
    } else if (tick > page->begin + HEAT_WINDOW) {
        page->begin += (tick - page->begin) / 2;
        page->nb_writes /= 2;
    }
    if (page->last[i]) {
        uint32_t passed = tick - MIN(page->last[i], tick);
        uint32_t old = page->interval[i];
        uint32_t mean = old ? (3 * old + passed) / 4 : passed;

        page->interval[i] = MIN(MAX(mean, 1), UINT16_MAX);
    }
    page->last[i] = tick;
}

static bool heat_is_stream(const HeatStream *s, int64_t now)
{
    return s->nb >= STREAM_LEAST && s->written >= s->nb / 4 * 3 &&
           s->last - s->begin >= STREAM_LEAST_MS &&
           now - s->last < STREAM_QUIET_MS;
}

static void heat_advance(HeatStream *s, int64_t first, int64_t nb, int64_t now)
{
    s->written += nb;
    s->nb += MAX(first + nb - s->next, 0);
    s->next = MAX(s->next, first + nb);
    s->last = MAX(now, s->last);
    if (s->last - s->begin > STREAM_WINDOW_MS) {
        s->begin += (s->last - s->begin) / 2;
        s->nb /= 2;
        s->written /= 2;
    }
}

/* Some stream goes on, or the oldest that is none makes room for another */
static void heat_stream(PrecopyHeat *h, int64_t first, int64_t nb, int64_t now)
{
    HeatStream *victim = NULL;

    for (int i = 0; i < STREAMS; i++) {
        HeatStream *s = &h->streams[i];

        if (s->nb && first <= s->next + STREAM_GAP &&
            first + nb > s->next - STREAM_GAP) {
            heat_advance(s, first, nb, now);
            return;
        }
        if (!heat_is_stream(s, now) && (!victim || s->last < victim->last)) {
            victim = s;
        }
    }
    if (victim) {
        *victim = (HeatStream) {
            .next = first + nb,
            .nb = nb,
            .written = nb,
            .begin = now,
            .last = now,
        };
    }
}

/* When the block will be met by a stream */
static int64_t heat_expect_stream(const PrecopyHeat *h, int64_t block,
                                  int64_t now)
{
    int64_t soonest = PRECOPY_NEVER;

    for (int i = 0; i < STREAMS; i++) {
        const HeatStream *s = &h->streams[i];

        if (block >= s->next && heat_is_stream(s, now)) {
            double ms = (double)(block - s->next) * (s->last - s->begin) /
                        s->nb;

            soonest = MIN(soonest, MIN(ms, PRECOPY_NEVER / 2));
        }
    }
    return soonest;
}

void precopy_heat_write(PrecopyHeat *h, int64_t first, int64_t nb, int64_t now)
{
    uint32_t tick;

    assert(first >= 0 && nb >= 0 && first + nb <= h->nb_blocks);
    if (h->start < 0) {
        h->start = now;
    }
    if (nb) {
        heat_stream(h, first, nb, now);
    }
    tick = heat_tick(h, now);
    for (int64_t b = first; b < first + nb; b++) {
        HeatPage *page = heat_page(h, b >> HEAT_PAGE_BITS);

        heat_update(page, b & (HEAT_PAGE_BLOCKS - 1), tick);
    }
}

/*
 * A block that was not written, amid others that are: as long as it takes to
 * write as many as the page has, at the pace so far
 */
static int64_t heat_expect_page(const HeatPage *page, uint32_t tick)
{
    int64_t passed = (int64_t)tick - page->begin;

    if (page->nb_writes < HEAT_LEAST || passed < HEAT_LEAST_TICKS) {
        return PRECOPY_NEVER;
    }
    return passed * HEAT_TICK_MS * HEAT_PAGE_BLOCKS / page->nb_writes;
}

int64_t precopy_heat_expect(const PrecopyHeat *h, int64_t block, int64_t now)
{
    const HeatPage *page = h->by_index[block >> HEAT_PAGE_BITS];
    int i = block & (HEAT_PAGE_BLOCKS - 1);
    int64_t stream = heat_expect_stream(h, block, now);
    uint32_t quiet;

    if (!page) {
        return stream;
    }
    if (!page->last[i]) {
        return MIN(heat_expect_page(page, heat_tick(h, now)), stream);
    }
    quiet = heat_tick(h, now);
    quiet -= MIN(page->last[i], quiet);
    return MIN((int64_t)MAX(page->interval[i], quiet) * HEAT_TICK_MS, stream);
}
