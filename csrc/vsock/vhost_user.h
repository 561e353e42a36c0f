/* The back end's side of the vhost-user protocol (QEMU's docs/interop/vhost-user.rst) for a virtio socket device.
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

#include "memtable.h"
#include "virtqueue.h"

enum { PV_RX = 0, PV_TX = 1, PV_EVENT = 2, PV_RINGS = 3 }; /* named from the guest's point of view */

#define PV_MSG_MAX_FDS 8
#define PV_MSG_MAX_PAYLOAD 512

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
    bool was_started; /* since the connection began: vq.last_avail means something */
};

/* What the device does when the protocol asks for it. Called from within pv_fe_receive. */
struct pv_fe_ops {
    int (*ring_started)(void *opaque, unsigned ring, int kick_fd, int *err);
    void (*ring_stopped)(void *opaque, unsigned ring, int kick_fd); /* the descriptor is closed right after */
    void (*device_reset)(void *opaque);                             /* the guest's driver starts anew */
};

struct pv_fe {
    const struct pv_fe_ops *ops;
    void *opaque;
    int fd;
    uint64_t guest_cid;
    uint64_t features;          /* acknowledged by the front end */
    uint64_t protocol_features; /* likewise */
    struct pv_memtable mem;
    struct pv_fe_ring rings[PV_RINGS];
    const char *fault; /* why the latest message was refused, or NULL */

    struct pv_msg msg; /* being received */
    uint32_t have;
    int fds[PV_MSG_MAX_FDS];
    unsigned fd_count;
};

/* Begins with a connected socket, which becomes the pv_fe's. */
void pv_fe_open(struct pv_fe *fe, int fd, uint64_t guest_cid, const struct pv_fe_ops *ops, void *opaque);

/* Stops all rings, unmaps the memory, closes every descriptor. */
void pv_fe_close(struct pv_fe *fe);

/* Receives and handles messages until there are no more. 1: go on; 0: the front end hung up; -1: it broke the
 * protocol (*err, fe->fault). */
int pv_fe_receive(struct pv_fe *fe, int *err);

bool pv_fe_ring_live(const struct pv_fe *fe, unsigned ring);

/* Tells the front end about a ring that the guest broke. */
void pv_fe_ring_broken(struct pv_fe *fe, unsigned ring);

#endif
