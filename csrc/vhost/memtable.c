#include "memtable.h"

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "common/list.h"

/* ---- mappings ---------------------------------------------------------------------------------------------------- */

/* Devices of one VM are told of the same memory each: it is mapped once in a process. */
struct mapping {
    struct pv_link link;
    dev_t device;
    ino_t inode;
    uint64_t start;
    size_t len;
    struct pv_map_hook hook;
    void *map;
    unsigned users;
};

static pthread_mutex_t mappings_lock = PTHREAD_MUTEX_INITIALIZER;
static struct pv_link mappings = {&mappings, &mappings};

static struct mapping *find_mapping(const struct mapping *like)
{
    for (struct pv_link *link = mappings.next; link != &mappings; link = link->next) {
        struct mapping *m = pv_member(link, struct mapping, link);

        if (m->device == like->device && m->inode == like->inode && m->start == like->start && m->len == like->len &&
            m->hook.call == like->hook.call && m->hook.context == like->hook.context)
            return m;
    }
    return NULL;
}

/* Under the lock. NULL: *err. */
static struct mapping *make_mapping(const struct mapping *like, int fd, int *err)
{
    struct mapping *m = malloc(sizeof(*m));

    if (!m) {
        *err = ENOMEM;
        return NULL;
    }
    *m = *like;
    m->map = mmap(NULL, m->len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, (off_t)m->start);
    *err = m->map == MAP_FAILED ? errno : 0;
    if (!*err && m->hook.call && (*err = m->hook.call(m->hook.context, 1, m->map, m->len, m->start)) != 0)
        munmap(m->map, m->len);
    if (*err) {
        free(m);
        return NULL;
    }
    pv_list_append(&mappings, &m->link);
    return m;
}

static struct mapping *take_mapping(const struct mapping *like, int fd, int *err)
{
    struct mapping *m;

    pthread_mutex_lock(&mappings_lock);
    m = find_mapping(like);
    if (!m)
        m = make_mapping(like, fd, err);
    if (m)
        m->users++;
    pthread_mutex_unlock(&mappings_lock);
    return m;
}

static void give_mapping(struct mapping *m)
{
    pthread_mutex_lock(&mappings_lock);
    if (--m->users == 0) {
        pv_list_remove(&m->link);
        if (m->hook.call)
            m->hook.call(m->hook.context, 0, m->map, m->len, 0);
        munmap(m->map, m->len);
        free(m);
    }
    pthread_mutex_unlock(&mappings_lock);
}

/* ---- the table --------------------------------------------------------------------------------------------------- */

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
    struct mapping *mapping;

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
    mapping = take_mapping(&(struct mapping){.device = st.st_dev, .inode = st.st_ino, .start = start, .len = end - start,
                               .hook = *hook}, fd, err);
    if (!mapping)
        return -1;
    *region = (struct pv_region){
        .guest = desc->guest_addr,
        .user = desc->user_addr,
        .size = desc->size,
        .host = (uint8_t *)mapping->map + (desc->mmap_offset - start),
        .mapping = mapping,
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
    for (unsigned i = 0; i < table->count; i++)
        give_mapping(table->regions[i].mapping);
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
