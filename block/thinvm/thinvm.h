/*
 * thinvm driver layer: what its files share
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The driver layer knows QEMU: nodes, options, modes, migration.  The layers
 * below (store.h, state.h, format.h) do not.  Its files:
 *
 *   thinvm.c            BlockDriver: open, close, reopen, permissions, limits
 *   options.c           run-time options
 *   device.c            what the store reads and writes: a child or a backend
 *   create.c            creating images, and what size they will have
 *   create-template.c   full clones: copying a template, with marks
 *   template.c          full clones: the template that is read from
 *   change.c            resize, backing file, amend, making empty
 *   info.c              information, statistics, check
 *   driver-snapshot.c   internal snapshots
 *   io.c                the data path
 *   mode.c              the mapping-cache modes and the hand-over
 *   owner.c             claims of ownership
 *   fence.c             SCSI persistent reservations
 *   heartbeat.c         heartbeats of owners
 *   pulse.c             periodic work: heartbeats, following, preloading
 *   volume.c            free space of the device, and its growth
 *   worker.c            background commits and checkpoints
 *   thinvm-qmp.c        QMP commands
 *   migration/thinvm.c  migration and reset; in qemu-system only
 */
#ifndef BLOCK_THINVM_THINVM_H
#define BLOCK_THINVM_THINVM_H

#include "block/block-global-state.h"
#include "block/block-io.h"
#include "block/block_int.h"
#include "qapi/qapi-types-thinvm.h"
#include "qemu/cutils.h"
#include "qemu/stats64.h"
#include "store.h"

typedef struct BDRVThinvmState BDRVThinvmState;

/*
 * A change of allocation in flight on a range of guest clusters (io.c).
 * Overlapping ones wait for each other (invariant 2); plain overwrites of
 * valid parts take none.
 */
typedef struct ThinvmInflight ThinvmInflight;
typedef struct ThinvmWorker ThinvmWorker;
typedef struct ThinvmPulse ThinvmPulse;

/*
 * Snapshots: a deletion in steps (snapshot-delete.c).  Between two of them the
 * image may be drained, handed over, or written by others.
 */
typedef struct ThinvmDeletion {
    ThinvmSnapshotName name;
    uint64_t position, end; /* guest clusters passed, and in all */
    bool tried;             /* a step when nothing but children was left */
    bool waits;             /* hidden, empty, and has several children */
    bool gone;              /* the record does not exist any more */
} ThinvmDeletion;

/* One after the other, until none is left that does not wait */
typedef struct ThinvmCollect {
    uint32_t slot;          /* where to look next */
    bool active;            /* at work on del */
    bool again;             /* one has gone: another may go now */
    ThinvmDeletion del;
} ThinvmCollect;

/* options.c: what the user may set when opening and reopening */
typedef struct ThinvmOptions {
    ThinvmCacheMode mode;
    uint64_t cache_size;            /* bytes, 0: default of the image */
    uint32_t flush_interval;        /* milliseconds */
    bool force_takeover;
    ThinvmReservation reservation;
    /* The snapshot to show instead of the disk; empty: not given */
    char snapshot_id[32];
    char snapshot_name[THINVM_MAX_SNAPSHOT_NAME + 1];
    uint64_t space_watermark;       /* bytes, 0: none */
    uint32_t space_watermark_percent;
} ThinvmOptions;

/* volume.c: how the space of the volume under the image goes */
typedef struct ThinvmVolume {
    Stat64 reserved;                /* clusters, since the node was opened */
    bool low;                       /* atomic: THINVM_SPACE_LOW was sent */
    QemuMutex lock;                 /* from here on: the rate */
    int64_t sampled_ms;
    uint64_t sampled;               /* @reserved at that time */
    double mean;                    /* bytes per second */
} ThinvmVolume;

/* fence.c: the device's reservation, if it is used */
typedef struct ThinvmFence {
    CoMutex lock;                   /* one check at a time */
    bool held;                      /* qatomic */
    bool aptpl;                     /* the device can keep it over power loss */
    unsigned type;                  /* of reservation that is right here */
    void *asked;                    /* the node that has said what it can do */
    uint64_t key;
    int64_t renewed_ms;             /* when it had to be taken again, last */
    const char *reason;             /* why it is held, or not; for people */
} ThinvmFence;

