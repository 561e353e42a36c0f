/* Flow: credit both ways, back-pressure with bounded memory, wrap-around of ring indices, many connections, no busy
 * loop. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stddef.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "frontend.h"
#include "harness.h"

#define RW VIRTIO_VSOCK_OP_RW
#define RST VIRTIO_VSOCK_OP_RST
#define CREDIT_UPDATE VIRTIO_VSOCK_OP_CREDIT_UPDATE
#define CREDIT_REQUEST VIRTIO_VSOCK_OP_CREDIT_REQUEST
#define CHUNK 16384U

struct writer {
    int fd;
    uint64_t total;
};

static void *write_pattern(void *argument)
{
    struct writer *w = argument;
    uint8_t data[CHUNK];

    for (uint64_t done = 0; done < w->total; done += CHUNK) {
        pattern(data, CHUNK, done);
        host_write(w->fd, data, CHUNK);
    }
    return NULL;
}

/* The program writes, the guest reads and gives credit as it does. */
static void bulk_to_guest(struct fe *fe, uint64_t total)
{
    uint32_t port, told = 0;
    int fd = host_open(fe, 1024, &port);
    struct writer w = {.fd = fd, .total = total};
    static struct packet p;
    static uint8_t expected[65536];
    pthread_t thread;

    CHECK(pthread_create(&thread, NULL, write_pattern, &w) == 0);
    for (uint64_t got = 0; got < total;) {
        fe_take(fe, &p);
        if (p.hdr.op == RW) {
            pattern(expected, p.hdr.len, got);
            CHECK(memcmp(expected, p.data, p.hdr.len) == 0);
            got += p.hdr.len;
            CHECK(got - told <= 1 << 18); /* never more than the credit given */
        } else {
            CHECK_EQ(p.hdr.op, CREDIT_REQUEST);
        }
        if (got - told > 1 << 16 || p.hdr.op == CREDIT_REQUEST || got == total) {
            told = (uint32_t)got;
            fe_credit(fe, 1024, port, 1 << 18, told);
        }
    }
    pthread_join(thread, NULL);
    close(fd);
    do
        fe_take(fe, &p);
    while (p.hdr.op != VIRTIO_VSOCK_OP_SHUTDOWN);
    fe_op(fe, RST, 1024, port);
    FE_WAIT_STAT(fe, connections, 0);
}

/* The guest writes as its credit allows, the program reads. */
static void bulk_to_host(struct fe *fe, uint64_t total)
{
    uint32_t port, forwarded = 0, window = 1 << 18;
    int fd = host_open(fe, 1024, &port);
    static struct packet p;
    static uint8_t data[CHUNK], back[CHUNK];
    uint64_t sent = 0, got = 0;

    CHECK(fcntl(fd, F_SETFL, O_NONBLOCK) == 0);
    while (got < total) {
        while (fe_try_take(fe, &p)) {
            CHECK_EQ(p.hdr.op, CREDIT_UPDATE);
            forwarded = p.hdr.fwd_cnt;
        }
        if (sent < total && (uint32_t)sent - forwarded + CHUNK <= window) {
            pattern(data, CHUNK, sent);
            fe_data(fe, 1024, port, data, CHUNK);
            sent += CHUNK;
        }
        ssize_t n = read(fd, back, CHUNK);

        if (n > 0) {
            pattern(data, (size_t)n, got);
            CHECK(memcmp(data, back, (size_t)n) == 0);
            got += (uint64_t)n;
        } else {
            CHECK(n < 0 && errno == EAGAIN);
        }
    }
    CHECK_EQ(fe_stats(fe).buffered_bytes, 0);
    fe_shutdown(fe, 1024, port, 3);
    do
        fe_take(fe, &p);
    while (p.hdr.op != RST);
    close(fd);
    FE_WAIT_STAT(fe, connections, 0);
}

static void bulk_both_ways(uint64_t features, uint16_t base, unsigned rx_num, uint32_t rx_buffer)
{
    struct fe fe;

    fe_init(&fe);
    fe.features = features;
    fe.base = base;
    fe.rx_num = rx_num;
    fe.rx_buffer = rx_buffer;
    fe_up(&fe);
    bulk_to_guest(&fe, 4U << 20);
    bulk_to_host(&fe, 4U << 20);
    CHECK_EQ(fe_stats(&fe).bytes_to_guest, 4U << 20);
    CHECK_EQ(fe_stats(&fe).bytes_to_host, 4U << 20);
    fe_down(&fe);
}

