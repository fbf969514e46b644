/*
 * thinvm driver layer: what the files about snapshots share
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 *   driver-snapshot.c   create, go back, list, show one instead of the disk
 *   snapshot-delete.c   delete and protect
 *   snapshot-tree.c     the tree as users see it
 *   snapshot-job.c      deletion as a job; in programs with a monitor
 */
#ifndef BLOCK_THINVM_DRIVER_SNAPSHOT_H
#define BLOCK_THINVM_DRIVER_SNAPSHOT_H

#include "thinvm.h"

/* driver-snapshot.c */
uint32_t thinvm_nb_slots(BDRVThinvmState *s);
void thinvm_id_str(const ThinvmSnapshot *snap, char *buf, size_t size);
/*
 * The first listed snapshot that has this id (if given) and this name (if
 * given).  -ENOENT, without @errp, if there is none.
 */
int coroutine_fn GRAPH_RDLOCK
thinvm_find_snapshot(BDRVThinvmState *s, const char *id, const char *name,
                     ThinvmSnapshot *snap, uint32_t *slot, Error **errp);
/* The same, but -ENOENT comes with a message */
int coroutine_fn GRAPH_RDLOCK
thinvm_require_snapshot(BDRVThinvmState *s, const char *id, const char *name,
                        ThinvmSnapshot *snap, uint32_t *slot, Error **errp);
/*
 * What was executed is made durable.  It is not taken back when that fails;
 * then @errp says @what is so ("the disk is back at it") and what that means.
 */
int coroutine_fn GRAPH_RDLOCK
thinvm_snapshot_settle(BDRVThinvmState *s, const char *what, Error **errp);

/* snapshot-delete.c */

/*
 * Find the snapshot and see whether it may be deleted.  @force: also if it is
 * protected, which is ended.  Main loop
 */
int thinvm_deletion_prepare(BlockDriverState *bs, const char *id,
                            const char *name, bool force, ThinvmDeletion *del,
                            Error **errp);
/* The step that takes it out of the lists, durably */
int coroutine_fn GRAPH_RDLOCK
thinvm_deletion_mark(BlockDriverState *bs, const ThinvmDeletion *del,
                     bool force, Error **errp);
/* The same, not durable; nothing else is looked at */
int coroutine_fn GRAPH_RDLOCK
thinvm_deletion_hide(BDRVThinvmState *s, const ThinvmDeletion *del,
                     Error **errp);
/* One step, unless it is gone or waits */
int coroutine_fn GRAPH_RDLOCK
thinvm_deletion_step(BlockDriverState *bs, ThinvmDeletion *del, Error **errp);
/* One step of the first deletion that is not finished; *done: there is none */
int coroutine_fn GRAPH_RDLOCK
thinvm_collect_step(BlockDriverState *bs, ThinvmCollect *c, bool *done,
                    Error **errp);
int coroutine_fn GRAPH_RDLOCK
thinvm_snapshot_protect(BlockDriverState *bs, const char *id,
                        const char *name, bool protect, Error **errp);
/*
 * Whether this program runs on after a command: deletions are then finished
 * beside its other work.  False in tools.
 */
extern bool thinvm_in_background;
/* Finish deletions: now, in a tool, or soon */
int coroutine_fn GRAPH_RDLOCK
thinvm_snapshot_clean_up(BlockDriverState *bs, Error **errp);

/* snapshot-job.c; @flags: JOB_* */
void thinvm_snapshot_delete_job(BlockDriverState *bs, const char *job_id,
                                const char *id, const char *name, bool force,
                                int64_t speed, int flags, Error **errp);

/* compact-job.c; @flags: JOB_* */
void thinvm_compact_job(BlockDriverState *bs, const char *job_id,
                        int64_t speed, int flags, Error **errp);

/*
 * create-clone.c: an image is to be created on this backing file.  If that is
 * a snapshot of a thinvm image, sees to it that it is protected.
 */
int coroutine_fn GRAPH_UNLOCKED
thinvm_clone_begin(const char *backing_name, Error **errp);

/* snapshot-tree.c */

/* A program that serves guests looks at so many pieces of trees at most */
#define THINVM_TREE_BUDGET  16384
/* The caller frees the list.  NULL with @errp set on error; main loop */
bool thinvm_snapshot_tree(BlockDriverState *bs, unsigned budget,
                          ThinvmSnapshotInfoList **list, Error **errp);

#endif
