#include "uring.h"

#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <linux/falloc.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define POOL_THREADS 4

struct pool {
    pthread_mutex_t mutex;
    pthread_cond_t work;
    struct pv_link queue; /* struct pv_op */
    bool stopping;
    pthread_t threads[POOL_THREADS];
    unsigned count;
};

struct pv_uring {
    struct pv_loop *loop;
    unsigned users;
    bool is_pool;
    struct pool pool;

    struct io_uring ring;
    struct pv_event event;
    struct pv_poller poller;
    struct pv_task flush;
    struct pv_link waiting; /* struct pv_op: no room in the ring */
    unsigned in_ring;       /* operations that the kernel has or will be given by the next flush */
};

/* ---- io_uring ---- */

static void prepare(struct io_uring_sqe *sqe, struct pv_op *op)
{
    switch (op->type) {
    case PV_OP_READ:
        io_uring_prep_readv(sqe, op->fd, op->iov, op->iov_count, op->offset);
        break;
    case PV_OP_WRITE:
        io_uring_prep_writev2(sqe, op->fd, op->iov, op->iov_count, op->offset, op->durable ? RWF_DSYNC : 0);
        break;
    case PV_OP_SYNC:
        io_uring_prep_fsync(sqe, op->fd, IORING_FSYNC_DATASYNC);
        break;
    case PV_OP_PUNCH:
        io_uring_prep_fallocate(sqe, op->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)op->offset,
            (off_t)op->length);
        break;
    case PV_OP_ZERO:
        io_uring_prep_fallocate(sqe, op->fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, (off_t)op->offset,
            (off_t)op->length);
        break;
    }
    io_uring_sqe_set_data(sqe, op);
}

static void fill(struct pv_uring *uring)
{
    while (!pv_list_empty(&uring->waiting) && uring->in_ring < PV_RING_ENTRIES) {
        struct pv_op *op = pv_member(uring->waiting.next, struct pv_op, link);
        struct io_uring_sqe *sqe = io_uring_get_sqe(&uring->ring);

        if (!sqe)
            return;
        pv_list_remove(&op->link);
        prepare(sqe, op);
        uring->in_ring++;
    }
}

static bool reap(struct pv_uring *uring)
{
    struct io_uring_cqe *cqe;
    bool found = false;

    while (!io_uring_peek_cqe(&uring->ring, &cqe)) {
        struct pv_op *op = io_uring_cqe_get_data(cqe);

        op->result = cqe->res;
        io_uring_cqe_seen(&uring->ring, cqe);
        uring->in_ring--;
        found = true;
        op->done(op);
    }
    if (found && !pv_list_empty(&uring->waiting))
        pv_loop_defer(uring->loop, &uring->flush);
    return found;
}

/* What the page cache has is done when submit returns: no wake-up, no further turn. */
static void flush(struct pv_task *task)
{
    struct pv_uring *uring = pv_member(task, struct pv_uring, flush);

    fill(uring);
    io_uring_submit(&uring->ring); /* EAGAIN, EBUSY: the next flush or turn takes what is left */
    if (io_uring_sq_ready(&uring->ring))
        pv_loop_defer(uring->loop, &uring->flush);
    reap(uring);
}

static void on_ring(struct pv_event *event, uint32_t events)
{
    (void)events;
    reap(pv_member(event, struct pv_uring, event));
}

static bool poll_ring(struct pv_poller *poller)
{
    return reap(pv_member(poller, struct pv_uring, poller));
}

/* A ring gets past seccomp: what it may do is written down in it, for ever. Other operations (open, socket, ...) end
 * with EACCES. */
static int restrict_ring(struct io_uring *ring)
{
    struct io_uring_restriction allowed[] = {
        {.opcode = IORING_RESTRICTION_SQE_OP, .sqe_op = IORING_OP_READV},
        {.opcode = IORING_RESTRICTION_SQE_OP, .sqe_op = IORING_OP_WRITEV},
        {.opcode = IORING_RESTRICTION_SQE_OP, .sqe_op = IORING_OP_FSYNC},
        {.opcode = IORING_RESTRICTION_SQE_OP, .sqe_op = IORING_OP_FALLOCATE},
    };

    if (syscall(SYS_io_uring_register, ring->ring_fd, IORING_REGISTER_RESTRICTIONS, allowed, sizeof(allowed) / sizeof(allowed[0])) ||
        syscall(SYS_io_uring_register, ring->ring_fd, IORING_REGISTER_ENABLE_RINGS, NULL, 0))
        return -errno;
    return 0;
}

