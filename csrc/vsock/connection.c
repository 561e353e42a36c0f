/* Connections: making, finding, scheduling and ending them; credit. See device.h for their states. */
#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "device.h"

#define FIRST_HOST_PORT (1U << 30) /* host ports of programs' connections count up from here */
#define MIN_WINDOW 8192U
#define BUDGET_SHARE 256U /* a new window is at most this part of the budget left */

/* ---- the table --------------------------------------------------------------------------------------------------- */

/* Keyed, so that a guest cannot choose ports that all fall into one bucket. */
static unsigned bucket_of(const struct pv_vsock *v, uint32_t guest_port, uint32_t host_port)
{
    uint64_t x = (((uint64_t)guest_port << 32) | host_port) ^ v->hash_key;

    x = (x ^ (x >> 31)) * 0x7fb5d329728ea185ULL;
    x = (x ^ (x >> 27)) * 0x81dadef4bc2dd44dULL;
    return (unsigned)((x ^ (x >> 33)) % PV_BUCKETS);
}

struct pv_conn *pv_conn_find(const struct pv_vsock *v, uint32_t guest_port, uint32_t host_port)
{
    struct pv_conn *c = v->buckets[bucket_of(v, guest_port, host_port)];

    while (c && (c->guest_port != guest_port || c->host_port != host_port))
        c = c->bucket_next;
    return c;
}

void pv_conn_register(struct pv_vsock *v, struct pv_conn *c, uint32_t guest_port, uint32_t host_port)
{
    struct pv_conn **bucket = &v->buckets[bucket_of(v, guest_port, host_port)];

    c->guest_port = guest_port;
    c->host_port = host_port;
    c->bucket_next = *bucket;
    *bucket = c;
}

void pv_conn_leave_table(struct pv_vsock *v, struct pv_conn *c)
{
    struct pv_conn **at = &v->buckets[bucket_of(v, c->guest_port, c->host_port)];

    while (*at && *at != c)
        at = &(*at)->bucket_next;
    if (*at)
        *at = c->bucket_next;
    c->bucket_next = NULL;
}

uint32_t pv_conn_free_port(struct pv_vsock *v, uint32_t guest_port)
{
    do {
        if (v->next_port < FIRST_HOST_PORT || v->next_port == UINT32_MAX)
            v->next_port = FIRST_HOST_PORT;
        else
            v->next_port++;
    } while (pv_conn_find(v, guest_port, v->next_port));
    return v->next_port;
}

/* ---- making ------------------------------------------------------------------------------------------------------ */

/* A window for one more connection, or 0 when the budget is spent. They shrink as the budget goes, so that it goes
 * far. */
static uint32_t next_window(const struct pv_vsock *v)
{
    uint64_t left = v->config.buffer_budget_bytes - v->promised;
    uint64_t window = left / BUDGET_SHARE;

    if (window > v->config.window_bytes)
        window = v->config.window_bytes;
    if (window < MIN_WINDOW)
        window = MIN_WINDOW;
    return window <= left ? (uint32_t)window : 0;
}

struct pv_conn *pv_conn_new(struct pv_vsock *v, int fd, enum pv_state state, int *err)
{
    uint32_t window = next_window(v);
    struct pv_conn *c;

    if (v->connections >= v->config.max_connections || window == 0) {
        *err = ENOBUFS;
        return NULL;
    }
    c = calloc(1, sizeof(*c));
    if (!c) {
        *err = ENOMEM;
        return NULL;
    }
    c->source.on_event = pv_host_on_event;
    if (pv_watch(v, fd, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, &c->source, err) < 0) {
        free(c);
        return NULL;
    }
    c->state = state;
    c->fd = fd;
    c->window = window;
    c->batch = 1;
    c->writable = true;
    pv_list_append(&v->all, &c->all_link);
    v->connections++;
    v->promised += window;
    pv_gauge(&v->stats.connections, v->connections);
    pv_gauge(&v->stats.promised_bytes, v->promised);
    return c;
}

/* ---- scheduling -------------------------------------------------------------------------------------------------- */

uint32_t pv_conn_credit(const struct pv_conn *c)
{
    uint32_t in_flight = c->sent - c->peer_forwarded;

    return in_flight < c->peer_window ? c->peer_window - in_flight : 0;
}

/* Without credit too, until it was asked for once. */
bool pv_conn_has_data(const struct pv_conn *c)
{
    return c->state == PV_ESTABLISHED && c->readable && !c->read_closed && (pv_conn_credit(c) > 0 || !c->credit_asked);
}

bool pv_conn_wants_guest(const struct pv_conn *c)
{
    switch (c->state) {
    case PV_REQUESTED:
    case PV_ESTABLISHED:
    case PV_LINGERING:
        return c->owes || pv_conn_has_data(c);
    default:
        return false;
    }
}

void pv_conn_schedule(struct pv_vsock *v, struct pv_conn *c)
{
    bool wants = pv_conn_wants_guest(c);

    if (wants && !pv_linked(&c->ready_link))
        pv_list_append(&v->ready, &c->ready_link);
    else if (!wants)
        pv_list_remove(&c->ready_link);
    if (wants)
        v->rx_pending = true;
}

void pv_conn_owe(struct pv_vsock *v, struct pv_conn *c, unsigned packets)
{
    c->owes |= (uint8_t)packets;
    pv_conn_schedule(v, c);
}

/* The guest is told of freed credit when half of its window is free that it does not know of: it can send the other
 * half meanwhile. */
