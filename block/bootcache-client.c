/*
 * thinvm boot cache: a reader's connection to the publisher
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See bootcache-client.h.  The thread connects, greets, takes the shared
 * memory, and then waits for replies; requests are sent by whoever has one.
 * All of the socket's calls return at once; the thread sleeps in poll() alone,
 * and the event notifier wakes it there.
 *
 *   connecting --greeted--> connected --lost, silent, nonsense--> waiting
 *       ^                                                            |
 *       +------------------- after RECONNECT_MS ---------------------+
 *
 * @lock covers everything but the thread's own variables and the map, which
 * is RCU's.
 */

#include "qemu/osdep.h"
#include <poll.h>

#include "qemu/coroutine.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qemu/event_notifier.h"
#include "qemu/lockable.h"
#include "qemu/sockets.h"
#include "qemu/thread.h"
#include "qemu/timer.h"
#include "block/aio.h"
#include "bootcache-client.h"
#include "thinvm/trace.h"

#define BOOTCACHE_RECONNECT_MS  1000
#define BOOTCACHE_MAX_PENDING   128

typedef struct BootcachePending {
    uint64_t cookie;
    Coroutine *co;
    int ret;
    bool done;
} BootcachePending;

struct BootcacheClient {
    char *node_name;
    char *path;
    BootcacheIdentity identity;
    uint64_t length;
    uint32_t timeout_ms;
    QemuThread thread;
    EventNotifier wake;
    BootcacheMap *map;          /* RCU; written by the thread */

    QemuMutex lock;
    bool stop;
    bool ready;                 /* the first attempt is over */
    int fd;                     /* -1 unless connected */
    uint64_t next_cookie;
    int64_t heard_ms;           /* the publisher's last sign of life */
    GHashTable *pending;        /* of BootcachePending, by cookie */
    GSList *waiting;            /* coroutines, until ready */
    bool has_boot_end;          /* somebody said that the boot has ended */
    ThinvmBootcacheBootEnd boot_end;
    uint64_t boot_end_cookie;   /* of the message, while its fate is SENT */
    char *problem;
};

static int64_t bootcache_now_ms(void)
{
    return qemu_clock_get_ms(QEMU_CLOCK_REALTIME);
}

/* ------------------------------------------------------------------ */
/* The thread                                                          */

/*
 * Wait for @events on @fd (which may be -1), for a wake-up, or until
 * @deadline.  False: the thread has to stop, or the time is over.
 */
static bool bootcache_client_poll(BootcacheClient *c, int fd, short events,
                                  int64_t deadline)
{
    struct pollfd fds[] = {
        { .fd = event_notifier_get_fd(&c->wake), .events = POLLIN },
        { .fd = fd, .events = events },
    };

    for (;;) {
        int64_t left = deadline - bootcache_now_ms();

        if (qatomic_read(&c->stop) || left <= 0) {
            return false;
        }
        if (poll(fds, 2, MIN(left, INT_MAX)) < 0 && errno != EINTR) {
            return false;
        }
        if (fds[0].revents) {
            event_notifier_test_and_clear(&c->wake);
        }
        if (fds[1].revents) {
            return true;
        }
    }
}

static int bootcache_client_connect(BootcacheClient *c, Error **errp)
{
    struct sockaddr_un addr = { .sun_family = AF_UNIX };
    int fd = qemu_socket(AF_UNIX, SOCK_STREAM, 0);

    if (fd < 0) {
        error_setg_errno(errp, errno, "no socket");
        return -1;
    }
    pstrcpy(addr.sun_path, sizeof(addr.sun_path), c->path);
    qemu_socket_set_nonblock(fd);
    if (connect(fd, (struct sockaddr *)&addr, sizeof(addr)) < 0) {
        error_setg_errno(errp, errno, "no publisher at '%s'", c->path);
        close(fd);
        return -1;
    }
    return fd;
}

/*
 * Receive up to @size bytes, and a descriptor if there is one.  What is more
 * than one descriptor is closed.  Returns as recvmsg() does.
 */
