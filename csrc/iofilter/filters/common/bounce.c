/* Theory of operation: bounce.h. */
#include "bounce.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct pv_job {
    struct pv_link link; /* writers, or waiting */
    struct pv_link starving;
    struct pv_bounce *bounce;
    struct pv_io *io;
    uint64_t at, end; /* bytes of the disk: what is left to begin */
    unsigned under_way;
    bool alone, locks, pumping;
    int error;
};

static void pump(struct pv_job *job);

static uint64_t block_down(uint64_t at)
{
    return at & ~(uint64_t)(PV_BLOCK - 1);
}

static uint64_t block_up(uint64_t at)
{
    return block_down(at + PV_BLOCK - 1);
}

/* ---- buffers ---- */

static struct pv_chunk *take_chunk(struct pv_bounce *bounce)
{
    struct pv_chunk *chunk;
    uint8_t *memory;

    if (!pv_list_empty(&bounce->spare)) {
        chunk = pv_member(bounce->spare.prev, struct pv_chunk, link); /* the one that was used last is in the cache */
        pv_list_remove(&chunk->link);
        bounce->spares--;
        return chunk;
    }
    if (bounce->buffers >= PV_BOUNCE_BUFFERS)
        return NULL;
    memory = aligned_alloc(4096, PV_BOUNCE_SIZE + 4096);
    if (!memory)
        return NULL;
    bounce->buffers++;
    chunk = (struct pv_chunk *)(memory + PV_BOUNCE_SIZE);
    memset(chunk, 0, sizeof *chunk);
    return chunk;
}

static uint8_t *memory_of(struct pv_chunk *chunk)
{
    return (uint8_t *)chunk - PV_BOUNCE_SIZE;
}

static void give_chunk(struct pv_bounce *bounce, struct pv_chunk *chunk)
{
    if (bounce->spares >= PV_BOUNCE_SPARE && pv_list_empty(&bounce->starved)) {
        bounce->buffers--;
        free(memory_of(chunk));
        return;
    }
    bounce->spares++;
    pv_list_append(&bounce->spare, &chunk->link);
}

static void feed_starved(struct pv_bounce *bounce)
{
    if (!pv_list_empty(&bounce->starved))
        pv_loop_defer(bounce->filter->instance->loop, &bounce->wake);
}

/* ---- copies ---- */

struct pv_io *pv_chunk_io(const struct pv_chunk *chunk)
{
    return chunk->job->io;
}

bool pv_job_is_alone(const struct pv_chunk *chunk)
{
    return chunk->job->alone;
}

void pv_chunk_copy_in(struct pv_chunk *chunk)
{
    struct pv_io *io = chunk->job->io;

    if (io->type == PV_IO_WRITE)
        pv_iov_copy_out(io->iov, io->iov_count, chunk->from - io->offset, chunk->buffer + (chunk->from - chunk->start),
            chunk->to - chunk->from);
    else
        memset(chunk->buffer + (chunk->from - chunk->start), 0, chunk->to - chunk->from);
}

void pv_chunk_copy_out(struct pv_chunk *chunk)
{
    struct pv_io *io = chunk->job->io;

    pv_iov_copy_in(io->iov, io->iov_count, chunk->from - io->offset, chunk->buffer + (chunk->from - chunk->start),
        chunk->to - chunk->from);
}

/* ---- a chunk's way ---- */

static void chunk_over(struct pv_chunk *chunk)
{
    struct pv_job *job = chunk->job;
    struct pv_bounce *bounce = job->bounce;

    if (chunk->error)
        job->error = chunk->error;
    job->under_way--;
    give_chunk(bounce, chunk);
    feed_starved(bounce);
    pump(job);
}

struct pv_io *pv_chunk_child(struct pv_bounce *bounce, struct pv_chunk *chunk, void (*done)(struct pv_io *))
{
    struct pv_io *io = chunk->job->io, *child = pv_io_child(bounce->filter, io);

    if (!child)
        return NULL;
    chunk->iov = (struct iovec){chunk->buffer, chunk->length};
    child->type = chunk->type;
    if (chunk->type != PV_IO_READ)
        child->flags = chunk->type == PV_IO_WRITE ? io->flags & PV_IO_FUA : io->flags;
    child->offset = chunk->start;
    child->length = chunk->length;
    if (chunk->buffer) {
        child->iov = &chunk->iov;
        child->iov_count = 1;
    }
    child->owner = chunk;
    child->done = done;
    return child;
}

void pv_bounce_sent(struct pv_bounce *bounce, struct pv_chunk *chunk)
{
    if (bounce->class->written)
        bounce->class->written(bounce, chunk);
    chunk_over(chunk);
}

static void on_written(struct pv_io *child)
{
    struct pv_chunk *chunk = child->owner;
    struct pv_bounce *bounce = chunk->job->bounce;

    chunk->error = child->error;
    pv_child_free(bounce->filter, child);
    pv_bounce_sent(bounce, chunk);
}

