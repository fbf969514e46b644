/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A guest with file systems, for tests of what a guest knows of its files.
 *
 * It is /init.  It loads the modules of its initramfs, starts the program
 * /agent if there is one (with "--booted" if it has that itself), and obeys one-line commands from the virtio-serial
 * port org.thinvm.test; words are separated by one space:
 *
 *   mount DEVICE PATH [TYPE]    ext4 if it is not said; answers "ok"
 *   linear NAME START,LENGTH,MAJOR:MINOR,AT ...
 *                               a device-mapper device of linear pieces
 *                               (sectors), as LVM makes them; answers "ok
 *                               MAJOR:MINOR", and it is /dev/NAME
 *   striped NAME START,LENGTH,MAJOR:MINOR,AT ...
 *                               the same of stripes, which are no LVM linear map
 *   write PATH OFFSET LENGTH    buffered, answers when write() has returned
 *   fsync PATH | delete PATH | sync | umount PATH
 *   trim PATH                   FITRIM of all that is free
 *   vm NAME NUMBER              a setting below /proc/sys/vm
 *   load PATH MIB KIB PER_SECOND random|sequential sync|buffered
 *                               a program that overwrites a file (load.c)
 *   report                      answers "ok BLOCKS US" of all loads since the
 *                               last time: written, and the slowest fsync()
 *   unload                      ends them
 *   poweroff                    ends the machine
 *
 * An answer is "ok" with what is said above, or "X" and an error.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/dm-ioctl.h>
#include <linux/fs.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>
#include "load.h"

#define MAX_WORDS 16

static void load_modules(void)
{
    struct dirent **list;
    int n = scandir("/modules", &list, NULL, alphasort);

    for (int i = 0; i < n; i++) {
        char path[512];
        int fd;

        snprintf(path, sizeof(path), "/modules/%s", list[i]->d_name);
        fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd >= 0) {
            syscall(SYS_finit_module, fd, "", 0);
            close(fd);
        }
    }
}

/* /dev/virtio-ports/NAME, as udev would make it */
static int port_open(const char *wanted)
{
    DIR *dir = opendir("/sys/class/virtio-ports");
    struct dirent *e;
    int result = -1;

    mkdir("/dev/virtio-ports", 0755);
    while (dir && (e = readdir(dir))) {
        char path[512], name[256] = "";
        FILE *f;

        snprintf(path, sizeof(path), "/sys/class/virtio-ports/%s/name",
                 e->d_name);
        f = fopen(path, "re");
        if (!f) {
            continue;
        }
        if (fscanf(f, "%255s", name) == 1) {
            char to[512];

            snprintf(to, sizeof(to), "/dev/virtio-ports/%s", name);
            snprintf(path, sizeof(path), "/dev/%s", e->d_name);
            (void)!symlink(path, to);
            if (!strcmp(name, wanted)) {
                result = open(path, O_RDWR | O_CLOEXEC);
            }
        }
        fclose(f);
    }
    if (dir) {
        closedir(dir);
    }
    return result;
}

static int dm(int control, unsigned long request, struct dm_ioctl *io,
              const char *name, size_t size)
{
    io->version[0] = DM_VERSION_MAJOR;
    io->data_size = size;
    io->data_start = sizeof(*io);
    snprintf(io->name, sizeof(io->name), "%s", name);
    return ioctl(control, request, io);
}

/* "linear|striped NAME PIECE...": 0, and the device's number in *@device */
static int make_mapped(char **word, unsigned nb, dev_t *device)
{
    bool striped = !strcmp(word[0], "striped");
    static char buf[16384];
    struct dm_ioctl *io = (void *)buf;
    int control = open("/dev/mapper/control", O_RDWR | O_CLOEXEC);
    char path[300];
    char *at;

    memset(buf, 0, sizeof(buf));
    if (control < 0 || dm(control, DM_DEV_CREATE, io, word[1],
                          sizeof(buf)) < 0) {
        return -1;
    }
    *device = io->dev;
    memset(buf, 0, sizeof(buf));
    at = buf + sizeof(*io);
    for (unsigned i = 2; i < nb; i++) {
        struct dm_target_spec *spec = (void *)at;
        unsigned long long start, length, sector;
        unsigned major, minor;

        if (sscanf(word[i], "%llu,%llu,%u:%u,%llu", &start, &length, &major,
                   &minor, &sector) != 5) {
            errno = EINVAL;
            return -1;
        }
        spec->sector_start = start;
        spec->length = length;
        strcpy(spec->target_type, word[0]);
        sprintf(at + sizeof(*spec), "%s%u:%u %llu", striped ? "1 128 " : "",
                major, minor, sector);
        spec->next = sizeof(*spec) + 64;
        at += spec->next;
    }
    io->target_count = nb - 2;
    if (dm(control, DM_TABLE_LOAD, io, word[1], sizeof(buf)) < 0) {
        return -1;
    }
    memset(buf, 0, sizeof(*io));
    if (dm(control, DM_DEV_SUSPEND, io, word[1], sizeof(buf)) < 0) {
        return -1;
    }
    close(control);
    snprintf(path, sizeof(path), "/dev/%s", word[1]);
    return mknod(path, S_IFBLK | 0600, *device);
}

