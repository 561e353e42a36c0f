/* A read cache that all disks of a host share, of all its processes: one file in memory, write-through.
 *
 * Theory of operation
 * -------------------
 * The file is a head, a table of tags and the data: sets of 8 slots, a slot one block of 4 KiB. Where a block may lie follows from its key
 * (disk, offset): one of the 8 slots of one set. Nobody takes a lock, and nobody waits for another:
 *
 *     look up    a slot whose tag has the key and an even sequence -> copy the data to the request -> the sequence is still the same, and
 *                the checksum of what was copied is the tag's: a hit. Anything else: a miss, and what was copied is overwritten.
 *     fill       sequence s (even) -> s + 1 by compare-and-swap: the slot is this process's -> key, data, checksum -> s + 2
 *     forget     the same, with key 0
 *
 * A process that is killed in a fill leaves an odd sequence. After CLAIM_NS anybody may take such a slot over (s + 1 -> s + 3). If the first
 * was not dead but only late, both write: then data and checksum do not belong together, and readers see a miss. The checksum covers the key:
 * a block never passes for another one.
 *
 * What goes in never was in a guest's memory: a miss is read into a buffer of this process's (bounce.h), from there to the cache and to the
 * request. A guest could otherwise change it on the way, and other guests would read what it made of it.
 *
 * Whose block: the key is made of the setting `id` and, for a disk that can be written to, of a number that this opener drew: such a disk has
 * one opener, whose cached blocks nobody else uses, also not the next opener. Read-only disks (bases) share their blocks among all.
 *
 * Writes (of one disk, one loop): before the write goes on, its blocks are forgotten; until it has ended nothing is filled in there; and a read
 * that was under way when a write began does not fill (a counter by region says so). So the cache never has what the disk has not.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../common/bounce.h"
#include "../common/crc32c.h"
#include "common/cleanup.h"

#define WAYS 8
#define CLAIM_NS 2000000000u
#define TOUCH_NS 100000000u
#define REGIONS 1024 /* of 256 KiB, hashed */
#define REGION_SHIFT 18
#define READ_MAX (1u << 20) /* longer reads are sequential: they pass by */

struct head {
    char magic[8];
    uint32_t version, ways;
    uint64_t slots;
};

/* 64 bytes: one cache line. All but `sequence` are only read by those who check it before and after. */
struct tag {
    uint64_t sequence; /* odd: somebody writes */
    uint64_t disk, block;
    uint64_t claimed_ns, used;
    uint32_t sum, unused;
    uint8_t pad[16];
};

_Static_assert(sizeof(struct tag) == 64, "a tag is a cache line");

static const char magic[8] = "PVCACHE";

struct cache {
    struct pv_filter filter;
    struct pv_bounce bounce;
    uint8_t *memory;
    size_t length;
    struct tag *tags;
    uint8_t *data;
    uint64_t slots, disk;
    bool fill;
    uint32_t writing[REGIONS]; /* writes under way */
    uint32_t version[REGIONS]; /* how many there were */
    uint64_t hits, misses, fills, bypassed;
};

static const char *const names[] = {"file", "size", "id", "fill", NULL};

/* ---- slots ---- */

static uint64_t mix(uint64_t x)
{
    x ^= x >> 33;
    x *= 0xff51afd7ed558ccdu;
    x ^= x >> 33;
    x *= 0xc4ceb9fe1a85ec53u;
    return x ^ x >> 33;
}

static uint64_t set_of(const struct cache *self, uint64_t block)
{
    return mix(self->disk ^ mix(block)) % (self->slots / WAYS) * WAYS;
}

static uint32_t sum_of(const struct cache *self, uint64_t block, const uint8_t *data)
{
    uint64_t key[2] = {self->disk, block};

    return pv_crc32c(pv_crc32c(0, key, sizeof key), data, PV_BLOCK);
}

#define LOAD(field) __atomic_load_n(&(field), __ATOMIC_RELAXED)
#define STORE(field, value) __atomic_store_n(&(field), value, __ATOMIC_RELAXED)

static bool holds(const struct cache *self, const struct tag *tag, uint64_t block)
{
    return LOAD(tag->disk) == self->disk && LOAD(tag->block) == block;
}

