/* vhost-user on the wire, as both ends see it: QEMU's docs/interop/vhost-user.rst. Numbers are in the host's byte
 * order; payloads lie in their messages without alignment and are copied out of them. */
#ifndef PV_VHOST_PROTOCOL_H
#define PV_VHOST_PROTOCOL_H

#include <stdint.h>

#include "vhost_user.h"

#define PV_VU_VERSION_MASK 0x3U
#define PV_VU_VERSION 0x1U
#define PV_VU_REPLY 0x4U
#define PV_VU_NEED_REPLY 0x8U

struct pv_vu_header {
    uint32_t request, flags, size;
} __attribute__((packed));

#define PV_VU_HEADER_SIZE ((uint32_t)sizeof(struct pv_vu_header))

#define PV_VU_VRING_INDEX_MASK 0xffU
#define PV_VU_VRING_NO_FD 0x100U

#define PV_VU_F_PROTOCOL_FEATURES (1ULL << 30)
#define PV_VU_ADDR_F_LOG 1U

enum pv_vu_request {
    PV_VU_GET_FEATURES = 1,
    PV_VU_SET_FEATURES = 2,
    PV_VU_SET_OWNER = 3,
    PV_VU_RESET_OWNER = 4,
    PV_VU_SET_MEM_TABLE = 5,
    PV_VU_SET_LOG_BASE = 6,
    PV_VU_SET_LOG_FD = 7,
    PV_VU_SET_VRING_NUM = 8,
    PV_VU_SET_VRING_ADDR = 9,
    PV_VU_SET_VRING_BASE = 10,
    PV_VU_GET_VRING_BASE = 11,
    PV_VU_SET_VRING_KICK = 12,
    PV_VU_SET_VRING_CALL = 13,
    PV_VU_SET_VRING_ERR = 14,
    PV_VU_GET_PROTOCOL_FEATURES = 15,
    PV_VU_SET_PROTOCOL_FEATURES = 16,
    PV_VU_GET_QUEUE_NUM = 17,
    PV_VU_SET_VRING_ENABLE = 18,
    PV_VU_SET_BACKEND_REQ_FD = 21,
    PV_VU_GET_CONFIG = 24,
    PV_VU_SET_CONFIG = 25,
    PV_VU_GET_INFLIGHT_FD = 31,
    PV_VU_SET_INFLIGHT_FD = 32,
    PV_VU_REQUEST_LIMIT = 64,
};

struct pv_vu_vring_state {
    uint32_t index;
    uint32_t num;
} __attribute__((packed));

struct pv_vu_vring_addr {
    uint32_t index;
    uint32_t flags;
    uint64_t desc, used, avail, log;
} __attribute__((packed));

struct pv_vu_mem_table {
    uint32_t count;
    uint32_t padding;
    struct pv_region_desc regions[PV_MAX_REGIONS];
} __attribute__((packed));

struct pv_vu_config_space {
    uint32_t offset;
    uint32_t size;
    uint32_t flags;
    uint8_t data[PV_CONFIG_MAX];
} __attribute__((packed));

struct pv_vu_log_area {
    uint64_t size;
    uint64_t offset;
} __attribute__((packed));

struct pv_vu_inflight_area {
    uint64_t size;
    uint64_t offset;
    uint16_t queues;
    uint16_t queue_size;
    uint32_t padding; /* QEMU sends it, the specification does not have it */
} __attribute__((packed));

enum pv_vu_backend_request { PV_VU_BACKEND_CONFIG_CHANGE = 2 };

#endif
