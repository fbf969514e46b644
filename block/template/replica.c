/*
 * thinvm template store: which copy a chunk is read from
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See reader.h.  Nothing that was read is passed on before its hash is right
 * (T2).
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qapi/util.h"
#include "qemu/bitmap.h"
#include "reader.h"
#include "remote.h"

/* ------------------------------------------------------------------ */
/* The list                                                            */

static void replica_free(gpointer opaque)
{
    Replica *p = opaque;

    g_free(p->place);
    g_free(p->problem);
    g_free(p);
}

GPtrArray *replicas_new(const TemplateReader *r)
{
    GPtrArray *replicas = g_ptr_array_new_with_free_func(replica_free);
    Replica *p = g_new(Replica, 1);

    *p = (Replica) {
        .node = r->self,
        .local = true,
        .usable = r->local,
        .place = g_strdup(r->local ? r->local->path : r->self->name),
    };
    g_ptr_array_add(replicas, p);
    return replicas;
}

ThinvmTemplateReplicaList *replicas_describe(TemplateReader *r)
{
    ThinvmTemplateReplicaList *list = NULL, **tail = &list;

    for (unsigned i = 0; i < r->replicas->len; i++) {
        Replica *p = g_ptr_array_index(r->replicas, i);
        ThinvmTemplateReplica *d = g_new(ThinvmTemplateReplica, 1);

        *d = (ThinvmTemplateReplica) {
            .place = g_strdup(p->place),
            .cluster_node = g_strdup(p->node->name),
            .local = p->local,
            .usable = p->usable,
            .problem = g_strdup(p->problem),
            .bytes = p->bytes,
            .wrong_chunks = p->wrong_chunks,
            .failures = p->failures,
        };
        QAPI_LIST_APPEND(tail, d);
    }
    return list;
}

LocalCopy *reader_local(TemplateReader *r)
{
    QEMU_LOCK_GUARD(&r->lock);

    return r->local ? local_copy_ref(r->local) : NULL;
}

/* ------------------------------------------------------------------ */
/* Fetching                                                            */

static bool is_right(TemplateReader *r, uint64_t n, const uint8_t *buf)
{
    TemplateDigest hash;

    return template_sha256(buf, template_chunk_bytes(r->chunks, n), &hash,
                           NULL) &&
           template_digest_equal(&hash, &r->chunks->hashes[n]);
}

static bool fetch_local(TemplateReader *r, LocalCopy *copy, uint64_t n,
                        uint8_t *buf)
{
    uint32_t bytes = template_chunk_bytes(r->chunks, n);
    Replica *p = g_ptr_array_index(r->replicas, 0);
    bool right = template_pread(copy->fd, buf, bytes,
                                n * r->chunks->chunk_size) &&
                 is_right(r, n, buf);

    WITH_QEMU_LOCK_GUARD(&r->lock) {
        p->bytes += bytes;
        p->wrong_chunks += !right;
    }
    stat64_add(&r->stats.local_bytes, bytes);
    if (right) {
        stat64_add(&r->stats.verified_chunks, 1);
        set_bit_atomic(n, copy->verified);
    } else {
        stat64_add(&r->stats.wrong_chunks, 1);
        set_bit_atomic(n, copy->wrong);
    }
    return right;
}

int reader_fetch(TemplateReader *r, uint64_t n, uint8_t *buf)
{
    LocalCopy *copy = reader_local(r);
    bool ok = copy && fetch_local(r, copy, n, buf);

    local_copy_unref(copy);
    return ok ? 0 : -EIO;
}
