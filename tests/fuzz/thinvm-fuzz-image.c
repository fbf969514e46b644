/*
 * Sparse images as the input of thinvm's fuzzer
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See thinvm-fuzz-image.h.
 */
#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qemu/cutils.h"
#include "thinvm-fuzz-image.h"

#define MAGIC           0x5a465654u     /* "TVFZ" */
#define HEADER_SIZE     16
/* Zeroes between two runs that are cheaper to store than another run */
#define RUN_GAP         6

/* ------------------------------------------------------------------ */
/* Blocks                                                              */

uint8_t *fuzz_image_block(FuzzImage *image, uint64_t number, bool make)
{
    uint8_t *block = g_hash_table_lookup(image->blocks, &number);

    if (!block && make &&
        g_hash_table_size(image->blocks) < FUZZ_MAX_BLOCKS) {
        block = g_malloc0(FUZZ_BLOCK);
        g_hash_table_insert(image->blocks,
                            g_memdup2(&number, sizeof(number)), block);
    }
    return block;
}

void fuzz_image_read(FuzzImage *image, uint64_t offset, uint64_t bytes,
                     void *buf)
{
    while (bytes) {
        uint64_t at = offset % FUZZ_BLOCK;
        uint64_t n = MIN(bytes, FUZZ_BLOCK - at);
        uint8_t *block = fuzz_image_block(image, offset / FUZZ_BLOCK, false);

        if (block) {
            memcpy(buf, block + at, n);
        } else {
            memset(buf, 0, n);
        }
        offset += n;
        bytes -= n;
        buf += n;
    }
}

bool fuzz_image_write(FuzzImage *image, uint64_t offset, uint64_t bytes,
                      const void *buf)
{
    while (bytes) {
        uint64_t at = offset % FUZZ_BLOCK;
        uint64_t n = MIN(bytes, FUZZ_BLOCK - at);
        uint8_t *block = fuzz_image_block(image, offset / FUZZ_BLOCK,
                                          !buffer_is_zero(buf, n));

        if (block) {
            memcpy(block + at, buf, n);
        } else if (!buffer_is_zero(buf, n)) {
            return false;
        }
        offset += n;
        bytes -= n;
        buf += n;
    }
    return true;
}

static int compare_numbers(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return x < y ? -1 : x > y;
}

GArray *fuzz_image_numbers(const FuzzImage *image)
{
    GArray *numbers = g_array_new(false, false, sizeof(uint64_t));
    GHashTableIter iter;
    uint64_t *number;

    g_hash_table_iter_init(&iter, image->blocks);
    while (g_hash_table_iter_next(&iter, (void **)&number, NULL)) {
        g_array_append_val(numbers, *number);
    }
    g_array_sort(numbers, compare_numbers);
    return numbers;
}

/* ------------------------------------------------------------------ */
/* The device                                                          */

static FuzzImage *image_of(ThinvmDevice *dev)
{
    return container_of(dev, FuzzImage, device);
}

static bool fails(FuzzImage *image)
{
    return image->fail_in && --image->fail_in == 0;
}

static bool in_bounds(FuzzImage *image, uint64_t offset, uint64_t bytes)
{
    g_assert(bytes > 0 && offset % THINVM_SECTOR_SIZE == 0 &&
             bytes % THINVM_SECTOR_SIZE == 0);
    return offset <= image->length && bytes <= image->length - offset;
}

static int coroutine_fn fuzz_co_pread(ThinvmDevice *dev, uint64_t offset,
                                      uint64_t bytes, void *buf)
{
    FuzzImage *image = image_of(dev);

    if (fails(image) || !in_bounds(image, offset, bytes)) {
        return -EIO;
    }
    fuzz_image_read(image, offset, bytes, buf);
    return 0;
}

static int coroutine_fn fuzz_co_pwrite(ThinvmDevice *dev, uint64_t offset,
                                       uint64_t bytes, const void *buf)
{
    FuzzImage *image = image_of(dev);

    if (image->write_hook) {
        image->write_hook(image->hook_opaque, offset, bytes, false);
    }
    if (fails(image) || !in_bounds(image, offset, bytes)) {
        return -EIO;
    }
    image->nb_writes++;
    return fuzz_image_write(image, offset, bytes, buf) ? 0 : -ENOSPC;
}

static int coroutine_fn fuzz_co_flush(ThinvmDevice *dev)
{
    return fails(image_of(dev)) ? -EIO : 0;
}

static int coroutine_fn fuzz_co_pdiscard(ThinvmDevice *dev, uint64_t offset,
                                         uint64_t bytes)
{
    FuzzImage *image = image_of(dev);

    if (image->write_hook) {
        image->write_hook(image->hook_opaque, offset, bytes, true);
    }
    return fails(image) || !in_bounds(image, offset, bytes) ? -EIO : 0;
}

static int64_t coroutine_fn fuzz_co_length(ThinvmDevice *dev)
{
    return image_of(dev)->length;
}

static int coroutine_fn fuzz_co_grow(ThinvmDevice *dev, uint64_t bytes)
{
    FuzzImage *image = image_of(dev);

    if (fails(image)) {
        return -EIO;
    }
    if (bytes > image->max_length) {
        return -ENOSPC;
    }
    image->length = MAX(image->length, bytes);
    return 0;
}

