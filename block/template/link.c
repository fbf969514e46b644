/*
 * thinvm template store: connections to other nodes that never hang
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See link.h.  QEMU's functions negotiate, for simple replies; requests and
 * replies are then exchanged on the socket itself, which is watched together
 * with the descriptor that ends it all.
 *
 * A task is shared by its thread and by who started it; who of the two is last
 * frees it.  One that nobody waits for any more ends by itself: its connection
 * is shut down, or will be as soon as there is one.
 */

#include "qemu/osdep.h"
#include <poll.h>
#include "qapi/error.h"
#include "qapi/clone-visitor.h"
#include "qapi/qapi-visit-sockets.h"
#include "block/nbd.h"
#include "io/channel-socket.h"
#include "qemu/bswap.h"
#include "qemu/memalign.h"
#include "qemu/lockable.h"
#include "qemu/thread.h"
#include "qemu/timer.h"
#include "qemu/units.h"
#include "link.h"

/* Of one request: servers need not take larger ones than 32 MiB */
#define REQUEST_MAX         (2 * MiB)
/* All that is asked for may take so many times the silence allowed */
#define TRICKLE_FACTOR      8
#define REPLY_BYTES         16

struct Link {
    QIOChannelSocket *ioc;
    uint64_t size, cookie;
    uint32_t min_block, max_block;
    bool unreadable;
};

uint64_t link_size(const Link *link)
{
    return link->size;
}

void link_free(Link *link)
{
    if (link) {
        NBDRequest request = {
            .type = NBD_CMD_DISC,
            .mode = NBD_MODE_SIMPLE,
        };

        /* Only a courtesy */
        nbd_send_request(QIO_CHANNEL(link->ioc), &request);
        qio_channel_close(QIO_CHANNEL(link->ioc), NULL);
        object_unref(OBJECT(link->ioc));
        g_free(link);
    }
}

bool link_alive(const Link *link)
{
    struct pollfd p = { .fd = link->ioc->fd, .events = POLLIN };

    /* It has nothing to say unless it is asked */
    return RETRY_ON_EINTR(poll(&p, 1, 0)) == 0;
}

/* ------------------------------------------------------------------ */
/* Requests                                                            */

static int64_t now_ms(void)
{
    return qemu_clock_get_ms(QEMU_CLOCK_REALTIME);
}

LinkPatience link_patience(uint32_t silence_ms, int stop_fd)
{
    return (LinkPatience) {
        .silence_ms = silence_ms,
        .deadline = now_ms() + (int64_t)silence_ms * TRICKLE_FACTOR,
        .stop_fd = stop_fd,
    };
}

/* Until there is something to read; false if there will not be */
static bool await(Link *link, const LinkPatience *patience, Error **errp)
{
    struct pollfd p[2] = {
        { .fd = link->ioc->fd, .events = POLLIN },
        { .fd = patience->stop_fd, .events = POLLIN },
    };
    int64_t left = MIN(patience->silence_ms, patience->deadline - now_ms());
    int n = left > 0 ? RETRY_ON_EINTR(poll(p, 2, left)) : 0;

    if (n <= 0) {
        error_setg(errp, "it is silent, or too slow");
        return false;
    }
    if (p[1].revents) {
        error_setg(errp, "the node is being closed");
        return false;
    }
    return true;
}

static bool receive(Link *link, uint8_t *buf, size_t bytes,
                    const LinkPatience *patience, Error **errp)
{
    for (size_t done = 0; done < bytes; ) {
        ssize_t n;

        if (!await(link, patience, errp)) {
            return false;
        }
        n = recv(link->ioc->fd, buf + done, bytes - done, MSG_DONTWAIT);
        if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
            continue;
        }
        if (n <= 0) {
            error_setg_errno(errp, n ? errno : ECONNRESET,
                             "the connection was lost");
            return false;
        }
        done += n;
    }
    return true;
}

static bool check_reply(Link *link, const uint8_t *reply, Error **errp)
{
    uint32_t error = ldl_be_p(reply + 4);

    if (ldl_be_p(reply) != NBD_SIMPLE_REPLY_MAGIC ||
        ldq_be_p(reply + 8) != link->cookie) {
        error_setg(errp, "it sends what is no reply");
        return false;
    }
    if (error) {
        link->unreadable = nbd_errno_to_system_errno(error) == EIO;
        error_setg_errno(errp, nbd_errno_to_system_errno(error),
                         "it cannot read");
        return false;
    }
    return true;
}

static bool request(Link *link, uint64_t offset, uint32_t bytes, uint8_t *buf,
                    const LinkPatience *patience, Error **errp)
{
    NBDRequest request = {
        .cookie = ++link->cookie,
        .from = offset,
        .len = bytes,
        .type = NBD_CMD_READ,
        .mode = NBD_MODE_SIMPLE,
    };
    uint8_t reply[REPLY_BYTES];

    if (nbd_send_request(QIO_CHANNEL(link->ioc), &request) < 0) {
        error_setg(errp, "the connection was lost");
        return false;
    }
    return receive(link, reply, sizeof(reply), patience, errp) &&
           check_reply(link, reply, errp) &&
           receive(link, buf, bytes, patience, errp);
}

bool link_read(Link *link, uint64_t offset, uint64_t bytes, uint8_t *buf,
               const LinkPatience *patience, Error **errp)
{
    uint64_t end = ROUND_UP(offset + bytes, link->min_block);

    link->unreadable = false;
    if (end > link->size) {
        error_setg(errp, "it has %" PRIu64 " bytes, and %" PRIu64 " are "
                   "needed", link->size, end);
        return false;
    }
    while (offset < end) {
        uint32_t n = MIN(end - offset, MIN(link->max_block, REQUEST_MAX));

        if (!request(link, offset, n, buf, patience, errp)) {
            return false;
        }
        offset += n;
        buf += n;
    }
    return true;
}

