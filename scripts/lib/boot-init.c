/*
 * /init of the guests of bench-boot: finds the disk, and becomes its init
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Loads the modules in /modules (virtio) in the order of their names, mounts
 * /dev/vda, and goes on as /sbin/init there; or, if the kernel's command line
 * says storm=quick, as a shell that only reads its programs.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static void fail(const char *what)
{
    printf("boot-init: %s: %s\n", what, strerror(errno));
    sleep(1);
    exit(1);
}

static void load_modules(void)
{
    struct dirent **list;
    int n = scandir("/modules", &list, NULL, alphasort);

    for (int i = 0; i < n; i++) {
        char path[512];
        int fd;

        if (list[i]->d_name[0] == '.') {
            continue;
        }
        snprintf(path, sizeof(path), "/modules/%s", list[i]->d_name);
        fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || syscall(SYS_finit_module, fd, "", 0) < 0) {
            printf("boot-init: %s: %s\n", path, strerror(errno));
        }
        close(fd);
    }
}

int main(void)
{
    char *const init[] = { "/sbin/init", NULL };
    char *const quick[] = {
        "/bin/sh", "-c", "echo STORM-BOOTED; "
        "find /usr/bin /usr/sbin -xdev -type f -print0 | LC_ALL=C sort -z | "
        "xargs -0 sha256sum | sha256sum | "
        "sed 's/^/STORM-DIGEST /; s/ *-$//'; "
        "while :; do sleep 1000; done", NULL
    };
    const char *how = getenv("storm");
    char *const *argv = how && !strcmp(how, "quick") ? quick : init;

    load_modules();
    if (mount("devtmpfs", "/dev", "devtmpfs", 0, NULL) < 0) {
        fail("/dev");
    }
    for (int tries = 0; mount("/dev/vda", "/disk", "ext4", 0, NULL) < 0;
         tries++) {
        if (errno != ENOENT || tries == 600) {
            fail("/dev/vda");
        }
        usleep(100 * 1000);
    }
    mount("/dev", "/disk/dev", NULL, MS_MOVE, NULL);
    if (chdir("/disk") < 0 || mount(".", "/", NULL, MS_MOVE, NULL) < 0 ||
        chroot(".") < 0 || chdir("/") < 0) {
        fail("the disk as root");
    }
    execv(argv[0], argv);
    fail(argv[0]);
}
