/*
 * Make a failing test smaller
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See thinvm-shrink.h.
 */
#include "thinvm-shrink.h"

static unsigned count(const bool *keep, unsigned nb)
{
    unsigned n = 0;

    for (unsigned i = 0; i < nb; i++) {
        n += keep[i];
    }
    return n;
}

/* Leave out the kept parts from the @first'th to the one before @end */
static void leave_out(bool *keep, unsigned nb, unsigned first, unsigned end)
{
    unsigned n = 0;

    for (unsigned i = 0; i < nb; i++) {
        if (keep[i]) {
            keep[i] = n < first || n >= end;
            n++;
        }
    }
}

unsigned shrink(bool *keep, unsigned nb, ShrinkFails *fails, void *opaque,
                unsigned max_tests)
{
    g_autofree bool *less = g_new(bool, nb);
    unsigned left = count(keep, nb);
    unsigned piece = MAX(left / 2, 1);

    while (left && max_tests) {
        unsigned before = left;

        /* from the end on: what came last may well not be needed */
        for (unsigned end = left; end > 0 && max_tests; max_tests--) {
            unsigned first = end > piece ? end - piece : 0;

            memcpy(less, keep, nb * sizeof(bool));
            leave_out(less, nb, first, end);
            if (fails(less, nb, opaque)) {
                memcpy(keep, less, nb * sizeof(bool));
                left -= end - first;
            }
            end = first;
        }
        if (piece > 1) {
            piece = MIN(piece / 2, MAX(left / 2, 1));
        } else if (left == before) {
            break;
        }
    }
    return left;
}

char *shrink_list(const bool *keep, unsigned nb)
{
    GString *list = g_string_new("");

    for (unsigned i = 0; i < nb; i++) {
        unsigned last = i;

        if (!keep[i]) {
            continue;
        }
        while (last + 1 < nb && keep[last + 1]) {
            last++;
        }
        g_string_append_printf(list, last > i ? "%s%u-%u" : "%s%u",
                               list->len ? "," : "", i, last);
        i = last;
    }
    return g_string_free(list, false);
}
