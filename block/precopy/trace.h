/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What trace.h is in QEMU's other directories: the generated functions. */
#include "trace/trace-block_precopy.h"
