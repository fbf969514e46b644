/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Programs that write files, as threads of the guest of files.c.
 *
 * Each load overwrites one file in blocks, so many a second, in batches ten
 * times a second, through the page cache; if it is to sync, fsync() ends each
 * batch.  One that cannot keep up leaves out what it is late with, so that
 * what is counted is what the guest gets done.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include "load.h"

#define MAX_LOADS   8
#define BATCHES     10              /* in a second */
#define MAX_BLOCK   (1 << 20)

struct load {
    pthread_t thread;
    int fd;
    uint64_t blocks, block;         /* how many, of how many bytes */
    uint64_t per_second;
    bool random, sync;
    uint64_t at, seed;
};

static struct load loads[MAX_LOADS];
static unsigned nb_loads;
static atomic_bool ending;
static atomic_ullong nb_writes, slowest_us;
static atomic_int failed;

static uint64_t now_us(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000ULL + t.tv_nsec / 1000;
}

static uint64_t next_random(struct load *l)
{
    l->seed ^= l->seed << 13;       /* xorshift */
    l->seed ^= l->seed >> 7;
    l->seed ^= l->seed << 17;
    return l->seed;
}

static bool write_block(struct load *l, char *buf)
{
    uint64_t n = l->random ? next_random(l) % l->blocks : l->at;

    l->at = (l->at + 1) % l->blocks;
    for (uint64_t i = 0; i < l->block; i += 512) {
        uint64_t mark = next_random(l);

        memcpy(buf + i, &mark, sizeof(mark));
    }
    if (pwrite(l->fd, buf, l->block, n * l->block) != (ssize_t)l->block) {
        return false;
    }
    atomic_fetch_add(&nb_writes, 1);
    return true;
}

static bool sync_load(struct load *l)
{
    uint64_t begin = now_us(), took;
    int ret = fsync(l->fd);

    took = now_us() - begin;
    if (took > atomic_load(&slowest_us)) {
        atomic_store(&slowest_us, took);
    }
    return ret == 0;
}

static void *run_load(void *opaque)
{
    struct load *l = opaque;
    char *buf = malloc(l->block);
    uint64_t due = now_us(), owed = 0;
    bool good = buf;

    memset(buf, 'x', buf ? l->block : 0);
    while (good && !atomic_load(&ending)) {
        uint64_t now = now_us();

        if (now < due) {
            usleep(due - now);
        }
        due = (now > due + 1000000 ? now : due) + 1000000 / BATCHES;
        for (owed += l->per_second; good && owed >= BATCHES &&
             !atomic_load(&ending); owed -= BATCHES) {
            good = write_block(l, buf);
        }
        good = good && (!l->sync || sync_load(l));
    }
    if (!good) {
        atomic_store(&failed, errno ? errno : EIO);
    }
    free(buf);
    close(l->fd);
    return NULL;
}

/* "load PATH MIB KIB PER_SECOND random|sequential sync|buffered" */
int load_start(char **word)
{
    struct load *l = &loads[nb_loads];

    errno = EINVAL;
    if (nb_loads == MAX_LOADS) {
        return -1;
    }
    *l = (struct load) {
        .block = strtoull(word[3], NULL, 10) * 1024,
        .per_second = strtoull(word[4], NULL, 10),
        .random = !strcmp(word[5], "random"),
        .sync = !strcmp(word[6], "sync"),
        .seed = 0x9e3779b97f4a7c15ULL + nb_loads,
    };
    if (!l->block || l->block > MAX_BLOCK) {
        return -1;
    }
    l->blocks = strtoull(word[2], NULL, 10) * (1 << 20) / l->block;
    l->fd = open(word[1], O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    if (!l->blocks || l->fd < 0) {
        return -1;
    }
    atomic_store(&ending, false);
    errno = pthread_create(&l->thread, NULL, run_load, l);
    if (errno) {
        close(l->fd);
        return -1;
    }
    nb_loads++;
    return 0;
}

int load_report(uint64_t *writes, uint64_t *us)
{
    *writes = atomic_exchange(&nb_writes, 0);
    *us = atomic_exchange(&slowest_us, 0);
    errno = atomic_load(&failed);
    return errno ? -1 : 0;
}

int load_end(void)
{
    atomic_store(&ending, true);
    while (nb_loads) {
        pthread_join(loads[--nb_loads].thread, NULL);
    }
    errno = atomic_load(&failed);
    return errno ? -1 : 0;
}
