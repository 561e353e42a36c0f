/* Every packet operation, in both directions, against a guest driver of the tests' own. */
#include <errno.h>
#include <poll.h>
#include <stddef.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "frontend.h"
#include "harness.h"

#define REQUEST VIRTIO_VSOCK_OP_REQUEST
#define RESPONSE VIRTIO_VSOCK_OP_RESPONSE
#define RST VIRTIO_VSOCK_OP_RST
#define SHUTDOWN VIRTIO_VSOCK_OP_SHUTDOWN
#define RW VIRTIO_VSOCK_OP_RW
#define SHUT_BOTH 3

TEST(host_connects_asks_and_is_answered)
{
    struct fe fe;
    struct packet p;
    uint32_t port;
    char answer[5];

    fe_init(&fe);
    fe_up(&fe);
    int fd = host_open(&fe, 1024, &port);
    host_write(fd, "hello", 5);
    fe_expect(&fe, &p, RW, 1024, port);
    CHECK_EQ(p.hdr.len, 5);
    CHECK(memcmp(p.data, "hello", 5) == 0);
    fe_data(&fe, 1024, port, "world", 5);
    host_read(fd, answer, 5);
    CHECK(memcmp(answer, "world", 5) == 0);
    close(fd);
    fe_expect(&fe, &p, SHUTDOWN, 1024, port);
    CHECK_EQ(p.hdr.flags & SHUT_BOTH, SHUT_BOTH);
    fe_op(&fe, RST, 1024, port);
    FE_WAIT_STAT(&fe, connections, 0);
    CHECK_EQ(fe_stats(&fe).opened_by_host, 1);
    fe_down(&fe);
}

TEST(guest_connects_to_a_listener)
{
    struct fe fe;
    struct packet p;
    char text[3];

    fe_init(&fe);
    fe_up(&fe);
    int listener = host_listen(&fe, 77);
    fe_op(&fe, REQUEST, 5000, 77);
    fe_expect(&fe, &p, RESPONSE, 5000, 77);
    CHECK_EQ(p.hdr.buf_alloc, 1 << 18);
    int fd = accept(listener, NULL, NULL);
    fe_data(&fe, 5000, 77, "abc", 3);
    host_read(fd, text, 3);
    CHECK(memcmp(text, "abc", 3) == 0);
    fe_shutdown(&fe, 5000, 77, SHUT_BOTH);
    fe_expect(&fe, &p, RST, 5000, 77);
    CHECK(host_at_end(fd));
    FE_WAIT_STAT(&fe, connections, 0);
    CHECK_EQ(fe_stats(&fe).opened_by_guest, 1);
    close(fd);
    close(listener);
    host_unlink(&fe, 77);
    fe_down(&fe);
}

TEST(guest_connect_without_listener_is_reset)
{
    struct fe fe;
    struct packet p;

    fe_init(&fe);
    fe_up(&fe);
    fe_op(&fe, REQUEST, 5000, 78);
    fe_expect(&fe, &p, RST, 5000, 78);
    CHECK_EQ(fe_stats(&fe).refused, 1);
    fe_down(&fe);
}

TEST(guest_refuses_a_connect)
{
    struct fe fe;
    struct packet p;

    fe_init(&fe);
    fe_up(&fe);
    int fd = host_ask(&fe, 9);
    fe_expect(&fe, &p, REQUEST, 9, 0);
    fe_op(&fe, RST, 9, p.hdr.src_port);
    CHECK(host_at_end(fd));
    FE_WAIT_STAT(&fe, refused, 1);
    close(fd);
    fe_down(&fe);
}

TEST(guest_answers_a_connect_with_nonsense)
{
    struct fe fe;
    struct packet p;

    fe_init(&fe);
    fe_up(&fe);
    int fd = host_ask(&fe, 9);
    fe_expect(&fe, &p, REQUEST, 9, 0);
    uint32_t port = p.hdr.src_port;
    fe_data(&fe, 9, port, "early", 5);
    fe_expect(&fe, &p, RST, 9, port);
    CHECK(host_at_end(fd));
    close(fd);
    fe_down(&fe);
}

TEST(connect_that_nobody_answers_times_out)
{
    struct fe fe;
    struct packet p;

    fe_init(&fe);
    fe.config.request_timeout_ms = 50;
    fe_up(&fe);
    int fd = host_ask(&fe, 9);
    fe_expect(&fe, &p, REQUEST, 9, 0);
    fe_expect(&fe, &p, RST, 9, p.hdr.src_port);
    CHECK(host_at_end(fd));
    close(fd);
    fe_down(&fe);
}

