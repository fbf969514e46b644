/*
 * blockdev-precopy in simulated time: what guests do
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Traces that are made up as they are asked for, so that size costs nothing,
 * and traces from a file.
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "thinvm-precopy-sim.h"

#define BLOCK       4096
#define GRAIN       65536           /* what an agent tells */
#define TICK_US     10000
#define TICKS       (1000000 / TICK_US)
#define LOOK_TICKS  TICKS           /* of the agent: once a second */
#define FLUSH_TICKS TICKS           /* writing back takes a second */

/* ------------------------------------------------------------------ */
/* A database, its log, and files that others update                    */

typedef struct Database {
    SimTrace common;
    SimDatabase d;
    GRand *rand;
    GQueue *events;                 /* made, not taken */
    int64_t tick, logged;
    bool said_used;
    /* Blocks of the cold part that are dirty in the page cache */
    GHashTable *dirty, *told;
    int64_t expires;                /* tick; 0: none is dirty */
    GArray *flushing;               /* blocks, ascending */
    guint flushed;
} Database;

static void db_event(Database *db, SimKind kind, int64_t offset,
                     int64_t bytes, int64_t due_us)
{
    SimEvent *e = g_new(SimEvent, 1);

    *e = (SimEvent) { db->tick * TICK_US, kind, offset, bytes, due_us };
    g_queue_push_tail(db->events, e);
}

static int64_t db_random(Database *db, int64_t bytes)
{
    return (int64_t)(g_rand_double(db->rand) * (bytes / BLOCK)) * BLOCK;
}

/* So many a second, spread over the ticks */
static int64_t db_share(const Database *db, int64_t rate)
{
    return rate * (db->tick + 1) / TICKS - rate * db->tick / TICKS;
}

/* hot | log | cold | the rest */
static int64_t db_log_size(const Database *db)
{
    return db->d.used / 8;
}

static void db_cold(Database *db)
{
    int64_t base = db->d.hot + db_log_size(db);

    for (int64_t n = db_share(db, db->d.cold_rate); n; n--) {
        int64_t at = base + db_random(db, db->d.cold);

        if (db->d.expire_s == 0) {
            db_event(db, SIM_WRITE, at, BLOCK, 0);
            continue;
        }
        if (!db->expires) {
            db->expires = db->tick + db->d.expire_s * TICKS;
        }
        g_hash_table_add(db->dirty, GSIZE_TO_POINTER(at / BLOCK));
    }
}

/* The agent tells what is new, coarsely */
static void db_tell(Database *db)
{
    GHashTableIter iter;
    gpointer key;

    if (!db->d.agent || db->tick % LOOK_TICKS || !db->expires) {
        return;
    }
    g_hash_table_iter_init(&iter, db->dirty);
    while (g_hash_table_iter_next(&iter, &key, NULL)) {
        int64_t grain = GPOINTER_TO_SIZE(key) * BLOCK / GRAIN;

        if (g_hash_table_add(db->told, GSIZE_TO_POINTER(grain))) {
            db_event(db, SIM_DIRTY, grain * GRAIN, GRAIN,
                     db->expires * TICK_US);
        }
    }
}

static int compare_blocks(gconstpointer a, gconstpointer b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;

    return x < y ? -1 : x > y;
}

/* The kernel writes all that is dirty of the file, in order */
static void db_flush(Database *db)
{
    if (db->expires && db->tick >= db->expires && !db->flushing) {
        GHashTableIter iter;
        gpointer key;

        db->flushing = g_array_new(false, false, sizeof(int64_t));
        db->flushed = 0;
        g_hash_table_iter_init(&iter, db->dirty);
        while (g_hash_table_iter_next(&iter, &key, NULL)) {
            int64_t block = GPOINTER_TO_SIZE(key);

            g_array_append_val(db->flushing, block);
        }
        g_array_sort(db->flushing, compare_blocks);
        g_hash_table_remove_all(db->dirty);
        g_hash_table_remove_all(db->told);
        db->expires = 0;
    }
    for (guint n = 0; db->flushing &&
         n <= db->flushing->len / FLUSH_TICKS; n++) {
        if (db->flushed == db->flushing->len) {
            g_array_unref(db->flushing);
            db->flushing = NULL;
            break;
        }
        db_event(db, SIM_WRITE, BLOCK *
                 g_array_index(db->flushing, int64_t, db->flushed++), BLOCK,
                 0);
    }
}

static void db_tick(Database *db)
{
    for (int64_t n = db_share(db, db->d.hot_rate); n; n--) {
        db_event(db, SIM_WRITE, db_random(db, db->d.hot), BLOCK, 0);
    }
    for (int64_t n = db_share(db, db->d.log_rate); n; n--) {
        db_event(db, SIM_WRITE, db->d.hot +
                 db->logged++ * BLOCK % db_log_size(db), BLOCK, 0);
    }
    db_cold(db);
    db_tell(db);
    db_flush(db);
    db->tick++;
}

static void db_next(SimTrace *trace, SimEvent *e)
{
    Database *db = container_of(trace, Database, common);
    g_autofree SimEvent *made = NULL;

    if (!db->said_used) {
        db->said_used = true;
        *e = (SimEvent) { 0, SIM_USED, 0, db->d.used, 0 };
        return;
    }
    if (!db->d.hot_rate && !db->d.log_rate && !db->d.cold_rate) {
        e->kind = SIM_END;
        return;
    }
    while (g_queue_is_empty(db->events)) {
        db_tick(db);
    }
    made = g_queue_pop_head(db->events);
    *e = *made;
}

