/*
 * Unit tests: records that vouch for their data by checksums
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Single steps of block/thinvm/sums.c and of replaying what it leaves, each a
 * coroutine on a simulated device of its own.  Power cuts at every point under
 * random load are test-thinvm-crash.c's subject.
 */
#include "qemu/osdep.h"
#include "thinvm-store-test.h"

/* Guest clusters; far apart, so that no operation is joined to another */
#define A   10
#define B   1000
#define C   2000

static void coroutine_fn write_and_flush(ThinvmSim *sim, ThinvmStore *st,
                                         uint64_t guest, uint64_t tag)
{
    g_assert_cmpint(write_one(sim, st, guest, tag), ==, 0);
    g_assert_cmpint(flush_guest(st), ==, 0);
}

/* The image, with all that opening owes already done */
static ThinvmStore *coroutine_fn begin(ThinvmSim *sim)
{
    ThinvmStore *st;

    image_create(sim, VIRTUAL_SIZE);
    st = image_open(sim);
    g_assert_cmpint(flush(st), ==, 0);
    return st;
}

/* Where on the device a guest cluster is */
static uint64_t coroutine_fn place_of(ThinvmStore *st, uint64_t guest)
{
    ThinvmMapping m;

    g_assert_cmpint(thinvm_store_lookup(st, THINVM_TREE_DISK, NULL, guest, 1,
                                        false, &m), ==, 0);
    g_assert_cmpint(m.type, ==, THINVM_MAPPING_DATA);
    return m.physical * IMAGE_CLUSTER;
}

/* ------------------------------------------------------------------ */
/* What a flush costs                                                  */

static void coroutine_fn test_one_flush(ThinvmSim *sim)
{
    ThinvmStore *st = begin(sim);
    uint64_t flushes = sim_count(sim, SIM_FLUSH);
    uint64_t records = stats_of(st).records;

    for (int i = 0; i < 10; i++) {
        write_and_flush(sim, st, A + i * 10, 1 + i);
    }
    g_assert_cmpuint(sim_count(sim, SIM_FLUSH), ==, flushes + 10);
    g_assert_cmpuint(stats_of(st).records, ==, records + 10);
    g_assert_cmpuint(st->nb_summed, ==, 10);
    store_die(st);
    st = image_open(sim);
    for (int i = 0; i < 10; i++) {
        g_assert_cmpuint(image_read_tag(sim, st, A + i * 10), ==, 1 + i);
    }
    image_check(st);
    store_close(st, true);
}

/* A durable commit puts a record behind the last one; a second is for nothing */
static void coroutine_fn test_settle(ThinvmSim *sim)
{
    ThinvmStore *st = begin(sim);
    uint64_t flushes, records;

    write_and_flush(sim, st, A, 1);
    flushes = sim_count(sim, SIM_FLUSH);
    records = stats_of(st).records;
    for (int i = 0; i < 2; i++) {
        thinvm_store_commit(st, THINVM_COMMIT_DURABLE, true);
        g_assert_cmpuint(sim_count(sim, SIM_FLUSH), ==, flushes + 1);
        g_assert_cmpuint(stats_of(st).records, ==, records + 1);
    }
    g_assert_false(thinvm_store_touches(st));
    store_close(st, true);
}

/* More than a record has room for, and what is no small write of data */
static void coroutine_fn test_ordinary(ThinvmSim *sim)
{
    ThinvmStore *st = begin(sim);
    uint64_t flushes = sim_count(sim, SIM_FLUSH);

    for (int i = 0; i <= THINVM_SUMS_LIMIT; i++) {
        write_one(sim, st, A + 10 * i, 1 + i);
    }
    flush_guest(st);
    g_assert_cmpuint(sim_count(sim, SIM_FLUSH), ==, flushes + 2);
    write_one(sim, st, B, 2);
    thinvm_store_unmap(st, THINVM_TREE_DISK, A, 1, THINVM_SOURCE_ZERO, NULL,
                       &error_abort);
    flush_guest(st);
    g_assert_cmpuint(sim_count(sim, SIM_FLUSH), ==, flushes + 4);
    image_write_clusters(sim, st, C, 3, 3, NULL);
    flush_guest(st);
    g_assert_cmpuint(sim_count(sim, SIM_FLUSH), ==, flushes + 6);
    /* in write-through mode records are written before a flush */
    write_one(sim, st, B + 10, 4);
    thinvm_store_commit(st, THINVM_COMMIT_RECORD, true);
    g_assert_cmpuint(st->nb_summed, ==, 0);
    g_assert_false(thinvm_store_touches(st));
    store_close(st, true);
}

