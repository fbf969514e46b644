/*
 * thinvm template store: the files on one disk of this node
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See store.h, and T1 in template.h.  Whoever may write below a disk's path
 * may put anything there: links are not followed, files are regular ones, and
 * their contents are checked before they are believed.
 *
 * A copy is in use while a QEMU has it open: the file driver then holds locks
 * on the bytes that it uses for permissions, which can be seen from here.
 */

#include "qemu/osdep.h"
#include <sys/file.h>
#include "qapi/error.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "store.h"

#define IDENTITY_FILE       "thinvm-store"
#define IDENTITY_MAX        256
#define LOCK_FILE           "lock"
#define TMP_DIR             "tmp"
#define DATA_SUFFIX         ".raw"
#define CHUNKS_SUFFIX       ".chunks"
#define FILE_PREFIX         "sha256-"
#define HEX_DIGITS          (2 * TEMPLATE_DIGEST_SIZE)

/* Parts that could be resumed, but that nobody came back for */
#define PART_AGE_MAX        (7 * 24 * 3600)

/* Where the file driver has its locks */
#define QEMU_LOCKS_START    100
#define QEMU_LOCKS_BYTES    200

/* ------------------------------------------------------------------ */
/* Small things                                                        */

char *template_file_name(const TemplateDigest *digest, const char *suffix)
{
    char text[TEMPLATE_DIGEST_TEXT];

    template_digest_format(digest, text);
    return g_strconcat(FILE_PREFIX, strchr(text, ':') + 1, suffix, NULL);
}

bool template_pread(int fd, void *buf, size_t bytes, uint64_t offset)
{
    for (size_t done = 0; done < bytes; ) {
        ssize_t n = RETRY_ON_EINTR(pread(fd, buf + done, bytes - done,
                                         offset + done));

        if (n <= 0) {
            errno = n ? errno : EIO;
            return false;
        }
        done += n;
    }
    return true;
}

bool template_pwrite(int fd, const void *buf, size_t bytes, uint64_t offset)
{
    for (size_t done = 0; done < bytes; ) {
        ssize_t n = RETRY_ON_EINTR(pwrite(fd, buf + done, bytes - done,
                                          offset + done));

        if (n < 0) {
            return false;
        }
        done += n;
    }
    return true;
}

static int open_regular(int dir, const char *name, int flags, Error **errp)
{
    int fd = RETRY_ON_EINTR(openat(dir, name, flags | O_NOFOLLOW | O_NONBLOCK |
                                   O_CLOEXEC));
    struct stat st;

    if (fd < 0) {
        error_setg_errno(errp, errno, "cannot open '%s'", name);
        return -1;
    }
    if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode)) {
        error_setg(errp, "'%s' is no regular file", name);
        close(fd);
        errno = EINVAL;
        return -1;
    }
    return fd;
}

char *template_store_path(const TemplateStore *s, const TemplateDigest *digest)
{
    g_autofree char *name = template_file_name(digest, DATA_SUFFIX);

    return g_build_filename(s->disk->path, name, NULL);
}

char *template_store_chunks_path(const TemplateStore *s,
                                 const TemplateDigest *digest)
{
    g_autofree char *name = template_file_name(digest, CHUNKS_SUFFIX);

    return g_build_filename(s->disk->path, name, NULL);
}

/* ------------------------------------------------------------------ */
/* Which disk is this?                                                 */

static char *identity_of(const ClusterDisk *disk)
{
    return g_strdup_printf("thinvm template store 1\ndisk %s\n", disk->name);
}

