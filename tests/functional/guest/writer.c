/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The guest of thinvm's functional tests: the only program of its initramfs.
 *
 * It is /init.  It loads the virtio modules that the kernel keeps outside,
 * opens the disk with O_DIRECT, and obeys one-line commands that arrive on
 * the first virtio-serial port.  All that the host later has to know is a
 * pure function of numbers that both sides share: lane, sequence number and
 * seed choose the block that is written and what is written there, see
 * op_hash() here and op_hash() in ../lib/model.py.  So the guest reports
 * nothing but how far each lane has come, and the host can say for each block
 * which contents are allowed after a crash.
 *
 * Lanes are threads.  Block index I of lane L lies at byte
 * base + (I * lanes + L) * stride, so lanes never write the same block but,
 * with a small stride, do write to the same cluster at the same time.  A lane
 * has one request under way at a time; its sequence numbers are acknowledged
 * in order.  With disks=2 the blocks with an odd index are on the second disk,
 * so that a lane writes now to one disk and now to the other.
 *
 * Commands (key=value pairs in any order; numbers are decimal):
 *   write seed= lanes= blocks= stride= base= first= flush= zero= discard=
 *         usec= limit= disks=
 *   stop                        ends the lanes, answers "stopped"
 *   verify lanes= blocks= stride= base= disks=
 *                               "V lane index seq seed" for each block that
 *                               is not zero, "B lane index" for one that
 *                               holds neither zeroes nor a whole block of
 *                               ours, then "verified"
 *   fill lanes= blocks= base= limit=     (up to 64 lanes)
 *                               all bytes of MiB base + I (I below blocks)
 *                               become I % 251 + 1, in sequence by all lanes,
 *                               limit MiB a second at most (0: any), then a
 *                               flush; answers "filled MILLISECONDS ERRORS"
 *   sync                        flushes the disk, answers "synced"
 *   size                        answers "size BYTES"
 *   poweroff                    ends the machine
 * While lanes run, a line "P a0,a1,... f0,f1,..." is sent every few
 * milliseconds if something changed: acknowledged and flushed sequence
 * numbers of each lane.  "X text" reports an error.
 *
 * Invariant: a number is reported only after the write (or flush) it stands
 * for has returned success.
 */

#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define OUR_BLOCK 4096          /* bytes written by one operation */
#define MAX_LANES 16
#define MAX_FILL_LANES 64
#define MAX_DISKS 2
#define BLOCK_MAGIC 0x6b6c622d6d766e74ULL
#define REPORT_USEC 3000

/* One block on the disk is this head, repeated until the block is full. */
struct block_head {
    uint64_t magic;
    uint64_t seed;
    uint64_t index;
    uint64_t seq;
    uint64_t lane;
    uint64_t pad[2];
    uint32_t zero;
    uint32_t crc;               /* CRC-32 of the bytes before it */
} __attribute__((packed));
_Static_assert(sizeof(struct block_head) == 64, "host and guest must agree");

/* The parameters of one run; the names are those of the commands. */
struct run {
    uint64_t seed, lanes, blocks, stride, base, first;
    uint64_t flush;             /* a lane flushes after so many operations */
    uint64_t zero, discard;     /* percent of the operations */
    uint64_t usec;              /* pause between operations */
    uint64_t limit;             /* operations per lane; 0: until "stop" */
    uint64_t disks;
};

static struct run run;
static int disk_fd[MAX_DISKS] = { -1, -1 };
static int port_fd = -1;
static pthread_mutex_t port_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_t lane_thread[MAX_LANES];
static pthread_t report_thread;
static bool running;
static atomic_bool stopping;
static atomic_bool report_stopping;
static _Atomic uint64_t acked[MAX_LANES];
static _Atomic uint64_t flushed[MAX_LANES];

static void say(const char *fmt, ...)
{
    char line[1024];
    va_list ap;
    size_t len, done = 0;

    va_start(ap, fmt);
    vsnprintf(line, sizeof(line) - 1, fmt, ap);
    va_end(ap);
    len = strlen(line);
    line[len++] = '\n';

    pthread_mutex_lock(&port_lock);
    while (done < len) {
        ssize_t n = write(port_fd, line + done, len - done);

        if (n > 0) {
            done += n;
        } else if (errno != EINTR) {
            /* The host is not connected at this moment: it will be. */
            usleep(10000);
        }
    }
    pthread_mutex_unlock(&port_lock);
}