static ssize_t bootcache_recv(int sock, void *buf, size_t size, int *fd)
{
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(4 * sizeof(int))];
    } control;
    struct iovec iov = { .iov_base = buf, .iov_len = size };
    struct msghdr msg = {
        .msg_iov = &iov, .msg_iovlen = 1,
        .msg_control = &control, .msg_controllen = sizeof(control),
    };
    ssize_t n = RETRY_ON_EINTR(recvmsg(sock, &msg, MSG_CMSG_CLOEXEC |
                                       MSG_DONTWAIT));

    for (struct cmsghdr *h = n < 0 ? NULL : CMSG_FIRSTHDR(&msg); h;
         h = CMSG_NXTHDR(&msg, h)) {
        size_t nb = (h->cmsg_len - CMSG_LEN(0)) / sizeof(int);

        if (h->cmsg_level != SOL_SOCKET || h->cmsg_type != SCM_RIGHTS) {
            continue;
        }
        for (size_t i = 0; i < nb; i++) {
            int received;

            memcpy(&received, CMSG_DATA(h) + i * sizeof(int), sizeof(int));
            if (fd && *fd < 0) {
                *fd = received;
            } else {
                close(received);
            }
        }
    }
    return n;
}

/* The publisher's hello, and the shared memory that comes with it */
static int bootcache_client_receive_map(BootcacheClient *c, int sock,
                                        int64_t deadline, Error **errp)
{
    uint8_t buf[BOOTCACHE_HELLO_SIZE];
    BootcacheHello hello;
    size_t have = 0;
    int fd = -1;

    while (have < sizeof(buf)) {
        ssize_t n;

        if (!bootcache_client_poll(c, sock, POLLIN, deadline)) {
            error_setg(errp, "the publisher does not answer");
            goto fail;
        }
        n = bootcache_recv(sock, buf + have, sizeof(buf) - have, &fd);
        if (n == 0 || (n < 0 && errno != EAGAIN)) {
            error_setg(errp, "the publisher closed the connection "
                       "(perhaps it has too many readers)");
            goto fail;
        }
        have += MAX(n, 0);
    }
    if (!bootcache_decode_hello(&hello, buf)) {
        error_setg(errp, "what answers at '%s' is no publisher of this "
                   "version", c->path);
        goto fail;
    }
    if (hello.status != BOOTCACHE_STATUS_OK || fd < 0) {
        error_setg(errp, "the publisher has another template, or another "
                   "version of it");
        goto fail;
    }
    return fd;

fail:
    if (fd >= 0) {
        close(fd);
    }
    return -1;
}

static bool bootcache_client_greet(BootcacheClient *c, int sock,
                                   int64_t deadline, Error **errp)
{
    BootcacheHello hello = {
        .version = BOOTCACHE_VERSION,
        .length = c->length,
        .identity = c->identity,
    };
    uint8_t buf[BOOTCACHE_HELLO_SIZE];
    BootcacheMap *map, *old;
    int fd;

    bootcache_encode_hello(&hello, buf);
    if (send(sock, buf, sizeof(buf), MSG_DONTWAIT | MSG_NOSIGNAL) !=
        sizeof(buf)) {
        error_setg_errno(errp, errno, "cannot send to the publisher");
        return false;
    }
    fd = bootcache_client_receive_map(c, sock, deadline, errp);
    if (fd < 0) {
        return false;
    }
    map = bootcache_map_open(fd, &c->identity, c->length, errp);
    close(fd);
    if (!map) {
        return false;
    }
    old = c->map;
    qatomic_rcu_set(&c->map, map);
    if (old) {
        call_rcu(old, bootcache_map_free, rcu);
    }
    return true;
}

static int bootcache_client_establish(BootcacheClient *c, Error **errp)
{
    int64_t deadline = bootcache_now_ms() + c->timeout_ms;
    int fd = bootcache_client_connect(c, errp);

    if (fd >= 0 && !bootcache_client_greet(c, fd, deadline, errp)) {
        close(fd);
        return -1;
    }
    return fd;
}

