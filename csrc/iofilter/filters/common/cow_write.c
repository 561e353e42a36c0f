/* Writes and zeroes of two-sided disks.
 *
 * Theory of operation: an allocating write goes through
 *
 *     (WAITING for others on its clusters) -> COPY-UP: read head and tail from the old side -> write them to the new side -> DATA -> bits set -> over
 *
 * and is in `active` from COPY-UP to the end. The data itself goes on as it came (pv_io_pass or pv_io_redirect), and the bits are set in
 * `completed`; a write that must be durable when it ends (PV_IO_FUA) is sent as a child, and the map is synced behind it.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "cow.h"

#define CLUSTERS_A_PAGE (PV_MAP_PAGE * 8)

/* A part of a cluster that is filled up from the old side. */
struct fill {
    struct alloc *alloc;
    uint64_t offset, length;
    struct iovec iov;
    uint8_t *buffer;
};

struct alloc {
    struct pv_link link;
    struct pv_cow *cow;
    struct pv_io *io;
    uint64_t first, end; /* clusters */
    bool alone;          /* it copies up: nobody else on its clusters */
    unsigned filling;
    int error;
    struct fill fills[2];
};

static bool is_new(const struct pv_cow *cow, uint64_t cluster)
{
    uint64_t end;

    return pv_cow_run(cow, cluster, cluster + 1, &end);
}

static uint64_t first_of(const struct pv_cow *cow, const struct pv_io *io)
{
    return io->offset >> cow->shift;
}

static uint64_t end_of(const struct pv_cow *cow, const struct pv_io *io)
{
    return ((io->offset + io->length - 1) >> cow->shift) + 1;
}

static bool all_new(const struct pv_cow *cow, const struct pv_io *io)
{
    uint64_t limit = end_of(cow, io), end;

    return pv_cow_run(cow, first_of(cow, io), limit, &end) && end == limit;
}

/* ---- bits ---- */

static int back_pages(struct pv_cow *cow, uint64_t first, uint64_t end)
{
    int error = 0;

    for (uint64_t page = first / CLUSTERS_A_PAGE; page <= (end - 1) / CLUSTERS_A_PAGE && !error; page++)
        error = pv_map_back(cow->map, page);
    return error;
}

/* Bits first to below end of one page; returns how many were not set before. */
static unsigned set_in_page(uint8_t *page, uint64_t first, uint64_t end)
{
    unsigned fresh = 0;

    while (first < end) {
        if (first % 8 == 0 && end - first >= 8) {
            fresh += 8 - (unsigned)__builtin_popcount(page[first / 8]);
            page[first / 8] = 0xff;
            first += 8;
        } else {
            fresh += !(page[first / 8] >> (first % 8) & 1);
            page[first / 8] |= (uint8_t)(1u << (first % 8));
            first++;
        }
    }
    return fresh;
}

static void set_new(struct pv_cow *cow, uint64_t first, uint64_t end)
{
    __atomic_thread_fence(__ATOMIC_RELEASE);
    while (first < end) {
        uint64_t page = first / CLUSTERS_A_PAGE, base = page * CLUSTERS_A_PAGE;
        uint64_t stop = end - base < CLUSTERS_A_PAGE ? end - base : CLUSTERS_A_PAGE;

        pv_add(&cow->allocated, set_in_page(pv_map_change(cow->map, page), first - base, stop));
        first = base + stop;
    }
}

/* ---- the end of an allocating write ---- */

static void finish(struct alloc *alloc, int error)
{
    struct pv_cow *cow = alloc->cow;

    if (!error)
        set_new(cow, alloc->first, alloc->end);
    pv_list_remove(&alloc->link);
    if (alloc->alone)
        cow->copyups--;
    free(alloc->fills[0].buffer);
    free(alloc->fills[1].buffer);
    free(alloc);
    if (!pv_list_empty(&cow->waiting))
        pv_loop_defer(cow->filter.instance->loop, &cow->wake);
}

static void refuse(struct alloc *alloc, int error)
{
    struct pv_io *io = alloc->io;

    finish(alloc, error);
    pv_io_end(io, error);
}

void pv_cow_completed(struct pv_filter *filter, struct pv_io *io)
{
    struct alloc *alloc = io->frames[filter->at].pointer;

    if (!alloc)
        return;
    io->frames[filter->at].pointer = NULL;
    finish(alloc, io->error);
}

