#include "driver.h"

#include <errno.h>
#include <linux/virtio_config.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "vhost/protocol.h"

#define RING_SPACE 0x8000U
#define INDIRECT_SPACE (DRV_SLOTS * 64U)
#define HEADER_SPACE (DRV_SLOTS * 64U) /* header at +0, status at +32, discard range at +16 */
#define QUEUE_SPACE (RING_SPACE + INDIRECT_SPACE + HEADER_SPACE + DRV_SLOTS * DRV_DATA)
#define ANSWER_MS 10000
#define CONFIG_SIZE 60U /* up to write_zeroes: back ends refuse what they do not know */

#define P_WANTED (PV_PROTOCOL_MQ | PV_PROTOCOL_BACKEND_REQ | PV_PROTOCOL_CONFIG | PV_PROTOCOL_INFLIGHT)

struct header {
    uint32_t request, flags, size;
} __attribute__((packed));

static int failed(const char *what)
{
    fprintf(stderr, "driver: %s: %s\n", what, strerror(errno));
    return -1;
}

/* ---- messages ---------------------------------------------------------------------------------------------------- */

int drv_send(struct drv *drv, uint32_t request, uint32_t flags, const void *payload, uint32_t size, const int *fds,
    unsigned count)
{
    char control[CMSG_SPACE(sizeof(int) * 8)] __attribute__((aligned(8))) = {0};
    struct pv_vu_header header = {request, 1 | flags, size};
    struct iovec iov[2] = {{&header, sizeof(header)}, {(void *)payload, size}};
    struct msghdr mh = {.msg_iov = iov, .msg_iovlen = 2};

    if (count > 0) {
        mh.msg_control = control;
        mh.msg_controllen = CMSG_SPACE(sizeof(int) * count);
        struct cmsghdr *c = CMSG_FIRSTHDR(&mh);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof(int) * count);
        memcpy(CMSG_DATA(c), fds, sizeof(int) * count);
    }
    return sendmsg(drv->sock, &mh, MSG_NOSIGNAL) == (ssize_t)(sizeof(header) + size) ? 0 : failed("send");
}

static int receive_exactly(int sock, void *to, size_t len, int *fd)
{
    size_t have = 0;

    while (have < len) {
        char control[CMSG_SPACE(sizeof(int))] __attribute__((aligned(8)));
        struct iovec iov = {(uint8_t *)to + have, len - have};
        struct msghdr mh = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
        struct pollfd p = {.fd = sock, .events = POLLIN};
        ssize_t got = poll(&p, 1, ANSWER_MS) == 1 ? recvmsg(sock, &mh, MSG_CMSG_CLOEXEC) : -1;

        if (got <= 0)
            return failed("no answer");
        struct cmsghdr *c = CMSG_FIRSTHDR(&mh);
        if (c && c->cmsg_type == SCM_RIGHTS && fd)
            memcpy(fd, CMSG_DATA(c), sizeof(*fd));
        have += (size_t)got;
    }
    return 0;
}

int drv_receive(struct drv *drv, uint32_t request, void *payload, uint32_t size, int *fd)
{
    struct pv_vu_header header;

    if (receive_exactly(drv->sock, &header, sizeof(header), fd) < 0)
        return -1;
    if (header.request != request || header.size > size) {
        fprintf(stderr, "driver: the answer to %u is %u, %u bytes\n", request, header.request, header.size);
        return -1;
    }
    return receive_exactly(drv->sock, payload, header.size, NULL);
}

static int ask(struct drv *drv, uint32_t request, uint64_t *value)
{
    return drv_send(drv, request, 0, NULL, 0, NULL, 0) < 0 ? -1 : drv_receive(drv, request, value, sizeof(*value), NULL);
}

static int tell(struct drv *drv, uint32_t request, uint64_t value)
{
    return drv_send(drv, request, 0, &value, sizeof(value), NULL, 0);
}

static int tell_fd(struct drv *drv, uint32_t request, unsigned queue, int fd)
{
    uint64_t value = queue;

    return drv_send(drv, request, 0, &value, sizeof(value), &fd, 1);
}

static int tell_state(struct drv *drv, uint32_t request, uint32_t index, uint32_t num)
{
    struct pv_vu_vring_state state = {index, num};

    return drv_send(drv, request, 0, &state, sizeof(state), NULL, 0);
}

/* ---- life -------------------------------------------------------------------------------------------------------- */

