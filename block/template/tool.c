/*
 * thinvm-template: the program
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Options, the description, the stores of this node; each command is a
 * function in tool-*.c.
 */

#include "qemu/osdep.h"
#include <getopt.h>
#include "qapi/error.h"
#include "block/block.h"
#include "crypto/init.h"
#include "qemu-version.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "qemu/module.h"
#include "qemu/qemu-progress.h"
#include "qemu/sockets.h"
#include "tool.h"

#define DEFAULT_CONFIG      "/etc/thinvm/templates.conf"
#define DIGESTS_MAX         1000        /* on a command line */

typedef struct Command {
    const char *name;
    int (*run)(Tool *t);
    const char *options;        /* the letters that it takes */
    int min_args, max_args;
    bool all_disks;             /* one that fails is a failure */
} Command;

static const Command commands[] = {
    { "init", tool_init, "", 0, 0 },
    { "add", tool_add, "cdfip", 1, 1 },
    { "list", tool_list, "Cj", 0, 0, true },
    { "locate", tool_locate, "aDFNu", 1, 1 },
    { "remove", tool_remove, "", 1, 1 },
    { "verify", tool_verify, "pr", 0, DIGESTS_MAX, true },
    { "repair", tool_repair, "p", 0, DIGESTS_MAX, true },
    { "rebalance", tool_rebalance, "kp", 0, 0, true },
    { "serve", tool_serve, "", 0, 0 },
};

static void help(void)
{
    printf(
"usage: thinvm-template [-c FILE] [-n NODE] COMMAND [OPTIONS] [ARGUMENTS]\n"
"\n"
"Keeps templates of virtual disks on the nodes of a cluster, by the SHA-256\n"
"of their contents. Writes this node's disks only.\n"
"\n"
"  -c, --config FILE    the cluster (default: " DEFAULT_CONFIG ")\n"
"  -n, --node NODE      this node's name in it (default: the host's name)\n"
"  -h, --help           this text\n"
"  -V, --version        the version\n"
"\n"
"  init                 make this node's disks into stores\n"
"  add [-f FORMAT] [--image-opts] [--digest DIGEST] [--chunk-size SIZE]\n"
"      [-p] IMAGE\n"
"                       bring in any image that QEMU reads; prints its\n"
"                       name. With --digest it must be that, and goes on\n"
"                       where an earlier run was interrupted. --chunk-size:\n"
"                       parts that can be verified by themselves (64K to\n"
"                       16M; default: 64K up to 16 GiB, and more above)\n"
"  list [--json] [--cluster]\n"
"                       what this node has, or (--cluster) who has what\n"
"  locate [--driver | --failover] [--node-name NAME] [--uri | --all] DIGEST\n"
"                       the nearest copy, as an argument for --blockdev\n"
"                       (--driver: of the driver that finds it itself;\n"
"                       --failover: with all others behind it; --uri: as a\n"
"                       path or NBD URI; --all: every place)\n"
"  remove DIGEST        delete it from this node; while it is in use, mark\n"
"                       it to be deleted\n"
"  verify [-p] [--range OFFSET:BYTES] [DIGEST...]\n"
"                       read this node's copies and compare their hashes;\n"
"                       status 2 if there is damage\n"
"  repair [-p] [DIGEST...]\n"
"                       verify, and mend from other copies\n"
"  rebalance [-p] [--keep]\n"
"                       fetch what belongs here, drop what belongs elsewhere\n"
"                       and is there; --keep: drop nothing\n"
"  serve                export this node's templates by NBD, until a signal\n"
"\n"
"-p shows progress.\n");
}

/* ------------------------------------------------------------------ */
/* What commands share                                                 */

bool tool_receive(Tool *t, TemplateStore *s, BlockBackend *blk,
                  const TemplateDigest *expected, bool replace,
                  uint32_t chunk_size, TemplateDigest *digest, bool *existed,
                  Error **errp)
{
    bool ok;

    qemu_progress_init(t->progress, 1.0);
    ok = template_receive(s, blk, expected, replace, chunk_size, digest,
                          existed, errp);
    qemu_progress_end();
    return ok;
}

bool tool_verify_copy(Tool *t, TemplateStore *s, const TemplateDigest *digest,
                      uint64_t offset, uint64_t bytes, uint32_t chunk_size,
                      TemplateFindings *f, Error **errp)
{
    bool ok;

    qemu_progress_init(t->progress, 1.0);
    ok = template_verify(s, digest, offset, bytes, chunk_size, f, errp);
    qemu_progress_end();
    return ok;
}

