#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <string.h>
#include <unistd.h>

#include "device.h"
#include "iofilter/disks.h"
#include "iofilter/uring.h"
#include "percpu/trace_point.h"

struct call {
    struct pv_blk *blk;
    struct pv_loop *loop;
    const struct pv_blk_config *config;
    struct pv_instance *instance;
    int fd, err;
};

static int say(struct pv_disk_fail *fail, int err, const char *what)
{
    return pv_fail((struct pv_fail *)fail, err, "%s: %s", what, strerror(err));
}

static void prepare(void *argument)
{
    struct call *call = argument;

    call->err = 0;
    pv_uring_get(call->loop, false, &call->err);
}

int pv_guest_prepare(struct pv_disks *disks, struct pv_disk_fail *fail)
{
    struct call call = {.loop = pv_disks_loop(disks)};

    pv_loop_call(call.loop, prepare, &call);
    return call.loop->uring ? 0 : say(fail, call.err, "disks cannot be served");
}

static void make(void *argument)
{
    struct call *call = argument;

    if (pv_blk_new(call->loop, call->config, &call->blk, &call->err) < 0)
        call->blk = NULL;
}

struct pv_blk *pv_guest_new(struct pv_disks *disks, const struct pv_blk_config *config, struct pv_disk_fail *fail)
{
    struct call call = {.loop = pv_disks_loop(disks), .config = config};

    pv_loop_call(call.loop, make, &call);
    if (!call.blk)
        say(fail, call.err, "no block device can be made");
    return call.blk;
}

static void insert(void *argument)
{
    struct call *call = argument;

    pv_blk_insert(call->blk, call->instance, &call->err);
}

int pv_guest_insert(struct pv_blk *blk, struct pv_disk *disk, struct pv_disk_fail *fail)
{
    struct call call = {.blk = blk, .instance = pv_disk_instance(disk)};

    pv_loop_call(blk->loop, insert, &call);
    return call.err ? say(fail, call.err, "the disk cannot be put in") : 0;
}

static void attach_front_end(void *argument)
{
    struct call *call = argument;

    if (pv_blk_connect(call->blk, call->fd, &call->err) == 0)
        call->err = 0;
}

static void attach_listener(void *argument)
{
    struct call *call = argument;

    if (pv_blk_listen(call->blk, call->fd, &call->err) == 0)
        call->err = 0;
}

static int give_socket(struct pv_blk *blk, int fd, void (*attach)(void *), struct pv_disk_fail *fail)
{
    struct call call = {.blk = blk, .fd = fd};

    fcntl(fd, F_SETFL, O_NONBLOCK);
    pv_loop_call(blk->loop, attach, &call);
    if (!call.err)
        return 0;
    close(fd);
    return say(fail, call.err, "the front end cannot be served");
}

int pv_guest_connect(struct pv_blk *blk, int fd, struct pv_disk_fail *fail)
{
    return give_socket(blk, fd, attach_front_end, fail);
}

int pv_guest_listen(struct pv_blk *blk, int fd, struct pv_disk_fail *fail)
{
    return give_socket(blk, fd, attach_listener, fail);
}

/* ---- the end ----------------------------------------------------------------------------------------------------- */

struct ending {
    struct pv_blk *blk;
    bool over;
    pthread_mutex_t mutex;
    pthread_cond_t ended;
};

static void gone(struct pv_blk *blk, void *context)
{
    struct ending *ending = context;

    pthread_mutex_lock(&ending->mutex);
    ending->over = true;
    pthread_cond_signal(&ending->ended);
    pthread_mutex_unlock(&ending->mutex);
    (void)blk;
}

static void begin_end(void *argument)
{
    struct ending *ending = argument;

    ending->blk->config.gone = gone;
    ending->blk->config.gone_context = ending;
    if (ending->blk->connected)
        pv_blk_disconnect(ending->blk);
    else
        gone(ending->blk, ending);
}

static void end(void *argument)
{
    pv_blk_free(argument);
}

void pv_guest_free(struct pv_blk *blk)
{
    struct ending ending = {.blk = blk};
    struct pv_loop *loop;

    if (!blk)
        return;
    loop = blk->loop;
    pthread_mutex_init(&ending.mutex, NULL);
    pthread_cond_init(&ending.ended, NULL);
    pv_loop_call(loop, begin_end, &ending);
    pthread_mutex_lock(&ending.mutex);
    while (!ending.over)
        pthread_cond_wait(&ending.ended, &ending.mutex);
    pthread_mutex_unlock(&ending.mutex);
    pthread_cond_destroy(&ending.ended);
    pthread_mutex_destroy(&ending.mutex);
    pv_loop_call(loop, end, blk);
}

void pv_guest_trace(const void *hook)
{
    pv_trace_use(hook);
}
