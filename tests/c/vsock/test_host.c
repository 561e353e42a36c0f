/* The host's side: the CONNECT line in every shape, and programs that come, go and crowd. Also the parts below, by
 * themselves. */
#include <errno.h>
#include <stddef.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "frontend.h"
#include "harness.h"
#include "common/iov.h"
#include "vsock/sendbuf.h"

#define REQUEST VIRTIO_VSOCK_OP_REQUEST

TEST(connect_lines_that_are_refused)
{
    static const char *lines[] = {
        "\n", "CONNECT\n", "CONNECT \n", "CONNECT x\n", "CONNECT -1\n", "CONNECT 1x\n", "connect 1\n", "CONNECT  1\n",
        "CONNECT 4294967295\n", "CONNECT 99999999999\n", "CONNECT 1 \n", "CONNECT 0x10\n", "HELLO 10\n",
        "CONNECT 00000000000000000000000000000000000000001\n",
    };
    struct fe fe;

    fe_init(&fe);
    fe_up(&fe);
    for (unsigned i = 0; i < sizeof(lines) / sizeof(lines[0]); i++) {
        int fd = host_socket(&fe);

        host_write(fd, lines[i], strlen(lines[i]));
        CHECK(host_at_end(fd));
        close(fd);
    }
    int fd = host_socket(&fe); /* end of file within the line */
    host_write(fd, "CONN", 4);
    shutdown(fd, SHUT_WR);
    CHECK(host_at_end(fd));
    close(fd);
    FE_WAIT_STAT(&fe, connections, 0);
    CHECK_EQ(fe_stats(&fe).refused, sizeof(lines) / sizeof(lines[0]) + 1);
    fe_down(&fe);
}

TEST(connect_line_in_pieces_and_with_data_behind_it)
{
    static const char text[] = "CONNECT 4294967294\r\nafter";
    struct fe fe;
    struct packet p;

    fe_init(&fe);
    fe_up(&fe);
    int fd = host_socket(&fe);
    for (unsigned i = 0; i < sizeof(text) - 1; i++)
        host_write(fd, text + i, 1);
    fe_expect(&fe, &p, REQUEST, 4294967294, 0);
    uint32_t port = p.hdr.src_port;
    fe_op(&fe, VIRTIO_VSOCK_OP_RESPONSE, 4294967294, port);
    fe_expect(&fe, &p, VIRTIO_VSOCK_OP_RW, 4294967294, port);
    CHECK(p.hdr.len == 5 && memcmp(p.data, "after", 5) == 0);
    close(fd);
    fe_down(&fe);
}

TEST(silent_program_times_out)
{
    struct fe fe;

    fe_init(&fe);
    fe.config.request_timeout_ms = 30;
    fe_up(&fe);
    int fd = host_socket(&fe);
    CHECK(host_at_end(fd));
    close(fd);
    fe_down(&fe);
}

TEST(program_that_comes_before_the_guest_is_served_when_it_is_up)
{
    struct fe fe;
    struct packet p;

    fe_init(&fe);
    fe_open(&fe);
    int fd = host_ask(&fe, 1024);
    FE_WAIT_STAT(&fe, connections, 1);
    fe_connect(&fe);
    fe_start(&fe);
    fe_expect(&fe, &p, REQUEST, 1024, 0);
    close(fd);
    fe_down(&fe);
}

TEST(front_end_that_goes_takes_its_connections_along)
{
    struct fe fe;
    uint32_t port;

    fe_init(&fe);
    fe_up(&fe);
    int fd = host_open(&fe, 1024, &port);
    close(fe.sock);
    fe.sock = -1;
    CHECK(host_at_end(fd));
    close(fd);
    fe_down(&fe);
}

