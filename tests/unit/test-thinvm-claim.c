/*
 * Unit tests of what a thinvm node's writes ask of its claim
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * An owner that was frozen thaws amid its writes, when a successor has written
 * the image and closed it again: neither claim nor reservation of that one is
 * in force, so nothing but a look at the claims keeps the former owner from
 * writing (invariant 6).  And what cannot be read proves nothing: then a write
 * that waits for it fails, and no reservation is taken anew; but the owner
 * stays one.
 *
 * The node is a real one, with all of the block layer.  It lies on a device in
 * memory that knows as much of SCSI's persistent reservations as a single
 * initiator needs.  Being frozen is played by making the last look old.
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/bswap.h"
#include "qemu/main-loop.h"
#include "qemu/module.h"
#include "qobject/qdict.h"
#include "scsi/constants.h"
#include "system/block-backend.h"
#include "block/thinvm/handover.h"
#include <scsi/sg.h>

#define DEVICE          (32 * MiB)
#define DISK            (16 * MiB)
#define CLUSTER         (64 * KiB)
#define JOURNAL         (1 * MiB)
#define NEW_PLACE       (8 * MiB)
#define WRITERS         16
#define CLAIMS_END      (THINVM_CLAIM_OFFSET + \
                         THINVM_NB_CLAIMS * THINVM_PAGE_SIZE)

/* ------------------------------------------------------------------ */
/* The device                                                          */

static struct {
    uint8_t *data;
    int fail_writes;            /* so many next ones, behind the journal */
    bool unreadable;            /* the claims */
    bool slow;                  /* the same */
    unsigned reads, failures;   /* of claims */
    uint64_t registered, holder;
    void (*at_reserve)(void);
} lun;

static bool is_claim(int64_t offset)
{
    return offset >= THINVM_CLAIM_OFFSET && offset < CLAIMS_END;
}

static int coroutine_fn lun_preadv(BlockDriverState *bs, int64_t offset,
                                   int64_t bytes, QEMUIOVector *qiov,
                                   BdrvRequestFlags flags)
{
    if (is_claim(offset)) {
        lun.reads++;
        if (lun.slow) {
            qemu_co_sleep_ns(QEMU_CLOCK_REALTIME, 20 * SCALE_MS);
        }
        if (lun.unreadable) {
            lun.failures++;
            return -EIO;
        }
    }
    qemu_iovec_from_buf(qiov, 0, lun.data + offset, bytes);
    return 0;
}

static int coroutine_fn lun_pwritev(BlockDriverState *bs, int64_t offset,
                                    int64_t bytes, QEMUIOVector *qiov,
                                    BdrvRequestFlags flags)
{
    if (offset >= THINVM_JOURNAL_OFFSET + JOURNAL && lun.fail_writes) {
        lun.fail_writes--;
        return -EIO;
    }
    qemu_iovec_to_buf(qiov, 0, lun.data + offset, bytes);
    return 0;
}

static int coroutine_fn lun_flush(BlockDriverState *bs)
{
    return 0;
}

static int64_t coroutine_fn lun_getlength(BlockDriverState *bs)
{
    return DEVICE;
}

static int lun_open(BlockDriverState *bs, QDict *options, int flags,
                    Error **errp)
{
    return 0;
}

static int reserve_in(unsigned action, uint8_t *data)
{
    switch (action) {
    case 1:                             /* READ RESERVATION */
        if (lun.holder) {
            stl_be_p(data + 4, 16);
            stq_be_p(data + 8, lun.holder);
            data[21] = 1;               /* write exclusive */
        }
        return GOOD;
    case 2:                             /* REPORT CAPABILITIES */
        stw_be_p(data, 8);
        return GOOD;
    default:
        g_assert_not_reached();
    }
}

static int reserve_out(unsigned action, const uint8_t *data)
{
    uint64_t key = ldq_be_p(data), other = ldq_be_p(data + 8);

    if (action == 6) {                  /* REGISTER AND IGNORE EXISTING KEY */
        lun.registered = other;
        return GOOD;
    }
    if (!key || key != lun.registered) {
        return RESERVATION_CONFLICT;
    }
    switch (action) {
    case 0:                             /* REGISTER, to withdraw it */
        g_assert_cmpuint(other, ==, 0);
        lun.registered = lun.holder = 0;
        return GOOD;
    case 1:                             /* RESERVE */
        if (lun.at_reserve) {
            lun.at_reserve();
        }
        lun.holder = key;
        return GOOD;
    default:
        g_assert_not_reached();
    }
}

