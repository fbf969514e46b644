/*
 * thinvm durability layer: the superblocks of an image, and which to believe
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Reads both slots.  The base is the one of the higher generation; the other,
 * if it is the base before, names what must not be overwritten yet.  A slot
 * that is neither that nor blank is suspect: it may have been the newer one
 * (invariant 3).  Nothing here writes.
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/cutils.h"
#include "qapi/qapi-types-block-core.h"
#include "store-int.h"

typedef struct Slot {
    ThinvmSuperblock sb;
    bool valid;
    bool blank;                 /* all zeroes: nothing was ever there */
    int ret;
    Error *err;
} Slot;

static int coroutine_fn slot_read(ThinvmDevice *dev, int nr, Slot *slot)
{
    g_autofree uint8_t *buf = g_malloc0(THINVM_PAGE_SIZE);

    thinvm_device_event(dev, BLKDBG_THINVM_SUPERBLOCK_READ);
    slot->ret = dev->co_pread(dev, thinvm_superblock_offset(nr),
                              THINVM_PAGE_SIZE, buf);
    if (slot->ret < 0) {
        error_setg_errno(&slot->err, -slot->ret,
                         "Could not read superblock %d", nr);
        /* These say something of contents, which we have not seen */
        if (slot->ret == -EINVAL || slot->ret == -EBADMSG ||
            slot->ret == -ENOTSUP) {
            slot->ret = -EIO;
        }
        return slot->ret;
    }
    slot->blank = buffer_is_zero(buf, sizeof(ThinvmSuperblockLe));
    slot->ret = thinvm_superblock_decode(&slot->sb,
                                         (ThinvmSuperblockLe *)buf,
                                         &slot->err);
    if (slot->ret == 0) {
        slot->valid = true;
    } else {
        error_prepend(&slot->err, "Superblock %d: ", nr);
    }
    return slot->ret;
}

/* Can these be two bases of one image, @b before @a? */
static bool slots_agree(const ThinvmSuperblock *a, const ThinvmSuperblock *b)
{
    return qemu_uuid_is_equal(&a->uuid, &b->uuid) &&
           a->cluster_bits == b->cluster_bits &&
           a->journal_offset == b->journal_offset &&
           a->journal_size == b->journal_size &&
           a->generation > b->generation && a->sequence >= b->sequence &&
           a->epoch >= b->epoch;
}

bool thinvm_bases_repaired(const ThinvmBases *bases)
{
    return bases->has_older && !bases->newest.record_crc &&
           bases->newest.sequence > bases->older.sequence;
}

/*
 * Which error of two invalid slots tells most?  A later version's image is
 * one for certain; behind what cannot be read anything may be.
 */
static int slot_rank(const Slot *slot)
{
    switch (slot->ret) {
    case -EINVAL:
        return 0;
    case -EBADMSG:
        return 1;
    case -ENOTSUP:
        return 3;
    default:
        return 2;
    }
}

static int worse_slot(const Slot *slots)
{
    return slot_rank(&slots[1]) > slot_rank(&slots[0]);
}

void thinvm_bases_destroy(ThinvmBases *bases)
{
    error_free(bases->damage);
    bases->damage = NULL;
}

int coroutine_fn thinvm_bases_read(ThinvmDevice *dev, ThinvmBases *bases,
                                   Error **errp)
{
    Slot slots[THINVM_NB_SUPERBLOCKS] = {};
    int newest, other, ret = 0;

    memset(bases, 0, sizeof(*bases));
    for (int i = 0; i < THINVM_NB_SUPERBLOCKS; i++) {
        slot_read(dev, i, &slots[i]);
    }
    if (!slots[0].valid && !slots[1].valid) {
        int i = worse_slot(slots);

        ret = slots[i].ret;
        error_propagate(errp, g_steal_pointer(&slots[i].err));
        goto out;
    }
    /* A version or feature that we do not know may be the newer base */
    for (int i = 0; i < THINVM_NB_SUPERBLOCKS; i++) {
        if (slots[i].ret == -ENOTSUP) {
            ret = -ENOTSUP;
            error_propagate(errp, g_steal_pointer(&slots[i].err));
            goto out;
        }
    }
    newest = !slots[0].valid ||
             (slots[1].valid &&
              slots[1].sb.generation > slots[0].sb.generation);
    other = !newest;
    bases->newest = slots[newest].sb;
    bases->newest_slot = newest;
    if (slots[other].valid) {
        bases->older = slots[other].sb;
        bases->has_older = slots_agree(&bases->newest, &bases->older);
        if (!bases->has_older) {
            bases->suspect = true;
            error_setg(&bases->damage, "Superblock %d does not belong to the "
                       "image that superblock %d describes", other, newest);
        }
    } else if (!slots[other].blank) {
        bases->suspect = true;
        bases->damage = g_steal_pointer(&slots[other].err);
    }
out:
    for (int i = 0; i < THINVM_NB_SUPERBLOCKS; i++) {
        error_free(slots[i].err);
    }
    return ret;
}

int coroutine_fn thinvm_bases_moved(ThinvmStore *st, uint64_t sequence,
                                    bool *moved, Error **errp)
{
    ThinvmBases now = {};
    int ret = thinvm_bases_read(st->dev, &now, errp);

    *moved = false;
    if (ret == 0) {
        *moved = (now.newest.generation != st->bases.newest.generation &&
                  now.newest.sequence >= sequence) ||
                 !qemu_uuid_is_equal(&now.newest.uuid, &st->uuid);
        thinvm_bases_destroy(&now);
    }
    return ret;
}

int coroutine_fn thinvm_store_probe(ThinvmDevice *dev, ThinvmSuperblock *sb,
                                    ThinvmSuperblock *older, bool *has_older,
                                    Error **errp)
{
    ThinvmBases bases;
    int ret = thinvm_bases_read(dev, &bases, errp);

    if (ret == 0) {
        *sb = bases.newest;
        if (older) {
            *older = bases.older;
        }
        if (has_older) {
            *has_older = bases.has_older;
        }
        thinvm_bases_destroy(&bases);
    }
    return ret;
}
