/* The server's side. One connection is a state machine on the loop:
 *
 *     FLAGS (4 bytes) -> OPTION (16) -> BODY (its length) -> OPTION ... -> TRANSMISSION -> (CLOSING) -> gone
 *
 * TRANSMISSION reads what there is into one buffer and takes requests out of it; the payload of a write that is not
 * all there goes on straight
 * into the request's own memory. Replies that are due at the end of a turn go out in one sendmsg. A connection has
 * SLOTS requests in flight at
 * most, and BYTES of payload; it is not read while it is at a limit, so a client that sends and does not read costs
 * no more than that.
 *
 * Invariants: a slot is free, receiving (one at most), with the instance, or on `replies`; a connection is freed when
 * it is CLOSING and none of
 * its slots is with the instance.
 */
#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "nbd.h"
#include "protocol.h"

#define SLOTS 64
#define BYTES (64u << 20)
#define KEEP (64u << 10) /* a slot keeps memory up to this between requests */
#define RX (128u << 10)
#define BATCH 128 /* segments of one sendmsg */

enum state { FLAGS, OPTION, BODY, TRANSMISSION, CLOSING };

struct slot {
    struct pv_io io; /* first: done finds it by this */
    struct connection *connection;
    struct iovec segment;
    struct nbd_reply reply;
    size_t capacity;
    struct pv_link link; /* on free or replies */
};

