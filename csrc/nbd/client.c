/* The client's side: an export of an NBD server as data.
 *
 * Requests that come while the connection is up are sent at the end of the turn, many in one sendmsg; each has a
 * slot, whose index is its handle. Replies
 * come in any order; what a read gets goes straight into the request's own segments.
 *
 *     UP --connection lost, or the server breaks a rule--> DOWN --a thread connects and shakes hands--> UP
 *                                                          DOWN --patience over--> FAILING --connected--> UP
 *
 * Connecting may block, so a thread of its own does it, and posts the socket to the loop. While DOWN, requests wait,
 * those under way among
 * them (nobody was told that they are done, so they are sent again, in their order); while FAILING they end with EIO
 * at once.
 *
 * Invariants: a request is free, on `queued` (to be sent, perhaps half sent), or `sent` with its slot in `slots`;
 * there are at most SLOTS of the last two.
 */
#include <endian.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "common/cleanup.h"
#include "nbd.h"
#include "protocol.h"

#define SLOTS 128
#define BATCH 128
#define RETRY_MS 100

enum state { UP, DOWN, FAILING };

struct slot {
    struct pv_io *io; /* NULL: free */
    struct nbd_request wire;
    bool sent;
    struct pv_link link; /* on free, queued or sent */
};

struct client {
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
    struct pv_link waiting; /* struct pv_io without a slot */
    struct pv_link free, queued, sent;
    size_t skip; /* bytes of the first of queued that went out */
    struct pv_timer patience;

    struct nbd_reply reply; /* being received */
    size_t reply_have, payload_have;
    struct slot *receiving;

    pthread_t thread; /* the one that connects, while DOWN or FAILING */
    bool connecting;
    int stop; /* atomic: it should give up */
    struct pv_task connected;
    int new_fd;

    struct slot slots[SLOTS];
};

/* ---- connecting: blocking, in a thread of its own (or the one that opens the disk) ---- */

static int wait_for(int fd, short events)
{
    struct pollfd p = {.fd = fd, .events = events};

    return poll(&p, 1, 5000) == 1 ? 0 : -1;
}

static int read_all(int fd, void *to, size_t length)
{
    while (length) {
        ssize_t got = wait_for(fd, POLLIN) ? -1 : recv(fd, to, length, MSG_DONTWAIT);

        if (got <= 0)
            return -1;
        to = (uint8_t *)to + got;
        length -= (size_t)got;
    }
    return 0;
}

static int write_all(int fd, const void *from, size_t length)
{
    while (length) {
        ssize_t sent = wait_for(fd, POLLOUT) ? -1 : send(fd, from, length, MSG_NOSIGNAL | MSG_DONTWAIT);

        if (sent <= 0)
            return -1;
        from = (const uint8_t *)from + sent;
        length -= (size_t)sent;
    }
    return 0;
}

struct export {
    uint64_t size;
    uint16_t flags;
    uint32_t block_size;
};

static int take_info(const uint8_t *body, uint32_t length, struct export *out)
{
    uint16_t type, flags;
    uint64_t size;
    uint32_t least;

    if (length < 2)
        return -1;
    memcpy(&type, body, 2);
    type = be16toh(type);
    if (type == NBD_INFO_EXPORT && length >= 12) {
        memcpy(&size, body + 2, 8);
        memcpy(&flags, body + 10, 2);
        out->size = be64toh(size);
        out->flags = be16toh(flags);
    } else if (type == NBD_INFO_BLOCK_SIZE && length >= 14) {
        memcpy(&least, body + 2, 4);
        out->block_size = be32toh(least);
    }
    return 0;
}

