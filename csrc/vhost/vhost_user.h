/* The back end's side of the vhost-user protocol (QEMU's docs/interop/vhost-user.rst), for any kind of device.
 *
 * Theory of operation
 * -------------------
 * One front end at a time. A message is received in two steps, without ever blocking:
 *
 *     HEADER (12 bytes, with the descriptors) -> PAYLOAD (its size, checked first) -> handled -> HEADER ...
 *
 * A ring goes through these states; the rest of the device touches it only while pv_fe_ring_live():
 *
 *     stopped --SET_VRING_KICK--> started (and enabled, unless PROTOCOL_FEATURES was negotiated)
 *     started --SET_VRING_ENABLE--> live <-> not live
 *     any     --GET_VRING_BASE, RESET--> stopped; the answer is the next available index
 *     live    --the guest breaks it--> broken: VRING_ERR is signalled once; not live until it is stopped and started
 *
 * A device that holds chains over turns of its loop counts them (pv_fe_hold, pv_fe_drop). A message that takes a
 * ring or the guest's memory away then waits until none is held (`draining`): no ring is live meanwhile, so that no
 * new ones are taken, and nothing more is received. Whoever drops the last one calls pv_fe_receive.
 *
 * A pause of the VM stops the rings and starts them again where they were; a reset starts them at another index. That
 * is how the two are told apart: connections live through a pause and are dropped by a reset (`device_reset`).
 *
 * A message that cannot be understood (version, size, descriptors) ends the connection to the front end. One that is
 * understood but refused is answered as such when the front end wanted to know (REPLY_ACK), and ends the connection
 * when it did not.
 */
#ifndef PV_VHOST_USER_H
#define PV_VHOST_USER_H

#include <stdbool.h>
#include <stdint.h>

#include "inflight.h"
#include "memtable.h"
#include "virtqueue.h"

#define PV_RINGS_MAX 16
#define PV_MSG_MAX_FDS 8
#define PV_MSG_MAX_PAYLOAD 512
#define PV_CONFIG_MAX 256

/* Protocol features that a device may ask for. */
#define PV_PROTOCOL_MQ (1ULL << 0)
#define PV_PROTOCOL_LOG_SHMFD (1ULL << 1)
#define PV_PROTOCOL_REPLY_ACK (1ULL << 3)
#define PV_PROTOCOL_BACKEND_REQ (1ULL << 5)
#define PV_PROTOCOL_CONFIG (1ULL << 9)
#define PV_PROTOCOL_INFLIGHT (1ULL << 12)
#define PV_F_LOG_ALL (1ULL << 26) /* of the features: the front end may have every write of ours logged */

struct pv_msg {
    uint32_t request;
    uint32_t flags;
    uint32_t size;
    uint8_t payload[PV_MSG_MAX_PAYLOAD];
} __attribute__((packed));

struct pv_fe_ring {
    struct pv_vq vq;
    int kick_fd, call_fd, err_fd; /* -1: none */
    uint16_t base;                /* SET_VRING_BASE */
    bool started, enabled;
    bool was_started;  /* since the connection began: vq.last_avail means something */
    bool logged;       /* writes to the used ring are logged, at: */
    uint64_t log_addr; /* the used ring's guest address */
};

/* A kind of device, or one device where they differ. Functions are called from within pv_fe_receive; those that may be
 * NULL say so. */
struct pv_fe_type {
    uint64_t features;          /* virtio's and the device's own */
    uint64_t protocol_features; /* PV_PROTOCOL_* */
    unsigned rings;             /* at most PV_RINGS_MAX */
    uint32_t queue_max;         /* most entries of a ring, at most PV_QUEUE_MAX */
    bool holds;                 /* it works with pop and push: rings are prepared for it */
    uint32_t stateless_rings;   /* a bit each: their position says nothing about the device's state */
    int (*ring_started)(void *opaque, unsigned ring, int kick_fd, int *err);
    void (*ring_stopped)(void *opaque, unsigned ring, int kick_fd); /* the descriptor is closed right after */
    void (*device_reset)(void *opaque);                             /* NULL; the guest's driver starts anew */
    int (*get_config)(void *opaque, uint32_t offset, uint8_t *data, uint32_t size); /* -1: out of range */
    int (*set_config)(void *opaque, uint32_t offset, const uint8_t *data, uint32_t size); /* NULL; -1: refused */
};

struct pv_log {
    uint8_t *map; /* a bit for each page of 4 KiB; NULL: none */
    size_t size;
};

struct pv_fe {
    const struct pv_fe_type *type;
    void *opaque;
    int fd;
    int backend_fd;             /* where we may ask the front end for something; -1: nowhere */
    uint64_t features;          /* acknowledged by the front end */
    uint64_t protocol_features; /* likewise */
    struct pv_memtable mem;
    struct pv_inflight inflight;
    struct pv_log log;
    struct pv_fe_ring rings[PV_RINGS_MAX];
    const char *fault; /* why the latest message was refused, or NULL */
    unsigned held;     /* chains */
    bool draining;     /* a message waits for held to become 0 */

    struct pv_msg msg; /* being received */
    uint32_t have;
    int fds[PV_MSG_MAX_FDS];
    unsigned fd_count;
};

/* Begins with a connected socket, which becomes the pv_fe's. The type must outlive it. */
void pv_fe_open(struct pv_fe *fe, int fd, const struct pv_fe_type *type, void *opaque);

/* Stops all rings, unmaps the memory, closes every descriptor. Nothing may be held. */
void pv_fe_close(struct pv_fe *fe);

/* Receives and handles messages until there are no more. 1: go on; 0: the front end hung up; -1: it broke the
 * protocol (*err, fe->fault). */
int pv_fe_receive(struct pv_fe *fe, int *err);

bool pv_fe_ring_live(const struct pv_fe *fe, unsigned ring);

/* Tells the front end about a ring that the guest broke. */
void pv_fe_ring_broken(struct pv_fe *fe, unsigned ring);

static inline void pv_fe_hold(struct pv_fe *fe)
{
    fe->held++;
}

/* True: it was the last one, and a message waits for it. */
static inline bool pv_fe_drop(struct pv_fe *fe)
{
    return --fe->held == 0 && fe->draining;
}

/* Shows the guest what a ring has used. True: an interrupt was sent. */
bool pv_fe_publish(struct pv_fe *fe, unsigned ring);

/* To be called after each write to the guest's buffers: notes it in the log, if there is one. */
void pv_fe_log_written(struct pv_fe *fe, const struct iovec *iov, unsigned count, size_t len);

/* Tells the guest's driver to look at the configuration space again. A front end that has not yet looked after the last
 * time is not told twice. False: it cannot be told. */
bool pv_fe_config_changed(struct pv_fe *fe);

#endif
