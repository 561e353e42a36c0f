/* A VM's address space: a page table of fixed height that leads straight to VADs.
 *
 * Theory of operation
 * -------------------
 * Addresses have 48 bits: 4 levels of 9 bits, then 12 bits in a page of 4 KiB. Inner nodes hold pointers, leaves hold 32-bit
 * indices of page-frame entries (0: not mapped), so that a leaf of 512 pages takes 2 KiB: 0.05 % of what it maps.
 *
 *      address  47......39 38......30 29......21 20......12 11.......0
 *               root       level 2    level 1    leaf       in the page
 *
 * A lookup is a walk: three pointers, a leaf entry, the page-frame entry, the VAD. Six loads whatever is mapped; it takes no
 * lock, writes nothing shared, never searches and never waits for a mapper.
 *
 * Concurrency: RCU-like. Mappers serialise on a mutex. They publish a node with a release store after it was filled, and
 * never free one before the space is destroyed (an unmapped leaf stays, empty, for the next mapping there), so a reader can
 * hold any node for ever. What a reader may not hold for ever is a VAD: it marks the section in which it uses one
 * (pv_space_read_lock/unlock: one plain store each to a slot of its own), and pv_space_unmap returns only when every
 * section that began before it has ended. The mapper pays for that (membarrier(2), then it looks at the slots), the reader
 * does not: sequence counts would make readers retry under a storm of mappings, and a lookup retried is a fault delayed.
 * Source of the scheme: liburcu's memb flavour; membarrier(2).
 *
 * A lookup that races with a mapping of the same page sees it before or after, never a mixture: the page's state is one
 * 32-bit word.
 *
 * Nodes come from aligned chunks of 2 MiB that become huge pages when they are half full (MADV_COLLAPSE), so that a walk over a
 * large table does not pay the TLB for every level, and a small table costs no more than it holds. The walk itself is in walk.h.
 */
#ifndef PV_SPACE_H
#define PV_SPACE_H

#include "pfdb.h"

#define PV_SPACE_BITS 48
#define PV_SPACE_READERS 64

struct pv_space;
struct pv_reader;

/* What a lookup finds. `vad` stays valid until pv_space_read_unlock. */
struct pv_translation {
    const struct pv_vad *vad;
    uint32_t pfe;  /* index of the page-frame entry */
    uint32_t page; /* page of the VAD: its data lies at pv_vad_offset(vad) + page * PV_PAGE_SIZE */
};

/* A piece of address space whose pages are consecutive pages of one VAD. */
struct pv_extent {
    uint64_t address, pages;
    uint32_t vad, page;
};

struct pv_space_usage {
    uint64_t nodes, node_bytes, mapped_pages;
};

/* An empty space over `db`, which must outlive it. 0, or -1 with *err = ENOMEM. */
int pv_space_create(const struct pv_pfdb *db, struct pv_space **out, int *err);

/* Frees it. No reader may be in a section, no mapper at work. NULL is allowed. */
void pv_space_destroy(struct pv_space *space);

/* Maps pages [page, page + pages) of `vad` at `address`. All or nothing.
 * 0, or -1 with *err = EINVAL (address not page-aligned, no pages, the range wraps or leaves the 48-bit space, or the VAD is
 * shorter), ENOENT (no such VAD), EEXIST (some page there is mapped already), ENOMEM. May block on other mappers. */
int pv_space_map(struct pv_space *space, uint64_t address, uint64_t pages, uint32_t vad, uint32_t page, int *err);

/* Unmaps every page in the range, mapped or not; mappings that stick out are split and keep their other parts. When it
 * returns, no reader uses the range's VADs any more. 0 with *unmapped = pages that were mapped, or -1 with *err = EINVAL.
 * Waits for readers' sections; must not be called inside one (deadlock). */
int pv_space_unmap(struct pv_space *space, uint64_t address, uint64_t pages, uint64_t *unmapped, int *err);

/* The first extent at or after `address`, coalesced from the page table: there is no second structure that could differ.
 * 1 with *out, 0 when there is none, -1 with *err = EINVAL. Blocks on mappers: for people and tests, not for faults. */
int pv_space_next(struct pv_space *space, uint64_t address, struct pv_extent *out, int *err);

void pv_space_usage(struct pv_space *space, struct pv_space_usage *out);

/* A thread's slot. 0, or -1 with *err = EAGAIN (PV_SPACE_READERS in use). Given back with pv_space_remove_reader. */
int pv_space_add_reader(struct pv_space *space, struct pv_reader **out, int *err);
void pv_space_remove_reader(struct pv_space *space, struct pv_reader *reader);

/* A section in which VADs may be held. Short: an unmapping mapper waits for it. Does not nest. */
void pv_space_read_lock(struct pv_space *space, struct pv_reader *reader);
void pv_space_read_unlock(struct pv_reader *reader);

/* The walk. 1 with *out, or 0 when nothing is mapped at `address`. Inside a section only; any number of threads. */
int pv_space_lookup(const struct pv_space *space, uint64_t address, struct pv_translation *out);

#endif
