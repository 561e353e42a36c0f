/* The areas: making and mapping them, items, iteration. See percpu.h for the theory of operation. */
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "common/cleanup.h"
#include "rooms.h"

#define MOST_CPUS 65536
#define SEALS (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)

static int fail(int *err, int code)
{
    *err = code;
    return -1;
}

/* ---- making ------------------------------------------------------------------------------------------------------ */

/* The kernel's own bound: sched_getaffinity(2) copies as many bytes as its CPU masks have. Needs no file system, so it works in a
 * confined process. */
static uint32_t mask_cpus(void)
{
    static unsigned long mask[MOST_CPUS / 8 / sizeof(long)];
    long bytes = syscall(SYS_sched_getaffinity, 0, sizeof mask, mask);

    return bytes > 0 ? (uint32_t)bytes * 8 : 1024;
}

/* How many CPUs this machine can ever have: "0-127" has 128. */
static uint32_t possible_cpus(void)
{
    cleanup_file FILE *file = fopen("/sys/devices/system/cpu/possible", "re");
    char text[256];
    char *last;
    unsigned long number;

    if (!file || !fgets(text, sizeof text, file))
        return mask_cpus();
    last = strrchr(text, '-') ? strrchr(text, '-') + 1 : text;
    number = strtoul(last, NULL, 10) + 1;
    return number > MOST_CPUS ? MOST_CPUS : (uint32_t)number;
}

static size_t whole_bytes(uint32_t cpus)
{
    return PV_PERCPU_HEADER_BYTES + ((size_t)cpus << (PV_PERCPU_SHIFT + 1));
}

