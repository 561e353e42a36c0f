/* The client's requests and life. Theory of operation: client_rooms.h. */
#include <endian.h>
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "client_rooms.h"
#include "common/cleanup.h"

#define RETRY_MS 100

/* ---- connecting, in a thread of its own ---- */

static bool told_to_stop(struct pv_nbd_client *c)
{
    return __atomic_load_n(&c->stop, __ATOMIC_ACQUIRE);
}

static void *connector(void *argument)
{
    struct pv_nbd_client *c = argument;
    struct pv_nbd_export export;
    const char *why;
    int fd = -1;

    while (!told_to_stop(c)) {
        fd = pv_nbd_connect(&c->address, c->export, &export, &why);
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

static uint16_t command_flags(const struct pv_nbd_client *c, const struct pv_io *io)
{
    unsigned flags = io->flags & PV_IO_FUA && c->flags & NBD_SEND_FUA ? NBD_CMD_FLAG_FUA : 0;

    if (io->type == PV_IO_WRITE_ZEROES && !(io->flags & PV_IO_UNMAP))
        flags |= NBD_CMD_FLAG_NO_HOLE;
    return (uint16_t)flags;
}

static void queue(struct pv_nbd_client *c, struct pv_io *io)
{
    struct pv_nbd_call *call = pv_member(c->free.next, struct pv_nbd_call, link);

    pv_list_remove(&call->link);
    call->io = io;
    call->wire = (struct nbd_request){htobe32(NBD_REQUEST_MAGIC), htobe16(command_flags(c, io)),
        htobe16(commands[io->type]),
        htobe64((uint64_t)(call - c->calls)), htobe64(io->offset), htobe32((uint32_t)io->length)};
    pv_list_append(&c->queued, &call->link);
}

void pv_nbd_queue_waiting(struct pv_nbd_client *c)
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
static bool settled_here(struct pv_nbd_client *c, struct pv_io *io)
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
    struct pv_nbd_client *c = (struct pv_nbd_client *)data;

    if (settled_here(c, io))
        return;
    pv_list_append(&c->waiting, &io->link);
    pv_nbd_queue_waiting(c);
}

void pv_nbd_end_call(struct pv_nbd_client *c, struct pv_nbd_call *call, int error)
{
    struct pv_io *io = call->io;

    pv_list_remove(&call->link);
    call->io = NULL;
    call->sent = false;
    pv_list_append(&c->free, &call->link);
    pv_io_end(io, error);
}

/* ---- losing the connection, and getting it back ---- */

static void fail_all(struct pv_nbd_client *c)
{
    c->state = FAILING;
    while (!pv_list_empty(&c->queued))
        pv_nbd_end_call(c, pv_member(c->queued.next, struct pv_nbd_call, link), EIO);
    while (!pv_list_empty(&c->waiting)) {
        struct pv_io *io = pv_member(c->waiting.next, struct pv_io, link);

        pv_list_remove(&io->link);
        pv_io_end(io, EIO);
    }
}

static void on_patience(struct pv_timer *timer)
{
    fail_all(pv_member(timer, struct pv_nbd_client, patience));
}

static void requeue_sent(struct pv_nbd_client *c)
{
    while (!pv_list_empty(&c->sent)) { /* before what was never sent, in their order */
        struct pv_link *last = c->sent.prev, *first = c->queued.next;

        pv_member(last, struct pv_nbd_call, link)->sent = false;
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

static void start_connecting(struct pv_nbd_client *c)
{
    c->connecting = !pthread_create(&c->thread, NULL, connector, c);
    if (!c->connecting)
        fail_all(c);
}

void pv_nbd_lost(struct pv_nbd_client *c)
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

static void up(struct pv_nbd_client *c, int fd)
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
    pv_nbd_queue_waiting(c);
}

static void on_connected(struct pv_task *task)
{
    struct pv_nbd_client *c = pv_member(task, struct pv_nbd_client, connected);

    pthread_join(c->thread, NULL);
    c->connecting = false;
    if (c->new_fd >= 0)
        up(c, c->new_fd);
}

/* ---- life ---- */

static void attached(struct pv_data *data, struct pv_loop *loop)
{
    struct pv_nbd_client *c = (struct pv_nbd_client *)data;
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
    struct pv_nbd_client *c = (struct pv_nbd_client *)data;

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
    struct pv_nbd_client *c = (struct pv_nbd_client *)data;

    if (c->fd >= 0)
        close(c->fd);
    free(c);
}

static const struct pv_data_class nbd_class = {
    .name = "nbd", .submit = submit, .attached = attached, .detach = detach, .close = close_client};

static void set_up(struct pv_nbd_client *c, const struct pv_nbd_export *export)
{
    uint32_t block = export->block_size > PV_SECTOR ? export->block_size : PV_SECTOR;

    c->data = (struct pv_data){.class = &nbd_class, .block_size = block, .size = export->size / block * block,
        .read_only = export->flags & NBD_READ_ONLY};
    c->flags = export->flags;
    c->event.ready = pv_nbd_on_socket;
    c->flush.run = pv_nbd_client_flush;
    c->patience.fire = on_patience;
    c->connected.run = on_connected;
    pv_list_init(&c->waiting);
    pv_list_init(&c->free);
    pv_list_init(&c->queued);
    pv_list_init(&c->sent);
    for (unsigned i = 0; i < PV_NBD_CALLS; i++)
        pv_list_append(&c->free, &c->calls[i].link);
}

struct pv_data *pv_data_nbd(const char *path, const char *export_name, uint32_t patience_ms, struct pv_fail *fail)
{
    cleanup_free struct pv_nbd_client *c = calloc(1, sizeof(*c));
    struct pv_nbd_export export;
    const char *why;

    if (!c || strlen(path) >= sizeof(c->address.sun_path) || strlen(export_name) >= sizeof(c->export)) {
        pv_fail(fail, c ? ENAMETOOLONG : ENOMEM, "%.80s: a socket's path has at most 107 bytes, an export's name 255",
            path);
        return NULL;
    }
    c->address.sun_family = AF_UNIX;
    strcpy(c->address.sun_path, path);
    strcpy(c->export, export_name);
    c->patience_ms = patience_ms;
    c->fd = pv_nbd_connect(&c->address, export_name, &export, &why);
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