/* With the lock */
static void bootcache_client_complete_boot_end(BootcacheClient *c,
                                               const BootcacheReply *reply)
{
    if (!c->has_boot_end || c->boot_end != THINVM_BOOTCACHE_BOOT_END_SENT ||
        reply->cookie != c->boot_end_cookie) {
        return;         /* none of ours; nothing depends on it */
    }
    switch (reply->status) {
    case BOOTCACHE_STATUS_OK:
        c->boot_end = THINVM_BOOTCACHE_BOOT_END_SEALED;
        break;
    case BOOTCACHE_STATUS_EMPTY:
        c->boot_end = THINVM_BOOTCACHE_BOOT_END_EMPTY;
        break;
    default:
        c->boot_end = THINVM_BOOTCACHE_BOOT_END_REFUSED;
        break;
    }
}

static void bootcache_client_complete(BootcacheClient *c,
                                      const BootcacheReply *reply)
{
    BootcachePending *p = g_hash_table_lookup(c->pending, &reply->cookie);

    if (!p) {
        bootcache_client_complete_boot_end(c, reply);
        return;
    }
    g_hash_table_remove(c->pending, &reply->cookie);
    p->ret = reply->status == BOOTCACHE_STATUS_OK ? 0 : -ENODATA;
    p->done = true;
    aio_co_wake(p->co);
}

/* False when the connection is of no more use */
static bool bootcache_client_receive(BootcacheClient *c, int fd, uint8_t *buf,
                                     size_t *have)
{
    size_t size = 16 * BOOTCACHE_REPLY_SIZE;
    ssize_t n = bootcache_recv(fd, buf + *have, size - *have, NULL);
    size_t used = 0;

    if (n <= 0) {
        return n < 0 && errno == EAGAIN;
    }
    *have += n;
    qemu_mutex_lock(&c->lock);
    c->heard_ms = bootcache_now_ms();
    for (; *have - used >= BOOTCACHE_REPLY_SIZE; used += BOOTCACHE_REPLY_SIZE) {
        BootcacheReply reply;

        if (!bootcache_decode_reply(&reply, buf + used)) {
            qemu_mutex_unlock(&c->lock);
            return false;
        }
        bootcache_client_complete(c, &reply);
    }
    qemu_mutex_unlock(&c->lock);
    memmove(buf, buf + used, *have - used);
    *have -= used;
    return true;
}

/* When an answer is overdue; with nothing to wait for, never */
static int64_t bootcache_client_deadline(BootcacheClient *c)
{
    QEMU_LOCK_GUARD(&c->lock);
    return g_hash_table_size(c->pending) ? c->heard_ms + c->timeout_ms
                                         : INT64_MAX;
}

static const char *bootcache_client_serve(BootcacheClient *c, int fd)
{
    uint8_t buf[16 * BOOTCACHE_REPLY_SIZE];
    size_t have = 0;

    while (!qatomic_read(&c->stop)) {
        int64_t deadline = bootcache_client_deadline(c);
        struct pollfd fds[] = {
            { .fd = event_notifier_get_fd(&c->wake), .events = POLLIN },
            { .fd = fd, .events = POLLIN },
        };
        int64_t left = deadline - bootcache_now_ms();

        if (left <= 0) {
            return "the publisher does not answer";
        }
        if (poll(fds, 2, deadline == INT64_MAX ? -1 : MIN(left, INT_MAX)) < 0 &&
            errno != EINTR) {
            return "poll failed";
        }
        if (fds[0].revents) {
            event_notifier_test_and_clear(&c->wake);
        }
        if (fds[1].revents &&
            !bootcache_client_receive(c, fd, buf, &have)) {
            return "the publisher closed the connection";
        }
    }
    return "closed";
}

static gboolean bootcache_fail_pending(gpointer key, gpointer value,
                                       gpointer opaque)
{
    BootcachePending *p = value;

    p->ret = -ENOTCONN;
    p->done = true;
    aio_co_wake(p->co);
    return true;
}

