/* The host's side of the device: programs that connect, and reading from and writing to their sockets.
 *
 * Theory of operation
 * -------------------
 * A program connects to the host listener and writes "CONNECT <port>\n". Just that line is taken from the socket (the
 * rest stays there for the guest), REQUEST goes to the guest, and when it agrees the program reads "OK <host port>\n"
 * and then the stream. When it does not agree, or not in time, the program reads end of file instead. A guest that
 * connects to host port N reaches the Unix socket "<uds_path>_N". (The "hybrid" protocol of Firecracker's
 * docs/vsock.md.)
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "common/cleanup.h"
#include "device.h"

#define ACCEPTS_A_TURN 64
#define DISCARDS_MAX 256

/* ---- the handshake ----------------------------------------------------------------------------------------------- */

/* Takes the line from the socket and no byte more. 1: it is complete; 0: not yet; -1: too long, closed or failed. */
static int read_line(struct pv_conn *c)
{
    for (;;) {
        size_t room = sizeof(c->line) - c->line_len;
        ssize_t got = room > 0 ? recv(c->fd, c->line + c->line_len, room, MSG_PEEK | MSG_DONTWAIT) : -1;
        char *end;

        if (got < 0 && room > 0 && (errno == EAGAIN || errno == EINTR)) {
            c->readable = false;
            return 0;
        }
        if (got <= 0)
            return -1;
        end = memchr(c->line + c->line_len, '\n', (size_t)got);
        size_t take = end ? (size_t)(end - (c->line + c->line_len)) + 1 : (size_t)got;

        if (recv(c->fd, c->line + c->line_len, take, MSG_DONTWAIT) != (ssize_t)take)
            return -1;
        c->line_len += (unsigned)take;
        if (end)
            return 1;
    }
}

/* "CONNECT <decimal port>\n", and nothing else. */
static bool parse_line(const struct pv_conn *c, uint32_t *port)
{
    static const char verb[] = "CONNECT ";
    unsigned at = sizeof(verb) - 1, digits = 0;
    uint64_t value = 0;

    if (c->line_len <= at || memcmp(c->line, verb, at))
        return false;
    for (; at < c->line_len && c->line[at] >= '0' && c->line[at] <= '9' && digits < 10; at++, digits++)
        value = value * 10 + (uint64_t)(c->line[at] - '0');
    if (at < c->line_len && c->line[at] == '\r')
        at++;
    *port = (uint32_t)value;
    return digits > 0 && value < UINT32_MAX && at + 1 == c->line_len && c->line[at] == '\n';
}

static void continue_handshake(struct pv_vsock *v, struct pv_conn *c)
{
    int complete = read_line(c);
    uint32_t port;

    if (complete == 0)
        return;
    if (complete < 0 || !parse_line(c, &port)) {
        pv_conn_kill(v, c);
        return;
    }
    c->state = PV_REQUESTED;
    pv_conn_register(v, c, port, pv_conn_free_port(v, port));
    pv_conn_owe(v, c, PV_OWES_REQUEST);
}

/* ---- accepting --------------------------------------------------------------------------------------------------- */

/* A listener that cannot be served is not waited for: it would be ready all the time. A connection that ends makes it
 * work again. */
static void pause_accept(struct pv_vsock *v)
{
    if (epoll_ctl(v->epoll_fd, EPOLL_CTL_DEL, v->host_listener.fd, NULL) == 0)
        v->host_listener.paused = true;
}

void pv_host_resume_accept(struct pv_vsock *v)
{
    int err;

    if (v->host_listener.paused && pv_watch(v, v->host_listener.fd, EPOLLIN, &v->host_listener.source, &err) == 0)
        v->host_listener.paused = false;
}

