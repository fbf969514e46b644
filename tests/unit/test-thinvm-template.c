/*
 * thinvm template store: placement, the description, the file of chunks
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * /template/placement/even: ten equal SSDs hold within 15 % of a tenth of
 * 20,000 templates each; one of weight 3 within 15 % of three shares.  (With 8
 * points for a disk instead of 512: 45 % and more.)
 *
 * /template/placement/comes, .../goes: exactly the templates that the disk
 * gets, or had, move; of each, one copy.  They are within 15 % of its share.
 * (With digest % number of disks as the placement, nearly all move.)
 *
 * /template/placement/nodes: copies are on different nodes, and without SSDs
 * on every one.
 *
 * /template/description/...: what is refused, and the words that say why.
 *
 * /template/chunks: what is written is read again, and every single bit of
 * a file counts.  The default size follows from the length, and the hashes stay
 * within 8 MiB; it is the smallest that does that.  What is hashed many chunks
 * at a time has the hash of each.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/bswap.h"
#include "crypto/init.h"
#include "block/template/chunks.h"
#include "block/template/placement.h"

#define NB_TEMPLATES    20000

/* ------------------------------------------------------------------ */
/* Placement                                                           */

static TemplateDigest digest_of(uint32_t n)
{
    TemplateDigest digest;

    template_sha256(&n, sizeof(n), &digest, &error_abort);
    return digest;
}

/* Disks d0, d1... of nodes n0, n1...; @without is left out (-1: none) */
static Cluster *make_cluster(int disks, int disks_of_node, int replicas,
                             bool ssd, int heavy, int without)
{
    g_autoptr(GString) text = g_string_new(NULL);

    g_string_printf(text, "[cluster]\nreplicas = %d\n", replicas);
    for (int i = 0; i < disks; i++) {
        if (i % disks_of_node == 0) {
            g_string_append_printf(text, "[node n%d]\n", i / disks_of_node);
        }
        if (i != without) {
            g_string_append_printf(text, "[disk d%d]\nnode = n%d\npath = /d%d\n"
                                   "ssd = %s\nweight = %d\n", i,
                                   i / disks_of_node, i, ssd ? "on" : "off",
                                   i == heavy ? 3 : 1);
        }
    }
    return cluster_parse(text->str, text->len, "test", &error_abort);
}

typedef struct Held {
    unsigned of_disk[64];
} Held;

static int disk_number(const ClusterDisk *disk)
{
    return atoi(disk->name + 1);
}

static void count(const Placement *p, Held *held)
{
    memset(held, 0, sizeof(*held));
    for (uint32_t i = 0; i < NB_TEMPLATES; i++) {
        TemplateDigest digest = digest_of(i);
        g_autoptr(GPtrArray) disks = placement_disks(p, &digest);

        held->of_disk[disk_number(g_ptr_array_index(disks, 0))]++;
    }
}

static void check_share(const char *what, unsigned found, double share)
{
    double part = found / (share * NB_TEMPLATES);

    g_test_message("%s: %u, %.2f of an even share", what, found, part);
    g_assert_cmpfloat(part, >, 0.85);
    g_assert_cmpfloat(part, <, 1.15);
}

static void test_even(void)
{
    for (int heavy = -1; heavy <= 0; heavy++) {
        g_autoptr(Cluster) c = make_cluster(10, 1, 1, true, heavy, -1);
        g_autoptr(Placement) p = placement_new(c, &error_abort);
        double units = heavy < 0 ? 10 : 12;
        Held held;

        count(p, &held);
        for (int i = 0; i < 10; i++) {
            check_share("a disk", held.of_disk[i],
                        (i == heavy ? 3 : 1) / units);
        }
    }
}