static void lay_out(struct drv *drv, unsigned i)
{
    struct drv_queue *q = &drv->queue[i];
    uint8_t *at = drv->ram + (q->base = i * (uint64_t)QUEUE_SPACE);

    q->desc = (void *)at;
    q->avail = (void *)(at + DRV_NUM * 16);
    q->used = (void *)(at + DRV_NUM * 16 + 0x1000);
    q->kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    q->call = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    q->err = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
}

int drv_open(struct drv *drv, unsigned queues)
{
    memset(drv, 0, sizeof(*drv));
    drv->sock = drv->backend = drv->inflight = -1;
    drv->queues = queues;
    drv->ram_size = queues * (size_t)QUEUE_SPACE;
    drv->memfd = memfd_create("guest", MFD_CLOEXEC);
    if (drv->memfd < 0 || ftruncate(drv->memfd, (off_t)drv->ram_size) < 0)
        return failed("guest memory");
    drv->ram = mmap(NULL, drv->ram_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, drv->memfd, 0);
    if (drv->ram == MAP_FAILED)
        return failed("guest memory");
    for (unsigned i = 0; i < queues; i++)
        lay_out(drv, i);
    return 0;
}

void drv_hang_up(struct drv *drv)
{
    if (drv->sock >= 0)
        close(drv->sock);
    if (drv->backend >= 0)
        close(drv->backend);
    drv->sock = drv->backend = -1;
}

void drv_close(struct drv *drv)
{
    drv_hang_up(drv);
    for (unsigned i = 0; i < drv->queues; i++) {
        close(drv->queue[i].kick);
        close(drv->queue[i].call);
        close(drv->queue[i].err);
    }
    if (drv->inflight >= 0)
        close(drv->inflight);
    munmap(drv->ram, drv->ram_size);
    close(drv->memfd);
}

static int send_memory(struct drv *drv)
{
    struct pv_vu_mem_table memory = {.count = 1, .regions = {{.size = drv->ram_size, .user_addr = DRV_USER}}};

    return drv_send(drv, PV_VU_SET_MEM_TABLE, 0, &memory, 8 + sizeof(memory.regions[0]), &drv->memfd, 1);
}

static int open_backend_channel(struct drv *drv)
{
    int pair[2], result;

    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0)
        return failed("socketpair");
    drv->backend = pair[0];
    result = drv_send(drv, PV_VU_SET_BACKEND_REQ_FD, 0, NULL, 0, &pair[1], 1);
    close(pair[1]);
    return result;
}

int drv_adopt(struct drv *drv, int sock, uint64_t wanted)
{
    uint64_t offered;

    drv->sock = sock;
    if (ask(drv, PV_VU_GET_FEATURES, &offered) < 0)
        return -1;
    drv->features = offered & (wanted | PV_VU_F_PROTOCOL_FEATURES | (1ULL << VIRTIO_F_VERSION_1));
    drv->event_idx = drv->features & (1ULL << VIRTIO_RING_F_EVENT_IDX);
    drv->indirect = drv->features & (1ULL << VIRTIO_RING_F_INDIRECT_DESC);
    if (ask(drv, PV_VU_GET_PROTOCOL_FEATURES, &offered) < 0)
        return -1;
    drv->protocol_features = offered & P_WANTED;
    if (tell(drv, PV_VU_SET_PROTOCOL_FEATURES, drv->protocol_features) < 0 ||
        drv_send(drv, PV_VU_SET_OWNER, 0, NULL, 0, NULL, 0) < 0 || tell(drv, PV_VU_SET_FEATURES, drv->features) < 0)
        return -1;
    if ((drv->protocol_features & PV_PROTOCOL_BACKEND_REQ) && open_backend_channel(drv) < 0)
        return -1;
    return send_memory(drv);
}

int drv_connect(struct drv *drv, const char *path, uint64_t wanted)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    int sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    snprintf(addr.sun_path, sizeof(addr.sun_path), "%s", path);
    if (sock < 0 || connect(sock, (struct sockaddr *)&addr, sizeof(addr)) < 0) {
        if (sock >= 0)
            close(sock);
        return failed(path);
    }
    return drv_adopt(drv, sock, wanted);
}