/* The checksum is taken of the copy, not of the slot: it is the copy that must be right. */
static bool look_in(const struct cache *self, uint64_t slot, uint64_t block, uint8_t *out)
{
    struct tag *tag = &self->tags[slot];
    uint64_t sequence = __atomic_load_n(&tag->sequence, __ATOMIC_ACQUIRE);
    uint64_t now;
    uint32_t sum;

    if (sequence & 1 || !holds(self, tag, block))
        return false;
    memcpy(out, self->data + slot * PV_BLOCK, PV_BLOCK);
    sum = LOAD(tag->sum);
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    if (LOAD(tag->sequence) != sequence || sum != sum_of(self, block, out))
        return false;
    now = pv_loop_clock_ns();
    if (now - LOAD(tag->used) > TOUCH_NS) /* seldom: other CPUs have the line too */
        STORE(tag->used, now);
    return true;
}

static bool look_up(const struct cache *self, uint64_t block, uint8_t *out)
{
    uint64_t set = set_of(self, block);

    for (uint64_t slot = set; slot < set + WAYS; slot++)
        if (look_in(self, slot, block, out))
            return true;
    return false;
}

/* Takes a slot to write to it; the odd sequence, or 0: somebody else has it. */
static uint64_t claim(struct tag *tag, uint64_t now)
{
    uint64_t sequence = __atomic_load_n(&tag->sequence, __ATOMIC_ACQUIRE), odd;

    if (sequence & 1 && now - LOAD(tag->claimed_ns) < CLAIM_NS)
        return 0;
    odd = sequence + (sequence & 1 ? 2 : 1);
    if (!__atomic_compare_exchange_n(&tag->sequence, &sequence, odd, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
        return 0;
    STORE(tag->claimed_ns, now);
    return odd;
}

static void release(struct tag *tag, uint64_t odd)
{
    /* If somebody took it over meanwhile, it is theirs: the sequence is not touched. */
    __atomic_compare_exchange_n(&tag->sequence, &odd, odd + 1, false, __ATOMIC_RELEASE, __ATOMIC_RELAXED);
}

static void forget_block(struct cache *self, uint64_t block)
{
    uint64_t set = set_of(self, block);

    for (uint64_t slot = set; slot < set + WAYS; slot++) {
        struct tag *tag = &self->tags[slot];
        uint64_t odd;

        if (!holds(self, tag, block))
            continue;
        odd = claim(tag, pv_loop_clock_ns());
        if (!odd)
            continue; /* somebody fills it with another block: ours is gone anyway */
        STORE(tag->disk, 0);
        release(tag, odd);
    }
}

/* The slot with the block, else an empty one, else the one that was not used for the longest time. */
static uint64_t victim(const struct cache *self, uint64_t block)
{
    uint64_t set = set_of(self, block), best = set, oldest = UINT64_MAX;

    for (uint64_t slot = set; slot < set + WAYS; slot++) {
        const struct tag *tag = &self->tags[slot];
        uint64_t used = LOAD(tag->disk) ? LOAD(tag->used) : 0;

        if (holds(self, tag, block))
            return slot;
        if (used < oldest) {
            oldest = used;
            best = slot;
        }
    }
    return best;
}

static void fill_block(struct cache *self, uint64_t block, const uint8_t *data)
{
    uint64_t slot = victim(self, block), now = pv_loop_clock_ns(), odd;
    struct tag *tag = &self->tags[slot];

    odd = claim(tag, now);
    if (!odd)
        return;
    __atomic_thread_fence(__ATOMIC_RELEASE);
    STORE(tag->disk, self->disk);
    STORE(tag->block, block);
    STORE(tag->sum, sum_of(self, block, data));
    STORE(tag->used, now);
    memcpy(self->data + slot * PV_BLOCK, data, PV_BLOCK);
    release(tag, odd);
    pv_add(&self->fills, 1);
}

/* ---- reads ---- */

static uint32_t region_of(uint64_t offset)
{
    return (uint32_t)(mix(offset >> REGION_SHIFT) % REGIONS);
}

static bool serve_block(struct cache *self, struct pv_io *io, uint64_t block)
{
    uint8_t copy[PV_BLOCK];
    uint64_t start = block * PV_BLOCK, from = start < io->offset ? io->offset : start;
    uint64_t to = start + PV_BLOCK < io->offset + io->length ? start + PV_BLOCK : io->offset + io->length;

    if (!look_up(self, block, copy))
        return false;
    pv_iov_copy_in(io->iov, io->iov_count, from - io->offset, copy + (from - start), to - from);
    return true;
}

static bool serve(struct cache *self, struct pv_io *io)
{
    for (uint64_t block = io->offset / PV_BLOCK; block * PV_BLOCK < io->offset + io->length; block++)
        if (!serve_block(self, io, block))
            return false;
    return true;
}

/* Sum of the versions of the regions of a range: the same before and after means that no write began in between. */
static uint64_t versions(const struct cache *self, uint64_t start, uint64_t length, bool *writing)
{
    uint64_t sum = 0;

    *writing = false;
    for (uint64_t at = start >> REGION_SHIFT; at <= (start + length - 1) >> REGION_SHIFT; at++) {
        uint32_t region = region_of(at << REGION_SHIFT);

        sum += self->version[region];
        *writing |= self->writing[region] != 0;
    }
    return sum;
}

static int cache_read(struct pv_bounce *bounce, struct pv_chunk *chunk)
{
    struct cache *self = pv_member(bounce, struct cache, bounce);
    struct pv_io *io = pv_chunk_io(chunk);
    bool writing;
    uint64_t now = versions(self, io->offset, io->length, &writing);

    if (self->fill && !writing && now == io->frames[self->filter.at].word)
        for (uint64_t i = 0; i < chunk->length; i += PV_BLOCK)
            fill_block(self, (chunk->start + i) / PV_BLOCK, chunk->buffer + i);
    pv_chunk_copy_out(chunk);
    return 0;
}

static const struct pv_bounce_class cache_bounce = {.deliver = cache_read};

static void read_request(struct cache *self, struct pv_io *io)
{
    bool writing;

    if (io->length > READ_MAX || !io->length || io->offset + io->length > self->filter.size / PV_BLOCK * PV_BLOCK) {
        pv_add(&self->bypassed, 1);
        pv_io_pass(&self->filter, io);
        return;
    }
    if (serve(self, io)) {
        pv_add(&self->hits, 1);
        pv_io_end(io, 0);
        return;
    }
    pv_add(&self->misses, 1);
    io->frames[self->filter.at].word = versions(self, io->offset, io->length, &writing);
    if (writing || !self->fill)
        pv_io_pass(&self->filter, io);
    else
        pv_bounce_request(&self->bounce, io);
}

/* ---- writes ---- */

static void change_regions(struct cache *self, const struct pv_io *io, int by)
{
    for (uint64_t at = io->offset >> REGION_SHIFT; at <= (io->offset + io->length - 1) >> REGION_SHIFT; at++) {
        uint32_t region = region_of(at << REGION_SHIFT);

        self->writing[region] += (uint32_t)by;
        self->version[region]++;
    }
}

/* Forgets a block at a time; or, for a range with more blocks than there are slots, all of this disk's slots. */
static void forget_range(struct cache *self, uint64_t offset, uint64_t length)
{
    uint64_t first = offset / PV_BLOCK, last = (offset + length - 1) / PV_BLOCK;

    if (last - first < self->slots) {
        for (uint64_t block = first; block <= last; block++)
            forget_block(self, block);
        return;
    }
    for (uint64_t slot = 0; slot < self->slots; slot++)
        if (LOAD(self->tags[slot].disk) == self->disk)
            forget_block(self, LOAD(self->tags[slot].block));
}

static void cache_request(struct pv_filter *filter, struct pv_io *io)
{
    struct cache *self = (struct cache *)filter;

    if (io->type == PV_IO_READ) {
        read_request(self, io);
        return;
    }
    if (io->length) {
        change_regions(self, io, 1);
        forget_range(self, io->offset, io->length);
        io->frames[filter->at].pointer = self;
    }
    pv_io_pass(filter, io);
}

static void cache_completed(struct pv_filter *filter, struct pv_io *io)
{
    if (io->frames[filter->at].pointer)
        change_regions((struct cache *)filter, io, -1);
}

/* ---- the file ---- */

static int open_file(const char *path, uint64_t slots, struct pv_fail *fail)
{
    cleanup_fd int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    struct head head = {.version = 1, .ways = WAYS, .slots = slots};
    uint64_t size = PV_BLOCK + slots * (sizeof(struct tag) + PV_BLOCK);
    struct stat stat;

    /* One makes it, the others wait for that. */
    if (fd < 0 || flock(fd, LOCK_EX) || fstat(fd, &stat))
        return pv_fail(fail, errno, "file %.120s: %s", path, strerror(errno));
    memcpy(head.magic, magic, sizeof magic);
    if (!stat.st_size && (ftruncate(fd, (off_t)size) || pwrite(fd, &head, sizeof head, 0) != sizeof head))
        return pv_fail(fail, errno, "file %.120s: %s", path, strerror(errno));
    if (pread(fd, &head, sizeof head, 0) != sizeof head || memcmp(head.magic, magic, sizeof magic) || head.version != 1 ||
        head.ways != WAYS || fstat(fd, &stat))
        return pv_fail(fail, EINVAL, "file %.120s: no cache of this version", path);
    if (head.slots != slots || (uint64_t)stat.st_size != size)
        return pv_fail(fail, EINVAL, "file %.120s: is there already with a size of %llu: give that, or another file", path,
            (unsigned long long)(head.slots * PV_BLOCK));
    return steal_fd(&fd);
}

/* Room for all of it at once: a store into a hole of a full file system would be a SIGBUS. */
static int map_file(struct cache *self, const char *path, struct pv_fail *fail)
{
    cleanup_fd int fd = open_file(path, self->slots, fail);
    int error;

    if (fd < 0)
        return -1;
    self->length = PV_BLOCK + self->slots * (sizeof(struct tag) + PV_BLOCK);
    error = posix_fallocate(fd, 0, (off_t)self->length);
    if (error)
        return pv_fail(fail, error, "file %.120s: no room for %llu bytes: %s", path, (unsigned long long)self->length, strerror(error));
    self->memory = mmap(NULL, self->length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    flock(fd, LOCK_UN); /* the mapping would keep the descriptor's lock */
    if (self->memory == MAP_FAILED)
        return pv_fail(fail, errno, "file %.120s: %s", path, strerror(errno));
    self->tags = (struct tag *)(void *)(self->memory + PV_BLOCK);
    self->data = self->memory + PV_BLOCK + self->slots * sizeof(struct tag);
    return 0;
}

/* ---- life ---- */

static int make_key(struct cache *self, const char *id, struct pv_fail *fail)
{
    uint64_t drawn = 0, size = strlen(id);

    if (!self->filter.instance->read_only && getrandom(&drawn, sizeof drawn, 0) != sizeof drawn)
        return pv_fail(fail, errno, "no random number: %s", strerror(errno));
    self->disk = mix(drawn ^ size);
    for (const char *at = id; *at; at++)
        self->disk = mix(self->disk ^ (uint8_t)*at);
    self->disk |= 1; /* never 0 */
    return 0;
}

static int cache_open(struct pv_filter *filter, const struct pv_settings *settings, struct pv_fail *fail)
{
    struct cache *self = (struct cache *)filter;
    const char *path = pv_setting_text(settings, "file", NULL), *id = pv_setting_text(settings, "id", NULL);
    const char *fill = pv_setting_text(settings, "fill", "yes");
    uint64_t size;

    if (pv_settings_known(settings, names, fail) || pv_setting_size(settings, "size", 256 << 20, 1 << 16, 1ull << 42, &size, fail))
        return -1;
    if (!path)
        return pv_fail(fail, EINVAL, "file is not set: name the file in memory that the host's disks share, below /dev/shm");
    if (!id || !*id)
        return pv_fail(fail, EINVAL, "id is not set: give what names this disk's content and no other's");
    if (strcmp(fill, "yes") && strcmp(fill, "no"))
        return pv_fail(fail, EINVAL, "fill=%.40s: must be yes or no", fill);
    self->fill = !strcmp(fill, "yes");
    self->slots = size / PV_BLOCK / WAYS * WAYS;
    if (make_key(self, id, fail) || map_file(self, path, fail))
        return -1;
    pv_bounce_init(&self->bounce, filter, &cache_bounce);
    return 0;
}

static void cache_close(struct pv_filter *filter)
{
    struct cache *self = (struct cache *)filter;

    pv_bounce_free(&self->bounce);
    munmap(self->memory, self->length);
}

static void cache_detach(struct pv_filter *filter)
{
    pv_bounce_detach(&((struct cache *)filter)->bounce);
}

static unsigned cache_figures(const struct pv_filter *filter, struct pv_figure *out, unsigned max)
{
    const struct cache *self = (const struct cache *)filter;
    unsigned count = 0;

    pv_figure(out, &count, max, "hits", pv_get(&self->hits));
    pv_figure(out, &count, max, "misses", pv_get(&self->misses));
    pv_figure(out, &count, max, "fills", pv_get(&self->fills));
    pv_figure(out, &count, max, "bypassed", pv_get(&self->bypassed));
    return count;
}

const struct pv_filter_class pv_cache_class = {
    .name = "cache",
    .order = PV_CACHING,
    .size = sizeof(struct cache),
    .types = PV_ALL_TYPES & ~(1u << PV_IO_FLUSH),
    .open = cache_open,
    .close = cache_close,
    .detach = cache_detach,
    .request = cache_request,
    .completed = cache_completed,
    .figures = cache_figures,
};