static int coroutine_fn lun_ioctl(BlockDriverState *bs, unsigned long req,
                                  void *buf)
{
    struct sg_io_hdr *hdr = buf;

    g_assert_cmpuint(req, ==, SG_IO);
    hdr->host_status = 0;
    switch (hdr->cmdp[0]) {
    case PERSISTENT_RESERVE_IN:
        hdr->status = reserve_in(hdr->cmdp[1] & 31, hdr->dxferp);
        break;
    case PERSISTENT_RESERVE_OUT:
        hdr->status = reserve_out(hdr->cmdp[1] & 31, hdr->dxferp);
        break;
    default:
        hdr->status = CHECK_CONDITION;
        hdr->sbp[2] = ILLEGAL_REQUEST;
    }
    return 0;
}

/* By the name of the driver it is known that it can be reserved */
static BlockDriver lun_driver = {
    .format_name        = "iscsi",
    .bdrv_open          = lun_open,
    .bdrv_co_preadv     = lun_preadv,
    .bdrv_co_pwritev    = lun_pwritev,
    .bdrv_co_flush_to_disk = lun_flush,
    .bdrv_co_getlength  = lun_getlength,
    .bdrv_co_ioctl      = lun_ioctl,
};

/* ------------------------------------------------------------------ */
/* The image                                                           */

static int coroutine_fn memory_pread(ThinvmDevice *dev, uint64_t offset,
                                     uint64_t bytes, void *buf)
{
    memcpy(buf, lun.data + offset, bytes);
    return 0;
}

static int coroutine_fn memory_pwrite(ThinvmDevice *dev, uint64_t offset,
                                      uint64_t bytes, const void *buf)
{
    memcpy(lun.data + offset, buf, bytes);
    return 0;
}

static int coroutine_fn memory_flush(ThinvmDevice *dev)
{
    return 0;
}

static int64_t coroutine_fn memory_length(ThinvmDevice *dev)
{
    return DEVICE;
}

static int coroutine_fn memory_grow(ThinvmDevice *dev, uint64_t bytes)
{
    return bytes <= DEVICE ? 0 : -ENOSPC;
}

static ThinvmDevice memory = {
    .co_pread = memory_pread,
    .co_pwrite = memory_pwrite,
    .co_flush = memory_flush,
    .co_length = memory_length,
    .co_grow = memory_grow,
};

static void coroutine_fn create_entry(void *opaque)
{
    ThinvmCreateParams params = {
        .virtual_size = DISK,
        .cluster_size = CLUSTER,
        .journal_size = JOURNAL,
    };

    thinvm_store_create(&memory, &params, &error_abort);
    *(bool *)opaque = true;
}

typedef struct Disk {
    BlockDriverState *file;
    BlockBackend *blk;
    BDRVThinvmState *s;
} Disk;

static Disk the_disk;           /* one at a time */

static int disk_write(Disk *d, int64_t offset, uint8_t byte)
{
    g_autofree uint8_t *buf = g_malloc(CLUSTER);

    memset(buf, byte, CLUSTER);
    return blk_pwrite(d->blk, offset, CLUSTER, buf, 0);
}

/* An image that is open, owned and reserved, with a durable write at 0 */
static Disk *disk_open(void)
{
    QDict *options = qdict_new();
    Disk *d = &the_disk;
    bool created = false;

    memset(&lun, 0, sizeof(lun));
    lun.data = g_malloc0(DEVICE);
    qemu_coroutine_enter(qemu_coroutine_create(create_entry, &created));
    g_assert_true(created);

    d->file = bdrv_new_open_driver(&lun_driver, "lun", BDRV_O_RDWR,
                                   &error_abort);
    qdict_put_str(options, "driver", "thinvm");
    qdict_put_str(options, "file", "lun");
    qdict_put_str(options, THINVM_OPT_FLUSH_INTERVAL, "600000");
    d->blk = blk_new_open(NULL, NULL, options, BDRV_O_RDWR, &error_abort);
    d->s = blk_bs(d->blk)->opaque;
    g_assert_true(d->s->owner);
    g_assert_cmpuint(lun.holder, !=, 0);
    g_assert_cmpint(disk_write(d, 0, 1), ==, 0);
    g_assert_cmpint(blk_flush(d->blk), ==, 0);
    return d;
}