static void bootcache_client_set_problem(BootcacheClient *c, const char *text)
{
    if (g_strcmp0(c->problem, text)) {
        trace_thinvm_bootcache_connection(c, c->path, text ?: "connected");
        if (text && !qatomic_read(&c->stop)) {
            warn_report("bootcache node '%s' reads its template itself: "
                        "%s", c->node_name, text);
        }
        g_free(c->problem);
        c->problem = g_strdup(text);
    }
}

/* @fd -1: there is no connection, because of @problem */
static void bootcache_client_set_fd(BootcacheClient *c, int fd,
                                    const char *problem)
{
    QEMU_LOCK_GUARD(&c->lock);

    c->fd = fd;
    bootcache_client_set_problem(c, problem);
    if (fd < 0) {
        g_hash_table_foreach_remove(c->pending, bootcache_fail_pending, NULL);
    }
    qatomic_set(&c->ready, true);
    while (c->waiting) {
        Coroutine *co = c->waiting->data;

        c->waiting = g_slist_delete_link(c->waiting, c->waiting);
        aio_co_wake(co);
    }
}

static void *bootcache_client_thread(void *opaque)
{
    BootcacheClient *c = opaque;

    rcu_register_thread();
    while (!qatomic_read(&c->stop)) {
        Error *local_err = NULL;
        int fd = bootcache_client_establish(c, &local_err);

        if (fd < 0) {
            bootcache_client_set_fd(c, -1, error_get_pretty(local_err));
            error_free(local_err);
        } else {
            const char *problem;

            bootcache_client_set_fd(c, fd, NULL);
            problem = bootcache_client_serve(c, fd);
            bootcache_client_set_fd(c, -1, problem);
            close(fd);
        }
        bootcache_client_poll(c, -1, 0, bootcache_now_ms() +
                                        BOOTCACHE_RECONNECT_MS);
    }
    rcu_unregister_thread();
    return NULL;
}

/* ------------------------------------------------------------------ */
/* What requests call                                                  */

void coroutine_fn bootcache_client_wait_ready(BootcacheClient *c)
{
    if (qatomic_read(&c->ready)) {
        return;                 /* never becomes false again */
    }
    qemu_mutex_lock(&c->lock);
    while (!c->ready) {
        c->waiting = g_slist_prepend(c->waiting, qemu_coroutine_self());
        qemu_mutex_unlock(&c->lock);
        qemu_coroutine_yield();
        qemu_mutex_lock(&c->lock);
    }
    qemu_mutex_unlock(&c->lock);
}

/* With the lock.  A message is sent whole: they are small. */
static int bootcache_client_send_message(BootcacheClient *c,
                                         const uint8_t *buf)
{
    ssize_t n;

    if (c->fd < 0) {
        return -ENOTCONN;
    }
    n = RETRY_ON_EINTR(send(c->fd, buf, BOOTCACHE_REQUEST_SIZE,
                            MSG_DONTWAIT | MSG_NOSIGNAL));
    if (n == BOOTCACHE_REQUEST_SIZE) {
        return 0;
    }
    if (n >= 0) {
        shutdown(c->fd, SHUT_RDWR);     /* the rest would be misread */
    }
    return n < 0 && errno == EAGAIN ? -EBUSY : -ENOTCONN;
}

static int bootcache_client_send(BootcacheClient *c, BootcachePending *p,
                                 uint64_t block, uint32_t count)
{
    BootcacheRequest request = {
        .cookie = p->cookie, .block = block, .count = count,
    };
    uint8_t buf[BOOTCACHE_REQUEST_SIZE];

    if (g_hash_table_size(c->pending) >= BOOTCACHE_MAX_PENDING) {
        return -EBUSY;
    }
    bootcache_encode_request(&request, buf);
    return bootcache_client_send_message(c, buf);
}

