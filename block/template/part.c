/*
 * thinvm template store: bringing a template in
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See store.h.  A part is a file in tmp/ on which its owner holds flock(): one
 * that nobody holds is of a process that died.  If its digest is known it is
 * named by it, so that two that bring in the same wait for each other, and a
 * later one goes on where an earlier one died; a second file tells how far the
 * first one surely is on the disk.  Whatever either holds, the hash at the end
 * decides (T1).
 *
 * Commit: the part's data is on the disk; .chunks gets its name, then .raw;
 * what is not followed by its .raw is swept.
 */

#include "qemu/osdep.h"
#include <sys/file.h>
#include "qapi/error.h"
#include "qemu/bswap.h"
#include "qemu/error-report.h"
#include "store.h"

static bool part_error(TemplateStore *s, const char *what, const char *name,
                       Error **errp)
{
    error_setg_errno(errp, errno, "Disk '%s': cannot %s '%s/tmp/%s'",
                     s->disk->name, what, s->disk->path, name);
    return false;
}

static int open_tmp(TemplateStore *s, const char *name)
{
    return openat(s->tmp, name, O_RDWR | O_CREAT | O_NOFOLLOW | O_NONBLOCK |
                  O_CLOEXEC, 0600);
}

/* @readonly: it is in a commit, or of one that died in it, and not of root */
static int open_part(TemplateStore *s, const char *name, bool *readonly)
{
    int fd = open_tmp(s, name);

    *readonly = fd < 0 && errno == EACCES;
    if (*readonly) {
        fd = openat(s->tmp, name,
                    O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
        if (fd < 0 && errno == ENOENT) {
            *readonly = false;          /* it has its final name now */
            fd = open_tmp(s, name);
        }
    }
    return fd;
}

/* With its lock, so that this is no commit's file */
static bool make_writable(int fd, const struct stat *st)
{
    if (st->st_mode & S_IWUSR) {
        errno = EACCES;                 /* that is not why it cannot be */
        return false;
    }
    return fchmod(fd, 0600) == 0;
}

static int close_failed(int fd, int error)
{
    close(fd);
    errno = error;
    return -1;
}

static bool lock_part(int fd, const char *name, bool wait)
{
    if (flock(fd, LOCK_EX | LOCK_NB) == 0) {
        return true;
    }
    if (!wait) {
        return false;
    }
    info_report("waiting for another run, which writes '%s'", name);
    return RETRY_ON_EINTR(flock(fd, LOCK_EX)) == 0;
}

/*
 * While this waited for the lock, a commit may have moved the file to its final
 * name: it is a copy now, which nobody may touch.  Its links do not tell that.
 */
static bool has_name(TemplateStore *s, const char *name, const struct stat *st)
{
    struct stat named;

    return fstatat(s->tmp, name, &named, AT_SYMLINK_NOFOLLOW) == 0 &&
           named.st_dev == st->st_dev && named.st_ino == st->st_ino;
}

/* Locked, and still the file of that name; -1, EWOULDBLOCK: others have it */
static int open_and_lock(TemplateStore *s, const char *name, bool wait)
{
    struct stat st;
    bool readonly;
    int fd;

    while ((fd = open_part(s, name, &readonly)) >= 0) {
        if (!lock_part(fd, name, wait)) {
            return close_failed(fd, errno);
        }
        if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode)) {
            return close_failed(fd, EINVAL);
        }
        if (has_name(s, name, &st)) {
            if (!readonly) {
                break;
            }
            if (!make_writable(fd, &st)) {
                return close_failed(fd, errno);
            }
        }
        close(fd);
    }
    return fd;
}

/* How far is it?  Nothing, if it cannot be told. */
static uint64_t read_progress(TemplatePart *p)
{
    uint8_t buf[8];
    uint64_t done;
    struct stat st;

    if (p->progress_fd < 0 || !template_pread(p->progress_fd, buf, 8, 0) ||
        fstat(p->fd, &st) < 0) {
        return 0;
    }
    done = ldq_le_p(buf);
    return done % TEMPLATE_IO_BYTES || done > st.st_size ? 0 : done;
}

static TemplatePart *part_open(TemplatePart *p, bool *busy, Error **errp)
{
    TemplateStore *s = p->store;

    p->fd = open_and_lock(s, p->name, !busy);
    if (p->fd < 0) {
        if (busy && errno == EWOULDBLOCK) {
            *busy = true;
            return NULL;
        }
        part_error(s, "open", p->name, errp);
        return NULL;
    }
    if (p->progress_name) {
        p->progress_fd = open_tmp(s, p->progress_name);
        p->done = read_progress(p);
    }
    if (ftruncate(p->fd, p->done) < 0) {
        part_error(s, "truncate", p->name, errp);
        return NULL;
    }
    return p;
}

TemplatePart *template_part_begin(TemplateStore *s,
                                  const TemplateDigest *expected, bool replace,
                                  bool *busy, Error **errp)
{
    TemplatePart *p;
    TemplateEntry entry;

    if (!template_store_lock(s, errp)) {
        return NULL;
    }
    template_store_unlock(s);
    p = g_new0(TemplatePart, 1);
    *p = (TemplatePart) { .store = s, .fd = -1, .progress_fd = -1 };
    if (expected) {
        p->name = template_file_name(expected, ".part");
        p->progress_name = template_file_name(expected, ".progress");
    } else {
        p->name = g_strdup_printf("add-%d-%08x.part", (int)getpid(),
                                  g_random_int());
    }
    if (!part_open(p, busy, errp)) {
        template_part_end(p, true);
        return NULL;
    }
    if (expected && !replace && template_store_find(s, expected, &entry) &&
        entry.data && entry.chunks) {
        template_part_end(p, false);
        return NULL;
    }
    return p;
}

