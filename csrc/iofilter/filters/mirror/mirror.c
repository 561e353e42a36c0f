/* Writes go to a second disk as well; what could not go there is made up for later.
 *
 * Theory of operation
 * -------------------
 *                 a write to the target failed                    `retry_ms` later
 *     IN SYNC ------------------------------------> LOST -----------------------------> RESYNC --nothing stale is left--> IN SYNC
 *                                                     <----------failed again-------------
 *
 * The disk is cut into regions of 64 KiB. Two bits say how a region stands:
 *
 *     dirty  (in the map: survives a kill)   it may differ on the two sides. Set before a write to it begins; taken away when a flush
 *                                            has come to an end on both sides, and nobody wrote to it since that flush began
 *     stale  (in memory)                     it does differ, as far as one knows: a write failed or was not sent. RESYNC copies it
 *
 * When the disk is opened, all that is dirty is stale: after a kill those are the regions that were being written to or were not flushed. After a
 * power cut (and at first) everything is stale.
 *
 * A write ends when both sides have ended it; with its result downstream. The guest never hears of a target that fails: `figures` shows it.
 * Both sides get the same bytes (bounce.h): a guest that changes its memory meanwhile cannot make them differ.
 *
 * A target that does not answer within `patience_ms` is lost as well. What was sent to it has a copy of its data (struct sent) and is given up:
 * the guest's request goes on without it. It may still arrive there, when the target is back, and must then not stay: so the target counts as
 * lost until all that was given up has ended, and what it was about is stale.
 * Reads come from downstream. RESYNC reads a region while no write is on it, and keeps writes off it until the target has it.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "../common/bounce.h"
#include "../common/map.h"

#define REGION_SHIFT 16
#define REGION (1ull << REGION_SHIFT)
#define REGIONS_A_PAGE (PV_MAP_PAGE * 8)

enum state { IN_SYNC, LOST, RESYNC };

/* A request to the target; it outlives what it was made for, if that does not wait any longer. */
struct sent {
    struct pv_link link; /* mirror.sent, in the order of their deadlines */
    struct mirror *self;
    uint64_t deadline_ns, start, length; /* length 0: a flush */
    struct pv_chunk *chunk;              /* NULL: a flush, or given up */
    bool given_up, copy;                 /* copy: RESYNC's */
    struct iovec iov;
    uint8_t data[];
};

struct mirror {
    struct pv_filter filter;
    struct pv_bounce bounce;
    struct pv_map *map;
    struct pv_target *target;
    enum state state;
    uint64_t retry_ns, patience_ns, covered;
    struct pv_link sent; /* struct sent */
    struct pv_timer late;
    unsigned given_up;
    uint64_t regions;
    uint8_t *stale, *cleaning; /* a bit a region; cleaning: dirty when the flush began, not written to since */
    uint64_t stale_count, next; /* next: where RESYNC looks */
    struct pv_io copy;          /* the region that is copied */
    bool copying, copy_refused; /* refused: by the target */
    struct pv_timer timer;
    struct pv_task resync;
    struct pv_link flushes; /* struct pv_io: they go one after the other */
    bool flushing;
    unsigned flush_sides;
    int flush_error;
    struct pv_task next_flush;
    uint64_t lost, resynced, target_errors;
};

static const char *const names[] = {"target", "state", "retry_ms", "patience_ms", NULL};

/* ---- bits ---- */

static bool get_bit(const uint8_t *bits, uint64_t at)
{
    return bits[at / 8] >> (at % 8) & 1;
}

static void put_bit(uint8_t *bits, uint64_t at, bool value)
{
    if (value)
        bits[at / 8] |= (uint8_t)(1u << at % 8);
    else
        bits[at / 8] &= (uint8_t)~(1u << at % 8);
}

static bool is_dirty(const struct mirror *self, uint64_t region)
{
    const uint8_t *page = pv_map_look(self->map, region / REGIONS_A_PAGE);

    return page && get_bit(page, region % REGIONS_A_PAGE);
}