struct connection {
    struct pv_event event;
    struct pv_nbd_server *server;
    struct pv_link link;
    int fd;
    enum state state;
    bool no_zeroes, paused, want_out, entered;
    struct nbd_option option;
    struct slot *receiving;
    size_t received; /* of its payload */
    unsigned busy;   /* slots with the instance */
    size_t bytes;    /* of payload memory, all slots together */
    struct pv_link free, replies;
    size_t sent; /* of the first reply */
    struct pv_task flush;
    size_t rx_start, rx_end;
    uint8_t rx[RX];
    struct slot slots[SLOTS];
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

static void count(uint64_t *counter)
{
    __atomic_store_n(counter, *counter + 1, __ATOMIC_RELAXED);
}

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

static void free_connection(struct connection *c)
{
    struct pv_nbd_server *server = c->server;

    for (unsigned i = 0; i < SLOTS; i++)
        free(c->slots[i].segment.iov_base);
    pv_list_remove(&c->link);
    free(c);
    maybe_gone(server);
}

/* A task of its own, so that nobody on the stack still uses the connection. */
static void bury(struct pv_task *task)
{
    free_connection(pv_member(task, struct connection, flush));
}

static void close_connection(struct connection *c)
{
    struct pv_loop *loop = c->server->instance->loop;

    if (c->state == CLOSING)
        return;
    c->state = CLOSING;
    pv_loop_unwatch(loop, c->fd, &c->event);
    close(c->fd);
    c->fd = -1;
    if (!c->busy) {
        c->flush.run = bury;
        pv_loop_defer(loop, &c->flush);
    }
}

static void broken(struct connection *c)
{
    count(&c->server->counts.refused);
    close_connection(c);
}

static void rewatch(struct connection *c)
{
    int err;
    uint32_t events = (c->paused ? 0 : EPOLLIN) | (c->want_out ? EPOLLOUT : 0);

    if (pv_loop_rewatch(c->server->instance->loop, c->fd, events, &c->event, &err))
        broken(c);
}

/* ---- replies ---- */

static void give_slot(struct connection *c, struct slot *slot)
{
    if (slot->capacity > KEEP) {
        c->bytes -= slot->capacity;
        free(slot->segment.iov_base);
        slot->segment.iov_base = NULL;
        slot->capacity = 0;
    }
    pv_list_append(&c->free, &slot->link);
}

static size_t payload_of(const struct slot *slot)
{
    return slot->io.type == PV_IO_READ && !slot->io.error ? slot->io.length : 0;
}

static unsigned gather(struct connection *c, struct iovec *out)
{
    size_t skip = c->sent;
    unsigned used = 0;

    for (struct pv_link *link = c->replies.next; link != &c->replies && used + 2 <= BATCH; link = link->next) {
        struct slot *slot = pv_member(link, struct slot, link);
        struct iovec whole[2] = {{&slot->reply, sizeof(slot->reply)}, {slot->segment.iov_base, payload_of(slot)}};

        used += pv_iov_cut(whole, 2, skip, UINT64_MAX, out + used, 2);
        skip = 0;
    }
    return used;
}

static void consume(struct connection *c, size_t sent)
{
    c->sent += sent;
    while (!pv_list_empty(&c->replies)) {
        struct slot *slot = pv_member(c->replies.next, struct slot, link);
        size_t whole = sizeof(slot->reply) + payload_of(slot);

        if (c->sent < whole)
            return;
        c->sent -= whole;
        pv_list_remove(&slot->link);
        give_slot(c, slot);
    }
}

static void take_requests(struct connection *c);

static void send_replies(struct connection *c)
{
    struct iovec iov[BATCH];
    bool blocked = false;

    while (c->state != CLOSING && !pv_list_empty(&c->replies)) {
        struct msghdr message = {.msg_iov = iov, .msg_iovlen = gather(c, iov)};
        ssize_t sent = sendmsg(c->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);

        if (sent < 0 && errno == EINTR)
            continue;
        if (sent < 0 && errno != EAGAIN) {
            close_connection(c);
            return;
        }
        blocked = sent < 0;
        if (blocked)
            break;
        consume(c, (size_t)sent);
    }
    if (c->state != CLOSING && blocked != c->want_out) {
        c->want_out = blocked;
        rewatch(c);
    }
}

static void flush(struct pv_task *task)
{
    struct connection *c = pv_member(task, struct connection, flush);

    send_replies(c);
    if (c->state == TRANSMISSION && c->paused)
        take_requests(c);
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
    struct slot *slot = (struct slot *)io;
    struct connection *c = slot->connection;

    c->busy--;
    slot->reply.magic = htobe32(NBD_REPLY_MAGIC);
    slot->reply.error = htobe32(wire_error(io->error));
    if (c->state == CLOSING) {
        if (!c->busy) {
            c->flush.run = bury;
            pv_loop_defer(c->server->instance->loop, &c->flush);
        }
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

static void submit(struct slot *slot)
{
    struct connection *c = slot->connection;

    c->busy++;
    count(&c->server->counts.requests);
    pv_instance_submit(c->server->instance, &slot->io, entry(c->server));
}

static const enum pv_io_type types[] = {[NBD_CMD_READ] = PV_IO_READ, [NBD_CMD_WRITE] = PV_IO_WRITE,
    [NBD_CMD_FLUSH] = PV_IO_FLUSH, [NBD_CMD_TRIM] = PV_IO_DISCARD, [NBD_CMD_WRITE_ZEROES] = PV_IO_WRITE_ZEROES};

static int make_room(struct slot *slot, size_t length)
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
static struct slot *start_request(struct connection *c, const struct nbd_request *wire)
{
    uint32_t type = be16toh(wire->type), flags = be16toh(wire->flags), length = be32toh(wire->length);
    bool moves = type == NBD_CMD_READ || type == NBD_CMD_WRITE;
    struct slot *slot;

    if (be32toh(wire->magic) != NBD_REQUEST_MAGIC || (moves && length > NBD_PAYLOAD_MAX)) {
        broken(c);
        return NULL;
    }
    slot = pv_list_empty(&c->free) ? NULL : pv_member(c->free.next, struct slot, link);
    if (!slot || (moves && length > slot->capacity && c->bytes - slot->capacity + length > BYTES)) {
        c->paused = true;
        return NULL;
    }
    if (moves && make_room(slot, length)) {
        broken(c);
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

static void refuse(struct slot *slot, int error)
{
    slot->connection->busy++;
    slot->io.error = error;
    request_done(&slot->io);
}

static void act(struct slot *slot)
{
    if (slot->connection->server->read_only && slot->io.type != PV_IO_READ && slot->io.type != PV_IO_FLUSH)
        refuse(slot, EPERM);
    else
        submit(slot);
}

/* Puts what the buffer has of the payload into the slot. True: it is complete. */
static bool take_payload(struct connection *c)
{
    size_t need = c->receiving->segment.iov_len - c->received, have = c->rx_end - c->rx_start;
    size_t step = have < need ? have : need;

    memcpy((uint8_t *)c->receiving->segment.iov_base + c->received, c->rx + c->rx_start, step);
    c->rx_start += step;
    c->received += step;
    return step == need;
}

static bool take_one(struct connection *c)
{
    struct nbd_request wire;
    struct slot *slot = c->receiving;

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
        close_connection(c);
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

static void take_requests(struct connection *c)
{
    bool was_paused = c->paused;

    c->paused = false;
    while (c->state == TRANSMISSION && take_one(c))
        ;
    if (c->state == TRANSMISSION && was_paused != c->paused)
        rewatch(c);
}

/* ---- handshake ---- */

static void say(struct connection *c, const void *data, size_t length)
{
    /* A few hundred bytes to a socket that is empty: one that cannot take them has a client that does not play by the
     * rules. */
    if (c->state != CLOSING && send(c->fd, data, length, MSG_NOSIGNAL | MSG_DONTWAIT) != (ssize_t)length)
        broken(c);
}

static void answer(struct connection *c, uint32_t type, const void *data, uint32_t length)
{
    struct {
        struct nbd_option_reply head;
        uint8_t data[512];
    } __attribute__((packed)) reply = {.head = {htobe64(NBD_OPTION_REPLY_MAGIC), c->option.option, htobe32(type), htobe32(length)}};

    if (length)
        memcpy(reply.data, data, length);
    say(c, &reply, sizeof(reply.head) + length);
}

static uint16_t export_flags(const struct pv_nbd_server *server)
{
    unsigned flags = NBD_HAS_FLAGS | NBD_SEND_FLUSH | NBD_SEND_FUA | NBD_CAN_MULTI_CONN;

    if (server->read_only)
        flags |= NBD_READ_ONLY;
    else
        flags |= NBD_SEND_TRIM | NBD_SEND_WRITE_ZEROES;
    return (uint16_t)flags;
}

static uint64_t export_size(const struct pv_nbd_server *server)
{
    return server->below ? server->below->below : server->instance->size;
}

static bool is_our_name(const struct pv_nbd_server *server, const uint8_t *name, size_t length)
{
    return !length || (length == strlen(server->name) && !memcmp(name, server->name, length));
}

static void answer_info(struct connection *c, const uint8_t *body, uint32_t length, bool go)
{
    struct {
        uint16_t type;
        uint64_t size;
        uint16_t flags;
    } __attribute__((packed)) export = {htobe16(NBD_INFO_EXPORT), htobe64(export_size(c->server)), htobe16(export_flags(c->server))};
    struct {
        uint16_t type;
        uint32_t least, preferred, most;
    } __attribute__((packed)) block = {htobe16(NBD_INFO_BLOCK_SIZE), htobe32(c->server->instance->block_size), htobe32(4096),
        htobe32(NBD_PAYLOAD_MAX)};
    uint32_t name_length;

    if (length < 6) {
        answer(c, NBD_REP_ERR_INVALID, NULL, 0);
        return;
    }
    memcpy(&name_length, body, sizeof(name_length));
    name_length = be32toh(name_length);
    if (name_length > length - 6) {
        answer(c, NBD_REP_ERR_INVALID, NULL, 0);
        return;
    }
    if (!is_our_name(c->server, body + 4, name_length)) {
        answer(c, NBD_REP_ERR_UNKNOWN, NULL, 0);
        return;
    }
    answer(c, NBD_REP_INFO, &export, sizeof(export));
    answer(c, NBD_REP_INFO, &block, sizeof(block));
    answer(c, NBD_REP_ACK, NULL, 0);
    if (go && c->state != CLOSING)
        c->state = TRANSMISSION;
}

static void answer_export_name(struct connection *c, const uint8_t *body, uint32_t length)
{
    struct {
        uint64_t size;
        uint16_t flags;
        uint8_t zeroes[124];
    } __attribute__((packed)) reply = {.size = htobe64(export_size(c->server)), .flags = htobe16(export_flags(c->server))};

    if (!is_our_name(c->server, body, length)) { /* this option has no way to say no */
        broken(c);
        return;
    }
    say(c, &reply, c->no_zeroes ? 10 : sizeof(reply));
    if (c->state != CLOSING)
        c->state = TRANSMISSION;
}

static void answer_list(struct connection *c)
{
    uint8_t entry_bytes[4 + sizeof(c->server->name)];
    uint32_t length = (uint32_t)strlen(c->server->name), wire = htobe32(length);

    memcpy(entry_bytes, &wire, 4);
    memcpy(entry_bytes + 4, c->server->name, length);
    answer(c, NBD_REP_SERVER, entry_bytes, 4 + length);
    answer(c, NBD_REP_ACK, NULL, 0);
}

static void on_option(struct connection *c, const uint8_t *body, uint32_t length)
{
    c->state = OPTION;
    switch (be32toh(c->option.option)) {
    case NBD_OPT_EXPORT_NAME:
        answer_export_name(c, body, length);
        break;
    case NBD_OPT_GO:
    case NBD_OPT_INFO:
        answer_info(c, body, length, be32toh(c->option.option) == NBD_OPT_GO);
        break;
    case NBD_OPT_LIST:
        answer_list(c);
        break;
    case NBD_OPT_ABORT:
        answer(c, NBD_REP_ACK, NULL, 0);
        close_connection(c);
        break;
    default:
        answer(c, NBD_REP_ERR_UNSUP, NULL, 0);
    }
}

/* One step of the handshake. False: more bytes are needed. */
static bool shake(struct connection *c)
{
    size_t have = c->rx_end - c->rx_start;
    const uint8_t *at = c->rx + c->rx_start;
    uint32_t length = be32toh(c->option.length), flags;

    if (c->state == FLAGS) {
        if (have < 4)
            return false;
        memcpy(&flags, at, 4);
        flags = be32toh(flags);
        c->rx_start += 4;
        c->state = OPTION;
        c->no_zeroes = flags & NBD_FLAG_NO_ZEROES;
        if (flags & ~(uint32_t)(NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES) || !(flags & NBD_FLAG_FIXED_NEWSTYLE))
            broken(c);
    } else if (c->state == OPTION) {
        if (have < sizeof(c->option))
            return false;
        memcpy(&c->option, at, sizeof(c->option));
        c->rx_start += sizeof(c->option);
        c->state = BODY;
        if (be64toh(c->option.magic) != NBD_OPTION_MAGIC || be32toh(c->option.length) > NBD_OPTION_MAX)
            broken(c);
    } else {
        if (have < length)
            return false;
        c->rx_start += length;
        on_option(c, at, length);
    }
    return true;
}

/* ---- the socket ---- */

static void take_input(struct connection *c)
{
    while (c->state < TRANSMISSION)
        if (!shake(c))
            return;
    if (c->state == TRANSMISSION)
        take_requests(c);
}

static ssize_t receive(struct connection *c)
{
    struct iovec iov[2];
    struct msghdr message = {.msg_iov = iov};

    if (c->rx_start) {
        memmove(c->rx, c->rx + c->rx_start, c->rx_end - c->rx_start);
        c->rx_end -= c->rx_start;
        c->rx_start = 0;
    }
    if (c->receiving) { /* the buffer is empty here: the payload goes where it belongs, what follows it into the buffer */
        iov[message.msg_iovlen++] = (struct iovec){(uint8_t *)c->receiving->segment.iov_base + c->received,
            c->receiving->segment.iov_len - c->received};
    }
    iov[message.msg_iovlen++] = (struct iovec){c->rx + c->rx_end, RX - c->rx_end};
    return recvmsg(c->fd, &message, MSG_DONTWAIT);
}

static void on_readable(struct connection *c)
{
    ssize_t got = receive(c);

    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (got <= 0) {
        close_connection(c);
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
    struct connection *c = pv_member(event, struct connection, event);

    if (events & EPOLLOUT)
        send_replies(c);
    if (c->state != CLOSING && events & (EPOLLIN | EPOLLHUP | EPOLLERR)) {
        if (c->paused && events & (EPOLLHUP | EPOLLERR))
            close_connection(c);
        else if (!c->paused)
            on_readable(c);
    }
}

static void greet(struct connection *c)
{
    struct {
        uint64_t magic, option_magic;
        uint16_t flags;
    } __attribute__((packed)) greeting = {htobe64(NBD_MAGIC), htobe64(NBD_OPTION_MAGIC),
        htobe16(NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES)};

    say(c, &greeting, sizeof(greeting));
}

static void on_listener(struct pv_event *event, uint32_t events)
{
    struct pv_nbd_server *server = pv_member(event, struct pv_nbd_server, event);
    int fd = accept4(server->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK), err;
    struct connection *c;

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
    c->flush.run = flush;
    c->server = server;
    c->fd = fd;
    pv_list_init(&c->free);
    pv_list_init(&c->replies);
    for (unsigned i = 0; i < SLOTS; i++) {
        c->slots[i].connection = c;
        pv_list_append(&c->free, &c->slots[i].link);
    }
    pv_list_append(&server->connections, &c->link);
    count(&server->counts.connections);
    greet(c);
}

struct pv_nbd_server *pv_nbd_serve(struct pv_instance *instance, struct pv_filter *below, const char *name, int listener,
    bool read_only, struct pv_fail *fail)
{
    struct pv_nbd_server *server = calloc(1, sizeof(*server));
    int err;

    if (!server || strlen(name) >= sizeof(server->name) || pv_loop_watch(instance->loop, listener, EPOLLIN, &server->event, &err)) {
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
        close_connection(pv_member(link, struct connection, link));
    }
    maybe_gone(server);
}

struct pv_nbd_counts pv_nbd_counts(const struct pv_nbd_server *server)
{
    return (struct pv_nbd_counts){__atomic_load_n(&server->counts.connections, __ATOMIC_RELAXED),
        __atomic_load_n(&server->counts.requests, __ATOMIC_RELAXED), __atomic_load_n(&server->counts.refused, __ATOMIC_RELAXED)};
}