TEST(bulk_with_event_idx_over_the_wrap_of_indices)
{
    bulk_both_ways(FE_FEATURES, 65500, 64, 4096 + FE_HEADER);
}

TEST(bulk_without_event_idx)
{
    bulk_both_ways(FE_FEATURES & ~FE_EVENT_IDX, 0, 64, 4096 + FE_HEADER);
}

TEST(bulk_with_few_small_buffers)
{
    bulk_both_ways(FE_FEATURES, 3, 2, FE_HEADER + 1000);
}

TEST(bulk_with_big_buffers)
{
    bulk_both_ways(FE_FEATURES, 0, 16, 65536);
}

TEST(guest_without_credit_gets_nothing_until_it_gives_some)
{
    struct fe fe;
    struct packet p;
    uint32_t port;

    fe_init(&fe);
    fe_up(&fe);
    int fd = host_open(&fe, 1024, &port);
    fe_credit(&fe, 1024, port, 10, 0);
    fe_reclaim_tx(&fe);
    host_write(fd, "0123456789abcdef", 16);
    fe_expect(&fe, &p, RW, 1024, port);
    CHECK_EQ(p.hdr.len, 10);
    fe_expect(&fe, &p, CREDIT_REQUEST, 1024, port);
    fe_credit(&fe, 1024, port, 10, 0); /* still none: it is not asked again */
    fe_reclaim_tx(&fe);
    CHECK(!fe_try_take(&fe, &p));
    fe_credit(&fe, 1024, port, 10, 10);
    fe_expect(&fe, &p, RW, 1024, port);
    CHECK(p.hdr.len == 6 && memcmp(p.data, "abcdef", 6) == 0);
    /* Credit that makes no sense is no credit. */
    fe_credit(&fe, 1024, port, 10, 1000);
    fe_reclaim_tx(&fe);
    host_write(fd, "x", 1);
    fe_expect(&fe, &p, CREDIT_REQUEST, 1024, port);
    fe_credit(&fe, 1024, port, UINT32_MAX, 16);
    fe_expect(&fe, &p, RW, 1024, port);
    close(fd);
    fe_down(&fe);
}

/* A program that does not read: the device holds a window of its data and no more, other connections go on, and
 * nothing is lost. */
TEST(stalled_program_costs_one_window)
{
    struct fe fe;
    static struct packet p;
    uint32_t port, other, sent = 0;
    static uint8_t data[CHUNK], back[CHUNK];

    fe_init(&fe);
    fe_up(&fe);
    int fd = host_open(&fe, 1024, &port);
    uint32_t window = 1 << 18, forwarded = 0;

    while (fe_stats(&fe).buffered_bytes + CHUNK <= window) {
        if (sent - forwarded + CHUNK <= window) {
            pattern(data, CHUNK, sent);
            fe_data(&fe, 1024, port, data, CHUNK);
            sent += CHUNK;
            continue;
        }
        fe_op(&fe, CREDIT_REQUEST, 1024, port); /* as far as told the window is full: ask whether more went on */
        fe_expect(&fe, &p, CREDIT_UPDATE, 1024, port);
        forwarded = p.hdr.fwd_cnt;
    }
    CHECK(fe_stats(&fe).buffered_bytes <= window);
    int fd2 = host_open(&fe, 1025, &other);

    fe_data(&fe, 1025, other, "alive", 5);
    host_read(fd2, back, 5);
    for (uint32_t got = 0; got < sent; got += CHUNK) {
        host_read(fd, back, CHUNK);
        pattern(data, CHUNK, got);
        CHECK(memcmp(data, back, CHUNK) == 0);
    }
    FE_WAIT_STAT(&fe, buffered_bytes, 0);
    close(fd);
    close(fd2);
    fe_down(&fe);
}

