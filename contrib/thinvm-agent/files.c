/*
 * thinvm-agent: files that are being written, and their dirty pages
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * fanotify names the files, cachestat() finds their dirty pages, and FIEMAP says
 * where these lie.  Files are remembered by handle, not held open.
 */
#include "agent.h"
#include <linux/fiemap.h>
#include <linux/fs.h>
#include <sys/fanotify.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#define MAX_FILES       4096            /* that are watched at a time */
#define MAX_HANDLE      128             /* bytes that name a file */
#define MAX_READS       32              /* of 64 KiB of events, in one look */
#define MAX_LOOKS       20000           /* cachestat() calls of one look */
#define COARSE          (512 * 1024ULL) /* scattered pages: no closer look */

#ifndef SYS_cachestat
#define SYS_cachestat   451             /* the same for all architectures */
#endif

/* Those of <linux/mman.h>, which may be older than the kernel */
struct cache_range {
    uint64_t start, length;
};

struct cache_counts {
    uint64_t cached, dirty, writeback, evicted, recently_evicted;
};

struct file {
    struct file *next;
    fsid_t fsid;
    uint64_t dirty_since;               /* so far, as we know */
    uint64_t dirty;                     /* bytes at the last look */
    struct file_handle *handle;
};

static struct file *files[1024];
static unsigned nb_files;
static int watch = -1;
static unsigned looks;

bool watch_start(void)
{
    watch = fanotify_init(FAN_CLASS_NOTIF | FAN_REPORT_FID | FAN_NONBLOCK |
                          FAN_CLOEXEC, O_RDONLY | O_LARGEFILE);
    return watch >= 0;
}

bool watching(void)
{
    return watch >= 0;
}

void watch_mount(const struct mount *m)
{
    if (watch >= 0) {
        fanotify_mark(watch, FAN_MARK_ADD | FAN_MARK_FILESYSTEM,
                      FAN_MODIFY | FAN_CLOSE_WRITE, AT_FDCWD, m->path);
    }
}

static unsigned hash_of(const struct file_handle *h)
{
    uint32_t x = 2166136261u;       /* FNV-1a */

    for (unsigned i = 0; i < h->handle_bytes; i++) {
        x = (x ^ h->f_handle[i]) * 16777619u;
    }
    return x % (sizeof(files) / sizeof(files[0]));
}

static void saw_file(const fsid_t *fsid, const struct file_handle *h)
{
    struct file **slot, *f;

    if (h->handle_bytes > MAX_HANDLE) {
        return;
    }
    slot = &files[hash_of(h)];
    for (f = *slot; f; f = f->next) {
        if (f->handle->handle_bytes == h->handle_bytes &&
            !memcmp(&f->fsid, fsid, sizeof(*fsid)) &&
            !memcmp(f->handle->f_handle, h->f_handle, h->handle_bytes)) {
            return;
        }
    }
    if (nb_files == MAX_FILES) {
        cannot_tell(1, LIMIT);
        return;
    }
    f = must(calloc(1, sizeof(*f)));
    f->fsid = *fsid;
    f->dirty_since = now_ms();
    f->handle = must(malloc(sizeof(*h) + h->handle_bytes));
    memcpy(f->handle, h, sizeof(*h) + h->handle_bytes);
    f->next = *slot;
    *slot = f;
    nb_files++;
}

/* Read only once an interval: the kernel joins events of one file meanwhile */
static void read_events(void)
{
    static char buf[65536]
        __attribute__((aligned(8)));
    ssize_t n;

    /* Others may write as fast as we read: what is left waits */
    for (int i = 0; i < MAX_READS && watch >= 0 &&
                    (n = read(watch, buf, sizeof(buf))) > 0; i++) {
        struct fanotify_event_metadata *e = (void *)buf;

        for (; FAN_EVENT_OK(e, n); e = FAN_EVENT_NEXT(e, n)) {
            struct fanotify_event_info_fid *fid = (void *)(e + 1);

            if (e->mask & FAN_Q_OVERFLOW) {
                cannot_tell(1, LIMIT);
            }
            if (e->event_len >= sizeof(*e) + sizeof(*fid) +
                                sizeof(struct file_handle) &&
                fid->hdr.info_type == FAN_EVENT_INFO_TYPE_FID) {
                saw_file((fsid_t *)&fid->fsid,
                         (struct file_handle *)fid->handle);
            }
        }
    }
}

void watch_stop(void)
{
    if (watch >= 0) {
        close(watch);
        watch = -1;
    }
    for (unsigned i = 0; i < sizeof(files) / sizeof(files[0]); i++) {
        while (files[i]) {
            struct file *f = files[i];

            files[i] = f->next;
            free(f->handle);
            free(f);
        }
    }
    nb_files = 0;
}

static bool count_pages(int fd, uint64_t start, uint64_t length,
                        uint64_t *dirty)
{
    struct cache_range range = { start, length };
    struct cache_counts counts;
    long page = sysconf(_SC_PAGESIZE);

    looks++;
    if (syscall(SYS_cachestat, fd, &range, &counts, 0) < 0) {
        return false;
    }
    *dirty = (counts.dirty + counts.writeback) * page;
    return true;
}