/* What a read began with, when it may follow another owner (mode.c) */
typedef struct ThinvmLook {
    bool followed;
    ThinvmStore *store;
    uint64_t changes;               /* that concern what the node shows */
} ThinvmLook;

struct BDRVThinvmState {
    BlockDriverState *bs;
    ThinvmDevice device;            /* over bs->file; device.c */
    /*
     * NULL only while an open has not succeeded.  Activation replaces it,
     * at a time when no writer can be active; a request reads it once
     * (qatomic_read()) and stays with what it got.
     */
    ThinvmStore *store;
    /* Replaced stores, which requests may still use; freed when drained */
    GSList *retired;
    QemuUUID uuid;
    unsigned cluster_bits;
    uint64_t cluster_size;          /* bytes */
    uint64_t journal_size;          /* bytes */
    uint64_t compatible, readonly_compatible, incompatible; /* features */
    /* template.c: what the image remembers of its template, if it does; and
     * that template, if it was given to us.  Set at open for good */
    ThinvmTemplateId template_id;
    BdrvChild *template;
    Stat64 template_bytes, template_failures;
    int64_t template_resume_ns;     /* atomic: leave it alone until then */
    /*
     * Set where the node shows a snapshot: look-ups of the disk use its tree
     * instead of the active one, and it has its own size.  The node is
     * read-only then.
     */
    ThinvmSnapshot *view;
    ThinvmSnapshotName view_name;
    bool view_gone;                 /* atomic: has been reported */

    ThinvmCollect collect;          /* the worker's; snapshot-delete.c */
    unsigned nb_delete_jobs;        /* atomic: the worker keeps away */

    /* preallocate.c, qatomic: space is being mapped and not written */
    unsigned preallocating;

    /* io.c */
    CoMutex inflight_lock;
    QLIST_HEAD(, ThinvmInflight) inflight;
    unsigned copiers, copies_ended; /* qatomic; thinvm_inflight_may_copy() */

    /*
     * mode.c: changed in the main loop or under mode_lock, read with
     * qatomic_read() anywhere
     */
    CoMutex mode_lock;
    ThinvmCacheMode mode;           /* in force */
    bool in_migration;              /* outgoing: write-through is forced */
    bool owner;                     /* we hold the claim claim.epoch */
    bool lost;                      /* ownership lost: every write fails */
    char *lost_reason;              /* atomic; set once, after lost */
    bool cut;                       /* the end of the device is gone */
    bool follow;                    /* catch up before a look-up for reading */
    bool take_failed;               /* reported already; until one succeeds */
    bool put_down;                  /* by the user's order; mode_lock */
    bool activated;                 /* since the guest last ran; main loop */
    bool returning;                 /* unused, as the guest never ran here */

    ThinvmOptions options;

    ThinvmFence fence;              /* fence.c */

    /* owner.c: our newest claim that held, valid after the first one was made;
       and nonces of the last ones that did not, though they may be there */
    ThinvmClaim claim;
    QemuUUID failed_claims[8];
    unsigned nb_failed_claims;
    bool epoch_used;                /* another has written under claim.epoch */
    QLIST_ENTRY(BDRVThinvmState) owner_link;

    /*
     * heartbeat.c, atomic: when the look began that has last found our claim
     * in its place, by thinvm_boot_ms().  0: there is none to rely on.
     */
    int64_t claim_seen_ms;
    CoMutex claim_lock;             /* one look of those that writes wait for */
    unsigned claim_looks_failed;    /* atomic */

    ThinvmWorker *worker;           /* worker.c */
    ThinvmPulse *pulse;             /* pulse.c */
    ThinvmVolume volume;            /* volume.c */

    QTAILQ_ENTRY(BDRVThinvmState) link;     /* in thinvm_nodes */
};

/* ------------------------------------------------------------------ */
/* io.c: the data path.  The BlockDriver callbacks of the same meaning. */

void thinvm_io_init(BDRVThinvmState *s);
void thinvm_io_destroy(BDRVThinvmState *s);
int coroutine_fn GRAPH_RDLOCK
thinvm_co_preadv_part(BlockDriverState *bs, int64_t offset, int64_t bytes,
                      QEMUIOVector *qiov, size_t qiov_offset,
                      BdrvRequestFlags flags);
