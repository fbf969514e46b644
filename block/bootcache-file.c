/*
 * thinvm boot cache: the file that keeps a recording
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See bootcache-file.h.  The file may have been truncated, damaged or
 * exchanged by whatever happens to files: it is read with pread(), never
 * mapped, and each block is checked as it is read.
 */

#include "qemu/osdep.h"
#include "qemu/error-report.h"
#include "bootcache-file.h"

static int bootcache_pread(int fd, void *buf, size_t size, uint64_t offset)
{
    for (size_t done = 0; done < size; ) {
        ssize_t n = RETRY_ON_EINTR(pread(fd, buf + done, size - done,
                                         offset + done));

        if (n <= 0) {
            return n ? -errno : -EIO;
        }
        done += n;
    }
    return 0;
}

static int bootcache_pwrite(int fd, const void *buf, size_t size,
                            uint64_t offset)
{
    for (size_t done = 0; done < size; ) {
        ssize_t n = RETRY_ON_EINTR(pwrite(fd, buf + done, size - done,
                                          offset + done));

        if (n < 0) {
            return -errno;
        }
        done += n;
    }
    return 0;
}

/* ------------------------------------------------------------------ */
/* Reading                                                             */

static bool bootcache_file_read_header(BootcacheFile *f, Error **errp)
{
    g_autofree uint8_t *buf = g_malloc(BOOTCACHE_HEADER_SIZE);
    struct stat st;
    int ret;

    if (fstat(f->fd, &st) < 0 || !S_ISREG(st.st_mode)) {
        error_setg(errp, "it is not a regular file");
        return false;
    }
    ret = bootcache_pread(f->fd, buf, BOOTCACHE_HEADER_SIZE, 0);
    if (ret < 0) {
        error_setg(errp, "its header cannot be read (it has %" PRId64
                   " bytes)", (int64_t)st.st_size);
        return false;
    }
    if (!bootcache_file_decode_header(&f->header, buf, errp)) {
        return false;
    }
    if (st.st_size != bootcache_file_size(&f->header)) {
        error_setg(errp, "it has %" PRId64 " bytes, and its header says %"
                   PRIu64, (int64_t)st.st_size,
                   bootcache_file_size(&f->header));
        return false;
    }
    return true;
}

static bool bootcache_file_matches(BootcacheFile *f,
                                   const BootcacheIdentity *identity,
                                   uint64_t length, uint32_t block_size,
                                   Error **errp)
{
    if (memcmp(&f->header.identity, identity, sizeof(*identity)) ||
        f->header.length != length) {
        error_setg(errp, "it is of another template, or of another version of "
                   "this one");
        return false;
    }
    if (block_size && f->header.block_size != block_size) {
        error_setg(errp, "it has blocks of %" PRIu32 " bytes, and option "
                   "'block-size' wants %" PRIu32, f->header.block_size,
                   block_size);
        return false;
    }
    return true;
}

/*
 * A file that this publisher wrote has for each slot of its memory two records,
 * and some, in an eighth of that if blocks are as small as they can be; there
 * they are twice while they are read.  Another one may claim any number.
 */
static bool bootcache_file_read_records(BootcacheFile *f,
                                        uint64_t memory_limit, Error **errp)
{
    size_t size = (size_t)f->header.nb_records * BOOTCACHE_RECORD_SIZE;
    uint64_t most = memory_limit / 8 + 1 * MiB;
    g_autofree uint8_t *buf = NULL;

    if (2 * (uint64_t)size > most) {
        error_setg(errp, "its %" PRIu32 " records need %zu bytes of memory, "
                   "and with option 'memory-limit' as it is they may have %"
                   PRIu64, f->header.nb_records, 2 * size, most);
        return false;
    }
    buf = g_try_malloc(size);
    f->records = g_try_new(BootcacheRecord, f->header.nb_records);
    if (size && (!buf || !f->records)) {
        error_setg(errp, "there is no memory for its records");
        return false;
    }
    if (bootcache_pread(f->fd, buf, size, BOOTCACHE_HEADER_SIZE) < 0) {
        error_setg(errp, "its records cannot be read");
        return false;
    }
    return bootcache_file_decode_records(&f->header, buf, f->records, errp);
}

BootcacheFile *bootcache_file_open(const char *path,
                                   const BootcacheIdentity *identity,
                                   uint64_t length, uint32_t block_size,
                                   uint64_t memory_limit, bool *aside, Error **errp)
{
    BootcacheFile *f = g_new0(BootcacheFile, 1);

    *aside = false;
    f->fd = qemu_open_old(path, O_RDONLY | O_NONBLOCK);
    if (f->fd < 0) {
        if (errno != ENOENT) {
            error_setg_errno(errp, errno, "it cannot be opened");
        }
        g_free(f);
        return NULL;
    }
    if (!bootcache_file_read_header(f, errp) ||
        !bootcache_file_matches(f, identity, length, block_size, errp) ||
        !bootcache_file_read_records(f, memory_limit, errp)) {
        *aside = true;
        bootcache_file_close(f);
        return NULL;
    }
    return f;
}