static void send_down(struct pv_bounce *bounce, struct pv_chunk *chunk)
{
    struct pv_io *child;

    if (bounce->class->send) {
        bounce->class->send(bounce, chunk);
        return;
    }
    child = pv_chunk_child(bounce, chunk, on_written);
    if (child) {
        pv_child_pass(bounce->filter, child);
        return;
    }
    chunk->error = ENOMEM;
    pv_bounce_sent(bounce, chunk);
}

static void write_chunk(struct pv_bounce *bounce, struct pv_chunk *chunk, bool collected)
{
    const struct pv_bounce_class *class = bounce->class;

    chunk->type = chunk->buffer ? PV_IO_WRITE : chunk->job->io->type;
    if (!collected && chunk->buffer)
        pv_chunk_copy_in(chunk);
    if (!collected && class->seal)
        chunk->error = class->seal(bounce, chunk);
    if (chunk->error)
        chunk_over(chunk);
    else
        send_down(bounce, chunk);
}

static void read_is_there(struct pv_bounce *bounce, struct pv_chunk *chunk)
{
    const struct pv_bounce_class *class = bounce->class;
    bool write = chunk->job->io->type != PV_IO_READ;

    if (!write && class->deliver) {
        int error = class->deliver(bounce, chunk);

        if (error == EINPROGRESS) /* and the chunk may be gone already */
            return;
        chunk->error = error;
        chunk_over(chunk);
        return;
    }
    if (class->open)
        chunk->error = class->open(bounce, chunk);
    if (!chunk->error && write) {
        write_chunk(bounce, chunk, false);
        return;
    }
    if (!chunk->error)
        pv_chunk_copy_out(chunk);
    chunk_over(chunk);
}

void pv_bounce_delivered(struct pv_bounce *bounce, struct pv_chunk *chunk)
{
    (void)bounce;
    chunk_over(chunk);
}

static void on_read(struct pv_io *child)
{
    struct pv_chunk *chunk = child->owner;
    struct pv_bounce *bounce = chunk->job->bounce;

    chunk->error = child->error;
    pv_child_free(bounce->filter, child);
    if (chunk->error)
        chunk_over(chunk);
    else
        read_is_there(bounce, chunk);
}

static void read_chunk(struct pv_bounce *bounce, struct pv_chunk *chunk)
{
    struct pv_io *child;

    chunk->type = PV_IO_READ;
    child = pv_chunk_child(bounce, chunk, on_read);
    if (child) {
        pv_child_pass(bounce->filter, child);
        return;
    }
    chunk->error = ENOMEM;
    chunk_over(chunk);
}

/* ---- a job's way ---- */

/* The next chunk: a block of which the request has a part comes alone; whole blocks as many as a buffer takes; zeroes all at once. */
static void cut(struct pv_job *job, struct pv_chunk *chunk)
{
    bool needs_buffer = job->io->type <= PV_IO_WRITE;
    uint64_t start = block_down(job->at), whole = block_down(job->end), stop = start + PV_BOUNCE_SIZE;
    bool read = job->io->type == PV_IO_READ;

    if (!needs_buffer)
        stop = start + PV_BOUNCE_ZEROES;
    if (stop > whole)
        stop = whole;
    if (read && block_up(job->end) - start <= PV_BOUNCE_SIZE)
        stop = block_up(job->end);
    else if ((!read && job->at > start) || stop <= start)
        stop = start + PV_BLOCK;
    chunk->job = job;
    chunk->error = 0;
    chunk->start = start;
    chunk->length = stop - start;
    chunk->from = job->at;
    chunk->to = stop < job->end ? stop : job->end;
    chunk->buffer = needs_buffer || chunk->to - chunk->from < chunk->length ? memory_of(chunk) : NULL;
    job->at = chunk->to;
}

static void start_chunk(struct pv_bounce *bounce, struct pv_chunk *chunk)
{
    bool part = chunk->to - chunk->from < chunk->length;

    if (chunk->job->io->type == PV_IO_READ || part) {
        read_chunk(bounce, chunk);
    } else if (chunk->buffer && bounce->class->collect) {
        chunk->error = bounce->class->collect(bounce, chunk);
        write_chunk(bounce, chunk, true);
    } else {
        write_chunk(bounce, chunk, false);
    }
}

static void job_over(struct pv_job *job)
{
    struct pv_bounce *bounce = job->bounce;
    struct pv_io *io = job->io;
    int error = job->error;

    pv_list_remove(&job->link);
    if (!pv_list_empty(&bounce->waiting))
        pv_loop_defer(bounce->filter->instance->loop, &bounce->wake);
    free(job);
    if (bounce->class->end)
        bounce->class->end(bounce, io, error);
    else
        pv_io_end(io, error);
}

