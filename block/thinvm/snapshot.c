/*
 * thinvm metadata engine: snapshots
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Engine layer.  A snapshot is a record with the pointer to a mapping tree's
 * root; creating one adds a reference to the active root page, whatever the
 * size of the disk.  Going back to one makes its root the active one, and
 * puts the former active root into a hidden record (TRASH), whose tree is
 * freed in steps.
 *
 * Deletion, one bounded step an operation; the record's flags say where it
 * is, so that a crash in the middle resumes:
 *
 *   listed --(no child or one)--> TRASH    its child's parent is redefined
 *   listed --(more children)----> DELETED  hidden; the record stays
 *   DELETED --(children are down to one)--> TRASH
 *   TRASH, DELETED: each step frees one leaf, run or shared page of the tree
 *   TRASH with nothing left: the record goes
 *
 * The active disk is a child of the snapshot that it was made from.
 *
 * A protected snapshot is not deleted; whoever wants to must end that first.
 */
#include "qemu/osdep.h"
#include "map.h"

#define SLOTS_MASK  (THINVM_SNAPSHOTS_PER_LEAF - 1)

static inline ThinvmPageKind record_kind(int level)
{
    return level ? THINVM_PAGE_SNAPSHOT_INNER : THINVM_PAGE_SNAPSHOT_LEAF;
}

static inline unsigned record_index(uint32_t slot, int level)
{
    return (slot >> (3 + 8 * (level - 1))) & (THINVM_POINTERS_PER_PAGE - 1);
}

/* The leaf with @slot: 0, -EAGAIN, or -ENOENT where there is none yet */
static int record_leaf(ThinvmState *s, uint32_t slot, bool touch,
                       ThinvmNeeds *needs, ThinvmPage **leaf)
{
    const ThinvmPointerLe *ptr = &s->snapshot_root;

    for (int level = THINVM_SNAPSHOT_LEVELS; ; level--) {
        ThinvmPage *page;

        if (thinvm_slot_type(ptr) != THINVM_PTR_PAGE) {
            s->new_pages += touch ? level + 1 : 0;
            return -ENOENT;
        }
        page = thinvm_page_get(s, ptr, record_kind(level), level, needs);
        if (!page) {
            return -EAGAIN;
        }
        if (touch) {
            thinvm_page_touch(s, page, false);
        }
        if (level == 0) {
            *leaf = page;
            return 0;
        }
        ptr = &thinvm_page_slots(page)[record_index(slot, level)];
    }
}

static const ThinvmSnapshotLe *leaf_record(ThinvmPage *leaf, uint32_t slot)
{
    return (const ThinvmSnapshotLe *)leaf->data + (slot & SLOTS_MASK);
}

static ThinvmSnapshotLe *writable_record(ThinvmState *s, uint32_t slot)
{
    ThinvmPointerLe *ptr = &s->snapshot_root;

    for (int level = THINVM_SNAPSHOT_LEVELS; ; level--) {
        ThinvmPage *page;

        if (thinvm_slot_type(ptr) == THINVM_PTR_PAGE &&
            thinvm_page_resident(s, ptr, record_kind(level), level)) {
            page = thinvm_page_shadow(s, ptr);
        } else {
            uint64_t word;

            page = thinvm_page_new(s, record_kind(level), level);
            word = thinvm_slot_make(THINVM_PTR_PAGE, page->number) |
                   (page->generation & 0xffff) <<
                   THINVM_PTR_GENERATION_SHIFT;
            thinvm_slot_set(ptr, word, 0, 0);
        }
        if (level == 0) {
            return (ThinvmSnapshotLe *)page->data + (slot & SLOTS_MASK);
        }
        ptr = &thinvm_page_slots(page)[record_index(slot, level)];
    }
}

