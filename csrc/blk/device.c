/* The device's life, its front end and its rings. Theory of operation: device.h. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "common/cleanup.h"
#include "device.h"

/* ---- rings ------------------------------------------------------------------------------------------------------- */

static bool poll_rings(struct pv_poller *poller)
{
    struct pv_blk *blk = pv_member(poller, struct pv_blk, poller);
    bool found = false;

    for (unsigned i = 0; blk->connected && i < blk->type.rings; i++)
        found |= pv_blk_serve(blk, i);
    return found;
}

static bool arm_rings(struct pv_poller *poller)
{
    struct pv_blk *blk = pv_member(poller, struct pv_blk, poller);
    bool more = false;

    for (unsigned i = 0; blk->connected && i < blk->type.rings; i++) {
        struct pv_vq *vq = &blk->fe.rings[i].vq;

        if (pv_fe_ring_live(&blk->fe, i))
            more |= pv_vq_enable_kicks(vq) || vq->resume_next < vq->resume_count;
    }
    return more;
}

static void disarm_rings(struct pv_poller *poller)
{
    struct pv_blk *blk = pv_member(poller, struct pv_blk, poller);

    for (unsigned i = 0; blk->connected && i < blk->type.rings; i++)
        if (pv_fe_ring_live(&blk->fe, i))
            pv_vq_disable_kicks(&blk->fe.rings[i].vq);
}

static void publish(struct pv_task *task)
{
    struct pv_blk *blk = pv_member(task, struct pv_blk, publish);

    for (; blk->connected && blk->dirty; blk->dirty &= blk->dirty - 1) {
        unsigned ring = (unsigned)__builtin_ctz(blk->dirty);

        if (blk->fe.rings[ring].vq.used && pv_fe_publish(&blk->fe, ring))
            pv_blk_count(&blk->stats.interrupts, 1);
    }
}

/* The poller looks at the ring; the descriptor is edge-triggered and never read. */
static void on_kick(struct pv_event *event, uint32_t events)
{
    struct pv_blk_kick *kick = (struct pv_blk_kick *)event;

    (void)events;
    pv_blk_count(&kick->blk->stats.kicks, 1);
}

static void note_rings(struct pv_blk *blk)
{
    uint64_t live = 0;

    for (unsigned i = 0; blk->connected && i < blk->type.rings; i++)
        live += pv_fe_ring_live(&blk->fe, i);
    __atomic_store_n(&blk->stats.running, live, __ATOMIC_RELAXED);
}

static int on_ring_started(void *opaque, unsigned ring, int kick_fd, int *err)
{
    struct pv_blk *blk = opaque;

    if (pv_loop_watch(blk->loop, kick_fd, EPOLLIN | EPOLLET, &blk->kicks[ring].event, err) < 0 && *err != EEXIST)
        return -1;
    return 0;
}

/* Everything that was pushed is shown before the ring goes. */
static void on_ring_stopped(void *opaque, unsigned ring, int kick_fd)
{
    struct pv_blk *blk = opaque;

    if (blk->dirty & (1U << ring))
        publish(&blk->publish);
    pv_loop_unwatch(blk->loop, kick_fd, &blk->kicks[ring].event);
}

/* ---- the front end's connection ---------------------------------------------------------------------------------- */

/* Another front end waits in the listener's queue until this one has gone. */
static void listen_again(struct pv_blk *blk)
{
    int err;

    if (blk->listen_fd >= 0)
        pv_loop_rewatch(blk->loop, blk->listen_fd, blk->connected ? 0 : EPOLLIN, &blk->listen_event, &err);
}

static void finish_leaving(struct pv_blk *blk)
{
    pv_fe_close(&blk->fe);
    blk->connected = blk->leaving = false;
    blk->dirty = 0;
    __atomic_store_n(&blk->stats.connected, 0, __ATOMIC_RELAXED);
    note_rings(blk);
    listen_again(blk);
    if (blk->config.gone)
        blk->config.gone(blk, blk->config.gone_context);
}

/* No ring is live from now on; what is held ends first, for it writes to the guest's memory. */
static void leave(struct pv_blk *blk)
{
    if (!blk->connected || blk->leaving)
        return;
    blk->leaving = true;
    blk->fe.draining = true;
    pv_loop_unwatch(blk->loop, blk->fe.fd, &blk->frontend_event);
    pv_blk_unpark(blk);
    if (blk->fe.held == 0)
        pv_loop_defer(blk->loop, &blk->resume);
}

static void receive(struct pv_blk *blk)
{
    int err = 0, more = pv_fe_receive(&blk->fe, &err);

    if (more < 0 || blk->fe.fault) {
        pv_blk_count(&blk->stats.frontend_faults, 1);
        pv_blk_set_fault(blk, blk->fe.fault ? blk->fe.fault : "vhost-user: the connection failed");
        blk->fe.fault = NULL;
    }
    note_rings(blk);
    if (more <= 0) {
        leave(blk);
    } else if (blk->fe.draining) { /* nothing more is read before the last request has ended */
        pv_loop_rewatch(blk->loop, blk->fe.fd, 0, &blk->frontend_event, &err);
        pv_blk_unpark(blk);
    }
}

static void on_frontend(struct pv_event *event, uint32_t events)
{
    struct pv_blk *blk = pv_member(event, struct pv_blk, frontend_event);

    if (blk->fe.draining && (events & (EPOLLHUP | EPOLLERR)))
        leave(blk); /* these are told even when nothing is asked for */
    else if (!blk->fe.draining)
        receive(blk);
}

