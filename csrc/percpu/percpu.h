/* Per-CPU private data areas (PRDA): areas, handles, and the operations on them.
 *
 * Theory of operation
 * -------------------
 * One mapping, a memfd's, holds a header and two rows of areas, each of 1 << PV_PERCPU_SHIFT bytes:
 *
 *      | header: slots, free map | CPU 0 | CPU 1 | ... | CPU n-1 | shared 0 | shared 1 | ... | shared n-1 |
 *                                  sequences only, of threads on that CPU   atomic instructions and locks only
 *
 * An item (a counter, a list's head, a ring) has the same place in every area. Its *handle* is one number, whichever CPU asks; its *ref*
 * (pv_percpu_ref) is the handle made ready for use: an address that, used on any CPU, means that CPU's copy. A thread that took a
 * ref on one CPU and was moved to another operates on the other's copy from then on: no operation ever touches a copy of a CPU that the
 * thread does not run on when it commits (sequences.h).
 *
 * A thread without rseq (rseq.h), or on a CPU that the areas were not made for, works on a shared area instead, by atomic instructions. So
 * threads of both kinds, of several processes, may use one item at the same time: no word is ever written both ways. Sums
 * and iterations see both rows.
 *
 *      a slot:  FREE --pv_percpu_alloc--> LIVE (limit = number of CPUs) --pv_percpu_free--> FREE (limit = 0, generation + 1)
 *
 * Memory: an area costs only the pages that were touched on its CPU; a copy on a CPU where nothing ever ran costs nothing, and reading it
 * costs nothing either (pv_percpu_next finds out without touching it). New items are zero on every CPU.
 *
 * Handles that were freed: every operation on them says so (-1) and changes nothing. pv_percpu_free ends with a fence that restarts all
 * sequences of the process, so an operation that was under way has committed before or fails. A handle stays known as freed for ever;
 * a ref taken before, until 65,535 further items were made. Not so exact: an operation of a thread without rseq, or of another process, that
 * is under way in that very moment may still land in the freed item's memory; never elsewhere.
 *
 * fork(2): the child shares the areas. A thread or process that is killed leaves each item as its last commit made it.
 *
 * Processes that share areas trust each other: attaching and handles are checked, and rings check what they read (ring.h), but an operation
 * believes its slot.
 *
 * Any function may be called by any thread, except where it says otherwise. Errors: 0/-1 and *err.
 *
 * Source: US 10331556.
 */
#ifndef PV_PERCPU_H
#define PV_PERCPU_H

#include "sequences.h"

#define PV_PERCPU_MAX_BYTES (1U << PV_PERCPU_SHIFT) /* of an item, and of all items of an area together */
#define PV_PERCPU_SLOTS 65536

struct pv_percpu;
typedef uint64_t pv_percpu_handle; /* slot and generation; 0 is never one */

/* Makes areas for `cpus` CPUs; 0: as many as this machine can ever have. EINVAL: more than 65536. ENOMEM, EMFILE, ... */
int pv_percpu_create(uint32_t cpus, struct pv_percpu **out, int *err);
/* Maps the areas that another process made. `fd` is copied. EINVAL: not such areas, or damaged ones. */
int pv_percpu_attach(int fd, struct pv_percpu **out, int *err);
/* Ends this process's use. No operation on its refs may be under way or follow. */
void pv_percpu_destroy(struct pv_percpu *areas);
int pv_percpu_fd(const struct pv_percpu *areas); /* for pv_percpu_attach; stays ours */
uint32_t pv_percpu_cpus(const struct pv_percpu *areas);

/* Makes an item of `bytes` (1 to PV_PERCPU_MAX_BYTES; rounded up to a power of two of at least 8, and aligned to it up to a page). ENOMEM:
 * the areas are full. ENOSPC: no slot is left. Takes a lock that all processes share. */
int pv_percpu_alloc(struct pv_percpu *areas, uint32_t bytes, pv_percpu_handle *out, int *err);
/* ESTALE: freed before, or never one. */
int pv_percpu_free(struct pv_percpu *areas, pv_percpu_handle handle, int *err);
int pv_percpu_get(const struct pv_percpu *areas, pv_percpu_handle handle, struct pv_percpu_ref *out, int *err);

/* The first area from `from` on that has memory for this item, -1 when none has. Areas 0 to cpus-1 are the CPUs', cpus to 2*cpus-1 the
 * shared ones. One lseek; touches no memory. */
int64_t pv_percpu_next(const struct pv_percpu *areas, struct pv_percpu_ref ref, uint32_t from);
static inline char *pv_percpu_at(struct pv_percpu_ref ref, uint32_t area)
{
    return ref.base + ((uint64_t)area << PV_PERCPU_SHIFT);
}
/* The sum of an item's first word over all areas, each read once. Every add that happened before the call is in it, none is in it twice;
 * of those that happen meanwhile, any may be. So for counters that only grow it lies between the true sum at the
 * call's start and at its end, and sums taken one after another never fall. ESTALE. */
int pv_percpu_sum(const struct pv_percpu *areas, pv_percpu_handle handle, int64_t *out, int *err);

