/*
 * thinvm-agent: sets of ranges
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Bounded by MAX_SET each, and by MAX_ALL_SETS together: what is beyond is not
 * told.
 */
#include <time.h>
#include "agent.h"

/* Ranges that there is memory for, of all sets */
static size_t all_room;

uint64_t now_ms(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000ULL + t.tv_nsec / 1000000;
}

void *must(void *p)
{
    if (!p) {
        fprintf(stderr, "thinvm-agent: no memory\n");
        exit(1);
    }
    return p;
}

/* False if all sets together have too much */
static bool set_grow(struct set *s)
{
    size_t room = s->room ? s->room * 2 : 64;

    if (room - s->room > MAX_ALL_SETS - all_room) {
        return false;
    }
    s->r = must(realloc(s->r, room * sizeof(*s->r)));
    all_room += room - s->room;
    s->room = room;
    return true;
}

void set_append(struct set *s, uint64_t start, uint64_t end,
                       uint64_t due)
{
    if (start >= end || s->nb == MAX_SET ||
        (s->nb == s->room && !set_grow(s))) {
        return;
    }
    s->r[s->nb++] = (struct range) { start, end, due };
}

static int compare_ranges(const void *a, const void *b)
{
    const struct range *x = a, *y = b;

    return x->start < y->start ? -1 : x->start > y->start;
}

/* Bring what was appended in order, overlapping ranges made one */
void set_normalize(struct set *s)
{
    size_t n = 0;

    if (s->nb > 1) {
        qsort(s->r, s->nb, sizeof(*s->r), compare_ranges);
    }
    for (size_t i = 0; i < s->nb; i++) {
        if (n && s->r[i].start <= s->r[n - 1].end) {
            struct range *last = &s->r[n - 1];

            last->end = s->r[i].end > last->end ? s->r[i].end : last->end;
            last->due = s->r[i].due < last->due ? s->r[i].due : last->due;
        } else {
            s->r[n++] = s->r[i];
        }
    }
    s->nb = n;
}

void set_clear(struct set *s)
{
    free(s->r);
    all_room -= s->room;
    *s = (struct set) { 0 };
}

/* What is in @a and not in @b */
struct set set_minus(const struct set *a, const struct set *b)
{
    struct set result = { 0 };
    size_t j = 0;

    for (size_t i = 0; i < a->nb; i++) {
        uint64_t at = a->r[i].start, end = a->r[i].end;

        while (j < b->nb && b->r[j].end <= at) {
            j++;
        }
        for (size_t k = j; k < b->nb && b->r[k].start < end; k++) {
            set_append(&result, at, b->r[k].start, a->r[i].due);
            at = b->r[k].end > at ? b->r[k].end : at;
        }
        set_append(&result, at, end, a->r[i].due);
    }
    return result;
}

void set_add(struct set *s, const struct range *r, size_t nb)
{
    for (size_t i = 0; i < nb; i++) {
        set_append(s, r[i].start, r[i].end, r[i].due);
    }
    set_normalize(s);
}

void set_remove(struct set *s, const struct range *r, size_t nb)
{
    struct set gone = { (struct range *)r, nb, nb };
    struct set rest = set_minus(s, &gone);

    set_clear(s);
    *s = rest;
}
