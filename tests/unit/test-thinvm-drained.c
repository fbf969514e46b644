/*
 * Unit tests of changes that come while a write is on its way
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The whole driver over a disk in memory that holds a write of the guest, but
 * lets all that comes later through.  Creating a snapshot, shrinking the disk
 * and emptying the image have to wait for it: a write in place would change
 * the snapshot, one that allocates map its cluster behind the disk's end.
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qobject/qdict.h"
#include "qemu/main-loop.h"
#include "qemu/units.h"
#include "block/block_int.h"
#include "block/snapshot.h"
#include "system/block-backend.h"
#include "thinvm-gate-disk.h"

#define DEVICE_SIZE (64 * MiB)
#define DISK_SIZE   (4 * MiB)
#define SHRUNK_SIZE (2 * MiB)
#define PLACE       (3 * MiB)
#define LENGTH      (64 * KiB)

/* How often it is looked at, 1 ms apart, before the write is let through */
#define LOOKS       100

typedef struct World {
    BlockDriverState *device;
    GateDisk *disk;
    BlockBackend *guest;
    QEMUTimer *timer;
    int looks;
    int ret;                        /* of the write; -EINPROGRESS */
    uint8_t buf[LENGTH];
} World;

static void coroutine_fn image_create(void *opaque)
{
    bool *done = opaque;
    BlockdevRef file = {
        .type = QTYPE_QSTRING,
        .u.reference = (char *)"device",
    };
    BlockdevCreateOptions options = {
        .driver = BLOCKDEV_DRIVER_THINVM,
        .u.thinvm = { .file = &file, .size = DISK_SIZE },
    };

    g_assert_cmpint(bdrv_find_format("thinvm")->bdrv_co_create(&options,
                                                               &error_abort),
                    ==, 0);
    *done = true;
}

static void world_begin(World *w)
{
    QDict *options = qdict_new();
    bool created = false;

    w->device = gate_disk_new("device", DEVICE_SIZE, &w->disk);
    qemu_coroutine_enter(qemu_coroutine_create(image_create, &created));
    while (!created) {
        aio_poll(qemu_get_aio_context(), true);
    }
    qdict_put_str(options, "driver", "thinvm");
    qdict_put_str(options, "file", "device");
    w->guest = blk_new_open(NULL, NULL, options,
                            BDRV_O_RDWR | BDRV_O_RESIZE, &error_abort);
}

static void world_end(World *w)
{
    blk_unref(w->guest);
    bdrv_unref(w->device);
    timer_free(w->timer);
}

static void look(void *opaque)
{
    World *w = opaque;

    if (++w->looks == LOOKS) {
        gate_open(w->disk, &w->disk->writes);
    } else {
        timer_mod(w->timer, qemu_clock_get_ms(QEMU_CLOCK_REALTIME) + 1);
    }
}

static void write_end(void *opaque, int ret)
{
    World *w = opaque;

    w->ret = ret;
}

static void guest_write(World *w, uint8_t byte)
{
    memset(w->buf, byte, LENGTH);
    g_assert_cmpint(blk_pwrite(w->guest, PLACE, LENGTH, w->buf, 0), ==, 0);
}

static void assert_reads(World *w, uint8_t byte)
{
    uint8_t got[LENGTH];

    memset(w->buf, byte, LENGTH);
    g_assert_cmpint(blk_pread(w->guest, PLACE, LENGTH, got, 0), ==, 0);
    g_assert_cmpmem(got, LENGTH, w->buf, LENGTH);
}

/* A write is held for a while, and nothing that comes after it */
static void hold_write(World *w, QEMUIOVector *qiov, uint8_t byte)
{
    memset(w->buf, byte, LENGTH);
    qemu_iovec_init_buf(qiov, w->buf, LENGTH);
    w->ret = -EINPROGRESS;
    gate_close(w->disk, &w->disk->writes);
    blk_aio_pwritev(w->guest, PLACE, qiov, 0, write_end, w);
    while (!gate_held(w->disk, &w->disk->writes)) {
        aio_poll(qemu_get_aio_context(), true);
    }
    WITH_QEMU_LOCK_GUARD(&w->disk->lock) {
        w->disk->writes.tickets = INT_MAX;
    }
    w->timer = aio_timer_new(qemu_get_aio_context(), QEMU_CLOCK_REALTIME,
                             SCALE_MS, look, w);
    w->looks = 0;
    look(w);
}

/* The change has waited until the write had been made */
static void assert_waited(World *w)
{
    g_assert_cmpint(w->looks, ==, LOOKS);
    g_assert_cmpint(gate_held(w->disk, &w->disk->writes), ==, 0);
    while (w->ret == -EINPROGRESS) {
        aio_poll(qemu_get_aio_context(), true);
    }
    g_assert_cmpint(w->ret, ==, 0);
}

static void test_snapshot(void)
{
    QEMUSnapshotInfo info = { .name = "one" };
    QEMUIOVector qiov;
    World w = { };

    world_begin(&w);
    guest_write(&w, 1);
    hold_write(&w, &qiov, 2);
    g_assert_cmpint(bdrv_snapshot_create(blk_bs(w.guest), &info), ==, 0);
    assert_waited(&w);
    guest_write(&w, 3);
    g_assert_cmpint(bdrv_snapshot_goto(blk_bs(w.guest), "one", &error_abort),
                    ==, 0);
    assert_reads(&w, 2);
    world_end(&w);
}

static void test_shrink(void)
{
    QEMUIOVector qiov;
    World w = { };

    world_begin(&w);
    hold_write(&w, &qiov, 1);
    g_assert_cmpint(blk_truncate(w.guest, SHRUNK_SIZE, false,
                                 PREALLOC_MODE_OFF, 0, &error_abort), ==, 0);
    assert_waited(&w);
    g_assert_cmpint(blk_truncate(w.guest, DISK_SIZE, false, PREALLOC_MODE_OFF,
                                 0, &error_abort), ==, 0);
    assert_reads(&w, 0);
    world_end(&w);
}

static void test_make_empty(void)
{
    QEMUIOVector qiov;
    World w = { };

    world_begin(&w);
    hold_write(&w, &qiov, 1);
    g_assert_cmpint(blk_make_empty(w.guest, &error_abort), ==, 0);
    assert_waited(&w);
    assert_reads(&w, 0);
    world_end(&w);
}

int main(int argc, char **argv)
{
    bdrv_init();
    qemu_init_main_loop(&error_abort);
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/thinvm/drained/snapshot", test_snapshot);
    g_test_add_func("/thinvm/drained/shrink", test_shrink);
    g_test_add_func("/thinvm/drained/make-empty", test_make_empty);
    return g_test_run();
}
