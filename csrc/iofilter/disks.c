#include "disks.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/cleanup.h"
#include "nbd/nbd.h"
#include "rooms.h"

#define PATIENCE_MS 10000 /* a redirect target in another process is waited for so long */

_Static_assert(sizeof(struct pv_disk_fail) == sizeof(struct pv_fail), "the same struct, by another name");
_Static_assert(sizeof(struct pv_disk_setting) == sizeof(struct pv_setting), "the same struct, by another name");
_Static_assert(sizeof(struct pv_disk_figure) == sizeof(struct pv_figure), "the same struct, by another name");

struct pv_disks {
    struct pv_loop loop;
};

struct pv_disk {
    struct pv_disks *disks;
    struct pv_instance *instance;
    unsigned exports;
};

/* ---- the loop ---- */

/* "unix:PATH" or "unix:PATH#EXPORT", as a filter's setting has it behind "nbd:". */
static struct pv_data *open_nbd(const char *rest, struct pv_fail *fail)
{
    const char *path = strncmp(rest, "unix:", 5) ? rest : rest + 5, *hash = strrchr(path, '#');
    cleanup_free char *socket = hash ? strndup(path, (size_t)(hash - path)) : strdup(path);

    if (!socket) {
        pv_fail(fail, ENOMEM, "no memory for a connection to %.100s", rest);
        return NULL;
    }
    return pv_data_nbd(socket, hash ? hash + 1 : "", PATIENCE_MS, fail);
}

static void register_kinds(void)
{
    pv_target_register("nbd", open_nbd);
}

struct pv_disks *pv_disks_new(uint64_t spin_ns, struct pv_disk_fail *fail)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    struct pv_disks *disks = calloc(1, sizeof(*disks));
    int err = ENOMEM;

    pthread_once(&once, register_kinds);
    if (!disks || pv_loop_open(&disks->loop, spin_ns, &err)) {
        pv_fail((struct pv_fail *)fail, err, "cannot make an event loop: %s", strerror(err));
        free(disks);
        return NULL;
    }
    return disks;
}

int pv_disks_run(struct pv_disks *disks, struct pv_disk_fail *fail)
{
    int err;

    if (pv_loop_run(&disks->loop, &err))
        return pv_fail((struct pv_fail *)fail, err, "the event loop failed: %s", strerror(err));
    return 0;
}

void pv_disks_stop(struct pv_disks *disks)
{
    pv_loop_stop(&disks->loop);
}

void pv_disks_free(struct pv_disks *disks)
{
    if (!disks)
        return;
    pv_loop_close(&disks->loop);
    free(disks);
}

struct pv_loop *pv_disks_loop(struct pv_disks *disks)
{
    return &disks->loop;
}

/* ---- changes while the instance is quiet: one task brings the change to the loop, the caller waits for its end ----
 * */

struct change {
    struct pv_disk *disk;
    int (*apply)(struct change *change); /* on the loop, the instance is quiet; 0 or -1 with *fail */
    struct pv_filter *filter;            /* to be put in, or taken out */
    const char *name;
    struct pv_settings settings;
    uint64_t size;
    unsigned at;

    struct pv_fail *fail;
    int status;
    uint64_t start_ns, pause_ns;
    struct pv_task task;
    bool over;
    pthread_mutex_t mutex;
    pthread_cond_t ended;
};

static void end_change(struct change *change)
{
    pthread_mutex_lock(&change->mutex);
    change->over = true;
    pthread_cond_signal(&change->ended);
    pthread_mutex_unlock(&change->mutex);
}

static void change_now(struct pv_task *task)
{
    struct change *change = pv_member(task, struct change, task);
    struct pv_instance *instance = change->disk->instance;

    change->status = change->apply(change);
    change->pause_ns = pv_loop_clock_ns() - change->start_ns;
    if (instance->loop)
        pv_instance_resume(instance);
    end_change(change);
}

/* A task of its own: who made the instance quiet by ending its last request is still on the stack, in the data that
 * may go now. */
static void when_quiet(struct pv_instance *instance, void *context)
{
    struct change *change = context;

    change->task.run = change_now;
    pv_loop_defer(instance->loop, &change->task);
}

