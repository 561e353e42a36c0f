/* The other side: a vhost-user front end with a guest's virtio-blk driver, as small as tests and benches allow. No QEMU,
 * guest memory in a memfd, any vhost-user-blk back end (ours, qemu-storage-daemon's).
 *
 * Guest memory: a guest physical address is the offset into the memfd, a user address is that plus DRV_USER. Each slot
 * of a queue has a header, a status and DRV_DATA bytes of data of its own; a request is a chain of three descriptors
 * with its slot's number as its head.
 *
 * Errors: functions return 0 or -1 and print one line to stderr that says what failed.
 */
#ifndef PV_BLK_DRIVER_H
#define PV_BLK_DRIVER_H

#include <linux/virtio_blk.h>
#include <linux/virtio_ring.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define DRV_USER 0x7f0000000000ULL
#define DRV_QUEUES 4
#define DRV_SLOTS 64 /* requests at once, of one queue */
#define DRV_NUM 256  /* entries of a queue */
#define DRV_DATA (128U << 10)

struct drv_queue {
    struct vring_desc *desc;
    struct vring_avail *avail;
    struct vring_used *used;
    uint16_t avail_idx, last_used;
    uint16_t told; /* available index when the back end was last kicked, or did not want to be */
    int kick, call, err;
    uint64_t base; /* guest address of the queue's part of memory */
};

struct drv {
    int sock, memfd, backend; /* backend: our end of the channel on which the back end asks; -1: none */
    uint8_t *ram;
    size_t ram_size;
    uint64_t features, protocol_features;
    unsigned queues;
    bool indirect, event_idx, polling; /* polling: no interrupts are asked for */
    int inflight;                      /* descriptor of the region; -1: none */
    uint64_t inflight_size;
    struct drv_queue queue[DRV_QUEUES];
    uint64_t kicks, calls;
};

/* Guest memory and event descriptors; they outlive any connection. */
int drv_open(struct drv *drv, unsigned queues);
void drv_close(struct drv *drv);

/* Connects to the back end's socket and negotiates; `wanted` is masked by what is offered. */
int drv_connect(struct drv *drv, const char *path, uint64_t wanted);
int drv_adopt(struct drv *drv, int sock, uint64_t wanted);
void drv_hang_up(struct drv *drv);

/* Starts every queue at the given index; the driver's own counters stay. The in-flight region is made first, if the back
 * end has that, and given again to every later back end. */
int drv_start(struct drv *drv, bool reset);
int drv_stop(struct drv *drv, unsigned queue, uint16_t *base);
int drv_config(struct drv *drv, struct virtio_blk_config *config);

/* vhost-user messages, for tests that go beyond. */
int drv_send(struct drv *drv, uint32_t request, uint32_t flags, const void *payload, uint32_t size, const int *fds,
    unsigned count);
int drv_receive(struct drv *drv, uint32_t request, void *payload, uint32_t size, int *fd);

/* Requests. `drv_submit` makes the slot's chain available; kicks are sent by drv_kick, where the back end wants one. */
void drv_submit(struct drv *drv, unsigned queue, unsigned slot, uint32_t type, uint64_t sector, uint32_t len);
void drv_kick(struct drv *drv, unsigned queue);
/* The next slot that was ended, or -1. */
int drv_take(struct drv *drv, unsigned queue);
/* Waits until drv_take would find something, at most so long. False: time is up. */
bool drv_wait(struct drv *drv, unsigned queue, int timeout_ms);
uint8_t *drv_data(struct drv *drv, unsigned queue, unsigned slot);
uint8_t drv_status(struct drv *drv, unsigned queue, unsigned slot);
uint64_t drv_data_addr(const struct drv *drv, unsigned queue, unsigned slot);
/* Submit, kick, wait, status; 255 when it took longer than 10 s. */
uint8_t drv_do(struct drv *drv, unsigned queue, uint32_t type, uint64_t sector, uint32_t len);

#endif