void pv_conn_forwarded(struct pv_vsock *v, struct pv_conn *c, uint32_t bytes)
{
    c->forwarded += bytes;
    if (c->forwarded - c->forward_told >= c->window / 2 && c->state == PV_ESTABLISHED)
        pv_conn_owe(v, c, PV_OWES_CREDIT_UPDATE);
}

/* ---- ending ------------------------------------------------------------------------------------------------------ */

void pv_conn_close_socket(struct pv_vsock *v, struct pv_conn *c)
{
    if (c->state == PV_ESTABLISHED || c->state == PV_DRAINING)
        pv_host_discard(v, c);
    if (c->fd >= 0)
        close(c->fd); /* leaves the epoll set with it: nobody else holds this open file */
    c->fd = -1;
    v->buffered -= c->unsent.used;
    pv_sendbuf_free(&c->unsent);
    pv_gauge(&v->stats.buffered_bytes, v->buffered);
}

void pv_conn_kill(struct pv_vsock *v, struct pv_conn *c)
{
    if (c->state == PV_DEAD)
        return;
    if (c->state == PV_REQUESTED || c->state == PV_HANDSHAKE)
        pv_count(&v->stats.refused, 1);
    pv_conn_close_socket(v, c);
    pv_conn_leave_table(v, c);
    pv_list_remove(&c->ready_link);
    pv_list_remove(&c->timer_link);
    pv_list_remove(&c->all_link);
    pv_list_append(&v->dead, &c->all_link);
    c->state = PV_DEAD;
    v->connections--;
    v->promised -= c->window;
    pv_gauge(&v->stats.connections, v->connections);
    pv_gauge(&v->stats.promised_bytes, v->promised);
}

void pv_stray_reset(struct pv_vsock *v, const struct pv_stray *stray)
{
    if (v->stray_count == PV_STRAY_MAX)
        return; /* only time-outs come here then: the guest has been told of the shutdown before, or never knew */
    v->strays[(v->stray_first + v->stray_count++) % PV_STRAY_MAX] = *stray;
    v->rx_pending = true;
}

void pv_conn_reset(struct pv_vsock *v, struct pv_conn *c)
{
    struct pv_stray stray = {
        .src_cid = PV_HOST_CID,
        .dst_cid = v->config.guest_cid,
        .src_port = c->host_port,
        .dst_port = c->guest_port,
        .type = VIRTIO_VSOCK_TYPE_STREAM,
    };

    if (!(c->owes & PV_OWES_REQUEST)) /* else the guest has not heard of it */
        pv_stray_reset(v, &stray);
    pv_conn_kill(v, c);
}

void pv_conn_linger(struct pv_vsock *v, struct pv_conn *c)
{
    pv_conn_close_socket(v, c);
    c->forwarded = c->received;
    c->state = PV_LINGERING;
    pv_conn_start_timer(v, c, &v->lingering, v->config.linger_timeout_ms);
    pv_conn_schedule(v, c);
}

void pv_conn_kill_all(struct pv_vsock *v, bool keep_handshakes)
{
    struct pv_link *link = v->all.next;

    while (link != &v->all) {
        struct pv_conn *c = pv_member(link, struct pv_conn, all_link);

        link = link->next;
        if (!keep_handshakes || c->state != PV_HANDSHAKE)
            pv_conn_kill(v, c);
    }
    v->stray_count = 0;
}

void pv_conn_bury(struct pv_vsock *v)
{
    bool any = !pv_list_empty(&v->dead);

    while (!pv_list_empty(&v->dead)) {
        struct pv_conn *c = pv_member(v->dead.next, struct pv_conn, all_link);

        pv_list_remove(&c->all_link);
        free(c);
    }
    if (any)
        pv_host_resume_accept(v);
}

/* ---- time-outs --------------------------------------------------------------------------------------------------- */

/* Each list has one duration, so it is in the order of its deadlines. */
void pv_conn_start_timer(struct pv_vsock *v, struct pv_conn *c, struct pv_link *list, uint32_t after_ms)
{
    (void)v;
    pv_list_remove(&c->timer_link);
    c->deadline_ms = pv_now_ms() + after_ms;
    pv_list_append(list, &c->timer_link);
}

static void expire_list(struct pv_vsock *v, struct pv_link *list, uint64_t now)
{
    while (!pv_list_empty(list)) {
        struct pv_conn *c = pv_member(list->next, struct pv_conn, timer_link);

        if (c->deadline_ms > now)
            return;
        if (c->state == PV_HANDSHAKE)
            pv_conn_kill(v, c);
        else
            pv_conn_reset(v, c);
    }
}

void pv_conn_expire(struct pv_vsock *v)
{
    uint64_t now;

    if (pv_list_empty(&v->requests) && pv_list_empty(&v->lingering))
        return;
    now = pv_now_ms();
    expire_list(v, &v->requests, now);
    expire_list(v, &v->lingering, now);
}

static int list_timeout_ms(const struct pv_link *list, uint64_t now)
{
    uint64_t deadline;

    if (pv_list_empty(list))
        return -1;
    deadline = pv_member(list->next, struct pv_conn, timer_link)->deadline_ms;
    return deadline > now ? (int)(deadline - now) : 0;
}

int pv_conn_next_timeout_ms(const struct pv_vsock *v)
{
    int requests, lingering;

    if (pv_list_empty(&v->requests) && pv_list_empty(&v->lingering))
        return -1;
    requests = list_timeout_ms(&v->requests, pv_now_ms());
    lingering = list_timeout_ms(&v->lingering, pv_now_ms());
    if (requests < 0 || (lingering >= 0 && lingering < requests))
        return lingering;
    return requests;
}