/* A region that becomes dirty is in a page that is backed. */
static void put_dirty(struct mirror *self, uint64_t region, bool dirty)
{
    if (is_dirty(self, region) != dirty)
        put_bit(pv_map_change(self->map, region / REGIONS_A_PAGE), region % REGIONS_A_PAGE, dirty);
}

static void put_stale(struct mirror *self, uint64_t region, bool stale)
{
    if (get_bit(self->stale, region) == stale)
        return;
    put_bit(self->stale, region, stale);
    self->stale_count += stale ? 1 : -1ull;
}

static void make_stale(struct mirror *self, uint64_t start, uint64_t length)
{
    for (uint64_t region = start >> REGION_SHIFT; region <= (start + length - 1) >> REGION_SHIFT; region++)
        put_stale(self, region, true);
}

/* ---- states ---- */

static void arm(struct mirror *self, uint64_t wait_ns)
{
    pv_loop_arm(self->filter.instance->loop, &self->timer, pv_loop_clock_ns() + wait_ns);
}

static void target_failed(struct mirror *self)
{
    pv_add(&self->target_errors, 1);
    if (self->state != LOST)
        pv_add(&self->lost, 1);
    self->state = LOST;
    arm(self, self->retry_ns);
}

/* ---- what is sent to the target ---- */

static void target_over(struct sent *sent, int error);

static void arm_late(struct mirror *self)
{
    if (!pv_list_empty(&self->sent) && !pv_linked(&self->late.link))
        pv_loop_arm(self->filter.instance->loop, &self->late, pv_member(self->sent.next, struct sent, link)->deadline_ns);
}

static void give_up(struct sent *sent)
{
    sent->given_up = true;
    sent->self->given_up++;
    pv_list_remove(&sent->link);
    target_over(sent, ETIMEDOUT);
}

static void on_late(struct pv_timer *timer)
{
    struct mirror *self = pv_member(timer, struct mirror, late);
    uint64_t now = pv_loop_clock_ns();

    while (!pv_list_empty(&self->sent)) {
        struct sent *sent = pv_member(self->sent.next, struct sent, link);

        if (sent->deadline_ns > now)
            break;
        give_up(sent);
    }
    arm_late(self);
}

static void sent_done(struct pv_io *child)
{
    struct sent *sent = child->owner;
    struct mirror *self = sent->self;
    int error = child->error;

    pv_child_free(&self->filter, child);
    pv_list_remove(&sent->link);
    if (!sent->given_up)
        target_over(sent, error);
    else if (--self->given_up == 0) /* the retry finds the target free now */
        arm(self, self->retry_ns);
    free(sent);
}

/* ENOMEM: nothing was sent. The bytes are copied. */
static int send_to_target(struct mirror *self, struct pv_chunk *chunk, bool copy)
{
    struct pv_io *child = pv_io_child(&self->filter, chunk ? pv_chunk_io(chunk) : NULL);
    uint64_t bytes = chunk && chunk->buffer ? chunk->length : 0;
    struct sent *sent = malloc(sizeof *sent + bytes);

    if (!child || !sent) {
        if (child)
            pv_child_free(&self->filter, child);
        free(sent);
        return ENOMEM;
    }
    *sent = (struct sent){.self = self, .deadline_ns = pv_loop_clock_ns() + self->patience_ns, .chunk = chunk, .copy = copy};
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

/* ---- resync ---- */

static void schedule_resync(struct mirror *self)
{
    pv_loop_defer(self->filter.instance->loop, &self->resync);
}

static bool find_stale(struct mirror *self)
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
        if (get_bit(self->stale, self->next) && pv_bounce_is_free(&self->bounce, start, REGION))
            return true;
    }
    return false;
}