TEST(listener_rests_while_no_descriptor_is_left)
{
    struct fe fe;
    struct rlimit old, tight;
    struct packet p;
    uint32_t port;

    fe_init(&fe);
    fe_up(&fe);
    int fd = host_open(&fe, 1, &port), second = socket(AF_UNIX, SOCK_STREAM, 0);

    close(second); /* the lowest free number: the next socket here gets it, and the device's accept finds none */
    CHECK(getrlimit(RLIMIT_NOFILE, &old) == 0);
    tight = old;
    tight.rlim_cur = (rlim_t)second + 1;
    CHECK(setrlimit(RLIMIT_NOFILE, &tight) == 0);
    second = host_ask(&fe, 2);
    fe_op(&fe, VIRTIO_VSOCK_OP_REQUEST, 5, 5); /* nor can the guest's connect have one */
    fe_expect(&fe, &p, VIRTIO_VSOCK_OP_RST, 5, 5);
    CHECK(setrlimit(RLIMIT_NOFILE, &old) == 0);
    close(fd);
    fe_expect(&fe, &p, VIRTIO_VSOCK_OP_SHUTDOWN, 1, port);
    fe_op(&fe, VIRTIO_VSOCK_OP_RST, 1, port);
    fe_expect(&fe, &p, REQUEST, 2, 0);
    close(second);
    fe_down(&fe);
}

TEST(guest_connects_nowhere_without_a_path)
{
    struct fe fe;
    struct packet p;

    fe_init(&fe);
    fe_up(&fe);
    for (uint32_t port = 0; port < 3; port++) {
        fe_op(&fe, REQUEST, 1, port);
        fe_expect(&fe, &p, VIRTIO_VSOCK_OP_RST, 1, port);
    }
    fe_down(&fe);
}

TEST(iov_slices_and_copies)
{
    char a[] = "abc", b[] = "", c[] = "defgh", out[16] = "";
    struct iovec iov[3] = {{a, 3}, {b, 0}, {c, 5}}, slice[3];

    CHECK_EQ(pv_iov_copy_out(iov, 3, 0, out, 100), 8);
    CHECK(memcmp(out, "abcdefgh", 8) == 0);
    CHECK_EQ(pv_iov_cut(iov, 3, 2, 3, slice, 3), 2);
    CHECK_EQ(pv_iov_copy_out(slice, 2, 0, out, 16), 3);
    CHECK(memcmp(out, "cde", 3) == 0);
    CHECK_EQ(pv_iov_cut(iov, 3, 8, 3, slice, 3), 0);
    CHECK_EQ(pv_iov_cut(iov, 3, 0, 8, slice, 1), 1);
    CHECK_EQ(pv_iov_copy_in(iov, 3, 0, "12345678", 8), 8);
    CHECK(memcmp(a, "123", 3) == 0 && memcmp(c, "45678", 5) == 0);
    CHECK_EQ(pv_iov_copy_in(iov, 1, 0, "xyzw", 4), 3);
}

TEST(sendbuf_is_a_queue_that_grows_and_wraps)
{
    enum { LIMIT = 10000 };
    struct pv_sendbuf buf = {0};
    uint8_t data[3000], back[3000];
    uint64_t in = 0, out = 0;

    for (unsigned round = 0; round < 500; round++) {
        size_t len = 1 + round * 37 % sizeof(data), room = LIMIT - buf.used;
        struct iovec iov[3] = {{data, len / 3}, {data + len / 3, 1}, {data + len / 3 + 1, len - len / 3 - 1}},
            pieces[2];

        if (len <= room && len > 3) {
            pattern(data, len, in);
            CHECK(pv_sendbuf_append(&buf, iov, 3, len, LIMIT) == 0);
            in += len;
        }
        CHECK(buf.capacity <= 16384);
        unsigned count = pv_sendbuf_iov(&buf, pieces);
        size_t take = pv_iov_copy_out(pieces, count, 0, back, round * 91 % 1400);

        pattern(data, take, out);
        CHECK(memcmp(data, back, take) == 0);
        pv_sendbuf_consume(&buf, take);
        out += take;
        CHECK_EQ(buf.used, in - out);
    }
    pv_sendbuf_consume(&buf, buf.used);
    CHECK(buf.data == NULL && buf.capacity == 0);
    CHECK(pv_sendbuf_append(&buf, NULL, 0, 0, LIMIT) == 0);
    pv_sendbuf_free(&buf);
}
