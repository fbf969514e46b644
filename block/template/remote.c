/*
 * thinvm template store: the other nodes
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See remote.h.  A node may be dead, or hang: each is asked for its exports in
 * a thread, which is waited for only so long.  One that still sits in connect()
 * then is left behind; who of the two is last frees what they share.
 *
 * What a node says is not believed (T2): a list only tells whom to ask.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qapi/clone-visitor.h"
#include "qapi/qapi-visit-sockets.h"
#include "qobject/qdict.h"
#include "block/qdict.h"
#include "qemu/memalign.h"
#include "qemu/thread.h"
#include "qemu/timer.h"
#include "block/nbd.h"
#include "io/channel-socket.h"
#include "link.h"
#include "remote.h"

#define ANSWER_TIMEOUT_MS   5000
#define OPEN_TIMEOUT_S      10
#define CHUNKS_SUFFIX       ".chunks"

typedef struct Question {
    int refs;                       /* under the lock */
    QemuMutex lock;
    QemuCond cond;
    const ClusterNode *node;
    SocketAddress *address;
    QIOChannelSocket *ioc;
    bool connected, done;
    NBDExportInfo *exports;
    int nb_exports;
    Error *err;
} Question;

/* ------------------------------------------------------------------ */
/* Asking                                                              */

static void question_unref(Question *q)
{
    bool last;

    WITH_QEMU_LOCK_GUARD(&q->lock) {
        last = --q->refs == 0;
    }
    if (!last) {
        return;
    }
    if (q->nb_exports > 0) {
        nbd_free_export_list(q->exports, q->nb_exports);
    }
    qapi_free_SocketAddress(q->address);
    object_unref(OBJECT(q->ioc));
    error_free(q->err);
    qemu_cond_destroy(&q->cond);
    qemu_mutex_destroy(&q->lock);
    g_free(q);
}

static void *question_thread(void *opaque)
{
    Question *q = opaque;
    Error *err = NULL;
    int n = -1;

    if (qio_channel_socket_connect_sync(q->ioc, q->address, &err) == 0) {
        WITH_QEMU_LOCK_GUARD(&q->lock) {
            q->connected = true;
        }
        n = nbd_receive_export_list(QIO_CHANNEL(q->ioc), NULL, NULL,
                                    &q->exports, &err);
    }
    WITH_QEMU_LOCK_GUARD(&q->lock) {
        q->nb_exports = n;
        q->err = err;
        q->done = true;
        qemu_cond_signal(&q->cond);
    }
    question_unref(q);
    return NULL;
}

static Question *question_ask(const ClusterNode *node)
{
    Question *q = g_new0(Question, 1);
    QemuThread thread;

    q->refs = 2;
    q->node = node;
    qemu_mutex_init(&q->lock);
    qemu_cond_init(&q->cond);
    q->address = QAPI_CLONE(SocketAddress, node->nbd);
    q->ioc = qio_channel_socket_new();
    qemu_thread_create(&thread, "template-list", question_thread, q,
                       QEMU_THREAD_DETACHED);
    return q;
}

static void list_fill(RemoteList *list, Question *q)
{
    for (int i = 0; i < q->nb_exports; i++) {
        TemplateDigest digest;

        if (template_digest_parse(q->exports[i].name, &digest, NULL)) {
            g_hash_table_insert(list->lengths,
                                g_memdup2(&digest, sizeof(digest)),
                                g_memdup2(&q->exports[i].size,
                                          sizeof(uint64_t)));
        }
    }
}

static guint digest_hash(gconstpointer p)
{
    return ldl_he_p(p);
}

static gboolean digest_equal(gconstpointer a, gconstpointer b)
{
    return template_digest_equal(a, b);
}

/* Wait for the answer until @deadline; the question is gone then */
static RemoteList *question_answer(Question *q, int64_t deadline)
{
    RemoteList *list = g_new0(RemoteList, 1);
    int64_t left;

    list->node = q->node;
    list->lengths = g_hash_table_new_full(digest_hash, digest_equal, g_free,
                                          g_free);
    WITH_QEMU_LOCK_GUARD(&q->lock) {
        while (!q->done && (left = deadline -
                            qemu_clock_get_ms(QEMU_CLOCK_REALTIME)) > 0) {
            qemu_cond_timedwait(&q->cond, &q->lock, left);
        }
        if (!q->done) {
            list->problem = g_strdup_printf("no answer in %d s",
                                            ANSWER_TIMEOUT_MS / 1000);
            if (q->connected) {
                qio_channel_shutdown(QIO_CHANNEL(q->ioc),
                                     QIO_CHANNEL_SHUTDOWN_BOTH, NULL);
            }
        } else if (q->nb_exports < 0) {
            list->problem = g_strdup(error_get_pretty(q->err));
        } else {
            list_fill(list, q);
        }
    }
    question_unref(q);
    return list;
}

static RemoteList *list_of_nothing(const ClusterNode *node)
{
    RemoteList *list = g_new0(RemoteList, 1);

    list->node = node;
    list->lengths = g_hash_table_new(digest_hash, digest_equal);
    list->problem = g_strdup("it has no key 'nbd'");
    return list;
}

