/*
 * thinvm driver layer: claims of ownership
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Reads, judges and writes the claim blocks (format.h).  Whoever wants to
 * write an image first makes a claim here: its epoch is one more than that of
 * the newest claim, its slot is the epoch's, so that a late write of an
 * earlier owner can only hit its own slot.
 *
 * Life of a claim, by the functions that change it:
 *
 *     (none) --thinvm_owner_claim--> ACTIVE
 *     ACTIVE --thinvm_owner_release--> RELEASED   hand-over
 *     ACTIVE --thinvm_owner_release--> CLOSED     the node was closed
 *     ACTIVE --thinvm_owner_release--> RETURNED   hand-over undone: the guest
 *                                                 never ran here
 *
 * An ACTIVE claim whose process ended without releasing stays as it is; the
 * next one to look recognises it as GONE if it is of this host and its process
 * is no more; as REBOOTED if it is of another boot of this host.  The claim of
 * another host can only be released by that host, or overridden by the
 * operator (force-takeover), who knows what we cannot: that the host was
 * fenced.
 *
 * Even then not while the owner's heartbeat moves: it was not fenced.  Nor is
 * the claim of another boot taken then: two hosts made from one image, with
 * its machine id and its name, are one to us.
 *
 * Invariant 6: only the owner writes.  A claim is durable, and was read back,
 * before thinvm_owner_claim() returns.  Where a reservation keeps everybody
 * else from writing, and no cache lies in between (thinvm_fence_orders()),
 * there is nothing to be found by reading, and the flush is left to the one
 * that thinvm_store_begin_writing() issues before its first write.
 *
 * Everything about this host comes from files below /etc and /proc, from
 * kill(pid, 0) and statfs(), so it works for any user and inside QEMU's sandbox.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qapi/qapi-types-block-core.h"
#include "qemu/cutils.h"
#include "qemu/lockable.h"
#include "handover.h"
#include "trace.h"
#ifdef CONFIG_LINUX
#include <linux/magic.h>
#include <sys/vfs.h>
#endif

/*
 * How long a claim must stand where nothing else decides a race, if it was
 * written in half of that; and where it may have replaced that of an owner who
 * was not waiting any more: until he has looked at it, and knows.
 */
#define THINVM_LEASE_MS         1000
#define THINVM_LEASE_SLOW_MS    (THINVM_LEASE_MS + THINVM_HEARTBEAT_MS)
#define THINVM_CLAIM_AREA   (THINVM_NB_CLAIMS * THINVM_PAGE_SIZE)

/* Claims that nodes of this process hold */
static QemuMutex thinvm_owner_lock;
static QLIST_HEAD(, BDRVThinvmState) thinvm_owner_nodes =
    QLIST_HEAD_INITIALIZER(thinvm_owner_nodes);

static void __attribute__((constructor)) thinvm_owner_module_init(void)
{
    qemu_mutex_init(&thinvm_owner_lock);
}

/* ------------------------------------------------------------------ */
/* Who are we                                                          */

static void thinvm_hash_to_uuid(const char *text, QemuUUID *uuid)
{
    g_autoptr(GChecksum) sum = g_checksum_new(G_CHECKSUM_SHA256);
    uint8_t digest[32];
    gsize size = sizeof(digest);

    g_checksum_update(sum, (const guchar *)text, strlen(text));
    g_checksum_get_digest(sum, digest, &size);
    memcpy(uuid->data, digest, sizeof(uuid->data));
}

static char *thinvm_read_line(const char *path)
{
    g_autofree char *text = NULL;

    if (!g_file_get_contents(path, &text, NULL, NULL)) {
        return NULL;
    }
    g_strstrip(text);
    return *text ? g_steal_pointer(&text) : NULL;
}

static void thinvm_boot_id(QemuUUID *id)
{
    g_autofree char *text =
        thinvm_read_line("/proc/sys/kernel/random/boot_id");

    if (!text || qemu_uuid_parse(text, id) < 0) {
        memset(id, 0, sizeof(*id));
    }
}

/*
 * Two claims with the same host id are believed to see each other's
 * processes.  So besides the machine id (which careless cloning duplicates)
 * the host's name goes in, and the PID namespace unless it is the host's own:
 * from another container a process that runs looks as if it were gone.
 * Wherever in doubt, different ids: that only costs the operator a
 * force-takeover after a crash.
 */
