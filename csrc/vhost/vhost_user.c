#include <errno.h>
#include <linux/virtio_config.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "common/cleanup.h"
#include "protocol.h"
#include "rooms.h"

int pv_fe_refuse(struct pv_fe *fe, const char *fault)
{
    fe->fault = fault;
    return -1;
}

void pv_fe_replace_fd(int *slot, int fd)
{
    if (*slot >= 0)
        close(*slot);
    *slot = fd;
}

int pv_fe_take_fd(struct pv_fe *fe)
{
    return fe->fd_count > 0 ? steal_fd(&fe->fds[0]) : -1;
}

static void close_message_fds(struct pv_fe *fe)
{
    for (unsigned i = 0; i < fe->fd_count; i++)
        if (fe->fds[i] >= 0)
            close(fe->fds[i]);
    fe->fd_count = 0;
}

/* ---- replies ----------------------------------------------------------------------------------------------------- */

/* The answer is a few hundred bytes at most; a front end that leaves no room for it does not read its answers and is
 * given up. */
static bool send_message(int socket, const struct pv_msg *msg, int fd)
{
    union {
        char space[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control = {0};
    struct iovec iov = {.iov_base = (void *)msg, .iov_len = PV_VU_HEADER_SIZE + msg->size};
    struct msghdr mh = {.msg_iov = &iov, .msg_iovlen = 1};
    ssize_t sent;

    if (fd >= 0) {
        mh.msg_control = control.space;
        mh.msg_controllen = sizeof(control.space);
        struct cmsghdr *c = CMSG_FIRSTHDR(&mh);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(c), &fd, sizeof(fd));
    }
    do {
        sent = sendmsg(socket, &mh, MSG_NOSIGNAL | MSG_DONTWAIT);
    } while (sent < 0 && errno == EINTR);
    return sent == (ssize_t)iov.iov_len;
}

int pv_fe_reply_with(struct pv_fe *fe, const void *payload, uint32_t size, int fd)
{
    struct pv_msg answer = {.request = fe->msg.request, .flags = PV_VU_VERSION | PV_VU_REPLY, .size = size};

    memcpy(answer.payload, payload, size);
    if (!send_message(fe->fd, &answer, fd))
        return pv_fe_refuse(fe, "vhost-user: the front end does not take answers");
    return 0;
}

int pv_fe_reply(struct pv_fe *fe, const void *payload, uint32_t size)
{
    return pv_fe_reply_with(fe, payload, size, -1);
}

int pv_fe_reply_u64(struct pv_fe *fe, uint64_t value)
{
    return pv_fe_reply(fe, &value, sizeof(value));
}

/* ---- rings ------------------------------------------------------------------------------------------------------- */

void pv_fe_stop_ring(struct pv_fe *fe, unsigned i)
{
    struct pv_fe_ring *ring = &fe->rings[i];

    if (ring->started)
        fe->type->ring_stopped(fe->opaque, i, ring->kick_fd);
    ring->started = false;
    pv_fe_replace_fd(&ring->kick_fd, -1);
    pv_vq_unmap(&ring->vq);
    pv_vq_release(&ring->vq);
}

static int prepare_ring(struct pv_fe *fe, unsigned i)
{
    struct pv_vq *vq = &fe->rings[i].vq;
    int err;

    if (!pv_vq_map(vq, &fe->mem))
        return pv_fe_refuse(fe, "vhost-user: ring started with addresses outside of the memory table");
    pv_vq_start(vq, fe->rings[i].base);
    if (fe->type->holds && pv_vq_hold(vq, pv_inflight_queue(&fe->inflight, i, vq->num), &err) < 0) {
        pv_vq_unmap(vq);
        return pv_fe_refuse(fe, err == ENOMEM ? "vhost-user: no memory for a ring" :
                                          "vhost-user: what is in flight does not fit the ring");
    }
    return 0;
}

int pv_fe_start_ring(struct pv_fe *fe, unsigned i, int kick_fd)
{
    struct pv_fe_ring *ring = &fe->rings[i];
    int err;

    pv_fe_stop_ring(fe, i);
    ring->kick_fd = kick_fd;
    ring->vq.event_idx = fe->features & (1ULL << VIRTIO_RING_F_EVENT_IDX);
    if (prepare_ring(fe, i) < 0)
        return -1;
    if (fe->type->ring_started(fe->opaque, i, kick_fd, &err) < 0) {
        pv_vq_unmap(&ring->vq);
        pv_vq_release(&ring->vq);
        return pv_fe_refuse(fe, "vhost-user: kick descriptor cannot be waited for");
    }
    ring->started = ring->was_started = true;
    return 0;
}

void pv_fe_remap_rings(struct pv_fe *fe)
{
    for (unsigned i = 0; i < fe->type->rings; i++) {
        struct pv_vq *vq = &fe->rings[i].vq;

        if (fe->rings[i].started && !pv_vq_map(vq, &fe->mem) && !vq->fault) {
            vq->fault = "vhost-user: memory table without the memory of a running ring";
            pv_fe_ring_broken(fe, i);
        }
    }
}

bool pv_fe_ring_live(const struct pv_fe *fe, unsigned i)
{
    const struct pv_fe_ring *ring = &fe->rings[i];

    return ring->started && ring->enabled && ring->vq.desc && !ring->vq.fault && !fe->draining;
}

void pv_fe_ring_broken(struct pv_fe *fe, unsigned i)
{
    uint64_t one = 1;

    if (fe->rings[i].err_fd >= 0 && write(fe->rings[i].err_fd, &one, sizeof(one)) < 0)
        return; /* nobody is there to be told */
}

/* ---- what the guest is told
 * ---------------------------------------------------------------------------------------- */

bool pv_fe_publish(struct pv_fe *fe, unsigned i)
{
    struct pv_fe_ring *ring = &fe->rings[i];
    uint64_t one = 1;
    bool wanted = pv_vq_publish(&ring->vq);

    if (ring->logged && pv_fe_logging(fe))
        pv_fe_log_guest(fe, ring->log_addr, 6 + 8 * (uint64_t)ring->vq.num);
    return wanted && ring->call_fd >= 0 && write(ring->call_fd, &one, sizeof(one)) == sizeof(one);
}

bool pv_fe_config_changed(struct pv_fe *fe)
{
    struct pv_msg msg = {.request = PV_VU_BACKEND_CONFIG_CHANGE, .flags = PV_VU_VERSION};

    if (fe->backend_fd < 0)
        return false;
    /* No room for it means that earlier ones are unread: their reader will see what we mean. */
    return send_message(fe->backend_fd, &msg, -1) || errno == EAGAIN;
}

/* ---- receiving --------------------------------------------------------------------------------------------------- */

static int check_header(struct pv_fe *fe)
{
    const struct pv_handler *handler = pv_fe_handler(fe);

    if ((fe->msg.flags & PV_VU_VERSION_MASK) != PV_VU_VERSION || (fe->msg.flags & PV_VU_REPLY))
        return pv_fe_refuse(fe, "vhost-user: bad version or flags");
    if (fe->msg.size > PV_MSG_MAX_PAYLOAD)
        return pv_fe_refuse(fe, "vhost-user: message too long");
    if (!handler)
        return 0; /* refused later, when the whole message is here and its sender can be told */
    if (fe->msg.size < handler->min_size || fe->msg.size > handler->max_size)
        return pv_fe_refuse(fe, "vhost-user: message of a bad size");
    if (fe->fd_count > handler->max_fds)
        return pv_fe_refuse(fe, "vhost-user: spare descriptors");
    return 0;
}

/* Whether the message that is here has to wait for chains that are held. */
static bool must_drain(struct pv_fe *fe)
{
    const struct pv_handler *handler = pv_fe_handler(fe);

    fe->draining = handler && (handler->flags & PV_DRAINS) && fe->held > 0;
    return fe->draining;
}

/* The message is complete. -1: the connection cannot go on. */
static int dispatch(struct pv_fe *fe)
{
    const struct pv_handler *handler = pv_fe_handler(fe);
    bool wants_ack = (fe->msg.flags & PV_VU_NEED_REPLY) && (fe->protocol_features & PV_PROTOCOL_REPLY_ACK);
    int result;

    fe->fault = NULL;
    result = handler ? handler->handle(fe) : pv_fe_refuse(fe, "vhost-user: request that is not supported");
    close_message_fds(fe);
    fe->have = 0;
    if (handler && (handler->flags & PV_REPLIES))
        return result;
    return wants_ack ? pv_fe_reply_u64(fe, result < 0) : result;
}

static int collect_fds(struct pv_fe *fe, struct msghdr *mh)
{
    for (struct cmsghdr *c = CMSG_FIRSTHDR(mh); c; c = CMSG_NXTHDR(mh, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
            continue;
        unsigned count = (unsigned)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));

        for (unsigned i = 0; i < count; i++) {
            int fd;

            memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(fd));
            if (fe->fd_count < PV_MSG_MAX_FDS)
                fe->fds[fe->fd_count++] = fd;
            else
                close(fd);
        }
    }
    return mh->msg_flags & MSG_CTRUNC ? pv_fe_refuse(fe, "vhost-user: too many descriptors") : 0;
}

