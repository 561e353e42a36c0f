/* vhost-user: what a front end may say and what it is thrown out for; rings stopped, started and broken. */
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "frontend.h"
#include "harness.h"
#include "vhost/memtable.h"
#include "vhost/virtqueue.h"

enum { GET_FEATURES = 1, SET_FEATURES, SET_OWNER, RESET_OWNER, SET_MEM_TABLE, SET_LOG_BASE, SET_VRING_NUM = 8,
    SET_VRING_ADDR,
       SET_VRING_BASE, GET_VRING_BASE, SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR, GET_PROTOCOL_FEATURES,
           SET_PROTOCOL_FEATURES,
       GET_QUEUE_NUM, SET_VRING_ENABLE, GET_CONFIG = 24 };

#define RST VIRTIO_VSOCK_OP_RST
#define RW VIRTIO_VSOCK_OP_RW

struct config {
    uint32_t offset, size, flags;
    uint8_t data[16];
} __attribute__((packed));

TEST(front_end_reads_the_cid)
{
    struct fe fe;
    struct config config = {.offset = 0, .size = 8};

    fe_init(&fe);
    fe_up(&fe);
    fe_send(&fe, GET_CONFIG, 1, &config, 12 + 8, NULL, 0);
    CHECK_EQ(fe_receive(&fe, &config, sizeof(config)), 20);
    CHECK_EQ(config.data[0], FE_CID);
    config = (struct config){.offset = 4, .size = 4};
    fe_send(&fe, GET_CONFIG, 1, &config, 12 + 4, NULL, 0);
    CHECK_EQ(fe_receive(&fe, &config, sizeof(config)), 16);
    CHECK_EQ(config.data[0], 0);
    CHECK_EQ(fe_ask(&fe, GET_QUEUE_NUM), 3);
    fe_down(&fe);
}

/* Each of these ends the connection, with this name for it. */
struct refusal {
    const char *fault;
    uint32_t request, flags, size;
    uint8_t payload[300];
    unsigned fds;
};

static void *u32s(struct refusal *r, uint32_t a, uint32_t b)
{
    memcpy(r->payload, &a, 4);
    memcpy(r->payload + 4, &b, 4);
    return r;
}

static void check_refusal(struct refusal *r, bool header_only)
{
    struct fe fe;
    int fds[16];

    fe_init(&fe);
    fe_up(&fe);
    for (unsigned i = 0; i < 16; i++)
        fds[i] = fe.memfd;
    fe_send(&fe, r->request, r->flags, header_only ? NULL : r->payload, r->size, fds, r->fds);
    CHECK(fe_is_dropped(&fe));
    FE_WAIT_STAT(&fe, frontend_connected, 0);
    if (strcmp(pv_vsock_fault(fe.device), r->fault)) {
        fprintf(stderr, "the fault is \"%s\", not \"%s\"\n", pv_vsock_fault(fe.device), r->fault);
        abort();
    }
    CHECK_EQ(fe_stats(&fe).frontend_faults, 1);
    /* The device takes the next front end as if nothing had been. */
    close(fe.sock);
    for (unsigned i = 0; i < 2; i++) {
        close(fe.rings[i].kick);
        close(fe.rings[i].call);
        close(fe.rings[i].err);
    }
    fe_connect(&fe);
    fe_start(&fe);
    struct packet p;
    fe_op(&fe, RW, 1, 2);
    fe_expect(&fe, &p, RST, 1, 2);
    fe_down(&fe);
}

