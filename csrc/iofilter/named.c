/* Targets by name: what a filter's setting says, turned into a place to redirect to. */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "instance.h"

#define KINDS_MAX 4

struct published {
    struct pv_instance *instance;
    struct published *next;
};

struct kind {
    const char *name;
    struct pv_data *(*open)(const char *rest, struct pv_fail *fail);
};

/* An instance that is found must still be there when its target is made: both happen under this lock, and so does
 * withdrawing. */
static pthread_mutex_t published_lock = PTHREAD_MUTEX_INITIALIZER;
static struct published *published;
static struct kind kinds[KINDS_MAX];

static struct pv_instance *find(const char *name)
{
    for (struct published *at = published; at; at = at->next)
        if (!strcmp(at->instance->name, name))
            return at->instance;
    return NULL;
}

int pv_instance_publish(struct pv_instance *instance, struct pv_fail *fail)
{
    struct published *entry = malloc(sizeof(*entry));
    bool taken;

    if (!entry)
        return pv_fail(fail, ENOMEM, "no memory to publish disk %s", instance->name);
    pthread_mutex_lock(&published_lock);
    taken = find(instance->name) != NULL;
    if (!taken) {
        *entry = (struct published){instance, published};
        published = entry;
    }
    pthread_mutex_unlock(&published_lock);
    if (!taken)
        return 0;
    free(entry);
    return pv_fail(fail, EEXIST, "this process has a disk %s already", instance->name);
}

void pv_instance_withdraw(struct pv_instance *instance)
{
    pthread_mutex_lock(&published_lock);
    for (struct published **at = &published; *at; at = &(*at)->next)
        if ((*at)->instance == instance) {
            struct published *gone = *at;

            *at = gone->next;
            free(gone);
            break;
        }
    pthread_mutex_unlock(&published_lock);
}

static struct pv_target *local(struct pv_instance *from, const char *name, struct pv_fail *fail)
{
    struct pv_instance *to;
    struct pv_target *target = NULL;

    pthread_mutex_lock(&published_lock);
    to = find(name);
    if (to)
        target = pv_target_local(from, to, fail);
    else
        pv_fail(fail, ENOENT, "this process has no disk %.100s: open it first", name);
    pthread_mutex_unlock(&published_lock);
    return target;
}

static struct pv_data *open_file(const char *path, struct pv_fail *fail)
{
    int fd = open(path, O_RDWR | O_CLOEXEC), error = errno;

    if (fd >= 0)
        return pv_data_file(fd, 0, fail);
    if (error == EACCES || error == EROFS) {
        fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd >= 0)
            return pv_data_file(fd, PV_FILE_READ_ONLY, fail);
    }
    pv_fail(fail, error, "%.150s: %s", path, strerror(error));
    return NULL;
}

void pv_target_register(const char *kind, struct pv_data *(*open)(const char *rest, struct pv_fail *fail))
{
    for (unsigned i = 0; i < KINDS_MAX; i++)
        if (!kinds[i].name || !strcmp(kinds[i].name, kind)) {
            kinds[i] = (struct kind){kind, open};
            return;
        }
}

static struct pv_data *open_data(const char *spec, struct pv_fail *fail)
{
    const char *colon = strchr(spec, ':');

    if (!strncmp(spec, "file:", 5))
        return open_file(spec + 5, fail);
    for (unsigned i = 0; colon && i < KINDS_MAX && kinds[i].name; i++)
        if (strlen(kinds[i].name) == (size_t)(colon - spec) && !strncmp(kinds[i].name, spec, (size_t)(colon - spec)))
            return kinds[i].open(colon + 1, fail);
    pv_fail(fail, EINVAL, "%.100s: disk:NAME, file:PATH or nbd:unix:PATH is wanted", spec);
    return NULL;
}

static struct pv_target *remote(const char *spec, uint64_t size, struct pv_fail *fail)
{
    struct pv_data *data = open_data(spec, fail);
    struct pv_target *target;

    if (!data)
        return NULL;
    if (data->size < size) {
        pv_fail(fail, ENOSPC, "%.100s has %llu bytes; at least %llu are wanted", spec, (unsigned long long)data->size,
            (unsigned long long)size);
        data->class->close(data);
        return NULL;
    }
    target = pv_target_data(data, fail);
    if (!target)
        data->class->close(data);
    return target;
}

struct pv_target *pv_target_named(struct pv_instance *from, const char *spec, uint64_t size, struct pv_fail *fail)
{
    struct pv_target *target;

    if (strncmp(spec, "disk:", 5))
        return remote(spec, size, fail);
    target = local(from, spec + 5, fail);
    if (target && pv_target_size(target) < size) {
        pv_fail(fail, ENOSPC, "%.100s has %llu bytes; at least %llu are wanted", spec,
            (unsigned long long)pv_target_size(target), (unsigned long long)size);
        pv_target_free(target);
        return NULL;
    }
    return target;
}
