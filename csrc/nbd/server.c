/* The server's connections. Theory of operation: server_rooms.h. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "server_rooms.h"

/* ---- ending ---- */

static void maybe_gone(struct pv_nbd_server *server)
{
    void (*closed)(void *) = server->closed;
    void *context = server->context;

    if (!server->stopping || !pv_list_empty(&server->connections))
        return;
    if (server->below)
        server->below->handles--;
    free(server);
    closed(context);
}

static void free_connection(struct pv_nbd_conn *c)
{
    struct pv_nbd_server *server = c->server;

    for (unsigned i = 0; i < PV_NBD_SLOTS; i++)
        free(c->slots[i].segment.iov_base);
    pv_list_remove(&c->link);
    free(c);
    maybe_gone(server);
}

/* A task of its own, so that nobody on the stack still uses the connection. */
static void bury(struct pv_task *task)
{
    free_connection(pv_member(task, struct pv_nbd_conn, flush));
}

void pv_nbd_bury(struct pv_nbd_conn *c)
{
    c->flush.run = bury;
    pv_loop_defer(c->server->instance->loop, &c->flush);
}

void pv_nbd_close(struct pv_nbd_conn *c)
{
    struct pv_loop *loop = c->server->instance->loop;

    if (c->state == CLOSING)
        return;
    c->state = CLOSING;
    pv_loop_unwatch(loop, c->fd, &c->event);
    close(c->fd);
    c->fd = -1;
    if (!c->busy)
        pv_nbd_bury(c);
}

void pv_nbd_broken(struct pv_nbd_conn *c)
{
    pv_nbd_count(&c->server->counts.refused);
    pv_nbd_close(c);
}

void pv_nbd_rewatch(struct pv_nbd_conn *c)
{
    int err;
    uint32_t events = (c->paused ? 0 : EPOLLIN) | (c->want_out ? EPOLLOUT : 0);

    if (pv_loop_rewatch(c->server->instance->loop, c->fd, events, &c->event, &err))
        pv_nbd_broken(c);
}

/* ---- the socket ---- */

static void take_input(struct pv_nbd_conn *c)
{
    while (c->state < TRANSMISSION)
        if (!pv_nbd_shake(c))
            return;
    if (c->state == TRANSMISSION)
        pv_nbd_take_requests(c);
}

static ssize_t receive(struct pv_nbd_conn *c)
{
    struct iovec iov[2];
    struct msghdr message = {.msg_iov = iov};

    if (c->rx_start) {
        memmove(c->rx, c->rx + c->rx_start, c->rx_end - c->rx_start);
        c->rx_end -= c->rx_start;
        c->rx_start = 0;
    }
    /* The buffer is empty then: the payload goes where it belongs, what follows it into the buffer. */
    if (c->receiving) {
        iov[message.msg_iovlen++] = (struct iovec){(uint8_t *)c->receiving->segment.iov_base + c->received,
            c->receiving->segment.iov_len - c->received};
    }
    iov[message.msg_iovlen++] = (struct iovec){c->rx + c->rx_end, PV_NBD_RX - c->rx_end};
    return recvmsg(c->fd, &message, MSG_DONTWAIT);
}

static void on_readable(struct pv_nbd_conn *c)
{
    ssize_t got = receive(c);

    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (got <= 0) {
        pv_nbd_close(c);
        return;
    }
    if (c->receiving) {
        size_t need = c->receiving->segment.iov_len - c->received, step = (size_t)got < need ? (size_t)got : need;

        c->received += step;
        got -= (ssize_t)step;
    }
    c->rx_end += (size_t)got;
    take_input(c);
}

static void on_connection(struct pv_event *event, uint32_t events)
{
    struct pv_nbd_conn *c = pv_member(event, struct pv_nbd_conn, event);

    if (events & EPOLLOUT)
        pv_nbd_send_replies(c);
    if (c->state != CLOSING && events & (EPOLLIN | EPOLLHUP | EPOLLERR)) {
        if (c->paused && events & (EPOLLHUP | EPOLLERR))
            pv_nbd_close(c);
        else if (!c->paused)
            on_readable(c);
    }
}

static void on_listener(struct pv_event *event, uint32_t events)
{
    struct pv_nbd_server *server = pv_member(event, struct pv_nbd_server, event);
    int fd = accept4(server->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK), err;
    struct pv_nbd_conn *c;

    (void)events;
    if (fd < 0)
        return;
    c = calloc(1, sizeof(*c));
    if (!c || pv_loop_watch(server->instance->loop, fd, EPOLLIN, &c->event, &err)) {
        free(c);
        close(fd);
        return;
    }
    c->event.ready = on_connection;
    c->flush.run = pv_nbd_flush;
    c->server = server;
    c->fd = fd;
    pv_list_init(&c->free);
    pv_list_init(&c->replies);
    for (unsigned i = 0; i < PV_NBD_SLOTS; i++) {
        c->slots[i].connection = c;
        pv_list_append(&c->free, &c->slots[i].link);
    }
    pv_list_append(&server->connections, &c->link);
    pv_nbd_count(&server->counts.connections);
    pv_nbd_greet(c);
}

struct pv_nbd_server *pv_nbd_serve(struct pv_instance *instance, struct pv_filter *below, const char *name,
    int listener, bool read_only, struct pv_fail *fail)
{
    struct pv_nbd_server *server = calloc(1, sizeof(*server));
    int err;

    if (!server || strlen(name) >= sizeof(server->name) ||
        pv_loop_watch(instance->loop, listener, EPOLLIN, &server->event, &err)) {
        pv_fail(fail, server ? EINVAL : ENOMEM, "cannot serve disk %s as %.64s", instance->name, name);
        free(server);
        close(listener);
        return NULL;
    }
    server->event.ready = on_listener;
    server->instance = instance;
    server->below = below;
    server->listener = listener;
    server->read_only = read_only || instance->read_only;
    strcpy(server->name, name);
    pv_list_init(&server->connections);
    if (below)
        below->handles++;
    return server;
}

void pv_nbd_stop(struct pv_nbd_server *server, void (*closed)(void *context), void *context)
{
    struct pv_link *next;

    server->stopping = true;
    server->closed = closed;
    server->context = context;
    pv_loop_unwatch(server->instance->loop, server->listener, &server->event);
    close(server->listener);
    for (struct pv_link *link = server->connections.next; link != &server->connections; link = next) {
        next = link->next;
        pv_nbd_close(pv_member(link, struct pv_nbd_conn, link));
    }
    maybe_gone(server);
}

struct pv_nbd_counts pv_nbd_counts(const struct pv_nbd_server *server)
{
    return (struct pv_nbd_counts){__atomic_load_n(&server->counts.connections, __ATOMIC_RELAXED),
        __atomic_load_n(&server->counts.requests, __ATOMIC_RELAXED),
        __atomic_load_n(&server->counts.refused, __ATOMIC_RELAXED)};
}
