/*
 * Guest data on an image on a simulated device: helpers of unit tests
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See thinvm-sim-image.h.
 */
#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qemu/cutils.h"
#include "thinvm-sim-image.h"
#include "block/thinvm/store-int.h"

ImageFault image_fault;
unsigned image_dawdle;
bool image_by_template;

static void coroutine_fn dawdle(ThinvmSim *sim, unsigned turns)
{
    while (turns--) {
        sim_yield(sim);
    }
}

static unsigned take_dawdle(void)
{
    unsigned turns = image_dawdle;

    if (turns) {
        image_dawdle = 0;
    }
    return turns;
}

static unsigned request_begin(ThinvmStore *st)
{
    return image_fault == IMAGE_FAULT_EPOCH ? UINT_MAX :
           thinvm_store_request_begin(st);
}

static void request_end(ThinvmStore *st, unsigned token)
{
    if (token != UINT_MAX) {
        thinvm_store_request_end(st, token);
    }
}

void image_fill(uint8_t *buf, uint64_t first, unsigned sectors, uint64_t tag)
{
    for (unsigned i = 0; i < sectors; i++) {
        for (unsigned j = 0; j < SIM_SECTOR; j += 16) {
            stq_le_p(buf + i * SIM_SECTOR + j, tag);
            stq_le_p(buf + i * SIM_SECTOR + j + 8,
                     tag ? (first + i) ^ tag << 20 : 0);
        }
    }
}

uint64_t image_tag(const uint8_t *buf, uint64_t sector)
{
    uint8_t expected[SIM_SECTOR];
    uint64_t tag = ldq_le_p(buf);

    image_fill(expected, sector, 1, tag);
    return memcmp(expected, buf, SIM_SECTOR) ? TAG_FOREIGN : tag;
}

static void coroutine_fn create(ThinvmSim *sim, uint64_t virtual_size,
                                bool template)
{
    ThinvmCreateParams params = {
        .virtual_size = virtual_size,
        .template.length = template ? virtual_size : 0,
        .cluster_size = IMAGE_CLUSTER,
        .journal_size = 1 * MiB,
    };

    thinvm_store_create(sim_device(sim), &params, &error_abort);
}

void coroutine_fn image_create(ThinvmSim *sim, uint64_t virtual_size)
{
    create(sim, virtual_size, false);
}

void coroutine_fn image_create_clone(ThinvmSim *sim, uint64_t virtual_size)
{
    create(sim, virtual_size, true);
}

static uint64_t current_epoch(ThinvmStore *st)
{
    ThinvmInfoState info;

    thinvm_state_lock(thinvm_store_state(st));
    thinvm_state_info(thinvm_store_state(st), &info);
    thinvm_state_unlock(thinvm_store_state(st));
    return info.epoch;
}

ThinvmStore *coroutine_fn image_open(ThinvmSim *sim)
{
    ThinvmStore *st = thinvm_store_open(sim_device(sim), 0, &error_abort);

    thinvm_store_begin_writing(st, current_epoch(st) + 1, &error_abort);
    return st;
}

/* @sum: filled with the checksum, or NULL */
static int coroutine_fn write_device(ThinvmStore *st, uint64_t offset,
                                     uint64_t bytes, const uint8_t *buf,
                                     ThinvmDataSum *sum)
{
    int ret = image_fault == IMAGE_FAULT_TOUCH ? 0 :
              thinvm_store_touch(st, offset, bytes);

    if (sum) {
        thinvm_store_sum(st, offset, buf, bytes, sum);
    }
    return ret < 0 ? ret : st->dev->co_pwrite(st->dev, offset, bytes, buf);
}

