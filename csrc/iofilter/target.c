/* Where a filter redirects to: the first filter of another disk's own instance.
 *
 * Theory of operation: a request that is redirected stays where it is, in flight in its own instance; a *carrier*
 * with the same range
 * and the same segments goes to the target, and its end is the request's end. A target is reached in one of three
 * ways:
 *
 *     same loop      the carrier is submitted at once: a function call
 *     another loop   the carrier is posted there, submitted, and posted back: two wake-ups at most, fewer under load
 *     data           the other instance is in another process, behind an NBD client: the carrier goes to that client
 *
 * Loops of redirects are refused when a target is made: the instances of a process and their targets are a graph
 * without cycles, kept
 * under one lock that only those who make and free targets take. A loop through another process is not seen there;
 * hops end it where
 * they are counted, and each process bounds what it has in flight.
 */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>

#include "rooms.h"

struct pv_target {
    struct pv_instance *from, *to; /* to: NULL for data */
    struct pv_data *data;
    struct pv_link in, out; /* on to->targets_in and from->targets_out */
};

static pthread_mutex_t targets_lock = PTHREAD_MUTEX_INITIALIZER;

static bool reaches(const struct pv_instance *start, const struct pv_instance *end)
{
    if (start == end)
        return true;
    for (const struct pv_link *link = start->targets_out.next; link != &start->targets_out; link = link->next)
        if (reaches(pv_member(link, struct pv_target, out)->to, end))
            return true;
    return false;
}

struct pv_target *pv_target_local(struct pv_instance *from, struct pv_instance *to, struct pv_fail *fail)
{
    struct pv_target *target = calloc(1, sizeof(*target));
    bool loop;

    if (!target) {
        pv_fail(fail, ENOMEM, "no memory for a redirect to disk %s", to->name);
        return NULL;
    }
    target->from = from;
    target->to = to;
    pthread_mutex_lock(&targets_lock);
    loop = reaches(to, from);
    if (!loop) {
        pv_list_append(&to->targets_in, &target->in);
        pv_list_append(&from->targets_out, &target->out);
    }
    pthread_mutex_unlock(&targets_lock);
    if (loop) {
        free(target);
        pv_fail(fail, ELOOP, "disk %s cannot redirect to disk %s, which redirects to it: name a disk that does not", from->name,
            to->name);
        return NULL;
    }
    return target;
}

struct pv_target *pv_target_data(struct pv_data *data, struct pv_fail *fail)
{
    struct pv_target *target = calloc(1, sizeof(*target));

    if (!target) {
        pv_fail(fail, ENOMEM, "no memory for a redirect");
        return NULL;
    }
    target->data = data;
    return target;
}

void pv_target_attach(struct pv_target *target, struct pv_loop *loop)
{
    if (!target || !target->data)
        return;
    target->data->loop = loop;
    if (target->data->class->attached)
        target->data->class->attached(target->data, loop);
}

void pv_target_detach(struct pv_target *target)
{
    if (!target || !target->data)
        return;
    if (target->data->class->detach)
        target->data->class->detach(target->data);
    target->data->loop = NULL;
}

void pv_target_free(struct pv_target *target)
{
    if (!target)
        return;
    if (target->data)
        target->data->class->close(target->data);
    pthread_mutex_lock(&targets_lock);
    pv_list_remove(&target->in);
    pv_list_remove(&target->out);
    pthread_mutex_unlock(&targets_lock);
    free(target);
}

uint64_t pv_target_size(const struct pv_target *target)
{
    return target->to ? target->to->size : target->data->size;
}

static struct pv_instance *home(const struct pv_child *carrier)
{
    return ((struct pv_io *)carrier->io.owner)->instance;
}

static void come_home(struct pv_child *carrier)
{
    struct pv_io *io = carrier->io.owner;
    int error = carrier->io.error;

    pv_give_child(io->instance, carrier);
    pv_io_end(io, error);
}

static void on_home_loop(struct pv_task *task)
{
    come_home(pv_member(task, struct pv_child, task));
}

static void carrier_done(struct pv_io *io)
{
    struct pv_child *carrier = (struct pv_child *)io;
    struct pv_target *target = carrier->target;

    if (target->data || target->to->loop == home(carrier)->loop) {
        come_home(carrier);
        return;
    }
    carrier->task.run = on_home_loop;
    pv_loop_post(home(carrier)->loop, &carrier->task);
}

static void submit_to_instance(struct pv_child *carrier)
{
    struct pv_instance *to = carrier->target->to;

    pv_bump(&to->stats.redirects_in, 1);
    pv_submit_hop(to, &carrier->io, 0, carrier->io.hops);
}

static void on_target_loop(struct pv_task *task)
{
    submit_to_instance(pv_member(task, struct pv_child, task));
}

/* Field by field: it came zeroed but for the frames, which are whose chain it enters to clear. */
static void fill(struct pv_child *carrier, struct pv_io *io)
{
    carrier->io.type = io->type;
    carrier->io.flags = io->flags;
    carrier->io.offset = io->offset;
    carrier->io.length = io->length;
    carrier->io.iov = io->iov;
    carrier->io.iov_count = io->iov_count;
    carrier->io.done = carrier_done;
    carrier->io.owner = io;
    carrier->io.hops = io->hops + 1;
}

void pv_target_submit(struct pv_target *target, struct pv_io *io)
{
    struct pv_child *carrier = pv_take_child(io->instance);

    if (!carrier) {
        pv_io_end(io, ENOMEM);
        return;
    }
    fill(carrier, io);
    carrier->target = target;
    if (target->data) {
        target->data->class->submit(target->data, &carrier->io);
        return;
    }
    if (target->to->loop == io->instance->loop) {
        submit_to_instance(carrier);
        return;
    }
    carrier->task.run = on_target_loop;
    pv_loop_post(target->to->loop, &carrier->task);
}
