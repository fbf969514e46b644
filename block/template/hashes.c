/*
 * thinvm template store: what a template's chunks must be
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See reader.h.  The digest is of the whole: it does not tell what a single
 * chunk must be, so the list of their hashes must come from somewhere.  A disk
 * of this node has it beside the copy; it was made here, from contents that
 * were right.  Other nodes are asked for theirs, and it is
 *
 *  - compared with the hash that option "hashes" gives: then no other node
 *    need be believed anything; or else
 *  - compared between all that answer, which shows damage and a single liar,
 *    but not a liar who is alone.  What they agreed on is put to the test when
 *    the whole has come to this node (bring.c, replica.c).
 *
 * Nodes may have hashes of chunks of different sizes, which can be compared
 * only as far as chunks are zeroes.  One list of each size is kept, then; the
 * reader's chunks are the largest, and what was read has to be right by all.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "block/block-common.h"
#include "qemu/error-report.h"
#include "qemu/memalign.h"
#include "qemu/timer.h"
#include "reader.h"

#define CHUNKS_SUFFIX       ".chunks"
#define POLL_US             2000
#define GRACE_MS            200
#define PROBLEMS_TOLD       8

QEMU_BUILD_BUG_ON(TEMPLATE_CHUNK_SIZE_MIN << READER_OTHERS_MAX !=
                  TEMPLATE_CHUNK_SIZE_MAX);

/* What a node has said */
typedef struct Answer {
    Replica *replica;
    LinkTask *task;
    Link *link;
    uint8_t *header;                /* NULL: it has none, or a wrong one */
    TemplateChunks *chunks;         /* without the hashes */
    TemplateDigest root;
} Answer;

static int64_t now_ms(void)
{
    return qemu_clock_get_ms(QEMU_CLOCK_REALTIME);
}

/* ------------------------------------------------------------------ */
/* Asking                                                              */

static void answer_clear(gpointer opaque)
{
    Answer *a = opaque;

    if (a->task) {
        link_task_finish(a->task, NULL, NULL);
    }
    link_free(a->link);
    qemu_vfree(a->header);
    template_chunks_free(a->chunks);
    g_free(a);
}

static bool decode_header(TemplateReader *r, Answer *a, Error **errp)
{
    a->chunks = template_chunks_decode_header(a->header, errp);
    if (!a->chunks) {
        return false;
    }
    if (!template_digest_equal(&a->chunks->digest, &r->o.digest)) {
        error_setg(errp, "its hashes are of another template");
        return false;
    }
    template_chunks_header_root(a->header, &a->root);
    return true;
}

/* It has answered, or there is no more time */
static void answer_take(TemplateReader *r, Answer *a)
{
    bool connected = link_task_connected(a->task);
    Error *err = NULL;

    a->link = link_task_finish(g_steal_pointer(&a->task), &a->header, &err);
    if (!a->link || !decode_header(r, a, &err)) {
        /* It may have the contents without their hashes */
        bool usable = connected && !a->chunks;
        Replica *p = a->replica;

        qemu_vfree(a->header);
        a->header = NULL;
        QEMU_LOCK_GUARD(&r->lock);
        replica_set_problem(r, p, error_get_pretty(err), 0);
        p->usable = usable;
        error_free(err);
        return;
    }
    QEMU_LOCK_GUARD(&r->lock);
    a->replica->known = true;
}

static GPtrArray *ask_all(TemplateReader *r)
{
    GPtrArray *answers = g_ptr_array_new_with_free_func(answer_clear);
    g_autofree char *name = reader_export_name(r, CHUNKS_SUFFIX);

    for (unsigned i = 1; i < r->replicas->len; i++) {
        Answer *a = g_new0(Answer, 1);

        a->replica = g_ptr_array_index(r->replicas, i);
        a->task = link_task_start(a->replica->node, name, 0,
                                  TEMPLATE_CHUNKS_HEADER, r->o.timeout_ms);
        g_ptr_array_add(answers, a);
    }
    return answers;
}