TemplateStore *tool_store_of(Tool *t, const ClusterDisk *disk)
{
    for (unsigned i = 0; i < t->stores->len; i++) {
        TemplateStore *s = g_ptr_array_index(t->stores, i);

        if (s->disk == disk) {
            return s;
        }
    }
    return NULL;
}

TemplateStore *tool_first_store(Tool *t, Error **errp)
{
    if (!t->stores->len) {
        error_setg(errp, "Node '%s' has no disk (in the description) that "
                   "could be opened", t->node->name);
        return NULL;
    }
    return g_ptr_array_index(t->stores, 0);
}

TemplateStore *tool_local_copy(Tool *t, const TemplateDigest *digest)
{
    for (unsigned i = 0; i < t->stores->len; i++) {
        TemplateStore *s = g_ptr_array_index(t->stores, i);
        g_autoptr(TemplateChunks) c = NULL;
        TemplateEntry e;
        Error *err = NULL;

        if (!template_store_find(s, digest, &e) || !e.data || e.removed ||
            e.leaving) {
            continue;
        }
        c = template_store_read_chunks(s, digest, &err);
        if (c && c->length == e.size) {
            return s;
        }
        if (!c) {
            warn_report_err(err);
        } else {
            warn_report("Disk '%s': a copy has %" PRIu64 " bytes instead of %"
                        PRIu64, s->disk->name, e.size, c->length);
        }
    }
    return NULL;
}

bool tool_is_marked(Tool *t, const TemplateDigest *digest)
{
    TemplateEntry e;

    for (unsigned i = 0; i < t->stores->len; i++) {
        if (template_store_find(g_ptr_array_index(t->stores, i), digest, &e) &&
            e.removed) {
            return true;
        }
    }
    return false;
}

static int compare_digests(gconstpointer a, gconstpointer b)
{
    return memcmp(a, b, TEMPLATE_DIGEST_SIZE);
}

static void add_digests_of(GArray *digests, TemplateStore *s)
{
    Error *err = NULL;
    g_autoptr(GArray) entries = template_store_scan(s, &err);

    if (!entries) {
        warn_report_err(err);
        return;
    }
    for (unsigned i = 0; i < entries->len; i++) {
        TemplateEntry *e = &g_array_index(entries, TemplateEntry, i);

        if ((e->data || e->chunks) && !e->removed) {
            g_array_append_val(digests, e->digest);
        }
    }
}

GArray *tool_digests(Tool *t, Error **errp)
{
    g_autoptr(GArray) digests =
        g_array_new(false, false, sizeof(TemplateDigest));

    for (int i = 0; i < t->argc; i++) {
        TemplateDigest digest;

        if (!template_digest_parse(t->argv[i], &digest, errp)) {
            return NULL;
        }
        g_array_append_val(digests, digest);
    }
    for (unsigned i = 0; t->argc == 0 && i < t->stores->len; i++) {
        add_digests_of(digests, g_ptr_array_index(t->stores, i));
    }
    g_array_sort(digests, compare_digests);
    for (unsigned i = 1; i < digests->len; ) {
        if (!compare_digests(&g_array_index(digests, TemplateDigest, i - 1),
                             &g_array_index(digests, TemplateDigest, i))) {
            g_array_remove_index(digests, i);
        } else {
            i++;
        }
    }
    return g_steal_pointer(&digests);
}

GPtrArray *tool_lists(Tool *t, bool anew)
{
    if (t->lists && anew) {
        g_clear_pointer(&t->lists, g_ptr_array_unref);
    }
    if (!t->lists) {
        t->lists = remote_list_all(t->cluster, t->node);
    }
    return t->lists;
}

static void replica_free(gpointer opaque)
{
    ToolReplica *r = opaque;

    blk_unref(r->blk);
    g_free(r->where);
    g_free(r);
}

static void add_replica(GPtrArray *replicas, BlockBackend *blk,
                        TemplateStore *store, const ClusterNode *node,
                        Error *err)
{
    ToolReplica *r;

    if (!blk) {
        warn_report_err(err);
        return;
    }
    r = g_new(ToolReplica, 1);
    *r = (ToolReplica) {
        .where = store ? g_strdup_printf("disk '%s'", store->disk->name)
                       : g_strdup_printf("node '%s'", node->name),
        .blk = blk,
        .store = store,
        .node = node,
    };
    g_ptr_array_add(replicas, r);
}

