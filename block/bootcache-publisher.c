/*
 * thinvm boot cache: publisher
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Fetches blocks of the template once, whoever and how many ask, puts them
 * into the shared memory, and keeps the order.  Runs in the main loop: no
 * locks, and whatever is between two yields is atomic.
 *
 *   recording --bytes, seconds, command, a guest's word, memory full,
 *               closed--> sealed
 *
 * In recording, any block may be asked for, and gets a record when it has
 * been read.  Sealed, only blocks with a record are in the cache; the file of
 * a former recording makes records whose data come in recorded order, or as
 * they are asked for, from the file, or where that is damaged from the
 * template.
 *
 * Rules that this file keeps:
 *  - A fetch is in the table from before its I/O until after its blocks are
 *    published, or have failed.  Who finds one of its blocks there waits for
 *    it instead of reading the block himself.
 *  - What is read for a record must have the record's checksum.  If the
 *    template has another one, it is not what was recorded, and the cache is
 *    revoked: no reader uses it any more.
 *  - There is a bound on everything that readers can make it do at a time:
 *    fetches (MAX_FETCHES), their memory (each at most MAX_FETCH_BYTES), and,
 *    in bootcache-server.c, readers and their requests.
 *  - One reader cannot use up the memory of a recording, and a recording that
 *    ran out of memory, so that nobody knows what it lacks, is not kept.
 */

#include "qemu/osdep.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "qemu/memalign.h"
#include "qemu/timer.h"
#include "block/aio-wait.h"
#include "block/thread-pool.h"
#include "bootcache.h"
#include "bootcache-file.h"
#include "thinvm/trace.h"

#define BOOTCACHE_MAX_FETCHES       16
#define BOOTCACHE_MAX_FETCH_BYTES   (1 * MiB)
#define BOOTCACHE_NB_SAMPLES        16

/* Blocks [first, first + count) that are being fetched */
typedef struct BootcacheFetch {
    uint64_t first;
    uint32_t count;
    CoQueue waiters;
} BootcacheFetch;

struct BootcachePublisher {
    BDRVBootcacheState *s;
    BlockDriverState *bs;
    BootcacheMap *map;
    BootcacheServer *server;
    BootcacheFile *file;
    GHashTable *fetches;        /* block -> BootcacheFetch */
    unsigned nb_fetches;
    CoQueue slots;              /* waiting to begin a fetch */
    unsigned nb_coroutines;
    unsigned quiesced;
    bool closing;
    bool started;               /* something was recorded; since: */
    bool distrusted;            /* the records are not the template's */
    bool prefetching;
    int64_t start_ms;
    QEMUTimer *timer;           /* record-seconds */
    char *sealed_by;
    char *save_problem;
    uint64_t save_files;        /* written so far */

    uint64_t requests, joined, io_errors;
    uint64_t boot_ends, boot_ends_refused;
    uint64_t template_bytes, file_bytes;
    uint64_t damaged_blocks;    /* of the file */
};

BootcacheMap *bootcache_publisher_map(BootcachePublisher *p)
{
    return p->map;
}

void bootcache_publisher_enter(BootcachePublisher *p)
{
    p->nb_coroutines++;
}

void bootcache_publisher_leave(BootcachePublisher *p)
{
    p->nb_coroutines--;
    aio_wait_kick();
}

static uint32_t bootcache_bytes_of(BootcachePublisher *p, uint64_t block)
{
    const BootcacheGeometry *g = &p->map->geometry;

    return bootcache_block_bytes(g->length, g->block_size, block);
}

/* ------------------------------------------------------------------ */
/* The end of a recording                                              */

static int bootcache_save_worker(void *opaque)
{
    BootcachePublisher *p = opaque;

    return bootcache_file_save(p->s->options.cache_file, p->map);
}