/* NBD_OPT_GO and its answers, up to the ACK. */
static int go(int fd, const char *name, struct export *out, const char **why)
{
    uint32_t name_length = (uint32_t)strlen(name), wire_length = htobe32(name_length);
    struct nbd_option option = {htobe64(NBD_OPTION_MAGIC), htobe32(NBD_OPT_GO), htobe32(name_length + 8)};
    uint16_t infos[2] = {htobe16(1), htobe16(NBD_INFO_BLOCK_SIZE)};
    struct nbd_option_reply reply;
    uint8_t body[1024];

    *why = "it does not answer as an NBD server does";
    if (write_all(fd, &option, sizeof(option)) || write_all(fd, &wire_length, 4) || write_all(fd, name, name_length) ||
        write_all(fd, infos, sizeof(infos)))
        return -1;
    for (;;) {
        uint32_t type, length;

        if (read_all(fd, &reply, sizeof(reply)) || be64toh(reply.magic) != NBD_OPTION_REPLY_MAGIC)
            return -1;
        type = be32toh(reply.type);
        length = be32toh(reply.length);
        if (length > sizeof(body) || read_all(fd, body, length))
            return -1;
        if (type == NBD_REP_ACK)
            return 0;
        if (type != NBD_REP_INFO) {
            *why = type == NBD_REP_ERR_UNKNOWN ? "it has no export of that name" : "it refuses the export";
            return -1;
        }
        if (take_info(body, length, out))
            return -1;
    }
}

static int shake(int fd, const char *name, struct export *out, const char **why)
{
    struct {
        uint64_t magic, option_magic;
        uint16_t flags;
    } __attribute__((packed)) greeting;
    uint32_t flags = htobe32(NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);

    *why = "it does not greet as an NBD server does";
    if (read_all(fd, &greeting, sizeof(greeting)) || be64toh(greeting.magic) != NBD_MAGIC ||
        be64toh(greeting.option_magic) != NBD_OPTION_MAGIC || !(be16toh(greeting.flags) & NBD_FLAG_FIXED_NEWSTYLE))
        return -1;
    if (!(be16toh(greeting.flags) & NBD_FLAG_NO_ZEROES))
        flags = htobe32(NBD_FLAG_FIXED_NEWSTYLE);
    if (write_all(fd, &flags, sizeof(flags)))
        return -1;
    *out = (struct export){.block_size = 1};
    return go(fd, name, out, why);
}

/* A socket through which requests can go, or -1 with *why. */
static int connect_export(const struct sockaddr_un *address, const char *name, struct export *out, const char **why)
{
    cleanup_fd int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    *why = "cannot connect";
    if (fd < 0 || connect(fd, (const struct sockaddr *)address, sizeof(*address)) || shake(fd, name, out, why))
        return -1;
    return steal_fd(&fd);
}

static bool told_to_stop(struct client *c)
{
    return __atomic_load_n(&c->stop, __ATOMIC_ACQUIRE);
}

static void *connector(void *argument)
{
    struct client *c = argument;
    struct export export;
    const char *why;
    int fd = -1;

    while (!told_to_stop(c)) {
        fd = connect_export(&c->address, c->export, &export, &why);
        if (fd >= 0 && export.size >= c->data.size)
            break;
        if (fd >= 0)
            close(fd); /* another disk than the one that was here */
        fd = -1;
        poll(NULL, 0, RETRY_MS);
    }
    c->new_fd = fd;
    pv_loop_post(c->data.loop, &c->connected);
    return NULL;
}

/* ---- requests ---- */

static const uint16_t commands[PV_IO_TYPES] = {[PV_IO_READ] = NBD_CMD_READ, [PV_IO_WRITE] = NBD_CMD_WRITE,
    [PV_IO_FLUSH] = NBD_CMD_FLUSH, [PV_IO_DISCARD] = NBD_CMD_TRIM, [PV_IO_WRITE_ZEROES] = NBD_CMD_WRITE_ZEROES};

static uint16_t command_flags(const struct client *c, const struct pv_io *io)
{
    unsigned flags = io->flags & PV_IO_FUA && c->flags & NBD_SEND_FUA ? NBD_CMD_FLAG_FUA : 0;

    if (io->type == PV_IO_WRITE_ZEROES && !(io->flags & PV_IO_UNMAP))
        flags |= NBD_CMD_FLAG_NO_HOLE;
    return (uint16_t)flags;
}