/* They are worth it after small commits, and not for who rewrites at once */
static void coroutine_fn test_wants(ThinvmSim *sim)
{
    ThinvmStore *st = begin(sim);
    unsigned copiers = 0;

    g_assert_false(thinvm_store_wants_sums(st));
    write_and_flush(sim, st, A, 1);
    g_assert_true(thinvm_store_wants_sums(st));
    image_overwrite(sim, st, A, 0, 1, 2, &copiers);
    g_assert_false(thinvm_store_wants_sums(st));
    for (int i = 1; i <= 17; i++) {
        g_assert_false(thinvm_store_wants_sums(st));
        write_and_flush(sim, st, A + 10 * i, 1);
    }
    g_assert_true(thinvm_store_wants_sums(st));
    for (int i = 0; i <= THINVM_SUMS_LIMIT; i++) {
        write_one(sim, st, B + 10 * i, 1);
    }
    g_assert_false(thinvm_store_wants_sums(st));
    flush_guest(st);
    g_assert_false(thinvm_store_wants_sums(st));
    store_close(st, true);
}

/* ------------------------------------------------------------------ */
/* Who writes there                                                    */

/* It still gathers operations: no checksums, and no waiting */
static void coroutine_fn test_spoiled(ThinvmSim *sim)
{
    ThinvmStore *st = begin(sim);
    uint64_t flushes = sim_count(sim, SIM_FLUSH);
    unsigned copiers = 0;

    write_one(sim, st, A, 1);
    write_one(sim, st, B, 1);
    g_assert_cmpint(image_overwrite(sim, st, A, 3, 1, 2, &copiers), ==, 0);
    g_assert_cmpuint(sim_count(sim, SIM_FLUSH), ==, flushes);
    flush_guest(st);
    g_assert_cmpuint(sim_count(sim, SIM_FLUSH), ==, flushes + 2);
    g_assert_cmpuint(st->nb_summed, ==, 0);
    /* other records have theirs again */
    write_and_flush(sim, st, C, 1);
    g_assert_cmpuint(st->nb_summed, ==, 1);
    store_close(st, true);
}

/* It is written: a record behind it is durable before the data change */
static void coroutine_fn test_touched(ThinvmSim *sim)
{
    ThinvmStore *st = begin(sim);
    unsigned copiers = 0;
    uint64_t flushes;

    write_and_flush(sim, st, A, 1);
    write_and_flush(sim, st, B, 1);
    flushes = sim_count(sim, SIM_FLUSH);
    /* the record of A has one behind it */
    image_overwrite(sim, st, A, 0, THINVM_PARTS, 2, &copiers);
    g_assert_cmpuint(sim_count(sim, SIM_FLUSH), ==, flushes);
    image_overwrite(sim, st, B, 0, THINVM_PARTS, 2, &copiers);
    g_assert_cmpuint(sim_count(sim, SIM_FLUSH), ==, flushes + 1);
    image_overwrite(sim, st, B, 0, THINVM_PARTS, 3, &copiers);
    g_assert_cmpuint(sim_count(sim, SIM_FLUSH), ==, flushes + 1);
    store_die(st);
    flip(sim, THINVM_JOURNAL_OFFSET - 1);       /* elsewhere: for nothing */
    st = image_open(sim);
    g_assert_cmpuint(image_read_tag(sim, st, A), ==, 2);
    g_assert_cmpuint(image_read_tag(sim, st, B), ==, 3);
    image_check(st);
    store_close(st, true);
}

