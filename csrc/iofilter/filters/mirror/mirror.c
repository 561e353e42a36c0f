/* Writes go to a second disk as well; what could not go there is made up for later.
 *
 * Theory of operation
 * -------------------
 *                 a write to the target failed          `retry_ms` later
 *     IN SYNC ----------------------------------> LOST ------------------> RESYNC --nothing stale is left--> IN SYNC
 *                                                   <-----failed again-----
 *
 * The disk is cut into regions of 64 KiB. Two bits say how a region stands:
 *
 *     dirty  (in the map: survives a kill)   it may differ on the two sides. Set before a write to it begins; taken
 *                                            away when a flush has come to an end on both sides, and nobody wrote to
 *                                            it since that flush began
 *     stale  (in memory)                     it does differ, as far as one knows: a write failed or was not sent.
 *                                            RESYNC copies it
 *
 * When the disk is opened, all that is dirty is stale: after a kill those are the regions that were being written to or
 * were not flushed. After a power cut (and at first) everything is stale.
 *
 * A write ends when both sides have ended it; with its result downstream. The guest never hears of a target that fails:
 * `figures` shows it. Both sides get the same bytes (bounce.h): a guest that changes its memory meanwhile cannot make
 * them differ.
 *
 * A target that does not answer within `patience_ms` is lost as well. What was sent to it has a copy of its data
 * (struct pv_mirror_sent) and is given up: the guest's request goes on without it. It may still arrive there, when the
 * target is back, and must then not stay: so the target counts as lost until all that was given up has ended, and what
 * it was about is stale.
 *
 * Reads come from downstream. RESYNC reads a region while no write is on it, and keeps writes off it until the target
 * has it.
 *
 * mirror.c          writes, and the filter's life
 * mirror_bits.c     dirty, stale
 * mirror_target.c   what is sent to the target
 * mirror_resync.c   RESYNC
 * mirror_flush.c    flushes
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "mirror_rooms.h"

static const char *const names[] = {"target", "state", "retry_ms", "patience_ms", NULL};

/* ---- writes ---- */

void pv_mirror_side_over(struct pv_mirror *self, struct pv_chunk *chunk)
{
    if (!--chunk->under_way)
        pv_bounce_sent(&self->bounce, chunk);
}

static int mirror_seal(struct pv_bounce *bounce, struct pv_chunk *chunk)
{
    struct pv_mirror *self = pv_member(bounce, struct pv_mirror, bounce);
    uint64_t last = (chunk->start + chunk->length - 1) >> REGION_SHIFT;

    for (uint64_t region = chunk->start >> REGION_SHIFT; region <= last; region++) {
        int error = pv_map_back(self->map, region / REGIONS_A_PAGE);

        if (error)
            return error;
        pv_mirror_put_dirty(self, region, true);
        pv_mirror_put_bit(self->cleaning, region, false);
    }
    if (self->state == LOST)
        pv_mirror_make_stale(self, chunk->start, chunk->length);
    return 0;
}

static void down_done(struct pv_io *child)
{
    struct pv_chunk *chunk = child->owner;
    struct pv_mirror *self = (struct pv_mirror *)child->child_of;

    if (child->error) { /* the target may have it: the sides differ */
        chunk->error = child->error;
        pv_mirror_make_stale(self, chunk->start, chunk->length);
        if (self->state != LOST) {
            self->state = RESYNC;
            pv_mirror_arm(self, self->retry_ns);
        }
    }
    pv_child_free(&self->filter, child);
    pv_mirror_side_over(self, chunk);
}

static void mirror_send(struct pv_bounce *bounce, struct pv_chunk *chunk)
{
    struct pv_mirror *self = pv_member(bounce, struct pv_mirror, bounce);
    struct pv_io *down = pv_chunk_child(bounce, chunk, down_done);

    if (!down) {
        chunk->error = ENOMEM;
        pv_bounce_sent(bounce, chunk);
        return;
    }
    chunk->under_way = 2; /* downstream, and the target or this function: it may be over before this ends */
    if (self->state == LOST || pv_mirror_send_to_target(self, chunk, false)) {
        pv_mirror_make_stale(self, chunk->start, chunk->length);
        chunk->under_way--;
    }
    pv_child_pass(&self->filter, down);
}

