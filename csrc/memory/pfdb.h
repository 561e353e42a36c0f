/* The page-frame database: one per host, in shared memory.
 *
 * Theory of operation
 * -------------------
 * A *VAD* (virtual address descriptor) says where the data of a run of pages comes from: a source, an offset in it, a
 * number of pages. Each page of a VAD has a *page-frame entry* (PFE) in the database. An entry leads directly to its VAD;
 * that is what makes a fault take constant time whatever the number of VADs. Every VM whose page has the same source uses
 * the same entry: clones of one template share all of them.
 *
 * VADs and entries lie in one array of 8-byte slots: a VAD in two of them, the entries of its pages right behind it. A VAD of
 * few pages so shares a cache line with its entries, and a walk that ends there pays for one miss instead of two: with a
 * million VADs that is most of what a walk costs.
 *
 *      page table of a VM          database (shared, one per host): slots
 *      leaf[page] = slot  ------>  {VAD: source, offset, pages} {pfe: state, frame, vad} {pfe} ...
 *                                   ^---------------------------------------------/
 *      directory[number of a VAD] = its slot: for mappers and for enumeration; no walk reads it
 *
 * One process writes the database (the host daemon: it knows which templates and VMs exist); the others map the file
 * read-only, so that a VM's device process that was taken over cannot change what another VM reads.
 *
 * Life of a VAD: FREE -> (pv_pfdb_add) LIVE -> (pv_pfdb_remove) FREE. The directory is the only truth: which slots are in
 * use follows from it, and a writer that opens the file of a dead predecessor derives its free runs from it anew
 * (pv_pfdb_open), so that a writer killed at any instruction leaves nothing broken. For that, a VAD and its entries are
 * filled before the directory names them (a release store), and the directory forgets them before their slots are reused.
 *
 * Invariants: live VADs' runs of slots are disjoint; slot 0 is never used (a leaf of 0 means "not mapped"); VAD 0 is never
 * used; for each live VAD in slot s and each i < pages, slot s + 2 + i is an entry that names s.
 *
 * Huge pages: random look-ups over a large database pay more for the TLB than for the caches. The mapping is aligned to
 * 2 MiB, and the writer collapses each 2 MiB of the file into a huge page once all of it is in use (MADV_COLLAPSE, which works
 * where shmem_enabled is "never"), so that they cost no memory. Readers get them by mapping the same file. Where the kernel
 * will not, everything works as before, slower.
 *
 * Source of the idea and its terms: US 11341058.
 */
#ifndef PV_PFDB_H
#define PV_PFDB_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#define PV_PAGE_SHIFT 12
#define PV_PAGE_SIZE (1u << PV_PAGE_SHIFT)

/* Where a VAD's data comes from. */
enum pv_source_kind {
    PV_SOURCE_ZERO = 1, /* pages of zeroes; no source */
    PV_SOURCE_FILE,     /* a file at a byte offset, which is a multiple of the page size */
    PV_SOURCE_ZSTD,     /* compressed frames (an index maps pages to them); loaded once for all VMs */
    PV_SOURCE_REMOTE,   /* whatever a source behind the loader's interface gives */
};

/* State of an entry's frame in the database. Only dear sources (ZSTD, REMOTE) ever leave ABSENT: a file's page is in the
 * kernel's page cache already, which is shared without our help. */
enum pv_pfe_state {
    PV_PFE_ABSENT,
    PV_PFE_LOADING,
    PV_PFE_PRESENT, /* `frame` numbers a page of the frame store */
    PV_PFE_REMOVED, /* the source withdrew the page: a fault on it is an error with a reason, never wrong data */
};

/* 16 bytes: two slots, right before the entries of its pages, so that a walk over small VADs misses the caches once for both. */
struct pv_vad {
    uint64_t where;          /* offset into the source in pages (44 bits), source (16), kind (4): see pv_vad_offset and the rest */
    _Atomic(uint32_t) pages; /* 0: free */
    uint32_t number;         /* its place in the directory */
};

#define PV_VAD_SLOTS 2
#define PV_VAD_OFFSET_BITS 44
#define PV_VAD_SOURCES 65536

/* Bytes into the source, a multiple of the page size. */
static inline uint64_t pv_vad_offset(const struct pv_vad *vad)
{
    return (vad->where & ((UINT64_C(1) << PV_VAD_OFFSET_BITS) - 1)) << PV_PAGE_SHIFT;
}
/* The number of the source, given by whoever owns the sources. */
static inline uint32_t pv_vad_source(const struct pv_vad *vad) { return vad->where >> PV_VAD_OFFSET_BITS & (PV_VAD_SOURCES - 1); }
static inline enum pv_source_kind pv_vad_kind(const struct pv_vad *vad) { return (enum pv_source_kind)(vad->where >> 60); }

