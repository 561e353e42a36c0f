/* Opening, reads, flushes and discards of two-sided disks; writes are in cow_write.c. Theory of operation: cow.h. */
#include "cow.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define CLUSTERS_A_PAGE (PV_MAP_PAGE * 8)

/* ---- the map of bits ---- */

static uint64_t word_of(const uint8_t *page, uint64_t bit)
{
    uint64_t word;

    memcpy(&word, page + bit / 64 * 8, sizeof word);
    return word;
}

bool pv_cow_run(const struct pv_cow *cow, uint64_t cluster, uint64_t limit, uint64_t *end)
{
    const uint8_t *page = pv_map_look(cow->map, cluster / CLUSTERS_A_PAGE);
    bool new = page && word_of(page, cluster % CLUSTERS_A_PAGE) >> (cluster % 64) & 1;

    while (cluster < limit) {
        uint64_t in_page = cluster % CLUSTERS_A_PAGE, differ, left = 64 - cluster % 64;

        page = pv_map_look(cow->map, cluster / CLUSTERS_A_PAGE);
        if (!page && !new) {
            cluster += CLUSTERS_A_PAGE - in_page;
            continue;
        }
        differ = (page ? word_of(page, in_page) : 0) ^ (new ? ~0ull : 0);
        differ >>= cluster % 64;
        if (differ) {
            cluster += (unsigned)__builtin_ctzll(differ);
            break;
        }
        cluster += left;
    }
    *end = cluster < limit ? cluster : limit;
    return new;
}

/* ---- sides ---- */

void pv_cow_send(struct pv_cow *cow, struct pv_io *io, enum pv_side side)
{
    if (side == cow->below)
        pv_io_pass(&cow->filter, io);
    else
        pv_io_redirect(&cow->filter, io, cow->target);
}

void pv_cow_send_child(struct pv_cow *cow, struct pv_io *child, enum pv_side side)
{
    if (side == cow->below)
        pv_child_pass(&cow->filter, child);
    else
        pv_child_redirect(&cow->filter, child, cow->target);
}

/* ---- reads ---- */

/* A read that spans both sides: goes through its range piece by piece, with a few pieces under way. */
struct split {
    struct pv_cow *cow;
    struct pv_io *io;
    uint64_t at; /* bytes of the request that were sent */
    unsigned under_way;
    bool pumping;
    int error;
};

struct piece {
    struct split *split;
    struct iovec iov[];
};

static void pump(struct split *split);

static void piece_done(struct pv_io *child)
{
    struct piece *piece = child->owner;
    struct split *split = piece->split;

    if (child->error)
        split->error = child->error;
    pv_child_free(&split->cow->filter, child);
    free(piece);
    split->under_way--;
    pump(split);
}

static int send_piece(struct split *split, uint64_t length, enum pv_side side)
{
    struct pv_io *io = split->io, *child = pv_io_child(&split->cow->filter, io);
    struct piece *piece = malloc(sizeof *piece + io->iov_count * sizeof *piece->iov);

    if (!child || !piece) {
        if (child)
            pv_child_free(&split->cow->filter, child);
        free(piece);
        return ENOMEM;
    }
    piece->split = split;
    child->type = PV_IO_READ;
    child->offset = io->offset + split->at;
    child->length = length;
    child->iov = piece->iov;
    child->iov_count = pv_iov_cut(io->iov, io->iov_count, split->at, length, piece->iov, io->iov_count);
    child->owner = piece;
    child->done = piece_done;
    split->under_way++;
    pv_cow_send_child(split->cow, child, side);
    return 0;
}

/* The next piece: a run of one side, cut where the old data ends. */
static int next_piece(struct split *split)
{
    struct pv_cow *cow = split->cow;
    struct pv_io *io = split->io;
    uint64_t at = io->offset + split->at, end = io->offset + io->length, run_end;
    bool new = pv_cow_run(cow, at >> cow->shift, ((end - 1) >> cow->shift) + 1, &run_end);
    uint64_t stop = run_end << cow->shift < end ? run_end << cow->shift : end, length;
    int error = 0;

    if (!new && at < cow->old_size && stop > cow->old_size)
        stop = cow->old_size;
    length = stop - at;
    if (!new && at >= cow->old_size)
        pv_iov_zero(io->iov, io->iov_count, split->at, length);
    else
        error = send_piece(split, length, new ? PV_NEW : PV_OLD);
    split->at += length;
    return error;
}

static void pump(struct split *split)
{
    struct pv_io *io = split->io;
    int error;

    if (split->pumping)
        return;
    split->pumping = true;
    while (split->at < io->length && split->under_way < PV_COW_PIECES && !split->error) {
        error = next_piece(split);
        if (error)
            split->error = error;
    }
    split->pumping = false;
    if (split->under_way)
        return;
    error = split->error;
    free(split);
    pv_io_end(io, error);
}

static void read_both(struct pv_cow *cow, struct pv_io *io)
{
    struct split *split = calloc(1, sizeof *split);

    if (!split) {
        pv_io_end(io, ENOMEM);
        return;
    }
    pv_add(&cow->split_reads, 1);
    split->cow = cow;
    split->io = io;
    pump(split);
}

