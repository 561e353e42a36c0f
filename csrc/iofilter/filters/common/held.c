#include "held.h"

static struct pv_io *first(const struct pv_held *held)
{
    return pv_list_empty(&held->list) ? NULL : pv_member(held->list.next, struct pv_io, link);
}

static uint64_t *time_of(const struct pv_held *held, struct pv_io *io)
{
    return &io->frames[held->filter->at].word;
}

static void pass_first(struct pv_held *held)
{
    struct pv_io *io = first(held);

    pv_list_remove(&io->link);
    held->count--;
    pv_io_pass(held->filter, io);
}

static void arm(struct pv_held *held)
{
    struct pv_io *io = first(held);

    if (io)
        pv_loop_arm(held->filter->instance->loop, &held->timer, *time_of(held, io));
}

static void fire(struct pv_timer *timer)
{
    struct pv_held *held = pv_member(timer, struct pv_held, timer);
    uint64_t now = pv_loop_clock_ns(), count = held->count; /* those that come while these are passed wait for the next turn */

    for (struct pv_io *io = first(held); io && count && *time_of(held, io) <= now; io = first(held), count--)
        pass_first(held);
    arm(held);
}

void pv_held_init(struct pv_held *held, struct pv_filter *filter)
{
    *held = (struct pv_held){.filter = filter, .timer.fire = fire};
    pv_list_init(&held->list);
}

void pv_held_until(struct pv_held *held, struct pv_io *io, uint64_t at_ns)
{
    struct pv_link *after = held->list.prev;

    while (after != &held->list && *time_of(held, pv_member(after, struct pv_io, link)) > at_ns)
        after = after->prev;
    *time_of(held, io) = at_ns;
    pv_list_append(after->next, &io->link); /* before the next one: behind `after` */
    held->count++;
    if (first(held) == io)
        arm(held);
}

void pv_held_release(struct pv_held *held)
{
    pv_loop_disarm(held->filter->instance->loop, &held->timer);
    while (held->count)
        pass_first(held);
}
