/* What the parts of the device share: the device, a connection, and who may do what to them.
 *
 * device.c      the event loop and the public interface
 * host.c        the host's side: programs that connect, the guest's connections to Unix sockets, their reads and writes
 * guest.c       the guest's side: packets from the TX ring and to the RX ring
 * connection.c  making, finding, scheduling and ending connections; credit
 *
 * A connection's life
 * -------------------
 *
 *     HANDSHAKE    a program connected; its "CONNECT <port>\n" is not complete. Not in the table: it has no ports yet.
 *     REQUESTED    REQUEST was (or is to be) sent to the guest; no answer yet
 *     ESTABLISHED  data flows; each direction may have been shut by either side (guest_shut, host_shut)
 *     DRAINING     the guest is done with it (RST, or shut both ways); what it had sent still goes to the program.
 *                  Not in the table: the guest may use the ports again.
 *     LINGERING    the program is gone, the guest was told SHUTDOWN both ways and must answer RST (or time runs out)
 *     DEAD         to be freed at the end of this turn of the loop
 *
 *     program connects -> HANDSHAKE -> REQUESTED -> ESTABLISHED -> LINGERING -> DEAD   the program closes first
 *     guest connects ----------------------------> ESTABLISHED -> DRAINING -> DEAD    the guest closes first
 *     any -> DEAD, with RST to the guest where it knows the connection: a rule was broken, time ran out, no front end
 *
 * RST belongs to no state: it is sent for a pair of ports (`strays`), before anything else goes to the guest. The queue
 * of them is bounded, and the TX ring is not read while it is full, so that no answer is ever lost.
 *
 * Invariants:
 *  - a connection is in the table exactly in REQUESTED, ESTABLISHED, LINGERING;
 *  - it is on the ready list exactly while it has something for the guest (pv_conn_wants_guest);
 *  - `unsent.used <= window`, and the sum of windows <= the budget: a program that does not read costs no more;
 *  - it has a socket (fd >= 0) exactly in HANDSHAKE, REQUESTED, ESTABLISHED, DRAINING;
 *  - sockets are edge-triggered: `readable` and `writable` remember the edge until a call says EAGAIN. So a socket that
 *    nobody may read for lack of credit does not wake the loop again and again.
 */
#ifndef PV_DEVICE_H
#define PV_DEVICE_H

#include <linux/virtio_vsock.h>
#include <stdbool.h>
#include <stdint.h>

#include "common/list.h"
#include "sendbuf.h"
#include "common/iov.h"
#include "vhost/vhost_user.h"
#include "vsock.h"

enum { PV_RX = 0, PV_TX = 1, PV_EVENT = 2, PV_RINGS = 3 }; /* named from the guest's point of view */

#define PV_HOST_CID 2
#define PV_BUCKETS 4096
#define PV_STRAY_MAX 256
#define PV_BATCH_MAX 16       /* chains of the RX ring filled by one read */
#define PV_BATCH_SEGMENTS 512 /* segments of such a read; below IOV_MAX */
#define PV_HANDSHAKE_MAX 32   /* longest "CONNECT <port>\n" */
#define PV_PATH_MAX 108

/* What epoll hands back: the owner of a descriptor. */
struct pv_source {
    void (*on_event)(struct pv_vsock *v, struct pv_source *source, uint32_t events);
};

enum pv_state { PV_HANDSHAKE, PV_REQUESTED, PV_ESTABLISHED, PV_DRAINING, PV_LINGERING, PV_DEAD };

/* Packets that a connection owes the guest, sent in this order; data goes before the SHUTDOWN. */
enum {
    PV_OWES_REQUEST = 1,
    PV_OWES_RESPONSE = 2,
    PV_OWES_CREDIT_UPDATE = 4,
    PV_OWES_CREDIT_REQUEST = 8,
    PV_OWES_SHUTDOWN = 16,
};

struct pv_conn {
    struct pv_source source; /* first: epoll's pointer is this one */
    enum pv_state state;
    int fd;
    uint32_t guest_port, host_port;

    bool readable, writable, hangup; /* of the socket: edges seen */
    bool read_closed;                /* end of file seen, or the guest wants no more */
    bool write_closed;               /* the program takes no more: what the guest still sends is thrown away */
    uint8_t guest_shut, host_shut;   /* VIRTIO_VSOCK_SHUTDOWN_*: said by the guest; said or to be said to it */
    uint8_t owes;
    uint8_t batch; /* RX chains to fill with the next read: doubles while reads are full */

    /* Guest to host. Free-running 32-bit counts, as the specification has them. */
    uint32_t window;       /* our buf_alloc */
    uint32_t received;     /* bytes */
    uint32_t forwarded;    /* our fwd_cnt: of those, bytes that went on to the program or were thrown away */
    uint32_t forward_told; /* fwd_cnt in the latest packet to the guest */
    struct pv_sendbuf unsent;

    /* Host to guest. */
    uint32_t peer_window; /* the guest's buf_alloc */
    uint32_t peer_forwarded;
    uint32_t sent;
    bool credit_asked; /* CREDIT_REQUEST was sent since credit last ran out */

    char line[PV_HANDSHAKE_MAX];
    unsigned line_len;
    uint64_t deadline_ms;