static void coroutine_fn bootcache_save_entry(void *opaque)
{
    BootcachePublisher *p = opaque;
    int ret = thread_pool_submit_co(bootcache_save_worker, p);

    g_free(g_steal_pointer(&p->save_problem));
    if (ret < 0) {
        p->save_problem = g_strdup(strerror(-ret));
        warn_report("The boot cache of node '%s' cannot be written to '%s': "
                    "%s", bdrv_get_node_name(p->bs), p->s->options.cache_file,
                    strerror(-ret));
    } else {
        p->save_files++;
    }
    bootcache_publisher_leave(p);
}

/* A recording of nothing would only keep the next one from being made */
static void bootcache_save(BootcachePublisher *p)
{
    if (p->s->options.cache_file && p->map->header->used_records) {
        bootcache_publisher_enter(p);
        qemu_coroutine_enter(qemu_coroutine_create(bootcache_save_entry, p));
    }
}

void bootcache_publisher_seal(BootcachePublisher *p, const char *why)
{
    if (bootcache_map_state(p->map) != BOOTCACHE_MAP_RECORDING) {
        return;
    }
    bootcache_map_seal(p->map);
    p->sealed_by = g_strdup(why);
    timer_del(p->timer);
    trace_thinvm_bootcache_seal(p->bs, why, p->map->header->used_records);
    if (!p->save_problem) {
        bootcache_save(p);
    }
}

/* Somebody read far more than a boot does: the next one shall be better */
static void bootcache_out_of_memory(BootcachePublisher *p)
{
    if (p->s->options.cache_file) {
        p->save_problem =
            g_strdup("the recording did not fit into memory-limit");
        warn_report("The recording of node '%s' is not written to '%s': it "
                    "has reached option 'memory-limit', so that blocks may be "
                    "missing.  Seal it earlier (option 'record-bytes' or "
                    "'record-seconds', thinvm-bootcache-seal)",
                    bdrv_get_node_name(p->bs), p->s->options.cache_file);
    }
    bootcache_publisher_seal(p, "memory-limit");
}

/*
 * A reader passes on what a guest says.  A guest that lies ends a recording
 * too early, which costs others speed, and only if the administrator lets
 * guests decide.  Before anything was read this cannot be the end of a boot,
 * and a recording of nothing would serve nobody.
 */
BootcacheStatus bootcache_publisher_boot_ended(BootcachePublisher *p)
{
    p->boot_ends++;
    if (!p->s->options.seal_by_guest) {
        p->boot_ends_refused++;
        return BOOTCACHE_STATUS_REFUSED;
    }
    if (bootcache_map_state(p->map) != BOOTCACHE_MAP_RECORDING) {
        return BOOTCACHE_STATUS_OK;     /* another guest was first, say */
    }
    if (!p->map->header->used_records) {
        p->boot_ends_refused++;
        return BOOTCACHE_STATUS_EMPTY;
    }
    bootcache_publisher_seal(p, "guest-agent");
    return BOOTCACHE_STATUS_OK;
}

static void bootcache_seconds_over(void *opaque)
{
    bootcache_publisher_seal(opaque, "record-seconds");
}

static void bootcache_start_clock(BootcachePublisher *p)
{
    p->started = true;
    p->start_ms = qemu_clock_get_ms(QEMU_CLOCK_REALTIME);
    if (p->s->options.record_seconds) {
        timer_mod(p->timer, p->start_ms +
                  p->s->options.record_seconds * INT64_C(1000));
    }
}

/* ------------------------------------------------------------------ */
/* Fetching                                                            */

/*
 * Blocks that nobody has, of which the first is @block and which have their
 * data in the same place.
 */
static uint32_t bootcache_fetch_length(BootcachePublisher *p, uint64_t block,
                                       uint32_t max)
{
    BootcacheRecord r;
    bool recorded = bootcache_map_get_record(p->map, block, &r);
    uint32_t n = 1;

    max = MIN(max, BOOTCACHE_MAX_FETCH_BYTES / p->map->geometry.block_size);
    while (n < max && !bootcache_map_present(p->map, block + n) &&
           bootcache_map_get_record(p->map, block + n, &r) == recorded &&
           !g_hash_table_contains(p->fetches, GUINT_TO_POINTER(block + n))) {
        n++;
    }
    return n;
}

