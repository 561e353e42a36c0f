/* Requests that come over a connection, and replies that go back. */
#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "server_rooms.h"

#define BYTES (64u << 20)
#define KEEP (64u << 10) /* a slot keeps memory up to this between requests */
#define BATCH 128        /* segments of one sendmsg */

/* ---- replies ---- */

static void give_slot(struct pv_nbd_conn *c, struct pv_nbd_slot *slot)
{
    if (slot->capacity > KEEP) {
        c->bytes -= slot->capacity;
        free(slot->segment.iov_base);
        slot->segment.iov_base = NULL;
        slot->capacity = 0;
    }
    pv_list_append(&c->free, &slot->link);
}

static size_t payload_of(const struct pv_nbd_slot *slot)
{
    return slot->io.type == PV_IO_READ && !slot->io.error ? slot->io.length : 0;
}

static unsigned gather(struct pv_nbd_conn *c, struct iovec *out)
{
    size_t skip = c->sent;
    unsigned used = 0;

    for (struct pv_link *link = c->replies.next; link != &c->replies && used + 2 <= BATCH; link = link->next) {
        struct pv_nbd_slot *slot = pv_member(link, struct pv_nbd_slot, link);
        struct iovec whole[2] = {{&slot->reply, sizeof(slot->reply)}, {slot->segment.iov_base, payload_of(slot)}};

        used += pv_iov_cut(whole, 2, skip, UINT64_MAX, out + used, 2);
        skip = 0;
    }
    return used;
}

static void consume(struct pv_nbd_conn *c, size_t sent)
{
    c->sent += sent;
    while (!pv_list_empty(&c->replies)) {
        struct pv_nbd_slot *slot = pv_member(c->replies.next, struct pv_nbd_slot, link);
        size_t whole = sizeof(slot->reply) + payload_of(slot);

        if (c->sent < whole)
            return;
        c->sent -= whole;
        pv_list_remove(&slot->link);
        give_slot(c, slot);
    }
}

void pv_nbd_send_replies(struct pv_nbd_conn *c)
{
    struct iovec iov[BATCH];
    bool blocked = false;

    while (c->state != CLOSING && !pv_list_empty(&c->replies)) {
        struct msghdr message = {.msg_iov = iov, .msg_iovlen = gather(c, iov)};
        ssize_t sent = sendmsg(c->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);

        if (sent < 0 && errno == EINTR)
            continue;
        if (sent < 0 && errno != EAGAIN) {
            pv_nbd_close(c);
            return;
        }
        blocked = sent < 0;
        if (blocked)
            break;
        consume(c, (size_t)sent);
    }
    if (c->state != CLOSING && blocked != c->want_out) {
        c->want_out = blocked;
        pv_nbd_rewatch(c);
    }
}

void pv_nbd_flush(struct pv_task *task)
{
    struct pv_nbd_conn *c = pv_member(task, struct pv_nbd_conn, flush);

    pv_nbd_send_replies(c);
    if (c->state == TRANSMISSION && c->paused)
        pv_nbd_take_requests(c);
}

static uint32_t wire_error(int error)
{
    switch (error) { /* the errors that the protocol has, by its own numbers */
    case 0:
    case EPERM:
    case EIO:
    case ENOMEM:
    case EINVAL:
    case ENOSPC:
    case EOVERFLOW:
    case ENOTSUP:
    case ESHUTDOWN:
        return (uint32_t)error;
    case EROFS:
        return EPERM;
    default:
        return EIO;
    }
}

static void request_done(struct pv_io *io)
{
    struct pv_nbd_slot *slot = (struct pv_nbd_slot *)io;
    struct pv_nbd_conn *c = slot->connection;

    c->busy--;
    slot->reply.magic = htobe32(NBD_REPLY_MAGIC);
    slot->reply.error = htobe32(wire_error(io->error));
    if (c->state == CLOSING) {
        if (!c->busy)
            pv_nbd_bury(c);
        return;
    }
    pv_list_append(&c->replies, &slot->link);
    pv_loop_defer(c->server->instance->loop, &c->flush);
}

/* ---- requests ---- */

static unsigned entry(const struct pv_nbd_server *server)
{
    return server->below ? server->below->at + 1 : 0;
}

static void submit(struct pv_nbd_slot *slot)
{
    struct pv_nbd_conn *c = slot->connection;

    c->busy++;
    pv_nbd_count(&c->server->counts.requests);
    pv_instance_submit(c->server->instance, &slot->io, entry(c->server));
}

static const enum pv_io_type types[] = {[NBD_CMD_READ] = PV_IO_READ, [NBD_CMD_WRITE] = PV_IO_WRITE,
    [NBD_CMD_FLUSH] = PV_IO_FLUSH, [NBD_CMD_TRIM] = PV_IO_DISCARD, [NBD_CMD_WRITE_ZEROES] = PV_IO_WRITE_ZEROES};

