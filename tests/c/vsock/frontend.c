#include "frontend.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stddef.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "harness.h"
#include "vhost/memtable.h"

#define PATIENCE_MS 20000

struct msg {
    uint32_t request, flags, size;
    uint8_t payload[512];
} __attribute__((packed));

enum { GET_FEATURES = 1, SET_FEATURES, SET_OWNER, SET_MEM_TABLE = 5, SET_VRING_NUM = 8, SET_VRING_ADDR, SET_VRING_BASE,
       GET_VRING_BASE, SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR, GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES,
       SET_VRING_ENABLE = 18 };

/* ---- life -------------------------------------------------------------------------------------------------------- */

void fe_init(struct fe *fe)
{
    memset(fe, 0, sizeof(*fe));
    fe->features = FE_FEATURES;
    fe->rx_num = 64;
    fe->tx_num = 32;
    fe->rx_buffer = 4096 + FE_HEADER;
    fe->config.listen_fd = fe->config.frontend_fd = fe->config.host_listener_fd = -1;
    fe->config.guest_cid = FE_CID;
    fe->sock = -1;
}

static int listener(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

    CHECK(strlen(path) < sizeof(address.sun_path));
    strcpy(address.sun_path, path);
    CHECK(bind(fd, (struct sockaddr *)&address, sizeof(address)) == 0);
    CHECK(listen(fd, 4096) == 0);
    return fd;
}

static int connect_to(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    strcpy(address.sun_path, path);
    CHECK(connect(fd, (struct sockaddr *)&address, sizeof(address)) == 0);
    return fd;
}

static void *run_device(void *argument)
{
    struct fe *fe = argument;

    fe->result = pv_vsock_run(fe->device, &fe->err);
    return NULL;
}

static const char *in_dir(struct fe *fe, const char *name)
{
    snprintf(fe->path, sizeof(fe->path), "%s/%s", fe->dir, name);
    return fe->path;
}

void fe_open(struct fe *fe)
{
    char uds[96];
    int err;

    strcpy(fe->dir, "/tmp/hvt-vsock-XXXXXX");
    CHECK(mkdtemp(fe->dir));
    fe->config.listen_fd = listener(in_dir(fe, "f"));
    fe->config.host_listener_fd = listener(in_dir(fe, "v"));
    snprintf(uds, sizeof(uds), "%s/v", fe->dir);
    fe->config.uds_path = uds;
    CHECK(pv_vsock_create(&fe->config, &fe->device, &err) == 0);
    CHECK(pthread_create(&fe->thread, NULL, run_device, fe) == 0);
    fe->running = true;
    fe->memfd = memfd_create("guest", MFD_CLOEXEC);
    CHECK(ftruncate(fe->memfd, FE_RAM) == 0);
    fe->ram = mmap(NULL, FE_RAM, PROT_READ | PROT_WRITE, MAP_SHARED, fe->memfd, 0);
    CHECK(fe->ram != MAP_FAILED);
}

static void ring_init(struct fe *fe, struct fe_ring *ring, unsigned num, uint32_t at)
{
    *ring = (struct fe_ring){
        .num = num,
        .desc_addr = at,
        .avail_addr = at + 0x4000,
        .used_addr = at + 0x6000,
        .desc = (void *)(fe->ram + at),
        .avail = (void *)(fe->ram + at + 0x4000),
        .used = (void *)(fe->ram + at + 0x6000),
        .avail_idx = fe->base,
        .last_used = fe->base,
        .kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK),
        .call = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK),
        .err = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK),
    };
    ring->avail->idx = ring->used->idx = fe->base;
}

void fe_connect(struct fe *fe)
{
    fe->sock = connect_to(in_dir(fe, "f"));
    ring_init(fe, &fe->rings[FE_RX], fe->rx_num, 0x1000);
    ring_init(fe, &fe->rings[FE_TX], fe->tx_num, 0x11000);
}

void fe_start(struct fe *fe)
{
    uint64_t protocol = (1ULL << 0) | (1ULL << 3) | (1ULL << 9);

    CHECK((fe_ask(fe, GET_FEATURES) & FE_FEATURES) == FE_FEATURES);
    CHECK((fe_ask(fe, GET_PROTOCOL_FEATURES) & protocol) == protocol);
    fe_send(fe, SET_PROTOCOL_FEATURES, 1, &protocol, sizeof(protocol), NULL, 0);
    CHECK_EQ(fe_ack(fe, SET_OWNER, NULL, 0, NULL, 0), 0);
    CHECK_EQ(fe_ack(fe, SET_FEATURES, &fe->features, sizeof(fe->features), NULL, 0), 0);
    fe_set_memory(fe);
    for (unsigned slot = 0; slot < fe->rx_num; slot++)
        fe_give_rx(fe, slot);
    fe_start_ring(fe, FE_RX, fe->base);
    fe_start_ring(fe, FE_TX, fe->base);
}

