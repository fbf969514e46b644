/*
 * thinvm check: is what is recorded what is so?
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Durability layer.  Recounts the references to clusters and to metadata
 * pages (check-walk.c) and compares them with the recorded ones:
 *
 *   recorded lower than counted    corruption: a cluster or page would be
 *                                  given to a second owner
 *   recorded higher than counted   leak: space that nobody uses
 *
 * and looks at the tree of reference counts itself: the numbers of free
 * clusters in its pointers, and that clusters are marked as metadata exactly
 * where metadata extents are.  (Invariant 4 of the design, section 4, says
 * that whatever happened there is nothing to find.)
 *
 * check-repair.c sets counts to what was counted.
 *
 * Also what counts alone cannot tell: that each cluster and each page belongs
 * to one place (a snapshot has it in the same), and that where nothing says
 * that a cluster is shared, it is not.
 *
 * The state must not change meanwhile.  Memory: ten bytes for each cluster in
 * use within a window of the device, and for each metadata page.
 */
#include "qemu/osdep.h"
#include "qapi/qapi-types-block-core.h"
#include "check.h"

static void G_GNUC_PRINTF(2, 0) report(ThinvmCheck *c, const char *fmt,
                                       va_list ap)
{
    g_autofree char *message = NULL;

    if (c->quiet) {
        return;
    }
    if (c->nb_reports++ < THINVM_CHECK_MAX_REPORTS) {
        message = g_strdup_vprintf(fmt, ap);
        c->report(c->opaque, message);
    } else if (c->nb_reports == THINVM_CHECK_MAX_REPORTS + 1) {
        c->report(c->opaque, "further findings are counted, but not shown");
    }
}

void thinvm_check_corruption(ThinvmCheck *c, const char *fmt, ...)
{
    va_list ap;

    c->result->corruptions += !c->quiet;
    va_start(ap, fmt);
    report(c, fmt, ap);
    va_end(ap);
}

void thinvm_check_leak(ThinvmCheck *c, const char *fmt, ...)
{
    va_list ap;

    c->result->leaks += !c->quiet;
    va_start(ap, fmt);
    report(c, fmt, ap);
    va_end(ap);
}

static void add_fix(ThinvmCheck *c, ThinvmCheckFix fix)
{
    if (c->fixes) {
        g_array_append_val(c->fixes, fix);
    }
}

static void fix_count(ThinvmCheck *c, bool page, uint64_t number,
                      uint16_t recorded, uint16_t references)
{
    add_fix(c, (ThinvmCheckFix) {
        .number = number,
        .page = page,
        .leak = recorded > references && recorded != THINVM_COUNT_METADATA,
        .count = references,
    });
}

/* ------------------------------------------------------------------ */
/* Counting                                                            */

static GHashTable *counts_new(void)
{
    return g_hash_table_new_full(g_int64_hash, g_int64_equal, g_free, g_free);
}

uint16_t *thinvm_check_chunk(GHashTable *counts, uint64_t number)
{
    int64_t key = number / THINVM_CHECK_CHUNK;

    return g_hash_table_lookup(counts, &key);
}

uint16_t thinvm_check_count(GHashTable *counts, uint64_t number)
{
    uint16_t *chunk = thinvm_check_chunk(counts, number);
    uint16_t *count;

    if (!chunk) {
        int64_t *key = g_new(int64_t, 1);

        *key = number / THINVM_CHECK_CHUNK;
        chunk = g_new0(uint16_t, THINVM_CHECK_CHUNK);
        g_hash_table_insert(counts, key, chunk);
    }
    count = &chunk[number % THINVM_CHECK_CHUNK];
    /* stays where it is at the limit: far above what may be recorded */
    return *count == UINT16_MAX ? *count : (*count)++;
}

uint64_t thinvm_check_own(GHashTable *owners, uint64_t number, uint64_t place)
{
    int64_t key = number / THINVM_CHECK_CHUNK;
    uint64_t *chunk = g_hash_table_lookup(owners, &key);
    uint64_t *owner;

    if (!chunk) {
        chunk = g_new0(uint64_t, THINVM_CHECK_CHUNK);
        g_hash_table_insert(owners, g_memdup2(&key, sizeof(key)), chunk);
    }
    owner = &chunk[number % THINVM_CHECK_CHUNK];
    if (!*owner) {
        *owner = place;
    }
    return *owner;
}

