/*
 * thinvm boot cache: publisher, the readers' connections
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Readers are QEMUs whose guests may have taken them over.  Each message is
 * checked, and the first wrong one ends the connection.  Bounded are: the
 * readers (max-readers), and those of one process, so that none can keep all
 * others out; the time until a hello has come, the requests of one
 * reader that are worked on (beyond, nothing more is read from his socket),
 * the blocks of a request, and what one reader can have recorded.  A reader
 * who does not take his answers keeps his own requests waiting, and nobody
 * else's, until he is hung up on.  All that a reader can have is what he could
 * read from the template himself: the shared memory, for reading.
 *
 * Main loop; coroutines for each reader (one that receives, one for each of
 * his requests), all counted by bootcache_publisher_enter().
 */

#include "qemu/osdep.h"
#include "qemu/cutils.h"
#include "qemu/main-loop.h"
#include "qemu/sockets.h"
#include "qemu/timer.h"
#include "io/channel-socket.h"
#include "io/net-listener.h"
#include "bootcache.h"
#include "thinvm/trace.h"

#define BOOTCACHE_MAX_REQUESTS      16      /* of one reader at a time */
#define BOOTCACHE_HELLO_MS          10000
#define BOOTCACHE_ANSWER_MS         5000    /* to take one */
#define BOOTCACHE_BACKLOG           64

/* One process has this part of max-readers, and this many in any case */
#define BOOTCACHE_PROCESS_PART      4
#define BOOTCACHE_PROCESS_LEAST     4

struct BootcacheServer {
    BootcachePublisher *publisher;
    QIONetListener *listener;
    QLIST_HEAD(, BootcacheReader) readers;
    unsigned nb_readers;
    unsigned max_readers;
    bool stopped;
    uint64_t accepted, refused, misbehaved;
};

typedef struct BootcacheReader {
    BootcacheServer *server;
    QIOChannel *ioc;
    QEMUTimer *timer;           /* hello, or an answer to be taken */
    pid_t process;              /* 0: one of another container */
    BootcacheQuota quota;
    CoMutex send_lock;
    CoQueue done;               /* the receiver waits for a request's end */
    unsigned nb_requests;
    QLIST_ENTRY(BootcacheReader) link;
} BootcacheReader;

typedef struct BootcacheJob {
    BootcacheReader *reader;
    BootcacheRequest request;
} BootcacheJob;

/*
 * Outside of coroutines, @r may be gone afterwards.  Who waits to write has to
 * be woken: a full socket does not become writable by being shut down, and
 * would be polled for nothing, again and again.
 */
static void bootcache_reader_hang_up(BootcacheReader *r)
{
    Coroutine *writer;

    qio_channel_shutdown(r->ioc, QIO_CHANNEL_SHUTDOWN_BOTH, NULL);
    writer = qatomic_xchg(&r->ioc->write_coroutine, NULL);
    if (writer) {
        aio_co_wake(writer);
    }
}

static void bootcache_reader_overdue(void *opaque)
{
    BootcacheReader *r = opaque;

    r->server->misbehaved++;
    bootcache_reader_hang_up(r);
}

static void bootcache_reader_hurry(BootcacheReader *r, int64_t ms)
{
    timer_mod(r->timer, qemu_clock_get_ms(QEMU_CLOCK_REALTIME) + ms);
}

/* ------------------------------------------------------------------ */
/* Requests                                                            */

/* With the lock for sending */
static bool coroutine_fn bootcache_reader_send(BootcacheReader *r,
                                               const char *buf, size_t size)
{
    ssize_t n = qio_channel_write(r->ioc, buf, size, NULL);
    int ret;

    if (n == size) {
        return true;
    }
    if (n < 0 && n != QIO_CHANNEL_ERR_BLOCK) {
        return false;
    }
    n = MAX(n, 0);
    bootcache_reader_hurry(r, BOOTCACHE_ANSWER_MS);
    ret = qio_channel_write_all(r->ioc, buf + n, size - n, NULL);
    timer_del(r->timer);
    return ret == 0;
}

static void coroutine_fn bootcache_reader_reply(BootcacheReader *r,
                                                uint64_t cookie,
                                                BootcacheStatus status)
{
    uint8_t buf[BOOTCACHE_REPLY_SIZE];
    BootcacheReply reply = {
        .cookie = cookie,
        .status = status,
    };

    bootcache_encode_reply(&reply, buf);
    qemu_co_mutex_lock(&r->send_lock);
    if (!bootcache_reader_send(r, (char *)buf, sizeof(buf))) {
        bootcache_reader_hang_up(r);
    }
    qemu_co_mutex_unlock(&r->send_lock);
}

