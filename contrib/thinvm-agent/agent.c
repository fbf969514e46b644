/*
 * thinvm-agent: tells the host which parts of a guest's disks will be written
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Runs in a guest, and answers the object thinvm-hints of its QEMU over a
 * virtio-serial port (docs/interop/thinvm-hints.rst).  While a job of the host
 * wants to know, it looks at regular times
 *   - which files are being written (fanotify),
 *   - which of their pages are dirty (cachestat(), Linux 6.5 and later),
 *   - where these lie in the file system (FIEMAP),
 *   - and, through partitions and linear maps of LVM, on which disk;
 *   - and which space file systems do not use (FS_IOC_GETFSMAP: ext4, xfs).
 * What cannot be told that way is counted as unknown, with the reason.
 * Started with --booted, it also says once that the guest has booted.
 *
 * It writes nothing but to the port, has no file system write anything back,
 * and changes no setting; on request it discards free space (FITRIM).  It
 * holds no file and no mount point open between looks.  Memory, work and
 * messages are bounded, and it runs as nobody with three capabilities.
 */
#include "agent.h"
#include <ctype.h>
#include <grp.h>
#include <linux/capability.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>

#define AGENT           "thinvm-agent/1.0"
#define VERSION         1
#define DEFAULT_PORT    "/dev/virtio-ports/org.thinvm.hints.0"
#define FREE_SECONDS    30          /* from one look at free space to the next */
#define COST_SECONDS    10
#define AGAIN_SECONDS   5           /* all is told again after so long */
/* Of the time that a look takes of a CPU, so many times passes between two */
#define REST            32
#define MAX_REST_MS     20000
#define MAX_MEMORY      (256UL * 1024 * 1024)
#define NOBODY          65534

static bool reporting, connected;
static uint64_t interval_ms, next_look, next_free, next_cost, next_again;
static pid_t trimmer;
static int trim_pipe = -1;
static uint64_t trim_request;
static bool booted;                 /* not yet said */
static volatile sig_atomic_t ended;

/* ------------------------------------------------------------------ */
/* A look                                                              */

/* Bytes that the page cache says are dirty, of all devices */
static uint64_t all_dirty(void)
{
    FILE *f = fopen("/proc/meminfo", "re");
    char line[128];
    uint64_t kib, sum = 0;

    while (f && fgets(line, sizeof(line), f)) {
        if (sscanf(line, "Dirty: %" SCNu64, &kib) == 1 ||
            sscanf(line, "Writeback: %" SCNu64, &kib) == 1) {
            sum += kib * 1024;
        }
    }
    if (f) {
        fclose(f);
    }
    return sum;
}

static void tell_cost(void)
{
    struct rusage self, children;
    uint64_t us;

    getrusage(RUSAGE_SELF, &self);
    getrusage(RUSAGE_CHILDREN, &children);
    us = (self.ru_utime.tv_sec + self.ru_stime.tv_sec +
          children.ru_utime.tv_sec + children.ru_stime.tv_sec) * 1000000ULL +
         self.ru_utime.tv_usec + self.ru_stime.tv_usec +
         children.ru_utime.tv_usec + children.ru_stime.tv_usec;
    say("cost %" PRIu64 " %" PRIu64 " %" PRIu64, us,
        bytes_written(), lines_sent);
}

static void look_at_free_space(void)
{
    find_free_space();
    for (unsigned i = 0; i < nb_disks; i++) {
        if (disks[i].told) {
            tell_difference(i, "free", "used", false, false, &disks[i].free,
                            &disks[i].now_free);
        }
        set_clear(&disks[i].now_free);
    }
}

static void look_at_dirty_pages(bool again)
{
    uint64_t known = 0, all;

    unknown = 0;
    worst = COMPLETE;
    for (unsigned i = 0; i < nb_disks; i++) {
        disks[i].known = 0;
    }
    find_dirty_pages();
    for (unsigned i = 0; i < nb_disks; i++) {
        if (disks[i].told) {
            tell_difference(i, "dirty", "clean", true, again,
                            &disks[i].dirty, &disks[i].now_dirty);
        }
        set_clear(&disks[i].now_dirty);
        known += disks[i].known;
    }
    all = all_dirty();
    if (all > known + unknown) {
        cannot_tell(all - known - unknown, OTHER);
    }
    for (unsigned i = 0; i < nb_disks; i++) {
        if (disks[i].told) {
            tell_coverage(i, watching());
        }
    }
}

static uint64_t cpu_ms(void)
{
    struct timespec t;

    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return t.tv_sec * 1000ULL + t.tv_nsec / 1000000;
}