TEST(malformed_headers_end_the_connection)
{
    struct refusal r[] = {
        {.fault = "vhost-user: bad version or flags", .request = GET_FEATURES, .flags = 0},
        {.fault = "vhost-user: bad version or flags", .request = GET_FEATURES, .flags = 2},
        {.fault = "vhost-user: bad version or flags", .request = GET_FEATURES, .flags = 1 | 4},
        {.fault = "vhost-user: message too long", .request = SET_MEM_TABLE, .flags = 1, .size = 513},
        {.fault = "vhost-user: message too long", .request = SET_MEM_TABLE, .flags = 1, .size = UINT32_MAX},
        {.fault = "vhost-user: message of a bad size", .request = SET_FEATURES, .flags = 1, .size = 7},
        {.fault = "vhost-user: message of a bad size", .request = GET_FEATURES, .flags = 1, .size = 8},
        {.fault = "vhost-user: message of a bad size", .request = GET_CONFIG, .flags = 1, .size = 11},
        {.fault = "vhost-user: spare descriptors", .request = SET_FEATURES, .flags = 1, .size = 8, .fds = 1},
        {.fault = "vhost-user: too many descriptors", .request = SET_MEM_TABLE, .flags = 1, .size = 8, .fds = 9},
    };

    for (unsigned i = 0; i < sizeof(r) / sizeof(r[0]); i++)
        check_refusal(&r[i], true);
}

TEST(messages_that_make_no_sense_end_the_connection)
{
    struct refusal r[] = {
        {.fault = "vhost-user: request that is not supported", .request = 0, .flags = 1},
        {.fault = "vhost-user: request that is not supported", .request = SET_LOG_BASE, .flags = 1, .size = 16},
        {.fault = "vhost-user: request that is not supported", .request = UINT32_MAX, .flags = 1},
        {.fault = "vhost-user: features that were not offered", .request = SET_FEATURES, .flags = 1, .size = 8,
            .payload = {1}},
        {.fault = "vhost-user: protocol features that were not offered", .request = SET_PROTOCOL_FEATURES, .flags = 1,
            .size = 8,
         .payload = {2}},
        {.fault = "vhost-user: memory table of a bad size", .request = SET_MEM_TABLE, .flags = 1, .size = 8,
            .payload = {9}},
        {.fault = "vhost-user: memory table of a bad size", .request = SET_MEM_TABLE, .flags = 1, .size = 8,
            .payload = {1}, .fds = 1},
        {.fault = "vhost-user: memory table with missing or spare descriptors", .request = SET_MEM_TABLE, .flags = 1,
            .size = 40,
         .payload = {1}},
        {.fault = "vhost-user: memory table that cannot be mapped", .request = SET_MEM_TABLE, .flags = 1, .size = 40,
            .payload = {1},
         .fds = 1},
        {.fault = "vhost-user: ring index out of range", .request = SET_VRING_NUM, .flags = 1, .size = 8,
            .payload = {3, 0, 0, 0, 64}},
        {.fault = "vhost-user: ring index out of range", .request = SET_VRING_BASE, .flags = 1, .size = 8,
            .payload = {3}},
        {.fault = "vhost-user: ring index out of range", .request = GET_VRING_BASE, .flags = 1, .size = 8,
            .payload = {3}},
        {.fault = "vhost-user: ring index out of range", .request = SET_VRING_ADDR, .flags = 1, .size = 40,
            .payload = {3}},
        {.fault = "vhost-user: ring index out of range", .request = SET_VRING_ENABLE, .flags = 1, .size = 8,
            .payload = {3}},
        {.fault = "vhost-user: ring index out of range", .request = SET_VRING_KICK, .flags = 1, .size = 8,
            .payload = {3}},
        {.fault = "vhost-user: ring index out of range", .request = SET_VRING_CALL, .flags = 1, .size = 8,
            .payload = {3}, .fds = 1},
        {.fault = "vhost-user: ring index out of range", .request = SET_VRING_ERR, .flags = 1, .size = 8,
            .payload = {3}, .fds = 1},
        {.fault = "vhost-user: missing or spare descriptor", .request = SET_VRING_KICK, .flags = 1, .size = 8},
        {.fault = "vhost-user: missing or spare descriptor", .request = SET_VRING_CALL, .flags = 1, .size = 8,
            .payload = {0, 1}, .fds = 1},
        {.fault = "vhost-user: rings without a kick descriptor (polling) are not supported",
            .request = SET_VRING_KICK, .flags = 1,
         .size = 8, .payload = {0, 1}},
        {.fault = "vhost-user: kick descriptor cannot be waited for", .request = SET_VRING_KICK, .flags = 1,
            .size = 8, .fds = 1},
        {.fault = "vhost-user: size of a running ring changed", .request = SET_VRING_NUM, .flags = 1, .size = 8,
         .payload = {0, 0, 0, 0, 64}},
        {.fault = "vhost-user: bad ring base", .request = SET_VRING_BASE, .flags = 1, .size = 8},
        {.fault = "vhost-user: running ring moved outside of the memory table", .request = SET_VRING_ADDR, .flags = 1,
            .size = 40},
        {.fault = "vhost-user: configuration space message out of range", .request = GET_CONFIG, .flags = 1,
            .size = 12 + 8,
         .payload = {1, 0, 0, 0, 8}},
        {.fault = "vhost-user: configuration space message out of range", .request = GET_CONFIG, .flags = 1, .size = 12,
         .payload = {0, 0, 0, 0, 8}},
        {.fault = "vhost-user: configuration space message out of range", .request = GET_CONFIG, .flags = 1, .size = 12,
         .payload = {0xff, 0xff, 0xff, 0xff, 0}},
    };

    for (unsigned i = 0; i < sizeof(r) / sizeof(r[0]); i++)
        check_refusal(&r[i], false);
}

