/*
 * thinvm boot cache: the filter driver, bootcache
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A filter above a template, which is read-only; see bootcache.h for its
 * parts.  As a reader it serves what is in the shared memory by copying it,
 * without any lock; asks the publisher for what is not; and reads from the
 * template what the publisher does not provide.  As the publisher it fills
 * the memory, and reads through its own node go to the template.
 *
 * Requests may come from several threads.  Nobody may write or resize the
 * template while a node of this driver is above it.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qapi/qapi-visit-thinvm.h"
#include "qemu/sockets.h"
#include "qobject/qdict.h"
#include "qemu/cutils.h"
#include "qemu/module.h"
#include "qemu/option.h"
#include "bootcache.h"
#include "thinvm/trace.h"

#define BOOTCACHE_DEFAULT_TIMEOUT_MS    10000
#define BOOTCACHE_MIN_TIMEOUT_MS        100
#define BOOTCACHE_MAX_TIMEOUT_MS        (600 * 1000)
#define BOOTCACHE_DEFAULT_MEMORY        (512 * MiB)
#define BOOTCACHE_MAX_MEMORY            (64 * GiB)
#define BOOTCACHE_DEFAULT_READERS       256
#define BOOTCACHE_MAX_READERS           4096
#define BOOTCACHE_MAX_ID                1024

BootcacheNodeList bootcache_nodes = QTAILQ_HEAD_INITIALIZER(bootcache_nodes);

/* ------------------------------------------------------------------ */
/* Options                                                             */

static QemuOptsList bootcache_runtime_opts = {
    .name = "bootcache",
    .head = QTAILQ_HEAD_INITIALIZER(bootcache_runtime_opts.head),
    .desc = {
        { .name = "role", .type = QEMU_OPT_STRING,
          .help = "reader (default) or publisher" },
        { .name = "socket", .type = QEMU_OPT_STRING,
          .help = "path of the unix socket on which the publisher listens" },
        { .name = "template-id", .type = QEMU_OPT_STRING,
          .help = "a name that changes whenever the template's contents do" },
        { .name = "timeout", .type = QEMU_OPT_NUMBER,
          .help = "reader: milliseconds to wait for a silent publisher" },
        { .name = "block-size", .type = QEMU_OPT_SIZE,
          .help = "publisher: unit of fetching" },
        { .name = "memory-limit", .type = QEMU_OPT_SIZE,
          .help = "publisher: most memory for blocks" },
        { .name = "record-bytes", .type = QEMU_OPT_SIZE,
          .help = "publisher: seal the recording at this size" },
        { .name = "record-seconds", .type = QEMU_OPT_NUMBER,
          .help = "publisher: seal the recording after this time" },
        { .name = "max-readers", .type = QEMU_OPT_NUMBER,
          .help = "publisher: most connections" },
        { .name = "seal-by-guest", .type = QEMU_OPT_BOOL,
          .help = "publisher: seal the recording when a guest says that it "
                  "has booted" },
        { .name = "cache-file", .type = QEMU_OPT_STRING,
          .help = "publisher: where the recording is kept" },
        { /* end of list */ }
    },
};

static const char *const bootcache_publisher_options[] = {
    "block-size", "memory-limit", "record-bytes", "record-seconds",
    "max-readers", "seal-by-guest", "cache-file",
};

static bool bootcache_in_range(const char *name, uint64_t value, uint64_t min,
                               uint64_t max, Error **errp)
{
    if (value < min || value > max) {
        error_setg(errp, "Option '%s' is %" PRIu64 "; it must be from %"
                   PRIu64 " to %" PRIu64, name, value, min, max);
        return false;
    }
    return true;
}