static void bootcache_fetch_register(BootcachePublisher *p, BootcacheFetch *f)
{
    for (uint32_t i = 0; i < f->count; i++) {
        g_hash_table_insert(p->fetches, GUINT_TO_POINTER(f->first + i), f);
    }
    p->nb_fetches++;
    bdrv_inc_in_flight(p->bs);
}

static void coroutine_fn bootcache_fetch_unregister(BootcachePublisher *p,
                                                    BootcacheFetch *f)
{
    for (uint32_t i = 0; i < f->count; i++) {
        g_hash_table_remove(p->fetches, GUINT_TO_POINTER(f->first + i));
    }
    p->nb_fetches--;
    bdrv_dec_in_flight(p->bs);
    qemu_co_queue_restart_all(&f->waiters);
    qemu_co_queue_restart_all(&p->slots);
}

static int coroutine_fn bootcache_read_template(BootcachePublisher *p,
                                                uint64_t first, uint32_t count,
                                                void *buf)
{
    const BootcacheGeometry *g = &p->map->geometry;
    uint64_t offset = first * g->block_size;
    uint64_t bytes = MIN((uint64_t)count * g->block_size, g->length - offset);
    int ret;

    bdrv_graph_co_rdlock();
    ret = bdrv_co_pread(p->bs->file, offset, bytes, buf, 0);
    bdrv_graph_co_rdunlock();
    if (ret < 0) {
        p->io_errors++;
        return ret;
    }
    p->template_bytes += bytes;
    return 0;
}

/*
 * May the reader have another block recorded?  Half of what there is room for
 * is his, unless all of the template has room.
 */
static bool bootcache_within_quota(BootcachePublisher *p,
                                   const BootcacheQuota *quota)
{
    const BootcacheGeometry *g = &p->map->geometry;

    return (quota->records < DIV_ROUND_UP(g->nb_records, 2) ||
            g->nb_records == g->nb_blocks) &&
           (quota->slots < DIV_ROUND_UP(g->nb_slots, 2) ||
            g->nb_slots == g->nb_blocks);
}

/* A block that was read in recording: a record, then its data */
static bool bootcache_record_block(BootcachePublisher *p, uint64_t block,
                                   const void *data, BootcacheQuota *quota)
{
    uint32_t bytes = bootcache_bytes_of(p, block);
    bool zeroes = buffer_is_zero(data, bytes);
    uint64_t limit = p->s->options.record_bytes;
    BootcacheRecord r = {
        .block = block,
        .flags = zeroes ? BOOTCACHE_RECORD_ZEROES : 0,
        .crc = zeroes ? 0 : bootcache_checksum(&p->map->geometry.identity,
                                               BOOTCACHE_CHECKSUM_BLOCK,
                                               block, data, bytes),
        .ms = MIN(qemu_clock_get_ms(QEMU_CLOCK_REALTIME) - p->start_ms,
                  UINT32_MAX),
    };

    if (bootcache_map_state(p->map) != BOOTCACHE_MAP_RECORDING ||
        !bootcache_within_quota(p, quota)) {
        return false;
    }
    if (!zeroes && limit &&
        bootcache_map_used_bytes(p->map) + bytes > limit) {
        bootcache_publisher_seal(p, "record-bytes");
        return false;
    }
    if (!bootcache_map_add_record(p->map, &r)) {
        bootcache_out_of_memory(p);
        return false;
    }
    quota->records++;
    quota->slots += !zeroes;
    bootcache_map_publish(p->map, block, zeroes ? NULL : data, false);
    return true;
}

static BootcacheStatus coroutine_fn
bootcache_fetch_new(BootcachePublisher *p, uint64_t first, uint32_t count,
                    uint8_t *buf, BootcacheQuota *quota)
{
    BootcacheStatus status = BOOTCACHE_STATUS_OK;

    if (bootcache_read_template(p, first, count, buf) < 0) {
        return BOOTCACHE_STATUS_IO_ERROR;
    }
    for (uint32_t i = 0; i < count; i++) {
        if (!bootcache_record_block(p, first + i, buf +
                                    i * p->map->geometry.block_size, quota)) {
            status = BOOTCACHE_STATUS_CLOSED;
        }
    }
    return status;
}