int thinvm_snapshot_root(ThinvmState *s, uint64_t slot, int tree, bool touch,
                         ThinvmNeeds *needs, const ThinvmPointerLe **root)
{
    const ThinvmSnapshotLe *record;
    ThinvmPage *leaf;
    ThinvmPointer ptr;
    int ret = slot < s->nb_snapshot_slots ?
              record_leaf(s, slot, touch, needs, &leaf) : -ENOENT;

    if (ret < 0) {
        return ret;
    }
    record = leaf_record(leaf, slot);
    if (!record->id_le) {
        return -ENOENT;
    }
    *root = tree == THINVM_TREE_DISK ? &record->root : &record->vmstate_root;
    thinvm_pointer_decode(&ptr, *root);
    return thinvm_root_validate(&s->bounds, THINVM_PAGE_MAP_INNER, &ptr,
                                "snapshot", NULL) ? 0 : -EBADMSG;
}

ThinvmPointerLe *thinvm_snapshot_writable_root(ThinvmState *s, uint64_t slot,
                                               int tree)
{
    ThinvmSnapshotLe *record = writable_record(s, slot);

    return tree == THINVM_TREE_DISK ? &record->root : &record->vmstate_root;
}

int thinvm_snapshot_need_rewrite(ThinvmState *s, uint64_t slot,
                                 ThinvmNeeds *needs)
{
    const ThinvmPointerLe *ptr = &s->snapshot_root;
    bool retired = false;

    for (int level = THINVM_SNAPSHOT_LEVELS; ; level--) {
        ThinvmPage *page;

        if (thinvm_slot_type(ptr) != THINVM_PTR_PAGE) {
            return retired;
        }
        page = thinvm_page_get(s, ptr, record_kind(level), level, needs);
        if (!page) {
            return -EAGAIN;
        }
        retired |= thinvm_page_is_retired(s, page->number);
        if (level == 0) {
            return retired;
        }
        ptr = &thinvm_page_slots(page)[record_index(slot, level)];
    }
}

void thinvm_snapshot_rewrite(ThinvmState *s, uint64_t slot)
{
    writable_record(s, slot);
}

uint32_t thinvm_snapshot_nb_slots(ThinvmState *s)
{
    return s->nb_snapshot_slots;
}

uint64_t thinvm_snapshot_next_id(ThinvmState *s)
{
    return s->next_snapshot_id;
}

int thinvm_snapshot_read(ThinvmState *s, uint32_t slot, ThinvmSnapshot *snap,
                         ThinvmNeeds *needs, Error **errp)
{
    ThinvmPage *leaf;
    int ret;

    needs->nb_want = 0;
    if (slot >= s->nb_snapshot_slots) {
        return -ENOENT;
    }
    ret = record_leaf(s, slot, false, needs, &leaf);
    if (ret < 0) {
        return ret;
    }
    if (!leaf_record(leaf, slot)->id_le) {
        return -ENOENT;
    }
    if (!thinvm_snapshot_decode(snap, leaf_record(leaf, slot), errp)) {
        return -EBADMSG;
    }
    /* The pointer's checksum may be on its way to the device only */
    if (snap->root.type == THINVM_PTR_PAGE) {
        snap->root.crc = thinvm_slot_crc(s, &leaf_record(leaf, slot)->root);
    }
    if (snap->vmstate_root.type == THINVM_PTR_PAGE) {
        snap->vmstate_root.crc =
            thinvm_slot_crc(s, &leaf_record(leaf, slot)->vmstate_root);
    }
    return 0;
}

/* The record at @slot, which must carry @id; its leaf will be changed */
static int need_record(ThinvmState *s, uint64_t slot, uint64_t id,
                       ThinvmSnapshot *snap, ThinvmNeeds *needs, Error **errp)
{
    ThinvmPage *leaf;
    Error *local_err = NULL;
    int ret = slot < s->nb_snapshot_slots ?
              record_leaf(s, slot, true, needs, &leaf) : -ENOENT;

    if (ret == 0 && le64_to_cpu(leaf_record(leaf, slot)->id_le) != id) {
        ret = -ENOENT;
    }
    if (ret == 0 && !thinvm_snapshot_decode(snap, leaf_record(leaf, slot),
                                            &local_err)) {
        error_propagate(errp, local_err);
        return -EBADMSG;
    }
    if (ret == -ENOENT) {
        error_setg(errp, "there is no snapshot with id %" PRIu64
                   " in slot %" PRIu64, id, slot);
    }
    return ret;
}

