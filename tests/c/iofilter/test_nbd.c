/* NBD both ways: our client against our server on two loops, a server that goes and comes back, and clients that break the rules. */
#include <endian.h>
#include <pthread.h>
#include <stddef.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "disk.h"
#include "nbd/nbd.h"
#include "nbd/protocol.h"

struct side {
    struct pv_loop loop;
    pthread_t thread;
    struct pv_instance *disk;
    struct pv_nbd_server *server;
    char path[64];
    int listener;
    bool closed;
};

static void *run_loop(void *loop)
{
    int err;

    CHECK(!pv_loop_run(loop, &err));
    return NULL;
}

static int listen_on(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

    strcpy(address.sun_path, path);
    unlink(path);
    CHECK(fd >= 0 && !bind(fd, (struct sockaddr *)&address, sizeof(address)) && !listen(fd, 16));
    return fd;
}

static void serve(void *argument)
{
    struct side *side = argument;
    struct pv_fail fail;

    if (!side->disk->loop)
        pv_instance_attach_loop(side->disk, &side->loop);
    side->server = pv_nbd_serve(side->disk, NULL, "disk", listen_on(side->path), false, &fail);
    CHECK(side->server);
}

static void server_closed(void *context)
{
    __atomic_store_n(&((struct side *)context)->closed, true, __ATOMIC_RELEASE);
}

static void stop(void *argument)
{
    struct side *side = argument;

    __atomic_store_n(&side->closed, false, __ATOMIC_RELEASE);
    pv_nbd_stop(side->server, server_closed, side);
}

static void is_closed(void *argument)
{
    (void)argument;
}

static void stop_server(struct side *side)
{
    pv_loop_call(&side->loop, stop, side);
    while (!__atomic_load_n(&side->closed, __ATOMIC_ACQUIRE))
        pv_loop_call(&side->loop, is_closed, NULL);
}

static void start_side(struct side *side)
{
    struct pv_fail fail;
    int err;

    memset(side, 0, sizeof(*side));
    snprintf(side->path, sizeof(side->path), "/tmp/pv-nbd-%d", getpid());
    CHECK(!pv_loop_open(&side->loop, 20000, &err));
    side->disk = pv_instance_new("served", pv_data_memory(4 * MIB, &fail), &fail);
    CHECK(!pthread_create(&side->thread, NULL, run_loop, &side->loop));
    pv_loop_call(&side->loop, serve, side);
}

static void quiesce_there(void *argument)
{
    struct side *side = argument;
    struct pv_fail fail;
    bool quiet = false;

    CHECK(!pv_instance_quiesce(side->disk, now_quiet, &quiet, &fail));
    CHECK(quiet);
    pv_instance_detach_loop(side->disk);
}

static void end_side(struct side *side)
{
    struct pv_fail fail;

    pv_loop_call(&side->loop, quiesce_there, side);
    CHECK(!pv_instance_free(side->disk, &fail));
    pv_loop_stop(&side->loop);
    CHECK(!pthread_join(side->thread, NULL));
    pv_loop_close(&side->loop);
    unlink(side->path);
}

static struct pv_instance *client_disk(struct side *side, struct pv_loop *loop, uint32_t patience_ms)
{
    struct pv_fail fail;
    struct pv_data *data = pv_data_nbd(side->path, "disk", patience_ms, &fail);

    if (!data)
        fprintf(stderr, "%s\n", fail.text);
    return disk_on("client", data, loop);
}