static void queue(struct client *c, struct pv_io *io)
{
    struct slot *slot = pv_member(c->free.next, struct slot, link);

    pv_list_remove(&slot->link);
    slot->io = io;
    slot->wire = (struct nbd_request){htobe32(NBD_REQUEST_MAGIC), htobe16(command_flags(c, io)), htobe16(commands[io->type]),
        htobe64((uint64_t)(slot - c->slots)), htobe64(io->offset), htobe32((uint32_t)io->length)};
    pv_list_append(&c->queued, &slot->link);
}

static void queue_waiting(struct client *c)
{
    while (!pv_list_empty(&c->waiting) && !pv_list_empty(&c->free)) {
        struct pv_io *io = pv_member(c->waiting.next, struct pv_io, link);

        pv_list_remove(&io->link);
        queue(c, io);
    }
    if (c->state == UP && !pv_list_empty(&c->queued))
        pv_loop_defer(c->data.loop, &c->flush);
}

/* What the server has no word for. False: the request goes on its way. */
static bool settled_here(struct client *c, struct pv_io *io)
{
    if (io->type == PV_IO_DISCARD && !(c->flags & NBD_SEND_TRIM))
        pv_io_end(io, 0);
    else if (io->type == PV_IO_FLUSH && !(c->flags & NBD_SEND_FLUSH))
        pv_io_end(io, 0);
    else if (io->type == PV_IO_WRITE_ZEROES && !(c->flags & NBD_SEND_WRITE_ZEROES))
        pv_io_end(io, ENOTSUP);
    else if (io->length > (io->type <= PV_IO_WRITE ? NBD_PAYLOAD_MAX : UINT32_MAX - 4095))
        pv_io_end(io, EINVAL);
    else if (c->state == FAILING)
        pv_io_end(io, EIO);
    else
        return false;
    return true;
}

static void submit(struct pv_data *data, struct pv_io *io)
{
    struct client *c = (struct client *)data;

    if (settled_here(c, io))
        return;
    pv_list_append(&c->waiting, &io->link);
    queue_waiting(c);
}

static void end_slot(struct client *c, struct slot *slot, int error)
{
    struct pv_io *io = slot->io;

    pv_list_remove(&slot->link);
    slot->io = NULL;
    slot->sent = false;
    pv_list_append(&c->free, &slot->link);
    pv_io_end(io, error);
}

/* ---- losing the connection, and getting it back ---- */

static void fail_all(struct client *c)
{
    c->state = FAILING;
    while (!pv_list_empty(&c->queued))
        end_slot(c, pv_member(c->queued.next, struct slot, link), EIO);
    while (!pv_list_empty(&c->waiting)) {
        struct pv_io *io = pv_member(c->waiting.next, struct pv_io, link);

        pv_list_remove(&io->link);
        pv_io_end(io, EIO);
    }
}

static void on_patience(struct pv_timer *timer)
{
    fail_all(pv_member(timer, struct client, patience));
}

static void requeue_sent(struct client *c)
{
    while (!pv_list_empty(&c->sent)) { /* before what was never sent, in their order */
        struct pv_link *last = c->sent.prev, *first = c->queued.next;

        pv_member(last, struct slot, link)->sent = false;
        pv_list_remove(last);
        last->prev = &c->queued;
        last->next = first;
        first->prev = last;
        c->queued.next = last;
    }
    c->skip = 0;
    c->receiving = NULL;
    c->reply_have = c->payload_have = 0;
}

static void start_connecting(struct client *c)
{
    c->connecting = !pthread_create(&c->thread, NULL, connector, c);
    if (!c->connecting)
        fail_all(c);
}

static void lost(struct client *c)
{
    if (c->state != UP)
        return;
    pv_loop_unwatch(c->data.loop, c->fd, &c->event);
    close(c->fd);
    c->fd = -1;
    c->state = DOWN;
    c->want_out = false;
    requeue_sent(c);
    pv_loop_arm(c->data.loop, &c->patience, pv_loop_clock_ns() + c->patience_ms * 1000000ull);
    start_connecting(c);
}