/* The device fails: who wants to write hears of it, and nothing is lost */
static void coroutine_fn test_touch_fails(ThinvmSim *sim)
{
    ThinvmStore *st = begin(sim);
    unsigned copiers = 0;

    write_and_flush(sim, st, A, 1);
    sim_fail(sim, SIM_FLUSH, 0, UINT64_MAX, 0, EIO, true);
    g_assert_cmpint(image_overwrite(sim, st, A, 0, THINVM_PARTS, 2, &copiers),
                    ==, -EIO);
    g_assert_cmpuint(image_read_tag(sim, st, A), ==, 1);
    g_assert_cmpint(image_overwrite(sim, st, A, 0, THINVM_PARTS, 2, &copiers),
                    ==, 0);
    g_assert_cmpint(flush_guest(st), ==, 0);
    store_die(st);
    st = image_open(sim);
    g_assert_cmpuint(image_read_tag(sim, st, A), ==, 2);
    store_close(st, true);
}

/* A record with checksums that could not be written, or flushed, at first */
static void coroutine_fn test_repeated(ThinvmSim *sim)
{
    static const unsigned kinds[] = { SIM_WRITE, SIM_FLUSH };

    for (unsigned i = 0; i < ARRAY_SIZE(kinds); i++) {
        ThinvmStore *st = begin(sim);

        write_one(sim, st, A, 1);
        sim_fail(sim, kinds[i], 0, UINT64_MAX, 0, EIO, true);
        g_assert_cmpint(flush_guest(st), ==, -EIO);
        write_and_flush(sim, st, B, 1);
        g_assert_cmpint(flush(st), ==, 0);
        g_assert_false(thinvm_store_touches(st));
        write_and_flush(sim, st, C, 1);
        store_die(st);
        st = image_open(sim);
        g_assert_cmpuint(image_read_tag(sim, st, A), ==, 1);
        g_assert_cmpuint(image_read_tag(sim, st, B), ==, 1);
        g_assert_cmpuint(image_read_tag(sim, st, C), ==, 1);
        image_check(st);
        store_close(st, true);
    }
}

/* What follows a record that could not be written waits for its flush, too */
static void coroutine_fn test_order(ThinvmSim *sim)
{
    g_autofree uint8_t *buf = g_malloc(IMAGE_CLUSTER);
    ThinvmStore *st = begin(sim);

    image_write(sim, st, A, 0, 1, 1, NULL);
    sim_fail(sim, SIM_WRITE, 0, UINT64_MAX, 0, EIO, true);
    g_assert_cmpint(flush_guest(st), ==, -EIO);
    /* allocates nothing, so it does not look whether commits work again */
    image_write(sim, st, A, 5, 1, 2, NULL);
    g_assert_cmpint(flush_guest(st), ==, 0);
    store_die(st);
    st = image_open(sim);
    g_assert_cmpint(image_read(sim, st, A, buf), ==, 0);
    g_assert_cmpuint(image_tag(buf, A * IMAGE_SECTORS), ==, 1);
    g_assert_cmpuint(image_tag(buf + 5 * IMAGE_PART, A * IMAGE_SECTORS +
                               5 * IMAGE_PART / SIM_SECTOR), ==, 2);
    store_close(st, true);
}

/* ------------------------------------------------------------------ */
/* What counts                                                         */

