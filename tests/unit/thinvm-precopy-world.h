/*
 * A guest, its disk, a target and the job blockdev-precopy, in memory
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * All of the job but its QMP command and hints, in QEMU's block layer.  Source
 * and target are in memory; what is written to the target waits at a gate
 * until the test lets it through, and the delay of a guest's writes takes the
 * test's time.  There is one world, which setup() begins and teardown() ends.
 */

#ifndef THINVM_PRECOPY_WORLD_H
#define THINVM_PRECOPY_WORLD_H

#include "thinvm-gate-disk.h"
#include "../../block/precopy/precopy.h"

#define SIZE    (4 * MiB + 5 * KiB + 512)
#define JOB_ID  "job"

/* Turn the loop until something has come about */
#define WAIT_UNTIL(condition) \
    do { \
        int64_t _limit = g_get_monotonic_time() + 60 * G_USEC_PER_SEC; \
        while (!(condition)) { \
            g_assert_cmpint(g_get_monotonic_time(), <, _limit); \
            if (!aio_poll(qemu_get_aio_context(), false)) { \
                g_usleep(100); \
            } \
        } \
    } while (0)

/* Sleep of a guest's request */
typedef struct PrecopyNap {
    bool played;            /* else it is sleep as usual */
    bool hold;              /* until it is woken */
    int nb;
    int64_t total, longest;
    Coroutine *sleeper;
    void (*look)(void);     /* when it begins */
} PrecopyNap;

typedef struct PrecopyWorld {
    AioContext *ctx;
    BlockDriverState *source_bs, *target_bs;
    GateDisk *source, *target;
    BlockBackend *guest;
    PrecopyJob *job;
} PrecopyWorld;

extern PrecopyNap nap;
extern PrecopyWorld w;

/* A request of the guest that may take a while */
typedef struct Request {
    QEMUIOVector qiov;
    uint8_t *buf;
    int ret;
} Request;

/* Beside each in the .c file: what it does */
void turn(void);
void setup(int64_t length, int64_t target_length, AioContext *ctx);
void start(PrecopyOptions o);
void start_default(void);
JobStatus status(void);
void job_is_to(void (*verb)(Job *, Error **));
void cancel_by_force(Job *job, Error **errp);
void assert_ends(int ret, BlockDriverState *where);
void complete(void);
void teardown(void);
Request *write_begin(int64_t offset, int64_t bytes, uint8_t byte);
bool request_is_over(Request *r);
void write_end(Request *r);
void guest_writes(int64_t offset, int64_t bytes, uint8_t byte);
void wait_ready(void);
void ready_with_rest(void);
void time_for_less_is_spent(void);
void reach_last_phase(void);
void open_writes(void *opaque);
void open_flushes(void *opaque);
void later(QEMUBHFunc *what);
void outpace(void);

#endif
