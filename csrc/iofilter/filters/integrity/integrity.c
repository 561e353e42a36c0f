/* A checksum (CRC-32C) for each block of 4 KiB: a block that is not what was written is an error, with its place, never data.
 *
 * Theory of operation
 * -------------------
 * The map (common/map.h) has two checksums a block, and a block is good if it is either of them:
 *
 *     before a write     {old, old} -> {old, new}      one store of 8 bytes; the data is written after it
 *     it has ended       {old, new} -> {new, new}
 *
 * A process that is killed in between leaves a block that is old or new, and both are good. If a write fails it stays {old, new}. If a block
 * that is {x, y} is written again, nobody knows which of the two is there: {any, new} until that write has ended.
 *
 * A power cut may bring newer data than map. So a region of the map is marked durably before it is first written to (pv_map_mark), and a
 * block of a region in doubt that does not match is taken as it is, once, and counted (`relearned`). Regions that were not written to in the
 * seconds before the cut are as safe as ever.
 *
 * A block that was never written through the filter has no checksum (0); the first read learns it, if `learn` is on: so a flipped bit that is
 * there already is not found. What was discarded may be anything (1). A checksum that is 0 or 1 by itself counts as 2 or 3.
 *
 * The checksum is computed of the buffer that is written or that was read (bounce.h), never of memory that a guest can change meanwhile.
 * A read that does not match may have met a write: it is read again when no write is under way there, and that counts.
 */
#include <errno.h>
#include <string.h>

#include "../common/bounce.h"
#include "../common/crc32c.h"
#include "../common/map.h"

#define BLOCKS_A_PAGE (PV_MAP_PAGE / 8)
#define MISMATCH EILSEQ /* within the filter: is looked at again */

enum { NEVER = 0, ANY = 1 };

struct integrity {
    struct pv_filter filter;
    struct pv_bounce bounce;
    struct pv_map *map;
    bool learn;
    uint32_t zeroes; /* checksum of a block of zeroes */
    uint64_t checked, learned, relearned, bad, retried, last_bad;
};

static const char *const names[] = {"state", "learn", NULL};

/* ---- entries ---- */

static uint64_t pair_of(uint32_t a, uint32_t b)
{
    return (uint64_t)b << 32 | a;
}

static uint64_t get_entry(const struct integrity *self, uint64_t block)
{
    const uint8_t *page = pv_map_look(self->map, block / BLOCKS_A_PAGE);

    return page ? __atomic_load_n((const uint64_t *)(const void *)page + block % BLOCKS_A_PAGE, __ATOMIC_RELAXED) : 0;
}

/* The page is backed. */
static void put_entry(struct integrity *self, uint64_t block, uint64_t entry)
{
    uint8_t *page = pv_map_change(self->map, block / BLOCKS_A_PAGE);

    __atomic_store_n((uint64_t *)(void *)page + block % BLOCKS_A_PAGE, entry, __ATOMIC_RELEASE);
}

static uint32_t checksum(const uint8_t *block)
{
    uint32_t crc = pv_crc32c(0, block, PV_BLOCK);

    return crc <= ANY ? crc + 2 : crc;
}

/* ---- reads ---- */

static void learn(struct integrity *self, uint64_t block, uint32_t crc, uint64_t *counter)
{
    if (pv_bounce_writes(&self->bounce, block * PV_BLOCK, PV_BLOCK) || pv_map_back(self->map, block / BLOCKS_A_PAGE))
        return;
    put_entry(self, block, pair_of(crc, crc));
    pv_add(counter, 1);
}

static int check_block(struct integrity *self, uint64_t block, const uint8_t *bytes)
{
    uint64_t entry = get_entry(self, block);
    uint32_t a = (uint32_t)entry, b = (uint32_t)(entry >> 32), crc;

    if (a == ANY || b == ANY || (entry == NEVER && !self->learn))
        return 0;
    crc = checksum(bytes);
    pv_add(&self->checked, 1);
    if (a == crc || b == crc)
        return 0;
    if (entry == NEVER) {
        learn(self, block, crc, &self->learned);
        return 0;
    }
    if (pv_map_in_doubt(self->map, block / BLOCKS_A_PAGE)) {
        learn(self, block, crc, &self->relearned);
        return 0;
    }
    return MISMATCH;
}