static void start_change(void *argument)
{
    struct change *change = argument;

    change->start_ns = pv_loop_clock_ns();
    if (pv_instance_quiesce(change->disk->instance, when_quiet, change, change->fail)) {
        change->status = -1;
        end_change(change);
    }
}

/* Applies a change; an instance that was never started is quiet as it is. */
static int run_change(struct change *change, uint64_t *pause_ns)
{
    if (!change->disk->instance->loop)
        return change->apply(change);
    pthread_mutex_init(&change->mutex, NULL);
    pthread_cond_init(&change->ended, NULL);
    pv_loop_call(&change->disk->disks->loop, start_change, change);
    pthread_mutex_lock(&change->mutex);
    while (!change->over)
        pthread_cond_wait(&change->ended, &change->mutex);
    pthread_mutex_unlock(&change->mutex);
    pthread_cond_destroy(&change->ended);
    pthread_mutex_destroy(&change->mutex);
    if (pause_ns)
        *pause_ns = change->pause_ns;
    return change->status;
}

static struct pv_filter *find(const struct pv_instance *instance, const char *name, struct pv_fail *fail)
{
    for (unsigned i = 0; i < instance->count; i++)
        if (!strcmp(instance->filters[i]->name, name))
            return instance->filters[i];
    pv_fail(fail, ENOENT, "disk %s has no filter %.64s", instance->name, name);
    return NULL;
}

/* ---- opening and closing ---- */

static struct pv_disk *open_disk(struct pv_disks *disks, const char *name, struct pv_data *data, struct pv_fail *fail)
{
    struct pv_disk *disk;

    if (!data)
        return NULL;
    disk = calloc(1, sizeof(*disk));
    if (disk)
        disk->instance = pv_instance_new(name, data, fail);
    if (!disk || !disk->instance) {
        data->class->close(data);
        free(disk);
        return NULL;
    }
    disk->disks = disks;
    if (pv_instance_publish(disk->instance, fail)) {
        struct pv_fail ignored;

        pv_instance_free(disk->instance, &ignored);
        free(disk);
        return NULL;
    }
    return disk;
}

struct pv_disk *pv_disk_open_file(struct pv_disks *disks, const char *name, int fd, bool read_only, bool direct,
    struct pv_disk_fail *fail)
{
    unsigned how = (read_only ? PV_FILE_READ_ONLY : 0) | (direct ? PV_FILE_DIRECT : 0);

    return open_disk(disks, name, pv_data_file(fd, how, (struct pv_fail *)fail), (struct pv_fail *)fail);
}

struct pv_disk *pv_disk_open_nbd(struct pv_disks *disks, const char *name, const char *socket, const char *export_name,
    uint32_t patience_ms, struct pv_disk_fail *fail)
{
    return open_disk(disks, name, pv_data_nbd(socket, export_name, patience_ms, (struct pv_fail *)fail), (struct pv_fail *)fail);
}

static void attach(void *argument)
{
    struct pv_disk *disk = argument;

    pv_instance_attach_loop(disk->instance, &disk->disks->loop);
}

int pv_disk_start(struct pv_disk *disk, struct pv_disk_fail *fail)
{
    if (disk->instance->loop)
        return pv_fail((struct pv_fail *)fail, EALREADY, "disk %s is started already", disk->instance->name);
    pv_loop_call(&disk->disks->loop, attach, disk);
    return 0;
}

static int apply_detach(struct change *change)
{
    struct pv_instance *instance = change->disk->instance;

    if (change->disk->exports || instance->on_resize)
        return pv_fail(change->fail, EBUSY, "disk %s is in use", instance->name);
    if (!pv_list_empty(&instance->targets_in))
        return pv_fail(change->fail, EBUSY, "another disk redirects to disk %s: close that one first", instance->name);
    if (instance->loop)
        pv_instance_detach_loop(instance);
    return 0;
}

int pv_disk_close(struct pv_disk *disk, struct pv_disk_fail *fail)
{
    struct change change = {.disk = disk, .apply = apply_detach, .fail = (struct pv_fail *)fail};

    pv_instance_withdraw(disk->instance); /* first: nobody finds it while it goes */
    if (run_change(&change, NULL)) {
        struct pv_fail ignored;

        pv_instance_publish(disk->instance, &ignored);
        return -1;
    }
    if (pv_instance_free(disk->instance, (struct pv_fail *)fail))
        return -1;
    free(disk);
    return 0;
}