GPtrArray *tool_replicas(Tool *t, const TemplateDigest *digest,
                         const TemplateStore *except)
{
    GPtrArray *replicas = g_ptr_array_new_with_free_func(replica_free);
    GPtrArray *lists = tool_lists(t, false);
    TemplateEntry e;

    for (unsigned i = 0; i < t->stores->len; i++) {
        TemplateStore *s = g_ptr_array_index(t->stores, i);
        Error *err = NULL;

        if (s != except && template_store_find(s, digest, &e) && e.data) {
            add_replica(replicas, template_open_copy(s, digest, &err), s,
                        NULL, err);
        }
    }
    for (unsigned i = 0; i < lists->len; i++) {
        RemoteList *list = g_ptr_array_index(lists, i);
        Error *err = NULL;

        if (remote_has(list, digest, NULL)) {
            add_replica(replicas, remote_open(list->node, digest, &err), NULL,
                        list->node, err);
        }
    }
    return replicas;
}

uint32_t tool_chunk_size_of(const ToolReplica *r, const TemplateDigest *digest)
{
    g_autoptr(TemplateChunks) c =
        r->store ? template_store_read_chunks(r->store, digest, NULL)
                 : remote_chunks_header(r->node, digest);

    return c ? c->chunk_size : 0;
}

/* ------------------------------------------------------------------ */
/* Options                                                             */

enum {
    OPTION_CHUNK_SIZE = 'c',
    OPTION_DIGEST = 'd',
    OPTION_FORMAT = 'f',
    OPTION_IMAGE_OPTS = 'i',
    OPTION_CLUSTER = 'C',
    OPTION_JSON = 'j',
    OPTION_ALL = 'a',
    OPTION_DRIVER = 'D',
    OPTION_FAILOVER = 'F',
    OPTION_NODE_NAME = 'N',
    OPTION_URI = 'u',
    OPTION_PROGRESS = 'p',
    OPTION_RANGE = 'r',
    OPTION_KEEP = 'k',
};

static const struct option long_options[] = {
    { "all", no_argument, NULL, OPTION_ALL },
    { "chunk-size", required_argument, NULL, OPTION_CHUNK_SIZE },
    { "cluster", no_argument, NULL, OPTION_CLUSTER },
    { "digest", required_argument, NULL, OPTION_DIGEST },
    { "driver", no_argument, NULL, OPTION_DRIVER },
    { "failover", no_argument, NULL, OPTION_FAILOVER },
    { "format", required_argument, NULL, OPTION_FORMAT },
    { "image-opts", no_argument, NULL, OPTION_IMAGE_OPTS },
    { "json", no_argument, NULL, OPTION_JSON },
    { "keep", no_argument, NULL, OPTION_KEEP },
    { "node-name", required_argument, NULL, OPTION_NODE_NAME },
    { "progress", no_argument, NULL, OPTION_PROGRESS },
    { "range", required_argument, NULL, OPTION_RANGE },
    { "uri", no_argument, NULL, OPTION_URI },
    { NULL, 0, NULL, 0 }
};

static void set_option(Tool *t, int option)
{
    switch (option) {
    case OPTION_ALL:
        t->all = true;
        break;
    case OPTION_CHUNK_SIZE:
        t->chunk_size = optarg;
        break;
    case OPTION_CLUSTER:
        t->cluster_wide = true;
        break;
    case OPTION_DIGEST:
        t->digest = optarg;
        break;
    case OPTION_DRIVER:
        t->driver = true;
        break;
    case OPTION_FAILOVER:
        t->failover = true;
        break;
    case OPTION_FORMAT:
        t->format = optarg;
        break;
    case OPTION_IMAGE_OPTS:
        t->image_opts = true;
        break;
    case OPTION_JSON:
        t->json = true;
        break;
    case OPTION_KEEP:
        t->keep = true;
        break;
    case OPTION_NODE_NAME:
        t->node_name = optarg;
        break;
    case OPTION_PROGRESS:
        t->progress = true;
        break;
    case OPTION_RANGE:
        t->range = optarg;
        break;
    case OPTION_URI:
        t->uri = true;
        break;
    }
}

static const Command *find_command(const char *name)
{
    for (int i = 0; i < ARRAY_SIZE(commands); i++) {
        if (!strcmp(commands[i].name, name)) {
            return &commands[i];
        }
    }
    return NULL;
}

