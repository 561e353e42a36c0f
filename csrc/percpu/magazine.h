/* Caches of objects of one size: a magazine on each CPU, which fills from and drains to a pool that all CPUs share.
 *
 * Theory of operation
 * -------------------
 *      alloc:  this CPU's magazine --empty--> half a magazine out of the pool --empty--> a slab of new objects
 *      free:   this CPU's magazine --full-->  half of it to the pool
 *
 * A magazine is a stack of pointers (stack_push, stack_pop: two sequences, no lock). The pool is a list under a mutex; it is asked for half a magazine
 * at once, so that a thread which allocates on one CPU and one which frees on another meet there once in `capacity` / 2 objects.
 *
 * An object may be allocated on one CPU and freed on any other. Objects are not zeroed: they come as they were freed; new ones are zero.
 * Memory goes back to the system with pv_magazine_destroy only: as much as was in use at once, and what the magazines hold.
 *
 * Any thread may call alloc and free, of one process: areas are shared with the children of fork(2), objects are not, so a child must make a cache
 * of its own. Source of the term: Bonwick, "Magazines and Vmem", 2001.
 */
#ifndef PV_MAGAZINE_H
#define PV_MAGAZINE_H

#include <pthread.h>
#include <stddef.h>

#include "percpu.h"

#define PV_MAGAZINE_ALIGN 64

struct pv_magazine {
    struct pv_percpu_ref stack;
    uint64_t capacity;
    size_t bytes; /* of an object, rounded up to a multiple of PV_MAGAZINE_ALIGN */
    struct pv_percpu *areas;
    pv_percpu_handle handle;
    pthread_mutex_t lock; /* of all below */
    struct pv_percpu_node *pool, *slabs;
    size_t most, total; /* objects that may be; that there are */
    uint64_t fills, drains;
};

/* `capacity`: objects that one CPU's magazine can hold, at least 2. `most`: objects there may be in all; 0: as memory allows.
 * Errors of pv_percpu_alloc; EINVAL. */
int pv_magazine_init(struct pv_magazine *m, struct pv_percpu *areas, size_t bytes, uint32_t capacity, size_t most, int *err);
/* All objects go with it, also those in use. */
void pv_magazine_destroy(struct pv_magazine *m);

void *pv_magazine_fill(struct pv_magazine *m);
void pv_magazine_drain(struct pv_magazine *m, void *object);

/* NULL: no memory, or `most` are in use (or wait in the magazines of other CPUs). */
static inline void *pv_magazine_alloc(struct pv_magazine *m)
{
    void *object;

    return __builtin_expect(pv_seq_stack_pop(m->stack, &object) == PV_DONE, 1) ? object : pv_magazine_fill(m);
}

/* `object` came from pv_magazine_alloc of the same `m`, and was not freed since. */
static inline void pv_magazine_free(struct pv_magazine *m, void *object)
{
    if (__builtin_expect(pv_seq_stack_push(m->stack, m->capacity, object) != PV_DONE, 0))
        pv_magazine_drain(m, object);
}

#endif
