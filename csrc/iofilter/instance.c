/* An instance's life and its chain's changes. Theory of operation: instance.h. */
#include "instance.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "rooms.h"

struct pv_instance *pv_instance_new(const char *name, struct pv_data *data, struct pv_fail *fail)
{
    struct pv_instance *instance = calloc(1, sizeof(*instance));

    if (!instance) {
        pv_fail(fail, ENOMEM, "no memory for disk %s", name);
        return NULL;
    }
    snprintf(instance->name, sizeof(instance->name), "%s", name);
    instance->data = data;
    instance->size = data->size;
    instance->block_size = data->block_size;
    instance->read_only = data->read_only;
    instance->state = PV_QUIET;
    pv_list_init(&instance->waiting);
    pv_list_init(&instance->spare);
    pv_list_init(&instance->targets_in);
    pv_list_init(&instance->targets_out);
    return instance;
}

static void free_spares(struct pv_instance *instance)
{
    while (!pv_list_empty(&instance->spare)) {
        struct pv_child *child = pv_member(instance->spare.next, struct pv_child, io.link);

        pv_list_remove(&child->io.link);
        free(child);
    }
    instance->spares = 0;
}

int pv_instance_free(struct pv_instance *instance, struct pv_fail *fail)
{
    if (instance->loop || instance->in_flight || !pv_list_empty(&instance->waiting))
        return pv_fail(fail, EBUSY, "disk %s has requests in flight", instance->name);
    if (!pv_list_empty(&instance->targets_in))
        return pv_fail(fail, EBUSY, "another disk redirects to disk %s: close that one first", instance->name);
    while (instance->count)
        pv_filter_close(instance->filters[--instance->count]);
    instance->data->class->close(instance->data);
    free_spares(instance);
    free(instance);
    return 0;
}

struct pv_filter *pv_filter_open_class(struct pv_instance *instance, const struct pv_filter_class *class, const char *name,
    const struct pv_settings *settings, struct pv_fail *fail)
{
    struct pv_filter *filter = calloc(1, class->size);

    if (!filter) {
        pv_fail(fail, ENOMEM, "no memory for filter %s", name);
        return NULL;
    }
    filter->class = class;
    filter->instance = instance;
    filter->size = filter->below = instance->size;
    snprintf(filter->name, sizeof(filter->name), "%s", name);
    if (class->open && class->open(filter, settings, fail)) {
        free(filter);
        return NULL;
    }
    return filter;
}

struct pv_filter *pv_filter_open(struct pv_instance *instance, const char *class, const char *name,
    const struct pv_settings *settings, struct pv_fail *fail)
{
    const struct pv_filter_class *found = pv_filter_class(class);

    if (!found) {
        pv_fail(fail, EINVAL, "there is no filter %s", class);
        return NULL;
    }
    return pv_filter_open_class(instance, found, name, settings, fail);
}

void pv_filter_close(struct pv_filter *filter)
{
    if (filter->class->close)
        filter->class->close(filter);
    free(filter);
}

void pv_instance_attach_loop(struct pv_instance *instance, struct pv_loop *loop)
{
    instance->loop = loop;
    instance->data->loop = loop;
    if (instance->data->class->attached)
        instance->data->class->attached(instance->data, loop);
    for (unsigned i = 0; i < instance->count; i++)
        if (instance->filters[i]->class->attached)
            instance->filters[i]->class->attached(instance->filters[i]);
    pv_instance_resume(instance);
}

void pv_instance_detach_loop(struct pv_instance *instance)
{
    for (unsigned i = 0; i < instance->count; i++)
        if (instance->filters[i]->class->detach)
            instance->filters[i]->class->detach(instance->filters[i]);
    if (instance->data->class->detach)
        instance->data->class->detach(instance->data);
    instance->loop = NULL;
    instance->data->loop = NULL;
}

void pv_check_quiet(struct pv_instance *instance)
{
    void (*quiet)(struct pv_instance *, void *) = instance->quiet;

    if (instance->state != PV_DRAINING || instance->in_flight)
        return;
    instance->state = PV_QUIET;
    instance->quiet = NULL;
    quiet(instance, instance->quiet_context);
}

int pv_instance_quiesce(struct pv_instance *instance, void (*quiet)(struct pv_instance *, void *), void *context,
    struct pv_fail *fail)
{
    if (instance->state != PV_RUNNING)
        return pv_fail(fail, EBUSY, "disk %s is being changed by somebody else: try again", instance->name);
    instance->quiet = quiet;
    instance->quiet_context = context;
    instance->state = PV_DRAINING;
    instance->in_flight++; /* held here: a drain that ends the last request must not find the instance quiet half-way */
    for (unsigned i = 0; i < instance->count; i++)
        if (instance->filters[i]->class->drain)
            instance->filters[i]->class->drain(instance->filters[i]);
    instance->in_flight--;
    pv_check_quiet(instance);
    return 0;
}

void pv_instance_resume(struct pv_instance *instance)
{
    instance->state = PV_RUNNING;
    pv_release(instance);
}