/*
 * Where an operation puts a new record is said by the operation: whoever
 * replays it must not choose otherwise.  0, all there was in version 1.0,
 * means behind all others.
 */
static uint32_t append_slot(ThinvmState *s)
{
    return s->nb_snapshots ? s->nb_snapshot_slots : 0;
}

static uint32_t new_slot(ThinvmState *s, const ThinvmOp *op)
{
    return op->count ? op->count - 1 : append_slot(s);
}

/*
 * No slot below the hint is free, so a search reads each leaf of records once
 * in the life of a state at most; none at all as long as no snapshot was
 * deleted.
 */
int thinvm_snapshot_choose_slot(ThinvmState *s, ThinvmOp *op,
                                ThinvmNeeds *needs)
{
    uint32_t end = append_slot(s), slot;

    if (op->type != THINVM_OP_SNAPSHOT_CREATE &&
        op->type != THINVM_OP_SNAPSHOT_GOTO) {
        return 0;
    }
    needs->nb_want = 0;
    if (s->nb_snapshots >= end) {
        s->free_slot_hint = end;
    }
    for (slot = s->free_slot_hint; slot < end; slot++) {
        ThinvmPage *leaf;
        int ret = record_leaf(s, slot, false, needs, &leaf);

        if (ret == -EAGAIN) {
            return ret;
        }
        if (ret == -ENOENT || !leaf_record(leaf, slot)->id_le) {
            break;
        }
        s->free_slot_hint = slot + 1;
    }
    op->count = slot < end ? slot + 1 : 0;
    return 0;
}

static int need_new_record(ThinvmState *s, const ThinvmOp *op,
                           ThinvmNeeds *needs, Error **errp)
{
    uint32_t slot = new_slot(s, op);
    ThinvmPage *leaf;
    int ret;

    /* Each record holds two roots; the active trees hold two more */
    if (2 * (s->nb_snapshots + 2) > THINVM_MAX_ROOTS ||
        slot >= THINVM_MAX_SNAPSHOT_SLOTS) {
        error_setg(errp, "the image has %u snapshots; %u is the limit",
                   s->nb_snapshots, THINVM_MAX_ROOTS / 2 - 1);
        return -EOVERFLOW;
    }
    if (op->count && slot >= append_slot(s)) {
        error_setg(errp, "slot %u of the new snapshot is not one of the %u "
                   "that were in use", slot, append_slot(s));
        return -EBADMSG;
    }
    ret = record_leaf(s, slot, true, needs, &leaf);
    if (ret == 0 && op->count && leaf_record(leaf, slot)->id_le) {
        error_setg(errp, "slot %u of the new snapshot is not free, but has "
                   "snapshot %" PRIu64, slot,
                   le64_to_cpu(leaf_record(leaf, slot)->id_le));
        return -EBADMSG;
    }
    return ret == -ENOENT ? 0 : ret;
}

static ThinvmSnapshotLe *add_record(ThinvmState *s, const ThinvmOp *op)
{
    uint32_t slot = new_slot(s, op);
    ThinvmSnapshotLe *record = writable_record(s, slot);

    s->nb_snapshot_slots = MAX(append_slot(s), slot + 1);
    s->nb_snapshots++;
    s->next_snapshot_id++;
    return record;
}

/* ------------------------------------------------------------------ */
/* Create and go back                                                  */

static int prepare_create(ThinvmState *s, const ThinvmOp *op,
                          ThinvmNeeds *needs, Error **errp)
{
    if (op->snapshot->id != s->next_snapshot_id) {
        error_setg(errp, "snapshot id %" PRIu64 " is not the next one, %"
                   PRIu64, op->snapshot->id, s->next_snapshot_id);
        return -EINVAL;
    }
    return need_new_record(s, op, needs, errp);
}

