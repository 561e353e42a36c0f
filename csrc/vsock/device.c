/* The event loop and the public interface.
 *
 * One turn: wait for events; let their owners note what happened; take what the guest sent; give it what there is for
 * it; free the connections that ended. Nothing waits but epoll_wait, and it waits without end when nothing is to be
 * done or to time out.
 */
#include <endian.h>
#include <errno.h>
#include <linux/virtio_config.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "common/cleanup.h"
#include "device.h"
#include "percpu/trace_point.h"

#define EVENTS_A_TURN 64
#define DEFAULT_CONNECTIONS 2048
#define DEFAULT_WINDOW (256U << 10)
#define DEFAULT_BUDGET (256ULL << 20)
#define DEFAULT_TIMEOUT_MS 10000

uint64_t pv_now_ms(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

int pv_watch(struct pv_vsock *v, int fd, uint32_t events, struct pv_source *source, int *err)
{
    struct epoll_event event = {.events = events, .data.ptr = source};

    if (epoll_ctl(v->epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0) {
        *err = errno;
        return -1;
    }
    return 0;
}

/* ---- rings ------------------------------------------------------------------------------------------------------- */

void pv_ring_broken(struct pv_vsock *v, unsigned ring)
{
    pv_count(&v->stats.ring_faults, 1);
    pv_set_fault(v, v->fe.rings[ring].vq.fault);
    pv_fe_ring_broken(&v->fe, ring);
}

void pv_ring_publish(struct pv_vsock *v, unsigned ring)
{
    if (pv_fe_publish(&v->fe, ring))
        pv_count(&v->stats.interrupts, 1);
}

static void note_rings(struct pv_vsock *v)
{
    bool running = v->has_frontend && pv_fe_ring_live(&v->fe, PV_RX) && pv_fe_ring_live(&v->fe, PV_TX);

    pv_gauge(&v->stats.guest_running, running);
}

static void on_kick(struct pv_vsock *v, struct pv_source *source, uint32_t events)
{
    unsigned ring = (unsigned)((struct pv_kick *)source - v->kick_sources);

    (void)events;
    pv_count(&v->stats.kicks, 1);
    if (ring == PV_TX)
        v->tx_pending = true;
    if (ring == PV_RX)
        v->rx_pending = true;
}

/* The kick descriptor is edge-triggered and never read: each write to an eventfd is an edge of its own. */
static int on_ring_started(void *opaque, unsigned ring, int kick_fd, int *err)
{
    struct pv_vsock *v = opaque;

    if (pv_watch(v, kick_fd, EPOLLIN | EPOLLET, &v->kick_sources[ring].source, err) < 0 && *err != EEXIST)
        return -1;
    /* Whatever became available before is taken without a kick. */
    v->tx_pending |= ring == PV_TX;
    v->rx_pending |= ring == PV_RX;
    return 0;
}

static void on_ring_stopped(void *opaque, unsigned ring, int kick_fd)
{
    struct pv_vsock *v = opaque;

    (void)ring;
    /* The front end holds the same open file: closing our descriptor would not take it out of the set. */
    epoll_ctl(v->epoll_fd, EPOLL_CTL_DEL, kick_fd, NULL);
}

static void on_device_reset(void *opaque)
{
    struct pv_vsock *v = opaque;

    pv_count(&v->stats.guest_resets, 1);
    pv_conn_kill_all(v, true);
}

static int on_get_config(void *opaque, uint32_t offset, uint8_t *data, uint32_t size)
{
    const struct pv_vsock *v = opaque;
    uint64_t cid = htole64(v->config.guest_cid);

    if (offset > sizeof(cid) || size > sizeof(cid) - offset)
        return -1;
    memcpy(data, (const uint8_t *)&cid + offset, size);
    return 0;
}

#define RING_FEATURES ((1ULL << VIRTIO_RING_F_INDIRECT_DESC) | (1ULL << VIRTIO_RING_F_EVENT_IDX))

/* The event ring carries no connection: its position says nothing about them. */
static const struct pv_fe_type FE_TYPE = {
    .features = (1ULL << VIRTIO_F_VERSION_1) | RING_FEATURES,
    .protocol_features = PV_PROTOCOL_MQ | PV_PROTOCOL_REPLY_ACK | PV_PROTOCOL_CONFIG,
    .rings = PV_RINGS,
    .queue_max = PV_QUEUE_MAX,
    .stateless_rings = 1U << PV_EVENT,
    .get_config = on_get_config,
    .ring_started = on_ring_started,
    .ring_stopped = on_ring_stopped,
    .device_reset = on_device_reset,
};

/* ---- the front end's connection ---------------------------------------------------------------------------------- */

static void drop_frontend(struct pv_vsock *v, int result)
{
    pv_fe_close(&v->fe);
    v->has_frontend = false;
    pv_gauge(&v->stats.frontend_connected, 0);
    pv_conn_kill_all(v, true);
    if (v->config.exit_on_disconnect) {
        v->stopping = true;
        v->result = result;
    }
}

static void on_frontend(struct pv_vsock *v, struct pv_source *source, uint32_t events)
{
    int err = 0, more;

    (void)source;
    (void)events;
    if (!v->has_frontend)
        return;
    more = pv_fe_receive(&v->fe, &err);
    if (more < 0 || v->fe.fault) {
        pv_count(&v->stats.frontend_faults, 1);
        pv_set_fault(v, v->fe.fault ? v->fe.fault : "vhost-user: the connection failed");
        v->fe.fault = NULL;
    }
    if (more <= 0)
        drop_frontend(v, more < 0 ? EPROTO : 0);
}

/* The descriptor becomes the device's only on success. */
static int adopt_frontend(struct pv_vsock *v, int fd, int *err)
{
    if (pv_watch(v, fd, EPOLLIN | EPOLLRDHUP, &v->frontend_source, err) < 0)
        return -1;
    pv_fe_open(&v->fe, fd, &FE_TYPE, v);
    v->fe.mem.hook = (struct pv_map_hook){v->config.map_hook, v->config.map_context};
    v->has_frontend = true;
    pv_gauge(&v->stats.frontend_connected, 1);
    return 0;
}

static void on_frontend_connect(struct pv_vsock *v, struct pv_source *source, uint32_t events)
{
    cleanup_fd int fd = accept4(v->frontend_listener.fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    int err;

    (void)source;
    (void)events;
    /* A second front end is turned away. */
    if (fd >= 0 && !v->has_frontend && adopt_frontend(v, fd, &err) == 0)
        steal_fd(&fd);
}

/* ---- the loop ---------------------------------------------------------------------------------------------------- */

static void on_stop(struct pv_vsock *v, struct pv_source *source, uint32_t events)
{
    (void)source;
    (void)events;
    v->stopping = true;
}

static int wait_for_events(struct pv_vsock *v, struct epoll_event *events, int *err)
{
    int timeout = v->tx_pending || v->rx_pending ? 0 : pv_conn_next_timeout_ms(v);
    int count = epoll_wait(v->epoll_fd, events, EVENTS_A_TURN, timeout);

    if (count < 0 && errno != EINTR) {
        *err = errno;
        return -1;
    }
    pv_count(&v->stats.wakeups, 1);
    return count < 0 ? 0 : count;
}

int pv_vsock_turn(struct pv_vsock *v, int *err)
{
    struct epoll_event events[EVENTS_A_TURN];
    int count = wait_for_events(v, events, err);
    uint64_t started = PV_TRACE_NOW();

    if (count < 0)
        return -1;
    for (int i = 0; i < count; i++) {
        struct pv_source *source = events[i].data.ptr;

        source->on_event(v, source, events[i].events);
    }
    pv_guest_process_tx(v);
    pv_guest_process_rx(v);
    note_rings(v);
    pv_conn_expire(v);
    pv_conn_bury(v);
    PV_TRACE_SPAN(PV_TRACE_VSOCK, started, count);
    return 0;
}

void pv_vsock_trace(const void *hook)
{
    pv_trace_use(hook);
}

int pv_vsock_run(struct pv_vsock *v, int *err)
{
    while (!v->stopping)
        if (pv_vsock_turn(v, err) < 0)
            return -1;
    *err = v->result;
    return v->result ? -1 : 0;
}

void pv_vsock_stop(struct pv_vsock *v)
{
    uint64_t one = 1;
    int saved = errno;

    while (write(v->stop_fd, &one, sizeof(one)) < 0 && errno == EINTR)
        continue;
    errno = saved;
}

/* ---- making and unmaking ----------------------------------------------------------------------------------------- */

#define OR_DEFAULT(field, value) ((field) ? (field) : (value))

static int fill_config(struct pv_vsock *v, const struct pv_vsock_config *config, int *err)
{
    v->config = *config;
    v->config.max_connections = OR_DEFAULT(config->max_connections, DEFAULT_CONNECTIONS);
    v->config.window_bytes = OR_DEFAULT(config->window_bytes, DEFAULT_WINDOW);
    v->config.buffer_budget_bytes = OR_DEFAULT(config->buffer_budget_bytes, DEFAULT_BUDGET);
    v->config.request_timeout_ms = OR_DEFAULT(config->request_timeout_ms, DEFAULT_TIMEOUT_MS);
    v->config.linger_timeout_ms = OR_DEFAULT(config->linger_timeout_ms, DEFAULT_TIMEOUT_MS);
    if (config->guest_cid <= PV_HOST_CID || config->guest_cid >= UINT32_MAX ||
        (config->listen_fd < 0 && config->frontend_fd < 0)) {
        *err = EINVAL;
        return -1;
    }
    if (!config->uds_path)
        return 0;
    if (strlen(config->uds_path) >= sizeof(v->path)) {
        *err = ENAMETOOLONG;
        return -1;
    }
    strcpy(v->path, config->uds_path);
    v->config.uds_path = v->path;
    return 0;
}

static void init_sources(struct pv_vsock *v)
{
    v->stop_source.on_event = on_stop;
    v->frontend_source.on_event = on_frontend;
    v->frontend_listener.source.on_event = on_frontend_connect;
    v->host_listener.source.on_event = pv_host_accept;
    for (unsigned i = 0; i < PV_RINGS; i++)
        v->kick_sources[i].source.on_event = on_kick;
    pv_list_init(&v->all);
    pv_list_init(&v->ready);
    pv_list_init(&v->requests);
    pv_list_init(&v->lingering);
    pv_list_init(&v->dead);
}

static int open_descriptors(struct pv_vsock *v, int *err)
{
    v->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    v->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (v->epoll_fd < 0 || v->stop_fd < 0 || getrandom(&v->hash_key, sizeof(v->hash_key), 0) < 0) {
        *err = errno;
        return -1;
    }
    if (pv_watch(v, v->stop_fd, EPOLLIN, &v->stop_source, err) < 0)
        return -1;
    if (v->config.listen_fd >= 0 &&
        pv_watch(v, v->config.listen_fd, EPOLLIN, &v->frontend_listener.source, err) < 0)
        return -1;
    if (v->config.host_listener_fd >= 0 &&
        pv_watch(v, v->config.host_listener_fd, EPOLLIN, &v->host_listener.source, err) < 0)
        return -1;
    /* Last, because it takes the descriptor over. */
    return v->config.frontend_fd >= 0 ? adopt_frontend(v, v->config.frontend_fd, err) : 0;
}

int pv_vsock_create(const struct pv_vsock_config *config, struct pv_vsock **out, int *err)
{
    struct pv_vsock *v = calloc(1, sizeof(*v));

    if (!v) {
        *err = ENOMEM;
        return -1;
    }
    v->epoll_fd = v->stop_fd = v->frontend_listener.fd = v->host_listener.fd = v->fe.fd = -1;
    v->fault = "";
    init_sources(v);
    if (fill_config(v, config, err) < 0 || open_descriptors(v, err) < 0) {
        pv_vsock_destroy(v);
        return -1;
    }
    v->frontend_listener.fd = config->listen_fd;
    v->host_listener.fd = config->host_listener_fd;
    *out = v;
    return 0;
}

void pv_vsock_get_stats(const struct pv_vsock *v, struct pv_vsock_stats *out)
{
    const uint64_t *from = (const uint64_t *)&v->stats;
    uint64_t *to = (uint64_t *)out;

    for (size_t i = 0; i < sizeof(*out) / sizeof(*to); i++)
        to[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
}

const char *pv_vsock_fault(const struct pv_vsock *v)
{
    return __atomic_load_n(&v->fault, __ATOMIC_ACQUIRE);
}

static void close_if_open(int fd)
{
    if (fd >= 0)
        close(fd);
}

void pv_vsock_destroy(struct pv_vsock *v)
{
    if (!v)
        return;
    pv_conn_kill_all(v, false);
    v->host_listener.paused = false; /* so that the burial does not begin to accept again */
    pv_conn_bury(v);
    if (v->has_frontend)
        pv_fe_close(&v->fe);
    close_if_open(v->frontend_listener.fd);
    close_if_open(v->host_listener.fd);
    close_if_open(v->stop_fd);
    close_if_open(v->epoll_fd);
    free(v);
}
