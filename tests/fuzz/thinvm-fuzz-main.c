/*
 * thinvm's fuzzer without libFuzzer
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 *   thinvm-fuzz-main FILE...            run these inputs (coverage, debugger)
 *   thinvm-fuzz-main --seeds DIRECTORY  write the first inputs of a corpus
 *
 * For any compiler.  A seed is what the engine itself makes of an empty
 * device by some program, as another process finds it.
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/cutils.h"
#include "qemu/uuid.h"
#include "thinvm-fuzz-run.h"
#include "thinvm-fuzz-mutate.h"

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size);

/* The same seeds at each run: see run.py, --wrap */
void __wrap_qemu_uuid_generate(QemuUUID *uuid);

void __wrap_qemu_uuid_generate(QemuUUID *uuid)
{
    memset(uuid->data, 0x5a, sizeof(uuid->data));
}

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size)
{
    return size;                /* only libFuzzer mutates */
}

/* ------------------------------------------------------------------ */

typedef struct Seed {
    const char *name;
    unsigned cluster_bits;
    uint64_t virtual_size, device;
    const char *backing;
    /* Steps that make the image, and those that the input has */
    uint8_t make[100], program[100];
} Seed;

#define WRITE(guest, parts)     FUZZ_WRITE, 0, guest, 0, parts, (parts) ? 0 : 1
#define WRITE_FAR(guest)        FUZZ_WRITE, 4, guest, 0, 15, 0
#define RANGE(guest, count)     FUZZ_WRITE_RANGE, 0, guest, 0, count, 0
#define LEAF(leaf)              FUZZ_WRITE_RANGE, 4, leaf, 0, 255, 1
#define UNMAP(guest, count, z)  FUZZ_UNMAP, 0, guest, 0, count, 0, 0, z
#define COMMIT                  FUZZ_COMMIT, 1, 1
#define FLUSH                   FUZZ_COMMIT, FUZZ_AS_GUEST, 0

static const Seed seeds[] = {
    {
        .name = "empty", .cluster_bits = 16, .virtual_size = GiB,
        .device = 32 * MiB,
        .make = { 0 },
        .program = { WRITE(1, 255), COMMIT, FUZZ_CRASH, WRITE(1, 3),
                     UNMAP(0, 5, 1), FUZZ_CHECKPOINT, FUZZ_REPAIR, 2 },
    }, {
        .name = "journal", .cluster_bits = 14, .virtual_size = 64 * MiB,
        .device = 16 * MiB,
        .make = { WRITE(0, 255), RANGE(10, 20), COMMIT, WRITE_FAR(3), COMMIT,
                  UNMAP(12, 4, 1), COMMIT, WRITE(0, 7), FUZZ_INVALIDATE, 0, 10,
                  0, 1, 0, COMMIT, FUZZ_RESIZE, 0, 200, 0, 1, COMMIT },
        .program = { FUZZ_LOOKUP, 0, 0, 0, 1, WRITE(11, 0), FUZZ_FOLLOW,
                     COMMIT, FUZZ_FOLLOW, FUZZ_CRASH, FUZZ_CHECK },
    }, {
        .name = "bases", .cluster_bits = 14, .virtual_size = 512 * MiB,
        .device = 16 * MiB,
        .make = { RANGE(0, 40), WRITE_FAR(1), FUZZ_CHECKPOINT, WRITE_FAR(2),
                  UNMAP(5, 5, 0), FUZZ_CHECKPOINT, RANGE(50, 9), COMMIT },
        .program = { RANGE(3, 20), FUZZ_CHECKPOINT, FUZZ_RECLAIM, 1,
                     FUZZ_HOLD, UNMAP(0, 40, 1), COMMIT, FUZZ_RECLAIM, 1,
                     FUZZ_REOPEN, 1, FUZZ_REPAIR, 2 },
    }, {
        .name = "snapshots", .cluster_bits = 14, .virtual_size = 64 * MiB,
        .device = 16 * MiB,
        .make = { RANGE(0, 10), FUZZ_SNAPSHOT_CREATE, 1, WRITE(1, 1),
                  FUZZ_VMSTATE, 1, 0, FUZZ_SNAPSHOT_CREATE, 2,
                  FUZZ_CHECKPOINT, WRITE(2, 1), FUZZ_SNAPSHOT_CREATE, 3,
                  FUZZ_CHECKPOINT, WRITE(3, 1), COMMIT },
        .program = { FUZZ_SNAPSHOT_READ, 1, FUZZ_SNAPSHOT_DELETE, 0,
                     FUZZ_SNAPSHOT_GOTO, 1, WRITE(0, 1), COMMIT, FUZZ_CRASH,
                     FUZZ_SNAPSHOT_DELETE, 3, FUZZ_SNAPSHOT_DELETE, 2,
                     FUZZ_CHECK },
    }, {
        .name = "deleted", .cluster_bits = 14, .virtual_size = 64 * MiB,
        .device = 16 * MiB,
        .make = { RANGE(0, 5), FUZZ_SNAPSHOT_CREATE, 1, WRITE_FAR(1),
                  FUZZ_SNAPSHOT_CREATE, 2, FUZZ_SNAPSHOT_GOTO, 0,
                  FUZZ_SNAPSHOT_CREATE, 3, FUZZ_SNAPSHOT_DELETE, 0, COMMIT,
                  FUZZ_CHECKPOINT, FUZZ_SNAPSHOT_GOTO, 1, COMMIT },
        .program = { FUZZ_SNAPSHOT_DELETE, 1, FUZZ_SNAPSHOT_DELETE, 4,
                     COMMIT, FUZZ_CHECK, FUZZ_REPAIR, 2 },
    }, {
        .name = "runs", .cluster_bits = 14, .virtual_size = 64 * MiB,
        .device = 64 * MiB,
        .make = { FUZZ_MAP_RUN, 4, 1, 0, 0, FUZZ_MAP_RUN, 4, 2, 0, 1,
                  LEAF(3), FUZZ_CHECKPOINT, FUZZ_SNAPSHOT_CREATE, 1,
                  WRITE_FAR(1), WRITE_FAR(2), COMMIT },
        .program = { WRITE_FAR(3), FUZZ_UNMAP, 4, 1, 0, 0, 2, 1, 1,
                     FUZZ_CHECKPOINT, FUZZ_MAP_RUN, 4, 1, 0, 1, COMMIT,
                     FUZZ_CRASH, FUZZ_SNAPSHOT_DELETE, 0, FUZZ_CHECK },
    }, {
        .name = "backing", .cluster_bits = 16, .virtual_size = 100 * MiB + 512,
        .device = 32 * MiB, .backing = "base.img",
        .make = { WRITE(0, 1), UNMAP(8, 8, 1), FUZZ_CHECKPOINT,
                  FUZZ_SET_BACKING, 5, 0, COMMIT },
        .program = { FUZZ_SET_BACKING, 0, 0, WRITE(9, 1), FUZZ_CHECKPOINT,
                     FUZZ_REOPEN, 0, FUZZ_FAIL, 3, WRITE(10, 1), COMMIT },
    }, {
        .name = "large", .cluster_bits = 21,
        .virtual_size = 64ULL << 40, .device = 1ULL << 40,
        .make = { WRITE_FAR(200), FUZZ_WRITE, 3, 0, 0, 1, 0,
                  UNMAP(7, 255, 1), FUZZ_CHECKPOINT, WRITE(0, 1), COMMIT },
        .program = { FUZZ_UNMAP, 0, 0, 0, 255, 255, 4, 1, FUZZ_RESIZE, 5, 1,
                     0, 0, FUZZ_WRITE, 3, 0, 0, 1, 0, COMMIT, FUZZ_CRASH },
    }, {
        .name = "full", .cluster_bits = 14, .virtual_size = GiB,
        .device = 6 * MiB,
        .make = { LEAF(0), LEAF(1), LEAF(2), FUZZ_CHECKPOINT, LEAF(3),
                  UNMAP(0, 200, 0), COMMIT, FUZZ_GROW, 255, LEAF(5), COMMIT },
        .program = { LEAF(6), LEAF(7), FUZZ_GROW, 255, LEAF(8),
                     FUZZ_HOLD, UNMAP(0, 255, 0), LEAF(9), FUZZ_HOLD,
                     LEAF(9), COMMIT, FUZZ_CHECK },
    }, {
        .name = "sums", .cluster_bits = 14, .virtual_size = 64 * MiB,
        .device = 16 * MiB,
        .make = { WRITE(0, 255), COMMIT, WRITE(5, 3), FLUSH, WRITE(7, 1),
                  WRITE(5, 4), FLUSH },
        .program = { FUZZ_CRASH, WRITE(9, 1), FLUSH, FUZZ_FOLLOW, WRITE(9, 1),
                     FUZZ_FOLLOW, FLUSH, FUZZ_CRASH, WRITE(9, 2), FLUSH,
                     FUZZ_CHECKPOINT, WRITE(11, 255), FLUSH, FUZZ_CRASH,
                     FUZZ_REPAIR, 2, WRITE(12, 1), FLUSH, FUZZ_REOPEN, 0 },
    },
};

