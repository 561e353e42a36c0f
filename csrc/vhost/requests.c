/* What each message of a front end does. */
#include <errno.h>
#include <fcntl.h>
#include <linux/virtio_config.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "protocol.h"
#include "rooms.h"

#define LOG_PAGE 4096U

/* vhost-user numbers are in the host's byte order. Payloads are copied out of the message, so that alignment does not
 * matter. */
static uint64_t payload_u64(const struct pv_fe *fe)
{
    uint64_t value;

    memcpy(&value, fe->msg.payload, sizeof(value));
    return value;
}

static uint64_t features_offered(const struct pv_fe *fe)
{
    return fe->type->features | PV_VU_F_PROTOCOL_FEATURES;
}

static int on_get_features(struct pv_fe *fe)
{
    return pv_fe_reply_u64(fe, features_offered(fe));
}

static int on_set_features(struct pv_fe *fe)
{
    uint64_t features = payload_u64(fe);

    if (features & ~features_offered(fe))
        return pv_fe_refuse(fe, "vhost-user: features that were not offered");
    fe->features = features;
    for (unsigned i = 0; i < fe->type->rings; i++)
        if (!(features & PV_VU_F_PROTOCOL_FEATURES))
            fe->rings[i].enabled = true;
    return 0;
}

static int on_get_protocol_features(struct pv_fe *fe)
{
    return pv_fe_reply_u64(fe, fe->type->protocol_features);
}

static int on_set_protocol_features(struct pv_fe *fe)
{
    if (payload_u64(fe) & ~fe->type->protocol_features)
        return pv_fe_refuse(fe, "vhost-user: protocol features that were not offered");
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
        pv_fe_stop_ring(fe, i);
        fe->rings[i].was_started = false;
    }
    reset_device(fe);
    return 0;
}

static int on_set_mem_table(struct pv_fe *fe)
{
    struct pv_vu_mem_table table;
    int err;

    memcpy(&table, fe->msg.payload, fe->msg.size < sizeof(table) ? fe->msg.size : sizeof(table));
    if (table.count > PV_MAX_REGIONS || fe->msg.size < 8 + table.count * sizeof(table.regions[0]))
        return pv_fe_refuse(fe, "vhost-user: memory table of a bad size");
    if (fe->fd_count != table.count)
        return pv_fe_refuse(fe, "vhost-user: memory table with missing or spare descriptors");
    struct pv_region_desc aligned[PV_MAX_REGIONS];

    memcpy(aligned, table.regions, sizeof(aligned));
    /* The rings point into the old mappings. */
    for (unsigned i = 0; i < fe->type->rings; i++)
        pv_vq_unmap(&fe->rings[i].vq);
    int result = pv_memtable_set(&fe->mem, aligned, fe->fds, table.count, &err);

    pv_fe_remap_rings(fe);
    return result < 0 ? pv_fe_refuse(fe, "vhost-user: memory table that cannot be mapped") : 0;
}

static int on_get_queue_num(struct pv_fe *fe)
{
    return pv_fe_reply_u64(fe, fe->type->rings);
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
    struct pv_vu_vring_state state;

    memcpy(&state, fe->msg.payload, sizeof(state));
    struct pv_fe_ring *ring = ring_of(fe, state.index);

    if (!ring)
        return -1;
    if (ring->started)
        return pv_fe_refuse(fe, "vhost-user: size of a running ring changed");
    if (state.num == 0 || state.num > fe->type->queue_max || (state.num & (state.num - 1)))
        return pv_fe_refuse(fe, "vhost-user: ring size is not a power of two, or too large");
    ring->vq.num = state.num;
    return 0;
}

static int on_set_vring_addr(struct pv_fe *fe)
{
    struct pv_vu_vring_addr addr;

    memcpy(&addr, fe->msg.payload, sizeof(addr));
    struct pv_fe_ring *ring = ring_of(fe, addr.index);

    if (!ring)
        return -1;
    ring->vq.desc_addr = addr.desc;
    ring->vq.avail_addr = addr.avail;
    ring->vq.used_addr = addr.used;
    ring->logged = addr.flags & PV_VU_ADDR_F_LOG;
    ring->log_addr = addr.log;
    if (ring->started && !pv_vq_map(&ring->vq, &fe->mem))
        return pv_fe_refuse(fe, "vhost-user: running ring moved outside of the memory table");
    return 0;
}