static void thinvm_host_id(QemuUUID *id)
{
    g_autofree char *machine = thinvm_read_line("/etc/machine-id");
    g_autofree char *dmi = NULL;
    g_autofree char *boot = NULL;
    g_autofree char *ns = g_file_read_link("/proc/self/ns/pid", NULL);
    g_autofree char *text = NULL;

    if (!machine) {
        dmi = thinvm_read_line("/sys/class/dmi/id/product_uuid");
    }
    if (!machine && !dmi) {
        boot = thinvm_read_line("/proc/sys/kernel/random/boot_id");
    }
    if (!machine && !dmi && !boot) {
        qemu_uuid_generate(id);
        return;
    }
    /* The inode number of the initial namespace is fixed in the kernel */
    if (ns && !strcmp(ns, "pid:[4026531836]")) {
        *ns = '\0';
    }
    text = g_strdup_printf("thinvm host %s %s %s",
                           machine ?: dmi ?: boot, g_get_host_name(),
                           ns ?: "");
    thinvm_hash_to_uuid(text, id);
}

typedef struct ThinvmProcess {
    uint64_t start;         /* clock ticks since boot; 0: unknown */
    bool zombie;            /* all of its threads have ended */
} ThinvmProcess;

/* False: /proc does not tell (it may be mounted so that it hides others) */
static bool thinvm_process_look(uint32_t pid, ThinvmProcess *p)
{
    g_autofree char *path = g_strdup_printf("/proc/%" PRIu32 "/stat", pid);
    g_autofree char *text = NULL;
    const char *after_name;
    char state;
    int threads;

    if (!g_file_get_contents(path, &text, NULL, NULL)) {
        return false;
    }
    /* The name, in brackets, may itself hold brackets and blanks */
    after_name = strrchr(text, ')');
    if (!after_name ||
        sscanf(after_name + 1, " %c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u "
               "%*u %*u %*d %*d %*d %*d %d %*d %" SCNu64,
               &state, &threads, &p->start) != 3) {
        return false;
    }
    p->zombie = (state == 'Z' || state == 'X') && threads <= 1;
    return true;
}

static void thinvm_identity(ThinvmClaim *claim)
{
    static ThinvmClaim self;
    static gsize once;
    ThinvmProcess p;

    if (g_once_init_enter(&once)) {
        thinvm_host_id(&self.host_id);
        thinvm_boot_id(&self.boot_id);
        pstrcpy(self.host_name, sizeof(self.host_name), g_get_host_name());
        g_once_init_leave(&once, 1);
    }
    claim->host_id = self.host_id;
    claim->boot_id = self.boot_id;
    memcpy(claim->host_name, self.host_name, sizeof(claim->host_name));
    /* Not kept: the process may have forked since */
    claim->process = getpid();
    claim->process_start = 0;
    if (thinvm_process_look(claim->process, &p)) {
        claim->process_start = p.start;
    }
}

/* ------------------------------------------------------------------ */
/* Judging a claim                                                     */

static bool thinvm_owner_registered(const QemuUUID *nonce)
{
    BDRVThinvmState *s;

    QEMU_LOCK_GUARD(&thinvm_owner_lock);
    QLIST_FOREACH(s, &thinvm_owner_nodes, owner_link) {
        if (qemu_uuid_is_equal(&s->claim.nonce, nonce)) {
            return true;
        }
    }
    return false;
}

/* Of this host and this boot: has the process of @claim ended? */
static bool thinvm_process_gone(const ThinvmClaim *claim)
{
    ThinvmProcess p;

    if (claim->process == 0 || claim->process > INT_MAX) {
        return false;           /* no process id; nothing can be said */
    }
    if (kill(claim->process, 0) < 0 && errno == ESRCH) {
        return true;
    }
    if (!thinvm_process_look(claim->process, &p)) {
        return false;
    }
    return p.zombie || (claim->process_start && p.start &&
                        p.start != claim->process_start);
}

bool thinvm_owner_process_ended(uint32_t pid)
{
    ThinvmProcess p;

    return (kill(pid, 0) < 0 && errno == ESRCH) ||
           (thinvm_process_look(pid, &p) && p.zombie);
}

static bool thinvm_is_this_host(const ThinvmClaim *claim)
{
    ThinvmClaim me;

    thinvm_identity(&me);
    return qemu_uuid_is_equal(&claim->host_id, &me.host_id) &&
           qemu_uuid_is_equal(&claim->boot_id, &me.boot_id);
}