typedef struct BootcacheFileRead {
    BootcacheFile *file;
    const BootcacheRecord *records;
    uint32_t count;
    uint8_t *buf;
    int *results;
} BootcacheFileRead;

static int bootcache_file_worker(void *opaque)
{
    BootcacheFileRead *r = opaque;

    for (uint32_t i = 0; i < r->count; i++) {
        r->results[i] = r->records[i].slot == BOOTCACHE_NO_SLOT ? 0 :
            bootcache_file_read_block(r->file, &r->records[i], r->buf +
                                      i * r->file->header.block_size);
    }
    return 0;
}

/* The file's copy of a block is damaged: the template has another */
static int coroutine_fn bootcache_repair(BootcachePublisher *p,
                                         const BootcacheRecord *r, void *buf)
{
    int ret;

    if (!p->damaged_blocks++) {
        warn_report("The boot cache '%s' has a damaged block (%" PRIu64 "); "
                    "it is read from the template",
                    p->s->options.cache_file, r->block);
    }
    ret = bootcache_read_template(p, r->block, 1, buf);
    if (ret < 0) {
        return ret;
    }
    return r->crc == bootcache_checksum(&p->map->geometry.identity,
                                        BOOTCACHE_CHECKSUM_BLOCK, r->block,
                                        buf, bootcache_bytes_of(p, r->block))
           ? 0 : -EBADMSG;
}

static void bootcache_distrust(BootcachePublisher *p, uint64_t block)
{
    if (!p->distrusted) {
        p->distrusted = true;
        bootcache_map_revoke(p->map);
        warn_report("Block %" PRIu64 " of the template '%s' is not what its "
                    "boot cache '%s' has recorded, which is not used any "
                    "more. Remove it, and start the publisher again", block,
                    bdrv_get_node_name(p->bs), p->s->options.cache_file);
    }
}

/*
 * Blocks with records, which come from the file: @records are those of the
 * map (their slots), and the file's lie elsewhere.  The map is filled in the
 * order of the file, so slots are the same.
 */
static BootcacheStatus coroutine_fn
bootcache_fetch_recorded(BootcachePublisher *p, const BootcacheRecord *records,
                         uint32_t count, uint8_t *buf, bool prefetch)
{
    g_autofree int *results = g_new0(int, count);
    BootcacheFileRead read = {
        .file = p->file, .records = records, .count = count,
        .buf = buf, .results = results,
    };
    BootcacheStatus status = BOOTCACHE_STATUS_OK;

    thread_pool_submit_co(bootcache_file_worker, &read);
    for (uint32_t i = 0; i < count; i++) {
        const BootcacheRecord *r = &records[i];
        uint8_t *data = buf + i * p->map->geometry.block_size;
        bool zeroes = r->flags & BOOTCACHE_RECORD_ZEROES;

        if (results[i] == 0) {
            p->file_bytes += zeroes ? 0 : bootcache_bytes_of(p, r->block);
        } else {
            results[i] = bootcache_repair(p, r, data);
        }
        if (results[i] == 0) {
            bootcache_map_publish(p->map, r->block, zeroes ? NULL : data,
                                  prefetch);
            continue;
        }
        if (results[i] == -EBADMSG) {
            bootcache_distrust(p, r->block);
        }
        status = BOOTCACHE_STATUS_IO_ERROR;
    }
    return status;
}

/* In the node's drained section nothing begins; nor when too much is going on */
static bool bootcache_must_wait(BootcachePublisher *p)
{
    return !p->closing &&
           (p->quiesced || p->nb_fetches >= BOOTCACHE_MAX_FETCHES);
}

