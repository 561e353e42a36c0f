/* The page table's side of page_table.cc; C, and compiled into one unit with the table so that the call is the only cost. */
#include <sys/mman.h>

#include "../../csrc/memory/pfdb.c"
#define fail space_fail
#include "../../csrc/memory/space.c"

int bench_setup(unsigned regions, unsigned pages_each, unsigned long stride);
unsigned long bench_lookup(unsigned long address);
void bench_lock(void);
void bench_unlock(void);

static struct pv_space *space;
static struct pv_reader *reader;

int bench_setup(unsigned regions, unsigned pages_each, unsigned long stride)
{
    struct pv_pfdb *db;
    int err = 0, fd = memfd_create("pfdb", 0);

    if (pv_pfdb_create(fd, regions + 1, regions * pages_each + 1, &db, &err) || pv_space_create(db, &space, &err) ||
        pv_space_add_reader(space, &reader, &err))
        return -1;
    for (unsigned i = 0; i < regions; i++) {
        uint32_t vad;

        if (pv_pfdb_add(db, PV_SOURCE_FILE, 0, (uint64_t)i * stride, pages_each, 0, &vad, &err) ||
            pv_space_map(space, (uint64_t)i * stride, pages_each, vad, 0, &err))
            return -1;
    }
    return 0;
}

unsigned long bench_lookup(unsigned long address)
{
    struct pv_translation t;

    if (!pv_space_lookup(space, address, &t))
        return 0;
    return t.vad->offset + ((uint64_t)t.page << PV_PAGE_SHIFT);
}

void bench_lock(void) { pv_space_read_lock(space, reader); }
void bench_unlock(void) { pv_space_read_unlock(reader); }
