/* The client: an export of an NBD server as data. What its parts share.
 *
 * client.c           requests, the connection's loss and return, the data's life
 * client_connect.c   connecting and the handshake: blocking
 * client_wire.c      sending and receiving
 *
 * Theory of operation
 * -------------------
 * Requests that come while the connection is up are sent at the end of the turn, many in one sendmsg; each has a call,
 * whose index is its handle. Replies come in any order; what a read gets goes straight into the request's own segments.
 *
 *     UP --connection lost, or the server breaks a rule--> DOWN --a thread connects and shakes hands--> UP
 *                                                          DOWN --patience over--> FAILING --connected--> UP
 *
 * Connecting may block, so a thread of its own does it, and posts the socket to the loop. While DOWN, requests wait,
 * those under way among them (nobody was told that they are done, so they are sent again, in their order); while
 * FAILING they end with EIO at once.
 *
 * Invariants: a request is on `waiting`, on `queued` (to be sent, perhaps half sent), or on `sent`; those of the
 * last two have a call each, of which there are PV_NBD_CALLS. */
#ifndef PV_NBD_CLIENT_ROOMS_H
#define PV_NBD_CLIENT_ROOMS_H

#include <pthread.h>
#include <sys/un.h>

#include "nbd.h"
#include "protocol.h"

#define PV_NBD_CALLS 128

enum state { UP, DOWN, FAILING };

struct pv_nbd_call {
    struct pv_io *io; /* NULL: free */
    struct nbd_request wire;
    bool sent;
    struct pv_link link; /* on free, queued or sent */
};

struct pv_nbd_client {
    struct pv_data data;
    struct sockaddr_un address;
    char export[256];
    uint32_t patience_ms;
    uint32_t flags; /* NBD_SEND_* of the export */

    enum state state;
    int fd;
    struct pv_event event;
    struct pv_task flush;
    bool want_out;
    struct pv_link waiting; /* struct pv_io without a call */
    struct pv_link free, queued, sent;
    size_t skip; /* bytes of the first of queued that went out */
    struct pv_timer patience;

    struct nbd_reply reply; /* being received */
    size_t reply_have, payload_have;
    struct pv_nbd_call *receiving;

    pthread_t thread; /* the one that connects, while DOWN or FAILING */
    bool connecting;
    int stop; /* atomic: it should give up */
    struct pv_task connected;
    int new_fd;

    struct pv_nbd_call calls[PV_NBD_CALLS];
};

struct pv_nbd_export {
    uint64_t size;
    uint16_t flags;
    uint32_t block_size;
};

/* client.c */
void pv_nbd_queue_waiting(struct pv_nbd_client *c); /* as far as there are free calls */
void pv_nbd_end_call(struct pv_nbd_client *c, struct pv_nbd_call *call, int error);
void pv_nbd_lost(struct pv_nbd_client *c);

/* client_connect.c */
/* A socket through which requests can go, or -1 with *why. */
int pv_nbd_connect(const struct sockaddr_un *address, const char *name, struct pv_nbd_export *out, const char **why);

/* client_wire.c */
void pv_nbd_client_flush(struct pv_task *task); /* client.flush: sends what is queued */
void pv_nbd_on_socket(struct pv_event *event, uint32_t events);

#endif