struct pv_instance *pv_disk_instance(struct pv_disk *disk)
{
    return disk->instance;
}

uint64_t pv_disk_size(const struct pv_disk *disk)
{
    return disk->instance->size;
}

uint32_t pv_disk_block_size(const struct pv_disk *disk)
{
    return disk->instance->block_size;
}

/* ---- the chain ---- */

static int apply_insert(struct change *change)
{
    return pv_instance_insert(change->disk->instance, change->filter, change->at, change->fail);
}

int pv_disk_add(struct pv_disk *disk, const char *filter, const char *name, const struct pv_disk_setting *settings, unsigned count,
    unsigned at, uint64_t *pause_ns, struct pv_disk_fail *fail)
{
    struct change change = {.disk = disk, .apply = apply_insert, .at = at, .fail = (struct pv_fail *)fail,
        .settings = {(const struct pv_setting *)settings, count}};

    change.filter = pv_filter_open(disk->instance, filter, name, &change.settings, change.fail);
    if (!change.filter)
        return -1;
    if (run_change(&change, pause_ns)) {
        pv_filter_close(change.filter);
        return -1;
    }
    return 0;
}

static int apply_remove(struct change *change)
{
    struct pv_filter *filter = find(change->disk->instance, change->name, change->fail);

    if (!filter)
        return -1;
    change->filter = pv_instance_remove(change->disk->instance, filter->at, change->fail);
    return change->filter ? 0 : -1;
}

int pv_disk_remove(struct pv_disk *disk, const char *name, uint64_t *pause_ns, struct pv_disk_fail *fail)
{
    struct change change = {.disk = disk, .apply = apply_remove, .name = name, .fail = (struct pv_fail *)fail};

    if (run_change(&change, pause_ns))
        return -1;
    pv_filter_close(change.filter);
    return 0;
}

static int apply_set(struct change *change)
{
    struct pv_filter *filter = find(change->disk->instance, change->name, change->fail);

    if (!filter)
        return -1;
    if (!filter->class->set)
        return pv_fail(change->fail, ENOTSUP, "filter %s (%s) cannot change while it runs", filter->name, filter->class->name);
    return filter->class->set(filter, &change->settings, change->fail);
}

int pv_disk_set(struct pv_disk *disk, const char *name, const struct pv_disk_setting *settings, unsigned count, uint64_t *pause_ns,
    struct pv_disk_fail *fail)
{
    struct change change = {.disk = disk, .apply = apply_set, .name = name, .fail = (struct pv_fail *)fail,
        .settings = {(const struct pv_setting *)settings, count}};

    return run_change(&change, pause_ns);
}

static int apply_resize(struct change *change)
{
    return pv_instance_resize(change->disk->instance, change->size, change->fail);
}

int pv_disk_resize(struct pv_disk *disk, uint64_t size, uint64_t *pause_ns, struct pv_disk_fail *fail)
{
    struct change change = {.disk = disk, .apply = apply_resize, .size = size, .fail = (struct pv_fail *)fail};

    return run_change(&change, pause_ns);
}

int pv_disk_create_state(const char *filter, const struct pv_disk_setting *settings, unsigned count, uint64_t size,
    struct pv_disk_fail *fail)
{
    struct pv_settings all = {(const struct pv_setting *)settings, count};

    return pv_filter_create(filter, &all, size, (struct pv_fail *)fail);
}

bool pv_disk_class(unsigned index, struct pv_disk_class *out)
{
    const struct pv_filter_class *class = pv_filter_class_at(index);

    if (!class)
        return false;
    *out = (struct pv_disk_class){class->name, (int)class->order, class->persistent};
    return true;
}

/* ---- figures ---- */

struct look {
    struct pv_disk *disk;
    const char *name;
    struct pv_figure *out;
    unsigned max;
    struct pv_fail *fail;
    int count;
};

static unsigned put(struct pv_figure *out, unsigned at, unsigned max, const char *name, uint64_t *value)
{
    if (at >= max)
        return at;
    snprintf(out[at].name, sizeof(out[at].name), "%s", name);
    out[at].value = __atomic_load_n(value, __ATOMIC_RELAXED);
    return at + 1;
}

