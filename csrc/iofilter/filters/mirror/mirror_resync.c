/* What is stale goes to the target, a region at a time. */
#include <errno.h>
#include <string.h>

#include "mirror_rooms.h"

static void schedule_resync(struct pv_mirror *self)
{
    pv_loop_defer(self->filter.instance->loop, &self->resync);
}

static bool find_stale(struct pv_mirror *self)
{
    for (uint64_t tried = 0; tried < self->regions; tried++, self->next++) {
        uint64_t start;

        if (self->next >= self->regions)
            self->next = 0;
        if (!self->stale[self->next / 8]) { /* eight at a time */
            tried += 7 - self->next % 8;
            self->next |= 7;
            continue;
        }
        start = self->next << REGION_SHIFT;
        if (pv_mirror_get_bit(self->stale, self->next) && pv_bounce_is_free(&self->bounce, start, REGION))
            return true;
    }
    return false;
}

/* One region; the next follows at the end of the turn, so that guests' requests come in between. */
void pv_mirror_resync(struct pv_task *task)
{
    struct pv_mirror *self = pv_member(task, struct pv_mirror, resync);
    uint64_t start, length = REGION;

    if (self->copying || self->state == LOST || self->filter.instance->state != PV_RUNNING)
        return;
    if (!self->stale_count) {
        self->state = IN_SYNC;
        return;
    }
    if (!find_stale(self)) { /* all that is stale is being written to */
        pv_mirror_arm(self, 10000000);
        return;
    }
    start = self->next << REGION_SHIFT;
    if (length > self->filter.size - start)
        length = self->filter.size - start;
    pv_mirror_put_stale(self, self->next, false); /* a write from here on makes it stale again, if it fails */
    memset(&self->copy, 0, sizeof self->copy);
    self->copy.type = PV_IO_READ;
    self->copy.offset = start;
    self->copy.length = length;
    self->copy.instance = self->filter.instance;
    self->copying = true;
    self->copy_refused = false;
    pv_bounce_read_alone(&self->bounce, &self->copy);
}

int pv_mirror_deliver(struct pv_bounce *bounce, struct pv_chunk *chunk)
{
    struct pv_mirror *self = pv_member(bounce, struct pv_mirror, bounce);

    if (pv_chunk_io(chunk) != &self->copy) {
        pv_chunk_copy_out(chunk);
        return 0;
    }
    return pv_mirror_send_to_target(self, chunk, true) ? ENOMEM : EINPROGRESS;
}

void pv_mirror_copy_over(struct pv_mirror *self, int error)
{
    self->copying = false;
    if (error) {
        pv_mirror_put_stale(self, self->copy.offset >> REGION_SHIFT, true);
        self->next++;
        if (self->copy_refused)
            pv_mirror_target_failed(self);
        else /* the first disk cannot be read there: the others first */
            pv_mirror_arm(self, self->retry_ns);
        return;
    }
    pv_add(&self->resynced, 1);
    schedule_resync(self);
}

void pv_mirror_on_timer(struct pv_timer *timer)
{
    struct pv_mirror *self = pv_member(timer, struct pv_mirror, timer);

    if (self->filter.instance->state != PV_RUNNING) {
        pv_mirror_arm(self, 10000000);
        return;
    }
    if (self->given_up) { /* what was given up may still arrive there */
        pv_mirror_arm(self, self->retry_ns);
        return;
    }
    if (self->state == LOST)
        self->state = RESYNC;
    schedule_resync(self);
}