static void apply_create(ThinvmState *s, const ThinvmOp *op)
{
    ThinvmSnapshot snap = *op->snapshot;
    ThinvmSnapshotLe *record = add_record(s, op);

    snap.parent_id = s->current_snapshot_id;
    snap.virtual_size = s->virtual_size;
    snap.vmstate_size = s->vmstate_size;
    snap.flags = 0;
    thinvm_pointer_decode(&snap.root, &s->root[THINVM_TREE_DISK]);
    thinvm_pointer_decode(&snap.vmstate_root, &s->root[THINVM_TREE_VMSTATE]);
    thinvm_snapshot_encode(record, &snap);
    if (snap.root.type == THINVM_PTR_PAGE) {
        thinvm_page_ref(s, snap.root.address);
    }
    thinvm_slot_set(&s->root[THINVM_TREE_VMSTATE], 0, 0, 0);
    s->vmstate_size = 0;
    s->current_snapshot_id = snap.id;
}

static int prepare_goto(ThinvmState *s, const ThinvmOp *op,
                        ThinvmNeeds *needs, Error **errp)
{
    ThinvmSnapshot snap;
    int ret = need_record(s, op->guest, op->value, &snap, needs, errp);

    if (ret < 0) {
        return ret;
    }
    if (op->physical != s->next_snapshot_id) {
        error_setg(errp, "snapshot id %" PRIu64 " is not the next one, %"
                   PRIu64, op->physical, s->next_snapshot_id);
        return -EINVAL;
    }
    if (!thinvm_root_validate(&s->bounds, THINVM_PAGE_MAP_INNER, &snap.root,
                              "snapshot", errp) ||
        !thinvm_root_validate(&s->bounds, THINVM_PAGE_MAP_INNER,
                              &snap.vmstate_root, "snapshot's VM state",
                              errp)) {
        return -EBADMSG;
    }
    return need_new_record(s, op, needs, errp);
}

/* An active root becomes what @from names, too */
static void root_take(ThinvmState *s, ThinvmPointerLe *root,
                      const ThinvmPointerLe *from)
{
    uint64_t word = thinvm_slot_word(from);

    if (thinvm_slot_type(from) == THINVM_PTR_PAGE) {
        thinvm_page_ref(s, thinvm_slot_address(from));
        /* Its entries were private when they were the active disk's */
        word |= THINVM_PTR_SHARED_BELOW;
    }
    thinvm_slot_set(root, word, thinvm_slot_crc(s, from), 0);
    thinvm_map_short_cut_clear(s);
}

static void apply_goto(ThinvmState *s, const ThinvmOp *op)
{
    ThinvmSnapshotLe *record = add_record(s, op), *from;
    ThinvmSnapshot trash = {
        .id = op->physical,
        .flags = THINVM_SNAPSHOT_TRASH,
        .virtual_size = s->virtual_size,
        .vmstate_size = s->vmstate_size,
        .icount = UINT64_MAX,
    };

    thinvm_pointer_decode(&trash.root, &s->root[THINVM_TREE_DISK]);
    thinvm_pointer_decode(&trash.vmstate_root, &s->root[THINVM_TREE_VMSTATE]);
    thinvm_snapshot_encode(record, &trash);
    from = writable_record(s, op->guest);
    root_take(s, &s->root[THINVM_TREE_DISK], &from->root);
    root_take(s, &s->root[THINVM_TREE_VMSTATE], &from->vmstate_root);
    s->virtual_size = le64_to_cpu(from->virtual_size_le);
    s->vmstate_size = le64_to_cpu(from->vmstate_size_le);
    s->current_snapshot_id = op->value;
    thinvm_space_update_bounds(s);
}

/* ------------------------------------------------------------------ */
/* Delete                                                              */

typedef struct Children {
    uint64_t nb;                /* the active disk included */
    int64_t slot;               /* of one of them; -1: the active disk */
} Children;