static BootcacheStatus coroutine_fn
bootcache_fetch(BootcachePublisher *p, uint64_t first, uint32_t count,
                BootcacheQuota *quota)
{
    bool prefetch = !quota;
    BootcacheFetch f = { .first = first, .count = count };
    uint32_t block_size = p->map->geometry.block_size;
    g_autofree BootcacheRecord *records = g_new(BootcacheRecord, count);
    BootcacheStatus status;
    bool recorded = false;
    uint8_t *buf = qemu_try_blockalign(p->bs, (size_t)count * block_size);

    if (!buf) {
        return BOOTCACHE_STATUS_IO_ERROR;
    }
    for (uint32_t i = 0; i < count; i++) {
        recorded = bootcache_map_get_record(p->map, first + i, &records[i]);
    }
    qemu_co_queue_init(&f.waiters);
    bootcache_fetch_register(p, &f);
    trace_thinvm_bootcache_fetch(p->bs, first, count, recorded, prefetch);
    if (recorded) {
        status = bootcache_fetch_recorded(p, records, count, buf, prefetch);
    } else {
        status = bootcache_fetch_new(p, first, count, buf, quota);
    }
    bootcache_fetch_unregister(p, &f);
    qemu_vfree(buf);
    return status;
}

/* May the block be brought into the cache? */
static bool bootcache_obtainable(BootcachePublisher *p, uint64_t block,
                                 const BootcacheQuota *quota)
{
    BootcacheRecord r;

    if (p->closing || p->distrusted) {
        return false;
    }
    return (bootcache_map_state(p->map) == BOOTCACHE_MAP_RECORDING &&
            bootcache_within_quota(p, quota)) ||
           bootcache_map_get_record(p->map, block, &r);
}

/*
 * Bring blocks from [@block, @end) in, at least the first.  Returns with
 * *@block behind what is there.  Without @quota, which is the reader's, they
 * are prefetched: there are records.
 */
static BootcacheStatus coroutine_fn
bootcache_get_some(BootcachePublisher *p, uint64_t *block, uint64_t end,
                   BootcacheQuota *quota)
{
    BootcacheFetch *f;

    if (bootcache_map_present(p->map, *block)) {
        ++*block;
        return BOOTCACHE_STATUS_OK;
    }
    if (!bootcache_obtainable(p, *block, quota)) {
        return BOOTCACHE_STATUS_CLOSED;
    }
    f = g_hash_table_lookup(p->fetches, GUINT_TO_POINTER(*block));
    if (f) {
        p->joined++;
        qemu_co_queue_wait(&f->waiters, NULL);
        /* If that failed, so will we: once more would be one too often */
        if (!bootcache_map_present(p->map, *block) &&
            !g_hash_table_contains(p->fetches, GUINT_TO_POINTER(*block))) {
            return BOOTCACHE_STATUS_IO_ERROR;
        }
        return BOOTCACHE_STATUS_OK;
    }
    if (bootcache_must_wait(p)) {
        qemu_co_queue_wait(&p->slots, NULL);
        return BOOTCACHE_STATUS_OK;
    }
    if (!p->started) {
        bootcache_start_clock(p);
    }
    return bootcache_fetch(p, *block,
                           bootcache_fetch_length(p, *block, end - *block),
                           quota);
}

BootcacheStatus coroutine_fn
bootcache_publisher_get(BootcachePublisher *p, uint64_t block, uint32_t count,
                        BootcacheQuota *quota)
{
    BootcacheStatus status = BOOTCACHE_STATUS_OK;
    uint64_t end = block + count;

    p->requests++;
    while (block < end && status == BOOTCACHE_STATUS_OK) {
        status = bootcache_get_some(p, &block, end, quota);
    }
    return status;
}

/* ------------------------------------------------------------------ */
/* A former recording                                                  */