/* Without and with disk @number: what differs? */
static void compare(int disks_of_node, int replicas, int number)
{
    g_autoptr(Cluster) few = make_cluster(11, disks_of_node, replicas, true,
                                          -1, number);
    g_autoptr(Cluster) all = make_cluster(11, disks_of_node, replicas, true,
                                          -1, -1);
    g_autoptr(Placement) before = placement_new(few, &error_abort);
    g_autoptr(Placement) after = placement_new(all, &error_abort);
    unsigned moved = 0;

    for (uint32_t i = 0; i < NB_TEMPLATES; i++) {
        TemplateDigest digest = digest_of(i);
        g_autoptr(GPtrArray) a = placement_disks(before, &digest);
        g_autoptr(GPtrArray) b = placement_disks(after, &digest);
        unsigned others = 0, got = 0;

        g_assert_cmpuint(a->len, ==, replicas);
        g_assert_cmpuint(b->len, ==, replicas);
        for (unsigned j = 0; j < b->len; j++) {
            ClusterDisk *disk = g_ptr_array_index(b, j);
            bool had = false;

            for (unsigned k = 0; k < a->len; k++) {
                ClusterDisk *old = g_ptr_array_index(a, k);

                had = had || !strcmp(old->name, disk->name);
            }
            got += disk_number(disk) == number;
            others += !had && disk_number(disk) != number;
        }
        /* One copy at most, and to or from the disk that came or went */
        g_assert_cmpuint(others, ==, 0);
        moved += got;
    }
    check_share("moved", moved, replicas / 11.0);
}

static void test_moves(void)
{
    compare(1, 1, 10);
    compare(1, 1, 3);
    compare(1, 3, 5);
}

/* Several disks on a node */
static void test_moves_in_node(void)
{
    compare(2, 1, 4);
}

static void test_nodes(void)
{
    for (int ssd = 0; ssd <= 1; ssd++) {
        g_autoptr(Cluster) c = make_cluster(12, 3, 2, ssd, -1, -1);
        g_autoptr(Placement) p = placement_new(c, &error_abort);

        for (uint32_t i = 0; i < 1000; i++) {
            TemplateDigest digest = digest_of(i);
            g_autoptr(GPtrArray) disks = placement_disks(p, &digest);
            unsigned seen = 0;

            g_assert_cmpuint(disks->len, ==, ssd ? 2 : 4);
            for (unsigned j = 0; j < disks->len; j++) {
                ClusterDisk *disk = g_ptr_array_index(disks, j);

                g_assert(!(seen & 1u << disk->node->index));
                seen |= 1u << disk->node->index;
                g_assert(placement_on_node(p, &digest, disk->node) == disk);
            }
        }
    }
}

/* ------------------------------------------------------------------ */
/* The description                                                     */

#define NODE    "[node a]\nnbd = 10.0.0.1:10809\nsite = x\n"
#define DISK    "[disk a0]\nnode = a\npath = /srv/a0\n"

static const struct {
    const char *text, *words;
} refused[] = {
    { "", "there is no '[disk NAME]'" },
    { NODE, "there is no '[disk NAME]'" },
    { "nbd = x\n" NODE DISK, "line 1: key 'nbd' stands before" },
    { "[node a]\nnbd\n" DISK, "line 2: 'nbd' is neither" },
    { "[node a\n", "line 1: '[node a' has no ']'" },
    { "[nodes a]\n", "'[nodes a]' is none of" },
    { "[node a/b]\n", "'a/b' is no name" },
    { "[node ]\n", "'[node]' is none of" },
    { "[node 0123456789012345678901234567890123456789012345678901234567890123]",
      "is no name" },
    { NODE NODE DISK, "line 4: node 'a' is here for the second time" },
    { NODE DISK DISK, "line 7: disk 'a0' is here for the second time" },
    { "[cluster]\n[cluster]\n", "line 2: section [cluster]" },
    { NODE "site = y\n" DISK, "line 4: key 'site' is here for the second" },
    { NODE "port = 3\n" DISK, "unknown key 'port'; here may be: nbd, site" },
    { NODE "\n[disk b]\nnode = b\npath = /b\n", "there is no '[node b]'" },
    { NODE "\n[disk b]\nnode = a\n", "disk 'b' has no 'path'" },
    { NODE "\n[disk b]\npath = /b\n", "disk 'b' has no 'node'" },
    { NODE DISK "ssd = yes\n", "'ssd' is 'yes'; it must be 'on' or 'off'" },
    { NODE DISK "weight = 0\n", "'weight' is '0'; it must be 1 to 100" },
    { NODE DISK "weight = 101\n", "'weight' is '101'" },
    { NODE DISK "weight = 1x\n", "'weight' is '1x'" },
    { NODE DISK "weight = 99999999999999999999\n", "'weight' is '9999" },
    { "[cluster]\nreplicas = 17\n" NODE DISK, "'replicas' is '17'" },
    { "[cluster]\nreplicas = 2\n" NODE DISK "ssd = on\n",
      "'replicas' is 2, and 1 nodes have an SSD" },
    { "[node a]\nnbd = 10.0.0.1\n" DISK, "'nbd' is '10.0.0.1'; it must be" },
    { "[node a]\nnbd = fd:3\n" DISK, "'nbd' is 'fd:3'" },
    { "[node a]\nnbd = vsock:3:4\n" DISK, "'nbd' is 'vsock:3:4'" },
    { NODE "[disk a0]\nnode = a\npath = srv\n", "'path' is 'srv'" },
    { NODE DISK "[disk a1]\nnode = a\npath = /srv/a0\n", "the same path" },
};