static void test_both_ways(struct side *side, struct pv_loop *loop)
{
    struct pv_instance *disk = client_disk(side, loop, 1000);
    static uint8_t out[MIB], in[MIB];
    struct call calls[300];
    static uint8_t data[300][4096];

    CHECK(disk->size == 4 * MIB);
    for (unsigned i = 0; i < sizeof(out); i++)
        out[i] = (uint8_t)(i * 13 + i / 511);
    CHECK(disk_write(disk, MIB, out, MIB) == 0 && disk_read(disk, MIB, in, MIB) == 0 && !memcmp(in, out, MIB));
    CHECK(disk_do(disk, PV_IO_FLUSH, 0, NULL, 0, 0) == 0);
    CHECK(disk_do(disk, PV_IO_WRITE_ZEROES, MIB, NULL, 8192, PV_IO_FUA) == 0);
    CHECK(disk_do(disk, PV_IO_DISCARD, MIB + 8192, NULL, 8192, 0) == 0);
    memset(out, 0, 16384);
    CHECK(disk_read(disk, MIB, in, 16384) == 0 && !memcmp(in, out, 16384));
    for (unsigned i = 0; i < 300; i++) { /* more than either side has slots */
        memset(data[i], (int)i, 4096);
        call_start(&calls[i], disk, PV_IO_WRITE, 4096ull * i, data[i], 4096, 0);
    }
    for (unsigned i = 0; i < 300; i++)
        CHECK(call_wait(&calls[i], loop) == 0);
    for (unsigned i = 0; i < 300; i++)
        CHECK(disk_read(disk, 4096ull * i, in, 4096) == 0 && !memcmp(in, data[i], 4096));
    disk_close(disk);
}

static void test_scattered(struct side *side, struct pv_loop *loop)
{
    struct pv_instance *disk = client_disk(side, loop, 1000);
    static uint8_t pages[600][512], again[600][512];
    struct iovec iov[600];
    struct call call;

    for (unsigned i = 0; i < 600; i++) {
        memset(pages[i], (int)(i + 1), 512);
        iov[i] = (struct iovec){pages[i], 512};
    }
    memset(&call, 0, sizeof(call));
    call.io = (struct pv_io){.type = PV_IO_WRITE, .length = 600 * 512, .iov = iov, .iov_count = 600, .done = call_done, .owner = &call};
    pv_instance_submit(disk, &call.io, 0);
    CHECK(call_wait(&call, loop) == 0);
    for (unsigned i = 0; i < 600; i++)
        iov[i].iov_base = again[i];
    call.over = false;
    call.io.type = PV_IO_READ;
    pv_instance_submit(disk, &call.io, 0);
    CHECK(call_wait(&call, loop) == 0 && !memcmp(pages, again, sizeof(pages)));
    disk_close(disk);
}

static void test_gone_and_back(struct side *side, struct pv_loop *loop)
{
    struct pv_instance *patient = client_disk(side, loop, 60000), *hasty = client_disk(side, loop, 50);
    struct call call;
    char data[512] = "x", in[512];

    CHECK(disk_write(patient, 0, data, 512) == 0);
    stop_server(side);
    unlink(side->path);
    CHECK(disk_read(hasty, 0, in, 512) == EIO); /* after its patience */
    call_start(&call, patient, PV_IO_READ, 0, in, 512, 0);
    turn(loop);
    CHECK(!call.over);
    pv_loop_call(&side->loop, serve, side);
    CHECK(call_wait(&call, loop) == 0 && !memcmp(in, data, 512));
    while (disk_read(hasty, 0, in, 512)) /* it comes back as well */
        turn(loop);
    disk_close(patient);
    disk_close(hasty);
}

static int raw_client(struct side *side)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    strcpy(address.sun_path, side->path);
    CHECK(!connect(fd, (struct sockaddr *)&address, sizeof(address)));
    return fd;
}

static void say(int fd, const void *data, size_t length)
{
    CHECK(send(fd, data, length, MSG_NOSIGNAL) == (ssize_t)length);
}

static void expect_closed(int fd)
{
    char buffer[4096];

    while (recv(fd, buffer, sizeof(buffer), 0) > 0)
        ;
    close(fd);
}