static int on_set_vring_base(struct pv_fe *fe)
{
    struct pv_vu_vring_state state;

    memcpy(&state, fe->msg.payload, sizeof(state));
    struct pv_fe_ring *ring = ring_of(fe, state.index);

    if (!ring)
        return -1;
    if (ring->started || state.num > UINT16_MAX)
        return pv_fe_refuse(fe, "vhost-user: bad ring base");
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
    struct pv_vu_vring_state state;

    memcpy(&state, fe->msg.payload, sizeof(state));
    struct pv_fe_ring *ring = ring_of(fe, state.index);

    if (!ring)
        return -1;
    state.num = ring->was_started ? ring->vq.last_avail : ring->base;
    pv_fe_stop_ring(fe, state.index);
    return pv_fe_reply(fe, &state, sizeof(state));
}

/* Parses SET_VRING_{KICK,CALL,ERR}: the ring, and its descriptor or -1. NULL: refused. */
static struct pv_fe_ring *vring_fd(struct pv_fe *fe, int *fd)
{
    uint64_t value = payload_u64(fe);
    struct pv_fe_ring *ring = ring_of(fe, (uint32_t)(value & PV_VU_VRING_INDEX_MASK));

    if (ring && fe->fd_count != (value & PV_VU_VRING_NO_FD ? 0 : 1)) {
        fe->fault = "vhost-user: missing or spare descriptor";
        return NULL;
    }
    *fd = ring ? pv_fe_take_fd(fe) : -1;
    return ring;
}

static int on_set_vring_kick(struct pv_fe *fe)
{
    int fd;
    struct pv_fe_ring *ring = vring_fd(fe, &fd);

    if (!ring)
        return -1;
    if (fd < 0)
        return pv_fe_refuse(fe, "vhost-user: rings without a kick descriptor (polling) are not supported");
    return pv_fe_start_ring(fe, (unsigned)(ring - fe->rings), fd);
}

/* `slot`: where a ring keeps a descriptor that is signalled. Not blocking: a front end that lets the counter run
 * full stops its own interrupts, not this process. */
static int set_signal(struct pv_fe *fe, size_t slot)
{
    int fd;
    struct pv_fe_ring *ring = vring_fd(fe, &fd);

    if (!ring)
        return -1;
    if (fd >= 0)
        fcntl(fd, F_SETFL, O_NONBLOCK);
    pv_fe_replace_fd((int *)(void *)((char *)ring + slot), fd);
    return 0;
}

static int on_set_vring_call(struct pv_fe *fe)
{
    return set_signal(fe, offsetof(struct pv_fe_ring, call_fd));
}

static int on_set_vring_err(struct pv_fe *fe)
{
    return set_signal(fe, offsetof(struct pv_fe_ring, err_fd));
}

static int on_set_vring_enable(struct pv_fe *fe)
{
    struct pv_vu_vring_state state;
    int err;

    memcpy(&state, fe->msg.payload, sizeof(state));
    struct pv_fe_ring *ring = ring_of(fe, state.index);

    if (!ring)
        return -1;
    ring->enabled = state.num != 0;
    /* Chains may have become available while it was disabled. */
    if (ring->started && ring->enabled && fe->type->ring_started(fe->opaque, state.index, ring->kick_fd, &err) < 0)
        return pv_fe_refuse(fe, "vhost-user: kick descriptor cannot be waited for");
    return 0;
}

/* 0: its size fits its message. */
static int config_message(struct pv_fe *fe, struct pv_vu_config_space *config)
{
    memset(config, 0, sizeof(*config));
    memcpy(config, fe->msg.payload, fe->msg.size < sizeof(*config) ? fe->msg.size : sizeof(*config));
    if (config->size > sizeof(config->data) || fe->msg.size != 12 + config->size)
        return pv_fe_refuse(fe, "vhost-user: configuration space message out of range");
    return 0;
}

