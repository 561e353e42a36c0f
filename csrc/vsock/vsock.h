/* A vhost-user-vsock back end: gives one guest a virtio socket device and couples it to Unix sockets of the host.
 *
 * Public interface; everything else in this folder is private to it. docs/vsock.md is the page about it.
 *
 * Errors: functions that can fail return 0 or -1 and store a positive errno in *err. Nothing is printed and nothing
 * aborts; what a guest or a front end did wrong is counted (pv_vsock_stats) and named (pv_vsock_fault).
 * Threads: one thread calls pv_vsock_run; pv_vsock_stop, pv_vsock_stats and pv_vsock_fault may be called from any.
 */
#ifndef PV_VSOCK_H
#define PV_VSOCK_H

#include <stdint.h>

struct pv_vsock;

/* Every limit may be 0, which means the default beside it. */
struct pv_vsock_config {
    int listen_fd;                /* listening Unix socket for the vhost-user front end (QEMU); -1: none */
    int frontend_fd;              /* a socket already connected to the front end; -1: none. One of the two is needed. */
    int host_listener_fd;         /* listening Unix socket for the host's programs ("CONNECT <port>\n"); -1: none */
    /* a guest's connection to port N goes to the Unix socket "<uds_path>_N"; NULL: refused */
    const char *uds_path;
    uint64_t guest_cid;           /* 3 .. 2^32 - 2 */
    uint32_t max_connections;     /* 2048: both directions, those being closed included */
    uint32_t window_bytes;        /* 262144: the most that a guest may have in flight on one connection */
    /* 256 MiB: the sum of all windows promised; new connections get smaller windows near it */
    uint64_t buffer_budget_bytes;
    uint32_t request_timeout_ms;  /* 10000: from a program's connect to the guest's answer */
    uint32_t linger_timeout_ms;   /* 10000: from full close to the guest's RST */
    /* Told of each mapping of guest memory in this process: 1 after it was made and before its first touch (an errno other than 0
     * refuses it), 0 before it goes. NULL: nobody. For guest RAM that is filled lazily (pv_fault_map_hook in csrc/memory). */
    int (*map_hook)(void *context, int mapped, void *start, uint64_t length, uint64_t offset);
    void *map_context;
    uint32_t exit_on_disconnect;  /* 1: pv_vsock_run returns when the first front end goes; 0: it waits for the next */
};

struct pv_vsock_stats {
    uint64_t frontend_connected; /* 1 while a front end is connected */
    uint64_t guest_running;      /* 1 while both data rings are started and enabled */
    uint64_t connections;        /* open now, those being closed included */
    uint64_t opened_by_host;     /* connections established since the start */
    uint64_t opened_by_guest;
    uint64_t refused;            /* connects of either side that came to nothing */
    uint64_t resets_sent;
    uint64_t resets_received;
    uint64_t bytes_to_guest;
    uint64_t bytes_to_host;
    uint64_t packets_to_guest;
    uint64_t packets_from_guest;
    uint64_t buffered_bytes;     /* the guest's data held because a program of the host does not read */
    uint64_t promised_bytes;     /* sum of the windows promised to the guest */
    uint64_t guest_resets;       /* times that the guest's driver started anew */
    uint64_t kicks;              /* notifications taken from the guest */
    uint64_t interrupts;         /* notifications given to the guest */
    uint64_t wakeups;            /* turns of the event loop */
    uint64_t bad_packets;        /* dropped: malformed, or not for us */
    uint64_t credit_violations;  /* connections reset because the guest sent more than it may */
    uint64_t ring_faults;        /* rings stopped because the guest broke them */
    uint64_t frontend_faults;    /* vhost-user messages refused */
};

/* Makes a device. Takes over the descriptors on success, on failure they stay the caller's; uds_path is copied.
 * Errors: EINVAL (a bad CID or path), ENOMEM, EMFILE and what epoll and eventfd may say. */
int pv_vsock_create(const struct pv_vsock_config *config, struct pv_vsock **out, int *err);

/* Runs the device in the calling thread until pv_vsock_stop, or, with exit_on_disconnect, until the front end is gone.
 * Returns -1 with EPROTO when the front end was thrown out because it broke the protocol (pv_vsock_fault names how). */
int pv_vsock_run(struct pv_vsock *vsock, int *err);

/* Makes pv_vsock_run return soon. Async-signal-safe; may be called before it runs and more than once. */
void pv_vsock_stop(struct pv_vsock *vsock);

/* Counters as of now; each is exact, but they are not taken at one instant. Does not block. */
void pv_vsock_get_stats(const struct pv_vsock *vsock, struct pv_vsock_stats *out);

/* Name of the latest fault of guest or front end, "" when there was none. The text lives for ever. */
const char *pv_vsock_fault(const struct pv_vsock *vsock);

/* Where the trace points of this module go: a struct pv_trace_hook that stays (percpu/trace_point.h), or NULL. Any thread. */
void pv_vsock_trace(const void *hook);

/* Closes everything. Not while pv_vsock_run is running; NULL is allowed. */
void pv_vsock_destroy(struct pv_vsock *vsock);

#endif