/* For what goes wrong before there is a port. */
static void panic_out(const char *what)
{
    printf("writer: %s: %s\n", what, strerror(errno));
    fflush(stdout);
    sleep(2);
    reboot(RB_POWER_OFF);
    for (;;) {
        pause();
    }
}

static uint64_t op_hash(uint64_t seed, uint64_t lane, uint64_t seq)
{
    uint64_t x = seed + lane * 0x9E3779B97F4A7C15ULL
                      + seq * 0xD1342543DE82EF95ULL;

    x ^= x >> 30;
    x *= 0xBF58476D1CE4E5B9ULL;
    x ^= x >> 27;
    x *= 0x94D049BB133111EBULL;
    return x ^ (x >> 31);
}

static uint32_t crc32_of(const void *buf, size_t len)
{
    const uint8_t *p = buf;
    uint32_t crc = 0xffffffff;

    while (len--) {
        crc ^= *p++;
        for (int bit = 0; bit < 8; bit++) {
            crc = (crc >> 1) ^ (crc & 1 ? 0xedb88320 : 0);
        }
    }
    return ~crc;
}

static void fill_block(uint8_t *buf, uint64_t lane, uint64_t index,
                       uint64_t seq)
{
    struct block_head head = {
        .magic = BLOCK_MAGIC, .seed = run.seed, .index = index,
        .seq = seq, .lane = lane,
    };

    head.crc = crc32_of(&head, offsetof(struct block_head, crc));
    for (size_t at = 0; at < OUR_BLOCK; at += sizeof(head)) {
        memcpy(buf + at, &head, sizeof(head));
    }
}

static uint64_t block_offset(const struct run *r, uint64_t lane,
                             uint64_t index)
{
    return r->base + (index * r->lanes + lane) * r->stride;
}

/* Carries out operation @seq of @lane; true if it was acknowledged. */
static bool do_op(uint64_t lane, uint64_t seq, uint8_t *buf)
{
    uint64_t hash = op_hash(run.seed, lane, seq);
    uint64_t index = hash % run.blocks;
    uint64_t kind = (hash >> 40) % 100;
    uint64_t range[2] = { block_offset(&run, lane, index), OUR_BLOCK };
    int fd = disk_fd[index % run.disks];

    if (kind < run.zero) {
        return ioctl(fd, BLKZEROOUT, range) == 0;
    }
    if (kind < run.zero + run.discard) {
        return ioctl(fd, BLKDISCARD, range) == 0;
    }
    fill_block(buf, lane, index, seq);
    return pwrite(fd, buf, OUR_BLOCK, range[0]) == OUR_BLOCK;
}

static bool flush_disks(uint64_t disks)
{
    for (uint64_t i = 0; i < disks; i++) {
        if (fdatasync(disk_fd[i]) < 0) {
            return false;
        }
    }
    return true;
}

static void *lane_main(void *opaque)
{
    uint64_t lane = (uintptr_t)opaque;
    uint64_t seq = run.first;
    uint8_t *buf;

    if (posix_memalign((void **)&buf, OUR_BLOCK, OUR_BLOCK)) {
        say("X no memory for lane %llu", (unsigned long long)lane);
        return NULL;
    }
    while (!stopping && (!run.limit || seq < run.first + run.limit)) {
        if (!do_op(lane, seq, buf)) {
            say("X lane %llu seq %llu: %s", (unsigned long long)lane,
                (unsigned long long)seq, strerror(errno));
            break;
        }
        acked[lane] = seq;
        if (run.flush && seq % run.flush == 0) {
            if (!flush_disks(run.disks)) {
                say("X lane %llu flush: %s", (unsigned long long)lane,
                    strerror(errno));
                break;
            }
            flushed[lane] = seq;
        }
        if (run.usec) {
            usleep(run.usec);
        }
        seq++;
    }
    free(buf);
    return NULL;
}