static int on_get_config(struct pv_fe *fe)
{
    struct pv_vu_config_space config;

    if (config_message(fe, &config) < 0)
        return -1;
    memset(config.data, 0, sizeof(config.data));
    if (fe->type->get_config(fe->opaque, config.offset, config.data, config.size) < 0)
        return pv_fe_refuse(fe, "vhost-user: configuration space message out of range");
    return pv_fe_reply(fe, &config, fe->msg.size);
}

static int on_set_config(struct pv_fe *fe)
{
    struct pv_vu_config_space config;

    if (config_message(fe, &config) < 0)
        return -1;
    if (!fe->type->set_config || fe->type->set_config(fe->opaque, config.offset, config.data, config.size) < 0)
        return pv_fe_refuse(fe, "vhost-user: configuration space that cannot be written");
    return 0;
}

static int on_set_backend_fd(struct pv_fe *fe)
{
    if (fe->fd_count != 1)
        return pv_fe_refuse(fe, "vhost-user: missing descriptor");
    pv_fe_replace_fd(&fe->backend_fd, pv_fe_take_fd(fe));
    return 0;
}

static int on_set_log_base(struct pv_fe *fe)
{
    struct pv_vu_log_area area;
    struct stat st;

    memcpy(&area, fe->msg.payload, sizeof(area));
    if (fe->fd_count != 1 || fstat(fe->fds[0], &st) < 0 || !S_ISREG(st.st_mode) || area.size == 0 ||
        area.offset % LOG_PAGE || area.offset > (uint64_t)st.st_size || area.size > (uint64_t)st.st_size - area.offset)
        return pv_fe_refuse(fe, "vhost-user: log that is no file of its size");
    void *map = mmap(NULL, area.size, PROT_READ | PROT_WRITE, MAP_SHARED, fe->fds[0], (off_t)area.offset);

    if (map == MAP_FAILED)
        return pv_fe_refuse(fe, "vhost-user: log that cannot be mapped");
    pv_fe_drop_log(fe);
    fe->log = (struct pv_log){.map = map, .size = area.size};
    return pv_fe_reply_u64(fe, 0);
}

/* The descriptor would be signalled when the log has something: no front end of ours waits for it. */
static int on_set_log_fd(struct pv_fe *fe)
{
    (void)fe;
    return 0;
}

static int on_get_inflight(struct pv_fe *fe)
{
    struct pv_vu_inflight_area area = {0};
    struct pv_inflight region = {.fd = -1};
    int err, result;

    memcpy(&area, fe->msg.payload, fe->msg.size < sizeof(area) ? fe->msg.size : sizeof(area));
    if (area.queues == 0 || area.queues > fe->type->rings || area.queue_size == 0 ||
        area.queue_size > fe->type->queue_max)
        return pv_fe_refuse(fe, "vhost-user: in-flight region for queues that there are not");
    if (pv_inflight_create(&region, area.queues, area.queue_size, &err) < 0)
        return pv_fe_refuse(fe, "vhost-user: in-flight region that cannot be made");
    area.size = region.size;
    area.offset = 0;
    result = pv_fe_reply_with(fe, &area, fe->msg.size, region.fd);
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
    struct pv_vu_inflight_area area = {0};
    int err;

    memcpy(&area, fe->msg.payload, fe->msg.size < sizeof(area) ? fe->msg.size : sizeof(area));
    if (fe->fd_count != 1 || area.queues > fe->type->rings || any_ring_started(fe))
        return pv_fe_refuse(fe, "vhost-user: in-flight region that does not fit, or comes too late");
    if (pv_inflight_map(&fe->inflight, fe->fds[0], area.size, area.offset, area.queues, area.queue_size, &err) < 0)
        return pv_fe_refuse(fe, "vhost-user: in-flight region that cannot be mapped");
    pv_fe_take_fd(fe);
    return 0;
}