static void coroutine_fn bootcache_prefetch_entry(void *opaque)
{
    BootcachePublisher *p = opaque;
    uint32_t nb = p->map->header->used_records;

    for (uint32_t i = 0; i < nb && !p->closing && !p->distrusted; i++) {
        uint64_t block = p->map->records[i].block;
        uint64_t end = block + 1;

        /* Neighbours that were read one after the other come together */
        while (i + 1 < nb && p->map->records[i + 1].block == end &&
               end - block < BOOTCACHE_MAX_REQUEST_BLOCKS) {
            i++;
            end++;
        }
        while (block < end &&
               bootcache_get_some(p, &block, end, NULL) ==
               BOOTCACHE_STATUS_OK) {
            /* goes on */
        }
    }
    p->prefetching = false;
    if (p->damaged_blocks && !p->closing && !p->distrusted) {
        bootcache_save(p);      /* whole again */
    }
    bootcache_publisher_leave(p);
}

/* Does the template have what was recorded?  A few blocks tell. */
static bool bootcache_samples_match(BootcachePublisher *p, BootcacheFile *f,
                                    Error **errp)
{
    BlockDriverState *bs = p->bs;
    const BootcacheFileHeader *h = &f->header;
    g_autofree uint8_t *buf = g_malloc(h->block_size);
    uint32_t step = MAX(1, DIV_ROUND_UP(h->nb_records,
                                           BOOTCACHE_NB_SAMPLES));

    GRAPH_RDLOCK_GUARD_MAINLOOP();
    for (uint32_t i = 0; i < h->nb_records; i += step) {
        const BootcacheRecord *r = &f->records[i];
        uint32_t bytes = bootcache_block_bytes(h->length, h->block_size,
                                               r->block);
        int ret = bdrv_pread(bs->file, r->block * h->block_size, bytes, buf,
                             0);

        if (ret < 0) {
            error_setg_errno(errp, -ret, "the template cannot be read");
            return false;
        }
        p->template_bytes += bytes;
        if (r->flags & BOOTCACHE_RECORD_ZEROES
            ? !buffer_is_zero(buf, bytes)
            : r->crc != bootcache_checksum(&h->identity,
                                           BOOTCACHE_CHECKSUM_BLOCK,
                                           r->block, buf, bytes)) {
            error_setg(errp, "block %" PRIu64 " of the template is not what "
                       "it recorded", r->block);
            return false;
        }
    }
    return true;
}

static BootcacheFile *bootcache_load(BootcachePublisher *p)
{
    const BootcacheOptions *o = &p->s->options;
    Error *local_err = NULL;
    bool aside;
    BootcacheFile *f = bootcache_file_open(o->cache_file, &p->s->identity,
                                           p->s->length, o->block_size,
                                           o->memory_limit, &aside,
                                           &local_err);

    if (f && !bootcache_samples_match(p, f, &local_err)) {
        bootcache_file_close(f);
        f = NULL;
        aside = true;
    }
    if (local_err) {
        if (aside) {
            bootcache_file_put_aside(o->cache_file,
                                     error_get_pretty(local_err));
        } else {
            warn_report("The boot cache '%s' is not used: %s", o->cache_file,
                        error_get_pretty(local_err));
        }
        error_free(local_err);
    }
    return f;
}

/* As many records as there is memory for; their data come later */
static void bootcache_adopt_records(BootcachePublisher *p)
{
    for (uint32_t i = 0; i < p->file->header.nb_records; i++) {
        if (!bootcache_map_add_record(p->map, &p->file->records[i])) {
            break;
        }
    }
    bootcache_map_seal(p->map);
    p->sealed_by = g_strdup("cache-file");
    p->started = true;
    p->prefetching = true;
    bootcache_publisher_enter(p);
    aio_co_schedule(qemu_get_aio_context(),
                    qemu_coroutine_create(bootcache_prefetch_entry, p));
}

/* ------------------------------------------------------------------ */

/* Who is woken begins a fetch or leaves; he does not wait again here */
static void bootcache_publisher_wake(BootcachePublisher *p)
{
    while (!bootcache_must_wait(p) && qemu_co_enter_next(&p->slots, NULL)) {
        /* the next one */
    }
}

void bootcache_publisher_drain_begin(BootcachePublisher *p)
{
    p->quiesced++;
}

void bootcache_publisher_drain_end(BootcachePublisher *p)
{
    p->quiesced--;
    bootcache_publisher_wake(p);
}

