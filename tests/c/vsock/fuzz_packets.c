/* Fuzz target: what a hostile guest puts into its rings. One turn of the device is run by hand after each step of the
 * input, in this thread.
 *
 * Input: steps, each an operation byte and its arguments. A packet's ports are from a small set, so that the fuzzer
 * reaches connections that are there; ring memory is also written raw.
 */
#include <fcntl.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "frontend.h"
#include "harness.h"
#include "vsock/device.h"

void test_register(struct test *test)
{
    (void)test;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { RAM = 1 << 20, RX_DESC = 0, RX_AVAIL = 0x1000, RX_USED = 0x2000, TX_DESC = 0x3000, TX_AVAIL = 0x4000,
    TX_USED = 0x5000,
       NUM = 16, RX_BUFFERS = 0x10000, TX_BUFFERS = 0x40000, PROGRAMS = 4 };

static uint8_t *ram;
static int memfd, kick, call, listener;
static char dir[] = "/tmp/hvt-fuzz-XXXXXX";

struct input {
    const uint8_t *data;
    size_t left;
};

static uint32_t take(struct input *in, size_t bytes)
{
    uint32_t value = 0;

    for (size_t i = 0; i < bytes && in->left > 0; i++, in->left--)
        value |= (uint32_t)*in->data++ << (8 * i);
    return value;
}

static void clean_up(void)
{
    char path[64];

    snprintf(path, sizeof(path), "%s/v_1", dir);
    unlink(path);
    rmdir(dir);
}

static void set_up_once(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};

    if (ram)
        return;
    CHECK(mkdtemp(dir));
    atexit(clean_up);
    memfd = memfd_create("guest", MFD_CLOEXEC);
    CHECK(ftruncate(memfd, RAM) == 0);
    ram = mmap(NULL, RAM, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
    kick = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    call = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    listener = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    snprintf(address.sun_path, sizeof(address.sun_path), "%s/v_1", dir);
    CHECK(bind(listener, (struct sockaddr *)&address, sizeof(address)) == 0 && listen(listener, 64) == 0);
}

static void ring(struct pv_vsock *v, unsigned i, uint64_t desc, uint64_t avail, uint64_t used)
{
    struct pv_fe_ring *r = &v->fe.rings[i];

    r->vq = (struct pv_vq){.num = NUM, .desc_addr = desc, .avail_addr = avail, .used_addr = used, .event_idx = true};
    CHECK(pv_vq_map(&r->vq, &v->fe.mem));
    pv_vq_start(&r->vq, 0);
    r->started = r->enabled = r->was_started = true;
    r->call_fd = dup(call);
}

/* A device whose rings run, without the messages that lead there: fuzz_messages is for those. */
static struct pv_vsock *make_device(void)
{
    static char uds[64];
    struct pv_region_desc region = {0, RAM, 0, 0};
    struct pv_vsock *v;
    int err, pair[2];

    snprintf(uds, sizeof(uds), "%s/v", dir);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair) == 0);
    struct pv_vsock_config config = {.listen_fd = -1, .frontend_fd = pair[0], .host_listener_fd = -1, .uds_path = uds,
                                     .guest_cid = FE_CID, .window_bytes = 16384, .max_connections = 8};
    CHECK(pv_vsock_create(&config, &v, &err) == 0);
    close(pair[1]);
    memset(ram, 0, 0x10000);
    CHECK(pv_memtable_set(&v->fe.mem, &region, &memfd, 1, &err) == 0);
    ring(v, PV_RX, RX_DESC, RX_AVAIL, RX_USED);
    ring(v, PV_TX, TX_DESC, TX_AVAIL, TX_USED);
    struct vring_desc *rx = (void *)(ram + RX_DESC);
    struct vring_avail *avail = (void *)(ram + RX_AVAIL);
    for (uint16_t i = 0; i < NUM; i++) {
        rx[i] = (struct vring_desc){RX_BUFFERS + i * 4096U, 4096, VRING_DESC_F_WRITE, 0};
        avail->ring[i] = i;
    }
    return v;
}