/* Is the image a file that no other host can have written? */
static bool thinvm_file_is_local(BlockDriverState *file)
{
#ifdef CONFIG_LINUX
    struct statfs fs;

    if (file->drv && !strcmp(file->drv->format_name, "file") &&
        statfs(file->filename, &fs) == 0) {
        return fs.f_type == EXT4_SUPER_MAGIC ||     /* ext2 and ext3, too */
               fs.f_type == XFS_SUPER_MAGIC ||
               fs.f_type == BTRFS_SUPER_MAGIC ||
               fs.f_type == TMPFS_MAGIC;
    }
#endif
    return false;
}

static ThinvmOwnerKind thinvm_owner_judge(const ThinvmClaim *claim,
                                          BDRVThinvmState *self)
{
    ThinvmClaim me;

    if (claim->state != THINVM_CLAIM_ACTIVE) {
        return THINVM_OWNER_NONE;
    }
    if (self && qemu_uuid_is_equal(&claim->nonce, &self->claim.nonce)) {
        return THINVM_OWNER_OURS;
    }
    thinvm_identity(&me);
    if (!qemu_uuid_is_equal(&claim->host_id, &me.host_id)) {
        return THINVM_OWNER_OTHER;
    }
    if (qemu_uuid_is_null(&claim->boot_id) ||
        qemu_uuid_is_null(&me.boot_id)) {
        return THINVM_OWNER_OTHER;
    }
    if (!qemu_uuid_is_equal(&claim->boot_id, &me.boot_id)) {
        return self && thinvm_file_is_local(self->bs->file->bs)
               ? THINVM_OWNER_GONE : THINVM_OWNER_REBOOTED;
    }
    if (claim->process == me.process &&
        claim->process_start == me.process_start) {
        return thinvm_owner_registered(&claim->nonce) ? THINVM_OWNER_NODE
                                                      : THINVM_OWNER_GONE;
    }
    return thinvm_process_gone(claim) ? THINVM_OWNER_GONE
                                      : THINVM_OWNER_OTHER;
}

/*
 * Find the newest of the claims in @area.  Returns false if a block that may
 * be newer still cannot be read: epochs are consecutive, so that can only be
 * the slot after the newest one, or any while none is valid.
 */
static bool thinvm_claims_newest(const QemuUUID *uuid, const uint8_t *area,
                                 ThinvmClaim *newest)
{
    bool doubtful[THINVM_NB_CLAIMS] = { false };
    bool any_doubtful = false, later_version = false;
    ThinvmClaim claim;
    int i, ret;

    newest->epoch = 0;
    for (i = 0; i < THINVM_NB_CLAIMS; i++) {
        const void *block = area + i * THINVM_PAGE_SIZE;

        ret = thinvm_claim_decode(uuid, &claim, block);
        if (ret == 0 && claim.epoch % THINVM_NB_CLAIMS != i) {
            ret = -EBADMSG;     /* a copy out of another slot */
        }
        if (ret == 0) {
            if (claim.epoch > newest->epoch) {
                *newest = claim;
            }
        } else if (ret != -ENOENT) {
            doubtful[i] = any_doubtful = true;
            later_version |= ret == -ENOTSUP;
        }
    }
    if (later_version) {
        return false;
    }
    return newest->epoch ? !doubtful[(newest->epoch + 1) % THINVM_NB_CLAIMS]
                         : !any_doubtful;
}

/* Is @claim one of @self's that did not hold, but may be on the device? */
static bool thinvm_claim_failed(BDRVThinvmState *self,
                                const ThinvmClaim *claim)
{
    unsigned nb = MIN(self->nb_failed_claims, ARRAY_SIZE(self->failed_claims));

    for (unsigned i = 0; i < nb; i++) {
        if (qemu_uuid_is_equal(&self->failed_claims[i], &claim->nonce)) {
            return true;
        }
    }
    return false;
}

/*
 * Has anybody owned the image after @self who did not return it unused?  Where
 * the claim of an epoch in between cannot be read, the answer is yes.
 */
static bool thinvm_used_since(const QemuUUID *uuid, const uint8_t *area,
                              const ThinvmOwnerView *view,
                              BDRVThinvmState *self)
{
    ThinvmClaim claim;
    uint64_t epoch;

    if (view->newest_epoch - self->claim.epoch > THINVM_NB_CLAIMS) {
        return true;
    }
    for (epoch = self->claim.epoch + 1; epoch <= view->newest_epoch; epoch++) {
        const void *block =
            area + epoch % THINVM_NB_CLAIMS * THINVM_PAGE_SIZE;

        if (thinvm_claim_decode(uuid, &claim, block) < 0 ||
            claim.epoch != epoch || (claim.state != THINVM_CLAIM_RETURNED &&
                                     !thinvm_claim_failed(self, &claim))) {
            return true;
        }
    }
    return false;
}