static void durable(struct pv_io *io, int error)
{
    pv_io_end(io, error);
}

static void forced_done(struct pv_io *child)
{
    struct alloc *alloc = child->owner;
    struct pv_cow *cow = alloc->cow;
    struct pv_io *io = alloc->io;
    int error = child->error;

    pv_child_free(&cow->filter, child);
    finish(alloc, error);
    if (error)
        pv_io_end(io, error);
    else
        pv_map_sync(cow->map, cow->below == PV_NEW ? NULL : cow->target, io, durable);
}

static void send_forced(struct alloc *alloc)
{
    struct pv_io *io = alloc->io, *child = pv_io_child(&alloc->cow->filter, io);

    if (!child) {
        refuse(alloc, ENOMEM);
        return;
    }
    child->type = io->type;
    child->flags = io->flags;
    child->offset = io->offset;
    child->length = io->length;
    child->iov = io->iov;
    child->iov_count = io->iov_count;
    child->owner = alloc;
    child->done = forced_done;
    pv_cow_send_child(alloc->cow, child, PV_NEW);
}

static void send_data(struct alloc *alloc)
{
    struct pv_io *io = alloc->io;

    if (io->flags & PV_IO_FUA) {
        send_forced(alloc);
        return;
    }
    io->frames[alloc->cow->filter.at].pointer = alloc;
    pv_cow_send(alloc->cow, io, PV_NEW);
}

/* ---- copy-up ---- */

static void filled(struct alloc *alloc)
{
    if (--alloc->filling)
        return;
    if (alloc->error)
        refuse(alloc, alloc->error);
    else
        send_data(alloc);
}

static void fill_written(struct pv_io *child)
{
    struct fill *fill = child->owner;
    struct alloc *alloc = fill->alloc;

    if (child->error)
        alloc->error = child->error;
    pv_child_free(&alloc->cow->filter, child);
    filled(alloc);
}

static int send_fill(struct fill *fill, enum pv_io_type type, uint64_t length, void (*done)(struct pv_io *))
{
    struct pv_cow *cow = fill->alloc->cow;
    struct pv_io *child = pv_io_child(&cow->filter, fill->alloc->io);

    if (!child)
        return ENOMEM;
    fill->iov = (struct iovec){fill->buffer, length};
    child->type = type;
    child->offset = fill->offset;
    child->length = length;
    child->iov = &fill->iov;
    child->iov_count = 1;
    child->owner = fill;
    child->done = done;
    pv_cow_send_child(cow, child, type == PV_IO_READ ? PV_OLD : PV_NEW);
    return 0;
}

static void write_fill(struct fill *fill)
{
    int error = send_fill(fill, PV_IO_WRITE, fill->length, fill_written);

    if (!error)
        return;
    fill->alloc->error = error;
    filled(fill->alloc);
}

static void fill_read(struct pv_io *child)
{
    struct fill *fill = child->owner;
    struct alloc *alloc = fill->alloc;
    int error = child->error;

    pv_child_free(&alloc->cow->filter, child);
    if (!error) {
        write_fill(fill);
        return;
    }
    alloc->error = error;
    filled(alloc);
}

/* The old data ends inside of it, perhaps before it: the rest is zeroes (calloc). */
static void start_fill(struct fill *fill)
{
    struct pv_cow *cow = fill->alloc->cow;
    uint64_t old = fill->offset < cow->old_size ? cow->old_size - fill->offset : 0;
    int error;

    pv_add(&cow->copied_up, 1);
    if (!old) {
        write_fill(fill);
        return;
    }
    error = send_fill(fill, PV_IO_READ, old < fill->length ? old : fill->length, fill_read);
    if (!error)
        return;
    fill->alloc->error = error;
    filled(fill->alloc);
}

static int plan_fill(struct alloc *alloc, unsigned which, uint64_t from, uint64_t to)
{
    struct fill *fill = &alloc->fills[which];

    if (from >= to)
        return 0;
    *fill = (struct fill){.alloc = alloc, .offset = from, .length = to - from};
    fill->buffer = aligned_alloc(4096, (fill->length + 4095) / 4096 * 4096);
    if (!fill->buffer)
        return ENOMEM;
    memset(fill->buffer, 0, fill->length);
    alloc->filling++;
    return 0;
}