static bool bootcache_options_numbers(BootcacheOptions *o, QemuOpts *opts,
                                      Error **errp)
{
    uint64_t timeout = qemu_opt_get_number(opts, "timeout",
                                           BOOTCACHE_DEFAULT_TIMEOUT_MS);
    uint64_t block_size = qemu_opt_get_size(opts, "block-size", 0);
    uint64_t seconds = qemu_opt_get_number(opts, "record-seconds", 0);
    uint64_t readers = qemu_opt_get_number(opts, "max-readers",
                                           BOOTCACHE_DEFAULT_READERS);

    o->memory_limit = qemu_opt_get_size(opts, "memory-limit",
                                        BOOTCACHE_DEFAULT_MEMORY);
    o->record_bytes = qemu_opt_get_size(opts, "record-bytes", 0);
    if (!bootcache_in_range("timeout", timeout, BOOTCACHE_MIN_TIMEOUT_MS,
                            BOOTCACHE_MAX_TIMEOUT_MS, errp) ||
        !bootcache_in_range("memory-limit", o->memory_limit,
                            BOOTCACHE_MAX_BLOCK_SIZE, BOOTCACHE_MAX_MEMORY,
                            errp) ||
        !bootcache_in_range("record-seconds", seconds, 0, INT32_MAX, errp) ||
        !bootcache_in_range("max-readers", readers, 1, BOOTCACHE_MAX_READERS,
                            errp) ||
        (block_size &&
         !bootcache_check_geometry(block_size, block_size, errp))) {
        return false;
    }
    o->timeout_ms = timeout;
    o->block_size = block_size;
    o->record_seconds = seconds;
    o->max_readers = readers;
    o->seal_by_guest = qemu_opt_get_bool(opts, "seal-by-guest", false);
    return true;
}

static bool bootcache_options_role(BootcacheOptions *o, QemuOpts *opts,
                                   Error **errp)
{
    Error *local_err = NULL;

    o->role = qapi_enum_parse(&ThinvmBootcacheRole_lookup,
                              qemu_opt_get(opts, "role"),
                              THINVM_BOOTCACHE_ROLE_READER, &local_err);
    if (local_err) {
        error_propagate(errp, local_err);
        return false;
    }
    if (o->role == THINVM_BOOTCACHE_ROLE_PUBLISHER) {
        return true;
    }
    for (size_t i = 0; i < ARRAY_SIZE(bootcache_publisher_options); i++) {
        if (qemu_opt_get(opts, bootcache_publisher_options[i])) {
            error_setg(errp, "Option '%s' is the publisher's; a reader has "
                       "none of it", bootcache_publisher_options[i]);
            return false;
        }
    }
    return true;
}

static bool bootcache_options_strings(BootcacheOptions *o, QemuOpts *opts,
                                      Error **errp)
{
    struct sockaddr_un *addr = NULL;

    o->socket = g_strdup(qemu_opt_get(opts, "socket"));
    o->template_id = g_strdup(qemu_opt_get(opts, "template-id"));
    o->cache_file = g_strdup(qemu_opt_get(opts, "cache-file"));
    if (!o->socket || !*o->socket ||
        strlen(o->socket) >= sizeof(addr->sun_path)) {
        error_setg(errp, "Option 'socket' must be a path of 1 to %zu bytes",
                   sizeof(addr->sun_path) - 1);
        return false;
    }
    if (o->template_id && (!*o->template_id ||
                           strlen(o->template_id) > BOOTCACHE_MAX_ID)) {
        error_setg(errp, "Option 'template-id' must have 1 to %d bytes",
                   BOOTCACHE_MAX_ID);
        return false;
    }
    if (o->cache_file && !*o->cache_file) {
        error_setg(errp, "Option 'cache-file' must not be empty");
        return false;
    }
    return true;
}

static void bootcache_options_free(BootcacheOptions *o)
{
    g_free(o->socket);
    g_free(o->template_id);
    g_free(o->cache_file);
}

static bool bootcache_options_parse(BootcacheOptions *o, QDict *options,
                                    Error **errp)
{
    QemuOpts *opts = qemu_opts_create(&bootcache_runtime_opts, NULL, 0,
                                      &error_abort);
    bool ok = qemu_opts_absorb_qdict(opts, options, errp) &&
              bootcache_options_role(o, opts, errp) &&
              bootcache_options_strings(o, opts, errp) &&
              bootcache_options_numbers(o, opts, errp);

    qemu_opts_del(opts);
    return ok;
}

/* ------------------------------------------------------------------ */
/* Open, close, reopen                                                 */

