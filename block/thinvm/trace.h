/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Trace functions of block/thinvm/, generated from trace-events there.
 */

#include "trace/trace-block_thinvm.h"