/* ------------------------------------------------------------------ */
/* Choosing                                                            */

/* The hashes themselves, from the node that gave this answer; or NULL */
static TemplateChunks *read_hashes(TemplateReader *r, Answer *a)
{
    uint64_t bytes = a->chunks->nb_chunks * TEMPLATE_DIGEST_SIZE;
    LinkPatience patience = reader_patience(r);
    uint64_t size = TEMPLATE_CHUNKS_HEADER + bytes;
    Error *err = NULL;
    TemplateChunks *c = NULL;
    uint8_t *buf;

    if (link_size(a->link) != size &&
        link_size(a->link) != ROUND_UP(size, BDRV_SECTOR_SIZE)) {
        warn_report("Template node '%s': node '%s': the list of hashes has %"
                    PRIu64 " bytes instead of %" PRIu64, r->node_name,
                    a->replica->node->name, link_size(a->link), size);
        return NULL;
    }
    buf = qemu_memalign(LINK_ALIGNMENT, ROUND_UP(bytes, LINK_ALIGNMENT));
    if (link_read(a->link, TEMPLATE_CHUNKS_HEADER, bytes, buf, &patience,
                  &err) &&
        template_chunks_decode_hashes(a->chunks, a->header, buf, &err)) {
        c = g_steal_pointer(&a->chunks);
    } else {
        warn_reportf_err(err, "Template node '%s': node '%s': the list of "
                         "hashes: ", r->node_name, a->replica->node->name);
    }
    qemu_vfree(buf);
    return c;
}

static bool is_wanted(TemplateReader *r, const Answer *a)
{
    return a->header && (!r->o.has_hashes ||
                         template_digest_equal(&a->root, &r->o.hashes));
}

static void set_not_found(TemplateReader *r, Error **errp)
{
    g_autofree char *name = reader_export_name(r, "");
    g_autoptr(GString) why = g_string_new("");
    unsigned told = 0;

    for (unsigned i = 1; i < r->replicas->len; i++) {
        Replica *p = g_ptr_array_index(r->replicas, i);

        if (p->problem && told++ < PROBLEMS_TOLD) {
            g_string_append_printf(why, "; node '%s': %s", p->node->name,
                                   p->problem);
        }
    }
    error_setg(errp, "No node that could be asked has template '%s'%s%s", name,
               r->o.has_hashes ? " with the hashes that option 'hashes' names"
                               : " and the hashes of its chunks", why->str);
}

/*
 * Of chunks of that size, from the nearest that has them; the others' say the
 * same.  @missed: there are some, and they cannot be read.
 */
static TemplateChunks *take_hashes_of(TemplateReader *r, GPtrArray *answers,
                                      uint32_t chunk_size, bool *missed)
{
    TemplateChunks *c = NULL;

    *missed = false;
    for (unsigned i = 0; !c && i < answers->len; i++) {
        Answer *a = g_ptr_array_index(answers, i);

        if (is_wanted(r, a) && a->chunks &&
            a->chunks->chunk_size == chunk_size) {
            c = read_hashes(r, a);
            *missed = !c;
        }
    }
    return c;
}

/*
 * Of the largest chunks first.  Those that cannot be read might contradict the
 * others, so these are not believed without them.
 */
static bool take_hashes(TemplateReader *r, GPtrArray *answers, Error **errp)
{
    bool missed;

    for (uint32_t size = TEMPLATE_CHUNK_SIZE_MAX;
         size >= TEMPLATE_CHUNK_SIZE_MIN; size /= 2) {
        TemplateChunks *c = take_hashes_of(r, answers, size, &missed);

        if (missed && !r->o.has_hashes) {
            error_setg(errp, "A node has the hashes of chunks of %" PRIu32
                       " bytes, which cannot be read from it: say by option "
                       "'hashes' which are right, or try again", size);
            return false;
        }
        if (c && !r->chunks) {
            r->chunks = c;
        } else if (c) {
            r->others[r->nb_others++] = c;
        }
    }
    if (!r->chunks) {
        set_not_found(r, errp);
    }
    return r->chunks;
}

