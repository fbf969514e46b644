/*
 * Unit tests of the tool that makes failing tests smaller
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "thinvm-shrink.h"

#define NB  1000

typedef struct Culprits {
    unsigned parts[4], nb;
    unsigned enough;            /* of them: then it fails */
    unsigned tests;
} Culprits;

static bool culprits_fail(const bool *keep, unsigned nb, void *opaque)
{
    Culprits *c = opaque;
    unsigned found = 0;

    c->tests++;
    for (unsigned i = 0; i < c->nb; i++) {
        found += keep[c->parts[i]];
    }
    return found >= c->enough;
}

static unsigned run(Culprits *c, bool *keep, unsigned max_tests)
{
    memset(keep, true, NB * sizeof(bool));
    return shrink(keep, NB, culprits_fail, c, max_tests);
}

static void test_all_needed(void)
{
    Culprits c = { { 0, 77, 78, 999 }, 4, 4 };
    bool keep[NB];
    g_autofree char *list = NULL;

    g_assert_cmpuint(run(&c, keep, UINT_MAX), ==, 4);
    list = shrink_list(keep, NB);
    g_assert_cmpstr(list, ==, "0,77-78,999");
    g_assert_cmpuint(c.tests, <, 200);
}

static void test_some_needed(void)
{
    Culprits c = { { 3, 300, 301, 800 }, 4, 2 };
    bool keep[NB];

    g_assert_cmpuint(run(&c, keep, UINT_MAX), ==, 2);
    g_assert_true(culprits_fail(keep, NB, &c));
}

static void test_none_needed(void)
{
    Culprits c = { { 0 }, 0, 0 };
    bool keep[NB];
    g_autofree char *list = NULL;

    g_assert_cmpuint(run(&c, keep, UINT_MAX), ==, 0);
    list = shrink_list(keep, NB);
    g_assert_cmpstr(list, ==, "");
}

/* It stops when told to, with something that still fails */
static void test_bounded(void)
{
    Culprits c = { { 1, 250, 600, 998 }, 4, 4 };
    bool keep[NB];

    g_assert_cmpuint(run(&c, keep, 10), >, 4);
    g_assert_cmpuint(c.tests, ==, 10);
    g_assert_true(culprits_fail(keep, NB, &c));
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/thinvm/shrink/all-needed", test_all_needed);
    g_test_add_func("/thinvm/shrink/some-needed", test_some_needed);
    g_test_add_func("/thinvm/shrink/none-needed", test_none_needed);
    g_test_add_func("/thinvm/shrink/bounded", test_bounded);
    return g_test_run();
}
