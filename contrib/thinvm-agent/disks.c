/*
 * thinvm-agent: disks, and what lies upon them
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Partitions and linear device-mapper tables (LVM) are seen through, whatever else
 * is counted as unknown.
 */
#include <ctype.h>
#include <linux/dm-ioctl.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include "agent.h"

#define MAX_SEGMENTS    256             /* of a logical volume */
#define MAX_LAYERS      8               /* of devices upon each other */
#define MAX_DEVICES     256             /* that are remembered in a look */

struct segment {
    uint64_t start, length;             /* bytes, of the device above */
    dev_t device;
    uint64_t at;
};

struct layer {
    dev_t device;
    int kind;                           /* as find_layer() says */
    unsigned nb;
    struct segment *seg;
};

static struct layer layers[MAX_DEVICES];
static unsigned nb_layers;

static const char *const reason_names[] = {
    "complete", "filesystem", "mapping", "delayed", "limit", "privilege",
    "other"
};

struct disk disks[MAX_DISKS];
unsigned nb_disks;
uint64_t unknown;
enum reason worst;
static int dm_control = -1;
static uint64_t written_of_forgotten;   /* bytes, while they were known */

void open_dm_control(void)
{
    dm_control = open("/dev/mapper/control", O_RDWR | O_CLOEXEC);
}

/* What could not be told, and why; the first reason of a look stays */
void cannot_tell(uint64_t bytes, enum reason reason)
{
    unknown += bytes;
    if (bytes && worst == COMPLETE) {
        worst = reason;
    }
}

/* The contents of a small file of sysfs, without the line feed */
static bool sys_read(dev_t device, const char *name, char *buf, size_t size)
{
    char path[PATH_MAX];
    ssize_t n;
    int fd;

    snprintf(path, sizeof(path), "/sys/dev/block/%u:%u/%s", major(device),
             minor(device), name);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return false;
    }
    n = read(fd, buf, size - 1);
    close(fd);
    if (n < 0) {
        return false;
    }
    while (n > 0 && isspace((unsigned char)buf[n - 1])) {
        n--;
    }
    buf[n] = 0;
    return true;
}

static bool sys_exists(dev_t device, const char *name)
{
    char path[PATH_MAX];

    snprintf(path, sizeof(path), "/sys/dev/block/%u:%u/%s", major(device),
             minor(device), name);
    return access(path, F_OK) == 0;
}

static uint64_t sys_number(dev_t device, const char *name)
{
    char buf[64];

    return sys_read(device, name, buf, sizeof(buf)) ? strtoull(buf, NULL, 10)
                                                    : 0;
}

/* As a word of the protocol */
static void as_word(char *dst, const char *src)
{
    char *d = dst;

    for (; *src && d - dst <= 61; src++) {
        if (*src <= ' ' || *src > '~' || *src == '%') {
            d += sprintf(d, "%%%02X", (unsigned char)*src);
        } else {
            *d++ = *src;
        }
    }
    *d = 0;
    if (d == dst) {
        strcpy(dst, "-");
    }
}

static void serial_of(dev_t device, char *word)
{
    char buf[NAME_SIZE] = "";
    const char *serial = buf;

    if (sys_read(device, "device/vpd_pg80", buf, sizeof(buf) - 1)) {
        serial = buf + 4;           /* behind the header of the page */
    } else if (!sys_read(device, "serial", buf, sizeof(buf)) &&
               !sys_read(device, "device/serial", buf, sizeof(buf))) {
        buf[0] = 0;
    }
    while (*serial == ' ') {
        serial++;
    }
    as_word(word, serial);
}

static void tell_disk(unsigned number)
{
    struct disk *d = &disks[number];
    char serial[NAME_SIZE], name[NAME_SIZE];

    serial_of(d->device, serial);
    as_word(name, d->name);
    set_clear(&d->dirty);
    set_clear(&d->free);
    d->told_known = d->told_unknown = UINT64_MAX;
    d->told = say("disk %u %" PRIu64 " %s %s", number, d->size, serial, name);
}

/* Bytes written to a disk since boot */
static uint64_t written_to(dev_t device)
{
    char buf[512];
    uint64_t sectors;

    /* the seventh figure; Documentation/block/stat.rst */
    return sys_read(device, "stat", buf, sizeof(buf)) &&
           sscanf(buf, "%*u %*u %*u %*u %*u %*u %" SCNu64, &sectors) == 1
           ? sectors * 512 : 0;
}