static void coroutine_fn bootcache_job_entry(void *opaque)
{
    BootcacheJob *job = opaque;
    BootcacheReader *r = job->reader;
    BootcachePublisher *p = r->server->publisher;

    bootcache_reader_reply(r, job->request.cookie,
                           bootcache_publisher_get(p, job->request.block,
                                                   job->request.count,
                                                   &r->quota));
    g_free(job);
    r->nb_requests--;
    qemu_co_queue_next(&r->done);
    bootcache_publisher_leave(p);
}

/* False: there will be no more */
static bool coroutine_fn bootcache_reader_receive(BootcacheReader *r)
{
    BootcachePublisher *p = r->server->publisher;
    uint8_t buf[BOOTCACHE_REQUEST_SIZE];
    BootcacheJob *job;
    BootcacheRequest request;
    uint64_t cookie;

    if (qio_channel_read_all_eof(r->ioc, (char *)buf, sizeof(buf), NULL) <= 0) {
        return false;
    }
    if (bootcache_decode_boot_end(&cookie, buf)) {
        /* No more is received from him until he takes the answer */
        bootcache_reader_reply(r, cookie, bootcache_publisher_boot_ended(p));
        return true;
    }
    if (!bootcache_decode_request(&request, buf,
            bootcache_publisher_map(p)->geometry.nb_blocks)) {
        r->server->misbehaved++;
        trace_thinvm_bootcache_misbehaved(r, request.block, request.count);
        return false;
    }
    job = g_new(BootcacheJob, 1);
    *job = (BootcacheJob) { .reader = r, .request = request };
    r->nb_requests++;
    bootcache_publisher_enter(p);
    qemu_coroutine_enter(qemu_coroutine_create(bootcache_job_entry, job));
    while (r->nb_requests >= BOOTCACHE_MAX_REQUESTS) {
        qemu_co_queue_wait(&r->done, NULL);
    }
    return true;
}

/* ------------------------------------------------------------------ */
/* Connections                                                         */

static bool coroutine_fn bootcache_reader_greet(BootcacheReader *r)
{
    BootcacheMap *map = bootcache_publisher_map(r->server->publisher);
    uint8_t buf[BOOTCACHE_HELLO_SIZE];
    struct iovec iov = { .iov_base = buf, .iov_len = sizeof(buf) };
    BootcacheHello hello;
    bool same;

    if (qio_channel_read_all_eof(r->ioc, (char *)buf, sizeof(buf), NULL) <= 0) {
        return false;
    }
    timer_del(r->timer);
    if (!bootcache_decode_hello(&hello, buf)) {
        r->server->misbehaved++;
        return false;
    }
    same = hello.length == map->geometry.length &&
           !memcmp(&hello.identity, &map->geometry.identity,
                   sizeof(hello.identity));
    hello = (BootcacheHello) {
        .version = BOOTCACHE_VERSION,
        .status = same ? BOOTCACHE_STATUS_OK : BOOTCACHE_STATUS_FOREIGN,
        .length = map->geometry.length,
        .identity = map->geometry.identity,
    };
    bootcache_encode_hello(&hello, buf);
    if (!same) {
        r->server->refused++;
    }
    return qio_channel_writev_full_all(r->ioc, &iov, 1,
                                       same ? &map->fd : NULL, same ? 1 : 0,
                                       0, NULL) == 0 && same;
}

static void coroutine_fn bootcache_reader_entry(void *opaque)
{
    BootcacheReader *r = opaque;
    BootcacheServer *server = r->server;

    if (bootcache_reader_greet(r)) {
        while (bootcache_reader_receive(r)) {
            /* the next one */
        }
    }
    timer_del(r->timer);
    /* Requests that wait to be answered need not any more */
    bootcache_reader_hang_up(r);
    while (r->nb_requests) {
        qemu_co_queue_wait(&r->done, NULL);
    }
    QLIST_REMOVE(r, link);
    server->nb_readers--;
    timer_free(r->timer);
    qio_channel_close(r->ioc, NULL);
    object_unref(OBJECT(r->ioc));
    g_free(r);
    bootcache_publisher_leave(server->publisher);
}

/* Who has connected; 0 if he has no process id here */
static pid_t bootcache_peer_process(QIOChannelSocket *sioc)
{
    struct ucred peer;
    socklen_t size = sizeof(peer);

    return getsockopt(sioc->fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) < 0
           ? 0 : peer.pid;
}