int coroutine_fn GRAPH_RDLOCK
thinvm_co_pwritev_part(BlockDriverState *bs, int64_t offset, int64_t bytes,
                       QEMUIOVector *qiov, size_t qiov_offset,
                       BdrvRequestFlags flags);
int coroutine_fn GRAPH_RDLOCK
thinvm_co_pwrite_zeroes(BlockDriverState *bs, int64_t offset, int64_t bytes,
                        BdrvRequestFlags flags);
int coroutine_fn GRAPH_RDLOCK
thinvm_co_pdiscard(BlockDriverState *bs, int64_t offset, int64_t bytes);
int coroutine_fn GRAPH_RDLOCK
thinvm_co_block_status(BlockDriverState *bs, bool want_zero, int64_t offset,
                       int64_t bytes, int64_t *pnum, int64_t *map,
                       BlockDriverState **file);
int coroutine_fn GRAPH_RDLOCK
thinvm_co_copy_range_from(BlockDriverState *bs, BdrvChild *src,
                          int64_t src_offset, BdrvChild *dst,
                          int64_t dst_offset, int64_t bytes,
                          BdrvRequestFlags read_flags,
                          BdrvRequestFlags write_flags);
int coroutine_fn GRAPH_RDLOCK
thinvm_co_copy_range_to(BlockDriverState *bs, BdrvChild *src,
                        int64_t src_offset, BdrvChild *dst,
                        int64_t dst_offset, int64_t bytes,
                        BdrvRequestFlags read_flags,
                        BdrvRequestFlags write_flags);
/* check: is what is marked as the template's so?  Adds to @result */
int coroutine_fn GRAPH_RDLOCK
thinvm_io_compare_template(BlockDriverState *bs, BdrvCheckResult *result);
int coroutine_fn GRAPH_RDLOCK
thinvm_co_save_vmstate(BlockDriverState *bs, QEMUIOVector *qiov, int64_t pos);
int coroutine_fn GRAPH_RDLOCK
thinvm_co_load_vmstate(BlockDriverState *bs, QEMUIOVector *qiov, int64_t pos);
/* Bytes [offset, old end) of the last cluster become zeroes; for growing */
int coroutine_fn GRAPH_RDLOCK
thinvm_io_zero_tail(BlockDriverState *bs, uint64_t old_size, Error **errp);
/* Map [offset, offset + bytes) without data: metadata, falloc, full */
int coroutine_fn GRAPH_RDLOCK
thinvm_io_preallocate(BlockDriverState *bs, uint64_t offset, uint64_t bytes,
                      PreallocMode prealloc, Error **errp);

/* ------------------------------------------------------------------ */
/* device.c                                                            */

/* Over bs->file; the graph lock is the caller's */
void thinvm_device_init_node(BDRVThinvmState *s);

/* Over a backend, which takes the graph lock itself; for creating */
typedef struct ThinvmBlkDevice {
    ThinvmDevice device;
    BlockBackend *blk;
} ThinvmBlkDevice;
void thinvm_device_init_blk(ThinvmBlkDevice *d, BlockBackend *blk);

/*
 * Can reads of the image see what another host has just written, that is, is
 * there no page cache of this host in between?
 */
bool GRAPH_RDLOCK thinvm_device_coherent(BlockDriverState *bs);
/* Is the device shorter by now than what the image uses?  By how much? */
bool coroutine_fn GRAPH_RDLOCK
thinvm_device_was_cut(BDRVThinvmState *s, int64_t *length, uint64_t *needed);
/*
 * If there is one on a shared device: take nothing out of it that is old.
 * @file: the node that an image lies on
 */
int coroutine_fn GRAPH_RDLOCK
thinvm_device_forget_cache(BlockDriverState *file, Error **errp);

/* ------------------------------------------------------------------ */
/* options.c                                                           */

#define THINVM_OPT_MODE             "mapping-cache-mode"
#define THINVM_OPT_CACHE_SIZE       "mapping-cache-size"
#define THINVM_OPT_FLUSH_INTERVAL   "mapping-flush-interval"
#define THINVM_OPT_FORCE_TAKEOVER   "force-takeover"
#define THINVM_OPT_RESERVATION      "reservation"
#define THINVM_OPT_WATERMARK        "space-watermark"
#define THINVM_OPT_WATERMARK_PERCENT "space-watermark-percent"