TEST(refusals_are_acknowledged_where_asked_for)
{
    struct fe fe;
    struct refusal bad = {0};
    struct packet p;

    fe_init(&fe);
    fe_up(&fe);
    CHECK_EQ(fe_ack(&fe, SET_LOG_BASE, bad.payload, 16, NULL, 0), 1);
    CHECK_EQ(fe_ack(&fe, SET_VRING_NUM, u32s(&bad, 2, 63), 8, NULL, 0), 1);
    fe_stop_ring(&fe, FE_RX);
    CHECK_EQ(fe_ack(&fe, SET_VRING_NUM, ((struct refusal *)u32s(&bad, 0, 63))->payload, 8, NULL, 0), 1);
    CHECK_EQ(fe_ack(&fe, SET_VRING_NUM, ((struct refusal *)u32s(&bad, 0, 65536))->payload, 8, NULL, 0), 1);
    CHECK_EQ(fe_ack(&fe, SET_VRING_BASE, ((struct refusal *)u32s(&bad, 0, 65536))->payload, 8, NULL, 0), 1);
    CHECK(fe_stats(&fe).frontend_faults >= 1);
    fe_start_ring(&fe, FE_RX, fe.base);
    fe_op(&fe, RW, 1, 2);
    fe_expect(&fe, &p, RST, 1, 2);
    fe_down(&fe);
}

TEST(messages_may_come_in_pieces)
{
    struct fe fe;
    uint32_t message[3] = {GET_FEATURES, 1, 0};
    uint64_t features;
    struct packet p;

    fe_init(&fe);
    fe_up(&fe);
    for (unsigned i = 0; i < sizeof(message); i++)
        host_write(fe.sock, (uint8_t *)message + i, 1);
    CHECK_EQ(fe_receive(&fe, &features, sizeof(features)), 8);
    uint8_t set[20] = {SET_FEATURES, 0, 0, 0, 1, 0, 0, 0, 8};
    memcpy(set + 12, &fe.features, 8);
    host_write(fe.sock, set, 15);
    fe_op(&fe, RW, 1, 2);
    fe_expect(&fe, &p, RST, 1, 2);
    host_write(fe.sock, set + 15, 5);
    CHECK((fe_ask(&fe, GET_FEATURES) & FE_FEATURES) == FE_FEATURES);
    fe_down(&fe);
}

TEST(second_front_end_is_turned_away)
{
    struct fe fe, second;

    fe_init(&fe);
    fe_up(&fe);
    second = fe;
    fe_connect(&second);
    CHECK(fe_is_dropped(&second));
    close(second.sock);
    for (unsigned i = 0; i < 2; i++) {
        close(second.rings[i].kick);
        close(second.rings[i].call);
        close(second.rings[i].err);
    }
    CHECK_EQ(fe_ask(&fe, GET_QUEUE_NUM), 3);
    fe_down(&fe);
}