/* Where @start of a file lies.  Nothing is written back for it */
static void where(int fd, dev_t device, uint64_t start, uint64_t length,
                  uint64_t due)
{
    char buf[sizeof(struct fiemap) + 64 * sizeof(struct fiemap_extent)]
        __attribute__((aligned(8)));
    struct fiemap *map = (struct fiemap *)buf;
    uint64_t end = start + length, mapped = 0;

    while (start < end) {
        memset(map, 0, sizeof(*map));
        map->fm_start = start;
        map->fm_length = end - start;
        map->fm_extent_count = 64;
        if (ioctl(fd, FS_IOC_FIEMAP, map) < 0) {
            cannot_tell(end - start, FILESYSTEM);
            return;
        }
        for (unsigned i = 0; i < map->fm_mapped_extents; i++) {
            struct fiemap_extent *e = &map->fm_extents[i];
            uint64_t e_end = e->fe_logical + e->fe_length;
            uint64_t from = e->fe_logical > start ? e->fe_logical : start;
            uint64_t to = e_end < end ? e_end : end;

            if (from >= to) {
                continue;
            }
            if (e->fe_flags & (FIEMAP_EXTENT_UNKNOWN |
                               FIEMAP_EXTENT_DELALLOC)) {
                cannot_tell(to - from, DELAYED);
            } else if (e->fe_flags & (FIEMAP_EXTENT_ENCODED |
                                      FIEMAP_EXTENT_NOT_ALIGNED)) {
                cannot_tell(to - from, FILESYSTEM);
            } else {
                on_disks(device, e->fe_physical + from - e->fe_logical,
                         to - from, DIRTY, due);
            }
            mapped += to - from;
            start = to;
        }
        if (map->fm_mapped_extents < 64) {
            break;
        }
    }
    /* a hole with dirty pages: blocks will be found when they are written */
    cannot_tell(length > mapped ? length - mapped : 0, DELAYED);
}

/*
 * Look into ever smaller parts of what has dirty pages, until one is dirty for
 * the most part, or small.  The kernel visits each page of the cache for each
 * count: a few large steps are cheaper than many halves.
 */
static void look_into(int fd, dev_t device, uint64_t start, uint64_t length,
                      uint64_t due)
{
    uint64_t part = length > 8 * COARSE ? 8 * COARSE :
                    length > COARSE ? COARSE : GRAIN;
    uint64_t dirty;

    if (!count_pages(fd, start, length, &dirty) || !dirty) {
        return;
    }
    if (length <= GRAIN || dirty >= length / 4 * 3 ||
        (length <= COARSE && dirty * 8 >= length)) {
        where(fd, device, start, length, due);
        return;
    }
    if (looks > MAX_LOOKS) {
        cannot_tell(dirty, LIMIT);
        return;
    }
    for (uint64_t at = 0; at < length; at += part) {
        look_into(fd, device, start + at,
                  length - at < part ? length - at : part, due);
    }
}

/* When the kernel writes by itself what is dirty since then */
static uint64_t due_at(uint64_t since)
{
    static uint64_t expire;
    FILE *f;

    if (!expire) {
        unsigned centiseconds = 3000;

        f = fopen("/proc/sys/vm/dirty_expire_centisecs", "re");
        if (!f || fscanf(f, "%u", &centiseconds) != 1 || !centiseconds) {
            centiseconds = 3000;
        }
        if (f) {
            fclose(f);
        }
        expire = centiseconds * 10ULL;
    }
    return since + expire;
}

/* Whether the file is worth another look */
static bool look_at_file(struct file *f)
{
    struct mount *m = mount_of(&f->fsid);
    uint64_t dirty = 0, size;
    struct stat st;
    int fd, mfd;

    if (!m || (mfd = mount_fd(m)) < 0) {
        return false;
    }
    fd = open_by_handle_at(mfd, f->handle, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) {
        return errno != ESTALE && errno != EPERM && errno != ENOENT;
    }
    if (fstat(fd, &st) == 0 && S_ISREG(st.st_mode) &&
        count_pages(fd, 0, 0, &dirty) && dirty) {
        size = (st.st_size + 4095) / 4096 * 4096;
        /* Most of it was written: the kernel counts from then on */
        if (dirty < f->dirty / 2) {
            f->dirty_since = now_ms();
        }
        f->dirty = dirty;
        look_into(fd, m->device, 0, size ? size : 4096,
                  due_at(f->dirty_since));
    }
    close(fd);
    return dirty > 0;
}

void find_dirty_pages(void)
{
    read_events();
    looks = 0;
    for (unsigned i = 0; i < sizeof(files) / sizeof(files[0]); i++) {
        struct file **slot = &files[i];

        while (*slot) {
            struct file *f = *slot;

            if (look_at_file(f)) {
                slot = &f->next;
            } else {
                *slot = f->next;
                free(f->handle);
                free(f);
                nb_files--;
            }
        }
    }
}