/* What the request leaves out of its first and its last cluster, where those are old. */
static int plan_fills(struct alloc *alloc)
{
    struct pv_cow *cow = alloc->cow;
    uint64_t start = alloc->io->offset, stop = start + alloc->io->length;
    uint64_t head = alloc->first << cow->shift, tail = alloc->end << cow->shift;
    int error = 0;

    if (tail > cow->filter.size)
        tail = cow->filter.size;
    if (!is_new(cow, alloc->first))
        error = plan_fill(alloc, 0, head, start);
    if (!error && !is_new(cow, alloc->end - 1))
        error = plan_fill(alloc, 1, stop, tail);
    return error;
}

static void start(struct alloc *alloc)
{
    int error = back_pages(alloc->cow, alloc->first, alloc->end);

    if (!error)
        error = plan_fills(alloc);
    if (error) {
        refuse(alloc, error);
        return;
    }
    alloc->filling++; /* held here: a fill may be over before the other begins */
    for (unsigned i = 0; i < 2; i++)
        if (alloc->fills[i].buffer)
            start_fill(&alloc->fills[i]);
    filled(alloc);
}

/* ---- who may begin ---- */

static bool must_copy_up(const struct pv_cow *cow, const struct pv_io *io)
{
    uint64_t mask = (1ull << cow->shift) - 1, stop = io->offset + io->length;

    if (io->offset & mask && !is_new(cow, first_of(cow, io)))
        return true;
    return stop & mask && stop < cow->filter.size && !is_new(cow, end_of(cow, io) - 1);
}

static bool meets_active(const struct pv_cow *cow, const struct pv_io *io, bool alone)
{
    uint64_t first = first_of(cow, io), end = end_of(cow, io);

    for (const struct pv_link *link = cow->active.next; link != &cow->active; link = link->next) {
        const struct alloc *other = pv_member(link, struct alloc, link);

        if ((alone || other->alone) && other->first < end && first < other->end)
            return true;
    }
    return false;
}

static bool meets_waiting(const struct pv_cow *cow, const struct pv_io *io)
{
    uint64_t first = first_of(cow, io), end = end_of(cow, io);

    for (const struct pv_link *link = cow->waiting.next; link != &cow->waiting; link = link->next) {
        const struct pv_io *other = pv_member(link, struct pv_io, link);

        if (other == io)
            return false;
        if (first_of(cow, other) < end && first < end_of(cow, other))
            return true;
    }
    return false;
}

static void allocate(struct pv_cow *cow, struct pv_io *io, bool alone)
{
    struct alloc *alloc = calloc(1, sizeof *alloc);

    if (!alloc) {
        pv_io_end(io, ENOMEM);
        return;
    }
    alloc->cow = cow;
    alloc->io = io;
    alloc->first = first_of(cow, io);
    alloc->end = end_of(cow, io);
    alloc->alone = alone;
    cow->copyups += alone;
    pv_list_append(&cow->active, &alloc->link);
    start(alloc);
}

/* Begins it if it may; false: it must wait. */
static bool try(struct pv_cow *cow, struct pv_io *io)
{
    bool alone;

    /* A write that must be durable when it ends needs its bits durable too, even if they are set already. */
    if (all_new(cow, io) && !(io->flags & PV_IO_FUA && pv_map_changed(cow->map))) {
        pv_list_remove(&io->link);
        pv_cow_send(cow, io, PV_NEW);
        return true;
    }
    alone = must_copy_up(cow, io);
    if ((alone && cow->copyups >= PV_COW_COPYUPS) || meets_active(cow, io, alone) || meets_waiting(cow, io))
        return false;
    pv_list_remove(&io->link);
    allocate(cow, io, alone);
    return true;
}

/* Goes through those that wait, in their order; begins again after each that began, for it may have changed the list. */
static void wake(struct pv_task *task)
{
    struct pv_cow *cow = pv_member(task, struct pv_cow, wake);
    struct pv_link *link = cow->waiting.next;

    while (link != &cow->waiting) {
        struct pv_io *io = pv_member(link, struct pv_io, link);

        link = link->next;
        if (try(cow, io))
            link = cow->waiting.next;
    }
}

void pv_cow_write(struct pv_cow *cow, struct pv_io *io)
{
    if (!io->length) {
        pv_io_end(io, 0);
        return;
    }
    if (!try(cow, io))
        pv_list_append(&cow->waiting, &io->link);
}

void pv_cow_write_init(struct pv_cow *cow)
{
    pv_list_init(&cow->active);
    pv_list_init(&cow->waiting);
    cow->wake.run = wake;
}