struct pv_percpu_stats {
    uint64_t cpus, items, item_bytes; /* item_bytes: in each area */
    uint64_t memory_bytes;            /* that the areas really have, of all CPUs and with the header */
    uint64_t aborts;                  /* sequences restarted in this process */
    uint64_t origin;                  /* enum pv_rseq_origin of the calling thread */
};
void pv_percpu_get_stats(const struct pv_percpu *areas, struct pv_percpu_stats *out);

/* ---- operations ---------------------------------------------------------------------------------------------------
 *
 * Each works on the copy of the CPU that the thread runs on, and is atomic for other operations on it. -1: the item was freed, nothing
 * happened. They never block and never fail otherwise. Keep the ref in a local variable: then it stays in registers.
 */

/* The slow way; see slow.c. */
int pv_percpu_slow_add(struct pv_percpu_ref ref, int64_t n);
int pv_percpu_slow_load(struct pv_percpu_ref ref, uint64_t *out);
int pv_percpu_slow_store(struct pv_percpu_ref ref, uint64_t value);
int pv_percpu_slow_cas(struct pv_percpu_ref ref, uint64_t expected, uint64_t desired, uint64_t *seen);
int pv_percpu_slow_push(struct pv_percpu_ref ref, struct pv_percpu_node *node);
int pv_percpu_slow_pop(struct pv_percpu_ref ref, struct pv_percpu_node **out);
int pv_percpu_slow_take(struct pv_percpu_ref ref, struct pv_percpu_node **out);
int pv_percpu_slow_stack_push(struct pv_percpu_ref ref, uint64_t capacity, void *item);
int pv_percpu_slow_stack_pop(struct pv_percpu_ref ref, void **out);

#define PV_UNLIKELY(x) __builtin_expect(!!(x), 0)

/* Adds to a 64-bit counter, modulo 2^64. Relaxed. */
static inline int pv_percpu_add(struct pv_percpu_ref ref, int64_t n)
{
    return PV_UNLIKELY(pv_seq_add(ref, n) != PV_DONE) ? pv_percpu_slow_add(ref, n) : 0;
}

/* The present CPU's value; the thread may run elsewhere by the time that it looks at it. */
static inline int pv_percpu_load(struct pv_percpu_ref ref, uint64_t *out)
{
    return PV_UNLIKELY(pv_seq_load(ref, out) != PV_DONE) ? pv_percpu_slow_load(ref, out) : 0;
}

static inline int pv_percpu_store(struct pv_percpu_ref ref, uint64_t value)
{
    return PV_UNLIKELY(pv_seq_store(ref, value) != PV_DONE) ? pv_percpu_slow_store(ref, value) : 0;
}

/* 1: was `expected`, is `desired` now. 0: was something else, *seen. */
static inline int pv_percpu_cas(struct pv_percpu_ref ref, uint64_t expected, uint64_t desired, uint64_t *seen)
{
    enum pv_sequence result = pv_seq_cas(ref, expected, desired, seen);

    return result == PV_DONE ? 1 : result == PV_DIFFERS ? 0 : pv_percpu_slow_cas(ref, expected, desired, seen);
}

/* A list of nodes whose head is the item's first word; last in, first out. Lists hold addresses: they are for one process. */
static inline int pv_percpu_push(struct pv_percpu_ref ref, struct pv_percpu_node *node)
{
    return PV_UNLIKELY(pv_seq_push(ref, node) != PV_DONE) ? pv_percpu_slow_push(ref, node) : 0;
}

/* 1 with *out, or 0: this CPU's list is empty (another's may not be). */
static inline int pv_percpu_pop(struct pv_percpu_ref ref, struct pv_percpu_node **out)
{
    enum pv_sequence result = pv_seq_pop(ref, out);

    return result == PV_DONE ? 1 : result == PV_EMPTY ? 0 : pv_percpu_slow_pop(ref, out);
}

/* All of this CPU's list at once, linked by `next`. 1 or 0 as pop. */
static inline int pv_percpu_take(struct pv_percpu_ref ref, struct pv_percpu_node **out)
{
    enum pv_sequence result = pv_seq_take(ref, out);

    return result == PV_DONE ? 1 : result == PV_EMPTY ? 0 : pv_percpu_slow_take(ref, out);
}

/* A stack of `capacity` pointers in an item of at least 8 * (capacity + 1) bytes. 1, or 0: full. */
static inline int pv_percpu_stack_push(struct pv_percpu_ref ref, uint64_t capacity, void *item)
{
    enum pv_sequence result = pv_seq_stack_push(ref, capacity, item);

    return result == PV_DONE ? 1 : result == PV_FULL ? 0 : pv_percpu_slow_stack_push(ref, capacity, item);
}

/* 1 with *out, or 0: empty. */
static inline int pv_percpu_stack_pop(struct pv_percpu_ref ref, void **out)
{
    enum pv_sequence result = pv_seq_stack_pop(ref, out);

    return result == PV_DONE ? 1 : result == PV_EMPTY ? 0 : pv_percpu_slow_stack_pop(ref, out);
}

#endif