static bool bootcache_server_full(BootcacheServer *server, pid_t process)
{
    unsigned most = MAX(server->max_readers / BOOTCACHE_PROCESS_PART,
                        BOOTCACHE_PROCESS_LEAST);
    unsigned have = 0;
    BootcacheReader *r;

    if (server->nb_readers >= server->max_readers) {
        return true;
    }
    QLIST_FOREACH(r, &server->readers, link) {
        have += process && r->process == process;
    }
    return have >= most;
}

static void bootcache_server_accept(QIONetListener *listener,
                                    QIOChannelSocket *sioc, gpointer opaque)
{
    BootcacheServer *server = opaque;
    pid_t process = bootcache_peer_process(sioc);
    BootcacheReader *r;

    if (server->stopped || bootcache_server_full(server, process)) {
        server->refused++;
        return;                 /* whoever it is sees the end at once */
    }
    server->accepted++;
    server->nb_readers++;
    r = g_new0(BootcacheReader, 1);
    r->server = server;
    r->process = process;
    r->ioc = QIO_CHANNEL(object_ref(OBJECT(sioc)));
    qio_channel_set_name(r->ioc, "thinvm-bootcache-reader");
    qio_channel_set_blocking(r->ioc, false, NULL);
    /* So that bootcache_publisher_free() sees them end while it waits */
    qio_channel_set_follow_coroutine_ctx(r->ioc, true);
    qemu_co_mutex_init(&r->send_lock);
    qemu_co_queue_init(&r->done);
    r->timer = timer_new_ms(QEMU_CLOCK_REALTIME, bootcache_reader_overdue, r);
    bootcache_reader_hurry(r, BOOTCACHE_HELLO_MS);
    QLIST_INSERT_HEAD(&server->readers, r, link);
    bootcache_publisher_enter(server->publisher);
    qemu_coroutine_enter(qemu_coroutine_create(bootcache_reader_entry, r));
}

/*
 * Listening removes what lies at the path.  That is right for a socket that a
 * dead publisher left, and wrong for one on which another one listens.
 */
static bool bootcache_somebody_listens(const char *path)
{
    struct sockaddr_un addr = { .sun_family = AF_UNIX };
    int fd = qemu_socket(AF_UNIX, SOCK_STREAM, 0);
    bool listens;

    if (fd < 0) {
        return false;
    }
    pstrcpy(addr.sun_path, sizeof(addr.sun_path), path);
    qemu_socket_set_nonblock(fd);
    listens = connect(fd, (struct sockaddr *)&addr, sizeof(addr)) == 0 ||
              errno == EAGAIN;
    close(fd);
    return listens;
}

BootcacheServer *bootcache_server_new(BootcachePublisher *p,
                                      const BootcacheOptions *options,
                                      Error **errp)
{
    g_autoptr(SocketAddress) addr = g_new0(SocketAddress, 1);
    BootcacheServer *server;
    struct stat st;

    if (bootcache_somebody_listens(options->socket)) {
        error_setg(errp, "Another publisher listens on '%s'", options->socket);
        return NULL;
    }
    if (lstat(options->socket, &st) == 0 && !S_ISSOCK(st.st_mode)) {
        error_setg(errp, "'%s' exists, and is not a socket", options->socket);
        return NULL;
    }
    server = g_new0(BootcacheServer, 1);
    server->publisher = p;
    server->max_readers = options->max_readers;
    server->listener = qio_net_listener_new();
    qio_net_listener_set_name(server->listener, "thinvm-bootcache");
    addr->type = SOCKET_ADDRESS_TYPE_UNIX;
    addr->u.q_unix.path = g_strdup(options->socket);
    if (qio_net_listener_open_sync(server->listener, addr, BOOTCACHE_BACKLOG,
                                   errp) < 0) {
        object_unref(OBJECT(server->listener));
        g_free(server);
        return NULL;
    }
    qio_net_listener_set_client_func(server->listener,
                                     bootcache_server_accept, server, NULL);
    return server;
}

void bootcache_server_stop(BootcacheServer *server)
{
    BootcacheReader *r, *next;

    server->stopped = true;
    qio_net_listener_disconnect(server->listener);
    QLIST_FOREACH_SAFE(r, &server->readers, link, next) {
        bootcache_reader_hang_up(r);
    }
}

void bootcache_server_free(BootcacheServer *server)
{
    assert(QLIST_EMPTY(&server->readers));
    object_unref(OBJECT(server->listener));
    g_free(server);
}

void bootcache_server_info(BootcacheServer *server,
                           ThinvmBootcachePublisherInfo *info)
{
    info->readers = server->nb_readers;
    info->accepted = server->accepted;
    info->refused = server->refused;
    info->misbehaved = server->misbehaved;
}