TEST(program_gives_up_before_the_guest_answers)
{
    struct fe fe;
    struct packet p;

    fe_init(&fe);
    fe_up(&fe);
    int fd = host_ask(&fe, 9);
    fe_expect(&fe, &p, REQUEST, 9, 0);
    uint32_t port = p.hdr.src_port;
    close(fd);
    fe_expect(&fe, &p, RST, 9, port);
    fe_op(&fe, RESPONSE, 9, port); /* too late: for a connection that is not there */
    fe_expect(&fe, &p, RST, 9, port);
    fe_down(&fe);
}

TEST(program_half_closes_and_still_reads)
{
    struct fe fe;
    struct packet p;
    uint32_t port;
    char text[4];

    fe_init(&fe);
    fe_up(&fe);
    int fd = host_open(&fe, 1024, &port);
    host_write(fd, "last", 4);
    shutdown(fd, SHUT_WR);
    fe_expect(&fe, &p, RW, 1024, port);
    fe_expect(&fe, &p, SHUTDOWN, 1024, port);
    CHECK_EQ(p.hdr.flags, VIRTIO_VSOCK_SHUTDOWN_SEND);
    fe_data(&fe, 1024, port, "more", 4);
    host_read(fd, text, 4);
    CHECK(memcmp(text, "more", 4) == 0);
    fe_shutdown(&fe, 1024, port, VIRTIO_VSOCK_SHUTDOWN_SEND);
    CHECK(host_at_end(fd));
    /* Shut in both directions: the guest is told and ends it. */
    fe_expect(&fe, &p, SHUTDOWN, 1024, port);
    CHECK_EQ(p.hdr.flags, SHUT_BOTH);
    fe_op(&fe, RST, 1024, port);
    FE_WAIT_STAT(&fe, connections, 0);
    close(fd);
    fe_down(&fe);
}

TEST(guest_half_closes_and_still_reads)
{
    struct fe fe;
    struct packet p;
    uint32_t port;

    fe_init(&fe);
    fe_up(&fe);
    int fd = host_open(&fe, 1024, &port);
    fe_shutdown(&fe, 1024, port, VIRTIO_VSOCK_SHUTDOWN_SEND);
    CHECK(host_at_end(fd));
    host_write(fd, "still", 5);
    fe_expect(&fe, &p, RW, 1024, port);
    CHECK_EQ(p.hdr.len, 5);
    fe_shutdown(&fe, 1024, port, VIRTIO_VSOCK_SHUTDOWN_RCV); /* flags add up: closed both ways now */
    fe_expect(&fe, &p, RST, 1024, port);
    FE_WAIT_STAT(&fe, connections, 0);
    close(fd);
    fe_down(&fe);
}

TEST(guest_stops_receiving)
{
    struct fe fe;
    uint32_t port;
    char text[2];

    fe_init(&fe);
    fe_up(&fe);
    int fd = host_open(&fe, 1024, &port);
    fe_shutdown(&fe, 1024, port, VIRTIO_VSOCK_SHUTDOWN_RCV);
    fe_reclaim_tx(&fe);
    CHECK(send(fd, "x", 1, MSG_NOSIGNAL) < 0 && errno == EPIPE);
    fe_data(&fe, 1024, port, "ok", 2);
    host_read(fd, text, 2);
    close(fd);
    struct packet p;
    fe_expect(&fe, &p, SHUTDOWN, 1024, port);
    CHECK_EQ(p.hdr.flags & SHUT_BOTH, SHUT_BOTH);
    fe_op(&fe, RST, 1024, port);
    FE_WAIT_STAT(&fe, connections, 0);
    fe_down(&fe);
}

TEST(guest_close_with_unread_bytes_is_end_of_file_not_reset)
{
    struct fe fe;
    struct packet p;
    uint32_t port;

    fe_init(&fe);
    fe_up(&fe);
    int fd = host_open(&fe, 1024, &port);
    fe_credit(&fe, 1024, port, 0, 0); /* the guest takes nothing, so this stays in the socket */
    fe_reclaim_tx(&fe);
    host_write(fd, "unread", 6);
    fe_expect(&fe, &p, VIRTIO_VSOCK_OP_CREDIT_REQUEST, 1024, port);
    fe_shutdown(&fe, 1024, port, SHUT_BOTH);
    fe_expect(&fe, &p, RST, 1024, port);
    FE_WAIT_STAT(&fe, connections, 0);
    char byte;
    CHECK_EQ(read(fd, &byte, 1), 0);
    close(fd);
    fe_down(&fe);
}