static int make_room(struct pv_nbd_slot *slot, size_t length)
{
    void *memory;

    if (slot->capacity >= length)
        return 0;
    if (posix_memalign(&memory, 4096, length))
        return -1;
    free(slot->segment.iov_base);
    slot->segment.iov_base = memory;
    slot->connection->bytes += length - slot->capacity;
    slot->capacity = length;
    return 0;
}

/* The slot with the request in it, or NULL when the connection must wait for one (paused) or is broken. */
static struct pv_nbd_slot *start_request(struct pv_nbd_conn *c, const struct nbd_request *wire)
{
    uint32_t type = be16toh(wire->type), flags = be16toh(wire->flags), length = be32toh(wire->length);
    bool moves = type == NBD_CMD_READ || type == NBD_CMD_WRITE;
    struct pv_nbd_slot *slot;

    if (be32toh(wire->magic) != NBD_REQUEST_MAGIC || (moves && length > NBD_PAYLOAD_MAX)) {
        pv_nbd_broken(c);
        return NULL;
    }
    slot = pv_list_empty(&c->free) ? NULL : pv_member(c->free.next, struct pv_nbd_slot, link);
    if (!slot || (moves && length > slot->capacity && c->bytes - slot->capacity + length > BYTES)) {
        c->paused = true;
        return NULL;
    }
    if (moves && make_room(slot, length)) {
        pv_nbd_broken(c);
        return NULL;
    }
    pv_list_remove(&slot->link);
    slot->reply.handle = wire->handle;
    slot->segment.iov_len = length;
    slot->io.type = type < sizeof(types) / sizeof(types[0]) ? types[type] : PV_IO_TYPES;
    if (type == NBD_CMD_CACHE)
        slot->io.type = PV_IO_TYPES; /* ends with EINVAL */
    slot->io.flags = flags & NBD_CMD_FLAG_FUA ? PV_IO_FUA : 0;
    if (type == NBD_CMD_WRITE_ZEROES && !(flags & NBD_CMD_FLAG_NO_HOLE))
        slot->io.flags |= PV_IO_UNMAP;
    slot->io.offset = type == NBD_CMD_FLUSH ? 0 : be64toh(wire->offset);
    slot->io.length = type == NBD_CMD_FLUSH ? 0 : length;
    slot->io.iov = moves ? &slot->segment : NULL;
    slot->io.iov_count = moves && length ? 1 : 0;
    slot->io.done = request_done;
    return slot;
}

static void refuse(struct pv_nbd_slot *slot, int error)
{
    slot->connection->busy++;
    slot->io.error = error;
    request_done(&slot->io);
}

static void act(struct pv_nbd_slot *slot)
{
    if (slot->connection->server->read_only && slot->io.type != PV_IO_READ && slot->io.type != PV_IO_FLUSH)
        refuse(slot, EPERM);
    else
        submit(slot);
}

/* Puts what the buffer has of the payload into the slot. True: it is complete. */
static bool take_payload(struct pv_nbd_conn *c)
{
    size_t need = c->receiving->segment.iov_len - c->received, have = c->rx_end - c->rx_start;
    size_t step = have < need ? have : need;

    memcpy((uint8_t *)c->receiving->segment.iov_base + c->received, c->rx + c->rx_start, step);
    c->rx_start += step;
    c->received += step;
    return step == need;
}

static bool take_one(struct pv_nbd_conn *c)
{
    struct nbd_request wire;
    struct pv_nbd_slot *slot = c->receiving;

    if (slot) {
        if (!take_payload(c))
            return false;
        c->receiving = NULL;
        act(slot);
        return true;
    }
    if (c->rx_end - c->rx_start < sizeof(wire))
        return false;
    memcpy(&wire, c->rx + c->rx_start, sizeof(wire));
    if (be16toh(wire.type) == NBD_CMD_DISC && be32toh(wire.magic) == NBD_REQUEST_MAGIC) {
        pv_nbd_close(c);
        return false;
    }
    slot = start_request(c, &wire);
    if (!slot)
        return false;
    c->rx_start += sizeof(wire);
    if (slot->io.type == PV_IO_WRITE) {
        c->receiving = slot;
        c->received = 0;
        return true;
    }
    act(slot);
    return true;
}

void pv_nbd_take_requests(struct pv_nbd_conn *c)
{
    bool was_paused = c->paused;

    c->paused = false;
    while (c->state == TRANSMISSION && take_one(c))
        ;
    if (c->state == TRANSMISSION && was_paused != c->paused)
        pv_nbd_rewatch(c);
}
