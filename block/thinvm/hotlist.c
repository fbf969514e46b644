/*
 * thinvm driver layer: the owner tells followers what is hot
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Where the mapping cache of a follower cannot hold all of the mapping, it is
 * to hold, when the follower takes over, what the guest uses.  So the owner
 * writes a list of the leaves that it uses most (heat.c) to a place of its
 * own on the device (format.h), now and then and more often while it is being
 * migrated; a follower reads it and preloads these leaves before all others.
 *
 * The list is a hint.  It is not flushed, and one that is torn, of another
 * owner, or missing is no list.  Only the owner writes it (invariant 6); if a
 * late write of one that was displaced lands there after all, the claim's
 * nonce tells.
 *
 * Threads: owned by the pulse of a node (pulse.c), in whose coroutine all of
 * this runs.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qapi/qapi-types-block-core.h"
#include "handover.h"
#include "trace.h"

/*
 * Without a migration: with the first heartbeats, and then every half minute.
 * It is no more than a walk over the cache and at most 64 KiB written.
 */
#define THINVM_HOT_BEATS        16
/* Pages of level 1, each with 256 leaves, between two looks at other work */
#define THINVM_HOT_STEPS        16

/* ------------------------------------------------------------------ */
/* The owner                                                           */

void thinvm_hot_beat(BDRVThinvmState *s, ThinvmHotList *h, uint64_t beat)
{
    /* 1, 2, 4, 8, then each THINVM_HOT_BEATS */
    bool due = beat % THINVM_HOT_BEATS == 0 ||
               (beat < THINVM_HOT_BEATS && is_power_of_2(beat));

    if (h->sampling || !(due || qatomic_read(&s->in_migration))) {
        return;
    }
    if (!h->found) {
        h->found = g_array_new(false, false, sizeof(ThinvmHotLeaf));
    }
    g_array_set_size(h->found, 0);
    h->next_leaf = 0;
    h->sampling = true;
}

static void coroutine_fn GRAPH_RDLOCK
thinvm_hot_write(BDRVThinvmState *s, ThinvmHotList *h)
{
    unsigned nb = MIN(h->found->len, THINVM_MAX_HOT);
    g_autofree uint32_t *leaf = g_new(uint32_t, nb + 1);
    g_autofree ThinvmHotLe *le = g_malloc(thinvm_hot_bytes(nb));
    ThinvmHotHeader header = {
        .epoch = s->claim.epoch,
        .nonce = s->claim.nonce,
        .number = h->number + 1,
        .nb_leaves = nb,
    };
    ThinvmDevice *dev = &s->device;
    uint32_t crc;
    int ret;

    thinvm_heat_sort(h->found);
    for (unsigned i = 0; i < nb; i++) {
        leaf[i] = g_array_index(h->found, ThinvmHotLeaf, i).leaf;
    }
    crc = thinvm_checksum(&s->claim.nonce, THINVM_SUM_HOT, 0, leaf, nb * 4);
    if (!nb || crc == h->written_crc) {
        return;                 /* nothing new */
    }
    thinvm_hot_encode(&s->uuid, le, &header, leaf);
    thinvm_device_event(dev, BLKDBG_THINVM_HEARTBEAT_WRITE);
    ret = dev->co_pwrite(dev, THINVM_HOT_OFFSET, thinvm_hot_bytes(nb), le);
    trace_thinvm_hot_write(s->bs, header.number, nb, ret);
    if (ret >= 0) {
        h->number = header.number;
        h->written_crc = crc;
    }
}

bool coroutine_fn thinvm_hot_step(BDRVThinvmState *s, ThinvmHotList *h)
{
    ThinvmState *state;
    bool more = true;

    if (!h->sampling) {
        return false;
    }
    state = thinvm_store_state(s->store);
    for (int i = 0; i < THINVM_HOT_STEPS && more; i++) {
        thinvm_state_lock(state);
        more = thinvm_state_sample_heat(state, &h->next_leaf, h->found);
        thinvm_state_unlock(state);
    }
    if (more) {
        qemu_co_sleep_ns(QEMU_CLOCK_REALTIME, 0);       /* others' turn */
        return true;
    }
    h->sampling = false;
    thinvm_hot_write(s, h);
    return false;
}

/* ------------------------------------------------------------------ */
/* The follower                                                        */

static bool thinvm_hot_is_new(const ThinvmHotList *h,
                              const ThinvmHotHeader *header,
                              const ThinvmClaim *owner)
{
    return header->epoch == owner->epoch &&
           qemu_uuid_is_equal(&header->nonce, &owner->nonce) &&
           (header->number != h->number ||
            !qemu_uuid_is_equal(&header->nonce, &h->nonce));
}

bool coroutine_fn thinvm_hot_read(BDRVThinvmState *s, ThinvmHotList *h,
                                  const ThinvmClaim *owner)
{
    g_autofree ThinvmHotLe *le = g_malloc(THINVM_HOT_SIZE);
    ThinvmDevice *dev = &s->device;
    g_autofree uint32_t *leaf = NULL;
    ThinvmHotHeader header;

    thinvm_device_event(dev, BLKDBG_THINVM_HEARTBEAT_READ);
    if (dev->co_pread(dev, THINVM_HOT_OFFSET, THINVM_PAGE_SIZE, le) < 0 ||
        thinvm_hot_decode_header(&s->uuid, &header, le) < 0 ||
        !thinvm_hot_is_new(h, &header, owner)) {
        return false;
    }
    /* Header and leaves in one read: the owner may be writing the next list */
    if (dev->co_pread(dev, THINVM_HOT_OFFSET, THINVM_HOT_SIZE, le) < 0) {
        return false;
    }
    leaf = g_new(uint32_t, THINVM_MAX_HOT);
    if (thinvm_hot_decode(&s->uuid, &header, leaf, le) < 0 ||
        !thinvm_hot_is_new(h, &header, owner)) {
        return false;           /* look again next time */
    }
    g_free(h->leaf);
    h->leaf = g_steal_pointer(&leaf);
    h->nb = header.nb_leaves;
    h->number = header.number;
    h->nonce = header.nonce;
    trace_thinvm_hot_read(s->bs, header.number, h->nb);
    return true;
}

void thinvm_hot_destroy(ThinvmHotList *h)
{
    if (h->found) {
        g_array_free(h->found, true);
    }
    g_free(h->leaf);
}
