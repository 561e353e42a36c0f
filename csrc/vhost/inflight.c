#include "inflight.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "common/cleanup.h"

#define VERSION 1
#define ALIGNMENT 64U

static size_t queue_bytes(uint32_t queue_size)
{
    size_t bytes = sizeof(struct pv_inflight_queue) + queue_size * sizeof(struct pv_inflight_desc);

    return (bytes + ALIGNMENT - 1) & ~(size_t)(ALIGNMENT - 1);
}

static int map(struct pv_inflight *region, int fd, uint64_t offset, int *err)
{
    region->map = mmap(NULL, region->size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)offset);
    if (region->map == MAP_FAILED) {
        *err = errno;
        return -1;
    }
    region->fd = fd;
    return 0;
}

int pv_inflight_create(struct pv_inflight *region, uint16_t queues, uint16_t queue_size, int *err)
{
    struct pv_inflight fresh = {.size = queues * queue_bytes(queue_size), .queues = queues, .queue_size = queue_size};
    cleanup_fd int fd = memfd_create("inflight", MFD_CLOEXEC | MFD_ALLOW_SEALING);

    if (fd < 0 || ftruncate(fd, (off_t)fresh.size) < 0) {
        *err = errno;
        return -1;
    }
    if (map(&fresh, fd, 0, err) < 0)
        return -1;
    steal_fd(&fd);
    pv_inflight_close(region);
    *region = fresh;
    return 0;
}

int pv_inflight_map(struct pv_inflight *region, int fd, uint64_t size, uint64_t offset, uint16_t queues,
    uint16_t queue_size, int *err)
{
    struct pv_inflight fresh = {.size = queues * queue_bytes(queue_size), .queues = queues, .queue_size = queue_size};
    struct stat st;

    if (fstat(fd, &st) < 0) {
        *err = errno;
        return -1;
    }
    if (!S_ISREG(st.st_mode) || queues == 0 || queue_size == 0 || size < fresh.size || offset > (uint64_t)st.st_size ||
        fresh.size > (uint64_t)st.st_size - offset || offset % 4096) {
        *err = EINVAL;
        return -1;
    }
    if (map(&fresh, fd, offset, err) < 0)
        return -1;
    pv_inflight_close(region);
    *region = fresh;
    return 0;
}

void pv_inflight_close(struct pv_inflight *region)
{
    if (region->map)
        munmap(region->map, region->size);
    if (region->map && region->fd >= 0)
        close(region->fd);
    *region = (struct pv_inflight){.fd = -1};
}

struct pv_inflight_queue *pv_inflight_queue(const struct pv_inflight *region, unsigned queue, uint32_t num)
{
    if (!region->map || queue >= region->queues || num > region->queue_size)
        return NULL;
    return (struct pv_inflight_queue *)((uint8_t *)region->map + queue * queue_bytes(region->queue_size));
}

/* Unmarks what the ring has shown since used_idx was last written. */
static void catch_up(struct pv_inflight_queue *queue, uint32_t num, uint16_t used_idx)
{
    uint16_t head = queue->last_batch_head;

    for (uint16_t left = (uint16_t)(used_idx - queue->used_idx); left > 0 && head < num; left--) {
        queue->desc[head].inflight = 0;
        head = queue->desc[head].next;
    }
    __atomic_store_n(&queue->used_idx, used_idx, __ATOMIC_RELEASE);
}

struct taken {
    uint64_t counter;
    uint16_t head;
};

static int by_counter(const void *a, const void *b)
{
    uint64_t left = ((const struct taken *)a)->counter, right = ((const struct taken *)b)->counter;

    return left < right ? -1 : left > right;
}

int pv_inflight_recover(struct pv_inflight_queue *queue, uint32_t num, uint16_t used_idx, uint16_t *heads)
{
    cleanup_free struct taken *list = calloc(num, sizeof(*list));
    uint32_t count = 0;

    if (!list)
        return -1;
    if (queue->version == 0) {
        memset(queue->desc, 0, num * sizeof(queue->desc[0]));
        queue->desc_num = (uint16_t)num;
        queue->used_idx = used_idx;
        __atomic_store_n(&queue->version, VERSION, __ATOMIC_RELEASE);
    }
    if (queue->version != VERSION || queue->desc_num != num)
        return -1;
    if ((uint16_t)(used_idx - queue->used_idx) > num)
        return -1;
    catch_up(queue, num, used_idx);
    for (uint32_t i = 0; i < num; i++)
        if (queue->desc[i].inflight)
            list[count++] = (struct taken){queue->desc[i].counter, (uint16_t)i};
    qsort(list, count, sizeof(*list), by_counter);
    for (uint32_t i = 0; i < count; i++)
        heads[i] = list[i].head;
    return (int)count;
}

/* The counter need not survive: what is resumed is resumed first, and every later one gets a larger number. */
static uint64_t next_counter(void)
{
    static __thread uint64_t counter;

    if (counter == 0) {
        struct timespec now;

        clock_gettime(CLOCK_MONOTONIC, &now);
        counter = (uint64_t)now.tv_sec * 1000000000U + (uint64_t)now.tv_nsec;
    }
    return ++counter;
}

void pv_inflight_take(struct pv_inflight_queue *queue, uint16_t head)
{
    queue->desc[head].counter = next_counter();
    __atomic_store_n(&queue->desc[head].inflight, 1, __ATOMIC_RELEASE);
}

void pv_inflight_put(struct pv_inflight_queue *queue, uint16_t head)
{
    queue->desc[head].next = queue->last_batch_head;
    __atomic_store_n(&queue->last_batch_head, head, __ATOMIC_RELEASE);
}

void pv_inflight_done(struct pv_inflight_queue *queue, const uint16_t *batch, uint32_t num, uint16_t from, uint16_t to)
{
    for (uint16_t i = from; i != to; i++)
        __atomic_store_n(&queue->desc[batch[i % num]].inflight, 0, __ATOMIC_RELEASE);
    __atomic_store_n(&queue->used_idx, to, __ATOMIC_RELEASE);
}