/* Those in the leaf that begins with @first */
static void leaf_children(ThinvmState *s, ThinvmPage *leaf, uint32_t first,
                          uint64_t id, Children *children)
{
    uint32_t end = MIN(s->nb_snapshot_slots,
                       first + THINVM_SNAPSHOTS_PER_LEAF);

    for (uint32_t slot = first; slot < end; slot++) {
        const ThinvmSnapshotLe *record = leaf_record(leaf, slot);

        if (record->id_le && le64_to_cpu(record->parent_id_le) == id &&
            !(le32_to_cpu(record->flags_le) & THINVM_SNAPSHOT_TRASH)) {
            children->nb++;
            children->slot = slot;
        }
    }
}

/* Reads all records: 0, -EAGAIN */
static int find_children(ThinvmState *s, uint64_t id, ThinvmNeeds *needs,
                         Children *children)
{
    int ret = 0;

    *children = (Children) { .slot = -1 };
    children->nb = s->current_snapshot_id == id;
    for (uint32_t slot = 0; slot < s->nb_snapshot_slots;
         slot += THINVM_SNAPSHOTS_PER_LEAF) {
        ThinvmPage *leaf;
        int found = record_leaf(s, slot, false, needs, &leaf);

        if (found == 0) {
            leaf_children(s, leaf, slot, id, children);
        } else if (found == -EAGAIN) {
            ret = -EAGAIN;
        }
    }
    return ret;
}

static bool snapshot_is_empty(const ThinvmSnapshot *snap)
{
    return snap->root.type != THINVM_PTR_PAGE &&
           snap->vmstate_root.type != THINVM_PTR_PAGE;
}

/* The tree that the next step frees a piece of; both halves ask this */
static ThinvmPointerLe *step_root(ThinvmSnapshotLe *record)
{
    return thinvm_slot_type(&record->root) == THINVM_PTR_PAGE ?
           &record->root : &record->vmstate_root;
}

static int prepare_delete(ThinvmState *s, const ThinvmOp *op,
                          ThinvmNeeds *needs, Error **errp)
{
    ThinvmSnapshot snap;
    ThinvmPointerLe root;
    Children children;
    int ret = need_record(s, op->guest, op->value, &snap, needs, errp);

    if (ret < 0) {
        return ret;
    }
    if (snap.flags & THINVM_SNAPSHOT_PROTECTED) {
        error_setg(errp, "Snapshot %" PRIu64 " '%s' is protected", snap.id,
                   snap.name);
        return -EPERM;
    }
    if (!(snap.flags & THINVM_SNAPSHOT_TRASH)) {
        ret = find_children(s, op->value, needs, &children);
        if (ret < 0) {
            return ret;
        }
        if (children.nb <= 1 || !(snap.flags & THINVM_SNAPSHOT_DELETED)) {
            ThinvmPage *leaf;

            return children.slot < 0 ? 0 :
                   record_leaf(s, children.slot, true, needs, &leaf);
        }
        if (snapshot_is_empty(&snap)) {
            return -EALREADY;
        }
    }
    if (snapshot_is_empty(&snap)) {
        return 0;
    }
    if (!thinvm_root_validate(&s->bounds, THINVM_PAGE_MAP_INNER, &snap.root,
                              "snapshot", errp) ||
        !thinvm_root_validate(&s->bounds, THINVM_PAGE_MAP_INNER,
                              &snap.vmstate_root, "snapshot's VM state",
                              errp)) {
        return -EBADMSG;
    }
    thinvm_pointer_encode(&root, snap.root.type == THINVM_PTR_PAGE ?
                          &snap.root : &snap.vmstate_root);
    return thinvm_map_need_drop_step(s, &root, needs);
}