/* One region; the next follows at the end of the turn, so that guests' requests come in between. */
static void resync(struct pv_task *task)
{
    struct mirror *self = pv_member(task, struct mirror, resync);
    uint64_t start, length = REGION;

    if (self->copying || self->state == LOST || self->filter.instance->state != PV_RUNNING)
        return;
    if (!self->stale_count) {
        self->state = IN_SYNC;
        return;
    }
    if (!find_stale(self)) { /* all that is stale is being written to */
        arm(self, 10000000);
        return;
    }
    start = self->next << REGION_SHIFT;
    if (length > self->filter.size - start)
        length = self->filter.size - start;
    put_stale(self, self->next, false); /* a write from here on makes it stale again, if it fails */
    memset(&self->copy, 0, sizeof self->copy);
    self->copy.type = PV_IO_READ;
    self->copy.offset = start;
    self->copy.length = length;
    self->copy.instance = self->filter.instance;
    self->copying = true;
    self->copy_refused = false;
    pv_bounce_read_alone(&self->bounce, &self->copy);
}

static int mirror_deliver(struct pv_bounce *bounce, struct pv_chunk *chunk)
{
    struct mirror *self = pv_member(bounce, struct mirror, bounce);

    if (pv_chunk_io(chunk) != &self->copy) {
        pv_chunk_copy_out(chunk);
        return 0;
    }
    return send_to_target(self, chunk, true) ? ENOMEM : EINPROGRESS;
}

static void copy_over(struct mirror *self, int error)
{
    self->copying = false;
    if (error) {
        put_stale(self, self->copy.offset >> REGION_SHIFT, true);
        self->next++;
        if (self->copy_refused)
            target_failed(self);
        else /* the first disk cannot be read there: the others first */
            arm(self, self->retry_ns);
        return;
    }
    pv_add(&self->resynced, 1);
    schedule_resync(self);
}

static void on_timer(struct pv_timer *timer)
{
    struct mirror *self = pv_member(timer, struct mirror, timer);

    if (self->filter.instance->state != PV_RUNNING) {
        arm(self, 10000000);
        return;
    }
    if (self->given_up) { /* what was given up may still arrive there */
        arm(self, self->retry_ns);
        return;
    }
    if (self->state == LOST)
        self->state = RESYNC;
    schedule_resync(self);
}

/* ---- writes ---- */

static int mirror_seal(struct pv_bounce *bounce, struct pv_chunk *chunk)
{
    struct mirror *self = pv_member(bounce, struct mirror, bounce);
    uint64_t last = (chunk->start + chunk->length - 1) >> REGION_SHIFT;

    for (uint64_t region = chunk->start >> REGION_SHIFT; region <= last; region++) {
        int error = pv_map_back(self->map, region / REGIONS_A_PAGE);

        if (error)
            return error;
        put_dirty(self, region, true);
        put_bit(self->cleaning, region, false);
    }
    if (self->state == LOST)
        make_stale(self, chunk->start, chunk->length);
    return 0;
}

static void side_over(struct mirror *self, struct pv_chunk *chunk)
{
    if (!--chunk->under_way)
        pv_bounce_sent(&self->bounce, chunk);
}

static void down_done(struct pv_io *child)
{
    struct pv_chunk *chunk = child->owner;
    struct mirror *self = (struct mirror *)child->child_of;

    if (child->error) { /* the target may have it: the sides differ */
        chunk->error = child->error;
        make_stale(self, chunk->start, chunk->length);
        if (self->state != LOST) {
            self->state = RESYNC;
            arm(self, self->retry_ns);
        }
    }
    pv_child_free(&self->filter, child);
    side_over(self, chunk);
}

static void mirror_send(struct pv_bounce *bounce, struct pv_chunk *chunk)
{
    struct mirror *self = pv_member(bounce, struct mirror, bounce);
    struct pv_io *down = pv_chunk_child(bounce, chunk, down_done);

    if (!down) {
        chunk->error = ENOMEM;
        pv_bounce_sent(bounce, chunk);
        return;
    }
    chunk->under_way = 2; /* downstream, and the target or this function: it may be over before this ends */
    if (self->state == LOST || send_to_target(self, chunk, false)) {
        make_stale(self, chunk->start, chunk->length);
        chunk->under_way--;
    }
    pv_child_pass(&self->filter, down);
}