void fe_up(struct fe *fe)
{
    fe_open(fe);
    fe_connect(fe);
    fe_start(fe);
}

void fe_down(struct fe *fe)
{
    pv_vsock_stop(fe->device);
    CHECK(pthread_join(fe->thread, NULL) == 0);
    pv_vsock_destroy(fe->device);
    if (fe->sock >= 0)
        close(fe->sock);
    for (unsigned i = 0; i < 2; i++) {
        if (fe->rings[i].num == 0)
            continue;
        close(fe->rings[i].kick);
        close(fe->rings[i].call);
        close(fe->rings[i].err);
    }
    munmap(fe->ram, FE_RAM);
    close(fe->memfd);
    unlink(in_dir(fe, "f"));
    unlink(in_dir(fe, "v"));
    CHECK(rmdir(fe->dir) == 0);
}

/* ---- vhost-user -------------------------------------------------------------------------------------------------- */

void fe_send(struct fe *fe, uint32_t request, uint32_t flags, const void *payload, uint32_t size, const int *fds,
    unsigned fd_count)
{
    struct msg msg = {.request = request, .flags = flags, .size = size};
    char control[CMSG_SPACE(sizeof(int) * 16)] __attribute__((aligned(8))) = {0};
    struct iovec iov = {.iov_base = &msg, .iov_len = 12 + (payload ? size : 0)};
    struct msghdr mh = {.msg_iov = &iov, .msg_iovlen = 1};

    if (payload)
        memcpy(msg.payload, payload, size);
    if (fd_count > 0) {
        mh.msg_control = control;
        mh.msg_controllen = CMSG_SPACE(sizeof(int) * fd_count);
        struct cmsghdr *c = CMSG_FIRSTHDR(&mh);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof(int) * fd_count);
        memcpy(CMSG_DATA(c), fds, sizeof(int) * fd_count);
    }
    CHECK_EQ(sendmsg(fe->sock, &mh, MSG_NOSIGNAL), iov.iov_len);
}

uint32_t fe_receive(struct fe *fe, void *payload, uint32_t size)
{
    struct msg msg;

    host_read(fe->sock, &msg, 12);
    CHECK_EQ(msg.flags, 5);
    CHECK(msg.size <= size);
    host_read(fe->sock, payload, msg.size);
    return msg.size;
}

uint64_t fe_ask(struct fe *fe, uint32_t request)
{
    uint64_t value;

    fe_send(fe, request, 1, NULL, 0, NULL, 0);
    CHECK_EQ(fe_receive(fe, &value, sizeof(value)), sizeof(value));
    return value;
}

uint64_t fe_ack(struct fe *fe, uint32_t request, const void *payload, uint32_t size, const int *fds, unsigned fd_count)
{
    uint64_t value;

    fe_send(fe, request, 9, payload, size, fds, fd_count);
    CHECK_EQ(fe_receive(fe, &value, sizeof(value)), sizeof(value));
    return value;
}

bool fe_is_dropped(struct fe *fe)
{
    return host_at_end(fe->sock);
}

void fe_set_memory(struct fe *fe)
{
    struct {
        uint32_t count, padding;
        struct pv_region_desc regions[2];
    } table = {.count = 2, .regions = {{0, FE_SPLIT, FE_USER, 0}, {FE_SPLIT, FE_RAM - FE_SPLIT, FE_USER + FE_SPLIT,
        FE_SPLIT}}};
    int fds[2] = {fe->memfd, fe->memfd};

    CHECK_EQ(fe_ack(fe, SET_MEM_TABLE, &table, sizeof(table), fds, 2), 0);
}

