/* What the rooms of the per-CPU areas share: the layout of the mapping, and how threads without sequences keep out of each other's way. */
#ifndef PV_PERCPU_ROOMS_H
#define PV_PERCPU_ROOMS_H

#include <pthread.h>
#include <sys/types.h>

#include "percpu.h"

#define PV_PERCPU_MAGIC 0x6470722d75706370ULL
#define PV_PERCPU_VERSION 2
#define PV_PERCPU_HEADER_BYTES (4UL << 20) /* and the mapping's alignment: a slot's address gives the header's */
#define PV_PERCPU_UNIT 8
#define PV_PERCPU_UNITS (PV_PERCPU_MAX_BYTES / PV_PERCPU_UNIT)
#define PV_PERCPU_LOCKS 256

struct pv_percpu_slot {
    uint32_t limit;      /* number of CPUs while LIVE, 0 while FREE; sequences compare with it */
    uint32_t generation; /* of the present or next handle */
    uint32_t offset, bytes;
    uint32_t reserved[4];
};

struct pv_percpu_header {
    uint64_t magic;
    uint32_t version, cpus;
    pthread_mutex_t lock;                /* of the slots and the map of units; robust */
    uint32_t cursor;                     /* where the search for a FREE slot goes on: so the one freed last is used last */
    uint32_t low;                        /* every unit below is taken */
    uint32_t high;                       /* no slot from here on was ever used: nobody looks at its memory, so it has none */
    uint32_t locks[PV_PERCPU_LOCKS];     /* of the shared areas, for what needs more than one word */
    uint64_t used[PV_PERCPU_UNITS / 64]; /* map of units */
    struct pv_percpu_slot slots[PV_PERCPU_SLOTS];
};
_Static_assert(sizeof(struct pv_percpu_header) <= PV_PERCPU_HEADER_BYTES, "the header has its room");

struct pv_percpu {
    struct pv_percpu_header *header;
    char *areas; /* CPU 0's */
    uint32_t cpus;
    int fd;
    size_t bytes;
};

/* The way on when a sequence answered PV_SLOW. */
enum pv_slow {
    PV_SLOW_AGAIN,  /* the thread is registered now */
    PV_SLOW_SHARED, /* use *room, in area *area, by atomic instructions, or plainly under pv_shared_lock */
    PV_SLOW_FREED,
};
enum pv_slow pv_percpu_slow(struct pv_percpu_ref ref, char **room, uint32_t *area);

/* Spin locks in shared memory, held for some instructions. One whose holder was killed is taken over (thread ids must mean the same to all
 * who share the areas). The second kind is that of a shared area. */
void pv_lock(uint32_t *lock);
void pv_unlock(uint32_t *lock);
uint32_t *pv_shared_lock(struct pv_percpu_ref ref, uint32_t area);
void pv_shared_unlock(uint32_t *lock);
uint32_t pv_thread_id(void);
/* Is there no thread of this id any more? */
int pv_thread_gone(uint32_t id);

#endif
