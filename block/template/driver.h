/*
 * thinvm template store: nodes of the driver thinvm-template
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef BLOCK_TEMPLATE_DRIVER_H
#define BLOCK_TEMPLATE_DRIVER_H

#include "block/block-io.h"
#include "block/block_int.h"
#include "reader.h"

typedef struct BDRVTemplateState {
    BlockDriverState *bs;
    TemplateReader *reader;
    QTAILQ_ENTRY(BDRVTemplateState) link;
} BDRVTemplateState;

/* Main loop */
typedef QTAILQ_HEAD(, BDRVTemplateState) TemplateNodeList;
extern TemplateNodeList template_nodes;

#endif