/* ------------------------------------------------------------------ */
/* Life, and the container                                             */

FuzzImage *fuzz_image_new(uint64_t length)
{
    FuzzImage *image = g_new0(FuzzImage, 1);

    image->device = (ThinvmDevice) {
        .co_pread = fuzz_co_pread,
        .co_pwrite = fuzz_co_pwrite,
        .co_flush = fuzz_co_flush,
        .co_pdiscard = fuzz_co_pdiscard,
        .co_length = fuzz_co_length,
        .co_grow = fuzz_co_grow,
    };
    image->length = MIN(length, FUZZ_MAX_LENGTH);
    image->max_length = image->length + 64 * MiB;
    image->blocks = g_hash_table_new_full(g_int64_hash, g_int64_equal, g_free,
                                          g_free);
    return image;
}

void fuzz_image_free(FuzzImage *image)
{
    g_hash_table_unref(image->blocks);
    g_free(image->program);
    g_free(image);
}

/* What is left of an input */
typedef struct Reader {
    const uint8_t *data;
    size_t size;
    bool failed;
} Reader;

static const uint8_t *take(Reader *r, size_t n)
{
    static const uint8_t zeroes[8];
    const uint8_t *data = r->data;

    if (r->size < n) {
        r->failed = true;
        return zeroes;
    }
    r->data += n;
    r->size -= n;
    return data;
}

static void decode_block(FuzzImage *image, Reader *r)
{
    uint64_t number = ldq_le_p(take(r, 8));
    unsigned nb_runs = lduw_le_p(take(r, 2));

    if (number >= FUZZ_MAX_LENGTH / FUZZ_BLOCK) {
        r->failed = true;
    }
    while (nb_runs-- && !r->failed) {
        unsigned at = lduw_le_p(take(r, 2));
        unsigned n = lduw_le_p(take(r, 2));

        if (r->size < n || at >= FUZZ_BLOCK || n > FUZZ_BLOCK - at) {
            r->failed = true;
        }
        if (!r->failed) {
            memcpy(fuzz_image_block(image, number, true) + at, take(r, n), n);
        }
    }
}

FuzzImage *fuzz_image_decode(const uint8_t *data, size_t size)
{
    Reader r = { data, size };
    uint32_t magic = ldl_le_p(take(&r, 4));
    unsigned nb_blocks = lduw_le_p(take(&r, 2));
    unsigned program = lduw_le_p(take(&r, 2));
    FuzzImage *image = fuzz_image_new(ldq_le_p(take(&r, 8)));

    if (magic != MAGIC) {
        return image;
    }
    nb_blocks = MIN(nb_blocks, FUZZ_MAX_BLOCKS);
    while (nb_blocks-- && !r.failed) {
        decode_block(image, &r);
    }
    if (!r.failed) {
        image->program_size = MIN(program, r.size);
        image->program = g_memdup2(r.data, image->program_size);
    }
    return image;
}

/* Append a block to @out */
static void encode_block(GByteArray *out, uint64_t number,
                         const uint8_t *block)
{
    uint8_t head[10];
    guint start = out->len;
    unsigned nb_runs = 0;

    stq_le_p(head, number);
    g_byte_array_append(out, head, sizeof(head));
    for (unsigned at = 0; at < FUZZ_BLOCK;) {
        unsigned end, zeroes;
        uint8_t run[4];

        if (!block[at]) {
            at++;
            continue;
        }
        for (end = at, zeroes = 0; end < FUZZ_BLOCK && zeroes <= RUN_GAP;
             end++) {
            zeroes = block[end] ? 0 : zeroes + 1;
        }
        end -= zeroes;
        stw_le_p(run, at);
        stw_le_p(run + 2, end - at);
        g_byte_array_append(out, run, sizeof(run));
        g_byte_array_append(out, block + at, end - at);
        nb_runs++;
        at = end;
    }
    if (nb_runs) {
        stw_le_p(out->data + start + 8, nb_runs);
    } else {
        g_byte_array_set_size(out, start);
    }
}

size_t fuzz_image_encode(const FuzzImage *image, uint8_t *data, size_t max)
{
    g_autoptr(GByteArray) out = g_byte_array_new();
    GArray *numbers = fuzz_image_numbers(image);
    size_t program = MIN(image->program_size, UINT16_MAX);
    unsigned nb_blocks = 0;

    g_byte_array_set_size(out, HEADER_SIZE);
    for (guint i = 0; i < numbers->len; i++) {
        uint64_t number = g_array_index(numbers, uint64_t, i);
        guint before = out->len;

        encode_block(out, number, g_hash_table_lookup(image->blocks,
                                                      &number));
        nb_blocks += out->len > before;
    }
    g_array_unref(numbers);
    stl_le_p(out->data, MAGIC);
    stw_le_p(out->data + 4, nb_blocks);
    stw_le_p(out->data + 6, program);
    stq_le_p(out->data + 8, image->length);
    g_byte_array_append(out, image->program, program);
    if (out->len > max) {
        return 0;
    }
    memcpy(data, out->data, out->len);
    return out->len;
}
