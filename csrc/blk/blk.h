/* A vhost-user-blk back end: one virtio block device of a guest, whose requests go to an instance of the I/O filter
 * framework. docs/block.md is the page about it.
 *
 * Errors: functions that can fail return 0 or -1 and store a positive errno in *err. Nothing is printed and nothing
 * aborts; what a guest or a front end did wrong is counted and named (pv_blk_stats, pv_blk_fault).
 * Threads: a device belongs to its loop; everything here is for the loop's thread, but pv_blk_get_stats and
 * pv_blk_fault, which any thread may call.
 */
#ifndef PV_BLK_H
#define PV_BLK_H

#include <stdint.h>

struct pv_blk;
struct pv_instance;
struct pv_loop;

struct pv_blk_config {
    char serial[21];     /* what GET_ID answers: 20 bytes at most */
    uint32_t queues;     /* 1 .. 16 */
    uint32_t read_only;  /* VIRTIO_BLK_F_RO: for the life of the device, whatever disk it is given */
    uint32_t block_size; /* 512 or 4096; 0: 512. A disk with larger blocks is refused */
    /* The capacity that the guest is told, bytes; 0: the disk's own, and 0 while there is none. A device that is
     * part of a template has a fixed one, larger than any disk: the guest remembers it. What lies beyond the disk is
     * an I/O error. */
    uint64_t announce_bytes;
    /* As for the vsock device: told of each mapping of guest memory. NULL: nobody. */
    int (*map_hook)(void *context, int mapped, void *start, uint64_t length, uint64_t offset);
    void *map_context;
    /* The front end has gone, and nothing is held any more. NULL: nobody is told. */
    void (*gone)(struct pv_blk *blk, void *context);
    void *gone_context;
};

struct pv_blk_stats {
    uint64_t connected;      /* 1 while a front end is connected */
    uint64_t running;        /* rings that are live */
    uint64_t requests;       /* of the guest, refused ones included */
    uint64_t refused;        /* malformed, unknown, beyond the disk's end, or no disk is there */
    uint64_t failed;         /* the disk ended them with an error */
    uint64_t resumed;        /* taken over from an earlier process, which had not ended them */
    uint64_t waiting;        /* writes that wait for the host to have space again */
    uint64_t kicks;          /* notifications that woke the loop */
    uint64_t interrupts;     /* notifications sent */
    uint64_t ring_faults;    /* rings that the guest broke */
    uint64_t frontend_faults; /* messages refused */
};

/* A device without a front end and without a disk: reads give zeroes, writes fail.
 * Errors: EINVAL (queues, block_size), ENOMEM. */
int pv_blk_new(struct pv_loop *loop, const struct pv_blk_config *config, struct pv_blk **out, int *err);

/* Gives the device its disk, which lives on the same loop and outlives the device. The guest is told of its size,
 * unless the announced one is fixed. Errors: EBUSY (it has one), EINVAL (blocks too large), EROFS (a read-only disk
 * for a device that promises writes). */
int pv_blk_insert(struct pv_blk *blk, struct pv_instance *instance, int *err);

/* A connected socket of a front end; it becomes the device's on success. Errors: EBUSY (there is one), and what epoll
 * may say. */
int pv_blk_connect(struct pv_blk *blk, int fd, int *err);

/* Accepts front ends, one at a time; the descriptor becomes the device's on success. */
int pv_blk_listen(struct pv_blk *blk, int fd, int *err);

/* Lets go of the front end, at once if nothing is held, else when the last request has ended: `gone` is called. */
void pv_blk_disconnect(struct pv_blk *blk);

/* Frees the device. Only when nothing is held: before it was connected, or after `gone`. NULL is allowed. */
void pv_blk_free(struct pv_blk *blk);

/* Counters as of now; each is exact, but they are not taken at one instant. */
void pv_blk_get_stats(const struct pv_blk *blk, struct pv_blk_stats *out);

/* Name of the latest fault of guest or front end, "" when there was none. The text lives for ever. */
const char *pv_blk_fault(const struct pv_blk *blk);

#endif
