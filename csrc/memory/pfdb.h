/* The page-frame database: one per host, in shared memory.
 *
 * Theory of operation
 * -------------------
 * A *VAD* (virtual address descriptor) says where the data of a run of pages comes from: a source, an offset in it, a
 * number of pages. Each page of a VAD has a *page-frame entry* (PFE) in the database, and a VAD's entries are
 * consecutive: entry i of VAD v describes page i - v->first_pfe. An entry leads directly to its VAD (its index); that is
 * what makes a fault take constant time whatever the number of VADs. Every VM whose page has the same source uses the
 * same entry: clones of one template share all of them.
 *
 *      page table of a VM          database (shared, one per host)
 *      leaf[page] = entry  ----->  pfe[entry] = {state, frame, vad} ----->  vad[index] = {source, offset, pages, ...}
 *
 * One process writes the database (the host daemon: it knows which templates and VMs exist); the others map the file
 * read-only, so that a VM's device process that was taken over cannot change what another VM reads.
 *
 * Life of a VAD: FREE -> (pv_pfdb_add) LIVE -> (pv_pfdb_remove) FREE. The VAD table is the only truth: which entries are in
 * use follows from it, and a writer that opens the file of a dead predecessor derives its free runs from the table anew
 * (pv_pfdb_open), so that a writer killed at any instruction leaves nothing broken. For that, an entry run is filled
 * before the VAD is published (`pages` stored last, with release), and a VAD is withdrawn (`pages` = 0) before its
 * entries are reused.
 *
 * Invariants: live VADs' entry runs are disjoint; entry 0 is never used (a leaf of 0 means "not mapped"); VAD 0 is never
 * used; for each live VAD v and each i < v->pages, pfe[v->first_pfe + i] has vad index v.
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

/* 32 bytes: two to a cache line, so that a walk's last step misses once at most. */
struct pv_vad {
    uint64_t offset;          /* bytes into the source */
    uint32_t first_pfe;       /* index of the entry of its first page */
    _Atomic(uint32_t) pages;  /* 0: free */
    uint32_t source;          /* index of the source, given by whoever owns the sources */
    uint32_t kind;            /* enum pv_source_kind */
    uint64_t tag;             /* the owner's; the database does not read it */
};

/* vad in the low half, state in bits 32-33, frame in bits 34-63: one atomic word, so that state and frame change together. */
typedef _Atomic(uint64_t) pv_pfe;

static inline uint32_t pv_pfe_vad(uint64_t pfe) { return (uint32_t)pfe; }
static inline enum pv_pfe_state pv_pfe_state(uint64_t pfe) { return (enum pv_pfe_state)(pfe >> 32 & 3); }
static inline uint32_t pv_pfe_frame(uint64_t pfe) { return (uint32_t)(pfe >> 34); }
static inline uint64_t pv_pfe_make(uint32_t vad, enum pv_pfe_state state, uint32_t frame)
{
    return vad | (uint64_t)state << 32 | (uint64_t)frame << 34;
}

struct pv_pfdb {
    struct pv_vad *vads; /* [max_vads] */
    pv_pfe *pfes;        /* [max_pfes] */
    uint32_t max_vads;
    uint32_t max_pfes;
    /* the rest is the writer's */
    struct pv_pfdb_writer *writer; /* NULL in a reader */
    void *map;
    size_t map_size;
};

/* Makes an empty database in `fd` (a memfd or a file on tmpfs), sized for the given numbers; memory is used as entries are.
 * 0, or -1 with *err = EINVAL (a number is 0 or more than 2^30), ENOMEM, or what ftruncate and mmap say. Not thread-safe. */
int pv_pfdb_create(int fd, uint32_t max_vads, uint32_t max_pfes, struct pv_pfdb **out, int *err);

/* Maps an existing database, for writing (`writer` != 0; at most one at a time, the caller sees to it) or for reading.
 * 0, or -1 with *err = EBADMSG (not a database, of another version, truncated, or with an inconsistent VAD table), ENOMEM, ... */
int pv_pfdb_open(int fd, int writer, struct pv_pfdb **out, int *err);

/* Unmaps; the file keeps what it holds. NULL is allowed. */
void pv_pfdb_close(struct pv_pfdb *db);

/* Adds a VAD of `pages` pages and its entries, all ABSENT. Writer only; callers serialise.
 * 0 with *vad = its index, or -1 with *err = EINVAL (no pages, unknown kind, offset not page-aligned or range beyond 2^63) or
 * ENOSPC (no VAD or no run of entries free). O(pages), plus the number of free runs. */
int pv_pfdb_add(struct pv_pfdb *db, enum pv_source_kind kind, uint32_t source, uint64_t offset, uint32_t pages,
                uint64_t tag, uint32_t *vad, int *err);

/* Withdraws a VAD. The caller guarantees that no address space maps it any more (pv_space_unmap returned everywhere).
 * 0, or -1 with *err = ENOENT. Writer only. */
int pv_pfdb_remove(struct pv_pfdb *db, uint32_t vad, int *err);

/* Bytes of memory in use: VADs and entries apart. */
struct pv_pfdb_usage {
    uint64_t vads, vad_bytes, pfes, pfe_bytes, free_runs;
};
void pv_pfdb_usage(const struct pv_pfdb *db, struct pv_pfdb_usage *out);

#endif