static int coroutine_fn write_data(ThinvmStore *st, uint64_t guest,
                                   uint64_t physical, unsigned part,
                                   unsigned nb, uint64_t tag,
                                   ThinvmDataSum *sum)
{
    g_autofree uint8_t *buf = g_malloc(nb * IMAGE_PART);
    uint64_t first = guest * IMAGE_SECTORS + part * (IMAGE_PART / SIM_SECTOR);

    image_fill(buf, first, nb * IMAGE_PART / SIM_SECTOR, tag);
    return write_device(st, physical * IMAGE_CLUSTER + part * IMAGE_PART,
                        nb * IMAGE_PART, buf, sum);
}

/*
 * The same for a cluster that a snapshot shares: all of it, with what the old
 * one has
 */
static int coroutine_fn write_copy(ThinvmSim *sim, ThinvmStore *st,
                                   const ThinvmMapping *old,
                                   uint64_t physical, unsigned part,
                                   unsigned nb, uint64_t tag, unsigned turns,
                                   ThinvmDataSum *sum)
{
    ThinvmDevice *dev = st->dev;
    g_autofree uint8_t *buf = g_malloc(IMAGE_CLUSTER);
    uint64_t first = old->guest * IMAGE_SECTORS +
                     part * (IMAGE_PART / SIM_SECTOR);
    int ret = dev->co_pread(dev, old->physical * IMAGE_CLUSTER, IMAGE_CLUSTER,
                            buf);

    if (ret == 0) {
        dawdle(sim, turns);
        image_fill(buf + part * IMAGE_PART, first, nb * IMAGE_PART / SIM_SECTOR,
                   tag);
        ret = write_device(st, physical * IMAGE_CLUSTER, IMAGE_CLUSTER, buf,
                           sum);
    }
    return ret;
}

static int coroutine_fn write_new(ThinvmSim *sim, ThinvmStore *st,
                                  const ThinvmMapping *old, unsigned part,
                                  unsigned nb, uint64_t tag, unsigned turns,
                                  uint64_t *ticket)
{
    ThinvmOp op = {
        .type = THINVM_OP_MAP,
        .guest = old->guest,
        .count = 1,
        .valid = MAKE_64BIT_MASK(part, nb),
        .source = THINVM_SOURCE_ZERO,
    };
    bool copy = old->type == THINVM_MAPPING_DATA;
    ThinvmDataSum sum;
    uint64_t got;
    int ret;

    if (copy) {
        op.valid |= old->valid;
    }
    if (op.valid == THINVM_ALL_VALID) {
        op.source = THINVM_SOURCE_BACKING;
    }
    ret = thinvm_store_reserve(st, 0, 1, &op.physical, &got);
    if (ret < 0) {
        return ret;
    }
    if (image_fault == IMAGE_FAULT_ORDER) {
        ret = thinvm_store_execute(st, &op, ticket, NULL);
    }
    if (ret == 0) {
        ret = copy ? write_copy(sim, st, old, op.physical, part, nb, tag,
                                turns, &sum) :
              write_data(st, old->guest, op.physical, part, nb, tag, &sum);
    }
    if (ret == 0 && image_fault != IMAGE_FAULT_ORDER) {
        ret = thinvm_store_execute_summed(st, &op, &sum, ticket, NULL);
    }
    if (ret < 0) {
        thinvm_store_unreserve(st, op.physical, 1);
    }
    return ret;
}

static int coroutine_fn write_mapped(ThinvmStore *st,
                                     const ThinvmMapping *m, unsigned part,
                                     unsigned nb, uint64_t tag,
                                     uint64_t *ticket)
{
    ThinvmOp op = {
        .type = THINVM_OP_VALIDATE,
        .guest = m->guest,
        .physical = m->physical,
        .valid = MAKE_64BIT_MASK(part, nb),
    };
    ThinvmDataSum sum;
    int ret = write_data(st, m->guest, m->physical, part, nb, tag, &sum);

    /* What is valid already may be overwritten by others at any time */
    if (ret == 0 && (m->valid & op.valid) != op.valid) {
        ret = thinvm_store_execute_summed(st, &op, m->valid & op.valid ?
                                          NULL : &sum, ticket, NULL);
    }
    return ret;
}