static int share_inflight(struct drv *drv)
{
    struct pv_vu_inflight_area area = {.queues = (uint16_t)drv->queues, .queue_size = DRV_NUM};

    if (!(drv->protocol_features & PV_PROTOCOL_INFLIGHT))
        return 0;
    if (drv->inflight < 0) {
        if (drv_send(drv, PV_VU_GET_INFLIGHT_FD, 0, &area, sizeof(area), NULL, 0) < 0 ||
            drv_receive(drv, PV_VU_GET_INFLIGHT_FD, &area, sizeof(area), &drv->inflight) < 0)
            return -1;
        drv->inflight_size = area.size;
    }
    area = (struct pv_vu_inflight_area){.size = drv->inflight_size, .queues = (uint16_t)drv->queues, .queue_size = DRV_NUM};
    return drv_send(drv, PV_VU_SET_INFLIGHT_FD, 0, &area, sizeof(area), &drv->inflight, 1);
}

static int start_queue(struct drv *drv, unsigned i)
{
    struct drv_queue *q = &drv->queue[i];
    uint64_t user = DRV_USER + q->base;
    struct pv_vu_vring_addr addr = {.index = i, .desc = user, .avail = user + (uint64_t)((uint8_t *)q->avail - (uint8_t *)q->desc),
        .used = user + (uint64_t)((uint8_t *)q->used - (uint8_t *)q->desc)};

    /* As QEMU has it after a back end died: the last index that was used. */
    if (tell_state(drv, PV_VU_SET_VRING_NUM, i, DRV_NUM) < 0 ||
        tell_state(drv, PV_VU_SET_VRING_BASE, i, __atomic_load_n(&q->used->idx, __ATOMIC_ACQUIRE)) < 0 ||
        drv_send(drv, PV_VU_SET_VRING_ADDR, 0, &addr, sizeof(addr), NULL, 0) < 0 ||
        tell_fd(drv, PV_VU_SET_VRING_ERR, i, q->err) < 0 || tell_fd(drv, PV_VU_SET_VRING_CALL, i, q->call) < 0 ||
        tell_fd(drv, PV_VU_SET_VRING_KICK, i, q->kick) < 0)
        return -1;
    return tell_state(drv, PV_VU_SET_VRING_ENABLE, i, 1);
}

int drv_start(struct drv *drv, bool reset)
{
    for (unsigned i = 0; reset && i < drv->queues; i++) {
        struct drv_queue *q = &drv->queue[i];

        memset(drv->ram + q->base, 0, RING_SPACE);
        q->avail_idx = q->last_used = q->told = 0;
        if (drv->polling)
            q->avail->flags = VRING_AVAIL_F_NO_INTERRUPT;
    }
    if (share_inflight(drv) < 0)
        return -1;
    for (unsigned i = 0; i < drv->queues; i++)
        if (start_queue(drv, i) < 0)
            return -1;
    return 0;
}

int drv_stop(struct drv *drv, unsigned queue, uint16_t *base)
{
    struct pv_vu_vring_state state;

    if (tell_state(drv, PV_VU_GET_VRING_BASE, queue, 0) < 0 ||
        drv_receive(drv, PV_VU_GET_VRING_BASE, &state, sizeof(state), NULL) < 0)
        return -1;
    *base = (uint16_t)state.num;
    return 0;
}

int drv_config(struct drv *drv, struct virtio_blk_config *config)
{
    struct {
        uint32_t offset, size, flags;
        struct virtio_blk_config config;
    } __attribute__((packed)) space = {.size = CONFIG_SIZE};

    if (drv_send(drv, PV_VU_GET_CONFIG, 0, &space, 12 + CONFIG_SIZE, NULL, 0) < 0 ||
        drv_receive(drv, PV_VU_GET_CONFIG, &space, sizeof(space), NULL) < 0)
        return -1;
    *config = space.config;
    return 0;
}

/* ---- requests ---------------------------------------------------------------------------------------------------- */

static uint64_t header_addr(const struct drv *drv, unsigned queue, unsigned slot)
{
    return drv->queue[queue].base + RING_SPACE + INDIRECT_SPACE + slot * 64U;
}

uint64_t drv_data_addr(const struct drv *drv, unsigned queue, unsigned slot)
{
    return drv->queue[queue].base + RING_SPACE + INDIRECT_SPACE + HEADER_SPACE + slot * (uint64_t)DRV_DATA;
}

uint8_t *drv_data(struct drv *drv, unsigned queue, unsigned slot)
{
    return drv->ram + drv_data_addr(drv, queue, slot);
}

uint8_t drv_status(struct drv *drv, unsigned queue, unsigned slot)
{
    return drv->ram[header_addr(drv, queue, slot) + 32];
}