/* More than the window: the connection is reset, and what was buffered goes. */
TEST(guest_that_ignores_its_credit_is_reset)
{
    struct fe fe;
    static struct packet p;
    static uint8_t data[CHUNK];
    uint32_t port;

    fe_init(&fe);
    fe.config.window_bytes = 65536;
    fe_up(&fe);
    int fd = host_open(&fe, 1024, &port);
    for (int i = 0; i < 64; i++)
        fe_data(&fe, 1024, port, data, CHUNK);
    do
        fe_take(&fe, &p);
    while (p.hdr.op != RST);
    CHECK_EQ(fe_stats(&fe).credit_violations, 1);
    FE_WAIT_STAT(&fe, buffered_bytes, 0);
    close(fd);
    fe_down(&fe);
}

TEST(data_behind_a_stalled_program_survives_the_guests_close)
{
    struct fe fe;
    static struct packet p;
    static uint8_t data[CHUNK], back[CHUNK];
    uint32_t port, sent = 0;

    fe_init(&fe);
    fe_up(&fe);
    int fd = host_open(&fe, 1024, &port);
    while (fe_stats(&fe).buffered_bytes < 3 * CHUNK) {
        pattern(data, CHUNK, sent);
        fe_data(&fe, 1024, port, data, CHUNK);
        fe_reclaim_tx(&fe);
        sent += CHUNK;
    }
    fe_shutdown(&fe, 1024, port, 3);
    do
        fe_take(&fe, &p);
    while (p.hdr.op != RST);
    for (uint32_t got = 0; got < sent; got += CHUNK) {
        host_read(fd, back, CHUNK);
        pattern(data, CHUNK, got);
        CHECK(memcmp(data, back, CHUNK) == 0);
    }
    CHECK(host_at_end(fd));
    FE_WAIT_STAT(&fe, connections, 0);
    close(fd);
    fe_down(&fe);
}

TEST(program_that_dies_with_data_behind_it_frees_the_memory)
{
    struct fe fe;
    static struct packet p;
    static uint8_t data[CHUNK];
    uint32_t port;

    fe_init(&fe);
    fe_up(&fe);
    int fd = host_open(&fe, 1024, &port);
    while (fe_stats(&fe).buffered_bytes < CHUNK) {
        fe_data(&fe, 1024, port, data, CHUNK);
        fe_reclaim_tx(&fe);
    }
    close(fd);
    do
        fe_take(&fe, &p);
    while (p.hdr.op != VIRTIO_VSOCK_OP_SHUTDOWN);
    FE_WAIT_STAT(&fe, buffered_bytes, 0);
    fe_op(&fe, RST, 1024, port);
    FE_WAIT_STAT(&fe, connections, 0);
    fe_down(&fe);
}

TEST(drain_ends_when_the_program_dies)
{
    struct fe fe;
    static struct packet p;
    static uint8_t data[CHUNK];
    uint32_t port;

    fe_init(&fe);
    fe_up(&fe);
    int fd = host_open(&fe, 1024, &port);
    while (fe_stats(&fe).buffered_bytes < CHUNK) {
        fe_data(&fe, 1024, port, data, CHUNK);
        fe_reclaim_tx(&fe);
    }
    fe_op(&fe, RST, 1024, port);
    fe_reclaim_tx(&fe);
    CHECK_EQ(fe_stats(&fe).connections, 1);
    close(fd);
    FE_WAIT_STAT(&fe, connections, 0);
    while (fe_try_take(&fe, &p))
        CHECK_EQ(p.hdr.op, CREDIT_UPDATE); /* from before the RST */
    fe_down(&fe);
}

TEST(thousand_connections_at_once)
{
    enum { COUNT = 1000 };
    struct fe fe;
    static struct packet p;
    static int fds[COUNT];
    static uint32_t ports[COUNT];

    fe_init(&fe);
    fe_up(&fe);
    for (int i = 0; i < COUNT; i++)
        fds[i] = host_open(&fe, 1000 + (uint32_t)i % 7, &ports[i]);
    CHECK_EQ(fe_stats(&fe).connections, COUNT);
    for (int i = 0; i < COUNT; i++) {
        fe_data(&fe, 1000 + (uint32_t)i % 7, ports[i], &i, sizeof(i));
        host_write(fds[i], &i, sizeof(i));
    }
    for (int i = 0; i < COUNT; i++) {
        int number;

        host_read(fds[i], &number, sizeof(number));
        CHECK_EQ(number, i);
        fe_take(&fe, &p);
        memcpy(&number, p.data, sizeof(number));
        CHECK_EQ(p.hdr.src_port, ports[number]);
    }
    for (int i = 0; i < COUNT; i++)
        close(fds[i]);
    for (int i = 0; i < COUNT; i++) {
        fe_take(&fe, &p);
        CHECK_EQ(p.hdr.op, VIRTIO_VSOCK_OP_SHUTDOWN);
        fe_op(&fe, RST, p.hdr.dst_port, p.hdr.src_port);
    }
    FE_WAIT_STAT(&fe, connections, 0);
    FE_WAIT_STAT(&fe, promised_bytes, 0);
    fe_down(&fe);
}