TEST(without_protocol_features_rings_are_enabled_at_once)
{
    struct fe fe;
    struct packet p;
    uint32_t disable[2] = {FE_TX, 0}, enable[2] = {FE_TX, 1};

    fe_init(&fe);
    fe.features = FE_VERSION_1 | FE_EVENT_IDX;
    fe_up(&fe);
    fe_op(&fe, RW, 1, 2);
    fe_expect(&fe, &p, RST, 1, 2);
    CHECK_EQ(fe_ack(&fe, SET_VRING_ENABLE, disable, 8, NULL, 0), 0);
    fe_op(&fe, RW, 3, 4);
    fe_kick(&fe, FE_TX);
    CHECK_EQ(fe_ask(&fe, GET_QUEUE_NUM), 3);
    CHECK(!fe_try_take(&fe, &p));
    CHECK_EQ(fe_ack(&fe, SET_VRING_ENABLE, enable, 8, NULL, 0), 0);
    fe_expect(&fe, &p, RST, 3, 4);
    fe_down(&fe);
}

/* QMP stop and cont: the rings go on where they were, and so do the connections. */
TEST(connections_live_through_a_pause)
{
    struct fe fe;
    struct packet p;
    uint32_t port;
    char text[6];

    fe_init(&fe);
    fe_up(&fe);
    int fd = host_open(&fe, 1024, &port);
    fe_reclaim_tx(&fe);
    uint16_t rx = fe_stop_ring(&fe, FE_RX), tx = fe_stop_ring(&fe, FE_TX);

    CHECK_EQ(rx, fe.rings[FE_RX].last_used);
    CHECK_EQ(tx, fe.rings[FE_TX].last_used);
    FE_WAIT_STAT(&fe, guest_running, 0);
    host_write(fd, "paused", 6);
    fe_set_memory(&fe);
    fe_start_ring(&fe, FE_RX, rx);
    fe_start_ring(&fe, FE_TX, tx);
    fe_expect(&fe, &p, RW, 1024, port);
    CHECK(memcmp(p.data, "paused", 6) == 0);
    fe_data(&fe, 1024, port, "resume", 6);
    host_read(fd, text, 6);
    CHECK_EQ(fe_stats(&fe).guest_resets, 0);
    FE_WAIT_STAT(&fe, guest_running, 1);
    close(fd);
    fe_down(&fe);
}

/* A reboot: the rings begin anew, the old connections are gone, a program that waits for its turn is served by the
 * new guest. */
TEST(guest_reset_ends_all_connections)
{
    struct fe fe;
    struct packet p;
    uint32_t port;

    fe_init(&fe);
    fe_up(&fe);
    int fd = host_open(&fe, 1024, &port);
    int waiting = host_socket(&fe);

    FE_WAIT_STAT(&fe, connections, 2);
    fe_reclaim_tx(&fe);
    fe_stop_ring(&fe, FE_RX);
    fe_stop_ring(&fe, FE_TX);
    for (unsigned i = 0; i < 2; i++) {
        struct fe_ring *ring = &fe.rings[i];
        ring->avail_idx = ring->last_used = 0;
        ring->avail->idx = ring->used->idx = 0;
    }
    for (unsigned slot = 0; slot < fe.rx_num; slot++)
        fe_give_rx(&fe, slot);
    fe_start_ring(&fe, FE_RX, 0);
    fe_start_ring(&fe, FE_TX, 0);
    CHECK(host_at_end(fd));
    CHECK_EQ(fe_stats(&fe).guest_resets, 1);
    host_write(waiting, "CONNECT 5\n", 10);
    fe_expect(&fe, &p, VIRTIO_VSOCK_OP_REQUEST, 5, 0);
    close(fd);
    close(waiting);
    fe_down(&fe);
}

TEST(reset_owner_ends_all_connections)
{
    struct fe fe;
    uint32_t port;

    fe_init(&fe);
    fe_up(&fe);
    int fd = host_open(&fe, 1024, &port);
    CHECK_EQ(fe_ack(&fe, RESET_OWNER, NULL, 0, NULL, 0), 0);
    CHECK(host_at_end(fd));
    close(fd);
    fe_down(&fe);
}

