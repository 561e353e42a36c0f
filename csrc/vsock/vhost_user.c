#include "vhost_user.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/virtio_config.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "common/cleanup.h"

#define HEADER_SIZE 12
#define FLAG_VERSION_MASK 0x3U
#define FLAG_VERSION 0x1U
#define FLAG_REPLY 0x4U
#define FLAG_NEED_REPLY 0x8U
#define VRING_INDEX_MASK 0xffU
#define VRING_NO_FD 0x100U

#define F_PROTOCOL_FEATURES (1ULL << 30)
#define PROTOCOL_MQ (1ULL << 0)
#define PROTOCOL_REPLY_ACK (1ULL << 3)
#define PROTOCOL_CONFIG (1ULL << 9)

#define RING_FEATURES ((1ULL << VIRTIO_RING_F_INDIRECT_DESC) | (1ULL << VIRTIO_RING_F_EVENT_IDX))
#define FEATURES_OFFERED ((1ULL << VIRTIO_F_VERSION_1) | RING_FEATURES | F_PROTOCOL_FEATURES)
#define PROTOCOL_OFFERED (PROTOCOL_MQ | PROTOCOL_REPLY_ACK | PROTOCOL_CONFIG)

enum request {
    GET_FEATURES = 1,
    SET_FEATURES = 2,
    SET_OWNER = 3,
    RESET_OWNER = 4,
    SET_MEM_TABLE = 5,
    SET_VRING_NUM = 8,
    SET_VRING_ADDR = 9,
    SET_VRING_BASE = 10,
    GET_VRING_BASE = 11,
    SET_VRING_KICK = 12,
    SET_VRING_CALL = 13,
    SET_VRING_ERR = 14,
    GET_PROTOCOL_FEATURES = 15,
    SET_PROTOCOL_FEATURES = 16,
    GET_QUEUE_NUM = 17,
    SET_VRING_ENABLE = 18,
    GET_CONFIG = 24,
    REQUEST_LIMIT = 64,
};

struct vring_state {
    uint32_t index;
    uint32_t num;
} __attribute__((packed));

struct vring_addr {
    uint32_t index;
    uint32_t flags;
    uint64_t desc, used, avail, log;
} __attribute__((packed));

struct mem_table {
    uint32_t count;
    uint32_t padding;
    struct pv_region_desc regions[PV_MAX_REGIONS];
} __attribute__((packed));

struct config_space {
    uint32_t offset;
    uint32_t size;
    uint32_t flags;
    uint8_t data[256];
} __attribute__((packed));

/* vhost-user numbers are in the host's byte order. Payloads are copied out of the message, so that alignment does not
 * matter. */
static uint64_t payload_u64(const struct pv_fe *fe)
{
    uint64_t value;

    memcpy(&value, fe->msg.payload, sizeof(value));
    return value;
}

static int refuse(struct pv_fe *fe, const char *fault)
{
    fe->fault = fault;
    return -1;
}

static void replace_fd(int *slot, int fd)
{
    if (*slot >= 0)
        close(*slot);
    *slot = fd;
}

static int take_message_fd(struct pv_fe *fe)
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
static int reply(struct pv_fe *fe, const void *payload, uint32_t size)
{
    struct pv_msg answer = {.request = fe->msg.request, .flags = FLAG_VERSION | FLAG_REPLY, .size = size};
    ssize_t sent;

    memcpy(answer.payload, payload, size);
    do {
        sent = send(fe->fd, &answer, HEADER_SIZE + size, MSG_NOSIGNAL | MSG_DONTWAIT);
    } while (sent < 0 && errno == EINTR);
    if (sent != (ssize_t)(HEADER_SIZE + size))
        return refuse(fe, "vhost-user: the front end does not take answers");
    return 0;
}

static int reply_u64(struct pv_fe *fe, uint64_t value)
{
    return reply(fe, &value, sizeof(value));
}

/* ---- rings ------------------------------------------------------------------------------------------------------- */

static void stop_ring(struct pv_fe *fe, unsigned i)
{
    struct pv_fe_ring *ring = &fe->rings[i];

    if (ring->started)
        fe->ops->ring_stopped(fe->opaque, i, ring->kick_fd);
    ring->started = false;
    replace_fd(&ring->kick_fd, -1);
    pv_vq_unmap(&ring->vq);
}

static int start_ring(struct pv_fe *fe, unsigned i, int kick_fd)
{
    struct pv_fe_ring *ring = &fe->rings[i];
    int err;

    stop_ring(fe, i);
    ring->kick_fd = kick_fd;
    ring->vq.event_idx = fe->features & (1ULL << VIRTIO_RING_F_EVENT_IDX);
    if (!pv_vq_map(&ring->vq, &fe->mem))
        return refuse(fe, "vhost-user: ring started with addresses outside of the memory table");
    pv_vq_start(&ring->vq, ring->base);
    if (fe->ops->ring_started(fe->opaque, i, kick_fd, &err) < 0) {
        pv_vq_unmap(&ring->vq);
        return refuse(fe, "vhost-user: kick descriptor cannot be waited for");
    }
    ring->started = ring->was_started = true;
    return 0;
}