static int integrity_check(struct pv_bounce *bounce, struct pv_chunk *chunk)
{
    struct integrity *self = pv_member(bounce, struct integrity, bounce);

    for (uint64_t i = 0; i < chunk->length; i += PV_BLOCK)
        if (check_block(self, (chunk->start + i) / PV_BLOCK, chunk->buffer + i)) {
            if (pv_job_is_alone(chunk)) {
                pv_add(&self->bad, 1);
                __atomic_store_n(&self->last_bad, chunk->start + i, __ATOMIC_RELAXED);
            }
            return MISMATCH;
        }
    return 0;
}

/* ---- writes ---- */

static int integrity_seal(struct pv_bounce *bounce, struct pv_chunk *chunk)
{
    struct integrity *self = pv_member(bounce, struct integrity, bounce);
    int error;

    for (uint64_t i = 0; i < chunk->length; i += PV_BLOCK) {
        uint64_t block = (chunk->start + i) / PV_BLOCK, entry;
        uint32_t a, b, new = self->zeroes;

        error = pv_map_back(self->map, block / BLOCKS_A_PAGE);
        if (error)
            return error;
        entry = get_entry(self, block);
        a = (uint32_t)entry;
        b = (uint32_t)(entry >> 32);
        if (chunk->buffer)
            new = checksum(chunk->buffer + i);
        else if (chunk->type == PV_IO_DISCARD)
            new = ANY;
        /* NEVER, or one of two: what is there now may be anything. */
        put_entry(self, block, pair_of(a == b && a != NEVER ? a : ANY, new));
    }
    return 0;
}

static void integrity_written(struct pv_bounce *bounce, struct pv_chunk *chunk)
{
    struct integrity *self = pv_member(bounce, struct integrity, bounce);

    if (chunk->error)
        return;
    for (uint64_t i = 0; i < chunk->length; i += PV_BLOCK) {
        uint64_t block = (chunk->start + i) / PV_BLOCK;
        uint32_t new = (uint32_t)(get_entry(self, block) >> 32);

        put_entry(self, block, pair_of(new, new));
    }
}

static void settled(struct pv_io *io, int error)
{
    pv_io_end(io, error);
}

static void integrity_end(struct pv_bounce *bounce, struct pv_io *io, int error)
{
    struct integrity *self = pv_member(bounce, struct integrity, bounce);
    uint64_t *retried = &io->frames[self->filter.at].word;

    if (error == MISMATCH && io->type == PV_IO_READ && !*retried) {
        *retried = 1;
        pv_add(&self->retried, 1);
        pv_bounce_read_alone(bounce, io);
        return;
    }
    if (!error && io->flags & PV_IO_FUA)
        pv_map_sync(self->map, NULL, io, settled);
    else
        pv_io_end(io, error == MISMATCH ? EIO : error);
}

static const struct pv_bounce_class integrity_bounce = {
    .alone = true,
    .open = integrity_check,
    .seal = integrity_seal,
    .written = integrity_written,
    .end = integrity_end,
};

/* ---- requests ---- */

static void marked(struct pv_io *io, int error)
{
    struct integrity *self = (struct integrity *)io->instance->filters[io->at];

    if (error)
        pv_io_end(io, error);
    else
        pv_bounce_request(&self->bounce, io);
}

static void integrity_request(struct pv_filter *filter, struct pv_io *io)
{
    struct integrity *self = (struct integrity *)filter;
    uint64_t page = io->offset / PV_BLOCK / BLOCKS_A_PAGE, last;

    if (io->type == PV_IO_FLUSH) {
        if (pv_map_changed(self->map))
            pv_map_sync(self->map, NULL, io, settled);
        else
            pv_io_pass(filter, io);
        return;
    }
    if (io->type == PV_IO_READ || !io->length) {
        pv_bounce_request(&self->bounce, io);
        return;
    }
    last = (io->offset + io->length - 1) / PV_BLOCK / BLOCKS_A_PAGE;
    if (pv_map_marked(self->map, page, last))
        pv_bounce_request(&self->bounce, io);
    else
        pv_map_mark(self->map, page, last, io, marked);
}

static bool busy(struct pv_filter *filter, uint64_t page)
{
    struct integrity *self = (struct integrity *)filter;
    uint64_t length = (uint64_t)BLOCKS_A_PAGE * PV_BLOCK;

    return pv_bounce_writes(&self->bounce, page * length, length);
}