/* The slot of the VAD in the low half, state in bits 32-33, frame in bits 34-63: one atomic word, so that they change together. */
typedef _Atomic(uint64_t) pv_pfe;

static inline uint32_t pv_pfe_vad(uint64_t pfe) { return (uint32_t)pfe; }
static inline enum pv_pfe_state pv_pfe_state(uint64_t pfe) { return (enum pv_pfe_state)(pfe >> 32 & 3); }
static inline uint32_t pv_pfe_frame(uint64_t pfe) { return (uint32_t)(pfe >> 34); }
static inline uint64_t pv_pfe_make(uint32_t vad, enum pv_pfe_state state, uint32_t frame)
{
    return vad | (uint64_t)state << 32 | (uint64_t)frame << 34;
}

struct pv_pfdb {
    _Atomic(uint32_t) *directory; /* [max_vads]: the slot of the VAD of that number; 0: there is none */
    pv_pfe *slots;                /* [slot_count]: VADs, each followed by its entries */
    uint32_t max_vads;
    uint32_t max_pfes;
    uint32_t slot_count;
    /* the rest is the writer's */
    struct pv_pfdb_writer *writer; /* NULL in a reader */
    void *map;                     /* aligned to a huge page */
    size_t map_size;
};

static inline struct pv_vad *pv_pfdb_vad_at(const struct pv_pfdb *db, uint32_t slot)
{
    return (struct pv_vad *)((char *)db->slots + (size_t)slot * sizeof(pv_pfe));
}

/* The VAD of that number, or NULL. */
static inline struct pv_vad *pv_pfdb_vad(const struct pv_pfdb *db, uint32_t number)
{
    uint32_t slot = number < db->max_vads ? atomic_load_explicit(&db->directory[number], memory_order_acquire) : 0;

    return slot ? pv_pfdb_vad_at(db, slot) : NULL;
}

/* The slot of the entry of a VAD's first page. */
static inline uint32_t pv_pfdb_first_pfe(const struct pv_pfdb *db, const struct pv_vad *vad)
{
    return (uint32_t)((const pv_pfe *)(const void *)vad - db->slots) + PV_VAD_SLOTS;
}

/* Makes an empty database in `fd` (a memfd or a file on tmpfs), sized for the given numbers; memory is used as entries are.
 * 0, or -1 with *err = EINVAL (a number is 0 or more than 2^30), ENOMEM, or what ftruncate and mmap say. Not thread-safe. */
int pv_pfdb_create(int fd, uint32_t max_vads, uint32_t max_pfes, struct pv_pfdb **out, int *err);

/* Maps an existing database, for writing (`writer` != 0; at most one at a time, the caller sees to it) or for reading.
 * 0, or -1 with *err = EBADMSG (not a database, of another version, truncated, or with an inconsistent VAD table), ENOMEM, ... */
int pv_pfdb_open(int fd, int writer, struct pv_pfdb **out, int *err);

/* Unmaps; the file keeps what it holds. NULL is allowed. */
void pv_pfdb_close(struct pv_pfdb *db);

/* Adds a VAD of `pages` pages and its entries, all ABSENT. Writer only; callers serialise.
 * 0 with *number = its number, or -1 with *err = EINVAL (no pages, unknown kind, source of 16 bits or more, offset not page-aligned,
 * range beyond 2^56) or ENOSPC (no VAD or no run of entries free). O(pages), plus the number of free runs. */
int pv_pfdb_add(struct pv_pfdb *db, enum pv_source_kind kind, uint32_t source, uint64_t offset, uint32_t pages,
                uint32_t *number, int *err);

/* Withdraws a VAD. The caller guarantees that no address space maps it any more (pv_space_unmap returned everywhere).
 * 0, or -1 with *err = ENOENT. Writer only. */
int pv_pfdb_remove(struct pv_pfdb *db, uint32_t number, int *err);

/* Bytes of memory in use: VADs and entries apart. */
struct pv_pfdb_usage {
    uint64_t vads, vad_bytes, pfes, pfe_bytes, free_runs;
};
void pv_pfdb_usage(const struct pv_pfdb *db, struct pv_pfdb_usage *out);

#endif