/* Data that did not arrive end the journal, and never come back */
static void coroutine_fn test_lost(ThinvmSim *sim)
{
    ThinvmStore *st = begin(sim);
    uint64_t place;

    write_and_flush(sim, st, A, 1);
    write_and_flush(sim, st, B, 1);
    place = place_of(st, B);
    store_die(st);

    flip(sim, place + 700);
    st = image_open(sim);
    g_assert_cmpuint(image_read_tag(sim, st, A), ==, 1);
    g_assert_cmpuint(image_read_tag(sim, st, B), ==, TAG_ZERO);
    image_check(st);
    /* Who has seen the end here made that durable before anything else */
    g_assert_cmpuint(st->journal.flushed_sequence, ==,
                     st->journal.composed_sequence);
    store_die(st);
    flip(sim, place + 700);
    st = image_open(sim);
    g_assert_cmpuint(image_read_tag(sim, st, B), ==, TAG_ZERO);
    store_close(st, true);
}

/* Those of a record that is not the last one are not looked at */
static void coroutine_fn test_confirmed(ThinvmSim *sim)
{
    ThinvmStore *st = begin(sim);
    uint64_t place;

    write_and_flush(sim, st, A, 1);
    write_and_flush(sim, st, B, 1);
    place = place_of(st, A);
    store_die(st);
    flip(sim, place + 700);
    st = image_open(sim);
    g_assert_cmpuint(place_of(st, A), ==, place);
    g_assert_cmpuint(image_read_tag(sim, st, B), ==, 1);
    store_close(st, true);
}

/* Nor are any after a clean end, a hand-over, or a checkpoint */
static void coroutine_fn test_ends_settled(ThinvmSim *sim)
{
    for (int way = 0; way < 3; way++) {
        ThinvmStore *st = begin(sim);
        uint64_t place;

        write_and_flush(sim, st, A, 1);
        place = place_of(st, A);
        if (way == 0) {
            thinvm_store_end_writing(st, false, &error_abort);
        } else if (way == 1) {
            thinvm_store_hand_over(st, &error_abort);
        } else {
            thinvm_store_checkpoint(st);
            flip(sim, THINVM_SUPERBLOCK1_OFFSET + 20);  /* to the older one */
        }
        store_die(st);
        flip(sim, place + 700);
        st = image_open(sim);
        g_assert_cmpuint(place_of(st, A), ==, place);
        store_close(st, true);
    }
}

/* Put a record behind the last one that is right but for what it says of it */
static void put_next(ThinvmSim *sim, ThinvmStore *st, uint64_t flushed)
{
    uint8_t buf[SIM_BLOCK] = {};
    ThinvmRecord rec = {
        .epoch = st->journal.composed_epoch,
        .sequence = st->journal.composed_sequence + 1,
        .flushed_sequence = flushed,
        .previous_crc = st->journal.composed_crc,
        .length = sizeof(ThinvmRecordLe),
    };

    thinvm_record_encode(&st->uuid, buf, &rec);
    sim_poke(sim, head_of(st), SIM_BLOCK, buf);
}

/* The next record proves a record only if it says that it was flushed */
static void coroutine_fn test_proof(ThinvmSim *sim)
{
    for (unsigned back = 0; back < 2; back++) {
        ThinvmStore *st = begin(sim);
        uint64_t place, sequence;

        write_and_flush(sim, st, A, 1);
        place = place_of(st, A);
        sequence = st->journal.composed_sequence;
        put_next(sim, st, sequence - back);
        store_die(st);
        flip(sim, place + 700);
        st = thinvm_store_open(sim_device(sim), 0, &error_abort);
        g_assert_cmpuint(st->journal.composed_sequence, ==,
                         back ? sequence - 1 : sequence + 1);
        store_die(st);
        /* with right data it counts by itself, the next one does not */
        flip(sim, place + 700);
        st = thinvm_store_open(sim_device(sim), 0, &error_abort);
        g_assert_cmpuint(st->journal.composed_sequence, ==,
                         back ? sequence : sequence + 1);
        store_die(st);
    }
}