static uint16_t counted(GHashTable *counts, uint64_t number)
{
    uint16_t *chunk = thinvm_check_chunk(counts, number);

    return chunk ? chunk[number % THINVM_CHECK_CHUNK] : 0;
}

int coroutine_fn thinvm_check_recorded(ThinvmCheck *c, uint64_t cluster,
                                       uint16_t *count)
{
    ThinvmNeeds needs;
    int ret;

    thinvm_needs_init(&needs);
    do {
        thinvm_state_lock(c->s);
        ret = thinvm_state_cluster_count(c->s, cluster, count, &needs);
        thinvm_state_unlock(c->s);
        if (ret != -EAGAIN) {
            break;
        }
        ret = thinvm_store_read_wanted(c->st, c->s, &needs, NULL);
    } while (ret == 0);

    thinvm_state_lock(c->s);
    thinvm_needs_destroy(c->s, &needs);
    thinvm_state_unlock(c->s);
    return ret;
}

/* ------------------------------------------------------------------ */
/* Pages                                                               */

typedef struct BadItem {
    ThinvmCheck *c;
    const ThinvmPageRef *ref;
    const char *what;
} BadItem;

static void report_bad_item(void *opaque, unsigned index, const char *why)
{
    BadItem *bad = opaque;
    ThinvmCheck *c = bad->c;
    const ThinvmPageRef *ref = bad->ref;
    g_autofree char *place = NULL;

    if (ref->kind == THINVM_PAGE_MAP_LEAF) {
        place = g_strdup_printf("%s, guest offset 0x%" PRIx64, c->tree,
                                (c->guest + index) << c->info.cluster_bits);
    } else if (ref->kind == THINVM_PAGE_MAP_INNER) {
        uint64_t span = (uint64_t)THINVM_ENTRIES_PER_LEAF <<
                        (8 * (ref->level - 1));

        place = thinvm_check_guest_range(c, c->guest + index * span,
                                         ref->level - 1);
    }
    if (c->rewriting) {
        thinvm_check_lost(c, place ?: bad->what, place != NULL);
    } else if (c->first_walk) {
        thinvm_check_corruption(c, "%s: %s", place ?: bad->what, why);
    }
}

/* Its checksum may be right, and only some of what is in it wrong */
static int coroutine_fn read_in_part(ThinvmCheck *c, const ThinvmPageRef *ref,
                                     void *buf, const char *what)
{
    BadItem bad = { .c = c, .ref = ref, .what = what };
    int ret = thinvm_store_pread(c->st, ref->page * THINVM_PAGE_SIZE,
                                 THINVM_PAGE_SIZE, buf,
                                 BLKDBG_THINVM_PAGE_READ);

    if (ret == 0) {
        thinvm_state_lock(c->s);
        ret = thinvm_repair_salvage(c->s, ref, buf, report_bad_item, &bad);
        thinvm_state_unlock(c->s);
    }
    return ret;
}

int coroutine_fn thinvm_check_read_page(ThinvmCheck *c,
                                        const ThinvmPageRef *ref, void *buf,
                                        const char *what)
{
    Error *err = NULL;
    ThinvmNeeds needs;
    int ret;

    thinvm_needs_init(&needs);
    do {
        thinvm_state_lock(c->s);
        ret = thinvm_state_read_page(c->s, ref, buf, &needs);
        thinvm_state_unlock(c->s);
        if (ret != -EAGAIN) {
            break;
        }
        ret = thinvm_store_read_wanted(c->st, c->s, &needs, &err);
    } while (ret == 0);

    thinvm_state_lock(c->s);
    thinvm_needs_destroy(c->s, &needs);
    thinvm_state_unlock(c->s);

    /* What hangs on an item that is wrong is not counted either */
    c->incomplete |= ret < 0;
    if (ret == -EBADMSG) {
        c->damaged = true;
        if (read_in_part(c, ref, buf, what) == 0) {
            error_free(err);
            return 1;
        }
    }
    if (ret < 0 && c->first_walk) {
        const char *why = err ? error_get_pretty(err) :
            ret == -EBADMSG ? "it is of another kind elsewhere" :
            g_strerror(-ret);

        if (ret == -EBADMSG) {
            thinvm_check_corruption(c, "%s: metadata page %" PRIu64 ": %s",
                                    what, ref->page, why);
        } else {
            c->result->check_errors += !c->quiet;
            if (!c->quiet) {
                g_autofree char *message = g_strdup_printf("%s: %s", what,
                                                           why);
                c->report(c->opaque, message);
            }
        }
    }
    error_free(err);
    return ret;
}