/* The number of a whole disk, or -1 if there are too many */
static int disk_number(dev_t device)
{
    char link[PATH_MAX], path[PATH_MAX];
    ssize_t n;
    struct disk *d;

    for (unsigned i = 0; i < nb_disks; i++) {
        if (disks[i].device == device) {
            return i;
        }
    }
    snprintf(path, sizeof(path), "/sys/dev/block/%u:%u", major(device),
             minor(device));
    n = readlink(path, link, sizeof(link) - 1);
    if (nb_disks == MAX_DISKS || n < 0) {
        return -1;
    }
    link[n] = 0;
    d = &disks[nb_disks];
    memset(d, 0, sizeof(*d));
    d->device = device;
    d->size = sys_number(device, "size") * 512;
    d->written = written_to(device);
    snprintf(d->name, sizeof(d->name), "%.200s", strrchr(link, '/') ?
             strrchr(link, '/') + 1 : link);
    return nb_disks++;
}

/* The table of a logical volume: linear pieces only.  -1: something else */
static int dm_table(dev_t device, struct segment *seg, unsigned room)
{
    static char buf[64 * 1024];
    struct dm_ioctl *io = (struct dm_ioctl *)buf;
    unsigned n = 0;
    char *at;

    memset(buf, 0, sizeof(*io));
    io->version[0] = DM_VERSION_MAJOR;
    io->data_size = sizeof(buf);
    io->data_start = sizeof(*io);
    io->dev = device;
    io->flags = DM_STATUS_TABLE_FLAG | DM_NOFLUSH_FLAG;
    if (dm_control < 0 || ioctl(dm_control, DM_TABLE_STATUS, io) < 0 ||
        (io->flags & DM_BUFFER_FULL_FLAG) || io->target_count > room) {
        return -1;
    }
    at = buf + io->data_start;
    for (; n < io->target_count; n++) {
        struct dm_target_spec *spec = (struct dm_target_spec *)at;
        unsigned major, minor;
        uint64_t sector;

        if (strcmp(spec->target_type, "linear") ||
            sscanf(at + sizeof(*spec), "%u:%u %" SCNu64, &major, &minor,
                   &sector) != 3) {
            return -1;
        }
        seg[n] = (struct segment) {
            spec->sector_start * 512, spec->length * 512,
            makedev(major, minor), sector * 512,
        };
        at = buf + io->data_start + spec->next;
    }
    return n;
}

/*
 * What a device is: 0: @nb pieces of others, 1: a whole disk, -1: something
 * that we do not know
 */
static int find_layer(dev_t device, struct segment *seg, unsigned *nb)
{
    char buf[64];
    unsigned major, minor;
    int n;

    *nb = 0;
    if (sys_exists(device, "partition")) {
        if (!sys_read(device, "../dev", buf, sizeof(buf)) ||
            sscanf(buf, "%u:%u", &major, &minor) != 2) {
            return -1;
        }
        seg[0] = (struct segment) {
            0, sys_number(device, "size") * 512, makedev(major, minor),
            sys_number(device, "start") * 512,
        };
        *nb = 1;
        return 0;
    }
    if (sys_exists(device, "dm")) {
        n = dm_table(device, seg, MAX_SEGMENTS);
        *nb = n < 0 ? 0 : n;
        return n < 0 ? -1 : 0;
    }
    if (sys_exists(device, "md") || sys_exists(device, "loop") ||
        sys_exists(device, "bcache") || !sys_exists(device, "device")) {
        return -1;
    }
    return 1;
}

/* The same from memory, which forget_layers() empties for each look */
static const struct layer *layer_of(dev_t device)
{
    static struct segment seg[MAX_SEGMENTS];
    struct layer *l;

    for (unsigned i = 0; i < nb_layers; i++) {
        if (layers[i].device == device) {
            return &layers[i];
        }
    }
    if (nb_layers == MAX_DEVICES) {
        return NULL;
    }
    l = &layers[nb_layers++];
    l->device = device;
    l->kind = find_layer(device, seg, &l->nb);
    l->seg = must(malloc((l->nb + 1) * sizeof(*seg)));
    memcpy(l->seg, seg, l->nb * sizeof(*seg));
    return l;
}

