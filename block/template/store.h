/*
 * thinvm template store: the files on one disk of this node
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * store.c: what is there; part.c: how something gets there.
 */

#ifndef BLOCK_TEMPLATE_STORE_H
#define BLOCK_TEMPLATE_STORE_H

#include "chunks.h"
#include "cluster.h"

typedef struct TemplateStore {
    const ClusterDisk *disk;
    int dir;                    /* of the disk's path */
    int tmp;                    /* of tmp/ in it */
    int lock;
} TemplateStore;

/* What the names of files say about a template */
typedef struct TemplateEntry {
    TemplateDigest digest;
    bool data;                  /* .raw: it is there */
    bool chunks;                /* .chunks */
    bool removed;               /* .removed: it is to go, and not to return */
    bool leaving;               /* .leaving: it belongs on other disks */
    uint64_t size, allocated;   /* of .raw */
} TemplateEntry;

/* Make a directory into a store; it is no error if it is one */
bool template_store_init(const ClusterDisk *disk, Error **errp);

TemplateStore *template_store_open(const ClusterDisk *disk, Error **errp);
void template_store_close(TemplateStore *s);

/*
 * Names change only under this lock, which no I/O of a template's size is
 * done under.
 */
bool template_store_lock(TemplateStore *s, Error **errp);
void template_store_unlock(TemplateStore *s);

/* Of TemplateEntry, by digest */
GArray *template_store_scan(TemplateStore *s, Error **errp);
/* False: nothing is known of it */
bool template_store_find(TemplateStore *s, const TemplateDigest *digest,
                         TemplateEntry *entry);

/* The same, but not in the middle of a change, if that can be told */
bool template_store_look(TemplateStore *s, const TemplateDigest *digest,
                         TemplateEntry *entry);

char *template_store_path(const TemplateStore *s,
                          const TemplateDigest *digest);
char *template_store_chunks_path(const TemplateStore *s,
                                 const TemplateDigest *digest);
/* A descriptor to read by (or to repair by), or -1 */
int template_store_open_data(TemplateStore *s, const TemplateDigest *digest,
                             bool writable, Error **errp);
TemplateChunks *template_store_read_chunks(TemplateStore *s,
                                           const TemplateDigest *digest,
                                           Error **errp);
/* In place of what is there; durable when it returns */
bool template_store_write_chunks(TemplateStore *s, const TemplateChunks *c,
                                 Error **errp);

/* Does a QEMU of this node have it open? */
bool template_store_in_use(TemplateStore *s, const TemplateDigest *digest);

/* Marks, by the suffix of a file without contents */
#define TEMPLATE_REMOVED    ".removed"
#define TEMPLATE_LEAVING    ".leaving"

bool template_store_mark(TemplateStore *s, const TemplateDigest *digest,
                         const char *mark, Error **errp);
bool template_store_unmark(TemplateStore *s, const TemplateDigest *digest,
                           const char *mark, Error **errp);
/* Delete the copy, but for TEMPLATE_REMOVED, unless it is in use (!@gone) */
bool template_store_drop(TemplateStore *s, const TemplateDigest *digest,
                         bool *gone, Error **errp);
/* Clean up behind runs that died */
void template_store_sweep(TemplateStore *s);

/* ------------------------------------------------------------------ */

/* A template that is being brought in */
typedef struct TemplatePart {
    TemplateStore *store;
    char *name;                 /* in tmp/ */
    char *progress_name;        /* NULL: it cannot be resumed */
    int fd, progress_fd;
    uint64_t done;              /* so much was there already, and on the disk */
} TemplatePart;

/*
 * With a digest, what an earlier run left is gone on with; if another run is
 * at it now, this waits for its end, and NULL without an error means that it
 * has succeeded.  With @busy it does not wait, but sets that.
 */
TemplatePart *template_part_begin(TemplateStore *s,
                                  const TemplateDigest *expected, bool replace,
                                  bool *busy, Error **errp);
bool template_part_read(TemplatePart *p, void *buf, uint32_t bytes,
                        uint64_t offset, Error **errp);
bool template_part_write(TemplatePart *p, const void *buf, uint32_t bytes,
                         uint64_t offset, Error **errp);
/* All before @done is to be found again after a crash */
bool template_part_note(TemplatePart *p, uint64_t done, Error **errp);
/* Of what was there already keep @done bytes at most */
bool template_part_cut(TemplatePart *p, uint64_t done, Error **errp);
/* Forget what is there */
bool template_part_restart(TemplatePart *p, Error **errp);
/*
 * Give it its final name.  @existed: it was there already, which is left as
 * it is, unless @replace.
 */
bool template_part_commit(TemplatePart *p, const TemplateChunks *c,
                          bool replace, bool *existed, Error **errp);
/* Also after a commit; @keep what there is for a later run */
void template_part_end(TemplatePart *p, bool keep);

/* Shared by both files */
char *template_file_name(const TemplateDigest *digest, const char *suffix);
bool template_pwrite(int fd, const void *buf, size_t bytes, uint64_t offset);
bool template_pread(int fd, void *buf, size_t bytes, uint64_t offset);
bool template_write_chunks_tmp(TemplateStore *s, const TemplateChunks *c,
                               char **name, Error **errp);

#endif
