/* What the parts of the device share.
 *
 * device.c    life, front end, rings
 * request.c   a request from the ring to the instance and back
 * config.c    features and configuration space
 *
 * Theory of operation
 * -------------------
 * The device is a poller of its loop: each turn it pops what the rings have and submits it. What ends is pushed at once
 * and published once a turn, with one interrupt if the guest wants it. While the loop polls, the guest's kicks are
 * suppressed; before it sleeps it asks for them.
 *
 * A front end:
 *
 *     NONE --connect--> CONNECTED --it hangs up, breaks a rule, pv_blk_disconnect--> LEAVING --nothing held--> NONE
 *
 * A request:
 *
 *     popped (held) -> refused at once, or submitted -> ended by the instance -> pushed -> published
 *                                                    \-> ENOSPC: parked; submitted again every RETRY_NS
 *
 * Parked: the host's disk is full. The guest's write is not failed, for that would break its file system; it waits.
 * When the front end wants the ring back meanwhile (the VM is paused or ends), a parked request is left to the
 * in-flight region and comes again when the ring is started again; without such a region it fails.
 *
 * Invariants:
 *  - fe.held counts requests between pop and push; memory stays mapped and rings stay started until it is 0;
 *  - a request is in exactly one place: free list, the instance, the parked list.
 */
#ifndef PV_BLK_DEVICE_H
#define PV_BLK_DEVICE_H

#include <stdbool.h>

#include "blk.h"
#include "common/list.h"
#include "common/loop.h"
#include "iofilter/instance.h"
#include "vhost/vhost_user.h"

#define PV_BLK_QUEUE_MAX 1024
#define PV_BLK_SEGMENTS 126 /* of data: with header and status, 128 */
#define PV_BLK_DISCARD_SECTORS (1U << 23) /* 4 GiB */

struct pv_blk_request {
    struct pv_io io; /* first */
    struct pv_blk *blk;
    unsigned ring;
    uint8_t *status; /* in the guest's memory */
    uint64_t started; /* for a trace; 0: none is on */
    struct pv_link link; /* free, or parked */
    struct pv_chain chain;
};

struct pv_blk_kick {
    struct pv_event event;
    struct pv_blk *blk;
};

struct pv_blk {
    struct pv_blk_config config;
    struct pv_loop *loop;
    struct pv_instance *instance; /* NULL: none yet */
    struct pv_fe_type type;
    struct pv_fe fe;
    bool connected, leaving;

    int listen_fd;
    struct pv_event frontend_event, listen_event;
    struct pv_blk_kick kicks[PV_RINGS_MAX];
    struct pv_poller poller;
    struct pv_task publish, resume; /* at the end of the turn: used rings; a message that waited */
    struct pv_timer retry;
    uint32_t dirty; /* rings with something to publish, a bit each */

    struct pv_link spare, parked;
    struct pv_blk_stats stats; /* written by the loop's thread alone, with relaxed atomics */
    const char *fault;         /* likewise */
};

static inline void pv_blk_count(uint64_t *counter, uint64_t more)
{
    __atomic_store_n(counter, *counter + more, __ATOMIC_RELAXED);
}

static inline void pv_blk_set_fault(struct pv_blk *blk, const char *fault)
{
    __atomic_store_n(&blk->fault, fault, __ATOMIC_RELEASE);
}

/* config.c */
void pv_blk_fill_type(struct pv_blk *blk);
uint64_t pv_blk_capacity(const struct pv_blk *blk); /* bytes, as the guest is told */

/* request.c */
/* Takes up to a batch of requests from a ring. True: there was one. */
bool pv_blk_serve(struct pv_blk *blk, unsigned ring);
/* Parked requests: again to the instance; or away, for the rings are to be stopped. */
void pv_blk_retry(struct pv_blk *blk);
void pv_blk_unpark(struct pv_blk *blk);
void pv_blk_free_requests(struct pv_blk *blk);

#endif