int coroutine_fn image_write(ThinvmSim *sim, ThinvmStore *st, uint64_t guest,
                             unsigned part, unsigned nb, uint64_t tag,
                             uint64_t *ticket)
{
    unsigned token = request_begin(st), turns = take_dawdle();
    ThinvmMapping m;
    uint64_t dummy;
    int ret;

    ticket = ticket ?: &dummy;
    *ticket = 0;
    ret = thinvm_store_lookup(st, THINVM_TREE_DISK, NULL, guest, 1, true, &m);
    if (ret == 0) {
        if (m.type == THINVM_MAPPING_DATA && !m.shared) {
            ret = write_mapped(st, &m, part, nb, tag, ticket);
        } else {
            ret = write_new(sim, st, &m, part, nb, tag, turns, ticket);
        }
    }
    request_end(st, token);
    return ret;
}

int coroutine_fn image_overwrite(ThinvmSim *sim, ThinvmStore *st,
                                 uint64_t guest, unsigned part, unsigned nb,
                                 uint64_t tag, const unsigned *copiers)
{
    unsigned token = request_begin(st);
    unsigned turns = take_dawdle();
    uint16_t parts = MAKE_64BIT_MASK(part, nb);
    ThinvmMapping m;
    int ret;

    ret = thinvm_store_lookup(st, THINVM_TREE_DISK, NULL, guest, 1, true, &m);
    if (ret == 0 && (m.type != THINVM_MAPPING_DATA || m.shared ||
                     (m.valid & parts) != parts ||
                     (*copiers && image_fault != IMAGE_FAULT_COPY))) {
        ret = -EAGAIN;
    }
    if (ret == 0) {
        dawdle(sim, turns);
        ret = write_data(st, guest, m.physical, part, nb, tag, NULL);
    }
    request_end(st, token);
    return ret;
}

static int coroutine_fn map_clusters(ThinvmStore *st, uint64_t guest,
                                     uint64_t count, uint64_t tag,
                                     ThinvmSource source, uint64_t *ticket)
{
    unsigned token = request_begin(st);
    uint64_t dummy;
    int ret = 0;

    while (count && ret == 0) {
        ThinvmOp op = {
            .type = THINVM_OP_MAP,
            .guest = guest,
            .valid = THINVM_ALL_VALID,
            .source = source,
        };

        uint64_t max = MIN(count, THINVM_ENTRIES_PER_LEAF -
                           guest % THINVM_ENTRIES_PER_LEAF);

        ret = thinvm_store_reserve(st, 0, max, &op.physical, &op.count);
        if (ret < 0) {
            break;
        }
        for (uint64_t i = 0; i < op.count && ret == 0; i++) {
            ret = write_data(st, guest + i, op.physical + i, 0, THINVM_PARTS,
                             tag, NULL);
        }
        if (ret == 0) {
            ret = thinvm_store_execute(st, &op, ticket ?: &dummy, NULL);
        }
        if (ret < 0) {
            thinvm_store_unreserve(st, op.physical, op.count);
        }
        guest += op.count;
        count -= op.count;
    }
    request_end(st, token);
    return ret;
}

int coroutine_fn image_write_clusters(ThinvmSim *sim, ThinvmStore *st,
                                      uint64_t guest, uint64_t count,
                                      uint64_t tag, uint64_t *ticket)
{
    return map_clusters(st, guest, count, tag, THINVM_SOURCE_BACKING, ticket);
}

int coroutine_fn image_copy_template(ThinvmSim *sim, ThinvmStore *st,
                                     uint64_t guest, uint64_t count,
                                     uint64_t *ticket)
{
    return map_clusters(st, guest, count, TAG_TEMPLATE, THINVM_SOURCE_TEMPLATE,
                        ticket);
}