/* Sizes from the data upwards; filters hear of what changed below them. */
static void settle_sizes(struct pv_instance *instance)
{
    uint64_t below = instance->data->size, before = instance->size;

    for (unsigned i = instance->count; i-- > 0;) {
        struct pv_filter *filter = instance->filters[i];

        filter->at = i;
        if (filter->below != below) {
            if (filter->class->resized)
                filter->class->resized(filter, below);
            else
                filter->size = below;
            filter->below = below;
        }
        below = filter->size;
    }
    instance->size = below;
    if (before != below && instance->on_resize)
        instance->on_resize(instance, instance->resize_context);
}

/* Requests that wait enter where they would have entered: those that came in below the change move with it. */
static void shift_waiting(struct pv_instance *instance, unsigned at, int by)
{
    for (struct pv_link *link = instance->waiting.next; link != &instance->waiting; link = link->next) {
        struct pv_io *io = pv_member(link, struct pv_io, link);

        if (io->entry > at)
            io->entry = (unsigned)((int)io->entry + by);
    }
}

/* The next filter from `at` on, in steps of `step`, whose class has a place in the order. */
static const struct pv_filter *ordered_from(const struct pv_instance *instance, int at, int step)
{
    for (; at >= 0 && at < (int)instance->count; at += step)
        if (instance->filters[at]->class->order != PV_ANYWHERE)
            return instance->filters[at];
    return NULL;
}

static int check_order(const struct pv_instance *instance, const struct pv_filter *filter, unsigned at, struct pv_fail *fail)
{
    const struct pv_filter *above = ordered_from(instance, (int)at - 1, -1), *below = ordered_from(instance, (int)at, 1);

    if (filter->class->order == PV_ANYWHERE)
        return 0;
    if (above && above->class->order > filter->class->order)
        return pv_fail(fail, EINVAL, "filter %s (%s) cannot come after %s (%s)", filter->name, filter->class->name, above->name,
            above->class->name);
    if (below && below->class->order < filter->class->order)
        return pv_fail(fail, EINVAL, "filter %s (%s) cannot come before %s (%s)", filter->name, filter->class->name, below->name,
            below->class->name);
    return 0;
}

int pv_instance_insert(struct pv_instance *instance, struct pv_filter *filter, unsigned at, struct pv_fail *fail)
{
    if (instance->state != PV_QUIET)
        return pv_fail(fail, EBUSY, "disk %s is not quiet", instance->name);
    if (instance->count >= PV_CHAIN_MAX)
        return pv_fail(fail, ENOSPC, "disk %s has %d filters already, the most there can be", instance->name, PV_CHAIN_MAX);
    if (at > instance->count)
        return pv_fail(fail, EINVAL, "disk %s has no place %u in its chain of %u", instance->name, at, instance->count);
    for (unsigned i = 0; i < instance->count; i++)
        if (!strcmp(instance->filters[i]->name, filter->name))
            return pv_fail(fail, EEXIST, "disk %s has a filter named %s already", instance->name, filter->name);
    if (check_order(instance, filter, at, fail))
        return -1;
    memmove(&instance->filters[at + 1], &instance->filters[at], (instance->count - at) * sizeof(instance->filters[0]));
    instance->filters[at] = filter;
    instance->count++;
    shift_waiting(instance, at, 1);
    settle_sizes(instance);
    if (instance->loop && filter->class->attached)
        filter->class->attached(filter);
    return 0;
}

struct pv_filter *pv_instance_remove(struct pv_instance *instance, unsigned at, struct pv_fail *fail)
{
    struct pv_filter *filter;

    if (instance->state != PV_QUIET || at >= instance->count) {
        pv_fail(fail, instance->state != PV_QUIET ? EBUSY : EINVAL, "disk %s: no quiet filter at place %u", instance->name, at);
        return NULL;
    }
    filter = instance->filters[at];
    if (filter->handles) {
        pv_fail(fail, EBUSY, "a program has disk %s open at filter %s: close that first", instance->name, filter->name);
        return NULL;
    }
    if (instance->loop && filter->class->detach)
        filter->class->detach(filter);
    instance->count--;
    memmove(&instance->filters[at], &instance->filters[at + 1], (instance->count - at) * sizeof(instance->filters[0]));
    shift_waiting(instance, at, -1);
    settle_sizes(instance);
    return filter;
}

int pv_instance_resize(struct pv_instance *instance, uint64_t size, struct pv_fail *fail)
{
    if (instance->state != PV_QUIET)
        return pv_fail(fail, EBUSY, "disk %s is not quiet", instance->name);
    if (size % instance->block_size)
        return pv_fail(fail, EINVAL, "a size of %llu bytes is not a multiple of %u", (unsigned long long)size,
            instance->block_size);
    if (!instance->data->class->resize)
        return pv_fail(fail, ENOTSUP, "the data of disk %s has the size it has", instance->name);
    if (instance->data->class->resize(instance->data, size, fail))
        return -1;
    instance->data->size = size;
    settle_sizes(instance);
    return 0;
}