/* After the memory table changed under running rings. One that is no longer mapped is stopped as broken. */
static void remap_rings(struct pv_fe *fe)
{
    for (unsigned i = 0; i < PV_RINGS; i++) {
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

    return ring->started && ring->enabled && ring->vq.desc && !ring->vq.fault;
}

void pv_fe_ring_broken(struct pv_fe *fe, unsigned i)
{
    uint64_t one = 1;

    if (fe->rings[i].err_fd >= 0 && write(fe->rings[i].err_fd, &one, sizeof(one)) < 0)
        return; /* nobody is there to be told */
}

/* ---- one handler per request ------------------------------------------------------------------------------------- */

static int on_get_features(struct pv_fe *fe)
{
    return reply_u64(fe, FEATURES_OFFERED);
}

static int on_set_features(struct pv_fe *fe)
{
    uint64_t features = payload_u64(fe);

    if (features & ~FEATURES_OFFERED)
        return refuse(fe, "vhost-user: features that were not offered");
    fe->features = features;
    for (unsigned i = 0; i < PV_RINGS; i++)
        if (!(features & F_PROTOCOL_FEATURES))
            fe->rings[i].enabled = true;
    return 0;
}

static int on_get_protocol_features(struct pv_fe *fe)
{
    return reply_u64(fe, PROTOCOL_OFFERED);
}

static int on_set_protocol_features(struct pv_fe *fe)
{
    if (payload_u64(fe) & ~PROTOCOL_OFFERED)
        return refuse(fe, "vhost-user: protocol features that were not offered");
    fe->protocol_features = payload_u64(fe);
    return 0;
}

static int on_set_owner(struct pv_fe *fe)
{
    (void)fe;
    return 0;
}

static int on_reset_owner(struct pv_fe *fe)
{
    for (unsigned i = 0; i < PV_RINGS; i++) {
        stop_ring(fe, i);
        fe->rings[i].was_started = false;
    }
    fe->ops->device_reset(fe->opaque);
    return 0;
}

static int on_set_mem_table(struct pv_fe *fe)
{
    struct mem_table table;
    int err;

    memcpy(&table, fe->msg.payload, fe->msg.size < sizeof(table) ? fe->msg.size : sizeof(table));
    if (table.count > PV_MAX_REGIONS || fe->msg.size < 8 + table.count * sizeof(table.regions[0]))
        return refuse(fe, "vhost-user: memory table of a bad size");
    if (fe->fd_count != table.count)
        return refuse(fe, "vhost-user: memory table with missing or spare descriptors");
    struct pv_region_desc aligned[PV_MAX_REGIONS];

    memcpy(aligned, table.regions, sizeof(aligned));
    /* The rings point into the old mappings. */
    for (unsigned i = 0; i < PV_RINGS; i++)
        pv_vq_unmap(&fe->rings[i].vq);
    int result = pv_memtable_set(&fe->mem, aligned, fe->fds, table.count, &err);

    remap_rings(fe);
    return result < 0 ? refuse(fe, "vhost-user: memory table that cannot be mapped") : 0;
}

static int on_get_queue_num(struct pv_fe *fe)
{
    return reply_u64(fe, PV_RINGS);
}

static struct pv_fe_ring *ring_of(struct pv_fe *fe, uint32_t index)
{
    if (index < PV_RINGS)
        return &fe->rings[index];
    fe->fault = "vhost-user: ring index out of range";
    return NULL;
}

static int on_set_vring_num(struct pv_fe *fe)
{
    struct vring_state state;

    memcpy(&state, fe->msg.payload, sizeof(state));
    struct pv_fe_ring *ring = ring_of(fe, state.index);

    if (!ring)
        return -1;
    if (ring->started)
        return refuse(fe, "vhost-user: size of a running ring changed");
    if (state.num == 0 || state.num > PV_QUEUE_MAX || (state.num & (state.num - 1)))
        return refuse(fe, "vhost-user: ring size is not a power of two up to 32768");
    ring->vq.num = state.num;
    return 0;
}

static int on_set_vring_addr(struct pv_fe *fe)
{
    struct vring_addr addr;

    memcpy(&addr, fe->msg.payload, sizeof(addr));
    struct pv_fe_ring *ring = ring_of(fe, addr.index);

    if (!ring)
        return -1;
    ring->vq.desc_addr = addr.desc;
    ring->vq.avail_addr = addr.avail;
    ring->vq.used_addr = addr.used;
    if (ring->started && !pv_vq_map(&ring->vq, &fe->mem))
        return refuse(fe, "vhost-user: running ring moved outside of the memory table");
    return 0;
}

static int on_set_vring_base(struct pv_fe *fe)
{
    struct vring_state state;

    memcpy(&state, fe->msg.payload, sizeof(state));
    struct pv_fe_ring *ring = ring_of(fe, state.index);

    if (!ring)
        return -1;
    if (ring->started || state.num > UINT16_MAX)
        return refuse(fe, "vhost-user: bad ring base");
    /* The event ring carries no connection: its position says nothing about them. */
    if (ring->was_started && state.index != PV_EVENT && ring->vq.last_avail != state.num) {
        fe->rings[PV_RX].was_started = fe->rings[PV_TX].was_started = false;
        fe->ops->device_reset(fe->opaque);
    }
    ring->base = (uint16_t)state.num;
    return 0;
}

static int on_get_vring_base(struct pv_fe *fe)
{
    struct vring_state state;

    memcpy(&state, fe->msg.payload, sizeof(state));
    struct pv_fe_ring *ring = ring_of(fe, state.index);

    if (!ring)
        return -1;
    state.num = ring->was_started ? ring->vq.last_avail : ring->base;
    stop_ring(fe, state.index);
    return reply(fe, &state, sizeof(state));
}

/* Parses SET_VRING_{KICK,CALL,ERR}: the ring, and its descriptor or -1. NULL: refused. */
static struct pv_fe_ring *vring_fd(struct pv_fe *fe, int *fd)
{
    uint64_t value = payload_u64(fe);
    struct pv_fe_ring *ring = ring_of(fe, (uint32_t)(value & VRING_INDEX_MASK));

    if (ring && fe->fd_count != (value & VRING_NO_FD ? 0 : 1)) {
        fe->fault = "vhost-user: missing or spare descriptor";
        return NULL;
    }
    *fd = ring ? take_message_fd(fe) : -1;
    return ring;
}

static int on_set_vring_kick(struct pv_fe *fe)
{
    int fd;
    struct pv_fe_ring *ring = vring_fd(fe, &fd);

    if (!ring)
        return -1;
    if (fd < 0)
        return refuse(fe, "vhost-user: rings without a kick descriptor (polling) are not supported");
    return start_ring(fe, (unsigned)(ring - fe->rings), fd);
}

static int on_set_vring_call(struct pv_fe *fe)
{
    int fd;
    struct pv_fe_ring *ring = vring_fd(fe, &fd);

    if (!ring)
        return -1;
    /* Not blocking: a front end that lets the counter run full stops its own interrupts, not this process. */
    if (fd >= 0)
        fcntl(fd, F_SETFL, O_NONBLOCK);
    replace_fd(&ring->call_fd, fd);
    return 0;
}

static int on_set_vring_err(struct pv_fe *fe)
{
    int fd;
    struct pv_fe_ring *ring = vring_fd(fe, &fd);

    if (!ring)
        return -1;
    if (fd >= 0)
        fcntl(fd, F_SETFL, O_NONBLOCK);
    replace_fd(&ring->err_fd, fd);
    return 0;
}

static int on_set_vring_enable(struct pv_fe *fe)
{
    struct vring_state state;
    int err;

    memcpy(&state, fe->msg.payload, sizeof(state));
    struct pv_fe_ring *ring = ring_of(fe, state.index);

    if (!ring)
        return -1;
    ring->enabled = state.num != 0;
    /* Chains may have become available while it was disabled. */
    if (ring->started && ring->enabled && fe->ops->ring_started(fe->opaque, state.index, ring->kick_fd, &err) < 0)
        return refuse(fe, "vhost-user: kick descriptor cannot be waited for");
    return 0;
}

static int on_get_config(struct pv_fe *fe)
{
    uint64_t cid = htole64(fe->guest_cid);
    struct config_space config = {0};

    memcpy(&config, fe->msg.payload, fe->msg.size < sizeof(config) ? fe->msg.size : sizeof(config));
    if (config.size > sizeof(config.data) || fe->msg.size != 12 + config.size || config.offset > sizeof(cid) ||
        config.size > sizeof(cid) - config.offset)
        return refuse(fe, "vhost-user: configuration space read out of range");
    memcpy(config.data, (const uint8_t *)&cid + config.offset, config.size);
    return reply(fe, &config, fe->msg.size);
}

struct handler {
    int (*handle)(struct pv_fe *fe);
    uint16_t min_size, max_size; /* of the payload */
    uint8_t max_fds;
    bool replies; /* has an answer of its own, so REPLY_ACK does not apply */
};

#define STATE_SIZE sizeof(struct vring_state)

static const struct handler HANDLERS[REQUEST_LIMIT] = {
    [GET_FEATURES] = {on_get_features, 0, 0, 0, true},
    [SET_FEATURES] = {on_set_features, 8, 8, 0, false},
    [SET_OWNER] = {on_set_owner, 0, 0, 0, false},
    [RESET_OWNER] = {on_reset_owner, 0, 0, 0, false},
    [SET_MEM_TABLE] = {on_set_mem_table, 8, sizeof(struct mem_table), PV_MAX_REGIONS, false},
    [SET_VRING_NUM] = {on_set_vring_num, STATE_SIZE, STATE_SIZE, 0, false},
    [SET_VRING_ADDR] = {on_set_vring_addr, sizeof(struct vring_addr), sizeof(struct vring_addr), 0, false},
    [SET_VRING_BASE] = {on_set_vring_base, STATE_SIZE, STATE_SIZE, 0, false},
    [GET_VRING_BASE] = {on_get_vring_base, STATE_SIZE, STATE_SIZE, 0, true},
    [SET_VRING_KICK] = {on_set_vring_kick, 8, 8, 1, false},
    [SET_VRING_CALL] = {on_set_vring_call, 8, 8, 1, false},
    [SET_VRING_ERR] = {on_set_vring_err, 8, 8, 1, false},
    [GET_PROTOCOL_FEATURES] = {on_get_protocol_features, 0, 0, 0, true},
    [SET_PROTOCOL_FEATURES] = {on_set_protocol_features, 8, 8, 0, false},
    [GET_QUEUE_NUM] = {on_get_queue_num, 0, 0, 0, true},
    [SET_VRING_ENABLE] = {on_set_vring_enable, STATE_SIZE, STATE_SIZE, 0, false},
    [GET_CONFIG] = {on_get_config, 12, sizeof(struct config_space), 0, true},
};

/* ---- receiving --------------------------------------------------------------------------------------------------- */

static const struct handler *handler_of(const struct pv_fe *fe)
{
    if (fe->msg.request >= REQUEST_LIMIT || !HANDLERS[fe->msg.request].handle)
        return NULL;
    return &HANDLERS[fe->msg.request];
}

static int check_header(struct pv_fe *fe)
{
    const struct handler *handler = handler_of(fe);

    if ((fe->msg.flags & FLAG_VERSION_MASK) != FLAG_VERSION || (fe->msg.flags & FLAG_REPLY))
        return refuse(fe, "vhost-user: bad version or flags");
    if (fe->msg.size > PV_MSG_MAX_PAYLOAD)
        return refuse(fe, "vhost-user: message too long");
    if (!handler)
        return 0; /* refused later, when the whole message is here and its sender can be told */
    if (fe->msg.size < handler->min_size || fe->msg.size > handler->max_size)
        return refuse(fe, "vhost-user: message of a bad size");
    if (fe->fd_count > handler->max_fds)
        return refuse(fe, "vhost-user: spare descriptors");
    return 0;
}

/* The message is complete. -1: the connection cannot go on. */
static int dispatch(struct pv_fe *fe)
{
    const struct handler *handler = handler_of(fe);
    bool wants_ack = (fe->msg.flags & FLAG_NEED_REPLY) && (fe->protocol_features & PROTOCOL_REPLY_ACK);
    int result;

    fe->fault = NULL;
    result = handler ? handler->handle(fe) : refuse(fe, "vhost-user: request that is not supported");
    close_message_fds(fe);
    fe->have = 0;
    if (handler && handler->replies)
        return result;
    return wants_ack ? reply_u64(fe, result < 0) : result;
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
    return mh->msg_flags & MSG_CTRUNC ? refuse(fe, "vhost-user: too many descriptors") : 0;
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
        uint32_t want = fe->have < HEADER_SIZE ? HEADER_SIZE : HEADER_SIZE + fe->msg.size;

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
        if (want == HEADER_SIZE && check_header(fe) < 0)
            return -1;
        if (fe->have == HEADER_SIZE + fe->msg.size && dispatch(fe) < 0)
            return -1;
    }
}

void pv_fe_open(struct pv_fe *fe, int fd, uint64_t guest_cid, const struct pv_fe_ops *ops, void *opaque)
{
    memset(fe, 0, sizeof(*fe));
    fe->ops = ops;
    fe->opaque = opaque;
    fe->fd = fd;
    fe->guest_cid = guest_cid;
    for (unsigned i = 0; i < PV_RINGS; i++)
        fe->rings[i].kick_fd = fe->rings[i].call_fd = fe->rings[i].err_fd = -1;
}

void pv_fe_close(struct pv_fe *fe)
{
    for (unsigned i = 0; i < PV_RINGS; i++) {
        stop_ring(fe, i);
        replace_fd(&fe->rings[i].call_fd, -1);
        replace_fd(&fe->rings[i].err_fd, -1);
    }
    close_message_fds(fe);
    pv_memtable_clear(&fe->mem);
    replace_fd(&fe->fd, -1);
}