#define THINVM_OPT_SNAPSHOT_ID      "snapshot.id"
#define THINVM_OPT_SNAPSHOT_NAME    "snapshot.name"

/* All that may change; for reopening */
extern const char *const thinvm_mutable_options[];
static inline bool thinvm_options_snapshot(const ThinvmOptions *o)
{
    return o->snapshot_id[0] || o->snapshot_name[0];
}
/* Takes the options that are ours out of @options */
bool thinvm_options_parse(ThinvmOptions *dst, QDict *options, Error **errp);

/* ------------------------------------------------------------------ */
/* mode.c: the machine of the three mapping-cache modes                */

/*
 * Before a look-up for reading in @st, which was s->store when the request
 * began: in migration mode catches up with the owner.
 */
int coroutine_fn GRAPH_RDLOCK
thinvm_mode_begin_read(BlockDriverState *bs, ThinvmStore *st,
                       ThinvmLook *look);
/*
 * After the data arrived: in migration mode catches up again; *repeat is set
 * when the mapping may have changed, and the data must be read again.
 */
int coroutine_fn GRAPH_RDLOCK
thinvm_mode_end_read(BlockDriverState *bs, const ThinvmLook *look,
                     bool *repeat);
/*
 * Before anything that changes the image: ends migration mode (by taking
 * ownership), refuses when ownership is lost.
 */
int coroutine_fn GRAPH_RDLOCK thinvm_mode_begin_write(BlockDriverState *bs);
/*
 * The same before a change that no guest's write permission covers (of
 * snapshots, say): also finds nodes that must not write, and says why.
 */
int coroutine_fn GRAPH_RDLOCK thinvm_mode_begin_change(BlockDriverState *bs,
                                                       Error **errp);
/*
 * After an operation was executed, before the request is acknowledged: in
 * write-through mode waits for its record, in write-back mode sees to it that
 * it will be committed in time.
 */
int coroutine_fn GRAPH_RDLOCK thinvm_mode_commit(BlockDriverState *bs,
                                                 uint64_t ticket);
/*
 * The same at the end of a request, which may have executed nothing (@ticket
 * 0).  @found: it relies, for some of what it covers, on mappings as it found
 * them; whoever made them so may have done that after our last operation, and
 * their record may not be written yet.
 */
int coroutine_fn GRAPH_RDLOCK
thinvm_mode_commit_found(BlockDriverState *bs, uint64_t ticket, bool found);
int coroutine_fn GRAPH_RDLOCK thinvm_co_flush_to_os(BlockDriverState *bs);
/*
 * Something could not be written: is the image still ours?  If not, ownership
 * is lost from now on.  True: what stood in the way is gone; write it again.
 */
bool coroutine_fn GRAPH_RDLOCK thinvm_mode_write_failed(BlockDriverState *bs);

/*
 * The user's wish.  When this returns 0, the promise of @mode holds for
 * everything written before.  To migration mode: releases the image, which
 * needs the node to be drained.
 */
int coroutine_fn GRAPH_RDLOCK
thinvm_mode_configure(BlockDriverState *bs, ThinvmCacheMode mode,
                      const char *reason, Error **errp);
/* An outgoing migration begins (write-through is forced) or has ended */
int coroutine_fn GRAPH_RDLOCK
thinvm_mode_set_migrating(BlockDriverState *bs, bool migrating,
                          const char *reason, Error **errp);
/* Could we become the owner, as things are now?  Writes nothing */
int coroutine_fn GRAPH_RDLOCK
thinvm_mode_may_take(BlockDriverState *bs, bool force, Error **errp);
/*
 * Become the owner: claim, read what is on the device unless it is known to
 * be unchanged, begin to write.  @fresh: no request may be running that
 * writes; the store is opened again, not caught up.
 */
int coroutine_fn GRAPH_RDLOCK
thinvm_mode_take(BlockDriverState *bs, bool fresh, Error **errp);
/*
 * Cease to be the owner; drained.  @state: RELEASED for a hand-over (fast),
 * CLOSED otherwise (writes a checkpoint).  On error the node goes on as owner.
 */