static int raw_export(struct side *side)
{
    int fd = raw_client(side);
    uint32_t flags = htobe32(NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
    struct nbd_option option = {htobe64(NBD_OPTION_MAGIC), htobe32(NBD_OPT_EXPORT_NAME), htobe32(4)};
    char buffer[28];

    say(fd, &flags, 4);
    say(fd, &option, sizeof(option));
    say(fd, "disk", 4);
    CHECK(recv(fd, buffer, sizeof(buffer), MSG_WAITALL) == (ssize_t)sizeof(buffer)); /* greeting 18, size and flags 10 */
    return fd;
}

static void test_rules_broken(struct side *side)
{
    uint32_t bad_flags = htobe32(0xffff), good_flags = htobe32(NBD_FLAG_FIXED_NEWSTYLE);
    struct nbd_option long_option = {htobe64(NBD_OPTION_MAGIC), htobe32(NBD_OPT_GO), htobe32(1u << 30)};
    struct nbd_request request = {htobe32(1), 0, 0, 0, 0, htobe32(512)};
    struct nbd_request huge = {htobe32(NBD_REQUEST_MAGIC), 0, htobe16(NBD_CMD_WRITE), 0, 0, htobe32(UINT32_MAX)};
    struct nbd_request outside = {htobe32(NBD_REQUEST_MAGIC), 0, htobe16(NBD_CMD_READ), 7, htobe64(1ull << 60), htobe32(512)};
    struct nbd_request unknown = {htobe32(NBD_REQUEST_MAGIC), 0, htobe16(77), 8, 0, htobe32(512)};
    struct nbd_reply reply;
    int fd = raw_client(side);

    say(fd, &bad_flags, 4);
    expect_closed(fd);
    fd = raw_client(side);
    say(fd, &good_flags, 4);
    say(fd, &long_option, sizeof(long_option));
    expect_closed(fd);
    fd = raw_export(side);
    say(fd, &request, sizeof(request));
    expect_closed(fd);
    fd = raw_export(side);
    say(fd, &huge, sizeof(huge));
    expect_closed(fd);
    fd = raw_export(side);
    say(fd, &outside, sizeof(outside));
    CHECK(recv(fd, &reply, sizeof(reply), MSG_WAITALL) == sizeof(reply) && be32toh(reply.error) == EINVAL && reply.handle == 7);
    say(fd, &unknown, sizeof(unknown));
    CHECK(recv(fd, &reply, sizeof(reply), MSG_WAITALL) == sizeof(reply) && be32toh(reply.error) == EINVAL && reply.handle == 8);
    close(fd); /* in the middle of everything */
}

/* A client that sends and never reads costs its slots and no more, and others are served. */
static void test_client_that_does_not_read(struct side *side, struct pv_loop *loop)
{
    struct nbd_request read = {htobe32(NBD_REQUEST_MAGIC), 0, htobe16(NBD_CMD_READ), 0, 0, htobe32(MIB)};
    int fd = raw_export(side);
    struct pv_instance *disk = client_disk(side, loop, 1000);
    char in[512];

    for (unsigned i = 0; i < 10000; i++)
        if (send(fd, &read, sizeof(read), MSG_NOSIGNAL | MSG_DONTWAIT) < 0)
            break;
    CHECK(disk_read(disk, 0, in, 512) == 0);
    close(fd);
    disk_close(disk);
}

int main(void)
{
    struct side side;
    struct pv_loop loop;
    struct pv_fail fail;
    int err;

    start_side(&side);
    CHECK(!pv_loop_open(&loop, 20000, &err));
    CHECK(!pv_data_nbd(side.path, "other", 100, &fail) && strstr(fail.text, "no export of that name"));
    test_both_ways(&side, &loop);
    test_scattered(&side, &loop);
    test_gone_and_back(&side, &loop);
    test_rules_broken(&side);
    test_client_that_does_not_read(&side, &loop);
    stop_server(&side);
    end_side(&side);
    pv_loop_close(&loop);
    return 0;
}
