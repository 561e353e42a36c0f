/* A map's way to the disk.
 *
 * Theory of operation: rounds, one at a time.
 *
 *     IDLE -> COPY (pages that changed; the requests that wait are this round's) -> FLUSH DATA -> WRITE (16 at a time) -> FLUSH STATE -> IDLE
 *
 * A request that comes while a round runs waits for the next: the data it speaks for may have ended after this round's copies were made.
 * A round that fails ends its requests with the error, and its pages count as changed again.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "map_rooms.h"

/* A page on its way: the state file's slot, as the page was when the round began. */
struct copy {
    struct pv_link link;
    struct pv_map *map;
    uint64_t page;
    struct iovec iov;
    struct pv_slot slot;
};

static void next_round(struct pv_task *task);

void pv_map_sync_init(struct pv_map *map)
{
    pv_list_init(&map->waiting);
    pv_list_init(&map->round);
    pv_list_init(&map->copies);
    pv_list_init(&map->written);
    map->again.run = next_round;
}

static int copy_page(struct pv_map *map, uint64_t page)
{
    struct pv_map_page *of = &map->pages[page];
    struct copy *copy = aligned_alloc(4096, (sizeof *copy + 4095) / 4096 * 4096);

    if (!copy)
        return ENOMEM;
    memset(copy, 0, sizeof *copy);
    copy->map = map;
    copy->page = page;
    copy->iov = (struct iovec){&copy->slot, sizeof copy->slot};
    if (of->flags & PV_PAGE_BACKED) /* a hole is not touched: it might find the disk full */
        memcpy(copy->slot.payload, map->live + page * PV_MAP_PAGE, PV_MAP_PAGE);
    copy->slot.marked = (of->flags & PV_PAGE_MARK) != 0;
    pv_map_seal(&copy->slot, page + 1, of->generation + 1);
    pv_list_append(&map->copies, &copy->link);
    of->flags &= (uint8_t)~PV_PAGE_CHANGED;
    map->changed--;
    return 0;
}

/* Marks of pages that nobody has written to for a while are not copied: so they go away. */
static void unmark_idle(struct pv_map *map)
{
    for (uint64_t page = 0; page < map->count; page++) {
        struct pv_map_page *of = &map->pages[page];
        bool marked = (of->flags & (PV_PAGE_MARK | PV_PAGE_MARKED | PV_PAGE_DOUBT)) == (PV_PAGE_MARK | PV_PAGE_MARKED);

        if (!marked || (uint16_t)(pv_map_seconds() - of->changed_s) < PV_MAP_MARK_SECONDS || map->busy(map->filter, page))
            continue;
        of->flags &= (uint8_t)~PV_PAGE_MARK;
        pv_map_note(map, page);
    }
}

static int copy_changed(struct pv_map *map)
{
    int error = 0;

    if (map->busy)
        unmark_idle(map);
    for (uint64_t page = 0; page < map->count && map->changed && !error; page++)
        if (map->pages[page].flags & PV_PAGE_CHANGED)
            error = copy_page(map, page);
    return error;
}

static void drop(struct pv_link *list, bool done)
{
    while (!pv_list_empty(list)) {
        struct copy *copy = pv_member(list->next, struct copy, link);
        struct pv_map_page *of = &copy->map->pages[copy->page];

        pv_list_remove(&copy->link);
        if (done) {
            of->generation++;
            of->flags = (uint8_t)((of->flags | PV_PAGE_WRITTEN) ^ PV_PAGE_SECOND);
            of->flags = (uint8_t)(copy->slot.marked ? of->flags | PV_PAGE_MARKED : of->flags & ~PV_PAGE_MARKED);
        } else {
            pv_map_note(copy->map, copy->page);
        }
        free(copy);
    }
}

static void end_round(struct pv_map *map)
{
    drop(&map->copies, false);
    drop(&map->written, !map->round_error);
    /* Stays in "round_runs" until its requests are settled: what they bring on waits for the next. */
    while (!pv_list_empty(&map->round)) {
        struct pv_io *io = pv_member(map->round.next, struct pv_io, link);
        void (*settled)(struct pv_io *, int) = io->private[0];

        pv_list_remove(&io->link);
        settled(io, map->round_error);
    }
    map->round_runs = false;
    if (!pv_list_empty(&map->waiting))
        pv_loop_defer(map->filter->instance->loop, &map->again);
}