static void mirror_end(struct pv_bounce *bounce, struct pv_io *io, int error)
{
    struct pv_mirror *self = pv_member(bounce, struct pv_mirror, bounce);

    if (io == &self->copy)
        pv_mirror_copy_over(self, error);
    else
        pv_io_end(io, error);
}

static const struct pv_bounce_class mirror_bounce = {
    .alone = true, .deliver = pv_mirror_deliver, .seal = mirror_seal, .send = mirror_send, .end = mirror_end};

static void mirror_request(struct pv_filter *filter, struct pv_io *io)
{
    struct pv_mirror *self = (struct pv_mirror *)filter;

    if (io->type == PV_IO_FLUSH) {
        pv_list_append(&self->flushes, &io->link);
        pv_mirror_flush_both(&self->next_flush);
    } else {
        pv_bounce_request(&self->bounce, io);
    }
}

/* ---- life ---- */

static int read_names(const struct pv_settings *settings, const char **target, const char **state, uint64_t *retry_ms,
    uint64_t *patience_ms, struct pv_fail *fail)
{
    if (pv_settings_known(settings, names, fail) ||
        pv_setting_size(settings, "retry_ms", 1000, 10, 3600000, retry_ms, fail) ||
        pv_setting_size(settings, "patience_ms", 2000, 10, 3600000, patience_ms, fail))
        return -1;
    *target = pv_setting_text(settings, "target", NULL);
    *state = pv_setting_text(settings, "state", NULL);
    if (!*target)
        return pv_fail(fail, EINVAL,
            "target is not set: name the second disk, as file:PATH, disk:NAME or nbd:unix:PATH");
    if (!*state)
        return pv_fail(fail, EINVAL, "state is not set: name the file that remembers what differs");
    return 0;
}

static uint64_t map_bytes(uint64_t size)
{
    return (((size + REGION - 1) >> REGION_SHIFT) + 63) / 64 * 8;
}

static int mirror_create(const struct pv_settings *settings, uint64_t size, struct pv_fail *fail)
{
    static const uint64_t words[PV_MAP_WORDS] = {REGION};
    const char *target, *state;
    uint64_t retry_ms, patience_ms;

    if (read_names(settings, &target, &state, &retry_ms, &patience_ms, fail))
        return -1;
    if (size % PV_BLOCK || !size)
        return pv_fail(fail, EINVAL, "the disk has %llu bytes: a multiple of 4096 is wanted", (unsigned long long)size);
    return pv_map_create(state, "mirror", map_bytes(size), words, PV_MAP_LOST, fail);
}

static int make_bits(struct pv_mirror *self, struct pv_fail *fail)
{
    size_t bytes = map_bytes(self->filter.size);

    self->regions = (self->filter.size + REGION - 1) >> REGION_SHIFT;
    self->stale = calloc(1, bytes);
    self->cleaning = calloc(1, bytes);
    if (!self->stale || !self->cleaning)
        return pv_fail(fail, ENOMEM, "no memory for %llu regions", (unsigned long long)self->regions);
    if (pv_map_grow(self->map, bytes, fail))
        return -1;
    for (uint64_t page = 0; pv_map_lost_power(self->map) && page * REGIONS_A_PAGE < self->regions; page++) {
        int error = pv_map_back(self->map, page);

        if (error)
            return pv_fail(fail, error, "no room for the map: %s", strerror(error));
    }
    for (uint64_t region = 0; pv_map_lost_power(self->map) && region < self->regions; region++)
        pv_mirror_put_dirty(self, region, true);
    pv_mirror_all_dirty_is_stale(self);
    return 0;
}

static void mirror_close(struct pv_filter *filter)
{
    struct pv_mirror *self = (struct pv_mirror *)filter;

    pv_bounce_free(&self->bounce);
    pv_map_close(self->map);
    pv_target_free(self->target);
    free(self->stale);
    free(self->cleaning);
}