static void disk_close(Disk *d)
{
    blk_unref(d->blk);
    bdrv_unref(d->file);
    g_free(lun.data);
}

/* For longer than any look counts */
static void freeze(Disk *d)
{
    g_assert_cmpint(d->s->claim_seen_ms, !=, 0);
    d->s->claim_seen_ms -= 3600 * 1000;
}

static void forget_reservation(void)
{
    lun.registered = lun.holder = 0;
}

/* A successor's claim, as it leaves it behind */
static void claim_by_another(void)
{
    BDRVThinvmState *s = the_disk.s;
    ThinvmClaim claim = s->claim;

    claim.epoch++;
    claim.state = THINVM_CLAIM_CLOSED;
    qemu_uuid_generate(&claim.nonce);
    thinvm_claim_encode(&s->uuid, (ThinvmClaimLe *)
                        (lun.data + THINVM_CLAIM_OFFSET +
                         claim.epoch % THINVM_NB_CLAIMS * THINVM_PAGE_SIZE),
                        &claim);
}

static uint8_t *successor_comes_and_goes(Disk *d)
{
    freeze(d);
    claim_by_another();
    forget_reservation();
    return g_memdup2(lun.data, DEVICE);
}

static void assert_lost(Disk *d)
{
    g_assert_false(d->s->owner);
    g_assert_true(d->s->lost);
}

static void assert_owner(Disk *d)
{
    g_assert_true(d->s->owner);
    g_assert_false(d->s->lost);
}

/* ------------------------------------------------------------------ */
/* An owner that thaws                                                 */

static void test_overwrite(void)
{
    g_autofree uint8_t *before = NULL;
    Disk *d = disk_open();

    before = successor_comes_and_goes(d);
    g_assert_cmpint(disk_write(d, 0, 2), ==, -EIO);
    assert_lost(d);
    g_assert_cmpint(memcmp(before, lun.data, DEVICE), ==, 0);
    disk_close(d);
}

static void test_new_cluster(void)
{
    g_autofree uint8_t *before = NULL;
    Disk *d = disk_open();

    before = successor_comes_and_goes(d);
    g_assert_cmpint(disk_write(d, NEW_PLACE, 2), ==, -EIO);
    assert_lost(d);
    g_assert_cmpint(memcmp(before, lun.data, DEVICE), ==, 0);
    disk_close(d);
}

/* What was written before is in memory yet, and stays there */
static void test_journal(void)
{
    g_autofree uint8_t *before = NULL;
    Disk *d = disk_open();

    g_assert_cmpint(disk_write(d, NEW_PLACE, 1), ==, 0);
    before = successor_comes_and_goes(d);
    g_assert_cmpint(blk_flush(d->blk), <, 0);
    assert_lost(d);
    g_assert_cmpint(memcmp(before, lun.data, DEVICE), ==, 0);
    disk_close(d);
}

/* Closing writes too: a checkpoint, and the release */
static void test_close(void)
{
    g_autofree uint8_t *before = NULL;
    Disk *d = disk_open();

    for (int i = 0; i < 64; i++) {
        g_assert_cmpint(disk_write(d, i * CLUSTER, 1), ==, 0);
    }
    before = successor_comes_and_goes(d);
    blk_unref(d->blk);
    g_assert_cmpint(memcmp(before, lun.data, DEVICE), ==, 0);
    bdrv_unref(d->file);
    g_free(lun.data);
}

/* ------------------------------------------------------------------ */
/* One that was just slow                                              */

typedef struct Writer {
    Disk *d;
    int64_t offset;
    unsigned *running;
} Writer;