static int bootcache_start(BlockDriverState *bs, Error **errp)
{
    BDRVBootcacheState *s = bs->opaque;
    int ret;

    bdrv_graph_rdlock_main_loop();
    ret = bootcache_identify(bs->file, s->options.template_id, &s->identity,
                             &s->length, errp);
    bdrv_graph_rdunlock_main_loop();
    if (ret < 0) {
        return ret;
    }
    if (s->options.role == THINVM_BOOTCACHE_ROLE_PUBLISHER) {
        s->publisher = bootcache_publisher_new(s, errp);
        return s->publisher ? 0 : -EINVAL;
    }
    s->client = bootcache_client_new(bdrv_get_node_name(bs),
                                     s->options.socket, &s->identity,
                                     s->length, s->options.timeout_ms, errp);
    return s->client ? 0 : -EINVAL;
}

static int GRAPH_UNLOCKED bootcache_open(BlockDriverState *bs, QDict *options,
                                         int flags, Error **errp)
{
    BDRVBootcacheState *s = bs->opaque;
    int ret;

    s->bs = bs;
    bdrv_graph_rdlock_main_loop();
    ret = bdrv_apply_auto_read_only(bs, "A boot cache is for a template, "
                                    "which can only be read; open the node "
                                    "with read-only=on", errp);
    bdrv_graph_rdunlock_main_loop();
    if (ret < 0) {
        return ret;
    }
    ret = bdrv_open_file_child(NULL, options, "file", bs, errp);
    if (ret < 0) {
        return ret;
    }
    ret = bootcache_options_parse(&s->options, options, errp) ? 0 : -EINVAL;
    if (ret == 0 && !(flags & BDRV_O_NO_IO)) {
        ret = bootcache_start(bs, errp);
    }
    if (ret < 0) {
        bootcache_options_free(&s->options);
        return ret;
    }
    QTAILQ_INSERT_TAIL(&bootcache_nodes, s, link);
    return 0;
}

static void GRAPH_UNLOCKED bootcache_close(BlockDriverState *bs)
{
    BDRVBootcacheState *s = bs->opaque;

    QTAILQ_REMOVE(&bootcache_nodes, s, link);
    if (s->client) {
        bootcache_client_free(s->client);
    }
    if (s->publisher) {
        bootcache_publisher_free(g_steal_pointer(&s->publisher));
    }
    bootcache_options_free(&s->options);
}

/* Nothing about it changes, and it stays read-only */
static int bootcache_reopen_prepare(BDRVReopenState *state,
                                    BlockReopenQueue *queue, Error **errp)
{
    if (state->flags & BDRV_O_RDWR) {
        error_setg(errp, "A boot cache is for a template, which can only be "
                   "read");
        return -EACCES;
    }
    return 0;
}

/* ------------------------------------------------------------------ */
/* Reading                                                             */

typedef struct BootcachePiece {
    BootcacheLookup what;       /* of all of these bytes: */
    int64_t bytes;
    uint64_t block;             /* the first one */
    uint32_t nb_blocks;
} BootcachePiece;

static void bootcache_count(BDRVBootcacheState *s, const BootcacheHit *hit)
{
    if (hit->first) {
        stat64_add(&s->blocks, 1);
        if (hit->prefetched) {
            stat64_add(&s->prefetched_blocks, 1);
        }
    }
}

/* Without the RCU read lock, @map could go with its last publisher */
static void bootcache_copy(BootcacheMap *map, const BootcacheHit *hit,
                           int64_t offset, int64_t bytes, QEMUIOVector *qiov,
                           size_t qiov_offset)
{
    if (hit->data) {
        qemu_iovec_from_buf(qiov, qiov_offset, hit->data +
                            offset % map->geometry.block_size, bytes);
    } else {
        qemu_iovec_memset(qiov, qiov_offset, 0, bytes);
    }
}

/*
 * What to do with as many bytes from @offset on as have the same answer; a
 * hit is copied already.
 */