void forget_layers(void)
{
    while (nb_layers) {
        free(layers[--nb_layers].seg);
    }
}

static void note(struct disk *d, uint64_t start, uint64_t end, enum kind kind,
                 uint64_t due)
{
    end = end < d->size ? end : d->size;
    if (kind == FREE) {
        set_append(&d->now_free, (start + 4095) / 4096 * 4096,
                   end / 4096 * 4096, 0);
        return;
    }
    d->known += end > start ? end - start : 0;
    end = (end + GRAIN - 1) / GRAIN * GRAIN;
    set_append(&d->now_dirty, start / GRAIN * GRAIN,
               end < d->size ? end : d->size / 512 * 512, due);
}

/* What is at @start of @device, as ranges of disks */
static void descend(dev_t device, uint64_t start, uint64_t length,
                    enum kind kind, uint64_t due, int depth)
{
    const struct layer *l = depth < MAX_LAYERS ? layer_of(device) : NULL;
    int number = l && l->kind == 1 ? disk_number(device) : -1;
    uint64_t end = start + length;

    if (!l || l->kind < 0 || (l->kind == 1 && number < 0)) {
        cannot_tell(kind == DIRTY ? length : 0,
                    l && l->kind < 0 ? MAPPING : LIMIT);
        return;
    }
    for (unsigned i = 0; i < l->nb; i++) {
        const struct segment *seg = &l->seg[i];
        uint64_t from = start > seg->start ? start : seg->start;
        uint64_t seg_end = seg->start + seg->length;
        uint64_t to = end < seg_end ? end : seg_end;

        if (kind == JUST_NAME) {
            descend(seg->device, 0, 0, kind, due, depth + 1);
        } else if (from < to) {
            descend(seg->device, seg->at + from - seg->start, to - from, kind,
                    due, depth + 1);
        }
    }
    if (l->kind == 1 && kind != JUST_NAME) {
        note(&disks[number], start, end, kind, due);
    }
}

void on_disks(dev_t device, uint64_t start, uint64_t length, enum kind kind,
              uint64_t due)
{
    descend(device, start, length, kind, due, 0);
}

static bool lies_on(dev_t device, dev_t disk, int depth)
{
    const struct layer *l = depth < MAX_LAYERS ? layer_of(device) : NULL;

    for (unsigned i = 0; l && i < l->nb; i++) {
        if (lies_on(l->seg[i].device, disk, depth + 1)) {
            return true;
        }
    }
    return l && l->kind == 1 && device == disk;
}

bool is_on_disk(dev_t device, dev_t disk)
{
    return lies_on(device, disk, 0);
}

void tell_disks(void)
{
    for (unsigned i = 0; i < nb_disks; i++) {
        bool there = sys_exists(disks[i].device, "size");

        if (!there && disks[i].told) {
            disks[i].told = !say("gone %u", i);
            set_clear(&disks[i].dirty);
            set_clear(&disks[i].free);
        } else if (there && !disks[i].told) {
            tell_disk(i);
        }
    }
}

void tell_coverage(unsigned number, bool privileged)
{
    struct disk *d = &disks[number];
    enum reason reason = privileged ? worst : PRIVILEGE;

    if (d->known == d->told_known && unknown == d->told_unknown &&
        reason == d->told_reason) {
        return;
    }
    if (say("coverage %u %" PRIu64 " %" PRIu64 " %s", number, d->known,
            unknown, reason_names[reason])) {
        d->told_known = d->known;
        d->told_unknown = unknown;
        d->told_reason = reason;
    }
}

uint64_t bytes_written(void)
{
    uint64_t sum = written_of_forgotten;

    for (unsigned i = 0; i < nb_disks; i++) {
        uint64_t now = written_to(disks[i].device);

        /* less if it has gone, or another has taken its place */
        sum += now > disks[i].written ? now - disks[i].written : 0;
    }
    return sum;
}

void forget_disks(void)
{
    written_of_forgotten = bytes_written();
    for (unsigned i = 0; i < nb_disks; i++) {
        set_clear(&disks[i].dirty);
        set_clear(&disks[i].free);
        set_clear(&disks[i].now_dirty);
        set_clear(&disks[i].now_free);
    }
    nb_disks = 0;
}