void fe_start_ring(struct fe *fe, unsigned i, uint16_t base)
{
    struct fe_ring *ring = &fe->rings[i];
    uint32_t num[2] = {i, ring->num}, start[2] = {i, base}, enable[2] = {i, 1};
    struct {
        uint32_t index, flags;
        uint64_t desc, used, avail, log;
    } addr = {i, 0, FE_USER + ring->desc_addr, FE_USER + ring->used_addr, FE_USER + ring->avail_addr, 0};
    uint64_t index = i;

    CHECK_EQ(fe_ack(fe, SET_VRING_NUM, num, 8, NULL, 0), 0);
    CHECK_EQ(fe_ack(fe, SET_VRING_BASE, start, 8, NULL, 0), 0);
    CHECK_EQ(fe_ack(fe, SET_VRING_ADDR, &addr, sizeof(addr), NULL, 0), 0);
    CHECK_EQ(fe_ack(fe, SET_VRING_CALL, &index, 8, &ring->call, 1), 0);
    CHECK_EQ(fe_ack(fe, SET_VRING_ERR, &index, 8, &ring->err, 1), 0);
    CHECK_EQ(fe_ack(fe, SET_VRING_KICK, &index, 8, &ring->kick, 1), 0);
    CHECK_EQ(fe_ack(fe, SET_VRING_ENABLE, enable, 8, NULL, 0), 0);
}

uint16_t fe_stop_ring(struct fe *fe, unsigned i)
{
    uint32_t state[2] = {i, 0};

    fe_send(fe, GET_VRING_BASE, 1, state, 8, NULL, 0);
    CHECK_EQ(fe_receive(fe, state, 8), 8);
    CHECK_EQ(state[0], i);
    return (uint16_t)state[1];
}

static bool wait_readable(int fd, int timeout_ms)
{
    struct pollfd p = {.fd = fd, .events = POLLIN};

    return poll(&p, 1, timeout_ms) == 1;
}

static bool wait_event(int fd, int timeout_ms)
{
    uint64_t value;

    return wait_readable(fd, timeout_ms) && read(fd, &value, sizeof(value)) == sizeof(value);
}

void fe_wait_ring_error(struct fe *fe, unsigned ring)
{
    CHECK(wait_event(fe->rings[ring].err, PATIENCE_MS));
}

/* ---- the driver -------------------------------------------------------------------------------------------------- */

void fe_kick(struct fe *fe, unsigned i)
{
    struct fe_ring *ring = &fe->rings[i];
    uint64_t one = 1;

    CHECK_EQ(write(ring->kick, &one, sizeof(one)), sizeof(one));
}

/* Kicks only when the device wants it, as a driver does. */
static void kick_if_wanted(struct fe *fe, unsigned i, uint16_t old)
{
    struct fe_ring *ring = &fe->rings[i];

    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (fe->features & FE_EVENT_IDX) {
        uint16_t event = __atomic_load_n((uint16_t *)&ring->used->ring[ring->num], __ATOMIC_RELAXED);

        if (vring_need_event(event, ring->avail_idx, old))
            fe_kick(fe, i);
    } else if (!(__atomic_load_n(&ring->used->flags, __ATOMIC_RELAXED) & VRING_USED_F_NO_NOTIFY)) {
        fe_kick(fe, i);
    }
}

void fe_publish(struct fe *fe, unsigned i, uint16_t head)
{
    struct fe_ring *ring = &fe->rings[i];
    uint16_t old = ring->avail_idx++;

    ring->avail->ring[old % ring->num] = head;
    __atomic_store_n(&ring->avail->idx, ring->avail_idx, __ATOMIC_RELEASE);
    kick_if_wanted(fe, i, old);
}

void fe_give_rx(struct fe *fe, unsigned slot)
{
    struct fe_ring *ring = &fe->rings[FE_RX];

    ring->desc[slot] = (struct vring_desc){
        .addr = FE_RX_BASE + slot * fe->rx_buffer, .len = fe->rx_buffer, .flags = VRING_DESC_F_WRITE};
    fe_publish(fe, FE_RX, (uint16_t)slot);
}

static uint16_t used_idx(const struct fe_ring *ring)
{
    return __atomic_load_n(&ring->used->idx, __ATOMIC_ACQUIRE);
}

/* Waits until the used index moves. False when it did not in time. */
static bool wait_used(struct fe *fe, unsigned i, int timeout_ms)
{
    struct fe_ring *ring = &fe->rings[i];

    while (used_idx(ring) == ring->last_used) {
        __atomic_store_n(&ring->avail->ring[ring->num], ring->last_used, __ATOMIC_RELAXED); /* used_event */
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        if (used_idx(ring) != ring->last_used)
            break;
        if (!wait_event(ring->call, timeout_ms))
            return false;
    }
    return true;
}

bool fe_wait_call(struct fe *fe, unsigned ring, int timeout_ms)
{
    return wait_event(fe->rings[ring].call, timeout_ms);
}

void fe_reclaim_tx(struct fe *fe)
{
    struct fe_ring *ring = &fe->rings[FE_TX];

    while ((uint16_t)(ring->avail_idx - ring->last_used) > 0) {
        CHECK(wait_used(fe, FE_TX, PATIENCE_MS));
        ring->last_used++;
    }
}