/* argv[0] is the command */
static bool parse_command_options(Tool *t, const Command *command, int argc,
                                  char **argv)
{
    int option;

    optind = 0;
    while ((option = getopt_long(argc, argv, "f:p", long_options,
                                 NULL)) != -1) {
        if (option == '?') {
            return false;
        }
        if (!strchr(command->options, option)) {
            error_report("'%s' has no option '%s'", command->name,
                         argv[optind - 1]);
            return false;
        }
        set_option(t, option);
    }
    t->argc = argc - optind;
    t->argv = argv + optind;
    if (t->argc < command->min_args || t->argc > command->max_args) {
        error_report("'%s' takes %d to %d arguments, and %d are given; see "
                     "'thinvm-template --help'", command->name,
                     command->min_args, command->max_args, t->argc);
        return false;
    }
    return true;
}

/* ------------------------------------------------------------------ */
/* Surroundings                                                        */

static bool find_node(Tool *t, const char *name, Error **errp)
{
    const char *host = g_get_host_name();

    t->node = cluster_find_node(t->cluster, name ?: host);
    if (!t->node) {
        error_setg(errp, "The description has no '[node %s]'%s", name ?: host,
                   name ? "" : ", which is this host's name: name the node by "
                               "option '--node'");
        return false;
    }
    return true;
}

/* A disk that fails takes no other one with it */
static bool open_stores(Tool *t)
{
    bool all = true;

    for (unsigned i = 0; i < t->cluster->disks->len; i++) {
        ClusterDisk *disk = g_ptr_array_index(t->cluster->disks, i);
        Error *err = NULL;
        TemplateStore *s;

        if (disk->node != t->node) {
            continue;
        }
        s = template_store_open(disk, &err);
        if (s) {
            g_ptr_array_add(t->stores, s);
        } else {
            warn_report_err(err);
            all = false;
        }
    }
    return all;
}

static int run(Tool *t, const Command *command, const char *config,
               const char *node)
{
    Error *err = NULL;
    bool all_disks;
    int status;

    t->stores = g_ptr_array_new_with_free_func(
                    (GDestroyNotify)template_store_close);
    t->cluster = cluster_load(config, &err);
    t->placement = t->cluster ? placement_new(t->cluster, &err) : NULL;
    if (!t->placement || !find_node(t, node, &err)) {
        error_report_err(err);
        status = TOOL_FAILED;
    } else {
        all_disks = command->run == tool_init || open_stores(t);
        status = command->run(t);
        if (status == TOOL_OK && command->all_disks && !all_disks) {
            status = TOOL_INCOMPLETE;
        }
    }
    if (t->lists) {
        g_ptr_array_unref(t->lists);
    }
    g_ptr_array_unref(t->stores);
    placement_free(t->placement);
    cluster_free(t->cluster);
    return status;
}

static void start_block_layer(char **argv)
{
    signal(SIGPIPE, SIG_IGN);
    socket_init();
    error_init(argv[0]);
    module_call_init(MODULE_INIT_TRACE);
    qemu_init_exec_dir(argv[0]);
    qcrypto_init(&error_fatal);
    module_call_init(MODULE_INIT_QOM);
    bdrv_init();
    qemu_init_main_loop(&error_fatal);
}

int main(int argc, char **argv)
{
    static const struct option main_options[] = {
        { "config", required_argument, NULL, 'c' },
        { "help", no_argument, NULL, 'h' },
        { "node", required_argument, NULL, 'n' },
        { "version", no_argument, NULL, 'V' },
        { NULL, 0, NULL, 0 }
    };
    const char *config = DEFAULT_CONFIG, *node = NULL;
    const Command *command;
    Tool t = { };
    int option;

    start_block_layer(argv);
    while ((option = getopt_long(argc, argv, "+c:hn:V", main_options,
                                 NULL)) != -1) {
        switch (option) {
        case 'c':
            config = t.given_config = optarg;
            break;
        case 'n':
            node = t.given_node = optarg;
            break;
        case 'h':
            help();
            return TOOL_OK;
        case 'V':
            printf("thinvm-template " QEMU_FULL_VERSION "\n");
            return TOOL_OK;
        default:
            return TOOL_FAILED;
        }
    }
    if (optind == argc) {
        help();
        return TOOL_FAILED;
    }
    command = find_command(argv[optind]);
    if (!command) {
        error_report("'%s' is no command; see 'thinvm-template --help'",
                     argv[optind]);
        return TOOL_FAILED;
    }
    if (!parse_command_options(&t, command, argc - optind, argv + optind)) {
        return TOOL_FAILED;
    }
    return run(&t, command, config, node);
}
