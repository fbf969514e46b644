/*
 * thinvm-agent: what its parts share
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * One process, one thread.  Offsets and lengths are bytes, times milliseconds
 * of the monotonic clock.
 */
#ifndef THINVM_AGENT_H
#define THINVM_AGENT_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/vfs.h>
#include <unistd.h>

/* of the protocol, see docs/interop/thinvm-hints.rst */
#define MAX_LINE        1024
#define MAX_RANGES      16              /* in a line */
#define MAX_DISKS       64
#define LINES_BURST     100             /* half of what the host takes */
#define LINES_SECOND    1000

#define MAX_SET         65536           /* ranges of a disk, of each kind */
#define MAX_ALL_SETS    (4UL << 20)     /* of all disks: 96 MiB */
#define GRAIN           (64 * 1024ULL)  /* ranges are told this exactly */
#define NAME_SIZE       256

/* ------------------------------------------------------------------ */
/* ranges.c                                                            */

struct range {
    uint64_t start, end;
    uint64_t due;                       /* when it will be written */
};

/* Ranges in order, none overlapping another, once set_normalize() was called;
 * all zero: empty */
struct set {
    struct range *r;
    size_t nb, room;
};

/* Beyond MAX_SET ranges, or MAX_ALL_SETS in all sets, they are dropped */
void set_append(struct set *s, uint64_t start, uint64_t end, uint64_t due);
/* Bring what was appended in order, ranges that meet made one */
void set_normalize(struct set *s);
void set_clear(struct set *s);
/* What is in @a and not in @b, both normalized; to be cleared */
struct set set_minus(const struct set *a, const struct set *b);
void set_add(struct set *s, const struct range *r, size_t nb);
void set_remove(struct set *s, const struct range *r, size_t nb);

uint64_t now_ms(void);
/* Ends the process if there is no memory */
void *must(void *p);

/* ------------------------------------------------------------------ */
/* port.c                                                              */

extern int port;                        /* non-blocking, or -1 */
extern uint64_t lines_sent;             /* since hello */

/* Queue a line; false if there is no room for it now */
__attribute__((format(printf, 1, 2)))
bool say(const char *format, ...);
/* Write what is queued, as far as the host takes it */
void flush_out(void);
bool out_pending(void);
void forget_out(void);
/* The host's bound; begins with a second's worth */
void set_range_rate(uint64_t ranges_in_a_second);
/* Tell what has changed from @told to @now, as far as the bounds allow, and
 * note it in @told; @now is emptied.  @timed: with the time it is due. */
void tell_difference(unsigned disk, const char *verb, const char *undo,
                     bool timed, bool again, struct set *told,
                     struct set *now);

/* ------------------------------------------------------------------ */
/* disks.c                                                             */

/* Why dirty pages cannot be told; the words are the protocol's */
enum reason {
    COMPLETE, FILESYSTEM, MAPPING, DELAYED, LIMIT, PRIVILEGE, OTHER
};

struct disk {
    dev_t device;
    uint64_t size;
    char name[NAME_SIZE];
    struct set dirty, free;             /* as told */
    struct set now_dirty, now_free;     /* as being found */
    uint64_t known;                     /* dirty bytes, in this look */
    uint64_t told_known, told_unknown;
    uint64_t written;                   /* bytes, when it was found */
    enum reason told_reason;
    bool told;
};

extern struct disk disks[MAX_DISKS];
extern unsigned nb_disks;
extern uint64_t unknown;                /* dirty bytes, of this look */
extern enum reason worst;               /* why: the first reason */

enum kind { DIRTY, FREE, JUST_NAME };

/* Note what is at @start of @device as ranges of disks */
void on_disks(dev_t device, uint64_t start, uint64_t length, enum kind kind,
              uint64_t due);
/* Whether any of @device lies on @disk */
bool is_on_disk(dev_t device, dev_t disk);
void cannot_tell(uint64_t bytes, enum reason reason);
/* Tell which disks have come and gone */
void tell_disks(void);
void tell_coverage(unsigned number, bool privileged);
/* Bytes written to all disks while they were known, in the agent's life */
uint64_t bytes_written(void);
/* Look at devices anew */
void forget_layers(void);
/* Before privileges are dropped */
void open_dm_control(void);
void forget_disks(void);

/* ------------------------------------------------------------------ */
/* mounts.c                                                            */

#define MAX_MOUNTS      256

/* A mounted ext4 or xfs */
struct mount {
    dev_t device;
    fsid_t fsid;
    char path[PATH_MAX];
    int fd;                             /* during a look, or -1 */
};

extern struct mount mounts[MAX_MOUNTS];
extern unsigned nb_mounts;

/* Read the list anew, and watch what is in it */
void read_mounts(void);
struct mount *mount_of(const fsid_t *fsid);
/* Open until close_mounts(), so that nobody is kept from unmounting it */
int mount_fd(struct mount *m);
void close_mounts(void);
/* Into now_free of all disks */
void find_free_space(void);
/* Discard free space of what lies on @disk; bytes, or UINT64_MAX if no file
 * system can do that */
uint64_t trim_mounts(dev_t disk, uint64_t least);

/* ------------------------------------------------------------------ */
/* files.c                                                             */

bool watch_start(void);
bool watching(void);
void watch_mount(const struct mount *m);
void watch_stop(void);
/* Into now_dirty of all disks */
void find_dirty_pages(void);

#endif
