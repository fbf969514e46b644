/*
 * thinvm driver layer: the tree of snapshots in words
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef THINVM_SNAPSHOT_LIST_H
#define THINVM_SNAPSHOT_LIST_H

/*
 * Print, below the list of `qemu-img snapshot -l`, which snapshot was made
 * after which, if @bs is a thinvm image with more than one.  Main loop; reads
 * the records, and the trees as far as is needed to say what would come free.
 */
void thinvm_print_snapshot_tree(BlockDriverState *bs);

#endif