static void expect_refused(const char *text, size_t size, const char *words)
{
    Error *err = NULL;

    g_assert_null(cluster_parse(text, size, "the file", &err));
    g_assert_nonnull(err);
    if (!strstr(error_get_pretty(err), words) ||
        !strstr(error_get_pretty(err), "the file")) {
        g_test_message("'%s' does not say: %s", error_get_pretty(err), words);
        g_test_fail();
    }
    error_free(err);
}

static void test_refused(void)
{
    g_autoptr(GString) many = g_string_new("[node a]\n");

    for (int i = 0; i < ARRAY_SIZE(refused); i++) {
        expect_refused(refused[i].text, strlen(refused[i].text),
                       refused[i].words);
    }
    expect_refused(NODE "\0" DISK, sizeof(NODE "\0" DISK), "no text file");
    for (int i = 0; i < CLUSTER_DISKS_MAX + 1; i++) {
        g_string_append_printf(many, "[disk d%d]\nnode = a\npath = /%d\n", i,
                               i);
    }
    expect_refused(many->str, many->len, "more than 1024 disks");
    g_string_assign(many, "");
    for (int i = 0; i < CLUSTER_NODES_MAX + 1; i++) {
        g_string_append_printf(many, "[node n%d]\n", i);
    }
    expect_refused(many->str, many->len, "more than 256 nodes");
    g_string_assign(many, "[node a]\n");
    for (int i = 0; i < 42; i++) {
        g_string_append_printf(many, "[disk d%d]\nnode = a\npath = /%d\n"
                               "weight = 100\n", i, i);
    }
    expect_refused(many->str, many->len, "add up to 4200; at most 4096");
}

static void test_accepted(void)
{
    static const char text[] =
        "# ours\n\n  [cluster]  \n  replicas=1\r\n[disk a0]\nnode= a\n"
        "path = /with a space\nssd = on\nweight = 7\n"
        "[ node a ]\nnbd = [fe80::1]:10809\n[node b]\nnbd = unix:/run/b\n";
    g_autoptr(Cluster) c = cluster_parse(text, strlen(text), "test",
                                         &error_abort);
    ClusterDisk *disk = cluster_find_disk(c, "a0");

    g_assert(disk && disk->ssd && disk->weight == 7);
    g_assert_cmpstr(disk->path, ==, "/with a space");
    g_assert_cmpstr(disk->node->name, ==, "a");
    g_assert_cmpstr(disk->node->nbd->u.inet.host, ==, "fe80::1");
    g_assert_cmpint(cluster_find_node(c, "b")->nbd->type, ==,
                    SOCKET_ADDRESS_TYPE_UNIX);
}

/* ------------------------------------------------------------------ */
/* Chunks                                                              */