static bool identity_check(int dir, const ClusterDisk *disk, Error **errp)
{
    g_autofree char *expected = identity_of(disk);
    char found[IDENTITY_MAX + 1];
    int fd = open_regular(dir, IDENTITY_FILE, O_RDONLY, NULL);
    ssize_t n;

    if (fd < 0) {
        error_setg(errp, "Disk '%s': '%s' is no template store: is the disk "
                   "mounted? ('thinvm-template init' makes a new store)",
                   disk->name, disk->path);
        return false;
    }
    n = RETRY_ON_EINTR(read(fd, found, IDENTITY_MAX));
    close(fd);
    found[MAX(n, 0)] = '\0';
    if (strcmp(found, expected)) {
        error_setg(errp, "Disk '%s': '%s/" IDENTITY_FILE "' is of another "
                   "disk, or of another version, or damaged; for this one it "
                   "would say 'thinvm template store 1', 'disk %s'",
                   disk->name, disk->path, disk->name);
        return false;
    }
    return true;
}

static int open_directory(const ClusterDisk *disk, Error **errp)
{
    int dir = open(disk->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

    if (dir < 0) {
        error_setg_errno(errp, errno, "Disk '%s': cannot open directory '%s'",
                         disk->name, disk->path);
    }
    return dir;
}

static bool write_identity(int dir, const ClusterDisk *disk, Error **errp)
{
    g_autofree char *text = identity_of(disk);
    int fd = openat(dir, IDENTITY_FILE ".new",
                    O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC,
                    0644);
    bool ok;

    ok = fd >= 0 && template_pwrite(fd, text, strlen(text), 0) &&
         fsync(fd) == 0 &&
         renameat(dir, IDENTITY_FILE ".new", dir, IDENTITY_FILE) == 0 &&
         fsync(dir) == 0;
    if (!ok) {
        error_setg_errno(errp, errno, "Disk '%s': cannot write '%s/"
                         IDENTITY_FILE "'", disk->name, disk->path);
    }
    if (fd >= 0) {
        close(fd);
    }
    return ok;
}

bool template_store_init(const ClusterDisk *disk, Error **errp)
{
    int dir = open_directory(disk, errp);
    bool ok;

    if (dir < 0) {
        return false;
    }
    if (faccessat(dir, IDENTITY_FILE, F_OK, AT_SYMLINK_NOFOLLOW) == 0) {
        ok = identity_check(dir, disk, errp);
    } else {
        ok = write_identity(dir, disk, errp);
    }
    close(dir);
    return ok;
}

TemplateStore *template_store_open(const ClusterDisk *disk, Error **errp)
{
    TemplateStore *s;
    int dir = open_directory(disk, errp);

    if (dir < 0) {
        return NULL;
    }
    s = g_new0(TemplateStore, 1);
    *s = (TemplateStore) { .disk = disk, .dir = dir, .tmp = -1, .lock = -1 };
    if (!identity_check(dir, disk, errp)) {
        template_store_close(s);
        return NULL;
    }
    /* Neither can be made by who may only read, and who does not need them */
    mkdirat(dir, TMP_DIR, 0700);
    s->tmp = openat(dir, TMP_DIR,
                    O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    s->lock = openat(dir, LOCK_FILE, O_RDWR | O_CREAT | O_NOFOLLOW | O_NONBLOCK
                     | O_CLOEXEC, 0600);
    return s;
}

void template_store_close(TemplateStore *s)
{
    if (s) {
        close(s->dir);
        if (s->tmp >= 0) {
            close(s->tmp);
        }
        if (s->lock >= 0) {
            close(s->lock);
        }
        g_free(s);
    }
}

bool template_store_lock(TemplateStore *s, Error **errp)
{
    if (s->tmp < 0 || s->lock < 0) {
        error_setg(errp, "Disk '%s': cannot write to '%s/" TMP_DIR "' and '%s/"
                   LOCK_FILE "'", s->disk->name, s->disk->path, s->disk->path);
        return false;
    }
    if (RETRY_ON_EINTR(flock(s->lock, LOCK_EX)) < 0) {
        error_setg_errno(errp, errno, "Disk '%s': cannot lock '%s/" LOCK_FILE
                         "'", s->disk->name, s->disk->path);
        return false;
    }
    return true;
}

void template_store_unlock(TemplateStore *s)
{
    flock(s->lock, LOCK_UN);
}

/* ------------------------------------------------------------------ */
/* What is there?                                                      */

/* sha256-DIGITS.SUFFIX; the suffix, or NULL */
static const char *parse_file_name(const char *name, TemplateDigest *digest)
{
    char hex[HEX_DIGITS + 1];

    if (!strstart(name, FILE_PREFIX, &name) || strlen(name) <= HEX_DIGITS ||
        name[HEX_DIGITS] != '.') {
        return NULL;
    }
    pstrcpy(hex, sizeof(hex), name);
    return template_digest_parse(hex, digest, NULL) ? name + HEX_DIGITS : NULL;
}

static bool exists(TemplateStore *s, const TemplateDigest *digest,
                   const char *suffix, struct stat *st)
{
    g_autofree char *name = template_file_name(digest, suffix);

    return fstatat(s->dir, name, st, AT_SYMLINK_NOFOLLOW) == 0 &&
           S_ISREG(st->st_mode);
}

bool template_store_find(TemplateStore *s, const TemplateDigest *digest,
                         TemplateEntry *entry)
{
    struct stat st;

    *entry = (TemplateEntry) { .digest = *digest };
    entry->removed = exists(s, digest, TEMPLATE_REMOVED, &st);
    entry->leaving = exists(s, digest, TEMPLATE_LEAVING, &st);
    entry->chunks = exists(s, digest, CHUNKS_SUFFIX, &st);
    if (exists(s, digest, DATA_SUFFIX, &st)) {
        entry->data = true;
        entry->size = st.st_size;
        entry->allocated = (uint64_t)st.st_blocks * 512;
    }
    return entry->removed || entry->leaving || entry->chunks || entry->data;
}

bool template_store_look(TemplateStore *s, const TemplateDigest *digest,
                         TemplateEntry *entry)
{
    bool locked = template_store_lock(s, NULL);
    bool known = template_store_find(s, digest, entry);

    if (locked) {
        template_store_unlock(s);
    }
    return known;
}

static int compare_entries(gconstpointer a, gconstpointer b)
{
    return memcmp(a, b, TEMPLATE_DIGEST_SIZE);
}

QEMU_BUILD_BUG_ON(offsetof(TemplateEntry, digest) != 0);

/* A stream of its own for each call: one position would be shared */
static DIR *open_stream(TemplateStore *s, int at, Error **errp)
{
    int fd = openat(at, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *stream = fd < 0 ? NULL : fdopendir(fd);

    if (!stream) {
        error_setg_errno(errp, errno, "Disk '%s': cannot read directory '%s'",
                         s->disk->name, s->disk->path);
        if (fd >= 0) {
            close(fd);
        }
    }
    return stream;
}

GArray *template_store_scan(TemplateStore *s, Error **errp)
{
    GArray *entries = g_array_new(false, false, sizeof(TemplateEntry));
    DIR *stream = open_stream(s, s->dir, errp);
    struct dirent *d;

    if (!stream) {
        g_array_unref(entries);
        return NULL;
    }
    while ((d = readdir(stream))) {
        TemplateEntry entry;
        TemplateDigest digest;
        const char *suffix = parse_file_name(d->d_name, &digest);

        /* Each once: by the first of its files, in this order */
        if (suffix && template_store_find(s, &digest, &entry) &&
            !strcmp(suffix, entry.data ? DATA_SUFFIX :
                            entry.removed ? TEMPLATE_REMOVED :
                            entry.chunks ? CHUNKS_SUFFIX : TEMPLATE_LEAVING)) {
            g_array_append_val(entries, entry);
        }
    }
    closedir(stream);
    g_array_sort(entries, compare_entries);
    return entries;
}

int template_store_open_data(TemplateStore *s, const TemplateDigest *digest,
                             bool writable, Error **errp)
{
    ERRP_GUARD();
    g_autofree char *name = template_file_name(digest, DATA_SUFFIX);
    int readonly = open_regular(s->dir, name, O_RDONLY, errp);
    int fd = readonly;

    if (writable && readonly >= 0) {
        /* Copies cannot be written by mistake: only in this moment */
        if (fchmod(readonly, 0644) < 0) {
            error_setg_errno(errp, errno, "cannot make '%s' writable", name);
            fd = -1;
        } else {
            fd = open_regular(s->dir, name, O_RDWR, errp);
            (void)!fchmod(readonly, 0444);
        }
        close(readonly);
    }
    if (fd < 0) {
        error_prepend(errp, "Disk '%s': ", s->disk->name);
    }
    return fd;
}

static TemplateChunks *read_chunks(int fd, const TemplateDigest *digest,
                                   Error **errp)
{
    g_autofree uint8_t *header = g_malloc(TEMPLATE_CHUNKS_HEADER);
    g_autofree uint8_t *hashes = NULL;
    g_autoptr(TemplateChunks) c = NULL;
    struct stat st;

    if (fstat(fd, &st) < 0 || st.st_size < TEMPLATE_CHUNKS_HEADER ||
        !template_pread(fd, header, TEMPLATE_CHUNKS_HEADER, 0)) {
        error_setg(errp, "its header cannot be read");
        return NULL;
    }
    c = template_chunks_decode_header(header, errp);
    if (!c) {
        return NULL;
    }
    if (!template_digest_equal(&c->digest, digest)) {
        error_setg(errp, "it is of another template");
        return NULL;
    }
    if (st.st_size != template_chunks_file_size(c)) {
        error_setg(errp, "it has %" PRId64 " bytes, and its header says %"
                   PRIu64, (int64_t)st.st_size, template_chunks_file_size(c));
        return NULL;
    }
    hashes = g_malloc(st.st_size - TEMPLATE_CHUNKS_HEADER);
    if (!template_pread(fd, hashes, st.st_size - TEMPLATE_CHUNKS_HEADER,
                        TEMPLATE_CHUNKS_HEADER)) {
        error_setg_errno(errp, errno, "it cannot be read");
        return NULL;
    }
    return template_chunks_decode_hashes(c, header, hashes, errp)
           ? g_steal_pointer(&c) : NULL;
}

TemplateChunks *template_store_read_chunks(TemplateStore *s,
                                           const TemplateDigest *digest,
                                           Error **errp)
{
    ERRP_GUARD();
    g_autofree char *name = template_file_name(digest, CHUNKS_SUFFIX);
    int fd = open_regular(s->dir, name, O_RDONLY, errp);
    TemplateChunks *c;

    if (fd < 0) {
        error_prepend(errp, "Disk '%s': ", s->disk->name);
        return NULL;
    }
    c = read_chunks(fd, digest, errp);
    close(fd);
    if (!c) {
        error_prepend(errp, "Disk '%s': '%s' is damaged: ", s->disk->name,
                      name);
    }
    return c;
}

/* ------------------------------------------------------------------ */
/* Changing                                                            */

bool template_store_write_chunks(TemplateStore *s, const TemplateChunks *c,
                                 Error **errp)
{
    g_autofree char *name = template_file_name(&c->digest, CHUNKS_SUFFIX);
    g_autofree char *tmp = NULL;
    bool ok;

    if (!template_store_lock(s, errp)) {
        return false;
    }
    ok = template_write_chunks_tmp(s, c, &tmp, errp);
    if (ok && (renameat(s->tmp, tmp, s->dir, name) < 0 || fsync(s->dir) < 0)) {
        error_setg_errno(errp, errno, "Disk '%s': cannot replace '%s'",
                         s->disk->name, name);
        ok = false;
    }
    template_store_unlock(s);
    return ok;
}

bool template_store_in_use(TemplateStore *s, const TemplateDigest *digest)
{
    int fd = template_store_open_data(s, digest, false, NULL);
    bool used;

    if (fd < 0) {
        return false;
    }
    used = qemu_lock_fd_test(fd, QEMU_LOCKS_START, QEMU_LOCKS_BYTES,
                             true) < 0;
    close(fd);
    return used;
}

bool template_store_mark(TemplateStore *s, const TemplateDigest *digest,
                         const char *mark, Error **errp)
{
    g_autofree char *name = template_file_name(digest, mark);
    int fd = openat(s->dir, name, O_WRONLY | O_CREAT | O_NOFOLLOW | O_CLOEXEC,
                    0444);

    /* A mark that is there already may be one that cannot be written */
    if ((fd < 0 && errno != EACCES) || fsync(s->dir) < 0) {
        error_setg_errno(errp, errno, "Disk '%s': cannot create '%s'",
                         s->disk->name, name);
        return false;
    }
    if (fd >= 0) {
        close(fd);
    }
    return true;
}

static bool remove_file(TemplateStore *s, const TemplateDigest *digest,
                        const char *suffix, Error **errp)
{
    g_autofree char *name = template_file_name(digest, suffix);

    if (unlinkat(s->dir, name, 0) < 0 && errno != ENOENT) {
        error_setg_errno(errp, errno, "Disk '%s': cannot remove '%s'",
                         s->disk->name, name);
        return false;
    }
    return true;
}

bool template_store_unmark(TemplateStore *s, const TemplateDigest *digest,
                           const char *mark, Error **errp)
{
    return remove_file(s, digest, mark, errp);
}

/* With the store locked; in this order: T1 */
static bool remove_copy(TemplateStore *s, const TemplateDigest *digest,
                        Error **errp)
{
    return remove_file(s, digest, DATA_SUFFIX, errp) &&
           remove_file(s, digest, CHUNKS_SUFFIX, errp) &&
           remove_file(s, digest, TEMPLATE_LEAVING, errp);
}

bool template_store_drop(TemplateStore *s, const TemplateDigest *digest,
                         bool *gone, Error **errp)
{
    bool ok;

    *gone = false;
    if (!template_store_lock(s, errp)) {
        return false;
    }
    ok = true;
    if (!template_store_in_use(s, digest)) {
        ok = remove_copy(s, digest, errp);
        fsync(s->dir);
        *gone = ok;
    }
    template_store_unlock(s);
    return ok;
}

/* ------------------------------------------------------------------ */
/* Sweeping                                                            */

/* Nobody holds it, and it is not one to go on with */
static bool part_is_dead(TemplateStore *s, const char *name)
{
    int fd = open_regular(s->tmp, name, O_RDONLY, NULL);
    struct stat st;
    bool dead;

    if (fd < 0) {
        return false;
    }
    dead = flock(fd, LOCK_EX | LOCK_NB) == 0 && fstat(fd, &st) == 0 &&
           (!strstart(name, FILE_PREFIX, NULL) ||
            st.st_mtime + PART_AGE_MAX < time(NULL));
    if (dead) {
        unlinkat(s->tmp, name, 0);
    }
    close(fd);
    return dead;
}

static void sweep_parts(TemplateStore *s)
{
    DIR *stream = open_stream(s, s->tmp, NULL);
    struct dirent *d;

    while (stream && (d = readdir(stream))) {
        if (d->d_name[0] != '.') {
            part_is_dead(s, d->d_name);
        }
    }
    if (stream) {
        closedir(stream);
    }
}

void template_store_sweep(TemplateStore *s)
{
    g_autoptr(GArray) entries = NULL;

    if (!template_store_lock(s, NULL)) {
        return;
    }
    sweep_parts(s);
    entries = template_store_scan(s, NULL);
    for (unsigned i = 0; entries && i < entries->len; i++) {
        TemplateEntry *e = &g_array_index(entries, TemplateEntry, i);

        if (((e->chunks || e->leaving) && !e->data) ||
            (e->data && e->removed &&
             !template_store_in_use(s, &e->digest))) {
            remove_copy(s, &e->digest, NULL);
        }
    }
    template_store_unlock(s);
}
