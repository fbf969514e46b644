/*
 * thinvm-template: verify, repair
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "tool.h"

/* More are counted, not named */
#define CHUNKS_NAMED    20

#define REPAIR_STEPS    3

/* ------------------------------------------------------------------ */
/* Telling                                                             */

static void tell_chunks(const TemplateFindings *f)
{
    for (unsigned i = 0; i < MIN(f->bad->len, CHUNKS_NAMED); i++) {
        uint64_t n = g_array_index(f->bad, uint64_t, i);

        printf("  chunk %" PRIu64 " (from byte %" PRIu64 ") is damaged\n", n,
               n * f->chunk_size);
    }
    if (f->bad->len > CHUNKS_NAMED) {
        printf("  and %u more chunks\n", f->bad->len - CHUNKS_NAMED);
    }
}

static void tell(const TemplateStore *s, const TemplateDigest *digest,
                 const TemplateFindings *f)
{
    char text[TEMPLATE_DIGEST_TEXT];

    template_digest_format(digest, text);
    if (template_findings_ok(f)) {
        printf("%s on disk '%s': %" PRIu64 " chunks read, no damage\n", text,
               s->disk->name, f->chunks_read);
        return;
    }
    printf("%s on disk '%s': damaged\n", text, s->disk->name);
    if (f->chunks_problem) {
        printf("  its hashes: %s\n", f->chunks_problem);
    }
    if (f->data_problem) {
        printf("  its data: %s\n", f->data_problem);
    }
    tell_chunks(f);
    if (f->whole_bad && !f->bad->len) {
        printf("  its contents are another template's\n");
    }
}

/* ------------------------------------------------------------------ */
/* verify                                                              */

static bool parse_range(const char *range, uint64_t *offset, uint64_t *bytes,
                        Error **errp)
{
    const char *end;

    *offset = 0;
    *bytes = UINT64_MAX;
    if (!range) {
        return true;
    }
    if (strchr(range, '-') ||
        qemu_strtou64(range, &end, 10, offset) < 0 || *end != ':' ||
        qemu_strtou64(end + 1, NULL, 10, bytes) < 0 || *bytes == 0) {
        error_setg(errp, "Option '--range' is '%.80s'; it must be "
                   "OFFSET:BYTES, both in bytes", range);
        return false;
    }
    return true;
}

typedef bool (*EachCopy)(Tool *t, TemplateStore *s,
                         const TemplateDigest *digest, bool *damaged,
                         Error **errp);

/* It is to be there.  Another run may delete it at any time. */
static bool has_copy(TemplateStore *s, const TemplateDigest *digest)
{
    TemplateEntry e;

    return template_store_look(s, digest, &e) && (e.data || e.chunks) &&
           !e.removed;
}

/* @each for every copy on this node of the templates asked for */
static int each_copy(Tool *t, EachCopy each)
{
    Error *err = NULL;
    g_autoptr(GArray) digests = tool_digests(t, &err);
    int status = TOOL_OK;
    unsigned copies = 0;

    for (unsigned i = 0; digests && !err && i < digests->len; i++) {
        TemplateDigest *digest = &g_array_index(digests, TemplateDigest, i);

        for (unsigned j = 0; !err && j < t->stores->len; j++) {
            TemplateStore *s = g_ptr_array_index(t->stores, j);
            bool damaged = false;

            if (!has_copy(s, digest)) {
                continue;
            }
            copies++;
            if (each(t, s, digest, &damaged, &err) && damaged) {
                status = TOOL_INCOMPLETE;
            }
        }
    }
    if (err) {
        error_report_err(err);
        return TOOL_FAILED;
    }
    if (t->argc && !copies) {
        error_report("Node '%s' has none of these templates", t->node->name);
        return TOOL_FAILED;
    }
    return status;
}

/* Is it damaged, and still to be there?  Says what it is like. */
static bool examine(Tool *t, TemplateStore *s, const TemplateDigest *digest,
                    uint64_t offset, uint64_t bytes, uint32_t chunk_size,
                    TemplateFindings *f, bool *damaged, Error **errp)
{
    if (!tool_verify_copy(t, s, digest, offset, bytes, chunk_size, f, errp)) {
        return false;
    }
    *damaged = !template_findings_ok(f) && has_copy(s, digest);
    if (*damaged || template_findings_ok(f)) {
        tell(s, digest, f);
    }
    return true;
}

static bool verify_copy(Tool *t, TemplateStore *s,
                        const TemplateDigest *digest, bool *damaged,
                        Error **errp)
{
    TemplateFindings f;
    uint64_t offset, bytes;
    bool ok;

    if (!parse_range(t->range, &offset, &bytes, errp)) {
        return false;
    }
    ok = examine(t, s, digest, offset, bytes, 0, &f, damaged, errp);
    template_findings_clear(&f);
    return ok;
}