TEST(connections_beyond_the_limit_wait_and_then_get_their_turn)
{
    struct fe fe;
    struct packet p;
    uint32_t a, b;

    fe_init(&fe);
    fe.config.max_connections = 2;
    fe_up(&fe);
    int fd1 = host_open(&fe, 1, &a), fd2 = host_open(&fe, 2, &b);
    int fd3 = host_ask(&fe, 3);
    /* The guest's own are refused meanwhile. */
    int listener = host_listen(&fe, 77);
    fe_op(&fe, VIRTIO_VSOCK_OP_REQUEST, 5000, 77);
    fe_expect(&fe, &p, RST, 5000, 77);
    fe_shutdown(&fe, 1, a, 3);
    fe_expect(&fe, &p, RST, 1, a);
    fe_expect(&fe, &p, VIRTIO_VSOCK_OP_REQUEST, 3, 0);
    close(fd1);
    close(fd2);
    close(fd3);
    close(listener);
    host_unlink(&fe, 77);
    fe_down(&fe);
}

TEST(windows_shrink_with_the_budget_and_then_connects_are_refused)
{
    struct fe fe;
    struct packet p;
    uint32_t smallest = UINT32_MAX, opened = 0;
    static int fds[200];

    fe_init(&fe);
    fe.config.buffer_budget_bytes = 1 << 20;
    fe_up(&fe);
    for (;; opened++) {
        fds[opened] = host_socket(&fe);
        send(fds[opened], "CONNECT 1\n", 10, MSG_NOSIGNAL); /* fails where the device has closed it already */
        struct pollfd refused = {.fd = fds[opened], .events = POLLIN};

        while (!fe_try_take(&fe, &p))
            if (poll(&refused, 1, 1) == 1)
                goto refused;
        smallest = p.hdr.buf_alloc < smallest ? p.hdr.buf_alloc : smallest;
    }
refused:
    CHECK_EQ(smallest, 8192);
    CHECK_EQ(opened, 128);
    for (uint32_t i = 0; i <= opened; i++)
        close(fds[i]);
    fe_down(&fe);
}

TEST(idle_device_does_not_wake)
{
    struct fe fe;
    struct packet p;
    uint32_t port;
    struct timespec pause = {.tv_nsec = 200000000};

    fe_init(&fe);
    fe_up(&fe);
    int fd = host_open(&fe, 1024, &port);
    /* The worst case: bytes that nobody may take, and a program that has hung up. */
    fe_credit(&fe, 1024, port, 0, 0);
    fe_reclaim_tx(&fe);
    host_write(fd, "stuck", 5);
    fe_expect(&fe, &p, CREDIT_REQUEST, 1024, port);
    close(fd);
    fe_expect(&fe, &p, VIRTIO_VSOCK_OP_SHUTDOWN, 1024, port);
    uint64_t before = fe_stats(&fe).wakeups;

    nanosleep(&pause, NULL); /* this one is the measurement, not a wait for something */
    CHECK(fe_stats(&fe).wakeups - before <= 1);
    /* With credit, data and end go through after all. */
    fe_credit(&fe, 1024, port, 100, 0);
    fe_expect(&fe, &p, RW, 1024, port);
    CHECK_EQ(p.hdr.len, 5);
    fe_expect(&fe, &p, VIRTIO_VSOCK_OP_SHUTDOWN, 1024, port);
    CHECK_EQ(p.hdr.flags, 3);
    fe_down(&fe);
}
