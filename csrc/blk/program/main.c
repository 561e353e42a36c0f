/* hv-blkd: a disk process. Serves one disk, a raw image behind a chain of filters, as a vhost-user-blk device.
 *
 *     hv-blkd --socket PATH --file PATH [--read-only] [--direct] [--queues N] [--serial S] [--spin US] [--once]
 *             [--filter CLASS[,NAME=VALUE...]]...
 *
 * One thread. It ends on SIGTERM and SIGINT, and with --once when the first front end has gone.
 */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "blk/blk.h"
#include "common/cleanup.h"
#include "iofilter/instance.h"

#define DEFAULT_SPIN_US 50
#define SETTINGS_MAX 16

struct options {
    const char *socket, *file;
    bool read_only, direct, once;
    unsigned queues, spin_us;
    const char *serial;
    char *filters[PV_CHAIN_MAX];
    unsigned filter_count;
};

struct server {
    struct pv_loop loop;
    struct pv_event signals;
    bool once;
};

static int complain(const char *what, int error)
{
    fprintf(stderr, "hv-blkd: %s: %s\n", what, strerror(error));
    return -1;
}

static int parse(int argc, char **argv, struct options *o)
{
    static const struct option LONG[] = {{"socket", 1, NULL, 's'}, {"file", 1, NULL, 'f'}, {"read-only", 0, NULL, 'r'},
        {"direct", 0, NULL, 'd'}, {"queues", 1, NULL, 'q'}, {"serial", 1, NULL, 'i'}, {"spin", 1, NULL, 'p'},
        {"once", 0, NULL, 'o'}, {"filter", 1, NULL, 'c'}, {NULL, 0, NULL, 0}};
    int option;

    *o = (struct options){.queues = 1, .spin_us = DEFAULT_SPIN_US, .serial = "hv-blkd"};
    while ((option = getopt_long(argc, argv, "", LONG, NULL)) != -1) {
        if (option == 's')
            o->socket = optarg;
        else if (option == 'f')
            o->file = optarg;
        else if (option == 'r')
            o->read_only = true;
        else if (option == 'd')
            o->direct = true;
        else if (option == 'o')
            o->once = true;
        else if (option == 'q')
            o->queues = (unsigned)strtoul(optarg, NULL, 10);
        else if (option == 'p')
            o->spin_us = (unsigned)strtoul(optarg, NULL, 10);
        else if (option == 'i')
            o->serial = optarg;
        else if (option == 'c' && o->filter_count < PV_CHAIN_MAX)
            o->filters[o->filter_count++] = optarg;
        else
            return -1;
    }
    return o->socket && o->file && optind == argc ? 0 : -1;
}

static int listen_at(const char *path, int *err)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    cleanup_fd int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

    *err = ENAMETOOLONG;
    if (strlen(path) >= sizeof(addr.sun_path))
        return -1;
    strcpy(addr.sun_path, path);
    unlink(path);
    if (fd < 0 || bind(fd, (struct sockaddr *)&addr, sizeof(addr)) < 0 || listen(fd, 8) < 0) {
        *err = errno;
        return -1;
    }
    return steal_fd(&fd);
}

/* "class,name=value,..." */
static int add_filter(struct pv_instance *instance, char *text, struct pv_fail *fail)
{
    struct pv_setting list[SETTINGS_MAX];
    struct pv_settings settings = {.list = list};
    char *rest = text, *class = strsep(&rest, ","), *word;
    char name[32];
    struct pv_filter *filter;

    while ((word = strsep(&rest, ",")) && settings.count < SETTINGS_MAX) {
        char *value = strchr(word, '=');

        if (!value)
            return pv_fail(fail, EINVAL, "%s has no value: write %s=VALUE", word, word);
        *value = '\0';
        list[settings.count++] = (struct pv_setting){word, value + 1};
    }
    snprintf(name, sizeof(name), "%.16s-%u", class, instance->count);
    filter = pv_filter_open(instance, class, name, &settings, fail);
    return filter ? pv_instance_insert(instance, filter, instance->count, fail) : -1;
}

static struct pv_instance *open_disk(const struct options *o, struct pv_fail *fail)
{
    int fd = open(o->file, (o->read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC | (o->direct ? O_DIRECT : 0));
    struct pv_data *data;
    struct pv_instance *instance;

    if (fd < 0) {
        pv_fail(fail, errno, "%s: %s", o->file, strerror(errno));
        return NULL;
    }
    data = pv_data_file(fd, (o->read_only ? PV_FILE_READ_ONLY : 0) | (o->direct ? PV_FILE_DIRECT : 0), fail);
    instance = data ? pv_instance_new(o->serial, data, fail) : NULL;
    for (unsigned i = 0; instance && i < o->filter_count; i++)
        if (add_filter(instance, o->filters[i], fail) < 0)
            return NULL;
    return instance;
}

static void on_signal(struct pv_event *event, uint32_t events)
{
    (void)events;
    pv_loop_stop(&pv_member(event, struct server, signals)->loop);
}

static void on_gone(struct pv_blk *blk, void *context)
{
    struct server *server = context;

    (void)blk;
    if (server->once)
        pv_loop_stop(&server->loop);
}

static int watch_signals(struct server *server, int *err)
{
    sigset_t set;
    int fd;

    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigprocmask(SIG_BLOCK, &set, NULL);
    signal(SIGPIPE, SIG_IGN);
    server->signals.ready = on_signal;
    fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    if (fd < 0) {
        *err = errno;
        return -1;
    }
    return pv_loop_watch(&server->loop, fd, EPOLLIN, &server->signals, err);
}

static int serve(struct server *server, const struct options *o, struct pv_instance *instance)
{
    struct pv_blk_config config = {.queues = o->queues, .read_only = o->read_only, .gone = on_gone, .gone_context = server,
        .block_size = instance->block_size};
    struct pv_blk *blk;
    int err, fd;

    snprintf(config.serial, sizeof(config.serial), "%s", o->serial);
    if (pv_blk_new(&server->loop, &config, &blk, &err) < 0)
        return complain("the device", err);
    fd = listen_at(o->socket, &err);
    if (fd < 0 || pv_blk_insert(blk, instance, &err) < 0 || pv_blk_listen(blk, fd, &err) < 0)
        return complain(o->socket, err);
    return pv_loop_run(&server->loop, &err) < 0 ? complain("the event loop", err) : 0;
}

int main(int argc, char **argv)
{
    static struct server server;
    struct options options;
    struct pv_fail fail = {0};
    struct pv_instance *instance;
    int err;

    if (parse(argc, argv, &options) < 0) {
        fprintf(stderr, "usage: hv-blkd --socket PATH --file PATH [--read-only] [--direct] [--queues N] [--serial S] "
                        "[--spin US] [--once] [--filter CLASS[,NAME=VALUE...]]...\n");
        return 2;
    }
    server.once = options.once;
    if (pv_loop_open(&server.loop, options.spin_us * 1000ULL, &err) < 0 || watch_signals(&server, &err) < 0)
        return complain("the event loop", err), 1;
    instance = open_disk(&options, &fail);
    if (!instance) {
        fprintf(stderr, "hv-blkd: %s\n", fail.text);
        return 1;
    }
    pv_instance_attach_loop(instance, &server.loop);
    return serve(&server, &options, instance) < 0; /* the process's end closes all the rest */
}