/* One child at most: it inherits the parent, and the tree may go */
static void relink(ThinvmState *s, ThinvmSnapshotLe *record,
                   const Children *children)
{
    uint64_t id_le = record->id_le, parent_id_le = record->parent_id_le;
    ThinvmSnapshotLe *child;

    record->flags_le |= cpu_to_le32(THINVM_SNAPSHOT_TRASH);
    record->parent_id_le = 0;
    if (children->slot >= 0) {
        child = writable_record(s, children->slot);
        child->parent_id_le = parent_id_le;
    } else if (s->current_snapshot_id == le64_to_cpu(id_le)) {
        s->current_snapshot_id = le64_to_cpu(parent_id_le);
    }
}

static void apply_delete(ThinvmState *s, const ThinvmOp *op)
{
    ThinvmSnapshotLe *record = writable_record(s, op->guest);
    uint32_t flags = le32_to_cpu(record->flags_le);
    ThinvmNeeds needs;
    Children children;

    if (!(flags & THINVM_SNAPSHOT_TRASH)) {
        /* All in memory since prepare; a destroy might evict them */
        thinvm_needs_init(&needs);
        find_children(s, op->value, &needs, &children);
        assert(!needs.nb_want && !needs.nb_pinned);
        if (children.nb <= 1) {
            relink(s, record, &children);
            return;
        }
        if (!(flags & THINVM_SNAPSHOT_DELETED)) {
            record->flags_le |= cpu_to_le32(THINVM_SNAPSHOT_DELETED);
            return;
        }
    }
    if (thinvm_slot_type(&record->root) == THINVM_PTR_PAGE ||
        thinvm_slot_type(&record->vmstate_root) == THINVM_PTR_PAGE) {
        thinvm_map_drop_step(s, step_root(record));
        return;
    }
    memset(record, 0, sizeof(*record));
    s->free_slot_hint = MIN(s->free_slot_hint, op->guest);
    if (--s->nb_snapshots == 0) {
        s->nb_snapshot_slots = 0;
        s->free_slot_hint = 0;
    }
}

/* ------------------------------------------------------------------ */
/* Protect                                                             */

static int prepare_protect(ThinvmState *s, const ThinvmOp *op,
                           ThinvmNeeds *needs, Error **errp)
{
    ThinvmSnapshot snap;
    int ret = need_record(s, op->guest, op->value, &snap, needs, errp);

    if (ret < 0) {
        return ret;
    }
    if (snap.flags & (THINVM_SNAPSHOT_DELETED | THINVM_SNAPSHOT_TRASH)) {
        error_setg(errp, "Snapshot %" PRIu64 " '%s' is being deleted",
                   snap.id, snap.name);
        return -ENOENT;
    }
    return !(snap.flags & THINVM_SNAPSHOT_PROTECTED) == !op->count ?
           -EALREADY : 0;
}

static void apply_protect(ThinvmState *s, const ThinvmOp *op)
{
    ThinvmSnapshotLe *record = writable_record(s, op->guest);

    if (op->count) {
        record->flags_le |= cpu_to_le32(THINVM_SNAPSHOT_PROTECTED);
    } else {
        record->flags_le &= ~cpu_to_le32(THINVM_SNAPSHOT_PROTECTED);
    }
}

int thinvm_snapshot_prepare(ThinvmState *s, const ThinvmOp *op,
                            ThinvmNeeds *needs, Error **errp)
{
    switch (op->type) {
    case THINVM_OP_SNAPSHOT_CREATE:
        return prepare_create(s, op, needs, errp);
    case THINVM_OP_SNAPSHOT_GOTO:
        return prepare_goto(s, op, needs, errp);
    case THINVM_OP_SNAPSHOT_PROTECT:
        return prepare_protect(s, op, needs, errp);
    default:
        return prepare_delete(s, op, needs, errp);
    }
}

void thinvm_snapshot_apply(ThinvmState *s, const ThinvmOp *op)
{
    switch (op->type) {
    case THINVM_OP_SNAPSHOT_CREATE:
        apply_create(s, op);
        break;
    case THINVM_OP_SNAPSHOT_GOTO:
        apply_goto(s, op);
        break;
    case THINVM_OP_SNAPSHOT_PROTECT:
        apply_protect(s, op);
        break;
    default:
        apply_delete(s, op);
    }
}