/* Did the owner of the newest claim say where his journal ended? */
static void thinvm_look_end(const QemuUUID *uuid, const uint8_t *area,
                            ThinvmOwnerView *view)
{
    const uint8_t *block = area + view->newest_epoch % THINVM_NB_CLAIMS *
                                  THINVM_PAGE_SIZE;
    const void *end = block + THINVM_RELEASE_OFFSET;

    view->has_end = view->newest.state != THINVM_CLAIM_ACTIVE &&
                    thinvm_release_decode(uuid, &view->end, end) == 0 &&
                    view->end.epoch == view->newest_epoch &&
                    qemu_uuid_is_equal(&view->end.nonce, &view->newest.nonce);
}

static int coroutine_fn thinvm_claims_read(ThinvmDevice *dev, uint8_t *area,
                                           Error **errp)
{
    int ret;

    thinvm_device_event(dev, BLKDBG_THINVM_CLAIM_READ);
    ret = dev->co_pread(dev, THINVM_CLAIM_OFFSET, THINVM_CLAIM_AREA, area);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Cannot read the claims of ownership "
                         "(%d bytes at offset %d)", THINVM_CLAIM_AREA,
                         (int)THINVM_CLAIM_OFFSET);
    }
    /* -EPERM is what thinvm_owner_verify() says of a claim that is lost */
    return ret == -EPERM ? -EIO : ret;
}

int coroutine_fn thinvm_owner_image(ThinvmDevice *dev, QemuUUID *uuid,
                                    Error **errp)
{
    g_autofree uint8_t *area = g_malloc(THINVM_CLAIM_AREA);
    ThinvmClaim claim;
    QemuUUID named;
    int i, ret;

    memset(uuid, 0, sizeof(*uuid));
    ret = thinvm_claims_read(dev, area, errp);
    if (ret < 0) {
        return ret;
    }
    for (i = 0; i < THINVM_NB_CLAIMS; i++) {
        const ThinvmClaimLe *block =
            (const void *)(area + i * THINVM_PAGE_SIZE);

        memcpy(named.data, block->image_uuid, sizeof(named.data));
        ret = thinvm_claim_decode(&named, &claim, block);
        if (ret != -ENOENT) {
            *uuid = named;
        }
        if (ret == 0 || ret == -ENOTSUP) {
            break;              /* this one is whole */
        }
    }
    return 0;
}

int coroutine_fn thinvm_owner_look(ThinvmDevice *dev, const QemuUUID *uuid,
                                   BDRVThinvmState *self,
                                   ThinvmOwnerView *view, Error **errp)
{
    g_autofree uint8_t *area = g_malloc(THINVM_CLAIM_AREA);
    bool certain;
    int ret;

    memset(view, 0, sizeof(*view));
    /* An owner comes here when a write has failed: no time to flush them all */
    if (!self || !qatomic_read(&self->owner)) {
        ret = thinvm_device_refresh(dev, errp);
        if (ret < 0) {
            return ret;
        }
    }
    ret = thinvm_claims_read(dev, area, errp);
    if (ret < 0) {
        return ret;
    }
    certain = thinvm_claims_newest(uuid, area, &view->newest);
    view->newest_epoch = view->newest.epoch;
    if (!certain) {
        view->kind = THINVM_OWNER_UNKNOWN;
    } else if (view->newest_epoch) {
        view->kind = thinvm_owner_judge(&view->newest, self);
        view->this_host = thinvm_is_this_host(&view->newest);
        thinvm_look_end(uuid, area, view);
        view->unchanged = self && self->claim.epoch &&
            qemu_uuid_is_equal(&view->newest.nonce, &self->claim.nonce);
        view->used_since = self && self->claim.epoch && !view->unchanged &&
            thinvm_used_since(uuid, area, view, self);
    }
    if (self && view->newest_epoch) {
        thinvm_pulse_saw_claim(self, &view->newest);
    }
    trace_thinvm_owner_look(self ? self->bs : NULL, view->newest_epoch,
                            view->kind);
    return 0;
}