static bool bootcache_publisher_open(BootcachePublisher *p, Error **errp)
{
    const BootcacheOptions *o = &p->s->options;
    uint32_t block_size = o->block_size ?: BOOTCACHE_DEFAULT_BLOCK_SIZE;

    if (o->cache_file) {
        p->file = bootcache_load(p);
        if (p->file) {
            block_size = p->file->header.block_size;
        }
    }
    if (!bootcache_check_geometry(p->s->length, block_size, errp)) {
        return false;
    }
    p->map = bootcache_map_create(&p->s->identity, p->s->length, block_size,
                                  o->memory_limit, errp);
    if (!p->map) {
        return false;
    }
    p->server = bootcache_server_new(p, o, errp);
    if (!p->server) {
        return false;
    }
    if (p->file) {
        bootcache_adopt_records(p);
    }
    return true;
}

BootcachePublisher *bootcache_publisher_new(BDRVBootcacheState *s,
                                            Error **errp)
{
    BootcachePublisher *p = g_new0(BootcachePublisher, 1);

    p->s = s;
    p->bs = s->bs;
    p->quiesced = !!s->bs->quiesce_counter;
    p->fetches = g_hash_table_new(NULL, NULL);
    qemu_co_queue_init(&p->slots);
    p->timer = timer_new_ms(QEMU_CLOCK_REALTIME, bootcache_seconds_over, p);
    if (!bootcache_publisher_open(p, errp)) {
        bootcache_publisher_free(p);
        return NULL;
    }
    return p;
}

void bootcache_publisher_free(BootcachePublisher *p)
{
    if (p->map) {
        bootcache_publisher_seal(p, "closed");
    }
    p->closing = true;
    if (p->server) {
        bootcache_server_stop(p->server);
    }
    bootcache_publisher_wake(p);
    AIO_WAIT_WHILE_UNLOCKED(NULL, p->nb_coroutines);
    assert(!p->nb_fetches);
    if (p->server) {
        bootcache_server_free(p->server);
    }
    if (p->map) {
        bootcache_map_free(p->map);
    }
    bootcache_file_close(p->file);
    timer_free(p->timer);
    g_hash_table_destroy(p->fetches);
    g_free(p->sealed_by);
    g_free(p->save_problem);
    g_free(p);
}

static ThinvmBootcacheState bootcache_shown_state(BootcacheMap *map)
{
    switch (bootcache_map_state(map)) {
    case BOOTCACHE_MAP_RECORDING:
        return THINVM_BOOTCACHE_STATE_RECORDING;
    case BOOTCACHE_MAP_SEALED:
        return THINVM_BOOTCACHE_STATE_SEALED;
    default:
        return THINVM_BOOTCACHE_STATE_REVOKED;
    }
}

ThinvmBootcachePublisherInfo *
bootcache_publisher_info(BootcachePublisher *p)
{
    ThinvmBootcachePublisherInfo *info =
        g_new0(ThinvmBootcachePublisherInfo, 1);
    BootcacheMapHeader *h = p->map->header;

    *info = (ThinvmBootcachePublisherInfo) {
        .state = bootcache_shown_state(p->map),
        .sealed_by = g_strdup(p->sealed_by),
        .blocks = h->used_records,
        .used_bytes = bootcache_map_used_bytes(p->map),
        .memory_limit = (uint64_t)p->map->geometry.nb_slots *
                        p->map->geometry.block_size,
        .prefetching = p->prefetching,
        .prefetched_blocks = h->prefetched,
        .requests = p->requests,
        .joined = p->joined,
        .boot_ends = p->boot_ends,
        .boot_ends_refused = p->boot_ends_refused,
        .template_bytes = p->template_bytes,
        .file_bytes = p->file_bytes,
        .damaged_blocks = p->damaged_blocks,
        .io_errors = p->io_errors,
        .saved = p->save_files,
        .save_problem = g_strdup(p->save_problem),
    };
    bootcache_server_info(p->server, info);
    return info;
}