static void report_progress(char *last, size_t size)
{
    char line[900] = "P ";
    size_t len = 2;

    for (uint64_t i = 0; i < run.lanes; i++) {
        len += snprintf(line + len, sizeof(line) - len, "%s%llu",
                        i ? "," : "", (unsigned long long)acked[i]);
    }
    for (uint64_t i = 0; i < run.lanes; i++) {
        len += snprintf(line + len, sizeof(line) - len, "%s%llu",
                        i ? "," : " ", (unsigned long long)flushed[i]);
    }
    if (strcmp(line, last)) {
        snprintf(last, size, "%s", line);
        say("%s", line);
    }
}

static void *report_main(void *opaque)
{
    char last[900] = "";

    while (!report_stopping) {
        report_progress(last, sizeof(last));
        usleep(REPORT_USEC);
    }
    report_progress(last, sizeof(last));
    return NULL;
}

static bool open_disks(uint64_t disks)
{
    char path[] = "/dev/vda";

    for (uint64_t i = 0; i < disks; i++) {
        path[sizeof(path) - 2] = 'a' + i;
        if (disk_fd[i] < 0) {
            disk_fd[i] = open(path, O_RDWR | O_DIRECT | O_CLOEXEC);
        }
        if (disk_fd[i] < 0) {
            say("X %s: %s", path, strerror(errno));
            return false;
        }
    }
    return true;
}

/* Reads "key=value" pairs into a run; false if one is unknown. */
static bool parse_run(char *args, uint64_t max_lanes, struct run *r)
{
    const struct {
        const char *key;
        uint64_t *value;
    } keys[] = {
        { "seed", &r->seed }, { "lanes", &r->lanes },
        { "blocks", &r->blocks }, { "stride", &r->stride },
        { "base", &r->base }, { "first", &r->first },
        { "flush", &r->flush }, { "zero", &r->zero },
        { "discard", &r->discard }, { "usec", &r->usec },
        { "limit", &r->limit }, { "disks", &r->disks },
    };
    char *save = NULL;

    *r = (struct run) {
        .lanes = 1, .blocks = 1024, .stride = OUR_BLOCK, .first = 1,
        .disks = 1,
    };
    for (char *word = strtok_r(args, " ", &save); word;
         word = strtok_r(NULL, " ", &save)) {
        char *eq = strchr(word, '=');
        bool known = false;

        if (eq) {
            *eq = '\0';
            for (size_t i = 0; i < sizeof(keys) / sizeof(keys[0]); i++) {
                if (!strcmp(keys[i].key, word)) {
                    *keys[i].value = strtoull(eq + 1, NULL, 10);
                    known = true;
                }
            }
        }
        if (!known) {
            say("X unknown parameter %s", word);
            return false;
        }
    }
    if (!r->lanes || r->lanes > max_lanes || !r->blocks) {
        say("X lanes must be 1 to %d, blocks at least 1", (int)max_lanes);
        return false;
    }
    if (!r->disks || r->disks > MAX_DISKS) {
        say("X disks must be 1 to %d", MAX_DISKS);
        return false;
    }
    return open_disks(r->disks);
}

static void cmd_stop(void)
{
    if (running) {
        stopping = true;
        for (uint64_t i = 0; i < run.lanes; i++) {
            pthread_join(lane_thread[i], NULL);
        }
        report_stopping = true;
        pthread_join(report_thread, NULL);
        running = false;
    }
    say("stopped");
}

static void cmd_write(char *args)
{
    struct run wanted;

    if (running) {
        say("X already writing");
        return;
    }
    if (!parse_run(args, MAX_LANES, &wanted)) {
        return;
    }
    run = wanted;
    stopping = false;
    report_stopping = false;
    for (uint64_t i = 0; i < run.lanes; i++) {
        acked[i] = flushed[i] = run.first - 1;
    }
    running = true;
    say("writing");
    pthread_create(&report_thread, NULL, report_main, NULL);
    for (uint64_t i = 0; i < run.lanes; i++) {
        pthread_create(&lane_thread[i], NULL, lane_main, (void *)(uintptr_t)i);
    }
}