static bool has_data(uint32_t type)
{
    return type != VIRTIO_BLK_T_FLUSH;
}

static void fill_chain(struct vring_desc *d, uint16_t base, uint32_t type, uint64_t header, uint64_t data, uint32_t len)
{
    bool reads = type == VIRTIO_BLK_T_IN || type == VIRTIO_BLK_T_GET_ID;
    unsigned n = 0;

    d[n++] = (struct vring_desc){header, sizeof(struct virtio_blk_outhdr), VRING_DESC_F_NEXT, (uint16_t)(base + 1)};
    if (has_data(type)) {
        d[n] = (struct vring_desc){data, len, (uint16_t)(VRING_DESC_F_NEXT | (reads ? VRING_DESC_F_WRITE : 0)),
            (uint16_t)(base + 2)};
        n++;
    }
    d[n] = (struct vring_desc){header + 32, 1, VRING_DESC_F_WRITE, 0};
}

void drv_submit(struct drv *drv, unsigned queue, unsigned slot, uint32_t type, uint64_t sector, uint32_t len)
{
    struct drv_queue *q = &drv->queue[queue];
    uint64_t header = header_addr(drv, queue, slot), data = drv_data_addr(drv, queue, slot);
    uint16_t head = (uint16_t)(slot * 3);

    *(struct virtio_blk_outhdr *)(drv->ram + header) = (struct virtio_blk_outhdr){.type = type, .sector = sector};
    drv->ram[header + 32] = 0xff;
    if (drv->indirect) {
        uint64_t table = q->base + RING_SPACE + slot * 64U;

        fill_chain((struct vring_desc *)(drv->ram + table), 0, type, header, data, len);
        q->desc[head] = (struct vring_desc){table, has_data(type) ? 48 : 32, VRING_DESC_F_INDIRECT, 0};
    } else {
        fill_chain(&q->desc[head], head, type, header, data, len);
    }
    q->avail->ring[q->avail_idx % DRV_NUM] = head;
    __atomic_store_n(&q->avail->idx, ++q->avail_idx, __ATOMIC_RELEASE);
}

void drv_kick(struct drv *drv, unsigned queue)
{
    struct drv_queue *q = &drv->queue[queue];
    uint16_t event = 0;
    uint64_t one = 1;

    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (drv->event_idx) {
        event = __atomic_load_n((uint16_t *)&q->used->ring[DRV_NUM], __ATOMIC_RELAXED);
        bool wanted = vring_need_event(event, q->avail_idx, q->told);

        q->told = q->avail_idx;
        if (!wanted)
            return;
    } else if (__atomic_load_n(&q->used->flags, __ATOMIC_RELAXED) & VRING_USED_F_NO_NOTIFY) {
        return;
    }
    drv->kicks++;
    if (write(q->kick, &one, sizeof(one)) < 0)
        failed("kick");
}

static bool more(const struct drv_queue *q)
{
    return __atomic_load_n(&q->used->idx, __ATOMIC_ACQUIRE) != q->last_used;
}

int drv_take(struct drv *drv, unsigned queue)
{
    struct drv_queue *q = &drv->queue[queue];

    if (!more(q))
        return -1;
    return (int)(q->used->ring[q->last_used++ % DRV_NUM].id / 3);
}

bool drv_wait(struct drv *drv, unsigned queue, int timeout_ms)
{
    struct drv_queue *q = &drv->queue[queue];
    struct pollfd p = {.fd = q->call, .events = POLLIN};
    uint64_t count;

    if (drv->polling) {
        while (!more(q))
            __builtin_ia32_pause();
        return true;
    }
    for (;;) {
        if (drv->event_idx)
            __atomic_store_n(&q->avail->ring[DRV_NUM], q->last_used, __ATOMIC_RELAXED);
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        if (more(q))
            return true;
        if (poll(&p, 1, timeout_ms) != 1)
            return more(q);
        drv->calls++;
        if (read(q->call, &count, sizeof(count)) < 0 && errno != EAGAIN)
            failed("interrupt");
    }
}

uint8_t drv_do(struct drv *drv, unsigned queue, uint32_t type, uint64_t sector, uint32_t len)
{
    drv_submit(drv, queue, 0, type, sector, len);
    drv_kick(drv, queue);
    if (!drv_wait(drv, queue, ANSWER_MS))
        return 255;
    drv_take(drv, queue);
    return drv_status(drv, queue, 0);
}
