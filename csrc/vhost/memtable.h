/* The memory table: which of the guest's memory is mapped here, and where.
 *
 * Invariants: regions never overlap in guest or in user addresses and never wrap around 2^64; each is backed by a file
 * that was at least as long when it was mapped. So an address that pv_mem_guest or pv_mem_user accepts may be
 * dereferenced for the length they give. (A front end that truncates the file later kills its own device process with
 * SIGBUS, and nobody else's.)
 */
#ifndef PV_MEMTABLE_H
#define PV_MEMTABLE_H

#include <stddef.h>
#include <stdint.h>

#define PV_MAX_REGIONS 8

/* As it stands in VHOST_USER_SET_MEM_TABLE. */
struct pv_region_desc {
    uint64_t guest_addr;
    uint64_t size;
    uint64_t user_addr;
    uint64_t mmap_offset;
};

struct mapping;

struct pv_region {
    uint64_t guest;
    uint64_t user;
    uint64_t size;
    uint8_t *host; /* where the region's first byte is in this process */
    struct mapping *mapping; /* that holds it, and begins at a page (or huge page) boundary; other tables may share it */
};

/* Several tables of a process may show the same memory: it is mapped once, and stays while one of them shows it. Tables
 * are their owners', mappings are under a lock of their own.
 *
 * Called after a mapping was made, before its first touch (mapped 1; not 0: a positive errno, and the table is
 * refused), and before it is unmapped (mapped 0). Guest RAM that is filled lazily needs it: see pv_fault_map_hook in
 * csrc/memory. */
struct pv_map_hook {
    int (*call)(void *context, int mapped, void *start, uint64_t length, uint64_t offset); /* NULL: none */
    void *context;
};

struct pv_memtable {
    struct pv_map_hook hook;
    unsigned count;
    struct pv_region regions[PV_MAX_REGIONS];
};

/* Replaces the table. fds stay the caller's. On failure the old table stays as it was.
 * Errors: EINVAL (overlap, wrap-around, zero size, misalignment, file too short, too many), and what mmap and the
 * hook may say. */
int pv_memtable_set(struct pv_memtable *table, const struct pv_region_desc *descs, const int *fds, unsigned count,
    int *err);

/* Unmaps everything; the hook stays. */
void pv_memtable_clear(struct pv_memtable *table);

/* Guest physical address -> pointer, or NULL. *len is shortened to what is contiguous in one region; never to 0. */
void *pv_mem_guest(const struct pv_memtable *table, uint64_t addr, uint64_t *len);

/* Front end's user address -> pointer to len bytes, or NULL when they are not all in one region. */
void *pv_mem_user(const struct pv_memtable *table, uint64_t addr, uint64_t len);

#endif