static void db_free(SimTrace *trace)
{
    Database *db = container_of(trace, Database, common);

    g_queue_free_full(db->events, g_free);
    g_hash_table_unref(db->dirty);
    g_hash_table_unref(db->told);
    if (db->flushing) {
        g_array_unref(db->flushing);
    }
    g_rand_free(db->rand);
    g_free(db);
}

SimTrace *sim_trace_database(const SimDatabase *d)
{
    Database *db = g_new0(Database, 1);

    g_assert_cmpint(d->hot + d->used / 8 + d->cold, <=, d->used);
    db->common = (SimTrace) { d->disk, db_next, db_free };
    db->d = *d;
    db->rand = g_rand_new_with_seed(1);
    db->events = g_queue_new();
    db->dirty = g_hash_table_new(NULL, NULL);
    db->told = g_hash_table_new(NULL, NULL);
    return &db->common;
}

/* ------------------------------------------------------------------ */
/* One after the other                                                 */

typedef struct Sequential {
    SimTrace common;
    int64_t used, rate, written;
    bool said_used;
} Sequential;

static void seq_next(SimTrace *trace, SimEvent *e)
{
    Sequential *s = container_of(trace, Sequential, common);

    if (!s->said_used) {
        s->said_used = true;
        *e = (SimEvent) { 0, SIM_USED, 0, s->used, 0 };
        return;
    }
    *e = (SimEvent) { s->written * 1e6 / s->rate, SIM_WRITE,
                      s->written % s->used, GRAIN, 0 };
    s->written += GRAIN;
}

static void seq_free(SimTrace *trace)
{
    g_free(container_of(trace, Sequential, common));
}

SimTrace *sim_trace_sequential(int64_t disk, int64_t used, int64_t rate)
{
    Sequential *s = g_new0(Sequential, 1);

    s->common = (SimTrace) { disk, seq_next, seq_free };
    s->used = used / GRAIN * GRAIN;
    s->rate = rate;
    return &s->common;
}

/* ------------------------------------------------------------------ */
/* A file                                                              */

typedef struct FileTrace {
    SimTrace common;
    FILE *file;
    char *path;
    int64_t line, last_us;
} FileTrace;

static bool file_parse(FileTrace *f, const char *line, SimEvent *e)
{
    double at = 0, due = 0;
    int n = 0;
    bool good;

    *e = (SimEvent) { 0 };
    switch (line[0]) {
    case 'U':
        good = sscanf(line, "U %" SCNd64 " %" SCNd64 " %n", &e->offset,
                      &e->bytes, &n) == 2;
        e->kind = SIM_USED;
        break;
    case 'H':
        good = sscanf(line, "H %lf %" SCNd64 " %" SCNd64 " %lf %n", &at,
                      &e->offset, &e->bytes, &due, &n) == 4;
        e->kind = SIM_DIRTY;
        break;
    default:
        good = sscanf(line + 1, " %lf %" SCNd64 " %" SCNd64 " %n", &at,
                      &e->offset, &e->bytes, &n) == 3 &&
            (line[0] == 'W' || line[0] == 'D');
        n++;
        e->kind = line[0] == 'W' ? SIM_WRITE : SIM_DISCARD;
        break;
    }
    e->us = at * 1e6;
    e->due_us = due * 1e6;
    return good && !line[n] && at >= 0 && at < 1e9 && e->us >= f->last_us &&
        e->offset >= 0 && e->bytes > 0 && e->offset < f->common.disk &&
        e->bytes <= f->common.disk - e->offset;
}

static void file_next(SimTrace *trace, SimEvent *e)
{
    FileTrace *f = container_of(trace, FileTrace, common);
    char line[256];

    if (!fgets(line, sizeof(line), f->file)) {
        *e = (SimEvent) { .kind = SIM_END };
        return;
    }
    f->line++;
    if (!file_parse(f, line, e)) {
        fprintf(stderr, "%s, line %" PRId64 ": not \"W|D SECONDS OFFSET "
                "BYTES\" within the disk and in order of time: %s", f->path,
                f->line, line);
        exit(1);
    }
    f->last_us = e->us;
}

static void file_free(SimTrace *trace)
{
    FileTrace *f = container_of(trace, FileTrace, common);

    fclose(f->file);
    g_free(f->path);
    g_free(f);
}

SimTrace *sim_trace_file(const char *path, Error **errp)
{
    FileTrace *f = g_new0(FileTrace, 1);
    int64_t disk = 0;

    f->common = (SimTrace) { 0, file_next, file_free };
    f->path = g_strdup(path);
    f->file = fopen(path, "re");
    if (!f->file) {
        error_setg_errno(errp, errno, "Cannot open the trace '%s'", path);
    } else if (fscanf(f->file, "S %" SCNd64 "\n", &disk) != 1 || disk <= 0 ||
               disk > 1LL << 56) {
        error_setg(errp, "The trace '%s' does not begin with the size of the "
                   "disk: S BYTES", path);
        fclose(f->file);
    } else {
        f->common.disk = disk;
        f->line = 1;
        return &f->common;
    }
    g_free(f->path);
    g_free(f);
    return NULL;
}