static int recorded_page(ThinvmCheck *c, uint64_t page, uint16_t *count)
{
    int ret;

    thinvm_state_lock(c->s);
    ret = thinvm_state_page_count(c->s, page, count);
    thinvm_state_unlock(c->s);
    return ret;
}

bool thinvm_check_enter_page(ThinvmCheck *c, const ThinvmPointer *ptr,
                             uint64_t place, const char *what)
{
    uint64_t first;
    uint16_t recorded;

    if (recorded_page(c, ptr->address, &recorded) < 0) {
        c->incomplete = true;
        if (c->first_walk) {
            thinvm_check_corruption(c, "%s: pointer to page %" PRIu64 ", which "
                                    "is not in any metadata extent", what,
                                    ptr->address);
        }
        return false;
    }
    if (!recorded) {
        /* It can be read, and is not given away, only if it is in use */
        if (c->first_walk) {
            thinvm_check_corruption(c, "%s: metadata page %" PRIu64 " is in "
                                    "use, but its reference count is 0", what,
                                    ptr->address);
        }
        thinvm_state_lock(c->s);
        thinvm_repair_page_count(c->s, ptr->address, 1);
        thinvm_state_unlock(c->s);
        add_fix(c, (ThinvmCheckFix) {
            .page = true, .number = ptr->address, .count = 1,
        });
    }
    first = thinvm_check_own(c->places, ptr->address, place);
    if (first != place) {
        c->damaged = true;
        if (c->first_walk) {
            thinvm_check_corruption(c, "%s: metadata page %" PRIu64 " is used "
                                    "in another place, too", what,
                                    ptr->address);
        }
    }
    return thinvm_check_count(c->pages, ptr->address) == 0;
}

static void compare_page(ThinvmCheck *c, uint64_t page)
{
    uint16_t recorded, references = counted(c->pages, page);

    if (recorded_page(c, page, &recorded) < 0 || recorded == references) {
        return;
    }
    fix_count(c, true, page, recorded, references);
    if (recorded < references) {
        thinvm_check_corruption(c, "metadata page %" PRIu64 " has %u users, "
                                "but its reference count is %u", page,
                                references, recorded);
    } else {
        thinvm_check_leak(c, "metadata page %" PRIu64 " has reference count "
                          "%u, but %u users", page, recorded, references);
    }
}

static void compare_all_pages(ThinvmCheck *c)
{
    unsigned bits = c->info.cluster_bits - THINVM_PAGE_BITS;

    for (unsigned i = 0; i < c->extents->len; i++) {
        ThinvmFreedRange *e = &g_array_index(c->extents, ThinvmFreedRange, i);

        for (uint64_t n = 0; n < e->nb_clusters << bits; n++) {
            compare_page(c, (e->first << bits) + n);
        }
    }
}

/* A cluster that is marked as metadata */
static void compare_metadata(ThinvmCheck *c, uint64_t cluster)
{
    unsigned bits = c->info.cluster_bits - THINVM_PAGE_BITS;
    uint16_t recorded;

    if (recorded_page(c, cluster << bits, &recorded) < 0) {
        thinvm_check_corruption(c, "cluster %" PRIu64 " is marked as metadata, "
                                "but is in no metadata extent", cluster);
        fix_count(c, false, cluster, THINVM_COUNT_METADATA,
                  counted(c->clusters, cluster));
    }
}

/* ------------------------------------------------------------------ */
/* Clusters                                                            */