int coroutine_fn GRAPH_RDLOCK
thinvm_mode_give_up(BlockDriverState *bs, ThinvmClaimState state,
                    const char *reason, Error **errp);
/* Ownership is lost, or could not be had where refusing is impossible */
void thinvm_mode_lose(BDRVThinvmState *s, const char *reason);
/* The same for an image whose device has lost its end; no read may believe it */
void thinvm_mode_device_cut(BDRVThinvmState *s, int64_t length,
                            uint64_t needed);
int coroutine_fn GRAPH_RDLOCK
thinvm_mode_activate(BlockDriverState *bs, Error **errp);
/* Decide at open whether a node that may not write follows an owner */
int coroutine_fn GRAPH_RDLOCK
thinvm_mode_open_reader(BlockDriverState *bs, Error **errp);
/* Free stores that were replaced; drained */
void thinvm_mode_free_retired(BDRVThinvmState *s);
/* The size of the disk that the node shows, in bytes */
uint64_t thinvm_virtual_size(BDRVThinvmState *s);
/* Up to where the image uses its device, in bytes */
uint64_t thinvm_device_end(BDRVThinvmState *s);

/*
 * Asked when an activation fails: must it succeed all the same, because the
 * guest will be started regardless?  NULL (tools): never.
 */
extern bool (*thinvm_activation_must_succeed)(void);
/* Told when one has failed.  NULL (tools): nobody needs to know */
extern void (*thinvm_activation_failed)(void);
/*
 * Has the guest of this process been handed to a migration, completed or not,
 * so that another process may have run it since?  NULL (tools): never.
 */
extern bool (*thinvm_guest_was_sent_away)(void);

/* ------------------------------------------------------------------ */
/* owner.c: claims                                                     */

typedef enum ThinvmOwnerKind {
    THINVM_OWNER_NONE,      /* never claimed, released or closed */
    THINVM_OWNER_GONE,      /* its process, on this host, ended */
    THINVM_OWNER_REBOOTED,  /* so did its boot of this host, unless that is
                               another host of the same name */
    THINVM_OWNER_OURS,      /* the claim of @self, or one it has given up */
    THINVM_OWNER_NODE,      /* another node of this process */
    THINVM_OWNER_OTHER,     /* another process or host, maybe alive */
    THINVM_OWNER_UNKNOWN,   /* the newest claim cannot be judged */
} ThinvmOwnerKind;

typedef struct ThinvmOwnerView {
    ThinvmOwnerKind kind;
    ThinvmClaim newest;     /* if there was one that could be read */
    uint64_t newest_epoch;  /* 0: none */
    bool unchanged;         /* newest is @self's: nobody owned it since */
    bool this_host;         /* OTHER: a process of this host, which runs */
    /* OTHER, REBOOTED: its heartbeat, if thinvm_owner_watch() could read it */
    bool watched, moved;
    bool beat;              /* it has written any */
    uint64_t counter, unchanged_ms;
    bool used_since;        /* an owner after @self may have run a guest */
    bool has_end;           /* it told where its journal ended: */
    ThinvmRelease end;
} ThinvmOwnerView;

/*
 * Read all claims and judge the newest, past this host's page cache unless
 * @self, which may be NULL, is the owner
 */
int coroutine_fn thinvm_owner_look(ThinvmDevice *dev, const QemuUUID *uuid,
                                   BDRVThinvmState *self,
                                   ThinvmOwnerView *view, Error **errp);
/*
 * If the superblocks do not tell: the image that the claims are about.  All
 * zeroes: there are none.
 */
int coroutine_fn thinvm_owner_image(ThinvmDevice *dev, QemuUUID *uuid,
                                    Error **errp);
/*
 * Watch the heartbeat of the owner in @view, where that is needed to judge or
 * to tell about it.  May take seconds.
 */
void coroutine_fn thinvm_owner_watch(ThinvmDevice *dev, const QemuUUID *uuid,
                                     ThinvmOwnerView *view, bool force);
/*
 * The same for those who do not want to own the image: REBOOTED becomes GONE,
 * or, while it is not known to be, OTHER.
 */
void coroutine_fn thinvm_owner_settle(ThinvmDevice *dev, const QemuUUID *uuid,
                                      ThinvmOwnerView *view);