static void up(struct client *c, int fd)
{
    int err;

    pv_loop_disarm(c->data.loop, &c->patience);
    c->fd = fd;
    c->state = UP;
    if (pv_loop_watch(c->data.loop, fd, EPOLLIN, &c->event, &err)) {
        close(fd);
        c->fd = -1;
        fail_all(c);
        return;
    }
    queue_waiting(c);
}

static void on_connected(struct pv_task *task)
{
    struct client *c = pv_member(task, struct client, connected);

    pthread_join(c->thread, NULL);
    c->connecting = false;
    if (c->new_fd >= 0)
        up(c, c->new_fd);
}

/* ---- sending ---- */

static size_t wire_size(const struct slot *slot)
{
    return sizeof(slot->wire) + (slot->io->type == PV_IO_WRITE ? slot->io->length : 0);
}

static unsigned gather(struct client *c, struct iovec *out)
{
    size_t skip = c->skip;
    unsigned used = 0;

    for (struct pv_link *link = c->queued.next; link != &c->queued && used < BATCH; link = link->next) {
        struct slot *slot = pv_member(link, struct slot, link);
        struct iovec head = {&slot->wire, sizeof(slot->wire)};
        unsigned count = pv_iov_cut(&head, 1, skip, UINT64_MAX, out + used, 1);

        used += count;
        skip = count ? 0 : skip - sizeof(slot->wire);
        if (slot->io->type == PV_IO_WRITE)
            used += pv_iov_cut(slot->io->iov, slot->io->iov_count, skip, UINT64_MAX, out + used, BATCH - used);
        skip = 0;
    }
    return used;
}

static void consume(struct client *c, size_t sent)
{
    c->skip += sent;
    while (!pv_list_empty(&c->queued)) {
        struct slot *slot = pv_member(c->queued.next, struct slot, link);

        if (c->skip < wire_size(slot))
            return;
        c->skip -= wire_size(slot);
        pv_list_remove(&slot->link);
        slot->sent = true;
        pv_list_append(&c->sent, &slot->link);
    }
}

static void watch_out(struct client *c, bool want)
{
    int err;

    if (c->want_out == want)
        return;
    c->want_out = want;
    if (pv_loop_rewatch(c->data.loop, c->fd, EPOLLIN | (want ? EPOLLOUT : 0), &c->event, &err))
        lost(c);
}

static void send_queued(struct client *c)
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
            lost(c);
            return;
        }
    }
    if (c->state == UP)
        watch_out(c, false);
}

static void flush(struct pv_task *task)
{
    send_queued(pv_member(task, struct client, flush));
}

/* ---- receiving ---- */

static struct slot *find(struct client *c)
{
    uint64_t index = be64toh(c->reply.handle);

    if (be32toh(c->reply.magic) != NBD_REPLY_MAGIC || index >= SLOTS || !c->slots[index].sent)
        return NULL;
    return &c->slots[index];
}

static int host_error(uint32_t wire)
{
    uint32_t error = be32toh(wire);

    return error > 4095 ? EIO : (int)error;
}

/* A reply's head is complete. False: the server broke a rule. */
static bool take_head(struct client *c)
{
    struct slot *slot = find(c);
    int error;

    if (!slot)
        return false;
    error = host_error(c->reply.error);
    c->reply_have = 0;
    if (slot->io->type == PV_IO_READ && !error && slot->io->length) {
        c->receiving = slot;
        c->payload_have = 0;
    } else {
        end_slot(c, slot, error);
    }
    return true;
}

/* One recvmsg: the rest of what is being received and, behind a payload, the next head. */
static ssize_t receive(struct client *c)
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

static void take_bytes(struct client *c, size_t got)
{
    if (c->receiving) {
        struct slot *slot = c->receiving;
        uint64_t left = slot->io->length - c->payload_have, step = got < left ? got : left;

        c->payload_have += step;
        got -= step;
        if (step < left)
            return;
        c->receiving = NULL;
        c->reply_have = got; /* before the end of the request, which may submit others */
        end_slot(c, slot, 0);
    } else {
        c->reply_have += got;
    }
    if (c->state == UP && c->reply_have == sizeof(c->reply) && !take_head(c))
        lost(c);
}

