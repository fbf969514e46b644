/*
 * blockdev-precopy: programs without character devices
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * qemu-nbd has what is behind QMP commands of the block layer linked in, and
 * no character devices.  There, the object thinvm-hints finds none, so the
 * rest of what it would need is never called.  Everywhere else QEMU's own
 * functions take the place of these, which are weak.
 */

#include "qemu/osdep.h"
#include "chardev/char-fe.h"

#define NO_CHARDEV __attribute__((weak))

NO_CHARDEV Chardev *qemu_chr_find(const char *name)
{
    return NULL;
}

NO_CHARDEV bool qemu_chr_fe_init(CharBackend *b, Chardev *s, Error **errp)
{
    g_assert_not_reached();
}

NO_CHARDEV void qemu_chr_fe_deinit(CharBackend *b, bool del)
{
    g_assert_not_reached();
}

NO_CHARDEV void
qemu_chr_fe_set_handlers(CharBackend *b, IOCanReadHandler *fd_can_read,
                         IOReadHandler *fd_read, IOEventHandler *fd_event,
                         BackendChangeHandler *be_change, void *opaque,
                         GMainContext *context, bool set_open)
{
    g_assert_not_reached();
}

NO_CHARDEV void qemu_chr_fe_accept_input(CharBackend *be)
{
    g_assert_not_reached();
}

NO_CHARDEV int qemu_chr_fe_write(CharBackend *be, const uint8_t *buf, int len)
{
    g_assert_not_reached();
}