/*
 * May the image be owned, going by @view?  If not, says who holds it and what
 * can be done.  @force: the user has ordered a take-over.
 */
bool thinvm_owner_may_take(const ThinvmOwnerView *view, bool force,
                           Error **errp);
/*
 * Reserve the device where that can be had, then write a claim of @epoch,
 * durably, and see that it is there.  @newest: the claim that was found.
 */
int coroutine_fn GRAPH_RDLOCK
thinvm_owner_claim(BDRVThinvmState *s, uint64_t epoch,
                   const ThinvmClaim *newest, Error **errp);
/* @end: where the next owner must find the journal's end, or NULL */
int coroutine_fn GRAPH_RDLOCK
thinvm_owner_release(BDRVThinvmState *s, ThinvmClaimState state,
                     const ThinvmRelease *end, Error **errp);
/* Has a process of this host ended? */
bool thinvm_owner_process_ended(uint32_t pid);
/* The name of the host that made @claim, fit to be shown; g_free() it */
char *thinvm_owner_host(const ThinvmClaim *claim);
/* @errp: our claim is no longer the newest, but @newest is */
void thinvm_owner_describe_displaced(BDRVThinvmState *s,
                                     const ThinvmClaim *newest, Error **errp);
/* Forget the claim without writing */
void thinvm_owner_drop(BDRVThinvmState *s);
/* Is the newest claim on the device ours? -EPERM if not */
int coroutine_fn thinvm_owner_verify(BDRVThinvmState *s, Error **errp);

/* ------------------------------------------------------------------ */
/* heartbeat.c: is the claim still ours?                               */

/*
 * For so long a look at the claim counts.  Longer than from one heartbeat to
 * the next, which look anyway; shorter than a forced take-over watches a
 * counter that stands, so whoever was frozen for long enough to be displaced
 * looks again before he writes.
 */
#define THINVM_CLAIM_COUNTS_MS  4000

/* A clock that goes on while the process is stopped, or the host suspended */
static inline int64_t thinvm_boot_ms(void)
{
    struct timespec now;

#ifdef CLOCK_BOOTTIME
    clock_gettime(CLOCK_BOOTTIME, &now);
#else
    clock_gettime(CLOCK_MONOTONIC, &now);
#endif
    return now.tv_sec * 1000LL + now.tv_nsec / SCALE_MS;
}

static inline bool thinvm_claim_seen_lately(BDRVThinvmState *s)
{
    int64_t seen = qatomic_read(&s->claim_seen_ms);

    return !seen || thinvm_boot_ms() - seen < THINVM_CLAIM_COUNTS_MS;
}

/* Look again.  False: it is not, and ownership is lost; or nobody can tell */
bool coroutine_fn GRAPH_RDLOCK thinvm_claim_confirm(BDRVThinvmState *s);

/*
 * Right before a write to the device, of data or metadata.  Costs one look at
 * the clock, unless that says that the claim was not looked at for too long.
 */
static inline bool coroutine_fn GRAPH_RDLOCK
thinvm_claim_counts(BDRVThinvmState *s)
{
    return likely(thinvm_claim_seen_lately(s)) || thinvm_claim_confirm(s);
}

/* ------------------------------------------------------------------ */
/* worker.c: the background coroutine of an image: commits each        */
/* flush_interval, checkpoints, reclaims; does nothing while drained   */

void thinvm_worker_init(BDRVThinvmState *s);
void thinvm_worker_destroy(BDRVThinvmState *s);     /* drained */
void thinvm_worker_attach(BDRVThinvmState *s, AioContext *ctx);
void thinvm_worker_detach(BDRVThinvmState *s);      /* drained */
void thinvm_worker_drain_end(BDRVThinvmState *s);
/* Until it is resumed nothing is done; in the node's AioContext */
void coroutine_fn thinvm_worker_stop(BDRVThinvmState *s);
void thinvm_worker_resume(BDRVThinvmState *s);
/* There are operations that a commit within flush_interval must cover */
void thinvm_worker_arm(BDRVThinvmState *s);         /* any thread */
void thinvm_worker_kick(void *opaque);              /* any thread */
/* The image was just taken over: its last owner may have left work undone */
void thinvm_worker_owner_changed(BDRVThinvmState *s);
/* A snapshot was deleted, or a job no longer does it: finish in steps */
void thinvm_worker_collect_soon(BDRVThinvmState *s);
bool thinvm_worker_has_to_collect(BDRVThinvmState *s);