static void coroutine_fn writer_entry(void *opaque)
{
    Writer *w = opaque;
    g_autofree uint8_t *buf = g_malloc0(CLUSTER);

    g_assert_cmpint(blk_co_pwrite(w->d->blk, w->offset, CLUSTER, buf, 0), ==,
                    0);
    --*w->running;
}

/* Many writes wait, and one look is enough for them all */
static void test_one_look(void)
{
    Disk *d = disk_open();
    unsigned running = WRITERS;
    Writer w[WRITERS];

    freeze(d);
    lun.slow = true;
    lun.reads = 0;
    for (int i = 0; i < WRITERS; i++) {
        w[i] = (Writer) { d, i * CLUSTER, &running };
        qemu_coroutine_enter(qemu_coroutine_create(writer_entry, &w[i]));
    }
    while (running) {
        aio_poll(qemu_get_aio_context(), true);
    }
    /* of two blocks each; a heartbeat may come in between */
    g_assert_cmpuint(lun.reads, >=, 2);
    g_assert_cmpuint(lun.reads, <=, 4);
    assert_owner(d);
    disk_close(d);
}

/* Nobody can tell: the write fails, and the next one may not */
static void test_unreadable(void)
{
    Disk *d = disk_open();

    freeze(d);
    lun.unreadable = true;
    g_assert_cmpint(disk_write(d, 0, 2), ==, -EIO);
    assert_owner(d);
    lun.unreadable = false;
    g_assert_cmpint(disk_write(d, 0, 3), ==, 0);
    /* as long as the last look counts, nobody needs to */
    lun.unreadable = true;
    g_assert_cmpint(disk_write(d, 0, 4), ==, 0);
    lun.unreadable = false;
    disk_close(d);
}

/* ------------------------------------------------------------------ */
/* The reservation                                                     */

/* A write fails because the device forgot it */
static void test_write_renews(void)
{
    Disk *d = disk_open();

    forget_reservation();
    lun.fail_writes = 1;
    lun.unreadable = true;
    g_assert_cmpint(disk_write(d, 0, 2), ==, -EIO);
    g_assert_cmpuint(lun.holder, ==, 0);
    assert_owner(d);

    lun.fail_writes = 1;
    lun.unreadable = false;
    g_assert_cmpint(disk_write(d, 0, 2), ==, 0);
    g_assert_cmpuint(lun.holder, !=, 0);
    disk_close(d);
}

/* So does the heartbeat */
static void test_heartbeat_renews(void)
{
    Disk *d = disk_open();

    forget_reservation();
    lun.unreadable = true;
    /* the second begins when all that hangs on the first is done */
    while (lun.failures < 2) {
        aio_poll(qemu_get_aio_context(), true);
    }
    g_assert_cmpuint(lun.holder, ==, 0);
    assert_owner(d);

    lun.unreadable = false;
    while (!lun.holder) {
        aio_poll(qemu_get_aio_context(), true);
    }
    assert_owner(d);
    disk_close(d);
}

/*
 * Another has come and gone between the look at the claim and the new
 * reservation: that is given back.
 */
static void test_renewed_too_late(void)
{
    Disk *d = disk_open();

    forget_reservation();
    lun.fail_writes = 1;
    lun.at_reserve = claim_by_another;
    g_assert_cmpint(disk_write(d, 0, 2), ==, -EIO);
    assert_lost(d);
    g_assert_cmpuint(lun.holder, ==, 0);
    disk_close(d);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    qemu_init_main_loop(&error_abort);
    module_call_init(MODULE_INIT_TRACE);
    bdrv_init();

    g_test_add_func("/thinvm/claim/overwrite", test_overwrite);
    g_test_add_func("/thinvm/claim/new-cluster", test_new_cluster);
    g_test_add_func("/thinvm/claim/journal", test_journal);
    g_test_add_func("/thinvm/claim/close", test_close);
    g_test_add_func("/thinvm/claim/one-look", test_one_look);
    g_test_add_func("/thinvm/claim/unreadable", test_unreadable);
    g_test_add_func("/thinvm/claim/write-renews", test_write_renews);
    g_test_add_func("/thinvm/claim/heartbeat-renews", test_heartbeat_renews);
    g_test_add_func("/thinvm/claim/renewed-too-late", test_renewed_too_late);
    return g_test_run();
}
