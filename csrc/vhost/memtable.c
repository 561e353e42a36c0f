#include "memtable.h"

#include <errno.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

static bool overlap(uint64_t a, uint64_t a_size, uint64_t b, uint64_t b_size)
{
    return a < b + b_size && b < a + a_size;
}

static bool desc_valid(const struct pv_region_desc *d)
{
    return d->size > 0 && d->guest_addr + d->size > d->guest_addr && d->user_addr + d->size > d->user_addr &&
           d->mmap_offset + d->size > d->mmap_offset;
}

static bool descs_valid(const struct pv_region_desc *descs, unsigned count)
{
    if (count > PV_MAX_REGIONS)
        return false;
    for (unsigned i = 0; i < count; i++) {
        if (!desc_valid(&descs[i]))
            return false;
        for (unsigned j = 0; j < i; j++)
            if (overlap(descs[i].guest_addr, descs[i].size, descs[j].guest_addr, descs[j].size) ||
                overlap(descs[i].user_addr, descs[i].size, descs[j].user_addr, descs[j].size))
                return false;
    }
    return true;
}

/* The file's block size is the huge page size on hugetlbfs, where offset and length of a mapping must be multiples of
 * it. */
static uint64_t map_granule(const struct stat *st)
{
    uint64_t granule = st->st_blksize > 4096 ? (uint64_t)st->st_blksize : 4096;

    return (granule & (granule - 1)) == 0 && granule <= (1U << 30) ? granule : 4096;
}

static int map_region(const struct pv_map_hook *hook, struct pv_region *region, const struct pv_region_desc *desc, int fd,
    int *err)
{
    struct stat st;
    uint64_t granule, start, end;
    void *map;

    if (fstat(fd, &st) < 0) {
        *err = errno;
        return -1;
    }
    if (!S_ISREG(st.st_mode) || desc->mmap_offset + desc->size > (uint64_t)st.st_size) {
        *err = EINVAL;
        return -1;
    }
    granule = map_granule(&st);
    start = desc->mmap_offset & ~(granule - 1);
    end = (desc->mmap_offset + desc->size + granule - 1) & ~(granule - 1);
    map = mmap(NULL, end - start, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, (off_t)start);
    if (map == MAP_FAILED) {
        *err = errno;
        return -1;
    }
    if (hook->call && (*err = hook->call(hook->context, 1, map, end - start, start)) != 0) {
        munmap(map, end - start);
        return -1;
    }
    *region = (struct pv_region){
        .guest = desc->guest_addr,
        .user = desc->user_addr,
        .size = desc->size,
        .host = (uint8_t *)map + (desc->mmap_offset - start),
        .map = map,
        .map_len = end - start,
    };
    return 0;
}

int pv_memtable_set(struct pv_memtable *table, const struct pv_region_desc *descs, const int *fds, unsigned count,
    int *err)
{
    struct pv_memtable fresh = {.hook = table->hook};

    if (!descs_valid(descs, count)) {
        *err = EINVAL;
        return -1;
    }
    for (unsigned i = 0; i < count; i++) {
        if (map_region(&fresh.hook, &fresh.regions[i], &descs[i], fds[i], err) < 0) {
            pv_memtable_clear(&fresh);
            return -1;
        }
        fresh.count++;
    }
    pv_memtable_clear(table);
    *table = fresh;
    return 0;
}

void pv_memtable_clear(struct pv_memtable *table)
{
    for (unsigned i = 0; i < table->count; i++) {
        const struct pv_region *r = &table->regions[i];

        if (table->hook.call)
            table->hook.call(table->hook.context, 0, r->map, r->map_len, 0);
        munmap(r->map, r->map_len);
    }
    memset(table->regions, 0, sizeof(table->regions));
    table->count = 0;
}

void *pv_mem_guest(const struct pv_memtable *table, uint64_t addr, uint64_t *len)
{
    for (unsigned i = 0; i < table->count; i++) {
        const struct pv_region *r = &table->regions[i];
        uint64_t offset = addr - r->guest;

        if (addr < r->guest || offset >= r->size)
            continue;
        if (*len > r->size - offset)
            *len = r->size - offset;
        return r->host + offset;
    }
    return NULL;
}

void *pv_mem_user(const struct pv_memtable *table, uint64_t addr, uint64_t len)
{
    for (unsigned i = 0; i < table->count; i++) {
        const struct pv_region *r = &table->regions[i];
        uint64_t offset = addr - r->user;

        if (addr >= r->user && offset < r->size && len <= r->size - offset)
            return r->host + offset;
    }
    return NULL;
}