static int write_file(const char *path, const char *offset,
                      const char *length)
{
    static char block[65536];
    int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    uint64_t at = strtoull(offset, NULL, 10);
    uint64_t left = strtoull(length, NULL, 10);
    static unsigned char turn;

    memset(block, ++turn, sizeof(block));
    while (fd >= 0 && left) {
        ssize_t n = pwrite(fd, block, left < sizeof(block) ? left :
                           sizeof(block), at);

        if (n <= 0) {
            return -1;
        }
        at += n;
        left -= n;
    }
    return fd < 0 ? -1 : close(fd);
}

static int sync_file(const char *path)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    int ret = fd < 0 ? -1 : fsync(fd);

    close(fd);
    return ret;
}

static int mount_at(const char *device, const char *path, const char *type)
{
    mkdir(path, 0755);
    return mount(device, path, type, 0, NULL);
}

static int trim(const char *path)
{
    struct fstrim_range all = { 0, UINT64_MAX, 0 };
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int ret = fd < 0 ? -1 : ioctl(fd, FITRIM, &all);

    close(fd);
    return ret;
}

static int set_vm(const char *name, const char *number)
{
    char path[300];
    FILE *f;

    snprintf(path, sizeof(path), "/proc/sys/vm/%s", name);
    f = fopen(path, "we");
    if (!f) {
        return -1;
    }
    fprintf(f, "%s\n", number);
    return fclose(f);
}

/* What answers with numbers; false if the command is none of them */
static bool obey_question(char **word, unsigned nb, FILE *answers, int *ret)
{
    uint64_t writes, us;

    if (nb == 1 && !strcmp(word[0], "report")) {
        *ret = load_report(&writes, &us);
        if (*ret == 0) {
            fprintf(answers, "ok %llu %llu\n", (unsigned long long)writes,
                    (unsigned long long)us);
        }
    } else {
        return false;
    }
    return *ret == 0;
}

static void obey(char *line, FILE *answers)
{
    char *word[MAX_WORDS] = { NULL };
    unsigned nb = 0;
    dev_t device = 0;
    int ret = -1;

    errno = EINVAL;
    while (nb < MAX_WORDS && (word[nb] = strsep(&line, " "))) {
        nb++;
    }
    if (obey_question(word, nb, answers, &ret)) {
        fflush(answers);
        return;
    }
    if ((nb == 3 || nb == 4) && !strcmp(word[0], "mount")) {
        ret = mount_at(word[1], word[2], nb == 4 ? word[3] : "ext4");
    } else if (nb > 2 && (!strcmp(word[0], "linear") ||
                          !strcmp(word[0], "striped"))) {
        ret = make_mapped(word, nb, &device);
    } else if (nb == 4 && !strcmp(word[0], "write")) {
        ret = write_file(word[1], word[2], word[3]);
    } else if (nb == 2 && !strcmp(word[0], "fsync")) {
        ret = sync_file(word[1]);
    } else if (nb == 2 && !strcmp(word[0], "delete")) {
        ret = unlink(word[1]);
    } else if (nb == 2 && !strcmp(word[0], "trim")) {
        ret = trim(word[1]);
    } else if (nb == 3 && !strcmp(word[0], "vm")) {
        ret = set_vm(word[1], word[2]);
    } else if (nb == 7 && !strcmp(word[0], "load")) {
        ret = load_start(word);
    } else if (nb == 1 && !strcmp(word[0], "unload")) {
        ret = load_end();
    } else if (nb == 2 && !strcmp(word[0], "umount")) {
        ret = umount(word[1]);
    } else if (nb == 1 && !strcmp(word[0], "sync")) {
        sync();
        ret = 0;
    } else if (nb == 1 && !strcmp(word[0], "poweroff")) {
        sync();
        reboot(RB_POWER_OFF);
    }
    if (ret < 0) {
        fprintf(answers, "X %s: %s\n", word[0], strerror(errno));
    } else if (device) {
        fprintf(answers, "ok %u:%u\n", major(device), minor(device));
    } else {
        fprintf(answers, "ok\n");
    }
    fflush(answers);
}

int main(int argc, char **argv)
{
    bool booted = argc > 1 && !strcmp(argv[argc - 1], "--booted");
    char line[1024];
    FILE *in, *out;
    int port;

    mount("proc", "/proc", "proc", 0, NULL);
    mount("sys", "/sys", "sysfs", 0, NULL);
    mount("dev", "/dev", "devtmpfs", 0, NULL);
    load_modules();
    for (int i = 0; (port = port_open("org.thinvm.test")) < 0; i++) {
        if (i == 300) {
            fprintf(stderr, "no port\n");
            reboot(RB_POWER_OFF);
        }
        usleep(100000);
    }
    /* dirty pages are to stay dirty until a test has seen them */
    set_vm("dirty_expire_centisecs", "60000");
    if (access("/agent", X_OK) == 0 && fork() == 0) {
        execl("/agent", "/agent", booted ? "--booted" : NULL, NULL);
        _exit(127);
    }
    in = fdopen(port, "r");
    out = fdopen(dup(port), "w");
    fprintf(out, "ready\n");
    fflush(out);
    while (fgets(line, sizeof(line), in)) {
        line[strcspn(line, "\n")] = 0;
        obey(line, out);
        while (waitpid(-1, NULL, WNOHANG) > 0) {
            ;
        }
    }
    reboot(RB_POWER_OFF);
    return 1;
}