#define STATE sizeof(struct pv_vu_vring_state)
#define ADDR sizeof(struct pv_vu_vring_addr)
#define CONFIG sizeof(struct pv_vu_config_space)
#define INFLIGHT sizeof(struct pv_vu_inflight_area)

static const struct pv_handler HANDLERS[PV_VU_REQUEST_LIMIT] = {
    [PV_VU_GET_FEATURES] = {on_get_features, 0, 0, 0, PV_REPLIES, 0},
    [PV_VU_SET_FEATURES] = {on_set_features, 8, 8, 0, 0, 0},
    [PV_VU_SET_OWNER] = {on_set_owner, 0, 0, 0, 0, 0},
    [PV_VU_RESET_OWNER] = {on_reset_owner, 0, 0, 0, PV_DRAINS, 0},
    [PV_VU_SET_MEM_TABLE] = {on_set_mem_table, 8, sizeof(struct pv_vu_mem_table), PV_MAX_REGIONS, PV_DRAINS, 0},
    [PV_VU_SET_LOG_BASE] = {on_set_log_base, 16, 16, 1, PV_REPLIES, PV_PROTOCOL_LOG_SHMFD},
    [PV_VU_SET_LOG_FD] = {on_set_log_fd, 0, 8, 1, 0, PV_PROTOCOL_LOG_SHMFD},
    [PV_VU_SET_VRING_NUM] = {on_set_vring_num, STATE, STATE, 0, 0, 0},
    [PV_VU_SET_VRING_ADDR] = {on_set_vring_addr, ADDR, ADDR, 0, PV_DRAINS, 0},
    [PV_VU_SET_VRING_BASE] = {on_set_vring_base, STATE, STATE, 0, 0, 0},
    [PV_VU_GET_VRING_BASE] = {on_get_vring_base, STATE, STATE, 0, PV_REPLIES | PV_DRAINS, 0},
    [PV_VU_SET_VRING_KICK] = {on_set_vring_kick, 8, 8, 1, PV_DRAINS, 0},
    [PV_VU_SET_VRING_CALL] = {on_set_vring_call, 8, 8, 1, 0, 0},
    [PV_VU_SET_VRING_ERR] = {on_set_vring_err, 8, 8, 1, 0, 0},
    [PV_VU_GET_PROTOCOL_FEATURES] = {on_get_protocol_features, 0, 0, 0, PV_REPLIES, 0},
    [PV_VU_SET_PROTOCOL_FEATURES] = {on_set_protocol_features, 8, 8, 0, 0, 0},
    [PV_VU_GET_QUEUE_NUM] = {on_get_queue_num, 0, 0, 0, PV_REPLIES, 0},
    [PV_VU_SET_VRING_ENABLE] = {on_set_vring_enable, STATE, STATE, 0, 0, 0},
    [PV_VU_SET_BACKEND_REQ_FD] = {on_set_backend_fd, 0, 8, 1, 0, PV_PROTOCOL_BACKEND_REQ},
    [PV_VU_GET_CONFIG] = {on_get_config, 12, CONFIG, 0, PV_REPLIES, PV_PROTOCOL_CONFIG},
    [PV_VU_SET_CONFIG] = {on_set_config, 12, CONFIG, 0, 0, PV_PROTOCOL_CONFIG},
    [PV_VU_GET_INFLIGHT_FD] = {on_get_inflight, 20, INFLIGHT, 0, PV_REPLIES, PV_PROTOCOL_INFLIGHT},
    [PV_VU_SET_INFLIGHT_FD] = {on_set_inflight, 20, INFLIGHT, 1, PV_DRAINS, PV_PROTOCOL_INFLIGHT},
};

const struct pv_handler *pv_fe_handler(const struct pv_fe *fe)
{
    const struct pv_handler *handler = fe->msg.request < PV_VU_REQUEST_LIMIT ? &HANDLERS[fe->msg.request] : NULL;

    if (!handler || !handler->handle || (handler->protocol_feature & ~fe->type->protocol_features))
        return NULL;
    return handler;
}