static void set_disagreement(Error **errp, const char *who)
{
    error_setg(errp, "%s do not agree on the hashes of the template's chunks: "
               "say by option 'hashes' which are right ('thinvm-template list "
               "--json' tells it, on a node that has the template)", who);
}

static bool contradict(const Answer *a, const Answer *b)
{
    return a->chunks->length != b->chunks->length ||
           (a->chunks->chunk_size == b->chunks->chunk_size &&
            !template_digest_equal(&a->root, &b->root));
}

static bool do_agree(GPtrArray *answers, Error **errp)
{
    for (unsigned i = 0; i < answers->len; i++) {
        const Answer *a = g_ptr_array_index(answers, i);

        for (unsigned j = 0; a->header && j < i; j++) {
            const Answer *b = g_ptr_array_index(answers, j);

            if (b->header && contradict(a, b)) {
                g_autofree char *who = g_strdup_printf("Nodes '%s' and '%s'",
                    b->replica->node->name, a->replica->node->name);

                set_disagreement(errp, who);
                return false;
            }
        }
    }
    return true;
}

static bool zero_hash(uint32_t chunk_size, TemplateDigest *hash, Error **errp)
{
    g_autofree uint8_t *zeroes = g_malloc0(chunk_size);

    return template_sha256(zeroes, chunk_size, hash, errp);
}

/* Are the chunks [@n, @end) zeroes?  @zero: the hash of one of them */
static bool are_zeroes(const TemplateChunks *c, uint64_t n, uint64_t end,
                       const TemplateDigest *zero)
{
    while (n < end && template_digest_equal(&c->hashes[n], zero)) {
        n++;
    }
    return n == end;
}

/* Zeroes are never read, so lists must agree on them beforehand */
static bool agree_on_zeroes(TemplateReader *r, const TemplateChunks *other,
                            Error **errp)
{
    const TemplateChunks *c = r->chunks;
    unsigned parts = c->chunk_size / other->chunk_size;
    TemplateDigest zero;

    if (!zero_hash(other->chunk_size, &zero, errp)) {
        return false;
    }
    for (uint64_t n = 0; n < c->length / c->chunk_size; n++) {
        if (are_zeroes(c, n, n + 1, &r->zeroes) !=
            are_zeroes(other, n * parts, (n + 1) * parts, &zero)) {
            set_disagreement(errp, "Nodes with chunks of different sizes");
            return false;
        }
    }
    return true;
}

static bool is_agreed(TemplateReader *r)
{
    QEMU_LOCK_GUARD(&r->lock);

    return r->trust == THINVM_TEMPLATE_TRUST_AGREED;
}

/* Does @c, of smaller chunks than ours, say the same of our chunk @n? */
static bool is_right_by(const TemplateReader *r, const TemplateChunks *c,
                        uint64_t n, const uint8_t *buf)
{
    uint32_t bytes = template_chunk_bytes(r->chunks, n);
    uint64_t m = n * (r->chunks->chunk_size / c->chunk_size);

    for (uint32_t at = 0; at < bytes; at += c->chunk_size, m++) {
        TemplateDigest hash;

        if (!template_sha256(buf + at, template_chunk_bytes(c, m), &hash,
                             NULL) ||
            !template_digest_equal(&hash, &c->hashes[m])) {
            return false;
        }
    }
    return true;
}

bool reader_is_contradicted(TemplateReader *r, uint64_t n, const uint8_t *buf)
{
    for (unsigned i = 0; i < r->nb_others && is_agreed(r); i++) {
        if (!is_right_by(r, r->others[i], n, buf)) {
            reader_refute(r, "nodes with chunks of different sizes do not "
                          "agree on their hashes");
        }
    }
    /* Also if another chunk was, meanwhile or before: not all were compared */
    return reader_is_refuted(r);
}