static TemplateChunks *decode(const uint8_t *buf)
{
    g_autoptr(TemplateChunks) c = template_chunks_decode_header(buf, NULL);

    return c && template_chunks_decode_hashes(c, buf, buf +
                                              TEMPLATE_CHUNKS_HEADER, NULL)
           ? g_steal_pointer(&c) : NULL;
}

static TemplateChunks *make_chunks(void)
{
    g_autofree uint8_t *data = g_malloc0(3 * MiB - 512);
    g_autoptr(TemplateHasher) h = template_hasher_new(3 * MiB - 512, MiB,
                                                      &error_abort);
    TemplateChunks *c;
    TemplateDigest whole;

    data[5] = 1;
    data[2 * MiB] = 7;
    template_hasher_add(h, data, MiB, &error_abort);
    template_hasher_add(h, data + MiB, MiB, &error_abort);
    template_hasher_add(h, data + 2 * MiB, MiB - 512, &error_abort);
    c = template_hasher_finish(h, &error_abort);
    template_sha256(data, 3 * MiB - 512, &whole, &error_abort);
    g_assert(template_digest_equal(&whole, &c->digest));
    return c;
}

static void test_sizes(void)
{
    static const struct {
        uint64_t length;
        uint32_t size;
    } sizes[] = {
        { 1, 64 * KiB },
        { 16 * GiB, 64 * KiB },
        { 16 * GiB + 1, 128 * KiB },
        { 100 * GiB, 512 * KiB },
        { 256 * GiB, MiB },
        { TEMPLATE_LENGTH_MAX, 16 * MiB },
    };
    static const uint64_t wrong[] = {
        0, 1, 4096, 32 * KiB, 64 * KiB + 1, 96 * KiB, 32 * MiB,
        UINT64_C(1) << 32 | 64 * KiB, UINT64_C(1) << 63, UINT64_MAX,
    };

    for (int i = 0; i < ARRAY_SIZE(sizes); i++) {
        uint32_t size = template_chunk_size_default(sizes[i].length);

        g_assert_cmpuint(size, ==, sizes[i].size);
        g_assert_true(template_chunk_size_fits(size, sizes[i].length));
        g_assert_cmpuint(DIV_ROUND_UP(sizes[i].length, size) * 32, <=, 8 * MiB);
    }
    for (int i = 0; i < ARRAY_SIZE(wrong); i++) {
        g_assert_false(template_chunk_size_fits(wrong[i], 1));
    }
    g_assert_true(template_chunk_size_fits(64 * KiB, 256 * GiB));
    g_assert_false(template_chunk_size_fits(64 * KiB, 256 * GiB + 1));
}

/* By calls with many chunks, with one, and with the short one at the end */
static void test_hasher(void)
{
    const uint32_t length = 3 * MiB - 512, size = 64 * KiB;
    g_autofree uint8_t *data = g_malloc(length);
    g_autoptr(TemplateHasher) h = template_hasher_new(length, size,
                                                      &error_abort);
    g_autoptr(TemplateChunks) c = NULL;
    TemplateDigest hash;

    for (uint32_t i = 0; i < length; i++) {
        data[i] = i % 251 + i / size;
    }
    template_hasher_add(h, data, MiB, &error_abort);
    template_hasher_add(h, data + MiB, size, &error_abort);
    template_hasher_add(h, data + MiB + size, length - MiB - size,
                        &error_abort);
    c = template_hasher_finish(h, &error_abort);
    g_assert_cmpuint(c->nb_chunks, ==, 48);
    for (unsigned n = 0; n < 48; n++) {
        template_sha256(data + n * size, template_chunk_bytes(c, n), &hash,
                        &error_abort);
        g_assert(template_digest_equal(&hash, &c->hashes[n]));
    }
    template_sha256(data, length, &hash, &error_abort);
    g_assert(template_digest_equal(&hash, &c->digest));
}