/* Returns how long to rest, so that the guest does not mind */
static uint64_t look(void)
{
    uint64_t now = now_ms(), cpu = cpu_ms(), rest;

    read_mounts();
    tell_disks();
    look_at_dirty_pages(now >= next_again);
    if (now >= next_again) {
        next_again = now + AGAIN_SECONDS * 1000;
    }
    if (now >= next_free) {
        next_free = now + FREE_SECONDS * 1000;
        look_at_free_space();
    }
    if (now >= next_cost) {
        next_cost = now + COST_SECONDS * 1000;
        tell_cost();
    }
    close_mounts();
    rest = (cpu_ms() - cpu) * REST;
    rest = rest < MAX_REST_MS ? rest : MAX_REST_MS;
    return rest > interval_ms ? rest : interval_ms;
}

/* ------------------------------------------------------------------ */
/* What the host asks for                                              */

static void say_hello(void)
{
    forget_out();
    say("hello thinvm-hints %d " AGENT, VERSION);
}

static void stop_reporting(void)
{
    reporting = false;
    watch_stop();
    forget_disks();
}

static void start(uint64_t request, uint64_t interval, uint64_t rate)
{
    if (interval < 100 || interval > 60000 || rate < 1 || rate > 30000) {
        say("done %" PRIu64 " failed 0", request);
        return;
    }
    interval_ms = interval;
    set_range_rate(rate);
    if (!reporting) {
        watch_start();
        reporting = true;
        next_free = 0;
        next_cost = now_ms() + 1000;
    }
    say("done %" PRIu64 " ok 0", request);
    next_look = now_ms();
}

/* In a process of its own, since it may take minutes */
static void trim_child(unsigned disk, uint64_t least, int result)
{
    uint64_t sum = trim_mounts(disks[disk].device, least);

    _exit(write(result, &sum, sizeof(sum)) != sizeof(sum));
}

static void trim(uint64_t request, uint64_t disk, uint64_t least)
{
    int ends[2];

    if (trimmer) {
        say("done %" PRIu64 " busy 0", request);
        return;
    }
    if (disk >= nb_disks || !disks[disk].told) {
        say("done %" PRIu64 " failed 0", request);
        return;
    }
    if (pipe2(ends, O_CLOEXEC) < 0 || (trimmer = fork()) < 0) {
        trimmer = 0;
        say("done %" PRIu64 " failed 0", request);
        return;
    }
    if (!trimmer) {
        trim_child(disk, least, ends[1]);
    }
    close(ends[1]);
    trim_pipe = ends[0];
    trim_request = request;
}

static void trim_done(void)
{
    uint64_t sum = UINT64_MAX;
    bool ok = read(trim_pipe, &sum, sizeof(sum)) == sizeof(sum);

    close(trim_pipe);
    trim_pipe = -1;
    waitpid(trimmer, NULL, 0);
    trimmer = 0;
    say("done %" PRIu64 " %s %" PRIu64, trim_request,
        !ok ? "failed" : sum == UINT64_MAX ? "unsupported" : "ok",
        ok && sum != UINT64_MAX ? sum : 0);
    next_free = 0;
}

/* 1 to 19 digits, below 2^63 */
static bool number(const char *word, uint64_t *value)
{
    size_t n = word ? strspn(word, "0123456789") : 0;

    if (!n || n > 19 || word[n]) {
        return false;
    }
    *value = strtoull(word, NULL, 10);
    return *value <= INT64_MAX;
}

/* The host is trusted with our lives, yet a line may be cut off */
static void obey(char *line)
{
    char *word[5] = { NULL }, *rest = line;
    uint64_t n[3];
    unsigned nb = 0;

    while (nb < 5 && (word[nb] = strsep(&rest, " "))) {
        nb++;
    }
    if (nb == 3 && !strcmp(word[0], "hello") &&
        !strcmp(word[1], "thinvm-hints")) {
        say_hello();                /* it asks who is there */
    } else if (nb == 2 && !strcmp(word[0], "version") && number(word[1], n)) {
        /* somebody listens now */
        booted = booted && !say("booted");
    } else if (nb == 4 && !strcmp(word[0], "start") && number(word[1], n) &&
               number(word[2], n + 1) && number(word[3], n + 2)) {
        start(n[0], n[1], n[2]);
    } else if (nb == 2 && !strcmp(word[0], "stop") && number(word[1], n)) {
        stop_reporting();
        say("done %" PRIu64 " ok 0", n[0]);
    } else if (nb == 4 && !strcmp(word[0], "trim") && number(word[1], n) &&
               number(word[2], n + 1) && number(word[3], n + 2)) {
        trim(n[0], n[1], n[2]);
    }
}

/* Obey the lines that are there; false if the host's side is closed */
static bool hear(void)
{
    static char line[MAX_LINE];
    static size_t used;
    static bool skipping;
    char buf[512];
    ssize_t n;

    while ((n = read(port, buf, sizeof(buf))) > 0) {
        for (ssize_t i = 0; i < n; i++) {
            if (buf[i] == '\n') {
                line[used] = 0;
                if (!skipping) {
                    obey(line);
                }
                used = 0;
                skipping = false;
            } else if (used == sizeof(line) - 1) {
                skipping = true;
            } else {
                line[used++] = buf[i];
            }
        }
    }
    if (n == 0) {
        used = 0;
        skipping = false;
    }
    return n < 0 && (errno == EAGAIN || errno == EINTR);
}

