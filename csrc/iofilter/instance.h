/* An instance of the framework: one virtual disk's chain of filters, between its front end and its data.
 *
 * Theory of operation
 * -------------------
 *     RUNNING --pv_instance_quiesce--> DRAINING --nothing in flight--> QUIET --pv_instance_resume--> RUNNING
 *
 * A chain is changed only while the instance is quiet: no request is with any filter or with the data. While
 * DRAINING, filters are asked to let go of what they hold, and new requests wait in `waiting` in the order in
 * which they came; resuming sends
 * them on. So an attach, a
 * detach or a new setting neither loses nor reorders a request, and the pause is as long as the slowest request in
 * flight.
 *
 * Two instances that redirect to one another's data are made quiet one after the other, never at once: a request that
 * waits at the second is in flight in the first.
 *
 * Invariants:
 *  - in_flight counts requests and children between submit and done; it is 0 in QUIET;
 *  - a request that waits enters where it would have entered before the chain was changed;
 *  - filters[i]->at == i, and classes' orders do not decrease along the chain;
 *  - filters[i]->size <= the size of what lies downstream of it; size == filters[0]->size, or the data's.
 */
#ifndef PV_INSTANCE_H
#define PV_INSTANCE_H

#include "data.h"
#include "filter.h"

enum pv_instance_state { PV_RUNNING, PV_DRAINING, PV_QUIET };

struct pv_instance_stats {
    uint64_t requests[PV_IO_TYPES], bytes[PV_IO_TYPES], errors;
    uint64_t redirects_out, redirects_in; /* requests that left for, or came from, another disk's instance */
};

struct pv_instance {
    char name[64];
    struct pv_loop *loop;
    struct pv_filter *filters[PV_CHAIN_MAX];
    unsigned count;
    struct pv_data *data;
    uint64_t size; /* as the front end sees it, bytes */
    uint32_t block_size;
    bool read_only;

    enum pv_instance_state state;
    unsigned in_flight;
    struct pv_link waiting; /* struct pv_io */
    void (*quiet)(struct pv_instance *instance, void *context);
    void *quiet_context;

    struct pv_link spare; /* free children */
    unsigned spares;
    struct pv_link targets_in, targets_out; /* struct pv_target, under the lock of targets */
    void (*on_resize)(struct pv_instance *instance, void *context); /* the front end's */
    void *resize_context;
    struct pv_instance_stats stats; /* relaxed atomics: read by any thread */
};

/* A disk without filters. The data becomes the instance's own. NULL: *fail. May be called by any thread; the instance
 * is the loop's as soon as it was attached to one. */
struct pv_instance *pv_instance_new(const char *name, struct pv_data *data, struct pv_fail *fail);
/* The instance is quiet and detached, or was never attached, and nobody redirects to it (else EBUSY). */
int pv_instance_free(struct pv_instance *instance, struct pv_fail *fail);

/* A filter made ready to be put into a chain, by a thread that may block. */
struct pv_filter *pv_filter_open(struct pv_instance *instance, const char *class, const char *name,
    const struct pv_settings *settings, struct pv_fail *fail);
struct pv_filter *pv_filter_open_class(struct pv_instance *instance, const struct pv_filter_class *class, const char *name,
    const struct pv_settings *settings, struct pv_fail *fail);
void pv_filter_close(struct pv_filter *filter);

/* On the loop's thread from here on (pv_loop_call brings others there). */
void pv_instance_attach_loop(struct pv_instance *instance, struct pv_loop *loop);
void pv_instance_detach_loop(struct pv_instance *instance); /* quiet */
/* `quiet` is called once nothing is in flight, perhaps before this returns. EBUSY: somebody else is at it. */
int pv_instance_quiesce(struct pv_instance *instance, void (*quiet)(struct pv_instance *, void *), void *context,
    struct pv_fail *fail);
void pv_instance_resume(struct pv_instance *instance);
/* While quiet. `at`: its place, at most count. */
int pv_instance_insert(struct pv_instance *instance, struct pv_filter *filter, unsigned at, struct pv_fail *fail);
struct pv_filter *pv_instance_remove(struct pv_instance *instance, unsigned at, struct pv_fail *fail);
int pv_instance_resize(struct pv_instance *instance, uint64_t size, struct pv_fail *fail);

/* Redirect targets. A target that would make a loop of redirects is refused (ELOOP). Not the loop's thread alone:
 * takes the lock of targets. */
struct pv_target *pv_target_local(struct pv_instance *from, struct pv_instance *to, struct pv_fail *fail);
struct pv_target *pv_target_data(struct pv_data *data, struct pv_fail *fail); /* another process; the data is its own */
/* On the loop, by the filter that redirects, in `attached` and `detach`: data of its own comes to the loop and
 * leaves it. */
void pv_target_attach(struct pv_target *target, struct pv_loop *loop);
void pv_target_detach(struct pv_target *target);
void pv_target_free(struct pv_target *target);
uint64_t pv_target_size(const struct pv_target *target);

/* A target as a setting names it: `disk:NAME` (a published instance of this process), `file:PATH`, or another kind
 * that was registered. `size`: what a file that is made smaller than that is refused for; 0: any. */
struct pv_target *pv_target_named(struct pv_instance *from, const char *spec, uint64_t size, struct pv_fail *fail);
/* Other filters of this process may name it from now on; EEXIST. Before pv_instance_free: withdraw (harmless if it
 * was not published). */
int pv_instance_publish(struct pv_instance *instance, struct pv_fail *fail);
void pv_instance_withdraw(struct pv_instance *instance);
/* Teaches pv_target_named another kind ("nbd"): `open` gets what is behind the colon. At most 4; before any thread
 * asks. */
void pv_target_register(const char *kind, struct pv_data *(*open)(const char *rest, struct pv_fail *fail));

#endif