TEST(memory_table_may_change_under_running_rings)
{
    struct fe fe;
    struct packet p;
    struct {
        uint32_t count, padding;
        struct pv_region_desc regions[1];
    } tiny = {.count = 1, .regions = {{0, 0x1000, FE_USER, 0}}};

    fe_init(&fe);
    fe_up(&fe);
    fe_set_memory(&fe);
    fe_op(&fe, RW, 1, 2);
    fe_expect(&fe, &p, RST, 1, 2);
    /* Without the rings' own memory they are broken. */
    CHECK_EQ(fe_ack(&fe, SET_MEM_TABLE, &tiny, sizeof(tiny), &fe.memfd, 1), 0);
    fe_wait_ring_error(&fe, FE_RX);
    fe_wait_ring_error(&fe, FE_TX);
    fe_down(&fe);
}

TEST(ring_started_outside_of_memory_is_refused)
{
    struct fe fe;
    uint64_t index = 0;
    struct {
        uint32_t index, flags;
        uint64_t desc, used, avail, log;
    } addr = {0, 0, FE_USER + FE_RAM - 16, FE_USER, FE_USER, 0};

    fe_init(&fe);
    fe_up(&fe);
    fe_stop_ring(&fe, FE_RX);
    CHECK_EQ(fe_ack(&fe, SET_VRING_ADDR, &addr, sizeof(addr), NULL, 0), 0);
    CHECK_EQ(fe_ack(&fe, SET_VRING_KICK, &index, 8, &fe.rings[0].kick, 1), 1);
    addr.desc = FE_USER + 8; /* not aligned */
    CHECK_EQ(fe_ack(&fe, SET_VRING_ADDR, &addr, sizeof(addr), NULL, 0), 0);
    CHECK_EQ(fe_ack(&fe, SET_VRING_KICK, &index, 8, &fe.rings[0].kick, 1), 1);
    fe_down(&fe);
}

/* ---- rings broken by the guest ----------------------------------------------------------------------------------- */

static void check_broken(struct fe *fe, unsigned ring, const char *fault)
{
    fe_wait_ring_error(fe, ring);
    if (strcmp(pv_vsock_fault(fe->device), fault)) {
        fprintf(stderr, "the fault is \"%s\", not \"%s\"\n", pv_vsock_fault(fe->device), fault);
        abort();
    }
    CHECK_EQ(fe_stats(fe).ring_faults, 1);
    fe_kick(fe, ring); /* a broken ring is not looked at again */
    CHECK_EQ(fe_ask(fe, GET_QUEUE_NUM), 3);
    CHECK_EQ(fe_stats(fe).ring_faults, 1);
    FE_WAIT_STAT(fe, guest_running, 0);
    fe_down(fe);
}

static void broken_descriptor(const struct vring_desc *descs, unsigned count, const char *fault)
{
    struct fe fe;

    fe_init(&fe);
    fe_up(&fe);
    memcpy(fe.rings[FE_TX].desc, descs, count * sizeof(*descs));
    fe_publish(&fe, FE_TX, 0);
    check_broken(&fe, FE_TX, fault);
}

#define NEXT VRING_DESC_F_NEXT
#define WRITE VRING_DESC_F_WRITE
#define INDIRECT VRING_DESC_F_INDIRECT
#define BROKEN(fault, ...)                                                      \
    do {                                                                        \
        struct vring_desc descs_[] = {__VA_ARGS__};                             \
        broken_descriptor(descs_, sizeof(descs_) / sizeof(descs_[0]), fault);   \
    } while (0)