void pv_host_accept(struct pv_vsock *v, struct pv_source *source, uint32_t events)
{
    (void)source;
    (void)events;
    for (int i = 0; i < ACCEPTS_A_TURN; i++) {
        int err;

        if (v->connections >= v->config.max_connections) {
            pause_accept(v);
            return;
        }
        cleanup_fd int fd = accept4(v->host_listener.fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);

        if (fd < 0) {
            if (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS)
                pause_accept(v);
            return;
        }
        struct pv_conn *c = pv_conn_new(v, fd, PV_HANDSHAKE, &err);

        if (!c) {
            pv_count(&v->stats.refused, 1);
            continue;
        }
        steal_fd(&fd);
        pv_conn_start_timer(v, c, &v->requests, v->config.request_timeout_ms);
        continue_handshake(v, c); /* the line is mostly there already: a program writes it as soon as it is connected */
    }
}

void pv_host_established(struct pv_vsock *v, struct pv_conn *c)
{
    char answer[32];
    int len = snprintf(answer, sizeof(answer), "OK %u\n", c->host_port);

    pv_list_remove(&c->timer_link);
    c->state = PV_ESTABLISHED;
    pv_count(&v->stats.opened_by_host, 1);
    /* The socket's buffer is empty: a failure means that the program has gone, which the next event says too. */
    if (send(c->fd, answer, (size_t)len, MSG_NOSIGNAL | MSG_DONTWAIT) != len)
        c->write_closed = true;
    pv_conn_schedule(v, c);
}

int pv_host_connect(struct pv_vsock *v, uint32_t port, int *err)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    cleanup_fd int fd = -1;
    int len;

    if (!v->config.uds_path) {
        *err = ECONNREFUSED;
        return -1;
    }
    len = snprintf(address.sun_path, sizeof(address.sun_path), "%s_%u", v->config.uds_path, port);
    if (len < 0 || (size_t)len >= sizeof(address.sun_path)) {
        *err = ENAMETOOLONG;
        return -1;
    }
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0) {
        *err = errno;
        return -1;
    }
    return steal_fd(&fd);
}

/* ---- the guest's data -------------------------------------------------------------------------------------------- */

static ssize_t send_some(struct pv_conn *c, const struct iovec *iov, unsigned count)
{
    struct msghdr mh = {.msg_iov = (struct iovec *)iov, .msg_iovlen = count};
    ssize_t sent;

    do {
        sent = sendmsg(c->fd, &mh, MSG_NOSIGNAL | MSG_DONTWAIT);
    } while (sent < 0 && errno == EINTR);
    if (sent >= 0)
        return sent;
    c->writable = false;
    if (errno != EAGAIN)
        c->write_closed = true;
    return 0;
}

/* The program takes no more: the guest is told, and what it has sent, or sends before it listens, counts as
 * forwarded. */
static void give_up_writing(struct pv_vsock *v, struct pv_conn *c)
{
    uint32_t dropped = (uint32_t)c->unsent.used;

    v->buffered -= c->unsent.used;
    pv_sendbuf_free(&c->unsent);
    pv_gauge(&v->stats.buffered_bytes, v->buffered);
    if (c->state == PV_DRAINING) {
        pv_conn_kill(v, c);
        return;
    }
    pv_conn_forwarded(v, c, dropped);
    if (c->state == PV_ESTABLISHED && !(c->host_shut & VIRTIO_VSOCK_SHUTDOWN_RCV)) {
        c->host_shut |= VIRTIO_VSOCK_SHUTDOWN_RCV;
        pv_conn_owe(v, c, PV_OWES_SHUTDOWN);
    }
}

void pv_host_send(struct pv_vsock *v, struct pv_conn *c, const struct iovec *iov, unsigned count, size_t len)
{
    struct iovec rest[PV_SEGMENTS_MAX];
    size_t sent = 0;

    if (!c->write_closed && c->writable && c->unsent.used == 0) {
        sent = (size_t)send_some(c, iov, count);
        pv_count(&v->stats.bytes_to_host, sent);
    }
    if (c->write_closed) {
        pv_conn_forwarded(v, c, (uint32_t)len);
        give_up_writing(v, c);
        return;
    }
    if (sent > 0)
        pv_conn_forwarded(v, c, (uint32_t)sent);
    if (sent == len)
        return;
    count = pv_iov_cut(iov, count, sent, len - sent, rest, PV_SEGMENTS_MAX);
    if (pv_sendbuf_append(&c->unsent, rest, count, len - sent, c->window) < 0) {
        pv_conn_reset(v, c);
        return;
    }
    v->buffered += len - sent;
    pv_gauge(&v->stats.buffered_bytes, v->buffered);
    /* A short write without EAGAIN: the buffer was full for a moment only, and no edge may come. */
    if (c->writable)
        pv_host_on_event(v, &c->source, EPOLLOUT);
}

