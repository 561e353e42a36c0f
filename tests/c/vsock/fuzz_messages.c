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
#include "vhost/vhost_user.h"

void test_register(struct test *test)
{
    (void)test;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define RINGS 3

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
    CHECK(ring < RINGS && fcntl(kick_fd, F_GETFD) >= 0);
}

static void on_reset(void *opaque)
{
    (void)opaque;
}

static int on_config(void *opaque, uint32_t offset, uint8_t *data, uint32_t size)
{
    (void)opaque;
    memset(data, 1, size);
    return offset <= 60 && size <= 60 - offset ? 0 : -1;
}

static int on_set_config(void *opaque, uint32_t offset, const uint8_t *data, uint32_t size)
{
    static uint8_t kept[PV_CONFIG_MAX];

    (void)opaque;
    memcpy(kept, data, size);
    return offset == 0 ? 0 : -1;
}

/* Every feature that there is, and chains that are held: the core alone, as any device may use it. */
#define TYPE(holds_chains)                                                                                        \
    {                                                                                                             \
        .features = (1ULL << 32) | FE_EVENT_IDX | FE_INDIRECT | PV_F_LOG_ALL,                                     \
        .protocol_features = PV_PROTOCOL_MQ | PV_PROTOCOL_LOG_SHMFD | PV_PROTOCOL_REPLY_ACK |                     \
                             PV_PROTOCOL_BACKEND_REQ | PV_PROTOCOL_CONFIG | PV_PROTOCOL_INFLIGHT,                 \
        .rings = RINGS, .queue_max = PV_QUEUE_MAX, .holds = (holds_chains), .ring_started = on_started,           \
        .ring_stopped = on_stopped, .device_reset = on_reset, .get_config = on_config,                            \
        .set_config = on_set_config,                                                                              \
    }

static const struct pv_fe_type PEEKS = TYPE(false), HOLDS = TYPE(true);

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

static void peek_and_take(struct pv_fe *fe, unsigned i)
{
    static struct pv_chain chain;
    struct pv_vq *vq = &fe->rings[i].vq;

    if (pv_vq_peek(vq, &fe->mem, 0, &chain) > 0)
        pv_vq_take(vq, &chain, 0);
}

struct held {
    bool is;
    unsigned ring;
    uint16_t head;
} held;

/* A chain is held until the next look, so that messages come while it is. */
static void push_held(struct pv_fe *fe)
{
    if (!held.is)
        return;
    held.is = false;
    pv_vq_push(&fe->rings[held.ring].vq, held.head, 1);
    pv_fe_publish(fe, held.ring);
    pv_fe_drop(fe);
}

static void pop_and_hold(struct pv_fe *fe, unsigned i)
{
    static struct pv_chain chain;

    if (held.is || pv_vq_pop(&fe->rings[i].vq, &fe->mem, &chain) <= 0)
        return;
    pv_fe_log_written(fe, chain.iov + chain.out_count, chain.in_count, chain.in_len);
    held = (struct held){.is = true, .ring = i, .head = chain.head};
    pv_fe_hold(fe);
}

/* Whatever the rings hold, a live one must be safe to look at. */
static void look_at_rings(struct pv_fe *fe)
{
    for (unsigned i = 0; i < RINGS; i++)
        if (pv_fe_ring_live(fe, i)) {
            struct pv_vq *vq = &fe->rings[i].vq;

            if (fe->type->holds)
                pop_and_hold(fe, i);
            else
                peek_and_take(fe, i);
            pv_vq_enable_kicks(vq);
            pv_vq_disable_kicks(vq);
            pv_fe_publish(fe, i);
        }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static int memfd = -1, event;
    static struct pv_fe fe;
    int pair[2], err, more = 1;
    const struct pv_fe_type *type = size > 0 && data[0] & 128 ? &HOLDS : &PEEKS;

    if (memfd < 0) {
        memfd = memfd_create("guest", MFD_CLOEXEC);
        event = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
        CHECK(ftruncate(memfd, 1 << 20) == 0);
    }
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair) == 0);
    pv_fe_open(&fe, pair[0], type, NULL);
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
        if (more > 0 && fe.draining) {
            push_held(&fe);
            more = pv_fe_receive(&fe, &err);
        }
        look_at_rings(&fe);
        (void)!recv(pair[1], answers, sizeof(answers), MSG_DONTWAIT);
    }
    push_held(&fe);
    pv_fe_close(&fe);
    close(pair[1]);
    return 0;
}
