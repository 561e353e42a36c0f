/* The page table's side of page_table.cc; C, and compiled into one unit with the table. */
#include "page_table_ours.h"

#include <stdio.h>
#include <sys/mman.h>

#include "../../csrc/memory/pfdb.c"
#define fail space_fail
#include "../../csrc/memory/space.c"

static struct pv_pfdb *db;
static struct pv_space *space;
static struct pv_reader *reader;

int bench_setup(unsigned regions, unsigned pages_each, unsigned long stride)
{
    int err = 0, fd = memfd_create("pfdb", 0);

    if (pv_pfdb_create(fd, regions + 1, regions * pages_each + 1, &db, &err) || pv_space_create(db, &space, &err) ||
        pv_space_add_reader(space, &reader, &err))
        return -1;
    for (unsigned i = 0; i < regions; i++) {
        uint32_t vad;

        if (pv_pfdb_add(db, PV_SOURCE_FILE, 0, (uint64_t)i * stride, pages_each, &vad, &err) ||
            pv_space_map(space, (uint64_t)i * stride, pages_each, vad, 0, &err))
            return -1;
    }
    return 0;
}

static inline unsigned long look_up(const struct pv_walk *walk, unsigned long address)
{
    struct pv_translation t;

    if (!pv_walk_lookup(walk, address, &t))
        return 0;
    return pv_vad_offset(t.vad) + ((uint64_t)t.page << PV_PAGE_SHIFT);
}

unsigned long bench_lookup(unsigned long address) { return look_up(pv_space_walk(space), address); }

unsigned long bench_sum(const unsigned long *addresses, unsigned long count)
{
    const struct pv_walk walk = *pv_space_walk(space);
    unsigned long sum = 0;

    for (unsigned long i = 0; i < count; i++)
        sum += look_up(&walk, addresses[i]);
    return sum;
}

unsigned long bench_chase(const unsigned long *addresses, unsigned long count, unsigned long mask)
{
    const struct pv_walk walk = *pv_space_walk(space);
    unsigned long last = 0;

    for (unsigned long i = 0; i < count; i++)
        last = look_up(&walk, addresses[i] ^ (last & mask));
    return last;
}

void bench_lock(void) { pv_space_read_lock(space, reader); }
void bench_unlock(void) { pv_space_read_unlock(reader); }

void bench_print_memory(unsigned regions)
{
    struct pv_space_usage table;
    struct pv_pfdb_usage entries;
    double mapped;

    pv_space_usage(space, &table);
    pv_pfdb_usage(db, &entries);
    mapped = (double)table.mapped_pages * PV_PAGE_SIZE;
    printf("%u memory table_and_entries %.6f\n", regions, (double)(table.node_bytes + entries.pfe_bytes) / mapped);
    printf("%u memory vads %.6f\n", regions, (double)entries.vad_bytes / mapped);
}
