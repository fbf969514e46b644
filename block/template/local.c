/*
 * thinvm template store: a copy on a disk of this node, being read
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See reader.h.  While it is open it is in use, which others see by the locks
 * that the file driver has, too: those of a reader that lets nobody write or
 * resize.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "block/block-common.h"
#include "qemu/bitmap.h"
#include "reader.h"

/* Where the file driver has its locks: what it does, what others may not */
#define LOCKS_PERM      100
#define LOCKS_SHARED    200

static bool lock_one(int fd, unsigned base, unsigned perm)
{
    return qemu_lock_fd(fd, base + ctz32(perm), 1, false) == 0;
}

static bool lock_for_reading(int fd)
{
    return lock_one(fd, LOCKS_PERM, BLK_PERM_CONSISTENT_READ) &&
           lock_one(fd, LOCKS_SHARED, BLK_PERM_WRITE) &&
           lock_one(fd, LOCKS_SHARED, BLK_PERM_RESIZE);
}

/* Is the file that @fd has open still the copy, and may it be used? */
static bool still_there(TemplateStore *s, const TemplateDigest *digest,
                        int fd, uint64_t length)
{
    TemplateEntry e;
    struct stat st;

    return fstat(fd, &st) == 0 && st.st_nlink && st.st_size == length &&
           template_store_find(s, digest, &e) && e.data && !e.removed &&
           !e.leaving;
}

static LocalCopy *open_on(TemplateStore *s, const TemplateDigest *digest,
                          TemplateChunks **chunks, Error **errp)
{
    g_autoptr(TemplateChunks) c = NULL;
    TemplateEntry e;
    LocalCopy *copy;
    int fd;

    if (!template_store_find(s, digest, &e) || !e.data || e.removed ||
        e.leaving) {
        return NULL;
    }
    c = template_store_read_chunks(s, digest, errp);
    fd = c ? template_store_open_data(s, digest, false, errp) : -1;
    if (fd < 0) {
        return NULL;
    }
    if (!lock_for_reading(fd) || !still_there(s, digest, fd, c->length)) {
        error_setg(errp, "Disk '%s': the copy has another length, or is being "
                   "removed or written", s->disk->name);
        close(fd);
        return NULL;
    }
    copy = g_atomic_rc_box_new0(LocalCopy);
    *copy = (LocalCopy) {
        .store = s,
        .path = template_store_path(s, digest),
        .fd = fd,
    };
    if (!*chunks) {
        *chunks = g_steal_pointer(&c);
    } else {
        copy->own = g_steal_pointer(&c);
    }
    copy->verified = bitmap_new((*chunks)->nb_chunks);
    copy->wrong = bitmap_new((*chunks)->nb_chunks);
    return copy;
}

LocalCopy *local_copy_open(GPtrArray *stores, const TemplateDigest *digest,
                           TemplateChunks **chunks, Error **errp)
{
    Error *err = NULL;
    LocalCopy *copy = NULL;

    for (unsigned i = 0; !copy && i < stores->len; i++) {
        error_free(err);
        err = NULL;
        copy = open_on(g_ptr_array_index(stores, i), digest, chunks, &err);
    }
    error_propagate(errp, err);
    return copy;
}

bool local_copy_replaced(const LocalCopy *copy)
{
    struct stat mine, there;

    return stat(copy->path, &there) == 0 && fstat(copy->fd, &mine) == 0 &&
           (mine.st_ino != there.st_ino || mine.st_dev != there.st_dev);
}

LocalCopy *local_copy_ref(LocalCopy *copy)
{
    return g_atomic_rc_box_acquire(copy);
}

static void local_copy_clear(gpointer opaque)
{
    LocalCopy *copy = opaque;

    close(copy->fd);
    g_free(copy->path);
    template_chunks_free(copy->own);
    g_free(copy->verified);
    g_free(copy->wrong);
}

void local_copy_unref(LocalCopy *copy)
{
    if (copy) {
        g_atomic_rc_box_release_full(copy, local_copy_clear);
    }
}