/* A chunk may be over inside of the call that starts it: the loop here goes on then. */
static void pump(struct pv_job *job)
{
    struct pv_bounce *bounce = job->bounce;

    if (job->pumping)
        return;
    job->pumping = true;
    while (job->at < job->end && job->under_way < PV_BOUNCE_CHUNKS && !job->error) {
        struct pv_chunk *chunk = take_chunk(bounce);

        if (!chunk) {
            if (!bounce->buffers) /* nobody has one who could give it back: there is no memory */
                job->error = ENOMEM;
            else if (!pv_linked(&job->starving))
                pv_list_append(&bounce->starved, &job->starving);
            break;
        }
        job->under_way++;
        cut(job, chunk);
        start_chunk(bounce, chunk);
    }
    job->pumping = false;
    if (!job->under_way && !pv_linked(&job->starving))
        job_over(job);
}

/* ---- who may begin ---- */

static bool overlap(const struct pv_job *a, const struct pv_job *b)
{
    const struct pv_io *x = a->io, *y = b->io;

    return block_down(x->offset) < block_up(y->offset + y->length) && block_down(y->offset) < block_up(x->offset + x->length);
}

static bool meets(const struct pv_link *list, const struct pv_job *job, bool anyone)
{
    for (const struct pv_link *link = list->next; link != list && link != &job->link; link = link->next) {
        const struct pv_job *other = pv_member(link, struct pv_job, link);

        if ((anyone || job->alone || other->alone) && overlap(job, other))
            return true;
    }
    return false;
}

bool pv_bounce_writes(const struct pv_bounce *bounce, uint64_t start, uint64_t length)
{
    struct pv_io io = {.offset = start, .length = length};
    struct pv_job job = {.io = &io};

    return meets(&bounce->writers, &job, true);
}

bool pv_bounce_is_free(const struct pv_bounce *bounce, uint64_t start, uint64_t length)
{
    struct pv_io io = {.offset = start, .length = length};
    struct pv_job job = {.io = &io};

    return (bounce->spares || bounce->buffers < PV_BOUNCE_BUFFERS) && !meets(&bounce->writers, &job, true) &&
           !meets(&bounce->waiting, &job, true);
}

static bool try(struct pv_bounce *bounce, struct pv_job *job)
{
    if (meets(&bounce->writers, job, false) || meets(&bounce->waiting, job, true))
        return false;
    pv_list_remove(&job->link);
    pv_list_append(&bounce->writers, &job->link);
    pump(job);
    return true;
}

static void wake(struct pv_task *task)
{
    struct pv_bounce *bounce = pv_member(task, struct pv_bounce, wake);
    unsigned starved = 0;

    for (struct pv_link *link = bounce->starved.next; link != &bounce->starved; link = link->next)
        starved++;
    while (starved-- && !pv_list_empty(&bounce->starved)) {
        struct pv_job *job = pv_member(bounce->starved.next, struct pv_job, starving);

        pv_list_remove(&job->starving);
        pump(job);
    }
    for (struct pv_link *link = bounce->waiting.next; link != &bounce->waiting;) {
        struct pv_job *job = pv_member(link, struct pv_job, link);

        link = link->next;
        if (try(bounce, job))
            link = bounce->waiting.next;
    }
}

/* Of a discard only the whole blocks count. */
static bool trim(struct pv_job *job)
{
    job->at = job->io->offset;
    job->end = job->at + job->io->length;
    if (job->io->type == PV_IO_DISCARD) {
        job->at = block_up(job->at);
        job->end = block_down(job->end);
    }
    return job->at < job->end;
}

static void begin(struct pv_bounce *bounce, struct pv_io *io, bool alone)
{
    struct pv_job *job = calloc(1, sizeof *job);

    if (!job) {
        pv_io_end(io, ENOMEM);
        return;
    }
    job->bounce = bounce;
    job->io = io;
    job->alone = alone;
    if (!trim(job)) {
        free(job);
        pv_io_end(io, 0);
    } else if (io->type == PV_IO_READ && !alone) {
        pump(job);
    } else if (!try(bounce, job)) {
        pv_list_append(&bounce->waiting, &job->link);
    }
}

void pv_bounce_request(struct pv_bounce *bounce, struct pv_io *io)
{
    bool part = (io->offset | io->length) & (PV_BLOCK - 1);

    begin(bounce, io, io->type != PV_IO_READ && (part || bounce->class->alone));
}

void pv_bounce_read_alone(struct pv_bounce *bounce, struct pv_io *io)
{
    begin(bounce, io, true);
}

void pv_bounce_init(struct pv_bounce *bounce, struct pv_filter *filter, const struct pv_bounce_class *class)
{
    *bounce = (struct pv_bounce){.filter = filter, .class = class, .wake.run = wake};
    pv_list_init(&bounce->spare);
    pv_list_init(&bounce->starved);
    pv_list_init(&bounce->writers);
    pv_list_init(&bounce->waiting);
}

void pv_bounce_detach(struct pv_bounce *bounce)
{
    pv_loop_undefer(bounce->filter->instance->loop, &bounce->wake);
}

void pv_bounce_free(struct pv_bounce *bounce)
{
    while (!pv_list_empty(&bounce->spare)) {
        struct pv_chunk *chunk = pv_member(bounce->spare.next, struct pv_chunk, link);

        pv_list_remove(&chunk->link);
        free(memory_of(chunk));
    }
}
