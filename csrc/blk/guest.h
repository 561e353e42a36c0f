/* The guest's end of a process's disks (iofilter/disks.h), as another language sees it: calls that any thread may make
 * but the loop's own. Each reaches the loop and waits for it. Errors as there: -1 or NULL, and *fail says why.
 */
#ifndef PV_BLK_GUEST_H
#define PV_BLK_GUEST_H

#include <stdbool.h>
#include <stdint.h>

struct pv_blk;
struct pv_blk_config;
struct pv_disk;
struct pv_disk_fail;
struct pv_disks;

/* The loop runs. Keeps what disks to come need of the kernel ready (io_uring's ring), so that a process that has
 * given up the right to make it may still be given disks. */
int pv_guest_prepare(struct pv_disks *disks, struct pv_disk_fail *fail);

/* `gone` of the config is not used. */
struct pv_blk *pv_guest_new(struct pv_disks *disks, const struct pv_blk_config *config, struct pv_disk_fail *fail);
/* The disk is started, and outlives the device. */
int pv_guest_insert(struct pv_blk *blk, struct pv_disk *disk, struct pv_disk_fail *fail);
/* A socket that is connected to a front end; the device's own from now on, also on failure. */
int pv_guest_connect(struct pv_blk *blk, int fd, struct pv_disk_fail *fail);
/* Likewise a listening one. */
int pv_guest_listen(struct pv_blk *blk, int fd, struct pv_disk_fail *fail);
/* Where the trace points of this module go: a struct pv_trace_hook that stays (percpu/trace_point.h), or NULL. Any
 * thread. */
void pv_guest_trace(const void *hook);
/* Waits until what is under way has ended, and frees the device. */
void pv_guest_free(struct pv_blk *blk);

#endif