static void read_request(struct pv_cow *cow, struct pv_io *io)
{
    uint64_t end = io->offset + io->length, limit = ((end - 1) >> cow->shift) + 1, run_end;
    bool new;

    if (!io->length) {
        pv_io_end(io, 0);
        return;
    }
    new = pv_cow_run(cow, io->offset >> cow->shift, limit, &run_end);
    if (run_end < limit || (!new && end > cow->old_size)) {
        read_both(cow, io);
        return;
    }
    pv_add(new ? &cow->new_reads : &cow->old_reads, 1);
    pv_cow_send(cow, io, new ? PV_NEW : PV_OLD);
}

/* ---- flush, discard ---- */

static void flushed(struct pv_io *io, int error)
{
    struct pv_cow *cow = (struct pv_cow *)io->instance->filters[io->at];

    /* What was written before the snapshot was attached lies downstream, and may not be durable yet. */
    if (!error && cow->below == PV_OLD)
        pv_io_pass(&cow->filter, io);
    else
        pv_io_end(io, error);
}

static void flush_request(struct pv_cow *cow, struct pv_io *io)
{
    if (cow->below == PV_NEW && !pv_map_changed(cow->map))
        pv_io_pass(&cow->filter, io);
    else
        pv_map_sync(cow->map, cow->below == PV_NEW ? NULL : cow->target, io, flushed);
}

void pv_cow_request(struct pv_filter *filter, struct pv_io *io)
{
    struct pv_cow *cow = (struct pv_cow *)filter;

    switch (io->type) {
    case PV_IO_READ:
        read_request(cow, io);
        break;
    case PV_IO_FLUSH:
        flush_request(cow, io);
        break;
    case PV_IO_DISCARD:
        pv_cow_send(cow, io, PV_NEW);
        break;
    default:
        pv_cow_write(cow, io);
    }
}

/* ---- life ---- */

static uint64_t map_bytes(uint64_t size, unsigned shift)
{
    uint64_t clusters = (size + (1ull << shift) - 1) >> shift;

    return (clusters + 63) / 64 * 8;
}

int pv_setting_cluster(const struct pv_settings *settings, uint64_t *out, struct pv_fail *fail)
{
    if (pv_setting_size(settings, "cluster", 4096, 4096, 1 << 20, out, fail))
        return -1;
    if (*out & (*out - 1))
        return pv_fail(fail, EINVAL, "cluster=%llu: must be a power of 2", (unsigned long long)*out);
    return 0;
}

int pv_cow_create(const char *state, const char *kind, const struct pv_cow_layout *layout, uint64_t size, struct pv_fail *fail)
{
    uint64_t words[PV_MAP_WORDS] = {layout->cluster, layout->old_size};

    return pv_map_create(state, kind, map_bytes(size, (unsigned)__builtin_ctzll(layout->cluster)), words, PV_MAP_UNSYNCED, fail);
}

int pv_cow_open(struct pv_cow *cow, const char *state, const char *kind, enum pv_side below, struct pv_fail *fail)
{
    uint64_t cluster;

    cow->map = pv_map_open(&cow->filter, state, kind, false, fail);
    if (!cow->map)
        return -1;
    cluster = pv_map_word(cow->map, 0);
    if (cluster < 4096 || cluster > 1 << 20 || cluster & (cluster - 1)) {
        pv_map_close(cow->map);
        return pv_fail(fail, EINVAL, "state %.120s: a cluster of %llu bytes is impossible", state, (unsigned long long)cluster);
    }
    cow->shift = (unsigned)__builtin_ctzll(cluster);
    cow->old_size = pv_map_word(cow->map, 1);
    cow->below = below;
    pv_cow_write_init(cow);
    if (!pv_map_grow(cow->map, map_bytes(cow->filter.size, cow->shift), fail))
        return 0;
    pv_map_close(cow->map);
    return -1;
}

void pv_cow_close(struct pv_filter *filter)
{
    struct pv_cow *cow = (struct pv_cow *)filter;

    pv_map_close(cow->map);
    pv_target_free(cow->target);
}

void pv_cow_attached(struct pv_filter *filter)
{
    struct pv_cow *cow = (struct pv_cow *)filter;

    pv_map_attached(cow->map);
    pv_target_attach(cow->target, filter->instance->loop);
}

void pv_cow_detach(struct pv_filter *filter)
{
    struct pv_cow *cow = (struct pv_cow *)filter;

    pv_loop_undefer(filter->instance->loop, &cow->wake);
    pv_map_detach(cow->map);
    pv_target_detach(cow->target);
}

/* A map that cannot grow leaves the disk at the size that it covers. */
void pv_cow_resized(struct pv_filter *filter, uint64_t size)
{
    struct pv_cow *cow = (struct pv_cow *)filter;
    struct pv_fail fail;

    if (!pv_map_grow(cow->map, map_bytes(size, cow->shift), &fail))
        filter->size = size;
}

unsigned pv_cow_figures(const struct pv_filter *filter, struct pv_figure *out, unsigned max)
{
    const struct pv_cow *cow = (const struct pv_cow *)filter;
    unsigned count = 0;

    pv_figure(out, &count, max, "old_reads", pv_get(&cow->old_reads));
    pv_figure(out, &count, max, "new_reads", pv_get(&cow->new_reads));
    pv_figure(out, &count, max, "split_reads", pv_get(&cow->split_reads));
    pv_figure(out, &count, max, "clusters_allocated", pv_get(&cow->allocated));
    pv_figure(out, &count, max, "clusters_copied_up", pv_get(&cow->copied_up));
    return count;
}
