/*
 * A simulated device with a volatile write cache, for thinvm's unit tests
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * What it models:
 *  - Sectors of 512 bytes are written whole or not at all; anything larger
 *    may be torn.
 *  - A completed write is visible at once, but durable only when a flush that
 *    was issued after its completion has succeeded.
 *  - At a power cut every write that is not durable, in flight or completed,
 *    is kept, dropped or torn, independently and in any order; so are the
 *    sectors of a discard.
 *  - The device is not blank: each sector starts as the bytes of an earlier
 *    tenant, which no guest must ever see.
 *  - A discarded sector reads as zeroes, as before, or as garbage.
 *  - Each I/O waits until the scheduler picks it, so that concurrent
 *    coroutines interleave in an order that the seed decides.
 *
 *  - Several hosts may have it open (sim_attach()); one can be fenced off, and
 *    what it had in flight then arrives, is torn, or is lost.
 *  - It can be made to break a promise on purpose (sim_set_fault()): a test
 *    that does not notice proves nothing.
 *
 * (No write asks for FUA: the store flushes, and for a guest's FUA QEMU does.)
 *
 * Everything is deterministic: the same seed gives the same run (as long as
 * nobody sleeps by the clock).
 */
#ifndef TESTS_UNIT_THINVM_SIM_H
#define TESTS_UNIT_THINVM_SIM_H

#include "qemu/coroutine.h"
#include "block/thinvm/store.h"

#define SIM_SECTOR  512
#define SIM_BLOCK   4096

typedef struct ThinvmSim ThinvmSim;

typedef enum SimKind {
    SIM_READ = 1,
    SIM_WRITE = 2,
    SIM_FLUSH = 4,
    SIM_DISCARD = 8,
    SIM_GROW = 16,
} SimKind;

/* Random numbers that depend on nothing but the seed */
typedef struct SimRandom {
    uint64_t state;
} SimRandom;

uint64_t sim_random(SimRandom *r);
/* 0 to @below - 1 */
uint64_t sim_random_below(SimRandom *r, uint64_t below);
/* true in @percent of 100 cases */
bool sim_random_chance(SimRandom *r, unsigned percent);

/*
 * A device of @length bytes that can be grown to @max_length (both multiples
 * of 4 KiB).
 */
ThinvmSim *sim_new(uint64_t seed, uint64_t length, uint64_t max_length);
void sim_free(ThinvmSim *sim);
ThinvmDevice *sim_device(ThinvmSim *sim);
SimRandom *sim_rng(ThinvmSim *sim);

/* What a cut does to writes that are not durable */
typedef enum SimCut {
    SIM_CUT_POWER,              /* chance decides, for each of them */
    SIM_CUT_NOTHING,            /* all are lost */
    SIM_CUT_ALL,                /* all arrive, those in flight too */
    SIM_CUT_PROCESS,            /* only the process dies: completed writes
                                   stay, for those in flight chance decides */
    SIM_CUT__MAX
} SimCut;

/* A copy of what the device may look like after a cut now */
ThinvmSim *sim_cut(ThinvmSim *sim, uint64_t seed, SimCut kind);
/* The same to the device itself, while hosts go on that only read */
void sim_power_cycle(ThinvmSim *sim);

/*
 * Another host's access to the same device; lives as long as @sim.
 */
ThinvmDevice *sim_attach(ThinvmSim *sim);
/*
 * What @dev has in flight ends with -EIO, having arrived or not; so does
 * all that it tries later.  Outside coroutines.
 */
void sim_fence(ThinvmSim *sim, ThinvmDevice *dev);

/* Promises that a device can be made to break */
typedef enum SimFault {
    SIM_FAULT_NONE,
    SIM_FAULT_FLUSH,            /* says that it has flushed and has not */
    SIM_FAULT_TEAR,             /* tears inside of sectors */
    SIM_FAULT_DISCARD,          /* a discard lands after its completion */
    SIM_FAULT_FENCE,            /* lets writes of the fenced one through */
    SIM_FAULT__MAX
} SimFault;
void sim_set_fault(ThinvmSim *sim, SimFault fault);

/*
 * Fail the @nth I/O from now (0: the next) of the kinds in @kinds that
 * touches [@start, @end), with -@error; all that follow too unless @once.
 * One rule at a time; @kinds 0 removes it.
 */
void sim_fail(ThinvmSim *sim, unsigned kinds, uint64_t start, uint64_t end,
              unsigned nth, int error, bool once);
/* Has the rule failed anything? */
bool sim_has_failed(ThinvmSim *sim);
/*
 * When a flush fails, writes to [@start, @end) that were not durable may be
 * lost from the cache.
 */
void sim_set_lossy(ThinvmSim *sim, uint64_t start, uint64_t end);

/* Called before each I/O takes effect, outside coroutines */
void sim_set_hook(ThinvmSim *sim, void (*hook)(void *opaque), void *opaque);
/* I/Os of these kinds that have taken effect */
uint64_t sim_count(ThinvmSim *sim, unsigned kinds);
/* It takes space back in units of @bytes only, and says so.  Default 0: any */
void sim_set_discard_unit(ThinvmSim *sim, uint64_t bytes);
/* Discards that touched anything so far, in bytes */
uint64_t sim_discarded(ThinvmSim *sim);

/* Start @entry as a coroutine of this device's scheduler */
void sim_start(ThinvmSim *sim, CoroutineEntry *entry, void *opaque);
/* A coroutine that sim_start() began ends: call it last */
void sim_finish(ThinvmSim *sim);
/* Wait for one turn */
void coroutine_fn sim_yield(ThinvmSim *sim);
/* Until all coroutines have ended */
void sim_run(ThinvmSim *sim);
/* Until all have ended or @ios more I/Os took effect; false: not ended */
bool sim_run_some(ThinvmSim *sim, uint64_t ios);

/* What an administrator may do: make the device shorter, or longer */
void sim_truncate(ThinvmSim *sim, uint64_t length);
uint64_t sim_length(ThinvmSim *sim);
/* Access around the scheduler and the cache: durable at once */
void sim_peek(ThinvmSim *sim, uint64_t offset, uint64_t bytes, void *buf);
void sim_poke(ThinvmSim *sim, uint64_t offset, uint64_t bytes,
              const void *buf);

#endif