/* A follower does not go on believing what the device has lost since */
static void coroutine_fn test_follower(ThinvmSim *sim)
{
    ThinvmStore *st = begin(sim), *follower;
    uint64_t place;

    follower = thinvm_store_open(sim_attach(sim), 0, &error_abort);
    write_and_flush(sim, st, A, 1);
    thinvm_store_catch_up(follower, NULL, &error_abort);
    g_assert_cmpuint(image_read_tag(sim, follower, A), ==, 1);
    place = place_of(st, A);
    store_die(st);
    flip(sim, place + 700);
    thinvm_store_catch_up(follower, NULL, &error_abort);
    g_assert_cmpuint(image_read_tag(sim, follower, A), ==, TAG_ZERO);
    thinvm_store_begin_writing(follower, 9, &error_abort);
    image_check(follower);
    store_close(follower, true);
}

/* The owner goes on while we read the data: puts a record behind, and writes */
static struct {
    ThinvmSim *sim;
    ThinvmStore *owner;
    uint64_t place;
    int coroutine_fn (*co_pread)(ThinvmDevice *dev, uint64_t offset,
                                 uint64_t bytes, void *buf);
} meanwhile;

static int coroutine_fn pread_meanwhile(ThinvmDevice *dev, uint64_t offset,
                                        uint64_t bytes, void *buf)
{
    if (offset == meanwhile.place && meanwhile.owner) {
        put_next(meanwhile.sim, meanwhile.owner,
                 meanwhile.owner->journal.composed_sequence);
        flip(meanwhile.sim, meanwhile.place);
        meanwhile.owner = NULL;
    }
    return meanwhile.co_pread(dev, offset, bytes, buf);
}

static void coroutine_fn test_meanwhile(ThinvmSim *sim)
{
    ThinvmDevice *dev = sim_attach(sim);
    ThinvmStore *st = begin(sim), *reader;

    write_and_flush(sim, st, A, 1);
    meanwhile.sim = sim;
    meanwhile.owner = st;
    meanwhile.place = place_of(st, A);
    meanwhile.co_pread = dev->co_pread;
    dev->co_pread = pread_meanwhile;
    reader = thinvm_store_open(dev, 0, &error_abort);
    g_assert_null(meanwhile.owner);
    g_assert_cmpuint(place_of(reader, A), ==, meanwhile.place);
    g_assert_cmpuint(reader->journal.composed_sequence, ==,
                     st->journal.composed_sequence + 1);
    store_die(reader);
    store_die(st);
}

/* Of several records each would need its own */
static void coroutine_fn test_several(ThinvmSim *sim)
{
    ThinvmStore *st = begin(sim);
    uint64_t flushes = sim_count(sim, SIM_FLUSH);

    st->journal.record_limit = 128;     /* one operation */
    write_one(sim, st, A, 1);
    image_write_clusters(sim, st, C, 2, 1, NULL);
    g_assert_false(QSIMPLEQ_EMPTY(&st->journal.sealed));
    g_assert_cmpint(flush_guest(st), ==, 0);
    g_assert_cmpuint(sim_count(sim, SIM_FLUSH), ==, flushes + 2);
    g_assert_cmpuint(st->nb_summed, ==, 0);
    store_close(st, true);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    qemu_init_main_loop(&error_abort);
    module_call_init(MODULE_INIT_TRACE);
    add("/thinvm/sums/one-flush", test_one_flush);
    add("/thinvm/sums/settle", test_settle);
    add("/thinvm/sums/ordinary", test_ordinary);
    add("/thinvm/sums/wants", test_wants);
    add("/thinvm/sums/spoiled", test_spoiled);
    add("/thinvm/sums/touched", test_touched);
    add("/thinvm/sums/touch-fails", test_touch_fails);
    add("/thinvm/sums/repeated", test_repeated);
    add("/thinvm/sums/order", test_order);
    add("/thinvm/sums/lost", test_lost);
    add("/thinvm/sums/confirmed", test_confirmed);
    add("/thinvm/sums/ends-settled", test_ends_settled);
    add("/thinvm/sums/proof", test_proof);
    add("/thinvm/sums/follower", test_follower);
    add("/thinvm/sums/meanwhile", test_meanwhile);
    add("/thinvm/sums/several", test_several);
    return g_test_run();
}