bool link_unreadable(const Link *link)
{
    return link->unreadable;
}

/* ------------------------------------------------------------------ */
/* Tasks                                                               */

struct LinkTask {
    int refs;                       /* under the lock */
    QemuMutex lock;
    QemuCond cond;
    SocketAddress *address;
    char *export;
    uint64_t offset;
    uint32_t bytes;
    uint32_t silence_ms;
    QIOChannelSocket *ioc;
    bool connected, abandoned, done;
    Link *link;
    uint8_t *buf;
    Error *err;
};

static void task_unref(LinkTask *t)
{
    bool last;

    WITH_QEMU_LOCK_GUARD(&t->lock) {
        last = --t->refs == 0;
    }
    if (!last) {
        return;
    }
    link_free(t->link);
    qemu_vfree(t->buf);
    object_unref(OBJECT(t->ioc));
    qapi_free_SocketAddress(t->address);
    g_free(t->export);
    error_free(t->err);
    qemu_cond_destroy(&t->cond);
    qemu_mutex_destroy(&t->lock);
    g_free(t);
}

static Link *task_negotiate(LinkTask *t, Error **errp)
{
    NBDExportInfo info = {
        .request_sizes = true,
        .name = t->export,
        .mode = NBD_MODE_SIMPLE,
    };
    Link *link;

    if (nbd_receive_negotiate(QIO_CHANNEL(t->ioc), NULL, NULL, NULL, &info,
                              errp) < 0) {
        return NULL;
    }
    if (info.min_block > LINK_ALIGNMENT) {
        error_setg(errp, "it reads units of %" PRIu32 " bytes, which is more "
                   "than %d", info.min_block, LINK_ALIGNMENT);
        return NULL;
    }
    link = g_new(Link, 1);
    *link = (Link) {
        .ioc = QIO_CHANNEL_SOCKET(object_ref(OBJECT(t->ioc))),
        .size = info.size,
        .min_block = info.min_block ?: 1,
        .max_block = QEMU_ALIGN_DOWN(MAX(info.max_block ?: REQUEST_MAX,
                                         LINK_ALIGNMENT), LINK_ALIGNMENT),
    };
    return link;
}

/* @buf and @link are the thread's until it is done */
static bool task_run(LinkTask *t, Error **errp)
{
    if (qio_channel_socket_connect_sync(t->ioc, t->address, errp) < 0) {
        return false;
    }
    WITH_QEMU_LOCK_GUARD(&t->lock) {
        t->connected = true;
        if (t->abandoned) {
            error_setg(errp, "nobody waits any more");
            return false;
        }
    }
    qio_channel_set_delay(QIO_CHANNEL(t->ioc), false);
    t->link = task_negotiate(t, errp);
    if (!t->link) {
        return false;
    }
    if (t->bytes) {
        LinkPatience patience = link_patience(t->silence_ms, -1);

        t->buf = qemu_memalign(LINK_ALIGNMENT,
                               ROUND_UP(t->bytes, LINK_ALIGNMENT));
        return link_read(t->link, t->offset, t->bytes, t->buf, &patience,
                         errp);
    }
    return true;
}

static void *task_thread(void *opaque)
{
    LinkTask *t = opaque;
    Error *err = NULL;

    if (!task_run(t, &err)) {
        g_clear_pointer(&t->link, link_free);
    }
    WITH_QEMU_LOCK_GUARD(&t->lock) {
        t->err = err;
        t->done = true;
        qemu_cond_signal(&t->cond);
    }
    task_unref(t);
    return NULL;
}

LinkTask *link_task_start(const ClusterNode *node, const char *export,
                          uint64_t offset, uint32_t bytes,
                          uint32_t silence_ms)
{
    LinkTask *t = g_new0(LinkTask, 1);
    QemuThread thread;

    t->refs = 2;
    qemu_mutex_init(&t->lock);
    qemu_cond_init(&t->cond);
    t->address = QAPI_CLONE(SocketAddress, node->nbd);
    t->export = g_strdup(export);
    t->offset = offset;
    t->bytes = bytes;
    t->silence_ms = silence_ms;
    t->ioc = qio_channel_socket_new();
    qemu_thread_create(&thread, "template-link", task_thread, t,
                       QEMU_THREAD_DETACHED);
    return t;
}

bool link_task_wait(LinkTask *t, int64_t wait_ms)
{
    int64_t deadline = now_ms() + wait_ms, left;

    QEMU_LOCK_GUARD(&t->lock);
    while (!t->done && (left = deadline - now_ms()) > 0) {
        qemu_cond_timedwait(&t->cond, &t->lock, left);
    }
    return t->done;
}

bool link_task_connected(LinkTask *t)
{
    QEMU_LOCK_GUARD(&t->lock);

    return t->connected;
}

Link *link_task_finish(LinkTask *t, uint8_t **buf, Error **errp)
{
    Link *link = NULL;

    WITH_QEMU_LOCK_GUARD(&t->lock) {
        if (!t->done) {
            error_setg(errp, "%s", t->connected ? "it is silent" :
                       "it cannot be reached");
            t->abandoned = true;
            if (t->connected) {
                qio_channel_shutdown(QIO_CHANNEL(t->ioc),
                                     QIO_CHANNEL_SHUTDOWN_BOTH, NULL);
            }
        } else if (!t->link) {
            error_propagate(errp, g_steal_pointer(&t->err));
        } else {
            link = g_steal_pointer(&t->link);
            if (buf) {
                *buf = g_steal_pointer(&t->buf);
            }
        }
    }
    task_unref(t);
    return link;
}