static void compare_cluster(ThinvmCheck *c, uint64_t cluster,
                            uint16_t recorded)
{
    uint16_t references = counted(c->clusters, cluster);

    if (recorded) {
        c->result->image_end_offset = MAX(c->result->image_end_offset,
                                          (cluster + 1) <<
                                          c->info.cluster_bits);
    }
    if (cluster < c->info.first_cluster) {
        if (recorded != THINVM_COUNT_METADATA) {
            thinvm_check_corruption(c, "cluster %" PRIu64 " belongs to the "
                                    "header, but its reference count is %u",
                                    cluster, recorded);
            add_fix(c, (ThinvmCheckFix) {
                .number = cluster, .count = THINVM_COUNT_METADATA,
            });
        }
    } else if (recorded == THINVM_COUNT_METADATA) {
        compare_metadata(c, cluster);
    } else if (recorded > references) {
        thinvm_check_leak(c, "cluster %" PRIu64 " (device offset 0x%" PRIx64
                          ") has reference count %u, but %u users", cluster,
                          cluster << c->info.cluster_bits, recorded,
                          references);
        fix_count(c, false, cluster, recorded, references);
    } else if (recorded < references) {
        /* was reported where the cluster is used */
        fix_count(c, false, cluster, recorded, references);
    }
}

/* A range of clusters that all have this count */
static void compare_uniform(ThinvmCheck *c, uint64_t first, uint64_t end,
                            uint16_t recorded)
{
    uint64_t next;

    first = MAX(first, c->window_start);
    end = MIN(end, c->window_end);
    for (; first < end; first = next) {
        next = MIN(end, QEMU_ALIGN_DOWN(first, THINVM_CHECK_CHUNK) +
                        THINVM_CHECK_CHUNK);
        if (!recorded && first >= c->info.first_cluster &&
            !thinvm_check_chunk(c->clusters, first)) {
            continue;
        }
        for (uint64_t i = first; i < next; i++) {
            compare_cluster(c, i, recorded);
        }
    }
}

static uint64_t count_span(int level)
{
    return (uint64_t)THINVM_COUNTS_PER_LEAF << (8 * level);
}

static uint64_t compare_leaf(ThinvmCheck *c, uint64_t first, uint64_t end,
                             const uint16_t *counts)
{
    uint64_t nb_free = 0;

    for (uint64_t i = 0; i < end - first; i++) {
        uint16_t recorded = le16_to_cpu(counts[i]);

        nb_free += recorded == 0;
        if (first + i >= c->window_start && first + i < c->window_end) {
            compare_cluster(c, first + i, recorded);
        }
    }
    return nb_free;
}

/* Returns the number of free clusters below, or UINT64_MAX if not known */
static uint64_t coroutine_fn compare_counts(ThinvmCheck *c,
                                            const ThinvmPointer *ptr,
                                            int level, uint64_t first)
{
    g_autofree uint8_t *buf = NULL;
    uint64_t end = MIN(first + count_span(level), c->info.device_clusters);
    uint64_t nb_free = 0;
    ThinvmPageRef ref = {
        .page = ptr->address,
        .crc = ptr->crc,
        .kind = level ? THINVM_PAGE_COUNT_INNER : THINVM_PAGE_COUNT_LEAF,
        .level = level,
    };

    if (first >= end) {
        return 0;
    }
    if (ptr->type != THINVM_PTR_PAGE) {
        uint16_t recorded = ptr->type == THINVM_PTR_NONE ? 0 : ptr->address;

        compare_uniform(c, first, end, recorded);
        return recorded ? 0 : end - first;
    }
    buf = g_malloc(THINVM_PAGE_SIZE);
    if (thinvm_check_read_page(c, &ref, buf, "reference counts") < 0) {
        return UINT64_MAX;
    }
    if (level == 0) {
        return compare_leaf(c, first, end, (uint16_t *)buf);
    }

    for (unsigned i = 0; i < THINVM_POINTERS_PER_PAGE; i++) {
        ThinvmPointer child;
        uint64_t start = first + i * count_span(level - 1);
        uint64_t below;

        thinvm_pointer_decode(&child, (ThinvmPointerLe *)buf + i);
        below = compare_counts(c, &child, level - 1, start);
        if (below == UINT64_MAX || nb_free == UINT64_MAX) {
            nb_free = UINT64_MAX;
            continue;
        }
        nb_free += below;
        if (c->first_walk && child.type == THINVM_PTR_PAGE &&
            child.extra != below) {
            thinvm_check_corruption(c, "reference counts: the pointer to "
                                    "those of clusters from %" PRIu64 " on "
                                    "tells of %u free ones, but %" PRIu64
                                    " are", start, child.extra, below);
            add_fix(c, (ThinvmCheckFix) { .number = start, .own = true });
        }
    }
    return nb_free;
}

