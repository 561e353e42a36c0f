/* Fuzz target: what a hostile front end says. Input: messages, each a request byte, a flags byte, a size byte, a
 * descriptor byte and the payload; or raw bytes. They are received by the protocol's own code, without the event loop.
 * */
#include <fcntl.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "frontend.h"
#include "harness.h"
#include "vsock/vhost_user.h"

void test_register(struct test *test)
{
    (void)test;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static int on_started(void *opaque, unsigned ring, int kick_fd, int *err)
{
    (void)opaque;
    (void)ring;
    *err = 0;
    return fcntl(kick_fd, F_GETFD) < 0 ? -1 : 0;
}

static void on_stopped(void *opaque, unsigned ring, int kick_fd)
{
    (void)opaque;
    CHECK(ring < PV_RINGS && fcntl(kick_fd, F_GETFD) >= 0);
}

static void on_reset(void *opaque)
{
    (void)opaque;
}

static const struct pv_fe_ops OPS = {on_started, on_stopped, on_reset};

static void send_message(int fd, const void *bytes, size_t len, const int *fds, unsigned count)
{
    char control[CMSG_SPACE(sizeof(int) * 16)] __attribute__((aligned(8))) = {0};
    struct iovec iov = {.iov_base = (void *)bytes, .iov_len = len};
    struct msghdr mh = {.msg_iov = &iov, .msg_iovlen = 1};

    if (count > 0) {
        mh.msg_control = control;
        mh.msg_controllen = CMSG_SPACE(sizeof(int) * count);
        struct cmsghdr *c = CMSG_FIRSTHDR(&mh);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof(int) * count);
        memcpy(CMSG_DATA(c), fds, sizeof(int) * count);
    }
    (void)!sendmsg(fd, &mh, MSG_NOSIGNAL | MSG_DONTWAIT);
}

/* Whatever the rings hold, a live one must be safe to look at. */
static void look_at_rings(struct pv_fe *fe)
{
    static struct pv_chain chain;

    for (unsigned i = 0; i < PV_RINGS; i++)
        if (pv_fe_ring_live(fe, i)) {
            struct pv_vq *vq = &fe->rings[i].vq;

            if (pv_vq_peek(vq, &fe->mem, 0, &chain) > 0)
                pv_vq_take(vq, &chain, 0);
            pv_vq_enable_kicks(vq);
            pv_vq_disable_kicks(vq);
            pv_vq_publish(vq);
        }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static int memfd = -1, event;
    struct pv_fe fe;
    int pair[2], err, more = 1;

    if (memfd < 0) {
        memfd = memfd_create("guest", MFD_CLOEXEC);
        event = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
        CHECK(ftruncate(memfd, 1 << 20) == 0);
    }
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair) == 0);
    pv_fe_open(&fe, pair[0], FE_CID, &OPS, NULL);
    for (int steps = 0; size >= 4 && more > 0 && steps < 64; steps++) {
        uint32_t head[3] = {data[0] & 63, data[1], data[2]};
        unsigned fds = data[3] & 15, payload = data[2] < size - 4 ? data[2] : (unsigned)(size - 4);
        uint8_t message[12 + 256];
        int list[16];
        static uint8_t answers[4096];

        for (unsigned i = 0; i < 16; i++)
            list[i] = data[3] & 16 ? event : memfd;
        if (data[3] & 32)
            head[2] = data[2] * 0x01010101U;
        memcpy(message, head, sizeof(head));
        memcpy(message + 12, data + 4, payload);
        send_message(pair[1], message, 12 + payload, list, fds);
        data += 4 + payload;
        size -= 4 + payload;
        more = pv_fe_receive(&fe, &err);
        look_at_rings(&fe);
        (void)!recv(pair[1], answers, sizeof(answers), MSG_DONTWAIT);
    }
    pv_fe_close(&fe);
    close(pair[1]);
    return 0;
}