static bool block_is_ours(const uint8_t *buf, uint64_t lane, uint64_t index)
{
    struct block_head head;

    memcpy(&head, buf, sizeof(head));
    if (head.magic != BLOCK_MAGIC || head.lane != lane || head.index != index
        || head.crc != crc32_of(&head, offsetof(struct block_head, crc))) {
        return false;
    }
    for (size_t at = sizeof(head); at < OUR_BLOCK; at += sizeof(head)) {
        if (memcmp(buf + at, &head, sizeof(head))) {
            return false;
        }
    }
    return true;
}

static void verify_block(const struct run *r, uint8_t *buf, uint64_t lane,
                         uint64_t index)
{
    static const uint8_t zeroes[OUR_BLOCK];
    struct block_head head;
    ssize_t n = pread(disk_fd[index % r->disks], buf, OUR_BLOCK,
                      block_offset(r, lane, index));

    if (n != OUR_BLOCK) {
        say("X read of lane %llu index %llu: %s", (unsigned long long)lane,
            (unsigned long long)index, n < 0 ? strerror(errno) : "short");
    } else if (!memcmp(buf, zeroes, OUR_BLOCK)) {
        return;
    } else if (!block_is_ours(buf, lane, index)) {
        say("B %llu %llu", (unsigned long long)lane,
            (unsigned long long)index);
    } else {
        memcpy(&head, buf, sizeof(head));
        say("V %llu %llu %llu %llu", (unsigned long long)lane,
            (unsigned long long)index, (unsigned long long)head.seq,
            (unsigned long long)head.seed);
    }
}

static void cmd_verify(char *args)
{
    struct run r;
    uint8_t *buf;

    if (!parse_run(args, MAX_LANES, &r)) {
        return;
    }
    if (posix_memalign((void **)&buf, OUR_BLOCK, OUR_BLOCK)) {
        say("X no memory");
        return;
    }
    for (uint64_t index = 0; index < r.blocks; index++) {
        for (uint64_t lane = 0; lane < r.lanes; lane++) {
            verify_block(&r, buf, lane, index);
        }
    }
    free(buf);
    say("verified");
}

#define FILL_SIZE (1 << 20)

static struct run filling;
static struct timespec fill_began;
static _Atomic uint64_t fill_next, fill_errors;

static uint64_t fill_msec(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (now.tv_sec - fill_began.tv_sec) * 1000 +
           (now.tv_nsec - fill_began.tv_nsec) / 1000000;
}

/* One request of each lane is under way at a time */
static void *fill_main(void *opaque)
{
    uint8_t *buf = NULL;
    uint64_t i;

    if (posix_memalign((void **)&buf, OUR_BLOCK, FILL_SIZE)) {
        fill_errors++;
        return opaque;
    }
    while ((i = fill_next++) < filling.blocks) {
        while (filling.limit && fill_msec() * filling.limit / 1000 < i) {
            usleep(1000);
        }
        memset(buf, i % 251 + 1, FILL_SIZE);
        if (pwrite(disk_fd[0], buf, FILL_SIZE, (filling.base + i) * FILL_SIZE) !=
            FILL_SIZE) {
            say("X fill at MiB %llu: %s",
                (unsigned long long)(filling.base + i), strerror(errno));
            fill_errors++;
        }
    }
    free(buf);
    return NULL;
}

static void *fill_control(void *opaque)
{
    pthread_t lanes[MAX_FILL_LANES];

    for (uint64_t i = 0; i < filling.lanes; i++) {
        pthread_create(&lanes[i], NULL, fill_main, NULL);
    }
    for (uint64_t i = 0; i < filling.lanes; i++) {
        pthread_join(lanes[i], NULL);
    }
    if (fdatasync(disk_fd[0]) < 0) {
        say("X fill, flush: %s", strerror(errno));
        fill_errors++;
    }
    say("filled %llu %llu", (unsigned long long)fill_msec(),
        (unsigned long long)fill_errors);
    return opaque;
}