bool template_part_read(TemplatePart *p, void *buf, uint32_t bytes,
                        uint64_t offset, Error **errp)
{
    return template_pread(p->fd, buf, bytes, offset) ||
           part_error(p->store, "read", p->name, errp);
}

bool template_part_write(TemplatePart *p, const void *buf, uint32_t bytes,
                         uint64_t offset, Error **errp)
{
    return template_pwrite(p->fd, buf, bytes, offset) ||
           part_error(p->store, "write", p->name, errp);
}

bool template_part_note(TemplatePart *p, uint64_t done, Error **errp)
{
    uint8_t buf[8];
    struct stat st;

    if (p->progress_fd < 0) {
        return true;
    }
    /* Zeroes at its end are not written */
    if (fstat(p->fd, &st) < 0 ||
        (st.st_size < done && ftruncate(p->fd, done) < 0) ||
        qemu_fdatasync(p->fd) < 0) {
        return part_error(p->store, "flush", p->name, errp);
    }
    stq_le_p(buf, done);
    return template_pwrite(p->progress_fd, buf, sizeof(buf), 0) ||
           part_error(p->store, "write", p->progress_name, errp);
}

bool template_part_cut(TemplatePart *p, uint64_t done, Error **errp)
{
    if (p->done <= done) {
        return true;
    }
    p->done = done;
    return ftruncate(p->fd, done) == 0 ||
           part_error(p->store, "truncate", p->name, errp);
}

bool template_part_restart(TemplatePart *p, Error **errp)
{
    p->done = 0;
    return (ftruncate(p->fd, 0) == 0 &&
            (p->progress_fd < 0 || ftruncate(p->progress_fd, 0) == 0)) ||
           part_error(p->store, "truncate", p->name, errp);
}

bool template_write_chunks_tmp(TemplateStore *s, const TemplateChunks *c,
                               char **name, Error **errp)
{
    g_autofree uint8_t *buf = template_chunks_encode(c, errp);
    bool ok;
    int fd;

    if (!buf) {
        return false;
    }
    *name = g_strdup_printf("chunks-%d-%08x.part", (int)getpid(),
                            g_random_int());
    fd = open_and_lock(s, *name, true);
    ok = fd >= 0 && fchmod(fd, 0444) == 0 &&
         template_pwrite(fd, buf, template_chunks_file_size(c), 0) &&
         fsync(fd) == 0;
    if (!ok) {
        part_error(s, "write", *name, errp);
        unlinkat(s->tmp, *name, 0);
    }
    if (fd >= 0) {
        close(fd);
    }
    return ok;
}

/* With the store locked */
static bool part_rename(TemplatePart *p, const char *chunks_tmp,
                        const TemplateChunks *c, Error **errp)
{
    TemplateStore *s = p->store;
    g_autofree char *chunks = template_file_name(&c->digest, ".chunks");
    g_autofree char *data = template_file_name(&c->digest, ".raw");

    /* While the part is still locked: a later one has its own progress */
    if (p->progress_name) {
        unlinkat(s->tmp, p->progress_name, 0);
    }
    if (renameat(s->tmp, chunks_tmp, s->dir, chunks) < 0 ||
        renameat(s->tmp, p->name, s->dir, data) < 0 || fsync(s->dir) < 0) {
        return part_error(s, "rename", p->name, errp);
    }
    g_clear_pointer(&p->name, g_free);
    g_clear_pointer(&p->progress_name, g_free);
    return true;
}

bool template_part_commit(TemplatePart *p, const TemplateChunks *c,
                          bool replace, bool *existed, Error **errp)
{
    TemplateStore *s = p->store;
    g_autofree char *chunks_tmp = NULL;
    TemplateEntry entry;
    bool ok;

    if (ftruncate(p->fd, c->length) < 0 || fchmod(p->fd, 0444) < 0 ||
        fsync(p->fd) < 0) {
        return part_error(s, "flush", p->name, errp);
    }
    if (!template_store_lock(s, errp)) {
        return false;
    }
    ok = template_write_chunks_tmp(s, c, &chunks_tmp, errp);
    *existed = template_store_find(s, &c->digest, &entry) && entry.data &&
               entry.chunks && entry.size == c->length;
    if (ok && (replace || !*existed)) {
        ok = part_rename(p, chunks_tmp, c, errp);
    } else if (ok) {
        unlinkat(s->tmp, chunks_tmp, 0);
    }
    ok = ok && template_store_unmark(s, &c->digest, TEMPLATE_REMOVED, errp) &&
         template_store_unmark(s, &c->digest, TEMPLATE_LEAVING, errp);
    template_store_unlock(s);
    return ok;
}

void template_part_end(TemplatePart *p, bool keep)
{
    if (!p) {
        return;
    }
    if (p->fd >= 0 && !(keep && p->progress_name)) {
        if (p->progress_name) {
            unlinkat(p->store->tmp, p->progress_name, 0);
        }
        if (p->name) {
            unlinkat(p->store->tmp, p->name, 0);
        }
    }
    if (p->progress_fd >= 0) {
        close(p->progress_fd);
    }
    if (p->fd >= 0) {
        close(p->fd);
    }
    g_free(p->name);
    g_free(p->progress_name);
    g_free(p);
}