int coroutine_fn bootcache_client_fetch(BootcacheClient *c, uint64_t block,
                                        uint32_t count)
{
    BootcachePending p = { .co = qemu_coroutine_self() };
    bool first;
    int ret;

    qemu_mutex_lock(&c->lock);
    p.cookie = c->next_cookie++;
    ret = bootcache_client_send(c, &p, block, count);
    if (ret < 0) {
        qemu_mutex_unlock(&c->lock);
        return ret;
    }
    first = !g_hash_table_size(c->pending);
    if (first) {
        c->heard_ms = bootcache_now_ms();
    }
    g_hash_table_insert(c->pending, &p.cookie, &p);
    qemu_mutex_unlock(&c->lock);
    if (first) {
        event_notifier_set(&c->wake);   /* there is a deadline now */
    }

    /* Woken once, by who has taken it out of the table */
    qemu_coroutine_yield();
    assert(p.done);
    return p.ret;
}

bool bootcache_client_boot_ended(BootcacheClient *c, Error **errp)
{
    uint8_t buf[BOOTCACHE_REQUEST_SIZE];
    int ret;

    QEMU_LOCK_GUARD(&c->lock);
    c->has_boot_end = true;
    c->boot_end_cookie = c->next_cookie++;
    bootcache_encode_boot_end(c->boot_end_cookie, buf);
    ret = bootcache_client_send_message(c, buf);
    if (ret < 0) {
        c->boot_end = THINVM_BOOTCACHE_BOOT_END_UNSENT;
        error_setg(errp, "The publisher of bootcache node '%s' could not be "
                   "told that the guest has booted: %s", c->node_name,
                   c->problem ?: strerror(-ret));
        return false;
    }
    c->boot_end = THINVM_BOOTCACHE_BOOT_END_SENT;
    return true;
}

bool bootcache_client_boot_end(BootcacheClient *c, ThinvmBootcacheBootEnd *end)
{
    QEMU_LOCK_GUARD(&c->lock);
    *end = c->boot_end;
    return c->has_boot_end;
}

BootcacheMap *bootcache_client_map(BootcacheClient *c)
{
    return qatomic_rcu_read(&c->map);
}

bool bootcache_client_connected(BootcacheClient *c)
{
    QEMU_LOCK_GUARD(&c->lock);
    return c->fd >= 0;
}

char *bootcache_client_problem(BootcacheClient *c)
{
    QEMU_LOCK_GUARD(&c->lock);
    if (!c->ready) {
        return g_strdup("connecting");
    }
    return g_strdup(c->problem);
}

/* ------------------------------------------------------------------ */

BootcacheClient *bootcache_client_new(const char *node_name, const char *path,
                                      const BootcacheIdentity *identity,
                                      uint64_t length, uint32_t timeout_ms,
                                      Error **errp)
{
    BootcacheClient *c = g_new0(BootcacheClient, 1);
    int ret = event_notifier_init(&c->wake, false);

    if (ret < 0) {
        error_setg_errno(errp, -ret, "Cannot make an event notifier");
        g_free(c);
        return NULL;
    }

    c->node_name = g_strdup(node_name);
    c->path = g_strdup(path);
    c->identity = *identity;
    c->length = length;
    c->timeout_ms = timeout_ms;
    c->fd = -1;
    c->pending = g_hash_table_new(g_int64_hash, g_int64_equal);
    qemu_mutex_init(&c->lock);
    qemu_thread_create(&c->thread, "bootcache", bootcache_client_thread, c,
                       QEMU_THREAD_JOINABLE);
    return c;
}

void bootcache_client_free(BootcacheClient *c)
{
    qatomic_set(&c->stop, true);
    event_notifier_set(&c->wake);
    qemu_thread_join(&c->thread);
    assert(!g_hash_table_size(c->pending) && !c->waiting);
    if (c->map) {
        call_rcu(c->map, bootcache_map_free, rcu);
    }
    g_hash_table_destroy(c->pending);
    event_notifier_cleanup(&c->wake);
    qemu_mutex_destroy(&c->lock);
    g_free(c->node_name);
    g_free(c->path);
    g_free(c->problem);
    g_free(c);
}
