/* What instance.c, request.c and target.c share; no filter includes it. */
#ifndef PV_IOFILTER_ROOMS_H
#define PV_IOFILTER_ROOMS_H

#include "instance.h"

#define PV_SPARES_MAX 256
#define PV_HOPS_MAX 16

/* A request of the framework's or of a filter's own. */
struct pv_child {
    struct pv_io io; /* first: filters know it by this */
    struct pv_task task; /* brings it to another loop and back */
    struct pv_target *target;
};

struct pv_child *pv_take_child(struct pv_instance *instance);
void pv_give_child(struct pv_instance *instance, struct pv_child *child);

/* Submits what comes from another instance: `hops` redirects so far. */
void pv_submit_hop(struct pv_instance *instance, struct pv_io *io, unsigned entry, uint32_t hops);
/* Sends a request on from filter `at` (its instance is running or draining). */
/* Carries the request to the target; its end there ends it here. */
void pv_target_submit(struct pv_target *target, struct pv_io *io);
void pv_dispatch(struct pv_io *io, unsigned at);
void pv_check_quiet(struct pv_instance *instance);
void pv_release(struct pv_instance *instance); /* what waited goes on */

static inline void pv_bump(uint64_t *counter, uint64_t more)
{
    __atomic_store_n(counter, __atomic_load_n(counter, __ATOMIC_RELAXED) + more, __ATOMIC_RELAXED);
}

#endif