TEST(broken_descriptors_break_the_ring)
{
    BROKEN("ring: descriptor outside of guest memory", {FE_RAM, 44, 0, 0});
    BROKEN("ring: descriptor outside of guest memory", {FE_RAM - 40, 44, 0, 0});
    BROKEN("ring: descriptor outside of guest memory", {UINT64_MAX - 10, 44, 0, 0});
    BROKEN("ring: descriptor outside of guest memory", {0, UINT32_MAX, 0, 0});
    BROKEN("ring: descriptor index out of range", {0, 44, NEXT, 32});
    BROKEN("ring: chain is a loop", {0, 44, NEXT, 0});
    BROKEN("ring: chain is a loop", {0, 0, NEXT, 1}, {0, 0, NEXT, 0});
    BROKEN("ring: readable descriptor after a writable one", {0, 44, NEXT | WRITE, 1}, {0, 44, 0, 0});
    BROKEN("ring: indirect descriptor with a next one", {0, 16, INDIRECT | NEXT, 1}, {0, 44, 0, 0});
    BROKEN("ring: indirect table of a bad size", {0, 0, INDIRECT, 0});
    BROKEN("ring: indirect table of a bad size", {0, 17, INDIRECT, 0});
    BROKEN("ring: indirect table of a bad size", {0, 33 * 16, INDIRECT, 0});
    BROKEN("ring: indirect table outside of guest memory", {FE_RAM - 8, 16, INDIRECT, 0});
}

static void broken_indirect(const struct vring_desc *descs, unsigned count, const char *fault)
{
    struct fe fe;

    fe_init(&fe);
    fe_up(&fe);
    memcpy(fe.ram + FE_TX_BASE, descs, count * sizeof(*descs));
    fe.rings[FE_TX].desc[0] = (struct vring_desc){FE_TX_BASE, count * 16, INDIRECT, 0};
    fe_publish(&fe, FE_TX, 0);
    check_broken(&fe, FE_TX, fault);
}

#define BROKEN_INDIRECT(fault, ...)                                             \
    do {                                                                        \
        struct vring_desc descs_[] = {__VA_ARGS__};                             \
        broken_indirect(descs_, sizeof(descs_) / sizeof(descs_[0]), fault);     \
    } while (0)

TEST(broken_indirect_tables_break_the_ring)
{
    BROKEN_INDIRECT("ring: indirect table within an indirect table", {0, 16, INDIRECT, 0});
    BROKEN_INDIRECT("ring: indirect descriptor index out of range", {0, 44, NEXT, 1});
    BROKEN_INDIRECT("ring: indirect chain is a loop", {0, 44, NEXT, 0});
    BROKEN_INDIRECT("ring: descriptor outside of guest memory", {FE_RAM, 44, 0, 0});
}

TEST(chain_of_too_many_segments_breaks_the_ring)
{
    struct fe fe;
    struct vring_desc *table;

    fe_init(&fe);
    fe.tx_num = 256;
    fe_up(&fe);
    table = (void *)(fe.ram + FE_TX_BASE);
    for (unsigned i = 0; i <= PV_SEGMENTS_MAX; i++)
        table[i] = (struct vring_desc){FE_TX_BASE, 1, i < PV_SEGMENTS_MAX ? NEXT : 0, (uint16_t)(i + 1)};
    fe.rings[FE_TX].desc[0] = (struct vring_desc){FE_TX_BASE, (PV_SEGMENTS_MAX + 1) * 16, INDIRECT, 0};
    fe_publish(&fe, FE_TX, 0);
    check_broken(&fe, FE_TX, "ring: chain of too many segments");
}

TEST(available_index_out_of_range_breaks_the_ring)
{
    struct fe fe;

    fe_init(&fe);
    fe_up(&fe);
    __atomic_store_n(&fe.rings[FE_TX].avail->idx, (uint16_t)(fe.rings[FE_TX].avail_idx + 33), __ATOMIC_RELEASE);
    fe_kick(&fe, FE_TX);
    check_broken(&fe, FE_TX, "ring: available index out of range");
}

TEST(head_out_of_range_breaks_the_ring)
{
    struct fe fe;

    fe_init(&fe);
    fe_up(&fe);
    fe_publish(&fe, FE_TX, 32);
    check_broken(&fe, FE_TX, "ring: descriptor index out of range");
}