static size_t used(const uint8_t *steps, size_t size)
{
    while (size && !steps[size - 1]) {
        size--;
    }
    return size;
}

static void write_seed(const Seed *seed, const char *directory)
{
    ThinvmCreateParams params = {
        .virtual_size = seed->virtual_size,
        .cluster_size = 1ULL << seed->cluster_bits,
        .journal_size = MiB,
    };
    g_autofree char *path = g_strdup_printf("%s/%s.bin", directory,
                                            seed->name);
    g_autofree uint8_t *data = g_malloc(MiB);
    FuzzImage *image = fuzz_image_new(seed->device);
    size_t size;

    if (seed->backing) {
        pstrcpy(params.backing.name, sizeof(params.backing.name),
                seed->backing);
    }
    image->program_size = used(seed->make, sizeof(seed->make));
    image->program = g_memdup2(seed->make, image->program_size);
    fuzz_create(image, &params);
    g_free(image->program);
    image->program_size = used(seed->program, sizeof(seed->program));
    image->program = g_memdup2(seed->program, image->program_size);
    size = fuzz_image_encode(image, data, MiB);
    fuzz_image_free(image);
    g_assert(size);
    g_file_set_contents(path, (char *)data, size, NULL);
}

int main(int argc, char **argv)
{
    LLVMFuzzerInitialize(&argc, &argv);
    if (argc == 3 && !strcmp(argv[1], "--seeds")) {
        for (int i = 0; i < ARRAY_SIZE(seeds); i++) {
            write_seed(&seeds[i], argv[2]);
        }
        return 0;
    }
    for (int i = 1; i < argc; i++) {
        g_autofree char *data = NULL;
        GError *error = NULL;
        gsize size;

        if (!g_file_get_contents(argv[i], &data, &size, &error)) {
            fprintf(stderr, "%s\n", error->message);
            return 1;
        }
        LLVMFuzzerTestOneInput((uint8_t *)data, size);
    }
    return 0;
}