uint32_t fe_tx_slot(struct fe *fe)
{
    struct fe_ring *ring = &fe->rings[FE_TX];

    while ((uint16_t)(ring->avail_idx - ring->last_used) >= ring->num / 4) {
        CHECK(wait_used(fe, FE_TX, PATIENCE_MS));
        ring->last_used++;
    }
    return FE_TX_BASE + (ring->avail_idx % 32) * FE_SLOT;
}

/* Splits the packet into that many descriptors; more than 4 go into an indirect table. */
void fe_transmit(struct fe *fe, const struct virtio_vsock_hdr *hdr, const void *data, uint32_t len, unsigned segments)
{
    struct fe_ring *ring = &fe->rings[FE_TX];
    uint32_t slot = fe_tx_slot(fe), total = FE_HEADER + len, at = slot + 0x8000, done = 0;
    bool indirect = segments > 4;
    unsigned head = (unsigned)(ring->avail_idx % (ring->num / 4)) * 4, first = indirect ? 0 : head;
    struct vring_desc *table = indirect ? (void *)(fe->ram + slot) : ring->desc;

    memcpy(fe->ram + at, hdr, FE_HEADER);
    if (len > 0)
        memcpy(fe->ram + at + FE_HEADER, data, len);
    if (segments > total)
        segments = total;
    for (unsigned i = 0; i < segments; i++) {
        uint32_t part = i + 1 == segments ? total - done : total / segments;

        table[first + i] = (struct vring_desc){.addr = at + done, .len = part,
            .flags = i + 1 < segments ? VRING_DESC_F_NEXT : 0,
                                               .next = (uint16_t)(first + i + 1)};
        done += part;
    }
    if (indirect)
        ring->desc[head] = (struct vring_desc){.addr = slot, .len = segments * 16, .flags = VRING_DESC_F_INDIRECT};
    fe_publish(fe, FE_TX, (uint16_t)head);
}

bool fe_try_take(struct fe *fe, struct packet *packet)
{
    struct fe_ring *ring = &fe->rings[FE_RX];

    if (used_idx(ring) == ring->last_used)
        return false;
    struct vring_used_elem elem = ring->used->ring[ring->last_used++ % ring->num];
    const uint8_t *from = fe->ram + ring->desc[elem.id].addr;

    CHECK(elem.id < ring->num);
    CHECK(elem.len >= FE_HEADER && elem.len <= fe->rx_buffer);
    memcpy(&packet->hdr, from, FE_HEADER);
    CHECK_EQ(packet->hdr.len, elem.len - FE_HEADER);
    memcpy(packet->data, from + FE_HEADER, packet->hdr.len);
    CHECK_EQ(packet->hdr.dst_cid, FE_CID);
    CHECK_EQ(packet->hdr.src_cid, 2);
    fe_give_rx(fe, elem.id);
    return true;
}

void fe_take(struct fe *fe, struct packet *packet)
{
    while (!fe_try_take(fe, packet))
        CHECK(wait_used(fe, FE_RX, PATIENCE_MS));
}

void fe_expect(struct fe *fe, struct packet *packet, uint16_t op, uint32_t guest_port, uint32_t host_port)
{
    do /* the device may tell about credit at any time */
        fe_take(fe, packet);
    while (packet->hdr.op == VIRTIO_VSOCK_OP_CREDIT_UPDATE && op != VIRTIO_VSOCK_OP_CREDIT_UPDATE);
    CHECK_EQ(packet->hdr.op, op);
    CHECK_EQ(packet->hdr.dst_port, guest_port);
    if (host_port)
        CHECK_EQ(packet->hdr.src_port, host_port);
}

/* ---- packets of the guest ---------------------------------------------------------------------------------------- */

struct virtio_vsock_hdr fe_hdr(uint16_t op, uint32_t guest_port, uint32_t host_port)
{
    return (struct virtio_vsock_hdr){.src_cid = FE_CID, .dst_cid = 2, .src_port = guest_port, .dst_port = host_port,
                                     .type = VIRTIO_VSOCK_TYPE_STREAM, .op = op, .buf_alloc = 1U << 18};
}

void fe_op(struct fe *fe, uint16_t op, uint32_t guest_port, uint32_t host_port)
{
    struct virtio_vsock_hdr hdr = fe_hdr(op, guest_port, host_port);

    fe_transmit(fe, &hdr, NULL, 0, 1);
}