static void on_state_flushed(struct pv_io *child)
{
    struct pv_map *map = child->owner;

    if (child->error)
        map->round_error = child->error;
    pv_child_free(map->filter, child);
    end_round(map);
}

static void send_flush(struct pv_map *map, struct pv_target *target, void (*done)(struct pv_io *))
{
    struct pv_io *child = pv_io_child(map->filter, NULL);

    if (!child) {
        map->round_error = ENOMEM;
        end_round(map);
        return;
    }
    child->type = PV_IO_FLUSH;
    child->done = done;
    child->owner = map;
    if (target)
        pv_child_redirect(map->filter, child, target);
    else
        pv_child_pass(map->filter, child);
}

static void write_more(struct pv_map *map);

static void on_written(struct pv_io *child)
{
    struct copy *copy = child->owner;
    struct pv_map *map = copy->map;

    if (child->error)
        map->round_error = child->error;
    pv_child_free(map->filter, child);
    pv_list_append(&map->written, &copy->link);
    map->writing--;
    write_more(map);
}

static void write_copy(struct pv_map *map, struct copy *copy)
{
    struct pv_io *child = pv_io_child(map->filter, NULL);
    bool second = !(map->pages[copy->page].flags & PV_PAGE_SECOND);

    if (!child) {
        map->round_error = ENOMEM;
        return;
    }
    pv_list_remove(&copy->link);
    child->type = PV_IO_WRITE;
    child->offset = ((copy->page + 1) * 2 + second) * PV_SLOT;
    child->length = PV_SLOT;
    child->iov = &copy->iov;
    child->iov_count = 1;
    child->owner = copy;
    child->done = on_written;
    map->writing++;
    pv_child_redirect(map->filter, child, map->state);
}

/* A write may end inside of the call that submits it: the loop here goes on then, on_written does not begin another. */
static void write_more(struct pv_map *map)
{
    if (map->pumping)
        return;
    map->pumping = true;
    while (!pv_list_empty(&map->copies) && map->writing < PV_MAP_WRITES && !map->round_error)
        write_copy(map, pv_member(map->copies.next, struct copy, link));
    map->pumping = false;
    if (map->writing)
        return;
    if (map->round_error)
        end_round(map);
    else
        send_flush(map, map->state, on_state_flushed);
}

static void on_data_flushed(struct pv_io *child)
{
    struct pv_map *map = child->owner;

    if (child->error)
        map->round_error = child->error;
    pv_child_free(map->filter, child);
    if (map->round_error || pv_list_empty(&map->copies))
        end_round(map);
    else
        write_more(map);
}

static void begin_round(struct pv_map *map)
{
    map->round_runs = true;
    while (!pv_list_empty(&map->waiting)) {
        struct pv_link *link = map->waiting.next;

        pv_list_remove(link);
        pv_list_append(&map->round, link);
    }
    map->round_error = copy_changed(map);
    if (map->round_error)
        end_round(map);
    else
        send_flush(map, map->data, on_data_flushed);
}

static void next_round(struct pv_task *task)
{
    struct pv_map *map = pv_member(task, struct pv_map, again);

    if (!map->round_runs && !pv_list_empty(&map->waiting))
        begin_round(map);
}

void pv_map_sync(struct pv_map *map, struct pv_target *data, struct pv_io *io, void (*settled)(struct pv_io *io, int error))
{
    map->data = data;
    io->private[0] = settled;
    pv_list_append(&map->waiting, &io->link);
    if (!map->round_runs)
        begin_round(map);
}

void pv_map_mark(struct pv_map *map, uint64_t first, uint64_t last, struct pv_io *io, void (*marked)(struct pv_io *io, int error))
{
    last = (last / PV_MAP_MARK_GROUP + 1) * PV_MAP_MARK_GROUP - 1;
    if (last >= map->count)
        last = map->count - 1;
    for (uint64_t page = first / PV_MAP_MARK_GROUP * PV_MAP_MARK_GROUP; page <= last; page++) {
        map->pages[page].flags |= PV_PAGE_MARK;
        pv_map_note(map, page);
    }
    pv_map_sync(map, NULL, io, marked);
}