/* The name comes from the device: nothing in it may upset a terminal */
char *thinvm_owner_host(const ThinvmClaim *claim)
{
    char *name = g_strndup(claim->host_name, sizeof(claim->host_name));
    char *p;

    for (p = name; *p; p++) {
        if (*p < ' ' || *p > '~' || *p == '\'') {
            *p = '?';
        }
    }
    return name;
}

void coroutine_fn thinvm_owner_watch(ThinvmDevice *dev, const QemuUUID *uuid,
                                     ThinvmOwnerView *view, bool force)
{
    ThinvmBeat beat;
    int ret;

    /* Of a process of this host we know that it is there */
    if (view->kind != THINVM_OWNER_REBOOTED &&
        (view->kind != THINVM_OWNER_OTHER || (view->this_host && !force))) {
        return;
    }
    ret = thinvm_heartbeat_watch(dev, uuid, &view->newest, &beat);
    view->moved = ret > 0;
    view->watched = ret >= 0;
    view->beat = beat.known;
    view->counter = beat.counter;
    view->unchanged_ms = beat.unchanged_ms;
}

void coroutine_fn thinvm_owner_settle(ThinvmDevice *dev, const QemuUUID *uuid,
                                      ThinvmOwnerView *view)
{
    if (view->kind == THINVM_OWNER_REBOOTED) {
        thinvm_owner_watch(dev, uuid, view, false);
        view->kind = view->watched && !view->moved ? THINVM_OWNER_GONE
                                                   : THINVM_OWNER_OTHER;
    }
}

/* What is known of the owner in @view, to follow its name */
static char *thinvm_owner_liveness(const ThinvmOwnerView *view)
{
    if (view->moved) {
        return g_strdup_printf("it is alive: its counter has moved to %"
                               PRIu64 " while it was watched", view->counter);
    }
    if (view->watched && !view->beat) {
        return g_strdup_printf("it has not written any heartbeat in the %"
                               PRIu64 ".%" PRIu64 " s that it was watched",
                               view->unchanged_ms / 1000,
                               view->unchanged_ms / 100 % 10);
    }
    if (view->watched) {
        return g_strdup_printf("its counter has stood at %" PRIu64 " for %"
                               PRIu64 ".%" PRIu64 " s at least",
                               view->counter, view->unchanged_ms / 1000,
                               view->unchanged_ms / 100 % 10);
    }
    if (view->kind == THINVM_OWNER_REBOOTED) {
        return g_strdup("this host before it was booted, or another one of "
                        "its name; its heartbeat is not known");
    }
    return g_strdup(view->this_host ? "a process of this host, which is there"
                                    : "another host");
}

static bool thinvm_owner_refuse(const ThinvmOwnerView *view, bool force,
                                Error **errp)
{
    ERRP_GUARD();
    g_autofree char *host = thinvm_owner_host(&view->newest);
    g_autofree char *liveness = thinvm_owner_liveness(view);

    error_setg(errp, "The image is owned by process %" PRIu32 " on host '%s' "
               "(epoch %" PRIu64 "; %s)", view->newest.process, host,
               view->newest_epoch, liveness);
    if (view->kind == THINVM_OWNER_REBOOTED && view->moved) {
        error_append_hint(errp, "There is another host with this one's name "
                          "and /etc/machine-id; give each its own.\n");
    }
    if (force) {
        error_append_hint(errp, "It was not fenced, so the image is not taken "
                          "by force.  Stop that process, or fence its "
                          "host, and try again.\n");
    } else {
        error_append_hint(errp, "Stop that process, or migrate from it.  "
                          "Only if its host was fenced and its storage "
                          "sessions have ended, open the image with "
                          "force-takeover=on.\n");
    }
    return false;
}

bool thinvm_owner_may_take(const ThinvmOwnerView *view, bool force,
                           Error **errp)
{
    ERRP_GUARD();

    if (view->newest_epoch >= THINVM_COUNTER_MAX / 2) {
        error_setg(errp, "The image's epoch of ownership, %" PRIu64 ", "
                   "cannot be raised any more; the claim is damaged",
                   view->newest_epoch);
        return false;
    }
    switch (view->kind) {
    case THINVM_OWNER_NONE:
    case THINVM_OWNER_GONE:
    case THINVM_OWNER_OURS:
        return true;
    case THINVM_OWNER_NODE:
        /* No fencing could ever make this right: both are us */
        error_setg(errp, "Another node of this process has the image open "
                   "for writing (epoch %" PRIu64 ")", view->newest_epoch);
        return false;
    case THINVM_OWNER_OTHER:
        return (force && !view->moved) ||
               thinvm_owner_refuse(view, force, errp);
    case THINVM_OWNER_REBOOTED:
        return ((view->watched || force) && !view->moved) ||
               thinvm_owner_refuse(view, force, errp);
    case THINVM_OWNER_UNKNOWN:
        if (force) {
            return true;
        }
        error_setg(errp, "A claim of ownership after epoch %" PRIu64 " is "
                   "damaged or by a later version, so the image may be in "
                   "use", view->newest_epoch);
        error_append_hint(errp, "If nobody uses it, open it with "
                          "force-takeover=on.\n");
        return false;
    }
    g_assert_not_reached();
}