/* ------------------------------------------------------------------ */
/* The process                                                         */

/*
 * Keep what fanotify on a file system, FITRIM and GETFSMAP (SYS_ADMIN),
 * opening by handle (DAC_READ_SEARCH), and cachestat() of others' files
 * (FOWNER) need; nothing else.
 */
static bool drop_privileges(void)
{
    struct __user_cap_header_struct head = { _LINUX_CAPABILITY_VERSION_3, 0 };
    struct __user_cap_data_struct data[2] = { 0 };

    if (geteuid() != 0) {
        return true;                /* it knows less, and says so */
    }
    data[0].effective = data[0].permitted =
        1u << CAP_SYS_ADMIN | 1u << CAP_DAC_READ_SEARCH | 1u << CAP_FOWNER;
    for (int cap = 0; prctl(PR_CAPBSET_READ, cap) >= 0; cap++) {
        prctl(PR_CAPBSET_DROP, cap);
    }
    return prctl(PR_SET_KEEPCAPS, 1) == 0 && setgroups(0, NULL) == 0 &&
           setresgid(NOBODY, NOBODY, NOBODY) == 0 &&
           setresuid(NOBODY, NOBODY, NOBODY) == 0 &&
           syscall(SYS_capset, &head, data) == 0 &&
           prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0;
}

static void limit(void)
{
    struct rlimit memory = { MAX_MEMORY, MAX_MEMORY };
    struct rlimit fds = { 512, 512 }, core = { 0, 0 };

    setrlimit(RLIMIT_AS, &memory);
    setrlimit(RLIMIT_NOFILE, &fds);
    setrlimit(RLIMIT_CORE, &core);
}

static void on_signal(int number)
{
    ended = number;
}

static int time_left(void)
{
    uint64_t now = now_ms();

    if (!connected) {
        return 1000;
    }
    if (!reporting) {
        return -1;
    }
    return next_look > now ? next_look - now : 0;
}

static void on_hang_up(void)
{
    stop_reporting();
    forget_out();
    connected = false;
}

static void turn(void)
{
    struct pollfd p[2] = {
        { port, POLLIN | (connected && out_pending() ? POLLOUT : 0), 0 },
        { trim_pipe, POLLIN, 0 },
    };

    /* a port without a host is always ready to say so: do not listen */
    if (!connected) {
        p[0].events = POLLOUT;
    }
    if (poll(p, 2, time_left()) < 0) {
        return;
    }
    if (p[0].revents & POLLHUP) {
        if (connected) {
            on_hang_up();
        }
        poll(NULL, 0, 500);
        return;
    }
    if (!connected) {
        connected = true;
        say_hello();
    }
    if ((p[0].revents & POLLIN) && !hear()) {
        on_hang_up();
        return;
    }
    if (p[1].revents) {
        trim_done();
    }
    if (reporting && now_ms() >= next_look) {
        uint64_t rest = look();

        next_look = now_ms() + rest;
    }
    flush_out();
}

static void usage(FILE *to)
{
    fprintf(to, "usage: thinvm-agent [--booted] [--port PATH]\n"
            "Tells the host over a virtio-serial port (default: %s)\n"
            "which parts of the disks are about to be written;\n"
            "with --booted, also that the guest has booted.\n",
            DEFAULT_PORT);
}

int main(int argc, char **argv)
{
    const char *path = DEFAULT_PORT;
    struct sigaction act = { .sa_handler = on_signal };

    if (argc == 2 && !strcmp(argv[1], "--version")) {
        printf("%s, protocol %d\n", AGENT, VERSION);
        return 0;
    }
    if (argc == 2 && !strcmp(argv[1], "--help")) {
        usage(stdout);
        return 0;
    }
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--port") && i + 1 < argc) {
            path = argv[++i];
        } else if (!strcmp(argv[i], "--booted")) {
            booted = true;
        } else {
            usage(stderr);
            return 2;
        }
    }
    port = open(path, O_RDWR | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    if (port < 0) {
        fprintf(stderr, "thinvm-agent: %s: %s; has this guest a virtio-serial "
                "port of that name?\n", path, strerror(errno));
        return 1;
    }
    open_dm_control();
    limit();
    if (!drop_privileges()) {
        fprintf(stderr, "thinvm-agent: could not drop privileges: %s\n",
                strerror(errno));
        return 1;
    }
    sigaction(SIGTERM, &act, NULL);
    sigaction(SIGINT, &act, NULL);
    signal(SIGPIPE, SIG_IGN);
    while (!ended) {
        turn();
    }
    say("bye");
    flush_out();
    return 0;
}