int coroutine_fn image_unmark(ThinvmStore *st, uint64_t guest)
{
    unsigned token = request_begin(st);
    ThinvmOp op = {
        .type = THINVM_OP_VALIDATE,
        .guest = guest,
        .valid = THINVM_ALL_VALID,
    };
    ThinvmMapping m;
    uint64_t ticket;
    int ret;

    ret = thinvm_store_lookup(st, THINVM_TREE_DISK, NULL, guest, 1, true, &m);
    if (ret == 0 && m.source == THINVM_SOURCE_TEMPLATE) {
        op.physical = m.physical;
        ret = thinvm_store_execute(st, &op, &ticket, NULL);
        if (ret == 0 && image_fault != IMAGE_FAULT_UNMARK) {
            ret = thinvm_store_commit(st, THINVM_COMMIT_DURABLE, false);
        }
    }
    request_end(st, token);
    return ret;
}

static void template_read(uint64_t guest, uint8_t *buf)
{
    image_fill(buf, guest * IMAGE_SECTORS, IMAGE_SECTORS, TAG_TEMPLATE);
}

int coroutine_fn image_read_both(ThinvmSim *sim, ThinvmStore *st,
                                 const ThinvmPointer *root, uint64_t guest,
                                 uint8_t *buf)
{
    g_autofree uint8_t *other = g_malloc(IMAGE_CLUSTER);
    int ret = image_read_root(sim, st, root, guest, buf);

    if (ret == 0) {
        image_by_template = true;
        ret = image_read_root(sim, st, root, guest, other);
    }
    return ret == 0 && memcmp(buf, other, IMAGE_CLUSTER) ? -EIO : ret;
}

int coroutine_fn image_read_root(ThinvmSim *sim, ThinvmStore *st,
                                 const ThinvmPointer *root, uint64_t guest,
                                 uint8_t *buf)
{
    unsigned token = request_begin(st);
    unsigned turns = take_dawdle();
    bool by_template = image_by_template;
    ThinvmMapping m;
    int ret;

    if (by_template) {
        image_by_template = false;      /* never set where there are threads */
    }
    ret = thinvm_store_lookup(st, THINVM_TREE_DISK, root, guest, 1, false, &m);
    dawdle(sim, turns);
    memset(buf, 0, IMAGE_CLUSTER);
    if (ret == 0 && by_template && m.source == THINVM_SOURCE_TEMPLATE) {
        template_read(guest, buf);
    } else if (ret == 0 && m.type == THINVM_MAPPING_DATA) {
        ret = st->dev->co_pread(st->dev, m.physical * IMAGE_CLUSTER,
                                IMAGE_CLUSTER, buf);
        for (unsigned i = 0; i < THINVM_PARTS; i++) {
            if (!(m.valid & 1 << i)) {
                memset(buf + i * IMAGE_PART, 0, IMAGE_PART);
            }
        }
    }
    request_end(st, token);
    return ret;
}

int coroutine_fn image_read(ThinvmSim *sim, ThinvmStore *st, uint64_t guest,
                            uint8_t *buf)
{
    return image_read_root(sim, st, NULL, guest, buf);
}

int coroutine_fn image_follow(ThinvmSim *sim, ThinvmStore *st, uint64_t guest,
                              uint8_t *buf)
{
    unsigned turns = take_dawdle();
    bool by_template = image_by_template;

    for (;;) {
        bool changed = false, repeat;
        uint64_t changes;
        unsigned token;
        int ret, end = 0;

        /* joined before: a state that is replaced stays as long */
        token = thinvm_store_request_begin(st);
        ret = thinvm_store_catch_up(st, NULL, NULL);
        changes = thinvm_store_changes(st);
        if (ret == 0) {
            image_dawdle = turns;
            image_by_template = by_template;
            ret = image_read(sim, st, guest, buf);
        }
        /* also when reading fails: perhaps it was moved, and cut off there */
        if (image_fault != IMAGE_FAULT_FOLLOW) {
            end = thinvm_store_catch_up(st, &changed, NULL);
        }
        /* by whomever: our own catch-up may have found nothing left to do */
        repeat = image_fault == IMAGE_FAULT_HIDDEN ? changed :
                 changes != thinvm_store_changes(st);
        thinvm_store_request_end(st, token);
        if (end < 0 || !repeat) {
            return ret < 0 ? ret : end;
        }
    }
}

