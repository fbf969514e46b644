/*
 * A disk in memory whose writes wait until a test lets them through
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * For unit tests that link QEMU's block layer.
 */

#ifndef THINVM_GATE_DISK_H
#define THINVM_GATE_DISK_H

#include "block/block_int.h"

#define GATE_PAGE 4096

/* Where requests wait while it is closed */
typedef struct Gate {
    bool closed;
    int tickets;            /* so many may pass all the same */
    int begun, held;
    CoQueue waiting;
} Gate;

typedef struct GateDisk {
    int64_t length;
    QemuMutex lock;
    GHashTable *pages;      /* number -> GATE_PAGE bytes */
    Gate writes, flushes;
    int fails;              /* the next write, with this */
    int fails_discard;      /* each discard, when it has been done */
    bool keeps_discarded;   /* a discard changes nothing */
    void (*look)(void);     /* when a write begins */
} GateDisk;

BlockDriverState *gate_disk_new(const char *name, int64_t length,
                                GateDisk **d);

void gate_open(GateDisk *d, Gate *g);
void gate_close(GateDisk *d, Gate *g);
/* One that waits goes through; if none does, the next that comes */
void gate_let_one(GateDisk *d, Gate *g);
int gate_held(GateDisk *d, const Gate *g);
int gate_begun(GateDisk *d, const Gate *g);

/* Past the block layer */
void gate_disk_fill(GateDisk *d, int64_t offset, int64_t bytes, uint8_t byte);
uint8_t gate_disk_byte(GateDisk *d, int64_t offset);
void gate_disk_assert_same(GateDisk *a, GateDisk *b);

#endif