/* Closing a Unix socket with unread bytes would give the program ECONNRESET where the guest meant end of file. */
void pv_host_discard(struct pv_vsock *v, struct pv_conn *c)
{
    shutdown(c->fd, SHUT_RD); /* from here on the program's writes fail, so this ends */
    for (int i = 0; i < DISCARDS_MAX; i++)
        if (recv(c->fd, v->scratch, sizeof(v->scratch), MSG_DONTWAIT) <= 0)
            return;
}

void pv_host_shut_write(struct pv_vsock *v, struct pv_conn *c)
{
    (void)v;
    if (c->fd >= 0 && c->unsent.used == 0 && (c->guest_shut & VIRTIO_VSOCK_SHUTDOWN_SEND))
        shutdown(c->fd, SHUT_WR);
}

static void drain_unsent(struct pv_vsock *v, struct pv_conn *c)
{
    while (c->unsent.used > 0 && c->writable && !c->write_closed) {
        struct iovec iov[2];
        unsigned count = pv_sendbuf_iov(&c->unsent, iov);
        size_t sent = (size_t)send_some(c, iov, count);

        pv_sendbuf_consume(&c->unsent, sent);
        v->buffered -= sent;
        pv_count(&v->stats.bytes_to_host, sent);
        pv_conn_forwarded(v, c, (uint32_t)sent);
    }
    pv_gauge(&v->stats.buffered_bytes, v->buffered);
    if (c->write_closed)
        give_up_writing(v, c);
    else if (c->unsent.used == 0 && c->state == PV_DRAINING)
        pv_conn_kill(v, c);
    else if (c->unsent.used == 0)
        pv_host_shut_write(v, c);
}

/* ---- events ------------------------------------------------------------------------------------------------------ */

/* The program is gone for good. Data that it left in the socket is still read, unless the guest does not want it. */
static void on_hangup(struct pv_vsock *v, struct pv_conn *c)
{
    c->write_closed = true;
    if (c->state == PV_REQUESTED || c->state == PV_DRAINING) {
        if (c->state == PV_REQUESTED)
            pv_conn_reset(v, c);
        else
            pv_conn_kill(v, c);
        return;
    }
    if (c->state != PV_ESTABLISHED)
        return;
    give_up_writing(v, c);
    if (c->read_closed) {
        c->host_shut = VIRTIO_VSOCK_SHUTDOWN_RCV | VIRTIO_VSOCK_SHUTDOWN_SEND;
        pv_conn_owe(v, c, PV_OWES_SHUTDOWN);
    }
}

void pv_host_on_event(struct pv_vsock *v, struct pv_source *source, uint32_t events)
{
    struct pv_conn *c = (struct pv_conn *)source;

    if (c->state == PV_DEAD || c->fd < 0)
        return; /* ended earlier in this turn */
    if (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR))
        c->readable = true;
    if (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR))
        c->hangup = true;
    if (events & EPOLLOUT)
        c->writable = true;
    if (c->state == PV_HANDSHAKE) {
        if (c->readable)
            continue_handshake(v, c);
        return;
    }
    if ((events & EPOLLOUT) && c->unsent.used > 0)
        drain_unsent(v, c);
    if ((events & (EPOLLHUP | EPOLLERR)) && c->state != PV_DEAD)
        on_hangup(v, c);
    if (c->state != PV_DEAD)
        pv_conn_schedule(v, c);
}