static void mirror_end(struct pv_bounce *bounce, struct pv_io *io, int error)
{
    struct mirror *self = pv_member(bounce, struct mirror, bounce);

    if (io == &self->copy)
        copy_over(self, error);
    else
        pv_io_end(io, error);
}

static const struct pv_bounce_class mirror_bounce = {
    .alone = true, .deliver = mirror_deliver, .seal = mirror_seal, .send = mirror_send, .end = mirror_end};

/* ---- flush ---- */

static void begin_cleaning(struct mirror *self)
{
    for (uint64_t page = 0; page * REGIONS_A_PAGE < self->regions; page++) {
        const uint8_t *bits = pv_map_look(self->map, page);
        uint64_t count = self->regions - page * REGIONS_A_PAGE;

        count = count < REGIONS_A_PAGE ? count : REGIONS_A_PAGE;
        if (bits)
            memcpy(self->cleaning + page * PV_MAP_PAGE, bits, (count + 7) / 8);
    }
}

/* What was dirty when the flush began, and was not written to since, nor is being written to, is the same on both sides. */
static void end_cleaning(struct mirror *self)
{
    for (uint64_t region = 0; region < self->regions; region++) {
        if (!self->cleaning[region / 8]) {
            region |= 7;
            continue;
        }
        if (get_bit(self->cleaning, region) && !get_bit(self->stale, region) &&
            !pv_bounce_writes(&self->bounce, region << REGION_SHIFT, REGION))
            put_dirty(self, region, false);
    }
    memset(self->cleaning, 0, (self->regions + 7) / 8);
}

static void all_dirty_is_stale(struct mirror *self)
{
    for (uint64_t region = 0; region < self->regions; region++)
        if (is_dirty(self, region))
            put_stale(self, region, true);
}

static void flush_side_over(struct mirror *self)
{
    struct pv_io *io = pv_member(self->flushes.next, struct pv_io, link);
    int error = self->flush_error;

    if (--self->flush_sides)
        return;
    if (!error && self->state != LOST)
        end_cleaning(self);
    self->flushing = false;
    pv_list_remove(&io->link);
    if (!pv_list_empty(&self->flushes))
        pv_loop_defer(self->filter.instance->loop, &self->next_flush);
    pv_io_end(io, error);
}

static void flushed_down(struct pv_io *child)
{
    struct mirror *self = child->owner;

    if (child->error)
        self->flush_error = child->error;
    pv_child_free(&self->filter, child);
    flush_side_over(self);
}

/* A request to the target has ended, or is not waited for any longer. */
static void target_over(struct sent *sent, int error)
{
    struct mirror *self = sent->self;
    struct pv_chunk *chunk = sent->chunk;

    sent->chunk = NULL;
    if (error && !sent->length)
        all_dirty_is_stale(self); /* what it said it had, it may not have */
    else if (error)
        make_stale(self, sent->start, sent->length);
    if (error)
        target_failed(self);
    if (!sent->length) {
        flush_side_over(self);
    } else if (sent->copy) {
        self->copy_refused = error != 0;
        chunk->error = error;
        pv_bounce_delivered(&self->bounce, chunk);
    } else {
        side_over(self, chunk);
    }
}

static struct pv_io *flush_child(struct mirror *self, void (*done)(struct pv_io *))
{
    struct pv_io *child = pv_io_child(&self->filter, NULL);

    if (!child)
        return NULL;
    child->type = PV_IO_FLUSH;
    child->owner = self;
    child->done = done;
    return child;
}