/* Maps `fd` at a multiple of the header's size. */
static int map(int fd, size_t bytes, char **out, int *err)
{
    size_t room = bytes + PV_PERCPU_HEADER_BYTES;
    char *reserved = mmap(NULL, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    size_t before;

    if (reserved == MAP_FAILED)
        return fail(err, errno);
    before = -(uintptr_t)reserved & (PV_PERCPU_HEADER_BYTES - 1);
    *out = mmap(reserved + before, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_NORESERVE, fd, 0);
    if (*out == MAP_FAILED) {
        *err = errno;
        munmap(reserved, room);
        return -1;
    }
    if (before)
        munmap(reserved, before);
    if (room - before - bytes)
        munmap(*out + bytes, room - before - bytes);
    return 0;
}

/* Takes `fd` on success. */
static int open_areas(int fd, uint32_t cpus, struct pv_percpu **out, int *err)
{
    cleanup_free struct pv_percpu *areas = calloc(1, sizeof *areas);
    char *start;

    if (!areas)
        return fail(err, ENOMEM);
    if (map(fd, whole_bytes(cpus), &start, err))
        return -1;
    areas->header = (struct pv_percpu_header *)start;
    areas->areas = start + PV_PERCPU_HEADER_BYTES;
    areas->cpus = cpus;
    areas->fd = fd;
    areas->bytes = whole_bytes(cpus);
    *out = steal_pointer(&areas);
    return 0;
}

static void init_header(struct pv_percpu_header *header, uint32_t cpus)
{
    pthread_mutexattr_t kind;

    pthread_mutexattr_init(&kind);
    pthread_mutexattr_setpshared(&kind, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&kind, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_init(&header->lock, &kind);
    pthread_mutexattr_destroy(&kind);
    header->version = PV_PERCPU_VERSION;
    header->cpus = cpus;
    __atomic_store_n(&header->magic, PV_PERCPU_MAGIC, __ATOMIC_RELEASE);
}

int pv_percpu_create(uint32_t cpus, struct pv_percpu **out, int *err)
{
    cleanup_fd int fd = memfd_create("percpu", MFD_CLOEXEC | MFD_ALLOW_SEALING);

    if (cpus > MOST_CPUS)
        return fail(err, EINVAL);
    cpus = cpus ? cpus : possible_cpus();
    /* Sealed: nobody can take the memory away under another's hands, which would kill him by SIGBUS. */
    if (fd < 0 || ftruncate(fd, (off_t)whole_bytes(cpus)) || fcntl(fd, F_ADD_SEALS, SEALS))
        return fail(err, errno);
    if (open_areas(fd, cpus, out, err))
        return -1;
    steal_fd(&fd);
    init_header((*out)->header, cpus);
    return 0;
}

int pv_percpu_attach(int fd, struct pv_percpu **out, int *err)
{
    struct {
        uint64_t magic;
        uint32_t version, cpus;
    } start;
    struct stat status;
    cleanup_fd int own = fcntl(fd, F_DUPFD_CLOEXEC, 3);

    if (own < 0 || fstat(own, &status))
        return fail(err, errno);
    if ((fcntl(own, F_GET_SEALS) & SEALS) != SEALS || pread(own, &start, sizeof start, 0) != sizeof start || start.magic != PV_PERCPU_MAGIC ||
        start.version != PV_PERCPU_VERSION || !start.cpus || start.cpus > MOST_CPUS ||
        (size_t)status.st_size != whole_bytes(start.cpus))
        return fail(err, EINVAL);
    if (open_areas(own, start.cpus, out, err))
        return -1;
    steal_fd(&own);
    return 0;
}

void pv_percpu_destroy(struct pv_percpu *areas)
{
    if (!areas)
        return;
    munmap(areas->header, areas->bytes);
    close(areas->fd);
    free(areas);
}

int pv_percpu_fd(const struct pv_percpu *areas)
{
    return areas->fd;
}

uint32_t pv_percpu_cpus(const struct pv_percpu *areas)
{
    return areas->cpus;
}

/* ---- items ------------------------------------------------------------------------------------------------------- */

/* Whatever a process that died here was changing, the map of units only ever loses room by it. */
static void lock(struct pv_percpu *areas)
{
    if (pthread_mutex_lock(&areas->header->lock) == EOWNERDEAD)
        pthread_mutex_consistent(&areas->header->lock);
}

static void unlock(struct pv_percpu *areas)
{
    pthread_mutex_unlock(&areas->header->lock);
}

static int run_is_free(const uint64_t *used, uint32_t first, uint32_t units)
{
    if (units >= 64) {
        for (uint32_t i = first / 64; i < (first + units) / 64; i++)
            if (used[i])
                return 0;
        return 1;
    }
    return !(used[first / 64] >> (first % 64) & ((1ULL << units) - 1));
}

static void mark(struct pv_percpu_header *header, uint32_t first, uint32_t units, int taken)
{
    uint64_t *used = header->used;

    for (uint32_t i = first; i < first + units; i++)
        used[i / 64] = taken ? used[i / 64] | 1ULL << (i % 64) : used[i / 64] & ~(1ULL << (i % 64));
    if (taken && header->low == first)
        header->low = first + units;
    else if (!taken && header->low > first)
        header->low = first;
}

/* The first unit of a run of `units` (a power of two), aligned to its size or to a page; -1: none. */
static int64_t find_units(const uint64_t *used, uint32_t low, uint32_t units)
{
    uint32_t step = units > 4096 / PV_PERCPU_UNIT ? 4096 / PV_PERCPU_UNIT : units;

    for (uint32_t first = low / step * step; first + units <= PV_PERCPU_UNITS; first += step)
        if (run_is_free(used, first, units))
            return first;
    return -1;
}

static struct pv_percpu_slot *find_slot(struct pv_percpu_header *header)
{
    for (uint32_t i = 0; i < PV_PERCPU_SLOTS; i++) {
        struct pv_percpu_slot *slot = &header->slots[(header->cursor + i) % PV_PERCPU_SLOTS];

        if (!slot->limit) {
            header->cursor = (header->cursor + i + 1) % PV_PERCPU_SLOTS;
            if (header->high < slot - header->slots + 1)
                header->high = (uint32_t)(slot - header->slots + 1);
            return slot;
        }
    }
    return NULL;
}

static uint32_t round_up(uint32_t bytes)
{
    uint32_t size = PV_PERCPU_UNIT;

    while (size < bytes)
        size *= 2;
    return size;
}

int pv_percpu_alloc(struct pv_percpu *areas, uint32_t bytes, pv_percpu_handle *out, int *err)
{
    struct pv_percpu_header *header = areas->header;
    uint32_t size = round_up(bytes);
    struct pv_percpu_slot *slot;
    int64_t first;

    if (!bytes || bytes > PV_PERCPU_MAX_BYTES)
        return fail(err, EINVAL);
    lock(areas);
    slot = find_slot(header);
    first = find_units(header->used, header->low, size / PV_PERCPU_UNIT);
    if (slot && first >= 0) {
        mark(header, (uint32_t)first, size / PV_PERCPU_UNIT, 1);
        slot->offset = (uint32_t)first * PV_PERCPU_UNIT;
        slot->bytes = size;
        slot->generation += !slot->generation;
        *out = (uint64_t)slot->generation << 32 | (uint64_t)(slot - header->slots);
        __atomic_store_n(&slot->limit, areas->cpus, __ATOMIC_RELEASE);
    }
    unlock(areas);
    return !slot ? fail(err, ENOSPC) : first < 0 ? fail(err, ENOMEM) : 0;
}

/* The live slot of `handle`, NULL when there is none. What another process may have written there is checked. */
static struct pv_percpu_slot *find_live(const struct pv_percpu *areas, pv_percpu_handle handle)
{
    uint32_t number = (uint32_t)handle;
    struct pv_percpu_slot *slot = &areas->header->slots[number % PV_PERCPU_SLOTS];

    if (number >= PV_PERCPU_SLOTS || slot->generation != handle >> 32 || !handle ||
        __atomic_load_n(&slot->limit, __ATOMIC_ACQUIRE) != areas->cpus || slot->bytes > PV_PERCPU_MAX_BYTES ||
        slot->offset > PV_PERCPU_MAX_BYTES - slot->bytes)
        return NULL;
    return slot;
}

int pv_percpu_get(const struct pv_percpu *areas, pv_percpu_handle handle, struct pv_percpu_ref *out, int *err)
{
    const struct pv_percpu_slot *slot = find_live(areas, handle);

    if (!slot)
        return fail(err, ESTALE);
    *out = (struct pv_percpu_ref){areas->areas + slot->offset, &slot->limit};
    return 0;
}

/* By whole words: who is without sequences may be adding to one in this moment. */
static void zero(char *copy, uint32_t bytes)
{
    for (uint32_t at = 0; at < bytes; at += sizeof(uint64_t))
        __atomic_store_n((uint64_t *)(copy + at), 0, __ATOMIC_RELAXED);
}

int pv_percpu_free(struct pv_percpu *areas, pv_percpu_handle handle, int *err)
{
    struct pv_percpu_slot *slot;
    struct pv_percpu_ref ref;

    lock(areas);
    slot = find_live(areas, handle);
    if (slot) {
        ref = (struct pv_percpu_ref){areas->areas + slot->offset, &slot->limit};
        slot->generation++;
        __atomic_store_n(&slot->limit, 0, __ATOMIC_RELEASE);
        pv_rseq_fence();
        for (int64_t area = pv_percpu_next(areas, ref, 0); area >= 0; area = pv_percpu_next(areas, ref, (uint32_t)area + 1))
            zero(pv_percpu_at(ref, (uint32_t)area), slot->bytes);
        mark(areas->header, slot->offset / PV_PERCPU_UNIT, slot->bytes / PV_PERCPU_UNIT, 0);
    }
    unlock(areas);
    return slot ? 0 : fail(err, ESTALE);
}

/* ---- iteration --------------------------------------------------------------------------------------------------- */

/* The page of the item's first byte is looked for; an item of several pages is touched from its start on by whoever uses it. */
int64_t pv_percpu_next(const struct pv_percpu *areas, struct pv_percpu_ref ref, uint32_t from)
{
    off_t place = (off_t)PV_PERCPU_HEADER_BYTES + ((ref.base - areas->areas) & ~4095L);

    while (from < 2 * areas->cpus) {
        off_t wanted = place + ((off_t)from << PV_PERCPU_SHIFT);
        off_t found = lseek(areas->fd, wanted, SEEK_DATA);

        if (found < 0 && errno == ENXIO)
            return -1; /* only holes from here on */
        if (found < 0)
            return from; /* somebody closed the descriptor: then every area counts, and gets memory by being looked at */
        if (found < wanted + 4096)
            return from;
        from = (uint32_t)((found - place + (1L << PV_PERCPU_SHIFT) - 4096) >> PV_PERCPU_SHIFT);
    }
    return -1;
}

int pv_percpu_sum(const struct pv_percpu *areas, pv_percpu_handle handle, int64_t *out, int *err)
{
    struct pv_percpu_ref ref;
    uint64_t sum = 0;

    if (pv_percpu_get(areas, handle, &ref, err))
        return -1;
    for (int64_t area = pv_percpu_next(areas, ref, 0); area >= 0; area = pv_percpu_next(areas, ref, (uint32_t)area + 1))
        sum += __atomic_load_n((uint64_t *)pv_percpu_at(ref, (uint32_t)area), __ATOMIC_ACQUIRE);
    *out = (int64_t)sum;
    return 0;
}

void pv_percpu_get_stats(const struct pv_percpu *areas, struct pv_percpu_stats *out)
{
    struct stat status = {0};
    uint32_t high = __atomic_load_n(&areas->header->high, __ATOMIC_RELAXED);

    high = high < PV_PERCPU_SLOTS ? high : PV_PERCPU_SLOTS;
    *out = (struct pv_percpu_stats){.cpus = areas->cpus, .origin = (uint64_t)pv_rseq_origin()};
    for (uint32_t i = 0; i < PV_PERCPU_UNITS / 64; i++)
        out->item_bytes += (uint64_t)__builtin_popcountll(areas->header->used[i]) * PV_PERCPU_UNIT;
    for (uint32_t i = 0; i < high; i++)
        out->items += areas->header->slots[i].limit != 0;
    fstat(areas->fd, &status);
    out->memory_bytes = (uint64_t)status.st_blocks * 512;
    out->aborts = __atomic_load_n(&pv_percpu_aborts, __ATOMIC_RELAXED);
}