/* Take what has come; @wanted: there is a list among it that will do */
static bool any_missing(TemplateReader *r, GPtrArray *answers, bool *wanted)
{
    bool missing = false;

    for (unsigned i = 0; i < answers->len; i++) {
        Answer *a = g_ptr_array_index(answers, i);

        if (a->task && link_task_wait(a->task, 0)) {
            answer_take(r, a);
        }
        missing = missing || a->task;
        *wanted = *wanted || is_wanted(r, a);
    }
    return missing;
}

/*
 * Where they must agree, all are waited for; else, once there is one, only for
 * those that are about as quick.
 */
static void collect(TemplateReader *r, GPtrArray *answers)
{
    int64_t deadline = now_ms() + r->o.timeout_ms;
    bool wanted = false, quick = false;

    while (any_missing(r, answers, &wanted) && now_ms() < deadline) {
        if (wanted && r->o.has_hashes && !quick) {
            quick = true;
            deadline = MIN(deadline, now_ms() + GRACE_MS);
        }
        g_usleep(POLL_US);
    }
    for (unsigned i = 0; i < answers->len; i++) {
        Answer *a = g_ptr_array_index(answers, i);

        if (a->task) {
            answer_take(r, a);
        }
    }
}

static bool find_remote(TemplateReader *r, Error **errp)
{
    g_autoptr(GPtrArray) answers = NULL;

    if (r->o.strict && !r->o.has_hashes) {
        error_setg(errp, "Node '%s' has no copy of the template, and with "
                   "'strict' the hashes of others' are taken only with option "
                   "'hashes'", r->self->name);
        return false;
    }
    answers = ask_all(r);
    r->trust = r->o.has_hashes ? THINVM_TEMPLATE_TRUST_GIVEN
                               : THINVM_TEMPLATE_TRUST_AGREED;
    collect(r, answers);
    if (!r->o.has_hashes && !do_agree(answers, errp)) {
        return false;
    }
    return take_hashes(r, answers, errp);
}

/* ------------------------------------------------------------------ */

static bool prepare(TemplateReader *r, Error **errp)
{
    if (!zero_hash(r->chunks->chunk_size, &r->zeroes, errp) ||
        !template_chunks_root(r->chunks, &r->root, errp)) {
        return false;
    }
    for (unsigned i = 0; i < r->nb_others; i++) {
        if (!agree_on_zeroes(r, r->others[i], errp)) {
            return false;
        }
    }
    return true;
}

/*
 * The copy on this node has others than option "hashes" says.  That is right if
 * these are of chunks of another size, which a node that has them can tell.
 */
static bool are_of_other_size(TemplateReader *r)
{
    g_autoptr(GPtrArray) answers = ask_all(r);
    bool found = false;

    collect(r, answers);
    for (unsigned i = 0; i < answers->len; i++) {
        const Answer *a = g_ptr_array_index(answers, i);

        found = found || (is_wanted(r, a) &&
                          a->chunks->length == r->chunks->length &&
                          a->chunks->chunk_size != r->chunks->chunk_size);
    }
    return found;
}

bool reader_find(TemplateReader *r, Error **errp)
{
    Error *err = NULL;

    r->local = local_copy_open(r->stores, &r->o.digest, &r->chunks, &err);
    if (err) {
        warn_report_err(err);
    }
    r->replicas = replicas_new(r);
    r->trust = THINVM_TEMPLATE_TRUST_LOCAL;
    if ((!r->local && !find_remote(r, errp)) || !prepare(r, errp)) {
        return false;
    }
    if (r->o.has_hashes && !template_digest_equal(&r->root, &r->o.hashes) &&
        !are_of_other_size(r)) {
        error_setg(errp, "Option 'hashes' does not fit the copy on this node, "
                   "whose chunks have %" PRIu32 " bytes, and no node that "
                   "answers has such hashes of chunks of another size",
                   r->chunks->chunk_size);
        return false;
    }
    return true;
}
