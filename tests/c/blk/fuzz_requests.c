/* Fuzz target: what a hostile guest puts into its rings and buffers. Input: steps, each a byte that says what is done and
 * the bytes that it takes: memory is written (descriptors, indices, headers, anything), a well-formed request is made
 * available with arbitrary fields, or the device has a turn. The disk is real memory. */
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/virtio_blk.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "blk/device.h"
#include "harness.h"

#define RAM 0x40000U
#define NUM 16U
#define DESC 0x1000U
#define AVAIL 0x2000U
#define USED 0x3000U
#define INDIRECT 0x4000U
#define BUFFERS 0x8000U
#define DISK_BYTES 0x100000U

void test_register(struct test *test)
{
    (void)test;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

struct input {
    const uint8_t *data;
    size_t left;
};

static uint32_t take(struct input *in, unsigned bytes)
{
    uint32_t value = 0;

    for (unsigned i = 0; i < bytes && in->left > 0; i++, in->left--)
        value |= (uint32_t)*in->data++ << (8 * i);
    return value;
}

static uint8_t *ram;
static int memfd = -1;

static void set_up(void)
{
    if (memfd >= 0)
        return;
    memfd = memfd_create("guest", MFD_CLOEXEC);
    CHECK(ftruncate(memfd, RAM) == 0);
    ram = mmap(NULL, RAM, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
    CHECK(ram != MAP_FAILED);
}

struct bench {
    struct pv_loop loop;
    struct pv_instance *instance;
    struct pv_blk *blk;
};

/* A device whose ring runs, without the messages that lead there: fuzz-vsock-messages is for those. */
static void begin(struct bench *b, bool read_only, bool event_idx)
{
    struct pv_blk_config config = {.queues = 1, .serial = "fuzz", .read_only = read_only};
    struct pv_region_desc region = {0, RAM, 0, 0};
    struct pv_fail fail;
    int pair[2], err;

    memset(ram, 0, RAM);
    CHECK(pv_loop_open(&b->loop, 0, &err) == 0);
    b->instance = pv_instance_new("fuzz", pv_data_memory(DISK_BYTES, &fail), &fail);
    pv_instance_attach_loop(b->instance, &b->loop);
    CHECK(pv_blk_new(&b->loop, &config, &b->blk, &err) == 0);
    CHECK(pv_blk_insert(b->blk, b->instance, &err) == 0);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair) == 0);
    CHECK(pv_blk_connect(b->blk, pair[0], &err) == 0);
    b->blk->fe.features = 1ULL << VIRTIO_BLK_F_FLUSH;
    CHECK(pv_memtable_set(&b->blk->fe.mem, &region, &memfd, 1, &err) == 0);
    struct pv_fe_ring *ring = &b->blk->fe.rings[0];

    ring->vq = (struct pv_vq){.num = NUM, .desc_addr = DESC, .avail_addr = AVAIL, .used_addr = USED, .event_idx = event_idx};
    ring->kick_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    CHECK(pv_vq_map(&ring->vq, &b->blk->fe.mem));
    pv_vq_start(&ring->vq, 0);
    CHECK(pv_vq_hold(&ring->vq, NULL, &err) == 0);
    ring->started = ring->enabled = ring->was_started = true;
    close(pair[1]);
    pv_loop_rewatch(&b->loop, b->blk->fe.fd, 0, &b->blk->frontend_event, &err);
}

static void quiet(struct pv_instance *instance, void *context)
{
    (void)instance;
    (void)context;
}

static void end(struct bench *b)
{
    struct pv_fail fail;

    CHECK(b->blk->fe.held == 0);
    pv_blk_free(b->blk);
    CHECK(pv_instance_quiesce(b->instance, quiet, NULL, &fail) == 0);
    pv_instance_detach_loop(b->instance);
    CHECK(pv_instance_free(b->instance, &fail) == 0);
    pv_loop_close(&b->loop);
}

static void write_memory(struct input *in)
{
    static const uint32_t AREAS[] = {DESC, AVAIL, USED, INDIRECT, BUFFERS};
    uint32_t at = AREAS[take(in, 1) % 5] + take(in, 2) % 0x400, len = take(in, 1) % 64;

    for (uint32_t i = 0; i < len && in->left > 0; i++)
        ram[at + i] = (uint8_t)take(in, 1);
}

static void publish(struct input *in)
{
    struct vring_avail *avail = (void *)(ram + AVAIL);

    avail->ring[avail->idx % NUM] = (uint16_t)take(in, 1);
    avail->idx++;
}

static void request(struct input *in)
{
    static const uint32_t TYPES[] = {VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
        VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES};
    struct vring_avail *avail = (void *)(ram + AVAIL);
    struct vring_desc *desc = (void *)(ram + DESC);
    uint32_t what = take(in, 1), len = take(in, 2);
    uint16_t slot = (uint16_t)(avail->idx % 5), head = (uint16_t)(slot * 3);
    uint64_t at = BUFFERS + slot * 0x8000U;
    bool in_data = what & 8;

    *(struct virtio_blk_outhdr *)(ram + at) = (struct virtio_blk_outhdr){.type = TYPES[what % 6], .sector = take(in, 2)};
    for (unsigned i = 0; what & 16 && i < 16; i++)
        ram[at + 64 + i] = (uint8_t)take(in, 1);
    desc[head] = (struct vring_desc){at, what & 32 ? take(in, 1) : 16, VRING_DESC_F_NEXT, (uint16_t)(head + 1)};
    desc[head + 1] = (struct vring_desc){at + 64, what & 64 ? 16 : (what & 128 ? len : len & ~511U),
        (uint16_t)(VRING_DESC_F_NEXT | (in_data ? VRING_DESC_F_WRITE : 0)), (uint16_t)(head + 2)};
    desc[head + 2] = (struct vring_desc){at + 48, 1, VRING_DESC_F_WRITE, 0};
    avail->ring[avail->idx % NUM] = head;
    avail->idx++;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct bench b;
    struct input in = {data, size};
    uint32_t how = take(&in, 1);
    int err;

    set_up();
    begin(&b, how & 1, how & 2);
    for (unsigned steps = 0; in.left > 0 && steps < 200; steps++)
        switch (take(&in, 1) % 4) {
        case 0:
            write_memory(&in);
            break;
        case 1:
            publish(&in);
            break;
        case 2:
            request(&in);
            break;
        default:
            CHECK(pv_loop_turn(&b.loop, 0, &err) == 0);
        }
    for (unsigned i = 0; i < 4; i++)
        CHECK(pv_loop_turn(&b.loop, 0, &err) == 0);
    end(&b);
    return 0;
}
