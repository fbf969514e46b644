/*
 * thinvm-agent: what is sent
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Lines wait in a small buffer when the host does not read.  What finds no room
 * there, or exceeds the host's bounds, is not told now; since told is what has
 * changed since it was told last, the next look meets it again.
 */
#include <stdarg.h>
#include "agent.h"

#define OUT_SIZE        65536

int port = -1;
uint64_t lines_sent;
static char out[OUT_SIZE];
static size_t out_used;
static uint64_t ranges_second;
static double range_tokens, line_tokens;
static uint64_t tokens_filled;

bool out_pending(void)
{
    return out_used > 0;
}

void forget_out(void)
{
    out_used = 0;
    lines_sent = 0;
}

void set_range_rate(uint64_t ranges_in_a_second)
{
    ranges_second = range_tokens = ranges_in_a_second;
}

void flush_out(void)
{
    size_t sent = 0;

    while (sent < out_used) {
        ssize_t n = write(port, out + sent, out_used - sent);

        if (n <= 0) {
            if (n < 0 && errno == EINTR) {
                continue;
            }
            break;                  /* the host does not read just now */
        }
        sent += n;
    }
    memmove(out, out + sent, out_used - sent);
    out_used -= sent;
}

bool say(const char *format, ...)
{
    char line[MAX_LINE + 1];
    va_list ap;
    int n;

    va_start(ap, format);
    n = vsnprintf(line, sizeof(line), format, ap);
    va_end(ap);
    if (n < 0 || n >= MAX_LINE || out_used + n + 1 > OUT_SIZE) {
        return false;
    }
    line[n] = '\n';
    memcpy(out + out_used, line, n + 1);
    out_used += n + 1;
    lines_sent++;
    line_tokens--;
    return true;
}

static void fill_tokens(void)
{
    uint64_t now = now_ms();
    double seconds = (now - tokens_filled) / 1000.0;

    tokens_filled = now;
    range_tokens += seconds * ranges_second;
    if (range_tokens > ranges_second * 5.0) {
        range_tokens = ranges_second * 5.0;
    }
    line_tokens += seconds * LINES_SECOND;
    if (line_tokens > LINES_BURST) {
        line_tokens = LINES_BURST;
    }
}

/* As many of @r[] as one line may have, all due in the same second */
static size_t one_line(const char *verb, unsigned disk, bool timed,
                       const struct range *r, size_t nb)
{
    char line[MAX_LINE];
    uint64_t now = now_ms();
    uint64_t due = r[0].due > now ? (r[0].due - now) / 1000 * 1000 : 0;
    int n = snprintf(line, sizeof(line), "%s %u", verb, disk);
    size_t i;

    if (timed) {
        n += snprintf(line + n, sizeof(line) - n, " %" PRIu64,
                      due > 3600000 ? 3600000 : due);
    }
    for (i = 0; i < nb && i < MAX_RANGES && i < range_tokens; i++) {
        uint64_t this_due = r[i].due > now ? (r[i].due - now) / 1000 * 1000
                                           : 0;

        if (timed && this_due != due) {
            break;
        }
        n += snprintf(line + n, sizeof(line) - n, " %" PRIu64 " %" PRIu64,
                      r[i].start, r[i].end - r[i].start);
    }
    return i && say("%s", line) ? i : 0;
}

/*
 * Tell of @r[], as far as the bounds allow; returns how many.  The others are
 * met again at the next look, if they are still so.
 */
static size_t tell(const char *verb, unsigned disk, bool timed,
                   const struct range *r, size_t nb)
{
    size_t done = 0;

    while (done < nb) {
        size_t n;

        fill_tokens();
        if (range_tokens < 1 || line_tokens < 1) {
            break;
        }
        n = one_line(verb, disk, timed, r + done, nb - done);
        if (!n) {
            break;
        }
        range_tokens -= n;
        done += n;
    }
    return done;
}

/*
 * The difference of what is told and what is now; @again, also what is still
 * so: the host has forgotten it if it was written meanwhile
 */
void tell_difference(unsigned disk, const char *verb, const char *undo,
                     bool timed, bool again, struct set *told, struct set *now)
{
    const struct set nothing = { 0 };
    struct set more, less;
    size_t n;

    set_normalize(now);
    more = set_minus(now, again ? &nothing : told);
    less = set_minus(told, now);
    n = tell(undo, disk, false, less.r, less.nb);
    set_remove(told, less.r, n);
    n = tell(verb, disk, timed, more.r, more.nb);
    set_add(told, more.r, n);
    set_clear(&more);
    set_clear(&less);
    set_clear(now);
}