    struct pv_conn *bucket_next;
    struct pv_link all_link, ready_link, timer_link;
};

/* An RST for ports that belong to no connection. */
struct pv_stray {
    uint64_t src_cid, dst_cid;
    uint32_t src_port, dst_port;
    uint16_t type;
};

struct pv_listener {
    struct pv_source source;
    int fd;
    bool paused;
};

struct pv_kick {
    struct pv_source source;
};

struct pv_vsock {
    struct pv_vsock_config config; /* with defaults filled in; uds_path points into path */
    char path[PV_PATH_MAX];
    int epoll_fd, stop_fd;
    struct pv_source stop_source, frontend_source;
    struct pv_listener frontend_listener, host_listener;
    struct pv_kick kick_sources[PV_RINGS];

    struct pv_fe fe;
    bool has_frontend;
    bool stopping;
    bool tx_pending, rx_pending; /* there may be work that can be done now; false: an event will say so */
    int result;                  /* errno to return from pv_vsock_run */

    struct pv_conn *buckets[PV_BUCKETS];
    uint64_t hash_key;
    uint32_t connections, next_port;
    uint64_t promised, buffered;
    struct pv_link all, ready, requests, lingering, dead;

    struct pv_stray strays[PV_STRAY_MAX];
    unsigned stray_first, stray_count;

    struct pv_chain chains[PV_BATCH_MAX];
    struct iovec iov[PV_BATCH_SEGMENTS];
    uint8_t scratch[65536]; /* for bytes that are thrown away */

    struct pv_vsock_stats stats; /* written by the loop's thread alone, with relaxed atomics */
    const char *fault;           /* likewise */
};

static inline void pv_count(uint64_t *counter, uint64_t more)
{
    __atomic_store_n(counter, *counter + more, __ATOMIC_RELAXED);
}

static inline void pv_gauge(uint64_t *gauge, uint64_t value)
{
    __atomic_store_n(gauge, value, __ATOMIC_RELAXED);
}

static inline void pv_set_fault(struct pv_vsock *v, const char *fault)
{
    __atomic_store_n(&v->fault, fault, __ATOMIC_RELEASE);
}

uint64_t pv_now_ms(void);
void pv_ring_broken(struct pv_vsock *v, unsigned ring);
void pv_ring_publish(struct pv_vsock *v, unsigned ring);
int pv_watch(struct pv_vsock *v, int fd, uint32_t events, struct pv_source *source, int *err);

/* One turn of the event loop; pv_vsock_run is this, again and again. */
int pv_vsock_turn(struct pv_vsock *v, int *err);

/* connection.c */
struct pv_conn *pv_conn_new(struct pv_vsock *v, int fd, enum pv_state state, int *err);
struct pv_conn *pv_conn_find(const struct pv_vsock *v, uint32_t guest_port, uint32_t host_port);
void pv_conn_register(struct pv_vsock *v, struct pv_conn *c, uint32_t guest_port, uint32_t host_port);
uint32_t pv_conn_free_port(struct pv_vsock *v, uint32_t guest_port);
void pv_conn_owe(struct pv_vsock *v, struct pv_conn *c, unsigned packets);
bool pv_conn_has_data(const struct pv_conn *c);
bool pv_conn_wants_guest(const struct pv_conn *c);
void pv_conn_schedule(struct pv_vsock *v, struct pv_conn *c);
uint32_t pv_conn_credit(const struct pv_conn *c);
void pv_conn_forwarded(struct pv_vsock *v, struct pv_conn *c, uint32_t bytes);
void pv_conn_start_timer(struct pv_vsock *v, struct pv_conn *c, struct pv_link *list, uint32_t after_ms);
void pv_conn_close_socket(struct pv_vsock *v, struct pv_conn *c);
void pv_conn_leave_table(struct pv_vsock *v, struct pv_conn *c);
void pv_conn_reset(struct pv_vsock *v, struct pv_conn *c);
void pv_conn_linger(struct pv_vsock *v, struct pv_conn *c);
void pv_conn_kill(struct pv_vsock *v, struct pv_conn *c);
void pv_conn_kill_all(struct pv_vsock *v, bool keep_handshakes);
void pv_stray_reset(struct pv_vsock *v, const struct pv_stray *stray);
void pv_conn_bury(struct pv_vsock *v);
void pv_conn_expire(struct pv_vsock *v);
int pv_conn_next_timeout_ms(const struct pv_vsock *v);

/* host.c */
void pv_host_accept(struct pv_vsock *v, struct pv_source *source, uint32_t events);
void pv_host_resume_accept(struct pv_vsock *v);
int pv_host_connect(struct pv_vsock *v, uint32_t port, int *err);
void pv_host_established(struct pv_vsock *v, struct pv_conn *c);
void pv_host_send(struct pv_vsock *v, struct pv_conn *c, const struct iovec *iov, unsigned count, size_t len);
void pv_host_discard(struct pv_vsock *v, struct pv_conn *c);
void pv_host_shut_write(struct pv_vsock *v, struct pv_conn *c);
void pv_host_on_event(struct pv_vsock *v, struct pv_source *source, uint32_t events);

/* guest.c */
void pv_guest_process_tx(struct pv_vsock *v);
void pv_guest_process_rx(struct pv_vsock *v);

#endif
