#include "vhost_user.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/virtio_config.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
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
#define LOG_PAGE 4096U
#define ADDR_F_LOG 1U
#define BACKEND_CONFIG_CHANGE 2U

enum request {
    GET_FEATURES = 1,
    SET_FEATURES = 2,
    SET_OWNER = 3,
    RESET_OWNER = 4,
    SET_MEM_TABLE = 5,
    SET_LOG_BASE = 6,
    SET_LOG_FD = 7,
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
    SET_BACKEND_REQ_FD = 21,
    GET_CONFIG = 24,
    SET_CONFIG = 25,
    GET_INFLIGHT_FD = 31,
    SET_INFLIGHT_FD = 32,
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
    uint8_t data[PV_CONFIG_MAX];
} __attribute__((packed));

struct log_area {
    uint64_t size;
    uint64_t offset;
} __attribute__((packed));

struct inflight_area {
    uint64_t size;
    uint64_t offset;
    uint16_t queues;
    uint16_t queue_size;
    uint32_t padding; /* QEMU sends it, the specification does not have it */
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
static bool send_message(int socket, const struct pv_msg *msg, int fd)
{
    union {
        char space[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control = {0};
    struct iovec iov = {.iov_base = (void *)msg, .iov_len = HEADER_SIZE + msg->size};
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

static int reply_with(struct pv_fe *fe, const void *payload, uint32_t size, int fd)
{
    struct pv_msg answer = {.request = fe->msg.request, .flags = FLAG_VERSION | FLAG_REPLY, .size = size};

    memcpy(answer.payload, payload, size);
    if (!send_message(fe->fd, &answer, fd))
        return refuse(fe, "vhost-user: the front end does not take answers");
    return 0;
}

static int reply(struct pv_fe *fe, const void *payload, uint32_t size)
{
    return reply_with(fe, payload, size, -1);
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
        fe->type->ring_stopped(fe->opaque, i, ring->kick_fd);
    ring->started = false;
    replace_fd(&ring->kick_fd, -1);
    pv_vq_unmap(&ring->vq);
    pv_vq_release(&ring->vq);
}

static int prepare_ring(struct pv_fe *fe, unsigned i)
{
    struct pv_vq *vq = &fe->rings[i].vq;
    int err;

    if (!pv_vq_map(vq, &fe->mem))
        return refuse(fe, "vhost-user: ring started with addresses outside of the memory table");
    pv_vq_start(vq, fe->rings[i].base);
    if (fe->type->holds && pv_vq_hold(vq, pv_inflight_queue(&fe->inflight, i, vq->num), &err) < 0) {
        pv_vq_unmap(vq);
        return refuse(fe, err == ENOMEM ? "vhost-user: no memory for a ring" :
                                          "vhost-user: what is in flight does not fit the ring");
    }
    return 0;
}

static int start_ring(struct pv_fe *fe, unsigned i, int kick_fd)
{
    struct pv_fe_ring *ring = &fe->rings[i];
    int err;

    stop_ring(fe, i);
    ring->kick_fd = kick_fd;
    ring->vq.event_idx = fe->features & (1ULL << VIRTIO_RING_F_EVENT_IDX);
    if (prepare_ring(fe, i) < 0)
        return -1;
    if (fe->type->ring_started(fe->opaque, i, kick_fd, &err) < 0) {
        pv_vq_unmap(&ring->vq);
        pv_vq_release(&ring->vq);
        return refuse(fe, "vhost-user: kick descriptor cannot be waited for");
    }
    ring->started = ring->was_started = true;
    return 0;
}

/* After the memory table changed under running rings. One that is no longer mapped is stopped as broken. */
static void remap_rings(struct pv_fe *fe)
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

/* ---- the log of what was written --------------------------------------------------------------------------------- */

static bool logging(const struct pv_fe *fe)
{
    return fe->log.map && (fe->features & PV_F_LOG_ALL);
}

static void log_guest(struct pv_fe *fe, uint64_t addr, uint64_t len)
{
    for (uint64_t page = addr / LOG_PAGE; len > 0 && page <= (addr + len - 1) / LOG_PAGE; page++)
        if (page / 8 < fe->log.size)
            __atomic_fetch_or(&fe->log.map[page / 8], (uint8_t)(1U << (page % 8)), __ATOMIC_RELAXED);
}

/* A pointer into guest memory comes from the table, so exactly one region has it. */
static void log_host(struct pv_fe *fe, const void *start, size_t len)
{
    const uint8_t *at = start;

    for (unsigned i = 0; i < fe->mem.count; i++) {
        const struct pv_region *r = &fe->mem.regions[i];

        if (at >= r->host && at < r->host + r->size)
            log_guest(fe, r->guest + (uint64_t)(at - r->host), len);
    }
}

void pv_fe_log_written(struct pv_fe *fe, const struct iovec *iov, unsigned count, size_t len)
{
    if (!logging(fe))
        return;
    for (unsigned i = 0; i < count && len > 0; i++) {
        size_t part = iov[i].iov_len < len ? iov[i].iov_len : len;

        log_host(fe, iov[i].iov_base, part);
        len -= part;
    }
}

/* ---- what the guest is told ---------------------------------------------------------------------------------------- */

bool pv_fe_publish(struct pv_fe *fe, unsigned i)
{
    struct pv_fe_ring *ring = &fe->rings[i];
    uint64_t one = 1;
    bool wanted = pv_vq_publish(&ring->vq);

    if (ring->logged && logging(fe))
        log_guest(fe, ring->log_addr, 6 + 8 * (uint64_t)ring->vq.num);
    return wanted && ring->call_fd >= 0 && write(ring->call_fd, &one, sizeof(one)) == sizeof(one);
}

bool pv_fe_config_changed(struct pv_fe *fe)
{
    struct pv_msg msg = {.request = BACKEND_CONFIG_CHANGE, .flags = FLAG_VERSION};

    if (fe->backend_fd < 0)
        return false;
    /* No room for it means that earlier ones are unread: their reader will see what we mean. */
    return send_message(fe->backend_fd, &msg, -1) || errno == EAGAIN;
}

/* ---- one handler per request ------------------------------------------------------------------------------------- */

static uint64_t features_offered(const struct pv_fe *fe)
{
    return fe->type->features | F_PROTOCOL_FEATURES;
}

static int on_get_features(struct pv_fe *fe)
{
    return reply_u64(fe, features_offered(fe));
}

static int on_set_features(struct pv_fe *fe)
{
    uint64_t features = payload_u64(fe);

    if (features & ~features_offered(fe))
        return refuse(fe, "vhost-user: features that were not offered");
    fe->features = features;
    for (unsigned i = 0; i < fe->type->rings; i++)
        if (!(features & F_PROTOCOL_FEATURES))
            fe->rings[i].enabled = true;
    return 0;
}

static int on_get_protocol_features(struct pv_fe *fe)
{
    return reply_u64(fe, fe->type->protocol_features);
}

static int on_set_protocol_features(struct pv_fe *fe)
{
    if (payload_u64(fe) & ~fe->type->protocol_features)
        return refuse(fe, "vhost-user: protocol features that were not offered");
    fe->protocol_features = payload_u64(fe);
    return 0;
}

static int on_set_owner(struct pv_fe *fe)
{
    (void)fe;
    return 0;
}

static void reset_device(struct pv_fe *fe)
{
    if (fe->type->device_reset)
        fe->type->device_reset(fe->opaque);
}

static int on_reset_owner(struct pv_fe *fe)
{
    for (unsigned i = 0; i < fe->type->rings; i++) {
        stop_ring(fe, i);
        fe->rings[i].was_started = false;
    }
    reset_device(fe);
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
    for (unsigned i = 0; i < fe->type->rings; i++)
        pv_vq_unmap(&fe->rings[i].vq);
    int result = pv_memtable_set(&fe->mem, aligned, fe->fds, table.count, &err);

    remap_rings(fe);
    return result < 0 ? refuse(fe, "vhost-user: memory table that cannot be mapped") : 0;
}

static int on_get_queue_num(struct pv_fe *fe)
{
    return reply_u64(fe, fe->type->rings);
}

static struct pv_fe_ring *ring_of(struct pv_fe *fe, uint32_t index)
{
    if (index < fe->type->rings)
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
    if (state.num == 0 || state.num > fe->type->queue_max || (state.num & (state.num - 1)))
        return refuse(fe, "vhost-user: ring size is not a power of two, or too large");
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
    ring->logged = addr.flags & ADDR_F_LOG;
    ring->log_addr = addr.log;
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
    if (ring->was_started && !(fe->type->stateless_rings >> state.index & 1) && ring->vq.last_avail != state.num) {
        for (unsigned i = 0; i < fe->type->rings; i++)
            fe->rings[i].was_started = fe->rings[i].was_started && (fe->type->stateless_rings >> i & 1);
        reset_device(fe);
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
    if (ring->started && ring->enabled && fe->type->ring_started(fe->opaque, state.index, ring->kick_fd, &err) < 0)
        return refuse(fe, "vhost-user: kick descriptor cannot be waited for");
    return 0;
}

/* 0: its size fits its message. */
static int config_message(struct pv_fe *fe, struct config_space *config)
{
    memset(config, 0, sizeof(*config));
    memcpy(config, fe->msg.payload, fe->msg.size < sizeof(*config) ? fe->msg.size : sizeof(*config));
    if (config->size > sizeof(config->data) || fe->msg.size != 12 + config->size)
        return refuse(fe, "vhost-user: configuration space message out of range");
    return 0;
}

static int on_get_config(struct pv_fe *fe)
{
    struct config_space config;

    if (config_message(fe, &config) < 0)
        return -1;
    memset(config.data, 0, sizeof(config.data));
    if (fe->type->get_config(fe->opaque, config.offset, config.data, config.size) < 0)
        return refuse(fe, "vhost-user: configuration space message out of range");
    return reply(fe, &config, fe->msg.size);
}

static int on_set_config(struct pv_fe *fe)
{
    struct config_space config;

    if (config_message(fe, &config) < 0)
        return -1;
    if (!fe->type->set_config || fe->type->set_config(fe->opaque, config.offset, config.data, config.size) < 0)
        return refuse(fe, "vhost-user: configuration space that cannot be written");
    return 0;
}

static int on_set_backend_fd(struct pv_fe *fe)
{
    if (fe->fd_count != 1)
        return refuse(fe, "vhost-user: missing descriptor");
    replace_fd(&fe->backend_fd, take_message_fd(fe));
    return 0;
}

static void drop_log(struct pv_fe *fe)
{
    if (fe->log.map)
        munmap(fe->log.map, fe->log.size);
    fe->log = (struct pv_log){0};
}

static int on_set_log_base(struct pv_fe *fe)
{
    struct log_area area;
    struct stat st;

    memcpy(&area, fe->msg.payload, sizeof(area));
    if (fe->fd_count != 1 || fstat(fe->fds[0], &st) < 0 || !S_ISREG(st.st_mode) || area.size == 0 ||
        area.offset % LOG_PAGE || area.offset > (uint64_t)st.st_size || area.size > (uint64_t)st.st_size - area.offset)
        return refuse(fe, "vhost-user: log that is no file of its size");
    void *map = mmap(NULL, area.size, PROT_READ | PROT_WRITE, MAP_SHARED, fe->fds[0], (off_t)area.offset);

    if (map == MAP_FAILED)
        return refuse(fe, "vhost-user: log that cannot be mapped");
    drop_log(fe);
    fe->log = (struct pv_log){.map = map, .size = area.size};
    return reply_u64(fe, 0);
}

/* The descriptor would be signalled when the log has something: no front end of ours waits for it. */
static int on_set_log_fd(struct pv_fe *fe)
{
    (void)fe;
    return 0;
}

static int on_get_inflight(struct pv_fe *fe)
{
    struct inflight_area area = {0};
    struct pv_inflight region = {.fd = -1};
    int err, result;

    memcpy(&area, fe->msg.payload, fe->msg.size < sizeof(area) ? fe->msg.size : sizeof(area));
    if (area.queues == 0 || area.queues > fe->type->rings || area.queue_size == 0 ||
        area.queue_size > fe->type->queue_max)
        return refuse(fe, "vhost-user: in-flight region for queues that there are not");
    if (pv_inflight_create(&region, area.queues, area.queue_size, &err) < 0)
        return refuse(fe, "vhost-user: in-flight region that cannot be made");
    area.size = region.size;
    area.offset = 0;
    result = reply_with(fe, &area, fe->msg.size, region.fd);
    pv_inflight_close(&region);
    return result;
}

static bool any_ring_started(const struct pv_fe *fe)
{
    for (unsigned i = 0; i < fe->type->rings; i++)
        if (fe->rings[i].started)
            return true;
    return false;
}

static int on_set_inflight(struct pv_fe *fe)
{
    struct inflight_area area = {0};
    int err;

    memcpy(&area, fe->msg.payload, fe->msg.size < sizeof(area) ? fe->msg.size : sizeof(area));
    if (fe->fd_count != 1 || area.queues > fe->type->rings || any_ring_started(fe))
        return refuse(fe, "vhost-user: in-flight region that does not fit, or comes too late");
    if (pv_inflight_map(&fe->inflight, fe->fds[0], area.size, area.offset, area.queues, area.queue_size, &err) < 0)
        return refuse(fe, "vhost-user: in-flight region that cannot be mapped");
    take_message_fd(fe);
    return 0;
}

enum {
    REPLIES = 1, /* has an answer of its own, so REPLY_ACK does not apply */
    DRAINS = 2,  /* waits until no chain is held */
};

struct handler {
    int (*handle)(struct pv_fe *fe);
    uint16_t min_size, max_size; /* of the payload */
    uint8_t max_fds;
    uint8_t flags;
    uint64_t protocol_feature; /* only for devices that have it */
};

#define STATE sizeof(struct vring_state)
#define ADDR sizeof(struct vring_addr)
#define CONFIG sizeof(struct config_space)

static const struct handler HANDLERS[REQUEST_LIMIT] = {
    [GET_FEATURES] = {on_get_features, 0, 0, 0, REPLIES, 0},
    [SET_FEATURES] = {on_set_features, 8, 8, 0, 0, 0},
    [SET_OWNER] = {on_set_owner, 0, 0, 0, 0, 0},
    [RESET_OWNER] = {on_reset_owner, 0, 0, 0, DRAINS, 0},
    [SET_MEM_TABLE] = {on_set_mem_table, 8, sizeof(struct mem_table), PV_MAX_REGIONS, DRAINS, 0},
    [SET_LOG_BASE] = {on_set_log_base, 16, 16, 1, REPLIES, PV_PROTOCOL_LOG_SHMFD},
    [SET_LOG_FD] = {on_set_log_fd, 0, 8, 1, 0, PV_PROTOCOL_LOG_SHMFD},
    [SET_VRING_NUM] = {on_set_vring_num, STATE, STATE, 0, 0, 0},
    [SET_VRING_ADDR] = {on_set_vring_addr, ADDR, ADDR, 0, DRAINS, 0},
    [SET_VRING_BASE] = {on_set_vring_base, STATE, STATE, 0, 0, 0},
    [GET_VRING_BASE] = {on_get_vring_base, STATE, STATE, 0, REPLIES | DRAINS, 0},
    [SET_VRING_KICK] = {on_set_vring_kick, 8, 8, 1, DRAINS, 0},
    [SET_VRING_CALL] = {on_set_vring_call, 8, 8, 1, 0, 0},
    [SET_VRING_ERR] = {on_set_vring_err, 8, 8, 1, 0, 0},
    [GET_PROTOCOL_FEATURES] = {on_get_protocol_features, 0, 0, 0, REPLIES, 0},
    [SET_PROTOCOL_FEATURES] = {on_set_protocol_features, 8, 8, 0, 0, 0},
    [GET_QUEUE_NUM] = {on_get_queue_num, 0, 0, 0, REPLIES, 0},
    [SET_VRING_ENABLE] = {on_set_vring_enable, STATE, STATE, 0, 0, 0},
    [SET_BACKEND_REQ_FD] = {on_set_backend_fd, 0, 8, 1, 0, PV_PROTOCOL_BACKEND_REQ},
    [GET_CONFIG] = {on_get_config, 12, CONFIG, 0, REPLIES, PV_PROTOCOL_CONFIG},
    [SET_CONFIG] = {on_set_config, 12, CONFIG, 0, 0, PV_PROTOCOL_CONFIG},
    [GET_INFLIGHT_FD] = {on_get_inflight, 20, sizeof(struct inflight_area), 0, REPLIES, PV_PROTOCOL_INFLIGHT},
    [SET_INFLIGHT_FD] = {on_set_inflight, 20, sizeof(struct inflight_area), 1, DRAINS, PV_PROTOCOL_INFLIGHT},
};

/* ---- receiving --------------------------------------------------------------------------------------------------- */

static const struct handler *handler_of(const struct pv_fe *fe)
{
    const struct handler *handler = fe->msg.request < REQUEST_LIMIT ? &HANDLERS[fe->msg.request] : NULL;

    if (!handler || !handler->handle || (handler->protocol_feature & ~fe->type->protocol_features))
        return NULL;
    return handler;
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

/* Whether the message that is here has to wait for chains that are held. */
static bool must_drain(struct pv_fe *fe)
{
    const struct handler *handler = handler_of(fe);

    fe->draining = handler && (handler->flags & DRAINS) && fe->held > 0;
    return fe->draining;
}

/* The message is complete. -1: the connection cannot go on. */
static int dispatch(struct pv_fe *fe)
{
    const struct handler *handler = handler_of(fe);
    bool wants_ack = (fe->msg.flags & FLAG_NEED_REPLY) && (fe->protocol_features & PV_PROTOCOL_REPLY_ACK);
    int result;

    fe->fault = NULL;
    result = handler ? handler->handle(fe) : refuse(fe, "vhost-user: request that is not supported");
    close_message_fds(fe);
    fe->have = 0;
    if (handler && (handler->flags & REPLIES))
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
        if (fe->have < HEADER_SIZE + fe->msg.size)
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
        stop_ring(fe, i);
        replace_fd(&fe->rings[i].call_fd, -1);
        replace_fd(&fe->rings[i].err_fd, -1);
    }
    close_message_fds(fe);
    pv_memtable_clear(&fe->mem);
    pv_inflight_close(&fe->inflight);
    drop_log(fe);
    replace_fd(&fe->backend_fd, -1);
    replace_fd(&fe->fd, -1);
}
