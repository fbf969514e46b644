/*
 * thinvm driver layer: what a node does while it owns, or follows an owner
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 *   fence.c       SCSI persistent reservations
 *   pulse.c       the periodic work of a node: an owner's heartbeats, a
 *                 follower's catching up and preloading
 *   heartbeat.c   heartbeats: writing one's own, watching another's, and
 *                 looking whether one's own claim still stands
 *   hotlist.c     the owner tells followers which leaves he uses most
 *
 * mode.c and owner.c decide; what is here tells them, and does the work that
 * takes time.
 */
#ifndef BLOCK_THINVM_HANDOVER_H
#define BLOCK_THINVM_HANDOVER_H

#include "thinvm.h"

/* An owner's counter rises this often, milliseconds */
#define THINVM_HEARTBEAT_MS         2000
/* One that stood for so long is taken for dead, or paused */
#define THINVM_HEARTBEAT_DEAD_MS    (2 * THINVM_HEARTBEAT_MS + 1000)

/* ------------------------------------------------------------------ */
/* heartbeat.c                                                         */

/* Another's heartbeat, as we have seen it on our own monotonic clock */
typedef struct ThinvmBeat {
    bool known;                 /* the owner has written one */
    uint64_t counter;
    uint64_t unchanged_ms;      /* that we have seen it stand */
} ThinvmBeat;

/* Write the next heartbeat of the claim that we hold */
int coroutine_fn thinvm_heartbeat_write(BDRVThinvmState *s, uint64_t counter);
/*
 * Look at the blocks in which a claim that displaces ours would be.  0: ours
 * stands; -EPERM with @errp: it does not; else it could not be read.
 */
int coroutine_fn thinvm_heartbeat_check_claim(BDRVThinvmState *s,
                                              Error **errp);
/* The same; that ours stands is remembered, for thinvm_claim_counts() */
int coroutine_fn thinvm_claim_look(BDRVThinvmState *s, Error **errp);
/* What the owner of @claim has written.  Remembers since when it stands */
int coroutine_fn thinvm_heartbeat_look(ThinvmDevice *dev, const QemuUUID *uuid,
                                       const ThinvmClaim *claim,
                                       ThinvmBeat *beat);
/*
 * Watch it until it moves, or has stood for long enough to be sure that it
 * does not.  1: it moved; 0: it stands; negative errno: it cannot be read.
 */
int coroutine_fn thinvm_heartbeat_watch(ThinvmDevice *dev,
                                        const QemuUUID *uuid,
                                        const ThinvmClaim *claim,
                                        ThinvmBeat *beat);

/* ------------------------------------------------------------------ */
/* hotlist.c                                                           */

/* Zeroes to begin with */
typedef struct ThinvmHotList {
    uint64_t number;            /* of the last list written, or read */
    QemuUUID nonce;             /* of the claim whose list was read */
    /* the owner */
    bool sampling;              /* at work on a list */
    uint64_t next_leaf;
    GArray *found;              /* of ThinvmHotLeaf */
    uint32_t written_crc;
    /* the follower: what was read last */
    uint32_t *leaf;
    unsigned nb;
} ThinvmHotList;

/* The owner's heartbeat number @beat: perhaps a list is due */
void thinvm_hot_beat(BDRVThinvmState *s, ThinvmHotList *h, uint64_t beat);
/* One bounded step of making and writing it.  Whether there are more */
bool coroutine_fn GRAPH_RDLOCK thinvm_hot_step(BDRVThinvmState *s,
                                               ThinvmHotList *h);
/* The follower: is there a new list of @owner's?  Then it is h->leaf[] */
bool coroutine_fn GRAPH_RDLOCK thinvm_hot_read(BDRVThinvmState *s,
                                               ThinvmHotList *h,
                                               const ThinvmClaim *owner);
void thinvm_hot_destroy(ThinvmHotList *h);

/* ------------------------------------------------------------------ */
/* fence.c                                                             */

/*
 * Reserve the device for the owner who is going to write @claim, or find that
 * this cannot be had (0, unless the user insists).  @newest: the claim that
 * was found, whose owner may be displaced.  Of who has a reservation already,
 * @claim's nonce may be changed.
 */
int coroutine_fn GRAPH_RDLOCK thinvm_fence_take(BDRVThinvmState *s,
                                                ThinvmClaim *claim,
                                                const ThinvmClaim *newest,
                                                Error **errp);
void coroutine_fn GRAPH_RDLOCK thinvm_fence_release(BDRVThinvmState *s);
/* What the device says that it has, asked just now.  0 or negative errno */
int coroutine_fn GRAPH_RDLOCK thinvm_scsi_capacity(BlockDriverState *device,
                                                   uint64_t *bytes);
/*
 * 0: as it was, or not used.  1: it had to be taken again just now, so writes
 * may have failed that will not again.  -EPERM: another has it.
 */
int coroutine_fn GRAPH_RDLOCK thinvm_fence_check(BDRVThinvmState *s);
/*
 * Is each of our writes seen by all who look once it has completed, and are
 * those of others refused?
 */
bool GRAPH_RDLOCK thinvm_fence_orders(BDRVThinvmState *s);
/* A follower asks beforehand what the switch would have to wait for */
void coroutine_fn GRAPH_RDLOCK thinvm_fence_prepare(BDRVThinvmState *s,
                                                    const ThinvmClaim *newest);
/* End the reservation of an owner who is no more; for creating over it */
int coroutine_fn GRAPH_RDLOCK thinvm_fence_clear(BlockDriverState *file,
                                                 const ThinvmClaim *newest,
                                                 Error **errp);
/* What protects the image from others, and why that */
ThinvmFencing thinvm_fence_kind(BDRVThinvmState *s, const char **reason);

/* ------------------------------------------------------------------ */
/* pulse.c                                                             */

void thinvm_pulse_init(BDRVThinvmState *s);
void thinvm_pulse_destroy(BDRVThinvmState *s);      /* drained */
void thinvm_pulse_attach(BDRVThinvmState *s, AioContext *ctx);
void thinvm_pulse_detach(BDRVThinvmState *s);       /* drained */
void thinvm_pulse_drain_end(BDRVThinvmState *s);
/* The node has become an owner or a follower.  Any thread */
void thinvm_pulse_kick(BDRVThinvmState *s);
/* The node has handed its image over, and may follow in a second */
void thinvm_pulse_released(BDRVThinvmState *s);
/* The newest claim was read.  Any thread */
void thinvm_pulse_saw_claim(BDRVThinvmState *s, const ThinvmClaim *claim);
/* The node took ownership.  @start: of that, by qemu_clock_get_ns(REALTIME);
   @read: bytes of metadata that it read */
void thinvm_pulse_took(BDRVThinvmState *s, bool warm, int64_t start,
                       uint64_t read);
/* Fill in what all this tells */
void thinvm_pulse_info(BDRVThinvmState *s, ThinvmInfo *dst);

#endif