static unsigned instance_figures(struct pv_instance *instance, struct pv_figure *out, unsigned max)
{
    static const char *const types[PV_IO_TYPES] = {"reads", "writes", "flushes", "discards", "write_zeroes"};
    static const char *const bytes[PV_IO_TYPES] = {"read_bytes", "written_bytes", NULL, "discarded_bytes", "zeroed_bytes"};
    struct pv_instance_stats *stats = &instance->stats;
    unsigned at = 0;

    for (unsigned i = 0; i < PV_IO_TYPES; i++) {
        at = put(out, at, max, types[i], &stats->requests[i]);
        if (bytes[i])
            at = put(out, at, max, bytes[i], &stats->bytes[i]);
    }
    at = put(out, at, max, "errors", &stats->errors);
    at = put(out, at, max, "redirects_out", &stats->redirects_out);
    return put(out, at, max, "redirects_in", &stats->redirects_in);
}

static void look(void *argument)
{
    struct look *l = argument;
    struct pv_instance *instance = l->disk->instance;
    const struct pv_filter *filter;

    if (!l->name) {
        l->count = (int)instance_figures(instance, l->out, l->max);
        return;
    }
    filter = find(instance, l->name, l->fail);
    if (!filter)
        l->count = -1;
    else
        l->count = filter->class->figures ? (int)filter->class->figures(filter, l->out, l->max) : 0;
}

int pv_disk_figures(struct pv_disk *disk, const char *name, struct pv_disk_figure *out, unsigned max, struct pv_disk_fail *fail)
{
    struct look l = {disk, name, (struct pv_figure *)out, max, (struct pv_fail *)fail, 0};

    if (disk->instance->loop)
        pv_loop_call(&disk->disks->loop, look, &l);
    else
        look(&l);
    return l.count;
}

/* ---- exports ---- */

struct serving {
    struct pv_disk *disk;
    const char *at, *name;
    int listener;
    bool read_only;
    struct pv_nbd_server *server;
    struct pv_fail *fail;
    bool over;
    pthread_mutex_t mutex;
    pthread_cond_t ended;
};

static void serve(void *argument)
{
    struct serving *s = argument;
    struct pv_filter *below = s->at ? find(s->disk->instance, s->at, s->fail) : NULL;

    if (s->at && !below)
        close(s->listener);
    else
        s->server = pv_nbd_serve(s->disk->instance, below, s->name, s->listener, s->read_only, s->fail);
    if (s->server)
        s->disk->exports++;
}

struct pv_nbd_server *pv_disk_export(struct pv_disk *disk, const char *at, const char *export_name, int listener, bool read_only,
    struct pv_disk_fail *fail)
{
    struct serving s = {.disk = disk, .at = at, .name = export_name, .listener = listener, .read_only = read_only,
        .fail = (struct pv_fail *)fail};

    if (!disk->instance->loop) {
        close(listener);
        pv_fail(s.fail, EINVAL, "disk %s is not started", disk->instance->name);
        return NULL;
    }
    pv_loop_call(&disk->disks->loop, serve, &s);
    return s.server;
}

static void server_gone(void *context)
{
    struct serving *s = context;

    s->disk->exports--;
    pthread_mutex_lock(&s->mutex);
    s->over = true;
    pthread_cond_signal(&s->ended);
    pthread_mutex_unlock(&s->mutex);
}

static void stop_serving(void *argument)
{
    struct serving *s = argument;

    pv_nbd_stop(s->server, server_gone, s);
}

void pv_disk_unexport(struct pv_disk *disk, struct pv_nbd_server *server)
{
    struct serving s = {.disk = disk, .server = server};

    pthread_mutex_init(&s.mutex, NULL);
    pthread_cond_init(&s.ended, NULL);
    pv_loop_call(&disk->disks->loop, stop_serving, &s);
    pthread_mutex_lock(&s.mutex);
    while (!s.over)
        pthread_cond_wait(&s.ended, &s.mutex);
    pthread_mutex_unlock(&s.mutex);
    pthread_cond_destroy(&s.ended);
    pthread_mutex_destroy(&s.mutex);
}