void remote_list_free(RemoteList *list)
{
    if (list) {
        g_free(list->problem);
        g_hash_table_unref(list->lengths);
        g_free(list);
    }
}

static int64_t deadline_from_now(void)
{
    return qemu_clock_get_ms(QEMU_CLOCK_REALTIME) + ANSWER_TIMEOUT_MS;
}

RemoteList *remote_list(const ClusterNode *node)
{
    if (!node->nbd) {
        return list_of_nothing(node);
    }
    return question_answer(question_ask(node), deadline_from_now());
}

GPtrArray *remote_list_all(const Cluster *cluster, const ClusterNode *self)
{
    GPtrArray *lists =
        g_ptr_array_new_with_free_func((GDestroyNotify)remote_list_free);
    g_autofree Question **questions = g_new0(Question *, cluster->nodes->len);
    int64_t deadline;

    for (unsigned i = 0; i < cluster->nodes->len; i++) {
        ClusterNode *node = g_ptr_array_index(cluster->nodes, i);

        questions[i] = node != self && node->nbd ? question_ask(node) : NULL;
    }
    deadline = deadline_from_now();
    for (unsigned i = 0; i < cluster->nodes->len; i++) {
        ClusterNode *node = g_ptr_array_index(cluster->nodes, i);

        if (questions[i]) {
            g_ptr_array_add(lists, question_answer(questions[i], deadline));
        } else if (node != self) {
            g_ptr_array_add(lists, list_of_nothing(node));
        }
    }
    return lists;
}

bool remote_has(const RemoteList *list, const TemplateDigest *digest,
                uint64_t *length)
{
    uint64_t *value = g_hash_table_lookup(list->lengths, digest);

    if (value && length) {
        *length = *value;
    }
    return value;
}

/* ------------------------------------------------------------------ */
/* Opening                                                             */

QDict *remote_options(const ClusterNode *node, const TemplateDigest *digest)
{
    QDict *options = qdict_new();
    QDict *server = qdict_new();
    char text[TEMPLATE_DIGEST_TEXT];

    if (node->nbd->type == SOCKET_ADDRESS_TYPE_INET) {
        qdict_put_str(server, "type", "inet");
        qdict_put_str(server, "host", node->nbd->u.inet.host);
        qdict_put_str(server, "port", node->nbd->u.inet.port);
    } else {
        qdict_put_str(server, "type", "unix");
        qdict_put_str(server, "path", node->nbd->u.q_unix.path);
    }
    template_digest_format(digest, text);
    qdict_put_str(options, "driver", "nbd");
    qdict_put(options, "server", server);
    qdict_put_str(options, "export", text);
    qdict_put_bool(options, "read-only", true);
    return options;
}

char *remote_uri(const ClusterNode *node, const TemplateDigest *digest)
{
    char text[TEMPLATE_DIGEST_TEXT];
    const SocketAddress *a = node->nbd;

    template_digest_format(digest, text);
    if (a->type == SOCKET_ADDRESS_TYPE_UNIX) {
        g_autofree char *path =
            g_uri_escape_string(a->u.q_unix.path, "/", false);

        return g_strdup_printf("nbd+unix:///%s?socket=%s", text, path);
    }
    return g_strdup_printf(strchr(a->u.inet.host, ':') ? "nbd://[%s]:%s/%s"
                                                       : "nbd://%s:%s/%s",
                           a->u.inet.host, a->u.inet.port, text);
}

BlockBackend *remote_open(const ClusterNode *node,
                          const TemplateDigest *digest, Error **errp)
{
    ERRP_GUARD();
    QDict *options = remote_options(node, digest);
    BlockBackend *blk;

    qdict_put_int(options, "open-timeout", OPEN_TIMEOUT_S);
    qdict_flatten(options);
    blk = blk_new_open(NULL, NULL, options, 0, errp);
    if (!blk) {
        error_prepend(errp, "Node '%s': ", node->name);
    }
    return blk;
}

TemplateChunks *remote_chunks_header(const ClusterNode *node,
                                     const TemplateDigest *digest)
{
    g_autoptr(TemplateChunks) c = NULL;
    g_autofree char *name = NULL;
    char text[TEMPLATE_DIGEST_TEXT];
    uint8_t *header = NULL;
    LinkTask *task;

    template_digest_format(digest, text);
    name = g_strconcat(text, CHUNKS_SUFFIX, NULL);
    task = link_task_start(node, name, 0, TEMPLATE_CHUNKS_HEADER,
                           ANSWER_TIMEOUT_MS);
    link_task_wait(task, ANSWER_TIMEOUT_MS);
    link_free(link_task_finish(task, &header, NULL));
    if (header) {
        c = template_chunks_decode_header(header, NULL);
    }
    qemu_vfree(header);
    return c && template_digest_equal(&c->digest, digest)
           ? g_steal_pointer(&c) : NULL;
}