/* 1: got some bytes of what is still missing; 0: nothing there now; -1: end (err 0) or failure. */
static int receive_part(struct pv_fe *fe, uint32_t want, int *err)
{
    union {
        char space[CMSG_SPACE(sizeof(int) * PV_MSG_MAX_FDS)];
        struct cmsghdr align;
    } control;
    struct iovec iov = {.iov_base = (uint8_t *)&fe->msg + fe->have, .iov_len = want - fe->have};
    struct msghdr mh = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.space,
        .msg_controllen = sizeof(control.space)};
    ssize_t got = recvmsg(fe->fd, &mh, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);

    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return 0;
    if (got <= 0) {
        *err = got < 0 ? errno : 0;
        return -1;
    }
    if (collect_fds(fe, &mh) < 0) {
        *err = EPROTO;
        return -1;
    }
    fe->have += (uint32_t)got;
    return 1;
}

int pv_fe_receive(struct pv_fe *fe, int *err)
{
    for (;;) {
        uint32_t want = fe->have < PV_VU_HEADER_SIZE ? PV_VU_HEADER_SIZE : PV_VU_HEADER_SIZE + fe->msg.size;

        if (fe->have < want) {
            int got = receive_part(fe, want, err);

            if (got == 0)
                return 1;
            if (got < 0)
                return *err == 0 || *err == ECONNRESET ? 0 : -1;
            if (fe->have < want)
                continue;
        }
        *err = EPROTO;
        if (want == PV_VU_HEADER_SIZE && check_header(fe) < 0)
            return -1;
        if (fe->have < PV_VU_HEADER_SIZE + fe->msg.size)
            continue;
        if (must_drain(fe))
            return 1;
        if (dispatch(fe) < 0)
            return -1;
    }
}

void pv_fe_open(struct pv_fe *fe, int fd, const struct pv_fe_type *type, void *opaque)
{
    memset(fe, 0, sizeof(*fe));
    fe->type = type;
    fe->opaque = opaque;
    fe->fd = fd;
    fe->backend_fd = fe->inflight.fd = -1;
    for (unsigned i = 0; i < PV_RINGS_MAX; i++)
        fe->rings[i].kick_fd = fe->rings[i].call_fd = fe->rings[i].err_fd = -1;
}

void pv_fe_close(struct pv_fe *fe)
{
    for (unsigned i = 0; i < fe->type->rings; i++) {
        pv_fe_stop_ring(fe, i);
        pv_fe_replace_fd(&fe->rings[i].call_fd, -1);
        pv_fe_replace_fd(&fe->rings[i].err_fd, -1);
    }
    close_message_fds(fe);
    pv_memtable_clear(&fe->mem);
    pv_inflight_close(&fe->inflight);
    pv_fe_drop_log(fe);
    pv_fe_replace_fd(&fe->backend_fd, -1);
    pv_fe_replace_fd(&fe->fd, -1);
}