void fe_shutdown(struct fe *fe, uint32_t guest_port, uint32_t host_port, uint32_t flags)
{
    struct virtio_vsock_hdr hdr = fe_hdr(VIRTIO_VSOCK_OP_SHUTDOWN, guest_port, host_port);

    hdr.flags = flags;
    fe_transmit(fe, &hdr, NULL, 0, 1);
}

void fe_data(struct fe *fe, uint32_t guest_port, uint32_t host_port, const void *data, uint32_t len)
{
    struct virtio_vsock_hdr hdr = fe_hdr(VIRTIO_VSOCK_OP_RW, guest_port, host_port);

    hdr.len = len;
    fe_transmit(fe, &hdr, data, len, 2);
}

void fe_credit(struct fe *fe, uint32_t guest_port, uint32_t host_port, uint32_t buf_alloc, uint32_t fwd_cnt)
{
    struct virtio_vsock_hdr hdr = fe_hdr(VIRTIO_VSOCK_OP_CREDIT_UPDATE, guest_port, host_port);

    hdr.buf_alloc = buf_alloc;
    hdr.fwd_cnt = fwd_cnt;
    fe_transmit(fe, &hdr, NULL, 0, 1);
}

/* ---- programs of the host ---------------------------------------------------------------------------------------- */

int host_socket(struct fe *fe)
{
    return connect_to(in_dir(fe, "v"));
}

int host_ask(struct fe *fe, uint32_t port)
{
    int fd = host_socket(fe);
    char line[32];

    host_write(fd, line, (size_t)snprintf(line, sizeof(line), "CONNECT %u\n", port));
    return fd;
}

int host_open(struct fe *fe, uint32_t guest_port, uint32_t *host_port)
{
    int fd = host_ask(fe, guest_port);
    struct packet packet;
    char line[32] = "", expected[32];

    fe_expect(fe, &packet, VIRTIO_VSOCK_OP_REQUEST, guest_port, 0);
    *host_port = packet.hdr.src_port;
    fe_op(fe, VIRTIO_VSOCK_OP_RESPONSE, guest_port, *host_port);
    host_read(fd, line, (size_t)snprintf(expected, sizeof(expected), "OK %u\n", *host_port));
    CHECK(strcmp(line, expected) == 0);
    return fd;
}

static const char *port_path(struct fe *fe, uint32_t port)
{
    char name[32];

    snprintf(name, sizeof(name), "v_%u", port);
    return in_dir(fe, name);
}

int host_listen(struct fe *fe, uint32_t port)
{
    int fd = listener(port_path(fe, port));

    CHECK(fcntl(fd, F_SETFL, 0) == 0);
    return fd;
}

void host_unlink(struct fe *fe, uint32_t port)
{
    unlink(port_path(fe, port));
}

void host_write(int fd, const void *data, size_t len)
{
    for (size_t done = 0; done < len;) {
        ssize_t n = send(fd, (const uint8_t *)data + done, len - done, MSG_NOSIGNAL);

        CHECK(n > 0);
        done += (size_t)n;
    }
}

void host_read(int fd, void *data, size_t len)
{
    for (size_t done = 0; done < len;) {
        CHECK(wait_readable(fd, PATIENCE_MS));
        ssize_t n = read(fd, (uint8_t *)data + done, len - done);

        CHECK(n > 0);
        done += (size_t)n;
    }
}

bool host_at_end(int fd)
{
    char byte;

    CHECK(wait_readable(fd, PATIENCE_MS));
    return read(fd, &byte, 1) <= 0;
}

struct pv_vsock_stats fe_stats(struct fe *fe)
{
    struct pv_vsock_stats stats;

    pv_vsock_get_stats(fe->device, &stats);
    return stats;
}

/* A counter has no descriptor to wait for: this one polls. */
void fe_wait_stat(struct fe *fe, size_t offset, uint64_t value)
{
    struct timespec nap = {.tv_nsec = 1000000};

    for (int i = 0; i < PATIENCE_MS; i++) {
        struct pv_vsock_stats stats = fe_stats(fe);
        uint64_t now;

        memcpy(&now, (const uint8_t *)&stats + offset, sizeof(now));
        if (now == value)
            return;
        nanosleep(&nap, NULL);
    }
    fprintf(stderr, "the counter at offset %zu never became %llu\n", offset, (unsigned long long)value);
    abort();
}

void pattern(uint8_t *data, size_t len, uint64_t offset)
{
    for (size_t i = 0; i < len; i++)
        data[i] = (uint8_t)(((offset + i) * 2654435761U) >> 13);
}
