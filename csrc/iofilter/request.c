/* A request's way down and up a chain. Theory of operation: io.h. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "rooms.h"

static int check(const struct pv_instance *instance, const struct pv_io *io)
{
    uint64_t mask = instance->block_size - 1;

    if ((unsigned)io->type >= PV_IO_TYPES)
        return EINVAL;
    if (io->type == PV_IO_FLUSH)
        return io->offset || io->length ? EINVAL : 0;
    if ((io->offset | io->length) & mask)
        return EINVAL;
    if (io->type <= PV_IO_WRITE && (io->length > PV_IO_LENGTH_MAX || io->iov_count > PV_IO_SEGMENTS))
        return EINVAL;
    if (io->type != PV_IO_READ && instance->read_only)
        return EROFS;
    if (io->offset > instance->size || io->length > instance->size - io->offset)
        return io->type == PV_IO_READ ? EINVAL : ENOSPC;
    return 0;
}

void pv_dispatch(struct pv_io *io, unsigned at)
{
    struct pv_instance *instance = io->instance;

    for (; at < instance->count; at++) {
        struct pv_filter *filter = instance->filters[at];

        if (filter->class->types & (1u << io->type)) {
            io->at = at;
            filter->class->request(filter, io);
            return;
        }
    }
    io->at = at;
    instance->data->class->submit(instance->data, io);
}

static void begin(struct pv_instance *instance, struct pv_io *io, unsigned entry)
{
    io->instance = instance;
    io->entry = entry;
    io->heard = 0;
    io->error = 0;
    memset(io->frames, 0, instance->count * sizeof(io->frames[0]));
}

static void refuse(struct pv_instance *instance, struct pv_io *io, int error)
{
    pv_bump(&instance->stats.errors, 1);
    io->error = error;
    io->done(io);
}

void pv_submit_hop(struct pv_instance *instance, struct pv_io *io, unsigned entry, uint32_t hops)
{
    int error = hops > PV_HOPS_MAX ? ELOOP : check(instance, io);

    if (error) {
        refuse(instance, io, error);
        return;
    }
    io->hops = hops;
    io->child_of = NULL;
    pv_bump(&instance->stats.requests[io->type], 1);
    pv_bump(&instance->stats.bytes[io->type], io->length);
    begin(instance, io, entry);
    if (instance->state != PV_RUNNING) {
        pv_list_append(&instance->waiting, &io->link);
        return;
    }
    instance->in_flight++;
    pv_dispatch(io, entry);
}

void pv_instance_submit(struct pv_instance *instance, struct pv_io *io, unsigned entry)
{
    pv_submit_hop(instance, io, entry, 0);
}

void pv_release(struct pv_instance *instance)
{
    while (instance->state == PV_RUNNING && !pv_list_empty(&instance->waiting)) {
        struct pv_io *io = pv_member(instance->waiting.next, struct pv_io, link);

        int error = check(instance, io); /* again: the disk may have another size now */

        pv_list_remove(&io->link);
        if (error) {
            refuse(instance, io, error);
            continue;
        }
        memset(io->frames, 0, instance->count * sizeof(io->frames[0]));
        instance->in_flight++;
        pv_dispatch(io, io->entry);
    }
}

static void finish(struct pv_io *io)
{
    struct pv_instance *instance = io->instance;

    if (!instance) { /* went straight to a target's data */
        io->done(io);
        return;
    }
    if (io->child_of)
        io->child_of->children--;
    else if (io->error)
        pv_bump(&instance->stats.errors, 1);
    io->done(io);
    instance->in_flight--; /* after done: what it submits while the instance drains must wait, not see it quiet */
    pv_check_quiet(instance);
}

void pv_io_end(struct pv_io *io, int error)
{
    io->error = error;
    while (io->heard) {
        unsigned at = 31 - (unsigned)__builtin_clz(io->heard);
        struct pv_filter *filter = io->instance->filters[at];

        io->heard &= ~(1u << at);
        io->at = at;
        filter->class->completed(filter, io);
    }
    finish(io);
}

void pv_io_pass(struct pv_filter *filter, struct pv_io *io)
{
    if (filter->class->completed)
        io->heard |= 1u << filter->at;
    pv_dispatch(io, filter->at + 1);
}

struct pv_child *pv_take_child(struct pv_instance *instance)
{
    struct pv_child *child;

    if (pv_list_empty(&instance->spare))
        return calloc(1, sizeof(*child));
    child = pv_member(instance->spare.prev, struct pv_child, io.link); /* the one used last: it is in the cache */
    pv_list_remove(&child->io.link);
    instance->spares--;
    memset(&child->io, 0, offsetof(struct pv_io, frames));
    memset(child->io.private, 0, sizeof(child->io.private));
    return child;
}

void pv_give_child(struct pv_instance *instance, struct pv_child *child)
{
    if (instance->spares >= PV_SPARES_MAX) {
        free(child);
        return;
    }
    instance->spares++;
    pv_list_append(&instance->spare, &child->io.link);
}

struct pv_io *pv_io_child(struct pv_filter *filter, struct pv_io *parent)
{
    struct pv_child *child = pv_take_child(filter->instance);

    if (!child)
        return NULL;
    child->io.owner = parent;
    child->io.hops = parent ? parent->hops : 0;
    return &child->io;
}

void pv_child_free(struct pv_filter *filter, struct pv_io *child)
{
    pv_give_child(filter->instance, (struct pv_child *)child);
}

/* The child counts as in flight from here to its done. */
static void start_child(struct pv_filter *filter, struct pv_io *child)
{
    begin(filter->instance, child, filter->at + 1);
    child->child_of = filter;
    filter->children++;
    filter->instance->in_flight++;
}

void pv_child_pass(struct pv_filter *filter, struct pv_io *child)
{
    start_child(filter, child);
    pv_dispatch(child, filter->at + 1);
}

void pv_child_redirect(struct pv_filter *filter, struct pv_io *child, struct pv_target *target)
{
    start_child(filter, child);
    child->at = filter->at;
    pv_target_submit(target, child);
}

void pv_io_redirect(struct pv_filter *filter, struct pv_io *io, struct pv_target *target)
{
    if (filter->class->completed)
        io->heard |= 1u << filter->at;
    pv_bump(&filter->instance->stats.redirects_out, 1);
    pv_target_submit(target, io);
}