TEST(program_is_gone_while_the_guest_sends)
{
    struct fe fe;
    struct packet p;
    uint32_t port;

    fe_init(&fe);
    fe_up(&fe);
    int fd = host_open(&fe, 1024, &port);
    close(fd);
    fe_expect(&fe, &p, SHUTDOWN, 1024, port);
    fe_data(&fe, 1024, port, "nobody", 6); /* crossed on the way: thrown away, not an error */
    fe_shutdown(&fe, 1024, port, SHUT_BOTH);
    do
        fe_take(&fe, &p);
    while (p.hdr.op == SHUTDOWN);
    CHECK_EQ(p.hdr.op, RST);
    FE_WAIT_STAT(&fe, connections, 0);
    fe_down(&fe);
}

TEST(guest_that_never_ends_a_closed_connection_is_reset)
{
    struct fe fe;
    struct packet p;
    uint32_t port;

    fe_init(&fe);
    fe.config.linger_timeout_ms = 50;
    fe_up(&fe);
    int fd = host_open(&fe, 1024, &port);
    close(fd);
    do
        fe_take(&fe, &p);
    while (p.hdr.op == SHUTDOWN);
    CHECK_EQ(p.hdr.op, RST);
    FE_WAIT_STAT(&fe, connections, 0);
    fe_down(&fe);
}

TEST(guest_reset_ends_the_program_after_its_data)
{
    struct fe fe;
    uint32_t port;
    char text[4];

    fe_init(&fe);
    fe_up(&fe);
    int fd = host_open(&fe, 1024, &port);
    fe_data(&fe, 1024, port, "tail", 4);
    fe_op(&fe, RST, 1024, port);
    host_read(fd, text, 4);
    CHECK(host_at_end(fd));
    CHECK_EQ(fe_stats(&fe).resets_received, 1);
    close(fd);
    fe_down(&fe);
}

TEST(second_request_for_the_same_ports_resets)
{
    struct fe fe;
    struct packet p;

    fe_init(&fe);
    fe_up(&fe);
    int listener = host_listen(&fe, 77);
    fe_op(&fe, REQUEST, 5000, 77);
    fe_expect(&fe, &p, RESPONSE, 5000, 77);
    fe_op(&fe, REQUEST, 5000, 77);
    fe_expect(&fe, &p, RST, 5000, 77);
    close(listener);
    host_unlink(&fe, 77);
    fe_down(&fe);
}

TEST(request_for_lingering_ports_opens_anew)
{
    struct fe fe;
    struct packet p;

    fe_init(&fe);
    fe_up(&fe);
    int listener = host_listen(&fe, 77);
    fe_op(&fe, REQUEST, 5000, 77);
    fe_expect(&fe, &p, RESPONSE, 5000, 77);
    close(accept(listener, NULL, NULL));
    fe_take(&fe, &p);
    while ((p.hdr.flags & SHUT_BOTH) != SHUT_BOTH)
        fe_take(&fe, &p);
    fe_op(&fe, REQUEST, 5000, 77);
    fe_expect(&fe, &p, RESPONSE, 5000, 77);
    CHECK_EQ(fe_stats(&fe).connections, 1);
    close(listener);
    host_unlink(&fe, 77);
    fe_down(&fe);
}

TEST(second_response_resets)
{
    struct fe fe;
    struct packet p;
    uint32_t port;

    fe_init(&fe);
    fe_up(&fe);
    int fd = host_open(&fe, 1024, &port);
    fe_op(&fe, RESPONSE, 1024, port);
    fe_expect(&fe, &p, RST, 1024, port);
    CHECK(host_at_end(fd));
    close(fd);
    fe_down(&fe);
}

TEST(packets_for_no_connection_are_reset_but_rst_is_not)
{
    static const uint16_t ops[] = {RESPONSE, SHUTDOWN, RW, VIRTIO_VSOCK_OP_CREDIT_UPDATE,
        VIRTIO_VSOCK_OP_CREDIT_REQUEST, 99};
    struct fe fe;
    struct packet p;

    fe_init(&fe);
    fe_up(&fe);
    for (unsigned i = 0; i < sizeof(ops) / sizeof(ops[0]); i++) {
        fe_op(&fe, ops[i], 100 + i, 200);
        fe_expect(&fe, &p, RST, 100 + i, 200);
    }
    fe_op(&fe, RST, 300, 200);
    fe_op(&fe, RW, 301, 200);
    fe_expect(&fe, &p, RST, 301, 200);
    fe_down(&fe);
}

TEST(unknown_operation_resets_the_connection)
{
    struct fe fe;
    struct packet p;
    uint32_t port;

    fe_init(&fe);
    fe_up(&fe);
    int fd = host_open(&fe, 1024, &port);
    fe_op(&fe, 99, 1024, port);
    fe_expect(&fe, &p, RST, 1024, port);
    CHECK(host_at_end(fd));
    CHECK_EQ(fe_stats(&fe).bad_packets, 1);
    close(fd);
    fe_down(&fe);
}