/* ---- life ---- */

static int read_names(const struct pv_settings *settings, const char **state, bool *learning, struct pv_fail *fail)
{
    const char *text = pv_setting_text(settings, "learn", "yes");

    if (pv_settings_known(settings, names, fail))
        return -1;
    *state = pv_setting_text(settings, "state", NULL);
    *learning = !strcmp(text, "yes");
    if (!*state)
        return pv_fail(fail, EINVAL, "state is not set: name the file that holds the checksums");
    if (!*learning && strcmp(text, "no"))
        return pv_fail(fail, EINVAL, "learn=%.40s: must be yes or no", text);
    return 0;
}

static uint64_t map_bytes(uint64_t size)
{
    return size / PV_BLOCK * 8;
}

static int whole_blocks(uint64_t size, struct pv_fail *fail)
{
    if (size % PV_BLOCK == 0 && size)
        return 0;
    return pv_fail(fail, EINVAL, "the disk has %llu bytes: a multiple of 4096 is wanted", (unsigned long long)size);
}

static int integrity_create(const struct pv_settings *settings, uint64_t size, struct pv_fail *fail)
{
    static const uint64_t words[PV_MAP_WORDS] = {PV_BLOCK};
    const char *state;
    bool learning;

    if (read_names(settings, &state, &learning, fail) || whole_blocks(size, fail))
        return -1;
    return pv_map_create(state, "integrity", map_bytes(size), words, 0, fail);
}

static int integrity_open(struct pv_filter *filter, const struct pv_settings *settings, struct pv_fail *fail)
{
    struct integrity *self = (struct integrity *)filter;
    static const uint8_t zeroes[PV_BLOCK];
    const char *state;

    if (read_names(settings, &state, &self->learn, fail) || whole_blocks(filter->size, fail))
        return -1;
    self->map = pv_map_open(filter, state, "integrity", true, fail);
    if (!self->map)
        return -1;
    if (pv_map_grow(self->map, map_bytes(filter->size), fail)) {
        pv_map_close(self->map);
        return -1;
    }
    pv_map_use_marks(self->map, busy);
    pv_bounce_init(&self->bounce, filter, &integrity_bounce);
    self->zeroes = checksum(zeroes);
    return 0;
}

static void integrity_close(struct pv_filter *filter)
{
    struct integrity *self = (struct integrity *)filter;

    pv_bounce_free(&self->bounce);
    pv_map_close(self->map);
}

static void integrity_attached(struct pv_filter *filter)
{
    pv_map_attached(((struct integrity *)filter)->map);
}

static void integrity_detach(struct pv_filter *filter)
{
    pv_bounce_detach(&((struct integrity *)filter)->bounce);
    pv_map_detach(((struct integrity *)filter)->map);
}

static void integrity_resized(struct pv_filter *filter, uint64_t size)
{
    struct pv_fail fail;

    size -= size % PV_BLOCK;
    if (!pv_map_grow(((struct integrity *)filter)->map, map_bytes(size), &fail))
        filter->size = size;
}

static unsigned integrity_figures(const struct pv_filter *filter, struct pv_figure *out, unsigned max)
{
    const struct integrity *self = (const struct integrity *)filter;
    unsigned count = 0;

    pv_figure(out, &count, max, "checked_blocks", pv_get(&self->checked));
    pv_figure(out, &count, max, "learned_blocks", pv_get(&self->learned));
    pv_figure(out, &count, max, "relearned_blocks", pv_get(&self->relearned));
    pv_figure(out, &count, max, "bad_blocks", pv_get(&self->bad));
    pv_figure(out, &count, max, "last_bad_offset", pv_get(&self->last_bad));
    return count;
}

const struct pv_filter_class pv_integrity_class = {
    .name = "integrity",
    .order = PV_ENCRYPTION,
    .size = sizeof(struct integrity),
    .types = PV_ALL_TYPES,
    .persistent = true,
    .create = integrity_create,
    .open = integrity_open,
    .close = integrity_close,
    .attached = integrity_attached,
    .detach = integrity_detach,
    .request = integrity_request,
    .resized = integrity_resized,
    .figures = integrity_figures,
};
