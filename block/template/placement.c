/*
 * thinvm template store: which disks a template belongs on
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See placement.h.  The hash values form a ring of 2^64.  Each disk has points
 * on it (in proportion to its weight), made from its name and nothing else; it
 * holds the ranges that end in them.  A template, at the first 8 bytes of its
 * digest, belongs to the disk whose range that is, and its further copies to
 * the next disks on the ring that are of other nodes.
 *
 * So when a disk comes, it takes ranges from all the others and nothing moves
 * between those; when it goes, they get them back.  Only SSDs are on the ring
 * if there are any.  Without, all disks are, and a template has a copy on each
 * node.
 *
 * The figures are in tests/unit/test-thinvm-template.c.
 */

#include "qemu/osdep.h"
#include "qemu/bitmap.h"
#include "qemu/bswap.h"
#include "placement.h"

/* For each unit of weight; four come from one hash */
#define POINTS              512
#define POINTS_OF_HASH      (TEMPLATE_DIGEST_SIZE / 8)

typedef struct Point {
    uint64_t at;
    ClusterDisk *disk;
} Point;

struct Placement {
    const Cluster *cluster;
    Point *points;
    size_t nb_points;
    unsigned copies;
};

static int compare_points(const void *a, const void *b)
{
    const Point *p = a, *q = b;

    if (p->at != q->at) {
        return p->at < q->at ? -1 : 1;
    }
    return strcmp(p->disk->name, q->disk->name);
}

static bool on_ring(const Cluster *c, const ClusterDisk *disk)
{
    return disk->ssd || !c->has_ssds;
}

static bool add_points(Placement *p, ClusterDisk *disk, Error **errp)
{
    for (unsigned i = 0; i < disk->weight * (POINTS / POINTS_OF_HASH); i++) {
        g_autofree char *text =
            g_strdup_printf("thinvm-template ring 1 %s %u", disk->name, i);
        TemplateDigest hash;

        if (!template_sha256(text, strlen(text), &hash, errp)) {
            return false;
        }
        for (int j = 0; j < POINTS_OF_HASH; j++) {
            p->points[p->nb_points++] = (Point) {
                .at = ldq_be_p(hash.hash + 8 * j),
                .disk = disk,
            };
        }
    }
    return true;
}

static unsigned nodes_with_disks(const Cluster *c)
{
    DECLARE_BITMAP(seen, CLUSTER_NODES_MAX);

    bitmap_zero(seen, CLUSTER_NODES_MAX);
    for (unsigned i = 0; i < c->disks->len; i++) {
        ClusterDisk *disk = g_ptr_array_index(c->disks, i);

        set_bit(disk->node->index, seen);
    }
    return bitmap_count_one(seen, CLUSTER_NODES_MAX);
}

Placement *placement_new(const Cluster *cluster, Error **errp)
{
    g_autoptr(Placement) p = g_new0(Placement, 1);
    size_t weights = 0;

    p->cluster = cluster;
    p->copies = cluster->has_ssds ? cluster->replicas
                                  : nodes_with_disks(cluster);
    for (unsigned i = 0; i < cluster->disks->len; i++) {
        ClusterDisk *disk = g_ptr_array_index(cluster->disks, i);

        weights += on_ring(cluster, disk) ? disk->weight : 0;
    }
    p->points = g_new(Point, weights * POINTS);
    for (unsigned i = 0; i < cluster->disks->len; i++) {
        ClusterDisk *disk = g_ptr_array_index(cluster->disks, i);

        if (on_ring(cluster, disk) && !add_points(p, disk, errp)) {
            return NULL;
        }
    }
    qsort(p->points, p->nb_points, sizeof(Point), compare_points);
    return g_steal_pointer(&p);
}

void placement_free(Placement *p)
{
    if (p) {
        g_free(p->points);
        g_free(p);
    }
}

/* The point that ends the range in which @at is */
static size_t range_of(const Placement *p, uint64_t at)
{
    size_t low = 0, high = p->nb_points;

    while (low < high) {
        size_t middle = low + (high - low) / 2;

        if (p->points[middle].at < at) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low == p->nb_points ? 0 : low;
}

GPtrArray *placement_disks(const Placement *p, const TemplateDigest *digest)
{
    GPtrArray *disks = g_ptr_array_new();
    DECLARE_BITMAP(used, CLUSTER_NODES_MAX);
    size_t at = range_of(p, ldq_be_p(digest->hash));

    bitmap_zero(used, CLUSTER_NODES_MAX);
    for (size_t i = 0; i < p->nb_points && disks->len < p->copies; i++) {
        ClusterDisk *disk = p->points[(at + i) % p->nb_points].disk;

        if (!test_and_set_bit(disk->node->index, used)) {
            g_ptr_array_add(disks, disk);
        }
    }
    return disks;
}

ClusterDisk *placement_on_node(const Placement *p,
                               const TemplateDigest *digest,
                               const ClusterNode *node)
{
    g_autoptr(GPtrArray) disks = placement_disks(p, digest);

    for (unsigned i = 0; i < disks->len; i++) {
        ClusterDisk *disk = g_ptr_array_index(disks, i);

        if (disk->node == node) {
            return disk;
        }
    }
    return NULL;
}

/* ------------------------------------------------------------------ */
/* Distance                                                            */

static bool same_site(const ClusterNode *a, const ClusterNode *b)
{
    return a->site && b->site && !strcmp(a->site, b->site);
}

static void add_node(GPtrArray *nodes, ClusterNode *node,
                     const ClusterNode *self)
{
    if (node != self && !g_ptr_array_find(nodes, node, NULL)) {
        g_ptr_array_add(nodes, node);
    }
}

GPtrArray *placement_nodes_by_distance(const Placement *p,
                                       const Cluster *cluster,
                                       const TemplateDigest *digest,
                                       const ClusterNode *self)
{
    g_autoptr(GPtrArray) disks = placement_disks(p, digest);
    g_autoptr(GPtrArray) nodes = g_ptr_array_new();
    GPtrArray *sorted = g_ptr_array_new();
    unsigned first = g_str_hash(self->name);

    for (unsigned i = 0; i < disks->len; i++) {
        ClusterDisk *disk = g_ptr_array_index(disks,
                                              (first + i) % disks->len);

        add_node(nodes, disk->node, self);
    }
    for (unsigned i = 0; i < cluster->nodes->len; i++) {
        add_node(nodes, g_ptr_array_index(cluster->nodes, i), self);
    }
    for (int near = 1; near >= 0; near--) {
        for (unsigned i = 0; i < nodes->len; i++) {
            ClusterNode *node = g_ptr_array_index(nodes, i);

            if (same_site(node, self) == near) {
                g_ptr_array_add(sorted, node);
            }
        }
    }
    return sorted;
}