static void cmd_fill(char *args)
{
    pthread_t control;

    if (!parse_run(args, MAX_FILL_LANES, &filling)) {
        return;
    }
    clock_gettime(CLOCK_MONOTONIC, &fill_began);
    fill_next = fill_errors = 0;
    say("filling");
    pthread_create(&control, NULL, fill_control, NULL);
    pthread_detach(control);
}

static void cmd_size(void)
{
    uint64_t bytes = 0;

    if (ioctl(disk_fd[0], BLKGETSIZE64, &bytes) < 0) {
        say("X size: %s", strerror(errno));
    } else {
        say("size %llu", (unsigned long long)bytes);
    }
}

static void obey(char *line)
{
    char *args = strchr(line, ' ');

    args = args ? (*args = '\0', args + 1) : line + strlen(line);
    if (!strcmp(line, "write")) {
        cmd_write(args);
    } else if (!strcmp(line, "stop")) {
        cmd_stop();
    } else if (!strcmp(line, "verify")) {
        cmd_verify(args);
    } else if (!strcmp(line, "fill")) {
        cmd_fill(args);
    } else if (!strcmp(line, "size")) {
        cmd_size();
    } else if (!strcmp(line, "sync")) {
        if (!flush_disks(1)) {
            say("X sync: %s", strerror(errno));
        } else {
            say("synced");
        }
    } else if (!strcmp(line, "poweroff")) {
        reboot(RB_POWER_OFF);
    } else if (*line) {
        say("X unknown command %s", line);
    }
}

/* Returns 0 or the errno. */
static int load_module(const char *name)
{
    char path[512];
    int fd, ret;

    snprintf(path, sizeof(path), "/modules/%s", name);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return errno;
    }
    ret = syscall(SYS_finit_module, fd, "", 0) < 0 ? errno : 0;
    close(fd);
    return ret == EEXIST ? 0 : ret;
}

/*
 * Which module needs which differs from kernel to kernel, so they are tried
 * again as long as that helps (one that lacks another's symbols says ENOENT).
 */
static void load_modules(void)
{
    struct dirent **list;
    int n = scandir("/modules", &list, NULL, alphasort);
    int err[64] = { 0 };
    bool progress = true;

    for (int i = 0; i < n && i < 64; i++) {
        err[i] = list[i]->d_name[0] == '.' ? 0 : ENOENT;
    }
    while (progress) {
        progress = false;
        for (int i = 0; i < n && i < 64; i++) {
            if (err[i]) {
                err[i] = load_module(list[i]->d_name);
                progress |= !err[i];
            }
        }
    }
    for (int i = 0; i < n && i < 64; i++) {
        if (err[i]) {
            printf("writer: module %s: %s\n", list[i]->d_name,
                   strerror(err[i]));
        }
    }
}

static int open_when_there(const char *path, int flags)
{
    for (int tries = 0; tries < 6000; tries++) {
        int fd = open(path, flags | O_CLOEXEC);

        if (fd >= 0) {
            return fd;
        }
        usleep(10000);
    }
    panic_out(path);
    return -1;
}

int main(void)
{
    static char line[1024];
    size_t have = 0;

    mkdir("/dev", 0755);
    mkdir("/sys", 0755);
    mkdir("/proc", 0755);
    mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
    mount("sysfs", "/sys", "sysfs", 0, NULL);
    mount("proc", "/proc", "proc", 0, NULL);
    if (freopen("/dev/console", "w", stdout) == NULL) {
        panic_out("/dev/console");
    }
    setvbuf(stdout, NULL, _IONBF, 0);
    load_modules();
    port_fd = open_when_there("/dev/vport0p1", O_RDWR);
    disk_fd[0] = open_when_there("/dev/vda", O_RDWR | O_DIRECT);
    printf("writer: ready\n");
    say("ready");

    for (;;) {
        ssize_t n = read(port_fd, line + have, 1);

        if (n <= 0) {
            /* No host side at this moment. */
            usleep(10000);
        } else if (line[have] == '\n') {
            line[have] = '\0';
            have = 0;
            obey(line);
        } else if (have < sizeof(line) - 1) {
            have++;
        }
    }
}