/* ------------------------------------------------------------------ */
/* Writing claims                                                      */

static uint64_t thinvm_claim_offset(uint64_t epoch)
{
    return THINVM_CLAIM_OFFSET + epoch % THINVM_NB_CLAIMS * THINVM_PAGE_SIZE;
}

/* @end: where the journal ends, or NULL */
static int coroutine_fn thinvm_claim_write(BDRVThinvmState *s,
                                           const ThinvmClaim *claim,
                                           const ThinvmRelease *end,
                                           bool flush)
{
    g_autofree uint8_t *block = g_malloc0(THINVM_PAGE_SIZE);
    ThinvmDevice *dev = &s->device;
    int ret;

    thinvm_claim_encode(&s->uuid, (ThinvmClaimLe *)block, claim);
    if (end) {
        thinvm_release_encode(&s->uuid, (ThinvmReleaseLe *)
                              (block + THINVM_RELEASE_OFFSET), end);
    }
    thinvm_device_event(dev, BLKDBG_THINVM_CLAIM_WRITE);
    ret = dev->co_pwrite(dev, thinvm_claim_offset(claim->epoch),
                         THINVM_PAGE_SIZE, block);
    if (ret < 0 || !flush) {
        return ret;
    }
    thinvm_device_event(dev, BLKDBG_THINVM_CLAIM_FLUSH);
    return dev->co_flush(dev);
}

/* For the nodes of this process.  @claim may be s->claim as it is */
static void thinvm_owner_register(BDRVThinvmState *s, const ThinvmClaim *claim)
{
    QEMU_LOCK_GUARD(&thinvm_owner_lock);
    s->claim = *claim;
    QLIST_SAFE_REMOVE(s, owner_link);
    QLIST_INSERT_HEAD(&thinvm_owner_nodes, s, owner_link);
}

void thinvm_owner_drop(BDRVThinvmState *s)
{
    QEMU_LOCK_GUARD(&thinvm_owner_lock);
    QLIST_SAFE_REMOVE(s, owner_link);
}

/*
 * The claim that @s has just made does not hold, @former is its newest one
 * again: by that is judged whether somebody has owned the image since, and a
 * guest that was sent away may not go on then.
 *
 * If @former is active it is itself a new one, whose epoch was found in the
 * journal: somebody has written under it, and it must not say otherwise.
 */
static void thinvm_owner_undo(BDRVThinvmState *s, const ThinvmClaim *former)
{
    QEMU_LOCK_GUARD(&thinvm_owner_lock);
    QLIST_SAFE_REMOVE(s, owner_link);
    s->failed_claims[s->nb_failed_claims++ % ARRAY_SIZE(s->failed_claims)] =
        s->claim.nonce;
    s->claim = *former;
    s->epoch_used = former->state == THINVM_CLAIM_ACTIVE;
}

/* Is @newest still what the claim is to follow? */
static int coroutine_fn thinvm_owner_still(BDRVThinvmState *s,
                                           const ThinvmClaim *newest,
                                           Error **errp)
{
    g_autofree char *host = NULL;
    ThinvmOwnerView view;
    int ret = thinvm_owner_look(&s->device, &s->uuid, s, &view, errp);
    bool same = view.newest_epoch == newest->epoch &&
                (!newest->epoch || qemu_uuid_is_equal(&view.newest.nonce,
                                                      &newest->nonce));
    bool recalled = view.newest.state == THINVM_CLAIM_ACTIVE &&
                    newest->state != THINVM_CLAIM_ACTIVE;

    if (ret < 0 || (same && !recalled)) {
        return ret;
    }
    host = thinvm_owner_host(&view.newest);
    error_setg(errp, "Process %" PRIu32 " on host '%s' has claimed the image "
               "just now (epoch %" PRIu64 ")", view.newest.process, host,
               view.newest_epoch);
    return -EBUSY;
}