static void bootcache_next_piece(BDRVBootcacheState *s, BootcachePiece *piece,
                                 int64_t offset, int64_t bytes,
                                 QEMUIOVector *qiov, size_t qiov_offset)
{
    BootcacheMap *map;

    RCU_READ_LOCK_GUARD();
    *piece = (BootcachePiece) { .what = BOOTCACHE_MISS };
    map = bootcache_client_map(s->client);
    if (!map) {
        piece->bytes = bytes;
        return;
    }
    piece->block = offset / map->geometry.block_size;
    while (piece->bytes < bytes &&
           piece->nb_blocks < BOOTCACHE_MAX_REQUEST_BLOCKS) {
        int64_t at = offset + piece->bytes;
        uint64_t block = at / map->geometry.block_size;
        int64_t n = MIN(bytes - piece->bytes,
                        (block + 1) * map->geometry.block_size - at);
        BootcacheHit hit;
        BootcacheLookup what = bootcache_map_lookup(map, block, &hit);

        if (what == BOOTCACHE_WRONG) {
            stat64_add(&s->wrong_blocks, 1);
            what = BOOTCACHE_MISS;
        }
        if (piece->bytes && what != piece->what) {
            return;
        }
        if (what == BOOTCACHE_HIT) {
            bootcache_copy(map, &hit, at, n, qiov,
                           qiov_offset + piece->bytes);
            bootcache_count(s, &hit);
        }
        piece->what = what;
        piece->bytes += n;
        piece->nb_blocks++;
    }
}

static int coroutine_fn GRAPH_RDLOCK
bootcache_read_template(BDRVBootcacheState *s, int64_t offset, int64_t bytes,
                        QEMUIOVector *qiov, size_t qiov_offset,
                        BdrvRequestFlags flags)
{
    stat64_add(&s->misses, 1);
    stat64_add(&s->miss_bytes, bytes);
    return bdrv_co_preadv_part(s->bs->file, offset, bytes, qiov, qiov_offset,
                               flags);
}

/*
 * Bytes that the publisher was asked for.  Where they are not in the cache
 * after all, because he could not, or is gone, they come from the template.
 */
static int coroutine_fn GRAPH_RDLOCK
bootcache_read_asked(BDRVBootcacheState *s, const BootcachePiece *asked,
                     int64_t offset, QEMUIOVector *qiov, size_t qiov_offset,
                     BdrvRequestFlags flags)
{
    int64_t left = asked->bytes;
    int ret = 0;

    bootcache_client_fetch(s->client, asked->block, asked->nb_blocks);
    while (left && ret >= 0) {
        BootcachePiece piece;

        bootcache_next_piece(s, &piece, offset, left, qiov, qiov_offset);
        if (piece.what == BOOTCACHE_HIT) {
            stat64_add(&s->fetches, 1);
            stat64_add(&s->fetch_bytes, piece.bytes);
        } else {
            ret = bootcache_read_template(s, offset, piece.bytes, qiov,
                                          qiov_offset, flags);
        }
        offset += piece.bytes;
        qiov_offset += piece.bytes;
        left -= piece.bytes;
    }
    return ret;
}

static int coroutine_fn GRAPH_RDLOCK
bootcache_co_preadv_part(BlockDriverState *bs, int64_t offset, int64_t bytes,
                         QEMUIOVector *qiov, size_t qiov_offset,
                         BdrvRequestFlags flags)
{
    BDRVBootcacheState *s = bs->opaque;
    int ret = 0;

    if (!s->client) {
        return bdrv_co_preadv_part(bs->file, offset, bytes, qiov, qiov_offset,
                                   flags);
    }
    bootcache_client_wait_ready(s->client);
    while (bytes && ret >= 0) {
        BootcachePiece piece;

        bootcache_next_piece(s, &piece, offset, bytes, qiov, qiov_offset);
        switch (piece.what) {
        case BOOTCACHE_HIT:
            stat64_add(&s->hits, 1);
            stat64_add(&s->hit_bytes, piece.bytes);
            break;
        case BOOTCACHE_ASK:
            ret = bootcache_read_asked(s, &piece, offset, qiov, qiov_offset,
                                       flags);
            break;
        default:
            ret = bootcache_read_template(s, offset, piece.bytes, qiov,
                                          qiov_offset, flags);
        }
        offset += piece.bytes;
        qiov_offset += piece.bytes;
        bytes -= piece.bytes;
    }
    return ret;
}

/* ------------------------------------------------------------------ */
/* Properties                                                          */

