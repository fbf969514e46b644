/*
 * blockdev-precopy: lines of the hint protocol
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * docs/interop/thinvm-hints.rst in C: a line of the guest's agent becomes a
 * checked message, or nothing.  No I/O, no state, no memory of its own.
 */

#ifndef BLOCK_PRECOPY_HINT_PARSE_H
#define BLOCK_PRECOPY_HINT_PARSE_H

#define PRECOPY_HINT_VERSION    1
#define PRECOPY_HINT_MAX_LINE   1024    /* the line feed included */
#define PRECOPY_HINT_MAX_RANGES 16      /* in a line */
#define PRECOPY_HINT_MAX_DISKS  64
#define PRECOPY_HINT_MAX_WORD   64
#define PRECOPY_HINT_MAX_MS     3600000
#define PRECOPY_HINT_NO_MS      (-1)    /* the agent does not know */

typedef enum PrecopyHintVerb {
    PRECOPY_VERB_HELLO,
    PRECOPY_VERB_DISK,
    PRECOPY_VERB_GONE,
    PRECOPY_VERB_COVERAGE,
    PRECOPY_VERB_DIRTY,
    PRECOPY_VERB_CLEAN,
    PRECOPY_VERB_FREE,
    PRECOPY_VERB_USED,
    PRECOPY_VERB_COST,
    PRECOPY_VERB_DONE,
    PRECOPY_VERB_BOOTED,
    PRECOPY_VERB_BYE,
    PRECOPY_VERB__MAX,
} PrecopyHintVerb;

typedef struct PrecopyHintRange {
    int64_t offset, bytes;
} PrecopyHintRange;

typedef struct PrecopyHintLine {
    PrecopyHintVerb verb;
    int disk;
    /* HELLO: version; DISK: size; COVERAGE: known, unknown; DIRTY: ms;
     * COST: CPU in us, bytes written, lines; DONE: request, bytes */
    int64_t number[3];
    /* HELLO: agent; DISK: serial, name; COVERAGE: reason; DONE: status */
    char word[2][PRECOPY_HINT_MAX_WORD + 1];
    int nb_ranges;
    PrecopyHintRange range[PRECOPY_HINT_MAX_RANGES];
} PrecopyHintLine;

/*
 * @text has @length bytes without the line feed.  False if the line breaks a
 * rule or has an unknown verb; *line is undefined then.
 */
bool precopy_hint_parse(const char *text, size_t length,
                        PrecopyHintLine *line);

#endif