/* ------------------------------------------------------------------ */
/* Claiming                                                            */

/* @s is the owner from now on, unless others may claim beside it */
static int coroutine_fn GRAPH_RDLOCK
thinvm_claim_put(BDRVThinvmState *s, const ThinvmClaim *claim, Error **errp)
{
    bool ordered = thinvm_fence_orders(s);
    int ret;

    /* Registered first: nobody of this process may take it for a leftover */
    thinvm_owner_register(s, claim);
    s->epoch_used = false;
    ret = thinvm_claim_write(s, claim, NULL, !ordered);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Cannot write the claim of ownership "
                         "for epoch %" PRIu64, claim->epoch);
        return ret;
    }
    return ordered ? 0 : thinvm_owner_verify(s, errp);
}

/*
 * To take back what one has released is another matter than to claim what is
 * free: somebody was told to take it, and does not wait.  If he has claimed it
 * already, our claim, in the same block, would be over his.  So say first, in
 * the block of the old claim, that it is active again: who looks from now on
 * lets it be, and who has looked before has written his claim, and shows it,
 * when we have waited.
 *
 * *@released: what was in that block.
 */
static int coroutine_fn thinvm_claim_recall(BDRVThinvmState *s,
                                            ThinvmClaim *found,
                                            uint8_t **released, Error **errp)
{
    g_autofree uint8_t *block = g_malloc(THINVM_PAGE_SIZE);
    ThinvmDevice *dev = &s->device;
    int ret;

    ret = dev->co_pread(dev, thinvm_claim_offset(found->epoch),
                        THINVM_PAGE_SIZE, block);
    if (ret == 0) {
        *released = g_steal_pointer(&block);
        found->state = THINVM_CLAIM_ACTIVE;
        thinvm_owner_register(s, &s->claim);
        ret = thinvm_claim_write(s, found, NULL, true);
    }
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Cannot take back the claim of ownership "
                         "of epoch %" PRIu64, found->epoch);
        return ret;
    }
    qemu_co_sleep_ns(QEMU_CLOCK_REALTIME, THINVM_LEASE_MS * SCALE_MS);
    return 0;
}

/* Best effort: if it fails, others will find the process gone one day */
static void coroutine_fn thinvm_claim_recall_undo(BDRVThinvmState *s,
                                                  const ThinvmClaim *found,
                                                  const uint8_t *released)
{
    ThinvmDevice *dev = &s->device;

    thinvm_device_event(dev, BLKDBG_THINVM_CLAIM_WRITE);
    dev->co_pwrite(dev, thinvm_claim_offset(found->epoch), THINVM_PAGE_SIZE,
                   released);
    dev->co_flush(dev);
    thinvm_owner_drop(s);
}

/*
 * Of two that claim at the same time, both having seen nobody, the one whose
 * block lands last has it: wait longer than a write takes, and look again.
 * A write that took long may have landed when the other had already waited,
 * looked, and begun to write the image: then wait until it knows, too.
 *
 * A fast one does not wait after a hand-over, if it is told to take what was
 * released, as nodes in migration mode are: the guest stands still.  Whoever
 * takes it without having been told waits until such a one would know.
 */
static int64_t thinvm_claim_wait_ms(BDRVThinvmState *s,
                                    const ThinvmClaim *newest, bool recalled,
                                    int64_t took_ms)
{
    if (took_ms > THINVM_LEASE_MS / 2) {
        return THINVM_LEASE_SLOW_MS;
    }
    if (recalled) {
        return 0;               /* has waited */
    }
    if (!newest->epoch || newest->state != THINVM_CLAIM_RELEASED) {
        return THINVM_LEASE_MS;
    }
    return qatomic_read(&s->mode) == THINVM_CACHE_MODE_MIGRATION
           ? 0 : THINVM_LEASE_SLOW_MS;
}

/* Where neither the device nor a lock decides between two */
static int coroutine_fn GRAPH_RDLOCK
thinvm_claim_race(BDRVThinvmState *s, const ThinvmClaim *claim,
                  ThinvmClaim *found, Error **errp)
{
    bool recall = found->epoch && found->state == THINVM_CLAIM_RELEASED &&
                  qemu_uuid_is_equal(&found->nonce, &s->claim.nonce);
    g_autofree uint8_t *released = NULL;
    int64_t start, wait;
    int ret;

    ret = recall ? thinvm_claim_recall(s, found, &released, errp) : 0;
    start = g_get_monotonic_time();
    if (ret == 0) {
        ret = thinvm_owner_still(s, found, errp);
    }
    if (ret == 0) {
        ret = thinvm_claim_put(s, claim, errp);
    }
    if (ret == 0) {
        wait = thinvm_claim_wait_ms(s, found, recall,
                                    (g_get_monotonic_time() - start) / 1000);
        if (wait) {
            qemu_co_sleep_ns(QEMU_CLOCK_REALTIME, wait * SCALE_MS);
            ret = thinvm_owner_verify(s, errp);
        }
    }
    if (ret < 0 && released) {
        thinvm_claim_recall_undo(s, found, released);
    }
    return ret;
}