static void broken_rx(uint32_t len, uint16_t flags, const char *fault)
{
    struct fe fe;

    fe_init(&fe);
    fe_open(&fe);
    fe_connect(&fe);
    fe.rx_num = 0; /* fe_start must not fill it */
    fe_start(&fe);
    fe.rings[FE_RX].desc[0] = (struct vring_desc){FE_RX_BASE, len, flags, 0};
    fe_publish(&fe, FE_RX, 0);
    fe_op(&fe, RW, 1, 2); /* something to answer */
    check_broken(&fe, FE_RX, fault);
}

TEST(unusable_rx_buffers_break_the_ring)
{
    broken_rx(FE_HEADER, WRITE, "ring: RX buffer that is readable or too small");
    broken_rx(4096, 0, "ring: RX buffer that is readable or too small");
    broken_rx(UINT32_MAX, WRITE, "ring: descriptor outside of guest memory");
}

TEST(broken_ring_works_again_after_a_restart)
{
    struct fe fe;
    struct packet p;

    fe_init(&fe);
    fe_up(&fe);
    fe.rings[FE_TX].desc[0] = (struct vring_desc){FE_RAM, 44, 0, 0};
    fe_publish(&fe, FE_TX, 0);
    fe_wait_ring_error(&fe, FE_TX);
    fe_stop_ring(&fe, FE_TX);
    fe_start_ring(&fe, FE_TX, fe.rings[FE_TX].avail_idx);
    fe.rings[FE_TX].last_used = fe.rings[FE_TX].used->idx;
    fe.rings[FE_TX].avail_idx = fe.rings[FE_TX].last_used;
    fe.rings[FE_TX].avail->idx = fe.rings[FE_TX].last_used;
    fe_stop_ring(&fe, FE_TX);
    fe_start_ring(&fe, FE_TX, fe.rings[FE_TX].last_used);
    fe_op(&fe, RW, 1, 2);
    fe_expect(&fe, &p, RST, 1, 2);
    fe_down(&fe);
}

/* ---- life -------------------------------------------------------------------------------------------------------- */

TEST(device_ends_with_its_front_end_if_asked)
{
    struct fe fe;

    fe_init(&fe);
    fe.config.exit_on_disconnect = 1;
    fe_up(&fe);
    shutdown(fe.sock, SHUT_RDWR);
    pthread_join(fe.thread, NULL);
    CHECK_EQ(fe.result, 0);
    CHECK(pthread_create(&fe.thread, NULL, (void *(*)(void *))(void (*)(void))getpid, NULL) == 0);
    fe_down(&fe);
}

TEST(device_names_why_it_threw_its_front_end_out)
{
    struct fe fe;

    fe_init(&fe);
    fe.config.exit_on_disconnect = 1;
    fe_up(&fe);
    fe_send(&fe, 63, 1, NULL, 0, NULL, 0);
    pthread_join(fe.thread, NULL);
    CHECK_EQ(fe.result, -1);
    CHECK_EQ(fe.err, EPROTO);
    CHECK(strcmp(pv_vsock_fault(fe.device), "vhost-user: request that is not supported") == 0);
    CHECK(pthread_create(&fe.thread, NULL, (void *(*)(void *))(void (*)(void))getpid, NULL) == 0);
    fe_down(&fe);
}

TEST(bad_configurations_are_refused)
{
    struct pv_vsock_config config = {.listen_fd = -1, .frontend_fd = -1, .host_listener_fd = -1, .guest_cid = 3};
    struct pv_vsock *device;
    char path[200];
    int err, pair[2];

    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    CHECK(pv_vsock_create(&config, &device, &err) < 0 && err == EINVAL);
    config.frontend_fd = pair[0];
    for (uint64_t cid = 0; cid < 3; cid++) {
        config.guest_cid = cid;
        CHECK(pv_vsock_create(&config, &device, &err) < 0 && err == EINVAL);
    }
    config.guest_cid = UINT32_MAX;
    CHECK(pv_vsock_create(&config, &device, &err) < 0 && err == EINVAL);
    config.guest_cid = 3;
    memset(path, 'x', sizeof(path));
    path[199] = 0;
    config.uds_path = path;
    CHECK(pv_vsock_create(&config, &device, &err) < 0 && err == ENAMETOOLONG);
    config.uds_path = NULL;
    config.host_listener_fd = 9999;
    CHECK(pv_vsock_create(&config, &device, &err) < 0 && err == EBADF);
    config.host_listener_fd = -1;
    config.listen_fd = 9999;
    CHECK(pv_vsock_create(&config, &device, &err) < 0 && err == EBADF);
    config.listen_fd = -1;
    config.exit_on_disconnect = 1;
    CHECK(pv_vsock_create(&config, &device, &err) == 0);
    close(pair[1]);
    CHECK(pv_vsock_run(device, &err) == 0);
    pv_vsock_destroy(device);
    pv_vsock_destroy(NULL);
}