/* ------------------------------------------------------------------ */
/* volume.c: the volume under the image, and its growth; all in bytes   */

typedef struct ThinvmSpace {
    uint64_t size, free;
    uint64_t watermark;             /* 0: none */
    uint64_t rate;                  /* allocated lately, per second */
    uint64_t wanted;                /* size that the device should have */
    bool low;
} ThinvmSpace;

void thinvm_volume_init(BDRVThinvmState *s);
void thinvm_volume_destroy(BDRVThinvmState *s);
/* Any context */
void thinvm_volume_space(BDRVThinvmState *s, ThinvmSpace *space);
/* thinvm_store_reserve() that watches the free space, and tells */
int coroutine_fn thinvm_volume_reserve(BDRVThinvmState *s, ThinvmStore *st,
                                       uint64_t goal, uint64_t max,
                                       uint64_t *first, uint64_t *nb_clusters);
/* With each tick of the worker */
void coroutine_fn GRAPH_RDLOCK thinvm_volume_tick(BDRVThinvmState *s);
/* There may be more free space than before.  Any context */
void thinvm_volume_rearm(BDRVThinvmState *s);
/* thinvm-grow; @size 0: take what there is.  Main loop */
int thinvm_volume_grow(BlockDriverState *bs, uint64_t size, Error **errp);
/* thinvm-shrink; @size 0: as far as possible.  Main loop */
int thinvm_volume_shrink(BlockDriverState *bs, uint64_t size, Error **errp);
/* Behind the last cluster in use, in bytes; false: not known.  Main loop */
bool thinvm_volume_high_water(BlockDriverState *bs, uint64_t *bytes);

/* ------------------------------------------------------------------ */
/* The other callbacks, by file                                        */

/* create.c */
extern QemuOptsList thinvm_create_opts;
int coroutine_fn GRAPH_UNLOCKED
thinvm_co_create(BlockdevCreateOptions *opts, Error **errp);
int coroutine_fn GRAPH_UNLOCKED
thinvm_co_create_opts(BlockDriver *drv, const char *filename, QemuOpts *opts,
                      Error **errp);
BlockMeasureInfo *thinvm_measure(QemuOpts *opts, BlockDriverState *in_bs,
                                 Error **errp);

/* create-template.c */

/*
 * Copy @template to the image on @file, which has just been created, and
 * complete @id.  @digest: the contents must have that one, unless NULL.
 */
int coroutine_fn GRAPH_UNLOCKED
thinvm_create_copy(BlockDriverState *file, BlockBackend *template,
                   const ThinvmTemplateId *id, const uint8_t *digest,
                   Error **errp);
/* Is the image on this node being filled by thinvm_create_copy()? */
bool thinvm_create_is_copying(BlockDriverState *file);

/* template.c */

/* "sha256:" and 64 digits, to 32 bytes; and back */
bool thinvm_template_parse(const char *text, uint8_t *digest, Error **errp);
char *thinvm_template_name(const uint8_t *digest);
static inline bool thinvm_template_hash_known(const uint8_t *hash)
{
    return !buffer_is_zero(hash, THINVM_TEMPLATE_HASH_SIZE);
}
/*
 * What can be told of a template without reading it: its length, what its
 * node says of its digest (else zeroes), what a boot cache knows it by
 */
int GRAPH_RDLOCK thinvm_template_identify(BdrvChild *child,
                                          ThinvmTemplateId *id, Error **errp);
/* Take option "template" */
int GRAPH_UNLOCKED thinvm_template_open(BlockDriverState *bs, QDict *options,
                                        Error **errp);
/* Is it the image's?  If not, says why */
int GRAPH_RDLOCK thinvm_template_check(BlockDriverState *bs, Error **errp);
void GRAPH_RDLOCK thinvm_template_perm(uint64_t *nperm, uint64_t *nshared);
/* What qemu-img info tells; NULL: none */
ThinvmCloneTemplate *thinvm_template_info(BDRVThinvmState *s);