uint64_t coroutine_fn image_read_tag(ThinvmSim *sim, ThinvmStore *st,
                                     uint64_t guest)
{
    g_autofree uint8_t *buf = g_malloc(IMAGE_CLUSTER);

    g_assert_cmpint(image_read(sim, st, guest, buf), ==, 0);
    return image_tag(buf, guest * IMAGE_SECTORS);
}

static void image_report(void *opaque, const char *message)
{
    g_printerr("check: %s\n", message);
}

void coroutine_fn image_check(ThinvmStore *st)
{
    ThinvmCheckResult result = {};

    thinvm_store_check(st, 0, image_report, NULL, &result, &error_abort);
    g_assert_cmpuint(result.corruptions, ==, 0);
    g_assert_cmpuint(result.leaks, ==, 0);
    g_assert_cmpuint(result.check_errors, ==, 0);
}

/* ------------------------------------------------------------------ */

static void coroutine_fn count_mappings(ThinvmStore *st, uint64_t clusters,
                                        uint8_t *found, uint64_t max)
{
    for (uint64_t guest = 0; guest < clusters;) {
        ThinvmMapping m;

        g_assert_cmpint(thinvm_store_lookup(st, THINVM_TREE_DISK, NULL, guest,
                                            clusters - guest, false, &m),
                        ==, 0);
        g_assert(m.count > 0 && m.guest == guest);
        for (uint64_t i = 0; m.type == THINVM_MAPPING_DATA && i < m.count;
             i++) {
            g_assert_cmpuint(m.physical + i, <, max);
            found[m.physical + i]++;
        }
        guest += m.count;
    }
}

static uint16_t coroutine_fn cluster_count(ThinvmStore *st, uint64_t cluster)
{
    ThinvmState *s = thinvm_store_state(st);
    ThinvmNeeds needs;
    uint16_t count = 0;
    int ret;

    thinvm_needs_init(&needs);
    for (;;) {
        thinvm_state_lock(s);
        ret = thinvm_state_cluster_count(s, cluster, &count, &needs);
        thinvm_state_unlock(s);
        if (ret != -EAGAIN) {
            break;
        }
        thinvm_store_read_wanted(st, s, &needs, &error_abort);
    }
    thinvm_state_lock(s);
    thinvm_needs_destroy(s, &needs);
    thinvm_state_unlock(s);
    g_assert_cmpint(ret, ==, 0);
    return count;
}

void coroutine_fn image_recount(ThinvmSim *sim, ThinvmStore *st)
{
    g_autofree uint8_t *found = NULL;
    ThinvmState *s = thinvm_store_state(st);
    ThinvmInfoState info;
    uint64_t allocated = 0;

    thinvm_state_lock(s);
    thinvm_state_info(s, &info);
    thinvm_state_unlock(s);
    found = g_malloc0(info.device_clusters);
    count_mappings(st, DIV_ROUND_UP(info.virtual_size, IMAGE_CLUSTER), found,
                   info.device_clusters);
    for (uint64_t i = 0; i < info.device_clusters; i++) {
        uint16_t count = cluster_count(st, i);

        if (count == THINVM_COUNT_METADATA) {
            g_assert_cmpuint(found[i], ==, 0);
        } else {
            g_assert_cmpuint(count, ==, found[i]);
            g_assert_cmpuint(found[i], <=, 1);
        }
        allocated += found[i];
    }
    g_assert_cmpuint(allocated, ==, info.allocated_clusters);
}