static void GRAPH_RDLOCK
bootcache_child_perm(BlockDriverState *bs, BdrvChild *c, BdrvChildRole role,
                     BlockReopenQueue *queue, uint64_t perm, uint64_t shared,
                     uint64_t *nperm, uint64_t *nshared)
{
    bdrv_default_perms(bs, c, role, queue, perm, shared, nperm, nshared);
    *nperm |= BLK_PERM_CONSISTENT_READ;
    *nshared &= ~(BLK_PERM_WRITE | BLK_PERM_RESIZE);
}

static int64_t coroutine_fn GRAPH_RDLOCK
bootcache_co_getlength(BlockDriverState *bs)
{
    return bdrv_co_getlength(bs->file->bs);
}

static void bootcache_drain_begin(BlockDriverState *bs)
{
    BDRVBootcacheState *s = bs->opaque;

    if (s->publisher) {
        bootcache_publisher_drain_begin(s->publisher);
    }
}

static void bootcache_drain_end(BlockDriverState *bs)
{
    BDRVBootcacheState *s = bs->opaque;

    if (s->publisher) {
        bootcache_publisher_drain_end(s->publisher);
    }
}

ThinvmBootcacheStatistics *bootcache_statistics(BDRVBootcacheState *s)
{
    ThinvmBootcacheStatistics *stats = g_new0(ThinvmBootcacheStatistics, 1);

    *stats = (ThinvmBootcacheStatistics) {
        .hits = stat64_get(&s->hits),
        .hit_bytes = stat64_get(&s->hit_bytes),
        .fetches = stat64_get(&s->fetches),
        .fetched_bytes = stat64_get(&s->fetch_bytes),
        .misses = stat64_get(&s->misses),
        .miss_bytes = stat64_get(&s->miss_bytes),
        .used_blocks = stat64_get(&s->blocks),
        .prefetched_used_blocks = stat64_get(&s->prefetched_blocks),
        .wrong_blocks = stat64_get(&s->wrong_blocks),
    };
    RCU_READ_LOCK_GUARD();
    if (s->client && bootcache_client_map(s->client)) {
        BootcacheMap *map = bootcache_client_map(s->client);

        stats->cached_blocks = qatomic_read(&map->header->used_records);
        stats->prefetched_blocks = qatomic_read(&map->header->prefetched);
    }
    return stats;
}

bool bootcache_boot_ended(const char *node_name, Error **errp)
{
    BDRVBootcacheState *s;

    QTAILQ_FOREACH(s, &bootcache_nodes, link) {
        if (!strcmp(bdrv_get_node_name(s->bs), node_name)) {
            break;
        }
    }
    if (!s) {
        error_setg(errp, "There is no bootcache node '%s'", node_name);
        return false;
    }
    if (!s->client) {
        error_setg(errp, "Node '%s' is not a reader of a boot cache; its "
                   "guest's word is of no use to it", node_name);
        return false;
    }
    return bootcache_client_boot_ended(s->client, errp);
}

static BlockStatsSpecific *bootcache_get_specific_stats(BlockDriverState *bs)
{
    BlockStatsSpecific *stats = g_new0(BlockStatsSpecific, 1);
    ThinvmBootcacheStatistics *own = bootcache_statistics(bs->opaque);

    stats->driver = BLOCKDEV_DRIVER_BOOTCACHE;
    stats->u.bootcache = *own;
    g_free(own);
    return stats;
}

static const char *const bootcache_strong_options[] = {
    "role", "socket", "template-id", NULL
};

static BlockDriver bdrv_bootcache = {
    .format_name                = "bootcache",
    .instance_size              = sizeof(BDRVBootcacheState),
    .is_filter                  = true,
    .strong_runtime_opts        = bootcache_strong_options,

    .bdrv_open                  = bootcache_open,
    .bdrv_close                 = bootcache_close,
    .bdrv_reopen_prepare        = bootcache_reopen_prepare,
    .bdrv_child_perm            = bootcache_child_perm,
    .bdrv_co_getlength          = bootcache_co_getlength,
    .bdrv_co_preadv_part        = bootcache_co_preadv_part,
    .bdrv_get_specific_stats    = bootcache_get_specific_stats,
    .bdrv_drain_begin           = bootcache_drain_begin,
    .bdrv_drain_end             = bootcache_drain_end,
};

static void bdrv_bootcache_init(void)
{
    bdrv_register(&bdrv_bootcache);
}

block_init(bdrv_bootcache_init);