int tool_verify(Tool *t)
{
    return each_copy(t, verify_copy);
}

/* ------------------------------------------------------------------ */
/* repair                                                              */

/* The chunks that are damaged, each from whichever copy has it right */
static bool mend_chunks(TemplateStore *s, TemplateFindings *f,
                        GPtrArray *replicas, Error **errp)
{
    for (unsigned i = 0; f->bad->len && i < replicas->len; i++) {
        ToolReplica *r = g_ptr_array_index(replicas, i);
        unsigned before = f->bad->len;

        if (!template_mend(s, r->blk, f, errp)) {
            return false;
        }
        if (f->bad->len < before) {
            printf("  %u chunks mended from %s\n", before - f->bad->len,
                   r->where);
        }
    }
    return true;
}

static bool has_hashes(TemplateStore *s, const TemplateDigest *digest)
{
    g_autoptr(TemplateChunks) c = template_store_read_chunks(s, digest, NULL);

    return c;
}

/*
 * Other copies, and what chunks this one's hashes are to be of, if they are
 * made anew: those that they are of now, or else other copies'; 0 if none
 * tells.
 */
static GPtrArray *find_replicas(Tool *t, TemplateStore *s,
                                const TemplateDigest *digest,
                                uint32_t *chunk_size)
{
    g_autoptr(TemplateChunks) own = template_store_read_chunks(s, digest, NULL);
    GPtrArray *replicas = tool_replicas(t, digest, s);

    *chunk_size = own ? own->chunk_size : 0;
    for (unsigned i = 0; !*chunk_size && i < replicas->len; i++) {
        *chunk_size = tool_chunk_size_of(g_ptr_array_index(replicas, i),
                                         digest);
    }
    return replicas;
}

/* All of it anew */
static bool fetch_whole(Tool *t, TemplateStore *s,
                        const TemplateDigest *digest, uint32_t chunk_size,
                        GPtrArray *replicas)
{
    TemplateDigest same;
    bool existed;

    for (unsigned i = 0; i < replicas->len; i++) {
        ToolReplica *r = g_ptr_array_index(replicas, i);
        Error *err = NULL;

        if (tool_receive(t, s, r->blk, digest, true, chunk_size, &same,
                         &existed, &err)) {
            printf("  fetched from %s\n", r->where);
            return true;
        }
        warn_reportf_err(err, "From %s: ", r->where);
    }
    return false;
}

/* One step towards a good copy; @again: look at what it is now */
static bool repair_step(Tool *t, TemplateStore *s,
                        const TemplateDigest *digest, uint32_t chunk_size,
                        TemplateFindings *f, GPtrArray *replicas, bool *again,
                        Error **errp)
{
    *again = true;
    if (f->computed && !f->whole_bad && !f->data_problem) {
        /* The data is right, and so are the hashes made from it */
        printf("  its hashes are written anew\n");
        return template_store_write_chunks(s, f->computed, errp);
    }
    if (f->chunks && f->bad->len) {
        if (!mend_chunks(s, f, replicas, errp)) {
            return false;
        }
        if (!f->bad->len) {
            return true;
        }
        printf("  no other copy has %u of the chunks\n", f->bad->len);
    }
    *again = fetch_whole(t, s, digest, chunk_size, replicas);
    return true;
}

/*
 * Hashes that are wrong, then chunks, then, if the contents still are not what
 * the name says, all of it.
 */
static bool repair_copy(Tool *t, TemplateStore *s,
                        const TemplateDigest *digest, bool *damaged,
                        Error **errp)
{
    g_autoptr(GPtrArray) replicas = NULL;
    bool ok = true, again = true;
    uint32_t chunk_size = 0;

    if (!has_hashes(s, digest)) {
        replicas = find_replicas(t, s, digest, &chunk_size);
    }
    for (int step = 0; ok && again && step <= REPAIR_STEPS; step++) {
        TemplateFindings f;

        ok = examine(t, s, digest, 0, UINT64_MAX, chunk_size, &f, damaged,
                     errp);
        again = ok && *damaged && step < REPAIR_STEPS;
        if (again && !replicas) {
            replicas = find_replicas(t, s, digest, &chunk_size);
        }
        if (again) {
            ok = repair_step(t, s, digest, chunk_size, &f, replicas, &again,
                             errp);
        }
        template_findings_clear(&f);
    }
    if (ok && *damaged) {
        error_report("No other copy can be reached that would mend it");
    }
    return ok;
}

int tool_repair(Tool *t)
{
    return each_copy(t, repair_copy);
}