static int mirror_open(struct pv_filter *filter, const struct pv_settings *settings, struct pv_fail *fail)
{
    struct pv_mirror *self = (struct pv_mirror *)filter;
    const char *target, *state;
    uint64_t retry_ms, patience_ms;

    if (read_names(settings, &target, &state, &retry_ms, &patience_ms, fail))
        return -1;
    if (filter->size % PV_BLOCK || !filter->size)
        return pv_fail(fail, EINVAL, "the disk has %llu bytes: a multiple of 4096 is wanted",
            (unsigned long long)filter->size);
    pv_bounce_init(&self->bounce, filter, &mirror_bounce);
    pv_list_init(&self->flushes);
    self->retry_ns = retry_ms * 1000000;
    self->patience_ns = patience_ms * 1000000;
    self->covered = filter->size;
    self->late.fire = pv_mirror_on_late;
    pv_list_init(&self->sent);
    self->timer.fire = pv_mirror_on_timer;
    self->resync.run = pv_mirror_resync;
    self->next_flush.run = pv_mirror_flush_both;
    self->map = pv_map_open(filter, state, "mirror", true, fail);
    if (!self->map)
        return -1;
    self->target = pv_target_named(filter->instance, target, filter->size, fail);
    if (self->target && !make_bits(self, fail)) {
        self->state = self->stale_count ? RESYNC : IN_SYNC;
        return 0;
    }
    mirror_close(filter);
    return -1;
}

static void mirror_attached(struct pv_filter *filter)
{
    struct pv_mirror *self = (struct pv_mirror *)filter;

    pv_map_attached(self->map);
    pv_target_attach(self->target, filter->instance->loop);
    if (self->stale_count)
        pv_mirror_arm(self, 1000000);
}

static void mirror_detach(struct pv_filter *filter)
{
    struct pv_mirror *self = (struct pv_mirror *)filter;

    pv_loop_disarm(filter->instance->loop, &self->timer);
    pv_loop_disarm(filter->instance->loop, &self->late);
    pv_loop_undefer(filter->instance->loop, &self->resync);
    pv_loop_undefer(filter->instance->loop, &self->next_flush);
    pv_bounce_detach(&self->bounce);
    pv_map_detach(self->map);
    pv_target_detach(self->target);
}

static void drained(struct pv_io *io, int error)
{
    struct pv_mirror *self = io->owner;

    (void)error; /* then the live copy of the map stays, and says the same */
    pv_child_free(&self->filter, io);
}

/* So that a disk that is closed leaves a map that is worth something after the next boot. */
static void mirror_drain(struct pv_filter *filter)
{
    struct pv_mirror *self = (struct pv_mirror *)filter;
    struct pv_io *io;

    if (!pv_map_changed(self->map))
        return;
    io = pv_io_child(filter, NULL); /* no request: what the map holds while it syncs */
    if (!io)
        return;
    io->owner = self;
    pv_map_sync(self->map, NULL, io, drained);
}

/* The bits are those of the size that it was opened with. */
static void mirror_resized(struct pv_filter *filter, uint64_t size)
{
    uint64_t covered = ((struct pv_mirror *)filter)->covered;

    filter->size = size < covered ? size - size % PV_BLOCK : covered;
}

static unsigned mirror_figures(const struct pv_filter *filter, struct pv_figure *out, unsigned max)
{
    const struct pv_mirror *self = (const struct pv_mirror *)filter;
    unsigned count = 0;

    pv_figure(out, &count, max, "in_sync", __atomic_load_n(&self->state, __ATOMIC_RELAXED) == IN_SYNC);
    pv_figure(out, &count, max, "target_lost", __atomic_load_n(&self->state, __ATOMIC_RELAXED) == LOST);
    pv_figure(out, &count, max, "stale_regions", pv_get(&self->stale_count));
    pv_figure(out, &count, max, "resynced_regions", pv_get(&self->resynced));
    pv_figure(out, &count, max, "times_lost", pv_get(&self->lost));
    pv_figure(out, &count, max, "target_errors", pv_get(&self->target_errors));
    return count;
}

const struct pv_filter_class pv_mirror_class = {
    .name = "mirror",
    .order = PV_REPLICATION,
    .size = sizeof(struct pv_mirror),
    .types = PV_ALL_TYPES & ~(1u << PV_IO_READ),
    .persistent = true,
    .create = mirror_create,
    .open = mirror_open,
    .close = mirror_close,
    .attached = mirror_attached,
    .detach = mirror_detach,
    .request = mirror_request,
    .drain = mirror_drain,
    .resized = mirror_resized,
    .figures = mirror_figures,
};
