/*
 * thinvm: requests of several threads on one disk, as fast as they go
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A program for scripts/bench, no test.  Opens a disk and lets each of some
 * threads, which have event loops of their own as iothreads have, keep a
 * number of requests of 4 KiB at random places in flight; this is what a
 * virtio-blk device does that has a queue for each iothread, without a guest.
 * Works for any format.  Prints requests per second.
 *
 *   bench-thinvm-queues json:{...} THREADS DEPTH SECONDS read|write
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/cutils.h"
#include "qemu/main-loop.h"
#include "qemu/memalign.h"
#include "qemu/module.h"
#include "block/block.h"
#include "iothread.h"
#include "system/block-backend.h"

#define REQUEST         4096
#define MAX_THREADS     64
#define MAX_DEPTH       1024
#define MAX_SECONDS     3600

typedef struct Bench {
    BlockBackend *blk;
    uint64_t places;            /* of the disk, in requests */
    bool write;
    bool stop;                  /* atomic */
    unsigned running;           /* atomic: coroutines */
    int failed;                 /* atomic: the first error */
} Bench;

typedef struct Queue {
    Bench *bench;
    IOThread *thread;
    uint64_t done;              /* of its thread, until that has ended */
    uint64_t random;
} Queue;

/* Marsaglia, Xorshift RNGs, 2003 */
static uint64_t next_random(uint64_t *x)
{
    *x ^= *x << 13;
    *x ^= *x >> 7;
    *x ^= *x << 17;
    return *x;
}

static void coroutine_fn queue_entry(void *opaque)
{
    Queue *q = opaque;
    Bench *b = q->bench;
    void *buf = blk_blockalign(b->blk, REQUEST);
    int ret = 0;

    memset(buf, 0x5a, REQUEST);
    while (ret >= 0 && !qatomic_read(&b->stop)) {
        int64_t at = next_random(&q->random) % b->places * REQUEST;

        ret = b->write ? blk_co_pwrite(b->blk, at, REQUEST, buf, 0)
                       : blk_co_pread(b->blk, at, REQUEST, buf, 0);
        q->done++;
    }
    if (ret < 0) {
        qatomic_cmpxchg(&b->failed, 0, ret);
    }
    qemu_vfree(buf);
    qatomic_dec(&b->running);
}

/* Requests per second of all threads together */
static double measure(Bench *b, unsigned threads, unsigned depth,
                      unsigned seconds)
{
    g_autofree Queue *queues = g_new0(Queue, threads);
    int64_t begin = g_get_monotonic_time(), end;
    uint64_t done = 0;

    b->running = threads * depth;
    for (unsigned i = 0; i < threads; i++) {
        queues[i] = (Queue) { b, iothread_new(), 0, 0x9e3779b97f4a7c15 + i };
        for (unsigned d = 0; d < depth; d++) {
            aio_co_schedule(iothread_get_aio_context(queues[i].thread),
                            qemu_coroutine_create(queue_entry, &queues[i]));
        }
    }
    while (g_get_monotonic_time() - begin < seconds * G_USEC_PER_SEC &&
           !qatomic_read(&b->failed)) {
        g_usleep(10000);
    }
    qatomic_set(&b->stop, true);
    end = g_get_monotonic_time();
    while (qatomic_read(&b->running)) {
        /* what a request left to the main loop must be done, too */
        aio_poll(qemu_get_aio_context(), false);
        g_usleep(1000);
    }
    for (unsigned i = 0; i < threads; i++) {
        iothread_join(queues[i].thread);
        done += queues[i].done;
    }
    return done * (double)G_USEC_PER_SEC / (end - begin);
}

static unsigned number(const char *what, const char *text, unsigned most)
{
    unsigned value;

    if (qemu_strtoui(text, NULL, 10, &value) < 0 || !value || value > most) {
        fprintf(stderr, "%s is '%s', and must be between 1 and %u\n", what,
                text, most);
        exit(1);
    }
    return value;
}

int main(int argc, char **argv)
{
    Error *local_err = NULL;
    unsigned threads, depth, seconds;
    Bench bench = {};
    double rate;

    if (argc != 6 || (strcmp(argv[5], "read") && strcmp(argv[5], "write"))) {
        fprintf(stderr, "usage: %s DISK THREADS DEPTH SECONDS read|write\n",
                argv[0]);
        return 1;
    }
    threads = number("THREADS", argv[2], MAX_THREADS);
    depth = number("DEPTH", argv[3], MAX_DEPTH);
    seconds = number("SECONDS", argv[4], MAX_SECONDS);
    bench.write = !strcmp(argv[5], "write");

    qemu_init_main_loop(&error_fatal);
    module_call_init(MODULE_INIT_TRACE);
    bdrv_init();
    bench.blk = blk_new_open(argv[1], NULL, NULL,
                             bench.write ? BDRV_O_RDWR : 0, &local_err);
    if (!bench.blk) {
        error_report_err(local_err);
        return 1;
    }
    bench.places = MAX(blk_getlength(bench.blk), 0) / REQUEST;
    if (!bench.places) {
        fprintf(stderr, "The disk is smaller than a request\n");
        return 1;
    }
    rate = measure(&bench, threads, depth, seconds);
    blk_unref(bench.blk);
    if (bench.failed) {
        fprintf(stderr, "A request failed: %s\n", strerror(-bench.failed));
        return 1;
    }
    printf("%.0f\n", rate);
    return 0;
}
