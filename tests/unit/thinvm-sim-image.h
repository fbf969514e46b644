/*
 * Guest data on an image on a simulated device: helpers of unit tests
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The smallest data path that keeps the driver's rules (io-write.c): data
 * first, then the operation.  Each sector of guest data carries its own
 * number and a tag, so that a reader can tell whose it is.
 */
#ifndef TESTS_UNIT_THINVM_SIM_IMAGE_H
#define TESTS_UNIT_THINVM_SIM_IMAGE_H

#include "thinvm-sim.h"

#define IMAGE_CLUSTER_BITS  14
#define IMAGE_CLUSTER       (1 << IMAGE_CLUSTER_BITS)
#define IMAGE_PART          (IMAGE_CLUSTER / THINVM_PARTS)
#define IMAGE_SECTORS       (IMAGE_CLUSTER / SIM_SECTOR)    /* per cluster */

/* What a sector that nobody wrote reads as, and one that nobody may see */
#define TAG_ZERO            0ULL
#define TAG_FOREIGN         UINT64_MAX
/* What the template has everywhere */
#define TAG_TEMPLATE        (1ULL << 36)

/* Fill @sectors sectors from guest sector @first with @tag */
void image_fill(uint8_t *buf, uint64_t first, unsigned sectors, uint64_t tag);
/* Whose is this sector? */
uint64_t image_tag(const uint8_t *buf, uint64_t sector);

/* Create an image with 16 KiB clusters and a journal of 1 MiB */
void coroutine_fn image_create(ThinvmSim *sim, uint64_t virtual_size);
/* The same for one whose clusters can be marked as the template's */
void coroutine_fn image_create_clone(ThinvmSim *sim, uint64_t virtual_size);
/* Open and begin writing with an epoch above what the journal has */
ThinvmStore *coroutine_fn image_open(ThinvmSim *sim);

/*
 * Write parts [@part, @part + @nb) of guest cluster @guest.  Callers see to
 * it that nothing else changes the allocation of this cluster meanwhile.
 * 0 or negative errno; *ticket as of thinvm_store_execute(), 0 if no
 * operation was needed.
 */
int coroutine_fn image_write(ThinvmSim *sim, ThinvmStore *st, uint64_t guest,
                             unsigned part, unsigned nb, uint64_t tag,
                             uint64_t *ticket);
/*
 * The same when all these parts are valid and the cluster is private: such a
 * write excludes nobody (io-write.c, WRITE_IN_PLACE).  -EAGAIN if not so, or
 * if somebody may be copying a cluster: *@copiers.
 */
int coroutine_fn image_overwrite(ThinvmSim *sim, ThinvmStore *st,
                                 uint64_t guest, unsigned part, unsigned nb,
                                 uint64_t tag, const unsigned *copiers);
/* Map @count clusters with one operation, all of them written with @tag */
int coroutine_fn image_write_clusters(ThinvmSim *sim, ThinvmStore *st,
                                      uint64_t guest, uint64_t count,
                                      uint64_t tag, uint64_t *ticket);
/* The same with the template's data, marked */
int coroutine_fn image_copy_template(ThinvmSim *sim, ThinvmStore *st,
                                     uint64_t guest, uint64_t count,
                                     uint64_t *ticket);
/* Take a mark away so that the cluster may be written in place; alone */
int coroutine_fn image_unmark(ThinvmStore *st, uint64_t guest);
/* Read one guest cluster, as a guest would; @buf: IMAGE_CLUSTER bytes */
int coroutine_fn image_read(ThinvmSim *sim, ThinvmStore *st, uint64_t guest,
                            uint8_t *buf);
/* The same in a snapshot, whose root this is */
int coroutine_fn image_read_root(ThinvmSim *sim, ThinvmStore *st,
                                 const ThinvmPointer *root, uint64_t guest,
                                 uint8_t *buf);
/* The same while nobody writes; what is marked is the template's, or -EIO */
int coroutine_fn image_read_both(ThinvmSim *sim, ThinvmStore *st,
                                 const ThinvmPointer *root, uint64_t guest,
                                 uint8_t *buf);
/* Tag of the first sector of the cluster */
uint64_t coroutine_fn image_read_tag(ThinvmSim *sim, ThinvmStore *st,
                                     uint64_t guest);
/* Read as one who follows another owner: what was freed meanwhile is read
 * again */
int coroutine_fn image_follow(ThinvmSim *sim, ThinvmStore *st, uint64_t guest,
                              uint8_t *buf);
/* thinvm_store_check() finds nothing wrong.  Aborts if it does */
void coroutine_fn image_check(ThinvmStore *st);

/*
 * The next image_overwrite(), image_read() or image_follow() lets so many
 * turns pass between its look-up and its I/O, and the next image_write() that
 * copies between its read and its write.
 */
extern unsigned image_dawdle;
/* The next image_read() or image_follow() reads what is marked from the
 * template */
extern bool image_by_template;

/* Rules that these helpers can be made to break, for tests of the tests */
typedef enum ImageFault {
    IMAGE_FAULT_NONE,
    IMAGE_FAULT_EPOCH,          /* requests do not join an epoch */
    IMAGE_FAULT_ORDER,          /* the mapping first, then the data */
    IMAGE_FAULT_FOLLOW,         /* no second catch-up behind a read */
    IMAGE_FAULT_COPY,           /* writes in place do not heed copiers */
    IMAGE_FAULT_MOVE,           /* compaction does not tell writers of it */
    IMAGE_FAULT_TOUCH,          /* writes do not ask for checksums of data */
    IMAGE_FAULT_UNMARK,         /* a mark's end is not durable before data */
    IMAGE_FAULT_HIDDEN,         /* another reader's catch-up hides a change */
} ImageFault;
extern ImageFault image_fault;

/*
 * Recount: every cluster that the disk's tree maps has count 1 and is mapped
 * once, and every other has 0, or is metadata.  Aborts if not.  No request
 * may be running; there are no snapshots.
 */
void coroutine_fn image_recount(ThinvmSim *sim, ThinvmStore *st);

#endif
