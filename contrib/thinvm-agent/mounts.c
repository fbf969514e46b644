/*
 * thinvm-agent: mounted file systems, and their free space
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * ext4 and xfs; others are not looked at, their dirty pages count as unknown.
 */
#include "agent.h"
#include <linux/fs.h>
#include <linux/fsmap.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

#define FREE_LEAST      (256 * 1024ULL)

struct mount mounts[MAX_MOUNTS];
unsigned nb_mounts;

static void unescape(char *s)
{
    char *d = s;

    while (*s) {
        if (s[0] == '\\' && s[1] >= '0' && s[1] <= '3' && s[2] && s[3]) {
            *d++ = (s[1] - '0') * 64 + (s[2] - '0') * 8 + (s[3] - '0');
            s += 4;
        } else {
            *d++ = *s++;
        }
    }
    *d = 0;
}

struct mount *mount_of(const fsid_t *fsid)
{
    for (unsigned i = 0; i < nb_mounts; i++) {
        if (!memcmp(&mounts[i].fsid, fsid, sizeof(*fsid))) {
            return &mounts[i];
        }
    }
    return NULL;
}

/*
 * Another file system may be mounted upon the one that the list names, and
 * its path then leads to that: nothing may be told, or discarded, of a device
 * by what is found there.
 */
static bool leads_to(int fd, dev_t device)
{
    struct stat st;

    return fd >= 0 && fstat(fd, &st) == 0 && st.st_dev == device;
}

static void add_mount(dev_t device, const char *path)
{
    struct mount *m = &mounts[nb_mounts];
    struct statfs st;
    int fd = nb_mounts < MAX_MOUNTS ? open(path, O_PATH | O_CLOEXEC) : -1;
    bool ok = leads_to(fd, device) && fstatfs(fd, &st) == 0 &&
              !mount_of(&st.f_fsid);

    if (fd >= 0) {
        close(fd);
    }
    if (!ok) {
        return;
    }
    memset(m, 0, sizeof(*m));
    m->device = device;
    m->fsid = st.f_fsid;
    m->fd = -1;
    snprintf(m->path, sizeof(m->path), "%s", path);
    nb_mounts++;
    watch_mount(m);
    on_disks(device, 0, 0, JUST_NAME, 0);
}

/* Mounts come and go: read the list anew */
void read_mounts(void)
{
    FILE *f = fopen("/proc/self/mountinfo", "re");
    char line[8192], root[PATH_MAX], path[PATH_MAX], type[64];
    unsigned major, minor;

    nb_mounts = 0;
    forget_layers();
    while (f && fgets(line, sizeof(line), f)) {
        char *dash = strstr(line, " - ");

        if (!dash || sscanf(dash, " - %63s", type) != 1 ||
            sscanf(line, "%*u %*u %u:%u %4095s %4095s", &major, &minor, root,
                   path) != 4 || strcmp(root, "/") ||
            (strcmp(type, "ext4") && strcmp(type, "xfs"))) {
            continue;
        }
        unescape(path);
        add_mount(makedev(major, minor), path);
    }
    if (f) {
        fclose(f);
    }
}

int mount_fd(struct mount *m)
{
    if (m->fd < 0) {
        m->fd = open(m->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        if (m->fd >= 0 && !leads_to(m->fd, m->device)) {
            close(m->fd);
            m->fd = -1;
        }
    }
    return m->fd;
}

void close_mounts(void)
{
    for (unsigned i = 0; i < nb_mounts; i++) {
        if (mounts[i].fd >= 0) {
            close(mounts[i].fd);
            mounts[i].fd = -1;
        }
    }
}

static void free_space_of(struct mount *m)
{
    static char buf[sizeof(struct fsmap_head) + 512 * sizeof(struct fsmap)]
        __attribute__((aligned(8)));
    struct fsmap_head *head = (struct fsmap_head *)buf;
    int fd = mount_fd(m);

    memset(head, 0, sizeof(*head));
    head->fmh_count = 512;
    memset(&head->fmh_keys[1], 0xff, sizeof(head->fmh_keys[1]));
    head->fmh_keys[1].fmr_length = 0;   /* xfs insists upon it */
    head->fmh_keys[1].fmr_reserved[0] = 0;
    head->fmh_keys[1].fmr_reserved[1] = 0;
    head->fmh_keys[1].fmr_reserved[2] = 0;
    while (fd >= 0 && ioctl(fd, FS_IOC_GETFSMAP, head) == 0 &&
           head->fmh_entries) {
        for (unsigned i = 0; i < head->fmh_entries; i++) {
            struct fsmap *r = &head->fmh_recs[i];

            if ((r->fmr_flags & FMR_OF_SPECIAL_OWNER) &&
                r->fmr_owner == FMR_OWN_FREE && r->fmr_length >= FREE_LEAST) {
                on_disks(m->device, r->fmr_physical, r->fmr_length, FREE, 0);
            }
        }
        if (head->fmh_recs[head->fmh_entries - 1].fmr_flags & FMR_OF_LAST) {
            break;
        }
        fsmap_advance(head);
    }
}

void find_free_space(void)
{
    for (unsigned i = 0; i < nb_mounts; i++) {
        free_space_of(&mounts[i]);
    }
}

uint64_t trim_mounts(dev_t disk, uint64_t least)
{
    uint64_t sum = 0;
    bool any = false;

    for (unsigned i = 0; i < nb_mounts; i++) {
        struct fstrim_range range = { 0, UINT64_MAX, least };

        if (is_on_disk(mounts[i].device, disk) && mount_fd(&mounts[i]) >= 0 &&
            ioctl(mounts[i].fd, FITRIM, &range) == 0) {
            any = true;
            sum += range.len;
        }
    }
    close_mounts();
    return any ? sum : UINT64_MAX;
}