TEST(unknown_type_is_reset_with_its_type)
{
    struct fe fe;
    struct packet p;
    struct virtio_vsock_hdr hdr = fe_hdr(REQUEST, 10, 20);

    fe_init(&fe);
    fe_up(&fe);
    hdr.type = 7;
    fe_transmit(&fe, &hdr, NULL, 0, 1);
    fe_expect(&fe, &p, RST, 10, 20);
    CHECK_EQ(p.hdr.type, 7);
    fe_down(&fe);
}

TEST(foreign_cids_and_bad_lengths_are_dropped)
{
    struct fe fe;
    struct packet p;

    fe_init(&fe);
    fe_up(&fe);
    for (int i = 0; i < 4; i++) {
        struct virtio_vsock_hdr hdr = fe_hdr(RW, 10, 20);
        if (i == 0)
            hdr.src_cid = 43;
        if (i == 1)
            hdr.dst_cid = 3;
        if (i == 2)
            hdr.len = 1; /* and no data */
        if (i == 3)
            hdr.len = UINT32_MAX;
        fe_transmit(&fe, &hdr, NULL, 0, 1);
    }
    /* A chain shorter than a header. */
    struct fe_ring *tx = &fe.rings[FE_TX];
    fe_reclaim_tx(&fe);
    tx->desc[0] = (struct vring_desc){.addr = FE_TX_BASE, .len = 10};
    fe_publish(&fe, FE_TX, 0);
    fe_reclaim_tx(&fe);
    CHECK_EQ(fe_stats(&fe).bad_packets, 5);
    fe_op(&fe, RW, 11, 20); /* the device still works */
    fe_expect(&fe, &p, RST, 11, 20);
    fe_down(&fe);
}

TEST(data_after_shutdown_resets)
{
    struct fe fe;
    struct packet p;
    uint32_t port;

    fe_init(&fe);
    fe_up(&fe);
    int fd = host_open(&fe, 1024, &port);
    fe_shutdown(&fe, 1024, port, VIRTIO_VSOCK_SHUTDOWN_SEND);
    fe_data(&fe, 1024, port, "x", 1);
    fe_expect(&fe, &p, RST, 1024, port);
    close(fd);
    fe_down(&fe);
}

TEST(credit_request_is_answered)
{
    struct fe fe;
    struct packet p;
    uint32_t port;
    char text[3];

    fe_init(&fe);
    fe_up(&fe);
    int fd = host_open(&fe, 1024, &port);
    fe_data(&fe, 1024, port, "abc", 3);
    host_read(fd, text, 3);
    fe_op(&fe, VIRTIO_VSOCK_OP_CREDIT_REQUEST, 1024, port);
    fe_expect(&fe, &p, VIRTIO_VSOCK_OP_CREDIT_UPDATE, 1024, port);
    CHECK_EQ(p.hdr.fwd_cnt, 3);
    CHECK_EQ(p.hdr.buf_alloc, 1 << 18);
    close(fd);
    fe_down(&fe);
}

TEST(every_chain_shape_carries_the_same_bytes)
{
    static const unsigned shapes[] = {1, 2, 3, 4, 5, 17, 32};
    struct fe fe;
    uint32_t port;
    uint8_t data[60000], back[60000];

    fe_init(&fe);
    fe_up(&fe);
    int fd = host_open(&fe, 1024, &port);
    for (unsigned i = 0; i < 64; i++) {
        struct virtio_vsock_hdr hdr = fe_hdr(RW, 1024, port);

        hdr.len = 1 + i * 937;
        pattern(data, hdr.len, i);
        fe_transmit(&fe, &hdr, data, hdr.len, shapes[i % 7]);
        host_read(fd, back, hdr.len);
        CHECK(memcmp(data, back, hdr.len) == 0);
    }
    close(fd);
    fe_down(&fe);
}

TEST(strays_wait_for_room_and_none_is_lost)
{
    enum { COUNT = 1000 };
    struct fe fe;
    struct packet p;

    fe_init(&fe);
    fe.rx_num = 4;
    fe_up(&fe);
    /* More answers than the queue of strays holds, while nobody takes them: the device must stop reading, not
     * forget. */
    unsigned sent = 0;
    for (unsigned taken = 0; taken < COUNT; taken++) {
        struct fe_ring *tx = &fe.rings[FE_TX];

        while (sent < COUNT && (uint16_t)(tx->avail_idx - __atomic_load_n(&tx->used->idx,
            __ATOMIC_ACQUIRE)) < tx->num / 4 - 1)
            fe_op(&fe, RW, 1000 + sent++, 5);
        fe_expect(&fe, &p, RST, 1000 + taken, 5);
    }
    fe_down(&fe);
}