static void flush_both(struct pv_task *task)
{
    struct mirror *self = pv_member(task, struct mirror, next_flush);
    struct pv_io *down;

    if (self->flushing || pv_list_empty(&self->flushes))
        return;
    self->flushing = true;
    self->flush_sides = 1; /* held here */
    self->flush_error = 0;
    begin_cleaning(self);
    down = flush_child(self, flushed_down);
    if (!down)
        self->flush_error = ENOMEM;
    self->flush_sides += down != NULL;
    if (self->state != LOST) {
        self->flush_sides++;
        if (send_to_target(self, NULL, false)) {
            self->flush_sides--;
            self->flush_error = ENOMEM;
        }
    }
    if (down)
        pv_child_pass(&self->filter, down);
    flush_side_over(self);
}

static void mirror_request(struct pv_filter *filter, struct pv_io *io)
{
    struct mirror *self = (struct mirror *)filter;

    if (io->type == PV_IO_FLUSH) {
        pv_list_append(&self->flushes, &io->link);
        flush_both(&self->next_flush);
    } else {
        pv_bounce_request(&self->bounce, io);
    }
}

/* ---- life ---- */

static int read_names(const struct pv_settings *settings, const char **target, const char **state, uint64_t *retry_ms,
    uint64_t *patience_ms, struct pv_fail *fail)
{
    if (pv_settings_known(settings, names, fail) || pv_setting_size(settings, "retry_ms", 1000, 10, 3600000, retry_ms, fail) ||
        pv_setting_size(settings, "patience_ms", 2000, 10, 3600000, patience_ms, fail))
        return -1;
    *target = pv_setting_text(settings, "target", NULL);
    *state = pv_setting_text(settings, "state", NULL);
    if (!*target)
        return pv_fail(fail, EINVAL, "target is not set: name the second disk, as file:PATH, disk:NAME or nbd:unix:PATH");
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

static int make_bits(struct mirror *self, struct pv_fail *fail)
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
        put_dirty(self, region, true);
    all_dirty_is_stale(self);
    return 0;
}

static void mirror_close(struct pv_filter *filter)
{
    struct mirror *self = (struct mirror *)filter;

    pv_bounce_free(&self->bounce);
    pv_map_close(self->map);
    pv_target_free(self->target);
    free(self->stale);
    free(self->cleaning);
}

static int mirror_open(struct pv_filter *filter, const struct pv_settings *settings, struct pv_fail *fail)
{
    struct mirror *self = (struct mirror *)filter;
    const char *target, *state;
    uint64_t retry_ms, patience_ms;

    if (read_names(settings, &target, &state, &retry_ms, &patience_ms, fail))
        return -1;
    if (filter->size % PV_BLOCK || !filter->size)
        return pv_fail(fail, EINVAL, "the disk has %llu bytes: a multiple of 4096 is wanted", (unsigned long long)filter->size);
    pv_bounce_init(&self->bounce, filter, &mirror_bounce);
    pv_list_init(&self->flushes);
    self->retry_ns = retry_ms * 1000000;
    self->patience_ns = patience_ms * 1000000;
    self->covered = filter->size;
    self->late.fire = on_late;
    pv_list_init(&self->sent);
    self->timer.fire = on_timer;
    self->resync.run = resync;
    self->next_flush.run = flush_both;
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
    struct mirror *self = (struct mirror *)filter;

    pv_map_attached(self->map);
    pv_target_attach(self->target, filter->instance->loop);
    if (self->stale_count)
        arm(self, 1000000);
}

static void mirror_detach(struct pv_filter *filter)
{
    struct mirror *self = (struct mirror *)filter;

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
    struct mirror *self = io->owner;

    (void)error; /* then the live copy of the map stays, and says the same */
    pv_child_free(&self->filter, io);
}

/* So that a disk that is closed leaves a map that is worth something after the next boot. */
static void mirror_drain(struct pv_filter *filter)
{
    struct mirror *self = (struct mirror *)filter;
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
    uint64_t covered = ((struct mirror *)filter)->covered;

    filter->size = size < covered ? size - size % PV_BLOCK : covered;
}

static unsigned mirror_figures(const struct pv_filter *filter, struct pv_figure *out, unsigned max)
{
    const struct mirror *self = (const struct mirror *)filter;
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
    .size = sizeof(struct mirror),
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
