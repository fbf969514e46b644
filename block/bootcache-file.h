/*
 * thinvm boot cache: the file that keeps a recording
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Written once, when a recording is sealed, and under another name until it is
 * complete: a file with the right name is whole, or was damaged later.  All
 * functions wait for the disk; those marked so may run in any thread.
 */
#ifndef BLOCK_BOOTCACHE_FILE_H
#define BLOCK_BOOTCACHE_FILE_H

#include "bootcache-map.h"

typedef struct BootcacheFile {
    int fd;
    BootcacheFileHeader header;
    BootcacheRecord *records;
} BootcacheFile;

/*
 * NULL without an error: there is no such file.  NULL with one: it is not
 * usable, and *@aside says whether to put it aside.  @block_size 0: any.  What
 * describes its blocks must not need more than a small part of @memory_limit.
 */
BootcacheFile *bootcache_file_open(const char *path,
                                   const BootcacheIdentity *identity,
                                   uint64_t length, uint32_t block_size,
                                   uint64_t memory_limit, bool *aside, Error **errp);

/* Rename it, over what was put aside before */
void bootcache_file_put_aside(const char *path, const char *why);

/* A block's data to @buf, of block_size bytes; checked.  Any thread. */
int bootcache_file_read_block(BootcacheFile *f, const BootcacheRecord *r,
                              void *buf);

/* What is published of @map, in the order of its records.  Any thread. */
int bootcache_file_save(const char *path, BootcacheMap *map);

void bootcache_file_close(BootcacheFile *f);

#endif /* BLOCK_BOOTCACHE_FILE_H */