static int open_ring(struct pv_uring *uring, int *err)
{
    int status = io_uring_queue_init(PV_RING_ENTRIES, &uring->ring, IORING_SETUP_R_DISABLED);

    if (status) {
        *err = -status;
        return -1;
    }
    status = restrict_ring(&uring->ring);
    if (status) {
        io_uring_queue_exit(&uring->ring);
        *err = -status;
        return -1;
    }
    uring->event.ready = on_ring;
    uring->poller.poll = poll_ring;
    uring->flush.run = flush;
    if (pv_loop_watch(uring->loop, uring->ring.ring_fd, EPOLLIN, &uring->event, err)) {
        io_uring_queue_exit(&uring->ring);
        return -1;
    }
    pv_loop_poll(uring->loop, &uring->poller);
    return 0;
}

static void close_ring(struct pv_uring *uring)
{
    pv_loop_unpoll(uring->loop, &uring->poller);
    pv_loop_unwatch(uring->loop, uring->ring.ring_fd, &uring->event);
    io_uring_queue_exit(&uring->ring);
}

/* ---- the pool ---- */

static ssize_t blocking(const struct pv_op *op)
{
    int count = (int)op->iov_count;

    switch (op->type) {
    case PV_OP_READ:
        return preadv(op->fd, op->iov, count, (off_t)op->offset);
    case PV_OP_WRITE:
        return pwritev2(op->fd, op->iov, count, (off_t)op->offset, op->durable ? RWF_DSYNC : 0);
    case PV_OP_SYNC:
        return fdatasync(op->fd);
    case PV_OP_PUNCH:
        return fallocate(op->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)op->offset, (off_t)op->length);
    default:
        return fallocate(op->fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, (off_t)op->offset, (off_t)op->length);
    }
}

static void pool_done(struct pv_task *task)
{
    struct pv_op *op = pv_member(task, struct pv_op, task);

    op->done(op);
}

static void *pool_thread(void *argument)
{
    struct pv_uring *uring = argument;
    struct pool *pool = &uring->pool;

    pthread_mutex_lock(&pool->mutex);
    for (;;) {
        while (pv_list_empty(&pool->queue) && !pool->stopping)
            pthread_cond_wait(&pool->work, &pool->mutex);
        if (pv_list_empty(&pool->queue))
            break;
        struct pv_op *op = pv_member(pool->queue.next, struct pv_op, link);
        ssize_t result;

        pv_list_remove(&op->link);
        pthread_mutex_unlock(&pool->mutex);
        result = blocking(op);
        op->result = result < 0 ? -errno : (int)result;
        op->task.run = pool_done;
        pv_loop_post(uring->loop, &op->task);
        pthread_mutex_lock(&pool->mutex);
    }
    pthread_mutex_unlock(&pool->mutex);
    return NULL;
}

static void close_pool(struct pool *pool)
{
    pthread_mutex_lock(&pool->mutex);
    pool->stopping = true;
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->mutex);
    while (pool->count)
        pthread_join(pool->threads[--pool->count], NULL);
    pthread_cond_destroy(&pool->work);
    pthread_mutex_destroy(&pool->mutex);
}

static int open_pool(struct pv_uring *uring, int *err)
{
    struct pool *pool = &uring->pool;

    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->work, NULL);
    pv_list_init(&pool->queue);
    while (pool->count < POOL_THREADS) {
        *err = pthread_create(&pool->threads[pool->count], NULL, pool_thread, uring);
        if (*err) {
            close_pool(pool);
            return -1;
        }
        pool->count++;
    }
    uring->is_pool = true;
    return 0;
}

/* ---- both ---- */

struct pv_uring *pv_uring_get(struct pv_loop *loop, bool pool, int *err)
{
    struct pv_uring *uring = loop->uring;

    if (uring) {
        uring->users++;
        return uring;
    }
    uring = calloc(1, sizeof(*uring));
    if (!uring) {
        *err = ENOMEM;
        return NULL;
    }
    uring->loop = loop;
    uring->users = 1;
    pv_list_init(&uring->waiting);
    if ((pool || open_ring(uring, err)) && open_pool(uring, err)) {
        free(uring);
        return NULL;
    }
    loop->uring = uring;
    return uring;
}

void pv_uring_put(struct pv_uring *uring)
{
    if (--uring->users)
        return;
    uring->loop->uring = NULL;
    if (uring->is_pool)
        close_pool(&uring->pool);
    else
        close_ring(uring);
    free(uring);
}

void pv_uring_submit(struct pv_uring *uring, struct pv_op *op)
{
    if (!uring->is_pool) {
        pv_list_append(&uring->waiting, &op->link);
        pv_loop_defer(uring->loop, &uring->flush);
        return;
    }
    pthread_mutex_lock(&uring->pool.mutex);
    pv_list_append(&uring->pool.queue, &op->link);
    pthread_cond_signal(&uring->pool.work);
    pthread_mutex_unlock(&uring->pool.mutex);
}

bool pv_uring_is_pool(const struct pv_uring *uring)
{
    return uring->is_pool;
}
