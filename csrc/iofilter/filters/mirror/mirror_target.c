/* What is sent to the target, what it answers, and when it is lost. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "mirror_rooms.h"

void pv_mirror_arm(struct pv_mirror *self, uint64_t wait_ns)
{
    pv_loop_arm(self->filter.instance->loop, &self->timer, pv_loop_clock_ns() + wait_ns);
}

void pv_mirror_target_failed(struct pv_mirror *self)
{
    pv_add(&self->target_errors, 1);
    if (self->state != LOST)
        pv_add(&self->lost, 1);
    self->state = LOST;
    pv_mirror_arm(self, self->retry_ns);
}

/* A request to the target has ended, or is not waited for any longer. */
static void target_over(struct pv_mirror_sent *sent, int error)
{
    struct pv_mirror *self = sent->self;
    struct pv_chunk *chunk = sent->chunk;

    sent->chunk = NULL;
    if (error && !sent->length)
        pv_mirror_all_dirty_is_stale(self); /* what it said it had, it may not have */
    else if (error)
        pv_mirror_make_stale(self, sent->start, sent->length);
    if (error)
        pv_mirror_target_failed(self);
    if (!sent->length) {
        pv_mirror_flush_side_over(self);
    } else if (sent->copy) {
        self->copy_refused = error != 0;
        chunk->error = error;
        pv_bounce_delivered(&self->bounce, chunk);
    } else {
        pv_mirror_side_over(self, chunk);
    }
}

static void arm_late(struct pv_mirror *self)
{
    if (!pv_list_empty(&self->sent) && !pv_linked(&self->late.link))
        pv_loop_arm(self->filter.instance->loop, &self->late,
            pv_member(self->sent.next, struct pv_mirror_sent, link)->deadline_ns);
}

static void give_up(struct pv_mirror_sent *sent)
{
    sent->given_up = true;
    sent->self->given_up++;
    pv_list_remove(&sent->link);
    target_over(sent, ETIMEDOUT);
}

void pv_mirror_on_late(struct pv_timer *timer)
{
    struct pv_mirror *self = pv_member(timer, struct pv_mirror, late);
    uint64_t now = pv_loop_clock_ns();

    while (!pv_list_empty(&self->sent)) {
        struct pv_mirror_sent *sent = pv_member(self->sent.next, struct pv_mirror_sent, link);

        if (sent->deadline_ns > now)
            break;
        give_up(sent);
    }
    arm_late(self);
}

static void sent_done(struct pv_io *child)
{
    struct pv_mirror_sent *sent = child->owner;
    struct pv_mirror *self = sent->self;
    int error = child->error;

    pv_child_free(&self->filter, child);
    pv_list_remove(&sent->link);
    if (!sent->given_up)
        target_over(sent, error);
    else if (--self->given_up == 0) /* the retry finds the target free now */
        pv_mirror_arm(self, self->retry_ns);
    free(sent);
}

/* ENOMEM: nothing was sent. The bytes are copied. */
int pv_mirror_send_to_target(struct pv_mirror *self, struct pv_chunk *chunk, bool copy)
{
    struct pv_io *child = pv_io_child(&self->filter, chunk ? pv_chunk_io(chunk) : NULL);
    uint64_t bytes = chunk && chunk->buffer ? chunk->length : 0;
    struct pv_mirror_sent *sent = malloc(sizeof *sent + bytes);

    if (!child || !sent) {
        if (child)
            pv_child_free(&self->filter, child);
        free(sent);
        return ENOMEM;
    }
    *sent = (struct pv_mirror_sent){
        .self = self, .deadline_ns = pv_loop_clock_ns() + self->patience_ns, .chunk = chunk, .copy = copy};
    child->type = PV_IO_FLUSH;
    if (chunk) {
        sent->start = chunk->start;
        sent->length = chunk->length;
        child->type = copy ? PV_IO_WRITE : chunk->type;
        child->flags = copy ? 0 : pv_chunk_io(chunk)->flags & (chunk->buffer ? PV_IO_FUA : ~0u);
        child->offset = chunk->start;
        child->length = chunk->length;
    }
    if (bytes) {
        memcpy(sent->data, chunk->buffer, bytes);
        sent->iov = (struct iovec){sent->data, bytes};
        child->iov = &sent->iov;
        child->iov_count = 1;
    }
    child->owner = sent;
    child->done = sent_done;
    pv_list_append(&self->sent, &sent->link);
    arm_late(self);
    pv_child_redirect(&self->filter, child, self->target);
    return 0;
}
