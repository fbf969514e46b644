/*
 * thinvm on-disk format: the list of hot leaves
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Format layer: bytes to values and back, no I/O, no state.  The list is a
 * hint by the owner which leaves of the mapping he uses most; whatever is
 * wrong with it, it is just not there (invariant 3).
 */

#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "format.h"

static uint32_t hot_checksum(const QemuUUID *uuid, const ThinvmHotLe *le,
                             uint64_t epoch, uint32_t nb_leaves)
{
    uint32_t bytes = sizeof(*le) + nb_leaves * sizeof(le->leaf_le[0]);
    g_autofree ThinvmHotLe *copy = g_memdup2(le, bytes);

    copy->crc_le = 0;
    return thinvm_checksum(uuid, THINVM_SUM_HOT, epoch, copy, bytes);
}

void thinvm_hot_encode(const QemuUUID *uuid, ThinvmHotLe *dst,
                       const ThinvmHotHeader *src, const uint32_t *leaf)
{
    memset(dst, 0, thinvm_hot_bytes(src->nb_leaves));
    dst->magic_le = cpu_to_le32(THINVM_HOT_MAGIC);
    dst->epoch_le = cpu_to_le64(src->epoch);
    dst->number_le = cpu_to_le64(src->number);
    dst->nb_leaves_le = cpu_to_le32(src->nb_leaves);
    memcpy(dst->nonce, src->nonce.data, sizeof(dst->nonce));
    memcpy(dst->image_uuid, uuid->data, sizeof(dst->image_uuid));
    for (uint32_t i = 0; i < src->nb_leaves; i++) {
        dst->leaf_le[i] = cpu_to_le32(leaf[i]);
    }
    dst->crc_le = cpu_to_le32(hot_checksum(uuid, dst, src->epoch,
                                           src->nb_leaves));
}

int thinvm_hot_decode_header(const QemuUUID *uuid, ThinvmHotHeader *dst,
                             const ThinvmHotLe *src)
{
    *dst = (ThinvmHotHeader) {
        .epoch = le64_to_cpu(src->epoch_le),
        .number = le64_to_cpu(src->number_le),
        .nb_leaves = le32_to_cpu(src->nb_leaves_le),
    };
    memcpy(dst->nonce.data, src->nonce, sizeof(src->nonce));
    return le32_to_cpu(src->magic_le) == THINVM_HOT_MAGIC &&
           !memcmp(src->image_uuid, uuid->data, sizeof(src->image_uuid)) &&
           !src->reserved_le && dst->nb_leaves <= THINVM_MAX_HOT
           ? 0 : -ENOENT;
}

int thinvm_hot_decode(const QemuUUID *uuid, ThinvmHotHeader *dst,
                      uint32_t *leaf, const ThinvmHotLe *src)
{
    int ret = thinvm_hot_decode_header(uuid, dst, src);

    if (ret < 0) {
        return ret;
    }
    if (le32_to_cpu(src->crc_le) != hot_checksum(uuid, src, dst->epoch,
                                                 dst->nb_leaves)) {
        return -EBADMSG;
    }
    for (uint32_t i = 0; i < dst->nb_leaves; i++) {
        leaf[i] = le32_to_cpu(src->leaf_le[i]);
    }
    return 0;
}