/* The pages of the tree of counts name each other, too */
static void coroutine_fn count_count_pages(ThinvmCheck *c,
                                           const ThinvmPointer *ptr, int level,
                                           uint64_t first)
{
    g_autofree uint8_t *buf = NULL;
    ThinvmPageRef ref = {
        .page = ptr->address,
        .crc = ptr->crc,
        .kind = THINVM_PAGE_COUNT_INNER,
        .level = level,
    };

    if (ptr->type != THINVM_PTR_PAGE ||
        !thinvm_check_enter_page(c, ptr,
                                 thinvm_check_place(THINVM_CHECK_COUNTS, level,
                                                    first),
                                 "reference counts") || !level) {
        return;
    }
    buf = g_malloc(THINVM_PAGE_SIZE);
    if (thinvm_check_read_page(c, &ref, buf, "reference counts") < 0) {
        return;
    }
    for (unsigned i = 0; i < THINVM_POINTERS_PER_PAGE; i++) {
        ThinvmPointer child;

        thinvm_pointer_decode(&child, (ThinvmPointerLe *)buf + i);
        count_count_pages(c, &child, level - 1,
                          first + i * count_span(level - 1));
    }
}

/* Extents that are not marked as such would be given away as data */
static void coroutine_fn compare_extents(ThinvmCheck *c)
{
    uint16_t recorded;

    for (unsigned i = 0; i < c->extents->len; i++) {
        ThinvmFreedRange *e = &g_array_index(c->extents, ThinvmFreedRange, i);

        for (uint64_t n = e->first; n < e->first + e->nb_clusters; n++) {
            if (thinvm_check_recorded(c, n, &recorded) == 0 &&
                recorded != THINVM_COUNT_METADATA) {
                thinvm_check_corruption(c, "cluster %" PRIu64 " is in metadata "
                                        "extent %u, but has reference count "
                                        "%u", n, i, recorded);
                add_fix(c, (ThinvmCheckFix) {
                    .number = n,
                    .count = THINVM_COUNT_METADATA,
                });
            }
        }
    }
}

/* ------------------------------------------------------------------ */

static void coroutine_fn check_window(ThinvmCheck *c)
{
    ThinvmPointer map, vmstate, count, snapshot, backing;

    c->clusters = counts_new();
    c->pages = counts_new();
    c->owners = counts_new();
    c->places = counts_new();
    thinvm_state_lock(c->s);
    thinvm_state_roots(c->s, &map, &vmstate, &count, &snapshot, &backing);
    thinvm_state_unlock(c->s);

    thinvm_check_walk(c);
    count_count_pages(c, &count, THINVM_INNER_LEVELS, 0);
    compare_counts(c, &count, THINVM_INNER_LEVELS, 0);
    if (c->first_walk) {
        compare_all_pages(c);
    }
    g_hash_table_unref(c->clusters);
    g_hash_table_unref(c->pages);
    g_hash_table_unref(c->owners);
    g_hash_table_unref(c->places);
}

/* Places that are kept for the leaves of unwritten runs: one for each */
static void compare_promises(ThinvmCheck *c)
{
    uint64_t promised = c->info.promised_pages;

    if (!c->info.promises_exact || c->incomplete) {
        return;
    }
    c->promises_wrong = promised != c->unwritten_runs;
    if (promised > c->unwritten_runs) {
        thinvm_check_leak(c, "%" PRIu64 " metadata pages are promised to "
                          "unwritten runs, but there are %" PRIu64 " of these",
                          promised, c->unwritten_runs);
    } else if (c->promises_wrong) {
        thinvm_check_corruption(c, "%" PRIu64 " metadata pages are promised "
                                "to unwritten runs, but there are %" PRIu64
                                " of these", promised, c->unwritten_runs);
    }
}