/* info.c: what else the disk may be known by while nobody writes it */
typedef struct ThinvmContents {
    QemuUUID uuid;
    uint64_t snapshot_id;           /* the node shows that one; 0: none, and */
    uint64_t snapshot_sec, snapshot_nsec;
    uint64_t epoch, sequence;       /* of the journal's last record, and the */
    uint64_t claim_epoch;           /* newest claim, which every writer makes */
    QemuUUID claim_nonce;           /* anew; 0: none so far */
} ThinvmContents;
/*
 * The same for every node, on every host, that shows the same contents; never
 * the same for others, also not for those of a copy of the device that was
 * written since.  (The backing file, if there is one, is not part of it.)
 * -EBUSY: somebody may be writing the image.
 */
int coroutine_mixed_fn GRAPH_RDLOCK
thinvm_contents(BlockDriverState *bs, ThinvmContents *c, Error **errp);

/* change.c */
extern QemuOptsList thinvm_amend_opts;
int coroutine_fn GRAPH_RDLOCK
thinvm_co_truncate(BlockDriverState *bs, int64_t offset, bool exact,
                   PreallocMode prealloc, BdrvRequestFlags flags,
                   Error **errp);
int coroutine_fn GRAPH_RDLOCK
thinvm_co_change_backing_file(BlockDriverState *bs, const char *backing_file,
                              const char *backing_fmt);
int GRAPH_RDLOCK thinvm_make_empty(BlockDriverState *bs);
int GRAPH_RDLOCK
thinvm_amend_options(BlockDriverState *bs, QemuOpts *opts,
                     BlockDriverAmendStatusCB *status_cb, void *cb_opaque,
                     bool force, Error **errp);

/* info.c */
int coroutine_fn GRAPH_RDLOCK thinvm_co_get_info(BlockDriverState *bs,
                                                 BlockDriverInfo *bdi);
ImageInfoSpecific * GRAPH_RDLOCK
thinvm_get_specific_info(BlockDriverState *bs, Error **errp);
BlockStatsSpecific *thinvm_get_specific_stats(BlockDriverState *bs);
int coroutine_fn GRAPH_RDLOCK
thinvm_co_check(BlockDriverState *bs, BdrvCheckResult *result,
                BdrvCheckMode fix);
/* All but the node's name; the caller frees it */
ThinvmInfo *thinvm_info(BDRVThinvmState *s);

/* driver-snapshot.c */
int GRAPH_RDLOCK thinvm_snapshot_create(BlockDriverState *bs,
                                        QEMUSnapshotInfo *sn_info);
int GRAPH_UNLOCKED thinvm_snapshot_goto(BlockDriverState *bs,
                                        const char *snapshot_id);
int GRAPH_RDLOCK thinvm_snapshot_delete(BlockDriverState *bs,
                                        const char *snapshot_id,
                                        const char *name, Error **errp);
int GRAPH_RDLOCK thinvm_snapshot_list(BlockDriverState *bs,
                                      QEMUSnapshotInfo **psn_tab);
/* Go on with deletions; at most *@budget steps, none left: there is more */
int coroutine_fn GRAPH_RDLOCK
thinvm_snapshot_collect(BlockDriverState *bs, unsigned *budget, Error **errp);
int coroutine_mixed_fn GRAPH_RDLOCK
thinvm_snapshot_load_tmp(BlockDriverState *bs, const char *snapshot_id,
                         const char *name, Error **errp);
/* -EIO, and a message, if the snapshot that the node shows was deleted */
int coroutine_fn thinvm_snapshot_still_there(BlockDriverState *bs,
                                             ThinvmStore *st);

/* thinvm.c: the list of all open nodes; main loop only */
typedef QTAILQ_HEAD(ThinvmNodeList, BDRVThinvmState) ThinvmNodeList;
extern ThinvmNodeList thinvm_nodes;

/*
 * Run @fn in a coroutine of the node's AioContext, with the graph lock, and
 * wait for it; directly if in a coroutine already.  thinvm.c
 */
typedef int coroutine_fn (*ThinvmCoFn)(BlockDriverState *bs, void *opaque,
                                       Error **errp);
int coroutine_mixed_fn thinvm_run(BlockDriverState *bs, ThinvmCoFn fn,
                                  void *opaque, Error **errp);

#endif
