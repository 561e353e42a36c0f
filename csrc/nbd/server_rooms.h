/* What the parts of the server share.
 *
 * server.c            connections: how they begin, are read and end
 * server_shake.c      the handshake
 * server_requests.c   requests and replies
 *
 * Theory of operation: one connection is a state machine on the loop:
 *
 *     FLAGS (4 bytes) -> OPTION (16) -> BODY (its length) -> OPTION ... -> TRANSMISSION -> (CLOSING) -> gone
 *
 * TRANSMISSION reads what there is into one buffer and takes requests out of it; the payload of a write that is not all
 * there goes on straight into the request's own memory. Replies that are due at the end of a turn go out in one
 * sendmsg. A connection has PV_NBD_SLOTS requests in flight at most, and BYTES of payload; it is not read while it
 * is at a limit, so a client that sends and does not read costs no more than that.
 *
 * Invariants: a slot is free, receiving (one at most), with the instance, or on `replies`; a connection is freed
 * when it is CLOSING and none of its slots is with the instance. */
#ifndef PV_NBD_SERVER_ROOMS_H
#define PV_NBD_SERVER_ROOMS_H

#include "nbd.h"
#include "protocol.h"

#define PV_NBD_SLOTS 64
#define PV_NBD_RX (128u << 10)

enum state { FLAGS, OPTION, BODY, TRANSMISSION, CLOSING };

struct pv_nbd_slot {
    struct pv_io io; /* first: done finds it by this */
    struct pv_nbd_conn *connection;
    struct iovec segment;
    struct nbd_reply reply;
    size_t capacity;
    struct pv_link link; /* on free or replies */
};

struct pv_nbd_conn {
    struct pv_event event;
    struct pv_nbd_server *server;
    struct pv_link link;
    int fd;
    enum state state;
    bool no_zeroes, paused, want_out, entered;
    struct nbd_option option;
    struct pv_nbd_slot *receiving;
    size_t received; /* of its payload */
    unsigned busy;   /* slots with the instance */
    size_t bytes;    /* of payload memory, all slots together */
    struct pv_link free, replies;
    size_t sent; /* of the first reply */
    struct pv_task flush;
    size_t rx_start, rx_end;
    uint8_t rx[PV_NBD_RX];
    struct pv_nbd_slot slots[PV_NBD_SLOTS];
};

struct pv_nbd_server {
    struct pv_event event;
    struct pv_instance *instance;
    struct pv_filter *below;
    char name[256];
    int listener;
    bool read_only, stopping;
    struct pv_link connections;
    void (*closed)(void *context);
    void *context;
    struct pv_nbd_counts counts;
};

static inline void pv_nbd_count(uint64_t *counter)
{
    __atomic_store_n(counter, *counter + 1, __ATOMIC_RELAXED);
}

/* server.c */
void pv_nbd_close(struct pv_nbd_conn *c);
void pv_nbd_broken(struct pv_nbd_conn *c); /* the client broke the protocol */
void pv_nbd_bury(struct pv_nbd_conn *c);   /* frees it, later: it is CLOSING and nothing of it is with the instance */
void pv_nbd_rewatch(struct pv_nbd_conn *c);

/* server_shake.c */
void pv_nbd_greet(struct pv_nbd_conn *c);
bool pv_nbd_shake(struct pv_nbd_conn *c); /* one step; false: more bytes are needed */

/* server_requests.c */
void pv_nbd_take_requests(struct pv_nbd_conn *c); /* those that are in the buffer */
void pv_nbd_send_replies(struct pv_nbd_conn *c);
void pv_nbd_flush(struct pv_task *task); /* conn.flush: at the end of a turn */

#endif