/* The last request that a message or the end had to wait for has ended. */
static void resume(struct pv_task *task)
{
    struct pv_blk *blk = pv_member(task, struct pv_blk, resume);
    int err;

    if (!blk->connected || blk->fe.held > 0)
        return;
    if (blk->dirty)
        publish(&blk->publish);
    if (blk->leaving) {
        finish_leaving(blk);
        return;
    }
    if (!blk->fe.draining)
        return;
    pv_loop_rewatch(blk->loop, blk->fe.fd, EPOLLIN | EPOLLRDHUP, &blk->frontend_event, &err);
    receive(blk);
}

int pv_blk_connect(struct pv_blk *blk, int fd, int *err)
{
    if (blk->connected) {
        *err = EBUSY;
        return -1;
    }
    if (pv_loop_watch(blk->loop, fd, EPOLLIN | EPOLLRDHUP, &blk->frontend_event, err) < 0)
        return -1;
    pv_fe_open(&blk->fe, fd, &blk->type, blk);
    blk->fe.mem.hook = (struct pv_map_hook){blk->config.map_hook, blk->config.map_context};
    blk->connected = true;
    __atomic_store_n(&blk->stats.connected, 1, __ATOMIC_RELAXED);
    listen_again(blk);
    return 0;
}

static void on_connection(struct pv_event *event, uint32_t events)
{
    struct pv_blk *blk = pv_member(event, struct pv_blk, listen_event);
    cleanup_fd int fd = accept4(blk->listen_fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    int err;

    (void)events;
    if (fd >= 0 && pv_blk_connect(blk, fd, &err) == 0)
        steal_fd(&fd);
}

int pv_blk_listen(struct pv_blk *blk, int fd, int *err)
{
    if (blk->listen_fd >= 0) {
        *err = EBUSY;
        return -1;
    }
    if (pv_loop_watch(blk->loop, fd, EPOLLIN, &blk->listen_event, err) < 0)
        return -1;
    blk->listen_fd = fd;
    return 0;
}

void pv_blk_disconnect(struct pv_blk *blk)
{
    leave(blk);
}

/* ---- its disk ---------------------------------------------------------------------------------------------------- */

static void on_resize(struct pv_instance *instance, void *context)
{
    struct pv_blk *blk = context;

    (void)instance;
    if (blk->connected && !blk->config.announce_bytes)
        pv_fe_config_changed(&blk->fe);
}

int pv_blk_insert(struct pv_blk *blk, struct pv_instance *instance, int *err)
{
    *err = 0;
    if (blk->instance)
        *err = EBUSY;
    else if (instance->block_size > blk->config.block_size)
        *err = EINVAL;
    else if (instance->read_only && !blk->config.read_only)
        *err = EROFS;
    if (*err)
        return -1;
    blk->instance = instance;
    instance->on_resize = on_resize;
    instance->resize_context = blk;
    on_resize(instance, blk);
    return 0;
}

/* ---- making and unmaking ----------------------------------------------------------------------------------------- */

static void on_retry(struct pv_timer *timer)
{
    pv_blk_retry(pv_member(timer, struct pv_blk, retry));
}

static void init(struct pv_blk *blk)
{
    blk->listen_fd = blk->fe.fd = -1;
    blk->fault = "";
    blk->frontend_event.ready = on_frontend;
    blk->listen_event.ready = on_connection;
    for (unsigned i = 0; i < PV_RINGS_MAX; i++)
        blk->kicks[i] = (struct pv_blk_kick){.event.ready = on_kick, .blk = blk};
    blk->poller = (struct pv_poller){.poll = poll_rings, .arm = arm_rings, .disarm = disarm_rings};
    blk->publish.run = publish;
    blk->resume.run = resume;
    blk->retry.fire = on_retry;
    pv_list_init(&blk->spare);
    pv_list_init(&blk->parked);
    pv_blk_fill_type(blk);
    blk->type.ring_started = on_ring_started;
    blk->type.ring_stopped = on_ring_stopped;
}

int pv_blk_new(struct pv_loop *loop, const struct pv_blk_config *config, struct pv_blk **out, int *err)
{
    uint32_t block_size = config->block_size ? config->block_size : PV_SECTOR;
    struct pv_blk *blk;

    if (config->queues < 1 || config->queues > PV_RINGS_MAX || (block_size != PV_SECTOR && block_size != 4096) ||
        strnlen(config->serial, sizeof(config->serial)) == sizeof(config->serial)) {
        *err = EINVAL;
        return -1;
    }
    blk = calloc(1, sizeof(*blk));
    if (!blk) {
        *err = ENOMEM;
        return -1;
    }
    blk->loop = loop;
    blk->config = *config;
    blk->config.block_size = block_size;
    init(blk);
    pv_loop_poll(loop, &blk->poller);
    *out = blk;
    return 0;
}

void pv_blk_free(struct pv_blk *blk)
{
    if (!blk)
        return;
    pv_loop_unpoll(blk->loop, &blk->poller);
    pv_loop_disarm(blk->loop, &blk->retry);
    if (blk->connected) {
        if (!blk->leaving)
            pv_loop_unwatch(blk->loop, blk->fe.fd, &blk->frontend_event);
        pv_fe_close(&blk->fe);
    }
    if (blk->listen_fd >= 0) {
        pv_loop_unwatch(blk->loop, blk->listen_fd, &blk->listen_event);
        close(blk->listen_fd);
    }
    if (blk->instance)
        blk->instance->on_resize = NULL;
    pv_blk_free_requests(blk);
    free(blk);
}

void pv_blk_get_stats(const struct pv_blk *blk, struct pv_blk_stats *out)
{
    const uint64_t *from = (const uint64_t *)&blk->stats;
    uint64_t *to = (uint64_t *)out;

    for (size_t i = 0; i < sizeof(*out) / sizeof(*to); i++)
        to[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
}

const char *pv_blk_fault(const struct pv_blk *blk)
{
    return __atomic_load_n(&blk->fault, __ATOMIC_ACQUIRE);
}
