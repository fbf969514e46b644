/*
 * blockdev-precopy: lines of the hint protocol
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The lines come from a guest, which may be hostile: nothing is believed of
 * them but what this has looked at, and a line is taken as a whole or not at
 * all.  What each verb takes is a string, one character for each word:
 *
 *   p  the protocol's name     n  a number       w  a word
 *   d  the number of a disk    t  ms, or "-"     r  ranges, to the end
 */

#include "qemu/osdep.h"
#include "hint-parse.h"

static const struct {
    const char *verb;
    const char *words;
} hint_verbs[PRECOPY_VERB__MAX] = {
    [PRECOPY_VERB_HELLO]    = { "hello",    "pnw" },
    [PRECOPY_VERB_DISK]     = { "disk",     "dnww" },
    [PRECOPY_VERB_GONE]     = { "gone",     "d" },
    [PRECOPY_VERB_COVERAGE] = { "coverage", "dnnw" },
    [PRECOPY_VERB_DIRTY]    = { "dirty",    "dtr" },
    [PRECOPY_VERB_CLEAN]    = { "clean",    "dr" },
    [PRECOPY_VERB_FREE]     = { "free",     "dr" },
    [PRECOPY_VERB_USED]     = { "used",     "dr" },
    [PRECOPY_VERB_COST]     = { "cost",     "nnn" },
    [PRECOPY_VERB_DONE]     = { "done",     "nwn" },
    [PRECOPY_VERB_BOOTED]   = { "booted",   "" },
    [PRECOPY_VERB_BYE]      = { "bye",      "" },
};

/* What is left to read of a line */
typedef struct HintText {
    const char *at, *end;
    bool wrong;
} HintText;

typedef struct HintWord {
    const char *at;
    size_t length;
} HintWord;

/* The next word; words are separated by one space, and none is empty */
static HintWord hint_word(HintText *t)
{
    HintWord w = {
        .at = t->at,
    };

    while (t->at < t->end && *t->at != ' ') {
        /* printable ASCII alone */
        if (*t->at <= 0x20 || *t->at >= 0x7f) {
            t->wrong = true;
        }
        t->at++;
    }
    w.length = t->at - w.at;
    if (w.length == 0 || w.length > PRECOPY_HINT_MAX_WORD) {
        t->wrong = true;
    }
    if (t->at < t->end) {
        t->at++;
        t->wrong |= t->at == t->end;    /* a space ends no line */
    }
    return w;
}

static bool hint_is(HintWord w, const char *s)
{
    return w.length == strlen(s) && !memcmp(w.at, s, w.length);
}

static int64_t hint_number(HintText *t, int64_t max)
{
    HintWord w = hint_word(t);
    uint64_t value = 0;

    if (w.length > 19) {
        t->wrong = true;
        return 0;
    }
    for (size_t i = 0; i < w.length; i++) {
        if (w.at[i] < '0' || w.at[i] > '9') {
            t->wrong = true;
            return 0;
        }
        value = value * 10 + (w.at[i] - '0');
    }
    if (value > max) {
        t->wrong = true;
        return 0;
    }
    return value;
}

static int64_t hint_ms(HintText *t)
{
    HintText rest = *t;

    if (hint_is(hint_word(&rest), "-")) {
        *t = rest;
        return PRECOPY_HINT_NO_MS;
    }
    return hint_number(t, PRECOPY_HINT_MAX_MS);
}

static void hint_ranges(HintText *t, PrecopyHintLine *line)
{
    do {
        PrecopyHintRange *r = &line->range[line->nb_ranges];

        if (line->nb_ranges == PRECOPY_HINT_MAX_RANGES) {
            t->wrong = true;
            return;
        }
        r->offset = hint_number(t, INT64_MAX);
        r->bytes = hint_number(t, INT64_MAX);
        if (r->offset % 512 || r->bytes % 512 || r->bytes == 0 ||
            r->bytes > INT64_MAX - r->offset) {
            t->wrong = true;
        }
        line->nb_ranges++;
    } while (t->at < t->end && !t->wrong);
}

static PrecopyHintVerb hint_verb(HintWord w)
{
    PrecopyHintVerb v;

    for (v = 0; v < PRECOPY_VERB__MAX; v++) {
        if (hint_is(w, hint_verbs[v].verb)) {
            break;
        }
    }
    return v;
}

static void hint_copy(HintWord w, char *out)
{
    size_t length = MIN(w.length, PRECOPY_HINT_MAX_WORD);

    memcpy(out, w.at, length);
    out[length] = '\0';
}

bool precopy_hint_parse(const char *text, size_t length, PrecopyHintLine *line)
{
    HintText t = {
        .at = text,
        .end = text + length,
    };
    int nb_numbers = 0, nb_words = 0;

    memset(line, 0, sizeof(*line));
    line->verb = hint_verb(hint_word(&t));
    if (line->verb == PRECOPY_VERB__MAX || length >= PRECOPY_HINT_MAX_LINE) {
        return false;
    }
    for (const char *p = hint_verbs[line->verb].words; *p && !t.wrong; p++) {
        switch (*p) {
        case 'p':
            t.wrong |= !hint_is(hint_word(&t), "thinvm-hints");
            break;
        case 'd':
            line->disk = hint_number(&t, PRECOPY_HINT_MAX_DISKS - 1);
            break;
        case 'n':
            line->number[nb_numbers++] = hint_number(&t, INT64_MAX);
            break;
        case 't':
            line->number[nb_numbers++] = hint_ms(&t);
            break;
        case 'w':
            hint_copy(hint_word(&t), line->word[nb_words++]);
            break;
        case 'r':
            hint_ranges(&t, line);
            break;
        default:
            g_assert_not_reached();
        }
    }
    return !t.wrong && t.at == t.end;
}