/* ---- the memory table by itself ---------------------------------------------------------------------------------- */

TEST(memory_table_refuses_what_it_must)
{
    struct pv_memtable table = {0};
    int memfd = memfd_create("guest", MFD_CLOEXEC), err;
    int fds[9] = {memfd, memfd, memfd, memfd, memfd, memfd, memfd, memfd, memfd};
    uint64_t len = 0x1000;
    static const struct pv_region_desc good[2] = {{0, 0x2000, FE_USER, 0}, {0x2000, 0x1000, FE_USER + 0x2000, 0x2800}};
    static const struct pv_region_desc bad[][2] = {
        {{0, 0, 0, 0}},
        {{UINT64_MAX - 10, 0x1000, 0, 0}},
        {{0, 0x1000, UINT64_MAX - 10, 0}},
        {{0, 0x1000, 0, UINT64_MAX - 10}},
        {{0, 0x10001, 0, 0}},
        {{0, 0x1000, 0, 0xf001}},
    };
    static const struct pv_region_desc overlap[2] = {{0, 0x2000, FE_USER, 0}, {0x1fff, 0x1000, FE_USER + 0x4000, 0}};
    static const struct pv_region_desc user_overlap[2] = {{0, 0x2000, FE_USER, 0}, {0x2000, 0x1000, FE_USER + 0x1fff,
        0}};

    CHECK(ftruncate(memfd, 0x10000) == 0);
    CHECK(pv_memtable_set(&table, good, fds, 2, &err) == 0);
    for (unsigned i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
        CHECK(pv_memtable_set(&table, bad[i], fds, 1, &err) < 0 && err == EINVAL);
    CHECK(pv_memtable_set(&table, overlap, fds, 2, &err) < 0 && err == EINVAL);
    CHECK(pv_memtable_set(&table, user_overlap, fds, 2, &err) < 0 && err == EINVAL);
    CHECK(pv_memtable_set(&table, good, fds, 9, &err) < 0 && err == EINVAL);
    int not_memory = eventfd(0, EFD_CLOEXEC), mixed[2] = {memfd, not_memory}, closed[2] = {memfd, 9999};
    CHECK(pv_memtable_set(&table, good, mixed, 2, &err) < 0 && err == EINVAL);
    CHECK(pv_memtable_set(&table, good, closed, 2, &err) < 0 && err == EBADF);
    int read_only = open("/proc/self/exe", O_RDONLY | O_CLOEXEC), no_write[2] = {memfd, read_only};
    CHECK(pv_memtable_set(&table, good, no_write, 2, &err) < 0 && err == EACCES);
    /* The good one is still there, an offset within a page included. */
    uint8_t *second = pv_mem_guest(&table, 0x2000, &len);
    CHECK(second && len == 0x1000);
    *second = 77;
    uint8_t seen;
    CHECK(pread(memfd, &seen, 1, 0x2800) == 1 && seen == 77);
    len = 0x1000;
    CHECK(pv_mem_guest(&table, 0x1800, &len) && len == 0x800);
    CHECK(!pv_mem_guest(&table, 0x3000, &len));
    CHECK(pv_mem_user(&table, FE_USER + 0x1fff, 1));
    CHECK(!pv_mem_user(&table, FE_USER + 0x1fff, 2));
    CHECK(!pv_mem_user(&table, FE_USER - 1, 1));
    pv_memtable_clear(&table);
    CHECK(!pv_mem_guest(&table, 0, &len));
    close(memfd);
    close(not_memory);
    close(read_only);
}