#define RECEIVES 64 /* a turn: others on the loop have theirs */

static void on_socket(struct pv_event *event, uint32_t events)
{
    struct client *c = pv_member(event, struct client, event);

    if (events & EPOLLOUT)
        send_queued(c);
    for (unsigned i = 0; i < RECEIVES && c->state == UP; i++) {
        ssize_t got = receive(c);

        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0 && errno == EAGAIN)
            break;
        if (got <= 0)
            lost(c);
        else
            take_bytes(c, (size_t)got);
    }
    queue_waiting(c);
}

/* ---- life ---- */

static void attached(struct pv_data *data, struct pv_loop *loop)
{
    struct client *c = (struct client *)data;
    int fd = c->fd;

    data->loop = loop;
    c->state = DOWN;
    c->fd = -1;
    if (fd >= 0)
        up(c, fd);
    else
        start_connecting(c);
}

static void detach(struct pv_data *data)
{
    struct client *c = (struct client *)data;

    __atomic_store_n(&c->stop, 1, __ATOMIC_RELEASE);
    pv_loop_disarm(data->loop, &c->patience);
    while (c->connecting) { /* it ends within one attempt, and posts: take the task as the loop would */
        int err;

        if (pv_loop_turn(data->loop, 10000000, &err))
            break;
    }
    if (c->state == UP)
        pv_loop_unwatch(data->loop, c->fd, &c->event);
    c->stop = 0;
}

static void close_client(struct pv_data *data)
{
    struct client *c = (struct client *)data;

    if (c->fd >= 0)
        close(c->fd);
    free(c);
}

static const struct pv_data_class nbd_class = {.name = "nbd", .submit = submit, .attached = attached, .detach = detach, .close = close_client};

static void set_up(struct client *c, const struct export *export)
{
    uint32_t block = export->block_size > PV_SECTOR ? export->block_size : PV_SECTOR;

    c->data = (struct pv_data){.class = &nbd_class, .block_size = block, .size = export->size / block * block,
        .read_only = export->flags & NBD_READ_ONLY};
    c->flags = export->flags;
    c->event.ready = on_socket;
    c->flush.run = flush;
    c->patience.fire = on_patience;
    c->connected.run = on_connected;
    pv_list_init(&c->waiting);
    pv_list_init(&c->free);
    pv_list_init(&c->queued);
    pv_list_init(&c->sent);
    for (unsigned i = 0; i < SLOTS; i++)
        pv_list_append(&c->free, &c->slots[i].link);
}

struct pv_data *pv_data_nbd(const char *path, const char *export_name, uint32_t patience_ms, struct pv_fail *fail)
{
    cleanup_free struct client *c = calloc(1, sizeof(*c));
    struct export export;
    const char *why;

    if (!c || strlen(path) >= sizeof(c->address.sun_path) || strlen(export_name) >= sizeof(c->export)) {
        pv_fail(fail, c ? ENAMETOOLONG : ENOMEM, "%.80s: a socket's path has at most 107 bytes, an export's name 255", path);
        return NULL;
    }
    c->address.sun_family = AF_UNIX;
    strcpy(c->address.sun_path, path);
    strcpy(c->export, export_name);
    c->patience_ms = patience_ms;
    c->fd = connect_export(&c->address, export_name, &export, &why);
    if (c->fd < 0) {
        pv_fail(fail, ECONNREFUSED, "NBD server %.80s, export \"%.40s\": %s", path, export_name, why);
        return NULL;
    }
    if ((export.block_size & (export.block_size - 1)) || export.block_size > 65536) {
        close(c->fd);
        pv_fail(fail, EINVAL, "NBD server %.80s wants blocks of %u bytes", path, export.block_size);
        return NULL;
    }
    set_up(c, &export);
    return &steal_pointer(&c)->data;
}
