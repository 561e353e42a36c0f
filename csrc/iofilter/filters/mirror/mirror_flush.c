/* Flushes, of both sides; one after the other. */
#include <errno.h>

#include "mirror_rooms.h"

void pv_mirror_flush_side_over(struct pv_mirror *self)
{
    struct pv_io *io = pv_member(self->flushes.next, struct pv_io, link);
    int error = self->flush_error;

    if (--self->flush_sides)
        return;
    if (!error && self->state != LOST)
        pv_mirror_end_cleaning(self);
    self->flushing = false;
    pv_list_remove(&io->link);
    if (!pv_list_empty(&self->flushes))
        pv_loop_defer(self->filter.instance->loop, &self->next_flush);
    pv_io_end(io, error);
}

static void flushed_down(struct pv_io *child)
{
    struct pv_mirror *self = child->owner;

    if (child->error)
        self->flush_error = child->error;
    pv_child_free(&self->filter, child);
    pv_mirror_flush_side_over(self);
}

static struct pv_io *flush_child(struct pv_mirror *self, void (*done)(struct pv_io *))
{
    struct pv_io *child = pv_io_child(&self->filter, NULL);

    if (!child)
        return NULL;
    child->type = PV_IO_FLUSH;
    child->owner = self;
    child->done = done;
    return child;
}

void pv_mirror_flush_both(struct pv_task *task)
{
    struct pv_mirror *self = pv_member(task, struct pv_mirror, next_flush);
    struct pv_io *down;

    if (self->flushing || pv_list_empty(&self->flushes))
        return;
    self->flushing = true;
    self->flush_sides = 1; /* held here */
    self->flush_error = 0;
    pv_mirror_begin_cleaning(self);
    down = flush_child(self, flushed_down);
    if (!down)
        self->flush_error = ENOMEM;
    self->flush_sides += down != NULL;
    if (self->state != LOST) {
        self->flush_sides++;
        if (pv_mirror_send_to_target(self, NULL, false)) {
            self->flush_sides--;
            self->flush_error = ENOMEM;
        }
    }
    if (down)
        pv_child_pass(&self->filter, down);
    pv_mirror_flush_side_over(self);
}