static void test_chunks(void)
{
    g_autoptr(TemplateChunks) c = make_chunks();
    g_autofree uint8_t *buf = template_chunks_encode(c, &error_abort);
    g_autoptr(TemplateChunks) same = decode(buf);
    size_t size = template_chunks_file_size(c);

    g_assert_nonnull(same);
    g_assert_cmpuint(size, ==, 4096 + 3 * 32);
    g_assert_cmpuint(template_chunk_bytes(same, 2), ==, MiB - 512);
    g_assert(template_digest_equal(&same->digest, &c->digest));
    g_assert_cmpmem(same->hashes, 96, c->hashes, 96);
    for (size_t bit = 0; bit < 8 * size; bit++) {
        buf[bit / 8] ^= 1 << bit % 8;
        g_assert_null(decode(buf));
        buf[bit / 8] ^= 1 << bit % 8;
    }
}

/* Fields that no writer writes, under a hash that is right */
static void test_hostile(void)
{
    static const struct {
        unsigned offset, bytes;
        uint64_t value;
        const char *words;
    } fields[] = {
        { 8, 4, 2, "version 2" },
        { 12, 4, 0, "chunk size is 0" },
        { 12, 4, 65537, "chunk size is 65537" },
        { 12, 4, 1 << 15, "chunk size is 32768" },
        { 12, 4, 1u << 31, "chunk size is" },
        { 16, 8, 0, "is empty" },
        { 16, 8, UINT64_MAX, "at most" },
        { 16, 8, 4 * MiB, "3 chunks of 1048576 bytes" },
        { 24, 8, UINT64_MAX, "chunks of" },
        { 24, 8, 0, "0 chunks of" },
        { 100, 8, 1, "reserved" },
    };
    g_autoptr(TemplateChunks) c = make_chunks();

    for (int i = 0; i < ARRAY_SIZE(fields); i++) {
        g_autofree uint8_t *buf = template_chunks_encode(c, &error_abort);
        Error *err = NULL;
        TemplateDigest hash;

        if (fields[i].bytes == 4) {
            stl_le_p(buf + fields[i].offset, fields[i].value);
        } else {
            stq_le_p(buf + fields[i].offset, fields[i].value);
        }
        template_sha256(buf, 4064, &hash, &error_abort);
        memcpy(buf + 4064, &hash, 32);
        g_assert_null(template_chunks_decode_header(buf, &err));
        g_assert_nonnull(strstr(error_get_pretty(err), fields[i].words));
        error_free(err);
    }
}

static void test_digest(void)
{
    static const char *const bad[] = {
        "", "sha256:", "sha1:0000000000000000000000000000000000000000000000000"
        "000000000000000", "../../../../../../../../../../../../../../../../../"
        "../../../../etc/p", "sha256:ABCDEF000000000000000000000000000000000000"
        "00000000000000000000000",
        "00000000000000000000000000000000000000000000000000000000000000000",
    };
    TemplateDigest digest = digest_of(1), same;
    char text[TEMPLATE_DIGEST_TEXT];

    template_digest_format(&digest, text);
    g_assert(template_digest_parse(text, &same, &error_abort));
    g_assert(template_digest_equal(&digest, &same));
    g_assert(template_digest_parse(text + 7, &same, &error_abort));
    for (int i = 0; i < ARRAY_SIZE(bad); i++) {
        g_assert(!template_digest_parse(bad[i], &same, NULL));
    }
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    qcrypto_init(&error_fatal);
    g_test_add_func("/template/placement/even", test_even);
    g_test_add_func("/template/placement/moves", test_moves);
    g_test_add_func("/template/placement/moves-in-node", test_moves_in_node);
    g_test_add_func("/template/placement/nodes", test_nodes);
    g_test_add_func("/template/description/refused", test_refused);
    g_test_add_func("/template/description/accepted", test_accepted);
    g_test_add_func("/template/chunks/file", test_chunks);
    g_test_add_func("/template/chunks/sizes", test_sizes);
    g_test_add_func("/template/chunks/hasher", test_hasher);
    g_test_add_func("/template/chunks/hostile", test_hostile);
    g_test_add_func("/template/digest", test_digest);
    return g_test_run();
}