void coroutine_fn thinvm_check_all(ThinvmCheck *c)
{
    ThinvmFreedRange extent;

    c->s = thinvm_store_state(c->st);
    thinvm_state_lock(c->s);
    thinvm_state_info(c->s, &c->info);
    c->has_backing = thinvm_state_backing(c->s)->name[0];
    thinvm_state_unlock(c->s);
    c->extents = g_array_new(false, false, sizeof(ThinvmFreedRange));
    thinvm_state_lock(c->s);
    while (thinvm_state_extent(c->s, c->extents->len, &extent)) {
        g_array_append_val(c->extents, extent);
    }
    thinvm_state_unlock(c->s);
    if (c->fixes) {
        g_array_set_size(c->fixes, 0);
    }
    g_hash_table_remove_all(c->duplicates);
    c->more_duplicates = false;
    c->incomplete = c->damaged = false;
    c->nb_unflagged = c->unwritten_runs = 0;
    c->promises_wrong = false;
    c->window_start = 0;
    c->first_walk = true;
    do {
        c->window_end = MIN(c->window_start + THINVM_CHECK_WINDOW,
                            c->info.device_clusters);
        check_window(c);
        c->window_start = c->window_end;
        c->first_walk = false;
    } while (c->window_start < c->info.device_clusters);
    compare_promises(c);
    compare_extents(c);
    g_array_unref(c->extents);
}

/*
 * What is read anew, should it be necessary to fall back to the older base, is
 * what the device has: so bring everything there before.
 */
static int coroutine_fn repair(ThinvmCheck *c, int fix, Error **errp)
{
    int ret = thinvm_store_commit(c->st, THINVM_COMMIT_DURABLE, true);

    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not write to the journal; nothing "
                         "was repaired");
        qemu_co_mutex_unlock(&c->st->checkpoint_lock);
        return ret;
    }
    return thinvm_check_repair(c, fix, errp);
}

/*
 * A checkpoint that was interrupted, or has failed, has put the space map at
 * other places, which the counts in memory tell of, and the device does not.
 */
static int coroutine_fn finish_checkpoint(ThinvmStore *st, Error **errp)
{
    int ret = qatomic_read(&st->frozen) ? thinvm_store_checkpoint(st) : 0;

    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not finish the checkpoint that "
                         "was begun before; nothing was checked");
    }
    return ret;
}

int coroutine_fn thinvm_store_check(ThinvmStore *st, int fix,
                                    void (*report_fn)(void *opaque,
                                                      const char *message),
                                    void *opaque, ThinvmCheckResult *result,
                                    Error **errp)
{
    ThinvmCheck c = {
        .st = st,
        .report = report_fn,
        .opaque = opaque,
        .result = result,
    };
    unsigned token;
    int ret;

    *result = (ThinvmCheckResult) { };
    ret = finish_checkpoint(st, errp);
    if (ret < 0) {
        return ret;
    }
    c.duplicates = g_hash_table_new_full(g_int64_hash, g_int64_equal, g_free,
                                         NULL);
    if (fix) {
        c.fixes = g_array_new(false, false, sizeof(ThinvmCheckFix));
        /*
         * No checkpoint before the counts are right: it would put pages where
         * a wrong count says that there is room.
         */
        qemu_co_mutex_lock(&st->checkpoint_lock);
    }
    token = thinvm_store_request_begin(st);
    thinvm_check_all(&c);
    result->total_clusters = DIV_ROUND_UP(c.info.virtual_size,
                                          1ULL << c.info.cluster_bits);
    thinvm_store_request_end(st, token);
    if (fix) {
        ret = repair(&c, fix, errp);
        g_array_unref(c.fixes);
    }
    g_hash_table_unref(c.duplicates);
    return ret;
}
