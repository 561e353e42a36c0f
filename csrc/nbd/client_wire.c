/* What goes over the client's connection. */
#include <endian.h>
#include <errno.h>
#include <sys/socket.h>

#include "client_rooms.h"

#define BATCH 128 /* segments of one sendmsg */

/* ---- sending ---- */

static size_t wire_size(const struct pv_nbd_call *call)
{
    return sizeof(call->wire) + (call->io->type == PV_IO_WRITE ? call->io->length : 0);
}

static unsigned gather(struct pv_nbd_client *c, struct iovec *out)
{
    size_t skip = c->skip;
    unsigned used = 0;

    for (struct pv_link *link = c->queued.next; link != &c->queued && used < BATCH; link = link->next) {
        struct pv_nbd_call *call = pv_member(link, struct pv_nbd_call, link);
        struct iovec head = {&call->wire, sizeof(call->wire)};
        unsigned count = pv_iov_cut(&head, 1, skip, UINT64_MAX, out + used, 1);

        used += count;
        skip = count ? 0 : skip - sizeof(call->wire);
        if (call->io->type == PV_IO_WRITE)
            used += pv_iov_cut(call->io->iov, call->io->iov_count, skip, UINT64_MAX, out + used, BATCH - used);
        skip = 0;
    }
    return used;
}

static void consume(struct pv_nbd_client *c, size_t sent)
{
    c->skip += sent;
    while (!pv_list_empty(&c->queued)) {
        struct pv_nbd_call *call = pv_member(c->queued.next, struct pv_nbd_call, link);

        if (c->skip < wire_size(call))
            return;
        c->skip -= wire_size(call);
        pv_list_remove(&call->link);
        call->sent = true;
        pv_list_append(&c->sent, &call->link);
    }
}

static void watch_out(struct pv_nbd_client *c, bool want)
{
    int err;

    if (c->want_out == want)
        return;
    c->want_out = want;
    if (pv_loop_rewatch(c->data.loop, c->fd, EPOLLIN | (want ? EPOLLOUT : 0), &c->event, &err))
        pv_nbd_lost(c);
}

static void send_queued(struct pv_nbd_client *c)
{
    struct iovec iov[BATCH];

    while (c->state == UP && !pv_list_empty(&c->queued)) {
        struct msghdr message = {.msg_iov = iov, .msg_iovlen = gather(c, iov)};
        ssize_t sent = sendmsg(c->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);

        if (sent >= 0) {
            consume(c, (size_t)sent);
        } else if (errno == EAGAIN) {
            watch_out(c, true);
            return;
        } else if (errno != EINTR) {
            pv_nbd_lost(c);
            return;
        }
    }
    if (c->state == UP)
        watch_out(c, false);
}

void pv_nbd_client_flush(struct pv_task *task)
{
    send_queued(pv_member(task, struct pv_nbd_client, flush));
}

/* ---- receiving ---- */

static struct pv_nbd_call *find(struct pv_nbd_client *c)
{
    uint64_t index = be64toh(c->reply.handle);

    if (be32toh(c->reply.magic) != NBD_REPLY_MAGIC || index >= PV_NBD_CALLS || !c->calls[index].sent)
        return NULL;
    return &c->calls[index];
}

static int host_error(uint32_t wire)
{
    uint32_t error = be32toh(wire);

    return error > 4095 ? EIO : (int)error;
}

/* A reply's head is complete. False: the server broke a rule. */
static bool take_head(struct pv_nbd_client *c)
{
    struct pv_nbd_call *call = find(c);
    int error;

    if (!call)
        return false;
    error = host_error(c->reply.error);
    c->reply_have = 0;
    if (call->io->type == PV_IO_READ && !error && call->io->length) {
        c->receiving = call;
        c->payload_have = 0;
    } else {
        pv_nbd_end_call(c, call, error);
    }
    return true;
}

/* One recvmsg: the rest of what is being received and, behind a payload, the next head. */
static ssize_t receive(struct pv_nbd_client *c)
{
    struct iovec iov[BATCH + 1];
    struct msghdr message = {.msg_iov = iov};
    uint64_t left = 0, planned = 0;

    if (c->receiving) {
        const struct pv_io *io = c->receiving->io;

        left = io->length - c->payload_have;
        message.msg_iovlen = pv_iov_cut(io->iov, io->iov_count, c->payload_have, left, iov, BATCH);
        for (size_t i = 0; i < message.msg_iovlen; i++)
            planned += iov[i].iov_len;
    }
    if (planned == left)
        iov[message.msg_iovlen++] =
            (struct iovec){(uint8_t *)&c->reply + c->reply_have, sizeof(c->reply) - c->reply_have};
    return recvmsg(c->fd, &message, MSG_DONTWAIT);
}

static void take_bytes(struct pv_nbd_client *c, size_t got)
{
    if (c->receiving) {
        struct pv_nbd_call *call = c->receiving;
        uint64_t left = call->io->length - c->payload_have, step = got < left ? got : left;

        c->payload_have += step;
        got -= step;
        if (step < left)
            return;
        c->receiving = NULL;
        c->reply_have = got; /* before the end of the request, which may submit others */
        pv_nbd_end_call(c, call, 0);
    } else {
        c->reply_have += got;
    }
    if (c->state == UP && c->reply_have == sizeof(c->reply) && !take_head(c))
        pv_nbd_lost(c);
}

#define RECEIVES 64 /* a turn: others on the loop have theirs */

void pv_nbd_on_socket(struct pv_event *event, uint32_t events)
{
    struct pv_nbd_client *c = pv_member(event, struct pv_nbd_client, event);

    if (events & EPOLLOUT)
        send_queued(c);
    for (unsigned i = 0; i < RECEIVES && c->state == UP; i++) {
        ssize_t got = receive(c);

        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0 && errno == EAGAIN)
            break;
        if (got <= 0)
            pv_nbd_lost(c);
        else
            take_bytes(c, (size_t)got);
    }
    pv_nbd_queue_waiting(c);
}