int coroutine_fn thinvm_owner_claim(BDRVThinvmState *s, uint64_t epoch,
                                    const ThinvmClaim *newest, Error **errp)
{
    ThinvmClaim claim = {
        .epoch = epoch,
        .state = THINVM_CLAIM_ACTIVE,
    };
    ThinvmClaim found, former = s->claim;
    ThinvmFencing fencing;
    const char *reason;
    int ret;

    thinvm_identity(&claim);
    qemu_uuid_generate(&claim.nonce);
    found = *newest;            /* it may be our own, which we replace */
    ret = thinvm_fence_take(s, &claim, &found, errp);
    if (ret < 0) {
        return ret;
    }
    fencing = thinvm_fence_kind(s, &reason);
    if (fencing == THINVM_FENCING_CLAIM) {
        ret = thinvm_claim_race(s, &claim, &found, errp);
    } else {
        /*
         * A lock is held since the node was opened.  Before the reservation
         * was ours another may have had it, and owned the image.
         */
        if (fencing == THINVM_FENCING_RESERVATION) {
            ret = thinvm_owner_still(s, &found, errp);
        }
        if (ret == 0) {
            ret = thinvm_claim_put(s, &claim, errp);
        }
    }
    trace_thinvm_owner_claim(s->bs, epoch, ret);
    if (ret < 0) {
        if (qemu_uuid_is_equal(&s->claim.nonce, &claim.nonce)) {
            thinvm_owner_undo(s, &former);
        }
        thinvm_fence_release(s);
        return ret;
    }
    /* for query-thinvm, by which others find out whom they follow */
    thinvm_pulse_saw_claim(s, &claim);
    return 0;
}

int coroutine_fn thinvm_owner_release(BDRVThinvmState *s,
                                      ThinvmClaimState state,
                                      const ThinvmRelease *end, Error **errp)
{
    ThinvmClaim claim = s->claim;
    ThinvmRelease release;
    int ret;

    /* Unused is what we would say of our epoch, and another has used it */
    if (state == THINVM_CLAIM_RETURNED && s->epoch_used) {
        state = THINVM_CLAIM_RELEASED;
    }
    claim.state = state;
    if (end) {
        release = *end;
        release.epoch = claim.epoch;
        release.nonce = claim.nonce;
    }
    /* What was handed over is flushed by who takes it, before he writes */
    ret = thinvm_claim_write(s, &claim, end ? &release : NULL,
                             state != THINVM_CLAIM_RELEASED ||
                             !thinvm_fence_orders(s));
    trace_thinvm_owner_release(s->bs, claim.epoch, state, ret);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Cannot release the claim of ownership "
                         "of epoch %" PRIu64, claim.epoch);
        /* Whatever the claim says now, nothing is written without a new one */
        thinvm_fence_release(s);
        return ret;
    }
    s->claim = claim;
    thinvm_owner_drop(s);
    thinvm_fence_release(s);
    thinvm_pulse_saw_claim(s, &claim);
    return 0;
}

void thinvm_owner_describe_displaced(BDRVThinvmState *s,
                                     const ThinvmClaim *newest, Error **errp)
{
    g_autofree char *host = thinvm_owner_host(newest);

    error_setg(errp, "The image has been claimed by process %" PRIu32
               " on host '%s' (epoch %" PRIu64 ", ours was %" PRIu64 ")",
               newest->process, host, newest->epoch, s->claim.epoch);
}

int coroutine_fn thinvm_owner_verify(BDRVThinvmState *s, Error **errp)
{
    ThinvmOwnerView view;
    int ret = thinvm_owner_look(&s->device, &s->uuid, s, &view, errp);

    if (ret < 0) {
        return ret;
    }
    if (view.kind != THINVM_OWNER_OURS) {
        thinvm_owner_describe_displaced(s, &view.newest, errp);
        return -EPERM;
    }
    return 0;
}