void bootcache_file_put_aside(const char *path, const char *why)
{
    g_autofree char *aside = g_strdup_printf("%s.aside", path);

    if (rename(path, aside) < 0) {
        warn_report("The boot cache '%s' is not used: %s; and it cannot be "
                    "renamed: %s", path, why, strerror(errno));
    } else {
        warn_report("The boot cache '%s' was put aside as '%s': %s", path,
                    aside, why);
    }
}

int bootcache_file_read_block(BootcacheFile *f, const BootcacheRecord *r,
                              void *buf)
{
    const BootcacheFileHeader *h = &f->header;
    uint64_t offset = bootcache_file_data_offset(h) +
                      (uint64_t)r->slot * h->block_size;
    uint32_t bytes = bootcache_block_bytes(h->length, h->block_size, r->block);
    int ret = bootcache_pread(f->fd, buf, bytes, offset);

    if (ret == 0 &&
        r->crc != bootcache_checksum(&h->identity, BOOTCACHE_CHECKSUM_BLOCK,
                                     r->block, buf, bytes)) {
        ret = -EBADMSG;
    }
    return ret;
}

void bootcache_file_close(BootcacheFile *f)
{
    if (f) {
        close(f->fd);
        g_free(f->records);
        g_free(f);
    }
}

/* ------------------------------------------------------------------ */
/* Writing                                                             */

/*
 * The records of published blocks, encoded; their slots are counted anew,
 * and @slots[i] tells where the data of the i-th one is now.
 */
static void bootcache_file_encode_records(BootcacheMap *map,
                                          BootcacheFileHeader *h,
                                          uint8_t *buf, uint32_t *slots)
{
    uint32_t used = qatomic_read(&map->header->used_records);

    for (uint32_t i = 0; i < used; i++) {
        BootcacheRecord r = map->records[i];

        if (!bootcache_map_present(map, r.block)) {
            continue;
        }
        if (r.slot != BOOTCACHE_NO_SLOT) {
            slots[h->nb_slots] = r.slot;
            r.slot = h->nb_slots++;
        }
        bootcache_file_encode_record(&r, buf + h->nb_records++ *
                                              BOOTCACHE_RECORD_SIZE);
    }
    h->records_crc = bootcache_checksum(&h->identity,
                                        BOOTCACHE_CHECKSUM_RECORDS, 0, buf,
                                        (size_t)h->nb_records *
                                        BOOTCACHE_RECORD_SIZE);
}

static int bootcache_file_write_all(int fd, BootcacheMap *map)
{
    const BootcacheGeometry *g = &map->geometry;
    uint32_t used = qatomic_read(&map->header->used_records);
    g_autofree uint8_t *header = g_malloc(BOOTCACHE_HEADER_SIZE);
    g_autofree uint8_t *buf = g_malloc((size_t)used * BOOTCACHE_RECORD_SIZE);
    g_autofree uint32_t *slots = g_new(uint32_t, used);
    BootcacheFileHeader h = {
        .identity = g->identity,
        .length = g->length,
        .block_size = g->block_size,
    };
    int ret;

    bootcache_file_encode_records(map, &h, buf, slots);
    for (uint32_t i = 0; i < h.nb_slots; i++) {
        ret = bootcache_pwrite(fd, map->data +
                               (uint64_t)slots[i] * g->block_size,
                               g->block_size, bootcache_file_data_offset(&h) +
                               (uint64_t)i * g->block_size);
        if (ret < 0) {
            return ret;
        }
    }
    bootcache_file_encode_header(&h, header);
    ret = bootcache_pwrite(fd, buf,
                           (size_t)h.nb_records * BOOTCACHE_RECORD_SIZE,
                           BOOTCACHE_HEADER_SIZE);
    if (ret == 0) {
        ret = bootcache_pwrite(fd, header, BOOTCACHE_HEADER_SIZE, 0);
    }
    if (ret == 0 && ftruncate(fd, bootcache_file_size(&h)) < 0) {
        ret = -errno;
    }
    if (ret == 0 && fdatasync(fd) < 0) {
        ret = -errno;
    }
    return ret;
}

/* The name, too, has to survive a power cut */
static void bootcache_sync_directory(const char *path)
{
    g_autofree char *directory = g_path_get_dirname(path);
    int fd = qemu_open_old(directory, O_RDONLY | O_DIRECTORY);

    if (fd >= 0) {
        fsync(fd);
        close(fd);
    }
}

int bootcache_file_save(const char *path, BootcacheMap *map)
{
    g_autofree char *new = g_strdup_printf("%s.new", path);
    int fd, ret;

    /* A leftover of somebody who died; whoever still has it open keeps it */
    if (unlink(new) < 0 && errno != ENOENT) {
        return -errno;
    }
    fd = qemu_open_old(new, O_WRONLY | O_CREAT | O_EXCL, 0600);
    if (fd < 0) {
        return -errno;
    }
    ret = bootcache_file_write_all(fd, map);
    close(fd);
    if (ret == 0 && rename(new, path) < 0) {
        ret = -errno;
    }
    if (ret < 0) {
        unlink(new);
    } else {
        bootcache_sync_directory(path);
    }
    return ret;
}