static void give_rx(uint32_t count)
{
    struct vring_avail *avail = (void *)(ram + RX_AVAIL);

    avail->idx = (uint16_t)(avail->idx + count);
}

static void transmit(struct input *in)
{
    struct vring_desc *desc = (void *)(ram + TX_DESC);
    struct vring_avail *avail = (void *)(ram + TX_AVAIL);
    uint16_t slot = avail->idx % NUM;
    uint32_t ports = take(in, 1), at = TX_BUFFERS + slot * 16384U;
    struct virtio_vsock_hdr hdr = {
        .src_cid = ports & 64 ? take(in, 1) : FE_CID,
        .dst_cid = ports & 128 ? take(in, 1) : 2,
        .src_port = ports & 3,
        .dst_port = ports & 4 ? 1 : (1U << 30) + (ports >> 3 & 3),
        .op = (uint16_t)take(in, 1),
        .type = ports & 32 ? (uint16_t)take(in, 1) : 1,
        .len = take(in, 2),
        .flags = take(in, 1),
        .buf_alloc = take(in, 2) << 4,
        .fwd_cnt = take(in, 2),
    };

    memcpy(ram + at, &hdr, sizeof(hdr));
    desc[slot] = (struct vring_desc){at, sizeof(hdr) + (hdr.len < 16000 ? hdr.len : 16000), 0, 0};
    avail->ring[slot] = slot;
    avail->idx++;
}

static void raw_write(struct input *in)
{
    uint32_t at = take(in, 2) % 0x6000;

    for (uint32_t count = take(in, 1) % 17; count > 0 && in->left > 0; count--, at++)
        ram[at] = (uint8_t)take(in, 1);
}

static void program(struct pv_vsock *v, int *fd, struct input *in)
{
    char line[32];
    int err, pair[2];

    if (*fd >= 0) {
        static const char data[20000];
        uint32_t what = take(in, 1);

        if (what & 1)
            (void)!send(*fd, data, take(in, 2) % sizeof(data), MSG_DONTWAIT | MSG_NOSIGNAL);
        if (what & 2)
            (void)!recv(*fd, line, sizeof(line), MSG_DONTWAIT);
        if (what & 4)
            shutdown(*fd, SHUT_WR);
        if (what & 8) {
            close(*fd);
            *fd = -1;
        }
        return;
    }
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair) == 0);
    (void)!write(pair[1], line, (size_t)snprintf(line, sizeof(line), "CONNECT %u\n", take(in, 1) & 3));
    struct pv_conn *c = pv_conn_new(v, pair[0], PV_HANDSHAKE, &err);
    if (!c) {
        close(pair[0]);
        close(pair[1]);
        return;
    }
    pv_conn_start_timer(v, c, &v->requests, 10000);
    *fd = pair[1];
}

static void turn(struct pv_vsock *v)
{
    int err, accepted;

    v->tx_pending = v->rx_pending = true; /* so that the turn does not wait, and as if kicked */
    CHECK(pv_vsock_turn(v, &err) == 0);
    while ((accepted = accept(listener, NULL, NULL)) >= 0)
        close(accepted);
    CHECK(v->buffered <= v->promised);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, size};
    int programs[PROGRAMS] = {-1, -1, -1, -1};

    set_up_once();
    struct pv_vsock *v = make_device();

    v->has_frontend = true;
    epoll_ctl(v->epoll_fd, EPOLL_CTL_DEL, v->fe.fd, NULL); /* its other end is closed: nothing to hear from it */
    give_rx(NUM / 2);
    for (int steps = 0; in.left > 0 && steps < 64; steps++) {
        uint32_t what = take(&in, 1);

        if ((what & 7) < 4)
            transmit(&in);
        else if ((what & 7) == 4)
            give_rx(what >> 3 & 15);
        else if ((what & 7) == 5)
            raw_write(&in);
        else
            program(v, &programs[what >> 3 & 3], &in);
        if (what & 128)
            turn(v);
    }
    turn(v);
    for (int i = 0; i < PROGRAMS; i++)
        if (programs[i] >= 0)
            close(programs[i]);
    pv_vsock_destroy(v);
    return 0;
}
